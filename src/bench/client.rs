//! A gRPC client that costs little: HTTP/2 frames straight from `h2`, one connection for many clients.
//!
//! A [`Connection`] belongs to one thread's runtime and is shared there by [`Channel`]s, one a client.
//! A lost connection is replaced by the first client that notices; the others wait for it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, header};
use prost::Message;
use quorate_proto::etcdserverpb as pb;
use serde::{Serialize, Serializer};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until, timeout};

use crate::metrics::CODES;

use super::wire::{self, FRAME_HEADER, Malformed};

/// Receive windows: a large range or a burst of events must never wait for a window update.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// A reply beyond this is refused: no etcd setting allows a unary reply or an event list of that size.
const REPLY_BYTES_MAX: usize = 512 << 20;

/// What a server says to a login that asks for none.
const AUTH_OFF: &str = "etcdserver: authentication is not enabled";

/// Pause between two attempts to replace a lost connection.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// Where a server listens, `host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(String);

/// Why a text is no endpoint.
#[derive(thiserror::Error, Debug, PartialEq, Eq)]
pub enum EndpointError {
    #[error("endpoint {0:?}: TLS is not supported here, give a cleartext http:// endpoint")]
    Tls(String),
    #[error("endpoint {0:?}: want host:port or http://host:port")]
    Form(String),
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if text.starts_with("https://") {
            return Err(EndpointError::Tls(text.into()));
        }
        let form = || EndpointError::Form(text.into());
        let plain = text.strip_prefix("http://").unwrap_or(text);
        let authority: http::uri::Authority =
            plain.strip_suffix('/').unwrap_or(plain).parse().map_err(|_| form())?;
        // `port_u16` is also None for a port out of range.
        if authority.port_u16().is_none() || authority.host().is_empty() {
            return Err(form());
        }
        if authority.as_str().contains('@') {
            return Err(form());
        }
        Ok(Endpoint(authority.as_str().to_owned()))
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who the clients log in as, `name:password`.
#[derive(Clone)]
pub struct Credentials {
    name: String,
    password: String,
}

/// Why a text is no user.
#[derive(thiserror::Error, Debug, PartialEq, Eq)]
#[error("want name:password")]
pub struct CredentialsError;

impl FromStr for Credentials {
    type Err = CredentialsError;

    /// The password is all behind the first colon; it is in no error's text.
    fn from_str(text: &str) -> Result<Self, CredentialsError> {
        match text.split_once(':') {
            Some((name, password)) if !name.is_empty() => {
                Ok(Credentials { name: name.to_owned(), password: password.to_owned() })
            }
            _ => Err(CredentialsError),
        }
    }
}

/// Without the password, as is what [`Serialize`] writes into a report.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Serialize for Credentials {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

impl Credentials {
    /// The request that logs in, in a frame.
    pub fn frame(&self) -> Bytes {
        encoded(&pb::AuthenticateRequest {
            name: self.name.clone(),
            password: self.password.clone(),
        })
    }
}

/// The calls made here. The number is an index into a connection's prepared requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Put,
    Range,
    Txn,
    Watch,
    LeaseKeepAlive,
    LeaseGrant,
    LeaseRevoke,
    Compact,
    Status,
    Authenticate,
    Defragment,
}

impl Method {
    const ALL: [Method; 11] = [
        Method::Put,
        Method::Range,
        Method::Txn,
        Method::Watch,
        Method::LeaseKeepAlive,
        Method::LeaseGrant,
        Method::LeaseRevoke,
        Method::Compact,
        Method::Status,
        Method::Authenticate,
        Method::Defragment,
    ];

    fn path(self) -> &'static str {
        match self {
            Method::Put => "/etcdserverpb.KV/Put",
            Method::Range => "/etcdserverpb.KV/Range",
            Method::Txn => "/etcdserverpb.KV/Txn",
            Method::Watch => "/etcdserverpb.Watch/Watch",
            Method::LeaseKeepAlive => "/etcdserverpb.Lease/LeaseKeepAlive",
            Method::LeaseGrant => "/etcdserverpb.Lease/LeaseGrant",
            Method::LeaseRevoke => "/etcdserverpb.Lease/LeaseRevoke",
            Method::Compact => "/etcdserverpb.KV/Compact",
            Method::Status => "/etcdserverpb.Maintenance/Status",
            Method::Authenticate => "/etcdserverpb.Auth/Authenticate",
            Method::Defragment => "/etcdserverpb.Maintenance/Defragment",
        }
    }
}

