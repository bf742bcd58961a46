//! Both sides of a connection against certificates of every kind.

use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256,
};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{CipherSuite, ProtocolVersion, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::*;

#[path = "../../../tests/pki/mod.rs"]
pub(in crate::transport) mod pki;

use pki::{Authority, Issued, Leaf, replace};

/// For what happens at the next look at the files.
const PATIENCE: Duration = Duration::from_secs(20);

fn metrics() -> &'static Metrics {
    Box::leak(Box::new(Metrics::new()))
}

/// A directory with the files of a member, and who signed them.
struct Rig {
    dir: TempDir,
    ca: Authority,
    config: Config,
    metrics: &'static Metrics,
}

impl Rig {
    /// With a certificate for both sides of a member and no demands on others.
    fn new() -> Rig {
        let dir = TempDir::new().unwrap();
        let ca = Authority::new(&format!("the root in {}", dir.path().display()));
        let files = ca.issue(&Leaf::named("member")).write(dir.path(), "member");
        let mut config = Config::default();
        config.member.data_dir = dir.path().join("data");
        for tls in [&mut config.client_tls, &mut config.peer_tls] {
            tls.cert_file.clone_from(&files.cert);
            tls.key_file.clone_from(&files.key);
        }
        replace(&dir.path().join("ca.crt"), ca.pem.as_bytes());
        Rig { dir, ca, config, metrics: metrics() }
    }

    /// Which demands certificates of its authority.
    fn demanding() -> Rig {
        let mut rig = Rig::new();
        let path = rig.path("ca.crt");
        rig.config.client_tls.trusted_ca_file.clone_from(&path);
        rig.config.client_tls.client_cert_auth = true;
        rig.config.peer_tls.trusted_ca_file = path;
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a revocation list, and names it in the configuration.
    fn revoke(&mut self, list: &[u8]) {
        let path = self.path("crl");
        replace(&path, list);
        self.config.client_tls.crl_file = path;
    }

    fn server(&self) -> Server {
        Server::for_clients(&self.config, self.metrics).unwrap().unwrap()
    }

    fn refusal(&self) -> String {
        match Server::for_clients(&self.config, self.metrics) {
            Ok(_) => panic!("it is taken"),
            Err(error) => error.to_string(),
        }
    }

    /// The value of a metric's line.
    fn shown(&self, series: &str) -> Option<f64> {
        let page = self.metrics.render();
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.map(|value| value.trim().parse().expect("a number"))
    }
}

/// A client that trusts `ca` and shows `issued`.
fn client(ca: &Authority, issued: Option<&Issued>) -> ClientConfig {
    client_speaking(ca, issued, rustls::ALL_VERSIONS)
}

fn client_speaking(
    ca: &Authority,
    issued: Option<&Issued>,
    versions: &[&'static SupportedProtocolVersion],
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .unwrap();
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let builder = builder.with_webpki_verifier(verifier);
    match issued {
        None => builder.with_no_client_auth(),
        Some(issued) => {
            let chain = CertificateDer::pem_slice_iter(issued.chain.as_bytes()).map(|c| c.unwrap());
            let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain.collect(), key).unwrap()
        }
    }
}

/// A connection, as its two ends see it once each has read a byte of the other.
struct Stands {
    server: Accepted<DuplexStream>,
    client: tokio_rustls::client::TlsStream<DuplexStream>,
}

impl Stands {
    /// Sends a byte each way.
    async fn talk(&mut self) {
        let mut byte = [0];
        self.client.write_all(b"c").await.unwrap();
        self.client.flush().await.unwrap();
        self.server.stream.read_exact(&mut byte).await.unwrap();
        self.server.stream.write_all(b"s").await.unwrap();
        self.server.stream.flush().await.unwrap();
        self.client.read_exact(&mut byte).await.unwrap();
    }

    /// The certificate that the server showed.
    fn shown(&self) -> CertificateDer<'static> {
        self.client.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    }

    fn resumed(&self) -> bool {
        self.server.stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed)
    }
}

/// Connects; the error is what the server gives as reason, or the client's after `client: `.
async fn connect(server: &Server, client: &Arc<ClientConfig>) -> Result<Stands, String> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let name = ServerName::try_from("localhost").unwrap();
    let dialled = TlsConnector::from(client.clone()).connect(name, near);
    let (accepted, dialled) = tokio::join!(server.accept(far), dialled);
    match (accepted, dialled) {
        (Ok(server), Ok(client)) => {
            let mut stands = Stands { server, client };
            stands.talk().await;
            Ok(stands)
        }
        (Err(refused), _) => Err(refused.reason()),
        (Ok(_), Err(error)) => Err(format!("client: {}", reason(&error))),
    }
}

