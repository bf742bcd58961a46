//! Joining a cluster that runs: identities come from there, for the cluster was told of this member
//! before (formats-and-peers 6.6).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use quorate_proto::raftpb;
use tokio::task::JoinSet;

use super::remote::{self, RemoteCluster, Versions};
use super::{Birth, BootstrapError};
use crate::config::duration::GoDuration;
use crate::config::{Config, Url};
use crate::core::membership::Version;
use crate::core::types::MemberId;
use crate::transport::peer::client::Dialer;

/// How long one member has to say who the members are.
pub const MEMBERS_TIMEOUT: Duration = Duration::from_secs(10);
/// The oldest cluster version that can be joined.
const OLDEST: Version = Version { major: 3, minor: 0, patch: 0 };

/// Why a cluster is not the one that the configuration describes.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum MatchError {
    #[error("member count is unequal")]
    Count,
    #[error(
        "PeerURLs: no match found for existing member ({id}, [{}]), last resolver error ({error})",
        urls.join(" ")
    )]
    NoMatch { id: MemberId, urls: Vec<String>, error: String },
}

/// Name lookups, asked again until a deadline that they share.
pub struct Names<'a> {
    pub lookup: &'a dyn Fn(&str) -> io::Result<IpAddr>,
    pub deadline: Instant,
    pub pause: Duration,
}

impl Names<'_> {
    /// `url` with an address for its host's name; `localhost` and files stay what they are.
    fn resolve(&self, url: &Url) -> Result<Url, String> {
        if url.scheme().is_unix() || url.host_name() == "localhost" {
            return Ok(url.clone());
        }
        loop {
            match url.ip().map_or_else(|| (self.lookup)(url.host_name()), Ok) {
                Ok(ip) => return Ok(Url::new(url.scheme(), &ip.to_string(), url.port())),
                Err(error) if Instant::now() + self.pause >= self.deadline => {
                    return Err(format!("failed to resolve {:?} ({error})", url.as_str()));
                }
                Err(error) => {
                    tracing::warn!(
                        url = url.as_str(),
                        host = url.host(),
                        "retry-interval" = %GoDuration::from(self.pause),
                        %error,
                        "failed to resolve URL Host"
                    );
                    std::thread::sleep(self.pause);
                }
            }
        }
    }

    fn resolve_all(&self, urls: &[Url]) -> Result<Vec<Url>, String> {
        let mut resolved =
            urls.iter().map(|url| self.resolve(url)).collect::<Result<Vec<_>, _>>()?;
        resolved.sort();
        Ok(resolved)
    }

    /// Whether both lists come to the same addresses; if not, why.
    fn same(&self, a: &[Url], b: &[Url]) -> Result<(), String> {
        let quoted = |urls: &[Url]| {
            let quoted: Vec<_> = urls.iter().map(|url| format!("{:?}", url.as_str())).collect();
            quoted.join(" ")
        };
        if a.len() != b.len() {
            return Err(format!("len([{}]) != len([{}])", quoted(a), quoted(b)));
        }
        let (a, b) = (self.resolve_all(a)?, self.resolve_all(b)?);
        match a.iter().zip(&b).find(|(a, b)| a != b) {
            Some((a, b)) => Err(format!("resolved urls: {:?} != {:?}", a.as_str(), b.as_str())),
            None => Ok(()),
        }
    }
}

