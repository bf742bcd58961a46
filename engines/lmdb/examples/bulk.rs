//! How fast the engine takes revision keys and gives them back:
//! `cargo run --release -p engine-lmdb --example bulk [rows]`; the same work as engine-redb's example.
//!
//! Batches of 1,000 puts (17-byte keys, 256-byte values that do not compress), one in ten durable; then
//! point reads, a scan, deletion of every second row, and reclaim beside a committer.

use std::ops::{Bound, ControlFlow};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use engine_api::{Batch, Durability, Engine, Options, Table};
use engine_lmdb::{ABOUT, Lmdb};

const BATCH: u64 = 1_000;

fn key(main: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.extend_from_slice(&main.to_be_bytes());
    key.push(b'_');
    key.extend_from_slice(&0_u64.to_be_bytes());
    key
}

fn scramble(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

fn value(main: u64) -> Vec<u8> {
    (0..32).flat_map(|word| scramble(main * 32 + word).to_le_bytes()).collect()
}

fn rate(what: &str, count: u64, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    println!("{what:<44} {:>12.0}/s", count as f64 / seconds);
}

fn main() {
    let rows: u64 =
        std::env::args().nth(1).map_or(1_000_000, |rows| rows.parse().expect("a number"));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let engine = Lmdb::open(dir.path(), &Options::defaults(&ABOUT)).expect("the engine opens");
    let put = |first: u64| {
        let mut batch = Batch::default();
        for main in first..first + BATCH {
            batch.put(Table::Key, key(main), value(main));
        }
        batch.put(Table::Meta, "consistent_index", first.to_be_bytes().to_vec());
        batch
    };

    let batches: Vec<Batch> = (0..rows / BATCH).map(|n| put(n * BATCH)).collect();
    let mut slowest = Duration::ZERO;
    let started = Instant::now();
    for (n, batch) in (1..).zip(&batches) {
        let durability = if n % 10 == 0 { Durability::Durable } else { Durability::Buffered };
        let commit = Instant::now();
        engine.commit(batch, durability).expect("commit");
        slowest = slowest.max(commit.elapsed());
    }
    rate("put, batches of 1,000, each tenth durable", rows, started);
    println!("{:<44} {:>12.1?}", "slowest commit", slowest);
    drop(batches);

    const READS: u64 = 500_000;
    let started = Instant::now();
    for n in 0..READS {
        let view = engine.view().expect("view");
        let found = view.get(Table::Key, &key(scramble(n) % rows)).expect("get");
        assert!(found.is_some());
    }
    rate("get, random, a view each", READS, started);

    let started = Instant::now();
    let mut count = 0;
    engine
        .view()
        .expect("view")
        .scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut |_, _| {
            count += 1;
            ControlFlow::Continue(())
        })
        .expect("scan");
    assert_eq!(count, rows);
    rate("scan", rows, started);
    sizes(&engine, "full");

    let started = Instant::now();
    for first in (0..rows).step_by(2 * BATCH as usize) {
        let mut batch = Batch::default();
        for main in (first..first + 2 * BATCH).step_by(2) {
            batch.delete(Table::Key, key(main));
        }
        engine.commit(&batch, Durability::Buffered).expect("commit");
    }
    engine.commit(&Batch::default(), Durability::Durable).expect("commit");
    rate("delete every second row", rows / 2, started);
    sizes(&engine, "half deleted");

    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let committer = scope.spawn(|| {
            let (mut first, mut slowest) = (rows, Duration::ZERO);
            while !done.load(Ordering::Acquire) {
                let batch = put(first);
                let commit = Instant::now();
                engine.commit(&batch, Durability::Buffered).expect("commit");
                slowest = slowest.max(commit.elapsed());
                first += BATCH;
                // a busy server, not one that does nothing else
                thread::sleep(Duration::from_millis(50));
            }
            (first - rows, slowest)
        });
        let started = Instant::now();
        let reclaimed = engine.reclaim().expect("reclaim");
        let took = started.elapsed();
        done.store(true, Ordering::Release);
        let (written, slowest) = committer.join().expect("the committer ends");
        println!(
            "reclaim {} -> {} MiB in {took:.1?}; meanwhile {written} rows put, slowest commit {slowest:.1?}",
            reclaimed.before >> 20,
            reclaimed.after >> 20
        );
    });
    sizes(&engine, "reclaimed");

    drop(engine);
    let started = Instant::now();
    let engine = Lmdb::open(dir.path(), &Options::defaults(&ABOUT)).expect("the engine opens");
    println!("{:<44} {:>12.1?}", "open", started.elapsed());

    for (durability, commits) in [(Durability::Buffered, 20_000), (Durability::Durable, 500)] {
        let started = Instant::now();
        for n in 0..commits {
            let mut batch = Batch::default();
            for sub in 0..10 {
                let main = (1 << 40) + n * 10 + sub;
                batch.put(Table::Key, key(main), value(main));
            }
            engine.commit(&batch, durability).expect("commit");
        }
        rate(&format!("commits of 10 puts, {durability:?}"), commits, started);
    }
}

fn sizes(engine: &Lmdb, when: &str) {
    println!(
        "{when}: size {} MiB, in use {} MiB",
        engine.size().expect("size") >> 20,
        engine.size_in_use().expect("size") >> 20
    );
}
