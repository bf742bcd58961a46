//! A follower that was away for so long that the log it needs is gone: it gets a snapshot.

use crate::record::{Load, Recorder};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::wait_for;
use crate::scenario::{fill, metric, others, under_load, under_load_of};

/// A snapshot each hundred entries, and as few entries kept behind it as can be.
fn options() -> Options {
    let options = Options::brisk().with(&["--snapshot-count=100"]);
    match Program::from_env() {
        Program::Quorate => options.with(&["--snapshot-catchup-entries=20"]),
        Program::Etcd => options,
    }
}

/// More entries than members keep.
async fn outgrow_the_log(cluster: &Cluster, away: Node) {
    let entries = match Program::from_env() {
        // It compacts its log in steps of a thousand.
        Program::Quorate => 2500,
        // It keeps 5000, whatever it is told.
        Program::Etcd => 5500,
    };
    let leader = cluster.leader_among(&others(away)).await;
    fill(&cluster.client(leader), entries, 10).await.expect("a majority takes writes");
}

/// Waits until `node` serves, which it can do only by a snapshot.
async fn catches_up(cluster: &mut Cluster, recorder: &Recorder, node: Node) {
    cluster.wait_serving(node).await;
    wait_for("a snapshot", || async {
        let received = metric(cluster, node, "etcd_network_snapshot_receive_success").await;
        if received > 0.0 { Ok(()) } else { Err(format!("{received} were received")) }
    })
    .await;
    recorder.progress(30).await;
}

#[test]
fn after_a_partition() {
    under_load(options(), async |cluster, recorder| {
        let follower = cluster.follower().await;
        cluster.net.part(&[follower], &others(follower));
        outgrow_the_log(cluster, follower).await;
        cluster.net.heal();
        catches_up(cluster, recorder, follower).await;
        // What it was sent is enough to start from.
        cluster.kill(follower);
        cluster.run(follower);
        cluster.wait_serving(follower).await;
    });
}

#[test]
fn after_its_death_and_in_the_middle_of_it() {
    under_load(options(), async |cluster, recorder| {
        let follower = cluster.follower().await;
        cluster.kill(follower);
        outgrow_the_log(cluster, follower).await;
        // Killed again at a few moments of taking it in.
        for moment_ms in [60, 120, 200, 300] {
            cluster.run(follower);
            tokio::time::sleep(std::time::Duration::from_millis(moment_ms)).await;
            cluster.kill(follower);
        }
        cluster.run(follower);
        cluster.wait_serving(follower).await;
        recorder.progress(30).await;
    });
}

#[test]
fn of_many_megabytes_while_writes_go_on() {
    let load = Load { pause_max: std::time::Duration::from_millis(100), ..Load::default() };
    under_load_of(load, options(), async |cluster, recorder| {
        let follower = cluster.follower().await;
        cluster.kill(follower);
        let leader = cluster.leader_among(&others(follower)).await;
        fill(&cluster.client(leader), 1000, 20_000).await.expect("a majority takes writes");
        outgrow_the_log(cluster, follower).await;
        cluster.run(follower);
        catches_up(cluster, recorder, follower).await;
        vec![0, 1, 2]
    });
}
