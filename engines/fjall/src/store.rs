//! fjall's database, how it is opened, and the two threads that turn memtables into tables.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use engine_api::{EngineError, Options, Table};
use fjall::config::{BloomConstructionPolicy, CompressionPolicy, FilterPolicy, FilterPolicyEntry};
use fjall::{
    AbstractTree, CompressionType, Database, Keyspace, KeyspaceCreateOptions, LsmError, PersistMode,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::journal;
use crate::mark::Mark;
use crate::space;
use crate::{
    CACHE_BYTES, COMPRESSION, DAMAGED, DAMAGED_NEW, FJALL, MARK, NEW, OWN, OWN_BATCH,
    OWN_COMPRESSION, OWN_ID, OwnRow, TREES, failed, sync_dir,
};

/// Runs of tables in the first level from which on commits wait for compaction. fjall itself stops a commit
/// at 30, without looking whether anybody compacts.
const FIRST_LEVEL_RUNS_MAX: usize = 24;

/// Sealed memtables of a tree from which on commits wait. fjall itself stops a commit at 4, without looking
/// whether anybody writes them.
const SEALED_MAX: usize = 2;

/// How often one who waits looks again: fjall's own thread, which flushes after opening, tells nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What the engine, its threads and its views share.
pub(crate) struct Shared {
    pub(crate) dir: PathBuf,
    pub(crate) db: Database,
    /// In the order of [`Table::ALL`].
    pub(crate) tables: [Keyspace; Table::ALL.len()],
    pub(crate) own: Keyspace,
    pub(crate) mark: Mutex<Mark>,
    /// What the tables occupied when it was looked at last.
    pub(crate) tables_bytes: AtomicU64,
    /// The reclaim that is under way is to end.
    pub(crate) cancelled: AtomicBool,
    /// Why no commit is possible any more.
    poisoned: OnceLock<String>,
    work: Mutex<Work>,
    /// There is work, or the engine is being closed.
    work_there: Condvar,
    /// Some work is done.
    work_done: Condvar,
}

#[derive(Default)]
struct Work {
    stop: bool,
    /// How often memtables were sealed, and how many of these have been written.
    sealed: u64,
    flushed: u64,
    /// The trees may want compaction.
    compact: bool,
}

/// The place of a table in [`Table::ALL`].
pub(crate) fn position(table: Table) -> usize {
    Table::ALL.iter().position(|t| *t == table).expect("all tables are there")
}

impl Shared {
    /// All trees that batches write to.
    pub(crate) fn trees(&self) -> impl Iterator<Item = &Keyspace> {
        self.tables.iter().chain([&self.own])
    }

    pub(crate) fn check_poisoned(&self) -> Result<(), EngineError> {
        match self.poisoned.get() {
            Some(why) => Err(EngineError::Poisoned(why.clone())),
            None => Ok(()),
        }
    }

    pub(crate) fn check_cancelled(&self) -> Result<(), EngineError> {
        if self.cancelled.load(Ordering::Acquire) { Err(EngineError::Cancelled) } else { Ok(()) }
    }

    /// Stops the engine unless `error` says that nothing has happened; answers `error`.
    pub(crate) fn poison(&self, error: EngineError) -> EngineError {
        if !matches!(error, EngineError::Unusable(_)) {
            // the first reason stays
            let _ = self.poisoned.set(error.to_string());
            self.work_done.notify_all();
        }
        error
    }

    /// What an error of fjall means, with the directory.
    pub(crate) fn convert(&self, doing: &str, error: fjall::Error) -> EngineError {
        match (self.poisoned.get(), error) {
            (Some(why), fjall::Error::Poisoned) => EngineError::Poisoned(why.clone()),
            (None, fjall::Error::Poisoned) => self.failed_in_the_background(),
            (_, error) => convert(doing, &self.dir, error),
        }
    }

    /// One of fjall's own threads has failed, and only its log says why: looks whether the disk is full.
    fn failed_in_the_background(&self) -> EngineError {
        let probe = self.dir.join("probe");
        let written =
            fs::write(&probe, [0x5a; 64 << 10]).and_then(|()| fs::File::open(&probe)?.sync_all());
        // what cannot be removed is overwritten by the next probe
        let _ = fs::remove_file(&probe);
        let source = written.err().unwrap_or_else(|| {
            io::Error::other("a thread of fjall has failed; the reason is not known")
        });
        failed("write tables in", &self.dir, source)
    }

    fn gc_watermark(&self) -> u64 {
        self.db.supervisor.snapshot_tracker.get_seqno_safe_to_gc()
    }

    /// Seals the memtables of all tables and asks for them to be written. Only between two batches, when
    /// the journal is synced.
    pub(crate) fn seal(&self) {
        for keyspace in &self.tables {
            keyspace.tree.rotate_memtable();
        }
        let mut work = self.work.lock();
        work.sealed += 1;
        drop(work);
        self.work_there.notify_all();
    }

    fn sealed_memtables(&self) -> usize {
        self.trees().map(|keyspace| keyspace.sealed_memtable_count()).max().unwrap_or(0)
    }

    fn first_level_runs(&self) -> usize {
        self.trees().map(|keyspace| keyspace.tree.l0_run_count()).max().unwrap_or(0)
    }

    /// Waits until a commit may add to the memtables; answers whether all that was sealed is written.
    pub(crate) fn wait_for_room(&self) -> Result<bool, EngineError> {
        let mut work = self.work.lock();
        loop {
            self.check_poisoned()?;
            let sealed = self.sealed_memtables();
            let runs = self.first_level_runs();
            if runs >= FIRST_LEVEL_RUNS_MAX {
                work.compact = true;
                self.work_there.notify_all();
            }
            if sealed < SEALED_MAX && runs < FIRST_LEVEL_RUNS_MAX {
                return Ok(sealed == 0 && runs < FIRST_LEVEL_RUNS_MAX / 2);
            }
            self.check_threads()?;
            self.work_done.wait_for(&mut work, LOOK_AGAIN);
        }
    }

    /// Waits until all that was sealed before is written, for a reclaim. What is sealed meanwhile is not
    /// waited for: under many commits there is always some.
    ///
    /// # Errors
    /// `Cancelled` when the reclaim was.
    pub(crate) fn wait_until_flushed(&self) -> Result<(), EngineError> {
        let mut work = self.work.lock();
        let sealed = work.sealed;
        while work.flushed < sealed {
            self.wait_for_flush(&mut work)?;
        }
        // the memtable of our own tree was sealed at the end of that, and is written before the next one is
        let flushed = work.flushed;
        while work.flushed == flushed && self.own.sealed_memtable_count() > 0 {
            self.wait_for_flush(&mut work)?;
        }
        Ok(())
    }

    fn wait_for_flush(&self, work: &mut MutexGuard<'_, Work>) -> Result<(), EngineError> {
        self.check_poisoned()?;
        self.check_cancelled()?;
        self.check_threads()?;
        self.work_done.wait_for(work, LOOK_AGAIN);
        Ok(())
    }

    /// Whether fjall's own threads have failed.
    fn check_threads(&self) -> Result<(), EngineError> {
        self.db.persist(PersistMode::Buffer).map_err(|error| self.convert("write to", error))
    }

    /// Ends both threads after what they are doing.
    pub(crate) fn stop(&self) {
        self.work.lock().stop = true;
        self.work_there.notify_all();
    }

    /// A thread: writes memtables whenever some were sealed.
    pub(crate) fn flush_when_sealed(&self) {
        loop {
            let mut work = self.work.lock();
            while !work.stop && work.flushed == work.sealed {
                self.work_there.wait(&mut work);
            }
            if work.stop {
                return;
            }
            let sealed = work.sealed;
            drop(work);
            if let Err(error) = self.flush() {
                self.poison(error);
                return;
            }
            space::measure(self);
            let mut work = self.work.lock();
            (work.flushed, work.compact) = (sealed, true);
            drop(work);
            self.work_done.notify_all();
            self.work_there.notify_all();
        }
    }

    /// Writes all sealed memtables to tables, also those that are sealed meanwhile.
    fn flush(&self) -> Result<(), EngineError> {
        for keyspace in &self.tables {
            let lock = keyspace.tree.get_flush_lock();
            let flushed = keyspace.tree.flush(&lock, self.gc_watermark());
            flushed.map_err(|error| self.convert("write a table in", error.into()))?;
        }
        self.turn_over()
    }

    /// Has fjall put its books in order: drops what no snapshot holds any more, starts another journal when
    /// this one is large, and removes those that the tables hold all of. It does so when a memtable is
    /// sealed through it: that of our own tree, which every batch has written to.
    fn turn_over(&self) -> Result<(), EngineError> {
        let mut work = self.work.lock();
        // fjall's thread syncs the journal and then writes what is sealed by then: one memtable at a time,
        // or a second one would come between, with numbers of batches that are not in the journal for sure
        while self.own.sealed_memtable_count() > 0 {
            if work.stop {
                return Ok(());
            }
            self.check_threads()?;
            self.work_done.wait_for(&mut work, LOOK_AGAIN);
        }
        drop(work);
        self.own.rotate_memtable().map_err(|error| self.convert("start a table in", error))?;
        Ok(())
    }

    /// A thread: keeps the trees in shape after each flush.
    pub(crate) fn compact_when_flushed(&self) {
        loop {
            let mut work = self.work.lock();
            while !work.stop && !work.compact {
                self.work_there.wait(&mut work);
            }
            if work.stop {
                return;
            }
            work.compact = false;
            drop(work);
            if let Err(error) = self.compact() {
                self.poison(error);
                return;
            }
            self.work_done.notify_all();
        }
    }

    fn compact(&self) -> Result<(), EngineError> {
        /// A flush adds one run, and what that makes necessary takes a step a level at most.
        const STEPS: usize = 7;

        for keyspace in &self.tables {
            for _ in 0..STEPS {
                if self.work.lock().stop {
                    return Ok(());
                }
                let before = keyspace.tree.current_version().id();
                let strategy = keyspace.config.compaction_strategy.clone();
                let compacted = keyspace.tree.compact(strategy, self.gc_watermark());
                compacted.map_err(|error| self.convert("compact tables in", error.into()))?;
                if keyspace.tree.current_version().id() == before {
                    break;
                }
                space::measure(self);
                self.work_done.notify_all();
            }
        }
        Ok(())
    }
}

/// What an error of fjall means.
pub(crate) fn convert(doing: &str, dir: &Path, error: fjall::Error) -> EngineError {
    let corrupt = |what: String| EngineError::Corrupt { at: dir.display().to_string(), what };
    match error {
        fjall::Error::Io(source) | fjall::Error::Storage(LsmError::Io(source)) => {
            match source.kind() {
                // a file that is shorter than it was or is gone
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
                    corrupt(format!("cannot {doing} it: {source}"))
                }
                _ => failed(doing, dir, source),
            }
        }
        fjall::Error::Poisoned => {
            EngineError::Poisoned(format!("a thread of fjall has failed in {}", dir.display()))
        }
        fjall::Error::Locked => EngineError::Unusable(format!(
            "{} is in use: its fjall database is locked by another process",
            dir.display()
        )),
        fjall::Error::InvalidVersion(version) => EngineError::Unusable(match version {
            Some(version) => format!("{} is of version {version} of fjall", dir.display()),
            None => format!("{} is not a fjall database", dir.display()),
        }),
        fjall::Error::JournalRecovery(error) => corrupt(format!("its journal: {error:?}")),
        fjall::Error::Storage(error) => corrupt(format!("{error:?}")),
        error => corrupt(format!("{error:?}")),
    }
}

