//! The same random requests to the binary under test and to a real etcd, in lock step.
//!
//! A failure prints seed and request; `WIRE_SEED=<seed>` runs that seed alone, `WIRE_SEEDS` and
//! `WIRE_REQUESTS` say how many seeds of how many requests there are.
//!
//! Half way, the binary under test is killed and started again; the answers go on as if it had not been.
//!
//! What is not compared, and why:
//! - cluster, member and term of a header: they differ between any two clusters;
//! - the lease of a pair without a value: the generator writes no empty value, so the pair comes from
//!   a listing of keys, which has no leases from 3.7 on;
//! - the seconds that a lease has left, beyond there being any: time passes between two calls;
//! - the header of an alarm: 3.4 has none;
//! - the deletion of a key at exactly the compact revision: kept in the history from 3.4.34 on;
//! - HashKV at a revision that was compacted at: 3.4.23 refuses it, later ones remember its hash.
//!
//! What is not asked, since releases differ: unknown sort orders and targets (a crash up to 3.5),
//! watches from a negative revision (0 up to 3.4.37), leases shorter than the test (they end when
//! the clock says so), compactions that do not wait for their physical part (while no key is left, HashKV
//! covers what that part has not dropped yet), a deletion up to the last key within a transaction (the
//! check for duplicates misses it, and a later put that is to keep the value crashes etcd).

use std::collections::BTreeSet;

use engine_conformance::Rng;
use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::TargetUnion;
use quorate_proto::etcdserverpb::request_op::Request;
use quorate_proto::etcdserverpb::response_op::Response;
use quorate_proto::etcdserverpb::watch_create_request::FilterType;
use quorate_proto::mvccpb::event::EventType;

use crate::server::{Api, Kind, Member, Said, kv, revision, said};

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[tokio::test]
async fn the_same_requests_have_the_same_answers() {
    let requests = setting("WIRE_REQUESTS").unwrap_or(300);
    let seeds = match setting("WIRE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("WIRE_SEEDS").unwrap_or(4),
    };
    for seed in seeds {
        let kind = if seed % 2 == 0 { Kind::Redb } else { Kind::Memory };
        let (mut ours, theirs) = tokio::join!(Member::start(kind), Member::start(Kind::Etcd));
        let mut pair = Pair { ours: ours.api(), theirs: theirs.api() };
        let mut generator = Generator {
            rng: Rng::new(seed),
            revision: 1,
            compacted: -1,
            compactions: BTreeSet::new(),
        };
        for index in 0..requests {
            let at = format!("WIRE_SEED={seed} request {index} ({kind:?})");
            if index == requests / 2 {
                // What was answered is there again, and nothing else.
                ours.crash().await;
                pair.ours = ours.api();
            }
            match generator.step() {
                Step::Ask(call) => pair.ask(&mut generator, call, &at).await,
                Step::Watch(request) => pair.watch(&mut generator, request, &at).await,
            }
        }
        pair.compare_histories(&generator, &format!("WIRE_SEED={seed} at the end ({kind:?})"))
            .await;
    }
}

/// What is done to both members next.
enum Step {
    Ask(Call),
    Watch(pb::WatchCreateRequest),
}

/// One call.
#[derive(Clone, Debug)]
enum Call {
    Range(pb::RangeRequest),
    Put(pb::PutRequest),
    Delete(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Compact(pb::CompactionRequest),
    Grant(pb::LeaseGrantRequest),
    Revoke(pb::LeaseRevokeRequest),
    KeepAlive(i64),
    TimeToLive(pb::LeaseTimeToLiveRequest),
    Leases,
    HashKv(i64),
    Alarms,
}

struct Generator {
    rng: Rng,
    /// The store's current and compact revision, as the replies tell.
    revision: i64,
    compacted: i64,
    /// Every revision that was compacted at.
    compactions: BTreeSet<i64>,
}

/// Few, so that requests meet; at most as many as etcd sorts without changing the order of equals.
const KEYS: [&[u8]; 10] =
    [b"a", b"aa", b"ab", b"b", b"b\0", b"c", b"d", b"\0", b"\xff", b"\xff\xff"];
const LEASES: i64 = 6;

impl Generator {
    fn below(&mut self, end: u64) -> u64 {
        self.rng.below(end)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.rng.one_in(n)
    }

