use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine_conformance::{Mirror, Model, Rng, undisturbed};

use super::*;
use crate::disk::faults::{self, DiskOp};

mod conformance {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open(dir),
        buffered_survives_drop: true);
}

fn open(dir: &Path) -> Redb {
    undisturbed(|dir: &Path| Redb::open(dir, &Options::defaults(&ABOUT)).unwrap())(dir)
}

/// The least cache, so that pages spill.
fn small() -> Options {
    Options::new(&ABOUT, &[(CACHE_BYTES.to_owned(), (1 << 20).to_string())].into()).unwrap()
}

fn error_of(dir: &Path) -> EngineError {
    undisturbed(|dir: &Path| Redb::open(dir, &Options::defaults(&ABOUT)).err())(dir)
        .expect("opening fails")
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
fn check_numbered(engine: &Redb, context: &str) -> u64 {
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

#[test]
fn random_operations_match_a_mirrored_model() {
    engine_conformance::cases::random_operations_match_the_model(|dir: &Path| {
        Mirror::new(open(dir), Model::default())
    });
}

#[test]
fn small_caches_change_nothing() {
    engine_conformance::cases::commits_and_reads_go_on_during_reclaim(|dir: &Path| {
        Redb::open(dir, &small()).unwrap()
    });
}

/// A copy of the file of an engine that is still open is what a killed process leaves.
#[test]
fn opening_after_a_kill_walks_nothing_and_finds_the_last_durable_commit() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = open(dir.path());
    for n in 1..=50 {
        let durability = if n == 40 { Durability::Durable } else { Durability::Buffered };
        engine.commit(&numbered(n), durability).unwrap();
    }
    fs::copy(dir.path().join(DATA), copy.path().join(DATA)).unwrap();
    let copied = open(copy.path());
    assert!(!copied.repaired(), "opening has walked the file");
    assert_eq!(check_numbered(&copied, "the copy"), 40);

    // the same after space was reclaimed, and some more commits
    engine.reclaim().unwrap();
    fs::copy(dir.path().join(DATA), copy.path().join("reclaimed")).unwrap();
    engine.commit(&numbered(51), Durability::Buffered).unwrap();
    drop(copied);
    fs::rename(copy.path().join("reclaimed"), copy.path().join(DATA)).unwrap();
    let copied = open(copy.path());
    assert!(!copied.repaired(), "opening has walked the reclaimed file");
    assert_eq!(check_numbered(&copied, "the reclaimed copy"), 50);
}

/// A disk that loses power: it holds what was synced, and of what was written since any part, in
/// any order, torn between sectors.
#[test]
fn power_loss_keeps_what_was_durable() {
    const SECTOR: usize = 512;
    let seed = std::env::var("ENGINE_SEED").map_or(1, |seed| seed.parse().unwrap());
    let mut rng = Rng::new(seed);
    let (dir, crashed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = Redb::open(dir.path(), &small()).unwrap();
    engine.commit(&Batch::default(), Durability::Durable).unwrap();
    let base = fs::read(dir.path().join(DATA)).unwrap();
    let store = engine.store();
    let faults = &store.disk().faults;
    faults.record();
    // (operations recorded when it was acknowledged, number)
    let mut durable = vec![(0, 0)];
    for n in 1..=250 {
        let mut batch = numbered(n);
        if rng.one_in(50) {
            // beyond the cache, so that buffered pages spill into the file
            batch.put(Table::Lease, n.to_be_bytes().to_vec(), rng.bytes(900_000));
        }
        let durability = if rng.one_in(6) { Durability::Durable } else { Durability::Buffered };
        engine.commit(&batch, durability).unwrap();
        if durability == Durability::Durable {
            durable.push((faults.recorded(), n));
        }
    }
    let record = faults.take_record();
    assert!(durable.len() > 20 && record.len() > 1_000);

    let mut losses = 0;
    for round in 0..60 {
        let end = rng.below(record.len() as u64 + 1) as usize;
        let synced = record[..end].iter().rposition(|op| matches!(op, DiskOp::Sync)).unwrap_or(0);
        let mut image = base.clone();
        let write = |image: &mut Vec<u8>, offset: u64, data: &[u8]| {
            let (from, to) = (offset as usize, offset as usize + data.len());
            if image.len() < to {
                image.resize(to, 0);
            }
            image[from..to].copy_from_slice(data);
        };
        for (at, op) in record[..end].iter().enumerate() {
            let lost = at > synced && rng.one_in(2);
            match op {
                DiskOp::Write { offset, data } if at > synced => {
                    losses += 1;
                    for (sector, data) in data.chunks(SECTOR).enumerate() {
                        if !lost || rng.one_in(3) {
                            write(&mut image, offset + (sector * SECTOR) as u64, data);
                        }
                    }
                }
                DiskOp::Write { offset, data } => write(&mut image, *offset, data),
                DiskOp::SetLen(len) if !lost => image.resize(*len as usize, 0),
                DiskOp::SetLen(_) | DiskOp::Sync => {}
            }
        }
        fs::write(crashed.path().join(DATA), &image).unwrap();
        let context = format!("seed {seed}, round {round}, crash at {end} of {}", record.len());
        let survivor = Redb::open(crashed.path(), &Options::defaults(&ABOUT))
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        let n = check_numbered(&survivor, &context);
        let (_, acknowledged) = durable[durable.partition_point(|(at, _)| *at <= end) - 1];
        assert!(n >= acknowledged, "{context}: {n} is the last, {acknowledged} was durable");
        assert!(!survivor.repaired(), "{context}: opening has walked the file");
        // and it works
        survivor.commit(&numbered(n + 1), Durability::Durable).unwrap();
        assert_eq!(check_numbered(&survivor, &context), n + 1);
    }
    assert!(losses > 100, "only {losses} writes were at stake");
}

#[test]
fn full_disk_stops_commits_and_keeps_what_was_durable() {
    for writes in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let context = format!("disk full after {writes} writes");
        let mut durable = 0;
        {
            let engine = open(dir.path());
            for n in 1..=10 {
                engine.commit(&numbered(n), Durability::Durable).unwrap();
            }
            engine.store().disk().faults.fill_disk_after(writes);
            let error = (11..500)
                .find_map(|n| {
                    let result = engine.commit(&numbered(n), Durability::Durable);
                    durable = n - 1;
                    result.err()
                })
                .unwrap();
            match &error {
                EngineError::Io { what, source } => {
                    assert!(what.contains("data.redb"), "{context}: {what}");
                    assert_eq!(source.kind(), ErrorKind::StorageFull, "{context}");
                }
                other => panic!("{context}: {other}"),
            }
            for durability in [Durability::Buffered, Durability::Durable] {
                let error = engine.commit(&numbered(99), durability).unwrap_err();
                assert!(matches!(error, EngineError::Poisoned(_)), "{context}: {error}");
            }
            assert!(matches!(engine.view().err(), Some(EngineError::Poisoned(_))), "{context}");
            assert!(matches!(engine.reclaim(), Err(EngineError::Poisoned(_))), "{context}");
        }
        let n = check_numbered(&open(dir.path()), &context);
        // the failed commit may have become durable: it was not acknowledged either way
        assert!(
            n == durable || n == durable + 1,
            "{context}: {n} is the last, {durable} was durable"
        );
    }
}

#[test]
fn failed_sync_stops_commits() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        engine.commit(&numbered(1), Durability::Durable).unwrap();
        engine.store().disk().faults.fail_syncs();
        let error = engine.commit(&numbered(2), Durability::Durable).unwrap_err();
        assert!(matches!(error, EngineError::Io { .. }), "{error}");
        let error = engine.commit(&numbered(2), Durability::Durable).unwrap_err();
        assert!(error.to_string().contains("failed sync"), "{error}");
    }
    assert!(check_numbered(&open(dir.path()), "after a failed sync") >= 1);
}

