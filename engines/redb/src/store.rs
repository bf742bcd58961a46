//! One redb file: the tables, commits into them and snapshots of them.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use engine_api::{Batch, Durability, EngineError, Op, Table, View, is_empty_range};
use redb::{
    CommitError, CursorError, Database, DatabaseError, ReadOnlyTable, ReadTransaction,
    ReadableDatabase, ReadableTable, StorageError, TableDefinition, TableError, TableHandle,
    TransactionError, WriteTransaction,
};

use crate::disk::{Disk, DiskState};

/// Our own table: `format` marks the file as ours, `live_bytes` is [`Store::live_bytes`].
const OWN: TableDefinition<'static, &str, u64> = TableDefinition::new("quorate");
const FORMAT: &str = "format";
const LIVE_BYTES: &str = "live_bytes";
const FORMAT_VERSION: u64 = 1;

/// First bytes of every redb file.
const MAGIC: &[u8] = b"redb\x1A\x0A\xA9\x0D\x0A";

/// Ascending puts from this many on are worth moving a cursor to the table's end.
const APPEND_MIN: usize = 4;

/// Bytes that redb adds to a row in a leaf: the ends of key and value.
pub(crate) const ROW_OVERHEAD: u64 = 8;

type Rows = TableDefinition<'static, &'static [u8], &'static [u8]>;

fn definition(table: Table) -> Rows {
    TableDefinition::new(table.name())
}

/// Which file an error is about, and what redb's errors mean to us.
#[derive(Clone, Debug)]
struct Place(Arc<PathBuf>);

impl Place {
    fn io(&self, doing: &str, source: io::Error) -> EngineError {
        EngineError::Io { what: format!("{doing} {}", self.0.display()), source }
    }

    fn corrupt(&self, what: impl Into<String>) -> EngineError {
        EngineError::Corrupt { at: self.0.display().to_string(), what: what.into() }
    }

    fn storage(&self, doing: &str, error: StorageError) -> EngineError {
        match error {
            // a file that ends early, or bytes that are no redb header
            StorageError::Io(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                ) =>
            {
                self.corrupt(error.to_string())
            }
            StorageError::Io(error) => self.io(doing, error),
            StorageError::Corrupted(what) => self.corrupt(what),
            StorageError::ValueTooLarge(bytes) => EngineError::Unusable(format!(
                "a row of {bytes} bytes is more than {} can hold",
                self.0.display()
            )),
            StorageError::PreviousIo | StorageError::DatabaseClosed => EngineError::Poisoned(
                format!("{doing} {}: stopped after an earlier I/O error", self.0.display()),
            ),
            other => self.io(doing, io::Error::other(other.to_string())),
        }
    }

    fn table(&self, doing: &str, error: TableError) -> EngineError {
        match error {
            TableError::Storage(error) => self.storage(doing, error),
            // the names are ours: a table of another shape was not written by us
            other => self.corrupt(other.to_string()),
        }
    }

    fn begin(&self, error: TransactionError) -> EngineError {
        match error {
            TransactionError::Storage(error) => self.storage("begin a transaction in", error),
            other => self.io("begin a transaction in", io::Error::other(other.to_string())),
        }
    }

    fn commit(&self, error: CommitError) -> EngineError {
        match error {
            CommitError::Storage(error) => self.storage("commit to", error),
            other => self.io("commit to", io::Error::other(other.to_string())),
        }
    }

    fn open(&self, error: DatabaseError) -> EngineError {
        match error {
            DatabaseError::Storage(error) => self.storage("open", error),
            DatabaseError::DatabaseAlreadyOpen => {
                EngineError::Unusable(format!("{} is in use by another process", self.0.display()))
            }
            DatabaseError::UpgradeRequired(version) => EngineError::Unusable(format!(
                "{} has redb's file format {version}, which this version does not read",
                self.0.display()
            )),
            other => self.corrupt(other.to_string()),
        }
    }
}

