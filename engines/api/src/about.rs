//! What an engine is and how it can be set: for whoever has to choose one, and for the configuration.

use std::collections::BTreeMap;
use std::fmt;

/// What a state of an engine outlives, each including the ones before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Survives {
    /// Not even an orderly end.
    Nothing,
    /// An orderly end of the process.
    OrderlyEnd,
    /// A process that is killed at any moment (SIGKILL, out of memory, a panic).
    Kill,
    /// A machine that loses its power: what was not synced is gone.
    PowerLoss,
}

impl fmt::Display for Survives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Survives::Nothing => "nothing",
            Survives::OrderlyEnd => "orderly end",
            Survives::Kill => "kill -9",
            Survives::PowerLoss => "power loss",
        })
    }
}

/// How [`Engine::reclaim`](crate::Engine::reclaim) gives space back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reclaim {
    /// Reads and commits go on meanwhile.
    Online,
    /// There is nothing to give back: the space of what is removed is free at once.
    Needless,
    /// The engine cannot; space is only reused.
    Never,
}

impl fmt::Display for Reclaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reclaim::Online => "online",
            Reclaim::Needless => "not needed",
            Reclaim::Never => "never",
        })
    }
}

/// An engine's promises and limits. The conformance suite holds each engine to its own.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// The name under which the configuration selects it.
    pub name: &'static str,
    /// One line: what it is, and whom it suits.
    pub summary: &'static str,
    /// What a commit outlives that is [`Buffered`](crate::Durability::Buffered).
    pub buffered_survives: Survives,
    /// What a commit outlives that is [`Durable`](crate::Durability::Durable).
    pub durable_survives: Survives,
    pub reclaim: Reclaim,
    /// Bytes of a key, at most; `None`: more than any request can hold.
    pub key_bytes_max: Option<u64>,
    /// Bytes of a value, at most; `None`: more than any request can hold.
    pub value_bytes_max: Option<u64>,
    /// One line: what it keeps in memory.
    pub memory: &'static str,
    /// One line: what it keeps on disk.
    pub files: &'static str,
    pub options: &'static [OptionSpec],
}

/// One setting of an engine.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    pub name: &'static str,
    pub kind: OptionKind,
    /// The value if none is given, as it would be written.
    pub default: &'static str,
    /// One line: what it does, and at what risk.
    pub help: &'static str,
}

/// The values that an option takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OptionKind {
    /// A decimal number from `min` to `max`, in `unit`.
    Number { min: u64, max: u64, unit: &'static str },
    /// `true` or `false`.
    Flag,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl OptionKind {
    fn takes(self, value: &str) -> bool {
        match self {
            OptionKind::Number { min, max, .. } => {
                // `parse` alone would take a sign.
                value.bytes().all(|byte| byte.is_ascii_digit())
                    && value.parse().is_ok_and(|number: u64| (min..=max).contains(&number))
            }
            OptionKind::Flag => matches!(value, "true" | "false"),
            OptionKind::Choice(words) => words.contains(&value),
        }
    }
}

impl fmt::Display for OptionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OptionKind::Number { min, max: u64::MAX, unit } => {
                write!(f, "a number of {unit}, at least {min}")
            }
            OptionKind::Number { min, max, unit } => {
                write!(f, "a number of {unit} from {min} to {max}")
            }
            OptionKind::Flag => f.write_str("true or false"),
            OptionKind::Choice(words) => write!(f, "one of {}", words.join(", ")),
        }
    }
}

/// Why options cannot be used.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum OptionError {
    #[error("unknown option {name:?} of engine {engine}; it has {valid}")]
    Unknown { engine: &'static str, name: String, valid: String },
    #[error("option {name} of engine {engine} is {value:?} but must be {rule}")]
    Value { engine: &'static str, name: &'static str, value: String, rule: String },
}

/// Values for all options of one engine, each within its bounds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    values: BTreeMap<&'static str, String>,
}

