//! The probe list (v3-api section 10): one member, what the reference release answers. Where the
//! installed etcd gives the same answer, it is asked too.

use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use quorate_proto::authpb::{Permission, UserAddOptions};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::alarm_request::AlarmAction;
use quorate_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use quorate_proto::etcdserverpb::request_op::Request;
use quorate_proto::etcdserverpb::response_op::Response;
use quorate_proto::mvccpb::event::EventType;
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::server::{
    Api, Kind, Member, PATIENCE, error, get, keys, kv, op, put_of, revision, said, span,
};

const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";
const EMPTY_KEY: &str = "etcdserver: key is not provided";
const KEY_NOT_FOUND: &str = "etcdserver: key not found";
const DUPLICATE: &str = "etcdserver: duplicate key given in txn request";
const NO_LEASE: &str = "etcdserver: requested lease not found";
const CORRUPT: &str = "etcdserver: corrupt cluster";
const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";
const TOO_LARGE: &str = "etcdserver: request is too large";

/// Both programs: the answer is the same in all releases.
const ALL: [Kind; 2] = [Kind::Memory, Kind::Etcd];

/// Puts of a, b, c, d and b again: revisions 2 to 6.
async fn fill(api: &mut Api) {
    for key in ["a", "b", "c", "d", "b"] {
        api.put(key, "v").await;
    }
}

#[tokio::test]
async fn ranges() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        // 1
        let empty = Err(error(Code::InvalidArgument, EMPTY_KEY));
        assert_eq!(api.range(get("")).await, empty);
        assert_eq!(api.range(span("", "z")).await, empty);
        // 2
        fill(&mut api).await;
        let limited = pb::RangeRequest { limit: 2, ..span("a", "e") };
        let reply = api.range(limited.clone()).await.unwrap();
        assert_eq!(keys(&reply.kvs), ["a", "b"], "{kind:?}");
        assert_eq!((reply.more, reply.count, revision(reply.header)), (true, 4, 6), "{kind:?}");
        let b = kv(&reply.kvs[1]);
        assert_eq!((b.create_revision, b.mod_revision, b.version), (3, 6, 2));
        // 3
        let counted = pb::RangeRequest { count_only: true, ..limited.clone() };
        let reply = api.range(counted).await.unwrap();
        assert_eq!((reply.kvs.len(), reply.more, reply.count), (0, false, 4), "{kind:?}");
        // 4
        let sorted = pb::RangeRequest { sort_target: SortTarget::Mod as i32, ..limited.clone() };
        let reply = api.range(sorted.clone()).await.unwrap();
        assert_eq!((keys(&reply.kvs), reply.more), (vec!["a".into(), "c".into()], true));
        // 5
        let descending = pb::RangeRequest { sort_order: SortOrder::Descend as i32, ..sorted };
        let reply = api.range(descending).await.unwrap();
        assert_eq!(keys(&reply.kvs), ["b", "d"], "{kind:?}");
        // 6
        let future = pb::RangeRequest { revision: 500, ..get("a") };
        assert_eq!(api.range(future).await, Err(error(Code::OutOfRange, FUTURE)), "{kind:?}");
        // 7
        let negative = pb::RangeRequest { revision: -5, ..get("a") };
        let reply = api.range(negative.clone()).await.unwrap();
        assert_eq!(keys(&reply.kvs), ["a"], "{kind:?}");
        let refused = api.txn(vec![], vec![op::range(negative)], vec![]).await;
        assert_eq!(refused, Err(error(Code::OutOfRange, COMPACTED)), "{kind:?}");
    }
}

/// The reference release refuses what the installed one crashes on.
#[tokio::test]
async fn unknown_sort_options_are_refused() {
    let member = Member::start(Kind::Memory).await;
    let mut api = member.api();
    let refused = Err(error(Code::InvalidArgument, "etcdserver: invalid sort option"));
    let order = pb::RangeRequest { sort_order: 3, ..get("a") };
    assert_eq!(api.range(order).await, refused);
    let target = pb::RangeRequest { sort_target: 5, ..get("a") };
    assert_eq!(api.range(target.clone()).await, refused);
    let refused = Err(error(Code::InvalidArgument, "etcdserver: invalid sort option"));
    assert_eq!(api.txn(vec![], vec![op::range(target)], vec![]).await, refused);
}

/// From 3.7 on, a listing of keys is answered without their leases, unless values decide its order.
#[tokio::test]
async fn key_listings_have_no_leases() {
    let member = Member::start(Kind::Memory).await;
    let mut api = member.api();
    api.grant(1000, 5).await.unwrap();
    api.put_leased("a", "v", 5).await;
    let request = pb::RangeRequest { keys_only: true, ..get("a") };
    let reply = api.range(request.clone()).await.unwrap();
    let listed = kv(&reply.kvs[0]);
    assert_eq!((listed.lease, listed.value, listed.mod_revision), (0, Bytes::new(), 2));
    let by_value = pb::RangeRequest { sort_target: SortTarget::Value as i32, ..request };
    let reply = api.range(by_value).await.unwrap();
    let listed = kv(&reply.kvs[0]);
    assert_eq!((listed.lease, listed.value), (5, Bytes::new()));
}