/// An open file. Snapshots keep it open beyond the [`Store`].
struct Inner {
    database: Database,
    disk: Arc<DiskState>,
    place: Place,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // redb commits and trims when it closes a file, which a replaced one is not worth
        self.disk.abandon_if_retired();
    }
}

/// An open redb file and what is known about its content.
pub(crate) struct Store {
    inner: Arc<Inner>,
    live_bytes: AtomicU64,
    repaired: bool,
}

impl Store {
    /// Creates `path`, which must not exist; it is durable but not yet its directory entry.
    pub(crate) fn create(path: &Path, cache_bytes: usize) -> Result<Store, EngineError> {
        let place = Place(Arc::new(path.to_path_buf()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| place.io("create", error))?;
        let store = Store::over(file, path, place, cache_bytes)?;
        let place = &store.inner.place;
        let write = store.inner.database.begin_write().map_err(|error| place.begin(error))?;
        {
            let mut own = write.open_table(OWN).map_err(|error| place.table("create", error))?;
            for (key, value) in [(FORMAT, FORMAT_VERSION), (LIVE_BYTES, 0)] {
                own.insert(key, value).map_err(|error| place.storage("create", error))?;
            }
        }
        write.commit().map_err(|error| place.commit(error))?;
        Ok(store)
    }

    /// Opens `path`, which must exist. Errors call it `name`, which is `path` unless it is about to be
    /// renamed.
    ///
    /// # Errors
    /// `Corrupt` or `Unusable` for a file that is damaged, not ours or in use.
    pub(crate) fn open(path: &Path, name: &Path, cache_bytes: usize) -> Result<Store, EngineError> {
        let place = Place(Arc::new(name.to_path_buf()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| place.io("open", error))?;
        check_magic(&file, &place)?;
        let mut store = Store::over(file, path, place, cache_bytes)?;
        store.live_bytes = AtomicU64::new(store.read_own()?);
        Ok(store)
    }

    fn over(
        file: File,
        path: &Path,
        place: Place,
        cache_bytes: usize,
    ) -> Result<Store, EngineError> {
        let repaired = Arc::new(AtomicBool::new(false));
        let opened = Disk::new(file, path).and_then(|(backend, disk)| {
            let repaired = Arc::clone(&repaired);
            let database = Database::builder()
                .set_cache_size(cache_bytes)
                .set_repair_callback(move |_| repaired.store(true, Ordering::Release))
                .create_with_backend(backend)?;
            Ok((database, disk))
        });
        let (database, disk) = opened.map_err(|error| place.open(error))?;
        Ok(Store {
            inner: Arc::new(Inner { database, disk, place }),
            live_bytes: AtomicU64::new(0),
            repaired: repaired.load(Ordering::Acquire),
        })
    }

    /// Checks that the file is ours and answers the live bytes noted in it.
    fn read_own(&self) -> Result<u64, EngineError> {
        let place = &self.inner.place;
        let read = self.inner.database.begin_read().map_err(|error| place.begin(error))?;
        let own = match read.open_table(OWN) {
            Ok(own) => own,
            Err(TableError::TableDoesNotExist(_)) => {
                return Err(EngineError::Unusable(format!(
                    "{} is a redb file of another program: it has no table {:?}",
                    place.0.display(),
                    OWN.name()
                )));
            }
            Err(error) => return Err(place.table("read", error)),
        };
        let number = |key| {
            let value = own.get(key).map_err(|error| place.storage("read", error))?;
            let missing = || place.corrupt(format!("no {key:?} in table {:?}", OWN.name()));
            Ok::<_, EngineError>(value.ok_or_else(missing)?.value())
        };
        match number(FORMAT)? {
            FORMAT_VERSION => number(LIVE_BYTES),
            other => Err(EngineError::Unusable(format!(
                "{} has format {other}; this version reads {FORMAT_VERSION}",
                place.0.display()
            ))),
        }
    }

    /// Whether opening had to walk the whole file, because the process that had it open last ended
    /// before it had made anything durable.
    pub(crate) fn repaired(&self) -> bool {
        self.repaired
    }

    /// Bytes that the file occupies.
    ///
    /// # Errors
    /// `Io` if it cannot be examined.
    pub(crate) fn size(&self) -> Result<u64, EngineError> {
        self.inner.disk.size().map_err(|error| self.inner.place.io("examine", error))
    }

    pub(crate) fn disk(&self) -> &DiskState {
        &self.inner.disk
    }

    /// Bytes of all rows, each with redb's overhead in a leaf; pages are not full, so it is a lower bound
    /// of what they occupy.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes.load(Ordering::Acquire)
    }

    /// Applies `batch` and commits.
    ///
    /// `Durable` also records which pages are free ("quick repair") and commits in two phases, so that
    /// opening after a crash reads that record instead of the whole file.
    pub(crate) fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let place = &self.inner.place;
        let mut write = self.inner.database.begin_write().map_err(|error| place.begin(error))?;
        match durability {
            Durability::Buffered => write
                .set_durability(redb::Durability::None)
                .expect("only savepoints forbid a change of durability, and there are none"),
            Durability::Durable => write.set_quick_repair(true),
        }
        let change = match apply(&write, batch, place) {
            Ok(change) => change,
            Err(error) => {
                // an abort that fails has met the same broken disk; the first error says more
                let _ = write.abort();
                return Err(error);
            }
        };
        let live_bytes = self.live_bytes().checked_add_signed(change).ok_or_else(|| {
            place.corrupt(format!("{} live bytes changed by {change}", self.live_bytes()))
        })?;
        if change != 0 {
            let mut own = write.open_table(OWN).map_err(|error| place.table("write", error))?;
            own.insert(LIVE_BYTES, live_bytes).map_err(|error| place.storage("write", error))?;
        }
        write.commit().map_err(|error| place.commit(error))?;
        self.live_bytes.store(live_bytes, Ordering::Release);
        Ok(())
    }

