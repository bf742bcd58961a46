//! Copies of files and directories: holes stay holes, and where the file system can share blocks between
//! files it does.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::storage::FileError;

use super::{ConvertError, Run};

/// Bytes that are read and written at once; between two of them an interrupt is noticed.
const CHUNK_BYTES: usize = 1 << 20;
/// Directories in directories: no engine nests as deep, so that a link to above ends.
const DEPTH_MAX: usize = 16;

/// A file to be copied.
pub struct Item {
    pub from: PathBuf,
    pub to: PathBuf,
    /// Bytes that it occupies.
    pub bytes: u64,
}

/// What is to be copied, and the directories that it goes into.
#[derive(Default)]
pub struct Tree {
    pub dirs: Vec<PathBuf>,
    pub files: Vec<Item>,
}

impl Tree {
    /// Adds all files below `from`, or those directly in it whose names `takes` accepts.
    ///
    /// # Errors
    /// The system's; `Refused` for what is neither a file nor a directory.
    pub fn add(
        &mut self,
        from: &Path,
        to: &Path,
        takes: Option<&dyn Fn(&str) -> bool>,
    ) -> Result<(), ConvertError> {
        self.add_below(from, to, takes, 0)
    }

    fn add_below(
        &mut self,
        from: &Path,
        to: &Path,
        takes: Option<&dyn Fn(&str) -> bool>,
        depth: usize,
    ) -> Result<(), ConvertError> {
        if depth > DEPTH_MAX {
            return Err(ConvertError::Refused(format!(
                "{} is more than {DEPTH_MAX} directories deep",
                from.display()
            )));
        }
        self.dirs.push(to.to_path_buf());
        for entry in fs::read_dir(from).map_err(FileError::at("list", from))? {
            let entry = entry.map_err(FileError::at("list", from))?;
            let (path, name) = (entry.path(), entry.file_name());
            if takes.is_some_and(|takes| !name.to_str().is_some_and(takes)) {
                continue;
            }
            let found = fs::metadata(&path).map_err(FileError::at("examine", &path))?;
            let to = to.join(&name);
            if found.is_file() {
                self.files.push(Item { from: path, to, bytes: found.blocks() * 512 });
            } else if found.is_dir() && takes.is_none() {
                self.add_below(&path, &to, None, depth + 1)?;
            } else {
                return Err(ConvertError::Refused(format!("{} is not a file", path.display())));
            }
        }
        Ok(())
    }

    /// Bytes that the files occupy.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|item| item.bytes).sum()
    }

    /// Makes the directories and copies the files; what is `kept` is on disk when this returns, but for
    /// the names of the topmost directories.
    ///
    /// # Errors
    /// The system's; `Interrupted`.
    pub fn copy(&self, kept: bool, run: &Run<'_>) -> Result<(), ConvertError> {
        for dir in &self.dirs {
            create_dir(dir)?;
        }
        let mut buffer = vec![0; CHUNK_BYTES];
        for Item { from, to, bytes } in &self.files {
            run.check()?;
            copy_file(from, to, *bytes, kept, &mut buffer, run)?;
        }
        if kept {
            for dir in &self.dirs {
                sync_dir(dir)?;
            }
        }
        Ok(())
    }
}

fn copy_file(
    from: &Path,
    to: &Path,
    occupied: u64,
    kept: bool,
    buffer: &mut [u8],
    run: &Run<'_>,
) -> Result<(), ConvertError> {
    let source = File::open(from).map_err(FileError::at("open", from))?;
    let target = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(FileError::at("create", to))?;
    let size = source.metadata().map_err(FileError::at("examine", from))?.len();
    // SAFETY: both descriptors are open; the call changes nothing but the target's content.
    let shared = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) } == 0;
    if shared {
        run.progress.add(occupied);
    } else {
        target.set_len(size).map_err(FileError::at("lengthen", to))?;
        let mut at = 0;
        while let Some((begin, end)) =
            data_from(&source, at, size).map_err(FileError::at("read", from))?
        {
            at = begin;
            while at < end {
                run.check()?;
                let wanted = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
                let read = match source.read_at(&mut buffer[..wanted], at) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    read => read.map_err(FileError::at("read", from))?,
                };
                if read == 0 {
                    return Err(ConvertError::Refused(format!(
                        "{} became shorter while it was read",
                        from.display()
                    )));
                }
                target.write_all_at(&buffer[..read], at).map_err(FileError::at("write", to))?;
                at += read as u64;
                run.progress.add(read as u64);
            }
        }
    }
    if kept {
        target.sync_all().map_err(FileError::at("sync", to))?;
    }
    Ok(())
}

