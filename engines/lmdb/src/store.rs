//! One LMDB data file: the tables, commits into them and views of them.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::{Bound, ControlFlow};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use bytes::Bytes;
use engine_api::{Batch, EngineError, Op, Table, View, is_empty_range};
use heed::{
    CommitOrAbort, Database, Env, EnvFlags, EnvOpenOptions, MdbError, PutFlags, RoTxn, RwTxn,
    WithoutTls,
};

use crate::head::{Meta, Point};
use crate::{KEY_BYTES_MAX, MAP_BYTES, corrupt, failed, remove_if_there};

type Rows = Database<'static, heed::types::Bytes, heed::types::Bytes>;

/// A read transaction that keeps its file open.
pub(crate) type Read = RoTxn<'static, WithoutTls>;

/// Read transactions that may be open at once. Each slot is 64 bytes of the lock file; a view takes the
/// first free one.
pub(crate) const READERS_MAX: u32 = 8192;

/// What LMDB wants of a lock file: a slot for each reader, and a header of two slots' length before them. Where
/// its mutexes take more it lengthens the file.
const LOCK_BYTES: usize = (READERS_MAX as usize + 2) * 64;

/// LMDB's page header: number, padding, flags, and two that a meta page leaves at zero.
const PAGE_HEADER: usize = 16;
/// Where the header has the flags, and the flag of a meta page.
const FLAGS: std::ops::Range<usize> = 10..12;
const IS_META: u16 = 0x08;

/// Metas are the first two pages, written in turn.
const METAS: u64 = 2;

/// LMDB notes the length of a value in 32 bits.
const VALUE_BYTES_MAX: usize = u32::MAX as usize;

/// What every commit writes: the paths to the leaves of the one or two tables that it changes, the tables'
/// roots, and the list of free pages.
const COMMIT_BYTES: u64 = 8 * 4096;

/// What a change amid a table writes beyond its own bytes, if neighbours share its leaf with it as when a
/// compaction deletes every other row.
const CHANGE_BYTES: u64 = 512;

/// How a data file is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Address space to reserve, which the file cannot outgrow.
    pub(crate) map_bytes: usize,
    pub(crate) read_ahead: bool,
}

/// An open data file.
pub(crate) struct Store {
    env: Env<WithoutTls>,
    /// By `Table as usize`.
    tables: [Rows; Table::ALL.len()],
    path: PathBuf,
    file: File,
    /// Commits that have started to write their meta: see [`Store::read`].
    begun: AtomicU64,
}

/// The file that LMDB keeps the readers in.
fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-lock");
    name.into()
}

/// Removes a data file and what belongs to it. Who has it open keeps it until it is closed.
pub(crate) fn remove(path: &Path) -> Result<(), EngineError> {
    remove_if_there(path)?;
    remove_if_there(&lock_path(path))
}

/// Makes the lock file anew, with all of its blocks. LMDB would make one of a single hole and write to it
/// through a map, where a full disk is no error but ends the process (SIGBUS): as it opens the file, and
/// whenever the readers reach another page of it. Zeros are to LMDB what a hole is: it finds nobody else at
/// the file and begins it.
fn make_lock_file(path: &Path) -> Result<(), EngineError> {
    let path = lock_path(path);
    // the directory is ours alone, so readers noted in it are of a process that was killed
    remove_if_there(&path)?;
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(&vec![0; LOCK_BYTES]));
    written.map_err(|error| {
        // the first error counts; what is left is made anew on opening
        let _ = remove_if_there(&path);
        failed("create", &path, error)
    })
}

fn read_meta(file: &File, path: &Path, at: u64) -> Result<Meta, EngineError> {
    let mut page = [0; PAGE_HEADER + Meta::LEN];
    match file.read_exact_at(&mut page, at) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(corrupt(path, "the file is shorter than its meta pages"));
        }
        Err(error) => return Err(failed("read", path, error)),
    }
    let flags = u16::from_ne_bytes(page[FLAGS].try_into().expect("2 bytes"));
    let meta = Meta(page[PAGE_HEADER..].try_into().expect("the length of a meta"));
    match meta.fault() {
        None if flags == IS_META => Ok(meta),
        None => Err(corrupt(path, format!("byte {at} begins no meta page"))),
        Some(fault) => Err(corrupt(path, format!("meta page at byte {at}: {fault}"))),
    }
}

