//! The member as a process: reads its directory, starts the actors, serves, and stops them in reverse.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use actix::prelude::*;
use axum::Router;
use engine_api::{Durability, Engine, Reclaim, Table};
use nix::sys::signal::{SigHandler, Signal};
use quorate_proto::{membershippb, walpb};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::actors::applier::{self, Applier, Checkpoint};
use crate::actors::committer::BatchCommitter;
use crate::actors::compactor::{self, Compactor};
use crate::actors::disk::{OsDisk, SharedDisk};
use crate::actors::exit::{Exit, Reason, full};
use crate::actors::integrity::{self, Integrity, Peers};
use crate::actors::lease::LeaseManager;
use crate::actors::monitor::{AlarmOptions, Monitor, server_versions};
use crate::actors::peers;
use crate::actors::raft::{self, Abandon, AdvanceTicks, RaftActor, RequestError};
use crate::actors::shared::{Published, Shared};
use crate::actors::snapshot::{self, Snapshotter};
use crate::actors::spawn::{Seat, arbiter};
use crate::actors::wal::{self, Close, WalWriter};
use crate::actors::watch::WatchHub;
use crate::bootstrap::{self, Birth, BootstrapError, Plan, adopt};
use crate::cli::ETCD_VERSION;
use crate::config::duration::GoDuration;
use crate::config::{Config, ConfigError, Gate, Origins, Retention, Url};
use crate::core::apply::{Machine, STORAGE_VERSION};
use crate::core::autocompact::{self, AutoCompaction};
use crate::core::cluster_version;
use crate::core::command::{Command, Request};
use crate::core::lease::{CHECKPOINT_INTERVAL_MS, LessorOptions, min_ttl};
use crate::core::membership::{Membership, Version};
use crate::core::raft::{Config as RaftConfig, Node, Restored};
use crate::core::types::{ClusterId, Index, MemberId, Term};
use crate::core::watch::{Hub, HubOptions};
use crate::engines;
use crate::logging::{self, Logging};
use crate::metrics::Metrics;
use crate::storage::install::{InstallError, Installer, OpenEngine};
use crate::storage::lock::DataDirLock;
use crate::storage::snap_dir::SnapDir;
use crate::storage::wal_log::{self, Recovered, WalLog};
use crate::transport::gateway::Gateway;
use crate::transport::grpc::maintenance::Maintenance;
use crate::transport::http::member::HttpMember;
use crate::transport::http::status::{ClientRules, client_router, metrics_router};
use crate::transport::listener::{self, Bound, Served, Services, Workers};
use crate::transport::login::Passwords;
use crate::transport::member::{Limits, Member};
use crate::transport::peer;
use crate::transport::peer::client::Dialer;
use crate::transport::peer::hashkv::Asker;
use crate::transport::peer::network::{self, Net, Network, RaftLink};
use crate::transport::peer::server::Door;
use crate::transport::peer::snapshot::{FromEngine, Snapshots};
use crate::transport::socket::{Secured, Security};
use crate::transport::tls::{self, TlsError};
use crate::transport::token::{SystemClock, Tokens};
use crate::utl::convert::CONVERTING;

/// File descriptors that are kept for everything but client connections (operations 1.4).
const RESERVED_FILES: u64 = 150;
/// A gRPC message may be larger than a request by this much (v3-api section 5).
const GRPC_OVERHEAD: usize = 512 * 1024;
/// Connections to the peer port: a few for each member, and those of the curious.
const PEER_CONNECTIONS_MAX: usize = 4096;
/// A connection to a peer has to stand within this and an election timeout (formats-and-peers 6.3).
const PEER_DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a starting member looks how many others it can reach.
const REACHABLE_POLL: Duration = Duration::from_millis(50);
/// Between two tries to publish, if the first was refused at once.
const PUBLISH_PAUSE: Duration = Duration::from_millis(100);
/// Transport threads at most: more do not help while one thread applies.
const TRANSPORT_THREADS_MAX: usize = 8;

