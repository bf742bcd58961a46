//! The server's own order: every operation at its revision.
//!
//! Given the changes of every revision, a history is linearizable in the order of revisions (a write
//! first at its own, readers behind it in the order of their calls) exactly if
//! - each acknowledged write is what changed at its revision, and it alone;
//! - each other revision is that of one write whose outcome is unknown;
//! - each answer is that of the state at its revision;
//! - nobody is at a revision below one that was known before it began, nor a writer at that one itself.

use std::collections::HashMap;

use super::{
    Answer, Call, Change, Guard, History, Key, Kv, Operation, Outcome, Reply, Revision, Step, Time,
    Value, Violation,
};

/// Where operations are in the order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placed {
    /// For each operation a place for the search to try it at: its revision, writers before readers.
    pub hints: Vec<u64>,
    /// How many unknown ones have happened.
    pub happened: usize,
}

/// A place behind all others, for what has not happened.
pub const NEVER: u64 = u64::MAX;

pub fn hint(revision: Revision, wrote: bool) -> u64 {
    revision as u64 * 2 + u64::from(!wrote)
}

/// Every key's pairs by revision, the newest last; `None` while it is deleted.
struct States(HashMap<Key, Vec<(Revision, Option<Kv>)>>);

impl States {
    fn of(history: &History) -> States {
        let mut keys: HashMap<Key, Vec<(Revision, Option<Kv>)>> = HashMap::new();
        for (n, changes) in history.revisions.iter().enumerate() {
            for change in changes {
                if let Some(key) = change.key {
                    let revision = n as Revision + History::FIRST;
                    keys.entry(key).or_default().push((revision, change.now));
                }
            }
        }
        States(keys)
    }

    /// The pair of `key` after everything up to `revision`.
    fn at(&self, key: Key, revision: Revision) -> Option<Kv> {
        let pairs = self.0.get(&key)?;
        let behind = pairs.partition_point(|(at, _)| *at <= revision);
        behind.checked_sub(1).and_then(|last| pairs[last].1)
    }

    /// Which branch a call takes after everything up to `revision`.
    fn holds(&self, call: &Call, revision: Revision) -> bool {
        call.when.iter().all(|guard| match *guard {
            Guard::Value(key, value) => self.at(key, revision).is_some_and(|kv| kv.value == value),
            Guard::Revision { key, revision: modified, .. } => {
                self.at(key, revision).map_or(0, |kv| kv.modified) == modified
            }
        })
    }

    /// What a call does at `revision`, after everything before it: its reply and its changes.
    fn run(&self, call: &Call, revision: Revision) -> (Reply, Vec<Change>) {
        let before = revision - 1;
        let succeeded = self.holds(call, before);
        let mut changes: Vec<Change> = Vec::new();
        let mut answers = Vec::new();
        for step in call.branch(succeeded) {
            let key = step.key();
            // A step sees those before it, though none of them is on its own key.
            let had = self.at(key, before);
            answers.push(match *step {
                Step::Put(_, value) => {
                    let created = had.map_or(revision, |kv| kv.created);
                    let version = had.map_or(1, |kv| kv.version + 1);
                    let now = Some(Kv { value, created, modified: revision, version });
                    changes.push(Change { key: Some(key), now, before: had });
                    Answer::Put
                }
                Step::Delete(_) => {
                    if had.is_some() {
                        changes.push(Change { key: Some(key), now: None, before: had });
                    }
                    Answer::Deleted(i64::from(had.is_some()))
                }
                Step::Get(_) => Answer::Got(had),
            });
        }
        (Reply { revision, succeeded, answers }, changes)
    }
}

