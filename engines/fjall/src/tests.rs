use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use engine_conformance::{Mirror, Model, Rng};

use super::*;
use crate::journal::Scan;
use crate::mark::{Fill, Mark};

mod conformance {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open(dir),
        buffered_survives_drop: true);
}

/// The least memtables: they are sealed, written and compacted all the time.
mod small_memtables {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open_small(dir),
        buffered_survives_drop: true);
}

fn open(dir: &Path) -> Fjall {
    Fjall::open(dir, &Options::defaults(&ABOUT)).unwrap()
}

fn options(given: &[(&str, &str)]) -> Options {
    let given: BTreeMap<String, String> =
        given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Options::new(&ABOUT, &given).unwrap()
}

fn small() -> Options {
    options(&[(MEMTABLE_BYTES, "1048576"), (CACHE_BYTES, "1048576")])
}

fn open_small(dir: &Path) -> Fjall {
    Fjall::open(dir, &small()).unwrap()
}

fn error_of(dir: &Path) -> EngineError {
    Fjall::open(dir, &Options::defaults(&ABOUT)).err().expect("opening fails")
}

/// A batch whose rows follow from its number: a row of its own, and the number in `meta`.
fn numbered(n: u64) -> Batch {
    let mut batch = Batch::default();
    batch.put(Table::Key, n.to_be_bytes().to_vec(), row(n));
    if n > 20 {
        batch.delete(Table::Key, (n - 20).to_be_bytes().to_vec());
    }
    batch.put(Table::Meta, "n", n.to_be_bytes().to_vec());
    batch
}

fn row(n: u64) -> Vec<u8> {
    let mut rng = Rng::new(n);
    let len = rng.below(3_000) as usize;
    rng.bytes(len)
}

/// Checks that the engine holds exactly the batches up to some number, and answers it.
fn check_numbered(engine: &Fjall, context: &str) -> u64 {
    let view = engine.view().unwrap();
    let n = view.get(Table::Meta, b"n").unwrap();
    let n = n.map_or(0, |n| u64::from_be_bytes(n[..].try_into().unwrap()));
    let mut expected = (n.saturating_sub(19).max(1)..=n).map(|n| (n.to_be_bytes(), row(n)));
    view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
        let (expected_key, expected_value) = expected
            .next()
            .unwrap_or_else(|| panic!("{context}: {key:02x?} is too much after {n}"));
        assert!(key == expected_key && value == expected_value, "{context}: torn at {key:02x?}");
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(expected.next(), None, "{context}: rows are missing after {n}");
    n
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn newest_journal(dir: &Path) -> PathBuf {
    journal::list(&dir.join(FJALL)).unwrap().pop().unwrap().1
}

/// Where each batch ends, and its number.
fn batch_ends(journal: &Path) -> Vec<(u64, Option<u64>)> {
    let whole = journal::scan(journal, None).unwrap();
    assert_eq!(whole.damage, None);
    let bytes = fs::read(journal).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let part = dir.path().join("part");
    let mut ends = Vec::new();
    // a batch ends where the trailer makes one more of it whole
    for at in 4..=whole.end as usize {
        if bytes[at - 4..at] == *b"FJL\x03" {
            fs::write(&part, &bytes[..at]).unwrap();
            let scan = journal::scan(&part, None).unwrap();
            if scan.end == at as u64 {
                ends.push((scan.end, scan.last));
            }
        }
    }
    ends
}

#[test]
fn random_operations_match_a_mirrored_model() {
    engine_conformance::cases::random_operations_match_the_model(|dir: &Path| {
        Mirror::new(open_small(dir), Model::default())
    });
}

/// Threads of fjall that finish a table move the visible sequence number past a batch that is half applied:
/// no view may show such a one.
#[test]
fn views_show_whole_batches_while_tables_are_written() {
    const KEYS: u64 = 100;
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    let done = AtomicBool::new(false);
    let put = |n: u64| {
        let mut batch = Batch::default();
        for key in 0..KEYS {
            let mut value = n.to_be_bytes().to_vec();
            value.resize(500, n as u8);
            batch.put(
                Table::ALL[key as usize % Table::ALL.len()],
                key.to_be_bytes().to_vec(),
                value,
            );
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
    };
    put(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut seen = 0;
                while !done.load(Ordering::Acquire) {
                    let view = engine.view().unwrap();
                    let mut found = BTreeMap::new();
                    for _ in 0..2 {
                        for table in Table::ALL {
                            let all = Bound::Unbounded;
                            view.scan(table, all, all, &mut |key, value| {
                                let n = u64::from_be_bytes(value[..8].try_into().unwrap());
                                found.entry(n).or_insert_with(Vec::new).push(key.to_vec());
                                ControlFlow::Continue(())
                            })
                            .unwrap();
                        }
                    }
                    let numbers: Vec<u64> = found.keys().copied().collect();
                    assert_eq!(numbers.len(), 1, "a view of several batches: {numbers:?}");
                    assert_eq!(found[&numbers[0]].len() as u64, 2 * KEYS);
                    assert!(numbers[0] >= seen, "batch {} after {seen}", numbers[0]);
                    seen = numbers[0];
                }
            });
        }
        for n in 1..600 {
            put(n);
        }
        done.store(true, Ordering::Release);
    });
    assert!(engine.shared.tables[0].tree.table_count() > 0, "no table was written");
}

