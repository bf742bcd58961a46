//! One member's process: started, signalled, and always reaped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{PATIENCE, POLL};

/// Which program the members run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    /// The binary under test.
    Quorate,
    /// The installed etcd: what the harness itself is checked with.
    Etcd,
}

impl Program {
    /// `QUORATE_TEST_PROGRAM`: `quorate` (also if it is not set) or `etcd`.
    pub fn from_env() -> Program {
        match std::env::var("QUORATE_TEST_PROGRAM").as_deref() {
            Ok("etcd") => Program::Etcd,
            Ok("quorate" | "") | Err(_) => Program::Quorate,
            Ok(other) => panic!("QUORATE_TEST_PROGRAM={other} is neither quorate nor etcd"),
        }
    }

    pub fn path(self) -> &'static str {
        match self {
            Program::Quorate => env!("CARGO_BIN_EXE_quorate"),
            Program::Etcd => "etcd",
        }
    }
}

/// A running process, killed when it is dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with both its outputs appended to the file `log`.
    pub fn spawn(mut command: Command, log: &Path) -> Process {
        let file = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Process { child, log: log.to_path_buf() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    pub async fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            let log = || std::fs::read_to_string(&self.log).unwrap_or_default();
            assert!(Instant::now() < deadline, "the process does not end: {}", log());
            tokio::time::sleep(POLL).await;
        }
    }

    /// SIGKILL; returns when it is gone, its sockets closed and its locks free.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
