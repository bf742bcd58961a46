//! [`Node`]: one raft member, around the raft crate's `RawNode`.

use std::collections::VecDeque;

use bytes::Bytes;
use quorate_proto::raftpb;
use raft::eraftpb::{self, MessageType};
use raft::{RawNode, SnapshotStatus, StateRole};

use super::confchange::{self, ConfChangeError};
use super::guard::{self, Facts, StepError, Verdict};
use super::{convert, log::Log};
use crate::core::types::{Index, MemberId, Term};

/// Reads of other members that a new leader keeps until it may answer them. More are dropped: their members ask
/// again after 500 ms.
const FORWARDED_READS_MAX: usize = 4096;

/// How a member behaves; the same on all members but for `id` and `seed`.
#[derive(Clone, Debug)]
pub struct Config {
    /// This member; not 0.
    pub id: MemberId,
    /// Ticks without a leader before an election, drawn anew from `[election_ticks, 2 * election_ticks)` each time.
    /// Above `heartbeat_ticks`; etcd's default is 10 ticks of 100 ms.
    pub election_ticks: usize,
    /// Ticks between a leader's heartbeats, at least 1; etcd's default is 1.
    pub heartbeat_ticks: usize,
    /// Ask whether an election could be won before raising the term; etcd's default since 3.5.
    pub pre_vote: bool,
    /// Entries in one append message, in bytes; a larger entry travels alone. etcd: 1 MiB.
    pub max_message_bytes: u64,
    /// Append messages on their way to one follower, at least 1. etcd: 512.
    pub max_inflight: usize,
    /// Source of the election timeouts; members may share it.
    pub seed: u64,
}

impl Config {
    /// etcd's defaults for member `id`.
    pub fn new(id: MemberId, seed: u64) -> Config {
        Config {
            id,
            election_ticks: 10,
            heartbeat_ticks: 1,
            pre_vote: true,
            max_message_bytes: 1024 * 1024,
            max_inflight: 512,
            seed,
        }
    }

    fn validate(&self) -> Result<(), &'static str> {
        if self.id.0 == 0 {
            return Err("member id is 0");
        }
        if self.heartbeat_ticks == 0 {
            return Err("heartbeat ticks are 0");
        }
        if self.election_ticks <= self.heartbeat_ticks {
            return Err("election ticks are not above heartbeat ticks");
        }
        if self.max_inflight == 0 {
            return Err("messages in flight are limited to 0");
        }
        Ok(())
    }
}

/// What a member finds on its disk. The default is a member that has never run.
#[derive(Clone, Default, Debug)]
pub struct Restored {
    pub hard_state: raftpb::HardState,
    /// The members as of `applied`, not as of the snapshot.
    pub conf_state: raftpb::ConfState,
    /// The position before the first of `entries`; `(0, 0)` if the log is whole.
    pub snapshot: (Index, Term),
    pub entries: Vec<raftpb::Entry>,
    /// The last entry that the state machine holds, in `[snapshot index, last index]`.
    pub applied: Index,
}

/// Why a member cannot start from what it found.
#[derive(thiserror::Error, Debug)]
pub enum RaftError {
    #[error("raft configuration: {0}")]
    Config(&'static str),
    #[error("the log is broken")]
    Log(#[source] StepError),
    #[error(
        "applied index {applied} is below the snapshot at {snapshot}: entries between are gone"
    )]
    AppliedBelowSnapshot { applied: Index, snapshot: Index },
    #[error(
        "applied index {applied} is beyond the last log entry {last}: entries are missing from the log"
    )]
    AppliedBeyondLog { applied: Index, last: Index },
    #[error(
        "commit index {commit} is beyond the last log entry {last}: entries are missing from the log"
    )]
    CommitBeyondLog { commit: Index, last: Index },
    #[error("conf state: {0}")]
    ConfState(&'static str),
    #[error("snapshot position: index {index} with term {term}")]
    Snapshot { index: Index, term: Term },
}

/// Why a proposal was not taken. A proposal that was taken may still be lost: only its commit says that it is not.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum ProposeError {
    /// Try again when a leader is known.
    #[error("no leader")]
    NoLeader,
    /// The leader, which is this member, is handing over. Try again in a moment.
    #[error("leadership is being transferred")]
    Transferring,
    /// Another conf change is not applied yet here, on the leader. Try again when it is.
    #[error("another conf change is not applied yet")]
    ConfChangePending,
    /// This member was removed from the cluster.
    #[error("this member was removed from the cluster")]
    Stopped,
    #[error(transparent)]
    ConfChange(#[from] ConfChangeError),
}

