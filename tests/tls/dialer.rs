//! How a member dials another: what it shows, whom it believes, how long it waits.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate::config::{Config, Url};
use quorate::metrics::Metrics;
use quorate::transport::peer::client::{Connection, Dialer};
use quorate::transport::tls;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::deck::Deck;
use crate::pki::{self, Authority, Files, Issued, Leaf};
use crate::rig::run;

/// Far longer than a handshake takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn dialer_of(config: &Config, patience: Duration) -> Dialer {
    let metrics: &'static Metrics = Box::leak(Box::new(Metrics::new()));
    Dialer::new(patience, tls::Client::for_peers(config, metrics).unwrap())
}

/// A member's settings with the deck's certificate.
fn settings(deck: &Deck) -> Config {
    let mut config = Config::default();
    config.peer_tls.cert_file = deck.member.cert.clone();
    config.peer_tls.key_file = deck.member.key.clone();
    config.peer_tls.trusted_ca_file = deck.ca.clone();
    config
}

/// What a server has seen of a connection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Seen {
    server_name: Option<String>,
    offered: Vec<Vec<u8>>,
    shown: Option<CertificateDer<'static>>,
}

/// A server of a peer's kind with `issued`, which answers a byte with the next one and takes notes; it
/// speaks what etcd's does.
async fn serve(deck: &Deck, issued: &Issued) -> (Url, Arc<Mutex<Vec<Seen>>>) {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(deck.root.pem.as_bytes()).unwrap()).unwrap();
    let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let chain = CertificateDer::pem_slice_iter(issued.chain.as_bytes());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(clients.build().unwrap())
        .with_single_cert(
            chain.collect::<Result<_, _>>().unwrap(),
            PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let seen = Arc::<Mutex<Vec<Seen>>>::default();
    let notes = seen.clone();
    tokio::task::spawn_local(async move {
        let config = Arc::new(config);
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (notes, acceptor) = (notes.clone(), TlsAcceptor::from(config.clone()));
            tokio::task::spawn_local(async move {
                // A dialler that does not like what it sees ends it here.
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let (_, connection) = stream.get_ref();
                let shown = connection.peer_certificates().and_then(|chain| chain.first().cloned());
                notes.lock().unwrap().push(Seen {
                    server_name: connection.server_name().map(str::to_owned),
                    offered: connection.alpn_protocol().map(<[u8]>::to_vec).into_iter().collect(),
                    shown: shown.map(CertificateDer::into_owned),
                });
                while let Ok(byte) = stream.read_u8().await {
                    stream.write_u8(byte + 1).await.unwrap();
                    stream.flush().await.unwrap();
                }
            });
        }
    });
    (Url::parse(&url).unwrap(), seen)
}

async fn echo(mut stream: Box<dyn Connection>) -> io::Result<u8> {
    stream.write_all(&[41]).await?;
    stream.flush().await?;
    stream.read_u8().await
}

fn leaf(issued: &Issued) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(issued.chain.as_bytes()).unwrap()
}

/// The error of a dial, whole.
async fn refusal(dialer: &Dialer, url: &Url) -> String {
    dialer.connect(url).await.err().expect("refused").to_string()
}

#[test]
fn a_member_shows_its_certificate_and_never_offers_http2() {
    run(async {
        let deck = Deck::new();
        let server = deck.signer.issue(&Leaf::named("other"));
        let (url, seen) = serve(&deck, &server).await;
        let mut config = settings(&deck);
        let stream = dialer_of(&config, PATIENCE).connect(&url).await.unwrap();
        assert_eq!(echo(stream).await.unwrap(), 42);
        let own = CertificateDer::from_pem_file(&deck.member.cert).unwrap();
        let mut expected =
            vec![Seen { server_name: None, offered: vec![b"http/1.1".to_vec()], shown: Some(own) }];
        assert_eq!(*seen.lock().unwrap(), expected);
        // By name, and with the certificate for diallers.
        let diallers = deck.signer.issue(&Leaf::client("dialler"));
        let Files { cert, key } = deck.write(&diallers, "dialler");
        (config.peer_tls.client_cert_file, config.peer_tls.client_key_file) = (cert, key);
        let by_name = Url::new(url.scheme(), "localhost", url.port());
        let stream = dialer_of(&config, PATIENCE).connect(&by_name).await.unwrap();
        assert_eq!(echo(stream).await.unwrap(), 42);
        expected.push(Seen {
            server_name: Some("localhost".to_string()),
            shown: Some(leaf(&diallers)),
            ..expected[0].clone()
        });
        assert_eq!(*seen.lock().unwrap(), expected);
    });
}

