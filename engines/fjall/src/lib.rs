//! An engine over fjall, log-structured merge trees: commits append to a journal, and what they wrote
//! reaches sorted tables later and in bulk.
//!
//! In `dir`:
//!
//! | file | holds |
//! |---|---|
//! | `fjall/` | fjall's files: journals, and a tree for each table and one of our own |
//! | `fjall.new/` | the same in the making (first start); removed on opening |
//! | `mark` | which batch was durable last |
//! | `mark.new` | the same in the making (first start) |
//! | `damaged-tail` | what was cut off a journal that turned out to be damaged |
//! | `damaged-tail.new` | the same in the making |
//! | `lock` | nothing; locked by the process that has the engine open |
//!
//! A batch is one batch of fjall's journal: recovery takes it whole or not at all, with everything before
//! it. A buffered commit hands it to the operating system, so it outlives the process; a durable one syncs
//! the journal. Each batch also writes its number, one more than that of the batch before, into our own
//! tree. Opening looks through the journals first and cuts off a torn end; when fjall has then recovered
//! a smaller number than `mark` knows to be durable, the engine refuses to open instead of going on
//! without what had been acknowledged.
//!
//! fjall lets a reader see a batch that is half applied when one of its threads finishes a table at that
//! moment, because that moves the visible sequence number past the batch. So nobody takes a snapshot but
//! the committer, between two batches, and views share the latest.
//!
//! Memtables are sealed together, by the bytes written to all of them, and a thread of ours writes them
//! to tables: the journal can go when all of them are written, and an error reaches the next commit with
//! its cause. A commit waits while two sealed generations are still to be written, or when compaction
//! has fallen far behind. Large values are kept with their keys.

mod journal;
mod mark;
mod space;
mod store;

use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use engine_api::{
    About, Batch, Durability, Engine, EngineError, Op, OptionKind, OptionSpec, Options, Reclaim,
    Reclaimed, Survives, Table, View, is_empty_range,
};
use fjall::{AbstractTree, Keyspace, OwnedWriteBatch, PersistMode, Readable, Slice, Snapshot};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use store::{Shared, position};

const FJALL: &str = "fjall";
/// In it: a directory for each tree.
const TREES: &str = "keyspaces";
const NEW: &str = "fjall.new";
const MARK: &str = "mark";
const MARK_NEW: &str = "mark.new";
const DAMAGED: &str = "damaged-tail";
const DAMAGED_NEW: &str = "damaged-tail.new";
const LOCK: &str = "lock";

/// Our own tree.
const OWN: &str = "quorate";
/// It is the first that is made, so that the journal can be read without fjall's catalogue.
const OWN_ID: u64 = 1;
/// Its row that every batch writes.
const OWN_BATCH: &[u8] = b"batch";
/// Its row with the compression that the trees were made with.
const OWN_COMPRESSION: &[u8] = b"compression";

const CACHE_BYTES: &str = "cache-bytes";
const MEMTABLE_BYTES: &str = "memtable-bytes";
const COMPRESSION: &str = "compression";

const KEY_BYTES_MAX: u64 = u16::MAX as u64;
const VALUE_BYTES_MAX: u64 = u32::MAX as u64;

/// What the engine promises, and how it can be set.
pub const ABOUT: About = About {
    name: "fjall",
    summary: "log-structured merge trees (fjall); for many small writes and data that compress",
    buffered_survives: Survives::Kill,
    durable_survives: Survives::PowerLoss,
    reclaim: Reclaim::Online,
    key_bytes_max: Some(KEY_BYTES_MAX),
    value_bytes_max: Some(VALUE_BYTES_MAX),
    memory: "blocks read, up to cache-bytes; what was written last, up to three times memtable-bytes; \
             indexes of the tables",
    files: "journals and tables, each written once; up to twice the data during reclaim",
    options: &[
        OptionSpec {
            name: CACHE_BYTES,
            kind: OptionKind::Number { min: 1 << 20, max: usize::MAX as u64, unit: "bytes" },
            default: "67108864",
            help: "memory for blocks of tables that were read",
        },
        OptionSpec {
            name: MEMTABLE_BYTES,
            kind: OptionKind::Number { min: 1 << 20, max: 4 << 30, unit: "bytes" },
            default: "33554432",
            help: "bytes written before they go into tables: more means fewer and larger tables, more \
                   memory, larger journals and a longer opening",
        },
        OptionSpec {
            name: COMPRESSION,
            kind: OptionKind::Choice(&["none", "lz4"]),
            default: "none",
            help: "of tables: less space for more work; chosen when the directory is made, another choice is \
                   refused later",
        },
    ],
};