/// A database that was opened, and what was found in it.
pub(crate) struct Store {
    pub(crate) shared: Shared,
    pub(crate) own: OwnRow,
}

fn database(path: &Path, cache_bytes: u64) -> Result<Database, EngineError> {
    Database::builder(path)
        .cache_size(cache_bytes)
        .journal_compression(CompressionType::None)
        // sealing is ours: fjall is not to seal single tables when journals grow
        .max_journaling_size(u64::MAX)
        .worker_threads(1)
        .open()
        .map_err(|error| convert("open", path, error))
}

fn settings(compression: &str) -> KeyspaceCreateOptions {
    let compression = match compression {
        // also the first level: tables of appended keys move to the last as they are
        "lz4" => CompressionPolicy::all(CompressionType::Lz4),
        _ => CompressionPolicy::disabled(),
    };
    KeyspaceCreateOptions::default()
        // sealing is ours
        .max_memtable_size(u64::MAX)
        .data_block_compression_policy(compression)
        // nobody asks for what is not there: revisions come from the index
        .expect_point_read_hits(true)
        .filter_policy(FilterPolicy::all(FilterPolicyEntry::Bloom(
            BloomConstructionPolicy::BitsPerKey(10.0),
        )))
}

/// Opens the database in `dir`, and makes it if there is none.
pub(crate) fn open(dir: &Path, options: &Options) -> Result<Store, EngineError> {
    let (path, mark_path) = (dir.join(FJALL), dir.join(MARK));
    let cache_bytes = options.number(CACHE_BYTES);
    let compression = options.word(COMPRESSION);
    remove_dir_if_there(&dir.join(NEW))?;
    if exists(&path)? {
        check_is_fjall(&path)?;
    } else {
        if exists(&mark_path)? && Mark::open(&mark_path)?.state().durable > 0 {
            return Err(EngineError::Corrupt {
                at: dir.display().to_string(),
                what: format!("{FJALL} is missing, but {MARK} says that there was something in it"),
            });
        }
        create(dir, compression, cache_bytes)?;
    }
    let mut mark = Mark::open(&mark_path)?;
    if let Some(fill) = mark.state().fill {
        journal::fill(&path, fill)?;
        mark.fill(None)?;
    }
    let durable = mark.state().durable;
    let cut = check_journals(dir, &path, durable)?;
    let db = database(&path, cache_bytes)?;
    let own = existing(&db, OWN, dir)?;
    let mut tables = Vec::with_capacity(Table::ALL.len());
    for table in Table::ALL {
        tables.push(existing(&db, table.name(), dir)?);
    }
    let tables = tables.try_into().unwrap_or_else(|_| unreachable!("as many as there are tables"));

    let row = own.get(OWN_BATCH).map_err(|error| convert("read", dir, error))?;
    let corrupt = |what: String| Err(EngineError::Corrupt { at: path.display().to_string(), what });
    let found = match row.as_deref().map(OwnRow::decode) {
        None => OwnRow::default(),
        Some(Some(row)) => row,
        Some(None) => return corrupt("the row that counts batches is damaged".to_owned()),
    };
    if found.number < durable {
        let because = cut.map_or(String::new(), |cut| format!("; {cut}"));
        return corrupt(format!(
            "batch {} is the last one, but batch {durable} was durable{because}",
            found.number
        ));
    }
    remove_if_there(&dir.join(DAMAGED))?;
    remove_if_there(&dir.join(DAMAGED_NEW))?;
    let made = own.get(OWN_COMPRESSION).map_err(|error| convert("read", dir, error))?;
    let made = made.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
    if made != compression {
        return Err(EngineError::Unusable(format!(
            "{} was made with {COMPRESSION} {made}, and {compression} is asked for: convert it into a new \
             directory, or ask for {made}",
            dir.display()
        )));
    }
    // recovery has synced the journal
    mark.durable(found.number)?;
    let shared = Shared {
        dir: dir.to_path_buf(),
        db,
        tables,
        own,
        mark: Mutex::new(mark),
        tables_bytes: AtomicU64::new(space::occupied(&path.join(TREES))?),
        cancelled: AtomicBool::new(false),
        poisoned: OnceLock::new(),
        work: Mutex::default(),
        work_there: Condvar::new(),
        work_done: Condvar::new(),
    };
    Ok(Store { shared, own: found })
}

