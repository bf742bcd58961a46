//! The raft actor: ticks and steps the node, and hands out what it decides.
//!
//! in:  `Requests`, `ChangeConf`, `TransferLeader`, `AwaitApplied` from transport, `AsLeader` from
//!      actors/lease.rs, `Abandon`, `AdvanceTicks` from the daemon, `Step`, `Unreachable`, `SnapshotDone`
//!      from the peer network, `Persisted` from actors/wal.rs, `Applied` and `ConfChanged` from
//!      actors/applier.rs
//! out: `Append` to actors/wal.rs, `Apply` to actors/applier.rs, `Send` to the peer network,
//!      `LeaderChanged` to actors/lease.rs
//!
//! It never blocks on a disk. Persist, then apply: the node hands out committed entries only after
//! `Persisted` has told it that this member holds them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use quorate_proto::raftpb;
use tokio::sync::oneshot;

use crate::actors::answer;
use crate::actors::applier::{Applier, Apply};
use crate::actors::exit::Exit;
use crate::actors::lease::LeaderChanged;
use crate::actors::peers::Send;
use crate::actors::shared::Shared;
use crate::actors::wal::{APPENDS_IN_FLIGHT, Append, Persisted, WalWriter};
use crate::core::apply::{ApplyError, Reply};
use crate::core::raft::{MSG_SNAP, Node, Output, ProposeError, StepError};
use crate::core::types::{Index, MemberId, Term};
use crate::metrics::Metrics;

/// A request for the log.
pub struct Proposal {
    pub id: u64,
    pub data: Bytes,
    pub reply: oneshot::Sender<Answer>,
}

/// What became of a proposal once this member applied it.
pub type Answer = Result<Answered, RequestError>;

/// A reply with the term of the entry that made it.
#[derive(Debug)]
pub struct Answered {
    pub reply: Reply,
    pub term: Term,
}

/// Why a request is not answered.
#[derive(thiserror::Error, Debug)]
pub enum RequestError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Applied, but the space quota is exceeded.
    #[error("request was executed and exceeds the space quota")]
    OverQuota,
    #[error("a leader transfer is in progress")]
    Transferring,
    #[error("the leader changed while the read index was asked for")]
    LeaderChanged,
    #[error("no leader is known")]
    NoLeader,
    #[error("request took longer than the request timeout")]
    TimedOut,
    #[error("request took longer than the request timeout, in which the leader was lost")]
    LeaderFailed,
    #[error("request took longer than the request timeout, in which the leader was out of reach")]
    ConnectionLost,
    #[error("what was committed took too long to apply")]
    NotApplied,
    #[error("too many entries are committed but not applied")]
    TooManyRequests,
    #[error("request is larger than the log takes")]
    TooLarge,
    #[error("member is stopping")]
    Stopped,
}

/// Told when everything that was committed before its arrival can be read here.
pub type ReadWaiter = oneshot::Sender<Result<(), RequestError>>;

/// Everything that a transport thread has gathered in one turn of its loop.
#[derive(Message, Default)]
#[rtype(result = "()")]
pub struct Requests {
    pub proposals: Vec<Proposal>,
    pub reads: Vec<ReadWaiter>,
}

/// Proposes a configuration change. Answered when this member has applied it and its raft node has
/// taken it over; a refusal at apply is the answer's error. A follower's proposal that finds another
/// change under way at the leader is lost: the caller gives up when it likes.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChangeConf {
    /// `id` names the request.
    pub change: raftpb::ConfChange,
    pub reply: oneshot::Sender<Answer>,
}

/// Messages that arrived from other members, in the order of their arrival on each stream.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Step(pub Vec<raftpb::Message>);

/// The last message to this member could not be delivered.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct Unreachable(pub MemberId);

/// The snapshot sent to `to` arrived, or it did not.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct SnapshotDone {
    pub to: MemberId,
    pub ok: bool,
}

/// Raft's status now.
#[derive(Message, Clone, Copy, Debug)]
#[rtype(result = "crate::core::raft::Status")]
pub struct GetStatus;

/// The applier has applied everything up to this index, and published it: sent where `Apply` asked for
/// it, or raft has since (`ApplyProgress`).
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct Applied(pub Index);

/// A configuration change was applied; `None` if it was refused.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ConfChanged {
    /// Of the log entry.
    pub index: Index,
    pub change: Option<raftpb::ConfChange>,
    /// The proposer on this member and its answer, which it gets once raft has taken the change over:
    /// what it does next may depend on the new members.
    pub answer: Option<(oneshot::Sender<Answer>, Answer)>,
}

