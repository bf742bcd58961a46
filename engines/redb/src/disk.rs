//! The file under redb: what redb's own backend does, and the three things that the engine needs to
//! know or say about it.

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

/// Written bytes after which the system is told to bring them to the disk. Without it they stay in memory
/// until a sync, which then sends all of them at once, and the WAL's syncs on the same disk wait behind.
const PIECE_BYTES: u64 = 1 << 20;

/// What the engine and redb share about one file.
#[derive(Debug)]
pub(crate) struct DiskState {
    /// The file, opened once more, to ask for its size and to have it written back. Not a duplicate of redb's:
    /// the system tells a failed write once to each open file, and redb's sync has to hear of it.
    file: File,
    /// Set once another file has taken this one's place.
    retired: AtomicBool,
    /// Set once nobody reads the retired file any more: redb is to give up on it at once.
    abandoned: AtomicBool,
    /// Bytes written since the system was last told to bring them to the disk.
    unstarted: AtomicU64,
    #[cfg(test)]
    pub(crate) faults: faults::Faults,
}

impl DiskState {
    fn new(file: File) -> Self {
        DiskState {
            file,
            retired: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            unstarted: AtomicU64::new(0),
            #[cfg(test)]
            faults: faults::Faults::default(),
        }
    }

    /// Bytes of the file that have blocks on the disk. redb doubles the length of a file that is too
    /// short, so the length alone may be twice of what was ever written.
    pub(crate) fn size(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        Ok(metadata.len().min(metadata.blocks() * 512))
    }

    /// The file has been replaced and is read by open views only: nothing written to it matters any
    /// more, so nothing is synced.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Lets writes fail from now on if the file is retired.
    pub(crate) fn abandon_if_retired(&self) {
        self.abandoned.store(self.retired(), Ordering::Release);
    }

    fn check_abandoned(&self) -> io::Result<()> {
        if self.abandoned.load(Ordering::Acquire) {
            return Err(io::Error::other("the file has been replaced"));
        }
        Ok(())
    }

    /// Counts written bytes, and now and then begins to bring them to the disk. It does not wait for the
    /// disk: redb writes also while somebody reads, to make room in its cache.
    fn wrote(&self, bytes: usize) {
        let bytes = bytes as u64;
        if self.unstarted.fetch_add(bytes, Ordering::Relaxed) + bytes >= PIECE_BYTES {
            self.unstarted.store(0, Ordering::Relaxed);
            write_back(&self.file, Written::Begin);
        }
    }

    /// Waits for what [`DiskState::wrote`] has begun: a copy is not to have more than a piece on its way.
    pub(crate) fn await_begun(&self) {
        write_back(&self.file, Written::Await);
    }

    fn retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }
}

/// What is asked of the system for the written pages of a file.
enum Written {
    Begin,
    Await,
}

/// Only a hint: what fails here, also because a file system does not know the call, is told to redb's next
/// sync.
#[cfg(target_os = "linux")]
fn write_back(file: &File, written: Written) {
    use std::os::fd::AsRawFd;

    let flags = match written {
        Written::Begin => libc::SYNC_FILE_RANGE_WRITE,
        Written::Await => libc::SYNC_FILE_RANGE_WAIT_BEFORE,
    };
    // SAFETY: the descriptor is open; the call reads and writes no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
}

#[cfg(not(target_os = "linux"))]
fn write_back(_: &File, _: Written) {}

/// A file that redb reads and writes.
#[derive(Debug)]
pub(crate) struct Disk {
    file: FileBackend,
    state: Arc<DiskState>,
}

impl Disk {
    /// `path` is where `file` lies.
    pub(crate) fn new(file: File, path: &Path) -> Result<(Self, Arc<DiskState>), DatabaseError> {
        let state = Arc::new(DiskState::new(File::open(path)?));
        Ok((Disk { file: FileBackend::new(file)?, state: Arc::clone(&state) }, state))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.state.check_abandoned()?;
        self.file.set_len(len)?;
        #[cfg(test)]
        self.state.faults.note(|| faults::DiskOp::SetLen(len));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        #[cfg(test)]
        self.state.faults.check_sync()?;
        if self.state.retired() {
            return Ok(());
        }
        self.file.sync_data()?;
        #[cfg(test)]
        self.state.faults.note(|| faults::DiskOp::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.state.check_abandoned()?;
        #[cfg(test)]
        self.state.faults.check_write()?;
        self.file.write(offset, data)?;
        self.state.wrote(data.len());
        #[cfg(test)]
        self.state.faults.note(|| faults::DiskOp::Write { offset, data: data.to_vec() });
        Ok(())
    }

    fn close(&self) -> Result<(), io::Error> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}

#[cfg(test)]
pub(crate) mod faults {
    //! Errors on demand, and a record of what reached the file when.

    use std::cell::Cell;
    use std::io;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

    thread_local! {
        static NEXT_FILE: Cell<i64> = const { Cell::new(-1) };
    }

    /// The next file that this thread opens has room for `writes` writes only.
    pub(crate) fn fill_disk_of_next_file_after(writes: u32) {
        NEXT_FILE.set(writes.into());
    }

    #[derive(Clone, Debug)]
    pub(crate) enum DiskOp {
        Write { offset: u64, data: Vec<u8> },
        SetLen(u64),
        Sync,
    }

    #[derive(Debug)]
    pub(crate) struct Faults {
        /// Writes that still succeed before the disk is full; negative: it never is.
        writes_left: AtomicI64,
        sync_fails: AtomicBool,
        record: Mutex<Option<Vec<DiskOp>>>,
    }

    impl Default for Faults {
        fn default() -> Self {
            Faults {
                writes_left: AtomicI64::new(NEXT_FILE.replace(-1)),
                sync_fails: AtomicBool::new(false),
                record: Mutex::new(None),
            }
        }
    }

    impl Faults {
        /// Lets `writes` more writes pass, then answers `ENOSPC` for good.
        pub(crate) fn fill_disk_after(&self, writes: u32) {
            self.writes_left.store(writes.into(), Ordering::Release);
        }

        /// Fails each sync from now on.
        pub(crate) fn fail_syncs(&self) {
            self.sync_fails.store(true, Ordering::Release);
        }

        /// Starts to record.
        pub(crate) fn record(&self) {
            *self.record.lock().unwrap() = Some(Vec::new());
        }

        /// Operations recorded so far.
        pub(crate) fn recorded(&self) -> usize {
            self.record.lock().unwrap().as_ref().map_or(0, Vec::len)
        }

        /// Ends the record.
        pub(crate) fn take_record(&self) -> Vec<DiskOp> {
            self.record.lock().unwrap().take().unwrap_or_default()
        }

        pub(super) fn note(&self, op: impl FnOnce() -> DiskOp) {
            if let Some(record) = &mut *self.record.lock().unwrap() {
                record.push(op());
            }
        }

        pub(super) fn check_write(&self) -> io::Result<()> {
            let next = |left: i64| (left > 0).then(|| left - 1);
            match self.writes_left.fetch_update(Ordering::AcqRel, Ordering::Acquire, next) {
                Err(0) => Err(io::Error::from(io::ErrorKind::StorageFull)),
                _ => Ok(()),
            }
        }

        pub(super) fn check_sync(&self) -> io::Result<()> {
            if self.sync_fails.load(Ordering::Acquire) {
                return Err(io::Error::other("a failed sync was asked for"));
            }
            Ok(())
        }
    }
}
