use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};

use engine_conformance::{Mirror, Model, Rng, undisturbed};

use super::*;
use crate::disk::Disk;
use crate::format::{NO_FREELIST, PAGE_BYTES, u64_at};

mod conformance {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open(dir),
        buffered_survives_drop: true);
}

mod with_a_freelist {
    engine_conformance::suite!(|dir: &std::path::Path| crate::tests::open_small(dir, true),
        buffered_survives_drop: true);
}

fn try_open(dir: &Path, options: &Options) -> Result<Bbolt, EngineError> {
    undisturbed(|dir: &Path| Bbolt::open(dir, options))(dir)
}

fn open(dir: &Path) -> Bbolt {
    try_open(dir, &Options::defaults(&ABOUT)).unwrap()
}

/// The least cache, so that pages are written before their time and read again.
fn small(sync_freelist: bool) -> Options {
    let given = [
        (CACHE_BYTES.to_owned(), (1 << 20).to_string()),
        (SYNC_FREELIST.to_owned(), sync_freelist.to_string()),
    ];
    Options::new(&ABOUT, &given.into()).unwrap()
}

fn open_small(dir: &Path, sync_freelist: bool) -> Bbolt {
    try_open(dir, &small(sync_freelist)).unwrap()
}

fn error_of(dir: &Path) -> EngineError {
    try_open(dir, &Options::defaults(&ABOUT)).err().expect("opening fails")
}

fn seed() -> u64 {
    std::env::var("ENGINE_SEED").map_or(1, |seed| seed.parse().unwrap())
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

/// Checks that the engine holds exactly the batches up to some number, in a file that is in order, and
/// answers the number.
fn check_numbered(engine: &Bbolt, context: &str) -> u64 {
    engine.check().unwrap_or_else(|error| panic!("{context}: {error}"));
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

#[derive(Clone, Debug)]
enum DiskOp {
    Create { file: usize, path: PathBuf },
    Write { file: usize, at: u64, data: Vec<u8> },
    SetLen { file: usize, len: u64 },
    Sync { file: usize },
    Rename { from: PathBuf, to: PathBuf },
    SyncDir,
}

/// The operating system's files, with errors on demand and a record of what was done when.
struct Recorder {
    files: AtomicUsize,
    record: Mutex<Vec<DiskOp>>,
    /// Writes that still succeed before the disk is full; negative: it never is.
    writes_left: AtomicI64,
    sync_fails: AtomicBool,
    bytes_read: AtomicUsize,
    /// Whose reclaim is cancelled as soon as its file is there.
    cancels: OnceLock<Weak<Bbolt>>,
}

impl Recorder {
    fn new() -> Arc<Self> {
        Arc::new(Recorder {
            files: AtomicUsize::new(0),
            record: Mutex::default(),
            writes_left: AtomicI64::new(-1),
            sync_fails: AtomicBool::new(false),
            bytes_read: AtomicUsize::new(0),
            cancels: OnceLock::new(),
        })
    }

    fn recorded(&self) -> usize {
        self.record.lock().len()
    }
}

/// [`Recorder`] as the engine gets it.
struct Recorded(Arc<Recorder>);

struct RecordedDisk {
    disk: Box<dyn Disk>,
    file: usize,
    recorder: Arc<Recorder>,
}

impl Files for Recorded {
    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Box<dyn Disk>>> {
        let Some(disk) = OsFiles.open(path, create)? else { return Ok(None) };
        let recorder = Arc::clone(&self.0);
        if let Some(engine) = recorder.cancels.get().and_then(Weak::upgrade) {
            engine.cancel_reclaim();
        }
        let file = recorder.files.fetch_add(1, Ordering::AcqRel);
        recorder.record.lock().push(DiskOp::Create { file, path: path.to_path_buf() });
        Ok(Some(Box::new(RecordedDisk { disk, file, recorder })))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        OsFiles.rename(from, to)?;
        let (from, to) = (from.to_path_buf(), to.to_path_buf());
        self.0.record.lock().push(DiskOp::Rename { from, to });
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        OsFiles.sync_dir(dir)?;
        self.0.record.lock().push(DiskOp::SyncDir);
        Ok(())
    }
}

impl Disk for RecordedDisk {
    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let read = self.disk.read_at(buffer, at)?;
        self.recorder.bytes_read.fetch_add(read, Ordering::AcqRel);
        Ok(read)
    }

    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()> {
        let next = |left: i64| (left > 0).then(|| left - 1);
        let left = &self.recorder.writes_left;
        if left.fetch_update(Ordering::AcqRel, Ordering::Acquire, next) == Err(0) {
            return Err(ErrorKind::StorageFull.into());
        }
        self.disk.write_at(parts, at)?;
        let op = DiskOp::Write { file: self.file, at, data: parts.concat() };
        self.recorder.record.lock().push(op);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)?;
        self.recorder.record.lock().push(DiskOp::SetLen { file: self.file, len });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.recorder.sync_fails.load(Ordering::Acquire) {
            return Err(io::Error::other("a failed sync was asked for"));
        }
        self.disk.sync()?;
        self.recorder.record.lock().push(DiskOp::Sync { file: self.file });
        Ok(())
    }
}

fn recorded(dir: &Path, options: &Options) -> (Bbolt, Arc<Recorder>) {
    let recorder = Recorder::new();
    let files: Arc<dyn Files> = Arc::new(Recorded(Arc::clone(&recorder)));
    let engine = undisturbed(|dir: &Path| Bbolt::open_with(dir, options, Arc::clone(&files)))(dir);
    let engine = engine.unwrap();
    (engine, recorder)
}

#[test]
fn random_operations_match_a_mirrored_model() {
    engine_conformance::cases::random_operations_match_the_model(|dir: &Path| {
        Mirror::new(open_small(dir, false), Model::default())
    });
}

