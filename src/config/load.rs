//! From command line, environment and file to a [`Config`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::duration::GoDuration;
use super::error::ConfigError;
use super::flags::{self, FLAGS, Flag};
use super::notice::Notice;
use super::slot::Refusal;
use super::{Config, file, support, validate};

/// What surrounds the process and can decide a setting.
pub struct Surroundings<'a> {
    pub env: BTreeMap<String, String>,
    /// Answers the address of the default route, or why there is none. Asked only if a listener is
    /// bound to all addresses and no advertised URL is set.
    pub default_host: &'a dyn Fn() -> Result<String, String>,
}

/// What the command line asks for.
#[derive(PartialEq, Debug)]
pub enum Asked {
    Help,
    Version,
    Serve(Box<Config>),
}

/// What was set other than by default, and by which way.
pub(super) struct Sources {
    /// Whether a file was read: then no flag or variable counts.
    pub file: bool,
    /// Names of flags that were set by flag, variable or key.
    pub set: BTreeSet<&'static str>,
    pub notices: Vec<Notice>,
}

/// Reads the arguments behind the program's name, the environment and, if one is named, the
/// configuration file; checks all of it. What is worth a log line, even if an error ends it, goes to
/// `notices`.
///
/// # Errors
/// [`ConfigError`]; its [`telling`](ConfigError::telling) says how the process ends.
pub fn load(
    args: &[String],
    surroundings: &Surroundings<'_>,
    notices: &mut Vec<Notice>,
) -> Result<Asked, ConfigError> {
    let mut sources = Sources { file: false, set: BTreeSet::new(), notices: Vec::new() };
    let asked = load_with(args, surroundings, &mut sources);
    *notices = sources.notices;
    asked
}

fn load_with(
    args: &[String],
    surroundings: &Surroundings<'_>,
    sources: &mut Sources,
) -> Result<Asked, ConfigError> {
    let mut config = Config::default();
    if parse_args(args, &mut config, &mut sources.set)? == Parsed::Help {
        return Ok(Asked::Help);
    }
    if config.given.version {
        return Ok(Asked::Version);
    }
    let path = match &*config.given.config_file {
        "" => surroundings.env.get("ETCD_CONFIG_FILE").cloned().unwrap_or_default(),
        path => path.to_owned(),
    };
    if path.is_empty() {
        parse_env(&surroundings.env, &mut config, sources)?;
        raise_timeouts(&mut config, &mut sources.notices);
        adjust_command_line(&mut config, &sources.set);
    } else {
        config = Config::default();
        sources.set.clear();
        sources.file = true;
        file::read(Path::new(&path), &mut config, sources)?;
        sources.notices.push(Notice::FileUsed { path: path.into() });
    }
    for &(flag, text) in flags::DEPRECATED {
        if sources.set.contains(flag) {
            sources.notices.push(Notice::Deprecated { flag, text });
        }
    }
    validate::validate(&mut config, sources)?;
    validate::resolve(&mut config, sources, surroundings.default_host)?;
    support::check(&config)?;
    Ok(Asked::Serve(Box::new(config)))
}

#[derive(PartialEq)]
enum Parsed {
    All,
    /// Help was asked for; what follows was not read.
    Help,
}

/// Takes the flags, in Go's syntax: one or two dashes; the value behind `=` or as the next argument,
/// for a boolean only behind `=`. The first argument that is no flag, or `--`, ends them.
fn parse_args(
    args: &[String],
    config: &mut Config,
    set: &mut BTreeSet<&'static str>,
) -> Result<Parsed, ConfigError> {
    let mut args = args.iter();
    let mut negative = None;
    while let Some(arg) = args.next() {
        if arg == "--" {
            break;
        }
        let body = match arg.strip_prefix('-') {
            None | Some("") => return Err(ConfigError::Positional(arg.clone())),
            Some(body) => body.strip_prefix('-').unwrap_or(body),
        };
        if body.starts_with(['-', '=']) {
            return Err(ConfigError::Syntax(arg.clone()));
        }
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (body, None),
        };
        let Some(flag) = flags::find(name) else {
            match name {
                "h" | "help" => return Ok(Parsed::Help),
                _ if flags::IGNORED.contains(&name) => continue,
                _ => return Err(ConfigError::UnknownFlag(name.to_owned())),
            }
        };
        let mut slot = (flag.slot)(config);
        let is_bool = slot.is_bool();
        let value = match value {
            Some(value) => value,
            None if is_bool => "true",
            None => args.next().ok_or(ConfigError::NoValue(flag.name))?,
        };
        match slot.set_text(value) {
            Ok(()) => {}
            Err(Refusal::Form(what)) if is_bool => {
                let value = value.to_owned();
                return Err(ConfigError::FlagBool { flag: flag.name, value, what });
            }
            Err(Refusal::Form(what)) => {
                let value = value.to_owned();
                return Err(ConfigError::FlagValue { flag: flag.name, value, what });
            }
            // A rule, not a matter of syntax: what is wrong with the syntax comes first.
            Err(Refusal::Negative(value)) => {
                negative.get_or_insert(negative_duration(flag.name, value));
            }
        }
        set.insert(flag.name);
    }
    if let Some(rest) = args.next() {
        return Err(ConfigError::Positional(rest.clone()));
    }
    negative.map_or(Ok(Parsed::All), Err)
}