fn existing(db: &Database, name: &str, dir: &Path) -> Result<Keyspace, EngineError> {
    if !db.keyspace_exists(name) {
        return Err(EngineError::Unusable(format!(
            "{} holds a fjall database of another program: it has no tree {name}",
            dir.display()
        )));
    }
    db.keyspace(name, KeyspaceCreateOptions::default).map_err(|error| convert("open", dir, error))
}

/// Makes an empty database under another name first: a crash leaves either none or a complete one.
fn create(dir: &Path, compression: &str, cache_bytes: u64) -> Result<(), EngineError> {
    // with its name before there is anything that needs it
    Mark::create(dir)?;
    let new = dir.join(NEW);
    let db = database(&new, cache_bytes)?;
    let create = |name: &str| {
        db.keyspace(name, || settings(compression)).map_err(|error| convert("create", &new, error))
    };
    let own = create(OWN)?;
    assert_eq!(own.id(), OWN_ID, "the first tree has the first number");
    for table in Table::ALL {
        create(table.name())?;
    }
    own.insert(OWN_COMPRESSION, compression)
        .and_then(|()| db.persist(PersistMode::SyncAll))
        .map_err(|error| convert("write to", &new, error))?;
    drop(own);
    drop(db);
    sync_dirs(&new)?;
    fs::rename(&new, dir.join(FJALL)).map_err(|error| failed("rename", &new, error))?;
    sync_dir(dir)?;
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        sync_dir(parent)?;
    }
    Ok(())
}

