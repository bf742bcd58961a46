//! One client port: gRPC over HTTP/2 and plain HTTP/1.1, told apart by a connection's first bytes, in
//! clear or over TLS.
//!
//! Connections are accepted on one thread and dealt out to the transport threads in turn. Each of
//! those is a single-threaded runtime that serves its connections to the end, so a request never
//! changes threads before it is handed to an actor. (SO_REUSEPORT would spread connections by a hash:
//! few connections unevenly, and a second server on the same port would start without an error.)

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix::ArbiterHandle;
use axum::Router;
use axum::response::IntoResponse;
use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use http_body_util::Either;
use hyper::body::Incoming;
use hyper::service::Service as HyperService;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::health::health_server::HealthServer;
use quorate_proto::v3electionpb::election_server::ElectionServer;
use quorate_proto::v3lockpb::lock_server::LockServer;
use tokio::sync::watch;
use tonic::Code;
use tonic::codec::CompressionEncoding;
use tonic::server::NamedService;
use tower::Service as _;

use crate::config::{Scheme, Url};
use crate::metrics::{Method, Metrics};
use crate::transport::budget::{self, Account, Budget, End};
use crate::transport::gateway::websocket::Kept;
use crate::transport::grpc;
use crate::transport::guard::{
    Guard, IDLE_PING_INTERVAL, PING_INTERVAL_DEFAULT, PingInterval, Rules,
};
use crate::transport::held;
use crate::transport::identity::ClientCert;
use crate::transport::member::Member;
use crate::transport::socket::{Detached, Opened, Security};

/// What the listeners of the client port need to know.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub max_concurrent_streams: u32,
    /// The least time between two pings of a gRPC client; zero for gRPC's own default.
    pub keepalive_min_time: Duration,
    /// Idle time before the server pings a client; zero for never.
    pub keepalive_interval: Duration,
    /// Time for the answer to such a ping; zero to send none.
    pub keepalive_timeout: Duration,
    /// The greatest message that a client may send, in bytes.
    pub receive_max: usize,
    pub reuse_port: bool,
    pub reuse_address: bool,
    /// After which a connection ends whose other side takes nothing of what it is sent; `None` for as
    /// long as TCP goes on trying.
    pub write_timeout: Option<Duration>,
    /// After which a connection is asked to end, give or take a tenth; `None` for never.
    pub connection_age: Option<Duration>,
    /// How long its calls may take after that; `None` for as long as they want.
    pub connection_age_grace: Option<Duration>,
}

/// Time that a client has to send the head of an HTTP/1.1 request (v3-api 7.3).
const HEADER_TIMEOUT: Duration = Duration::from_secs(300);
/// Time that a client has to say which protocol it speaks: what gRPC's server gives for a connection
/// to be set up. HTTP/1.1 heads have more, but their first bytes must come as soon.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(120);
/// The least time between two pings of a client where HTTP is served over TLS too. etcd does not count
/// them there, so clients may ping as they like; this only stops who does nothing else.
const TLS_PING_INTERVAL: Duration = Duration::from_millis(100);
/// Time that a client has to finish the headers of an HTTP/2 request that it has begun: they come in one
/// piece from all who mean well, and all that came of them is held.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests that a client may take back before they were looked at, a burst of cancelled calls, before
/// it counts as an attack (rapid reset). The library's 20 are few for one that cancels all its watches.
const RESETS_PENDING_MAX: usize = 200;
/// Streams that may end in a client's own protocol errors before its connection does.
const ERROR_RESETS_MAX: usize = 1024;
/// Bytes of one response that the HTTP/2 library takes before the client has taken some.
const SEND_BUFFER: usize = 400 << 10;
/// Header list of a request, in bytes. etcd takes 16 MiB; no client has a use for a fraction of that,
/// and each call may have as much.
const HEADER_LIST_MAX: u32 = 512 << 10;
/// Flow-control windows: enough for large requests; what a client sends and nobody reads yet is no
/// more than the connection's.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Open calls of one connection where the operator leaves them at etcd's default, which is without
/// bound: a call costs memory although it says nothing.
const STREAMS_MAX: u32 = 1 << 14;
/// Time for a connection's last calls once it was asked to make room for another.
const ROOM_GRACE: Duration = Duration::from_secs(1);
/// Connections waiting to be accepted.
const BACKLOG: i32 = 4096;
/// TCP keep-alive on accepted connections (operations 5.1).
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// A socket that is bound but serves nobody yet.
pub enum Bound {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener, PathBuf),
}

