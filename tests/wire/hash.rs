//! HashKV: equal to etcd's at every revision, before and after a compaction, whatever the engine, and
//! still after a restart.

use std::time::Instant;

use quorate_proto::etcdserverpb as pb;
use tonic::Code;

use crate::server::{Api, Kind, Member, PATIENCE, error, op};

/// A history with all kinds of changes, the same for every server. Answers the last revision.
async fn fill(api: &mut Api) -> i64 {
    api.grant(1000, 7).await.unwrap();
    for round in 0..4 {
        for key in ["a", "b", "c", "d"] {
            api.put(key, &format!("{key}{round}")).await;
        }
        api.put_leased("leased", &round.to_string(), 7).await;
        api.delete("b").await;
        let ops = vec![op::put("x", "1"), op::delete("c", "e", false), op::put("z", "2")];
        api.txn(vec![], ops, vec![]).await.unwrap();
    }
    api.lease.lease_revoke(pb::LeaseRevokeRequest { id: 7 }).await.unwrap();
    // The last one is no tombstone: releases differ on one at the compact revision.
    api.put("last", "v").await
}

/// Hash and compact revision at each of `revisions`.
async fn hashes(api: &mut Api, revisions: impl Iterator<Item = i64>) -> Vec<(i64, u32, i64)> {
    let mut hashes = Vec::new();
    for revision in revisions {
        let reply = api.hash_kv(revision).await.unwrap();
        hashes.push((revision, reply.hash, reply.compact_revision));
    }
    hashes
}