/// What a member is in its term.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum Role {
    #[default]
    Follower,
    PreCandidate,
    Candidate,
    Leader,
}

/// A read that may be answered: the state machine has to have applied `index`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadState {
    pub index: Index,
    /// What [`Node::read_index`] was called with.
    pub context: u64,
}

/// Leader, term or role as they are now, given out when one of them changes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct LeaderChange {
    /// 0: none known.
    pub leader: MemberId,
    pub term: Term,
    /// This member's own.
    pub role: Role,
}

/// What is to be done, in the order of the fields where it matters.
#[derive(Clone, Default, Debug)]
pub struct Output {
    /// Answer [`Node::persisted`] with it once `snapshot`, `entries` and `hard_state` are on disk. `None`: there is
    /// nothing to persist.
    pub number: Option<u64>,
    /// Replace the log from the first of these on.
    pub entries: Vec<raftpb::Entry>,
    pub hard_state: Option<raftpb::HardState>,
    /// Whether persisting has to include an fsync; else only the commit index moved, and it may be late.
    pub must_sync: bool,
    /// Received from the leader: replaces log and state machine. The entries of this output come after it.
    pub snapshot: Option<raftpb::Snapshot>,
    /// May be sent now. What depends on something not yet persisted is kept inside until it is. A `MsgSnap` must
    /// be answered by [`Node::report_snapshot`].
    pub messages: Vec<raftpb::Message>,
    /// To apply, in order, each entry once; this member has persisted them.
    pub committed: Vec<raftpb::Entry>,
    /// Reads that got their index, each context once.
    pub reads: Vec<ReadState>,
    pub leader: Option<LeaderChange>,
    /// A follower needs a snapshot newer than [`Node::set_snapshot`] last offered: offer one.
    pub snapshot_wanted: Option<MemberId>,
}

/// How the leader replicates to one member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProgressState {
    /// One append at a time, until it is known where the logs agree.
    Probe,
    Replicate,
    /// Nothing, while a snapshot is on its way.
    Snapshot,
}

/// What the leader knows of one member, itself included.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerProgress {
    pub id: MemberId,
    pub matched: Index,
    pub next: Index,
    pub state: ProgressState,
    pub recent_active: bool,
    pub learner: bool,
    /// Append messages on their way.
    pub in_flight: usize,
    /// Index of the snapshot on its way; 0: none.
    pub pending_snapshot: Index,
}

/// A member's state for those who look at it.
#[derive(Clone, PartialEq, Debug)]
pub struct Status {
    pub id: MemberId,
    pub term: Term,
    /// 0: none.
    pub vote: MemberId,
    pub commit: Index,
    pub applied: Index,
    /// 0: none known.
    pub leader: MemberId,
    pub role: Role,
    /// By id; empty unless leading.
    pub progress: Vec<PeerProgress>,
    pub conf_state: raftpb::ConfState,
    pub first_index: Index,
    pub last_index: Index,
    /// 0: no transfer under way.
    pub transferee: MemberId,
}

/// An output that is not on disk yet.
struct Pending {
    /// What the caller will answer.
    number: u64,
    /// The raft crate's number that this acknowledges: later ones had nothing to persist.
    covers: u64,
    /// Term or vote are among what is being written.
    vote: bool,
    /// To be sent once it is on disk.
    messages: Vec<raftpb::Message>,
}

/// One raft member. See the module for how it is driven.
pub struct Node {
    raw: RawNode<Log>,
    id: u64,
    election_ticks: usize,
    random: Random,
    /// The election timeout in force, of our drawing.
    timeout: usize,
    /// Role and term for which it was drawn.
    drawn_for: (StateRole, u64),
    /// Last given out.
    reported: LeaderChange,
    /// Term and vote as last given out.
    voted: (u64, u64),
    /// Oldest first.
    pending: VecDeque<Pending>,
    /// Kept back and free to go.
    released: Vec<raftpb::Message>,
    last_number: u64,
    /// Contexts of local reads not answered yet, oldest first.
    reads: VecDeque<u64>,
    /// Other members' reads that wait for the first commit of our term.
    forwarded_reads: Vec<eraftpb::Message>,
    /// The last term in which a commit was seen.
    committed_term: u64,
    /// The leader to which the reads were last sent.
    reads_leader: u64,
    /// Index of the last snapshot received; 0: none.
    received: u64,
    removed: bool,
}

