//! Readers that race with writes, engine commits and compactions: what they are told is right, or
//! that it is compacted, and never anything else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

use bytes::Bytes;
use engine_api::{Batch, Durability, Engine};
use quorate::actors::shared::{Published, Shared, SharedHistory};
use quorate::core::apply::Effects;
use quorate::core::command::Request;
use quorate::core::event::{History, HistoryError};
use quorate::core::mvcc::compact::Compaction;
use quorate::core::mvcc::history::event;
use quorate::core::mvcc::{ReadError, Values};
use quorate::core::quota::{Quota, Sizes};
use quorate::core::types::{ClusterId, MemberId, Revision};
use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb as pb;

use crate::model::Rng;
use crate::rig::{entry, machine};
use crate::twin::{self, Twin};

const READERS: usize = 3;

fn key(n: u64) -> Bytes {
    format!("key-{n:02}").into()
}

/// Puts, deletes of ranges and transactions over a few keys, no two alike.
fn requests(rng: &mut Rng, count: usize) -> Vec<Request> {
    let put = |rng: &mut Rng, n: usize| pb::PutRequest {
        key: key(rng.below(24)),
        value: format!("value {n}").into(),
        ..Default::default()
    };
    (0..count)
        .map(|n| match rng.below(10) {
            0 => {
                let from = rng.below(24);
                Request::DeleteRange(pb::DeleteRangeRequest {
                    key: key(from),
                    range_end: key(from + 3),
                    prev_kv: true,
                })
            }
            1 => {
                let puts = (0..3).map(|part| {
                    let put = pb::PutRequest { key: key(part * 8 + rng.below(8)), ..put(rng, n) };
                    pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put)) }
                });
                Request::Txn(pb::TxnRequest { success: puts.collect(), ..Default::default() })
            }
            _ => Request::Put(put(rng, n)),
        })
        .collect()
}

/// Applies everything, as the applier does, beside a thread that commits.
fn write(shared: &Shared, requests: &[Request], rng: &mut Rng) {
    let mut machine = machine();
    let engine = &*shared.published.load_full().engine.clone();
    let publish = |machine: &_| {
        let previous = shared.published.load_full();
        let engine = previous.engine.clone();
        let published = Published::of(machine, engine, Some((&*previous, &Effects::default())));
        shared.published.store(Arc::new(published));
    };
    let (batches, to_commit) = mpsc::sync_channel::<Batch>(1);
    let (committed, done) = mpsc::channel();
    std::thread::scope(|threads| {
        threads.spawn(move || {
            for batch in to_commit {
                engine.commit(&batch, Durability::Buffered).unwrap();
                committed.send(()).unwrap();
            }
        });
        let mut committing = false;
        let mut compactions: Vec<Compaction> = Vec::new();
        let mut index = 0;
        let mut requests = requests.iter();
        loop {
            let group: Vec<_> = requests.by_ref().take(1 + rng.below(4) as usize).collect();
            let last = group.is_empty();
            let now = machine.store.now().revision();
            let compact = rng.one_in(12).then(|| {
                let low = machine.store.now().compact_revision().max(0) + 1;
                let at = rng.within(low.min(now), now);
                Request::Compaction(pb::CompactionRequest { revision: at, physical: false })
            });
            let mut effects = Effects::default();
            let values = Values::new(engine);
            for request in group.into_iter().chain(&compact) {
                index += 1;
                let entry = entry(index, request.clone());
                let quota = Quota::OFF;
                machine
                    .apply(&values, &entry, |_| true, quota, Sizes::default, &mut effects)
                    .unwrap();
            }
            drop(values);
            publish(&machine);
            compactions.extend(effects.compactions.iter().map(|made| Compaction::new(made.at)));

            if let Some(compaction) = compactions.first_mut() {
                let (store, batch) = machine.maintenance();
                if compaction.slice(store, batch, 6, 10).done {
                    compactions.remove(0);
                }
                publish(&machine);
            }
            if committing && done.try_recv().is_ok() {
                committing = false;
                machine.store.committed();
                publish(&machine);
            }
            if !committing && rng.one_in(3) {
                committing = true;
                batches.send(machine.cut().0).unwrap();
            }
            if last && compactions.is_empty() {
                break;
            }
        }
        if committing {
            done.recv().unwrap();
            machine.store.committed();
        }
        batches.send(machine.cut().0).unwrap();
        done.recv().unwrap();
        machine.store.committed();
        publish(&machine);
        drop(batches);
    });
}

/// What the readers of one race met.
#[derive(Default)]
struct Met {
    reads: AtomicU64,
    compacted: AtomicU64,
    hashes: AtomicU64,
}

struct Reader<'a> {
    shared: &'a Shared,
    twin: &'a Twin,
    met: &'a Met,
    /// Hashes seen, by revision and compact revision: checked at the end.
    hashes: BTreeMap<(i64, i64), u32>,
}

