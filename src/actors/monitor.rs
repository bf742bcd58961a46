//! The monitor: what a member looks after on its own account, apart from any request.
//!
//! in:  nothing but the clock
//! out: `Requests` (the cluster version) to actors/raft.rs; gauges that no event sets
//!
//! While this member leads and the cluster version is below what its members can do, it proposes to
//! raise it (operations 2.9); a cluster of one can do what this server can.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;
use quorate_proto::membershippb::ClusterVersionSetRequest;
use tokio::sync::oneshot;

use crate::actors::raft::{Proposal, RaftActor, Requests};
use crate::actors::shared::Shared;
use crate::core::command::{Command, Request};
use crate::core::membership::Version;
use crate::metrics::{Metrics, OpenFiles};

/// How often the gauges are refreshed: more often than Prometheus looks.
const GAUGE_INTERVAL: Duration = Duration::from_secs(1);
/// How often the cluster version is looked at (operations 2.9).
const VERSION_INTERVAL: Duration = Duration::from_secs(4);
/// How often open files are counted (operations section 4).
const FILES_INTERVAL: Duration = Duration::from_secs(600);
/// Share of the file limit, in percent, above which there is a warning.
const FILES_WARNING_PERCENT: u64 = 80;

/// Owns no state but what it last proposed.
pub struct Monitor {
    shared: Arc<Shared>,
    raft: Addr<RaftActor>,
    /// The version that this server can run a cluster at.
    server: Version,
    metrics: &'static Metrics,
    proposing: bool,
}

impl Monitor {
    /// A monitor of the member behind `shared`.
    pub fn new(shared: Arc<Shared>, raft: Addr<RaftActor>, server: Version) -> Self {
        let server = Version { patch: 0, ..server };
        Monitor { shared, raft, server, metrics: Metrics::global(), proposing: false }
    }

    fn refresh(&mut self, _: &mut Context<Self>) {
        // A failing engine says so itself, where it is used.
        let now = self.shared.published.load();
        if let Ok(size) = now.engine.size() {
            self.metrics.db_size.set(size as f64);
        }
        if let Ok(in_use) = now.engine.size_in_use() {
            self.metrics.db_size_in_use.set(in_use as f64);
        }
        let learner = now.members.is_learner();
        self.metrics.is_learner.set(f64::from(u8::from(learner)));
    }

    fn raise_version(&mut self, ctx: &mut Context<Self>) {
        let decided = self.shared.published.load().members.cluster_version;
        let leading = self.shared.raft.leading.load(Ordering::Acquire);
        if self.proposing || !leading || decided >= Some(self.server) {
            return;
        }
        self.proposing = true;
        let id = self.shared.next_id();
        let set = ClusterVersionSetRequest { ver: self.server.to_string() };
        let data = Command::new(id, Request::ClusterVersionSet(set)).encode();
        let (reply, done) = oneshot::channel();
        let proposals = vec![Proposal { id, data, reply }];
        self.raft.do_send(Requests { proposals, reads: Vec::new() });
        ctx.spawn(done.into_actor(self).map(|done, this, _| {
            this.proposing = false;
            if !matches!(done, Ok(Ok(_))) {
                tracing::warn!("failed to update cluster version");
            }
        }));
    }

    fn count_files(&mut self, _: &mut Context<Self>) {
        match OpenFiles::count() {
            Ok(OpenFiles { used, limit }) if used >= limit / 100 * FILES_WARNING_PERCENT => {
                tracing::warn!(
                    "file-descriptors-used" = used,
                    "file-descriptors-limit" = limit,
                    "80% of file descriptors are used"
                );
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "failed to count open files"),
        }
    }
}

impl Actor for Monitor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.refresh(ctx);
        ctx.run_interval(GAUGE_INTERVAL, Self::refresh);
        // A first start has its version decided as soon as it leads, not four seconds later.
        ctx.run_later(Duration::from_millis(10), Self::raise_version);
        ctx.run_interval(VERSION_INTERVAL, Self::raise_version);
        ctx.run_interval(FILES_INTERVAL, Self::count_files);
    }
}
