//! Founding a cluster: the identities follow from names, URLs and token, so that every founder comes
//! to the same ones by itself, and all their logs begin with the same entries.

use std::collections::BTreeMap;

use prost::Message as _;
use quorate_proto::raftpb;

use super::{Birth, BootstrapError};
use crate::config::{Config, Url};
use crate::core::membership::{ChangeContext, Member, cluster_id, member_id};
use crate::core::types::MemberId;

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
                data: change.encode_to_vec().into(),
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
/// `SameId`, `ZeroId`.
pub fn found(config: &Config) -> Result<Birth, BootstrapError> {
    let members = founders(&config.cluster.initial, &config.cluster.token)?;
    let own = own(&members, &config.member.name);
    Ok(birth(&members, own))
}

/// The identity of the member called `name`.
///
/// # Panics
/// If there is none: the configuration was checked for it.
pub fn own(members: &BTreeMap<MemberId, Member>, name: &str) -> MemberId {
    let found = members.iter().find(|(_, member)| member.name == name);
    *found.expect("a checked configuration names its own member").0
}
