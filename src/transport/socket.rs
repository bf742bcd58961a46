//! A connection that was accepted: its socket, and TLS over it if the listener has that.
//!
//! A listener may serve both in clear and over TLS: a URL of each scheme then has the same address, and
//! a connection's first byte tells (operations 5.1). The HTTP library and the guard below it see one
//! type of stream, whatever is under it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

use crate::logging;
use crate::transport::identity::ClientCert;
use crate::transport::san::{self, Sans};
use crate::transport::tls::{self, Handshakes};

/// What a TLS connection begins with: a record of the handshake. No HTTP request does.
const TLS_FIRST_BYTE: u8 = 0x16;

/// A socket between two threads: it is not registered with a runtime.
pub enum Detached {
    Tcp(std::net::TcpStream, SocketAddr),
    Unix(std::os::unix::net::UnixStream),
}

impl Detached {
    /// Where it comes from.
    pub fn remote(&self) -> Remote {
        match self {
            Detached::Tcp(_, remote) => Remote(Some(*remote)),
            Detached::Unix(_) => Remote(None),
        }
    }

    /// Registers it with the runtime of this thread.
    ///
    /// # Errors
    /// Of the system.
    pub fn attach(self) -> io::Result<(Socket, Remote)> {
        let remote = self.remote();
        let socket = match self {
            Detached::Tcp(stream, _) => Socket::Tcp(TcpStream::from_std(stream)?),
            Detached::Unix(stream) => Socket::Unix(UnixStream::from_std(stream)?),
        };
        Ok((socket, remote))
    }
}

/// Where a connection comes from; `None` for a unix socket.
#[derive(Clone, Copy, Debug)]
pub struct Remote(pub Option<SocketAddr>);

impl std::fmt::Display for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("@"),
        }
    }
}

impl Remote {
    /// The address without the port; an IPv4 one that came over IPv6 as what it is.
    fn ip(self) -> Option<IpAddr> {
        self.0.map(|address| address.ip().to_canonical())
    }
}

/// A socket of either kind.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A socket of which the first byte may have been read already.
pub struct Peeked {
    first: Option<u8>,
    socket: Socket,
}

/// A connection in clear or over TLS.
pub enum Stream {
    Clear(Peeked),
    Tls(Box<TlsStream<Peeked>>),
}

/// Runs `$call` with whatever `$self` holds, pinned, as `$io`.
macro_rules! with {
    ($self:ident, $($variant:path)|+, $io:ident => $call:expr) => {
        match $self.get_mut() {
            $($variant($io) => {
                let $io = Pin::new($io);
                $call
            })+
        }
    };
}

macro_rules! delegate_write {
    ($type:ty, $($variant:path)|+) => {
        impl AsyncWrite for $type {
            fn poll_write(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &[u8],
            ) -> Poll<io::Result<usize>> {
                with!(self, $($variant)|+, io => io.poll_write(cx, buf))
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bufs: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                with!(self, $($variant)|+, io => io.poll_write_vectored(cx, bufs))
            }

            fn is_write_vectored(&self) -> bool {
                match self {
                    $($variant(io) => io.is_write_vectored(),)+
                }
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                with!(self, $($variant)|+, io => io.poll_flush(cx))
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                with!(self, $($variant)|+, io => io.poll_shutdown(cx))
            }
        }
    };
}

macro_rules! delegate_read {
    ($type:ty, $($variant:path)|+) => {
        impl AsyncRead for $type {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                with!(self, $($variant)|+, io => io.poll_read(cx, buf))
            }
        }
    };
}

delegate_read!(Socket, Socket::Tcp | Socket::Unix);
delegate_write!(Socket, Socket::Tcp | Socket::Unix);
delegate_read!(Stream, Stream::Clear | Stream::Tls);
delegate_write!(Stream, Stream::Clear | Stream::Tls);

