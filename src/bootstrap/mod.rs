//! How a member comes into being: whether it founds a cluster, joins one or goes on, and the log that
//! it begins with (operations section 2).
//!
//! Which way it goes is a [`Plan`], decided from the configuration and from whether there is a log.
//! What the plan leads to is a [`Birth`]: identities and the first entries of the log. Only the
//! functions named for it ask other members or write files; the rest is decided from values.

pub mod adopt;
pub mod force;
pub mod found;
pub mod join;
pub mod remote;

use std::net::{IpAddr, ToSocketAddrs};
use std::path::Path;
use std::time::{Duration, Instant};

use quorate_proto::{raftpb, walpb};

use self::join::MatchError;
use self::remote::RemoteError;

use crate::actors::disk::SharedDisk;
use crate::config::duration::GoDuration;
use crate::config::{ClusterState, Config, ConfigError, Url};
use crate::core::membership::Version;
use crate::core::raft::confchange::ConfChangeError;
use crate::core::types::{ClusterId, Index, MemberId};
use crate::storage::wal_log::{WalError, WalLog, WalOptions};
use crate::transport::peer::client::Dialer;

/// How long, and how often, a host name of a first start is looked up (operations 2.3).
pub const RESOLVE_PATIENCE: Duration = Duration::from_secs(30);
pub const RESOLVE_PAUSE: Duration = Duration::from_secs(1);

/// Why a member does not come into being. The operator mends the configuration, or removes what
/// stands in the way.
#[derive(thiserror::Error, Debug)]
pub enum BootstrapError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("member exists with identical ID {id} (members {name:?} and {other:?})")]
    SameId { id: MemberId, name: String, other: String },
    #[error("cannot use 0 as member id (member {0:?})")]
    ZeroId(String),
    #[error("member {0} has already been bootstrapped")]
    AlreadyBootstrapped(MemberId),
    #[error("cannot fetch cluster info from peer urls: {0}")]
    NoCluster(#[source] RemoteError),
    #[error("error validating peerURLs {existing}: {error}")]
    Mismatch { existing: String, error: MatchError },
    #[error("incompatible with current running cluster")]
    Incompatible,
    #[error("membership: too many learner members in cluster")]
    TooManyLearners,
    #[error("member {0} was removed from the cluster: --force-new-cluster cannot bring it back")]
    RemovedForGood(MemberId),
    #[error(
        "member {0} is a learner and holds no vote: --force-new-cluster needs a member that votes"
    )]
    Learner(MemberId),
    #[error("log entry {index}: {source}")]
    BadChange { index: Index, source: ConfChangeError },
    #[error(transparent)]
    Wal(#[from] WalError),
}

/// What a start comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// There is a log: the member goes on where it ends, and what was said about a first start is
    /// without meaning.
    Restart,
    /// A new cluster, of the members that the configuration names.
    Found,
    /// A cluster that runs, and that has been told of this member.
    Join,
}

impl Plan {
    /// The way that a configuration asks for.
    pub fn of(config: &Config, has_log: bool) -> Self {
        match config.cluster.state {
            _ if has_log => Plan::Restart,
            ClusterState::New => Plan::Found,
            ClusterState::Existing => Plan::Join,
        }
    }
}

/// What a member begins with.
#[derive(Clone, PartialEq, Debug)]
pub struct Birth {
    pub member_id: MemberId,
    pub cluster_id: ClusterId,
    /// The first entries of its log; none for a member that joins, which is sent them.
    pub entries: Vec<raftpb::Entry>,
    /// All zero without entries.
    pub hard_state: raftpb::HardState,
    /// The other members where the log does not tell of them yet: who may be dialled before it does.
    pub remotes: Vec<(MemberId, Vec<Url>)>,
}

impl Birth {
    /// Writes the log that the member begins with, to the disk: whole, or a crash leaves none.
    ///
    /// # Errors
    /// What the log says.
    pub fn write_log(&self, disk: &SharedDisk, wal_dir: &Path) -> Result<(), WalError> {
        let metadata = walpb::Metadata {
            node_id: Some(self.member_id.0),
            cluster_id: Some(self.cluster_id.0),
        };
        let options = WalOptions::default();
        let (entries, state) = (&self.entries, &self.hard_state);
        WalLog::create_holding(disk.clone(), wal_dir, &metadata, entries, state, options)?.close()
    }
}

/// Decides what a member without a log begins with; [`check_first_start`] has passed. `None` for a
/// restart.
///
/// # Errors
/// [`BootstrapError`].
pub async fn birth(
    config: &Config,
    plan: Plan,
    dialer: &Dialer,
    own_version: Version,
) -> Result<Option<Birth>, BootstrapError> {
    Ok(match plan {
        Plan::Restart => {
            log_ignored(config);
            None
        }
        Plan::Found => Some(found::found(config, dialer).await?),
        Plan::Join => Some(join::join(config, dialer, own_version, &resolve).await?),
    })
}

