//! Leases: what every member knows of them, and when the leader lets them end.
//!
//! [`LeaseTable`] is replicated state: it changes only through applied log entries, holds no time
//! and is equal on all members at the same applied index (up to the minimum TTL, which each member
//! takes from its own election timeout, as etcd does). [`Lessor`] belongs to the leader alone: it
//! keeps the deadlines, which never enter the log. Expiry is noticed by the lessor, proposed as a
//! revoke, and happens when that revoke is applied to the table.
//!
//! Invariant: a key is attached to at most one lease, and `lease_of(key) == id` exactly when
//! `keys(id)` has the key. Attachments are not stored: they are rebuilt from the `lease` field of
//! the live keys.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use imbl::{OrdMap, OrdSet};
use prost::Message;
use quorate_proto::leasepb;

use super::types::{LeaseId, Uptime};

/// The greatest TTL that can be granted, in seconds.
pub const TTL_MAX: i64 = 9_000_000_000;

/// The smallest TTL that is granted, in seconds: 1.5 election timeouts, rounded up, so that a lease
/// cannot run out while the members elect a leader. At least 1.
pub const fn min_ttl(election_timeout_ms: u64) -> i64 {
    let seconds = election_timeout_ms.saturating_mul(3).div_ceil(2).div_ceil(1000);
    if seconds == 0 { 1 } else { seconds as i64 }
}

/// Why the table refuses a change. The same on all members: it becomes the reply to the caller.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseError {
    #[error("lease {0} not found")]
    NotFound(LeaseId),
    #[error("lease {0} already exists")]
    Exists(LeaseId),
    #[error("lease TTL of {asked} s is above {TTL_MAX} s")]
    TtlTooLarge { asked: i64 },
}

/// Why a stored lease cannot be read back.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum RecordError {
    #[error("lease key of {0} bytes, expected 8")]
    Key(usize),
    #[error("value of lease {id} is no lease message: {source}")]
    Value {
        id: LeaseId,
        #[source]
        source: prost::DecodeError,
    },
    #[error("value under the key of lease {key} describes lease {value}")]
    Mismatch { key: LeaseId, value: LeaseId },
}

/// What is known of one lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    /// Seconds granted.
    pub ttl: i64,
    /// Seconds that were left at the last checkpoint; 0 or less: none was taken since the last
    /// renewal.
    pub remaining: i64,
    keys: Keys,
}

impl Lease {
    /// The attached keys, ascending.
    pub fn keys(&self) -> impl Iterator<Item = &Bytes> {
        self.keys.iter()
    }

    /// How many keys are attached.
    pub fn key_count(&self) -> usize {
        self.keys.few.len() + self.keys.many.len()
    }

    /// Whether a key is attached that is at or after `from`, and before `to` if that is given.
    pub fn has_key_in(&self, from: &[u8], to: Option<&[u8]>) -> bool {
        let few = &self.keys.few;
        let found = few
            .get(few.partition_point(|key| &key[..] < from))
            .or_else(|| self.keys.many.range::<_, [u8]>(bounds(from)).next());
        found.is_some_and(|key| to.is_none_or(|to| &key[..] < to))
    }
}

fn bounds(from: &[u8]) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (Bound::Included(from), Bound::Unbounded)
}

/// A sorted set of keys. A lease commonly has one key, for which a tree node would waste a
/// kilobyte; one with very many must not be copied whole when a single key joins it.
#[derive(Clone, Default, Debug)]
struct Keys {
    /// Ascending; empty once `many` is in use.
    few: Vec<Bytes>,
    many: OrdSet<Bytes>,
}

/// By content: which form a set has depends on its past.
impl PartialEq for Keys {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Keys {}

impl Keys {
    const FEW: usize = 16;

    fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.few.iter().chain(self.many.iter())
    }

    fn insert(&mut self, key: Bytes) {
        if !self.many.is_empty() {
            self.many.insert(key);
            return;
        }
        if let Err(at) = self.few.binary_search(&key) {
            if self.few.len() < Self::FEW {
                self.few.insert(at, key);
            } else {
                self.many = std::mem::take(&mut self.few).into_iter().collect();
                self.many.insert(key);
            }
        }
    }

    fn remove(&mut self, key: &[u8]) {
        if let Ok(at) = self.few.binary_search_by(|k| k[..].cmp(key)) {
            self.few.remove(at);
        } else {
            self.many.remove(key);
        }
    }
}

/// All leases and what is attached to them. A clone shares its memory, so that the applier can
/// publish one after each batch.
#[derive(Clone, Debug)]
pub struct LeaseTable {
    ttl_min: i64,
    leases: OrdMap<LeaseId, Arc<Lease>>,
    attached: OrdMap<Bytes, LeaseId>,
}

impl LeaseTable {
    /// An empty table that grants at least `ttl_min` seconds: see [`min_ttl`].
    pub fn new(ttl_min: i64) -> Self {
        LeaseTable { ttl_min, leases: OrdMap::new(), attached: OrdMap::new() }
    }

    /// Seconds that a lease is granted at least.
    pub fn ttl_min(&self) -> i64 {
        self.ttl_min
    }

    /// Creates a lease; answers the effective TTL in seconds, which is the minimum if `ttl` is
    /// below it.
    ///
    /// # Errors
    /// `NotFound` for the id 0, which means "no lease"; `TtlTooLarge`; `Exists`.
    pub fn grant(&mut self, id: LeaseId, ttl: i64) -> Result<i64, LeaseError> {
        if id == LeaseId(0) {
            return Err(LeaseError::NotFound(id));
        }
        if ttl > TTL_MAX {
            return Err(LeaseError::TtlTooLarge { asked: ttl });
        }
        if self.leases.contains_key(&id) {
            return Err(LeaseError::Exists(id));
        }
        let ttl = ttl.max(self.ttl_min);
        self.leases.insert(id, Arc::new(Lease { ttl, remaining: 0, keys: Keys::default() }));
        Ok(ttl)
    }

