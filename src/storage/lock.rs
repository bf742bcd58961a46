//! One process at a time in a data directory.
//!
//! `member/lock` is ours: locked for as long as the member runs, and holding its process id for
//! whoever comes second. etcd knows nothing of it, so its own two locks are looked at as well: that of
//! the WAL segments and that of the `db` file.

use std::io;
use std::path::{Path, PathBuf};

use super::FileError;
use crate::actors::disk::{Disk, DiskFile, LockKind, Open};

/// Why a data directory cannot be had.
#[derive(thiserror::Error, Clone, Debug)]
pub enum LockError {
    #[error(transparent)]
    Io(#[from] FileError),
    #[error("data directory {} is in use by process {pid}", dir.display())]
    HeldBy { dir: PathBuf, pid: u32 },
    #[error("data directory {} is in use by another process: {} is locked", dir.display(), file.display())]
    Held { dir: PathBuf, file: PathBuf },
}

/// A data directory that no other process uses; dropping gives it up.
#[derive(Debug)]
pub struct DataDirLock {
    /// Kept open: closing it unlocks.
    _own: Box<dyn DiskFile>,
    db: Option<Box<dyn DiskFile>>,
}

impl DataDirLock {
    /// Locks `data_dir`, whose WAL is in `wal_dir`. The segments are only tried, since the log locks
    /// them itself when it is opened; `member/snap/db` stays locked, if it exists.
    ///
    /// # Errors
    /// `HeldBy` or `Held` if another process, ours or an etcd, uses the directory; `Io`.
    pub fn take(disk: &dyn Disk, data_dir: &Path, wal_dir: &Path) -> Result<Self, LockError> {
        let member = data_dir.join("member");
        disk.create_dir_all(&member).map_err(FileError::at("create", &member))?;
        let path = member.join("lock");
        let own = disk.open(&path, Open::WriteOrCreate).map_err(FileError::at("open", &path))?;
        if !own.try_lock(LockKind::Range).map_err(FileError::at("lock", &path))? {
            let dir = data_dir.to_path_buf();
            return Err(match holder(&*own) {
                Some(pid) => LockError::HeldBy { dir, pid },
                None => LockError::Held { dir, file: path },
            });
        }
        let held = |file: PathBuf| LockError::Held { dir: data_dir.to_path_buf(), file };

        let segments = match disk.list(wal_dir) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(FileError::at("list", wal_dir)(error).into()),
        };
        for name in segments.iter().filter(|name| name.ends_with(".wal")) {
            let path = wal_dir.join(name);
            if try_lock(disk, &path, LockKind::Range)?.is_none() {
                return Err(held(path));
            }
        }
        let path = member.join("snap").join("db");
        let db = if disk.exists(&path).map_err(FileError::at("examine", &path))? {
            Some(try_lock(disk, &path, LockKind::Whole)?.ok_or_else(|| held(path))?)
        } else {
            None
        };

        let pid = std::process::id().to_string();
        let path = member.join("lock");
        own.set_size(0).map_err(FileError::at("truncate", &path))?;
        own.write_at(pid.as_bytes(), 0).map_err(FileError::at("write", &path))?;
        Ok(DataDirLock { _own: own, db })
    }

    /// Gives up the lock of `member/snap/db`, for an engine that is about to lock the file itself or
    /// to replace it.
    pub fn release_db(&mut self) {
        self.db = None;
    }
}

fn try_lock(
    disk: &dyn Disk,
    path: &Path,
    kind: LockKind,
) -> Result<Option<Box<dyn DiskFile>>, FileError> {
    let file = disk.open(path, Open::Write).map_err(FileError::at("open", path))?;
    let locked = file.try_lock(kind).map_err(FileError::at("lock", path))?;
    Ok(locked.then_some(file))
}

/// The process id in a lock file; `None` if its holder has not written it yet.
fn holder(file: &dyn DiskFile) -> Option<u32> {
    let mut text = [0; 16];
    let length = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::disk::{MemDisk, OsDisk};

    #[test]
    fn a_second_process_is_told_who_has_the_directory() {
        let temp = tempfile::tempdir().unwrap();
        let data = temp.path().join("data");
        let wal = data.join("member/wal");
        let first = DataDirLock::take(&OsDisk, &data, &wal).unwrap();
        let error = DataDirLock::take(&OsDisk, &data, &wal).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "data directory {} is in use by process {}",
                data.display(),
                std::process::id()
            )
        );
        drop(first);
        DataDirLock::take(&OsDisk, &data, &wal).unwrap();
    }

    #[test]
    fn the_locks_of_etcd_are_seen() {
        let disk = MemDisk::new();
        let data = Path::new("/d");
        let wal = Path::new("/d/member/wal");
        disk.create_dir_all(wal).unwrap();
        disk.create_dir_all(Path::new("/d/member/snap")).unwrap();
        let segment = wal.join("0000000000000000-0000000000000000.wal");
        let db = data.join("member/snap/db");
        let segment_file = disk.open(&segment, Open::Truncate).unwrap();
        let db_file = disk.open(&db, Open::Truncate).unwrap();

        assert!(segment_file.try_lock(LockKind::Range).unwrap());
        let error = DataDirLock::take(&disk, data, wal).unwrap_err();
        assert!(matches!(error, LockError::Held { file, .. } if file == segment));
        drop(segment_file);
        assert!(db_file.try_lock(LockKind::Whole).unwrap());
        let error = DataDirLock::take(&disk, data, wal).unwrap_err();
        assert!(matches!(error, LockError::Held { file, .. } if file == db));
        drop(db_file);

        let mut lock = DataDirLock::take(&disk, data, wal).unwrap();
        let etcd = disk.open(&db, Open::Write).unwrap();
        assert!(!etcd.try_lock(LockKind::Whole).unwrap());
        lock.release_db();
        assert!(etcd.try_lock(LockKind::Whole).unwrap());
        // The segments are left to the log.
        assert!(disk.open(&segment, Open::Write).unwrap().try_lock(LockKind::Range).unwrap());
    }
}
