//! What a message must be before the raft crate may see it.
//!
//! The crate trusts its peers: an unknown enum, a gap between entries or a commit index beyond the log ends the
//! process. Here such a message becomes a [`StepError`] that says what is wrong, and the member goes on.
//! [`well_formed`] looks at the message alone, [`admit`] compares it with where this member stands.

use quorate_proto::raftpb::{self, EntryType, Message};
use raft::eraftpb::MessageType::{self, *};

use super::confchange::{self, ConfChangeError};
use super::convert;

/// Terms and indexes above this are refused: a cluster cannot reach them, and arithmetic stays far from overflow.
const NUMBER_MAX: u64 = u64::MAX >> 1;

/// Why a message was not taken. Except for [`StepError::CommitBeyondLog`], nothing is to be done but to count and
/// log it: raft lives with lost messages.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum StepError {
    #[error("unknown message type {0}")]
    UnknownType(u32),
    #[error("message type {0} never travels between members")]
    Local(u32),
    #[error("message for member {to:x} reached member {id:x}")]
    NotForUs { to: u64, id: u64 },
    #[error("message of type {kind} from member {from:x}, which cannot be its sender")]
    BadSender { kind: u32, from: u64 },
    #[error("message of type {kind} with term {term}")]
    BadTerm { kind: u32, term: u64 },
    #[error("message of type {kind}: {what} is {value}")]
    BadNumber { kind: u32, what: &'static str, value: u64 },
    #[error("message of type {kind} with {count} entries")]
    BadCount { kind: u32, count: usize },
    #[error("entry {index}: {what}")]
    BadEntry { index: u64, what: &'static str },
    #[error("entry {index}")]
    BadConfChange { index: u64, source: ConfChangeError },
    #[error("snapshot at {index}: {what}")]
    BadSnapshot { index: u64, what: &'static str },
    /// The leader says that entries are committed which this member acknowledged and no longer has: its log was lost or cut.
    /// It must not go on serving.
    #[error(
        "commit index {commit} is beyond the last entry {last}: this member's log was truncated or lost"
    )]
    CommitBeyondLog { commit: u64, last: u64 },
    #[error("member {from:x} acknowledges entry {index}, the last one is {last}")]
    AckBeyondLog { from: u64, index: u64, last: u64 },
    #[error("response from member {from:x}, which is not in the cluster")]
    UnknownPeer { from: u64 },
    /// A forwarded proposal met no leader, or one that is handing over.
    #[error("forwarded proposal dropped")]
    ProposalDropped,
}

/// Where this member stands when a message arrives.
pub(super) struct Facts {
    pub(super) term: u64,
    pub(super) leading: bool,
    pub(super) campaigning: bool,
    pub(super) last: u64,
    pub(super) committed: u64,
    pub(super) committed_term: u64,
    /// Everything in the log is on disk.
    pub(super) all_persisted: bool,
    /// Whether an election may begin here now.
    pub(super) may_campaign: bool,
    /// What the sender has acknowledged, if it is in the cluster.
    pub(super) matched: Option<u64>,
}

/// What to do with a message that is in order.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Step,
    /// Late or untimely: ignored without a word.
    Drop,
}

/// Checks `message` by itself and answers its type.
pub(super) fn well_formed(message: &Message, id: u64) -> Result<MessageType, StepError> {
    let kind = message.r#type;
    let checked = convert::message_type(kind).ok_or(StepError::UnknownType(kind))?;
    match checked {
        // etcd's server asks the leader over HTTP; a follower that gets this message aborts.
        MsgHup | MsgBeat | MsgUnreachable | MsgSnapStatus | MsgCheckQuorum | MsgTransferLeader => {
            return Err(StepError::Local(kind));
        }
        _ => {}
    }
    if message.to != id {
        return Err(StepError::NotForUs { to: message.to, id });
    }
    // What travels towards the leader without a term keeps its first sender, so it can come back to it.
    let forwarded = matches!(checked, MsgPropose | MsgReadIndex);
    if message.from == 0 || (message.from == id && !forwarded) {
        return Err(StepError::BadSender { kind, from: message.from });
    }
    if (message.term == 0) != forwarded || message.term > NUMBER_MAX {
        return Err(StepError::BadTerm { kind, term: message.term });
    }
    for (what, value) in [
        ("index", message.index),
        ("log term", message.log_term),
        ("commit", message.commit),
        ("reject hint", message.reject_hint),
    ] {
        if value > NUMBER_MAX {
            return Err(StepError::BadNumber { kind, what, value });
        }
    }
    match checked {
        MsgPropose => proposal(message)?,
        MsgAppend => append(message)?,
        MsgSnapshot => snapshot(message)?,
        MsgReadIndex | MsgReadIndexResp if message.entries.len() != 1 => {
            return Err(StepError::BadCount { kind, count: message.entries.len() });
        }
        _ => {}
    }
    Ok(checked)
}

