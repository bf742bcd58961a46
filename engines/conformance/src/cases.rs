//! The cases of [`suite!`](crate::suite), each generic over how the engine is opened.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use bytes::Bytes;
use engine_api::{
    Batch, Durability, Engine, EngineError, Op, Reclaim, Table, View, is_empty_range,
};
use tempfile::TempDir;

use crate::Rng;
use crate::seeds::each_seed;

use Bound::{Excluded, Included, Unbounded};

pub(crate) type Rows = Vec<(Bytes, Bytes)>;

fn temp_dir() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn commit(engine: &impl Engine, durability: Durability, fill: impl FnOnce(&mut Batch)) {
    let mut batch = Batch::default();
    fill(&mut batch);
    engine.commit(&batch, durability).unwrap();
}

fn buffered(engine: &impl Engine, fill: impl FnOnce(&mut Batch)) {
    commit(engine, Durability::Buffered, fill);
}

fn rows_in(view: &dyn View, table: Table, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Rows {
    let mut rows = Rows::new();
    view.scan(table, from, to, &mut |key, value| {
        rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
        ControlFlow::Continue(())
    })
    .unwrap();
    rows
}

pub(crate) fn all_rows(view: &dyn View, table: Table) -> Rows {
    rows_in(view, table, Unbounded, Unbounded)
}

fn keys_in(view: &dyn View, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Vec<Vec<u8>> {
    rows_in(view, Table::Key, from, to).into_iter().map(|(key, _)| key.to_vec()).collect()
}

fn get(engine: &impl Engine, table: Table, key: &[u8]) -> Option<Bytes> {
    engine.view().unwrap().get(table, key).unwrap()
}

/// A revision key as etcd writes it: ascending with `main`.
pub(crate) fn revision_key(main: u64, sub: u64) -> Bytes {
    let mut key = Vec::with_capacity(17);
    key.extend_from_slice(&main.to_be_bytes());
    key.push(b'_');
    key.extend_from_slice(&sub.to_be_bytes());
    key.into()
}

pub fn never_written_tables_are_empty<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let view = engine.view().unwrap();
    for table in Table::ALL {
        assert_eq!(view.get(table, b"key").unwrap(), None, "{table}");
        assert_eq!(view.last(table).unwrap(), None, "{table}");
        assert!(all_rows(&*view, table).is_empty(), "{table}");
    }
}

pub fn batch_is_visible_whole<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |batch| {
        for table in Table::ALL {
            batch.put(table, "a", format!("a of {table}"));
            batch.put(table, "b", format!("b of {table}"));
        }
    });
    let view = engine.view().unwrap();
    for table in Table::ALL {
        let expected: Rows =
            ["a", "b"].map(|k| (k.into(), format!("{k} of {table}").into())).into();
        assert_eq!(all_rows(&*view, table), expected);
        assert_eq!(view.get(table, b"b").unwrap().unwrap(), format!("b of {table}"));
    }
}

pub fn later_operations_of_a_batch_win<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    for table in [Table::Key, Table::Lease] {
        buffered(&engine, |batch| {
            batch.put(table, "put twice", "1");
            batch.put(table, "put twice", "2");
            batch.put(table, "put, deleted", "1");
            batch.delete(table, "put, deleted");
            batch.put(table, "put, deleted, put", "1");
            batch.delete(table, "put, deleted, put");
            batch.put(table, "put, deleted, put", "2");
            batch.delete(table, "deleted, put");
            batch.put(table, "deleted, put", "1");
        });
        let view = engine.view().unwrap();
        let expected: Rows =
            [("deleted, put", "1"), ("put twice", "2"), ("put, deleted, put", "2")]
                .map(|(key, value)| (key.into(), value.into()))
                .into();
        assert_eq!(all_rows(&*view, table), expected, "{table}");
    }
}

pub fn tables_are_separate<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |batch| {
        for table in Table::ALL {
            batch.put(table, "same key", table.name());
        }
    });
    buffered(&engine, |batch| batch.delete(Table::Auth, "same key"));
    let view = engine.view().unwrap();
    for table in Table::ALL {
        let expected = (table != Table::Auth).then(|| Bytes::from(table.name()));
        assert_eq!(view.get(table, b"same key").unwrap(), expected, "{table}");
    }
}

pub fn deleting_an_absent_key_changes_nothing<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |batch| batch.delete(Table::Key, "absent"));
    assert!(all_rows(&*engine.view().unwrap(), Table::Key).is_empty());
    buffered(&engine, |batch| batch.put(Table::Key, "present", "1"));
    buffered(&engine, |batch| {
        batch.delete(Table::Key, "absent");
        batch.delete(Table::Key, "zz");
    });
    let expected: Rows = vec![("present".into(), "1".into())];
    assert_eq!(all_rows(&*engine.view().unwrap(), Table::Key), expected);
}