#[test]
fn reclaim_on_a_full_disk_leaves_the_engine_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    for n in 1..=30 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
    }
    for writes in 0..30 {
        faults::fill_disk_of_next_file_after(writes);
        match engine.reclaim() {
            Err(EngineError::Io { what, source }) => {
                assert!(what.contains(NEW), "{what}");
                assert_eq!(source.kind(), ErrorKind::StorageFull, "{what}: {source}");
                assert!(!dir.path().join(NEW).exists(), "the copy is left");
            }
            // the file had room enough, or only redb's closing had not, which redb hides; then
            // opening has repaired it
            Ok(_) => {
                assert!(writes > 5, "reclaim did not notice a full disk after {writes} writes")
            }
            Err(other) => panic!("full after {writes} writes: {other}"),
        }
        let next = 31 + u64::from(writes);
        engine.commit(&numbered(next), Durability::Buffered).unwrap();
        assert_eq!(check_numbered(&engine, "after reclaim"), next);
    }
    drop(engine);
    assert_eq!(check_numbered(&open(dir.path()), "reopened"), 60);
}

#[test]
fn reclaim_that_cannot_create_its_file_leaves_the_engine_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    engine.commit(&numbered(1), Durability::Buffered).unwrap();
    fs::create_dir(dir.path().join(NEW)).unwrap();
    let error = engine.reclaim().unwrap_err();
    assert!(error.to_string().contains(NEW), "{error}");
    engine.commit(&numbered(2), Durability::Durable).unwrap();
    fs::remove_dir(dir.path().join(NEW)).unwrap();
    engine.reclaim().unwrap();
    assert_eq!(check_numbered(&engine, "after reclaim"), 2);
}

