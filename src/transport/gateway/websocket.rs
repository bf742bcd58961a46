//! The same calls over WebSocket (v3-api 8.4): each text from the client is a part of the request, each
//! line of the reply a text to the client. Browsers have no other way to send a stream.

use std::any::Any;
use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::header::{
    AUTHORIZATION, CONNECTION, COOKIE, ORIGIN, REFERER, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::Gateway;
use crate::transport::budget::{Account, Call, Charge};
use crate::transport::held::Unfinished;
use crate::transport::http::status::text_error;

/// In the extensions of a request: what is to live as long as its connection, even when that is no
/// longer served as HTTP.
#[derive(Clone)]
pub struct Kept(pub Arc<dyn Any + Send + Sync>);

/// Texts of a client that wait to be read by the call.
const TEXTS_AHEAD: usize = 1;
/// Time for the last lines of a call when the member stops.
const STOPPING: Duration = Duration::from_secs(1);
/// Bytes of a client's control frame that come before its payload.
const CONTROL_HEADER: usize = 6;
/// What a token comes after in the sub-protocols, and what is chosen then.
const BEARER: &str = "Bearer";
const TOKEN_COOKIE: &str = "token";

/// Whether a list in a header names something.
fn names(headers: &HeaderMap, header: HeaderName, wanted: &str) -> bool {
    let lists = headers.get_all(header).into_iter().filter_map(|value| value.to_str().ok());
    lists.flat_map(|list| list.split(',')).any(|item| item.trim().eq_ignore_ascii_case(wanted))
}

/// Whether a client wants a WebSocket.
pub fn is_upgrade(headers: &HeaderMap) -> bool {
    names(headers, CONNECTION, "upgrade") && names(headers, UPGRADE, "websocket")
}

/// Who asks, as the headers of a handshake say it.
fn authorization(headers: &HeaderMap) -> Option<HeaderValue> {
    let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let token = cookies.flat_map(|list| list.split(';')).find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == TOKEN_COOKIE).then(|| value.trim_matches('"'))
    });
    let token = token.or_else(|| {
        let (_, token) =
            headers.get(SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?.split_once("Bearer,")?;
        Some(token.trim_matches(' '))
    });
    HeaderValue::from_str(&format!("Bearer {}", token?)).ok()
}

