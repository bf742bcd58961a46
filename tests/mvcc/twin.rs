//! The naive twin: a whole map of keys for every revision, and a list of every change ever made. It
//! follows the reference (v3-api 3.3 to 3.9, formats-and-peers 3.5) line by line and forgets nothing.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;
use quorate::core::apply::{ApplyError, Reply};
use quorate::core::command::Request;
use quorate::core::lease::LeaseError;
use quorate::core::types::Revision;
use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::TargetUnion;
use quorate_proto::etcdserverpb::request_op::Request as Op;
use quorate_proto::etcdserverpb::response_op::Response;
use quorate_proto::mvccpb::KeyValue;

use crate::rig::TTL_MIN;

pub type State = BTreeMap<Bytes, KeyValue>;

/// One put or delete, as it is stored.
#[derive(Clone, PartialEq, Debug)]
pub struct Change {
    pub revision: Revision,
    pub tombstone: bool,
    pub key: Bytes,
    pub stored: Bytes,
}

/// Why a request is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    Compacted,
    Future,
    NoKey,
    NoLease,
    LeaseExists,
    TtlTooLarge,
}

impl Refusal {
    /// The twin's word for what the machine answered.
    pub fn of(error: &ApplyError) -> Refusal {
        match error {
            ApplyError::Compacted { .. } => Refusal::Compacted,
            ApplyError::FutureRevision { .. } => Refusal::Future,
            ApplyError::KeyNotFound => Refusal::NoKey,
            ApplyError::LeaseNotFound(_) | ApplyError::Lease(LeaseError::NotFound(_)) => {
                Refusal::NoLease
            }
            ApplyError::Lease(LeaseError::Exists(_)) => Refusal::LeaseExists,
            ApplyError::Lease(LeaseError::TtlTooLarge { .. }) => Refusal::TtlTooLarge,
            other => panic!("no request of the model is refused with: {other}"),
        }
    }
}

pub struct Twin {
    /// `states[r]` is the state after main revision r.
    pub states: Vec<State>,
    pub changes: Vec<Change>,
    pub compacted: i64,
    pub leases: BTreeSet<i64>,
}

fn header(revision: i64) -> Option<pb::ResponseHeader> {
    Some(pb::ResponseHeader { revision, ..Default::default() })
}

/// Whether a request's key and range end cover `key`.
fn covers(from: &[u8], end: &[u8], key: &[u8]) -> bool {
    match end {
        [] => key == from,
        [0] => key >= from,
        end => from <= key && key < end,
    }
}

/// A range over one state.
pub fn range(state: &State, request: &pb::RangeRequest) -> (Vec<KeyValueBytes>, bool, i64) {
    use pb::range_request::{SortOrder, SortTarget};
    let mut rows: Vec<KeyValue> = state
        .values()
        .filter(|kv| covers(&request.key, &request.range_end, &kv.key))
        .cloned()
        .collect();
    let count = rows.len() as i64;
    if request.count_only {
        return (Vec::new(), false, count);
    }
    let (order, target) = (request.sort_order(), request.sort_target());
    let limit = request.limit.max(0) as usize;
    let bounds = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    let in_order =
        matches!((order, target), (SortOrder::None, _) | (SortOrder::Ascend, SortTarget::Key));
    if limit > 0 && in_order && bounds == [0; 4] {
        rows.truncate(limit + 1);
    }
    let [min_mod, max_mod, min_create, max_create] = bounds;
    rows.retain(|kv| max_mod == 0 || kv.mod_revision <= max_mod);
    rows.retain(|kv| min_mod == 0 || kv.mod_revision >= min_mod);
    rows.retain(|kv| max_create == 0 || kv.create_revision <= max_create);
    rows.retain(|kv| min_create == 0 || kv.create_revision >= min_create);
    if order != SortOrder::None || target != SortTarget::Key {
        rows.sort_by(|a, b| {
            let ascending = match target {
                SortTarget::Key => a.key.cmp(&b.key),
                SortTarget::Version => a.version.cmp(&b.version),
                SortTarget::Create => a.create_revision.cmp(&b.create_revision),
                SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
                SortTarget::Value => a.value.cmp(&b.value),
            };
            if order == SortOrder::Descend { ascending.reverse() } else { ascending }
        });
    }
    let more = limit > 0 && rows.len() > limit;
    if more {
        rows.truncate(limit);
    }
    if request.keys_only {
        for kv in &mut rows {
            kv.value.clear();
            if target != SortTarget::Value {
                kv.lease = 0;
            }
        }
    }
    (rows.iter().map(KeyValueBytes::from).collect(), more, count)
}