#[tokio::test]
async fn transactions() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        // 8
        let reply = api.txn(vec![], vec![], vec![]).await.unwrap();
        assert_eq!((reply.succeeded, revision(reply.header)), (true, 1), "{kind:?}");
        // 9
        let unset = pb::RequestOp { request: None };
        let refused = api.txn(vec![], vec![unset.clone()], vec![]).await;
        let not_found = Err(error(Code::InvalidArgument, KEY_NOT_FOUND));
        assert_eq!(refused, not_found, "{kind:?}");
        assert_eq!(api.txn(vec![], vec![], vec![unset]).await, not_found, "{kind:?}");
        // 10
        api.put("a", "old").await;
        let ops = vec![
            op::put("x", "1"),
            op::range(get("x")),
            op::delete("a", "", true),
            op::txn(vec![op::put("n", "1")]),
        ];
        let reply = api.txn(vec![], ops, vec![]).await.unwrap();
        assert_eq!(revision(reply.header), 3, "{kind:?}");
        let only = Some(pb::ResponseHeader { revision: 3, ..Default::default() });
        let inner: Vec<_> = reply.responses.iter().map(|r| r.response.clone().unwrap()).collect();
        let [
            Response::ResponsePut(put),
            Response::ResponseRange(range),
            Response::ResponseDeleteRange(delete),
            Response::ResponseTxn(nested),
        ] = &inner[..]
        else {
            panic!("{kind:?}: {inner:?}")
        };
        assert_eq!(put.header, only, "{kind:?}");
        assert_eq!((range.header, range.count), (only, 1), "{kind:?}");
        assert_eq!((delete.header, delete.deleted), (only, 1), "{kind:?}");
        assert_eq!(kv(&delete.prev_kvs[0]).value, "old");
        assert_eq!(nested.header, Some(pb::ResponseHeader::default()), "{kind:?}");
        // 11
        let ops = vec![op::put("x", "2"), op::delete("a", "\0", false)];
        let reply = api.txn(vec![], ops, vec![]).await.unwrap();
        assert_eq!(revision(reply.header), 4, "{kind:?}");
        assert_eq!(api.range(get("x")).await.unwrap().count, 0, "{kind:?}");
        // 12
        let both = || (op::txn(vec![op::put("k", "1")]), op::txn(vec![op::delete("k", "", false)]));
        let (put, delete) = both();
        assert!(api.txn(vec![], vec![put, delete], vec![]).await.is_ok(), "{kind:?}");
        let (put, delete) = both();
        let refused = api.txn(vec![], vec![delete, put], vec![]).await;
        assert_eq!(refused, Err(error(Code::InvalidArgument, DUPLICATE)), "{kind:?}");
        let twice = vec![op::put("k", "1"), op::put("k", "2")];
        let refused = api.txn(vec![], vec![], twice).await;
        assert_eq!(refused, Err(error(Code::InvalidArgument, DUPLICATE)), "{kind:?}");
        // 13
        let compare = |result: CompareResult, key: &str| pb::Compare {
            result: result as i32,
            target: CompareTarget::Value as i32,
            key: key.to_string().into(),
            target_union: Some(TargetUnion::Value("v".into())),
            ..Default::default()
        };
        let missing = compare(CompareResult::NotEqual, "missing");
        let reply = api.txn(vec![missing], vec![], vec![]).await.unwrap();
        assert!(!reply.succeeded, "{kind:?}");
        let nameless = compare(CompareResult::NotEqual, "");
        let refused = api.txn(vec![nameless], vec![], vec![]).await;
        assert_eq!(refused, Err(error(Code::InvalidArgument, EMPTY_KEY)), "{kind:?}");
        // 14
        let before = revision(api.range(get("x")).await.unwrap().header);
        let reply = api.delete("missing").await;
        assert_eq!((reply.deleted, revision(reply.header)), (0, before), "{kind:?}");
    }
}

/// A nested transaction has the operations left that its parent's longest list did not use.
#[tokio::test]
async fn operations_are_limited() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let puts = |prefix: &str, count: usize| {
            (0..count).map(|i| op::put(&format!("{prefix}{i}"), "v")).collect::<Vec<_>>()
        };
        assert!(api.txn(vec![], puts("a", 128), vec![]).await.is_ok(), "{kind:?}");
        let refused =
            Err(error(Code::InvalidArgument, "etcdserver: too many operations in txn request"));
        assert_eq!(api.txn(vec![], puts("a", 129), vec![]).await, refused, "{kind:?}");
        assert_eq!(api.txn(vec![], vec![], puts("a", 129)).await, refused, "{kind:?}");
        let mut fits = vec![op::txn(puts("b", 28))];
        fits.extend(puts("c", 99));
        assert!(api.txn(vec![], fits, vec![]).await.is_ok(), "{kind:?}");
        let mut exceeds = vec![op::txn(puts("b", 29))];
        exceeds.extend(puts("c", 99));
        assert_eq!(api.txn(vec![], exceeds, vec![]).await, refused, "{kind:?}");
    }
}

#[tokio::test]
async fn compactions() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        fill(&mut api).await;
        let compacted = Err(error(Code::OutOfRange, COMPACTED));
        // 15
        // A physical one that is refused waits for no more than what is under way.
        assert_eq!(api.compact(-1).await, compacted, "{kind:?}");
        assert_eq!(api.compact(0).await, Ok(6), "{kind:?}");
        assert_eq!(api.compact(0).await, compacted, "{kind:?}");
        assert_eq!(api.compact(4).await, Ok(6), "{kind:?}");
        assert_eq!(api.compact(4).await, compacted, "{kind:?}");
        let future = Err(error(Code::OutOfRange, FUTURE));
        assert_eq!(api.compact(1004).await, future, "{kind:?}");
        // 16
        let at = |revision| pb::RangeRequest { revision, ..span("a", "z") };
        assert_eq!(keys(&api.range(at(4)).await.unwrap().kvs), ["a", "b", "c"], "{kind:?}");
        let refused = Err(error(Code::OutOfRange, COMPACTED));
        assert_eq!(api.range(at(3)).await, refused, "{kind:?}");
    }
}

