//! The compactor: drops superseded revisions in slices, and compacts by itself when told to.
//!
//! in:  `Compacted`, `StoreReplaced` from actors/applier.rs, `AwaitCompaction` from transport/grpc/kv.rs
//! out: `CompactSlice` to actors/applier.rs, `Requests` (a compaction) to actors/raft.rs
//!
//! Before a compaction's first slice, what it covers is hashed (v3-api 6.6). Compactions are done one
//! after the other, so nothing is dropped meanwhile, and the entries to hash are history: the hash is
//! taken beside all writes, slice by slice, on a thread that may block.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix::prelude::*;
use engine_api::Engine;
use quorate_proto::etcdserverpb as pb;
use tokio::sync::oneshot;

use crate::actors::answer;
use crate::actors::applier::{Applier, Checkpoint, CompactSlice};
use crate::actors::raft::{Proposal, RaftActor, Requests};
use crate::actors::shared::Shared;
use crate::core::autocompact::AutoCompaction;
use crate::core::command::{Command, Request};
use crate::core::mvcc::compact::Scheduled;
use crate::core::mvcc::hash::{KvHash, KvHasher};
use crate::core::mvcc::{ReadError, Values};
use crate::metrics::Metrics;

/// A compaction has taken effect; what it superseded is to be dropped.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Compacted(pub Scheduled);

/// A snapshot of the leader has taken the place of the store, which is compacted at `compacted`;
/// `unfinished` is what its sender was not done with.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StoreReplaced {
    pub compacted: i64,
    pub unfinished: Option<i64>,
}

/// Answered when everything superseded up to this revision is gone from the engine. For a revision that
/// is not compacted at all: when what is under way is done.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AwaitCompaction {
    pub at: i64,
    pub reply: oneshot::Sender<()>,
}

/// How much is dropped at a time.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Revisions a slice.
    pub batch_limit: usize,
    /// Pause between slices.
    pub sleep: Duration,
    /// How long a compaction of its own may wait for the cluster.
    pub request_timeout: Duration,
}

/// Entries hashed at a time, in slices of a compaction: hashing only reads.
const HASHED_PER_DROPPED: usize = 10;

/// A compaction to do.
#[derive(Clone, Copy)]
struct Job {
    at: i64,
    /// The compact revision before it; `None` for a compaction that a restart has cut short: some of
    /// what it covers is gone, so no hash can be taken.
    previous: Option<i64>,
}

/// Owns the progress of compactions.
pub struct Compactor {
    shared: Arc<Shared>,
    applier: Addr<Applier>,
    raft: Addr<RaftActor>,
    options: Options,
    auto: AutoCompaction,
    metrics: &'static Metrics,
    /// Compactions to do, the first one under way.
    queue: VecDeque<Job>,
    running: bool,
    /// Counts the stores: a slice of another one says nothing about this one.
    store: u64,
    started: Instant,
    finished: i64,
    waiting: Vec<AwaitCompaction>,
}

impl Compactor {
    /// A compactor with nothing to do but what `unfinished` names from before the last stop.
    pub fn new(
        shared: Arc<Shared>,
        applier: Addr<Applier>,
        raft: Addr<RaftActor>,
        options: Options,
        auto: AutoCompaction,
        unfinished: Option<i64>,
    ) -> Self {
        Compactor {
            shared,
            applier,
            raft,
            options,
            auto,
            metrics: Metrics::global(),
            queue: unfinished.map(|at| Job { at, previous: None }).into_iter().collect(),
            running: false,
            store: 0,
            started: Instant::now(),
            finished: -1,
            waiting: Vec::new(),
        }
    }

    fn start(&mut self, ctx: &mut Context<Self>) {
        if !self.running && !self.queue.is_empty() {
            self.running = true;
            self.started = Instant::now();
            self.hash(ctx);
        }
    }

