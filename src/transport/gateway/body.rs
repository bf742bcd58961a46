//! Requests out of the bytes of a body, which come when they come.

use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame};
use prost::Message;
use quorate_proto::json::{self, Json, Scanner};
use tokio::sync::oneshot;
use tonic::codec::{DecodeBuf, Decoder};
use tonic::{Status, Streaming};

use super::too_large;
use crate::transport::budget::Account;
use crate::transport::held::Unfinished;
use crate::transport::status;

/// Bytes of JSON that a byte of a message may take: base64 makes four of three, and a value is most of
/// a request that is near its limit.
const BYTES_PER_BYTE: usize = 2;

/// Bytes that are read for nothing. Whoever sends more is disconnected once the call has ended.
const DISCARDED_MAX: usize = 1 << 20;

/// JSON values that follow each other in a body.
pub struct Values {
    body: Body,
    /// Of the last part of the body, what was not looked at yet.
    part: Bytes,
    /// What has come of a value before that part.
    begun: BytesMut,
    /// Holds that on the connection's account.
    unfinished: Option<Unfinished>,
    scanner: Scanner,
    bytes_max: usize,
    ended: bool,
    gone: Option<oneshot::Sender<()>>,
}

/// Whether the client has gone away before it had sent its request.
pub struct Gone(Option<oneshot::Receiver<()>>);

impl Gone {
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(gone) = &mut self.0 else { return Poll::Pending };
        if ready!(Pin::new(gone).poll(cx)).is_ok() {
            return Poll::Ready(());
        }
        // It has sent all of it.
        self.0 = None;
        Poll::Pending
    }

    /// Does `work` unless the client goes away.
    ///
    /// # Errors
    /// `Canceled` then, which nobody reads; else what `work` answers.
    pub async fn unless<T>(
        &mut self,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        tokio::select! {
            biased;
            done = work => done,
            () = poll_fn(|cx| self.poll(cx)) => Err(status::canceled()),
        }
    }
}

impl Values {
    /// `receive_max` is the greatest message, in bytes of its gRPC form.
    pub fn new(body: Body, receive_max: usize, account: Option<Arc<Account>>) -> Self {
        Values {
            body,
            part: Bytes::new(),
            begun: BytesMut::new(),
            unfinished: account.map(Unfinished::new),
            scanner: Scanner::default(),
            bytes_max: receive_max.saturating_mul(BYTES_PER_BYTE),
            ended: false,
            gone: None,
        }
    }

    /// The next message; `None` if there is nothing more.
    ///
    /// # Errors
    /// What is wrong with it. Nothing that comes after it is read.
    pub async fn next<T: Json>(&mut self) -> Result<Option<T>, Status> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Goes on reading what is of no more interest, to notice when nobody waits for the call any more.
    pub fn discard(mut self) -> Gone {
        let gone = self.watch();
        if gone.0.is_some() {
            actix::spawn(self.read_out());
        }
        gone
    }

    /// Tells from now on when the client goes away in the middle of its body. Of one that has sent it
    /// whole the HTTP library drops the call by itself.
    pub fn watch(&mut self) -> Gone {
        if self.body.is_end_stream() {
            return Gone(None);
        }
        let (sender, gone) = oneshot::channel();
        self.gone = Some(sender);
        Gone(Some(gone))
    }

