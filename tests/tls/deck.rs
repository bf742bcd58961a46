//! The files that members and clients of one cluster are given, and the options that name them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;

use crate::pki::{self, Authority, Files, Issued, Leaf};
use crate::rig::cluster::Options;
use crate::rig::secure::{Connector, Secure};

/// An authority, the certificates that it has signed for a cluster, and where they are.
pub struct Deck {
    dir: TempDir,
    pub root: Authority,
    /// Signs for the root: what is sent along has to be used.
    pub signer: Authority,
    pub ca: PathBuf,
    pub member: Files,
    pub user: Issued,
}

impl Deck {
    pub fn new() -> Deck {
        let dir = tempfile::tempdir().unwrap();
        let root = Authority::new("root of the test");
        let signer = root.intermediate("signer of the test");
        let ca = dir.path().join("ca.crt");
        pki::replace(&ca, root.pem.as_bytes());
        let member = signer.issue(&Leaf::named("member")).write(dir.path(), "member");
        let user = signer.issue(&Leaf::client("user"));
        Deck { dir, root, signer, ca, member, user }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes what a client shows, for programs that read it.
    pub fn write(&self, issued: &Issued, name: &str) -> Files {
        issued.write(self.path(), name)
    }

    /// Makes a member serve clients with TLS, those that show a certificate.
    pub fn client_args(&self) -> Vec<String> {
        vec![
            flag("cert-file", &self.member.cert),
            flag("key-file", &self.member.key),
            flag("trusted-ca-file", &self.ca),
            "--client-cert-auth".to_string(),
        ]
    }

    /// Makes a member speak TLS to others, with the certificate in `files`.
    pub fn peer_args(&self, files: &Files) -> Vec<String> {
        vec![
            flag("peer-cert-file", &files.cert),
            flag("peer-key-file", &files.key),
            flag("peer-trusted-ca-file", &self.ca),
            "--peer-client-cert-auth".to_string(),
        ]
    }

    /// How the user comes in.
    pub fn connector(&self) -> Connector {
        let config = client_config(&self.root.pem, Some(&self.user));
        Connector::new(move || config.clone())
    }

    /// A cluster with TLS everywhere.
    pub fn options(&self) -> Options {
        let mut args = self.client_args();
        args.extend(self.peer_args(&self.member));
        let secure = Secure { client: Some(self.connector()), peers: true };
        Options { args, secure: Some(secure), ..Options::brisk() }
    }
}

/// An option with a path.
pub fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

/// What etcdctl is told for it to trust `ca` and to show a certificate.
pub fn shows(ca: &Path, files: &Files) -> Vec<String> {
    vec![flag("cacert", ca), flag("cert", &files.cert), flag("key", &files.key)]
}

/// A client that trusts the authorities in `roots` (PEM) and shows what it was issued.
pub fn client_config(roots: &str, shown: Option<&Issued>) -> Arc<ClientConfig> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store);
    let mut config = match shown {
        Some(issued) => {
            let chain = CertificateDer::pem_slice_iter(issued.chain.as_bytes());
            let chain = chain.collect::<Result<Vec<_>, _>>().unwrap();
            let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}
