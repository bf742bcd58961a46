//! The write-ahead log on a disk, in etcd's files (formats-and-peers section 1).
//!
//! One value owns the tail. [`WalLog::append`] puts records into a buffer, [`WalLog::sync`] writes
//! them and waits for the disk once for everything appended. What a returned sync covers survives any
//! crash; what it does not cover may survive in part, never with a hole.
//!
//! Segments are allocated whole before they are used and, by a thread of the log, filled with
//! zeros: a write into such a file changes no metadata, which halves the time of a sync. Where a
//! segment is not (the first one, one that an earlier process began), zeros are written some way
//! ahead of the data.
//!
//! After any I/O error the log is poisoned: the state of the tail is unknown, so each further call
//! answers the first error. Opening the log again finds everything that was synced.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use quorate_proto::{raftpb, walpb};

use super::FileError;
use crate::actors::disk::{Disk, DiskFile, LockKind, Open, SharedDisk};
use crate::core::wal::{
    Damage, Decoder, Encoder, RecordKind, Replay, SEGMENT_BYTES, SegmentName, SegmentsError,
    SnapshotScan, Step, first_segment, must_sync,
};

/// The buffer is written without waiting for a sync when it has grown to this.
const BUFFER_BYTES: usize = 1 << 20;

/// How much is read at a time when opening.
const READ_BYTES: usize = 256 << 10;

/// Zeros are written and synced in slices of this size, so that a sync of the log that comes in
/// between waits for one slice and not for a segment.
const SLICE_BYTES: u64 = 1 << 20;

/// Why the log cannot be used. All are local to this member: it stops serving.
#[derive(thiserror::Error, Clone, Debug)]
pub enum WalError {
    #[error(transparent)]
    Io(#[from] FileError),
    #[error("{} is corrupt at byte {at}: {damage}", path.display())]
    Corrupt {
        path: PathBuf,
        at: u64,
        #[source]
        damage: Damage,
    },
    #[error("no write-ahead log in {}", dir.display())]
    Missing { dir: PathBuf },
    #[error("{} already holds a write-ahead log", dir.display())]
    Exists { dir: PathBuf },
    #[error("write-ahead log in {}: {source}", dir.display())]
    Segments {
        dir: PathBuf,
        #[source]
        source: SegmentsError,
    },
    #[error("{} is locked: another process uses this log", path.display())]
    Locked { path: PathBuf },
}

/// How a log is written; the defaults are etcd's files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalOptions {
    /// Bytes after which a segment ends, and that are allocated for each.
    pub segment_bytes: u64,
    /// How far zeros are written ahead of the data where the segment is not full of them; 0 = not.
    pub zero_ahead_bytes: u64,
    /// Whether a thread makes the next segment ahead of time; otherwise it is made, without zeros,
    /// when it is needed.
    pub prepare_ahead: bool,
}

impl Default for WalOptions {
    fn default() -> Self {
        WalOptions {
            segment_bytes: SEGMENT_BYTES,
            zero_ahead_bytes: 512 << 10,
            prepare_ahead: true,
        }
    }
}

/// What a log held when it was opened.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Member and cluster.
    pub metadata: walpb::Metadata,
    /// The last one written; all zero if none was. Its commit index can be behind what the engine
    /// has applied, since it is synced only together with something else.
    pub hard_state: raftpb::HardState,
    /// Those after `start`, without holes, committed or not.
    pub entries: Vec<raftpb::Entry>,
    /// Snapshot records that may be started from, in the order of the log.
    pub snapshots: Vec<walpb::Snapshot>,
    /// The one that was chosen.
    pub start: walpb::Snapshot,
    /// Index of the last entry, or that of `start` if there is none.
    pub last_index: u64,
    /// The record that a crash had cut short, if there was one.
    pub torn: Option<Torn>,
}

/// A record cut short by a crash, at the end of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Torn {
    pub segment: PathBuf,
    /// Where the last sound record ends, in bytes from the beginning of the segment.
    pub at: u64,
    /// The copy of the segment as it was found; `None` if the log was opened only to be read.
    pub copy: Option<PathBuf>,
}

/// An open log, locked against other processes.
#[derive(Debug)]
pub struct WalLog {
    disk: SharedDisk,
    dir: PathBuf,
    options: WalOptions,
    /// Encoded, because all segments must hold the same bytes.
    metadata: Bytes,
    encoder: Encoder,
    /// Those still locked, oldest first; the last one is the tail. Never empty.
    segments: VecDeque<Segment>,
    /// Where the buffer goes in the tail.
    tail_at: u64,
    /// Up to here the tail is known to be made of written zeros.
    tail_zeroed: u64,
    buffer: Vec<u8>,
    /// Whether the tail holds writes that no sync covers.
    dirty: bool,
    /// Whether something was appended that must not be lost once it has been answered.
    sync_needed: bool,
    /// The last one that was not empty.
    hard_state: raftpb::HardState,
    last_index: u64,
    written_bytes: u64,
    preparer: Option<Preparer>,
    failed: Option<WalError>,
}

#[derive(Debug)]
struct Segment {
    name: SegmentName,
    path: PathBuf,
    file: Box<dyn DiskFile>,
}

impl WalLog {
    /// Makes a new log in `dir`, whose parent exists: built aside as `<dir>.tmp`, then renamed.
    ///
    /// # Errors
    /// `Exists` if there is one already; `Io`.
    pub fn create(
        disk: SharedDisk,
        dir: &Path,
        metadata: &walpb::Metadata,
    ) -> Result<Self, WalError> {
        Self::create_with(disk, dir, metadata, WalOptions::default())
    }

    /// [`WalLog::create`] with other than the usual options.
    ///
    /// # Errors
    /// As there.
    pub fn create_with(
        disk: SharedDisk,
        dir: &Path,
        metadata: &walpb::Metadata,
        options: WalOptions,
    ) -> Result<Self, WalError> {
        Self::create_holding(disk, dir, metadata, &[], &raftpb::HardState::default(), options)
    }

