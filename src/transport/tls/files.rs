//! Certificates, keys, authorities and revocation lists as files, and noticing that they changed.

use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::crl::Revoked;

/// More than any bundle of authorities or revocation list of sense; a wrong path, say to a device,
/// must not fill the memory.
const FILE_MAX: u64 = 64 << 20;
/// A file that was written so recently can be written again without its times telling: their
/// resolution is coarser than a clock's.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// A certificate with the chain that vouches for it, and its key.
pub(super) struct Identity {
    pub(super) certified: Arc<CertifiedKey>,
    /// When the certificate ends, in seconds of Unix time.
    pub(super) not_after_s: i64,
}

impl Identity {
    /// Reads a chain and the key of its first certificate, both PEM.
    pub(super) fn parse(
        chain: &[u8],
        key: &[u8],
        provider: &CryptoProvider,
    ) -> Result<Self, String> {
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
            pem::Error::NoItemsFound => "no unencrypted private key in the key file".to_owned(),
            error => format!("the key file is not PEM: {error}"),
        })?;
        let leaf = chain.first().ok_or("no certificate in the file")?;
        let not_after_s = match X509Certificate::from_der(leaf) {
            Ok((_, parsed)) => parsed.validity().not_after.timestamp(),
            Err(error) => return Err(format!("a certificate cannot be read: {error}")),
        };
        let certified =
            CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => {
                    "private key does not match the certificate".to_owned()
                }
                error => error.to_string(),
            })?;
        Ok(Identity { certified: Arc::new(certified), not_after_s })
    }
}

/// All certificates of a PEM file, at least one.
fn certificates(bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    let all = all.map_err(|error| format!("not PEM: {error}"))?;
    if all.is_empty() {
        return Err("no certificate in the file".to_owned());
    }
    Ok(all)
}

/// Whom this member trusts.
pub(super) struct Roots {
    pub(super) store: Arc<RootCertStore>,
    /// Those of a file. The system's are authorities and nothing else.
    given: Vec<CertificateDer<'static>>,
}

impl Roots {
    /// Nobody.
    pub(super) fn none() -> Self {
        Roots { store: Arc::new(RootCertStore::empty()), given: Vec::new() }
    }

    /// Reads a PEM bundle.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let given = certificates(bytes)?;
        let mut store = RootCertStore::empty();
        for (nth, certificate) in given.iter().enumerate() {
            store
                .add(certificate.clone())
                .map_err(|error| format!("certificate {} of the file: {error}", nth + 1))?;
        }
        Ok(Roots { store: Arc::new(store), given })
    }

    /// Those that the system trusts. What cannot be read of them is left out, as everybody does.
    pub(super) fn system() -> Self {
        let mut store = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "cannot read some of the system's certificate authorities");
        }
        store.add_parsable_certificates(found.certs);
        Roots { store: Arc::new(store), given: Vec::new() }
    }

    /// Whether exactly this certificate is among those given.
    pub(super) fn holds(&self, certificate: &CertificateDer<'_>) -> bool {
        self.given.iter().any(|given| given == certificate)
    }

    /// All but those that `revoked` lists.
    pub(super) fn without(&self, revoked: &Revoked) -> Arc<RootCertStore> {
        if !self.given.iter().any(|given| revoked.holds(given)) {
            return self.store.clone();
        }
        let mut store = RootCertStore::empty();
        let kept = self.given.iter().filter(|given| !revoked.holds(given));
        store.add_parsable_certificates(kept.cloned());
        Arc::new(store)
    }
}

