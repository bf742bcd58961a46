//! What the server asks of a storage engine most, for every engine that is built in. `cargo bench` measures
//! it; `cargo test` runs each once. For figures to choose an engine by see `quorate bench engines`.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use bytes::Bytes;
use divan::{Bencher, counter::ItemsCount};
use engine_api::{Batch, Durability, Engine, Options, Table};
use quorate::core::mvcc::keyspace::revision_key;
use quorate::core::types::Revision;
use quorate::engines;

/// Rows that are there before anything is measured.
const ROWS: i64 = 10_000;

fn main() {
    divan::main();
}

fn names() -> Vec<&'static str> {
    engines::ALL.iter().map(|engine| engine.name()).collect()
}

fn key(row: i64) -> Bytes {
    revision_key(Revision::main(row), false)
}

fn rows(from: i64, count: i64) -> Batch {
    let mut batch = Batch::default();
    for row in from..from + count {
        // Values differ, as what clients write does.
        let mut value = vec![7; 256];
        value[..8].copy_from_slice(&row.to_le_bytes());
        batch.put(Table::Key, key(row), value);
    }
    batch.put(Table::Meta, "consistent_index", Bytes::copy_from_slice(&from.to_be_bytes()));
    batch
}

/// An engine with rows; its directory goes with it.
struct Filled {
    engine: Arc<dyn Engine>,
    _dir: tempfile::TempDir,
}

fn filled(name: &str) -> Filled {
    let built_in = engines::find(name).expect("a name of the registry");
    let dir = tempfile::tempdir().expect("a directory");
    let place = built_in.dir(dir.path()).unwrap_or_else(|| dir.path().to_path_buf());
    let engine = built_in.open(&place, &Options::defaults(built_in.about)).expect("it opens");
    engine.commit(&rows(0, ROWS), Durability::Durable).expect("a commit");
    Filled { engine, _dir: dir }
}

/// A batch of the committer that need not reach the disk.
#[divan::bench(args = names(), sample_count = 20)]
fn commit_100_rows_buffered(bencher: Bencher<'_, '_>, name: &str) {
    const BATCH: i64 = 100;
    let filled = filled(name);
    let mut next = ROWS;
    bencher
        .counter(ItemsCount::new(BATCH as usize))
        .with_inputs(|| {
            next += BATCH;
            rows(next, BATCH)
        })
        .bench_local_values(|batch| {
            filled.engine.commit(&batch, Durability::Buffered).expect("a commit");
            batch
        });
}

#[divan::bench(args = names(), sample_count = 20)]
fn get_one_row(bencher: Bencher<'_, '_>, name: &str) {
    let filled = filled(name);
    let mut next = 0;
    bencher.bench_local(|| {
        next = (next + 6_007) % ROWS;
        let view = filled.engine.view().expect("a view");
        view.get(Table::Key, &key(next)).expect("a read").expect("the row is there").len()
    });
}

#[divan::bench(args = names(), sample_count = 20)]
fn scan_100_rows(bencher: Bencher<'_, '_>, name: &str) {
    let filled = filled(name);
    let mut next = 0;
    bencher.counter(ItemsCount::new(100usize)).bench_local(|| {
        next = (next + 6_007) % (ROWS - 100);
        let view = filled.engine.view().expect("a view");
        let (mut found, mut bytes) = (0, 0);
        view.scan(Table::Key, Bound::Included(&key(next)), Bound::Unbounded, &mut |_, value| {
            found += 1;
            bytes += value.len();
            if found < 100 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .expect("a scan");
        assert_eq!(found, 100);
        bytes
    });
}