/// Why a member does not start.
#[derive(thiserror::Error, Debug)]
enum StartError {
    #[error("{0}")]
    Refused(String),
    #[error("the member has been permanently removed from the cluster")]
    Removed,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    #[error(transparent)]
    Lock(#[from] crate::storage::lock::LockError),
    #[error(transparent)]
    Wal(#[from] wal_log::WalError),
    #[error(transparent)]
    Snapshots(#[from] crate::storage::snap_dir::SnapError),
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error("storage engine: {0}")]
    Engine(#[from] engine_api::EngineError),
    #[error("raft log: {0}")]
    Raft(#[from] crate::core::raft::RaftError),
    #[error(transparent)]
    Bind(#[from] listener::BindError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot access data directory: {}: {source}", path.display())]
    Dir {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Runs a member until it is told to stop or cannot go on.
///
/// Ends by the signal that stopped it, as etcd does; exit code 1 if it could not start or go on.
pub fn run(config: Config, _logging: Logging) -> ExitCode {
    end_on_panic();
    // Each thread's allocator would begin with huge pages of which it uses little: resident memory is
    // a quarter less without them after 100,000 puts, at the same CPU time. A kernel that refuses
    // only costs memory.
    nix::sys::prctl::set_thp_disable(true).ok();
    let system = actix::System::new();
    let ended = system.block_on(async {
        match start(&config).await {
            Ok(daemon) => daemon.serve().await,
            Err(StartError::Removed) => {
                log_removed(&config);
                Ended::Removed
            }
            Err(error) => {
                // etcd says this whatever kept it from starting; scripts look for it.
                crate::fatal!(error = %full(&error), "discovery failed");
                Ended::Failed
            }
        }
    });
    match ended {
        Ended::Failed => ExitCode::FAILURE,
        Ended::Removed => ExitCode::SUCCESS,
        Ended::Signal(signal) => {
            if std::process::id() != 1 {
                // SAFETY: the default action is restored, no handler of ours is installed.
                unsafe {
                    if nix::sys::signal::signal(signal, SigHandler::SigDfl).is_ok() {
                        nix::sys::signal::raise(signal).ok();
                    }
                }
            }
            ExitCode::SUCCESS
        }
    }
}

/// A member that has lost an actor must not go on answering. Release builds abort on a panic anyway;
/// this does the same, after the log line, in builds that unwind.
fn end_on_panic() {
    let log = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        log(info);
        std::process::abort();
    }));
}

/// How long a member that is refused by its own raft waits to hear why.
const STOP_REASON: Duration = Duration::from_secs(2);

/// How the member ended.
enum Ended {
    Failed,
    Removed,
    Signal(Signal),
}

/// What a member is found to be when its directory has been read.
struct Found {
    member_id: MemberId,
    cluster_id: ClusterId,
    engine: Arc<dyn Engine>,
    installer: Installer,
    log: WalLog,
    recovered: Recovered,
    machine: Machine,
    unfinished: Option<i64>,
    /// Members that the log does not tell of yet.
    remotes: Vec<(MemberId, Vec<Url>)>,
}

/// A started member.
struct Daemon {
    config: Config,
    member: Arc<Member>,
    peers: Arc<dyn Peers>,
    /// The last index in the log when this member started.
    log_end: Index,
    wal: Addr<WalWriter>,
    exits: mpsc::UnboundedReceiver<Reason>,
    listeners: Vec<Listener>,
    workers: Workers,
    peer_workers: Workers,
    options: listener::Options,
    arbiters: Vec<Arbiter>,
    _lock: DataDirLock,
}

/// A socket that is bound, and what is to be served on it.
struct Listener {
    what: &'static str,
    /// Those of the configuration that have its address: one, or one of each scheme.
    urls: Vec<Url>,
    bound: Bound,
    security: Security,
    served: Served,
}

fn server_version() -> Version {
    Version::parse(ETCD_VERSION).expect("a constant version parses")
}

/// What opens the engine that the configuration names, and puts others in its place.
fn installer(
    config: &Config,
    disk: &SharedDisk,
    snapshots: &SnapDir,
) -> Result<Installer, StartError> {
    let engine = config.storage.engine;
    let options = engine_api::Options::new(engine.about, &config.storage.engine_options)
        .map_err(|error| StartError::Refused(format!("engine-options: {error}")))?;
    let home = engine.home(&config.member.data_dir);
    let open: OpenEngine = Arc::new(move |dir| engine.open(dir, &options));
    Ok(Installer::new(disk.clone(), snapshots.clone(), home, open, server_version()))
}

/// Refuses a log that begins behind a snapshot when the engine's files are gone. Without a snapshot
/// the log holds everything, and an engine is filled from it; with a received one, from its database.
fn check_engine_is_there(
    config: &Config,
    disk: &SharedDisk,
    installer: &Installer,
) -> Result<(), StartError> {
    let data_dir = &config.member.data_dir;
    let Some(home) = config.storage.engine.home(data_dir) else { return Ok(()) };
    if home.exists().map_err(|source| StartError::Dir { path: home.path(), source })? {
        return Ok(());
    }
    let wal_dir = config.member.wal_dir();
    let newest = wal_log::read(&**disk, &wal_dir, newest)?;
    let index = newest.start.index();
    if index > 0 && !installer.has_received(index)? {
        return Err(StartError::Refused(format!(
            "database file ({}) of the backend is missing, but the write-ahead log in {} goes on \
             from a snapshot at index {index}",
            home.path().display(),
            wal_dir.display()
        )));
    }
    Ok(())
}

/// Refuses directories that are not ours to write to.
fn check_directory(config: &Config) -> Result<(), StartError> {
    let data_dir = &config.member.data_dir;
    let member = data_dir.join("member");
    if std::fs::metadata(data_dir).is_ok_and(|found| !found.is_dir()) {
        let source = std::io::ErrorKind::NotADirectory.into();
        return Err(StartError::Dir { path: data_dir.clone(), source });
    }
    if data_dir.join("proxy").exists() {
        return Err(StartError::Refused(format!(
            "data directory {} belongs to a v2 proxy",
            data_dir.display()
        )));
    }
    if data_dir.join(CONVERTING).exists() {
        return Err(StartError::Refused(format!(
            "data directory {} holds a conversion that has not come to its end ({CONVERTING}): let \
             `quorate utl engine convert` do it again, or remove the directory",
            data_dir.display()
        )));
    }
    let wanted = config.storage.engine;
    let present =
        engines::present(data_dir).map_err(|source| StartError::Dir { path: member, source })?;
    if let [_, _, ..] = &present[..] {
        let names: Vec<&str> = present.iter().map(|engine| engine.name()).collect();
        return Err(StartError::Refused(format!(
            "data directory {} holds the data of several engines ({}): only those of one are the member's",
            data_dir.display(),
            names.join(", ")
        )));
    }
    let Some(other) = present.iter().find(|engine| **engine != wanted) else { return Ok(()) };
    let whose = match engines::etcds() == Some(other) {
        true => format!("engine {}, or was written by etcd", other.name()),
        false => format!("engine {}", other.name()),
    };
    let convert = match wanted.home(data_dir) {
        None => String::new(),
        Some(_) => format!(
            ", or convert it into a new directory: quorate utl engine convert --from-dir {} --to-dir \
             NEW --engine {}",
            data_dir.display(),
            wanted.name()
        ),
    };
    Err(StartError::Refused(format!(
        "data directory {} holds the data of {whose}, but engine {} is configured: start with --engine \
         {}{convert}",
        data_dir.display(),
        wanted.name(),
        other.name(),
    )))
}

fn create_dir(path: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| StartError::Dir { path: path.to_path_buf(), source })
}

/// The record to start from: the log before it may have been replaced.
fn newest(valid: &[walpb::Snapshot]) -> walpb::Snapshot {
    valid.iter().max_by_key(|record| record.index()).cloned().unwrap_or_default()
}

/// Reads the data directory; one without a log begins as `birth` says.
fn read_directory(
    config: &Config,
    disk: &SharedDisk,
    snapshots: &SnapDir,
    birth: Option<&Birth>,
) -> Result<Found, StartError> {
    let installer = installer(config, disk, snapshots)?;
    installer.clean()?;
    let wal_dir = config.member.wal_dir();
    if birth.is_none() {
        check_engine_is_there(config, disk, &installer)?;
    }
    let mut engine = installer.open()?;
    let view = engine.view()?;
    let ttl_min = min_ttl(config.raft.election_ms);
    let blank = Membership::new(ClusterId(0), MemberId(0), config.cluster.max_learners as usize);
    if let Some(stored) = view.get(Table::Meta, STORAGE_VERSION)? {
        let stored = String::from_utf8_lossy(&stored).into_owned();
        let version = Version::parse(&stored);
        let ours = server_version();
        if version.is_none_or(|v| (v.major, v.minor) > (ours.major, ours.minor)) {
            return Err(StartError::Refused(format!(
                "data directory {} has storage version {stored:?}, newer than this server's \
                 {ETCD_VERSION}: start a newer server",
                config.member.data_dir.display()
            )));
        }
    }
    let restored = Machine::restore(&*view, blank, ttl_min, server_version())?;
    drop(view);
    if restored.orphans > 0 {
        tracing::warn!(
            keys = restored.orphans,
            "keys name a lease that does not exist; they are kept and never expire"
        );
    }
    let (mut machine, mut unfinished) = (restored.machine, restored.unfinished);
    let mut applied = machine.applied();
    if let Some(birth) = birth {
        if applied.0 > 0 {
            return Err(StartError::Refused(format!(
                "the engine in {} has applied entry {applied}, but there is no write-ahead log in {}",
                config.member.data_dir.display(),
                wal_dir.display()
            )));
        }
        birth.write_log(disk, &wal_dir)?;
    }
    let mut to_install = None;
    let (log, recovered) = WalLog::open(disk.clone(), &wal_dir, |valid| {
        let newest = newest(valid);
        if newest.index() > applied.0 {
            match installer.has_received(newest.index()) {
                // An engine in memory has no other beginning than that of the log.
                Ok(false) if !installer.is_persistent() => return walpb::Snapshot::default(),
                _ => to_install = Some(installer.received(&newest, valid)),
            }
        }
        newest
    })?;
    if let Some(received) = to_install {
        let received = received?;
        let index = recovered.start.index();
        if !installer.has_received(index)? {
            return Err(StartError::Refused(format!(
                "database file ({} index {applied}) does not match with snapshot (index {index})",
                config.member.data_dir.join("member").display()
            )));
        }
        drop(engine);
        engine = installer.install(&received)?;
        let restored = machine.replaced_by(&*engine.view()?)?;
        (machine, unfinished) = (restored.machine, restored.unfinished);
        applied = machine.applied();
        tracing::info!(
            "snapshot-index" = index,
            "applied-index" = applied.0,
            revision = machine.store.now().revision(),
            "installed the database that came with the newest snapshot"
        );
    }
    // Of those received, an engine on disk holds what it needs.
    let needed = recovered.start.index() + u64::from(installer.is_persistent());
    snapshots.release_dbs(needed)?;
    // Whatever the engine has applied was on disk in the log before: this is another's or an older log.
    // Going on would give numbers to new entries that the engine takes for done.
    if applied.0 > recovered.last_index {
        return Err(StartError::Refused(format!(
            "the engine in {} has applied entry {applied}, but the write-ahead log in {} ends at \
             entry {}",
            config.member.data_dir.display(),
            wal_dir.display(),
            recovered.last_index
        )));
    }
    if applied.0 > 0 && machine.term().0 == 0 {
        let snapshot = installer.received(&recovered.start, &recovered.snapshots)?;
        let batch = adopt::mend(&machine.members, applied, &snapshot, &recovered.entries)?;
        engine.commit(&batch, Durability::Durable)?;
        let restored = machine.replaced_by(&*engine.view()?)?;
        (machine, unfinished) = (restored.machine, restored.unfinished);
        tracing::info!(
            "applied-index" = applied.0,
            members = machine.members.members().len(),
            "took over the directory of an etcd of before 3.5"
        );
    }
    if let Some(torn) = &recovered.torn {
        tracing::warn!(
            path = %torn.segment.display(),
            offset = torn.at,
            "repaired a write-ahead log that a crash had cut short"
        );
    }
    let member_id = MemberId(recovered.metadata.node_id());
    let cluster_id = ClusterId(recovered.metadata.cluster_id());
    machine.members.local = member_id;
    machine.members.cluster_id = cluster_id;
    let remotes = birth.map_or_else(Vec::new, |birth| birth.remotes.clone());
    Ok(Found {
        member_id,
        cluster_id,
        engine,
        installer,
        log,
        recovered,
        machine,
        unfinished,
        remotes,
    })
}

/// Builds the raft node that goes on where the directory ends.
fn restore_node(config: &Config, found: &Found) -> Result<Node, StartError> {
    let recovered = &found.recovered;
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let raft = RaftConfig {
        election_ticks: config.raft.election_ticks() as usize,
        pre_vote: config.raft.pre_vote,
        ..RaftConfig::new(found.member_id, seed)
    };
    let restored = Restored {
        hard_state: recovered.hard_state,
        conf_state: found.machine.members.conf_state(),
        snapshot: (Index(recovered.start.index()), Term(recovered.start.term())),
        entries: recovered.entries.clone(),
        applied: found.machine.applied(),
    };
    Ok(Node::new(&raft, restored)?)
}

/// Binds what the configuration says. URLs of one list that differ only in their scheme share a socket.
fn bind_all(
    config: &Config,
    options: &listener::Options,
) -> Result<Vec<(&'static str, Vec<Url>, Bound, Security)>, StartError> {
    let listen = &config.listen;
    let mut servers = TlsServers { config, clients: None, peers: None };
    let mut bound = Vec::new();
    for (what, urls) in [
        ("peer", &listen.peer_urls),
        ("client", &listen.client_urls),
        ("client-http", &listen.client_http_urls),
        ("metrics", &listen.metrics_urls),
    ] {
        let mut addresses: Vec<Vec<Url>> = Vec::new();
        for url in urls {
            let same = |other: &Vec<Url>| socket_of(&other[0]) == socket_of(url);
            match addresses.iter_mut().find(|other| same(other)) {
                Some(address) => address.push(url.clone()),
                None => addresses.push(vec![url.clone()]),
            }
        }
        for urls in addresses {
            let security = servers.security(what, &urls)?;
            let socket = listener::bind(&urls[0], options)?;
            bound.push((what, urls, socket, security));
        }
    }
    Ok(bound)
}

/// TLS for listeners, set up when the first of them wants it.
struct TlsServers<'a> {
    config: &'a Config,
    clients: Option<tls::Server>,
    peers: Option<tls::Server>,
}

impl TlsServers<'_> {
    /// How the listener of `urls`, which share an address, is protected.
    fn security(&mut self, what: &str, urls: &[Url]) -> Result<Security, StartError> {
        let side = if what == "peer" { tls::Side::Peer } else { tls::Side::Client };
        let settings = match side {
            tls::Side::Client => &self.config.client_tls,
            tls::Side::Peer => &self.config.peer_tls,
        };
        let (secure, clear): (Vec<&Url>, Vec<&Url>) =
            urls.iter().partition(|url| url.scheme().is_tls());
        for url in clear.iter().filter(|_| what != "metrics") {
            if !settings.cert_file.as_os_str().is_empty() || settings.auto {
                tracing::warn!(
                    url = url.as_str(),
                    "scheme is http or unix while key and cert files are presented; ignoring key \
                     and cert files"
                );
            }
            if settings.client_cert_auth {
                tracing::warn!(
                    url = url.as_str(),
                    "scheme is http or unix while client certificates are asked for; ignoring \
                     client-cert-auth"
                );
            }
        }
        let Some(url) = secure.first() else { return Ok(Security::Clear) };
        let Some(server) = self.server(side)? else {
            return Err(StartError::Refused(match what {
                "peer" => format!(
                    "cannot listen on TLS for {}: KeyFile and CertFile are not presented",
                    socket_of(url)
                ),
                "metrics" => "client TLS key/cert (--cert-file, --key-file) must be provided for \
                              metrics secure url"
                    .to_string(),
                _ => format!(
                    "TLS key/cert (--cert-file, --key-file) must be provided for client url {url} \
                     with HTTPS scheme"
                ),
            }));
        };
        let checks_address =
            matches!(what, "peer" | "metrics") && !settings.skip_client_san_verification;
        // As in etcd, the socket of a member or a scraper is in clear whatever its URL says.
        if url.scheme().is_unix() && matches!(what, "peer" | "metrics") {
            return Ok(Security::Clear);
        }
        let endpoint = match what {
            "peer" => "peer",
            "metrics" => "metrics",
            _ => "client",
        };
        let secured = Secured::new(server, endpoint, checks_address);
        Ok(if clear.is_empty() { Security::Tls(secured) } else { Security::Either(secured) })
    }

    fn server(&mut self, side: tls::Side) -> Result<Option<tls::Server>, StartError> {
        let (slot, make): (_, fn(&Config, &'static Metrics) -> _) = match side {
            tls::Side::Client => (&mut self.clients, tls::Server::for_clients),
            tls::Side::Peer => (&mut self.peers, tls::Server::for_peers),
        };
        if slot.is_none() {
            *slot = make(self.config, Metrics::global())?;
        }
        Ok(slot.clone())
    }
}

async fn start(config: &Config) -> Result<Daemon, StartError> {
    log_settings(config);
    check_directory(config)?;
    let ttl = Duration::from_secs(config.auth.token_ttl_s);
    let tokens = Tokens::new(&config.auth.token, ttl, Box::new(SystemClock::default()));
    let tokens = Arc::new(tokens.map_err(|error| ConfigError::AuthToken(full(&error)))?);
    let disk: SharedDisk = Arc::new(OsDisk);
    let plan = Plan::of(config, wal_log::has_log(&*disk, &config.member.wal_dir())?);
    bootstrap::check_first_start(
        config,
        plan,
        &bootstrap::resolve,
        bootstrap::RESOLVE_PATIENCE,
        bootstrap::RESOLVE_PAUSE,
    )?;
    create_dir(&config.member.data_dir)?;
    let mut lock = DataDirLock::take(&*disk, &config.member.data_dir, &config.member.wal_dir())?;
    let options = listener::Options {
        max_concurrent_streams: config.listen.max_concurrent_streams,
        keepalive_min_time: config.listen.keepalive_min_time,
        keepalive_interval: config.listen.keepalive_interval,
        keepalive_timeout: config.listen.keepalive_timeout,
        receive_max: config.limits.max_request_bytes as usize + GRPC_OVERHEAD,
        reuse_port: config.listen.reuse_port,
        reuse_address: config.listen.reuse_address,
        write_timeout: None,
        connection_age: Some(config.listen.connection_age).filter(|age| !age.is_zero()),
        connection_age_grace: Some(config.listen.connection_age_grace)
            .filter(|grace| !grace.is_zero()),
    };
    // A port that is taken is found out before the directory is touched.
    let bound = bind_all(config, &options)?;
    let patience = PEER_DIAL_TIMEOUT + Duration::from_millis(config.raft.election_ms);
    let dialer = Dialer::new(patience, tls::Client::for_peers(config, Metrics::global())?);
    let birth = bootstrap::birth(config, plan, &dialer, server_version()).await?;
    let snapshots = SnapDir::open(disk.clone(), &config.member.snap_dir())?;
    if engines::etcds() == Some(config.storage.engine) {
        // It locks its file itself, and would find it locked.
        lock.release_db();
    }
    let mut found = read_directory(config, &disk, &snapshots, birth.as_ref())?;
    if config.cluster.force_new && plan == Plan::Restart {
        let applied = found.machine.applied();
        bootstrap::force::force(
            &mut found.log,
            &mut found.recovered,
            &found.machine.members,
            applied,
        )?;
    }
    if found.machine.members.removed().any(|id| id == found.member_id) {
        return Err(StartError::Removed);
    }
    let threshold = config.storage.bootstrap_defrag_threshold_mib << 20;
    if threshold > 0 && found.engine.about().reclaim == Reclaim::Never {
        tracing::warn!(
            engine = found.engine.name(),
            "not defragmented before serving: the engine cannot give space back"
        );
    } else if threshold > 0 {
        let free = found.engine.size()?.saturating_sub(found.engine.size_in_use()?);
        if free >= threshold {
            let reclaimed = found.engine.reclaim_alone()?;
            tracing::info!(
                before = reclaimed.before,
                after = reclaimed.after,
                "defragmented before serving"
            );
        }
    }
    let node = restore_node(config, &found)?;
    let (exit, exits) = Exit::new();
    let published = Published::of(&found.machine, found.engine.clone(), None);
    let shared = Arc::new(Shared::new(found.cluster_id, found.member_id, published));
    tracing::info!(
        "cluster-id" = %found.cluster_id,
        "local-member-id" = %found.member_id,
        "commit-index" = found.recovered.hard_state.commit,
        "applied-index" = found.machine.applied().0,
        revision = found.machine.store.now().revision(),
        "{}",
        if birth.is_some() { "starting local member" } else { "restarting local member" }
    );
    show_identity(&shared, config);
    let peers: Arc<dyn Peers> =
        Arc::new(Asker { cluster_id: found.cluster_id, dialer: dialer.clone() });
    if plan == Plan::Restart && config.gates.enabled(Gate::InitialCorruptCheck) {
        let timeout = config.raft.request_timeout();
        let checked = integrity::check_at_start(&shared, &*peers, timeout).await;
        checked.map_err(StartError::Refused)?;
    }
    let log_end = Index(found.recovered.last_index);
    let mut running = Running { arbiters: Vec::new() };
    let peers_thread = running.arbiter("peers");
    let Started { member, wal, door } = running.start_actors(
        config,
        found,
        node,
        &shared,
        &exit,
        &dialer,
        disk,
        snapshots,
        &peers_thread,
        tokens,
    );

    let services = Arc::new(Services::new(
        &member,
        Maintenance {
            member: member.clone(),
            snap_dir: config.member.snap_dir(),
            snapshots: Arc::default(),
        },
        config.gates.enabled(Gate::StopGRPCServiceOnDefrag),
        options.receive_max,
    ));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads: Vec<ArbiterHandle> = (0..threads.clamp(1, TRANSPORT_THREADS_MAX))
        .map(|_| running.arbiter("transport"))
        .collect();
    let workers = Workers::new(threads, connections_max()?);
    // The peer port is served where the peers are, so that a message changes threads once on its way.
    let peer_workers = Workers::new(vec![peers_thread], PEER_CONNECTIONS_MAX);
    let listeners = bound
        .into_iter()
        .map(|(what, urls, bound, security)| {
            let served = served(what, config, &member, &services, &door, options.receive_max);
            Listener { what, urls, bound, security, served }
        })
        .collect();
    Ok(Daemon {
        config: config.clone(),
        member,
        peers,
        wal,
        exits,
        listeners,
        workers,
        peer_workers,
        options,
        arbiters: running.arbiters,
        log_end,
        _lock: lock,
    })
}

/// Connections that the file limit leaves room for. The soft limit is raised to the hard one first: it
/// is low for the sake of programs that use select(2), and etcd's runtime raises it likewise.
fn connections_max() -> Result<usize, StartError> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (mut soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)
        .map_err(|error| StartError::Refused(format!("cannot read the file limit: {error}")))?;
    if soft < hard {
        match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => soft = hard,
            Err(error) => tracing::warn!(%error, soft, hard, "cannot raise the file limit"),
        }
    }
    if soft <= RESERVED_FILES {
        return Err(StartError::Refused(format!(
            "file descriptor limit of etcd process is too low; please set higher: {soft} is not \
             above {RESERVED_FILES}"
        )));
    }
    Ok(usize::try_from(soft - RESERVED_FILES).unwrap_or(usize::MAX))
}

