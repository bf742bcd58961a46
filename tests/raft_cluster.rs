//! Whole clusters of raft members in one thread, from one seed: a lossy network, disks that lag behind, crashes from
//! which only what was persisted comes back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use prost::Message as _;
use quorate::core::raft::{
    Config, LeaderChange, Node, Output, ProgressState, ProposeError, ReadState, Restored, Role,
    StepError, confchange,
};
use quorate::core::types::{Index, MemberId, Term};
use quorate_proto::raftpb::{
    ConfChange, ConfChangeType, ConfState, Entry, EntryType, HardState, Message, Snapshot,
    SnapshotMetadata,
};

const PROP: u32 = 2;
const APP: u32 = 3;
const APP_RESP: u32 = 4;
const SNAP: u32 = 7;
const HEARTBEAT: u32 = 8;
const HEARTBEAT_RESP: u32 = 9;
const READ_INDEX: u32 = 15;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// What survives a crash.
#[derive(Default)]
struct Disk {
    hard_state: HardState,
    /// Position before the first of `entries`.
    front: (u64, u64),
    entries: Vec<Entry>,
    applied: u64,
}

impl Disk {
    fn write(&mut self, write: Write) {
        if let Some(metadata) = write.snapshot {
            self.front = (metadata.index, metadata.term);
            self.entries.clear();
            self.applied = metadata.index;
        }
        if let Some(first) = write.entries.first() {
            let keep = first.index.checked_sub(self.front.0 + 1).expect("entries after the front");
            assert!(keep as usize <= self.entries.len(), "a gap on disk before {}", first.index);
            self.entries.truncate(keep as usize);
            self.entries.extend(write.entries);
        }
        if let Some(state) = write.hard_state {
            assert!(state.term >= self.hard_state.term && state.commit >= self.hard_state.commit);
            self.hard_state = state;
        }
    }

    fn compact(&mut self, to: u64) {
        let gone = to.saturating_sub(self.front.0) as usize;
        if let Some(last) = self.entries.drain(..gone.min(self.entries.len())).last() {
            self.front = (last.index, last.term);
        }
    }
}

struct Write {
    number: u64,
    snapshot: Option<SnapshotMetadata>,
    entries: Vec<Entry>,
    hard_state: Option<HardState>,
}

struct Member {
    node: Option<Node>,
    disk: Disk,
    writes: VecDeque<Write>,
    committed: VecDeque<Entry>,
    applied: u64,
    /// Conf state after each index that changed it.
    confs: BTreeMap<u64, ConfState>,
    reads: Vec<ReadState>,
    leader: LeaderChange,
    snapshots: usize,
}

impl Member {
    /// Nothing is on its way here; so it is with a member that does not run.
    fn idle(&self) -> bool {
        self.node.as_ref().is_none_or(|node| !node.has_output())
            && self.writes.is_empty()
            && self.committed.is_empty()
    }

    fn node(&mut self) -> &mut Node {
        self.node.as_mut().expect("the member runs")
    }
}

struct Cluster {
    random: Random,
    seed: u64,
    members: BTreeMap<u64, Member>,
    network: Vec<Message>,
    /// Messages that were sent and not lost.
    sent: usize,
    /// Members that reach nobody.
    cut: BTreeSet<u64>,
    /// Percent of messages lost and doubled.
    loss: usize,
    double: usize,
    /// Snapshots are made when they are sent: of what the sender has applied by then.
    made_late: bool,
    /// What was committed, as the first member that applied it saw it.
    log: BTreeMap<u64, Entry>,
    leaders: BTreeMap<u64, u64>,
    /// Context of each read asked: what was committed then.
    asked: BTreeMap<u64, u64>,
    contexts: u64,
    /// Hash of everything that happened.
    trace: u64,
}

