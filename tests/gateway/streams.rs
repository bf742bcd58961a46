//! Answers that come line by line, to requests that may do so too.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use base64::Engine;
use bytes::Bytes;
use http::Method;
use http_body_util::Full;
use hyper::body::{Body, Frame};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::http::{Open, post, refusal, request, send};
use crate::server::{Kind, Member, PATIENCE};

/// A body of parts that the test sends when it wants to.
struct Parts(mpsc::UnboundedReceiver<Bytes>);

impl Body for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|part| part.map(|part| Ok(Frame::data(part))))
    }
}

/// Opens a stream whose requests come in whatever parts are sent to the other end.
async fn open(member: &Member, path: &str, first: &str) -> (mpsc::UnboundedSender<Bytes>, Open) {
    let (sender, parts) = mpsc::unbounded_channel();
    sender.send(first.to_owned().into()).unwrap();
    let request = request(member, Method::POST, path).body(Parts(parts)).unwrap();
    (sender, Open::send(member, request).await)
}

async fn open_whole(member: &Member, path: &str, body: &str) -> Open {
    let request = request(member, Method::POST, path);
    Open::send(member, request.body(Full::from(body.to_owned())).unwrap()).await
}

/// A line without what no two servers have alike.
fn bare(mut line: Value) -> Value {
    let header = line["result"]["header"].take();
    if let Value::Object(fields) = &mut line["result"] {
        fields.remove("header");
        if !header.is_null() {
            fields.insert("revision".to_owned(), header["revision"].clone());
        }
    }
    line
}

const CREATE_A: &str = r#"{"create_request":{"key":"YQ=="}}"#;

#[tokio::test]
async fn one_request_to_watch_is_answered_until_the_client_leaves() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut watch = open_whole(&member, "/v3/watch", CREATE_A).await;
        assert_eq!(watch.status, 200, "{kind:?}");
        assert_eq!(watch.headers["content-type"], "application/json");
        assert_eq!(watch.headers["transfer-encoding"], "chunked");
        assert_eq!(watch.headers["grpc-metadata-content-type"], "application/grpc");
        let created = bare(watch.next().await);
        assert_eq!(created, json!({"result": {"created": true, "revision": "1"}}));
        for (value, revision, version) in [("MQ==", "2", "1"), ("Mg==", "3", "2")] {
            let put = json!({"key": "YQ==", "value": value}).to_string();
            assert_eq!(post(&member, "/v3/kv/put", put).await.status, 200);
            let event = bare(watch.next().await);
            assert_eq!(
                event,
                json!({"result": {"revision": revision, "events": [{"kv": {
                    "key": "YQ==", "value": value, "create_revision": "2",
                    "mod_revision": revision, "version": version,
                }}]}}),
                "{kind:?}"
            );
        }
        post(&member, "/v3/kv/deleterange", r#"{"key":"YQ=="}"#).await;
        let event = bare(watch.next().await);
        assert_eq!(
            event,
            json!({"result": {"revision": "4", "events": [
                {"type": "DELETE", "kv": {"key": "YQ==", "mod_revision": "4"}},
            ]}})
        );
    }
}