async fn outcome(server: &Server, client: ClientConfig) -> Result<(), String> {
    connect(server, &Arc::new(client)).await.map(|_| ())
}

/// Asks until `done` says that the files have been looked at.
async fn until<T, F: Future<Output = Option<T>>>(mut done: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(done) = done().await {
            return done;
        }
        assert!(Instant::now() < deadline, "it does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn assert_refused(outcome: Result<(), String>, with: &str) {
    let error = outcome.expect_err("it is refused");
    assert!(error.contains(with), "{error:?} does not say {with:?}");
}

#[tokio::test]
async fn without_demands_anybody_is_served() {
    let rig = Rig::new();
    let server = rig.server();
    assert!(!server.demands_certificates() && !server.names_users());
    let stands = connect(&server, &Arc::new(client(&rig.ca, None))).await.unwrap();
    assert_eq!(stands.server.leaf, None);
    let other = Authority::new("another root");
    assert_refused(outcome(&server, client(&other, None)).await, "UnknownCA");
    assert_eq!(
        rig.shown("quorate_tls_handshakes_total{result=\"done\",side=\"client\"}"),
        Some(1.0)
    );
    assert_eq!(
        rig.shown("quorate_tls_handshakes_total{result=\"failed\",side=\"client\"}"),
        Some(1.0)
    );
}

#[tokio::test]
async fn certificates_of_clients_are_verified() {
    let rig = Rig::demanding();
    let server = rig.server();
    assert!(server.demands_certificates() && server.names_users());
    let issue = |leaf: &Leaf| rig.ca.issue(leaf);

    let user = issue(&Leaf::client("alice"));
    let stands = connect(&server, &Arc::new(client(&rig.ca, Some(&user)))).await.unwrap();
    assert_eq!(common_name(&stands.server.leaf.unwrap()).as_deref(), Some("alice"));
    let middle = rig.ca.intermediate("between");
    let below = middle.issue(&Leaf::client("bob"));
    assert_eq!(outcome(&server, client(&rig.ca, Some(&below))).await, Ok(()));

    assert_refused(outcome(&server, client(&rig.ca, None)).await, "peer sent no certificates");
    let stranger = Authority::new("another root").issue(&Leaf::client("alice"));
    assert_refused(outcome(&server, client(&rig.ca, Some(&stranger))).await, "UnknownIssuer");
    let expired = issue(&Leaf::client("alice").expired());
    assert_refused(outcome(&server, client(&rig.ca, Some(&expired))).await, "expired");
    let usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let of_server = issue(&Leaf { usages, ..Leaf::client("alice") });
    assert_refused(
        outcome(&server, client(&rig.ca, Some(&of_server))).await,
        "client authentication",
    );
}

#[tokio::test]
async fn authorities_alone_demand_certificates_but_name_no_users() {
    let mut rig = Rig::demanding();
    rig.config.client_tls.client_cert_auth = false;
    let server = rig.server();
    assert!(server.demands_certificates() && !server.names_users());
    assert_refused(outcome(&server, client(&rig.ca, None)).await, "peer sent no certificates");
}

#[tokio::test]
async fn a_self_signed_certificate_among_the_trusted_is_accepted() {
    let mut rig = Rig::demanding();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "itself");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let itself = Issued {
        chain: params.self_signed(&key).unwrap().pem(),
        key: key.serialize_pem(),
        serial: Vec::new(),
    };
    assert_refused(outcome(&rig.server(), client(&rig.ca, Some(&itself))).await, "invalid peer");
    replace(&rig.path("both.crt"), format!("{}{}", rig.ca.pem, itself.chain).as_bytes());
    rig.config.client_tls.trusted_ca_file = rig.path("both.crt");
    assert_eq!(outcome(&rig.server(), client(&rig.ca, Some(&itself))).await, Ok(()));
}

