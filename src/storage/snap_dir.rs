//! The directory `member/snap`: snapshot files, backends received from a leader, and what a crash
//! leaves of both. The engine's own `db` file stands beside them and is not touched here, except when
//! a received one replaces it.
//!
//! A file gets its name when its content is on disk, so that a name is never seen without it.

use std::io;
use std::path::{Path, PathBuf};

use quorate_proto::{raftpb, walpb};

use super::FileError;
use crate::actors::disk::{DiskFile, Open, SharedDisk, read_file};
use crate::core::snap::{SnapDamage, SnapName, db_name, decode, encode, parse_db_name};

/// Why snapshots cannot be kept or read.
#[derive(thiserror::Error, Clone, Debug)]
pub enum SnapError {
    #[error(transparent)]
    Io(#[from] FileError),
    #[error("{} is missing, although a snapshot at index {index} says that it was received", path.display())]
    NoDb { path: PathBuf, index: u64 },
}

/// The snapshots of a member.
#[derive(Clone, Debug)]
pub struct SnapDir {
    disk: SharedDisk,
    dir: PathBuf,
}

/// The newest snapshot that can be used, and what was put aside on the way to it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Loaded {
    pub snapshot: Option<raftpb::Snapshot>,
    /// Files that were not snapshots, under their old names, now ending in `.broken`.
    pub broken: Vec<(PathBuf, SnapDamage)>,
}

impl SnapDir {
    /// The snapshots in `dir`, which is made if it does not exist; half-made files of an earlier
    /// process are removed.
    ///
    /// # Errors
    /// `Io`.
    pub fn open(disk: SharedDisk, dir: &Path) -> Result<Self, SnapError> {
        disk.create_dir_all(dir).map_err(FileError::at("create", dir))?;
        for name in disk.list(dir).map_err(FileError::at("list", dir))? {
            if name.starts_with("tmp") || name.starts_with("db.tmp.") {
                let path = dir.join(name);
                disk.remove_file(&path).map_err(FileError::at("remove", &path))?;
            }
        }
        Ok(SnapDir { disk, dir: dir.to_path_buf() })
    }

    /// Writes the file for `snapshot`; it is on disk when this returns. The WAL's snapshot record may
    /// be written only afterwards.
    ///
    /// # Errors
    /// `Io`; nothing has changed then.
    /// # Panics
    /// If the snapshot has no metadata.
    pub fn save(&self, snapshot: &raftpb::Snapshot) -> Result<PathBuf, SnapError> {
        let metadata = snapshot.metadata.as_ref().expect("a snapshot has an index and a term");
        let name = SnapName { term: metadata.term, index: metadata.index }.to_string();
        let aside = self.dir.join(format!("tmp.{name}"));
        let path = self.dir.join(name);
        let file =
            self.disk.open(&aside, Open::Truncate).map_err(FileError::at("create", &aside))?;
        let outcome = file
            .write_at(&encode(snapshot), 0)
            .map_err(FileError::at("write", &aside))
            .and_then(|()| file.sync_all().map_err(FileError::at("sync", &aside)));
        if let Err(error) = outcome {
            // It may have been the disk's last space. If it stays, it goes at the next start.
            self.disk.remove_file(&aside).ok();
            return Err(error.into());
        }
        self.publish(&aside, &path)?;
        Ok(path)
    }

    /// The newest snapshot among `valid`, the WAL's valid snapshot records. Files that are not sound
    /// are renamed to `<name>.broken`; one without a WAL record is left out: its member stopped
    /// before the snapshot counted.
    ///
    /// # Errors
    /// `Io`: a file that cannot be read is not taken for broken.
    pub fn load_newest(&self, valid: &[walpb::Snapshot]) -> Result<Loaded, SnapError> {
        let mut loaded = Loaded::default();
        for name in self.names(".snap")?.iter().rev() {
            let path = self.dir.join(name);
            let bytes = read_file(&*self.disk, &path).map_err(FileError::at("read", &path))?;
            match decode(bytes.into()) {
                Ok(snapshot) => {
                    let metadata = snapshot.metadata.clone().unwrap_or_default();
                    let known = valid.iter().any(|record| {
                        (record.index(), record.term()) == (metadata.index, metadata.term)
                    });
                    if known {
                        loaded.snapshot = Some(snapshot);
                        break;
                    }
                }
                Err(damage) => {
                    let aside = self.dir.join(format!("{name}.broken"));
                    self.disk.rename(&path, &aside).map_err(FileError::at("rename", &path))?;
                    loaded.broken.push((path, damage));
                }
            }
        }
        Ok(loaded)
    }