#[test]
fn what_was_buffered_outlives_a_kill() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = open(dir.path());
    for n in 1..=50 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
    }
    // a copy of the files of an engine that is still open is what a killed process leaves
    copy_dir(dir.path(), copy.path());
    assert_eq!(check_numbered(&open(copy.path()), "the copy"), 50);
    assert_eq!(check_numbered(&engine, "the original"), 50);
}

/// Power loss: of what was written since the last sync any part reaches the disk, so the journal ends with
/// batches of which sectors are missing. Recovery answers with a state after some whole batch, never one before the
/// last durable one.
#[test]
fn torn_ends_of_the_journal_are_cut_between_batches() {
    const SECTOR: usize = 512;
    let seed = std::env::var("ENGINE_SEED").map_or(1, |seed| seed.parse().unwrap());
    eprintln!("seed {seed}; repeat with ENGINE_SEED={seed}");
    let mut rng = Rng::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    for n in 1..=30 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
    }
    let journal = newest_journal(dir.path());
    let durable_end = journal::scan(&journal, None).unwrap().end as usize;
    for n in 31..=60 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
    }
    let end = journal::scan(&journal, None).unwrap().end as usize;
    let mut found = Vec::new();
    for round in 0..40 {
        let crashed = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), crashed.path());
        let journal = newest_journal(crashed.path());
        let mut bytes = fs::read(&journal).unwrap();
        match round % 3 {
            // the file was not extended
            0 => bytes.truncate(durable_end + rng.below((end - durable_end) as u64) as usize),
            // sectors were not written
            1 => {
                for sector in durable_end.div_ceil(SECTOR)..end.div_ceil(SECTOR) {
                    if rng.one_in(20) {
                        bytes[sector * SECTOR..(sector + 1) * SECTOR].fill(0);
                    }
                }
            }
            // or hold what was on the disk before
            _ => {
                let sectors = (end / SECTOR - durable_end.div_ceil(SECTOR)) as u64;
                let at = (durable_end.div_ceil(SECTOR) + rng.below(sectors) as usize) * SECTOR;
                bytes[at..at + SECTOR].copy_from_slice(&rng.bytes(SECTOR));
            }
        }
        fs::write(&journal, bytes).unwrap();
        let context = format!("seed {seed}, round {round}");
        let n = check_numbered(&open(crashed.path()), &context);
        assert!((30..=60).contains(&n), "{context}: batch {n} is the last");
        found.push(n);
        // and goes on
        let engine = open(crashed.path());
        engine.commit(&numbered(n + 1), Durability::Durable).unwrap();
        drop(engine);
        assert_eq!(check_numbered(&open(crashed.path()), &context), n + 1);
    }
    found.sort_unstable();
    found.dedup();
    assert!(found.len() > 10, "seed {seed}: only {found:?}");
}