/// The next bytes from `at` on that are no hole.
fn data_from(file: &File, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let from = i64::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let begin = match lseek(file, from, Whence::SeekData) {
        Ok(begin) => begin,
        Err(Errno::ENXIO) => return Ok(None),
        // A file system that does not tell: all of it is data.
        Err(Errno::EINVAL) => return Ok(Some((at, size))),
        Err(errno) => return Err(errno.into()),
    };
    let end = lseek(file, begin, Whence::SeekHole)?;
    Ok(Some((begin as u64, (end as u64).min(size))))
}

/// Makes a directory, and those above it.
///
/// # Errors
/// The system's.
pub fn create_dir(dir: &Path) -> Result<(), FileError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(FileError::at("create", dir))
}

/// Makes durable which names a directory holds.
///
/// # Errors
/// The system's.
pub fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(FileError::at("sync", dir))
}

/// Removes what is there under this name, if anything is.
///
/// # Errors
/// The system's.
pub fn remove(path: &Path) -> Result<(), FileError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError::at("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Gives all that is at `path` to an owner.
///
/// # Errors
/// The system's.
pub fn give(path: &Path, uid: u32, gid: u32) -> Result<(), FileError> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .map_err(FileError::at("give away", path))?;
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        for entry in fs::read_dir(path).map_err(FileError::at("list", path))? {
            give(&entry.map_err(FileError::at("list", path))?.path(), uid, gid)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::progress::Progress;
    use super::*;

    #[test]
    fn a_copy_is_equal_and_its_holes_are_holes() {
        let temp = tempfile::tempdir().unwrap();
        let (from, to) = (temp.path().join("from"), temp.path().join("to"));
        fs::create_dir_all(from.join("in/it")).unwrap();
        let file = File::create(from.join("in/it/sparse")).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&[7; 3 << 20], 40 << 20).unwrap();
        file.set_len(80 << 20).unwrap();
        fs::write(from.join("empty"), "").unwrap();
        let mut tree = Tree::default();
        tree.add(&from, &to, None).unwrap();
        let (progress, never) = (Progress::hidden(), || false);
        let run = Run { progress: &progress, interrupted: &never };
        tree.copy(true, &run).unwrap();
        let copied = to.join("in/it/sparse");
        assert!(fs::read(&copied).unwrap() == fs::read(from.join("in/it/sparse")).unwrap());
        assert!(fs::metadata(&copied).unwrap().blocks() * 512 < 8 << 20);
        assert_eq!(fs::metadata(to.join("empty")).unwrap().len(), 0);
        assert!(tree.bytes() >= 3 << 20 && tree.bytes() < 8 << 20, "{}", tree.bytes());

        let interrupted = || true;
        let run = Run { progress: &progress, interrupted: &interrupted };
        remove(&to).unwrap();
        assert!(matches!(tree.copy(true, &run), Err(ConvertError::Interrupted)));
        assert!(!copied.exists());
    }

    #[test]
    fn only_what_is_asked_for_is_copied() {
        let temp = tempfile::tempdir().unwrap();
        let from = temp.path().join("from");
        fs::create_dir_all(from.join("dir")).unwrap();
        for name in ["db", "1.snap"] {
            fs::write(from.join(name), "x").unwrap();
        }
        let mut tree = Tree::default();
        tree.add(&from, &temp.path().join("to"), Some(&|name| name == "db")).unwrap();
        let names: Vec<_> = tree.files.iter().map(|item| item.from.clone()).collect();
        assert_eq!(names, [from.join("db")]);
        let mut tree = Tree::default();
        let error = tree.add(&from, &temp.path().join("to"), Some(&|name| name == "dir"));
        assert!(error.unwrap_err().to_string().ends_with("dir is not a file"));
    }
}