#[tokio::test]
async fn allowed_names_are_asked_of_the_leaf() {
    const REFUSED: &str = "client certificate authentication failed";
    let mut rig = Rig::demanding();
    let [alice, bob] = ["alice", "bob"].map(|name| rig.ca.issue(&Leaf::client(name)));
    let nobody = rig.ca.issue(&Leaf { common_name: None, ..Leaf::client("") });
    rig.config.client_tls.allowed_cn = vec!["carol".to_owned(), "alice".to_owned()];
    let server = rig.server();
    assert_eq!(outcome(&server, client(&rig.ca, Some(&alice))).await, Ok(()));
    for other in [&bob, &nobody] {
        assert_eq!(outcome(&server, client(&rig.ca, Some(other))).await, Err(REFUSED.to_owned()));
    }

    rig.config.client_tls.allowed_cn.clear();
    rig.config.client_tls.allowed_hostname =
        ["db.example.com", "10.0.0.7", "*.literal.example"].map(str::to_owned).to_vec();
    let server = rig.server();
    let with = |dns: &[&str], ips: &[&str]| {
        let leaf = Leaf::named("db.example.com").with_names(dns, ips);
        client(&rig.ca, Some(&rig.ca.issue(&leaf)))
    };
    let allowed: [(&[&str], &[&str]); 4] = [
        (&["DB.example.com"], &[]),
        (&["*.example.com"], &[]),
        (&["other"], &["10.0.0.7"]),
        (&["*.literal.example"], &[]),
    ];
    for (dns, ips) in allowed {
        assert_eq!(outcome(&server, with(dns, ips)).await, Ok(()), "{dns:?} {ips:?}");
    }
    // A common name is no host name.
    let refused: [(&[&str], &[&str]); 3] =
        [(&[], &["10.0.0.8"]), (&["*.com", "db.example.com.evil"], &[]), (&[], &[])];
    for (dns, ips) in refused {
        assert_eq!(
            outcome(&server, with(dns, ips)).await,
            Err(REFUSED.to_owned()),
            "{dns:?} {ips:?}"
        );
    }
}

#[test]
fn what_contradicts_itself_is_refused_at_the_start() {
    let mut rig = Rig::demanding();
    rig.config.client_tls.allowed_cn = vec!["a".to_owned(), "b".to_owned()];
    rig.config.client_tls.allowed_hostname = vec!["h".to_owned()];
    assert_eq!(
        rig.refusal(),
        "AllowedCNs and AllowedHostnames are mutually exclusive (cns=[\"a\" \"b\"], \
         hostnames=[\"h\"])"
    );
    let mut rig = Rig::new();
    rig.config.client_tls.cert_file = PathBuf::new();
    rig.config.client_tls.key_file = "k".into();
    assert_eq!(rig.refusal(), "KeyFile and CertFile must both be present[key: k, cert: ]");
    let mut rig = Rig::new();
    rig.config.client_tls.client_cert_file = "c".into();
    assert_eq!(
        rig.refusal(),
        "ClientKeyFile and ClientCertFile must both be present or both absent: key: , cert: c]"
    );
    let mut rig = Rig::new();
    rig.config.tls.cipher_suites = vec!["TLS_NONE".to_owned()];
    assert_eq!(rig.refusal(), "unexpected TLS cipher suite \"TLS_NONE\"");
    let mut rig = Rig::new();
    (rig.config.client_tls.cert_file, rig.config.client_tls.key_file) = Default::default();
    assert!(Server::for_clients(&rig.config, rig.metrics).unwrap().is_none());
}

#[test]
fn files_are_read_at_the_start_and_named() {
    let cases: [(&str, fn(&mut config::Tls, PathBuf), &str, &str); 7] = [
        ("--cert-file", |tls, path| tls.cert_file = path, "", "no certificate in the file"),
        ("--cert-file", |tls, path| tls.key_file = path, "", "no unencrypted private key"),
        ("--trusted-ca-file", |tls, path| tls.trusted_ca_file = path, "x", "no certificate"),
        ("--client-crl-file", |tls, path| tls.crl_file = path, "x", "not a certificate rev"),
        (
            "--client-crl-file",
            |tls, path| tls.crl_file = path,
            "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
            "no revocation list",
        ),
        (
            "--trusted-ca-file",
            |tls, path| tls.trusted_ca_file = path,
            "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
            "certificate 1 of the file",
        ),
        (
            "--client-cert-file",
            |tls, path| (tls.client_cert_file, tls.client_key_file) = (path.clone(), path),
            "x",
            "no certificate in the file",
        ),
    ];
    for (flag, set, text, why) in cases {
        let mut rig = Rig::new();
        let path = rig.path("bad");
        set(&mut rig.config.client_tls, path.clone());
        assert!(rig.refusal().contains("No such file"), "{}", rig.refusal());
        replace(&path, text.as_bytes());
        let refusal = rig.refusal();
        assert!(refusal.starts_with(&format!("{flag} ")), "{refusal}");
        assert!(refusal.contains(why), "{refusal}");
    }
    // Another's key.
    let mut rig = Rig::new();
    let other = rig.ca.issue(&Leaf::named("other")).write(rig.dir.path(), "other");
    rig.config.client_tls.key_file = other.key;
    assert!(rig.refusal().ends_with("private key does not match the certificate"));
}