/// An engine with 6 MB of rows, whose reclaim copies this many MiB a second.
fn filled(dir: &Path, rate: u64) -> Redb {
    let rate = [(RECLAIM_RATE.to_owned(), rate.to_string())].into();
    let engine = Redb::open(dir, &Options::new(&ABOUT, &rate).unwrap()).unwrap();
    for n in 0..6_u64 {
        let mut batch = Batch::default();
        for row in 0..1000 {
            batch.put(Table::Key, (n * 1000 + row).to_be_bytes().to_vec(), vec![n as u8; 1000]);
        }
        engine.commit(&batch, Durability::Durable).unwrap();
    }
    engine
}

fn rows(engine: &Redb) -> usize {
    let mut rows = 0;
    let mut count = |_: &[u8], _: &[u8]| {
        rows += 1;
        ControlFlow::Continue(())
    };
    let view = engine.view().unwrap();
    view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut count).unwrap();
    rows
}

#[test]
fn reclaim_keeps_to_its_rate_and_commits_do_not_wait_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = filled(dir.path(), 4);
    let ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reclaim = scope.spawn(|| {
            let started = std::time::Instant::now();
            engine.reclaim().unwrap();
            ended.store(true, std::sync::atomic::Ordering::Release);
            started.elapsed()
        });
        let mut batches = 0_u64;
        while !ended.load(std::sync::atomic::Ordering::Acquire) {
            batches += 1;
            let mut batch = Batch::default();
            batch.put(Table::Meta, batches.to_be_bytes().to_vec(), "m");
            engine.commit(&batch, Durability::Buffered).unwrap();
            assert_eq!(
                engine.view().unwrap().get(Table::Key, &[0; 8]).unwrap().unwrap()[..],
                [0; 1000]
            );
        }
        // 6.6 MB with what each row costs, less what is copied before the first and after the last wait
        assert!(reclaim.join().unwrap().as_secs_f64() > 1.0);
        assert!(batches > 100, "{batches}");
        let view = engine.view().unwrap();
        for n in 1..=batches {
            assert!(view.get(Table::Meta, &n.to_be_bytes()).unwrap().is_some(), "{n} of {batches}");
        }
    });
    assert_eq!(rows(&engine), 6000);
}

