use bytes::Bytes;
use std::fs;
use std::io::ErrorKind;
use std::ops::{Bound, ControlFlow};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use engine_api::Table;
use engine_conformance::{Mirror, Model, Rng};

use super::*;

mod conformance {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open(dir),
        buffered_survives_drop: true);
}

fn open(dir: &Path) -> Lmdb {
    Lmdb::open(dir, &Options::defaults(&ABOUT)).unwrap()
}

fn options(given: &[(&str, &str)]) -> Options {
    let given = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Options::new(&ABOUT, &given.collect()).unwrap()
}

fn error_of(dir: &Path) -> EngineError {
    Lmdb::open(dir, &Options::defaults(&ABOUT)).err().expect("opening fails")
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
    let len = rng.below(6_000) as usize;
    rng.bytes(len)
}

/// Checks that the engine holds exactly the batches up to some number, and answers it.
fn check_numbered(engine: &Lmdb, context: &str) -> u64 {
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

/// The data file of an engine that has made one.
fn data(dir: &Path) -> PathBuf {
    let generations = store::data_files(dir).unwrap();
    assert_eq!(generations.len(), 1, "{generations:?}");
    dir.join(data_name(generations[0]))
}

#[test]
fn random_operations_match_a_mirrored_model() {
    engine_conformance::cases::random_operations_match_the_model(|dir: &Path| {
        Mirror::new(open(dir), Model::default())
    });
}

#[test]
fn small_buffers_change_nothing() {
    let small = options(&[(BUFFER_BYTES, "65536"), (READ_AHEAD, "false")]);
    let open = |dir: &Path| Lmdb::open(dir, &small).unwrap();
    engine_conformance::cases::random_operations_with_reopening(open);
    engine_conformance::cases::commits_and_reads_go_on_during_reclaim(open);
}

/// A copy of the files of an engine that is still open is what a killed process leaves.
#[test]
fn kill_leaves_the_last_durable_commit() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let copy_holds = |expected, context: &str| {
        let copy = tempfile::tempdir().unwrap();
        for file in [dir.path().join(HEAD), data(dir.path())] {
            fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
        }
        assert_eq!(check_numbered(&open(copy.path()), context), expected, "{context}");
        // and again, now after an orderly end
        assert_eq!(check_numbered(&open(copy.path()), context), expected, "{context}");
    };
    copy_holds(0, "nothing committed");
    for n in 1..=50 {
        let durability = if n == 40 { Durability::Durable } else { Durability::Buffered };
        engine.commit(&numbered(n), durability).unwrap();
    }
    copy_holds(40, "ten buffered commits later");
    engine.reclaim().unwrap();
    engine.commit(&numbered(51), Durability::Buffered).unwrap();
    copy_holds(50, "after reclaim");
    engine.commit(&Batch::default(), Durability::Durable).unwrap();
    copy_holds(51, "after an empty durable commit");
}

