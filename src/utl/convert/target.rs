//! The data directory that is made: built as `member.converting`, which becomes `member` in its last
//! step. Whoever starts on it before finds no member there, and ours says why.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use serde_json::json;

use crate::actors::disk::{Disk, DiskFile, LockKind, Open, OsDisk};
use crate::storage::FileError;

use super::files::{create_dir, remove, sync_dir};
use super::{CONVERTING, ConvertError};

/// What is in it, for whoever finds it unfinished.
const NOTE: &str = "conversion.json";
/// Generated certificates, which stand beside the member.
const FIXTURES: &str = "fixtures";
/// What a file system has at its top.
const LOST_FOUND: &str = "lost+found";
/// The lock of a data directory; whoever finishes the conversion leaves it where a member looks for it.
const LOCK: &str = "lock";

/// A target that is being filled; dropped before it is finished it is as it was before.
pub struct Target {
    dir: PathBuf,
    /// The topmost directory that did not exist before.
    created: Option<PathBuf>,
    finished: bool,
    lock: Option<Box<dyn DiskFile>>,
}

impl Target {
    /// Makes `to`, or takes it if it is empty or holds what an interrupted conversion has left, which is
    /// removed. `source` may neither be in it nor around it.
    ///
    /// # Errors
    /// `Refused`, `File`.
    pub fn begin(source: &Path, to: &Path, engine: &str) -> Result<Self, ConvertError> {
        let (dir, created) = place(to)?;
        let refused = |what: &str| {
            ConvertError::Refused(format!("target directory {} {what}", dir.display()))
        };
        if dir == source {
            return Err(refused("is the source"));
        }
        if dir.starts_with(source) || source.starts_with(&dir) {
            return Err(refused(&format!(
                "and the source {} lie in one another",
                source.display()
            )));
        }
        if created.is_none() {
            let names = OsDisk.list(&dir).map_err(FileError::at("list", &dir))?;
            let resumed = names.iter().any(|name| name == CONVERTING);
            let known = |name: &String| {
                *name == LOST_FOUND || (resumed && (*name == CONVERTING || *name == FIXTURES))
            };
            if let Some(name) = names.iter().find(|name| !known(name)) {
                return Err(refused(&format!(
                    "is not empty: it holds {name}, and a conversion replaces nothing"
                )));
            }
        }
        let mut target = Target { dir, created, finished: false, lock: None };
        let work = target.work();
        create_dir(&work)?;
        let path = work.join(LOCK);
        let lock = OsDisk.open(&path, Open::WriteOrCreate).map_err(FileError::at("open", &path))?;
        if !lock.try_lock(LockKind::Range).map_err(FileError::at("lock", &path))? {
            // Another one's: it stays.
            target.finished = true;
            return Err(ConvertError::Refused(format!(
                "target directory {} is in use by another conversion",
                target.dir.display()
            )));
        }
        target.lock = Some(lock);
        for name in OsDisk.list(&work).map_err(FileError::at("list", &work))? {
            if name != LOCK {
                remove(&work.join(name))?;
            }
        }
        remove(&target.dir.join(FIXTURES))?;
        let note = work.join(NOTE);
        let text = json!({ "from": source, "engine": engine }).to_string();
        fs::write(&note, text).map_err(FileError::at("write", &note))?;
        File::open(&note).and_then(|file| file.sync_all()).map_err(FileError::at("sync", &note))?;
        sync_dir(&work)?;
        sync_dir(&target.dir)?;
        Ok(target)
    }

    /// What becomes the member's directory.
    pub fn work(&self) -> PathBuf {
        self.dir.join(CONVERTING)
    }

