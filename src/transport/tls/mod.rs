//! TLS: certificates, whom to trust, and the handshake, for what listens and for what dials.
//!
//! [`Server`] and [`Client`] are made from the configuration once; their files are read then, so that
//! a start with a bad one fails by name. After that, a handshake that comes a second or more after
//! the last look at the files has them looked at again, off the transport threads (see `reload`):
//! certificate, key, authorities and revocation list are replaced without a restart. etcd does so for
//! certificate, key and list. Connections that stand go on.
//!
//! Whom a certificate is accepted from (operations 5.1) is decided in `verify`, inside the handshake, so
//! that the other side is told. A session that is resumed skips that part of the handshake; its
//! certificates are judged again when it stands, by what holds then. Each change of a file also begins
//! a new store of sessions.

mod admission;
mod auto;
mod crl;
mod files;
mod reload;
pub mod suites;
mod verify;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{NoServerSessionStorage, ServerSessionMemoryCache};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, HandshakeKind, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

pub use admission::{HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, Handshakes, Offered};
pub use auto::AutoError;
pub use verify::common_name;

use crate::config::{self, Config, Url};
use crate::metrics::Metrics;
use crl::Revoked;
use files::{FileError, Identity, Roots, Watched};
use reload::{Reloaded, Reloader};
use verify::{Allowed, Clients, Servers};

/// Sessions that a server remembers so that they can be resumed. Go's clients do not resume, so few
/// use it; each is a few KiB.
const SESSIONS_MAX: usize = 1024;

/// Which connections: those with clients, or those between members.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Client,
    Peer,
}

impl Side {
    /// The word in metrics, directories and log lines.
    pub const fn name(self) -> &'static str {
        match self {
            Side::Client => "client",
            Side::Peer => "peer",
        }
    }

    const fn flags(self) -> Flags {
        match self {
            Side::Client => Flags {
                certificate: "--cert-file",
                client_certificate: "--client-cert-file",
                authorities: "--trusted-ca-file",
                revoked: "--client-crl-file",
            },
            Side::Peer => Flags {
                certificate: "--peer-cert-file",
                client_certificate: "--peer-client-cert-file",
                authorities: "--peer-trusted-ca-file",
                revoked: "--peer-crl-file",
            },
        }
    }
}

/// What errors call the files.
struct Flags {
    certificate: &'static str,
    client_certificate: &'static str,
    authorities: &'static str,
    revoked: &'static str,
}

/// Why TLS cannot be set up.
#[derive(thiserror::Error, Debug)]
pub enum TlsError {
    #[error("{flag} {file}")]
    File { flag: &'static str, file: String },
    #[error("KeyFile and CertFile must both be present[key: {}, cert: {}]", key.display(), cert.display())]
    HalfPair { key: PathBuf, cert: PathBuf },
    #[error(
        "ClientKeyFile and ClientCertFile must both be present or both absent: key: {}, cert: {}]",
        key.display(), cert.display()
    )]
    HalfClientPair { key: PathBuf, cert: PathBuf },
    #[error(
        "AllowedCNs and AllowedHostnames are mutually exclusive (cns={}, hostnames={})",
        quoted(cns),
        quoted(hostnames)
    )]
    BothAllowed { cns: Vec<String>, hostnames: Vec<String> },
    #[error("unexpected TLS cipher suite {0:?}")]
    UnknownSuite(String),
    #[error(
        "TLS cipher suite {name:?} is not supported: it is known to be weak; supported are {}",
        suites::names().collect::<Vec<_>>().join(", ")
    )]
    WeakSuite { name: String },
    #[error("{flag} is not set, and the system has no certificate authorities to verify {whom} by")]
    NobodyTrusted { flag: &'static str, whom: &'static str },
    #[error(transparent)]
    Auto(#[from] AutoError),
    #[error("cannot set up TLS: {0}")]
    Library(String),
}

/// As Go prints a list of strings with `%q`.
fn quoted(list: &[String]) -> String {
    let items: Vec<String> = list.iter().map(|item| format!("{item:?}")).collect();
    format!("[{}]", items.join(" "))
}

/// What does not change while the process runs.
struct Settings {
    side: Side,
    provider: Arc<CryptoProvider>,
    versions: &'static [&'static SupportedProtocolVersion],
    tls: config::Tls,
    allowed: Allowed,
    /// Certificate and key were made by [`auto`], here or at an earlier start.
    self_signed: bool,
    metrics: &'static Metrics,
}