/// The engine over one directory.
pub struct Fjall {
    shared: Arc<Shared>,
    /// Held by a commit from its start to its end: one committer at a time.
    writer: Mutex<Writer>,
    /// The state between the last batch and the next.
    current: RwLock<Current>,
    /// One reclaim at a time.
    reclaiming: Mutex<()>,
    memtable_bytes: u64,
    threads: Vec<JoinHandle<()>>,
    // last: another process may open the directory only when the files are closed
    _lock: File,
}

struct Current {
    snapshot: Snapshot,
    own: OwnRow,
}

struct Writer {
    own: OwnRow,
    /// No key of the table is greater, so a greater one is new and needs no look-up.
    greatest: [Option<Bytes>; Table::ALL.len()],
    /// Bytes in the memtables.
    unsealed: u64,
    /// Sealed memtables are being written: commits must look whether there is room.
    behind: bool,
}

/// What every batch writes into our own tree.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct OwnRow {
    /// How many batches there were with this one.
    pub(crate) number: u64,
    /// Of all tables.
    pub(crate) rows: u64,
    /// Bytes of their keys and values.
    pub(crate) bytes: u64,
}

impl OwnRow {
    fn encode(self) -> Bytes {
        let words = [self.number, self.rows, self.bytes];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 24] = bytes.try_into().ok()?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Some(OwnRow { number: word(0), rows: word(8), bytes: word(16) })
    }

    fn add(&mut self, key: usize, value: usize) {
        self.rows += 1;
        self.bytes += (key + value) as u64;
    }

    fn subtract(&mut self, key: usize, value: usize) {
        self.rows = self.rows.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub((key + value) as u64);
    }
}

/// Memory of a row in a memtable beyond its bytes.
const MEMTABLE_ROW_BYTES: u64 = 100;

