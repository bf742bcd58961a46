//! Membership and leadership as clients of real processes see them.

mod ports;
#[path = "cluster/rig/mod.rs"]
mod rig;

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::leasepb::LeaseInternalRequest;
use rig::client::Client;
use rig::cluster::{Cluster, Options};
use rig::process::Program;
use rig::{PATIENCE, run, wait_for};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

type Said<T = ()> = Result<T, (Code, String)>;

fn said<T>(result: Result<T, Status>) -> Said<T> {
    result.map_err(|status| (status.code(), status.message().to_string()))
}

fn refused<T>(code: Code, text: &str) -> Said<T> {
    Err((code, format!("etcdserver: {text}")))
}

async fn add(client: &Client, urls: &[&str], is_learner: bool) -> Said<pb::MemberAddResponse> {
    let peer_ur_ls = urls.iter().map(ToString::to_string).collect();
    let request = pb::MemberAddRequest { peer_ur_ls, is_learner };
    said(client.cluster.clone().member_add(request).await).map(tonic::Response::into_inner)
}

async fn update(client: &Client, id: u64, url: &str) -> Said {
    let request = pb::MemberUpdateRequest { id, peer_ur_ls: vec![url.to_string()] };
    said(client.cluster.clone().member_update(request).await.map(|_| ()))
}

async fn move_leader(client: &Client, target_id: u64) -> Said {
    let request = pb::MoveLeaderRequest { target_id };
    said(client.maintenance.clone().move_leader(request).await.map(|_| ()))
}

async fn left(client: &Client, id: i64) -> Said<pb::LeaseTimeToLiveResponse> {
    let request = pb::LeaseTimeToLiveRequest { id, keys: true };
    said(client.lease.clone().lease_time_to_live(request).await).map(tonic::Response::into_inner)
}

/// A stream of keep-alives.
struct KeepAlive {
    requests: mpsc::Sender<pb::LeaseKeepAliveRequest>,
    replies: Streaming<pb::LeaseKeepAliveResponse>,
}

impl KeepAlive {
    async fn open(client: &Client) -> KeepAlive {
        let (requests, receiver) = mpsc::channel(1024);
        let opened = client.lease.clone().lease_keep_alive(ReceiverStream::new(receiver)).await;
        KeepAlive { requests, replies: opened.unwrap().into_inner() }
    }

    /// The TTL that lease `id` has after a renewal.
    async fn renew(&mut self, id: i64) -> Said<i64> {
        self.requests.send(pb::LeaseKeepAliveRequest { id }).await.unwrap();
        let reply = said(self.replies.message().await)?.expect("the stream goes on");
        assert_eq!(reply.id, id);
        Ok(reply.ttl)
    }
}

/// Tries again what may be refused while connections are young.
async fn once_healthy<T, F: Future<Output = Said<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    wait_for(what, || {
        let asked = ask();
        async move { asked.await.map_err(|(code, text)| format!("{code:?} {text}")) }
    })
    .await
}

