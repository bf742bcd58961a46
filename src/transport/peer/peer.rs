//! One other member: where messages for it go, and whether it can be reached.
//!
//! in:  `Deliver`, `Attach`, `Urls`, `Close` from network.rs, `StreamUp` and `StreamDown` from stream.rs
//! out: `Step`, `Unreachable`, `SnapshotDone` to actors/raft.rs
//!
//! `MsgApp` goes over the msgapp stream, everything else over the message stream; what finds no stream
//! is posted. A snapshot is posted with its database. A message that finds no room is dropped, and
//! raft is told: it would wait for an answer otherwise.

use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use quorate_proto::raftpb::Message as RaftMessage;
use tokio::sync::mpsc;

use super::codec::StreamKind;
use super::network::{Net, SharedUrls};
use super::pipeline::Pipeline;
use super::prober::{self, Prober};
use super::stream::{Outlet, Reader, StreamError};
use crate::actors::raft::{SnapshotDone, Unreachable};
use crate::config::Url;
use crate::core::raft::{MSG_APP, MSG_SNAP};
use crate::core::types::MemberId;
use crate::metrics::PeerMetrics;

/// Forwarded proposals that wait for raft.
const PROPOSALS_MAX: usize = 4096;
/// Forwarded proposals that raft is handed together at most.
const PROPOSALS_TOGETHER: usize = 1024;

/// Three in the 5 s after which another member gives a silent stream up; it may have set more, not less.
const HEARTBEAT: Duration = Duration::from_millis(5000 / 3);

/// Messages for this peer, in order.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Deliver(pub Vec<RaftMessage>);

/// The peer has dialled a stream. It replaces the one that was there.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Attach(pub Outlet);

/// Where the peer is now, and whether it is a member, which is dialled for its streams.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Urls {
    pub urls: Vec<Url>,
    pub dial: bool,
}

/// The peer was removed from the cluster. What is queued on its streams still leaves.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Close;

/// A dialled stream stands.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StreamUp(pub StreamKind);

/// A stream could not be dialled, or has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StreamDown {
    pub kind: StreamKind,
    pub error: StreamError,
}

/// The connections as they are now.
#[derive(Message)]
#[rtype(result = "PeerStatus")]
pub struct GetStatus;

/// A peer's connections.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PeerStatus {
    /// It has dialled these of its streams: what is sent leaves by them.
    pub attached: Streams,
    /// These of its streams this member has dialled.
    pub dialled: Streams,
    /// It is dialled at all.
    pub member: bool,
}

/// Each of the two streams.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Streams {
    pub message: bool,
    pub msgapp: bool,
}

/// A task that ends with its owner.
pub struct Task(tokio::task::JoinHandle<()>);

