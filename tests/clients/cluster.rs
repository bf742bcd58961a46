//! Three members to run a suite against, named as the suites expect it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::ports::free_port;
use crate::rig::PATIENCE;
use crate::rig::process::{Process, Program};

/// A running cluster; it ends with this value.
pub struct Cluster {
    pub program: Program,
    /// The client port of each member.
    pub ports: Vec<u16>,
    members: Vec<Process>,
    dir: TempDir,
}

const MEMBERS: usize = 3;

impl Cluster {
    /// A new cluster whose members all serve.
    pub fn start(program: Program) -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let ports: Vec<u16> = (0..MEMBERS).map(|_| free_port()).collect();
        let peer_urls: Vec<String> =
            (0..MEMBERS).map(|_| format!("http://127.0.0.1:{}", free_port())).collect();
        let initial: Vec<String> =
            peer_urls.iter().enumerate().map(|(n, url)| format!("pifpaf{n}={url}")).collect();
        let initial = initial.join(",");
        let member = |n: usize| {
            let client_url = format!("http://127.0.0.1:{}", ports[n]);
            let mut command = Command::new(program.path());
            // Nothing of this process's environment may set an option.
            command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
            command.current_dir(dir.path());
            command.args(["--name", &format!("pifpaf{n}"), "--data-dir", &format!("pifpaf{n}")]);
            command.args(["--listen-client-urls", &client_url]);
            command.args(["--advertise-client-urls", &client_url]);
            command.args(["--listen-peer-urls", &peer_urls[n]]);
            command.args(["--initial-advertise-peer-urls", &peer_urls[n]]);
            command.args(["--initial-cluster", &initial]);
            command.args(["--logger", "zap", "--log-level", "warn"]);
            Process::spawn(command, &dir.path().join(format!("log{n}")))
        };
        let members = (0..MEMBERS).map(member).collect();
        let mut cluster = Cluster { program, ports, members, dir };
        cluster.wait_ready();
        cluster
    }

    /// Waits until every member answers a linearizable read.
    fn wait_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut asking = Command::new("etcdctl");
            asking.env("ETCDCTL_API", "3").env_remove("ETCDCTL_ENDPOINTS");
            asking.args(["endpoint", "health", "--endpoints", &self.endpoints().join(",")]);
            asking.stdin(Stdio::null());
            let answer = asking.output().expect("etcdctl is installed");
            if answer.status.success() {
                return;
            }
            let said = String::from_utf8_lossy(&answer.stderr);
            if let Some(n) = (0..MEMBERS).find(|&n| self.members[n].ended().is_some()) {
                panic!("{:?}: member {n} has ended:\n{}", self.program, self.logs());
            }
            let late = Instant::now() > deadline;
            assert!(!late, "{:?} is not ready: {said}\n{}", self.program, self.logs());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// `host:port` of every member.
    pub fn endpoints(&self) -> Vec<String> {
        self.ports.iter().map(|port| format!("127.0.0.1:{port}")).collect()
    }

    /// The processes of all members but the first.
    pub fn others(&self) -> Vec<u32> {
        self.members[1..].iter().map(Process::id).collect()
    }

    /// For the files of a run, which end with the cluster.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The ends of the members' logs.
    pub fn logs(&self) -> String {
        let log = |n| {
            let text = std::fs::read_to_string(self.dir.path().join(format!("log{n}")));
            format!("-- member {n}:\n{}", tail(&text.unwrap_or_default(), 20))
        };
        (0..MEMBERS).map(log).collect::<Vec<_>>().join("\n")
    }
}

/// The last `n` lines of `text`.
pub fn tail(text: &str, n: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}
