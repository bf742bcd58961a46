//! The page of `/metrics` as others read it: against the list of what etcd shows, against a running
//! etcd, through promtool, and scraped by a real Prometheus.

mod page;
mod ports;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;

use page::{FAMILIES, Process, Prometheus, fetch, parse, wait_for};

use ports::free_address;
use prost::Message;
use quorate::core::types::MemberId;
use quorate::metrics::{GrpcCall, Method, Metrics, RequestKind, StreamKind};
use quorate::transport::http::status::{self, ClientRules, Member, ReadFuture};
use quorate_proto::etcdserverpb::AlarmType;

fn leaked() -> &'static Metrics {
    Box::leak(Box::new(Metrics::new()))
}

/// Makes one series of each family that has labels.
fn touch_all(m: &Metrics) {
    m.cluster_version.with(&["3.7"]).set(1);
    m.server_version.with(&["3.7.1"]).set(1);
    m.server_id.with(&["8e9e05c52164694d"]).set(1);
    m.feature_enabled.with(&["AllAlpha", "ALPHA"]).set(0);
    m.learner_promote_failures.with(&["not a learner"]).increment(1);
    m.request_seconds(RequestKind::Put, true).record(0.002);
    m.apply_seconds(RequestKind::Put, true).record(0.002);
    m.range_seconds(false).record(0.002);
    m.count_client_request(false, Some("3.7"));
    m.healthcheck.with(&["livez", "serializable_read"]).set(1);
    m.healthchecks.with(&["livez", "serializable_read", "success"]).increment(1);
    m.known_peers.with(&["a", "b"]).set(1);
    m.peer("a", "b").round_trip_seconds.record(0.01);
    m.peer_received_failures.with(&["127.0.0.1"]).increment(1);
    m.snapshot_send_success.with(&["b"]).increment(1);
    m.snapshot_send_failures.with(&["b"]).increment(1);
    m.snapshot_send_inflights.with(&["b"]).set(0);
    m.snapshot_send_seconds.with(&["b"]).record(1);
    m.snapshot_receive_success.with(&["b"]).increment(1);
    m.snapshot_receive_failures.with(&["b"]).increment(1);
    m.snapshot_receive_inflights.with(&["b"]).set(0);
    m.snapshot_receive_seconds.with(&["b"]).record(1);
    m.stream_failures.with(&["receive", "watch"]).increment(1);
    m.alarms.with(&["a", "NOSPACE"]).set(1);
    m.store_reads.with(&["get"]).increment(1);
    m.store_writes.with(&["set"]).increment(1);
    m.engine_info.with(&["redb"]).set(1);
}