/// Memtables that are sealed while earlier ones are written get into the same tables: a power loss must
/// not take their batches from the journal only.
#[test]
fn what_is_written_to_tables_is_synced_before() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    let tables = &engine.shared.tables;
    let (first, last) = (&tables[0], &tables[tables.len() - 1]);
    let written = first.tree.get_flush_lock();
    let journal = newest_journal(dir.path());
    let padding = Bytes::from(Rng::new(5).bytes(20 << 10));
    let mut ends = vec![0];
    let mut commit_until_sealed = |count: usize| {
        let key = &tables[position(Table::Key)];
        while key.sealed_memtable_count() < count {
            let mut batch = numbered(ends.len() as u64);
            for table in Table::ALL.into_iter().filter(|table| *table != Table::Key) {
                batch.put(table, "padding", padding.clone());
            }
            engine.commit(&batch, Durability::Buffered).unwrap();
            ends.push(journal::scan(&journal, None).unwrap().end);
        }
        ends.len() as u64 - 1
    };
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            thread::yield_now();
        }
    };
    let durable = || engine.shared.mark.lock().state().durable;
    let sealed = commit_until_sealed(1);
    wait("the first generation is not synced", &|| durable() >= sealed);
    commit_until_sealed(2);
    // both are written now, to all tables but the last
    let unwritten = last.tree.get_flush_lock();
    drop(written);
    wait("the tables are not written", &|| {
        tables[..tables.len() - 1].iter().all(|table| table.sealed_memtable_count() == 0)
    });
    let synced = durable();
    let crashed = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), crashed.path());
    drop(unwritten);
    let journal = newest_journal(crashed.path());
    File::options().write(true).open(journal).unwrap().set_len(ends[synced as usize]).unwrap();
    assert_eq!(check_numbered(&open_small(crashed.path()), "after power loss"), synced);
}

/// fjall itself would drop the damaged batch and all behind it without a word.
#[test]
fn damage_in_the_middle_of_the_journal_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    for n in 1..=40 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
    }
    let journal = newest_journal(dir.path());
    let ends = batch_ends(&journal);
    assert!(ends.len() >= 40, "{} batches", ends.len());
    for (at, &(from, number)) in ends.iter().enumerate().rev().skip(1).step_by(6) {
        let damaged = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), damaged.path());
        let journal = newest_journal(damaged.path());
        let file = File::options().read(true).write(true).open(&journal).unwrap();
        let mut byte = [0];
        let middle = (from + ends[at + 1].0) / 2;
        file.read_exact_at(&mut byte, middle).unwrap();
        file.write_all_at(&[byte[0] ^ 4], middle).unwrap();
        let tail = fs::read(&journal).unwrap().split_off(from as usize);
        // of an opening that was killed
        fs::write(damaged.path().join(DAMAGED_NEW), "half").unwrap();
        for _ in 0..2 {
            let error = error_of(damaged.path());
            assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
            let text = error.to_string();
            let last = number.unwrap_or(0);
            assert!(
                text.contains(&format!("batch {last} is the last one, but batch 40 was durable")),
                "{text}"
            );
        }
        assert!(fs::read(damaged.path().join(DAMAGED)).unwrap() == tail);
        assert!(!damaged.path().join(DAMAGED_NEW).exists());
    }
    drop(engine);
    assert_eq!(check_numbered(&open(dir.path()), "the original"), 40);
}