/// The key in a PKCS#8 file as the older form that its algorithm has.
fn older_form(pkcs8: &[u8], label: &str) -> String {
    let (_, parsed) = x509_parser::der_parser::parse_der(pkcs8).unwrap();
    let inner = parsed.as_sequence().unwrap()[2].as_slice().unwrap();
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(inner);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

#[tokio::test]
async fn keys_may_have_any_of_their_forms() {
    for (algorithm, label) in
        [(&PKCS_ECDSA_P256_SHA256, "EC PRIVATE KEY"), (&PKCS_RSA_SHA256, "RSA PRIVATE KEY")]
    {
        let rig = Rig::new();
        let issued = rig.ca.issue(&Leaf { algorithm, ..Leaf::named("member") });
        let pkcs8 = PrivatePkcs8KeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
        let older = Issued { key: older_form(pkcs8.secret_pkcs8_der(), label), ..issued.clone() };
        for issued in [&issued, &older] {
            issued.write(rig.dir.path(), "member");
            assert_eq!(outcome(&rig.server(), client(&rig.ca, None)).await, Ok(()), "{label}");
        }
    }
}

/// A DER list as PEM.
fn crl_pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN X509 CRL-----\n{text}\n-----END X509 CRL-----\n")
}

#[tokio::test]
async fn revoked_certificates_are_refused_wherever_they_stand() {
    let mut rig = Rig::demanding();
    let [alice, bob] = ["alice", "bob"].map(|name| rig.ca.issue(&Leaf::client(name)));
    let middle = rig.ca.intermediate("between");
    let below = middle.issue(&Leaf::client("carol"));
    let middle_der = CertificateDer::from_pem_slice(middle.pem.as_bytes()).unwrap();
    let middle_serial = X509Certificate::from_der(&middle_der).unwrap().1.raw_serial().to_vec();
    let hex = |serial: &[u8]| {
        let all: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
        all.trim_start_matches('0').to_owned()
    };

    rig.revoke(&rig.ca.revoke(&[&bob]));
    let server = rig.server();
    let text = format!("transport: certificate serial {} revoked", hex(&bob.serial));
    assert_eq!(outcome(&server, client(&rig.ca, Some(&alice))).await, Ok(()));
    assert_eq!(outcome(&server, client(&rig.ca, Some(&below))).await, Ok(()));
    assert_eq!(outcome(&server, client(&rig.ca, Some(&bob))).await, Err(text.clone()));

    // The list of another issuer counts as well: the operator vouches for the file.
    rig.revoke(&Authority::new("another root").revoke(&[&bob]));
    assert_eq!(outcome(&rig.server(), client(&rig.ca, Some(&bob))).await, Err(text));

    // One that vouches for the leaf and is sent along with it.
    let taken = Issued { serial: middle_serial.clone(), ..bob.clone() };
    rig.revoke(crl_pem(&rig.ca.revoke(&[&taken])).as_bytes());
    let server = rig.server();
    assert_eq!(outcome(&server, client(&rig.ca, Some(&bob))).await, Ok(()));
    assert_eq!(
        outcome(&server, client(&rig.ca, Some(&below))).await,
        Err(format!("transport: certificate serial {} revoked", hex(&middle_serial)))
    );

    // One that is trusted itself, and therefore need not be sent.
    let alone = Issued {
        chain: below
            .chain
            .split_inclusive("-----END CERTIFICATE-----\n")
            .next()
            .unwrap()
            .to_owned(),
        ..below
    };
    replace(&rig.path("both.crt"), format!("{}{}", rig.ca.pem, middle.pem).as_bytes());
    rig.config.client_tls.trusted_ca_file = rig.path("both.crt");
    assert_refused(outcome(&rig.server(), client(&rig.ca, Some(&alone))).await, "UnknownIssuer");
    rig.revoke(&rig.ca.revoke(&[]));
    assert_eq!(outcome(&rig.server(), client(&rig.ca, Some(&alone))).await, Ok(()));
}