fn served(
    what: &str,
    config: &Config,
    member: &Arc<Member>,
    services: &Arc<Services>,
    door: &Arc<Door>,
    receive_max: usize,
) -> Served {
    let subject: Arc<HttpMember> = Arc::new(HttpMember(member.clone()));
    let client = || {
        let origins = match &config.listen.cors {
            Origins::Any => Vec::new(),
            Origins::Only(origins) => origins.iter().cloned().collect(),
        };
        let hosts = config.listen.host_whitelist.clone();
        let mut router = client_router(subject.clone(), member.metrics);
        if config.listen.grpc_gateway {
            let gateway = Gateway::new(member, services.maintenance().clone(), receive_max);
            router = router.merge(gateway.router());
        }
        ClientRules::new(hosts, origins, subject.clone()).guard(router)
    };
    let split = !config.listen.client_http_urls.is_empty();
    let only_http = |router: Router| Served { grpc: None, http: Some(router) };
    match what {
        "peer" => only_http(peer::router(member.clone(), door.clone())),
        "metrics" => only_http(metrics_router(subject, member.metrics)),
        "client-http" => only_http(client()),
        _ => Served { grpc: Some(services.clone()), http: (!split).then(client) },
    }
}

/// What is spoken to from outside once the actors run.
struct Started {
    member: Arc<Member>,
    wal: Addr<WalWriter>,
    door: Arc<Door>,
}