impl Reader<'_> {
    fn range(&self, rng: &mut Rng) {
        let newest = self.shared.published.load().store.revision();
        let back = rng.within(0, 12).min(newest - 1);
        let request = pb::RangeRequest {
            key: key(rng.below(24)),
            range_end: if rng.one_in(2) { Bytes::from_static(b"\0") } else { Bytes::new() },
            revision: if back == 0 { 0 } else { newest - back },
            ..Default::default()
        };
        let mut seen = 0;
        let result = self.shared.read(|now, values| {
            seen = now.store.revision();
            now.store.range(values, &request)
        });
        self.met.reads.fetch_add(1, Ordering::Relaxed);
        match result {
            Ok(ranged) => {
                let at = if request.revision == 0 { seen } else { request.revision };
                let expected = twin::range(self.twin.state(at), &request);
                assert_eq!((ranged.kvs, ranged.more, ranged.count), expected, "at {at}");
            }
            Err(ReadError::Compacted { asked, compacted }) => {
                self.met.compacted.fetch_add(1, Ordering::Relaxed);
                assert_eq!(asked, request.revision, "the newest revision is never compacted");
                assert!(compacted > asked);
            }
            Err(error) => panic!("{request:?}: {error}"),
        }
    }

    fn history(&self, rng: &mut Rng) {
        let history = SharedHistory::new(self.shared);
        let to = history.revision();
        let from = (to - rng.within(0, 20)).max(1);
        let mut seen = Vec::new();
        let result = history.changes(from, to, &mut |event| {
            seen.push(event);
            true
        });
        match result {
            Ok(()) => {
                let expected = self.twin.changes.iter().filter(|change| {
                    let main = change.revision.main;
                    from <= main && main <= to
                });
                let expected: Vec<_> =
                    expected.map(|c| event(c.revision, c.tombstone, &c.stored).unwrap()).collect();
                assert_eq!(seen, expected, "{from}..={to}");
            }
            Err(HistoryError::Compacted { asked, compacted }) => {
                assert!(asked == from && compacted > from);
            }
            Err(error) => panic!("{from}..={to}: {error}"),
        }
    }

    fn value_at(&self, rng: &mut Rng) {
        let history = SharedHistory::new(self.shared);
        let at = (history.revision() - rng.within(0, 12)).max(1);
        let key = key(rng.below(24));
        let value = history.value_at(&key, at).unwrap();
        let expected = self.twin.state(at).get(&key).map(KeyValueBytes::from);
        if value != expected {
            let compacted = self.shared.published.load().store.compact_revision();
            assert!(value.is_none() && at < compacted, "{key:?} at {at}: {value:?}");
        }
    }

    fn hash(&mut self, rng: &mut Rng) {
        let newest = self.shared.published.load().store.revision();
        let at = (newest - rng.within(0, 12)).max(1);
        match self.shared.hash_kv(at) {
            Ok((hash, _, _)) => {
                self.met.hashes.fetch_add(1, Ordering::Relaxed);
                assert_eq!(hash.revision, at);
                let first = self.hashes.insert((at, hash.compact_revision), hash.hash);
                assert!(first.is_none_or(|first| first == hash.hash), "hash at {at} changed");
            }
            Err(ReadError::Compacted { compacted, .. }) => assert!(compacted > at),
            Err(error) => panic!("hash at {at}: {error}"),
        }
    }

    fn run(&mut self, mut rng: Rng, stop: &AtomicBool) {
        // At least some reads of the final state, too.
        let mut rest = 50;
        while rest > 0 {
            if stop.load(Ordering::Acquire) {
                rest -= 1;
            }
            match rng.below(8) {
                0 => self.history(&mut rng),
                1 => self.value_at(&mut rng),
                2 if rng.one_in(2) => self.hash(&mut rng),
                _ => self.range(&mut rng),
            }
        }
        for ((at, compacted), hash) in &self.hashes {
            assert_eq!(*hash, self.twin.hash(*at, *compacted), "at {at} under {compacted}");
        }
    }
}

fn race(engine: Arc<dyn Engine>, writes: usize, seed: u64) {
    let mut rng = Rng(seed);
    let requests = requests(&mut rng, writes);
    let mut twin = Twin::new();
    for request in &requests {
        twin.apply(request).0.unwrap();
    }
    let published = Published::of(&machine(), engine, None);
    let shared = Shared::new(ClusterId(1), MemberId(7), published);
    let met = Met::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for n in 0..READERS {
            let (shared, twin, met, stop) = (&shared, &twin, &met, &stop);
            let seed = rng.next() ^ n as u64;
            threads.spawn(move || {
                let mut reader = Reader { shared, twin, met, hashes: BTreeMap::new() };
                reader.run(Rng(seed), stop);
            });
        }
        write(&shared, &requests, &mut rng);
        stop.store(true, Ordering::Release);
    });
    let now = shared.published.load();
    assert_eq!(now.store.revision(), twin.revision(), "everything is applied");
    assert_eq!(now.store.uncommitted(), 0, "everything is committed");
    let compacted = now.store.compact_revision();
    let hash = shared.hash_kv(0).unwrap().0;
    assert_eq!(hash.hash, twin.hash(twin.revision(), compacted));
    let stored = {
        let mut rows = Vec::new();
        let view = now.engine.view().unwrap();
        now.store
            .changes(&*view, 0, i64::MAX - 1, &mut |revision: Revision, _, _| {
                rows.push(revision);
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        rows
    };
    let surviving: Vec<_> = twin.surviving(compacted).iter().map(|c| c.revision).collect();
    assert_eq!(stored, surviving, "after all compactions");
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    assert!(count(&met.reads) > 100 && count(&met.hashes) > 0, "readers have read");
    assert!(compacted > twin.revision() / 2, "compactions have happened");
    println!("{} reads, {} refused as compacted", count(&met.reads), count(&met.compacted));
}

#[test]
fn readers_race_with_compaction_over_memory() {
    race(Arc::new(engine_memory::Memory::new()), 3000, 11);
}

#[test]
fn readers_race_with_compaction_over_redb() {
    let dir = tempfile::tempdir().unwrap();
    let options = engine_api::Options::defaults(&engine_redb::ABOUT);
    race(Arc::new(engine_redb::Redb::open(dir.path(), &options).unwrap()), 1500, 12);
}
