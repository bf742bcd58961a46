//! What is counted about gRPC calls: a table of handles by method, made once.

use std::ops::Deref;
use std::sync::OnceLock;
use std::time::Instant;

use metrics::{Counter, Histogram};
use tonic::Code;

use super::Metrics;

/// The names of the codes, by number.
pub const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Who streams in a method.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamKind {
    Unary,
    ClientStream,
    ServerStream,
    Bidi,
}

impl StreamKind {
    /// The label `grpc_type`.
    pub const fn label(self) -> &'static str {
        match self {
            StreamKind::Unary => "unary",
            StreamKind::ClientStream => "client_stream",
            StreamKind::ServerStream => "server_stream",
            StreamKind::Bidi => "bidi_stream",
        }
    }
}

macro_rules! methods {
    ($($service:literal { $($method:ident = $name:literal $stream:ident,)* })*) => {
        /// A method of a service on the client port.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Method {
            $($($method,)*)*
        }

        impl Method {
            /// Every method, in the order of declaration.
            pub const ALL: &[Method] = &[$($(Method::$method,)*)*];

            /// The method that requests with this path call, `/package.Service/Method`.
            pub fn from_path(path: &str) -> Option<Method> {
                match path {
                    $($(concat!("/", $service, "/", $name) => Some(Method::$method),)*)*
                    _ => None,
                }
            }

            /// Service (with its package), method name and who streams.
            pub const fn parts(self) -> (&'static str, &'static str, StreamKind) {
                match self {
                    $($(Method::$method => ($service, $name, StreamKind::$stream),)*)*
                }
            }
        }
    };
}

methods! {
    "etcdserverpb.KV" {
        Range = "Range" Unary,
        RangeStream = "RangeStream" ServerStream,
        Put = "Put" Unary,
        DeleteRange = "DeleteRange" Unary,
        Txn = "Txn" Unary,
        Compact = "Compact" Unary,
    }
    "etcdserverpb.Watch" {
        Watch = "Watch" Bidi,
    }
    "etcdserverpb.Lease" {
        LeaseGrant = "LeaseGrant" Unary,
        LeaseRevoke = "LeaseRevoke" Unary,
        LeaseKeepAlive = "LeaseKeepAlive" Bidi,
        LeaseTimeToLive = "LeaseTimeToLive" Unary,
        LeaseLeases = "LeaseLeases" Unary,
    }
    "etcdserverpb.Cluster" {
        MemberAdd = "MemberAdd" Unary,
        MemberRemove = "MemberRemove" Unary,
        MemberUpdate = "MemberUpdate" Unary,
        MemberList = "MemberList" Unary,
        MemberPromote = "MemberPromote" Unary,
    }
    "etcdserverpb.Maintenance" {
        Alarm = "Alarm" Unary,
        Status = "Status" Unary,
        Defragment = "Defragment" Unary,
        Hash = "Hash" Unary,
        HashKv = "HashKV" Unary,
        Snapshot = "Snapshot" ServerStream,
        MoveLeader = "MoveLeader" Unary,
        Downgrade = "Downgrade" Unary,
    }
    "etcdserverpb.Auth" {
        AuthEnable = "AuthEnable" Unary,
        AuthDisable = "AuthDisable" Unary,
        AuthStatus = "AuthStatus" Unary,
        Authenticate = "Authenticate" Unary,
        UserAdd = "UserAdd" Unary,
        UserGet = "UserGet" Unary,
        UserList = "UserList" Unary,
        UserDelete = "UserDelete" Unary,
        UserChangePassword = "UserChangePassword" Unary,
        UserGrantRole = "UserGrantRole" Unary,
        UserRevokeRole = "UserRevokeRole" Unary,
        RoleAdd = "RoleAdd" Unary,
        RoleGet = "RoleGet" Unary,
        RoleList = "RoleList" Unary,
        RoleDelete = "RoleDelete" Unary,
        RoleGrantPermission = "RoleGrantPermission" Unary,
        RoleRevokePermission = "RoleRevokePermission" Unary,
    }
    "grpc.health.v1.Health" {
        HealthCheck = "Check" Unary,
        HealthList = "List" Unary,
        HealthWatch = "Watch" ServerStream,
    }
    "v3lockpb.Lock" {
        Lock = "Lock" Unary,
        Unlock = "Unlock" Unary,
    }
    "v3electionpb.Election" {
        Campaign = "Campaign" Unary,
        Proclaim = "Proclaim" Unary,
        Leader = "Leader" Unary,
        Observe = "Observe" ServerStream,
        Resign = "Resign" Unary,
    }
}

impl Method {
    /// Whether the method's series are there from the start; those of locks and elections appear
    /// with their first call.
    pub fn shown_at_start(self) -> bool {
        !matches!(self.parts().0, "v3lockpb.Lock" | "v3electionpb.Election")
    }