impl Node {
    /// A follower in the state of `restored`.
    ///
    /// The commit index is raised to `applied`, and the term to that of the last entry: after a crash the disk may hold
    /// either without the hard state that went with it. No vote was given in such a term, as none leaves before it is
    /// persisted.
    ///
    /// # Errors
    /// [`RaftError`]: what was found does not fit together.
    pub fn new(config: &Config, restored: Restored) -> Result<Node, RaftError> {
        config.validate().map_err(RaftError::Config)?;
        let Restored { mut hard_state, conf_state, snapshot, entries, applied } = restored;
        let (Index(front), Term(front_term)) = snapshot;
        if (front == 0) != (front_term == 0) {
            return Err(RaftError::Snapshot { index: snapshot.0, term: snapshot.1 });
        }
        guard::entries(&entries, front, front_term, u64::MAX >> 1).map_err(RaftError::Log)?;
        guard::conf_state(&conf_state).map_err(RaftError::ConfState)?;
        let last = Index(front + entries.len() as u64);
        let last_term = entries.last().map_or(front_term, |entry| entry.term);
        if applied.0 < front {
            return Err(RaftError::AppliedBelowSnapshot { applied, snapshot: snapshot.0 });
        }
        if applied > last {
            return Err(RaftError::AppliedBeyondLog { applied, last });
        }
        if hard_state.commit > last.0 {
            return Err(RaftError::CommitBeyondLog { commit: Index(hard_state.commit), last });
        }
        hard_state.commit = hard_state.commit.max(applied.0);
        if hard_state.term < last_term {
            hard_state.term = last_term;
            hard_state.vote = 0;
        }
        let voted = (hard_state.term, hard_state.vote);

        let conf_state = convert::conf_state_in(conf_state);
        let mut log = Log::new(
            convert::hard_state_in(&hard_state),
            conf_state.clone(),
            (front, front_term),
            entries.into_iter().map(convert::entry_in).collect(),
        );
        if applied.0 > 0 {
            let term = log.term_at(applied.0).expect("applied is in [front, last]");
            log.offer(applied.0, term, conf_state);
        }
        let inner = raft::Config {
            id: config.id.0,
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            applied: applied.0,
            max_size_per_msg: config.max_message_bytes,
            max_inflight_msgs: config.max_inflight,
            check_quorum: true,
            pre_vote: config.pre_vote,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&inner, log, &logger)
            .expect("configuration and conf state are checked, the log in memory does not fail");
        let mut node = Node {
            id: config.id.0,
            election_ticks: config.election_ticks,
            random: Random::new(config.seed, config.id.0),
            timeout: 0,
            drawn_for: (StateRole::Leader, u64::MAX),
            reported: LeaderChange { term: Term(hard_state.term), ..Default::default() },
            voted,
            pending: VecDeque::new(),
            released: Vec::new(),
            last_number: 0,
            reads: VecDeque::new(),
            forwarded_reads: Vec::new(),
            committed_term: 0,
            reads_leader: 0,
            received: 0,
            removed: false,
            raw,
        };
        node.settle();
        Ok(node)
    }

    /// Lets one tick of time pass.
    pub fn tick(&mut self) {
        if self.hold_election() {
            return;
        }
        self.raw.tick();
        self.settle();
    }

    /// Lets `n` ticks pass at once: a member that starts alone need not wait for its first election.
    pub fn advance_ticks(&mut self, n: usize) {
        for _ in 0..n {
            self.tick();
        }
    }

    /// Begins an election now, if this member may stand in one.
    pub fn campaign(&mut self) {
        if self.may_campaign() {
            // The crate answers an error to proposals only.
            let _ = self.raw.campaign();
            self.settle();
        }
    }

    /// Proposes one entry; a follower forwards it to the leader.
    ///
    /// # Errors
    /// [`ProposeError`], and nothing was proposed.
    pub fn propose(&mut self, data: Bytes) -> Result<(), ProposeError> {
        self.propose_entries(vec![eraftpb::Entry { data, ..Default::default() }])
    }

