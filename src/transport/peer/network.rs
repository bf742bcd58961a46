//! The peer network: knows every other member, and has one [`Peer`] for each.
//!
//! in:  `Send` from actors/raft.rs, `Members` from actors/applier.rs, `Attach` and `Learn` from server.rs
//! out: `Deliver`, `Attach`, `Urls`, `Close` to peer.rs; `Unreachable` to actors/raft.rs
//!
//! All of it runs on one thread, peers and their sockets included, so that a message that raft hands
//! over wakes one thread and no other.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use arc_swap::ArcSwap;
use http::HeaderValue;
use quorate_proto::raftpb::Message as RaftMessage;
use tokio::sync::mpsc;

use super::client::Dialer;
use super::peer::{self, Close, Deliver, Peer, PeerStatus, Urls};
use super::snapshot::Snapshots;
use super::stream::Outlet;
use crate::actors::exit::Exit;
use crate::actors::peers::{Liveness, Members, Send};
use crate::actors::raft::{SnapshotDone, Step, Unreachable};
use crate::cli::ETCD_VERSION;
use crate::config::{Url, url};
use crate::core::membership::Membership;
use crate::core::types::{ClusterId, MemberId};
use crate::metrics::Metrics;

/// The oldest release that this one works with, as it tells others.
pub const MIN_CLUSTER_VERSION: &str = "3.0.0";
/// Senders that are not members as far as is known here. They name themselves, so there is a bound.
const REMOTES_MAX: usize = 64;
const PROP: u32 = 2;
/// The pause before raft's full mailbox is tried again.
const RETRY_FULL: Duration = Duration::from_millis(1);

/// How the network behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A stream that is silent for this long is dialled again; three link heartbeats are sent in it.
    pub read_timeout: Duration,
}

/// Raft, as the network sees it.
#[derive(Clone)]
pub struct RaftLink {
    pub step: Recipient<Step>,
    pub unreachable: Recipient<Unreachable>,
    pub snapshot_done: Recipient<SnapshotDone>,
}

impl RaftLink {
    /// Steps `messages`, waiting while raft's mailbox is full.
    pub async fn step(&self, messages: Vec<RaftMessage>) {
        let mut step = Step(messages);
        while let Err(SendError::Full(back)) = self.step.try_send(step) {
            step = back;
            tokio::time::sleep(RETRY_FULL).await;
        }
        // A closed mailbox belongs to a member that is stopping.
    }

    /// As [`RaftLink::step`], but proposals do not wait here: while nobody leads they may have to for
    /// long, and votes stand behind them. They go to `proposals`, or are dropped if that is full.
    pub async fn step_from_stream(
        &self,
        messages: Vec<RaftMessage>,
        proposals: &mpsc::Sender<RaftMessage>,
    ) {
        let Err(SendError::Full(Step(messages))) = self.step.try_send(Step(messages)) else {
            return;
        };
        let (waiting, others): (Vec<_>, Vec<_>) =
            messages.into_iter().partition(|message| message.r#type == PROP);
        let forwarded = waiting.len();
        let dropped = waiting.into_iter().filter_map(|p| proposals.try_send(p).err()).count();
        if dropped > 0 {
            tracing::warn!(
                dropped,
                forwarded,
                "dropped forwarded proposals since the receiving buffer is full"
            );
        }
        if !others.is_empty() {
            self.step(others).await;
        }
    }
}

/// What everything in the network shares.
pub struct Net {
    pub cluster_id: ClusterId,
    pub local: MemberId,
    pub options: Options,
    pub dialer: Dialer,
    pub raft: RaftLink,
    pub liveness: Arc<Liveness>,
    pub exit: Exit,
    pub metrics: &'static Metrics,
    /// The members as of the last applied change.
    pub members: ArcSwap<Membership>,
    pub snapshots: Snapshots,
    headers: Vec<(&'static str, HeaderValue)>,
    head_lines: String,
}

/// What the network is connected to.
pub struct Links {
    pub cluster_id: ClusterId,
    pub local: MemberId,
    /// As the others are told.
    pub own_urls: Vec<Url>,
    pub dialer: Dialer,
    pub raft: RaftLink,
    pub liveness: Arc<Liveness>,
    pub exit: Exit,
    pub metrics: &'static Metrics,
    pub snapshots: Snapshots,
    /// The members at start.
    pub members: Arc<Membership>,
}

impl Net {
    /// What `links` and `options` say.
    pub fn new(links: Links, options: Options) -> Arc<Self> {
        let headers = [
            ("X-Server-From", links.local.to_string()),
            ("X-Server-Version", ETCD_VERSION.to_string()),
            ("X-Min-Cluster-Version", MIN_CLUSTER_VERSION.to_string()),
            ("X-Etcd-Cluster-ID", links.cluster_id.to_string()),
            ("X-PeerURLs", url::join(&links.own_urls)),
        ];
        let lines = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n"));
        let head_lines = lines.collect();
        let header = |value: &str| {
            HeaderValue::from_bytes(value.as_bytes()).expect("a URL has no control characters")
        };
        Arc::new(Net {
            cluster_id: links.cluster_id,
            local: links.local,
            options,
            dialer: links.dialer,
            raft: links.raft,
            liveness: links.liveness,
            exit: links.exit,
            metrics: links.metrics,
            members: ArcSwap::new(links.members),
            snapshots: links.snapshots,
            head_lines,
            headers: headers.map(|(name, value)| (name, header(&value))).into(),
        })
    }

