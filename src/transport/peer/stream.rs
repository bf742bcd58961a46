//! The streams between two members: endless HTTP responses full of raft messages. The receiver dials;
//! what it asks for leaves here through an [`Outlet`], what it gets comes in through a [`Reader`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use actix::prelude::*;
use bytes::{Buf, Bytes, BytesMut};
use hyper::body::Frame;
use quorate_proto::raftpb::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::client::Connection;
use super::codec::{CodecError, Decoder, Encoder, StreamKind};
use super::network::{Net, SharedUrls};
use super::peer::{Peer, StreamDown, StreamUp};
use super::server;
use crate::config::Url;
use crate::core::raft::MSG_SNAP;
use crate::core::types::MemberId;
use crate::metrics::PeerMetrics;

/// Messages that wait for a stream. Raft itself has at most 512 unanswered appends on the way to a
/// member; what is beyond this bound belongs to a member that does not read.
const QUEUE_MAX: usize = 4096;
/// Bytes that one chunk gathers before the next is begun.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Dials at most this often.
const REDIAL: Duration = Duration::from_millis(100);
/// Room for one read; what is cut off its front stays valid for as long as raft keeps the entries.
const READ_BYTES: usize = 64 << 10;
/// The head of a response.
const HEAD_MAX: usize = 16 << 10;
/// The explanation in a refusal.
const REFUSAL_MAX: usize = 4 << 10;
/// Messages that are handed to raft together at most.
const STEP_MESSAGES: usize = 1024;

struct Chunk {
    bytes: Bytes,
    messages: usize,
}

/// Where messages for a member that has dialled this one go.
pub struct Outlet {
    pub kind: StreamKind,
    encoder: Encoder,
    chunks: mpsc::UnboundedSender<Chunk>,
    queued: Arc<AtomicUsize>,
}

/// The response body that an [`Outlet`] feeds. Both run on one thread, so feeding costs no hop.
pub struct Outflow {
    chunks: mpsc::UnboundedReceiver<Chunk>,
    queued: Arc<AtomicUsize>,
}

/// A new stream.
pub fn outlet(kind: StreamKind) -> (Outlet, Outflow) {
    // Bounded by `queued`, which counts messages and not chunks.
    let (sender, receiver) = mpsc::unbounded_channel();
    let queued = Arc::<AtomicUsize>::default();
    let outlet =
        Outlet { kind, encoder: Encoder::new(kind), chunks: sender, queued: queued.clone() };
    (outlet, Outflow { chunks: receiver, queued })
}

impl Outlet {
    /// Whether the other side has gone.
    pub fn is_closed(&self) -> bool {
        self.chunks.is_closed()
    }

    /// Sends as many of `messages` as find room, in order; answers how many those were and their bytes.
    pub fn send<'a>(&mut self, messages: impl Iterator<Item = &'a Message>) -> (usize, usize) {
        let room = QUEUE_MAX.saturating_sub(self.queued.load(Ordering::Relaxed));
        let (mut sent, mut bytes) = (0, 0);
        let (mut chunk, mut in_chunk) = (BytesMut::new(), 0);
        for message in messages.take(room) {
            self.encoder.encode(message, &mut chunk);
            in_chunk += 1;
            if chunk.len() >= CHUNK_BYTES {
                sent += in_chunk;
                bytes += chunk.len();
                self.pass_on(chunk.split(), std::mem::take(&mut in_chunk));
            }
        }
        if in_chunk > 0 {
            sent += in_chunk;
            bytes += chunk.len();
            self.pass_on(chunk, in_chunk);
        }
        (sent, bytes)
    }

    /// Keeps the stream alive. Answers the bytes that takes.
    pub fn heartbeat(&mut self) -> usize {
        let mut chunk = BytesMut::new();
        self.encoder.heartbeat(&mut chunk);
        let bytes = chunk.len();
        self.pass_on(chunk, 0);
        bytes
    }

    fn pass_on(&mut self, bytes: BytesMut, messages: usize) {
        self.queued.fetch_add(messages, Ordering::Relaxed);
        // A stream whose other side has gone is noticed, and replaced, by `is_closed`.
        drop(self.chunks.send(Chunk { bytes: bytes.freeze(), messages }));
    }

    /// Messages that wait to be written.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }
}

