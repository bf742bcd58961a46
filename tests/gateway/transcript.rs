//! What curl would send to every path, and what comes back.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::http::{Answer, post};
use crate::server::{Kind, Member};

/// Every path below `/v3/` that answers once, which leaves out those that go on.
const PATHS: &[&str] = &[
    "kv/range",
    "kv/put",
    "kv/deleterange",
    "kv/txn",
    "kv/compaction",
    "lease/grant",
    "lease/revoke",
    "kv/lease/revoke",
    "lease/timetolive",
    "kv/lease/timetolive",
    "lease/leases",
    "kv/lease/leases",
    "cluster/member/add",
    "cluster/member/remove",
    "cluster/member/update",
    "cluster/member/list",
    "cluster/member/promote",
    "maintenance/alarm",
    "maintenance/status",
    "maintenance/defragment",
    "maintenance/hash",
    "maintenance/hashkv",
    "maintenance/transfer-leadership",
    "maintenance/downgrade",
    "auth/enable",
    "auth/disable",
    "auth/status",
    "auth/authenticate",
    "auth/user/add",
    "auth/user/get",
    "auth/user/list",
    "auth/user/delete",
    "auth/user/changepw",
    "auth/user/grant",
    "auth/user/revoke",
    "auth/role/add",
    "auth/role/get",
    "auth/role/list",
    "auth/role/delete",
    "auth/role/grant",
    "auth/role/revoke",
    "lock/lock",
    "lock/unlock",
    "election/campaign",
    "election/proclaim",
    "election/leader",
    "election/resign",
];

/// How the reply of the installed etcd may differ.
enum Etcd {
    Same,
    /// It answers otherwise, for this reason.
    Other(&'static str, Value),
    /// It has no such path.
    Absent,
}

use Etcd::{Absent, Other, Same};

struct Step {
    path: &'static str,
    body: String,
    etcd: Etcd,
    /// Fields that no two servers have alike.
    own: &'static [&'static str],
}

fn step(path: &'static str, body: Value) -> Step {
    Step { path, body: body.to_string(), etcd: Same, own: &[] }
}

impl Step {
    fn but(self, etcd: Etcd) -> Step {
        Step { etcd, ..self }
    }

    fn own(self, own: &'static [&'static str]) -> Step {
        Step { own, ..self }
    }
}

/// Takes out what differs from server to server: identities must be there, but may be any.
fn mask(value: &mut Value, own: &[&str]) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let masked = ["cluster_id", "member_id", "raft_term"].contains(&name.as_str())
                    || own.contains(&name.as_str());
                if masked {
                    *value = json!("its own");
                } else {
                    mask(value, own);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| mask(item, own)),
        _ => {}
    }
}

/// Status and masked body. The older gateway says the text of an error twice, and has 412 for a failed
/// precondition, for which the newer has 400 (v3-api 8.3).
fn seen(answer: &Answer, own: &[&str]) -> Value {
    assert_eq!(answer.header("content-type"), Some("application/json"), "{answer:?}");
    let mut body = answer.json();
    mask(&mut body, own);
    if let Value::Object(fields) = &mut body
        && answer.status != 200
    {
        fields.remove("error");
    }
    let status = match answer.status {
        412 if body["code"] == 9 => 400,
        status => status,
    };
    json!([status, body])
}

