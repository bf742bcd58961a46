//! The default engine: redb, a copy-on-write B-tree in one file.
//!
//! In `dir`:
//!
//! | file | holds |
//! |---|---|
//! | `data.redb` | the tables, under their bbolt names, and one of our own |
//! | `data.redb.new` | a copy in the making ([`Engine::reclaim`], first start); removed on opening |
//! | `lock` | nothing; locked by the process that has the engine open |
//!
//! A buffered commit stays in memory (at most half the cache, older ones spill into free pages of the
//! file) until a durable one or an orderly drop, which makes all of it durable. After a crash the file
//! holds the state of the last durable commit, and opening it takes milliseconds, because each durable
//! commit records which pages are free.
//!
//! Pages that commits free are reused only after a durable one, so a long run of buffered commits grows
//! the file. Views between two commits share one read transaction. An open view keeps the pages that later commits
//! free from being reused, so the file grows while it is open.

mod disk;
mod reclaim;
mod store;

use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use engine_api::{
    About, Batch, Durability, Engine, EngineError, OptionKind, OptionSpec, Options, Reclaim,
    Reclaimed, Survives, Table, View,
};
use parking_lot::{Mutex, RwLock};

use reclaim::{Cancel, Touched};
use store::{Snapshot, Store};

const DATA: &str = "data.redb";
const NEW: &str = "data.redb.new";
const LOCK: &str = "lock";

const CACHE_BYTES: &str = "cache-bytes";
const RECLAIM_RATE: &str = "reclaim-mib-per-second";

/// What the engine promises, and how it can be set.
pub const ABOUT: About = About {
    name: "redb",
    summary: "copy-on-write B-tree in one file; the default",
    buffered_survives: Survives::OrderlyEnd,
    durable_survives: Survives::PowerLoss,
    reclaim: Reclaim::Online,
    key_bytes_max: None,
    value_bytes_max: None,
    memory: "pages read and not yet written, up to cache-bytes; during reclaim 8 MiB more and up to 64 MiB of \
             changed keys, at its end as much again as cache-bytes",
    files: "one file, which grows by doubling; only the blocks in use are occupied",
    options: &[
        OptionSpec {
            name: CACHE_BYTES,
            kind: OptionKind::Number { min: 1 << 20, max: usize::MAX as u64, unit: "bytes" },
            default: "67108864",
            help: "memory for pages read and not yet written",
        },
        OptionSpec {
            name: RECLAIM_RATE,
            kind: OptionKind::Number { min: 0, max: 1 << 20, unit: "MiB/s" },
            default: "48",
            help: "how fast reclaim copies; more shortens it and lengthens the writes meanwhile; 0: no limit",
        },
    ],
};

/// The engine over one directory.
pub struct Redb {
    dir: PathBuf,
    cache_bytes: usize,
    /// Bytes a second that reclaim copies; 0: no limit.
    reclaim_rate: u64,
    /// Held by a commit from its start to its end: one committer at a time.
    writer: Mutex<Writer>,
    shared: RwLock<Shared>,
    /// One reclaim at a time.
    reclaiming: Mutex<()>,
    cancel: Cancel,
    /// Why no commit is possible any more.
    poisoned: OnceLock<String>,
    // last: another process may open the directory only when the file is closed
    _lock: File,
}

#[derive(Default)]
struct Writer {
    /// What commits have changed since reclaim last looked; `None` while none runs.
    touched: Option<Touched>,
}

struct Shared {
    store: Arc<Store>,
    /// The state after the last commit, once somebody has asked for it.
    snapshot: Option<Arc<Snapshot>>,
}

