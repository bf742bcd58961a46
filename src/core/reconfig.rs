//! Which membership changes are let through to the log (v3-api 3.10), and who is a fit leader.
//!
//! The strict check keeps an operator from a change that would cost the cluster its quorum. It rests on
//! what the member that was asked can see; the change itself is judged again when it is applied, the
//! same on every member.

use super::membership::Membership;
use super::types::{Index, MemberId};

/// Why a change is refused before it is proposed.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReconfigError {
    #[error("re-configuration failed due to not enough started members")]
    NotEnoughStarted,
    #[error("unhealthy cluster")]
    Unhealthy,
}

/// How well the member that decides has been connected to another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Contact {
    None,
    /// For less than the time after which a connection is trusted.
    Recent,
    /// Without interruption for 5 s; the member itself.
    Stable,
}

/// How long a connection has to stand before a change relies on it.
pub const STABLE_AFTER: std::time::Duration = std::time::Duration::from_secs(5);

/// A learner may be promoted when it has this share, in percent, of the leader's log.
const READY_PERCENT: u128 = 90;

/// The majority of `n` voters.
pub fn quorum(n: usize) -> usize {
    n / 2 + 1
}

fn voters(members: &Membership) -> impl Iterator<Item = &super::membership::Member> {
    members.members().filter(|member| !member.is_learner)
}

/// Voters that have published their name: the others have never run.
fn started(members: &Membership, but: Option<MemberId>) -> usize {
    voters(members).filter(|m| !m.name.is_empty() && Some(MemberId(m.id)) != but).count()
}

fn stable(members: &Membership, contact: impl Fn(MemberId) -> Contact) -> usize {
    voters(members)
        .filter(|m| m.id == members.local.0 || contact(MemberId(m.id)) == Contact::Stable)
        .count()
}

/// Whether a member may be added.
///
/// # Errors
/// `NotEnoughStarted` for a voter that the enlarged cluster might wait for in vain; `Unhealthy`.
pub fn may_add(
    members: &Membership,
    learner: bool,
    contact: impl Fn(MemberId) -> Contact,
) -> Result<(), ReconfigError> {
    let now = voters(members).count();
    let started = started(members, None);
    // A cluster of one may grow: it has to pass through two to get its redundancy back.
    let growing_from_one = now == 1 && started == 1;
    if !learner && !growing_from_one && started < quorum(now + 1) {
        return Err(ReconfigError::NotEnoughStarted);
    }
    if now > 1 && stable(members, contact) < quorum(now + 1) {
        return Err(ReconfigError::Unhealthy);
    }
    Ok(())
}

/// Whether member `id` may be removed.
///
/// # Errors
/// `NotEnoughStarted`, `Unhealthy`: those who stay might have no quorum.
pub fn may_remove(
    members: &Membership,
    id: MemberId,
    contact: impl Fn(MemberId) -> Contact,
) -> Result<(), ReconfigError> {
    if members.get(id).is_some_and(|member| member.is_learner) {
        return Ok(());
    }
    let now = voters(members).count();
    let left = voters(members).filter(|member| member.id != id.0).count();
    if started(members, Some(id)) < quorum(left) {
        return Err(ReconfigError::NotEnoughStarted);
    }
    // One that is down takes no active voter away.
    if id != members.local && contact(id) == Contact::None {
        return Ok(());
    }
    let active = stable(members, contact).saturating_sub(1);
    if active < 1 + now.saturating_sub(1) / 2 {
        return Err(ReconfigError::Unhealthy);
    }
    Ok(())
}

/// Whether a learner may become a voter, apart from how far it has got.
///
/// # Errors
/// `NotEnoughStarted`.
pub fn may_promote(members: &Membership) -> Result<(), ReconfigError> {
    // The learner runs: it has caught up.
    if started(members, None) + 1 < quorum(voters(members).count() + 1) {
        return Err(ReconfigError::NotEnoughStarted);
    }
    Ok(())
}

/// Whether a learner whose log ends at `matched` is close enough to a leader's that ends at `leader`.
pub fn is_ready(matched: Index, leader: Index) -> bool {
    u128::from(matched.0) * 100 >= u128::from(leader.0) * READY_PERCENT
}

/// Why a proposal that raft may have taken was not answered in time (v3-api 4.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Silence {
    /// No leader was known all the time: nothing reached the log.
    NeverProposed,
    /// It was made while the cluster was losing its leader.
    LeaderFailed,
    /// The leader, or the leader's quorum, was out of reach.
    ConnectionLost,
    Slow,
}

