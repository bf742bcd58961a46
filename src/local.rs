//! `local-cluster`: a cluster on this machine, a process a member, to try clusters out.
//!
//! Data stays where it is, so that the next call goes on with it. Nothing is restarted: who wants to
//! see what a cluster does without a member kills one.

use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::config::flags;
use crate::engines;

/// What `--help` tells.
pub const USAGE: &str = "\
Usage:
  quorate local-cluster [flags] [-- flags of each member]

A cluster on this machine, a process a member. Data is kept, and a later call goes on with it.

Flags:
  --members 3                 how many members, 1 to 9
  --base-dir quorate-local    directory with a data directory for each member
  --client-port 2379          port for clients; the members after the first get it plus 20000, 30000
                              and so on; or one port for each member, with commas
  --peer-port 2380            the same for the members' own connections
  --engine redb               storage engine
  --engines redb,memory,...   one for each member instead
";

/// How long members may take to end before they are killed: clients are given a request timeout to
/// go, and the engine is brought to disk.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// What a member's port lies above the first one's: the numbers of a well-known example come first, and
/// nine members fit above etcd's own ports.
const STEPS: [usize; MEMBERS_MAX] =
    [0, 20_000, 30_000, 40_000, 50_000, 60_000, 10_000, 25_000, 35_000];

const MEMBERS_MAX: usize = 9;

/// Why there is no cluster. All are the operator's to mend.
#[derive(thiserror::Error, Debug)]
pub enum LocalError {
    #[error("flag provided but not defined: {0}")]
    UnknownFlag(String),
    #[error("flag needs an argument: {0}")]
    NoValue(String),
    #[error("--members must be 1 to {MEMBERS_MAX} (set to {0:?})")]
    Members(String),
    #[error("--{flag} has {given} values for {members} members: give one, or one for each")]
    Count { flag: &'static str, given: usize, members: usize },
    #[error("--{flag}: {value:?} is no port")]
    Port { flag: &'static str, value: String },
    #[error("--{flag} {first} leaves no port for member {member}: name one for each member")]
    NoPortLeft { flag: &'static str, first: u16, member: usize },
    #[error("port {0} is given twice")]
    PortTwice(u16),
    #[error("unknown engine {0:?}")]
    Engine(String),
    #[error("--engine and --engines exclude each other")]
    BothEngines,
    #[error(
        "{} holds a cluster that was made as {was}, not as {asked}: call for that one, or choose \
         another --base-dir",
        dir.display()
    )]
    Other { dir: PathBuf, was: String, asked: String },
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start {name}: {source}")]
    Start {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot handle signals: {0}")]
    Signals(#[source] io::Error),
}

/// One member to be run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Planned {
    pub name: String,
    pub client_url: String,
    pub peer_url: String,
    pub data_dir: PathBuf,
    pub engine: Option<String>,
}

/// A cluster to be run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    pub base_dir: PathBuf,
    pub members: Vec<Planned>,
    /// Flags that every member gets.
    pub extra: Vec<String>,
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Asked {
    Help,
    Run(Layout),
}

impl Layout {
    /// Reads the words behind `local-cluster`.
    ///
    /// # Errors
    /// Any [`LocalError`] that needs no look at the machine.
    pub fn parse(args: &[String]) -> Result<Asked, LocalError> {
        let mut members = "3".to_owned();
        let mut base_dir = PathBuf::from("quorate-local");
        let (mut client, mut peer) = ("2379".to_owned(), "2380".to_owned());
        let (mut engine, mut engines) = (None, None);
        let mut words = args.iter();
        let mut extra = Vec::new();
        while let Some(word) = words.next() {
            if word == "--" {
                extra.extend(words.by_ref().cloned());
                break;
            }
            let unknown = || LocalError::UnknownFlag(word.clone());
            let flag = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
            let (name, value) = match flag.ok_or_else(unknown)?.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag.unwrap_or_default(), None),
            };
            if matches!(name, "help" | "h") {
                return Ok(Asked::Help);
            }
            let known = ["members", "base-dir", "client-port", "peer-port", "engine", "engines"];
            if !known.contains(&name) {
                return Err(unknown());
            }
            let value = value
                .or_else(|| words.next().cloned())
                .ok_or_else(|| LocalError::NoValue(word.clone()))?;
            match name {
                "members" => members = value,
                "base-dir" => base_dir = PathBuf::from(value),
                "client-port" => client = value,
                "peer-port" => peer = value,
                "engine" => engine = Some(value),
                _ => engines = Some(value),
            }
        }
        let count = members.parse().ok().filter(|count| (1..=MEMBERS_MAX).contains(count));
        let count = count.ok_or(LocalError::Members(members))?;
        let client = ports("client-port", &client, count)?;
        let peer = ports("peer-port", &peer, count)?;
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = client.iter().chain(&peer).find(|port| !seen.insert(**port)) {
            return Err(LocalError::PortTwice(*twice));
        }
        let engines = match (engine, engines) {
            (Some(_), Some(_)) => return Err(LocalError::BothEngines),
            (Some(one), None) => vec![Some(one); count],
            (None, Some(each)) => each.split(',').map(|name| Some(name.to_owned())).collect(),
            (None, None) => vec![None; count],
        };
        if engines.len() != count {
            let given = engines.len();
            return Err(LocalError::Count { flag: "engines", given, members: count });
        }
        if let Some(name) = engines.iter().flatten().find(|name| engines::find(name).is_none()) {
            return Err(LocalError::Engine(name.clone()));
        }
        let members = (1..).zip(client.into_iter().zip(peer)).zip(engines);
        let members = members
            .map(|((n, (client, peer)), engine)| Planned {
                name: format!("member-{n}"),
                client_url: format!("http://127.0.0.1:{client}"),
                peer_url: format!("http://127.0.0.1:{peer}"),
                data_dir: base_dir.join(format!("member-{n}")),
                engine,
            })
            .collect();
        Ok(Asked::Run(Layout { base_dir, members, extra }))
    }

