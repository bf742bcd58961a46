//! TLS in a cluster: which of its ports have it, and how clients come in.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::{Service, http::Uri};

/// Which ports of the members speak TLS. What they need for it is among their arguments.
#[derive(Clone, Debug, Default)]
pub struct Secure {
    /// Of the client ports, if they do: how clients connect.
    pub client: Option<Connector>,
    pub peers: bool,
}

/// Connects as a client with what it is to trust and to show at that moment.
#[derive(Clone)]
pub struct Connector {
    config: Arc<dyn Fn() -> Arc<ClientConfig> + Send + Sync>,
    connected: Arc<AtomicUsize>,
}

impl Connector {
    /// `config` is asked at each connection.
    pub fn new(config: impl Fn() -> Arc<ClientConfig> + Send + Sync + 'static) -> Connector {
        Connector { config: Arc::new(config), connected: Arc::default() }
    }

    /// Connections that have stood so far.
    pub fn connected(&self) -> usize {
        self.connected.load(Ordering::Relaxed)
    }

    /// A connection to a port of the loopback device.
    pub async fn connect(&self, port: u16) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("127.0.0.1").expect("an address names a server");
        let stream = TlsConnector::from((self.config)()).connect(name, stream).await?;
        self.connected.fetch_add(1, Ordering::Relaxed);
        Ok(stream)
    }
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connector").field("connected", &self.connected()).finish_non_exhaustive()
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let port = uri.port_u16().ok_or_else(|| io::Error::other("a URI without a port"))?;
            Ok(TokioIo::new(connector.connect(port).await?))
        })
    }
}
