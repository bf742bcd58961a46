//! The tail of the raft log in memory, where the raft crate reads it.
//!
//! It holds everything that was handed to the disk, persisted or not, down to where [`Log::compact`] cut it. Its
//! bound is the caller's: it knows [`Log::len`] and [`Log::bytes`], and what is applied. An entry's data is
//! the `Bytes` that was proposed or received, shared and never copied.
//!
//! ```text
//! front (index, term)   first .......................... last
//! the entry before      the entries held, without a gap
//! ```

use std::cell::Cell;
use std::collections::VecDeque;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, StorageError};

/// What an entry occupies beside its data: the struct itself.
const ENTRY_BYTES: usize = size_of::<Entry>();

pub(super) struct Log {
    initial: RaftState,
    /// Index and term of the entry before the first one held.
    front: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    /// What a snapshot message says: index, term and members, no data. Index 0: there is none.
    offer: Snapshot,
    /// A member that needs a snapshot newer than `offer`. A cell, because the crate asks through `&self`.
    wanted: Cell<Option<u64>>,
}

impl Log {
    /// A log that continues after `front`; `entries` follow it without a gap.
    pub(super) fn new(
        hard_state: HardState,
        conf_state: ConfState,
        front: (u64, u64),
        entries: Vec<Entry>,
    ) -> Log {
        let mut log = Log {
            initial: RaftState::new(hard_state, conf_state),
            front,
            entries: VecDeque::new(),
            bytes: 0,
            offer: Snapshot::default(),
            wanted: Cell::new(None),
        };
        log.append(entries);
        log
    }

    pub(super) fn first(&self) -> u64 {
        self.front.0 + 1
    }

    pub(super) fn last(&self) -> u64 {
        self.front.0 + self.entries.len() as u64
    }

    /// Entries held.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Memory that the entries held occupy, approximately.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The term of the entry at `index`; `None` outside `[first - 1, last]`.
    pub(super) fn term_at(&self, index: u64) -> Option<u64> {
        if index == self.front.0 {
            return Some(self.front.1);
        }
        let at = usize::try_from(index.checked_sub(self.first())?).ok()?;
        self.entries.get(at).map(|entry| entry.term)
    }

    /// Appends `entries`, which replace all that is held from their first index on.
    ///
    /// # Panics
    /// If they would leave a gap or reach below the first entry held: raft never asks for that.
    pub(super) fn append(&mut self, entries: Vec<Entry>) {
        let Some(from) = entries.first().map(|entry| entry.index) else { return };
        assert!(
            from >= self.first() && from <= self.last() + 1,
            "entries from {from} do not follow a log of [{}, {}]",
            self.first(),
            self.last(),
        );
        while self.last() >= from {
            let cut = self.entries.pop_back().expect("last >= first, so an entry is held");
            self.bytes -= size(&cut);
        }
        self.bytes += entries.iter().map(size).sum::<usize>();
        self.entries.extend(entries);
    }

    /// Forgets entries up to and including `to`, which must be held or gone already.
    pub(super) fn compact(&mut self, to: u64) {
        assert!(to <= self.last(), "compaction to {to} beyond the last entry {}", self.last());
        while self.front.0 < to {
            let entry = self.entries.pop_front().expect("to <= last, so an entry is held");
            self.bytes -= size(&entry);
            self.front = (entry.index, entry.term);
        }
        // A burst leaves a large ring behind: give it back once most of it is empty.
        if self.entries.capacity() > 1024 && self.entries.len() < self.entries.capacity() / 4 {
            self.entries.shrink_to(self.entries.len() * 2);
        }
    }

    /// Up to which entry the log has to be compacted for the rest to occupy at most `bytes`.
    pub(super) fn within(&self, bytes: usize) -> u64 {
        let mut left = self.bytes;
        let surplus = self.entries.iter().take_while(|entry| {
            let over = left > bytes;
            left -= size(entry);
            over
        });
        self.front.0 + surplus.count() as u64
    }

    /// Replaces the whole log by a snapshot received, which is also what this member offers from now on.
    pub(super) fn install(&mut self, snapshot: &Snapshot) {
        self.front = (snapshot.get_metadata().index, snapshot.get_metadata().term);
        self.entries = VecDeque::new();
        self.bytes = 0;
        self.offer(self.front.0, self.front.1, snapshot.get_metadata().get_conf_state().clone());
    }

    /// Sets what a snapshot message says.
    pub(super) fn offer(&mut self, index: u64, term: u64, conf_state: ConfState) {
        let metadata = self.offer.mut_metadata();
        metadata.index = index;
        metadata.term = term;
        metadata.set_conf_state(conf_state);
        self.wanted.set(None);
    }

    /// Index of the snapshot offered; 0: none.
    pub(super) fn offered(&self) -> u64 {
        self.offer.get_metadata().index
    }

    pub(super) fn wanted(&self) -> Option<u64> {
        self.wanted.get()
    }

    pub(super) fn take_wanted(&mut self) -> Option<u64> {
        self.wanted.take()
    }
}

fn size(entry: &Entry) -> usize {
    ENTRY_BYTES + entry.data.len() + entry.context.len()
}

/// What the entry takes in a message: its data plus tags, type, term, index and length.
fn wire_size(entry: &Entry) -> u64 {
    (entry.data.len() + entry.context.len() + 24) as u64
}

