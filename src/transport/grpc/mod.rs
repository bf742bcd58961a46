//! The gRPC services, and what every call passes through.

pub mod auth;
pub mod cluster;
pub mod deadline;
pub mod defragment;
pub mod election;
pub mod health;
pub mod kv;
pub mod lease;
pub mod lock;
pub mod maintenance;
mod slow;
pub mod watch;

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::Stream;
use futures_util::future::BoxFuture;
use prost::Message;
use tonic::metadata::MetadataMap;
use tonic::{Code, Extensions, Request, Response, Status};

use self::deadline::{Deadline, within};
use crate::metrics::{GrpcCall, Method, Metrics};
use crate::transport::access::Gated;
use crate::transport::budget::Account;
use crate::transport::held;
use crate::transport::identity::{Credentials, Who};
use crate::transport::member::Member;
use crate::transport::status;

/// A response stream as tonic wants it.
pub type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Election timeouts in a row without a leader after which a stream with `hasleader` ends.
const NO_LEADER_TIMEOUTS: u32 = 3;

/// In the extensions of a request that a service of this member makes as a step of a client's call:
/// what concerns the connection has been seen to there (counting, the deadline, `hasleader`).
#[derive(Clone, Copy)]
pub struct Step;

/// The accounting of a call that has come with `extensions`.
fn account(method: Method, extensions: &Extensions, metrics: &'static Metrics) -> GrpcCall {
    match extensions.get::<Step>() {
        None => GrpcCall::start(method, metrics),
        Some(Step) => GrpcCall::step(method, metrics),
    }
}

/// Bytes of a response that are on its connection's account before they are encoded.
const REPLY_HELD_MIN: usize = 16 << 10;

/// The answer to a call for which there is no room.
pub fn crowded() -> Status {
    Status::resource_exhausted("etcdserver: too many requests")
}

/// What the gates of v3-api sections 1 and 7 let through.
fn admit(
    member: &Member,
    metadata: &MetadataMap,
    on_learner: bool,
    stream: bool,
    counted: bool,
) -> Result<(), Status> {
    let version = match metadata.get("client-api-version") {
        None => None,
        // Any UTF-8, not only the visible ASCII that the metadata's own text would be.
        Some(value) => match std::str::from_utf8(value.as_bytes()) {
            Ok(text) => Some(text),
            Err(_) => return Err(status::invalid_client_api_version()),
        },
    };
    if counted {
        member.metrics.count_client_request(stream, version);
    }
    if member.is_stopping() {
        return Err(status::stopped());
    }
    if !on_learner && member.shared.published.load().members.is_learner() {
        return Err(status::not_supported_for_learner());
    }
    if requires_leader(metadata) && member.shared.leader().is_none() {
        return Err(status::no_leader());
    }
    Ok(())
}

/// Whether the call asked to fail when no leader is known.
fn requires_leader(metadata: &MetadataMap) -> bool {
    metadata.get("hasleader").is_some_and(|value| value.as_bytes() == b"true")
}

