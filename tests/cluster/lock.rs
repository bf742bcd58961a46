//! Locks and elections in a cluster: their order, and that no two hold the same at once, whatever happens
//! to leaders, leases and callers.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate_proto::etcdserverpb::request_op::Request as Op;
use quorate_proto::mvccpb::event::EventType;
use quorate_proto::v3electionpb::election_client::ElectionClient;
use quorate_proto::v3electionpb::{CampaignRequest, LeaderKey, LeaderRequest, ResignRequest};
use quorate_proto::v3lockpb::lock_client::LockClient;
use quorate_proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest};
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::rig::client::{Client, revision};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::random::Random;
use crate::rig::{PATIENCE, wait_for};
use crate::scenario::with_own_cluster;

/// A connection for calls without a deadline.
fn channel(port: u16) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
    endpoint.connect_timeout(Duration::from_secs(2)).connect_lazy()
}

fn locks(cluster: &Cluster, node: Node) -> LockClient<Channel> {
    LockClient::new(channel(cluster.members[node].client_port))
}

fn elections(cluster: &Cluster, node: Node) -> ElectionClient<Channel> {
    ElectionClient::new(channel(cluster.members[node].client_port))
}

async fn lock(
    mut client: LockClient<Channel>,
    name: &str,
    lease: i64,
) -> Result<LockResponse, Status> {
    let request = LockRequest { name: name.to_string().into(), lease };
    client.lock(request).await.map(Response::into_inner)
}

async fn grant(client: &Client, id: i64, ttl: i64) -> Result<(), Status> {
    let granted = client.lease.clone().lease_grant(pb::LeaseGrantRequest { ttl, id }).await;
    match granted {
        Ok(_) => Ok(()),
        // The answer to an earlier try was lost.
        Err(status) if status.message() == "etcdserver: lease already exists" => Ok(()),
        Err(status) => Err(status),
    }
}

async fn queued(client: &Client, key: &str) {
    wait_for(key, || async {
        match client.get(key).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("it is not there".to_string()),
            Err(status) => Err(status.to_string()),
        }
    })
    .await;
}

async fn soon<T>(call: JoinHandle<T>) -> T {
    let answer = tokio::time::timeout(PATIENCE, call).await.expect("an answer in time");
    answer.expect("no panic")
}

const CONTENDERS: i64 = 20;

/// They come through all members, and are served in the order in which they came.
#[test]
fn twenty_contenders_are_served_in_order() {
    with_own_cluster(async {
        let cluster = Cluster::start(Program::from_env(), 3, Options::brisk()).await;
        let client = cluster.client(0);
        let mut waiting = Vec::new();
        for lease in 1..=CONTENDERS {
            let node = lease as usize % 3;
            grant(&client, lease, 600).await.unwrap();
            let locks = locks(&cluster, node);
            waiting.push(tokio::task::spawn_local(lock(locks, "l", lease)));
            queued(&client, &format!("l/{lease:x}")).await;
        }
        let mut fence = 0;
        for (n, call) in waiting.into_iter().enumerate() {
            let key = format!("l/{:x}", n + 1);
            let reply = soon(call).await.unwrap();
            assert_eq!(reply.key, key);
            let held = client.get(&key).await.unwrap().expect("it is held");
            assert!(held.create_revision > fence, "{key}");
            fence = held.create_revision;
            let mut locks = locks(&cluster, (n + 1) % 3);
            locks.unlock(UnlockRequest { key: key.into() }).await.unwrap();
        }
    });
}

/// Who has been told to hold the lock: under which key, and as seen at which revision.
#[derive(Clone, Debug)]
struct Acquired {
    key: Bytes,
    at: i64,
}

/// What the contenders of one test share.
#[derive(Default)]
struct Record {
    acquired: RefCell<Vec<Acquired>>,
    /// Who holds the lock and has not begun to let it go.
    holder: Cell<Option<i64>>,
    stop: Cell<bool>,
}

/// What goes wrong for a contender, beside what happens to its member.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// It leaves while it waits, and its leases end while it holds.
    Leases,
}