    /// Hashes what the first compaction covers, then begins to drop what it superseded.
    fn hash(&mut self, ctx: &mut Context<Self>) {
        let Some(&Job { at, previous }) = self.queue.front() else { return };
        let Some(previous) = previous else {
            tracing::warn!(
                "compact-revision" = at,
                "previous compaction was interrupted, skip storing compaction hash value"
            );
            return self.slice(true, ctx);
        };
        let scheduled = Scheduled { at, previous };
        let store = self.store;
        let hashing = hash_in_slices(self.shared.clone(), scheduled, self.options).into_actor(self);
        ctx.spawn(hashing.map(move |hashed, this, ctx| {
            if store != this.store {
                return;
            }
            match hashed {
                Ok(None) => {}
                Ok(Some(hash)) => {
                    tracing::info!(
                        hash = hash.hash,
                        revision = hash.revision,
                        "compact-revision" = hash.compact_revision,
                        "storing new hash"
                    );
                    this.shared.record_compaction_hash(hash);
                }
                // The compaction itself needs no hash; an engine that has failed ends the member where
                // it is written to.
                Err(error) => {
                    tracing::warn!(revision = at, %error, "failed to hash for compaction")
                }
            }
            this.slice(true, ctx);
        }));
    }

    fn slice(&mut self, first: bool, ctx: &mut Context<Self>) {
        let Some(&Job { at, .. }) = self.queue.front() else { return };
        let limit = self.options.batch_limit;
        let store = self.store;
        let sent = Instant::now();
        let slice = self.applier.send(CompactSlice { at, first, limit }).into_actor(self);
        ctx.spawn(slice.map(move |sliced, this, ctx| {
            // No applier, no store: the member is stopping.
            let Ok(sliced) = sliced else { return };
            if store != this.store {
                return;
            }
            let pause_ms = sent.elapsed().as_secs_f64() * 1000.0;
            this.metrics.index_compaction_pause_ms.record(pause_ms);
            this.metrics.db_compaction_pause_ms.record(pause_ms);
            this.metrics.db_compaction_keys.increment(sliced.dropped as u64);
            if sliced.done {
                this.finish(at, ctx);
            } else {
                ctx.run_later(this.options.sleep, move |this, ctx| {
                    if store == this.store {
                        this.slice(false, ctx);
                    }
                });
            }
        }));
    }

    fn finish(&mut self, at: i64, ctx: &mut Context<Self>) {
        let took = self.started.elapsed();
        self.metrics.db_compaction_ms.record(took.as_secs_f64() * 1000.0);
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        self.metrics.db_compaction_last.set(unix.map_or(0.0, |since| since.as_secs_f64().floor()));
        tracing::info!(
            "scheduled-compact-revision" = at,
            took = %crate::config::duration::GoDuration::from(took),
            "finished scheduled compaction"
        );
        self.queue.pop_front();
        self.running = false;
        self.finished = self.finished.max(at);
        self.release_waiting(ctx);
        self.start(ctx);
    }

    /// Answers those who wait for what is done, once the engine has it on disk.
    fn release_waiting(&mut self, ctx: &mut Context<Self>) {
        let finished = self.finished;
        let ready: Vec<_> = self.waiting.extract_if(.., |waiting| waiting.at <= finished).collect();
        if ready.is_empty() {
            return;
        }
        let (reply, durable) = oneshot::channel();
        self.applier.do_send(Checkpoint(reply));
        let answer = async move {
            // A failed checkpoint drops its end; then so do the callers' ends.
            if durable.await.is_ok() {
                for waiting in ready {
                    answer(waiting.reply, ());
                }
            }
        };
        ctx.spawn(answer.into_actor(self));
    }

    fn auto_compact(&mut self, ctx: &mut Context<Self>) {
        let now = self.shared.now();
        let leading = self.shared.raft.leading.load(Ordering::Acquire);
        let revision = self.shared.published.load().store.revision();
        if let Some(at) = self.auto.step(now, revision, leading) {
            tracing::info!(revision = at, "starting auto compaction");
            let id = self.shared.next_id();
            let request = pb::CompactionRequest { revision: at, physical: false };
            let data = Command::new(id, Request::Compaction(request)).encode();
            let (reply, done) = oneshot::channel();
            let proposals = vec![Proposal { id, data, reply }];
            self.raft.do_send(Requests { proposals, reads: Vec::new() });
            // An entry that was lost with its leader is never answered.
            let done = tokio::time::timeout(self.options.request_timeout, done);
            ctx.spawn(done.into_actor(self).map(move |done, this, _| {
                use crate::actors::raft::RequestError;
                use crate::core::apply::ApplyError;
                let success = matches!(
                    done,
                    Ok(Ok(Ok(_) | Err(RequestError::Apply(ApplyError::Compacted { .. }))))
                );
                this.auto.done(this.shared.now(), at, success);
                if success {
                    tracing::info!(revision = at, "completed auto compaction");
                } else {
                    tracing::warn!(revision = at, "failed auto compaction");
                }
            }));
        }
        self.schedule_auto(ctx);
    }

