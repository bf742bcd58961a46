//! The files of a database: what they occupy, what the page cache holds of them, and how it lets go of them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// All files below a directory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Survey {
    /// Bytes of blocks, less than the length of a file with holes.
    pub occupied: u64,
}

/// What the page cache holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Cached {
    pub cached: u64,
    pub total: u64,
}

/// Calls `each` with every regular file below `dir`. One that goes away meanwhile is passed over, as is
/// a directory that is not there yet.
fn walk(
    dir: &Path,
    each: &mut dyn FnMut(&Path, &fs::Metadata) -> io::Result<()>,
) -> io::Result<()> {
    let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path: PathBuf = entry?.path();
        let result = match fs::symlink_metadata(&path) {
            Ok(data) if data.is_dir() => walk(&path, each),
            Ok(data) if data.is_file() => each(&path, &data),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match result {
            Err(error) if gone(&error) => {}
            result => result?,
        }
    }
    Ok(())
}

/// What the files below `dir` occupy.
///
/// # Errors
/// If the directory cannot be read.
pub fn survey(dir: &Path) -> io::Result<Survey> {
    use std::os::unix::fs::MetadataExt;
    let mut survey = Survey::default();
    walk(dir, &mut |_, data| {
        // The unit is 512 bytes on every file system.
        survey.occupied += data.blocks() * 512;
        Ok(())
    })?;
    Ok(survey)
}

/// Bytes of the files below `dir` that are in the page cache.
///
/// # Errors
/// If a file cannot be read.
pub fn cached(dir: &Path) -> io::Result<Cached> {
    let mut sum = Cached::default();
    walk(dir, &mut |path, data| {
        let cached = resident(&File::open(path)?, data.len())?;
        sum.cached += cached;
        sum.total += data.len();
        Ok(())
    })?;
    Ok(sum)
}

/// Brings the files to the disk and asks the system to drop them from the page cache, which takes no
/// privilege; answers what is left in it. Nobody may have them mapped.
///
/// # Errors
/// If a file cannot be read or synced.
pub fn drop_cache(dir: &Path) -> io::Result<Cached> {
    walk(dir, &mut |path, _| {
        let file = File::open(path)?;
        // Only what is on the disk can be dropped.
        file.sync_all()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    })?;
    cached(dir)
}

/// Bytes of a file's first `len` that are in the page cache.
fn resident(file: &File, len: u64) -> io::Result<u64> {
    /// Mapped at a time: the answer has a byte for each page.
    const WINDOW: u64 = 1 << 30;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096) as u64;
    let mut pages = 0;
    let mut at = 0;
    while at < len {
        let window = (len - at).min(WINDOW);
        let mut held = vec![0u8; window.div_ceil(page) as usize];
        // SAFETY: a new mapping that is never read or written; the vector has a byte for each of its pages;
        // it is unmapped before anything else can see it.
        let asked = unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                window as usize,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                at as libc::off_t,
            );
            if map == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let asked = libc::mincore(map, window as usize, held.as_mut_ptr().cast());
            let failed = (asked != 0).then(io::Error::last_os_error);
            libc::munmap(map, window as usize);
            failed
        };
        if let Some(error) = asked {
            return Err(error);
        }
        pages += held.iter().filter(|page| **page & 1 == 1).count() as u64;
        at += window;
    }
    Ok((pages * page).min(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_cached_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(survey(&dir.path().join("absent")).unwrap(), Survey::default());
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/a"), vec![1; 100_000]).unwrap();
        fs::write(dir.path().join("b"), vec![1; 50_000]).unwrap();
        File::create(dir.path().join("empty")).unwrap();
        assert_eq!(cached(dir.path()).unwrap(), Cached { cached: 150_000, total: 150_000 });
        let left = drop_cache(dir.path()).unwrap();
        // A file system in memory keeps all, one on a disk may keep some.
        assert!(left.cached <= left.total && left.total == 150_000, "{left:?}");
        let occupied = survey(dir.path()).unwrap().occupied;
        assert!((150_000..400_000).contains(&occupied), "{occupied}");
        // The content is not touched.
        assert_eq!(fs::read(dir.path().join("b")).unwrap(), vec![1; 50_000]);
    }
}