/// Holds the operations against the history.
///
/// # Errors
/// What contradicts; at least one.
pub fn check(operations: &[Operation], history: &History) -> Result<Placed, Vec<Violation>> {
    let states = States::of(history);
    let mut violations = Vec::new();
    let mut hints = vec![NEVER; operations.len()];
    // Who made each revision.
    let mut owners: HashMap<Revision, usize> = HashMap::new();
    let mut impostors = Vec::new();
    for (n, operation) in operations.iter().enumerate() {
        let Some(reply) = operation.reply() else { continue };
        hints[n] = hint(reply.revision, reply.wrote());
        let answered = acknowledged(operation, reply, &states, history);
        if let Err(violation) = answered {
            violations.push(violation);
            impostors.extend(reply.wrote().then_some((reply.revision, n)));
        } else if reply.wrote()
            && let Some(first) = owners.insert(reply.revision, n)
        {
            violations.push(Violation::Twice {
                revision: reply.revision,
                operations: [operations[first].to_string(), operation.to_string()],
            });
        }
    }
    // They have been told of; what is at their revisions needs no other explanation.
    for (revision, n) in impostors {
        owners.entry(revision).or_insert(n);
    }
    let known = Known::of(operations, history);
    violations.extend(real_time(operations, &known));
    let happened = match unacknowledged(operations, history, &states, &mut owners, &known) {
        Ok(placed) => {
            for (n, revision) in &placed {
                hints[*n] = hint(*revision, true);
            }
            placed.len()
        }
        Err(found) => {
            violations.extend(found);
            0
        }
    };
    if violations.is_empty() { Ok(Placed { hints, happened }) } else { Err(violations) }
}

/// An acknowledged operation is what its revision says.
fn acknowledged(
    operation: &Operation,
    reply: &Reply,
    states: &States,
    history: &History,
) -> Result<(), Violation> {
    let revision = reply.revision;
    if revision > history.last() {
        let found = format!("a history that ends at {}", history.last());
        return Err(Violation::Lost { operation: operation.to_string(), found });
    }
    if !reply.wrote() {
        // It saw all up to its revision: as if it stood at the next, which it does not make.
        let (mut expected, changes) = states.run(&operation.call, revision + 1);
        expected.revision = revision;
        if *reply != expected || !changes.is_empty() {
            let expected = format!("{expected:?}");
            return Err(Violation::Wrong { operation: operation.to_string(), expected });
        }
        return Ok(());
    }
    let (expected, changes) = states.run(&operation.call, revision);
    if changes != history.at(revision) {
        let found = format!("{:?} at its revision", history.at(revision));
        return Err(Violation::Lost { operation: operation.to_string(), found });
    }
    if *reply != expected {
        let expected = format!("{expected:?}");
        return Err(Violation::Wrong { operation: operation.to_string(), expected });
    }
    Ok(())
}

/// From when on a revision was known to be over: somebody had an answer at it or behind it.
struct Known(Vec<(Time, Revision)>);

impl Known {
    fn of(operations: &[Operation], history: &History) -> Known {
        let replies = operations
            .iter()
            .filter_map(|operation| Some((operation.returned, operation.reply()?.revision)));
        let seen = history
            .seen
            .iter()
            .enumerate()
            .map(|(n, time)| (*time, n as Revision + History::FIRST));
        let mut known: Vec<(Time, Revision)> = replies.chain(seen).collect();
        known.sort_unstable();
        let mut highest = 1;
        known.retain_mut(|(_, revision)| {
            let higher = *revision > highest;
            highest = highest.max(*revision);
            higher
        });
        Known(known)
    }

    /// The highest revision that was known before `time`.
    fn before(&self, time: Time) -> Revision {
        let behind = self.0.partition_point(|(at, _)| *at < time);
        behind.checked_sub(1).map_or(1, |last| self.0[last].1)
    }
}

fn real_time(operations: &[Operation], known: &Known) -> Vec<Violation> {
    let mut violations = Vec::new();
    for operation in operations {
        let Some(reply) = operation.reply() else { continue };
        if operation.call.serializable {
            continue;
        }
        let before = known.before(operation.invoked);
        if reply.revision < before || (reply.wrote() && reply.revision == before) {
            let operation = operation.to_string();
            violations.push(Violation::Stale { operation, known: before });
        }
    }
    violations
}