pub fn view_ignores_later_commits<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let empty = engine.view().unwrap();
    buffered(&engine, |batch| {
        batch.put(Table::Key, "kept", "old");
        batch.put(Table::Key, "deleted", "old");
    });
    let before = engine.view().unwrap();
    buffered(&engine, |batch| {
        batch.put(Table::Key, "kept", "new");
        batch.delete(Table::Key, "deleted");
        batch.put(Table::Key, "new", "new");
        batch.put(Table::Meta, "new", "new");
    });
    let after = engine.view().unwrap();

    assert!(all_rows(&*empty, Table::Key).is_empty());
    let old: Rows = vec![("deleted".into(), "old".into()), ("kept".into(), "old".into())];
    assert_eq!(all_rows(&*before, Table::Key), old);
    assert_eq!(before.get(Table::Key, b"kept").unwrap().unwrap(), "old");
    assert_eq!(before.last(Table::Key).unwrap().unwrap().0, "kept");
    assert_eq!(before.get(Table::Meta, b"new").unwrap(), None);
    let new: Rows = vec![("kept".into(), "new".into()), ("new".into(), "new".into())];
    assert_eq!(all_rows(&*after, Table::Key), new);
}

pub fn view_outlives_many_commits<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |batch| {
        for n in 0..500 {
            batch.put(Table::Key, revision_key(n, 0), vec![n as u8; 100]);
        }
    });
    let view = engine.view().unwrap();
    let before = all_rows(&*view, Table::Key);
    // every row is rewritten and deleted, in small commits of both kinds
    for round in 0..100 {
        let durability = if round % 10 == 9 { Durability::Durable } else { Durability::Buffered };
        commit(&engine, durability, |batch| {
            for n in (round % 5..500).step_by(5) {
                match round % 3 {
                    0 => batch.delete(Table::Key, revision_key(n, 0)),
                    _ => batch.put(Table::Key, revision_key(n, 0), vec![round as u8; 120]),
                }
            }
        });
    }
    assert!(all_rows(&*view, Table::Key) == before, "the view has changed");
    assert_eq!(view.get(Table::Key, &revision_key(499, 0)).unwrap().unwrap(), vec![243; 100]);
}

pub fn views_of_several_ages_agree_with_their_moment<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let mut views = Vec::new();
    for n in 0..50_u64 {
        commit(
            &engine,
            if n % 7 == 0 { Durability::Durable } else { Durability::Buffered },
            |batch| {
                batch.put(Table::Meta, "n", n.to_be_bytes().to_vec());
                batch.put(Table::Key, revision_key(n, 0), n.to_string());
                if n >= 10 {
                    batch.delete(Table::Key, revision_key(n - 10, 0));
                }
            },
        );
        views.push(engine.view().unwrap());
    }
    for (n, view) in views.iter().enumerate().rev() {
        let n = n as u64;
        assert_eq!(view.get(Table::Meta, b"n").unwrap().unwrap(), n.to_be_bytes().to_vec());
        let expected: Rows =
            (n.saturating_sub(9)..=n).map(|n| (revision_key(n, 0), n.to_string().into())).collect();
        assert_eq!(all_rows(&**view, Table::Key), expected, "view {n}");
    }
}

/// One thread commits numbered batches; the others check that each view holds one whole batch and
/// that views never go back.
pub fn threads_see_whole_batches_in_order<E: Engine>(open: impl Fn(&Path) -> E) {
    const BATCHES: u64 = 300;
    const KEYS: u64 = 20;
    let dir = temp_dir();
    let engine = open(dir.path());
    let committed = AtomicU64::new(0);
    let put_all = |n: u64| {
        buffered(&engine, |batch| {
            for key in 0..KEYS {
                batch.put(Table::Key, format!("{key:02}"), n.to_be_bytes().to_vec());
            }
            batch.put(Table::Meta, "n", n.to_be_bytes().to_vec());
        });
    };
    put_all(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut seen = 0;
                while seen < BATCHES {
                    let acknowledged = committed.load(Ordering::Acquire);
                    let view = engine.view().unwrap();
                    let value = view.get(Table::Meta, b"n").unwrap().unwrap();
                    let n = u64::from_be_bytes(value[..].try_into().unwrap());
                    assert!(n >= seen, "a view of batch {n} after one of {seen}");
                    assert!(n >= acknowledged, "batch {acknowledged} is missing: at {n}");
                    let rows = all_rows(&*view, Table::Key);
                    assert_eq!(rows.len() as u64, KEYS);
                    assert!(rows.iter().all(|(_, v)| v[..] == n.to_be_bytes()), "torn batch {n}");
                    seen = n;
                }
            });
        }
        for n in 1..=BATCHES {
            put_all(n);
            committed.store(n, Ordering::Release);
        }
    });
}

