//! The applier: committed entries in index order, once; replies, events, engine batches.
//!
//! in:  `Apply` (entries, or a snapshot in the place of all before) from actors/raft.rs, `Committed` from actors/committer.rs, `CompactSlice` from
//!      actors/compactor.rs, `Checkpoint` from transport and the daemon, `Flush` from actors/export.rs
//! out: `Applied`, `ConfChanged` to actors/raft.rs; `Events` to actors/watch.rs; `LeaseChanges` to
//!      actors/lease.rs; `Members` to the peer network; `Commit` to actors/committer.rs; `Compacted` to actors/compactor.rs;
//!      `TakeSnapshot` to actors/snapshot.rs; logins and what ends them to a [`TokenSink`]
//!
//! After each batch of entries: publish, then tell the followers of the store, then answer callers. So
//! a caller that has its answer finds its write in every read, watch and lease call that it makes next.

use std::collections::{BTreeSet, HashMap};
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
use crate::actors::compactor::{Compacted, StoreReplaced};
use crate::actors::exit::Exit;
use crate::actors::lease::{LeaseChanges, LeasesReplaced, Promoted};
use crate::actors::peers::Members;
use crate::actors::raft::{
    Abandon, Answer, Answered, Applied, ConfChanged, Proposal, RaftActor, RequestError, Requests,
};
use crate::actors::shared::{Published, Shared};
use crate::actors::snapshot::{Installed, TakeSnapshot};
use crate::actors::watch::Events;
use crate::core::apply::{Effects, Kind, Machine, Outcome, Reply, TokenChange};
use crate::core::command::Command;
use crate::core::describe::Described;
use crate::core::event::EventKind;
use crate::core::membership::{ChangeContext, Membership, Version};
use crate::core::mvcc::Values;
use crate::core::mvcc::compact::{Compaction, Sliced};
use crate::core::quota::{Limit, Quota};
use crate::core::types::{Index, MemberId, Term};
use crate::logging;
use crate::metrics::{Metrics, RequestKind};
use crate::storage::install::{InstallError, Installer};

/// Committed entries, and who waits for them (or for later ones).
#[derive(Message)]
#[rtype(result = "()")]
pub struct Apply {
    /// Received from a leader and recorded in the log: takes the place of all state, before `entries`.
    pub snapshot: Option<raftpb::Snapshot>,
    pub entries: Vec<raftpb::Entry>,
    pub waiters: Vec<(u64, oneshot::Sender<Answer>)>,
    /// Answer with `Applied`, behind whatever else this brings raft; else raft looks for itself, or asks
    /// to be told (`ApplyProgress`).
    pub confirm: bool,
}

/// Drops up to this many superseded revisions, for about a millisecond at most: so long, entries that
/// come meanwhile wait.
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

/// Who is told of logins and of what ends them, in the order of the log, before any of it can be read.
pub trait TokenSink: Send + Sync {
    /// A token came or went.
    fn changed(&self, change: &TokenChange);
    /// Users were replaced: the tokens of those that `lasts` denies are not good any more.
    fn replaced(&self, lasts: &dyn Fn(&str) -> bool);
}

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

/// How long a slice of a compaction may keep entries from being applied: well below the time of a disk's
/// sync, which every write waits for.
const SLICE_TIME: Duration = Duration::from_millis(1);

/// Revisions dropped, and a tenth of the keys looked at, between two looks at the clock: some 100 us.
const SLICE_STEP: usize = 64;

/// A batch is made durable if none was for this long: an engine may be unable to use space again that
/// was freed since its last durable commit, and a restart replays less.
const DURABLE_AFTER: Duration = Duration::from_secs(10);

