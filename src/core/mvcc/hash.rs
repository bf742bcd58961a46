//! Hashes that are equal on all members and equal to etcd's (formats-and-peers 3.5, v3-api 3.11).

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::ops::{Bound, ControlFlow};

use engine_api::{EngineError, Table, View};
use rustc_hash::FxHasher;

use super::keyspace::revision_key;
use super::{ReadError, Snapshot};
use crate::core::types::Revision;

/// A hash of the history up to a revision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvHash {
    pub hash: u32,
    /// The logical compaction revision it was computed under; -1 for none.
    pub compact_revision: i64,
    /// The revision that was hashed.
    pub revision: i64,
}

impl Snapshot {
    /// `HashKV` at main revision `at`, 0 meaning the current one. Nothing is as old as a negative
    /// revision: its hash is that of an empty history, and no error, as in etcd.
    ///
    /// # Errors
    /// `Compacted`, `Future`, `Storage`.
    pub fn hash_kv(&self, view: &dyn View, at: i64) -> Result<KvHash, ReadError> {
        if at > 0 {
            self.check_readable(at)?;
        }
        let at = if at == 0 { self.revision } else { at };
        let compacted = self.compact_revision;
        if at < 0 {
            let hash = crc32c::crc32c(Table::Key.name().as_bytes());
            return Ok(KvHash { hash, compact_revision: compacted, revision: at });
        }
        let mut kept: HashSet<Revision, BuildHasherDefault<FxHasher>> = HashSet::default();
        for history in self.index.values() {
            kept.extend(history.kept_for_hash(at));
        }
        if kept.is_empty() {
            // No key is alive at `at`. etcd then hashes all that is stored, so its answer changes when
            // a compaction's deletions reach the disk; this is the one that it comes to in the end.
            for history in self.index.values() {
                kept.extend(history.kept(compacted));
            }
        }
        let mut hash = crc32c::crc32c(Table::Key.name().as_bytes());
        self.changes(view, 0, at, &mut |revision, tombstone, value| {
            let superseded = revision.main <= compacted && !kept.contains(&revision);
            let closing = revision.main == compacted && tombstone;
            if !superseded && !closing {
                hash = crc32c::crc32c_append(hash, &revision_key(revision, tombstone));
                hash = crc32c::crc32c_append(hash, value);
            }
            ControlFlow::Continue(())
        })?;
        Ok(KvHash { hash, compact_revision: compacted, revision: at })
    }
}

/// The hash of everything that an engine holds: per table its name, then keys and values, but for
/// what differs between members (`meta` counters). Not comparable between members.
///
/// # Errors
/// What the view answers.
pub fn hash_all(view: &dyn View) -> Result<u32, EngineError> {
    let mut hash = 0;
    for table in Table::ALL {
        hash = crc32c::crc32c_append(hash, table.name().as_bytes());
        view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            let own = table == Table::Meta
                && matches!(key, b"consistent_index" | b"term" | b"storageVersion");
            if !own {
                hash = crc32c::crc32c_append(hash, key);
                hash = crc32c::crc32c_append(hash, value);
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(hash)
}