    /// Whether a call may wait for other clients, so that a long one is not a slow one.
    pub fn waits(self) -> bool {
        matches!(self, Method::Lock | Method::Campaign)
    }
}

struct MethodMetrics {
    started: Counter,
    received: Counter,
    sent: Counter,
    /// By code.
    handled: [Counter; CODES.len()],
    /// Present once calls are timed.
    seconds: OnceLock<Histogram>,
}

/// The handles of all methods.
pub(super) struct Table {
    /// By method.
    methods: [OnceLock<MethodMetrics>; Method::ALL.len()],
    /// Set if calls are timed.
    timed: OnceLock<()>,
}

impl Default for Table {
    fn default() -> Self {
        Table { methods: std::array::from_fn(|_| OnceLock::new()), timed: OnceLock::new() }
    }
}

impl Metrics {
    /// Times every gRPC call from now on: the setting `metrics=extensive`. Called once at start.
    pub fn time_grpc_calls(&self) {
        for method in Method::ALL.iter().filter(|m| m.shown_at_start()) {
            self.method_seconds(*method);
        }
        self.grpc.timed.get_or_init(|| ());
    }

    /// Makes the series of all methods that are shown from the start.
    pub(super) fn touch_grpc(&self) {
        for method in Method::ALL.iter().filter(|m| m.shown_at_start()) {
            self.method(*method);
        }
    }

    fn method(&self, method: Method) -> &MethodMetrics {
        self.grpc.methods[method as usize].get_or_init(|| {
            let (service, name, stream) = method.parts();
            let labels = [stream.label(), service, name];
            MethodMetrics {
                started: self.grpc_started.with(&labels),
                received: self.grpc_received.with(&labels),
                sent: self.grpc_sent.with(&labels),
                handled: CODES
                    .map(|code| self.grpc_handled.with(&[stream.label(), service, name, code])),
                seconds: OnceLock::new(),
            }
        })
    }

    fn method_seconds(&self, method: Method) -> &Histogram {
        self.method(method).seconds.get_or_init(|| {
            let (service, name, stream) = method.parts();
            self.grpc_handling_seconds.with(&[stream.label(), service, name])
        })
    }
}

/// One gRPC call being served, from its headers to its status.
///
/// Goes with the call: in the future of a unary call, in the response stream of a streaming one. A
/// call dropped before [`GrpcCall::finish`] was given up by its client and counts as `Canceled`.
#[must_use = "the call ends when this is dropped"]
pub struct GrpcCall<M: Deref<Target = Metrics> = &'static Metrics> {
    metrics: M,
    method: Method,
    /// Only where calls are timed.
    started: Option<Instant>,
    code: Code,
    /// False for a step of another call.
    counted: bool,
}

impl<M: Deref<Target = Metrics>> GrpcCall<M> {
    /// Counts a call as started.
    pub fn start(method: Method, metrics: M) -> Self {
        metrics.method(method).started.increment(1);
        let started = metrics.grpc.timed.get().map(|()| Instant::now());
        GrpcCall { metrics, method, started, code: Code::Cancelled, counted: true }
    }

    /// A call that the server makes on itself as a step of another call. Nobody called the method by
    /// gRPC, so nothing is counted.
    pub fn step(method: Method, metrics: M) -> Self {
        GrpcCall { metrics, method, started: None, code: Code::Cancelled, counted: false }
    }

    /// Whether this is a client's call, and no step of one.
    pub fn is_counted(&self) -> bool {
        self.counted
    }

    /// Which method was called.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Counts a message from the client; `bytes` is its encoded length without the frame's header.
    pub fn received(&self, bytes: usize) {
        if !self.counted {
            return;
        }
        self.metrics.method(self.method).received.increment(1);
        self.metrics.client_received_bytes.increment(bytes as u64);
    }

    /// Counts messages from the client apart from the call itself, for a task that reads them.
    pub fn receiver(&self) -> Received<M>
    where
        M: Clone,
    {
        Received { metrics: self.metrics.clone(), method: self.method, counted: self.counted }
    }

    /// Counts a message to the client; `bytes` as in [`GrpcCall::received`].
    pub fn sent(&self, bytes: usize) {
        if !self.counted {
            return;
        }
        self.metrics.method(self.method).sent.increment(1);
        self.metrics.client_sent_bytes.increment(bytes as u64);
    }

    /// Ends the call with the status that the client is told.
    pub fn finish(mut self, code: Code) {
        self.code = code;
    }
}

impl<M: Deref<Target = Metrics>> Drop for GrpcCall<M> {
    fn drop(&mut self) {
        if !self.counted {
            return;
        }
        self.metrics.method(self.method).handled[self.code as usize].increment(1);
        if let Some(started) = self.started {
            self.metrics.method_seconds(self.method).record(started.elapsed().as_secs_f64());
        }
    }
}

