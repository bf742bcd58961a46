//! The page of `/metrics` as others read it: against the list of what etcd shows, against a running
//! etcd, through promtool, and scraped by a real Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use quorate::core::types::MemberId;
use quorate::metrics::{GrpcCall, Method, Metrics, RequestKind, StreamKind};
use quorate::transport::http::status::{self, ClientRules, Member, ReadFuture};
use quorate_proto::etcdserverpb::AlarmType;

/// Every family: name, type, labels in alphabetical order, and the bounds of a histogram as first
/// bound, factor, number.
#[rustfmt::skip]
const FAMILIES: &[(&str, &str, &[&str], Option<(f64, f64, i32)>)] = &[
    ("etcd_cluster_version", "gauge", &["cluster_version"], None),
    ("etcd_server_version", "gauge", &["server_version"], None),
    ("etcd_server_id", "gauge", &["server_id"], None),
    ("etcd_server_feature_enabled", "gauge", &["name", "stage"], None),
    ("etcd_server_has_leader", "gauge", &[], None),
    ("etcd_server_is_leader", "gauge", &[], None),
    ("etcd_server_is_learner", "gauge", &[], None),
    ("etcd_server_leader_changes_seen_total", "counter", &[], None),
    ("etcd_server_learner_promote_failures", "counter", &["Reason"], None),
    ("etcd_server_learner_promote_successes", "counter", &[], None),
    ("etcd_server_heartbeat_send_failures_total", "counter", &[], None),
    ("etcd_server_snapshot_apply_in_progress_total", "gauge", &[], None),
    ("etcd_server_proposals_committed_total", "gauge", &[], None),
    ("etcd_server_proposals_applied_total", "gauge", &[], None),
    ("etcd_server_proposals_pending", "gauge", &[], None),
    ("etcd_server_proposals_failed_total", "counter", &[], None),
    ("etcd_server_request_duration_seconds", "histogram", &["success", "type"], Some((0.001, 2.0, 14))),
    ("etcd_server_apply_duration_seconds", "histogram", &["op", "success", "version"], Some((0.0001, 2.0, 20))),
    ("etcd_server_range_duration_seconds", "histogram", &["success"], Some((0.0001, 2.0, 20))),
    ("etcd_server_slow_apply_total", "counter", &[], None),
    ("etcd_server_slow_read_indexes_total", "counter", &[], None),
    ("etcd_server_read_indexes_failed_total", "counter", &[], None),
    ("etcd_server_quota_backend_bytes", "gauge", &[], None),
    ("etcd_server_client_requests_total", "counter", &["client_api_version", "type"], None),
    ("etcd_server_health_success", "counter", &[], None),
    ("etcd_server_health_failures", "counter", &[], None),
    ("etcd_server_healthcheck", "gauge", &["name", "type"], None),
    ("etcd_server_healthchecks_total", "counter", &["name", "status", "type"], None),
    ("etcd_network_known_peers", "gauge", &["Local", "Remote"], None),
    ("etcd_network_active_peers", "gauge", &["Local", "Remote"], None),
    ("etcd_network_disconnected_peers_total", "counter", &["Local", "Remote"], None),
    ("etcd_network_peer_sent_bytes_total", "counter", &["To"], None),
    ("etcd_network_peer_received_bytes_total", "counter", &["From"], None),
    ("etcd_network_peer_sent_failures_total", "counter", &["To"], None),
    ("etcd_network_peer_received_failures_total", "counter", &["From"], None),
    ("etcd_network_peer_round_trip_time_seconds", "histogram", &["To"], Some((0.0001, 2.0, 16))),
    ("etcd_network_snapshot_send_success", "counter", &["To"], None),
    ("etcd_network_snapshot_send_failures", "counter", &["To"], None),
    ("etcd_network_snapshot_send_inflights_total", "gauge", &["To"], None),
    ("etcd_network_snapshot_send_total_duration_seconds", "histogram", &["To"], Some((0.1, 2.0, 10))),
    ("etcd_network_snapshot_receive_success", "counter", &["From"], None),
    ("etcd_network_snapshot_receive_failures", "counter", &["From"], None),
    ("etcd_network_snapshot_receive_inflights_total", "gauge", &["From"], None),
    ("etcd_network_snapshot_receive_total_duration_seconds", "histogram", &["From"], Some((0.1, 2.0, 10))),
    ("etcd_network_client_grpc_sent_bytes_total", "counter", &[], None),
    ("etcd_network_client_grpc_received_bytes_total", "counter", &[], None),
    ("etcd_network_server_stream_failures_total", "counter", &["API", "Type"], None),
    ("etcd_disk_wal_fsync_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_disk_wal_write_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_disk_wal_write_bytes_total", "gauge", &[], None),
    ("etcd_disk_backend_commit_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_disk_backend_defrag_duration_seconds", "histogram", &[], Some((0.1, 2.0, 13))),
    ("etcd_disk_backend_snapshot_duration_seconds", "histogram", &[], Some((0.01, 2.0, 17))),
    ("etcd_disk_defrag_inflight", "gauge", &[], None),
    ("etcd_snap_fsync_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_snap_db_fsync_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_snap_db_save_total_duration_seconds", "histogram", &[], Some((0.1, 2.0, 10))),
    ("etcd_mvcc_range_total", "counter", &[], None),
    ("etcd_mvcc_put_total", "counter", &[], None),
    ("etcd_mvcc_delete_total", "counter", &[], None),
    ("etcd_mvcc_txn_total", "counter", &[], None),
    ("etcd_mvcc_db_total_size_in_bytes", "gauge", &[], None),
    ("etcd_mvcc_db_total_size_in_use_in_bytes", "gauge", &[], None),
    ("etcd_mvcc_db_open_read_transactions", "gauge", &[], None),
    ("etcd_mvcc_hash_duration_seconds", "histogram", &[], Some((0.01, 2.0, 15))),
    ("etcd_mvcc_hash_rev_duration_seconds", "histogram", &[], Some((0.01, 2.0, 15))),
    ("etcd_debugging_auth_revision", "gauge", &[], None),
    ("etcd_debugging_disk_backend_commit_rebalance_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_disk_backend_commit_spill_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_disk_backend_commit_write_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_lease_granted_total", "counter", &[], None),
    ("etcd_debugging_lease_revoked_total", "counter", &[], None),
    ("etcd_debugging_lease_renewed_total", "counter", &[], None),
    ("etcd_debugging_lease_ttl_total", "histogram", &[], Some((1.0, 2.0, 24))),
    ("etcd_debugging_mvcc_keys_total", "gauge", &[], None),
    ("etcd_debugging_mvcc_watch_stream_total", "gauge", &[], None),
    ("etcd_debugging_mvcc_watcher_total", "gauge", &[], None),
    ("etcd_debugging_mvcc_slow_watcher_total", "gauge", &[], None),
    ("etcd_debugging_mvcc_events_total", "counter", &[], None),
    ("etcd_debugging_mvcc_pending_events_total", "gauge", &[], None),
    ("etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds", "histogram", &[], Some((0.5, 2.0, 14))),
    ("etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds", "histogram", &[], Some((1.0, 2.0, 13))),
    ("etcd_debugging_mvcc_db_compaction_total_duration_milliseconds", "histogram", &[], Some((100.0, 2.0, 14))),
    ("etcd_debugging_mvcc_db_compaction_last", "gauge", &[], None),
    ("etcd_debugging_mvcc_db_compaction_keys_total", "counter", &[], None),
    ("etcd_debugging_mvcc_current_revision", "gauge", &[], None),
    ("etcd_debugging_mvcc_compact_revision", "gauge", &[], None),
    ("etcd_debugging_mvcc_total_put_size_in_bytes", "gauge", &[], None),
    ("etcd_debugging_server_alarms", "gauge", &["alarm_type", "server_id"], None),
    ("etcd_debugging_server_lease_expired_total", "counter", &[], None),
    ("etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_server_watch_send_loop_control_stream_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_server_watch_send_loop_progress_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_snap_save_marshalling_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_snap_save_total_duration_seconds", "histogram", &[], Some((0.001, 2.0, 14))),
    ("etcd_debugging_store_reads_total", "counter", &["action"], None),
    ("etcd_debugging_store_writes_total", "counter", &["action"], None),
    ("etcd_debugging_store_expires_total", "counter", &[], None),
    ("etcd_debugging_store_watch_requests_total", "counter", &[], None),
    ("etcd_debugging_store_watchers", "gauge", &[], None),
    ("etcd_grpc_proxy_watchers_coalescing_total", "gauge", &[], None),
    ("etcd_grpc_proxy_events_coalescing_total", "counter", &[], None),
    ("etcd_grpc_proxy_cache_keys_total", "gauge", &[], None),
    ("etcd_grpc_proxy_cache_hits_total", "gauge", &[], None),
    ("etcd_grpc_proxy_cache_misses_total", "gauge", &[], None),
    ("os_fd_used", "gauge", &[], None),
    ("os_fd_limit", "gauge", &[], None),
    ("grpc_server_started_total", "counter", &["grpc_method", "grpc_service", "grpc_type"], None),
    ("grpc_server_handled_total", "counter", &["grpc_code", "grpc_method", "grpc_service", "grpc_type"], None),
    ("grpc_server_msg_received_total", "counter", &["grpc_method", "grpc_service", "grpc_type"], None),
    ("grpc_server_msg_sent_total", "counter", &["grpc_method", "grpc_service", "grpc_type"], None),
    ("process_resident_memory_bytes", "gauge", &[], None),
    ("process_cpu_seconds_total", "counter", &[], None),
    ("process_open_fds", "gauge", &[], None),
    ("process_max_fds", "gauge", &[], None),
    ("process_virtual_memory_bytes", "gauge", &[], None),
    ("process_virtual_memory_max_bytes", "gauge", &[], None),
    ("process_start_time_seconds", "gauge", &[], None),
    ("process_network_receive_bytes_total", "counter", &[], None),
    ("process_network_transmit_bytes_total", "counter", &[], None),
    ("go_threads", "gauge", &[], None),
    ("promhttp_metric_handler_requests_total", "counter", &["code"], None),
    ("promhttp_metric_handler_requests_in_flight", "gauge", &[], None),
    ("quorate_wal_batch_entries", "histogram", &[], Some((1.0, 2.0, 14))),
    ("quorate_overlay_writes", "gauge", &[], None),
    ("quorate_applier_queue", "gauge", &[], None),
    ("quorate_engine_info", "gauge", &["engine"], None),
];

