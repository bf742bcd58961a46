//! Random histories against the naive twin: writes, leases, compactions in slices, engine commits and
//! crashes at any point between them.
//!
//! `MVCC_SEED=n` repeats one history, `MVCC_HISTORIES=n` runs more of them.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use bytes::Bytes;
use engine_api::Engine;
use quorate::core::apply::Kind;
use quorate::core::check;
use quorate::core::command::Request;
use quorate::core::event::EventKind;
use quorate::core::mvcc::history::event;
use quorate::core::mvcc::keyspace::parse_revision_key;
use quorate::core::mvcc::{ReadError, Snapshot, Values};
use quorate::core::types::{LeaseId, Revision};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::TargetUnion;
use quorate_proto::etcdserverpb::request_op::Request as Op;

use crate::rig::Rig;
use crate::twin::{Refusal, Twin};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A number from `low..=high`.
    pub fn within(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as u64) as i64
    }
}

const KEYS: [&[u8]; 9] = [b"\0", b"a", b"aa", b"ab", b"b", b"b\0", b"c", b"\xff", b"\xff\xff"];
const ENDS: [&[u8]; 8] = [b"", b"", b"", b"\0", b"b", b"c", b"\xff", b"a"];
const VALUES: [&[u8]; 6] =
    [b"", b"1", b"2", b"22", b"\xff", b"a longer value, so that lengths differ"];
const LEASES: [i64; 5] = [1, 2, 3, -4, i64::MAX];

/// Draws requests that suit a twin's present state.
struct Maker<'a> {
    rng: &'a mut Rng,
    revision: i64,
    compacted: i64,
}