/// Locks, writes, unlocks, again and again, through whichever member answers.
async fn contend(
    clients: Vec<(Client, LockClient<Channel>)>,
    id: i64,
    trouble: Trouble,
    record: Rc<Record>,
    mut random: Random,
) {
    let mut lease = id * 1_000_000;
    let mut node = id as usize;
    while !record.stop.get() {
        lease += 1;
        loop {
            if grant(&clients[node % clients.len()].0, lease, 600).await.is_ok() {
                break;
            }
            node += 1;
        }
        // A lost answer leaves the key in the queue: the next try finds it there.
        let reply = loop {
            let (_, locks) = &clients[node % clients.len()];
            let patience = match trouble {
                Trouble::Leases if random.below(4) == 0 => Duration::from_millis(random.below(40)),
                _ => Duration::from_secs(5),
            };
            match tokio::time::timeout(patience, lock(locks.clone(), "l", lease)).await {
                Ok(Ok(reply)) => break Some(reply),
                Ok(Err(_)) => node += 1,
                Err(_) => break None,
            }
        };
        let Some(reply) = reply else {
            // Given up: whether it holds the lock is not known, so the lease must go.
            revoke(&clients, &mut node, lease).await;
            continue;
        };
        let at = revision(&reply.header);
        record.acquired.borrow_mut().push(Acquired { key: reply.key.clone(), at });
        if trouble == Trouble::None {
            assert_eq!(record.holder.replace(Some(id)), None, "{id} holds it too");
        }
        let fence = at_fence(&clients, &mut node, &reply.key).await;
        if let Some(fence) = fence {
            if trouble == Trouble::Leases && random.below(4) == 0 {
                revoke(&clients, &mut node, lease).await;
            }
            guarded_put(&clients, &mut node, &reply.key, fence).await;
        }
        assert!(fence.is_some() || trouble == Trouble::Leases, "a lock was lost");
        if trouble == Trouble::None {
            assert_eq!(record.holder.replace(None), Some(id));
        }
        loop {
            let mut locks = clients[node % clients.len()].1.clone();
            let unlock = locks.unlock(UnlockRequest { key: reply.key.clone() });
            match tokio::time::timeout(Duration::from_secs(5), unlock).await {
                Ok(Ok(_)) => break,
                _ => node += 1,
            }
        }
    }
}

async fn revoke(clients: &[(Client, LockClient<Channel>)], node: &mut usize, lease: i64) {
    loop {
        let mut leases = clients[*node % clients.len()].0.lease.clone();
        let revoke = leases.lease_revoke(pb::LeaseRevokeRequest { id: lease });
        match tokio::time::timeout(Duration::from_secs(5), revoke).await {
            Ok(Ok(_)) => return,
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => return,
            _ => *node += 1,
        }
    }
}

/// The create revision of the key that is held; `None` if it is gone.
async fn at_fence(
    clients: &[(Client, LockClient<Channel>)],
    node: &mut usize,
    key: &Bytes,
) -> Option<i64> {
    let key = std::str::from_utf8(key).unwrap();
    loop {
        match clients[*node % clients.len()].0.get(key).await {
            Ok(held) => return held.map(|held| held.create_revision),
            Err(_) => *node += 1,
        }
    }
}

/// Writes the fence, if the lock is still held.
async fn guarded_put(
    clients: &[(Client, LockClient<Channel>)],
    node: &mut usize,
    key: &Bytes,
    fence: i64,
) {
    let held = pb::Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Create as i32,
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(fence)),
        ..Default::default()
    };
    let put = pb::PutRequest {
        key: "guarded".into(),
        value: fence.to_string().into(),
        ..Default::default()
    };
    let request = pb::TxnRequest {
        compare: vec![held],
        success: vec![pb::RequestOp { request: Some(Op::RequestPut(put)) }],
        failure: vec![],
    };
    while clients[*node % clients.len()].0.txn(request.clone()).await.is_err() {
        *node += 1;
    }
}

