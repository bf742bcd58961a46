//! Links that are cut, slow, or lose packets.

use std::time::{Duration, Instant};

use crate::record::Recorder;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Rule;
use crate::scenario::{cannot_serve, measured, others, outage_max, under_load};

#[test]
fn the_leader_is_cut_off() {
    measured(Options::default(), async |cluster, recorder| {
        let leader = cluster.leader().await;
        let rest = others(leader);
        cluster.net.part(&[leader], &rest);
        let parted = Instant::now();
        let outage = cluster.writable_after(&rest, parted).await;
        println!("writable {outage:?} after the leader was cut off");
        assert!(outage <= outage_max(&cluster.options), "no writes for {outage:?}");
        assert_ne!(cluster.leader_among(&rest).await, leader);
        useless_until_healed(cluster, recorder, leader).await;
    });
}

#[test]
fn a_follower_is_cut_off() {
    measured(Options::brisk(), async |cluster, recorder| {
        let follower = cluster.follower().await;
        cluster.net.part(&[follower], &others(follower));
        let parted = Instant::now();
        let outage = cluster.writable_after(&others(follower), parted).await;
        assert!(outage <= outage_max(&cluster.options), "no writes for {outage:?}");
        useless_until_healed(cluster, recorder, follower).await;
    });
}

#[test]
fn nobody_hears_the_leader() {
    under_load(Options::brisk(), async |cluster, recorder| {
        let leader = cluster.leader().await;
        let rest = others(leader);
        cluster.net.cut(&[leader], &rest);
        goes_on_without(cluster, recorder, leader).await;
    });
}

#[test]
fn the_leader_hears_nobody() {
    under_load(Options::brisk(), async |cluster, recorder| {
        let leader = cluster.leader().await;
        let rest = others(leader);
        cluster.net.cut(&rest, &[leader]);
        goes_on_without(cluster, recorder, leader).await;
    });
}

/// It steps down for want of answers, or is voted out: others lead, until it is back.
async fn goes_on_without(cluster: &mut Cluster, recorder: &mut Recorder, leader: usize) {
    let rest = others(leader);
    let outage = cluster.writable_after(&rest, Instant::now()).await;
    println!("writable {outage:?} after the leader was cut off one way");
    assert_ne!(cluster.leader_among(&rest).await, leader);
    useless_until_healed(cluster, recorder, leader).await;
}

/// A member that is cut off serves nobody while the others go on, and serves again with the links.
async fn useless_until_healed(cluster: &mut Cluster, recorder: &mut Recorder, node: usize) {
    cannot_serve(cluster, node).await;
    recorder.progress(30).await;
    cluster.net.heal();
    cluster.wait_serving(node).await;
}

#[test]
fn each_hears_only_one_other() {
    under_load(Options::brisk(), async |cluster, recorder| {
        // A ring: 0 to 1 to 2 to 0. Nobody gets answers from whom it asks, so nobody can lead.
        for node in 0..3 {
            cluster.net.cut(&[(node + 1) % 3], &[node]);
        }
        tokio::time::sleep(4 * cluster.options.election()).await;
        for node in 0..3 {
            cannot_serve(cluster, node).await;
        }
        cluster.net.heal();
        cluster.wait_ready().await;
        recorder.progress(30).await;
    });
}

#[test]
fn slow_links() {
    measured(Options::default(), async |cluster, recorder| {
        let delay = Duration::from_millis(200);
        cluster.net.set_all(3, Rule { delay, ..Rule::default() });
        let leader = cluster.leader().await;
        let term = cluster.client(leader).status().await.unwrap().raft_term;
        recorder.progress(150).await;
        // A round takes 400 ms, less than half of the time after which an election begins.
        let status = cluster.client(leader).status().await.unwrap();
        assert_eq!((status.raft_term, cluster.leader().await), (term, leader), "an election");
        let asked = Instant::now();
        cluster.client(leader).put("!slow", "").await.unwrap();
        assert!(asked.elapsed() >= 2 * delay, "the links are not slow: {:?}", asked.elapsed());
    });
}

#[test]
fn links_that_lose_a_third() {
    under_load(Options::default(), async |cluster, recorder| {
        cluster.net.set_all(3, Rule { loss_percent: 30, ..Rule::default() });
        recorder.progress(200).await;
    });
}
