//! Founding a cluster: the identities follow from names, URLs and token, so that every founder comes
//! to the same ones by itself, and all their logs begin with the same entries.

use std::collections::BTreeMap;
use std::time::Duration;

use quorate_proto::raftpb;
use tokio::task::JoinSet;

use super::join::others;
use super::remote::{self, RemoteCluster};
use super::{Birth, BootstrapError};
use crate::config::{Config, Url};
use crate::core::membership::{ChangeContext, Member, cluster_id, member_id};
use crate::core::raft::confchange;
use crate::core::types::MemberId;
use crate::transport::peer::client::Dialer;

/// How long one member has to say who the members are. A founder asks in vain as a rule, for the
/// others start when it does.
const MEMBERS_TIMEOUT: Duration = Duration::from_secs(1);

/// The members that a configuration names, by the identities that they get.
///
/// # Errors
/// `SameId`, `ZeroId`.
pub fn founders(
    initial: &BTreeMap<String, Vec<Url>>,
    token: &str,
) -> Result<BTreeMap<MemberId, Member>, BootstrapError> {
    let mut members: BTreeMap<MemberId, Member> = BTreeMap::new();
    for (name, urls) in initial {
        let mut peer_urls: Vec<String> = urls.iter().map(|url| url.as_str().to_owned()).collect();
        peer_urls.sort();
        let id = member_id(&peer_urls, token, None);
        if id.0 == 0 {
            return Err(BootstrapError::ZeroId(name.clone()));
        }
        let member = Member { id: id.0, peer_urls, name: name.clone(), ..Member::default() };
        if let Some(other) = members.insert(id, member) {
            return Err(BootstrapError::SameId { id, name: name.clone(), other: other.name });
        }
    }
    Ok(members)
}

/// What the founder `own` of a cluster begins with: one addition for each member, in the order of
/// their IDs, all of them committed in term 1 (formats-and-peers 1.5).
pub fn birth(members: &BTreeMap<MemberId, Member>, own: MemberId) -> Birth {
    let entries: Vec<raftpb::Entry> = (1..)
        .zip(members)
        .map(|(index, (id, member))| {
            let context = ChangeContext { member: member.clone(), is_promote: false };
            let change = raftpb::ConfChange {
                id: 0,
                r#type: raftpb::ConfChangeType::AddNode as i32,
                node_id: id.0,
                context: serde_json::to_vec(&context).expect("a member is always JSON").into(),
            };
            raftpb::Entry {
                r#type: raftpb::EntryType::EntryConfChange as i32,
                term: 1,
                index,
                data: confchange::encode(&change),
            }
        })
        .collect();
    Birth {
        member_id: own,
        cluster_id: cluster_id(members.keys().copied()),
        hard_state: raftpb::HardState { term: 1, vote: 0, commit: entries.len() as u64 },
        entries,
        remotes: Vec::new(),
    }
}

/// Founds the cluster that `config` names, for which [`super::check_first_start`] has passed.
///
/// # Errors
/// `SameId`, `ZeroId`; `AlreadyBootstrapped` if another member knows this one as one that has run: its
/// data is lost, and with it votes and entries that it has confirmed. Nobody need answer.
pub async fn found(config: &Config, dialer: &Dialer) -> Result<Birth, BootstrapError> {
    let members = founders(&config.cluster.initial, &config.cluster.token)?;
    let own = own(&members, &config.member.name);
    let others = others(&config.cluster.initial, &config.member.name);
    // All at once: founders that started together have ports that nobody answers at yet.
    let mut asking = JoinSet::new();
    for url in others {
        let dialer = dialer.within(MEMBERS_TIMEOUT);
        asking.spawn(async move { remote::cluster(&dialer, &[url], false).await });
    }
    if asking.join_all().await.iter().flatten().any(|running| has_run(running, own)) {
        return Err(BootstrapError::AlreadyBootstrapped(own));
    }
    Ok(birth(&members, own))
}

/// Whether `running` knows `own` as a member that has published where clients find it.
pub fn has_run(running: &RemoteCluster, own: MemberId) -> bool {
    running.members.iter().any(|member| member.id == own.0 && !member.client_urls.is_empty())
}

