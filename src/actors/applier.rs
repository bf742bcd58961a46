//! The applier: committed entries in index order, once; replies, events, engine batches.
//!
//! in:  `Apply` from actors/raft.rs, `Committed` from actors/committer.rs, `CompactSlice` from
//!      actors/compactor.rs, `Checkpoint` from transport and the daemon, `Flush` from actors/export.rs
//! out: `Applied`, `ConfChanged` to actors/raft.rs; `Events` to actors/watch.rs; `LeaseChanges` to
//!      actors/lease.rs; `Members` to the peer network; `Commit` to actors/committer.rs; `Compacted` to actors/compactor.rs;
//!      `TakeSnapshot` to actors/snapshot.rs
//!
//! After each batch of entries: publish, then tell the followers of the store, then answer callers. So
//! a caller that has its answer finds its write in every read, watch and lease call that it makes next.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use engine_api::Durability;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::{KeyValueBytes, raftpb};
use rustc_hash::FxHasher;
use tokio::sync::oneshot;

use crate::actors::answer;
use crate::actors::committer::{BatchCommitter, Commit, Committed};
use crate::actors::compactor::Compacted;
use crate::actors::exit::Exit;
use crate::actors::lease::{LeaseChanges, Promoted};
use crate::actors::peers::Members;
use crate::actors::raft::{
    Abandon, Answer, Answered, Applied, ConfChanged, Proposal, RaftActor, RequestError, Requests,
};
use crate::actors::shared::{Published, Shared};
use crate::actors::snapshot::TakeSnapshot;
use crate::actors::watch::Events;
use crate::core::apply::{Effects, Kind, Machine, Outcome, Reply};
use crate::core::command::{Command, Request};
use crate::core::event::EventKind;
use crate::core::membership::{Membership, Version};
use crate::core::mvcc::Values;
use crate::core::mvcc::compact::{Compaction, Sliced};
use crate::core::quota::Quota;
use crate::core::types::{Index, MemberId, Term};
use crate::metrics::{Metrics, RequestKind};

/// Committed entries, and who waits for them (or for later ones).
#[derive(Message)]
#[rtype(result = "()")]
pub struct Apply {
    pub entries: Vec<raftpb::Entry>,
    pub waiters: Vec<(u64, oneshot::Sender<Answer>)>,
}

/// Drops up to this many superseded revisions.
#[derive(Message)]
#[rtype(result = "Sliced")]
pub struct CompactSlice {
    pub at: i64,
    /// Begin with the first key.
    pub first: bool,
    pub limit: usize,
}

/// Brings everything applied so far to the disk; answers the index that is durable.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Checkpoint(pub oneshot::Sender<Index>);

/// Brings everything applied so far into the engine, where a view shows it; answers the index. It need
/// not outlive a crash.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Flush(pub oneshot::Sender<Index>);

/// When a batch for the engine is cut, and what else the applier is told once.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub batch_interval: Duration,
    pub batch_limit: usize,
    pub quota: Quota,
    /// Applied entries between two snapshots.
    pub snapshot_count: u64,
    /// The index of the newest snapshot at start.
    pub snapshot_index: Index,
    pub warning_apply: Duration,
}

/// Uncommitted changes at which the applier waits for the engine: ten batches.
const OVERLAY_BATCHES: usize = 10;

/// A batch is made durable if none was for this long: an engine may be unable to use space again that
/// was freed since its last durable commit, and a restart replays less.
const DURABLE_AFTER: Duration = Duration::from_secs(10);

/// How long a member that was removed goes on (v3-api 3.10).
const REMOVED_STOPS_AFTER: Duration = Duration::from_secs(1);

type Waiters = HashMap<u64, oneshot::Sender<Answer>, BuildHasherDefault<FxHasher>>;

/// What the applier is connected to.
pub struct Links {
    pub shared: Arc<Shared>,
    pub raft: Addr<RaftActor>,
    pub committer: Addr<BatchCommitter>,
    pub watch: Recipient<Events>,
    pub leases: Recipient<LeaseChanges>,
    pub promoted: Recipient<Promoted>,
    pub compactor: Recipient<Compacted>,
    pub snapshotter: Recipient<TakeSnapshot>,
    /// The peer network.
    pub peers: Recipient<Members>,
    pub exit: Exit,
}

/// Owns the state machine.
pub struct Applier {
    machine: Machine,
    links: Links,
    options: Options,
    metrics: &'static Metrics,
    waiters: Waiters,
    /// Entries not applied yet because the overlay is full.
    held: Vec<Apply>,
    compaction: Option<Compaction>,
    /// As it was shown last.
    cluster_version: Option<Version>,
    committing: bool,
    cut_due: bool,
    last_durable: Instant,
    /// The next batch must reach the disk.
    durable_wanted: bool,
    /// Callers whose checkpoint the next cut is.
    checkpoints: Vec<oneshot::Sender<Index>>,
    /// Callers whose flush the next cut is.
    flushes: Vec<oneshot::Sender<Index>>,
    in_flight: InFlight,
    snapshot_index: Index,
    snapshot_wanted: bool,
}

