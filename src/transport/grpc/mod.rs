//! The gRPC services, and what every call passes through.

pub mod auth;
pub mod cluster;
pub mod deadline;
pub mod health;
pub mod kv;
pub mod lease;
pub mod maintenance;
pub mod watch;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::Stream;
use prost::Message;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use self::deadline::{Deadline, within};
use crate::config::duration::GoDuration;
use crate::metrics::{GrpcCall, Method, Metrics};
use crate::transport::member::Member;
use crate::transport::status;

/// A response stream as tonic wants it.
pub type Reply<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Consecutive election timeouts without a leader after which a stream with `hasleader` ends.
const NO_LEADER_TIMEOUTS: u32 = 3;

/// What the gates of v3-api sections 1 and 7 let through.
fn admit(
    member: &Member,
    metadata: &MetadataMap,
    on_learner: bool,
    stream: bool,
) -> Result<(), Status> {
    let version = match metadata.get("client-api-version") {
        None => None,
        // Any UTF-8, not only the visible ASCII that the metadata's own text would be.
        Some(value) => match std::str::from_utf8(value.as_bytes()) {
            Ok(text) => Some(text),
            Err(_) => return Err(status::invalid_client_api_version()),
        },
    };
    member.metrics.count_client_request(stream, version);
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
    /// Runs a unary call: gates, accounting, slow-call warning.
    async fn unary<Q: Message, R: Message, F>(
        self: &Arc<Self>,
        method: Method,
        on_learner: impl FnOnce(&Q) -> bool,
        request: Request<Q>,
        run: impl FnOnce(Q) -> F,
    ) -> Result<Response<R>, Status>
    where
        F: Future<Output = Result<R, Status>>,
    {
        let call = GrpcCall::start(method, self.metrics);
        let started = Instant::now();
        let (metadata, _, body) = request.into_parts();
        call.received(body.encoded_len());
        let result = match admit(self, &metadata, on_learner(&body), false) {
            Ok(()) => within(deadline::timeout(&metadata), run(body)).await,
            Err(status) => Err(status),
        };
        let took = started.elapsed();
        if took > self.limits.warning_unary {
            let code = result.as_ref().map_or_else(Status::code, |_| Code::Ok);
            let (service, name, _) = method.parts();
            tracing::warn!(
                "time spent" = %GoDuration::from(took),
                "response type" = %format_args!("/{service}/{name}"),
                "response code" = ?code,
                "request stats"
            );
        }
        match result {
            Ok(reply) => {
                call.sent(reply.encoded_len());
                call.finish(Code::Ok);
                Ok(Response::new(reply))
            }
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    /// Opens a streaming call: gates and accounting. The accounting ends with the stream.
    fn open_stream(
        self: &Arc<Self>,
        method: Method,
        metadata: &MetadataMap,
        on_learner: bool,
    ) -> Result<GrpcCall, Status> {
        let call = GrpcCall::start(method, self.metrics);
        match admit(self, metadata, on_learner, true) {
            Ok(()) => Ok(call),
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    /// Ends when a stream that requires a leader has gone without one for too long, or when the
    /// member stops.
    fn stream_end(
        self: &Arc<Self>,
        metadata: &MetadataMap,
    ) -> impl Future<Output = Status> + Send + use<> {
        let member = self.clone();
        let requires_leader = requires_leader(metadata);
        async move {
            let mut missed = 0;
            loop {
                tokio::select! {
                    () = member.stopped() => return status::stopped(),
                    () = tokio::time::sleep(member.limits.election), if requires_leader => {
                        missed = if member.shared.leader().is_some() { 0 } else { missed + 1 };
                        if missed >= NO_LEADER_TIMEOUTS {
                            return status::no_leader();
                        }
                    }
                }
            }
        }
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
