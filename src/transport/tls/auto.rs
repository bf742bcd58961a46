//! Certificates that a member makes for itself (operations 5.3).

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P521_SHA512, SerialNumber,
};
use rustls::crypto::aws_lc_rs;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// The last second that a certificate's dates can say, in Unix time: the end of the year 9999.
const LAST_DATE_S: u64 = 253_402_300_799;

/// Why a member cannot make a certificate for itself.
#[derive(thiserror::Error, Debug)]
pub enum AutoError {
    #[error("selfSignedCertValidity is invalid,it should be greater than 0")]
    NoValidity,
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    #[error("cannot make a certificate: no random numbers")]
    NoRandom,
    #[error("cannot keep a certificate in {}: {source}", path.display())]
    Keep {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Where a certificate is.
pub(super) struct Made {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

/// A certificate for `hosts` in `dir`: the one that is there, else a new one that is valid for `years`.
///
/// One that is there is taken as it is, even if it has expired: clients may have been told to trust it.
pub(super) fn certificate<'a>(
    dir: &Path,
    hosts: impl Iterator<Item = &'a str>,
    years: u64,
) -> Result<Made, AutoError> {
    if years == 0 {
        return Err(AutoError::NoValidity);
    }
    let made = Made { certificate: dir.join("cert.pem"), key: dir.join("key.pem") };
    if made.certificate.exists() && made.key.exists() {
        return Ok(made);
    }
    let keep = |path: &Path| {
        let path = path.to_owned();
        move |source| AutoError::Keep { path, source }
    };
    let (certificate, key) = make(hosts, years, SystemTime::now())?;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(keep(dir))?;
    // The certificate last: a crash before it leaves nothing that looks whole.
    write(&made.key, 0o600, &key).map_err(keep(&made.key))?;
    write(&made.certificate, 0o644, &certificate).map_err(keep(&made.certificate))?;
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(keep(dir))?;
    tracing::info!(path = %made.certificate.display(), "made a self-signed certificate");
    Ok(made)
}

/// A self-signed certificate and its key, both PEM.
fn make<'a>(
    hosts: impl Iterator<Item = &'a str>,
    years: u64,
    now: SystemTime,
) -> Result<(String, String), AutoError> {
    // An empty host stands for all addresses, of which none is named.
    let hosts: BTreeSet<String> =
        hosts.filter(|host| !host.is_empty()).map(str::to_owned).collect();
    let mut params = CertificateParams::new(hosts.into_iter().collect::<Vec<_>>())?;
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "etcd");
    params.distinguished_name = name;
    let mut serial = [0; 16];
    let random = aws_lc_rs::default_provider().secure_random;
    random.fill(&mut serial).map_err(|_| AutoError::NoRandom)?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    let from_s = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let to_s = from_s.saturating_add(years.saturating_mul(365 * DAY.as_secs())).min(LAST_DATE_S);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(from_s);
    params.not_after = epoch + Duration::from_secs(to_s);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyEncipherment,
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::CrlSign,
    ];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512)?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// Writes a file whole or not at all, and to the disk.
fn write(path: &Path, mode: u32, text: &str) -> io::Result<()> {
    let partial = path.with_extension("pem.tmp");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&partial)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&partial, path)
}
