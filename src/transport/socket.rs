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
    /// Registers it with the runtime of this thread.
    ///
    /// # Errors
    /// Of the system.
    pub fn attach(self) -> io::Result<(Socket, Remote)> {
        Ok(match self {
            Detached::Tcp(stream, remote) => {
                (Socket::Tcp(TcpStream::from_std(stream)?), Remote(Some(remote)))
            }
            Detached::Unix(stream) => (Socket::Unix(UnixStream::from_std(stream)?), Remote(None)),
        })
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
        let (server_name, leaf, error) =
            match self.handshakes.begin().run(self.handshake(io, remote)).await {
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
                    let reason = refused.reason();
                    (refused.server_name, refused.leaf, reason)
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