#[test]
fn small_caches_change_nothing() {
    engine_conformance::cases::commits_and_reads_go_on_during_reclaim(|dir: &Path| {
        open_small(dir, false)
    });
}

/// Writes what is left of the record's files after a power loss at operation `end` into `dir`: all that
/// was synced, and of the rest any part, in any order, torn between sectors; names change in order, but
/// those not synced may not have changed.
fn power_loss(record: &[DiskOp], end: usize, rng: &mut Rng, dir: &Path) -> usize {
    const SECTOR: usize = 512;
    let mut synced: HashMap<usize, usize> = HashMap::new();
    let mut dir_synced = 0;
    for (at, op) in record[..end].iter().enumerate() {
        match op {
            DiskOp::Sync { file } => drop(synced.insert(*file, at)),
            DiskOp::SyncDir => dir_synced = at,
            _ => {}
        }
    }
    let names_end = dir_synced + rng.below((end - dir_synced) as u64 + 1) as usize;
    let mut names: BTreeMap<PathBuf, usize> = BTreeMap::new();
    let mut images: HashMap<usize, Vec<u8>> = HashMap::new();
    let mut losses = 0;
    for (at, op) in record[..end].iter().enumerate() {
        match op {
            DiskOp::Create { file, path } => {
                names.insert(path.clone(), *file);
                images.insert(*file, Vec::new());
            }
            DiskOp::Rename { from, to } if at < names_end => {
                let file = names.remove(from).unwrap();
                names.insert(to.clone(), file);
            }
            DiskOp::Write { file, at: offset, data } => {
                let certain = synced.get(file).is_some_and(|synced| at < *synced);
                let lost = !certain && rng.one_in(2);
                losses += usize::from(!certain);
                let image = images.get_mut(file).unwrap();
                for (sector, data) in data.chunks(SECTOR).enumerate() {
                    if certain || !lost || rng.one_in(3) {
                        let from = *offset as usize + sector * SECTOR;
                        if image.len() < from + data.len() {
                            image.resize(from + data.len(), 0);
                        }
                        image[from..from + data.len()].copy_from_slice(data);
                    }
                }
            }
            DiskOp::SetLen { file, len } => {
                let certain = synced.get(file).is_some_and(|synced| at < *synced);
                if certain || rng.one_in(2) {
                    images.get_mut(file).unwrap().resize(*len as usize, 0);
                }
            }
            DiskOp::Rename { .. } | DiskOp::Sync { .. } | DiskOp::SyncDir => {}
        }
    }
    for name in [DATA, NEW] {
        remove_if_there(&dir.join(name)).unwrap();
    }
    for (path, file) in names {
        fs::write(dir.join(path.file_name().unwrap()), &images[&file]).unwrap();
    }
    losses
}