/// Finds for every revision that nobody was acknowledged an unknown operation that made it, each for
/// one at most; answers those.
fn unacknowledged(
    operations: &[Operation],
    history: &History,
    states: &States,
    owners: &mut HashMap<Revision, usize>,
    known: &Known,
) -> Result<Vec<(usize, Revision)>, Vec<Violation>> {
    let mut writers: HashMap<Value, usize> = HashMap::new();
    let mut without_value = Vec::new();
    for (n, operation) in operations.iter().enumerate() {
        for step in operation.call.steps() {
            if let Step::Put(_, value) = step {
                let other = writers.insert(value, n);
                assert!(other.is_none_or(|other| other == n), "two writes of value {value}");
            }
        }
        if operation.call.steps().any(|step| matches!(step, Step::Delete(_))) {
            without_value.push(n);
        }
    }
    let mut violations = Vec::new();
    let mut placed: Vec<(usize, Revision)> = Vec::new();
    // Deletes carry nothing that tells one from another: they are matched afterwards.
    let mut unnamed: Vec<Revision> = Vec::new();
    for revision in History::FIRST..=history.last() {
        let changes = history.at(revision);
        if owners.contains_key(&revision) || changes.iter().all(|change| change.key.is_none()) {
            continue;
        }
        let value = changes.iter().find_map(|change| change.now).map(|now| now.value);
        let Some(value) = value else {
            unnamed.push(revision);
            continue;
        };
        let invented =
            |why: String| Violation::Invented { revision, changes: format!("{changes:?}"), why };
        let Some(&n) = writers.get(&value) else {
            violations.push(invented("nobody asked for it".to_string()));
            continue;
        };
        let operation = &operations[n];
        match &operation.outcome {
            Outcome::Done(reply) => {
                violations.push(Violation::Twice {
                    revision,
                    operations: [operation.to_string(), format!("the same as {}", reply.revision)],
                });
            }
            Outcome::Failed => violations.push(invented(format!("this failed: {operation}"))),
            Outcome::Unknown if placed.iter().any(|(other, _)| *other == n) => {
                let again = "the same once more".to_string();
                violations.push(Violation::Twice {
                    revision,
                    operations: [operation.to_string(), again],
                });
            }
            Outcome::Unknown => match could_be(operation, revision, history, states, known) {
                Ok(()) => placed.push((n, revision)),
                Err(why) => violations.push(invented(format!("{why}: {operation}"))),
            },
        }
    }
    let candidates: Vec<usize> = without_value
        .into_iter()
        .filter(|n| operations[*n].outcome == Outcome::Unknown)
        .filter(|n| placed.iter().all(|(other, _)| other != n))
        .collect();
    match match_all(&unnamed, &candidates, |revision, n| {
        could_be(&operations[n], revision, history, states, known).is_ok()
    }) {
        Ok(pairs) => placed.extend(pairs),
        Err(revision) => violations.push(Violation::Invented {
            revision,
            changes: format!("{:?}", history.at(revision)),
            why: "no delete without an answer is left for it".to_string(),
        }),
    }
    for (n, revision) in &placed {
        owners.insert(*revision, *n);
    }
    if violations.is_empty() { Ok(placed) } else { Err(violations) }
}

/// Whether an operation without an answer can have made this revision; else why not.
fn could_be(
    operation: &Operation,
    revision: Revision,
    history: &History,
    states: &States,
    known: &Known,
) -> Result<(), &'static str> {
    let (_, changes) = states.run(&operation.call, revision);
    if changes != history.at(revision) {
        return Err("this would have changed something else");
    }
    if known.before(operation.invoked) >= revision {
        return Err("this was asked for later");
    }
    Ok(())
}

/// Gives every revision an operation of its own (augmenting paths); else the first that gets none.
fn match_all(
    revisions: &[Revision],
    candidates: &[usize],
    fits: impl Fn(Revision, usize) -> bool,
) -> Result<Vec<(usize, Revision)>, Revision> {
    let mut taken: HashMap<usize, Revision> = HashMap::new();
    for &revision in revisions {
        let mut tried = Vec::new();
        if !augment(revision, candidates, &fits, &mut taken, &mut tried) {
            return Err(revision);
        }
    }
    Ok(taken.into_iter().collect())
}

fn augment(
    revision: Revision,
    candidates: &[usize],
    fits: &impl Fn(Revision, usize) -> bool,
    taken: &mut HashMap<usize, Revision>,
    tried: &mut Vec<usize>,
) -> bool {
    for &candidate in candidates {
        if tried.contains(&candidate) || !fits(revision, candidate) {
            continue;
        }
        tried.push(candidate);
        let free = match taken.get(&candidate).copied() {
            None => true,
            Some(other) => augment(other, candidates, fits, taken, tried),
        };
        if free {
            taken.insert(candidate, revision);
            return true;
        }
    }
    false
}