#[tokio::test]
async fn the_revocation_list_is_read_again_and_nobody_passes_without_it() {
    let mut rig = Rig::demanding();
    let [alice, bob] = ["alice", "bob"].map(|name| rig.ca.issue(&Leaf::client(name)));
    rig.revoke(&rig.ca.revoke(&[]));
    let server = rig.server();
    let alice_now = async || outcome(&server, client(&rig.ca, Some(&alice))).await;
    assert_eq!(alice_now().await, Ok(()));
    let path = rig.path("crl");

    replace(&path, &rig.ca.revoke(&[&alice]));
    let error = until(async || alice_now().await.err()).await;
    assert!(error.starts_with("transport: certificate serial "), "{error}");
    // What is no list changes nothing.
    replace(&path, b"half a li");
    let failed =
        "quorate_tls_reloads_total{file=\"revocation list\",result=\"failed\",side=\"client\"}";
    until(async || {
        assert!(alice_now().await.unwrap_err().ends_with(" revoked"));
        assert_eq!(outcome(&server, client(&rig.ca, Some(&bob))).await, Ok(()));
        rig.shown(failed).filter(|count| *count == 1.0)
    })
    .await;
    // Without the file, nobody.
    std::fs::remove_file(&path).unwrap();
    let bob_now = async || outcome(&server, client(&rig.ca, Some(&bob))).await;
    let error = until(async || bob_now().await.err()).await;
    assert!(error.contains("crl: No such file"), "{error}");
    replace(&path, &rig.ca.revoke(&[&alice]));
    until(async || bob_now().await.ok()).await;
    assert!(alice_now().await.is_err());
}

#[tokio::test]
async fn nobody_passes_once_the_only_authority_is_revoked() {
    let mut rig = Rig::demanding();
    let middle = rig.ca.intermediate("between");
    let carol = middle.issue(&Leaf::client("carol"));
    let middle_der = CertificateDer::from_pem_slice(middle.pem.as_bytes()).unwrap();
    let serial = X509Certificate::from_der(&middle_der).unwrap().1.raw_serial().to_vec();
    // Only the leaf is sent, so that the authority is nowhere but among the trusted.
    let leaf = carol.chain.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap();
    let carol = Issued { chain: leaf.to_owned(), ..carol };
    replace(&rig.path("middle.crt"), middle.pem.as_bytes());
    rig.config.client_tls.trusted_ca_file = rig.path("middle.crt");
    rig.revoke(&rig.ca.revoke(&[]));
    let server = rig.server();
    let carol_now = async || outcome(&server, client(&rig.ca, Some(&carol))).await;
    assert_eq!(carol_now().await, Ok(()));
    let taken = Issued { serial, ..carol.clone() };
    let revoked = rig.ca.revoke(&[&taken]);
    replace(&rig.path("crl"), &revoked);
    let error = until(async || carol_now().await.err()).await;
    assert!(error.contains("UnknownIssuer"), "{error}");
    replace(&rig.path("crl"), &rig.ca.revoke(&[]));
    until(async || carol_now().await.ok()).await;
    // From the start on, too.
    rig.revoke(&revoked);
    assert_refused(outcome(&rig.server(), client(&rig.ca, Some(&carol))).await, "UnknownIssuer");
}

#[tokio::test]
async fn sessions_are_resumed_but_not_past_what_changed() {
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut rig = Rig::demanding();
        let alice = rig.ca.issue(&Leaf::client("alice"));
        rig.revoke(&rig.ca.revoke(&[]));
        let server = rig.server();
        let client = Arc::new(client_speaking(&rig.ca, Some(&alice), &[version]));
        let first = connect(&server, &client).await.unwrap();
        assert!(!first.resumed());
        let again = connect(&server, &client).await.unwrap();
        assert!(again.resumed(), "{version:?}");
        let leaf = again.server.leaf.expect("a resumed session has its certificate");
        assert_eq!(common_name(&leaf).as_deref(), Some("alice"));
        replace(&rig.path("crl"), &rig.ca.revoke(&[&alice]));
        let error = until(async || connect(&server, &client).await.err()).await;
        assert!(error.ends_with(" revoked"), "{error}");
    }
}

