//! Hashes that are equal on all members and equal to etcd's (formats-and-peers 3.5, v3-api 3.11).

use std::ops::{Bound, ControlFlow};

use engine_api::{EngineError, Table, View};

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

/// Which of a key's revisions counts as the one that a compaction leaves of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// What `HashKV` keeps: a tombstone that closes a generation is not kept.
    Alive,
    /// What the deletion itself keeps.
    Physical,
}

/// A hash under way: entries up to `at`, without those that the compaction at `compacted` has
/// superseded. It takes any number of slices, as long as no later compaction deletes anything meanwhile.
#[derive(Debug)]
pub struct KvHasher {
    at: i64,
    compacted: i64,
    /// Ascending: the revisions up to `compacted` that are not superseded.
    kept: Vec<Revision>,
    /// Those of `kept` that are passed.
    passed: usize,
    /// The main revision that the next slice begins with.
    next: i64,
    hash: u32,
}

impl KvHasher {
    fn new(now: &Snapshot, at: i64, compacted: i64, keep: Keep) -> Self {
        let mut any = false;
        let mut kept = Vec::new();
        for history in now.index.values() {
            let revision = match keep {
                Keep::Alive => history.kept_for_hash(at),
                Keep::Physical => history.kept(at),
            };
            any |= revision.is_some();
            kept.extend(revision.filter(|revision| revision.main <= compacted));
        }
        if !any {
            // Nothing is kept at `at`. etcd then hashes all that is stored, so its answer changes when
            // a compaction's deletions reach the disk; this is the one that it comes to in the end.
            let left = now.index.values().filter_map(|history| history.kept(compacted));
            kept.extend(left.filter(|revision| revision.main <= compacted));
        }
        kept.sort_unstable();
        let hash = crc32c::crc32c(Table::Key.name().as_bytes());
        KvHasher { at, compacted, kept, passed: 0, next: 0, hash }
    }

    /// The hash that a compaction at `at` leaves behind, `previous` being the compact revision before
    /// it (-1 for none). Everything that the one before superseded has been dropped from `now`, and
    /// nothing of what this one supersedes: so `now` is newer than the former and older than the latter,
    /// and so are those that the slices are given.
    pub fn of_compaction(now: &Snapshot, at: i64, previous: i64) -> Self {
        KvHasher::new(now, at, previous, Keep::Physical)
    }

    /// Hashes about `entries` more; answers the hash when there are no more.
    ///
    /// # Errors
    /// `Storage`, `Damaged`.
    pub fn slice(
        &mut self,
        now: &Snapshot,
        view: &dyn View,
        entries: usize,
    ) -> Result<Option<KvHash>, ReadError> {
        let (from, at) = (self.next, self.at);
        let (mut seen, mut main) = (0, from);
        let mut stopped = false;
        now.changes(view, from, at, &mut |revision, tombstone, value| {
            // A transaction is not cut in two: a slice begins with a main revision.
            if seen >= entries && revision.main > main {
                self.next = revision.main;
                stopped = true;
                return ControlFlow::Break(());
            }
            seen += 1;
            main = revision.main;
            self.add(revision, tombstone, value);
            ControlFlow::Continue(())
        })?;
        Ok((!stopped).then_some(KvHash {
            hash: self.hash,
            compact_revision: self.compacted,
            revision: self.at,
        }))
    }

    fn add(&mut self, revision: Revision, tombstone: bool, value: &[u8]) {
        if revision.main <= self.compacted {
            while self.kept.get(self.passed).is_some_and(|kept| *kept < revision) {
                self.passed += 1;
            }
            let superseded = self.kept.get(self.passed) != Some(&revision);
            if superseded || (revision.main == self.compacted && tombstone) {
                return;
            }
        }
        self.hash = crc32c::crc32c_append(self.hash, &revision_key(revision, tombstone));
        self.hash = crc32c::crc32c_append(self.hash, value);
    }
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
        let mut hasher = KvHasher::new(self, at, compacted, Keep::Alive);
        let hash = hasher.slice(self, view, usize::MAX)?;
        Ok(hash.expect("a slice without bound is the whole"))
    }
}

/// Compaction hashes remembered at most: as many as etcd's leader compares.
const COMPACTION_HASHES_MAX: usize = 10;

/// The hashes of the newest compactions. A member answers with them for exactly their revision, so
/// that members which compact at different times can still be compared.
#[derive(Clone, Default, Debug)]
pub struct CompactionHashes {
    /// By ascending revision.
    hashes: Vec<KvHash>,
}

impl CompactionHashes {
    /// Remembers a hash, and forgets the oldest beyond ten.
    pub fn record(&mut self, hash: KvHash) {
        let place = self.hashes.partition_point(|known| known.revision < hash.revision);
        self.hashes.insert(place, hash);
        if self.hashes.len() > COMPACTION_HASHES_MAX {
            self.hashes.remove(0);
        }
    }

    /// The hash of the compaction at exactly this revision. A compaction at 0 is none to ask for: 0
    /// stands for the current revision.
    pub fn get(&self, revision: i64) -> Option<KvHash> {
        if revision == 0 {
            return None;
        }
        self.hashes.iter().find(|hash| hash.revision == revision).copied()
    }

    /// All of them, the newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = KvHash> + '_ {
        self.hashes.iter().rev().copied()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ten_newest_hashes_are_remembered() {
        let mut hashes = CompactionHashes::default();
        assert_eq!(hashes.get(1), None);
        let hash = |revision| KvHash { hash: 1, compact_revision: revision - 1, revision };
        // In the order in which they come, whatever that is.
        for revision in [3, 0, 1, 2].into_iter().chain(4..=12) {
            hashes.record(hash(revision));
        }
        let revisions: Vec<i64> = hashes.newest_first().map(|hash| hash.revision).collect();
        assert_eq!(revisions, (3..=12).rev().collect::<Vec<_>>());
        assert_eq!(hashes.get(0), None);
        assert_eq!(hashes.get(3), Some(hash(3)));
        assert_eq!(hashes.get(2), None);
        assert_eq!(hashes.get(13), None);
    }
}