impl Fjall {
    /// Opens the engine in `dir`, which is created if it is absent. Takes longer the more the journals
    /// hold: they are read twice, and hold little more than twice `memtable-bytes`.
    ///
    /// # Errors
    /// `Unusable`: another process has it open, it is another program's or was made with another
    /// compression. `Corrupt`: a file is damaged, or what was durable is no longer there. `Io`: the system
    /// refused. Each names the file or the directory.
    pub fn open(dir: &Path, options: &Options) -> Result<Fjall, EngineError> {
        fs::create_dir_all(dir).map_err(|error| failed("create directory", dir, error))?;
        let lock = lock(dir)?;
        let store = store::open(dir, options)?;
        let snapshot = store.shared.db.snapshot();
        let mut greatest = [const { None }; Table::ALL.len()];
        for (keyspace, greatest) in store.shared.tables.iter().zip(&mut greatest) {
            if let Some(last) = snapshot.last_key_value(keyspace) {
                let key = last.key().map_err(|error| store.shared.convert("read", error))?;
                *greatest = Some(Bytes::copy_from_slice(&key));
            }
        }
        let writer = Writer {
            own: store.own,
            greatest,
            unsealed: store.shared.trees().map(|tree| tree.tree.active_memtable().size()).sum(),
            behind: true,
        };
        let shared = Arc::new(store.shared);
        let mut engine = Fjall {
            shared,
            writer: Mutex::new(writer),
            current: RwLock::new(Current { snapshot, own: store.own }),
            reclaiming: Mutex::new(()),
            memtable_bytes: options.number(MEMTABLE_BYTES),
            threads: Vec::new(),
            _lock: lock,
        };
        for (name, run) in [
            ("fjall-flush", Shared::flush_when_sealed as fn(&Shared)),
            ("fjall-compact", Shared::compact_when_flushed),
        ] {
            let shared = Arc::clone(&engine.shared);
            let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
                let _guard = PoisonOnPanic(&shared);
                run(&shared);
            });
            // what runs already is stopped by the drop
            engine.threads.push(thread.map_err(|error| failed("start a thread for", dir, error))?);
        }
        Ok(engine)
    }

    fn write(
        &self,
        writer: &mut Writer,
        batch: &Batch,
        durability: Durability,
    ) -> Result<(), EngineError> {
        if writer.behind {
            writer.behind = !self.shared.wait_for_room()?;
        }
        // fjall gives all rows of a batch one sequence number, so a key may be in it only once
        let mut last: FxHashMap<(Table, &[u8]), usize> = FxHashMap::default();
        last.reserve(batch.len());
        for (at, op) in batch.ops.iter().enumerate() {
            let (Op::Put { table, key, .. } | Op::Delete { table, key }) = op;
            last.insert((*table, key), at);
        }
        let mode = match durability {
            // to the operating system
            Durability::Buffered => PersistMode::Buffer,
            Durability::Durable => PersistMode::SyncData,
        };
        let shared = &*self.shared;
        let mut write = OwnedWriteBatch::with_capacity(shared.db.clone(), last.len() + 1)
            .durability(Some(mode));
        let mut own = OwnRow { number: writer.own.number + 1, ..writer.own };
        let mut unsealed = 0;
        let mut greatest: [Option<&[u8]>; Table::ALL.len()] = [None; Table::ALL.len()];
        for (at, op) in batch.ops.iter().enumerate() {
            let (Op::Put { table, key, .. } | Op::Delete { table, key }) = op;
            if last[&(*table, &key[..])] != at {
                continue;
            }
            let index = position(*table);
            let keyspace = &shared.tables[index];
            let is_new = writer.greatest[index].as_ref().is_none_or(|greatest| key > greatest);
            let old = if is_new {
                None
            } else {
                keyspace.size_of(key).map_err(|error| shared.convert("read", error))?
            };
            if let Some(old) = old {
                own.subtract(key.len(), old as usize);
            }
            match op {
                Op::Put { value, .. } => {
                    own.add(key.len(), value.len());
                    write.insert(keyspace, Slice::from(key.clone()), Slice::from(value.clone()));
                    greatest[index] = greatest[index].max(Some(key));
                }
                Op::Delete { .. } if old.is_none() => continue,
                Op::Delete { .. } => write.remove(keyspace, Slice::from(key.clone())),
            }
            unsealed += op.len() as u64 + MEMTABLE_ROW_BYTES;
        }
        write.insert(&shared.own, Slice::from(OWN_BATCH), Slice::from(own.encode()));
        write.commit().map_err(|error| shared.convert("append to the journal in", error))?;
        writer.own = own;
        writer.unsealed += unsealed + MEMTABLE_ROW_BYTES;
        for (kept, new) in writer.greatest.iter_mut().zip(greatest) {
            if let Some(new) = new.filter(|new| kept.as_ref().is_none_or(|kept| new > kept)) {
                *kept = Some(Bytes::copy_from_slice(new));
            }
        }
        self.refresh(own);
        if durability == Durability::Durable {
            shared.mark.lock().durable(own.number)?;
        }
        if writer.unsealed >= self.memtable_bytes {
            self.seal(writer)?;
        }
        Ok(())
    }

    /// Lets views see what is committed by now. Only between two batches, see the crate's documentation.
    fn refresh(&self, own: OwnRow) {
        let current = Current { snapshot: self.shared.db.snapshot(), own };
        let outdated = std::mem::replace(&mut *self.current.write(), current);
        // after the lock: closing one takes fjall's own locks
        drop(outdated);
    }

    /// Seals all memtables and has them written.
    fn seal(&self, writer: &mut Writer) -> Result<(), EngineError> {
        // What is sealed may be written at any moment, by whoever is writing tables already, and a batch is
        // then in some tables and in the journal for others: the journal must have it first. So must the
        // mark, or a journal damaged later could leave a batch in some tables only.
        self.sync(writer)?;
        self.shared.seal();
        writer.unsealed = 0;
        writer.behind = true;
        Ok(())
    }

    /// Makes all earlier batches durable.
    fn sync(&self, writer: &Writer) -> Result<(), EngineError> {
        let shared = &self.shared;
        let synced = shared.db.persist(PersistMode::SyncData);
        synced.map_err(|error| shared.convert("sync the journal in", error))?;
        shared.mark.lock().durable(writer.own.number)
    }
}

impl Engine for Fjall {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        self.shared.check_poisoned()?;
        let snapshot = self.current.read().snapshot.clone();
        Ok(Box::new(FjallView { shared: &self.shared, snapshot }))
    }

    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let mut writer = self.writer.lock();
        self.shared.check_poisoned()?;
        batch.refuse_empty_keys()?;
        refuse_large(batch)?;
        let result = match (batch.is_empty(), durability) {
            (true, Durability::Buffered) => Ok(()),
            (true, Durability::Durable) => self.sync(&writer),
            (false, _) => self.write(&mut writer, batch, durability),
        };
        result.map_err(|error| self.shared.poison(error))
    }

    /// The blocks that all files occupy; the tables as of the last that was written, compacted or reclaimed.
    fn size(&self) -> Result<u64, EngineError> {
        space::size(&self.shared)
    }

    /// An estimate from a counter kept with each commit: bytes of all rows and 24 for each, for lengths,
    /// its sequence number and its part in indexes and filters; never more than the files occupy, which is
    /// less when tables are compressed.
    fn size_in_use(&self) -> Result<u64, EngineError> {
        self.shared.check_poisoned()?;
        let own = self.current.read().own;
        let live = own.bytes.saturating_add(own.rows.saturating_mul(24));
        Ok(live.min(self.size()?))
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        space::reclaim(self)
    }

    /// The merging of one tree, once begun, goes on to its end: fjall cannot interrupt it. What was merged
    /// until then stays merged.
    fn cancel_reclaim(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
    }
}