#[test]
fn the_page_holds_exactly_the_families_listed() {
    let metrics = Metrics::new();
    touch_all(&metrics);
    let page = metrics.render();
    let families = parse(&page);
    for (name, kind, labels, bounds) in FAMILIES {
        let family = families.get(*name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(family.kind, *kind, "{name}");
        assert!(family.help, "{name} has no help");
        assert!(family.labels.iter().eq(labels.iter()), "{name}: {:?}", family.labels);
        let mut found = family.bounds().to_vec();
        if let Some((first, factor, count)) = bounds {
            assert_eq!(found.pop().as_deref(), Some("+Inf"), "{name}");
            assert_eq!(found.len(), *count as usize, "{name}");
            for (i, bound) in found.iter().enumerate() {
                let bound: f64 = bound.parse().expect("a bound is a number");
                let expected = first * factor.powi(i as i32);
                assert!((bound / expected - 1.0).abs() < 1e-9, "{name}: {bound}, {expected}");
            }
        } else {
            assert!(found.is_empty(), "{name}");
        }
    }
    let listed: BTreeSet<_> = FAMILIES.iter().map(|f| f.0).collect();
    assert_eq!(listed.len(), FAMILIES.len(), "a name is listed twice");
    let unlisted: Vec<_> = families.keys().filter(|n| !listed.contains(n.as_str())).collect();
    assert!(unlisted.is_empty(), "{unlisted:?}");
}

#[test]
fn at_start_numbers_without_labels_and_all_grpc_methods_are_there_as_zero() {
    let families = parse(&Metrics::new().render());
    for (name, _, labels, _) in FAMILIES {
        let family = families.get(*name);
        match *name {
            "promhttp_metric_handler_requests_total" => {
                let samples = &family.expect("touched").samples;
                let zeros = ["200", "500", "503"].map(|code| (format!("code=\"{code}\""), 0.0));
                assert!(samples.iter().map(|(k, v)| (k.clone(), *v)).eq(zeros));
            }
            grpc if grpc.starts_with("grpc_server_") => {
                let samples = &family.expect("touched").samples;
                // KV 6, Watch 1, Lease 5, Cluster 5, Maintenance 8, Auth 17, Health 3.
                let methods = 45 * if grpc == "grpc_server_handled_total" { 17 } else { 1 };
                assert_eq!(samples.len(), methods, "{name}");
                assert!(samples.values().all(|v| *v == 0.0), "{name}");
            }
            _ if labels.is_empty() => {
                let samples = &family.unwrap_or_else(|| panic!("{name} is missing")).samples;
                let known = ["os_", "process_", "go_"].iter().any(|p| name.starts_with(p));
                assert!(samples.len() == 1 && (known || samples[""] == 0.0), "{name}");
            }
            _ => assert!(family.is_none(), "{name} has a series before its first use"),
        }
    }
    // The process's own numbers cannot be zero, network apart.
    for name in [
        "os_fd_used",
        "os_fd_limit",
        "process_open_fds",
        "process_max_fds",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_virtual_memory_max_bytes",
        "go_threads",
    ] {
        assert!(families[name].samples[""] >= 1.0, "{name}");
    }
    let started = families["process_start_time_seconds"].samples[""];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let age = now.expect("it is after 1970").as_secs_f64() - started;
    assert!((-2.0..3600.0).contains(&age), "started {age} s ago");
}

#[test]
fn the_methods_are_those_of_the_services() {
    #[derive(Message)]
    struct Files {
        #[prost(message, repeated, tag = "1")]
        files: Vec<File>,
    }
    #[derive(Message)]
    struct File {
        #[prost(string, tag = "2")]
        package: String,
        #[prost(message, repeated, tag = "6")]
        services: Vec<Service>,
    }
    #[derive(Message)]
    struct Service {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        methods: Vec<Rpc>,
    }
    #[derive(Message)]
    struct Rpc {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(bool, tag = "5")]
        client_streaming: bool,
        #[prost(bool, tag = "6")]
        server_streaming: bool,
    }
    let files = Files::decode(quorate_proto::DESCRIPTORS).expect("descriptors are readable");
    let mut declared = BTreeMap::new();
    for file in files.files {
        for service in &file.services {
            for rpc in &service.methods {
                let path = format!("/{}.{}/{}", file.package, service.name, rpc.name);
                let stream = match (rpc.client_streaming, rpc.server_streaming) {
                    (false, false) => StreamKind::Unary,
                    (true, false) => StreamKind::ClientStream,
                    (false, true) => StreamKind::ServerStream,
                    (true, true) => StreamKind::Bidi,
                };
                declared.insert(path, stream.label());
            }
        }
    }
    let counted: BTreeMap<_, _> = Method::ALL
        .iter()
        .map(|method| {
            let (service, name, stream) = method.parts();
            (format!("/{service}/{name}"), stream.label())
        })
        .collect();
    assert_eq!(counted, declared);
}

/// A page of etcd 3.4 with a leader.
fn page_of_etcd() -> String {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let (client, peer) = (free_address(), free_address());
    let child = Command::new("etcd")
        .env_clear()
        .arg(format!("--data-dir={}", dir.path().join("data").display()))
        .arg(format!("--listen-client-urls=http://{client}"))
        .arg(format!("--advertise-client-urls=http://{client}"))
        .arg(format!("--listen-peer-urls=http://{peer}"))
        .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
        .arg(format!("--initial-cluster=default=http://{peer}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test needs etcd in PATH");
    let _etcd = Process(child);
    wait_for(|| {
        let page = fetch(client, "/metrics").map_err(|e| e.to_string())?;
        if page.contains("\netcd_server_has_leader 1\n") { Ok(page) } else { Err(page) }
    })
}

#[test]
fn what_a_running_etcd_shows_is_here_with_the_same_type_labels_and_bounds() {
    let metrics = Metrics::new();
    touch_all(&metrics);
    let ours = parse(&metrics.render());
    for (name, theirs) in parse(&page_of_etcd()) {
        // Gone after 3.4, where they doubled names without `debugging`; or true of Go alone.
        let gone =
            ["db_total_size_in_bytes", "delete_total", "put_total", "range_total", "txn_total"];
        if name.strip_prefix("etcd_debugging_mvcc_").is_some_and(|n| gone.contains(&n))
            || name == "etcd_server_go_version"
            || name.starts_with("go_") && name != "go_threads"
        {
            continue;
        }
        let ours = ours.get(&name).unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!((&ours.kind, ours.bounds()), (&theirs.kind, theirs.bounds()), "{name}");
        assert_eq!(ours.labels, theirs.labels, "{name}");
        if name == "grpc_server_handled_total" {
            let ours: BTreeSet<_> = ours.samples.keys().collect();
            let missing: Vec<_> = theirs.samples.keys().filter(|s| !ours.contains(s)).collect();
            assert!(missing.is_empty(), "{missing:?}");
        }
    }
}

#[test]
fn promtool_reads_the_page_and_only_dislikes_names_of_etcd() {
    let metrics = Metrics::new();
    touch_all(&metrics);
    metrics.time_grpc_calls();
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test needs promtool in PATH");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(metrics.render().as_bytes()).expect("promtool reads");
    drop(stdin);
    let output = child.wait_with_output().expect("promtool ends");
    let said = String::from_utf8(output.stderr).expect("promtool writes text");
    // 0: nothing to say; 3: names or helps against its conventions; anything else: not readable.
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}: {said}", output.status);
    assert_eq!(output.status.code() == Some(3), !said.is_empty(), "{said}");
    for line in said.lines() {
        let naming = ["suffix", "base unit"].iter().any(|w| line.contains(w));
        assert!(line.starts_with("etcd_") && naming, "{line}");
    }
}

