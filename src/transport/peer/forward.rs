//! Requests that only a leader can answer and that do not travel through raft: keep-alives and times of
//! leases, promotions (v3-api 3.9, 3.10). A follower posts them to a peer URL of the leader.
//!
//! Each thread keeps its connections to the leader open: a keep-alive through a follower then costs one
//! round trip and no handshake.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::SendRequest;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::leasepb;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::client::{self, CallError, Dialer};
use crate::actors::lease::{Remaining, Renewed};
use crate::actors::raft::RequestError;
use crate::config::Url;
use crate::core::lease::LessorError;
use crate::core::membership::Member as Record;
use crate::core::types::{LeaseId, MemberId};
use crate::transport::http::status::{method_not_allowed, text_error};
use crate::transport::member::Member;
use crate::transport::reconfig::{ChangeError, NOT_LEARNER};
use crate::transport::status;

/// The most that a request of another member may hold.
const REQUEST_MAX: usize = 64 * 1024;
/// The pause before a leader that failed to answer is asked again.
const RETRY: Duration = Duration::from_millis(50);
/// Requests of one thread under way to leaders at once; more wait.
const IN_FLIGHT_MAX: usize = 64;
/// Idle connections that a thread keeps to one URL: as many as it can use.
const IDLE_MAX: usize = IN_FLIGHT_MAX;
/// What members tell each other of a lease that does not exist, and of a member that does not lead.
const LEASE_NOT_FOUND: &str = "lease not found";
const NOT_PRIMARY: &str = "not a primary lessor";

const PROTOBUF: HeaderValue = HeaderValue::from_static("application/protobuf");

type Sender = SendRequest<Full<Bytes>>;

/// Connections that a thread has, and who may use them.
struct Pool {
    idle: HashMap<String, Vec<Sender>>,
    places: Arc<Semaphore>,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::new(Pool {
        idle: HashMap::new(),
        places: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
    });
}

fn take_idle(url: &Url) -> Option<Sender> {
    POOL.with_borrow_mut(|pool| {
        let idle = pool.idle.get_mut(url.as_str())?;
        // The newest first: the others grow old and are closed by the other side.
        std::iter::from_fn(|| idle.pop()).find(|sender| !sender.is_closed())
    })
}

fn put_idle(url: &Url, sender: Sender) {
    if sender.is_closed() {
        return;
    }
    POOL.with_borrow_mut(|pool| {
        let idle = pool.idle.entry(url.as_str().to_string()).or_default();
        idle.retain(|sender| !sender.is_closed());
        if idle.len() < IDLE_MAX {
            idle.push(sender);
        }
    });
}

/// Posts `body` to `path` at `url`. It may arrive twice, so it has to be idempotent.
async fn post(
    dialer: &Dialer,
    url: &Url,
    path: &'static str,
    body: Bytes,
) -> Result<http::Response<Bytes>, CallError> {
    let places = POOL.with_borrow(|pool| pool.places.clone());
    let _place = places.acquire().await.expect("the semaphore is never closed");
    let request = || {
        Request::post(path)
            .header(header::CONTENT_TYPE, PROTOBUF)
            .body(Full::new(body.clone()))
            .expect("a constant path makes a request")
    };
    if let Some(mut sender) = take_idle(url) {
        // The other side may just have closed it.
        if sender.ready().await.is_ok()
            && let Ok(answer) = client::send(&mut sender, url, request()).await
        {
            put_idle(url, sender);
            return Ok(answer);
        }
    }
    let (mut sender, _) = client::open(dialer, url).await?;
    let answer = client::send(&mut sender, url, request()).await?;
    put_idle(url, sender);
    Ok(answer)
}

/// Why the leader gave no answer in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NoAnswer {
    /// None is known.
    NoLeader,
    /// It was asked, and asked again.
    TimedOut,
}

impl From<NoAnswer> for tonic::Status {
    fn from(error: NoAnswer) -> Self {
        match error {
            NoAnswer::NoLeader => status::no_leader(),
            NoAnswer::TimedOut => status::timeout(),
        }
    }
}