/// Answered when this member has applied everything that it knew as committed when this came.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AwaitApplied(pub ReadWaiter);

/// Proposals that only a leader may make. A member that leads no more drops them: handed on, they would
/// reach a leader that has given the leases more time.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AsLeader(pub Vec<Proposal>);

/// This member stops without another word from the cluster: whoever waits is told so.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct Abandon;

/// Hands leadership to another member.
#[derive(Message)]
#[rtype(result = "()")]
pub struct TransferLeader(pub MemberId);

/// Lets so many ticks pass at once, unless a leader is known. A member that has just found its peers
/// need not wait a whole election timeout; one that hears of a leader must not disturb it.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct AdvanceTicks(pub usize);

#[derive(Message)]
#[rtype(result = "()")]
struct Drive;

/// Requests that wait here; a transport thread sends one message per turn of its loop and holds back
/// while the mailbox is full.
pub const MAILBOX: usize = 1024;
/// `Apply` messages that the applier may have waiting. More committed entries are kept here and
/// merged, so that a slow applier sees few large batches.
const APPLIES_IN_FLIGHT: usize = 4;
/// A read index that got no answer is asked for again (v3-api 6.3).
const READ_RETRY: Duration = Duration::from_millis(500);
/// Work gathered before the node is driven without waiting for the mailbox to run dry.
const DRIVE_AFTER: usize = 1024;

/// Bytes of log that are kept in memory for slow followers, beside `catch_up_entries`: whichever is reached
/// first. A follower that lacks more is sent a snapshot.
const LOG_BYTES: usize = 64 << 20;
/// The same while a snapshot is on its way, or has just arrived: its receiver goes on from its index, and
/// would need another one if the log had left that behind. Entries are not counted then.
const LOG_BYTES_HELD: usize = 512 << 20;
/// How long after its arrival a snapshot holds the log (operations 6.3).
const HOLD_AFTER_SNAPSHOT: Duration = Duration::from_secs(30);

/// Bytes proposed as one, unless one request alone is larger: a follower hands them to the leader in one
/// message, and no peer has to take a larger one than raft's own appends.
const PROPOSED_BYTES: usize = 1 << 20;

/// How the node runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub tick: Duration,
    /// Entries kept in memory behind the applied index for slow followers.
    pub catch_up_entries: u64,
}

struct Round {
    context: u64,
    asked: std::time::Instant,
    waiters: Vec<ReadWaiter>,
}

/// What the proposer of something that was not taken is told.
fn refused(error: &ProposeError) -> RequestError {
    match error {
        ProposeError::NoLeader => RequestError::NoLeader,
        ProposeError::Transferring => RequestError::Transferring,
        ProposeError::Stopped | ProposeError::ConfChange(_) | ProposeError::ConfChangePending => {
            RequestError::Stopped
        }
    }
}

/// Owns the raft node.
pub struct RaftActor {
    node: Node,
    shared: Arc<Shared>,
    wal: Addr<WalWriter>,
    applier: Addr<Applier>,
    leases: Recipient<LeaderChanged>,
    /// The peer network; `None` for a node that is alone in a test.
    peers: Option<Recipient<Send>>,
    exit: Exit,
    options: Options,
    metrics: &'static Metrics,

    /// When the last tick was.
    ticked: std::time::Instant,
    drive_due: bool,
    work: usize,
    appends: usize,
    /// What the applier has of it: the last index of each `Apply`, and whether it is to be confirmed.
    applies: VecDeque<(Index, bool)>,
    committed: Vec<raftpb::Entry>,
    /// A snapshot received, and the number of the output that it came with: once that is on disk, it goes
    /// to the applier, before anything in `committed`.
    install: Option<(u64, raftpb::Snapshot)>,
    /// The last number that is on disk.
    persisted: u64,
    /// Members to whom a snapshot is on its way, or to whom one came at that time.
    sending: HashMap<MemberId, Option<Instant>>,
    /// A follower needs a newer snapshot than the one on offer.
    offer_due: bool,
    /// A hard state that no `Append` has carried yet; only its commit index is new.
    commit_state: Option<raftpb::HardState>,
    /// Proposals of this turn, to be proposed together: each proposal is a message to each follower.
    proposals: Vec<Proposal>,
    /// Waiters for proposals, to travel with the next `Apply`.
    waiters: Vec<(u64, oneshot::Sender<Answer>)>,
    /// Proposals that wait for a leader; their callers give up by themselves.
    parked: VecDeque<Proposal>,
    /// Configuration changes that wait for a leader, or for one another.
    parked_changes: VecDeque<ChangeConf>,
    reads: Vec<ReadWaiter>,
    round: Option<Round>,
    /// Those who wait until an index is applied, by index.
    unapplied: VecDeque<(Index, Vec<ReadWaiter>)>,
    /// Nobody is answered any more.
    abandoned: bool,
}

