//! Giving space back while commits go on.
//!
//! A second data file is filled slice by slice, in the order of [`ORDER`] and of keys, each slice from a view
//! of its own, so that no view stays open for long: LMDB's own copy would hold one from start to end, and
//! the old file would grow meanwhile. What commits change is noted as keys only: before each slice those at or
//! below the position reached are read again from the slice's view and written to the new file, and those
//! above it are dropped, since the copy will meet them. So after a slice:
//!
//! > up to the position, the new file equals the slice's view.
//!
//! When the position has reached the end, commits wait for one last small slice, a sync, and the head that
//! names the new file. Up to that a crash leaves the old file, which no step has changed.

use std::io;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use engine_api::{Batch, EngineError, Op, Reclaimed, Table, View};

use crate::head::HEAD_BYTES;
use crate::store::{self, Moment, Store};
use crate::{HEAD, Lmdb, Writer, data_name, failed, sync_dir};

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

/// Bytes of rows copied from one view, beside those that have changed: it bounds memory and the age of a view (tens of milliseconds).
const SLICE_BYTES: u64 = 4 << 20;

/// A row's cost within a slice beyond its bytes: the operation that carries it.
const SLICE_ROW_BYTES: u64 = 100;

/// Bytes copied between two syncs, so that none of them keeps the disk busy for long: the WAL is synced on
/// the same disk.
const SYNC_BYTES: u64 = 32 << 20;

/// A round below this, in bytes, shows that the copy has caught up with the commits.
const CAUGHT_UP_BYTES: u64 = 256 << 10;

/// Rounds to catch up before the switch, with a sync each and then without; each is shorter than the one
/// before unless commits are faster than the copy, which then gives up.
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
struct Changed {
    view: Moment,
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
    target: &Store,
    position: &mut Position,
    changed: Changed,
) -> Result<Slice, EngineError> {
    let Changed { view, mut touched } = changed;
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
            target.commit(&std::mem::take(&mut batch))?;
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
    drop(view);
    if !batch.is_empty() {
        target.commit(&batch)?;
    }
    Ok(Slice { bytes: bytes + copied, at_end })
}

impl Lmdb {
    /// Copies everything into a new file, which then takes the old one's place.
    pub(crate) fn rebuild(&self) -> Result<Reclaimed, EngineError> {
        let _turn = self.reclaiming.lock();
        self.cancelled.store(false, Ordering::Release);
        self.check_poisoned()?;
        let before = self.store().file_bytes()? + HEAD_BYTES;
        let generation = self.writer.lock().generation + 1;
        let new = self.dir.join(data_name(generation));
        // of an attempt that could not remove it
        store::remove(&new)?;
        let result = self.copy_and_switch(generation);
        self.writer.lock().touched = None;
        // of a stopped engine either file may hold
        if result.is_err() && self.poisoned.get().is_none() {
            // what cannot be removed now is removed on opening
            let _ = store::remove(&new);
        }
        Ok(Reclaimed { before, after: result? })
    }

    /// Answers the size afterwards.
    fn copy_and_switch(&self, generation: u64) -> Result<u64, EngineError> {
        let target = Store::create(&self.dir.join(data_name(generation)), self.settings)?;
        self.writer.lock().touched = Some(Touched::default());
        let mut position = Position::default();
        // a copy that takes more than this runs behind commits that are faster
        let copied_max = self.store().file_bytes()?.saturating_mul(4).saturating_add(1 << 30);
        let (mut copied, mut unsynced) = (0, 0);
        loop {
            let slice = copy_slice(&target, &mut position, self.changed()?)?;
            unsynced += slice.bytes;
            if unsynced >= SYNC_BYTES {
                target.sync()?;
                unsynced = 0;
            }
            copied += slice.bytes;
            if slice.at_end {
                break;
            }
            if copied > copied_max {
                return Err(self.outrun());
            }
            self.check_cancelled()?;
        }
        // all that can be done while commits go on, so that little is left for the switch; those during a
        // sync may be many, so the last ones are caught up with without
        let mut caught_up = false;
        for sync in [true, false] {
            caught_up = false;
            for _ in 0..CATCH_UPS_MAX {
                if sync {
                    target.sync()?;
                }
                caught_up = self.catch_up(&target, &mut position, copied_max)? < CAUGHT_UP_BYTES;
                if caught_up {
                    break;
                }
            }
        }
        if !caught_up {
            return Err(self.outrun());
        }
        self.switch(target, generation, position)
    }