impl Member {
    /// The leader and where it is reached; waits until there is one.
    async fn leader_urls(&self, deadline: Instant) -> Result<(MemberId, Vec<Url>), NoAnswer> {
        loop {
            let leader = tokio::time::timeout_at(deadline, self.shared.leader_that(|_| true)).await;
            let leader = leader.map_err(|_| NoAnswer::NoLeader)?;
            let now = self.shared.published.load();
            let known = now.members.get(leader);
            // URLs come from the log, and what does not parse cannot be dialled.
            let urls: Vec<Url> = known
                .into_iter()
                .flat_map(|leader| &leader.peer_urls)
                .filter_map(|url| Url::parse(url).ok())
                .collect();
            drop(now);
            if !urls.is_empty() {
                return Ok((leader, urls));
            }
            // This member has not applied the leader's addition yet.
            if Instant::now() + RETRY >= deadline {
                return Err(NoAnswer::NoLeader);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Asks the leader of the moment until `ask` has an answer: an answer of `None` is none. Ends early,
    /// with `None`, if this member leads itself.
    async fn ask_leader<T, F>(
        &self,
        deadline: Instant,
        ask: impl Fn(Url) -> F,
    ) -> Result<Option<T>, NoAnswer>
    where
        F: Future<Output = Option<T>>,
    {
        loop {
            let (leader, urls) = self.leader_urls(deadline).await?;
            if leader == self.shared.member_id {
                return Ok(None);
            }
            let asking = async {
                for url in urls {
                    if let Some(answer) = ask(url).await {
                        return Some(answer);
                    }
                }
                None
            };
            let answered = tokio::select! {
                answered = asking => answered,
                // A leader that hangs is not waited for once there is another.
                _ = self.shared.leader_that(|other| other != leader) => continue,
                () = tokio::time::sleep_until(deadline) => return Err(NoAnswer::TimedOut),
            };
            if answered.is_some() {
                return Ok(answered);
            }
            if Instant::now() + RETRY >= deadline {
                return Err(NoAnswer::TimedOut);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.limits.request_timeout
    }

    /// Renews a lease if this member leads, and is sure of it.
    async fn renew_here(self: &Arc<Self>, id: LeaseId) -> Result<Renewed, RequestError> {
        let known =
            self.limits.fast_keep_alive && self.shared.published.load().leases.get(id).is_some();
        if !known {
            self.wait_applied().await?;
        }
        self.renew(id).await
    }

    /// Renews a lease here or at the leader; answers its TTL, 0 if there is no such lease.
    ///
    /// # Errors
    /// What the client is told.
    pub async fn keep_alive(self: &Arc<Self>, id: LeaseId) -> Result<i64, tonic::Status> {
        let deadline = self.deadline();
        loop {
            if self.shared.raft.leading.load(Ordering::Acquire) {
                if !self.leads().await {
                    return Err(status::not_primary());
                }
                match self.renew_here(id).await? {
                    Renewed::Ttl(ttl) => return Ok(ttl),
                    Renewed::Gone => return Ok(0),
                    // The first entry of its term is not applied yet, or it leads no more.
                    Renewed::NotPrimary if Instant::now() + RETRY >= deadline => {
                        return Err(status::no_leader());
                    }
                    Renewed::NotPrimary => {
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                }
            }
            let dialer = &self.dialer;
            let body: Bytes = pb::LeaseKeepAliveRequest { id: id.0 }.encode_to_vec().into();
            let renewed =
                self.ask_leader(deadline, |url| {
                    let body = body.clone();
                    async move {
                        answered(&url, post(dialer, &url, "/leases", body).await, renewal(id))
                    }
                });
            if let Some(ttl) = renewed.await? {
                return Ok(ttl);
            }
        }
    }

    /// What is left of a lease, here or at the leader; `None` if there is no such lease. The answer has
    /// no header.
    ///
    /// # Errors
    /// What the client is told.
    pub async fn time_to_live(
        self: &Arc<Self>,
        request: pb::LeaseTimeToLiveRequest,
    ) -> Result<Option<pb::LeaseTimeToLiveResponse>, tonic::Status> {
        let deadline = self.deadline();
        loop {
            if self.shared.raft.leading.load(Ordering::Acquire) {
                if !self.leads().await {
                    return Err(status::not_primary());
                }
                self.wait_applied().await?;
                match self.time_to_live_here(request).await? {
                    Ok(left) => return Ok(left),
                    Err(NotPrimary) if !self.shared.raft.leading.load(Ordering::Acquire) => {
                        return Err(status::leader_changed());
                    }
                    Err(NotPrimary) if Instant::now() + RETRY >= deadline => {
                        return Err(status::no_leader());
                    }
                    Err(NotPrimary) => {
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                }
            }
            let dialer = &self.dialer;
            let wrapped =
                leasepb::LeaseInternalRequest { lease_time_to_live_request: Some(request) };
            let body: Bytes = wrapped.encode_to_vec().into();
            let asked = self.ask_leader(deadline, |url| {
                let body = body.clone();
                async move {
                    let answer = post(dialer, &url, "/leases/internal", body).await;
                    answered(&url, answer, time_left(request.id))
                }
            });
            if let Some(left) = asked.await? {
                return Ok(left);
            }
        }
    }

    /// What the lessor of this member says of a lease, and what is attached to it.
    async fn time_to_live_here(
        &self,
        request: pb::LeaseTimeToLiveRequest,
    ) -> Result<Result<Option<pb::LeaseTimeToLiveResponse>, NotPrimary>, RequestError> {
        let id = LeaseId(request.id);
        let left = self.leases.send(Remaining(id)).await.map_err(|_| RequestError::Stopped)?;
        let ttl = match left {
            Ok(left) => left,
            Err(LessorError::Unknown(_)) => return Ok(Ok(None)),
            Err(LessorError::NotPrimary) => return Ok(Err(NotPrimary)),
        };
        let now = self.shared.published.load();
        // One that has just been revoked is unknown.
        Ok(Ok(now.leases.get(id).map(|lease| pb::LeaseTimeToLiveResponse {
            header: None,
            id: request.id,
            ttl,
            granted_ttl: lease.ttl,
            keys: if request.keys { lease.keys().cloned().collect() } else { Vec::new() },
        })))
    }
}

/// This member's lessor does not keep the time.
struct NotPrimary;

/// What `read` makes of an answer with status 200, `gone` of one with 404; a failure is logged.
fn answered<T>(
    url: &Url,
    answer: Result<http::Response<Bytes>, CallError>,
    read: impl FnOnce(Option<Bytes>) -> Option<T>,
) -> Option<T> {
    let read = match answer {
        Ok(answer) if answer.status() == StatusCode::OK => read(Some(answer.into_body())),
        Ok(answer) if answer.status() == StatusCode::NOT_FOUND => read(None),
        Ok(answer) => {
            let text = String::from_utf8_lossy(answer.body());
            let text = text.trim_end();
            tracing::debug!(url = url.as_str(), status = %answer.status(), text, "leader refused");
            return None;
        }
        Err(error) => {
            let error = crate::actors::exit::full(&error);
            tracing::debug!(url = url.as_str(), error, "failed to ask the leader");
            return None;
        }
    };
    if read.is_none() {
        tracing::warn!(url = url.as_str(), "leader's answer does not fit the question");
    }
    read
}

/// The TTL in the answer to a keep-alive of lease `id`.
fn renewal(id: LeaseId) -> impl FnOnce(Option<Bytes>) -> Option<i64> {
    move |body| {
        let Some(body) = body else { return Some(0) };
        let reply = pb::LeaseKeepAliveResponse::decode(body).ok()?;
        (reply.id == id.0).then_some(reply.ttl)
    }
}

/// The answer to a question for lease `id`.
fn time_left(id: i64) -> impl FnOnce(Option<Bytes>) -> Option<Option<pb::LeaseTimeToLiveResponse>> {
    move |body| {
        let Some(body) = body else { return Some(None) };
        let reply = leasepb::LeaseInternalResponse::decode(body).ok()?;
        let reply = reply.lease_time_to_live_response?;
        (reply.id == id).then_some(Some(reply))
    }
}

/// Has the leader promote learner `id`; answers the members after that.
///
/// # Errors
/// `NotFound`, `NotLearner`, `NotReady` as the leader says; `NoLeader`; `TimedOut`.
pub async fn promote(member: &Arc<Member>, id: MemberId) -> Result<Vec<Record>, ChangeError> {
    let (deadline, dialer) = (member.deadline(), &member.dialer);
    let path = format!("/members/promote/{}", id.0);
    let asked = member.ask_leader(deadline, |url| {
        let path = path.clone();
        async move {
            let request = Request::post(path).body(Full::default());
            let request = request.expect("a path of digits makes a request");
            let left = deadline.saturating_duration_since(Instant::now());
            promotion(&url, client::call(dialer, &url, request, left).await)
        }
    });
    match asked.await {
        Ok(Some(answer)) => answer,
        // This member leads now.
        Ok(None) => Box::pin(member.promote_member(id)).await,
        Err(NoAnswer::NoLeader) => Err(ChangeError::NoLeader),
        Err(NoAnswer::TimedOut) => Err(RequestError::TimedOut.into()),
    }
}

/// What the leader's answer to a promotion says; `None` if it is to be asked again.
fn promotion(
    url: &Url,
    answer: Result<http::Response<Bytes>, CallError>,
) -> Option<Result<Vec<Record>, ChangeError>> {
    if let Ok(answer) = &answer
        && answer.status() == StatusCode::PRECONDITION_FAILED
    {
        let text = String::from_utf8_lossy(answer.body());
        if text.contains(status::learner_not_ready().message()) {
            return Some(Err(ChangeError::NotReady));
        }
        if text.contains(NOT_LEARNER) {
            return Some(Err(ChangeError::NotLearner));
        }
    }
    answered(url, answer, |body| match body {
        None => Some(Err(ChangeError::NotFound)),
        Some(body) => serde_json::from_slice(&body).ok().map(Ok),
    })
}

/// Answers `/leases`, `/leases/internal` and `/members/promote/<id>` (operations 3.3).
pub fn router(member: Arc<Member>) -> Router {
    Router::new()
        .route("/leases", any(renew))
        .route("/leases/internal", any(time_to_live))
        .route("/members/promote/{id}", any(promote_member))
        .with_state(member)
}

/// The body of a request for a leader; else what is wrong with the request.
async fn posted<T: prost::Message + Default>(request: Request<Body>) -> Result<T, Response> {
    if request.method() != Method::POST {
        return Err(method_not_allowed("POST"));
    }
    let body = Limited::new(request.into_body(), REQUEST_MAX).collect().await;
    let body = body.map_err(|error| {
        if error.is::<LengthLimitError>() {
            text_error(StatusCode::PAYLOAD_TOO_LARGE, "request body is too large")
        } else {
            text_error(StatusCode::BAD_REQUEST, "error reading body")
        }
    })?;
    T::decode(body.to_bytes())
        .map_err(|_| text_error(StatusCode::BAD_REQUEST, "error unmarshalling request"))
}

fn refused(error: &RequestError) -> Response {
    match error {
        RequestError::NotApplied => text_error(
            StatusCode::REQUEST_TIMEOUT,
            "waiting for node to catch up its applied index has timed out",
        ),
        error => text_error(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

fn protobuf(message: &impl prost::Message) -> Response {
    ([(header::CONTENT_TYPE, PROTOBUF)], message.encode_to_vec()).into_response()
}

async fn renew(State(member): State<Arc<Member>>, request: Request<Body>) -> Response {
    let request: pb::LeaseKeepAliveRequest = match posted(request).await {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    // A member that has lost its leadership without knowing must not give a lease more time.
    if !member.leads().await {
        return text_error(StatusCode::BAD_REQUEST, NOT_PRIMARY);
    }
    match member.renew_here(LeaseId(request.id)).await {
        Ok(Renewed::Ttl(ttl)) => {
            protobuf(&pb::LeaseKeepAliveResponse { header: None, id: request.id, ttl })
        }
        Ok(Renewed::Gone) => text_error(StatusCode::NOT_FOUND, LEASE_NOT_FOUND),
        Ok(Renewed::NotPrimary) => text_error(StatusCode::BAD_REQUEST, NOT_PRIMARY),
        Err(error) => refused(&error),
    }
}

async fn time_to_live(State(member): State<Arc<Member>>, request: Request<Body>) -> Response {
    let request: leasepb::LeaseInternalRequest = match posted(request).await {
        Ok(request) => request,
        Err(refusal) => return refusal,
    };
    let Some(request) = request.lease_time_to_live_request else {
        return text_error(StatusCode::BAD_REQUEST, "error unmarshalling request");
    };
    if !member.leads().await {
        return text_error(StatusCode::INTERNAL_SERVER_ERROR, NOT_PRIMARY);
    }
    let left = async {
        member.wait_applied().await?;
        member.time_to_live_here(request).await
    };
    match left.await {
        Ok(Ok(Some(mut left))) => {
            // Present and empty: a follower of etcd's fills it in without looking.
            left.header = Some(pb::ResponseHeader::default());
            let lease_time_to_live_response = Some(left);
            protobuf(&leasepb::LeaseInternalResponse { lease_time_to_live_response })
        }
        Ok(Ok(None)) => text_error(StatusCode::NOT_FOUND, LEASE_NOT_FOUND),
        Ok(Err(NotPrimary)) => text_error(StatusCode::INTERNAL_SERVER_ERROR, NOT_PRIMARY),
        Err(error) => refused(&error),
    }
}

async fn promote_member(
    State(member): State<Arc<Member>>,
    Path(id): Path<String>,
    method: Method,
) -> Response {
    if method != Method::POST {
        return method_not_allowed("POST");
    }
    let mut response = match id.parse() {
        Err(_) => {
            let text = format!("member {id} not found in cluster");
            text_error(StatusCode::NOT_FOUND, &text)
        }
        Ok(id) => match member.promote_member(MemberId(id)).await {
            Ok(members) => {
                let mut json = serde_json::to_string(&members).expect("members are always JSON");
                json.push('\n');
                let kind = HeaderValue::from_static("application/json");
                ([(header::CONTENT_TYPE, kind)], json).into_response()
            }
            Err(error @ ChangeError::NotFound) => text_error(StatusCode::NOT_FOUND, &error.text()),
            Err(error @ (ChangeError::NotLearner | ChangeError::NotReady)) => {
                text_error(StatusCode::PRECONDITION_FAILED, &error.text())
            }
            Err(error) => {
                tracing::warn!(error = error.text(), "failed to promote a member");
                let kind = HeaderValue::from_static("application/json");
                let body = "{\"message\":\"Internal Server Error\"}\n";
                (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, kind)], body)
                    .into_response()
            }
        },
    };
    let cluster = HeaderValue::from_str(&member.shared.cluster_id.to_string());
    response.headers_mut().insert("X-Etcd-Cluster-ID", cluster.expect("hex is a header value"));
    response
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use actix::Arbiter;
    use tokio::sync::watch;

    use super::*;
    use crate::actors::lease::{LeaseManager, Promoted};
    use crate::actors::raft::RaftActor;
    use crate::actors::spawn::Seat;
    use crate::core::apply::Machine;
    use crate::core::lease::LessorOptions;
    use crate::core::membership::{Membership, Version};
    use crate::core::types::{ClusterId, Term};
    use crate::transport::listener::{self, Bound, Served, Workers, accept};
    use crate::transport::member::tests::{Silent, silent_over};
    use crate::transport::socket::Security;

    const LEASE: LeaseId = LeaseId(7);
    const PATIENCE: Duration = Duration::from_secs(30);

    fn port() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        (listener, url)
    }

    /// Member `id` of those at `urls`, by ID from 1 on. It knows lease 7 of 60 s, with a key.
    fn member(id: u64, urls: &[&str], timeout: Duration) -> Silent {
        let mut members = Membership::new(ClusterId(1), MemberId(id), 1);
        let records = urls.iter().zip(1..).map(|(url, id)| Record {
            id,
            peer_urls: vec![url.to_string()],
            ..Record::default()
        });
        members.restore(records.collect::<Vec<_>>(), []);
        let mut machine = Machine::new(members, 2, Version::parse("3.7.1").unwrap());
        machine.leases.grant(LEASE, 60).unwrap();
        machine.leases.attach(b"key", LEASE).unwrap();
        silent_over(&machine, timeout)
    }

    /// Makes a silent member lead, with its leases, and serve on `listener`.
    fn lead(silent: Silent, listener: TcpListener) -> Leader {
        let Silent { member, raft, leases, .. } = silent;
        let (shared, to_raft) = (member.shared.clone(), raft.addr());
        shared.set_leader(shared.member_id);
        shared.raft.term.store(1, Ordering::Release);
        let manager = leases.addr();
        leases.start_in(&Arbiter::current(), move || {
            let options = LessorOptions::default();
            LeaseManager::new(shared, to_raft, options, Duration::from_millis(10))
        });
        manager.do_send(Promoted(Term(1)));
        let options = listener::Options {
            max_concurrent_streams: 1,
            keepalive_min_time: Duration::ZERO,
            keepalive_interval: Duration::ZERO,
            keepalive_timeout: Duration::ZERO,
            receive_max: 0,
            reuse_port: false,
            reuse_address: false,
            write_timeout: None,
            connection_age: None,
            connection_age_grace: None,
        };
        let workers = Workers::new(vec![Arbiter::current()], 16);
        let stop = watch::Sender::new(false);
        let served = Served { grpc: None, http: Some(router(member)) };
        let bound = Bound::Tcp(listener);
        let accepting =
            accept(bound, served, Security::Clear, workers.clone(), options, stop.subscribe());
        actix::spawn(async move { accepting.await.expect("a listener on the loopback accepts") });
        Leader { workers, _stop: stop, _raft: raft }
    }

    /// What a leader serves with.
    struct Leader {
        workers: Workers,
        _stop: watch::Sender<bool>,
        _raft: Seat<RaftActor>,
    }

    fn asks(id: i64, keys: bool) -> pb::LeaseTimeToLiveRequest {
        pb::LeaseTimeToLiveRequest { id, keys }
    }

    #[test]
    fn a_follower_asks_the_leader_over_one_connection() {
        actix::System::new().block_on(async {
            let (listener, url) = port();
            let urls = [url.as_str(), "http://127.0.0.1:1"];
            let leader = lead(member(1, &urls, PATIENCE), listener);
            let follower = member(2, &urls, PATIENCE).member;
            follower.shared.set_leader(MemberId(1));
            for _ in 0..20 {
                assert_eq!(follower.keep_alive(LEASE).await.unwrap(), 60);
            }
            assert_eq!(follower.keep_alive(LeaseId(8)).await.unwrap(), 0);
            let left = follower.time_to_live(asks(7, true)).await.unwrap().unwrap();
            assert_eq!((left.id, left.granted_ttl, left.keys), (7, 60, vec!["key".into()]));
            assert!((58..=60).contains(&left.ttl), "{}", left.ttl);
            let left = follower.time_to_live(asks(7, false)).await.unwrap().unwrap();
            assert_eq!(left.keys, [""; 0]);
            assert_eq!(follower.time_to_live(asks(8, false)).await.unwrap(), None);
            assert_eq!(leader.workers.connections(), 1);
        });
    }

    #[test]
    fn a_leader_that_hangs_is_left_for_the_next_one() {
        actix::System::new().block_on(async {
            // This one accepts, by its backlog, and never answers.
            let (_hung, hung) = port();
            let (listener, url) = port();
            let urls = [hung.as_str(), url.as_str(), "http://127.0.0.1:1"];
            let _leader = lead(member(2, &urls, PATIENCE), listener);
            let follower = member(3, &urls, PATIENCE).member;
            follower.shared.set_leader(MemberId(1));
            let renewing = tokio::spawn({
                let follower = follower.clone();
                async move { follower.keep_alive(LEASE).await }
            });
            tokio::task::yield_now().await;
            follower.shared.set_leader(MemberId(0));
            follower.shared.set_leader(MemberId(2));
            let started = Instant::now();
            assert_eq!(renewing.await.unwrap().unwrap(), 60);
            assert!(started.elapsed() < PATIENCE / 2);
        });
    }

    #[test]
    fn without_an_answer_the_client_is_told_why() {
        actix::System::new().block_on(async {
            let timeout = Duration::from_millis(200);
            let (_hung, hung) = port();
            let urls = [hung.as_str(), "http://127.0.0.1:1"];
            let follower = member(2, &urls, timeout).member;
            let message = |status: tonic::Status| status.message().to_string();
            let id = MemberId(9);
            let none = follower.keep_alive(LEASE).await.map_err(message);
            assert_eq!(none.unwrap_err(), status::no_leader().message());
            let none = follower.time_to_live(asks(7, false)).await.map_err(message);
            assert_eq!(none.unwrap_err(), status::no_leader().message());
            assert!(matches!(promote(&follower, id).await, Err(ChangeError::NoLeader)));
            follower.shared.set_leader(MemberId(1));
            let none = follower.keep_alive(LEASE).await.map_err(message);
            assert_eq!(none.unwrap_err(), status::timeout().message());
            let asked = promote(&follower, id).await;
            assert!(matches!(asked, Err(ChangeError::Request(RequestError::TimedOut))));
        });
    }

    async fn said(url: &str, method: Method, path: &str, body: Vec<u8>) -> (u16, String) {
        let request = Request::builder().method(method).uri(path);
        let request = request.body(Full::from(body)).unwrap();
        let dialer = Dialer::clear(PATIENCE);
        let url = Url::parse(url).unwrap();
        let answer = client::call(&dialer, &url, request, PATIENCE).await.unwrap();
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        (answer.status().as_u16(), text)
    }

    #[test]
    fn refusals_are_those_of_the_protocol() {
        actix::System::new().block_on(async {
            let (listener, url) = port();
            let silent = member(1, &[&url], PATIENCE);
            let shared = silent.member.shared.clone();
            let _leader = lead(silent, listener);
            let renew = |id| pb::LeaseKeepAliveRequest { id }.encode_to_vec();
            let internal = |request| {
                leasepb::LeaseInternalRequest { lease_time_to_live_request: request }
                    .encode_to_vec()
            };
            let post = Method::POST;
            let about = internal(Some(asks(8, false)));
            for (method, path, body, code, text) in [
                (Method::GET, "/leases", vec![], 405, "Method Not Allowed"),
                (Method::PUT, "/leases/internal", vec![], 405, "Method Not Allowed"),
                (Method::GET, "/members/promote/1", vec![], 405, "Method Not Allowed"),
                (post.clone(), "/leases", vec![0xff], 400, "error unmarshalling request"),
                (post.clone(), "/leases/internal", vec![], 400, "error unmarshalling request"),
                (post.clone(), "/leases", vec![0; 65537], 413, "request body is too large"),
                (post.clone(), "/leases", renew(8), 404, LEASE_NOT_FOUND),
                (post.clone(), "/leases/internal", about.clone(), 404, LEASE_NOT_FOUND),
                (post.clone(), "/members/promote/x", vec![], 404, "member x not found in cluster"),
            ] {
                let answer = said(&url, method.clone(), path, body).await;
                assert_eq!(answer, (code, format!("{text}\n")), "{method} {path}");
            }
            // A leader that lags, and one that leads no more.
            shared.raft.committed.store(1, Ordering::Release);
            let (code, _) = said(&url, post.clone(), "/leases/internal", about.clone()).await;
            assert_eq!(code, 408);
            let (code, text) = said(&url, post.clone(), "/leases", renew(7)).await;
            assert_eq!(code, 200, "a known lease does not wait: {text}");
            shared.set_leader(MemberId(2));
            let not_primary = format!("{NOT_PRIMARY}\n");
            let answer = said(&url, post.clone(), "/leases", renew(7)).await;
            assert_eq!(answer, (400, not_primary.clone()));
            let answer = said(&url, post.clone(), "/leases/internal", about).await;
            assert_eq!(answer, (500, not_primary));
        });
    }

    #[test]
    fn answers_to_promotions_are_understood() {
        let url = Url::parse("http://127.0.0.1:1").unwrap();
        let said = |status: u16, body: &'static str| {
            let answer =
                http::Response::builder().status(status).body(Bytes::from_static(body.as_bytes()));
            promotion(&url, Ok(answer.unwrap()))
        };
        let members = said(200, r#"[{"id":5,"peerURLs":["http://h:1"],"name":"m"}]"#);
        assert_eq!(members.unwrap().unwrap()[0].id, 5);
        assert!(matches!(said(404, "membership: ID not found"), Some(Err(ChangeError::NotFound))));
        let ready = "etcdserver: can only promote a learner member which is in sync with leader\n";
        assert!(matches!(said(412, ready), Some(Err(ChangeError::NotReady))));
        let learner = "membership: can only promote a learner member\n";
        assert!(matches!(said(412, learner), Some(Err(ChangeError::NotLearner))));
        for (status, body) in [(200, "{"), (412, "something else"), (500, "{}"), (408, "")] {
            assert!(said(status, body).is_none(), "{status}");
        }
    }
}
