//! The lease manager: drives [`Lessor`] by the clock while this member leads.
//!
//! in:  `LeaseChanges`, `LeasesReplaced` and `Promoted` from actors/applier.rs, `LeaderChanged` from actors/raft.rs,
//!      `Renewals`, `Remaining`, `ListLeases` from transport/grpc/lease.rs
//! out: `AsLeader` (revokes, checkpoints) to actors/raft.rs
//!
//! A keep-alive is answered from here and never enters the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;
use quorate_proto::etcdserverpb as pb;
use tokio::sync::oneshot;

use crate::actors::answer;
use crate::actors::raft::{AsLeader, Proposal, RaftActor};
use crate::actors::shared::Shared;
use crate::core::apply::LeaseChange;
use crate::core::auth::access::Caller;
use crate::core::command::{Command, Request};
use crate::core::lease::{
    CHECKPOINT_BATCH, EXPIRED_PER_TICK, EXPIRY_TICK_MS, LeaseTable, Lessor, LessorError,
    LessorOptions, Renewal,
};
use crate::core::types::{LeaseId, Term};
use crate::metrics::Metrics;

/// Leases that came, went or changed, in the order of the log.
#[derive(Message)]
#[rtype(result = "()")]
pub struct LeaseChanges(pub Vec<LeaseChange>);

/// A snapshot of the leader has taken the place of all leases.
#[derive(Message)]
#[rtype(result = "()")]
pub struct LeasesReplaced(pub LeaseTable);

/// The first entry of a term was applied: its leader, if it is this member, keeps the deadlines.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Promoted(pub Term);

/// This member leads no more.
#[derive(Message)]
#[rtype(result = "()")]
pub struct LeaderChanged {
    pub leading: bool,
    pub term: Term,
}

/// Keep-alives of one turn of a transport thread.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Renewals(pub Vec<(LeaseId, oneshot::Sender<Renewed>)>);

/// What a keep-alive is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Renewed {
    /// The lease runs for its full TTL again, in seconds.
    Ttl(i64),
    /// The lease is gone: TTL 0.
    Gone,
    /// This member does not lead.
    NotPrimary,
}

/// Seconds left of a lease.
#[derive(Message)]
#[rtype(result = "Result<i64, LessorError>")]
pub struct Remaining(pub LeaseId);

/// All leases, those that end first in front.
#[derive(Message)]
#[rtype(result = "Vec<LeaseId>")]
pub struct ListLeases;

/// Revokes under way at once (v3-api 3.9).
const REVOKES_IN_FLIGHT: usize = 16;

/// Owns the deadlines.
pub struct LeaseManager {
    lessor: Lessor,
    options: LessorOptions,
    shared: Arc<Shared>,
    raft: Addr<RaftActor>,
    election: Duration,
    /// After it the lessor names an expired lease again.
    retry: Duration,
    metrics: &'static Metrics,
    /// Expired leases whose revoke waits for its turn.
    expired: std::collections::VecDeque<LeaseId>,
    revoking: usize,
    /// Keep-alives that wait until a revoke is applied or leadership is lost.
    parked: HashMap<LeaseId, Vec<oneshot::Sender<Renewed>>>,
    ticking: bool,
}

impl LeaseManager {
    /// A manager of the leases that `shared` holds.
    pub fn new(
        shared: Arc<Shared>,
        raft: Addr<RaftActor>,
        options: LessorOptions,
        election: Duration,
    ) -> Self {
        let retry = Duration::from_millis(options.retry_ms);
        let mut lessor = Lessor::new(options);
        let published = shared.published.load();
        lessor
            .restored(published.leases.iter().map(|(id, lease)| (id, lease.ttl, lease.remaining)));
        drop(published);
        LeaseManager {
            lessor,
            options,
            shared,
            raft,
            election,
            retry,
            metrics: Metrics::global(),
            expired: Default::default(),
            revoking: 0,
            parked: HashMap::new(),
            ticking: false,
        }
    }

