//! What a transport thread knows of the member: one handle, shared by all services.
//!
//! Requests are gathered per thread: the first of a loop turn schedules a flush behind everything
//! that is ready to run, and the flush hands all of them to the raft actor as ONE message. A hop to
//! another thread costs more than a put; so it is paid once a turn, not once a request.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio::sync::{oneshot, watch};
use tonic::Status;

use crate::actors::applier::{Applier, Checkpoint};
use crate::actors::compactor::Compactor;
use crate::actors::exit::Exit;
use crate::actors::lease::{LeaseManager, Renewals, Renewed};
use crate::actors::raft::{
    Answered, AwaitApplied, ChangeConf, Proposal, RaftActor, RequestError, Requests, TransferLeader,
};
use crate::actors::shared::{Published, Shared};
use crate::actors::watch::WatchHub;
use crate::core::auth::access::{Asked, Caller, need};
use crate::core::command::{Command, Request};
use crate::core::mvcc::hash::KvHash;
use crate::core::mvcc::{ReadError, Values};
use crate::core::quota::{self, Quota};
use crate::core::reconfig::{self, Silence};
use crate::core::types::{LeaseId, MemberId};
use crate::metrics::{Metrics, RequestKind};
use crate::transport::access;
use crate::transport::identity::Who;
use crate::transport::login::Passwords;
use crate::transport::peer::client::Dialer;
use crate::transport::token::Tokens;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::raftpb;

/// Entries committed but not applied above which new proposals are refused (v3-api section 5).
const APPLY_LAG_MAX: u64 = 5000;
/// Bytes of proposals that may wait for their result; above, as with the lag, new ones are refused. The
/// lag alone bounds only their number, and each may be as large as a request.
const PROPOSED_BYTES_MAX: usize = 256 << 20;
/// How long a lease or a promotion waits for what is committed to be applied (v3-api section 5).
const APPLIED_WAIT: Duration = Duration::from_secs(1);
/// The pause before a turn that found the raft actor's mailbox full is handed over again.
const RETRY_FULL: Duration = Duration::from_millis(1);

/// Limits that a client meets.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Encoded bytes of a request in the log.
    pub request_bytes_max: usize,
    pub txn_ops_max: usize,
    pub quota: Quota,
    /// The quota as `Status` reports it: negative if it is switched off.
    pub quota_reported: i64,
    /// How long a request may wait for the cluster.
    pub request_timeout: Duration,
    pub election: Duration,
    pub heartbeat: Duration,
    /// Membership changes that would cost the quorum are refused.
    pub strict_reconfig: bool,
    /// A lease that is known is renewed without a wait for what is committed but not applied.
    pub fast_keep_alive: bool,
    /// A unary call that takes longer is logged.
    pub warning_unary: Duration,
    /// A local read that takes longer is logged and counted.
    pub warning_apply: Duration,
}

/// A running member, as its transport sees it.
pub struct Member {
    pub shared: Arc<Shared>,
    pub raft: Addr<RaftActor>,
    pub applier: Addr<Applier>,
    pub leases: Addr<LeaseManager>,
    pub watch: Addr<WatchHub>,
    pub compactor: Addr<Compactor>,
    pub exit: Exit,
    /// How other members are reached.
    pub dialer: Dialer,
    pub limits: Limits,
    pub tokens: Arc<Tokens>,
    pub passwords: Passwords,
    pub metrics: &'static Metrics,
    /// True when the member stops: streams end, new requests are refused.
    pub stopping: watch::Sender<bool>,
    pub next_stream: AtomicU64,
    /// Bytes of proposals that wait for their result.
    pub proposed_bytes: AtomicUsize,
}

/// What a thread has gathered in this turn of its loop.
#[derive(Default)]
struct Turn {
    requests: Requests,
    renewals: Vec<(LeaseId, oneshot::Sender<Renewed>)>,
    flush_due: bool,
}

