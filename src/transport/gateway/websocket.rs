//! The same calls over WebSocket (v3-api 8.4): each text from the client is a part of the request, each
//! line of the reply a text to the client. Browsers have no other way to send a stream.

use std::any::Any;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
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
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::Gateway;
use crate::transport::budget::Account;
use crate::transport::http::status::text_error;

/// In the extensions of a request: what is to live as long as its connection, even when that is no
/// longer served as HTTP.
#[derive(Clone)]
pub struct Kept(pub Arc<dyn Any + Send + Sync>);

/// Texts of a client that wait to be read by the call.
const TEXTS_AHEAD: usize = 1;
/// Time for the last lines of a call when the member stops.
const STOPPING: Duration = Duration::from_secs(1);
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
    let connection = hyper::upgrade::on(&mut request);
    actix::spawn(converse(gateway, request, connection));
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

async fn converse(gateway: Arc<Gateway>, handshake: Request, connection: OnUpgrade) {
    let io = match connection.await {
        Ok(io) => TokioIo::new(io),
        Err(error) => {
            tracing::debug!(%error, "lost a connection before it became a WebSocket");
            return;
        }
    };
    let bytes_max = gateway.receive_max.saturating_mul(2);
    let config = WebSocketConfig::default()
        .max_message_size(Some(bytes_max))
        .max_frame_size(Some(bytes_max));
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let (mut sink, mut source) = socket.split();
    let (sender, texts) = mpsc::channel(TEXTS_AHEAD);
    let call = call(&handshake, Body::new(Texts(texts)));
    let listen = async {
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Text(text) => drop(sender.send(Bytes::from(text)).await),
                Message::Binary(bytes) => drop(sender.send(bytes).await),
                Message::Close(_) => return,
                // The library answers pings by itself.
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
    };
    let answer = async {
        let mut body = gateway.handle(call).await.into_body();
        while let Some(Ok(part)) = body.frame().await {
            let Ok(mut line) = part.into_data() else { continue };
            if line.ends_with(b"\n") {
                line.truncate(line.len() - 1);
            }
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
    tokio::select! {
        () = listen => {}
        () = answer => {}
        () = stopped => {}
    }
}

/// The texts of a client as a body.
struct Texts(mpsc::Receiver<Bytes>);

impl HttpBody for Texts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|text| text.map(|text| Ok(Frame::data(text))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
