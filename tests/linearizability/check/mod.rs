//! Whether what clients saw of a cluster can be what one store, doing one thing at a time, answered.
//!
//! Pure: histories in, violations out. Three judges, none of which trusts what it is to prove:
//!
//! - [`watch`]: each member's watch from revision 1 must give the whole history, without gap or
//!   repetition, the same on all.
//! - [`order`]: the server names a revision for all it does. That is a total order; it must hold every
//!   acknowledged write once, show every read the state at its revision, and keep to real time.
//! - [`search`]: believes no revision. It looks for any order of the operations that gives the answers
//!   that were given and keeps to real time (Wing and Gong's search with Lowe's memory), key group by
//!   key group.

// Two test binaries share this module, and each uses a part of it.
#![allow(dead_code)]

pub mod order;
pub mod search;
#[cfg(test)]
mod tests;
pub mod watch;

use std::fmt;

/// A key of the workload, by number.
pub type Key = u16;
/// A value; no two writes have the same.
pub type Value = u64;
/// Nanoseconds on the one clock of all clients.
pub type Time = u64;
/// A store's main revision. An empty store has 1.
pub type Revision = i64;

/// What must hold for a call to take its first branch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guard {
    /// The key has this value.
    Value(Key, Value),
    /// The key was last changed at this revision, 0 if it does not exist; the client knows from a read
    /// that this means `value`.
    Revision { key: Key, revision: Revision, value: Option<Value> },
}

impl Guard {
    pub fn key(self) -> Key {
        match self {
            Guard::Value(key, _) | Guard::Revision { key, .. } => key,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Put(Key, Value),
    Delete(Key),
    Get(Key),
}

impl Step {
    pub fn key(self) -> Key {
        match self {
            Step::Put(key, _) | Step::Delete(key) | Step::Get(key) => key,
        }
    }
}

/// A request: a transaction, of which a put, a get and a delete are the plain cases. No branch names a
/// key in two steps.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Call {
    pub when: Vec<Guard>,
    pub then: Vec<Step>,
    pub otherwise: Vec<Step>,
    /// May be answered from a member's own state, however old.
    pub serializable: bool,
}

impl Call {
    pub fn plain(step: Step) -> Call {
        Call { then: vec![step], ..Call::default() }
    }

    pub fn branch(&self, succeeded: bool) -> &[Step] {
        if succeeded { &self.then } else { &self.otherwise }
    }

    pub fn steps(&self) -> impl Iterator<Item = Step> {
        self.then.iter().chain(&self.otherwise).copied()
    }

    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.when.iter().map(|guard| guard.key()).chain(self.steps().map(Step::key))
    }
}

/// A key as the server shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kv {
    pub value: Value,
    pub created: Revision,
    pub modified: Revision,
    pub version: i64,
}

/// What became of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    Put,
    /// How many keys.
    Deleted(i64),
    Got(Option<Kv>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// Of the answer's header.
    pub revision: Revision,
    pub succeeded: bool,
    pub answers: Vec<Answer>,
}

impl Reply {
    /// Whether the operation changed something, so that the revision is its own.
    pub fn wrote(&self) -> bool {
        let wrote = |answer: &Answer| match answer {
            Answer::Put => true,
            Answer::Deleted(keys) => *keys > 0,
            Answer::Got(_) => false,
        };
        self.answers.iter().any(wrote)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Done(Reply),
    /// It may have happened, or happen yet.
    Unknown,
    /// It did not and never will.
    Failed,
}

/// What one client did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Operation {
    pub client: usize,
    /// That was asked.
    pub member: usize,
    pub invoked: Time,
    /// [`Time::MAX`] unless it is done.
    pub returned: Time,
    pub call: Call,
    pub outcome: Outcome,
}

impl Operation {
    pub fn reply(&self) -> Option<&Reply> {
        match &self.outcome {
            Outcome::Done(reply) => Some(reply),
            Outcome::Unknown | Outcome::Failed => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operation { client, member, call, .. } = self;
        let ms = |time: Time| time as f64 / 1e6;
        write!(f, "client {client} at member {member}, {:.3} ms to ", ms(self.invoked))?;
        match self.returned {
            Time::MAX => write!(f, "?")?,
            time => write!(f, "{:.3} ms", ms(time))?,
        }
        let serializable = if call.serializable { " (serializable)" } else { "" };
        write!(f, ": if {:?} then {:?} else {:?}", call.when, call.then, call.otherwise)?;
        write!(f, "{serializable} -> {:?}", self.outcome)
    }
}

/// A change of one key, as a watch tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// `None` for a key that is not of the workload.
    pub key: Option<Key>,
    /// The pair that it has now, or `None` after a delete.
    pub now: Option<Kv>,
    /// The pair that it had.
    pub before: Option<Kv>,
}

/// All changes, in order: those of revision 2 first, and so on without a gap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    pub revisions: Vec<Vec<Change>>,
    /// When each was first seen by a watcher: it was committed by then.
    pub seen: Vec<Time>,
}