#[tokio::test]
async fn a_member_forgets_a_watch_whose_client_has_left() {
    let member = Member::start(Kind::Redb).await;
    let watchers = async || {
        let page = request(&member, Method::GET, "/metrics").body(Full::default()).unwrap();
        let page = send(&member, page).await.body;
        let line = page.lines().find_map(|l| l.strip_prefix("etcd_debugging_mvcc_watcher_total "));
        line.expect("a count of watchers").parse::<f64>().unwrap()
    };
    // One whose request has ended, one whose request goes on, one that was not understood to its end.
    let ended = open_whole(&member, "/v3/watch", CREATE_A).await;
    let (sender, goes_on) = open(&member, "/v3/watch", CREATE_A).await;
    let broken = open_whole(&member, "/v3/watch", &format!("{CREATE_A}x{CREATE_A}")).await;
    // The page tells what was counted a moment before.
    let counted = async |expected: f64| {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let found = watchers().await;
            if found == expected {
                return;
            }
            let late = std::time::Instant::now() > deadline;
            assert!(!late, "{found} watchers, not {expected}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    counted(3.0).await;
    drop((ended, goes_on, broken, sender));
    counted(0.0).await;
}

#[tokio::test]
async fn one_who_leaves_a_queue_for_a_lock_is_no_longer_in_it() {
    let member = Member::start(Kind::Redb).await;
    post(&member, "/v3/lease/grant", r#"{"TTL":100,"ID":9}"#).await;
    post(&member, "/v3/lock/lock", r#"{"name":"bQ==","lease":9}"#).await;
    let queue = r#"{"key":"bS8=","range_end":"bTA=","count_only":true}"#;
    let waiting = async |expected: &str| {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let found = post(&member, "/v3/kv/range", queue).await.json();
            if found["count"] == expected {
                return;
            }
            let late = std::time::Instant::now() > deadline;
            assert!(!late, "in the queue: {found}, not {expected}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    waiting("1").await;
    // Its request has not ended when it leaves.
    let (sender, parts) = mpsc::unbounded_channel();
    sender.send(r#"{"name":"bQ=="}"#.into()).unwrap();
    let request = request(&member, Method::POST, "/v3/lock/lock").body(Parts(parts)).unwrap();
    let mut lock = Box::pin(Open::send(&member, request));
    tokio::select! {
        _ = &mut lock => panic!("the lock is taken"),
        () = waiting("2") => {}
    }
    drop(lock);
    waiting("1").await;
}

#[tokio::test]
async fn requests_are_read_as_they_come() {
    let member = Member::start(Kind::Redb).await;
    let (sender, mut watch) = open(&member, "/v3/watch", &format!("{CREATE_A}\n{{\"crea")).await;
    assert_eq!(bare(watch.next().await)["result"]["created"], true);
    sender.send(r#"te_request":{"key":"Yg==","#.into()).unwrap();
    sender.send(r#""watch_id":"7"}}"#.into()).unwrap();
    let second = bare(watch.next().await);
    assert_eq!(second, json!({"result": {"watch_id": "7", "created": true, "revision": "1"}}));
    sender.send(r#"{"cancel_request":{"watch_id":7}}"#.into()).unwrap();
    let canceled = bare(watch.next().await);
    assert_eq!(canceled, json!({"result": {"watch_id": "7", "canceled": true, "revision": "1"}}));
    sender.send(r#"{"progress_request":{}}"#.into()).unwrap();
    let progress = bare(watch.next().await);
    assert_eq!(progress, json!({"result": {"watch_id": "-1", "revision": "1"}}));
    // The end of the requests, or nonsense in place of one, ends no watch.
    sender.send("nonsense".into()).unwrap();
    drop(sender);
    post(&member, "/v3/kv/put", r#"{"key":"YQ=="}"#).await;
    assert_eq!(bare(watch.next().await)["result"]["events"][0]["kv"]["key"], "YQ==");
}

#[tokio::test]
async fn keep_alives_are_answered_one_by_one_and_end_with_the_requests() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        post(&member, "/v3/lease/grant", r#"{"TTL":100,"ID":7}"#).await;
        let path = "/v3/lease/keepalive";
        let mut once = open_whole(&member, path, r#"{"ID":7}"#).await;
        let renewed = json!({"result": {"ID": "7", "TTL": "100", "revision": "1"}});
        assert_eq!(bare(once.next().await), renewed);
        assert_eq!(once.line().await, None, "{kind:?}");
        let mut twice = open_whole(&member, path, r#"{"ID":"99"}{"ID":"7"}"#).await;
        let unknown = json!({"result": {"ID": "99", "revision": "1"}});
        assert_eq!(bare(twice.next().await), unknown);
        assert_eq!(bare(twice.next().await), renewed);
        assert_eq!(twice.line().await, None);
        let nothing = post(&member, path, "").await;
        assert_eq!((nothing.status, nothing.body.as_str()), (200, ""), "{kind:?}");
        assert_eq!(nothing.header("grpc-metadata-content-type"), None);
    }
}

#[tokio::test]
async fn streams_that_fail_say_so_by_status_or_in_their_last_line() {
    let member = Member::start(Kind::Redb).await;
    let wrong = post(&member, "/v3/watch", "x").await;
    let text = "invalid character 'x' looking for beginning of value".to_owned();
    assert_eq!(refusal(&wrong), (400, 3, text));
    // Before anything is sent the status tells.
    let with_deadline = |path: &str, timeout: &str, body: &'static str| {
        let request = request(&member, Method::POST, path).header("grpc-timeout", timeout);
        request.body(Full::from(body)).unwrap()
    };
    let late = send(&member, with_deadline("/v3/watch", "1m", "")).await;
    let expected = r#"{"error":{"code":4,"message":"context deadline exceeded"}}"#;
    assert_eq!((late.status, late.body.as_str()), (504, format!("{expected}\n").as_str()));
    assert_eq!(late.header("content-type"), Some("application/json"));
    // After that only the line is left to do so.
    let request = with_deadline("/v3/watch", "300m", CREATE_A);
    let mut watch = Open::send(&member, request).await;
    assert_eq!(watch.status, 200);
    assert_eq!(bare(watch.next().await)["result"]["created"], true);
    assert_eq!(watch.line().await.as_deref(), Some(expected));
    assert_eq!(watch.line().await, None);
    // A single call that waits, for a lock that another has, waits no longer either.
    post(&member, "/v3/lease/grant", r#"{"TTL":100,"ID":9}"#).await;
    post(&member, "/v3/lock/lock", r#"{"name":"bQ==","lease":9}"#).await;
    let waiting = with_deadline("/v3/lock/lock", "100m", r#"{"name":"bQ=="}"#);
    let text = "context deadline exceeded".to_owned();
    assert_eq!(refusal(&send(&member, waiting).await), (504, 4, text));
    let malformed = send(&member, with_deadline("/v3/kv/range", "soon", "{}")).await;
    assert_eq!(refusal(&malformed), (400, 3, "invalid grpc-timeout: soon".to_owned()));
}

#[tokio::test]
async fn a_member_that_stops_ends_its_streams() {
    let mut member = Member::start(Kind::Redb).await;
    let mut watch = open_whole(&member, "/v3/watch", CREATE_A).await;
    assert_eq!(bare(watch.next().await)["result"]["created"], true);
    member.restart().await;
    let last = watch.next().await;
    assert_eq!(last, json!({"error": {"code": 14, "message": "etcdserver: server stopped"}}));
    assert_eq!(watch.line().await, None);
}

#[tokio::test]
async fn a_snapshot_is_a_database_and_its_digest() {
    let member = Member::start(Kind::Redb).await;
    post(&member, "/v3/kv/put", r#"{"key":"YQ==","value":"Yg=="}"#).await;
    let mut lines = open_whole(&member, "/v3/maintenance/snapshot", "").await;
    let mut database = Vec::new();
    while let Some(line) = lines.line().await {
        let line: Value = serde_json::from_str(&line).unwrap();
        let blob = line["result"]["blob"].as_str().expect("a blob");
        database.extend(base64::engine::general_purpose::STANDARD.decode(blob).unwrap());
    }
    let digest = database.split_off(database.len() - 32);
    assert_eq!(database.len() % 512, 0);
    assert_eq!(Sha256::digest(&database).as_slice(), digest);
}

#[tokio::test]
async fn an_observer_sees_each_leader() {
    let member = Member::start(Kind::Redb).await;
    post(&member, "/v3/lease/grant", r#"{"TTL":100,"ID":9}"#).await;
    let campaign = json!({"name": "ZQ==", "lease": "9", "value": "MQ=="}).to_string();
    let elected = post(&member, "/v3/election/campaign", campaign).await.json();
    let mut observer = open_whole(&member, "/v3/election/observe", r#"{"name":"ZQ=="}"#).await;
    let first = bare(observer.next().await);
    assert_eq!(first["result"]["kv"]["value"], "MQ==");
    let proclaim = json!({"leader": elected["leader"], "value": "Mg=="}).to_string();
    assert_eq!(post(&member, "/v3/election/proclaim", proclaim).await.status, 200);
    assert_eq!(bare(observer.next().await)["result"]["kv"]["value"], "Mg==");
}