/// No connection to a server.
#[derive(thiserror::Error, Debug, Clone)]
#[error("cannot connect to {endpoint}: {reason}")]
pub struct ConnectError {
    pub endpoint: String,
    pub reason: String,
}

/// Why a call failed.
#[derive(thiserror::Error, Debug)]
pub enum CallError {
    /// The server's own answer.
    #[error("{}: {message}", code_name(*.code))]
    Status { code: u32, message: String },
    /// The connection broke, or the stream was reset; the request may or may not have been executed.
    #[error("connection: {0}")]
    Transport(#[from] h2::Error),
    #[error("answered with HTTP status {0}, not by a gRPC server")]
    Http(StatusCode),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the server ended the stream")]
    Ended,
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

impl CallError {
    /// Whether the whole connection is gone, not this call alone.
    pub fn connection_lost(&self) -> bool {
        matches!(self, CallError::Transport(error) if !error.is_reset())
    }
}

/// gRPC's names of its status codes.
fn code_name(code: u32) -> &'static str {
    CODES.get(code as usize).copied().unwrap_or("Unknown")
}

/// One TCP connection, and what is needed to make it anew.
pub struct Connection {
    endpoint: Endpoint,
    dial_timeout: Duration,
    credentials: Option<Credentials>,
    /// With the token of the last login.
    requests: RefCell<[Request<()>; Method::ALL.len()]>,
    live: RefCell<SendRequest<Bytes>>,
    /// Connections made so far; a client that failed on an older one need not replace it again.
    generation: Cell<u64>,
    reconnecting: Mutex<()>,
}

impl Connection {
    /// Connects, completes the HTTP/2 preface, and logs in. To be called on the runtime that will drive
    /// it.
    ///
    /// # Errors
    /// If no address of the endpoint answers within `dial_timeout`, or the login is refused.
    pub async fn open(
        endpoint: Endpoint,
        dial_timeout: Duration,
        credentials: Option<Credentials>,
    ) -> Result<Rc<Self>, ConnectError> {
        let requests = RefCell::new(Method::ALL.map(|method| prepared(&endpoint, method, None)));
        let live = RefCell::new(dial(&endpoint, dial_timeout).await?);
        let connection = Rc::new(Connection {
            endpoint,
            dial_timeout,
            credentials,
            requests,
            live,
            generation: Cell::new(0),
            reconnecting: Mutex::new(()),
        });
        connection.log_in().await?;
        Ok(connection)
    }

    /// Puts the token of a new login into all requests; nothing without credentials, or where nobody
    /// asks for them.
    async fn log_in(self: &Rc<Self>) -> Result<(), ConnectError> {
        let Some(credentials) = &self.credentials else { return Ok(()) };
        let failed = |reason: String| ConnectError {
            endpoint: self.endpoint.to_string(),
            reason: format!("the login failed: {reason}"),
        };
        *self.requests.borrow_mut() =
            Method::ALL.map(|method| prepared(&self.endpoint, method, None));
        let mut channel = self.channel();
        let call = channel.unary(Method::Authenticate, credentials.frame());
        let reply = match timeout(self.dial_timeout, call).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(CallError::Status { message, .. })) if message == AUTH_OFF => return Ok(()),
            Ok(Err(error)) => return Err(failed(error.to_string())),
            Err(_) => {
                let limit = self.dial_timeout.as_millis();
                return Err(failed(format!("no answer within {limit} ms")));
            }
        };
        let token = pb::AuthenticateResponse::decode(reply)
            .ok()
            .and_then(|reply| HeaderValue::from_str(&reply.token).ok())
            .ok_or_else(|| failed("not a token was answered".to_owned()))?;
        *self.requests.borrow_mut() =
            Method::ALL.map(|method| prepared(&self.endpoint, method, Some(&token)));
        Ok(())
    }

    /// A handle for one client.
    pub fn channel(self: &Rc<Self>) -> Channel {
        Channel {
            connection: self.clone(),
            sender: self.live.borrow().clone(),
            generation: self.generation.get(),
        }
    }

    /// Replaces the connection unless one newer than `failed` is there; tries for `dial_timeout`.
    async fn replace(self: &Rc<Self>, failed: u64) -> Result<(), ConnectError> {
        let _one_at_a_time = self.reconnecting.lock().await;
        if self.generation.get() != failed {
            return Ok(());
        }
        let give_up = Instant::now() + self.dial_timeout;
        loop {
            match dial(&self.endpoint, self.dial_timeout).await {
                Ok(sender) => {
                    *self.live.borrow_mut() = sender;
                    self.generation.set(failed + 1);
                    // A server that was started again knows no older token.
                    return self.log_in().await;
                }
                Err(error) if Instant::now() >= give_up => return Err(error),
                Err(_) => sleep_until(Instant::now() + RECONNECT_PAUSE).await,
            }
        }
    }
}