#[tokio::test]
async fn puts() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let mut put = async |request: pb::PutRequest| {
            api.kv.put(request).await.map(|reply| reply.into_inner().prev_kv).map_err(said)
        };
        let named = |key: &'static str| pb::PutRequest { key: key.into(), ..Default::default() };
        // 17
        let request = pb::PutRequest { ignore_value: true, ..named("a") };
        let refused = Err(error(Code::InvalidArgument, KEY_NOT_FOUND));
        assert_eq!(put(request).await, refused, "{kind:?}");
        let request = pb::PutRequest { ignore_lease: true, ..named("a") };
        assert_eq!(put(request).await, refused, "{kind:?}");
        // 18
        let request = pb::PutRequest { lease: 77, ..named("a") };
        assert_eq!(put(request).await, Err(error(Code::NotFound, NO_LEASE)), "{kind:?}");
        // The other checks, in their order.
        let refused = Err(error(Code::InvalidArgument, EMPTY_KEY));
        assert_eq!(put(named("")).await, refused, "{kind:?}");
        let both = pb::PutRequest { value: "v".into(), ignore_value: true, ..named("a") };
        let refused = Err(error(Code::InvalidArgument, "etcdserver: value is provided"));
        assert_eq!(put(both.clone()).await, refused, "{kind:?}");
        let request = pb::PutRequest { ignore_lease: true, lease: 5, ..both };
        assert_eq!(put(request).await, refused, "{kind:?}");
        let request = pb::PutRequest { ignore_lease: true, lease: 5, ..named("a") };
        let refused = Err(error(Code::InvalidArgument, "etcdserver: lease is provided"));
        assert_eq!(put(request).await, refused, "{kind:?}");
        // None of them wrote.
        assert_eq!(revision(api.range(get("a")).await.unwrap().header), 1, "{kind:?}");
    }
}

#[tokio::test]
async fn leases() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        // 19
        let reply = api.grant(0, 0).await.unwrap();
        assert!(reply.id > 0 && reply.ttl == 2 && reply.error.is_empty(), "{kind:?}: {reply:?}");
        let reply = api.grant(-5, -9).await.unwrap();
        assert_eq!((reply.id, reply.ttl), (-9, 2), "{kind:?}");
        assert_eq!(revision(reply.header), 1, "{kind:?}");
        let refused = Err(error(Code::OutOfRange, "etcdserver: too large lease TTL"));
        assert_eq!(api.grant(9_000_000_001, 0).await, refused, "{kind:?}");
        assert_eq!(api.grant(9_000_000_000, 6).await.unwrap().ttl, 9_000_000_000, "{kind:?}");
        let refused = Err(error(Code::FailedPrecondition, "etcdserver: lease already exists"));
        assert_eq!(api.grant(1000, 6).await, refused, "{kind:?}");
        // 20
        api.grant(1000, 7).await.unwrap();
        let ids = [7, 88, 7].map(|id| pb::LeaseKeepAliveRequest { id });
        let requests = tokio_stream::iter(ids);
        let mut replies = api.lease.lease_keep_alive(requests).await.unwrap().into_inner();
        for (id, ttl) in [(7, 1000), (88, 0), (7, 1000)] {
            let reply = replies.message().await.unwrap().unwrap();
            assert_eq!((reply.id, reply.ttl), (id, ttl), "{kind:?}");
            assert_eq!(revision(reply.header), 1, "{kind:?}");
        }
        assert!(replies.message().await.unwrap().is_none(), "{kind:?}");
        // 21
        let ask = |id| pb::LeaseTimeToLiveRequest { id, keys: true };
        let reply = api.lease.lease_time_to_live(ask(99)).await.unwrap().into_inner();
        assert_eq!((reply.id, reply.ttl, reply.granted_ttl), (99, -1, 0), "{kind:?}");
        assert!(reply.keys.is_empty());
        let revoke = pb::LeaseRevokeRequest { id: 99 };
        let refused = api.lease.lease_revoke(revoke).await.map(|_| ()).map_err(said);
        assert_eq!(refused, Err(error(Code::NotFound, NO_LEASE)), "{kind:?}");
        // A revoke deletes the keys that are attached at that time, in one revision.
        api.put_leased("b", "v", 7).await;
        api.put_leased("a", "v", 7).await;
        api.put_leased("c", "v", 7).await;
        api.put("c", "detached").await;
        let mut reply = api.lease.lease_time_to_live(ask(7)).await.unwrap().into_inner();
        reply.keys.sort();
        assert_eq!(reply.keys, ["a", "b"], "{kind:?}");
        assert!((990..=1000).contains(&reply.ttl) && reply.granted_ttl == 1000, "{kind:?}");
        let revoke = pb::LeaseRevokeRequest { id: 7 };
        let reply = api.lease.lease_revoke(revoke).await.unwrap().into_inner();
        assert_eq!(revision(reply.header), 6, "{kind:?}");
        let mut watching = api.watching();
        let create = pb::WatchCreateRequest { start_revision: 6, ..all() };
        watching.created(create).await;
        let events = watching.next().await.events;
        let deleted: Vec<_> = events.iter().map(|e| kv(e.kv.as_ref().unwrap()).key).collect();
        assert_eq!(deleted, ["a", "b"], "{kind:?}");
    }
}

/// A lease of the shortest life: its keys go when it ends, not before.
#[tokio::test]
async fn a_lease_expires() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let mut watching = api.watching();
        watching.created(all()).await;
        let granted = std::time::Instant::now();
        api.grant(1, 5).await.unwrap();
        api.put_leased("k", "v", 5).await;
        assert_eq!(watching.next().await.events.len(), 1);
        let response = watching.next().await;
        let lived = granted.elapsed();
        assert_eq!(response.events[0].r#type(), EventType::Delete, "{kind:?}");
        assert!(lived.as_millis() >= 1900, "{kind:?}: gone after {lived:?}");
        assert_eq!(revision(response.header), 3, "{kind:?}");
        let leases = api.lease.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap();
        assert!(leases.into_inner().leases.is_empty(), "{kind:?}");
    }
}

