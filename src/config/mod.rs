//! What an operator can set: etcd's flags, `ETCD_*` variables and configuration file, and the few
//! settings of our own under the same rules.
//!
//! [`flags`] is the one table of all flags; parsing, `--help`, the variables' names and the file's
//! keys come from it. The way of a setting: text is parsed into [`Config`] (by [`load()`] from the
//! command line and the environment, or by [`mod@file`] from YAML), then [`validate`] holds the rules
//! between fields and derives what depends on several of them, then [`support`] refuses what this
//! release cannot do yet. A `Config` that [`load()`] answers has passed all of it: zeros that stand for
//! a default are replaced, so its users take every field at its word.

pub mod duration;
pub mod error;
pub mod file;
pub mod flags;
pub mod gates;
pub mod help;
pub mod load;
pub mod notice;
pub mod slot;
pub mod support;
pub mod types;
pub mod url;
pub mod validate;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::core::quota::Quota;
use crate::engines::{self, BuiltIn};

pub use error::{ConfigError, Telling};
pub use gates::{FeatureGates, Gate};
pub use load::{Asked, Surroundings, load};
pub use notice::Notice;
pub use types::{
    AuthToken, ClusterState, CompactionMode, JwtOptions, LogFormat, LogLevel, LogOutput,
    MetricsDetail, Origins, Retention, Rotation,
};
pub use url::{Scheme, Url};

/// All settings of one member. `Default` is what a start without any flag gets.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    pub member: Member,
    pub raft: Raft,
    pub listen: Listen,
    pub limits: Limits,
    pub storage: Storage,
    pub cluster: Cluster,
    pub discovery: Discovery,
    /// Certificates of the client listeners.
    pub client_tls: Tls,
    /// Certificates between members.
    pub peer_tls: Tls,
    pub tls: TlsPolicy,
    pub auth: Auth,
    pub compaction: Compaction,
    pub watch: Watch,
    pub checks: Checks,
    pub observe: Observe,
    pub log: Log,
    pub tracing: Tracing,
    pub gates: FeatureGates,
    /// Texts whose form is judged by [`validate`], in etcd's order, and then held typed above.
    pub(crate) given: Given,
}

/// Who this member is and where it keeps its state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Human label; `default` unless set.
    pub name: String,
    /// Everything this member keeps; `<name>.etcd` in the working directory unless set.
    pub data_dir: PathBuf,
    /// A directory for the WAL alone; `None`: below `data_dir`.
    pub wal_dir: Option<PathBuf>,
}

impl Member {
    /// Where the WAL segments are.
    pub fn wal_dir(&self) -> PathBuf {
        self.wal_dir.clone().unwrap_or_else(|| self.data_dir.join("member").join("wal"))
    }

    /// Where raft snapshots and the engine's files are.
    pub fn snap_dir(&self) -> PathBuf {
        self.data_dir.join("member").join("snap")
    }
}

/// Raft's clock, its snapshots and what is kept of its log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Raft {
    /// One raft tick and one heartbeat, in milliseconds; > 0.
    pub heartbeat_ms: u64,
    /// In milliseconds; at least 5 heartbeats, at most 50000.
    pub election_ms: u64,
    /// Skip most of the first election wait after a start.
    pub initial_election_tick_advance: bool,
    pub pre_vote: bool,
    /// Applied entries between raft snapshots on disk; > 0.
    pub snapshot_count: u64,
    /// Raft log entries kept in memory behind the applied index; > 0.
    pub snapshot_catchup_entries: u64,
    /// `.snap` files the purger leaves; 0: all.
    pub max_snapshots: u64,
    /// WAL segments the purger leaves; 0: all.
    pub max_wals: u64,
    /// Deadline of a read from a peer's connection; at least 5 s.
    pub read_timeout: Duration,
    /// Deadline of a write to a peer's connection; at least 5 s.
    pub write_timeout: Duration,
}