    /// Proposes entries that follow each other, all or none: cheaper than one by one, since each proposal is a
    /// message to each follower.
    ///
    /// # Errors
    /// [`ProposeError`], and nothing was proposed.
    pub fn propose_batch(
        &mut self,
        batch: impl IntoIterator<Item = Bytes>,
    ) -> Result<(), ProposeError> {
        let entry = |data| eraftpb::Entry { data, ..Default::default() };
        let entries: Vec<_> = batch.into_iter().map(entry).collect();
        if entries.is_empty() {
            return Ok(());
        }
        self.propose_entries(entries)
    }

    /// Proposes a conf change, written into the log in etcd's numbering.
    ///
    /// A follower cannot know whether the leader has another one pending; such a change becomes an empty entry
    /// there, and its proposer hears nothing.
    ///
    /// # Errors
    /// [`ProposeError`], and nothing was proposed.
    pub fn propose_conf_change(&mut self, change: &raftpb::ConfChange) -> Result<(), ProposeError> {
        confchange::kind(change)?;
        if self.is_leader() && self.raw.raft.has_pending_conf() {
            return Err(ProposeError::ConfChangePending);
        }
        self.propose_entries(vec![convert::entry_in(raftpb::Entry {
            r#type: raftpb::EntryType::EntryConfChange as i32,
            data: confchange::encode(change),
            ..Default::default()
        })])
    }

    fn propose_entries(&mut self, entries: Vec<eraftpb::Entry>) -> Result<(), ProposeError> {
        if self.removed {
            return Err(ProposeError::Stopped);
        }
        let raft = &mut self.raw.raft;
        if raft.leader_id == 0 {
            return Err(ProposeError::NoLeader);
        }
        if raft.state == StateRole::Leader && raft.lead_transferee.is_some() {
            return Err(ProposeError::Transferring);
        }
        let message = eraftpb::Message {
            msg_type: MessageType::MsgPropose,
            from: self.id,
            entries: entries.into(),
            ..Default::default()
        };
        raft.step(message).map_err(|_| ProposeError::NoLeader)?;
        self.settle();
        Ok(())
    }

    /// Takes a message from another member.
    ///
    /// # Errors
    /// [`StepError`]: nothing changed, the message is dropped. See [`StepError::CommitBeyondLog`].
    pub fn step(&mut self, message: raftpb::Message) -> Result<(), StepError> {
        let kind = guard::well_formed(&message, self.id)?;
        match guard::admit(&message, kind, &self.facts(message.from))? {
            Verdict::Step => {}
            Verdict::Drop => return Ok(()),
        }
        let from = message.from;
        let message = convert::message_in(message, kind);
        if kind == MessageType::MsgReadIndex && self.is_leader() && !self.committed_in_term() {
            // The crate would forget it. Our own that came back is among `reads`.
            if from != self.id && self.forwarded_reads.len() < FORWARDED_READS_MAX {
                self.forwarded_reads.push(message);
            }
            return Ok(());
        }
        let raft = &self.raw.raft;
        let quiet = kind == MessageType::MsgAppend
            && message.entries.is_empty()
            && message.term == raft.term
            && from == raft.leader_id;
        let (committed, sent) = (raft.raft_log.committed, raft.msgs.len());
        let stepped = self.raw.step(message);
        if quiet {
            self.keep_quiet(committed, sent);
        }
        self.settle();
        match stepped {
            Ok(()) => Ok(()),
            Err(raft::Error::StepPeerNotFound) => Err(StepError::UnknownPeer { from }),
            // The crate's only other error here.
            Err(_) => Err(StepError::ProposalDropped),
        }
    }

    /// Takes back the answer to an append that told of a new commit index and nothing else: every write ends with
    /// one to each follower, and the answer would only repeat what was acknowledged.
    ///
    /// That is a message lost, which raft allows for: should the leader still lack the acknowledgement, it asks
    /// again after the next heartbeat, in an append that is empty and moves no commit index.
    fn keep_quiet(&mut self, committed_before: u64, sent_before: usize) {
        let raft = &mut self.raw.raft;
        let agrees = |answer: &eraftpb::Message| {
            answer.msg_type == MessageType::MsgAppendResponse && !answer.reject
        };
        if raft.raft_log.committed > committed_before
            && raft.msgs.len() == sent_before + 1
            && raft.msgs.last().is_some_and(agrees)
        {
            raft.msgs.pop();
        }
    }

