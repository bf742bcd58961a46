//! Cipher suites and protocol versions, by the names that Go has for them.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{SupportedCipherSuite, SupportedProtocolVersion};

use super::TlsError;
use crate::config::TlsPolicy;

/// Suites that can be chosen. Those of TLS 1.3 cannot, and are always there.
const SUITES: [(&str, SupportedCipherSuite); 8] = {
    use aws_lc_rs::cipher_suite::*;
    [
        ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
        ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
        ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
        ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
        (
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
            TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        ),
        (
            "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
            TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        ),
        ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305", TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
        ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ]
};

/// Suites that etcd can be told to use and that are not there: they have no forward secrecy, no
/// authenticated encryption, or a broken cipher.
const REFUSED: [&str; 14] = [
    "TLS_RSA_WITH_RC4_128_SHA",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_RC4_128_SHA",
    "TLS_ECDHE_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
];

/// As the last, both with SHA-256 as MAC.
const REFUSED_SHA256: [&str; 2] =
    ["TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256"];

/// The names that can be chosen.
pub fn names() -> impl Iterator<Item = &'static str> {
    SUITES.iter().map(|(name, _)| *name)
}

/// The cryptography that `policy` leaves.
///
/// # Errors
/// A suite that nobody knows, or that is not there.
pub(super) fn provider(policy: &TlsPolicy) -> Result<Arc<CryptoProvider>, TlsError> {
    let mut provider = aws_lc_rs::default_provider();
    if policy.cipher_suites.is_empty() {
        return Ok(Arc::new(provider));
    }
    let mut chosen: Vec<SupportedCipherSuite> = Vec::new();
    for name in &policy.cipher_suites {
        match SUITES.iter().find(|(known, _)| known == name) {
            Some((_, suite)) if chosen.contains(suite) => {}
            Some((_, suite)) => chosen.push(*suite),
            None if REFUSED.iter().chain(&REFUSED_SHA256).any(|known| known == name) => {
                return Err(TlsError::WeakSuite { name: name.clone() });
            }
            None => return Err(TlsError::UnknownSuite(name.clone())),
        }
    }
    provider.cipher_suites.retain(|suite| suite.tls13().is_some());
    provider.cipher_suites.extend(chosen);
    Ok(Arc::new(provider))
}

/// The protocol versions that `policy` leaves; its texts have been checked.
pub(super) fn versions(policy: &TlsPolicy) -> &'static [&'static SupportedProtocolVersion] {
    use rustls::version::{TLS12, TLS13};
    static NEW: [&SupportedProtocolVersion; 1] = [&TLS13];
    static OLD: [&SupportedProtocolVersion; 1] = [&TLS12];
    static BOTH: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    match (&*policy.min_version, &*policy.max_version) {
        ("TLS1.3", _) => &NEW,
        (_, "TLS1.2") => &OLD,
        _ => &BOTH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn policy(suites: &[&str]) -> TlsPolicy {
        let mut policy = Config::default().tls;
        policy.cipher_suites = suites.iter().map(|name| (*name).to_owned()).collect();
        policy
    }

    #[test]
    fn chosen_suites_replace_those_of_tls_1_2_in_their_order() {
        let chosen = policy(&[
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
            "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
            "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        ]);
        let provider = provider(&chosen).unwrap();
        let old: Vec<_> =
            provider.cipher_suites.iter().filter(|suite| suite.tls13().is_none()).collect();
        assert_eq!(old.len(), 2);
        assert_eq!(
            old[0].suite(),
            rustls::CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
        );
        assert_eq!(provider.cipher_suites.len() - old.len(), 3, "all of TLS 1.3");
    }

    #[test]
    fn a_suite_that_is_not_there_is_named() {
        let refused = |name: &str| provider(&policy(&[name])).unwrap_err().to_string();
        assert_eq!(refused("TLS_NONE"), "unexpected TLS cipher suite \"TLS_NONE\"");
        assert_eq!(refused("TLS_AES_128_GCM_SHA256"), {
            "unexpected TLS cipher suite \"TLS_AES_128_GCM_SHA256\""
        });
        let weak = refused("TLS_RSA_WITH_RC4_128_SHA");
        assert!(
            weak.starts_with("TLS cipher suite \"TLS_RSA_WITH_RC4_128_SHA\" is not supported: "),
            "{weak}"
        );
        assert!(weak.contains("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"), "{weak}");
    }

    #[test]
    fn versions_follow_the_bounds() {
        let bounded = |min: &str, max: &str| {
            let mut policy = policy(&[]);
            (policy.min_version, policy.max_version) = (min.to_owned(), max.to_owned());
            versions(&policy).iter().map(|version| version.version).collect::<Vec<_>>()
        };
        use rustls::ProtocolVersion::{TLSv1_2, TLSv1_3};
        assert_eq!(bounded("TLS1.2", ""), [TLSv1_3, TLSv1_2]);
        assert_eq!(bounded("", ""), [TLSv1_3, TLSv1_2]);
        assert_eq!(bounded("TLS1.2", "TLS1.2"), [TLSv1_2]);
        assert_eq!(bounded("TLS1.3", ""), [TLSv1_3]);
    }
}