/// Makes the names of all that lies below `dir` durable: fjall does so for files, but not for the directories
/// of its trees.
fn sync_dirs(dir: &Path) -> Result<(), EngineError> {
    let refused = |error| failed("list directory", dir, error);
    for entry in fs::read_dir(dir).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        if entry.file_type().map_err(refused)?.is_dir() {
            sync_dirs(&entry.path())?;
        }
    }
    sync_dir(dir)
}

/// Refuses what fjall would take for its own and stumble over.
fn check_is_fjall(path: &Path) -> Result<(), EngineError> {
    let foreign = |what: &str| {
        Err(EngineError::Unusable(format!("{} is not a fjall database: {what}", path.display())))
    };
    if !path.is_dir() {
        return foreign("it is no directory");
    }
    let version = path.join("version");
    if !exists(&version)? {
        return foreign("it has no file named version");
    }
    let trees = path.join(TREES);
    if !trees.is_dir() {
        return foreign("it has no directory named keyspaces");
    }
    for entry in fs::read_dir(&trees).map_err(|error| failed("list", &trees, error))? {
        let entry = entry.map_err(|error| failed("list", &trees, error))?;
        if entry.path().is_dir()
            && entry.file_name().to_str().is_none_or(|name| name.parse::<u64>().is_err())
        {
            return foreign(&format!("{} is no tree", entry.path().display()));
        }
    }
    Ok(())
}

