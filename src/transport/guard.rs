//! What a connection of the client port may not do: stay silent, dribble headers, or ping without end.
//!
//! HTTP/2 pings are answered inside the HTTP library, which does not count them. A [`Guard`] sits
//! below it and looks at the frame headers as they pass, in both directions, so that it can hold
//! clients to gRPC's keepalive rules as etcd's server does (v3-api section 5). Per frame it keeps nine
//! bytes and skips the rest. HTTP/1 connections, told by their first bytes, are not looked at any
//! further.
//!
//! On the way, requests that etcd serves and the HTTP library would refuse are mended, see
//! `authority`. That is done where their bytes are; only a header block that comes in parts is
//! copied, and held back until it is whole.
//!
//! A client that breaks the rules is sent GOAWAY between two frames of the HTTP library, then the
//! connection ends.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::transport::authority;

/// What a client must keep to.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Time to say which protocol is spoken.
    pub handshake: Duration,
    /// Time for the headers of a request in HTTP/2, from their first byte to their last.
    pub headers: Duration,
    /// `None` if pings are not counted.
    pub ping_interval: Option<PingInterval>,
}

/// The least time between two pings.
#[derive(Clone, Copy, Debug)]
pub struct PingInterval {
    /// While a stream is open.
    pub open: Duration,
    /// While none is.
    pub idle: Duration,
}

/// The least time between pings of a server that sets none (gRPC's own).
pub const PING_INTERVAL_DEFAULT: Duration = Duration::from_secs(300);

/// The least time between two pings without an open stream: nobody needs them then.
pub const IDLE_PING_INTERVAL: Duration = Duration::from_secs(2 * 3600);
/// Pings that come too early and are borne with.
const STRIKES_MAX: u32 = 2;
/// Time for a client that is sent away to read why, before the connection is cut.
const LEAVE_TIME: Duration = Duration::from_secs(1);
/// Open streams that are kept track of. A connection with as many is not idle, which is all that
/// counts here.
const STREAMS_MAX: usize = 1 << 16;

/// The longest payload that the HTTP library takes: none is promised more.
const PAYLOAD_MAX: usize = 1 << 14;

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
/// Of DATA and HEADERS. The same bit marks the answer to a PING.
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const ENHANCE_YOUR_CALM: u32 = 11;
const TOO_MANY_PINGS: &[u8] = b"too_many_pings";

/// A frame's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
}

/// Finds the frames in one direction of a connection, however their bytes are cut.
#[derive(Default)]
struct Frames {
    header: [u8; 9],
    filled: u8,
    /// Bytes of the current frame's payload still to come.
    payload: u32,
}

impl Frames {
    /// Whether the next byte begins a frame.
    fn at_boundary(&self) -> bool {
        self.filled == 0 && self.payload == 0
    }

    /// Bytes that surely belong to the current frame.
    fn rest(&self) -> usize {
        if self.payload > 0 { self.payload as usize } else { 9 - usize::from(self.filled) }
    }

    /// Takes bytes up to the next frame's payload; answers how many these are, and the frame. Takes
    /// all if there is no such frame in them.
    fn next(&mut self, bytes: &[u8]) -> (usize, Option<Frame>) {
        let mut at = 0;
        while at < bytes.len() {
            let take = self.rest().min(bytes.len() - at);
            let taken = &bytes[at..at + take];
            at += take;
            if self.payload > 0 {
                self.payload -= take as u32;
                continue;
            }
            let filled = usize::from(self.filled);
            self.header[filled..filled + take].copy_from_slice(taken);
            self.filled += take as u8;
            if self.filled == 9 {
                self.filled = 0;
                let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = self.header;
                self.payload = u32::from_be_bytes([0, l0, l1, l2]);
                let stream = u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff;
                return (at, Some(Frame { kind, flags, stream }));
            }
        }
        (at, None)
    }

    fn feed(&mut self, mut bytes: &[u8], mut frame: impl FnMut(Frame)) {
        while let (taken, Some(found)) = self.next(bytes) {
            bytes = &bytes[taken..];
            frame(found);
        }
    }
}

