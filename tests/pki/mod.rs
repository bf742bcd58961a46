//! Certificates made for tests: authorities, what they sign, and what they take back.

// Several test binaries share this module, and each uses a part of it.
#![allow(dead_code)]

use std::cell::Cell;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, RevokedCertParams, SanType, SerialNumber, SignatureAlgorithm,
};

/// How long before now certificates begin to be valid, and how long after now they are unless a test
/// says otherwise.
const SINCE: Duration = Duration::from_secs(3600);
const VALID: Duration = Duration::from_secs(24 * 3600);

/// Whoever signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub pem: String,
    /// What those who hold certificates of this authority send along: nothing for a root.
    chain: String,
    next_serial: Cell<u64>,
}

/// What a certificate is to say. By default it is good for a server and a client on the loopback device.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub common_name: Option<String>,
    pub dns: Vec<String>,
    pub ips: Vec<IpAddr>,
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// When it began to be valid, and when it no longer is.
    pub from: SystemTime,
    pub until: SystemTime,
    pub algorithm: &'static SignatureAlgorithm,
}

impl Default for Leaf {
    fn default() -> Self {
        let now = SystemTime::now();
        Leaf {
            common_name: None,
            dns: vec!["localhost".to_string()],
            ips: vec![IpAddr::from([127, 0, 0, 1])],
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            from: now - SINCE,
            until: now + VALID,
            algorithm: &PKCS_ECDSA_P256_SHA256,
        }
    }
}

impl Leaf {
    /// The default, of somebody with a name.
    pub fn named(common_name: &str) -> Leaf {
        Leaf { common_name: Some(common_name.to_string()), ..Leaf::default() }
    }

    /// For clients only, without any address, as user certificates are.
    pub fn client(common_name: &str) -> Leaf {
        let usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Leaf { dns: Vec::new(), ips: Vec::new(), usages, ..Leaf::named(common_name) }
    }

    /// [`Leaf::client`] of nobody.
    pub fn nameless() -> Leaf {
        Leaf { common_name: None, ..Leaf::client("") }
    }

    /// With these addresses instead of the loopback device's.
    pub fn with_names(mut self, dns: &[&str], ips: &[&str]) -> Leaf {
        self.dns = dns.iter().map(ToString::to_string).collect();
        self.ips = ips.iter().map(|ip| ip.parse().expect("an address")).collect();
        self
    }

    /// No longer valid.
    pub fn expired(mut self) -> Leaf {
        self.until = SystemTime::now() - Duration::from_secs(60);
        self
    }
}

/// A certificate with its key.
#[derive(Clone)]
pub struct Issued {
    /// The certificate, and behind it those between it and the root.
    pub chain: String,
    pub key: String,
    pub serial: Vec<u8>,
}

/// Where an [`Issued`] was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// A root, which vouches for itself.
    pub fn new(name: &str) -> Authority {
        let params = authority_params(name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority {
            issuer: Issuer::new(params, key),
            pem,
            chain: String::new(),
            next_serial: Cell::new(1),
        }
    }

    /// An authority that this one vouches for.
    pub fn intermediate(&self, name: &str) -> Authority {
        let params = authority_params(name);
        let key = KeyPair::generate().unwrap();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        let chain = format!("{pem}{}", self.chain);
        Authority { issuer: Issuer::new(params, key), pem, chain, next_serial: Cell::new(1) }
    }

    /// Signs a certificate for a new key.
    pub fn issue(&self, leaf: &Leaf) -> Issued {
        let number = self.next_serial.replace(self.next_serial.get() + 1);
        // Told apart from those of other authorities; the first bit is 0, so the number is positive.
        let mut serial = vec![0x51];
        serial.extend(self.pem.as_bytes().iter().rev().skip(40).take(3));
        serial.extend(&number.to_be_bytes()[4..]);
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = leaf.from.into();
        params.not_after = leaf.until.into();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = &leaf.common_name {
            params.distinguished_name.push(DnType::CommonName, name.as_str());
        }
        let dns = leaf.dns.iter().map(|name| SanType::DnsName(name.as_str().try_into().unwrap()));
        let ips = leaf.ips.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names = dns.chain(ips).collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = leaf.usages.clone();
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(leaf.algorithm).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued {
            chain: format!("{}{}", certificate.pem(), self.chain),
            key: key.serialize_pem(),
            serial,
        }
    }

    /// A list that takes back certificates by their serial numbers, as DER.
    pub fn revoke(&self, revoked: &[&Issued]) -> Vec<u8> {
        let now = SystemTime::now();
        let revoked_certs = revoked.iter().map(|issued| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&issued.serial),
            revocation_time: (now - SINCE).into(),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: (now - SINCE).into(),
            next_update: (now + VALID).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = SystemTime::now();
    params.not_before = (now - SINCE).into();
    params.not_after = (now + VALID).into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
    ];
    params
}

impl Issued {
    /// Writes both files as `NAME.crt` and `NAME.key` into `dir`, in the place of any that are there.
    pub fn write(&self, dir: &Path, name: &str) -> Files {
        let files =
            Files { cert: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) };
        // A reader between the two finds a key that fits another certificate, as in any rotation of
        // two files, and has to live with that.
        replace(&files.cert, self.chain.as_bytes());
        replace(&files.key, self.key.as_bytes());
        files
    }
}

/// Writes a file whole, in the place of any that is there: nobody finds half of it.
pub fn replace(path: &Path, bytes: &[u8]) {
    let dir = path.parent().expect("a file is in a directory");
    let mut file = tempfile::NamedTempFile::new_in(dir).unwrap();
    file.write_all(bytes).unwrap();
    file.persist(path).unwrap();
}