#[tokio::test]
async fn a_resumed_session_is_judged_as_a_new_one() {
    let rig = Rig::demanding();
    let (alice, expired) =
        (rig.ca.issue(&Leaf::client("alice")), rig.ca.issue(&Leaf::client("bob").expired()));
    let chain = |issued: &Issued| -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(issued.chain.as_bytes()).map(|c| c.unwrap()).collect()
    };
    let roots = Arc::new(Roots::parse(rig.ca.pem.as_bytes()).unwrap());
    let provider = Arc::new(aws_lc_rs::default_provider());
    let with = |allowed, revoked: Vec<u8>| {
        let revoked = Some(Arc::new(Revoked::parse(&revoked).unwrap()));
        Clients::new(roots.clone(), allowed, revoked, provider.clone()).unwrap()
    };
    let nobody = rig.ca.revoke(&[]);
    let clients = with(Allowed::Any, nobody.clone());
    assert_eq!(clients.judge(&chain(&alice)), Ok(()));
    assert!(clients.judge(&chain(&expired)).is_err());
    assert!(clients.judge(&[]).is_err());
    let said = |clients: &Clients| {
        clients.judge(&chain(&alice)).map_err(|error| verify::reason(&error)).unwrap_err()
    };
    assert!(said(&with(Allowed::Any, rig.ca.revoke(&[&alice]))).ends_with(" revoked"));
    let only_bob = Allowed::CommonNames(vec!["bob".to_owned()]);
    assert_eq!(said(&with(only_bob, nobody)), "client certificate authentication failed");
}

#[tokio::test]
async fn certificate_and_key_are_replaced_while_connections_stand() {
    let rig = Rig::new();
    let server = rig.server();
    let client = Arc::new(client(&rig.ca, None));
    let mut first = connect(&server, &client).await.unwrap();
    let expiry = "quorate_tls_certificate_expiry_timestamp_seconds{side=\"client\",use=\"server\"}";
    let before = rig.shown(expiry).unwrap();

    let until_s = 3600;
    let next = rig.ca.issue(&Leaf {
        until: std::time::SystemTime::now() + Duration::from_secs(until_s),
        ..Leaf::named("next")
    });
    // Only half of it at first, then with the old key: neither can be used.
    let (half, _) = next.chain.split_at(next.chain.len() / 2);
    let failed =
        "quorate_tls_reloads_total{file=\"certificate\",result=\"failed\",side=\"client\"}";
    for (text, times) in [(half, 1.0), (&next.chain, 2.0)] {
        replace(&rig.path("member.crt"), text.as_bytes());
        until(async || {
            let stands = connect(&server, &client).await.expect("the old one serves");
            assert_eq!(stands.shown(), first.shown());
            rig.shown(failed).filter(|count| *count == times)
        })
        .await;
    }
    replace(&rig.path("member.key"), next.key.as_bytes());
    let shown = until(async || {
        let stands = connect(&server, &client).await.expect("one of them serves");
        Some(stands.shown()).filter(|shown| *shown != first.shown())
    })
    .await;
    assert_eq!(common_name(&shown).as_deref(), Some("next"));
    assert_eq!(rig.shown(failed), Some(2.0), "each is told once");
    let done = "quorate_tls_reloads_total{file=\"certificate\",result=\"done\",side=\"client\"}";
    assert_eq!(rig.shown(done), Some(1.0));
    let after = rig.shown(expiry).unwrap();
    assert!(after < before && after > 0.0, "{before} {after}");
    first.talk().await;
}

#[tokio::test]
async fn authorities_are_replaced_while_connections_stand() {
    let rig = Rig::demanding();
    let server = rig.server();
    let new = Authority::new("the next root");
    let [old_user, new_user] = [&rig.ca, &new].map(|ca| ca.issue(&Leaf::client("alice")));
    let [old_user, new_user] = [old_user, new_user].map(|u| Arc::new(client(&rig.ca, Some(&u))));
    let mut first = connect(&server, &old_user).await.unwrap();
    assert!(connect(&server, &new_user).await.is_err());
    replace(&rig.path("ca.crt"), format!("{}{}", rig.ca.pem, new.pem).as_bytes());
    until(async || connect(&server, &new_user).await.ok()).await;
    assert!(connect(&server, &old_user).await.is_ok());
    replace(&rig.path("ca.crt"), new.pem.as_bytes());
    let error = until(async || connect(&server, &old_user).await.err()).await;
    assert!(error.contains("UnknownIssuer"), "{error}");
    assert!(connect(&server, &new_user).await.is_ok());
    // A bundle that cannot be read changes nothing.
    std::fs::remove_file(rig.path("ca.crt")).unwrap();
    let failed =
        "quorate_tls_reloads_total{file=\"authorities\",result=\"failed\",side=\"client\"}";
    until(async || {
        assert!(connect(&server, &new_user).await.is_ok());
        rig.shown(failed).filter(|count| *count == 1.0)
    })
    .await;
    first.talk().await;
}