/// Reads the history of the queue and holds against it what was told to the contenders: each was at the
/// head of the queue at the revision of its answer, and what was written under the lock was written in
/// the order of its holders.
async fn verify(client: &Client, acquired: &[Acquired]) {
    let end = client.put("end", "").await.unwrap();
    let mut watching = client.watch_all(1).await.unwrap();
    // The create revision of each key in the queue, at the revisions that are asked for.
    let mut asked: BTreeMap<i64, Vec<&Acquired>> = BTreeMap::new();
    for told in acquired {
        asked.entry(told.at).or_default().push(told);
    }
    let mut queue: BTreeMap<Bytes, i64> = BTreeMap::new();
    let mut holders = BTreeMap::new();
    let mut written = Vec::new();
    let mut last = 0;
    let mut done = 0;
    while last < end {
        let next = tokio::time::timeout(PATIENCE, watching.responses.message()).await;
        let response = next.expect("history in time").unwrap().expect("the watch goes on");
        for event in response.events {
            let deleted = event.r#type() == EventType::Delete;
            let kv = event.kv.expect("an event has a key").parse().unwrap();
            if kv.mod_revision > last {
                // All of `last` has been told of, and nothing changed up to this one.
                for (_, told) in asked.range(last..kv.mod_revision) {
                    for told in told {
                        let head = queue.iter().min_by_key(|(_, created)| **created);
                        let (key, created) = head.expect("somebody is in the queue");
                        assert_eq!(*key, told.key, "{told:?} was not at the head of {queue:?}");
                        holders.insert(*created, told.key.clone());
                        done += 1;
                    }
                }
                last = kv.mod_revision;
            }
            if kv.key == "guarded" {
                written.push(text(&kv.value).parse::<i64>().unwrap());
            } else if kv.key.starts_with(b"l/") {
                if deleted {
                    queue.remove(&kv.key);
                } else {
                    queue.insert(kv.key, kv.create_revision);
                }
            }
        }
    }
    assert_eq!(done, acquired.len(), "every acquisition is found in the history");
    assert!(written.is_sorted(), "a holder wrote after its successor: {written:?}");
    assert!(written.iter().all(|fence| holders.contains_key(fence)));
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Contends for a lock through all members while `event` happens.
async fn under_contention(
    cluster: &mut Cluster,
    trouble: Trouble,
    event: impl AsyncFnOnce(&mut Cluster, &Record),
) {
    let seed = Random::fresh_seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let record = Rc::new(Record::default());
    let mut contenders = Vec::new();
    for id in 1..=CONTENDERS {
        let clients = (0..3).map(|node| {
            (cluster.client_within(node, Duration::from_secs(5)), locks(cluster, node))
        });
        let random = Random::new(random.below(u64::MAX));
        let contender = contend(clients.collect(), id, trouble, record.clone(), random);
        contenders.push(tokio::task::spawn_local(contender));
    }
    progress(&record, 40).await;
    event(cluster, &record).await;
    progress(&record, 40).await;
    record.stop.set(true);
    for contender in contenders {
        soon(contender).await;
    }
    cluster.heal();
    cluster.wait_ready().await;
    let acquired = record.acquired.take();
    let client = cluster.client(0);
    verify(&client, &acquired).await;
    // Whoever gave up is out of the queue, by itself or with its lease.
    wait_for("an empty queue", || async {
        let (key, range_end) = ("l/".into(), "l0".into());
        let request = pb::RangeRequest { key, range_end, ..Default::default() };
        match client.range(request).await {
            Ok(reply) if reply.count == 0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}

/// Waits for that many more acquisitions.
async fn progress(record: &Record, count: usize) {
    let from = record.acquired.borrow().len();
    wait_for("the lock to go round", || async {
        let now = record.acquired.borrow().len();
        if now >= from + count { Ok(()) } else { Err(format!("{} times", now - from)) }
    })
    .await;
}

#[test]
fn no_two_hold_a_lock_when_the_leader_is_killed() {
    with_own_cluster(async {
        let mut cluster = Cluster::start(Program::from_env(), 3, Options::default()).await;
        under_contention(&mut cluster, Trouble::None, async |cluster, record| {
            for _ in 0..2 {
                let leader = cluster.leader().await;
                cluster.kill(leader);
                progress(record, 20).await;
                cluster.run(leader);
                cluster.wait_serving(leader).await;
            }
        })
        .await;
    });
}

#[test]
fn no_two_hold_a_lock_when_callers_leave_and_leases_end() {
    if Program::from_env() == Program::Etcd {
        return eprintln!("etcd before 3.5 gives locks to those whose leases have ended");
    }
    with_own_cluster(async {
        let mut cluster = Cluster::start(Program::from_env(), 3, Options::default()).await;
        under_contention(&mut cluster, Trouble::Leases, async |cluster, record| {
            progress(record, 100).await;
            let leader = cluster.leader().await;
            cluster.pause(leader);
            progress(record, 20).await;
            cluster.go_on(leader);
        })
        .await;
    });
}

/// A caller waits at a member while the leader is lost, and gets its turn under the next one.
#[test]
fn who_waits_outlives_the_leader() {
    with_own_cluster(async {
        let mut cluster = Cluster::start(Program::from_env(), 3, Options::brisk()).await;
        let leader = cluster.leader().await;
        let followers: Vec<Node> = (0..3).filter(|node| *node != leader).collect();
        let client = cluster.client(followers[1]);
        for lease in 1..=2 {
            grant(&client, lease, 600).await.unwrap();
        }
        lock(locks(&cluster, followers[1]), "l", 1).await.unwrap();
        let waiting = lock(locks(&cluster, followers[0]), "l", 2);
        let waiting = tokio::task::spawn_local(waiting);
        queued(&client, "l/2").await;
        let (key, value) = (Bytes::from("e/1"), Bytes::from("v"));
        let request = CampaignRequest { name: "e".into(), lease: 1, value: value.clone() };
        let elected = elections(&cluster, leader).campaign(request).await.unwrap().into_inner();
        let leads: LeaderKey = elected.leader.unwrap();
        assert_eq!(leads.key, key);
        let observe = LeaderRequest { name: "e".into() };
        let mut observing =
            elections(&cluster, followers[0]).observe(observe).await.unwrap().into_inner();
        let first = observing.message().await.unwrap().unwrap().kv.unwrap().parse().unwrap();
        assert_eq!((first.key, first.value), (key, value));

        let killed = Instant::now();
        cluster.kill(leader);
        cluster.leader_among(&followers).await;
        let unlocked = async {
            let mut locks = locks(&cluster, followers[1]);
            locks.unlock(UnlockRequest { key: "l/1".into() }).await
        };
        unlocked.await.unwrap();
        assert_eq!(soon(waiting).await.unwrap().key, "l/2");
        assert!(killed.elapsed() < PATIENCE);
        let mut election = elections(&cluster, followers[1]);
        election.resign(ResignRequest { leader: Some(leads) }).await.unwrap();
        let request = CampaignRequest { name: "e".into(), lease: 2, value: "w".into() };
        election.campaign(request).await.unwrap();
        let next = tokio::time::timeout(PATIENCE, observing.message()).await;
        let second = next.expect("in time").unwrap().unwrap().kv.unwrap().parse().unwrap();
        assert_eq!((&second.key[..], &second.value[..]), (&b"e/2"[..], &b"w"[..]));
    });
}

/// Who is cut off from the others holds nothing: it is not told that it does before it is back.
#[test]
fn a_member_that_is_cut_off_gives_no_locks() {
    with_own_cluster(async {
        let cluster = Cluster::start(Program::from_env(), 3, Options::brisk()).await;
        let leader = cluster.leader().await;
        let cut = (0..3).find(|node| *node != leader).unwrap();
        let client = cluster.client(leader);
        for lease in 1..=2 {
            grant(&client, lease, 600).await.unwrap();
        }
        lock(locks(&cluster, leader), "l", 1).await.unwrap();
        let waiting = tokio::task::spawn_local(lock(locks(&cluster, cut), "l", 2));
        queued(&client, "l/2").await;
        let others: Vec<Node> = (0..3).filter(|node| *node != cut).collect();
        cluster.net.part(&[cut], &others);
        let mut unlock = locks(&cluster, leader);
        unlock.unlock(UnlockRequest { key: "l/1".into() }).await.unwrap();
        // Now its turn has come, and its lease ends before it can know of that.
        let mut leases = client.lease.clone();
        leases.lease_revoke(pb::LeaseRevokeRequest { id: 2 }).await.unwrap();
        assert!(!waiting.is_finished(), "it was told of its turn by nobody");
        cluster.net.heal();
        let told = soon(waiting).await;
        // Releases of etcd before 3.5 do not look at the lease again.
        if cluster.program == Program::Quorate {
            assert_eq!(told.unwrap_err().message(), "mutex: session is expired");
        }
    });
}

#[test]
fn a_learner_gives_no_locks() {
    with_own_cluster(async {
        let mut cluster = Cluster::start(Program::from_env(), 1, Options::brisk()).await;
        let joining = cluster.place_joining(&[0]);
        let url = cluster.members[joining].peer_url.clone();
        cluster.client(0).member_add(&url, true).await.unwrap();
        cluster.run(joining);
        let client = cluster.client_within(joining, Duration::from_secs(2));
        wait_for("the learner to serve", || async {
            client.local_revision().await.map_err(|error| error.to_string())
        })
        .await;
        let refused = "etcdserver: rpc not supported for learner";
        let status = lock(locks(&cluster, joining), "l", 0).await.unwrap_err();
        assert_eq!(status.message(), refused);
        let observe = LeaderRequest { name: "e".into() };
        let observing = elections(&cluster, joining).observe(observe).await;
        let status = match observing {
            Err(status) => status,
            Ok(stream) => stream.into_inner().message().await.unwrap_err(),
        };
        assert_eq!(status.message(), refused);
    });
}