    /// As [`WalLog::create_with`], with these entries, from index 1 on, and this hard state in it from
    /// the first moment that there is a log: all of it is on the disk when this returns.
    ///
    /// # Errors
    /// As there.
    pub fn create_holding(
        disk: SharedDisk,
        dir: &Path,
        metadata: &walpb::Metadata,
        entries: &[raftpb::Entry],
        hard_state: &raftpb::HardState,
        options: WalOptions,
    ) -> Result<Self, WalError> {
        if has_log(&*disk, dir)? {
            return Err(WalError::Exists { dir: dir.to_path_buf() });
        }
        let mut aside = dir.as_os_str().to_owned();
        aside.push(".tmp");
        let aside = PathBuf::from(aside);
        if disk.exists(&aside).map_err(FileError::at("examine", &aside))? {
            disk.remove_dir_all(&aside).map_err(FileError::at("remove", &aside))?;
        }
        disk.create_dir_all(&aside).map_err(FileError::at("create", &aside))?;

        let name = SegmentName { seq: 0, index: 0 };
        let path = aside.join(name.to_string());
        let file = disk.open(&path, Open::Truncate).map_err(FileError::at("create", &path))?;
        lock(&*file, &path)?;
        file.allocate(options.segment_bytes).map_err(FileError::at("allocate", &path))?;
        let metadata = Bytes::from(metadata.encode_to_vec());
        let mut encoder = Encoder::new(0);
        let mut buffer = Vec::new();
        encoder.crc_record(&mut buffer);
        encoder.metadata(&metadata, &mut buffer);
        encoder.snapshot(&walpb::Snapshot::default(), &mut buffer);
        for entry in entries {
            encoder.entry(entry, &mut buffer);
        }
        if *hard_state != raftpb::HardState::default() {
            encoder.hard_state(hard_state, &mut buffer);
        }
        file.write_at(&buffer, 0).map_err(FileError::at("write", &path))?;
        file.sync_all().map_err(FileError::at("sync", &path))?;
        disk.sync_dir(&aside).map_err(FileError::at("sync", &aside))?;
        if disk.exists(dir).map_err(FileError::at("examine", dir))? {
            disk.remove_dir_all(dir).map_err(FileError::at("remove", dir))?;
        }
        disk.rename(&aside, dir).map_err(FileError::at("rename", &aside))?;
        if let Some(parent) = dir.parent() {
            disk.sync_dir(parent).map_err(FileError::at("sync", parent))?;
        }

        let tail_at = buffer.len() as u64;
        buffer.clear();
        Ok(WalLog {
            preparer: Preparer::start(&disk, dir, &options)?,
            segments: VecDeque::from([Segment { name, path: dir.join(name.to_string()), file }]),
            disk,
            dir: dir.to_path_buf(),
            options,
            metadata,
            encoder,
            tail_at,
            tail_zeroed: 0,
            buffer,
            dirty: false,
            sync_needed: false,
            hard_state: *hard_state,
            last_index: entries.last().map_or(0, |entry| entry.index),
            written_bytes: tail_at,
            failed: None,
        })
    }

    /// Opens the log in `dir`, reads it and makes it ready for more. `choose` is given the snapshot
    /// records that may be started from (section 2.3 of the reference says which one it must take)
    /// in the order of the log; it answers one of them, or the default value for the beginning.
    ///
    /// A record at the very end that a crash cut short is removed, after the segment has been copied
    /// to `<name>.broken`.
    ///
    /// # Errors
    /// `Corrupt` for what no crash explains; nothing has been changed then. `Missing`, `Segments`,
    /// `Locked`, `Io`.
    pub fn open(
        disk: SharedDisk,
        dir: &Path,
        choose: impl FnOnce(&[walpb::Snapshot]) -> walpb::Snapshot,
    ) -> Result<(Self, Recovered), WalError> {
        Self::open_with(disk, dir, WalOptions::default(), choose)
    }

    /// [`WalLog::open`] with other than the usual options.
    ///
    /// # Errors
    /// As there.
    pub fn open_with(
        disk: SharedDisk,
        dir: &Path,
        options: WalOptions,
        choose: impl FnOnce(&[walpb::Snapshot]) -> walpb::Snapshot,
    ) -> Result<(Self, Recovered), WalError> {
        let mut segments = open_segments(&*disk, dir, Open::Write)?;
        for segment in &segments {
            lock(&*segment.file, &segment.path)?;
        }
        let reading = read_segments(dir, &segments, choose, |tail, at| {
            repair(&*disk, dir, tail, at).map(Some)
        })?;
        segments.drain(..reading.first);
        let tail = segments.last().expect("a log has a segment");
        // Bytes behind the end would be taken for records once the data has grown up to them.
        clear_tail(tail, reading.tail_at, options.segment_bytes)?;

        let Recovered { hard_state, last_index, .. } = reading.recovered;
        let mut log = WalLog {
            preparer: Preparer::start(&disk, dir, &options)?,
            segments: segments.into(),
            disk,
            dir: dir.to_path_buf(),
            options,
            metadata: reading.metadata,
            encoder: Encoder::new(reading.crc),
            tail_at: reading.tail_at,
            tail_zeroed: reading.tail_at,
            buffer: Vec::new(),
            dirty: false,
            sync_needed: false,
            hard_state,
            last_index,
            written_bytes: 0,
            failed: None,
        };
        if log.tail_at == 0 {
            // Not even its header was written: the segment must not depend on those before it.
            log.header();
            log.sync_tail()?;
        }
        Ok((log, reading.recovered))
    }

    /// Puts `entries` and then `hard_state`, unless it is all zero, behind what was appended before.
    /// Nothing of it may be acknowledged before [`WalLog::sync`] has returned. A segment that is full
    /// afterwards is closed, synced, and the next one begun.
    ///
    /// `entries[0].index` is at most the last index + 1; a lower one voids the entries from it on.
    ///
    /// # Errors
    /// `Io`: the tail is unknown, nothing may be acknowledged, the member stops.
    /// # Panics
    /// If the entries leave a gap: the raft node never asks for that.
    pub fn append(
        &mut self,
        entries: &[raftpb::Entry],
        hard_state: Option<&raftpb::HardState>,
    ) -> Result<(), WalError> {
        self.check()?;
        for entry in entries {
            assert!(
                entry.index <= self.last_index + 1,
                "entry {} does not follow entry {}",
                entry.index,
                self.last_index
            );
            self.encoder.entry(entry, &mut self.buffer);
            self.last_index = entry.index;
        }
        self.sync_needed |= !entries.is_empty();
        if let Some(state) = hard_state.filter(|state| **state != raftpb::HardState::default()) {
            self.sync_needed |= must_sync(&self.hard_state, state, entries.len());
            self.hard_state = *state;
            self.encoder.hard_state(state, &mut self.buffer);
        }
        let outcome = if self.tail_at + self.buffer.len() as u64 >= self.options.segment_bytes {
            self.cut()
        } else if self.buffer.len() >= BUFFER_BYTES {
            self.flush()
        } else {
            Ok(())
        };
        self.keep(outcome)
    }

    /// Makes everything appended durable; one write and one wait for the disk, none if nothing is
    /// new. Answers how long the disk took.
    ///
    /// # Errors
    /// `Io`, as [`WalLog::append`].
    pub fn sync(&mut self) -> Result<Duration, WalError> {
        self.check()?;
        let outcome = self.sync_tail();
        self.keep(outcome)
    }

    /// Records that the snapshot file for `snapshot` is on disk, durably. The last index becomes at
    /// least that of the snapshot.
    ///
    /// # Errors
    /// `Io`, as [`WalLog::append`].
    /// # Panics
    /// If the index is above 0 and the configuration is missing: etcd refuses to read that.
    pub fn save_snapshot(&mut self, snapshot: &walpb::Snapshot) -> Result<Duration, WalError> {
        assert!(
            snapshot.index() == 0 || snapshot.conf_state.is_some(),
            "a snapshot record has a configuration"
        );
        self.check()?;
        self.encoder.snapshot(snapshot, &mut self.buffer);
        self.last_index = self.last_index.max(snapshot.index());
        let outcome = self.sync_tail();
        self.keep(outcome)
    }