    /// The state after the last commit.
    pub(crate) fn snapshot(&self) -> Result<Snapshot, EngineError> {
        let inner = Arc::clone(&self.inner);
        let read = inner.database.begin_read().map_err(|error| inner.place.begin(error))?;
        Ok(Snapshot { tables: Default::default(), read, inner })
    }
}

fn check_magic(file: &File, place: &Place) -> Result<(), EngineError> {
    use std::os::unix::fs::FileExt;

    let mut start = [0; MAGIC.len()];
    match file.read_exact_at(&mut start, 0) {
        Ok(()) if start == MAGIC => Ok(()),
        Ok(()) => Err(EngineError::Unusable(format!("{} is not a redb file", place.0.display()))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(place.corrupt("the file is shorter than its header"))
        }
        Err(error) => Err(place.io("read", error)),
    }
}

/// Applies the operations of each table in their order, and answers by how much the live bytes change.
fn apply(write: &WriteTransaction, batch: &Batch, place: &Place) -> Result<i64, EngineError> {
    let table_of = |op: &Op| match op {
        Op::Put { table, .. } | Op::Delete { table, .. } => *table,
    };
    let mut touched = [false; Table::ALL.len()];
    for op in &batch.ops {
        touched[table_of(op) as usize] = true;
    }
    let mut change = 0;
    let mut ops = Vec::new();
    for table in Table::ALL.into_iter().filter(|table| touched[*table as usize]) {
        ops.clear();
        ops.extend(batch.ops.iter().filter(|op| table_of(op) == table));
        change += apply_to_table(write, table, &ops, place)?;
    }
    Ok(change)
}

fn row_bytes(key_bytes: usize, value_bytes: usize) -> i64 {
    // both are below redb's limit of 3 GiB
    (key_bytes + value_bytes) as i64 + ROW_OVERHEAD as i64
}

