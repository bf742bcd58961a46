//! Locks and elections: the same calls to both servers, the same answers; and what a lease that ends, a
//! caller that leaves and a member that stops do to those who wait.

use std::io::Read;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::v3electionpb as election;
use quorate_proto::v3electionpb::election_client::ElectionClient;
use quorate_proto::v3lockpb::lock_client::LockClient;
use quorate_proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest};
use tokio::task::JoinHandle;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Streaming};

use crate::ctl::{Running, etcdctl};
use crate::server::{
    Api, Kind, Member, PATIENCE, Said, error, get, keys, kv, revision, said, span,
};

/// Both programs: the answer is the same in all releases.
const ALL: [Kind; 2] = [Kind::Memory, Kind::Etcd];

const EXPIRED: &str = "mutex: session is expired";
const NOT_LEADER: &str = "election: not leader";
const NO_LEADER: &str = "election: no leader";
const NO_KEY: &str = "etcdserver: key is not provided";
const NO_LEASE: &str = "etcdserver: requested lease not found";
const NO_FIELD: &str = "\"leader\" field must be provided";

/// Clients on one connection, whose calls have no deadline.
#[derive(Clone)]
struct Clients {
    lock: LockClient<Channel>,
    election: ElectionClient<Channel>,
    api: Api,
}

impl Clients {
    fn of(member: &Member) -> Clients {
        let channel = member.api().channel;
        Clients {
            lock: LockClient::new(channel.clone()),
            election: ElectionClient::new(channel),
            api: member.api(),
        }
    }

    async fn lock(&mut self, name: &str, lease: i64) -> Result<LockResponse, Said> {
        let request = LockRequest { name: name.to_string().into(), lease };
        self.lock.lock(request).await.map(Response::into_inner).map_err(said)
    }

    /// A call that will wait; answers when its key is in the queue.
    async fn waiting(&mut self, name: &str, lease: i64) -> JoinHandle<Result<LockResponse, Said>> {
        let mut this = self.clone();
        let called = name.to_string();
        let call = tokio::spawn(async move { this.lock(&called, lease).await });
        self.queued(&format!("{name}/{lease:x}")).await;
        call
    }

    async fn queued(&mut self, key: &str) {
        let mut api = self.api.clone();
        until(key, async || api.range(get(key)).await.unwrap().count == 1).await;
    }

    async fn gone(&mut self, key: &str) {
        let mut api = self.api.clone();
        until(key, async || api.range(get(key)).await.unwrap().count == 0).await;
    }

    async fn unlock(&mut self, key: impl Into<Bytes>) -> Result<i64, Said> {
        let reply = self.lock.unlock(UnlockRequest { key: key.into() }).await.map_err(said)?;
        Ok(revision(reply.into_inner().header))
    }

    async fn campaign(
        &mut self,
        name: &str,
        lease: i64,
        value: &str,
    ) -> Result<(i64, election::LeaderKey), Said> {
        let (name, value) = (name.to_string().into(), value.to_string().into());
        let request = election::CampaignRequest { name, lease, value };
        let reply = self.election.campaign(request).await.map_err(said)?.into_inner();
        Ok((revision(reply.header), reply.leader.expect("a leader's key")))
    }

    async fn proclaim(
        &mut self,
        leader: Option<election::LeaderKey>,
        value: &str,
    ) -> Result<i64, Said> {
        let request = election::ProclaimRequest { leader, value: value.to_string().into() };
        let reply = self.election.proclaim(request).await.map_err(said)?;
        Ok(revision(reply.into_inner().header))
    }

    async fn resign(&mut self, leader: Option<election::LeaderKey>) -> Result<i64, Said> {
        let request = election::ResignRequest { leader };
        let reply = self.election.resign(request).await.map_err(said)?;
        Ok(revision(reply.into_inner().header))
    }

    /// The leader's key, its value and the revision of the reply.
    async fn leader(&mut self, name: &str) -> Result<(String, String, i64), Said> {
        let request = election::LeaderRequest { name: name.to_string().into() };
        let reply = self.election.leader(request).await.map_err(said)?.into_inner();
        Ok(told(reply))
    }

