//! `quorate bench server`: etcd's workloads end to end, over this program with each engine in turn and over
//! any other servers, in rounds that alternate between all.
//!
//! Every server of our own is a single member in a process of its own, on free ports of the loopback device,
//! with a new data directory. All run at the same time, and one is loaded at a time.

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, value_parser};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::mvccpb::KeyValue;
use rustc_hash::FxHashSet;

use super::client::{CallError, Connection, Endpoint, Method};
use super::engines::{self as engine_bench, EnginesError, Output};
use super::interrupt::Interrupt;
use super::machine;
use super::memory::Sampler;
use super::options::{self, Cli, Plan, duration};
use super::outcome::Column;
use super::process;
use super::report::model::{
    self, Cache, Figure, Group, Latency, Measure, Outcome, Report, Run, SCHEMA, Set, Subject,
};
use super::report::table;
use super::session::{Budget, Session};
use super::work::Load;
use super::{BenchError, engines::files};

/// How long a server may take until it answers, and until it has ended.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a key: the number of the key in hexadecimal digits.
const KEY_BYTES: usize = 16;

/// Keys of one page while all are read again.
const PAGE: i64 = 2_000;

/// Measures this program with each storage engine, and other servers beside it, under the same load.
///
/// Servers of this program are started on free ports of the loopback device, with data below --dir, and ended
/// afterwards. Servers given by --versus are only talked to; their keys 0000000000000000 and so on are
/// overwritten.
#[derive(Args, Debug, Clone)]
pub struct ServerArgs {
    /// Engines by name, or all that are built in, or none
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "all")]
    pub engine: Vec<String>,
    /// Other servers of etcd's v3 API, each a single endpoint, with a name for the report if wanted
    #[arg(long, value_name = "[NAME=]HOST:PORT", value_delimiter = ',', value_parser = versus)]
    pub versus: Vec<Versus>,
    /// Their processes, in the same order, to report their CPU time and memory
    #[arg(long, value_name = "PID", value_delimiter = ',', requires = "versus")]
    pub versus_pid: Vec<u32>,
    /// Different keys [default: 10000; 200 with --quick]
    #[arg(long, value_delimiter = ',', value_parser = value_parser!(u64).range(1..=100_000_000))]
    pub keys: Vec<u64>,
    /// Bytes of a value
    #[arg(
        long,
        value_name = "BYTES",
        value_delimiter = ',',
        default_value = "256",
        value_parser = value_parser!(u64).range(1..=1 << 20)
    )]
    pub value_size: Vec<u64>,
    /// Clients of the workloads with many
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u32).range(1..=10_000))]
    pub clients: u32,
    /// Time of each workload on each server, all rounds together [default: 5s; 200ms with --quick]
    #[arg(long, value_parser = duration)]
    pub duration: Option<Duration>,
    /// Turns into which that time is cut [default: 5; 2 with --quick]
    #[arg(long, value_parser = value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Where the random choices begin
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// A small run that shows whether all works; its figures say little
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// A server that somebody else runs.
#[derive(Clone, Debug)]
pub struct Versus {
    name: Option<String>,
    endpoint: Endpoint,
}

fn versus(text: &str) -> Result<Versus, String> {
    let (name, endpoint) = match text.split_once('=') {
        Some(("", _)) => return Err("want a name before =".to_owned()),
        Some((name, endpoint)) => (Some(name.to_owned()), endpoint),
        None => (None, text),
    };
    let endpoint =
        endpoint.parse().map_err(|error: super::client::EndpointError| error.to_string())?;
    Ok(Versus { name, endpoint })
}