    fn key(&mut self) -> bytes::Bytes {
        if self.one_in(40) {
            return bytes::Bytes::new();
        }
        let at = self.below(KEYS.len() as u64) as usize;
        bytes::Bytes::from_static(KEYS[at])
    }

    fn range_end(&mut self) -> bytes::Bytes {
        match self.below(6) {
            0 | 1 => bytes::Bytes::new(),
            2 => bytes::Bytes::from_static(b"\0"),
            _ => self.key(),
        }
    }

    fn value(&mut self) -> bytes::Bytes {
        let len = match self.below(20) {
            0 => 5_000,
            _ => 1 + self.below(3),
        };
        // Few values, so that compares by value meet.
        vec![b'v' + self.below(3) as u8; len as usize].into()
    }

    /// A revision, mostly one that can be read.
    fn some_revision(&mut self) -> i64 {
        match self.below(12) {
            0 => -1 - self.below(5) as i64,
            1 => self.revision + 1 + self.below(3) as i64,
            2..=4 => 0,
            _ => 1 + self.below(self.revision as u64) as i64,
        }
    }

    fn bound(&mut self) -> i64 {
        if self.one_in(5) { self.below(self.revision as u64 + 3) as i64 } else { 0 }
    }

    fn lease(&mut self) -> i64 {
        match self.below(4) {
            0 => self.below(LEASES as u64) as i64 - 1,
            _ => 0,
        }
    }

    fn range(&mut self) -> pb::RangeRequest {
        pb::RangeRequest {
            key: self.key(),
            range_end: self.range_end(),
            limit: if self.one_in(2) { self.below(6) as i64 - 1 } else { 0 },
            revision: if self.one_in(2) { self.some_revision() } else { 0 },
            sort_order: self.below(3) as i32,
            sort_target: self.below(5) as i32,
            serializable: self.one_in(3),
            keys_only: self.one_in(5),
            count_only: self.one_in(8),
            min_mod_revision: self.bound(),
            max_mod_revision: self.bound(),
            min_create_revision: self.bound(),
            max_create_revision: self.bound(),
        }
    }