impl Raft {
    /// Ticks in an election timeout, as etcd rounds it.
    pub fn election_ticks(&self) -> u64 {
        self.election_ms / self.heartbeat_ms
    }

    /// How long a proposal may wait for its result: 5 s and two election timeouts.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(5) + 2 * Duration::from_millis(self.election_ms)
    }
}

/// Addresses and what a connection may do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listen {
    /// In the order of their text, without duplicates, as every URL list here.
    pub peer_urls: Vec<Url>,
    pub client_urls: Vec<Url>,
    /// If not empty, HTTP is served here and `client_urls` serve gRPC alone.
    pub client_http_urls: Vec<Url>,
    /// Listeners for metrics and health only.
    pub metrics_urls: Vec<Url>,
    /// SO_REUSEPORT on TCP listeners.
    pub reuse_port: bool,
    /// SO_REUSEADDR on TCP listeners.
    pub reuse_address: bool,
    /// HTTP/2 streams per connection.
    pub max_concurrent_streams: u32,
    /// A client that pings more often is sent away; 0: no limit.
    pub keepalive_min_time: Duration,
    /// Idle time after which a client is pinged; 0: never.
    pub keepalive_interval: Duration,
    /// How long the answer to a ping may take; 0: never closed for it.
    pub keepalive_timeout: Duration,
    /// After which a client's connection is asked to end; 0: never.
    pub connection_age: Duration,
    /// How long its calls may take after that; 0: as long as they do.
    pub connection_age_grace: Duration,
    /// JSON below `/v3/`.
    pub grpc_gateway: bool,
    /// Browser origins allowed.
    pub cors: Origins,
    /// `Host` names accepted on plain HTTP; holding `*` means any.
    pub host_whitelist: BTreeSet<String>,
}

/// Bounds on a single request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Operations (and compares) in a transaction.
    pub max_txn_ops: u64,
    /// The largest raft request in bytes; a gRPC message may be 524288 larger.
    pub max_request_bytes: u64,
}

/// The engine and how it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Storage {
    pub engine: &'static BuiltIn,
    /// Options for the engine alone, by name; judged by the engine.
    pub engine_options: BTreeMap<String, String>,
    /// Live bytes of the backend that raise the NOSPACE alarm; `None`: no limit.
    pub quota_bytes: Option<u64>,
    /// Physical bytes that do.
    pub quota_physical: PhysicalQuota,
    /// A member lifts its own NOSPACE alarm when its space is back.
    pub auto_disarm_nospace: bool,
    /// The longest a batch waits for its commit; > 0.
    pub batch_interval: Duration,
    /// The most operations in a batch; > 0.
    pub batch_limit: u64,
    /// bbolt's free page list: `map` or `array`.
    pub freelist_type: String,
    /// Lock the engine's pages in memory.
    pub memory_mlock: bool,
    /// Reclaim space before serving if at least this many MiB are free in the file; 0: never.
    pub bootstrap_defrag_threshold_mib: u64,
    /// Never sync WAL or engine. A crash loses acknowledged writes.
    pub unsafe_no_fsync: bool,
}

/// The bound on what the backend takes from the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PhysicalQuota {
    /// What goes with the bound on live bytes: none without that, nor for an engine that cannot give
    /// space back, as nobody could make it keep the bound again.
    Derived,
    Bytes(u64),
    Off,
}

impl Storage {
    /// Both bounds, for the engine that is configured.
    pub fn quota(&self) -> Quota {
        let gives_back = self.engine.about.reclaim != engine_api::Reclaim::Never;
        let physical = match self.quota_physical {
            PhysicalQuota::Bytes(bytes) => Some(bytes),
            PhysicalQuota::Off => None,
            PhysicalQuota::Derived => {
                self.quota_bytes.filter(|_| gives_back).map(Quota::physical_default)
            }
        };
        Quota { live: self.quota_bytes, physical }
    }
}