#[tokio::test]
async fn a_protocol_is_agreed_on_and_none_is_accepted() {
    let rig = Rig::new();
    let server = rig.server();
    let offering = |protocols: &[&str]| {
        let mut client = client(&rig.ca, None);
        client.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        Arc::new(client)
    };
    let cases: [(&[&str], Option<&str>); 4] = [
        (&[], None),
        (&["h2"], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&["http/1.1", "h2"], Some("h2")),
    ];
    for (offered, agreed) in cases {
        let stands = connect(&server, &offering(offered)).await.unwrap();
        let protocol = stands.server.stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        assert_eq!(protocol, agreed.map(|agreed| agreed.as_bytes().to_vec()), "{offered:?}");
    }
    let refused = connect(&server, &offering(&["spdy/3"])).await.err().unwrap();
    assert!(refused.contains("doesn't support any known protocol"), "{refused}");
}

#[tokio::test]
async fn versions_and_suites_are_bounded() {
    let mut rig = Rig::new();
    let name = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305";
    rig.config.tls.cipher_suites = vec![name.to_owned()];
    rig.config.tls.max_version = "TLS1.2".to_owned();
    let server = rig.server();
    let stands = connect(&server, &Arc::new(client(&rig.ca, None))).await.unwrap();
    let (_, connection) = stands.server.stream.get_ref();
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_2));
    assert_eq!(
        connection.negotiated_cipher_suite().map(|suite| suite.suite()),
        Some(CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256)
    );
    let only_13 = client_speaking(&rig.ca, None, &[&rustls::version::TLS13]);
    assert_refused(outcome(&server, only_13).await, "peer is incompatible");
    rig.config.tls.max_version.clear();
    rig.config.tls.cipher_suites.clear();
    rig.config.tls.min_version = "TLS1.3".to_owned();
    let only_12 = client_speaking(&rig.ca, None, &[&rustls::version::TLS12]);
    assert_refused(outcome(&rig.server(), only_12).await, "peer is incompatible");
}

/// Connects two members; the error is the first reason of either side.
async fn dial(from: &Client, to: &Server, name: &str) -> Result<(), String> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let (accepted, dialled) = tokio::join!(to.accept(far), from.connect(name, near));
    let mut dialled = dialled.map_err(|error| reason(&error))?;
    let mut accepted = accepted.map_err(|refused| refused.reason())?;
    let mut byte = [0];
    dialled.write_all(b"x").await.unwrap();
    dialled.flush().await.unwrap();
    accepted.stream.read_exact(&mut byte).await.map(|_| ()).map_err(|error| error.to_string())
}

fn peers(rig: &Rig) -> (Client, Server) {
    let client = Client::for_peers(&rig.config, rig.metrics).unwrap();
    (client, Server::for_peers(&rig.config, rig.metrics).unwrap().unwrap())
}

#[tokio::test]
async fn members_verify_each_other() {
    let mut rig = Rig::demanding();
    let (client, server) = peers(&rig);
    assert_eq!(dial(&client, &server, "localhost").await, Ok(()));
    assert_eq!(dial(&client, &server, "127.0.0.1").await, Ok(()));
    assert_refused(dial(&client, &server, "elsewhere").await, "not valid for");

    // The allowed names hold for both directions.
    rig.config.peer_tls.allowed_cn = vec!["member".to_owned()];
    let (client, server) = peers(&rig);
    assert_eq!(dial(&client, &server, "localhost").await, Ok(()));
    rig.config.peer_tls.allowed_cn = vec!["somebody".to_owned()];
    let (strict, _) = peers(&rig);
    assert_refused(
        dial(&strict, &server, "localhost").await,
        "client certificate authentication failed",
    );

    // Another authority's member neither trusts nor is trusted.
    let (stranger, elsewhere) = peers(&Rig::demanding());
    assert_refused(dial(&stranger, &server, "localhost").await, "UnknownIssuer");
    assert_refused(dial(&client, &elsewhere, "localhost").await, "UnknownIssuer");
}

