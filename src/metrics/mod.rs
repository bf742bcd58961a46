//! Every metric: name, type, labels, buckets and help in one table, and the handles that count.
//!
//! Names, types, labels and buckets are etcd's (operations section 4), so that its dashboards and
//! alerts work unchanged; a gauge that etcd named `_total` stays a gauge. Ours begin with `quorate_`.
//! Whoever counts holds a `&'static Metrics` (or an `Arc` of one in a test) and uses a field: an
//! addition to an atomic, a few ns. [`Metrics::render`] reads them when scraped; nothing has to run
//! in between. How samples are kept is registry.rs.
//!
//! Left out of etcd's page because it would be untrue here: `go_*` but for `go_threads` (threads of
//! the process; there are no goroutines, no Go heap and no Go release) and `etcd_server_go_version`.
//! `etcd_debugging_store_{reads,writes}_failed_total` are not on etcd's page either.

mod grpc;
mod process;
mod registry;

use std::sync::OnceLock;

use metrics::{Counter, Gauge, Histogram};
use parking_lot::RwLock;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::response_op::Response as OpResponse;
use rustc_hash::FxHashMap;

pub use grpc::{CODES, GrpcCall, Method, Received, StreamKind};
pub use process::{OpenFiles, resident_bytes};
pub use registry::{CounterVec, FloatCounter, GaugeVec, HistogramVec};

use registry::{Registry, exponential};