struct Healthy;

impl Member for Healthy {
    fn server_version(&self) -> String {
        "3.7.1".into()
    }

    fn cluster_version(&self) -> Option<String> {
        Some("3.7.0".into())
    }

    fn storage_version(&self) -> Option<String> {
        None
    }

    fn alarms(&self) -> Vec<AlarmType> {
        Vec::new()
    }

    fn leader(&self) -> Option<MemberId> {
        Some(MemberId(1))
    }

    fn is_learner(&self) -> bool {
        false
    }

    fn auth_enabled(&self) -> bool {
        false
    }

    fn read(&self, _serializable: bool) -> ReadFuture {
        Box::pin(async { Ok(()) })
    }

    fn raft_status(&self) -> serde_json::Value {
        serde_json::json!({})
    }

    fn cmdline(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Serves the pages of a healthy member from a single-threaded runtime until the test process ends.
fn serve(metrics: &'static Metrics) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("a listener has an address");
    listener.set_nonblocking(true).expect("it can be set");
    let member = Arc::new(Healthy);
    let rules = ClientRules::new(["127.0.0.1".to_owned()], [], member.clone());
    let router = rules.guard(status::client_router(member, metrics));
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime starts").block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("it is a listener");
            axum::serve(listener, router).await.expect("it serves");
        });
    });
    address
}

#[test]
fn a_real_prometheus_scrapes_it() {
    let metrics = leaked();
    touch_all(metrics);
    metrics.time_grpc_calls();
    metrics.has_leader.set(1);
    metrics.quota_backend_bytes.set(2_147_483_648.0);
    metrics.proposals_committed.set(42);
    for _ in 0..100 {
        metrics.wal_fsync_seconds.record(0.003);
        let call = GrpcCall::start(Method::Put, metrics);
        call.received(100);
        call.finish(tonic::Code::Ok);
    }
    let target = serve(metrics);

    let prometheus = Prometheus::start(target);
    for (query, expected) in [
        ("up{job=\"etcd\"}", 1.0),
        ("etcd_server_has_leader", 1.0),
        ("etcd_server_quota_backend_bytes", 2_147_483_648.0),
        ("etcd_server_proposals_committed_total", 42.0),
        ("etcd_disk_wal_fsync_duration_seconds_count", 100.0),
        ("etcd_disk_wal_fsync_duration_seconds_bucket{le=\"0.004\"}", 100.0),
        ("etcd_disk_wal_fsync_duration_seconds_bucket{le=\"0.002\"}", 0.0),
        ("etcd_debugging_lease_ttl_total_bucket{le=\"8.388608e+06\"}", 0.0),
        ("etcd_network_client_grpc_received_bytes_total", 10_000.0),
        ("grpc_server_handled_total{grpc_method=\"Put\",grpc_code=\"OK\"}", 100.0),
        ("grpc_server_handling_seconds_count{grpc_method=\"Put\"}", 100.0),
        // 45 methods by 17 codes.
        ("count(grpc_server_handled_total)", 765.0),
        ("count(etcd_server_learner_promote_failures{Reason=\"not a learner\"})", 1.0),
        ("quorate_engine_info{engine=\"redb\"}", 1.0),
    ] {
        prometheus.expect(query, expected);
    }
}