/// A disk that loses power: it holds what was synced, and of what was written since any sectors, each as
/// any commit since then left it.
#[test]
fn power_loss_keeps_what_was_durable() {
    const SECTOR: usize = 512;
    let seed = std::env::var("ENGINE_SEED").map_or(1, |seed| seed.parse().unwrap());
    let mut rng = Rng::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut durable = 0;
    // the data file at the last durable commit and after each one since
    let mut images = vec![fs::read(data(dir.path())).unwrap()];
    let mut lost = 0;
    for n in 1..=400 {
        let mut batch = numbered(n);
        for _ in 0..rng.below(30) {
            // churn, so that pages are freed and reused
            let key = rng.below(50).to_be_bytes().to_vec();
            let len = rng.below(700) as usize;
            batch.put(Table::Lease, key, rng.bytes(len));
        }
        let durability = if rng.one_in(8) { Durability::Durable } else { Durability::Buffered };
        engine.commit(&batch, durability).unwrap();
        let context = format!("seed {seed}, batch {n}, {durable} was durable");
        // the head of before this commit: nothing of it was acknowledged
        if durability == Durability::Durable {
            durable = n;
            images.clear();
        }
        images.push(fs::read(data(dir.path())).unwrap());
        if rng.one_in(3) {
            engine.view().unwrap().last(Table::Lease).unwrap();
        }
        if !rng.one_in(4) {
            continue;
        }
        let longest = images.iter().map(Vec::len).max().unwrap();
        let shortest = images[0].len();
        let crashed_len = shortest + rng.below((longest - shortest) as u64 + 1) as usize;
        let mut crashed = vec![0; crashed_len];
        for (number, sector) in crashed.chunks_mut(SECTOR).enumerate() {
            let from = &images[rng.below(images.len() as u64) as usize];
            let at = number * SECTOR;
            if let Some(bytes) = from.get(at..at + sector.len()) {
                sector.copy_from_slice(bytes);
                lost += usize::from(!std::ptr::eq(from, images.last().unwrap()));
            }
        }
        let copy = tempfile::tempdir().unwrap();
        fs::copy(dir.path().join(HEAD), copy.path().join(HEAD)).unwrap();
        fs::write(copy.path().join(data(dir.path()).file_name().unwrap()), crashed).unwrap();
        let survivor = open(copy.path());
        assert_eq!(check_numbered(&survivor, &context), durable, "{context}");
        // every page is reachable, and the free ones are free
        for k in 1..=20 {
            survivor.commit(&numbered(durable + k), Durability::Durable).unwrap();
        }
        survivor.reclaim().unwrap();
        assert_eq!(check_numbered(&survivor, &context), durable + 20);
        if rng.one_in(10) {
            engine.reclaim().unwrap();
            durable = n;
            images = vec![fs::read(data(dir.path())).unwrap()];
        }
    }
    assert!(lost > 10_000, "only {lost} sectors were at stake");
}

#[test]
fn buffered_commits_become_durable_by_themselves() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = Lmdb::open(dir.path(), &options(&[(BUFFER_BYTES, "1300000")])).unwrap();
    for n in 1..=4 {
        let mut batch = numbered(n);
        batch.put(Table::Lease, "lease", vec![7; 300_000]);
        engine.commit(&batch, Durability::Buffered).unwrap();
    }
    engine.commit(&numbered(5), Durability::Buffered).unwrap();
    for file in [dir.path().join(HEAD), data(dir.path())] {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    assert_eq!(check_numbered(&open(copy.path()), "the copy"), 4);
}

#[test]
fn churn_reuses_space_also_without_durable_commits() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Lmdb::open(dir.path(), &options(&[(BUFFER_BYTES, "262144")])).unwrap();
    for n in 1..=3_000 {
        engine.commit(&numbered(n), Durability::Buffered).unwrap();
    }
    let size = engine.size().unwrap();
    assert!(size < 1 << 20, "9 MB of churn over 60 kB of rows took {size} bytes");
    assert_eq!(check_numbered(&engine, "after churn"), 3_000);
}

