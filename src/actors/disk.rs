//! Files, behind a trait: what the log, the snapshots and the locks ask of an operating system, the
//! real one, and one in memory for tests that forgets at a crash what was not synced.
//!
//! A path is synced in two steps, as on any Unix: the bytes by [`DiskFile::sync_data`], the name by
//! [`Disk::sync_dir`] on the directory that holds it.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

mod mem;
mod os;

pub use mem::{Fault, MemDisk};
pub use os::OsDisk;

/// How [`Disk::open`] treats what is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Open {
    /// An existing file, only to be read.
    Read,
    /// An existing file, to be read and written.
    Write,
    /// A file to be read and written, made with mode 0600 if it does not exist.
    WriteOrCreate,
    /// As before, and emptied.
    Truncate,
}

/// A file system.
pub trait Disk: fmt::Debug + Send + Sync + 'static {
    /// Opens a file.
    ///
    /// # Errors
    /// The system's; `NotFound` for a missing file or directory.
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>>;

    /// Makes a directory with mode 0700 and those above it; nothing happens if it exists.
    ///
    /// # Errors
    /// The system's.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, ascending in byte order; names that are not UTF-8 are left out.
    ///
    /// # Errors
    /// The system's; `NotFound` for a missing directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Whether there is a file or directory of this name.
    ///
    /// # Errors
    /// The system's.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// Gives a file or directory another name, replacing a file or empty directory of that name.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name.
    ///
    /// # Errors
    /// The system's.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes a directory and all below it.
    ///
    /// # Errors
    /// The system's.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Makes durable which names the directory holds.
    ///
    /// # Errors
    /// The system's.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// An open file. Closing it, by dropping, gives up its locks.
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// The length in bytes.
    ///
    /// # Errors
    /// The system's.
    fn size(&self) -> io::Result<u64>;

    /// Reads what there is from `at` on into `buffer`; fewer bytes than asked for means that the
    /// file ends.
    ///
    /// # Errors
    /// The system's.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Writes all of `bytes` at `at`. After an error any part of them may have been written.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Cuts the file, or lengthens it with zeros that take no space.
    ///
    /// # Errors
    /// The system's.
    fn set_size(&self, bytes: u64) -> io::Result<()>;

    /// Takes space for `bytes` from the beginning, lengthening the file with zeros if it is shorter;
    /// where the file system cannot do that, only lengthens it.
    ///
    /// # Errors
    /// The system's; `StorageFull` if there is not enough.
    fn allocate(&self, bytes: u64) -> io::Result<()>;

    /// Makes the bytes durable, and the length as far as it is needed to read them.
    ///
    /// # Errors
    /// The system's. What was not yet durable may then be lost even if a later sync succeeds.
    fn sync_data(&self) -> io::Result<()>;

    /// [`DiskFile::sync_data`], and every attribute.
    ///
    /// # Errors
    /// As there.
    fn sync_all(&self) -> io::Result<()>;

    /// Takes the exclusive lock of this kind on the whole file; false if another open file has it.
    ///
    /// # Errors
    /// The system's.
    fn try_lock(&self, kind: LockKind) -> io::Result<bool>;
}

/// The two kinds of lock that etcd takes. They do not exclude each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LockKind {
    /// Of the open file description (`F_OFD_SETLK`): WAL segments.
    Range,
    /// Of the whole file (`flock`): the bbolt file.
    Whole,
}

/// A disk shared by those who use it.
pub type SharedDisk = Arc<dyn Disk>;

/// Reads a whole file.
///
/// # Errors
/// The disk's.
pub fn read_file(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path, Open::Read)?;
    let size = usize::try_from(file.size()?).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut bytes = vec![0; size];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}

impl crate::core::bbolt::ReadAt for dyn DiskFile {
    fn size(&self) -> io::Result<u64> {
        DiskFile::size(self)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        DiskFile::read_at(self, buffer, at)
    }
}
