//! The peer network: two of them on the loopback, one beside a real etcd, and what one answers to
//! requests that are not in order.

use std::io::{Seek, Write};
use std::net::SocketAddr;
use std::ops::{self, ControlFlow};
use std::pin::Pin;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use futures_util::StreamExt;
use quorate::actors::disk::OsDisk;
use quorate::actors::exit::{Exit, Reason};
use quorate::actors::export::{ExportError, Exported};
use quorate::actors::peers::{Liveness, Members, Send};
use quorate::actors::raft::{SnapshotDone, Step, Unreachable};
use quorate::actors::spawn::{Seat, arbiter};
use quorate::config::Url;
use quorate::core::bbolt::Reader;
use quorate::core::command::{Command, Request};
use quorate::core::membership::{Member as Record, Membership};
use quorate::core::raft::{MSG_APP, MSG_HEARTBEAT, MSG_SNAP};
use quorate::core::types::{ClusterId, MemberId};
use quorate::metrics::Metrics;
use quorate::storage::snap_dir::SnapDir;
use quorate::transport::listener::{self, Bound, Served, Workers};
use quorate::transport::peer::client::Dialer;
use quorate::transport::peer::network::{GetPeer, Links, Net, Network, Options, RaftLink};
use quorate::transport::peer::server::{self, Door};
use quorate::transport::peer::snapshot::{Export, Snapshots};
use quorate::transport::socket::Security;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::raftpb::{ConfState, Entry, Message as RaftMessage, Snapshot, SnapshotMetadata};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tonic::transport::{Channel, Endpoint};

/// Within this long whatever a test waits for must have happened.
const PATIENCE: Duration = Duration::from_secs(20);
const CLUSTER: ClusterId = ClusterId(0xc1);
const OPTIONS: Options = Options { read_timeout: Duration::from_secs(5) };

/// What raft is told.
#[derive(Clone, PartialEq, Debug)]
enum Told {
    Step(Vec<RaftMessage>),
    Unreachable(MemberId),
    Snapshot(SnapshotDone),
}

/// Stands for the raft actor and passes on what it is told.
struct Raft(mpsc::UnboundedSender<Told>);

impl Actor for Raft {
    type Context = Context<Self>;
}

impl Handler<Step> for Raft {
    type Result = ();

    fn handle(&mut self, Step(messages): Step, _: &mut Self::Context) {
        self.0.send(Told::Step(messages)).ok();
    }
}

impl Handler<Unreachable> for Raft {
    type Result = ();

    fn handle(&mut self, Unreachable(id): Unreachable, _: &mut Self::Context) {
        self.0.send(Told::Unreachable(id)).ok();
    }
}

impl Handler<SnapshotDone> for Raft {
    type Result = ();

    fn handle(&mut self, done: SnapshotDone, _: &mut Self::Context) {
        self.0.send(Told::Snapshot(done)).ok();
    }
}

/// Makes snapshots with this as the database.
struct Canned(Vec<u8>);

/// What the snapshots of [`Canned`] say besides.
fn canned() -> Snapshot {
    let conf_state = ConfState { voters: vec![1, 2], ..ConfState::default() };
    let metadata = SnapshotMetadata { conf_state: Some(conf_state), index: 500, term: 1 };
    Snapshot { data: "{}".into(), metadata: Some(metadata) }
}

impl Export for Canned {
    fn export(
        &self,
    ) -> Pin<Box<dyn Future<Output = Result<Exported, ExportError>> + std::marker::Send>> {
        let mut db = tempfile::tempfile().unwrap();
        db.write_all(&self.0).unwrap();
        db.rewind().unwrap();
        let size = self.0.len() as u64;
        Box::pin(async move {
            match size {
                0 => Err(ExportError::Empty),
                _ => Ok(Exported { snapshot: canned(), db, size }),
            }
        })
    }
}

/// A member that is nothing but its network.
struct Node {
    id: MemberId,
    url: String,
    network: Addr<Network>,
    liveness: Arc<Liveness>,
    told: mpsc::UnboundedReceiver<Told>,
    exits: mpsc::UnboundedReceiver<Reason>,
    metrics: &'static Metrics,
    dir: TempDir,
    _stop: watch::Sender<bool>,
    arbiter: Arbiter,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.arbiter.stop();
    }
}

fn listening() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

/// An address that nobody listens on.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn membership(
    cluster: ClusterId,
    local: u64,
    others: &[(u64, &str)],
    removed: &[u64],
) -> Membership {
    let mut members = Membership::new(cluster, MemberId(local), 1);
    let record = |(id, url): &(u64, &str)| Record {
        id: *id,
        peer_urls: vec![url.to_string()],
        ..Record::default()
    };
    members.restore(others.iter().map(record), removed.iter().copied().map(MemberId));
    members
}

impl Node {
    fn start(listener: std::net::TcpListener, members: Membership) -> Node {
        Node::with(listener, members, OPTIONS, Vec::new())
    }