fn apply_to_table(
    write: &WriteTransaction,
    table: Table,
    ops: &[&Op],
    place: &Place,
) -> Result<i64, EngineError> {
    let failed = |error| place.storage("write", error);
    let mut rows =
        write.open_table(definition(table)).map_err(|error| place.table("write", error))?;
    let mut change = 0;
    // no key of the table is above it; deletes may leave it too high, which only costs speed
    let mut highest: Option<Bytes> =
        rows.last().map_err(failed)?.map(|(key, _)| Bytes::copy_from_slice(key.value()));
    let mut at = 0;
    while at < ops.len() {
        let run = append_run(&ops[at..], highest.as_ref());
        if run.len() >= APPEND_MIN {
            let end: Bound<&[u8]> = Bound::Unbounded;
            let mut cursor = rows.upper_bound_mut(end).map_err(failed)?;
            for (key, value) in &run {
                cursor.insert_before(&key[..], &value[..]).map_err(|error| match error {
                    CursorError::Storage(error) => failed(error),
                    other => place.corrupt(format!("append to table {table}: {other}")),
                })?;
                change += row_bytes(key.len(), value.len());
            }
            cursor.close().map_err(failed)?;
            highest = run.last().map(|(key, _)| Bytes::clone(key));
            at += run.len();
            continue;
        }
        match ops[at] {
            Op::Put { key, value, .. } => {
                change += row_bytes(key.len(), value.len());
                if let Some(old) = rows.insert(&key[..], &value[..]).map_err(failed)? {
                    change -= row_bytes(key.len(), old.value().len());
                }
                if highest.as_ref().is_none_or(|highest| key > highest) {
                    highest = Some(key.clone());
                }
            }
            Op::Delete { key, .. } => {
                if let Some(old) = rows.remove(&key[..]).map_err(failed)? {
                    change -= row_bytes(key.len(), old.value().len());
                }
            }
        }
        at += 1;
    }
    Ok(change)
}

/// The puts at the start of `ops` whose keys rise from above `highest`.
fn append_run<'ops: 'h, 'h>(
    ops: &[&'ops Op],
    mut highest: Option<&'h Bytes>,
) -> Vec<(&'ops Bytes, &'ops Bytes)> {
    let mut run = Vec::new();
    for op in ops {
        match op {
            Op::Put { key, value, .. } if highest.is_none_or(|highest| key > highest) => {
                run.push((key, value));
                highest = Some(key);
            }
            _ => break,
        }
    }
    run
}

/// A frozen state of a file; shared by all views between two commits.
pub(crate) struct Snapshot {
    // in the order in which they must be dropped
    tables: [OnceLock<Option<ReadOnlyTable<&'static [u8], &'static [u8]>>>; Table::ALL.len()],
    read: ReadTransaction,
    inner: Arc<Inner>,
}

impl Snapshot {
    fn rows(
        &self,
        table: Table,
    ) -> Result<Option<&ReadOnlyTable<&'static [u8], &'static [u8]>>, EngineError> {
        let slot = &self.tables[table as usize];
        if let Some(rows) = slot.get() {
            return Ok(rows.as_ref());
        }
        let rows = match self.read.open_table(definition(table)) {
            Ok(rows) => Some(rows),
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(self.inner.place.table("read", error)),
        };
        Ok(slot.get_or_init(|| rows).as_ref())
    }

    fn failed(&self, error: StorageError) -> EngineError {
        self.inner.place.storage("read", error)
    }
}

impl View for Snapshot {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let Some(rows) = self.rows(table)? else {
            return Ok(None);
        };
        let value = rows.get(key).map_err(|error| self.failed(error))?;
        Ok(value.map(|value| Bytes::copy_from_slice(value.value())))
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let Some(rows) = self.rows(table)?.filter(|_| !is_empty_range(from, to)) else {
            return Ok(());
        };
        for row in rows.range::<&[u8]>((from, to)).map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            if visit(key.value(), value.value()).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let Some(rows) = self.rows(table)? else {
            return Ok(None);
        };
        let last = rows.last().map_err(|error| self.failed(error))?;
        let copy = Bytes::copy_from_slice;
        Ok(last.map(|(key, value)| (copy(key.value()), copy(value.value()))))
    }
}