#[test]
fn a_single_member_is_not_talked_into_losing_its_quorum() {
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 1, Options::brisk()).await;
        let client = cluster.client(0);
        let own = cluster.id(0).await;
        let bad = || refused(Code::InvalidArgument, "given member URLs are invalid");
        for urls in [&[][..], &["nonsense"], &["http://h:1/x"], &["http://h:1", "ftp://h:1"]] {
            assert_eq!(add(&client, urls, false).await.map(|_| ()), bad(), "{urls:?}");
        }
        let not_found = || refused(Code::NotFound, "member not found");
        assert_eq!(said(client.member_remove(1).await), not_found());
        assert_eq!(update(&client, 1, "http://h:1").await, not_found());
        assert_eq!(said(client.member_promote(1).await), not_found());
        let not_learner = refused(Code::FailedPrecondition, "can only promote a learner member");
        assert_eq!(said(client.member_promote(own).await), not_learner);
        let too_few = "re-configuration failed due to not enough started members";
        assert_eq!(said(client.member_remove(own).await), refused(Code::Unknown, too_few));
        let peer_url = cluster.members[0].peer_url.clone();
        assert_eq!(
            add(&client, &[&peer_url], true).await.map(|_| ()),
            refused(Code::FailedPrecondition, "Peer URLs already exists")
        );
        let added = add(&client, &["http://127.0.0.1:2", "http://127.0.0.1:1"], true).await;
        let added = added.unwrap();
        let learner = added.member.unwrap();
        assert_eq!(learner.peer_ur_ls, ["http://127.0.0.1:1", "http://127.0.0.1:2"]);
        assert!(learner.is_learner && learner.name.is_empty());
        let header = added.header.unwrap();
        assert_eq!((header.revision, header.member_id, added.members.len()), (0, own, 2));
        assert_eq!(
            add(&client, &["http://127.0.0.1:3"], true).await.map(|_| ()),
            refused(Code::FailedPrecondition, "too many learner members in cluster")
        );
        let behind = "can only promote a learner member which is in sync with leader";
        let behind = refused(Code::FailedPrecondition, behind);
        assert_eq!(said(client.member_promote(learner.id).await), behind);
        let transferee = || refused(Code::FailedPrecondition, "bad leader transferee");
        assert_eq!(move_leader(&client, learner.id).await, transferee());
        assert_eq!(move_leader(&client, 1).await, transferee());
        assert_eq!(move_leader(&client, own).await, Ok(()));
        assert_eq!(update(&client, learner.id, "http://127.0.0.1:4").await, Ok(()));
        let members = client.members().await.unwrap();
        let updated = members.iter().find(|member| member.id == learner.id).unwrap();
        assert_eq!(updated.peer_ur_ls, ["http://127.0.0.1:4"]);
        assert!(updated.is_learner);
        assert_eq!(said(client.member_remove(learner.id).await), Ok(()));
        assert_eq!(said(client.member_remove(learner.id).await), not_found());
        // A second voter is let in, since it is how a cluster grows; until it runs, there is no quorum.
        let second = add(&client, &["http://127.0.0.1:5"], false).await.unwrap();
        assert_eq!(second.members.len(), 2);
        let hasty = cluster.client_within(0, Duration::from_secs(1));
        assert_eq!(hasty.put("k", "v").await.unwrap_err().code(), Code::DeadlineExceeded);
        wait_for("the member to stand down", || async {
            match client.status().await.map_err(|error| error.to_string())?.leader {
                0 => Ok(()),
                leader => Err(format!("{leader:x} leads")),
            }
        })
        .await;
        // It cannot hand anything over, and does not wait for it.
        let started = Instant::now();
        cluster.terminate(0).await;
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    });
}

#[test]
fn members_join_as_learners_are_promoted_and_removed() {
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 3, Options::brisk()).await;
        let leader = cluster.leader().await;
        let follower = cluster.follower().await;
        let asked = cluster.client(follower);
        asked.put("before", "1").await.unwrap();

        let node = cluster.place_joining(&[0, 1, 2]);
        let url = cluster.members[node].peer_url.clone();
        let urls = [url.as_str()];
        let added = once_healthy("a learner", || add(&asked, &urls, true)).await;
        let id = added.member.unwrap().id;
        cluster.run(node);
        let learner = cluster.client(node);
        wait_for("the learner to catch up", || async {
            let seen = learner.local_revision().await.map_err(|error| error.to_string())?;
            if seen >= 2 { Ok(()) } else { Err(format!("it is at {seen}")) }
        })
        .await;
        let unsupported = "rpc not supported for learner";
        let put = said(learner.put("k", "v").await);
        assert_eq!(put, refused(Code::FailedPrecondition, unsupported));
        let list = said(learner.members().await);
        assert_eq!(list, refused(Code::FailedPrecondition, unsupported));
        // Only the leader knows how far a learner has got: the others ask it.
        once_healthy("the promotion", || async { said(asked.member_promote(id).await) }).await;
        let not_learner = refused(Code::FailedPrecondition, "can only promote a learner member");
        assert_eq!(said(asked.member_promote(id).await), not_learner);
        let unknown = refused(Code::NotFound, "member not found");
        assert_eq!(said(asked.member_promote(1).await), unknown);
        cluster.wait_serving(node).await;
        learner.put("after", "1").await.unwrap();

        // Past its proxy.
        let direct = format!("http://127.0.0.1:{}", cluster.members[node].peer_port);
        assert_eq!(update(&asked, id, &direct).await, Ok(()));
        for node in 0..4 {
            let members = cluster.client(node).members().await.unwrap();
            let member = members.iter().find(|member| member.id == id).unwrap();
            assert!(!member.is_learner && member.peer_ur_ls == [direct.clone()], "{member:?}");
        }

        // A follower is removed, then the leader removes itself.
        let gone = cluster.id(follower).await;
        let by = cluster.client(node);
        once_healthy("the removal", || async { said(by.member_remove(gone).await) }).await;
        ended_as_removed(&mut cluster, follower).await;
        let gone = cluster.id(leader).await;
        let by = cluster.client(leader);
        once_healthy("its own removal", || async { said(by.member_remove(gone).await) }).await;
        ended_as_removed(&mut cluster, leader).await;

        let next = cluster.leader().await;
        assert!(next != leader && next != follower);
        let revision = cluster.client(next).put("later", "1").await.unwrap();
        let nodes = cluster.running();
        assert_eq!(nodes.len(), 2);
        cluster.equal_hashes(&nodes, revision).await;
    });
}