    /// Begins to receive the backend for the snapshot at `index`.
    ///
    /// # Errors
    /// `Io`.
    pub fn receive_db(&self, index: u64) -> Result<DbReceiver, SnapError> {
        let aside = self.dir.join(format!("tmp.{}", db_name(index)));
        let file =
            self.disk.open(&aside, Open::Truncate).map_err(FileError::at("create", &aside))?;
        Ok(DbReceiver { snaps: self.clone(), index, aside, file, at: 0, finished: false })
    }

    /// Where the backend received for the snapshot at `index` is, if it is there.
    ///
    /// # Errors
    /// `Io`.
    pub fn received_db(&self, index: u64) -> Result<Option<PathBuf>, SnapError> {
        let path = self.dir.join(db_name(index));
        let there = self.disk.exists(&path).map_err(FileError::at("examine", &path))?;
        Ok(there.then_some(path))
    }

    /// Puts the backend received for the snapshot at `index` in the place of `db`.
    ///
    /// # Errors
    /// `NoDb` if it was not received; `Io`.
    pub fn install_db(&self, index: u64) -> Result<PathBuf, SnapError> {
        let path = self.dir.join("db");
        match self.received_db(index)? {
            Some(received) => self.publish(&received, &path)?,
            None => return Err(SnapError::NoDb { path: self.dir.join(db_name(index)), index }),
        }
        Ok(path)
    }

    /// Removes received backends for snapshots below `index`. Answers what was removed.
    ///
    /// # Errors
    /// `Io`.
    pub fn release_dbs(&self, index: u64) -> Result<Vec<PathBuf>, SnapError> {
        let mut removed = Vec::new();
        for name in self.names(".snap.db")? {
            if parse_db_name(&name).is_some_and(|of| of < index) {
                let path = self.dir.join(name);
                self.disk.remove_file(&path).map_err(FileError::at("remove", &path))?;
                removed.push(path);
            }
        }
        Ok(removed)
    }

    /// Removes the oldest snapshots as long as more than `keep` remain, and in the same way the
    /// received backends, of which those for `needed` or a later snapshot stay in any case; 0 keeps all.
    /// Answers what was removed.
    ///
    /// # Errors
    /// `Io`.
    pub fn purge(&self, keep: usize, needed: u64) -> Result<Vec<PathBuf>, SnapError> {
        let mut removed =
            super::purge(&*self.disk, &self.dir, keep, |name| name.ends_with(".snap"))?;
        let old = |name: &str| parse_db_name(name).is_some_and(|of| of < needed);
        removed.extend(super::purge(&*self.disk, &self.dir, keep, old)?);
        Ok(removed)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ascending.
    fn names(&self, suffix: &str) -> Result<Vec<String>, SnapError> {
        let mut names = self.disk.list(&self.dir).map_err(FileError::at("list", &self.dir))?;
        names.retain(|name| name.ends_with(suffix) && !name.starts_with("tmp"));
        Ok(names)
    }

    fn publish(&self, aside: &Path, path: &Path) -> Result<(), FileError> {
        self.disk.rename(aside, path).map_err(FileError::at("rename", aside))?;
        self.disk.sync_dir(&self.dir).map_err(FileError::at("sync", &self.dir))
    }
}

/// A backend on its way from a leader. Dropping it unfinished removes it.
#[derive(Debug)]
pub struct DbReceiver {
    snaps: SnapDir,
    index: u64,
    aside: PathBuf,
    file: Box<dyn DiskFile>,
    at: u64,
    finished: bool,
}

impl DbReceiver {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), SnapError> {
        self.file.write_at(bytes, self.at).map_err(FileError::at("write", &self.aside))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Bytes received so far.
    pub fn size(&self) -> u64 {
        self.at
    }

    /// Makes the backend durable under its name.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(mut self) -> Result<PathBuf, SnapError> {
        self.file.sync_all().map_err(FileError::at("sync", &self.aside))?;
        let path = self.snaps.dir.join(db_name(self.index));
        self.snaps.publish(&self.aside, &path)?;
        self.finished = true;
        Ok(path)
    }
}