    /// Forgets a lease; answers the keys that were attached to it, ascending, for the caller to
    /// delete in one revision. They are detached already.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn revoke(&mut self, id: LeaseId) -> Result<Vec<Bytes>, LeaseError> {
        let lease = self.leases.remove(&id).ok_or(LeaseError::NotFound(id))?;
        let keys: Vec<Bytes> = lease.keys().cloned().collect();
        for key in &keys {
            self.attached.remove(key);
        }
        Ok(keys)
    }

    /// Moves `key` to lease `id`, away from any other; id 0 detaches it.
    ///
    /// # Errors
    /// `NotFound`; the key stays where it was.
    pub fn attach(&mut self, key: &[u8], id: LeaseId) -> Result<(), LeaseError> {
        if id == LeaseId(0) {
            self.detach(key);
            return Ok(());
        }
        let before = self.lease_of(key);
        if before == Some(id) {
            return Ok(());
        }
        let lease = self.leases.get_mut(&id).ok_or(LeaseError::NotFound(id))?;
        // A copy: a slice of the request would keep its value in memory as long as the lease lives.
        let key = Bytes::copy_from_slice(key);
        Arc::make_mut(lease).keys.insert(key.clone());
        if let Some(before) = before {
            self.drop_key(before, &key);
        }
        self.attached.insert(key, id);
        Ok(())
    }

    /// Frees `key` of its lease; answers which it was.
    pub fn detach(&mut self, key: &[u8]) -> Option<LeaseId> {
        // Removing what is not there would still copy every node on the way that a reader shares.
        let id = self.lease_of(key)?;
        self.attached.remove(key);
        self.drop_key(id, key);
        Some(id)
    }

    fn drop_key(&mut self, id: LeaseId, key: &[u8]) {
        let lease = self.leases.get_mut(&id).expect("an attached key names a lease of the table");
        Arc::make_mut(lease).keys.remove(key);
    }

    /// The lease that `key` is attached to.
    pub fn lease_of(&self, key: &[u8]) -> Option<LeaseId> {
        self.attached.get(key).copied()
    }

    /// What is known of lease `id`.
    pub fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(&id).map(|lease| &**lease)
    }

    /// Whether lease `id` exists.
    pub fn contains(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    /// The keys attached to lease `id`, ascending; none if there is no such lease.
    pub fn keys(&self, id: LeaseId) -> impl Iterator<Item = &Bytes> {
        self.get(id).into_iter().flat_map(Lease::keys)
    }

    /// How many keys are attached to any lease.
    pub fn attached_count(&self) -> usize {
        self.attached.len()
    }

    /// The keys attached to any lease, ascending.
    pub fn attached(&self) -> impl Iterator<Item = &Bytes> {
        self.attached.keys()
    }

    /// Whether a key is attached to any lease that is at or after `from`, and before `to` if that is
    /// given.
    pub fn has_attached_in(&self, from: &[u8], to: Option<&[u8]>) -> bool {
        let found = self.attached.range::<_, [u8]>(bounds(from)).next();
        found.is_some_and(|(key, _)| to.is_none_or(|to| &key[..] < to))
    }

    /// All leases by ascending id.
    pub fn iter(&self) -> impl Iterator<Item = (LeaseId, &Lease)> {
        self.leases.iter().map(|(id, lease)| (*id, &**lease))
    }

    /// How many leases there are.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there is no lease.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Notes how many seconds lease `id` had left; 0 or less withdraws the note. Answers false if
    /// there is no such lease, which is no error: it may have been revoked meanwhile.
    pub fn checkpoint(&mut self, id: LeaseId, remaining: i64) -> bool {
        let Some(lease) = self.leases.get_mut(&id) else { return false };
        if lease.remaining != remaining {
            Arc::make_mut(lease).remaining = remaining;
        }
        true
    }

    /// The key of lease `id` in the lease bucket: its 64 bits, big-endian.
    pub fn record_key(id: LeaseId) -> Bytes {
        Bytes::copy_from_slice(&id.0.to_be_bytes())
    }

    /// The value of lease `id` in the lease bucket: after a grant, and after a checkpoint where
    /// those are to be persisted.
    pub fn record(&self, id: LeaseId) -> Option<Bytes> {
        let lease = self.get(id)?;
        let record = leasepb::Lease { id: id.0, ttl: lease.ttl, remaining_ttl: lease.remaining };
        Some(record.encode_to_vec().into())
    }

    /// Takes one pair of the lease bucket into the table; a TTL below the minimum is raised to it.
    /// The keys are attached afterwards with [`LeaseTable::attach`].
    ///
    /// # Errors
    /// [`RecordError`] if the pair is not one that etcd or we would write; the table is unchanged.
    pub fn restore(&mut self, key: &[u8], value: &[u8]) -> Result<LeaseId, RecordError> {
        let key: [u8; 8] = key.try_into().map_err(|_| RecordError::Key(key.len()))?;
        let id = LeaseId(i64::from_be_bytes(key));
        let record =
            leasepb::Lease::decode(value).map_err(|source| RecordError::Value { id, source })?;
        if record.id != id.0 {
            return Err(RecordError::Mismatch { key: id, value: LeaseId(record.id) });
        }
        let lease = Lease {
            ttl: record.ttl.max(self.ttl_min),
            remaining: record.remaining_ttl,
            keys: Keys::default(),
        };
        self.leases.insert(id, Arc::new(lease));
        Ok(id)
    }
}

/// Settings of a [`Lessor`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LessorOptions {
    /// Milliseconds after which a lease whose revoke was asked for but not applied is handed out
    /// again: the request timeout, 5 s and 2 election timeouts. At least 1.
    pub retry_ms: u64,
    /// Milliseconds between two checkpoints of a lease that has longer than that to live; `None`
    /// switches checkpoints off (feature gate `LeaseCheckpoint`). At least 1.
    pub checkpoint_interval_ms: Option<u64>,
}