    /// An observer; etcd answers the call only together with its first message.
    fn observe(&self, name: &str) -> Observing {
        let request = election::LeaderRequest { name: name.to_string().into() };
        let mut client = self.election.clone();
        Observing::Opening(tokio::spawn(async move {
            client.observe(request).await.map(Response::into_inner).map_err(said)
        }))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn told(reply: election::LeaderResponse) -> (String, String, i64) {
    let pair = kv(&reply.kv.expect("a leader has a key"));
    (text(&pair.key), text(&pair.value), revision(reply.header))
}

enum Observing {
    Opening(JoinHandle<Result<Streaming<election::LeaderResponse>, Said>>),
    Open(Box<Streaming<election::LeaderResponse>>),
}

impl Observing {
    async fn try_next(&mut self) -> Result<Option<election::LeaderResponse>, Said> {
        if let Observing::Opening(opening) = self {
            let open = opening.await.expect("opening does not panic")?;
            *self = Observing::Open(Box::new(open));
        }
        let Observing::Open(open) = self else { unreachable!("opened above") };
        open.message().await.map_err(said)
    }

    async fn next(&mut self) -> (String, String, i64) {
        let next = tokio::time::timeout(PATIENCE, self.try_next()).await;
        told(next.expect("a leader in time").unwrap().expect("it goes on"))
    }
}

/// Asks until it is so.
async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so().await {
        assert!(Instant::now() < deadline, "waited for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a call answers that must not wait for long.
async fn soon<T>(call: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, call).await.expect("an answer in time")
}

fn unknown<T>(text: &str) -> Result<T, Said> {
    Err(error(Code::Unknown, text))
}

/// What is told to one whose lease ended while it waited: the installed release does not look.
fn lost(kind: Kind) -> Result<(), Said> {
    if kind == Kind::Etcd { Ok(()) } else { unknown(EXPIRED) }
}

fn leader_key(name: &str, lease: i64, rev: i64) -> election::LeaderKey {
    let key = format!("{name}/{lease:x}").into();
    election::LeaderKey { name: name.to_string().into(), key, rev, lease }
}

#[tokio::test]
async fn a_lock_is_a_key_of_a_lease() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        clients.api.grant(600, 5).await.unwrap();
        clients.api.grant(600, -9).await.unwrap();
        let reply = clients.lock("mylock", 5).await.unwrap();
        assert_eq!((&reply.key[..], revision(reply.header)), (&b"mylock/5"[..], 2), "{kind:?}");
        let header = reply.header.unwrap();
        assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term != 0);
        let held = clients.api.range(get("mylock/5")).await.unwrap();
        let held = kv(&held.kvs[0]);
        assert_eq!((held.lease, held.create_revision, held.version), (5, 2, 1), "{kind:?}");
        assert!(held.value.is_empty(), "{kind:?}");
        // The same lease holds it already.
        let again = clients.lock("mylock", 5).await.unwrap();
        assert_eq!((&again.key[..], revision(again.header)), (&b"mylock/5"[..], 2), "{kind:?}");
        // Another name is another lock; a name may be any bytes, or none.
        let negative = clients.lock("my", -9).await.unwrap();
        assert_eq!((&negative.key[..], revision(negative.header)), (&b"my/-9"[..], 3), "{kind:?}");
        let nameless = clients.lock("", 5).await.unwrap();
        assert_eq!(&nameless.key[..], b"/5", "{kind:?}");
        let binary = LockRequest { name: Bytes::from_static(b"\xff\0"), lease: 5 };
        let binary = clients.lock.lock(binary).await.unwrap().into_inner();
        assert_eq!(&binary.key[..], b"\xff\0/5", "{kind:?}");
        // What is not there can be unlocked too.
        assert_eq!(clients.unlock("mylock/5").await, Ok(6), "{kind:?}");
        assert_eq!(clients.unlock("mylock/5").await, Ok(6), "{kind:?}");
        assert_eq!(clients.unlock("").await, unknown(NO_KEY), "{kind:?}");
        assert_eq!(clients.lock("mylock", 77).await.map(|_| ()), unknown(NO_LEASE), "{kind:?}");
        assert_eq!(clients.api.range(span("mylock/", "mylock0")).await.unwrap().count, 0);
    }
}

#[tokio::test]
async fn a_lock_without_a_lease_gets_one() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        let reply = clients.lock("l", 0).await.unwrap();
        let held = clients.api.range(get(std::str::from_utf8(&reply.key).unwrap())).await.unwrap();
        let lease = kv(&held.kvs[0]).lease;
        assert!(lease > 0, "{kind:?}");
        assert_eq!(&reply.key[..], format!("l/{lease:x}").as_bytes(), "{kind:?}");
        let ask = pb::LeaseTimeToLiveRequest { id: lease, keys: true };
        let left = clients.api.lease.lease_time_to_live(ask).await.unwrap().into_inner();
        assert_eq!((left.granted_ttl, left.keys), (60, vec![reply.key]), "{kind:?}");
    }
}

