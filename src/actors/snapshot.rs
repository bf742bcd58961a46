//! The snapshotter: records that the engine has reached an index, so that the log before it can go.
//!
//! in:  `TakeSnapshot` from actors/applier.rs, after the engine has that index on disk; `Installed`
//!      from there, after it has taken over a received database
//! out: `SaveSnapshot` and `Release` to actors/wal.rs
//!
//! Order that may never change: engine on disk, then `.snap` file on disk, then its WAL record, then
//! release. An orphan `.snap` is harmless; a WAL record without its file is not.
//!
//! It also purges old files, at start and every 30 s (formats-and-peers 1.8).

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use quorate_proto::{raftpb, walpb};

use crate::actors::disk::SharedDisk;
use crate::actors::exit::Exit;
use crate::actors::wal::{Release, SaveSnapshot, WalWriter};
use crate::core::membership::Membership;
use crate::core::snap::{V2Member, V2Membership};
use crate::core::types::{Index, Term};
use crate::metrics::Metrics;
use crate::storage::snap_dir::{SnapDir, SnapError};
use crate::storage::wal_log;

/// The engine holds everything up to `index` on disk; `members` are those at that index.
#[derive(Message)]
#[rtype(result = "()")]
pub struct TakeSnapshot {
    pub index: Index,
    pub term: Term,
    pub members: Arc<Membership>,
}

/// The engine has taken over the database received with the snapshot at this index.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct Installed(pub Index);

const PURGE_INTERVAL: Duration = Duration::from_secs(30);

/// Where files are and how many stay.
#[derive(Clone, Debug)]
pub struct Options {
    pub wal_dir: PathBuf,
    /// `.snap` files kept; 0 for all.
    pub max_snapshots: usize,
    /// WAL segments kept; 0 for all.
    pub max_wals: usize,
    /// The engine outlives the process: a received database is not needed once it is installed.
    pub persistent: bool,
    /// Where the log began at the start. Databases received before are not needed.
    pub start: Index,
}

/// Owns the snapshot directory.
pub struct Snapshotter {
    disk: SharedDisk,
    snapshots: SnapDir,
    wal: Addr<WalWriter>,
    exit: Exit,
    options: Options,
    /// Received databases from here on are or may be needed.
    needed: Index,
    metrics: &'static Metrics,
}

impl Snapshotter {
    /// A snapshotter for `snapshots` and the log in `options`.
    pub fn new(
        disk: SharedDisk,
        snapshots: SnapDir,
        wal: Addr<WalWriter>,
        exit: Exit,
        options: Options,
    ) -> Self {
        let needed = options.start;
        Snapshotter { disk, snapshots, wal, exit, options, needed, metrics: Metrics::global() }
    }

    fn take(&mut self, snapshot: &TakeSnapshot) -> Result<(), SnapError> {
        let started = std::time::Instant::now();
        let conf_state = snapshot.members.conf_state();
        let raft = raftpb::Snapshot {
            data: v2_membership(&snapshot.members).to_v2_store().into(),
            metadata: Some(raftpb::SnapshotMetadata {
                conf_state: Some(conf_state.clone()),
                index: snapshot.index.0,
                term: snapshot.term.0,
            }),
        };
        self.snapshots.save(&raft)?;
        self.metrics.snap_save_seconds.record(started.elapsed());
        self.metrics.snap_fsync_seconds.record(started.elapsed());
        tracing::info!("snapshot-index" = snapshot.index.0, "saved snapshot to disk");
        self.wal.do_send(SaveSnapshot(walpb::Snapshot {
            index: Some(snapshot.index.0),
            term: Some(snapshot.term.0),
            conf_state: Some(conf_state),
        }));
        self.release(snapshot.index, snapshot.index)
    }

    /// Lets go of the log, and of databases received, that lie before a snapshot.
    fn release(&mut self, log: Index, databases: Index) -> Result<(), SnapError> {
        self.wal.do_send(Release(log));
        self.needed = self.needed.max(databases);
        for path in self.snapshots.release_dbs(self.needed.0)? {
            tracing::info!(path = %path.display(), "purged");
        }
        Ok(())
    }

    fn purge(&mut self, _: &mut Context<Self>) {
        if let Err(error) = self.purge_all() {
            self.exit.fail("purge", &*error);
        }
    }

    fn purge_all(&self) -> Result<(), Box<dyn Error>> {
        let Options { wal_dir, max_snapshots, max_wals, .. } = &self.options;
        let mut removed = Vec::new();
        if *max_snapshots > 0 {
            removed.extend(self.snapshots.purge(*max_snapshots, self.needed.0)?);
        }
        if *max_wals > 0 {
            removed.extend(wal_log::purge(&*self.disk, wal_dir, *max_wals)?);
        }
        for path in removed {
            tracing::info!(path = %path.display(), "purged");
        }
        Ok(())
    }
}

/// The members as the v2 store wrote them, for readers older than 3.7.
pub fn v2_membership(members: &Membership) -> V2Membership {
    V2Membership {
        members: members
            .members()
            .map(|member| V2Member {
                id: member.id,
                peer_urls: member.peer_urls.clone(),
                is_learner: member.is_learner,
                name: member.name.clone(),
                client_urls: member.client_urls.clone(),
            })
            .collect(),
        removed: members.removed().map(|id| id.0).collect(),
        cluster_version: members.cluster_version.map(|version| version.to_string()),
    }
}

impl Actor for Snapshotter {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // A member that never lives for an interval must not gather files without end.
        self.purge(ctx);
        ctx.run_interval(PURGE_INTERVAL, Self::purge);
    }
}

impl Handler<Installed> for Snapshotter {
    type Result = ();

    fn handle(&mut self, Installed(index): Installed, _: &mut Self::Context) {
        // An engine in memory begins with it at the next start.
        let databases = Index(index.0 + u64::from(self.options.persistent));
        if let Err(error) = self.release(index, databases) {
            self.exit.fail("snapshot", &error);
        }
    }
}

impl Handler<TakeSnapshot> for Snapshotter {
    type Result = ();

    fn handle(&mut self, snapshot: TakeSnapshot, _: &mut Self::Context) {
        if let Err(error) = self.take(&snapshot) {
            self.exit.fail("snapshot", &error);
        }
    }
}