fn all() -> pb::WatchCreateRequest {
    pb::WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

#[tokio::test]
async fn watches() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        fill(&mut api).await;
        api.compact(4).await.unwrap();
        // 22
        let mut watching = api.watching();
        let create = pb::WatchCreateRequest { start_revision: 1, ..all() };
        assert!(!watching.created(create).await.canceled, "{kind:?}");
        let ended = watching.next().await;
        assert!(ended.canceled && !ended.created, "{kind:?}");
        assert_eq!((ended.compact_revision, revision(ended.header)), (4, 0), "{kind:?}");
        assert_eq!((ended.cancel_reason.as_str(), ended.events.len()), ("", 0), "{kind:?}");
        // At the compact revision itself, the history is there.
        let create = pb::WatchCreateRequest { start_revision: 4, watch_id: 40, ..all() };
        assert_eq!(watching.created(create).await.watch_id, 40);
        let response = watching.next().await;
        let seen: Vec<_> =
            response.events.iter().map(|e| kv(e.kv.as_ref().unwrap()).mod_revision).collect();
        assert_eq!(seen, [4, 5, 6], "{kind:?}");
        watching.cancel(40).await;
        let canceled = watching.next().await;
        assert!(canceled.canceled && canceled.watch_id == 40 && canceled.compact_revision == 0);
        // 24 (the id and text of a refusal: below)
        let create = pb::WatchCreateRequest { watch_id: 7, ..all() };
        let reply = watching.created(create.clone()).await;
        assert_eq!((reply.watch_id, reply.canceled), (7, false), "{kind:?}");
        let reply = watching.created(create).await;
        assert_eq!((reply.watch_id, reply.canceled), (-1, true), "{kind:?}");
        let duplicate = "mvcc: duplicate watch ID provided on the WatchStream";
        assert_eq!(reply.cancel_reason, duplicate, "{kind:?}");
        // 25: the next answer is that to the request behind it.
        watching.cancel(1234).await;
        let create = pb::WatchCreateRequest { watch_id: 8, ..all() };
        assert_eq!(watching.created(create).await.watch_id, 8, "{kind:?}");
        watching.cancel(8).await;
        assert!(watching.next().await.canceled);
        watching.cancel(7).await;
        assert!(watching.next().await.canceled);
        // 26
        api.put("w2", "v").await;
        let prefix =
            pb::WatchCreateRequest { key: "w".into(), range_end: "x".into(), ..Default::default() };
        let id = watching.created(prefix).await.watch_id;
        let ops = vec![op::put("w1", "1"), op::delete("w2", "", false), op::put("wnew", "2")];
        let at = revision(api.txn(vec![], ops, vec![]).await.unwrap().header);
        let response = watching.next().await;
        assert_eq!((response.watch_id, revision(response.header)), (id, at), "{kind:?}");
        let events: Vec<_> =
            response.events.iter().map(|e| (e.r#type(), kv(e.kv.as_ref().unwrap()))).collect();
        let named: Vec<_> = events.iter().map(|(kind, kv)| (*kind, &kv.key[..])).collect();
        let expected: [(_, &[u8]); 3] =
            [(EventType::Put, b"w1"), (EventType::Delete, b"w2"), (EventType::Put, b"wnew")];
        assert_eq!(named, expected, "{kind:?}");
        let tombstone =
            quorate_proto::KeyValue { key: "w2".into(), mod_revision: at, ..Default::default() };
        assert_eq!(events[1].1, tombstone, "{kind:?}");
        watching.cancel(id).await;
        assert!(watching.next().await.canceled);
        // 28
        let id = watching.created(all()).await.watch_id;
        watching.close();
        let at = api.put("late", "v").await;
        let response = watching.next().await;
        assert_eq!((response.watch_id, revision(response.header)), (id, at), "{kind:?}");
    }
}

/// 23, and a negative start: later patch releases say more than the installed one.
#[tokio::test]
async fn watches_that_are_refused() {
    let member = Member::start(Kind::Memory).await;
    let api = member.api();
    let mut watching = api.watching();
    let empty =
        pb::WatchCreateRequest { key: "x".into(), range_end: "w".into(), ..Default::default() };
    let reply = watching.created(empty).await;
    assert!(reply.canceled);
    assert_eq!((reply.watch_id, revision(reply.header)), (-1, 1));
    assert_eq!(reply.cancel_reason, "mvcc: watcher range is empty");
    let negative = pb::WatchCreateRequest { start_revision: -1, ..all() };
    let reply = watching.created(negative).await;
    assert!(reply.canceled);
    assert_eq!((reply.watch_id, reply.cancel_reason.as_str()), (-1, COMPACTED));
    // The stream stays open, and nothing was registered.
    assert_eq!(watching.created(all()).await.watch_id, 0);
}

/// 27: a progress request is answered once every watcher has seen what there is.
#[tokio::test]
async fn requested_progress() {
    let member = Member::start(Kind::Memory).await;
    let mut api = member.api();
    let mut watching = api.watching();
    // Without a watcher nothing is said: the next answer is that to the request behind it.
    watching.progress().await;
    let ahead = pb::WatchCreateRequest { start_revision: 3, ..all() };
    assert_eq!(watching.created(ahead).await.watch_id, 0);
    watching.progress().await;
    let other = pb::WatchCreateRequest { key: "none".into(), ..Default::default() };
    assert_eq!(watching.created(other).await.watch_id, 1);
    api.put("a", "v").await;
    let at = api.put("b", "v").await;
    let response = watching.next().await;
    assert_eq!((response.watch_id, revision(response.header)), (0, at));
    watching.progress().await;
    let response = watching.next().await;
    assert_eq!((response.watch_id, revision(response.header)), (-1, 3));
    assert!(response.events.is_empty() && !response.created && !response.canceled);
}

fn alarm(action: AlarmAction, member_id: u64, kind: pb::AlarmType) -> pb::AlarmRequest {
    pb::AlarmRequest { action: action as i32, member_id, alarm: kind as i32 }
}

#[tokio::test]
async fn no_space() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        api.put("k", "v").await;
        let mut ask = async |action, id| {
            let request = alarm(action, id, pb::AlarmType::Nospace);
            api.maintenance.alarm(request).await.unwrap().into_inner().alarms
        };
        let listed = vec![pb::AlarmMember { member_id: 77, alarm: pb::AlarmType::Nospace as i32 }];
        assert_eq!(ask(AlarmAction::Activate, 77).await, listed, "{kind:?}");
        assert_eq!(ask(AlarmAction::Activate, 77).await, listed, "{kind:?}");
        assert_eq!(ask(AlarmAction::Get, 0).await, listed, "{kind:?}");
        let refused = error(Code::ResourceExhausted, NO_SPACE);
        let put = pb::PutRequest { key: "k".into(), ..Default::default() };
        assert_eq!(api.kv.put(put.clone()).await.map_err(said).unwrap_err(), refused, "{kind:?}");
        let put_op = op::put("k", "v");
        let in_txn = api.txn(vec![], vec![], vec![put_op]).await;
        assert_eq!(in_txn, Err(refused.clone()), "{kind:?}");
        assert_eq!(api.delete("k").await.deleted, 1, "{kind:?}");
        assert_eq!(api.grant(100, 5).await, Err(refused.clone()), "{kind:?}");
        let mut ask = async |action, id| {
            let request = alarm(action, id, pb::AlarmType::Nospace);
            api.maintenance.alarm(request).await.unwrap().into_inner().alarms
        };
        assert_eq!(ask(AlarmAction::Deactivate, 0).await, [], "{kind:?}");
        assert_eq!(ask(AlarmAction::Deactivate, 77).await, listed, "{kind:?}");
        assert_eq!(ask(AlarmAction::Get, 0).await, [], "{kind:?}");
        assert!(api.kv.put(put).await.is_ok(), "{kind:?}");
    }
}