#[tokio::test]
async fn who_waits_gets_the_lock_in_order() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=4 {
            clients.api.grant(600, lease).await.unwrap();
        }
        clients.lock("l", 3).await.unwrap();
        // Below the name, but of nobody who contends in this way.
        clients.api.put("l", "").await;
        clients.api.put("l0", "").await;
        let mut waiting = Vec::new();
        for lease in [4, 1, 2] {
            waiting.push((lease, clients.waiting("l", lease).await));
        }
        let mut holder = 3;
        for (lease, call) in waiting {
            assert!(!call.is_finished(), "{kind:?}: {lease} does not wait");
            let at = clients.unlock(format!("l/{holder:x}")).await.unwrap();
            let reply = soon(call).await.unwrap().unwrap();
            assert_eq!(reply.key, format!("l/{lease:x}"), "{kind:?}");
            assert_eq!(revision(reply.header), at, "{kind:?}: of the read that found it");
            holder = lease;
        }
        let left = clients.api.range(span("l/", "l0")).await.unwrap();
        assert_eq!(keys(&left.kvs), ["l/2"], "{kind:?}");
    }
}

/// One in the middle of the queue goes: the one behind it still waits for those before.
#[tokio::test]
async fn a_gap_in_the_queue_lets_nobody_past() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=3 {
            clients.api.grant(600, lease).await.unwrap();
        }
        clients.lock("l", 1).await.unwrap();
        let second = clients.waiting("l", 2).await;
        let third = clients.waiting("l", 3).await;
        let revoke = pb::LeaseRevokeRequest { id: 2 };
        clients.api.lease.lease_revoke(revoke).await.unwrap();
        // A call that waits by itself tells that time has passed: it is behind the third.
        clients.api.grant(600, 4).await.unwrap();
        let fourth = clients.waiting("l", 4).await;
        assert!(!third.is_finished() && !fourth.is_finished(), "{kind:?}");
        clients.unlock("l/1").await.unwrap();
        // It is not told that it holds what its lease no longer names.
        assert_eq!(soon(second).await.unwrap().map(|_| ()), lost(kind), "{kind:?}");
        assert_eq!(soon(third).await.unwrap().unwrap().key, "l/3", "{kind:?}");
        assert!(!fourth.is_finished(), "{kind:?}");
    }
}

#[tokio::test]
async fn a_lease_that_ends_frees_the_lock_and_the_place_in_the_queue() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        // The least time to live there is.
        clients.api.grant(1, 1).await.unwrap();
        clients.api.grant(600, 2).await.unwrap();
        clients.lock("l", 1).await.unwrap();
        let second = clients.waiting("l", 2).await;
        assert_eq!(soon(second).await.unwrap().unwrap().key, "l/2", "{kind:?}");
        assert_eq!(clients.api.range(get("l/1")).await.unwrap().count, 0, "{kind:?}");
        // Now one expires that waits.
        clients.api.grant(1, 3).await.unwrap();
        let third = clients.waiting("l", 3).await;
        clients.gone("l/3").await;
        clients.unlock("l/2").await.unwrap();
        assert_eq!(soon(third).await.unwrap().map(|_| ()), lost(kind), "{kind:?}");
    }
}

#[tokio::test]
async fn who_stops_waiting_leaves_the_queue() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=5 {
            clients.api.grant(600, lease).await.unwrap();
        }
        clients.lock("l", 1).await.unwrap();
        // By taking back the call.
        let canceled = clients.waiting("l", 2).await;
        let last = clients.waiting("l", 5).await;
        canceled.abort();
        clients.gone("l/2").await;
        // By a deadline.
        let mut request = Request::new(LockRequest { name: "l".into(), lease: 3 });
        request.metadata_mut().insert("grpc-timeout", MetadataValue::from_static("300m"));
        let mut late = clients.lock.clone();
        let late = tokio::spawn(async move { late.lock(request).await.map_err(said) });
        clients.queued("l/3").await;
        let (code, text) = soon(late).await.unwrap().unwrap_err();
        assert!(
            matches!(code, Code::DeadlineExceeded | Code::Unknown | Code::Cancelled),
            "{kind:?}: {code:?} {text}"
        );
        clients.gone("l/3").await;
        // By losing the connection, of which it is the only call.
        let mut other = Clients::of(&member);
        let lost = other.waiting("l", 4).await;
        drop(other);
        lost.abort();
        clients.gone("l/4").await;
        // Nobody else was moved by that, and the lease is still the caller's.
        assert!(!last.is_finished(), "{kind:?}");
        clients.unlock("l/1").await.unwrap();
        assert_eq!(soon(last).await.unwrap().unwrap().key, "l/5", "{kind:?}");
        clients.unlock("l/5").await.unwrap();
        assert_eq!(clients.lock("l", 2).await.unwrap().key, "l/2", "{kind:?}");
    }
}

