//! What other members ask of this one's raft: `/raft` and the streams under it (operations 3.3).

use std::sync::Arc;
use std::time::Instant;

use actix::prelude::*;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use http_body_util::{BodyExt, Limited};
use prost::Message as _;

use super::codec::{self, MESSAGE_BYTES_MAX, StreamKind};
use super::network::{Attach, Attached, Learn, MIN_CLUSTER_VERSION, Net, Network};
use super::snapshot::{InFlight, Incoming};
use super::stream::outlet;
use crate::cli::ETCD_VERSION;
use crate::config::duration::GoDuration;
use crate::core::membership::Version;
use crate::core::raft::MSG_SNAP;
use crate::core::types::MemberId;
use crate::transport::http::status::{method_not_allowed, text_error};

/// The label of a sender that did not get as far as to say who it is.
const UNKNOWN_SENDER: &str = "UNKNOWN_SNAPSHOT_SENDER";

/// The network as its HTTP side knows it.
pub struct Door {
    pub net: Arc<Net>,
    pub network: Addr<Network>,
}

/// Answers raft's paths.
pub fn router(door: Arc<Door>) -> Router {
    Router::new()
        .route("/raft", any(message))
        .route("/raft/snapshot", any(snapshot))
        .route("/raft/stream/{kind}/{from}", any(stream))
        .with_state(door)
}

/// Whether this release works with a server of `version`; the patch does not count.
pub fn is_compatible(version: Version) -> bool {
    let least = Version::parse(MIN_CLUSTER_VERSION).expect("a constant version parses");
    (version.major, version.minor) >= (least.major, least.minor)
}

/// A version in a header; one that is missing is that of the releases that sent none.
fn version(headers: &HeaderMap, name: &str) -> Option<Version> {
    parse_version(headers.get(name).map_or(Ok("2.0.0"), HeaderValue::to_str).ok()?)
}

/// Reads the version that a member says it has.
pub fn parse_version(text: &str) -> Option<Version> {
    // What follows the numbers, as in 3.7.0-rc.1, orders releases that are otherwise the same.
    Version::parse(text.split(['-', '+']).next().unwrap_or_default())
}

/// A refusal as these paths make it.
fn refuse(net: &Net, status: StatusCode, text: &str) -> Response {
    with_cluster(net, text_error(status, text))
}

fn with_cluster(net: &Net, mut response: Response) -> Response {
    let id = HeaderValue::from_str(&net.cluster_id.to_string()).expect("hex is a header value");
    response.headers_mut().insert("X-Etcd-Cluster-ID", id);
    response
}

/// Refuses who cannot be a member of this cluster.
fn refuse_cluster(net: &Net, headers: &HeaderMap) -> Option<Response> {
    let ours = Version::parse(ETCD_VERSION).expect("a constant version parses");
    let sender = version(headers, "X-Server-Version");
    let demanded = version(headers, "X-Min-Cluster-Version");
    let compatible = sender.is_some_and(is_compatible)
        && demanded.is_some_and(|least| (least.major, least.minor) <= (ours.major, ours.minor));
    let from = headers.get("X-Server-From").and_then(|from| from.to_str().ok()).unwrap_or("");
    if !compatible {
        tracing::warn!(
            "local-member-id" = %net.local,
            "remote-peer-id" = from,
            "remote-peer-server-version" = ?headers.get("X-Server-Version"),
            "remote-peer-server-minimum-cluster-version" = ?headers.get("X-Min-Cluster-Version"),
            "failed to check version compatibility"
        );
        return Some(refuse(net, StatusCode::PRECONDITION_FAILED, "incompatible version"));
    }
    let cluster = headers.get("X-Etcd-Cluster-ID").map(HeaderValue::as_bytes).unwrap_or_default();
    if cluster != net.cluster_id.to_string().as_bytes() {
        tracing::warn!(
            "local-member-id" = %net.local,
            "local-member-cluster-id" = %net.cluster_id,
            "remote-peer-id" = from,
            "remote-peer-cluster-id" = %String::from_utf8_lossy(cluster),
            "request cluster ID mismatch"
        );
        return Some(refuse(net, StatusCode::PRECONDITION_FAILED, "cluster ID mismatch"));
    }
    None
}

/// Reads a member ID as members write it.
fn member_id(text: &str) -> Option<MemberId> {
    // from_str_radix alone would take a sign.
    let plain = text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok().map(MemberId)).flatten()
}

fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty())
}

/// Remembers where the sender of a request can be reached.
fn learn(door: &Door, headers: &HeaderMap) {
    let from = text_of(headers, "X-Server-From").and_then(member_id);
    if let (Some(from), Some(urls)) = (from, text_of(headers, "X-PeerURLs")) {
        door.network.do_send(Learn { from, urls: urls.to_string() });
    }
}

/// What every POST of raft has to get past; answers the sender as it calls itself.
fn admit_post(door: &Door, request: &Request<Body>) -> Result<String, Box<Response>> {
    let net = &door.net;
    if request.method() != Method::POST {
        return Err(Box::new(with_cluster(net, method_not_allowed("POST"))));
    }
    if let Some(response) = refuse_cluster(net, request.headers()) {
        return Err(Box::new(response));
    }
    learn(door, request.headers());
    Ok(text_of(request.headers(), "X-Server-From").unwrap_or_default().to_string())
}

/// 403 with what etcd says to it: its sender concludes that it was removed, and stops. So it is said
/// to removed members only.
fn forbidden(net: &Net) -> Response {
    let json = "{\"message\":\"cannot process message from removed member\"}";
    let json_type = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    with_cluster(net, (StatusCode::FORBIDDEN, [json_type], json).into_response())
}

/// Who may send raft messages here, and for whom.
pub fn refuse_message(net: &Net, from: u64, to: u64) -> Option<Response> {
    if net.is_removed(MemberId(from)) {
        tracing::warn!(
            "local-member-id" = %net.local,
            "removed-member-id" = %MemberId(from),
            "rejected Raft message from removed member"
        );
        return Some(forbidden(net));
    }
    if to != net.local.0 {
        tracing::warn!(
            "local-member-id" = %net.local,
            "mismatch-member-id" = %MemberId(to),
            "rejected Raft message to mismatch member"
        );
        // etcd answers 403 here as well, and so stops a healthy member that still knows this address
        // as another's. 412 makes the sender try again, as it does for the same fault on a stream.
        return Some(refuse(net, StatusCode::PRECONDITION_FAILED, "to field mismatch"));
    }
    None
}

async fn message(State(door): State<Arc<Door>>, request: Request<Body>) -> Response {
    let net = &door.net;
    let remote = match admit_post(&door, &request) {
        Ok(remote) => remote,
        Err(response) => return *response,
    };
    let failed = |text: &str, error: &dyn std::fmt::Display| {
        net.metrics.peer_received_failures.with(&[&remote]).increment(1);
        tracing::warn!(
            "local-member-id" = %net.local,
            "remote-peer-id" = remote,
            %error,
            "failed to receive Raft message"
        );
        refuse(net, StatusCode::BAD_REQUEST, text)
    };
    let body = match Limited::new(request.into_body(), MESSAGE_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return failed("error reading raft message", &error),
    };
    let bytes = body.len();
    let message = match codec::decode_message(body) {
        Ok(message) => message,
        Err(error) => return failed("error unmarshalling raft message", &error),
    };
    if message.r#type == MSG_SNAP {
        return failed("wrong raft message type", &"a snapshot without its database");
    }
    if let Some(response) = refuse_message(net, message.from, message.to) {
        return response;
    }
    let from = MemberId(message.from).to_string();
    net.metrics.peer_received_bytes.with(&[&from]).increment(bytes as u64);
    net.raft.step(vec![message]).await;
    with_cluster(net, StatusCode::NO_CONTENT.into_response())
}