#[test]
fn a_cancelled_reclaim_ends_soon_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = filled(dir.path(), 1);
    // one that nobody runs is not affected later
    engine.cancel_reclaim();
    std::thread::scope(|scope| {
        let reclaim = scope.spawn(|| engine.reclaim());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !dir.path().join(NEW).exists() {
            assert!(std::time::Instant::now() < deadline, "no copy is made");
            std::thread::yield_now();
        }
        let cancelled = std::time::Instant::now();
        engine.cancel_reclaim();
        let result = reclaim.join().unwrap();
        assert!(matches!(result, Err(EngineError::Cancelled)), "{result:?}");
        assert!(cancelled.elapsed().as_secs() < 5, "{:?}", cancelled.elapsed());
    });
    assert!(!dir.path().join(NEW).exists());
    assert_eq!(rows(&engine), 6000);
    engine.reclaim_alone().unwrap();
    assert_eq!(rows(&engine), 6000);
}

#[test]
fn unfinished_copy_is_removed_on_opening() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).commit(&numbered(1), Durability::Buffered).unwrap();
    fs::write(dir.path().join(NEW), "half a file").unwrap();
    let engine = open(dir.path());
    assert!(!dir.path().join(NEW).exists());
    assert_eq!(check_numbered(&engine, "reopened"), 1);
}

#[test]
fn second_opening_is_refused_also_after_reclaim() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    for _ in 0..2 {
        match error_of(dir.path()) {
            EngineError::Unusable(what) => {
                assert!(what.contains(&*dir.path().to_string_lossy()), "{what}");
                assert!(what.contains("in use"), "{what}");
            }
            other => panic!("{other}"),
        }
        engine.reclaim().unwrap();
    }
    drop(engine);
    open(dir.path());
}

#[test]
fn foreign_files_are_named() {
    let path = |dir: &Path| dir.join(DATA).display().to_string();

    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(DATA), "#!/bin/sh\necho not a database\n").unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Unusable(_)), "{error}");
    assert_eq!(error.to_string(), format!("{} is not a redb file", path(dir.path())));

    let dir = tempfile::tempdir().unwrap();
    drop(redb::Database::create(dir.path().join(DATA)).unwrap());
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Unusable(_)), "{error}");
    assert!(error.to_string().contains("another program"), "{error}");
    assert!(error.to_string().contains(&path(dir.path())), "{error}");

    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(DATA), "").unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(&path(dir.path())), "{error}");

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(DATA)).unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    assert!(error.to_string().contains(&path(dir.path())), "{error}");
}

#[test]
fn truncated_and_overwritten_files_are_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        for n in 1..=30 {
            engine.commit(&numbered(n), Durability::Durable).unwrap();
        }
    }
    let data = dir.path().join(DATA);
    let whole = fs::read(&data).unwrap();
    let name = data.display().to_string();
    let expect_corrupt = |what: &str| {
        let error = error_of(dir.path());
        assert!(
            matches!(&error, EngineError::Corrupt { at, .. } if *at == name),
            "{what}: {error:?}"
        );
    };
    for len in [9, 100, 320, 4_095, 4_096, 8_192, whole.len() / 2, whole.len() - 4_096] {
        fs::write(&data, &whole[..len]).unwrap();
        expect_corrupt(&format!("cut to {len} bytes"));
    }
    for (from, to) in [(9, 64), (64, 320), (9, 4_096)] {
        fs::write(&data, &whole).unwrap();
        let file = File::options().write(true).open(&data).unwrap();
        file.write_all_at(&vec![0xa5; to - from], from as u64).unwrap();
        expect_corrupt(&format!("bytes {from} to {to} overwritten"));
    }
}

#[test]
fn live_bytes_are_exact_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let count = |engine: &Redb| {
        let view = engine.view().unwrap();
        let mut bytes = 0;
        for table in Table::ALL {
            view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
                bytes += (key.len() + value.len() + 8) as u64;
                ControlFlow::Continue(())
            })
            .unwrap();
        }
        bytes
    };
    let mut n = 0;
    for _ in 0..5 {
        let engine = open(dir.path());
        assert_eq!(engine.store().live_bytes(), count(&engine));
        for _ in 0..30 {
            n += 1;
            engine.commit(&numbered(n), Durability::Buffered).unwrap();
            assert_eq!(engine.store().live_bytes(), count(&engine));
        }
        engine.reclaim().unwrap();
        assert_eq!(engine.store().live_bytes(), count(&engine));
    }
}
