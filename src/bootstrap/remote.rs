//! What a member that does not run yet asks the other members, over their peer URLs.

use std::fmt;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use serde::Deserialize;

use crate::actors::exit::full;
use crate::config::Url;
use crate::core::membership::Member;
use crate::core::types::{ClusterId, MemberId};
use crate::transport::peer::client::{self, CallError, Dialer};

/// The header that names the cluster of whoever answers.
const CLUSTER_ID: &str = "X-Etcd-Cluster-ID";

/// A cluster as one of its members describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteCluster {
    pub id: ClusterId,
    /// By ID; at least one.
    pub members: Vec<Member>,
}

/// Why nobody told what the cluster is.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum RemoteError {
    #[error("could not retrieve cluster information from the given URLs")]
    NoAnswer,
    #[error("failed to get raft cluster member(s) from the given URLs")]
    NoMembers,
}

/// Why an answer is none.
#[derive(thiserror::Error, Debug)]
pub enum AnswerError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("the body is not what was asked for: {0}")]
    Body(String),
    #[error("header {CLUSTER_ID} has {0:?}, which is no cluster ID")]
    ClusterId(String),
    #[error("it lists member {0} twice")]
    Twice(MemberId),
    #[error("it lists a member with ID 0")]
    ZeroId,
}

/// Asks the members behind `urls` one after the other who belongs to their cluster; the first good
/// answer counts. An answer, and the connection, may take as long as `dialer` has patience. `told` says whether the bad ones are logged.
///
/// # Errors
/// [`RemoteError`].
pub async fn cluster(
    dialer: &Dialer,
    urls: &[Url],
    told: bool,
) -> Result<RemoteCluster, RemoteError> {
    for url in urls {
        match get(dialer, url, "/members").await.and_then(|answer| read_cluster(&answer)) {
            Ok(cluster) if cluster.members.is_empty() => return Err(RemoteError::NoMembers),
            Ok(cluster) => return Ok(cluster),
            Err(error) if told => tracing::warn!(
                address = %format_args!("{url}/members"),
                error = %full(&error),
                "failed to get cluster response"
            ),
            Err(_) => {}
        }
    }
    Err(RemoteError::NoAnswer)
}

/// Asks `path` of the member at `url`. Redirects are not followed: they are answers with a status
/// that is not 200.
async fn get(dialer: &Dialer, url: &Url, path: &str) -> Result<Response<Bytes>, AnswerError> {
    let request = Request::get(path).body(Full::default()).expect("a path makes a request");
    let answer = client::call(dialer, url, request, dialer.timeout).await?;
    match answer.status() {
        StatusCode::OK => Ok(answer),
        other => Err(AnswerError::Status(other)),
    }
}

/// Reads an answer to `/members`.
fn read_cluster(answer: &Response<Bytes>) -> Result<RemoteCluster, AnswerError> {
    let mut members: Vec<Member> = serde_json::from_slice::<Option<_>>(answer.body())
        .map_err(|error| AnswerError::Body(error.to_string()))?
        .unwrap_or_default();
    let header = answer.headers().get(CLUSTER_ID).map_or(&[][..], |value| value.as_bytes());
    let id = std::str::from_utf8(header).ok().and_then(|text| u64::from_str_radix(text, 16).ok());
    let id =
        id.ok_or_else(|| AnswerError::ClusterId(String::from_utf8_lossy(header).into_owned()))?;
    members.sort_by_key(|member| member.id);
    if members.first().is_some_and(|first| first.id == 0) {
        return Err(AnswerError::ZeroId);
    }
    if let Some(pair) = members.windows(2).find(|pair| pair[0].id == pair[1].id) {
        return Err(AnswerError::Twice(MemberId(pair[0].id)));
    }
    Ok(RemoteCluster { id: ClusterId(id), members })
}

/// What a member says of versions.
#[derive(Clone, PartialEq, Eq, Default, Debug, Deserialize)]
pub struct Versions {
    #[serde(default, rename = "etcdserver")]
    pub server: String,
    /// `not_decided` before the cluster has one.
    #[serde(default, rename = "etcdcluster")]
    pub cluster: String,
}

