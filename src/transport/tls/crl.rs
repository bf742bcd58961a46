//! Certificates that were revoked, by their serial numbers.
//!
//! As in etcd (operations 5.1), a list is not asked who issued it: the operator vouches for the file.
//! A serial on it is refused whoever issued the certificate, and in whatever place of the presented
//! chain that stands.

use rustc_hash::FxHashSet;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

/// Serial numbers that are refused.
#[derive(Default, Debug)]
pub struct Revoked {
    lists: Vec<List>,
    /// Why the list cannot be read: then nobody can be found not to be on it.
    unreadable: Option<String>,
}

/// One issuer's list.
#[derive(Debug)]
struct List {
    /// The issuer's name, as DER has it.
    issuer: Box<[u8]>,
    serials: FxHashSet<Box<[u8]>>,
}

/// Why a certificate is refused on the word of a revocation list.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum CrlError {
    #[error("transport: certificate serial {0} revoked")]
    Revoked(String),
    #[error("{0}")]
    Unreadable(String),
    #[error("a presented certificate cannot be read")]
    Certificate,
}

impl Revoked {
    /// Reads lists in PEM, or one in DER.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut revoked = Revoked::default();
        if !is_pem(bytes) {
            revoked.add(bytes)?;
            return Ok(revoked);
        }
        let mut lists = 0;
        for list in CertificateRevocationListDer::pem_slice_iter(bytes) {
            revoked.add(&list.map_err(|error| error.to_string())?)?;
            lists += 1;
        }
        if lists == 0 {
            return Err("no revocation list in it (PEM block X509 CRL)".to_owned());
        }
        Ok(revoked)
    }

    /// A list that nobody passes.
    pub fn unreadable(why: String) -> Self {
        Revoked { unreadable: Some(why), ..Revoked::default() }
    }

    fn add(&mut self, der: &[u8]) -> Result<(), String> {
        let (rest, list) = CertificateRevocationList::from_der(der)
            .map_err(|error| format!("not a certificate revocation list: {error}"))?;
        if !rest.is_empty() {
            return Err(format!("{} bytes follow the revocation list", rest.len()));
        }
        let serials =
            list.iter_revoked_certificates().map(|entry| plain(entry.raw_serial()).into());
        let serials = serials.collect();
        self.lists.push(List { issuer: list.issuer().as_raw().into(), serials });
        Ok(())
    }

    /// Checks every certificate of a presented chain.
    ///
    /// # Errors
    /// The first that is revoked, or that the list cannot be read.
    pub fn check<'a>(
        &self,
        chain: impl IntoIterator<Item = &'a CertificateDer<'a>>,
    ) -> Result<(), CrlError> {
        if let Some(why) = &self.unreadable {
            return Err(CrlError::Unreadable(why.clone()));
        }
        for certificate in chain {
            let (_, parsed) =
                X509Certificate::from_der(certificate).map_err(|_| CrlError::Certificate)?;
            self.check_serial(parsed.raw_serial())?;
        }
        Ok(())
    }

    fn check_serial(&self, serial: &[u8]) -> Result<(), CrlError> {
        let serial = plain(serial);
        if self.lists.iter().any(|list| list.serials.contains(serial)) {
            return Err(CrlError::Revoked(hex(serial)));
        }
        Ok(())
    }

    /// Whether the issuer of a certificate has revoked it. For those that nobody presents: they are
    /// there whoever connects, so a number that two issuers have given must not count.
    pub fn holds(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
        let serial = plain(parsed.raw_serial());
        self.lists
            .iter()
            .any(|list| *list.issuer == *parsed.issuer().as_raw() && list.serials.contains(serial))
    }
}

/// A number without the zeros that DER, or a sloppy encoder, begins it with.
fn plain(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|byte| **byte == 0).count();
    &serial[zeros..]
}

/// As Go prints a number with `%x`.
fn hex(serial: &[u8]) -> String {
    let all: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
    match all.trim_start_matches('0') {
        "" => "0".to_owned(),
        digits => digits.to_owned(),
    }
}

/// Whether a file is text with PEM blocks, perhaps after a comment.
fn is_pem(bytes: &[u8]) -> bool {
    bytes.windows(11).any(|window| window == b"-----BEGIN ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_written_as_go_writes_them() {
        assert_eq!(hex(&[0x0a, 0xbc]), "abc");
        assert_eq!(hex(plain(&[0, 0x8a, 0xbc])), "8abc");
        assert_eq!(hex(plain(&[0])), "0");
    }

    #[test]
    fn what_is_no_list_is_refused_by_name() {
        let error = Revoked::parse(b"hello").unwrap_err();
        assert!(error.starts_with("not a certificate revocation list"), "{error}");
        let error =
            Revoked::parse(b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n");
        assert!(error.unwrap_err().contains("no revocation list in it"));
        assert!(Revoked::parse(b"").is_err());
    }
}
