//! The gateway over WebSocket.

use futures_util::{SinkExt, StreamExt};
use http::Method;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Response;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::http::{post, request, send};
use crate::server::{Kind, Member, PATIENCE};

type Socket = WebSocketStream<TcpStream>;

async fn connect(
    member: &Member,
    path: &str,
    headers: &[(&'static str, &str)],
) -> Result<(Socket, Response), Error> {
    let url = format!("ws://{}{path}", member.endpoint());
    let mut request = url.into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    let stream = TcpStream::connect(member.endpoint()).await.unwrap();
    tokio_tungstenite::client_async(request, stream).await
}

async fn next(socket: &mut Socket) -> Message {
    let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("a message in time");
    message.expect("the connection goes on").expect("it is well")
}

async fn text(socket: &mut Socket) -> Value {
    match next(socket).await {
        Message::Text(text) => serde_json::from_str(text.as_str()).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Creates a watcher as whoever the header of the handshake names.
pub async fn watches_with(member: &Member, header: (&'static str, &str)) {
    let (mut socket, _) = connect(member, "/v3/watch", &[header]).await.unwrap();
    socket.send(r#"{"create_request":{"key":"YQ=="}}"#.into()).await.unwrap();
    let created = text(&mut socket).await;
    assert_eq!(created["result"]["canceled"], Value::Null, "{created}");
    assert_eq!(created["result"]["created"], true);
}

#[tokio::test]
async fn a_watch_goes_on_in_texts() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        let (mut socket, response) = connect(&member, "/v3/watch", &[]).await.unwrap();
        assert_eq!(response.status(), 101);
        assert!(!response.headers().contains_key("sec-websocket-protocol"));
        socket.send(r#"{"create_request":{"key":"YQ=="}}"#.into()).await.unwrap();
        let created = text(&mut socket).await;
        assert_eq!(created["result"]["created"], true, "{kind:?}");
        // Another request in the same stream, in a frame of the other kind.
        let second = Message::Binary(r#"{"create_request":{"key":"Yg=="}}"#.into());
        socket.send(second).await.unwrap();
        assert_eq!(text(&mut socket).await["result"]["watch_id"], "1");
        post(&member, "/v3/kv/put", r#"{"key":"YQ==","value":"Yg=="}"#).await;
        let event = text(&mut socket).await;
        assert_eq!(event["result"]["events"][0]["kv"]["value"], "Yg==");
        socket.send(Message::Ping("p".into())).await.unwrap();
        assert_eq!(next(&mut socket).await, Message::Pong("p".into()));
    }
}

#[tokio::test]
async fn a_single_call_is_one_text_each_way() {
    let member = Member::start(Kind::Redb).await;
    for (path, sent, expected) in [
        ("/v3beta/kv/put", r#"{"key":"YQ=="}"#, json!("2")),
        ("/v3/kv/range", r#"{"key":"YQ=="}"#, json!("2")),
    ] {
        let (mut socket, _) = connect(&member, path, &[]).await.unwrap();
        socket.send(sent.into()).await.unwrap();
        assert_eq!(text(&mut socket).await["header"]["revision"], expected, "{path}");
        assert!(matches!(next(&mut socket).await, Message::Close(_)), "{path}");
    }
    let (mut socket, _) = connect(&member, "/v3/nope", &[]).await.unwrap();
    assert_eq!(text(&mut socket).await, json!({"code": 5, "message": "Not Found"}));
    let (mut socket, _) = connect(&member, "/v3/kv/range", &[]).await.unwrap();
    socket.send("x".into()).await.unwrap();
    assert_eq!(text(&mut socket).await["code"], 3);
}

#[tokio::test]
async fn the_protocol_of_a_token_is_the_one_that_is_chosen() {
    let member = Member::start(Kind::Redb).await;
    let offered = ("sec-websocket-protocol", "Bearer, token.7");
    let (_, response) = connect(&member, "/v3/watch", &[offered]).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "Bearer");
}

#[tokio::test]
async fn what_is_no_handshake_is_refused() {
    let member = Member::start(Kind::Redb).await;
    let with = |method: Method, key: bool, version: &str| {
        let mut request = request(&member, method, "/v3/watch")
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", version);
        if key {
            request = request.header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        }
        request.body(Full::default()).unwrap()
    };
    for (request, status) in [
        (with(Method::GET, true, "12"), 400),
        (with(Method::GET, false, "13"), 400),
        (with(Method::POST, true, "13"), 405),
    ] {
        let answer = send(&member, request).await;
        assert_eq!((answer.status, answer.header("sec-websocket-version")), (status, Some("13")));
    }
}

#[tokio::test]
async fn a_message_that_is_too_long_and_a_member_that_stops_end_the_connection() {
    let mut member = Member::start(Kind::Redb).await;
    let (mut socket, _) = connect(&member, "/v3/kv/put", &[]).await.unwrap();
    let long = " ".repeat(5 << 20);
    // The server may be gone before it is sent.
    socket.send(long.into()).await.ok();
    let ended = tokio::time::timeout(PATIENCE, socket.next()).await.expect("an end in time");
    assert!(!matches!(ended, Some(Ok(Message::Text(_)))), "{ended:?}");

    let (mut silent, _) = connect(&member, "/v3/kv/put", &[]).await.unwrap();
    let (mut watch, _) = connect(&member, "/v3/watch", &[]).await.unwrap();
    watch.send(r#"{"create_request":{"key":"YQ=="}}"#.into()).await.unwrap();
    text(&mut watch).await;
    member.restart().await;
    let last = text(&mut watch).await;
    assert_eq!(last["error"]["message"], "etcdserver: server stopped");
    let ended = tokio::time::timeout(PATIENCE, silent.next()).await.expect("an end in time");
    assert!(!matches!(ended, Some(Ok(Message::Text(_)))), "{ended:?}");
}