#[tokio::test]
async fn equal_to_etcds_at_every_revision() {
    let (mut redb, mut memory, etcd) = tokio::join!(
        Member::start(Kind::Redb),
        Member::start(Kind::Memory),
        Member::start(Kind::Etcd)
    );
    let (mut in_redb, mut in_memory, mut in_etcd) = (redb.api(), memory.api(), etcd.api());
    let last = fill(&mut in_etcd).await;
    assert_eq!(fill(&mut in_redb).await, last);
    assert_eq!(fill(&mut in_memory).await, last);
    // 0 stands for the newest.
    let expected = hashes(&mut in_etcd, 0..=last).await;
    assert_eq!(hashes(&mut in_redb, 0..=last).await, expected);
    assert_eq!(hashes(&mut in_memory, 0..=last).await, expected);
    assert_eq!(expected[0].1, expected[last as usize].1);

    // A put, a tombstone, the middle of a transaction, the newest.
    let mut remembered = Vec::new();
    for at in [3, 7, 15, last] {
        // A compaction's own hash is that of before it, under the compact revision of before it. The
        // installed release refuses the compact revision itself; later ones answer with that hash, as
        // long as they remember it.
        remembered.extend(hashes(&mut in_etcd, at..=at).await);
        for api in [&mut in_etcd, &mut in_redb, &mut in_memory] {
            api.compact(at).await.unwrap();
        }
        let expected = hashes(&mut in_etcd, at + 1..=last).await;
        assert_eq!(hashes(&mut in_redb, at + 1..=last).await, expected, "compacted at {at}");
        assert_eq!(hashes(&mut in_memory, at + 1..=last).await, expected, "compacted at {at}");
        for (at, hash, previous) in remembered.iter().copied() {
            assert_eq!(hashes(&mut in_redb, at..=at).await, [(at, hash, previous)]);
            assert_eq!(hashes(&mut in_memory, at..=at).await, [(at, hash, previous)]);
        }
        let gone =
            Err(error(Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted"));
        assert_eq!(in_redb.hash_kv(at - 1).await, gone);
    }
    assert_eq!(remembered.iter().map(|hash| hash.2).collect::<Vec<_>>(), [-1, 3, 7, 15]);
    let newest = async |api: &mut Api| {
        let reply = api.hash_kv(0).await.unwrap();
        (reply.hash_revision, reply.hash, reply.compact_revision)
    };
    let compacted = newest(&mut in_redb).await;
    assert_eq!(newest(&mut in_memory).await, compacted);
    assert_eq!((compacted.0, compacted.2), (last, last));
    let newer = last + 1;
    for api in [&mut in_etcd, &mut in_redb, &mut in_memory] {
        assert_eq!(api.put("newer", "v").await, newer);
        let future = Err(error(
            Code::OutOfRange,
            "etcdserver: mvcc: required revision is a future revision",
        ));
        assert_eq!(api.hash_kv(newer + 1).await, future);
    }
    let expected = hashes(&mut in_etcd, newer..=newer).await;
    for member in [&mut redb, &mut memory] {
        for orderly in [true, false] {
            if orderly {
                member.restart().await
            } else {
                member.crash().await
            }
            let mut api = member.api();
            let again = hashes(&mut api, newer..=newer).await;
            assert_eq!(again, expected, "{:?}, orderly: {orderly}", member.kind);
            // What is remembered of compactions is not stored. An engine without files is filled from
            // the log, and its compactions are made, and in time remembered, again.
            let refilled = member.kind == Kind::Memory;
            let expected = if refilled { remembered[3] } else { compacted };
            let deadline = Instant::now() + PATIENCE;
            let mut again = hashes(&mut api, last..=last).await;
            while refilled && again == [compacted] && Instant::now() < deadline {
                again = hashes(&mut api, last..=last).await;
            }
            assert_eq!(again, [expected], "{:?}, orderly: {orderly}", member.kind);
        }
    }
}

/// A reply says what it has hashed, and a negative revision has no history.
#[tokio::test]
async fn what_was_hashed_is_told() {
    let member = Member::start(Kind::Redb).await;
    let mut api = member.api();
    let last = fill(&mut api).await;
    let reply = api.hash_kv(0).await.unwrap();
    assert_eq!((reply.hash_revision, reply.compact_revision), (last, -1));
    assert_eq!(reply.header.unwrap().revision, last);
    let reply = api.hash_kv(5).await.unwrap();
    assert_eq!((reply.hash_revision, reply.header.unwrap().revision), (5, last));
    let etcd = Member::start(Kind::Etcd).await;
    let theirs = etcd.api().hash_kv(-1).await.unwrap().hash;
    assert_eq!(api.hash_kv(-1).await.unwrap().hash, theirs);
}

/// `Hash` covers the whole engine: it changes with any key, not by being asked.
#[tokio::test]
async fn the_whole_engine() {
    for kind in [Kind::Redb, Kind::Memory, Kind::Etcd] {
        let mut member = Member::start(kind).await;
        let mut api = member.api();
        api.put("a", "v").await;
        let mut ask = async || {
            let reply = api.maintenance.hash(pb::HashRequest {}).await.unwrap().into_inner();
            (reply.header.unwrap().revision, reply.hash)
        };
        // etcd's backend takes a write up to 100 ms after it is acknowledged.
        let first = ask().await;
        let again = ask().await;
        if kind != Kind::Etcd {
            assert_eq!(first, again, "{kind:?}");
        }
        api.put("a", "w").await;
        let mut api = member.api();
        let reply = api.maintenance.hash(pb::HashRequest {}).await.unwrap().into_inner();
        assert_ne!(reply.hash, first.1, "{kind:?}");
        if kind == Kind::Redb {
            member.restart().await;
            let mut api = member.api();
            let same = api.maintenance.hash(pb::HashRequest {}).await.unwrap().into_inner();
            assert_eq!(same.hash, reply.hash, "a restart changes nothing that counts");
        }
    }
}

/// What members ask of each other on the peer port: the same answers as etcd's.
#[tokio::test]
async fn between_members() {
    let (ours, etcd) = tokio::join!(Member::start(Kind::Redb), Member::start(Kind::Etcd));
    let client = async |member: &Member, cluster: &str, body: &str| {
        let stream = tokio::net::TcpStream::connect(
            member.peer_url().strip_prefix("http://").expect("a URL of a test").to_string(),
        );
        let io = hyper_util::rt::TokioIo::new(stream.await.unwrap());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        let driver = tokio::spawn(connection);
        let mut request = http::Request::get("/members/hashkv").header("host", "peer");
        if !cluster.is_empty() {
            request = request.header("X-Etcd-Cluster-ID", cluster);
        }
        let body = http_body_util::Full::new(bytes::Bytes::from(body.to_string()));
        let answer = sender.send_request(request.body(body).unwrap()).await.unwrap();
        let (parts, body) = answer.into_parts();
        let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
        driver.abort();
        (parts.status.as_u16(), parts.headers, String::from_utf8(body.to_vec()).unwrap())
    };
    let last = fill(&mut ours.api()).await;
    assert_eq!(fill(&mut etcd.api()).await, last);
    let numbers = |body: &str| {
        let json: serde_json::Value = serde_json::from_str(body).expect("an answer is JSON");
        let number = |value: &serde_json::Value| value.as_i64().unwrap_or_default();
        let newest = number(&json["header"]["revision"]);
        (newest, number(&json["hash"]), number(&json["compact_revision"]))
    };
    for body in [r#"{"revision":7}"#, r#"{"revision":0}"#, "{}"] {
        let (status, headers, ours) = client(&ours, "", body).await;
        assert_eq!((status, &headers["content-type"]), (200, &"application/json".parse().unwrap()));
        assert!(headers.contains_key("X-Etcd-Cluster-ID"));
        let (_, _, theirs) = client(&etcd, "", body).await;
        assert_eq!(numbers(&ours), numbers(&theirs), "{body}");
        assert_eq!(numbers(&ours).0, last);
    }
    for api in [&mut ours.api(), &mut etcd.api()] {
        api.compact(9).await.unwrap();
    }
    for body in [r#"{"revision":4}"#, r#"{"revision":4000}"#, "[", "", "[]"] {
        let (status, headers, ours) = client(&ours, "", body).await;
        let (their_status, _, theirs) = client(&etcd, "", body).await;
        assert_eq!((status, &ours), (400, &theirs), "{body}");
        assert_eq!(their_status, 400);
        assert_eq!(headers["content-type"], "text/plain; charset=utf-8");
    }
    let (status, headers, text) = client(&ours, "abc", "{}").await;
    assert_eq!((status, text.as_str()), (412, "cluster ID mismatch\n"));
    let own = headers["X-Etcd-Cluster-ID"].to_str().unwrap();
    assert_eq!(client(&ours, own, "{}").await.0, 200);
}