#[tokio::test]
async fn corruption() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        api.put("k", "v").await;
        api.grant(1000, 5).await.unwrap();
        let request = alarm(AlarmAction::Activate, 0, pb::AlarmType::Corrupt);
        api.maintenance.alarm(request).await.unwrap();
        assert!(api.range(get("k")).await.is_ok(), "{kind:?}");
        let read = vec![op::range(get("k"))];
        assert!(api.txn(vec![], read, vec![]).await.is_ok(), "{kind:?}");
        let refused = error(Code::DataLoss, CORRUPT);
        let put = pb::PutRequest { key: "k".into(), ..Default::default() };
        assert_eq!(api.kv.put(put).await.map_err(said).unwrap_err(), refused, "{kind:?}");
        assert_eq!(api.compact(1).await, Err(refused.clone()), "{kind:?}");
        let revoke = pb::LeaseRevokeRequest { id: 5 };
        let revoked = api.lease.lease_revoke(revoke).await.map(|_| ()).map_err(said);
        assert_eq!(revoked, Err(refused.clone()), "{kind:?}");
        let request = alarm(AlarmAction::Deactivate, 0, pb::AlarmType::Corrupt);
        assert_eq!(api.maintenance.alarm(request).await.unwrap().into_inner().alarms.len(), 1);
        api.put("k", "v").await;
    }
}

/// Alarms outlive the process.
#[tokio::test]
async fn alarms_survive_a_restart() {
    for kind in [Kind::Redb, Kind::Memory] {
        let mut member = Member::start(kind).await;
        let mut api = member.api();
        let request = alarm(AlarmAction::Activate, 77, pb::AlarmType::Nospace);
        api.maintenance.alarm(request).await.unwrap();
        member.crash().await;
        let mut api = member.api();
        let put = pb::PutRequest { key: "k".into(), ..Default::default() };
        let refused = api.kv.put(put).await.map_err(said).unwrap_err();
        assert_eq!(refused, error(Code::ResourceExhausted, NO_SPACE), "{kind:?}");
        let status = api.maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
        assert_eq!(status.errors, ["memberID:77 alarm:NOSPACE"], "{kind:?}");
    }
}

/// 31 to 34. Members cannot be added yet (31, 32): that is said, after the checks that need no cluster.
#[tokio::test]
async fn membership() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        // 33
        let add = |urls: &[&str]| pb::MemberAddRequest {
            peer_ur_ls: urls.iter().map(|url| url.to_string()).collect(),
            ..Default::default()
        };
        let refused = error(Code::InvalidArgument, "etcdserver: given member URLs are invalid");
        for urls in [&["foo"][..], &[], &["http://127.0.0.1:1/path"], &["http://127.0.0.1"]] {
            let said = api.cluster.member_add(add(urls)).await.map_err(said).unwrap_err();
            assert_eq!(said, refused, "{kind:?}: {urls:?}");
        }
        // 34 (this member leads)
        let request = pb::MoveLeaderRequest { target_id: 99 };
        let refused = api.maintenance.move_leader(request).await.map_err(said).unwrap_err();
        let bad = error(Code::FailedPrecondition, "etcdserver: bad leader transferee");
        assert_eq!(refused, bad, "{kind:?}");
        let status = api.maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
        let request = pb::MoveLeaderRequest { target_id: status.leader };
        assert!(api.maintenance.move_leader(request).await.is_ok(), "{kind:?}");
        let unknown = error(Code::NotFound, "etcdserver: member not found");
        let request = pb::MemberRemoveRequest { id: 99 };
        let refused = api.cluster.member_remove(request).await.map_err(said).unwrap_err();
        assert_eq!(refused, unknown, "{kind:?}");
        let peer_ur_ls = vec!["http://127.0.0.1:1".to_string()];
        let request = pb::MemberUpdateRequest { id: 99, peer_ur_ls };
        let refused = api.cluster.member_update(request).await.map_err(said).unwrap_err();
        assert_eq!(refused, unknown, "{kind:?}");
        let request = pb::MemberPromoteRequest { id: 99 };
        let refused = api.cluster.member_promote(request).await.map_err(said).unwrap_err();
        assert_eq!(refused, unknown, "{kind:?}");
        let request = add(&["http://127.0.0.1:1"]);
        let added = api.cluster.member_add(request).await.unwrap().into_inner();
        let new = added.member.unwrap();
        assert_eq!(
            (new.peer_ur_ls, new.name, new.is_learner),
            (vec!["http://127.0.0.1:1".into()], String::new(), false),
            "{kind:?}"
        );
        assert_eq!(added.members.len(), 2, "{kind:?}");
        assert_eq!(added.header.unwrap().revision, 0, "{kind:?}");
    }
}