    fn with(
        listener: std::net::TcpListener,
        members: Membership,
        options: Options,
        database: Vec<u8>,
    ) -> Node {
        let id = members.local;
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (tell, told) = mpsc::unbounded_channel();
        let raft = Raft(tell).start();
        let (exit, exits) = Exit::new();
        let liveness = Arc::<Liveness>::default();
        let dir = TempDir::new().unwrap();
        let metrics: &'static Metrics = Box::leak(Box::new(Metrics::new()));
        let links = Links {
            cluster_id: members.cluster_id,
            local: id,
            own_urls: vec![Url::parse(&url).unwrap()],
            dialer: Dialer::clear(Duration::from_secs(2)),
            raft: RaftLink {
                step: raft.clone().recipient(),
                unreachable: raft.clone().recipient(),
                snapshot_done: raft.recipient(),
            },
            liveness: liveness.clone(),
            exit,
            metrics,
            snapshots: Snapshots::new(
                Box::new(Canned(database)),
                SnapDir::open(Arc::new(OsDisk), dir.path()).unwrap(),
            ),
            members: Arc::new(members),
        };
        let net = Net::new(links, options);
        let seat = Seat::<Network>::new(64);
        let network = seat.addr();
        let arbiter = arbiter("peers");
        let door = Arc::new(Door { net: net.clone(), network: network.clone() });
        seat.start_in(&arbiter.handle(), move || Network::new(net, Vec::new()));
        let served = Served { grpc: None, http: Some(server::router(door)) };
        let workers = Workers::new(vec![arbiter.handle()], 100);
        let options = listener::Options {
            max_concurrent_streams: 100,
            keepalive_min_time: Duration::ZERO,
            keepalive_interval: Duration::ZERO,
            keepalive_timeout: Duration::ZERO,
            receive_max: 1 << 20,
            reuse_port: false,
            reuse_address: false,
            write_timeout: Some(options.read_timeout),
            connection_age: None,
            connection_age_grace: None,
        };
        let stop = watch::Sender::new(false);
        let accepting = listener::accept(
            Bound::Tcp(listener),
            served,
            Security::Clear,
            workers,
            options,
            stop.subscribe(),
        );
        actix::spawn(async move { accepting.await.unwrap() });
        Node { id, url, network, liveness, told, exits, metrics, dir, _stop: stop, arbiter }
    }

    fn send(&self, messages: Vec<RaftMessage>) {
        self.network.do_send(Send(messages));
    }

    async fn told(&mut self) -> Told {
        let told = tokio::time::timeout(PATIENCE, self.told.recv()).await;
        told.expect("raft is told in time").expect("the network lives")
    }

    /// The messages that arrive, until there are `count`.
    async fn messages(&mut self, count: usize) -> Vec<RaftMessage> {
        let mut all = Vec::new();
        while all.len() < count {
            match self.told().await {
                Told::Step(messages) => all.extend(messages),
                other => panic!("{other:?}"),
            }
        }
        all
    }

    /// Waits until `id` has dialled both of its streams here, and this node both of the other's.
    async fn joined(&self, id: u64) {
        until("all streams stand", async || {
            let status = self.network.send(GetPeer(MemberId(id))).await.unwrap();
            status.is_some_and(|status| {
                let (here, there) = (status.attached, status.dialled);
                here.message && here.msgapp && there.message && there.msgapp
            })
        })
        .await;
    }

