//! The table of all flags: names, forms, places, help. Everything else about flags follows from it.

use super::Config;
use super::slot::Slot;
use super::types::words;

/// One flag, with the variable and the file's key that stand for the same setting.
pub struct Flag {
    /// Without dashes.
    pub name: &'static str,
    pub group: Group,
    key: Key,
    /// Where the value goes.
    pub slot: fn(&mut Config) -> Slot<'_>,
    /// For `--help`: unit, what 0 or empty means, risk.
    pub help: &'static str,
}

/// The key of a setting in a configuration file.
enum Key {
    /// As the flag.
    Same,
    /// Sections and key, with dots between them.
    At(&'static str),
    /// It cannot be set in a file.
    None,
}

words! {
    /// The parts of `--help`.
    Group {
        Member = "Member and storage",
        Clustering = "Clustering",
        Security = "Security",
        PeerSecurity = "Security between members",
        Auth = "Authentication",
        Observe = "Logging, metrics, tracing",
        Checks = "Consistency, compaction, unsafe",
        Process = "Process",
        /// Settings that etcd has not.
        Own = "Quorate",
    }
}

impl Flag {
    /// The environment variable.
    pub fn env(&self) -> String {
        let prefix = match self.group {
            Group::Own => OWN_PREFIX,
            _ => ETCD_PREFIX,
        };
        format!("{prefix}{}", self.name.to_ascii_uppercase().replace('-', "_"))
    }

    /// Sections and key in a configuration file, with dots between them.
    pub fn key(&self) -> Option<&'static str> {
        match self.key {
            Key::Same => Some(self.name),
            Key::At(key) => Some(key),
            Key::None => None,
        }
    }

    /// Whether the value must not be shown.
    pub fn is_secret(&self) -> bool {
        self.name == "discovery-password"
    }
}

/// What etcd's variables begin with.
pub const ETCD_PREFIX: &str = "ETCD_";
/// What the variables of our own settings begin with.
pub const OWN_PREFIX: &str = "QUORATE_";

/// The flag of this name.
pub fn find(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}

/// Flags of long ago that are still taken and do nothing. They have no value, or one behind `=`.
pub const IGNORED: &[&str] = &[
    "cluster-active-size",
    "cluster-remove-delay",
    "cluster-sync-interval",
    "config",
    "force",
    "max-result-buffer",
    "max-retry-attempts",
    "peer-heartbeat-interval",
    "peer-election-timeout",
    "retry-interval",
    "snapshot",
    "v",
    "vv",
    "test.coverprofile",
    "test.outputdir",
];

/// Flags whose use is warned of.
pub const DEPRECATED: &[(&str, &str)] = &[
    ("max-snapshots", "--max-snapshots is deprecated since v3.6 and is to go in v3.8"),
    ("v2-deprecation", "--v2-deprecation is deprecated, is without effect and is to go in v3.8"),
];

/// A setting that only a configuration file can hold.
pub struct FileOnly {
    /// Sections and key, with dots between them.
    pub key: &'static str,
    /// Where the value goes.
    pub slot: fn(&mut Config) -> Slot<'_>,
}

/// Settings without a flag.
pub const FILE_ONLY: &[FileOnly] = &[
    FileOnly {
        key: "discovery-config.client.max-request-bytes",
        slot: |c| Slot::Int(&mut c.discovery.max_request_bytes),
    },
    FileOnly {
        key: "discovery-config.client.max-recv-bytes",
        slot: |c| Slot::Int(&mut c.discovery.max_recv_bytes),
    },
    FileOnly {
        key: "discovery-config.client.auth.token",
        slot: |c| Slot::Text(&mut c.discovery.auth_token),
    },
    FileOnly {
        key: "client-transport-security.allowed-cn",
        slot: |c| Slot::List(&mut c.client_tls.allowed_cn),
    },
    FileOnly {
        key: "client-transport-security.skip-client-san-verification",
        slot: |c| Slot::Bool(&mut c.client_tls.skip_client_san_verification),
    },
];

const CLUSTER_STATES: &[&str] = &["new", "existing"];
const FALLBACKS: &[&str] = &["exit", "proxy"];
const V2_STAGES: &[&str] = &["write-only", "write-only-skip-check", "write-only-drop-data", "gone"];

const fn flag(
    name: &'static str,
    group: Group,
    key: Key,
    slot: fn(&mut Config) -> Slot<'_>,
    help: &'static str,
) -> Flag {
    Flag { name, group, key, slot, help }
}