    /// Puts in the place of all entries the snapshot that a leader has sent, whose file is on disk. Its
    /// commit index goes with it: a record above the commit index does not count, so that a crash leaves
    /// either both or the log as it was. As with [`WalLog::append`], a sync is owed.
    ///
    /// # Errors
    /// `Io`, as [`WalLog::append`].
    /// # Panics
    /// If the configuration is missing: etcd refuses to read that.
    pub fn replace(&mut self, snapshot: &walpb::Snapshot) -> Result<(), WalError> {
        assert!(snapshot.conf_state.is_some(), "a snapshot record has a configuration");
        self.check()?;
        self.encoder.snapshot(snapshot, &mut self.buffer);
        self.last_index = snapshot.index();
        self.sync_needed = true;
        if self.hard_state.commit < snapshot.index() {
            self.hard_state.commit = snapshot.index();
            self.encoder.hard_state(&self.hard_state, &mut self.buffer);
        }
        Ok(())
    }

    /// Gives up the locks of segments that hold only entries below `index`, so that [`purge`] may
    /// remove them; the segment with the entry itself is kept.
    pub fn release_to(&mut self, index: u64) {
        while self.segments.get(1).is_some_and(|next| next.name.index < index) {
            self.segments.pop_front();
        }
    }

    /// Writes and syncs what is left, and gives up the locks.
    ///
    /// # Errors
    /// `Io`.
    pub fn close(mut self) -> Result<(), WalError> {
        self.check()?;
        self.sync_tail()?;
        Ok(())
    }

    /// The hard state appended last.
    pub fn hard_state(&self) -> raftpb::HardState {
        self.hard_state
    }

    /// Whether a sync is owed before anything appended is acknowledged. A commit index that moved
    /// alone need not be durable.
    pub fn sync_needed(&self) -> bool {
        self.sync_needed
    }

    /// Index of the last entry or snapshot appended.
    pub fn last_index(&self) -> u64 {
        self.last_index
    }

    /// Bytes of records appended since the log was opened, with their frames.
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes + self.buffer.len() as u64
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn check(&self) -> Result<(), WalError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn keep<T>(&mut self, outcome: Result<T, WalError>) -> Result<T, WalError> {
        if let Err(error) = &outcome {
            self.failed = Some(error.clone());
        }
        outcome
    }

    fn tail(&self) -> &Segment {
        self.segments.back().expect("a log has a tail")
    }

    fn header(&mut self) {
        self.encoder.crc_record(&mut self.buffer);
        self.encoder.metadata(&self.metadata, &mut self.buffer);
        if self.hard_state != raftpb::HardState::default() {
            self.encoder.hard_state(&self.hard_state, &mut self.buffer);
        }
    }

    /// Hands what was appended to the operating system, without waiting for the disk.
    ///
    /// # Errors
    /// `Io`, as [`WalLog::append`].
    pub fn flush(&mut self) -> Result<(), WalError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data_bytes = self.buffer.len() as u64;
        let end = self.tail_at + data_bytes;
        if end > self.tail_zeroed && self.options.zero_ahead_bytes > 0 {
            let ahead = (end + self.options.zero_ahead_bytes).next_multiple_of(4096);
            self.tail_zeroed = ahead.min(self.options.segment_bytes).max(end);
            self.buffer.resize((self.tail_zeroed - self.tail_at) as usize, 0);
        }
        let tail = self.segments.back().expect("a log has a tail");
        let outcome = tail.file.write_at(&self.buffer, self.tail_at);
        outcome.map_err(FileError::at("write", &tail.path))?;
        self.buffer.clear();
        // One huge append must not hold its memory for ever.
        self.buffer.shrink_to(2 * BUFFER_BYTES);
        self.tail_at = end;
        self.written_bytes += data_bytes;
        self.dirty = true;
        if let Some(preparer) = &self.preparer {
            preparer.advance(end);
        }
        Ok(())
    }

    fn sync_tail(&mut self) -> Result<Duration, WalError> {
        self.flush()?;
        let begun = Instant::now();
        if self.dirty {
            let tail = self.tail();
            tail.file.sync_data().map_err(FileError::at("sync", &tail.path))?;
            self.dirty = false;
        }
        self.sync_needed = false;
        Ok(begun.elapsed())
    }

    /// Closes the tail and begins the next segment. At no moment is there a name that leads to a
    /// segment without its header.
    fn cut(&mut self) -> Result<(), WalError> {
        self.flush()?;
        let tail = self.tail();
        tail.file.set_size(self.tail_at).map_err(FileError::at("truncate", &tail.path))?;
        tail.file.sync_all().map_err(FileError::at("sync", &tail.path))?;
        let seq = tail.name.seq.checked_add(1).expect("2^64 segments are never written");
        self.dirty = false;
        self.sync_needed = false;

        let name = SegmentName { seq, index: self.last_index + 1 };
        let path = self.dir.join(name.to_string());
        let prepared = match self.preparer.as_mut().and_then(Preparer::take) {
            Some(prepared) => prepared,
            None => prepare(&*self.disk, &self.dir.join("0.tmp"), self.options.segment_bytes)?,
        };
        debug_assert!(self.buffer.is_empty());
        self.header();
        let header_bytes = self.buffer.len() as u64;
        let write = prepared.file.write_at(&self.buffer, 0);
        write.map_err(FileError::at("write", &prepared.path))?;
        self.buffer.clear();
        prepared.file.sync_data().map_err(FileError::at("sync", &prepared.path))?;
        self.disk.rename(&prepared.path, &path).map_err(FileError::at("rename", &prepared.path))?;
        self.disk.sync_dir(&self.dir).map_err(FileError::at("sync", &self.dir))?;
        // The lock belongs to the open file and went along with the new name.
        self.segments.push_back(Segment { name, path, file: prepared.file });
        self.tail_at = header_bytes;
        self.tail_zeroed = prepared.zeroed;
        self.written_bytes += header_bytes;
        if let Some(preparer) = &mut self.preparer {
            preparer.proceed();
        }
        Ok(())
    }
}

/// Whether `dir` holds a segment.
///
/// # Errors
/// `Io`.
pub fn has_log(disk: &dyn Disk, dir: &Path) -> Result<bool, WalError> {
    Ok(!segment_names(disk, dir)?.is_empty())
}

/// Reads a log without changing anything or taking locks, also while a server writes it; a record
/// cut short at the end is left out. `choose` as for [`WalLog::open`].
///
/// # Errors
/// As [`WalLog::open`], but never `Locked`.
pub fn read(
    disk: &dyn Disk,
    dir: &Path,
    choose: impl FnOnce(&[walpb::Snapshot]) -> walpb::Snapshot,
) -> Result<Recovered, WalError> {
    let segments = open_segments(disk, dir, Open::Read)?;
    Ok(read_segments(dir, &segments, choose, |_, _| Ok(None))?.recovered)
}