/// Looks through the journals before fjall does, which would take damage anywhere for a torn end. Cuts off
/// what is torn at the end of the last, and says so.
fn check_journals(dir: &Path, path: &Path, durable: u64) -> Result<Option<String>, EngineError> {
    let journals = journal::list(path)?;
    let newest = journals.last().map(|(id, _)| *id);
    let mut last = None;
    let mut cut = None;
    for (id, journal) in journals {
        let scan = journal::scan(&journal, last)?;
        last = scan.last;
        if let Some(what) = scan.damage {
            if Some(id) != newest {
                // it was synced before the next one was begun
                return Err(EngineError::Corrupt {
                    at: journal.display().to_string(),
                    what: format!("{what}, at byte {}", scan.end),
                });
            }
            let mut note = format!("{} was cut at byte {}: {what}", journal.display(), scan.end);
            if last.is_none_or(|last| last < durable) {
                // perhaps not just the torn end of what nobody was promised
                let kept = dir.join(DAMAGED);
                keep_tail(&journal, scan.end, dir, &kept)?;
                note = format!("{note}; {} has the rest", kept.display());
            }
            cut = Some(note);
        }
        if Some(id) == newest {
            journal::cut(&journal, scan.end)?;
        }
    }
    Ok(cut)
}

/// Copies what follows the last whole batch, under another name first: a crash leaves no part of it that the
/// next opening would take for all.
fn keep_tail(journal: &Path, from: u64, dir: &Path, kept: &Path) -> Result<(), EngineError> {
    use std::io::Seek;

    if exists(kept)? {
        // the first one tells most
        return Ok(());
    }
    let new = dir.join(DAMAGED_NEW);
    let copy = || {
        let mut journal = fs::File::open(journal)?;
        journal.seek(io::SeekFrom::Start(from))?;
        let mut file = fs::File::create(&new)?;
        io::copy(&mut journal, &mut file)?;
        file.sync_all()?;
        fs::rename(&new, kept)
    };
    copy().map_err(|error| failed("keep the end of a journal in", kept, error))?;
    // before the journal is cut
    sync_dir(dir)
}

fn exists(path: &Path) -> Result<bool, EngineError> {
    path.try_exists().map_err(|error| failed("examine", path, error))
}

fn remove_if_there(path: &Path) -> Result<(), EngineError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

fn remove_dir_if_there(path: &Path) -> Result<(), EngineError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}