/// Keys in ascending byte order, chosen where a comparison that is not byte by byte goes wrong.
const ORDERED: [&[u8]; 11] = [
    b"\x00",
    b"\x00\x00",
    b"\x00\xff",
    b"\x01",
    b"A",
    b"a",
    b"a\x00",
    b"aa",
    b"b",
    b"\x7f\xff",
    b"\xff\xff\xff",
];

fn put_ordered(engine: &impl Engine) {
    buffered(engine, |batch| {
        // neither ascending nor descending
        for at in [5, 0, 10, 3, 8, 1, 6, 9, 2, 7, 4] {
            batch.put(Table::Key, ORDERED[at], vec![at as u8]);
        }
    });
}

pub fn scan_follows_byte_order<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    put_ordered(&engine);
    let expected: Rows =
        (0_u8..).zip(ORDERED).map(|(at, key)| (Bytes::from_static(key), vec![at].into())).collect();
    assert_eq!(all_rows(&*engine.view().unwrap(), Table::Key), expected);
}

pub fn scan_respects_every_kind_of_bound<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    put_ordered(&engine);
    let view = engine.view().unwrap();
    // bounds on keys, between keys, outside all keys; equal and inverted pairs come with it
    let mut points: Vec<&[u8]> = ORDERED.to_vec();
    points.extend([&b""[..], b"\x00\x80", b"Z", b"ab", b"\xff\xff\xff\xff"]);
    let mut bounds = vec![Unbounded];
    bounds.extend(points.iter().flat_map(|&point| [Included(point), Excluded(point)]));
    for &from in &bounds {
        for &to in &bounds {
            let after = |key: &[u8]| match from {
                Unbounded => true,
                Included(from) => key >= from,
                Excluded(from) => key > from,
            };
            let before = |key: &[u8]| match to {
                Unbounded => true,
                Included(to) => key <= to,
                Excluded(to) => key < to,
            };
            let expected: Vec<Vec<u8>> = ORDERED
                .iter()
                .filter(|key| after(key) && before(key))
                .map(|key| key.to_vec())
                .collect();
            assert_eq!(keys_in(&*view, from, to), expected, "{from:02x?} to {to:02x?}");
            assert!(
                !is_empty_range(from, to) || expected.is_empty(),
                "{from:02x?} to {to:02x?} is not empty"
            );
        }
    }
    assert!(rows_in(&*view, Table::Lease, Included(b"a"), Excluded(b"b")).is_empty());
}

pub fn scan_stops_when_told<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    put_ordered(&engine);
    let view = engine.view().unwrap();
    for stop_after in 1..=ORDERED.len() {
        let mut seen = 0;
        view.scan(Table::Key, Unbounded, Unbounded, &mut |key, _| {
            assert_eq!(key, ORDERED[seen]);
            seen += 1;
            if seen == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(seen, stop_after);
    }
}

pub fn last_is_the_greatest_key<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    put_ordered(&engine);
    for at in (0..ORDERED.len()).rev() {
        let last = engine.view().unwrap().last(Table::Key).unwrap().unwrap();
        assert_eq!(last, (Bytes::from_static(ORDERED[at]), vec![at as u8].into()));
        buffered(&engine, |batch| batch.delete(Table::Key, ORDERED[at]));
    }
    assert_eq!(engine.view().unwrap().last(Table::Key).unwrap(), None);
}

pub fn keys_may_hold_any_byte<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let long: Vec<u8> = (0..=255).chain(0..=244).collect(); // 501 bytes
    let keys: Vec<Vec<u8>> = (0..=255_u8)
        .flat_map(|byte| [vec![byte], vec![byte, 255 - byte], vec![b'k', byte, 0, byte]])
        .chain([long])
        .collect();
    buffered(&engine, |batch| {
        for key in &keys {
            batch.put(
                Table::AuthUsers,
                key.clone(),
                key.iter().rev().copied().collect::<Vec<u8>>(),
            );
        }
    });
    let view = engine.view().unwrap();
    for key in &keys {
        let value = view.get(Table::AuthUsers, key).unwrap();
        assert!(value.unwrap().iter().eq(key.iter().rev()), "{key:02x?}");
    }
    let mut ordered = keys;
    ordered.sort();
    let found: Vec<Vec<u8>> =
        all_rows(&*view, Table::AuthUsers).into_iter().map(|(key, _)| key.to_vec()).collect();
    assert_eq!(found, ordered);
}

