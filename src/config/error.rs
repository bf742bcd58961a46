//! Why a configuration is not taken, and how the process says so and ends.

use std::path::PathBuf;

use super::duration::GoDuration;
use crate::engines;

/// What is wrong with flags, variables or the configuration file. The texts that etcd has for a rule
/// are etcd's.
#[derive(thiserror::Error, Debug)]
pub enum ConfigError {
    // The form of the command line.
    #[error("flag provided but not defined: -{0}")]
    UnknownFlag(String),
    #[error("flag needs an argument: -{0}")]
    NoValue(&'static str),
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    #[error("invalid value {value:?} for flag -{flag}: {what}")]
    FlagValue { flag: &'static str, value: String, what: String },
    #[error("invalid boolean value {value:?} for -{flag}: {what}")]
    FlagBool { flag: &'static str, value: String, what: String },
    #[error("{0:?} is not a valid flag")]
    Positional(String),

    // The environment.
    #[error(
        "conflicting environment variable is shadowed by corresponding command-line flag (either \
         unset environment variable or disable flag): {0}"
    )]
    Shadowed(String),
    #[error("invalid value {value:?} for {variable}: {what}")]
    VariableValue { variable: String, value: String, what: String },

    // The file.
    #[error("cannot read configuration file {}: {source}", path.display())]
    ReadFile { path: PathBuf, source: std::io::Error },
    #[error("configuration file {} is not YAML: {source}", path.display())]
    Yaml { path: PathBuf, source: Box<serde_saphyr::Error> },
    #[error("configuration file {}: want keys and values, found {found}", path.display())]
    NoMap { path: PathBuf, found: String },
    #[error("configuration file {}: {key}: {what}", path.display())]
    KeyValue { path: PathBuf, key: String, what: String },
    #[error("configuration file {}: invalid {section}: want keys and values, found {found}", path.display())]
    Section { path: PathBuf, section: String, found: String },
    #[error("configuration file {}: unknown key {key} (known are {known})", path.display())]
    UnknownOwnKey { path: PathBuf, key: String, known: String },
    #[error("configuration file {}: {key} is set twice", path.display())]
    Twice { path: PathBuf, key: String },
    #[error("unexpected error setting up {key}: {what}")]
    FileUrls { key: &'static str, what: String },

    // Rules, in the order in which they are looked at.
    #[error("--{flag} must not be negative (set to {value})")]
    Negative { flag: String, value: GoDuration },
    #[error("v2 proxy is deprecated, and --discovery-fallback can't be configured as \"proxy\"")]
    FallbackProxy,
    #[error("--logger=capnslog is removed in v3.5")]
    Capnslog,
    #[error("unknown logger option {0:?}")]
    Logger(String),
    #[error("multi logoutput for \"default\" is not supported yet")]
    DefaultOutputNotAlone,
    #[error(
        "running with systemd/journal but other '--log-outputs' values ({0}) are configured with \
         'default'; override 'default' value with something else"
    )]
    JournalNotAlone(String),
    #[error("--log-outputs must not contain an empty path")]
    EmptyOutput,
    #[error("--log-outputs requires a single file path when --log-rotate-config-json is defined")]
    RotationOutput,
    #[error("improperly formatted log rotation config: {0}")]
    RotationSyntax(serde_json::Error),
    #[error("invalid log rotation config: {0}")]
    RotationValue(serde_json::Error),
    #[error("fail to unmarshal log rotation config: {0}")]
    RotationEnd(serde_json::Error),
    #[error("unknown log format: {0}, supported values json, console")]
    LogFormat(String),
    #[error("unrecognized level: {0:?}")]
    LogLevel(String),
    #[error("expected IP in URL for binding ({0})")]
    BindName(String),
    #[error(
        "--initial-advertise-peer-urls {urls:?} must be \"host:port\" (unexpected empty host ({url}))"
    )]
    AdvertisePeerHost { urls: String, url: String },
    #[error(
        "--advertise-client-urls {urls:?} must be in the format \"host:port\", \
         \"unix:/path/to/socket\" or \"unixs:/path/to/socket\" (unexpected empty host ({url}))"
    )]
    AdvertiseClientHost { urls: String, url: String },
    #[error("unexpected clusterState {0:?}")]
    ClusterState(String),
    #[error(
        "multiple discovery or bootstrap flags are set. Choose one of \"initial-cluster\", \
         \"discovery-endpoints\" or \"discovery-srv\""
    )]
    ManyBootstraps,
    #[error("both --discovery-token and --discovery-endpoints must be set")]
    DiscoveryPair,
    #[error("--discovery-endpoints must not contain empty endpoints")]
    DiscoveryEmpty,
    #[error("--{0} must be >0 (set to 0ms)")]
    ZeroTick(&'static str),
    #[error(
        "--election-timeout[{election_ms}ms] should be at least as 5 times as \
         --heartbeat-interval[{heartbeat_ms}ms]"
    )]
    ElectionTooShort { election_ms: u64, heartbeat_ms: u64 },
    #[error("--election-timeout[{election_ms}ms] is too long, and should be set less than 50000ms")]
    ElectionTooLong { election_ms: u64 },
    #[error("--advertise-client-urls is required when --listen-client-urls is set explicitly")]
    NoAdvertise,
    #[error("undefined auto-compaction-mode")]
    NoCompactionMode,
    #[error("unknown auto-compaction-mode {0:?}")]
    CompactionMode(String),
    #[error(
        "distributed tracing configurition is not valid: (tracing sampling rate must be positive)"
    )]
    SamplingNegative,
    #[error(
        "distributed tracing configurition is not valid: (tracing sampling rate must be less than \
         1000000)"
    )]
    SamplingTooHigh,
    #[error(
        "enabling feature gate LeaseCheckpointPersist requires enabling feature gate \
         LeaseCheckpoint"
    )]
    PersistWithoutCheckpoint,
    #[error("--compact-hash-check-time must be >0 (set to {0})")]
    CompactHashTime(GoDuration),
    #[error("unexpected TLS version {0:?} (must be one of: TLS1.2, TLS1.3)")]
    TlsVersion(String),
    #[error("min version ({min}) is greater than max version ({max})")]
    TlsOrder { min: String, max: String },
    #[error("cipher suites cannot be configured when only TLS1.3 is enabled")]
    CiphersWithTls13,

    // What etcd finds out later in its start.
    #[error("error setting up initial cluster: {0}")]
    InitialCluster(super::url::UrlError),
    #[error(
        "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url {0}"
    )]
    SharedClientUrl(String),
    #[error("error parsing CompactionRetention: {0}")]
    Retention(String),
    #[error("auth: invalid auth options: --auth-token: {0}")]
    AuthToken(String),
    #[error("--{flag} must be >0 (set to {value})")]
    NotPositive { flag: &'static str, value: i64 },
    #[error("--{flag} must name at least one URL")]
    NoUrls { flag: &'static str },
    #[error("unknown engine {name:?} (supported are {})", engines::names())]
    Engine { name: String },
    #[error("quorate: engine-options: {0}")]
    EngineOption(#[from] engine_api::OptionError),
    #[error("not supported yet: {0}")]
    Unsupported(String),

    // The first start of a member.
    #[error("couldn't find local name {0:?} in the initial cluster configuration")]
    NoLocalName(String),
    #[error("initial cluster unset and no discovery endpoints found")]
    NoInitialCluster,
    #[error("initial cluster {0} has duplicate url")]
    DuplicateUrl(String),
    #[error("discovery URL should not be set when joining existing initial cluster")]
    DiscoveryWhenJoining,
    #[error(
        "--initial-cluster has {name}={url} but missing from \
         --initial-advertise-peer-urls={advertised}"
    )]
    NotAdvertised { name: String, url: String, advertised: String },
    #[error("--initial-advertise-peer-urls has {url} but missing from --initial-cluster={cluster}")]
    NotInCluster { url: String, cluster: String },
    #[error("failed to resolve {url} to match --initial-cluster={cluster} ({source})")]
    Resolve { url: String, cluster: String, source: std::io::Error },
}

/// How a configuration error is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Telling {
    /// The text and the short usage on stderr; exit code 2.
    Usage,
    /// The text alone on stderr; exit code 1.
    Plain,
    /// A fatal log line; exit code 1.
    Fatal,
    /// The log line `failed to verify flags`; exit code 1.
    Verify,
    /// A panic line; exit code 2.
    Panic,
}

impl ConfigError {
    /// How the process tells of it.
    pub fn telling(&self) -> Telling {
        match self {
            ConfigError::UnknownFlag(_)
            | ConfigError::NoValue(_)
            | ConfigError::Syntax(_)
            | ConfigError::FlagValue { .. }
            | ConfigError::FlagBool { .. } => Telling::Usage,
            ConfigError::FileUrls { .. } => Telling::Plain,
            ConfigError::Shadowed(_) => Telling::Fatal,
            ConfigError::LogLevel(_) => Telling::Panic,
            _ => Telling::Verify,
        }
    }

    /// The exit code that it ends the process with.
    pub fn exit_code(&self) -> u8 {
        match self.telling() {
            Telling::Usage | Telling::Panic => 2,
            Telling::Plain | Telling::Fatal | Telling::Verify => 1,
        }
    }
}