fn prepared(endpoint: &Endpoint, method: Method, token: Option<&HeaderValue>) -> Request<()> {
    let uri = Uri::builder()
        .scheme("http")
        .authority(endpoint.0.as_str())
        .path_and_query(method.path())
        .build()
        .expect("an endpoint is a valid authority");
    let mut request = Request::post(uri)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .body(())
        .expect("the headers are constants");
    if let Some(token) = token {
        request.headers_mut().insert("token", token.clone());
    }
    request
}

async fn dial(endpoint: &Endpoint, limit: Duration) -> Result<SendRequest<Bytes>, ConnectError> {
    let failed = |reason: String| ConnectError { endpoint: endpoint.to_string(), reason };
    let attempt = async {
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host(&endpoint.0)
            .await
            .map_err(|error| failed(error.to_string()))?
            .collect();
        let stream =
            TcpStream::connect(&addresses[..]).await.map_err(|error| failed(error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| failed(error.to_string()))?;
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(1 << 20)
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(|error| failed(error.to_string()))?;
        // The error reaches every stream of the connection, where it is counted.
        tokio::task::spawn_local(async move {
            let _reported_by_its_streams = connection.await;
        });
        Ok(sender)
    };
    let late = |_| failed(format!("no answer within {} ms", limit.as_millis()));
    timeout(limit, attempt).await.map_err(late)?
}

/// One client's way to the server: one call at a time, or any number of streams.
pub struct Channel {
    connection: Rc<Connection>,
    sender: SendRequest<Bytes>,
    generation: u64,
}

impl Channel {
    pub fn endpoint(&self) -> &Endpoint {
        &self.connection.endpoint
    }

    /// After a transport error: continues on a new connection, made by this client or another.
    ///
    /// # Errors
    /// If the server could not be reached again for the dial timeout: the client had better stop.
    pub async fn reconnect(&mut self) -> Result<(), ConnectError> {
        self.connection.replace(self.generation).await?;
        self.sender = self.connection.live.borrow().clone();
        self.generation = self.connection.generation.get();
        Ok(())
    }

    async fn start(
        &mut self,
        method: Method,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        std::future::poll_fn(|cx| self.sender.poll_ready(cx)).await?;
        let request = self.connection.requests.borrow()[method as usize].clone();
        self.sender.send_request(request, false)
    }

    /// One call; `frame` is the request as [`wire::frame`] makes it. Answers the reply's message.
    ///
    /// # Errors
    /// Anything but one message followed by the status OK.
    pub async fn unary(&mut self, method: Method, frame: Bytes) -> Result<Bytes, CallError> {
        let (response, mut send) = self.start(method).await?;
        send.send_data(frame, true)?;
        let response = response.await?;
        if response.status() != StatusCode::OK {
            return Err(CallError::Http(response.status()));
        }
        let (parts, mut body) = response.into_parts();
        let reply = collect(&mut body).await?;
        match body.trailers().await? {
            Some(trailers) => check_status(&trailers)?,
            // A failure may come as one header block that ends the stream.
            None => check_status(&parts.headers)?,
        }
        if reply.len() < FRAME_HEADER {
            return Err(Malformed("no message before status OK").into());
        }
        match split_frame(&reply)? {
            Some(len) if len == reply.len() => Ok(reply.slice(FRAME_HEADER..)),
            _ => Err(Malformed("not exactly one message").into()),
        }
    }

    /// A call outside of what is measured, through the generated types.
    ///
    /// # Errors
    /// As [`Channel::unary`], or if the reply is not an `R`.
    pub async fn call<R: Message + Default>(
        &mut self,
        method: Method,
        request: &impl Message,
    ) -> Result<R, CallError> {
        let reply = self.unary(method, encoded(request)).await?;
        R::decode(reply).map_err(|_| Malformed("not the message expected").into())
    }

    /// Opens a stream in both directions.
    ///
    /// # Errors
    /// If the connection is lost.
    pub async fn stream(&mut self, method: Method) -> Result<Stream, CallError> {
        let (response, send) = self.start(method).await?;
        Ok(Stream { send, receive: Receive::Waiting(response), buffer: BytesMut::new() })
    }
}

/// `request` in a frame of its own.
pub fn encoded(request: &impl Message) -> Bytes {
    let mut buf = BytesMut::with_capacity(FRAME_HEADER + request.encoded_len());
    wire::frame(&mut buf, |buf| request.encode(buf).expect("the buffer grows"));
    buf.freeze()
}

/// All data of a body; the first chunk itself, uncopied, when it is the only one.
async fn collect(body: &mut RecvStream) -> Result<Bytes, CallError> {
    let Some(first) = body.data().await else { return Ok(Bytes::new()) };
    let first = first?;
    let mut free = body.flow_control().clone();
    free.release_capacity(first.len())?;
    let mut whole: Option<BytesMut> = None;
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        free.release_capacity(chunk.len())?;
        let whole = whole.get_or_insert_with(|| BytesMut::from(&first[..]));
        if whole.len() + chunk.len() > REPLY_BYTES_MAX {
            return Err(Malformed("longer than 512 MiB").into());
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.map_or(first, BytesMut::freeze))
}

/// The length of the first frame in `buf`, header included; None if more bytes are needed.
fn split_frame(buf: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(header) = buf.first_chunk::<FRAME_HEADER>() else { return Ok(None) };
    let [compressed, len @ ..] = *header;
    if compressed != 0 {
        return Err(Malformed("compressed, which was not offered"));
    }
    let len = u32::from_be_bytes(len) as usize;
    if len > REPLY_BYTES_MAX {
        return Err(Malformed("longer than 512 MiB"));
    }
    Ok(Some(FRAME_HEADER + len).filter(|&len| len <= buf.len()))
}

fn check_status(trailers: &HeaderMap) -> Result<(), CallError> {
    let Some(status) = trailers.get("grpc-status") else {
        return Err(Malformed("no grpc-status").into());
    };
    if status.as_bytes() == b"0" {
        return Ok(());
    }
    let code = status.to_str().ok().and_then(|code| code.parse().ok());
    let message = trailers.get("grpc-message").map_or(&b""[..], |message| message.as_bytes());
    Err(CallError::Status {
        code: code.ok_or(Malformed("grpc-status is not a number"))?,
        message: percent_decoded(message),
    })
}

/// gRPC sends a status message with all but printable ASCII as `%` and two hex digits.
fn percent_decoded(text: &[u8]) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|&byte| char::from(byte).to_digit(16));
    let mut decoded = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        match (text[at], digit(text.get(at + 1)), digit(text.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high << 4 | low) as u8);
                at += 3;
            }
            (byte, ..) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// A stream of messages each way.