/// etcd lets a lease that nobody knows of run out; here it goes with the call that it was granted for.
#[tokio::test]
async fn the_lease_of_an_abandoned_call_is_revoked() {
    let member = Member::start(Kind::Memory).await;
    let mut clients = Clients::of(&member);
    clients.api.grant(600, 1).await.unwrap();
    let ids = async |clients: &mut Clients| {
        let leases = clients.api.lease.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap();
        leases.into_inner().leases.into_iter().map(|lease| lease.id).collect::<Vec<_>>()
    };
    clients.lock("l", 1).await.unwrap();
    let mut call = clients.clone();
    let call = tokio::spawn(async move { call.lock("l", 0).await });
    until("a second key", async || clients.api.range(span("l/", "l0")).await.unwrap().count == 2)
        .await;
    assert_eq!(ids(&mut clients).await.len(), 2);
    call.abort();
    until("one lease", async || ids(&mut clients).await == [1]).await;
    assert_eq!(keys(&clients.api.range(span("l/", "l0")).await.unwrap().kvs), ["l/1"]);
    // The same for one that was never of use.
    let leader = Some(election::LeaderKey { lease: 0, ..leader_key("l", 1, 1) });
    assert_eq!(clients.proclaim(leader, "v").await, unknown(NOT_LEADER));
    until("one lease", async || ids(&mut clients).await == [1]).await;
}

/// A call that joins its own lease's key at the head and leaves again takes nothing away.
#[tokio::test]
async fn a_lock_that_is_held_survives_calls_that_come_and_go() {
    let member = Member::start(Kind::Memory).await;
    let mut clients = Clients::of(&member);
    clients.api.grant(600, 1).await.unwrap();
    clients.lock("l", 1).await.unwrap();
    let calls: Vec<_> = (0..50)
        .map(|_| {
            let mut clients = clients.clone();
            tokio::spawn(async move { clients.lock("l", 1).await })
        })
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        if n % 2 == 0 {
            call.abort();
        } else {
            assert_eq!(soon(call).await.unwrap().unwrap().key, "l/1");
        }
    }
    let held = clients.api.range(get("l/1")).await.unwrap();
    assert_eq!(kv(&held.kvs[0]).create_revision, 2);
}

#[tokio::test]
async fn elections() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in [1, 2, -9] {
            clients.api.grant(600, lease).await.unwrap();
        }
        assert_eq!(clients.leader("e").await, unknown(NO_LEADER), "{kind:?}");
        let first = leader_key("e", 1, 2);
        assert_eq!(clients.campaign("e", 1, "a").await, Ok((2, first.clone())), "{kind:?}");
        let told = ("e/1".to_string(), "a".to_string(), 2);
        assert_eq!(clients.leader("e").await, Ok(told), "{kind:?}");
        // Again, with the same value and with another one.
        assert_eq!(clients.campaign("e", 1, "a").await, Ok((2, first.clone())), "{kind:?}");
        assert_eq!(clients.campaign("e", 1, "b").await, Ok((2, first.clone())), "{kind:?}");
        let told = ("e/1".to_string(), "b".to_string(), 3);
        assert_eq!(clients.leader("e").await, Ok(told), "{kind:?}");
        assert_eq!(clients.proclaim(Some(first.clone()), "c").await, Ok(4), "{kind:?}");
        let wrong = election::LeaderKey { rev: 3, ..first.clone() };
        assert_eq!(clients.proclaim(Some(wrong.clone()), "d").await, unknown(NOT_LEADER));
        assert_eq!(clients.resign(Some(wrong)).await, Ok(4), "{kind:?}");
        assert_eq!(clients.proclaim(None, "d").await, unknown(NO_FIELD), "{kind:?}");
        assert_eq!(clients.resign(None).await, unknown(NO_FIELD), "{kind:?}");
        let keyless = election::LeaderKey { key: Bytes::new(), ..first.clone() };
        assert_eq!(clients.proclaim(Some(keyless.clone()), "d").await, unknown(NO_KEY), "{kind:?}");
        assert_eq!(clients.resign(Some(keyless)).await, unknown(NO_KEY), "{kind:?}");
        let leaseless = election::LeaderKey { lease: 77, ..first.clone() };
        assert_eq!(clients.proclaim(Some(leaseless), "d").await, unknown(NO_LEASE), "{kind:?}");
        assert_eq!(clients.campaign("e", 77, "x").await, unknown(NO_LEASE), "{kind:?}");

        let mut second = clients.clone();
        let second = tokio::spawn(async move { second.campaign("e", 2, "z").await });
        clients.queued("e/2").await;
        assert_eq!(clients.leader("e").await.unwrap().0, "e/1", "{kind:?}");
        assert_eq!(clients.resign(Some(first.clone())).await, Ok(6), "{kind:?}");
        // The header is that of the campaign's own key.
        let elected = soon(second).await.unwrap();
        assert_eq!(elected, Ok((5, leader_key("e", 2, 5))), "{kind:?}");
        assert_eq!(clients.proclaim(Some(first), "d").await, unknown(NOT_LEADER), "{kind:?}");
        assert_eq!(clients.leader("e").await.unwrap().1, "z", "{kind:?}");

        let (at, own) = clients.campaign("", -9, "").await.unwrap();
        assert_eq!((at, own.rev, &own.key[..], own.lease), (7, 7, &b"/-9"[..], -9), "{kind:?}");
    }
}

