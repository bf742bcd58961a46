//! Whether a certificate is shown from where it says: its alternative names against the address of the
//! other side (operations 5.1).
//!
//! Most certificates are judged at once. Only one that names hosts and not the address itself needs the
//! resolver, which blocks: it is asked on threads of its own, few at a time, and not for longer than
//! [`LOOKUP_TIMEOUT`].

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::sync::Semaphore;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// After which a certificate counts as not matching: half of what a handshake may take.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Threads that wait for the resolver at once. It cannot be interrupted, so a thread counts until it is
/// back, even if nobody waits for it any more.
const LOOKUPS_MAX: usize = 8;

static LOOKUPS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(LOOKUPS_MAX)));

/// The alternative names of a certificate that can stand for a host.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Sans {
    pub ips: Vec<IpAddr>,
    pub dns: Vec<String>,
}

/// Why a certificate does not count for the address that it is shown from.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum SanError {
    /// The certificate cannot be read, though its chain was verified.
    #[error("tls: cannot read the names in the certificate: {0}")]
    Unreadable(String),
    #[error("x509: certificate is valid for {}, not {remote}", list(ips))]
    Addresses { remote: IpAddr, ips: Vec<IpAddr> },
    /// `why`: with a space and brackets, or empty.
    #[error("tls: \"{remote}\" does not match any of DNSNames [{}]{why}", quoted(dns))]
    Names { remote: IpAddr, dns: Vec<String>, why: String },
}

fn list(ips: &[IpAddr]) -> String {
    ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" ")
}

impl Sans {
    /// The names in a certificate.
    ///
    /// # Errors
    /// `Unreadable`.
    pub fn of(certificate: &[u8]) -> Result<Self, SanError> {
        let unreadable = |error: &dyn std::fmt::Display| SanError::Unreadable(error.to_string());
        let (_, certificate) =
            X509Certificate::from_der(certificate).map_err(|error| unreadable(&error))?;
        let extension =
            certificate.subject_alternative_name().map_err(|error| unreadable(&error))?;
        let mut sans = Sans::default();
        for name in extension.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) => sans.dns.push((*name).to_string()),
                GeneralName::IPAddress(bytes) => {
                    let ip = <[u8; 4]>::try_from(*bytes)
                        .map(IpAddr::from)
                        .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                    sans.ips
                        .push(ip.map_err(|_| unreadable(&"an IP address has no length of one"))?);
                }
                // Mail addresses, URIs and the like name no host.
                _ => {}
            }
        }
        Ok(sans)
    }

    /// What can be said without asking the resolver; `None` if nothing.
    fn at_once(&self, remote: IpAddr) -> Option<Result<(), SanError>> {
        let matches = |ip: &IpAddr| ip.to_canonical() == remote;
        match (self.ips.is_empty(), self.dns.is_empty()) {
            (true, true) => Some(Ok(())),
            _ if self.ips.iter().any(matches) => Some(Ok(())),
            (false, true) => Some(Err(SanError::Addresses { remote, ips: self.ips.clone() })),
            (_, false) => None,
        }
    }

    /// Whether a name among these is one of `remote`: by the name that `remote` has, then by the
    /// addresses that the names have.
    fn by_names(&self, remote: IpAddr, resolver: &dyn Resolver) -> Result<(), SanError> {
        let mut failure = None;
        match resolver.names(remote) {
            Ok(names) => {
                let found = names.iter().any(|name| {
                    let name = name.strip_suffix('.').unwrap_or(name);
                    self.dns.iter().any(|pattern| covers(pattern, name))
                });
                if found {
                    return Ok(());
                }
            }
            Err(error) => failure = Some(format!("lookup {remote}: {error}")),
        }
        for name in self.dns.iter().filter(|name| !name.starts_with("*.")) {
            match resolver.addresses(name) {
                Ok(found) if found.iter().any(|ip| ip.to_canonical() == remote) => return Ok(()),
                Ok(_) => {}
                Err(error) => failure = Some(format!("lookup {name}: {error}")),
            }
        }
        let why = failure.map_or_else(String::new, |failure| format!(" ({failure})"));
        Err(SanError::Names { remote, dns: self.dns.clone(), why })
    }
}

/// Whether a host has the name in a certificate; `*.` stands for at least one label.
fn covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*').filter(|suffix| suffix.starts_with('.')) {
        Some(suffix) => {
            let (host, suffix) = (host.as_bytes(), suffix.as_bytes());
            host.len() > suffix.len()
                && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
        }
        None => pattern.eq_ignore_ascii_case(host),
    }
}