/// A disk that loses power at each of its operations, twice.
fn power_loss_keeps_what_was_durable(sync_freelist: bool) {
    let seed = seed();
    let mut rng = Rng::new(seed);
    let (dir, crashed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (engine, recorder) = recorded(dir.path(), &small(sync_freelist));
    // (operations recorded when it was acknowledged, number)
    let mut durable = vec![(recorder.recorded(), 0)];
    for n in 1..=120 {
        let mut batch = numbered(n);
        if rng.one_in(40) {
            // beyond half the cache, so that buffered pages are written at once
            batch.put(Table::Lease, "large", rng.bytes(600_000));
        }
        let durability = if rng.one_in(5) { Durability::Durable } else { Durability::Buffered };
        engine.commit(&batch, durability).unwrap();
        if durability == Durability::Durable {
            durable.push((recorder.recorded(), n));
        }
        if n % 50 == 0 {
            engine.reclaim().unwrap();
            durable.push((recorder.recorded(), n));
        }
    }
    let record = std::mem::take(&mut *recorder.record.lock());
    assert!(durable.len() > 15 && record.len() > 150, "{} {}", durable.len(), record.len());
    assert!(record.iter().filter(|op| matches!(op, DiskOp::Rename { .. })).count() == 3);

    let mut losses = 0;
    for end in durable[0].0..=record.len() {
        for round in 0..2 {
            losses += power_loss(&record, end, &mut rng, crashed.path());
            let context = format!("seed {seed}, crash {round} at {end} of {}", record.len());
            let survivor = try_open(crashed.path(), &small(sync_freelist))
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            let n = check_numbered(&survivor, &context);
            let (_, acknowledged) = durable[durable.partition_point(|(at, _)| *at <= end) - 1];
            assert!(n >= acknowledged, "{context}: {n} is the last, {acknowledged} was durable");
            // and it works
            survivor.commit(&numbered(n + 1), Durability::Durable).unwrap();
            assert_eq!(check_numbered(&survivor, &context), n + 1);
        }
    }
    assert!(losses > 100, "only {losses} writes were at stake");
}

#[test]
fn power_loss_at_any_operation_keeps_what_was_durable() {
    power_loss_keeps_what_was_durable(false);
}

#[test]
fn power_loss_at_any_operation_with_a_freelist_keeps_what_was_durable() {
    power_loss_keeps_what_was_durable(true);
}

/// What the system's cache holds after `record`: the file that has the name [`DATA`], if there is one.
fn cached(record: &[DiskOp]) -> Option<(usize, Vec<u8>)> {
    let mut names: HashMap<PathBuf, usize> = HashMap::new();
    let mut images: HashMap<usize, Vec<u8>> = HashMap::new();
    for op in record {
        match op {
            DiskOp::Create { file, path } => drop(names.insert(path.clone(), *file)),
            DiskOp::Rename { from, to } => {
                let file = names.remove(from).unwrap();
                names.insert(to.clone(), file);
            }
            DiskOp::SetLen { file, len } => {
                images.entry(*file).or_default().resize(*len as usize, 0)
            }
            DiskOp::Write { file, at, data } => {
                let image = images.entry(*file).or_default();
                let end = *at as usize + data.len();
                image.resize(image.len().max(end), 0);
                image[*at as usize..end].copy_from_slice(data);
            }
            DiskOp::Sync { .. } | DiskOp::SyncDir => {}
        }
    }
    let (_, file) = names.into_iter().find(|(path, _)| path.ends_with(DATA))?;
    Some((file, images.remove(&file)?))
}

/// A process is killed before it syncs a meta page or a name; the next one goes on with what the system's
/// cache holds, until the power fails.
#[test]
fn power_loss_after_a_kill_keeps_what_was_durable() {
    let seed = seed();
    let mut rng = Rng::new(seed);
    let (dir, crashed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (engine, recorder) = recorded(dir.path(), &small(false));
    // (operations recorded when it was acknowledged, number)
    let mut first_durable = vec![(0, 0)];
    for n in 1..=12 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
        first_durable.push((recorder.recorded(), n));
        if n % 5 == 0 {
            engine.reclaim().unwrap();
        }
    }
    let first = std::mem::take(&mut *recorder.record.lock());
    let meta_or_name = |op: &DiskOp| match op {
        DiskOp::Write { at, .. } => *at <= PAGE_BYTES as u64,
        DiskOp::Rename { .. } => true,
        _ => false,
    };
    let kills = (1..first.len()).filter(|at| meta_or_name(&first[at - 1]));
    let mut killed = 0;
    for kill in kills {
        let Some((file, image)) = cached(&first[..kill]) else { continue };
        killed += 1;
        let next_dir = tempfile::tempdir().unwrap();
        fs::write(next_dir.path().join(DATA), image).unwrap();
        let (engine, recorder) = recorded(next_dir.path(), &small(false));
        let found = check_numbered(&engine, "after a kill");
        let mut durable = first_durable.clone();
        durable.retain(|(at, _)| *at <= kill);
        // the first operation is the opening itself
        let recorded_to = |recorder: &Recorder| kill + recorder.recorded() - 1;
        durable.push((recorded_to(&recorder), found));
        for n in found + 1..found + 4 {
            engine.commit(&numbered(n), Durability::Durable).unwrap();
            durable.push((recorded_to(&recorder), n));
        }
        let mut record = first[..kill].to_vec();
        record.extend(recorder.record.lock().drain(..).skip(1).map(|op| match op {
            DiskOp::Write { at, data, .. } => DiskOp::Write { file, at, data },
            DiskOp::SetLen { len, .. } => DiskOp::SetLen { file, len },
            DiskOp::Sync { .. } => DiskOp::Sync { file },
            other => other,
        }));
        for end in kill..=record.len() {
            for round in 0..3 {
                power_loss(&record, end, &mut rng, crashed.path());
                let context = format!("seed {seed}, killed at {kill}, crash {round} at {end}");
                let survivor = try_open(crashed.path(), &small(false))
                    .unwrap_or_else(|error| panic!("{context}: {error}"));
                let n = check_numbered(&survivor, &context);
                let (_, acknowledged) = durable[durable.partition_point(|(at, _)| *at <= end) - 1];
                assert!(
                    n >= acknowledged,
                    "{context}: {n} is the last, {acknowledged} was durable"
                );
            }
        }
    }
    assert!(killed > 12, "only {killed} kills");
}

/// A copy of the file of an engine that is still open is what a killed process leaves.
#[test]
fn a_kill_leaves_the_last_durable_commit() {
    let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = open(dir.path());
    for n in 1..=50 {
        let durability = if n == 40 { Durability::Durable } else { Durability::Buffered };
        engine.commit(&numbered(n), durability).unwrap();
    }
    fs::copy(dir.path().join(DATA), copy.path().join(DATA)).unwrap();
    assert_eq!(check_numbered(&open(copy.path()), "the copy"), 40);
    engine.reclaim().unwrap();
    engine.commit(&numbered(51), Durability::Buffered).unwrap();
    fs::copy(dir.path().join(DATA), copy.path().join(DATA)).unwrap();
    assert_eq!(check_numbered(&open(copy.path()), "the reclaimed copy"), 50);
}

#[test]
fn full_disk_stops_commits_and_keeps_what_was_durable() {
    for writes in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let context = format!("disk full after {writes} writes");
        let mut durable = 0;
        {
            let (engine, recorder) = recorded(dir.path(), &Options::defaults(&ABOUT));
            for n in 1..=10 {
                engine.commit(&numbered(n), Durability::Durable).unwrap();
            }
            recorder.writes_left.store(writes, Ordering::Release);
            let error = (11..500)
                .find_map(|n| {
                    let result = engine.commit(&numbered(n), Durability::Durable);
                    durable = n - 1;
                    result.err()
                })
                .unwrap();
            match &error {
                EngineError::Io { what, source } => {
                    assert!(what.contains(&*dir.path().join(DATA).to_string_lossy()), "{what}");
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
        assert_eq!(check_numbered(&open(dir.path()), &context), durable, "{context}");
    }
}

#[test]
fn failed_sync_stops_commits() {
    let dir = tempfile::tempdir().unwrap();
    {
        let (engine, recorder) = recorded(dir.path(), &Options::defaults(&ABOUT));
        engine.commit(&numbered(1), Durability::Durable).unwrap();
        recorder.sync_fails.store(true, Ordering::Release);
        let error = engine.commit(&numbered(2), Durability::Durable).unwrap_err();
        assert!(matches!(error, EngineError::Io { .. }), "{error}");
        let error = engine.commit(&numbered(2), Durability::Durable).unwrap_err();
        assert!(error.to_string().contains("failed sync"), "{error}");
    }
    assert_eq!(check_numbered(&open(dir.path()), "after a failed sync"), 1);
}

#[test]
fn reclaim_on_a_full_disk_leaves_the_engine_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, recorder) = recorded(dir.path(), &Options::defaults(&ABOUT));
    for n in 1..=30 {
        engine.commit(&numbered(n), Durability::Durable).unwrap();
    }
    let mut failures = 0;
    for writes in 0..10 {
        recorder.writes_left.store(writes, Ordering::Release);
        let reclaimed = engine.reclaim();
        recorder.writes_left.store(-1, Ordering::Release);
        match reclaimed {
            Err(EngineError::Io { what, source }) => {
                assert_eq!(source.kind(), ErrorKind::StorageFull, "{what}: {source}");
                assert!(!dir.path().join(NEW).exists(), "the copy is left");
                failures += 1;
            }
            Ok(_) => {
                assert!(writes > 2, "reclaim did not notice a full disk after {writes} writes")
            }
            Err(other) => panic!("full after {writes} writes: {other}"),
        }
        let next = 31 + writes as u64;
        engine.commit(&numbered(next), Durability::Buffered).unwrap();
        assert_eq!(check_numbered(&engine, "after reclaim"), next);
    }
    assert!((3..10).contains(&failures), "{failures} failures");
    drop(engine);
    assert_eq!(check_numbered(&open(dir.path()), "reopened"), 40);
}

/// Commits go on meanwhile, and would leave more and more to catch up with.
#[test]
fn reclaim_does_not_read_its_copy_again() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, recorder) = recorded(dir.path(), &Options::defaults(&ABOUT));
    let mut batch = Batch::default();
    (0..2_000_u64).for_each(|n| batch.put(Table::Key, n.to_be_bytes().to_vec(), vec![1; 3_000]));
    engine.commit(&batch, Durability::Durable).unwrap();
    let before = recorder.bytes_read.load(Ordering::Acquire);
    let reclaimed = engine.reclaim().unwrap();
    assert!(reclaimed.after > 6_000_000, "{reclaimed:?}");
    // the old file is in the cache
    let read = recorder.bytes_read.load(Ordering::Acquire) - before;
    assert!(read < 100_000, "{read} bytes read");
    engine.check().unwrap();
    let damaged = engine.snapshot().store.damaged(7, PageDamage::Empty);
    assert!(damaged.to_string().contains("/db, page 7"), "{damaged}");
}