/// What the actor is connected to.
pub struct Links {
    pub shared: Arc<Shared>,
    pub wal: Addr<WalWriter>,
    pub applier: Addr<Applier>,
    pub leases: Recipient<LeaderChanged>,
    pub peers: Option<Recipient<Send>>,
    pub exit: Exit,
}

impl RaftActor {
    /// An actor around a restored node.
    pub fn new(node: Node, links: Links, options: Options) -> Self {
        RaftActor {
            node,
            shared: links.shared,
            wal: links.wal,
            applier: links.applier,
            leases: links.leases,
            peers: links.peers,
            exit: links.exit,
            options,
            metrics: Metrics::global(),
            ticked: std::time::Instant::now(),
            drive_due: false,
            work: 0,
            appends: 0,
            applies: VecDeque::new(),
            committed: Vec::new(),
            install: None,
            persisted: 0,
            sending: HashMap::new(),
            offer_due: false,
            commit_state: None,
            proposals: Vec::new(),
            waiters: Vec::new(),
            parked: VecDeque::new(),
            parked_changes: VecDeque::new(),
            reads: Vec::new(),
            round: None,
            unapplied: VecDeque::new(),
            abandoned: false,
        }
    }

    /// Drives the node once the mailbox is empty, so that a turn's work is one batch.
    fn drive_soon(&mut self, ctx: &mut Context<Self>) {
        self.work += 1;
        if self.work >= DRIVE_AFTER {
            self.drive();
        } else if !self.drive_due {
            self.drive_due = true;
            ctx.notify(Drive);
        }
    }

    fn propose_all(&mut self) {
        let mut proposals = std::mem::take(&mut self.proposals);
        proposals.retain(|proposal| !proposal.reply.is_closed());
        while !proposals.is_empty() {
            let mut bytes = 0;
            let fits = |proposal: &&Proposal| {
                bytes += proposal.data.len();
                bytes <= PROPOSED_BYTES
            };
            let count = proposals.iter().take_while(fits).count().max(1);
            let rest = proposals.split_off(count);
            self.propose(std::mem::replace(&mut proposals, rest));
        }
    }

    fn propose(&mut self, proposals: Vec<Proposal>) {
        match self.node.propose_batch(proposals.iter().map(|proposal| proposal.data.clone())) {
            Ok(()) => self.waiters.extend(proposals.into_iter().map(|p| (p.id, p.reply))),
            Err(ProposeError::NoLeader) => self.parked.extend(proposals),
            Err(error) => {
                for proposal in proposals {
                    self.metrics.proposals_failed.increment(1);
                    answer(proposal.reply, Err(refused(&error)));
                }
            }
        }
    }

    /// Proposes the configuration changes that wait for a leader, or for one another.
    fn propose_changes(&mut self) {
        while let Some(next) = self.parked_changes.pop_front() {
            if next.reply.is_closed() {
                continue;
            }
            match self.node.propose_conf_change(&next.change) {
                Ok(()) => self.waiters.push((next.change.id, next.reply)),
                Err(ProposeError::NoLeader | ProposeError::ConfChangePending) => {
                    return self.parked_changes.push_front(next);
                }
                Err(error) => answer(next.reply, Err(refused(&error))),
            }
        }
    }

    fn drive(&mut self) {
        self.work = 0;
        if self.exit.failed() {
            return;
        }
        self.look_at_applied();
        self.propose_all();
        self.propose_changes();
        self.start_read_round();
        while self.appends < APPENDS_IN_FLIGHT && self.node.has_output() {
            let output = self.node.output();
            self.handle(output);
            self.start_read_round();
        }
        self.hand_out_committed();
        // Whatever waits for the applier is told by a message; all else by the next look.
        let waits = !self.unapplied.is_empty()
            || self.offer_due
            || self.applies.len() >= APPLIES_IN_FLIGHT
            || self.shared.leader().is_none();
        if waits && !self.applies.is_empty() {
            self.shared.raft.progress.want();
            self.look_at_applied();
            self.hand_out_committed();
        }
    }