/// Why there is no report.
#[derive(thiserror::Error, Debug)]
pub enum ServerError {
    #[error(transparent)]
    Engines(#[from] EnginesError),
    #[error("--engine none: needs a --versus")]
    Nobody,
    #[error("--versus: {0} is also the name of another server, give NAME=HOST:PORT")]
    Name(String),
    #[error("--versus-pid: {pids} processes for {servers} servers")]
    Pids { pids: usize, servers: usize },
    #[error("--rounds {rounds}: less than 10 ms each of --duration {duration:?}")]
    Rounds { rounds: u32, duration: Duration },
    #[error(transparent)]
    Options(#[from] options::OptionsError),
    #[error("cannot start a server with engine {engine}: {why}")]
    Start { engine: String, why: String },
}

impl ServerError {
    /// Whether the command line is to blame.
    pub fn is_usage(&self) -> bool {
        match self {
            ServerError::Engines(error) => error.is_usage(),
            ServerError::Start { .. } => false,
            _ => true,
        }
    }
}

/// One workload.
struct Workload {
    /// The command line of `quorate bench` without what all share.
    words: String,
    /// Name, group, title and unit of each kind of operation that is reported, by its number.
    kinds: Vec<(usize, &'static str, Group, String, &'static str)>,
}

const SYNCED: &str = "each write on the disk of the member before the reply";

fn workloads(args: &ServerArgs) -> Vec<Workload> {
    let many = args.clients;
    let conns = many.div_ceil(10).min(100);
    let pressed = format!("--clients {many} --conns {conns}");
    let read = |word: &str, name, title: &str| Workload {
        words: format!("range --consistency {word} {pressed}"),
        kinds: vec![(0, name, Group::Reads, format!("{title}, {many} clients"), "requests")],
    };
    vec![
        Workload {
            words: "put --clients 1 --conns 1".to_owned(),
            kinds: vec![(0, "put-1", Group::Writes, "Puts, 1 client".to_owned(), "requests")],
        },
        Workload {
            words: format!("put {pressed}"),
            kinds: vec![(0, "put", Group::Writes, format!("Puts, {many} clients"), "requests")],
        },
        read("l", "range-linearizable", "Linearizable reads of one key"),
        read("s", "range-serializable", "Serializable reads of one key"),
        Workload {
            words: format!("mixed --rw-ratio 4 {pressed}"),
            kinds: vec![
                (
                    0,
                    "mixed-reads",
                    Group::Mixed,
                    format!("Reads, 4 for a put, {many} clients"),
                    "requests",
                ),
                (
                    1,
                    "mixed-puts",
                    Group::Mixed,
                    format!("Puts beside 4 reads each, {many} clients"),
                    "requests",
                ),
            ],
        },
        Workload {
            words: "watch --watchers 100 --streams 10 --clients 10 --conns 2 --key-size 32"
                .to_owned(),
            kinds: vec![
                (
                    0,
                    "watch-puts",
                    Group::Mixed,
                    "Puts to a key with 100 watchers, 10 clients".to_owned(),
                    "requests",
                ),
                (
                    1,
                    "watch-events",
                    Group::Mixed,
                    "Events to 100 watchers, from the put's start".to_owned(),
                    "events",
                ),
            ],
        },
    ]
}

/// The plan of a workload against one server.
fn plan(
    args: &ServerArgs,
    workload: &str,
    (keys, value_bytes): (u64, u64),
    limit: Duration,
) -> Result<Plan, ServerError> {
    let watch = workload.starts_with("watch");
    // A watched value begins with a stamp.
    let value_bytes = if watch { value_bytes.max(super::work::STAMP as u64) } else { value_bytes };
    let words = format!(
        "bench {workload} --val-size {value_bytes} --seed {} --duration {}us{}",
        args.seed,
        limit.as_micros(),
        if watch {
            String::new()
        } else {
            format!(" --key-size {KEY_BYTES} --key-space-size {keys}")
        }
    );
    let cli = Cli::try_parse_from(words.split(' ')).expect("the words are ours");
    match cli.program {
        options::Program::One(command) => Ok(command.plan()?),
        _ => unreachable!("the words name a workload"),
    }
}

/// A member of our own, ended when it is forgotten.
struct Member {
    child: Child,
    engine: &'static crate::engines::BuiltIn,
    dir: PathBuf,
    port: u16,
    peer_port: u16,
}

/// A port of the loopback device on which nobody listens. It is below those that the system gives to outgoing
/// connections, so that a server finds it free when it is started again.
fn free_port() -> io::Result<u16> {
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for _ in 0..100 {
        // Each of these has keys of its own, which is all the chance that is needed.
        let port = 12_000 + (RandomState::new().hash_one(0) % 20_000) as u16;
        result = TcpListener::bind(("127.0.0.1", port)).map(|_| port);
        if result.is_ok() {
            break;
        }
    }
    result
}

impl Member {
    /// Starts one and waits until it is healthy. A port may be taken by somebody else meanwhile: then it ends,
    /// and others are tried.
    fn start(
        program: &Path,
        engine: &'static crate::engines::BuiltIn,
        dir: PathBuf,
    ) -> Result<Member, ServerError> {
        let failed = |why: String| ServerError::Start { engine: engine.name().to_owned(), why };
        let mut last = String::new();
        for _ in 0..5 {
            let ports = free_port().and_then(|port| Ok((port, free_port()?)));
            let (port, peer_port) = ports.map_err(|error| failed(error.to_string()))?;
            let child = spawn(program, engine.name(), &dir, port, peer_port)
                .map_err(|error| failed(error.to_string()))?;
            let mut member = Member { child, engine, dir: dir.clone(), port, peer_port };
            match member.healthy() {
                Ok(()) => return Ok(member),
                Err(why) => last = why,
            }
            drop(member);
            if dir.join("data").exists() {
                fs::remove_dir_all(dir.join("data")).map_err(|error| failed(error.to_string()))?;
            }
        }
        Err(failed(last))
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn endpoint(&self) -> Endpoint {
        format!("127.0.0.1:{}", self.port).parse().expect("an address and a port")
    }

    /// Waits until it says that it is healthy.
    fn healthy(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        loop {
            if says_healthy(address).unwrap_or(false) {
                return Ok(());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or_default();
                return Err(format!("it ended, {status}: {last}"));
            }
            if Instant::now() >= deadline {
                return Err(format!("it is not healthy after {} s", PATIENCE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends it in order and starts it on the same data; answers the time from its start to its health.
    fn restart(&mut self, program: &Path) -> Result<Duration, String> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM)
            .map_err(|error| format!("cannot end the server: {error}"))?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().map_err(|error| error.to_string())?.is_none() {
            if Instant::now() >= deadline {
                return Err(format!("the server has not ended after {} s", PATIENCE.as_secs()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let start = Instant::now();
        self.child = spawn(program, self.engine.name(), &self.dir, self.port, self.peer_port)
            .map_err(|error| format!("cannot start the server again: {error}"))?;
        self.healthy()?;
        Ok(start.elapsed())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Both fail if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, engine: &str, dir: &Path, port: u16, peer_port: u16) -> io::Result<Child> {
    fs::create_dir_all(dir)?;
    let log = File::create(dir.join("log"))?;
    let (client, peer) =
        (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    let mut command = Command::new(program);
    command.arg("serve");
    for (flag, value) in [
        ("name", "bench"),
        ("data-dir", &dir.join("data").display().to_string()),
        ("listen-client-urls", &client),
        ("advertise-client-urls", &client),
        ("listen-peer-urls", &peer),
        ("initial-advertise-peer-urls", &peer),
        ("initial-cluster", &format!("bench={peer}")),
        ("engine", engine),
        ("log-level", "warn"),
    ] {
        command.arg(format!("--{flag}={value}"));
    }
    // No variable may change what is measured.
    command.env_clear();
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // Ctrl-C is for this process, which then ends its servers.
    command.process_group(0);
    // SAFETY: one system call without memory of ours. A server must not outlive this process.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    command.spawn()
}

fn says_healthy(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut reply = String::new();
    stream.take(64 << 10).read_to_string(&mut reply)?;
    Ok(reply.starts_with("HTTP/1.1 200"))
}

/// A server that takes part.
struct Side {
    name: String,
    member: Option<Member>,
    /// `None` if it could not be started.
    endpoint: Option<Endpoint>,
    pid: Option<u32>,
    version: String,
    measures: Vec<Measure>,
    sampler: Sampler,
    /// What its files may take.
    disk_bytes_max: u64,
    /// Why it takes part no more.
    failed: Option<String>,
}

impl Side {
    fn new(name: &str, endpoint: Option<Endpoint>, pid: Option<u32>) -> Self {
        Side {
            name: name.to_owned(),
            member: None,
            endpoint,
            pid,
            version: String::new(),
            measures: Vec::new(),
            sampler: Sampler::new(),
            disk_bytes_max: u64::MAX,
            failed: None,
        }
    }

    fn pid(&self) -> Option<u32> {
        self.member.as_ref().map(|member| member.child.id()).or(self.pid)
    }

    fn look(&mut self) {
        if let Some(pid) = self.pid() {
            let dir = self.member.as_ref().map(Member::data).unwrap_or_default();
            // Files come and go while a server runs: the next look may find them.
            let _ = self.sampler.look(pid, &dir);
        }
    }

    /// Keeps the first failure.
    fn fail(&mut self, why: String) {
        self.failed.get_or_insert(why);
    }
}

/// Measures what `args` ask for, with servers that run `program`; `say` is given a line about what is done.
///
/// # Errors
/// If nothing could be measured at all. A server that fails alone is in the report.
pub fn measure(
    args: &ServerArgs,
    program: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<Report, ServerError> {
    let engines = match &args.engine[..] {
        [none] if none == "none" => Vec::new(),
        names => engine_bench::chosen(names)?,
    };
    if engines.is_empty() && args.versus.is_empty() {
        return Err(ServerError::Nobody);
    }
    if !args.versus_pid.is_empty() && args.versus_pid.len() != args.versus.len() {
        let (pids, servers) = (args.versus_pid.len(), args.versus.len());
        return Err(ServerError::Pids { pids, servers });
    }
    let mut names: Vec<String> = engines.iter().map(|engine| engine.name().to_owned()).collect();
    for (at, versus) in args.versus.iter().enumerate() {
        // An address would name somebody's machine in the report.
        let name = versus.name.clone().unwrap_or_else(|| format!("versus-{}", at + 1));
        if names.contains(&name) {
            return Err(ServerError::Name(name));
        }
        names.push(name);
    }
    let limit =
        args.duration.unwrap_or(Duration::from_millis(if args.quick { 200 } else { 5_000 }));
    let rounds = args.rounds.unwrap_or(if args.quick { 2 } else { 5 });
    if limit / rounds < Duration::from_millis(10) {
        return Err(ServerError::Rounds { rounds, duration: limit });
    }
    let keys = match (&args.keys[..], args.quick) {
        ([], true) => vec![200],
        ([], false) => vec![10_000],
        (keys, _) => keys.to_vec(),
    };
    let dir = &args.output.dir;
    let failed = |source| EnginesError::Dir { dir: dir.clone(), source };
    check_room(args, engines.len() as u64, &keys, limit, say)?;

    let interrupt = Interrupt::watch()
        .map_err(|source| EnginesError::System { what: "handle signals", source })?;
    let home = tempfile::Builder::new().prefix("quorate-bench-").tempdir_in(dir).map_err(failed)?;
    let base = home.path().canonicalize().map_err(failed)?;
    let (start, started) = (Instant::now(), SystemTime::now());
    let mut sets = Vec::new();
    let mut versions = vec![String::new(); names.len()];
    for &keys in &keys {
        for &value_bytes in &args.value_size {
            let mut sides = Vec::new();
            for engine in &engines {
                let dir = base.join(format!("{}-{keys}-{value_bytes}", engine.name()));
                let (member, failed) = match Member::start(program, engine, dir) {
                    Ok(member) => (Some(member), None),
                    Err(error) => (None, Some(error.to_string())),
                };
                let endpoint = member.as_ref().map(Member::endpoint);
                sides.push(Side {
                    member,
                    failed,
                    disk_bytes_max: disk_bytes_max(keys, value_bytes, limit),
                    ..Side::new(engine.name(), endpoint, None)
                });
                if interrupt.is_set() {
                    return Err(EnginesError::Interrupted.into());
                }
            }
            for (at, versus) in args.versus.iter().enumerate() {
                let pid = args.versus_pid.get(at).copied();
                let endpoint = Some(versus.endpoint.clone());
                sides.push(Side::new(&names[engines.len() + at], endpoint, pid));
            }
            let size = (keys, value_bytes);
            let runs = run(args, program, sides, size, (limit, rounds), &interrupt, &mut versions)?;
            sets.push(Set { keys, value_bytes, runs });
            for engine in &engines {
                let dir = base.join(format!("{}-{keys}-{value_bytes}", engine.name()));
                fs::remove_dir_all(dir).map_err(failed)?;
            }
        }
    }
    let machine = machine::describe(&base);
    home.close().map_err(failed)?;
    let text = |numbers: &[u64]| numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let mut subjects: Vec<Subject> = engines
        .iter()
        .map(|engine| {
            let mut subject = engine_bench::subject(engine.about, &Default::default());
            subject.summary = format!("quorate with engine {}", engine.name());
            subject
        })
        .collect();
    subjects.extend(names[engines.len()..].iter().map(|name| Subject {
        name: name.clone(),
        summary: "another server".to_owned(),
        facts: Default::default(),
    }));
    for (subject, version) in subjects.iter_mut().zip(versions) {
        subject.facts.insert("version that it tells".to_owned(), version);
    }
    Ok(Report {
        schema: SCHEMA,
        command: model::Command::Server,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        optimised: !cfg!(debug_assertions),
        started_unix_s: started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        elapsed_s: start.elapsed().as_secs_f64(),
        machine,
        settings: [
            ("keys".to_owned(), text(&keys)),
            ("value-size".to_owned(), text(&args.value_size)),
            ("clients".to_owned(), args.clients.to_string()),
            ("duration".to_owned(), format!("{}s", limit.as_secs_f64())),
            ("rounds".to_owned(), rounds.to_string()),
            ("seed".to_owned(), args.seed.to_string()),
        ]
        .into(),
        notes: notes(rounds),
        subjects,
        sets,
    })
}

fn notes(rounds: u32) -> Vec<String> {
    vec![
        format!(
            "All servers run at the same time and one is loaded at a time: each workload is cut into {rounds} \
             rounds, and every round begins with another server, so that what else the machine does falls on all."
        ),
        "Every server is a single member. A put is answered when the write-ahead log has it on the disk. Clients \
         share the machine with the servers; each sends its next request when it has the reply to the last."
            .to_owned(),
        "Keys are read and written at random, and all exist before the first workload; values are random bytes."
            .to_owned(),
        "CPU is processor time of the server's process for one request (for events: for one event), while it was \
         the one under load, in steps of 10 ms: what it puts off beyond its turn is not counted."
            .to_owned(),
        "Checked at the end: all keys are there, and each has a value that was written. Servers of this program \
         are restarted before that, unless they keep everything in memory."
            .to_owned(),
        "×1.00 is the best of a line, for rates the most, for bytes and times the least. An engine that keeps \
         nothing beyond its end is shown as what is possible, and not taken for the best; its bar is broken where it \
         leaves the chart."
            .to_owned(),
    ]
}

/// Bytes of disk that one server may take: writes are bounded by time, so this assumes more in that time than
/// a single member does on one machine.
fn disk_bytes_max(keys: u64, value_bytes: u64, limit: Duration) -> u64 {
    const PUTS_PER_S: u64 = 50_000;
    /// WAL segments that are laid out before they are filled, and what an engine begins with.
    const BASE: u64 = 256 << 20;
    /// What a put takes beside its value.
    const OVERHEAD: u64 = 200;
    // Three workloads only put; of the mixed one it is less.
    let puts = keys + limit.as_millis() as u64 * PUTS_PER_S / 1000 * 3;
    // Once in the log, and in the engine with pages half full.
    BASE + 3 * puts * (value_bytes + OVERHEAD)
}

/// Says what all servers together may take and refuses what is not there.
fn check_room(
    args: &ServerArgs,
    servers: u64,
    keys: &[u64],
    limit: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<(), EnginesError> {
    let dir = &args.output.dir;
    let most = keys.iter().max().copied().unwrap_or(0);
    let value_bytes = args.value_size.iter().max().copied().unwrap_or(0);
    let needed = servers * disk_bytes_max(most, value_bytes, limit);
    let free =
        machine::disk_free(dir).map_err(|source| EnginesError::Dir { dir: dir.clone(), source })?;
    say(&format!(
        "needs up to {} of disk in --dir, which has {} free",
        table::bytes(needed as f64),
        table::bytes(free as f64)
    ));
    if needed > free { Err(EnginesError::Disk { needed, free }) } else { Ok(()) }
}

/// All workloads over all servers with data of one size.
fn run(
    args: &ServerArgs,
    program: &Path,
    mut sides: Vec<Side>,
    size: (u64, u64),
    (limit, rounds): (Duration, u32),
    interrupt: &Interrupt,
    versions: &mut [String],
) -> Result<Vec<Run>, ServerError> {
    let populate =
        plan(args, &format!("range --clients {0} --conns 4", args.clients), size, limit)?;
    let load = load(&populate, args.seed);
    for side in sides.iter_mut() {
        let Some(endpoint) = side.endpoint.clone() else { continue };
        side.sampler.phase("populate");
        let bar = engine_bench::bar(&side.name);
        bar.set_message("populate");
        bar.set_length(size.0);
        let populated = Session::open(&[endpoint], load.clone(), populate.shape.clone()).and_then(
            |mut session| {
                side.version.clone_from(&session.version);
                session.populate(&mut |done| bar.set_position(done))?;
                session.close()
            },
        );
        bar.finish_and_clear();
        if let Err(error) = populated {
            side.fail(error.to_string());
        }
        side.look();
        if interrupt.is_set() {
            return Err(EnginesError::Interrupted.into());
        }
    }
    for workload in workloads(args) {
        let plan = plan(args, &workload.words, size, limit)?;
        one(&workload, &plan, args.seed, &mut sides, (limit, rounds), interrupt)?;
    }
    let mut runs = Vec::new();
    for (mut side, version) in sides.into_iter().zip(versions) {
        version.clone_from(&side.version);
        runs.push(finish(&mut side, program, &load));
    }
    Ok(runs)
}

fn load(plan: &Plan, seed: u64) -> Arc<Load> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mark = since.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32);
    Arc::new(Load::new(plan.work.clone(), plan.keys.clone(), plan.value_size, seed, mark))
}

/// One workload, over all servers that have not failed.
fn one(
    workload: &Workload,
    plan: &Plan,
    seed: u64,
    sides: &mut [Side],
    (limit, rounds): (Duration, u32),
    interrupt: &Interrupt,
) -> Result<(), ServerError> {
    struct Turn {
        session: Option<Session>,
        column: Column,
        cpu: Option<Duration>,
    }
    let load = load(plan, seed);
    let name = workload.kinds.first().expect("something is reported").1;
    let mut turns: Vec<Turn> = Vec::new();
    for side in sides.iter_mut() {
        side.sampler.phase(name);
        let mut turn = Turn {
            session: None,
            column: Column::new(
                side.name.clone(),
                side.version.clone(),
                super::tally::latencies(),
                plan.work.kinds().len(),
            ),
            cpu: side.pid().map(|_| Duration::ZERO),
        };
        if side.failed.is_none()
            && let Some(endpoint) = side.endpoint.clone()
        {
            match Session::open(&[endpoint], load.clone(), plan.shape.clone()) {
                Ok(session) => turn.session = Some(session),
                Err(error) => side.fail(error.to_string()),
            }
        }
        turns.push(turn);
    }
    let warm_up = (limit / rounds / 4).min(Duration::from_millis(500));
    for round in 0..=rounds {
        for at in 0..sides.len() {
            // Every round begins with the next.
            let at = (at + round as usize) % sides.len();
            let (side, turn) = (&mut sides[at], &mut turns[at]);
            let Some(session) = &mut turn.session else { continue };
            if interrupt.is_set() {
                return Err(EnginesError::Interrupted.into());
            }
            let bar = engine_bench::bar(&side.name);
            bar.set_message(format!("{name}, round {round}/{rounds}"));
            let pids: Vec<u32> = side.pid().into_iter().collect();
            let cpu = || process::usage(&pids).map(|usage| usage.cpu);
            let budget = Budget::Time(if round == 0 { warm_up } else { limit / rounds });
            let slice = cpu().map_err(BenchError::from).and_then(|before| {
                let slice = session.slice(budget, &mut |done| {
                    bar.set_position(done);
                    side.look();
                })?;
                Ok((slice, cpu()?.saturating_sub(before)))
            });
            bar.finish_and_clear();
            match slice {
                Ok(_) if round == 0 => {}
                Ok((slice, used)) => {
                    turn.column.add(&slice, &plan.work);
                    turn.cpu = turn.cpu.map(|cpu| cpu + used);
                }
                Err(error) => {
                    turn.session = None;
                    side.fail(format!("{name}: {error}"));
                }
            }
            side.look();
            let taken = side.sampler.disk_most();
            if taken > side.disk_bytes_max {
                turn.session = None;
                let most = table::bytes(side.disk_bytes_max as f64);
                let taken = table::bytes(taken as f64);
                side.fail(format!(
                    "its files take {taken}, more than the {most} that were planned"
                ));
            }
        }
    }
    for (side, turn) in sides.iter_mut().zip(turns) {
        let Some(session) = turn.session else { continue };
        if let Err(error) = session.close() {
            side.fail(format!("{name}: {error}"));
        }
        let column = &turn.column;
        let writes = !name.starts_with("range");
        for (kind, name, group, title, unit) in &workload.kinds {
            let (kind, histogram) = (*kind, &column.tally.kinds[*kind]);
            if histogram.is_empty() {
                side.fail(format!("{name}: nothing succeeded"));
                continue;
            }
            let elapsed_s = column.elapsed.as_secs_f64();
            // All kinds of requests share the time; events come with them.
            let requests: u64 = match *unit {
                "events" => histogram.len(),
                _ => column.tally.kinds[..plan.work.request_kinds()].iter().map(|h| h.len()).sum(),
            };
            side.measures.push(Measure {
                workload: (*name).to_owned(),
                group: *group,
                title: title.clone(),
                durability: (writes && *name != "mixed-reads" && *unit != "events")
                    .then(|| SYNCED.to_owned()),
                cache: (!writes).then_some(Cache::Warm),
                figure: Figure::Rate {
                    unit: (*unit).to_owned(),
                    per_second: if elapsed_s > 0.0 {
                        histogram.len() as f64 / elapsed_s
                    } else {
                        0.0
                    },
                    count: histogram.len(),
                    elapsed_s,
                    latency_us: Latency::of(histogram),
                    cpu_us: turn.cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / requests as f64),
                    write_amplification: None,
                    errors: if kind == 0 { column.tally.error_count() } else { 0 },
                },
            });
        }
        if let Some((error, count)) = column.tally.errors.first_key_value() {
            side.fail(format!("{name}: {count} requests failed, the first with: {error}"));
        }
    }
    Ok(())
}

/// Restarts and checks a server, and gathers what was measured of it.
fn finish(side: &mut Side, program: &Path, load: &Load) -> Run {
    side.sampler.phase("end");
    side.look();
    if side.failed.is_none() {
        if let Some(member) = &mut side.member
            && !engine_bench::keeps_nothing(member.engine)
        {
            let amount = |workload: &str, group, title: &str, figure| Measure {
                workload: workload.to_owned(),
                group,
                title: title.to_owned(),
                durability: None,
                cache: None,
                figure,
            };
            match member.restart(program) {
                Ok(took) => side.measures.push(amount(
                    "restart",
                    Group::Upkeep,
                    "Restart, up to good health",
                    Figure::Seconds { seconds: took.as_secs_f64() },
                )),
                Err(why) => side.failed = Some(why),
            }
            match files::survey(&member.data()) {
                Ok(survey) => side.measures.push(amount(
                    "space-data-dir",
                    Group::Space,
                    "Data directory at the end, log included",
                    Figure::Bytes { bytes: survey.occupied },
                )),
                Err(error) => side.failed = Some(format!("cannot examine its files: {error}")),
            }
        }
        side.sampler.phase("check");
        side.look();
    }
    let checked = match (side.failed.take(), &side.endpoint) {
        (Some(error), _) => Err(error),
        (None, Some(endpoint)) => check(endpoint, load),
        (None, None) => Err("it was not started".to_owned()),
    };
    let outcome = checked.unwrap_or_else(|error| Outcome::Failed { error });
    let sampler = std::mem::replace(&mut side.sampler, Sampler::new());
    let (samples, most) = sampler.finish();
    side.measures.extend(most);
    Run {
        subject: side.name.clone(),
        reference: side.member.as_ref().is_some_and(|m| engine_bench::keeps_nothing(m.engine)),
        outcome,
        measures: std::mem::take(&mut side.measures),
        samples,
    }
}

/// Reads all keys: each must be there, with one of the values that the load can write.
fn check(endpoint: &Endpoint, load: &Load) -> Result<Outcome, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
        .map_err(|error| format!("cannot start a runtime: {error}"))?;
    let values: FxHashSet<&[u8]> = load.values().collect();
    runtime.block_on(async {
        let connection = Connection::open(endpoint.clone(), Duration::from_secs(10), None)
            .await
            .map_err(|error| error.to_string())?;
        let mut channel = connection.channel();
        let (mut from, mut rows, mut bytes, mut digest) = (load.keys.key(0), 0u64, 0u64, 0);
        loop {
            let request = pb::RangeRequest {
                key: from.clone().into(),
                // Behind the digits comes a letter that is none.
                range_end: "g".into(),
                limit: PAGE,
                ..Default::default()
            };
            let reply: Result<pb::RangeResponse, CallError> =
                channel.call(Method::Range, &request).await;
            let reply = reply.map_err(|error| format!("cannot read the keys again: {error}"))?;
            let mut last = None;
            for pair in &reply.kvs {
                let pair = KeyValue::decode(&pair.0[..])
                    .map_err(|error| format!("cannot read the keys again: {error}"))?;
                last = Some(pair.key.clone());
                // Another workload, or another user, has keys of another length.
                if pair.key.len() != KEY_BYTES {
                    continue;
                }
                let wanted = load.keys.key(rows);
                if rows == load.keys.space {
                    break;
                }
                if pair.key != wanted {
                    return Err(format!("verification: key {} is missing", named(&wanted)));
                }
                if !values.contains(&pair.value[..]) {
                    return Err(format!(
                        "verification: key {} has a value that nobody wrote",
                        named(&wanted)
                    ));
                }
                rows += 1;
                bytes += (pair.key.len() + pair.value.len()) as u64;
                digest =
                    crc32c::crc32c_append(crc32c::crc32c_append(digest, &pair.key), &pair.value);
            }
            if rows == load.keys.space {
                return Ok(Outcome::Verified { rows, bytes, digest });
            }
            match last {
                Some(last) if reply.more => {
                    from = last.to_vec();
                    from.push(0);
                }
                _ => {
                    let missing = load.keys.key(rows);
                    return Err(format!("verification: key {} is missing", named(&missing)));
                }
            }
        }
    })
}

fn named(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::work::Keys;

    #[derive(Parser)]
    struct Asked {
        #[command(flatten)]
        args: ServerArgs,
    }

    fn asked(words: &str) -> ServerArgs {
        Asked::try_parse_from(std::iter::once("x").chain(words.split_whitespace())).unwrap().args
    }

    fn refused(words: &str) -> String {
        let refused = measure(&asked(words), Path::new("/bin/false"), &mut |_| {}).unwrap_err();
        assert!(refused.is_usage(), "{refused}");
        refused.to_string()
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_started() {
        assert_eq!(refused("--engine none"), "--engine none: needs a --versus");
        assert!(refused("--engine x").starts_with("--engine x: unknown engine"));
        assert!(refused("--versus redb=a:1 --engine redb").contains("redb is also the name"));
        assert!(refused("--versus a:1,b:1 --versus-pid 1").contains("1 processes for 2 servers"));
        assert!(refused("--rounds 100 --duration 200ms").starts_with("--rounds 100"));
        assert!(versus("=a:1").is_err() && versus("https://a:1").is_err());
        assert_eq!(versus("a=b:1").unwrap().name.as_deref(), Some("a"));
    }

    #[test]
    fn every_workload_has_a_plan_with_the_kinds_that_are_reported() {
        let args = asked("--clients 7");
        for workload in workloads(&args) {
            let plan = plan(&args, &workload.words, (50, 8), Duration::from_secs(1)).unwrap();
            assert_eq!(plan.budget, Budget::Time(Duration::from_secs(1)));
            for (kind, name, ..) in &workload.kinds {
                assert!(*kind < plan.work.kinds().len(), "{name}");
            }
            if plan.name != "watch" {
                assert_eq!((plan.keys.space, plan.keys.size, plan.value_size), (50, 16, 8));
            }
        }
        assert_eq!(Keys::space_max(KEY_BYTES), u64::MAX);
    }

    #[test]
    fn a_server_that_ends_at_once_is_told_with_its_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new("/bin/false");
        let engine = crate::engines::DEFAULT;
        let Err(error) = Member::start(program, engine, dir.path().join("a")) else {
            panic!("started")
        };
        let text = error.to_string();
        assert!(text.starts_with("cannot start a server with engine redb: it ended"), "{text}");
        assert!(!error.is_usage());
    }
}
