//! LMDB: a copy-on-write B-tree in one file that is read through a memory map, so a row is found in the page
//! cache itself. Beside engine-redb on one busy machine (1 M rows of 256 bytes, the crates' examples) it
//! loaded and deleted about 2 to 2.5 times as fast, read 2 to 3 times, scanned about 5 times, and reclaimed
//! 3 to 4 times.
//!
//! In `dir`:
//!
//! | file | holds |
//! |---|---|
//! | `data-N.mdb` | the tables, under their bbolt names; `N` begins with the time and grows by 1 with each reclaim |
//! | `data-N.mdb-lock` | who reads what, 512 KiB; made anew on opening |
//! | `head` | `N`, and the last durable state of that file: see the module `head` |
//! | `new.mdb` | a first data file in the making; removed on opening, as are data files that `head` does not name |
//! | `lock` | nothing; locked by the process that has the engine open |
//!
//! # Durability
//! LMDB knows two ways to commit: with syncs, or without any and with a file that a power loss can ruin. We
//! use the second for every commit, and make what it leaves open good:
//!
//! - A durable commit syncs the data file and then notes its meta page in `head`, with a checksum: two syncs,
//!   as many as LMDB's own durable commit makes.
//! - A read transaction stays open on the last durable state, so LMDB writes over none of its pages.
//! - Opening puts the meta page out of `head` into the data file: whatever has been written since, in
//!   whichever order it reached the disk, the file is then in its last durable state.
//!
//! So buffered commits cost no sync and no memory of ours, views read them like all others, and a crash of
//! the machine or of the process loses them whole. Commits of ten rows were 40 to 70 times as many a second as
//! durable ones; LMDB's own compromise, which leaves only the meta unsynced, syncs the data each time. An orderly drop makes them durable. Pages that they free
//! can be reused only after a durable commit; so one of them is made durable when together they have
//! written `buffer-bytes`, or when the file grows while that much of it is free.
//!
//! # Limits
//! - The file cannot outgrow `map-bytes` of address space, which is reserved on opening; the default costs
//!   nothing on 64-bit Linux, where a process has 128 times as much. A commit beyond it fails like one on a
//!   full disk.
//! - An open view keeps the pages that later commits free from being reused, so the file grows while it is
//!   open. At most 8192 views can be open at once; the next one fails.
//! - Memory is the page cache: pages of the file count as the process's memory, and the system takes them back
//!   when it needs to. Only what one commit changes is held apart until it is written.
//! - LMDB has no checksums. Found on opening are a file that is shorter than it was, that belongs to an
//!   earlier state, that is another program's, and a `head` of which no slot is whole. Each state is in two
//!   slots of `head`, so damage of one loses nothing; damage of both slots of the newest state looks like a
//!   write cut short by a power loss, and opens the state before, some of whose pages may have been reused. A
//!   page that the disk has changed is found only if it leads nowhere; else its rows are read as they are, and
//!   a page whose inner structure is damaged can end the process. A read error of the disk ends it as well (SIGBUS), as with every memory map.
//! - A full disk is an error, not more: LMDB writes to its lock file through a map, where it would be a SIGBUS,
//!   but we fill that file before. A file system that copies what is written over (btrfs, ZFS) has no block
//!   set aside for that, and keeps the risk.
//! - The data file belongs to machines of the same byte order and word size.

#[cfg(not(all(unix, target_pointer_width = "64")))]
compile_error!("engine lmdb reserves more address space than this platform has");

mod head;
mod reclaim;
mod store;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use engine_api::{
    About, Batch, Durability, Engine, EngineError, OptionKind, OptionSpec, Options, Reclaim,
    Reclaimed, Survives, View,
};
use parking_lot::{Mutex, RwLock};

use head::{HEAD_BYTES, Head};
use reclaim::Touched;
use store::{Read, Settings, Store};

const HEAD: &str = "head";
const NEW: &str = "new.mdb";
const LOCK: &str = "lock";

const MAP_BYTES: &str = "map-bytes";
const BUFFER_BYTES: &str = "buffer-bytes";
const READ_AHEAD: &str = "read-ahead";

/// What fits in a page of 4 KiB, twice, with LMDB's overhead.
const KEY_BYTES_MAX: usize = 1982;

/// Map sizes are multiples of this: of the page size of every platform.
const MAP_STEP: usize = 1 << 16;