#[test]
fn a_reclaim_cancelled_in_its_last_slice_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, recorder) = recorded(dir.path(), &Options::defaults(&ABOUT));
    let engine = Arc::new(engine);
    engine.commit(&numbered(1), Durability::Durable).unwrap();
    recorder.cancels.set(Arc::downgrade(&engine)).unwrap();
    let result = engine.reclaim();
    assert!(matches!(result, Err(EngineError::Cancelled)), "{result:?}");
    assert!(!dir.path().join(NEW).exists(), "the copy is left");
    assert_eq!(check_numbered(&engine, "cancelled"), 1);
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
fn unfinished_creation_is_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(NEW), vec![1; 100_000]).unwrap();
    let engine = open(dir.path());
    assert!(!dir.path().join(NEW).exists());
    assert_eq!(check_numbered(&engine, "created"), 0);
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
fn what_is_no_database_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join(DATA);
    let name = data.display().to_string();

    fs::write(&data, "#!/bin/sh\necho not a database\n").unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Unusable(_)), "{error}");
    assert_eq!(error.to_string(), format!("{name} is not a bbolt file: it has no valid meta page"));

    fs::write(&data, "").unwrap();
    let error = error_of(dir.path());
    assert!(matches!(&error, EngineError::Corrupt { at, .. } if *at == name), "{error}");

    fs::remove_file(&data).unwrap();
    fs::create_dir(&data).unwrap();
    let error = error_of(dir.path());
    assert!(matches!(error, EngineError::Io { .. }), "{error}");
    assert!(error.to_string().contains(&name), "{error}");
}

#[test]
fn one_damaged_meta_page_is_one_commit_lost() {
    for (page, expected) in [(0, 4), (1, 5)] {
        let dir = tempfile::tempdir().unwrap();
        {
            let engine = open(dir.path());
            for n in 1..=5 {
                engine.commit(&numbered(n), Durability::Durable).unwrap();
            }
        }
        let file = File::options().write(true).open(dir.path().join(DATA)).unwrap();
        file.write_all_at(&[0xa5; 100], page * PAGE_BYTES as u64).unwrap();
        // transactions 0 and 1 are those of an empty file, so that the fifth commit is in page 0
        let n = check_numbered(&open(dir.path()), "a damaged meta page");
        assert_eq!(n, expected, "page {page}");
    }
}

#[test]
fn a_short_file_is_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path());
        for n in 1..=30 {
            engine.commit(&numbered(n), Durability::Durable).unwrap();
        }
    }
    let data = dir.path().join(DATA);
    let whole = fs::read(&data).unwrap();
    for len in [2 * PAGE_BYTES, 3 * PAGE_BYTES, 9 * PAGE_BYTES + 100] {
        fs::write(&data, &whole[..len]).unwrap();
        let error = error_of(dir.path());
        assert!(
            matches!(&error, EngineError::Corrupt { at, .. } if *at == data.display().to_string()),
            "{error}"
        );
        assert!(error.to_string().contains("meta page counts"), "{error}");
    }
}