    fn facts(&self, from: u64) -> Facts {
        let raft = &self.raw.raft;
        let log = &raft.raft_log;
        let last = log.last_index();
        let role = raft.state;
        Facts {
            term: raft.term,
            leading: role == StateRole::Leader,
            campaigning: matches!(role, StateRole::PreCandidate | StateRole::Candidate),
            last,
            committed: log.committed,
            committed_term: log.term(log.committed).unwrap_or(0),
            all_persisted: log.persisted == last,
            may_campaign: self.may_campaign(),
            matched: raft.prs().get(from).map(|progress| progress.matched),
        }
    }

    /// Asks at which index a linearizable read may be answered; [`Output::reads`] tells it. The context travels as 8 bytes,
    /// big-endian.
    ///
    /// `context` must be unique among all members and never be used again. The question is asked again by itself
    /// when a leader appears and when the first entry of a term commits; messages that were lost are replaced by
    /// [`Node::retry_reads`].
    pub fn read_index(&mut self, context: u64) {
        if !self.reads.contains(&context) {
            self.reads.push_back(context);
        }
        self.ask_read(context);
        self.settle();
    }

    /// Asks again for all reads not answered yet; etcd does so every 500 ms.
    pub fn retry_reads(&mut self) {
        self.ask_reads();
        self.settle();
    }

    /// Gives up a read: its clients are gone. Its answer, should there be one, is not given out.
    pub fn forget_read(&mut self, context: u64) {
        self.reads.retain(|read| *read != context);
    }

    fn ask_read(&mut self, context: u64) {
        if self.is_leader() && !self.committed_in_term() {
            return; // asked at the first commit of the term
        }
        let data = Bytes::copy_from_slice(&context.to_be_bytes());
        let entry = eraftpb::Entry { data, ..Default::default() };
        let message = eraftpb::Message {
            msg_type: MessageType::MsgReadIndex,
            from: self.id,
            entries: vec![entry].into(),
            ..Default::default()
        };
        // The crate answers an error to proposals only.
        let _ = self.raw.raft.step(message);
    }

    fn ask_reads(&mut self) {
        for at in 0..self.reads.len() {
            self.ask_read(self.reads[at]);
        }
    }

    /// All of output `number`, and so of those before it, is on disk. Numbers rise; one that was answered before is
    /// ignored.
    ///
    /// # Panics
    /// If no output had that number.
    pub fn persisted(&mut self, number: u64) {
        assert!(number <= self.last_number, "output {number} was never given out");
        let mut covered = None;
        while let Some(mut done) = self.pending.pop_front_if(|done| done.number <= number) {
            covered = Some(done.covers);
            self.released.append(&mut done.messages);
        }
        if let Some(covered) = covered {
            self.raw.on_persist_ready(covered);
            self.settle();
        }
    }

    /// The state machine holds everything up to `index`, received snapshots included. A lower index than before
    /// is ignored.
    ///
    /// # Panics
    /// If `index` was not given out to be applied.
    pub fn applied(&mut self, index: Index) {
        let log = &self.raw.raft.raft_log;
        if index.0 <= log.applied {
            return;
        }
        let applicable = log.committed.min(log.persisted);
        assert!(
            index.0 <= applicable,
            "applied {index} beyond {applicable}, committed and persisted"
        );
        self.raw.advance_apply_to(index.0);
        self.settle();
    }

    /// Applies the conf change committed at `index` and answers the members after it; to be called for each, in order,
    /// before [`Node::applied`]. `None` is a change that the membership refused: it changes nothing. Nor does one
    /// that a received snapshot covers, applied or not: the members are already the snapshot's.
    ///
    /// A leader that is no longer a voter steps down.
    ///
    /// # Errors
    /// Nothing changed. The log holds what no etcd member would apply either: the member cannot go on.
    pub fn apply_conf_change(
        &mut self,
        index: Index,
        change: Option<&raftpb::ConfChange>,
    ) -> Result<raftpb::ConfState, ConfChangeError> {
        let Some(change) = change.filter(|_| index.0 > self.received) else {
            return Ok(self.conf_state());
        };
        let Some(inner) = confchange::to_apply(change)? else { return Ok(self.conf_state()) };
        let member = self.raw.raft.prs().get(self.id).is_some();
        // The crate's one error for a single change.
        let left = self.raw.apply_conf_change(&inner);
        left.map_err(|_| ConfChangeError::NoVoterLeft(change.node_id))?;
        let raft = &mut self.raw.raft;
        match raft.prs().get(self.id) {
            Some(_) => self.removed = false,
            None => self.removed |= member,
        }
        if !raft.promotable() && raft.state != StateRole::Follower {
            // The crate goes on and aborts at the next commit: it looks for its own progress.
            raft.become_follower(raft.term, 0);
        }
        self.settle();
        Ok(self.conf_state())
    }

