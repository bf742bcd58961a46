//! Giving space back while commits go on.
//!
//! A second file is filled slice by slice, in the order of [`ORDER`] and of keys, each slice from a view
//! of its own, so that no view stays open for long. What commits change meanwhile is noted as keys only:
//! before each slice those at or below the position reached are read again from the slice's view and
//! written to the new file, and those above it are dropped, since the copy will meet them. So after a
//! slice:
//!
//! > up to the position, the new file equals the slice's view.
//!
//! The copy keeps to a rate, so that it takes neither the disk nor a processor from the commits, and from
//! the WAL on the same disk.
//!
//! When the position has reached the end, commits wait for one last small slice and for the new file to
//! take the old one's name. Up to that rename a crash leaves the old file, which no step has changed; the
//! new one is complete and synced before.

use std::fs;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine_api::{Batch, Durability, EngineError, Op, Reclaimed, Table, View};

use parking_lot::{Condvar, Mutex};

use crate::store::{ROW_OVERHEAD, Snapshot, Store};
use crate::{DATA, NEW, Redb, Shared, Writer, failed, remove_if_there, sync_dir};

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

/// Bytes of rows copied at a stroke, from one view: it bounds memory, the age of a view and how long a
/// processor is taken (milliseconds).
const SLICE_BYTES: u64 = 1 << 20;

/// Memory for a row within a slice beyond its bytes: the operation that carries it.
const SLICE_ROW_BYTES: u64 = 100;

/// Bytes copied between two syncs: only then are pages used again that the slices before have freed.
const SYNC_BYTES: u64 = 32 << 20;

/// Memory for pages of the new file while it is filled. Half of it is kept back from the disk until a
/// sync, so that it is also what a sync has left to do.
const COPY_CACHE_BYTES: usize = 8 << 20;

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

/// Lets whoever waits within a reclaim know that it is to end.
#[derive(Default)]
pub(crate) struct Cancel {
    cancelled: Mutex<bool>,
    changed: Condvar,
}

impl Cancel {
    pub(crate) fn cancel(&self) {
        *self.cancelled.lock() = true;
        self.changed.notify_all();
    }

    fn forget(&self) {
        *self.cancelled.lock() = false;
    }

    /// Waits until `deadline`.
    ///
    /// # Errors
    /// `Cancelled`, also when that is past.
    fn wait_until(&self, deadline: Instant) -> Result<(), EngineError> {
        let mut cancelled = self.cancelled.lock();
        while !*cancelled && !self.changed.wait_until(&mut cancelled, deadline).timed_out() {}
        if *cancelled { Err(EngineError::Cancelled) } else { Ok(()) }
    }
}

/// When how much of the copy may be done.
struct Pace {
    started: Instant,
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// Beyond it there is no limit either: commits are faster than the rate.
    bytes_max: u64,
}