impl Task {
    /// Runs `future` on this thread.
    pub fn spawn(future: impl Future<Output = ()> + 'static) -> Self {
        Task(actix::spawn(future))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells raft that `messages` are lost.
pub fn undelivered(net: &Net, to: MemberId, messages: &[RaftMessage]) {
    if messages.iter().any(|message| message.r#type == MSG_SNAP) {
        net.raft.snapshot_done.do_send(SnapshotDone { to, ok: false });
    }
    if !messages.is_empty() {
        net.raft.unreachable.do_send(Unreachable(to));
    }
}

/// What is known of one of the two streams.
#[derive(Default)]
struct Side {
    outlet: Option<Outlet>,
    /// The dialled one stands.
    up: bool,
    /// What was last said about why it does not.
    complaint: String,
}

/// Owns everything about one other member.
pub struct Peer {
    pub(super) net: Arc<Net>,
    pub(super) id: MemberId,
    pub(super) urls: SharedUrls,
    pub(super) metrics: PeerMetrics,
    pub(super) pipeline: Pipeline,
    pub(super) sending_snapshot: bool,
    dial: bool,
    message: Side,
    msgapp: Side,
    active: bool,
    tasks: Vec<Task>,
}

impl Peer {
    /// `dial`: it is a member, so that its streams are wanted.
    pub fn new(net: Arc<Net>, id: MemberId, urls: Vec<Url>, dial: bool) -> Self {
        let metrics = net.metrics.peer(&net.local.to_string(), &id.to_string());
        Peer {
            net,
            id,
            urls: SharedUrls::new(urls),
            metrics,
            pipeline: Pipeline::default(),
            sending_snapshot: false,
            dial,
            message: Side::default(),
            msgapp: Side::default(),
            active: false,
            tasks: Vec::new(),
        }
    }

    fn side(&mut self, kind: StreamKind) -> &mut Side {
        match kind {
            StreamKind::Message => &mut self.message,
            StreamKind::MsgApp => &mut self.msgapp,
        }
    }

    fn dial(&mut self, ctx: &mut Context<Self>) {
        let (proposals, mut waiting) = mpsc::channel::<RaftMessage>(PROPOSALS_MAX);
        let raft = self.net.raft.clone();
        self.tasks.push(Task::spawn(async move {
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, PROPOSALS_TOGETHER).await > 0 {
                raft.step(std::mem::take(&mut batch)).await;
            }
        }));
        for kind in StreamKind::ALL {
            let reader = Reader {
                net: self.net.clone(),
                remote: self.id,
                kind,
                urls: self.urls.clone(),
                peer: ctx.address(),
                proposals: proposals.clone(),
                metrics: self.metrics.clone(),
            };
            self.tasks.push(Task::spawn(reader.run()));
        }
        for name in prober::NAMES {
            let prober = Prober {
                net: self.net.clone(),
                remote: self.id,
                name,
                urls: self.urls.clone(),
                metrics: self.metrics.clone(),
            };
            self.tasks.push(Task::spawn(prober.run()));
        }
    }

    /// Keeps the streams alive, and finds those whose other side has gone.
    fn heartbeat(&mut self) {
        for kind in StreamKind::ALL {
            self.drop_if_closed(kind);
            if let Some(outlet) = &mut self.side(kind).outlet {
                let bytes = outlet.heartbeat();
                self.metrics.sent_bytes.increment(bytes as u64);
            }
        }
    }

    fn drop_if_closed(&mut self, kind: StreamKind) {
        if self.side(kind).outlet.take_if(|outlet| outlet.is_closed()).is_some() {
            tracing::warn!(
                "stream-writer-type" = kind.label(),
                "local-member-id" = %self.net.local,
                "remote-peer-id" = %self.id,
                "lost TCP streaming connection with remote peer"
            );
        }
    }

    /// The stream that messages of `kind` leave by, if there is one.
    fn outlet(&mut self, kind: StreamKind) -> Option<&mut Outlet> {
        self.drop_if_closed(kind);
        match kind {
            StreamKind::MsgApp if self.msgapp.outlet.is_some() => self.msgapp.outlet.as_mut(),
            // Without one of its own, any message fits on the message stream.
            StreamKind::MsgApp => self.outlet(StreamKind::Message),
            StreamKind::Message => self.message.outlet.as_mut(),
        }
    }

    /// Sends `batch`, all of one kind; answers what found no room.
    fn send_kind(
        &mut self,
        kind: StreamKind,
        mut batch: Vec<RaftMessage>,
        ctx: &mut Context<Self>,
    ) -> Vec<RaftMessage> {
        if let Some(outlet) = self.outlet(kind) {
            let (sent, bytes) = outlet.send(batch.iter());
            self.metrics.sent_bytes.increment(bytes as u64);
            return batch.split_off(sent);
        }
        let refused = batch.split_off(batch.len().min(self.pipeline.room()));
        for message in batch {
            self.pipeline.push(message);
        }
        self.post(ctx);
        refused
    }

    /// Counts and tells raft that `lost` did not leave; says so in the log, unless it is known that the
    /// peer cannot be reached.
    pub(super) fn lost(&self, lost: &[RaftMessage], why: &dyn std::fmt::Display) {
        let Some(first) = lost.first() else { return };
        self.metrics.sent_failures.increment(lost.len() as u64);
        if self.active {
            tracing::warn!(
                "message-type" = first.r#type,
                messages = lost.len(),
                "local-member-id" = %self.net.local,
                "remote-peer-id" = %self.id,
                reason = %why,
                "dropped internal Raft message"
            );
        } else {
            tracing::debug!("remote-peer-id" = %self.id, reason = %why, "dropped internal Raft message");
        }
        undelivered(&self.net, self.id, lost);
    }

    /// The peer says that this member was removed. Only members are believed.
    pub(super) fn told_of_removal(&self, error: &dyn std::error::Error) {
        if self.dial {
            self.net.removed(self.id, error);
        }
    }

    fn reached(&mut self) {
        if !self.active {
            self.active = true;
            self.net.liveness.up(self.id);
            self.metrics.active.set(1.0);
            tracing::info!("peer-id" = %self.id, "peer became active");
        }
    }

    fn unreached(&mut self, error: &dyn std::fmt::Display) {
        if self.active {
            self.active = false;
            self.net.liveness.down(self.id);
            self.metrics.active.set(0.0);
            self.metrics.disconnected.increment(1);
            tracing::warn!(
                "peer-id" = %self.id,
                %error,
                "peer became inactive (message send to peer failed)"
            );
        }
    }
}

impl Actor for Peer {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(HEARTBEAT, |this, _| this.heartbeat());
        if self.dial {
            self.dial(ctx);
        }
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.end_sending();
        self.unreached(&"sending to it has ended");
    }
}