#[tokio::test]
async fn a_dialler_shows_its_own_certificate_if_it_has_one_and_reloads_it() {
    let mut rig = Rig::demanding();
    let usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let files = rig.ca.issue(&Leaf { usages, ..Leaf::named("server") });
    files.write(rig.dir.path(), "member");
    let (client, server) = peers(&rig);
    assert!(dial(&client, &server, "localhost").await.is_err(), "it is for servers only");
    let own = rig.ca.issue(&Leaf::client("dialler")).write(rig.dir.path(), "dialler");
    (rig.config.peer_tls.client_cert_file, rig.config.peer_tls.client_key_file) =
        (own.cert, own.key);
    let (client, server) = peers(&rig);
    assert_eq!(dial(&client, &server, "localhost").await, Ok(()));
    let stranger = Authority::new("another root").issue(&Leaf::client("stranger"));
    stranger.write(rig.dir.path(), "dialler");
    until(async || dial(&client, &server, "localhost").await.err()).await;
    rig.ca.issue(&Leaf::client("dialler")).write(rig.dir.path(), "dialler");
    until(async || dial(&client, &server, "localhost").await.ok()).await;
}

#[tokio::test]
async fn a_member_makes_its_own_certificate_and_keeps_it() {
    let mut rig = Rig::new();
    for tls in [&mut rig.config.client_tls, &mut rig.config.peer_tls] {
        *tls = config::Tls { auto: true, ..config::Tls::default() };
    }
    rig.config.listen.client_urls = vec![
        Url::parse("https://127.0.0.1:2379").unwrap(),
        Url::parse("https://localhost:2379").unwrap(),
    ];
    rig.config.tls.self_signed_validity_years = 0;
    assert_eq!(rig.refusal(), "selfSignedCertValidity is invalid,it should be greater than 0");
    rig.config.tls.self_signed_validity_years = 2;
    let server = rig.server();
    let dir = rig.config.member.data_dir.join("fixtures/client");
    let pem = std::fs::read_to_string(dir.join("cert.pem")).unwrap();
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("key.pem"), 0o600);
    assert_eq!(mode("") & 0o077, 0);

    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let (_, made) = X509Certificate::from_der(&der).unwrap();
    assert_eq!(made.subject().to_string(), "O=etcd");
    assert_eq!(made.issuer(), made.subject());
    assert!(made.is_ca());
    let lasts = made.validity().not_after.timestamp() - made.validity().not_before.timestamp();
    assert_eq!(lasts, 2 * 365 * 24 * 3600);
    let usage = made.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && usage.key_encipherment() && usage.crl_sign());
    assert!(!usage.key_cert_sign());
    let extended = made.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && !extended.client_auth);
    assert_eq!(made.public_key().parsed().unwrap().key_size(), 521 + 7, "P-521, in whole bytes");
    assert!(made.raw_serial().len() <= 17);
    let sans = crate::transport::san::Sans::of(&der).unwrap();
    assert_eq!(sans.dns, ["localhost"]);
    assert_eq!(sans.ips, [std::net::IpAddr::from([127, 0, 0, 1])]);

    // One who trusts it connects; the next start keeps it, as does one that has certificates given.
    let roots = Arc::new(Roots::parse(pem.as_bytes()).unwrap());
    let provider = Arc::new(aws_lc_rs::default_provider());
    let trusting = Servers::new(roots, true, Allowed::Any, provider.clone()).unwrap();
    let trusting = Arc::new(
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(trusting))
            .with_no_client_auth(),
    );
    for server in [&server, &rig.server()] {
        assert_eq!(connect(server, &trusting).await.unwrap().shown(), der);
    }
    assert_eq!(std::fs::read_to_string(dir.join("cert.pem")).unwrap(), pem);

    // Members with such certificates take each other's unseen.
    let (from, _) = peers(&rig);
    let mut other = Rig::new();
    other.config.peer_tls = config::Tls { auto: true, ..config::Tls::default() };
    let (_, to) = peers(&other);
    assert_eq!(dial(&from, &to, "anything").await, Ok(()));
}