    fn put(&mut self) -> pb::PutRequest {
        let ignore_value = self.one_in(8);
        let ignore_lease = self.one_in(8);
        pb::PutRequest {
            key: self.key(),
            value: if ignore_value && !self.one_in(6) { "".into() } else { self.value() },
            lease: if ignore_lease && !self.one_in(6) { 0 } else { self.lease() },
            prev_kv: self.one_in(3),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete(&mut self) -> pb::DeleteRangeRequest {
        let range_end = if self.one_in(3) { self.range_end() } else { "".into() };
        pb::DeleteRangeRequest { key: self.key(), range_end, prev_kv: self.one_in(2) }
    }

    fn compare(&mut self) -> pb::Compare {
        let number = self.below(self.revision as u64 + 2) as i64;
        let union = match self.below(7) {
            0 => None,
            1 => Some(TargetUnion::Version(self.below(4) as i64)),
            2 => Some(TargetUnion::CreateRevision(number)),
            3 => Some(TargetUnion::ModRevision(number)),
            4 | 5 => Some(TargetUnion::Value(self.value())),
            _ => Some(TargetUnion::Lease(self.below(LEASES as u64) as i64)),
        };
        // Mostly the target that the value is for; unknown numbers have a meaning too.
        let fitting = match union {
            Some(TargetUnion::CreateRevision(_)) => 1,
            Some(TargetUnion::ModRevision(_)) => 2,
            Some(TargetUnion::Value(_)) => 3,
            Some(TargetUnion::Lease(_)) => 4,
            None | Some(TargetUnion::Version(_)) => 0,
        };
        let target = if self.one_in(8) { self.below(6) as i32 } else { fitting };
        let result = if self.one_in(15) { 9 } else { self.below(4) as i32 };
        let range_end = if self.one_in(4) { self.range_end() } else { "".into() };
        pb::Compare { result, target, key: self.key(), target_union: union, range_end }
    }

    fn ops(&mut self, depth: u32) -> Vec<pb::RequestOp> {
        (0..self.below(4)).map(|_| self.op(depth)).collect()
    }

    fn op(&mut self, depth: u32) -> pb::RequestOp {
        let request = match self.below(if depth < 2 { 8 } else { 6 }) {
            0 | 1 => Request::RequestRange(self.range()),
            2..=4 => Request::RequestPut(self.put()),
            5 => {
                let mut delete = self.delete();
                if delete.range_end == "\0" {
                    delete.range_end = "b".into();
                }
                Request::RequestDeleteRange(delete)
            }
            _ => Request::RequestTxn(self.txn(depth + 1)),
        };
        let request = if self.one_in(80) { None } else { Some(request) };
        pb::RequestOp { request }
    }

    fn txn(&mut self, depth: u32) -> pb::TxnRequest {
        pb::TxnRequest {
            compare: (0..self.below(3)).map(|_| self.compare()).collect(),
            success: self.ops(depth),
            failure: self.ops(depth),
        }
    }

    fn watch(&mut self) -> pb::WatchCreateRequest {
        let first = self.compacted.max(1);
        let start_revision = match self.below(8) {
            0 => 1,
            _ => first + self.below((self.revision - first + 1) as u64) as i64,
        };
        let filters = match self.below(6) {
            0 => vec![FilterType::Noput as i32],
            1 => vec![FilterType::Nodelete as i32],
            _ => vec![],
        };
        pb::WatchCreateRequest {
            key: self.key(),
            range_end: self.range_end(),
            start_revision,
            filters,
            prev_kv: self.one_in(2),
            ..Default::default()
        }
    }

    fn step(&mut self) -> Step {
        if self.one_in(15) { Step::Watch(self.watch()) } else { Step::Ask(self.call()) }
    }

    fn call(&mut self) -> Call {
        match self.below(94) {
            0..=24 => Call::Range(self.range()),
            25..=44 => Call::Put(self.put()),
            45..=52 => Call::Delete(self.delete()),
            53..=76 => Call::Txn(self.txn(0)),
            77..=78 => {
                // Far back, so that there is a history left to compare.
                let revision = match self.below(4) {
                    0 => self.some_revision(),
                    _ => (self.compacted + 1).max(self.revision - 60),
                };
                Call::Compact(pb::CompactionRequest { revision, physical: true })
            }
            79..=83 => {
                let id = 1 + self.below(LEASES as u64 - 2) as i64;
                let ttl = if self.one_in(6) { 9_000_000_001 } else { 3_000 };
                Call::Grant(pb::LeaseGrantRequest { ttl, id })
            }
            84..=85 => {
                Call::Revoke(pb::LeaseRevokeRequest { id: 1 + self.below(LEASES as u64) as i64 })
            }
            86 => Call::KeepAlive(1 + self.below(LEASES as u64) as i64),
            87..=89 => {
                let id = 1 + self.below(LEASES as u64) as i64;
                Call::TimeToLive(pb::LeaseTimeToLiveRequest { id, keys: self.one_in(2) })
            }
            90 => Call::Leases,
            91 => Call::Alarms,
            _ => {
                let revision = self.some_revision();
                // Releases differ at these.
                Call::HashKv(if self.compactions.contains(&revision) { 0 } else { revision })
            }
        }
    }
}

/// The two members.
struct Pair {
    ours: Api,
    theirs: Api,
}

impl Pair {
    async fn ask(&mut self, generator: &mut Generator, call: Call, at: &str) {
        let (ours, theirs) = tokio::join!(ask(&mut self.ours, &call), ask(&mut self.theirs, &call));
        let (ours, theirs) = (ours.map(Answer::normal), theirs.map(Answer::normal));
        assert_eq!(ours, theirs, "{at}: {call:?}");
        if let Ok(answer) = &ours {
            generator.revision = answer.revision.unwrap_or(generator.revision);
            if let Call::Compact(request) = &call {
                generator.compacted = request.revision;
                generator.compactions.insert(request.revision);
            }
        }
    }

    /// Watches the same past from both, up to an event that is made for it.
    async fn watch(
        &mut self,
        generator: &mut Generator,
        request: pb::WatchCreateRequest,
        at: &str,
    ) {
        // An empty range is told in other words by later releases (v3-api 3.8).
        let end = &request.range_end;
        if !end.is_empty() && end != "\0" && end <= &request.key {
            return;
        }
        // A watch of the empty key is one of `\0`.
        let key: bytes::Bytes =
            if request.key.is_empty() { "\0".into() } else { request.key.clone() };
        let last = if request.filters.contains(&(FilterType::Noput as i32)) {
            let put = pb::PutRequest { key: key.clone(), value: "v".into(), ..Default::default() };
            self.ask(generator, Call::Put(put), at).await;
            let delete = pb::DeleteRangeRequest { key, ..Default::default() };
            self.ask(generator, Call::Delete(delete), at).await;
            generator.revision
        } else {
            let put = pb::PutRequest { key, value: "v".into(), ..Default::default() };
            self.ask(generator, Call::Put(put), at).await;
            generator.revision
        };
        let compacted = generator.compacted;
        let ours = replay(&mut self.ours, &request, last, compacted).await;
        let theirs = replay(&mut self.theirs, &request, last, compacted).await;
        assert_eq!(ours, theirs, "{at}: {request:?} up to revision {last}");
    }

    /// The whole history that is left, and its hashes.
    async fn compare_histories(&mut self, generator: &Generator, at: &str) {
        let put = pb::PutRequest { key: "end".into(), value: "v".into(), ..Default::default() };
        let last = revision(self.ours.kv.put(put.clone()).await.unwrap().into_inner().header);
        let same = revision(self.theirs.kv.put(put).await.unwrap().into_inner().header);
        assert_eq!(last, same, "{at}");
        let request = pb::WatchCreateRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            start_revision: generator.compacted.max(1),
            prev_kv: true,
            ..Default::default()
        };
        let compacted = generator.compacted;
        let ours = replay(&mut self.ours, &request, last, compacted).await;
        let theirs = replay(&mut self.theirs, &request, last, compacted).await;
        assert_eq!(ours, theirs, "{at}");
        let Replay::Events(events) = ours else { panic!("{at}: the history ends: {ours:?}") };
        assert!(events.len() > 10, "{at}: only {} events", events.len());
        for revision in (compacted + 1).max(1)..=last {
            let ours = self.ours.hash_kv(revision).await.unwrap();
            let theirs = self.theirs.hash_kv(revision).await.unwrap();
            let (ours, theirs) =
                ((ours.hash, ours.compact_revision), (theirs.hash, theirs.compact_revision));
            assert_eq!(ours, theirs, "{at}: HashKV at {revision}");
        }
    }
}

/// What a watch of the past gave.
#[derive(PartialEq, Debug)]
enum Replay {
    Compacted(i64),
    /// Type, pair and previous pair.
    Events(Vec<(EventType, KeyValueBytes, Option<KeyValueBytes>)>),
}

async fn replay(
    api: &mut Api,
    request: &pb::WatchCreateRequest,
    last: i64,
    compacted: i64,
) -> Replay {
    let mut watching = api.watching();
    let reply = watching.created(request.clone()).await;
    assert!(!reply.canceled, "{request:?}: {reply:?}");
    let mut events = Vec::new();
    loop {
        let response = watching.next().await;
        if response.canceled {
            return Replay::Compacted(response.compact_revision);
        }
        for event in response.events {
            let raw = event.kv.clone().unwrap();
            let at = kv(&raw).mod_revision;
            if event.r#type() != EventType::Delete || at != compacted {
                events.push((event.r#type(), raw, event.prev_kv));
            }
            if at == last {
                return Replay::Events(events);
            }
        }
    }
}

/// A reply, as far as it is compared, and its revision.
#[derive(PartialEq, Debug)]
struct Answer {
    revision: Option<i64>,
    body: Body,
}

#[derive(PartialEq, Debug)]
enum Body {
    Range(pb::RangeResponse),
    Put(pb::PutResponse),
    Delete(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact,
    Grant(pb::LeaseGrantResponse),
    Revoke,
    KeepAlive(pb::LeaseKeepAliveResponse),
    TimeToLive(pb::LeaseTimeToLiveResponse),
    Leases(Vec<i64>),
    HashKv(u32, i64),
    Alarms(Vec<pb::AlarmMember>),
}

impl Answer {
    fn new(header: &mut Option<pb::ResponseHeader>, body: impl FnOnce() -> Body) -> Answer {
        Answer { revision: header.take().map(|header| header.revision), body: body() }
    }

    /// Without what differs between releases.
    fn normal(mut self) -> Answer {
        match &mut self.body {
            Body::Range(reply) => normal_range(reply),
            Body::Txn(reply) => normal_txn(reply),
            _ => {}
        }
        self
    }
}

fn normal_txn(reply: &mut pb::TxnResponse) {
    for response in &mut reply.responses {
        match &mut response.response {
            Some(Response::ResponseRange(range)) => normal_range(range),
            Some(Response::ResponseTxn(txn)) => normal_txn(txn),
            _ => {}
        }
    }
}

fn normal_range(reply: &mut pb::RangeResponse) {
    for raw in &mut reply.kvs {
        let mut pair = kv(raw);
        if pair.value.is_empty() {
            pair.lease = 0;
            *raw = (&pair).into();
        }
    }
}

async fn ask(api: &mut Api, call: &Call) -> Result<Answer, Said> {
    macro_rules! call {
        ($service:ident.$method:ident($request:expr)) => {
            api.$service.$method($request).await.map_err(said)?.into_inner()
        };
    }
    Ok(match call.clone() {
        Call::Range(request) => {
            let mut reply = call!(kv.range(request));
            Answer::new(&mut reply.header.take(), || Body::Range(reply))
        }
        Call::Put(request) => {
            let mut reply = call!(kv.put(request));
            Answer::new(&mut reply.header.take(), || Body::Put(reply))
        }
        Call::Delete(request) => {
            let mut reply = call!(kv.delete_range(request));
            Answer::new(&mut reply.header.take(), || Body::Delete(reply))
        }
        Call::Txn(request) => {
            let mut reply = call!(kv.txn(request));
            Answer::new(&mut reply.header.take(), || Body::Txn(reply))
        }
        Call::Compact(request) => {
            let mut reply = call!(kv.compact(request));
            Answer::new(&mut reply.header, || Body::Compact)
        }
        Call::Grant(request) => {
            let mut reply = call!(lease.lease_grant(request));
            Answer::new(&mut reply.header.take(), || Body::Grant(reply))
        }
        Call::Revoke(request) => {
            let mut reply = call!(lease.lease_revoke(request));
            Answer::new(&mut reply.header, || Body::Revoke)
        }
        Call::KeepAlive(id) => {
            let requests = tokio_stream::iter([pb::LeaseKeepAliveRequest { id }]);
            let mut replies = call!(lease.lease_keep_alive(requests));
            let mut reply = replies.message().await.map_err(said)?.expect("a reply a request");
            Answer::new(&mut reply.header.take(), || Body::KeepAlive(reply))
        }
        Call::TimeToLive(request) => {
            let mut reply = call!(lease.lease_time_to_live(request));
            reply.ttl = reply.ttl.signum();
            reply.keys.sort();
            Answer::new(&mut reply.header.take(), || Body::TimeToLive(reply))
        }
        Call::Leases => {
            let mut reply = call!(lease.lease_leases(pb::LeaseLeasesRequest {}));
            let mut ids: Vec<_> = reply.leases.iter().map(|lease| lease.id).collect();
            ids.sort();
            Answer::new(&mut reply.header, || Body::Leases(ids))
        }
        Call::HashKv(revision) => {
            let mut reply = call!(maintenance.hash_kv(pb::HashKvRequest { revision }));
            let body = Body::HashKv(reply.hash, reply.compact_revision);
            Answer::new(&mut reply.header, || body)
        }
        Call::Alarms => {
            let reply = call!(maintenance.alarm(pb::AlarmRequest::default()));
            Answer { revision: None, body: Body::Alarms(reply.alarms) }
        }
    })
}