/// The batch that the committer has.
#[derive(Default)]
struct InFlight {
    term: Term,
    members: Option<Arc<Membership>>,
    checkpoints: Vec<oneshot::Sender<Index>>,
    flushes: Vec<oneshot::Sender<Index>>,
}

impl Applier {
    /// An applier that goes on where `machine` stands.
    pub fn new(machine: Machine, links: Links, options: Options) -> Self {
        Applier {
            cluster_version: machine.members.cluster_version,
            machine,
            links,
            options,
            metrics: Metrics::global(),
            waiters: Waiters::default(),
            held: Vec::new(),
            compaction: None,
            committing: false,
            cut_due: false,
            last_durable: Instant::now(),
            durable_wanted: false,
            checkpoints: Vec::new(),
            flushes: Vec::new(),
            in_flight: InFlight::default(),
            snapshot_index: options.snapshot_index,
            snapshot_wanted: false,
        }
    }

    fn apply(&mut self, apply: Apply, ctx: &mut Context<Self>) {
        let Some(last) = apply.entries.last().map(|entry| Index(entry.index)) else { return };
        self.waiters.extend(apply.waiters);
        let engine = self.links.shared.published.load().engine.clone();
        let values = Values::new(&*engine);
        let size = || engine.size().unwrap_or(0);
        let mut effects = Effects::default();
        let mut answers: Vec<(u64, Result<Reply, RequestError>, Term)> = Vec::new();
        let mut changes = Vec::new();
        for entry in &apply.entries {
            let started = Instant::now();
            let waiters = &self.waiters;
            let outcome = self.machine.apply(
                &values,
                entry,
                |id| waiters.contains_key(&id),
                self.options.quota,
                size,
                &mut effects,
            );
            match outcome {
                Ok(None) => {}
                Ok(Some(outcome)) => {
                    self.account(&outcome, started.elapsed());
                    self.settle(entry, outcome, &mut answers, &mut changes);
                }
                Err(error) => {
                    // Whatever was applied of this batch is in the log; nothing of it is answered.
                    return self.links.exit.fail("applier", &error);
                }
            }
        }
        drop(values);
        self.publish(&effects);
        self.spread(effects);
        for (id, result, term) in answers {
            let Some(waiter) = self.waiters.remove(&id) else { continue };
            // A caller that gave up needs no answer.
            answer(waiter, result.map(|reply| Answered { reply, term }));
        }
        // After the publication, so that the proposer finds the members of its change; before `Applied`,
        // as the node has to know them then.
        for change in changes {
            self.conf_changed(change, ctx);
        }
        self.links.raft.do_send(Applied(last));
        self.metrics.proposals_applied.set(last.0 as f64);
        self.after_change(ctx);
    }

    fn account(&self, outcome: &Outcome, took: Duration) {
        let Kind::Request(name) = &outcome.kind else { return };
        let kind = RequestKind::of(name);
        self.metrics.apply_seconds(kind, outcome.result.is_ok()).record(took);
        match &outcome.result {
            Ok(Reply::Put(_)) => self.metrics.mvcc_put.increment(1),
            Ok(Reply::DeleteRange(_)) => self.metrics.mvcc_delete.increment(1),
            Ok(Reply::Txn(reply)) => self.metrics.count_txn(reply),
            _ => {}
        }
        if took >= self.options.warning_apply {
            self.metrics.slow_apply.increment(1);
            tracing::warn!(
                took = %crate::config::duration::GoDuration::from(took),
                "expected-duration" = %crate::config::duration::GoDuration::from(self.options.warning_apply),
                request = name,
                success = outcome.result.is_ok(),
                "apply request took too long"
            );
        }
    }

    /// Decides what an entry's caller is told, and tells raft and the lessor what concerns them.
    fn settle(
        &mut self,
        entry: &raftpb::Entry,
        outcome: Outcome,
        answers: &mut Vec<(u64, Result<Reply, RequestError>, Term)>,
        changes: &mut Vec<ConfChanged>,
    ) {
        let term = Term(entry.term);
        match outcome.kind {
            Kind::Empty => self.links.promoted.do_send(Promoted(term)),
            Kind::ConfChange(change) => {
                let result = outcome.result.map_err(RequestError::Apply);
                let result = result.map(|reply| Answered { reply, term });
                let waiter = self.waiters.remove(&outcome.id);
                let answer = waiter.map(|waiter| (waiter, result));
                return changes.push(ConfChanged { index: Index(entry.index), change, answer });
            }
            Kind::Request(_) => {}
        }
        if outcome.id == 0 {
            return;
        }
        if outcome.over_quota {
            self.raise_nospace(outcome.id);
        } else {
            answers.push((outcome.id, outcome.result.map_err(RequestError::Apply), term));
        }
    }