/// Why a URL cannot be listened on.
#[derive(thiserror::Error, Debug)]
pub enum BindError {
    #[error("listen {url}: {source}")]
    Io {
        url: String,
        #[source]
        source: io::Error,
    },
}

/// Binds the socket of a URL. A stale unix socket is removed first.
///
/// # Errors
/// Naming the URL.
pub fn bind(url: &Url, options: &Options) -> Result<Bound, BindError> {
    let failed = |source| BindError::Io { url: url.to_string(), source };
    match url.scheme() {
        Scheme::Http | Scheme::Https => bind_tcp(url, options).map(Bound::Tcp),
        Scheme::Unix | Scheme::Unixs => {
            let path = url.socket_path().expect("a unix URL has a path");
            remove_stale(&path).map_err(failed)?;
            let listener = std::os::unix::net::UnixListener::bind(&path).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            Ok(Bound::Unix(listener, path))
        }
    }
}

fn bind_tcp(url: &Url, options: &Options) -> Result<std::net::TcpListener, BindError> {
    use socket2::{Domain, Protocol, Socket, Type};
    use std::net::ToSocketAddrs;
    let failed = |source| BindError::Io { url: url.to_string(), source };
    let mut last = None;
    for address in address(url).to_socket_addrs().map_err(failed)? {
        let domain = Domain::for_address(address);
        let bound = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).and_then(|socket| {
            // As Go does: a port in TIME_WAIT can be taken again, one that is listened on cannot.
            socket.set_reuse_address(true)?;
            if options.reuse_port {
                socket.set_reuse_port(true)?;
            }
            socket.set_nonblocking(true)?;
            socket.bind(&address.into())?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        });
        match bound {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    Err(failed(last.unwrap_or_else(|| io::Error::other("the name has no address"))))
}

/// Host and port to bind; without a host, every address.
fn address(url: &Url) -> (&str, u16) {
    let host = if url.host_name().is_empty() { "::" } else { url.host_name() };
    (host, url.port())
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(io::Error::other("the path exists and is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// What a listener serves.
#[derive(Clone)]
pub struct Served {
    /// `None` on a listener for HTTP alone.
    pub grpc: Option<Arc<Services>>,
    /// `None` on a listener for gRPC alone.
    pub http: Option<Router>,
}

/// The gRPC services of the client port.
#[derive(Clone)]
pub struct Services {
    kv: pb::kv_server::KvServer<grpc::kv::Kv>,
    watch: pb::watch_server::WatchServer<grpc::watch::Watch>,
    lease: pb::lease_server::LeaseServer<grpc::lease::Lease>,
    cluster: pb::cluster_server::ClusterServer<grpc::cluster::Cluster>,
    maintenance: pb::maintenance_server::MaintenanceServer<grpc::maintenance::Maintenance>,
    /// The same without gRPC around it: its limits hold for both ways to it.
    plain_maintenance: grpc::maintenance::Maintenance,
    auth: pb::auth_server::AuthServer<grpc::auth::Auth>,
    lock: LockServer<grpc::lock::Lock>,
    election: ElectionServer<grpc::election::Election>,
    health: HealthServer<grpc::health::Health>,
    reflection: Option<Router>,
}

impl Services {
    /// All services of `member`.
    pub fn new(
        member: &Arc<Member>,
        maintenance: grpc::maintenance::Maintenance,
        stops_on_defrag: bool,
        receive_max: usize,
    ) -> Self {
        macro_rules! server {
            ($server:expr) => {
                $server
                    .accept_compressed(CompressionEncoding::Gzip)
                    .max_decoding_message_size(receive_max)
                    .max_encoding_message_size(i32::MAX as usize)
            };
        }
        Services {
            kv: server!(pb::kv_server::KvServer::new(grpc::kv::Kv(member.clone()))),
            watch: server!(pb::watch_server::WatchServer::new(grpc::watch::Watch(member.clone()))),
            lease: server!(pb::lease_server::LeaseServer::new(grpc::lease::Lease(member.clone()))),
            cluster: server!(pb::cluster_server::ClusterServer::new(grpc::cluster::Cluster(
                member.clone()
            ))),
            maintenance: server!(pb::maintenance_server::MaintenanceServer::new(
                maintenance.clone()
            )),
            plain_maintenance: maintenance,
            auth: server!(pb::auth_server::AuthServer::new(grpc::auth::Auth(member.clone()))),
            lock: server!(LockServer::new(grpc::lock::Lock(member.clone()))),
            election: server!(ElectionServer::new(grpc::election::Election(member.clone()))),
            health: server!(HealthServer::new(grpc::health::Health {
                member: member.clone(),
                stops_on_defrag
            })),
            reflection: reflection(),
        }
    }

    /// The service itself, for calls that do not come over gRPC.
    pub fn maintenance(&self) -> &grpc::maintenance::Maintenance {
        &self.plain_maintenance
    }

    async fn call(&self, request: Request<held::Request>) -> Response<tonic::body::Body> {
        if let Some(refused) = grpc::deadline::malformed(request.headers()) {
            return refused;
        }
        let path = request.uri().path();
        let service = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        // As etcd does: what came compressed is answered compressed, whatever else the client reads.
        let mirrored = request.headers().get("grpc-encoding").is_some_and(|name| name == "gzip");
        macro_rules! dispatch {
            ($($field:ident: $server:ty),* $(,)?) => {
                match service {
                    $(
                        Some((<$server>::NAME, _)) if Method::from_path(path).is_some() => {
                            let mut server = self.$field.clone();
                            if mirrored {
                                server = server.send_compressed(CompressionEncoding::Gzip);
                            }
                            server.call(request).await
                        }
                    )*
                    Some((name, _)) if name.starts_with("grpc.reflection.") => {
                        return self.reflect(request).await;
                    }
                    _ => return unknown(path),
                }
            };
        }
        let result: Result<_, Infallible> = dispatch!(
            kv: pb::kv_server::KvServer<grpc::kv::Kv>,
            watch: pb::watch_server::WatchServer<grpc::watch::Watch>,
            lease: pb::lease_server::LeaseServer<grpc::lease::Lease>,
            cluster: pb::cluster_server::ClusterServer<grpc::cluster::Cluster>,
            maintenance: pb::maintenance_server::MaintenanceServer<grpc::maintenance::Maintenance>,
            auth: pb::auth_server::AuthServer<grpc::auth::Auth>,
            lock: LockServer<grpc::lock::Lock>,
            election: ElectionServer<grpc::election::Election>,
            health: HealthServer<grpc::health::Health>,
        );
        match result {
            Ok(response) => in_etcds_words(response),
            Err(never) => match never {},
        }
    }

    async fn reflect(&self, request: Request<held::Request>) -> Response<tonic::body::Body> {
        match self.reflection.clone() {
            Some(mut router) => match router.call(request).await {
                Ok(response) => response.map(tonic::body::Body::new),
                Err(never) => match never {},
            },
            None => unknown(request.uri().path()),
        }
    }
}

const REFLECTION_V1: &str = "/grpc.reflection.v1.ServerReflection/{method}";
const REFLECTION_V1ALPHA: &str = "/grpc.reflection.v1alpha.ServerReflection/{method}";

/// Server reflection, which etcd does not have: it lets tools describe and call what is served.
fn reflection() -> Option<Router> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(quorate_proto::DESCRIPTORS)
    };
    let v1 = builder().build_v1().ok()?;
    let v1alpha = builder().build_v1alpha().ok()?;
    Some(Router::new().route_service(REFLECTION_V1, v1).route_service(REFLECTION_V1ALPHA, v1alpha))
}

/// The answer to a call of something that is not there.
fn unknown(path: &str) -> Response<tonic::body::Body> {
    let text = match path.strip_prefix('/').and_then(|path| path.rsplit_once('/')) {
        Some((service, method)) => {
            if Method::ALL.iter().any(|known| known.parts().0 == service) {
                format!("unknown method {method} for service {service}")
            } else {
                format!("unknown service {service}")
            }
        }
        None => format!("malformed method name: {path:?}"),
    };
    tonic::Status::unimplemented(text).into_http()
}

/// Says what the gRPC library found wrong with a request as etcd's clients know it (v3-api 4.2).
fn in_etcds_words(response: Response<tonic::body::Body>) -> Response<tonic::body::Body> {
    if !response.headers().contains_key("grpc-status") {
        return response;
    }
    let Some(status) = tonic::Status::from_header_map(response.headers()) else { return response };
    let text = status.message();
    let between = |from: &str, to: &str| {
        let rest = text.split_once(from)?.1;
        Some(rest.split_once(to)?.0.to_string())
    };
    let said = match status.code() {
        Code::OutOfRange => between("length too large: found ", " bytes")
            .zip(between("the limit is: ", " bytes"))
            .map(|(found, limit)| {
                let text = format!("grpc: received message larger than max ({found} vs. {limit})");
                tonic::Status::resource_exhausted(text)
            }),
        Code::Internal => between("failed to decode Protobuf message: ", "\0")
            .or_else(|| text.strip_prefix("failed to decode Protobuf message: ").map(String::from))
            .map(|why| {
                tonic::Status::internal(format!("grpc: error unmarshalling request: {why}"))
            }),
        Code::Unimplemented => between("compressed with `", "`").map(|encoding| {
            let text =
                format!("grpc: Decompressor is not installed for grpc-encoding {encoding:?}");
            tonic::Status::unimplemented(text)
        }),
        _ => None,
    };
    said.map_or(response, tonic::Status::into_http)
}

/// In the extensions of an HTTP request that came over TLS.
#[derive(Clone, Copy, Debug)]
pub struct OverTls;

/// One connection's requests.
#[derive(Clone)]
struct Connection {
    served: Served,
    account: Arc<Account>,
    tls: bool,
    client: Option<ClientCert>,
    /// For a connection that becomes something else than HTTP.
    kept: Kept,
}

type Body = Either<held::Response<tonic::body::Body>, held::Response<axum::body::Body>>;

impl Connection {
    /// An answer that is there at once.
    fn answer(
        &self,
        response: Response<axum::body::Body>,
    ) -> <Self as HyperService<Request<Incoming>>>::Future {
        let response = held::Response::of(response, self.account.clone(), None);
        Box::pin(std::future::ready(Ok(response.map(Either::Right))))
    }
}

impl HyperService<Request<Incoming>> for Connection {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>>>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        if let Some(client) = &self.client {
            request.extensions_mut().insert(client.clone());
        }
        let Served { grpc, http } = &self.served;
        let account = self.account.clone();
        // Over TLS one server does both, as in etcd, and paths below /v3/ are always the gateway's.
        let both = self.tls && http.is_some();
        let for_http = both && (!is_grpc(&request) || request.uri().path().starts_with("/v3/"));
        match (grpc, http) {
            (Some(services), _) if request.version() == Version::HTTP_2 && !for_http => {
                if !is_grpc(&request) {
                    return self.answer(not_grpc());
                }
                let Some(call) = account.call() else {
                    return self.answer(grpc::crowded().into_http());
                };
                let services = services.clone();
                let headers = held::header_bytes(request.headers());
                let headers = headers.map(|bytes| account.hold(bytes));
                let mut request = request.map(|body| held::Request::new(body, account.clone()));
                request.extensions_mut().insert(account.clone());
                Box::pin(async move {
                    let response = services.call(request).await;
                    drop(headers);
                    let response = held::Response::of(response, account, Some(call));
                    Ok(response.map(Either::Left))
                })
            }
            (_, Some(router)) => {
                let Some(call) = account.call() else {
                    return self.answer(StatusCode::SERVICE_UNAVAILABLE.into_response());
                };
                if request.headers().contains_key(header::UPGRADE) {
                    request.extensions_mut().insert(self.kept.clone());
                }
                request.extensions_mut().insert(account.clone());
                if self.tls {
                    request.extensions_mut().insert(OverTls);
                }
                let headers = held::header_bytes(request.headers());
                let headers = headers.map(|bytes| account.hold(bytes));
                let mut router = router.clone();
                Box::pin(async move {
                    let response = match router.call(request).await {
                        Ok(response) => response,
                        Err(never) => match never {},
                    };
                    drop(headers);
                    let response = held::Response::of(response, account, Some(call));
                    Ok(response.map(Either::Right))
                })
            }
            _ => self.answer(not_grpc()),
        }
    }
}

fn is_grpc(request: &Request<Incoming>) -> bool {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

fn not_grpc() -> Response<axum::body::Body> {
    let mut response = StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
    let accept = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::ACCEPT, accept);
    response
}

/// Runs a connection's requests on the thread that the connection belongs to.
#[derive(Clone, Copy)]
struct ThisThread;

impl<F: Future + 'static> hyper::rt::Executor<F> for ThisThread {
    fn execute(&self, future: F) {
        actix::spawn(async move {
            future.await;
        });
    }
}

