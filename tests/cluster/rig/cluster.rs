//! A cluster: its members, its network, and where its clients find it.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use quorate_proto::etcdserverpb as pb;
use tempfile::TempDir;

use super::client::Client;
use super::net::{Net, Node};
use super::process::{Process, Program};
use super::random::Random;
use super::secure::Secure;
use super::{PATIENCE, wait_for};
use crate::ports::free_port;

/// How the members run.
#[derive(Clone, Debug)]
pub struct Options {
    pub heartbeat_ms: u64,
    pub election_ms: u64,
    /// For every member.
    pub args: Vec<String>,
    /// For the members by number, such as another engine.
    pub own_args: Vec<Vec<String>>,
    /// What the members by number run, where it is not what the cluster runs.
    pub own_programs: Vec<Program>,
    /// Of the losses in the network.
    pub seed: u64,
    /// Where there is TLS; nowhere without.
    pub secure: Option<Secure>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            heartbeat_ms: 100,
            election_ms: 1000,
            args: Vec::new(),
            own_args: Vec::new(),
            own_programs: Vec::new(),
            seed: Random::fresh_seed(),
            secure: None,
        }
    }
}

impl Options {
    /// For tests in which much happens and no time is measured.
    pub fn brisk() -> Options {
        Options { heartbeat_ms: 50, election_ms: 500, ..Options::default() }
    }

    pub fn with(mut self, args: &[&str]) -> Options {
        self.args.extend(args.iter().map(ToString::to_string));
        self
    }

    pub fn election(&self) -> Duration {
        Duration::from_millis(self.election_ms)
    }
}

/// Which cluster a member starts with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Initial {
    New,
    Existing,
}

impl Initial {
    fn word(self) -> &'static str {
        match self {
            Initial::New => "new",
            Initial::Existing => "existing",
        }
    }
}

/// One member: its place, and its process while it runs.
pub struct Member {
    pub name: String,
    pub dir: PathBuf,
    pub data: PathBuf,
    pub client_port: u16,
    /// Where the others find it: its proxy.
    pub peer_url: String,
    pub peer_port: u16,
    /// What it is started with beside the cluster's arguments.
    pub args: Vec<String>,
    pub token: String,
    initial: Initial,
    /// `name=url` of those that it is told of.
    initial_cluster: String,
    process: Option<Process>,
    paused: bool,
}

impl Member {
    fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Everything that its processes have written so far.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }
}

/// A running cluster; its processes and its files end with it.
pub struct Cluster {
    pub program: Program,
    pub options: Options,
    pub members: Vec<Member>,
    pub net: Net,
    dir: TempDir,
}

const TOKEN: &str = "proof";

impl Cluster {
    /// A new cluster of `n` members that all serve.
    pub async fn start(program: Program, n: usize, options: Options) -> Cluster {
        let mut cluster = Cluster::prepare(program, n, options);
        for node in 0..n {
            cluster.run(node);
        }
        cluster.wait_ready().await;
        cluster
    }