/// Counts a proposal until it is answered, or its caller is gone: a client that cancels drops the call.
struct Pending<'m> {
    member: &'m Member,
    bytes: usize,
}

impl<'m> Pending<'m> {
    /// `None` if too much waits already. One that is alone may be as large as it likes.
    fn new(member: &'m Member, bytes: usize) -> Option<Self> {
        let before = member.proposed_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before > 0 && before + bytes > PROPOSED_BYTES_MAX {
            member.proposed_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return None;
        }
        member.metrics.proposals_pending.increment(1.0);
        Some(Pending { member, bytes })
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.member.proposed_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.member.metrics.proposals_pending.decrement(1.0);
    }
}

thread_local! {
    static TURN: RefCell<Turn> = RefCell::default();
}

impl Member {
    /// The state after the last applied batch.
    pub fn now(&self) -> Arc<Published> {
        self.shared.published.load_full()
    }

    /// A response header with this member's identity and the term of the last applied entry.
    pub fn header(&self, revision: i64) -> Option<pb::ResponseHeader> {
        let term = self.shared.published.load().term;
        self.header_at(revision, term.0)
    }

    /// A response header for an entry of `term`.
    pub fn header_at(&self, revision: i64, term: u64) -> Option<pb::ResponseHeader> {
        Some(pb::ResponseHeader {
            cluster_id: self.shared.cluster_id.0,
            member_id: self.shared.member_id.0,
            revision,
            raft_term: term,
        })
    }

    fn gather(self: &Arc<Self>, add: impl FnOnce(&mut Turn)) {
        let first = TURN.with_borrow_mut(|turn| {
            add(turn);
            !std::mem::replace(&mut turn.flush_due, true)
        });
        if first {
            let member = self.clone();
            actix::spawn(async move {
                // Whatever else is ready in this turn adds to the batch first.
                tokio::task::yield_now().await;
                member.flush().await;
            });
        }
    }

    async fn flush(&self) {
        let (mut requests, renewals) = TURN.with_borrow_mut(|turn| {
            turn.flush_due = false;
            (std::mem::take(&mut turn.requests), std::mem::take(&mut turn.renewals))
        });
        if !renewals.is_empty() {
            self.leases.do_send(Renewals(renewals));
        }
        while !requests.proposals.is_empty() || !requests.reads.is_empty() {
            match self.raft.try_send(requests) {
                Ok(()) => return,
                Err(SendError::Full(back)) => {
                    requests = back;
                    tokio::time::sleep(RETRY_FULL).await;
                }
                // Dropping the waiters tells their callers that the member has stopped.
                Err(SendError::Closed(_)) => return,
            }
        }
    }

    /// Proposes a client's request and waits until this member has applied it. The members ask whether
    /// the client may do it when they apply it.
    ///
    /// # Errors
    /// Any [`RequestError`].
    pub async fn propose(
        self: &Arc<Self>,
        who: &Who,
        request: Request,
    ) -> Result<Answered, RequestError> {
        let caller = match who.is_nobody() {
            true => Caller::NOBODY,
            false => who.at(&self.shared.published.load().auth),
        };
        self.propose_encoded(caller, request, Command::encode).await
    }

    /// Proposes a request of this member itself, for which nobody is asked.
    ///
    /// # Errors
    /// Any [`RequestError`].
    pub async fn propose_own(self: &Arc<Self>, request: Request) -> Result<Answered, RequestError> {
        self.propose_encoded(Caller::NOBODY, request, Command::encode).await
    }

    /// As [`Member::propose_own`], with the entry's data as `encode` has it.
    ///
    /// # Errors
    /// Any [`RequestError`].
    pub async fn propose_own_as(
        self: &Arc<Self>,
        request: Request,
        encode: impl FnOnce(&Command) -> Bytes,
    ) -> Result<Answered, RequestError> {
        self.propose_encoded(Caller::NOBODY, request, encode).await
    }

