//! Limits that a running member keeps: the space quota, the time of leases, the length of history.

use std::time::{Duration, Instant};

use quorate_proto::etcdserverpb as pb;
use quorate_proto::mvccpb::event::EventType;
use tonic::Code;

use crate::process::{Client, PATIENCE, Setup, runtime};

const NO_SPACE: &str = "etcdserver: mvcc: database space exceeded";

#[test]
fn at_the_quota_writes_stop_until_space_is_made_and_the_alarm_lifted() {
    let flags = ["--quota-backend-bytes=16777216", "--auto-disarm-nospace=false"];
    let setup = Setup::new(&flags);
    let daemon = setup.start();
    let filled = runtime().block_on(async {
        let client = daemon.client();
        let member = client.status().await.unwrap().header.unwrap().member_id;
        assert_eq!(client.status().await.unwrap().db_size_quota, 16_777_216);
        let mut filled = 0;
        let error = loop {
            match client.put(&format!("k{filled:03}"), vec![b'v'; 200_000]).await {
                Ok(_) => filled += 1,
                Err(error) => break error,
            }
            assert!(filled < 200, "40 MB fit into 16");
        };
        assert!(filled > 20, "{filled}");
        assert_eq!((error.code(), error.message()), (Code::ResourceExhausted, NO_SPACE));
        let alarms = client.alarms().await.unwrap();
        assert_eq!(alarms.len(), 1);
        assert_eq!((alarms[0].member_id, alarms[0].alarm()), (member, pb::AlarmType::Nospace));
        assert!(client.status().await.unwrap().errors.iter().any(|e| e.contains("NOSPACE")));
        refuses_what_grows(&client).await;
        filled
    });
    assert_eq!(daemon.http("/health").status, 503);
    daemon.kill();

    // A restart makes no space and forgets no alarm.
    let daemon = setup.start();
    assert_eq!(daemon.http("/health").status, 503);
    runtime().block_on(async {
        let client = daemon.client();
        assert_eq!(client.alarms().await.unwrap().len(), 1);
        refuses_what_grows(&client).await;
        // What reads, and what makes space, goes on.
        assert_eq!(client.get("k001").await.unwrap().unwrap().value.len(), 200_000);
        for n in 1..filled {
            assert_eq!(client.delete(&format!("k{n:03}")).await.unwrap().deleted, 1);
        }
        let deletion = pb::TxnRequest {
            success: vec![pb::RequestOp {
                request: Some(pb::request_op::Request::RequestDeleteRange(
                    pb::DeleteRangeRequest { key: "none".into(), ..Default::default() },
                )),
            }],
            ..Default::default()
        };
        assert!(client.kv.clone().txn(deletion).await.unwrap().into_inner().succeeded);
        let revision = client.revision().await.unwrap();
        client.compact(revision, true).await.unwrap();
        let before = client.status().await.unwrap();
        client.maintenance.clone().defragment(pb::DefragmentRequest {}).await.unwrap();
        let after = client.status().await.unwrap();
        assert!(after.db_size < 4 << 20, "{} of {}", after.db_size, before.db_size);
        // Space alone is not enough: somebody must say so.
        refuses_what_grows(&client).await;
        let request = pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Deactivate as i32,
            member_id: client.alarms().await.unwrap()[0].member_id,
            alarm: pb::AlarmType::Nospace as i32,
        };
        client.maintenance.clone().alarm(request).await.unwrap();
        assert_eq!(client.alarms().await.unwrap(), []);
        client.put("again", "yes").await.unwrap();
        client.grant(100).await.unwrap();
    });
    assert_eq!(daemon.http("/health").status, 200);
    daemon.stop();
    let daemon = setup.start();
    runtime().block_on(async {
        assert_eq!(daemon.client().alarms().await.unwrap(), []);
        daemon.client().put("again", "and again").await.unwrap();
    });
    daemon.stop();
}

async fn refuses_what_grows(client: &Client) {
    let put = client.put("more", "x").await.unwrap_err();
    assert_eq!((put.code(), put.message()), (Code::ResourceExhausted, NO_SPACE));
    let grant = client.grant(100).await.unwrap_err();
    assert_eq!((grant.code(), grant.message()), (Code::ResourceExhausted, NO_SPACE));
    let txn = pb::TxnRequest {
        success: vec![pb::RequestOp {
            request: Some(pb::request_op::Request::RequestPut(pb::PutRequest {
                key: "more".into(),
                ..Default::default()
            })),
        }],
        ..Default::default()
    };
    let txn = client.kv.clone().txn(txn).await.unwrap_err();
    assert_eq!((txn.code(), txn.message()), (Code::ResourceExhausted, NO_SPACE));
}