#[test]
fn long_keys_are_kept_and_longer_ones_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Mirror::new(open(dir.path()), Model::default());
    let mut rng = Rng::new(1);
    let mut keys = Vec::new();
    for round in 0..60 {
        let mut batch = Batch::default();
        for _ in 0..20 {
            // long common beginnings too, so that branches hold long keys
            let mut key = vec![rng.below(3) as u8; rng.below(KEY_BYTES_MAX as u64 - 8) as usize];
            key.extend_from_slice(&rng.next_u64().to_be_bytes());
            let len = rng.below(300) as usize;
            batch.put(Table::AuthRoles, key.clone(), rng.bytes(len));
            keys.push(key);
        }
        for _ in 0..rng.below(22) {
            let at = rng.below(keys.len() as u64) as usize;
            batch.delete(Table::AuthRoles, keys.swap_remove(at));
        }
        let longest = vec![round; KEY_BYTES_MAX];
        batch.put(Table::AuthUsers, longest, "value");
        engine.commit(&batch, Durability::Buffered).unwrap();
        // the mirror compares
        let view = engine.view().unwrap();
        let mut found = 0;
        view.scan(Table::AuthRoles, Bound::Unbounded, Bound::Unbounded, &mut |_, _| {
            found += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(found, keys.len());
        assert_eq!(view.last(Table::AuthUsers).unwrap().unwrap().0, vec![round; KEY_BYTES_MAX]);
    }
    let engine = open(tempfile::tempdir().unwrap().path());
    let mut batch = Batch::default();
    batch.put(Table::Auth, "a", "1");
    batch.put(Table::AuthUsers, vec![1; KEY_BYTES_MAX + 1], "value");
    let error = engine.commit(&batch, Durability::Durable).unwrap_err();
    assert!(matches!(error, EngineError::Unusable(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        "operation 1 of the batch has a key of 1983 bytes for table authUsers; engine lmdb holds at most \
         1982"
    );
    // nothing happened, and what cannot be there can be asked for and deleted
    let mut batch = Batch::default();
    batch.delete(Table::AuthUsers, vec![1; 100_000]);
    engine.commit(&batch, Durability::Durable).unwrap();
    let view = engine.view().unwrap();
    assert_eq!(view.get(Table::Auth, b"a").unwrap(), None);
    assert_eq!(view.get(Table::AuthUsers, &[1; 100_000]).unwrap(), None);
    view.scan(Table::Auth, Bound::Excluded(&[0; 100_000]), Bound::Unbounded, &mut |key, _| {
        panic!("{key:02x?} was never put")
    })
    .unwrap();
}

#[test]
fn huge_values_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let value = Bytes::from(Rng::new(1).bytes(120 << 20));
    let mut batch = Batch::default();
    batch.put(Table::Key, "huge", value.clone());
    engine.commit(&batch, Durability::Durable).unwrap();
    drop(engine);
    let engine = open(dir.path());
    assert!(engine.view().unwrap().get(Table::Key, b"huge").unwrap().unwrap() == value);
    let mut batch = Batch::default();
    batch.delete(Table::Key, "huge");
    engine.commit(&batch, Durability::Durable).unwrap();
    let reclaimed = engine.reclaim().unwrap();
    assert!(reclaimed.before > 120 << 20 && reclaimed.after < 1 << 20, "{reclaimed:?}");
}

#[test]
fn views_beyond_the_readers_are_refused_and_harm_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    engine.commit(&numbered(1), Durability::Buffered).unwrap();
    let mut views = Vec::new();
    let error = loop {
        match engine.view() {
            Ok(view) => views.push(view),
            Err(error) => break error,
        }
    };
    // one is the engine's own
    assert_eq!(views.len(), store::READERS_MAX as usize - 1);
    assert!(matches!(error, EngineError::Io { .. }), "{error:?}");
    assert!(error.to_string().ends_with("8192 views are open already"), "{error}");
    engine.commit(&numbered(2), Durability::Buffered).unwrap();
    views.pop();
    assert_eq!(check_numbered(&engine, "one view less"), 2);
    engine.commit(&numbered(3), Durability::Buffered).unwrap();
    views.clear();
    assert_eq!(check_numbered(&engine, "no views"), 3);
    engine.commit(&numbered(4), Durability::Durable).unwrap();
}

#[test]
fn full_map_is_a_full_disk_and_a_larger_one_opens_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut durable = 0;
    {
        let engine = Lmdb::open(dir.path(), &options(&[(MAP_BYTES, "1048576")])).unwrap();
        let error = (1..)
            .find_map(|n| {
                let mut batch = numbered(n);
                batch.put(Table::Lease, n.to_be_bytes().to_vec(), vec![1; 10_000]);
                let result = engine.commit(&batch, Durability::Durable);
                durable = n - 1;
                result.err()
            })
            .unwrap();
        match &error {
            EngineError::Io { what, source } => {
                assert!(what.contains(&*dir.path().to_string_lossy()), "{what}");
                assert_eq!(source.kind(), ErrorKind::StorageFull, "{source}");
                assert!(source.to_string().contains(MAP_BYTES), "{source}");
            }
            other => panic!("{other}"),
        }
        for durability in [Durability::Buffered, Durability::Durable] {
            let error = engine.commit(&numbered(99), durability).unwrap_err();
            assert!(matches!(error, EngineError::Poisoned(_)), "{error}");
        }
        assert!(matches!(engine.view().err(), Some(EngineError::Poisoned(_))));
        assert!(matches!(engine.reclaim(), Err(EngineError::Poisoned(_))));
    }
    assert!(durable > 20, "only {durable} batches fitted");
    let engine = open(dir.path());
    assert_eq!(check_numbered(&engine, "a larger map"), durable);
    engine.commit(&numbered(durable + 1), Durability::Durable).unwrap();
    engine.reclaim().unwrap();
    assert_eq!(check_numbered(&engine, "a larger map"), durable + 1);
}