    async fn propose_encoded(
        self: &Arc<Self>,
        caller: Caller,
        request: Request,
        encode: impl FnOnce(&Command) -> Bytes,
    ) -> Result<Answered, RequestError> {
        if self.shared.apply_lag() > APPLY_LAG_MAX {
            return Err(RequestError::TooManyRequests);
        }
        let kind = RequestKind::of(request.name());
        let started = std::time::Instant::now();
        let id = self.shared.next_id();
        let (username, auth_revision) = (caller.username, caller.revision);
        let data = encode(&Command { id, username, auth_revision, request });
        if data.len() > self.limits.request_bytes_max {
            return Err(RequestError::TooLarge);
        }
        let (reply, answer) = oneshot::channel();
        let pending = Pending::new(self, data.len()).ok_or(RequestError::TooManyRequests)?;
        self.gather(|turn| turn.requests.proposals.push(Proposal { id, data, reply }));
        let answer = tokio::time::timeout(self.limits.request_timeout, answer).await;
        drop(pending);
        let result = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(RequestError::Stopped),
            Err(_) => {
                self.metrics.proposals_failed.increment(1);
                Err(self.silence(started))
            }
        };
        self.metrics.request_seconds(kind, result.is_ok()).record(started.elapsed());
        result
    }

    /// Why what was proposed at `started` got no answer.
    fn silence(&self, started: std::time::Instant) -> RequestError {
        let shared = &self.shared;
        let since = |id| shared.reachable.since(id).map(|at| shared.uptime_at(at).0);
        let why = reconfig::silence(
            &shared.published.load().members,
            shared.leadership(),
            shared.uptime_at(started).0,
            self.limits.election.as_millis() as u64,
            since,
        );
        match why {
            Silence::NeverProposed => RequestError::NoLeader,
            Silence::LeaderFailed => RequestError::LeaderFailed,
            Silence::ConnectionLost => RequestError::ConnectionLost,
            Silence::Slow => RequestError::TimedOut,
        }
    }

    /// Proposes a change of the members and waits, as long as its caller does, until this member and
    /// its raft node have applied it.
    ///
    /// # Errors
    /// `Stopped`; what the change is refused for when it is applied.
    pub async fn change_conf(&self, mut change: raftpb::ConfChange) -> Result<(), RequestError> {
        change.id = self.shared.next_id();
        let (kind, node) = (change.r#type(), MemberId(change.node_id));
        let (reply, answer) = oneshot::channel();
        let sent = self.raft.send(ChangeConf { change, reply }).await;
        sent.map_err(|_| RequestError::Stopped)?;
        let answer = answer.await;
        answer.map_err(|_| RequestError::Stopped)??;
        tracing::info!(
            "local-member-id" = %self.shared.member_id,
            "raft-conf-change" = kind.as_str_name(),
            "raft-conf-change-node-id" = %node,
            "applied a configuration change through raft"
        );
        Ok(())
    }

    /// Waits until what was committed before this call is applied here, at most a second.
    ///
    /// # Errors
    /// `NotApplied`, `Stopped`.
    pub async fn wait_applied(&self) -> Result<(), RequestError> {
        if self.shared.apply_lag() == 0 {
            return Ok(());
        }
        let (reply, applied) = oneshot::channel();
        let waiting = async {
            let sent = self.raft.send(AwaitApplied(reply)).await;
            sent.map_err(|_| RequestError::Stopped)?;
            applied.await.map_err(|_| RequestError::Stopped)?
        };
        tokio::time::timeout(APPLIED_WAIT, waiting).await.unwrap_or(Err(RequestError::NotApplied))
    }

    /// Hands leadership to voter `to` and waits, as long as the caller does, until it leads.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn transfer_leader(&self, to: MemberId) -> Result<(), RequestError> {
        let started = std::time::Instant::now();
        let local = self.shared.member_id;
        tracing::info!(
            "local-member-id" = %local,
            "current-leader-member-id" = %self.shared.leader().unwrap_or_default(),
            "transferee-member-id" = %to,
            "leadership transfer starting"
        );
        self.raft.send(TransferLeader(to)).await.map_err(|_| RequestError::Stopped)?;
        self.shared.leader_that(|leader| leader == to).await;
        tracing::info!(
            "local-member-id" = %local,
            "old-leader-member-id" = %local,
            "new-leader-member-id" = %to,
            took = %crate::config::duration::GoDuration::from(started.elapsed()),
            "leadership transfer finished"
        );
        Ok(())
    }

    /// Hands leadership to another member before this one stops, if it leads and any other can.
    pub async fn hand_over(&self) {
        let (shared, local) = (&self.shared, self.shared.member_id);
        if !shared.raft.leading.load(Ordering::Acquire) {
            return tracing::info!(
                "local-member-id" = %local,
                "skipped leadership transfer; local server is not leader"
            );
        }
        let members = self.now().members.clone();
        if members.conf_state().voters == [local.0] {
            return tracing::info!(
                "local-member-id" = %local,
                "skipped leadership transfer for single voting member cluster"
            );
        }
        let deadline = tokio::time::Instant::now() + self.limits.request_timeout;
        // Raft gives a transfer up after an election timeout; then the next one may be better.
        for to in reconfig::transferees(&members, |id| shared.reachable.since(id)) {
            let until = deadline.min(tokio::time::Instant::now() + self.limits.election);
            tokio::select! {
                moved = self.transfer_leader(to) => match moved {
                    Ok(()) => return,
                    Err(_) => break,
                },
                // Another one was faster.
                _ = shared.leader_that(|leader| leader != local && leader != to) => return,
                () = tokio::time::sleep_until(until) => {}
            }
        }
        tracing::warn!("local-member-id" = %local, "leadership transfer failed");
    }

    /// Whether this member leads: one whose raft has not ticked for a while asks the others.
    pub async fn leads(self: &Arc<Self>) -> bool {
        let leading = || self.shared.raft.leading.load(Ordering::Acquire);
        leading()
            && (self.shared.ticks(self.limits.heartbeat)
                || (self.read_index().await.is_ok() && leading()))
    }

    /// Waits until everything applied so far is in the engine, on disk.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn checkpoint(&self) -> Result<(), RequestError> {
        let (reply, done) = oneshot::channel();
        self.applier.do_send(Checkpoint(reply));
        done.await.map(|_| ()).map_err(|_| RequestError::Stopped)
    }

    /// As [`Member::propose`], but a request that no longer fits the quota raises the alarm and is
    /// refused before it is checked any further (v3-api 3.5).
    ///
    /// # Errors
    /// Any [`RequestError`].
    pub async fn check_quota(self: &Arc<Self>, request: &Request) -> Result<(), RequestError> {
        let cost = quota::cost(request);
        let Some(limit) = self.limits.quota.exceeded(self.shared.sizes(), cost) else {
            return Ok(());
        };
        let raised =
            self.shared.published.load().alarms.has(self.shared.member_id, pb::AlarmType::Nospace);
        if !raised {
            let alarm = self.shared.raise_nospace(limit);
            // Whether or not the alarm went through, there is no room for this request.
            if let Err(error) = self.propose_own(alarm).await {
                tracing::warn!(%error, "failed to raise alarm");
            }
        }
        Err(RequestError::OverQuota)
    }

    /// Waits until everything that was committed before this call can be read here.
    ///
    /// # Errors
    /// `TimedOut`, `LeaderChanged`, `Stopped`.
    pub async fn read_index(self: &Arc<Self>) -> Result<(), RequestError> {
        let (reply, known) = oneshot::channel();
        self.gather(|turn| turn.requests.reads.push(reply));
        match tokio::time::timeout(self.limits.request_timeout, known).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(RequestError::Stopped),
            Err(_) => {
                self.metrics.read_indexes_failed.increment(1);
                Err(RequestError::TimedOut)
            }
        }
    }

    /// Reads for a client what it needs this for, from the newest published state: that state also says
    /// whether the client may. Once more if a compaction took away what was read.
    ///
    /// # Errors
    /// What the client is told.
    pub fn read_as<T>(
        &self,
        who: &Who,
        asked: Asked<'_>,
        mut read: impl FnMut(&Published, &Values<'_>) -> Result<T, ReadError>,
    ) -> Result<T, Status> {
        let mut refused = None;
        let result = self.read_own(|now, values| {
            // Once more means another state.
            refused = match now.auth.enabled() {
                true => access::check_read(now, who, &need(asked)).err(),
                false => None,
            };
            if refused.is_some() { Ok(None) } else { read(now, values).map(Some) }
        });
        match (refused, result?) {
            (Some(error), _) => Err(error.into()),
            (None, Some(value)) => Ok(value),
            (None, None) => unreachable!("what is not refused is read"),
        }
    }

    /// Reads for this member itself, for which nobody is asked, as [`Member::read_as`].
    ///
    /// # Errors
    /// What `read` answers.
    pub fn read_own<T>(
        &self,
        read: impl FnMut(&Published, &Values<'_>) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        self.stop_if_failed(self.shared.read(read))
    }

    /// Stops the member if a read failed for what is wrong with the engine.
    fn stop_if_failed<T>(&self, result: Result<T, ReadError>) -> Result<T, ReadError> {
        if let Err(
            error @ (ReadError::Storage(_) | ReadError::Damaged(_) | ReadError::Superseded(_)),
        ) = &result
        {
            self.exit.fail("storage engine", error);
        }
        result
    }

    /// `HashKV` with its header.
    ///
    /// # Errors
    /// As [`Member::read_own`].
    pub fn hash_kv(&self, at: i64) -> Result<(KvHash, Option<pb::ResponseHeader>), ReadError> {
        let (hashed, revision, term) = self.stop_if_failed(self.shared.hash_kv(at))?;
        Ok((hashed, self.header_at(revision, term.0)))
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn renew(self: &Arc<Self>, id: LeaseId) -> Result<Renewed, RequestError> {
        let (reply, renewed) = oneshot::channel();
        self.gather(|turn| turn.renewals.push((id, reply)));
        renewed.await.map_err(|_| RequestError::Stopped)
    }

    /// Whether the member is going down.
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow() || self.exit.failed()
    }

    /// Waits until the member goes down.
    pub async fn stopped(&self) {
        // The sender lives in `self`, so waiting ends only with the value.
        drop(self.stopping.subscribe().wait_for(|stopping| *stopping).await);
    }

    /// A header with the newest revision.
    pub fn current_header(&self) -> Option<pb::ResponseHeader> {
        let now = self.shared.published.load();
        self.header_at(now.store.revision(), now.term.0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use engine_memory::Memory;

    use super::*;
    use crate::actors::spawn::Seat;
    use crate::config::AuthToken;
    use crate::core::apply::Machine;
    use crate::core::membership::{Membership, Version};
    use crate::core::types::ClusterId;
    use crate::transport::token::SystemClock;

    /// A member whose actors never run, so that nothing sent to them is answered.
    pub struct Silent {
        pub member: Arc<Member>,
        pub raft: Seat<RaftActor>,
        pub leases: Seat<LeaseManager>,
        _seats: (Seat<Applier>, Seat<WatchHub>, Seat<Compactor>),
    }

    fn silent(request_timeout: Duration) -> Silent {
        let members = Membership::new(ClusterId(1), MemberId(1), 1);
        let machine = Machine::new(members, 2, Version::parse("3.7.1").unwrap());
        silent_over(&machine, request_timeout)
    }

    /// A silent member whose state is that of `machine`.
    pub fn silent_over(machine: &Machine, request_timeout: Duration) -> Silent {
        let published = Published::of(machine, Arc::new(Memory::new()), None);
        let local = machine.members.local;
        let shared = Arc::new(Shared::new(machine.members.cluster_id, local, published));
        let raft = Seat::new(16);
        let leases = Seat::new(16);
        let seats = (Seat::new(16), Seat::new(16), Seat::new(16));
        let clock = Box::new(SystemClock::default());
        let ttl = Duration::from_secs(300);
        let tokens = Tokens::new(&AuthToken::Simple, ttl, clock).expect("no key is needed");
        let member = Arc::new(Member {
            shared,
            raft: raft.addr(),
            applier: seats.0.addr(),
            leases: leases.addr(),
            watch: seats.1.addr(),
            compactor: seats.2.addr(),
            exit: Exit::new().0,
            dialer: Dialer::clear(Duration::from_secs(1)),
            limits: Limits {
                request_bytes_max: 1000,
                txn_ops_max: 128,
                quota: Quota::OFF,
                quota_reported: -1,
                request_timeout,
                election: Duration::from_millis(50),
                heartbeat: Duration::from_secs(60),
                strict_reconfig: true,
                fast_keep_alive: true,
                warning_unary: Duration::from_secs(1),
                warning_apply: Duration::from_secs(1),
            },
            tokens: Arc::new(tokens),
            passwords: Passwords::new(4),
            metrics: Box::leak(Box::new(Metrics::new())),
            stopping: watch::Sender::new(false),
            next_stream: AtomicU64::new(1),
            proposed_bytes: AtomicUsize::new(0),
        });
        Silent { member, raft, leases, _seats: seats }
    }

    /// The reads that this thread is about to ask raft for, taken away.
    pub fn asked_reads() -> Vec<oneshot::Sender<Result<(), RequestError>>> {
        TURN.with_borrow_mut(|turn| std::mem::take(&mut turn.requests.reads))
    }

    fn put(bytes: usize) -> Request {
        Request::Put(pb::PutRequest {
            key: "k".into(),
            value: vec![0; bytes].into(),
            ..Default::default()
        })
    }

    fn pending(member: &Member) -> String {
        let page = member.metrics.render();
        let mut lines = page.lines();
        let line = lines.find(|line| line.starts_with("etcd_server_proposals_pending "));
        line.expect("the gauge is on the page").to_string()
    }

    #[test]
    fn above_the_apply_lag_a_proposal_is_refused_at_once() {
        actix::System::new().block_on(async {
            let silent = silent(Duration::from_millis(20));
            let member = &silent.member;
            member.shared.raft.leader.store(1, Ordering::Release);
            let committed = &member.shared.raft.committed;
            committed.store(APPLY_LAG_MAX, Ordering::Release);
            // It is let in, and nobody answers.
            assert!(matches!(member.propose_own(put(1)).await, Err(RequestError::TimedOut)));
            committed.store(APPLY_LAG_MAX + 1, Ordering::Release);
            let refused = member.propose_own(put(1)).await;
            assert!(matches!(refused, Err(RequestError::TooManyRequests)));
            assert!(silent.raft.addr().connected());
        });
    }

    #[test]
    fn a_proposal_is_pending_until_its_caller_has_gone() {
        actix::System::new().block_on(async {
            let silent = silent(Duration::from_secs(60));
            let member = silent.member.clone();
            let caller = actix::spawn(async move { member.propose_own(put(1)).await.map(|_| ()) });
            tokio::task::yield_now().await;
            assert_eq!(pending(&silent.member), "etcd_server_proposals_pending 1");
            caller.abort();
            assert!(caller.await.unwrap_err().is_cancelled());
            assert_eq!(pending(&silent.member), "etcd_server_proposals_pending 0");
            let refused = silent.member.propose_own(put(2000)).await;
            assert!(matches!(refused, Err(RequestError::TooLarge)));
            assert_eq!(pending(&silent.member), "etcd_server_proposals_pending 0");
        });
    }
}