impl Default for LessorOptions {
    fn default() -> Self {
        LessorOptions { retry_ms: 7_000, checkpoint_interval_ms: None }
    }
}

/// The interval of checkpoints where the feature is on, in milliseconds.
pub const CHECKPOINT_INTERVAL_MS: u64 = 5 * 60 * 1000;
/// How many checkpoints one log entry carries at most.
pub const CHECKPOINT_BATCH: usize = 1000;
/// How often a leader looks for expired leases, in milliseconds.
pub const EXPIRY_TICK_MS: u64 = 500;
/// How many expired leases a tick hands out at most.
pub const EXPIRED_PER_TICK: usize = 500;

/// From this many leases on, a new leader spreads their expiries.
const SPREAD_FROM: usize = 1000;
/// At most so many leases, restarted by a new leader, end within `SPREAD_WINDOW_MS`: 750 a second,
/// which leaves a quarter of the revoke rate to leases that end in their own time.
const SPREAD_PER_WINDOW: usize = 75;
const SPREAD_WINDOW_MS: u64 = 100;

/// What became of a keep-alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Renewal {
    /// The full TTL, in seconds, runs again.
    Renewed { ttl: i64 },
    /// The log holds a checkpoint of this lease, by which a new leader would end it early. Propose
    /// a checkpoint with nothing remaining, and renew again when [`Lessor::checkpointed`] has been
    /// told of it.
    Checkpointed,
    /// It has run out but is not revoked yet. The caller waits for [`Lessor::revoked`] (the answer
    /// is then TTL 0) or for the loss of leadership (`NotPrimary`).
    Expired,
    /// There is no such lease: the answer is TTL 0.
    Unknown,
    /// This member is not the leader: the caller is sent there.
    NotPrimary,
}

/// Why the time left of a lease cannot be told.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum LessorError {
    #[error("lease {0} not found")]
    Unknown(LeaseId),
    #[error("not a primary lessor")]
    NotPrimary,
}

/// The deadlines of all leases while this member leads.
///
/// Each lease has one alarm in a heap, at or before its deadline. A renewal only moves the
/// deadline; the alarm, when it comes up, is set anew. So a keep-alive costs one look-up, and a
/// lease that is kept alive passes through the heap once per TTL.
#[derive(Debug)]
pub struct Lessor {
    options: LessorOptions,
    primary: bool,
    leases: BTreeMap<LeaseId, Timed>,
    /// An alarm counts only if its lease exists and names the same time: others are remains.
    alarms: BinaryHeap<Reverse<(Uptime, LeaseId)>>,
    /// As `alarms`, for `Timed::checkpoint`.
    checkpoints: BinaryHeap<Reverse<(Uptime, LeaseId)>>,
}

/// The times mean nothing while this member does not lead.
#[derive(Clone, Copy, Debug)]
struct Timed {
    ttl: i64,
    remaining: i64,
    expiry: Uptime,
    /// Never later than `expiry`, except while a revoke is under way: then when to ask again.
    alarm: Uptime,
    checkpoint: Option<Uptime>,
}

impl Timed {
    fn new(ttl: i64, remaining: i64) -> Self {
        let never = Uptime(u64::MAX);
        Timed { ttl, remaining, expiry: never, alarm: never, checkpoint: None }
    }

    /// Seconds that a new leader lets the lease run.
    fn run_seconds(self) -> i64 {
        if self.remaining > 0 { self.remaining } else { self.ttl }
    }
}

/// `now` plus a number of seconds; a negative one counts as 0.
fn plus_seconds(now: Uptime, seconds: i64) -> Uptime {
    now.plus_ms(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000))
}

impl Lessor {
    /// A lessor that knows no lease and does not lead.
    ///
    /// # Panics
    /// If an interval of the options is 0: the lessor would hand out the same lease for ever.
    pub fn new(options: LessorOptions) -> Self {
        assert!(options.retry_ms > 0, "the retry interval of revokes is at least 1 ms");
        assert!(options.checkpoint_interval_ms != Some(0), "checkpoints are at least 1 ms apart");
        Lessor {
            options,
            primary: false,
            leases: BTreeMap::new(),
            alarms: BinaryHeap::new(),
            checkpoints: BinaryHeap::new(),
        }
    }

    /// A grant was applied: `ttl` and `remaining` in seconds as the table has them.
    pub fn granted(&mut self, id: LeaseId, ttl: i64, remaining: i64, now: Uptime) {
        self.leases.insert(id, Timed::new(ttl, remaining));
        if self.primary {
            self.start(id, now, 0);
            self.schedule_checkpoint(id, now);
        }
        self.sweep();
    }

    /// A revoke was applied. Answers whether the lease was known; keep-alives that wait for it are
    /// released.
    pub fn revoked(&mut self, id: LeaseId) -> bool {
        let known = self.leases.remove(&id).is_some();
        self.sweep();
        known
    }

