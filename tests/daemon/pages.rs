//! HTTP on the ports of a running member, and a Prometheus that scrapes it.

use std::collections::BTreeSet;

use quorate_proto::etcdserverpb as pb;

use crate::page::{FAMILIES, Prometheus, parse};
use crate::ports::free_address;
use crate::process::{Daemon, Http, Setup, http, runtime, wait_for};

fn raise(daemon: &Daemon, kind: pb::AlarmType, action: pb::alarm_request::AlarmAction) {
    runtime().block_on(async {
        let request = pb::AlarmRequest { action: action as i32, member_id: 0, alarm: kind as i32 };
        daemon.client().maintenance.alarm(request).await.unwrap();
    });
}

#[test]
fn version_and_health_and_probes() {
    use pb::alarm_request::AlarmAction::{Activate, Deactivate};
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    // The cluster version is decided soon after the member is ready.
    wait_for("the version", || {
        let version = daemon.http("/version");
        assert_eq!(version.status, 200);
        assert_eq!(version.headers["content-type"], "application/json");
        let decided = r#"{"etcdserver":"3.7.1","etcdcluster":"3.7.0","storage":"3.7.0"}"#;
        if version.body == decided { Ok(()) } else { Err(version.body) }
    });
    let post = http(setup.client, "POST", "/version", &[("Content-Length", "0")]);
    assert_eq!((post.status, post.body.as_str()), (405, "Method Not Allowed\n"));
    assert_eq!(post.headers["allow"], "GET");
    let lost = daemon.http("/nowhere");
    assert_eq!((lost.status, lost.body.as_str()), (404, "404 page not found\n"));

    let healthy = |path: &str| {
        let health = daemon.http(path);
        assert_eq!(
            (health.status, health.body.as_str()),
            (200, r#"{"health":"true","reason":""}"#),
            "{path}"
        );
        assert_eq!(health.headers["content-type"], "text/plain; charset=utf-8");
    };
    for path in [
        "/health",
        "/health?serializable=true",
        "/health?serializable=false",
        "/health?exclude=NOSPACE",
        "/health?exclude=NOSPACE&exclude=CORRUPT&serializable=true",
    ] {
        healthy(path);
    }
    let ok = |path: &str| {
        let page = daemon.http(path);
        assert_eq!((page.status, page.body.as_str()), (200, "ok\n"), "{path}");
        assert_eq!(page.headers["x-content-type-options"], "nosniff");
    };
    let probes = [
        "/livez",
        "/livez/serializable_read",
        "/readyz",
        "/readyz/data_corruption",
        "/readyz/serializable_read",
        "/readyz/linearizable_read",
        "/readyz/non_learner",
    ];
    probes.iter().for_each(|path| ok(path));
    ok("/readyz?exclude=no_such_check");
    let verbose = daemon.http("/readyz?verbose").body;
    let lines: BTreeSet<&str> = verbose.lines().collect();
    let expected = [
        "[+]data_corruption ok",
        "[+]linearizable_read ok",
        "[+]non_learner ok",
        "[+]serializable_read ok",
        "ok",
    ];
    assert_eq!(lines, expected.into_iter().collect());
    assert!(verbose.ends_with("ok\n"), "{verbose}");

    raise(&daemon, pb::AlarmType::Nospace, Activate);
    let ill = daemon.http("/health");
    assert_eq!(
        (ill.status, ill.body.as_str()),
        (503, "{\"health\":\"false\",\"reason\":\"ALARM NOSPACE\"}\n")
    );
    assert_eq!(daemon.http("/health?exclude=CORRUPT").status, 503);
    healthy("/health?exclude=NOSPACE");
    probes.iter().for_each(|path| ok(path));
    raise(&daemon, pb::AlarmType::Nospace, Deactivate);
    healthy("/health");

    raise(&daemon, pb::AlarmType::Corrupt, Activate);
    assert!(daemon.http("/health").body.contains("ALARM CORRUPT"));
    healthy("/health?exclude=CORRUPT");
    let unready = daemon.http("/readyz");
    assert_eq!(unready.status, 503);
    assert!(
        unready.body.contains("[-]data_corruption failed: alarm activated: CORRUPT\n")
            && unready.body.contains("[+]linearizable_read ok\n"),
        "{}",
        unready.body
    );
    ok("/livez");
    ok("/readyz?exclude=data_corruption");
    raise(&daemon, pb::AlarmType::Corrupt, Deactivate);
    ok("/readyz");

    let variables: serde_json::Value =
        serde_json::from_str(&daemon.http("/debug/vars").body).unwrap();
    assert_eq!(variables["raft.status"]["raftState"], "StateLeader");
    assert_eq!(variables["cmdline"][0], crate::process::BINARY);
    let peer_version = http(setup.peer, "GET", "/version", &[]);
    assert_eq!(peer_version.status, 200);
    let members = http(setup.peer, "GET", "/members", &[]);
    let members: serde_json::Value = serde_json::from_str(&members.body).unwrap();
    assert_eq!(members[0]["name"], "m");
    daemon.stop();
}

#[test]
fn browsers_and_hosts_are_let_in_as_configured() {
    let allow = |answer: &Http| answer.headers.get("access-control-allow-origin").cloned();
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    let answer = http(setup.client, "OPTIONS", "/health", &[("Origin", "http://a.example")]);
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    assert_eq!(allow(&answer).as_deref(), Some("*"));
    assert_eq!(answer.headers["access-control-allow-methods"], "POST, GET, OPTIONS, PUT, DELETE");
    assert_eq!(
        answer.headers["access-control-allow-headers"],
        "accept, content-type, authorization"
    );
    assert_eq!(http(setup.client, "GET", "/health", &[("Host", "evil.example")]).status, 200);
    daemon.stop();

    let setup =
        Setup::new(&["--cors=http://a.example:80", "--host-whitelist=good.example,127.0.0.1"]);
    let daemon = setup.start();
    let from = |origin: &str| http(setup.client, "GET", "/health", &[("Origin", origin)]);
    assert_eq!(allow(&from("http://a.example:80")).as_deref(), Some("http://a.example:80"));
    assert_eq!(allow(&from("http://b.example:80")), None);
    for (host, status) in [
        ("good.example", 200),
        ("good.example:2379", 200),
        ("127.0.0.1:1", 200),
        ("evil.example", 421),
        ("evil.example:2379", 421),
    ] {
        let answer = http(setup.client, "GET", "/health", &[("Host", host)]);
        assert_eq!(answer.status, status, "{host}: {answer:?}");
        assert!(status == 200 || answer.body.contains("CVE-2018-5702"), "{answer:?}");
    }
    // gRPC is not asked for its host.
    runtime().block_on(async { daemon.client().put("a", "1").await.unwrap() });
    daemon.stop();
}

#[test]
fn http_and_grpc_can_have_ports_of_their_own() {
    let (web, metrics) = (free_address(), free_address());
    let setup = Setup::new(&[
        &format!("--listen-client-http-urls=http://{web}"),
        &format!("--listen-metrics-urls=http://{metrics}"),
    ]);
    let daemon = setup.start();
    runtime().block_on(async {
        daemon.client().put("a", "1").await.unwrap();
        let other = crate::process::Client::new(&format!("http://{web}"));
        let error = other.put("a", "2").await.unwrap_err();
        assert_ne!(error.code(), tonic::Code::Ok, "{error}");
        assert_eq!(daemon.client().get("a").await.unwrap().unwrap().value, "1");
    });
    for path in ["/version", "/health", "/metrics", "/readyz", "/debug/vars"] {
        assert_eq!(http(web, "GET", path, &[]).status, 200, "{path}");
        let on_grpc = crate::process::try_http(setup.client, "GET", path, &[]);
        assert!(on_grpc.as_ref().map_or(true, |answer| answer.status >= 400), "{on_grpc:?}");
    }
    for (path, status) in [
        ("/metrics", 200),
        ("/health", 200),
        ("/livez", 200),
        ("/readyz", 200),
        ("/readyz/linearizable_read", 200),
        ("/version", 404),
        ("/debug/vars", 404),
    ] {
        assert_eq!(http(metrics, "GET", path, &[]).status, status, "{path}");
    }
    // No host is asked for here, and no browser let in.
    let answer = http(metrics, "GET", "/health", &[("Host", "x"), ("Origin", "http://a.example")]);
    assert_eq!(answer.status, 200);
    assert!(!answer.headers.contains_key("access-control-allow-origin"), "{answer:?}");
    daemon.stop();
}

/// Families of which a single member without v2 and without a proxy can have no series.
fn is_of_others(name: &str) -> bool {
    ["etcd_network_", "etcd_server_learner_promote_", "etcd_debugging_store_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

#[test]
fn after_some_traffic_every_metric_is_there_and_a_prometheus_reads_it() {
    let setup = Setup::new(&["--quota-backend-bytes=1000000000"]);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        for n in 0..20 {
            client.put(&format!("k{n}"), "value").await.unwrap();
        }
        client.delete("k0").await.unwrap();
        client.get("k1").await.unwrap();
        let put = |key: &'static str| pb::RequestOp {
            request: Some(pb::request_op::Request::RequestPut(pb::PutRequest {
                key: key.into(),
                ..Default::default()
            })),
        };
        // A transaction counts as one when it does more than one thing.
        for keys in [&["t1"][..], &["t2", "t3"]] {
            let success = keys.iter().map(|key| put(key)).collect();
            let txn = pb::TxnRequest { success, ..Default::default() };
            client.kv.clone().txn(txn).await.unwrap();
        }
        let (_sender, mut responses) = client.watch_all(1).await.unwrap();
        assert!(responses.message().await.unwrap().unwrap().events.len() > 1);
        let lease = client.grant(100).await.unwrap();
        client.put_with("leased", "v", lease).await.unwrap();
        client.lease.clone().lease_revoke(pb::LeaseRevokeRequest { id: lease }).await.unwrap();
        client.compact(10, true).await.unwrap();
        client.hash_kv(0).await.unwrap();
        client.maintenance.clone().hash(pb::HashRequest {}).await.unwrap();
        client.maintenance.clone().defragment(pb::DefragmentRequest {}).await.unwrap();
        let mut snapshot =
            client.maintenance.clone().snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
        while snapshot.message().await.unwrap().is_some() {}
        client.compact(1, false).await.unwrap_err();
    });
    raise(&daemon, pb::AlarmType::Nospace, pb::alarm_request::AlarmAction::Activate);
    raise(&daemon, pb::AlarmType::Nospace, pb::alarm_request::AlarmAction::Deactivate);
    assert_eq!(daemon.http("/readyz").status, 200);
    assert_eq!(daemon.http("/health").status, 200);

    // Metrics that nobody sets by himself are a second behind.
    let families = wait_for("the size in use and the events", || {
        let page = daemon.http("/metrics");
        assert_eq!(page.status, 200);
        assert_eq!(page.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
        let families = parse(&page.body);
        let late = ["etcd_mvcc_db_total_size_in_use_in_bytes", "etcd_debugging_mvcc_events_total"];
        let shown = late.iter().all(|name| families[*name].samples[""] > 0.0);
        if shown { Ok(families) } else { Err(page.body) }
    });
    for (name, kind, labels, _) in FAMILIES {
        let Some(family) = families.get(*name) else {
            assert!(is_of_others(name) && !labels.is_empty(), "{name} is missing");
            continue;
        };
        assert_eq!(family.kind, *kind, "{name}");
        assert!(!family.samples.is_empty(), "{name}");
    }
    let value = |name: &str, labels: &str| {
        let samples = &families[name].samples;
        *samples.get(labels).unwrap_or_else(|| panic!("{name}{{{labels}}}: {samples:?}"))
    };
    for (name, labels, expected) in [
        ("etcd_server_has_leader", "", 1.0),
        ("etcd_server_is_leader", "", 1.0),
        ("etcd_server_is_learner", "", 0.0),
        ("etcd_cluster_version", "cluster_version=\"3.7\"", 1.0),
        ("etcd_server_version", "server_version=\"3.7.1\"", 1.0),
        ("etcd_server_quota_backend_bytes", "", 1e9),
        ("etcd_server_proposals_pending", "", 0.0),
        ("etcd_server_proposals_failed_total", "", 0.0),
        ("etcd_server_health_success", "", 1.0),
        ("etcd_mvcc_put_total", "", 24.0),
        ("etcd_mvcc_delete_total", "", 1.0),
        ("etcd_mvcc_txn_total", "", 1.0),
        ("etcd_debugging_mvcc_keys_total", "", 22.0),
        ("etcd_debugging_mvcc_current_revision", "", 26.0),
        ("etcd_debugging_mvcc_compact_revision", "", 10.0),
        // Ten keys of two bytes, ten of three, with 5 each; t1 to t3; "leased" with "v".
        ("etcd_debugging_mvcc_total_put_size_in_bytes", "", 150.0 + 6.0 + 7.0),
        ("etcd_debugging_lease_granted_total", "", 1.0),
        ("etcd_debugging_lease_revoked_total", "", 1.0),
        ("etcd_disk_backend_defrag_duration_seconds", "", 1.0),
        ("etcd_disk_backend_snapshot_duration_seconds", "", 1.0),
        ("etcd_mvcc_hash_duration_seconds", "", 1.0),
        ("etcd_mvcc_hash_rev_duration_seconds", "", 1.0),
        ("etcd_debugging_mvcc_db_compaction_total_duration_milliseconds", "", 1.0),
        ("quorate_engine_info", "engine=\"redb\"", 1.0),
        (
            "grpc_server_handled_total",
            "grpc_type=\"unary\",grpc_service=\"etcdserverpb.KV\",grpc_method=\"Put\",grpc_code=\"OK\"",
            21.0,
        ),
    ] {
        let found = if labels.starts_with("grpc_type") {
            // The order of labels is nobody's business.
            let wanted: BTreeSet<&str> = labels.split(',').collect();
            let samples = &families[name].samples;
            let found =
                samples.iter().find(|(l, _)| l.split(',').collect::<BTreeSet<_>>() == wanted);
            *found.unwrap().1
        } else {
            value(name, labels)
        };
        assert_eq!(found, expected, "{name}{{{labels}}}");
    }
    for name in [
        "etcd_disk_wal_fsync_duration_seconds",
        "etcd_disk_wal_write_duration_seconds",
        "etcd_disk_wal_write_bytes_total",
        "etcd_disk_backend_commit_duration_seconds",
        "etcd_server_proposals_committed_total",
        "etcd_server_proposals_applied_total",
        "etcd_server_leader_changes_seen_total",
        "etcd_mvcc_range_total",
        "etcd_mvcc_db_total_size_in_bytes",
        "etcd_debugging_mvcc_events_total",
        "etcd_debugging_mvcc_db_compaction_last",
        "etcd_network_client_grpc_sent_bytes_total",
        "etcd_network_client_grpc_received_bytes_total",
        "quorate_wal_batch_entries",
    ] {
        assert!(value(name, "") > 0.0, "{name}");
    }

    let prometheus = Prometheus::start(setup.client);
    prometheus.expect("up{job=\"etcd\"}", 1.0);
    prometheus.expect("etcd_server_has_leader", 1.0);
    prometheus.expect("etcd_mvcc_put_total", 24.0);
    prometheus.satisfies("etcd_server_proposals_committed_total", "above 20", |n| n > 20.0);
    runtime().block_on(async {
        let client = daemon.client();
        for n in 0..50 {
            client.put(&format!("more{n}"), "value").await.unwrap();
        }
    });
    // What dashboards ask.
    prometheus.expect("etcd_mvcc_put_total", 74.0);
    prometheus.satisfies(
        "histogram_quantile(0.99, rate(etcd_disk_wal_fsync_duration_seconds_bucket[1m]))",
        "a time",
        |seconds| seconds > 0.0 && seconds < 60.0,
    );
    prometheus.satisfies(
        "sum(rate(grpc_server_handled_total{grpc_method=\"Put\",grpc_code=\"OK\"}[1m]))",
        "a rate",
        |rate| rate > 0.0,
    );
    daemon.stop();
}