fn proposal(message: &Message) -> Result<(), StepError> {
    if message.entries.is_empty() {
        return Err(StepError::BadCount { kind: message.r#type, count: 0 });
    }
    message.entries.iter().try_for_each(payload)
}

fn append(message: &Message) -> Result<(), StepError> {
    // Only the position before the first entry has term 0; elsewhere it would match what is not there.
    if (message.index == 0) != (message.log_term == 0) {
        let (kind, value) = (message.r#type, message.log_term);
        return Err(StepError::BadNumber { kind, what: "log term", value });
    }
    entries(&message.entries, message.index, message.log_term, message.term)
}

/// Checks that `entries` follow `(index, term)` without a gap, their terms never falling nor above `term_max`.
pub(super) fn entries(
    entries: &[raftpb::Entry],
    mut index: u64,
    mut term: u64,
    term_max: u64,
) -> Result<(), StepError> {
    for entry in entries {
        let bad = |what| Err(StepError::BadEntry { index: entry.index, what });
        if entry.index != index + 1 {
            return bad("does not follow the one before");
        }
        if entry.term == 0 || entry.term < term {
            return bad("its term is below that of the one before");
        }
        if entry.term > term_max {
            return bad("its term is above the current one");
        }
        payload(entry)?;
        (index, term) = (entry.index, entry.term);
    }
    Ok(())
}

/// Checks type and, for a conf change, data: what could not be applied must not be logged.
fn payload(entry: &raftpb::Entry) -> Result<(), StepError> {
    let index = entry.index;
    match EntryType::try_from(entry.r#type) {
        Ok(EntryType::EntryNormal) => Ok(()),
        Ok(EntryType::EntryConfChange) => match confchange::decode(&entry.data) {
            Ok(_) => Ok(()),
            Err(source) => Err(StepError::BadConfChange { index, source }),
        },
        Ok(EntryType::EntryConfChangeV2) => {
            Err(StepError::BadEntry { index, what: "joint conf changes are not supported" })
        }
        Err(_) => Err(StepError::BadEntry { index, what: "unknown entry type" }),
    }
}

fn snapshot(message: &Message) -> Result<(), StepError> {
    let metadata = message.snapshot.as_ref().and_then(|snapshot| snapshot.metadata.as_ref());
    let Some(metadata) = metadata else {
        return Err(StepError::BadSnapshot { index: 0, what: "no metadata" });
    };
    let bad = |what| Err(StepError::BadSnapshot { index: metadata.index, what });
    if metadata.index == 0 || metadata.index > NUMBER_MAX {
        return bad("its index is out of range");
    }
    if metadata.term == 0 || metadata.term > message.term {
        return bad("its term is out of range");
    }
    let Some(state) = &metadata.conf_state else {
        return bad("no conf state");
    };
    if let Err(what) = conf_state(state) {
        return bad(what);
    }
    if state.voters.is_empty() {
        return bad("no voters");
    }
    Ok(())
}

/// Checks that `state` is one the raft crate can take: simple, every member once. No members at all is a cluster that is
/// still to be made.
pub(super) fn conf_state(state: &raftpb::ConfState) -> Result<(), &'static str> {
    if !state.voters_outgoing.is_empty() || !state.learners_next.is_empty() || state.auto_leave {
        return Err("joint conf states are not supported");
    }
    let mut ids: Vec<u64> = state.voters.iter().chain(&state.learners).copied().collect();
    ids.sort_unstable();
    if ids.first() == Some(&0) {
        return Err("member 0 in its conf state");
    }
    if ids.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err("a member twice in its conf state");
    }
    if state.voters.is_empty() && !state.learners.is_empty() {
        return Err("learners without voters in its conf state");
    }
    Ok(())
}

/// Compares a well-formed `message` of type `kind` with where this member stands.
pub(super) fn admit(
    message: &Message,
    kind: MessageType,
    facts: &Facts,
) -> Result<Verdict, StepError> {
    // A message of an older term only provokes an answer, one of a newer term ends our leadership first.
    let current = message.term == facts.term;
    let followed = message.term > facts.term || (current && !facts.leading);
    match kind {
        MsgHeartbeat if followed && message.commit > facts.last => {
            Err(StepError::CommitBeyondLog { commit: message.commit, last: facts.last })
        }
        MsgSnapshot
            if followed
                && let Some(metadata) =
                    message.snapshot.as_ref().and_then(|s| s.metadata.as_ref())
                && metadata.index == facts.committed
                && metadata.term != facts.committed_term =>
        {
            let what = "its term is not that of the entry committed there";
            Err(StepError::BadSnapshot { index: metadata.index, what })
        }
        MsgAppendResponse if current && facts.leading => acknowledgement(message, facts),
        // Votes are asked for only once the whole log is on disk, so these answer an older question. To win by them
        // would be to lead with a log that is not all persisted.
        MsgRequestVoteResponse | MsgRequestPreVoteResponse
            if facts.campaigning && !facts.all_persisted && !message.reject =>
        {
            Ok(Verdict::Drop)
        }
        MsgTimeoutNow if !facts.leading && !facts.may_campaign => Ok(Verdict::Drop),
        _ => Ok(Verdict::Step),
    }
}

/// A rejection that arrives late, below what its sender has acknowledged since, would make the crate
/// send again what the sender has, from an index at or below its match index.
fn acknowledgement(message: &Message, facts: &Facts) -> Result<Verdict, StepError> {
    let Some(matched) = facts.matched else {
        return Err(StepError::UnknownPeer { from: message.from });
    };
    if message.reject {
        let late = message.index <= matched || message.reject_hint < matched;
        return Ok(if late { Verdict::Drop } else { Verdict::Step });
    }
    if message.index > facts.last {
        let (from, index, last) = (message.from, message.index, facts.last);
        return Err(StepError::AckBeyondLog { from, index, last });
    }
    Ok(Verdict::Step)
}
