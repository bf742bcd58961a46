//! Who belongs to the cluster: identities, the member list, the cluster version.

use std::collections::{BTreeMap, BTreeSet};

use quorate_proto::raftpb;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use super::types::{ClusterId, MemberId};

fn first_eight_bytes(digest: impl AsRef<[u8]>) -> u64 {
    u64::from_be_bytes(digest.as_ref()[..8].try_into().expect("SHA-1 has 20 bytes"))
}

/// The identity of a member (operations 2.1): `token` at bootstrap; an empty token and the Unix time
/// in seconds for a member added at run time.
pub fn member_id(peer_urls: &[String], token: &str, added_s: Option<u64>) -> MemberId {
    let mut urls: Vec<&str> = peer_urls.iter().map(String::as_str).collect();
    urls.sort_unstable();
    let mut hash = Sha1::new();
    for url in urls {
        hash.update(url);
    }
    hash.update(token);
    if let Some(seconds) = added_s {
        hash.update(seconds.to_string());
    }
    MemberId(first_eight_bytes(hash.finalize()))
}

/// The identity of a cluster: of the members that it was founded with.
pub fn cluster_id(members: impl IntoIterator<Item = MemberId>) -> ClusterId {
    let ids: BTreeSet<MemberId> = members.into_iter().collect();
    let mut hash = Sha1::new();
    for id in ids {
        hash.update(id.0.to_be_bytes());
    }
    ClusterId(first_eight_bytes(hash.finalize()))
}

/// A member as etcd writes it: in the `members` bucket and in a conf change's context
/// (formats-and-peers 3.3).
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub id: u64,
    #[serde(
        rename = "peerURLs",
        default,
        serialize_with = "empty_is_null",
        deserialize_with = "null_is_empty"
    )]
    pub peer_urls: Vec<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_learner: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(
        rename = "clientURLs",
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "null_is_empty"
    )]
    pub client_urls: Vec<String>,
}

/// Go writes an empty list as `null`.
pub(super) fn null_is_empty<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// As Go writes a list that was never set.
fn empty_is_null<S: serde::Serializer>(list: &[String], to: S) -> Result<S::Ok, S::Error> {
    if list.is_empty() { to.serialize_none() } else { list.serialize(to) }
}

/// The context of a conf change.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct ChangeContext {
    #[serde(flatten)]
    pub member: Member,
    #[serde(rename = "isPromote", default, skip_serializing_if = "std::ops::Not::not")]
    pub is_promote: bool,
}

/// A version of the cluster or of a server, patch included.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    /// Reads `X.Y` or `X.Y.Z`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
        let version = Version {
            major: parts.next()??,
            minor: parts.next()??,
            patch: parts.next().unwrap_or(Some(0))?,
        };
        parts.next().is_none().then_some(version)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why a membership change is refused at apply; the same on every member.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum MembershipError {
    #[error("member {0} was removed from the cluster")]
    Removed(MemberId),
    #[error("member {0} exists already")]
    IdExists(MemberId),
    #[error("peer URL {0} belongs to another member")]
    PeerUrlExists(String),
    #[error("member {0} is not in the cluster")]
    NotFound(MemberId),
    #[error("member {0} is not a learner")]
    NotLearner(MemberId),
    #[error("the cluster has {0} learners, the most allowed")]
    TooManyLearners(usize),
    #[error("the context of the change does not decode: {0}")]
    Malformed(String),
}

/// What a membership change did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MembershipChange {
    /// The member was added or altered; its record is to be stored.
    Stored(MemberId),
    Removed(MemberId),
}

/// The members of the cluster at the applied index.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Membership {
    pub cluster_id: ClusterId,
    /// This member.
    pub local: MemberId,
    members: BTreeMap<MemberId, Member>,
    removed: BTreeSet<MemberId>,
    pub cluster_version: Option<Version>,
    /// Learners allowed at once.
    pub learners_max: usize,
}

impl Membership {
    /// A membership without members: they come from the log or from [`Membership::restore`].
    pub fn new(cluster_id: ClusterId, local: MemberId, learners_max: usize) -> Self {
        Membership {
            cluster_id,
            local,
            members: BTreeMap::new(),
            removed: BTreeSet::new(),
            cluster_version: None,
            learners_max,
        }
    }