/// So that a download can be copied into it.
impl io::Write for DbReceiver {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        DbReceiver::write(self, bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for DbReceiver {
    fn drop(&mut self) {
        if !self.finished {
            // If that fails, it goes at the next start.
            self.snaps.disk.remove_file(&self.aside).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::actors::disk::{Disk, Fault, MemDisk};

    fn snapshot(term: u64, index: u64) -> raftpb::Snapshot {
        raftpb::Snapshot {
            data: "{}".into(),
            metadata: Some(raftpb::SnapshotMetadata { conf_state: None, index, term }),
        }
    }

    fn record(term: u64, index: u64) -> walpb::Snapshot {
        walpb::Snapshot { index: Some(index), term: Some(term), conf_state: None }
    }

    fn open() -> (MemDisk, SnapDir) {
        let mem = MemDisk::new();
        let snaps = SnapDir::open(Arc::new(mem.clone()), Path::new("/s")).unwrap();
        mem.sync_dir(Path::new("/")).unwrap();
        (mem, snaps)
    }

    #[test]
    fn the_newest_with_a_wal_record_is_loaded_and_broken_ones_are_put_aside() {
        let (mem, snaps) = open();
        for (term, index) in [(1, 10), (1, 20), (2, 30), (2, 40)] {
            snaps.save(&snapshot(term, index)).unwrap();
        }
        let valid = [record(0, 0), record(1, 10), record(1, 20), record(2, 30)];
        assert_eq!(snaps.load_newest(&valid).unwrap().snapshot, Some(snapshot(2, 30)));
        let broken = Path::new("/s/0000000000000002-000000000000001e.snap");
        mem.open(broken, Open::Write).unwrap().write_at(b"?", 4).unwrap();
        let loaded = snaps.load_newest(&valid).unwrap();
        assert_eq!(loaded.snapshot, Some(snapshot(1, 20)));
        assert_eq!(loaded.broken.len(), 1);
        assert!(mem.exists(&broken.with_extension("snap.broken")).unwrap());
        assert_eq!(snaps.load_newest(&[record(1, 20)]).unwrap().broken, []);
        assert_eq!(snaps.load_newest(&[record(0, 0)]).unwrap(), Loaded::default());
    }

    #[test]
    fn what_was_saved_survives_a_crash_and_what_failed_leaves_nothing() {
        let (mem, snaps) = open();
        snaps.save(&snapshot(1, 10)).unwrap();
        for n in 0.. {
            mem.fail_from(mem.changes() + n, Fault::NoSpace);
            let saved = snaps.save(&snapshot(1, 20));
            mem.heal();
            for seed in 0..8 {
                let disk = mem.crash(seed);
                let snaps = SnapDir::open(Arc::new(disk.clone()), Path::new("/s")).unwrap();
                let loaded = snaps.load_newest(&[record(1, 10), record(1, 20)]).unwrap();
                assert_eq!(loaded.broken, []);
                let index = loaded.snapshot.unwrap().metadata.unwrap().index;
                assert_eq!(index, if saved.is_ok() { 20 } else { 10 });
                let names = disk.list(Path::new("/s")).unwrap();
                assert!(names.iter().all(|name| name.ends_with(".snap")), "{names:?}");
            }
            match saved {
                Ok(_) => break,
                Err(error) => assert!(error.to_string().contains("/s/tmp.")),
            }
            assert!(n < 10);
        }
    }

    #[test]
    fn a_received_backend_replaces_the_old_one() {
        let (mem, snaps) = open();
        mem.open(Path::new("/s/db"), Open::Truncate).unwrap().write_at(b"old", 0).unwrap();
        assert!(matches!(snaps.install_db(7), Err(SnapError::NoDb { index: 7, .. })));
        let mut receiver = snaps.receive_db(7).unwrap();
        receiver.write(b"ne").unwrap();
        receiver.write(b"w").unwrap();
        assert_eq!(receiver.size(), 3);
        assert_eq!(snaps.received_db(7).unwrap(), None);
        receiver.finish().unwrap();
        let disk = mem.crash(0);
        assert_eq!(read_file(&disk, Path::new("/s/0000000000000007.snap.db")).unwrap(), b"new");
        snaps.install_db(7).unwrap();
        assert_eq!(read_file(&mem.crash(0), Path::new("/s/db")).unwrap(), b"new");
        // One that is given up leaves nothing.
        let mut receiver = snaps.receive_db(8).unwrap();
        receiver.write(b"half").unwrap();
        drop(receiver);
        assert_eq!(mem.list(Path::new("/s")).unwrap(), ["db"]);
    }

    #[test]
    fn old_files_are_purged() {
        let (mem, snaps) = open();
        for index in 1..=4 {
            snaps.save(&snapshot(1, index)).unwrap();
            snaps.receive_db(index).unwrap().finish().unwrap();
        }
        assert_eq!(snaps.purge(0, 9).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(snaps.purge(3, 1).unwrap().len(), 1);
        assert_eq!(snaps.purge(3, 5).unwrap().len(), 1);
        assert_eq!(snaps.release_dbs(4).unwrap().len(), 2);
        assert_eq!(
            mem.list(Path::new("/s")).unwrap(),
            [
                "0000000000000001-0000000000000002.snap",
                "0000000000000001-0000000000000003.snap",
                "0000000000000001-0000000000000004.snap",
                "0000000000000004.snap.db",
            ]
        );
    }
}