    /// The last message to `id` could not be delivered.
    pub fn report_unreachable(&mut self, id: MemberId) {
        self.raw.report_unreachable(id.0);
        self.settle();
    }

    /// The snapshot sent to `id` arrived, or it did not.
    pub fn report_snapshot(&mut self, id: MemberId, ok: bool) {
        let status = if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.raw.report_snapshot(id.0, status);
        self.settle();
    }

    /// Hands leadership to `to`, a voter; without effect unless leading. It takes until the next [`LeaderChange`], or is
    /// given up after an election timeout.
    pub fn transfer_leader(&mut self, to: MemberId) {
        if self.is_leader() {
            self.raw.transfer_leader(to.0);
            self.settle();
        }
    }

    /// Sets what a snapshot message offers a follower whose next entry is no longer held: position and members, without
    /// data. Until it is first called, that is what was applied at the start. An older one than before is ignored.
    ///
    /// # Panics
    /// If `index` is 0 or not applied yet.
    pub fn set_snapshot(&mut self, index: Index, term: Term, conf_state: raftpb::ConfState) {
        let applied = self.raw.raft.raft_log.applied;
        assert!(index.0 > 0 && index.0 <= applied, "snapshot at {index}, applied is {applied}");
        if index.0 >= self.raw.store().offered() {
            self.raw.mut_store().offer(index.0, term.0, convert::conf_state_in(conf_state));
        }
    }

    /// Drops entries up to `to` from memory, but none that is not applied. A follower that needs them gets a snapshot.
    pub fn compact(&mut self, to: Index) {
        let to = to.0.min(self.raw.raft.raft_log.applied);
        self.raw.mut_store().compact(to);
    }

    /// [`Node::compact`] as far as it takes for the entries in memory to occupy at most `bytes`.
    pub fn compact_to_bytes(&mut self, bytes: usize) {
        let to = self.raw.store().within(bytes);
        self.compact(Index(to));
    }

    /// Whether [`Node::output`] has something.
    pub fn has_output(&self) -> bool {
        !self.released.is_empty() || self.raw.store().wanted().is_some() || self.raw.has_ready()
    }

    /// What is to be done now. Outputs are to be persisted and applied in the order in which they are given out; the next
    /// may be taken before the last is persisted.
    pub fn output(&mut self) -> Output {
        let mut output = Output {
            messages: std::mem::take(&mut self.released),
            snapshot_wanted: self.raw.mut_store().take_wanted().map(MemberId),
            ..Default::default()
        };
        if !self.raw.has_ready() {
            return output;
        }
        let mut ready = self.raw.ready();
        let number = ready.number();
        output.must_sync = ready.must_sync();
        if !ready.snapshot().is_empty() {
            let snapshot = ready.snapshot().clone();
            self.raw.mut_store().install(&snapshot);
            output.snapshot = Some(convert::snapshot_out(snapshot));
        }
        let entries = ready.take_entries();
        self.raw.mut_store().append(entries.clone());
        output.entries = convert::entries_out(entries);
        output.hard_state = ready.hs().map(convert::hard_state_out);
        output.committed = convert::entries_out(ready.take_committed_entries());
        let mut messages = ready.take_messages();
        messages.append(&mut ready.take_persisted_messages());
        for read in ready.take_read_states() {
            self.answer_read(&read, &mut output.reads);
        }
        self.raw.advance_append_async(ready);

        let mut vote = false;
        if let Some(state) = &output.hard_state {
            vote = self.voted != (state.term, state.vote);
            self.voted = (state.term, state.vote);
        }
        let nothing =
            output.entries.is_empty() && output.hard_state.is_none() && output.snapshot.is_none();
        if !nothing {
            output.number = Some(number);
            self.last_number = number;
            let messages = Vec::new();
            self.pending.push_back(Pending { number, covers: number, vote, messages });
        } else if let Some(last) = self.pending.back_mut() {
            last.covers = number;
        } else {
            self.raw.on_persist_ready(number);
        }

        // A follower's answers tell what it has, so that must be on disk first. A leader's appends need not wait for its
        // own disk, unless its term and vote are still on the way there: a sole voter elects itself at once.
        let vote_pending = self.pending.iter().any(|pending| pending.vote);
        let leading = self.raw.raft.state == StateRole::Leader;
        for message in messages {
            let free = !vote_pending && (leading || says_nothing_of_the_disk(&message));
            let message = convert::message_out(message);
            match self.pending.back_mut() {
                Some(last) if !free => last.messages.push(message),
                _ => output.messages.push(message),
            }
        }

        let now = self.leader_now();
        if now != self.reported {
            self.reported = now;
            output.leader = Some(now);
        }
        output
    }

