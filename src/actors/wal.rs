//! The WAL writer: appends what raft hands out and syncs once for everything that waits.
//!
//! in:  `Append` from actors/raft.rs, `SaveSnapshot` and `Release` from actors/snapshot.rs
//! out: `Persisted` to actors/raft.rs
//!
//! It is alone on its thread, because it blocks in fdatasync. Whatever arrives during a sync is
//! written and synced together afterwards: group commit without a cap.

use actix::prelude::*;
use quorate_proto::{raftpb, walpb};

use crate::actors::exit::Exit;
use crate::core::types::Index;
use crate::metrics::Metrics;
use crate::storage::snap_dir::{SnapDir, SnapError};
use crate::storage::wal_log::{WalError, WalLog};

/// Puts entries and hard state into the log.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Append {
    /// What to answer with once this is on disk; `None` if nobody waits.
    pub number: Option<u64>,
    /// Received from a leader: replaces the whole log, and comes before `entries`. Its database is on
    /// disk already.
    pub snapshot: Option<raftpb::Snapshot>,
    pub entries: Vec<raftpb::Entry>,
    pub hard_state: Option<raftpb::HardState>,
    /// False for a commit index that moved alone: it may be lost (formats-and-peers 1.5).
    pub must_sync: bool,
}

/// Everything up to this number is on disk.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct Persisted(pub u64);

/// Records that a snapshot file exists; synced before the answer.
#[derive(Message)]
#[rtype(result = "()")]
pub struct SaveSnapshot(pub walpb::Snapshot);

/// Lets go of segments that hold only entries below the index.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Release(pub Index);

/// Syncs and closes the log; the answer comes when it is done.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Close;

#[derive(Message)]
#[rtype(result = "()")]
struct Flush;

/// Appends that raft may have waiting here; it stops handing out more until some are on disk.
pub const APPENDS_IN_FLIGHT: usize = 4;
/// Room for the appends in flight and the rare messages of the snapshotter.
pub const MAILBOX: usize = 64;

/// Why something is not on disk.
#[derive(thiserror::Error, Debug)]
enum WriteError {
    #[error(transparent)]
    Log(#[from] WalError),
    #[error(transparent)]
    Snapshot(#[from] SnapError),
}

/// Owns the WAL.
pub struct WalWriter {
    log: WalLog,
    snapshots: SnapDir,
    raft: Recipient<Persisted>,
    exit: Exit,
    metrics: &'static Metrics,
    sync: bool,
    /// The last number appended and not yet answered.
    waiting: Option<u64>,
    entries_waiting: usize,
    must_sync: bool,
    flush_due: bool,
    /// Index of the newest snapshot recorded by this process.
    recorded: u64,
}

impl WalWriter {
    /// A writer at the end of `log`. `sync` is false only for `--unsafe-no-fsync`.
    pub fn new(
        log: WalLog,
        snapshots: SnapDir,
        raft: Recipient<Persisted>,
        exit: Exit,
        sync: bool,
    ) -> Self {
        WalWriter {
            log,
            snapshots,
            raft,
            exit,
            metrics: Metrics::global(),
            sync,
            waiting: None,
            entries_waiting: 0,
            must_sync: false,
            flush_due: false,
            recorded: 0,
        }
    }

    /// The snapshot's file, then its record: an orphan file is harmless, a record without one is not.
    fn replace(&mut self, snapshot: &raftpb::Snapshot) -> Result<(), WriteError> {
        self.snapshots.save(snapshot)?;
        let raftpb::SnapshotMetadata { conf_state, index, term } =
            snapshot.metadata.clone().unwrap_or_default();
        self.log.replace(&walpb::Snapshot {
            index: Some(index),
            term: Some(term),
            conf_state: Some(conf_state.unwrap_or_default()),
        })?;
        self.recorded = index;
        Ok(())
    }

    fn append(&mut self, append: Append) -> Result<(), WriteError> {
        if let Some(snapshot) = &append.snapshot {
            self.replace(snapshot)?;
        }
        let started = std::time::Instant::now();
        self.log.append(&append.entries, append.hard_state.as_ref())?;
        self.metrics.wal_write_seconds.record(started.elapsed());
        self.entries_waiting += append.entries.len();
        self.must_sync |= append.must_sync;
        self.waiting = append.number.or(self.waiting);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        if self.must_sync && self.sync {
            let took = self.log.sync()?;
            self.metrics.wal_fsync_seconds.record(took);
            if took.as_millis() >= 1000 {
                tracing::warn!(
                    took = %crate::config::duration::GoDuration::from(took),
                    "expected-duration" = "1s",
                    "slow fdatasync"
                );
            }
        } else {
            self.log.flush()?;
        }
        self.must_sync = false;
        self.metrics.wal_write_bytes.set(self.log.written_bytes() as f64);
        self.metrics.wal_batch_entries.record(self.entries_waiting as f64);
        self.entries_waiting = 0;
        if let Some(number) = self.waiting.take() {
            // At most APPENDS_IN_FLIGHT of these are ever on their way.
            self.raft.do_send(Persisted(number));
        }
        Ok(())
    }

    /// Runs `work` unless the log has failed before; a failure stops the member.
    fn guarded(&mut self, work: impl FnOnce(&mut Self) -> Result<(), WriteError>) {
        if self.exit.failed() {
            return;
        }
        if let Err(error) = work(self) {
            self.exit.fail("write-ahead log", &error);
        }
    }
}

impl Actor for WalWriter {
    type Context = Context<Self>;
}

impl Handler<Append> for WalWriter {
    type Result = ();

    fn handle(&mut self, append: Append, ctx: &mut Self::Context) {
        self.guarded(|this| this.append(append));
        if !self.flush_due {
            self.flush_due = true;
            // Runs when the mailbox is empty: everything that has arrived shares the sync.
            ctx.notify(Flush);
        }
    }
}

impl Handler<Flush> for WalWriter {
    type Result = ();

    fn handle(&mut self, _: Flush, _: &mut Self::Context) {
        self.flush_due = false;
        self.guarded(Self::flush);
    }
}

impl Handler<SaveSnapshot> for WalWriter {
    type Result = ();

    fn handle(&mut self, SaveSnapshot(record): SaveSnapshot, _: &mut Self::Context) {
        // One of this member's own that a received one has overtaken: the log begins behind it.
        if record.index() <= self.recorded {
            return;
        }
        self.recorded = record.index();
        self.guarded(|this| {
            // A snapshot counts only below the commit index that the log knows, which may lag.
            if this.log.hard_state().commit < record.index() {
                let state = raftpb::HardState { commit: record.index(), ..this.log.hard_state() };
                this.log.append(&[], Some(&state))?;
            }
            this.log.save_snapshot(&record)?;
            Ok(())
        });
    }
}

impl Handler<Release> for WalWriter {
    type Result = ();

    fn handle(&mut self, Release(index): Release, _: &mut Self::Context) {
        self.log.release_to(index.0);
    }
}

impl Handler<Close> for WalWriter {
    type Result = ();

    fn handle(&mut self, _: Close, ctx: &mut Self::Context) {
        self.must_sync = true;
        self.guarded(Self::flush);
        ctx.stop();
    }
}