/// The transport threads, and how many connections they may have.
#[derive(Clone)]
pub struct Workers {
    threads: Arc<[ArbiterHandle]>,
    next: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    connections_max: usize,
    budget: Arc<Budget>,
}

impl Workers {
    /// Deals connections out to `threads`.
    pub fn new(threads: Vec<ArbiterHandle>, connections_max: usize) -> Self {
        Workers {
            threads: threads.into(),
            next: Arc::default(),
            connections: Arc::default(),
            connections_max,
            budget: Budget::new(
                budget::HELD_MAX,
                budget::CALLS_MAX.max(connections_max.saturating_mul(budget::CALLS_PER_CONNECTION)),
                Metrics::global(),
            ),
        }
    }

    /// Connections being served.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    /// Serves `stream` on the next thread.
    fn serve(
        &self,
        socket: Detached,
        served: Served,
        security: Security,
        options: Options,
        stop: watch::Receiver<bool>,
    ) {
        let held = Arc::new(Held::new(&self.connections));
        // More than one request: a client that sends it must not be stopped in the middle.
        let account = self.budget.open(socket.remote().0, options.receive_max.saturating_mul(2));
        let thread = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len();
        self.threads[thread].spawn(async move {
            // A new local task: what it holds need not be able to change threads.
            actix::spawn(async move {
                match socket.attach() {
                    Ok((socket, remote)) => {
                        // Done here, so that nobody else's connection waits for it. In memory of its own,
                        // which is more than an idle connection takes otherwise, and given back.
                        let opened = Box::pin(security.open(socket, remote, HANDSHAKE_TIMEOUT));
                        if let Some(opened) = unless_ended(opened, &account, stop.clone()).await {
                            let kept = Kept(held.clone());
                            serve_connection(opened, served, account, kept, options, stop).await;
                        }
                    }
                    Err(error) => tracing::debug!(%error, "lost a connection at once"),
                }
                drop(held);
            });
        });
    }
}