/// Bytes and whole pages are overwritten at random: the engine finds what is there or names the page,
/// and comes to an end in any case.
fn damage_is_reported(sync_freelist: bool) {
    let seed = seed();
    let mut rng = Rng::new(seed);
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open_small(dir.path(), sync_freelist);
        for n in 0..6 {
            let mut batch = numbered(n + 1);
            for key in 0..400_u64 {
                let key = (1_000 + n * 400 + key).to_be_bytes().to_vec();
                batch.put(Table::Lease, key, rng.bytes(60));
            }
            engine.commit(&batch, Durability::Durable).unwrap();
        }
    }
    let data = dir.path().join(DATA);
    let whole = fs::read(&data).unwrap();
    let pages = (0..whole.len() / PAGE_BYTES)
        .filter(|page| u64_at(&whole, page * PAGE_BYTES) == *page as u64)
        .count() as u64;
    assert!(pages > 20, "{pages} pages");
    let (mut named, mut harmless) = (0, 0);
    for round in 0..400 {
        let mut image = whole.clone();
        for _ in 0..1 + rng.below(3) {
            let page = rng.below(pages) as usize * PAGE_BYTES;
            match rng.below(4) {
                // a page in the place of another, with its number
                0 => {
                    let other = rng.below(pages) as usize * PAGE_BYTES;
                    image.copy_within(other..other + PAGE_BYTES, page);
                    let number = (page / PAGE_BYTES) as u64;
                    image[page..page + 8].copy_from_slice(&number.to_le_bytes());
                }
                // its header or first elements
                1 => image[page + rng.below(80) as usize] = rng.next_u64() as u8,
                2 => image[page + 8 + rng.below(8) as usize] ^= 1 << rng.below(8),
                _ => image[page + rng.below(PAGE_BYTES as u64) as usize] ^= 1 << rng.below(8),
            }
        }
        fs::write(&data, &image).unwrap();
        let used = try_open(dir.path(), &small(rng.one_in(2))).and_then(|engine| {
            if !sync_freelist || rng.one_in(2) {
                // a stored list of free pages is believed: only this finds out that it is wrong
                engine.check()?;
            }
            {
                let view = engine.view()?;
                for table in Table::ALL {
                    let mut last: Vec<u8> = Vec::new();
                    view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, _| {
                        assert!(key > &last[..], "seed {seed}, round {round}: keys out of order");
                        last = key.to_vec();
                        ControlFlow::Continue(())
                    })?;
                    view.get(table, b"n")?;
                    view.last(table)?;
                }
            }
            for n in 100..103 {
                engine.commit(&numbered(n), Durability::Durable)?;
            }
            engine.reclaim().map(|_| ())
        });
        match used {
            Ok(()) => harmless += 1,
            Err(EngineError::Corrupt { at, .. }) => {
                assert!(at.contains(&data.display().to_string()), "{at}");
                named += 1;
            }
            // a bucket by another name, or both metas gone
            Err(EngineError::Unusable(what)) => {
                assert!(what.contains("bucket") || what.contains("meta"), "{what}");
            }
            Err(other) => panic!("seed {seed}, round {round}: {other}"),
        }
    }
    assert!(named > 100 && harmless > 20, "{named} named, {harmless} harmless");
}

#[test]
fn damage_is_reported_or_harmless() {
    damage_is_reported(false);
}

#[test]
fn damage_with_a_freelist_is_reported_or_harmless() {
    damage_is_reported(true);
}

#[test]
fn a_page_that_leads_to_itself_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open_small(dir.path(), true);
        let mut batch = Batch::default();
        (0..2_000_u64).for_each(|n| batch.put(Table::Key, n.to_be_bytes().to_vec(), vec![1; 40]));
        engine.commit(&batch, Durability::Durable).unwrap();
    }
    let data = dir.path().join(DATA);
    let mut image = fs::read(&data).unwrap();
    let branch = (2..image.len() / PAGE_BYTES)
        .find(|page| image[page * PAGE_BYTES + 8] == format::BRANCH as u8)
        .unwrap();
    let child = branch * PAGE_BYTES + 16 + 8;
    image[child..child + 8].copy_from_slice(&(branch as u64).to_le_bytes());
    fs::write(&data, &image).unwrap();
    // with a list of free pages, nothing is walked on opening
    let engine = open_small(dir.path(), true);
    let view = engine.view().unwrap();
    let error = view.get(Table::Key, &0_u64.to_be_bytes()).unwrap_err();
    assert!(error.to_string().contains(&format!("page {branch}")), "{error}");
    let ignore = &mut |_: &[u8], _: &[u8]| ControlFlow::Continue(());
    assert!(view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, ignore).is_err());
    let mut batch = Batch::default();
    batch.put(Table::Key, 0_u64.to_be_bytes().to_vec(), "");
    assert!(matches!(engine.commit(&batch, Durability::Durable), Err(EngineError::Corrupt { .. })));
    drop(view);
    drop(engine);
    // where the free pages have to be found, opening finds it out
    fs::write(&data, without_freelist(image)).unwrap();
    let error = error_of(dir.path());
    assert!(error.to_string().contains("two trees"), "{error}");
}

#[test]
fn damage_names_the_leaf_and_not_the_root_above_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path(), true);
    let mut batch = Batch::default();
    // inline buckets of such a size that they do not fit into one leaf
    Table::ALL.iter().for_each(|table| batch.put(*table, "row", vec![1; 900]));
    (0..500_u64).for_each(|n| batch.put(Table::Key, n.to_be_bytes().to_vec(), vec![1; 40]));
    engine.commit(&batch, Durability::Durable).unwrap();
    let snapshot = engine.snapshot();
    let Some(Root::Page(rows)) = snapshot.root(Table::Key) else { panic!("it is not inline") };
    let page = |id| snapshot.store.page(id, snapshot.version.pages).unwrap();
    let (buckets, rows) = (page(snapshot.version.root), page(*rows));
    assert!(!buckets.is_leaf() && !rows.is_leaf());
    let (bucket_leaf, row_leaf) = (buckets.child(1), rows.child(1));
    let (bucket, row) = (page(bucket_leaf), page(row_leaf));
    drop((snapshot, engine));
    let data = dir.path().join(DATA);
    let image = fs::read(&data).unwrap();
    let with_flags = |page: u64, flags: u8| {
        let mut image = image.clone();
        image[page as usize * PAGE_BYTES + format::HEADER_BYTES] = flags;
        fs::write(&data, &image).unwrap();
    };

    with_flags(bucket_leaf, 0);
    let error = try_open(dir.path(), &small(true)).err().unwrap();
    assert!(error.to_string().contains(&format!("page {bucket_leaf}: ")), "{error}");
    assert_eq!(bucket.flags(0), IS_BUCKET);

    with_flags(row_leaf, IS_BUCKET as u8);
    let engine = open_small(dir.path(), true);
    let error = engine.view().unwrap().get(Table::Key, row.key(0)).unwrap_err();
    assert!(error.to_string().contains(&format!("page {row_leaf}: ")), "{error}");
}