#[tokio::test]
async fn a_candidate_that_leaves_resigns() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=3 {
            clients.api.grant(600, lease).await.unwrap();
        }
        clients.campaign("e", 1, "a").await.unwrap();
        let mut canceled = clients.clone();
        let canceled = tokio::spawn(async move { canceled.campaign("e", 2, "b").await });
        clients.queued("e/2").await;
        let mut last = clients.clone();
        let last = tokio::spawn(async move { last.campaign("e", 3, "c").await });
        clients.queued("e/3").await;
        canceled.abort();
        clients.gone("e/2").await;
        assert!(!last.is_finished(), "{kind:?}");
        let revoke = pb::LeaseRevokeRequest { id: 1 };
        clients.api.lease.lease_revoke(revoke).await.unwrap();
        assert_eq!(soon(last).await.unwrap().unwrap().1.key, "e/3", "{kind:?}");
    }
}

/// etcd answers a candidate whose lease is gone that it leads.
#[tokio::test]
async fn a_candidate_without_a_lease_is_not_elected() {
    let member = Member::start(Kind::Memory).await;
    let mut clients = Clients::of(&member);
    for lease in 1..=2 {
        clients.api.grant(600, lease).await.unwrap();
    }
    let (_, first) = clients.campaign("e", 1, "a").await.unwrap();
    let mut second = clients.clone();
    let second = tokio::spawn(async move { second.campaign("e", 2, "b").await });
    clients.queued("e/2").await;
    let revoke = pb::LeaseRevokeRequest { id: 2 };
    clients.api.lease.lease_revoke(revoke).await.unwrap();
    clients.resign(Some(first)).await.unwrap();
    assert_eq!(soon(second).await.unwrap(), unknown(NOT_LEADER));
}

#[tokio::test]
async fn observers_are_told_of_leaders_and_values() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=3 {
            clients.api.grant(600, lease).await.unwrap();
        }
        // Silent while nobody leads.
        let mut early = clients.observe("e");
        let silence = tokio::time::timeout(Duration::from_millis(200), early.try_next()).await;
        assert!(silence.is_err(), "{kind:?}: {silence:?}");
        let mut early = clients.observe("e");
        let told = |key: &str, value: &str, at| (key.to_string(), value.to_string(), at);
        let (_, first) = clients.campaign("e", 1, "a").await.unwrap();
        assert_eq!(early.next().await, told("e/1", "a", 2), "{kind:?}");
        clients.proclaim(Some(first.clone()), "b").await.unwrap();
        assert_eq!(early.next().await, told("e/1", "b", 3), "{kind:?}");
        let mut late = clients.observe("e");
        assert_eq!(late.next().await, told("e/1", "b", 3), "{kind:?}");
        // One that stands in line is not told of.
        let mut second = clients.clone();
        let second = tokio::spawn(async move { second.campaign("e", 2, "z").await });
        clients.queued("e/2").await;
        clients.proclaim(Some(first.clone()), "c").await.unwrap();
        clients.resign(Some(first)).await.unwrap();
        let (_, second) = soon(second).await.unwrap().unwrap();
        for observer in [&mut early, &mut late] {
            assert_eq!(observer.next().await, told("e/1", "c", 5), "{kind:?}");
            assert_eq!(observer.next().await, told("e/2", "z", 6), "{kind:?}");
        }
        // And a time without a leader.
        clients.resign(Some(second)).await.unwrap();
        clients.campaign("e", 3, "y").await.unwrap();
        for observer in [&mut early, &mut late] {
            assert_eq!(observer.next().await, told("e/3", "y", 8), "{kind:?}");
        }
    }
}