impl Settings {
    /// Those of a side; makes a certificate if that is asked for. `urls` are what it is made for.
    fn of(
        config: &Config,
        side: Side,
        urls: &[&[Url]],
        metrics: &'static Metrics,
    ) -> Result<Self, TlsError> {
        let mut tls = match side {
            Side::Client => config.client_tls.clone(),
            Side::Peer => config.peer_tls.clone(),
        };
        let given = |path: &PathBuf| !path.as_os_str().is_empty();
        if given(&tls.cert_file) != given(&tls.key_file) {
            return Err(TlsError::HalfPair { key: tls.key_file, cert: tls.cert_file });
        }
        if given(&tls.client_cert_file) != given(&tls.client_key_file) {
            return Err(TlsError::HalfClientPair {
                key: tls.client_key_file,
                cert: tls.client_cert_file,
            });
        }
        let allowed = match (tls.allowed_cn.is_empty(), tls.allowed_hostname.is_empty()) {
            (true, true) => Allowed::Any,
            (false, true) => Allowed::CommonNames(tls.allowed_cn.clone()),
            (true, false) => Allowed::Hostnames(tls.allowed_hostname.clone()),
            (false, false) => {
                return Err(TlsError::BothAllowed {
                    cns: tls.allowed_cn,
                    hostnames: tls.allowed_hostname,
                });
            }
        };
        let mut self_signed = false;
        if tls.auto {
            if given(&tls.cert_file) {
                tracing::warn!("ignoring {} auto TLS since certs given", side.name());
            } else {
                let dir = config.member.data_dir.join("fixtures").join(side.name());
                let hosts = urls.iter().flat_map(|urls| urls.iter()).map(Url::host_name);
                let years = config.tls.self_signed_validity_years;
                let made = auto::certificate(&dir, hosts, years)?;
                (tls.cert_file, tls.key_file) = (made.certificate, made.key);
                self_signed = true;
            }
        }
        Ok(Settings {
            side,
            provider: suites::provider(&config.tls)?,
            versions: suites::versions(&config.tls),
            tls,
            allowed,
            self_signed,
            metrics,
        })
    }

    fn has_certificate(&self) -> bool {
        !self.tls.cert_file.as_os_str().is_empty()
    }

    /// Whether who connects must show a certificate. A file of authorities is enough to ask for it.
    fn demands_certificates(&self) -> bool {
        self.tls.client_cert_auth || !self.tls.trusted_ca_file.as_os_str().is_empty()
    }

    fn identity(
        &self,
        flag: &'static str,
        certificate: &Path,
        key: &Path,
    ) -> Result<Watched<Identity>, TlsError> {
        let provider = self.provider.clone();
        let parse = move |files: &[Vec<u8>]| match files {
            [chain, key] => Identity::parse(chain, key, &provider),
            _ => Err("a certificate and a key are needed".to_owned()),
        };
        Watched::open(vec![certificate.to_owned(), key.to_owned()], parse, None)
            .map_err(|error| in_file(flag, &error))
    }

    /// The trusted ones of the file; of the system without one.
    fn authorities(&self) -> Result<Authorities, TlsError> {
        let path = &self.tls.trusted_ca_file;
        if path.as_os_str().is_empty() {
            return Ok(Authorities::Fixed(Arc::new(Roots::system())));
        }
        let parse = |files: &[Vec<u8>]| Roots::parse(files.first().map_or(&[], Vec::as_slice));
        let watched = Watched::open(vec![path.clone()], parse, None)
            .map_err(|error| in_file(self.side.flags().authorities, &error))?;
        Ok(Authorities::Of(watched))
    }

    /// Shows when a certificate ends. One that has ended is used all the same: whether it is accepted is
    /// for the other side to say.
    fn show_expiry(&self, role: &str, identity: &Identity) {
        let side = self.side.name();
        self.metrics.tls_certificate_expiry.with(&[side, role]).set(identity.not_after_s as f64);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        if now.is_ok_and(|now| now.as_secs() as i64 > identity.not_after_s) {
            tracing::warn!(side, r#use = role, "a certificate of this member has expired");
        }
    }

    fn revoked(&self) -> Result<Option<Watched<Revoked>>, TlsError> {
        let path = &self.tls.crl_file;
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        let parse = |files: &[Vec<u8>]| Revoked::parse(files.first().map_or(&[], Vec::as_slice));
        // As in etcd: without its list, nobody is let in.
        let watched = Watched::open(vec![path.clone()], parse, Some(Revoked::unreadable))
            .map_err(|error| in_file(self.side.flags().revoked, &error))?;
        Ok(Some(watched))
    }
}

fn in_file(flag: &'static str, error: &FileError) -> TlsError {
    TlsError::File { flag, file: error.to_string() }
}

/// The trusted ones.
enum Authorities {
    Fixed(Arc<Roots>),
    Of(Watched<Roots>),
}

impl Authorities {
    fn value(&self) -> &Arc<Roots> {
        match self {
            Authorities::Fixed(roots) => roots,
            Authorities::Of(watched) => watched.value(),
        }
    }