fn conf_change(kind: ConfChangeType, node_id: u64) -> ConfChange {
    let context = Bytes::from(format!("{{\"id\":{node_id}}}"));
    ConfChange { id: 7, r#type: kind as i32, node_id, context }
}

fn config(id: u64, seed: u64) -> Config {
    Config { max_message_bytes: 256, max_inflight: 8, ..Config::new(MemberId(id), seed) }
}

/// A member of a new cluster of `n`, as etcd bootstraps it: one entry that adds each member.
fn bootstrapped(n: u64) -> Disk {
    let entry = |id| Entry {
        r#type: EntryType::EntryConfChange as i32,
        term: 1,
        index: id,
        data: confchange::encode(&conf_change(ConfChangeType::AddNode, id)),
    };
    Disk {
        hard_state: HardState { term: 1, vote: 0, commit: n },
        entries: (1..=n).map(entry).collect(),
        ..Default::default()
    }
}

impl Cluster {
    fn new(n: u64, seed: u64) -> Cluster {
        let mut cluster = Cluster {
            random: Random(seed),
            seed,
            members: BTreeMap::new(),
            network: Vec::new(),
            sent: 0,
            cut: BTreeSet::new(),
            loss: 0,
            double: 0,
            made_late: false,
            log: BTreeMap::new(),
            leaders: BTreeMap::new(),
            asked: BTreeMap::new(),
            contexts: 0,
            trace: 0,
        };
        for id in 1..=n {
            cluster.add(id, bootstrapped(n));
        }
        cluster.quiet();
        cluster
    }

    fn add(&mut self, id: u64, disk: Disk) {
        let member = Member {
            node: None,
            disk,
            writes: VecDeque::new(),
            committed: VecDeque::new(),
            applied: 0,
            confs: BTreeMap::new(),
            reads: Vec::new(),
            leader: LeaderChange::default(),
            snapshots: 0,
        };
        self.members.insert(id, member);
        self.start(id);
    }

    fn start(&mut self, id: u64) {
        let seed = self.seed;
        let member = self.member(id);
        let disk = &member.disk;
        let conf_state = member.confs.range(..=disk.applied).next_back();
        let restored = Restored {
            hard_state: disk.hard_state,
            conf_state: conf_state.map(|(_, state)| state.clone()).unwrap_or_default(),
            snapshot: (Index(disk.front.0), Term(disk.front.1)),
            entries: disk.entries.clone(),
            applied: Index(disk.applied),
        };
        member.applied = disk.applied;
        member.node = Some(Node::new(&config(id, seed), restored).expect("a sound disk"));
    }

    /// The member is gone; of what was on its way to the disk, the first `survive` writes arrive.
    fn crash(&mut self, id: u64, survive: usize) {
        let member = self.member(id);
        member.node = None;
        for write in std::mem::take(&mut member.writes).into_iter().take(survive) {
            if let Some(SnapshotMetadata { conf_state: Some(state), index, .. }) = &write.snapshot {
                member.confs.insert(*index, state.clone());
            }
            member.disk.write(write);
        }
        member.committed.clear();
        member.reads.clear();
    }

    fn member(&mut self, id: u64) -> &mut Member {
        self.members.get_mut(&id).expect("a member")
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.member(id).node()
    }

    fn ids(&self) -> Vec<u64> {
        self.members.keys().copied().collect()
    }

    fn running(&self) -> Vec<u64> {
        let runs = |(id, member): (&u64, &Member)| member.node.is_some().then_some(*id);
        self.members.iter().filter_map(runs).collect()
    }

    fn note(&mut self, what: &impl std::fmt::Debug) {
        for byte in format!("{what:?}").bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Takes the outputs of a member.
    fn drain(&mut self, id: u64) {
        while self.member(id).node.as_ref().is_some_and(Node::has_output) {
            let output = self.node(id).output();
            self.note(&output);
            self.take(id, output);
        }
    }

    fn take(&mut self, id: u64, output: Output) {
        if let Some(change) = output.leader {
            self.member(id).leader = change;
            if change.role == Role::Leader {
                let other = *self.leaders.entry(change.term.0).or_insert(id);
                assert_eq!(other, id, "two leaders in term {}, seed {}", change.term, self.seed);
            }
        }
        for read in &output.reads {
            let committed = self.asked[&read.context];
            assert!(read.index.0 >= committed, "a stale read, seed {}", self.seed);
        }
        let wanted = output.snapshot_wanted.is_some();
        let member = self.member(id);
        member.reads.extend(output.reads);
        for entry in output.committed {
            let before = member.committed.back().map_or(member.applied, |entry| entry.index);
            assert_eq!(entry.index, before + 1, "entries to apply have a gap");
            let persisted = member.node().last_persisted();
            assert!(entry.index <= persisted.0, "given out before it was persisted");
            member.committed.push_back(entry);
        }
        match output.number {
            Some(number) => {
                let snapshot = output.snapshot.map(|s| s.metadata.expect("metadata"));
                let (entries, hard_state) = (output.entries, output.hard_state);
                member.writes.push_back(Write { number, snapshot, entries, hard_state });
            }
            None => assert!(output.entries.is_empty() && output.hard_state.is_none()),
        }
        if wanted {
            self.offer(id);
        }
        let sends = output.messages.iter().any(|message| message.r#type == SNAP);
        let late = (self.made_late && sends).then(|| self.position(id));
        for mut message in output.messages {
            if message.r#type == SNAP
                && let Some(metadata) = &late
            {
                message.snapshot.as_mut().expect("a snapshot").metadata = Some(metadata.clone());
            }
            assert_eq!(message.from != 0, message.to != 0);
            let lost = self.random.chance(self.loss);
            if lost && message.r#type == SNAP {
                self.node(id).report_snapshot(MemberId(message.to), false);
            }
            if lost {
                continue;
            }
            if self.random.chance(self.double) {
                self.network.push(message.clone());
            }
            self.sent += 1;
            self.network.push(message);
        }
    }

    /// How far the member has applied the log, and the members there.
    fn position(&mut self, id: u64) -> SnapshotMetadata {
        let member = self.member(id);
        let applied = member.node().last_applied();
        let conf_state = member.confs.range(..=applied.0).next_back();
        let conf_state = conf_state.expect("applied conf changes").1.clone();
        let term = member.node().term_at(applied).expect("the applied entry is held");
        SnapshotMetadata { conf_state: Some(conf_state), index: applied.0, term: term.0 }
    }

    /// Lets the member offer its state as a snapshot.
    fn offer(&mut self, id: u64) {
        let SnapshotMetadata { conf_state, index, term } = self.position(id);
        let conf_state = conf_state.expect("a position has members");
        self.node(id).set_snapshot(Index(index), Term(term), conf_state);
    }

    fn persist(&mut self, id: u64, count: usize) {
        let member = self.member(id);
        let mut last = None;
        for write in member.writes.drain(..count.min(member.writes.len())) {
            last = Some((write.number, write.snapshot.clone().or(last.and_then(|(_, s)| s))));
            member.disk.write(write);
        }
        let Some((number, snapshot)) = last else { return };
        member.node().persisted(number);
        if let Some(snapshot) = snapshot {
            member.snapshots += 1;
            member.applied = snapshot.index;
            member.committed.retain(|entry| entry.index > snapshot.index);
            member.confs.insert(snapshot.index, snapshot.conf_state.expect("conf state"));
            member.node().applied(Index(snapshot.index));
        }
    }

    fn apply(&mut self, id: u64, count: usize) {
        for _ in 0..count {
            let Some(entry) = self.member(id).committed.pop_front() else { return };
            let seen = self.log.entry(entry.index).or_insert_with(|| entry.clone());
            assert_eq!(*seen, entry, "member {id} applies something else, seed {}", self.seed);
            let member = self.member(id);
            member.applied = entry.index;
            if entry.r#type == EntryType::EntryConfChange as i32 {
                let change = confchange::decode(&entry.data).expect("a sound conf change");
                let state = member
                    .node()
                    .apply_conf_change(Index(entry.index), Some(&change))
                    .expect("applies");
                member.confs.insert(entry.index, state);
            }
            member.node().applied(Index(entry.index));
        }
    }

    fn deliver(&mut self, at: usize) {
        let message = self.network.remove(at);
        let (from, to) = (message.from, message.to);
        let cut = self.cut.contains(&from) || self.cut.contains(&to);
        let runs = self.members.get(&to).is_some_and(|member| member.node.is_some());
        let arrives = !cut && runs;
        let snapshot = message.r#type == SNAP;
        if arrives {
            let bytes = message.encode_to_vec();
            let message = Message::decode(Bytes::from(bytes)).expect("decodes");
            match self.node(to).step(message) {
                Ok(()) | Err(StepError::ProposalDropped | StepError::UnknownPeer { .. }) => {}
                Err(error) => panic!("{from:x} to {to:x}: {error}, seed {}", self.seed),
            }
        }
        if let Some(node) = self.members.get_mut(&from).and_then(|member| member.node.as_mut()) {
            if snapshot {
                node.report_snapshot(MemberId(to), arrives);
            } else if !arrives {
                node.report_unreachable(MemberId(to));
            }
        }
    }

    /// Everything on its way arrives, until nothing is on its way.
    fn quiet(&mut self) {
        loop {
            for id in self.running() {
                self.drain(id);
                self.persist(id, usize::MAX);
                self.apply(id, usize::MAX);
                self.drain(id);
            }
            if !self.network.is_empty() {
                self.deliver(0);
            } else if self.members.values().all(Member::idle) {
                return;
            }
        }
    }

    fn tick(&mut self, ticks: usize) {
        for _ in 0..ticks {
            for id in self.running() {
                self.node(id).tick();
            }
            self.quiet();
        }
    }

    /// The leader of the highest term, after as many ticks as it takes.
    fn elect(&mut self) -> u64 {
        for _ in 0..200 {
            if let Some(leader) = self.leader() {
                return leader;
            }
            self.tick(1);
        }
        panic!("no leader, seed {}", self.seed);
    }

    fn leader(&mut self) -> Option<u64> {
        let leads = |id: &u64| {
            let node = self.members[id].node.as_ref().expect("runs");
            (node.is_leader() && !self.cut.contains(id)).then(|| (node.term(), *id))
        };
        self.running().iter().filter_map(leads).max().map(|(_, id)| id)
    }

    fn put(&mut self, id: u64, data: &'static str) {
        self.node(id).propose(Bytes::from_static(data.as_bytes())).expect("a leader");
        self.quiet();
    }

    fn read(&mut self, id: u64) -> u64 {
        self.contexts += 1;
        let context = self.contexts << 8 | id;
        let committed = self.log.keys().next_back().copied().unwrap_or(0);
        self.asked.insert(context, committed);
        self.node(id).read_index(context);
        context
    }

    fn answered(&mut self, id: u64, context: u64) -> bool {
        self.member(id).reads.iter().any(|read| read.context == context)
    }

    fn change(&mut self, kind: ConfChangeType, id: u64) {
        let leader = self.elect();
        self.node(leader).propose_conf_change(&conf_change(kind, id)).expect("a leader");
        self.quiet();
    }

    fn applied_data(&self) -> Vec<Bytes> {
        let data = |entry: &Entry| {
            (entry.r#type == 0 && !entry.data.is_empty()).then(|| entry.data.clone())
        };
        self.log.values().filter_map(data).collect()
    }

    /// No two logs differ where both say that the same leader wrote.
    fn check_log_matching(&self) {
        let disks: Vec<_> = self.members.values().map(|member| &member.disk).collect();
        for (at, one) in disks.iter().enumerate() {
            for other in &disks[at + 1..] {
                let theirs: BTreeMap<_, _> =
                    other.entries.iter().map(|e| ((e.index, e.term), e)).collect();
                for entry in &one.entries {
                    if let Some(same) = theirs.get(&(entry.index, entry.term)) {
                        assert_eq!(*same, entry, "seed {}", self.seed);
                    }
                }
            }
        }
    }
}

#[test]
fn a_sole_voter_commits_what_it_persisted_and_nothing_sooner() {
    let mut cluster = Cluster::new(1, 1);
    cluster.node(1).campaign();
    assert!(cluster.node(1).is_leader());
    cluster.node(1).propose(Bytes::from_static(b"a")).expect("leads");
    cluster.drain(1);
    assert_eq!(cluster.node(1).committed(), Index(1), "nothing is on disk yet");
    cluster.persist(1, usize::MAX);
    assert_eq!(cluster.node(1).committed(), Index(3));
    cluster.quiet();
    assert_eq!(cluster.applied_data(), ["a"]);
    assert_eq!(cluster.node(1).in_flight(), 0);
}

#[test]
fn a_follower_answers_only_after_its_disk() {
    let mut cluster = Cluster::new(3, 2);
    let leader = cluster.elect();
    let follower = if leader == 1 { 2 } else { 1 };
    cluster.node(leader).propose(Bytes::from_static(b"a")).expect("leads");
    cluster.drain(leader);
    let sent = std::mem::take(&mut cluster.network);
    assert_eq!(sent.len(), 2, "the leader's own disk need not be waited for");
    let append = sent.into_iter().find(|message| message.to == follower).expect("sent");
    cluster.node(follower).step(append).expect("in order");
    cluster.drain(follower);
    assert!(cluster.network.is_empty());
    // What it asks of the leader says nothing of its disk, and does not wait for it.
    cluster.node(follower).propose(Bytes::from_static(b"b")).expect("knows the leader");
    cluster.node(follower).read_index(7);
    cluster.drain(follower);
    let asked: Vec<u32> = cluster.network.drain(..).map(|message| message.r#type).collect();
    assert_eq!(asked, [PROP, READ_INDEX]);
    cluster.persist(follower, 1);
    cluster.drain(follower);
    assert_eq!(cluster.network.len(), 1);
    assert_eq!((cluster.network[0].r#type, cluster.network[0].index), (APP_RESP, 5));
}

#[test]
fn an_entry_reaches_all_and_survives_a_restart_of_all() {
    let mut cluster = Cluster::new(3, 3);
    let leader = cluster.elect();
    cluster.put(leader, "a");
    let follower = cluster.ids().into_iter().find(|id| *id != leader).expect("three members");
    cluster.put(follower, "b");
    for id in cluster.ids() {
        assert_eq!(cluster.node(id).last_applied(), Index(6));
        cluster.crash(id, 0);
    }
    for id in cluster.ids() {
        cluster.start(id);
    }
    cluster.quiet();
    let leader = cluster.elect();
    cluster.put(leader, "c");
    assert_eq!(cluster.applied_data(), ["a", "b", "c"]);
    assert!(cluster.ids().into_iter().all(|id| cluster.members[&id].applied == 8));
}

#[test]
fn a_write_takes_three_messages_for_each_follower() {
    let mut cluster = Cluster::new(3, 1);
    let leader = cluster.elect();
    for data in ["1", "2", "3"] {
        let before = cluster.sent;
        cluster.put(leader, data);
        assert_eq!(cluster.sent - before, 6, "append, answer, commit index: to and from two");
        let committed = cluster.node(leader).committed();
        for id in cluster.running() {
            assert_eq!(cluster.node(id).last_applied(), committed);
        }
    }
}

#[test]
fn a_lost_acknowledgement_is_asked_for_with_the_next_heartbeat() {
    let mut cluster = Cluster::new(3, 1);
    let leader = cluster.elect();
    let deaf = cluster.running().into_iter().find(|id| *id != leader).expect("a follower");
    let matched = |cluster: &mut Cluster| {
        let status = cluster.node(leader).status();
        let of = |id| status.progress.iter().find(|peer| peer.id.0 == id).expect("a peer").matched;
        (of(deaf), of(leader))
    };
    cluster.node(leader).propose(Bytes::from_static(b"1")).expect("a leader");
    cluster.drain(leader);
    while !cluster.network.is_empty() {
        cluster.deliver(0);
        for id in cluster.running() {
            cluster.persist(id, usize::MAX);
            cluster.drain(id);
        }
        cluster.network.retain(|message| message.from != deaf);
    }
    cluster.quiet();
    // It has the entry and knows that it is committed; the leader does not know that it has it.
    assert_eq!(cluster.node(deaf).last_applied(), cluster.node(leader).committed());
    let (told, last) = matched(&mut cluster);
    assert!(told < last);
    cluster.tick(1);
    let (told, last) = matched(&mut cluster);
    assert_eq!(told, last);
}

#[test]
fn pre_vote_keeps_the_term_of_an_isolated_member() {
    let mut cluster = Cluster::new(3, 4);
    let leader = cluster.elect();
    let term = cluster.node(leader).term();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).expect("three members");
    cluster.cut.insert(follower);
    cluster.tick(50);
    assert_eq!(cluster.node(follower).term(), term);
    assert_eq!(cluster.node(follower).role(), Role::PreCandidate);
    cluster.cut.clear();
    cluster.tick(30);
    assert_eq!((cluster.elect(), cluster.node(leader).term()), (leader, term), "undisturbed");
}

#[test]
fn an_isolated_leader_steps_down_and_the_others_go_on() {
    let mut cluster = Cluster::new(3, 5);
    let old = cluster.elect();
    cluster.cut.insert(old);
    cluster.tick(45);
    assert_eq!(cluster.member(old).leader.role, Role::PreCandidate, "it lost its quorum");
    assert_eq!(cluster.node(old).propose(Bytes::new()), Err(ProposeError::NoLeader));
    let new = cluster.elect();
    assert_ne!(new, old);
    cluster.put(new, "a");
    cluster.cut.clear();
    cluster.tick(30);
    assert_eq!(cluster.applied_data(), ["a"]);
    assert_eq!(cluster.members[&old].applied, cluster.members[&new].applied);
}

#[test]
fn leadership_moves_to_whom_it_is_given() {
    let mut cluster = Cluster::new(3, 6);
    let old = cluster.elect();
    let new = cluster.ids().into_iter().find(|id| *id != old).expect("three members");
    cluster.node(old).transfer_leader(MemberId(new));
    assert_eq!(cluster.node(old).transferee(), MemberId(new));
    assert_eq!(cluster.node(old).propose(Bytes::new()), Err(ProposeError::Transferring));
    cluster.quiet();
    assert_eq!(cluster.elect(), new);
    // A transfer to one who is away is given up after an election timeout.
    cluster.cut.insert(old);
    cluster.node(new).transfer_leader(MemberId(old));
    cluster.tick(11);
    assert_eq!(cluster.node(new).transferee(), MemberId(0));
    cluster.put(new, "a");
}

#[test]
fn a_learner_catches_up_is_promoted_and_removed() {
    let mut cluster = Cluster::new(3, 7);
    let leader = cluster.elect();
    cluster.put(leader, "a");
    cluster.add(4, Disk::default());
    cluster.change(ConfChangeType::AddLearnerNode, 4);
    cluster.tick(3);
    let state = cluster.node(4).conf_state();
    assert_eq!((state.voters, state.learners), (vec![1, 2, 3], vec![4]));
    let status = cluster.node(leader).status();
    assert_eq!(
        status.progress.iter().map(|peer| peer.learner).collect::<Vec<_>>(),
        [false, false, false, true]
    );
    assert_eq!(status.progress[3].state, ProgressState::Replicate);
    assert_eq!(cluster.members[&4].applied, cluster.members[&leader].applied);
    // A learner forwards proposals and reads, but does not stand in elections.
    cluster.put(4, "b");
    let read = cluster.read(4);
    cluster.quiet();
    assert!(cluster.answered(4, read));
    cluster.node(4).campaign();
    assert_eq!(cluster.node(4).role(), Role::Follower);

    cluster.change(ConfChangeType::AddNode, 4);
    assert_eq!(cluster.node(4).conf_state().voters, [1, 2, 3, 4]);
    let before = cluster.node(leader).conf_state();
    cluster.change(ConfChangeType::UpdateNode, 4);
    assert_eq!(cluster.node(leader).conf_state(), before);
    cluster.change(ConfChangeType::RemoveNode, 4);
    assert_eq!(cluster.node(leader).conf_state().voters, [1, 2, 3]);
    let kinds: Vec<_> = cluster
        .log
        .values()
        .filter(|entry| entry.r#type == 1)
        .skip(3)
        .map(|entry| confchange::decode(&entry.data).expect("sound"))
        .collect();
    let expected = [
        ConfChangeType::AddLearnerNode,
        ConfChangeType::AddNode,
        ConfChangeType::UpdateNode,
        ConfChangeType::RemoveNode,
    ];
    assert_eq!(kinds, expected.map(|kind| conf_change(kind, 4)), "etcd's numbers in the log");
    assert_eq!(cluster.applied_data(), ["a", "b"]);
}

#[test]
fn a_removed_leader_steps_down_and_the_others_elect() {
    let mut cluster = Cluster::new(3, 8);
    let old = cluster.elect();
    cluster.change(ConfChangeType::RemoveNode, old);
    assert_eq!(cluster.node(old).role(), Role::Follower);
    assert_eq!(cluster.node(old).propose(Bytes::new()), Err(ProposeError::Stopped));
    let new = cluster.elect();
    assert_ne!(new, old);
    cluster.put(new, "a");
    assert_eq!(cluster.node(new).conf_state().voters.len(), 2);
}

#[test]
fn a_second_conf_change_waits_for_the_first() {
    let mut cluster = Cluster::new(1, 9);
    let leader = cluster.elect();
    let change = conf_change(ConfChangeType::AddLearnerNode, 2);
    cluster.node(leader).propose_conf_change(&change).expect("leads");
    assert_eq!(
        cluster.node(leader).propose_conf_change(&change),
        Err(ProposeError::ConfChangePending)
    );
    cluster.quiet();
    assert_eq!(cluster.node(leader).propose_conf_change(&change), Ok(()));
}

/// A follower of etcd's forwards its server's conf change with etcd's numbers; the bytes must reach the log as they are.
#[test]
fn a_forwarded_conf_change_keeps_its_bytes() {
    // Zero fields written out, as etcd up to 3.6 does: type UpdateNode, then AddLearnerNode with an unknown field 9.
    for data in [&b"\x08\x00\x10\x02\x18\x02\x22\x02{}"[..], b"\x08\x05\x10\x03\x18\x07\x48\x01"] {
        let mut cluster = Cluster::new(3, 10);
        let leader = cluster.elect();
        let from = if leader == 1 { 2 } else { 1 };
        let entry = Entry {
            r#type: EntryType::EntryConfChange as i32,
            data: Bytes::copy_from_slice(data),
            ..Default::default()
        };
        let message =
            Message { r#type: 2, from, to: leader, entries: vec![entry], ..Default::default() };
        cluster.node(leader).step(message).expect("in order");
        cluster.quiet();
        assert_eq!(cluster.log.values().next_back().map(|entry| &entry.data[..]), Some(data));
        for id in cluster.ids() {
            assert_eq!(
                cluster.members[&id].disk.entries.last().map(|entry| &entry.data[..]),
                Some(data)
            );
        }
    }
}

#[test]
fn reads_wait_for_the_first_commit_of_a_term_and_share_a_round() {
    let mut cluster = Cluster::new(3, 11);
    let old = cluster.elect();
    cluster.put(old, "a");
    let new = cluster.ids().into_iter().find(|id| *id != old).expect("three members");
    cluster.node(old).transfer_leader(MemberId(new));
    // Step by step until the new leader leads, before anything of its term commits.
    while !cluster.node(new).is_leader() {
        for id in cluster.ids() {
            cluster.drain(id);
            cluster.persist(id, usize::MAX);
            cluster.drain(id);
        }
        if !cluster.network.is_empty() && !cluster.node(new).is_leader() {
            cluster.deliver(0);
        }
    }
    let local = cluster.read(new);
    let third = 6 - old - new;
    let entry = Entry { data: Bytes::copy_from_slice(&77u64.to_be_bytes()), ..Default::default() };
    let forwarded = Message {
        r#type: READ_INDEX,
        from: third,
        to: new,
        entries: vec![entry],
        ..Default::default()
    };
    cluster.node(new).step(forwarded).expect("in order");
    cluster.drain(new);
    assert!(cluster.network.iter().all(|message| message.r#type != HEARTBEAT), "not asked yet");
    let mut answers = 0;
    while !cluster.network.is_empty()
        || cluster.ids().iter().any(|id| !cluster.members[id].writes.is_empty())
    {
        for id in cluster.ids() {
            cluster.drain(id);
            cluster.persist(id, usize::MAX);
            cluster.drain(id);
        }
        answers += cluster.network.iter().filter(|message| message.r#type == 16).count();
        if !cluster.network.is_empty() {
            cluster.deliver(0);
        }
    }
    assert!(cluster.answered(new, local));
    assert!(answers > 0, "the other member's read was kept and answered");

    // One round for several reads: each is answered when the last one is.
    let reads: Vec<_> = (0..3).map(|_| cluster.read(new)).collect();
    cluster.drain(new);
    let last = reads[2].to_be_bytes();
    cluster.network.retain(|message| message.context == last[..]);
    assert!(!cluster.network.is_empty());
    cluster.quiet();
    assert!(reads.iter().all(|read| cluster.answered(new, *read)));
}

#[test]
fn a_lost_read_is_answered_when_asked_again() {
    let mut cluster = Cluster::new(3, 12);
    let leader = cluster.elect();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).expect("three members");
    for id in [leader, follower] {
        let read = cluster.read(id);
        cluster.drain(id);
        cluster.network.clear();
        cluster.quiet();
        assert!(!cluster.answered(id, read));
        assert_eq!(cluster.node(id).reads_waiting(), 1);
        cluster.node(id).retry_reads();
        cluster.quiet();
        assert!(cluster.answered(id, read));
        assert_eq!(cluster.node(id).reads_waiting(), 0);
    }
    let read = cluster.read(follower);
    cluster.node(follower).forget_read(read);
    cluster.quiet();
    assert!(!cluster.answered(follower, read));
}

/// The read was sent to a leader that is gone: it goes to the next one without a timer.
#[test]
fn a_read_follows_the_leader() {
    let mut cluster = Cluster::new(3, 13);
    let old = cluster.elect();
    let follower = cluster.ids().into_iter().find(|id| *id != old).expect("three members");
    cluster.cut.insert(old);
    let read = cluster.read(follower);
    cluster.quiet();
    assert!(!cluster.answered(follower, read));
    for _ in 0..100 {
        cluster.tick(1);
        if cluster.leader().is_some() {
            break;
        }
    }
    assert!(cluster.answered(follower, read));
}

#[test]
fn a_follower_too_far_behind_gets_a_snapshot() {
    let mut cluster = Cluster::new(3, 14);
    let leader = cluster.elect();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).expect("three members");
    cluster.cut.insert(follower);
    for _ in 0..20 {
        cluster.put(leader, "a");
    }
    let applied = cluster.node(leader).last_applied();
    cluster.node(leader).compact(applied);
    assert_eq!((cluster.node(leader).log_len(), cluster.node(leader).log_bytes()), (0, 0));
    cluster.cut.clear();
    cluster.tick(10);
    assert_eq!(cluster.members[&follower].snapshots, 1);
    assert_eq!(cluster.node(follower).first_index(), Index(applied.0 + 1));
    cluster.put(leader, "b");
    assert_eq!(cluster.members[&follower].applied, cluster.members[&leader].applied);
    assert_eq!(cluster.node(follower).conf_state().voters, [1, 2, 3]);
    cluster.crash(follower, 0);
    cluster.start(follower);
    cluster.put(leader, "c");
    cluster.tick(2);
    assert_eq!(cluster.members[&follower].applied, cluster.members[&leader].applied);
}

/// What is sent is newer than what raft was offered: the follower acknowledges more than was promised.
#[test]
fn a_snapshot_may_be_newer_than_the_one_on_offer() {
    let mut cluster = Cluster::new(3, 21);
    cluster.made_late = true;
    let leader = cluster.elect();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).expect("three members");
    cluster.cut.insert(follower);
    for _ in 0..10 {
        cluster.put(leader, "a");
    }
    cluster.offer(leader);
    let offered = cluster.node(leader).last_applied();
    cluster.node(leader).compact(offered);
    for _ in 0..10 {
        cluster.put(leader, "b");
    }
    let applied = cluster.node(leader).last_applied();
    cluster.cut.clear();
    cluster.tick(10);
    assert_eq!(cluster.members[&follower].snapshots, 1);
    assert_eq!(cluster.node(follower).first_index(), Index(applied.0 + 1));
    cluster.put(leader, "c");
    assert_eq!(cluster.members[&follower].applied, cluster.members[&leader].applied);
    let status = cluster.node(leader).status();
    let progress = status.progress.iter().find(|peer| peer.id.0 == follower).expect("a peer");
    assert_eq!(progress.state, ProgressState::Replicate);
    assert_eq!(progress.matched, status.last_index);
    // The leader's log holds nothing more than what it has sent: the next one is enough, too.
    cluster.cut.insert(follower);
    cluster.put(leader, "d");
    let applied = cluster.node(leader).last_applied();
    cluster.node(leader).compact_to_bytes(0);
    assert_eq!(cluster.node(leader).first_index(), Index(applied.0 + 1));
    cluster.cut.clear();
    cluster.tick(10);
    assert_eq!(cluster.members[&follower].snapshots, 2);
    cluster.put(leader, "e");
    assert_eq!(cluster.members[&follower].applied, cluster.members[&leader].applied);
}

/// While a snapshot is being installed no election begins here, however long it takes.
#[test]
fn a_member_with_half_a_snapshot_does_not_campaign() {
    let mut cluster = Cluster::new(3, 15);
    cluster.elect();
    let conf_state = cluster.node(1).conf_state();
    let term = cluster.node(1).term().0 + 1;
    let metadata = SnapshotMetadata { conf_state: Some(conf_state), index: 50, term };
    let snapshot = Some(Snapshot { metadata: Some(metadata), data: Bytes::new() });
    let message = Message { r#type: SNAP, from: 2, to: 1, term, snapshot, ..Default::default() };
    cluster.node(1).step(message).expect("in order");
    for stage in 0..3 {
        cluster.node(1).advance_ticks(100);
        cluster.node(1).campaign();
        assert_eq!(cluster.node(1).role(), Role::Follower, "stage {stage}");
        let timeout = Message { r#type: 14, from: 2, to: 1, term, ..Default::default() };
        cluster.node(1).step(timeout).expect("in order");
        assert_eq!(cluster.node(1).role(), Role::Follower, "stage {stage}");
        match stage {
            0 => cluster.drain(1),
            _ => {
                let numbers: Vec<_> =
                    cluster.member(1).writes.iter().map(|write| write.number).collect();
                numbers.into_iter().for_each(|number| cluster.node(1).persisted(number));
            }
        }
    }
    // A conf change from before the snapshot comes too late to be applied: its members know of it already.
    let remove = conf_change(ConfChangeType::RemoveNode, 3);
    let state = cluster.node(1).apply_conf_change(Index(49), Some(&remove)).expect("sound");
    assert_eq!(state.voters, [1, 2, 3]);
    cluster.node(1).applied(Index(50));
    cluster.node(1).advance_ticks(1);
    assert_eq!(cluster.node(1).role(), Role::PreCandidate, "its time is long up");
}

/// The sole voter elects itself at once; a learner must not hear of it before term and vote are on disk.
#[test]
fn a_sole_voter_is_silent_until_its_vote_is_on_disk() {
    let mut cluster = Cluster::new(1, 16);
    cluster.add(2, Disk::default());
    cluster.change(ConfChangeType::AddLearnerNode, 2);
    cluster.tick(3);
    cluster.crash(1, 0);
    cluster.start(1);
    cluster.quiet();
    cluster.node(1).campaign();
    assert!(cluster.node(1).is_leader());
    cluster.node(1).propose(Bytes::from_static(b"a")).expect("leads");
    cluster.drain(1);
    assert!(cluster.network.is_empty());
    cluster.persist(1, usize::MAX);
    cluster.drain(1);
    assert!(!cluster.network.is_empty());
}

/// A rejection overtaken by an acknowledgement must not take the leader's next index back below it.
#[test]
fn a_late_rejection_is_ignored() {
    let mut cluster = Cluster::new(3, 17);
    let leader = cluster.elect();
    cluster.put(leader, "a");
    cluster.put(leader, "b");
    let follower = cluster.ids().into_iter().find(|id| *id != leader).expect("three members");
    cluster.node(leader).report_unreachable(MemberId(follower));
    let progress = |cluster: &mut Cluster| {
        let status = cluster.node(leader).status();
        status.progress.into_iter().find(|peer| peer.id.0 == follower).expect("a peer")
    };
    let before = progress(&mut cluster);
    assert_eq!(before.state, ProgressState::Probe);
    let term = cluster.node(leader).term().0;
    for (index, reject_hint) in [(before.matched.0, 2), (before.matched.0 + 1, 2), (3, 2)] {
        let late = Message {
            r#type: APP_RESP,
            from: follower,
            to: leader,
            term,
            index,
            reject: true,
            reject_hint,
            log_term: 1,
            ..Default::default()
        };
        cluster.node(leader).step(late).expect("in order");
        assert_eq!(progress(&mut cluster), before);
    }
    assert!(!cluster.node(leader).has_output());
}

#[test]
fn bad_messages_are_named() {
    let mut cluster = Cluster::new(3, 18);
    let leader = cluster.elect();
    let follower = if leader == 1 { 2 } else { 1 };
    let term = cluster.node(leader).term().0;
    let last = cluster.node(leader).last_index().0;
    let to = |to, kind| Message { r#type: kind, from: 3, to, term, ..Default::default() };
    let message = |kind| Message { from: leader, ..to(follower, kind) };
    let entry = |index, term| Entry { index, term, ..Default::default() };
    let append = |entries| Message { index: last, log_term: term, entries, ..message(APP) };
    let mut refused = |message: Message| {
        let at = message.to.clamp(1, 3);
        cluster.node(at).step(message).expect_err("refused").to_string()
    };
    assert_eq!(refused(message(19)), "unknown message type 19");
    assert_eq!(refused(message(13)), "message type 13 never travels between members");
    assert!(
        refused(Message { to: 9, ..message(HEARTBEAT) })
            .starts_with("message for member 9 reached")
    );
    assert_eq!(
        refused(Message { from: 0, ..message(HEARTBEAT) }),
        "message of type 8 from member 0, which cannot be its sender"
    );
    assert_eq!(refused(Message { term: 0, ..message(HEARTBEAT) }), "message of type 8 with term 0");
    assert_eq!(
        refused(Message { commit: last + 1, ..message(HEARTBEAT) }),
        format!(
            "commit index {} is beyond the last entry {last}: this member's log was truncated or lost",
            last + 1
        )
    );
    assert_eq!(
        refused(Message { index: 5, log_term: 0, ..message(APP) }),
        "message of type 3: log term is 0"
    );
    assert_eq!(
        refused(append(vec![entry(last + 2, term)])),
        format!("entry {}: does not follow the one before", last + 2)
    );
    assert_eq!(
        refused(append(vec![entry(last + 1, term + 1)])),
        format!("entry {}: its term is above the current one", last + 1)
    );
    assert_eq!(
        refused(append(vec![entry(last + 1, 1)])),
        format!("entry {}: its term is below that of the one before", last + 1)
    );
    let joint = Entry { r#type: 2, ..entry(last + 1, term) };
    assert_eq!(
        refused(append(vec![joint])),
        format!("entry {}: joint conf changes are not supported", last + 1)
    );
    assert_eq!(
        refused(Message { term: 0, ..message(READ_INDEX) }),
        "message of type 15 with 0 entries"
    );
    assert_eq!(refused(message(SNAP)), "snapshot at 0: no metadata");
    let ack = Message { from: follower, index: last + 1, ..to(leader, APP_RESP) };
    assert_eq!(
        refused(ack),
        format!("member {follower:x} acknowledges entry {}, the last one is {last}", last + 1)
    );
    assert_eq!(
        refused(Message { from: 9, ..to(leader, HEARTBEAT_RESP) }),
        "response from member 9, which is not in the cluster"
    );
}

#[test]
fn a_disk_that_does_not_fit_together_is_refused() {
    let refused =
        |restored: Restored| Node::new(&config(1, 0), restored).err().expect("refused").to_string();
    let entries = bootstrapped(3).entries;
    let sound = Restored {
        hard_state: HardState { term: 1, vote: 0, commit: 3 },
        entries: entries.clone(),
        ..Default::default()
    };
    assert!(Node::new(&config(1, 0), sound.clone()).is_ok());
    assert_eq!(
        refused(Restored { applied: Index(4), ..sound.clone() }),
        "applied index 4 is beyond the last log entry 3: entries are missing from the log"
    );
    assert_eq!(
        refused(Restored {
            hard_state: HardState { commit: 5, ..sound.hard_state },
            ..sound.clone()
        }),
        "commit index 5 is beyond the last log entry 3: entries are missing from the log"
    );
    assert_eq!(
        refused(Restored { snapshot: (Index(7), Term(1)), entries: vec![], ..sound.clone() }),
        "applied index 0 is below the snapshot at 7: entries between are gone"
    );
    assert_eq!(
        refused(Restored { entries: entries[1..].to_vec(), ..sound.clone() }),
        "the log is broken"
    );
    let conf_state = ConfState { voters: vec![1, 2], learners: vec![2], ..Default::default() };
    assert_eq!(
        refused(Restored { conf_state, ..sound.clone() }),
        "conf state: a member twice in its conf state"
    );
    let none = Config { heartbeat_ticks: 0, ..config(1, 0) };
    assert_eq!(
        Node::new(&none, sound).err().expect("refused").to_string(),
        "raft configuration: heartbeat ticks are 0"
    );
}

/// The crash came after the entries were written and before the hard state, or after the engine went ahead of it.
#[test]
fn commit_and_term_are_raised_to_what_the_disk_shows() {
    let restored = Restored {
        hard_state: HardState::default(),
        entries: bootstrapped(3).entries,
        conf_state: ConfState { voters: vec![1, 2, 3], ..Default::default() },
        applied: Index(3),
        ..Default::default()
    };
    let node = Node::new(&config(1, 0), restored).expect("sound");
    assert_eq!((node.term(), node.committed(), node.last_applied()), (Term(1), Index(3), Index(3)));
}

/// Thousands of steps in which everything goes wrong, then peace: all agree, nothing committed is lost.
fn chaos(seed: u64, steps: usize) -> (u64, usize) {
    let mut cluster = Cluster::new(5, seed);
    cluster.add(6, Disk::default());
    cluster.loss = cluster.random.below(15);
    cluster.double = cluster.random.below(10);
    let mut proposed = 0u64;
    for step in 0..steps {
        let ids = cluster.ids();
        let id = ids[cluster.random.below(ids.len())];
        let runs = cluster.members[&id].node.is_some();
        match cluster.random.below(100) {
            0..=19 if runs => cluster.node(id).tick(),
            20..=54 => {
                for _ in 0..cluster.random.below(12).min(cluster.network.len()) {
                    // Mostly in order, now and then from anywhere.
                    let newest = if cluster.random.chance(80) { 1 } else { cluster.network.len() };
                    let at = cluster.random.below(newest);
                    cluster.deliver(at);
                }
            }
            55..=69 if runs => {
                let count = cluster.random.below(4);
                cluster.persist(id, count);
            }
            70..=79 if runs => {
                let count = cluster.random.below(6);
                cluster.apply(id, count);
            }
            80..=88 if runs => {
                proposed += 1;
                let size = cluster.random.below(120);
                let mut data = proposed.to_be_bytes().to_vec();
                data.resize(8 + size, 0);
                let _ = cluster.node(id).propose(data.into());
            }
            89 if runs => {
                cluster.read(id);
            }
            90 if runs => cluster.node(id).retry_reads(),
            91 if runs && cluster.random.chance(40) => {
                let survive = cluster.random.below(3);
                cluster.crash(id, survive);
            }
            92 if !runs => cluster.start(id),
            93 if runs => {
                // The state machine and the snapshot reach the disk; the log is cut before it.
                let member = cluster.member(id);
                let applied = member.node().last_applied().0;
                if applied > 0 && member.writes.is_empty() {
                    member.disk.applied = applied;
                    member.disk.compact(applied.saturating_sub(5));
                    cluster.offer(id);
                    cluster.node(id).compact(Index(applied.saturating_sub(3)));
                }
            }
            94 if cluster.random.chance(30) => {
                cluster.cut.clear();
                for _ in 0..cluster.random.below(3) {
                    let at = cluster.random.below(ids.len());
                    cluster.cut.insert(ids[at]);
                }
            }
            95 if cluster.random.chance(20) => {
                if let Some(leader) = cluster.leader() {
                    cluster.node(leader).transfer_leader(MemberId(id));
                }
            }
            96 if cluster.random.chance(30) => {
                if let Some(leader) = cluster.leader() {
                    let state = cluster.node(leader).conf_state();
                    let change = match cluster.random.below(3) {
                        _ if !state.voters.contains(&6) && !state.learners.contains(&6) => {
                            conf_change(ConfChangeType::AddLearnerNode, 6)
                        }
                        0 if state.learners.contains(&6) => conf_change(ConfChangeType::AddNode, 6),
                        1 if state.voters.contains(&6) => {
                            conf_change(ConfChangeType::RemoveNode, 5)
                        }
                        _ => conf_change(ConfChangeType::UpdateNode, 1),
                    };
                    let _ = cluster.node(leader).propose_conf_change(&change);
                }
            }
            _ => {}
        }
        for id in cluster.running() {
            cluster.drain(id);
            let status = cluster.members[&id].node.as_ref().expect("runs");
            assert!(
                status.last_applied() <= status.committed().min(status.last_persisted()),
                "seed {seed}"
            );
            assert!(status.last_persisted() <= status.last_index(), "seed {seed}");
        }
        if step % 256 == 0 {
            cluster.check_log_matching();
        }
    }
    cluster.cut.clear();
    (cluster.loss, cluster.double) = (0, 0);
    for id in cluster.ids() {
        if cluster.members[&id].node.is_none() {
            cluster.start(id);
        }
    }
    cluster.quiet();
    cluster.tick(20);
    let leader = cluster.elect();
    cluster.put(leader, "the end");
    cluster.tick(20);
    let leader = cluster.elect();
    let state = cluster.node(leader).conf_state();
    let applied = cluster.members[&leader].applied;
    assert_eq!(cluster.log.len() as u64, applied, "no gap in what was applied, seed {seed}");
    for id in state.voters.iter().chain(&state.learners) {
        assert_eq!(cluster.members[id].applied, applied, "member {id} behind, seed {seed}");
        assert_eq!(cluster.node(*id).conf_state(), state, "seed {seed}");
    }
    cluster.check_log_matching();
    assert!(cluster.applied_data().contains(&Bytes::from_static(b"the end")), "seed {seed}");
    (cluster.trace, cluster.log.len())
}

#[test]
fn nothing_committed_is_lost_whatever_goes_wrong() {
    if let Ok(seed) = std::env::var("RAFT_SEED") {
        chaos(seed.parse().expect("a number"), 6000);
        return;
    }
    let committed: usize = (1..41).map(|seed| chaos(seed, 6000).1).sum();
    assert!(committed > 3000, "{committed} entries were committed");
}

#[test]
fn the_same_seed_repeats_every_output() {
    let (trace, committed) = chaos(4711, 3000);
    assert_eq!(chaos(4711, 3000), (trace, committed));
    assert_ne!(chaos(4712, 3000).0, trace);
}

fn random_entry(random: &mut Random, index: u64, term: u64) -> Entry {
    let data = match random.below(4) {
        0 => confchange::encode(&ConfChange {
            id: random.next(),
            r#type: random.below(6) as i32,
            node_id: random.below(5) as u64,
            context: Bytes::new(),
        }),
        1 => Bytes::from(random.next().to_be_bytes().to_vec()),
        _ => Bytes::new(),
    };
    Entry { r#type: if random.chance(70) { 0 } else { random.below(4) as i32 }, term, index, data }
}

fn random_number(random: &mut Random, near: u64) -> u64 {
    match random.below(12) {
        0 => 0,
        1 => random.next(),
        2 => u64::MAX - random.below(3) as u64,
        3 => (u64::MAX >> 1) - random.below(3) as u64,
        4..=6 => near,
        7 | 8 => near.saturating_add(random.below(3) as u64),
        _ => near.saturating_sub(random.below(4) as u64),
    }
}

/// A message that could come from anyone, near enough to what the member expects to get far.
fn random_message(random: &mut Random, node: &Node) -> Message {
    let (term, last, commit) = (node.term().0, node.last_index().0, node.committed().0);
    // Most terms stay close, or the term would soon be so high that nothing is let in.
    let near = if random.chance(3) { term + 1 } else { term };
    let term = if random.chance(3) { random_number(random, term) } else { near };
    let kind = random.below(21) as u32;
    let position = if random.chance(50) { last } else { commit };
    let index = if random.chance(70) { position } else { random_number(random, position) };
    let log_term = match node.term_at(Index(index)) {
        Some(term) if random.chance(80) => term.0,
        _ => random_number(random, term),
    };
    let count = if random.chance(50) {
        random.below(4) as u64
    } else {
        u64::from(matches!(kind, 2 | 15 | 16))
    };
    let mut entries = Vec::new();
    for at in 1..=count {
        let index = index.wrapping_add(at);
        let index = if random.chance(95) { index } else { random_number(random, last) };
        let term = if random.chance(90) { term } else { random_number(random, term) };
        entries.push(random_entry(random, index, term));
    }
    let member = |random: &mut Random| random.below(5) as u64;
    let snapshot = random.chance(60).then(|| Snapshot {
        data: Bytes::new(),
        metadata: random.chance(95).then(|| SnapshotMetadata {
            conf_state: random.chance(95).then(|| ConfState {
                voters: if random.chance(50) {
                    vec![1, 2, 3]
                } else {
                    (0..random.below(4)).map(|_| member(random)).collect()
                },
                learners: (0..random.below(2)).map(|_| member(random)).collect(),
                voters_outgoing: if random.chance(95) { vec![] } else { vec![1] },
                learners_next: vec![],
                auto_leave: random.chance(2),
            }),
            index: random_number(random, last),
            term: random_number(random, term),
        }),
    });
    Message {
        r#type: kind,
        to: if random.chance(97) { 1 } else { member(random) },
        from: member(random),
        term: if matches!(kind, 2 | 15) && random.chance(90) { 0 } else { term },
        log_term,
        index,
        entries,
        commit: if random.chance(60) { commit } else { random_number(random, last) },
        snapshot,
        reject: random.chance(30),
        reject_hint: random_number(random, last),
        context: if random.chance(20) {
            Bytes::from_static(b"CampaignTransfer")
        } else {
            Bytes::new()
        },
    }
}

/// 100,000 messages, made up or mutated, some driving a disk that lags: each is taken or refused, none ends the process.
#[test]
fn no_message_ends_the_process() {
    let (mut taken, mut led) = (0, 0);
    for seed in 0..100 {
        let mut random = Random(seed);
        let mut cluster = Cluster::new(3, seed);
        cluster.members.retain(|id, _| *id == 1);
        for _ in 0..1000 {
            let mut message = random_message(&mut random, cluster.node(1));
            if random.chance(10) {
                let mut bytes = message.encode_to_vec();
                for _ in 0..=random.below(3) {
                    let at = random.below(bytes.len());
                    bytes[at] = random.next() as u8;
                }
                match Message::decode(Bytes::from(bytes)) {
                    Ok(mutated) => message = mutated,
                    Err(_) => continue,
                }
            }
            taken += usize::from(cluster.node(1).step(message).is_ok());
            led += usize::from(cluster.node(1).is_leader());
            let node = cluster.node(1);
            match random.below(12) {
                0 => node.advance_ticks(1 + random.below(30)),
                1 => node.campaign(),
                2 => drop(node.propose(Bytes::from_static(b"x"))),
                3 => node.report_unreachable(MemberId(2)),
                4 => node.report_snapshot(MemberId(3), random.chance(50)),
                5 => node.transfer_leader(MemberId(1 + random.below(4) as u64)),
                6 => node.read_index(random.next()),
                7 => node.compact(node.last_applied()),
                _ => {}
            }
            if random.chance(60) {
                // What a stranger made us commit is applied without comparing it with anything.
                while cluster.node(1).has_output() {
                    let output = cluster.node(1).output();
                    let member = cluster.member(1);
                    member.committed.extend(output.committed);
                    let snapshot = output.snapshot.map(|s| s.metadata.expect("metadata"));
                    if let Some(number) = output.number {
                        member.writes.push_back(Write {
                            number,
                            snapshot,
                            entries: vec![],
                            hard_state: None,
                        });
                    }
                }
            }
            let member = cluster.member(1);
            for _ in 0..random.below(4) {
                let Some(write) = member.writes.pop_front() else { break };
                member.node().persisted(write.number);
                if let Some(snapshot) = write.snapshot {
                    member.node().applied(Index(snapshot.index));
                }
            }
            for _ in 0..random.below(4) {
                let Some(entry) = member.committed.pop_front() else { break };
                if entry.index <= member.node().last_applied().0 {
                    continue;
                }
                if entry.r#type == EntryType::EntryConfChange as i32 {
                    let change = confchange::decode(&entry.data).expect("checked on its way in");
                    // Removing the last voter is an error, not a panic.
                    let _ = member.node().apply_conf_change(Index(entry.index), Some(&change));
                }
                member.node().applied(Index(entry.index));
            }
        }
    }
    assert!(taken > 10_000, "only {taken} got past the checks");
    assert!(led > 1000, "led for {led} messages only");
}

/// Proposals a second through one voter whose disk answers at once. Run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn bench_sole_voter() {
    for batch in [1usize, 64] {
        let conf_state = ConfState { voters: vec![1], ..Default::default() };
        let restored = Restored { conf_state, ..Default::default() };
        let mut node = Node::new(&Config::new(MemberId(1), 0), restored).expect("sound");
        node.campaign();
        let data = Bytes::from(vec![0u8; 128]);
        let total = 1_000_000;
        let mut done = 0;
        let started = std::time::Instant::now();
        while done < total {
            for _ in 0..batch {
                node.propose(data.clone()).expect("leads");
            }
            while node.has_output() {
                let output = node.output();
                if let Some(number) = output.number {
                    node.persisted(number);
                }
                if let Some(last) = output.committed.last() {
                    done += output.committed.len();
                    node.applied(Index(last.index));
                }
            }
            if node.log_len() > 10_000 {
                node.compact(Index(node.last_applied().0 - 5000));
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        println!("batch {batch}: {:.0} proposals/s", done as f64 / seconds);
    }
}
