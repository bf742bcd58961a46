//! For tests: a member with all its actors, on a real directory, that follows whatever leader the test
//! plays.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use engine_api::Engine;
use prost::Message as _;
use quorate_proto::{etcdserverpb as pb, membershippb, raftpb, walpb};
use tokio::sync::mpsc;

use crate::actors::applier::{self, Applier, Checkpoint};
use crate::actors::committer::BatchCommitter;
use crate::actors::compactor::{self, Compactor};
use crate::actors::disk::{OsDisk, SharedDisk};
use crate::actors::exit::{Exit, Reason};
use crate::actors::lease::LeaseManager;
use crate::actors::peers::{Members, Send};
use crate::actors::raft::{self, RaftActor, Step};
use crate::actors::shared::{Published, Shared};
use crate::actors::snapshot::{self, Snapshotter};
use crate::actors::spawn::Seat;
use crate::actors::wal::{Close, WalWriter};
use crate::actors::watch::WatchHub;
use crate::core::apply::{Machine, TokenChange};
use crate::core::autocompact::{AutoCompaction, Retention};
use crate::core::command::{Command, Request};
use crate::core::lease::LessorOptions;
use crate::core::membership::{ChangeContext, Member, Membership, Version};
use crate::core::quota::Quota;
use crate::core::raft::{Config, MSG_APP, MSG_SNAP, Node, Restored};
use crate::core::types::{ClusterId, Index, MemberId, Term};
use crate::core::watch::{Hub, HubOptions};
use crate::storage::home::Home;
use crate::storage::install::{Installer, OpenEngine};
use crate::storage::snap_dir::SnapDir;
use crate::storage::wal_log::WalLog;

/// The member under test, and the leader that the test plays.
pub const LOCAL: u64 = 1;
pub const LEADER: u64 = 2;
pub const CLUSTER: u64 = 7;
/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running member.
pub struct Rig {
    pub shared: Arc<Shared>,
    pub raft: Addr<RaftActor>,
    pub wal: Addr<WalWriter>,
    pub applier: Addr<Applier>,
    pub watch: Addr<WatchHub>,
    pub leases: Addr<LeaseManager>,
    pub snapshots: SnapDir,
    /// What the member sends to others.
    pub sent: mpsc::UnboundedReceiver<raftpb::Message>,
    pub exits: mpsc::UnboundedReceiver<Reason>,
    next: u64,
}

/// Stands for the peer network.
struct Probe(mpsc::UnboundedSender<raftpb::Message>);

impl Actor for Probe {
    type Context = Context<Self>;
}

impl Handler<Send> for Probe {
    type Result = ();

    fn handle(&mut self, Send(messages): Send, _: &mut Self::Context) {
        for message in messages {
            // A test that has ended looks at none.
            self.0.send(message).ok();
        }
    }
}

impl Handler<Members> for Probe {
    type Result = ();

    fn handle(&mut self, _: Members, _: &mut Self::Context) {}
}

pub fn version() -> Version {
    Version::parse("3.7.1").expect("a version")
}

/// Opens redb in a directory. It gives space back so slowly that a test can see it under way.
pub fn open_redb() -> OpenEngine {
    Arc::new(|dir| {
        let slow = [("reclaim-mib-per-second".to_owned(), "1".to_owned())].into();
        let options = engine_api::Options::new(&engine_redb::ABOUT, &slow).expect("its options");
        Ok(Arc::new(engine_redb::Redb::open(dir, &options)?))
    })
}

/// What installs in `dir`, as a member there would.
pub fn installer(disk: SharedDisk, dir: &Path, persistent: bool) -> Installer {
    let snaps = SnapDir::open(disk.clone(), &dir.join("snap")).expect("a directory");
    let open: OpenEngine = match persistent {
        true => open_redb(),
        false => Arc::new(|_| Ok(Arc::new(engine_memory::Memory::new()))),
    };
    let engine = persistent.then(|| Home::own(dir.join("engine-redb")));
    Installer::new(disk, snaps, engine, open, version())
}

/// Forgets all logins.
struct NoTokens;

impl applier::TokenSink for NoTokens {
    fn changed(&self, _: &TokenChange) {}

    fn replaced(&self, _: &dyn Fn(&str) -> bool) {}
}