impl Member {
    /// Runs a unary call: gates, accounting, slow-call warning. `run` is told who calls.
    async fn unary<Q: Message + Gated + 'static, R: Message + 'static, F>(
        self: &Arc<Self>,
        method: Method,
        on_learner: impl FnOnce(&Q) -> bool,
        request: Request<Q>,
        run: impl FnOnce(Q, Who) -> F,
    ) -> Result<Response<R>, Status>
    where
        F: Future<Output = Result<R, Status>>,
    {
        let call = account(method, request.extensions(), self.metrics);
        let started = Instant::now();
        let (metadata, extensions, body) = request.into_parts();
        let account = extensions.get::<Arc<Account>>();
        let (asked, request_bytes) = (slow::Asked::of(&body), body.encoded_len());
        call.received(request_bytes);
        let counted = call.is_counted();
        let result = match admit(self, &metadata, on_learner(&body), false, counted) {
            Ok(()) => {
                let running = async {
                    let credentials = Credentials::of(&metadata, &extensions);
                    let who = self.let_in(credentials, &body).await?;
                    run(body, who).await
                };
                within(deadline::timeout(&metadata), running).await
            }
            Err(status) => Err(status),
        };
        let took = started.elapsed();
        if took > self.limits.warning_unary && !method.waits() {
            let reply = result.as_ref().ok();
            let call = slow::Call {
                method,
                took,
                remote: account.and_then(|account| account.remote()),
                asked: &asked,
                request_bytes,
                code: result.as_ref().map_or_else(Status::code, |_| Code::Ok),
                reply: reply.map(|reply| reply as &dyn Any),
                reply_bytes: reply.map_or(0, Message::encoded_len),
            };
            call.warn();
        }
        match result {
            Ok(reply) => {
                let bytes = reply.encoded_len();
                call.sent(bytes);
                call.finish(Code::Ok);
                let mut response = Response::new(reply);
                if let Some(account) = account.filter(|_| bytes >= REPLY_HELD_MIN) {
                    response.extensions_mut().insert(held::Reply::new(account, bytes));
                }
                Ok(response)
            }
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    /// Opens a stream whose client sends one request: gates and accounting, which ends with the stream.
    /// Answers who calls.
    async fn open_stream<Q: Gated>(
        self: &Arc<Self>,
        method: Method,
        request: &Request<Q>,
        on_learner: bool,
    ) -> Result<(GrpcCall, Who), Status> {
        let call = self.open(method, request, on_learner)?;
        let credentials = Credentials::of(request.metadata(), request.extensions());
        let letting_in = self.let_in(credentials, request.get_ref());
        match within(deadline::timeout(request.metadata()), letting_in).await {
            Ok(who) => Ok((call, who)),
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    /// Opens a stream whose client sends many requests. Each of them has to be let in by the credentials
    /// that this answers.
    fn open_session<S>(
        self: &Arc<Self>,
        method: Method,
        request: &Request<S>,
        on_learner: bool,
    ) -> Result<(GrpcCall, Credentials<String>), Status> {
        let call = self.open(method, request, on_learner)?;
        Ok((call, Credentials::of(request.metadata(), request.extensions()).to_owned()))
    }

    fn open<S>(
        self: &Arc<Self>,
        method: Method,
        request: &Request<S>,
        on_learner: bool,
    ) -> Result<GrpcCall, Status> {
        let call = account(method, request.extensions(), self.metrics);
        match admit(self, request.metadata(), on_learner, true, call.is_counted()) {
            Ok(()) => Ok(call),
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    /// Ends when a stream that requires a leader has gone without one for too long, or when the
    /// member stops. It costs no timer as long as there is a leader.
    fn stream_end(
        self: &Arc<Self>,
        metadata: &MetadataMap,
    ) -> impl Future<Output = Status> + Send + use<> {
        let member = self.clone();
        let leaderless = self.stream_leaderless(metadata);
        async move {
            tokio::select! {
                () = member.stopped() => status::stopped(),
                status = leaderless => status,
            }
        }
    }

    /// Ends when a stream that requires a leader has gone without one for too long.
    fn stream_leaderless(
        self: &Arc<Self>,
        metadata: &MetadataMap,
    ) -> impl Future<Output = Status> + Send + use<> {
        let member = self.clone();
        let requires_leader = requires_leader(metadata);
        async move {
            if !requires_leader {
                return std::future::pending().await;
            }
            let mut leaders = member.shared.raft.leaders.subscribe();
            let gone = "the sender lives in the member";
            loop {
                drop(leaders.wait_for(|leader| leader.0 == 0).await.expect(gone));
                let back = leaders.wait_for(|leader| leader.0 != 0);
                let patience = NO_LEADER_TIMEOUTS * member.limits.election;
                if tokio::time::timeout(patience, back).await.is_err() {
                    return status::no_leader();
                }
            }
        }
    }
}

/// A stream that ends early, with what `end` says.
struct Ending<S> {
    inner: S,
    end: BoxFuture<'static, Status>,
    ended: bool,
}

impl<S> Ending<S> {
    fn new(inner: S, end: impl Future<Output = Status> + Send + 'static) -> Self {
        Ending { inner, end: Box::pin(end), ended: false }
    }
}

impl<T, S: Stream<Item = Result<T, Status>> + Unpin> Stream for Ending<S> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(status) = self.end.as_mut().poll(cx) {
            self.ended = true;
            return Poll::Ready(Some(Err(status)));
        }
        Pin::new(&mut self.inner).poll_next(cx)
    }
}

/// A response stream that counts what it sends and ends the call with its last item, or at the
/// client's deadline.
struct Counted<S> {
    /// `None` once the deadline has passed.
    inner: Option<S>,
    deadline: Deadline,
    call: Option<GrpcCall>,
    metrics: &'static Metrics,
}

impl<S> Counted<S> {
    fn new(inner: S, deadline: Deadline, call: GrpcCall) -> Self {
        Counted { inner: Some(inner), deadline, call: Some(call), metrics: Metrics::global() }
    }
}

impl<T: Message, S: Stream<Item = Result<T, Status>> + Unpin> Stream for Counted<S> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // Whatever could still be sent, nobody waits for it.
        let passed = self.deadline.has_passed(cx);
        let next = match &mut self.inner {
            Some(_) if passed => {
                self.inner = None;
                Some(Err(status::deadline_exceeded()))
            }
            Some(inner) => std::task::ready!(Pin::new(inner).poll_next(cx)),
            None => None,
        };
        if let Some(Ok(message)) = &next {
            if let Some(call) = &self.call {
                call.sent(message.encoded_len());
            }
            return Poll::Ready(next);
        }
        if let Some(call) = self.call.take() {
            let code = match &next {
                Some(Err(status)) => status.code(),
                _ => Code::Ok,
            };
            let api = match call.method() {
                Method::Watch => Some("watch"),
                Method::LeaseKeepAlive => Some("lease-keepalive"),
                _ => None,
            };
            if let Some(api) = api.filter(|_| code != Code::Ok) {
                self.metrics.stream_failures.with(&["send", api]).increment(1);
            }
            call.finish(code);
        }
        Poll::Ready(next)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::core::apply::Machine;
    use crate::core::membership::{Member as Record, Membership, Version};
    use crate::core::types::{ClusterId, MemberId};
    use crate::transport::member::tests::{Silent, silent_over};

    fn member(is_learner: bool) -> Silent {
        let mut members = Membership::new(ClusterId(1), MemberId(1), 1);
        members.restore([Record { id: 1, is_learner, ..Record::default() }], []);
        let machine = Machine::new(members, 2, Version::parse("3.7.1").unwrap());
        silent_over(&machine, Duration::from_secs(60))
    }

    fn with_leader() -> MetadataMap {
        let mut metadata = MetadataMap::new();
        metadata.insert("hasleader", "true".parse().unwrap());
        metadata
    }

    #[test]
    fn calls_pass_the_gates_that_they_ask_for() {
        actix::System::new().block_on(async {
            let voter = member(false).member;
            let text = |result: Result<(), Status>| result.unwrap_err().message().to_string();
            let plain = MetadataMap::new();
            assert!(admit(&voter, &plain, false, false, true).is_ok());
            let refused = admit(&voter, &with_leader(), false, false, true);
            assert_eq!(text(refused), status::no_leader().message());
            voter.shared.set_leader(MemberId(2));
            assert!(admit(&voter, &with_leader(), false, true, true).is_ok());
            let learner = member(true).member;
            let refused = admit(&learner, &plain, false, false, true);
            assert_eq!(text(refused), status::not_supported_for_learner().message());
            assert!(admit(&learner, &plain, true, false, true).is_ok());
        });
    }

    #[test]
    fn a_stream_outlives_a_short_loss_of_the_leader_and_no_longer_one() {
        actix::System::new().block_on(async {
            let member = member(false).member;
            let (shared, election) = (&member.shared, member.limits.election);
            shared.set_leader(MemberId(2));
            let mut careless = Box::pin(member.stream_leaderless(&MetadataMap::new()));
            let mut careful = Box::pin(member.stream_leaderless(&with_leader()));
            let elected = async {
                shared.set_leader(MemberId(0));
                tokio::task::yield_now().await;
                shared.set_leader(MemberId(3));
                // Longer than a stream without a leader lives.
                tokio::time::sleep(2 * NO_LEADER_TIMEOUTS * election).await;
            };
            tokio::select! {
                biased;
                _ = &mut careful => panic!("ended although there is a leader"),
                _ = &mut careless => panic!("never asked for a leader"),
                () = elected => {}
            }
            shared.set_leader(MemberId(0));
            let lost = Instant::now();
            tokio::select! {
                status = &mut careful => {
                    assert_eq!(status.message(), status::no_leader().message());
                }
                _ = &mut careless => panic!("never asked for a leader"),
            }
            assert!(lost.elapsed() >= NO_LEADER_TIMEOUTS * election);
        });
    }
}