    /// The names of the files of received snapshots, whole or not.
    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn metric(&self, line: &str) -> f64 {
        let page = self.metrics.render();
        let found = page.lines().find_map(|each| each.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("no {line} in {page}"))
    }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn run(test: impl Future<Output = ()>) {
    actix::System::new().block_on(test);
}

/// The `n`-th of a leader's appends, each with one entry.
fn append(from: u64, to: u64, n: u64) -> RaftMessage {
    let entry = Entry { r#type: 0, term: 1, index: n + 1, data: format!("entry {n}").into() };
    RaftMessage {
        r#type: MSG_APP,
        from,
        to,
        term: 1,
        log_term: u64::from(n > 0),
        index: n,
        entries: vec![entry],
        commit: n,
        ..RaftMessage::default()
    }
}

fn heartbeat(from: u64, to: u64, commit: u64) -> RaftMessage {
    RaftMessage { r#type: MSG_HEARTBEAT, from, to, term: 1, commit, ..RaftMessage::default() }
}

fn of_type(messages: &[RaftMessage], kind: u32) -> Vec<RaftMessage> {
    messages.iter().filter(|message| message.r#type == kind).cloned().collect()
}

/// Two nodes, 1 and 2, that know each other.
fn pair() -> (Node, Node) {
    let ((a, url_a), (b, url_b)) = (listening(), listening());
    let members = |local| membership(CLUSTER, local, &[(1, &url_a), (2, &url_b)], &[]);
    (Node::start(a, members(1)), Node::start(b, members(2)))
}

#[test]
fn thousands_of_messages_arrive_in_order() {
    run(async {
        let (mut a, mut b) = pair();
        a.joined(2).await;
        b.joined(1).await;
        let (mut sent_a, mut sent_b) = (Vec::new(), Vec::new());
        for n in 0..3000 {
            // In the order of sending on each stream; between the two there is none.
            sent_a.extend([append(1, 2, n), heartbeat(1, 2, n)]);
            sent_b.push(heartbeat(2, 1, n));
            if n % 7 == 0 {
                a.send(std::mem::take(&mut sent_a));
                b.send(std::mem::take(&mut sent_b));
            }
        }
        a.send(sent_a);
        b.send(sent_b);
        let at_b = b.messages(6000).await;
        assert_eq!(of_type(&at_b, MSG_APP), (0..3000).map(|n| append(1, 2, n)).collect::<Vec<_>>());
        let beats: Vec<_> = (0..3000).map(|n| heartbeat(1, 2, n)).collect();
        assert_eq!(of_type(&at_b, MSG_HEARTBEAT), beats);
        let at_a = a.messages(3000).await;
        assert_eq!(at_a, (0..3000).map(|n| heartbeat(2, 1, n)).collect::<Vec<_>>());
        assert!(a.liveness.since(b.id).is_some());
        assert_eq!(a.metric("etcd_network_active_peers{Local=\"1\",Remote=\"2\"}"), 1.0);
        assert_eq!(a.metric("etcd_network_peer_sent_failures_total{To=\"2\"}"), 0.0);
        assert!(a.metric("etcd_network_peer_sent_bytes_total{To=\"2\"}") > 100_000.0);
    });
}

/// Sends `head` and what follows it, and answers status, head and body as far as it has a length.
async fn ask(url: &str, request: &str, body: &[u8]) -> (u16, String, String) {
    let address: SocketAddr = url.strip_prefix("http://").unwrap().parse().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    let read = async {
        while stream.read_buf(&mut answer).await.unwrap() > 0 {
            let text = String::from_utf8_lossy(&answer).to_ascii_lowercase();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            match length.map(|length| length.parse::<usize>().unwrap()) {
                Some(length) if body.len() < length => {}
                _ => break,
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("an answer in time");
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_string())
}

/// The headers of member `from`, with some of them replaced or, if empty, left out.
fn headers(from: u64, changed: &[(&str, &str)]) -> String {
    let from = format!("{from:x}");
    let cluster = CLUSTER.to_string();
    let usual = [
        ("Host", "peer"),
        ("X-Server-From", &*from),
        ("X-Server-Version", "3.4.23"),
        ("X-Min-Cluster-Version", "3.0.0"),
        ("X-Etcd-Cluster-ID", &*cluster),
        ("X-Raft-To", "1"),
    ];
    let lines = usual.iter().map(|(name, value)| {
        let change = changed.iter().find(|(other, _)| other == name);
        (*name, change.map_or(*value, |(_, value)| *value))
    });
    let added = changed.iter().filter(|(name, _)| usual.iter().all(|(other, _)| other != name));
    lines
        .chain(added.copied())
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect()
}

#[test]
fn requests_that_are_not_in_order_get_etcds_answers() {
    run(async {
        let (listener, url) = listening();
        let away = nobody();
        let members = membership(CLUSTER, 1, &[(1, &url), (2, &away)], &[9]);
        let mut node = Node::start(listener, members);
        let get = async |path: &str, changed: &[(&str, &str)]| {
            let request = format!("GET {path} HTTP/1.1\r\n{}\r\n", headers(2, changed));
            let (status, head, body) = ask(&node.url, &request, b"").await;
            assert!(head.contains("x-etcd-cluster-id: c1"), "{head}");
            assert!(head.contains("x-server-version: 3.7."), "{head}");
            (status, body)
        };
        let own = "/raft/stream/message/2";
        let refused = |text: &str| (412, format!("{text}\n"));
        for kind in ["message", "msgapp"] {
            let path = format!("/raft/stream/{kind}/2");
            assert_eq!(get(&path, &[]).await.0, 200, "{kind}");
            assert_eq!(get(&path, &[("X-Raft-To", "3")]).await, refused("to field mismatch"));
        }
        assert_eq!(get(own, &[("X-Raft-To", "")]).await, refused("to field mismatch"));
        for changed in [
            ("X-Server-Version", ""),
            ("X-Server-Version", "2.3.8"),
            ("X-Server-Version", "new"),
            ("X-Min-Cluster-Version", "3.8.0"),
            ("X-Min-Cluster-Version", "4.0.0"),
        ] {
            let answer = get(own, &[changed]).await;
            assert_eq!(answer, refused("incompatible version"), "{changed:?}");
        }
        // A minimum that is missing is as old as a version that is missing, and that is low enough.
        assert_eq!(get(own, &[("X-Min-Cluster-Version", "")]).await.0, 200);
        for other in ["", "c2", "C1"] {
            let answer = get(own, &[("X-Etcd-Cluster-ID", other)]).await;
            assert_eq!(answer, refused("cluster ID mismatch"), "{other}");
        }
        let not_found = |text: &str| (404, format!("{text}\n"));
        assert_eq!(get("/raft/stream/other/2", &[]).await, not_found("invalid path"));
        assert_eq!(get("/raft/stream/message/x", &[]).await, not_found("invalid from"));
        assert_eq!(get("/raft/stream/message/+2", &[]).await, not_found("invalid from"));
        let unknown = not_found("error sender not found");
        assert_eq!(get("/raft/stream/message/3", &[]).await, unknown);
        // Nobody is told that he was removed unless the log has it.
        assert_eq!(get("/raft/stream/message/9", &[]).await, (410, "removed member\n".into()));

        let post = async |message: &RaftMessage, changed: &[(&str, &str)]| {
            let body = prost::Message::encode_to_vec(message);
            let request = format!(
                "POST /raft HTTP/1.1\r\n{}Content-Length: {}\r\n\r\n",
                headers(message.from, changed),
                body.len()
            );
            let (status, _, text) = ask(&node.url, &request, &body).await;
            (status, text)
        };
        let fine = heartbeat(2, 1, 7);
        assert_eq!(post(&fine, &[]).await, (204, String::new()));
        let wrong = post(&heartbeat(2, 5, 7), &[]).await;
        assert_eq!(wrong, refused("to field mismatch"));
        let removed = "{\"message\":\"cannot process message from removed member\"}";
        assert_eq!(post(&heartbeat(9, 1, 7), &[]).await, (403, removed.into()));
        let answer = post(&fine, &[("X-Etcd-Cluster-ID", "5")]).await;
        assert_eq!(answer, refused("cluster ID mismatch"));
        let answer = post(&fine, &[("X-Server-Version", "")]).await;
        assert_eq!(answer, refused("incompatible version"));
        let local = RaftMessage { r#type: 19, ..fine.clone() };
        let bad = (400, "error unmarshalling raft message\n".to_string());
        assert_eq!(post(&local, &[]).await, bad);
        let request = |method: &str, body: &str| {
            let length = body.len();
            let head = headers(2, &[]);
            format!("{method} /raft HTTP/1.1\r\n{head}Content-Length: {length}\r\n\r\n{body}")
        };
        let (status, _, text) = ask(&node.url, &request("POST", "no message"), b"").await;
        assert_eq!((status, text), bad);
        let (status, head, _) = ask(&node.url, &request("PUT", ""), b"").await;
        assert_eq!(status, 405);
        assert!(head.contains("allow: post"), "{head}");
        // Only what was in order has come through.
        assert_eq!(node.messages(1).await, [fine]);
        assert!(node.told.try_recv().is_err());
    });
}

#[test]
fn who_introduces_itself_is_answered_before_the_log_tells_of_it() {
    run(async {
        let ((a, url_a), (b, url_b)) = (listening(), listening());
        // 2 has read in the cluster's list that it is a member; 1 has not applied that yet.
        let mut a = Node::start(a, membership(CLUSTER, 1, &[(1, &url_a)], &[]));
        let both = [(1, &*url_a), (2, &*url_b)];
        let mut b = Node::start(b, membership(CLUSTER, 2, &both, &[]));
        b.send(vec![heartbeat(2, 1, 1)]);
        assert_eq!(a.messages(1).await, [heartbeat(2, 1, 1)]);
        a.send(vec![append(1, 2, 5)]);
        assert_eq!(b.messages(1).await, [append(1, 2, 5)]);
        let status = a.network.send(GetPeer(b.id)).await.unwrap().unwrap();
        assert!(!status.member && !status.attached.message);
        let members = membership(CLUSTER, 1, &both, &[]);
        a.network.do_send(Members(Arc::new(members)));
        a.joined(2).await;
        a.send(vec![append(1, 2, 6)]);
        assert_eq!(b.messages(1).await, [append(1, 2, 6)]);
    });
}

#[test]
fn what_cannot_be_delivered_is_reported() {
    run(async {
        let (listener, url) = listening();
        let away = nobody();
        let members = membership(CLUSTER, 1, &[(1, &url), (2, &away)], &[]);
        let mut node = Node::start(listener, members);
        node.send((0..100).map(|n| append(1, 2, n)).collect());
        // Once for those that found no room, once for each that was posted in vain.
        for _ in 0..65 {
            assert_eq!(node.told().await, Told::Unreachable(MemberId(2)));
        }
        assert_eq!(node.metric("etcd_network_peer_sent_failures_total{To=\"2\"}"), 100.0);
        assert!(node.told.try_recv().is_err());
        // Nobody at all, or ourselves: nothing to report to raft but that.
        node.send(vec![heartbeat(1, 0, 0), heartbeat(1, 77, 0)]);
        assert_eq!(node.told().await, Told::Unreachable(MemberId(77)));
    });
}

#[test]
fn a_stream_that_nobody_reads_fills_up_and_is_replaced() {
    run(async {
        let (listener, url) = listening();
        let away = nobody();
        let members = membership(CLUSTER, 1, &[(1, &url), (2, &away)], &[]);
        let mut node = Node::start(listener, members);
        let address: SocketAddr = url.strip_prefix("http://").unwrap().parse().unwrap();
        let dial = async || {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = format!("GET /raft/stream/message/2 HTTP/1.1\r\n{}\r\n", headers(2, &[]));
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200");
            stream
        };
        let mut first = dial().await;
        let large = |n| {
            let mut message = append(1, 2, n);
            message.entries[0].data = vec![b'x'; 16 << 10].into();
            message
        };
        // More than the sockets hold beside the queue.
        for part in 0..10 {
            node.send((part * 1000..(part + 1) * 1000).map(large).collect());
        }
        assert_eq!(node.told().await, Told::Unreachable(MemberId(2)));
        // The new one takes its place at once, and the old one ends.
        let mut second = dial().await;
        node.send(vec![heartbeat(1, 2, 1)]);
        let mut body = vec![0; 1 << 12];
        let read = second.read(&mut body).await.unwrap();
        assert!(read > 0);
        let drained = async {
            let mut body = Vec::new();
            while !body.ends_with(b"\r\n0\r\n\r\n") {
                body.drain(..body.len().saturating_sub(7));
                assert!(first.read_buf(&mut body).await.unwrap() > 0);
            }
        };
        tokio::time::timeout(PATIENCE, drained).await.expect("the replaced stream ends");
    });
}

/// Passes bytes on to `to` until it is cut.
struct Proxy {
    url: String,
    cut: watch::Sender<u32>,
}

impl Proxy {
    async fn start(to: &str) -> Proxy {
        let to: SocketAddr = to.strip_prefix("http://").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let cut = watch::Sender::new(0);
        let cuts = cut.clone();
        actix::spawn(async move {
            while let Ok((mut inner, _)) = listener.accept().await {
                let mut cut = cuts.subscribe();
                actix::spawn(async move {
                    let Ok(mut outer) = TcpStream::connect(to).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut inner, &mut outer) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Proxy { url, cut }
    }
}

#[test]
fn streams_that_are_cut_are_dialled_again() {
    run(async {
        let ((a, url_a), (b, url_b)) = (listening(), listening());
        let proxy = Proxy::start(&url_a).await;
        // 2 reaches 1 through the proxy only.
        let mut a = Node::start(a, membership(CLUSTER, 1, &[(1, &url_a), (2, &url_b)], &[]));
        let mut b = Node::start(b, membership(CLUSTER, 2, &[(1, &proxy.url), (2, &url_b)], &[]));
        for round in 1..=3 {
            a.joined(2).await;
            b.joined(1).await;
            let since = b.liveness.since(a.id).unwrap();
            a.send((0..10).map(|n| append(1, 2, n)).collect());
            assert_eq!(b.messages(10).await, (0..10).map(|n| append(1, 2, n)).collect::<Vec<_>>());
            proxy.cut.send_replace(round);
            until("the cut is noticed", async || b.liveness.since(a.id) != Some(since)).await;
        }
        a.joined(2).await;
        let lost = "etcd_network_disconnected_peers_total{Local=\"2\",Remote=\"1\"}";
        until("the last cut is counted", async || b.metric(lost) >= 3.0).await;
        assert!(a.told.try_recv().is_err());
    });
}

#[test]
fn a_member_that_was_removed_is_told_and_stops() {
    run(async {
        let ((a, url_a), (b, url_b)) = (listening(), listening());
        let both = [(1, &*url_a), (2, &*url_b)];
        let mut a = Node::start(a, membership(CLUSTER, 1, &both, &[]));
        let mut b = Node::start(b, membership(CLUSTER, 2, &both, &[]));
        a.joined(2).await;
        // What was sent before the removal still arrives.
        a.send(vec![append(1, 2, 3)]);
        a.network.do_send(Members(Arc::new(membership(CLUSTER, 1, &both[..1], &[2]))));
        assert_eq!(b.messages(1).await, [append(1, 2, 3)]);
        let reason = tokio::time::timeout(PATIENCE, b.exits.recv()).await.unwrap();
        assert_eq!(reason, Some(Reason::Removed));
        assert_eq!(a.metric("etcd_network_known_peers{Local=\"1\",Remote=\"2\"}"), 0.0);
        assert!(a.network.send(GetPeer(b.id)).await.unwrap().is_none());
        // The same by POST.
        let mut late = Node::start(listening().0, membership(CLUSTER, 2, &both[..1], &[]));
        let reason = tokio::time::timeout(PATIENCE, late.exits.recv()).await.unwrap();
        assert_eq!(reason, Some(Reason::Removed));
        assert!(a.exits.try_recv().is_err());
    });
}

fn snapshot_message(from: u64, to: u64) -> RaftMessage {
    RaftMessage { r#type: MSG_SNAP, from, to, term: 1, ..RaftMessage::default() }
}

#[test]
fn a_snapshot_arrives_with_its_database() {
    run(async {
        let ((a, url_a), (b, url_b)) = (listening(), listening());
        let both = [(1, &*url_a), (2, &*url_b)];
        let database: Vec<u8> =
            (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let members = membership(CLUSTER, 1, &both, &[]);
        let mut a = Node::with(a, members, OPTIONS, database.clone());
        let mut b = Node::start(b, membership(CLUSTER, 2, &both, &[]));
        a.send(vec![snapshot_message(1, 2), heartbeat(1, 2, 3)]);
        let mut arrived = b.messages(2).await;
        // When raft is told of it, the database is there.
        assert_eq!(b.files(), ["00000000000001f4.snap.db"]);
        arrived.sort_by_key(|message| message.r#type);
        // Raft's idea of the snapshot gave way to what the database is.
        let expected = RaftMessage { snapshot: Some(canned()), ..snapshot_message(1, 2) };
        assert_eq!(arrived, [expected, heartbeat(1, 2, 3)]);
        let path = b.dir.path().join("00000000000001f4.snap.db");
        assert!(std::fs::read(path).unwrap() == database);
        assert_eq!(a.told().await, Told::Snapshot(SnapshotDone { to: b.id, ok: true }));
        assert_eq!(a.metric("etcd_network_snapshot_send_success{To=\"2\"}"), 1.0);
        assert_eq!(a.metric("etcd_network_snapshot_send_inflights_total{To=\"2\"}"), 0.0);
        assert_eq!(b.metric("etcd_network_snapshot_receive_success{From=\"1\"}"), 1.0);
        assert_eq!(b.metric("etcd_network_snapshot_receive_inflights_total{From=\"1\"}"), 0.0);
    });
}

#[test]
fn a_snapshot_that_does_not_arrive_is_reported() {
    run(async {
        let ((a, url_a), (b, url_b)) = (listening(), listening());
        let both = [(1, &*url_a), (2, &*url_b)];
        let failed = Told::Snapshot(SnapshotDone { to: MemberId(2), ok: false });
        // The other side belongs to another cluster.
        let members = membership(CLUSTER, 1, &both, &[]);
        let mut sender = Node::with(a, members, OPTIONS, vec![7; 1000]);
        let stranger = Node::start(b, membership(ClusterId(5), 2, &both, &[]));
        sender.send(vec![snapshot_message(1, 2)]);
        assert_eq!(sender.told().await, failed);
        assert_eq!(sender.told().await, Told::Unreachable(MemberId(2)));
        assert_eq!(sender.metric("etcd_network_snapshot_send_failures{To=\"2\"}"), 1.0);
        assert!(stranger.files().is_empty());
        // There is nothing to send.
        let mut empty = Node::start(listening().0, membership(CLUSTER, 1, &both, &[]));
        empty.send(vec![snapshot_message(1, 2)]);
        assert_eq!(empty.told().await, failed);
        assert_eq!(empty.told().await, Told::Unreachable(MemberId(2)));
    });
}

#[test]
fn snapshots_that_are_not_in_order_are_refused_and_leave_nothing() {
    run(async {
        let (listener, url) = listening();
        let members = membership(CLUSTER, 1, &[(1, &url), (2, &nobody())], &[9]);
        let options = Options { read_timeout: Duration::from_millis(300) };
        let mut node = Node::with(listener, members, options, Vec::new());
        let envelope = |message: &RaftMessage| {
            let bytes = prost::Message::encode_to_vec(message);
            [&(bytes.len() as u64).to_be_bytes()[..], &bytes].concat()
        };
        // Announces more than it sends if `lacking`.
        let post = async |body: &[u8], lacking: usize| {
            let request = format!(
                "POST /raft/snapshot HTTP/1.1\r\n{}Content-Length: {}\r\n\r\n",
                headers(2, &[]),
                body.len() + lacking
            );
            let (status, _, text) = ask(&node.url, &request, body).await;
            (status, text)
        };
        let whole = RaftMessage { snapshot: Some(canned()), ..snapshot_message(2, 1) };
        let (status, text) = post(&u64::MAX.to_be_bytes(), 0).await;
        assert_eq!(status, 400);
        assert!(text.starts_with("failed to decode raft message (the message is 1844"), "{text}");
        let (status, text) = post(&envelope(&whole)[..20], 0).await;
        assert_eq!(status, 400);
        assert!(text.starts_with("failed to decode raft message (it was cut short"), "{text}");
        let refused = (400, "wrong raft message type\n".to_string());
        assert_eq!(post(&envelope(&heartbeat(2, 1, 0)), 0).await, refused);
        let elsewhere = RaftMessage { to: 5, ..whole.clone() };
        let refused = (412, "to field mismatch\n".to_string());
        assert_eq!(post(&envelope(&elsewhere), 0).await, refused);
        let from_removed = RaftMessage { from: 9, ..whole.clone() };
        assert_eq!(post(&envelope(&from_removed), 0).await.0, 403);
        let (status, text) = post(&envelope(&snapshot_message(2, 1)), 0).await;
        assert_eq!(status, 500);
        assert!(text.starts_with("failed to process raft message ("), "{text}");
        // A sender that falls silent in the middle.
        let (status, text) = post(&[&envelope(&whole)[..], b"half"].concat(), 100).await;
        assert_eq!(status, 500);
        assert!(text.starts_with("failed to save KV snapshot (nothing arrived for"), "{text}");
        until("the half of a file is gone", async || node.files().is_empty()).await;
        assert!(node.told.try_recv().is_err());
        assert_eq!(node.metric("etcd_network_snapshot_receive_inflights_total{From=\"2\"}"), 0.0);
        // After all that, one that is in order.
        let answer = post(&[&envelope(&whole)[..], b"database"].concat(), 0).await;
        assert_eq!(answer, (204, String::new()));
        assert_eq!(node.messages(1).await, [whole]);
        let path = node.dir.path().join("00000000000001f4.snap.db");
        assert_eq!(std::fs::read(path).unwrap(), b"database");
    });
}

/// A cluster of one real etcd. It ends with this value.
struct Etcd {
    child: Child,
    _dir: TempDir,
    client_url: String,
    peer_url: String,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Etcd {
    async fn start() -> Etcd {
        for _ in 0..3 {
            if let Some(etcd) = Etcd::try_start().await {
                return etcd;
            }
        }
        panic!("etcd did not start");
    }

    /// `None` if somebody took one of its ports meanwhile.
    async fn try_start() -> Option<Etcd> {
        let dir = TempDir::new().unwrap();
        let (client_url, peer_url) = (nobody(), nobody());
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let cluster = format!("real={peer_url}");
        let mut command = Process::new("etcd");
        command.arg("--data-dir").arg(dir.path().join("data")).args([
            "--name",
            "real",
            "--listen-client-urls",
            &client_url,
            "--advertise-client-urls",
            &client_url,
            "--listen-peer-urls",
            &peer_url,
            "--initial-advertise-peer-urls",
            &peer_url,
            "--initial-cluster",
            &cluster,
            "--snapshot-count",
            "100",
            "--logger",
            "zap",
        ]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("etcd is installed");
        let mut etcd = Etcd { child, _dir: dir, client_url, peer_url };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let range = pb::RangeRequest { key: "k".into(), ..Default::default() };
            if etcd.kv().range(range).await.is_ok() {
                return Some(etcd);
            }
            if etcd.child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(Instant::now() < deadline, "etcd does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(self.client_url.clone()).unwrap().timeout(PATIENCE).connect_lazy()
    }

    fn kv(&self) -> pb::kv_client::KvClient<Channel> {
        pb::kv_client::KvClient::new(self.channel())
    }

    fn cluster(&self) -> pb::cluster_client::ClusterClient<Channel> {
        pb::cluster_client::ClusterClient::new(self.channel())
    }

    /// Puts keys `0..count`, many at once.
    async fn fill(&self, count: usize) {
        let kv = self.kv();
        let puts = futures_util::stream::iter(0..count).map(|n| {
            let mut kv = kv.clone();
            async move { kv.put(put(n)).await.unwrap() }
        });
        puts.buffer_unordered(256).for_each(|_| std::future::ready(())).await;
    }

    /// Puts the `n`-th key.
    async fn fill_one(&self, n: usize) {
        self.kv().put(put(n)).await.unwrap();
    }

    /// A node that was added to this cluster as a learner.
    async fn joined(&self) -> (Node, MemberId) {
        let (listener, url) = listening();
        let add = pb::MemberAddRequest { peer_ur_ls: vec![url.clone()], is_learner: true };
        let added = self.cluster().member_add(add).await.unwrap().into_inner();
        let header = added.header.unwrap();
        let (etcd, ours) = (header.member_id, added.member.unwrap().id);
        let both = [(etcd, &*self.peer_url), (ours, &*url)];
        let members = membership(ClusterId(header.cluster_id), ours, &both, &[]);
        (Node::start(listener, members), MemberId(etcd))
    }
}

/// The `n`-th key with its value.
fn put(n: usize) -> pb::PutRequest {
    pb::PutRequest {
        key: format!("key {n}").into(),
        value: format!("value {n}").into(),
        ..Default::default()
    }
}

const PROP: u32 = 2;
const APP_RESP: u32 = 4;
const HEARTBEAT_RESP: u32 = 9;

/// As much of raft as a follower needs to be sent everything.
#[derive(Default)]
struct Follower {
    entries: Vec<Entry>,
    /// Where `entries` begin.
    base: u64,
    term: u64,
    heartbeats: usize,
    snapshot: Option<RaftMessage>,
}

impl Follower {
    fn last(&self) -> u64 {
        self.entries.last().map_or(self.base, |entry| entry.index)
    }

    /// Takes a message as a follower does, and answers what it answers.
    fn step(&mut self, message: RaftMessage) -> Option<RaftMessage> {
        assert!(message.term > 0);
        self.term = message.term;
        let answer = RaftMessage {
            to: message.from,
            from: message.to,
            term: message.term,
            ..RaftMessage::default()
        };
        match message.r#type {
            MSG_HEARTBEAT => {
                self.heartbeats += 1;
                let context = message.context;
                Some(RaftMessage { r#type: HEARTBEAT_RESP, context, ..answer })
            }
            MSG_APP if message.index > self.last() => Some(RaftMessage {
                r#type: APP_RESP,
                index: message.index,
                reject: true,
                reject_hint: self.last(),
                ..answer
            }),
            MSG_APP => {
                for (entry, expected) in message.entries.iter().zip(message.index + 1..) {
                    assert_eq!(entry.index, expected);
                    assert!((1..=message.term).contains(&entry.term));
                }
                let new: Vec<_> =
                    message.entries.into_iter().filter(|entry| entry.index > self.last()).collect();
                self.entries.extend(new);
                Some(RaftMessage { r#type: APP_RESP, index: self.last(), ..answer })
            }
            MSG_SNAP => {
                let metadata = message.snapshot.as_ref().unwrap().metadata.as_ref().unwrap();
                self.base = metadata.index;
                self.entries.clear();
                self.snapshot = Some(message);
                Some(RaftMessage { r#type: APP_RESP, index: self.base, ..answer })
            }
            _ => None,
        }
    }

    /// Follows until `done`.
    async fn follow(&mut self, node: &mut Node, mut done: impl FnMut(&Follower) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "{} entries at the deadline", self.entries.len());
            match node.told().await {
                Told::Step(messages) => {
                    let answers = messages.into_iter().filter_map(|message| self.step(message));
                    let answers = answers.collect();
                    node.send(answers);
                }
                Told::Unreachable(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The puts in the log, in order.
    fn puts(&self) -> Vec<pb::PutRequest> {
        let requests =
            self.entries.iter().filter(|entry| entry.r#type == 0 && !entry.data.is_empty());
        requests
            // This release still writes its own name in the form of the v2 store.
            .filter_map(|entry| match Command::decode(entry.data.clone()).ok()?.request {
                Request::Put(put) => Some(put),
                _ => None,
            })
            .collect()
    }
}

#[test]
fn a_real_etcd_sends_its_log_and_takes_proposals() {
    run(async {
        let etcd = Etcd::start().await;
        etcd.fill(20).await;
        let (mut node, leader) = etcd.joined().await;
        let mut follower = Follower::default();
        follower.follow(&mut node, |follower| follower.puts().len() == 20).await;
        assert_eq!(follower.entries[0].index, 1);
        // From here on entries come one by one, in the short form.
        for n in 20..40 {
            etcd.fill_one(n).await;
            follower.follow(&mut node, |follower| follower.puts().len() > n).await;
        }
        assert_eq!(sorted(follower.puts()), sorted((0..40).map(put).collect()));
        assert!(node.liveness.since(leader).is_some());
        until("etcd has dialled both of its streams", async || {
            let status = node.network.send(GetPeer(leader)).await.unwrap().unwrap();
            status.attached.message && status.attached.msgapp
        })
        .await;
        // What a follower's client wants goes the other way.
        let data = Command::new(0x1234_5678, Request::Put(put(77))).encode();
        let entries = vec![Entry { data: data.clone(), ..Entry::default() }];
        let to = leader.0;
        let from = node.id.0;
        node.send(vec![RaftMessage { r#type: PROP, to, from, entries, ..RaftMessage::default() }]);
        follower.follow(&mut node, |follower| follower.puts().len() == 41).await;
        assert_eq!(follower.entries.last().unwrap().data, data);
        let beats = follower.heartbeats;
        follower.follow(&mut node, |follower| follower.heartbeats > beats + 5).await;
        let range = pb::RangeRequest { key: "key 77".into(), ..Default::default() };
        let read = etcd.kv().range(range).await.unwrap().into_inner();
        assert_eq!(read.kvs[0].parse().unwrap().value, "value 77");
        assert!(node.exits.try_recv().is_err());
        // Removed, it is told so when it dials.
        let remove = pb::MemberRemoveRequest { id: node.id.0 };
        etcd.cluster().member_remove(remove).await.unwrap();
        let reason = tokio::time::timeout(PATIENCE, node.exits.recv()).await.unwrap();
        assert_eq!(reason, Some(Reason::Removed));
    });
}

#[test]
fn a_real_etcd_sends_a_snapshot_to_who_is_too_far_behind() {
    run(async {
        let etcd = Etcd::start().await;
        // It keeps 5000 entries behind a snapshot.
        etcd.fill(5300).await;
        let (mut node, leader) = etcd.joined().await;
        let mut follower = Follower::default();
        follower.follow(&mut node, |follower| follower.snapshot.is_some()).await;
        let message = follower.snapshot.clone().unwrap();
        let snapshot = message.snapshot.unwrap();
        let metadata = snapshot.metadata.unwrap();
        let conf_state = metadata.conf_state.unwrap();
        assert_eq!(conf_state.voters, [leader.0]);
        assert_eq!(conf_state.learners, [node.id.0]);
        assert!(metadata.index > 5300);
        assert!(snapshot.data.starts_with(b"{"), "the v2 store is JSON");
        let name = format!("{:016x}.snap.db", metadata.index);
        assert_eq!(node.files(), [&*name]);
        let file = std::fs::read(node.dir.path().join(name)).unwrap();
        let db = Reader::open(&file[..]).unwrap();
        let mut revisions = 0;
        let keys = db.bucket(b"key").unwrap().unwrap();
        keys.scan(ops::Bound::Unbounded, ops::Bound::Unbounded, &mut |_, _| {
            revisions += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(revisions, 5300);
        let received = format!("etcd_network_snapshot_receive_success{{From=\"{leader}\"}}");
        until("the snapshot is counted", async || node.metric(&received) == 1.0).await;
        // The log goes on behind it.
        etcd.fill_one(9000).await;
        follower.follow(&mut node, |follower| follower.puts() == [put(9000)]).await;
    });
}

fn sorted(mut puts: Vec<pb::PutRequest>) -> Vec<pb::PutRequest> {
    puts.sort_by(|a, b| a.key.cmp(&b.key));
    puts
}