/// The cluster and this member's place in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cluster {
    /// This member's peer URLs, as told to the others.
    pub advertise_peer_urls: Vec<Url>,
    /// This member's client URLs, as published.
    pub advertise_client_urls: Vec<Url>,
    /// Members at the first start, by name; empty if discovery finds them.
    pub initial: BTreeMap<String, Vec<Url>>,
    pub state: ClusterState,
    /// Salt of member and cluster IDs.
    pub token: String,
    /// Refuse membership changes that endanger the quorum.
    pub strict_reconfig_check: bool,
    /// Learners at one time.
    pub max_learners: i64,
    /// Rewrite the membership to this member only. Unsafe.
    pub force_new: bool,
    /// How often the leader looks whether a downgrade is complete; 0: never.
    pub downgrade_check_time: Duration,
}

/// Finding the first members through another etcd or through DNS.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Discovery {
    pub token: String,
    pub endpoints: Vec<String>,
    pub dial_timeout: Duration,
    pub request_timeout: Duration,
    pub keepalive_time: Duration,
    pub keepalive_timeout: Duration,
    pub insecure_transport: bool,
    pub insecure_skip_tls_verify: bool,
    pub cert: PathBuf,
    pub key: PathBuf,
    pub cacert: PathBuf,
    pub user: String,
    pub password: String,
    /// Only in a file: bytes a request may have; 0: the client's own limit.
    pub max_request_bytes: i64,
    /// Only in a file: bytes an answer may have; 0: the client's own limit.
    pub max_recv_bytes: i64,
    /// Only in a file: a token instead of user and password.
    pub auth_token: String,
    /// The DNS domain whose SRV records name the peers.
    pub srv: String,
    /// A suffix to the SRV service's name.
    pub srv_name: String,
}

/// Certificates of one side; an empty path means not given.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Tls {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    pub client_cert_file: PathBuf,
    pub client_key_file: PathBuf,
    pub client_cert_auth: bool,
    pub crl_file: PathBuf,
    pub trusted_ca_file: PathBuf,
    pub allowed_cn: Vec<String>,
    pub allowed_hostname: Vec<String>,
    pub skip_client_san_verification: bool,
    pub auto: bool,
}

/// What holds for TLS on both sides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsPolicy {
    /// `TLS1.2` or `TLS1.3`.
    pub min_version: String,
    /// As `min_version`; empty: the newest.
    pub max_version: String,
    /// Go's names of TLS 1.2 suites; empty: a safe choice.
    pub cipher_suites: Vec<String>,
    /// Years a generated certificate is valid.
    pub self_signed_validity_years: u64,
}

/// Users' tokens and password hashes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Auth {
    pub token: AuthToken,
    /// Seconds a simple token lives unused; > 0.
    pub token_ttl_s: u64,
    /// 4..=31.
    pub bcrypt_cost: u32,
}

/// Dropping old revisions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Compaction {
    /// What the leader keeps of history on its own.
    pub auto: Retention,
    /// Revisions dropped in one batch; > 0.
    pub batch_limit: u64,
    /// Pause between batches; > 0.
    pub sleep_interval: Duration,
}

/// Watchers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Watch {
    /// An idle watch that asked for it is told the revision this often (plus up to a tenth of
    /// jitter); at least 100 ms.
    pub progress_notify_interval: Duration,
}

/// Comparing members' data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checks {
    /// Period of the comparison of key-value hashes; 0: never.
    pub corrupt_check_time: Duration,
    /// Period of the comparison of compaction hashes (needs [`Gate::CompactHashCheck`]); > 0.
    pub compact_hash_check_time: Duration,
}

/// What is said about requests, apart from the log's form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observe {
    pub pprof: bool,
    pub metrics: MetricsDetail,
    /// An apply or local read slower than this is logged and counted.
    pub warning_apply_duration: Duration,
    /// A unary request slower than this is logged.
    pub warning_unary_request_duration: Duration,
}

