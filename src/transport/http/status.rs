//! What a plain HTTP client can ask about this member: version, health, metrics, variables
//! (operations 3.1 and 3.2); and what every HTTP request on a client port passes first.
//!
//! The gRPC server is not behind any of this. All futures here are `Send` and none is spawned, so
//! that the routers run on a single-threaded runtime as on any other.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::future::Future;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::any;
use http::header::{
    ACCEPT_ENCODING, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ALLOW, CONTENT_ENCODING, CONTENT_TYPE, HOST, ORIGIN,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use http_body_util::BodyExt;
use quorate_proto::etcdserverpb::AlarmType;

use crate::core::types::MemberId;
use crate::metrics::{Metrics, OpenFiles, resident_bytes};
use crate::transport::identity::ClientCert;
use crate::transport::listener::OverTls;

/// What these pages need of the member that they describe.
pub trait Member: Send + Sync {
    /// The release whose behaviour this server has, as `3.7.1`.
    fn server_version(&self) -> String;

    /// The version that the cluster runs at, as `3.7.0`; `None` until it is decided.
    fn cluster_version(&self) -> Option<String>;

    /// The version of the storage schema, as `3.7.0`; `None` until it is known.
    fn storage_version(&self) -> Option<String>;

    /// The active alarms of all members.
    fn alarms(&self) -> Vec<AlarmType>;

    /// The leader that this member knows of.
    fn leader(&self) -> Option<MemberId>;

    /// Whether this member is a learner.
    fn is_learner(&self) -> bool;

    /// Whether users and roles are enforced.
    fn auth_enabled(&self) -> bool;

    /// Reads one key without its value, with root's rights, from the local store if `serializable`,
    /// else after a read index round. Ends within the request timeout; its error is shown as it is.
    fn read(&self, serializable: bool) -> ReadFuture;

    /// The object `raft.status` of `/debug/vars`: id, term, vote, commit, lead, raftState, applied,
    /// progress (id → match, next, state; on a leader), leadtransferee. IDs are hex strings.
    fn raft_status(&self) -> serde_json::Value;

    /// The program's arguments, its name first.
    fn cmdline(&self) -> Vec<String>;
}

/// The end of a read by [`Member::read`].
pub type ReadFuture = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// The subject of a page.
#[derive(Clone)]
struct Subject {
    member: Arc<dyn Member>,
    metrics: &'static Metrics,
}

/// Answers `/version`, `/debug/vars` and all of [`metrics_router`]; others with 404. Meant to be merged
/// with what else a client port serves, then wrapped by [`ClientRules::guard`].
pub fn client_router(member: Arc<dyn Member>, metrics: &'static Metrics) -> Router {
    let subject = Subject { member: member.clone(), metrics };
    Router::new()
        .route("/version", any(version))
        .route("/debug/vars", any(variables))
        .with_state(subject)
        .merge(metrics_router(member, metrics))
}

/// Answers what a port of listen-metrics-urls serves: `/metrics`, `/health`, `/livez`, `/readyz`;
/// others with 404.
pub fn metrics_router(member: Arc<dyn Member>, metrics: &'static Metrics) -> Router {
    let mut router = Router::new().route("/metrics", any(scrape)).route("/health", any(health));
    for probe in [Probe::Livez, Probe::Readyz] {
        let root = format!("/{}", probe.name());
        for check in probe.checks() {
            let path = format!("{root}/{}", check.name());
            let run = move |State(subject): State<Subject>, request: Request| async move {
                probe_page(subject, request, probe, &[*check]).await
            };
            router = router.route(&path, any(run));
        }
        let run = move |State(subject): State<Subject>, request: Request| async move {
            let excluded = query_values(request.uri(), "exclude");
            let checks = probe.checks();
            for name in excluded.iter().filter(|n| checks.iter().all(|c| c.name() != n.as_str())) {
                tracing::warn!(path = probe.name(), check = %name, "no such health check to exclude");
            }
            let left: Vec<_> =
                checks.iter().copied().filter(|c| excluded.iter().all(|n| n != c.name())).collect();
            probe_page(subject, request, probe, &left).await
        };
        router = router.route(&root, any(run));
    }
    router.fallback(not_found).with_state(Subject { member, metrics })
}

/// A response of plain text as Go's `http.Error` makes it: the message, a newline, and a promise of
/// the content type.
pub fn text_error(status: StatusCode, message: &str) -> Response {
    plain(status, format!("{message}\n"))
}

/// 405 for a request to a path that only answers `allow`.
pub fn method_not_allowed(allow: &'static str) -> Response {
    let mut response = text_error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
    response
}

/// 404 for a path that nothing answers.
pub async fn not_found() -> Response {
    text_error(StatusCode::NOT_FOUND, "404 page not found")
}

const PLAIN_TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

fn plain(status: StatusCode, body: String) -> Response {
    let mut response = page(status, PLAIN_TEXT, body);
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn page(status: StatusCode, content_type: HeaderValue, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// All values of a query parameter, decoded, in order.
fn query_values(uri: &Uri, name: &str) -> Vec<String> {
    let query = uri.query().unwrap_or_default();
    let pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.filter(|(key, _)| key == name).map(|(_, value)| value.into_owned()).collect()
}

/// A JSON string as Go writes it, which also escapes what HTML would read.
fn json_string(text: &str) -> String {
    serde_json::Value::from(text)
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

async fn version(State(Subject { member, .. }): State<Subject>, request: Request) -> Response {
    version_page(&*member, request.method())
}

/// The answer of `/version`, which the peer port gives as well.
pub fn version_page(member: &dyn Member, method: &Method) -> Response {
    if method != Method::GET {
        return method_not_allowed("GET");
    }
    let cluster = member.cluster_version();
    let storage = member.storage_version();
    let body = format!(
        "{{\"etcdserver\":{},\"etcdcluster\":{},\"storage\":{}}}",
        json_string(&member.server_version()),
        json_string(cluster.as_deref().unwrap_or("not_decided")),
        json_string(storage.as_deref().unwrap_or("unknown")),
    );
    page(StatusCode::OK, HeaderValue::from_static("application/json"), body)
}

async fn health(State(subject): State<Subject>, request: Request) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed("GET");
    }
    let excluded = query_values(request.uri(), "exclude");
    let serializable = query_values(request.uri(), "serializable");
    let serializable = serializable.first().is_some_and(|v| v == "true");
    match ill(&*subject.member, &excluded, serializable).await {
        None => {
            subject.metrics.health_success.increment(1);
            page(StatusCode::OK, PLAIN_TEXT, "{\"health\":\"true\",\"reason\":\"\"}")
        }
        Some(reason) => {
            tracing::warn!(reason, "serving /health false");
            subject.metrics.health_failures.increment(1);
            let reason = json_string(&reason);
            text_error(
                StatusCode::SERVICE_UNAVAILABLE,
                &format!("{{\"health\":\"false\",\"reason\":{reason}}}"),
            )
        }
    }
}

/// Why `/health` is false; `None` if it is true.
async fn ill(member: &dyn Member, excluded: &[String], serializable: bool) -> Option<String> {
    let alarms = member.alarms();
    let alarm = alarms.iter().find(|a| excluded.iter().all(|e| e != a.as_str_name()));
    match alarm {
        Some(AlarmType::Nospace) => return Some("ALARM NOSPACE".into()),
        Some(AlarmType::Corrupt) => return Some("ALARM CORRUPT".into()),
        Some(AlarmType::None) => return Some("ALARM UNKNOWN".into()),
        None => {}
    }
    if !serializable && member.leader().is_none() {
        return Some("RAFT NO LEADER".into());
    }
    member.read(serializable).await.err().map(|error| format!("RANGE ERROR:{error}"))
}

/// The two questions of an orchestrator: restart this process? send it requests?
#[derive(Clone, Copy, PartialEq, Eq)]
enum Probe {
    Livez,
    Readyz,
}

impl Probe {
    fn name(self) -> &'static str {
        match self {
            Probe::Livez => "livez",
            Probe::Readyz => "readyz",
        }
    }

    fn checks(self) -> &'static [Check] {
        match self {
            Probe::Livez => &[Check::SerializableRead],
            Probe::Readyz => &[
                Check::DataCorruption,
                Check::SerializableRead,
                Check::LinearizableRead,
                Check::NonLearner,
            ],
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    async fn run(self, member: &dyn Member) -> Result<(), String> {
        match self {
            Check::DataCorruption if member.alarms().contains(&AlarmType::Corrupt) => {
                Err("alarm activated: CORRUPT".into())
            }
            Check::NonLearner if member.is_learner() => Err("not supported for learner".into()),
            Check::DataCorruption | Check::NonLearner => Ok(()),
            Check::SerializableRead => member.read(true).await,
            Check::LinearizableRead => member.read(false).await,
        }
    }
}

async fn probe_page(
    Subject { member, metrics }: Subject,
    request: Request,
    probe: Probe,
    checks: &[Check],
) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed("GET");
    }
    let mut lines = String::new();
    let mut healthy = true;
    for check in checks {
        let labels = [probe.name(), check.name()];
        let result = check.run(&*member).await;
        let status = if result.is_ok() { "success" } else { "error" };
        metrics.healthcheck.with(&labels).set(f64::from(result.is_ok()));
        metrics.healthchecks.with(&[labels[0], labels[1], status]).increment(1);
        let _ = match result {
            Ok(()) => writeln!(lines, "[+]{} ok", check.name()),
            Err(error) => {
                healthy = false;
                writeln!(lines, "[-]{} failed: {error}", check.name())
            }
        };
    }
    if !healthy {
        tracing::warn!(path = request.uri().path(), reason = lines, "health check failed");
        return text_error(StatusCode::SERVICE_UNAVAILABLE, &lines);
    }
    if query_values(request.uri(), "verbose").is_empty() {
        lines.clear();
    }
    lines.push_str("ok\n");
    plain(StatusCode::OK, lines)
}