    fn schedule_auto(&mut self, ctx: &mut Context<Self>) {
        if let Some(at) = self.auto.next_step() {
            let wait = Duration::from_millis(at.since_ms(self.shared.now()));
            ctx.run_later(wait, Self::auto_compact);
        }
    }
}

/// A hash under way, and the engine that it is taken of.
struct Begun {
    engine: Arc<dyn Engine>,
    hasher: KvHasher,
}

/// Hashes with the pauses that a compaction makes; `None` if another store took this one's place, or
/// the member is stopping.
async fn hash_in_slices(
    shared: Arc<Shared>,
    scheduled: Scheduled,
    options: Options,
) -> Result<Option<KvHash>, ReadError> {
    let entries = options.batch_limit.saturating_mul(HASHED_PER_DROPPED);
    let mut begun = None;
    loop {
        let shared = shared.clone();
        let slice = move || -> Result<Option<(Begun, Option<KvHash>)>, ReadError> {
            let now = shared.published.load();
            let Scheduled { at, previous } = scheduled;
            let Begun { engine, mut hasher } = begun.unwrap_or_else(|| Begun {
                engine: now.engine.clone(),
                hasher: KvHasher::of_compaction(&now.store, at, previous),
            });
            if !Arc::ptr_eq(&engine, &now.engine) {
                return Ok(None);
            }
            // The view comes last: it holds whatever the snapshot has passed on to the engine.
            let values = Values::new(&*now.engine);
            let done = hasher.slice(&now.store, values.view()?, entries)?;
            Ok(Some((Begun { engine, hasher }, done)))
        };
        let Ok(sliced) = tokio::task::spawn_blocking(slice).await else { return Ok(None) };
        match sliced? {
            None => return Ok(None),
            Some((_, Some(hash))) => return Ok(Some(hash)),
            Some((so_far, None)) => begun = Some(so_far),
        }
        tokio::time::sleep(options.sleep).await;
    }
}

impl Actor for Compactor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.start(ctx);
        self.auto.start(self.shared.now());
        self.schedule_auto(ctx);
    }
}

impl Handler<Compacted> for Compactor {
    type Result = ();

    fn handle(&mut self, Compacted(scheduled): Compacted, ctx: &mut Self::Context) {
        let Scheduled { at, previous } = scheduled;
        self.queue.push_back(Job { at, previous: Some(previous) });
        self.start(ctx);
    }
}

impl Handler<StoreReplaced> for Compactor {
    type Result = ();

    fn handle(&mut self, replaced: StoreReplaced, ctx: &mut Self::Context) {
        self.store += 1;
        self.running = false;
        self.queue.clear();
        self.queue.extend(replaced.unfinished.map(|at| Job { at, previous: None }));
        // They were taken on the store before.
        self.shared.compaction_hashes.store(Arc::default());
        if self.queue.is_empty() {
            self.finished = self.finished.max(replaced.compacted);
        }
        self.release_waiting(ctx);
        self.start(ctx);
    }
}

impl Handler<AwaitCompaction> for Compactor {
    type Result = ();

    fn handle(&mut self, mut waiting: AwaitCompaction, ctx: &mut Self::Context) {
        match self.queue.back() {
            Some(last) => waiting.at = waiting.at.min(last.at),
            None => {
                // All that was ever compacted is done.
                self.finished =
                    self.finished.max(self.shared.published.load().store.compact_revision());
                waiting.at = waiting.at.min(self.finished);
            }
        }
        self.waiting.push(waiting);
        self.release_waiting(ctx);
    }
}
