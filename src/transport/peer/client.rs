//! One request to another member's peer URL, over a connection of its own.
//!
//! For what is asked now and then (members, versions, hashes, leases, promotion); raft's own messages
//! go over streams.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;

use crate::config::Url;
use crate::transport::tls;

/// A connection to a peer.
pub trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

/// Makes connections to peer URLs.
#[derive(Clone)]
pub struct Dialer {
    /// Within which a connection has to stand, handshake included.
    pub timeout: Duration,
    /// What https URLs are dialled with.
    tls: Option<tls::Client>,
}

impl Dialer {
    /// With TLS where a URL asks for it.
    pub fn new(timeout: Duration, tls: tls::Client) -> Self {
        Dialer { timeout, tls: Some(tls) }
    }

    /// Without TLS.
    pub fn clear(timeout: Duration) -> Self {
        Dialer { timeout, tls: None }
    }

    /// The same with another patience.
    pub fn within(&self, timeout: Duration) -> Self {
        Dialer { timeout, ..self.clone() }
    }

    /// Connects to `url`. Sockets of the file system carry no TLS, whatever their URL says: no peer's
    /// listener has it there.
    ///
    /// # Errors
    /// What the system or the handshake says; `TimedOut`; `Unsupported` for TLS without a setting.
    pub async fn connect(&self, url: &Url) -> io::Result<Box<dyn Connection>> {
        let connecting = async {
            if let Some(path) = url.socket_path() {
                return Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Connection>);
            }
            let stream = TcpStream::connect((url.host_name(), url.port())).await?;
            stream.set_nodelay(true)?;
            if !url.scheme().is_tls() {
                return Ok(Box::new(stream) as Box<dyn Connection>);
            }
            let tls = self.tls.as_ref().ok_or_else(|| {
                io::Error::new(io::ErrorKind::Unsupported, "this dialler has no TLS")
            })?;
            let name = ServerName::try_from(url.host_name().to_owned()).map_err(|_| {
                let why = format!("{:?} is no name that a certificate can have", url.host_name());
                io::Error::new(io::ErrorKind::InvalidInput, why)
            })?;
            match tls.connect(name, stream).await {
                Ok(stream) => Ok(Box::new(stream) as Box<dyn Connection>),
                // In the words of what refused it, which the library only wraps.
                Err(error) => {
                    let why = format!("TLS handshake failed: {}", tls::reason(&error));
                    Err(io::Error::new(error.kind(), why))
                }
            }
        };
        match tokio::time::timeout(self.timeout, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// What a request to `url` names as its host.
pub fn host(url: &Url) -> &str {
    match url.scheme().is_unix() {
        true => "localhost",
        false => url.host(),
    }
}

/// The same as a header. A host may hold any character but control characters, which no URL has.
pub fn host_header(url: &Url) -> HeaderValue {
    HeaderValue::from_bytes(host(url).as_bytes()).expect("a URL has no control characters")
}

/// Why a request got no answer.
#[derive(thiserror::Error, Debug)]
pub enum CallError {
    #[error("cannot connect to {url}")]
    Connect {
        url: String,
        #[source]
        source: io::Error,
    },
    #[error("request to {url} failed")]
    Http {
        url: String,
        #[source]
        source: hyper::Error,
    },
    #[error("answer from {url} is larger than {limit} bytes, or was cut short")]
    Body { url: String, limit: usize },
    #[error("{url} did not answer within {within:?}")]
    TimedOut { url: String, within: Duration },
}

/// The most that an answer may hold.
const ANSWER_MAX: usize = 16 * 1024 * 1024;

/// Opens a connection for requests to `url`; it is driven by a task of this thread.
///
/// # Errors
/// `Connect`, `Http`.
pub async fn open(
    dialer: &Dialer,
    url: &Url,
) -> Result<(SendRequest<Full<Bytes>>, JoinHandle<hyper::Result<()>>), CallError> {
    let name = || url.as_str().to_string();
    let stream = dialer.connect(url).await;
    let stream = stream.map_err(|source| CallError::Connect { url: name(), source })?;
    let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = shaken.map_err(|source| CallError::Http { url: name(), source })?;
    Ok((sender, tokio::spawn(connection)))
}

/// Sends `request` (its URI a path) over an open connection to `url` and reads the whole answer.
///
/// # Errors
/// `Http`, `Body`.
pub async fn send(
    sender: &mut SendRequest<Full<Bytes>>,
    url: &Url,
    mut request: Request<Full<Bytes>>,
) -> Result<Response<Bytes>, CallError> {
    let name = || url.as_str().to_string();
    request.headers_mut().insert(header::HOST, host_header(url));
    let answered = sender.send_request(request).await;
    let response = answered.map_err(|source| CallError::Http { url: name(), source })?;
    let (parts, body) = response.into_parts();
    match Limited::new(body, ANSWER_MAX).collect().await {
        Ok(body) => Ok(Response::from_parts(parts, body.to_bytes())),
        Err(_) => Err(CallError::Body { url: name(), limit: ANSWER_MAX }),
    }
}

/// Sends `request` (its URI a path) to `url` and reads the whole answer, within `timeout`.
///
/// # Errors
/// [`CallError`]; an answer with any status is not an error.
pub async fn call(
    dialer: &Dialer,
    url: &Url,
    request: Request<Full<Bytes>>,
    timeout: Duration,
) -> Result<Response<Bytes>, CallError> {
    let calling = async {
        let (mut sender, driving) = open(dialer, url).await?;
        let result = send(&mut sender, url, request).await;
        driving.abort();
        result
    };
    match tokio::time::timeout(timeout, calling).await {
        Ok(result) => result,
        Err(_) => Err(CallError::TimedOut { url: url.as_str().to_string(), within: timeout }),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn get(path: &str) -> Request<Full<Bytes>> {
        Request::get(path).body(Full::default()).unwrap()
    }

    #[tokio::test]
    async fn an_answer_is_read_whole_and_silence_is_an_error() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = Url::parse(&format!("http://127.0.0.1:{port}")).unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 1024];
            let n = stream.read(&mut asked).await.unwrap();
            let answer = b"HTTP/1.1 418 I'm a teapot\r\ncontent-length: 5\r\n\r\nhello";
            stream.write_all(answer).await.unwrap();
            // The second one is accepted and never answered.
            let second = listener.accept().await.unwrap();
            (String::from_utf8_lossy(&asked[..n]).into_owned(), second)
        });
        let answer = call(&Dialer::clear(PATIENCE), &url, get("/version"), Duration::from_secs(5))
            .await
            .unwrap();
        assert_eq!((answer.status().as_u16(), &answer.body()[..]), (418, &b"hello"[..]));
        let silent =
            call(&Dialer::clear(PATIENCE), &url, get("/"), Duration::from_millis(20)).await;
        assert!(matches!(silent, Err(CallError::TimedOut { .. })));
        let (asked, _second) = serving.await.unwrap();
        assert!(asked.starts_with("GET /version HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("host: 127.0.0.1:{port}\r\n")), "{asked}");
        let closed = call(&Dialer::clear(PATIENCE), &url, get("/"), Duration::from_secs(5)).await;
        assert!(matches!(closed, Err(CallError::Connect { .. })));
    }
}