    /// The members as `--initial-cluster` has them.
    pub fn initial_cluster(&self) -> String {
        let entries = self.members.iter().map(|m| format!("{}={}", m.name, m.peer_url));
        entries.collect::<Vec<_>>().join(",")
    }

    /// The flags of one member, as pairs of name and value; [`Layout::extra`] comes behind.
    pub fn flags(&self, member: &Planned) -> Vec<(&'static str, String)> {
        let mut flags = vec![
            ("name", member.name.clone()),
            ("data-dir", member.data_dir.display().to_string()),
            ("listen-client-urls", member.client_url.clone()),
            ("advertise-client-urls", member.client_url.clone()),
            ("listen-peer-urls", member.peer_url.clone()),
            ("initial-advertise-peer-urls", member.peer_url.clone()),
            ("initial-cluster", self.initial_cluster()),
            ("initial-cluster-state", "new".to_owned()),
            ("initial-cluster-token", "quorate-local".to_owned()),
            ("log-format", "console".to_owned()),
        ];
        flags.extend(member.engine.clone().map(|engine| ("engine", engine)));
        flags
    }

    fn command(&self, member: &Planned, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("serve");
        // What is set here must not be shadowed, which a member refuses, nor replaced by a file.
        command.env_remove("ETCD_CONFIG_FILE");
        for (name, value) in self.flags(member) {
            command.arg(format!("--{name}={value}"));
            if let Some(flag) = flags::find(name) {
                command.env_remove(flag.env());
            }
        }
        command.args(&self.extra);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Ctrl-C is for this process, which then stops all members in its own way.
        command.process_group(0);
        // SAFETY: one system call without memory of ours. A member must not outlive this process.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?));
        }
        command
    }

    /// Makes the directory that the data is in; refuses one of another cluster, whose members would
    /// go on with their own addresses.
    fn claim(&self) -> Result<(), LocalError> {
        let file = |what, path: &Path| {
            let path = path.to_path_buf();
            move |source| LocalError::File { what, path, source }
        };
        let note = self.base_dir.join("initial-cluster");
        let asked = self.initial_cluster();
        match fs::read_to_string(&note) {
            Ok(was) if was.trim() == asked => return Ok(()),
            Ok(was) => {
                let was = was.trim().to_owned();
                return Err(LocalError::Other { dir: self.base_dir.clone(), was, asked });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file("read", &note)(error)),
        }
        fs::create_dir_all(&self.base_dir).map_err(file("create", &self.base_dir))?;
        let aside = self.base_dir.join("initial-cluster.tmp");
        fs::write(&aside, format!("{asked}\n")).map_err(file("write", &aside))?;
        fs::rename(&aside, &note).map_err(file("write", &note))
    }
}

