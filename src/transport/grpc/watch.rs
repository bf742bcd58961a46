//! `etcdserverpb.Watch` (v3-api 3.8): a stream's requests to the hub, the hub's responses to the stream.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::BoxFuture;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tonic::{Request, Response, Status, Streaming};

use super::deadline::Deadline;
use super::{Counted, Reply};
use crate::actors::watch::{Ask, Close, Delivered, HasRoom, Open};
use crate::core::watch::{CancelReason, StreamId};
use crate::metrics::Method;
use crate::transport::member::Member;

/// The service.
#[derive(Clone)]
pub struct Watch(pub Arc<Member>);

/// Responses after which the hub is given their room back: a quarter of a stream's room, so that a
/// stream that is read never runs out, and few messages are needed.
const CREDIT: usize = 32;
/// The same for the bytes in them: the hub bounds those too, so a few great responses must give their
/// room back as well, or the stream would wait for ever.
const CREDIT_BYTES: usize = 4 << 20;
/// The pause before a client that sends requests and reads no answers is listened to again.
const ROOM_POLL: Duration = Duration::from_millis(10);

/// The hub's side of a stream; the hub forgets it when this is dropped.
struct Responses {
    member: Arc<Member>,
    stream: StreamId,
    responses: mpsc::UnboundedReceiver<pb::WatchResponse>,
    end: BoxFuture<'static, Status>,
    delivered: usize,
    delivered_bytes: usize,
    /// Reads the client's requests.
    reader: AbortHandle,
    ended: bool,
}

impl Stream for Responses {
    type Item = Result<pb::WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match self.responses.poll_recv(cx) {
            Poll::Ready(Some(mut response)) => {
                self.delivered += 1;
                let kvs = response.events.iter().flat_map(|e| e.kv.iter().chain(&e.prev_kv));
                self.delivered_bytes += kvs.map(|kv| kv.0.len()).sum::<usize>();
                if self.delivered >= CREDIT || self.delivered_bytes >= CREDIT_BYTES {
                    let count = std::mem::take(&mut self.delivered);
                    self.delivered_bytes = 0;
                    self.member.watch.do_send(Delivered { stream: self.stream, count });
                }
                let revision = response.header.map_or(0, |header| header.revision);
                response.header = self.member.header(revision);
                Poll::Ready(Some(Ok(response)))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                let status = std::task::ready!(self.end.as_mut().poll(cx));
                self.ended = true;
                Poll::Ready(Some(Err(status)))
            }
        }
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        // Whatever else the client sends is for nobody: as long as someone reads it, its stream stays open.
        self.reader.abort();
        self.member.watch.do_send(Close(self.stream));
    }
}

/// A refusal as etcd puts it into a response: clients compare it with this text (v3-api 3.8).
fn in_words(status: &Status) -> String {
    // The name of a code is the same there as here.
    format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
}

#[tonic::async_trait]
impl pb::watch_server::Watch for Watch {
    type WatchStream = Reply<pb::WatchResponse>;

    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let member = self.0.clone();
        let (call, credentials) = member.open_session(Method::Watch, &request, false)?;
        let end = Box::pin(member.stream_end(request.metadata()));
        let deadline = Deadline::of(request.metadata());
        let stream = StreamId(member.next_stream.fetch_add(1, Ordering::Relaxed));
        let (sender, responses) = mpsc::unbounded_channel();
        member.watch.do_send(Open { stream, responses: sender });

        let received = call.receiver();
        let (asks, hub) = (member.clone(), member.watch.clone());
        let mut requests = request.into_inner();
        let reader = actix::spawn(async move {
            // A client that closes its side goes on receiving; one that is gone drops `Responses`.
            while let Ok(Some(request)) = requests.message().await {
                received.count(request.encoded_len());
                let permission = match &request.request_union {
                    Some(RequestUnion::CreateRequest(create)) => {
                        asks.let_in(credentials.borrowed(), create).await.map(|_| ())
                    }
                    // Whoever opened the stream may look after its watchers.
                    _ => Ok(()),
                };
                let permission = permission.map_err(|status| CancelReason(in_words(&status)));
                let mut room = hub.send(Ask { stream, request, permission }).await;
                while matches!(room, Ok(false)) {
                    tokio::time::sleep(ROOM_POLL).await;
                    room = hub.send(HasRoom(stream)).await;
                }
                if room.is_err() {
                    return;
                }
            }
        });
        let responses = Responses {
            member,
            stream,
            responses,
            end,
            delivered: 0,
            delivered_bytes: 0,
            reader: reader.abort_handle(),
            ended: false,
        };
        Ok(Response::new(Box::pin(Counted::new(responses, deadline, call))))
    }
}