/// Takes the table; makes the struct of handles and the function that registers them all.
macro_rules! catalogue {
    ($($(#[$doc:meta])*
       $field:ident: $type:ty = $name:literal, [$($label:literal),*], $bounds:expr, $help:literal;)*
    ) => {
        /// The handles, one per line of the table. Units are in the names; labels are given in the
        /// order of the table.
        pub struct Metrics {
            $(#[doc = concat!("`", $name, "`: ", $help)] $(#[$doc])* pub $field: $type,)*
            registry: Registry,
            requests: KindTable,
            applies: KindTable,
            ranges: [OnceLock<Histogram>; 2],
            clients: ClientTable,
            grpc: grpc::Table,
        }

        impl Metrics {
            /// Registers every line of the table.
            fn registered() -> Self {
                let registry = Registry::default();
                Metrics {
                    $($field: registry.register($name, &[$($label),*], &$bounds, $help),)*
                    registry,
                    requests: KindTable::default(),
                    applies: KindTable::default(),
                    ranges: Default::default(),
                    clients: ClientTable::default(),
                    grpc: grpc::Table::default(),
                }
            }
        }
    };
}

const NONE: [f64; 0] = [];
const GRPC_SECONDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Writes and fsyncs: 1 ms to 8 s.
fn disk() -> Vec<f64> {
    exponential(0.001, 2.0, 14)
}

/// Applying and reading: 0.1 ms to 52 s.
fn apply() -> Vec<f64> {
    exponential(0.0001, 2.0, 20)
}

/// Moving a whole snapshot: 0.1 s to 51 s.
fn transfer() -> Vec<f64> {
    exponential(0.1, 2.0, 10)
}

catalogue! {
    // Who this member is.
    cluster_version: GaugeVec = "etcd_cluster_version", ["cluster_version"], NONE,
        "1 for the version that the cluster runs at (major.minor), 0 for earlier ones.";
    server_version: GaugeVec = "etcd_server_version", ["server_version"], NONE,
        "1 for the version whose behaviour this server has.";
    server_id: GaugeVec = "etcd_server_id", ["server_id"], NONE,
        "1 for the ID of this member, in hex.";
    feature_enabled: GaugeVec = "etcd_server_feature_enabled", ["name", "stage"], NONE,
        "Whether a feature gate is on (1) or off (0).";

    // Raft.
    has_leader: Gauge = "etcd_server_has_leader", [], NONE,
        "1 while this member knows a leader, else 0.";
    is_leader: Gauge = "etcd_server_is_leader", [], NONE,
        "1 while this member leads, else 0.";
    is_learner: Gauge = "etcd_server_is_learner", [], NONE,
        "1 while this member is a learner, else 0.";
    leader_changes: Counter = "etcd_server_leader_changes_seen_total", [], NONE,
        "Changes of leader that this member saw.";
    learner_promote_failures: CounterVec = "etcd_server_learner_promote_failures", ["Reason"], NONE,
        "Promotions of learners that failed while this member led.";
    learner_promote_successes: Counter = "etcd_server_learner_promote_successes", [], NONE,
        "Promotions of learners that succeeded while this member led.";
    heartbeat_send_failures: Counter = "etcd_server_heartbeat_send_failures_total", [], NONE,
        "Heartbeats that left later than they should, as on an overloaded leader.";
    snapshot_apply_in_progress: Gauge = "etcd_server_snapshot_apply_in_progress_total", [], NONE,
        "Snapshots being applied now: 0 or 1.";
    proposals_committed: Gauge = "etcd_server_proposals_committed_total", [], NONE,
        "Index of the last committed log entry.";
    proposals_applied: Gauge = "etcd_server_proposals_applied_total", [], NONE,
        "Index of the last applied log entry.";
    proposals_pending: Gauge = "etcd_server_proposals_pending", [], NONE,
        "Proposals that wait for their result.";
    proposals_failed: Counter = "etcd_server_proposals_failed_total", [], NONE,
        "Proposals that failed or timed out.";
    slow_read_indexes: Counter = "etcd_server_slow_read_indexes_total", [], NONE,
        "Read index rounds answered too late or for an older request.";
    read_indexes_failed: Counter = "etcd_server_read_indexes_failed_total", [], NONE,
        "Read index rounds that failed.";

    // Requests. The histograms with a request's kind are reached by request_seconds, apply_seconds
    // and range_seconds.
    request_duration: HistogramVec = "etcd_server_request_duration_seconds", ["type", "success"],
        exponential(0.001, 2.0, 14),
        "Time from receiving a request to its answer, consensus included.";
    apply_duration: HistogramVec = "etcd_server_apply_duration_seconds",
        ["version", "op", "success"], apply(),
        "Time to apply an entry to the store.";
    range_duration: HistogramVec = "etcd_server_range_duration_seconds", ["success"], apply(),
        "Time to read a range from the store.";
    slow_apply: Counter = "etcd_server_slow_apply_total", [], NONE,
        "Entries whose application took longer than warning-apply-duration.";
    quota_backend_bytes: Gauge = "etcd_server_quota_backend_bytes", [], NONE,
        "Live bytes that the store may hold before it takes no more writes.";
    quota_physical_bytes: Gauge = "quorate_quota_physical_bytes", [], NONE,
        "Bytes that the store may take from the disk before it takes no more writes.";
    client_requests: CounterVec = "etcd_server_client_requests_total",
        ["type", "client_api_version"], NONE,
        "Calls by kind (unary, stream) and by the API version that the client names.";
    health_success: Counter = "etcd_server_health_success", [], NONE,
        "Requests to /health answered healthy.";
    health_failures: Counter = "etcd_server_health_failures", [], NONE,
        "Requests to /health answered unhealthy.";
    healthcheck: GaugeVec = "etcd_server_healthcheck", ["type", "name"], NONE,
        "Result of the last run of a livez or readyz check: 1 for success, 0 for an error.";
    healthchecks: CounterVec = "etcd_server_healthchecks_total", ["type", "name", "status"], NONE,
        "Runs of livez and readyz checks by result.";

    // Peers. The series of one peer are reached by peer.
    known_peers: GaugeVec = "etcd_network_known_peers", ["Local", "Remote"], NONE,
        "1 for each member of the cluster, 0 for a removed one.";
    active_peers: GaugeVec = "etcd_network_active_peers", ["Local", "Remote"], NONE,
        "Connections of this member to a peer.";
    disconnected_peers: CounterVec = "etcd_network_disconnected_peers_total", ["Local", "Remote"],
        NONE, "Losses of the connection to a peer.";
    peer_sent_bytes: CounterVec = "etcd_network_peer_sent_bytes_total", ["To"], NONE,
        "Bytes of raft messages sent to a peer.";
    peer_received_bytes: CounterVec = "etcd_network_peer_received_bytes_total", ["From"], NONE,
        "Bytes of raft messages received from a peer.";
    peer_sent_failures: CounterVec = "etcd_network_peer_sent_failures_total", ["To"], NONE,
        "Raft messages that could not be sent to a peer.";
    peer_received_failures: CounterVec = "etcd_network_peer_received_failures_total", ["From"],
        NONE, "Raft messages from an address that could not be taken in.";
    peer_round_trip: HistogramVec = "etcd_network_peer_round_trip_time_seconds", ["To"],
        exponential(0.0001, 2.0, 16), "Round trip of a probe to a peer.";
    snapshot_send_success: CounterVec = "etcd_network_snapshot_send_success", ["To"], NONE,
        "Snapshots sent to a peer.";
    snapshot_send_failures: CounterVec = "etcd_network_snapshot_send_failures", ["To"], NONE,
        "Snapshots that could not be sent to a peer.";
    snapshot_send_inflights: GaugeVec = "etcd_network_snapshot_send_inflights_total", ["To"], NONE,
        "Snapshots being sent to a peer now.";
    snapshot_send_seconds: HistogramVec = "etcd_network_snapshot_send_total_duration_seconds",
        ["To"], transfer(), "Time to send a whole snapshot.";
    snapshot_receive_success: CounterVec = "etcd_network_snapshot_receive_success", ["From"], NONE,
        "Snapshots received from a peer.";
    snapshot_receive_failures: CounterVec = "etcd_network_snapshot_receive_failures", ["From"],
        NONE, "Snapshots from a peer that could not be received.";
    snapshot_receive_inflights: GaugeVec = "etcd_network_snapshot_receive_inflights_total",
        ["From"], NONE, "Snapshots being received from a peer now.";
    snapshot_receive_seconds: HistogramVec =
        "etcd_network_snapshot_receive_total_duration_seconds", ["From"], transfer(),
        "Time to receive a whole snapshot.";
    client_sent_bytes: Counter = "etcd_network_client_grpc_sent_bytes_total", [], NONE,
        "Bytes of gRPC messages sent to clients.";
    client_received_bytes: Counter = "etcd_network_client_grpc_received_bytes_total", [], NONE,
        "Bytes of gRPC messages received from clients.";
    stream_failures: CounterVec = "etcd_network_server_stream_failures_total", ["Type", "API"],
        NONE, "Failures to send or receive on a stream of the watch or lease-keepalive API.";

    // Disk.
    wal_fsync_seconds: Histogram = "etcd_disk_wal_fsync_duration_seconds", [], disk(),
        "Time of a WAL fdatasync.";
    wal_write_seconds: Histogram = "etcd_disk_wal_write_duration_seconds", [], disk(),
        "Time of a WAL write call.";
    wal_write_bytes: Gauge = "etcd_disk_wal_write_bytes_total", [], NONE,
        "Bytes written to the WAL.";
    backend_commit_seconds: Histogram = "etcd_disk_backend_commit_duration_seconds", [], disk(),
        "Time of a commit of the storage engine.";
    backend_defrag_seconds: Histogram = "etcd_disk_backend_defrag_duration_seconds", [],
        exponential(0.1, 2.0, 13), "Time of a defragmentation.";
    backend_snapshot_seconds: Histogram = "etcd_disk_backend_snapshot_duration_seconds", [],
        exponential(0.01, 2.0, 17), "Time to stream a snapshot out of the storage engine.";
    defrag_inflight: Gauge = "etcd_disk_defrag_inflight", [], NONE,
        "1 during a defragmentation, else 0.";
    snap_fsync_seconds: Histogram = "etcd_snap_fsync_duration_seconds", [], disk(),
        "Time of the fsync of a .snap file.";
    snap_db_fsync_seconds: Histogram = "etcd_snap_db_fsync_duration_seconds", [], disk(),
        "Time of the fsync of a .snap.db file.";
    snap_db_save_seconds: Histogram = "etcd_snap_db_save_total_duration_seconds", [], transfer(),
        "Time to receive and save a .snap.db file.";
    snap_marshal_seconds: Histogram = "etcd_debugging_snap_save_marshalling_duration_seconds", [],
        disk(), "Time to encode a .snap file.";
    snap_save_seconds: Histogram = "etcd_debugging_snap_save_total_duration_seconds", [], disk(),
        "Time to encode and save a .snap file.";
    commit_rebalance_seconds: Histogram =
        "etcd_debugging_disk_backend_commit_rebalance_duration_seconds", [], disk(),
        "Time that a commit spends merging pages (engine bbolt).";
    commit_spill_seconds: Histogram = "etcd_debugging_disk_backend_commit_spill_duration_seconds",
        [], disk(), "Time that a commit spends laying out pages (engine bbolt).";
    commit_write_seconds: Histogram = "etcd_debugging_disk_backend_commit_write_duration_seconds",
        [], disk(), "Time that a commit spends writing pages (engine bbolt).";

    // The store.
    mvcc_range: Counter = "etcd_mvcc_range_total", [], NONE, "Ranges read.";
    mvcc_put: Counter = "etcd_mvcc_put_total", [], NONE, "Keys put.";
    mvcc_delete: Counter = "etcd_mvcc_delete_total", [], NONE, "Ranges deleted.";
    mvcc_txn: Counter = "etcd_mvcc_txn_total", [], NONE,
        "Transactions of more than one operation.";
    db_size: Gauge = "etcd_mvcc_db_total_size_in_bytes", [], NONE,
        "Bytes that the storage engine occupies.";
    db_size_in_use: Gauge = "etcd_mvcc_db_total_size_in_use_in_bytes", [], NONE,
        "Bytes of the storage engine that hold data; the rest is free for reuse.";
    db_open_read_txns: Gauge = "etcd_mvcc_db_open_read_transactions", [], NONE,
        "Open read views of the storage engine.";
    hash_seconds: Histogram = "etcd_mvcc_hash_duration_seconds", [], exponential(0.01, 2.0, 15),
        "Time to hash the whole store.";
    hash_rev_seconds: Histogram = "etcd_mvcc_hash_rev_duration_seconds", [],
        exponential(0.01, 2.0, 15), "Time to hash the store up to a revision.";
    keys: Gauge = "etcd_debugging_mvcc_keys_total", [], NONE, "Live keys.";
    watch_streams: Gauge = "etcd_debugging_mvcc_watch_stream_total", [], NONE,
        "Open watch streams.";
    watchers: Gauge = "etcd_debugging_mvcc_watcher_total", [], NONE, "Watchers.";
    slow_watchers: Gauge = "etcd_debugging_mvcc_slow_watcher_total", [], NONE,
        "Watchers that are unsynced: behind the store's revision.";
    events: Counter = "etcd_debugging_mvcc_events_total", [], NONE, "Events sent to watchers.";
    pending_events: Gauge = "etcd_debugging_mvcc_pending_events_total", [], NONE,
        "Events that wait to be sent.";
    index_compaction_pause_ms: Histogram =
        "etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds", [],
        exponential(0.5, 2.0, 14), "Pause that compaction of the key index causes.";
    db_compaction_pause_ms: Histogram =
        "etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds", [],
        exponential(1.0, 2.0, 13), "Pause that one slice of a compaction causes.";
    db_compaction_ms: Histogram = "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds",
        [], exponential(100.0, 2.0, 14), "Time of a whole compaction.";
    db_compaction_last: Gauge = "etcd_debugging_mvcc_db_compaction_last", [], NONE,
        "Unix time of the last compaction, 0 if there was none since the start.";
    db_compaction_keys: Counter = "etcd_debugging_mvcc_db_compaction_keys_total", [], NONE,
        "Revisions that compaction removed.";
    current_revision: Gauge = "etcd_debugging_mvcc_current_revision", [], NONE,
        "Revision of the store.";
    compact_revision: Gauge = "etcd_debugging_mvcc_compact_revision", [], NONE,
        "Revision up to which the store is compacted, -1 if it never was.";
    total_put_size: Gauge = "etcd_debugging_mvcc_total_put_size_in_bytes", [], NONE,
        "Bytes of all keys and values put.";
    auth_revision: Gauge = "etcd_debugging_auth_revision", [], NONE,
        "Revision of the auth store.";
    alarms: GaugeVec = "etcd_debugging_server_alarms", ["server_id", "alarm_type"], NONE,
        "1 for an active alarm.";

    // Leases and watch streams.
    lease_granted: Counter = "etcd_debugging_lease_granted_total", [], NONE, "Leases granted.";
    lease_revoked: Counter = "etcd_debugging_lease_revoked_total", [], NONE, "Leases revoked.";
    lease_renewed: Counter = "etcd_debugging_lease_renewed_total", [], NONE,
        "Leases renewed while this member led.";
    lease_ttl_seconds: Histogram = "etcd_debugging_lease_ttl_total", [],
        exponential(1.0, 2.0, 24), "TTLs of granted leases in seconds.";
    lease_expired: Counter = "etcd_debugging_server_lease_expired_total", [], NONE,
        "Expired leases that were revoked.";
    watch_loop_stream_seconds: Histogram =
        "etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds", [], disk(),
        "Time to send one watch response.";
    watch_loop_event_seconds: Histogram =
        "etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds", [], disk(),
        "Time to send one watch response, divided by its events.";
    watch_loop_control_seconds: Histogram =
        "etcd_debugging_server_watch_send_loop_control_stream_duration_seconds", [], disk(),
        "Time to send one created or canceled response.";
    watch_loop_progress_seconds: Histogram =
        "etcd_debugging_server_watch_send_loop_progress_duration_seconds", [], disk(),
        "Time to send one progress notification.";

    // The v2 store and the proxy: on the page of every etcd.
    store_reads: CounterVec = "etcd_debugging_store_reads_total", ["action"], NONE,
        "Reads of the v2 store.";
    store_writes: CounterVec = "etcd_debugging_store_writes_total", ["action"], NONE,
        "Writes to the v2 store.";
    store_expires: Counter = "etcd_debugging_store_expires_total", [], NONE,
        "Keys of the v2 store that expired.";
    store_watch_requests: Counter = "etcd_debugging_store_watch_requests_total", [], NONE,
        "Watches of the v2 store that were asked for.";
    store_watchers: Gauge = "etcd_debugging_store_watchers", [], NONE,
        "Watchers of the v2 store.";
    proxy_watchers_coalescing: Gauge = "etcd_grpc_proxy_watchers_coalescing_total", [], NONE,
        "Watchers of the gRPC proxy that share a stream.";
    proxy_events_coalescing: Counter = "etcd_grpc_proxy_events_coalescing_total", [], NONE,
        "Events that the gRPC proxy did not have to receive again.";
    proxy_cache_keys: Gauge = "etcd_grpc_proxy_cache_keys_total", [], NONE,
        "Answers in the gRPC proxy's cache.";
    proxy_cache_hits: Gauge = "etcd_grpc_proxy_cache_hits_total", [], NONE,
        "Requests that the gRPC proxy's cache answered.";
    proxy_cache_misses: Gauge = "etcd_grpc_proxy_cache_misses_total", [], NONE,
        "Requests that the gRPC proxy's cache could not answer.";

    // gRPC. One call is counted by GrpcCall.
    grpc_started: CounterVec = "grpc_server_started_total",
        ["grpc_type", "grpc_service", "grpc_method"], NONE, "Calls started.";
    grpc_handled: CounterVec = "grpc_server_handled_total",
        ["grpc_type", "grpc_service", "grpc_method", "grpc_code"], NONE,
        "Calls finished, by status code.";
    grpc_received: CounterVec = "grpc_server_msg_received_total",
        ["grpc_type", "grpc_service", "grpc_method"], NONE, "Messages received in calls.";
    grpc_sent: CounterVec = "grpc_server_msg_sent_total",
        ["grpc_type", "grpc_service", "grpc_method"], NONE, "Messages sent in calls.";
    grpc_handling_seconds: HistogramVec = "grpc_server_handling_seconds",
        ["grpc_type", "grpc_service", "grpc_method"], GRPC_SECONDS,
        "Time from the start of a call to its end (metrics=extensive).";

    // The scrape itself.
    scrapes: CounterVec = "promhttp_metric_handler_requests_total", ["code"], NONE,
        "Scrapes by HTTP status.";
    scrapes_in_flight: Gauge = "promhttp_metric_handler_requests_in_flight", [], NONE,
        "Scrapes being answered now.";

    // The process; read from the system by render.
    fd_used: Gauge = "os_fd_used", [], NONE, "Open file descriptors.";
    fd_limit: Gauge = "os_fd_limit", [], NONE, "File descriptors that may be open.";
    process_cpu_seconds: FloatCounter = "process_cpu_seconds_total", [], NONE,
        "CPU time, user and system.";
    process_open_fds: Gauge = "process_open_fds", [], NONE, "Open file descriptors.";
    process_max_fds: Gauge = "process_max_fds", [], NONE, "File descriptors that may be open.";
    process_resident_bytes: Gauge = "process_resident_memory_bytes", [], NONE,
        "Memory in RAM.";
    process_virtual_bytes: Gauge = "process_virtual_memory_bytes", [], NONE,
        "Address space in use.";
    process_virtual_max_bytes: Gauge = "process_virtual_memory_max_bytes", [], NONE,
        "Address space that may be used.";
    process_start_time: Gauge = "process_start_time_seconds", [], NONE,
        "Unix time of the start.";
    process_network_received: FloatCounter = "process_network_receive_bytes_total", [], NONE,
        "Bytes that the network namespace of the process received over IP.";
    process_network_sent: FloatCounter = "process_network_transmit_bytes_total", [], NONE,
        "Bytes that the network namespace of the process sent over IP.";
    threads: Gauge = "go_threads", [], NONE, "Threads of the operating system.";

    // Ours.
    wal_batch_entries: Histogram = "quorate_wal_batch_entries", [], exponential(1.0, 2.0, 14),
        "Entries that one WAL fdatasync made durable.";
    overlay_writes: Gauge = "quorate_overlay_writes", [], NONE,
        "Writes that are applied but not yet in a commit of the storage engine.";
    applier_queue: Gauge = "quorate_applier_queue", [], NONE,
        "Committed entries that wait to be applied.";
    connections_closed_for_room: Counter = "quorate_connections_closed_for_room_total", [], NONE,
        "Client connections closed because they held up memory, calls or descriptors that others needed.";
    engine_info: GaugeVec = "quorate_engine_info", ["engine"], NONE,
        "1 for the storage engine in use.";
    tls_certificate_expiry: GaugeVec = "quorate_tls_certificate_expiry_timestamp_seconds",
        ["side", "use"], NONE,
        "Unix time at which a certificate of this member ends; side is client or peer, use is server \
         for the one shown to who connects, client for the one shown when dialling.";
    tls_reloads: CounterVec = "quorate_tls_reloads_total", ["side", "file", "result"], NONE,
        "Files of TLS that changed and were read again; result is done or failed.";
    tls_handshakes: CounterVec = "quorate_tls_handshakes_total", ["side", "result"], NONE,
        "TLS handshakes with who connected; result is done, failed or cut_off.";
}

impl Metrics {
    /// A set of its own, apart from [`Metrics::global`]. Everything that etcd shows at start as zero
    /// is there.
    #[allow(clippy::new_without_default, reason = "a process has one: see global")]
    pub fn new() -> Self {
        let metrics = Metrics::registered();
        for code in ["200", "500", "503"] {
            metrics.scrapes.with(&[code]).increment(0);
        }
        metrics.touch_grpc();
        metrics
    }

    /// The process's own set, which is also the recorder of the `metrics` facade's macros.
    ///
    /// # Panics
    /// At the first call, if something else has installed a recorder.
    pub fn global() -> &'static Metrics {
        static GLOBAL: OnceLock<Metrics> = OnceLock::new();
        GLOBAL.get_or_init(|| {
            let metrics = Metrics::new();
            metrics::set_global_recorder(metrics.registry.clone())
                .expect("no other recorder is installed");
            metrics
        })
    }

    /// The page of `/metrics` in Prometheus' text format 0.0.4, sorted as etcd's is. Reads a few
    /// files of /proc first; takes well under a millisecond.
    pub fn render(&self) -> String {
        self.refresh_process();
        self.registry.render()
    }

    /// `etcd_server_request_duration_seconds` of one kind of request.
    pub fn request_seconds(&self, kind: RequestKind, success: bool) -> &Histogram {
        self.requests.get(kind, success, || {
            self.request_duration.with(&[kind.request_type(), flag(success)])
        })
    }

    /// `etcd_server_apply_duration_seconds` of one kind of entry. As in etcd, an entry that asks for
    /// a compacted revision counts as a success.
    pub fn apply_seconds(&self, kind: RequestKind, success: bool) -> &Histogram {
        self.applies.get(kind, success, || {
            self.apply_duration.with(&["v3", kind.apply_op(), flag(success)])
        })
    }

    /// `etcd_server_range_duration_seconds`.
    pub fn range_seconds(&self, success: bool) -> &Histogram {
        self.ranges[usize::from(success)].get_or_init(|| self.range_duration.with(&[flag(success)]))
    }

    /// Counts the operations that a transaction has executed, nested ones included; the transaction
    /// itself counts, as in etcd, if there was more than one.
    pub fn count_txn(&self, reply: &pb::TxnResponse) {
        #[derive(Default)]
        struct Done {
            ranges: u64,
            puts: u64,
            deletes: u64,
        }
        fn gather(reply: &pb::TxnResponse, done: &mut Done) {
            for op in &reply.responses {
                match &op.response {
                    Some(OpResponse::ResponseRange(_)) => done.ranges += 1,
                    Some(OpResponse::ResponsePut(_)) => done.puts += 1,
                    Some(OpResponse::ResponseDeleteRange(_)) => done.deletes += 1,
                    Some(OpResponse::ResponseTxn(nested)) => gather(nested, done),
                    None => {}
                }
            }
        }
        let mut done = Done::default();
        gather(reply, &mut done);
        for (counter, count) in [
            (&self.mvcc_range, done.ranges),
            (&self.mvcc_put, done.puts),
            (&self.mvcc_delete, done.deletes),
            (&self.mvcc_txn, u64::from(done.ranges + done.puts + done.deletes > 1)),
        ] {
            if count > 0 {
                counter.increment(count);
            }
        }
    }

    /// Counts one call in `etcd_server_client_requests_total`. `version` is the call's
    /// `client-api-version`, if it has one; after [`CLIENT_VERSIONS_MAX`] different ones, which no
    /// set of real clients has, new ones count as unknown, as does one of more than
    /// [`CLIENT_VERSION_LENGTH_MAX`] bytes.
    pub fn count_client_request(&self, stream: bool, version: Option<&str>) {
        let slot = usize::from(stream);
        let kind = if stream { "stream" } else { "unary" };
        let unknown = || {
            self.clients.unknown[slot].get_or_init(|| self.client_requests.with(&[kind, "unknown"]))
        };
        let is_kept = |v: &&str| *v != "unknown" && v.len() <= CLIENT_VERSION_LENGTH_MAX;
        let Some(version) = version.filter(is_kept) else {
            return unknown().increment(1);
        };
        if let Some(counters) = self.clients.known.read().get(version)
            && let Some(counter) = counters[slot].get()
        {
            return counter.increment(1);
        }
        let mut known = self.clients.known.write();
        if known.len() >= CLIENT_VERSIONS_MAX && !known.contains_key(version) {
            return unknown().increment(1);
        }
        let counters = known.entry(version.into()).or_default();
        counters[slot].get_or_init(|| self.client_requests.with(&[kind, version])).increment(1);
    }

    /// The series of one peer, all touched. IDs are in hex, as everywhere on the page.
    pub fn peer(&self, local: &str, remote: &str) -> PeerMetrics {
        PeerMetrics {
            active: self.active_peers.with(&[local, remote]),
            disconnected: self.disconnected_peers.with(&[local, remote]),
            sent_bytes: self.peer_sent_bytes.with(&[remote]),
            received_bytes: self.peer_received_bytes.with(&[remote]),
            sent_failures: self.peer_sent_failures.with(&[remote]),
            round_trip_seconds: self.peer_round_trip.with(&[remote]),
        }
    }
}

/// What is counted about one peer; made once by [`Metrics::peer`] and kept.
#[derive(Clone)]
pub struct PeerMetrics {
    pub active: Gauge,
    pub disconnected: Counter,
    pub sent_bytes: Counter,
    pub received_bytes: Counter,
    pub sent_failures: Counter,
    pub round_trip_seconds: Histogram,
}

/// Most values of `client_api_version`: the text comes from outside.
pub const CLIENT_VERSIONS_MAX: usize = 100;

/// The longest of them that is kept: it stays in memory, and on each scraped page, for good.
pub const CLIENT_VERSION_LENGTH_MAX: usize = 64;

/// By `stream as usize`.
type ClientCounters = [OnceLock<Counter>; 2];

#[derive(Default)]
struct ClientTable {
    unknown: ClientCounters,
    known: RwLock<FxHashMap<Box<str>, ClientCounters>>,
}

fn flag(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

/// Histograms by kind of request and success. A series appears with its first sample, as in etcd.
struct KindTable([[OnceLock<Histogram>; 2]; RequestKind::ALL.len()]);

impl Default for KindTable {
    fn default() -> Self {
        KindTable(std::array::from_fn(|_| Default::default()))
    }
}

impl KindTable {
    fn get(
        &self,
        kind: RequestKind,
        success: bool,
        make: impl FnOnce() -> Histogram,
    ) -> &Histogram {
        self.0[kind as usize][usize::from(success)].get_or_init(make)
    }
}

macro_rules! request_kinds {
    ($($kind:ident)*) => {
        /// The kind of a request or log entry: etcd's name of the request's field in
        /// `InternalRaftRequest`, and three that stand for what is not in the log.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum RequestKind {
            $($kind,)*
        }

        impl RequestKind {
            /// Every kind, in the order of declaration.
            pub const ALL: &[RequestKind] = &[$(RequestKind::$kind,)*];

            /// The label `type` of `etcd_server_request_duration_seconds`.
            pub const fn request_type(self) -> &'static str {
                match self {
                    $(RequestKind::$kind => stringify!($kind),)*
                }
            }
        }
    };
}