impl AsyncRead for Peeked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_some() && buf.remaining() > 0 {
            buf.put_slice(self.first.take().as_slice());
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Peeked {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// How a listener's connections are protected.
#[derive(Clone)]
pub enum Security {
    Clear,
    Tls(Secured),
    /// The connection's first byte tells.
    Either(Secured),
}

/// TLS on a listener.
#[derive(Clone)]
pub struct Secured {
    server: tls::Server,
    handshakes: Handshakes,
    endpoint: &'static str,
    checks_address: bool,
}

impl Secured {
    /// `endpoint` is what log lines call the listener. With `checks_address`, a certificate must be
    /// one for the address that it is shown from.
    pub fn new(server: tls::Server, endpoint: &'static str, checks_address: bool) -> Self {
        Secured { server, handshakes: Handshakes::default(), endpoint, checks_address }
    }

    async fn accept(&self, io: Peeked, remote: Remote) -> Option<Opened> {
        let handshake = self.handshakes.begin().run(self.handshake(io, remote));
        let (server_name, leaf, error) = match handshake.await {
            Ok(Ok(opened)) => return Some(opened),
            Ok(Err(Failed::Handshake(refused))) if refused.is_eof() => {
                tracing::debug!(
                    "remote-addr" = %remote,
                    "server-name" = refused.server_name,
                    error = refused.reason(),
                    "rejected connection on {} endpoint", self.endpoint
                );
                return None;
            }
            Ok(Err(Failed::Handshake(refused))) => {
                let (reason, leaf) = (refused.reason(), refused.leaf().cloned());
                (refused.server_name, leaf, reason)
            }
            Ok(Err(Failed::Address { server_name, leaf, error })) => {
                (server_name, Some(leaf), error.to_string())
            }
            Err(ended) => {
                self.server.count_cut_off();
                (String::new(), None, ended.to_string())
            }
        };
        // What cannot be read of it is left out.
        let names = leaf.and_then(|leaf| Sans::of(&leaf).ok()).unwrap_or_default();
        let ips: Vec<String> = names.ips.iter().map(ToString::to_string).collect();
        tracing::warn!(
            "remote-addr" = %remote,
            "server-name" = server_name,
            "ip-addresses" = logging::list(ips.iter().map(String::as_str)).value(),
            "dns-names" = logging::list(names.dns.iter().map(String::as_str)).value(),
            error,
            "rejected connection on {} endpoint", self.endpoint
        );
        None
    }

    async fn handshake(&self, io: Peeked, remote: Remote) -> Result<Opened, Failed> {
        let accepted = self.server.accept(io).await.map_err(Failed::Handshake)?;
        if self.checks_address
            && let (Some(leaf), Some(ip)) = (&accepted.leaf, remote.ip())
            && let Err(error) = san::check(leaf, ip).await
        {
            let (_, connection) = accepted.stream.get_ref();
            return Err(Failed::Address {
                server_name: connection.server_name().unwrap_or_default().to_owned(),
                leaf: leaf.clone(),
                error,
            });
        }
        let shown = accepted.leaf.filter(|_| self.server.names_users());
        let client = shown.map(|leaf| ClientCert { common_name: tls::common_name(&leaf) });
        Ok(Opened { stream: Stream::Tls(accepted.stream), client })
    }
}

/// Why a connection is not served.
enum Failed {
    Handshake(tls::Refused),
    Address { server_name: String, leaf: CertificateDer<'static>, error: san::SanError },
}

/// A connection that is to be served.
pub struct Opened {
    pub stream: Stream,
    /// `None` where certificates do not say who a client is.
    pub client: Option<ClientCert>,
}

impl Opened {
    /// Whether TLS is spoken.
    pub fn is_tls(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }
}

impl Security {
    /// Finds out what a connection speaks, and does the handshake if that is TLS. `None` if it is not
    /// to be served, which is logged. `silence` is the time that a client has to say anything where
    /// that tells TLS from none.
    pub async fn open(&self, socket: Socket, remote: Remote, silence: Duration) -> Option<Opened> {
        let mut io = Peeked { first: None, socket };
        match self {
            Security::Clear => Some(Opened { stream: Stream::Clear(io), client: None }),
            Security::Tls(secured) => secured.accept(io, remote).await,
            Security::Either(secured) => {
                let first = tokio::time::timeout(silence, io.socket.read_u8()).await;
                match first {
                    Ok(Ok(first)) => io.first = Some(first),
                    Ok(Err(_)) | Err(_) => return None,
                }
                if io.first == Some(TLS_FIRST_BYTE) {
                    secured.accept(io, remote).await
                } else {
                    Some(Opened { stream: Stream::Clear(io), client: None })
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::ClientConfig;
    use rustls::crypto::aws_lc_rs;
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use tokio::io::AsyncWriteExt;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::config::Config;
    use crate::metrics::Metrics;
    use crate::transport::tls::tests::pki::{Authority, Issued, Leaf, replace};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A server that asks for certificates of `ca`, as one of both schemes has it.
    fn secured(ca: &Authority, dir: &tempfile::TempDir, checks_address: bool) -> Secured {
        let files = ca.issue(&Leaf::named("server")).write(dir.path(), "server");
        replace(&dir.path().join("ca.crt"), ca.pem.as_bytes());
        let mut config = Config::default();
        config.client_tls.cert_file = files.cert;
        config.client_tls.key_file = files.key;
        config.client_tls.trusted_ca_file = dir.path().join("ca.crt");
        config.client_tls.client_cert_auth = true;
        let metrics = Box::leak(Box::new(Metrics::new()));
        let server = tls::Server::for_clients(&config, metrics).unwrap().unwrap();
        Secured::new(server, "client", checks_address)
    }

    fn client(ca: &Authority, issued: &Issued) -> TlsConnector {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
        let chain = CertificateDer::pem_slice_iter(issued.chain.as_bytes()).map(Result::unwrap);
        let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.collect(), key)
            .unwrap();
        TlsConnector::from(Arc::new(config))
    }

    /// A connection over the loopback device, as it was dialled and as it was accepted.
    async fn pair() -> (TcpStream, Socket, Remote) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, remote) = listener.accept().await.unwrap();
        (dialled, Socket::Tcp(accepted), Remote(Some(remote)))
    }

    async fn open(security: &Security, connector: TlsConnector) -> Option<Opened> {
        let (dialled, socket, remote) = pair().await;
        let name = ServerName::try_from("localhost").unwrap();
        let (opened, dialled) =
            tokio::join!(security.open(socket, remote, PATIENCE), connector.connect(name, dialled));
        let mut opened = opened?;
        let mut read = [0; 4];
        dialled.unwrap().write_all(b"GET ").await.unwrap();
        opened.stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"GET ");
        Some(opened)
    }

    #[tokio::test]
    async fn the_first_byte_tells_what_is_spoken() {
        let (ca, dir) = (Authority::new("the root"), tempfile::TempDir::new().unwrap());
        let alice = ca.issue(&Leaf::client("alice"));
        let secured = secured(&ca, &dir, false);
        let either = Security::Either(secured.clone());
        let opened = open(&either, client(&ca, &alice)).await.expect("TLS is served");
        assert!(opened.is_tls());
        let named = ClientCert { common_name: Some("alice".to_owned()) };
        assert_eq!(opened.client, Some(named));

        for (security, served) in
            [(&either, true), (&Security::Clear, true), (&Security::Tls(secured), false)]
        {
            let (mut dialled, socket, remote) = pair().await;
            dialled.write_all(b"GET / HTTP/1.1").await.unwrap();
            let opened = security.open(socket, remote, PATIENCE).await;
            assert_eq!(opened.is_some(), served);
            if let Some(mut opened) = opened {
                assert!(!opened.is_tls());
                assert_eq!(opened.client, None);
                let mut read = [0; 14];
                opened.stream.read_exact(&mut read).await.unwrap();
                assert_eq!(&read, b"GET / HTTP/1.1");
            }
        }
        // Who says nothing is not waited for without end.
        let (_silent, socket, remote) = pair().await;
        assert!(either.open(socket, remote, Duration::from_millis(20)).await.is_none());
    }

    #[tokio::test]
    async fn who_begins_a_handshake_and_stops_gives_way() {
        let (ca, dir) = (Authority::new("the root"), tempfile::TempDir::new().unwrap());
        let alice = ca.issue(&Leaf::client("alice"));
        let mut secured = secured(&ca, &dir, false);
        secured.handshakes = Handshakes::new(4, PATIENCE);
        let security = Security::Tls(secured.clone());
        let mut silent = Vec::new();
        for _ in 0..12 {
            let (dialled, socket, remote) = pair().await;
            let security = security.clone();
            let ended =
                tokio::spawn(
                    async move { security.open(socket, remote, PATIENCE).await.is_some() },
                );
            silent.push((dialled, ended));
        }
        let opened = open(&security, client(&ca, &alice)).await;
        assert!(opened.is_some(), "one that means it is served");
        assert!(secured.handshakes.under_way() <= 4);
        // All but the youngest have been sent away, long before their time was over.
        for (_, ended) in silent.drain(..8) {
            let ended = tokio::time::timeout(PATIENCE / 2, ended).await;
            assert!(!ended.expect("it gave way").unwrap());
        }
        for (_, ended) in silent {
            ended.abort();
        }
    }

    #[tokio::test]
    async fn a_certificate_for_another_address_is_refused_where_that_counts() {
        let (ca, dir) = (Authority::new("the root"), tempfile::TempDir::new().unwrap());
        let here = ca.issue(&Leaf::client("here").with_names(&[], &["127.0.0.1"]));
        let elsewhere = ca.issue(&Leaf::client("elsewhere").with_names(&[], &["10.0.0.1"]));
        for (checks, served) in [(false, true), (true, false)] {
            let security = Security::Tls(secured(&ca, &dir, checks));
            assert!(open(&security, client(&ca, &here)).await.is_some());
            assert_eq!(open(&security, client(&ca, &elsewhere)).await.is_some(), served);
        }
    }
}
