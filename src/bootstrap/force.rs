//! Making one member the whole cluster, on the word of its operator: for a cluster that has lost its
//! quorum for good (operations 2.7).

use std::collections::BTreeSet;

use quorate_proto::raftpb;

use super::BootstrapError;
use crate::core::membership::{ChangeContext, Member, Membership};
use crate::core::raft::confchange;
use crate::core::types::{Index, MemberId};
use crate::storage::wal_log::{Recovered, WalLog};

/// The peer URL of a member that its own log does not know.
const UNKNOWN_PEER_URL: &str = "http://localhost:2380";

/// Who belongs to the cluster at the end of a log.
#[derive(Debug)]
struct Standing {
    members: BTreeSet<u64>,
    learners: BTreeSet<u64>,
    removed: BTreeSet<u64>,
}

impl Standing {
    /// `membership` with the changes among `entries` that lie behind `applied`.
    fn at_end(
        membership: &Membership,
        applied: Index,
        entries: &[raftpb::Entry],
    ) -> Result<Self, BootstrapError> {
        let mut standing = Standing {
            members: membership.members().map(|member| member.id).collect(),
            learners: membership.members().filter(|m| m.is_learner).map(|m| m.id).collect(),
            removed: membership.removed().map(|id| id.0).collect(),
        };
        for entry in entries {
            if entry.index <= applied.0 || entry.r#type != raftpb::EntryType::EntryConfChange as i32
            {
                continue;
            }
            let error = |source| BootstrapError::BadChange { index: Index(entry.index), source };
            let change = confchange::decode(&entry.data).map_err(error)?;
            standing.change(confchange::kind(&change).map_err(error)?, change.node_id);
        }
        Ok(standing)
    }

    fn change(&mut self, kind: raftpb::ConfChangeType, id: u64) {
        use raftpb::ConfChangeType as Type;
        if self.removed.contains(&id) {
            return;
        }
        match kind {
            Type::AddNode => {
                // Of a learner it is the promotion.
                self.learners.remove(&id);
                self.members.insert(id);
            }
            Type::AddLearnerNode => {
                if self.members.insert(id) {
                    self.learners.insert(id);
                }
            }
            Type::RemoveNode => {
                if self.members.remove(&id) {
                    self.learners.remove(&id);
                    self.removed.insert(id);
                }
            }
            Type::UpdateNode => {}
        }
    }
}

/// Changes what was read of a log so that `own` is the only member at its end: what is not committed
/// goes, then all others are removed by entries that count as committed. `membership` is that after
/// `applied`. Answers the entries that the log is to be given.
///
/// # Errors
/// `RemovedForGood`, `Learner`: no change can make this member a voter. `BadChange`.
pub fn rewrite(
    recovered: &mut Recovered,
    membership: &Membership,
    applied: Index,
    own: MemberId,
) -> Result<Vec<raftpb::Entry>, BootstrapError> {
    let start = recovered.start.index();
    let commit = recovered.hard_state.commit.max(applied.0).max(start);
    let kept = recovered.entries.partition_point(|entry| entry.index <= commit);
    let standing = Standing::at_end(membership, applied, &recovered.entries[..kept])?;
    if standing.removed.contains(&own.0) {
        return Err(BootstrapError::RemovedForGood(own));
    }
    if standing.learners.contains(&own.0) {
        return Err(BootstrapError::Learner(own));
    }
    if kept < recovered.entries.len() {
        tracing::info!(
            "entry-index" = recovered.entries[kept].index,
            "commit-index-from-wal" = recovered.hard_state.commit,
            "number-of-discarded-entries" = recovered.entries.len() - kept,
            "discarding uncommitted WAL entries"
        );
        recovered.entries.truncate(kept);
    }
    let last = recovered.entries.last();
    let at = last.map_or(start, |entry| entry.index);
    let term = last.map_or(recovered.start.term(), |entry| entry.term);
    // A member that never heard of its cluster is in term 0, which no entry has.
    let term = term.max(recovered.hard_state.term).max(1);

    let mut changes = Vec::new();
    if !standing.members.contains(&own.0) {
        let member =
            Member { id: own.0, peer_urls: vec![UNKNOWN_PEER_URL.to_owned()], ..Member::default() };
        let context = ChangeContext { member, is_promote: false };
        let context = serde_json::to_vec(&context).expect("a member is always JSON");
        changes.push((raftpb::ConfChangeType::AddNode, own.0, context));
    }
    for id in standing.members.into_iter().filter(|id| *id != own.0) {
        changes.push((raftpb::ConfChangeType::RemoveNode, id, Vec::new()));
    }
    let entries: Vec<raftpb::Entry> = (at + 1..)
        .zip(changes)
        .map(|(index, (kind, node_id, context))| raftpb::Entry {
            r#type: raftpb::EntryType::EntryConfChange as i32,
            term,
            index,
            data: confchange::encode(&raftpb::ConfChange {
                id: 0,
                r#type: kind as i32,
                node_id,
                context: context.into(),
            }),
        })
        .collect();
    recovered.entries.extend(entries.iter().cloned());
    recovered.last_index = at + entries.len() as u64;
    recovered.hard_state.term = term;
    recovered.hard_state.commit = recovered.last_index;
    Ok(entries)
}

