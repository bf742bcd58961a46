//! What is worth a log line about a configuration that is taken. The lines wait until the log is up.

use std::fmt;
use std::path::PathBuf;

/// One line for the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Notice {
    /// Flags and variables were not looked at.
    FileUsed {
        path: PathBuf,
    },
    /// `ETCD_VERSION` is set; it means nothing.
    VersionVariable {
        value: String,
    },
    VariableUsed {
        name: String,
        value: String,
    },
    VariableUnknown {
        name: String,
    },
    KeyUnknown {
        key: String,
    },
    Deprecated {
        flag: &'static str,
        text: &'static str,
    },
    RaftTimeoutRaised {
        flag: &'static str,
    },
    WatchIntervalRaised,
    DefaultName {
        name: String,
    },
    DefaultDataDir {
        data_dir: PathBuf,
    },
    OnePort,
    CheckpointWithoutPersist,
    BcryptCost {
        given: u64,
        used: u32,
    },
    TokenOptionsUnknown {
        names: String,
    },
    MetricsUnknown {
        given: String,
    },
    LargeRequests {
        bytes: u64,
        recommended: u64,
    },
    LargeQuota {
        bytes: u64,
        recommended: u64,
    },
    DefaultHost {
        host: String,
    },
    NoDefaultHost {
        error: String,
    },
}

impl Notice {
    /// Whether it is a warning.
    pub fn is_warning(&self) -> bool {
        !matches!(
            self,
            Notice::FileUsed { .. }
                | Notice::VariableUsed { .. }
                | Notice::RaftTimeoutRaised { .. }
                | Notice::DefaultHost { .. }
                | Notice::NoDefaultHost { .. }
        )
    }

    /// Writes it to the log.
    pub fn log(&self) {
        use tracing::{info, warn};
        match self {
            Notice::FileUsed { path } => info!(path = %path.display(), "{self}"),
            Notice::VersionVariable { value } => warn!(key = "ETCD_VERSION", value, "{self}"),
            Notice::VariableUsed { name, value } => {
                info!("variable-name" = name, "variable-value" = value, "{self}");
            }
            Notice::VariableUnknown { name } => warn!("environment-variable" = name, "{self}"),
            Notice::KeyUnknown { key } => warn!(key, "{self}"),
            Notice::Deprecated { .. } | Notice::OnePort | Notice::CheckpointWithoutPersist => {
                warn!("{self}");
            }
            Notice::RaftTimeoutRaised { .. } => info!("{self}"),
            Notice::WatchIntervalRaised => warn!("{self}"),
            Notice::DefaultName { name } => warn!(name, "{self}"),
            Notice::DefaultDataDir { data_dir } => {
                warn!("data-dir" = %data_dir.display(), "{self}");
            }
            Notice::BcryptCost { given, used } => {
                warn!("given-cost" = given, "used-cost" = used, "{self}");
            }
            Notice::TokenOptionsUnknown { names } => warn!(keys = names, "{self}"),
            Notice::MetricsUnknown { given } => warn!(metrics = given, "{self}"),
            Notice::LargeRequests { bytes, recommended } => {
                warn!(
                    "max-request-bytes" = bytes,
                    "recommended-request-bytes" = recommended,
                    "{self}"
                );
            }
            Notice::LargeQuota { bytes, recommended } => {
                warn!("quota-backend-bytes" = bytes, "recommended-bytes" = recommended, "{self}");
            }
            Notice::DefaultHost { host } => info!(host, "{self}"),
            Notice::NoDefaultHost { error } => info!(error, "{self}"),
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Notice::FileUsed { .. } => {
                "loaded server configuration, other configuration command line flags and \
                 environment variables will be ignored if provided"
            }
            Notice::VersionVariable { .. } => "cannot set special environment variable",
            Notice::VariableUsed { .. } => "recognized and used environment variable",
            Notice::VariableUnknown { .. } => "unrecognized environment variable",
            Notice::KeyUnknown { .. } => "unknown key in the configuration file is without effect",
            Notice::Deprecated { text, .. } => text,
            Notice::RaftTimeoutRaised { flag } => {
                return write!(f, "{flag} increased to minimum value: 5s");
            }
            Notice::WatchIntervalRaised => {
                "watch-progress-notify-interval increased to minimum value: 100ms"
            }
            Notice::DefaultName { .. } => {
                "--name is not set; members that share the name \"default\" can be mistaken for \
                 each other"
            }
            Notice::DefaultDataDir { .. } => "'data-dir' was empty; using default",
            Notice::OnePort => {
                "HTTP and gRPC share a port; --listen-client-http-urls would part them"
            }
            Notice::CheckpointWithoutPersist => {
                "lease checkpoints are on without feature gate LeaseCheckpointPersist, so that \
                 a change of leader after a restart forgets them"
            }
            Notice::BcryptCost { .. } => "--bcrypt-cost is outside 4 to 31; using the default",
            Notice::TokenOptionsUnknown { .. } => {
                "unknown options of --auth-token are without effect"
            }
            Notice::MetricsUnknown { .. } => {
                "--metrics is neither basic nor extensive; using basic"
            }
            Notice::LargeRequests { .. } => "--max-request-bytes exceeds what is recommended",
            Notice::LargeQuota { .. } => "--quota-backend-bytes exceeds what is recommended",
            Notice::DefaultHost { .. } => "detected default host for advertise",
            Notice::NoDefaultHost { .. } => "failed to detect default host",
        })
    }
}