/// It stops by itself, in good order, and does so again.
async fn ended_as_removed(cluster: &mut Cluster, node: usize) {
    let status = cluster.wait_end(node).await;
    assert_eq!(status.code(), Some(0), "member {node}");
    let words = "the member has been permanently removed from the cluster";
    assert!(cluster.members[node].log_text().contains(words));
    let (status, log) = cluster.refused(node).await;
    assert_eq!(status.code(), Some(0), "member {node}, started again");
    assert!(log.contains(words), "{log}");
}

#[test]
fn leadership_is_moved_and_handed_over() {
    run(async {
        // Long enough that an election by itself would be noticed.
        let options = Options { heartbeat_ms: 100, election_ms: 4000, ..Options::default() };
        let election = options.election();
        let mut cluster = Cluster::start(Program::Quorate, 3, options).await;
        let leader = cluster.leader().await;
        let follower = cluster.follower().await;
        let (from, to) = (cluster.client(leader), cluster.client(follower));
        let target = cluster.id(follower).await;
        let not_leader = refused(Code::FailedPrecondition, "not leader");
        assert_eq!(move_leader(&to, target).await, not_leader);
        let unknown = refused(Code::FailedPrecondition, "bad leader transferee");
        assert_eq!(move_leader(&from, 1).await, unknown);
        let started = Instant::now();
        assert_eq!(move_leader(&from, target).await, Ok(()));
        assert!(started.elapsed() < election, "{:?}", started.elapsed());
        // The answer comes when the old leader knows the new one.
        assert_eq!(from.status().await.unwrap().leader, target);
        assert_eq!(cluster.leader().await, follower);

        let started = Instant::now();
        let status = cluster.terminate(follower).await;
        assert_eq!(status.signal(), Some(15));
        let rest = cluster.running();
        let outage = cluster.writable_after(&rest, started).await;
        assert!(outage < election, "no writes for {outage:?}");
        let log = cluster.members[follower].log_text();
        assert!(log.contains("leadership transfer finished"), "{log}");

        // Nobody is left to hand it to.
        cluster.kill(rest[0]);
        cluster.terminate(rest[1]).await;
    });
}

