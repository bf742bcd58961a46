//! The process that has one engine: told what to do by a line on its standard input, it tells what it
//! measures by lines on its standard output. So each engine has its own memory, and may crash alone.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;

use nix::sys::signal::Signal;

use super::workload::{Event, Job, run};

/// The word on the command line that makes the program a worker.
pub const WORD: &str = "engine-worker";

/// The worker's side. Exit code 0: verified; 1: it has told why not; 2: it was told nothing it understands.
pub fn main() -> u8 {
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    let job: Job = match input.read_line(&mut line).map(|_| serde_json::from_str(&line)) {
        Ok(Ok(job)) => job,
        _ => return 2,
    };
    // When the other end is closed, nobody waits for the figures, and the files are about to go.
    let watch = std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        let mut rest = Vec::new();
        let _ended = input.read_to_end(&mut rest);
        std::process::exit(2);
    });
    let mut tell = |event: Event| {
        let mut out = io::stdout().lock();
        let told = serde_json::to_writer(&mut out, &event)
            .map_err(io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush());
        if told.is_err() {
            std::process::exit(2);
        }
    };
    let ended = match watch {
        Ok(_) => run(&job, &mut tell).map_err(|error| error.to_string()),
        Err(error) => Err(format!("cannot start a thread: {error}")),
    };
    match ended {
        Ok(verified) => {
            let (rows, bytes, digest) = (verified.rows, verified.bytes, verified.digest);
            tell(Event::Verified { rows, bytes, digest });
            0
        }
        Err(error) => {
            tell(Event::Failed { error });
            1
        }
    }
}

/// What comes from a worker.
#[derive(Debug)]
pub enum Told {
    Event(Event),
    /// A line that is no event.
    Nonsense(String),
}

/// A running worker, killed when it is forgotten.
pub struct Worker {
    child: Child,
    /// Ends with the worker's output.
    pub told: mpsc::Receiver<Told>,
    /// What it writes to its standard error, such as the message of a panic.
    errors: Option<std::thread::JoinHandle<String>>,
}

impl Worker {
    /// Starts `program` as a worker.
    ///
    /// # Errors
    /// If the process cannot be started or told what to do.
    pub fn start(program: &Path, job: &Job) -> io::Result<Worker> {
        let mut command = Command::new(program);
        command.args(["bench", WORD]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C is for the parent, which ends its workers.
        command.process_group(0);
        // SAFETY: one system call without memory of ours. A worker must not outlive its parent.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let mut child = command.spawn()?;
        let out = child.stdout.take().expect("it is piped");
        let mut err = child.stderr.take().expect("it is piped");
        let (tell, told) = mpsc::channel();
        let mut worker = Worker { child, told, errors: None };
        let mut line = serde_json::to_string(job)?;
        line.push('\n');
        // It stays open: its end tells the worker that nobody waits any more.
        let input = worker.child.stdin.as_mut().expect("it is piped");
        // If it has ended already, its end is told below.
        let _told = input.write_all(line.as_bytes()).and_then(|()| input.flush());
        std::thread::Builder::new().name("events".to_owned()).spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line);
                if tell.send(event.map_or(Told::Nonsense(line), Told::Event)).is_err() {
                    break;
                }
            }
        })?;
        let errors = std::thread::Builder::new().name("errors".to_owned());
        worker.errors = Some(errors.spawn(move || {
            let mut text = Vec::new();
            // What was read before an error is of use all the same.
            let _read = err.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })?);
        Ok(worker)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end; answers how it ended and the last line of its errors.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn wait(mut self) -> io::Result<(ExitStatus, Option<String>)> {
        let status = self.child.wait()?;
        let errors = self.errors.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        let last = errors.lines().rev().find(|line| !line.trim().is_empty());
        Ok((status, last.map(str::to_owned)))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Both fail if it has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