/// Arbiters that are stopped with the daemon.
struct Running {
    arbiters: Vec<Arbiter>,
}

impl Running {
    fn arbiter(&mut self, name: &'static str) -> ArbiterHandle {
        let arbiter = arbiter(name);
        let handle = arbiter.handle();
        self.arbiters.push(arbiter);
        handle
    }

    #[allow(clippy::too_many_arguments, reason = "the one place where everything meets")]
    fn start_actors(
        &mut self,
        config: &Config,
        found: Found,
        node: Node,
        shared: &Arc<Shared>,
        exit: &Exit,
        dialer: &Dialer,
        disk: SharedDisk,
        snapshots: SnapDir,
        peers_thread: &ArbiterHandle,
        tokens: Arc<Tokens>,
    ) -> Started {
        let raft_seat = Seat::<RaftActor>::new(raft::MAILBOX);
        let wal_seat = Seat::<WalWriter>::new(wal::MAILBOX);
        let applier_seat = Seat::<Applier>::new(64);
        let committer_seat = Seat::<BatchCommitter>::new(4);
        let lease_seat = Seat::<LeaseManager>::new(1024);
        let watch_seat = Seat::<WatchHub>::new(1024);
        let compactor_seat = Seat::<Compactor>::new(64);
        let snapshot_seat = Seat::<Snapshotter>::new(16);
        let network_seat = Seat::<Network>::new(peers::MAILBOX);
        let election = Duration::from_millis(config.raft.election_ms);
        let quota = config.storage.quota();

        let member = Arc::new(Member {
            shared: shared.clone(),
            raft: raft_seat.addr(),
            applier: applier_seat.addr(),
            leases: lease_seat.addr(),
            watch: watch_seat.addr(),
            compactor: compactor_seat.addr(),
            exit: exit.clone(),
            dialer: dialer.clone(),
            limits: Limits {
                request_bytes_max: config.limits.max_request_bytes as usize,
                txn_ops_max: config.limits.max_txn_ops as usize,
                quota,
                quota_reported: config.storage.quota_bytes.map_or(-1, |bytes| bytes as i64),
                request_timeout: config.raft.request_timeout(),
                election,
                heartbeat: Duration::from_millis(config.raft.heartbeat_ms),
                strict_reconfig: config.cluster.strict_reconfig_check,
                fast_keep_alive: config.gates.enabled(Gate::FastLeaseKeepAlive),
                warning_unary: config.observe.warning_unary_request_duration,
                warning_apply: config.observe.warning_apply_duration,
            },
            tokens: tokens.clone(),
            passwords: Passwords::new(config.auth.bcrypt_cost),
            metrics: Metrics::global(),
            stopping: watch::Sender::new(false),
            next_stream: AtomicU64::new(1),
            proposed_bytes: AtomicUsize::new(0),
        });

        let links = raft::Links {
            shared: shared.clone(),
            wal: wal_seat.addr(),
            applier: applier_seat.addr(),
            leases: lease_seat.addr().recipient(),
            peers: Some(network_seat.addr().recipient()),
            exit: exit.clone(),
        };
        let raft_options = raft::Options {
            tick: Duration::from_millis(config.raft.heartbeat_ms),
            catch_up_entries: config.raft.snapshot_catchup_entries,
        };
        let raft_addr = raft_seat.addr();
        let net = Net::new(
            network::Links {
                cluster_id: shared.cluster_id,
                local: shared.member_id,
                own_urls: config.cluster.advertise_peer_urls.clone(),
                dialer: dialer.clone(),
                raft: RaftLink {
                    step: raft_addr.clone().recipient(),
                    unreachable: raft_addr.clone().recipient(),
                    snapshot_done: raft_addr.clone().recipient(),
                },
                liveness: shared.reachable.clone(),
                exit: exit.clone(),
                metrics: Metrics::global(),
                members: shared.published.load().members.clone(),
                snapshots: Snapshots::new(
                    Box::new(FromEngine {
                        shared: shared.clone(),
                        applier: applier_seat.addr(),
                        snapshots: snapshots.clone(),
                    }),
                    snapshots.clone(),
                ),
            },
            network::Options { read_timeout: config.raft.read_timeout },
        );
        let door = Arc::new(Door { net: net.clone(), network: network_seat.addr() });
        raft_seat
            .start_in(&self.arbiter("raft"), move || RaftActor::new(node, links, raft_options));

        let wal_addr = wal_seat.addr();
        let (log, to_raft, exit_wal) = (found.log, raft_addr.clone().recipient(), exit.clone());
        let received = snapshots.clone();
        let sync = !config.storage.unsafe_no_fsync;
        wal_seat.start_in(&self.arbiter("wal"), move || {
            WalWriter::new(log, received, to_raft, exit_wal, sync)
        });

        let committer = committer_seat.addr();
        let (to_applier, exit_committer) = (applier_seat.addr().recipient(), exit.clone());
        let shared_committer = shared.clone();
        committer_seat.start_in(&self.arbiter("committer"), move || {
            BatchCommitter::new(to_applier, shared_committer, exit_committer)
        });

        let persistent = found.installer.is_persistent();
        let links = applier::Links {
            shared: shared.clone(),
            raft: raft_addr.clone(),
            committer,
            watch: watch_seat.addr().recipient(),
            leases: lease_seat.addr().recipient(),
            promoted: lease_seat.addr().recipient(),
            leases_replaced: lease_seat.addr().recipient(),
            compactor: compactor_seat.addr().recipient(),
            store_replaced: compactor_seat.addr().recipient(),
            snapshotter: snapshot_seat.addr().recipient(),
            installed: snapshot_seat.addr().recipient(),
            installer: found.installer,
            peers: network_seat.addr().recipient(),
            tokens,
            exit: exit.clone(),
        };
        let start = Index(found.recovered.start.index());
        let remotes = found.remotes;
        network_seat.start_in(peers_thread, move || Network::new(net, remotes));
        let applier_options = applier::Options {
            batch_interval: config.storage.batch_interval,
            batch_limit: config.storage.batch_limit as usize,
            quota,
            // Without an engine that outlives the process, the whole log is needed.
            snapshot_count: if persistent { config.raft.snapshot_count } else { u64::MAX },
            snapshot_index: start,
            warning_apply: config.observe.warning_apply_duration,
        };
        let applier_addr = applier_seat.addr();
        let machine = found.machine;
        let revision = machine.store.now().revision();
        let unfinished = found.unfinished;
        applier_seat.start_in(&self.arbiter("applier"), move || {
            Applier::new(machine, links, applier_options)
        });

        let hub_options = HubOptions {
            progress_interval_ms: config.watch.progress_notify_interval.as_millis() as u64,
            max_request_bytes: config.limits.max_request_bytes as usize,
            ..HubOptions::default()
        };
        let seed = shared.next_id();
        let (watch_shared, exit_watch) = (shared.clone(), exit.clone());
        watch_seat.start_in(&self.arbiter("watch"), move || {
            WatchHub::new(Hub::new(hub_options, revision, seed), watch_shared, exit_watch)
        });

        let cold = self.arbiter("cold");
        let lessor = LessorOptions {
            retry_ms: config.raft.request_timeout().as_millis() as u64,
            checkpoint_interval_ms: config
                .gates
                .enabled(Gate::LeaseCheckpoint)
                .then_some(CHECKPOINT_INTERVAL_MS),
        };
        let (lease_shared, lease_raft) = (shared.clone(), raft_addr.clone());
        lease_seat
            .start_in(&cold, move || LeaseManager::new(lease_shared, lease_raft, lessor, election));
        let auto = AutoCompaction::new(match config.compaction.auto {
            Retention::Off => autocompact::Retention::Off,
            Retention::Period(period) => {
                autocompact::Retention::Periodic(period.as_millis().max(1) as u64)
            }
            Retention::Revisions(keep) => autocompact::Retention::Revisions(keep),
        });
        let compactor_options = compactor::Options {
            batch_limit: config.compaction.batch_limit as usize,
            sleep: config.compaction.sleep_interval,
            request_timeout: config.raft.request_timeout(),
        };
        let compactor_shared = shared.clone();
        compactor_seat.start_in(&cold, move || {
            Compactor::new(
                compactor_shared,
                applier_addr,
                raft_addr,
                compactor_options,
                auto,
                unfinished,
            )
        });
        let snapshot_options = snapshot::Options {
            wal_dir: config.member.wal_dir(),
            max_snapshots: config.raft.max_snapshots as usize,
            max_wals: config.raft.max_wals as usize,
            persistent,
            start,
        };
        let (snapshot_wal, exit_snapshot) = (wal_addr.clone(), exit.clone());
        snapshot_seat.start_in(&cold, move || {
            Snapshotter::new(disk, snapshots, snapshot_wal, exit_snapshot, snapshot_options)
        });
        Started { member, wal: wal_addr, door }
    }
}