fn compare_holds(state: &State, compare: &pb::Compare) -> bool {
    let rows: Vec<&KeyValue> =
        state.values().filter(|kv| covers(&compare.key, &compare.range_end, &kv.key)).collect();
    if rows.is_empty() {
        return compare.target != pb::compare::CompareTarget::Value as i32
            && compare_one(&KeyValue::default(), compare);
    }
    rows.into_iter().all(|kv| compare_one(kv, compare))
}

fn compare_one(kv: &KeyValue, compare: &pb::Compare) -> bool {
    let union = compare.target_union.as_ref();
    let order = match (compare.target, union) {
        (0, Some(TargetUnion::Version(n))) => kv.version.cmp(n),
        (0, _) => kv.version.cmp(&0),
        (1, Some(TargetUnion::CreateRevision(n))) => kv.create_revision.cmp(n),
        (1, _) => kv.create_revision.cmp(&0),
        (2, Some(TargetUnion::ModRevision(n))) => kv.mod_revision.cmp(n),
        (2, _) => kv.mod_revision.cmp(&0),
        (3, Some(TargetUnion::Value(value))) => kv.value.cmp(value),
        (3, _) => kv.value[..].cmp(b""),
        (4, Some(TargetUnion::Lease(n))) => kv.lease.cmp(n),
        (4, _) => kv.lease.cmp(&0),
        _ => std::cmp::Ordering::Equal,
    };
    match compare.result {
        0 => order.is_eq(),
        1 => order.is_gt(),
        2 => order.is_lt(),
        3 => order.is_ne(),
        _ => true,
    }
}

/// A transaction's choice: which compares held, outermost first, in the order of the operations.
enum Chosen<'r> {
    Op(&'r Op),
    Txn(bool, Vec<Chosen<'r>>),
}

fn choose<'r>(state: &State, txn: &'r pb::TxnRequest) -> (bool, Vec<Chosen<'r>>) {
    let succeeded = txn.compare.iter().all(|compare| compare_holds(state, compare));
    let ops = if succeeded { &txn.success } else { &txn.failure };
    let chosen = ops.iter().filter_map(|op| op.request.as_ref()).map(|op| match op {
        Op::RequestTxn(nested) => {
            let (succeeded, ops) = choose(state, nested);
            Chosen::Txn(succeeded, ops)
        }
        op => Chosen::Op(op),
    });
    (succeeded, chosen.collect())
}

/// A write in progress.
struct Work {
    state: State,
    main: i64,
    changes: Vec<Change>,
}

impl Work {
    fn revision(&self) -> i64 {
        self.main - i64::from(self.changes.is_empty())
    }

    fn put(&mut self, twin: &Twin, put: &pb::PutRequest) -> Result<pb::PutResponse, Refusal> {
        if put.lease != 0 && !twin.leases.contains(&put.lease) {
            return Err(Refusal::NoLease);
        }
        let old = self.state.get(&put.key).cloned();
        if old.is_none() && (put.ignore_value || put.ignore_lease) {
            return Err(Refusal::NoKey);
        }
        let kept = old.clone().unwrap_or_default();
        let kv = KeyValue {
            key: put.key.clone(),
            create_revision: if old.is_some() { kept.create_revision } else { self.main },
            mod_revision: self.main,
            version: kept.version + 1,
            value: if put.ignore_value { kept.value } else { put.value.clone() },
            lease: if put.ignore_lease { kept.lease } else { put.lease },
        };
        self.changes.push(Change {
            revision: Revision { main: self.main, sub: self.changes.len() as i64 },
            tombstone: false,
            key: put.key.clone(),
            stored: kv.encode_to_vec().into(),
        });
        self.state.insert(put.key.clone(), kv);
        Ok(pb::PutResponse {
            header: header(self.main),
            prev_kv: old.filter(|_| put.prev_kv).as_ref().map(KeyValueBytes::from),
        })
    }

    fn delete(&mut self, key: &Bytes) -> KeyValue {
        let stored = KeyValue { key: key.clone(), ..Default::default() };
        self.changes.push(Change {
            revision: Revision { main: self.main, sub: self.changes.len() as i64 },
            tombstone: true,
            key: key.clone(),
            stored: stored.encode_to_vec().into(),
        });
        self.state.remove(key).expect("only what is there is deleted")
    }

    fn delete_range(&mut self, delete: &pb::DeleteRangeRequest) -> pb::DeleteRangeResponse {
        let doomed: Vec<Bytes> = self
            .state
            .keys()
            .filter(|key| covers(&delete.key, &delete.range_end, key))
            .cloned()
            .collect();
        let gone: Vec<KeyValue> = doomed.iter().map(|key| self.delete(key)).collect();
        pb::DeleteRangeResponse {
            header: header(self.revision()),
            deleted: gone.len() as i64,
            prev_kvs: gone.iter().filter(|_| delete.prev_kv).map(KeyValueBytes::from).collect(),
        }
    }

