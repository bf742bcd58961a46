//! What etcd can and this release cannot do yet. Such a setting is read and checked like any other,
//! then refused by name, so that nobody runs without what they asked for.

use super::Config;
use super::error::ConfigError;
use super::flags::{FILE_ONLY, FLAGS};
use super::types::AuthToken;

/// Flags that must be left at their default, and what they belong to.
const AT_DEFAULT: &[(&str, &str)] = &[
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

const DISCOVERY: &str = "discovery";

/// Settings of which only some values cannot be obeyed.
const BY_VALUE: &[(&str, fn(&Config) -> bool, &str)] =
    &[("auth-token", |c| matches!(c.auth.token, AuthToken::Jwt(_)), "jwt")];

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
    // Those of discovery; the others are of TLS.
    for only in FILE_ONLY.iter().filter(|only| only.key.starts_with("discovery-config.")) {
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
        config.observe.pprof = true;
        config.discovery.srv = "d".to_owned();
        config.discovery.max_recv_bytes = 1;
        config.auth.token = AuthToken::parse("jwt,sign-method=HS256,priv-key=k").unwrap();
        assert_eq!(
            check(&config).unwrap_err().to_string(),
            "not supported yet: --discovery-srv (discovery), --enable-pprof (profiling), \
             discovery-config.client.max-recv-bytes, --auth-token (jwt)"
        );
    }
}