/// What tells that a file may have changed without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of the file that a path leads to, through links: secrets are often swapped by one.
    fn of(path: &Path) -> io::Result<Self> {
        let found = std::fs::metadata(path)?;
        Ok(Stamp {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    fn is_settled(&self, now: SystemTime) -> bool {
        let changed = UNIX_EPOCH + Duration::from_secs(self.changed.0.unsigned_abs());
        now.duration_since(changed).is_ok_and(|since| since > SETTLED_AFTER)
    }
}

/// What a look at the files found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    Same,
    Changed,
    /// They cannot be used; told once, not again while the reason is the same.
    Bad(String),
}

/// What is made of the files' bytes, one slice for each.
type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync>;

/// Something read from files, and read again when they change.
pub(super) struct Watched<T> {
    paths: Vec<PathBuf>,
    parse: Parse<T>,
    /// What stands in for the value while a file cannot be opened; `None`: the old value.
    unreadable: Option<fn(String) -> T>,
    stamps: Vec<Stamp>,
    settled: bool,
    /// Of the bytes that the value is made of.
    digest: Option<[u8; 32]>,
    value: Arc<T>,
    told: Option<String>,
}

/// A file that cannot be used.
#[derive(Debug)]
pub(super) struct FileError {
    pub(super) path: PathBuf,
    pub(super) why: String,
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.why)
    }
}

impl<T> Watched<T> {
    /// Reads `paths`, at least one; an error of `parse` counts as the first one's.
    pub(super) fn open(
        paths: Vec<PathBuf>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static,
        unreadable: Option<fn(String) -> T>,
    ) -> Result<Self, FileError> {
        let read = Contents::of(&paths)?;
        let value = parse(&read.bytes)
            .map_err(|why| FileError { path: paths.first().cloned().unwrap_or_default(), why })?;
        Ok(Watched {
            parse: Box::new(parse),
            unreadable,
            settled: read.settled,
            stamps: read.stamps,
            digest: Some(read.digest),
            value: Arc::new(value),
            told: None,
            paths,
        })
    }

    pub(super) fn value(&self) -> &Arc<T> {
        &self.value
    }

    /// Looks whether the files changed, and reads them if so.
    pub(super) fn look(&mut self) -> Seen {
        let stamps: io::Result<Vec<Stamp>> =
            self.paths.iter().map(|path| Stamp::of(path)).collect();
        let same = stamps.is_ok_and(|stamps| stamps == self.stamps);
        if same && self.settled && self.digest.is_some() {
            return Seen::Same;
        }
        let read = match Contents::of(&self.paths) {
            Ok(read) => read,
            Err(error) => {
                // Whatever comes next is read.
                self.stamps.clear();
                return self.unreadable(error.to_string());
            }
        };
        (self.stamps, self.settled) = (read.stamps, read.settled);
        if self.digest == Some(read.digest) {
            self.told = None;
            return Seen::Same;
        }
        match (self.parse)(&read.bytes) {
            Ok(value) => {
                self.value = Arc::new(value);
                self.digest = Some(read.digest);
                self.told = None;
                Seen::Changed
            }
            Err(why) => self.tell(format!("{}: {why}", self.shown())),
        }
    }

    fn unreadable(&mut self, why: String) -> Seen {
        let Some(stand_in) = self.unreadable else { return self.tell(why) };
        self.digest = None;
        self.value = Arc::new(stand_in(why.clone()));
        self.tell(why)
    }

    fn tell(&mut self, why: String) -> Seen {
        if self.told.as_ref() == Some(&why) {
            return Seen::Same;
        }
        self.told = Some(why.clone());
        Seen::Bad(why)
    }

    fn shown(&self) -> String {
        let shown: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
        shown.join(", ")
    }
}

/// Files as they were read.
struct Contents {
    bytes: Vec<Vec<u8>>,
    stamps: Vec<Stamp>,
    settled: bool,
    digest: [u8; 32],
}

impl Contents {
    fn of(paths: &[PathBuf]) -> Result<Self, FileError> {
        let now = SystemTime::now();
        let mut read =
            Contents { bytes: Vec::new(), stamps: Vec::new(), settled: true, digest: [0; 32] };
        let mut digest = Sha256::new();
        for path in paths {
            let failed =
                |error: io::Error| FileError { path: path.clone(), why: error.to_string() };
            // The stamp comes first: a change after it is found at the next look.
            let stamp = Stamp::of(path).map_err(failed)?;
            let bytes = read_bounded(path).map_err(failed)?;
            read.settled &= stamp.is_settled(now);
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(&bytes);
            read.stamps.push(stamp);
            read.bytes.push(bytes);
        }
        read.digest = digest.finalize().into();
        Ok(read)
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::other(format!("larger than {FILE_MAX} bytes")));
    }
    Ok(bytes)
}
