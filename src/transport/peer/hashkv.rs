//! `/members/hashkv`: a member's hash at a revision, told to and asked of its peers (formats-and-peers
//! 6.1, operations 3.3).

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use serde::{Deserialize, Serialize};

use super::client::{self, Dialer};
use crate::actors::exit::full;
use crate::actors::integrity::Peers;
use crate::bootstrap::remote;
use crate::config::Url;
use crate::core::integrity::{Hashed, NoHash};
use crate::core::membership::{Member as Record, Version};
use crate::core::mvcc::ReadError;
use crate::core::mvcc::hash::KvHash;
use crate::core::types::{ClusterId, MemberId};
use crate::transport::http::status::{method_not_allowed, text_error};
use crate::transport::member::Member;

const PATH: &str = "/members/hashkv";
const CLUSTER_ID: HeaderName = HeaderName::from_static("x-etcd-cluster-id");
/// A revision with its name takes a few dozen bytes.
const QUESTION_MAX: usize = 64 << 10;
/// What is said of a revision out of reach; whoever asks looks for these words.
const COMPACTED: &str = "mvcc: required revision has been compacted";
const FUTURE: &str = "mvcc: required revision is a future revision";

/// As Go writes it: what is zero is left out.
#[derive(Serialize, Deserialize)]
struct Question {
    #[serde(default, skip_serializing_if = "is_zero")]
    revision: i64,
}

#[derive(Default, Serialize, Deserialize)]
struct Header {
    #[serde(default, skip_serializing_if = "is_zero")]
    revision: i64,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    #[serde(default)]
    header: Header,
    #[serde(default, skip_serializing_if = "is_zero")]
    hash: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    compact_revision: i64,
    /// Not told by members older than 3.6.
    #[serde(default, skip_serializing_if = "is_zero")]
    hash_revision: i64,
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

/// Reads an object. A list of the right length would pass for one otherwise.
fn object<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    if !json.trim_ascii_start().starts_with(b"{") {
        return Err("it is no JSON object".to_string());
    }
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// Answers what peers ask.
pub fn router(member: Arc<Member>) -> Router {
    Router::new().route(PATH, any(hash_kv)).with_state(member)
}

async fn hash_kv(State(member): State<Arc<Member>>, request: Request<Body>) -> Response {
    let own = HeaderValue::from_str(&member.shared.cluster_id.to_string())
        .expect("hex is a header value");
    let mut response = answer(member, &own, request).await;
    response.headers_mut().insert(CLUSTER_ID, own);
    response
}

async fn answer(member: Arc<Member>, own: &HeaderValue, request: Request<Body>) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed("GET");
    }
    let bad = |text: &str| text_error(StatusCode::BAD_REQUEST, text);
    if request.headers().get(CLUSTER_ID).is_some_and(|theirs| !theirs.is_empty() && theirs != own) {
        return text_error(StatusCode::PRECONDITION_FAILED, "cluster ID mismatch");
    }
    let Ok(body) = Limited::new(request.into_body(), QUESTION_MAX).collect().await else {
        return bad("error reading body");
    };
    let Ok(Question { revision }) = object(&body.to_bytes()) else {
        return bad("error unmarshalling request");
    };
    let hashing = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let hashed = member.hash_kv(revision);
        member.metrics.hash_rev_seconds.record(started.elapsed());
        hashed
    });
    let Ok(hashed) = hashing.await else {
        return text_error(StatusCode::INTERNAL_SERVER_ERROR, "member is stopping");
    };
    let error = match hashed {
        Ok((hash, header)) => {
            let answer = Answer {
                header: Header { revision: header.map_or(0, |header| header.revision) },
                hash: hash.hash,
                compact_revision: hash.compact_revision,
                hash_revision: hash.revision,
            };
            let json = serde_json::to_vec(&answer).expect("numbers are always JSON");
            let json_type = HeaderValue::from_static("application/json");
            return ([(header::CONTENT_TYPE, json_type)], json).into_response();
        }
        Err(error) => error,
    };
    tracing::warn!("requested-revision" = revision, %error, "failed to get hashKV");
    match error {
        ReadError::Compacted { .. } | ReadError::Superseded(_) => bad(COMPACTED),
        ReadError::Future { .. } => bad(FUTURE),
        ReadError::Damaged(_) | ReadError::Storage(_) => {
            text_error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())
        }
    }
}

/// Asks members by their peer URLs.
pub struct Asker {
    pub cluster_id: ClusterId,
    /// Its patience is for each address.
    pub dialer: Dialer,
}