/// Counts pings that come too early, as gRPC's server does.
#[derive(Default)]
struct Pings {
    last: Option<Instant>,
    strikes: u32,
    /// The server has sent headers or data since the last ping: the client has reason to ping.
    answered: bool,
}

impl Pings {
    /// Takes a ping; answers whether it was one too many.
    fn ping(&mut self, now: Instant, interval: Duration) -> bool {
        let last = self.last.replace(now);
        if std::mem::take(&mut self.answered) {
            self.strikes = 0;
        } else if last.is_some_and(|last| now.saturating_duration_since(last) < interval) {
            self.strikes += 1;
        }
        self.strikes > STRIKES_MAX
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// So many bytes of the HTTP/2 preface have come.
    Unknown(usize),
    Http1,
    Http2,
}

/// The payload of a HEADERS frame that comes in parts: from the client until it is whole, then to the
/// HTTP library, as that reads.
struct Held {
    flags: u8,
    payload: Vec<u8>,
    /// Bytes that have come.
    come: usize,
    /// Bytes that have gone to the HTTP library.
    gone: usize,
}

/// What is known of the frames of a connection.
struct Observed {
    protocol: Protocol,
    /// Of the client.
    read: Frames,
    /// Of the server.
    written: Frames,
    /// The server is between HEADERS and the last CONTINUATION: no other frame may come there.
    in_headers: bool,
    open: FxHashSet<u32>,
    last_stream: u32,
    pings: Pings,
    held: Option<Held>,
    /// The client is between the beginning of a HEADERS frame and the end of the last CONTINUATION.
    in_block: bool,
    /// The frame at hand ends the block.
    ends_block: bool,
    /// Blocks that the client has begun.
    blocks: u64,
}

impl Observed {
    /// Looks at bytes from the client; answers whether they break a rule. The last of them may be
    /// `held` afterwards: the next are the rest of those.
    fn read(&mut self, mut bytes: &mut [u8], ping_interval: Option<PingInterval>) -> bool {
        if let Protocol::Unknown(seen) = self.protocol {
            let expected = &PREFACE[seen..];
            let take = expected.len().min(bytes.len());
            if bytes[..take] != expected[..take] {
                self.protocol = Protocol::Http1;
            } else if take == expected.len() {
                self.protocol = Protocol::Http2;
            } else {
                self.protocol = Protocol::Unknown(seen + take);
            }
            bytes = &mut bytes[take..];
        }
        let (Protocol::Http2, Some(interval)) = (self.protocol, ping_interval) else {
            return false;
        };
        let mut broken = false;
        while let (taken, Some(frame)) = self.read.next(bytes) {
            bytes = &mut bytes[taken..];
            match frame.kind {
                HEADERS | CONTINUATION => {
                    self.blocks += u64::from(frame.kind == HEADERS);
                    self.in_block = true;
                    self.ends_block = frame.flags & END_HEADERS != 0;
                }
                _ => self.in_block = false,
            }
            match frame.kind {
                HEADERS => {
                    if frame.stream > self.last_stream {
                        self.last_stream = frame.stream;
                        if self.open.len() < STREAMS_MAX {
                            self.open.insert(frame.stream);
                        }
                    }
                    if self.mend(frame.flags, bytes) {
                        break;
                    }
                }
                RST_STREAM => {
                    self.open.remove(&frame.stream);
                }
                PING if frame.flags & ACK == 0 => {
                    let interval = if self.open.is_empty() { interval.idle } else { interval.open };
                    broken |= self.pings.ping(Instant::now(), interval);
                }
                _ => {}
            }
        }
        broken
    }

    /// The header block that the client has begun and not ended, by its number.
    fn block(&self) -> Option<u64> {
        let is_whole = self.ends_block && self.held.is_none() && self.read.payload == 0;
        (self.in_block && !is_whole).then_some(self.blocks)
    }