    fn answer_read(&mut self, read: &raft::ReadState, answers: &mut Vec<ReadState>) {
        // Other contexts are not ours: etcd ignores them too.
        let Ok(context) = <[u8; 8]>::try_from(read.request_ctx.as_slice()) else { return };
        let context = u64::from_be_bytes(context);
        if let Some(at) = self.reads.iter().position(|asked| *asked == context) {
            self.reads.remove(at);
            answers.push(ReadState { index: Index(read.index), context });
        }
    }

    /// A snapshot was received and is not applied yet.
    fn snapshot_pending(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        log.unstable_snapshot().is_some() || log.applied + 1 < self.raw.store().first()
    }

    /// To stand in an election, a member has to be a voter with all of its log on disk and no snapshot half installed. (The
    /// crate itself refuses while committed conf changes are not applied.)
    fn may_campaign(&self) -> bool {
        let raft = &self.raw.raft;
        raft.promotable()
            && raft.raft_log.last_index() == raft.raft_log.persisted
            && !self.snapshot_pending()
    }

    /// Whether time has to stand still, lest an election begins that may not. It stands beyond the minimal election timeout, so that
    /// this member votes for others meanwhile.
    fn hold_election(&mut self) -> bool {
        if self.is_leader() || !self.raw.raft.promotable() || self.may_campaign() {
            return false;
        }
        if self.raw.raft.election_elapsed + 1 < self.timeout {
            return false;
        }
        self.timeout = 2 * self.election_ticks - 1;
        self.raw.raft.set_randomized_election_timeout(self.timeout);
        self.raw.raft.election_elapsed + 1 >= self.timeout
    }

    /// Brings what surrounds the crate in line with it; runs after every input.
    fn settle(&mut self) {
        let raft = &mut self.raw.raft;
        if self.drawn_for != (raft.state, raft.term) {
            self.drawn_for = (raft.state, raft.term);
            self.timeout = self.election_ticks + self.random.below(self.election_ticks);
            self.forwarded_reads.clear();
        }
        if raft.randomized_election_timeout() != self.timeout {
            raft.set_randomized_election_timeout(self.timeout);
        }
        if let Some(snapshot) = raft.raft_log.unstable_snapshot() {
            self.received = snapshot.get_metadata().index;
        }
        let (term, leader) = (raft.term, raft.leader_id);
        let first_commit = self.committed_term != term && self.committed_in_term();
        if first_commit {
            self.committed_term = term;
            for message in std::mem::take(&mut self.forwarded_reads) {
                // The crate answers an error to proposals only.
                let _ = self.raw.raft.step(message);
            }
        }
        let new_leader = leader != 0 && leader != self.reads_leader;
        self.reads_leader = leader;
        if first_commit || new_leader {
            self.ask_reads();
        }
    }

    fn committed_in_term(&self) -> bool {
        self.committed_term == self.raw.raft.term || self.raw.raft.commit_to_current_term()
    }

    fn leader_now(&self) -> LeaderChange {
        LeaderChange { leader: self.leader(), term: self.term(), role: self.role() }
    }

