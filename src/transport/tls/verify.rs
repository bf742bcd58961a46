//! Whom a certificate is accepted from: the chain, the allowed names, the revocation list.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Version;

use super::crl::{CrlError, Revoked};
use super::files::Roots;
use crate::transport::san::Sans;

/// Names of which the certificate of the other side must have one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Allowed {
    Any,
    CommonNames(Vec<String>),
    Hostnames(Vec<String>),
}

/// A certificate that has no allowed name. The text is etcd's.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
#[error("client certificate authentication failed")]
pub struct NotAllowed;

impl Allowed {
    fn check(&self, leaf: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let found = match self {
            Allowed::Any => true,
            Allowed::CommonNames(names) => {
                common_name(leaf).is_some_and(|own| names.contains(&own))
            }
            Allowed::Hostnames(names) => {
                let parsed = ParsedCertificate::try_from(leaf)?;
                names.iter().any(|name| is_valid_for(leaf, &parsed, name))
            }
        };
        if found { Ok(()) } else { Err(refused(leaf, NotAllowed)) }
    }
}

/// Whether a certificate may speak for `name`. What is no host name, as one with a wildcard, must
/// stand in the certificate as it is.
fn is_valid_for(leaf: &CertificateDer<'_>, parsed: &ParsedCertificate<'_>, name: &str) -> bool {
    match ServerName::try_from(name) {
        Ok(name) => verify_server_name(parsed, &name).is_ok(),
        Err(_) => Sans::of(leaf)
            .is_ok_and(|sans| sans.dns.iter().any(|own| own.eq_ignore_ascii_case(name))),
    }
}

/// The subject's common name, the last if there are several, as Go reads it. `None` if there is none
/// or it is empty.
pub fn common_name(leaf: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
    let last = parsed.subject().iter_common_name().last()?;
    last.as_str().ok().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// A refusal that rustls has no name for, of a certificate whose chain is good.
#[derive(thiserror::Error, Debug)]
#[error("{why}")]
struct Refusal {
    why: Why,
    leaf: CertificateDer<'static>,
}

#[derive(thiserror::Error, Debug)]
enum Why {
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    #[error(transparent)]
    Crl(#[from] CrlError),
}

fn refused(leaf: &CertificateDer<'_>, why: impl Into<Why>) -> rustls::Error {
    let refusal = Refusal { why: why.into(), leaf: leaf.clone().into_owned() };
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
}

fn refusal(error: &rustls::Error) -> Option<&Refusal> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            inner.downcast_ref()
        }
        _ => None,
    }
}

/// What a handshake failed of; a refusal of our own in its own words.
pub(super) fn reason(error: &rustls::Error) -> String {
    refusal(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The certificate that was refused, if somebody trusted has signed it.
pub(super) fn leaf(error: &rustls::Error) -> Option<&CertificateDer<'static>> {
    refusal(error).map(|refusal| &refusal.leaf)
}

/// Which side of a connection a certificate speaks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Client,
    Server,
}

/// Accepts a certificate that is itself in the file of trusted ones, as Go does and webpki does not if
/// it may also issue others: self-signed certificates are used so.
fn is_trusted_itself(
    roots: &Roots,
    leaf: &CertificateDer<'_>,
    role: Use,
    now: UnixTime,
) -> Result<bool, rustls::Error> {
    if !roots.holds(leaf) {
        return Ok(false);
    }
    let invalid = |error| Err(rustls::Error::InvalidCertificate(error));
    let Ok((_, parsed)) = X509Certificate::from_der(leaf) else {
        return invalid(CertificateError::BadEncoding);
    };
    if parsed.version() != X509Version::V3 {
        return invalid(CertificateError::BadEncoding);
    }
    let now_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now_s < parsed.validity().not_before.timestamp() {
        return invalid(CertificateError::NotValidYet);
    }
    if now_s > parsed.validity().not_after.timestamp() {
        return invalid(CertificateError::Expired);
    }
    let allows = match parsed.extended_key_usage() {
        Ok(None) => true,
        Ok(Some(usage)) => {
            usage.value.any
                || match role {
                    Use::Client => usage.value.client_auth,
                    Use::Server => usage.value.server_auth,
                }
        }
        Err(_) => return invalid(CertificateError::BadEncoding),
    };
    if allows { Ok(true) } else { invalid(CertificateError::InvalidPurpose) }
}

/// Judges the certificates of clients.
pub(super) struct Clients {
    roots: Arc<Roots>,
    /// Of those trusted that are not revoked; of all of them if none is left.
    chain: Arc<dyn ClientCertVerifier>,
    /// All that are trusted are revoked.
    none_left: bool,
    allowed: Allowed,
    revoked: Option<Arc<Revoked>>,
}

impl Clients {
    pub(super) fn new(
        roots: Arc<Roots>,
        allowed: Allowed,
        revoked: Option<Arc<Revoked>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        // A trusted certificate that was revoked vouches for nobody.
        let mut store = match &revoked {
            Some(revoked) => roots.without(revoked),
            None => roots.store.clone(),
        };
        // The library makes no verifier that trusts nobody. An error here would leave the one in place
        // that still trusts them.
        let none_left = store.is_empty() && !roots.store.is_empty();
        if none_left {
            store = roots.store.clone();
            tracing::warn!("all trusted authorities are revoked: no client is let in");
        }
        let chain = WebPkiClientVerifier::builder_with_provider(store, provider)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Clients { roots, chain, none_left, allowed, revoked })
    }

    /// Judges a chain as the handshake does: for a session that is resumed, where the handshake does
    /// not.
    pub(super) fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let Some((leaf, rest)) = chain.split_first() else {
            return Err(rustls::Error::NoCertificatesPresented);
        };
        self.verify_client_cert(leaf, rest, UnixTime::now()).map(|_| ())
    }
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clients").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if !is_trusted_itself(&self.roots, end_entity, Use::Client, now)? {
            if self.none_left {
                let unknown = CertificateError::UnknownIssuer;
                return Err(rustls::Error::InvalidCertificate(unknown));
            }
            self.chain.verify_client_cert(end_entity, intermediates, now)?;
        }
        self.allowed.check(end_entity)?;
        if let Some(list) = &self.revoked {
            list.check(std::iter::once(end_entity).chain(intermediates))
                .map_err(|error| refused(end_entity, error))?;
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Judges the certificates of servers.
pub(super) struct Servers {
    roots: Arc<Roots>,
    /// `None`: nobody's chain and name are looked at, as between members that made their own.
    chain: Option<Arc<WebPkiServerVerifier>>,
    allowed: Allowed,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Servers {
    pub(super) fn new(
        roots: Arc<Roots>,
        verify: bool,
        allowed: Allowed,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let algorithms = provider.signature_verification_algorithms;
        let chain = verify
            .then(|| {
                WebPkiServerVerifier::builder_with_provider(roots.store.clone(), provider).build()
            })
            .transpose()
            .map_err(|error| error.to_string())?;
        Ok(Servers { roots, chain, allowed, algorithms })
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verify = self.chain.is_some();
        let mut shown = f.debug_struct("Servers");
        shown.field("verify", &verify).field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(chain) = &self.chain {
            if is_trusted_itself(&self.roots, end_entity, Use::Server, now)? {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            } else {
                chain.verify_server_cert(
                    end_entity,
                    intermediates,
                    server_name,
                    ocsp_response,
                    now,
                )?;
            }
        }
        self.allowed.check(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