/// Counts a connection for as long as it lives.
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::AcqRel);
        Held(counter.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What `work` answers, or nothing once `stop` is true or the connection has to make room.
async fn unless_ended<T>(
    work: impl Future<Output = Option<T>>,
    account: &Account,
    mut stop: watch::Receiver<bool>,
) -> Option<T> {
    tokio::select! {
        done = work => done,
        _ = stop.wait_for(|stop| *stop) => None,
        _ = account.ended() => None,
    }
}

/// Accepts connections until `stop` turns true; then those being served are asked to end.
pub async fn accept(
    bound: Bound,
    served: Served,
    security: Security,
    workers: Workers,
    options: Options,
    mut stop: watch::Receiver<bool>,
) -> io::Result<()> {
    enum Listener {
        Tcp(tokio::net::TcpListener),
        Unix(tokio::net::UnixListener, PathBuf),
    }
    let listener = match bound {
        Bound::Tcp(listener) => Listener::Tcp(tokio::net::TcpListener::from_std(listener)?),
        Bound::Unix(listener, path) => {
            Listener::Unix(tokio::net::UnixListener::from_std(listener)?, path)
        }
    };
    let mut stopping = stop.clone();
    loop {
        // Clients above the limit wait in the backlog until others leave, who may be asked to.
        while workers.connections() >= workers.connections_max && !*stop.borrow() {
            workers.budget.make_room();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let accepted = async {
            match &listener {
                Listener::Tcp(listener) => {
                    let (stream, remote) = listener.accept().await?;
                    if let Err(error) = tune(&stream, options.write_timeout) {
                        // A client that has left already; serving it finds that out.
                        tracing::debug!(%error, "cannot set the options of a connection");
                    }
                    Ok::<_, io::Error>(Detached::Tcp(stream.into_std()?, remote))
                }
                Listener::Unix(listener, _) => {
                    let (stream, _) = listener.accept().await?;
                    Ok(Detached::Unix(stream.into_std()?))
                }
            }
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok(socket) => {
                let (served, security) = (served.clone(), security.clone());
                workers.serve(socket, served, security, options, stop.clone());
            }
            Err(error) if is_transient(&error) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => return Err(error),
        }
    }
    if let Listener::Unix(_, path) = &listener {
        // Nothing depends on it: the next start removes a stale socket too.
        std::fs::remove_file(path).ok();
    }
    stop.mark_unchanged();
    Ok(())
}

fn tune(stream: &tokio::net::TcpStream, write_timeout: Option<Duration>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive =
        socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
    let socket = socket2::SockRef::from(stream);
    if write_timeout.is_some() {
        socket.set_tcp_user_timeout(write_timeout)?;
    }
    socket.set_tcp_keepalive(&keepalive)
}

/// Whether accepting can go on: the client left, its network failed (Linux passes such errors of the
/// new connection on, see accept(2)), or there are too few descriptors at the moment.
fn is_transient(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::ECONNABORTED
                | Errno::ECONNRESET
                | Errno::EINTR
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOBUFS
                | Errno::ENOMEM
                | Errno::EINVAL
                | Errno::ENOTCONN
                | Errno::EPERM
                | Errno::EPROTO
                | Errno::ENOPROTOOPT
                | Errno::EOPNOTSUPP
                | Errno::ENETDOWN
                | Errno::ENETUNREACH
                | Errno::ENONET
                | Errno::EHOSTDOWN
                | Errno::EHOSTUNREACH
                | Errno::ETIMEDOUT
        )
    )
}

