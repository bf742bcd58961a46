//! The small types that settings have.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::duration::{self, GoDuration};

/// Rotation of the log file unless set, as the JSON text the flag takes.
pub const DEFAULT_ROTATION: &str =
    r#"{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}"#;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $name {
            $($(#[$variant_doc])* $variant),+
        }

        impl $name {
            /// Every value, in the order of the declaration.
            pub const ALL: &[$name] = &[$($name::$variant),+];

            /// The word that stands for it in a flag, a variable or a file.
            pub const fn name(self) -> &'static str {
                match self {
                    $($name::$variant => $word),+
                }
            }

            /// The value that `word` stands for.
            pub fn from_name(word: &str) -> Option<Self> {
                match word {
                    $($word => Some($name::$variant),)+
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

pub(super) use words;

words! {
    /// Which storage engine holds the keys.
    EngineKind {
        /// Everything in memory, rebuilt from the WAL: for tests and measurements.
        Memory = "memory",
        Redb = "redb",
    }
}

words! {
    /// Whether the first start founds a cluster or joins one.
    ClusterState { New = "new", Existing = "existing" }
}

words! {
    /// How the retention of automatic compaction is read.
    CompactionMode { Periodic = "periodic", Revision = "revision" }
}

words! {
    /// How much is measured.
    MetricsDetail {
        Basic = "basic",
        /// Also the time each gRPC call takes, per method.
        Extensive = "extensive",
    }
}

words! {
    /// How a log line is written.
    LogFormat { Json = "json", Console = "console" }
}

words! {
    /// The least severe line that is written.
    LogLevel {
        Debug = "debug",
        Info = "info",
        Warn = "warn",
        Error = "error",
        Dpanic = "dpanic",
        Panic = "panic",
        Fatal = "fatal",
    }
}

/// What automatic compaction keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retention {
    Off,
    /// The history of this long; > 0.
    Period(Duration),
    /// This many revisions; > 0.
    Revisions(i64),
}

impl Retention {
    /// Reads a retention: a whole number means hours or revisions, by `mode`; anything else is a
    /// duration, whose nanoseconds are the revisions in revision mode, as in etcd. 0 is off.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(mode: CompactionMode, text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix('+').unwrap_or(text);
        let nanos = if digits.bytes().all(|b| b.is_ascii_digit()) && !digits.is_empty() {
            let number: i64 = digits
                .parse()
                .map_err(|_| format!("strconv.Atoi: parsing {text:?}: value out of range"))?;
            match mode {
                CompactionMode::Revision => number,
                CompactionMode::Periodic => number
                    .checked_mul(3_600_000_000_000)
                    .ok_or_else(|| format!("{text} hours are more than a duration can hold"))?,
            }
        } else {
            duration::parse(text)?.0
        };
        match (mode, nanos) {
            (_, 0) => Ok(Retention::Off),
            (_, ..0) => Err(format!("{text} is negative")),
            (CompactionMode::Periodic, _) => {
                Ok(Retention::Period(Duration::from_nanos(nanos.unsigned_abs())))
            }
            (CompactionMode::Revision, _) => Ok(Retention::Revisions(nanos)),
        }
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Retention::Off => f.write_str("0s"),
            Retention::Period(period) => GoDuration::from(*period).fmt(f),
            Retention::Revisions(count) => count.fmt(f),
        }
    }
}

/// Browser origins that may call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origins {
    Any,
    /// As written in the `Origin` header.
    Only(BTreeSet<String>),
}

impl Default for Origins {
    fn default() -> Self {
        Origins::Any
    }
}

impl Origins {
    /// Whether a page from `origin` may call.
    pub fn allows(&self, origin: &str) -> bool {
        match self {
            Origins::Any => true,
            Origins::Only(origins) => origins.contains(origin),
        }
    }
}

/// One place that log lines go to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum LogOutput {
    Stderr,
    Stdout,
    /// Throws every line away.
    Null,
    /// systemd's journal; always the only output.
    Journal,
    /// Appended to; created if missing.
    File(PathBuf),
}

/// When a log file is put aside for a new one.
#[derive(Clone, PartialEq, Eq, Debug, serde::Deserialize)]
#[serde(default)]
pub struct Rotation {
    /// In MiB; 0 means 100.
    pub maxsize: u64,
    /// Days after which an old file is deleted; 0: never.
    pub maxage: u64,
    /// Old files kept; 0: all.
    pub maxbackups: u64,
    /// Whether the time in an old file's name is local instead of UTC.
    pub localtime: bool,
    /// Whether old files are compressed with gzip.
    pub compress: bool,
}

impl Default for Rotation {
    fn default() -> Self {
        Rotation { maxsize: 100, maxage: 0, maxbackups: 0, localtime: false, compress: false }
    }
}

/// Where users' tokens come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AuthToken {
    /// No provider: every token is refused.
    None,
    /// Random tokens, kept in memory.
    Simple,
    Jwt(JwtOptions),
}

/// The options after `jwt,`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JwtOptions {
    /// `RS256`, `HS512`, `EdDSA`...
    pub sign_method: String,
    pub pub_key: PathBuf,
    pub priv_key: PathBuf,
    pub ttl: Duration,
}