async fn scrape(State(Subject { metrics, .. }): State<Subject>, headers: HeaderMap) -> Response {
    metrics.scrapes_in_flight.increment(1);
    let body = metrics.render();
    metrics.scrapes_in_flight.decrement(1);
    metrics.scrapes.with(&["200"]).increment(1);
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    if !accepts_gzip(&headers) {
        return page(StatusCode::OK, content_type, body);
    }
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let packed = encoder.write_all(body.as_bytes()).and_then(|()| encoder.finish());
    let packed = packed.expect("a vector takes every byte");
    let mut response = page(StatusCode::OK, content_type, packed);
    response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    response
}

/// Whether gzip is among the encodings accepted, and not by a weight of zero.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        parts.next() == Some("gzip")
            && parts.all(|p| p.strip_prefix("q=").is_none_or(|q| q.parse() != Ok(0.0)))
    })
}

async fn variables(State(Subject { member, .. }): State<Subject>, request: Request) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed("GET");
    }
    // Go's members of memstats describe its collector; only this one has a meaning here.
    let memory = serde_json::json!({ "Sys": resident_bytes() });
    let limit = OpenFiles::count().map_or(0, |files| files.limit);
    let body = format!(
        "{{\n\"cmdline\": {},\n\"file_descriptor_limit\": {limit},\n\"memstats\": {memory},\n\"raft.status\": {}\n}}\n",
        serde_json::Value::from(member.cmdline()),
        member.raft_status(),
    );
    page(StatusCode::OK, HeaderValue::from_static("application/json; charset=utf-8"), body)
}