/// The ports of all members: given one by one, or counted up from the first as etcd's own example of
/// a local cluster does.
fn ports(flag: &'static str, text: &str, members: usize) -> Result<Vec<u16>, LocalError> {
    let words: Vec<&str> = text.split(',').collect();
    let mut given = Vec::new();
    for word in &words {
        let port = word.parse::<u16>().ok().filter(|port| *port > 0);
        given.push(port.ok_or_else(|| LocalError::Port { flag, value: (*word).to_owned() })?);
    }
    if given.len() == members {
        return Ok(given);
    }
    let [first] = given[..] else {
        return Err(LocalError::Count { flag, given: given.len(), members });
    };
    (1..=members)
        .map(|member| {
            let step = STEPS[member - 1];
            u16::try_from(usize::from(first) + step).map_err(|_| LocalError::NoPortLeft {
                flag,
                first,
                member,
            })
        })
        .collect()
}

/// What is told once all members run.
struct Table<'a> {
    layout: &'a Layout,
    pids: Vec<u32>,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls = self.layout.members.iter().map(|member| member.client_url.len());
        let width = urls.max().unwrap_or(0).max("CLIENT URL".len());
        writeln!(f, "{:<9}  {:<width$}  {:<8}  DATA DIRECTORY", "NAME", "CLIENT URL", "PID")?;
        for (member, pid) in self.layout.members.iter().zip(&self.pids) {
            let (name, url, dir) = (&member.name, &member.client_url, member.data_dir.display());
            writeln!(f, "{name:<9}  {url:<width$}  {pid:<8}  {dir}")?;
        }
        let bare = |url: &str| url.trim_start_matches("http://").to_owned();
        let ends: Vec<String> = self.layout.members.iter().map(|m| bare(&m.client_url)).collect();
        writeln!(f, "\netcdctl --endpoints={} endpoint status -w table", ends.join(","))
    }
}

/// A member's process; killed if it is forgotten.
struct Process {
    name: String,
    child: Child,
    running: bool,
}

impl Process {
    fn signal(&self, signal: Signal) {
        // It may just have ended: it is not reaped before `running` is false, so the ID is its own.
        if self.running {
            kill(Pid::from_raw(self.child.id().cast_signed()), signal).ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().ok();
    }
}

/// Runs what `args` ask for. Exit codes: 2 for a command line that cannot be read, 1 for a cluster
/// that cannot be started, of which every member has ended by itself, or that had to be killed.
pub fn run(args: &[String]) -> ExitCode {
    let layout = match Layout::parse(args) {
        Ok(Asked::Help) => {
            tell(USAGE);
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Run(layout)) => layout,
        Err(error) => return refuse(&format!("{error}\n{USAGE}"), 2),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run_cluster(&layout)),
        Err(error) => Err(LocalError::Signals(error)),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => refuse(&format!("{error}\n"), 1),
    }
}

