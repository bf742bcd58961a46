//! etcd's own database file, read and written: a data directory can go from etcd to us and back.
//!
//! In `dir`, which is `member/snap` of a data directory:
//!
//! | file | holds |
//! |---|---|
//! | `db` | the tables, as buckets of a bbolt file; locked with `flock`, as etcd does, while it is open |
//! | `db.tmp.reclaim` | a copy in the making ([`Engine::reclaim`], first start); removed on opening, by etcd as well |
//!
//! A buffered commit stays in memory until a durable one or an orderly drop, which makes all of it durable;
//! beyond half the cache its pages are written early, where the last durable state does not see them. After
//! a crash the file holds the state of the last durable commit.
//!
//! Pages are read with `pread` into a cache of our own, not through a memory map as in bbolt: an unreadable
//! sector or a file that another program cuts short is then an error with a name and not the end of the process,
//! memory has a bound, and each page is checked once, when it comes into the cache. What a map would save, the
//! copy out of the system's own cache, is paid for pages that are not in ours.
//!
//! Like etcd, the engine does not store which pages are free unless told to: opening a file reads all of it once, to
//! find them and to see that it is whole. A stored list is believed as it is by bbolt; [`Bbolt::check`] finds out if it
//! is wrong.
//!
//! An open view keeps the pages that it sees from being reused, so the file grows while it is open.

mod cache;
mod check;
mod disk;
pub mod format;
mod reclaim;
mod space;
mod store;
mod tree;

use std::fs;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use engine_api::{
    About, Batch, Durability, Engine, EngineError, OptionKind, OptionSpec, Options, Reclaim,
    Reclaimed, Survives, Table, View, is_empty_range,
};
use parking_lot::{Mutex, RwLock};

pub use check::Checked;

use disk::{Files, OsFiles};
use format::{IS_BUCKET, KEY_BYTES_MAX, Page, PageDamage, VALUE_BYTES_MAX};
use reclaim::Touched;
use store::{Bucket, Committer, Settings, Snapshot};
use tree::{Root, Tree};

/// The name of the file in its directory.
pub const DATA: &str = "db";
/// etcd removes what begins like this when it starts, as we do.
const NEW: &str = "db.tmp.reclaim";

const CACHE_BYTES: &str = "cache-bytes";
const SYNC_FREELIST: &str = "sync-freelist";

/// What the engine promises, and how it can be set.
pub const ABOUT: About = About {
    name: "bbolt",
    summary: "etcd's own file: a data directory can be taken over from etcd and given back",
    buffered_survives: Survives::OrderlyEnd,
    durable_survives: Survives::PowerLoss,
    reclaim: Reclaim::Online,
    key_bytes_max: Some(KEY_BYTES_MAX as u64),
    value_bytes_max: Some(VALUE_BYTES_MAX as u64),
    memory: "pages read and not yet written, up to cache-bytes and half as much; twice that during reclaim",
    files: "one file, which never shrinks but by reclaim; the copy beside it meanwhile",
    options: &[
        OptionSpec {
            name: CACHE_BYTES,
            kind: OptionKind::Number { min: 1 << 20, max: usize::MAX as u64, unit: "bytes" },
            default: "67108864",
            help: "memory for pages that were read; half as much again for those not yet written",
        },
        OptionSpec {
            name: SYNC_FREELIST,
            kind: OptionKind::Flag,
            default: "false",
            help: "store the list of free pages with each durable commit: opening need not read the whole \
                   file then, but each commit writes 8 bytes for each free page",
        },
    ],
};

/// The engine over one directory.
pub struct Bbolt {
    dir: PathBuf,
    settings: Settings,
    files: Arc<dyn Files>,
    /// Held by a commit from its start to its end: one committer at a time.
    writer: Mutex<Writer>,
    /// The state after the last commit.
    newest: RwLock<Arc<Snapshot>>,
    /// One reclaim at a time.
    reclaiming: Mutex<()>,
    /// Whether the one under way is to end.
    cancelled: AtomicBool,
    /// Why no commit is possible any more.
    poisoned: OnceLock<String>,
}

struct Writer {
    committer: Committer,
    /// What commits have changed since reclaim last looked; `None` while none runs.
    touched: Option<Touched>,
}

impl Bbolt {
    /// Opens the engine in `dir`, which is created if it is absent.
    ///
    /// # Errors
    /// `Unusable`: another process has it open, or the file is no bbolt file. `Corrupt`: the file is
    /// damaged. `Io`: the system refused. Each names the file.
    pub fn open(dir: &Path, options: &Options) -> Result<Bbolt, EngineError> {
        Bbolt::open_with(dir, options, Arc::new(OsFiles))
    }