impl raft::Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.initial.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 || low > high {
            return Err(StorageError::Unavailable.into());
        }
        let at = |index: u64| (index - self.first()) as usize;
        let range = self.entries.range(at(low)..at(high));
        match max_size.into() {
            None | Some(raft::NO_LIMIT) => Ok(range.cloned().collect()),
            Some(limit) => {
                let mut total = 0u64;
                let fits = |entry: &&Entry| {
                    let first = total == 0;
                    total = total.saturating_add(wire_size(entry));
                    first || total <= limit
                };
                Ok(range.take_while(fits).cloned().collect())
            }
        }
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.term_at(index) {
            Some(term) => Ok(term),
            None if index < self.front.0 => Err(StorageError::Compacted.into()),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// A snapshot that ends before the log begins would leave its receiver a gap, and one of a cluster without the receiver
    /// is not taken: better none, and ask for another.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let index = self.offered();
        let members = self.offer.get_metadata().get_conf_state();
        let member = members.voters.contains(&to) || members.learners.contains(&to);
        if index == 0 || index < self.front.0 || index < request_index || !member {
            self.wanted.set(Some(to));
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(self.offer.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::Storage;

    fn entry(index: u64, term: u64, data: &'static [u8]) -> Entry {
        Entry { index, term, data: bytes::Bytes::from_static(data), ..Default::default() }
    }

    fn log() -> Log {
        let entries = vec![entry(6, 2, b"aaaa"), entry(7, 2, b"bbbb"), entry(8, 3, b"cccc")];
        Log::new(HardState::default(), ConfState::default(), (5, 1), entries)
    }

    fn indexes(log: &Log, low: u64, high: u64, limit: Option<u64>) -> raft::Result<Vec<u64>> {
        let entries = log.entries(low, high, limit, GetEntriesContext::empty(false))?;
        Ok(entries.iter().map(|entry| entry.index).collect())
    }

    #[test]
    fn knows_terms_from_the_entry_before_the_first() {
        let log = log();
        assert_eq!((log.first(), log.last()), (6, 8));
        let terms: Vec<_> = (4..=9).map(|index| log.term_at(index)).collect();
        assert_eq!(terms, [None, Some(1), Some(2), Some(2), Some(3), None]);
        assert_eq!(log.term(4), Err(StorageError::Compacted.into()));
        assert_eq!(log.term(9), Err(StorageError::Unavailable.into()));
    }

    #[test]
    fn reads_ranges_within_a_byte_limit_but_at_least_one() {
        let log = log();
        assert_eq!(indexes(&log, 6, 9, None), Ok(vec![6, 7, 8]));
        assert_eq!(indexes(&log, 6, 9, Some(raft::NO_LIMIT)), Ok(vec![6, 7, 8]));
        assert_eq!(indexes(&log, 6, 9, Some(0)), Ok(vec![6]));
        assert_eq!(indexes(&log, 6, 9, Some(56)), Ok(vec![6, 7]));
        assert_eq!(indexes(&log, 7, 7, None), Ok(vec![]));
        assert_eq!(indexes(&log, 5, 7, None), Err(StorageError::Compacted.into()));
        assert_eq!(indexes(&log, 8, 10, None), Err(StorageError::Unavailable.into()));
    }

    #[test]
    fn an_append_replaces_the_tail_from_its_first_index() {
        let mut log = log();
        let before = log.bytes();
        log.append(vec![entry(7, 4, b"dd")]);
        assert_eq!((log.last(), log.term_at(7)), (7, Some(4)));
        assert_eq!(before - log.bytes(), ENTRY_BYTES + 6);
        log.append(vec![entry(8, 4, b"")]);
        assert_eq!(log.len(), 3);
    }

    #[test]
    #[should_panic(expected = "do not follow")]
    fn an_append_never_leaves_a_gap() {
        log().append(vec![entry(10, 4, b"")]);
    }

    #[test]
    fn compaction_keeps_the_term_before_and_frees_the_bytes() {
        let mut log = log();
        let two = 2 * (ENTRY_BYTES + 4);
        assert_eq!([3 * two, two, two - 1, 0].map(|bytes| log.within(bytes)), [5, 6, 7, 8]);
        log.compact(7);
        assert_eq!((log.first(), log.last(), log.term_at(7)), (8, 8, Some(2)));
        log.compact(3);
        assert_eq!((log.first(), log.within(log.bytes()), log.within(0)), (8, 7, 8));
        log.compact(8);
        assert_eq!((log.len(), log.bytes(), log.last()), (0, 0, 8));
    }

    #[test]
    fn offers_only_a_snapshot_that_reaches_the_log() {
        let mut log = log();
        let unavailable = raft::Error::from(StorageError::SnapshotTemporarilyUnavailable);
        assert_eq!(log.snapshot(0, 2), Err(unavailable));
        assert_eq!(log.wanted(), Some(2));
        log.offer(6, 2, ConfState { voters: vec![1, 2], ..Default::default() });
        assert_eq!(log.wanted(), None);
        assert_eq!(log.snapshot(0, 2).map(|s| s.get_metadata().index), Ok(6));
        assert!(log.snapshot(0, 4).is_err(), "not a member");
        assert_eq!(log.take_wanted(), Some(4));
        log.compact(7);
        assert!(log.snapshot(0, 3).is_err());
        assert_eq!(log.take_wanted(), Some(3));
    }

    #[test]
    fn an_installed_snapshot_is_the_new_beginning() {
        let mut log = log();
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = 20;
        snapshot.mut_metadata().term = 5;
        snapshot.mut_metadata().mut_conf_state().learners = vec![2];
        log.install(&snapshot);
        assert_eq!((log.first(), log.last(), log.term_at(20)), (21, 20, Some(5)));
        assert_eq!(log.snapshot(0, 2).map(|s| s.get_metadata().index), Ok(20));
    }
}
