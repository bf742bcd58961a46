//! What actors publish for readers: never a mailbox, never a lock on the read path.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use engine_api::Engine;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::actors::peers::Liveness;
use crate::actors::watch::Backlog;
use crate::core::alarm::Alarms;
use crate::core::apply::{Effects, Machine};
use crate::core::auth::AuthStore;
use crate::core::command::Request;
use crate::core::event::{Event, History, HistoryError};
use crate::core::lease::LeaseTable;
use crate::core::membership::Membership;
use crate::core::mvcc::hash::{CompactionHashes, KvHash};
use crate::core::mvcc::history::event;
use crate::core::mvcc::{ReadError, Snapshot, Values};
use crate::core::quota::{Limit, Sizes};
use crate::core::reconfig::{Contact, Leadership, STABLE_AFTER};
use crate::core::types::{ClusterId, Index, MemberId, Revision, Term, Uptime};
use quorate_proto::{KeyValueBytes, etcdserverpb as pb};

/// All replicated state after one applied batch of entries, with the engine that holds the rest of it:
/// one load gives a pair that belongs together, also while a snapshot of the leader replaces both.
#[derive(Clone)]
pub struct Published {
    pub engine: Arc<dyn Engine>,
    pub store: Snapshot,
    pub leases: LeaseTable,
    pub alarms: Arc<Alarms>,
    pub auth: Arc<AuthStore>,
    pub members: Arc<Membership>,
    pub applied: Index,
    /// Term of the last applied entry.
    pub term: Term,
}

impl Published {
    /// What `machine` holds now over `engine`; alarms, users and members are taken from `previous`
    /// unless the effects since then changed them.
    pub fn of(
        machine: &Machine,
        engine: Arc<dyn Engine>,
        previous: Option<(&Published, &Effects)>,
    ) -> Self {
        let kept = |changed: fn(&Effects) -> bool| {
            previous.and_then(|(previous, effects)| (!changed(effects)).then_some(previous))
        };
        let alarms = kept(|effects| effects.alarms).map(|previous| previous.alarms.clone());
        let auth = kept(|effects| effects.auth).map(|previous| previous.auth.clone());
        let members = kept(|effects| effects.members || effects.cluster_version)
            .map(|previous| previous.members.clone());
        Published {
            engine,
            store: machine.store.now().clone(),
            leases: machine.leases.clone(),
            alarms: alarms.unwrap_or_else(|| Arc::new(machine.alarms.clone())),
            auth: auth.unwrap_or_else(|| Arc::new(machine.auth.clone())),
            members: members.unwrap_or_else(|| Arc::new(machine.members.clone())),
            applied: machine.applied(),
            term: machine.term(),
        }
    }
}

/// The raft node's view of the world, for status and gates.
#[derive(Default)]
pub struct RaftView {
    /// 0 while no leader is known.
    pub leader: AtomicU64,
    pub term: AtomicU64,
    /// The last committed index.
    pub committed: AtomicU64,
    /// This member leads.
    pub leading: AtomicBool,
    /// When raft last ticked, in milliseconds of [`Shared::now`].
    pub ticked: AtomicU64,
    /// What the applier has applied and raft has not asked for yet.
    pub progress: ApplyProgress,
    /// `leader` for those who wait for another one.
    pub leaders: watch::Sender<MemberId>,
    /// When the last leaders came and went.
    times: Mutex<LeaderTimes>,
}

/// How far the applier is, without a message to raft for each batch: raft looks when it runs anyway, and
/// asks to be told only where something waits for it.
#[derive(Default)]
pub struct ApplyProgress {
    applied: AtomicU64,
    wanted: AtomicBool,
}

impl ApplyProgress {
    /// Everything up to `index` is applied and published. Answers whether raft wants to be told.
    // One of two that write one variable and read the other sees what the other wrote: with `SeqCst`
    // either raft finds this index, or the applier finds that it is wanted.
    pub fn advance(&self, index: Index) -> bool {
        self.applied.store(index.0, Ordering::SeqCst);
        self.wanted.load(Ordering::SeqCst) && self.wanted.swap(false, Ordering::SeqCst)
    }