    /// The headers by which a member introduces itself, as lines.
    pub fn head_lines(&self) -> &str {
        &self.head_lines
    }

    /// The same for a request.
    pub fn introduce(&self, mut request: http::request::Builder) -> http::request::Builder {
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        request
    }

    /// Stops this member: `by` says that it was removed.
    pub fn removed(&self, by: MemberId, error: &dyn std::error::Error) {
        tracing::warn!(
            "local-member-id" = %self.local,
            "remote-peer-id" = %by,
            %error,
            "this member was removed from the cluster"
        );
        self.exit.removed();
    }

    /// Whether the removal of `id` was applied here.
    pub fn is_removed(&self, id: MemberId) -> bool {
        is_removed(&self.members.load(), id)
    }
}

/// A peer's URLs, of which one is used until it fails. Shared by all that dial the peer.
#[derive(Clone)]
pub struct SharedUrls(Rc<RefCell<Picker>>);

struct Picker {
    /// Never empty.
    urls: Vec<Url>,
    picked: usize,
}

impl SharedUrls {
    /// Starts with the first of `urls`.
    ///
    /// # Panics
    /// If there are none: `parse_urls` refuses that.
    pub fn new(urls: Vec<Url>) -> Self {
        assert!(!urls.is_empty(), "a peer has a URL");
        SharedUrls(Rc::new(RefCell::new(Picker { urls, picked: 0 })))
    }

    /// The URL to use now.
    pub fn pick(&self) -> Url {
        let picker = self.0.borrow();
        picker.urls[picker.picked].clone()
    }

    /// `url` did not work: the next one has its turn, if nobody has moved on already.
    pub fn failed(&self, url: &Url) {
        let mut picker = self.0.borrow_mut();
        if picker.urls[picker.picked] == *url {
            picker.picked = (picker.picked + 1) % picker.urls.len();
        }
    }

    /// Takes over changed URLs. Answers whether they are other ones.
    pub fn set(&self, urls: Vec<Url>) -> bool {
        let mut picker = self.0.borrow_mut();
        let changed = picker.urls != urls;
        if changed {
            *picker = Picker { urls, picked: 0 };
        }
        changed
    }
}

/// The URLs of a member that can be dialled; `None`, said in the log, if there is none among them.
fn parse_urls<'a>(id: MemberId, texts: impl IntoIterator<Item = &'a str>) -> Option<Vec<Url>> {
    let mut urls = Vec::new();
    for text in texts {
        match Url::parse(text) {
            Ok(url) => urls.push(url),
            Err(error) => {
                tracing::warn!("remote-peer-id" = %id, url = text, %error, "cannot dial a peer URL");
            }
        }
    }
    (!urls.is_empty()).then_some(urls)
}

fn is_removed(members: &Membership, id: MemberId) -> bool {
    members.removed().any(|removed| removed == id)
}

/// What a request to attach a stream comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attached {
    Yes,
    /// The dialler is no member that is known here.
    Unknown,
    /// The dialler is, but takes this member for another.
    NotUs,
}

/// A peer has dialled a stream: what it is sent goes there from now on.
#[derive(Message)]
#[rtype(result = "Attached")]
pub struct Attach {
    pub from: MemberId,
    /// Whether the dialler names this member as the one that it wants.
    pub for_us: bool,
    pub outlet: Outlet,
}

/// Someone introduced itself: it can be sent messages at these URLs, even if the log has not told yet
/// that it is a member.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Learn {
    pub from: MemberId,
    pub urls: String,
}

/// What is known of a member's connections; `None` for one that is not known at all.
#[derive(Message)]
#[rtype(result = "Option<PeerStatus>")]
pub struct GetPeer(pub MemberId);

/// Owns the peers.
pub struct Network {
    net: Arc<Net>,
    initial: Vec<(MemberId, Vec<Url>)>,
    peers: HashMap<MemberId, Addr<Peer>>,
    /// Those among `peers` that are no known members: they are sent to, but not dialled for streams.
    remotes: HashSet<MemberId>,
}

impl Network {
    /// `initial`: members that joining has told of, before the log does.
    pub fn new(net: Arc<Net>, initial: Vec<(MemberId, Vec<Url>)>) -> Self {
        Network { net, initial, peers: HashMap::new(), remotes: HashSet::new() }
    }