/// Writes whole lines, so that those of several members do not mix. A reader that has gone needs none.
fn tell(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

fn refuse(text: &str, code: u8) -> ExitCode {
    let _ = io::stderr().write_all(text.as_bytes());
    ExitCode::from(code)
}

/// Whether all went as it was asked for.
async fn run_cluster(layout: &Layout) -> Result<bool, LocalError> {
    let mut interrupts = signal(SignalKind::interrupt()).map_err(LocalError::Signals)?;
    let mut terminations = signal(SignalKind::terminate()).map_err(LocalError::Signals)?;
    layout.claim()?;
    let program = std::env::current_exe().map_err(|source| LocalError::File {
        what: "find",
        path: PathBuf::from("the program itself"),
        source,
    })?;
    let (ends, mut ended) = mpsc::unbounded_channel();
    let mut processes = Vec::new();
    for (number, member) in layout.members.iter().enumerate() {
        let started = layout.command(member, &program).spawn();
        let mut child =
            started.map_err(|source| LocalError::Start { name: member.name.clone(), source })?;
        let lines = [
            child.stdout.take().map(|out| pass_on(&member.name, out)),
            child.stderr.take().map(|err| pass_on(&member.name, err)),
        ];
        let pid = Pid::from_raw(child.id().cast_signed());
        processes.push(Process { name: member.name.clone(), child, running: true });
        let ends = ends.clone();
        std::thread::spawn(move || {
            // Its last lines come before what is told of its end.
            for thread in lines.into_iter().flatten() {
                thread.join().ok();
            }
            // Not reaped here: as long as the process is a zombie, its ID belongs to nobody else.
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).ok();
            ends.send(number).ok();
        });
    }
    let pids = processes.iter().map(|process| process.child.id()).collect();
    tell(&Table { layout, pids }.to_string());

    while processes.iter().any(|process| process.running) {
        let signal = tokio::select! {
            Some(number) = ended.recv() => {
                reap(&mut processes[number]);
                continue;
            }
            _ = interrupts.recv() => "interrupt",
            _ = terminations.recv() => "terminated",
        };
        tell(&format!("local-cluster | {signal}: stopping the members\n"));
        return Ok(stop(&mut processes, &mut ended, &mut interrupts).await);
    }
    tell("local-cluster | every member has ended\n");
    Ok(false)
}

/// Stops what still runs, all at once; a second interrupt or the end of patience kills. Answers whether
/// nothing had to be killed.
async fn stop(
    processes: &mut [Process],
    ended: &mut mpsc::UnboundedReceiver<usize>,
    interrupts: &mut tokio::signal::unix::Signal,
) -> bool {
    for process in processes.iter() {
        process.signal(Signal::SIGTERM);
    }
    let mut patience = std::pin::pin!(tokio::time::sleep(STOP_WITHIN));
    let mut clean = true;
    while processes.iter().any(|process| process.running) {
        tokio::select! {
            Some(number) = ended.recv() => {
                reap(&mut processes[number]);
                continue;
            }
            () = &mut patience, if clean => {}
            _ = interrupts.recv() => {}
        }
        clean = false;
        for process in processes.iter().filter(|process| process.running) {
            tell(&format!("local-cluster | killing {}\n", process.name));
            process.signal(Signal::SIGKILL);
        }
    }
    clean
}

fn reap(process: &mut Process) {
    process.running = false;
    let how = match process.child.wait() {
        Ok(status) => outcome(status),
        Err(error) => format!("ended in a way that is not known ({error})"),
    };
    tell(&format!("local-cluster | {} {how}\n", process.name));
}