    async fn read_out(mut self) {
        self.take_begun();
        let mut left = DISCARDED_MAX;
        while left > 0 {
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                }
                Some(Err(_)) => return self.lost(),
                None => return,
            }
        }
    }

    /// The client has gone away.
    fn lost(&mut self) {
        if let Some(gone) = self.gone.take() {
            // The call may be at its end.
            gone.send(()).ok();
        }
    }

    fn poll_next<T: Json>(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<T>, Status>> {
        loop {
            if self.ended {
                return Poll::Ready(Ok(None));
            }
            let step = match ready!(self.poll_step(cx)) {
                Ok(Some(value)) => json::decode_scanned(&value).map(Some).map_err(refused),
                Ok(None) if self.ended => Ok(None),
                Ok(None) => continue,
                Err(status) => Err(status),
            };
            self.ended |= step.is_err();
            return Poll::Ready(step);
        }
    }

    /// Looks at a part of the body, gets one if there is none; answers the bytes of a value that ends
    /// in it.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        if self.part.is_empty() {
            if let Some(unfinished) = &mut self.unfinished {
                ready!(unfinished.poll_room(cx));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => self.part = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => {
                    self.lost();
                    return Poll::Ready(Err(Status::invalid_argument(error.to_string())));
                }
                None => return Poll::Ready(self.finish()),
            }
        }
        let found = self.scanner.feed(&self.part).map_err(refused)?;
        let taken = found.unwrap_or(self.part.len());
        let bytes = self.begun.len() + taken;
        if bytes > self.bytes_max {
            return Poll::Ready(Err(too_large(bytes, self.bytes_max / BYTES_PER_BYTE)));
        }
        let taken = self.part.split_to(taken);
        if found.is_none() {
            // White space before a value is none of it.
            if !self.scanner.is_fresh() {
                self.begun.extend_from_slice(&taken);
                if let Some(unfinished) = &mut self.unfinished {
                    unfinished.set(Some(self.begun.len()));
                }
            }
            return Poll::Ready(Ok(None));
        }
        self.scanner = Scanner::default();
        if self.begun.is_empty() {
            return Poll::Ready(Ok(Some(taken)));
        }
        self.begun.extend_from_slice(&taken);
        Poll::Ready(Ok(Some(self.take_begun())))
    }

    fn finish(&mut self) -> Result<Option<Bytes>, Status> {
        self.ended = true;
        if self.scanner.is_fresh() {
            return Ok(None);
        }
        self.scanner.finish().map_err(refused)?;
        Ok(Some(self.take_begun()))
    }

    /// What has come of a value, which is no longer waited for.
    fn take_begun(&mut self) -> Bytes {
        if let Some(unfinished) = &mut self.unfinished {
            unfinished.set(None);
        }
        std::mem::take(&mut self.begun).freeze()
    }
}

fn refused(error: json::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The values of a body as gRPC frames messages of type `T`.
pub struct Framed<T> {
    first: Option<T>,
    /// `None` once they have ended.
    values: Option<Values>,
}

impl<T: Json + Message + 'static> Framed<T> {
    /// The messages, for a service: `first` and those that follow it. One that cannot be read ends
    /// them, as the end of the body does: the service answers what came before it.
    pub fn stream(first: Option<T>, values: Values, receive_max: usize) -> Streaming<T> {
        let framed = Framed { first, values: Some(values) };
        Streaming::new_request(Unframed(PhantomData), framed, None, Some(receive_max))
    }
}

// Nothing in it is pinned.
impl<T> Unpin for Framed<T> {}

impl<T: Json + Message> HttpBody for Framed<T> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let message = match (self.first.take(), &mut self.values) {
            (Some(first), _) => first,
            (None, Some(values)) => match ready!(values.poll_next::<T>(cx)) {
                Ok(Some(message)) => message,
                end => {
                    if let Err(error) = end {
                        tracing::debug!(%error, "cannot read a request of a JSON stream");
                    }
                    if let Some(values) = self.values.take().filter(|values| values.gone.is_some())
                    {
                        actix::spawn(values.read_out());
                    }
                    return Poll::Ready(None);
                }
            },
            (None, None) => return Poll::Ready(None),
        };
        let bytes = message.encoded_len();
        let Ok(length) = u32::try_from(bytes) else {
            return Poll::Ready(Some(Err(too_large(bytes, u32::MAX as usize))));
        };
        let mut frame = BytesMut::with_capacity(5 + bytes);
        frame.put_u8(0);
        frame.put_u32(length);
        message.encode(&mut frame).expect("there is room for all of it");
        Poll::Ready(Some(Ok(Frame::data(frame.freeze()))))
    }
}

/// Reads what [`Framed`] framed.
struct Unframed<T>(PhantomData<fn() -> T>);