    fn add(&mut self, id: MemberId, urls: Vec<Url>) {
        if id == self.net.local || id.0 == 0 {
            return;
        }
        match self.peers.get(&id) {
            Some(peer) => peer.do_send(Urls { urls, dial: true }),
            None => {
                tracing::info!(
                    "local-member-id" = %self.net.local,
                    "remote-peer-id" = %id,
                    "remote-peer-urls" = url::join(&urls),
                    "added remote peer"
                );
                let peer = Peer::new(self.net.clone(), id, urls, true).start();
                self.peers.insert(id, peer);
            }
        }
        self.remotes.remove(&id);
        let labels = [&*self.net.local.to_string(), &*id.to_string()];
        self.net.metrics.known_peers.with(&labels).set(1.0);
    }

    fn remove(&mut self, id: MemberId) {
        let Some(peer) = self.peers.remove(&id) else { return };
        peer.do_send(Close);
        self.remotes.remove(&id);
        let labels = [&*self.net.local.to_string(), &*id.to_string()];
        self.net.metrics.known_peers.with(&labels).set(0.0);
        tracing::info!(
            "local-member-id" = %self.net.local,
            "removed-remote-peer-id" = %id,
            "removed remote peer"
        );
    }

    fn take_over(&mut self, members: &Membership) {
        for member in members.members() {
            let id = MemberId(member.id);
            if id == self.net.local {
                continue;
            }
            if let Some(urls) = parse_urls(id, member.peer_urls.iter().map(String::as_str)) {
                self.add(id, urls);
            }
        }
        let gone: Vec<MemberId> =
            self.peers.keys().filter(|id| is_removed(members, **id)).copied().collect();
        for id in gone {
            self.remove(id);
        }
    }
}

impl Actor for Network {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        let local = self.net.local.to_string();
        self.net.metrics.known_peers.with(&[&local, &local]).set(1.0);
        for (id, urls) in std::mem::take(&mut self.initial) {
            self.add(id, urls);
        }
        let members = self.net.members.load_full();
        self.take_over(&members);
    }
}

impl Handler<Send> for Network {
    type Result = ();

    fn handle(&mut self, Send(messages): Send, _: &mut Self::Context) {
        // Few receivers: looking them up in a row is quicker than hashing.
        let mut batches: Vec<(MemberId, Vec<RaftMessage>)> = Vec::with_capacity(self.peers.len());
        for message in messages {
            let to = MemberId(message.to);
            if to.0 == 0 {
                continue;
            }
            match batches.iter_mut().find(|(id, _)| *id == to) {
                Some((_, batch)) => batch.push(message),
                None => batches.push((to, vec![message])),
            }
        }
        for (to, batch) in batches {
            match self.peers.get(&to) {
                Some(peer) => peer.do_send(Deliver(batch)),
                None => {
                    tracing::debug!(
                        "remote-peer-id" = %to,
                        "ignored message send request; unknown remote peer target"
                    );
                    peer::undelivered(&self.net, to, &batch);
                }
            }
        }
    }
}

impl Handler<Members> for Network {
    type Result = ();

    fn handle(&mut self, Members(members): Members, _: &mut Self::Context) {
        self.take_over(&members);
        self.net.members.store(members);
    }
}

impl Handler<Attach> for Network {
    type Result = MessageResult<Attach>;

    fn handle(&mut self, attach: Attach, _: &mut Self::Context) -> Self::Result {
        let Attach { from, for_us, outlet } = attach;
        let peer = self.peers.get(&from).filter(|_| !self.remotes.contains(&from));
        // In the order of etcd's checks: who asks comes before whom it means.
        MessageResult(match peer {
            None => Attached::Unknown,
            Some(_) if !for_us => Attached::NotUs,
            Some(peer) => {
                peer.do_send(peer::Attach(outlet));
                Attached::Yes
            }
        })
    }
}

impl Handler<GetPeer> for Network {
    type Result = ResponseFuture<Option<PeerStatus>>;

    fn handle(&mut self, GetPeer(id): GetPeer, _: &mut Self::Context) -> Self::Result {
        let asked = self.peers.get(&id).map(|peer| peer.send(peer::GetStatus));
        Box::pin(async move { asked?.await.ok() })
    }
}

impl Handler<Learn> for Network {
    type Result = ();

    fn handle(&mut self, Learn { from, urls }: Learn, _: &mut Self::Context) {
        if from == self.net.local
            || from.0 == 0
            || self.peers.contains_key(&from)
            || self.net.is_removed(from)
            || self.remotes.len() >= REMOTES_MAX
        {
            return;
        }
        let Some(urls) = parse_urls(from, urls.split(',')) else { return };
        tracing::info!(
            "local-member-id" = %self.net.local,
            "remote-peer-id" = %from,
            "remote-peer-urls" = url::join(&urls),
            "added remote peer that is no known member"
        );
        let peer = Peer::new(self.net.clone(), from, urls, false).start();
        self.peers.insert(from, peer);
        self.remotes.insert(from);
    }
}