/// What a page says about one name.
#[derive(Default, PartialEq, Debug)]
struct Family {
    kind: String,
    help: bool,
    labels: BTreeSet<String>,
    /// The bounds as written, in order, of each series.
    bounds: BTreeMap<String, Vec<String>>,
    /// By everything between the braces.
    samples: BTreeMap<String, f64>,
}

impl Family {
    /// The bounds of all series, which must be the same.
    fn bounds(&self) -> &[String] {
        let mut all = self.bounds.values();
        let first = all.next().map_or(&[][..], Vec::as_slice);
        assert!(all.all(|b| b == first), "series of one name differ in bounds");
        first
    }
}

/// Reads a page strictly: names in order, TYPE before samples, no sample outside of its family.
fn parse(page: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    let mut helped = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            helped = Some(rest.split_once(' ').expect("a help has a text").0.to_owned());
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type has a name");
            assert!(current.as_str() < name, "{name} after {current}");
            current = name.to_owned();
            let help = helped.take().is_some_and(|h| h == name);
            families.insert(name.into(), Family { kind: kind.into(), help, ..Family::default() });
            continue;
        }
        let family = families.get_mut(&current).expect("a type comes first");
        let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
        let value: f64 = value.parse().expect("a value is a number");
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}').expect("braces are closed")),
            None => (series, ""),
        };
        let suffix = name.strip_prefix(current.as_str()).expect("a sample is below its type");
        let plain = ["counter", "gauge"].contains(&family.kind.as_str());
        assert!(suffix.is_empty() || !plain, "{line}");
        let (labels, le) = match labels.rsplit_once("le=\"") {
            Some((labels, le)) if suffix == "_bucket" => {
                (labels.trim_end_matches(','), le.strip_suffix('"'))
            }
            _ => (labels, None),
        };
        for pair in labels.split("\",").filter(|l| !l.is_empty()) {
            family.labels.insert(pair.split_once("=\"").expect("a label has a value").0.into());
        }
        match (suffix, le) {
            ("_bucket", Some(le)) => {
                family.bounds.entry(labels.into()).or_default().push(le.into());
            }
            ("_sum", None) => {}
            ("" | "_count", None) => {
                family.samples.insert(labels.into(), value);
            }
            _ => panic!("unexpected sample: {line}"),
        }
    }
    families
}

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

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let killed = self.0.kill().and_then(|()| self.0.wait());
        if !std::thread::panicking() {
            killed.expect("the process can be killed");
        }
    }
}