impl<T: Message + Default> Decoder for Unframed<T> {
    type Item = T;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<T>, Status> {
        T::decode(buf).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::task::Waker;

    use futures_util::stream;
    use quorate_proto::etcdserverpb as pb;
    use tokio::sync::mpsc;
    use tonic::Code;

    use super::*;
    use crate::metrics::Metrics;
    use crate::transport::budget::Budget;

    fn body(parts: &[&str]) -> Body {
        let parts: Vec<_> = parts.iter().map(|part| part.to_string()).collect();
        Body::from_stream(stream::iter(parts.into_iter().map(Ok::<_, Infallible>)))
    }

    async fn ids(parts: &[&str], receive_max: usize) -> (Vec<i64>, Option<Status>) {
        let mut values = Values::new(body(parts), receive_max, None);
        let mut found = Vec::new();
        loop {
            match values.next::<pb::LeaseKeepAliveRequest>().await {
                Ok(Some(request)) => found.push(request.id),
                Ok(None) => return (found, None),
                Err(status) => {
                    // What comes after something broken is not read.
                    let after = values.next::<pb::LeaseKeepAliveRequest>().await;
                    assert!(after.unwrap().is_none());
                    return (found, Some(status));
                }
            }
        }
    }

    #[tokio::test]
    async fn values_come_out_however_they_came_in() {
        for parts in [
            &[r#"{"ID":1}{"ID":2}{"ID":3}"#][..],
            &[r#"{"ID":1}"#, "\n", r#" {"I"#, r#"D":2"#, r#"} {"ID":3}"#, "  "],
            &["{", "\"ID\":\"", "1\"", "}{\"ID\":2}{\"ID\":3", "}"],
        ] {
            let (found, error) = ids(parts, 64).await;
            assert_eq!((found, error.map(|e| e.to_string())), (vec![1, 2, 3], None), "{parts:?}");
        }
        assert_eq!(ids(&[], 64).await.0, [0; 0]);
        assert_eq!(ids(&[" ", "\n"], 64).await.0, [0; 0]);
    }

    #[tokio::test]
    async fn what_is_not_whole_is_on_the_account() {
        let budget = Budget::new(1 << 30, 10, &Metrics::new());
        let account = budget.open(None, 1 << 20);
        let (sender, texts) = mpsc::channel(1);
        let texts = stream::unfold(texts, |mut texts: mpsc::Receiver<String>| async move {
            texts.recv().await.map(|text| (Ok::<_, Infallible>(text), texts))
        });
        let mut values = Values::new(Body::from_stream(texts), 1 << 20, Some(account.clone()));
        let mut next = Box::pin(values.next::<pb::LeaseKeepAliveRequest>());
        let begin = format!(r#"{{"x":"{}"#, "y".repeat(100_000));
        sender.send(begin).await.unwrap();
        let cx = &mut Context::from_waker(Waker::noop());
        assert!(next.as_mut().poll(cx).is_pending());
        assert!(account.held() > 100_000);
        sender.send("\"}".into()).await.unwrap();
        assert_eq!(next.await.unwrap(), Some(pb::LeaseKeepAliveRequest::default()));
        assert_eq!(account.held(), 0);
    }

    #[tokio::test]
    async fn what_is_broken_ends_the_values() {
        for (parts, text) in [
            (&[r#"{"ID":1}{"ID""#][..], "unexpected EOF"),
            (&[r#"{"ID":1}x{"ID":2}"#], "invalid character 'x' looking for beginning of value"),
            (
                &[r#"{"ID":1}{"ID":"x"}{"ID":2}"#],
                "proto: (line 1:7): invalid value for int64 field ID: \"x\"",
            ),
        ] {
            let (found, error) = ids(parts, 64).await;
            let error = error.expect("broken");
            assert_eq!((found, error.code()), (vec![1], Code::InvalidArgument));
            assert_eq!(error.message(), text);
        }
    }

    #[tokio::test]
    async fn a_value_has_a_greatest_length_and_space_between_values_none() {
        let filler = format!(r#"{{"x":"{}"}}"#, "y".repeat(200));
        let (found, error) = ids(&[r#"{"ID":1}"#, &filler[..70], &filler[70..]], 64).await;
        let error = error.expect("too long");
        assert_eq!((found, error.code()), (vec![1], Code::ResourceExhausted));
        assert!(error.message().starts_with("grpc: received message larger than max ("));
        let space = " ".repeat(100);
        let (found, error) = ids(&[&space, &space, r#"{"ID":1}"#, &space], 64).await;
        assert_eq!((found, error.is_none()), (vec![1], true));
    }
}