/// What is known of the leader when a proposal is given up, in milliseconds of one clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leadership {
    /// 0: none known.
    pub leader: MemberId,
    /// When `leader`, or the last one before it was lost, became known.
    pub elected_ms: Option<u64>,
    /// When the last leader was lost; `None` if there was none yet.
    pub lost_ms: Option<u64>,
}

/// Why a proposal made at `start_ms` is silent. `since` answers from when on, without interruption, a
/// member could be reached.
pub fn silence(
    members: &Membership,
    now: Leadership,
    start_ms: u64,
    election_ms: u64,
    since: impl Fn(MemberId) -> Option<u64>,
) -> Silence {
    let led_meanwhile = match (now.leader.0, now.lost_ms) {
        (0, lost) => lost.is_some_and(|lost| lost > start_ms),
        _ => true,
    };
    if !led_meanwhile {
        return Silence::NeverProposed;
    }
    if let Some(elected) = now.elected_ms
        && start_ms < elected
        && start_ms > elected.saturating_sub(2 * election_ms)
    {
        return Silence::LeaderFailed;
    }
    let reached = |id: MemberId| since(id).is_some_and(|since| since < start_ms);
    let lost = if now.leader.0 == 0 {
        false
    } else if now.leader == members.local {
        let others = members.members().filter(|member| member.id != members.local.0);
        1 + others.filter(|member| reached(MemberId(member.id))).count()
            < quorum(members.members().len())
    } else {
        !reached(now.leader)
    };
    if lost { Silence::ConnectionLost } else { Silence::Slow }
}