    /// Looks for expired leases as long as there are any; an idle member has no timer.
    fn schedule(&mut self, ctx: &mut Context<Self>) {
        if self.ticking || !self.lessor.is_primary() || self.lessor.is_empty() {
            return;
        }
        self.ticking = true;
        ctx.run_later(Duration::from_millis(EXPIRY_TICK_MS), |this, ctx| {
            this.ticking = false;
            this.tick(ctx);
            this.schedule(ctx);
        });
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        let now = self.shared.now();
        let room = EXPIRED_PER_TICK.saturating_sub(self.expired.len());
        self.expired.extend(self.lessor.expired(now, room));
        self.revoke_expired(ctx);
        let due = self.lessor.checkpoints_due(now, CHECKPOINT_BATCH);
        if !due.is_empty() {
            self.checkpoint(due);
        }
    }

    fn revoke_expired(&mut self, ctx: &mut Context<Self>) {
        while self.revoking < REVOKES_IN_FLIGHT {
            let Some(id) = self.expired.pop_front() else { return };
            self.revoking += 1;
            tracing::debug!("lease-id" = %id, "lease expired");
            let request = Request::LeaseRevoke(pb::LeaseRevokeRequest { id: id.0 });
            // Nobody else may be permitted to write all of its keys.
            let caller = Caller::root(&self.shared.published.load().auth);
            // An entry that was lost with its leader is never answered; it must not keep its place.
            let done = tokio::time::timeout(self.retry, self.propose(caller, request));
            ctx.spawn(done.into_actor(self).map(|done, this, ctx| {
                this.revoking -= 1;
                if matches!(done, Ok(Ok(Ok(_)))) {
                    this.metrics.lease_expired.increment(1);
                }
                this.revoke_expired(ctx);
            }));
        }
    }

    fn checkpoint(&self, due: Vec<(LeaseId, i64)>) {
        let checkpoints = due
            .into_iter()
            .map(|(id, remaining_ttl)| pb::LeaseCheckpoint { id: id.0, remaining_ttl })
            .collect();
        // Nobody waits: a checkpoint that is lost is made again at the next interval.
        let request = Request::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints });
        drop(self.propose(Caller::NOBODY, request));
    }

    fn propose(
        &self,
        caller: Caller,
        request: Request,
    ) -> oneshot::Receiver<crate::actors::raft::Answer> {
        let id = self.shared.next_id();
        let Caller { username, revision: auth_revision } = caller;
        let data = Command { id, username, auth_revision, request }.encode();
        let (reply, done) = oneshot::channel();
        let proposals = vec![Proposal { id, data, reply }];
        // At most REVOKES_IN_FLIGHT and one batch of checkpoints a tick.
        self.raft.do_send(AsLeader(proposals));
        done
    }

    fn renew(&mut self, id: LeaseId, reply: oneshot::Sender<Renewed>) {
        let renewed = match self.lessor.renew(id, self.shared.now()) {
            Renewal::Renewed { ttl } => {
                self.metrics.lease_renewed.increment(1);
                Renewed::Ttl(ttl)
            }
            Renewal::Unknown => Renewed::Gone,
            Renewal::NotPrimary => Renewed::NotPrimary,
            Renewal::Expired => {
                return self.parked.entry(id).or_default().push(reply);
            }
            Renewal::Checkpointed => {
                // Cleared through the log first, or a new leader would end the lease early.
                self.checkpoint(vec![(id, 0)]);
                return self.parked.entry(id).or_default().push(reply);
            }
        };
        // A client that is gone needs no answer.
        answer(reply, renewed);
    }
}

impl Actor for LeaseManager {
    type Context = Context<Self>;
}

impl Handler<LeaseChanges> for LeaseManager {
    type Result = ();

    fn handle(&mut self, LeaseChanges(changes): LeaseChanges, ctx: &mut Self::Context) {
        let now = self.shared.now();
        for change in changes {
            match change {
                LeaseChange::Granted { id, ttl, remaining } => {
                    self.lessor.granted(id, ttl, remaining, now);
                    self.metrics.lease_granted.increment(1);
                    self.metrics.lease_ttl_seconds.record(ttl as f64);
                }
                LeaseChange::Revoked(id) => {
                    self.lessor.revoked(id);
                    self.metrics.lease_revoked.increment(1);
                    for reply in self.parked.remove(&id).unwrap_or_default() {
                        answer(reply, Renewed::Gone);
                    }
                }
                LeaseChange::Checkpointed { id, remaining } => {
                    self.lessor.checkpointed(id, remaining, now);
                    if remaining == 0 {
                        for reply in self.parked.remove(&id).unwrap_or_default() {
                            self.renew(id, reply);
                        }
                    }
                }
            }
        }
        self.schedule(ctx);
    }
}

