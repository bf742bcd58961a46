//! Giving space back while commits go on.
//!
//! A second file is filled slice by slice, in the order of [`ORDER`] and of keys, each slice from a view of
//! its own: an old view would keep pages from being reused. Commits note the keys that they change meanwhile.
//! Before each slice, the noted keys that the copy has passed are read again from the slice's view and
//! written to the new file; the others the copy will meet. So after a slice:
//!
//! > up to the position, the new file equals the slice's view.
//!
//! At the end commits wait for one last small slice and for the new file to take the old one's name. Up to
//! that rename a crash leaves the old file, which no step has changed; the new one is complete and synced
//! before.

use std::io;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use engine_api::{Batch, Durability, EngineError, Op, Reclaimed, Table, View};

use crate::store::{Committer, Snapshot};
use crate::tree::Root;
use crate::{Bbolt, DATA, NEW, Writer, failed, remove_if_there, sync_dir};

/// The order of copying. The largest table comes last: it grows at its end, which the copy meets without
/// a note.
const ORDER: [Table; Table::ALL.len()] = [
    Table::Alarm,
    Table::Auth,
    Table::AuthRoles,
    Table::AuthUsers,
    Table::Cluster,
    Table::Lease,
    Table::Members,
    Table::MembersRemoved,
    Table::Meta,
    Table::Key,
];

/// Bytes of rows copied from one view: they are in memory as a batch.
const SLICE_BYTES: u64 = 4 << 20;

/// A row's cost within a slice beyond its bytes: the operation that carries it.
const SLICE_ROW_BYTES: u64 = 100;

/// Bytes copied between two syncs, so that none of them keeps the disk busy for long: the WAL is synced on
/// the same disk.
const SYNC_BYTES: u64 = 32 << 20;

/// A round below this, in bytes, shows that the copy has caught up with the commits.
const CAUGHT_UP_BYTES: u64 = 256 << 10;

/// Rounds to catch up before the switch, synced ones and then others; each is shorter than the one before
/// unless commits are faster than the copy, which then gives up.
const CATCH_UPS_MAX: usize = 8;

/// Memory for the notes of changed keys. Beyond it commits have outrun the copy, which then gives up.
const TOUCHED_BYTES_MAX: usize = 64 << 20;

/// Keys that commits have changed since reclaim last looked.
#[derive(Default)]
pub(crate) struct Touched {
    keys: Vec<(Table, Bytes)>,
    bytes: usize,
    overflowed: bool,
}

impl Touched {
    pub(crate) fn note(&mut self, batch: &Batch) {
        if self.overflowed {
            return;
        }
        for op in &batch.ops {
            let (Op::Put { table, key, .. } | Op::Delete { table, key }) = op;
            self.bytes += key.len() + size_of::<(Table, Bytes)>();
            // a copy: the key may share its buffer with a whole request
            self.keys.push((*table, Bytes::copy_from_slice(key)));
        }
        if self.bytes > TOUCHED_BYTES_MAX {
            *self = Touched { overflowed: true, ..Touched::default() };
        }
    }
}

/// How far the copy has come: all of the tables before `ORDER[table]`, and of that one the keys up to
/// `key`.
#[derive(Default)]
struct Position {
    table: usize,
    key: Option<Bytes>,
}

impl Position {
    fn covers(&self, table: Table, key: &[u8]) -> bool {
        let table = ORDER.iter().position(|t| *t == table).expect("the order holds every table");
        table < self.table
            || (table == self.table && self.key.as_ref().is_some_and(|last| key <= &last[..]))
    }
}

/// A view, and the keys changed between the view before and this one.
struct Moment {
    view: Arc<Snapshot>,
    touched: Vec<(Table, Bytes)>,
}

/// What a slice did.
struct Slice {
    bytes: u64,
    at_end: bool,
}

