//! Conf changes, in etcd's numbering outside and in the raft crate's inside.
//!
//! | | add | remove | update | add learner |
//! |---|---|---|---|---|
//! | etcd, on disk and on the wire | 0 | 1 | 2 | 3 |
//! | raft crate | 0 | 1 | - | 2 |
//!
//! The crate decodes a conf change in one place only, when a leader is asked to propose one, to see
//! whether it has changes at all. So entries are not rewritten but *veiled* on their way in: the bytes move
//! from `data` to the crate's own field `context`, and what it decodes is the empty message, one change of
//! nobody. On the way out they move back. The bytes of a log entry are therefore exactly those that its
//! proposer wrote, fields unknown to us included, and an update needs no number in the crate.

use bytes::Bytes;
use prost::Message;
use quorate_proto::raftpb::{ConfChange, ConfChangeType};
use raft::eraftpb;

/// Why a conf change cannot be taken.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum ConfChangeError {
    #[error("conf change does not decode")]
    Encoding(#[source] prost::DecodeError),
    #[error("unknown conf change type {0}")]
    UnknownType(i32),
    #[error("conf change of member {0:x} would leave no voter")]
    NoVoterLeft(u64),
}

/// Decodes the data of an `EntryConfChange`.
///
/// # Errors
/// [`ConfChangeError::Encoding`], [`ConfChangeError::UnknownType`].
pub fn decode(data: &Bytes) -> Result<ConfChange, ConfChangeError> {
    let change = ConfChange::decode(data.clone()).map_err(ConfChangeError::Encoding)?;
    kind(&change)?;
    Ok(change)
}

/// The data of an `EntryConfChange` that stands for `change`.
pub fn encode(change: &ConfChange) -> Bytes {
    change.encode_to_vec().into()
}