impl History {
    /// Of the first entry.
    pub const FIRST: Revision = 2;

    pub fn last(&self) -> Revision {
        self.revisions.len() as Revision + 1
    }

    /// The changes of one revision; nothing for the empty store's and those not reached.
    pub fn at(&self, revision: Revision) -> &[Change] {
        let changes =
            usize::try_from(revision - Self::FIRST).ok().and_then(|n| self.revisions.get(n));
        changes.map_or(&[], Vec::as_slice)
    }
}

/// A law that was broken, in words, with the operations that show it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Violation {
    /// A revision is missing from a watch.
    Gap { member: usize, after: Revision, got: Revision },
    /// A watch gave a revision, or a part of it, again.
    Repeated { member: usize, revision: Revision },
    /// A watch gave a revision only after a later one.
    Reordered { member: usize, after: Revision, got: Revision },
    /// A watch ended before the last revision.
    Short { member: usize, at: Revision, last: Revision },
    /// Two members tell a revision differently.
    Disagree { revision: Revision, members: (usize, usize), told: String },
    /// An event contradicts those before it.
    Event { revision: Revision, told: String, expected: String },
    /// An acknowledged write is not in the history at its revision.
    Lost { operation: String, found: String },
    /// A revision was acknowledged to two writers, or a write is in the history twice.
    Twice { revision: Revision, operations: [String; 2] },
    /// Nobody asked for what happened at this revision, or the one who did was told that it failed.
    Invented { revision: Revision, changes: String, why: String },
    /// A reply does not show the state at its revision.
    Wrong { operation: String, expected: String },
    /// An operation was answered from a state older than one known before it began.
    Stale { operation: String, known: Revision },
    /// No order of the operations explains the answers.
    NoOrder { keys: Vec<Key>, placed: usize, of: usize, stuck: Vec<String> },
    /// The search for an order was given up.
    Undecided { keys: Vec<Key>, steps: u64 },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Gap { member, after, got } => {
                write!(f, "watch of member {member}: revision {got} follows {after}")
            }
            Violation::Repeated { member, revision } => {
                write!(f, "watch of member {member}: revision {revision} was given twice")
            }
            Violation::Reordered { member, after, got } => {
                write!(f, "watch of member {member}: revision {got} came after {after}")
            }
            Violation::Short { member, at, last } => {
                write!(f, "watch of member {member} ended at {at} of {last}")
            }
            Violation::Disagree { revision, members: (a, b), told } => {
                write!(f, "members {a} and {b} tell revision {revision} differently: {told}")
            }
            Violation::Event { revision, told, expected } => {
                write!(f, "event of revision {revision} is {told}, and not {expected}")
            }
            Violation::Lost { operation, found } => {
                write!(f, "acknowledged write is lost: {operation}; found {found}")
            }
            Violation::Twice { revision, operations: [a, b] } => {
                write!(f, "twice, second at revision {revision}: {a}; {b}")
            }
            Violation::Invented { revision, changes, why } => {
                write!(f, "revision {revision} has {changes}, but {why}")
            }
            Violation::Wrong { operation, expected } => {
                write!(f, "wrong answer: {operation}; the state asks for {expected}")
            }
            Violation::Stale { operation, known } => {
                write!(f, "revision {known} was known before this began: {operation}")
            }
            Violation::NoOrder { keys, placed, of, stuck } => {
                write!(f, "no order of the operations on keys {keys:?}: {placed} of {of} fit")?;
                stuck.iter().try_for_each(|line| write!(f, "\n    cannot follow: {line}"))
            }
            Violation::Undecided { keys, steps } => {
                write!(f, "no order of the operations on keys {keys:?} found in {steps} steps")
            }
        }
    }
}

/// What was looked at, for the record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    pub operations: usize,
    pub acknowledged: usize,
    pub unknown: usize,
    /// Unknown ones that turned out to have happened.
    pub happened: usize,
    pub failed: usize,
    pub revisions: usize,
    /// Of the search.
    pub steps: u64,
}

/// All three judges: what clients did, and what the watch of each member told up to the final revision;
/// `parts` are watches that were broken off.
///
/// # Errors
/// What was found; at least one.
pub fn check(
    operations: &[Operation],
    watches: &[watch::Log],
    parts: &[watch::Log],
    last: Revision,
) -> Result<Summary, Vec<Violation>> {
    let history = watch::history(watches, parts, last)?;
    let placed = order::check(operations, &history)?;
    let steps = search::check(operations, &placed.hints)?;
    let count = |is: fn(&Outcome) -> bool| {
        operations.iter().filter(|operation| is(&operation.outcome)).count()
    };
    Ok(Summary {
        operations: operations.len(),
        acknowledged: count(|outcome| matches!(outcome, Outcome::Done(_))),
        unknown: count(|outcome| *outcome == Outcome::Unknown),
        happened: placed.happened,
        failed: count(|outcome| *outcome == Outcome::Failed),
        revisions: history.revisions.len(),
        steps,
    })
}