/// A leader that comes and goes at once is told of all the same. (etcd's observers may miss it.)
#[tokio::test]
async fn observers_miss_nobody() {
    let member = Member::start(Kind::Memory).await;
    let mut clients = Clients::of(&member);
    let mut observer = clients.observe("e");
    let mut expected = Vec::new();
    for lease in 1..=100 {
        clients.api.grant(600, lease).await.unwrap();
        let (_, leader) = clients.campaign("e", lease, "first").await.unwrap();
        clients.proclaim(Some(leader.clone()), "second").await.unwrap();
        clients.resign(Some(leader)).await.unwrap();
        for value in ["first", "second"] {
            expected.push((format!("e/{lease:x}"), value.to_string()));
        }
    }
    for expected in expected {
        let (key, value, _) = observer.next().await;
        assert_eq!((key, value), expected);
    }
    // The same, but what it looks for was compacted meanwhile: it goes on with who leads now.
    let (at, _) = clients.campaign("e", 1, "last").await.unwrap();
    clients.api.compact(at).await.unwrap();
    assert_eq!(observer.next().await.1, "last");
}

#[tokio::test]
async fn who_waits_when_a_member_stops_is_told() {
    let mut member = Member::start(Kind::Redb).await;
    let mut clients = Clients::of(&member);
    for lease in 1..=2 {
        clients.api.grant(600, lease).await.unwrap();
    }
    clients.lock("l", 1).await.unwrap();
    let second = clients.waiting("l", 2).await;
    let mut observer = clients.observe("l");
    observer.next().await;
    member.restart().await;
    let (code, text) = soon(second).await.unwrap().unwrap_err();
    assert!(matches!(code, Code::Unknown | Code::Unavailable), "{code:?} {text}");
    let ended = soon(observer.try_next()).await.unwrap_err();
    assert_eq!(ended.0, Code::Unavailable, "{ended:?}");
    // Its place in the queue is still there for its next call, and the lock is still held.
    let mut clients = Clients::of(&member);
    let again = clients.waiting("l", 2).await;
    let kept = clients.api.range(get("l/2")).await.unwrap();
    assert_eq!(kv(&kept.kvs[0]).create_revision, 3);
    assert!(!again.is_finished());
    clients.unlock("l/1").await.unwrap();
    assert_eq!(soon(again).await.unwrap().unwrap().key, "l/2");
}

/// Root, `u` with all rights below `l/`, and `n` with none; their passwords are their names.
async fn switch_auth_on(member: &Member) {
    let mut auth = member.api().auth;
    for name in ["root", "u", "n"] {
        let request = pb::AuthUserAddRequest {
            name: name.into(),
            password: name.into(),
            ..Default::default()
        };
        auth.user_add(request).await.unwrap();
    }
    for (user, role) in [("root", "root"), ("u", "r")] {
        auth.role_add(pb::AuthRoleAddRequest { name: role.into() }).await.unwrap();
        let (user, role) = (user.into(), role.into());
        auth.user_grant_role(pb::AuthUserGrantRoleRequest { user, role }).await.unwrap();
    }
    let perm = quorate_proto::authpb::Permission {
        perm_type: quorate_proto::authpb::permission::Type::Readwrite as i32,
        key: "l/".into(),
        range_end: "l0".into(),
    };
    let grant = pb::AuthRoleGrantPermissionRequest { name: "r".into(), perm: Some(perm) };
    auth.role_grant_permission(grant).await.unwrap();
    auth.auth_enable(pb::AuthEnableRequest {}).await.unwrap();
}