/// Looks names and addresses up; may block.
trait Resolver: Send {
    /// The names of an address.
    fn names(&self, ip: IpAddr) -> io::Result<Vec<String>>;

    /// The addresses of a name.
    fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>>;
}

/// The system's: files, DNS, whatever it is set up for.
struct System;

impl Resolver for System {
    fn names(&self, ip: IpAddr) -> io::Result<Vec<String>> {
        use nix::libc;
        let address = socket2::SockAddr::from(SocketAddr::new(ip, 0));
        let mut name = [0u8; libc::NI_MAXHOST as usize];
        // SAFETY: the address is valid for its length, the buffer for its own; no service is asked for.
        let code = unsafe {
            libc::getnameinfo(
                address.as_ptr().cast(),
                address.len(),
                name.as_mut_ptr().cast(),
                name.len() as libc::socklen_t,
                std::ptr::null_mut(),
                0,
                libc::NI_NAMEREQD,
            )
        };
        if code != 0 {
            // SAFETY: it answers a constant text for every code.
            let text = unsafe { CStr::from_ptr(libc::gai_strerror(code)) };
            return Err(io::Error::other(text.to_string_lossy().into_owned()));
        }
        let name = CStr::from_bytes_until_nul(&name).map_err(io::Error::other)?;
        Ok(vec![name.to_string_lossy().into_owned()])
    }

    fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        Ok((name, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
    }
}

/// Checks that a verified certificate (DER) names the address that it is shown from.
///
/// # Errors
/// [`SanError`], with etcd's text.
pub async fn check(certificate: &[u8], remote: IpAddr) -> Result<(), SanError> {
    let sans = Sans::of(certificate)?;
    check_with(sans, remote, System, LOOKUP_TIMEOUT).await
}

async fn check_with(
    sans: Sans,
    remote: IpAddr,
    resolver: impl Resolver + 'static,
    patience: Duration,
) -> Result<(), SanError> {
    let remote = remote.to_canonical();
    if let Some(decided) = sans.at_once(remote) {
        return decided;
    }
    let dns = sans.dns.clone();
    let looking = async {
        let permit = LOOKUPS.clone().acquire_owned().await;
        let permit = permit.map_err(|error| error.to_string())?;
        let lookup = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            sans.by_names(remote, &resolver)
        });
        lookup.await.map_err(|error| error.to_string())
    };
    let why = match tokio::time::timeout(patience, looking).await {
        Ok(Ok(decided)) => return decided,
        Ok(Err(error)) => format!(" ({error})"),
        Err(_) => format!(" (no answer from the resolver within {patience:?})"),
    };
    Err(SanError::Names { remote, dns, why })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A resolver that knows what a test tells it.
    #[derive(Clone, Default)]
    struct Known(Vec<(&'static str, &'static str)>);

    impl Resolver for Known {
        fn names(&self, ip: IpAddr) -> io::Result<Vec<String>> {
            let known = self.0.iter().filter(|(from, _)| *from == ip.to_string());
            let names: Vec<String> = known.map(|(_, name)| (*name).to_string()).collect();
            if names.is_empty() { Err(io::Error::other("unknown address")) } else { Ok(names) }
        }

        fn addresses(&self, name: &str) -> io::Result<Vec<IpAddr>> {
            let known = self.0.iter().filter(|(from, _)| *from == name);
            let found: Vec<IpAddr> = known.map(|(_, ip)| ip.parse().unwrap()).collect();
            if found.is_empty() { Err(io::Error::other("no such host")) } else { Ok(found) }
        }
    }

    fn sans(ips: &[&str], dns: &[&str]) -> Sans {
        Sans {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            dns: dns.iter().map(ToString::to_string).collect(),
        }
    }

    async fn judge(sans: Sans, remote: &str, known: &[(&'static str, &'static str)]) -> String {
        let resolver = Known(known.to_vec());
        match check_with(sans, remote.parse().unwrap(), resolver, Duration::from_secs(60)).await {
            Ok(()) => "accepted".to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn without_names_or_with_the_address_itself_a_certificate_passes() {
        for (sans, remote) in [
            (sans(&[], &[]), "10.0.0.1"),
            (sans(&["10.0.0.1"], &[]), "10.0.0.1"),
            (sans(&["10.0.0.2", "10.0.0.1"], &["other.example"]), "10.0.0.1"),
            (sans(&["10.0.0.1"], &[]), "::ffff:10.0.0.1"),
            (sans(&["fd00::1"], &[]), "fd00::1"),
        ] {
            assert_eq!(judge(sans.clone(), remote, &[]).await, "accepted", "{sans:?} {remote}");
        }
    }

    #[tokio::test]
    async fn addresses_alone_are_final() {
        let known = &[("10.0.0.9", "m.example")];
        assert_eq!(
            judge(sans(&["10.0.0.1", "fd00::1"], &[]), "10.0.0.9", known).await,
            "x509: certificate is valid for 10.0.0.1, fd00::1, not 10.0.0.9"
        );
    }

    #[tokio::test]
    async fn names_are_looked_up_both_ways() {
        let back = &[("10.0.0.9", "other.example"), ("10.0.0.9", "M.example.")];
        let forth =
            &[("10.0.0.9", "x.example"), ("m.example", "10.0.0.8"), ("m.example", "10.0.0.9")];
        for (sans, known) in [
            (sans(&[], &["m.example"]), &back[..]),
            (sans(&["10.0.0.1"], &["a.example", "m.example"]), &back[..]),
            (sans(&[], &["*.example"]), &back[..]),
            (sans(&[], &["m.example"]), &forth[..]),
            // The address has no name at all.
            (sans(&[], &["m.example"]), &forth[1..]),
        ] {
            assert_eq!(judge(sans.clone(), "10.0.0.9", known).await, "accepted", "{sans:?}");
        }
    }

    #[tokio::test]
    async fn the_refusal_names_what_was_compared() {
        let refused = |dns: &'static [&'static str], known: &'static [(&str, &str)]| {
            judge(sans(&["10.0.0.1"], dns), "10.0.0.9", known)
        };
        assert_eq!(
            refused(&["a.example", "*.b"], &[("10.0.0.9", "ab.c"), ("a.example", "10.0.0.8")])
                .await,
            r#"tls: "10.0.0.9" does not match any of DNSNames ["a.example" "*.b"]"#
        );
        // A wildcard stands for a label, and is never looked up itself.
        assert_eq!(
            refused(&["*.b.c"], &[("10.0.0.9", "b.c"), ("*.b.c", "10.0.0.9")]).await,
            r#"tls: "10.0.0.9" does not match any of DNSNames ["*.b.c"]"#
        );
        assert_eq!(
            refused(&["a.example"], &[("10.0.0.9", "b.example")]).await,
            r#"tls: "10.0.0.9" does not match any of DNSNames ["a.example"] (lookup a.example: no such host)"#
        );
        assert_eq!(
            refused(&["*.b.c"], &[]).await,
            r#"tls: "10.0.0.9" does not match any of DNSNames ["*.b.c"] (lookup 10.0.0.9: unknown address)"#
        );
    }

    /// A resolver that answers when the test lets it.
    struct Stuck(mpsc::Receiver<()>);

    impl Resolver for Stuck {
        fn names(&self, _: IpAddr) -> io::Result<Vec<String>> {
            self.0.recv().ok();
            Ok(vec!["m.example".to_string()])
        }

        fn addresses(&self, _: &str) -> io::Result<Vec<IpAddr>> {
            Ok(Vec::new())
        }
    }

    #[tokio::test]
    async fn a_resolver_that_hangs_is_not_waited_for() {
        let (release, stuck) = mpsc::channel();
        let within = Duration::from_millis(20);
        let remote = IpAddr::from([10, 0, 0, 9]);
        let checked = check_with(sans(&[], &["m.example"]), remote, Stuck(stuck), within).await;
        assert_eq!(
            checked.unwrap_err().to_string(),
            "tls: \"10.0.0.9\" does not match any of DNSNames [\"m.example\"] (no answer from the \
             resolver within 20ms)"
        );
        drop(release);
    }

    #[tokio::test]
    async fn the_names_in_a_certificate_are_read_and_the_system_knows_the_loopback() {
        let names = ["localhost", "127.0.0.2", "fd00::1"].map(String::from);
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let der = made.cert.der();
        let expected = sans(&["127.0.0.2", "fd00::1"], &["localhost"]);
        assert_eq!(Sans::of(der).unwrap(), expected);
        assert_eq!(check(der, IpAddr::from([127, 0, 0, 1])).await, Ok(()));
        let refused = check(der, IpAddr::from([192, 0, 2, 1])).await.unwrap_err().to_string();
        let start = r#"tls: "192.0.2.1" does not match any of DNSNames ["localhost"]"#;
        assert!(refused.starts_with(start), "{refused}");
        assert!(matches!(Sans::of(&der[..100]), Err(SanError::Unreadable(_))));
        assert_eq!(
            Sans::of(rcgen::generate_simple_self_signed([]).unwrap().cert.der()),
            Ok(sans(&[], &[]))
        );
    }
}
