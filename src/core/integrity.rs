//! Whether the members hold the same data: what follows from their hashes (v3-api 6.6).
//!
//! Hashes can be compared only if they were taken at one revision under one compact revision. Whatever
//! cannot be compared says nothing: a member that is behind, or does not answer, is no suspect.

use std::collections::BTreeMap;

use super::mvcc::hash::KvHash;
use super::types::MemberId;

/// A hash, and how far whoever took it was then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hashed {
    pub hash: KvHash,
    /// The newest revision of the member.
    pub newest: i64,
}

/// Why a member has no hash at a revision.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum NoHash {
    /// The revision is compacted there: whoever asks is behind.
    #[error("required revision has been compacted")]
    Compacted,
    /// The revision is not reached there: the member is behind.
    #[error("required revision is a future revision")]
    Future,
    #[error("{0}")]
    Unreachable(String),
}

/// What another member answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAnswer {
    pub id: MemberId,
    pub answer: Result<Hashed, NoHash>,
}

/// What a comparison at start made of one peer that is not simply equal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AtStart {
    /// Other data under the same compact revision: this member must not start.
    Different,
    /// Other data under another compact revision: nothing follows.
    OtherCompaction,
    /// The peer has not reached the revision.
    PeerBehind,
    /// The peer has compacted the revision away.
    LocalBehind,
    /// No answer.
    Silent,
}

/// Compares a member's own hash at its newest revision with its peers', before it serves.
pub fn at_start(own: &Hashed, peer: &PeerAnswer) -> Option<AtStart> {
    match &peer.answer {
        Ok(theirs) if theirs.hash.hash == own.hash.hash => None,
        Ok(theirs) if theirs.hash.compact_revision == own.hash.compact_revision => {
            Some(AtStart::Different)
        }
        Ok(_) => Some(AtStart::OtherCompaction),
        Err(NoHash::Future) => Some(AtStart::PeerBehind),
        Err(NoHash::Compacted) => Some(AtStart::LocalBehind),
        Err(NoHash::Unreachable(_)) => Some(AtStart::Silent),
    }
}

/// Why a member is suspected by the periodic check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Suspicion {
    /// The leader's own hash at one revision was another a moment later.
    OwnHashChanged,
    /// Ahead of the leader, which has everything that is committed.
    RevisionAhead,
    CompactRevisionAhead,
    /// Other data under the same compact revision.
    HashDiffers,
}

/// A member that the periodic check suspects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Suspect {
    pub id: MemberId,
    pub why: Suspicion,
}

/// The leader's periodic check: its own hash before and after it asked its peers, with a read index in
/// between, so that `second` is of everything that any member had applied when it answered. Of those
/// who are suspected only the first is alarmed: one alarm a round.
pub fn periodic(
    leader: MemberId,
    first: &Hashed,
    second: &Hashed,
    peers: &[PeerAnswer],
) -> Vec<Suspect> {
    let mut suspects = Vec::new();
    let compacted = (first.hash.compact_revision, second.hash.compact_revision);
    if second.hash.hash != first.hash.hash
        && second.newest == first.newest
        && compacted.0 == compacted.1
    {
        suspects.push(Suspect { id: leader, why: Suspicion::OwnHashChanged });
    }
    for peer in peers {
        let Ok(theirs) = &peer.answer else { continue };
        let mut suspect = |why| suspects.push(Suspect { id: peer.id, why });
        if theirs.newest > second.newest {
            suspect(Suspicion::RevisionAhead);
        }
        if theirs.hash.compact_revision > compacted.1 {
            suspect(Suspicion::CompactRevisionAhead);
        }
        if theirs.hash.compact_revision == compacted.0 && theirs.hash.hash != first.hash.hash {
            suspect(Suspicion::HashDiffers);
        }
    }
    suspects
}

/// What the comparison of one compaction came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CompactionVerdict {
    /// Every member has this hash.
    Agreed,
    /// Those who could be compared agree: an older compaction may tell more.
    Incomplete,
    /// Members by hash, and whom to alarm: those outside the majority, or 0, the cluster, where there
    /// is none.
    Different { groups: BTreeMap<u32, Vec<MemberId>>, alarm: Vec<MemberId> },
}