pub fn empty_values_are_kept<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |batch| {
        batch.put(Table::Key, revision_key(1, 0), "");
        batch.put(Table::Alarm, "alarm", "");
        batch.put(Table::Key, revision_key(2, 0), "emptied later");
    });
    buffered(&engine, |batch| batch.put(Table::Key, revision_key(2, 0), ""));
    let view = engine.view().unwrap();
    assert_eq!(view.get(Table::Alarm, b"alarm").unwrap(), Some(Bytes::new()));
    assert_eq!(view.last(Table::Key).unwrap(), Some((revision_key(2, 0), Bytes::new())));
    let expected: Rows = [1, 2].map(|n| (revision_key(n, 0), Bytes::new())).into();
    assert_eq!(all_rows(&*view, Table::Key), expected);
}

pub fn empty_keys_are_refused<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |batch| batch.put(Table::Key, "a", "1"));
    let mut put = Batch::default();
    put.put(Table::Key, "b", "1");
    put.put(Table::Meta, "", "1");
    let mut delete = Batch::default();
    delete.delete(Table::Key, "a");
    delete.delete(Table::Key, "");
    for batch in [put, delete] {
        for durability in [Durability::Buffered, Durability::Durable] {
            let error = engine.commit(&batch, durability).unwrap_err();
            assert!(matches!(error, EngineError::Unusable(_)), "{error}");
        }
    }
    assert_eq!(get(&engine, Table::Key, b""), None);
    let expected: Rows = vec![("a".into(), "1".into())];
    assert_eq!(all_rows(&*engine.view().unwrap(), Table::Key), expected);
    // the refusal did not stop the engine
    buffered(&engine, |batch| batch.put(Table::Key, "b", "2"));
    assert_eq!(get(&engine, Table::Key, b"b").unwrap(), "2");
}

pub fn large_values_are_kept<E: Engine>(open: impl Fn(&Path) -> E) {
    const LEN: usize = 3 << 19; // 1.5 MiB, the largest request
    let dir = temp_dir();
    let engine = open(dir.path());
    let mut rng = Rng::new(1);
    let values: Vec<Bytes> =
        [LEN, LEN - 1, LEN + 1, 4096, 4095, 65_536, LEN].map(|len| rng.bytes(len).into()).into();
    for (n, value) in (0..).zip(&values) {
        let durability = if n % 2 == 0 { Durability::Durable } else { Durability::Buffered };
        commit(&engine, durability, |batch| {
            batch.put(Table::Key, revision_key(n, 0), value.clone())
        });
    }
    let view = engine.view().unwrap();
    for (n, value) in (0..).zip(&values) {
        let found = view.get(Table::Key, &revision_key(n, 0)).unwrap().unwrap();
        assert!(found == *value, "value {n} of {} bytes differs", value.len());
    }
    let lens: Vec<usize> = all_rows(&*view, Table::Key).iter().map(|(_, v)| v.len()).collect();
    assert_eq!(lens, values.iter().map(Bytes::len).collect::<Vec<_>>());
}

pub fn large_batches_apply_whole<E: Engine>(open: impl Fn(&Path) -> E) {
    const OPS: u64 = 10_000;
    let dir = temp_dir();
    let engine = open(dir.path());
    let value = |n: u64, round: u64| Bytes::from(format!("{n} in round {round}"));
    for (round, durability) in [(0, Durability::Buffered), (1, Durability::Durable)] {
        commit(&engine, durability, |batch| {
            for n in 0..OPS {
                batch.put(Table::Key, revision_key(n, 0), value(n, round));
            }
        });
        let expected: Rows = (0..OPS).map(|n| (revision_key(n, 0), value(n, round))).collect();
        assert!(all_rows(&*engine.view().unwrap(), Table::Key) == expected, "round {round}");
    }
    buffered(&engine, |batch| {
        for n in 0..OPS {
            batch.delete(Table::Key, revision_key(n, 0));
        }
    });
    assert!(all_rows(&*engine.view().unwrap(), Table::Key).is_empty());
}