    /// The members of a new cluster, none of which runs yet.
    pub fn prepare(program: Program, n: usize, options: Options) -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let net = Net::new(options.seed);
        let mut cluster = Cluster { program, options, members: Vec::new(), net, dir };
        for _ in 0..n {
            cluster.place(Initial::New);
        }
        let initial = cluster.initial_cluster(&(0..n).collect::<Vec<_>>());
        for member in &mut cluster.members {
            member.initial_cluster.clone_from(&initial);
        }
        cluster
    }

    /// `name=url` of some members, as a member is told of them.
    pub fn initial_cluster(&self, nodes: &[Node]) -> String {
        let word = |&node: &Node| {
            let member = &self.members[node];
            format!("{}={}", member.name, member.peer_url)
        };
        nodes.iter().map(word).collect::<Vec<_>>().join(",")
    }

    /// A place for one more member; it does not run yet.
    pub fn place(&mut self, initial: Initial) -> Node {
        let node = self.members.len();
        let name = format!("m{node}");
        let dir = self.dir.path().join(&name);
        std::fs::create_dir(&dir).unwrap();
        let peer_port = free_port();
        let proxy = self.net.proxy(node, SocketAddr::from(([127, 0, 0, 1], peer_port)));
        self.members.push(Member {
            data: dir.join("data"),
            name,
            dir,
            client_port: free_port(),
            peer_url: format!("{}://{proxy}", self.scheme(|secure| secure.peers)),
            peer_port,
            args: self.options.own_args.get(node).cloned().unwrap_or_default(),
            token: TOKEN.to_string(),
            initial,
            initial_cluster: String::new(),
            process: None,
            paused: false,
        });
        node
    }

    /// A place for a member that joins the members `others`, to which it has been added.
    pub fn place_joining(&mut self, others: &[Node]) -> Node {
        let node = self.place(Initial::Existing);
        let all: Vec<Node> = others.iter().copied().chain([node]).collect();
        self.members[node].initial_cluster = self.initial_cluster(&all);
        node
    }

    fn scheme(&self, secure: impl FnOnce(&Secure) -> bool) -> &'static str {
        if self.options.secure.as_ref().is_some_and(secure) { "https" } else { "http" }
    }

    /// What member `node` is started with.
    pub fn command(&self, node: Node) -> Command {
        let member = &self.members[node];
        let client_scheme = self.scheme(|secure| secure.client.is_some());
        let client = format!("{client_scheme}://127.0.0.1:{}", member.client_port);
        let peer_scheme = self.scheme(|secure| secure.peers);
        let listen_peer = format!("{peer_scheme}://127.0.0.1:{}", member.peer_port);
        let program = self.options.own_programs.get(node).unwrap_or(&self.program);
        let mut command = Command::new(program.path());
        // Nothing of this process's environment may set an option.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.current_dir(&member.dir);
        command
            .arg(format!("--name={}", member.name))
            .arg(format!("--data-dir={}", member.data.display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={listen_peer}"))
            .arg(format!("--initial-advertise-peer-urls={}", member.peer_url))
            .arg(format!("--initial-cluster={}", member.initial_cluster))
            .arg(format!("--initial-cluster-token={}", member.token))
            .arg(format!("--initial-cluster-state={}", member.initial.word()))
            .arg(format!("--heartbeat-interval={}", self.options.heartbeat_ms))
            .arg(format!("--election-timeout={}", self.options.election_ms))
            .arg("--logger=zap")
            .arg("--log-outputs=stderr")
            .args(&self.options.args)
            .args(&member.args);
        command
    }

    /// Starts member `node` and waits for nothing.
    pub fn run(&mut self, node: Node) {
        assert!(self.members[node].process.is_none(), "member {node} runs");
        let process = Process::spawn(self.command(node), &self.members[node].log());
        self.net.runs(node, Some(process.id()));
        self.members[node].process = Some(process);
    }

    /// Starts member `node` with what must not let it run; answers how it ended and what it wrote.
    pub async fn refused(&mut self, node: Node) -> (ExitStatus, String) {
        let before = self.members[node].log_text().len();
        self.run(node);
        let status = self.wait_end(node).await;
        (status, self.members[node].log_text()[before..].to_string())
    }

    /// Waits until member `node` ends by itself.
    pub async fn wait_end(&mut self, node: Node) -> ExitStatus {
        let process = self.members[node].process.as_mut().expect("it runs");
        let status = process.wait().await;
        self.gone(node);
        status
    }

    /// Whether member `node` has ended by itself; then it can be started again.
    pub fn has_ended(&mut self, node: Node) -> bool {
        let Some(process) = &mut self.members[node].process else { return true };
        let ended = process.ended().is_some();
        if ended {
            self.gone(node);
        }
        ended
    }

    fn gone(&mut self, node: Node) {
        self.net.runs(node, None);
        self.members[node].process = None;
        self.members[node].paused = false;
    }

    /// SIGKILL.
    pub fn kill(&mut self, node: Node) {
        let process = self.members[node].process.as_mut().expect("it runs");
        process.kill();
        self.gone(node);
    }

    /// SIGTERM, and its end.
    pub async fn terminate(&mut self, node: Node) -> ExitStatus {
        self.members[node].process.as_ref().expect("it runs").signal(Signal::SIGTERM);
        self.wait_end(node).await
    }

    /// SIGSTOP: it stands still, its connections stay.
    pub fn pause(&mut self, node: Node) {
        self.members[node].process.as_ref().expect("it runs").signal(Signal::SIGSTOP);
        self.members[node].paused = true;
    }

    pub fn go_on(&mut self, node: Node) {
        self.members[node].process.as_ref().expect("it runs").signal(Signal::SIGCONT);
        self.members[node].paused = false;
    }

    /// Lets everything run again: links, paused members, dead members.
    pub fn heal(&mut self) {
        self.net.heal();
        for node in 0..self.members.len() {
            if self.members[node].paused {
                self.go_on(node);
            }
            if self.members[node].process.is_none() {
                self.run(node);
            }
        }
    }

    /// The members whose processes run and are not paused.
    pub fn running(&self) -> Vec<Node> {
        let runs = |node: &Node| self.members[*node].runs() && !self.members[*node].paused;
        (0..self.members.len()).filter(runs).collect()
    }

    pub fn client(&self, node: Node) -> Client {
        self.client_within(node, Duration::from_secs(10))
    }

    pub fn client_within(&self, node: Node, deadline: Duration) -> Client {
        let connector = self.options.secure.as_ref().and_then(|secure| secure.client.clone());
        Client::new(self.members[node].client_port, deadline, connector)
    }

    pub fn client_ports(&self) -> Vec<u16> {
        self.members.iter().map(|member| member.client_port).collect()
    }

    /// Waits until every running member answers a linearizable read.
    ///
    /// # Panics
    /// If one ends meanwhile.
    pub async fn wait_ready(&mut self) {
        for node in self.running() {
            self.wait_serving(node).await;
        }
    }

    /// Waits until member `node` answers a linearizable read.
    ///
    /// # Panics
    /// If it ends meanwhile.
    pub async fn wait_serving(&mut self, node: Node) {
        let deadline = Instant::now() + PATIENCE;
        let client = self.client_within(node, Duration::from_secs(3));
        loop {
            match client.revision().await {
                Ok(_) => return,
                Err(reason) => self.still_runs(node, deadline, &reason),
            }
            tokio::time::sleep(super::POLL).await;
        }
    }

    fn still_runs(&mut self, node: Node, deadline: Instant, reason: &tonic::Status) {
        let process = self.members[node].process.as_mut().expect("it runs");
        if let Some(status) = process.ended() {
            panic!("member {node} ended ({status}) instead of serving");
        }
        assert!(Instant::now() < deadline, "member {node} does not serve: {reason}");
    }

    /// The leader that a majority of `nodes` names in one term.
    pub async fn leader_among(&self, nodes: &[Node]) -> Node {
        wait_for("a leader", || async {
            let mut named: Vec<(u64, u64)> = Vec::new();
            let mut ids = Vec::new();
            for &node in nodes {
                let client = self.client_within(node, Duration::from_secs(1));
                let Ok(status) = client.status().await else { continue };
                ids.push((status.header.map_or(0, |header| header.member_id), node));
                if status.leader != 0 {
                    named.push((status.raft_term, status.leader));
                }
            }
            let Some(&newest) = named.iter().max() else { return Err("nobody knows".to_string()) };
            let votes = named.iter().filter(|name| **name == newest).count();
            let leader = ids.iter().find(|(id, _)| *id == newest.1);
            match leader {
                Some((_, node)) if votes * 2 > nodes.len() => Ok(*node),
                _ => Err(format!("{votes} of {} name {newest:?}", nodes.len())),
            }
        })
        .await
    }

    /// The leader among those that run.
    pub async fn leader(&self) -> Node {
        self.leader_among(&self.running()).await
    }

    /// Someone of the running members who does not lead.
    pub async fn follower(&self) -> Node {
        let leader = self.leader().await;
        self.running().into_iter().find(|node| *node != leader).expect("more than one runs")
    }

    /// The member's id, asked of itself.
    pub async fn id(&self, node: Node) -> u64 {
        let client = self.client(node);
        wait_for("a member's id", || async {
            let status = client.status().await.map_err(|error| error.to_string())?;
            Ok(status.header.expect("a response has a header").member_id)
        })
        .await
    }

    /// Does something with some member that takes it, trying one after the other.
    pub async fn by_any<T, F>(&self, what: &str, mut ask: impl FnMut(Client) -> F) -> T
    where
        F: Future<Output = Result<T, tonic::Status>>,
    {
        let nodes = self.running();
        let mut turn = 0;
        wait_for(what, || {
            let node = nodes[turn % nodes.len()];
            turn += 1;
            let asked = ask(self.client(node));
            async move { asked.await.map_err(|error| format!("member {node}: {error}")) }
        })
        .await
    }

    /// How long it takes from `since` until a write through one of `nodes` is acknowledged: a new one
    /// is tried every 25 ms, as one that was sent to a leader that is gone may never be answered.
    pub async fn writable_after(&self, nodes: &[Node], since: Instant) -> Duration {
        let mut attempts = tokio::task::JoinSet::new();
        let clients: Vec<Client> = nodes.iter().map(|node| self.client(*node)).collect();
        let mut every = tokio::time::interval(Duration::from_millis(25));
        loop {
            assert!(since.elapsed() < PATIENCE, "no write is acknowledged");
            tokio::select! {
                _ = every.tick() => {
                    for client in &clients {
                        let client = client.clone();
                        attempts.spawn(async move { client.put("!writable", "").await });
                    }
                }
                Some(Ok(Ok(_))) = attempts.join_next() => return since.elapsed(),
            }
        }
    }

    /// Waits until all of `nodes` have applied `revision`, and answers what hash they all have there.
    ///
    /// # Panics
    /// If two differ.
    pub async fn equal_hashes(&self, nodes: &[Node], revision: i64) -> u32 {
        let mut hashes = Vec::new();
        for &node in nodes {
            let client = self.client(node);
            wait_for("a member to catch up", || async {
                match client.local_revision().await {
                    Ok(local) if local >= revision => Ok(()),
                    Ok(local) => Err(format!("member {node} is at {local}, not at {revision}")),
                    Err(error) => Err(format!("member {node}: {error}")),
                }
            })
            .await;
            let hash: pb::HashKvResponse = wait_for("a hash", || async {
                client.hash_kv(revision).await.map_err(|error| format!("member {node}: {error}"))
            })
            .await;
            hashes.push((node, hash.hash, hash.compact_revision));
        }
        let (_, first, compacted) = hashes[0];
        for (node, hash, at) in &hashes {
            assert_eq!((*hash, *at), (first, compacted), "member {node} at {revision}: {hashes:?}");
        }
        first
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Of each member's log, when a test fails.
const LINES_SHOWN: usize = 100;
/// Of lines that are not shown: one for each call that took long.
const NOISE: &str = "\"request stats\"";

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.process = None;
        }
        if !std::thread::panicking() {
            return;
        }
        for member in &self.members {
            let text = member.log_text();
            let lines: Vec<&str> = text.lines().filter(|line| !line.contains(NOISE)).collect();
            let from = lines.len().saturating_sub(LINES_SHOWN);
            eprintln!("--- {}, the end of {} lines of log:", member.name, lines.len());
            for line in &lines[from..] {
                eprintln!("{line}");
            }
        }
        if std::env::var_os("QUORATE_TEST_KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("--- kept: {}", self.dir.path().display());
        }
    }
}