/// The versions at `member`; `None`, with a log line for each address, if it does not tell.
pub async fn versions(dialer: &Dialer, id: MemberId, urls: &[Url]) -> Option<Versions> {
    ask(dialer, id, urls, "/version", "failed to get version", |body| {
        serde_json::from_slice(body).map_err(|error| AnswerError::Body(error.to_string()))
    })
    .await
}

/// Whether `member` knows of a downgrade under way; `None`, with a log line for each address, if it
/// does not tell.
pub async fn downgrading(dialer: &Dialer, id: MemberId, urls: &[Url]) -> Option<bool> {
    let failed = "failed to get downgrade enabled status";
    ask(dialer, id, urls, "/downgrade/enabled", failed, |body| match body {
        b"true" => Ok(true),
        b"false" => Ok(false),
        other => Err(AnswerError::Body(format!(
            "{:?} is neither true nor false",
            String::from_utf8_lossy(&other[..other.len().min(64)])
        ))),
    })
    .await
}

async fn ask<T>(
    dialer: &Dialer,
    id: MemberId,
    urls: &[Url],
    path: &str,
    failed: &str,
    read: impl Fn(&[u8]) -> Result<T, AnswerError>,
) -> Option<T> {
    for url in urls {
        match get(dialer, url, path).await.and_then(|answer| read(answer.body())) {
            Ok(answer) => return Some(answer),
            Err(error) => tracing::warn!(
                address = %format_args!("{url}{path}"),
                "remote-member-id" = %id,
                error = %full(&error),
                "{failed}"
            ),
        }
    }
    None
}

/// As etcd prints a cluster in an error.
impl fmt::Display for RemoteCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{ClusterID:{} Members:[", self.id)?;
        for (n, member) in self.members.iter().enumerate() {
            write!(
                f,
                "{}&{{ID:{:x} RaftAttributes:{{PeerURLs:[{}] IsLearner:{}}} \
                 Attributes:{{Name:{} ClientURLs:[{}]}}}}",
                if n == 0 { "" } else { " " },
                member.id,
                member.peer_urls.join(" "),
                member.is_learner,
                member.name,
                member.client_urls.join(" "),
            )?;
        }
        write!(f, "] RemovedMemberIDs:[]}}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: Option<&str>, body: &'static str) -> Response<Bytes> {
        let mut response = Response::builder();
        if let Some(id) = id {
            response = response.header(CLUSTER_ID, id);
        }
        response.body(Bytes::from_static(body.as_bytes())).unwrap()
    }

    #[test]
    fn a_cluster_is_read_and_printed_as_etcd_does() {
        let two = r#"[{"id":11,"peerURLs":["http://b:1"],"isLearner":true},
            {"id":10,"peerURLs":["http://a:1","http://a:2"],"name":"a","clientURLs":["http://a:3"]}]"#;
        let read = read_cluster(&answer(Some("ef37ad9dc622a7c4"), two)).unwrap();
        assert_eq!(read.members.iter().map(|m| m.id).collect::<Vec<_>>(), [10, 11]);
        assert_eq!(
            read.to_string(),
            "{ClusterID:ef37ad9dc622a7c4 Members:[\
             &{ID:a RaftAttributes:{PeerURLs:[http://a:1 http://a:2] IsLearner:false} \
             Attributes:{Name:a ClientURLs:[http://a:3]}} \
             &{ID:b RaftAttributes:{PeerURLs:[http://b:1] IsLearner:true} \
             Attributes:{Name: ClientURLs:[]}}] RemovedMemberIDs:[]}"
        );
    }

    #[test]
    fn a_bad_answer_says_what_is_bad() {
        for (id, body, text) in [
            (None, "[]", r#"header X-Etcd-Cluster-ID has "", which is no cluster ID"#),
            (Some("xyz"), "[]", r#"header X-Etcd-Cluster-ID has "xyz", which is no cluster ID"#),
            (Some("1"), r#"[{"id":3},{"id":3}]"#, "it lists member 3 twice"),
            (Some("1"), r#"[{"id":0}]"#, "it lists a member with ID 0"),
        ] {
            assert_eq!(read_cluster(&answer(id, body)).unwrap_err().to_string(), text);
        }
        let error = read_cluster(&answer(Some("1"), "404 page not found")).unwrap_err();
        assert!(error.to_string().starts_with("the body is not what was asked for: "), "{error}");
        assert_eq!(read_cluster(&answer(Some("1"), "null")).unwrap().members, []);
    }
}
