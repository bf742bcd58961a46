//! The multi-version store: an index of every key's history in memory, over values stored under
//! revision keys in an engine.
//!
//! [`Store`] is the applier's, [`Snapshot`] is what it publishes: an O(1) clone that readers use
//! without locks. What is applied but not yet in the engine is part of the snapshot (`pending`,
//! `committing`), so a reader finds every value either there or in an engine view taken *after* it
//! took the snapshot.
//!
//! **Invariant**: `revision` counts transactions that changed something; it starts at 1 and each
//! transaction's changes are `(revision, 0), (revision, 1), ...` in the order they were made.

pub mod compact;
pub mod hash;
pub mod history;
pub mod key_index;
pub mod keyspace;
pub mod range;
pub mod restore;
pub mod txn;

use std::cell::OnceCell;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use engine_api::{Batch, Engine, EngineError, Table, View};
use imbl::OrdMap;
use quorate_proto::KeyValueBytes;

use self::key_index::{Found, KeyIndex};
use self::keyspace::revision_key;
use crate::core::types::Revision;

/// A user key as the index holds it: its own memory, never a slice of a request.
pub type Key = Arc<[u8]>;

/// Keys `from <= key < to`; `to` is `None` for "to the end".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyRange<'a> {
    pub from: &'a [u8],
    pub to: Option<&'a [u8]>,
}

impl<'a> KeyRange<'a> {
    /// Reads the pair of a request that names a range (v3-api 3.2); `None` if it names one key.
    pub fn of(key: &'a [u8], range_end: &'a [u8]) -> Option<Self> {
        match range_end {
            [] => None,
            [0] => Some(KeyRange { from: key, to: None }),
            end => Some(KeyRange { from: key, to: Some(end) }),
        }
    }

    fn bounds(&self) -> Option<(Bound<&'a [u8]>, Bound<&'a [u8]>)> {
        match self.to {
            Some(to) if to <= self.from => None,
            Some(to) => Some((Bound::Included(self.from), Bound::Excluded(to))),
            None => Some((Bound::Included(self.from), Bound::Unbounded)),
        }
    }
}

/// A change that the engine may not hold yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub tombstone: bool,
    /// What is stored under the revision key.
    pub value: KeyValueBytes,
}

/// The store at one moment, complete and immutable.
#[derive(Clone)]
pub struct Snapshot {
    index: OrdMap<Key, Arc<KeyIndex>>,
    pending: OrdMap<Revision, Change>,
    committing: OrdMap<Revision, Change>,
    /// No change up to this one is in `pending` or `committing`.
    stored: Revision,
    revision: i64,
    compact_revision: i64,
    live: usize,
}

/// Why a read fails.
#[derive(thiserror::Error, Debug)]
pub enum ReadError {
    #[error("revision {asked} is compacted, the oldest readable one is {compacted}")]
    Compacted { asked: i64, compacted: i64 },
    #[error("revision {asked} is not reached yet, the current one is {current}")]
    Future { asked: i64, current: i64 },
    /// A compaction has removed the value since the snapshot was taken: read again from a newer one.
    #[error("revision {0} was compacted while it was read")]
    Superseded(Revision),
    #[error("the value stored at revision {0} does not decode")]
    Damaged(Revision),
    #[error(transparent)]
    Storage(#[from] EngineError),
}

/// An engine and a view of it, opened when the first value is asked for.
///
/// **Invariant**: made after the snapshot that it completes.
pub struct Values<'a> {
    engine: &'a dyn Engine,
    view: OnceCell<Box<dyn View + 'a>>,
}

impl<'a> Values<'a> {
    /// Values of `engine`, opened lazily.
    pub fn new(engine: &'a dyn Engine) -> Self {
        Values { engine, view: OnceCell::new() }
    }

    /// The view, opened on first use.
    ///
    /// # Errors
    /// If the engine cannot open one.
    pub fn view(&self) -> Result<&(dyn View + 'a), EngineError> {
        if let Some(view) = self.view.get() {
            return Ok(&**view);
        }
        let view = self.engine.view()?;
        Ok(&**self.view.get_or_init(|| view))
    }
}

impl Snapshot {
    /// The last main revision.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Revisions below it cannot be read; -1 before the first compaction.
    pub fn compact_revision(&self) -> i64 {
        self.compact_revision
    }