fn outcome(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("was ended by {signal}"),
            Err(_) => format!("was ended by signal {number}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

/// Shows what a member writes, each line with its name.
fn pass_on(name: &str, from: impl Read + Send + 'static) -> std::thread::JoinHandle<()> {
    let name = name.to_owned();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(from);
        let mut line = Vec::new();
        while matches!(lines.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line);
            tell(&format!("{name} | {}\n", text.trim_end_matches('\n')));
            line.clear();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn layout(text: &str) -> Layout {
        match Layout::parse(&words(text)).unwrap() {
            Asked::Run(layout) => layout,
            Asked::Help => panic!("help was not asked for"),
        }
    }

    #[test]
    fn there_is_a_port_for_each_of_nine_members() {
        let members = layout("--members 9").members;
        let urls: Vec<&str> = members.iter().map(|member| member.client_url.as_str()).collect();
        let expected = [2379, 22379, 32379, 42379, 52379, 62379, 12379, 27379, 37379]
            .map(|port| format!("http://127.0.0.1:{port}"));
        assert_eq!(urls, expected);
    }

    #[test]
    fn three_members_on_etcds_ports_are_the_default() {
        let three = layout("");
        assert_eq!(
            three.initial_cluster(),
            "member-1=http://127.0.0.1:2380,member-2=http://127.0.0.1:22380,\
             member-3=http://127.0.0.1:32380"
        );
        let urls: Vec<&str> = three.members.iter().map(|m| m.client_url.as_str()).collect();
        assert_eq!(
            urls,
            ["http://127.0.0.1:2379", "http://127.0.0.1:22379", "http://127.0.0.1:32379"]
        );
        assert_eq!(three.members[1].data_dir, Path::new("quorate-local/member-2"));
        for (name, _) in three.flags(&three.members[0]) {
            assert!(flags::find(name).is_some(), "{name}");
        }
    }

    #[test]
    fn all_can_be_chosen() {
        let two = layout(
            "--members=2 -base-dir d --client-port 11,12 --peer-port 21,22 --engines \
             redb,memory -- --log-level debug",
        );
        assert_eq!(
            two.initial_cluster(),
            "member-1=http://127.0.0.1:21,member-2=http://127.0.0.1:22"
        );
        assert_eq!(two.members[1].client_url, "http://127.0.0.1:12");
        assert_eq!(two.members[1].engine.as_deref(), Some("memory"));
        assert_eq!(two.members[0].data_dir, Path::new("d/member-1"));
        assert_eq!(two.extra, ["--log-level", "debug"]);
        let one = layout("--members 1 --client-port 60000 --engine memory");
        assert_eq!(one.members.len(), 1);
        let flags = one.flags(&one.members[0]);
        assert!(flags.contains(&("engine", "memory".to_owned())));
        assert_eq!(Layout::parse(&words("--help")).unwrap(), Asked::Help);
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (text, said) in [
            ("x", "flag provided but not defined: x"),
            ("--member 3", "flag provided but not defined: --member"),
            ("--members", "flag needs an argument: --members"),
            ("--members 0", r#"--members must be 1 to 9 (set to "0")"#),
            ("--members ten", r#"--members must be 1 to 9 (set to "ten")"#),
            ("--client-port 0", r#"--client-port: "0" is no port"#),
            ("--peer-port 1,x,3", r#"--peer-port: "x" is no port"#),
            (
                "--client-port 1,2",
                "--client-port has 2 values for 3 members: give one, or one for each",
            ),
            (
                "--client-port 40000",
                "--client-port 40000 leaves no port for member 3: name one for each member",
            ),
            ("--client-port 2380", "port 2380 is given twice"),
            ("--engine sled", r#"unknown engine "sled""#),
            ("--engine redb --engines redb", "--engine and --engines exclude each other"),
            (
                "--engines redb,memory",
                "--engines has 2 values for 3 members: give one, or one for each",
            ),
        ] {
            assert_eq!(Layout::parse(&words(text)).unwrap_err().to_string(), said);
        }
    }

    #[test]
    fn a_directory_stays_with_its_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        let of = |ports: &str| {
            layout(&format!("--members 1 --base-dir {} --peer-port {ports}", base.display()))
        };
        of("7001").claim().unwrap();
        of("7001").claim().unwrap();
        let error = of("7002").claim().unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "{} holds a cluster that was made as member-1=http://127.0.0.1:7001, not as \
                 member-1=http://127.0.0.1:7002: call for that one, or choose another --base-dir",
                base.display()
            )
        );
    }

    #[test]
    fn the_table_tells_where_everything_is() {
        let two = layout("--members 2");
        assert_eq!(
            Table { layout: &two, pids: vec![17, 4711] }.to_string(),
            "NAME       CLIENT URL              PID       DATA DIRECTORY\n\
             member-1   http://127.0.0.1:2379   17        quorate-local/member-1\n\
             member-2   http://127.0.0.1:22379  4711      quorate-local/member-2\n\
             \n\
             etcdctl --endpoints=127.0.0.1:2379,127.0.0.1:22379 endpoint status -w table\n"
        );
    }
}