/// Runs the steps against both servers.
async fn compare(steps: Vec<Step>, ours: &Member, etcd: &Member) -> BTreeSet<&'static str> {
    let mut paths = BTreeSet::new();
    let mut wrong = Vec::new();
    for Step { path, body, etcd: expected, own } in steps {
        paths.insert(path);
        let url = format!("/v3/{path}");
        let (we, they) =
            tokio::join!(post(ours, &url, body.clone()), post(etcd, &url, body.clone()));
        if we.status == 200 {
            assert_eq!(we.header("grpc-metadata-content-type"), Some("application/grpc"), "{path}");
        }
        assert_ne!(we.status, 412, "{path} {body}");
        let answer = seen(&we, own);
        let expectation = match expected {
            Same => seen(&they, own),
            Other(reason, ours) => {
                assert_ne!(seen(&they, own), ours, "{path} {body}: {reason}");
                ours
            }
            Absent => {
                assert_eq!((they.status, they.body.as_str()), (404, "Not Found\n"), "{path}");
                continue;
            }
        };
        if answer != expectation {
            wrong.push(format!("{path} {body}\n  ours: {answer}\n  not:  {expectation}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    paths
}

async fn members() -> (Member, Member) {
    let flags = &["--enable-v2=false"][..];
    tokio::join!(Member::start(Kind::Redb), Member::with_flags(Kind::Etcd, flags))
}

/// base64.
fn b(text: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn keys_and_values() -> Vec<Step> {
    let put = |key: &str, value: &str| json!({"request_put": {"key": b(key), "value": b(value)}});
    vec![
        step("kv/put", json!({"key": b("a"), "value": b("1")})),
        step("kv/put", json!({"key": b("a"), "value": b("2"), "prev_kv": true})),
        step("kv/put", json!({"key": b("b"), "value": b("3"), "prevKv": true})),
        step("kv/put", json!({"key": b("c"), "value": null})),
        step("kv/put", json!({})),
        step("kv/put", json!({"key": b("c"), "value": b("x"), "ignore_value": true})),
        step("kv/put", json!({"key": b("none"), "ignore_value": true})),
        step("kv/put", json!({"key": b("c"), "lease": "77"})),
        step("kv/range", json!({"key": b("a")})),
        step("kv/range", json!({"key": b("a"), "range_end": b("z"), "limit": "2"})),
        step("kv/range", json!({"key": b("a"), "rangeEnd": b("z"), "limit": 2, "new": [{}]})),
        step("kv/range", json!({"key": b("a"), "range_end": b("z"), "count_only": true})),
        step("kv/range", json!({"key": b("a"), "range_end": b("z"), "keys_only": true})),
        step(
            "kv/range",
            json!({"key": b("a"), "range_end": b("z"), "sort_order": "DESCEND", "sort_target": 3}),
        ),
        step("kv/range", json!({"key": b("a"), "serializable": true, "revision": "2"})),
        step("kv/range", json!({"key": b("a"), "revision": "500"})),
        step("kv/range", json!({"key": b("none")})),
        step("kv/range", json!({"range_end": b("z")})),
        step(
            "kv/txn",
            json!({
                "compare": [
                    {"target": "VERSION", "result": "EQUAL", "key": b("a"), "version": "2"},
                    {"target": "VALUE", "key": b("b"), "value": b("3")},
                ],
                "success": [
                    put("x", "1"),
                    {"request_range": {"key": b("x")}},
                    {"request_delete_range": {"key": b("a"), "prev_kv": true}},
                    {"request_txn": {"success": [put("y", "1")]}},
                ],
                "failure": [put("z", "1")],
            }),
        ),
        step(
            "kv/txn",
            json!({"compare": [{"target": 1, "result": 1, "key": b("a"), "createRevision": "5"}]}),
        ),
        step("kv/txn", json!({})),
        step("kv/txn", json!({"success": [{"Request": {"RequestPut": {"key": b("x")}}}]})),
        step("kv/txn", json!({"success": [put("x", "1"), put("x", "2")]})),
        step("kv/deleterange", json!({"key": b("x"), "range_end": b("z"), "prev_kv": true})),
        step("kv/deleterange", json!({"key": b("none")})),
        step("kv/deleterange", json!({})),
        step("kv/compaction", json!({"revision": "3", "physical": true})),
        step("kv/compaction", json!({"revision": 3})),
        step("kv/compaction", json!({"revision": "1000"})),
        step("kv/range", json!({"key": b("a"), "revision": "2"})),
    ]
}

fn leases() -> Vec<Step> {
    let ttl = &["TTL"][..];
    vec![
        step("lease/grant", json!({"TTL": "100", "ID": "7"})),
        step("lease/grant", json!({"TTL": "100", "ID": "7"})),
        step("lease/grant", json!({"TTL": 9_000_000_001_u64})),
        step("lease/grant", json!({"TTL": 100})).own(&["ID"]),
        step("kv/put", json!({"key": b("l"), "lease": "7"})),
        step("lease/timetolive", json!({"ID": "7", "keys": true})).own(ttl),
        step("kv/lease/timetolive", json!({"ID": 7})).own(ttl),
        step("lease/timetolive", json!({"ID": "99"})),
        step("lease/leases", json!({})).own(&["ID"]),
        step("kv/lease/leases", json!({})).own(&["ID"]),
        step("lease/revoke", json!({"ID": "7"})),
        step("kv/lease/revoke", json!({"ID": "7"})),
        step("lease/revoke", json!({})),
        step("kv/range", json!({"key": b("l")})),
    ]
}

fn cluster() -> Vec<Step> {
    const MEMBER: &[&str] = &["ID", "clientURLs", "peerURLs"];
    vec![
        step("cluster/member/list", json!({})).own(MEMBER),
        step("cluster/member/list", json!({"linearizable": true})).own(MEMBER),
        step("cluster/member/add", json!({"peerURLs": ["foo"]})),
        step("cluster/member/add", json!({})),
        step("cluster/member/remove", json!({"ID": "1"})),
        step("cluster/member/update", json!({"ID": 1, "peerURLs": ["http://127.0.0.1:1"]})),
        step("cluster/member/promote", json!({"ID": "1"})),
    ]
}

fn maintenance() -> Vec<Step> {
    let status = &[
        "version",
        "dbSize",
        "leader",
        "raftIndex",
        "raftTerm",
        "raftAppliedIndex",
        "dbSizeInUse",
        "storageVersion",
        "dbSizeQuota",
    ][..];
    let header = json!({"cluster_id": "its own", "member_id": "its own", "revision": "1",
                        "raft_term": "its own"});
    let alarm = json!([{"memberID": "5", "alarm": "NOSPACE"}]);
    let headless = "before 3.5 the reply to an alarm has no header";
    let alarmed = |alarms: &Value| match alarms.is_null() {
        true => json!([200, {"header": header.clone()}]),
        false => json!([200, {"header": header.clone(), "alarms": alarms}]),
    };
    vec![
        step("maintenance/status", json!({})).own(status).but(Other(
            "3.6 added storageVersion, dbSizeQuota, downgradeInfo",
            json!([200, {
                "header": header.clone(), "version": "its own", "dbSize": "its own",
                "leader": "its own", "raftIndex": "its own", "raftTerm": "its own",
                "raftAppliedIndex": "its own", "dbSizeInUse": "its own",
                "storageVersion": "its own", "dbSizeQuota": "its own", "downgradeInfo": {},
            }]),
        )),
        step("maintenance/alarm", json!({"action": "ACTIVATE", "memberID": 5, "alarm": "NOSPACE"}))
            .but(Other(headless, alarmed(&alarm))),
        step("maintenance/alarm", json!({"action": "GET"})).but(Other(headless, alarmed(&alarm))),
        step("kv/put", json!({"key": b("a")})),
        step("maintenance/alarm", json!({"action": 2, "memberID": "5", "alarm": 1}))
            .but(Other(headless, alarmed(&alarm))),
        step("maintenance/alarm", json!({})).but(Other(headless, alarmed(&Value::Null))),
        step("maintenance/defragment", json!({})),
        step("maintenance/hash", json!({})).own(&["hash"]),
        step("maintenance/hashkv", json!({"revision": "1"})).but(Absent),
        step("maintenance/transfer-leadership", json!({"targetID": "99"})),
        step("maintenance/downgrade", json!({"action": "VALIDATE", "version": "3.6.0"}))
            .but(Absent),
    ]
}

fn users() -> Vec<Step> {
    let permission = |kind: &str| json!({"permType": kind, "key": b("a"), "range_end": b("c")});
    vec![
        step("auth/user/add", json!({"name": "root", "password": "pw"})),
        step("auth/user/add", json!({"name": "u", "options": {"no_password": true}})),
        step("auth/user/add", json!({"name": "u", "password": "pw"})),
        step("auth/user/add", json!({})),
        step("auth/user/changepw", json!({"name": "u", "password": "other"})),
        step("auth/user/changepw", json!({"name": "none", "password": "other"})),
        step("auth/role/add", json!({"name": "r"})),
        step("auth/role/add", json!({"name": "r"})),
        step("auth/role/grant", json!({"name": "r", "perm": permission("READWRITE")})),
        step("auth/role/grant", json!({"name": "none", "perm": permission("READ")})),
        step("auth/role/get", json!({"role": "r"})),
        step("auth/role/list", json!({})),
        step("auth/role/revoke", json!({"role": "r", "key": b("a"), "range_end": b("c")})),
        step("auth/role/revoke", json!({"role": "r", "key": b("a"), "range_end": b("c")})),
        step("auth/user/grant", json!({"user": "u", "role": "r"})),
        step("auth/user/grant", json!({"user": "u", "role": "none"})),
        step("auth/user/get", json!({"name": "u"})),
        step("auth/user/list", json!({})),
        step("auth/user/revoke", json!({"name": "u", "role": "r"})),
        step("auth/user/revoke", json!({"name": "u", "role": "r"})),
        step("auth/role/delete", json!({"role": "r"})),
        step("auth/role/delete", json!({"role": "r"})),
        step("auth/user/delete", json!({"name": "u"})),
        step("auth/user/delete", json!({"name": "u"})),
        step("auth/authenticate", json!({"name": "root", "password": "pw"})),
        step("auth/enable", json!({})),
        step("auth/disable", json!({})),
        step("auth/status", json!({})).but(Absent),
    ]
}

fn locks_and_elections() -> Vec<Step> {
    let leader = |key: &str| json!({"name": b("e"), "key": b(key), "rev": "3", "lease": "9"});
    vec![
        step("lease/grant", json!({"TTL": 100, "ID": 9})),
        step("lock/lock", json!({"name": b("m"), "lease": "9"})),
        step("lock/lock", json!({"name": b("m"), "lease": 9})),
        step("lock/unlock", json!({"key": b("m/9")})),
        step("lock/unlock", json!({"key": b("m/9")})),
        step("lock/lock", json!({"name": b("m"), "lease": "1234"})),
        step("election/leader", json!({"name": b("e")})),
        step("election/campaign", json!({"name": b("e"), "lease": "9", "value": b("v")})),
        step("election/leader", json!({"name": b("e")})),
        step("election/proclaim", json!({"value": b("w")})),
        step("election/proclaim", json!({"leader": leader("e/8"), "value": b("w")})),
        step(
            "election/proclaim",
            json!({
                "leader": {"name": b("e"), "key": b("e/9"), "rev": "4", "lease": "9"},
                "value": b("w"),
            }),
        ),
        step("election/leader", json!({"name": b("e")})),
        step("election/resign", json!({"leader": leader("e/8")})),
        step("election/resign", json!({})),
    ]
}

#[tokio::test]
async fn every_path_answers_as_etcd_does() {
    let mut paths = BTreeSet::new();
    for steps in
        [keys_and_values(), leases(), cluster(), maintenance(), users(), locks_and_elections()]
    {
        let (ours, etcd) = members().await;
        paths.extend(compare(steps, &ours, &etcd).await);
    }
    assert_eq!(paths, PATHS.iter().copied().collect(), "every path is compared");
}

#[tokio::test]
async fn paths_that_are_newer_than_the_installed_etcd_answer_as_described() {
    let ours = Member::start(Kind::Redb).await;
    let ask = async |path: &str, body: Value| {
        seen(&post(&ours, path, body.to_string()).await, &["hash", "authRevision"])
    };
    let header = json!({"cluster_id": "its own", "member_id": "its own", "revision": "1",
                        "raft_term": "its own"});
    assert_eq!(
        ask("/v3/maintenance/hashkv", json!({"revision": "0"})).await,
        json!([200, {"header": header, "hash": "its own", "hash_revision": "1",
                     "compact_revision": "-1"}])
    );
    let refused = "etcdserver: mvcc: required revision is a future revision";
    assert_eq!(
        ask("/v3/maintenance/hashkv", json!({"revision": "9"})).await,
        json!([400, {"code": 11, "message": refused}])
    );
    assert_eq!(
        ask("/v3/maintenance/downgrade", json!({"action": "VALIDATE", "version": "3.6.0"})).await,
        json!([200, {"header": header, "version": "3.7"}])
    );
    assert_eq!(
        ask("/v3/maintenance/downgrade", json!({"action": "VALIDATE", "version": "x"})).await,
        json!([400, {"code": 3, "message": "etcdserver: wrong downgrade target version format"}])
    );
    assert_eq!(
        ask("/v3/auth/status", json!({})).await,
        json!([200, {"header": header, "authRevision": "its own"}])
    );
}

#[tokio::test]
async fn what_is_no_call_is_refused_in_the_words_of_the_newer_gateway() {
    let ours = Member::start(Kind::Redb).await;
    let refused = |code: u64, text: &str| json!({"code": code, "message": text});
    for (path, body, status, expected) in [
        ("/v3/nope", "{}", 404, refused(5, "Not Found")),
        ("/v3/", "{}", 404, refused(5, "Not Found")),
        ("/v3/kv/range/", "{}", 404, refused(5, "Not Found")),
        ("/v3/kv", "{}", 404, refused(5, "Not Found")),
        ("/v3/kv/rangestream", "{}", 404, refused(5, "Not Found")),
        ("/v3/kv/range", "", 400, refused(3, "etcdserver: key is not provided")),
        ("/v3/kv/range", r#"{"key":"#, 400, refused(3, "unexpected EOF")),
        (
            "/v3/kv/range",
            "x",
            400,
            refused(3, "invalid character 'x' looking for beginning of value"),
        ),
        (
            "/v3/kv/range",
            r#"{"key":"?"}"#,
            400,
            refused(3, "proto: (line 1:8): invalid value for bytes field key: \"?\""),
        ),
        (
            "/v3/kv/range",
            r#"{"key":"YQ==","sort_target":99}"#,
            400,
            refused(3, "etcdserver: invalid sort option"),
        ),
        (
            "/v3beta/kv/compaction",
            r#"{"revision":1000}"#,
            400,
            refused(11, "etcdserver: mvcc: required revision is a future revision"),
        ),
    ] {
        let answer = post(&ours, path, body).await;
        assert_eq!((answer.status, answer.json()), (status, expected), "{path} {body}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
    }
    for method in ["GET", "PUT", "DELETE", "HEAD"] {
        let request = crate::http::request(&ours, method.parse().unwrap(), "/v3/kv/range");
        let answer = crate::http::send(&ours, request.body(Default::default()).unwrap()).await;
        assert_eq!(answer.status, 501, "{method}");
        if method != "HEAD" {
            assert_eq!(answer.json(), refused(12, "Method Not Allowed"));
        }
    }
    let moved = post(&ours, "/v3", "{}").await;
    assert_eq!((moved.status, moved.header("location")), (301, Some("/v3/")));
    let absent = post(&ours, "/v3alpha/kv/range", "{}").await;
    assert_eq!((absent.status, absent.body.as_str()), (404, "404 page not found\n"));
}