/// How long an engine that is about to be replaced is waited for before it is told to give no more space
/// back, and told again.
const RECLAIM_ENDS: Duration = Duration::from_millis(10);

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
    pub leases_replaced: Recipient<LeasesReplaced>,
    pub compactor: Recipient<Compacted>,
    pub store_replaced: Recipient<StoreReplaced>,
    pub snapshotter: Recipient<TakeSnapshot>,
    pub installed: Recipient<Installed>,
    pub installer: Installer,
    /// The peer network.
    pub peers: Recipient<Members>,
    pub tokens: Arc<dyn TokenSink>,
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
    /// The labels of the gauges that stand at 1.
    alarms_shown: BTreeSet<[String; 2]>,
    /// Slices of compactions below it are of a store that was replaced.
    compaction_floor: i64,
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
            alarms_shown: BTreeSet::new(),
            compaction: None,
            compaction_floor: 0,
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
        self.waiters.extend(apply.waiters);
        let mut last = None;
        if let Some(snapshot) = &apply.snapshot {
            if let Err(error) = self.install(snapshot) {
                return self.links.exit.fail("snapshot", &error);
            }
            last = snapshot.metadata.as_ref().map(|metadata| Index(metadata.index));
            let local = self.links.shared.member_id;
            if self.machine.members.removed().any(|id| id == local) {
                self.stop_removed(ctx);
            }
        }
        last = apply.entries.last().map(|entry| Index(entry.index)).or(last);
        let Some(last) = last else { return };
        let engine = self.links.shared.published.load().engine.clone();
        let values = Values::new(&*engine);
        let shared = self.links.shared.clone();
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
                || shared.sizes(),
                &mut effects,
            );
            match outcome {
                Ok(None) => {}
                Ok(Some(outcome)) => {
                    self.account(entry, &outcome, started.elapsed());
                    self.settle(entry, outcome, &mut answers, &mut changes);
                }
                Err(error) => {
                    // Whatever was applied of this batch is in the log; nothing of it is answered.
                    return self.links.exit.fail("applier", &error);
                }
            }
        }
        drop(values);
        // Whoever reads that the login is applied knows its token as well.
        for change in &effects.tokens {
            self.links.tokens.changed(change);
        }
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
        if self.links.shared.raft.progress.advance(last) || apply.confirm {
            self.links.raft.do_send(Applied(last));
        }
        self.metrics.proposals_applied.set(last.0 as f64);
        self.after_change(ctx);
    }

    /// Takes over the state that a leader has sent: engine, store, leases, alarms, members. Whoever reads
    /// the old one finishes with it. Those who wait for an entry that it covers are not told: what became of
    /// it is not known here.
    fn install(&mut self, snapshot: &raftpb::Snapshot) -> Result<(), InstallError> {
        let metadata = snapshot.metadata.clone().unwrap_or_default();
        let progress = |message: &str, applied: Index, index: Index| {
            tracing::info!(
                "current-snapshot-index" = index.0,
                "current-applied-index" = applied.0,
                "incoming-leader-snapshot-index" = metadata.index,
                "incoming-leader-snapshot-term" = metadata.term,
                "{message}"
            );
        };
        progress("applying snapshot", self.machine.applied(), self.snapshot_index);
        self.metrics.snapshot_apply_in_progress.set(1.0);
        let shared = self.links.shared.clone();
        // Giving space back goes by file names, which the new engine is about to take. What the old one
        // would give back goes with it anyway.
        let reclaiming = loop {
            if let Some(alone) = shared.reclaiming.try_lock_for(RECLAIM_ENDS) {
                break alone;
            }
            shared.published.load().engine.cancel_reclaim();
        };
        let engine = self.links.installer.install(snapshot)?;
        let restored = self.machine.replaced_by(&*engine.view()?)?;
        let before = self.machine.store.now().compact_revision();
        // Among what was skipped a user may have been deleted, or have got another password.
        let (old, new) = (&self.machine.auth, &restored.machine.auth);
        if old.revision() != new.revision() {
            self.links.tokens.replaced(&|user| old.tokens_last(user, new));
        }
        self.machine = restored.machine;
        let now = self.machine.store.now();
        let (revision, compacted) = (now.revision(), now.compact_revision());
        self.metrics.current_revision.set(revision as f64);
        self.metrics.compact_revision.set(compacted as f64);
        self.metrics.keys.set(now.live_keys() as f64);
        self.compaction = None;
        self.compaction_floor = restored.unfinished.unwrap_or(compacted + 1);
        self.snapshot_index = self.machine.applied();
        self.snapshot_wanted = false;
        self.last_durable = Instant::now();
        shared.measure_at(&*engine, self.machine.applied());
        shared.published.store(Arc::new(Published::of(&self.machine, engine, None)));
        drop(reclaiming);
        // The hub has not been told of anything in between: it reads it from the new store.
        self.links.watch.do_send(Events {
            revision,
            events: None,
            compacted: (compacted > before).then_some(compacted),
            bytes: 0,
        });
        self.links.leases_replaced.do_send(LeasesReplaced(self.machine.leases.clone()));
        let unfinished = restored.unfinished;
        self.links.store_replaced.do_send(StoreReplaced { compacted, unfinished });
        self.links.installed.do_send(Installed(Index(metadata.index)));
        self.links.peers.do_send(Members(shared.published.load().members.clone()));
        self.show_alarms();
        self.show_auth();
        self.show_cluster_version();
        self.metrics.snapshot_apply_in_progress.set(0.0);
        progress("applied snapshot", self.machine.applied(), self.snapshot_index);
        Ok(())
    }

    fn account(&self, entry: &raftpb::Entry, outcome: &Outcome, took: Duration) {
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
                prefix = "",
                request = %described(name, entry),
                response = "",
                error = outcome.result.as_ref().err().map(ToString::to_string),
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
        if let Some(limit) = outcome.over_quota {
            self.raise_nospace(outcome.id, limit);
        } else {
            answers.push((outcome.id, outcome.result.map_err(RequestError::Apply), term));
        }
    }

    fn conf_changed(&mut self, changed: ConfChanged, ctx: &mut Context<Self>) {
        if let Some(change) = &changed.change {
            self.tell_change(change);
            let remove = change.r#type == raftpb::ConfChangeType::RemoveNode as i32;
            if remove && change.node_id == self.links.shared.member_id.0 {
                self.stop_removed(ctx);
            }
        }
        self.links.raft.do_send(changed);
    }

    fn tell_change(&self, change: &raftpb::ConfChange) {
        use raftpb::ConfChangeType as Type;
        let shared = &self.links.shared;
        let (cluster, local) = (shared.cluster_id, shared.member_id);
        let id = MemberId(change.node_id);
        let now = shared.published.load();
        let member = now.members.get(id);
        let urls = logging::list(member.iter().flat_map(|member| &member.peer_urls));
        let promoted = serde_json::from_slice::<ChangeContext>(&change.context)
            .is_ok_and(|context| context.is_promote);
        match change.r#type() {
            Type::AddNode if promoted => tracing::info!(
                "cluster-id" = %cluster,
                "local-member-id" = %local,
                "promoted-member-id" = %id,
                "promote member"
            ),
            Type::AddNode | Type::AddLearnerNode => tracing::info!(
                "cluster-id" = %cluster,
                "local-member-id" = %local,
                "added-peer-id" = %id,
                "added-peer-peer-urls" = urls.value(),
                "added-peer-is-learner" = member.is_some_and(|member| member.is_learner),
                "added member"
            ),
            Type::UpdateNode => tracing::info!(
                "cluster-id" = %cluster,
                "local-member-id" = %local,
                "updated-remote-peer-id" = %id,
                "updated-remote-peer-urls" = urls.value(),
                "updated member"
            ),
            Type::RemoveNode => tracing::info!(
                "cluster-id" = %cluster,
                "local-member-id" = %local,
                "removed-remote-peer-id" = %id,
                "removed member"
            ),
        }
    }

    /// Others, and those who wait here, learn of it first.
    fn stop_removed(&self, ctx: &mut Context<Self>) {
        ctx.run_later(REMOVED_STOPS_AFTER, |this, _| this.links.exit.removed());
    }

    /// Raises the alarm for this member; the caller is answered when it is in force.
    fn raise_nospace(&mut self, id: u64, limit: Limit) {
        let Some(mut waiter) = self.waiters.remove(&id) else { return };
        let alarm = self.links.shared.next_id();
        let data = Command::new(alarm, self.links.shared.raise_nospace(limit)).encode();
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
        let engine = previous.engine.clone();
        let published = Published::of(&self.machine, engine, Some((&*previous, effects)));
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
            if self.links.shared.is_watched() {
                self.links.watch.do_send(self.links.shared.unwatched.pack(
                    store.revision(),
                    effects.events,
                    effects.compactions.last().map(|scheduled| scheduled.at),
                ));
            }
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
        if effects.auth {
            self.show_auth();
        }
        if effects.cluster_version
            && let Some(version) = self.machine.members.cluster_version
        {
            let text = |version: Version| format!("{}.{}", version.major, version.minor);
            let before = self.cluster_version;
            self.show_cluster_version();
            let shared = &self.links.shared;
            match before {
                None => tracing::info!(
                    "cluster-id" = %shared.cluster_id,
                    "local-member-id" = %shared.member_id,
                    "cluster-version" = text(version),
                    "set initial cluster version"
                ),
                Some(from) => tracing::info!(
                    "cluster-id" = %shared.cluster_id,
                    "local-member-id" = %shared.member_id,
                    from = text(from),
                    to = text(version),
                    "updated cluster version"
                ),
            }
        }
    }

    fn show_cluster_version(&mut self) {
        let now = self.machine.members.cluster_version;
        let before = std::mem::replace(&mut self.cluster_version, now);
        let gauges = [(before, 0.0), (now, 1.0)];
        for (version, value) in gauges {
            let Some(version) = version else { continue };
            let text = format!("{}.{}", version.major, version.minor);
            self.metrics.cluster_version.with(&[&text]).set(value);
        }
    }

    fn show_auth(&self) {
        self.metrics.auth_revision.set(self.machine.auth.revision() as f64);
    }

    /// Goes by the alarms, not by the members: one may be of the whole cluster (member 0) or of a member
    /// that was removed.
    fn show_alarms(&mut self) {
        let labels = |alarm: pb::AlarmMember| {
            let kind = pb::AlarmType::try_from(alarm.alarm);
            let kind =
                kind.map_or_else(|_| alarm.alarm.to_string(), |kind| kind.as_str_name().into());
            [MemberId(alarm.member_id).to_string(), kind]
        };
        let all = pb::AlarmType::None as i32;
        let raised: BTreeSet<_> = self.machine.alarms.list(all).into_iter().map(labels).collect();
        for labels in raised.union(&self.alarms_shown) {
            let value = f64::from(u8::from(raised.contains(labels)));
            self.metrics.alarms.with(&labels.each_ref().map(String::as_str)).set(value);
        }
        self.alarms_shown = raised;
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

    fn started(&mut self, _: &mut Self::Context) {
        // Alarms outlive a restart.
        self.show_alarms();
    }
}

