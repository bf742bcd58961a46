//! The monitor: what a member looks after on its own account, apart from any request.
//!
//! in:  nothing but the clock
//! out: `Requests` (the cluster version, the end of a NOSPACE alarm) to actors/raft.rs; gauges that no event
//!      sets; questions to the other members, by [`Peers`]
//!
//! While this member leads and the cluster version is below what this server can do, it asks the
//! others what they can do, and proposes what follows (operations 2.9, core/cluster_version.rs).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::join_all;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::membershippb::ClusterVersionSetRequest;
use tokio::sync::oneshot;

use crate::actors::integrity::Peers;
use crate::actors::raft::{Proposal, RaftActor, Requests};
use crate::actors::shared::{Published, Shared};
use crate::core::cluster_version;
use crate::core::command::{Command, Request};
use crate::core::membership::Version;
use crate::core::quota::{Quota, Recovery, Sizes};
use crate::core::types::{Index, Term};
use crate::metrics::{Metrics, OpenFiles};

/// How often the gauges are refreshed: more often than Prometheus looks.
const GAUGE_INTERVAL: Duration = Duration::from_secs(1);
/// How often the cluster version is looked at (operations 2.9).
const VERSION_INTERVAL: Duration = Duration::from_secs(4);
/// How often open files are counted (operations section 4).
const FILES_INTERVAL: Duration = Duration::from_secs(600);
/// Share of the file limit, in percent, above which there is a warning.
const FILES_WARNING_PERCENT: u64 = 80;

/// How the member's own NOSPACE alarm is lifted.
#[derive(Clone, Copy, Debug)]
pub struct AlarmOptions {
    /// Without it that is left to others.
    pub auto_disarm: bool,
    pub quota: Quota,
    /// Where the log ended at the start: an alarm that comes up to there was raised before it.
    pub log_end: Index,
}

/// Owns no state but what it is about to propose.
pub struct Monitor {
    shared: Arc<Shared>,
    raft: Addr<RaftActor>,
    peers: Arc<dyn Peers>,
    /// What this server is.
    server: Version,
    request_timeout: Duration,
    metrics: &'static Metrics,
    negotiating: bool,
    alarm: AlarmOptions,
    recovery: Recovery,
    /// What was known to be committed at the last look at the alarm.
    committed: Option<Index>,
    disarming: bool,
    /// The last term in which this member has been seen to lead, with an entry of it applied.
    led: Term,
}

/// The versions of all members' servers, this one's included; `None` for who does not tell.
pub async fn server_versions(
    shared: &Shared,
    peers: &dyn Peers,
    server: Version,
) -> Vec<Option<Version>> {
    let members = shared.published.load().members.clone();
    let others = members.members().filter(|member| member.id != shared.member_id.0);
    let asking: Vec<_> = others.map(|member| peers.version(member)).collect();
    let mut versions = join_all(asking).await;
    versions.push(Some(server));
    versions
}

/// Whether this member's own NOSPACE alarm is in force.
fn nospace(shared: &Shared, now: &Published) -> bool {
    now.alarms.has(shared.member_id, pb::AlarmType::Nospace)
}

impl Monitor {
    /// A monitor of the member behind `shared`.
    pub fn new(
        shared: Arc<Shared>,
        raft: Addr<RaftActor>,
        peers: Arc<dyn Peers>,
        server: Version,
        request_timeout: Duration,
        alarm: AlarmOptions,
    ) -> Self {
        let in_force = nospace(&shared, &shared.published.load());
        Monitor {
            alarm,
            recovery: Recovery::new(in_force),
            committed: None,
            disarming: false,
            shared,
            raft,
            peers,
            server,
            request_timeout,
            metrics: Metrics::global(),
            negotiating: false,
            led: Term(0),
        }
    }

    fn refresh(&mut self, ctx: &mut Context<Self>) {
        // A failing engine says so itself, where it is used.
        let now = self.shared.published.load_full();
        self.shared.measure(&*now.engine);
        let sizes = self.shared.sizes();
        self.metrics.db_size.set(sizes.physical as f64);
        self.metrics.db_size_in_use.set(sizes.live as f64);
        self.look_at_alarm(&now, sizes, ctx);
        let learner = now.members.is_learner();
        self.metrics.is_learner.set(f64::from(u8::from(learner)));
        // A new leader looks at the versions once an entry of its term is applied, not seconds later.
        let raft = &self.shared.raft;
        if raft.leading.load(Ordering::Acquire)
            && now.term > self.led
            && now.term.0 == raft.term.load(Ordering::Acquire)
        {
            self.led = now.term;
            drop(now);
            self.negotiate_version(ctx);
        }
    }