    /// Mends the HEADERS frame whose payload `bytes` begin with. If that goes on past them, they are
    /// held, and it answers so.
    fn mend(&mut self, flags: u8, bytes: &mut [u8]) -> bool {
        let length = self.read.payload as usize;
        if let Some(payload) = bytes.get_mut(..length) {
            authority::mend(flags, payload);
            return false;
        }
        // One that is too long ends the connection once the library has seen its header.
        if length > PAYLOAD_MAX {
            return false;
        }
        self.read.payload = 0;
        let mut payload = bytes.to_vec();
        payload.resize(length, 0);
        self.held = Some(Held { flags, payload, come: bytes.len(), gone: 0 });
        true
    }

    /// Looks at bytes that went to the client.
    fn written(&mut self, bytes: &[u8]) {
        let Observed { written, in_headers, open, pings, .. } = self;
        written.feed(bytes, |frame| match frame.kind {
            DATA | HEADERS => {
                pings.answered = true;
                if frame.kind == HEADERS {
                    *in_headers = frame.flags & END_HEADERS == 0;
                }
                if frame.flags & END_STREAM != 0 {
                    open.remove(&frame.stream);
                }
            }
            CONTINUATION => *in_headers = frame.flags & END_HEADERS == 0,
            RST_STREAM => {
                open.remove(&frame.stream);
            }
            _ => {}
        });
    }

    /// Whether a frame of our own may be put here.
    fn between_frames(&self) -> bool {
        self.written.at_boundary() && !self.in_headers
    }
}

/// How far a client that is sent away has been told.
enum Leaving {
    No,
    /// GOAWAY is to be written, so much of it has been.
    Asked {
        goaway: Vec<u8>,
        sent: usize,
    },
    /// Nothing more is written; what still comes is not looked at.
    Said,
}

/// A connection under [`Rules`].
pub struct Guard<IO> {
    io: IO,
    ping_interval: Option<PingInterval>,
    headers: Duration,
    observed: Observed,
    /// The last header block that the deadline was set for.
    timed: u64,
    leaving: Leaving,
    /// When the connection is cut: while its protocol is unknown, while a header block is not whole, and
    /// while it is leaving.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Guard<IO> {
    /// Guards a connection that has just been accepted.
    pub fn new(io: IO, rules: &Rules) -> Self {
        Guard {
            io,
            ping_interval: rules.ping_interval,
            observed: Observed {
                protocol: Protocol::Unknown(0),
                read: Frames::default(),
                written: Frames::default(),
                in_headers: false,
                open: FxHashSet::default(),
                last_stream: 0,
                pings: Pings::default(),
                held: None,
                in_block: false,
                ends_block: false,
                blocks: 0,
            },
            headers: rules.headers,
            timed: 0,
            leaving: Leaving::No,
            deadline: Some(Box::pin(tokio::time::sleep(rules.handshake))),
        }
    }

    fn watches_frames(&self) -> bool {
        self.ping_interval.is_some() && self.observed.protocol == Protocol::Http2
    }

    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match &mut self.deadline {
            Some(deadline) => deadline.as_mut().poll(cx).map(|()| {
                let text = match (&self.leaving, self.observed.protocol) {
                    (Leaving::No, Protocol::Unknown(_)) => "the client sent no request",
                    (Leaving::No, _) => "the client did not finish its headers",
                    _ => "too many pings",
                };
                io::Error::new(io::ErrorKind::TimedOut, text)
            }),
            None => Poll::Pending,
        }
    }