/// 35: the log's limit speaks first, the transport's from half a mebibyte above it.
#[tokio::test]
async fn sizes() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let mut put = async |len: usize| {
            let value = vec![b'v'; len].into();
            let request = pb::PutRequest { key: "k".into(), value, ..Default::default() };
            api.kv.put(request).await.map(|_| ()).map_err(said)
        };
        assert_eq!(put(1_500_000).await, Ok(()), "{kind:?}");
        let refused = Err(error(Code::InvalidArgument, TOO_LARGE));
        assert_eq!(put(1_600_000).await, refused, "{kind:?}");
        let transport = "grpc: received message larger than max (2200008 vs. 2097152)";
        let refused = Err(error(Code::ResourceExhausted, transport));
        assert_eq!(put(2_200_000).await, refused, "{kind:?}");
        // The connection has survived it.
        assert_eq!(put(1).await, Ok(()), "{kind:?}");
    }
}

/// 36: what a snapshot stream looks like.
#[tokio::test]
async fn snapshot_stream() {
    for kind in [Kind::Redb, Kind::Memory, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        for i in 0..20 {
            api.put(&format!("k{i}"), &"v".repeat(10_000)).await;
        }
        let mut stream =
            api.maintenance.snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
        let mut parts = Vec::new();
        while let Some(part) = stream.message().await.unwrap() {
            assert_eq!(part.header, None, "{kind:?}");
            assert!(part.blob.len() <= 32 * 1024, "{kind:?}: {} bytes", part.blob.len());
            let version = if kind == Kind::Etcd { "" } else { "3.7.0" };
            assert_eq!(part.version, version, "{kind:?}");
            parts.push(part);
        }
        let digest = parts.pop().unwrap();
        let mut hasher = Sha256::new();
        let total: usize = parts.iter().map(|part| part.blob.len()).sum();
        let mut sent = 0;
        for part in &parts {
            hasher.update(&part.blob);
            sent += part.blob.len();
            assert_eq!(part.remaining_bytes as usize, total - sent, "{kind:?}");
        }
        assert_eq!(total % 4096, 0, "{kind:?}: whole pages");
        assert!(total > 200_000, "{kind:?}: {total} bytes");
        assert_eq!(digest.remaining_bytes, 0, "{kind:?}");
        assert_eq!(digest.blob[..], hasher.finalize()[..], "{kind:?}");
    }
}

/// What 3.5 and later answer without an authentication that is set up.
#[tokio::test]
async fn authentication_is_off() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let request = pb::AuthenticateRequest { name: "root".into(), password: "pw".into() };
        let refused = api.auth.authenticate(request).await.map_err(said).unwrap_err();
        let off = error(Code::FailedPrecondition, "etcdserver: authentication is not enabled");
        assert_eq!(refused, off, "{kind:?}");
        let refused =
            api.auth.auth_enable(pb::AuthEnableRequest {}).await.map_err(said).unwrap_err();
        let rootless = error(Code::FailedPrecondition, "etcdserver: root user does not exist");
        assert_eq!(refused, rootless, "{kind:?}");
    }
}

/// What etcdctl does not ask for, or checks by itself. The installed etcd knows nothing of hashed
/// passwords, and accepts more permissions than 3.5.
#[tokio::test]
async fn users_and_roles_while_authentication_is_off() {
    let mgmt = "etcdserver: invalid auth management";
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let at = api.put("k", "v").await;
        let user = |name: &str, password: &str| pb::AuthUserAddRequest {
            name: name.into(),
            password: password.into(),
            ..Default::default()
        };
        let added = api.auth.user_add(user("u", "top-secret-1")).await.unwrap().into_inner();
        let header = added.header.unwrap();
        // Users are no keys.
        assert_eq!(header.revision, at, "{kind:?}");
        assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
        api.auth.user_add(user("empty", "")).await.unwrap();
        let refused = api.auth.user_add(user("", "pw")).await.map_err(said).unwrap_err();
        let nameless = error(Code::InvalidArgument, "etcdserver: user name is empty");
        assert_eq!(refused, nameless, "{kind:?}");
        let refused = api.auth.role_add(pb::AuthRoleAddRequest::default()).await;
        let nameless = error(Code::InvalidArgument, "etcdserver: role name is empty");
        assert_eq!(refused.map_err(said).unwrap_err(), nameless, "{kind:?}");
        api.auth.role_add(pb::AuthRoleAddRequest { name: "r".into() }).await.unwrap();
        for (user, role, text) in [
            ("nobody", "r", "etcdserver: user name not found"),
            ("u", "nothing", "etcdserver: role name not found"),
        ] {
            let grant = pb::AuthUserGrantRoleRequest { user: user.into(), role: role.into() };
            let refused = api.auth.user_grant_role(grant).await.map_err(said).unwrap_err();
            assert_eq!(refused, error(Code::FailedPrecondition, text), "{kind:?}");
        }
        let listed = api.auth.user_list(pb::AuthUserListRequest {}).await.unwrap().into_inner();
        assert_eq!(listed.users, ["empty", "u"], "{kind:?}");
        assert_eq!(revision(listed.header), at, "{kind:?}");
        if kind == Kind::Etcd {
            continue;
        }

        let long = "x".repeat(73);
        let refused = api.auth.user_add(user("long", &long)).await.map_err(said).unwrap_err();
        let too_long = error(Code::Unknown, "bcrypt: password length exceeds 72 bytes");
        assert_eq!(refused, too_long);
        let change = |password: &str| pb::AuthUserChangePasswordRequest {
            name: "u".into(),
            password: password.into(),
            ..Default::default()
        };
        let refused = api.auth.user_change_password(change(&long)).await.map_err(said);
        assert_eq!(refused.unwrap_err(), too_long);
        api.auth.user_change_password(change("top-secret-2")).await.unwrap();
        let options = Some(UserAddOptions { no_password: true });
        let open = pb::AuthUserAddRequest { options, ..user("open", "top-secret-3") };
        api.auth.user_add(open).await.unwrap();

        let grant = |key: &str, range_end: &str| {
            let (key, range_end) = (key.to_string().into(), range_end.to_string().into());
            let perm = Some(Permission { key, range_end, ..Default::default() });
            pb::AuthRoleGrantPermissionRequest { name: "r".into(), perm }
        };
        let none = pb::AuthRoleGrantPermissionRequest { name: "r".into(), perm: None };
        for (request, text) in [
            (none, "etcdserver: permission not given"),
            (grant("", ""), mgmt),
            (grant("", "\0"), mgmt),
            (grant("b", "a"), mgmt),
            (grant("b", "b"), mgmt),
        ] {
            let refused = api.auth.role_grant_permission(request).await.map_err(said);
            assert_eq!(refused.unwrap_err(), error(Code::InvalidArgument, text));
        }
        let status = api.auth.auth_status(pb::AuthStatusRequest {}).await.unwrap().into_inner();
        // Three users, a role and a password; what was refused does not count.
        assert_eq!((status.enabled, status.auth_revision), (false, 6));
        assert_eq!(revision(status.header), at);

        for (name, text) in [
            ("nobody", "etcdserver: root user does not exist"),
            ("root", "etcdserver: root user does not have root role"),
        ] {
            api.auth.user_add(user(name, "pw")).await.unwrap();
            let refused = api.auth.auth_enable(pb::AuthEnableRequest {}).await.map_err(said);
            assert_eq!(refused.unwrap_err(), error(Code::FailedPrecondition, text));
        }
        let root = pb::AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() };
        api.auth.user_grant_role(root).await.unwrap();
        api.auth.auth_enable(pb::AuthEnableRequest {}).await.unwrap();
        let mut member = member;
        for _ in 0..2 {
            let put = pb::PutRequest { key: "k".into(), ..Default::default() };
            let refused = member.api().kv.put(put).await.map_err(said).unwrap_err();
            assert_eq!(refused, error(Code::InvalidArgument, "etcdserver: user name is empty"));
            // Also after a restart.
            member.crash().await;
        }
        for (name, password, code, text) in [
            ("root", "other", Code::InvalidArgument, AUTH_FAILED),
            ("stranger", "pw", Code::InvalidArgument, AUTH_FAILED),
            ("open", "top-secret-3", Code::Unknown, NO_PASSWORD),
        ] {
            let request = log_in(name, password);
            let refused = member.api().auth.authenticate(request).await.map_err(said).unwrap_err();
            assert_eq!(refused, error(code, text), "{name}");
        }
        let reply =
            member.api().auth.authenticate(log_in("root", "pw")).await.unwrap().into_inner();
        assert_eq!(revision(reply.header), at);
        let (letters, index) = reply.token.split_once('.').unwrap();
        assert!(letters.len() == 16 && index.parse::<u64>().unwrap() > 0, "{}", reply.token);
        let put = pb::PutRequest { key: "k".into(), ..Default::default() };
        let mut request = tonic::Request::new(put);
        request.metadata_mut().insert("token", reply.token.parse().unwrap());
        let put = member.api().kv.put(request).await.unwrap().into_inner();
        assert_eq!(revision(put.header), at + 1);
        // No password is in any file.
        for (path, bytes) in files(member.scratch()) {
            let found = bytes.windows(10).any(|window| window == b"top-secret");
            assert!(!found, "{}", path.display());
        }
    }
}