/// The number of the newest transaction that a data file names, durable or not.
pub(crate) fn newest_transaction(path: &Path) -> Result<u64, EngineError> {
    let file = File::open(path).map_err(|error| failed("open", path, error))?;
    let first = read_meta(&file, path, 0)?;
    let second = read_meta(&file, path, first.page_bytes().into())?;
    Ok(first.transaction().max(second.transaction()))
}

/// Puts the file back to its durable state: no page of it has been written over since.
fn restore(path: &Path, point: &Point) -> Result<(), EngineError> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(corrupt(path, "the data file is missing"));
        }
        Err(error) => return Err(failed("open", path, error)),
    };
    let bytes = file.metadata().map_err(|error| failed("examine", path, error))?.len();
    if bytes < point.file_bytes {
        return Err(corrupt(
            path,
            format!("the file has {bytes} bytes; {} of them were durable", point.file_bytes),
        ));
    }
    let page_bytes = u64::from(point.meta.page_bytes());
    let mut newest = 0;
    for number in 0..METAS {
        let meta = read_meta(&file, path, number * page_bytes)?;
        newest = newest.max(meta.transaction());
    }
    if newest < point.meta.transaction() {
        return Err(corrupt(
            path,
            format!(
                "the file ends with transaction {newest}; {} was durable",
                point.meta.transaction()
            ),
        ));
    }
    for number in 0..METAS {
        let mut page = [0; PAGE_HEADER + Meta::LEN];
        page[..8].copy_from_slice(&number.to_ne_bytes());
        page[FLAGS].copy_from_slice(&IS_META.to_ne_bytes());
        page[PAGE_HEADER..].copy_from_slice(&point.meta.0);
        file.write_all_at(&page, number * page_bytes)
            .map_err(|error| failed("write", path, error))?;
    }
    Ok(())
}

impl Store {
    /// Creates `path`, which must not exist. Nothing of it is durable before [`Store::sync`].
    pub(crate) fn create(path: &Path, settings: Settings) -> Result<Store, EngineError> {
        Store::over(path, settings)
    }

    /// Opens `path` in the state of `point`.
    ///
    /// # Errors
    /// `Corrupt` if the file cannot be in that state.
    pub(crate) fn open(
        path: &Path,
        settings: Settings,
        point: &Point,
    ) -> Result<Store, EngineError> {
        restore(path, point)?;
        Store::over(path, settings)
    }