    fn conf_changed(&mut self, changed: ConfChanged, ctx: &mut Context<Self>) {
        if let Some(change) = &changed.change {
            let remove = change.r#type == raftpb::ConfChangeType::RemoveNode as i32;
            if remove && change.node_id == self.links.shared.member_id.0 {
                // Others, and those who wait here, learn of it first.
                ctx.run_later(REMOVED_STOPS_AFTER, |this, _| this.links.exit.removed());
            }
        }
        self.links.raft.do_send(changed);
    }

    /// Raises the alarm for this member; the caller is answered when it is in force.
    fn raise_nospace(&mut self, id: u64) {
        let Some(mut waiter) = self.waiters.remove(&id) else { return };
        let alarm = self.links.shared.next_id();
        let request = pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Activate as i32,
            member_id: self.links.shared.member_id.0,
            alarm: pb::AlarmType::Nospace as i32,
        };
        let data = Command::new(alarm, Request::Alarm(request)).encode();
        let (reply, raised) = oneshot::channel();
        let proposals = vec![Proposal { id: alarm, data, reply }];
        self.links.raft.do_send(Requests { proposals, reads: Vec::new() });
        actix::spawn(async move {
            tokio::select! {
                // Whatever becomes of the alarm, this caller's request has exceeded the quota.
                _ = raised => answer(waiter, Err(RequestError::OverQuota)),
                () = waiter.closed() => {}
            }
        });
    }

    fn publish(&mut self, effects: &Effects) {
        let shared = &self.links.shared;
        let previous = shared.published.load_full();
        let members = effects.members || effects.cluster_version;
        let engine = previous.engine.clone();
        let kept = Some((&*previous, effects.alarms, members));
        let published = Published::of(&self.machine, engine, kept);
        shared.published.store(Arc::new(published));
    }

    /// Tells everyone who follows the store. Their mailboxes take it before any caller is answered.
    fn spread(&mut self, effects: Effects) {
        let store = self.machine.store.now();
        if !effects.compactions.is_empty() || !effects.events.is_empty() {
            self.metrics.current_revision.set(store.revision() as f64);
            self.metrics.keys.set(store.live_keys() as f64);
            let puts = effects.events.iter().filter(|e| matches!(e.kind, EventKind::Put { .. }));
            let bytes =
                |kv: &KeyValueBytes| kv.parse().map_or(0, |kv| kv.key.len() + kv.value.len());
            let bytes: usize = puts.map(|event| bytes(&event.kv)).sum();
            self.metrics.total_put_size.increment(bytes as f64);
            self.links.watch.do_send(self.links.shared.unwatched.pack(
                store.revision(),
                effects.events,
                effects.compactions.last().map(|scheduled| scheduled.at),
            ));
        }
        if !effects.leases.is_empty() {
            self.links.leases.do_send(LeaseChanges(effects.leases));
        }
        for scheduled in effects.compactions {
            self.metrics.compact_revision.set(scheduled.at as f64);
            self.links.compactor.do_send(Compacted(scheduled));
        }
        if effects.members {
            let members = self.links.shared.published.load().members.clone();
            self.links.peers.do_send(Members(members));
        }
        if effects.alarms {
            self.show_alarms();
        }
        if effects.cluster_version
            && let Some(version) = self.machine.members.cluster_version
        {
            let text = |version: Version| format!("{}.{}", version.major, version.minor);
            let shared = &self.links.shared;
            match self.cluster_version.replace(version) {
                None => tracing::info!(
                    "cluster-id" = %shared.cluster_id,
                    "local-member-id" = %shared.member_id,
                    "cluster-version" = text(version),
                    "set initial cluster version"
                ),
                Some(from) => {
                    self.metrics.cluster_version.with(&[&text(from)]).set(0.0);
                    tracing::info!(
                        "cluster-id" = %shared.cluster_id,
                        "local-member-id" = %shared.member_id,
                        from = text(from),
                        to = text(version),
                        "updated cluster version"
                    );
                }
            }
            self.metrics.cluster_version.with(&[&text(version)]).set(1.0);
        }
    }

    fn show_alarms(&self) {
        for kind in [pb::AlarmType::Nospace, pb::AlarmType::Corrupt] {
            for member in self.machine.members.members() {
                let id = MemberId(member.id);
                let raised = self.machine.alarms.has(id, kind);
                let gauge = self.metrics.alarms.with(&[&id.to_string(), kind.as_str_name()]);
                gauge.set(f64::from(u8::from(raised)));
            }
        }
    }

    /// Cuts a batch now or in time, after anything that waits to be committed.
    fn after_change(&mut self, ctx: &mut Context<Self>) {
        let since_snapshot = self.machine.applied().0 - self.snapshot_index.0;
        if since_snapshot > self.options.snapshot_count && !self.snapshot_wanted {
            self.snapshot_wanted = true;
            self.durable_wanted = true;
        }
        let (waiting, dirty) = self.machine.waiting();
        self.metrics.overlay_writes.set(self.machine.store.now().uncommitted() as f64);
        let due = self.durable_wanted || !self.flushes.is_empty();
        if self.committing || !(dirty || due) {
            return;
        }
        if waiting >= self.options.batch_limit || due {
            self.cut();
        } else if !self.cut_due {
            self.cut_due = true;
            ctx.run_later(self.options.batch_interval, |this, _| {
                this.cut_due = false;
                if !this.committing && this.machine.waiting().1 {
                    this.cut();
                }
            });
        }
    }

    fn cut(&mut self) {
        let (batch, index) = self.machine.cut();
        let due = self.durable_wanted || self.last_durable.elapsed() >= DURABLE_AFTER;
        let durability = if due {
            self.last_durable = Instant::now();
            Durability::Durable
        } else {
            Durability::Buffered
        };
        self.durable_wanted = false;
        self.committing = true;
        let now = self.links.shared.published.load();
        self.in_flight = InFlight {
            term: self.machine.term(),
            members: Some(now.members.clone()),
            checkpoints: std::mem::take(&mut self.checkpoints),
            flushes: std::mem::take(&mut self.flushes),
        };
        let engine = now.engine.clone();
        self.links.committer.do_send(Commit { engine, batch, index, durability });
        // The moved changes stay readable: the next publication shows them as being committed.
    }

    fn overlay_is_full(&self) -> bool {
        self.committing
            && self.machine.store.pending() >= OVERLAY_BATCHES * self.options.batch_limit
    }
}