#[test]
fn a_request_or_a_message_that_is_too_large_is_refused() {
    let setup = Setup::new(&["--max-request-bytes=10000"]);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        client.put("fits", vec![b'v'; 9_000]).await.unwrap();
        let error = client.put("large", vec![b'v'; 11_000]).await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (Code::InvalidArgument, "etcdserver: request is too large")
        );
        let error = client.put("huge", vec![b'v'; 600_000]).await.unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted);
        assert!(error.message().starts_with("grpc: received message larger than max"), "{error}");
        assert_eq!(client.count().await.unwrap(), 1);
    });
    daemon.stop();
}

#[test]
fn a_lease_expires_in_time_and_keepalives_prevent_it() {
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        let (kept, left) = (client.grant(2).await.unwrap(), client.grant(2).await.unwrap());
        let granted = Instant::now();
        client.put_with("kept", "v", kept).await.unwrap();
        client.put_with("left-a", "v", left).await.unwrap();
        let last = client.put_with("left-b", "v", left).await.unwrap();
        let (_sender, mut responses) = client.watch_all(last + 1).await.unwrap();

        let (beats, receiver) = tokio::sync::mpsc::channel(4);
        let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut answers =
            client.lease.clone().lease_keep_alive(requests).await.unwrap().into_inner();
        let beating = tokio::spawn(async move {
            let mut count = 0;
            while beats.send(pb::LeaseKeepAliveRequest { id: kept }).await.is_ok() {
                let answer = answers.message().await.unwrap().unwrap();
                assert_eq!((answer.id, answer.ttl), (kept, 2));
                count += 1;
                tokio::time::sleep(Duration::from_millis(300)).await;
                // Longer than the other has, three times over.
                if granted.elapsed() > Duration::from_secs(7) {
                    break;
                }
            }
            count
        });
        let deleted = |response: pb::WatchResponse| {
            let names = response.events.iter().map(|event| {
                assert_eq!(event.r#type(), EventType::Delete);
                String::from_utf8(event.kv.as_ref().unwrap().parse().unwrap().key.to_vec()).unwrap()
            });
            names.collect::<Vec<_>>()
        };
        let next = tokio::time::timeout(PATIENCE, responses.message()).await;
        let response = next.expect("the lease expires").unwrap().unwrap();
        // Both keys go in one revision, not before the time is over.
        assert_eq!(deleted(response), ["left-a", "left-b"]);
        assert!(granted.elapsed() >= Duration::from_secs(2), "{:?}", granted.elapsed());
        assert!(client.get("left-a").await.unwrap().is_none());
        assert_eq!(client.time_to_live(left).await.unwrap().ttl, -1);

        assert!(beating.await.unwrap() > 5);
        assert_eq!(client.get("kept").await.unwrap().unwrap().lease, kept);
        assert!(client.time_to_live(kept).await.unwrap().ttl > 0);
        let next = tokio::time::timeout(PATIENCE, responses.message()).await;
        assert_eq!(deleted(next.expect("the lease expires").unwrap().unwrap()), ["kept"]);
    });
    daemon.stop();
}

#[test]
fn leases_outlive_the_process_with_their_time_begun_anew() {
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    let runtime = runtime();
    let (short, long) = runtime.block_on(async {
        let client = daemon.client();
        let (short, long) = (client.grant(4).await.unwrap(), client.grant(1000).await.unwrap());
        client.put_with("short", "v", short).await.unwrap();
        client.put_with("long", "v", long).await.unwrap();
        client.put("none", "v").await.unwrap();
        (short, long)
    });
    daemon.kill();
    // While nobody is there, no lease expires, however late it is.
    std::thread::sleep(Duration::from_secs(5));
    let daemon = setup.start();
    let ready = Instant::now();
    runtime.block_on(async {
        let client = daemon.client();
        let found = client.time_to_live(short).await.unwrap();
        assert_eq!((found.granted_ttl, &found.keys[..]), (4, &["short".into()][..]), "{found:?}");
        assert!(found.ttl >= 1, "{found:?}");
        let found = client.time_to_live(long).await.unwrap();
        assert!((900..=1001).contains(&found.ttl), "{found:?}");
        let deadline = Instant::now() + PATIENCE;
        while client.get("short").await.unwrap().is_some() {
            assert!(Instant::now() < deadline, "the lease does not expire");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(ready.elapsed() >= Duration::from_secs(2), "{:?}", ready.elapsed());
        assert_eq!(client.count().await.unwrap(), 2);
        assert_eq!(client.get("long").await.unwrap().unwrap().lease, long);
    });
    daemon.stop();
}

#[test]
fn history_is_compacted_by_itself() {
    let setup = Setup::new(&["--auto-compaction-retention=1s"]);
    let mut daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        let mut last = 0;
        for n in 0..10 {
            last = client.put("k", format!("{n}")).await.unwrap();
        }
        let deadline = Instant::now() + PATIENCE;
        while client.hash_kv(0).await.unwrap().compact_revision < last {
            assert!(Instant::now() < deadline, "nothing is compacted");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let error = client.get_at("k", last - 1).await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted")
        );
        assert_eq!(client.get("k").await.unwrap().unwrap().value, "9");
    });
    daemon.wait_logged("completed auto compaction");
    daemon.wait_logged("finished scheduled compaction");
    daemon.stop();
}

