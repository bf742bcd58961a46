//! The peer port, and the network of members behind it (operations 3.3, formats-and-peers 6).
//!
//! [`network`] knows every member, [`peer`] is one of them; [`stream`], [`pipeline`] and [`snapshot`] are the
//! ways to it, [`codec`] the bytes on them, [`server`] answers what others ask of raft.

pub mod client;
pub mod codec;
pub mod forward;
pub mod hashkv;
pub mod network;
#[allow(clippy::module_inception, reason = "one peer, among those who make the network")]
pub mod peer;
pub mod pipeline;
pub mod prober;
pub mod server;
pub mod snapshot;
pub mod stream;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, Method, Request, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;

use self::server::Door;
use super::http::member::HttpMember;
use super::http::status::{method_not_allowed, not_found, version_page};
use super::member::Member;

/// Answers every path of the peer port; others with 404.
pub fn router(member: Arc<Member>, door: Arc<Door>) -> Router {
    Router::new()
        .route("/version", any(version))
        .route("/members", any(members))
        .route("/raft/probing", any(probing))
        .fallback(not_found)
        .with_state(member.clone())
        .merge(hashkv::router(member.clone()))
        .merge(forward::router(member))
        .merge(server::router(door))
}

async fn version(State(member): State<Arc<Member>>, method: Method) -> Response {
    version_page(&HttpMember(member), &method)
}

async fn members(
    State(member): State<Arc<Member>>,
    request: Request<axum::body::Body>,
) -> Response {
    if request.method() != Method::GET {
        return method_not_allowed("GET");
    }
    let now = member.now();
    let list: Vec<_> = now.members.members().collect();
    let mut json = serde_json::to_string(&list).expect("members are always JSON");
    json.push('\n');
    let json_type = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let mut response = ([json_type], json).into_response();
    let id = member.shared.cluster_id.to_string();
    let id = HeaderValue::from_str(&id).expect("hex is a header value");
    response.headers_mut().insert("X-Etcd-Cluster-ID", id);
    response
}

async fn probing() -> Response {
    let now = crate::logging::rfc3339_nanos(std::time::SystemTime::now());
    format!("{{\"OK\":true,\"Now\":\"{now}\"}}\n").into_response()
}
