//! What passes between a connection and its services, with what it makes the member hold on the
//! connection's [`Account`]: requests that are not whole yet, responses that are not sent yet.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::Sleep;

use crate::transport::budget::{Account, Call, Charge};

/// Bytes of a response that are not worth a look: that many are in flight in any call.
const SMALL: usize = 1 << 10;
/// What a call costs apart from its messages and headers, about.
const CALL_BYTES: usize = 4 << 10;
/// What a header field costs apart from its text.
const FIELD_BYTES: usize = 100;
/// Headers that count as part of [`CALL_BYTES`].
const HEADERS_SMALL: usize = 4 << 10;
/// Time between two looks whether there is room again.
const ROOM_POLL: Duration = Duration::from_millis(20);
/// Length of what comes before each gRPC message.
const PREFIX: usize = 5;

/// About what the headers of a request occupy; `None` if that is little.
pub fn header_bytes(headers: &HeaderMap) -> Option<usize> {
    let bytes = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        FIELD_BYTES + name.as_str().len() + value.len()
    };
    Some(headers.iter().map(bytes).sum()).filter(|bytes| *bytes > HEADERS_SMALL)
}

/// How much of a message has come, in a stream of messages as gRPC frames them.
#[derive(Default)]
struct Messages {
    prefix: [u8; PREFIX],
    /// Bytes of the prefix that have come.
    filled: usize,
    /// Bytes of the message that are still to come.
    left: usize,
    /// Bytes of the message that have come.
    come: usize,
}

impl Messages {
    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.filled < PREFIX {
                let take = bytes.len().min(PREFIX - self.filled);
                self.prefix[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
                self.filled += take;
                bytes = &bytes[take..];
                if self.filled == PREFIX {
                    let [_, length @ ..] = self.prefix;
                    self.left = u32::from_be_bytes(length) as usize;
                }
            } else {
                let take = bytes.len().min(self.left);
                self.left -= take;
                self.come += take;
                bytes = &bytes[take..];
            }
            if self.filled == PREFIX && self.left == 0 {
                (self.filled, self.come) = (0, 0);
            }
        }
    }

    /// Bytes of a message that is not whole; `None` between two messages.
    fn unfinished(&self) -> Option<usize> {
        (self.filled > 0).then_some(self.come)
    }
}

/// What has come of a message that is not whole, on its connection's account.
pub struct Unfinished {
    account: Arc<Account>,
    /// `None` between two messages.
    charge: Option<Charge>,
    /// While there is no room for more.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Unfinished {
    pub fn new(account: Arc<Account>) -> Self {
        Unfinished { account, charge: None, waiting: None }
    }

    /// Notes how many bytes of a message have come; `None` between two messages.
    pub fn set(&mut self, come: Option<usize>) {
        match come {
            None => self.charge = None,
            Some(come) => {
                let account = &self.account;
                self.charge.get_or_insert_with(|| account.hold(0)).set(CALL_BYTES + come);
            }
        }
    }

    /// To be asked before more of a message is read: waits while all hold too much and this connection
    /// more than its share.
    pub fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.charge.is_none() {
            return Poll::Ready(());
        }
        let budget = self.account.budget();
        while budget.is_crowded() && self.account.is_above_share() {
            budget.relieve();
            let waiting =
                self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(ROOM_POLL)));
            std::task::ready!(waiting.as_mut().poll(cx));
            self.waiting = None;
        }
        Poll::Ready(())
    }
}

/// The body of a gRPC request.
pub struct Request {
    inner: Incoming,
    messages: Messages,
    unfinished: Unfinished,
}

impl Request {
    pub fn new(inner: Incoming, account: Arc<Account>) -> Self {
        Request { inner, messages: Messages::default(), unfinished: Unfinished::new(account) }
    }
}

impl Body for Request {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        std::task::ready!(this.unfinished.poll_room(cx));
        let frame = std::task::ready!(Pin::new(&mut this.inner).poll_frame(cx));
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            this.messages.feed(data);
            this.unfinished.set(this.messages.unfinished());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A part of a response, held until the connection has sent it.
pub struct Part {
    bytes: Bytes,
    charge: Option<Charge>,
}

impl Buf for Part {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(charge) = &mut self.charge {
            charge.set(self.bytes.len());
        }
    }
}

/// Bytes that are held for a response which is not encoded yet. It travels with the response to its
/// [`Response`].
#[derive(Clone)]
pub struct Reply(#[allow(dead_code, reason = "held, not read")] Arc<Charge>);

impl Reply {
    pub fn new(account: &Arc<Account>, bytes: usize) -> Self {
        Reply(Arc::new(account.hold(bytes)))
    }
}

/// The body of a response.
pub struct Response<B> {
    inner: B,
    account: Arc<Account>,
    /// Until the first part is there.
    reply: Option<Reply>,
    /// Ends with the body.
    _call: Option<Call>,
}

impl<B> Response<B> {
    /// Takes what the response itself brought to be held.
    pub fn of(
        response: http::Response<B>,
        account: Arc<Account>,
        call: Option<Call>,
    ) -> http::Response<Self> {
        let (mut head, inner) = response.into_parts();
        let reply = head.extensions.remove();
        http::Response::from_parts(head, Response { inner, account, reply, _call: call })
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Response<B> {
    type Data = Part;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Part>, B::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        self.reply = None;
        Poll::Ready(frame.map(|frame| {
            Ok(frame?.map_data(|bytes| {
                let charge = (bytes.len() > SMALL).then(|| self.account.hold(bytes.len()));
                Part { bytes, charge }
            }))
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_followed_however_they_are_cut() {
        let mut stream = vec![0, 0, 0, 0, 3, 1, 2, 3];
        stream.extend([0, 0, 0, 0, 0]);
        stream.extend([1, 0, 0, 1, 0]);
        stream.extend([7; 256]);
        let boundaries = [0, 8, 13, stream.len()];
        for size in 1..stream.len() {
            let (mut messages, mut fed) = (Messages::default(), 0);
            for part in stream.chunks(size) {
                messages.feed(part);
                fed += part.len();
                let begun = boundaries.iter().copied().filter(|at| *at <= fed).max().unwrap_or(0);
                let expected = (fed > begun).then(|| (fed - begun).saturating_sub(PREFIX));
                assert_eq!(messages.unfinished(), expected, "after {fed} in parts of {size}");
            }
        }
    }
}