/// Revision keys rise, so engines append them by a short cut: it must see where it does not apply.
pub fn appends_mix_with_other_writes<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let mut expected = BTreeMap::new();
    for round in 0..60_u64 {
        let mut batch = Batch::default();
        for n in 0..40 {
            let main = round * 40 + n;
            batch.put(Table::Key, revision_key(main, 0), format!("{main}"));
            match (round + n) % 11 {
                // something else between, the same key again, a lower key, the last one deleted
                0 => batch.put(Table::Meta, "consistent_index", main.to_be_bytes().to_vec()),
                1 => batch.put(Table::Key, revision_key(main, 0), "again"),
                2 => batch.put(Table::Key, revision_key(main / 2, 1), "between"),
                3 => batch.delete(Table::Key, revision_key(main, 0)),
                4 => batch.delete(Table::Key, revision_key(main / 3, 0)),
                _ => {}
            }
        }
        for op in &batch.ops {
            match op {
                Op::Put { table: Table::Key, key, value } => {
                    expected.insert(key.clone(), value.clone());
                }
                Op::Delete { table: Table::Key, key } => drop(expected.remove(key)),
                _ => {}
            }
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
    }
    let expected: Rows = expected.into_iter().collect();
    assert!(all_rows(&*engine.view().unwrap(), Table::Key) == expected, "rows differ");
}

pub fn empty_batches_commit<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    buffered(&engine, |_| {});
    commit(&engine, Durability::Durable, |_| {});
    buffered(&engine, |batch| batch.put(Table::Key, "a", "1"));
    commit(&engine, Durability::Durable, |_| {});
    commit(&engine, Durability::Durable, |_| {});
    assert_eq!(get(&engine, Table::Key, b"a").unwrap(), "1");
}

/// What the engine should hold.
#[derive(Clone, Default)]
struct Twin(BTreeMap<Table, BTreeMap<Bytes, Bytes>>);

impl Twin {
    fn apply(&mut self, batch: &Batch) {
        for op in batch.ops.iter().cloned() {
            match op {
                Op::Put { table, key, value } => {
                    self.0.entry(table).or_default().insert(key, value);
                }
                Op::Delete { table, key } => {
                    self.0.entry(table).or_default().remove(&key);
                }
            }
        }
    }

    fn get(&self, table: Table, key: &[u8]) -> Option<Bytes> {
        self.0.get(&table)?.get(key).cloned()
    }

