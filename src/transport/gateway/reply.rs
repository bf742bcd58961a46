//! What services answer, as HTTP responses (v3-api 8.2 to 8.4).

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, StatusCode};
use hyper::body::{Body as HttpBody, Frame};
use prost::Message;
use quorate_proto::json::{self, Json, Object};
use tonic::{Code, Status};

use super::body::Gone;
use crate::transport::grpc::Reply;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// The one header of a gRPC response that etcd's gateway passes on.
const GRPC_CONTENT_TYPE: HeaderName = HeaderName::from_static("grpc-metadata-content-type");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// The HTTP status of a gRPC one.
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // nginx's, for a client that has closed its request.
        Code::Cancelled => StatusCode::from_u16(499).expect("a status has three digits"),
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// A gRPC status as the message that it is on the wire.
#[derive(Default)]
struct Refusal {
    code: i32,
    message: String,
}

impl Json for Refusal {
    fn fields(&self, out: &mut Object<'_>) {
        // A number that is no 64-bit one is a number in JSON too, an enum without names just that.
        out.enumeration("code", &[], self.code);
        if !self.message.is_empty() {
            out.string("message", &self.message);
        }
    }

    fn field(
        &mut self,
        _: &str,
        _: &mut u64,
        _: &mut json::Input<'_>,
    ) -> Result<bool, json::Error> {
        Ok(false)
    }
}

impl From<&Status> for Refusal {
    fn from(status: &Status) -> Self {
        Refusal { code: status.code() as i32, message: status.message().to_owned() }
    }
}

/// Writes what cannot fail to be written.
fn write(refusal: &Refusal, out: &mut Vec<u8>) {
    json::encode(refusal, out).expect("it carries no key and value");
}

fn response(status: StatusCode, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, JSON);
    response
}

fn failure(status: &Status, body: Vec<u8>) -> Response {
    let mut response = response(http_status(status.code()), body.into());
    if status.code() == Code::Unauthenticated
        && let Ok(text) = HeaderValue::from_str(status.message())
    {
        response.headers_mut().insert(WWW_AUTHENTICATE, text);
    }
    response
}

/// The answer to a call that failed, or was none.
pub fn refused(status: &Status) -> Response {
    let mut body = Vec::with_capacity(32 + status.message().len());
    write(&status.into(), &mut body);
    failure(status, body)
}

/// The end of a method with one reply.
pub fn single<T: Json + Message>(result: Result<tonic::Response<T>, Status>) -> Response {
    let message = match result {
        Ok(reply) => reply.into_inner(),
        Err(status) => return refused(&status),
    };
    let mut body = Vec::with_capacity(capacity(&message));
    match json::encode(&message, &mut body) {
        Ok(()) => {
            let mut response = response(StatusCode::OK, body.into());
            response.headers_mut().insert(GRPC_CONTENT_TYPE, GRPC);
            response
        }
        Err(error) => refused(&damaged(&error)),
    }
}

/// Bytes that a message surely or nearly fits in: base64 of its values, and its names.
fn capacity<T: Message>(message: &T) -> usize {
    128 + message.encoded_len() * 2
}

fn damaged(error: &prost::DecodeError) -> Status {
    Status::internal(format!("a stored key and value cannot be read: {error}"))
}

/// The beginning of a method with a stream of replies: the first of them decides on the status.
pub async fn stream<T: Json + Message + 'static>(
    call: impl Future<Output = Result<tonic::Response<Reply<T>>, Status>>,
    mut gone: Gone,
) -> Response {
    let first = async {
        let mut replies = call.await?.into_inner();
        let first = replies.next().await.transpose()?;
        Ok((first.map(|first| line(&first)).transpose()?, replies))
    };
    let body = match gone.unless(first).await {
        Ok((Some(first), replies)) => {
            Body::new(Lines { first: Some(first), replies: Some(replies), gone })
        }
        Ok((None, _)) => return response(StatusCode::OK, Body::empty()),
        Err(status) => return failure(&status, last_line(&status)),
    };
    let mut response = response(StatusCode::OK, body);
    response.headers_mut().insert(GRPC_CONTENT_TYPE, GRPC);
    response
}

/// A reply of a stream.
fn line<T: Json + Message>(message: &T) -> Result<Bytes, Status> {
    let mut line = Vec::with_capacity(16 + capacity(message));
    line.extend_from_slice(b"{\"result\":");
    json::encode(message, &mut line).map_err(|error| damaged(&error))?;
    line.extend_from_slice(b"}\n");
    Ok(line.into())
}

/// The end of a stream that failed.
fn last_line(status: &Status) -> Vec<u8> {
    let mut line = Vec::with_capacity(48 + status.message().len());
    line.extend_from_slice(b"{\"error\":");
    write(&status.into(), &mut line);
    line.extend_from_slice(b"}\n");
    line
}

/// The replies of a stream, a line each; each a part of the body of its own, so that it is sent at
/// once.
struct Lines<T> {
    first: Option<Bytes>,
    /// `None` once it has ended.
    replies: Option<Reply<T>>,
    gone: Gone,
}

impl<T: Json + Message> HttpBody for Lines<T> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if self.gone.poll(cx).is_ready() {
            self.replies = None;
        }
        let Some(replies) = &mut self.replies else { return Poll::Ready(None) };
        let line = match ready!(replies.as_mut().poll_next(cx)) {
            Some(reply) => reply.and_then(|message| line(&message)),
            None => return Poll::Ready(None),
        };
        let line = line.unwrap_or_else(|status| {
            self.replies = None;
            last_line(&status).into()
        });
        Poll::Ready(Some(Ok(Frame::data(line))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_status() {
        let status = |code: i32| http_status(Code::from_i32(code)).as_u16();
        let all: Vec<_> = (0..=16).map(status).collect();
        assert_eq!(
            all,
            [200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401]
        );
    }

    #[test]
    fn one_who_is_not_known_is_told_how_to_change_that() {
        let status = Status::unauthenticated("etcdserver: invalid auth token");
        let response = refused(&status);
        assert_eq!(response.headers()[WWW_AUTHENTICATE], "etcdserver: invalid auth token");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
        let mut body = Vec::new();
        write(&(&status).into(), &mut body);
        assert_eq!(body, br#"{"code":16,"message":"etcdserver: invalid auth token"}"#);
    }
}