    /// Where generated certificates go.
    pub fn fixtures(&self) -> PathBuf {
        self.dir.join(FIXTURES)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What was made, without what is in it.
    pub fn roots(&self) -> Vec<PathBuf> {
        match &self.created {
            Some(created) => vec![created.clone()],
            None => {
                let exists = |path: &PathBuf| path.exists();
                [self.work(), self.fixtures()].into_iter().filter(exists).collect()
            }
        }
    }

    /// Makes it a data directory: all in it is on disk.
    ///
    /// # Errors
    /// `File`.
    pub fn finish(mut self) -> Result<(), ConvertError> {
        let (work, member) = (self.work(), self.dir.join("member"));
        remove(&work.join(NOTE))?;
        sync_dir(&work)?;
        sync_dir(&self.dir)?;
        fs::rename(&work, &member).map_err(FileError::at("rename", &work))?;
        // From here on it is complete, whatever the disk says of its name.
        self.finished = true;
        let last = self.created.as_deref().and_then(Path::parent).unwrap_or(&self.dir);
        for dir in self.dir.ancestors() {
            sync_dir(dir)?;
            if dir == last {
                break;
            }
        }
        Ok(())
    }

    /// Removes what was made, and of the directories those that were made and are empty.
    fn undo(&self) -> Result<(), FileError> {
        remove(&self.work())?;
        remove(&self.fixtures())?;
        let Some(created) = &self.created else { return Ok(()) };
        for dir in self.dir.ancestors() {
            fs::remove_dir(dir).map_err(FileError::at("remove", dir))?;
            if dir == created {
                break;
            }
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = self.undo() {
            // The next conversion, or the member that is started on it, finds it. If nobody is left to tell,
            // they tell.
            let _ = writeln!(io::stderr(), "warning: the beginning of a conversion stays: {error}");
        }
    }
}

/// `to` without links, and the topmost directory of it that does not exist yet.
fn place(to: &Path) -> Result<(PathBuf, Option<PathBuf>), ConvertError> {
    let to = std::path::absolute(to).map_err(FileError::at("find", to))?;
    let above = to.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let found = fs::canonicalize(above).map_err(FileError::at("find", above))?;
    if !found.is_dir() {
        let error = io::ErrorKind::NotADirectory.into();
        return Err(FileError::at("use", above)(error).into());
    }
    let rest = to.strip_prefix(above).expect("it is above");
    if rest.components().any(|component| component == Component::ParentDir) {
        return Err(ConvertError::Refused(format!(
            "target directory {} goes up from a directory that does not exist",
            to.display()
        )));
    }
    let created = rest.components().next().map(|first| found.join(first));
    // Joined with nothing, a path would end in a slash.
    let dir = if created.is_some() { found.join(rest) } else { found };
    Ok((dir, created))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(source: &Path, to: &Path) -> Result<Target, String> {
        Target::begin(source, to, "x").map_err(|error| error.to_string())
    }

    fn names(dir: &Path) -> Vec<String> {
        OsDisk.list(dir).unwrap()
    }

    #[test]
    fn a_target_is_whole_or_as_it_was() {
        let temp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(temp.path()).unwrap();
        let source = root.join("source");
        let to = root.join("a/b/to");
        let target = begin(&source, &to).unwrap();
        assert_eq!(target.roots(), [root.join("a")]);
        fs::write(target.work().join("wal"), "x").unwrap();
        assert_eq!(names(&to), [CONVERTING]);
        // Nobody else comes in between, and does no harm by trying.
        let said = begin(&source, &to).err().unwrap();
        assert!(said.ends_with("is in use by another conversion"), "{said}");
        assert_eq!(names(&target.work()), [NOTE, LOCK, "wal"]);
        drop(target);
        assert_eq!(names(&root), [""; 0]);

        let target = begin(&source, &to).unwrap();
        fs::write(target.work().join("wal"), "x").unwrap();
        target.finish().unwrap();
        assert_eq!(names(&to), ["member"]);
        assert_eq!(names(&to.join("member")), [LOCK, "wal"]);
    }

    #[test]
    fn what_was_left_goes_and_what_is_anothers_stays() {
        let temp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(temp.path()).unwrap();
        let (source, to) = (root.join("source"), root.join("to"));
        fs::create_dir_all(to.join(CONVERTING).join("wal/more")).unwrap();
        fs::create_dir_all(to.join(FIXTURES)).unwrap();
        let target = begin(&source, &to).unwrap();
        assert_eq!(names(&target.work()), [NOTE, LOCK]);
        assert_eq!(names(&to), [CONVERTING]);
        drop(target);
        assert_eq!(names(&to), [""; 0]);

        for other in ["member", FIXTURES, "notes"] {
            fs::create_dir(to.join(other)).unwrap();
            let said = begin(&source, &to).err().unwrap();
            assert!(said.contains(&format!("is not empty: it holds {other}")), "{said}");
            assert_eq!(names(&to), [other]);
            fs::remove_dir(to.join(other)).unwrap();
        }
    }

    #[test]
    fn source_and_target_are_apart() {
        let temp = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(temp.path()).unwrap();
        let source = root.join("source");
        fs::create_dir(&source).unwrap();
        std::os::unix::fs::symlink(&source, root.join("link")).unwrap();
        for (to, what) in [
            ("source", "is the source"),
            ("link", "is the source"),
            ("link/in/it", "lie in one another"),
            (".", "lie in one another"),
            ("none/../source", "goes up from a directory"),
        ] {
            let said = begin(&source, &root.join(to)).err().unwrap();
            assert!(said.contains(what), "{to}: {said}");
            assert_eq!(names(&root), ["link", "source"]);
            assert_eq!(names(&source), [""; 0]);
        }
        fs::write(root.join("file"), "").unwrap();
        let said = begin(&source, &root.join("file/to")).err().unwrap();
        assert!(said.contains("file: not a directory"), "{said}");
    }
}