    fn run(&mut self, twin: &Twin, ops: &[Chosen<'_>]) -> Result<Vec<pb::ResponseOp>, Refusal> {
        let mut responses = Vec::new();
        for op in ops {
            let response = match op {
                Chosen::Op(Op::RequestPut(put)) => Response::ResponsePut(self.put(twin, put)?),
                Chosen::Op(Op::RequestDeleteRange(delete)) => {
                    Response::ResponseDeleteRange(self.delete_range(delete))
                }
                Chosen::Op(Op::RequestRange(request)) => {
                    let now = self.revision();
                    let old = request.revision > 0 && request.revision != self.main;
                    let state = if old { twin.state(request.revision) } else { &self.state };
                    let (kvs, more, count) = range(state, request);
                    Response::ResponseRange(pb::RangeResponse {
                        header: header(now),
                        kvs,
                        more,
                        count,
                    })
                }
                Chosen::Op(Op::RequestTxn(_)) => unreachable!("resolved when it was chosen"),
                Chosen::Txn(succeeded, ops) => Response::ResponseTxn(pb::TxnResponse {
                    header: Some(pb::ResponseHeader::default()),
                    succeeded: *succeeded,
                    responses: self.run(twin, ops)?,
                }),
            };
            responses.push(pb::ResponseOp { response: Some(response) });
        }
        Ok(responses)
    }
}

impl Twin {
    pub fn new() -> Self {
        Twin {
            states: vec![State::new(); 2],
            changes: Vec::new(),
            compacted: -1,
            leases: BTreeSet::new(),
        }
    }

    pub fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    pub fn state(&self, at: i64) -> &State {
        &self.states[at as usize]
    }

    pub fn now(&self) -> &State {
        self.state(self.revision())
    }

    /// The keys that live under a lease now.
    pub fn attached(&self, lease: i64) -> Vec<Bytes> {
        self.now().values().filter(|kv| kv.lease == lease).map(|kv| kv.key.clone()).collect()
    }

    pub fn readable(&self, at: i64) -> Result<(), Refusal> {
        if at > self.revision() {
            Err(Refusal::Future)
        } else if at < self.compacted {
            Err(Refusal::Compacted)
        } else {
            Ok(())
        }
    }