fn log_settings(config: &Config) {
    let urls = |urls: &[Url]| logging::list(urls.iter().map(Url::as_str));
    tracing::info!(
        "etcd-version" = ETCD_VERSION,
        "quorate-version" = env!("CARGO_PKG_VERSION"),
        name = %config.member.name,
        "data-dir" = %config.member.data_dir.display(),
        "wal-dir" = %config.member.wal_dir().display(),
        "snapshot-count" = config.raft.snapshot_count,
        "max-wals" = config.raft.max_wals,
        "max-snapshots" = config.raft.max_snapshots,
        "snapshot-catchup-entries" = config.raft.snapshot_catchup_entries,
        engine = config.storage.engine.name(),
        "initial-advertise-peer-urls" = urls(&config.cluster.advertise_peer_urls).value(),
        "listen-peer-urls" = urls(&config.listen.peer_urls).value(),
        "advertise-client-urls" = urls(&config.cluster.advertise_client_urls).value(),
        "listen-client-urls" = urls(&config.listen.client_urls).value(),
        "listen-metrics-urls" = urls(&config.listen.metrics_urls).value(),
        "heartbeat-interval" = %format_args!("{}ms", config.raft.heartbeat_ms),
        "election-timeout" = %format_args!("{}ms", config.raft.election_ms),
        "pre-vote" = config.raft.pre_vote,
        "quota-backend-bytes" = config.storage.quota_bytes.map_or(-1, |bytes| bytes as i64),
        "max-request-bytes" = config.limits.max_request_bytes,
        "initial-cluster-token" = %config.cluster.token,
        "starting an etcd server"
    );
}

