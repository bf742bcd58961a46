//! A directory that an etcd of before 3.5 has left, opened by an engine that reads its database.
//!
//! Such an etcd keeps its members in the v2 store and the log; what its database says of them can be out
//! of date, and the term of the last applied entry is not in it (formats-and-peers 2.3).

use engine_api::{Batch, Table};
use quorate_proto::raftpb;

use super::BootstrapError;
use crate::core::apply::TERM;
use crate::core::membership::{Member, Membership};
use crate::core::raft::confchange;
use crate::core::snap::V2Membership;
use crate::core::types::{Index, MemberId};

/// What the database lacks: the term of `applied`, and the members where they are not those that the
/// snapshot and the `entries` behind it make. `stored` is what the database says, `snapshot` where the log
/// begins, all zero for its very beginning.
///
/// # Errors
/// `BadChange`.
pub fn mend(
    stored: &Membership,
    applied: Index,
    snapshot: &raftpb::Snapshot,
    entries: &[raftpb::Entry],
) -> Result<Batch, BootstrapError> {
    let begin = snapshot.metadata.clone().unwrap_or_default();
    let done = &entries[..entries.partition_point(|entry| entry.index <= applied.0)];
    let term = done.last().map_or(begin.term, |entry| entry.term);
    let mut batch = Batch::default();
    batch.put(Table::Meta, TERM, term.to_be_bytes().to_vec());
    let told = match V2Membership::from_v2_store(&snapshot.data) {
        Ok(told) => told,
        Err(_) if begin.index == 0 => V2Membership::default(),
        // Without it the database is all there is.
        Err(_) => return Ok(batch),
    };
    let Membership { cluster_id, local, learners_max, .. } = *stored;
    let mut members = Membership::new(cluster_id, local, learners_max);
    let of_snapshot = told.members.into_iter().map(|member| Member {
        id: member.id,
        peer_urls: member.peer_urls,
        is_learner: member.is_learner,
        name: member.name,
        client_urls: member.client_urls,
    });
    members.restore(of_snapshot, told.removed.into_iter().map(MemberId));
    for entry in done {
        if entry.r#type == raftpb::EntryType::EntryConfChange as i32 {
            let bad = |source| BootstrapError::BadChange { index: Index(entry.index), source };
            let change = confchange::decode(&entry.data).map_err(bad)?;
            // One that was refused then is refused now.
            let _ = members.apply(&change);
        }
    }
    let removed_known = members.removed().all(|id| stored.removed().any(|known| known == id));
    if members.conf_state() == stored.conf_state() && removed_known {
        return Ok(batch);
    }
    // Names and client URLs are published by requests, which the database has all of.
    for member in stored.members() {
        members.set_attributes(MemberId(member.id), &member.name, &member.client_urls);
        batch.delete(Table::Members, MemberId(member.id).to_string());
    }
    for member in members.members() {
        let json = serde_json::to_vec(member).expect("a member is always JSON");
        batch.put(Table::Members, MemberId(member.id).to_string(), json);
    }
    for id in members.removed() {
        batch.put(Table::MembersRemoved, id.to_string(), "removed");
    }
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use engine_api::{Durability, Engine};
    use engine_memory::Memory;
    use raftpb::ConfChangeType as Type;

    use super::*;
    use crate::core::apply::Stored;
    use crate::core::membership::ChangeContext;
    use crate::core::snap::V2Member;
    use crate::core::types::ClusterId;

    fn blank() -> Membership {
        Membership::new(ClusterId(1), MemberId(1), 1)
    }

    fn member(id: u64, is_learner: bool, name: &str) -> Member {
        let peer_urls = vec![format!("http://h:{id}")];
        Member { id, peer_urls, is_learner, name: name.to_owned(), ..Member::default() }
    }

    fn change(term: u64, index: u64, kind: Type, id: u64, is_promote: bool) -> raftpb::Entry {
        let context = ChangeContext { member: member(id, false, ""), is_promote };
        let context = serde_json::to_vec(&context).unwrap().into();
        let change = raftpb::ConfChange { id: 0, r#type: kind as i32, node_id: id, context };
        let r#type = raftpb::EntryType::EntryConfChange as i32;
        raftpb::Entry { r#type, term, index, data: confchange::encode(&change) }
    }

    /// The membership and the term that an engine has after it was mended.
    fn mended(
        stored: &[Member],
        applied: u64,
        snapshot: &raftpb::Snapshot,
        entries: &[raftpb::Entry],
    ) -> (Membership, u64) {
        let memory = Memory::new();
        let mut batch = Batch::default();
        for member in stored {
            let json = serde_json::to_vec(member).unwrap();
            batch.put(Table::Members, MemberId(member.id).to_string(), json);
        }
        memory.commit(&batch, Durability::Durable).unwrap();
        let before = Stored::read(&*memory.view().unwrap(), blank()).unwrap();
        let batch = mend(&before.members, Index(applied), snapshot, entries).unwrap();
        memory.commit(&batch, Durability::Durable).unwrap();
        let after = Stored::read(&*memory.view().unwrap(), blank()).unwrap();
        (after.members, after.term.0)
    }

    fn entries() -> Vec<raftpb::Entry> {
        vec![
            change(1, 1, Type::AddNode, 1, false),
            change(1, 2, Type::AddNode, 2, false),
            raftpb::Entry { r#type: 0, term: 2, index: 3, data: "".into() },
            change(2, 4, Type::AddLearnerNode, 3, false),
            change(3, 5, Type::AddNode, 3, true),
            change(3, 6, Type::RemoveNode, 2, false),
            change(4, 7, Type::RemoveNode, 1, false),
        ]
    }

    #[test]
    fn what_is_right_stays() {
        let stored = [member(1, false, "one"), member(2, false, "two")];
        let (members, term) = mended(&stored, 3, &raftpb::Snapshot::default(), &entries());
        assert_eq!(term, 2);
        assert_eq!(members.members().cloned().collect::<Vec<_>>(), stored);
    }

    #[test]
    fn a_promotion_and_a_removal_that_were_not_kept_are_made_good() {
        let stored = [member(1, false, "one"), member(2, false, "two"), member(3, true, "three")];
        let (members, term) = mended(&stored, 6, &raftpb::Snapshot::default(), &entries());
        assert_eq!(term, 3);
        let right = [member(1, false, "one"), member(3, false, "three")];
        assert_eq!(members.members().cloned().collect::<Vec<_>>(), right);
        assert_eq!(members.removed().collect::<Vec<_>>(), [MemberId(2)]);
    }

    #[test]
    fn the_members_of_a_snapshot_are_the_beginning() {
        let v2 = |id, is_learner| V2Member {
            id,
            peer_urls: vec![format!("http://h:{id}")],
            is_learner,
            ..V2Member::default()
        };
        let told = V2Membership {
            members: vec![v2(1, false), v2(2, false), v2(3, true)],
            removed: vec![9],
            cluster_version: None,
        };
        let metadata = raftpb::SnapshotMetadata { index: 4, term: 2, conf_state: None };
        let mut snapshot =
            raftpb::Snapshot { data: told.to_v2_store().into(), metadata: Some(metadata) };
        let stored = [member(1, false, "one"), member(2, false, "two"), member(3, true, "three")];
        let (members, term) = mended(&stored, 5, &snapshot, &entries()[4..]);
        assert_eq!((members.conf_state().voters, term), (vec![1, 2, 3], 3));
        assert_eq!(members.removed().collect::<Vec<_>>(), [MemberId(9)]);
        let (_, term) = mended(&stored, 4, &snapshot, &entries()[4..]);
        assert_eq!(term, 2);
        // A snapshot whose file is lost tells nothing.
        snapshot.data = Default::default();
        let (members, term) = mended(&stored, 5, &snapshot, &entries()[4..]);
        assert_eq!((members.conf_state().voters, term), (vec![1, 2], 3));
    }
}