/// One record, as [`dump`] shows it.
#[derive(Debug)]
pub struct Record<'a> {
    pub segment: &'a Path,
    /// Bytes from the beginning of the segment to the record's frame.
    pub at: u64,
    pub kind: RecordKind,
    pub data: &'a [u8],
}

/// Shows every record of a log in order, the first to last segment that exists; for tools. Answers
/// where the log ends in a record cut short, if it does.
///
/// # Errors
/// As [`read`].
pub fn dump(
    disk: &dyn Disk,
    dir: &Path,
    mut show: impl FnMut(Record<'_>),
) -> Result<Option<Torn>, WalError> {
    let segments = open_segments(disk, dir, Open::Read)?;
    let mut decoder = Decoder::default();
    let tail = read_all(&segments, &mut decoder, |segment, at, kind, data| {
        show(Record { segment: &segment.path, at, kind, data });
        Ok(())
    })?;
    Ok(tail.torn.then(|| Torn {
        segment: segments.last().expect("a log has a segment").path.clone(),
        at: tail.at,
        copy: None,
    }))
}

/// Removes the oldest segments that no log holds locked, as long as more than `keep` remain; 0 keeps
/// all. Answers what was removed.
///
/// # Errors
/// `Io`.
pub fn purge(disk: &dyn Disk, dir: &Path, keep: usize) -> Result<Vec<PathBuf>, WalError> {
    Ok(super::purge(disk, dir, keep, |name| name.ends_with(".wal"))?)
}

fn segment_names(disk: &dyn Disk, dir: &Path) -> Result<Vec<SegmentName>, WalError> {
    let names = match disk.list(dir) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(FileError::at("list", dir)(error).into()),
    };
    // The order of the names as text is the order of their numbers.
    Ok(names.iter().filter_map(|name| SegmentName::parse(name)).collect())
}

fn open_segments(disk: &dyn Disk, dir: &Path, how: Open) -> Result<Vec<Segment>, WalError> {
    let names = segment_names(disk, dir)?;
    if names.is_empty() {
        return Err(WalError::Missing { dir: dir.to_path_buf() });
    }
    names
        .into_iter()
        .map(|name| {
            let path = dir.join(name.to_string());
            let file = disk.open(&path, how).map_err(FileError::at("open", &path))?;
            Ok(Segment { name, path, file })
        })
        .collect()
}

fn lock(file: &dyn DiskFile, path: &Path) -> Result<(), WalError> {
    if file.try_lock(LockKind::Range).map_err(FileError::at("lock", path))? {
        Ok(())
    } else {
        Err(WalError::Locked { path: path.to_path_buf() })
    }
}

/// A segment read in pieces from the front.
struct Reader<'a> {
    segment: &'a Segment,
    size: u64,
    buffer: Vec<u8>,
    /// Which part of the file the buffer holds.
    buffer_at: u64,
}

impl<'a> Reader<'a> {
    fn new(segment: &'a Segment, buffer: Vec<u8>) -> Result<Self, WalError> {
        let size = segment.file.size().map_err(FileError::at("examine", &segment.path))?;
        Ok(Reader { segment, size, buffer, buffer_at: 0 })
    }

    /// The bytes from `at` on that are at hand, at least `need` of them if the file has as many.
    fn window(&mut self, at: u64, need: usize) -> Result<&[u8], WalError> {
        let held = at
            .checked_sub(self.buffer_at)
            .map_or(0, |skip| (self.buffer.len() as u64).saturating_sub(skip) as usize);
        if held < need {
            let wanted = need.max(READ_BYTES).min((self.size - at) as usize);
            self.buffer.resize(wanted, 0);
            let read = self.segment.file.read_at(&mut self.buffer, at);
            let read = read.map_err(FileError::at("read", &self.segment.path))?;
            self.buffer.truncate(read);
            self.buffer_at = at;
        }
        Ok(&self.buffer[(at - self.buffer_at) as usize..])
    }
}

/// Where the data of a log ends.
struct Tail {
    /// In the last segment.
    at: u64,
    torn: bool,
}

fn read_all(
    segments: &[Segment],
    decoder: &mut Decoder,
    mut take: impl FnMut(&Segment, u64, RecordKind, &[u8]) -> Result<(), Damage>,
) -> Result<Tail, WalError> {
    let mut tail = Tail { at: 0, torn: false };
    let mut buffer = Vec::new();
    for (n, segment) in segments.iter().enumerate() {
        let last = n + 1 == segments.len();
        let mut reader = Reader::new(segment, std::mem::take(&mut buffer))?;
        let size = reader.size;
        let mut need = 0;
        tail.at = 0;
        loop {
            let at = tail.at;
            let corrupt = |damage| WalError::Corrupt { path: segment.path.clone(), at, damage };
            let window = reader.window(at, need)?;
            if window.len() < need {
                // The file has become shorter while it was read.
                return Err(corrupt(Damage::CutShort));
            }
            match decoder.step(window, at, size - at, last).map_err(corrupt)? {
                Step::Need(bytes) => need = bytes,
                Step::Record { kind, data, frame_bytes } => {
                    take(segment, at, kind, data).map_err(corrupt)?;
                    tail.at = at + frame_bytes as u64;
                    need = 0;
                }
                Step::End => break,
                Step::Torn => {
                    tail.torn = true;
                    break;
                }
            }
        }
        buffer = reader.buffer;
        buffer.clear();
    }
    Ok(tail)
}

struct Reading {
    recovered: Recovered,
    /// Position of the first segment that is needed.
    first: usize,
    metadata: Bytes,
    crc: u32,
    tail_at: u64,
}

/// Reads twice, as etcd does: all segments for the snapshot records, then those needed for the
/// entries. `repair` is told the last segment and where its sound part ends, if it is torn.
fn read_segments(
    dir: &Path,
    segments: &[Segment],
    choose: impl FnOnce(&[walpb::Snapshot]) -> walpb::Snapshot,
    repair: impl FnOnce(&Segment, u64) -> Result<Option<PathBuf>, WalError>,
) -> Result<Reading, WalError> {
    let tail_segment = segments.last().expect("a log has a segment");
    let mut scan = SnapshotScan::default();
    let tail =
        read_all(segments, &mut Decoder::default(), |_, _, kind, data| scan.take(kind, data))?;
    let snapshots = scan.valid();
    let start = choose(&snapshots);

    let names: Vec<SegmentName> = segments.iter().map(|segment| segment.name).collect();
    let first = first_segment(&names, start.index())
        .map_err(|source| WalError::Segments { dir: dir.to_path_buf(), source })?;
    let mut decoder = Decoder::default();
    let mut replay = Replay::new(start.index(), start.term());
    let again =
        read_all(&segments[first..], &mut decoder, |_, _, kind, data| replay.take(kind, data))?;
    let corrupt =
        |damage| WalError::Corrupt { path: tail_segment.path.clone(), at: again.at, damage };
    let replayed = replay.finish().map_err(corrupt)?;
    let metadata = walpb::Metadata::decode(replayed.metadata.clone())
        .map_err(|source| corrupt(Damage::Undecodable { kind: RecordKind::Metadata, source }))?;
    // Only now is it certain that nothing else is wrong with this log.
    let torn = if tail.torn {
        let copy = repair(tail_segment, again.at)?;
        Some(Torn { segment: tail_segment.path.clone(), at: again.at, copy })
    } else {
        None
    };
    Ok(Reading {
        recovered: Recovered {
            metadata,
            hard_state: replayed.hard_state,
            entries: replayed.entries,
            snapshots,
            start,
            last_index: replayed.last_index,
            torn,
        },
        first,
        metadata: replayed.metadata,
        crc: decoder.crc(),
        tail_at: again.at,
    })
}