impl Redb {
    /// Opens the engine in `dir`, which is created if it is absent.
    ///
    /// # Errors
    /// `Unusable`: another process has it open, or the file is another program's. `Corrupt`: the file is
    /// damaged. `Io`: the system refused. Each names the file.
    pub fn open(dir: &Path, options: &Options) -> Result<Redb, EngineError> {
        fs::create_dir_all(dir).map_err(|error| failed("create directory", dir, error))?;
        let lock = lock(dir)?;
        let cache_bytes = options.number(CACHE_BYTES) as usize;
        let (data, new) = (dir.join(DATA), dir.join(NEW));
        remove_if_there(&new)?;
        if !exists(&data)? {
            // under another name first: a crash leaves either no file or a complete one
            drop(Store::create(&new, cache_bytes)?);
            fs::rename(&new, &data).map_err(|error| failed("rename", &new, error))?;
            sync_dir(dir)?;
            if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                sync_dir(parent)?;
            }
        }
        let store = Arc::new(Store::open(&data, &data, cache_bytes)?);
        Ok(Redb {
            dir: dir.to_path_buf(),
            cache_bytes,
            reclaim_rate: options.number(RECLAIM_RATE) << 20,
            writer: Mutex::default(),
            shared: RwLock::new(Shared { store, snapshot: None }),
            reclaiming: Mutex::new(()),
            cancel: Cancel::default(),
            poisoned: OnceLock::new(),
            _lock: lock,
        })
    }

    /// Whether opening had to read the whole file to find its free pages: after a crash before the first
    /// durable commit, or after a broken disk.
    pub fn repaired(&self) -> bool {
        self.shared.read().store.repaired()
    }

    fn store(&self) -> Arc<Store> {
        Arc::clone(&self.shared.read().store)
    }

    fn snapshot(&self) -> Result<Arc<Snapshot>, EngineError> {
        if let Some(snapshot) = &self.shared.read().snapshot {
            return Ok(Arc::clone(snapshot));
        }
        // taken and kept under one lock: a commit that ends in between would leave an old one behind
        let mut shared = self.shared.write();
        if let Some(snapshot) = &shared.snapshot {
            return Ok(Arc::clone(snapshot));
        }
        let snapshot = Arc::new(shared.store.snapshot()?);
        shared.snapshot = Some(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    fn check_poisoned(&self) -> Result<(), EngineError> {
        match self.poisoned.get() {
            Some(why) => Err(EngineError::Poisoned(why.clone())),
            None => Ok(()),
        }
    }

    /// Stops the engine unless `error` says that nothing has happened; answers `error`.
    fn poison(&self, error: EngineError) -> EngineError {
        if !matches!(error, EngineError::Unusable(_)) {
            // the first reason stays
            let _ = self.poisoned.set(error.to_string());
        }
        error
    }
}

impl Engine for Redb {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        self.check_poisoned()?;
        Ok(Box::new(RedbView(self.snapshot()?)))
    }

    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let mut writer = self.writer.lock();
        self.check_poisoned()?;
        batch.refuse_empty_keys()?;
        if batch.is_empty() && durability == Durability::Buffered {
            return Ok(());
        }
        self.store().commit(batch, durability).map_err(|error| self.poison(error))?;
        if let Some(touched) = &mut writer.touched {
            touched.note(batch);
        }
        let outdated = self.shared.write().snapshot.take();
        // after the lock: closing a read transaction takes redb's own locks
        drop(outdated);
        Ok(())
    }

    /// The blocks that the file occupies. Its length can be more, since redb doubles the length when it
    /// needs room.
    fn size(&self) -> Result<u64, EngineError> {
        // What is committed and still in memory is about to be in the file: a quota must count it.
        let store = self.store();
        Ok(store.size()?.max(occupied(store.live_bytes())))
    }

    /// An estimate from a counter kept with each commit, so that it costs nothing: the file's own header,
    /// bytes of all rows, and a sixteenth for page headers and branches (a file of appended or reclaimed rows has as much; pages
    /// that deletes have thinned out are not counted). redb's exact figure needs a walk of all pages.
    fn size_in_use(&self) -> Result<u64, EngineError> {
        Ok(occupied(self.store().live_bytes()))
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        self.rebuild(self.reclaim_rate)
    }

    fn reclaim_alone(&self) -> Result<Reclaimed, EngineError> {
        self.rebuild(0)
    }

    fn cancel_reclaim(&self) {
        self.cancel.cancel();
    }
}

/// What rows of this many bytes take in a file, which is never nothing: clients take a size of 0 for one
/// that they were not told.
fn occupied(live: u64) -> u64 {
    HEADER_BYTES + live + live / 16
}

/// The page that every file begins with.
const HEADER_BYTES: u64 = 4096;

struct RedbView(Arc<Snapshot>);

impl View for RedbView {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.0.get(table, key)
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        self.0.scan(table, from, to, visit)
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        self.0.last(table)
    }
}

fn failed(doing: &str, path: &Path, source: io::Error) -> EngineError {
    EngineError::Io { what: format!("{doing} {}", path.display()), source }
}

/// Takes the lock that keeps other processes out. redb locks its file as well, but a reclaim puts another
/// file in its place.
fn lock(dir: &Path) -> Result<File, EngineError> {
    let path = dir.join(LOCK);
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| failed("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(EngineError::Unusable(format!(
            "{} is in use: {} is locked by another process",
            dir.display(),
            path.display()
        ))),
        Err(TryLockError::Error(error)) => Err(failed("lock", &path, error)),
    }
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

/// Makes the names in `dir` durable.
fn sync_dir(dir: &Path) -> Result<(), EngineError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| failed("sync directory", dir, error))
}

#[cfg(test)]
mod tests;