impl Pace {
    /// When work may go on after `copied` bytes.
    fn due(&self, copied: u64) -> Instant {
        if self.rate == 0 || copied > self.bytes_max {
            return self.started;
        }
        self.started + Duration::from_secs_f64(copied as f64 / self.rate as f64)
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
    /// Written to the new file, counted as [`Store::live_bytes`] counts.
    bytes: u64,
    at_end: bool,
}

/// Adds one slice to `target`: what has changed, and further rows that hold at most [`SLICE_BYTES`] of memory.
/// In memory is no more than twice that, and one row.
fn copy_slice(
    target: &Store,
    position: &mut Position,
    moment: Moment,
    durability: Durability,
) -> Result<Slice, EngineError> {
    let Moment { view, mut touched } = moment;
    let mut batch = Batch::default();
    touched.retain(|(table, key)| position.covers(*table, key));
    touched.sort();
    touched.dedup();
    let (mut bytes, mut committed) = (0, 0);
    for (table, key) in touched {
        bytes += key.len() as u64 + ROW_OVERHEAD;
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
    let mut held = 0;
    let at_end = loop {
        let table = ORDER[position.table];
        let from = match &position.key {
            Some(key) => Bound::Excluded(&key[..]),
            None => Bound::Unbounded,
        };
        let mut last = None;
        let mut full = false;
        view.scan(table, from, Bound::Unbounded, &mut |key, value| {
            let row = (key.len() + value.len()) as u64;
            bytes += row + ROW_OVERHEAD;
            held += row + SLICE_ROW_BYTES;
            let key = Bytes::copy_from_slice(key);
            last = Some(key.clone());
            batch.put(table, key, Bytes::copy_from_slice(value));
            full = held >= SLICE_BYTES;
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
    Ok(Slice { bytes, at_end })
}

impl Redb {
    /// Copies everything into a new file, which then takes the old one's place: `rate` bytes a second, or, at
    /// 0, as fast as it can.
    pub(crate) fn rebuild(&self, rate: u64) -> Result<Reclaimed, EngineError> {
        let _turn = self.reclaiming.lock();
        self.cancel.forget();
        self.check_poisoned()?;
        let before = self.store().size()?;
        let new = self.dir.join(NEW);
        remove_if_there(&new)?;
        let result = self.copy_and_switch(rate);
        self.writer.lock().touched = None;
        if result.is_err() {
            // what cannot be removed now is removed on opening
            let _ = remove_if_there(&new);
        }
        Ok(Reclaimed { before, after: result? })
    }

    /// Answers the size of the new file.
    fn copy_and_switch(&self, rate: u64) -> Result<u64, EngineError> {
        let cache_bytes = self.cache_bytes.min(COPY_CACHE_BYTES);
        let target = Store::create(&self.dir.join(NEW), cache_bytes)?;
        self.writer.lock().touched = Some(Touched::default());
        let mut position = Position::default();
        let live = self.store().live_bytes();
        // a copy that takes more than this runs behind commits that are faster
        let copied_max = live.saturating_mul(4).saturating_add(1 << 30);
        let pace = Pace {
            started: Instant::now(),
            rate,
            bytes_max: live.saturating_mul(2).saturating_add(64 << 20),
        };
        let (mut copied, mut unsynced) = (0, 0);
        loop {
            let moment = self.moment(&mut self.writer.lock())?;
            let sync = unsynced >= SYNC_BYTES;
            let durability = if sync { Durability::Durable } else { Durability::Buffered };
            let slice = copy_slice(&target, &mut position, moment, durability)?;
            unsynced = if sync { 0 } else { unsynced + slice.bytes };
            copied += slice.bytes;
            if slice.at_end {
                break;
            }
            if copied > copied_max {
                return Err(self.outrun());
            }
            target.disk().await_begun();
            self.cancel.wait_until(pace.due(copied))?;
        }
        // all that can be done while commits go on, so that little is left for the switch: closing trims the
        // file, and opening it again shows that it is whole
        target.commit(&Batch::default(), Durability::Durable)?;
        drop(target);
        let (data, new) = (self.dir.join(DATA), self.dir.join(NEW));
        let target = Store::open(&new, &data, self.cache_bytes)?;
        self.cancel.wait_until(pace.started)?;
        let mut caught_up = false;
        for durability in [Durability::Durable, Durability::Buffered] {
            caught_up = false;
            for _ in 0..CATCH_UPS_MAX {
                let bytes = self.catch_up(&target, &mut position, copied_max, durability)?;
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
        target: &Store,
        position: &mut Position,
        bytes_max: u64,
        durability: Durability,
    ) -> Result<u64, EngineError> {
        let mut bytes = 0;
        loop {
            self.cancel.wait_until(Instant::now())?;
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

    /// Everything committed up to now, and what has changed since the last call.
    fn moment(&self, writer: &mut Writer) -> Result<Moment, EngineError> {
        self.check_poisoned()?;
        let touched = writer.touched.as_mut().expect("changes are noted while reclaim runs");
        if touched.overflowed {
            return Err(self.outrun());
        }
        let touched = std::mem::take(touched).keys;
        Ok(Moment { view: self.snapshot()?, touched })
    }

    fn outrun(&self) -> EngineError {
        let source =
            io::Error::other("commits are faster than the copy; try again at a calmer time");
        failed("reclaim space in", &self.dir.join(DATA), source)
    }

    /// Completes the new file, puts it in the old one's place and answers its size. Commits wait: for the
    /// rows of the commits since the last slice, two syncs of the file and one of the directory.
    fn switch(&self, target: Store, mut position: Position) -> Result<u64, EngineError> {
        let mut writer = self.writer.lock();
        loop {
            let moment = self.moment(&mut writer)?;
            if copy_slice(&target, &mut position, moment, Durability::Durable)?.at_end {
                break;
            }
        }
        let size = target.size()?;
        let (data, new) = (self.dir.join(DATA), self.dir.join(NEW));
        fs::rename(&new, &data).map_err(|error| failed("rename", &new, error))?;
        // the old name may come back in a crash until this is done: no commit may succeed before
        sync_dir(&self.dir).map_err(|error| self.poison(error))?;
        let mut shared = self.shared.write();
        shared.store.disk().retire();
        let replaced =
            std::mem::replace(&mut *shared, Shared { store: Arc::new(target), snapshot: None });
        drop(shared);
        drop(writer);
        // closes the old file, unless a view has it open
        drop(replaced);
        Ok(size)
    }
}