/// The image with metas that know of no list of free pages.
fn without_freelist(mut image: Vec<u8>) -> Vec<u8> {
    for page in 0..2 {
        let mut meta = format::Meta::decode(&image[page * PAGE_BYTES..]).unwrap();
        meta.freelist = NO_FREELIST;
        let bytes = meta.encode(page as u64);
        image[page * PAGE_BYTES..(page + 1) * PAGE_BYTES].copy_from_slice(&bytes);
    }
    image
}

/// What a commit of `model` does to `engine` and to the map.
fn random_batch(rng: &mut Rng, rows: &mut BTreeMap<Vec<u8>, Vec<u8>>, table: Table) -> Batch {
    let mut batch = Batch::default();
    let growing = rng.one_in(2);
    for _ in 0..rng.below(600) {
        let key = match rng.below(40) {
            0 => {
                let len = 1 + rng.below(3_000) as usize;
                rng.bytes(len)
            }
            _ => (rng.below(4_000) * 7).to_be_bytes().to_vec(),
        };
        if rng.one_in(if growing { 5 } else { 2 }) {
            rows.remove(&key);
            batch.delete(table, key);
        } else {
            let len = if rng.one_in(100) { rng.below(30_000) } else { rng.below(150) } as usize;
            let value = rng.bytes(len);
            rows.insert(key.clone(), value.clone());
            batch.put(table, key, value);
        }
    }
    if !growing && rng.one_in(3) {
        // a range that falls away, so that whole subtrees do
        let from = rng.below(4_000) * 7;
        let range = from.to_be_bytes().to_vec()..(from + 9_000).to_be_bytes().to_vec();
        for key in rows.extract_if(range, |_, _| true).map(|(key, _)| key) {
            batch.delete(table, key);
        }
    }
    if rng.one_in(3) {
        // keys of which few fit into a branch: the tree is deep, and a run of them leaves little of it
        let from = rng.below(200);
        let run = (from..from + rng.below(100)).map(long_key);
        if growing {
            for key in run {
                let value = rng.bytes(3_000);
                rows.insert(key.clone(), value.clone());
                batch.put(table, key, value);
            }
        } else {
            for key in run {
                rows.remove(&key);
                batch.delete(table, key);
            }
        }
    }
    batch
}

/// Four of them fit into a branch, and one with 3000 bytes of value into a leaf.
fn long_key(n: u64) -> Vec<u8> {
    let mut key = n.to_be_bytes().to_vec();
    key.resize(1_000, 0xff);
    key
}

/// bbolt panics when it takes its only child away from a branch.
#[test]
fn no_branch_is_left_with_a_single_child() {
    for (from, to) in [(1, 16), (1, 64), (0, 63), (17, 48), (2, 62), (31, 33)] {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path());
        let mut batch = Batch::default();
        (0..64).for_each(|n| batch.put(Table::Lease, long_key(n), vec![0; 3_000]));
        engine.commit(&batch, Durability::Durable).unwrap();
        let mut batch = Batch::default();
        (from..to).for_each(|n| batch.delete(Table::Lease, long_key(n)));
        engine.commit(&batch, Durability::Durable).unwrap();
        let checked = engine.check().unwrap_or_else(|error| panic!("{from}..{to}: {error}"));
        assert_eq!(checked.rows, 64 - (to - from), "{from}..{to}");
    }
}

/// Many random trees of keys of which few fit into a branch.
#[test]
fn deep_trees_stay_in_order_under_deletes_of_runs() {
    let seed = seed();
    let mut rng = Rng::new(seed);
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path(), false);
    let mut rows = BTreeMap::new();
    for step in 0..400 {
        let context = format!("seed {seed}, step {step}");
        let mut batch = Batch::default();
        for _ in 0..1 + rng.below(4) {
            let from = rng.below(200);
            let longest = if rng.one_in(4) { 150 } else { 20 };
            let run = from..from + 1 + rng.below(longest);
            let filling = rng.one_in(2);
            for key in run.map(long_key) {
                if filling {
                    let len = if rng.one_in(3) { rng.below(100) } else { 3_000 };
                    let value = rng.bytes(len as usize);
                    rows.insert(key.clone(), value.clone());
                    batch.put(Table::Lease, key, value);
                } else {
                    rows.remove(&key);
                    batch.delete(Table::Lease, key);
                }
            }
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
        let checked = engine.check().unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!(checked.rows, rows.len() as u64, "{context}");
        assert_rows(&*engine.view().unwrap(), &rows, &context);
    }
}