/// What an HTTP request on a client port must pass, gRPC apart.
pub struct ClientRules {
    hosts: BTreeSet<String>,
    origins: BTreeSet<String>,
    member: Arc<dyn Member>,
}

impl ClientRules {
    /// `hosts` is host-whitelist and `origins` cors: an empty set, or one with `*`, allows all.
    /// Hosts are only looked at in requests that are not [`OverTls`].
    pub fn new(
        hosts: impl IntoIterator<Item = String>,
        origins: impl IntoIterator<Item = String>,
        member: Arc<dyn Member>,
    ) -> Self {
        ClientRules {
            hosts: hosts.into_iter().collect(),
            origins: origins.into_iter().collect(),
            member,
        }
    }

    /// Puts the rules before `router`, so that it sees only what passed, with `/v3beta/` paths
    /// renamed to `/v3/`.
    pub fn guard(self, router: Router) -> Router {
        // As a fallback the router is entered after the path is renamed; a layer on the router
        // itself would run when the route is already chosen.
        Router::new()
            .fallback_service(router)
            .layer(middleware::from_fn_with_state(Arc::new(self), pass))
    }

    fn host_allowed(&self, request: &Request, host: &str) -> bool {
        request.extensions().get::<OverTls>().is_some() || allows(&self.hosts, host)
    }

    /// What Access-Control-Allow-Origin says to a request.
    fn origin_allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        if allows(&self.origins, "*") {
            return Some(HeaderValue::from_static("*"));
        }
        let origin = headers.get(ORIGIN)?;
        self.origins.contains(origin.to_str().ok()?).then(|| origin.clone())
    }
}

fn allows(set: &BTreeSet<String>, value: &str) -> bool {
    set.is_empty() || set.contains("*") || set.contains(value)
}

async fn pass(State(rules): State<Arc<ClientRules>>, mut request: Request, next: Next) -> Response {
    if let Some(uri) = renamed(request.uri()) {
        *request.uri_mut() = uri;
    }
    let host = host_of(&request);
    if !rules.host_allowed(&request, &host) {
        tracing::warn!(host, "rejecting HTTP request from host that is not on the whitelist");
        hear_out(request.into_body()).await;
        return text_error(StatusCode::MISDIRECTED_REQUEST, &misdirected(&host));
    }
    if request.uri().path().starts_with("/v3/")
        && request.extensions().get::<ClientCert>().is_some_and(|c| c.common_name.is_some())
        && rules.member.auth_enabled()
    {
        hear_out(request.into_body()).await;
        return text_error(
            StatusCode::BAD_REQUEST,
            "CommonName of client sending a request against gateway will be ignored and not used as expected",
        );
    }
    let origin = rules.origin_allowed(request.headers());
    let mut response = if request.method() == Method::OPTIONS {
        Response::new(Body::empty())
    } else {
        next.run(request).await
    };
    if let Some(origin) = origin {
        let headers = response.headers_mut();
        headers.insert(
            ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE"),
        );
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(
            ACCESS_CONTROL_ALLOW_HEADERS,
            HeaderValue::from_static("accept, content-type, authorization"),
        );
    }
    response
}