/// Of a write that has room for a part only, LMDB says no more than that it failed.
fn is_full(error: &io::Error) -> bool {
    const EIO: i32 = 5;
    error.kind() == ErrorKind::FileTooLarge || error.raw_os_error() == Some(EIO)
}

const CHILD_DIR: &str = "ENGINE_LMDB_DIR";

/// Runs the ignored test `name` in a process of its own, under the limits that `shell` sets first.
fn in_a_limited_process(name: &str, shell: &str, dir: &Path) -> String {
    let test = std::env::current_exe().unwrap();
    let output = Command::new("sh")
        .args(["-c", &format!("{shell}; exec \"$@\""), "sh"])
        .arg(test)
        .args([&format!("tests::{name}"), "--exact", "--ignored", "--nocapture"])
        .env(CHILD_DIR, dir)
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(text.contains("1 passed"), "{text}");
    text
}

/// A limit on the length of files stands for a full disk: writes beyond it fail.
#[test]
fn full_disk_stops_commits_and_keeps_what_was_durable() {
    let dir = tempfile::tempdir().unwrap();
    let text = in_a_limited_process(
        "write_until_the_disk_is_full",
        "trap '' XFSZ; ulimit -f 2000",
        dir.path(),
    );
    let durable = text.split_once("durable: ").expect("the writer's last line").1;
    let durable: u64 = durable.split_whitespace().next().unwrap().parse().unwrap();
    assert!(durable > 5);
    let engine = open(dir.path());
    assert_eq!(check_numbered(&engine, "a disk with room"), durable);
    engine.commit(&numbered(durable + 1), Durability::Durable).unwrap();
}

#[test]
#[ignore = "started by full_disk_stops_commits_and_keeps_what_was_durable"]
fn write_until_the_disk_is_full() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let engine = open(Path::new(&dir));
    let mut n = 0;
    let error = loop {
        let mut batch = numbered(n + 1);
        batch.put(Table::Lease, n.to_be_bytes().to_vec(), vec![1; 10_000]);
        match engine.commit(&batch, Durability::Durable) {
            Ok(()) => n += 1,
            Err(error) => break error,
        }
        if n == 5 {
            engine.reclaim().unwrap();
        }
    };
    match &error {
        EngineError::Io { what, source } => {
            assert!(what.contains("/data-"), "{what}");
            assert!(is_full(source), "{source}");
        }
        other => panic!("{other}"),
    }
    let error = engine.commit(&numbered(n + 1), Durability::Buffered).unwrap_err();
    assert!(matches!(error, EngineError::Poisoned(_)), "{error}");
    println!("durable: {n}");
}