impl hyper::body::Body for Outflow {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let chunk = ready!(self.chunks.poll_recv(cx));
        Poll::Ready(chunk.map(|chunk| {
            self.queued.fetch_sub(chunk.messages, Ordering::Relaxed);
            Ok(Frame::data(chunk.bytes))
        }))
    }
}

/// Why a stream could not be had, or ended.
#[derive(thiserror::Error, Debug)]
pub enum StreamError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("connection failed")]
    Io(#[from] io::Error),
    #[error("nothing arrived for {0:?}")]
    Silent(Duration),
    #[error("the other side closed the stream")]
    Closed,
    #[error("response is not HTTP: {0}")]
    NotHttp(#[from] httparse::Error),
    #[error("response is no stream: {0}")]
    NotStream(&'static str),
    #[error("{status}: {text}")]
    Refused { status: u16, text: String },
    /// The other side has applied this member's removal.
    #[error("{url} answers that this member was removed from the cluster")]
    Removed { url: String },
    #[error("remote server version {0} is incompatible")]
    Version(String),
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Takes the chunks of a chunked HTTP body apart.
#[derive(Default, Debug)]
enum Chunked {
    #[default]
    Size,
    Data(usize),
    DataEnd,
    End,
}

/// A chunk's size with its extensions.
const SIZE_LINE_MAX: usize = 256;

impl Chunked {
    /// The next bytes of the body that `input` holds; `None` if it takes more input.
    fn next(&mut self, input: &mut BytesMut) -> Result<Option<Bytes>, StreamError> {
        let bad = |what| Err(StreamError::NotStream(what));
        loop {
            match self {
                Chunked::Size => {
                    let Some(end) = input.iter().take(SIZE_LINE_MAX).position(|b| *b == b'\n')
                    else {
                        if input.len() >= SIZE_LINE_MAX {
                            return bad("the line of a chunk's size has no end");
                        }
                        return Ok(None);
                    };
                    let line = std::str::from_utf8(&input[..end]).unwrap_or_default();
                    let digits = line.split(';').next().unwrap_or_default().trim();
                    // from_str_radix alone would take a sign.
                    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
                    let Some(size) =
                        plain.then(|| usize::from_str_radix(digits, 16).ok()).flatten()
                    else {
                        return bad("a chunk's size is not a number");
                    };
                    input.advance(end + 1);
                    *self = if size == 0 { Chunked::End } else { Chunked::Data(size) };
                }
                Chunked::Data(left) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let data = input.split_to(input.len().min(*left)).freeze();
                    *left -= data.len();
                    if *left == 0 {
                        *self = Chunked::DataEnd;
                    }
                    return Ok(Some(data));
                }
                Chunked::DataEnd => {
                    if input.len() < 2 {
                        return Ok(None);
                    }
                    if &input[..2] != b"\r\n" {
                        return bad("a chunk is longer than its size");
                    }
                    input.advance(2);
                    *self = Chunked::Size;
                }
                Chunked::End => return Err(StreamError::Closed),
            }
        }
    }
}

/// Reads one of the two streams from a peer, dialling again whenever it ends.
pub struct Reader {
    pub net: Arc<Net>,
    pub remote: MemberId,
    pub kind: StreamKind,
    pub urls: SharedUrls,
    pub peer: Addr<Peer>,
    pub proposals: mpsc::Sender<Message>,
    pub metrics: PeerMetrics,
}

/// A stream whose head was read.
struct Open {
    stream: Box<dyn Connection>,
    /// What came behind the head.
    buffer: BytesMut,
}

impl Reader {
    /// Runs until this member is found to be removed.
    pub async fn run(self) {
        let mut pace = tokio::time::interval(REDIAL);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            let url = self.urls.pick();
            let error = match self.dial(&url).await {
                Ok(open) => {
                    self.peer.do_send(StreamUp(self.kind));
                    self.read(open).await
                }
                Err(error) => error,
            };
            self.urls.failed(&url);
            let removed = matches!(error, StreamError::Removed { .. });
            if removed {
                self.net.removed(self.remote, &error);
            }
            self.peer.do_send(StreamDown { kind: self.kind, error });
            if removed {
                return;
            }
        }
    }

    async fn dial(&self, url: &Url) -> Result<Open, StreamError> {
        let dialling = async {
            let connected = self.net.dialer.connect(url).await;
            let mut stream = connected.map_err(StreamError::Connect)?;
            let head = format!(
                "GET /raft/stream/{}/{} HTTP/1.1\r\nHost: {}\r\n{}X-Raft-To: {}\r\n\r\n",
                self.kind.path(),
                self.net.local,
                super::client::host(url),
                self.net.head_lines(),
                self.remote
            );
            stream.write_all(head.as_bytes()).await?;
            // TLS may still hold some of it.
            stream.flush().await?;
            let mut buffer = BytesMut::with_capacity(READ_BYTES);
            loop {
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Err(StreamError::Closed);
                }
                if let Some(head) = Head::parse(&buffer)? {
                    buffer.advance(head.bytes);
                    return Ok((stream, buffer, head));
                }
                if buffer.len() >= HEAD_MAX {
                    return Err(StreamError::NotStream("its head is too long"));
                }
            }
        };
        let within = self.net.dialer.timeout + self.net.options.read_timeout;
        let (mut stream, mut buffer, head) = tokio::time::timeout(within, dialling)
            .await
            .unwrap_or(Err(StreamError::Silent(within)))?;
        match head.status {
            200 => {
                let version = head.version.as_deref().unwrap_or("2.0.0");
                if !server::parse_version(version).is_some_and(server::is_compatible) {
                    return Err(StreamError::Version(version.to_string()));
                }
                if !head.chunked {
                    return Err(StreamError::NotStream("it is not chunked"));
                }
                Ok(Open { stream, buffer })
            }
            410 => Err(StreamError::Removed { url: url.to_string() }),
            status => {
                let wanted = head.length.min(REFUSAL_MAX);
                let reading = async {
                    while buffer.len() < wanted {
                        match stream.read_buf(&mut buffer).await {
                            Ok(0) | Err(_) => break,
                            Ok(_) => {}
                        }
                    }
                };
                // What there is of the explanation has to do.
                tokio::time::timeout(self.net.options.read_timeout, reading).await.ok();
                buffer.truncate(wanted);
                let text = String::from_utf8_lossy(&buffer).trim().to_string();
                Err(StreamError::Refused { status, text })
            }
        }
    }

    /// Reads until the stream ends; answers why it did.
    async fn read(&self, open: Open) -> StreamError {
        let Open { mut stream, mut buffer } = open;
        let mut decoder = Decoder::new(self.kind, self.net.local, self.remote);
        let (mut chunked, mut messages) = (Chunked::default(), Vec::new());
        let patience = self.net.options.read_timeout;
        let silence = tokio::time::sleep(patience);
        let mut silence = std::pin::pin!(silence);
        loop {
            let decoded = self.decode(&mut chunked, &mut decoder, &mut buffer, &mut messages).await;
            self.hand_over(&mut messages).await;
            if let Err(error) = decoded {
                return error;
            }
            if buffer.capacity() - buffer.len() < READ_BYTES / 8 {
                buffer.reserve(READ_BYTES);
            }
            // Setting the timer each time costs more than reading does.
            let now = Instant::now();
            if silence.deadline() < now + patience * 9 / 10 {
                silence.as_mut().reset(now + patience);
            }
            tokio::select! {
                biased;
                read = stream.read_buf(&mut buffer) => match read {
                    Ok(0) => return StreamError::Closed,
                    Ok(_) => {}
                    Err(error) => return error.into(),
                },
                () = silence.as_mut() => return StreamError::Silent(patience),
            }
        }
    }

    async fn decode(
        &self,
        chunked: &mut Chunked,
        decoder: &mut Decoder,
        buffer: &mut BytesMut,
        messages: &mut Vec<Message>,
    ) -> Result<(), StreamError> {
        while let Some(data) = chunked.next(buffer)? {
            self.metrics.received_bytes.increment(data.len() as u64);
            decoder.feed(data, messages)?;
            if messages.len() >= STEP_MESSAGES {
                self.hand_over(messages).await;
            }
        }
        Ok(())
    }

    async fn hand_over(&self, messages: &mut Vec<Message>) {
        // A snapshot without its database must not reach raft.
        messages.retain(|message| message.r#type != MSG_SNAP);
        if !messages.is_empty() {
            self.net.raft.step_from_stream(std::mem::take(messages), &self.proposals).await;
        }
    }
}

/// What counts of a response's head.
struct Head {
    bytes: usize,
    status: u16,
    chunked: bool,
    length: usize,
    version: Option<String>,
}

impl Head {
    /// Reads a head; `None` if it has not arrived whole.
    fn parse(bytes: &[u8]) -> Result<Option<Head>, StreamError> {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(bytes) = response.parse(bytes)? else { return Ok(None) };
        let mut head = Head {
            bytes,
            status: response.code.unwrap_or_default(),
            chunked: false,
            length: 0,
            version: None,
        };
        for header in response.headers.iter() {
            let value = String::from_utf8_lossy(header.value);
            if header.name.eq_ignore_ascii_case("transfer-encoding") {
                head.chunked = value.trim().eq_ignore_ascii_case("chunked");
            } else if header.name.eq_ignore_ascii_case("content-length") {
                head.length = value.trim().parse().unwrap_or(0);
            } else if header.name.eq_ignore_ascii_case("x-server-version") {
                head.version = Some(value.into_owned());
            }
        }
        Ok(Some(head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_apart(body: &[u8], step: usize) -> Result<(Vec<u8>, Chunked), StreamError> {
        let (mut chunked, mut input, mut data) = (Chunked::default(), BytesMut::new(), Vec::new());
        for part in body.chunks(step) {
            input.extend_from_slice(part);
            while let Some(part) = chunked.next(&mut input)? {
                data.extend_from_slice(&part);
            }
        }
        Ok((data, chunked))
    }

    #[test]
    fn a_chunked_body_is_put_together() {
        let body = b"3\r\nabc\r\n0a;x=y\r\n0123456789\r\n";
        for step in 1..=body.len() {
            let (data, state) = take_apart(body, step).unwrap();
            assert_eq!(data, b"abc0123456789", "by {step}");
            assert!(matches!(state, Chunked::Size));
        }
        let end = take_apart(b"1\r\na\r\n0\r\n\r\n", 100).unwrap_err();
        assert!(matches!(end, StreamError::Closed));
        for bad in [&b"x\r\n"[..], b"-1\r\n", b"1\r\nabc\r\n", &[b'1'; 300], b"\r\n"] {
            let error = take_apart(bad, 1000);
            assert!(matches!(error, Err(StreamError::NotStream(_))), "{bad:?}: {error:?}");
        }
    }

    #[test]
    fn a_full_queue_takes_no_more_until_it_is_read() {
        let (mut outlet, mut outflow) = outlet(StreamKind::Message);
        let message = Message { r#type: 8, to: 1, from: 2, ..Message::default() };
        let many = || std::iter::repeat(&message);
        assert_eq!(outlet.send(many().take(4000)).0, 4000);
        assert_eq!(outlet.send(many().take(100)).0, 96);
        assert_eq!(outlet.send(many().take(100)), (0, 0));
        // A heartbeat of the link always finds room: it shows that the stream is there.
        assert!(outlet.heartbeat() > 0);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let polled = hyper::body::Body::poll_frame(Pin::new(&mut outflow), &mut cx);
        assert!(matches!(polled, Poll::Ready(Some(Ok(_)))));
        assert_eq!(outlet.queued(), 96);
        assert_eq!(outlet.send(many().take(100)).0, 100);
        assert!(!outlet.is_closed());
        drop(outflow);
        assert!(outlet.is_closed());
    }
}