async fn snapshot(State(door): State<Arc<Door>>, request: Request<Body>) -> Response {
    let net = &door.net;
    let remote = match admit_post(&door, &request) {
        Ok(remote) => remote,
        Err(response) => return *response,
    };
    let started = Instant::now();
    let failed = |from: &str, status: StatusCode, text: String| {
        net.metrics.snapshot_receive_failures.with(&[from]).increment(1);
        tracing::warn!(
            "local-member-id" = %net.local,
            "remote-snapshot-sender-id" = remote,
            error = text,
            "failed to receive database snapshot"
        );
        refuse(net, status, &text)
    };
    let mut incoming = Incoming::new(request.into_body(), net.options.read_timeout);
    let message = match incoming.message().await {
        Ok(message) => message,
        Err(error) => {
            let text = format!("failed to decode raft message ({error})");
            return failed(UNKNOWN_SENDER, StatusCode::BAD_REQUEST, text);
        }
    };
    let from = MemberId(message.from).to_string();
    net.metrics.peer_received_bytes.with(&[&from]).increment(message.encoded_len() as u64);
    if message.r#type != MSG_SNAP {
        let text = "wrong raft message type".to_string();
        return failed(&from, StatusCode::BAD_REQUEST, text);
    }
    if let Some(response) = refuse_message(net, message.from, message.to) {
        return response;
    }
    let metadata = message.snapshot.as_ref().and_then(|snapshot| snapshot.metadata.as_ref());
    let Some(index) = metadata.map(|metadata| metadata.index).filter(|index| *index > 0) else {
        let text = "failed to process raft message (the snapshot has no index)".to_string();
        return failed(&from, StatusCode::INTERNAL_SERVER_ERROR, text);
    };
    tracing::info!(
        "local-member-id" = %net.local,
        "remote-snapshot-sender-id" = from,
        "incoming-snapshot-index" = index,
        "receiving database snapshot"
    );
    let in_flight = InFlight::new(net.metrics.snapshot_receive_inflights.with(&[&from]));
    let saved = incoming.database(net, index).await;
    drop(in_flight);
    let bytes = match saved {
        Ok(bytes) => bytes,
        Err(error) => {
            let text = format!("failed to save KV snapshot ({error})");
            return failed(&from, StatusCode::INTERNAL_SERVER_ERROR, text);
        }
    };
    net.metrics.peer_received_bytes.with(&[&from]).increment(bytes);
    tracing::info!(
        "local-member-id" = %net.local,
        "remote-snapshot-sender-id" = from,
        "incoming-snapshot-index" = index,
        "download-took" = %GoDuration::from(started.elapsed()),
        bytes,
        "received and saved database snapshot"
    );
    // The database is on disk before raft knows of it.
    net.raft.step(vec![message]).await;
    net.metrics.snapshot_receive_success.with(&[&from]).increment(1);
    net.metrics.snapshot_receive_seconds.with(&[&from]).record(started.elapsed());
    with_cluster(net, StatusCode::NO_CONTENT.into_response())
}

async fn stream(
    State(door): State<Arc<Door>>,
    Path((kind, from)): Path<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let net = &door.net;
    let introduced = |mut response: Response| {
        let version = HeaderValue::from_static(ETCD_VERSION);
        response.headers_mut().insert("X-Server-Version", version);
        response
    };
    let refuse = |status, text| introduced(refuse(net, status, text));
    if method != Method::GET {
        return introduced(with_cluster(net, method_not_allowed("GET")));
    }
    if let Some(response) = refuse_cluster(net, &headers) {
        return introduced(response);
    }
    let Some(kind) = StreamKind::ALL.into_iter().find(|known| known.path() == kind) else {
        return refuse(StatusCode::NOT_FOUND, "invalid path");
    };
    let Some(from) = member_id(&from) else {
        return refuse(StatusCode::NOT_FOUND, "invalid from");
    };
    if net.is_removed(from) {
        tracing::warn!(
            "local-member-id" = %net.local,
            "remote-peer-id-stream-handler" = %net.local,
            "remote-peer-id-from" = %from,
            "rejected stream from remote peer because it was removed"
        );
        return refuse(StatusCode::GONE, "removed member");
    }
    let to = text_of(&headers, "X-Raft-To").unwrap_or_default();
    let for_us = to == net.local.to_string();
    let (outlet, outflow) = outlet(kind);
    match door.network.send(Attach { from, for_us, outlet }).await {
        Ok(Attached::NotUs) => {
            tracing::warn!(
                "local-member-id" = %net.local,
                "remote-peer-id-from" = %from,
                "remote-peer-id-to" = to,
                "closed stream since it asks for another member"
            );
            refuse(StatusCode::PRECONDITION_FAILED, "to field mismatch")
        }
        Ok(Attached::Yes) => introduced(with_cluster(net, Response::new(Body::new(outflow)))),
        Ok(Attached::Unknown) => {
            tracing::warn!(
                "local-member-id" = %net.local,
                "remote-peer-id-from" = %from,
                "cluster-id" = %net.cluster_id,
                "failed to find remote peer in cluster"
            );
            if let Some(urls) = text_of(&headers, "X-PeerURLs") {
                door.network.do_send(Learn { from, urls: urls.to_string() });
            }
            refuse(StatusCode::NOT_FOUND, "error sender not found")
        }
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "member is stopping"),
    }
}