impl Handler<Apply> for Applier {
    type Result = ();

    fn handle(&mut self, apply: Apply, ctx: &mut Self::Context) {
        if self.links.exit.failed() {
            return;
        }
        // The engine may be replaced only when nothing is being written to it.
        let replaces = apply.snapshot.is_some() && self.committing;
        if !self.held.is_empty() || replaces || self.overlay_is_full() {
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
        if slice.at < self.compaction_floor {
            return MessageResult(Sliced { dropped: 0, done: true });
        }
        let mut compaction = match self.compaction.take() {
            Some(compaction) if !slice.first && compaction.at() == slice.at => compaction,
            _ => Compaction::new(slice.at),
        };
        let (store, batch) = self.machine.maintenance();
        let began = Instant::now();
        let mut sliced = Sliced { dropped: 0, done: false };
        // Keys without anything to drop count as well, as a tenth.
        let mut steps = slice.limit.div_ceil(SLICE_STEP);
        while steps > 0 && !sliced.done && sliced.dropped < slice.limit {
            let limit = SLICE_STEP.min(slice.limit - sliced.dropped);
            let step = compaction.slice(store, batch, limit * 10, limit);
            sliced = Sliced { dropped: sliced.dropped + step.dropped, done: step.done };
            steps -= 1;
            if began.elapsed() >= SLICE_TIME {
                break;
            }
        }
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

/// What an entry asks for, for the log. It was read before it was applied; that it is read once more is
/// paid only where applying was slow.
fn described(name: &str, entry: &raftpb::Entry) -> String {
    match Command::decode(entry.data.clone()) {
        Ok(command) => Described(&command.request).to_string(),
        Err(_) => name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use engine_api::Table;
    use quorate_proto::etcdserverpb::watch_request::RequestUnion;
    use quorate_proto::etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse};
    use tokio::sync::mpsc;

    use super::*;
    use crate::actors::disk::OsDisk;
    use crate::actors::lease::ListLeases;
    use crate::actors::rig::{
        LEADER, LOCAL, PATIENCE, Rig, compact, db_path, grant, installer, open_redb, put, transfer,
    };
    use crate::actors::watch::{Ask, Open};
    use crate::core::apply::CONSISTENT_INDEX;
    use crate::core::command::Request;
    use crate::core::types::LeaseId;
    use crate::core::watch::StreamId;
    use crate::storage::wal_log;

    const MSG_APP_RESP: u32 = 4;

    /// Two members that have the same beginning; the first goes on alone.
    async fn apart(dirs: [&Path; 2], persistent: bool) -> (Rig, Rig) {
        let mut rigs = dirs.map(|dir| Rig::start(dir, persistent));
        for rig in &mut rigs {
            rig.found();
            rig.requests(vec![grant(5), put("k0", "0"), put("other", "0")]);
            rig.applied().await;
        }
        let [mut ahead, behind] = rigs;
        let puts = (1..300).map(|n| put(&format!("k{}", n % 7), &n.to_string()));
        ahead.requests(puts.collect());
        ahead.requests(vec![grant(6), compact(100), put("k9", "last")]);
        let role = pb::AuthRoleAddRequest { name: "role".into() };
        ahead.requests(vec![Request::AuthRoleAdd(role)]);
        ahead.applied().await;
        (ahead, behind)
    }

    async fn watch(rig: &Rig, start: i64) -> mpsc::UnboundedReceiver<WatchResponse> {
        let (sender, responses) = mpsc::unbounded_channel();
        let stream = StreamId(start as u64 + 1);
        rig.watch.do_send(Open { stream, responses: sender });
        let create = WatchCreateRequest {
            key: "k".into(),
            range_end: "l".into(),
            start_revision: start,
            ..Default::default()
        };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        assert_eq!(rig.watch.send(Ask { stream, request, permission: Ok(()) }).await, Ok(true));
        responses
    }

    async fn next(responses: &mut mpsc::UnboundedReceiver<WatchResponse>) -> WatchResponse {
        let response = tokio::time::timeout(PATIENCE, responses.recv()).await;
        response.expect("a response in time").expect("the stream is open")
    }

    fn hashes(rig: &Rig) -> (u32, i64, i64) {
        let (hash, revision, _) = rig.shared.hash_kv(0).expect("a hash");
        (hash.hash, hash.compact_revision, revision)
    }

    fn takes_over_a_snapshot(persistent: bool) {
        actix::System::new().block_on(async {
            let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let (mut ahead, mut behind) = apart([dirs[0].path(), dirs[1].path()], persistent).await;
            let old = behind.shared.published.load_full();
            let mut responses = watch(&behind, 0).await;
            assert!(next(&mut responses).await.created);

            let received = transfer(&ahead, &behind.snapshots, dirs[0].path()).await;
            let index = received.metadata.as_ref().unwrap().index;
            assert_eq!(index, ahead.last().0);
            behind.send_snapshot(received);
            // What follows does not wait for the snapshot to be installed.
            for rig in [&mut ahead, &mut behind] {
                rig.requests(vec![put("k1", "after")]);
            }
            ahead.applied().await;
            behind.applied().await;
            assert_eq!(hashes(&behind), hashes(&ahead));

            // Who reads the old state goes on with it.
            let found = old.store.find(b"k0", old.store.revision()).expect("the key was there");
            let value = old.store.value(&Values::new(&*old.engine), found.modified).unwrap();
            assert_eq!(&value.parse().unwrap().value[..], b"0");
            let now = behind.shared.published.load_full();
            assert!(!Arc::ptr_eq(&now.engine, &old.engine));
            assert_eq!(now.members.conf_state().voters, [LOCAL, LEADER]);
            assert_eq!(now.members.local, MemberId(LOCAL));
            assert_eq!(now.auth.role_names(), ["role"]);
            assert_eq!(now.auth, ahead.shared.published.load().auth);
            assert_eq!(now.leases.get(LeaseId(6)).map(|lease| lease.ttl), Some(100));
            let mut leases = behind.leases.send(ListLeases).await.unwrap();
            leases.sort();
            assert_eq!(leases, [LeaseId(5), LeaseId(6)]);

            // The watcher was at a revision that is compacted now.
            let lost = next(&mut responses).await;
            assert!(lost.canceled, "{lost:?}");
            assert_eq!(lost.compact_revision, 100);

            // The leader hears of it, and goes on from there.
            let acknowledged = async {
                while let Some(message) = behind.sent.recv().await {
                    if (message.r#type, message.index) == (MSG_APP_RESP, index + 1) {
                        return;
                    }
                }
            };
            tokio::time::timeout(PATIENCE, acknowledged).await.expect("an acknowledgement");

            // The log begins with the snapshot.
            let disk = OsDisk;
            let wal = dirs[1].path().join("wal");
            let mut valid = Vec::new();
            let log = wal_log::read(&disk, &wal, |found| {
                valid = found.to_vec();
                found.last().cloned().unwrap_or_default()
            });
            let log = log.unwrap();
            assert_eq!((log.start.index(), log.last_index), (index, index + 1));
            let loaded = behind.snapshots.load_newest(&valid).unwrap().snapshot.unwrap();
            assert_eq!(loaded.metadata.unwrap().index, index);
            behind.stop().await;
            // Only an engine that forgets needs the database again.
            assert_eq!(db_path(dirs[1].path(), index).exists(), !persistent);
        });
    }

    #[test]
    fn a_snapshot_takes_the_place_of_all_state_on_disk() {
        takes_over_a_snapshot(true);
    }

    #[test]
    fn a_snapshot_takes_the_place_of_all_state_in_memory() {
        takes_over_a_snapshot(false);
    }

    #[test]
    fn a_watcher_that_is_not_compacted_sees_each_missed_event_once() {
        actix::System::new().block_on(async {
            let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let mut ahead = Rig::start(dirs[0].path(), false);
            let mut behind = Rig::start(dirs[1].path(), false);
            for rig in [&mut ahead, &mut behind] {
                rig.found();
                rig.requests((0..20).map(|n| put("k", &n.to_string())).collect());
                rig.applied().await;
            }
            let mut responses = watch(&behind, 0).await;
            assert!(next(&mut responses).await.created);
            ahead.requests((20..500).map(|n| put("k", &n.to_string())).collect());
            ahead.applied().await;
            let received = transfer(&ahead, &behind.snapshots, dirs[0].path()).await;
            behind.send_snapshot(received);
            behind.requests((500..520).map(|n| put("k", &n.to_string())).collect());
            let mut seen = Vec::new();
            while seen.len() < 500 {
                for event in next(&mut responses).await.events {
                    let pair = event.kv.expect("a pair").parse().expect("a pair");
                    seen.push(String::from_utf8_lossy(&pair.value).into_owned());
                }
            }
            let expected: Vec<_> = (20..520).map(|n: i32| n.to_string()).collect();
            assert_eq!(seen, expected);
        });
    }

    #[test]
    fn an_engine_that_was_installed_goes_on_after_a_restart() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let last = actix::System::new().block_on(async {
            let (ahead, mut behind) = apart([dirs[0].path(), dirs[1].path()], true).await;
            let received = transfer(&ahead, &behind.snapshots, dirs[0].path()).await;
            behind.send_snapshot(received);
            behind.requests(vec![put("k1", "after")]);
            behind.applied().await;
            let last = behind.last();
            // Space is given back in the new engine's files, whose directory has another name by now.
            behind.shared.published.load_full().engine.reclaim().unwrap();
            behind.stop().await;
            last
        });
        let engine = installer(Arc::new(OsDisk), dirs[1].path(), true);
        engine.clean().unwrap();
        let dir = dirs[1].path().join("engine-redb");
        let engine = open_redb()(&dir).unwrap();
        let view = engine.view().unwrap();
        let index = view.get(Table::Meta, CONSISTENT_INDEX).unwrap().unwrap();
        assert_eq!(index[..], last.0.to_be_bytes());
    }

    #[test]
    fn a_snapshot_does_not_wait_for_space_that_is_given_back() {
        actix::System::new().block_on(async {
            let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let mut rigs = dirs.each_ref().map(|dir| Rig::start(dir.path(), true));
            let large = "v".repeat(1 << 20);
            for rig in &mut rigs {
                rig.found();
                rig.requests((0..20).map(|n| put(&n.to_string(), &large)).collect());
                rig.applied().await;
            }
            let [mut ahead, mut behind] = rigs;
            ahead.requests((0..100).map(|n| put("k", &n.to_string())).collect());
            ahead.applied().await;
            let (reply, flushed) = oneshot::channel();
            behind.applier.do_send(Flush(reply));
            flushed.await.unwrap();

            // As long as it goes on undisturbed, it takes about 20 seconds.
            let shared = behind.shared.clone();
            let reclaim = std::thread::spawn(move || {
                let _alone = shared.reclaiming.lock();
                shared.published.load_full().engine.reclaim()
            });
            let started = Instant::now();
            while !dirs[1].path().join("engine-redb/data.redb.new").exists() {
                assert!(started.elapsed() < PATIENCE, "no copy is made");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let received = transfer(&ahead, &behind.snapshots, dirs[0].path()).await;
            behind.send_snapshot(received);
            behind.applied().await;
            let result = reclaim.join().unwrap();
            assert!(matches!(result, Err(engine_api::EngineError::Cancelled)), "{result:?}");
            assert_eq!(hashes(&behind), hashes(&ahead));
            behind.requests(vec![put("k", "after")]);
            behind.applied().await;
            behind.stop().await;
        });
    }

    #[test]
    fn a_gauge_shows_every_alarm_whoever_it_is_of() {
        use pb::alarm_request::AlarmAction::{self, Activate, Deactivate};
        const STRANGER: u64 = 0xa1a;
        let request = |action: AlarmAction, member_id| {
            let (action, alarm) = (action as i32, pb::AlarmType::Corrupt as i32);
            Request::Alarm(pb::AlarmRequest { action, member_id, alarm })
        };
        let gauge = |member: &str| {
            let series = format!(
                "etcd_debugging_server_alarms{{alarm_type=\"CORRUPT\",server_id=\"{member}\"}} "
            );
            let page = Metrics::global().render();
            page.lines().find_map(|line| line.strip_prefix(&series).map(str::to_string))
        };
        let shown = |value: &str| {
            for member in ["0", "1", "a1a"] {
                assert_eq!(gauge(member).as_deref(), Some(value), "of member {member}");
            }
        };
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut rig = Rig::start(dir.path(), false);
            rig.found();
            for (action, value) in [(Activate, "1"), (Deactivate, "0")] {
                let members = [0, LOCAL, STRANGER];
                rig.requests(members.map(|id| request(action, id)).into());
                rig.applied().await;
                // What is published is shown when the applier takes its next message.
                let (reply, flushed) = oneshot::channel();
                rig.applier.do_send(Flush(reply));
                flushed.await.unwrap();
                shown(value);
            }
        });
    }

    #[test]
    fn a_missing_database_stops_the_member() {
        actix::System::new().block_on(async {
            let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let (ahead, mut behind) = apart([dirs[0].path(), dirs[1].path()], true).await;
            let received = transfer(&ahead, &behind.snapshots, dirs[0].path()).await;
            let index = received.metadata.as_ref().unwrap().index;
            std::fs::remove_file(db_path(dirs[1].path(), index)).unwrap();
            let before = behind.shared.published.load().applied;
            behind.send_snapshot(received);
            let reason = tokio::time::timeout(PATIENCE, behind.exits.recv()).await.unwrap();
            let text = format!("{reason:?}");
            assert!(text.contains("is missing") && text.contains(".snap.db"), "{text}");
            assert_eq!(behind.shared.published.load().applied, before);
        });
    }
}