impl Drop for Fjall {
    /// Waits for a table that is being written or compacted, and makes everything durable.
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // a panic there has poisoned the engine already
            let _ = thread.join();
        }
        let writer = self.writer.get_mut();
        if self.shared.check_poisoned().is_ok()
            && self.shared.db.persist(PersistMode::SyncAll).is_ok()
        {
            let mut mark = self.shared.mark.lock();
            // without it the check on opening is weaker, no more
            let _ = mark.durable(writer.own.number).and_then(|()| mark.sync());
        }
    }
}

/// Lets commits fail rather than wait for a thread that is no more.
struct PoisonOnPanic<'a>(&'a Shared);

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let source = io::Error::other("a thread of the engine has panicked");
            self.0.poison(failed("write tables in", &self.0.dir, source));
        }
    }
}

/// Refuses what the format has no room for.
fn refuse_large(batch: &Batch) -> Result<(), EngineError> {
    for (at, op) in batch.ops.iter().enumerate() {
        let (Op::Put { table, key, .. } | Op::Delete { table, key }) = op;
        let too_long = |what: &str, len: usize, max: u64| {
            Err(EngineError::Unusable(format!(
                "operation {at} of the batch has a {what} of {len} bytes for table {table}; the engine \
                 takes {max} at most"
            )))
        };
        if key.len() as u64 > KEY_BYTES_MAX {
            return too_long("key", key.len(), KEY_BYTES_MAX);
        }
        if let Op::Put { value, .. } = op
            && value.len() as u64 > VALUE_BYTES_MAX
        {
            return too_long("value", value.len(), VALUE_BYTES_MAX);
        }
    }
    Ok(())
}

struct FjallView<'a> {
    shared: &'a Shared,
    snapshot: Snapshot,
}

impl FjallView<'_> {
    fn keyspace(&self, table: Table) -> &Keyspace {
        &self.shared.tables[position(table)]
    }
}

/// Bounds that no stored key tells from the given ones: fjall takes no longer ones.
fn shorten<'a>(from: Bound<&'a [u8]>, to: Bound<&'a [u8]>) -> (Bound<&'a [u8]>, Bound<&'a [u8]>) {
    let max = KEY_BYTES_MAX as usize;
    let from = match from {
        // keys are greater than it if they are greater than its beginning
        Bound::Included(key) | Bound::Excluded(key) if key.len() > max => {
            Bound::Excluded(&key[..max])
        }
        from => from,
    };
    let to = match to {
        Bound::Included(key) | Bound::Excluded(key) if key.len() > max => {
            Bound::Included(&key[..max])
        }
        to => to,
    };
    (from, to)
}

impl View for FjallView<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if key.is_empty() || key.len() as u64 > KEY_BYTES_MAX {
            return Ok(None);
        }
        let found = self.snapshot.get(self.keyspace(table), key);
        Ok(found.map_err(|error| self.shared.convert("read", error))?.map(Bytes::from))
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let (from, to) = shorten(from, to);
        if is_empty_range(from, to) {
            return Ok(());
        }
        for row in self.snapshot.range::<&[u8], _>(self.keyspace(table), (from, to)) {
            let (key, value) =
                row.into_inner().map_err(|error| self.shared.convert("read", error))?;
            if visit(&key, &value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let Some(last) = self.snapshot.last_key_value(self.keyspace(table)) else {
            return Ok(None);
        };
        let (key, value) = last.into_inner().map_err(|error| self.shared.convert("read", error))?;
        Ok(Some((Bytes::from(key), Bytes::from(value))))
    }
}

fn failed(doing: &str, path: &Path, source: io::Error) -> EngineError {
    EngineError::Io { what: format!("{doing} {}", path.display()), source }
}

/// Takes the lock that keeps other processes out, also while there are no files of fjall yet.
fn lock(dir: &Path) -> Result<File, EngineError> {
    let path = dir.join(LOCK);
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| failed("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(EngineError::Unusable(format!(
            "{} is in use: {} is locked by another process",
            dir.display(),
            path.display()
        ))),
        Err(TryLockError::Error(error)) => Err(failed("lock", &path, error)),
    }
}

/// Makes the names in `dir` durable.
fn sync_dir(dir: &Path) -> Result<(), EngineError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| failed("sync directory", dir, error))
}

#[cfg(test)]
mod tests;
