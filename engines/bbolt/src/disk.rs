//! What the engine asks of the file system, so that tests can stand in its place.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Buffers of one write: the system's limit.
const BUFFERS_MAX: usize = 1024;

/// An open file that this process alone writes.
pub(crate) trait Disk: Send + Sync {
    fn len(&self) -> io::Result<u64>;

    /// Reads what there is from `at` on; fewer bytes than asked for means that the file ends.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes all `parts` one after the other.
    fn write_at(&self, parts: &[&[u8]], at: u64) -> io::Result<()>;

    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Makes everything written, and the length, durable.
    fn sync(&self) -> io::Result<()>;
}

/// The file system.
pub(crate) trait Files: Send + Sync {
    /// Opens a file and locks it; `None` if another process has it locked. With `create` it is made if
    /// it is absent, and emptied.
    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Box<dyn Disk>>>;

    /// Gives `from` the name `to`, whose file loses it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes the names in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// The one of the operating system.
pub(crate) struct OsFiles;

impl Files for OsFiles {
    /// The lock is bbolt's: `flock`, which etcd and its tools respect.
    fn open(&self, path: &Path, create: bool) -> io::Result<Option<Box<dyn Disk>>> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(create)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // whoever had the lock before may have put another file in this one's place
            let (locked, named) = (file.metadata()?, fs::metadata(path)?);
            if (locked.dev(), locked.ino()) != (named.dev(), named.ino()) {
                continue;
            }
            if create {
                file.set_len(0)?;
            }
            return Ok(Some(Box::new(OsFile(file))));
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

struct OsFile(File);

impl Disk for OsFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], at + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, parts: &[&[u8]], mut at: u64) -> io::Result<()> {
        for parts in parts.chunks(BUFFERS_MAX) {
            let mut slices: Vec<IoSlice<'_>> =
                parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut left = &mut slices[..];
            while !left.is_empty() {
                match rustix::io::pwritev(&self.0, left, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => {
                        at += written as u64;
                        IoSlice::advance_slices(&mut left, written);
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

impl fmt::Debug for dyn Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disk")
    }
}