/// The leader's check of compaction hashes: from the newest compaction to older ones, until one is
/// settled. What all have agreed on is not looked at again.
#[derive(Default, Debug)]
pub struct CompactionCheck {
    /// The newest revision that all members agreed on.
    agreed: Option<i64>,
}

impl CompactionCheck {
    /// Those of `hashes` that are still to be compared, in their order.
    pub fn open(&self, hashes: impl IntoIterator<Item = KvHash>) -> Vec<KvHash> {
        hashes.into_iter().filter(|hash| self.agreed < Some(hash.revision)).collect()
    }

    /// Compares one compaction's hash; older ones need not be looked at unless it is `Incomplete`.
    pub fn compare(
        &mut self,
        leader: MemberId,
        own: &KvHash,
        peers: &[PeerAnswer],
    ) -> CompactionVerdict {
        let mut groups = BTreeMap::from([(own.hash, vec![leader])]);
        let mut compared = 0;
        for peer in peers {
            let Ok(theirs) = &peer.answer else { continue };
            if theirs.hash.compact_revision == own.compact_revision {
                compared += 1;
                groups.entry(theirs.hash.hash).or_default().push(peer.id);
            }
        }
        if groups.len() == 1 {
            if compared < peers.len() {
                return CompactionVerdict::Incomplete;
            }
            self.agreed = self.agreed.max(Some(own.revision));
            return CompactionVerdict::Agreed;
        }
        let members = peers.len() + 1;
        let quorum = members / 2 + 1;
        let majority = groups.iter().find(|(_, members)| members.len() >= quorum);
        let alarm = match majority.map(|(hash, _)| *hash) {
            None => vec![MemberId(0)],
            Some(right) => {
                let others = groups.iter().filter(|(hash, _)| **hash != right);
                others.flat_map(|(_, members)| members.iter().copied()).collect()
            }
        };
        CompactionVerdict::Different { groups, alarm }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEADER: MemberId = MemberId(1);

    /// A hash taken at revision 10.
    fn hashed(hash: u32, compact_revision: i64, newest: i64) -> Hashed {
        Hashed { hash: KvHash { hash, compact_revision, revision: 10 }, newest }
    }

    fn peer(id: u64, answer: Result<Hashed, NoHash>) -> PeerAnswer {
        PeerAnswer { id: MemberId(id), answer }
    }

    fn silent() -> Result<Hashed, NoHash> {
        Err(NoHash::Unreachable("refused".to_string()))
    }

    #[test]
    fn a_member_starts_unless_a_peer_has_other_data() {
        let own = hashed(7, 3, 10);
        for (answer, expected) in [
            (Ok(hashed(7, 3, 10)), None),
            // Equal data is equal whatever else differs.
            (Ok(hashed(7, 5, 12)), None),
            (Ok(hashed(8, 3, 12)), Some(AtStart::Different)),
            (Ok(hashed(8, 4, 12)), Some(AtStart::OtherCompaction)),
            (Err(NoHash::Future), Some(AtStart::PeerBehind)),
            (Err(NoHash::Compacted), Some(AtStart::LocalBehind)),
            (silent(), Some(AtStart::Silent)),
        ] {
            assert_eq!(at_start(&own, &peer(2, answer.clone())), expected, "{answer:?}");
        }
    }

    #[test]
    fn the_periodic_check_suspects_who_cannot_be_right() {
        use Suspicion::*;
        let own = hashed(7, 3, 10);
        for (second, answers, expected) in [
            (own, vec![Ok(own), Ok(own)], vec![]),
            // Nobody to compare with.
            (own, vec![], vec![]),
            (own, vec![silent(), Err(NoHash::Future), Err(NoHash::Compacted)], vec![]),
            // The leader's own data changed without a write or a compaction...
            (hashed(8, 3, 10), vec![Ok(own)], vec![(1, OwnHashChanged)]),
            // ...or with one.
            (hashed(8, 3, 11), vec![Ok(own)], vec![]),
            (hashed(8, 4, 10), vec![Ok(own)], vec![]),
            // A peer that applied what was written meanwhile, and one that did not.
            (hashed(9, 3, 12), vec![Ok(hashed(7, 3, 12)), Ok(own)], vec![]),
            (own, vec![Ok(hashed(7, 3, 11)), Ok(own)], vec![(2, RevisionAhead)]),
            // A compaction that only the peer has, and one that the leader has by now.
            (own, vec![Ok(hashed(9, 4, 10))], vec![(2, CompactRevisionAhead)]),
            (hashed(9, 4, 10), vec![Ok(hashed(9, 4, 10))], vec![]),
            // A peer that has not compacted yet says nothing.
            (own, vec![Ok(hashed(9, 2, 10))], vec![]),
            (own, vec![Ok(own), Ok(hashed(8, 3, 10))], vec![(3, HashDiffers)]),
            (
                own,
                vec![Ok(hashed(8, 3, 11)), Ok(hashed(8, 3, 9))],
                vec![(2, RevisionAhead), (2, HashDiffers), (3, HashDiffers)],
            ),
        ] {
            let peers: Vec<_> =
                answers.into_iter().zip(2..).map(|(answer, id)| peer(id, answer)).collect();
            let suspects = periodic(LEADER, &own, &second, &peers);
            let expected: Vec<_> =
                expected.into_iter().map(|(id, why)| Suspect { id: MemberId(id), why }).collect();
            assert_eq!(suspects, expected, "{second:?} {peers:?}");
        }
    }

    #[test]
    fn compactions_alarm_the_minority_or_the_cluster() {
        use CompactionVerdict::*;
        let own = hashed(7, 3, 20);
        let other = |hash| Ok(hashed(hash, 3, 20));
        let behind = || Err(NoHash::Future);
        let ids = |ids: &[u64]| ids.iter().copied().map(MemberId).collect::<Vec<_>>();
        let different = |groups: &[(u32, &[u64])], alarm: &[u64]| Different {
            groups: groups.iter().map(|(hash, members)| (*hash, ids(members))).collect(),
            alarm: ids(alarm),
        };
        for (answers, expected) in [
            (vec![other(7), other(7)], Agreed),
            (vec![other(7), silent()], Incomplete),
            (vec![behind(), silent()], Incomplete),
            // Another compact revision compares nothing.
            (vec![Ok(hashed(8, 2, 20)), other(7)], Incomplete),
            (vec![other(8), other(7)], different(&[(7, &[1, 3]), (8, &[2])], &[2])),
            // The leader itself is the minority.
            (vec![other(8), other(8)], different(&[(7, &[1]), (8, &[2, 3])], &[1])),
            // A quorum is one of all members, not of those who answered.
            (vec![other(8), silent()], different(&[(7, &[1]), (8, &[2])], &[0])),
            (vec![other(8), other(9)], different(&[(7, &[1]), (8, &[2]), (9, &[3])], &[0])),
            (vec![other(8)], different(&[(7, &[1]), (8, &[2])], &[0])),
            (
                vec![other(7), other(8), other(7), other(9)],
                different(&[(7, &[1, 2, 4]), (8, &[3]), (9, &[5])], &[3, 5]),
            ),
        ] {
            let peers: Vec<_> =
                answers.into_iter().zip(2..).map(|(answer, id)| peer(id, answer)).collect();
            let mut check = CompactionCheck::default();
            assert_eq!(check.compare(LEADER, &own.hash, &peers), expected, "{peers:?}");
            let settled = check.open([own.hash]).is_empty();
            assert_eq!(settled, expected == Agreed, "{peers:?}");
        }
    }

    #[test]
    fn what_was_agreed_on_is_not_compared_again() {
        let at = |revision| KvHash { hash: 1, compact_revision: revision - 1, revision };
        let answer = |hash: KvHash| peer(2, Ok(Hashed { hash, newest: 90 }));
        let mut check = CompactionCheck::default();
        assert_eq!(check.open([at(9), at(6), at(3)]), [at(9), at(6), at(3)]);
        assert_eq!(check.compare(LEADER, &at(6), &[answer(at(6))]), CompactionVerdict::Agreed);
        assert_eq!(check.open([at(9), at(6), at(3)]), [at(9)]);
        // An older one does not open those between again.
        assert_eq!(check.compare(LEADER, &at(3), &[answer(at(3))]), CompactionVerdict::Agreed);
        assert_eq!(check.open([at(9), at(6), at(3)]), [at(9)]);
    }
}