    /// Keys that exist now.
    pub fn live_keys(&self) -> usize {
        self.live
    }

    /// Changes that the engine may not hold yet.
    pub fn uncommitted(&self) -> usize {
        self.pending.len() + self.committing.len()
    }

    /// What a reader at main revision `at` sees of `key`.
    pub fn find(&self, key: &[u8], at: i64) -> Option<Found> {
        self.index.get(key)?.get(at)
    }

    /// The stored `KeyValue` of a change that [`Snapshot::find`] or a scan named.
    ///
    /// # Errors
    /// `Superseded` if it is compacted away, or `Storage`.
    pub fn value(
        &self,
        values: &Values<'_>,
        revision: Revision,
    ) -> Result<KeyValueBytes, ReadError> {
        if revision > self.stored
            && let Some(change) =
                self.pending.get(&revision).or_else(|| self.committing.get(&revision))
        {
            return Ok(change.value.clone());
        }
        match values.view()?.get(Table::Key, &revision_key(revision, false))? {
            Some(value) => Ok(KeyValueBytes(value)),
            None => Err(ReadError::Superseded(revision)),
        }
    }

    /// Checks that `at` can be read.
    ///
    /// # Errors
    /// `Compacted` or `Future`.
    pub fn check_readable(&self, at: i64) -> Result<(), ReadError> {
        if at > self.revision {
            Err(ReadError::Future { asked: at, current: self.revision })
        } else if at < self.compact_revision {
            Err(ReadError::Compacted { asked: at, compacted: self.compact_revision })
        } else {
            Ok(())
        }
    }
}

/// The applier's side: the one place where the store changes.
#[derive(Clone)]
pub struct Store {
    now: Snapshot,
}

impl Default for Store {
    fn default() -> Self {
        Store {
            now: Snapshot {
                index: OrdMap::new(),
                pending: OrdMap::new(),
                committing: OrdMap::new(),
                stored: Revision::default(),
                revision: 1,
                compact_revision: -1,
                live: 0,
            },
        }
    }
}

impl Store {
    /// The state with everything applied so far; clone it to publish it.
    pub fn now(&self) -> &Snapshot {
        &self.now
    }

    /// Changes waiting for an engine batch.
    pub fn pending(&self) -> usize {
        self.now.pending.len()
    }

    /// Adds the waiting changes to an engine batch. They stay readable until [`Store::committed`].
    ///
    /// # Panics
    /// If the batch before is not committed yet: there is one committer, and it has one batch.
    pub fn take_batch(&mut self, batch: &mut Batch) {
        assert!(self.now.committing.is_empty(), "one engine batch at a time");
        self.now.committing = std::mem::take(&mut self.now.pending);
        batch.ops.reserve(self.now.committing.len());
        for (revision, change) in &self.now.committing {
            batch.put(
                Table::Key,
                revision_key(*revision, change.tombstone),
                change.value.0.clone(),
            );
        }
    }

    /// The engine now holds the batch taken last.
    pub fn committed(&mut self) {
        if let Some((last, _)) = self.now.committing.get_max() {
            self.now.stored = *last;
        }
        self.now.committing = OrdMap::new();
    }

    /// Puts one change at `revision`. `known` tells whether the index has the key, dead or alive: the
    /// caller has looked for it, and a new key need not be looked for again.
    fn put(&mut self, key: &Bytes, revision: Revision, value: KeyValueBytes, known: bool) {
        if known {
            let history = self.now.index.get_mut(&key[..]).expect("the caller has found the key");
            let history = Arc::make_mut(history);
            self.now.live += usize::from(!history.is_alive());
            history.put(revision);
        } else {
            self.now.live += 1;
            self.now.index.insert(key[..].into(), Arc::new(KeyIndex::created(revision)));
        }
        self.now.pending.insert(revision, Change { tombstone: false, value });
    }

    /// Puts a tombstone at `revision` for a key that is alive.
    fn tombstone(&mut self, key: &Bytes, revision: Revision) {
        let history = self.now.index.get_mut(&key[..]).expect("only a live key is deleted");
        Arc::make_mut(history).tombstone(revision);
        self.now.live -= 1;
        let value = keyspace::tombstone_value(key);
        self.now.pending.insert(revision, Change { tombstone: true, value });
    }
}