fn log_ignored(config: &Config) {
    if !config.discovery.endpoints.is_empty() {
        tracing::warn!(
            "wal-dir" = %config.member.wal_dir().display(),
            "discovery token is ignored since cluster already initialized; valid logs are found"
        );
    }
    // Identities and members come from the directory, even if the configuration has become that of
    // another cluster.
    tracing::info!(
        "wal-dir" = %config.member.wal_dir().display(),
        "member goes on from its data directory; initial-cluster settings are not looked at"
    );
}

/// The address that the system's resolver has for a host; IPv4 first, as Go has it.
pub fn resolve(host: &str) -> std::io::Result<IpAddr> {
    let found: Vec<IpAddr> = (host, 0).to_socket_addrs()?.map(|address| address.ip()).collect();
    let v4 = found.iter().find(|ip| ip.is_ipv4());
    let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    v4.or(found.first()).copied().ok_or_else(none)
}

/// Checks what a first start rests on. A name that does not resolve yet is asked for again, since in
/// many installations it appears only once the process runs (operations 2.3).
///
/// # Errors
/// [`ConfigError`], with etcd's text.
pub fn check_first_start(
    config: &Config,
    plan: Plan,
    lookup: &dyn Fn(&str) -> std::io::Result<IpAddr>,
    patience: Duration,
    pause: Duration,
) -> Result<(), ConfigError> {
    let deadline = Instant::now() + patience;
    loop {
        let checked = match plan {
            Plan::Restart => Ok(()),
            Plan::Found => config.check_bootstrap(lookup),
            Plan::Join => config.check_join(),
        };
        match checked {
            Err(error @ ConfigError::Resolve { .. }) if Instant::now() + pause < deadline => {
                tracing::warn!(
                    %error,
                    "retry-interval" = %GoDuration::from(pause),
                    "failed to resolve URL Host"
                );
                std::thread::sleep(pause);
            }
            checked => return checked,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;

    use super::*;

    /// A first start that advertises an address and is entered under a name.
    fn named() -> Config {
        let mut config = Config::default();
        let url = |text| Url::parse(text).unwrap();
        config.member.name = "m".to_string();
        config.cluster.advertise_peer_urls = vec![url("http://10.0.0.1:2380")];
        config.cluster.initial =
            std::iter::once(("m".to_string(), vec![url("http://host:2380")])).collect();
        config
    }

    fn check(
        config: &Config,
        lookup: impl Fn(u32) -> io::Result<IpAddr>,
        patience: Duration,
    ) -> (u32, Result<(), String>) {
        let asked = Cell::new(0);
        let count = |_: &str| {
            asked.set(asked.get() + 1);
            lookup(asked.get())
        };
        let checked =
            check_first_start(config, Plan::Found, &count, patience, Duration::from_millis(1));
        (asked.get(), checked.map_err(|error| error.to_string()))
    }

    #[test]
    fn a_name_that_does_not_resolve_yet_is_asked_for_again() {
        let late = |n| match n {
            ..4 => Err(io::Error::other("no such host")),
            _ => Ok(IpAddr::from([10, 0, 0, 1])),
        };
        assert_eq!(check(&named(), late, Duration::from_secs(60)), (4, Ok(())));
        let (asked, checked) =
            check(&named(), |_| Err(io::Error::other("no such host")), Duration::from_millis(20));
        assert!((2..30).contains(&asked), "{asked}");
        assert_eq!(
            checked.unwrap_err(),
            "failed to resolve http://host:2380 to match --initial-cluster=m=http://host:2380 \
             (no such host)"
        );
    }

    #[test]
    fn what_no_retry_mends_fails_at_once() {
        let (asked, checked) =
            check(&named(), |_| Ok(IpAddr::from([10, 0, 0, 2])), Duration::from_secs(60));
        assert_eq!(asked, 1);
        assert!(checked.unwrap_err().starts_with("--initial-cluster has m=http://host:2380 but"));
        let mut config = named();
        config.member.name = "other".to_string();
        let (asked, checked) =
            check(&config, |_| Err(io::Error::other("never asked")), Duration::from_secs(60));
        assert_eq!(asked, 0);
        assert!(checked.unwrap_err().starts_with("couldn't find local name \"other\""));
    }

    #[test]
    fn addresses_resolve_to_themselves_and_localhost_to_the_loopback() {
        assert_eq!(resolve("192.0.2.1").unwrap(), IpAddr::from([192, 0, 2, 1]));
        assert!(resolve("localhost").unwrap().is_loopback());
        assert!(resolve("does.not.exist.invalid").is_err());
    }
}