impl Handler<Deliver> for Peer {
    type Result = ();

    fn handle(&mut self, Deliver(messages): Deliver, ctx: &mut Self::Context) {
        let (mut appends, mut others, mut snapshots) = (Vec::new(), Vec::new(), Vec::new());
        if messages.iter().all(|message| message.r#type == MSG_APP) {
            appends = messages;
        } else {
            for message in messages {
                match message.r#type {
                    MSG_APP => appends.push(message),
                    MSG_SNAP => snapshots.push(message),
                    _ => others.push(message),
                }
            }
        }
        let mut lost = Vec::new();
        for (kind, batch) in [(StreamKind::MsgApp, appends), (StreamKind::Message, others)] {
            if !batch.is_empty() {
                lost.append(&mut self.send_kind(kind, batch, ctx));
            }
        }
        self.lost(&lost, &"sending buffer is full (overloaded network)");
        for snapshot in snapshots {
            self.send_snapshot(snapshot, ctx);
        }
    }
}

impl Handler<Attach> for Peer {
    type Result = ();

    fn handle(&mut self, Attach(outlet): Attach, _: &mut Self::Context) {
        let kind = outlet.kind;
        if self.side(kind).outlet.replace(outlet).is_some() {
            tracing::warn!(
                "stream-writer-type" = kind.label(),
                "local-member-id" = %self.net.local,
                "remote-peer-id" = %self.id,
                "closed an existing TCP streaming connection with remote peer"
            );
        }
        tracing::info!(
            "stream-writer-type" = kind.label(),
            "local-member-id" = %self.net.local,
            "remote-peer-id" = %self.id,
            "established TCP streaming connection with remote peer"
        );
    }
}

impl Handler<Urls> for Peer {
    type Result = ();

    fn handle(&mut self, Urls { urls, dial }: Urls, ctx: &mut Self::Context) {
        if self.urls.set(urls) {
            tracing::info!(
                "local-member-id" = %self.net.local,
                "remote-peer-id" = %self.id,
                "updated remote peer"
            );
        }
        if dial && !self.dial {
            self.dial = true;
            self.dial(ctx);
        }
    }
}

impl Handler<Close> for Peer {
    type Result = ();

    fn handle(&mut self, _: Close, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

impl Handler<StreamUp> for Peer {
    type Result = ();

    fn handle(&mut self, StreamUp(kind): StreamUp, _: &mut Self::Context) {
        let side = self.side(kind);
        side.up = true;
        side.complaint.clear();
        tracing::info!(
            "stream-reader-type" = kind.label(),
            "local-member-id" = %self.net.local,
            "remote-peer-id" = %self.id,
            "established TCP streaming connection with remote peer"
        );
        self.reached();
    }
}

impl Handler<StreamDown> for Peer {
    type Result = ();

    fn handle(&mut self, StreamDown { kind, error }: StreamDown, _: &mut Self::Context) {
        let (local, remote) = (self.net.local, self.id);
        let error = crate::actors::exit::full(&error);
        let side = self.side(kind);
        if std::mem::take(&mut side.up) {
            tracing::warn!(
                "stream-reader-type" = kind.label(),
                "local-member-id" = %local,
                "remote-peer-id" = %remote,
                %error,
                "lost TCP streaming connection with remote peer"
            );
        } else if side.complaint != error {
            // It is dialled ten times a second: once is enough to say what keeps failing.
            tracing::warn!(
                "stream-reader-type" = kind.label(),
                "local-member-id" = %local,
                "remote-peer-id" = %remote,
                %error,
                "failed to dial remote peer"
            );
            side.complaint.clone_from(&error);
        }
        if !self.message.up && !self.msgapp.up {
            self.unreached(&error);
        }
    }
}

impl Handler<GetStatus> for Peer {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        let attached = |side: &Side| side.outlet.as_ref().is_some_and(|outlet| !outlet.is_closed());
        MessageResult(PeerStatus {
            attached: Streams { message: attached(&self.message), msgapp: attached(&self.msgapp) },
            dialled: Streams { message: self.message.up, msgapp: self.msgapp.up },
            member: self.dial,
        })
    }
}