/// Who calls is who makes the calls that a lock consists of.
#[tokio::test]
async fn locks_need_what_their_steps_need() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=3 {
            clients.api.grant(600, lease).await.unwrap();
        }
        switch_auth_on(&member).await;
        let mut tokens = std::collections::BTreeMap::new();
        for name in ["root", "u", "n"] {
            let request = pb::AuthenticateRequest { name: name.into(), password: name.into() };
            let reply = clients.api.auth.authenticate(request).await.unwrap().into_inner();
            tokens.insert(name, reply.token);
        }
        tokens.insert("bad", "no.1".to_string());
        fn with<T>(token: Option<&String>, body: T) -> Request<T> {
            let mut request = Request::new(body);
            if let Some(token) = token {
                request.metadata_mut().insert("token", token.parse().unwrap());
            }
            request
        }
        let locked = async |who: &str, name: &str, lease: i64| {
            let name = name.to_string().into();
            let request = with(tokens.get(who), LockRequest { name, lease });
            let reply = clients.lock.clone().lock(request).await;
            reply.map(|reply| text(&reply.into_inner().key)).map_err(said)
        };
        let denied = "etcdserver: permission denied";
        let nobody = "etcdserver: user name is empty";
        assert_eq!(locked("nobody", "l", 1).await, unknown(nobody), "{kind:?}");
        assert_eq!(locked("nobody", "l", 0).await, unknown(nobody), "{kind:?}");
        let bad = "etcdserver: invalid auth token";
        assert_eq!(locked("bad", "l", 1).await, unknown(bad), "{kind:?}");
        assert_eq!(locked("n", "l", 1).await, unknown(denied), "{kind:?}");
        assert_eq!(locked("u", "other", 1).await, unknown(denied), "{kind:?}");
        assert_eq!(locked("u", "l", 1).await, Ok("l/1".into()), "{kind:?}");

        // One that leaves takes its key back in its own name.
        let mut root = clients.clone();
        let mut count = async || {
            let keys = with(tokens.get("root"), span("l/", "l0"));
            root.api.kv.range(keys).await.unwrap().into_inner().count
        };
        let request = with(tokens.get("u"), LockRequest { name: "l".into(), lease: 2 });
        let mut lock = clients.lock.clone();
        let left = tokio::spawn(async move { lock.lock(request).await });
        until("a second key", async || count().await == 2).await;
        left.abort();
        // etcd does that in nobody's name, which helps nobody here.
        if kind != Kind::Etcd {
            until("one key", async || count().await == 1).await;
        }

        let unlock = async |who: &str| {
            let request = with(tokens.get(who), UnlockRequest { key: "l/1".into() });
            clients.lock.clone().unlock(request).await.map(|_| ()).map_err(said)
        };
        assert_eq!(unlock("n").await, unknown(denied), "{kind:?}");
        assert_eq!(unlock("u").await, Ok(()), "{kind:?}");

        let asked = || election::LeaderRequest { name: "l".into() };
        let leader = async |who: &str| {
            let mut client = clients.election.clone();
            client.leader(with(tokens.get(who), asked())).await.map(|_| ()).map_err(said)
        };
        assert_eq!(leader("n").await, unknown(denied), "{kind:?}");
        let mut client = clients.election.clone();
        let observed = match client.observe(with(tokens.get("n"), asked())).await {
            Ok(stream) => stream.into_inner().message().await.map(|_| ()),
            Err(status) => Err(status),
        };
        // The installed release ends the stream as if all were well.
        let closed = match kind {
            Kind::Etcd => Ok(()),
            _ => unknown("election: observe closed early"),
        };
        assert_eq!(observed.map_err(said), closed, "{kind:?}");
    }
}

/// Calls that wait are watched, not polled, and count as one call each.
#[tokio::test]
async fn a_lock_counts_as_one_call() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        for lease in 1..=2 {
            clients.api.grant(600, lease).await.unwrap();
        }
        let before = calls(&member);
        clients.lock("l", 1).await.unwrap();
        let mut second = clients.clone();
        let second = tokio::spawn(async move { second.lock("l", 2).await });
        until("the second key", async || {
            let keys = span("l/", "l0");
            clients.api.range(keys).await.unwrap().count == 2
        })
        .await;
        clients.unlock("l/1").await.unwrap();
        soon(second).await.unwrap().unwrap();
        let (lock, mut rest) =
            (value(&member, "grpc_server_started_total", "Lock"), calls(&member));
        assert_eq!(lock, 2.0, "{kind:?}");
        assert_eq!(value(&member, "grpc_server_started_total", "Unlock"), 1.0, "{kind:?}");
        rest.retain(|(method, _)| method != "Range");
        let before: Vec<_> = before.into_iter().filter(|(method, _)| method != "Range").collect();
        assert_eq!(rest, before, "{kind:?}: no steps are counted");
    }
}