async fn serve_connection(
    opened: Opened,
    served: Served,
    account: Arc<Account>,
    kept: Kept,
    options: Options,
    mut stop: watch::Receiver<bool>,
) {
    let mut builder = auto::Builder::new(ThisThread);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).keep_alive(true);
    let interval = Some(options.keepalive_interval)
        .filter(|interval| !interval.is_zero() && !options.keepalive_timeout.is_zero());
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(match options.max_concurrent_streams {
            u32::MAX => STREAMS_MAX,
            set => set,
        })
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEADER_LIST_MAX)
        .max_pending_accept_reset_streams(RESETS_PENDING_MAX)
        .max_local_error_reset_streams(ERROR_RESETS_MAX)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(interval)
        .keep_alive_timeout(options.keepalive_timeout);
    let ping_interval = match options.keepalive_min_time {
        Duration::ZERO => PING_INTERVAL_DEFAULT,
        set => set,
    };
    let tls = opened.is_tls();
    let ping_interval = if tls && served.http.is_some() {
        PingInterval { open: TLS_PING_INTERVAL, idle: TLS_PING_INTERVAL }
    } else {
        PingInterval { open: ping_interval, idle: IDLE_PING_INTERVAL }
    };
    let rules = Rules {
        handshake: HANDSHAKE_TIMEOUT,
        headers: HEADERS_TIMEOUT,
        // gRPC's rules; plain HTTP has none.
        ping_interval: served.grpc.is_some().then_some(ping_interval),
    };
    let Opened { stream, client } = opened;
    let stream = TokioIo::new(Guard::new(stream, &rules));
    let connection = Connection { served, account: account.clone(), tls, client, kept };
    let mut connection = pin!(builder.serve_connection_with_upgrades(stream, connection));
    let aged = async {
        match options.connection_age {
            Some(age) => tokio::time::sleep(account.spread(age)).await,
            None => std::future::pending().await,
        }
    };
    let time_left = tokio::select! {
        ended = connection.as_mut() => return log_end(ended),
        _ = stop.wait_for(|stop| *stop) => None,
        () = aged => options.connection_age_grace,
        end = account.ended() => match end {
            End::Now => return,
            End::Gracefully => Some(ROOM_GRACE),
        },
    };
    connection.as_mut().graceful_shutdown();
    let cut = async {
        match time_left {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = connection => log_end(ended),
        () = cut => {}
        () = account.ended_now() => {}
    }
}

fn log_end<E: std::fmt::Display>(ended: Result<(), E>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