    /// Takes note of what is applied, up to the next batch that brings more than its index.
    fn look_at_applied(&mut self) {
        let applied = self.shared.raft.progress.applied();
        let plain = |(last, confirm): &(Index, bool)| *last <= applied && !confirm;
        let mut newest = None;
        while let Some((last, _)) = self.applies.pop_front_if(|apply| plain(apply)) {
            newest = Some(last);
        }
        if let Some(index) = newest {
            self.applied(index);
        }
    }

    fn applied(&mut self, index: Index) {
        self.node.applied(index);
        self.campaign_if_alone();
        while let Some((_, waiters)) = self.unapplied.pop_front_if(|(needed, _)| *needed <= index) {
            for waiter in waiters {
                answer(waiter, Ok(()));
            }
        }
        if self.offer_due {
            self.offer_snapshot();
        }
        self.compact(index);
    }

    fn handle(&mut self, output: Output) {
        if let Some(change) = output.leader {
            self.leader_changed(change.leader);
        }
        if !output.messages.is_empty() {
            self.send(output.messages);
        }
        self.commit_state = output.hard_state.or(self.commit_state.take());
        if output.snapshot_wanted.is_some() {
            self.offer_due = true;
            // With batches on their way to the applier, the node may know members of later ones already.
            if self.applies.is_empty() {
                self.offer_snapshot();
            }
        }
        if let Some((number, snapshot)) = output.number.zip(output.snapshot) {
            // Whatever waits here is part of it: it was committed before.
            self.committed.clear();
            self.install = Some((number, snapshot.clone()));
            self.append(Some(number), Some(snapshot), output.entries, true);
        } else if output.must_sync || !output.entries.is_empty() {
            self.append(output.number, None, output.entries, output.must_sync);
        } else if let Some(number) = output.number {
            // A commit index that moved alone need not be on disk (formats-and-peers 1.5): it travels
            // with the next entries, or with the next tick. But what was handed out before it must be
            // on disk before this is acknowledged.
            if self.node.in_flight() > 1 {
                self.append(Some(number), None, Vec::new(), false);
            } else {
                self.node.persisted(number);
            }
        }
        self.committed.extend(output.committed);
        for read in output.reads {
            self.read_index_known(read.context, read.index);
        }
        let (term, committed) = (self.node.term(), self.node.committed());
        let view = &self.shared.raft;
        view.term.store(term.0, Ordering::Release);
        view.committed.store(committed.0, Ordering::Release);
        self.metrics.proposals_committed.set(committed.0 as f64);
    }

    /// Offers followers the state at the applied index; what is sent is made when it is needed, and is
    /// newer.
    fn offer_snapshot(&mut self) {
        let index = self.node.last_applied();
        if let Some(term) = self.node.term_at(index).filter(|_| index.0 > 0) {
            self.offer_due = false;
            let members = self.node.conf_state();
            self.node.set_snapshot(index, term, members);
        }
    }

    /// Whether a follower is being sent a snapshot, or is going on from one.
    fn log_is_held(&mut self) -> bool {
        let shared = &self.shared;
        self.sending.retain(|to, arrived| {
            // Nobody reports what became of a snapshot for a member that is gone.
            arrived.is_none_or(|at| at.elapsed() < HOLD_AFTER_SNAPSHOT)
                && shared.published.load().members.get(*to).is_some()
        });
        !self.sending.is_empty()
    }

    /// Drops from memory what no follower should need.
    fn compact(&mut self, applied: Index) {
        let held = self.log_is_held();
        let keep = self.options.catch_up_entries;
        // Compacting moves memory, so it is done for a thousand entries at a time.
        if !held && applied.0.saturating_sub(self.node.first_index().0) > keep + 1000 {
            self.node.compact(Index(applied.0 - keep));
        }
        let bytes_max = if held { LOG_BYTES_HELD } else { LOG_BYTES };
        if self.node.log_bytes() > bytes_max {
            self.node.compact_to_bytes(bytes_max);
        }
    }

    fn send(&mut self, messages: Vec<raftpb::Message>) {
        let Some(peers) = &self.peers else { return };
        for message in messages.iter().filter(|message| message.r#type == MSG_SNAP) {
            self.sending.insert(MemberId(message.to), None);
        }
        match peers.try_send(Send(messages)) {
            Ok(()) => {}
            Err(SendError::Full(Send(messages))) => {
                for message in messages {
                    self.undelivered(&message);
                }
            }
            // Without a network the member is stopping.
            Err(SendError::Closed(_)) => {}
        }
    }