    fn look(&mut self) -> files::Seen {
        match self {
            Authorities::Fixed(_) => files::Seen::Same,
            Authorities::Of(watched) => watched.look(),
        }
    }
}

/// The accepting side of TLS; a handle that is cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<ServerInner>);

struct ServerInner {
    side: Side,
    demands_certificates: bool,
    client_cert_auth: bool,
    state: Reloader<ServerState>,
    handshakes: Counted,
}

/// How handshakes ended.
struct Counted {
    done: metrics::Counter,
    failed: metrics::Counter,
    cut_off: metrics::Counter,
}

/// What a handshake is made with.
struct ServerState {
    config: Arc<ServerConfig>,
    /// `None` if nobody is asked for a certificate.
    clients: Option<Arc<Clients>>,
}

/// What [`ServerState`] is made of.
struct ServerFiles {
    settings: Settings,
    identity: Watched<Identity>,
    authorities: Option<Authorities>,
    revoked: Option<Watched<Revoked>>,
}

impl ServerFiles {
    fn open(settings: Settings) -> Result<Self, TlsError> {
        let flags = settings.side.flags();
        let tls = &settings.tls;
        let identity = settings.identity(flags.certificate, &tls.cert_file, &tls.key_file)?;
        let demands = settings.demands_certificates();
        let authorities = demands.then(|| settings.authorities()).transpose()?;
        if authorities.as_ref().is_some_and(|found| found.value().store.is_empty()) {
            return Err(TlsError::NobodyTrusted { flag: flags.authorities, whom: "clients" });
        }
        let revoked = settings.revoked()?;
        Ok(ServerFiles { settings, identity, authorities, revoked })
    }

    fn build(&self) -> Result<ServerState, String> {
        let settings = &self.settings;
        let builder = ServerConfig::builder_with_provider(settings.provider.clone())
            .with_protocol_versions(settings.versions)
            .map_err(|error| error.to_string())?;
        let clients = match &self.authorities {
            Some(authorities) => Some(Arc::new(Clients::new(
                authorities.value().clone(),
                settings.allowed.clone(),
                self.revoked.as_ref().map(|list| list.value().clone()),
                settings.provider.clone(),
            )?)),
            None => None,
        };
        let builder = match &clients {
            Some(clients) => builder.with_client_cert_verifier(clients.clone()),
            None => builder.with_no_client_auth(),
        };
        let certified = self.identity.value().certified.clone();
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = match settings.side {
            Side::Client => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            Side::Peer => vec![b"http/1.1".to_vec()],
        };
        match settings.side {
            Side::Client => {
                config.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
                config.send_tls13_tickets = 1;
            }
            // Members keep their connections and do not ask for it.
            Side::Peer => {
                config.session_storage = Arc::new(NoServerSessionStorage {});
                config.send_tls13_tickets = 0;
            }
        }
        settings.show_expiry("server", self.identity.value());
        Ok(ServerState { config: Arc::new(config), clients })
    }
}

impl reload::Files for ServerFiles {
    type State = ServerState;

    fn look(&mut self) -> Reloaded {
        let mut found = Reloaded::new(self.settings.side, self.settings.metrics);
        found.add("certificate", self.identity.look());
        if let Some(authorities) = &mut self.authorities {
            found.add("authorities", authorities.look());
        }
        if let Some(revoked) = &mut self.revoked {
            // Even one that cannot be read counts as a change: it refuses everybody.
            let before = revoked.value().clone();
            let seen = revoked.look();
            found.add("revocation list", seen);
            found.changed |= !Arc::ptr_eq(&before, revoked.value());
        }
        found
    }