#[test]
fn damaged_sealed_journals_and_gaps_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    for n in 1..=10 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
    }
    let journal = newest_journal(dir.path());
    let ends = batch_ends(&journal);
    let bytes = fs::read(&journal).unwrap();
    drop(engine);
    let (id, path) = journal::list(&dir.path().join(FJALL)).unwrap().pop().unwrap();
    // a later journal makes this one a sealed one
    let first = ends[5].0 as usize;
    fs::write(journal::at(&dir.path().join(FJALL), id + 1), &bytes[first..]).unwrap();
    let mut sealed = bytes[..first].to_vec();
    sealed[first - 100] ^= 1;
    fs::write(&path, &sealed).unwrap();
    let error = error_of(dir.path());
    assert!(matches!(&error, EngineError::Corrupt { at, .. } if *at == path.display().to_string()));
    // one batch is missing between them
    fs::write(&path, &bytes[..ends[4].0 as usize]).unwrap();
    let error = error_of(dir.path());
    assert!(matches!(&error, EngineError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("follows batch"), "{error}");
    // both whole
    fs::write(&path, &bytes[..first]).unwrap();
    fs::write(journal::at(&dir.path().join(FJALL), id + 1), &bytes[first..]).unwrap();
    assert_eq!(check_numbered(&open(dir.path()), "two journals"), 10);
}

#[test]
fn missing_files_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    for n in 1..=10 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
    }
    engine.reclaim().unwrap();
    drop(engine);
    let without = |what: &dyn Fn(&Path)| {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(dir.path(), copy.path());
        what(copy.path());
        error_of(copy.path())
    };
    let error = without(&|dir| fs::remove_dir_all(dir.join(FJALL)).unwrap());
    assert!(error.to_string().contains("fjall is missing"), "{error}");
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
    let error = without(&|dir| fs::remove_file(dir.join(MARK)).unwrap());
    assert!(error.to_string().contains("mark"), "{error}");
    let error = without(&|dir| fs::write(dir.join(MARK), [7; 1024]).unwrap());
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
    let error = without(&|dir| fs::remove_file(dir.join(FJALL).join("version")).unwrap());
    assert!(error.to_string().contains("not a fjall database"), "{error}");
    let error = without(&|dir| fs::create_dir(dir.join(FJALL).join("keyspaces/mine")).unwrap());
    assert!(error.to_string().contains("keyspaces/mine"), "{error}");
    let error = without(&|dir| fs::write(dir.join(FJALL).join("x.jnl"), "").unwrap());
    assert!(error.to_string().contains("x.jnl"), "{error}");
    // the tables of the largest tree
    let error = without(&|dir| {
        let tables = dir.join(FJALL).join(format!("keyspaces/{}/tables", 2 + position(Table::Key)));
        for table in fs::read_dir(tables).unwrap() {
            fs::remove_file(table.unwrap().path()).unwrap();
        }
    });
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
    assert_eq!(check_numbered(&open(dir.path()), "the original"), 10);
}

#[test]
fn the_beginning_of_a_journal_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut big = Batch::default();
    big.put(Table::Lease, "big", Rng::new(9).bytes(1 << 20));
    for n in 1..=20 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
        engine.commit(&big, Durability::Buffered).unwrap();
    }
    let journal = newest_journal(dir.path());
    let occupied = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        path.metadata().unwrap().blocks() * 512
    };
    assert!(occupied(&journal) > 20 << 20);
    let before = journal::scan(&journal, None).unwrap();
    engine.reclaim().unwrap();
    assert_eq!(newest_journal(dir.path()), journal);
    assert!(occupied(&journal) < 1 << 20, "{} bytes are left", occupied(&journal));
    let after = journal::scan(&journal, None).unwrap();
    assert_eq!(after.damage, None);
    assert!(after.end > before.end && after.last > before.last, "{before:?} to {after:?}");
    for n in 21..=25 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
    }
    let copy = tempfile::tempdir().unwrap();
    copy_dir(dir.path(), copy.path());
    assert_eq!(check_numbered(&open(copy.path()), "the copy"), 25);

    // a crash in the midst of it: it is done again before anybody reads the journal
    let end = journal::scan(&journal, None).unwrap();
    drop(engine);
    let fill = Fill { journal: 0, end: before.end, number: before.last.unwrap() };
    assert_eq!(newest_journal(dir.path()), journal::at(&dir.path().join(FJALL), 0));
    Mark::open(&dir.path().join(MARK)).unwrap().fill(Some(fill)).unwrap();
    let file = File::options().write(true).open(&journal).unwrap();
    file.write_all_at(&[0xaa; 50_000], 4 << 20).unwrap();
    file.write_all_at(&[0; 100], 0).unwrap();
    assert!(journal::scan(&journal, None).unwrap().damage.is_some());
    let engine = open(dir.path());
    assert_eq!(check_numbered(&engine, "filled again"), 25);
    assert_eq!(journal::scan(&journal, None).unwrap(), Scan { damage: None, ..end });
    assert_eq!(engine.shared.mark.lock().state().fill, None);
}