/// The most of a request that is read although it is refused, and how long that may take.
const REFUSED_BODY_MAX: usize = 64 * 1024;
const REFUSED_BODY_WAIT: Duration = Duration::from_secs(1);

/// Reads what a request that is refused for its head has behind it. An HTTP/2 stream that is answered
/// before it was read is reset, and a client that is still about to send reports that, not the answer.
async fn hear_out(mut body: Body) {
    let read = async {
        let mut left = REFUSED_BODY_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            match left.checked_sub(frame.data_ref().map_or(0, |data| data.len())) {
                Some(less) => left = less,
                None => return,
            }
        }
    };
    // Whoever sends without an end is answered all the same.
    tokio::time::timeout(REFUSED_BODY_WAIT, read).await.ok();
}

/// The same address with a path below `/v3/`, if it was below `/v3beta/`.
fn renamed(uri: &Uri) -> Option<Uri> {
    let rest = uri.path_and_query()?.as_str().strip_prefix("/v3beta/")?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("/v3/{rest}").parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// The host that the client asked for, without its port; empty if it named none.
fn host_of(request: &Request) -> String {
    let named = match request.uri().authority() {
        Some(authority) => authority.as_str(),
        None => match request.headers().get(HOST) {
            Some(host) => host.to_str().unwrap_or_default(),
            None => "",
        },
    };
    // As Go splits it: an IPv6 address loses its brackets only together with a port.
    match named.rsplit_once(':') {
        Some((host, _)) if host.starts_with('[') && host.ends_with(']') => {
            host[1..host.len() - 1].to_owned()
        }
        Some((host, _)) if !host.contains([':', '[', ']']) => host.to_owned(),
        _ => named.to_owned(),
    }
}

fn misdirected(host: &str) -> String {
    format!(
        "\nThe Host header of this request, \"{host}\", is not one that this server answers to.\n\n\
         Over TLS every host is accepted. Without TLS, add the name that you use to the whitelist,\n\
         e.g. --host-whitelist \"{host}\".\n\n\
         The check protects against DNS rebinding (CVE-2018-5702).\n"
    )
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Mutex;

    use futures_util::future;
    use http_body_util::BodyExt;
    use tower::Service;

    use super::*;

    #[derive(Default)]
    struct Fake {
        undecided: bool,
        alarms: Vec<AlarmType>,
        no_leader: bool,
        learner: bool,
        auth: bool,
        local_error: Option<String>,
        remote_error: Option<String>,
        /// What was read: whether serializable.
        reads: Mutex<Vec<bool>>,
    }

    impl Member for Fake {
        fn server_version(&self) -> String {
            "3.7.1".into()
        }

        fn cluster_version(&self) -> Option<String> {
            (!self.undecided).then(|| "3.7.0".into())
        }

        fn storage_version(&self) -> Option<String> {
            (!self.undecided).then(|| "3.7.0".into())
        }

        fn alarms(&self) -> Vec<AlarmType> {
            self.alarms.clone()
        }

        fn leader(&self) -> Option<MemberId> {
            (!self.no_leader).then_some(MemberId(1))
        }

        fn is_learner(&self) -> bool {
            self.learner
        }

        fn auth_enabled(&self) -> bool {
            self.auth
        }

        fn read(&self, serializable: bool) -> ReadFuture {
            self.reads.lock().expect("not poisoned").push(serializable);
            let error = if serializable { &self.local_error } else { &self.remote_error };
            Box::pin(future::ready(error.clone().map_or(Ok(()), Err)))
        }

        fn raft_status(&self) -> serde_json::Value {
            serde_json::json!({ "id": "1", "raftState": "StateLeader" })
        }

        fn cmdline(&self) -> Vec<String> {
            vec!["quorate".into(), "--name=\"m\"".into()]
        }
    }

    struct Answer {
        status: u16,
        headers: HeaderMap,
        body: Vec<u8>,
    }

    impl Answer {
        fn header(&self, name: &str) -> Option<&str> {
            self.headers.get(name).map(|v| v.to_str().expect("headers are text"))
        }

        fn text(&self) -> &str {
            std::str::from_utf8(&self.body).expect("bodies are text")
        }

        /// Status, content type, whether sniffing is forbidden, body.
        fn seen(&self) -> (u16, Option<&str>, bool, &str) {
            let nosniff = self.header("x-content-type-options") == Some("nosniff");
            (self.status, self.header("content-type"), nosniff, self.text())
        }
    }

    const TEXT: Option<&str> = Some("text/plain; charset=utf-8");

    fn leaked() -> &'static Metrics {
        Box::leak(Box::new(Metrics::new()))
    }

    async fn send(mut router: Router, request: http::request::Builder) -> Answer {
        let request = request.body(Body::empty()).expect("the request is well formed");
        let response = router.call(request).await.expect("a router never fails");
        let (parts, body) = response.into_parts();
        let body = body.collect().await.expect("the body is whole").to_bytes().to_vec();
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    async fn get(fake: Fake, path: &str) -> Answer {
        send(client_router(Arc::new(fake), leaked()), Request::get(path)).await
    }

    fn count(metrics: &Metrics, series: &str) -> Option<f64> {
        let page = metrics.render();
        let found = page.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        found.map(|value| value.parse().expect("a sample is a number"))
    }

    #[tokio::test]
    async fn version_names_three_versions_and_says_what_is_not_known() {
        let answer = get(Fake::default(), "/version").await;
        let body = r#"{"etcdserver":"3.7.1","etcdcluster":"3.7.0","storage":"3.7.0"}"#;
        assert_eq!(answer.seen(), (200, Some("application/json"), false, body));
        let answer = get(Fake { undecided: true, ..Fake::default() }, "/version").await;
        let body = r#"{"etcdserver":"3.7.1","etcdcluster":"not_decided","storage":"unknown"}"#;
        assert_eq!(answer.text(), body);
    }

    #[tokio::test]
    async fn other_methods_are_refused_with_the_one_allowed() {
        let paths = [
            "/version",
            "/health",
            "/livez",
            "/livez/serializable_read",
            "/readyz",
            "/readyz/non_learner",
            "/debug/vars",
        ];
        for path in paths {
            for method in ["POST", "HEAD", "PUT", "DELETE", "OPTIONS"] {
                let router = client_router(Arc::new(Fake::default()), leaked());
                let answer = send(router, Request::builder().method(method).uri(path)).await;
                let body = if method == "HEAD" { "" } else { "Method Not Allowed\n" };
                assert_eq!(answer.seen(), (405, TEXT, true, body), "{method} {path}");
                assert_eq!(answer.header("allow"), Some("GET"), "{path}");
            }
        }
    }

    #[tokio::test]
    async fn unknown_paths_are_not_found() {
        for path in
            ["/", "/nope", "/health/", "/livez/", "/livez/non_learner", "/readyz/x", "/debug"]
        {
            let answer = get(Fake::default(), path).await;
            assert_eq!(answer.seen(), (404, TEXT, true, "404 page not found\n"), "{path}");
        }
        // The metrics port tells less.
        for path in ["/version", "/debug/vars"] {
            let router = metrics_router(Arc::new(Fake::default()), leaked());
            assert_eq!(send(router, Request::get(path)).await.status, 404, "{path}");
        }
    }

    #[tokio::test]
    async fn health_is_a_sniffed_text_without_newline() {
        let answer = get(Fake::default(), "/health").await;
        assert_eq!(answer.seen(), (200, TEXT, false, r#"{"health":"true","reason":""}"#));
    }

    #[tokio::test]
    async fn health_gives_the_first_reason_and_obeys_its_query() {
        use AlarmType::{Corrupt, Nospace};
        let alarmed = |alarms: &[AlarmType]| Fake { alarms: alarms.into(), ..Fake::default() };
        let no_leader = || Fake { no_leader: true, ..Fake::default() };
        let cases = [
            (alarmed(&[Nospace, Corrupt]), "/health", Some("ALARM NOSPACE")),
            (alarmed(&[Nospace, Corrupt]), "/health?exclude=NOSPACE", Some("ALARM CORRUPT")),
            (alarmed(&[Nospace, Corrupt]), "/health?exclude=NOSPACE&exclude=CORRUPT", None),
            (alarmed(&[Nospace]), "/health?exclude=nospace&exclude=", Some("ALARM NOSPACE")),
            (alarmed(&[AlarmType::None]), "/health", Some("ALARM UNKNOWN")),
            (no_leader(), "/health", Some("RAFT NO LEADER")),
            (no_leader(), "/health?serializable=true", None),
            (no_leader(), "/health?serializable=TRUE", Some("RAFT NO LEADER")),
            (no_leader(), "/health?serializable=1&serializable=true", Some("RAFT NO LEADER")),
            (
                Fake { remote_error: Some("etcdserver: <\"t\">".into()), ..Fake::default() },
                "/health",
                Some(r#"RANGE ERROR:etcdserver: \u003c\"t\"\u003e"#),
            ),
            (
                Fake { remote_error: Some("x".into()), ..Fake::default() },
                "/health?serializable=true",
                None,
            ),
            (Fake { learner: true, ..Fake::default() }, "/health", None),
        ];
        for (fake, path, reason) in cases {
            let metrics = leaked();
            let answer = send(client_router(Arc::new(fake), metrics), Request::get(path)).await;
            let (failures, successes) = match reason {
                Some(reason) => {
                    let body = format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n");
                    assert_eq!(answer.seen(), (503, TEXT, true, body.as_str()), "{path}");
                    (1.0, 0.0)
                }
                None => {
                    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
                    (0.0, 1.0)
                }
            };
            assert_eq!(count(metrics, "etcd_server_health_failures"), Some(failures));
            assert_eq!(count(metrics, "etcd_server_health_success"), Some(successes));
        }
    }

    #[tokio::test]
    async fn health_reads_locally_only_if_asked_to() {
        for (path, serializable) in [("/health", false), ("/health?serializable=true", true)] {
            let fake = Arc::new(Fake::default());
            send(client_router(fake.clone(), leaked()), Request::get(path)).await;
            assert_eq!(*fake.reads.lock().expect("not poisoned"), [serializable], "{path}");
        }
    }

    #[tokio::test]
    async fn probes_say_ok_and_their_checks_when_verbose() {
        for path in ["/livez", "/readyz", "/livez/serializable_read", "/readyz/linearizable_read"] {
            let answer = get(Fake::default(), path).await;
            assert_eq!(answer.seen(), (200, TEXT, true, "ok\n"), "{path}");
        }
        for path in ["/readyz?verbose", "/readyz?verbose=0"] {
            let answer = get(Fake::default(), path).await;
            let body = "[+]data_corruption ok\n[+]serializable_read ok\n[+]linearizable_read ok\n[+]non_learner ok\nok\n";
            assert_eq!(answer.seen(), (200, TEXT, true, body));
        }
        let answer = get(Fake::default(), "/livez/serializable_read?verbose").await;
        assert_eq!(answer.text(), "[+]serializable_read ok\nok\n");
    }

    #[tokio::test]
    async fn a_failed_check_shows_all_lines_and_can_be_excluded() {
        let sick = || Fake {
            alarms: vec![AlarmType::Nospace, AlarmType::Corrupt],
            learner: true,
            remote_error: Some("no leader".into()),
            ..Fake::default()
        };
        let answer = get(sick(), "/readyz").await;
        let body = "[-]data_corruption failed: alarm activated: CORRUPT\n\
                    [+]serializable_read ok\n\
                    [-]linearizable_read failed: no leader\n\
                    [-]non_learner failed: not supported for learner\n\n";
        assert_eq!(answer.seen(), (503, TEXT, true, body));
        let path =
            "/readyz?exclude=data_corruption&exclude=linearizable_read&exclude=nonsense&verbose";
        let answer = get(sick(), path).await;
        let body = "[+]serializable_read ok\n[-]non_learner failed: not supported for learner\n\n";
        assert_eq!((answer.status, answer.text()), (503, body));
        let answer = get(sick(), &format!("{path}&exclude=non_learner")).await;
        assert_eq!((answer.status, answer.text()), (200, "[+]serializable_read ok\nok\n"));
        // A check asked for by name cannot be excluded; livez has no such checks.
        let answer = get(sick(), "/readyz/non_learner?exclude=non_learner").await;
        assert_eq!(answer.status, 503);
        assert_eq!(get(sick(), "/livez").await.status, 200);
        let answer =
            get(Fake { local_error: Some("gone".into()), ..Fake::default() }, "/livez").await;
        assert_eq!((answer.status, answer.text()), (503, "[-]serializable_read failed: gone\n\n"));
    }

    #[tokio::test]
    async fn lack_of_space_fails_no_probe() {
        for path in ["/livez", "/readyz"] {
            let fake = Fake { alarms: vec![AlarmType::Nospace], ..Fake::default() };
            assert_eq!(get(fake, path).await.status, 200, "{path}");
        }
    }

    #[tokio::test]
    async fn every_check_is_counted() {
        let metrics = leaked();
        let fake = Arc::new(Fake { learner: true, ..Fake::default() });
        let router = client_router(fake, metrics);
        send(router.clone(), Request::get("/readyz")).await;
        send(router.clone(), Request::get("/readyz/non_learner")).await;
        send(router, Request::get("/livez")).await;
        let name = "etcd_server_healthcheck";
        for (series, value) in [
            (r#"{name="non_learner",type="readyz"}"#, 0.0),
            (r#"{name="linearizable_read",type="readyz"}"#, 1.0),
            (r#"{name="serializable_read",type="livez"}"#, 1.0),
            (r#"s_total{name="non_learner",status="error",type="readyz"}"#, 2.0),
            (r#"s_total{name="serializable_read",status="success",type="livez"}"#, 1.0),
        ] {
            assert_eq!(count(metrics, &format!("{name}{series}")), Some(value), "{series}");
        }
    }

    #[tokio::test]
    async fn metrics_answer_any_method_and_pack_if_asked() {
        let metrics = leaked();
        metrics.mvcc_put.increment(12);
        let router = metrics_router(Arc::new(Fake::default()), metrics);
        let plain = send(router.clone(), Request::post("/metrics")).await;
        let content_type = "text/plain; version=0.0.4; charset=utf-8";
        assert_eq!((plain.status, plain.header("content-type")), (200, Some(content_type)));
        assert_eq!(plain.header("content-encoding"), None);
        assert!(plain.text().contains("\netcd_mvcc_put_total 12\n"));
        assert!(plain.text().contains("\npromhttp_metric_handler_requests_in_flight 1\n"));

        let request = Request::get("/metrics").header("accept-encoding", "br, gzip;q=0.5");
        let packed = send(router.clone(), request).await;
        assert_eq!(packed.header("content-encoding"), Some("gzip"));
        assert_eq!(packed.header("content-type"), Some(content_type));
        assert!(packed.body.len() * 5 < plain.body.len());
        let mut page = String::new();
        let mut reader = flate2::read::GzDecoder::new(packed.body.as_slice());
        reader.read_to_string(&mut page).expect("it is gzip");
        assert!(page.contains("\npromhttp_metric_handler_requests_total{code=\"200\"} 1\n"));

        let request = Request::get("/metrics").header("accept-encoding", "gzip;q=0, identity");
        assert_eq!(send(router, request).await.header("content-encoding"), None);
    }

    #[tokio::test]
    async fn variables_are_one_json_object() {
        let answer = get(Fake::default(), "/debug/vars").await;
        assert_eq!(answer.header("content-type"), Some("application/json; charset=utf-8"));
        let object: serde_json::Value = serde_json::from_slice(&answer.body).expect("it is JSON");
        assert_eq!(object["cmdline"], serde_json::json!(["quorate", "--name=\"m\""]));
        assert_eq!(object["raft.status"]["raftState"], "StateLeader");
        assert!(object["file_descriptor_limit"].as_u64().expect("a number") > 0);
        assert!(object["memstats"]["Sys"].as_u64().expect("a number") > 0);
    }

    fn guarded(hosts: &[&str], origins: &[&str], auth: bool) -> Router {
        let member: Arc<dyn Member> = Arc::new(Fake { auth, ..Fake::default() });
        let owned = |set: &[&str]| set.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let echo = any(|uri: Uri| async move { uri.to_string() });
        let router = client_router(member.clone(), leaked()).route("/v3/{*rest}", echo);
        ClientRules::new(owned(hosts), owned(origins), member).guard(router)
    }

    #[tokio::test]
    async fn hosts_off_the_list_are_misdirected_in_plaintext_only() {
        let cases = [
            (&["a.example", "::1"][..], "a.example", true, 200),
            (&["a.example", "::1"], "a.example:2379", true, 200),
            (&["a.example", "::1"], "[::1]:2379", true, 200),
            (&["a.example", "::1"], "[::1]", true, 421),
            (&["a.example", "::1"], "evil.example", true, 421),
            (&["a.example", "::1"], "A.example", true, 421),
            (&["a.example", "::1"], "evil.example", false, 200),
            (&["*"], "evil.example", true, 200),
            (&[], "evil.example", true, 200),
        ];
        for (hosts, host, plaintext, status) in cases {
            let router = guarded(hosts, &[], false);
            let mut request = Request::get("/version").header("host", host);
            if !plaintext {
                request = request.extension(OverTls);
            }
            let answer = send(router, request).await;
            assert_eq!(answer.status, status, "{host} of {hosts:?}");
            if status == 421 {
                assert_eq!(answer.header("content-type"), TEXT);
                assert!(answer.text().contains("CVE-2018-5702") && answer.text().contains(host));
            }
        }
        // HTTP/2 and a request in absolute form name the host in the address; without any, none is.
        let router = guarded(&["a.example"], &[], false);
        let request = Request::get("http://a.example:80/version").header("host", "evil.example");
        assert_eq!(send(router.clone(), request).await.status, 200);
        assert_eq!(send(router, Request::get("/version")).await.status, 421);
    }

    #[tokio::test]
    async fn origins_allowed_are_told_so() {
        let cases = [
            (&[][..], None, Some("*")),
            (&["*"], Some("http://b"), Some("*")),
            (&["http://a", "http://b"], Some("http://b"), Some("http://b")),
            (&["http://a"], Some("http://b"), None),
            (&["http://a"], None, None),
        ];
        for (origins, origin, allowed) in cases {
            for method in ["GET", "OPTIONS"] {
                let mut request = Request::builder().method(method).uri("/version");
                if let Some(origin) = origin {
                    request = request.header("origin", origin);
                }
                let answer = send(guarded(&[], origins, false), request).await;
                assert_eq!(answer.status, 200);
                assert_eq!(answer.body.is_empty(), method == "OPTIONS");
                assert_eq!(answer.header("access-control-allow-origin"), allowed, "{origins:?}");
                let [methods, headers] = ["methods", "headers"].map(|n| {
                    answer.header(&format!("access-control-allow-{n}")).map(str::to_owned)
                });
                let told = allowed.is_some();
                assert_eq!(methods, told.then(|| "POST, GET, OPTIONS, PUT, DELETE".into()));
                assert_eq!(headers, told.then(|| "accept, content-type, authorization".into()));
            }
        }
    }

    #[tokio::test]
    async fn options_are_answered_even_for_unknown_paths() {
        let request = Request::builder().method("OPTIONS").uri("/nope");
        let answer = send(guarded(&[], &[], false), request).await;
        assert_eq!((answer.status, answer.text()), (200, ""));
    }

    #[tokio::test]
    async fn old_gateway_paths_are_renamed_once() {
        for (path, seen) in [
            ("/v3beta/kv/range?a=b", "/v3/kv/range?a=b"),
            ("/v3beta/v3beta/x", "/v3/v3beta/x"),
            ("/v3/kv/put", "/v3/kv/put"),
        ] {
            assert_eq!(send(guarded(&[], &[], false), Request::post(path)).await.text(), seen);
        }
        for path in ["/v3alpha/kv/range", "/v3beta"] {
            let answer = send(guarded(&[], &[], false), Request::post(path)).await;
            assert_eq!(answer.status, 404, "{path}");
        }
    }

    #[tokio::test]
    async fn a_certificate_with_a_name_cannot_use_the_gateway_once_auth_is_on() {
        let cases = [
            (true, "/v3/kv/range", "root", 400),
            (true, "/v3beta/kv/range", "root", 400),
            (true, "/v3/kv/range", "", 200),
            (true, "/version", "root", 200),
            (false, "/v3/kv/range", "root", 200),
        ];
        for (auth, path, name, status) in cases {
            let common_name = Some(name.to_owned()).filter(|name| !name.is_empty());
            let request =
                Request::get(path).extension(OverTls).extension(ClientCert { common_name });
            let answer = send(guarded(&[], &[], auth), request).await;
            assert_eq!(answer.status, status, "{path} by {name:?}, auth {auth}");
            if status == 400 {
                assert!(answer.text().starts_with("CommonName of client sending a request"));
            }
        }
    }

    /// Requests that are refused for their heads.
    fn refused_for_their_heads(body: impl Fn() -> Body) -> [(Request, u16); 2] {
        let named = ClientCert { common_name: Some("root".to_owned()) };
        let turned_away = Request::post("/v3/kv/range").extension(OverTls).extension(named);
        let misdirected = Request::post("/v3/kv/range").header("host", "evil.example");
        [(turned_away.body(body()).unwrap(), 400), (misdirected.body(body()).unwrap(), 421)]
    }

    #[tokio::test]
    async fn who_is_refused_for_the_head_of_a_request_may_finish_it() {
        let senders = std::cell::RefCell::new(Vec::new());
        let body = || {
            let (sender, pieces) = tokio::sync::mpsc::unbounded_channel::<&str>();
            senders.borrow_mut().push(sender);
            Body::from_stream(tokio_stream::StreamExt::map(
                tokio_stream::wrappers::UnboundedReceiverStream::new(pieces),
                Ok::<_, std::io::Error>,
            ))
        };
        for (request, status) in refused_for_their_heads(body) {
            let sender = senders.borrow_mut().remove(0);
            let mut router = guarded(&["a.example"], &[], true);
            let mut answer = std::pin::pin!(router.call(request));
            sender.send("{").unwrap();
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(answer.as_mut().poll(&mut context).is_pending(), "{status}");
            sender.send("}").unwrap();
            drop(sender);
            assert_eq!(answer.await.unwrap().status().as_u16(), status);
        }
    }

    #[tokio::test]
    async fn who_is_refused_for_the_head_of_a_request_need_not_finish_it() {
        use futures_util::stream::{self, StreamExt};
        use std::sync::atomic::{AtomicUsize, Ordering};
        let read = Arc::new(AtomicUsize::new(0));
        let endless = || {
            let read = read.clone();
            Body::from_stream(stream::repeat([0; 1024].to_vec()).map(move |piece| {
                read.fetch_add(piece.len(), Ordering::Relaxed);
                Ok::<_, std::io::Error>(piece)
            }))
        };
        for (request, status) in refused_for_their_heads(endless) {
            let answer = guarded(&["a.example"], &[], true).call(request).await.unwrap();
            assert_eq!(answer.status().as_u16(), status);
            assert_eq!(read.swap(0, Ordering::Relaxed), REFUSED_BODY_MAX + 1024);
        }
        let silent = || Body::from_stream(stream::pending::<Result<Vec<u8>, std::io::Error>>());
        for (request, status) in refused_for_their_heads(silent) {
            let answer = guarded(&["a.example"], &[], true).call(request).await.unwrap();
            assert_eq!(answer.status().as_u16(), status);
        }
    }
}