/// Finds out which member of `existing` each of our `initial` ones is, by their peer URLs: first as
/// they are written, so that no name is looked up without need.
///
/// # Errors
/// [`MatchError`].
pub fn adopt<'a>(
    initial: &'a BTreeMap<String, Vec<Url>>,
    existing: &RemoteCluster,
    names: &Names<'_>,
) -> Result<BTreeMap<&'a str, MemberId>, MatchError> {
    if existing.members.len() != initial.len() {
        return Err(MatchError::Count);
    }
    let mut left: BTreeMap<&str, &[Url]> =
        initial.iter().map(|(name, urls)| (name.as_str(), urls.as_slice())).collect();
    let mut adopted = BTreeMap::new();
    let mut unlike = Vec::new();
    for member in &existing.members {
        let id = MemberId(member.id);
        let no_match = |error| MatchError::NoMatch { id, urls: member.peer_urls.clone(), error };
        let urls: Result<Vec<Url>, _> = member.peer_urls.iter().map(|u| Url::parse(u)).collect();
        let mut urls = urls.map_err(|error| no_match(error.to_string()))?;
        urls.sort();
        let found = left.iter().find(|(_, ours)| ***ours == *urls).map(|(name, _)| *name);
        match found {
            Some(name) => {
                left.remove(name);
                adopted.insert(name, id);
            }
            None => unlike.push((id, member, urls)),
        }
    }
    for (id, member, urls) in unlike {
        let mut last = "every member of the initial cluster is another one".to_owned();
        let found = left.iter().find_map(|(name, ours)| match names.same(&urls, ours) {
            Ok(()) => Some(*name),
            Err(error) => {
                last = error;
                None
            }
        });
        let Some(name) = found else {
            let urls = member.peer_urls.clone();
            return Err(MatchError::NoMatch { id, urls, error: last });
        };
        left.remove(name);
        adopted.insert(name, id);
    }
    Ok(adopted)
}

/// Whether a member of version `own` may join a cluster whose members say what `told` holds. Under a
/// downgrade only the cluster version just above its own may be joined; else none above its own.
pub fn compatible(told: &[(MemberId, Option<Versions>)], own: Version, downgrading: bool) -> bool {
    let newest = Version { minor: own.minor + u32::from(downgrading), patch: 0, ..own };
    let oldest = if downgrading { newest } else { OLDEST };
    let mut answered = false;
    for (id, versions) in told {
        let Some(versions) = versions else { continue };
        let Some(cluster) = Version::parse(&versions.cluster) else {
            tracing::warn!(
                "remote-member-id" = %id,
                "remote-member-cluster-version" = versions.cluster,
                "failed to parse cluster version of remote member"
            );
            continue;
        };
        if cluster < oldest {
            tracing::warn!(
                "remote-member-id" = %id,
                "remote-member-cluster-version" = %cluster,
                "minimum-cluster-version-supported" = %oldest,
                "cluster version of remote member is not compatible; too low"
            );
            return false;
        }
        if cluster > newest {
            tracing::warn!(
                "remote-member-id" = %id,
                "remote-member-cluster-version" = %cluster,
                "maximum-cluster-version-supported" = %newest,
                "cluster version of remote member is not compatible; too high"
            );
            return false;
        }
        answered = true;
    }
    answered
}

/// The peer URLs of all but `own`, sorted.
pub fn others(initial: &BTreeMap<String, Vec<Url>>, own: &str) -> Vec<Url> {
    let others = initial.iter().filter(|(name, _)| *name != own);
    let mut urls: Vec<Url> = others.flat_map(|(_, urls)| urls).cloned().collect();
    urls.sort();
    urls
}

/// Asks the cluster that `config` describes, for which [`super::check_first_start`] has passed, who
/// this member is.
///
/// # Errors
/// [`BootstrapError`], with etcd's text.
pub async fn join(
    config: &Config,
    dialer: &Dialer,
    own_version: Version,
    lookup: &dyn Fn(&str) -> io::Result<IpAddr>,
) -> Result<Birth, BootstrapError> {
    let initial = &config.cluster.initial;
    let own_name = config.member.name.as_str();
    let others = others(initial, own_name);
    let existing = remote::cluster(&dialer.within(MEMBERS_TIMEOUT), &others, true)
        .await
        .map_err(BootstrapError::NoCluster)?;
    let names = Names {
        lookup,
        deadline: Instant::now() + super::RESOLVE_PATIENCE,
        pause: super::RESOLVE_PAUSE,
    };
    let adopted = adopt(initial, &existing, &names)
        .map_err(|error| BootstrapError::Mismatch { existing: existing.to_string(), error })?;
    let own = adopted[own_name];
    let remotes: Vec<(MemberId, Vec<Url>)> = existing
        .members
        .iter()
        .filter(|member| member.id != own.0)
        .map(|member| {
            let urls = member.peer_urls.iter().map(|url| Url::parse(url));
            (MemberId(member.id), urls.collect::<Result<_, _>>().expect("adopted by its URLs"))
        })
        .collect();
    check_versions(&dialer.within(config.raft.request_timeout()), &remotes, own_version).await?;
    let learners = existing.members.iter().filter(|member| member.is_learner).count();
    if i64::try_from(learners).unwrap_or(i64::MAX) > config.cluster.max_learners {
        return Err(BootstrapError::TooManyLearners);
    }
    Ok(Birth {
        member_id: own,
        cluster_id: existing.id,
        entries: Vec::new(),
        hard_state: raftpb::HardState::default(),
        remotes,
    })
}