/// Opening reads all journals, so they must not pile up, also when some tables are hardly written to.
#[test]
fn journals_go_once_the_tables_hold_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    engine.commit(&numbered(1), Durability::Buffered).unwrap();
    let value = Bytes::from(Rng::new(6).bytes(1 << 20));
    for n in 0..150_u64 {
        let mut batch = Batch::default();
        batch.put(Table::Lease, (n % 5).to_be_bytes().to_vec(), value.clone());
        engine.commit(&batch, Durability::Buffered).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let journals = journal::list(&dir.path().join(FJALL)).unwrap();
        if journals.len() == 1 && journals[0].0 > 0 {
            break;
        }
        assert!(Instant::now() < deadline, "still there: {journals:?}");
        // what brings it about comes with writes
        engine.commit(&numbered(1), Durability::Buffered).unwrap();
        thread::yield_now();
    }
    // nothing of it is lost
    let copy = tempfile::tempdir().unwrap();
    drop(engine);
    copy_dir(dir.path(), copy.path());
    let engine = open(copy.path());
    assert_eq!(check_numbered(&engine, "reopened"), 1);
    let view = engine.view().unwrap();
    let mut rows = 0;
    view.scan(Table::Lease, Bound::Unbounded, Bound::Unbounded, &mut |_, found| {
        assert!(found == value);
        rows += 1;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(rows, 5);
}

#[test]
fn compressed_tables_take_less() {
    let filled = |compression| {
        let dir = tempfile::tempdir().unwrap();
        let engine = Fjall::open(dir.path(), &options(&[(COMPRESSION, compression)])).unwrap();
        let mut batch = Batch::default();
        for n in 0..10_000_u64 {
            batch.put(Table::Key, n.to_be_bytes().to_vec(), format!("{n:0400}"));
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
        let size = engine.reclaim().unwrap().after;
        assert!(engine.size_in_use().unwrap() <= engine.size().unwrap());
        let found = engine.view().unwrap().get(Table::Key, &77_u64.to_be_bytes()).unwrap();
        assert_eq!(found.unwrap(), format!("{:0400}", 77));
        size
    };
    let (none, lz4) = (filled("none"), filled("lz4"));
    assert!(lz4 < none / 4, "{lz4} bytes against {none}");
}

#[test]
fn space_really_returns() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    let key = |n: u64| n.to_be_bytes().to_vec();
    let mut rng = Rng::new(4);
    for chunk in 0..40 {
        let mut batch = Batch::default();
        for n in chunk * 1_000..(chunk + 1) * 1_000 {
            batch.put(Table::Key, key(n), rng.bytes(1_000));
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
    }
    let full = engine.reclaim().unwrap().after;
    assert!((40_000_000..44_000_000).contains(&full), "{full} bytes for 40 MB of rows");
    for chunk in 0..20 {
        let mut batch = Batch::default();
        for n in chunk * 1_000..(chunk + 1) * 1_000 {
            batch.delete(Table::Key, key(n));
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
    }
    let half = engine.reclaim().unwrap().after;
    assert!(half < full * 6 / 10, "{half} bytes of {full} after half is deleted");
    // a view keeps what it needs, and lets it go
    let view = engine.view().unwrap();
    let mut batch = Batch::default();
    for n in 20_000..40_000 {
        batch.delete(Table::Key, key(n));
    }
    engine.commit(&batch, Durability::Buffered).unwrap();
    let held = engine.reclaim().unwrap().after;
    assert!(held > half * 9 / 10, "{held} bytes of {half} while a view is open");
    assert!(view.get(Table::Key, &key(30_000)).unwrap().is_some());
    drop(view);
    let empty = engine.reclaim().unwrap().after;
    assert!(empty < 1 << 20, "{empty} bytes for no rows");
}

/// Commits that go on seal more all the time.
#[test]
fn what_is_sealed_later_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    let key = &engine.shared.tables[position(Table::Key)];
    let mut n = 0;
    let mut commit_until = |done: &dyn Fn() -> bool| {
        while !done() {
            n += 1;
            engine.commit(&numbered(n), Durability::Buffered).unwrap();
        }
    };
    let written = key.tree.get_flush_lock();
    commit_until(&|| key.sealed_memtable_count() > 0);
    thread::scope(|scope| {
        let waits = scope.spawn(|| engine.shared.wait_until_flushed());
        // it has begun to wait, or does so later and finds nothing
        thread::sleep(Duration::from_millis(50));
        drop(written);
        let ever_sealed = || waits.is_finished();
        commit_until(&ever_sealed);
        waits.join().unwrap().unwrap();
    });
}

#[test]
fn a_cancelled_reclaim_answers_so_and_the_engine_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    engine.commit(&numbered(1), Durability::Buffered).unwrap();
    let tree = &engine.shared.tables[position(Table::Key)].tree;
    // its tables cannot be written, so it waits
    let written = tree.get_flush_lock();
    thread::scope(|scope| {
        let reclaim = scope.spawn(|| engine.reclaim());
        // a call before it has begun does not count
        while !reclaim.is_finished() {
            engine.cancel_reclaim();
            thread::sleep(Duration::from_millis(1));
        }
        let error = reclaim.join().unwrap().unwrap_err();
        assert!(matches!(error, EngineError::Cancelled), "{error}");
    });
    drop(written);
    engine.commit(&numbered(2), Durability::Durable).unwrap();
    engine.reclaim().unwrap();
    assert_eq!(check_numbered(&engine, "after the next reclaim"), 2);
}

/// Tables are not looked at for it.
#[test]
fn the_size_follows_the_files() {
    let dir = tempfile::tempdir().unwrap();
    // small tables of our own tree are written and compacted by fjall at its own time
    let check = |engine: &Fjall| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (size, files) = (engine.size().unwrap(), space::occupied(dir.path()).unwrap());
            if size.abs_diff(files) < 64 << 10 {
                break;
            }
            assert!(Instant::now() < deadline, "{size} bytes, but the files have {files}");
            thread::sleep(Duration::from_millis(5));
        }
    };
    let engine = open_small(dir.path());
    let value = Bytes::from(Rng::new(3).bytes(50_000));
    for n in 0..60_u64 {
        let mut batch = Batch::default();
        batch.put(Table::Key, n.to_be_bytes().to_vec(), value.clone());
        engine.commit(&batch, Durability::Buffered).unwrap();
    }
    engine.shared.wait_until_flushed().unwrap();
    check(&engine);
    assert!(engine.shared.tables_bytes.load(Ordering::Relaxed) > 2_000_000);
    let after = engine.reclaim().unwrap().after;
    assert!(engine.size().unwrap().abs_diff(after) < 64 << 10);
    drop(engine);
    check(&open_small(dir.path()));
}

