//! URLs of members and clients: text kept as it was written, for IDs are computed from it.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use super::types::words;

words! {
    /// How a URL's other end is spoken to.
    Scheme {
        Http = "http",
        Https = "https",
        /// A unix socket.
        Unix = "unix",
        /// TLS over a unix socket.
        Unixs = "unixs",
    }
}

impl Scheme {
    /// Whether TLS is asked for.
    pub const fn is_tls(self) -> bool {
        matches!(self, Scheme::Https | Scheme::Unixs)
    }

    /// Whether the address is a file.
    pub const fn is_unix(self) -> bool {
        matches!(self, Scheme::Unix | Scheme::Unixs)
    }
}

/// One URL in the forms that etcd takes. Ordered and compared by its text.
#[derive(Clone, Eq)]
pub struct Url {
    scheme: Scheme,
    text: String,
    /// Where in `text` the host with its port is.
    host: std::ops::Range<usize>,
    /// The address in parts; for a unix URL an empty host and port 0.
    name: String,
    port: u16,
}

/// Why a text is no URL that etcd takes.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum UrlError {
    #[error("parse {url:?}: {what}")]
    Malformed { url: String, what: String },
    #[error("URL scheme must be http, https, unix, or unixs: {0}")]
    Scheme(String),
    #[error("URL address does not have the form \"host:port\": {0}")]
    Address(String),
    #[error("URL must not contain a path: {0}")]
    Path(String),
}

impl Url {
    /// Reads one URL; spaces around it are dropped, its scheme is put in lower case.
    ///
    /// # Errors
    /// [`UrlError`], with etcd's text.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let text = text.trim();
        let malformed = |what: String| Err(UrlError::Malformed { url: text.to_owned(), what });
        if text.bytes().any(|b| b < b' ' || b == 0x7f) {
            return malformed("net/url: invalid control character in URL".to_owned());
        }
        let Some((word, rest)) = split_scheme(text) else {
            return match text.split('/').next() {
                _ if text.starts_with(':') => malformed("missing protocol scheme".to_owned()),
                Some(first) if first.contains(':') => {
                    malformed("first path segment in URL cannot contain colon".to_owned())
                }
                _ => Err(UrlError::Scheme(text.to_owned())),
            };
        };
        let word = word.to_ascii_lowercase();
        let Some(scheme) = Scheme::from_name(&word) else {
            return Err(UrlError::Scheme(text.to_owned()));
        };
        // What follows the host ends it: a path, a query or a fragment.
        let (host, tail) = match rest.strip_prefix("//") {
            Some(rest) => rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len())),
            None => ("", rest),
        };
        // A user name is no part of the address.
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        if let Some(c) = host.chars().find(|&c| matches!(c, ' ' | '<' | '>' | '"' | '\\' | '^')) {
            return malformed(format!("invalid character {:?} in host name", c.to_string()));
        }
        let (name, port) = match split_host_port(host) {
            Ok(parts) => parts,
            Err(Address::Port(port)) => {
                return malformed(format!("invalid port {:?} after host", format!(":{port}")));
            }
            Err(Address::Bracket) => return malformed("missing ']' in host".to_owned()),
            Err(Address::Form) if scheme.is_unix() => ("", 0),
            Err(Address::Form) => return Err(UrlError::Address(text.to_owned())),
        };
        if !scheme.is_unix() && tail.starts_with('/') {
            return Err(UrlError::Path(text.to_owned()));
        }
        let printed = format!("{word}:{rest}");
        let end = printed.len() - tail.len();
        Ok(Url {
            scheme,
            host: end - host.len()..end,
            name: if scheme.is_unix() { String::new() } else { name.to_owned() },
            port: if scheme.is_unix() { 0 } else { port },
            text: printed,
        })
    }

    /// Reads URLs with commas between them; the result is sorted and without duplicates.
    ///
    /// # Errors
    /// What is wrong with the first bad one.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, UrlError> {
        let mut urls = text.split(',').map(Url::parse).collect::<Result<Vec<_>, _>>()?;
        urls.sort();
        urls.dedup();
        Ok(urls)
    }

    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The URL as it is printed, hashed and told to others.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Host and port as written (`localhost:2379`, `[::1]:2379`); for unix URLs what stands between
    /// `//` and the path.
    pub fn host(&self) -> &str {
        &self.text[self.host.clone()]
    }

    /// The host alone, without brackets; empty for `http://:2379` and for unix URLs.
    pub fn host_name(&self) -> &str {
        &self.name
    }

    /// The port; 0 for none and for unix URLs.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host if it is an address and not a name.
    pub fn ip(&self) -> Option<IpAddr> {
        self.name.parse().ok()
    }

    /// The file of a client's unix URL: host and path, so that `unix://name:0` is a file in the
    /// working directory. `None` for other schemes.
    pub fn socket_path(&self) -> Option<PathBuf> {
        self.scheme.is_unix().then(|| {
            let tail = &self.text[self.host.end..];
            let path = &tail[..tail.find(['?', '#']).unwrap_or(tail.len())];
            PathBuf::from(format!("{}{path}", self.host()))
        })
    }

    /// The URL of a host, by name or address, and a port.
    ///
    /// # Panics
    /// If `host` cannot stand in a URL.
    pub fn new(scheme: Scheme, host: &str, port: u16) -> Self {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        Url::parse(&format!("{scheme}://{host}:{port}")).expect("a host and a port make a URL")
    }
}

