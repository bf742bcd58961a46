//! The data directory that is read: which engine it is of, and that nobody uses it meanwhile. Nothing here
//! writes to it, not even to a lock file.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::actors::disk::OsDisk;
use crate::engines::{self, BuiltIn};
use crate::storage::FileError;
use crate::storage::lock::LockError;
use crate::storage::wal_log;

use super::files::Tree;
use super::{CONVERTING, ConvertError};

/// A data directory that no member uses as long as this lives.
pub struct Source {
    pub dir: PathBuf,
    pub wal: PathBuf,
    pub engine: &'static BuiltIn,
    /// The engine's files: a directory, or a file in one of others.
    files: PathBuf,
    _locks: Vec<File>,
}

impl Source {
    /// Finds what is in `dir`, and keeps members off.
    ///
    /// # Errors
    /// `Refused` for what is no data directory with an engine that is built in; `Locked`; `File`.
    pub fn take(dir: &Path, wal: Option<&Path>) -> Result<Self, ConvertError> {
        let dir = fs::canonicalize(dir).map_err(FileError::at("find", dir))?;
        let refused = |what: String| {
            ConvertError::Refused(format!("source directory {} {what}", dir.display()))
        };
        if dir.join(CONVERTING).exists() {
            return Err(refused(format!(
                "holds a conversion that has not come to its end ({CONVERTING})"
            )));
        }
        let member = dir.join("member");
        if !member.is_dir() {
            return Err(refused("is no data directory: it has no directory member".to_owned()));
        }
        let wal = wal.map_or_else(|| member.join("wal"), Path::to_path_buf);
        if !wal_log::has_log(&OsDisk, &wal)? {
            return Err(refused(format!(
                "has no write-ahead log in {}: if its member was started with --wal-dir, name that with \
                 --from-wal-dir",
                wal.display()
            )));
        }
        let locks = lock(&dir, &member, &wal)?;
        let mut found = Vec::new();
        for engine in engines::ALL {
            let Some(home) = engine.home(&dir) else { continue };
            // Where a crash interrupted the installation of a snapshot, the old engine is beside its place.
            let beside = Some(home.replaced()).filter(|_| home.file.is_none());
            for path in [Some(home.path()), beside].into_iter().flatten() {
                if path.try_exists().map_err(FileError::at("examine", &path))? {
                    found.push((*engine, path));
                    break;
                }
            }
        }
        let (engine, files) = match &found[..] {
            [one] => one.clone(),
            [] => {
                return Err(refused(format!(
                    "holds the files of none of the engines {}; a member with an engine that has no \
                     files is moved by starting it with another one, which is filled from the log",
                    engines::names()
                )));
            }
            several => {
                let names: Vec<&str> = several.iter().map(|(engine, _)| engine.name()).collect();
                return Err(refused(format!(
                    "holds the files of several engines ({}): only one of them is the member's",
                    names.join(", ")
                )));
            }
        };
        Ok(Source { dir, wal, engine, files, _locks: locks })
    }

    /// The engine's files, to be copied to its home below `to`.
    ///
    /// # Errors
    /// As [`Tree::add`].
    pub fn engine_files(&self, to: &Path) -> Result<Tree, ConvertError> {
        let mut tree = Tree::default();
        let home = self.engine.home_in(to).expect("it has files");
        match home.file {
            None => tree.add(&self.files, &home.dir, None)?,
            Some(file) => {
                let dir = self.files.parent().expect("a file is in a directory");
                tree.add(dir, &home.dir, Some(&|name| name == file))?;
            }
        }
        Ok(tree)
    }

    /// Everything else that a member needs, to be copied to a member's directory.
    ///
    /// # Errors
    /// As [`Tree::add`].
    pub fn other_files(&self, to: &Path) -> Result<Tree, ConvertError> {
        let mut tree = Tree::default();
        // What is left out a member makes anew: segments and databases on their way.
        let of_wal = |name: &str| name.ends_with(".wal") || name.ends_with(".broken");
        tree.add(&self.wal, &to.join("wal"), Some(&of_wal))?;
        let of_snap = |name: &str| {
            [".snap", ".snap.db", ".broken"].iter().any(|end| name.ends_with(end))
                && !name.starts_with("tmp")
        };
        let (from, to) = (self.dir.join("member").join("snap"), to.join("snap"));
        match from.is_dir() {
            true => tree.add(&from, &to, Some(&of_snap))?,
            false => tree.dirs.push(to),
        }
        Ok(tree)
    }
}