#[test]
fn a_failed_flush_poisons_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path());
    for n in 1..=5 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
    }
    let tables = engine.shared.tables[position(Table::Key)].path().join("tables");
    let away = dir.path().join("away");
    fs::rename(&tables, &away).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut n = 5;
    let error = loop {
        assert!(Instant::now() < deadline, "no commit has failed");
        match engine.commit(&numbered(n + 1), Durability::Buffered) {
            Ok(()) => n += 1,
            Err(error) => break error,
        }
    };
    let text = error.to_string();
    assert!(matches!(error, EngineError::Poisoned(_)), "{text}");
    assert!(
        text.contains(&*dir.path().to_string_lossy()) && text.contains("No such file"),
        "{text}"
    );
    for again in [
        engine.commit(&Batch::default(), Durability::Durable).unwrap_err(),
        engine.view().err().unwrap(),
        engine.reclaim().unwrap_err(),
        engine.size_in_use().unwrap_err(),
    ] {
        assert!(matches!(again, EngineError::Poisoned(_)), "{again}");
    }
    drop(engine);
    fs::rename(&away, &tables).unwrap();
    assert_eq!(check_numbered(&open(dir.path()), "reopened"), n);
}

#[test]
fn a_panic_in_a_thread_poisons() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let shared = Arc::clone(&engine.shared);
    let thread = thread::spawn(move || {
        let _guard = PoisonOnPanic(&shared);
        panic!("asked for");
    });
    assert!(thread.join().is_err());
    let error = engine.commit(&numbered(1), Durability::Buffered).unwrap_err();
    assert!(matches!(error, EngineError::Poisoned(_)), "{error}");
    assert!(error.to_string().contains("panicked"), "{error}");
}