/// The error for a negative duration.
pub(super) fn negative_duration(flag: &str, value: GoDuration) -> ConfigError {
    match flag {
        "compact-hash-check-time" => ConfigError::CompactHashTime(value),
        _ => ConfigError::Negative { flag: flag.to_owned(), value },
    }
}

/// Takes the variables of flags that were not given.
fn parse_env(
    env: &BTreeMap<String, String>,
    config: &mut Config,
    sources: &mut Sources,
) -> Result<(), ConfigError> {
    const VERSION: &str = "ETCD_VERSION";
    if let Some(value) = env.get(VERSION).filter(|value| !value.is_empty()) {
        sources.notices.push(Notice::VersionVariable { value: value.clone() });
    }
    let mut by_name: Vec<&Flag> = FLAGS.iter().collect();
    by_name.sort_by_key(|flag| flag.name);
    let mut wrong = None;
    let mut used = BTreeSet::new();
    let mut shadowed = BTreeSet::new();
    for flag in by_name {
        let variable = flag.env();
        if sources.set.contains(flag.name) {
            shadowed.insert(variable);
            continue;
        }
        if variable == VERSION {
            used.insert(variable);
            continue;
        }
        // An empty variable counts as none, and is told of as unknown below.
        let Some(value) = env.get(&variable).filter(|value| !value.is_empty()) else { continue };
        match (flag.slot)(config).set_text(value) {
            Ok(()) => {
                let value = if flag.is_secret() { "(hidden)" } else { value };
                sources.set.insert(flag.name);
                sources
                    .notices
                    .push(Notice::VariableUsed { name: variable.clone(), value: value.to_owned() });
            }
            // etcd tells of the last wrong one.
            Err(Refusal::Form(what)) => {
                let value = if flag.is_secret() { "(hidden)" } else { value };
                wrong = Some(ConfigError::VariableValue {
                    variable: variable.clone(),
                    value: value.to_owned(),
                    what,
                });
            }
            Err(Refusal::Negative(value)) => wrong = Some(negative_duration(flag.name, value)),
        }
        used.insert(variable);
    }
    for name in env.keys() {
        if used.contains(name) {
            continue;
        }
        if shadowed.contains(name) {
            return Err(ConfigError::Shadowed(name.clone()));
        }
        if name.starts_with(flags::ETCD_PREFIX) || name.starts_with(flags::OWN_PREFIX) {
            sources.notices.push(Notice::VariableUnknown { name: name.clone() });
        }
    }
    wrong.map_or(Ok(()), Err)
}

fn raise_timeouts(config: &mut Config, notices: &mut Vec<Notice>) {
    let least = Config::default().raft.read_timeout;
    for (flag, timeout) in [
        ("raft-read-timeout", &mut config.raft.read_timeout),
        ("raft-write-timeout", &mut config.raft.write_timeout),
    ] {
        if *timeout < least {
            *timeout = least;
            notices.push(Notice::RaftTimeoutRaised { flag });
        }
    }
}

/// Drops defaults that other flags make wrong. A file keeps the first of them.
fn adjust_command_line(config: &mut Config, set: &BTreeSet<&'static str>) {
    if set.contains("listen-client-urls") && !set.contains("advertise-client-urls") {
        config.cluster.advertise_client_urls.clear();
    }
    let discovered = !config.discovery.srv.is_empty()
        || !config.discovery.srv_name.is_empty()
        || !config.discovery.endpoints.is_empty();
    if discovered && !set.contains("initial-cluster") {
        config.given.initial_cluster.clear();
    }
}
