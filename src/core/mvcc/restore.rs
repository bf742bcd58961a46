//! Rebuilding the index from what an engine holds (formats-and-peers 3.4).

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use engine_api::{EngineError, Table, View};
use rustc_hash::FxHasher;

use super::compact::{FINISHED, SCHEDULED};
use super::key_index::KeyIndex;
use super::keyspace::{parse_revision_key, peek};
use super::{Key, Store};
use crate::core::types::{LeaseId, Revision};

/// A store read back, and what else the walk found.
pub struct Restored {
    pub store: Store,
    /// Live keys that are attached to a lease.
    pub attached: Vec<(Key, LeaseId)>,
    /// A compaction whose superseded revisions may still be stored.
    pub unfinished: Option<i64>,
}

struct History {
    index: KeyIndex,
    lease: i64,
}

impl Store {
    /// Reads the store that `view` shows.
    ///
    /// # Errors
    /// `Corrupt`, naming the key of the table that cannot be, or what the view answers.
    pub fn restore(view: &dyn View) -> Result<Restored, EngineError> {
        let mut histories: HashMap<Key, History, BuildHasherDefault<FxHasher>> = HashMap::default();
        let mut revision = 1;
        let mut bad = None;
        view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut |key, value| match add(
            &mut histories,
            key,
            value,
        ) {
            Ok(main) => {
                revision = revision.max(main);
                ControlFlow::Continue(())
            }
            Err(what) => {
                bad = Some(corrupt(key, what));
                ControlFlow::Break(())
            }
        })?;
        if let Some(bad) = bad {
            return Err(bad);
        }
        let scheduled = compaction_mark(view, SCHEDULED)?;
        let finished = compaction_mark(view, FINISHED)?;
        let compacted = scheduled.max(finished);

        let mut sorted: Vec<(Key, History)> = histories.into_iter().collect();
        sorted.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let mut attached = Vec::new();
        let mut store = Store::default();
        store.now.live = sorted.iter().filter(|(_, history)| history.index.is_alive()).count();
        store.now.index = sorted
            .into_iter()
            .map(|(key, history)| {
                if history.lease != 0 && history.index.is_alive() {
                    attached.push((key.clone(), LeaseId(history.lease)));
                }
                (key, Arc::new(history.index))
            })
            .collect();
        store.now.revision = revision.max(compacted.unwrap_or(0));
        store.now.stored = Revision { main: store.now.revision, sub: i64::MAX };
        store.now.compact_revision = compacted.unwrap_or(-1);
        Ok(Restored { store, attached, unfinished: scheduled.filter(|_| scheduled > finished) })
    }
}

/// Adds one stored change; answers its main revision.
fn add(
    histories: &mut HashMap<Key, History, BuildHasherDefault<FxHasher>>,
    key: &[u8],
    value: &[u8],
) -> Result<i64, &'static str> {
    let (revision, tombstone) = parse_revision_key(key).ok_or("not a revision key")?;
    let stored = peek(value).ok_or("the value is not a KeyValue message")?;
    match histories.get_mut(stored.key) {
        Some(history) if tombstone => {
            if !history.index.is_alive() {
                return Err("a tombstone follows a tombstone");
            }
            history.index.tombstone(revision);
            history.lease = 0;
        }
        Some(history) => {
            history.index.put(revision);
            history.lease = stored.lease;
        }
        None => {
            let index = if tombstone {
                KeyIndex::restored_tombstone(revision)
            } else {
                let created = Revision::main(stored.create_revision);
                KeyIndex::restored(created, revision, stored.version)
            };
            histories.insert(stored.key.into(), History { index, lease: stored.lease });
        }
    }
    Ok(revision.main)
}

fn compaction_mark(view: &dyn View, name: &[u8]) -> Result<Option<i64>, EngineError> {
    match view.get(Table::Meta, name)? {
        None => Ok(None),
        Some(key) => match parse_revision_key(&key) {
            Some((revision, _)) => Ok(Some(revision.main)),
            None => Err(corrupt(name, "not a revision key")),
        },
    }
}

fn corrupt(key: &[u8], what: &str) -> EngineError {
    EngineError::Corrupt { at: format!("key {}", key.escape_ascii()), what: what.to_string() }
}