/// Where log lines go and how they look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Log {
    /// At least one.
    pub outputs: Vec<LogOutput>,
    pub level: LogLevel,
    pub format: LogFormat,
    /// Rotation of the one file among the outputs.
    pub rotation: Option<Rotation>,
}

/// Spans for OpenTelemetry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tracing {
    pub enabled: bool,
    pub address: String,
    pub service_name: String,
    pub instance_id: String,
    /// Root spans taken per million.
    pub sampling_rate: i64,
}

/// Texts and numbers as they were given, where their meaning depends on other settings or where
/// etcd judges them later than it reads them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Given {
    pub config_file: String,
    pub version: bool,
    pub data_dir: PathBuf,
    pub wal_dir: PathBuf,
    pub initial_cluster: String,
    pub initial_cluster_state: String,
    pub compaction_mode: String,
    pub compaction_retention: String,
    pub auth_token: String,
    pub bcrypt_cost: u64,
    pub quota_bytes: i64,
    pub quota_physical_bytes: i64,
    pub batch_limit: i64,
    pub compaction_batch_limit: i64,
    pub metrics: String,
    pub logger: String,
    pub log_outputs: Vec<String>,
    pub log_level: String,
    pub log_format: String,
    pub log_rotation: bool,
    pub log_rotation_json: String,
    pub feature_gates: String,
    pub discovery_fallback: String,
    pub v2_deprecation: String,
    pub engine: String,
}

/// Host and port that peers are served on unless set.
pub const DEFAULT_PEER_URL: &str = "http://localhost:2380";
/// Host and port that clients are served on unless set.
pub const DEFAULT_CLIENT_URL: &str = "http://localhost:2379";
/// The name of a member that was given none.
pub const DEFAULT_NAME: &str = "default";
/// etcd's quota unless set: 2 GiB.
pub const DEFAULT_QUOTA_BYTES: u64 = 2 * 1024 * 1024 * 1024;