    fn build(&self) -> Result<ServerState, String> {
        ServerFiles::build(self)
    }
}

/// A connection whose handshake is done.
pub struct Accepted<IO> {
    pub stream: Box<tokio_rustls::server::TlsStream<IO>>,
    /// The certificate of the other side, if it was asked for one: verified and allowed.
    pub leaf: Option<CertificateDer<'static>>,
}

/// A handshake that failed.
#[derive(Debug)]
pub struct Refused {
    /// Which server was asked for; empty if the handshake did not come that far.
    pub server_name: String,
    pub error: io::Error,
}

impl Refused {
    /// Whether the other side only went away.
    pub fn is_eof(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        matches!(self.error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
    }

    /// Why, in the words of what refused it.
    pub fn reason(&self) -> String {
        if self.error.kind() == io::ErrorKind::UnexpectedEof {
            return "EOF".to_owned();
        }
        reason(&self.error)
    }

    /// The certificate that was refused, where it was not for its chain.
    pub fn leaf(&self) -> Option<&CertificateDer<'static>> {
        library_error(&self.error).and_then(verify::leaf)
    }
}

fn library_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// What an error of a TLS stream says, in its own words where the library only wraps them.
pub fn reason(error: &io::Error) -> String {
    library_error(error).map_or_else(|| error.to_string(), verify::reason)
}

impl Server {
    /// What the client and the metrics listeners accept with. `None` without a certificate.
    ///
    /// # Errors
    /// What of the configuration or its files is wrong.
    pub fn for_clients(
        config: &Config,
        metrics: &'static Metrics,
    ) -> Result<Option<Server>, TlsError> {
        let listen = &config.listen;
        let urls: [&[Url]; 2] = [&listen.client_urls, &listen.client_http_urls];
        let settings = Settings::of(config, Side::Client, &urls, metrics)?;
        let tls = &settings.tls;
        if !tls.client_cert_file.as_os_str().is_empty() {
            // Nothing here shows it, since the gateway calls its services without a connection.
            let flag = Side::Client.flags().client_certificate;
            settings.identity(flag, &tls.client_cert_file, &tls.client_key_file)?;
        }
        Self::with(settings)
    }

    /// What the peer listeners accept with. `None` without a certificate.
    ///
    /// # Errors
    /// What of the configuration or its files is wrong.
    pub fn for_peers(
        config: &Config,
        metrics: &'static Metrics,
    ) -> Result<Option<Server>, TlsError> {
        let urls: [&[Url]; 1] = [&config.listen.peer_urls];
        Self::with(Settings::of(config, Side::Peer, &urls, metrics)?)
    }

    fn with(settings: Settings) -> Result<Option<Server>, TlsError> {
        if !settings.has_certificate() {
            return Ok(None);
        }
        let side = settings.side;
        let counted = |result: &str| settings.metrics.tls_handshakes.with(&[side.name(), result]);
        let handshakes = Counted {
            done: counted("done"),
            failed: counted("failed"),
            cut_off: counted("cut_off"),
        };
        let demands_certificates = settings.demands_certificates();
        let client_cert_auth = settings.tls.client_cert_auth;
        let files = ServerFiles::open(settings)?;
        let state = files.build().map_err(TlsError::Library)?;
        Ok(Some(Server(Arc::new(ServerInner {
            side,
            demands_certificates,
            client_cert_auth,
            state: Reloader::new(files, Some(state)),
            handshakes,
        }))))
    }

    pub fn side(&self) -> Side {
        self.0.side
    }

    /// Whether the common name of a certificate says who a client is.
    pub fn names_users(&self) -> bool {
        self.0.client_cert_auth
    }

    /// Whether who connects must show a certificate.
    pub fn demands_certificates(&self) -> bool {
        self.0.demands_certificates
    }

    /// Does the handshake. The caller bounds its time, see [`HANDSHAKE_TIMEOUT`].
    ///
    /// # Errors
    /// Why the other side is refused; it has been told by an alert.
    pub async fn accept<IO>(&self, io: IO) -> Result<Accepted<IO>, Refused>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let mut server_name = String::new();
        let done = self.handshake(io, &mut server_name).await;
        let counted = &self.0.handshakes;
        if done.is_ok() { &counted.done } else { &counted.failed }.increment(1);
        done.map_err(|error| Refused { server_name, error })
    }

    /// Counts a handshake that the caller gave no more time.
    pub fn count_cut_off(&self) {
        self.0.handshakes.cut_off.increment(1);
    }