async fn check_versions(
    dialer: &Dialer,
    remotes: &[(MemberId, Vec<Url>)],
    own: Version,
) -> Result<(), BootstrapError> {
    let mut asking = JoinSet::new();
    for (id, urls) in remotes.iter().cloned() {
        let dialer = dialer.clone();
        asking.spawn(async move { (id, remote::versions(&dialer, id, &urls).await) });
    }
    let mut told = asking.join_all().await;
    told.sort_by_key(|(id, _)| *id);
    // The answer is read through the log there, so that of one member will do.
    let mut downgrading = false;
    for (id, urls) in remotes {
        if let Some(answer) = remote::downgrading(dialer, *id, urls).await {
            downgrading = answer;
            break;
        }
    }
    if compatible(&told, own, downgrading) { Ok(()) } else { Err(BootstrapError::Incompatible) }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::core::membership::Member;
    use crate::core::types::ClusterId;

    fn initial(members: &[(&str, &[&str])]) -> BTreeMap<String, Vec<Url>> {
        let urls = |urls: &[&str]| urls.iter().map(|url| Url::parse(url).unwrap()).collect();
        members.iter().map(|(name, list)| ((*name).to_owned(), urls(list))).collect()
    }

    fn existing(members: &[(u64, &[&str])]) -> RemoteCluster {
        let member = |(id, urls): &(u64, &[&str])| Member {
            id: *id,
            peer_urls: urls.iter().map(ToString::to_string).collect(),
            ..Member::default()
        };
        RemoteCluster { id: ClusterId(1), members: members.iter().map(member).collect() }
    }

    fn adopted(
        ours: &[(&str, &[&str])],
        theirs: &[(u64, &[&str])],
    ) -> (Result<Vec<(String, u64)>, String>, Vec<String>) {
        let asked = RefCell::new(Vec::new());
        let lookup = |host: &str| {
            asked.borrow_mut().push(host.to_owned());
            match host {
                "x.test" => Ok(IpAddr::from([10, 0, 0, 1])),
                _ => Err(io::Error::other("no such host")),
            }
        };
        let names =
            Names { lookup: &lookup, deadline: Instant::now(), pause: Duration::from_millis(1) };
        let ours = initial(ours);
        let result = adopt(&ours, &existing(theirs), &names)
            .map(|ids| ids.into_iter().map(|(name, id)| (name.to_owned(), id.0)).collect())
            .map_err(|error| error.to_string());
        (result, asked.into_inner())
    }

    #[test]
    fn members_are_known_by_their_urls_whatever_their_order() {
        let ours: &[(&str, &[&str])] =
            &[("a", &["http://10.0.0.1:1", "http://10.0.0.1:2"]), ("b", &["http://10.0.0.2:1"])];
        let (ids, asked) = adopted(
            ours,
            &[(7, &["http://10.0.0.2:1"]), (9, &["http://10.0.0.1:2", "http://10.0.0.1:1"])],
        );
        assert_eq!(ids.unwrap(), [("a".to_owned(), 9), ("b".to_owned(), 7)]);
        assert_eq!(asked, Vec::<String>::new());
    }

    #[test]
    fn a_name_is_looked_up_only_where_the_texts_differ() {
        let ours: &[(&str, &[&str])] =
            &[("a", &["http://x.test:1"]), ("b", &["http://unknown.test:1"])];
        let theirs: &[(u64, &[&str])] =
            &[(7, &["http://10.0.0.1:1"]), (9, &["http://unknown.test:1"])];
        let (ids, asked) = adopted(ours, theirs);
        assert_eq!(ids.unwrap(), [("a".to_owned(), 7), ("b".to_owned(), 9)]);
        assert_eq!(asked, ["x.test"]);
        // IPv6 addresses have several spellings.
        let (ids, _) = adopted(&[("a", &["http://[0:0::1]:1"])], &[(7, &["http://[::1]:1"])]);
        assert_eq!(ids.unwrap(), [("a".to_owned(), 7)]);
    }

    #[test]
    fn another_cluster_is_refused_with_the_member_that_does_not_fit() {
        for (ours, theirs, text) in [
            (&[("a", &["http://10.0.0.1:1"][..])][..], &[][..], "member count is unequal"),
            (
                &[("a", &["http://10.0.0.1:1"])],
                &[(0xabc, &["http://10.0.0.9:1"][..])],
                "PeerURLs: no match found for existing member (abc, [http://10.0.0.9:1]), last \
                 resolver error (resolved urls: \"http://10.0.0.9:1\" != \"http://10.0.0.1:1\")",
            ),
            (
                &[("a", &["http://10.0.0.1:1"])],
                &[(1, &["http://10.0.0.1:1", "http://10.0.0.1:2"])],
                "PeerURLs: no match found for existing member (1, [http://10.0.0.1:1 \
                 http://10.0.0.1:2]), last resolver error (len([\"http://10.0.0.1:1\" \
                 \"http://10.0.0.1:2\"]) != len([\"http://10.0.0.1:1\"]))",
            ),
            (
                &[("a", &["http://y.test:1"])],
                &[(1, &["http://10.0.0.1:1"])],
                "PeerURLs: no match found for existing member (1, [http://10.0.0.1:1]), last \
                 resolver error (failed to resolve \"http://y.test:1\" (no such host))",
            ),
            (
                &[("a", &["http://10.0.0.1:1"])],
                &[(1, &["ftp://10.0.0.1:1"])],
                "PeerURLs: no match found for existing member (1, [ftp://10.0.0.1:1]), last \
                 resolver error (URL scheme must be http, https, unix, or unixs: \
                 ftp://10.0.0.1:1)",
            ),
        ] {
            assert_eq!(adopted(ours, theirs).0.unwrap_err(), text);
        }
    }

    #[test]
    fn versions_must_lie_in_the_range_that_can_be_joined() {
        let own = Version::parse("3.7.1").unwrap();
        let told = |versions: &[Option<&str>]| -> Vec<(MemberId, Option<Versions>)> {
            let told =
                |text: &&str| Versions { cluster: (*text).to_owned(), ..Versions::default() };
            (1..).map(MemberId).zip(versions.iter().map(|v| v.as_ref().map(told))).collect()
        };
        for (versions, downgrading, expected) in [
            (&[Some("3.7.0"), None][..], false, true),
            (&[Some("3.0.0")], false, true),
            (&[Some("2.3.0")], false, false),
            (&[Some("3.8.0")], false, false),
            (&[Some("4.0.0")], false, false),
            (&[Some("3.6.0"), Some("3.8.0")], false, false),
            (&[Some("not_decided"), Some("3.5.0")], false, true),
            // Somebody has to answer.
            (&[Some("not_decided")], false, false),
            (&[None, None], false, false),
            (&[], false, false),
            (&[Some("3.8.0")], true, true),
            (&[Some("3.7.0")], true, false),
            (&[Some("3.9.0")], true, false),
        ] {
            assert_eq!(compatible(&told(versions), own, downgrading), expected, "{versions:?}");
        }
    }

    #[test]
    fn all_but_the_own_urls_are_asked_in_order() {
        let initial = initial(&[
            ("a", &["http://c:1"]),
            ("b", &["http://b:1"]),
            ("c", &["http://a:1", "http://d:1"]),
        ]);
        let urls: Vec<String> =
            others(&initial, "b").iter().map(|url| url.as_str().to_owned()).collect();
        assert_eq!(urls, ["http://a:1", "http://c:1", "http://d:1"]);
    }
}
