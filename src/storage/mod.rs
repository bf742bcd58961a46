//! What stands in a data directory besides the engine's own files: the write-ahead log, snapshot
//! files, locks. No actix here: an actor owns each of these and calls it on a thread where waiting
//! for a disk is allowed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::actors::disk::{Disk, LockKind, Open};

pub mod home;
pub mod install;
pub mod lock;
pub mod snap_dir;
pub mod wal_log;

/// An operation that the operating system refused.
#[derive(thiserror::Error, Clone, Debug)]
#[error("{operation} {}: {source}", path.display())]
pub struct FileError {
    /// What was being done, as a verb: "write".
    pub operation: &'static str,
    pub path: PathBuf,
    /// Shared because a poisoned log answers it again and again.
    pub source: Arc<io::Error>,
}

impl FileError {
    /// For `map_err`.
    pub fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
        move |source| FileError { operation, path: path.to_path_buf(), source: Arc::new(source) }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Removes the files of `dir` that `matches` accepts, in the order of their names, until `keep` are
/// left or one is locked by somebody; 0 keeps all. The answer is what was removed.
fn purge(
    disk: &dyn Disk,
    dir: &Path,
    keep: usize,
    matches: impl Fn(&str) -> bool,
) -> Result<Vec<PathBuf>, FileError> {
    let mut removed = Vec::new();
    if keep == 0 {
        return Ok(removed);
    }
    let mut names = disk.list(dir).map_err(FileError::at("list", dir))?;
    names.retain(|name| matches(name));
    let surplus = names.len().saturating_sub(keep);
    for name in &names[..surplus] {
        let path = dir.join(name);
        let file = match disk.open(&path, Open::Write) {
            Ok(file) => file,
            // Somebody else removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(FileError::at("open", &path)(error)),
        };
        if !file.try_lock(LockKind::Range).map_err(FileError::at("lock", &path))? {
            break;
        }
        disk.remove_file(&path).map_err(FileError::at("remove", &path))?;
        removed.push(path);
    }
    Ok(removed)
}