    /// Asks for the end of this member's NOSPACE alarm when its space is back.
    fn look_at_alarm(&mut self, now: &Published, sizes: Sizes, ctx: &mut Context<Self>) {
        let in_force = nospace(&self.shared, now);
        let raised = self.shared.nospace_raised.swap(false, Ordering::AcqRel)
            || (in_force && now.applied <= self.alarm.log_end);
        // What the engine has not taken yet may need the space: writes of the last moment, or, after a
        // start, all that the log brings back.
        let committed = Index(self.shared.raft.committed.load(Ordering::Acquire));
        let before = self.committed.replace(committed);
        let counted = before.is_some_and(|before| self.shared.measured() >= before);
        let is_back = counted && self.alarm.quota.is_back(sizes);
        let due = self.recovery.step(raised, in_force, is_back);
        if !due || !self.alarm.auto_disarm || self.disarming {
            return;
        }
        tracing::info!(
            "live-bytes" = sizes.live,
            "physical-bytes" = sizes.physical,
            "space is back, lifting alarm"
        );
        self.disarming = true;
        let id = self.shared.next_id();
        let request = Request::Alarm(pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Deactivate as i32,
            member_id: self.shared.member_id.0,
            alarm: pb::AlarmType::Nospace as i32,
        });
        let data = Command::new(id, request).encode();
        let (reply, done) = oneshot::channel();
        let proposals = vec![Proposal { id, data, reply }];
        self.raft.do_send(Requests { proposals, reads: Vec::new() });
        // An entry that was lost with its leader is never answered; then it is asked again.
        let done = tokio::time::timeout(self.request_timeout, done);
        ctx.spawn(done.into_actor(self).map(move |done, this, _| {
            this.disarming = false;
            if !matches!(done, Ok(Ok(Ok(_)))) {
                tracing::warn!("failed to lift alarm");
            }
        }));
    }

    /// Brings the cluster version to what all members can do, as far as this member knows.
    fn negotiate_version(&mut self, ctx: &mut Context<Self>) {
        let members = self.shared.published.load().members.clone();
        let leading = self.shared.raft.leading.load(Ordering::Acquire);
        let decided = members.cluster_version;
        // It cannot be higher than what this server can do: nobody need be asked.
        if self.negotiating || !leading || decided >= Some(Version { patch: 0, ..self.server }) {
            return;
        }
        self.negotiating = true;
        let (shared, peers, server) = (self.shared.clone(), self.peers.clone(), self.server);
        let asking = async move { server_versions(&shared, &*peers, server).await };
        ctx.spawn(asking.into_actor(self).map(move |servers, this, ctx| {
            match cluster_version::decide(decided, &servers) {
                Some(version) => this.propose_version(decided, version, &servers, ctx),
                None => this.negotiating = false,
            }
        }));
    }

    fn propose_version(
        &mut self,
        decided: Option<Version>,
        version: Version,
        servers: &[Option<Version>],
        ctx: &mut Context<Self>,
    ) {
        match decided {
            None => tracing::info!(
                "cluster-version" = %version,
                "setting up initial cluster version"
            ),
            Some(from) => tracing::info!(%from, to = %version, "updating cluster version"),
        }
        let id = self.shared.next_id();
        let set = ClusterVersionSetRequest { ver: version.to_string() };
        let command = Command::new(id, Request::ClusterVersionSet(set));
        let v2 = cluster_version::needs_v2(decided, servers).then(|| command.encode_v2()).flatten();
        let data = v2.unwrap_or_else(|| command.encode());
        let (reply, done) = oneshot::channel();
        let proposals = vec![Proposal { id, data, reply }];
        self.raft.do_send(Requests { proposals, reads: Vec::new() });
        // An entry that was lost with its leader is never answered.
        let done = tokio::time::timeout(self.request_timeout, done);
        ctx.spawn(done.into_actor(self).map(move |done, this, _| {
            this.negotiating = false;
            if matches!(done, Ok(Ok(Ok(_)))) {
                tracing::info!("cluster-version" = %version, "cluster version is updated");
            } else {
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
        ctx.run_interval(VERSION_INTERVAL, Self::negotiate_version);
        ctx.run_interval(FILES_INTERVAL, Self::count_files);
    }
}