/// Keeps a copy of the torn segment and cuts it back to its sound part.
fn repair(disk: &dyn Disk, dir: &Path, tail: &Segment, at: u64) -> Result<PathBuf, WalError> {
    let copy_path = dir.join(format!("{}.broken", tail.name));
    let copy =
        disk.open(&copy_path, Open::Truncate).map_err(FileError::at("create", &copy_path))?;
    let mut buffer = vec![0; READ_BYTES];
    let mut from = 0;
    loop {
        let read = tail.file.read_at(&mut buffer, from);
        let read = read.map_err(FileError::at("read", &tail.path))?;
        if read == 0 {
            break;
        }
        copy.write_at(&buffer[..read], from).map_err(FileError::at("write", &copy_path))?;
        from += read as u64;
    }
    copy.sync_all().map_err(FileError::at("sync", &copy_path))?;
    disk.sync_dir(dir).map_err(FileError::at("sync", dir))?;
    tail.file.set_size(at).map_err(FileError::at("truncate", &tail.path))?;
    tail.file.sync_all().map_err(FileError::at("sync", &tail.path))?;
    Ok(copy_path)
}

/// Leaves only zeros behind `at`, and room up to the usual size.
fn clear_tail(tail: &Segment, at: u64, segment_bytes: u64) -> Result<(), WalError> {
    let size = tail.file.size().map_err(FileError::at("examine", &tail.path))?;
    // A file that is as it should be keeps its blocks, which another file may be after by now.
    if size < segment_bytes || !only_zeros(tail, at)? {
        tail.file.set_size(at).map_err(FileError::at("truncate", &tail.path))?;
        tail.file.allocate(segment_bytes.max(at)).map_err(FileError::at("allocate", &tail.path))?;
        tail.file.sync_all().map_err(FileError::at("sync", &tail.path))?;
    }
    Ok(())
}

fn only_zeros(tail: &Segment, mut at: u64) -> Result<bool, WalError> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = tail.file.read_at(&mut buffer, at);
        let read = read.map_err(FileError::at("read", &tail.path))?;
        if read == 0 {
            return Ok(true);
        }
        if buffer[..read].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += read as u64;
    }
}

/// A segment to be: empty, allocated, locked, under a temporary name.
#[derive(Debug)]
struct Prepared {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    /// Up to here it holds written zeros.
    zeroed: u64,
}

fn prepare(disk: &dyn Disk, path: &Path, segment_bytes: u64) -> Result<Prepared, FileError> {
    let file = disk.open(path, Open::Truncate).map_err(FileError::at("create", path))?;
    // Nobody else knows the name; the lock is for what the file becomes.
    if !file.try_lock(LockKind::Range).map_err(FileError::at("lock", path))? {
        let held = std::io::Error::from(std::io::ErrorKind::ResourceBusy);
        return Err(FileError::at("lock", path)(held));
    }
    file.allocate(segment_bytes).map_err(FileError::at("allocate", path))?;
    Ok(Prepared { path: path.to_path_buf(), file, zeroed: 0 })
}

/// The thread that makes the next segment while the current one is written.
#[derive(Debug)]
struct Preparer {
    /// One message for each time [`Preparer::proceed`] was called; `None` if making it failed.
    ready: Receiver<Option<Prepared>>,
    disk: SharedDisk,
    go: Option<SyncSender<()>>,
    shared: Arc<PreparerShared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default, Debug)]
struct PreparerShared {
    /// How many segments have been asked for: the one being made is needed at once if it counts.
    wanted: AtomicU64,
    /// How full the segment before it is, in bytes: zeros are written no faster than they are needed.
    used: AtomicU64,
    stop: AtomicBool,
}

/// How much further the next segment is zeroed than the current one is full. A segment zeroed in one
/// go would keep the disk busy while the log waits for it, and an idle log's disk for nothing.
const PREPARE_AHEAD_BYTES: u64 = 4 << 20;