    fn undelivered(&mut self, message: &raftpb::Message) {
        let to = MemberId(message.to);
        if message.r#type == MSG_SNAP {
            self.sending.remove(&to);
            self.node.report_snapshot(to, false);
        }
        self.node.report_unreachable(to);
    }

    fn append(
        &mut self,
        number: Option<u64>,
        snapshot: Option<raftpb::Snapshot>,
        entries: Vec<raftpb::Entry>,
        must_sync: bool,
    ) {
        let hard_state = self.commit_state.take();
        self.wal.do_send(Append { number, snapshot, entries, hard_state, must_sync });
        self.appends = self.node.in_flight();
    }

    fn leader_changed(&mut self, leader: MemberId) {
        let leading = leader == self.shared.member_id;
        let (changed, led) = self.shared.set_leader(leader);
        self.metrics.has_leader.set(f64::from(u8::from(leader.0 != 0)));
        self.metrics.is_leader.set(f64::from(u8::from(leading)));
        if leader.0 != 0 && changed {
            self.metrics.leader_changes.increment(1);
            let term = self.node.status().term;
            tracing::info!(
                logger = "raft",
                "elected leader {leader} at term {term}, seen by {}",
                self.shared.member_id
            );
        }
        if !leading {
            self.sending.clear();
        }
        if led && !leading {
            self.leases.do_send(LeaderChanged { leading: false, term: self.node.status().term });
        }
        if leader.0 == 0 {
            // A round under way may still be answered, or ends with the next leader.
            return;
        }
        if let Some(round) = self.round.take() {
            self.node.forget_read(round.context);
            for waiter in round.waiters {
                answer(waiter, Err(RequestError::LeaderChanged));
            }
        }
        self.proposals.extend(std::mem::take(&mut self.parked));
        self.propose_all();
        self.propose_changes();
    }

    /// Starts a read-index round for everything that waits, unless one is under way: later reads
    /// wait for the next round (v3-api 6.3).
    fn start_read_round(&mut self) {
        if self.round.is_some() || self.reads.is_empty() || self.shared.leader().is_none() {
            return;
        }
        let context = self.shared.next_id();
        self.round = Some(Round {
            context,
            asked: std::time::Instant::now(),
            waiters: std::mem::take(&mut self.reads),
        });
        self.node.read_index(context);
    }

    fn read_index_known(&mut self, context: u64, index: Index) {
        let Some(round) = self.round.take_if(|round| round.context == context) else { return };
        self.when_applied(index, round.waiters);
    }

    /// Tells `waiters` once everything up to `index` is applied.
    fn when_applied(&mut self, index: Index, waiters: Vec<ReadWaiter>) {
        if index <= self.shared.published.load().applied {
            for waiter in waiters {
                answer(waiter, Ok(()));
            }
            return;
        }
        let at = self.unapplied.partition_point(|(needed, _)| *needed < index);
        match self.unapplied.get_mut(at) {
            Some((needed, others)) if *needed == index => others.extend(waiters),
            _ => self.unapplied.insert(at, (index, waiters)),
        }
    }

    fn hand_out_committed(&mut self) {
        if self.applies.len() >= APPLIES_IN_FLIGHT {
            return;
        }
        let persisted = self.persisted;
        let snapshot = self.install.take_if(|(number, _)| *number <= persisted).map(|(_, it)| it);
        debug_assert!(self.install.is_none() || self.committed.is_empty());
        if snapshot.is_none() && self.committed.is_empty() {
            return;
        }
        let entries = std::mem::take(&mut self.committed);
        let installed = snapshot.as_ref().and_then(|snapshot| snapshot.metadata.as_ref());
        let last = entries.last().map(|entry| entry.index);
        let last = last.or(installed.map(|metadata| metadata.index));
        // What the applier says about these comes by message, and before it says that they are applied.
        let changes = |entry: &raftpb::Entry| entry.r#type != raftpb::EntryType::EntryNormal as i32;
        let confirm = snapshot.is_some() || entries.iter().any(changes);
        self.applies.push_back((Index(last.unwrap_or_default()), confirm));
        let waiters = std::mem::take(&mut self.waiters);
        self.applier.do_send(Apply { snapshot, entries, waiters, confirm });
    }

    /// A cluster of one need not wait for an election timeout. It can campaign once every
    /// configuration change in its log is applied.
    fn campaign_if_alone(&mut self) {
        let alone = self.node.conf_state().voters == [self.shared.member_id.0];
        if alone
            && self.shared.leader().is_none()
            && self.node.last_applied() == self.node.committed()
        {
            self.node.campaign();
        }
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        let now = std::time::Instant::now();
        let since = now - std::mem::replace(&mut self.ticked, now);
        if since > 2 * self.options.tick && self.node.is_leader() {
            self.metrics.heartbeat_send_failures.increment(1);
            tracing::warn!(
                took = ?since,
                "heartbeat-interval" = ?self.options.tick,
                "leader failed to send out heartbeat on time; took too long, leader is overloaded likely from slow disk"
            );
        }
        self.node.tick();
        self.shared.raft.ticked.store(self.shared.now().0, Ordering::Release);
        if self.commit_state.is_some() && self.appends == 0 && !self.exit.failed() {
            self.append(None, None, Vec::new(), false);
        }
        self.parked.retain(|proposal| !proposal.reply.is_closed());
        self.parked_changes.retain(|change| !change.reply.is_closed());
        self.reads.retain(|waiter| !waiter.is_closed());
        // Without a quorum nothing is handed on, and those who gave up are replaced by others.
        self.waiters.retain(|(_, waiter)| !waiter.is_closed());
        self.unapplied.retain_mut(|(_, waiters)| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
        if let Some(round) = &mut self.round
            && round.asked.elapsed() >= READ_RETRY
        {
            self.metrics.slow_read_indexes.increment(1);
            round.asked = std::time::Instant::now();
            self.node.retry_reads();
        }
        if let Some(round) = &mut self.round {
            round.waiters.retain(|waiter| !waiter.is_closed());
            if round.waiters.is_empty() {
                self.node.forget_read(round.context);
                self.round = None;
            }
        }
        self.drive_soon(ctx);
    }
}