    /// Reads from what is held, once that is whole. At the end of the connection it is not, but given
    /// away all the same.
    fn poll_held(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(held) = &mut self.observed.held else { return Poll::Ready(Ok(())) };
        while held.come < held.payload.len() {
            let mut rest = ReadBuf::new(&mut held.payload[held.come..]);
            let read = match Pin::new(&mut self.io).poll_read(cx, &mut rest) {
                Poll::Ready(read) => read.map(|()| rest.filled().len())?,
                Poll::Pending => return self.poll_deadline(cx).map(Err),
            };
            match read {
                0 => held.payload.truncate(held.come),
                read => {
                    held.come += read;
                    if held.come == held.payload.len() {
                        authority::mend(held.flags, &mut held.payload);
                    }
                }
            }
        }
        let rest = &held.payload[held.gone..];
        let give = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..give]);
        held.gone += give;
        if held.gone == held.payload.len() {
            self.observed.held = None;
            self.time_headers();
        }
        Poll::Ready(Ok(()))
    }

    /// Gives the client time for the header block that it is in, if it is in one.
    fn time_headers(&mut self) {
        match self.observed.block() {
            None => self.deadline = None,
            Some(block) if block != self.timed || self.deadline.is_none() => {
                self.timed = block;
                self.deadline = Some(Box::pin(tokio::time::sleep(self.headers)));
            }
            Some(_) => {}
        }
    }

    fn send_away(&mut self) {
        let mut goaway = Vec::with_capacity(9 + 8 + TOO_MANY_PINGS.len());
        goaway.extend([0, 0, 8 + TOO_MANY_PINGS.len() as u8, GOAWAY, 0, 0, 0, 0, 0]);
        goaway.extend(self.observed.last_stream.to_be_bytes());
        goaway.extend(ENHANCE_YOUR_CALM.to_be_bytes());
        goaway.extend(TOO_MANY_PINGS);
        self.leaving = Leaving::Asked { goaway, sent: 0 };
        self.deadline = Some(Box::pin(tokio::time::sleep(LEAVE_TIME)));
        tracing::debug!("a client pings too often and is disconnected");
    }

    /// Writes GOAWAY and closes the write side, as far as the socket takes it.
    fn poll_say(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Leaving::Asked { goaway, sent } = &mut self.leaving {
            if !self.observed.between_frames() {
                // The HTTP library writes the rest of its frame first.
                return Poll::Pending;
            }
            while *sent < goaway.len() {
                let io = Pin::new(&mut self.io);
                match std::task::ready!(io.poll_write(cx, &goaway[*sent..]))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    written => *sent += written,
                }
            }
            std::task::ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            self.leaving = Leaving::Said;
        }
        Poll::Ready(Ok(()))
    }

    /// Ends in an error: when the client has gone too, or its time is over. Closing at once, with
    /// bytes of the client unread, would reset the connection before it has read why.
    fn poll_leave(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if let Poll::Ready(error) = self.poll_deadline(cx) {
            return Poll::Ready(error);
        }
        if let Err(error) = std::task::ready!(self.poll_say(cx)) {
            return Poll::Ready(error);
        }
        let mut scratch = [0; 4096];
        loop {
            let mut unread = ReadBuf::new(&mut scratch);
            let read = std::task::ready!(Pin::new(&mut self.io).poll_read(cx, &mut unread));
            if let Err(error) = read {
                return Poll::Ready(error);
            }
            if unread.filled().is_empty() {
                return Poll::Ready(io::Error::other("too many pings"));
            }
        }
    }

    /// Writes for the HTTP library while the client is sent away: the rest of a frame that has begun,
    /// and nothing after it.
    fn poll_write_leaving(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if matches!(self.leaving, Leaving::Asked { .. }) && !self.observed.between_frames() {
            let rest = self.observed.written.rest().min(bytes.len());
            let written = std::task::ready!(Pin::new(&mut self.io).poll_write(cx, &bytes[..rest]))?;
            self.observed.written(&bytes[..written]);
            if self.observed.between_frames() {
                // The reading side goes on from here.
                cx.waker().wake_by_ref();
            }
            return Poll::Ready(Ok(written));
        }
        std::task::ready!(self.poll_say(cx))?;
        Poll::Ready(Ok(bytes.len()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Guard<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !matches!(this.leaving, Leaving::No) {
            return this.poll_leave(cx).map(Err);
        }
        if this.observed.held.is_some() {
            return this.poll_held(cx, buf);
        }
        let before = buf.filled().len();
        match Pin::new(&mut this.io).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {}
            Poll::Pending => return this.poll_deadline(cx).map(Err),
            error => return error,
        }
        if this.observed.protocol != Protocol::Http1
            && this.observed.read(&mut buf.filled_mut()[before..], this.ping_interval)
        {
            buf.set_filled(before);
            this.send_away();
            return this.poll_leave(cx).map(Err);
        }
        if !matches!(this.observed.protocol, Protocol::Unknown(_)) {
            this.time_headers();
        }
        if let Some(held) = &this.observed.held {
            buf.set_filled(buf.filled().len() - held.come);
            if buf.filled().len() == before {
                // To answer without a byte would say that the client has ended its side.
                return this.poll_held(cx, buf);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guard<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if !matches!(this.leaving, Leaving::No) {
            return this.poll_write_leaving(cx, bytes);
        }
        let written = std::task::ready!(Pin::new(&mut this.io).poll_write(cx, bytes))?;
        if this.watches_frames() {
            this.observed.written(&bytes[..written]);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if !matches!(this.leaving, Leaving::No) {
            let first = slices.iter().find(|slice| !slice.is_empty());
            return this.poll_write_leaving(cx, first.map_or(&[], |slice| slice));
        }
        let written = std::task::ready!(Pin::new(&mut this.io).poll_write_vectored(cx, slices))?;
        if this.watches_frames() {
            let mut left = written;
            for slice in slices {
                let part = left.min(slice.len());
                this.observed.written(&slice[..part]);
                left -= part;
            }
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.leaving {
            Leaving::Said => Poll::Ready(Ok(())),
            _ => Pin::new(&mut self.io).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const RULES: Rules = Rules {
        handshake: Duration::from_millis(50),
        headers: Duration::from_millis(50),
        ping_interval: Some(PingInterval {
            open: Duration::from_secs(5),
            idle: IDLE_PING_INTERVAL,
        }),
    };

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime starts").block_on(work)
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let mut bytes = frame(HEADERS, END_HEADERS, 1, &[7; 300]);
        bytes.extend(frame(PING, 0, 0, &[0; 8]));
        bytes.extend(frame(4, ACK, 0, &[]));
        bytes.extend(frame(DATA, END_STREAM, 0x8000_0001, &[1]));
        let expected = [
            Frame { kind: HEADERS, flags: END_HEADERS, stream: 1 },
            Frame { kind: PING, flags: 0, stream: 0 },
            Frame { kind: 4, flags: ACK, stream: 0 },
            Frame { kind: DATA, flags: END_STREAM, stream: 1 },
        ];
        for size in 1..bytes.len() {
            let (mut frames, mut found) = (Frames::default(), Vec::new());
            for part in bytes.chunks(size) {
                frames.feed(part, |frame| found.push(frame));
            }
            assert_eq!(found, expected, "in parts of {size}");
            assert!(frames.at_boundary());
        }
    }

    #[test]
    fn three_early_pings_are_one_too_many() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut pings = Pings::default();
        let five = 5 * second;
        assert!(!pings.ping(start, five), "the first ping has none before it");
        assert!(!pings.ping(start + second, five));
        assert!(!pings.ping(start + 6 * second, five), "in time: no strike, but none forgiven");
        assert!(!pings.ping(start + 7 * second, five));
        assert!(pings.ping(start + 8 * second, five));
    }

    #[test]
    fn an_answer_forgives_all_strikes() {
        let now = Instant::now();
        let mut pings = Pings::default();
        let interval = Duration::from_secs(5);
        for _ in 0..4 {
            assert!((0..3).all(|_| !pings.ping(now, interval)));
            pings.answered = true;
            assert!(!pings.ping(now, interval));
            pings.answered = true;
        }
        assert!(!pings.ping(now, interval));
        assert!((0..2).all(|_| !pings.ping(now, interval)));
        assert!(pings.ping(now, interval));
    }

    fn observed() -> Observed {
        Guard::new(tokio::io::empty(), &RULES).observed
    }

    fn read(seen: &mut Observed, bytes: &[u8]) -> bool {
        seen.read(&mut bytes.to_vec(), RULES.ping_interval)
    }

    #[test]
    fn streams_are_open_from_headers_to_the_servers_last_word() {
        block_on(async {
            let mut seen = observed();
            assert!(!read(&mut seen, &PREFACE[..10]) && !read(&mut seen, &PREFACE[10..]));
            read(&mut seen, &frame(HEADERS, END_HEADERS | END_STREAM, 1, b"x"));
            read(&mut seen, &frame(HEADERS, END_HEADERS, 3, b"x"));
            read(&mut seen, &frame(HEADERS, END_HEADERS | END_STREAM, 3, b"trailers"));
            read(&mut seen, &frame(HEADERS, END_HEADERS, 5, b"x"));
            assert_eq!(seen.open.len(), 3);
            seen.written(&frame(HEADERS, 0, 1, b"x"));
            assert!(!seen.between_frames(), "the header block goes on");
            seen.written(&frame(CONTINUATION, END_HEADERS, 1, b"x"));
            assert!(seen.between_frames());
            seen.written(&frame(DATA, END_STREAM, 1, b"x"));
            seen.written(&frame(RST_STREAM, 0, 3, &[0; 4]));
            read(&mut seen, &frame(RST_STREAM, 0, 5, &[0; 4]));
            assert!(seen.open.is_empty());
            assert_eq!(seen.last_stream, 5);
        });
    }

    #[test]
    fn http1_is_not_looked_at() {
        block_on(async {
            let mut seen = observed();
            let mut bytes = b"PRI /metrics HTTP/1.1\r\n\r\n".to_vec();
            bytes.extend(frame(PING, 0, 0, &[0; 8]).repeat(10));
            assert!(!read(&mut seen, &bytes));
            assert!(seen.protocol == Protocol::Http1);
        });
    }

    /// Gives its bytes up to the next cut at each read, and is not ready before each; then ends.
    struct Parts {
        bytes: Vec<u8>,
        at: usize,
        cuts: Vec<usize>,
        ready: bool,
    }

    impl AsyncRead for Parts {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.ready = !self.ready;
            if !self.ready {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let at = self.at;
            let cut = self.cuts.iter().copied().find(|&cut| cut > at).unwrap_or(self.bytes.len());
            let end = cut.min(self.bytes.len()).min(at + buf.remaining());
            buf.put_slice(&self.bytes[at..end]);
            self.at = end;
            Poll::Ready(Ok(()))
        }
    }

    /// All that comes through a guard, read with a buffer of `room` bytes, and the guard.
    async fn through(
        bytes: &[u8],
        cuts: Vec<usize>,
        room: usize,
    ) -> (Vec<u8>, Guard<tokio::io::Join<Parts, tokio::io::Sink>>) {
        let parts = Parts { bytes: bytes.to_vec(), at: 0, cuts, ready: true };
        let mut guard = Guard::new(tokio::io::join(parts, tokio::io::sink()), &RULES);
        let (mut all, mut buffer) = (Vec::new(), vec![0; room]);
        loop {
            match guard.read(&mut buffer).await.expect("no rule is broken") {
                0 => return (all, guard),
                read => all.extend(&buffer[..read]),
            }
        }
    }

    #[test]
    fn authorities_are_mended_however_they_are_cut() {
        let block = authority::tests::block("http://127.0.0.1:2379", true);
        let mut padded = vec![2, 0, 0, 0, 0, 9];
        padded.extend(authority::tests::block("#initially=[http://127.0.0.1:1]", false));
        padded.extend([0, 0]);
        let cut_off = block[..block.len() - 5].to_vec();
        let mended = |flags: u8, payload: &[u8]| {
            let mut mended = payload.to_vec();
            authority::mend(flags, &mut mended);
            assert_ne!(mended, payload);
            mended
        };
        let connection = |mend: &dyn Fn(u8, &[u8]) -> Vec<u8>| {
            let mut bytes = PREFACE.to_vec();
            bytes.extend(frame(4, 0, 0, &[]));
            bytes.extend(frame(HEADERS, END_HEADERS, 1, &mend(0, &block)));
            bytes.extend(frame(DATA, END_STREAM, 1, &block));
            bytes.extend(frame(HEADERS, END_HEADERS | 40, 3, &mend(40, &padded)));
            bytes.extend(frame(HEADERS, 0, 5, &mend(0, &cut_off)));
            bytes.extend(frame(CONTINUATION, END_HEADERS, 5, &block[block.len() - 5..]));
            bytes.extend(frame(HEADERS, END_HEADERS, 7, &[]));
            bytes.extend(frame(PING, 0, 0, &[0; 8]));
            bytes
        };
        let (sent, expected) = (connection(&|_, payload| payload.to_vec()), connection(&mended));
        block_on(async {
            let every: Vec<_> = (0..sent.len()).collect();
            let cuts = (0..sent.len()).map(|cut| vec![cut]);
            for (cuts, room) in cuts.map(|cuts| (cuts, 4096)).chain([
                (every.clone(), 4096),
                (every, 1),
                (Vec::new(), 1),
                (Vec::new(), 7),
            ]) {
                let (received, guard) = through(&sent, cuts.clone(), room).await;
                assert_eq!(received, expected, "cut at {cuts:?}, read by {room}");
                assert_eq!(guard.observed.open.len(), 4);
                assert!(guard.observed.pings.last.is_some());
                assert!(guard.observed.read.at_boundary());
            }
            // A client that ends in the middle of it all.
            for end in 0..sent.len() {
                let (received, _) = through(&sent[..end], vec![end / 2], 4096).await;
                assert_eq!(received.len(), end);
            }
        });
    }

    #[test]
    fn a_block_that_is_too_long_is_not_held() {
        block_on(async {
            for (length, is_held) in [(PAYLOAD_MAX, true), (PAYLOAD_MAX + 1, false)] {
                let mut bytes = PREFACE.to_vec();
                bytes.extend(&frame(HEADERS, END_HEADERS, 1, &vec![0; length])[..50]);
                let mut seen = observed();
                assert!(!read(&mut seen, &bytes));
                assert_eq!(seen.held.is_some(), is_held);
            }
        });
    }

    #[test]
    fn authorities_of_http1_are_left() {
        block_on(async {
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec();
            bytes.extend(frame(HEADERS, END_HEADERS, 1, &authority::tests::block("/", false)));
            assert_eq!(through(&bytes, vec![30, 40], 4096).await.0, bytes);
        });
    }

    /// Sends a client away in the middle of a frame of the server, whose rest comes byte by byte.
    #[test]
    fn goaway_comes_between_two_frames() {
        block_on(async {
            let (mut client, server) = tokio::io::duplex(1 << 16);
            let mut guard = Guard::new(server, &RULES);
            let mut buffer = [0; 4096];
            client.write_all(PREFACE).await.expect("there is room");
            let read = guard.read(&mut buffer).await.expect("the preface passes");
            assert_eq!(&buffer[..read], PREFACE);
            let settings = frame(4, 0, 0, &[0; 6]);
            guard.write_all(&settings[..4]).await.expect("there is room");

            client.write_all(&frame(HEADERS, 5, 7, b"x")).await.expect("there is room");
            client.write_all(&frame(PING, 0, 0, &[0; 8]).repeat(4)).await.expect("there is room");
            let (mut read_half, mut write_half) = tokio::io::split(guard);
            let reading = async { read_half.read(&mut buffer).await.map(|read| read == 0) };
            let writing = async {
                tokio::task::yield_now().await;
                for byte in &settings[4..] {
                    write_half.write_all(&[*byte]).await.expect("the frame is finished");
                }
                write_half.write_all(&frame(DATA, 0, 7, b"late")).await.expect("swallowed");
            };
            let receiving = async {
                let mut received = Vec::new();
                client.read_to_end(&mut received).await.expect("the server closes its side");
                drop(client);
                received
            };
            let (read, (), received) = tokio::join!(reading, writing, receiving);
            assert!(read.is_err(), "the connection ends");
            let mut expected = settings.clone();
            let mut payload = 7u32.to_be_bytes().to_vec();
            payload.extend([0, 0, 0, 11]);
            payload.extend(b"too_many_pings");
            expected.extend(frame(GOAWAY, 0, 0, &payload));
            assert_eq!(received, expected);
        });
    }

    #[test]
    fn a_client_that_says_nothing_is_cut_off() {
        block_on(async {
            for said in [&b""[..], b"PRI * HT"] {
                let (mut client, server) = tokio::io::duplex(64);
                let mut guard = Guard::new(server, &RULES);
                client.write_all(said).await.expect("there is room");
                let mut all = Vec::new();
                let error = guard.read_to_end(&mut all).await.expect_err("time is over");
                assert_eq!((error.kind(), &all[..]), (io::ErrorKind::TimedOut, said));
            }
        });
    }

    #[test]
    fn headers_that_dribble_are_cut_off() {
        block_on(async {
            let block = authority::tests::block("localhost", false);
            let whole = [PREFACE, &frame(HEADERS, END_HEADERS, 1, &block)[..]].concat();
            let ends = [PREFACE.len() + 9, PREFACE.len() + 20, whole.len() - 40];
            let mut begun: Vec<Vec<u8>> = ends.iter().map(|end| whole[..*end].to_vec()).collect();
            begun.push([PREFACE, &frame(HEADERS, 0, 1, &block)[..]].concat());
            for said in begun {
                let (mut client, server) = tokio::io::duplex(1 << 16);
                let mut guard = Guard::new(server, &RULES);
                client.write_all(&said).await.expect("there is room");
                let dribbling = async {
                    // An empty CONTINUATION, or a part of one: no time is won by either.
                    while client.write_all(&[0]).await.is_ok() {
                        tokio::time::sleep(RULES.headers / 5).await;
                    }
                };
                let mut all = Vec::new();
                let read = guard.read_to_end(&mut all);
                let ended = tokio::select! {
                    ended = read => ended,
                    () = dribbling => panic!("the connection was dropped"),
                };
                let error = ended.expect_err("time is over");
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            }
        });
    }

    #[test]
    fn whole_headers_give_all_time_back() {
        block_on(async {
            let block = authority::tests::block("localhost", false);
            let (mut client, server) = tokio::io::duplex(1 << 16);
            let mut guard = Guard::new(server, &RULES);
            let mut said = PREFACE.to_vec();
            said.extend(frame(HEADERS, 0, 1, &block[..10]));
            said.extend(frame(CONTINUATION, 0, 1, &[]));
            said.extend(frame(CONTINUATION, END_HEADERS, 1, &block[10..]));
            said.extend(&frame(DATA, 0, 1, &[7; 100])[..30]);
            let (first, rest) = said.split_at(said.len() / 2);
            let mut buffer = vec![0; said.len()];
            client.write_all(first).await.expect("there is room");
            client.write_all(rest).await.expect("there is room");
            guard.read_exact(&mut buffer).await.expect("it passes");
            let more = tokio::time::timeout(4 * RULES.headers, guard.read(&mut buffer)).await;
            assert!(more.is_err(), "nothing came, and nothing ended");
        });
    }

    #[test]
    fn a_client_that_has_spoken_may_be_slow() {
        block_on(async {
            for said in [&b"GET"[..], PREFACE] {
                let (mut client, server) = tokio::io::duplex(64);
                let mut guard = Guard::new(server, &RULES);
                client.write_all(said).await.expect("there is room");
                let mut buffer = vec![0; said.len()];
                guard.read_exact(&mut buffer).await.expect("it passes");
                let more = tokio::time::timeout(4 * RULES.handshake, guard.read(&mut buffer)).await;
                assert!(more.is_err(), "nothing came, and nothing ended");
            }
        });
    }
}
