//! Each hole that was told of etcd in 2026, with the test that finds it. The installed etcd is older than
//! all the repairs: that these tests find something is seen on it.
//!
//! Two more are holes of TLS and have their tests with it (`tests/tls`): client certificates that a
//! revocation list names and that were accepted all the same, and handshakes that never end and are
//! never given up.

use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::alarm_request::AlarmAction;
use quorate_proto::etcdserverpb::request_op::Request;
use quorate_proto::etcdserverpb::response_op::Response;
use tonic::Code;

use crate::access::{delete, denied, grant_lease, nested, put, put_leased, user_empty, watch};
use crate::call::Call;
use crate::login::{Session, User, secured, subjects};
use crate::server::{Kind, Member, get, kv, op, revision};

const READER: User = ("reader", &[(Type::Read, "a", "")]);
const WRITER: User = ("writer", &[(Type::Write, "a", "b")]);

/// A member on which `secret` is a key of a lease, 7, and root's session.
async fn with_secret(kind: Kind) -> (Member, Session) {
    let (member, root) = secured(kind, &[("plain", &[]), READER, WRITER]).await;
    root.call(&grant_lease(7)).await.unwrap();
    root.call(&put_leased("secret", 7)).await.unwrap();
    root.put("a", "1").await.unwrap();
    (member, root)
}

/// Calls that nobody's credential was asked for.
#[tokio::test]
async fn calls_without_a_check() {
    for kind in subjects() {
        let (member, root) = with_secret(kind).await;
        let nobody = Session::nobody(member.api());
        let plain = Session::of(member.api(), "plain").await;
        let at = revision(
            root.api.kv.clone().range(root.ask(get("a"))).await.unwrap().into_inner().header,
        );
        let alarm = |action: AlarmAction| {
            let alarm = pb::AlarmType::Nospace as i32;
            Call::Alarm(pb::AlarmRequest { action: action as i32, member_id: 1, alarm })
        };
        let compact = Call::Compact(pb::CompactionRequest { revision: at, physical: true });
        let left = Call::LeaseTimeToLive(pb::LeaseTimeToLiveRequest { id: 7, keys: true });
        let keep = Call::LeaseKeepAlive(pb::LeaseKeepAliveRequest { id: 7 });
        let unlisted = [
            // The last, as it does most.
            left,
            keep,
            Call::LeaseLeases,
            alarm(AlarmAction::Activate),
            alarm(AlarmAction::Deactivate),
            compact,
        ];
        let safe = kind != Kind::Etcd;
        for call in &unlisted {
            assert_eq!(nobody.call(call).await == Err(user_empty()), safe, "{kind:?}: {call:?}");
            assert_eq!(plain.call(call).await == Err(denied()), safe, "{kind:?}: {call:?}");
        }
        for call in [
            grant_lease(8),
            Call::MemberList(pb::MemberListRequest { linearizable: true }),
            alarm(AlarmAction::Get),
            Call::Status,
        ] {
            assert_eq!(nobody.call(&call).await == Err(user_empty()), safe, "{kind:?}: {call:?}");
        }
        // Nothing of it has happened: the history is whole, and the member takes writes.
        let past = pb::RangeRequest { revision: at - 1, ..get("secret") };
        let there = root.call(&Call::Range(past)).await;
        assert_eq!(there.is_ok(), safe, "{kind:?}: {there:?}");
        root.put("a", "2").await.unwrap();
    }
}

/// What is within a transaction that is within another was not looked at.
#[tokio::test]
async fn transactions_within_transactions() {
    for kind in subjects() {
        let (member, root) = with_secret(kind).await;
        root.call(&Call::Put(put("target"))).await.unwrap();
        let plain = Session::of(member.api(), "plain").await;
        let nobody = Session::nobody(member.api());
        let safe = kind != Kind::Etcd;
        let evil = [
            op::put("target", "stolen"),
            op::range(get("secret")),
            op::delete("target", "", false),
            op::delete("\0", "\0", true),
        ];
        for inner in evil {
            for depth in 2..=4 {
                for txn in nested(inner.clone(), depth) {
                    let call = Call::Txn(txn);
                    let told = plain.call(&call).await;
                    assert_eq!(told == Err(denied()), safe, "{kind:?}: {told:?}: {call:?}");
                    let told = nobody.call(&call).await;
                    assert_eq!(told == Err(user_empty()), safe, "{kind:?}: {told:?}: {call:?}");
                }
            }
        }
        let left = root.get("target").await.unwrap();
        assert_eq!(left.as_deref() == Some("v"), safe, "{kind:?}: {left:?}");
    }
}

