//! The page of `/metrics`: what must be on it, how it is read, and a Prometheus that scrapes it.

#![allow(dead_code, reason = "each of the tests that share this uses a part")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Every family: name, type, labels in alphabetical order, and the bounds of a histogram as first
/// bound, factor, number.
#[rustfmt::skip]
pub const FAMILIES: &[(&str, &str, &[&str], Option<(f64, f64, i32)>)] = &[
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
    ("quorate_connections_closed_for_room_total", "counter", &[], None),
    ("quorate_quota_physical_bytes", "gauge", &[], None),
    ("quorate_engine_info", "gauge", &["engine"], None),
];

/// What a page says about one name.
#[derive(Default, PartialEq, Debug)]
pub struct Family {
    pub kind: String,
    pub help: bool,
    pub labels: BTreeSet<String>,
    /// The bounds as written, in order, of each series.
    pub bounds: BTreeMap<String, Vec<String>>,
    /// By everything between the braces.
    pub samples: BTreeMap<String, f64>,
}

impl Family {
    /// The bounds of all series, which must be the same.
    pub fn bounds(&self) -> &[String] {
        let mut all = self.bounds.values();
        let first = all.next().map_or(&[][..], Vec::as_slice);
        assert!(all.all(|b| b == first), "series of one name differ in bounds");
        first
    }
}

/// Reads a page strictly: names in order, TYPE before samples, no sample outside of its family.
pub fn parse(page: &str) -> BTreeMap<String, Family> {
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

/// A process that ends with the test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let killed = self.0.kill().and_then(|()| self.0.wait());
        if !std::thread::panicking() {
            killed.expect("the process can be killed");
        }
    }
}

/// The body of a 200 answer.
pub fn fetch(address: SocketAddr, path: &str) -> std::io::Result<String> {
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
pub fn wait_for<T>(mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(reason) => assert!(Instant::now() < deadline, "after a minute: {reason}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A Prometheus that scrapes one target every quarter of a second.
pub struct Prometheus {
    api: SocketAddr,
    _process: Process,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    /// Returns once the target has been scraped.
    pub fn start(target: SocketAddr) -> Self {
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
        let process = Process(child);
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
            let state: serde_json::Value =
                serde_json::from_str(&body).map_err(|e| e.to_string())?;
            let target = &state["data"]["activeTargets"][0];
            if target["health"] == "up" { Ok(()) } else { Err(target.to_string()) }
        });
        Prometheus { api, _process: process, _dir: dir }
    }

    /// Waits until the first series of the answer to `query` has this value.
    pub fn expect(&self, query: &str, expected: f64) {
        self.satisfies(query, &format!("{expected}"), |value| value == expected);
    }

    /// Waits until the first series of the answer to `query` is as `what` says.
    pub fn satisfies(&self, query: &str, what: &str, holds: impl Fn(f64) -> bool) {
        let encoded: String = url::form_urlencoded::byte_serialize(query.as_bytes()).collect();
        wait_for(|| {
            let body = fetch(self.api, &format!("/api/v1/query?query={encoded}"));
            let body = body.map_err(|e| format!("{query}: {e}"))?;
            let answer: serde_json::Value =
                serde_json::from_str(&body).map_err(|e| e.to_string())?;
            let value = answer["data"]["result"][0]["value"][1].as_str();
            match value.and_then(|v| v.parse::<f64>().ok()) {
                Some(value) if holds(value) => Ok(()),
                _ => Err(format!("{query} is not {what}: {body}")),
            }
        });
    }
}
