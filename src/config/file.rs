//! The configuration file: YAML (so also JSON), read as loosely as etcd reads it.
//!
//! Keys that nobody knows are told of and skipped, for the file may be that of another release. Our
//! own settings stand at the top level or in a section `quorate`; an unknown key there is an error.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::ConfigError;
use super::flags::{self, FILE_ONLY, FLAGS, Flag, Group};
use super::load::{Sources, negative_duration};
use super::notice::Notice;
use super::slot::{Refusal, Slot};
use super::{Config, DEFAULT_NAME, DEFAULT_PEER_URL};

/// The section in which only our own keys may stand.
const OWN_SECTION: &str = "quorate";

/// One key with a value, its sections before it with dots.
struct Entry<'a> {
    key: String,
    value: &'a Value,
}

/// Reads the file at `path` over `config`.
pub(super) fn read(
    path: &Path,
    config: &mut Config,
    sources: &mut Sources,
) -> Result<(), ConfigError> {
    let text = fs::read_to_string(path)
        .map_err(|source| ConfigError::ReadFile { path: path.to_owned(), source })?;
    parse(path, &text, config, sources)
}

/// Takes the file's text; `path` is for messages.
pub(super) fn parse(
    path: &Path,
    text: &str,
    config: &mut Config,
    sources: &mut Sources,
) -> Result<(), ConfigError> {
    let document = yaml(path, text)?;
    let mut entries = Vec::new();
    flatten(path, "", &document, &mut entries)?;
    let mut seen = BTreeSet::new();
    for Entry { key, value } in entries {
        let Some(setting) = find(&key) else {
            if let Some(own) = own_key(&key) {
                return Err(ConfigError::UnknownOwnKey {
                    path: path.to_owned(),
                    key: own.to_owned(),
                    known: own_keys().collect::<Vec<_>>().join(", "),
                });
            }
            sources.notices.push(Notice::KeyUnknown { key });
            continue;
        };
        if !seen.insert(setting.key) {
            return Err(ConfigError::Twice { path: path.to_owned(), key: setting.key.to_owned() });
        }
        let mut slot = (setting.slot)(config);
        let is_urls = matches!(slot, Slot::Urls(_));
        slot.set_value(value).map_err(|refusal| match refusal {
            Refusal::Form(what) if is_urls && value.is_string() => ConfigError::FileUrls {
                // etcd's own mistake, kept because it is what is searched for.
                key: match setting.key {
                    "advertise-client-urls" => "advertise-peer-urls",
                    key => key,
                },
                what,
            },
            Refusal::Form(what) => {
                ConfigError::KeyValue { path: path.to_owned(), key: setting.key.to_owned(), what }
            }
            Refusal::Negative(value) => negative_duration(setting.key, value),
        })?;
        if let Some(flag) = setting.flag {
            sources.set.insert(flag);
        }
    }
    settle(config);
    Ok(())
}

/// What a file's values stand for where that differs from the same values of flags.
fn settle(config: &mut Config) {
    let discovered = !config.discovery.srv.is_empty() || !config.discovery.endpoints.is_empty();
    if discovered && config.given.initial_cluster == format!("{DEFAULT_NAME}={DEFAULT_PEER_URL}") {
        config.given.initial_cluster.clear();
    }
    if config.given.initial_cluster_state.is_empty() {
        config.given.initial_cluster_state = "new".to_owned();
    }
    if config.tls.self_signed_validity_years == 0 {
        config.tls.self_signed_validity_years = 1;
    }
}

/// The document as a map; an empty one has no keys.
fn yaml(path: &Path, text: &str) -> Result<Map<String, Value>, ConfigError> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
    };
    let document: Option<Value> = serde_saphyr::from_str_with_options(text, options)
        .map_err(|source| ConfigError::Yaml { path: path.to_owned(), source: Box::new(source) })?;
    match document {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(other) => Err(ConfigError::NoMap { path: path.to_owned(), found: other.to_string() }),
    }
}

/// Lists the keys of `map` that are settings, those of its sections included. An exact key comes
/// after one that differs only in case, so that it wins.
fn flatten<'a>(
    path: &Path,
    prefix: &str,
    map: &'a Map<String, Value>,
    entries: &mut Vec<Entry<'a>>,
) -> Result<(), ConfigError> {
    for (name, value) in map {
        let key = format!("{prefix}{name}");
        if !is_section(&key) {
            // Where two spellings of one key stand, etcd's decoder takes the exact one.
            let exact = find(&key).filter(|s| s.key != key).map(|s| s.key);
            let shadowed = exact
                .and_then(|key| key.strip_prefix(prefix))
                .is_some_and(|name| map.contains_key(name));
            if !shadowed {
                entries.push(Entry { key, value });
            }
            continue;
        }
        match value {
            Value::Null => {}
            Value::Object(inner) => flatten(path, &format!("{key}."), inner, entries)?,
            _ => {
                return Err(ConfigError::Section {
                    path: path.to_owned(),
                    section: key,
                    found: value.to_string(),
                });
            }
        }
    }
    Ok(())
}

/// A setting that a key stands for.
struct Setting {
    /// The key in its exact spelling.
    key: &'static str,
    flag: Option<&'static str>,
    slot: fn(&mut Config) -> Slot<'_>,
}

/// The setting that `key` stands for, whatever its case.
fn find(key: &str) -> Option<Setting> {
    let own = own_key(key);
    if own.is_some_and(|own| !own_keys().any(|known| known.eq_ignore_ascii_case(own))) {
        return None;
    }
    let key = own.unwrap_or(key);
    let of_flag = |flag: &'static Flag| {
        flag.key().map(|key| Setting { key, flag: Some(flag.name), slot: flag.slot })
    };
    let of_file =
        FILE_ONLY.iter().map(|only| Setting { key: only.key, flag: None, slot: only.slot });
    FLAGS.iter().filter_map(of_flag).chain(of_file).find(|s| s.key.eq_ignore_ascii_case(key))
}

/// The part of `key` behind the name of our own section, if it stands in that.
fn own_key(key: &str) -> Option<&str> {
    let (section, own) = key.split_once('.')?;
    section.eq_ignore_ascii_case(OWN_SECTION).then_some(own)
}

/// The keys that may stand in our own section.
fn own_keys() -> impl Iterator<Item = &'static str> {
    FLAGS.iter().filter(|flag| flag.group == Group::Own).filter_map(flags::Flag::key)
}

/// Whether `key` is the name of a section, whatever its case.
fn is_section(key: &str) -> bool {
    let begins = |setting: &str| {
        setting.len() > key.len()
            && setting.as_bytes()[key.len()] == b'.'
            && setting.as_bytes()[..key.len()].eq_ignore_ascii_case(key.as_bytes())
    };
    key.eq_ignore_ascii_case(OWN_SECTION)
        || FLAGS.iter().filter_map(Flag::key).any(begins)
        || FILE_ONLY.iter().any(|only| begins(only.key))
}

/// The keys of a file's text, with dots between sections and key, in the spelling of the file.
///
/// # Errors
/// If the text is no YAML, no map, or a section is none.
pub fn keys(path: &Path, text: &str) -> Result<Vec<String>, ConfigError> {
    let document = yaml(path, text)?;
    let mut entries = Vec::new();
    flatten(path, "", &document, &mut entries)?;
    Ok(entries.into_iter().map(|entry| entry.key).collect())
}
