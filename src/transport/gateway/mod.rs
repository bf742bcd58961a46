//! The gRPC services as JSON over HTTP, below `/v3/` (v3-api section 8).
//!
//! A request is read into the message that a gRPC client would have sent, handed to the same service in
//! this process, and the reply written as JSON into one buffer. There is no second connection and no
//! second copy of the services' gates, limits and accounting. The bytes of a client pass through
//! `body.rs`, which bounds them; what its headers say reaches the services through
//! `metadata.rs`.

mod body;
mod metadata;
mod reply;
mod routes;
pub mod websocket;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::any;
use http::header::LOCATION;
use http::{HeaderValue, Method, StatusCode};
use prost::Message;
use quorate_proto::json::Json;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status, Streaming};

use self::body::{Framed, Gone, Values};
use self::routes::Route;
use crate::transport::budget::Account;
use crate::transport::grpc;
use crate::transport::member::Member;

/// What the paths below `/v3/` need.
pub struct Gateway {
    member: Arc<Member>,
    maintenance: grpc::maintenance::Maintenance,
    /// The greatest message that a client may send, in bytes of its gRPC form.
    receive_max: usize,
}

impl Gateway {
    /// The gateway to the services of `member`.
    pub fn new(
        member: &Arc<Member>,
        maintenance: grpc::maintenance::Maintenance,
        receive_max: usize,
    ) -> Self {
        Gateway { member: member.clone(), maintenance, receive_max }
    }

    /// Answers everything below `/v3/`.
    pub fn router(self) -> Router {
        Router::new()
            .route("/v3", any(moved))
            .route("/v3/", any(serve))
            .route("/v3/{*path}", any(serve))
            .with_state(Arc::new(self))
    }

    async fn handle(&self, request: Request) -> Response {
        let (head, body) = request.into_parts();
        let path = head.uri.path().strip_prefix("/v3/");
        let Some(route) = path.and_then(Route::of) else {
            return reply::refused(&Status::not_found("Not Found"));
        };
        if head.method != Method::POST {
            return reply::refused(&Status::unimplemented("Method Not Allowed"));
        }
        match metadata::of(&head.headers) {
            Ok(metadata) => {
                let account = head.extensions.get::<Arc<Account>>();
                let body = Values::new(body, self.receive_max, account.cloned());
                // The account alone: what else is known of the connection is of who made it, and a call
                // that came as JSON is not let in by that (v3-api 3.12).
                let mut extensions = Extensions::default();
                if let Some(account) = account {
                    extensions.insert(account.clone());
                }
                let receive_max = self.receive_max;
                route.run(self, Call { metadata, extensions, body, receive_max }).await
            }
            Err(status) => reply::refused(&status),
        }
    }
}

async fn serve(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    if websocket::is_upgrade(request.headers()) {
        return websocket::upgrade(gateway, request);
    }
    gateway.handle(request).await
}

/// Go's server answers so for a path that is known with a slash at its end.
async fn moved() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    response.headers_mut().insert(LOCATION, HeaderValue::from_static("/v3/"));
    response
}

/// What a client sent, for a service.
struct Call {
    metadata: MetadataMap,
    extensions: Extensions,
    body: Values,
    receive_max: usize,
}

impl Call {
    /// The request of a method that takes one. Nothing at all is the empty message.
    async fn single<T: Json + Message>(mut self) -> Result<(tonic::Request<T>, Gone), Status> {
        let message: T = self.body.next().await?.unwrap_or_default();
        let bytes = message.encoded_len();
        if bytes > self.receive_max {
            return Err(too_large(bytes, self.receive_max));
        }
        let request = tonic::Request::from_parts(self.metadata, self.extensions, message);
        Ok((request, self.body.discard()))
    }

    /// The requests of a method that takes a stream of them. The first is awaited: a client whose
    /// first word is wrong is told so, instead of being left to wait for an answer.
    async fn stream<T: Json + Message + 'static>(
        mut self,
    ) -> Result<(tonic::Request<Streaming<T>>, Gone), Status> {
        let first = self.body.next().await?;
        let gone = self.body.watch();
        let messages = Framed::stream(first, self.body, self.receive_max);
        let request = tonic::Request::from_parts(self.metadata, self.extensions, messages);
        Ok((request, gone))
    }
}

/// The refusal of a message, in the words of etcd's gRPC library.
fn too_large(bytes: usize, max: usize) -> Status {
    Status::resource_exhausted(format!(
        "grpc: received message larger than max ({bytes} vs. {max})"
    ))
}