impl Rig {
    /// A member that has just joined: its log and its engine are empty.
    pub fn start(dir: &Path, persistent: bool) -> Rig {
        let disk: SharedDisk = Arc::new(OsDisk);
        let installer = installer(disk.clone(), dir, persistent);
        let snapshots = SnapDir::open(disk.clone(), &dir.join("snap")).expect("a directory");
        let engine: Arc<dyn Engine> = installer.open().expect("an engine opens");
        let metadata = walpb::Metadata { node_id: Some(LOCAL), cluster_id: Some(CLUSTER) };
        let log = WalLog::create(disk.clone(), &dir.join("wal"), &metadata).expect("a new log");

        let blank = Membership::new(ClusterId(CLUSTER), MemberId(LOCAL), 1);
        let view = engine.view().expect("a view");
        let machine = Machine::restore(&*view, blank, 1, version()).expect("a state").machine;
        drop(view);
        let node = Node::new(&Config::new(MemberId(LOCAL), 1), Restored::default());
        let node = node.expect("an empty log is one");
        let published = Published::of(&machine, engine, None);
        let shared = Arc::new(Shared::new(ClusterId(CLUSTER), MemberId(LOCAL), published));
        let (exit, exits) = Exit::new();

        let raft_seat = Seat::<RaftActor>::new(raft::MAILBOX);
        let applier_seat = Seat::<Applier>::new(64);
        let (raft, applier) = (raft_seat.addr(), applier_seat.addr());
        let (sender, sent) = mpsc::unbounded_channel();
        let probe = Probe(sender).start();
        let wal =
            WalWriter::new(log, snapshots.clone(), raft.clone().recipient(), exit.clone(), true)
                .start();
        let revision = machine.store.now().revision();
        let hub = Hub::new(HubOptions::default(), revision, 1);
        let watch = WatchHub::new(hub, shared.clone(), exit.clone()).start();
        let election = Duration::from_secs(1);
        let leases =
            LeaseManager::new(shared.clone(), raft.clone(), LessorOptions::default(), election)
                .start();
        let compaction = compactor::Options {
            batch_limit: 1000,
            sleep: Duration::from_millis(1),
            request_timeout: PATIENCE,
        };
        let auto = AutoCompaction::new(Retention::Off);
        let compactor =
            Compactor::new(shared.clone(), applier.clone(), raft.clone(), compaction, auto, None)
                .start();
        let options = snapshot::Options {
            wal_dir: dir.join("wal"),
            max_snapshots: 5,
            max_wals: 5,
            persistent,
            start: Index(0),
        };
        let snapshotter =
            Snapshotter::new(disk, snapshots.clone(), wal.clone(), exit.clone(), options).start();
        let committer =
            BatchCommitter::new(applier.clone().recipient(), shared.clone(), exit.clone()).start();
        let links = applier::Links {
            shared: shared.clone(),
            raft: raft.clone(),
            committer,
            watch: watch.clone().recipient(),
            leases: leases.clone().recipient(),
            promoted: leases.clone().recipient(),
            leases_replaced: leases.clone().recipient(),
            compactor: compactor.clone().recipient(),
            store_replaced: compactor.recipient(),
            snapshotter: snapshotter.clone().recipient(),
            installed: snapshotter.recipient(),
            installer,
            peers: probe.clone().recipient(),
            tokens: Arc::new(NoTokens),
            exit: exit.clone(),
        };
        let options = applier::Options {
            batch_interval: Duration::from_millis(5),
            batch_limit: 100,
            quota: Quota::OFF,
            snapshot_count: 10_000,
            snapshot_index: Index(0),
            warning_apply: PATIENCE,
        };
        let here = Arbiter::current();
        applier_seat.start_in(&here, move || Applier::new(machine, links, options));
        let links = raft::Links {
            shared: shared.clone(),
            wal: wal.clone(),
            applier: applier.clone(),
            leases: leases.clone().recipient(),
            peers: Some(probe.recipient()),
            exit,
        };
        // No election comes up by itself.
        let options = raft::Options { tick: 10 * PATIENCE, catch_up_entries: 5000 };
        raft_seat.start_in(&here, move || RaftActor::new(node, links, options));
        let next = 1;
        Rig { shared, raft, wal, applier, watch, leases, snapshots, sent, exits, next }
    }

    /// Has the leader append `entries` after all before, and commit them.
    pub fn append(&mut self, entries: Vec<raftpb::Entry>) {
        let index = self.next - 1;
        let term = u64::from(index > 0);
        self.next += entries.len() as u64;
        let commit = self.next - 1;
        self.step(raftpb::Message {
            r#type: MSG_APP,
            index,
            log_term: term,
            entries,
            commit,
            ..Default::default()
        });
    }