    fn open_with(
        dir: &Path,
        options: &Options,
        files: Arc<dyn Files>,
    ) -> Result<Bbolt, EngineError> {
        let settings = Settings {
            cache_bytes: options.number(CACHE_BYTES) as usize,
            sync_freelist: options.flag(SYNC_FREELIST),
        };
        fs::create_dir_all(dir).map_err(|error| failed("create directory", dir, error))?;
        let (data, new) = (dir.join(DATA), dir.join(NEW));
        let in_use = |path: &Path| {
            EngineError::Unusable(format!("{} is in use by another process", path.display()))
        };
        let committer = match files.open(&data, false) {
            Ok(Some(disk)) => {
                remove_if_there(&new)?;
                // whoever gave it its name may have died before that was durable
                sync_dir(&*files, dir)?;
                Committer::open(disk, &data, settings)?
            }
            Ok(None) => return Err(in_use(&data)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // under another name first: a crash leaves either no file or a complete one
                let disk = files
                    .open(&new, true)
                    .map_err(|error| failed("create", &new, error))?
                    .ok_or_else(|| in_use(&new))?;
                let committer = Committer::create(disk, &data, settings)?;
                files.rename(&new, &data).map_err(|error| failed("rename", &new, error))?;
                sync_dir(&*files, dir)?;
                if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                    sync_dir(&*files, parent)?;
                }
                committer
            }
            Err(error) => return Err(failed("open", &data, error)),
        };
        let newest = Arc::new(committer.snapshot());
        Ok(Bbolt {
            dir: dir.to_path_buf(),
            settings,
            files,
            writer: Mutex::new(Writer { committer, touched: None }),
            newest: RwLock::new(newest),
            reclaiming: Mutex::new(()),
            cancelled: AtomicBool::new(false),
            poisoned: OnceLock::new(),
        })
    }

    /// Checks that each page of the file is in use once or free, and that all keys are in order, as
    /// `bbolt check` does. Commits wait; it reads everything.
    ///
    /// # Errors
    /// `Corrupt`, naming the page, or `Io`.
    pub fn check(&self) -> Result<Checked, EngineError> {
        check::check(&self.writer.lock().committer)
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.newest.read())
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

impl Engine for Bbolt {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        self.check_poisoned()?;
        Ok(Box::new(BboltView(self.snapshot())))
    }

    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let mut writer = self.writer.lock();
        self.check_poisoned()?;
        batch.refuse_empty_keys()?;
        let changed =
            writer.committer.commit(batch, durability).map_err(|error| self.poison(error))?;
        if changed {
            if let Some(touched) = &mut writer.touched {
                touched.note(batch);
            }
            let newest = Arc::new(writer.committer.snapshot());
            let outdated = std::mem::replace(&mut *self.newest.write(), newest);
            drop(outdated);
        }
        Ok(())
    }

    /// As etcd counts it: all pages that the file has had. Its length can be a little more, since it
    /// grows in steps.
    fn size(&self) -> Result<u64, EngineError> {
        Ok(self.newest.read().store.size())
    }

    /// Exact: the pages that the newest state reaches.
    fn size_in_use(&self) -> Result<u64, EngineError> {
        Ok(self.newest.read().store.size_in_use())
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        self.rebuild()
    }

    fn cancel_reclaim(&self) {
        self.cancelled.store(true, Ordering::Release);
    }
}

impl Drop for Bbolt {
    fn drop(&mut self) {
        if self.poisoned.get().is_none() {
            // nobody is left to be told; what the file keeps is the last durable state
            let _ = self.writer.get_mut().committer.flush();
        }
    }
}

struct BboltView(Arc<Snapshot>);

impl Snapshot {
    fn tree(&self) -> Tree<'_> {
        Tree { store: &self.store, pages: self.version.pages }
    }

    fn root(&self, table: Table) -> Option<&Root> {
        self.version.buckets[table as usize].as_ref().map(|Bucket { root, .. }| root)
    }

    /// The value of an element of a bucket's leaf. Small ones are copied, so that they do not keep their whole page.
    fn value(&self, root: &Root, page: &Page<Bytes>, index: usize) -> Result<Bytes, EngineError> {
        if page.flags(index) & IS_BUCKET != 0 {
            let id = match root {
                Root::Inline(_, id) => *id,
                Root::Page(_) => page.id(),
            };
            return Err(self.store.damaged(id, PageDamage::Nested { index }));
        }
        let range = page.value_range(index);
        Ok(if range.len() < page.bytes().len() / 2 {
            Bytes::copy_from_slice(&page.bytes()[range])
        } else {
            page.bytes().slice(range)
        })
    }
}

impl View for Snapshot {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let Some(root) = self.root(table) else { return Ok(None) };
        let found = self.tree().find(root, key)?;
        found.map(|(page, index)| self.value(root, &page, index)).transpose()
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let Some(root) = self.root(table).filter(|_| !is_empty_range(from, to)) else {
            return Ok(());
        };
        self.tree().scan(root, from, to, &mut |page, index| {
            if page.flags(index) & IS_BUCKET != 0 {
                return Err(PageDamage::Nested { index });
            }
            Ok(visit(page.key(index), page.value(index)))
        })
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let Some(root) = self.root(table) else { return Ok(None) };
        let Some((page, index)) = self.tree().last(root)? else { return Ok(None) };
        Ok(Some((Bytes::copy_from_slice(page.key(index)), self.value(root, &page, index)?)))
    }
}

impl View for BboltView {
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

fn remove_if_there(path: &Path) -> Result<(), EngineError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

/// Makes the names in `dir` durable.
fn sync_dir(files: &dyn Files, dir: &Path) -> Result<(), EngineError> {
    files.sync_dir(dir).map_err(|error| failed("sync directory", dir, error))
}

#[cfg(test)]
mod tests;