/// Metrics that say who this member is.
fn show_identity(shared: &Shared, config: &Config) {
    let metrics = Metrics::global();
    metrics.server_version.with(&[ETCD_VERSION]).set(1.0);
    metrics.server_id.with(&[&shared.member_id.to_string()]).set(1.0);
    metrics.engine_info.with(&[config.storage.engine.name()]).set(1.0);
    for gate in Gate::ALL {
        let on = f64::from(u8::from(config.gates.enabled(*gate)));
        metrics.feature_enabled.with(&[gate.name(), gate.stage().label()]).set(on);
    }
    let or_none = |bytes: Option<u64>| bytes.map_or(-1.0, |bytes| bytes as f64);
    let quota = config.storage.quota();
    metrics.quota_backend_bytes.set(or_none(quota.live));
    metrics.quota_physical_bytes.set(or_none(quota.physical));
    if config.observe.metrics == crate::config::MetricsDetail::Extensive {
        metrics.time_grpc_calls();
    }
    let now = shared.published.load();
    metrics.current_revision.set(now.store.revision() as f64);
    metrics.auth_revision.set(now.auth.revision() as f64);
    metrics.compact_revision.set(now.store.compact_revision() as f64);
    metrics.keys.set(now.store.live_keys() as f64);
    if let Some(version) = now.members.cluster_version {
        let text = format!("{}.{}", version.major, version.minor);
        metrics.cluster_version.with(&[&text]).set(1.0);
    }
}