    fn rows(&self, table: Table, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Rows {
        let Some(rows) = self.0.get(&table).filter(|_| !is_empty_range(from, to)) else {
            return Rows::new();
        };
        rows.range::<[u8], _>((from, to)).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    fn check(&self, view: &dyn View, seed: u64, step: usize) {
        for table in Table::ALL {
            let expected = self.rows(table, Unbounded, Unbounded);
            assert!(all_rows(view, table) == expected, "seed {seed}, step {step}: {table} differs");
            let last = view.last(table).unwrap();
            assert_eq!(last, expected.last().cloned(), "seed {seed}, step {step}: last of {table}");
        }
    }
}

/// Few tables and short keys, so that operations meet.
fn random_key(rng: &mut Rng) -> (Table, Bytes) {
    let table =
        [Table::Key, Table::Key, Table::Key, Table::Lease, Table::Meta][rng.below(5) as usize];
    if table == Table::Key && !rng.one_in(4) {
        return (table, revision_key(rng.below(400), rng.below(2)));
    }
    let len = 1 + rng.below(3) as usize;
    (table, rng.bytes(len).iter().map(|byte| byte % 8).collect::<Vec<u8>>().into())
}

fn random_batch(rng: &mut Rng, next_main: &mut u64) -> Batch {
    let mut batch = Batch::default();
    for _ in 0..rng.below(40) {
        match rng.below(10) {
            0..=3 => {
                let len = if rng.one_in(30) { rng.below(20_000) } else { rng.below(200) } as usize;
                *next_main += 1;
                batch.put(Table::Key, revision_key(*next_main, 0), rng.bytes(len));
            }
            4..=6 => {
                let (table, key) = random_key(rng);
                let len = rng.below(100) as usize;
                batch.put(table, key, rng.bytes(len));
            }
            _ => {
                let (table, key) = random_key(rng);
                batch.delete(table, key);
            }
        }
    }
    batch
}

fn random_operations<E: Engine>(open: impl Fn(&Path) -> E, seed: u64, reopen: bool) {
    let dir = temp_dir();
    let mut rng = Rng::new(seed);
    let mut twin = Twin::default();
    let mut next_main = 0;
    let mut step = 0;
    while step < 200 {
        let engine = open(dir.path());
        twin.check(&*engine.view().unwrap(), seed, step);
        let mut views: Vec<(Box<dyn View + '_>, Twin)> = Vec::new();
        loop {
            step += 1;
            let batch = random_batch(&mut rng, &mut next_main);
            let durable = rng.one_in(4);
            let durability = if durable { Durability::Durable } else { Durability::Buffered };
            engine.commit(&batch, durability).unwrap();
            twin.apply(&batch);
            let view = engine.view().unwrap();
            for _ in 0..5 {
                let (table, key) = random_key(&mut rng);
                let found = view.get(table, &key).unwrap();
                let expected = twin.get(table, &key);
                assert_eq!(found, expected, "seed {seed}, step {step}: get {table} {key:02x?}");
                let bound = |rng: &mut Rng, key| match rng.below(3) {
                    0 => Unbounded,
                    1 => Included(key),
                    _ => Excluded(key),
                };
                let (_, other) = random_key(&mut rng);
                let (from, to) = (bound(&mut rng, &key[..]), bound(&mut rng, &other[..]));
                let found = rows_in(&*view, table, from, to);
                let expected = twin.rows(table, from, to);
                assert!(
                    found == expected,
                    "seed {seed}, step {step}: scan {table} {from:02x?} to {to:02x?}"
                );
            }
            if rng.one_in(5) {
                views.push((view, twin.clone()));
            }
            if rng.one_in(8) && !views.is_empty() {
                let (view, twin) = views.swap_remove(rng.below(views.len() as u64) as usize);
                twin.check(&*view, seed, step);
            }
            if rng.one_in(40) {
                engine.reclaim().unwrap();
                twin.check(&*engine.view().unwrap(), seed, step);
            }
            if step >= 200 || (reopen && rng.one_in(25)) {
                break;
            }
        }
        for (view, twin) in views {
            twin.check(&*view, seed, step);
        }
        twin.check(&*engine.view().unwrap(), seed, step);
        if reopen {
            commit(&engine, Durability::Durable, |_| {});
        }
    }
}

pub fn random_operations_match_the_model<E: Engine>(open: impl Fn(&Path) -> E) {
    each_seed(1..=6, |seed| random_operations(&open, seed, false));
}

pub fn random_operations_with_reopening<E: Engine>(open: impl Fn(&Path) -> E) {
    each_seed(11..=16, |seed| random_operations(&open, seed, true));
}

pub fn durable_survives_reopening<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    for round in 0..5_u64 {
        let engine = open(dir.path());
        let rows = all_rows(&*engine.view().unwrap(), Table::Key);
        assert_eq!(rows.len() as u64, round);
        commit(&engine, Durability::Durable, |batch| {
            batch.put(Table::Key, revision_key(round, 0), round.to_string());
            for table in Table::ALL {
                batch.put(table, "round", round.to_string());
                batch.delete(table, "round");
            }
        });
    }
    let engine = open(dir.path());
    let expected: Rows = (0..5).map(|n| (revision_key(n, 0), n.to_string().into())).collect();
    assert_eq!(all_rows(&*engine.view().unwrap(), Table::Key), expected);
}

pub fn buffered_before_durable_survives_reopening<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    {
        let engine = open(dir.path());
        for n in 0..20 {
            buffered(&engine, |batch| batch.put(Table::Key, revision_key(n, 0), "v"));
        }
        commit(&engine, Durability::Durable, |_| {});
    }
    assert_eq!(all_rows(&*open(dir.path()).view().unwrap(), Table::Key).len(), 20);
}

pub fn buffered_survives_an_orderly_drop<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    for n in 0..20 {
        let engine = open(dir.path());
        assert_eq!(all_rows(&*engine.view().unwrap(), Table::Key).len() as u64, n);
        buffered(&engine, |batch| batch.put(Table::Key, revision_key(n, 0), "v"));
    }
}

/// Fills the engine with about 8 MiB in rows of 1 KiB.
fn fill(engine: &impl Engine) -> u64 {
    const ROWS: u64 = 8_192;
    let mut rng = Rng::new(3);
    for chunk in 0..8 {
        let last = chunk == 7;
        let durability = if last { Durability::Durable } else { Durability::Buffered };
        commit(engine, durability, |batch| {
            for n in chunk * ROWS / 8..(chunk + 1) * ROWS / 8 {
                batch.put(Table::Key, revision_key(n, 0), rng.bytes(1_007));
            }
        });
    }
    ROWS
}