#[test]
fn trees_stay_in_order_under_random_changes() {
    for sync_freelist in [false, true] {
        let seed = seed();
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir().unwrap();
        let mut rows = BTreeMap::new();
        for round in 0..8 {
            let engine = open_small(dir.path(), sync_freelist);
            let mut views = Vec::new();
            for step in 0..25 {
                let context = format!("seed {seed}, round {round}, step {step}");
                let batch = random_batch(&mut rng, &mut rows, Table::Lease);
                let durable = rng.one_in(4);
                let durability = if durable { Durability::Durable } else { Durability::Buffered };
                engine.commit(&batch, durability).unwrap();
                let checked = engine.check().unwrap_or_else(|error| panic!("{context}: {error}"));
                assert_eq!(checked.rows, rows.len() as u64, "{context}");
                let in_use = (checked.pages - checked.unused) * PAGE_BYTES as u64;
                assert_eq!(engine.size_in_use().unwrap(), in_use, "{context}");
                if rng.one_in(6) {
                    views.push((engine.view().unwrap(), rows.clone()));
                }
                if rng.one_in(8) && !views.is_empty() {
                    let (view, rows) = views.swap_remove(rng.below(views.len() as u64) as usize);
                    assert_rows(&*view, &rows, &context);
                }
            }
            assert_rows(&*engine.view().unwrap(), &rows, "at the end of a round");
        }
        // and everything can be taken out again
        let engine = open_small(dir.path(), sync_freelist);
        let mut batch = Batch::default();
        rows.into_keys().for_each(|key| batch.delete(Table::Lease, key));
        engine.commit(&batch, Durability::Durable).unwrap();
        let checked = engine.check().unwrap();
        assert_eq!(checked.rows, 0);
        // metas, an empty bucket tree, the list of free pages
        let list = format::freelist_pages(checked.unused as usize, PAGE_BYTES) as u64;
        let expected = if sync_freelist { 3 + list } else { 3 };
        assert_eq!(checked.pages - checked.unused, expected, "{checked:?}");
    }
}

fn assert_rows(view: &dyn View, rows: &BTreeMap<Vec<u8>, Vec<u8>>, context: &str) {
    let mut expected = rows.iter();
    view.scan(Table::Lease, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
        assert!(expected.next() == Some((&key.to_vec(), &value.to_vec())), "{context}: {key:02x?}");
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(expected.next(), None, "{context}");
}

#[test]
fn space_is_reused_while_no_view_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let churn = |from: u64, to: u64, every: u64| {
        for n in from..to {
            let durable = n % every == 0;
            let durability = if durable { Durability::Durable } else { Durability::Buffered };
            engine.commit(&numbered(n), durability).unwrap();
        }
    };
    churn(1, 100, 1);
    let size = engine.size().unwrap();
    churn(100, 400, 1);
    assert!(engine.size().unwrap() <= size * 2, "{size}, then {}", engine.size().unwrap());
    // pages of buffered commits do not wait for a durable one
    let size = engine.size().unwrap();
    churn(400, 900, 1_000);
    assert!(engine.size().unwrap() <= size * 2, "{size}, then {}", engine.size().unwrap());
    // nor for views that are younger or older than the page
    let view = engine.view().unwrap();
    churn(900, 1_500, 10);
    assert!(engine.size().unwrap() <= size * 4, "{size}, then {}", engine.size().unwrap());
    let n = view.get(Table::Meta, b"n").unwrap().unwrap();
    assert_eq!(n[..], 899_u64.to_be_bytes());
    drop(view);
    check_numbered(&engine, "after churn");
}

#[test]
fn large_buffered_commits_do_not_stay_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, recorder) = recorded(dir.path(), &small(false));
    let mut rng = Rng::new(4);
    for n in 0..40_u64 {
        let mut batch = Batch::default();
        batch.put(Table::Key, n.to_be_bytes().to_vec(), rng.bytes(200_000));
        let before = recorder.recorded();
        engine.commit(&batch, Durability::Buffered).unwrap();
        let record = recorder.record.lock();
        assert!(!record[before..].iter().any(|op| matches!(op, DiskOp::Sync { .. })));
        assert!(
            !record[before..].iter().any(|op| matches!(op, DiskOp::Write { at, .. } if *at < 8192))
        );
    }
    let written: usize = recorder
        .record
        .lock()
        .iter()
        .map(|op| if let DiskOp::Write { data, .. } = op { data.len() } else { 0 })
        .sum();
    assert!(written > 7_000_000, "{written} bytes written");
    engine.check().unwrap();
}

#[test]
fn appending_rewrites_little() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, recorder) = recorded(dir.path(), &Options::defaults(&ABOUT));
    let mut rng = Rng::new(9);
    for commit in 0..5_u64 {
        let mut batch = Batch::default();
        for n in 0..10_000 {
            batch.put(Table::Key, (commit * 10_000 + n).to_be_bytes().to_vec(), rng.bytes(100));
        }
        let before = recorder.recorded();
        engine.commit(&batch, Durability::Durable).unwrap();
        let record = recorder.record.lock();
        let written: Vec<usize> = record[before..]
            .iter()
            .filter_map(
                |op| if let DiskOp::Write { data, .. } = op { Some(data.len()) } else { None },
            )
            .collect();
        // rows of 124 bytes, pages filled to 9 tenths
        let bytes: usize = written.iter().sum();
        assert!(bytes < 1_240_000 * 12 / 10, "commit {commit} wrote {bytes} bytes");
        assert!(written.len() < 8, "commit {commit} made {} writes", written.len());
    }
    engine.check().unwrap();
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    let mut batch = Batch::default();
    batch.put(Table::Meta, "a", "b");
    batch.put(Table::Meta, vec![1; KEY_BYTES_MAX + 1], "");
    let error = engine.commit(&batch, Durability::Durable).unwrap_err();
    assert!(
        matches!(&error, EngineError::Unusable(what) if what.contains("32769 bytes")),
        "{error}"
    );
    assert_eq!(engine.view().unwrap().get(Table::Meta, b"a").unwrap(), None);
    // two of the longest keys that there can be do not fit into a branch of one page
    let mut batch = Batch::default();
    for n in 0..200 {
        batch.put(Table::Meta, vec![n; KEY_BYTES_MAX], vec![n; 10]);
    }
    engine.commit(&batch, Durability::Durable).unwrap();
    assert_eq!(engine.check().unwrap().rows, 200);
    assert_eq!(
        engine.view().unwrap().get(Table::Meta, &[77; KEY_BYTES_MAX]).unwrap().unwrap(),
        [77; 10][..]
    );
    let mut batch = Batch::default();
    (1..200).for_each(|n| batch.delete(Table::Meta, vec![n; KEY_BYTES_MAX]));
    engine.commit(&batch, Durability::Durable).unwrap();
    assert_eq!(engine.check().unwrap().rows, 1);
}