impl Maker<'_> {
    fn bytes(&mut self, of: &[&'static [u8]]) -> Bytes {
        Bytes::from_static(self.rng.pick(of))
    }

    /// Mostly readable, at times too old, too new or none.
    fn at(&mut self) -> i64 {
        match self.rng.below(8) {
            0 => self.rng.within(-2, self.revision + 2),
            1..4 => 0,
            _ => self.rng.within(self.compacted.max(0), self.revision),
        }
    }

    fn range(&mut self) -> pb::RangeRequest {
        let rng = &mut *self.rng;
        let bound = |rng: &mut Rng, revision| {
            if rng.one_in(6) { rng.within(-1, revision + 1) } else { 0 }
        };
        pb::RangeRequest {
            limit: if rng.one_in(2) { rng.within(-1, 5) } else { 0 },
            sort_order: rng.pick(&[0, 0, 1, 2]),
            sort_target: rng.pick(&[0, 0, 1, 2, 3, 4]),
            keys_only: rng.one_in(4),
            count_only: rng.one_in(8),
            min_mod_revision: bound(rng, self.revision),
            max_mod_revision: bound(rng, self.revision),
            min_create_revision: bound(rng, self.revision),
            max_create_revision: bound(rng, self.revision),
            serializable: false,
            key: self.bytes(&KEYS),
            range_end: self.bytes(&ENDS),
            revision: self.at(),
        }
    }

    fn put(&mut self) -> pb::PutRequest {
        let ignore_value = self.rng.one_in(8);
        let ignore_lease = self.rng.one_in(8);
        pb::PutRequest {
            key: self.bytes(&KEYS),
            value: if ignore_value { Bytes::new() } else { self.bytes(&VALUES) },
            lease: if ignore_lease || self.rng.below(3) > 0 { 0 } else { self.rng.pick(&LEASES) },
            prev_kv: self.rng.one_in(3),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete(&mut self) -> pb::DeleteRangeRequest {
        pb::DeleteRangeRequest {
            key: self.bytes(&KEYS),
            range_end: self.bytes(&ENDS),
            prev_kv: self.rng.one_in(3),
        }
    }

    fn compare(&mut self) -> pb::Compare {
        let number = self.rng.within(0, self.revision);
        let number = if self.rng.one_in(2) { self.rng.within(0, 3) } else { number };
        let target = self.rng.pick(&[0, 1, 2, 3, 4, 4, 9]);
        // Now and then the wrong member, or none.
        let union = if self.rng.one_in(6) { self.rng.pick(&[0, 1, 2, 3, 4, 5]) } else { target };
        pb::Compare {
            result: self.rng.pick(&[0, 0, 1, 2, 3, 7]),
            target,
            key: self.bytes(&KEYS),
            range_end: if self.rng.one_in(3) { self.bytes(&ENDS) } else { Bytes::new() },
            target_union: match union {
                0 => Some(TargetUnion::Version(number)),
                1 => Some(TargetUnion::CreateRevision(number)),
                2 => Some(TargetUnion::ModRevision(number)),
                3 => Some(TargetUnion::Value(self.bytes(&VALUES))),
                4 => Some(TargetUnion::Lease(self.rng.pick(&[0, 1, 2, -4]))),
                _ => None,
            },
        }
    }

    fn ops(&mut self, depth: u32) -> Vec<pb::RequestOp> {
        (0..self.rng.below(5))
            .map(|_| {
                let request = match self.rng.below(if depth > 0 { 8 } else { 7 }) {
                    0..2 => Op::RequestRange(self.range()),
                    2..5 => Op::RequestPut(self.put()),
                    5..7 => Op::RequestDeleteRange(self.delete()),
                    _ => Op::RequestTxn(self.txn(depth - 1)),
                };
                pb::RequestOp { request: Some(request) }
            })
            .collect()
    }

    fn txn(&mut self, depth: u32) -> pb::TxnRequest {
        pb::TxnRequest {
            compare: (0..self.rng.pick(&[0, 0, 1, 1, 2])).map(|_| self.compare()).collect(),
            success: self.ops(depth),
            failure: self.ops(depth),
        }
    }

    /// A transaction that passes the checks at the door.
    fn checked_txn(&mut self) -> pb::TxnRequest {
        loop {
            let txn = self.txn(2);
            if check::txn(&txn, 128).is_ok() {
                return txn;
            }
        }
    }

    fn request(&mut self) -> Request {
        match self.rng.below(20) {
            0..7 => Request::Put(self.put()),
            7..9 => Request::DeleteRange(self.delete()),
            9..15 => Request::Txn(self.checked_txn()),
            15 => Request::Compaction(pb::CompactionRequest {
                revision: if self.rng.one_in(4) {
                    self.rng.within(-1, self.revision + 1)
                } else {
                    self.rng.within(self.compacted.max(0), self.revision)
                },
                physical: false,
            }),
            16..18 => Request::LeaseGrant(pb::LeaseGrantRequest {
                id: self.rng.pick(&LEASES),
                ttl: self.rng.pick(&[-1, 1, 60, 9_000_000_001]),
            }),
            18 => Request::LeaseRevoke(pb::LeaseRevokeRequest { id: self.rng.pick(&LEASES) }),
            _ => Request::Range(self.range()),
        }
    }
}

/// A snapshot that some slow reader holds.
struct Held {
    snapshot: Snapshot,
    compacted: i64,
}

struct Run {
    rng: Rng,
    rig: Rig,
    twin: Twin,
    /// The twin's revision after each log entry.
    revisions: Vec<i64>,
    held: Vec<Held>,
    /// Reads that found their value compacted away, and crashes: how much the history has met.
    superseded: i64,
    restarts: i64,
}

impl Run {
    fn new(seed: u64) -> Self {
        Run {
            rng: Rng(seed),
            rig: Rig::new(),
            twin: Twin::new(),
            revisions: vec![1],
            held: Vec::new(),
            superseded: 0,
            restarts: 0,
        }
    }

    fn write(&mut self) {
        let (revision, compacted) = (self.twin.revision(), self.twin.compacted);
        let request = Maker { rng: &mut self.rng, revision, compacted }.request();
        let before = self.twin.changes.len();
        let (expected, changed) = self.twin.apply(&request);
        let (outcome, effects) = self.rig.apply(request.clone(), true);
        let outcome = outcome.unwrap().expect("a new entry is applied");
        assert_eq!(outcome.kind, Kind::Request(request.name()));
        let expected_failed = expected.is_err();
        assert_eq!(outcome.result.map_err(|e| Refusal::of(&e)), expected, "{request:?}");
        self.revisions.push(self.twin.revision());
        let changes = &self.twin.changes[before..];
        assert_eq!(changes.len(), if expected_failed { 0 } else { changed });
        let told: Vec<_> = effects.events.iter().map(|e| (e.revision, e.key.clone())).collect();
        let made: Vec<_> = changes.iter().map(|c| (c.revision, c.key.clone())).collect();
        assert_eq!(told, made, "{request:?}");
        for (told, made) in effects.events.iter().zip(changes) {
            let same = event(made.revision, made.tombstone, &made.stored).unwrap();
            assert_eq!(*told, same, "live and replayed events differ");
        }
    }

    /// Crashes, loses what was not committed and up to `lost` commits, and replays the log. The
    /// interrupted compactions go on meanwhile.
    fn restart(&mut self) {
        let lost = if self.rng.one_in(2) { self.rng.below(4) as usize } else { 0 };
        self.restarts += 1;
        self.rig.restart(lost);
        self.held.clear();
        let applied = self.rig.machine.applied().0;
        let at = self.revisions[applied as usize];
        assert_eq!(self.rig.machine.store.now().revision(), at, "restored at entry {applied}");
        let log = self.rig.log.clone();
        // A raft log hands out some of what the engine holds already.
        for entry in &log[(applied as usize).saturating_sub(3)..] {
            let (outcome, effects) = self.rig.apply_entry(entry, self.rng.one_in(2));
            let skipped = outcome.unwrap().is_none();
            assert_eq!(skipped, entry.index <= applied);
            assert!(!skipped || effects.events.is_empty());
            if !skipped {
                let now = self.rig.machine.store.now().revision();
                assert_eq!(now, self.revisions[entry.index as usize], "entry {}", entry.index);
            }
            if self.rng.one_in(6) {
                self.rig.slice(2, 3);
            }
            if self.rng.one_in(6) {
                self.rig.flush();
            }
        }
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..70 => self.write(),
            70..78 => {
                let (keys, limit) = (self.rng.within(1, 4), self.rng.within(1, 4));
                if self.rng.one_in(2) && self.rig.hash_compaction(limit as usize) {
                    return;
                }
                self.rig.slice(keys as usize, limit as usize);
            }
            78..86 => self.rig.cut(),
            86..94 => self.rig.commit(),
            94..97 => {
                let snapshot = self.rig.machine.store.now().clone();
                self.held.push(Held { snapshot, compacted: self.twin.compacted });
                if self.held.len() > 4 {
                    self.held.remove(0);
                }
            }
            _ => self.restart(),
        }
        self.compare();
    }

    fn compare(&mut self) {
        let now = self.rig.machine.store.now().clone();
        let twin = &self.twin;
        assert_eq!(now.revision(), twin.revision());
        assert_eq!(now.compact_revision(), twin.compacted);
        assert_eq!(now.live_keys(), twin.now().len());

        let leases = &self.rig.machine.leases;
        assert_eq!(leases.iter().map(|(id, _)| id.0).collect::<BTreeSet<_>>(), twin.leases);
        for id in LEASES {
            let keys: Vec<Bytes> = leases.keys(LeaseId(id)).cloned().collect();
            assert_eq!(keys, twin.attached(id), "keys of lease {id}");
        }
        for key in KEYS {
            let lease = twin.now().get(key).map(|kv| kv.lease).filter(|lease| *lease != 0);
            assert_eq!(leases.lease_of(key).map(|id| id.0), lease);
        }

        let values = Values::new(&*self.rig.engine);
        for _ in 0..3 {
            let (revision, compacted) = (twin.revision(), twin.compacted);
            let request = Maker { rng: &mut self.rng, revision, compacted }.range();
            let expected = twin.range(&request).map(|r| (r.kvs, r.more, r.count));
            if let (Ok(page), Ok((kvs, more, count))) = (now.page(&values, &request), &expected) {
                assert_eq!((&page.kvs, page.more), (kvs, *more), "{request:?}");
                assert!(page.more || page.count == *count, "{request:?}: {page:?}");
            }
            match (now.range(&values, &request), expected) {
                (Ok(ranged), expected) => {
                    assert_eq!(Ok((ranged.kvs, ranged.more, ranged.count)), expected, "{request:?}")
                }
                (Err(ReadError::Compacted { .. }), Err(Refusal::Compacted))
                | (Err(ReadError::Future { .. }), Err(Refusal::Future)) => {}
                (got, expected) => panic!("{request:?}: {got:?} instead of {expected:?}"),
            }
        }
        drop(values);
        self.compare_held();
        let from = self.rng.within(self.twin.compacted.max(0), now.revision());
        let to = self.rng.within(from, now.revision());
        self.compare_history(&now, from, to);
        if self.rng.one_in(4) {
            self.compare_hash(&now);
        }
    }

    /// A reader that holds an old snapshot sees what was there then, or learns that it is gone.
    fn compare_held(&mut self) {
        let newest = self.twin.compacted;
        for held in &self.held {
            let revision = held.snapshot.revision();
            let at = self.rng.within(held.compacted.max(0), revision);
            let request = pb::RangeRequest {
                key: Bytes::from_static(b"\0"),
                range_end: Bytes::from_static(b"\0"),
                revision: at,
                ..Default::default()
            };
            match held.snapshot.range(&Values::new(&*self.rig.engine), &request) {
                Ok(ranged) => {
                    let at = if at == 0 { revision } else { at };
                    let expected = crate::twin::range(self.twin.state(at), &request);
                    assert_eq!((ranged.kvs, ranged.more, ranged.count), expected);
                }
                Err(ReadError::Superseded(_)) => {
                    self.superseded += 1;
                    assert!(newest > held.compacted, "values vanished without a compaction");
                    let at = if at == 0 { revision } else { at };
                    assert!(at < newest, "revision {at} is readable after compaction {newest}");
                }
                Err(error) => panic!("revision {at} of {revision}: {error}"),
            }
        }
    }

    /// The history that a watcher replays. What one transaction superseded in itself may be gone at
    /// the compact revision.
    fn compare_history(&self, now: &Snapshot, from: i64, to: i64) {
        let view = self.rig.engine.view().unwrap();
        let mut seen = Vec::new();
        now.changes(&*view, from, to, &mut |revision, tombstone, stored| {
            let event = event(revision, tombstone, stored).unwrap();
            assert_eq!(event.kind == EventKind::Delete, tombstone);
            seen.push((revision, tombstone, Bytes::copy_from_slice(stored)));
            ControlFlow::Continue(())
        })
        .unwrap();
        let compacted = self.twin.compacted;
        let kept: BTreeSet<Revision> =
            self.twin.kept(compacted).into_iter().map(|(revision, _)| revision).collect();
        let mut seen = seen.into_iter().peekable();
        for change in &self.twin.changes {
            let main = change.revision.main;
            if main < from || main > to {
                continue;
            }
            let expected = (change.revision, change.tombstone, change.stored.clone());
            if seen.peek() == Some(&expected) {
                seen.next();
            } else {
                let gone = main == compacted && !kept.contains(&change.revision);
                assert!(gone, "{from}..={to}: {change:?} is missing at {:?}", seen.peek());
            }
        }
        assert_eq!(seen.next(), None, "{from}..={to}");
    }

    fn compare_hash(&mut self, now: &Snapshot) {
        let view = self.rig.engine.view().unwrap();
        let at = self.rng.within(self.twin.compacted.max(1), now.revision());
        let hash = now.hash_kv(&*view, at).unwrap();
        assert_eq!((hash.revision, hash.compact_revision), (at, self.twin.compacted));
        assert_eq!(hash.hash, self.twin.hash(at, self.twin.compacted), "hash at {at}");
    }

    /// Lets everything under way come to its end: the engine then holds exactly what survives.
    fn settle(&mut self) {
        for _ in 0..2 {
            while self.rig.slice(3, 5).is_some() {
                if self.rng.one_in(3) {
                    self.rig.flush();
                }
            }
            self.rig.flush();
            self.compare();
            let stored: Vec<_> = self
                .rig
                .stored()
                .into_iter()
                .map(|(key, value)| (parse_revision_key(&key).unwrap(), value))
                .collect();
            let mut surviving: Vec<_> = self
                .twin
                .surviving(self.twin.compacted)
                .into_iter()
                .map(|c| ((c.revision, c.tombstone), c.stored.clone()))
                .collect();
            // Where a transaction deletes and puts a key at the compact revision, the put starts a
            // generation of its own, which the rule of the reference does not look into.
            let compacted = self.twin.compacted;
            let extra: Vec<_> =
                stored.iter().filter(|row| !surviving.contains(row)).cloned().collect();
            for ((revision, _), _) in &extra {
                assert_eq!(revision.main, compacted, "superseded, but stored: {revision}");
            }
            surviving.extend(extra);
            surviving.sort_by_key(|((revision, _), _)| *revision);
            assert_eq!(stored, surviving);
            self.rig.restart(0);
            assert!(self.rig.compactions.is_empty(), "nothing is left to resume");
        }
        for hash in &self.rig.hashes {
            let (at, previous) = (hash.revision, hash.compact_revision);
            let expected = self.twin.compaction_hash(at, previous);
            assert_eq!(hash.hash, expected, "compaction at {at} after one at {previous}");
        }
    }
}

#[test]
fn random_histories_match_the_twin() {
    let setting = |name: &str| -> Option<u64> {
        std::env::var(name).ok().map(|text| text.parse().expect("a number"))
    };
    let (first, count) = match setting("MVCC_SEED") {
        Some(seed) => (seed, 1),
        None => (1, setting("MVCC_HISTORIES").unwrap_or(40)),
    };
    let mut sums = [0; 5];
    for seed in first..first + count {
        let result = std::panic::catch_unwind(|| {
            let mut run = Run::new(seed);
            for _ in 0..250 {
                run.step();
            }
            run.settle();
            let hashes = run.rig.hashes.len() as i64;
            [run.twin.revision(), run.twin.compacted.max(0), run.superseded, run.restarts, hashes]
        });
        match result {
            Ok(of_one) => {
                for (sum, one) in sums.iter_mut().zip(of_one) {
                    *sum += one;
                }
            }
            Err(panic) => {
                let rerun = "cargo test -p quorate --test mvcc random_histories";
                eprintln!("to repeat it: MVCC_SEED={seed} {rerun}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    // What the histories are meant to meet, they have met.
    if count >= 20 {
        let [revisions, compacted, superseded, restarts, hashes] = sums;
        let each = |sum: i64, least: i64| assert!(sum >= least * count as i64, "{sums:?}");
        each(revisions, 60);
        each(compacted, 40);
        each(restarts, 4);
        each(hashes, 4);
        assert!(superseded > 0, "no held snapshot ever lost a value");
    }
}