impl Handler<LeasesReplaced> for LeaseManager {
    type Result = ();

    fn handle(&mut self, LeasesReplaced(leases): LeasesReplaced, _: &mut Self::Context) {
        // Only a follower is sent a snapshot: it keeps no deadlines until it is promoted.
        self.lessor = Lessor::new(self.options);
        self.lessor.restored(leases.iter().map(|(id, lease)| (id, lease.ttl, lease.remaining)));
        self.expired.clear();
        for reply in self.parked.drain().flat_map(|(_, replies)| replies) {
            answer(reply, Renewed::NotPrimary);
        }
    }
}

impl Handler<Promoted> for LeaseManager {
    type Result = ();

    fn handle(&mut self, Promoted(term): Promoted, ctx: &mut Self::Context) {
        let raft = &self.shared.raft;
        let current = raft.term.load(Ordering::Acquire) == term.0;
        if current && raft.leading.load(Ordering::Acquire) {
            self.lessor.promote(self.shared.now(), self.election.as_millis() as u64);
            self.schedule(ctx);
        }
    }
}

impl Handler<LeaderChanged> for LeaseManager {
    type Result = ();

    fn handle(&mut self, change: LeaderChanged, _: &mut Self::Context) {
        if !change.leading {
            self.lessor.demote();
            self.expired.clear();
            for (_, replies) in self.parked.drain() {
                for reply in replies {
                    answer(reply, Renewed::NotPrimary);
                }
            }
        }
    }
}

impl Handler<Renewals> for LeaseManager {
    type Result = ();

    fn handle(&mut self, Renewals(renewals): Renewals, _: &mut Self::Context) {
        for (id, reply) in renewals {
            self.renew(id, reply);
        }
    }
}

impl Handler<Remaining> for LeaseManager {
    type Result = Result<i64, LessorError>;

    fn handle(&mut self, Remaining(id): Remaining, _: &mut Self::Context) -> Self::Result {
        self.lessor.remaining(id, self.shared.now())
    }
}

impl Handler<ListLeases> for LeaseManager {
    type Result = MessageResult<ListLeases>;

    fn handle(&mut self, _: ListLeases, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.lessor.list())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::actors::shared::tests::Bench;
    use crate::actors::spawn::Seat;

    /// A leader that loses its log's tail never answers what was in it.
    #[test]
    fn revokes_that_are_never_answered_do_not_stop_expiry() {
        actix::System::new().block_on(async {
            let shared = Bench::new().shared;
            shared.raft.term.store(1, Ordering::Release);
            shared.raft.leading.store(true, Ordering::Release);
            // Nobody sits here: proposals stay in the mailbox.
            let raft = Seat::<RaftActor>::new(1024);
            let options = LessorOptions { retry_ms: 50, ..LessorOptions::default() };
            let election = Duration::from_millis(1);
            let manager = LeaseManager::new(shared.clone(), raft.addr(), options, election).start();
            let leases = 2 * REVOKES_IN_FLIGHT as i64;
            let granted = |id| LeaseChange::Granted { id: LeaseId(id), ttl: 1, remaining: 0 };
            manager.do_send(LeaseChanges((1..=leases).map(granted).collect()));
            manager.do_send(Promoted(Term(1)));
            let (first, started) = (shared.next_id(), Instant::now());
            // Each proposal takes a request ID, and so does each look here.
            for looks in 1.. {
                let proposals = shared.next_id() - first - looks;
                if proposals > leases as u64 {
                    break;
                }
                let waited = started.elapsed();
                assert!(waited < Duration::from_secs(60), "stuck after {proposals} revokes");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
}
