//! Members that come and go while clients work.

use std::time::Duration;

use crate::record::{Load, Recorder};
use crate::rig::client::Client;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::wait_for;
use crate::scenario::under_load_of;

/// Adds a member and starts it; it serves when it is a voter.
pub async fn add(
    cluster: &mut Cluster,
    recorder: &mut Recorder,
    to: &[Node],
    learner: bool,
) -> Node {
    let node = cluster.place_joining(to);
    let url = cluster.members[node].peer_url.clone();
    cluster
        .by_any("a member to be added", |client| {
            let url = url.clone();
            async move { add_once(&client, &url, learner).await }
        })
        .await;
    cluster.run(node);
    if !learner {
        cluster.wait_serving(node).await;
        recorder.watch(cluster, node);
        recorder.work(cluster, node);
    }
    node
}

/// One that was added although the answer was lost need not be added again.
async fn add_once(client: &Client, url: &str, learner: bool) -> Result<(), tonic::Status> {
    let known = client.members().await?;
    if known.iter().any(|member| member.peer_ur_ls.iter().any(|known| known == url)) {
        return Ok(());
    }
    client.member_add(url, learner).await.map(|_| ())
}

pub async fn promote(cluster: &mut Cluster, recorder: &mut Recorder, node: Node) {
    let id = id_of(cluster, node).await;
    // Refused until it has caught up.
    cluster
        .by_any("a learner to be promoted", |client| async move {
            let members = client.members().await?;
            if members.iter().any(|member| member.id == id && !member.is_learner) {
                return Ok(());
            }
            client.member_promote(id).await
        })
        .await;
    cluster.wait_serving(node).await;
    recorder.watch(cluster, node);
    recorder.work(cluster, node);
}

/// As the others know it.
async fn id_of(cluster: &Cluster, node: Node) -> u64 {
    let url = &cluster.members[node].peer_url;
    let members =
        cluster.by_any("the list of members", |client| async move { client.members().await }).await;
    let of = |member: &&quorate_proto::etcdserverpb::Member| member.peer_ur_ls.contains(url);
    members.iter().find(of).unwrap_or_else(|| panic!("{url} is not in {members:?}")).id
}

/// Removes a member by way of the others.
pub async fn remove(cluster: &Cluster, node: Node) {
    let id = id_of(cluster, node).await;
    let others: Vec<Node> = cluster.running().into_iter().filter(|other| *other != node).collect();
    let turn = std::cell::Cell::new(0);
    wait_for("a member to be removed", || {
        turn.set(turn.get() + 1);
        let client = cluster.client(others[turn.get() % others.len()]);
        async move {
            let gone = async {
                let members = client.members().await?;
                if members.iter().any(|member| member.id == id) {
                    client.member_remove(id).await?;
                }
                Ok::<_, tonic::Status>(())
            };
            gone.await.map_err(|error| error.to_string())
        }
    })
    .await;
}

#[test]
fn a_learner_is_added_and_promoted_and_a_member_removed() {
    under_load_of(Load::default(), Options::brisk(), async |cluster, recorder| {
        let learner = add(cluster, recorder, &[0, 1, 2], true).await;
        // It has the data, and refuses what only voters may do.
        let client = cluster.client_within(learner, Duration::from_secs(2));
        wait_for("the learner to have data", || async {
            let local = client.local_revision().await.map_err(|error| error.to_string())?;
            if local > 1 { Ok(()) } else { Err(format!("it is at {local}")) }
        })
        .await;
        let refusal = client.put("!learner", "").await.unwrap_err();
        assert_eq!(refusal.message(), "etcdserver: rpc not supported for learner");
        promote(cluster, recorder, learner).await;
        recorder.progress(30).await;

        let leaving = cluster.leader().await;
        remove(cluster, leaving).await;
        // It learns of that and ends by itself.
        cluster.wait_end(leaving).await;
        recorder.progress(30).await;
        (0..4).filter(|node| *node != leaving).collect()
    });
}

#[test]
fn a_dead_member_is_replaced() {
    under_load_of(Load::default(), Options::brisk(), async |cluster, recorder| {
        let dead = cluster.follower().await;
        cluster.kill(dead);
        recorder.progress(30).await;
        remove(cluster, dead).await;
        let rest: Vec<Node> = (0..3).filter(|node| *node != dead).collect();
        let new = add(cluster, recorder, &rest, false).await;
        recorder.progress(30).await;
        // Now the cluster lives without another one of the first.
        cluster.kill(rest[0]);
        cluster.wait_serving(new).await;
        recorder.progress(30).await;
        cluster.run(rest[0]);
        vec![rest[0], rest[1], new]
    });
}

#[test]
fn a_removed_member_that_comes_back_is_not_let_in() {
    under_load_of(Load::default(), Options::brisk(), async |cluster, recorder| {
        let leaving = cluster.follower().await;
        cluster.kill(leaving);
        remove(cluster, leaving).await;
        let rest: Vec<Node> = (0..3).filter(|node| *node != leaving).collect();
        recorder.progress(30).await;
        cluster.run(leaving);
        cluster.wait_end(leaving).await;
        let log = cluster.members[leaving].log_text().to_lowercase();
        assert!(log.contains("removed"), "it does not say why it ends");
        rest
    });
}