const AUTH_FAILED: &str = "etcdserver: authentication failed, invalid user ID or password";
const NO_PASSWORD: &str = "auth: authentication failed, password was given for no password user";

fn log_in(name: &str, password: &str) -> pb::AuthenticateRequest {
    pb::AuthenticateRequest { name: name.into(), password: password.into() }
}

/// All files below `dir`.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            found.push((path, bytes));
        }
    }
    found
}

/// The lists of a nested transaction are checked like those of its parent.
#[tokio::test]
async fn nested_lists_are_checked() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let keyless = op::any(Request::RequestPut(pb::PutRequest::default()));
        let refused = api.txn(vec![], vec![op::txn(vec![keyless])], vec![]).await;
        assert_eq!(refused, Err(error(Code::InvalidArgument, EMPTY_KEY)), "{kind:?}");
        let leased = pb::PutRequest { key: "k".into(), lease: 77, ..Default::default() };
        let leased = op::any(Request::RequestPut(leased));
        let ops = vec![op::put("first", "v"), op::txn(vec![leased])];
        let refused = api.txn(vec![], ops, vec![]).await;
        assert_eq!(refused, Err(error(Code::NotFound, NO_LEASE)), "{kind:?}");
        // The key is missed before the lease; by itself, a put misses the lease first.
        let kept =
            pb::PutRequest { key: "k".into(), lease: 77, ignore_value: true, ..Default::default() };
        let alone = api.kv.put(kept.clone()).await.map_err(said).unwrap_err();
        assert_eq!(alone, error(Code::NotFound, NO_LEASE), "{kind:?}");
        let kept = op::any(Request::RequestPut(kept));
        let refused = api.txn(vec![], vec![kept], vec![]).await;
        assert_eq!(refused, Err(error(Code::InvalidArgument, KEY_NOT_FOUND)), "{kind:?}");
        // All puts are checked before all ranges.
        let future = op::range(pb::RangeRequest { revision: 500, ..get("k") });
        let leased = pb::PutRequest { key: "k".into(), lease: 77, ..Default::default() };
        let leased = op::any(Request::RequestPut(leased));
        let refused = api.txn(vec![], vec![op::txn(vec![future]), leased], vec![]).await;
        assert_eq!(refused, Err(error(Code::NotFound, NO_LEASE)), "{kind:?}");
        // Nothing of it was written.
        let reply = api.range(get("first")).await.unwrap();
        assert_eq!((reply.count, revision(reply.header)), (0, 1), "{kind:?}");
    }
}