/// The scheme and what follows its colon.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (word, rest) = text.split_once(':')?;
    let mut bytes = word.bytes();
    let starts = bytes.next().is_some_and(|b| b.is_ascii_alphabetic());
    let goes_on = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
    (starts && goes_on).then_some((word, rest))
}

enum Address<'a> {
    Form,
    Bracket,
    Port(&'a str),
}

/// The host's name without brackets, and the port; an empty port is 0, which the system chooses.
fn split_host_port(host: &str) -> Result<(&str, u16), Address<'_>> {
    let (name, port) = match host.strip_prefix('[') {
        Some(inner) => {
            let (name, after) = inner.split_once(']').ok_or(Address::Bracket)?;
            match after.strip_prefix(':') {
                Some(port) => (name, port),
                None if after.is_empty() => return Err(Address::Form),
                None => return Err(Address::Port(after)),
            }
        }
        None => {
            let (name, port) = host.rsplit_once(':').ok_or(Address::Form)?;
            if !port.bytes().all(|b| b.is_ascii_digit()) {
                return Err(Address::Port(port));
            }
            if name.contains([':', '[', ']']) {
                return Err(Address::Form);
            }
            (name, port)
        }
    };
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Address::Port(port));
    }
    if port.is_empty() {
        return Ok((name, 0));
    }
    Ok((name, port.parse().map_err(|_| Address::Form)?))
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Url {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl PartialOrd for Url {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Url {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

/// The texts of `urls` with commas between them.
pub fn join(urls: &[Url]) -> String {
    urls.iter().map(Url::as_str).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_urls_apart() {
        for (text, printed, host, name, port, socket) in [
            (
                "http://localhost:2380",
                "http://localhost:2380",
                "localhost:2380",
                "localhost",
                2380,
                None,
            ),
            (" HTTPS://10.0.0.1:1 ", "https://10.0.0.1:1", "10.0.0.1:1", "10.0.0.1", 1, None),
            ("http://[::1]:2379", "http://[::1]:2379", "[::1]:2379", "::1", 2379, None),
            ("http://:2379", "http://:2379", ":2379", "", 2379, None),
            ("http://h:", "http://h:", "h:", "h", 0, None),
            ("http://u:p@h:3?q", "http://u:p@h:3?q", "h:3", "h", 3, None),
            ("unix://name:0", "unix://name:0", "name:0", "", 0, Some("name:0")),
            ("unix:///run/e.sock", "unix:///run/e.sock", "", "", 0, Some("/run/e.sock")),
            ("unixs:/run/e.sock", "unixs:/run/e.sock", "", "", 0, Some("/run/e.sock")),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!(url.as_str(), printed, "{text}");
            assert_eq!(url.host(), host, "{text}");
            assert_eq!(url.host_name(), name, "{text}");
            assert_eq!(url.port(), port, "{text}");
            assert_eq!(url.socket_path(), socket.map(PathBuf::from), "{text}");
        }
    }

    #[test]
    fn refuses_with_the_words_of_etcd() {
        for (text, error) in [
            ("", "URL scheme must be http, https, unix, or unixs: "),
            ("ftp://h:1", "URL scheme must be http, https, unix, or unixs: ftp://h:1"),
            ("localhost:2379", "URL scheme must be http, https, unix, or unixs: localhost:2379"),
            ("http://h", r#"URL address does not have the form "host:port": http://h"#),
            ("http://::1:2", r#"URL address does not have the form "host:port": http://::1:2"#),
            ("http://h:70000", r#"URL address does not have the form "host:port": http://h:70000"#),
            ("http://h:1/", "URL must not contain a path: http://h:1/"),
            ("http://h:1/x", "URL must not contain a path: http://h:1/x"),
            ("http://h:x", r#"parse "http://h:x": invalid port ":x" after host"#),
            ("http://[::1:2", r#"parse "http://[::1:2": missing ']' in host"#),
            ("http://a b:1", r#"parse "http://a b:1": invalid character " " in host name"#),
            (
                "127.0.0.1:2379",
                r#"parse "127.0.0.1:2379": first path segment in URL cannot contain colon"#,
            ),
        ] {
            assert_eq!(Url::parse(text).unwrap_err().to_string(), error, "{text}");
        }
    }

    #[test]
    fn lists_are_sorted_and_hold_each_url_once() {
        let urls = Url::parse_list("http://b:1,http://a:2, http://b:1,http://a:1").unwrap();
        assert_eq!(join(&urls), "http://a:1,http://a:2,http://b:1");
        assert_eq!(Url::new(Scheme::Https, "::2", 1).as_str(), "https://[::2]:1");
    }
}