    fn over(path: &Path, settings: Settings) -> Result<Store, EngineError> {
        make_lock_file(path)?;
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options
            .map_size(settings.map_bytes)
            .max_dbs(Table::ALL.len() as u32)
            .max_readers(READERS_MAX);
        // what is durable is our own affair: see the crate's documentation
        let mut flags = EnvFlags::NO_SUB_DIR | EnvFlags::NO_SYNC;
        if !settings.read_ahead {
            flags |= EnvFlags::NO_READ_AHEAD;
        }
        // SAFETY: nothing else changes or truncates the file, as the caller holds the lock of the directory;
        // NO_SYNC risks that a crash leaves a meta whose pages are missing, and `restore` replaces the metas
        // before a file is opened after one.
        let opened = unsafe { options.flags(flags).open(path) };
        let env = opened.map_err(|error| match error {
            heed::Error::Io(error) if error.kind() == io::ErrorKind::OutOfMemory => {
                EngineError::Unusable(format!(
                    "cannot reserve {} bytes of address space for {}: raise the process's limit (ulimit -v) or \
                     lower the option {MAP_BYTES}",
                    settings.map_bytes,
                    path.display()
                ))
            }
            other => translate("open", path, other),
        })?;
        if env.max_key_size() < KEY_BYTES_MAX {
            return Err(EngineError::Unusable(format!(
                "{} has pages for keys of {} bytes; {KEY_BYTES_MAX} are needed",
                path.display(),
                env.max_key_size()
            )));
        }
        let file = env.try_clone_inner_file().map_err(|error| translate("open", path, error))?;
        let tables = open_tables(&env).map_err(|error| translate("open", path, error))?;
        Ok(Store { env, tables, path: path.to_path_buf(), file, begun: AtomicU64::new(0) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, doing: &str, error: heed::Error) -> EngineError {
        translate(doing, &self.path, error)
    }

    fn rows(&self, table: Table) -> &Rows {
        &self.tables[table as usize]
    }

    /// A transaction over the last commit.
    pub(crate) fn read(&self) -> Result<Read, EngineError> {
        loop {
            let before = self.begun.load(Ordering::Acquire);
            let read = match self.env.clone().static_read_txn() {
                Err(heed::Error::Mdb(MdbError::ReadersFull)) => {
                    return Err(failed(
                        "read",
                        &self.path,
                        io::Error::other(format!("{READERS_MAX} views are open already")),
                    ));
                }
                read => read.map_err(|error| self.failed("read", error))?,
            };
            // LMDB first chooses one of the two metas and then copies it. Were two commits to pass in
            // between, the second would write over it; they are fast enough for that as they sync nothing.
            fence(Ordering::Acquire);
            if self.begun.load(Ordering::Relaxed) == before {
                return Ok(read);
            }
        }
    }

    /// Refuses what the file cannot hold, before anything is changed.
    pub(crate) fn check(batch: &Batch) -> Result<(), EngineError> {
        batch.refuse_empty_keys()?;
        for (at, op) in batch.ops.iter().enumerate() {
            // a key that cannot be there is deleted by doing nothing
            let Op::Put { table, key, value } = op else { continue };
            for (what, len, max) in
                [("key", key.len(), KEY_BYTES_MAX), ("value", value.len(), VALUE_BYTES_MAX)]
            {
                if len > max {
                    return Err(EngineError::Unusable(format!(
                        "operation {at} of the batch has a {what} of {len} bytes for table {table}; engine lmdb \
                         holds at most {max}"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Applies `batch`, which has been checked, and makes it visible. Answers an estimate of the bytes of
    /// pages that it has written.
    pub(crate) fn commit(&self, batch: &Batch) -> Result<u64, EngineError> {
        let failed = |error| self.failed("write", error);
        let mut write = self.env.write_txn().map_err(failed)?;
        let written = self.apply(&mut write, batch).map_err(failed)?;
        self.begun.fetch_add(1, Ordering::AcqRel);
        write.commit().map_err(failed)?;
        Ok(written)
    }

    fn apply<'b>(&self, write: &mut RwTxn<'_>, batch: &'b Batch) -> heed::Result<u64> {
        let mut written = COMMIT_BYTES;
        // the greatest key of a table that was put to; deletes may leave it too high, which only costs speed
        let mut highest: [Option<Cow<'b, [u8]>>; Table::ALL.len()] = Default::default();
        for op in &batch.ops {
            match op {
                Op::Put { table, key, value } => {
                    written += op.len() as u64;
                    let rows = self.rows(*table);
                    let highest = &mut highest[*table as usize];
                    if highest.is_none() {
                        // an empty one is below every key
                        let last = rows.last(write)?.map_or_else(Vec::new, |(key, _)| key.to_vec());
                        *highest = Some(last.into());
                    }
                    if highest.as_deref().is_none_or(|highest| key[..] > *highest) {
                        *highest = Some(Cow::Borrowed(key));
                        // fills pages where an ordinary put would leave them half full
                        rows.put_with_flags(write, PutFlags::APPEND, key, value)?;
                    } else {
                        written += CHANGE_BYTES;
                        rows.put(write, key, value)?;
                    }
                }
                Op::Delete { table, key } => {
                    if key.len() <= KEY_BYTES_MAX {
                        written += CHANGE_BYTES;
                        self.rows(*table).delete(write, key)?;
                    }
                }
            }
        }
        Ok(written)
    }

    /// Brings all commits to the disk. They hold after a crash when their [`Store::point`] is in the head.
    pub(crate) fn sync(&self) -> Result<(), EngineError> {
        self.env.force_sync().map_err(|error| self.failed("sync", error))
    }

    /// The state after the last commit. The caller keeps other commits out.
    pub(crate) fn point(&self, generation: u64) -> Result<Point, EngineError> {
        let transaction = self.env.info().last_txn_id as u64;
        let page_bytes = u64::from(self.env.unnamed_database_stat().page_size);
        // which of the two pages a transaction writes follows from its number
        let meta = read_meta(&self.file, &self.path, transaction % METAS * page_bytes)?;
        if meta.transaction() != transaction {
            return Err(corrupt(
                &self.path,
                format!("the meta page of transaction {transaction} has {}", meta.transaction()),
            ));
        }
        Ok(Point { generation, file_bytes: self.file_bytes()?, meta })
    }

    /// Bytes up to the last page in use or free. The file is shorter if it ends with free pages that were
    /// never written.
    pub(crate) fn used_bytes(&self) -> u64 {
        let page_bytes = u64::from(self.env.unnamed_database_stat().page_size);
        (self.env.info().last_page_number as u64 + 1) * page_bytes
    }

    /// The length of the file.
    pub(crate) fn file_bytes(&self) -> Result<u64, EngineError> {
        let metadata =
            self.file.metadata().map_err(|error| failed("examine", &self.path, error))?;
        Ok(metadata.len())
    }

    /// Bytes of the pages that hold rows or lead to them.
    pub(crate) fn bytes_in_use(&self) -> Result<u64, EngineError> {
        let read = self.read()?;
        let root = self.env.unnamed_database_stat();
        let mut pages = METAS + (root.branch_pages + root.leaf_pages) as u64;
        for rows in &self.tables {
            let stat = rows.stat(&read).map_err(|error| self.failed("read", error))?;
            pages += (stat.branch_pages + stat.leaf_pages + stat.overflow_pages) as u64;
        }
        Ok(pages * u64::from(root.page_size))
    }

    pub(crate) fn view(self: Arc<Self>) -> Result<Moment, EngineError> {
        Ok(Moment { read: self.read()?, store: self })
    }
}

/// Opens all tables and makes those that are missing.
fn open_tables(env: &Env<WithoutTls>) -> heed::Result<[Rows; Table::ALL.len()]> {
    let opened = env.create_databases_and_commit(env.write_txn()?, |opener, write| {
        let mut tables = [const { None }; Table::ALL.len()];
        for table in Table::ALL {
            tables[table as usize] = Some(opener.create_database(write, Some(table.name()))?);
        }
        let tables = tables.map(|rows| rows.expect("every table was opened"));
        Ok::<_, heed::Error>(CommitOrAbort::<_, ()>::Commit(tables))
    })?;
    match opened {
        CommitOrAbort::Commit(tables) => Ok(tables),
        CommitOrAbort::Abort(()) => unreachable!("the function above commits"),
    }
}

/// What LMDB's errors mean to us.
fn translate(doing: &str, path: &Path, error: heed::Error) -> EngineError {
    match error {
        heed::Error::Io(error) => failed(doing, path, error),
        heed::Error::Mdb(MdbError::MapFull) => failed(
            doing,
            path,
            io::Error::new(
                io::ErrorKind::StorageFull,
                format!("the file has reached the size of option {MAP_BYTES}"),
            ),
        ),
        heed::Error::Mdb(
            error @ (MdbError::PageNotFound
            | MdbError::Corrupted
            | MdbError::VersionMismatch
            | MdbError::Invalid
            | MdbError::CursorFull
            | MdbError::PageFull
            | MdbError::Incompatible
            | MdbError::Problem),
        ) => corrupt(path, error.to_string()),
        heed::Error::Mdb(error @ (MdbError::Panic | MdbError::BadTxn)) => {
            EngineError::Poisoned(format!("{doing} {}: {error}", path.display()))
        }
        other => failed(doing, path, io::Error::other(other.to_string())),
    }
}

/// A frozen state of a file.
pub(crate) struct Moment {
    // before the store: it belongs to it
    read: Read,
    store: Arc<Store>,
}

impl Moment {
    fn failed(&self, error: heed::Error) -> EngineError {
        self.store.failed("read", error)
    }
}

impl View for Moment {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if key.is_empty() {
            // LMDB refuses to look for it
            return Ok(None);
        }
        let value = self.store.rows(table).get(&self.read, key);
        Ok(value.map_err(|error| self.failed(error))?.map(Bytes::copy_from_slice))
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        if is_empty_range(from, to) {
            return Ok(());
        }
        // no key is empty, and LMDB refuses to look for one
        let from = match from {
            Bound::Included([]) | Bound::Excluded([]) => Bound::Unbounded,
            from => from,
        };
        let rows = self.store.rows(table).range(&self.read, &(from, to));
        for row in rows.map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            if visit(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let last = self.store.rows(table).last(&self.read).map_err(|error| self.failed(error))?;
        Ok(last.map(|(key, value)| (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))))
    }
}

/// The data files in `dir`, by generation.
pub(crate) fn data_files(dir: &Path) -> Result<Vec<u64>, EngineError> {
    let listed = || -> io::Result<Vec<u64>> {
        let mut generations = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let generation: Option<u64> = name
                .to_str()
                .and_then(|name| name.strip_prefix("data-")?.strip_suffix(".mdb")?.parse().ok());
            generations.extend(generation);
        }
        Ok(generations)
    };
    listed().map_err(|error| failed("list", dir, error))
}