impl Actor for RaftActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(self.options.tick, Self::tick);
        self.campaign_if_alone();
        self.drive_soon(ctx);
    }
}

impl Handler<Drive> for RaftActor {
    type Result = ();

    fn handle(&mut self, _: Drive, _: &mut Self::Context) {
        self.drive_due = false;
        self.drive();
    }
}

impl Handler<Requests> for RaftActor {
    type Result = ();

    fn handle(&mut self, requests: Requests, ctx: &mut Self::Context) {
        if self.abandoned {
            return;
        }
        self.work += requests.proposals.len();
        self.proposals.extend(requests.proposals);
        self.reads.extend(requests.reads);
        self.drive_soon(ctx);
    }
}

impl Handler<ChangeConf> for RaftActor {
    type Result = ();

    fn handle(&mut self, ChangeConf { change, reply }: ChangeConf, ctx: &mut Self::Context) {
        if self.abandoned {
            return;
        }
        self.parked_changes.push_back(ChangeConf { change, reply });
        self.propose_changes();
        self.drive_soon(ctx);
    }
}

impl Handler<Step> for RaftActor {
    type Result = ();

    fn handle(&mut self, Step(messages): Step, ctx: &mut Self::Context) {
        self.work += messages.len();
        for message in messages {
            let from = MemberId(message.from);
            match self.node.step(message) {
                Ok(()) => {}
                Err(error @ StepError::CommitBeyondLog { .. }) => {
                    return self.exit.fail("raft", &error);
                }
                Err(error) => {
                    tracing::debug!(%from, %error, "dropped a message from a peer");
                }
            }
        }
        self.drive_soon(ctx);
    }
}

impl Handler<Unreachable> for RaftActor {
    type Result = ();

    fn handle(&mut self, Unreachable(id): Unreachable, ctx: &mut Self::Context) {
        self.node.report_unreachable(id);
        self.drive_soon(ctx);
    }
}

impl Handler<SnapshotDone> for RaftActor {
    type Result = ();

    fn handle(&mut self, SnapshotDone { to, ok }: SnapshotDone, ctx: &mut Self::Context) {
        match ok {
            true => self.sending.insert(to, Some(Instant::now())),
            false => self.sending.remove(&to),
        };
        self.node.report_snapshot(to, ok);
        self.drive_soon(ctx);
    }
}

impl Handler<GetStatus> for RaftActor {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        self.look_at_applied();
        MessageResult(self.node.status())
    }
}

impl Handler<Persisted> for RaftActor {
    type Result = ();