/// Locks what a member, ours or etcd's, locks while it runs; the locks are shared ones, for which a file
/// need not be written to.
fn lock(dir: &Path, member: &Path, wal: &Path) -> Result<Vec<File>, ConvertError> {
    let mut locks = Vec::new();
    let own = member.join("lock");
    match File::open(&own) {
        Ok(file) if !lock_range(&file).map_err(FileError::at("lock", &own))? => {
            let dir = dir.to_path_buf();
            let pid = fs::read_to_string(&own).ok().and_then(|text| text.trim().parse().ok());
            return Err(match pid {
                Some(pid) => LockError::HeldBy { dir, pid }.into(),
                None => LockError::Held { dir, file: own }.into(),
            });
        }
        Ok(file) => locks.push(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(FileError::at("open", &own)(error).into()),
    }
    for entry in fs::read_dir(wal).map_err(FileError::at("list", wal))? {
        let path = entry.map_err(FileError::at("list", wal))?.path();
        if path.extension().is_none_or(|extension| extension != "wal") {
            continue;
        }
        let file = File::open(&path).map_err(FileError::at("open", &path))?;
        if !lock_range(&file).map_err(FileError::at("lock", &path))? {
            return Err(LockError::Held { dir: dir.to_path_buf(), file: path }.into());
        }
        locks.push(file);
    }
    let db = member.join("snap").join("db");
    match File::open(&db) {
        Ok(file) if !lock_whole(&file).map_err(FileError::at("lock", &db))? => {
            return Err(LockError::Held { dir: dir.to_path_buf(), file: db }.into());
        }
        Ok(file) => locks.push(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(FileError::at("open", &db)(error).into()),
    }
    Ok(locks)
}

/// Whether nobody has the file locked as the log's segments are.
fn lock_range(file: &File) -> io::Result<bool> {
    // From byte 0 to whatever the end will be. Type and whence are narrower in the structure than as
    // constants.
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        // A file system without them, where a member takes the other kind instead.
        Err(Errno::EINVAL | Errno::ENOSYS) => lock_whole(file),
        Err(errno) => Err(errno.into()),
    }
}

fn lock_whole(file: &File) -> io::Result<bool> {
    match file.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::lock::DataDirLock;

    fn refusal(dir: &Path) -> String {
        match Source::take(dir, None) {
            Ok(_) => panic!("it was taken"),
            Err(error) => error.to_string(),
        }
    }

    /// A directory in which everything has its name and nothing its content.
    fn directory(engine: &BuiltIn) -> tempfile::TempDir {
        let temp = tempfile::tempdir().unwrap();
        let member = temp.path().join("member");
        fs::create_dir_all(member.join("wal")).unwrap();
        fs::create_dir_all(member.join("snap")).unwrap();
        fs::write(member.join("wal/0000000000000000-0000000000000000.wal"), "").unwrap();
        let home = engine.home(temp.path()).unwrap();
        fs::create_dir_all(&home.dir).unwrap();
        if home.file.is_some() {
            fs::write(home.path(), "").unwrap();
        }
        temp
    }

    #[test]
    fn the_engine_is_found_by_its_files() {
        for engine in engines::ALL.iter().filter(|engine| engine.home(Path::new("")).is_some()) {
            let temp = directory(engine);
            let source = Source::take(temp.path(), None).unwrap();
            assert_eq!(source.engine, *engine);
            assert!(!temp.path().join("member/lock").exists(), "the source was written to");
            let home = engine.home(temp.path()).unwrap();
            if home.file.is_some() {
                continue;
            }
            // As a crash in an installation leaves it.
            fs::rename(&home.dir, home.replaced()).unwrap();
            assert_eq!(Source::take(temp.path(), None).unwrap().engine, *engine);
        }
    }

    #[test]
    fn a_directory_in_use_is_refused_and_one_being_read_cannot_be_used() {
        let temp = directory(engines::DEFAULT);
        let wal = temp.path().join("member/wal");
        let member = DataDirLock::take(&OsDisk, temp.path(), &wal).unwrap();
        let said = refusal(temp.path());
        assert!(said.ends_with(&format!("is in use by process {}", std::process::id())), "{said}");
        drop(member);
        let source = Source::take(temp.path(), None).unwrap();
        DataDirLock::take(&OsDisk, temp.path(), &wal).unwrap_err();
        drop(source);
        DataDirLock::take(&OsDisk, temp.path(), &wal).unwrap();
        // etcd's own locks, where there is none of ours.
        fs::remove_file(temp.path().join("member/lock")).unwrap();
        let source = Source::take(temp.path(), None).unwrap();
        DataDirLock::take(&OsDisk, temp.path(), &wal).unwrap_err();
        drop(source);
    }

    #[test]
    fn what_is_no_source_is_refused_with_what_it_lacks() {
        let temp = tempfile::tempdir().unwrap();
        let said = refusal(&temp.path().join("none"));
        assert!(said.contains("none: No such file or directory"), "{said}");
        assert!(refusal(temp.path()).ends_with("it has no directory member"));
        fs::create_dir_all(temp.path().join("member")).unwrap();
        let said = refusal(temp.path());
        assert!(said.contains("no write-ahead log") && said.ends_with("--from-wal-dir"), "{said}");
        let temp = directory(engines::DEFAULT);
        fs::create_dir(temp.path().join(CONVERTING)).unwrap();
        assert!(refusal(temp.path()).contains("has not come to its end"));
        let temp = directory(engines::DEFAULT);
        fs::remove_dir(engines::DEFAULT.dir(temp.path()).unwrap()).unwrap();
        assert!(refusal(temp.path()).contains("none of the engines"));
    }
}
