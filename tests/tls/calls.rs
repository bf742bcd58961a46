//! What members ask of each other apart from raft's messages, and a snapshot, over TLS.

use quorate_proto::etcdserverpb as pb;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::deck::Deck;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::{run, wait_for};

/// Adds a learner to the members `to` and runs it; answers its id, too.
pub async fn run_learner(cluster: &mut Cluster, to: &[Node]) -> (Node, u64) {
    let learner = cluster.place_joining(to);
    let url = cluster.members[learner].peer_url.clone();
    let added = cluster.by_any("adding a learner", |client| {
        let url = url.clone();
        async move { client.member_add(&url, true).await }
    });
    let id = added.await.id;
    cluster.run(learner);
    (learner, id)
}

#[test]
fn followers_pass_leases_and_promotions_on_to_the_leader() {
    let deck = Deck::new();
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 2, deck.options()).await;
        let follower = cluster.client(cluster.follower().await);
        let grant = pb::LeaseGrantRequest { ttl: 600, id: 7 };
        follower.lease.clone().lease_grant(grant).await.unwrap();
        let (requests, receiver) = tokio::sync::mpsc::channel(1);
        requests.send(pb::LeaseKeepAliveRequest { id: 7 }).await.unwrap();
        let mut alive =
            follower.lease.clone().lease_keep_alive(ReceiverStream::new(receiver)).await.unwrap();
        let answer = alive.get_mut().message().await.unwrap().unwrap();
        assert_eq!((answer.id, answer.ttl), (7, 600));
        let asks = pb::LeaseTimeToLiveRequest { id: 7, keys: false };
        let left = follower.lease.clone().lease_time_to_live(asks).await.unwrap().into_inner();
        assert_eq!((left.id, left.granted_ttl), (7, 600));

        let (learner, id) = run_learner(&mut cluster, &[0, 1]).await;
        let follower = cluster.client(cluster.leader_among(&[0, 1]).await ^ 1);
        wait_for("the follower to have the learner promoted", || async {
            follower.member_promote(id).await.map_err(|error| error.to_string())
        })
        .await;
        cluster.wait_serving(learner).await;
        // The version that they decided on was asked over TLS, too.
        let status = cluster.client(learner).status().await.unwrap();
        assert!(!status.storage_version.is_empty(), "{status:?}");
    });
}

#[test]
fn a_member_that_is_far_behind_is_sent_a_snapshot() {
    let deck = Deck::new();
    let options: Options = deck.options().with(&[
        "--snapshot-count=50",
        "--snapshot-catchup-entries=10",
        // Asked of all members by the leader, by their peer ports.
        "--corrupt-check-time=500ms",
    ]);
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 3, options).await;
        let behind = cluster.follower().await;
        cluster.kill(behind);
        let leader = cluster.leader().await;
        let client = cluster.client(leader);
        // The log is compacted in steps of a thousand entries.
        let mut puts = JoinSet::new();
        for n in 0..50 {
            let client = client.clone();
            puts.spawn(async move {
                let mut last = 0;
                for m in 0..50 {
                    last = client.put(&format!("k{n}"), format!("{m:0>1000}")).await.unwrap();
                }
                last
            });
        }
        let revision = puts.join_all().await.into_iter().max().unwrap();
        cluster.run(behind);
        cluster.wait_serving(behind).await;
        cluster.equal_hashes(&[0, 1, 2], revision).await;
        let log = cluster.members[behind].log_text();
        assert!(log.contains("received and saved database snapshot"), "{log}");
        wait_for("all members to be compared", || async {
            let leader = cluster.leader().await;
            let log = cluster.members[leader].log_text();
            let both = r#""number-of-peers-checked":2"#;
            match log.lines().any(|line| line.contains(both)) {
                true => Ok(()),
                false => Err("the leader has not had an answer of both".to_string()),
            }
        })
        .await;
        assert_eq!(client.alarms().await.unwrap(), []);
    });
}