request_kinds! {
    Range ReadonlyTxn Put DeleteRange Txn Compaction
    LeaseGrant LeaseRevoke LeaseCheckpoint Alarm
    AuthEnable AuthDisable AuthStatus Authenticate
    AuthUserAdd AuthUserDelete AuthUserGet AuthUserChangePassword AuthUserGrantRole
    AuthUserRevokeRole AuthUserList
    AuthRoleAdd AuthRoleDelete AuthRoleGet AuthRoleGrantPermission AuthRoleRevokePermission
    AuthRoleList
    ClusterVersionSet ClusterMemberAttrSet DowngradeInfoSet DowngradeVersionTest
    Unknown
}

impl RequestKind {
    /// The kind of the log entry whose request has this name.
    pub fn of(name: &str) -> Self {
        let named = |kind: &&RequestKind| kind.request_type() == name;
        Self::ALL.iter().find(named).copied().unwrap_or(RequestKind::Unknown)
    }

    /// The label `op` of `etcd_server_apply_duration_seconds`: there etcd writes `unknown` small,
    /// and has no name for AuthStatus.
    pub const fn apply_op(self) -> &'static str {
        match self {
            RequestKind::AuthStatus | RequestKind::Unknown => "unknown",
            kind => kind.request_type(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_apply_of_unknown_kind_is_written_small_and_auth_status_has_no_name() {
        let metrics = Metrics::new();
        metrics.request_seconds(RequestKind::Unknown, true).record(0.5);
        metrics.request_seconds(RequestKind::AuthStatus, true).record(0.5);
        metrics.apply_seconds(RequestKind::AuthStatus, false).record(0.5);
        metrics.apply_seconds(RequestKind::Put, true).record(0.5);
        metrics.apply_seconds(RequestKind::Put, true).record(0.5);
        metrics.range_seconds(true).record(0.5);
        let page = metrics.render();
        for line in [
            "etcd_server_request_duration_seconds_count{success=\"true\",type=\"Unknown\"} 1",
            "etcd_server_request_duration_seconds_count{success=\"true\",type=\"AuthStatus\"} 1",
            "etcd_server_apply_duration_seconds_count{op=\"unknown\",success=\"false\",version=\"v3\"} 1",
            "etcd_server_apply_duration_seconds_count{op=\"Put\",success=\"true\",version=\"v3\"} 2",
            "etcd_server_range_duration_seconds_count{success=\"true\"} 1",
        ] {
            assert!(page.lines().any(|l| l == line), "{line}");
        }
    }

    #[test]
    fn clients_cannot_fill_the_page_with_versions() {
        let metrics = Metrics::new();
        for i in 0..CLIENT_VERSIONS_MAX + 5 {
            metrics.count_client_request(false, Some(&format!("9.{i}")));
        }
        metrics.count_client_request(false, Some("9.0"));
        metrics.count_client_request(true, Some("9.0"));
        metrics.count_client_request(true, None);
        metrics.count_client_request(true, Some("unknown"));
        let long = "3".repeat(CLIENT_VERSION_LENGTH_MAX + 1);
        metrics.count_client_request(true, Some(&long));
        let page = metrics.render();
        let name = "etcd_server_client_requests_total";
        for line in [
            format!("{name}{{client_api_version=\"9.0\",type=\"unary\"}} 2"),
            format!("{name}{{client_api_version=\"9.0\",type=\"stream\"}} 1"),
            format!("{name}{{client_api_version=\"unknown\",type=\"unary\"}} 5"),
            format!("{name}{{client_api_version=\"unknown\",type=\"stream\"}} 3"),
        ] {
            assert!(page.lines().any(|l| l == line), "{line}");
        }
    }

    #[test]
    fn the_series_of_a_peer_are_there_before_anything_happens() {
        let metrics = Metrics::new();
        let peer = metrics.peer("a", "b");
        peer.sent_bytes.increment(7);
        let page = metrics.render();
        for line in [
            "etcd_network_active_peers{Local=\"a\",Remote=\"b\"} 0",
            "etcd_network_disconnected_peers_total{Local=\"a\",Remote=\"b\"} 0",
            "etcd_network_peer_sent_bytes_total{To=\"b\"} 7",
            "etcd_network_peer_received_bytes_total{From=\"b\"} 0",
            "etcd_network_peer_sent_failures_total{To=\"b\"} 0",
            "etcd_network_peer_round_trip_time_seconds_count{To=\"b\"} 0",
        ] {
            assert!(page.lines().any(|l| l == line), "{line}");
        }
    }

    #[test]
    fn the_global_set_takes_what_the_macros_of_the_facade_count() {
        let metrics = Metrics::global();
        metrics::counter!("quorate_test_macro_total").increment(3);
        assert!(metrics.render().contains("\nquorate_test_macro_total 3\n"));
        assert!(std::ptr::eq(metrics, Metrics::global()));
    }
}
