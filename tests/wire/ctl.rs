//! etcdctl against a member: commands that end, and those that go on until they are told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::server::{Member, PATIENCE};

/// `etcdctl args` against a member whose endpoint is written as `endpoint`.
pub fn etcdctl(member: &Member, endpoint: &str, args: &[&str]) -> Command {
    let mut command = Command::new("etcdctl");
    // Settings of the surroundings would name another server.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCDCTL_") {
            command.env_remove(name);
        }
    }
    command.env("ETCDCTL_API", "3").args(["--endpoints", endpoint]).args(args);
    command.current_dir(member.scratch());
    command
}

/// Waits for a command to end that reads `input`.
pub fn run(mut command: Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("etcdctl is installed");
    // One that refuses its arguments does not read.
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
    child.wait_with_output().unwrap()
}

/// What a command printed and how it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Printed {
    pub out: String,
    /// Without the lines of the client's own log, which have times and random names in them.
    pub errors: String,
    pub code: Option<i32>,
}

/// What a command of a member came to; what belongs to one member (its addresses, and so the ids that
/// follow from them) has a common name.
pub fn printed(member: &Member, output: &Output) -> Printed {
    let errors = String::from_utf8_lossy(&output.stderr);
    let told: Vec<_> = errors.lines().filter(|line| !line.starts_with("{\"level\"")).collect();
    Printed {
        out: normal(member, &String::from_utf8_lossy(&output.stdout)),
        errors: normal(member, &told.join("\n")),
        code: output.status.code(),
    }
}

pub fn normal(member: &Member, text: &str) -> String {
    text.replace(&member.endpoint(), "ENDPOINT").replace(&member.peer_url(), "PEER")
}

/// A program that goes on; it ends with this value at the latest.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Running {
    pub fn start(mut command: Command) -> Running {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (sender, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        // It ends with the program's output.
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, lines, seen: Vec::new() }
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.seen.push(line.clone());
                line
            }
            Err(error) => panic!("no line: {error}; before: {:?}", self.seen),
        }
    }

    pub fn lines(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.line()).collect()
    }

    /// Tells it to end. Not with SIGINT: a Go program that a background job starts ignores that, as its
    /// parent does.
    pub fn terminate(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
    }

    /// The rest of what it prints, what it says of errors, and its exit code, which one that a signal
    /// ended has not.
    pub fn end(mut self) -> (Vec<String>, String, Option<i32>) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end behind {:?}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut errors = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        (self.lines.iter().collect(), errors, status.code())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}