/// What the engine promises, and how it can be set.
pub const ABOUT: About = About {
    name: "lmdb",
    summary: "copy-on-write B-tree in one memory-mapped file; fast reads, no checksums",
    buffered_survives: Survives::OrderlyEnd,
    durable_survives: Survives::PowerLoss,
    reclaim: Reclaim::Online,
    key_bytes_max: Some(KEY_BYTES_MAX as u64),
    value_bytes_max: None,
    memory: "the page cache, which the system takes back at need, and what one commit changes",
    files: "one file, which grows by pages; a second one during reclaim",
    options: &[
        OptionSpec {
            name: MAP_BYTES,
            kind: OptionKind::Number { min: 1 << 20, max: 1 << 46, unit: "bytes" },
            default: "1099511627776",
            help: "address space to reserve: the file cannot outgrow it, and twice as much during reclaim",
        },
        OptionSpec {
            name: BUFFER_BYTES,
            kind: OptionKind::Number { min: 1 << 16, max: u64::MAX, unit: "bytes" },
            default: "67108864",
            help: "buffered commits are made durable when they have written this much: fewer syncs, a larger file",
        },
        OptionSpec {
            name: READ_AHEAD,
            kind: OptionKind::Flag,
            default: "true",
            help: "lets the system read neighbouring pages: false suits random reads of a file beyond memory",
        },
    ],
};

/// The engine over one directory.
pub struct Lmdb {
    dir: PathBuf,
    settings: Settings,
    buffer_bytes: u64,
    /// Held by a commit from its start to its end: one committer at a time.
    writer: Mutex<Writer>,
    store: RwLock<Arc<Store>>,
    /// One reclaim at a time.
    reclaiming: Mutex<()>,
    /// Whether the one under way is to end.
    cancelled: AtomicBool,
    /// Why no commit is possible any more.
    poisoned: OnceLock<String>,
    // last: another process may open the directory only when the files are closed
    _lock: File,
}

struct Writer {
    head: Head,
    generation: u64,
    /// On the last durable state, whose pages it keeps from being reused.
    pin: Read,
    /// Whether there is anything that is not durable; the bytes that were written for it, and how
    /// long the file was before.
    dirty: bool,
    buffered: u64,
    durable_bytes: u64,
    /// What commits have changed since reclaim last looked; `None` while none runs.
    touched: Option<Touched>,
}

fn data_name(generation: u64) -> String {
    format!("data-{generation}.mdb")
}

impl Lmdb {
    /// Opens the engine in `dir`, which is created if it is absent.
    ///
    /// # Errors
    /// `Unusable`: another process has it open, another version wrote it, or the address space is too small. `Corrupt`: a file is
    /// missing, damaged, or another program's. `Io`: the system refused. Each names the file.
    pub fn open(dir: &Path, options: &Options) -> Result<Lmdb, EngineError> {
        fs::create_dir_all(dir).map_err(|error| failed("create directory", dir, error))?;
        let lock = lock(dir)?;
        let settings = Settings {
            map_bytes: (options.number(MAP_BYTES) as usize).next_multiple_of(MAP_STEP),
            read_ahead: options.flag(READ_AHEAD),
        };
        store::remove(&dir.join(NEW))?;
        let (head, point) = match Head::open(&dir.join(HEAD))? {
            Some(found) => found,
            None => {
                create(dir, settings)?;
                Head::open(&dir.join(HEAD))?.expect("the head was just created")
            }
        };
        let store = Store::open(&dir.join(data_name(point.generation)), settings, &point)?;
        // only now: of a damaged head that names a file which is gone, another one is all that is left
        for generation in store::data_files(dir)? {
            if generation != point.generation {
                store::remove(&dir.join(data_name(generation)))?;
            }
        }
        let pin = store.read()?;
        Ok(Lmdb {
            dir: dir.to_path_buf(),
            settings,
            buffer_bytes: options.number(BUFFER_BYTES),
            writer: Mutex::new(Writer {
                head,
                generation: point.generation,
                pin,
                dirty: false,
                buffered: 0,
                durable_bytes: store.used_bytes(),
                touched: None,
            }),
            store: RwLock::new(Arc::new(store)),
            reclaiming: Mutex::new(()),
            cancelled: AtomicBool::new(false),
            poisoned: OnceLock::new(),
            _lock: lock,
        })
    }

    fn store(&self) -> Arc<Store> {
        Arc::clone(&self.store.read())
    }

    /// Makes all commits durable.
    fn make_durable(&self, writer: &mut Writer) -> Result<(), EngineError> {
        if !writer.dirty {
            return Ok(());
        }
        let store = self.store();
        store.sync()?;
        let point = store.point(writer.generation)?;
        let pin = store.read()?;
        writer.head.write(&self.dir.join(HEAD), &point)?;
        // only now: until the head has the new state, a crash leads back to the old one
        writer.pin = pin;
        writer.dirty = false;
        writer.buffered = 0;
        writer.durable_bytes = store.used_bytes();
        Ok(())
    }