pub struct Stream {
    send: SendStream<Bytes>,
    receive: Receive,
    /// Received and not yet taken.
    buffer: BytesMut,
}

enum Receive {
    /// A gRPC server may send its headers only with the first message.
    Waiting(ResponseFuture),
    Open {
        body: RecvStream,
        headers: HeaderMap,
    },
    Failed,
}

impl Stream {
    /// Queues one frame; never waits.
    ///
    /// # Errors
    /// If the connection is lost or the stream has ended.
    pub fn send(&mut self, frame: Bytes) -> Result<(), CallError> {
        Ok(self.send.send_data(frame, false)?)
    }

    /// The next message.
    ///
    /// # Errors
    /// The status with which the server ended the stream ([`CallError::Ended`] for OK), or what broke it.
    pub async fn next(&mut self) -> Result<Bytes, CallError> {
        loop {
            if let Some(len) = split_frame(&self.buffer)? {
                let mut message = self.buffer.split_to(len);
                message.advance(FRAME_HEADER);
                return Ok(message.freeze());
            }
            match &mut self.receive {
                Receive::Waiting(response) => match response.await {
                    Ok(response) if response.status() == StatusCode::OK => {
                        let (parts, body) = response.into_parts();
                        self.receive = Receive::Open { body, headers: parts.headers };
                    }
                    Ok(response) => return Err(self.failed(CallError::Http(response.status()))),
                    Err(error) => return Err(self.failed(error.into())),
                },
                Receive::Open { body, headers } => match body.data().await {
                    Some(Ok(chunk)) => {
                        body.flow_control().release_capacity(chunk.len())?;
                        self.buffer.extend_from_slice(&chunk);
                    }
                    Some(Err(error)) => return Err(self.failed(error.into())),
                    None => {
                        let status = match body.trailers().await {
                            Ok(Some(trailers)) => check_status(&trailers),
                            Ok(None) => check_status(headers),
                            Err(error) => Err(error.into()),
                        };
                        return Err(self.failed(status.err().unwrap_or(CallError::Ended)));
                    }
                },
                Receive::Failed => return Err(CallError::Ended),
            }
        }
    }