/// The type of `change`.
///
/// # Errors
/// [`ConfChangeError::UnknownType`].
pub fn kind(change: &ConfChange) -> Result<ConfChangeType, ConfChangeError> {
    ConfChangeType::try_from(change.r#type).map_err(|_| ConfChangeError::UnknownType(change.r#type))
}

/// Hides the bytes of a conf change from the raft crate.
pub(super) fn veil(entry: &mut eraftpb::Entry) {
    if entry.entry_type == eraftpb::EntryType::EntryConfChange {
        entry.context = std::mem::take(&mut entry.data);
    }
}

/// Undoes [`veil`].
pub(super) fn unveil(entry: &mut eraftpb::Entry) {
    if entry.entry_type == eraftpb::EntryType::EntryConfChange {
        entry.data = std::mem::take(&mut entry.context);
    }
}

/// What the raft crate is to apply for `change`; `None` if the voters and learners stay as they are: an update
/// of a member's addresses, or a change of nobody.
///
/// # Errors
/// [`ConfChangeError::UnknownType`].
pub(super) fn to_apply(
    change: &ConfChange,
) -> Result<Option<eraftpb::ConfChangeV2>, ConfChangeError> {
    let kind = match kind(change)? {
        _ if change.node_id == 0 => return Ok(None),
        ConfChangeType::UpdateNode => return Ok(None),
        ConfChangeType::AddNode => eraftpb::ConfChangeType::AddNode,
        ConfChangeType::RemoveNode => eraftpb::ConfChangeType::RemoveNode,
        ConfChangeType::AddLearnerNode => eraftpb::ConfChangeType::AddLearnerNode,
    };
    let single = eraftpb::ConfChangeSingle {
        node_id: change.node_id,
        change_type: kind,
        ..Default::default()
    };
    Ok(Some(eraftpb::ConfChangeV2 { changes: vec![single].into(), ..Default::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Conf change entries as etcd 3.4.23 wrote them into its WAL: the bootstrap of a single member, an update
    /// of its peer URL, a learner added, the learner removed.
    const FROM_ETCD: [(&str, ConfChangeType, u64, u64, &str); 4] = [
        (
            "08001000188df2f48ec1f7a6d7bd01224d7b226964223a31333636383033333135313137313930313730392c\
             227065657255524c73223a5b22687474703a2f2f3132372e302e302e313a3233383031225d2c226e616d6522\
             3a226d31227d",
            ConfChangeType::AddNode,
            0,
            0xbdae_9bbc_11dd_390d,
            r#"{"id":13668033151171901709,"peerURLs":["http://127.0.0.1:23801"],"name":"m1"}"#,
        ),
        (
            "0886ac8aa5a2bfe886391002188df2f48ec1f7a6d7bd0122417b226964223a31333636383033333135313137\
             313930313730392c227065657255524c73223a5b22687474703a2f2f3132372e302e302e313a323338303222\
             5d7d",
            ConfChangeType::UpdateNode,
            0x390d_a1fa_24a2_9606,
            0xbdae_9bbc_11dd_390d,
            r#"{"id":13668033151171901709,"peerURLs":["http://127.0.0.1:23802"]}"#,
        ),
        (
            "0887ac8aa5a2bfe88639100318e7819090c4d9fee82622517b226964223a3237393732393235393837363136\
             31393638372c227065657255524c73223a5b22687474703a2f2f3132372e302e302e313a3233383033225d2c\
             2269734c6561726e6572223a747275657d",
            ConfChangeType::AddLearnerNode,
            0x390d_a1fa_24a2_9607,
            0x26d1_facc_4204_00e7,
            r#"{"id":2797292598761619687,"peerURLs":["http://127.0.0.1:23803"],"isLearner":true}"#,
        ),
        (
            "0888ac8aa5a2bfe88639100118e7819090c4d9fee826",
            ConfChangeType::RemoveNode,
            0x390d_a1fa_24a2_9608,
            0x26d1_facc_4204_00e7,
            "",
        ),
    ];

    fn bytes(hex: &str) -> Bytes {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| {
            u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16).expect("hex")
        };
        digits.chunks(2).map(byte).collect()
    }

    #[test]
    fn reads_what_etcd_wrote() {
        for (hex, kind_, id, node_id, context) in FROM_ETCD {
            let change = decode(&bytes(hex)).expect("etcd's bytes decode");
            assert_eq!(kind(&change), Ok(kind_));
            assert_eq!((change.id, change.node_id), (id, node_id));
            assert_eq!(change.context, context);
            assert_eq!(decode(&encode(&change)), Ok(change));
        }
    }

    #[test]
    fn maps_each_type_to_the_crates_number() {
        let expected = [
            Some(eraftpb::ConfChangeType::AddNode),
            None,
            Some(eraftpb::ConfChangeType::AddLearnerNode),
            Some(eraftpb::ConfChangeType::RemoveNode),
        ];
        for ((hex, _, _, node_id, _), expected) in FROM_ETCD.into_iter().zip(expected) {
            let change = decode(&bytes(hex)).expect("etcd's bytes decode");
            let applied = to_apply(&change).expect("a known type");
            let single = applied.map(|v2| (v2.changes[0].change_type, v2.changes[0].node_id));
            assert_eq!(single, expected.map(|kind| (kind, node_id)));
        }
    }

    #[test]
    fn veiled_bytes_come_back_unchanged() {
        use protobuf::Message as _;
        for (hex, ..) in FROM_ETCD {
            let data = bytes(hex);
            let mut entry = eraftpb::Entry {
                entry_type: eraftpb::EntryType::EntryConfChange,
                data: data.clone(),
                ..Default::default()
            };
            veil(&mut entry);
            let seen = eraftpb::ConfChange::parse_from_bytes(&entry.data);
            assert_eq!(seen.map(|change| change.node_id).ok(), Some(0));
            unveil(&mut entry);
            assert_eq!(entry.data.as_ptr(), data.as_ptr(), "moved, not copied");
            assert_eq!((entry.data.len(), entry.context.len()), (data.len(), 0));
        }
    }

    #[test]
    fn refuses_what_nobody_knows() {
        let change = ConfChange { r#type: 4, node_id: 1, ..Default::default() };
        assert_eq!(decode(&encode(&change)), Err(ConfChangeError::UnknownType(4)));
        let torn = bytes(FROM_ETCD[0].0).slice(..20);
        assert!(matches!(decode(&torn), Err(ConfChangeError::Encoding(_))));
    }

    #[test]
    fn a_change_of_nobody_changes_nothing() {
        let change = ConfChange { r#type: ConfChangeType::RemoveNode as i32, ..Default::default() };
        assert_eq!(to_apply(&change), Ok(None));
    }
}