    /// Asks to be told of the next advance. To be followed by a look at [`ApplyProgress::applied`].
    pub fn want(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// The last index applied; 0 until the first advance.
    pub fn applied(&self) -> Index {
        Index(self.applied.load(Ordering::SeqCst))
    }
}

#[derive(Clone, Copy, Default)]
struct LeaderTimes {
    elected: Option<Uptime>,
    lost: Option<Uptime>,
}

/// Defragmentations of this member: one at a time, and one for all who asked before it began.
#[derive(Default)]
pub struct Defragmentations {
    /// Whose turn it is; holds the number of the last one that has succeeded.
    pub turn: Arc<tokio::sync::Mutex<u64>>,
    /// How many have begun.
    pub begun: AtomicU64,
}

/// One member's shared state.
pub struct Shared {
    pub cluster_id: ClusterId,
    pub member_id: MemberId,
    pub published: ArcSwap<Published>,
    pub raft: RaftView,
    /// Members that the peer network can reach.
    pub reachable: Arc<Liveness>,
    /// What compactions left to be compared with other members. Belongs to the store that they were
    /// made on: another store begins without any.
    pub compaction_hashes: ArcSwap<CompactionHashes>,
    /// What the engine occupied when it was last measured: live and physical bytes.
    sizes: [AtomicU64; 2],
    /// The index up to which that holds what was applied.
    measured: AtomicU64,
    /// This member has asked for its NOSPACE alarm, and the monitor has not heard of it.
    pub nospace_raised: AtomicBool,
    /// Set while the engine gives space back.
    pub defragmenting: AtomicBool,
    pub defragmentations: Defragmentations,
    /// Held while it does, and while it is replaced: both go by the names of its files.
    pub reclaiming: Mutex<()>,
    /// What the applier has told the watch hub and the hub has not heard yet.
    pub unwatched: Backlog,
    /// Whether there is a stream of watchers at all.
    watched: AtomicBool,
    started: Instant,
    next_request: AtomicU64,
}

impl Shared {
    /// The state of a member that has just read its data directory.
    pub fn new(cluster_id: ClusterId, member_id: MemberId, published: Published) -> Self {
        let unix_ms = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64);
        // Two bytes of the member, five of the time, one that counts and carries (v3-api 6.1).
        let first = (member_id.0 << 48) | ((unix_ms << 8) & 0x0000_ffff_ffff_ff00);
        let (engine, applied) = (published.engine.clone(), published.applied);
        let shared = Shared {
            cluster_id,
            member_id,
            published: ArcSwap::from_pointee(published),
            raft: RaftView::default(),
            reachable: Arc::default(),
            compaction_hashes: ArcSwap::default(),
            sizes: Default::default(),
            measured: AtomicU64::new(applied.0),
            nospace_raised: AtomicBool::new(false),
            defragmenting: AtomicBool::new(false),
            defragmentations: Defragmentations::default(),
            reclaiming: Mutex::new(()),
            unwatched: Backlog::default(),
            watched: AtomicBool::new(false),
            started: Instant::now(),
            next_request: AtomicU64::new(first),
        };
        shared.measure(&*engine);
        shared
    }

    /// Asks the engine what it occupies, for those who ask [`Shared::sizes`]. To be called when that has
    /// changed: after a commit, when space was given back, when the engine was replaced.
    /// Answers whether the engine told.
    pub fn measure(&self, engine: &dyn Engine) -> bool {
        // An engine that has failed says so itself, where it is written to.
        let (Ok(live), Ok(physical)) = (engine.size_in_use(), engine.size()) else { return false };
        self.sizes[0].store(live, Ordering::Relaxed);
        self.sizes[1].store(physical, Ordering::Relaxed);
        true
    }

    /// As [`Shared::measure`], of an engine that holds everything up to `index`.
    pub fn measure_at(&self, engine: &dyn Engine, index: Index) {
        if self.measure(engine) {
            self.measured.store(index.0, Ordering::Release);
        }
    }

    /// The index up to which [`Shared::sizes`] count what was applied: what is on its way to the engine, as
    /// after a start what its log brings back, is not in them yet.
    pub fn measured(&self) -> Index {
        Index(self.measured.load(Ordering::Acquire))
    }

    /// What the engine occupied when it was last measured, which costs nothing to ask.
    pub fn sizes(&self) -> Sizes {
        let [live, physical] = self.sizes.each_ref().map(|size| size.load(Ordering::Relaxed));
        Sizes { live, physical }
    }