#[test]
fn leases_are_kept_alive_through_any_member() {
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 3, Options::default()).await;
        let leader = cluster.leader().await;
        let follower = cluster.follower().await;
        let client = cluster.client(follower);
        for id in 1..=50 {
            let request = pb::LeaseGrantRequest { ttl: 6000 + id, id };
            client.lease.clone().lease_grant(request).await.unwrap();
        }
        // Many at once are answered in their order.
        let mut stream = KeepAlive::open(&client).await;
        let ids: Vec<i64> = (0..500).map(|n| 1 + (n * 7) % 51).collect();
        for id in &ids {
            stream.requests.send(pb::LeaseKeepAliveRequest { id: *id }).await.unwrap();
        }
        for id in &ids {
            let reply = stream.replies.message().await.unwrap().unwrap();
            let ttl = if *id == 51 { 0 } else { 6000 + id };
            assert_eq!((reply.id, reply.ttl), (*id, ttl));
            assert_eq!(reply.header.unwrap().member_id, cluster.id(follower).await);
        }
        // A client that sends no more is answered to the end.
        stream.requests.send(pb::LeaseKeepAliveRequest { id: 1 }).await.unwrap();
        let KeepAlive { requests, mut replies } = stream;
        drop(requests);
        assert_eq!(replies.message().await.unwrap().unwrap().id, 1);
        assert_eq!(said(replies.message().await), Ok(None));

        let short = 1000;
        let request = pb::LeaseGrantRequest { ttl: 3, id: short };
        client.lease.clone().lease_grant(request).await.unwrap();
        let put = pb::PutRequest { key: "leased".into(), lease: short, ..Default::default() };
        client.put_request(put).await.unwrap();
        let now = left(&client, short).await.unwrap();
        assert_eq!((now.granted_ttl, now.keys), (3, vec!["leased".into()]));
        assert!((1..=3).contains(&now.ttl), "{}", now.ttl);
        assert_eq!(left(&client, 51).await.unwrap().ttl, -1);

        // It outlives its TTL as long as it is renewed, whoever leads.
        let mut stream = KeepAlive::open(&client).await;
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(4) {
            assert_eq!(stream.renew(short).await, Ok(3));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        cluster.kill(leader);
        let killed = Instant::now();
        while killed.elapsed() < Duration::from_secs(4) {
            assert_eq!(stream.renew(short).await, Ok(3));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        // What this member has applied: on a busy machine the leader may just be changing.
        let key = "leased".into();
        let local = pb::RangeRequest { key, serializable: true, ..Default::default() };
        assert_eq!(client.range(local).await.unwrap().kvs.len(), 1);
        let renewed = Instant::now();
        wait_for("the lease's end", || async {
            match client.get("leased").await.map_err(|error| error.to_string())? {
                None => Ok(()),
                Some(_) => Err("the key is still there".to_string()),
            }
        })
        .await;
        assert!(renewed.elapsed() >= Duration::from_secs(2), "{:?}", renewed.elapsed());
        assert_eq!(stream.renew(short).await, Ok(0));
    });
}

/// Status, content type and body of the answer to a request on the peer port of member 0.
async fn answered(cluster: &Cluster, method: &str, path: &str, body: &[u8]) -> [String; 3] {
    let mut stream = TcpStream::connect(("127.0.0.1", cluster.members[0].peer_port)).await.unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    tokio::time::timeout(PATIENCE, reading).await.expect("an answer in time").unwrap();
    let answer = answer.escape_ascii().to_string();
    let (head, body) = answer.split_once("\\r\\n\\r\\n").expect("a head and a body");
    let mut lines = head.split("\\r\\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().to_string();
    let kind = lines.find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("content-type: ").map(str::to_string)
    });
    [status, kind.unwrap_or_default(), body.to_string()]
}

/// A follower of the other program must understand the leader, and the leader it.
#[test]
fn a_leader_answers_the_other_members_as_etcd_does() {
    run(async {
        let ours = Cluster::start(Program::Quorate, 1, Options::brisk()).await;
        let theirs = Cluster::start(Program::Etcd, 1, Options::brisk()).await;
        for cluster in [&ours, &theirs] {
            let client = cluster.client(0);
            let request = pb::LeaseGrantRequest { ttl: 6000, id: 7 };
            client.lease.clone().lease_grant(request).await.unwrap();
        }
        let renew = |id| pb::LeaseKeepAliveRequest { id }.encode_to_vec();
        let internal = |id, keys| {
            let request = pb::LeaseTimeToLiveRequest { id, keys };
            LeaseInternalRequest { lease_time_to_live_request: Some(request) }.encode_to_vec()
        };
        for (method, path, body) in [
            ("POST", "/leases", renew(7)),
            ("POST", "/leases", renew(8)),
            ("POST", "/leases", b"\xff".to_vec()),
            ("GET", "/leases", Vec::new()),
            ("PUT", "/leases/internal", Vec::new()),
            ("POST", "/leases/internal", internal(8, true)),
            ("POST", "/leases/internal", b"\xff".to_vec()),
            ("POST", "/members/promote/1", Vec::new()),
            ("POST", "/members/promote/x", Vec::new()),
            ("GET", "/members/promote/1", Vec::new()),
        ] {
            let [ours, theirs] = [
                answered(&ours, method, path, &body).await,
                answered(&theirs, method, path, &body).await,
            ];
            assert_eq!(ours, theirs, "{method} {path} {body:?}");
        }
        // The seconds left may differ by one.
        let body = internal(7, true);
        let [ours, theirs] = [
            answered(&ours, "POST", "/leases/internal", &body).await,
            answered(&theirs, "POST", "/leases/internal", &body).await,
        ];
        assert_eq!(
            (&ours[..2], ours[2].len()),
            (&theirs[..2], theirs[2].len()),
            "{ours:?} {theirs:?}"
        );
        assert_eq!(ours[0], "200");
    });
}