    fn handle(&mut self, Persisted(number): Persisted, ctx: &mut Self::Context) {
        self.persisted = number;
        self.node.persisted(number);
        self.appends = self.node.in_flight();
        self.drive_soon(ctx);
    }
}

impl Handler<Applied> for RaftActor {
    type Result = ();

    fn handle(&mut self, Applied(index): Applied, ctx: &mut Self::Context) {
        // A look may have been quicker.
        let before = self.applies.len();
        self.applies.retain(|(last, _)| *last > index);
        if self.applies.len() < before {
            self.applied(index);
        }
        self.drive_soon(ctx);
    }
}

impl Handler<ConfChanged> for RaftActor {
    type Result = ();

    fn handle(&mut self, changed: ConfChanged, ctx: &mut Self::Context) {
        let ConfChanged { index, change, answer: waiting } = changed;
        if let Err(error) = self.node.apply_conf_change(index, change.as_ref()) {
            return self.exit.fail("raft", &error);
        }
        if let Some((proposer, result)) = waiting {
            answer(proposer, result);
        }
        self.drive_soon(ctx);
    }
}

impl Handler<AdvanceTicks> for RaftActor {
    type Result = ();

    fn handle(&mut self, AdvanceTicks(ticks): AdvanceTicks, ctx: &mut Self::Context) {
        if self.shared.leader().is_none() {
            self.node.advance_ticks(ticks);
            self.drive_soon(ctx);
        }
    }
}

impl Handler<TransferLeader> for RaftActor {
    type Result = ();

    fn handle(&mut self, TransferLeader(to): TransferLeader, ctx: &mut Self::Context) {
        self.node.transfer_leader(to);
        self.drive_soon(ctx);
    }
}

impl Handler<AwaitApplied> for RaftActor {
    type Result = ();

    fn handle(&mut self, AwaitApplied(waiter): AwaitApplied, ctx: &mut Self::Context) {
        if !self.abandoned {
            self.when_applied(self.node.committed(), vec![waiter]);
            self.drive_soon(ctx);
        }
    }
}

impl Handler<AsLeader> for RaftActor {
    type Result = ();

    fn handle(&mut self, AsLeader(proposals): AsLeader, ctx: &mut Self::Context) {
        if self.node.is_leader() && !self.abandoned {
            // At once: a message in the mailbox may end this member's leadership.
            self.proposals.extend(proposals);
            self.propose_all();
            self.drive_soon(ctx);
        }
    }
}

impl Handler<Abandon> for RaftActor {
    type Result = ();

    fn handle(&mut self, _: Abandon, _: &mut Self::Context) {
        self.abandoned = true;
        // Whoever waits is told by the end of its channel.
        self.proposals.clear();
        self.parked.clear();
        self.parked_changes.clear();
        self.waiters.clear();
        self.reads.clear();
        self.unapplied.clear();
        if let Some(round) = self.round.take() {
            self.node.forget_read(round.context);
        }
        self.applier.do_send(Abandon);
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::actors::exit::Reason;
    use crate::actors::rig::{LOCAL, PATIENCE, Rig};
    use crate::core::membership::{ChangeContext, Member};

    /// etcd's number of a proposal that travels to the leader.
    const MSG_PROP: u32 = 2;

    /// A follower of a leader that the test plays.
    async fn follower(dir: &std::path::Path) -> Rig {
        let mut rig = Rig::start(dir, false);
        rig.found();
        rig.applied().await;
        rig
    }

    fn proposal(id: u64) -> (Proposal, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        (Proposal { id, data: id.to_string().into(), reply }, answer)
    }

    /// The entries that the follower hands on next.
    async fn handed_on(rig: &mut Rig) -> Vec<raftpb::Entry> {
        loop {
            let sent = tokio::time::timeout(PATIENCE, rig.sent.recv()).await;
            let message = sent.expect("a message in time").expect("a network");
            if message.r#type == MSG_PROP {
                return message.entries;
            }
        }
    }

    fn committed(rig: &mut Rig, change: &raftpb::ConfChange) {
        let entry = raftpb::Entry {
            r#type: raftpb::EntryType::EntryConfChange as i32,
            term: 1,
            index: rig.last().0 + 1,
            data: change.encode_to_vec().into(),
        };
        rig.append(vec![entry]);
    }