/// A hole in it would be filled through a map, where a full disk ends the process.
#[test]
fn lock_file_has_all_that_lmdb_wants_and_no_hole() {
    let dir = tempfile::tempdir().unwrap();
    let synced = |path: &Path| {
        let file = File::open(path).unwrap();
        // blocks may be assigned late
        file.sync_all().unwrap();
        file.metadata().unwrap()
    };
    // some file systems keep no zeros
    let filled = dir.path().join("filled");
    fs::write(&filled, vec![0; (store::READERS_MAX as usize + 2) * 64]).unwrap();
    let filled = synced(&filled);
    let check = |context: &str| {
        let mut path = data(dir.path()).into_os_string();
        path.push("-lock");
        let lock = synced(Path::new(&path));
        assert_eq!(lock.len(), filled.len(), "{context}");
        assert!(lock.blocks() >= filled.blocks(), "{context}: {} blocks", lock.blocks());
        assert_eq!(lock.mode() & 0o777, 0o600, "{context}");
    };
    let engine = open(dir.path());
    check("new");
    engine.reclaim().unwrap();
    check("after reclaim");
    drop(engine);
    let _engine = open(dir.path());
    check("reopened");
}

#[test]
fn disk_too_full_for_the_lock_file_is_told() {
    let dir = tempfile::tempdir().unwrap();
    // in blocks of 512 bytes or of 1024: either way less than the lock file
    in_a_limited_process("opening_lacks_room", "trap '' XFSZ; ulimit -f 300", dir.path());
    let engine = open(dir.path());
    engine.commit(&numbered(1), Durability::Durable).unwrap();
    drop(engine);
    in_a_limited_process("opening_lacks_room", "trap '' XFSZ; ulimit -f 300", dir.path());
    assert_eq!(check_numbered(&open(dir.path()), "a disk with room"), 1);
}

#[test]
#[ignore = "started by disk_too_full_for_the_lock_file_is_told"]
fn opening_lacks_room() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    for _ in 0..2 {
        match error_of(Path::new(&dir)) {
            EngineError::Io { what, source } => {
                assert!(what.ends_with(".mdb-lock"), "{what}");
                assert!(is_full(&source), "{source}");
            }
            other => panic!("{other}"),
        }
        let left = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = left.collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().ends_with("-lock")), "{left:?}");
    }
}

#[test]
fn reclaim_on_a_full_disk_leaves_the_engine_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        for n in 1..=30 {
            engine.commit(&numbered(n), Durability::Buffered).unwrap();
        }
        let mut batch = Batch::default();
        batch.put(Table::Lease, "large", vec![1; 6 << 20]);
        engine.commit(&batch, Durability::Durable).unwrap();
    }
    in_a_limited_process("reclaim_fails", "trap '' XFSZ; ulimit -f 2000", dir.path());
    assert_eq!(check_numbered(&open(dir.path()), "afterwards"), 31);
}

#[test]
#[ignore = "started by reclaim_on_a_full_disk_leaves_the_engine_as_it_was"]
fn reclaim_fails() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let engine = open(Path::new(&dir));
    for _ in 0..2 {
        match engine.reclaim().unwrap_err() {
            EngineError::Io { what, source } => {
                assert!(what.contains("/data-"), "{what}");
                assert!(is_full(&source), "{source}");
            }
            other => panic!("{other}"),
        }
        // and no copy is left
        data(Path::new(&dir));
    }
    // within the part of the file that is there
    engine.commit(&numbered(31), Durability::Durable).unwrap();
    assert_eq!(check_numbered(&engine, "after reclaim"), 31);
}

#[test]
fn too_little_address_space_is_told() {
    let dir = tempfile::tempdir().unwrap();
    in_a_limited_process("opening_lacks_address_space", "ulimit -v 4000000", dir.path());
    assert_eq!(check_numbered(&open(dir.path()), "without a limit"), 1);
}

