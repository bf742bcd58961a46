//! A small HTTP client, a connection for each request.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::server::{Member, PATIENCE};

/// What a server answered, whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A request to a member, by the address that it listens on.
pub fn request(member: &Member, method: Method, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(path).header("host", member.endpoint())
}

/// An answer that comes in parts.
pub struct Open {
    pub status: u16,
    pub headers: HeaderMap,
    body: Incoming,
    buffer: BytesMut,
    _connection: Connection,
}

/// A connection, closed when it is dropped.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Open {
    /// Sends a request and answers with the beginning of the answer.
    pub async fn send<B>(member: &Member, request: Request<B>) -> Open
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync,
    {
        let stream = TcpStream::connect(member.endpoint()).await.expect("it listens");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("connected");
        let connection = Connection(tokio::spawn(async move {
            // The test sees an early end in what is missing of the answer.
            connection.await.ok();
        }));
        let response = tokio::time::timeout(PATIENCE, sender.send_request(request)).await;
        let response: Response<Incoming> = response.expect("an answer in time").expect("HTTP");
        let (head, body) = response.into_parts();
        let (status, headers) = (head.status.as_u16(), head.headers);
        Open { status, headers, body, buffer: BytesMut::new(), _connection: connection }
    }

    /// The next line, without its end; `None` at the end of the answer.
    pub async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return Some(String::from_utf8(line[..end].to_vec()).expect("text"));
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await;
            match frame.expect("a line in time") {
                Some(frame) => {
                    let data = frame.expect("HTTP").into_data().unwrap_or_default();
                    self.buffer.extend_from_slice(&data);
                }
                None if self.buffer.is_empty() => return None,
                None => panic!("the last line does not end: {:?}", self.buffer),
            }
        }
    }

    /// The next line, as JSON.
    pub async fn next(&mut self) -> Value {
        let line = self.line().await.expect("the answer goes on");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    async fn whole(mut self) -> Answer {
        while let Some(frame) =
            tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("an end in time")
        {
            let data = frame.expect("HTTP").into_data().unwrap_or_default();
            self.buffer.extend_from_slice(&data);
        }
        let body = String::from_utf8(self.buffer.to_vec()).expect("text");
        Answer { status: self.status, headers: std::mem::take(&mut self.headers), body }
    }
}

/// Sends a request and waits for the whole answer.
pub async fn send(member: &Member, request: Request<Full<Bytes>>) -> Answer {
    Open::send(member, request).await.whole().await
}

/// Sends a body, as curl does without any options.
pub async fn post(member: &Member, path: &str, body: impl Into<Bytes>) -> Answer {
    let request = request(member, Method::POST, path).body(Full::new(body.into())).unwrap();
    send(member, request).await
}

/// The code and the text of a refusal.
pub fn refusal(answer: &Answer) -> (u16, u64, String) {
    let body = answer.json();
    let text = body["message"].as_str().unwrap_or_default().to_owned();
    (answer.status, body["code"].as_u64().unwrap_or_default(), text)
}