/// Every flag: etcd's 113, then ours.
#[rustfmt::skip] // one line a flag
pub const FLAGS: &[Flag] = &[
    flag("name", Group::Member, Key::Same, |c| Slot::Text(&mut c.member.name), "Name of this member, for people; it must be that of its own entry in --initial-cluster."),
    flag("data-dir", Group::Member, Key::Same, |c| Slot::Path(&mut c.given.data_dir), "Directory for everything this member keeps. Empty: <name>.etcd in the working directory."),
    flag("wal-dir", Group::Member, Key::Same, |c| Slot::Path(&mut c.given.wal_dir), "Separate directory (best a disk of its own) for the write-ahead log. Empty: member/wal below the data directory."),
    flag("snapshot-count", Group::Member, Key::Same, |c| Slot::Uint(&mut c.raft.snapshot_count), "Applied entries between two raft snapshots on disk; 0 stands for the default."),
    flag("snapshot-catchup-entries", Group::Member, Key::Same, |c| Slot::Uint(&mut c.raft.snapshot_catchup_entries), "Raft log entries kept in memory for followers that lag; 0 stands for the default."),
    flag("heartbeat-interval", Group::Member, Key::Same, |c| Slot::Uint(&mut c.raft.heartbeat_ms), "Time between heartbeats, in milliseconds, in a file too."),
    flag("election-timeout", Group::Member, Key::Same, |c| Slot::Uint(&mut c.raft.election_ms), "Time without a leader before an election, in milliseconds, in a file too; at least 5 heartbeats, at most 50000."),
    flag("initial-election-tick-advance", Group::Member, Key::Same, |c| Slot::Bool(&mut c.raft.initial_election_tick_advance), "Skip most of the first election wait after a start."),
    flag("pre-vote", Group::Member, Key::Same, |c| Slot::Bool(&mut c.raft.pre_vote), "Ask whether an election could be won before standing for it."),
    flag("listen-peer-urls", Group::Member, Key::Same, |c| Slot::Urls(&mut c.listen.peer_urls), "Addresses on which other members are served."),
    flag("listen-client-urls", Group::Member, Key::Same, |c| Slot::Urls(&mut c.listen.client_urls), "Addresses on which clients are served: gRPC, and HTTP too unless --listen-client-http-urls is set."),
    flag("listen-client-http-urls", Group::Member, Key::Same, |c| Slot::Urls(&mut c.listen.client_http_urls), "Addresses for HTTP alone; --listen-client-urls then serve gRPC alone."),
    flag("listen-metrics-urls", Group::Member, Key::Same, |c| Slot::Urls(&mut c.listen.metrics_urls), "Further addresses for metrics and health alone."),
    flag("max-snapshots", Group::Member, Key::Same, |c| Slot::Uint(&mut c.raft.max_snapshots), "Raft snapshot files kept; 0 keeps all."),
    flag("max-wals", Group::Member, Key::Same, |c| Slot::Uint(&mut c.raft.max_wals), "Write-ahead log files kept; 0 keeps all."),
    flag("quota-backend-bytes", Group::Member, Key::Same, |c| Slot::Int(&mut c.given.quota_bytes), "Live bytes in the backend at which writes are refused until space is made; 0 stands for the default, less than 0 for no limit."),
    flag("backend-bbolt-freelist-type", Group::Member, Key::Same, |c| Slot::Text(&mut c.storage.freelist_type), "How a bbolt file keeps its free pages: map or array."),
    flag("backend-batch-interval", Group::Member, Key::Same, |c| Slot::Duration(&mut c.storage.batch_interval), "Longest wait before a batch is committed to the engine; 0 stands for the default."),
    flag("backend-batch-limit", Group::Member, Key::Same, |c| Slot::Int(&mut c.given.batch_limit), "Most operations in a batch; 0 stands for the default."),
    flag("memory-mlock", Group::Member, Key::Same, |c| Slot::Bool(&mut c.storage.memory_mlock), "Keep the engine's pages in memory, so that they are never swapped out."),
    flag("max-txn-ops", Group::Member, Key::Same, |c| Slot::Uint(&mut c.limits.max_txn_ops), "Most operations in a transaction."),
    flag("max-request-bytes", Group::Member, Key::Same, |c| Slot::Uint(&mut c.limits.max_request_bytes), "Largest request that raft takes, in bytes."),
    flag("max-concurrent-streams", Group::Member, Key::Same, |c| Slot::Uint32(&mut c.listen.max_concurrent_streams), "Most HTTP/2 streams in a client's connection; the default, etcd's for no limit, stands for 16384."),
    flag("grpc-keepalive-min-time", Group::Member, Key::Same, |c| Slot::Duration(&mut c.listen.keepalive_min_time), "A client that pings more often than this is disconnected."),
    flag("grpc-keepalive-interval", Group::Member, Key::Same, |c| Slot::Duration(&mut c.listen.keepalive_interval), "Idle time after which a client is pinged; 0 never pings."),
    flag("grpc-keepalive-timeout", Group::Member, Key::Same, |c| Slot::Duration(&mut c.listen.keepalive_timeout), "Wait for the answer to a ping before the connection is closed; 0 never closes it."),
    flag("socket-reuse-port", Group::Member, Key::At("socket-options.reuse-port"), |c| Slot::Bool(&mut c.listen.reuse_port), "Set SO_REUSEPORT on listeners, so that several processes can share a port."),
    flag("socket-reuse-address", Group::Member, Key::At("socket-options.reuse-address"), |c| Slot::Bool(&mut c.listen.reuse_address), "Set SO_REUSEADDR on listeners, so that a port can be taken while old connections linger."),
    flag("enable-grpc-gateway", Group::Member, Key::Same, |c| Slot::Bool(&mut c.listen.grpc_gateway), "Serve the API as JSON below /v3/."),
    flag("raft-read-timeout", Group::Member, Key::None, |c| Slot::Duration(&mut c.raft.read_timeout), "Deadline of a read from another member; less than 5s counts as 5s."),
    flag("raft-write-timeout", Group::Member, Key::None, |c| Slot::Duration(&mut c.raft.write_timeout), "Deadline of a write to another member; less than 5s counts as 5s."),
    flag("feature-gates", Group::Member, Key::Same, |c| Slot::Gates(&mut c.gates), "Features to switch on or off by name."),
    flag("initial-advertise-peer-urls", Group::Clustering, Key::Same, |c| Slot::Urls(&mut c.cluster.advertise_peer_urls), "Peer addresses of this member that the others are told."),
    flag("initial-cluster", Group::Clustering, Key::Same, |c| Slot::Text(&mut c.given.initial_cluster), "Members of a new cluster, as name=URL with commas."),
    flag("initial-cluster-state", Group::Clustering, Key::Same, |c| Slot::Choice(&mut c.given.initial_cluster_state, CLUSTER_STATES), "new to found a cluster, existing to join one; without meaning once there is data."),
    flag("initial-cluster-token", Group::Clustering, Key::Same, |c| Slot::Text(&mut c.cluster.token), "Keeps clusters apart that are founded with equal addresses."),
    flag("advertise-client-urls", Group::Clustering, Key::Same, |c| Slot::Urls(&mut c.cluster.advertise_client_urls), "Client addresses of this member that the cluster publishes."),
    flag("strict-reconfig-check", Group::Clustering, Key::Same, |c| Slot::Bool(&mut c.cluster.strict_reconfig_check), "Refuse membership changes that would lose the quorum."),
    flag("max-learners", Group::Clustering, Key::Same, |c| Slot::Int(&mut c.cluster.max_learners), "Most learners in the cluster at one time."),
    flag("discovery-token", Group::Clustering, Key::At("discovery-config.token"), |c| Slot::Text(&mut c.discovery.token), "Name of the new cluster at the discovery service."),
    flag("discovery-endpoints", Group::Clustering, Key::At("discovery-config.client.endpoints"), |c| Slot::UniqueList(&mut c.discovery.endpoints), "Addresses of the cluster that serves discovery."),
    flag("discovery-dial-timeout", Group::Clustering, Key::At("discovery-config.client.dial-timeout"), |c| Slot::Duration(&mut c.discovery.dial_timeout), "Longest wait for a connection to the discovery service."),
    flag("discovery-request-timeout", Group::Clustering, Key::At("discovery-config.client.request-timeout"), |c| Slot::Duration(&mut c.discovery.request_timeout), "Longest wait for an answer of the discovery service."),
    flag("discovery-keepalive-time", Group::Clustering, Key::At("discovery-config.client.keepalive-time"), |c| Slot::Duration(&mut c.discovery.keepalive_time), "Time between pings to the discovery service."),
    flag("discovery-keepalive-timeout", Group::Clustering, Key::At("discovery-config.client.keepalive-timeout"), |c| Slot::Duration(&mut c.discovery.keepalive_timeout), "Wait for the answer to such a ping."),
    flag("discovery-insecure-transport", Group::Clustering, Key::At("discovery-config.client.secure.insecure-transport"), |c| Slot::Bool(&mut c.discovery.insecure_transport), "Speak to the discovery service without TLS."),
    flag("discovery-insecure-skip-tls-verify", Group::Clustering, Key::At("discovery-config.client.secure.insecure-skip-tls-verify"), |c| Slot::Bool(&mut c.discovery.insecure_skip_tls_verify), "Accept any certificate of the discovery service. For tests only."),
    flag("discovery-cert", Group::Clustering, Key::At("discovery-config.client.secure.cert"), |c| Slot::Path(&mut c.discovery.cert), "Client certificate for the discovery service."),
    flag("discovery-key", Group::Clustering, Key::At("discovery-config.client.secure.key"), |c| Slot::Path(&mut c.discovery.key), "Key of that certificate."),
    flag("discovery-cacert", Group::Clustering, Key::At("discovery-config.client.secure.cacert"), |c| Slot::Path(&mut c.discovery.cacert), "Authorities that vouch for the discovery service."),
    flag("discovery-user", Group::Clustering, Key::At("discovery-config.client.auth.username"), |c| Slot::Text(&mut c.discovery.user), "User at the discovery service."),
    flag("discovery-password", Group::Clustering, Key::At("discovery-config.client.auth.password"), |c| Slot::Text(&mut c.discovery.password), "Password of that user."),
    flag("discovery-fallback", Group::Clustering, Key::None, |c| Slot::Choice(&mut c.given.discovery_fallback, FALLBACKS), "What to do when discovery fails; only exit is left."),
    flag("discovery-srv", Group::Clustering, Key::Same, |c| Slot::Text(&mut c.discovery.srv), "DNS domain whose SRV records name the members."),
    flag("discovery-srv-name", Group::Clustering, Key::Same, |c| Slot::Text(&mut c.discovery.srv_name), "Suffix to the service's name in those records."),
    flag("auto-compaction-mode", Group::Clustering, Key::Same, |c| Slot::Text(&mut c.given.compaction_mode), "How --auto-compaction-retention is meant: periodic (time) or revision (count)."),
    flag("auto-compaction-retention", Group::Clustering, Key::Same, |c| Slot::Text(&mut c.given.compaction_retention), "History kept when compacting automatically: hours or a duration, or a count of revisions; 0 never compacts."),
    flag("v2-deprecation", Group::Clustering, Key::Same, |c| Slot::Choices(&mut c.given.v2_deprecation, V2_STAGES), "Without effect."),
    flag("cert-file", Group::Security, Key::At("client-transport-security.cert-file"), |c| Slot::Path(&mut c.client_tls.cert_file), "Certificate shown to clients."),
    flag("key-file", Group::Security, Key::At("client-transport-security.key-file"), |c| Slot::Path(&mut c.client_tls.key_file), "Key of that certificate."),
    flag("client-cert-file", Group::Security, Key::At("client-transport-security.client-cert-file"), |c| Slot::Path(&mut c.client_tls.client_cert_file), "Certificate with which the member calls itself; empty: --cert-file."),
    flag("client-key-file", Group::Security, Key::At("client-transport-security.client-key-file"), |c| Slot::Path(&mut c.client_tls.client_key_file), "Key of that certificate; empty: --key-file."),
    flag("client-cert-auth", Group::Security, Key::At("client-transport-security.client-cert-auth"), |c| Slot::Bool(&mut c.client_tls.client_cert_auth), "Demand certificates of clients and take users from their common names."),
    flag("client-crl-file", Group::Security, Key::None, |c| Slot::Path(&mut c.client_tls.crl_file), "Revoked client certificates (DER or PEM)."),
    flag("client-cert-allowed-hostname", Group::Security, Key::At("client-transport-security.allowed-hostname"), |c| Slot::List(&mut c.client_tls.allowed_hostname), "Host names of which a client certificate must carry one."),
    flag("trusted-ca-file", Group::Security, Key::At("client-transport-security.trusted-ca-file"), |c| Slot::Path(&mut c.client_tls.trusted_ca_file), "Authorities that vouch for clients; demands client certificates."),
    flag("auto-tls", Group::Security, Key::At("client-transport-security.auto-tls"), |c| Slot::Bool(&mut c.client_tls.auto), "Serve clients with a certificate made at the start."),
    flag("tls-min-version", Group::Security, Key::Same, |c| Slot::Text(&mut c.tls.min_version), "Oldest TLS version spoken: TLS1.2 or TLS1.3."),
    flag("tls-max-version", Group::Security, Key::Same, |c| Slot::Text(&mut c.tls.max_version), "Newest TLS version spoken; empty: the newest known."),
    flag("cipher-suites", Group::Security, Key::Same, |c| Slot::List(&mut c.tls.cipher_suites), "TLS 1.2 cipher suites offered; empty: a safe choice."),
    flag("cors", Group::Security, Key::Same, |c| Slot::Origins(&mut c.listen.cors), "Origins whose pages may call from a browser, or *."),
    flag("host-whitelist", Group::Security, Key::Same, |c| Slot::Set(&mut c.listen.host_whitelist), "Host names under which plain HTTP is served, or *. Names guard against DNS rebinding."),
    flag("self-signed-cert-validity", Group::Security, Key::Same, |c| Slot::Uint(&mut c.tls.self_signed_validity_years), "Years for which certificates made at the start are valid."),
    flag("peer-cert-file", Group::PeerSecurity, Key::At("peer-transport-security.cert-file"), |c| Slot::Path(&mut c.peer_tls.cert_file), "Certificate shown to members."),
    flag("peer-key-file", Group::PeerSecurity, Key::At("peer-transport-security.key-file"), |c| Slot::Path(&mut c.peer_tls.key_file), "Key of that certificate."),
    flag("peer-client-cert-file", Group::PeerSecurity, Key::At("peer-transport-security.client-cert-file"), |c| Slot::Path(&mut c.peer_tls.client_cert_file), "Certificate shown when calling a member; empty: --peer-cert-file."),
    flag("peer-client-key-file", Group::PeerSecurity, Key::At("peer-transport-security.client-key-file"), |c| Slot::Path(&mut c.peer_tls.client_key_file), "Key of that certificate; empty: --peer-key-file."),
    flag("peer-client-cert-auth", Group::PeerSecurity, Key::At("peer-transport-security.client-cert-auth"), |c| Slot::Bool(&mut c.peer_tls.client_cert_auth), "Demand certificates of members."),
    flag("peer-trusted-ca-file", Group::PeerSecurity, Key::At("peer-transport-security.trusted-ca-file"), |c| Slot::Path(&mut c.peer_tls.trusted_ca_file), "Authorities that vouch for members."),
    flag("peer-cert-allowed-cn", Group::PeerSecurity, Key::At("peer-transport-security.allowed-cn"), |c| Slot::List(&mut c.peer_tls.allowed_cn), "Common names of which a member's certificate must carry one."),
    flag("peer-cert-allowed-hostname", Group::PeerSecurity, Key::At("peer-transport-security.allowed-hostname"), |c| Slot::List(&mut c.peer_tls.allowed_hostname), "Host names of which a member's certificate must carry one."),
    flag("peer-skip-client-san-verification", Group::PeerSecurity, Key::At("peer-transport-security.skip-client-san-verification"), |c| Slot::Bool(&mut c.peer_tls.skip_client_san_verification), "Do not compare a member's certificate with its address."),
    flag("peer-auto-tls", Group::PeerSecurity, Key::At("peer-transport-security.auto-tls"), |c| Slot::Bool(&mut c.peer_tls.auto), "Serve members with a certificate made at the start."),
    flag("peer-crl-file", Group::PeerSecurity, Key::None, |c| Slot::Path(&mut c.peer_tls.crl_file), "Revoked member certificates (DER or PEM)."),
    flag("auth-token", Group::Auth, Key::Same, |c| Slot::Text(&mut c.given.auth_token), "Where users' tokens come from: simple, or jwt with options."),
    flag("auth-token-ttl", Group::Auth, Key::Same, |c| Slot::Uint(&mut c.auth.token_ttl_s), "Seconds after which an unused simple token ends; 0 stands for the default."),
    flag("bcrypt-cost", Group::Auth, Key::Same, |c| Slot::Uint(&mut c.given.bcrypt_cost), "Work in hashing a password, 4 to 31; each step doubles it."),
    flag("enable-pprof", Group::Observe, Key::Same, |c| Slot::Bool(&mut c.observe.pprof), "Serve profiles at /debug/pprof/."),
    flag("metrics", Group::Observe, Key::Same, |c| Slot::Text(&mut c.given.metrics), "basic, or extensive for the time of every gRPC method."),
    flag("logger", Group::Observe, Key::Same, |c| Slot::Text(&mut c.given.logger), "Kind of logger; only zap, whose lines ours look like."),
    flag("log-outputs", Group::Observe, Key::Same, |c| Slot::UniqueList(&mut c.given.log_outputs), "Where log lines go: default (stderr), stderr, stdout, systemd/journal or files."),
    flag("log-level", Group::Observe, Key::Same, |c| Slot::Text(&mut c.given.log_level), "Least severe lines written: debug, info, warn, error, dpanic, panic or fatal."),
    flag("log-format", Group::Observe, Key::Same, |c| Slot::Text(&mut c.given.log_format), "json, or console for lines that people read."),
    flag("enable-log-rotation", Group::Observe, Key::Same, |c| Slot::Bool(&mut c.given.log_rotation), "Rotate the log file; needs one file in --log-outputs."),
    flag("log-rotation-config-json", Group::Observe, Key::Same, |c| Slot::Text(&mut c.given.log_rotation_json), "When to rotate: maxsize (MB), maxage (days), maxbackups, localtime, compress."),
    flag("warning-apply-duration", Group::Observe, Key::Same, |c| Slot::Duration(&mut c.observe.warning_apply_duration), "An apply or read slower than this is logged."),
    flag("warning-unary-request-duration", Group::Observe, Key::Same, |c| Slot::Duration(&mut c.observe.warning_unary_request_duration), "A request slower than this is logged; 0 stands for the default."),
    flag("enable-distributed-tracing", Group::Observe, Key::Same, |c| Slot::Bool(&mut c.tracing.enabled), "Send spans to OpenTelemetry."),
    flag("distributed-tracing-address", Group::Observe, Key::Same, |c| Slot::Text(&mut c.tracing.address), "Address of the collector."),
    flag("distributed-tracing-service-name", Group::Observe, Key::Same, |c| Slot::Text(&mut c.tracing.service_name), "Name of the service in spans; equal for all members."),
    flag("distributed-tracing-instance-id", Group::Observe, Key::Same, |c| Slot::Text(&mut c.tracing.instance_id), "Name of this member in spans; different for each."),
    flag("distributed-tracing-sampling-rate", Group::Observe, Key::Same, |c| Slot::Int(&mut c.tracing.sampling_rate), "Traces taken per million."),
    flag("corrupt-check-time", Group::Checks, Key::Same, |c| Slot::Duration(&mut c.checks.corrupt_check_time), "Time between comparisons of all members' data; 0 never compares."),
    flag("compact-hash-check-time", Group::Checks, Key::Same, |c| Slot::Duration(&mut c.checks.compact_hash_check_time), "Time between comparisons of members' hashes at compactions."),
    flag("compaction-batch-limit", Group::Checks, Key::Same, |c| Slot::Int(&mut c.given.compaction_batch_limit), "Revisions dropped at one stroke in a compaction; 0 stands for the default."),
    flag("compaction-sleep-interval", Group::Checks, Key::Same, |c| Slot::Duration(&mut c.compaction.sleep_interval), "Pause between such strokes; 0 stands for the default."),
    flag("watch-progress-notify-interval", Group::Checks, Key::Same, |c| Slot::Duration(&mut c.watch.progress_notify_interval), "How often an idle watch hears the revision, if it asked for that; 0 stands for the default."),
    flag("downgrade-check-time", Group::Checks, Key::Same, |c| Slot::Duration(&mut c.cluster.downgrade_check_time), "Time between looks whether a downgrade is complete; 0 never looks."),
    flag("bootstrap-defrag-threshold-megabytes", Group::Checks, Key::Same, |c| Slot::Uint(&mut c.storage.bootstrap_defrag_threshold_mib), "Reclaim space before serving if so many MiB are free in the backend; 0 never does."),
    flag("force-new-cluster", Group::Checks, Key::Same, |c| Slot::Bool(&mut c.cluster.force_new), "Make this member the only one, whatever the data says. Unsafe."),
    flag("unsafe-no-fsync", Group::Checks, Key::Same, |c| Slot::Bool(&mut c.storage.unsafe_no_fsync), "Never wait for the disk. A crash loses data."),
    flag("config-file", Group::Process, Key::None, |c| Slot::Text(&mut c.given.config_file), "File with all settings; every other flag and variable is then without effect."),
    flag("version", Group::Process, Key::None, |c| Slot::Bool(&mut c.given.version), "Print the version and end."),
    flag("engine", Group::Own, Key::Same, |c| Slot::Text(&mut c.given.engine), "Storage engine; `quorate engines` lists them. A data directory belongs to the engine that made it."),
    flag("engine-options", Group::Own, Key::Same, |c| Slot::Options(&mut c.storage.engine_options), "Settings of the engine, which `quorate engines` lists."),
    flag("quota-physical-bytes", Group::Own, Key::Same, |c| Slot::Int(&mut c.given.quota_physical_bytes), "Bytes of disk at which writes are refused as well; 0 stands for twice --quota-backend-bytes and at least 1 GiB more, less than 0 for no limit."),
    flag("auto-disarm-nospace", Group::Own, Key::Same, |c| Slot::Bool(&mut c.storage.auto_disarm_nospace), "A member lifts its own NOSPACE alarm when both sizes are below 90% of their limits."),
    flag("max-connection-age", Group::Own, Key::Same, |c| Slot::Duration(&mut c.listen.connection_age), "Time after which a client's connection is asked to end, so that clients spread anew; 0 never asks."),
    flag("max-connection-age-grace", Group::Own, Key::Same, |c| Slot::Duration(&mut c.listen.connection_age_grace), "Time that its calls have after that; 0 for as long as they take."),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_flags_of_etcd_are_there_once() {
        let etcd = FLAGS.iter().filter(|flag| flag.group != Group::Own);
        assert_eq!(etcd.count(), 113);
        let names: BTreeSet<_> = FLAGS.iter().map(|flag| flag.name).collect();
        assert_eq!(names.len(), FLAGS.len());
        let keys: BTreeSet<_> = FLAGS
            .iter()
            .filter_map(Flag::key)
            .chain(FILE_ONLY.iter().map(|only| only.key))
            .collect();
        let keyless = FLAGS.iter().filter(|flag| flag.key().is_none()).count();
        assert_eq!(keyless, 7);
        assert_eq!(keys.len(), FLAGS.len() - keyless + FILE_ONLY.len());
        assert!(IGNORED.iter().all(|name| find(name).is_none()));
        assert!(DEPRECATED.iter().all(|(name, _)| find(name).is_some()));
    }

    #[test]
    fn no_two_flags_share_a_place() {
        let mut places = BTreeSet::new();
        for flag in FLAGS {
            let mut config = Config::default();
            let address = match (flag.slot)(&mut config) {
                Slot::Bool(v) => std::ptr::from_mut(v) as usize,
                Slot::Uint(v) => std::ptr::from_mut(v) as usize,
                Slot::Uint32(v) => std::ptr::from_mut(v) as usize,
                Slot::Int(v) => std::ptr::from_mut(v) as usize,
                Slot::Duration(v) => std::ptr::from_mut(v) as usize,
                Slot::Text(v) | Slot::Choice(v, _) | Slot::Choices(v, _) => {
                    std::ptr::from_mut(v) as usize
                }
                Slot::Path(v) => std::ptr::from_mut(v) as usize,
                Slot::Urls(v) => std::ptr::from_mut(v) as usize,
                Slot::Origins(v) => std::ptr::from_mut(v) as usize,
                Slot::Set(v) => std::ptr::from_mut(v) as usize,
                Slot::UniqueList(v) | Slot::List(v) => std::ptr::from_mut(v) as usize,
                Slot::Gates(v) => std::ptr::from_mut(v) as usize,
                Slot::Options(v) => std::ptr::from_mut(v) as usize,
            };
            let offset = address - std::ptr::from_ref(&config) as usize;
            assert!(places.insert(offset), "{} writes where another flag does", flag.name);
        }
    }

    #[test]
    fn variables_are_named_after_flags() {
        assert_eq!(find("listen-client-urls").unwrap().env(), "ETCD_LISTEN_CLIENT_URLS");
        assert_eq!(find("engine").unwrap().env(), "QUORATE_ENGINE");
        assert_eq!(
            find("peer-cert-file").unwrap().key(),
            Some("peer-transport-security.cert-file")
        );
        assert_eq!(find("raft-read-timeout").unwrap().key(), None);
    }
}