    /// The request by which this member raises its NOSPACE alarm: a limit of the quota is reached.
    pub fn raise_nospace(&self, exceeded: Limit) -> Request {
        // Many requests may meet the same limit before the alarm is in force.
        if !self.nospace_raised.swap(true, Ordering::AcqRel) {
            let Sizes { live, physical } = self.sizes();
            tracing::warn!(
                %exceeded,
                "live-bytes" = live,
                "physical-bytes" = physical,
                "space quota is exceeded, raising alarm"
            );
        }
        Request::Alarm(pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Activate as i32,
            member_id: self.member_id.0,
            alarm: pb::AlarmType::Nospace as i32,
        })
    }

    /// A request ID that no other request of the cluster has.
    pub fn next_id(&self) -> u64 {
        self.next_request.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// The clock that core is given.
    pub fn now(&self) -> Uptime {
        Uptime(self.started.elapsed().as_millis() as u64)
    }

    /// Whether the watch hub has to be told of what was published just now.
    pub fn is_watched(&self) -> bool {
        // After the publication, as in `set_watched` before the look at it: either the applier finds
        // the first stream here, or the hub finds what was published.
        fence(Ordering::SeqCst);
        self.watched.load(Ordering::Relaxed)
    }

    /// The first stream of watchers is there, or the last one has gone. The revision published last: of
    /// what comes after it, the hub is told.
    pub fn set_watched(&self, watched: bool) -> i64 {
        self.watched.store(watched, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.published.load().store.revision()
    }

    /// The member that leads, as far as this one knows.
    pub fn leader(&self) -> Option<MemberId> {
        match self.raft.leader.load(Ordering::Acquire) {
            0 => None,
            id => Some(MemberId(id)),
        }
    }

    /// Notes who leads now, 0 for nobody; answers whether it was another one before, and whether this
    /// member led.
    pub fn set_leader(&self, leader: MemberId) -> (bool, bool) {
        let view = &self.raft;
        let changed = view.leader.swap(leader.0, Ordering::AcqRel) != leader.0;
        let led = view.leading.swap(leader == self.member_id, Ordering::AcqRel);
        if changed {
            let mut times = view.times.lock();
            if leader.0 == 0 {
                times.lost = Some(self.now());
            } else {
                times.elected = Some(self.now());
            }
            drop(times);
            view.leaders.send_replace(leader);
        }
        (changed, led)
    }

    /// Waits until a leader is known that `fits`; answers it.
    pub async fn leader_that(&self, fits: impl Fn(MemberId) -> bool) -> MemberId {
        let mut leaders = self.raft.leaders.subscribe();
        let found = leaders.wait_for(|leader| leader.0 != 0 && fits(*leader)).await;
        *found.expect("the sender lives in `self`")
    }

    /// What is known of the leader, for [`crate::core::reconfig::silence`].
    pub fn leadership(&self) -> Leadership {
        let times = *self.raft.times.lock();
        Leadership {
            leader: self.leader().unwrap_or_default(),
            elected_ms: times.elected.map(|at| at.0),
            lost_ms: times.lost.map(|at| at.0),
        }
    }

    /// The time of [`Shared::now`] at `at`.
    pub fn uptime_at(&self, at: Instant) -> Uptime {
        Uptime(at.saturating_duration_since(self.started).as_millis() as u64)
    }

    /// How well this member is connected to another one.
    pub fn contact(&self, id: MemberId) -> Contact {
        match self.reachable.since(id) {
            None => Contact::None,
            Some(since) if since.elapsed() >= STABLE_AFTER => Contact::Stable,
            Some(_) => Contact::Recent,
        }
    }

    /// Whether raft ticks: a member that was stopped, or whose log hangs, may lead no more and not
    /// know it yet.
    pub fn ticks(&self, heartbeat: Duration) -> bool {
        let silent = self.now().0.saturating_sub(self.raft.ticked.load(Ordering::Acquire));
        u128::from(silent) <= 3 * heartbeat.as_millis()
    }

    /// Reads from the newest published state; once more if a compaction took away what was read.
    ///
    /// # Errors
    /// What `read` answers. `Storage`, `Damaged` and `Superseded` mean that the engine has failed.
    pub fn read<T>(
        &self,
        mut read: impl FnMut(&Published, &Values<'_>) -> Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        loop {
            let now = self.published.load();
            match read(&now, &Values::new(&*now.engine)) {
                // The snapshot was older than a compaction; a newer one says so, or has the answer.
                Err(ReadError::Superseded(_))
                    if self.published.load().store.compact_revision()
                        > now.store.compact_revision() => {}
                result => return result,
            }
        }
    }

    /// `HashKV` at main revision `at`; the store's revision and the term of the state that it was read
    /// from. For the revision of a remembered compaction it is the hash that was taken then, under the
    /// compact revision of then.
    ///
    /// # Errors
    /// As [`Shared::read`].
    pub fn hash_kv(&self, at: i64) -> Result<(KvHash, i64, Term), ReadError> {
        if let Some(hash) = self.compaction_hashes.load().get(at) {
            let now = self.published.load();
            return Ok((hash, now.store.revision(), now.term));
        }
        self.read(|now, values| {
            let view = values.view()?;
            // What the view lacks because of a compaction, the snapshot must know as compacted.
            if self.published.load().store.compact_revision() != now.store.compact_revision() {
                return Err(ReadError::Superseded(Revision::default()));
            }
            Ok((now.store.hash_kv(view, at)?, now.store.revision(), now.term))
        })
    }

    /// Remembers what a compaction left behind.
    pub fn record_compaction_hash(&self, hash: KvHash) {
        self.compaction_hashes.rcu(|hashes| {
            let mut hashes = CompactionHashes::clone(hashes);
            hashes.record(hash);
            hashes
        });
    }

    /// Entries committed but not applied: the measure of the "too many requests" gate.
    pub fn apply_lag(&self) -> u64 {
        let applied = self.published.load().applied.0;
        self.raft.committed.load(Ordering::Acquire).saturating_sub(applied)
    }
}

/// History as a watcher reads it: always the newest published state.
pub struct SharedHistory<'a> {
    shared: &'a Shared,
    now: arc_swap::Guard<Arc<Published>>,
}