impl Peers for Asker {
    fn hash(&self, peer: &Record, revision: i64) -> BoxFuture<'static, Result<Hashed, NoHash>> {
        let (cluster_id, dialer) = (self.cluster_id, self.dialer.clone());
        let (id, urls) = (MemberId(peer.id), urls(peer));
        Box::pin(async move {
            let mut last = NoHash::Unreachable("it has no peer URL".to_string());
            for url in urls {
                match ask(&dialer, &url, cluster_id, revision).await {
                    Err(error) => {
                        tracing::warn!(
                            "requested-revision" = revision,
                            "remote-peer-id" = %id,
                            "remote-peer-endpoint" = %url,
                            %error,
                            "failed hash kv request"
                        );
                        last = error;
                    }
                    hashed => return hashed,
                }
            }
            Err(last)
        })
    }

    fn version(&self, peer: &Record) -> BoxFuture<'static, Option<Version>> {
        let (id, urls, dialer) = (MemberId(peer.id), urls(peer), self.dialer.clone());
        Box::pin(async move {
            let told = remote::versions(&dialer, id, &urls).await?;
            let version = Version::parse(&told.server);
            if version.is_none() {
                tracing::warn!(
                    "remote-member-id" = %id,
                    version = told.server,
                    "failed to parse server version of remote member"
                );
            }
            version
        })
    }
}

/// The member's peer URLs; one that is none cannot be asked.
fn urls(peer: &Record) -> Vec<Url> {
    peer.peer_urls.iter().filter_map(|url| Url::parse(url).ok()).collect()
}

async fn ask(
    dialer: &Dialer,
    url: &Url,
    cluster_id: ClusterId,
    revision: i64,
) -> Result<Hashed, NoHash> {
    let question = serde_json::to_vec(&Question { revision }).expect("a number is always JSON");
    let request = Request::get(PATH)
        .header(header::CONTENT_TYPE, "application/json")
        .header(CLUSTER_ID, cluster_id.to_string())
        .body(Full::new(Bytes::from(question)))
        .expect("a path makes a request");
    let answer = client::call(dialer, url, request, dialer.timeout)
        .await
        .map_err(|error| NoHash::Unreachable(full(&error).to_string()))?;
    read_answer(answer.status(), answer.body(), revision)
}

fn read_answer(status: StatusCode, body: &[u8], asked: i64) -> Result<Hashed, NoHash> {
    if status != StatusCode::OK {
        let text = String::from_utf8_lossy(body);
        return Err(match status {
            StatusCode::BAD_REQUEST if text.contains(COMPACTED) => NoHash::Compacted,
            StatusCode::BAD_REQUEST if text.contains(FUTURE) => NoHash::Future,
            _ => {
                let text: String = text.trim_end().chars().take(200).collect();
                NoHash::Unreachable(format!("status {status}: {text}"))
            }
        });
    }
    let answer: Answer = object(body)
        .map_err(|error| NoHash::Unreachable(format!("the answer cannot be read: {error}")))?;
    let revision = if answer.hash_revision == 0 { asked } else { answer.hash_revision };
    if revision != asked && asked != 0 {
        let what = format!("asked for revision {asked}, it answered for revision {revision}");
        return Err(NoHash::Unreachable(what));
    }
    if answer.header.revision < 1 {
        return Err(NoHash::Unreachable("the answer names no revision of its store".to_string()));
    }
    let Answer { hash, compact_revision, .. } = answer;
    let hash = KvHash { hash, compact_revision, revision };
    Ok(Hashed { hash, newest: answer.header.revision })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_and_answers_are_written_as_etcd_does() {
        let question = |revision| serde_json::to_string(&Question { revision }).unwrap();
        assert_eq!((question(5), question(0)), (r#"{"revision":5}"#.into(), "{}".into()));
        let answer = Answer {
            header: Header { revision: 9 },
            hash: 1,
            compact_revision: -1,
            hash_revision: 5,
        };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"header":{"revision":9},"hash":1,"compact_revision":-1,"hash_revision":5}"#
        );
    }

    #[test]
    fn answers_are_understood() {
        let read = |status: u16, body: &str| {
            read_answer(StatusCode::from_u16(status).unwrap(), body.as_bytes(), 5)
        };
        let hash = KvHash { hash: 7, compact_revision: 0, revision: 5 };
        // 3.4 does not say which revision it has hashed.
        for body in [
            r#"{"header":{"revision":9},"hash":7}"#,
            r#"{"header":{"revision":9},"hash":7,"compact_revision":0,"hash_revision":5}"#,
        ] {
            assert_eq!(read(200, body), Ok(Hashed { hash, newest: 9 }));
        }
        assert_eq!(
            read(400, "mvcc: required revision has been compacted\n"),
            Err(NoHash::Compacted)
        );
        assert_eq!(
            read(400, "mvcc: required revision is a future revision\n"),
            Err(NoHash::Future)
        );
        let unreachable = |text: &str| Err(NoHash::Unreachable(text.to_string()));
        assert_eq!(
            read(412, "cluster ID mismatch\n"),
            unreachable("status 412 Precondition Failed: cluster ID mismatch")
        );
        assert_eq!(
            read(200, r#"{"header":{"revision":9},"hash_revision":6}"#),
            unreachable("asked for revision 5, it answered for revision 6")
        );
        for text in ["", "[]", "{}", "null", r#"{"header":{"revision":9},"hash":-1}"#] {
            assert!(matches!(read(200, text), Err(NoHash::Unreachable(_))), "{text}");
        }
    }
}