impl Daemon {
    async fn serve(mut self) -> Ended {
        let started = Instant::now();
        tracing::info!("starting etcd server");
        self.log_addresses();
        let (stop, peers_stop) = (watch::Sender::new(false), watch::Sender::new(false));
        let (failures, mut listener_failed) = mpsc::unbounded_channel();
        // What is published below needs a leader, and that needs the other members.
        self.listen(|what| what == "peer", &peers_stop, &failures);
        self.listen(|what| what == "metrics", &stop, &failures);
        actix::spawn(advance_ticks(self.member.clone(), self.config.raft.clone()));
        // Handlers are there once a member has started; before, a signal simply ends it.
        let published = tokio::select! {
            published = publish(&self.member, &*self.peers, &self.config) => published,
            reason = self.exits.recv() => return self.failed(reason),
            Some(error) = listener_failed.recv() => return listener_ended(&error),
        };
        if !published {
            // Why, is told in a moment: a member that was removed goes on for a second.
            let reason = tokio::time::timeout(STOP_REASON, self.exits.recv()).await;
            return self.failed(reason.ok().flatten());
        }
        let (mut interrupts, mut terminations) =
            match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
                (Ok(interrupts), Ok(terminations)) => (interrupts, terminations),
                (Err(error), _) | (_, Err(error)) => {
                    crate::fatal!(%error, "cannot handle signals");
                    return Ended::Failed;
                }
            };
        self.listen(|_| true, &stop, &failures);
        tracing::info!(took = ?started.elapsed(), "ready to serve client requests");
        notify_ready();
        for url in &self.config.listen.client_urls {
            let how = if url.scheme().is_tls() {
                "serving client traffic securely"
            } else {
                "serving client traffic insecurely; this is strongly discouraged!"
            };
            tracing::info!(traffic = "grpc+http", address = %socket_of(url), "{how}");
        }
        // Nothing asks a monitor anything: it lives as long as the thread does.
        Monitor::new(
            self.member.shared.clone(),
            self.member.raft.clone(),
            self.peers.clone(),
            server_version(),
            self.config.raft.request_timeout(),
            AlarmOptions {
                auto_disarm: self.config.storage.auto_disarm_nospace,
                quota: self.member.limits.quota,
                log_end: self.log_end,
            },
        )
        .start();
        let interval = |time: Duration| (!time.is_zero()).then_some(time);
        let checks = &self.config.checks;
        let options = integrity::Options {
            periodic: interval(checks.corrupt_check_time),
            compactions: interval(checks.compact_hash_check_time)
                .filter(|_| self.config.gates.enabled(Gate::CompactHashCheck)),
            request_timeout: self.config.raft.request_timeout(),
        };
        if options.periodic.is_some() || options.compactions.is_some() {
            let links = integrity::Links {
                shared: self.member.shared.clone(),
                raft: self.member.raft.clone().recipient(),
                peers: self.peers.clone(),
            };
            Integrity::new(links, options).start();
        }
        let ended = tokio::select! {
            _ = interrupts.recv() => Ended::Signal(Signal::SIGINT),
            _ = terminations.recv() => Ended::Signal(Signal::SIGTERM),
            reason = self.exits.recv() => self.failed(reason),
            Some(error) = listener_failed.recv() => return listener_ended(&error),
        };
        match ended {
            Ended::Failed => return ended,
            // Nobody else will answer those who wait.
            Ended::Removed => self.member.raft.do_send(Abandon),
            Ended::Signal(signal) => {
                tracing::info!(signal = %signal_name(signal), "received signal; shutting down");
            }
        }
        self.stop(&stop, &peers_stop).await;
        ended
    }

    /// The line that says where everything is; the sockets are bound.
    fn log_addresses(&self) {
        let Config { cluster, listen, .. } = &self.config;
        let urls = |urls: &[Url]| logging::list(urls.iter().map(Url::as_str));
        tracing::info!(
            "local-member-id" = %self.member.shared.member_id,
            "initial-advertise-peer-urls" = urls(&cluster.advertise_peer_urls).value(),
            "listen-peer-urls" = urls(&listen.peer_urls).value(),
            "advertise-client-urls" = urls(&cluster.advertise_client_urls).value(),
            "listen-client-urls" = urls(&listen.client_urls).value(),
            "listen-metrics-urls" = urls(&listen.metrics_urls).value(),
            "now serving peer/client/metrics"
        );
    }

    /// The member has stopped itself. What is acknowledged is in the log; nothing more is written.
    fn failed(&self, reason: Option<Reason>) -> Ended {
        match reason {
            Some(Reason::Removed) => {
                log_removed(&self.config);
                Ended::Removed
            }
            Some(Reason::Failed { part, error }) => {
                crate::fatal!(part, error, "member stopped");
                Ended::Failed
            }
            None => Ended::Failed,
        }
    }

    /// Starts accepting on the listeners that `wanted` picks by what they serve, until `stop` turns true.
    fn listen(
        &mut self,
        wanted: fn(&str) -> bool,
        stop: &watch::Sender<bool>,
        failures: &mpsc::UnboundedSender<std::io::Error>,
    ) {
        for listener in self.listeners.extract_if(.., |listener| wanted(listener.what)) {
            let Listener { what, urls, bound, security, served } = listener;
            let mut options = self.options;
            let workers = if what == "peer" {
                // A stream takes more for as long as its buffers do: this finds a peer that has gone.
                options.write_timeout = Some(self.config.raft.write_timeout);
                options.connection_age = None;
                &self.peer_workers
            } else {
                &self.workers
            };
            let serving = match what {
                "peer" => "serving peer traffic",
                "metrics" => "serving metrics",
                _ => "serving client traffic",
            };
            for url in &urls {
                tracing::info!(address = url.as_str(), "{serving}");
            }
            let workers = workers.clone();
            let accepting =
                listener::accept(bound, served, security, workers, options, stop.subscribe());
            let failures = failures.clone();
            actix::spawn(async move {
                if let Err(error) = accepting.await {
                    drop(failures.send(error));
                }
            });
        }
    }

    /// Stops in the order of operations 6.5: clients first, the disk last.
    async fn stop(mut self, stop: &watch::Sender<bool>, peers_stop: &watch::Sender<bool>) {
        let deadline = Instant::now() + self.config.raft.request_timeout();
        stop.send_replace(true);
        self.member.stopping.send_replace(true);
        while self.workers.connections() > 0 && Instant::now() < deadline {
            // Each time: one may just have begun.
            self.member.shared.published.load().engine.cancel_reclaim();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.member.hand_over().await;
        let (reply, durable) = oneshot::channel();
        self.member.applier.do_send(Checkpoint(reply));
        let checkpoint = tokio::time::timeout(self.config.raft.request_timeout(), durable).await;
        match checkpoint {
            Ok(Ok(index)) => tracing::info!("applied-index" = index.0, "engine is on disk"),
            _ => {
                tracing::warn!("engine was not brought to disk; the log is replayed at next start")
            }
        }
        if self.wal.send(Close).await.is_err() {
            tracing::warn!("write-ahead log was closed already");
        }
        peers_stop.send_replace(true);
        for arbiter in self.arbiters.drain(..) {
            arbiter.stop();
        }
        tracing::info!(
            name = %self.config.member.name,
            "data-dir" = %self.config.member.data_dir.display(),
            "closed etcd server"
        );
    }
}

/// What etcd says when its member has been removed, and why it stops.
fn log_removed(config: &Config) {
    tracing::warn!(
        error = "the member has been permanently removed from the cluster",
        "server error"
    );
    tracing::warn!(
        "data-dir" = %config.member.data_dir.display(),
        "data-dir used by this member must be removed"
    );
}

/// A member that does not listen any more must not look as if it did.
fn listener_ended(error: &std::io::Error) -> Ended {
    crate::fatal!(error = %full(error), "listener failed");
    Ended::Failed
}

/// A URL's address without its scheme, as a listener shows it.
fn socket_of(url: &Url) -> String {
    match url.socket_path() {
        Some(path) => path.display().to_string(),
        None => url.host().to_string(),
    }
}

fn signal_name(signal: Signal) -> &'static str {
    match signal {
        Signal::SIGINT => "interrupt",
        _ => "terminated",
    }
}

/// Skips most of the first election timeout once more than one other member can be reached: enough is
/// left of it to hear of a leader that there may be (operations 2.9). A member that is alone campaigns
/// by itself, and one that has a leader needs none.
async fn advance_ticks(member: Arc<Member>, raft: crate::config::Raft) {
    let election_ticks = raft.election_ticks();
    if !raft.initial_election_tick_advance {
        tracing::info!("election-ticks" = election_ticks, "skipping initial election tick advance");
        return;
    }
    let deadline = Instant::now() + raft.read_timeout;
    let mut told = false;
    while Instant::now() < deadline {
        tokio::time::sleep(REACHABLE_POLL).await;
        if member.now().members.members().len() == 1 || member.shared.leader().is_some() {
            return;
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!(
                "election-ticks" = election_ticks,
                "starting initial election tick advance"
            );
        }
        let active = member.shared.reachable.count();
        if active > 1 {
            let ticks = election_ticks.saturating_sub(2);
            tracing::info!(
                "local-member-id" = %member.shared.member_id,
                "forward-ticks" = ticks,
                "forward-duration" = %GoDuration::from(tick_time(&raft, ticks)),
                "election-ticks" = election_ticks,
                "election-timeout" = %GoDuration::from(tick_time(&raft, election_ticks)),
                "active-remote-members" = active,
                "initialized peer connections; fast-forwarding election ticks"
            );
            member.raft.do_send(AdvanceTicks(usize::try_from(ticks).unwrap_or(usize::MAX)));
            return;
        }
    }
}

fn tick_time(raft: &crate::config::Raft, ticks: u64) -> Duration {
    Duration::from_millis(raft.heartbeat_ms.saturating_mul(ticks))
}

/// Whether what this member publishes must be written for a member older than 3.5. A cluster that has
/// been decided to run at a later version has none; in any other this member first catches up, so that
/// it knows the members, and asks them.
async fn log_needs_v2(member: &Arc<Member>, peers: &dyn Peers) -> Result<bool, RequestError> {
    let shared = &member.shared;
    let now = || shared.published.load().members.clone();
    let known = now();
    let alone = known.members().map(|member| member.id).eq([shared.member_id.0]);
    if alone || cluster_version::settled(known.cluster_version) {
        return Ok(false);
    }
    member.read_index().await?;
    let servers = server_versions(shared, peers, server_version()).await;
    Ok(cluster_version::needs_v2(now().cluster_version, &servers))
}

