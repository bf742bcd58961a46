//! Between etcd's messages and the raft crate's: fields move, data is never copied.

use quorate_proto::raftpb;
use raft::eraftpb;

use super::confchange;

/// The highest message type that members exchange, `MsgPreVoteResp`.
pub(super) const MESSAGE_TYPE_MAX: u32 = 18;

/// The raft crate's message type of number `kind`; the numbers are the same on both sides.
pub(super) fn message_type(kind: u32) -> Option<eraftpb::MessageType> {
    if kind > MESSAGE_TYPE_MAX {
        return None;
    }
    protobuf::ProtobufEnum::from_i32(kind as i32)
}

pub(super) fn entry_in(entry: raftpb::Entry) -> eraftpb::Entry {
    let entry_type = match entry.r#type() {
        raftpb::EntryType::EntryNormal => eraftpb::EntryType::EntryNormal,
        raftpb::EntryType::EntryConfChange => eraftpb::EntryType::EntryConfChange,
        raftpb::EntryType::EntryConfChangeV2 => eraftpb::EntryType::EntryConfChangeV2,
    };
    let mut entry = eraftpb::Entry {
        entry_type,
        term: entry.term,
        index: entry.index,
        data: entry.data,
        ..Default::default()
    };
    confchange::veil(&mut entry);
    entry
}

pub(super) fn entry_out(mut entry: eraftpb::Entry) -> raftpb::Entry {
    confchange::unveil(&mut entry);
    raftpb::Entry {
        r#type: entry.entry_type as i32,
        term: entry.term,
        index: entry.index,
        data: entry.data,
    }
}

pub(super) fn entries_out(entries: Vec<eraftpb::Entry>) -> Vec<raftpb::Entry> {
    entries.into_iter().map(entry_out).collect()
}

/// `kind` is the message's type, already checked.
pub(super) fn message_in(message: raftpb::Message, kind: eraftpb::MessageType) -> eraftpb::Message {
    let mut inner = eraftpb::Message {
        msg_type: kind,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        commit: message.commit,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context,
        ..Default::default()
    };
    if !message.entries.is_empty() {
        inner.entries = message.entries.into_iter().map(entry_in).collect::<Vec<_>>().into();
    }
    // etcd up to 3.5 puts an empty snapshot into every message: the type decides, not its presence.
    if kind == eraftpb::MessageType::MsgSnapshot
        && let Some(snapshot) = message.snapshot
    {
        inner.snapshot = Some(snapshot_in(snapshot)).into();
    }
    inner
}

pub(super) fn message_out(mut message: eraftpb::Message) -> raftpb::Message {
    raftpb::Message {
        r#type: message.msg_type as u32,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: entries_out(message.take_entries().into_vec()),
        commit: message.commit,
        snapshot: message.snapshot.take().map(snapshot_out),
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context,
    }
}

fn snapshot_in(snapshot: raftpb::Snapshot) -> eraftpb::Snapshot {
    let mut inner = eraftpb::Snapshot { data: snapshot.data, ..Default::default() };
    if let Some(metadata) = snapshot.metadata {
        let to = inner.mut_metadata();
        to.index = metadata.index;
        to.term = metadata.term;
        to.set_conf_state(conf_state_in(metadata.conf_state.unwrap_or_default()));
    }
    inner
}

pub(super) fn snapshot_out(mut snapshot: eraftpb::Snapshot) -> raftpb::Snapshot {
    let mut metadata = snapshot.take_metadata();
    raftpb::Snapshot {
        metadata: Some(raftpb::SnapshotMetadata {
            conf_state: Some(conf_state_out(metadata.take_conf_state())),
            index: metadata.index,
            term: metadata.term,
        }),
        data: snapshot.data,
    }
}

pub(super) fn conf_state_in(state: raftpb::ConfState) -> eraftpb::ConfState {
    eraftpb::ConfState {
        voters: state.voters,
        learners: state.learners,
        voters_outgoing: state.voters_outgoing,
        learners_next: state.learners_next,
        auto_leave: state.auto_leave,
        ..Default::default()
    }
}

/// Sorted, as etcd writes it: the raft crate keeps members in hash order.
pub(super) fn conf_state_out(state: eraftpb::ConfState) -> raftpb::ConfState {
    let mut state = raftpb::ConfState {
        voters: state.voters,
        learners: state.learners,
        voters_outgoing: state.voters_outgoing,
        learners_next: state.learners_next,
        auto_leave: state.auto_leave,
    };
    state.voters.sort_unstable();
    state.learners.sort_unstable();
    state.voters_outgoing.sort_unstable();
    state.learners_next.sort_unstable();
    state
}

pub(super) fn hard_state_in(state: &raftpb::HardState) -> eraftpb::HardState {
    eraftpb::HardState {
        term: state.term,
        vote: state.vote,
        commit: state.commit,
        ..Default::default()
    }
}

pub(super) fn hard_state_out(state: &eraftpb::HardState) -> raftpb::HardState {
    raftpb::HardState { term: state.term, vote: state.vote, commit: state.commit }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_message_survives_both_ways_without_a_copy() {
        let data = Bytes::from_static(b"put");
        let change = Bytes::from(vec![0x10, 0x03, 0x18, 0x07]);
        let entry = |index, kind: raftpb::EntryType, data: &Bytes| raftpb::Entry {
            r#type: kind as i32,
            term: 3,
            index,
            data: data.clone(),
        };
        let message = raftpb::Message {
            r#type: 3,
            to: 1,
            from: 2,
            term: 4,
            log_term: 2,
            index: 6,
            entries: vec![
                entry(7, raftpb::EntryType::EntryNormal, &data),
                entry(8, raftpb::EntryType::EntryConfChange, &change),
            ],
            commit: 5,
            snapshot: None,
            reject: true,
            reject_hint: 9,
            context: Bytes::from_static(b"context"),
        };
        let kind = message_type(message.r#type).expect("a known type");
        let back = message_out(message_in(message.clone(), kind));
        assert_eq!(back, message);
        assert_eq!(back.entries[0].data.as_ptr(), data.as_ptr());
        assert_eq!(back.entries[1].data.as_ptr(), change.as_ptr());
    }

    #[test]
    fn only_a_snapshot_message_carries_a_snapshot() {
        let snapshot = raftpb::Snapshot {
            metadata: Some(raftpb::SnapshotMetadata {
                conf_state: Some(raftpb::ConfState {
                    voters: vec![3, 1, 2],
                    learners: vec![9, 4],
                    ..Default::default()
                }),
                index: 11,
                term: 2,
            }),
            data: Bytes::from_static(b"{}"),
        };
        let message = |kind| raftpb::Message {
            r#type: kind,
            snapshot: Some(snapshot.clone()),
            ..Default::default()
        };
        let through =
            |kind| message_out(message_in(message(kind), message_type(kind).expect("known")));
        assert_eq!(through(3).snapshot, None);
        let metadata = through(7).snapshot.and_then(|s| s.metadata).expect("kept");
        assert_eq!((metadata.index, metadata.term), (11, 2));
        let state = metadata.conf_state.expect("kept");
        assert_eq!((state.voters, state.learners), (vec![1, 2, 3], vec![4, 9]));
    }

    #[test]
    fn types_above_eighteen_are_unknown() {
        assert!(message_type(MESSAGE_TYPE_MAX).is_some());
        assert_eq!(message_type(19), None);
        assert_eq!(message_type(u32::MAX), None);
    }
}
