//! What etcd can and this release cannot do yet. Such a setting is read and checked like any other,
//! then refused by name, so that nobody runs without what they asked for.

use super::Config;
use super::error::ConfigError;
use super::flags::{FILE_ONLY, FLAGS};
use super::url::Url;

/// Flags that must be left at their default, and what they belong to.
const AT_DEFAULT: &[(&str, &str)] = &[
    ("cert-file", TLS),
    ("key-file", TLS),
    ("client-cert-file", TLS),
    ("client-key-file", TLS),
    ("client-cert-auth", TLS),
    ("client-crl-file", TLS),
    ("client-cert-allowed-hostname", TLS),
    ("trusted-ca-file", TLS),
    ("auto-tls", TLS),
    ("peer-cert-file", TLS),
    ("peer-key-file", TLS),
    ("peer-client-cert-file", TLS),
    ("peer-client-key-file", TLS),
    ("peer-client-cert-auth", TLS),
    ("peer-trusted-ca-file", TLS),
    ("peer-cert-allowed-cn", TLS),
    ("peer-cert-allowed-hostname", TLS),
    ("peer-skip-client-san-verification", TLS),
    ("peer-auto-tls", TLS),
    ("peer-crl-file", TLS),
    ("discovery-token", DISCOVERY),
    ("discovery-endpoints", DISCOVERY),
    ("discovery-dial-timeout", DISCOVERY),
    ("discovery-request-timeout", DISCOVERY),
    ("discovery-keepalive-time", DISCOVERY),
    ("discovery-keepalive-timeout", DISCOVERY),
    ("discovery-insecure-transport", DISCOVERY),
    ("discovery-insecure-skip-tls-verify", DISCOVERY),
    ("discovery-cert", DISCOVERY),
    ("discovery-key", DISCOVERY),
    ("discovery-cacert", DISCOVERY),
    ("discovery-user", DISCOVERY),
    ("discovery-password", DISCOVERY),
    ("discovery-srv", DISCOVERY),
    ("discovery-srv-name", DISCOVERY),
    ("enable-pprof", "profiling"),
    ("enable-distributed-tracing", "tracing"),
    ("downgrade-check-time", "downgrades"),
];

const TLS: &str = "TLS";
const DISCOVERY: &str = "discovery";

/// Settings of which only some values cannot be obeyed.
const BY_VALUE: &[(&str, fn(&Config) -> bool, &str)] = &[
    ("listen-peer-urls", |c| any_tls(&c.listen.peer_urls), "TLS"),
    ("listen-client-urls", |c| any_tls(&c.listen.client_urls), "TLS"),
    ("listen-client-http-urls", |c| any_tls(&c.listen.client_http_urls), "TLS"),
    ("listen-metrics-urls", |c| any_tls(&c.listen.metrics_urls), "TLS"),
    ("initial-advertise-peer-urls", |c| any_tls(&c.cluster.advertise_peer_urls), "TLS"),
    ("advertise-client-urls", |c| any_tls(&c.cluster.advertise_client_urls), "TLS"),
];

fn any_tls(urls: &[Url]) -> bool {
    urls.iter().any(|url| url.scheme().is_tls())
}

/// Whether any value of this flag but the default is refused.
pub fn refuses(flag: &str) -> bool {
    AT_DEFAULT.iter().any(|(name, _)| *name == flag)
}

/// Refuses a configuration that asks for what is not there; names all of it.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let (mut given, mut default) = (config.clone(), Config::default());
    let mut refused = Vec::new();
    for flag in FLAGS {
        let Some((_, what)) = AT_DEFAULT.iter().find(|(name, _)| *name == flag.name) else {
            continue;
        };
        if (flag.slot)(&mut given).print() != (flag.slot)(&mut default).print() {
            refused.push(format!("--{} ({what})", flag.name));
        }
    }
    for only in FILE_ONLY {
        if (only.slot)(&mut given).print() != (only.slot)(&mut default).print() {
            refused.push(only.key.to_owned());
        }
    }
    for (name, asked, what) in BY_VALUE {
        if asked(config) {
            refused.push(format!("--{name} ({what})"));
        }
    }
    if refused.is_empty() { Ok(()) } else { Err(ConfigError::Unsupported(refused.join(", "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_flags_that_exist() {
        for (name, _) in AT_DEFAULT {
            assert!(crate::config::flags::find(name).is_some(), "{name}");
        }
        for (name, _, _) in BY_VALUE {
            assert!(crate::config::flags::find(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_default_is_supported() {
        check(&Config::default()).unwrap();
    }

    #[test]
    fn all_that_is_missing_is_named() {
        let mut config = Config::default();
        config.client_tls.cert_file = "c".into();
        config.discovery.srv = "d".to_owned();
        config.discovery.max_recv_bytes = 1;
        config.listen.peer_urls = vec![Url::parse("https://h:1").unwrap()];
        assert_eq!(
            check(&config).unwrap_err().to_string(),
            "not supported yet: --discovery-srv (discovery), --cert-file (TLS), \
             discovery-config.client.max-recv-bytes, --listen-peer-urls (TLS)"
        );
    }
}