#[test]
fn a_full_disk_names_itself() {
    // fjall's thread only says that it failed; whether the disk is full is looked up
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let text = engine.shared.convert("write to", fjall::Error::Poisoned).to_string();
    assert!(text.contains("a thread of fjall has failed"), "{text}");
    assert!(!dir.path().join("probe").exists());
    std::os::unix::fs::symlink("/dev/full", dir.path().join("probe")).unwrap();
    let error = engine.shared.convert("write to", fjall::Error::Poisoned);
    assert!(
        matches!(&error, EngineError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull),
        "{error}"
    );
}

#[test]
fn second_opening_is_refused_and_the_next_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    for n in 1..=5 {
        let engine = open(dir.path());
        match error_of(dir.path()) {
            EngineError::Unusable(what) => {
                assert!(what.contains(&*dir.path().to_string_lossy()), "{what}");
                assert!(what.contains("in use"), "{what}");
            }
            other => panic!("{other}"),
        }
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
        assert_eq!(check_numbered(&engine, "reopened"), n);
    }
}

#[test]
fn dropping_ends_all_threads() {
    let names = || {
        fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .filter(|name| name.contains("fjall"))
            .count()
    };
    // other tests have threads as well, so this looks at a process of its own
    if std::env::var_os("FJALL_THREADS").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["tests::dropping_ends_all_threads", "--exact", "--test-threads=1"])
            .env("FJALL_THREADS", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // the harness names the thread of a test after it
    let before = names();
    let engine = open_small(dir.path());
    for n in 1..=1_000 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
    }
    assert_eq!(names(), before + 3);
    drop(engine);
    let deadline = Instant::now() + Duration::from_secs(10);
    while names() != before {
        // a thread that has ended is listed a little longer
        assert!(Instant::now() < deadline, "{} threads are left", names() - before);
        thread::yield_now();
    }
}

#[test]
fn unfinished_and_foreign_directories() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(NEW)).unwrap();
    fs::write(dir.path().join(NEW).join("0.jnl"), "half a journal").unwrap();
    open(dir.path()).commit(&numbered(1), Durability::Buffered).unwrap();
    assert!(!dir.path().join(NEW).exists());
    assert_eq!(check_numbered(&open(dir.path()), "reopened"), 1);

    // a first start that was killed while it made the mark
    for mark in [vec![], vec![0; 1024], vec![0; 8192]] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MARK_NEW), mark).unwrap();
        open(dir.path()).commit(&numbered(1), Durability::Durable).unwrap();
        assert!(!dir.path().join(MARK_NEW).exists());
        assert_eq!(check_numbered(&open(dir.path()), "reopened"), 1);
    }

    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FJALL), "#!/bin/sh\n").unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Unusable(_)), "{error}");
    assert!(error.to_string().contains("no directory"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    drop(fjall::Database::builder(dir.path().join(FJALL)).open().unwrap());
    Mark::create(dir.path()).unwrap();
    let error = error_of(dir.path());
    assert!(error.to_string().contains("another program"), "{error}");
}

#[test]
fn another_compression_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let lz4 = options(&[(COMPRESSION, "lz4")]);
    Fjall::open(dir.path(), &lz4).unwrap().commit(&numbered(1), Durability::Buffered).unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Unusable(_)), "{error}");
    assert!(
        error.to_string().contains("made with compression lz4, and none is asked for"),
        "{error}"
    );
    assert_eq!(check_numbered(&Fjall::open(dir.path(), &lz4).unwrap(), "reopened"), 1);
}