    /// Has the leader send `snapshot`, whose database is there.
    pub fn send_snapshot(&mut self, snapshot: raftpb::Snapshot) {
        self.next = snapshot.metadata.as_ref().map_or(0, |metadata| metadata.index) + 1;
        let snapshot = Some(snapshot);
        self.step(raftpb::Message { r#type: MSG_SNAP, snapshot, ..Default::default() });
    }

    fn step(&self, message: raftpb::Message) {
        let message = raftpb::Message { from: LEADER, to: LOCAL, term: 1, ..message };
        self.raft.do_send(Step(vec![message]));
    }

    /// Puts the founding of the cluster into the log: two members, the version.
    pub fn found(&mut self) {
        let add = |id: u64| {
            let member = Member {
                id,
                peer_urls: vec![format!("http://127.0.0.1:{id}")],
                name: format!("m{id}"),
                ..Member::default()
            };
            let context = ChangeContext { member, is_promote: false };
            let change = raftpb::ConfChange {
                r#type: raftpb::ConfChangeType::AddNode as i32,
                node_id: id,
                context: serde_json::to_vec(&context).expect("JSON").into(),
                ..Default::default()
            };
            (raftpb::EntryType::EntryConfChange as i32, change.encode_to_vec().into())
        };
        let set = membershippb::ClusterVersionSetRequest { ver: "3.7.0".into() };
        let version = (0, Command::new(1, Request::ClusterVersionSet(set)).encode());
        self.append_data(vec![add(LOCAL), add(LEADER), version]);
    }

    /// Appends requests.
    pub fn requests(&mut self, requests: Vec<Request>) {
        let data = requests.into_iter().map(|r| (0, Command::new(1, r).encode())).collect();
        self.append_data(data);
    }

    fn append_data(&mut self, data: Vec<(i32, Bytes)>) {
        let entry = |(at, (kind, data)): (usize, (i32, Bytes))| raftpb::Entry {
            r#type: kind,
            term: 1,
            index: self.next + at as u64,
            data,
        };
        let entries = data.into_iter().enumerate().map(entry).collect();
        self.append(entries);
    }

    /// The last entry that the leader has sent.
    pub fn last(&self) -> Index {
        Index(self.next - 1)
    }

    /// Waits until everything sent is applied and published.
    pub async fn applied(&mut self) {
        let last = self.last();
        let started = Instant::now();
        while self.shared.published.load().applied < last {
            if let Ok(reason) = self.exits.try_recv() {
                panic!("the member has stopped: {reason:?}");
            }
            assert!(started.elapsed() < PATIENCE, "entry {last} is not applied");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(self.shared.published.load().applied, last);
    }

    /// Brings everything to the disk and closes the log.
    pub async fn stop(self) {
        let (reply, durable) = tokio::sync::oneshot::channel();
        self.applier.do_send(Checkpoint(reply));
        durable.await.expect("the applier runs");
        self.wal.send(Close).await.expect("the log closes");
    }
}

pub fn put(key: &str, value: &str) -> Request {
    Request::Put(pb::PutRequest {
        key: key.to_string().into(),
        value: value.to_string().into(),
        ..Default::default()
    })
}

pub fn compact(revision: i64) -> Request {
    Request::Compaction(pb::CompactionRequest { revision, physical: false })
}

pub fn grant(id: i64) -> Request {
    Request::LeaseGrant(pb::LeaseGrantRequest { id, ttl: 100 })
}

/// A snapshot of all that `from` has applied, received in `to`.
pub async fn transfer(from: &Rig, to: &SnapDir, dir: &Path) -> raftpb::Snapshot {
    let exported = crate::actors::export::export(&from.shared, &from.applier, dir).await;
    let mut exported = exported.expect("an export");
    let index = exported.snapshot.metadata.as_ref().expect("metadata").index;
    let mut receiver = to.receive_db(index).expect("a file");
    let copied = std::io::copy(&mut exported.db, &mut receiver).expect("a copy");
    assert_eq!(copied, exported.size);
    receiver.finish().expect("a database is kept");
    exported.snapshot
}

/// The term of everything that the leader sends.
pub const TERM: Term = Term(1);

/// Where `dir` keeps the database received for `index`.
pub fn db_path(dir: &Path, index: u64) -> PathBuf {
    dir.join("snap").join(crate::core::snap::db_name(index))
}