impl Default for Config {
    fn default() -> Self {
        let url = |text: &str| vec![Url::parse(text).expect("the default URLs are valid")];
        Config {
            member: Member {
                name: DEFAULT_NAME.to_owned(),
                data_dir: Path::new("default.etcd").to_owned(),
                wal_dir: None,
            },
            raft: Raft {
                heartbeat_ms: 100,
                election_ms: 1000,
                initial_election_tick_advance: true,
                pre_vote: true,
                snapshot_count: 10_000,
                snapshot_catchup_entries: 5000,
                max_snapshots: 5,
                max_wals: 5,
                read_timeout: Duration::from_secs(5),
                write_timeout: Duration::from_secs(5),
            },
            listen: Listen {
                peer_urls: url(DEFAULT_PEER_URL),
                client_urls: url(DEFAULT_CLIENT_URL),
                client_http_urls: Vec::new(),
                metrics_urls: Vec::new(),
                reuse_port: false,
                reuse_address: false,
                max_concurrent_streams: u32::MAX,
                keepalive_min_time: Duration::from_secs(5),
                keepalive_interval: Duration::from_secs(2 * 3600),
                keepalive_timeout: Duration::from_secs(20),
                connection_age: Duration::ZERO,
                connection_age_grace: Duration::ZERO,
                grpc_gateway: true,
                cors: Origins::default(),
                host_whitelist: BTreeSet::from(["*".to_owned()]),
            },
            limits: Limits { max_txn_ops: 128, max_request_bytes: 1_572_864 },
            storage: Storage {
                engine: engines::DEFAULT,
                engine_options: BTreeMap::new(),
                quota_bytes: Some(DEFAULT_QUOTA_BYTES),
                quota_physical: PhysicalQuota::Derived,
                auto_disarm_nospace: true,
                batch_interval: Duration::from_millis(100),
                batch_limit: 10_000,
                freelist_type: "map".to_owned(),
                memory_mlock: false,
                bootstrap_defrag_threshold_mib: 0,
                unsafe_no_fsync: false,
            },
            cluster: Cluster {
                advertise_peer_urls: url(DEFAULT_PEER_URL),
                advertise_client_urls: url(DEFAULT_CLIENT_URL),
                initial: BTreeMap::from([(DEFAULT_NAME.to_owned(), url(DEFAULT_PEER_URL))]),
                state: ClusterState::New,
                token: "etcd-cluster".to_owned(),
                strict_reconfig_check: true,
                max_learners: 1,
                force_new: false,
                downgrade_check_time: Duration::from_secs(5),
            },
            discovery: Discovery {
                token: String::new(),
                endpoints: Vec::new(),
                dial_timeout: Duration::from_secs(2),
                request_timeout: Duration::from_secs(5),
                keepalive_time: Duration::from_secs(2),
                keepalive_timeout: Duration::from_secs(6),
                insecure_transport: true,
                insecure_skip_tls_verify: false,
                cert: PathBuf::new(),
                key: PathBuf::new(),
                cacert: PathBuf::new(),
                user: String::new(),
                password: String::new(),
                max_request_bytes: 0,
                max_recv_bytes: 0,
                auth_token: String::new(),
                srv: String::new(),
                srv_name: String::new(),
            },
            client_tls: Tls::default(),
            peer_tls: Tls::default(),
            tls: TlsPolicy {
                min_version: "TLS1.2".to_owned(),
                max_version: String::new(),
                cipher_suites: Vec::new(),
                self_signed_validity_years: 1,
            },
            auth: Auth { token: AuthToken::Simple, token_ttl_s: 300, bcrypt_cost: 10 },
            compaction: Compaction {
                auto: Retention::Off,
                batch_limit: 1000,
                sleep_interval: Duration::from_millis(10),
            },
            watch: Watch { progress_notify_interval: Duration::from_secs(600) },
            checks: Checks {
                corrupt_check_time: Duration::ZERO,
                compact_hash_check_time: Duration::from_secs(60),
            },
            observe: Observe {
                pprof: false,
                metrics: MetricsDetail::Basic,
                warning_apply_duration: Duration::from_millis(100),
                warning_unary_request_duration: Duration::from_millis(300),
            },
            log: Log {
                outputs: vec![LogOutput::Stderr],
                level: LogLevel::Info,
                format: LogFormat::Json,
                rotation: None,
            },
            tracing: Tracing {
                enabled: false,
                address: "localhost:4317".to_owned(),
                service_name: "etcd".to_owned(),
                instance_id: String::new(),
                sampling_rate: 0,
            },
            gates: FeatureGates::default(),
            given: Given {
                config_file: String::new(),
                version: false,
                data_dir: PathBuf::new(),
                wal_dir: PathBuf::new(),
                initial_cluster: format!("{DEFAULT_NAME}={DEFAULT_PEER_URL}"),
                initial_cluster_state: "new".to_owned(),
                compaction_mode: "periodic".to_owned(),
                compaction_retention: "0".to_owned(),
                auth_token: "simple".to_owned(),
                bcrypt_cost: 10,
                quota_bytes: DEFAULT_QUOTA_BYTES as i64,
                quota_physical_bytes: 0,
                batch_limit: 10_000,
                compaction_batch_limit: 1000,
                metrics: "basic".to_owned(),
                logger: "zap".to_owned(),
                log_outputs: vec!["default".to_owned()],
                log_level: "info".to_owned(),
                log_format: "json".to_owned(),
                log_rotation: false,
                log_rotation_json: types::DEFAULT_ROTATION.to_owned(),
                feature_gates: String::new(),
                discovery_fallback: "exit".to_owned(),
                v2_deprecation: "write-only".to_owned(),
                engine: engines::DEFAULT.name().to_owned(),
            },
        }
    }
}
