//! Messages posted one by one, for as long as a peer has not dialled its streams.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use prost::Message as _;
use quorate_proto::raftpb::Message as RaftMessage;

use super::client;
use super::network::Net;
use super::peer::{Peer, Task};
use crate::config::Url;

/// Messages that wait for their turn.
const QUEUE_MAX: usize = 64;
/// Requests under way at once.
const CONCURRENT: usize = 4;
/// etcd closes connections that were idle for 5 s; one that it may be closing is not used.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// A peer that takes longer to answer has more to do than one message can add to.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// The explanation in a refusal.
const ANSWER_MAX: usize = 64 << 10;

/// Why a peer did not take what was posted to it.
#[derive(thiserror::Error, Debug)]
pub enum PostError {
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    #[error("request failed")]
    Http(#[from] hyper::Error),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("{status}: {text}")]
    Refused { status: u16, text: String },
    /// The other side has applied this member's removal.
    #[error("{url} answers that this member was removed from the cluster: {text}")]
    Removed { url: String, text: String },
}

/// A kept connection.
pub struct Connection {
    sender: SendRequest<Body>,
    _driver: Task,
    used: Instant,
}

impl Connection {
    /// Connects to `url`.
    ///
    /// # Errors
    /// `Connect`, `Http`.
    pub async fn open(net: &Net, url: &Url) -> Result<Self, PostError> {
        let stream = net.dialer.connect(url).await.map_err(PostError::Connect)?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = Task::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to a peer ended");
            }
        });
        Ok(Connection { sender, _driver: driver, used: Instant::now() })
    }

    /// Whether it can be used again.
    pub fn is_fresh(&self) -> bool {
        !self.sender.is_closed() && self.used.elapsed() < IDLE_MAX
    }

    /// Sends `request` and waits for the head of the answer, without a limit of time.
    ///
    /// # Errors
    /// `Http`.
    pub async fn ask(&mut self, request: Request<Body>) -> Result<Response<Incoming>, PostError> {
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        self.used = Instant::now();
        Ok(response)
    }

    /// Posts `body` and waits for the answer, without a limit of time.
    ///
    /// # Errors
    /// `Http`, `Refused`, `Removed`.
    pub async fn post(
        &mut self,
        net: &Net,
        url: &Url,
        path: &str,
        content_type: &'static str,
        body: Body,
    ) -> Result<(), PostError> {
        let request = net
            .introduce(Request::post(path))
            .header(header::HOST, client::host_header(url))
            .header(header::CONTENT_TYPE, content_type)
            .body(body)
            .expect("the headers of a member are valid");
        let response = self.ask(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        if status == StatusCode::NO_CONTENT || status == StatusCode::OK {
            return Ok(());
        }
        let text = body.map(|body| body.to_bytes()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).trim().to_string();
        Err(match status {
            // Newer releases of etcd say 403 to a message for another member, too. That the address
            // has changed hands is no reason to stop.
            StatusCode::FORBIDDEN if !text.contains("mismatch member") => {
                PostError::Removed { url: url.to_string(), text }
            }
            _ => PostError::Refused { status: status.as_u16(), text },
        })
    }
}

/// What waits to be posted, and with what.
#[derive(Default)]
pub struct Pipeline {
    queue: VecDeque<RaftMessage>,
    busy: usize,
    idle: Vec<(Url, Connection)>,
}

impl Pipeline {
    /// How many messages it takes now.
    pub fn room(&self) -> usize {
        QUEUE_MAX.saturating_sub(self.queue.len())
    }

    /// Adds a message for which there is room.
    pub fn push(&mut self, message: RaftMessage) {
        self.queue.push_back(message);
    }

    fn take_idle(&mut self, url: &Url) -> Option<Connection> {
        self.idle.retain(|(to, connection)| to == url && connection.is_fresh());
        self.idle.pop().map(|(_, connection)| connection)
    }
}

/// What became of a message.
struct Posted {
    message: RaftMessage,
    url: Url,
    bytes: usize,
    result: Result<Connection, PostError>,
}

async fn post(net: Arc<Net>, url: Url, kept: Option<Connection>, message: RaftMessage) -> Posted {
    let body: Bytes = message.encode_to_vec().into();
    let bytes = body.len();
    let posting = async {
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(&net, &url).await?,
        };
        let body = Body::from(body);
        connection.post(&net, &url, "/raft", "application/protobuf", body).await?;
        Ok(connection)
    };
    let result = tokio::time::timeout(ANSWER_WITHIN, posting)
        .await
        .unwrap_or(Err(PostError::TimedOut(ANSWER_WITHIN)));
    Posted { message, url, bytes, result }
}

impl Peer {
    /// Posts what waits, as far as requests are free.
    pub(super) fn post(&mut self, ctx: &mut Context<Self>) {
        while self.pipeline.busy < CONCURRENT
            && let Some(message) = self.pipeline.queue.pop_front()
        {
            let url = self.urls.pick();
            let kept = self.pipeline.take_idle(&url);
            self.pipeline.busy += 1;
            let posting = post(self.net.clone(), url, kept, message).into_actor(self);
            ctx.spawn(posting.map(|posted, this, ctx| this.posted(posted, ctx)));
        }
    }

    fn posted(&mut self, posted: Posted, ctx: &mut Context<Self>) {
        self.pipeline.busy -= 1;
        match posted.result {
            Ok(connection) => {
                self.metrics.sent_bytes.increment(posted.bytes as u64);
                self.pipeline.idle.push((posted.url, connection));
            }
            Err(error) => {
                self.urls.failed(&posted.url);
                if matches!(error, PostError::Removed { .. }) {
                    self.told_of_removal(&error);
                }
                self.lost(&[posted.message], &crate::actors::exit::full(&error));
            }
        }
        self.post(ctx);
    }
}