#[test]
fn a_member_without_traffic_writes_nothing() {
    let setup = Setup::new(&["--auto-compaction-retention=1s"]);
    let daemon = setup.start();
    let committed = || {
        let page = crate::page::parse(&daemon.http("/metrics").body);
        page["etcd_server_proposals_committed_total"].samples[""]
    };
    crate::process::wait_for("the cluster version", || {
        let version = daemon.http("/version").body;
        if version.contains("\"etcdcluster\":\"3.7.0\"") { Ok(()) } else { Err(version) }
    });
    let settled = {
        // The last of what a start brings about: one compaction at most.
        std::thread::sleep(Duration::from_secs(2));
        committed()
    };
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(committed(), settled);
    daemon.stop();
}

#[test]
fn slow_calls_are_logged_and_counted_without_their_values() {
    let flags = ["--warning-apply-duration=1ns", "--warning-unary-request-duration=1ns"];
    let setup = Setup::new(&flags);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        client.put("slow", "a secret").await.unwrap();
        assert_eq!(client.get("slow").await.unwrap().unwrap().value, "a secret");
        let error = client.get_at("slow", 1000).await.unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange);
    });
    let put = r#"key:"slow" value_size:8"#;
    let (applied, read, calls) = crate::process::wait_for("the lines of all calls", || {
        let log = daemon.log();
        let slow = |request: String| {
            let is_it = |line: &&serde_json::Value| line["request"] == *request;
            log.iter().filter(is_it).cloned().collect::<Vec<_>>()
        };
        let (applied, read) = (slow(format!("put:<{put}>")), slow(r#"key:"slow""#.to_string()));
        let of_kv = |line: &&serde_json::Value| {
            let method = line["response type"].as_str().unwrap_or_default();
            line["msg"] == "request stats" && method.starts_with("/etcdserverpb.KV/")
        };
        let calls: Vec<_> = log.iter().filter(of_kv).cloned().collect();
        match (applied.first(), read.first(), calls.len()) {
            (Some(applied), Some(read), 3) => Ok((applied.clone(), read.clone(), calls)),
            _ => Err(daemon.log_text()),
        }
    });
    for line in [&applied, &read] {
        assert_eq!(
            (&line["msg"], &line["level"]),
            (&"apply request took too long".into(), &"warn".into())
        );
        assert_eq!(line["expected-duration"], "1ns");
        assert!(line["took"].as_str().unwrap().ends_with('s'), "{line}");
    }
    assert_eq!((&applied["prefix"], &read["prefix"]), (&"".into(), &"read-only range ".into()));
    assert!(read["response"].as_str().unwrap().starts_with("range_response_count:1 size:"));
    let expected = [
        ("/etcdserverpb.KV/Put", "Ok", 1, 0, put),
        ("/etcdserverpb.KV/Range", "Ok", 0, 1, r#"key:"slow""#),
        ("/etcdserverpb.KV/Range", "OutOfRange", 0, 0, r#"key:"slow" revision:1000"#),
    ];
    for (line, (method, code, asked, answered, content)) in calls.iter().zip(expected) {
        assert_eq!(
            (&line["response type"], &line["response code"]),
            (&method.into(), &code.into())
        );
        assert_eq!(
            (&line["request count"], &line["response count"]),
            (&asked.into(), &answered.into())
        );
        assert_eq!(line["request content"], content);
        assert!(line["request size"].as_u64().unwrap() > 5, "{line}");
        assert_eq!(line["response size"].as_u64().unwrap() > 0, code == "Ok", "{line}");
        assert!(line["remote"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
        assert!(line["start time"].as_str().unwrap().ends_with('Z'), "{line}");
        assert!(line["time spent"].as_str().unwrap().ends_with('s'), "{line}");
    }
    assert!(!daemon.log_text().contains("secret"));
    let page = crate::page::parse(&daemon.http("/metrics").body);
    assert!(page["etcd_server_slow_apply_total"].samples[""] >= 2.0);
    let durations = &page["etcd_server_request_duration_seconds"].samples;
    assert!(durations.iter().any(|(labels, _)| labels.contains("Put")), "{durations:?}");
    daemon.stop();
}