    async fn handshake<IO>(&self, io: IO, server_name: &mut String) -> io::Result<Accepted<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        // Nothing but a buffer is held for who says nothing.
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io).await?;
        if let Some(name) = start.client_hello().server_name() {
            name.clone_into(server_name);
        }
        let state = self.0.state.now().await?;
        let stream = start.into_stream(state.config.clone()).await?;
        let (_, connection) = stream.get_ref();
        let Some(clients) = &state.clients else {
            return Ok(Accepted { stream: Box::new(stream), leaf: None });
        };
        let chain = connection.peer_certificates().unwrap_or_default();
        if connection.handshake_kind() == Some(HandshakeKind::Resumed) {
            let judged = clients.judge(chain);
            judged.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        let leaf = chain.first().cloned();
        Ok(Accepted { stream: Box::new(stream), leaf })
    }
}

/// The dialling side of TLS between members; a handle that is cheap to clone.
#[derive(Clone)]
pub struct Client(Arc<Reloader<Arc<ClientConfig>>>);

/// What a dialler's [`ClientConfig`] is made of.
struct ClientFiles {
    settings: Settings,
    /// Shown to servers that ask.
    identity: Option<Watched<Identity>>,
    /// Read at the first use if they are the system's.
    authorities: Option<Authorities>,
}

impl ClientFiles {
    fn open(settings: Settings) -> Result<Self, TlsError> {
        let (tls, flags) = (&settings.tls, settings.side.flags());
        let identity = if !tls.client_cert_file.as_os_str().is_empty() {
            let flag = flags.client_certificate;
            Some(settings.identity(flag, &tls.client_cert_file, &tls.client_key_file)?)
        } else if settings.has_certificate() {
            Some(settings.identity(flags.certificate, &tls.cert_file, &tls.key_file)?)
        } else {
            None
        };
        let authorities = if settings.self_signed {
            Some(Authorities::Fixed(Arc::new(Roots::none())))
        } else if tls.trusted_ca_file.as_os_str().is_empty() {
            None
        } else {
            Some(settings.authorities()?)
        };
        Ok(ClientFiles { settings, identity, authorities })
    }

    fn build(&self) -> Result<Arc<ClientConfig>, String> {
        let settings = &self.settings;
        let roots = match &self.authorities {
            Some(authorities) => authorities.value().clone(),
            None => Arc::new(Roots::system()),
        };
        if roots.store.is_empty() && !settings.self_signed {
            let flag = settings.side.flags().authorities;
            return Err(TlsError::NobodyTrusted { flag, whom: "members" }.to_string());
        }
        let servers = Servers::new(
            roots,
            !settings.self_signed,
            settings.allowed.clone(),
            settings.provider.clone(),
        )?;
        let builder = ClientConfig::builder_with_provider(settings.provider.clone())
            .with_protocol_versions(settings.versions)
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(servers));
        let mut config = match &self.identity {
            Some(identity) => {
                settings.show_expiry("client", identity.value());
                let certified = identity.value().certified.clone();
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
            None => builder.with_no_client_auth(),
        };
        // Never h2: etcd's peer server would agree to it and not speak it.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A resumed session's certificate would be looked at no more.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl reload::Files for ClientFiles {
    type State = Arc<ClientConfig>;

    fn look(&mut self) -> Reloaded {
        let mut found = Reloaded::new(self.settings.side, self.settings.metrics);
        if let Some(identity) = &mut self.identity {
            found.add("client certificate", identity.look());
        }
        if let Some(authorities) = &mut self.authorities {
            found.add("authorities", authorities.look());
        }
        found
    }

    fn build(&self) -> Result<Arc<ClientConfig>, String> {
        ClientFiles::build(self)
    }
}

impl Client {
    /// What members are dialled with (operations 5.1, client role between peers). It is there without
    /// any setting too; the system's authorities are read when the first member is dialled.
    ///
    /// # Errors
    /// What of the configuration or its files is wrong.
    pub fn for_peers(config: &Config, metrics: &'static Metrics) -> Result<Client, TlsError> {
        let urls: [&[Url]; 1] = [&config.listen.peer_urls];
        let files = ClientFiles::open(Settings::of(config, Side::Peer, &urls, metrics)?)?;
        let state = match &files.authorities {
            Some(_) => Some(files.build().map_err(TlsError::Library)?),
            None => None,
        };
        Ok(Client(Arc::new(Reloader::new(files, state))))
    }

    /// Does the handshake with the server that is to be `name`. The caller bounds its time.
    ///
    /// # Errors
    /// Why not; [`reason`] has the words.
    pub async fn connect<IO>(
        &self,
        name: ServerName<'static>,
        io: IO,
    ) -> io::Result<tokio_rustls::client::TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let config: Arc<ClientConfig> = (*self.0.now().await?).clone();
        TlsConnector::from(config).connect(name, io).await
    }
}

#[cfg(test)]
pub(in crate::transport) mod tests;