    pub fn range(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, Refusal> {
        let at = if request.revision <= 0 { self.revision() } else { request.revision };
        self.readable(at)?;
        let (kvs, more, count) = range(self.state(at), request);
        Ok(pb::RangeResponse { header: header(self.revision()), kvs, more, count })
    }

    /// Every put of the chosen branches comes before any range of them, as in etcd.
    fn check(&self, ops: &[Chosen<'_>]) -> Result<(), Refusal> {
        self.check_puts(ops)?;
        self.check_ranges(ops)
    }

    fn check_puts(&self, ops: &[Chosen<'_>]) -> Result<(), Refusal> {
        for op in ops {
            match op {
                Chosen::Op(Op::RequestPut(put)) => {
                    // A missing key comes before a missing lease, unlike for a put by itself.
                    if (put.ignore_value || put.ignore_lease) && !self.now().contains_key(&put.key)
                    {
                        return Err(Refusal::NoKey);
                    }
                    if put.lease != 0 && !self.leases.contains(&put.lease) {
                        return Err(Refusal::NoLease);
                    }
                }
                Chosen::Op(_) => {}
                Chosen::Txn(_, ops) => self.check_puts(ops)?,
            }
        }
        Ok(())
    }

    fn check_ranges(&self, ops: &[Chosen<'_>]) -> Result<(), Refusal> {
        for op in ops {
            match op {
                Chosen::Op(Op::RequestRange(range)) if range.revision != 0 => {
                    self.readable(range.revision)?;
                }
                Chosen::Op(_) => {}
                Chosen::Txn(_, ops) => self.check_ranges(ops)?,
            }
        }
        Ok(())
    }

    /// Executes a request; answers its reply and how many changes it made.
    pub fn apply(&mut self, request: &Request) -> (Result<Reply, Refusal>, usize) {
        let mut work =
            Work { state: self.now().clone(), main: self.revision() + 1, changes: Vec::new() };
        let reply = self.execute(&mut work, request);
        let changes = work.changes.len();
        if reply.is_ok() && changes > 0 {
            self.states.push(work.state);
            self.changes.extend(work.changes);
        }
        (reply, changes)
    }

    fn execute(&mut self, work: &mut Work, request: &Request) -> Result<Reply, Refusal> {
        Ok(match request {
            Request::Range(request) => Reply::Range(self.range(request)?),
            Request::Put(put) => Reply::Put(work.put(self, put)?),
            Request::DeleteRange(delete) => Reply::DeleteRange(work.delete_range(delete)),
            Request::Txn(txn) => {
                let (succeeded, ops) = choose(self.now(), txn);
                self.check(&ops)?;
                let responses = work.run(self, &ops)?;
                Reply::Txn(pb::TxnResponse {
                    header: header(work.revision()),
                    succeeded,
                    responses,
                })
            }
            Request::Compaction(request) => {
                if request.revision <= self.compacted {
                    return Err(Refusal::Compacted);
                }
                self.readable(request.revision)?;
                self.compacted = request.revision;
                Reply::Compact(pb::CompactionResponse { header: header(self.revision()) })
            }
            Request::LeaseGrant(grant) => {
                if grant.ttl > 9_000_000_000 {
                    return Err(Refusal::TtlTooLarge);
                }
                if !self.leases.insert(grant.id) {
                    return Err(Refusal::LeaseExists);
                }
                Reply::LeaseGrant(pb::LeaseGrantResponse {
                    header: header(self.revision()),
                    id: grant.id,
                    ttl: grant.ttl.max(TTL_MIN),
                    error: String::new(),
                })
            }
            Request::LeaseRevoke(revoke) => {
                if !self.leases.remove(&revoke.id) {
                    return Err(Refusal::NoLease);
                }
                for key in self.attached(revoke.id) {
                    work.delete(&key);
                }
                Reply::LeaseRevoke(pb::LeaseRevokeResponse { header: header(work.revision()) })
            }
            other => panic!("the model makes no {}", other.name()),
        })
    }

    /// What a compaction at `at` keeps of all revisions up to `at`: per key its first generation that
    /// ends at `at` or later, else its last one, and in it the newest revision up to `at`. With
    /// whether that is a tombstone.
    pub fn kept(&self, at: i64) -> Vec<(Revision, bool)> {
        let mut generations: BTreeMap<&Bytes, Vec<Vec<(Revision, bool)>>> = BTreeMap::new();
        for change in &self.changes {
            let all = generations.entry(&change.key).or_insert_with(|| vec![Vec::new()]);
            all.last_mut().unwrap().push((change.revision, change.tombstone));
            if change.tombstone {
                all.push(Vec::new());
            }
        }
        generations
            .values()
            .filter_map(|all| {
                let (last, closed) = all.split_last().unwrap();
                let ends_later = |g: &&Vec<(Revision, bool)>| g.last().unwrap().0.main >= at;
                let generation = closed.iter().find(ends_later).unwrap_or(last);
                generation.iter().rev().find(|(revision, _)| revision.main <= at).copied()
            })
            .collect()
    }

    /// `HashKV` (formats-and-peers 3.5) under a compaction at `compacted`, as if all that it
    /// supersedes were gone.
    pub fn hash(&self, at: i64, compacted: i64) -> u32 {
        let kept = self.kept(at).into_iter().filter(|(_, tombstone)| !tombstone);
        self.hash_keeping(kept.map(|(revision, _)| revision).collect(), at, compacted)
    }

    /// The hash that a compaction at `at` leaves behind, the one before it having been at `previous`.
    pub fn compaction_hash(&self, at: i64, previous: i64) -> u32 {
        let kept = self.kept(at).into_iter().map(|(revision, _)| revision).collect();
        self.hash_keeping(kept, at, previous)
    }

    fn hash_keeping(&self, mut keep: BTreeSet<Revision>, at: i64, compacted: i64) -> u32 {
        if keep.is_empty() {
            keep = self.kept(compacted).into_iter().map(|(revision, _)| revision).collect();
        }
        let mut hash = crc32c::crc32c(b"key");
        for change in &self.changes {
            let Revision { main, sub } = change.revision;
            if main > at
                || (main <= compacted && !keep.contains(&change.revision))
                || (main == compacted && change.tombstone)
            {
                continue;
            }
            hash = crc32c::crc32c_append(hash, &main.to_be_bytes());
            hash = crc32c::crc32c_append(hash, b"_");
            hash = crc32c::crc32c_append(hash, &sub.to_be_bytes());
            hash = crc32c::crc32c_append(hash, if change.tombstone { b"t" } else { b"" });
            hash = crc32c::crc32c_append(hash, &change.stored);
        }
        hash
    }

    /// The changes that must still be stored under a compaction at `compacted`.
    pub fn surviving(&self, compacted: i64) -> Vec<&Change> {
        let kept: BTreeSet<Revision> =
            self.kept(compacted).into_iter().map(|(revision, _)| revision).collect();
        let lives =
            |change: &&Change| change.revision.main > compacted || kept.contains(&change.revision);
        self.changes.iter().filter(lives).collect()
    }
}
