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
    let term = term.max(recovered.hard_state.term);

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