/// [`rewrite`]s what was read and the log itself, so that a later start without force agrees.
///
/// # Errors
/// As there; what the log says.
pub fn force(
    log: &mut WalLog,
    recovered: &mut Recovered,
    membership: &Membership,
    applied: Index,
) -> Result<(), BootstrapError> {
    let own = MemberId(recovered.metadata.node_id());
    let before = recovered.hard_state.commit;
    let entries = rewrite(recovered, membership, applied, own)?;
    log.append(&entries, Some(&recovered.hard_state))?;
    log.sync()?;
    tracing::info!(
        "cluster-id" = %membership.cluster_id,
        "local-member-id" = %own,
        "wal-commit-index" = before,
        "commit-index" = recovered.hard_state.commit,
        "forcing restart member"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use quorate_proto::walpb;
    use raftpb::ConfChangeType as Type;

    use super::*;
    use crate::core::types::ClusterId;

    fn change(kind: Type, node_id: u64) -> (Type, u64) {
        (kind, node_id)
    }

    fn entry(term: u64, index: u64, data: Option<(Type, u64)>) -> raftpb::Entry {
        let Some((kind, node_id)) = data else {
            return raftpb::Entry { r#type: 0, term, index, data: "put".into() };
        };
        let change =
            raftpb::ConfChange { id: 0, r#type: kind as i32, node_id, context: "{}".into() };
        raftpb::Entry {
            r#type: raftpb::EntryType::EntryConfChange as i32,
            term,
            index,
            data: confchange::encode(&change),
        }
    }

    /// A log from `start` on with these entries of term 2, in term 3.
    fn log(start: u64, commit: u64, entries: &[Option<(Type, u64)>]) -> Recovered {
        let entries: Vec<raftpb::Entry> =
            (start + 1..).zip(entries).map(|(index, data)| entry(2, index, *data)).collect();
        Recovered {
            metadata: walpb::Metadata { node_id: Some(1), cluster_id: Some(9) },
            hard_state: raftpb::HardState { term: 3, vote: 2, commit },
            last_index: start + entries.len() as u64,
            entries,
            snapshots: Vec::new(),
            start: walpb::Snapshot {
                index: Some(start),
                term: Some(if start == 0 { 0 } else { 2 }),
                conf_state: None,
            },
            torn: None,
        }
    }

    fn membership(ids: &[(u64, bool)], removed: &[u64]) -> Membership {
        let mut membership = Membership::new(ClusterId(9), MemberId(1), 1);
        let member = |(id, is_learner): &(u64, bool)| Member {
            id: *id,
            is_learner: *is_learner,
            ..Member::default()
        };
        membership.restore(ids.iter().map(member), removed.iter().map(|id| MemberId(*id)));
        membership
    }

    fn forced(
        recovered: &mut Recovered,
        membership: &Membership,
        applied: u64,
    ) -> Result<Vec<(u64, u64, Type, u64)>, String> {
        let added = rewrite(recovered, membership, Index(applied), MemberId(1));
        let added = added.map_err(|error| error.to_string())?;
        assert_eq!(recovered.entries[recovered.entries.len() - added.len()..], added);
        let last = recovered.entries.last().map_or(recovered.start.index(), |entry| entry.index);
        assert_eq!((recovered.last_index, recovered.hard_state.commit), (last, last));
        Ok(added
            .iter()
            .map(|entry| {
                let change = confchange::decode(&entry.data).unwrap();
                let kind = confchange::kind(&change).unwrap();
                (entry.term, entry.index, kind, change.node_id)
            })
            .collect())
    }

    #[test]
    fn all_others_are_removed_in_the_order_of_their_ids() {
        let mut read = log(
            0,
            4,
            &[
                Some(change(Type::AddNode, 1)),
                Some(change(Type::AddNode, 7)),
                Some(change(Type::AddNode, 3)),
                None,
                None,
                Some(change(Type::AddNode, 8)),
            ],
        );
        // Entries 5 and 6 are not committed: they go, and their member with them.
        let added = forced(&mut read, &membership(&[], &[]), 0).unwrap();
        assert_eq!(added, [(3, 5, Type::RemoveNode, 3), (3, 6, Type::RemoveNode, 7)]);
        assert_eq!(read.hard_state, raftpb::HardState { term: 3, vote: 2, commit: 6 });
        // Once more changes nothing.
        let again = forced(&mut read, &membership(&[], &[]), 0).unwrap();
        assert_eq!((again, read.last_index), (vec![], 6));
    }

    #[test]
    fn what_is_applied_is_committed_whatever_the_log_says() {
        let mut read = log(10, 11, &[None, None, Some(change(Type::RemoveNode, 7)), None]);
        let members = membership(&[(1, false), (3, true), (5, false)], &[7]);
        let added = forced(&mut read, &members, 13).unwrap();
        assert_eq!(added, [(3, 14, Type::RemoveNode, 3), (3, 15, Type::RemoveNode, 5)]);
        // A log without entries behind its snapshot.
        let mut read = log(10, 4, &[]);
        let added = forced(&mut read, &members, 10).unwrap();
        assert_eq!(added, [(3, 11, Type::RemoveNode, 3), (3, 12, Type::RemoveNode, 5)]);
    }

    #[test]
    fn a_member_that_its_log_does_not_know_is_added_first() {
        let mut read = log(0, 1, &[Some(change(Type::AddNode, 7))]);
        let added = forced(&mut read, &membership(&[], &[]), 0).unwrap();
        assert_eq!(added, [(3, 2, Type::AddNode, 1), (3, 3, Type::RemoveNode, 7)]);
        let change = confchange::decode(&read.entries[1].data).unwrap();
        assert_eq!(&change.context[..], br#"{"id":1,"peerURLs":["http://localhost:2380"]}"#);
        // One that never heard of its cluster has an empty log.
        let mut read = log(0, 0, &[]);
        read.hard_state = raftpb::HardState::default();
        let added = forced(&mut read, &membership(&[], &[]), 0).unwrap();
        assert_eq!(added, [(1, 1, Type::AddNode, 1)]);
    }

    #[test]
    fn who_cannot_vote_is_refused() {
        let error = forced(&mut log(0, 0, &[]), &membership(&[(7, false)], &[1]), 0).unwrap_err();
        assert_eq!(
            error,
            "member 1 was removed from the cluster: --force-new-cluster cannot bring it back"
        );
        let removal = Some(change(Type::RemoveNode, 1));
        let both = membership(&[(1, false), (7, false)], &[]);
        assert!(forced(&mut log(0, 1, &[removal]), &both, 0).is_err());
        // Not committed, it has not happened.
        let added = forced(&mut log(0, 0, &[removal]), &both, 0).unwrap();
        assert_eq!(added, [(3, 1, Type::RemoveNode, 7)]);

        let learner = membership(&[(1, true), (7, false)], &[]);
        assert_eq!(
            forced(&mut log(0, 0, &[]), &learner, 0).unwrap_err(),
            "member 1 is a learner and holds no vote: --force-new-cluster needs a member that votes"
        );
        let promotion = Some(change(Type::AddNode, 1));
        let added = forced(&mut log(0, 1, &[promotion]), &learner, 0).unwrap();
        assert_eq!(added, [(3, 2, Type::RemoveNode, 7)]);
    }

    #[test]
    fn a_change_that_does_not_decode_is_told_by_its_index() {
        let mut read = log(0, 1, &[Some(change(Type::AddNode, 1))]);
        read.entries[0].data = vec![0xff].into();
        assert_eq!(
            forced(&mut read, &membership(&[], &[]), 0).unwrap_err(),
            "log entry 1: conf change does not decode"
        );
    }
}