    /// Whether buffered commits are due to be made durable, so that the pages that they freed become
    /// reusable: by what they have written, or because the file grows although much of it is free.
    fn is_buffer_full(&self, writer: &Writer) -> Result<bool, EngineError> {
        /// The file may grow by this part of the buffer between two syncs: a long view, which keeps pages
        /// from being reused whatever we do, must not cause one for each commit.
        const GROWTH_PART: u64 = 16;
        if writer.buffered >= self.buffer_bytes {
            return Ok(true);
        }
        let store = self.store();
        let used = store.used_bytes();
        if used.saturating_sub(writer.durable_bytes) < self.buffer_bytes / GROWTH_PART {
            return Ok(false);
        }
        Ok(used.saturating_sub(store.bytes_in_use()?) >= self.buffer_bytes)
    }

    fn check_poisoned(&self) -> Result<(), EngineError> {
        match self.poisoned.get() {
            Some(why) => Err(EngineError::Poisoned(why.clone())),
            None => Ok(()),
        }
    }

    /// Stops the engine; answers `error`.
    fn poison(&self, error: EngineError) -> EngineError {
        // the first reason stays
        let _ = self.poisoned.set(error.to_string());
        error
    }
}

impl Drop for Lmdb {
    fn drop(&mut self) {
        if self.poisoned.get().is_none() {
            // what cannot be kept was promised to nobody
            let _ = self.make_durable(&mut self.writer.lock());
        }
    }
}

impl Engine for Lmdb {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        self.check_poisoned()?;
        Ok(Box::new(self.store().view()?))
    }

    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let mut writer = self.writer.lock();
        self.check_poisoned()?;
        Store::check(batch)?;
        if !batch.is_empty() {
            writer.buffered += self.store().commit(batch).map_err(|error| self.poison(error))?;
            writer.dirty = true;
            if let Some(touched) = &mut writer.touched {
                touched.note(batch);
            }
        }
        let due = durability == Durability::Durable
            || self.is_buffer_full(&writer).map_err(|error| self.poison(error))?;
        if due {
            self.make_durable(&mut writer).map_err(|error| self.poison(error))?;
        }
        Ok(())
    }

    fn size(&self) -> Result<u64, EngineError> {
        Ok(self.store().file_bytes()? + HEAD_BYTES)
    }

    /// The pages of all tables, as LMDB counts them in each commit; not those that list free pages.
    fn size_in_use(&self) -> Result<u64, EngineError> {
        self.check_poisoned()?;
        Ok(self.store().bytes_in_use()? + HEAD_BYTES)
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        self.rebuild()
    }

    fn cancel_reclaim(&self) {
        self.cancelled.store(true, Ordering::Release);
    }
}

/// Makes the first data file and then the head that names it; a crash leaves no head, or both.
fn create(dir: &Path, settings: Settings) -> Result<(), EngineError> {
    for generation in store::data_files(dir)? {
        let path = dir.join(data_name(generation));
        // one transaction makes the tables; a file with more of them had a head once
        if store::newest_transaction(&path)? > 1 {
            return Err(corrupt(
                &dir.join(HEAD),
                format!("the file is missing, but {} holds data", path.display()),
            ));
        }
        store::remove(&path)?;
    }
    let generation = first_generation();
    let (data, new) = (dir.join(data_name(generation)), dir.join(NEW));
    let store = Store::create(&new, settings)?;
    store.sync()?;
    let point = store.point(generation)?;
    drop(store);
    fs::rename(&new, &data).map_err(|error| failed("rename", &new, error))?;
    store::remove(&new)?;
    sync_dir(dir)?;
    Head::create(dir, HEAD, &point)?;
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        sync_dir(parent)?;
    }
    Ok(())
}

/// Where the counting of data files begins: at the time, so that no two directories have one of the same
/// name. The bindings know open files by their paths and refuse to open one twice, but a directory can take
/// the path of another one whose files are still open.
fn first_generation() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // a clock before 1970 is as good a beginning as any
    now.map_or(1, |now| now.as_nanos() as u64)
}

fn failed(doing: &str, path: &Path, source: io::Error) -> EngineError {
    EngineError::Io { what: format!("{doing} {}", path.display()), source }
}

fn corrupt(path: &Path, what: impl Into<String>) -> EngineError {
    EngineError::Corrupt { at: path.display().to_string(), what: what.into() }
}

/// Takes the lock that keeps other processes out, and this one from opening the directory twice.
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