fn free_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("a listener has an address")
}

/// The body of a 200 answer.
fn fetch(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(std::io::Error::other(head.to_owned())),
    }
}

/// Asks again until there is an answer.
///
/// # Panics
/// With the last reason, after a minute.
fn wait_for<T>(mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(reason) => assert!(Instant::now() < deadline, "after a minute: {reason}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A page of etcd 3.4 with a leader.
fn page_of_etcd() -> String {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let (client, peer) = (free_port(), free_port());
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
    let rules = ClientRules::new(["127.0.0.1".to_owned()], [], true, member.clone());
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

    let dir = tempfile::tempdir().expect("a directory can be made");
    let config = dir.path().join("prometheus.yml");
    let text = format!(
        "global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}\n\
         scrape_configs:\n\
         - job_name: etcd\n  static_configs:\n  - targets: ['{target}']\n"
    );
    std::fs::write(&config, text).expect("a file can be written");
    let mut child = Command::new("prometheus")
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
        .args(["--web.listen-address=127.0.0.1:0", "--log.format=json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test needs prometheus in PATH");
    let log = BufReader::new(child.stderr.take().expect("it is piped"));
    let _prometheus = Process(child);
    // It says which port it was given. Nothing reads on afterwards: the little it still writes fits
    // into the pipe.
    let mut log = log.lines();
    let api: SocketAddr = log
        .by_ref()
        .map(|line| line.expect("the log is text"))
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(&line).ok())
        .find(|line| line["msg"] == "Listening on")
        .and_then(|line| line["address"].as_str()?.parse().ok())
        .expect("prometheus says where it listens");

    wait_for(|| {
        let body = fetch(api, "/api/v1/targets").map_err(|e| e.to_string())?;
        let state: serde_json::Value = serde_json::from_str(&body).map_err(|e| e.to_string())?;
        let target = &state["data"]["activeTargets"][0];
        if target["health"] == "up" { Ok(()) } else { Err(target.to_string()) }
    });
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
        let encoded: String = url::form_urlencoded::byte_serialize(query.as_bytes()).collect();
        wait_for(|| {
            let body = fetch(api, &format!("/api/v1/query?query={encoded}"));
            let body = body.map_err(|e| format!("{query}: {e}"))?;
            let answer: serde_json::Value =
                serde_json::from_str(&body).map_err(|e| e.to_string())?;
            let value = answer["data"]["result"][0]["value"][1].as_str();
            match value.and_then(|v| v.parse::<f64>().ok()) {
                Some(value) if value == expected => Ok(()),
                _ => Err(format!("{query} is not {expected}: {body}")),
            }
        });
    }
}