    /// Takes over stored records.
    pub fn restore(
        &mut self,
        members: impl IntoIterator<Item = Member>,
        removed: impl IntoIterator<Item = MemberId>,
    ) {
        self.members = members.into_iter().map(|member| (MemberId(member.id), member)).collect();
        self.removed = removed.into_iter().collect();
    }

    /// The members by ID.
    pub fn members(&self) -> impl ExactSizeIterator<Item = &Member> {
        self.members.values()
    }

    /// IDs that may never return.
    pub fn removed(&self) -> impl Iterator<Item = MemberId> + '_ {
        self.removed.iter().copied()
    }

    /// One member.
    pub fn get(&self, id: MemberId) -> Option<&Member> {
        self.members.get(&id)
    }

    /// Whether this member does not vote.
    pub fn is_learner(&self) -> bool {
        self.get(self.local).is_some_and(|member| member.is_learner)
    }

    /// The raft configuration that these members make, sorted.
    pub fn conf_state(&self) -> raftpb::ConfState {
        let ids = |learner: bool| {
            self.members.values().filter(|m| m.is_learner == learner).map(|m| m.id).collect()
        };
        raftpb::ConfState { voters: ids(false), learners: ids(true), ..Default::default() }
    }

    /// Checks a committed change and makes it (formats-and-peers 5.2).
    ///
    /// # Errors
    /// Nothing is changed; raft is then told of a change of node 0.
    pub fn apply(
        &mut self,
        change: &raftpb::ConfChange,
    ) -> Result<MembershipChange, MembershipError> {
        use raftpb::ConfChangeType as Type;
        let id = MemberId(change.node_id);
        if self.removed.contains(&id) {
            return Err(MembershipError::Removed(id));
        }
        let kind = Type::try_from(change.r#type)
            .map_err(|_| MembershipError::Malformed(format!("change type {}", change.r#type)))?;
        if kind == Type::RemoveNode {
            if self.members.remove(&id).is_none() {
                return Err(MembershipError::NotFound(id));
            }
            self.removed.insert(id);
            return Ok(MembershipChange::Removed(id));
        }
        let context: ChangeContext = serde_json::from_slice(&change.context)
            .map_err(|error| MembershipError::Malformed(error.to_string()))?;
        if context.is_promote {
            let learners_left = self.members.get_mut(&id).ok_or(MembershipError::NotFound(id))?;
            if !learners_left.is_learner {
                return Err(MembershipError::NotLearner(id));
            }
            learners_left.is_learner = false;
            return Ok(MembershipChange::Stored(id));
        }
        let mut member = context.member;
        member.id = id.0;
        if kind == Type::UpdateNode {
            if !self.members.contains_key(&id) {
                return Err(MembershipError::NotFound(id));
            }
        } else if self.members.contains_key(&id) {
            return Err(MembershipError::IdExists(id));
        }
        let taken = |url: &&String| {
            self.members.values().any(|other| other.id != id.0 && other.peer_urls.contains(*url))
        };
        if let Some(url) = member.peer_urls.iter().find(taken) {
            return Err(MembershipError::PeerUrlExists(url.clone()));
        }
        if kind == Type::UpdateNode {
            let stored = self.members.get_mut(&id).expect("checked above");
            stored.peer_urls = member.peer_urls;
            return Ok(MembershipChange::Stored(id));
        }
        member.is_learner = kind == Type::AddLearnerNode;
        let learners = self.members.values().filter(|m| m.is_learner).count();
        if member.is_learner && learners >= self.learners_max {
            return Err(MembershipError::TooManyLearners(learners));
        }
        self.members.insert(id, member);
        Ok(MembershipChange::Stored(id))
    }

    /// Records the name and client URLs that a member publishes; `None` if it is not in the cluster.
    pub fn set_attributes(
        &mut self,
        id: MemberId,
        name: &str,
        client_urls: &[String],
    ) -> Option<&Member> {
        let member = self.members.get_mut(&id)?;
        member.name = name.to_string();
        member.client_urls = client_urls.to_vec();
        Some(member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raftpb::ConfChangeType as Type;

    #[test]
    fn identities_are_those_of_etcd() {
        let urls = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let default = member_id(&urls(&["http://localhost:2380"]), "etcd-cluster", None);
        assert_eq!(default.to_string(), "8e9e05c52164694d");
        assert_eq!(cluster_id([default]).to_string(), "cdf818194e3a8c32");
        let three = ["12380", "22380", "32380"]
            .map(|port| format!("http://127.0.0.1:{port}"))
            .map(|url| member_id(&[url], "etcd-cluster-1", None));
        assert_eq!(
            three.map(|id| id.to_string()),
            ["8211f1d0f64f3269", "91bc3c398fb3c146", "fd422379fda50e48"]
        );
        assert_eq!(cluster_id(three).to_string(), "ef37ad9dc622a7c4");
        let url = urls(&["http://10.0.0.8:2379"]);
        assert_eq!(member_id(&url, "", None).0, 14544069596553697298);
        assert_eq!(member_id(&url, "", Some(472662245)).0, 2448790162483548276);
        assert_eq!(member_id(&url, "etcd", Some(472662245)).0, 6973882743191604649);
    }

    #[test]
    fn a_member_reads_and_writes_as_etcd_does() {
        let json = r#"{"id":10276657743932975437,"peerURLs":["http://localhost:2380"],"name":"default","clientURLs":["http://localhost:2379"]}"#;
        let member: Member = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&member).unwrap(), json);
        let json = r#"{"id":1,"peerURLs":null,"isPromote":true}"#;
        let promote: ChangeContext = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&promote).unwrap(), json);
        assert!(promote.is_promote && promote.member.peer_urls.is_empty());
    }

    fn change(kind: Type, id: u64, url: &str, promote: bool) -> raftpb::ConfChange {
        let member = Member { id, peer_urls: vec![url.into()], ..Member::default() };
        let context = ChangeContext { member, is_promote: promote };
        raftpb::ConfChange {
            id: 1,
            r#type: kind as i32,
            node_id: id,
            context: serde_json::to_vec(&context).unwrap().into(),
        }
    }

    #[test]
    fn changes_are_checked_before_they_are_made() {
        let mut members = Membership::new(ClusterId(1), MemberId(1), 1);
        let stored = |id| Ok(MembershipChange::Stored(MemberId(id)));
        assert_eq!(members.apply(&change(Type::AddNode, 1, "a", false)), stored(1));
        assert_eq!(
            members.apply(&change(Type::AddNode, 1, "b", false)),
            Err(MembershipError::IdExists(MemberId(1)))
        );
        assert_eq!(
            members.apply(&change(Type::AddNode, 2, "a", false)),
            Err(MembershipError::PeerUrlExists("a".into()))
        );
        assert_eq!(members.apply(&change(Type::AddLearnerNode, 2, "b", false)), stored(2));
        assert_eq!(members.conf_state().learners, [2]);
        assert_eq!(
            members.apply(&change(Type::AddLearnerNode, 3, "c", false)),
            Err(MembershipError::TooManyLearners(1))
        );
        assert_eq!(members.apply(&change(Type::AddNode, 2, "", true)), stored(2));
        assert_eq!(members.conf_state().voters, [1, 2]);
        assert_eq!(
            members.apply(&change(Type::AddNode, 2, "", true)),
            Err(MembershipError::NotLearner(MemberId(2)))
        );
        assert_eq!(members.apply(&change(Type::UpdateNode, 2, "z", false)), stored(2));
        assert_eq!(members.get(MemberId(2)).unwrap().peer_urls, ["z"]);
        assert_eq!(
            members.apply(&change(Type::RemoveNode, 2, "", false)),
            Ok(MembershipChange::Removed(MemberId(2)))
        );
        assert_eq!(
            members.apply(&change(Type::AddNode, 2, "q", false)),
            Err(MembershipError::Removed(MemberId(2)))
        );
    }

    #[test]
    fn versions_parse_and_sort() {
        assert_eq!(Version::parse("3.7").unwrap().to_string(), "3.7.0");
        assert!(Version::parse("3.10.1") > Version::parse("3.9.9"));
        for bad in ["", "3", "3.", "3.7.1.2", "a.b"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }
}