/// Answers a handshake, and runs the call over what comes after it.
pub fn upgrade(gateway: Arc<Gateway>, mut request: Request) -> Response {
    let headers = request.headers();
    let version = headers.get(SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13");
    let key = headers.get(SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
    let accept = key.and_then(|key| HeaderValue::from_str(&key).ok());
    let refused = |status: StatusCode| {
        let mut response = text_error(status, status.canonical_reason().unwrap_or_default());
        response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        response
    };
    if request.method() != Method::GET {
        return refused(StatusCode::METHOD_NOT_ALLOWED);
    }
    let (true, Some(accept)) = (version, accept) else {
        return refused(StatusCode::BAD_REQUEST);
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let told = response.headers_mut();
    told.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    told.insert(UPGRADE, HeaderValue::from_static("websocket"));
    told.insert(SEC_WEBSOCKET_ACCEPT, accept);
    let protocols = headers.get(SEC_WEBSOCKET_PROTOCOL);
    if protocols.is_some_and(|list| list.as_bytes().starts_with(BEARER.as_bytes())) {
        told.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(BEARER));
    }
    // Of the connection that was: from now on it has this one call.
    let account = request.extensions().get::<Arc<Account>>().cloned();
    let counted = match &account {
        None => None,
        Some(account) => match account.call() {
            None => return refused(StatusCode::SERVICE_UNAVAILABLE),
            counted => counted,
        },
    };
    let connection = hyper::upgrade::on(&mut request);
    actix::spawn(converse(gateway, request, connection, account, counted));
    response
}

/// The call that the handshake asked for, with `body` for what the client will send.
fn call(handshake: &Request, body: Body) -> Request {
    let mut call = Request::new(body);
    *call.method_mut() = Method::POST;
    *call.uri_mut() = handshake.uri().clone();
    if let Some(account) = handshake.extensions().get::<Arc<Account>>() {
        call.extensions_mut().insert(account.clone());
    }
    let (headers, given) = (call.headers_mut(), handshake.headers());
    if let Some(authorization) = authorization(given) {
        headers.insert(AUTHORIZATION, authorization);
    }
    for name in [ORIGIN, REFERER] {
        if let Some(value) = given.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    call
}

async fn converse(
    gateway: Arc<Gateway>,
    handshake: Request,
    connection: OnUpgrade,
    account: Option<Arc<Account>>,
    _counted: Option<Call>,
) {
    let io = match connection.await {
        Ok(io) => TokioIo::new(io),
        Err(error) => {
            tracing::debug!(%error, "lost a connection before it became a WebSocket");
            return;
        }
    };
    let inflow = Rc::new(RefCell::new(Inflow::new(account.clone())));
    let io = Metered { io, inflow: inflow.clone() };
    let bytes_max = gateway.receive_max.saturating_mul(2);
    let config = WebSocketConfig::default()
        .max_message_size(Some(bytes_max))
        .max_frame_size(Some(bytes_max));
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let (mut sink, mut source) = socket.split();
    let (sender, texts) = mpsc::channel(TEXTS_AHEAD);
    let call = call(&handshake, Body::new(Texts(texts)));
    let hold = |bytes: &Bytes| account.as_ref().map(|account| account.hold(bytes.len()));
    let listen = async {
        while let Some(Ok(message)) = source.next().await {
            let text = match message {
                Message::Text(text) => Bytes::from(text),
                Message::Binary(bytes) => bytes,
                Message::Close(_) => return,
                // The library answers pings by itself. They may come in the middle of a text.
                Message::Ping(bytes) | Message::Pong(bytes) => {
                    inflow.borrow_mut().sub(CONTROL_HEADER + bytes.len());
                    continue;
                }
                Message::Frame(_) => continue,
            };
            let charge = hold(&text);
            inflow.borrow_mut().whole();
            drop(sender.send((text, charge)).await);
        }
    };
    let answer = async {
        let mut body = gateway.handle(call).await.into_body();
        while let Some(Ok(part)) = body.frame().await {
            let Ok(mut line) = part.into_data() else { continue };
            if line.ends_with(b"\n") {
                line.truncate(line.len() - 1);
            }
            let _charge = hold(&line);
            let Ok(text) = Utf8Bytes::try_from(line) else { break };
            if sink.send(Message::Text(text)).await.is_err() {
                return;
            }
        }
        // A client that has gone needs no goodbye.
        drop(sink.send(Message::Close(None)).await);
    };
    let stopped = async {
        gateway.member.stopped().await;
        tokio::time::sleep(STOPPING).await;
    };
    // The HTTP server has let go of the connection: nobody else looks.
    let ended = async {
        match &account {
            Some(account) => {
                account.ended().await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = listen => {}
        () = answer => {}
        () = stopped => {}
        () = ended => {}
    }
}

/// What has come of a client's text that is not whole.
struct Inflow {
    unfinished: Option<Unfinished>,
    come: usize,
}

impl Inflow {
    fn new(account: Option<Arc<Account>>) -> Self {
        Inflow { unfinished: account.map(Unfinished::new), come: 0 }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.unfinished.as_mut().map_or(Poll::Ready(()), |unfinished| unfinished.poll_room(cx))
    }

    fn add(&mut self, bytes: usize) {
        self.set(self.come + bytes);
    }

    fn sub(&mut self, bytes: usize) {
        self.set(self.come.saturating_sub(bytes));
    }

    /// A text has come whole; of the next one, there is no more than what was read with it.
    fn whole(&mut self) {
        self.set(0);
    }

    fn set(&mut self, come: usize) {
        self.come = come;
        if let Some(unfinished) = &mut self.unfinished {
            unfinished.set((come > 0).then_some(come));
        }
    }
}

/// A connection of which it is noted what comes: the library gathers a text out of sight.
struct Metered<IO> {
    io: IO,
    inflow: Rc<RefCell<Inflow>>,
}

impl<IO: AsyncRead + Unpin> AsyncRead for Metered<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.inflow.borrow_mut().poll_room(cx));
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.inflow.borrow_mut().add(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Metered<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// The texts of a client as a body.
struct Texts(mpsc::Receiver<(Bytes, Option<Charge>)>);

impl HttpBody for Texts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|text| text.map(|(text, _)| Ok(Frame::data(text))))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::metrics::Metrics;
    use crate::transport::budget::Budget;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_handshake_is_told_from_other_requests() {
        for (connection, upgrade, expected) in [
            ("Upgrade", "websocket", true),
            ("keep-alive, Upgrade", "WebSocket", true),
            ("keep-alive", "websocket", false),
            ("upgrade", "h2c", false),
        ] {
            let headers = headers(&[(CONNECTION, connection), (UPGRADE, upgrade)]);
            assert_eq!(is_upgrade(&headers), expected, "{connection} {upgrade}");
        }
        assert!(!is_upgrade(&HeaderMap::new()));
    }

    #[test]
    fn a_token_comes_as_a_protocol_or_a_cookie() {
        for (given, expected) in [
            (&[(SEC_WEBSOCKET_PROTOCOL, "Bearer, abc.7")][..], Some("Bearer abc.7")),
            (&[(SEC_WEBSOCKET_PROTOCOL, "Bearer,abc")], Some("Bearer abc")),
            (&[(SEC_WEBSOCKET_PROTOCOL, "Bearer")], None),
            (&[(COOKIE, "a=b; token=xyz")], Some("Bearer xyz")),
            (&[(SEC_WEBSOCKET_PROTOCOL, "Bearer, abc"), (COOKIE, "token=xyz")], Some("Bearer xyz")),
            (&[(AUTHORIZATION, "abc")], None),
        ] {
            let found = authorization(&headers(given));
            assert_eq!(found.as_ref().map(|v| v.to_str().unwrap()), expected, "{given:?}");
        }
    }

    #[test]
    fn only_some_headers_of_a_handshake_reach_the_call() {
        let mut handshake = Request::new(Body::empty());
        *handshake.uri_mut() = "/v3/watch".parse().unwrap();
        *handshake.headers_mut() = headers(&[
            (ORIGIN, "http://a"),
            (REFERER, "http://b"),
            (COOKIE, "token=t"),
            (HeaderName::from_static("grpc-metadata-hasleader"), "true"),
        ]);
        let call = call(&handshake, Body::empty());
        assert_eq!((call.method(), call.uri().path()), (&Method::POST, "/v3/watch"));
        let mut names: Vec<_> = call.headers().keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "origin", "referer"]);
    }

    #[tokio::test]
    async fn what_has_come_of_a_text_is_on_the_account() {
        let budget = Budget::new(1 << 30, 10, &Metrics::new());
        let account = budget.open(None, 1 << 20);
        let inflow = Rc::new(RefCell::new(Inflow::new(Some(account.clone()))));
        let (mut client, io) = tokio::io::duplex(1 << 20);
        let mut io = Metered { io, inflow: inflow.clone() };
        client.write_all(&[0; 100_000]).await.unwrap();
        io.read_exact(&mut [0; 100_000]).await.unwrap();
        let all = account.held();
        assert!(all >= 100_000);
        // A ping in the middle of it is none of it, and does not make it whole.
        inflow.borrow_mut().sub(CONTROL_HEADER + 4);
        assert_eq!(account.held(), all - 10);
        inflow.borrow_mut().whole();
        assert_eq!(account.held(), 0);
    }
}