/// The member's page of metrics.
fn page(member: &Member) -> String {
    use std::io::Write;
    let mut stream = std::net::TcpStream::connect(member.endpoint()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

fn value(member: &Member, name: &str, method: &str) -> f64 {
    let page = page(member);
    let label = format!("grpc_method=\"{method}\"");
    let line = page.lines().find(|line| line.starts_with(name) && line.contains(&label));
    line.map_or(0.0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
}

/// How often each method that a lock consists of was called.
fn calls(member: &Member) -> Vec<(String, f64)> {
    ["Range", "Txn", "DeleteRange", "LeaseGrant", "LeaseRevoke", "Put"]
        .map(|method| (method.to_string(), value(member, "grpc_server_started_total", method)))
        .to_vec()
}

/// An etcdctl that runs until it is told to end.
fn running(member: &Member, args: &[&str]) -> Running {
    Running::start(etcdctl(member, &member.endpoint(), args))
}

/// Whether a line is the key of a lease below a name.
fn is_key(line: &str, name: &str) -> bool {
    let lease = line.strip_prefix(name).and_then(|rest| rest.strip_prefix('/'));
    lease.is_some_and(|lease| i64::from_str_radix(lease, 16).is_ok_and(|lease| lease > 0))
}

/// etcdctl's own locks and those of the service stand in one queue.
#[tokio::test]
async fn etcdctl_locks() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        clients.api.grant(600, 5).await.unwrap();
        let mut holder = running(&member, &["lock", "l", "--ttl", "7"]);
        let key = holder.line();
        assert!(is_key(&key, "l"), "{kind:?}: {key}");
        let lease = i64::from_str_radix(key.strip_prefix("l/").unwrap(), 16).unwrap();
        let ask = pb::LeaseTimeToLiveRequest { id: lease, keys: false };
        let left = clients.api.lease.lease_time_to_live(ask).await.unwrap().into_inner();
        assert_eq!(left.granted_ttl, 7, "{kind:?}");
        let served = clients.waiting("l", 5).await;
        let mut behind = running(&member, &["lock", "l", "echo", "locked"]);
        until("three keys", async || clients.api.range(span("l/", "l0")).await.unwrap().count == 3)
            .await;
        holder.terminate();
        let (rest, _, _) = holder.end();
        assert!(rest.iter().all(String::is_empty), "{kind:?}: {rest:?}");
        assert_eq!(soon(served).await.unwrap().unwrap().key, "l/5", "{kind:?}");
        clients.unlock("l/5").await.unwrap();
        assert_eq!(behind.line(), "locked", "{kind:?}");
        let (rest, errors, code) = behind.end();
        assert_eq!((rest.len(), &*errors, code), (0, "", Some(0)), "{kind:?}");
        assert_eq!(clients.api.range(span("l/", "l0")).await.unwrap().count, 0, "{kind:?}");
        // A command that fails while the lock is held.
        let failing = running(&member, &["lock", "l", "false"]);
        let (out, _, code) = failing.end();
        assert_eq!((out.len(), code), (0, Some(1)), "{kind:?}");
    }
}

#[tokio::test]
async fn etcdctl_elects() {
    for kind in ALL {
        let member = Member::start(kind).await;
        let mut clients = Clients::of(&member);
        clients.api.grant(600, 5).await.unwrap();
        let mut first = running(&member, &["elect", "e", "one"]);
        let key = first.line();
        assert!(is_key(&key, "e"), "{kind:?}: {key}");
        assert_eq!(first.line(), "one", "{kind:?}");
        let mut listener = running(&member, &["elect", "e", "-l"]);
        assert_eq!((listener.line(), listener.line()), (key.clone(), "one".into()), "{kind:?}");
        let mut observer = clients.observe("e");
        assert_eq!(observer.next().await.1, "one", "{kind:?}");
        let mut served = clients.clone();
        let served = tokio::spawn(async move { served.campaign("e", 5, "two").await });
        clients.queued("e/5").await;
        first.terminate();
        first.end();
        let (_, leader) = soon(served).await.unwrap().unwrap();
        assert_eq!((listener.line(), listener.line()), ("e/5".into(), "two".into()), "{kind:?}");
        assert_eq!(observer.next().await.1, "two", "{kind:?}");
        clients.proclaim(Some(leader), "three").await.unwrap();
        assert_eq!((listener.line(), listener.line()), ("e/5".into(), "three".into()), "{kind:?}");
        listener.terminate();
        listener.end();
    }
}