pub fn sizes_follow_the_content<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let check = || {
        let (in_use, size) = (engine.size_in_use().unwrap(), engine.size().unwrap());
        assert!(in_use <= size, "{in_use} bytes in use of {size}");
        in_use
    };
    let empty = check();
    let rows = fill(&engine);
    let full = check();
    assert!(full > empty + (6 << 20), "8 MiB of rows take {} bytes", full - empty);
    commit(&engine, Durability::Durable, |batch| {
        for n in 0..rows / 2 {
            batch.delete(Table::Key, revision_key(n, 0));
        }
    });
    let half = check();
    assert!(half < full * 3 / 4, "{half} bytes of {full} in use after half is deleted");
    assert!(half > empty + (3 << 20), "4 MiB of rows take {} bytes", half - empty);
}

/// Fills, then deletes all but each 16th row.
fn fill_and_thin(engine: &impl Engine) -> Rows {
    let rows = fill(engine);
    commit(engine, Durability::Durable, |batch| {
        for n in (0..rows).filter(|n| n % 16 != 0) {
            batch.delete(Table::Key, revision_key(n, 0));
        }
        batch.put(Table::Meta, "consistent_index", "12345678");
        batch.put(Table::Alarm, "alarm", "");
    });
    let kept = all_rows(&*engine.view().unwrap(), Table::Key);
    assert_eq!(kept.len() as u64, rows / 16);
    kept
}

pub fn reclaim_gives_space_back<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    fill(&engine);
    let full = engine.size().unwrap();
    let kept = fill_and_thin(&engine);
    let before = engine.size().unwrap();
    let reclaimed = engine.reclaim().unwrap();
    // a file system may count its own blocks late
    let near = |a: u64, b: u64| a.abs_diff(b) <= a / 8;
    assert!(near(reclaimed.before, before), "{reclaimed:?} where size says {before}");
    let after = engine.size().unwrap();
    assert!(near(reclaimed.after, after), "{reclaimed:?} where size says {after}");
    assert!(reclaimed.after < full / 4, "{} bytes of {full} are left", reclaimed.after);
    assert!(engine.size_in_use().unwrap() <= engine.size().unwrap());
    let view = engine.view().unwrap();
    assert!(all_rows(&*view, Table::Key) == kept, "rows differ after reclaim");
    assert_eq!(view.get(Table::Meta, b"consistent_index").unwrap().unwrap(), "12345678");
    assert_eq!(view.get(Table::Alarm, b"alarm").unwrap(), Some(Bytes::new()));
    // and it goes on
    buffered(&engine, |batch| batch.put(Table::Key, revision_key(1 << 40, 0), "later"));
    assert_eq!(engine.view().unwrap().last(Table::Key).unwrap().unwrap().1, "later");
    engine.reclaim().unwrap();
    assert_eq!(engine.view().unwrap().last(Table::Key).unwrap().unwrap().1, "later");
}

pub fn reclaim_of_an_empty_engine<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    let reclaimed = engine.reclaim().unwrap();
    // a page more or less
    assert!(reclaimed.after <= reclaimed.before + (1 << 20), "{reclaimed:?}");
    assert!(all_rows(&*engine.view().unwrap(), Table::Key).is_empty());
    buffered(&engine, |batch| batch.put(Table::Key, "a", "1"));
    assert_eq!(get(&engine, Table::Key, b"a").unwrap(), "1");
}

pub fn view_outlives_reclaim<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let engine = open(dir.path());
    fill(&engine);
    let view = engine.view().unwrap();
    let before = all_rows(&*view, Table::Key);
    fill_and_thin(&engine);
    engine.reclaim().unwrap();
    buffered(&engine, |batch| batch.delete(Table::Key, revision_key(0, 0)));
    engine.reclaim().unwrap();
    assert!(all_rows(&*view, Table::Key) == before, "the view has changed");
}

pub fn reclaimed_state_survives_reopening<E: Engine>(open: impl Fn(&Path) -> E) {
    let dir = temp_dir();
    let (kept, size) = {
        let engine = open(dir.path());
        let kept = fill_and_thin(&engine);
        // what was only buffered is durable afterwards
        buffered(&engine, |batch| batch.put(Table::Lease, "lease", "1"));
        (kept, engine.reclaim().unwrap().after)
    };
    let engine = open(dir.path());
    assert!(engine.size().unwrap() <= size * 2, "{} bytes after {size}", engine.size().unwrap());
    assert!(all_rows(&*engine.view().unwrap(), Table::Key) == kept, "rows differ");
    assert_eq!(get(&engine, Table::Lease, b"lease").unwrap(), "1");
}