#[test]
fn without_a_leader_each_call_says_so_in_its_way() {
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 3, Options::brisk()).await;
        let leader = cluster.leader().await;
        let client = cluster.client_within(leader, PATIENCE);
        client.put("k", "v").await.unwrap();
        client.lease.clone().lease_grant(pb::LeaseGrantRequest { ttl: 600, id: 1 }).await.unwrap();
        let with_leader = |request| {
            let mut request = Request::new(request);
            request.metadata_mut().insert("hasleader", "true".parse().unwrap());
            request
        };
        let mut patient = client.watch_all(0).await.unwrap();
        let (asks, receiver) = mpsc::channel(4);
        let create = pb::WatchCreateRequest { key: "k".into(), ..Default::default() };
        let create = pb::watch_request::RequestUnion::CreateRequest(create);
        asks.send(pb::WatchRequest { request_union: Some(create) }).await.unwrap();
        let opened = client.watch.clone().watch(with_leader_stream(receiver)).await;
        let mut careful = opened.unwrap().into_inner();
        assert!(careful.message().await.unwrap().unwrap().created);

        let others: Vec<usize> = (0..3).filter(|node| *node != leader).collect();
        for node in &others {
            cluster.kill(*node);
        }
        wait_for("the loss of the leader", || async {
            let status = client.status().await.map_err(|error| error.to_string())?;
            let told = status.errors.iter().any(|error| error == "etcdserver: no leader");
            if status.leader == 0 && told { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
        let lost = Instant::now();
        let no_leader = || refused(Code::Unavailable, "no leader");
        let range = pb::RangeRequest { key: "k".into(), serializable: true, ..Default::default() };
        let served = client.range(range.clone()).await.unwrap();
        assert_eq!(served.kvs.len(), 1);
        let asked = client.kv.clone().range(with_leader(range)).await;
        assert_eq!(said(asked.map(|_| ())), no_leader());
        let not_leader = refused(Code::FailedPrecondition, "not leader");
        assert_eq!(move_leader(&client, cluster.id(leader).await).await, not_leader);
        let unhealthy = refused(Code::Unavailable, "unhealthy cluster");
        assert_eq!(add(&client, &["http://127.0.0.1:1"], true).await.map(|_| ()), unhealthy);
        assert!(lost.elapsed() < Duration::from_secs(5));
        assert_eq!(said(careful.message().await.map(|_| ())), no_leader());

        // These wait as long as a request may: 5 s and two election timeouts.
        let mut stream = KeepAlive::open(&client).await;
        let (put, get, renewed, time) =
            tokio::join!(client.put("k", "w"), client.get("k"), stream.renew(1), left(&client, 1),);
        let never = (Code::DeadlineExceeded, "context deadline exceeded".to_string());
        assert_eq!(said(put), Err(never));
        assert_eq!(said(get), refused(Code::Unavailable, "request timed out"));
        assert_eq!(renewed.map(|_| ()), no_leader());
        assert_eq!(time.map(|_| ()), no_leader());

        for node in others {
            cluster.run(node);
        }
        cluster.wait_ready().await;
        assert_eq!(stream_after(&client).await, Ok(600));
        client.put("k", "x").await.unwrap();
        let event = tokio::time::timeout(PATIENCE, patient.responses.message()).await;
        assert!(event.expect("an event in time").unwrap().is_some());
    });
}

async fn stream_after(client: &Client) -> Said<i64> {
    KeepAlive::open(client).await.renew(1).await
}

fn with_leader_stream(
    requests: mpsc::Receiver<pb::WatchRequest>,
) -> Request<ReceiverStream<pb::WatchRequest>> {
    let mut request = Request::new(ReceiverStream::new(requests));
    request.metadata_mut().insert("hasleader", "true".parse().unwrap());
    request
}