    /// Remembers that nothing more will come: a finished response must not be polled again.
    fn failed(&mut self, error: CallError) -> CallError {
        self.receive = Receive::Failed;
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_and_a_port_in_cleartext() {
        let parsed = |text: &str| text.parse::<Endpoint>().map(|endpoint| endpoint.to_string());
        assert_eq!(parsed("127.0.0.1:2379").as_deref(), Ok("127.0.0.1:2379"));
        assert_eq!(parsed("http://[::1]:2379/").as_deref(), Ok("[::1]:2379"));
        assert_eq!(parsed("https://a:1"), Err(EndpointError::Tls("https://a:1".into())));
        for wrong in ["", "host", ":2379", "host:", "host:66000", "unix:///s", "a:1/path", "u@h:1"]
        {
            assert_eq!(parsed(wrong), Err(EndpointError::Form(wrong.into())), "{wrong}");
        }
    }

    #[test]
    fn a_status_is_read_with_its_message() {
        let mut trailers = HeaderMap::new();
        let error = |trailers: &HeaderMap| check_status(trailers).unwrap_err().to_string();
        assert_eq!(error(&trailers), "malformed reply: no grpc-status");
        trailers.insert("grpc-status", "x".parse().unwrap());
        assert_eq!(error(&trailers), "malformed reply: grpc-status is not a number");
        trailers.insert("grpc-status", "14".parse().unwrap());
        trailers.insert("grpc-message", "etcdserver: 100%25 %C3%a9 %".parse().unwrap());
        assert_eq!(error(&trailers), "Unavailable: etcdserver: 100% é %");
        trailers.insert("grpc-status", "0".parse().unwrap());
        assert!(check_status(&trailers).is_ok());
    }

    #[test]
    fn a_frame_is_taken_only_whole() {
        assert_eq!(split_frame(&[0, 0, 0, 0]), Ok(None));
        assert_eq!(split_frame(&[0, 0, 0, 0, 2, 9]), Ok(None));
        assert_eq!(split_frame(&[0, 0, 0, 0, 2, 9, 9, 7]), Ok(Some(7)));
        assert!(split_frame(&[1, 0, 0, 0, 0]).is_err());
        assert!(split_frame(&[0, 0xff, 0, 0, 0]).is_err());
    }
}