    /// A checkpoint was applied: lease `id` has `remaining` seconds noted in the table.
    pub fn checkpointed(&mut self, id: LeaseId, remaining: i64, now: Uptime) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.remaining = remaining;
            if self.primary {
                self.schedule_checkpoint(id, now);
            }
        }
        self.sweep();
    }

    /// The table was replaced by that of a snapshot: `(id, ttl, remaining)` of all its leases. A
    /// leader receives no snapshot, so this also ends any leadership.
    pub fn restored(&mut self, leases: impl IntoIterator<Item = (LeaseId, i64, i64)>) {
        self.demote();
        self.leases =
            leases.into_iter().map(|(id, ttl, left)| (id, Timed::new(ttl, left))).collect();
    }

    /// Restarts the full TTL of a lease. Called for each keep-alive.
    pub fn renew(&mut self, id: LeaseId, now: Uptime) -> Renewal {
        if !self.primary {
            return Renewal::NotPrimary;
        }
        let Some(lease) = self.leases.get_mut(&id) else { return Renewal::Unknown };
        if lease.expiry <= now {
            return Renewal::Expired;
        }
        if lease.remaining > 0 {
            return Renewal::Checkpointed;
        }
        let ttl = lease.ttl;
        lease.expiry = plus_seconds(now, ttl);
        // A deadline that a new leader had put off comes forward again.
        if lease.expiry < lease.alarm {
            lease.alarm = lease.expiry;
            self.alarms.push(Reverse((lease.alarm, id)));
            self.sweep();
        }
        Renewal::Renewed { ttl }
    }

    /// The leases that have run out, at most `limit`, those that ran out first in front. Each is
    /// handed out once, and again only when its revoke is not applied within the retry interval.
    /// Called every [`EXPIRY_TICK_MS`] with [`EXPIRED_PER_TICK`], or less if there is no room for
    /// so many proposals.
    pub fn expired(&mut self, now: Uptime, limit: usize) -> Vec<LeaseId> {
        let mut expired = Vec::new();
        while expired.len() < limit
            && let Some((at, id)) = self.next_alarm()
            && at <= now
        {
            self.alarms.pop();
            expired.push(id);
            self.set_alarm(id, now.plus_ms(self.options.retry_ms));
        }
        expired
    }

    /// When [`Lessor::expired`] or [`Lessor::checkpoints_due`] will next have something; `None` if
    /// never, as long as nothing is granted.
    pub fn next_deadline(&mut self) -> Option<Uptime> {
        let alarm = self.next_alarm().map(|(at, _)| at);
        let checkpoint = self.next_checkpoint().map(|(at, _)| at);
        alarm.into_iter().chain(checkpoint).min()
    }

    /// Leadership begins: every lease restarts at its TTL, or at what a checkpoint says is left of
    /// it, plus `extend_ms` (the election timeout), since nobody knows when it was last renewed.
    /// Where there are very many, some run longer so that no second sees more than 750 of them end.
    pub fn promote(&mut self, now: Uptime, extend_ms: u64) {
        self.demote();
        self.primary = true;
        let ids: Vec<LeaseId> = self.leases.keys().copied().collect();
        for &id in &ids {
            self.start(id, now, extend_ms);
            self.schedule_checkpoint(id, now);
        }
        if ids.len() >= SPREAD_FROM {
            self.spread();
        }
    }

    /// Each lease in the order of their deadlines ends at its own, or a window after the 75th
    /// before it.
    fn spread(&mut self) {
        let mut order: Vec<(Uptime, LeaseId)> =
            self.leases.iter().map(|(id, lease)| (lease.expiry, *id)).collect();
        order.sort_unstable();
        for i in SPREAD_PER_WINDOW..order.len() {
            let earliest = order[i - SPREAD_PER_WINDOW].0.plus_ms(SPREAD_WINDOW_MS);
            order[i].0 = order[i].0.max(earliest);
        }
        for &(expiry, id) in &order {
            let lease = self.leases.get_mut(&id).expect("the order was made of the leases");
            lease.expiry = expiry;
            lease.alarm = expiry;
        }
        self.alarms = order.into_iter().map(Reverse).collect();
    }

    /// Leadership ends: no lease runs out here any more, and keep-alives that wait are sent
    /// elsewhere.
    pub fn demote(&mut self) {
        self.primary = false;
        self.alarms.clear();
        self.checkpoints.clear();
    }

    /// Whether this member keeps the deadlines.
    pub fn is_primary(&self) -> bool {
        self.primary
    }

    /// Whole seconds left of a lease, cut towards zero; negative if it ran out longer than a second
    /// ago and is not revoked yet.
    ///
    /// # Errors
    /// `NotPrimary`, `Unknown`.
    pub fn remaining(&self, id: LeaseId, now: Uptime) -> Result<i64, LessorError> {
        if !self.primary {
            return Err(LessorError::NotPrimary);
        }
        let lease = self.leases.get(&id).ok_or(LessorError::Unknown(id))?;
        let (left, over) = (lease.expiry.since_ms(now) / 1000, now.since_ms(lease.expiry) / 1000);
        Ok(i64::try_from(left).unwrap_or(i64::MAX) - i64::try_from(over).unwrap_or(i64::MAX))
    }

    /// All leases: on the leader those that end first in front, elsewhere by id.
    pub fn list(&self) -> Vec<LeaseId> {
        if !self.primary {
            return self.leases.keys().copied().collect();
        }
        let mut order: Vec<(Uptime, LeaseId)> =
            self.leases.iter().map(|(id, lease)| (lease.expiry, *id)).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, id)| id).collect()
    }

    /// How many leases are known.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether no lease is known.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Checkpoints to propose now, at most `limit`: the lease and the seconds it has left, rounded
    /// up. A lease comes again after the interval, whether or not its checkpoint was applied.
    pub fn checkpoints_due(&mut self, now: Uptime, limit: usize) -> Vec<(LeaseId, i64)> {
        let mut due = Vec::new();
        let Some(interval_ms) = self.options.checkpoint_interval_ms else { return due };
        while due.len() < limit
            && let Some((at, id)) = self.next_checkpoint()
            && at <= now
        {
            self.checkpoints.pop();
            let lease = self.leases.get_mut(&id).expect("a valid checkpoint alarm names a lease");
            lease.checkpoint = None;
            if lease.expiry <= now {
                continue;
            }
            let left_ms = lease.expiry.since_ms(now);
            let remaining = i64::try_from(left_ms.div_ceil(1000)).unwrap_or(i64::MAX);
            // One that was renewed a moment ago has nothing to note yet.
            if remaining < lease.ttl {
                due.push((id, remaining));
            }
            if left_ms > interval_ms {
                self.set_checkpoint(id, now.plus_ms(interval_ms));
            }
        }
        due
    }

    fn start(&mut self, id: LeaseId, now: Uptime, extend_ms: u64) {
        let lease = self.leases.get_mut(&id).expect("started when present");
        lease.expiry = plus_seconds(now, lease.run_seconds()).plus_ms(extend_ms);
        let at = lease.expiry;
        self.set_alarm(id, at);
    }

    fn set_alarm(&mut self, id: LeaseId, at: Uptime) {
        self.leases.get_mut(&id).expect("alarms are set for known leases").alarm = at;
        self.alarms.push(Reverse((at, id)));
    }

    fn schedule_checkpoint(&mut self, id: LeaseId, now: Uptime) {
        let Some(interval_ms) = self.options.checkpoint_interval_ms else { return };
        let lease = self.leases.get_mut(&id).expect("scheduled when present");
        lease.checkpoint = None;
        let to_run_ms = u64::try_from(lease.run_seconds()).unwrap_or(0).saturating_mul(1000);
        if to_run_ms > interval_ms {
            self.set_checkpoint(id, now.plus_ms(interval_ms));
        }
    }

    fn set_checkpoint(&mut self, id: LeaseId, at: Uptime) {
        self.leases.get_mut(&id).expect("scheduled for known leases").checkpoint = Some(at);
        self.checkpoints.push(Reverse((at, id)));
    }

    /// The first alarm that counts, brought up to date: it is at the lease's deadline or a retry.
    fn next_alarm(&mut self) -> Option<(Uptime, LeaseId)> {
        while let Some(&Reverse((at, id))) = self.alarms.peek() {
            match self.leases.get_mut(&id) {
                Some(lease) if lease.alarm == at && lease.expiry <= at => return Some((at, id)),
                Some(lease) if lease.alarm == at => {
                    lease.alarm = lease.expiry;
                    let later = lease.expiry;
                    *self.alarms.peek_mut().expect("just seen") = Reverse((later, id));
                }
                _ => drop(self.alarms.pop()),
            }
        }
        None
    }

    fn next_checkpoint(&mut self) -> Option<(Uptime, LeaseId)> {
        while let Some(&Reverse((at, id))) = self.checkpoints.peek() {
            if self.leases.get(&id).is_some_and(|lease| lease.checkpoint == Some(at)) {
                return Some((at, id));
            }
            self.checkpoints.pop();
        }
        None
    }

    /// Drops what revoked and re-granted leases leave in the heaps, once it outweighs the rest.
    fn sweep(&mut self) {
        let bound = 2 * self.leases.len() + 64;
        if self.alarms.len() > bound {
            let leases = &self.leases;
            let mut live: Vec<_> = std::mem::take(&mut self.alarms).into_vec();
            live.retain(|Reverse((at, id))| leases.get(id).is_some_and(|l| l.alarm == *at));
            // The same time can be set twice for one lease: by a grant, a revoke and a grant again.
            live.sort_unstable();
            live.dedup();
            self.alarms = live.into();
        }
        if self.checkpoints.len() > bound {
            let leases = &self.leases;
            let mut live: Vec<_> = std::mem::take(&mut self.checkpoints).into_vec();
            live.retain(|Reverse((at, id))| {
                leases.get(id).is_some_and(|l| l.checkpoint == Some(*at))
            });
            live.sort_unstable();
            live.dedup();
            self.checkpoints = live.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// splitmix64: the tests' only source of chance.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % bound
        }
    }

    fn key(name: &str) -> Bytes {
        Bytes::copy_from_slice(name.as_bytes())
    }

    fn keys_of(table: &LeaseTable, id: i64) -> Vec<&str> {
        table.keys(LeaseId(id)).map(|k| std::str::from_utf8(k).unwrap()).collect()
    }

    #[test]
    fn the_minimum_ttl_is_one_and_a_half_election_timeouts_rounded_up() {
        for (election_ms, seconds) in [
            (0, 1),
            (1, 1),
            (500, 1),
            (666, 1),
            (667, 2),
            (1000, 2),
            (1333, 2),
            (1334, 3),
            (50_000, 75),
        ] {
            assert_eq!(min_ttl(election_ms), seconds, "election timeout of {election_ms} ms");
        }
    }

    #[test]
    fn grants_follow_the_rules_of_the_api() {
        let mut table = LeaseTable::new(2);
        assert_eq!(table.grant(LeaseId(1), 0), Ok(2));
        assert_eq!(table.grant(LeaseId(-9), -5), Ok(2));
        assert_eq!(table.grant(LeaseId(2), 60), Ok(60));
        assert_eq!(table.grant(LeaseId(3), TTL_MAX), Ok(TTL_MAX));
        assert_eq!(
            table.grant(LeaseId(4), TTL_MAX + 1),
            Err(LeaseError::TtlTooLarge { asked: 9_000_000_001 })
        );
        assert_eq!(table.grant(LeaseId(2), 60), Err(LeaseError::Exists(LeaseId(2))));
        assert_eq!(table.grant(LeaseId(0), 60), Err(LeaseError::NotFound(LeaseId(0))));
        let ids: Vec<i64> = table.iter().map(|(id, _)| id.0).collect();
        assert_eq!(ids, [-9, 1, 2, 3]);
    }

    #[test]
    fn a_key_follows_its_last_put_and_a_revoke_takes_only_what_is_attached() {
        let mut table = LeaseTable::new(2);
        table.grant(LeaseId(1), 10).unwrap();
        table.grant(LeaseId(2), 10).unwrap();
        for name in ["c", "a", "b", "d"] {
            table.attach(&key(name), LeaseId(1)).unwrap();
        }
        table.attach(&key("a"), LeaseId(1)).unwrap(); // again: nothing changes
        assert_eq!(keys_of(&table, 1), ["a", "b", "c", "d"]);

        table.attach(&key("b"), LeaseId(2)).unwrap();
        table.attach(&key("c"), LeaseId(0)).unwrap();
        assert_eq!(table.detach(b"d"), Some(LeaseId(1)));
        assert_eq!(table.detach(b"d"), None);
        assert_eq!(
            table.attach(&key("b"), LeaseId(7)),
            Err(LeaseError::NotFound(LeaseId(7))),
            "an unknown lease"
        );
        assert_eq!(table.lease_of(b"b"), Some(LeaseId(2)), "a refused attachment changes nothing");

        let published = table.clone();
        assert_eq!(table.revoke(LeaseId(1)), Ok(vec![key("a")]));
        assert_eq!(table.revoke(LeaseId(1)), Err(LeaseError::NotFound(LeaseId(1))));
        assert_eq!(table.lease_of(b"a"), None);
        assert_eq!(keys_of(&table, 2), ["b"]);
        assert_eq!(keys_of(&published, 1), ["a"], "a published table is frozen");
    }

    #[test]
    fn records_are_those_of_etcd_and_come_back() {
        let mut table = LeaseTable::new(2);
        table.grant(LeaseId(0x0102), 60).unwrap();
        table.grant(LeaseId(-1), 5).unwrap();
        assert!(table.checkpoint(LeaseId(0x0102), 40));
        assert!(!table.checkpoint(LeaseId(5), 40), "an unknown lease is passed over");
        assert_eq!(LeaseTable::record_key(LeaseId(0x0102)), key("\0\0\0\0\0\0\x01\x02"));
        assert_eq!(&table.record(LeaseId(0x0102)).unwrap()[..], b"\x08\x82\x02\x10\x3c\x18\x28");
        assert_eq!(LeaseTable::record_key(LeaseId(-1))[..], [0xff; 8]);

        let mut back = LeaseTable::new(10);
        for (id, _) in table.iter() {
            let value = table.record(id).unwrap();
            assert_eq!(back.restore(&LeaseTable::record_key(id), &value), Ok(id));
        }
        let read: Vec<_> = back.iter().map(|(id, l)| (id.0, l.ttl, l.remaining)).collect();
        assert_eq!(
            read,
            [(-1, 10, 0), (0x0102, 60, 40)],
            "the minimum holds for stored leases too"
        );

        let bad: [(&[u8], &[u8], &str); 3] = [
            (b"1234567", b"", "lease key of 7 bytes, expected 8"),
            (b"\0\0\0\0\0\0\0\x03", b"\x08", "value of lease 3 is no lease message: "),
            (
                b"\0\0\0\0\0\0\0\x03",
                b"\x08\x04",
                "value under the key of lease 3 describes lease 4",
            ),
        ];
        for (key, value, text) in bad {
            let error = back.restore(key, value).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
        assert_eq!(back.len(), 2);
    }

    #[test]
    fn attachments_agree_with_a_simple_twin() {
        for seed in 0..20 {
            let mut random = Random(seed);
            let mut table = LeaseTable::new(2);
            let mut twin: BTreeMap<i64, ()> = BTreeMap::new();
            let mut attached: BTreeMap<String, i64> = BTreeMap::new();
            for step in 0..2000 {
                let id = random.below(6) as i64 + 1;
                let name = format!("k{:03}", random.below(120));
                let what = format!("seed {seed} step {step}");
                match random.below(40) {
                    0..3 => {
                        assert_eq!(
                            table.grant(LeaseId(id), 5).is_ok(),
                            twin.insert(id, ()).is_none(),
                            "{what}"
                        );
                    }
                    3 => {
                        let known = twin.remove(&id).is_some();
                        let keys: Vec<Bytes> = attached
                            .iter()
                            .filter(|(_, lease)| **lease == id)
                            .map(|(k, _)| key(k))
                            .collect();
                        attached.retain(|_, lease| *lease != id);
                        let expect = known.then_some(keys).ok_or(LeaseError::NotFound(LeaseId(id)));
                        assert_eq!(table.revoke(LeaseId(id)), expect, "{what}");
                    }
                    4..9 => {
                        let before = attached.remove(&name).map(LeaseId);
                        assert_eq!(table.detach(name.as_bytes()), before, "{what}");
                    }
                    _ => {
                        let known = twin.contains_key(&id);
                        assert_eq!(table.attach(&key(&name), LeaseId(id)).is_ok(), known, "{what}");
                        if known {
                            attached.insert(name.clone(), id);
                        }
                    }
                }
                assert_eq!(
                    table.lease_of(name.as_bytes()),
                    attached.get(&name).copied().map(LeaseId),
                    "{what}"
                );
                let expect: Vec<&str> = attached
                    .iter()
                    .filter(|(_, lease)| **lease == id)
                    .map(|(k, _)| &k[..])
                    .collect();
                assert_eq!(keys_of(&table, id), expect, "{what}");
                let (from, to) = (name.as_str(), format!("k{:03}", random.below(120)));
                let within =
                    |key: &str, to: Option<&str>| key >= from && to.is_none_or(|to| key < to);
                for to in [None, Some(&to[..])] {
                    let bytes = to.map(str::as_bytes);
                    if let Some(lease) = table.get(LeaseId(id)) {
                        assert_eq!(lease.key_count(), expect.len(), "{what}");
                        assert_eq!(
                            lease.has_key_in(from.as_bytes(), bytes),
                            expect.iter().any(|key| within(key, to)),
                            "{what}: {from} to {to:?}"
                        );
                    }
                    assert_eq!(
                        table.has_attached_in(from.as_bytes(), bytes),
                        attached.keys().any(|key| within(key, to)),
                        "{what}: {from} to {to:?}"
                    );
                }
                assert_eq!(table.attached_count(), attached.len(), "{what}");
                assert!(table.attached().eq(attached.keys().map(String::as_bytes)), "{what}");
            }
        }
    }

    fn leader(options: LessorOptions) -> Lessor {
        let mut lessor = Lessor::new(options);
        lessor.promote(Uptime(0), 1000);
        lessor
    }

    fn at(seconds: u64) -> Uptime {
        Uptime(seconds * 1000)
    }

    #[test]
    fn a_lease_runs_its_ttl_and_a_keep_alive_restarts_it() {
        let mut lessor = leader(LessorOptions::default());
        let id = LeaseId(1);
        assert_eq!(lessor.next_deadline(), None);
        lessor.granted(id, 10, 0, at(0));
        assert_eq!(lessor.remaining(id, Uptime(1)), Ok(9));
        assert_eq!(lessor.next_deadline(), Some(at(10)));
        assert_eq!(lessor.renew(id, at(9)), Renewal::Renewed { ttl: 10 });
        assert_eq!(lessor.renew(LeaseId(2), at(9)), Renewal::Unknown);
        assert_eq!(lessor.expired(at(10), 500), []);
        assert_eq!(lessor.next_deadline(), Some(at(19)));
        assert_eq!(lessor.expired(Uptime(18_999), 500), []);

        assert_eq!(lessor.renew(id, at(19)), Renewal::Expired, "not a moment longer");
        assert_eq!(lessor.expired(at(19), 500), [id]);
        assert_eq!(lessor.expired(at(19), 500), [], "handed out once");
        assert_eq!(lessor.remaining(id, Uptime(19_999)), Ok(0), "cut towards zero");
        assert_eq!(lessor.remaining(id, at(21)), Ok(-2));
        assert_eq!(lessor.renew(id, at(20)), Renewal::Expired);
        assert_eq!(lessor.next_deadline(), Some(at(26)));
        assert_eq!(lessor.expired(at(26), 500), [id], "its revoke was lost");

        assert!(lessor.revoked(id));
        assert!(!lessor.revoked(id));
        assert_eq!(lessor.renew(id, at(27)), Renewal::Unknown);
        assert_eq!(lessor.remaining(id, at(27)), Err(LessorError::Unknown(id)));
        assert_eq!(lessor.next_deadline(), None);
    }

    #[test]
    fn a_lease_granted_again_under_its_id_has_nothing_of_the_old_one() {
        let mut lessor = leader(LessorOptions::default());
        let id = LeaseId(1);
        lessor.granted(id, 10, 0, at(0));
        lessor.revoked(id);
        lessor.granted(id, 10, 0, at(0));
        assert_eq!(lessor.expired(at(10), 500), [id], "once, although two alarms were set");
        lessor.revoked(id);
        lessor.granted(id, 20, 0, at(10));
        assert_eq!(lessor.expired(at(29), 500), []);
        assert_eq!(lessor.expired(at(30), 500), [id]);
    }

    #[test]
    fn a_tick_hands_out_what_ran_out_first_up_to_its_limit() {
        let mut lessor = leader(LessorOptions::default());
        for id in 1..=7 {
            lessor.granted(LeaseId(id), 20 - id, 0, at(0));
        }
        assert_eq!(lessor.list().first(), Some(&LeaseId(7)));
        let mut ids = |limit| -> Vec<i64> {
            lessor.expired(at(18), limit).into_iter().map(|id| id.0).collect()
        };
        assert_eq!(ids(3), [7, 6, 5]);
        assert_eq!(ids(2), [4, 3]);
        assert_eq!(ids(500), [2]);
        assert_eq!(ids(500), [0; 0]);
    }

    #[test]
    fn only_a_leader_ends_leases_and_a_new_one_restarts_them() {
        let mut lessor = Lessor::new(LessorOptions::default());
        lessor.granted(LeaseId(1), 10, 0, at(0));
        lessor.granted(LeaseId(2), 60, 20, at(0));
        assert_eq!(lessor.expired(at(1000), 500), []);
        assert_eq!(lessor.next_deadline(), None);
        assert_eq!(lessor.renew(LeaseId(1), at(1)), Renewal::NotPrimary);
        assert_eq!(lessor.remaining(LeaseId(1), at(1)), Err(LessorError::NotPrimary));

        lessor.promote(at(1000), 1000);
        assert_eq!(lessor.remaining(LeaseId(1), at(1000)), Ok(11), "TTL and the election timeout");
        assert_eq!(lessor.remaining(LeaseId(2), at(1000)), Ok(21), "as a checkpoint left it");
        assert_eq!(lessor.renew(LeaseId(1), at(1000)), Renewal::Renewed { ttl: 10 });
        assert_eq!(lessor.next_deadline(), Some(at(1010)), "a renewal forgets the extension");
        assert_eq!(lessor.expired(at(1010), 500), [LeaseId(1)]);

        lessor.demote();
        assert_eq!(lessor.renew(LeaseId(1), at(1010)), Renewal::NotPrimary);
        lessor.promote(at(1020), 1000);
        assert_eq!(lessor.renew(LeaseId(1), at(1021)), Renewal::Renewed { ttl: 10 });

        lessor.restored([(LeaseId(5), 10, 0)]);
        assert!(!lessor.is_primary());
        assert_eq!(lessor.list(), [LeaseId(5)]);
    }

    #[test]
    fn a_new_leader_spreads_a_crowd() {
        for (count, ttl_spread) in [(999, 1), (1000, 1), (20_000, 1), (20_000, 40)] {
            let mut random = Random(count as u64);
            let mut lessor = Lessor::new(LessorOptions::default());
            let mut due: BTreeMap<LeaseId, u64> = BTreeMap::new();
            for id in 1..=count {
                let ttl = 10 + random.below(ttl_spread) as i64;
                lessor.granted(LeaseId(id), ttl, 0, at(0));
                due.insert(LeaseId(id), 5000 + 1000 + ttl as u64 * 1000);
            }
            lessor.promote(at(5), 1000);
            let mut ends: Vec<u64> = Vec::new();
            while let Some(deadline) = lessor.next_deadline() {
                for id in lessor.expired(deadline, usize::MAX) {
                    assert!(deadline.0 >= due[&id], "lease {id} ends before its time");
                    ends.push(deadline.0);
                    lessor.revoked(id);
                }
            }
            assert_eq!(ends.len(), count as usize);
            let crowded = ends.windows(751).any(|w| w[750] - w[0] < 1000);
            assert_eq!(crowded, count < 1000, "{count} leases over {ttl_spread} s");
            let last = due.values().max().unwrap();
            let needed = count as u64 * 1000 / 750;
            assert!(*ends.last().unwrap() <= last + needed, "put off no longer than it takes");
        }
    }

    #[test]
    fn checkpoints_come_every_interval_and_a_renewal_withdraws_them_first() {
        let options = LessorOptions { checkpoint_interval_ms: Some(300_000), ..Default::default() };
        let mut lessor = leader(options);
        let id = LeaseId(1);
        lessor.granted(id, 1000, 0, at(0));
        lessor.granted(LeaseId(2), 300, 0, at(0)); // not above the interval
        assert_eq!(lessor.next_deadline(), Some(at(300)));
        assert_eq!(lessor.checkpoints_due(at(299), 1000), []);
        assert_eq!(lessor.checkpoints_due(Uptime(300_001), 1000), [(id, 700)]);
        assert_eq!(lessor.checkpoints_due(at(301), 1000), []);
        lessor.checkpointed(id, 700, at(302));
        assert_eq!(lessor.checkpoints_due(at(601), 1000), []);
        assert_eq!(lessor.checkpoints_due(at(602), 1000), [(id, 398)]);
        lessor.checkpointed(id, 398, at(602));

        assert_eq!(lessor.renew(id, at(700)), Renewal::Checkpointed);
        lessor.checkpointed(id, 0, at(700));
        assert_eq!(lessor.renew(id, at(700)), Renewal::Renewed { ttl: 1000 });
        assert_eq!(lessor.checkpoints_due(at(999), 1000), []);
        assert_eq!(lessor.checkpoints_due(at(1000), 1000), [(id, 700)]);
        assert_eq!(lessor.checkpoints_due(at(1300), 1000), [(id, 400)], "the first was lost");

        lessor.revoked(id);
        assert_eq!(lessor.checkpoints_due(at(9000), 1000), []);
    }

    #[test]
    fn what_revoked_leases_leave_behind_is_bounded() {
        let options = LessorOptions { checkpoint_interval_ms: Some(1), ..Default::default() };
        let mut lessor = leader(options);
        for round in 0..10_000 {
            lessor.granted(LeaseId(round % 7 + 1), TTL_MAX, 0, Uptime(round as u64));
            lessor.revoked(LeaseId(round % 7 + 1));
        }
        assert!(lessor.is_empty());
        assert!(lessor.alarms.len() <= 64 && lessor.checkpoints.len() <= 64);
    }

    /// The simplest lessor there is: looks at every lease each time.
    #[derive(Default)]
    struct Twin {
        leases: BTreeMap<LeaseId, TwinLease>,
    }

    struct TwinLease {
        ttl: i64,
        expiry: u64,
        asked: Option<u64>,
    }

    #[test]
    fn deadlines_agree_with_a_simple_twin() {
        const RETRY: u64 = 7000;
        for seed in 0..30 {
            let mut random = Random(seed);
            let mut lessor = leader(LessorOptions::default());
            let mut twin = Twin::default();
            let mut now = 0u64;
            let mut led = true;
            for step in 0..3000 {
                let what = format!("seed {seed} step {step} at {now} ms");
                let id = LeaseId(random.below(40) as i64 + 1);
                match random.below(100) {
                    0..25 => now += random.below(600),
                    25 => now += random.below(30_000),
                    26..40 => {
                        twin.leases.entry(id).or_insert_with(|| {
                            let ttl = random.below(20) as i64 + 1;
                            lessor.granted(id, ttl, 0, Uptime(now));
                            TwinLease { ttl, expiry: now + ttl as u64 * 1000, asked: None }
                        });
                    }
                    40..45 => {
                        assert_eq!(lessor.revoked(id), twin.leases.remove(&id).is_some(), "{what}");
                    }
                    45 => {
                        led = !led;
                        if led {
                            lessor.promote(Uptime(now), 1000);
                            for lease in twin.leases.values_mut() {
                                lease.expiry = now + 1000 + lease.ttl as u64 * 1000;
                                lease.asked = None;
                            }
                        } else {
                            lessor.demote();
                        }
                    }
                    46..80 => {
                        let expect = match twin.leases.get_mut(&id) {
                            _ if !led => Renewal::NotPrimary,
                            None => Renewal::Unknown,
                            Some(lease) if lease.expiry <= now => Renewal::Expired,
                            Some(lease) => {
                                lease.expiry = now + lease.ttl as u64 * 1000;
                                Renewal::Renewed { ttl: lease.ttl }
                            }
                        };
                        assert_eq!(lessor.renew(id, Uptime(now)), expect, "{what}");
                    }
                    _ => {
                        let limit = [1, 3, 500][random.below(3) as usize];
                        let due: Vec<LeaseId> = twin
                            .leases
                            .iter()
                            .filter(|(_, l)| led && l.expiry.max(l.asked.unwrap_or(0)) <= now)
                            .map(|(id, _)| *id)
                            .collect();
                        if led {
                            let first =
                                twin.leases.values().map(|l| l.expiry.max(l.asked.unwrap_or(0)));
                            assert_eq!(lessor.next_deadline().map(|d| d.0), first.min(), "{what}");
                        }
                        let mut got = lessor.expired(Uptime(now), limit);
                        assert_eq!(
                            got.len(),
                            due.len().min(limit),
                            "{what}: due {due:?}, got {got:?}"
                        );
                        for id in &got {
                            assert!(due.contains(id), "{what}: {id} is not due");
                            twin.leases.get_mut(id).unwrap().asked = Some(now + RETRY);
                        }
                        got.sort_unstable();
                        got.dedup();
                        assert_eq!(got.len(), due.len().min(limit), "{what}: handed out twice");
                    }
                }
                let expect = twin.leases.get(&id).map(|l| (l.expiry as i64 - now as i64) / 1000);
                if led {
                    assert_eq!(lessor.remaining(id, Uptime(now)).ok(), expect, "{what}");
                }
                assert_eq!(lessor.len(), twin.leases.len(), "{what}");
            }
        }
    }
}