#[test]
#[ignore = "started by too_little_address_space_is_told"]
fn opening_lacks_address_space() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let dir = Path::new(&dir);
    let error = error_of(dir);
    assert!(matches!(error, EngineError::Unusable(_)), "{error:?}");
    assert!(error.to_string().contains("1099511627776 bytes of address space"), "{error}");
    assert!(error.to_string().contains("map-bytes"), "{error}");
    let engine = Lmdb::open(dir, &options(&[(MAP_BYTES, "1073741824")])).unwrap();
    engine.commit(&numbered(1), Durability::Durable).unwrap();
}

#[test]
fn reclaim_that_cannot_create_its_file_leaves_the_engine_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    engine.commit(&numbered(1), Durability::Buffered).unwrap();
    let next = dir.path().join(data_name(engine.writer.lock().generation + 1));
    fs::create_dir(&next).unwrap();
    let error = engine.reclaim().unwrap_err();
    assert!(error.to_string().contains(&next.display().to_string()), "{error}");
    engine.commit(&numbered(2), Durability::Durable).unwrap();
    fs::remove_dir(&next).unwrap();
    engine.reclaim().unwrap();
    assert_eq!(check_numbered(&engine, "after reclaim"), 2);
}

#[test]
fn files_of_unfinished_work_are_removed_on_opening() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        engine.commit(&numbered(1), Durability::Buffered).unwrap();
        engine.reclaim().unwrap();
    }
    let strays = ["new.mdb", "new.mdb-lock", "data-1.mdb", "data-3.mdb", "data-3.mdb-lock"];
    for name in strays {
        fs::write(dir.path().join(name), "half a file").unwrap();
    }
    let engine = open(dir.path());
    for name in strays {
        assert!(!dir.path().join(name).exists(), "{name} is left");
    }
    assert_eq!(check_numbered(&engine, "reopened"), 1);
}

#[test]
fn crash_in_the_first_opening_starts_again_and_a_lost_head_does_not() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let head = dir.path().join(HEAD);
    fs::remove_file(&head).unwrap();
    fs::write(dir.path().join("new.mdb"), "half a file").unwrap();
    let engine = open(dir.path());
    engine.commit(&numbered(1), Durability::Durable).unwrap();
    drop(engine);
    assert_eq!(check_numbered(&open(dir.path()), "reopened"), 1);
    fs::remove_file(&head).unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Corrupt { .. }), "{error:?}");
    assert!(error.to_string().contains("the file is missing, but"), "{error}");
    assert!(error.to_string().contains(&head.display().to_string()), "{error}");
}

/// After a reclaim the state before the newest one is of a file that is gone.
#[test]
fn damaged_head_never_costs_the_data_file() {
    const SLOT_EVERY: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        engine.commit(&numbered(1), Durability::Durable).unwrap();
        engine.reclaim().unwrap();
    }
    let kept = data(dir.path());
    let whole = fs::read(dir.path().join(HEAD)).unwrap();
    let sequence = |slot: u64| {
        let at = (slot * SLOT_EVERY + 8) as usize;
        u64::from_le_bytes(whole[at..at + 8].try_into().unwrap())
    };
    let first = if sequence(0) > sequence(2) { 0 } else { 2 };
    let damage = |slots: &[u64]| {
        let mut damaged = whole.clone();
        for slot in slots {
            damaged[(slot * SLOT_EVERY + 20) as usize] ^= 1;
        }
        fs::write(dir.path().join(HEAD), damaged).unwrap();
    };
    for slot in [first, first + 1] {
        damage(&[slot]);
        assert_eq!(check_numbered(&open(dir.path()), "one slot damaged"), 1);
    }
    damage(&[first, first + 1]);
    let error = error_of(dir.path());
    assert!(error.to_string().contains("the data file is missing"), "{error}");
    assert_eq!(data(dir.path()), kept);
    fs::write(dir.path().join(HEAD), &whole).unwrap();
    assert_eq!(check_numbered(&open(dir.path()), "the head put back"), 1);
}