/// Every bucket as large as an inline one can be: the bucket tree itself needs several pages.
#[test]
fn the_bucket_tree_grows_and_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed());
    let mut expected: BTreeMap<Table, Vec<u8>> = BTreeMap::new();
    for round in 0..60 {
        let engine = open_small(dir.path(), round % 2 == 0);
        let mut batch = Batch::default();
        for table in Table::ALL {
            if rng.one_in(2) {
                continue;
            }
            if rng.one_in(3) {
                batch.delete(table, "row");
                expected.remove(&table);
            } else {
                // a few become too large and get a page, or come back from it
                let len = rng.below(1_100) as usize;
                let value = rng.bytes(len);
                batch.put(table, "row", value.clone());
                expected.insert(table, value);
            }
        }
        engine.commit(&batch, Durability::Durable).unwrap();
        let checked = engine.check().unwrap();
        assert_eq!(checked.rows, expected.len() as u64, "round {round}");
        drop(engine);
        let engine = open_small(dir.path(), false);
        for table in Table::ALL {
            let found = engine.view().unwrap().get(table, b"row").unwrap();
            assert_eq!(found.as_deref(), expected.get(&table).map(Vec::as_slice), "{table}");
        }
    }
}

/// A file with the pages of a machine that has larger ones.
#[test]
fn other_page_sizes_are_kept() {
    for page_bytes in [1024, 16 << 10, 64 << 10] {
        let dir = tempfile::tempdir().unwrap();
        let meta = |transaction| format::Meta {
            page_bytes: page_bytes as u32,
            root: 2,
            sequence: 0,
            freelist: NO_FREELIST,
            pages: 3,
            transaction,
        };
        let root = format::Builder::new(2, format::LEAF, 0, 0, page_bytes).finish(page_bytes);
        let image = [meta(4).encode(0), meta(5).encode(1), root].concat();
        fs::write(dir.path().join(DATA), &image).unwrap();
        let mut n = 0;
        for _ in 0..3 {
            let engine = open(dir.path());
            for _ in 0..50 {
                n += 1;
                engine.commit(&numbered(n), Durability::Durable).unwrap();
            }
            assert_eq!(check_numbered(&engine, "other pages"), n);
            assert_eq!(engine.size().unwrap() % page_bytes as u64, 0);
        }
        // the second meta is found where the first says nothing about the size of pages
        let data = dir.path().join(DATA);
        let mut image = fs::read(&data).unwrap();
        let newer =
            [0, page_bytes].map(|at| format::Meta::decode(&image[at..]).unwrap().transaction);
        image[..100].fill(0);
        fs::write(&data, &image).unwrap();
        let survived = if newer[0] > newer[1] { n - 1 } else { n };
        assert_eq!(check_numbered(&open(dir.path()), "one meta"), survived);
    }
    let dir = tempfile::tempdir().unwrap();
    let meta = format::Meta {
        page_bytes: 1 << 20,
        root: 2,
        sequence: 0,
        freelist: NO_FREELIST,
        pages: 3,
        transaction: 1,
    };
    fs::write(dir.path().join(DATA), [meta.encode(1), vec![0; 3 << 20]].concat()).unwrap();
    let error = error_of(dir.path());
    assert!(error.to_string().contains("pages of 1048576 bytes"), "{error}");
}

/// With a list of free pages that is wrong, the check says what is.
#[test]
fn the_check_finds_what_a_wrong_freelist_hides() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open_small(dir.path(), true);
        for n in 1..=40 {
            engine.commit(&numbered(n), Durability::Durable).unwrap();
        }
    }
    let data = dir.path().join(DATA);
    let image = fs::read(&data).unwrap();
    let metas = [0, PAGE_BYTES].map(|at| format::Meta::decode(&image[at..]).unwrap());
    let meta = metas.into_iter().max_by_key(|meta| meta.transaction).unwrap();
    let at = meta.freelist as usize * PAGE_BYTES;
    let ids = format::decode_freelist(&image[at..at + PAGE_BYTES], meta.pages).unwrap();
    assert!(ids.len() > 3 && !ids.contains(&meta.root));
    let found = |ids: &[u64]| {
        let mut image = image.clone();
        let list = format::encode_freelist(meta.freelist, ids, 1, PAGE_BYTES);
        image[at..at + PAGE_BYTES].copy_from_slice(&list);
        fs::write(&data, &image).unwrap();
        let engine = open_small(dir.path(), true);
        engine.check().map_err(|error| error.to_string())
    };
    assert_eq!(found(&ids).unwrap().unused, ids.len() as u64);
    let error = found(&ids[1..]).unwrap_err();
    assert!(error.contains(&format!("page {}: it is neither", ids[0])), "{error}");
    let mut more = ids.clone();
    more.push(meta.root);
    more.sort_unstable();
    let error = found(&more).unwrap_err();
    assert!(error.contains(&format!("page {}: it is in use and", meta.root)), "{error}");
    // what opening itself refuses
    fs::write(&data, &image).unwrap();
    let file = File::options().write(true).open(&data).unwrap();
    file.write_all_at(&1_u64.to_le_bytes(), (at + 16) as u64).unwrap();
    let error = try_open(dir.path(), &small(true)).err().unwrap();
    assert!(error.to_string().contains("number 0 of its free pages is 1"), "{error}");
}