#[test]
fn the_longest_key_is_kept_and_a_longer_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let longest = vec![b'k'; KEY_BYTES_MAX as usize];
    let longer = vec![b'k'; KEY_BYTES_MAX as usize + 1];
    let mut batch = Batch::default();
    batch.put(Table::Key, longest.clone(), "1");
    engine.commit(&batch, Durability::Durable).unwrap();
    let mut put = Batch::default();
    put.put(Table::Key, "other", "1");
    put.put(Table::Key, longer.clone(), "1");
    let mut delete = Batch::default();
    delete.delete(Table::Key, longer.clone());
    for batch in [put, delete] {
        let error = engine.commit(&batch, Durability::Buffered).unwrap_err();
        assert!(matches!(error, EngineError::Unusable(_)), "{error}");
        assert!(error.to_string().contains("65536"), "{error}");
    }
    let check = |engine: &Fjall| {
        let view = engine.view().unwrap();
        assert_eq!(view.get(Table::Key, &longest).unwrap().unwrap(), "1");
        assert_eq!(view.get(Table::Key, &longer).unwrap(), None);
        let keys = |from: Bound<&[u8]>, to: Bound<&[u8]>| {
            let mut keys = 0;
            view.scan(Table::Key, from, to, &mut |_, _| {
                keys += 1;
                ControlFlow::Continue(())
            })
            .unwrap();
            keys
        };
        use Bound::{Excluded, Included, Unbounded};
        assert_eq!(keys(Unbounded, Unbounded), 1);
        assert_eq!(keys(Included(&longer), Unbounded), 0);
        assert_eq!(keys(Excluded(&longer), Unbounded), 0);
        assert_eq!(keys(Unbounded, Excluded(&longer)), 1);
        assert_eq!(keys(Unbounded, Included(&longer)), 1);
        assert_eq!(keys(Included(&longest), Included(&longer)), 1);
    };
    check(&engine);
    engine.reclaim().unwrap();
    check(&engine);
    drop(engine);
    check(&open(dir.path()));
}

#[test]
fn counted_rows_and_bytes_are_exact_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let kept = |engine: &Fjall| engine.writer.lock().own;
    let count = |engine: &Fjall| {
        let view = engine.view().unwrap();
        let mut own = OwnRow { number: kept(engine).number, ..OwnRow::default() };
        for table in Table::ALL {
            view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
                own.add(key.len(), value.len());
                ControlFlow::Continue(())
            })
            .unwrap();
        }
        own
    };
    let mut n = 0;
    let mut rng = Rng::new(8);
    for _ in 0..4 {
        let engine = open_small(dir.path());
        assert_eq!(kept(&engine), count(&engine));
        for _ in 0..30 {
            n += 1;
            let mut batch = numbered(n);
            // the same keys several times, absent ones, and large rows
            for _ in 0..rng.below(6) {
                let key = rng.below(20).to_be_bytes().to_vec();
                let len = rng.below(60_000) as usize;
                match rng.below(3) {
                    0 => batch.delete(Table::Auth, key),
                    _ => batch.put(Table::Auth, key, rng.bytes(len)),
                }
            }
            engine.commit(&batch, Durability::Buffered).unwrap();
            assert_eq!(kept(&engine), count(&engine));
        }
        engine.reclaim().unwrap();
        assert_eq!(kept(&engine), count(&engine));
    }
}
