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
        let number = match text.parse::<i64>() {
            Ok(number @ 0..) => match mode {
                CompactionMode::Revision => number,
                CompactionMode::Periodic => number
                    .checked_mul(3_600_000_000_000)
                    .ok_or_else(|| format!("{text} hours are more than a duration can hold"))?,
            },
            _ => duration::parse(text)?.0,
        };
        match (mode, number) {
            (_, 0) => Ok(Retention::Off),
            (_, ..0) => Err(format!("{text} is negative")),
            (CompactionMode::Periodic, _) => {
                Ok(Retention::Period(Duration::from_nanos(number.unsigned_abs())))
            }
            (CompactionMode::Revision, _) => Ok(Retention::Revisions(number)),
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
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum Origins {
    #[default]
    Any,
    /// As written in the `Origin` header.
    Only(BTreeSet<String>),
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

impl AuthToken {
    /// Names of options in what [`AuthToken::parse`] takes that mean nothing.
    pub fn unknown_options(text: &str) -> Vec<&str> {
        let mut parts = text.split(',');
        if parts.next() != Some("jwt") {
            return Vec::new();
        }
        let names = parts.filter_map(|part| part.split_once('=').map(|(name, _)| name));
        names.filter(|name| !JWT_OPTIONS.contains(name)).collect()
    }

    /// Reads the option: empty, `simple`, or `jwt` with options behind commas.
    ///
    /// # Errors
    /// What is wrong, in words of our own: etcd says only that the options are invalid.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        let mut options: Vec<(&str, &str)> = Vec::new();
        for part in parts {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) if !value.contains('=') => (name, value),
                _ => return Err(format!("option {part:?} has not the form name=value")),
            };
            if options.iter().any(|(other, _)| *other == name) {
                return Err(format!("option {name:?} is given twice"));
            }
            options.push((name, value));
        }
        let option = |name: &str| options.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
        match kind {
            "" => Ok(AuthToken::None),
            "simple" => Ok(AuthToken::Simple),
            "jwt" => {
                let sign_method = option("sign-method").ok_or("jwt needs sign-method")?;
                if !SIGN_METHODS.contains(&sign_method) {
                    return Err(format!("unknown sign-method {sign_method:?}"));
                }
                let ttl = match option("ttl") {
                    None => Duration::from_secs(300),
                    Some(text) => match duration::parse(text)?.to_std() {
                        Some(ttl) if !ttl.is_zero() => ttl,
                        _ => return Err(format!("ttl must be >0 (set to {text})")),
                    },
                };
                Ok(AuthToken::Jwt(JwtOptions {
                    sign_method: sign_method.to_owned(),
                    pub_key: option("pub-key").unwrap_or_default().into(),
                    priv_key: option("priv-key").unwrap_or_default().into(),
                    ttl,
                }))
            }
            _ => Err(format!("unknown token type {kind:?}")),
        }
    }
}

/// Options of `jwt`.
const JWT_OPTIONS: [&str; 4] = ["sign-method", "pub-key", "priv-key", "ttl"];

const SIGN_METHODS: [&str; 13] = [
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256",
    "ES384", "ES512", "EdDSA",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retention_is_read_by_mode() {
        use CompactionMode::{Periodic, Revision};
        let hour = Duration::from_secs(3600);
        for (mode, text, retention) in [
            (Periodic, "0", Retention::Off),
            (Periodic, "0s", Retention::Off),
            (Periodic, "2", Retention::Period(2 * hour)),
            (Periodic, "90m", Retention::Period(hour + hour / 2)),
            (Revision, "1000", Retention::Revisions(1000)),
            (Revision, "1us", Retention::Revisions(1000)),
        ] {
            assert_eq!(Retention::parse(mode, text), Ok(retention), "{text}");
        }
        for text in ["", "-1", "-5m", "x", "9223372036854775807", "99999999999999999999"] {
            assert!(Retention::parse(Periodic, text).is_err(), "{text}");
        }
    }

    #[test]
    fn auth_tokens() {
        assert_eq!(AuthToken::parse(""), Ok(AuthToken::None));
        assert_eq!(AuthToken::parse("simple"), Ok(AuthToken::Simple));
        let jwt = AuthToken::parse("jwt,sign-method=RS256,pub-key=a,ttl=10m").unwrap();
        let expected = JwtOptions {
            sign_method: "RS256".to_owned(),
            pub_key: "a".into(),
            priv_key: PathBuf::new(),
            ttl: Duration::from_secs(600),
        };
        assert_eq!(jwt, AuthToken::Jwt(expected));
        assert_eq!(AuthToken::unknown_options("jwt,sign-method=RS256,a=b,ttl=1s,c=d"), ["a", "c"]);
        assert_eq!(AuthToken::unknown_options("simple"), [""; 0]);
        for text in ["jwt", "jwt,sign-method=X", "jwt,sign-method", "oidc", "simple,a=1,a=2"] {
            assert!(AuthToken::parse(text).is_err(), "{text}");
        }
    }
}