impl Options {
    /// The values that are given, and the defaults of the others.
    ///
    /// # Errors
    /// Naming an option that the engine has not, with all that it has, or a value and what it must be.
    pub fn new(about: &About, given: &BTreeMap<String, String>) -> Result<Self, OptionError> {
        let mut values: BTreeMap<&'static str, String> =
            about.options.iter().map(|spec| (spec.name, spec.default.to_owned())).collect();
        for (name, value) in given {
            let Some(spec) = about.options.iter().find(|spec| spec.name == name) else {
                let names: Vec<&str> = about.options.iter().map(|spec| spec.name).collect();
                return Err(OptionError::Unknown {
                    engine: about.name,
                    name: name.clone(),
                    valid: if names.is_empty() { "none".to_owned() } else { names.join(", ") },
                });
            };
            if !spec.kind.takes(value) {
                return Err(OptionError::Value {
                    engine: about.name,
                    name: spec.name,
                    value: value.clone(),
                    rule: spec.kind.to_string(),
                });
            }
            values.insert(spec.name, value.clone());
        }
        Ok(Options { values })
    }

    /// The defaults.
    ///
    /// # Panics
    /// If a default of the engine is not one of the values that the option takes.
    pub fn defaults(about: &About) -> Self {
        let defaults = about.options.iter().map(|spec| (spec.name.into(), spec.default.into()));
        Options::new(about, &defaults.collect()).expect("defaults within the bounds")
    }

    /// The value of an option that is a number.
    ///
    /// # Panics
    /// If the engine has no such option.
    pub fn number(&self, name: &str) -> u64 {
        self.word(name).parse().expect("an option that is a number")
    }

    /// The value of an option that is true or false.
    ///
    /// # Panics
    /// If the engine has no such option.
    pub fn flag(&self, name: &str) -> bool {
        self.word(name).parse().expect("an option that is true or false")
    }

    /// The value of an option, as it was written.
    ///
    /// # Panics
    /// If the engine has no such option.
    pub fn word(&self, name: &str) -> &str {
        self.values.get(name).expect("an option that the engine has")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABOUT: About = About {
        name: "made-up",
        summary: "",
        buffered_survives: Survives::OrderlyEnd,
        durable_survives: Survives::PowerLoss,
        reclaim: Reclaim::Online,
        key_bytes_max: None,
        value_bytes_max: None,
        memory: "",
        files: "",
        options: &[
            OptionSpec {
                name: "cache-bytes",
                kind: OptionKind::Number { min: 1024, max: u64::MAX, unit: "bytes" },
                default: "4096",
                help: "",
            },
            OptionSpec {
                name: "compression",
                kind: OptionKind::Choice(&["none", "lz4"]),
                default: "lz4",
                help: "",
            },
            OptionSpec { name: "checks", kind: OptionKind::Flag, default: "false", help: "" },
        ],
    };

    fn given(name: &str, value: &str) -> Result<Options, OptionError> {
        Options::new(&ABOUT, &[(name.to_owned(), value.to_owned())].into())
    }

    #[test]
    fn what_is_not_given_is_the_default() {
        let options = given("checks", "true").unwrap();
        assert!(options.flag("checks"));
        assert_eq!(options.number("cache-bytes"), 4096);
        assert_eq!(options.word("compression"), "lz4");
        assert!(!Options::defaults(&ABOUT).flag("checks"));
    }

    #[test]
    fn what_is_wrong_is_told_with_what_would_be_right() {
        for (name, value, error) in [
            (
                "cache",
                "1",
                "unknown option \"cache\" of engine made-up; it has cache-bytes, compression, checks",
            ),
            (
                "cache-bytes",
                "1023",
                "option cache-bytes of engine made-up is \"1023\" but must be a number of bytes, at \
                 least 1024",
            ),
            (
                "cache-bytes",
                "+2000",
                "option cache-bytes of engine made-up is \"+2000\" but must be a number of bytes, \
                 at least 1024",
            ),
            (
                "compression",
                "zip",
                "option compression of engine made-up is \"zip\" but must be one of none, lz4",
            ),
            ("checks", "", "option checks of engine made-up is \"\" but must be true or false"),
        ] {
            assert_eq!(given(name, value).unwrap_err().to_string(), error);
        }
        let none = About { options: &[], ..ABOUT };
        let error = Options::new(&none, &[("a".to_owned(), "b".to_owned())].into()).unwrap_err();
        assert_eq!(error.to_string(), "unknown option \"a\" of engine made-up; it has none");
    }
}