impl Actor for Applier {
    type Context = Context<Self>;
}

impl Handler<Apply> for Applier {
    type Result = ();

    fn handle(&mut self, apply: Apply, ctx: &mut Self::Context) {
        if self.links.exit.failed() {
            return;
        }
        if !self.held.is_empty() || self.overlay_is_full() {
            self.held.push(apply);
        } else {
            self.apply(apply, ctx);
        }
    }
}

impl Handler<Committed> for Applier {
    type Result = ();

    fn handle(&mut self, committed: Committed, ctx: &mut Self::Context) {
        self.committing = false;
        self.machine.store.committed();
        self.publish(&Effects::default());
        let done = std::mem::take(&mut self.in_flight);
        for flush in done.flushes {
            answer(flush, committed.index);
        }
        if committed.durable {
            for checkpoint in done.checkpoints {
                answer(checkpoint, committed.index);
            }
            if self.snapshot_wanted
                && committed.index > self.snapshot_index
                && let Some(members) = done.members
            {
                self.snapshot_wanted = false;
                self.snapshot_index = committed.index;
                let (index, term) = (committed.index, done.term);
                self.links.snapshotter.do_send(TakeSnapshot { index, term, members });
            }
        }
        self.waiters.retain(|_, waiter| !waiter.is_closed());
        for apply in std::mem::take(&mut self.held) {
            self.handle(apply, ctx);
        }
        self.after_change(ctx);
    }
}

impl Handler<Abandon> for Applier {
    type Result = ();

    fn handle(&mut self, _: Abandon, _: &mut Self::Context) {
        self.waiters.clear();
        for apply in &mut self.held {
            apply.waiters.clear();
        }
    }
}

impl Handler<Checkpoint> for Applier {
    type Result = ();

    fn handle(&mut self, Checkpoint(reply): Checkpoint, _: &mut Self::Context) {
        self.checkpoints.push(reply);
        self.durable_wanted = true;
        if !self.committing {
            self.cut();
        }
    }
}

impl Handler<Flush> for Applier {
    type Result = ();

    fn handle(&mut self, Flush(reply): Flush, _: &mut Self::Context) {
        self.flushes.push(reply);
        if !self.committing {
            self.cut();
        }
    }
}

impl Handler<CompactSlice> for Applier {
    type Result = MessageResult<CompactSlice>;

    fn handle(&mut self, slice: CompactSlice, ctx: &mut Self::Context) -> Self::Result {
        let mut compaction = match self.compaction.take() {
            Some(compaction) if !slice.first && compaction.at() == slice.at => compaction,
            _ => Compaction::new(slice.at),
        };
        let (store, batch) = self.machine.maintenance();
        let sliced = compaction.slice(store, batch, slice.limit * 10, slice.limit);
        if !sliced.done {
            self.compaction = Some(compaction);
        }
        if sliced.dropped > 0 {
            self.publish(&Effects::default());
        }
        self.after_change(ctx);
        MessageResult(sliced)
    }
}