    /// A new leader has given the leases more time than the one before it knows.
    #[test]
    fn what_only_a_leader_may_propose_is_not_handed_on() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut rig = follower(dir.path()).await;
            let (revoke, refused) = proposal(100);
            let (put, _answer) = proposal(101);
            rig.raft.do_send(AsLeader(vec![revoke]));
            rig.raft.do_send(Requests { proposals: vec![put], reads: Vec::new() });
            assert!(refused.await.is_err());
            let entries = handed_on(&mut rig).await;
            assert_eq!(entries.iter().map(|e| &e.data[..]).collect::<Vec<_>>(), [b"101"]);
            rig.stop().await;
        });
    }

    /// The applier tells of most batches only where it is asked to.
    #[test]
    fn whoever_waits_for_the_applier_is_told() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut rig = follower(dir.path()).await;
            for _ in 0..200 {
                let entry =
                    raftpb::Entry { term: 1, index: rig.last().0 + 1, ..Default::default() };
                rig.append(vec![entry]);
                let committed = rig.last();
                let (waiter, told) = oneshot::channel();
                // Behind the append in the mailbox, so that it is known as committed.
                rig.raft.do_send(AwaitApplied(waiter));
                let told = tokio::time::timeout(PATIENCE, told).await.expect("told in time");
                assert!(told.expect("an answer").is_ok());
                assert!(rig.shared.published.load().applied >= committed);
            }
            let status = rig.raft.send(GetStatus).await.unwrap();
            assert_eq!(status.applied, rig.last());
            rig.stop().await;
        });
    }

    #[test]
    fn much_is_handed_on_in_several_messages() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut rig = follower(dir.path()).await;
            let (mut proposals, mut answers) = (Vec::new(), Vec::new());
            for (id, bytes) in [(100, 600), (101, 400), (102, 400), (103, 1500), (104, 1)] {
                let (reply, answer) = oneshot::channel();
                proposals.push(Proposal { id, data: vec![0; bytes << 10].into(), reply });
                answers.push(answer);
            }
            rig.raft.do_send(Requests { proposals, reads: Vec::new() });
            let mut sizes = Vec::new();
            while sizes.len() < 4 {
                let entries = handed_on(&mut rig).await;
                sizes.push(entries.iter().map(|e| e.data.len() >> 10).collect::<Vec<_>>());
            }
            assert_eq!(sizes, [vec![600, 400], vec![400], vec![1500], vec![1]]);
            rig.stop().await;
        });
    }

    #[test]
    fn a_proposer_of_a_change_finds_it_made() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut rig = follower(dir.path()).await;
            let member =
                Member { id: 3, peer_urls: vec!["http://h:3".into()], ..Member::default() };
            let context = ChangeContext { member, is_promote: false };
            let change = raftpb::ConfChange {
                id: 100,
                r#type: raftpb::ConfChangeType::AddLearnerNode as i32,
                node_id: 3,
                context: serde_json::to_vec(&context).unwrap().into(),
            };
            for refused in [false, true] {
                let (reply, answer) = oneshot::channel();
                rig.raft.do_send(ChangeConf { change: change.clone(), reply });
                let entries = handed_on(&mut rig).await;
                assert_eq!(entries[0].data[..], change.encode_to_vec());
                committed(&mut rig, &change);
                assert_eq!(answer.await.unwrap().is_err(), refused);
                let status = rig.raft.send(GetStatus).await.unwrap();
                assert_eq!(status.conf_state.learners, [3]);
                assert!(rig.shared.published.load().members.get(MemberId(3)).is_some());
            }
            rig.stop().await;
        });
    }

    #[test]
    fn a_removed_member_stops_after_a_while_and_answers_those_who_wait() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut rig = follower(dir.path()).await;
            let (put, waiting) = proposal(100);
            rig.raft.do_send(Requests { proposals: vec![put], reads: Vec::new() });
            handed_on(&mut rig).await;
            let change = raftpb::ConfChange {
                r#type: raftpb::ConfChangeType::RemoveNode as i32,
                node_id: LOCAL,
                ..Default::default()
            };
            let removed = std::time::Instant::now();
            committed(&mut rig, &change);
            let reason = tokio::time::timeout(PATIENCE, rig.exits.recv()).await;
            assert_eq!(reason.expect("a reason in time"), Some(Reason::Removed));
            assert!(removed.elapsed() >= Duration::from_secs(1));
            rig.raft.do_send(Abandon);
            assert!(waiting.await.is_err());
            let (late, refused) = proposal(101);
            rig.raft.do_send(Requests { proposals: vec![late], reads: Vec::new() });
            assert!(refused.await.is_err());
            rig.stop().await;
        });
    }
}