/// Publishes name and client URLs through the log, until that has been applied: the member is ready
/// only then (operations 2.9). Without a leader that takes as long as there is none; each try waits
/// for the request timeout. Answers false if the member is stopping.
async fn publish(member: &Arc<Member>, peers: &dyn Peers, config: &Config) -> bool {
    let name = &config.member.name;
    let client_urls: Vec<String> =
        config.cluster.advertise_client_urls.iter().map(|url| url.as_str().to_string()).collect();
    let attributes = format!("{{Name:{name} ClientURLs:[{}]}}", client_urls.join(" "));
    let timeout = GoDuration::from(config.raft.request_timeout());
    let request = Request::ClusterMemberAttrSet(membershippb::ClusterMemberAttrSetRequest {
        member_id: member.shared.member_id.0,
        member_attributes: Some(membershippb::Attributes { name: name.clone(), client_urls }),
    });
    // A member that has joined is sent the log first: what it publishes must suit the others.
    while member.now().members.get(member.shared.member_id).is_none() {
        tokio::time::sleep(REACHABLE_POLL).await;
    }
    loop {
        let proposed = match log_needs_v2(member, peers).await {
            Err(error) => Err(error),
            Ok(false) => member.propose_own(request.clone()).await,
            Ok(true) => {
                let encode = |c: &Command| c.encode_v2().unwrap_or_else(|| c.encode());
                member.propose_own_as(request.clone(), encode).await
            }
        };
        let error = match proposed {
            Ok(_) => break,
            Err(RequestError::Stopped) => {
                tracing::warn!(
                    "local-member-id" = %member.shared.member_id,
                    "local-member-attributes" = attributes,
                    "publish-timeout" = %timeout,
                    "stopped publish because server is stopping"
                );
                return false;
            }
            Err(error) => error,
        };
        tracing::warn!(
            "local-member-id" = %member.shared.member_id,
            "local-member-attributes" = attributes,
            "publish-timeout" = %timeout,
            %error,
            "failed to publish local member to cluster through raft"
        );
        if !matches!(error, RequestError::TimedOut | RequestError::NoLeader) {
            // It was refused without any wait.
            tokio::time::sleep(PUBLISH_PAUSE).await;
        }
    }
    tracing::info!(
        "local-member-id" = %member.shared.member_id,
        "local-member-attributes" = attributes,
        "cluster-id" = %member.shared.cluster_id,
        "publish-timeout" = %timeout,
        "published local member to cluster through raft"
    );
    true
}

/// Tells systemd that the member serves. Failure is only logged (operations 6.5).
fn notify_ready() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || {
        let socket = UnixDatagram::unbound()?;
        let text = path.to_string_lossy();
        let address = match text.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        socket.send_to_addr(b"READY=1", &address).map(|_| ())
    };
    match send() {
        Ok(()) => tracing::info!("notified systemd: ready"),
        Err(error) => tracing::warn!(%error, "failed to notify systemd for readiness"),
    }
}

#[cfg(test)]
mod tests {
    use quorate_proto::raftpb;

    use super::*;
    use crate::actors::rig::{CLUSTER, LOCAL, Rig, put, transfer};
    use crate::engines::BuiltIn;

    /// A data directory whose log begins with a snapshot that was received, and goes on for an entry; and
    /// the snapshot's index.
    fn received(engine: &'static BuiltIn) -> (tempfile::TempDir, Config, SnapDir, u64) {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.member.data_dir = dir.path().join("data");
        config.storage.engine = engine;
        let disk: SharedDisk = Arc::new(OsDisk);
        let snapshots = SnapDir::open(disk.clone(), &config.member.snap_dir()).unwrap();
        let snapshot = actix::System::new().block_on(async {
            let mut rig = Rig::start(&dir.path().join("sender"), false);
            rig.found();
            rig.requests(vec![put("a", "1"), put("b", "2")]);
            rig.applied().await;
            transfer(&rig, &snapshots, dir.path()).await
        });
        snapshots.save(&snapshot).unwrap();
        let raftpb::SnapshotMetadata { conf_state, index, term } = snapshot.metadata.unwrap();
        let metadata = walpb::Metadata { node_id: Some(LOCAL), cluster_id: Some(CLUSTER) };
        let mut log = WalLog::create(disk, &config.member.wal_dir(), &metadata).unwrap();
        log.replace(&walpb::Snapshot { index: Some(index), term: Some(term), conf_state }).unwrap();
        let entry = raftpb::Entry { term, index: index + 1, ..Default::default() };
        let state = raftpb::HardState { term, vote: 0, commit: index };
        log.append(&[entry], Some(&state)).unwrap();
        log.close().unwrap();
        (dir, config, snapshots, index)
    }

    fn read(config: &Config, snapshots: &SnapDir) -> Result<Found, StartError> {
        read_directory(config, &(Arc::new(OsDisk) as SharedDisk), snapshots, None)
    }

    fn check(found: &Found, index: u64) {
        assert_eq!(found.machine.applied(), Index(index));
        assert_eq!(found.machine.store.now().live_keys(), 2);
        assert_eq!(found.machine.members.local, MemberId(LOCAL));
        assert_eq!(found.machine.members.cluster_id, ClusterId(CLUSTER));
        assert_eq!((found.recovered.start.index(), found.recovered.entries.len()), (index, 1));
        assert!(restore_node(&Config::default(), found).is_ok());
    }

    #[test]
    fn a_start_installs_the_database_that_came_with_the_newest_snapshot() {
        let (_dir, config, snapshots, index) = received(engines::DEFAULT);
        // The engine as it was before: there, and empty.
        let disk: SharedDisk = Arc::new(OsDisk);
        drop(installer(&config, &disk, &snapshots).unwrap().open().unwrap());
        check(&read(&config, &snapshots).unwrap(), index);
        assert_eq!(snapshots.received_db(index).unwrap(), None, "the engine holds it");
        check(&read(&config, &snapshots).unwrap(), index);
    }

    #[test]
    fn a_start_that_finds_the_old_engine_out_of_the_way_installs_again() {
        let (_dir, config, snapshots, index) = received(engines::DEFAULT);
        let disk: SharedDisk = Arc::new(OsDisk);
        drop(installer(&config, &disk, &snapshots).unwrap().open().unwrap());
        let engine = config.storage.engine.dir(&config.member.data_dir).unwrap();
        std::fs::rename(&engine, engine.with_file_name("engine-redb.replaced")).unwrap();
        check(&read(&config, &snapshots).unwrap(), index);
        assert!(!engine.with_file_name("engine-redb.replaced").exists());
    }

    #[test]
    fn an_engine_in_memory_begins_with_the_received_database_each_time() {
        let (_dir, config, snapshots, index) = received(engines::find("memory").unwrap());
        for _ in 0..2 {
            check(&read(&config, &snapshots).unwrap(), index);
            assert!(snapshots.received_db(index).unwrap().is_some());
            snapshots.purge(1, index).unwrap();
        }
    }

    #[test]
    fn without_the_database_the_start_is_refused() {
        let (_dir, config, snapshots, index) = received(engines::DEFAULT);
        snapshots.release_dbs(index + 1).unwrap();
        let refused = |what: &str| {
            let error = read(&config, &snapshots).err().expect("refused").to_string();
            assert!(error.contains(what), "{error}");
        };
        refused("of the backend is missing");
        let disk: SharedDisk = Arc::new(OsDisk);
        drop(installer(&config, &disk, &snapshots).unwrap().open().unwrap());
        refused(&format!("index 0) does not match with snapshot (index {index})"));
    }
}