    /// Everything at once, for those who look at a member; allocates.
    pub fn status(&self) -> Status {
        let raft = &self.raw.raft;
        let learners = raft.prs().conf().learners();
        let peer = |(&id, progress): (&u64, &raft::Progress)| PeerProgress {
            id: MemberId(id),
            matched: Index(progress.matched),
            next: Index(progress.next_idx),
            state: match progress.state {
                raft::ProgressState::Probe => ProgressState::Probe,
                raft::ProgressState::Replicate => ProgressState::Replicate,
                raft::ProgressState::Snapshot => ProgressState::Snapshot,
            },
            recent_active: progress.recent_active,
            learner: learners.contains(&id),
            in_flight: progress.ins.count(),
            pending_snapshot: Index(progress.pending_snapshot),
        };
        let mut progress = Vec::new();
        if self.is_leader() {
            progress.extend(raft.prs().iter().map(peer));
            progress.sort_unstable_by_key(|peer| peer.id);
        }
        Status {
            id: self.id(),
            term: self.term(),
            vote: MemberId(raft.vote),
            commit: self.committed(),
            applied: self.last_applied(),
            leader: self.leader(),
            role: self.role(),
            progress,
            conf_state: self.conf_state(),
            first_index: self.first_index(),
            last_index: self.last_index(),
            transferee: self.transferee(),
        }
    }

    /// The members as of the last conf change applied, sorted.
    pub fn conf_state(&self) -> raftpb::ConfState {
        convert::conf_state_out(self.raw.raft.prs().conf().to_conf_state())
    }

    pub fn id(&self) -> MemberId {
        MemberId(self.id)
    }

    pub fn term(&self) -> Term {
        Term(self.raw.raft.term)
    }

    /// 0: none known.
    pub fn leader(&self) -> MemberId {
        MemberId(self.raw.raft.leader_id)
    }

    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    pub fn role(&self) -> Role {
        match self.raw.raft.state {
            StateRole::Follower => Role::Follower,
            StateRole::PreCandidate => Role::PreCandidate,
            StateRole::Candidate => Role::Candidate,
            StateRole::Leader => Role::Leader,
        }
    }

    /// 0: no transfer under way.
    pub fn transferee(&self) -> MemberId {
        MemberId(self.raw.raft.lead_transferee.unwrap_or(0))
    }

    pub fn committed(&self) -> Index {
        Index(self.raw.raft.raft_log.committed)
    }

    /// The last index that [`Node::applied`] took.
    pub fn last_applied(&self) -> Index {
        Index(self.raw.raft.raft_log.applied)
    }

    /// The last index that is known to be on this member's disk.
    pub fn last_persisted(&self) -> Index {
        Index(self.raw.raft.raft_log.persisted)
    }

    /// The first entry held in memory.
    pub fn first_index(&self) -> Index {
        Index(self.raw.raft.raft_log.first_index())
    }

    pub fn last_index(&self) -> Index {
        Index(self.raw.raft.raft_log.last_index())
    }

    /// The term of the entry at `index`; `None` if it is not held.
    pub fn term_at(&self, index: Index) -> Option<Term> {
        let log = &self.raw.raft.raft_log;
        let held = index.0 >= log.first_index() - 1 && index.0 <= log.last_index();
        held.then(|| log.term(index.0).ok().map(Term)).flatten()
    }

    /// Entries held in memory.
    pub fn log_len(&self) -> usize {
        self.raw.store().len() + self.raw.raft.raft_log.unstable_entries().len()
    }

    /// Bytes that the entries held in memory occupy, approximately.
    pub fn log_bytes(&self) -> usize {
        self.raw.store().bytes() + self.raw.raft.raft_log.unstable().entries_size
    }

    /// Outputs given out and not yet persisted.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Local reads not answered yet.
    pub fn reads_waiting(&self) -> usize {
        self.reads.len()
    }
}

/// What a follower may send before what it was given is on its disk: questions and proposals for the leader, and that it
/// hears the leader. Without these, each waits for an fsync of entries that it has nothing to do with.
fn says_nothing_of_the_disk(message: &eraftpb::Message) -> bool {
    matches!(
        message.msg_type,
        MessageType::MsgPropose | MessageType::MsgReadIndex | MessageType::MsgHeartbeatResponse
    )
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    /// Members that share a seed still draw differently.
    fn new(seed: u64, id: u64) -> Random {
        Random(seed ^ id.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, n)`; `n` is small and not 0.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