/// The identity of the member called `name`.
///
/// # Panics
/// If there is none: the configuration was checked for it.
pub fn own(members: &BTreeMap<MemberId, Member>, name: &str) -> MemberId {
    let found = members.iter().find(|(_, member)| member.name == name);
    *found.expect("a checked configuration names its own member").0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::types::ClusterId;

    fn initial(members: &[(&str, &str)]) -> BTreeMap<String, Vec<Url>> {
        let mut initial: BTreeMap<String, Vec<Url>> = BTreeMap::new();
        for (name, url) in members {
            initial.entry((*name).to_owned()).or_default().push(Url::parse(url).unwrap());
        }
        initial
    }

    fn three() -> BTreeMap<String, Vec<Url>> {
        initial(&[
            ("infra1", "http://127.0.0.1:12380"),
            ("infra2", "http://127.0.0.1:22380"),
            ("infra3", "http://127.0.0.1:32380"),
        ])
    }

    #[test]
    fn every_founder_begins_with_the_same_log() {
        let members = founders(&three(), "etcd-cluster-1").unwrap();
        let ids = ["infra1", "infra2", "infra3"].map(|name| own(&members, name));
        assert_eq!(
            ids.map(|id| id.to_string()),
            ["8211f1d0f64f3269", "91bc3c398fb3c146", "fd422379fda50e48"]
        );
        let births = ids.map(|id| birth(&members, id));
        for (id, born) in ids.iter().zip(&births) {
            assert_eq!(born.member_id, *id);
            assert_eq!(born.cluster_id.to_string(), "ef37ad9dc622a7c4");
            assert_eq!(born.entries, births[0].entries);
            assert_eq!(born.hard_state, raftpb::HardState { term: 1, vote: 0, commit: 3 });
            assert_eq!(born.remotes, []);
        }
        for (n, (entry, id)) in births[0].entries.iter().zip(&ids).enumerate() {
            assert_eq!((entry.term, entry.index), (1, n as u64 + 1));
            let change = confchange::decode(&entry.data).unwrap();
            assert_eq!((change.id, change.node_id), (0, id.0));
            let port = ["12380", "22380", "32380"][n];
            assert_eq!(
                std::str::from_utf8(&change.context).unwrap(),
                format!(
                    r#"{{"id":{},"peerURLs":["http://127.0.0.1:{port}"],"name":"infra{}"}}"#,
                    id.0,
                    n + 1
                )
            );
        }
    }

    #[test]
    fn a_member_of_several_urls_is_one_member() {
        let initial = initial(&[("a", "http://b:1"), ("a", "http://a:1"), ("b", "http://c:1")]);
        let members = founders(&initial, "t").unwrap();
        assert_eq!(members.len(), 2);
        let urls = ["http://a:1".to_owned(), "http://b:1".to_owned()];
        assert_eq!(members[&own(&members, "a")].peer_urls, urls);
        assert_eq!(own(&members, "a"), member_id(&urls, "t", None));
    }

    #[test]
    fn equal_identities_are_refused() {
        let initial = initial(&[("a", "http://h:1"), ("b", "http://h:1")]);
        let id = member_id(&["http://h:1".to_owned()], "t", None);
        assert_eq!(
            founders(&initial, "t").unwrap_err().to_string(),
            format!("member exists with identical ID {id} (members \"b\" and \"a\")")
        );
    }

    #[test]
    fn only_a_member_with_client_urls_has_run() {
        let members = founders(&three(), "t").unwrap();
        let own = own(&members, "infra1");
        let running = |changed: fn(&mut Member)| {
            let mut members: Vec<Member> = members.values().cloned().collect();
            members.iter_mut().filter(|member| member.id == own.0).for_each(changed);
            RemoteCluster { id: ClusterId(1), members }
        };
        assert!(!has_run(&running(|_| {}), own));
        assert!(has_run(&running(|m| m.client_urls.push("http://c:1".to_owned())), own));
        assert!(!has_run(&running(|m| (m.id, m.client_urls) = (1, vec!["u".to_owned()])), own));
    }
}