/// Counts the messages that a streaming call receives.
pub struct Received<M: Deref<Target = Metrics> = &'static Metrics> {
    metrics: M,
    method: Method,
    counted: bool,
}

impl<M: Deref<Target = Metrics>> Received<M> {
    /// Counts a message; `bytes` as in [`GrpcCall::received`].
    pub fn count(&self, bytes: usize) {
        if !self.counted {
            return;
        }
        self.metrics.method(self.method).received.increment(1);
        self.metrics.client_received_bytes.increment(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(page: &str, series: &str) -> Option<f64> {
        let line =
            page.lines().find(|l| l.strip_prefix(series).is_some_and(|r| r.starts_with(' ')))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }

    #[test]
    fn a_path_names_its_method_and_no_other() {
        for method in Method::ALL {
            let (service, name, _) = method.parts();
            assert_eq!(Method::from_path(&format!("/{service}/{name}")), Some(*method));
        }
        for path in
            ["", "/", "/etcdserverpb.KV/range", "etcdserverpb.KV/Range", "/etcdserverpb.KV/"]
        {
            assert_eq!(Method::from_path(path), None, "{path}");
        }
    }

    #[test]
    fn a_finished_call_is_counted_with_its_messages_and_code() {
        let metrics = Metrics::new();
        let call = GrpcCall::start(Method::Range, &metrics);
        call.received(10);
        call.sent(25);
        call.finish(Code::Ok);
        let page = metrics.render();
        let labels = "grpc_method=\"Range\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"";
        for (series, expected) in [
            (format!("grpc_server_started_total{{{labels}}}"), 1.0),
            (format!("grpc_server_msg_received_total{{{labels}}}"), 1.0),
            (format!("grpc_server_msg_sent_total{{{labels}}}"), 1.0),
            (format!("grpc_server_handled_total{{grpc_code=\"OK\",{labels}}}"), 1.0),
            (format!("grpc_server_handled_total{{grpc_code=\"Canceled\",{labels}}}"), 0.0),
            ("etcd_network_client_grpc_received_bytes_total".into(), 10.0),
            ("etcd_network_client_grpc_sent_bytes_total".into(), 25.0),
        ] {
            assert_eq!(value(&page, &series), Some(expected), "{series}");
        }
        assert!(!page.contains("grpc_server_handling_seconds"), "calls are not timed by default");
    }

    #[test]
    fn a_dropped_call_was_canceled_and_a_lock_appears_with_its_first_call() {
        let metrics = Metrics::new();
        assert!(!metrics.render().contains("v3lockpb.Lock"));
        drop(GrpcCall::start(Method::Lock, &metrics));
        let page = metrics.render();
        let labels = "grpc_method=\"Lock\",grpc_service=\"v3lockpb.Lock\",grpc_type=\"unary\"";
        let series = format!("grpc_server_handled_total{{grpc_code=\"Canceled\",{labels}}}");
        assert_eq!(value(&page, &series), Some(1.0));
        assert!(!page.contains("v3electionpb.Election"));
    }

    #[test]
    fn a_step_of_another_call_is_not_counted() {
        let metrics = Metrics::new();
        metrics.time_grpc_calls();
        let step = GrpcCall::step(Method::Txn, &metrics);
        step.received(10);
        step.receiver().count(10);
        step.sent(10);
        assert!(!step.is_counted());
        step.finish(Code::Ok);
        let page = metrics.render();
        let labels = "grpc_method=\"Txn\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"";
        for series in [
            format!("grpc_server_started_total{{{labels}}}"),
            format!("grpc_server_msg_received_total{{{labels}}}"),
            format!("grpc_server_msg_sent_total{{{labels}}}"),
            format!("grpc_server_handled_total{{grpc_code=\"OK\",{labels}}}"),
            format!("grpc_server_handling_seconds_count{{{labels}}}"),
            "etcd_network_client_grpc_received_bytes_total".into(),
            "etcd_network_client_grpc_sent_bytes_total".into(),
        ] {
            assert_eq!(value(&page, &series), Some(0.0), "{series}");
        }
    }

    #[test]
    fn extensive_metrics_time_calls_and_show_all_methods_at_once() {
        let metrics = Metrics::new();
        metrics.time_grpc_calls();
        GrpcCall::start(Method::Put, &metrics).finish(Code::Unavailable);
        let page = metrics.render();
        let count = |method: &str, service: &str| {
            value(
                &page,
                &format!(
                    "grpc_server_handling_seconds_count{{grpc_method=\"{method}\",grpc_service=\"{service}\",grpc_type=\"unary\"}}"
                ),
            )
        };
        assert_eq!(count("Put", "etcdserverpb.KV"), Some(1.0));
        assert_eq!(count("Range", "etcdserverpb.KV"), Some(0.0));
        assert_eq!(count("Lock", "v3lockpb.Lock"), None);
    }
}