/// A put within a transaction told what was there before to those who may only write.
#[tokio::test]
async fn the_previous_value_of_a_put_in_a_transaction() {
    for kind in subjects() {
        let (member, root) = with_secret(kind).await;
        root.put("a", "not for the writer").await.unwrap();
        let writer = Session::of(member.api(), "writer").await;
        let put = pb::PutRequest { prev_kv: true, ..put("a") };
        assert_eq!(writer.call(&Call::Put(put.clone())).await, Err(denied()), "{kind:?}");
        let inner = op::any(Request::RequestPut(put));
        for depth in 1..=3 {
            for txn in nested(inner.clone(), depth) {
                root.put("a", "not for the writer").await.unwrap();
                let reply = writer.api.kv.clone().txn(writer.ask(txn.clone())).await;
                let leaked =
                    reply.as_ref().is_ok_and(|reply| told_value(&reply.get_ref().responses));
                let refused = reply.as_ref().is_err_and(|status| {
                    (status.code(), status.message())
                        == (Code::PermissionDenied, denied().1.as_str())
                });
                if kind == Kind::Etcd {
                    assert!(!refused, "{kind:?}: {reply:?}");
                } else {
                    assert!(refused && !leaked, "{kind:?}: {txn:?}: {reply:?}");
                }
            }
        }
    }
}

/// Whether a previous pair is among these responses or within them.
fn told_value(responses: &[pb::ResponseOp]) -> bool {
    responses.iter().any(|response| match &response.response {
        Some(Response::ResponsePut(put)) => put.prev_kv.is_some(),
        Some(Response::ResponseTxn(txn)) => told_value(&txn.responses),
        _ => false,
    })
}

/// A put within a transaction could tie a key to a lease of keys that the user may not write: when that
/// lease ends, they all go.
#[tokio::test]
async fn a_lease_of_others_in_a_transaction() {
    for kind in subjects() {
        let (member, root) = with_secret(kind).await;
        let writer = Session::of(member.api(), "writer").await;
        let leased = pb::PutRequest { lease: 7, ..put("a") };
        assert_eq!(writer.call(&Call::Put(leased.clone())).await, Err(denied()), "{kind:?}");
        let inner = op::any(Request::RequestPut(leased));
        for depth in 1..=3 {
            for txn in nested(inner.clone(), depth) {
                let told = writer.call(&Call::Txn(txn.clone())).await;
                let expected = if kind == Kind::Etcd { Ok(()) } else { Err(denied()) };
                assert_eq!(told, expected, "{kind:?}: {txn:?}");
            }
        }
        let attached =
            kv(&root.api.kv.clone().range(root.ask(get("a"))).await.unwrap().into_inner().kvs[0]);
        assert_eq!(attached.lease == 0, kind != Kind::Etcd, "{kind:?}");
        // And what is attached by the writer alone, the writer may detach.
        root.call(&grant_lease(8)).await.unwrap();
        let own = pb::PutRequest { lease: 8, ..put("a") };
        let txn = nested(op::any(Request::RequestPut(own)), 2).remove(0);
        writer.call(&Call::Txn(txn)).await.unwrap();
        writer.call(&Call::LeaseRevoke(pb::LeaseRevokeRequest { id: 8 })).await.unwrap();
        assert_eq!(root.get("a").await.unwrap(), None, "{kind:?}");
    }
}

/// A reader of one key who watched from that key to the end of all keys saw every later key.
#[tokio::test]
async fn a_watch_of_one_key_tells_of_no_other() {
    for kind in subjects() {
        let (member, root) = with_secret(kind).await;
        let reader = Session::of(member.api(), "reader").await;
        let told = reader.call(&Call::Watch(watch("a", "\0"))).await;
        let expected = if kind == Kind::Etcd { Ok(()) } else { Err(denied()) };
        assert_eq!(told, expected, "{kind:?}");
        // On one stream: the refused one, and one of the key alone.
        let mut watching = reader.api.watching_with(reader.ask(()).metadata().clone());
        let refused = watching.created(watch("a", "\0")).await;
        assert_eq!(refused.canceled, kind != Kind::Etcd, "{kind:?}");
        if refused.canceled {
            let text = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
            assert_eq!((refused.watch_id, refused.cancel_reason.as_str()), (-1, text));
        }
        let allowed = watching.created(watch("a", "")).await;
        assert!(!allowed.canceled, "{kind:?}: {allowed:?}");
        root.put("b", "secret").await.unwrap();
        root.put("secret", "2").await.unwrap();
        root.put("a", "end").await.unwrap();
        // Answered behind all events there are.
        watching.progress().await;
        let mut seen = Vec::new();
        loop {
            let response = watching.next().await;
            for event in &response.events {
                let key = kv(event.kv.as_ref().unwrap()).key;
                seen.push(String::from_utf8(key.to_vec()).unwrap());
            }
            if response.watch_id == -1 {
                break;
            }
        }
        assert!(seen.iter().any(|key| key == "a"), "{kind:?}: {seen:?}");
        let leaked = seen.iter().any(|key| key != "a");
        assert_eq!(leaked, kind == Kind::Etcd, "{kind:?}: {seen:?}");
        // Nor does a delete or a read take one key for all that follow it.
        assert_eq!(reader.call(&Call::Range(crate::server::span("a", "\0"))).await, Err(denied()));
        let writer = Session::of(member.api(), "writer").await;
        assert_eq!(writer.call(&Call::DeleteRange(delete("a", "\0"))).await, Err(denied()));
    }
}