#[test]
fn a_member_believes_only_whom_it_was_told_to() {
    run(async {
        let deck = Deck::new();
        let mut config = settings(&deck);
        let dialer = dialer_of(&config, PATIENCE);
        let stranger = Authority::new("another").issue(&Leaf::named("other"));
        let (url, _) = serve(&deck, &stranger).await;
        let said = refusal(&dialer, &url).await;
        assert!(said.contains("UnknownIssuer"), "{said}");
        let elsewhere = Leaf::named("other").with_names(&["elsewhere.example"], &["10.1.2.3"]);
        let (url, _) = serve(&deck, &deck.signer.issue(&elsewhere)).await;
        let said = refusal(&dialer, &url).await;
        assert!(said.contains("not valid for name"), "{said}");
        let (url, _) = serve(&deck, &deck.signer.issue(&Leaf::named("other").expired())).await;
        let said = refusal(&dialer, &url).await;
        assert!(said.contains("expired") || said.contains("Expired"), "{said}");
        let users =
            deck.signer.issue(&Leaf { ips: vec![[127, 0, 0, 1].into()], ..Leaf::client("other") });
        let (url, _) = serve(&deck, &users).await;
        let said = refusal(&dialer, &url).await;
        assert!(said.contains("extended key usage"), "{said}");

        // Names that are allowed hold for those that are dialled, too.
        config.peer_tls.allowed_cn = vec!["member".to_string()];
        let dialer = dialer_of(&config, PATIENCE);
        let (url, _) = serve(&deck, &deck.signer.issue(&Leaf::named("other"))).await;
        let said = refusal(&dialer, &url).await;
        assert_eq!(said, "TLS handshake failed: client certificate authentication failed");
        let (url, _) = serve(&deck, &deck.signer.issue(&Leaf::named("member"))).await;
        assert_eq!(echo(dialer.connect(&url).await.unwrap()).await.unwrap(), 42);
    });
}

#[test]
fn what_a_dialler_shows_and_trusts_is_read_again() {
    run(async {
        let deck = Deck::new();
        let dialer = dialer_of(&settings(&deck), PATIENCE);
        let server = Authority::new("another").issue(&Leaf::named("other"));
        let other_root = Authority::new("another");
        let (url, seen) = serve(&deck, &other_root.issue(&Leaf::named("other"))).await;
        let said = refusal(&dialer, &url).await;
        assert!(said.contains("UnknownIssuer"), "{said}");
        let renewed = deck.signer.issue(&Leaf::named("member"));
        renewed.write(deck.path(), "member");
        pki::replace(&deck.ca, format!("{}{}", deck.root.pem, other_root.pem).as_bytes());
        crate::rig::wait_for("the files to be read again", || async {
            // The answer tells that the server is through with it, too.
            let stream = dialer.connect(&url).await.map_err(|error| error.to_string())?;
            echo(stream).await.map_err(|error| error.to_string())
        })
        .await;
        let shown = seen.lock().unwrap().last().cloned().unwrap().shown;
        assert_eq!(shown, Some(leaf(&renewed)));
        // One of the same name is not the same.
        let (url, _) = serve(&deck, &server).await;
        refusal(&dialer, &url).await;
    });
}

#[test]
fn a_handshake_that_does_not_end_counts_into_the_time_to_connect() {
    run(async {
        let deck = Deck::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let url = Url::parse(&url).unwrap();
        let dialer = dialer_of(&settings(&deck), Duration::from_millis(50));
        // The system completes the connection; nobody ever answers on it.
        let error = dialer.connect(&url).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = Dialer::clear(PATIENCE).connect(&url).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        drop(listener);
    });
}
