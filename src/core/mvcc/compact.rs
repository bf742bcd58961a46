//! Forgetting superseded revisions: at once for readers, in slices for the disk.
//!
//! A compaction at R takes effect when its entry is applied ([`Store::compact`]). What it supersedes
//! is dropped later, key by key in key order ([`Compaction::slice`]). What is dropped of a key depends
//! only on its changes up to R, so writes may go on between slices, and a compaction cut short by a
//! crash is simply done again from the start.

use std::ops::Bound;
use std::sync::Arc;

use engine_api::{Batch, Table};

use super::keyspace::revision_key;
use super::{Key, ReadError, Store};
use crate::core::types::Revision;

/// Meta keys of a compaction (formats-and-peers 3.2).
pub const SCHEDULED: &[u8] = b"scheduledCompactRev";
/// Set when everything superseded is gone.
pub const FINISHED: &[u8] = b"finishedCompactRev";

/// A compaction that has taken effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scheduled {
    pub at: i64,
    /// The compact revision before it; -1 for none.
    pub previous: i64,
}

impl Store {
    /// Makes revisions below `at` unreadable.
    ///
    /// # Errors
    /// `Compacted` if that is so already, `Future` if `at` is not reached.
    pub fn compact(&mut self, at: i64) -> Result<Scheduled, ReadError> {
        let previous = self.now.compact_revision;
        if at <= previous {
            return Err(ReadError::Compacted { asked: at, compacted: previous });
        }
        if at > self.now.revision {
            return Err(ReadError::Future { asked: at, current: self.now.revision });
        }
        self.now.compact_revision = at;
        Ok(Scheduled { at, previous })
    }
}

/// A compaction whose superseded revisions are being dropped.
#[derive(Clone, Debug)]
pub struct Compaction {
    at: i64,
    /// The next key to look at; `None` for the first.
    next: Option<Key>,
}

/// Progress of a slice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sliced {
    /// Revisions dropped.
    pub dropped: usize,
    /// Nothing is left to do.
    pub done: bool,
}

impl Compaction {
    /// The dropping of what a compaction at `at` superseded.
    pub fn new(at: i64) -> Self {
        Compaction { at, next: None }
    }

    /// The revision compacted at.
    pub fn at(&self) -> i64 {
        self.at
    }

    /// Looks at up to `keys` further keys, drops about `limit` revisions (1 at least) from the index and
    /// adds their deletion to `batch`. A key whose history does not fit is gone on with in the next
    /// slice: the oldest revisions go first, so what is left of it is a history compacted further back.
    pub fn slice(
        &mut self,
        store: &mut Store,
        batch: &mut Batch,
        keys: usize,
        limit: usize,
    ) -> Sliced {
        let limit = limit.max(1);
        let mut due: Vec<(Key, usize)> = Vec::new();
        let mut looked = 0;
        let mut room = limit;
        let from = match &self.next {
            Some(key) => Bound::Included(&key[..]),
            None => Bound::Unbounded,
        };
        let mut rest = store.now.index.range::<_, [u8]>((from, Bound::Unbounded));
        let next = loop {
            let Some((key, history)) = rest.next() else { break None };
            if looked == keys || room == 0 {
                break Some(key.clone());
            }
            looked += 1;
            let of_key = history.superseded(self.at);
            // To look at a key and to copy it costs as much as it has generations: at least as much has to
            // go with it, or a key that was made anew often would be dropped in quadratic time.
            let share = room.max(history.generations());
            if of_key > 0 {
                due.push((key.clone(), of_key.min(share)));
            }
            if of_key > share {
                break Some(key.clone());
            }
            room = room.saturating_sub(of_key);
        };
        self.next = next;
        let mut dropped = 0;
        for (key, some) in due {
            let history = store.now.index.get_mut(&key[..]).expect("the key was just seen");
            let pending = &mut store.now.pending;
            let left = Arc::make_mut(history).compact(self.at, some, &mut |revision, tombstone| {
                dropped += 1;
                // What the engine was never given must not be given after its deletion.
                if pending.remove(&revision).is_none() {
                    batch.delete(Table::Key, revision_key(revision, tombstone));
                }
            });
            if !left {
                store.now.index.remove(&key[..]);
            }
        }
        let done = self.next.is_none();
        if done {
            batch.put(Table::Meta, FINISHED, revision_key(Revision::main(self.at), false));
        }
        Sliced { dropped, done }
    }
}
