//! What members tell their watchers: the whole history, once, in order, and all of them the same.

use std::collections::HashMap;

use super::{Change, History, Key, Kv, Revision, Time, Violation};

/// One response with events.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Told {
    pub received: Time,
    /// With the revision of each.
    pub events: Vec<(Revision, Change)>,
}

/// Everything that a watcher of all keys from revision 1 was told by one member. After a broken
/// connection it has gone on behind the last revision that it has seen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Log {
    pub member: usize,
    pub told: Vec<Told>,
}

impl Log {
    /// The last revision so far, 1 before the first event.
    pub fn last(&self) -> Revision {
        let last = self.told.iter().rev().find_map(|told| told.events.last());
        last.map_or(1, |(revision, _)| *revision)
    }
}

/// The history that all watches agree on, up to `last`; `parts` are watches that were broken off, which
/// need not have got there.
///
/// # Errors
/// What is wrong with one of them, or between two.
pub fn history(watches: &[Log], parts: &[Log], last: Revision) -> Result<History, Vec<Violation>> {
    assert!(!watches.is_empty(), "somebody has watched");
    let mut violations = Vec::new();
    let mut histories: Vec<History> = Vec::new();
    let all: Vec<&Log> = watches.iter().chain(parts).collect();
    for (n, log) in all.iter().enumerate() {
        match single(log) {
            Ok(history) => {
                if n < watches.len() && history.last() < last {
                    let at = history.last();
                    violations.push(Violation::Short { member: log.member, at, last });
                }
                histories.push(history);
            }
            Err(violation) => violations.push(violation),
        }
    }
    if !violations.is_empty() {
        return Err(violations);
    }
    let mut agreed = histories.remove(0);
    for (other, log) in histories.iter().zip(&all[1..]) {
        let both = agreed.revisions.iter().zip(&other.revisions).enumerate();
        for (n, (one, two)) in both {
            if one != two {
                violations.push(Violation::Disagree {
                    revision: n as Revision + History::FIRST,
                    members: (all[0].member, log.member),
                    told: format!("{one:?} and {two:?}"),
                });
                break;
            }
        }
        for (first, seen) in agreed.seen.iter_mut().zip(&other.seen) {
            *first = (*first).min(*seen);
        }
    }
    agreed.revisions.truncate((last - 1) as usize);
    agreed.seen.truncate((last - 1) as usize);
    violations.extend(replay(&agreed));
    if violations.is_empty() { Ok(agreed) } else { Err(violations) }
}

/// What one member told, if it is gapless.
fn single(log: &Log) -> Result<History, Violation> {
    let member = log.member;
    let mut history = History::default();
    for (n, told) in log.told.iter().enumerate() {
        // A revision is told by one response; so another response begins with a new one.
        let mut open = false;
        for (revision, change) in &told.events {
            let at = history.last();
            if *revision == at + 1 {
                history.revisions.push(vec![*change]);
                history.seen.push(told.received);
                open = true;
            } else if *revision > at {
                let mut later = log.told[n..].iter().flat_map(|told| &told.events);
                return Err(if later.any(|(later, _)| *later == at + 1) {
                    Violation::Reordered { member, after: *revision, got: at + 1 }
                } else {
                    Violation::Gap { member, after: at, got: *revision }
                });
            } else if *revision < at || !open {
                return Err(Violation::Repeated { member, revision: *revision });
            } else {
                let changes = history.revisions.last_mut().expect("one is open");
                if changes.iter().any(|known| known.key == change.key && change.key.is_some()) {
                    return Err(Violation::Repeated { member, revision: at });
                }
                changes.push(*change);
            }
        }
    }
    Ok(history)
}

/// Each event names its revision, its key's creation, version and former pair.
fn replay(history: &History) -> Option<Violation> {
    let mut keys: HashMap<Key, Kv> = HashMap::new();
    for (n, changes) in history.revisions.iter().enumerate() {
        let revision = n as Revision + History::FIRST;
        for change in changes {
            // Of others only the revisions matter.
            let Some(key) = change.key else { continue };
            let before = keys.get(&key).copied();
            let now = change.now.map(|now| Kv {
                value: now.value,
                created: before.map_or(revision, |before| before.created),
                modified: revision,
                version: before.map_or(1, |before| before.version + 1),
            });
            let expected = Change { key: Some(key), now, before };
            let deleted_nothing = change.now.is_none() && before.is_none();
            if *change != expected || deleted_nothing {
                let (told, expected) = (format!("{change:?}"), format!("{expected:?}"));
                return Some(Violation::Event { revision, told, expected });
            }
            match now {
                Some(now) => keys.insert(key, now),
                None => keys.remove(&key),
            };
        }
    }
    None
}