/// Voters other than this member to which leadership can be handed, the longest connected first: it is
/// the most likely to be up to date.
pub fn transferees<T: Ord>(
    members: &Membership,
    since: impl Fn(MemberId) -> Option<T>,
) -> Vec<MemberId> {
    let mut reached: Vec<(T, MemberId)> = voters(members)
        .map(|member| MemberId(member.id))
        .filter(|id| *id != members.local)
        .filter_map(|id| Some((since(id)?, id)))
        .collect();
    reached.sort_unstable();
    reached.into_iter().map(|(_, id)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::membership::Member;
    use crate::core::types::ClusterId;

    /// Members from 1 on; this one is 1. `s`: a started voter, `n`: one that never ran, `l`: a learner.
    fn members(kinds: &str) -> Membership {
        let mut members = Membership::new(ClusterId(1), MemberId(1), 8);
        let list = kinds.chars().zip(1..).map(|(kind, id)| Member {
            id,
            peer_urls: vec![format!("http://h{id}:1")],
            is_learner: kind == 'l',
            name: if kind == 'n' { String::new() } else { format!("m{id}") },
            client_urls: Vec::new(),
        });
        members.restore(list.collect::<Vec<_>>(), []);
        members
    }

    /// `S`: stable, `R`: recent, `-`: none; by member.
    fn contact(text: &str) -> impl Fn(MemberId) -> Contact + '_ {
        |id| match text.as_bytes().get(id.0 as usize - 1) {
            Some(b'S') => Contact::Stable,
            Some(b'R') => Contact::Recent,
            _ => Contact::None,
        }
    }

    const STARTED: Result<(), ReconfigError> = Err(ReconfigError::NotEnoughStarted);
    const UNHEALTHY: Result<(), ReconfigError> = Err(ReconfigError::Unhealthy);

    #[test]
    fn additions() {
        for (kinds, seen, voter, learner) in [
            ("s", "-", Ok(()), Ok(())),
            // A single voter that has not published itself yet.
            ("n", "-", STARTED, Ok(())),
            ("ss", "-S", Ok(()), Ok(())),
            ("ss", "-R", UNHEALTHY, UNHEALTHY),
            ("ss", "--", UNHEALTHY, UNHEALTHY),
            ("sn", "--", STARTED, UNHEALTHY),
            ("sn", "-S", STARTED, Ok(())),
            // Four voters need three.
            ("sss", "-SS", Ok(()), Ok(())),
            ("sss", "-S-", UNHEALTHY, UNHEALTHY),
            ("sss", "-SR", UNHEALTHY, UNHEALTHY),
            ("ssn", "-SS", STARTED, Ok(())),
            // Five voters need three.
            ("ssss", "-SS-", Ok(()), Ok(())),
            ("sssn", "-SS-", Ok(()), Ok(())),
            ("ssss", "-S--", UNHEALTHY, UNHEALTHY),
            // Learners neither count nor help.
            ("sl", "--", Ok(()), Ok(())),
            ("ssl", "-RS", UNHEALTHY, UNHEALTHY),
            ("sssl", "-SS-", Ok(()), Ok(())),
        ] {
            assert_eq!(may_add(&members(kinds), false, contact(seen)), voter, "{kinds} {seen}");
            assert_eq!(may_add(&members(kinds), true, contact(seen)), learner, "{kinds} {seen}");
        }
    }

    #[test]
    fn removals() {
        for (kinds, seen, id, result) in [
            ("s", "-", 1, STARTED),
            // Not a member: the log says so.
            ("s", "-", 9, Ok(())),
            ("sl", "--", 2, Ok(())),
            ("ss", "-S", 1, Ok(())),
            ("ss", "-S", 2, Ok(())),
            ("ss", "-R", 1, UNHEALTHY),
            ("ss", "-R", 2, UNHEALTHY),
            ("ss", "--", 2, Ok(())),
            ("sn", "--", 2, Ok(())),
            ("sn", "--", 1, STARTED),
            ("sss", "-SS", 2, Ok(())),
            ("sss", "-SS", 1, Ok(())),
            ("sss", "-S-", 2, UNHEALTHY),
            ("sss", "-S-", 1, UNHEALTHY),
            ("sss", "-S-", 3, Ok(())),
            ("sss", "-RS", 2, UNHEALTHY),
            ("ssn", "-S-", 3, Ok(())),
            ("ssn", "-S-", 2, STARTED),
            ("sssss", "-SSS-", 2, Ok(())),
            ("sssss", "-SS--", 2, UNHEALTHY),
            ("sssss", "-SS--", 5, Ok(())),
        ] {
            let checked = may_remove(&members(kinds), MemberId(id), contact(seen));
            assert_eq!(checked, result, "{kinds} {seen} {id}");
        }
    }

    #[test]
    fn promotions() {
        for (kinds, result) in [
            ("sl", Ok(())),
            ("nl", STARTED),
            ("snl", Ok(())),
            ("ssnl", Ok(())),
            ("snnl", STARTED),
            ("ssnnl", Ok(())),
        ] {
            assert_eq!(may_promote(&members(kinds)), result, "{kinds}");
        }
        for (matched, leader, ready) in
            [(0, 0, true), (9, 10, true), (8, 10, false), (89, 100, false), (90, 100, true)]
        {
            assert_eq!(is_ready(Index(matched), Index(leader)), ready, "{matched} of {leader}");
        }
        assert!(!is_ready(Index(u64::MAX / 2), Index(u64::MAX)));
    }

    #[test]
    fn silences() {
        let elected = Some(10_000);
        let led = |leader, elected_ms, lost_ms| Leadership {
            leader: MemberId(leader),
            elected_ms,
            lost_ms,
        };
        let always = |_| Some(0);
        let never = |_| None;
        let three = members("sss");
        for (now, start, reached, why) in [
            (led(0, None, None), 1, true, Silence::NeverProposed),
            (led(0, elected, Some(20_000)), 21_000, true, Silence::NeverProposed),
            // The leader went while this waited: nobody knows what became of it.
            (led(0, elected, Some(20_000)), 19_000, true, Silence::Slow),
            (led(2, elected, Some(9_000)), 9_500, true, Silence::LeaderFailed),
            (led(2, elected, Some(9_000)), 8_001, false, Silence::LeaderFailed),
            (led(2, elected, Some(9_000)), 8_000, true, Silence::Slow),
            (led(2, elected, None), 10_000, true, Silence::Slow),
            (led(2, elected, None), 11_000, false, Silence::ConnectionLost),
            (led(1, elected, None), 11_000, true, Silence::Slow),
            (led(1, elected, None), 11_000, false, Silence::ConnectionLost),
        ] {
            let since = |id: MemberId| if reached { always(id) } else { never(id) };
            assert_eq!(silence(&three, now, start, 1000, since), why, "{now:?} {start}");
        }
        // Connected, but only since the proposal was made.
        let late = |_| Some(11_500);
        let now = led(2, elected, None);
        assert_eq!(silence(&three, now, 11_000, 1000, late), Silence::ConnectionLost);
        let alone = led(1, elected, None);
        assert_eq!(silence(&members("s"), alone, 11_000, 1000, never), Silence::Slow);
    }

    #[test]
    fn leadership_goes_to_the_voter_connected_longest() {
        let since = |id: MemberId| [None, Some(30), Some(10), Some(5), None][id.0 as usize - 1];
        let order = transferees(&members("sssls"), since);
        assert_eq!(order, [MemberId(3), MemberId(2)]);
        assert_eq!(transferees(&members("s"), |_| Some(1)), []);
    }
}