impl Preparer {
    fn start(
        disk: &SharedDisk,
        dir: &Path,
        options: &WalOptions,
    ) -> Result<Option<Self>, WalError> {
        if !options.prepare_ahead {
            return Ok(None);
        }
        let (ready_sender, ready) = sync_channel(1);
        let (go, go_receiver) = sync_channel::<()>(1);
        let shared = Arc::new(PreparerShared::default());
        let worker = Worker {
            disk: Arc::clone(disk),
            dir: dir.to_path_buf(),
            segment_bytes: options.segment_bytes,
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("wal-prepare".to_owned())
            .spawn(move || worker.run(&go_receiver, &ready_sender))
            .map_err(FileError::at("start the preparing thread for", dir))?;
        let mut preparer =
            Preparer { ready, disk: Arc::clone(disk), go: Some(go), shared, thread: Some(thread) };
        preparer.proceed();
        Ok(Some(preparer))
    }

    /// Asks for another one.
    fn proceed(&mut self) {
        // The worker is idle and its queue of one empty; if it is gone, `take` answers `None`.
        if let Some(go) = &self.go
            && go.try_send(()).is_err()
        {
            self.go = None;
        }
    }

    /// Tells how many bytes of the current segment are used.
    fn advance(&self, used: u64) {
        let before = self.shared.used.swap(used, Ordering::Relaxed);
        if before / SLICE_BYTES != used / SLICE_BYTES {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// The segment asked for, without the rest of its zeros if it is not finished.
    fn take(&mut self) -> Option<Prepared> {
        self.shared.wanted.fetch_add(1, Ordering::Relaxed);
        self.shared.used.store(0, Ordering::Relaxed);
        self.wake();
        self.go.as_ref()?;
        self.ready.recv().ok().flatten()
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wake();
        self.go = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself, and nothing depends on it any more.
            thread.join().ok();
        }
        if let Ok(Some(unused)) = self.ready.try_recv() {
            // It has not become a segment. One that stays behind does no harm: the name is ignored
            // when a log is opened, and the file is emptied before it is used.
            self.disk.remove_file(&unused.path).ok();
        }
    }
}

struct Worker {
    disk: SharedDisk,
    dir: PathBuf,
    segment_bytes: u64,
    shared: Arc<PreparerShared>,
}

impl Worker {
    fn run(&self, go: &Receiver<()>, ready: &SyncSender<Option<Prepared>>) {
        let mut count = 0;
        while go.recv().is_ok() {
            // Two names in turn: the one before may not have got its final name yet.
            let path = self.dir.join(format!("{}.tmp", count % 2));
            // An error is not the log's end: the log tries for itself when it needs the segment,
            // and reports what happens then.
            let prepared = self.make(&path, count).ok();
            if ready.send(prepared).is_err() {
                return;
            }
            count += 1;
        }
    }

    fn make(&self, path: &Path, count: u64) -> Result<Prepared, FileError> {
        let mut prepared = prepare(&*self.disk, path, self.segment_bytes)?;
        let zeros = vec![0; SLICE_BYTES as usize];
        while prepared.zeroed < self.segment_bytes
            && self.shared.wanted.load(Ordering::Relaxed) <= count
            && !self.shared.stop.load(Ordering::Relaxed)
        {
            if prepared.zeroed >= self.shared.used.load(Ordering::Relaxed) + PREPARE_AHEAD_BYTES {
                // Whoever changes what this loop looks at wakes it afterwards.
                std::thread::park();
                continue;
            }
            let slice = SLICE_BYTES.min(self.segment_bytes - prepared.zeroed);
            let write = prepared.file.write_at(&zeros[..slice as usize], prepared.zeroed);
            write.map_err(FileError::at("write", path))?;
            prepared.file.sync_data().map_err(FileError::at("sync", path))?;
            prepared.zeroed += slice;
        }
        Ok(prepared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actors::disk::{Fault, MemDisk, OsDisk};

    const SMALL: WalOptions =
        WalOptions { segment_bytes: 4096, zero_ahead_bytes: 1024, prepare_ahead: false };

    fn metadata() -> walpb::Metadata {
        walpb::Metadata { node_id: Some(0x1234), cluster_id: Some(u64::MAX) }
    }

    fn entry(term: u64, index: u64, bytes: usize) -> raftpb::Entry {
        // No byte is zero: etcd's rule takes a sector of zeros within a record for a torn one.
        let data = (0..bytes).map(|n| (n as u64 * 7 + index) as u8 | 1).collect::<Vec<u8>>();
        raftpb::Entry { r#type: 0, term, index, data: data.into() }
    }

    fn state(term: u64, commit: u64) -> raftpb::HardState {
        raftpb::HardState { term, vote: 1, commit }
    }

    fn snapshot(index: u64, term: u64) -> walpb::Snapshot {
        let conf_state = raftpb::ConfState { voters: vec![1], ..Default::default() };
        walpb::Snapshot { index: Some(index), term: Some(term), conf_state: Some(conf_state) }
    }

    fn newest(valid: &[walpb::Snapshot]) -> walpb::Snapshot {
        valid.last().cloned().unwrap_or_default()
    }

    fn beginning(_: &[walpb::Snapshot]) -> walpb::Snapshot {
        walpb::Snapshot::default()
    }

    fn mem() -> (MemDisk, SharedDisk) {
        let disk = MemDisk::new();
        disk.create_dir_all(Path::new("/m")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        (disk.clone(), Arc::new(disk))
    }

    fn dir() -> &'static Path {
        Path::new("/m/wal")
    }

    fn segments(disk: &dyn Disk) -> Vec<String> {
        let mut names = disk.list(dir()).unwrap();
        names.retain(|name| name.ends_with(".wal"));
        names
    }

    fn reopen(disk: &MemDisk) -> Result<(WalLog, Recovered), WalError> {
        WalLog::open_with(Arc::new(disk.clone()), dir(), SMALL, beginning)
    }

    #[test]
    fn the_log_can_move_to_its_own_thread() {
        fn moves<T: Send + 'static>() {}
        moves::<WalLog>();
    }

    #[test]
    fn what_is_appended_is_read_again_over_many_segments() {
        let (mem, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        let mut expected = Vec::new();
        for index in 1..=100 {
            let entries = [entry(1, index, (index as usize * 37) % 900)];
            log.append(&entries, Some(&state(1, index - 1))).unwrap();
            log.sync().unwrap();
            assert!(!log.sync_needed());
            expected.extend(entries);
        }
        assert_eq!(log.last_index(), 100);
        assert!(log.written_bytes() > 100 * 300);
        assert!(segments(&mem).len() > 5);
        log.close().unwrap();

        let (mut log, recovered) = reopen(&mem).unwrap();
        assert_eq!(recovered.entries, expected);
        assert_eq!(recovered.hard_state, state(1, 99));
        assert_eq!(recovered.metadata, metadata());
        assert_eq!(recovered.torn, None);
        assert_eq!(recovered.last_index, 100);

        // More, over the tail of an earlier process, and an overwritten end.
        log.append(&[entry(2, 90, 10)], None).unwrap();
        log.sync().unwrap();
        drop(log);
        let (_, recovered) = reopen(&mem).unwrap();
        assert_eq!(recovered.last_index, 90);
        assert_eq!(recovered.entries[..89], expected[..89]);
        assert_eq!(recovered.entries[89], entry(2, 90, 10));
    }

    #[test]
    fn a_log_is_created_with_all_that_it_begins_with_or_not_at_all() {
        let entries = [entry(1, 1, 300), entry(1, 2, 300)];
        let begin =
            |disk| WalLog::create_holding(disk, dir(), &metadata(), &entries, &state(1, 2), SMALL);
        let mut faults = 0;
        loop {
            let (mem, disk) = mem();
            mem.fail_from(mem.changes() + faults, Fault::Io);
            let created = begin(disk).is_ok();
            for seed in 0..8 {
                let after = mem.crash(seed);
                if has_log(&after, dir()).unwrap() {
                    let (_, recovered) = reopen(&after).unwrap();
                    assert_eq!(recovered.entries, entries, "fault at {faults}");
                    assert_eq!(recovered.hard_state, state(1, 2));
                } else {
                    assert!(!created);
                }
            }
            if created {
                break;
            }
            faults += 1;
        }
        assert!(faults > 4, "{faults}");

        let (mem, disk) = mem();
        let mut log = begin(disk).unwrap();
        assert_eq!((log.last_index(), log.hard_state()), (2, state(1, 2)));
        log.append(&[entry(2, 3, 5)], None).unwrap();
        log.close().unwrap();
        assert_eq!(reopen(&mem).unwrap().1.last_index, 3);
    }

    #[test]
    fn a_received_snapshot_replaces_the_log_wherever_it_is_cut_short() {
        let (mem, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        // The last ones were never committed, and reach beyond the snapshot.
        let old: Vec<_> = (1..=30).map(|index| entry(1, index, 50)).collect();
        log.append(&old, Some(&state(1, 5))).unwrap();
        log.sync().unwrap();
        log.replace(&snapshot(20, 2)).unwrap();
        assert!(log.sync_needed());
        let new: Vec<_> = (21..=80).map(|index| entry(2, index, 100)).collect();
        let (few, rest) = new.split_at(5);
        let mut outcomes = [0, 0];
        let mut crash = |mem: &MemDisk| {
            for seed in 0..100 {
                let crashed: SharedDisk = Arc::new(mem.crash(seed));
                let (_, found) = WalLog::open_with(crashed, dir(), SMALL, newest).unwrap();
                let count = found.entries.len();
                match found.start.index() {
                    0 => assert_eq!((&found.entries[..], found.hard_state.commit), (&old[..], 5)),
                    20 => assert_eq!(found.entries, new[..count], "seed {seed}"),
                    other => panic!("a start at {other}"),
                }
                assert!(found.hard_state.commit >= found.start.index());
                assert!(found.hard_state.commit <= found.last_index, "seed {seed}");
                outcomes[usize::from(found.start.index() > 0)] += 1;
            }
        };
        log.append(few, Some(&state(2, 25))).unwrap();
        log.flush().unwrap();
        crash(&mem);
        // So many that a segment is cut among them.
        log.append(rest, None).unwrap();
        log.flush().unwrap();
        crash(&mem);
        assert_eq!((log.last_index(), log.hard_state()), (80, state(2, 25)));
        assert!(outcomes[0] > 0 && outcomes[1] > 100, "{outcomes:?}");
        log.sync().unwrap();
        // The log goes on, is compacted and cut, and is still the one after the snapshot.
        let (mut log, found) =
            WalLog::open_with(Arc::new(mem.crash(0)), dir(), SMALL, newest).unwrap();
        assert_eq!((found.start.index(), found.last_index), (20, 80));
        assert_eq!(found.entries, new);
        log.append(&[entry(2, 81, 10)], Some(&state(2, 81))).unwrap();
        log.save_snapshot(&snapshot(81, 2)).unwrap();
        log.release_to(81);
        log.close().unwrap();
    }

    #[test]
    fn a_commit_index_alone_asks_for_no_sync() {
        let (_, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        log.append(&[entry(1, 1, 1)], Some(&state(1, 0))).unwrap();
        log.sync().unwrap();
        log.append(&[], Some(&state(1, 1))).unwrap();
        assert!(!log.sync_needed());
        log.append(&[], Some(&state(2, 1))).unwrap();
        assert!(log.sync_needed());
    }

    #[test]
    fn a_second_opener_is_told_that_the_log_is_locked() {
        let (mem, disk) = mem();
        let log = WalLog::create_with(Arc::clone(&disk), dir(), &metadata(), SMALL).unwrap();
        assert!(matches!(reopen(&mem), Err(WalError::Locked { .. })));
        assert!(matches!(
            WalLog::create_with(disk, dir(), &metadata(), SMALL),
            Err(WalError::Exists { .. })
        ));
        drop(log);
        reopen(&mem).unwrap();
        assert!(matches!(
            WalLog::open(Arc::new(mem.clone()), Path::new("/m/other"), beginning),
            Err(WalError::Missing { .. })
        ));
    }

    #[test]
    fn released_segments_are_purged_and_the_rest_still_opens() {
        let (mem, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        for index in 1..=60 {
            log.append(&[entry(1, index, 500)], Some(&state(1, index))).unwrap();
        }
        log.sync().unwrap();
        log.save_snapshot(&snapshot(50, 1)).unwrap();
        let before = segments(&mem);
        assert_eq!(purge(&mem, dir(), 1).unwrap(), Vec::<PathBuf>::new());
        log.release_to(50);
        assert_eq!(purge(&mem, dir(), 0).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(purge(&mem, dir(), before.len() - 1).unwrap(), [dir().join(&before[0])]);
        purge(&mem, dir(), 1).unwrap();
        let left: Vec<_> =
            segments(&mem).iter().map(|name| SegmentName::parse(name).unwrap()).collect();
        assert!(left.len() < before.len() && left[0].index <= 50 && left[1].index > 46);
        drop(log);

        let (mut log, recovered) =
            WalLog::open_with(Arc::new(mem.clone()), dir(), SMALL, newest).unwrap();
        assert_eq!(recovered.start, snapshot(50, 1));
        assert_eq!(recovered.entries.first().unwrap().index, 51);
        assert_eq!(recovered.last_index, 60);
        log.append(&[entry(1, 61, 5)], None).unwrap();
        log.close().unwrap();
        assert!(matches!(reopen(&mem), Err(WalError::Segments { .. })));
        let read = read(&mem, dir(), newest).unwrap();
        assert_eq!(read.last_index, 61);
    }

    #[test]
    fn a_tail_cut_anywhere_is_repaired_with_a_copy() {
        let (mem, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        log.append(&[entry(1, 1, 20), entry(1, 2, 700)], Some(&state(1, 1))).unwrap();
        log.sync().unwrap();
        let sound = log.tail_at;
        log.append(&[entry(1, 3, 600)], None).unwrap();
        log.sync().unwrap();
        let end = log.tail_at;
        drop(log);
        let path = dir().join(&segments(&mem)[0]);
        for cut in sound + 1..end {
            let mem = mem.crash(1);
            mem.open(&path, Open::Write).unwrap().set_size(cut).unwrap();
            let looked_at = read(&mem, dir(), beginning).unwrap();
            assert_eq!(looked_at.torn, Some(Torn { segment: path.clone(), at: sound, copy: None }));
            let (mut log, recovered) = reopen(&mem).unwrap();
            assert_eq!(recovered.last_index, 2, "cut at {cut}");
            let copy = recovered.torn.unwrap().copy.unwrap();
            assert_eq!(mem.open(&copy, Open::Read).unwrap().size().unwrap(), cut);
            log.append(&[entry(2, 3, 30)], None).unwrap();
            log.close().unwrap();
            let (_, recovered) = reopen(&mem).unwrap();
            assert_eq!((recovered.last_index, recovered.torn), (3, None));
            assert_eq!(recovered.entries[2], entry(2, 3, 30));
        }
    }

    #[test]
    fn a_flipped_bit_is_refused_by_file_and_offset_and_nothing_is_changed() {
        let (mem, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        for index in 1..=40 {
            log.append(&[entry(1, index, 400)], Some(&state(1, index))).unwrap();
        }
        log.sync().unwrap();
        drop(log);
        let names = segments(&mem);
        for name in &names {
            let mem = mem.crash(1);
            let path = dir().join(name);
            let file = mem.open(&path, Open::Write).unwrap();
            let mut byte = [0];
            file.read_at(&mut byte, 300).unwrap();
            file.write_at(&[byte[0] ^ 4], 300).unwrap();
            drop(file);
            let changes = mem.changes();
            let error = reopen(&mem).unwrap_err();
            assert!(matches!(
                &error,
                WalError::Corrupt { path: at_path, at, damage: Damage::Crc { .. } }
                    if *at_path == path && *at < 300
            ));
            assert!(error.to_string().starts_with(&format!("/m/wal/{name} is corrupt at byte ")));
            assert_eq!(mem.changes(), changes);
        }
        // A missing segment.
        mem.remove_file(&dir().join(&names[1])).unwrap();
        assert!(matches!(reopen(&mem), Err(WalError::Segments { .. } | WalError::Corrupt { .. })));
    }

    #[test]
    fn old_bytes_behind_the_end_never_come_back() {
        let (mem, disk) = mem();
        let mut log = WalLog::create_with(disk, dir(), &metadata(), SMALL).unwrap();
        log.append(&[entry(1, 1, 8)], None).unwrap();
        log.sync().unwrap();
        let end = log.tail_at;
        let path = log.tail().path.clone();
        drop(log);
        mem.open(&path, Open::Write).unwrap().write_at(&[0xEE; 64], end + 64).unwrap();
        let (log, recovered) = reopen(&mem).unwrap();
        assert_eq!((recovered.last_index, recovered.torn), (1, None));
        assert!(only_zeros(log.tail(), end).unwrap());
        assert_eq!(log.tail().file.size().unwrap(), SMALL.segment_bytes);
    }

    /// A seeded run of appends, syncs, snapshots.
    struct Run {
        /// All that was appended.
        entries: Vec<raftpb::Entry>,
        /// Those that a sync covers.
        synced: Vec<raftpb::Entry>,
        /// The last one appended.
        state: raftpb::HardState,
        error: Option<WalError>,
    }

    fn run(disk: SharedDisk, seed: u64, steps: usize) -> Run {
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let mut run = Run { entries: vec![], synced: vec![], state: state(1, 0), error: None };
        let mut log = match WalLog::create_with(disk, dir(), &metadata(), SMALL) {
            Ok(log) => log,
            Err(error) => return Run { error: Some(error), ..run },
        };
        let mut term = 1;
        for _ in 0..steps {
            let outcome = match next(10) {
                0..=5 => {
                    let mut batch = Vec::new();
                    for _ in 0..1 + next(4) {
                        let index = run.entries.len() as u64 + 1;
                        let entry = entry(term, index, next(700) as usize);
                        run.entries.push(entry.clone());
                        batch.push(entry);
                    }
                    log.append(&batch, None)
                }
                6 => {
                    term += 1;
                    log.append(&[], Some(&state(term, run.state.commit)))
                }
                7..=8 => log.sync().map(|_| ()),
                _ => match run.synced.last() {
                    Some(last) => {
                        let (index, term_of_last) = (last.index, last.term);
                        run.state = state(term, index);
                        log.append(&[], Some(&state(term, index)))
                            .and_then(|()| log.save_snapshot(&snapshot(index, term_of_last)))
                            .map(|_| ())
                    }
                    None => Ok(()),
                },
            };
            if let Err(error) = outcome {
                // From now on it is the same error for everything.
                let again = log.sync().unwrap_err();
                assert_eq!(again.to_string(), error.to_string());
                assert_eq!(log.append(&[], None).unwrap_err().to_string(), error.to_string());
                run.error = Some(error);
                return run;
            }
            if !log.sync_needed() {
                run.synced = run.entries.clone();
            }
        }
        run
    }

    /// Everything synced is there, and everything else that is there was appended.
    fn check(disk: &MemDisk, run: &Run, what: &str) {
        let opened = match reopen(disk) {
            Ok(opened) => opened,
            Err(error) => {
                assert!(
                    matches!(error, WalError::Missing { .. }) && run.synced.is_empty(),
                    "{what}: {error}"
                );
                return;
            }
        };
        let (mut log, recovered) = opened;
        let n = recovered.entries.len();
        assert!(n >= run.synced.len(), "{what}: {n} of {} synced", run.synced.len());
        assert_eq!(recovered.entries[..], run.entries[..n], "{what}");
        let next = entry(1000, n as u64 + 1, 2000);
        log.append(std::slice::from_ref(&next), None).unwrap();
        log.sync().unwrap();
        drop(log);
        // What follows the repaired end is not mixed up with what stood there.
        let (_, recovered) = reopen(&disk.crash(0)).unwrap();
        assert_eq!(recovered.entries.last(), Some(&next), "{what}");
        assert_eq!(recovered.entries.len(), n + 1, "{what}");
    }

    #[test]
    fn a_crash_at_any_change_of_the_disk_loses_nothing_acknowledged() {
        for seed in 1..=3 {
            let (mem, disk) = mem();
            let whole = run(disk, seed, 60);
            assert!(whole.error.is_none());
            check(&mem.crash(0), &whole, "no fault");
            let changes = mem.changes();
            assert!(segments(&mem).len() > 3);
            for n in 2..changes {
                let (mem, disk) = self::mem();
                mem.fail_from(n, Fault::Io);
                let cut = run(disk, seed, 60);
                assert!(cut.error.is_some());
                for crash in [0, 1, 2 + n, 3 + n * 7, 4 + n * 31] {
                    let what = format!("seed {seed}, change {n}, crash {crash}");
                    check(&mem.crash(crash), &cut, &what);
                }
            }
        }
    }

    #[test]
    fn a_full_disk_poisons_the_log_and_leaves_what_was_synced() {
        for n in (2..200).step_by(3) {
            let (mem, disk) = mem();
            mem.fail_from(n, Fault::NoSpace);
            let run = run(disk, 4, 60);
            let Some(error) = &run.error else { continue };
            assert!(matches!(error, WalError::Io(error) if error.is_full()), "{error}");
            let text = error.to_string();
            assert!(text.contains("/m/wal") && text.contains("No space left"), "{text}");
            mem.heal();
            check(&mem.crash(n), &run, &format!("change {n}"));
            // Without a crash as well, once there is room again.
            check(&mem, &run, &format!("change {n}, no crash"));
        }
    }

    #[test]
    fn the_real_disk_with_segments_prepared_ahead() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("wal");
        let options =
            WalOptions { segment_bytes: 3 << 20, zero_ahead_bytes: 64 << 10, prepare_ahead: true };
        let disk: SharedDisk = Arc::new(OsDisk);
        let mut log = WalLog::create_with(Arc::clone(&disk), &dir, &metadata(), options).unwrap();
        for index in 1..=200 {
            log.append(&[entry(1, index, 100_000)], Some(&state(1, index))).unwrap();
            log.sync().unwrap();
        }
        assert!(matches!(
            WalLog::open(Arc::clone(&disk), &dir, beginning),
            Err(WalError::Locked { .. })
        ));
        log.close().unwrap();
        assert!(disk.list(&dir).unwrap().iter().all(|name| name.ends_with(".wal")));
        let (log, recovered) = WalLog::open_with(disk, &dir, options, beginning).unwrap();
        assert_eq!(recovered.last_index, 200);
        assert!(recovered.entries.iter().all(|e| *e == entry(1, e.index, 100_000)));
        assert_eq!(log.tail().file.size().unwrap(), 3 << 20);
    }
}