/// Adds one slice to `target`: what has changed, and at most [`SLICE_BYTES`] of further rows. In memory is
/// no more than twice that, and one row.
fn copy_slice(
    target: &mut Committer,
    position: &mut Position,
    moment: Moment,
    durability: Durability,
) -> Result<Slice, EngineError> {
    let Moment { view, mut touched } = moment;
    let mut batch = Batch::default();
    let (mut bytes, mut committed) = (0, 0);
    touched.retain(|(table, key)| position.covers(*table, key));
    touched.sort();
    touched.dedup();
    for (table, key) in touched {
        bytes += key.len() as u64 + SLICE_ROW_BYTES;
        match view.get(table, &key)? {
            Some(value) => {
                bytes += value.len() as u64;
                batch.put(table, key, value);
            }
            None => batch.delete(table, key),
        }
        // half a slice is seen by nobody
        if bytes - committed >= SLICE_BYTES {
            target.commit(&std::mem::take(&mut batch), Durability::Buffered)?;
            committed = bytes;
        }
    }
    let mut copied = 0;
    let at_end = loop {
        let table = ORDER[position.table];
        let from = match &position.key {
            Some(key) => Bound::Excluded(&key[..]),
            None => Bound::Unbounded,
        };
        let mut last = None;
        let mut full = false;
        view.scan(table, from, Bound::Unbounded, &mut |key, value| {
            copied += (key.len() + value.len()) as u64 + SLICE_ROW_BYTES;
            let key = Bytes::copy_from_slice(key);
            last = Some(key.clone());
            batch.put(table, key, Bytes::copy_from_slice(value));
            full = copied >= SLICE_BYTES;
            if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if last.is_some() {
            position.key = last;
        }
        if full {
            break false;
        }
        if position.table + 1 == ORDER.len() {
            break true;
        }
        *position = Position { table: position.table + 1, key: None };
    };
    target.commit(&batch, durability)?;
    Ok(Slice { bytes: bytes + copied, at_end })
}

impl Bbolt {
    /// Copies everything into a new file, which then takes the old one's place.
    pub(crate) fn rebuild(&self) -> Result<Reclaimed, EngineError> {
        let _turn = self.reclaiming.lock();
        self.cancelled.store(false, Ordering::Release);
        self.check_poisoned()?;
        self.refuse_foreign_buckets()?;
        let before = self.snapshot().store.size();
        let new = self.dir.join(NEW);
        let result = self.copy_and_switch();
        self.writer.lock().touched = None;
        if result.is_err() {
            // what cannot be removed now is removed on opening
            let _ = remove_if_there(&new);
        }
        Ok(Reclaimed { before, after: result? })
    }

    /// A bucket that the engine does not know would be lost in the copy.
    fn refuse_foreign_buckets(&self) -> Result<(), EngineError> {
        let newest = self.snapshot();
        let mut foreign = None;
        let root = Root::Page(newest.version.root);
        newest.tree().scan(&root, Bound::Unbounded, Bound::Unbounded, &mut |page, index| {
            let name = page.key(index);
            if Table::ALL.iter().any(|table| table.name().as_bytes() == name) {
                return Ok(ControlFlow::Continue(()));
            }
            foreign = Some(name.escape_ascii().to_string());
            Ok(ControlFlow::Break(()))
        })?;
        match foreign {
            Some(name) => Err(EngineError::Unusable(format!(
                "{} has a bucket {name:?}, which is not etcd's and would be lost",
                self.dir.join(DATA).display()
            ))),
            None => Ok(()),
        }
    }

    /// Answers the size of the new file.
    fn copy_and_switch(&self) -> Result<u64, EngineError> {
        let (data, new) = (self.dir.join(DATA), self.dir.join(NEW));
        remove_if_there(&new)?;
        let disk = self.files.open(&new, true).map_err(|error| failed("create", &new, error))?;
        let disk = disk.ok_or_else(|| {
            EngineError::Unusable(format!("{} is in use by another process", new.display()))
        })?;
        let mut target = Committer::create(disk, &new, self.settings)?;
        self.writer.lock().touched = Some(Touched::default());
        let mut position = Position::default();
        // a copy that takes more than this runs behind commits that are faster
        let copied_max =
            self.snapshot().store.size_in_use().saturating_mul(4).saturating_add(1 << 30);
        let (mut copied, mut unsynced) = (0, 0);
        loop {
            let moment = self.moment(&mut self.writer.lock())?;
            let sync = unsynced >= SYNC_BYTES;
            let durability = if sync { Durability::Durable } else { Durability::Buffered };
            let slice = copy_slice(&mut target, &mut position, moment, durability)?;
            unsynced = if sync { 0 } else { unsynced + slice.bytes };
            copied += slice.bytes;
            if slice.at_end {
                break;
            }
            if copied > copied_max {
                return Err(self.outrun());
            }
            self.check_cancelled()?;
        }
        // all that can be done while commits go on, so that little is left for the switch
        target.flush()?;
        target.rename(&data);
        let mut caught_up = false;
        for durability in [Durability::Durable, Durability::Buffered] {
            caught_up = false;
            for _ in 0..CATCH_UPS_MAX {
                let bytes = self.catch_up(&mut target, &mut position, copied_max, durability)?;
                caught_up = bytes < CAUGHT_UP_BYTES;
                if caught_up {
                    break;
                }
            }
        }
        if !caught_up {
            return Err(self.outrun());
        }
        self.switch(target, position)
    }

    /// Copies what has been committed since the last slice, slice by slice up to the end; answers the bytes.
    ///
    /// # Errors
    /// That of `outrun` when the end is not reached within `bytes_max`.
    fn catch_up(
        &self,
        target: &mut Committer,
        position: &mut Position,
        bytes_max: u64,
        durability: Durability,
    ) -> Result<u64, EngineError> {
        let mut bytes = 0;
        loop {
            self.check_cancelled()?;
            let moment = self.moment(&mut self.writer.lock())?;
            let slice = copy_slice(target, position, moment, durability)?;
            bytes += slice.bytes;
            if slice.at_end {
                return Ok(bytes);
            }
            if bytes > bytes_max {
                return Err(self.outrun());
            }
        }
    }

    fn check_cancelled(&self) -> Result<(), EngineError> {
        match self.cancelled.load(Ordering::Acquire) {
            true => Err(EngineError::Cancelled),
            false => Ok(()),
        }
    }

    /// Everything committed up to now, and what has changed since the last call.
    fn moment(&self, writer: &mut Writer) -> Result<Moment, EngineError> {
        self.check_poisoned()?;
        let touched = writer.touched.as_mut().expect("changes are noted while reclaim runs");
        if touched.overflowed {
            return Err(self.outrun());
        }
        let touched = std::mem::take(touched).keys;
        Ok(Moment { view: self.snapshot(), touched })
    }

    fn outrun(&self) -> EngineError {
        let source =
            io::Error::other("commits are faster than the copy; try again at a calmer time");
        failed("reclaim space in", &self.dir.join(DATA), source)
    }

    /// Completes the new file, puts it in the old one's place and answers its size. Commits wait: for the
    /// rows of the commits since the last slice, two syncs of the file and one of the directory.
    fn switch(&self, mut target: Committer, mut position: Position) -> Result<u64, EngineError> {
        let mut writer = self.writer.lock();
        loop {
            let moment = self.moment(&mut writer)?;
            if copy_slice(&mut target, &mut position, moment, Durability::Durable)?.at_end {
                break;
            }
        }
        let size = target.store().size();
        let (data, new) = (self.dir.join(DATA), self.dir.join(NEW));
        self.files.rename(&new, &data).map_err(|error| failed("rename", &new, error))?;
        // the old name may come back in a crash until this is done: no commit may succeed before
        sync_dir(&*self.files, &self.dir).map_err(|error| self.poison(error))?;
        let newest = Arc::new(target.snapshot());
        let replaced = std::mem::replace(&mut *self.newest.write(), newest);
        let old = std::mem::replace(&mut writer.committer, target);
        drop(writer);
        // closes the old file, unless a view has it open
        drop((replaced, old));
        Ok(size)
    }
}