/// As when a member installs a database that it was sent, while readers are still at the old one.
#[test]
fn another_directory_can_take_the_path_of_one_that_is_open() {
    let parent = tempfile::tempdir().unwrap();
    let [place, aside, other] = ["engine", "aside", "other"].map(|name| parent.path().join(name));
    let old = open(&place);
    old.commit(&numbered(1), Durability::Buffered).unwrap();
    let view = old.view().unwrap();
    {
        let new = open(&other);
        for n in 1..=2 {
            new.commit(&numbered(n), Durability::Buffered).unwrap();
        }
    }
    fs::rename(&place, &aside).unwrap();
    fs::rename(&other, &place).unwrap();
    let new = open(&place);
    assert_eq!(check_numbered(&new, "the new one"), 2);
    assert_eq!(check_numbered(&old, "the old one"), 1);
    fs::remove_dir_all(&aside).unwrap();
    assert_eq!(view.get(Table::Key, &1_u64.to_be_bytes()).unwrap().unwrap(), row(1));
    drop(view);
    drop(old);
    new.commit(&numbered(3), Durability::Buffered).unwrap();
    drop(new);
    assert_eq!(check_numbered(&open(&place), "reopened"), 3);
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
fn damaged_foreign_and_older_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        for n in 1..=30 {
            engine.commit(&numbered(n), Durability::Durable).unwrap();
        }
    }
    let data = data(dir.path());
    let whole = fs::read(&data).unwrap();
    let expect = |what: &str, text: &str| {
        let error = error_of(dir.path());
        assert!(matches!(&error, EngineError::Corrupt { .. }), "{what}: {error:?}");
        let error = error.to_string();
        assert!(error.contains(&data.display().to_string()), "{what}: {error}");
        assert!(error.contains(text), "{what}: {error}");
    };
    for len in [0, 9, 100, 4_096, 8_192, whole.len() / 2, whole.len() - 4_096, whole.len() - 1] {
        fs::write(&data, &whole[..len]).unwrap();
        expect("cut", &format!("the file has {len} bytes; {} of them were durable", whole.len()));
    }
    for (from, text) in [(0, "byte 0"), (4_096, "byte 4096")] {
        fs::write(&data, &whole).unwrap();
        let file = File::options().write(true).open(&data).unwrap();
        file.write_all_at(&[0xa5; 512], from).unwrap();
        expect("overwritten", text);
    }
    fs::write(&data, vec![b'#'; whole.len()]).unwrap();
    expect("another program's", "LMDB's mark is missing");
    fs::remove_file(&data).unwrap();
    expect("removed", "the data file is missing");

    // the file as it was some commits ago, as a partial restore from a backup leaves it
    fs::write(&data, &whole).unwrap();
    {
        let engine = open(dir.path());
        assert_eq!(check_numbered(&engine, "the whole file"), 30);
        for n in 31..=33 {
            engine.commit(&numbered(n), Durability::Durable).unwrap();
        }
    }
    let mut older = whole;
    older.resize(fs::metadata(&data).unwrap().len() as usize, 0);
    fs::write(&data, older).unwrap();
    expect("older", "the file ends with transaction");
}

#[test]
fn sizes_count_pages() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut batch = Batch::default();
    for n in 0..1_000_u64 {
        batch.put(Table::Key, n.to_be_bytes().to_vec(), vec![1; 4_000]);
    }
    engine.commit(&batch, Durability::Durable).unwrap();
    let (size, in_use) = (engine.size().unwrap(), engine.size_in_use().unwrap());
    assert!((4_000_000..5_000_000).contains(&in_use), "{in_use} bytes in use");
    assert!((in_use..in_use + (1 << 19)).contains(&size), "{size} bytes, {in_use} in use");
    let mut batch = Batch::default();
    for n in 0..1_000_u64 {
        batch.delete(Table::Key, n.to_be_bytes().to_vec());
    }
    engine.commit(&batch, Durability::Durable).unwrap();
    assert!(engine.size_in_use().unwrap() < 1 << 17);
    assert!(engine.size().unwrap() >= size);
    assert!(engine.reclaim().unwrap().after < 1 << 18);
}