/// A committer appends, overwrites and deletes, and readers check what they see, while reclaim runs
/// again and again; nothing is lost, torn or resurrected.
pub fn commits_and_reads_go_on_during_reclaim<E: Engine>(open: impl Fn(&Path) -> E) {
    const RECLAIMS: usize = 6;
    const BATCHES_MIN: u64 = 200;
    let dir = temp_dir();
    let engine = open(dir.path());
    let rows = fill(&engine);
    buffered(&engine, |batch| batch.put(Table::Meta, "n", 0_u64.to_be_bytes().to_vec()));
    let mut twin = Twin::default();
    for table in [Table::Key, Table::Meta] {
        for (key, value) in all_rows(&*engine.view().unwrap(), table) {
            twin.0.entry(table).or_default().insert(key, value);
        }
    }
    let reclaimed = AtomicBool::new(false);
    let acknowledged = AtomicU64::new(0);
    let during_reclaim = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..RECLAIMS {
                let before = acknowledged.load(Ordering::Acquire);
                engine.reclaim().unwrap();
                let after = acknowledged.load(Ordering::Acquire);
                during_reclaim.fetch_add(after - before, Ordering::AcqRel);
            }
            reclaimed.store(true, Ordering::Release);
        });
        scope.spawn(|| {
            while !reclaimed.load(Ordering::Acquire) {
                let acknowledged = acknowledged.load(Ordering::Acquire);
                let view = engine.view().unwrap();
                let value = view.get(Table::Meta, b"n").unwrap().unwrap();
                let n = u64::from_be_bytes(value[..].try_into().unwrap());
                assert!(n >= acknowledged, "batch {acknowledged} is missing: at {n}");
                if n > 0 {
                    // each batch appends this row and the next one leaves it alone
                    let row = view.get(Table::Key, &revision_key(rows + n, 0)).unwrap();
                    assert_eq!(row.unwrap(), n.to_be_bytes().to_vec());
                    let next = view.get(Table::Key, &revision_key(rows + n + 1, 0)).unwrap();
                    assert_eq!(next, None);
                }
            }
        });
        let mut rng = Rng::new(5);
        let mut n = 0;
        while n < BATCHES_MIN || !reclaimed.load(Ordering::Acquire) {
            n += 1;
            let mut batch = Batch::default();
            batch.put(Table::Key, revision_key(rows + n, 0), n.to_be_bytes().to_vec());
            for _ in 0..20 {
                let old = revision_key(rng.below(rows), 0);
                match rng.below(3) {
                    0 => batch.delete(Table::Key, old),
                    _ => batch.put(Table::Key, old, rng.bytes(300)),
                }
            }
            batch.put(Table::Meta, "n", n.to_be_bytes().to_vec());
            let durability =
                if rng.one_in(10) { Durability::Durable } else { Durability::Buffered };
            engine.commit(&batch, durability).unwrap();
            acknowledged.store(n, Ordering::Release);
            twin.apply(&batch);
        }
    });
    twin.check(&*engine.view().unwrap(), 5, acknowledged.into_inner() as usize);
    eprintln!("{} batches were committed while reclaim ran", during_reclaim.into_inner());
}

/// A reclaim that is cancelled, again and again until it returns, ends with `Cancelled` or completes; the
/// engine goes on with all its data either way, and the next reclaim is not affected.
pub fn cancelled_reclaim_changes_nothing<E: Engine>(open: impl Fn(&Path) -> E) {
    const ROUNDS: u64 = 4;
    let dir = temp_dir();
    let engine = open(dir.path());
    if engine.about().reclaim != Reclaim::Online {
        return;
    }
    fill(&engine);
    let mut cancelled = 0;
    for round in 0..ROUNDS {
        let kept = all_rows(&*engine.view().unwrap(), Table::Key);
        let result = thread::scope(|scope| {
            let reclaim = scope.spawn(|| engine.reclaim());
            // one that comes before the reclaim has begun does not count
            while !reclaim.is_finished() {
                engine.cancel_reclaim();
                thread::yield_now();
            }
            reclaim.join().expect("reclaim does not panic")
        });
        match result {
            Ok(_) => {}
            Err(EngineError::Cancelled) => cancelled += 1,
            Err(error) => panic!("round {round}: {error}"),
        }
        assert!(all_rows(&*engine.view().unwrap(), Table::Key) == kept, "round {round}");
        commit(&engine, Durability::Durable, |batch| {
            batch.put(Table::Meta, "round", round.to_be_bytes().to_vec());
        });
        engine.reclaim().unwrap();
        assert!(all_rows(&*engine.view().unwrap(), Table::Key) == kept, "round {round}, reclaimed");
        assert_eq!(get(&engine, Table::Meta, b"round").unwrap(), round.to_be_bytes().to_vec());
    }
    eprintln!("{cancelled} of {ROUNDS} reclaims were cancelled");
}