/// Which replies have a header, and what revision it tells (v3-api 3.1).
#[tokio::test]
async fn headers() {
    let member = Member::start(Kind::Memory).await;
    let mut api = member.api();
    let at = api.put("k", "v").await;
    let whole = api.range(get("k")).await.unwrap().header.unwrap();
    assert!(whole.cluster_id != 0 && whole.member_id != 0 && whole.raft_term > 0, "{whole:?}");
    let status = api.maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.header, Some(whole));
    assert_eq!((status.leader, status.raft_term), (whole.member_id, whole.raft_term));
    assert_eq!(status.version, "3.7.1");
    assert_eq!((status.db_size_quota, status.is_learner), (2_147_483_648, false));
    assert!(status.raft_index >= status.raft_applied_index && status.raft_applied_index > 0);
    assert!(status.db_size >= status.db_size_in_use && status.errors.is_empty(), "{status:?}");
    assert_eq!(status.downgrade_info, Some(pb::DowngradeInfo::default()));
    let reply = api.maintenance.alarm(pb::AlarmRequest::default()).await.unwrap().into_inner();
    assert_eq!(reply.header, Some(whole));
    let listed = api.lease.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.header, Some(whole));
    assert_eq!(api.grant(100, 1).await.unwrap().header, Some(whole));
    assert_eq!(api.hash_kv(0).await.unwrap().header.unwrap().revision, at);
    for linearizable in [false, true] {
        let request = pb::MemberListRequest { linearizable };
        let reply = api.cluster.member_list(request).await.unwrap().into_inner();
        assert_eq!(reply.header, Some(pb::ResponseHeader { revision: 0, ..whole }));
        let [alone] = &reply.members[..] else { panic!("{reply:?}") };
        assert_eq!((alone.id, alone.name.as_str()), (whole.member_id, "default"));
        assert_eq!(alone.peer_ur_ls, [member.peer_url()]);
        assert_eq!(alone.client_ur_ls, [format!("http://{}", member.endpoint())]);
    }
    let reply = api.maintenance.defragment(pb::DefragmentRequest {}).await.unwrap().into_inner();
    assert_eq!(reply.header, None);
    let request = pb::MoveLeaderRequest { target_id: whole.member_id };
    let reply = api.maintenance.move_leader(request).await.unwrap().into_inner();
    assert_eq!(reply.header, None);
}

/// Requests for a downgrade are checked; numbers that stand for no action are refused.
#[tokio::test]
async fn downgrades_are_validated() {
    let member = Member::start(Kind::Memory).await;
    let mut api = member.api();
    let mut ask = async |action: i32, version: &str| {
        let request = pb::DowngradeRequest { action, version: version.into() };
        let reply = api.maintenance.downgrade(request).await;
        reply.map(|reply| reply.into_inner().version).map_err(said)
    };
    // The cluster's version is decided shortly after the start.
    let undecided = Err(error(
        Code::FailedPrecondition,
        "etcdserver: cluster version not found during downgrade",
    ));
    let deadline = Instant::now() + PATIENCE;
    while ask(0, "3.6.0").await == undecided && Instant::now() < deadline {}
    assert_eq!(ask(0, "3.6.0").await, Ok("3.7".into()));
    assert_eq!(ask(0, "3.6").await, Ok("3.7".into()));
    let target = "etcdserver: invalid downgrade target version";
    for version in ["3.5.0", "3.7.0", "4.6.0"] {
        let refused = Err(error(Code::InvalidArgument, target));
        assert_eq!(ask(0, version).await, refused, "{version}");
    }
    let format = "etcdserver: wrong downgrade target version format";
    for version in ["", "3", "x.y"] {
        let refused = Err(error(Code::InvalidArgument, format));
        assert_eq!(ask(0, version).await, refused, "{version}");
    }
    assert_eq!(ask(2, "").await, Ok("3.7".into()));
    assert_eq!(ask(9, "3.6.0").await, Err(error(Code::Unknown, "etcdserver: unknown method")));
    let request = pb::AlarmRequest { action: 9, ..Default::default() };
    let (code, _) = api.maintenance.alarm(request).await.map_err(said).unwrap_err();
    assert_eq!(code, Code::InvalidArgument);
}

/// A store that fills up refuses to grow, says so, and goes on after it was cleaned up.
#[tokio::test]
async fn a_full_store_is_cleaned_up() {
    for kind in [Kind::Redb, Kind::Memory, Kind::Etcd] {
        let member = Member::with_flags(kind, &["--quota-backend-bytes", "16777216"]).await;
        let mut api = member.api();
        let mut refused = None;
        // The size is known anew with each commit to the engine: what comes before one still fits.
        for i in 0..100 {
            let value = vec![b'v'; 1 << 20].into();
            let put = pb::PutRequest { key: format!("k{i}").into(), value, ..Default::default() };
            if let Err(status) = api.kv.put(put).await {
                refused = Some(said(status));
                break;
            }
        }
        let full = error(Code::ResourceExhausted, NO_SPACE);
        assert_eq!(refused, Some(full.clone()), "{kind:?}");
        let whole = api.maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
        let own = whole.header.unwrap().member_id;
        let get_alarms = alarm(AlarmAction::Get, 0, pb::AlarmType::None);
        let listed = api.maintenance.alarm(get_alarms).await.unwrap().into_inner().alarms;
        let expected = pb::AlarmMember { member_id: own, alarm: pb::AlarmType::Nospace as i32 };
        assert_eq!(listed, [expected], "{kind:?}");
        assert_eq!(whole.errors.len(), 1, "{kind:?}: {:?}", whole.errors);
        let small = put_of("small");
        assert_eq!(api.kv.put(small.clone()).await.map_err(said).unwrap_err(), full, "{kind:?}");
        // The operator's way out.
        let everything =
            pb::DeleteRangeRequest { key: "k".into(), range_end: "l".into(), prev_kv: false };
        let deleted = api.kv.delete_range(everything).await.unwrap().into_inner();
        assert!(deleted.deleted > 5, "{kind:?}: {}", deleted.deleted);
        let at = revision(deleted.header);
        api.compact(at).await.unwrap();
        api.maintenance.defragment(pb::DefragmentRequest {}).await.unwrap();
        let after = api.maintenance.status(pb::StatusRequest {}).await.unwrap().into_inner();
        assert!(after.db_size < 4 << 20, "{kind:?}: {} bytes are left", after.db_size);
        let disarm = alarm(AlarmAction::Deactivate, own, pb::AlarmType::Nospace);
        api.maintenance.alarm(disarm).await.unwrap();
        assert_eq!(revision(api.kv.put(small).await.unwrap().into_inner().header), at + 1);
    }
}