impl<'a> SharedHistory<'a> {
    /// The history published last.
    pub fn new(shared: &'a Shared) -> Self {
        SharedHistory { shared, now: shared.published.load() }
    }
}

impl History for SharedHistory<'_> {
    fn revision(&self) -> i64 {
        self.now.store.revision()
    }

    fn compact_revision(&self) -> i64 {
        self.now.store.compact_revision()
    }

    fn changes(
        &self,
        from: i64,
        to: i64,
        visit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<(), HistoryError> {
        use std::ops::ControlFlow;
        let view = self.now.engine.view()?;
        // Deletions that the view shows belong to a compaction that was published before them, so a
        // look at the newest state tells whether this range is still whole.
        let compacted = self.shared.published.load().store.compact_revision();
        if from < compacted {
            return Err(HistoryError::Compacted { asked: from, compacted });
        }
        let mut damaged = None;
        let result =
            self.now.store.changes(
                &*view,
                from,
                to,
                &mut |revision, tombstone, value| match event(revision, tombstone, value) {
                    Ok(event) => match visit(event) {
                        true => ControlFlow::Continue(()),
                        false => ControlFlow::Break(()),
                    },
                    Err(error) => {
                        damaged = Some(error);
                        ControlFlow::Break(())
                    }
                },
            );
        match damaged.map_or(result, Err) {
            Ok(()) => Ok(()),
            Err(error) => Err(storage(error)),
        }
    }

    fn value_at(&self, key: &[u8], at: i64) -> Result<Option<KeyValueBytes>, HistoryError> {
        let store = &self.now.store;
        if at < self.shared.published.load().store.compact_revision() {
            return Ok(None);
        }
        let Some(found) = store.find(key, at) else { return Ok(None) };
        match store.value(&Values::new(&*self.now.engine), found.modified) {
            Ok(value) => Ok(Some(value)),
            Err(ReadError::Superseded(_)) => Ok(None),
            Err(error) => Err(storage(error)),
        }
    }
}

fn storage(error: ReadError) -> HistoryError {
    match error {
        ReadError::Storage(error) => HistoryError::Storage(error),
        other => HistoryError::Storage(engine_api::EngineError::Corrupt {
            at: "table key".into(),
            what: other.to_string(),
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use engine_memory::Memory;
    use quorate_proto::raftpb;

    use super::*;
    use crate::core::apply::Effects;
    use crate::core::command::Command;
    use crate::core::membership::Version;
    use crate::core::quota::Quota;

    /// A member whose state a test moves by hand.
    pub struct Bench {
        pub shared: Arc<Shared>,
        machine: Machine,
        next: u64,
    }

    impl Bench {
        pub fn new() -> Bench {
            let engine: Arc<dyn Engine> = Arc::new(Memory::new());
            let members = Membership::new(ClusterId(1), MemberId(1), 1);
            let version = Version::parse("3.7.0").expect("a version");
            let view = engine.view().expect("memory does not fail");
            let restored = Machine::restore(&*view, members, 1, version);
            let machine = restored.expect("an empty engine is a state").machine;
            drop(view);
            let published = Published::of(&machine, engine, None);
            let shared = Arc::new(Shared::new(ClusterId(1), MemberId(1), published));
            Bench { shared, machine, next: 1 }
        }

        /// Applies a put and publishes it; answers what happened.
        pub fn put(&mut self, key: &str) -> Vec<Event> {
            let put = pb::PutRequest { key: key.to_string().into(), ..Default::default() };
            let entry = raftpb::Entry {
                term: 1,
                index: self.next,
                data: Command::new(self.next, Request::Put(put)).encode(),
                ..Default::default()
            };
            self.next += 1;
            let engine = self.shared.published.load().engine.clone();
            let (values, mut effects) = (Values::new(&*engine), Effects::default());
            self.machine
                .apply(&values, &entry, |_| true, Quota::OFF, Sizes::default, &mut effects)
                .expect("a put is applied");
            drop(values);
            let published = Published::of(&self.machine, engine, None);
            self.shared.published.store(Arc::new(published));
            effects.events
        }

        pub fn revision(&self) -> i64 {
            self.machine.store.now().revision()
        }
    }
}