    /// Copies what has been committed since the last slice, slice by slice up to the end; answers the bytes.
    ///
    /// # Errors
    /// As after [`outrun`](Lmdb::outrun) when the end is not reached within `bytes_max`.
    fn catch_up(
        &self,
        target: &Store,
        position: &mut Position,
        bytes_max: u64,
    ) -> Result<u64, EngineError> {
        let mut bytes = 0;
        loop {
            self.check_cancelled()?;
            let slice = copy_slice(target, position, self.changed()?)?;
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

    fn changed(&self) -> Result<Changed, EngineError> {
        self.changed_by(&mut self.writer.lock())
    }

    /// Everything committed up to now, and what has changed since the last call.
    fn changed_by(&self, writer: &mut Writer) -> Result<Changed, EngineError> {
        self.check_poisoned()?;
        let touched = writer.touched.as_mut().expect("changes are noted while reclaim runs");
        if touched.overflowed {
            return Err(self.outrun());
        }
        let touched = std::mem::take(touched).keys;
        Ok(Changed { view: self.store().view()?, touched })
    }

    fn outrun(&self) -> EngineError {
        let source =
            io::Error::other("commits are faster than the copy; try again at a calmer time");
        failed("reclaim space in", self.store().path(), source)
    }

    /// Completes the new file, puts it in the old one's place and answers the size. Commits wait: for the few
    /// rows of the commits since the last slice, and for three syncs.
    fn switch(
        &self,
        target: Store,
        generation: u64,
        mut position: Position,
    ) -> Result<u64, EngineError> {
        let mut writer = self.writer.lock();
        while !copy_slice(&target, &mut position, self.changed_by(&mut writer)?)?.at_end {}
        target.sync()?;
        // its name must be on the disk before the head has it
        sync_dir(&self.dir)?;
        let point = target.point(generation)?;
        let pin = target.read()?;
        // after a failure either file may hold
        writer.head.write(&self.dir.join(HEAD), &point).map_err(|error| self.poison(error))?;
        writer.generation = generation;
        // all that was only buffered is in the new file
        writer.dirty = false;
        writer.buffered = 0;
        writer.durable_bytes = target.used_bytes();
        let replaced = std::mem::replace(&mut *self.store.write(), Arc::new(target));
        let unpinned = std::mem::replace(&mut writer.pin, pin);
        drop(writer);
        drop(unpinned);
        // views keep it open; what cannot be removed now is removed on opening
        let _ = store::remove(replaced.path());
        Ok(point.file_bytes + HEAD_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use engine_api::{Durability, Engine, Options};

    use super::*;
    use crate::ABOUT;

    const ROWS: u8 = 20;

    fn put_rows(engine: &Lmdb, byte: u8) {
        for n in 0..ROWS {
            let mut batch = Batch::default();
            batch.put(Table::Lease, vec![n], vec![byte; 1 << 20]);
            engine.commit(&batch, Durability::Buffered).unwrap();
        }
    }

    #[test]
    fn many_changes_are_copied_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Lmdb::open(dir.path(), &Options::defaults(&ABOUT)).unwrap();
        put_rows(&engine, 1);
        let target = Store::create(&dir.path().join("target.mdb"), engine.settings).unwrap();
        engine.writer.lock().touched = Some(Touched::default());
        let mut position = Position::default();
        let error = engine.catch_up(&target, &mut position, SLICE_BYTES).unwrap_err();
        assert!(error.to_string().contains("commits are faster than the copy"), "{error}");
        let rest = engine.catch_up(&target, &mut position, u64::MAX).unwrap();
        assert!(rest > 10 << 20, "{rest} bytes");
        put_rows(&engine, 2);
        let transaction = || target.point(1).unwrap().meta.transaction();
        let before = transaction();
        assert!(copy_slice(&target, &mut position, engine.changed().unwrap()).unwrap().at_end);
        let commits = transaction() - before;
        assert!(commits >= 5, "{commits} commits for 20 MiB");
        let view = Arc::new(target).view().unwrap();
        for n in 0..ROWS {
            assert!(view.get(Table::Lease, &[n]).unwrap().unwrap() == vec![2; 1 << 20], "row {n}");
        }
    }
}
