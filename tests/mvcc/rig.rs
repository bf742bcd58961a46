//! A state machine over an engine that can be committed to, crashed and restored at will.

use std::sync::Arc;

use bytes::Bytes;
use engine_api::{Batch, Durability, Engine};
use engine_memory::Memory;
use quorate::core::apply::{Effects, Fatal, Machine, Outcome};
use quorate::core::auth::access::Caller;
use quorate::core::command::{Command, Request};
use quorate::core::membership::{Membership, Version};
use quorate::core::mvcc::Values;
use quorate::core::mvcc::compact::{Compaction, Scheduled, Sliced};
use quorate::core::mvcc::hash::{KvHash, KvHasher};
use quorate::core::quota::{Quota, Sizes};
use quorate::core::types::{ClusterId, MemberId};
use quorate_proto::raftpb;

pub const SERVER: Version = Version { major: 3, minor: 7, patch: 0 };
pub const TTL_MIN: i64 = 2;

pub fn membership() -> Membership {
    Membership::new(ClusterId(1), MemberId(7), 1)
}

/// A machine without members over an empty engine.
pub fn machine() -> Machine {
    Machine::new(membership(), TTL_MIN, SERVER)
}

/// A log entry that holds a request.
pub fn entry(index: u64, request: Request) -> raftpb::Entry {
    raftpb::Entry {
        term: 1,
        index,
        r#type: raftpb::EntryType::EntryNormal as i32,
        data: Command::new(index, request).encode(),
    }
}

/// A compaction to do.
pub struct Due {
    pub compaction: Compaction,
    /// What is to be hashed first, and how far that is; `None` when it is done, or cannot be.
    hash: Option<(Scheduled, Option<KvHasher>)>,
}

/// One member's state machine, its log and its engine.
pub struct Rig {
    pub machine: Machine,
    pub log: Vec<raftpb::Entry>,
    pub engine: Arc<Memory>,
    /// Everything the engine was given, so that a crash can take the newest of it away.
    batches: Vec<Batch>,
    /// What the committer has been handed and not committed.
    in_flight: Option<Batch>,
    /// Compactions whose superseded revisions are not all dropped, the first one under way.
    pub compactions: Vec<Due>,
    /// What compactions were hashed to before their first slice.
    pub hashes: Vec<KvHash>,
    pub quota: Quota,
}

impl Rig {
    pub fn new() -> Self {
        Rig {
            machine: machine(),
            log: Vec::new(),
            engine: Arc::new(Memory::new()),
            batches: Vec::new(),
            in_flight: None,
            compactions: Vec::new(),
            hashes: Vec::new(),
            quota: Quota::OFF,
        }
    }

    /// Appends a request to the log and applies it.
    pub fn apply(
        &mut self,
        request: Request,
        answered: bool,
    ) -> (Result<Option<Outcome>, Fatal>, Effects) {
        let entry = entry(self.log.len() as u64 + 1, request);
        self.log.push(entry.clone());
        self.apply_entry(&entry, answered)
    }

    /// Appends a request of a user to the log and applies it.
    pub fn apply_as(
        &mut self,
        caller: &Caller,
        request: Request,
        answered: bool,
    ) -> (Result<Option<Outcome>, Fatal>, Effects) {
        let index = self.log.len() as u64 + 1;
        let Caller { username, revision: auth_revision } = caller.clone();
        let data = Command { id: index, username, auth_revision, request }.encode();
        let entry = raftpb::Entry { data, ..entry(index, Request::AuthStatus(<_>::default())) };
        self.log.push(entry.clone());
        self.apply_entry(&entry, answered)
    }

    /// Applies any entry, whether it fits or not.
    pub fn apply_entry(
        &mut self,
        entry: &raftpb::Entry,
        answered: bool,
    ) -> (Result<Option<Outcome>, Fatal>, Effects) {
        let values = Values::new(&*self.engine);
        let mut effects = Effects::default();
        let outcome = self.machine.apply(
            &values,
            entry,
            |_| answered,
            self.quota,
            || Sizes {
                live: self.engine.size_in_use().unwrap(),
                physical: self.engine.size().unwrap(),
            },
            &mut effects,
        );
        self.compactions.extend(
            effects.compactions.iter().map(|made| Due {
                compaction: Compaction::new(made.at),
                hash: Some((*made, None)),
            }),
        );
        (outcome, effects)
    }

    /// Cuts a batch for the committer, unless it has one already.
    pub fn cut(&mut self) {
        if self.in_flight.is_none() {
            let (batch, index) = self.machine.cut();
            assert_eq!(index, self.machine.applied());
            self.in_flight = Some(batch);
        }
    }

    /// Commits what the committer has been handed.
    pub fn commit(&mut self) {
        let Some(batch) = self.in_flight.take() else { return };
        self.engine.commit(&batch, Durability::Buffered).unwrap();
        self.batches.push(batch);
        self.machine.store.committed();
    }

    /// Brings everything into the engine.
    pub fn flush(&mut self) {
        self.commit();
        self.cut();
        self.commit();
    }

    /// Hashes about `entries` more of what the compaction under way covers; answers false if there is
    /// nothing to hash.
    pub fn hash_compaction(&mut self, entries: usize) -> bool {
        let Some(due) = self.compactions.first_mut() else { return false };
        let Some((Scheduled { at, previous }, begun)) = due.hash.take() else { return false };
        let now = self.machine.store.now();
        let mut hasher = begun.unwrap_or_else(|| KvHasher::of_compaction(now, at, previous));
        let view = self.engine.view().unwrap();
        match hasher.slice(now, &*view, entries).unwrap() {
            Some(hash) => self.hashes.push(hash),
            None => due.hash = Some((Scheduled { at, previous }, Some(hasher))),
        }
        true
    }

    /// Does a piece of the compaction under way, once it is hashed.
    pub fn slice(&mut self, keys: usize, limit: usize) -> Option<Sliced> {
        while self.hash_compaction(usize::MAX) {}
        let due = self.compactions.first_mut()?;
        let (store, batch) = self.machine.maintenance();
        let sliced = due.compaction.slice(store, batch, keys, limit);
        if sliced.done {
            self.compactions.remove(0);
        }
        Some(sliced)
    }

    /// Stops the member and starts it again over an engine that has lost the `lost` newest commits.
    pub fn restart(&mut self, lost: usize) {
        self.batches.truncate(self.batches.len().saturating_sub(lost));
        self.in_flight = None;
        if lost > 0 {
            self.engine = Arc::new(Memory::new());
            for batch in &self.batches {
                self.engine.commit(batch, Durability::Buffered).unwrap();
            }
        }
        let view = self.engine.view().unwrap();
        let restored = Machine::restore(&*view, membership(), TTL_MIN, SERVER).unwrap();
        assert_eq!(restored.orphans, 0, "a key outlived its lease");
        drop(view);
        self.machine = restored.machine;
        let unfinished = restored.unfinished.into_iter().map(Compaction::new);
        self.compactions = unfinished.map(|compaction| Due { compaction, hash: None }).collect();
    }

    /// Every row of the engine's `key` table.
    pub fn stored(&self) -> Vec<(Bytes, Bytes)> {
        let mut rows = Vec::new();
        let view = self.engine.view().unwrap();
        let all = std::ops::Bound::Unbounded;
        view.scan(engine_api::Table::Key, all, all, &mut |key, value| {
            rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        rows
    }
}
