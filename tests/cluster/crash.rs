//! Members that die, stand still and come back.

use std::time::Instant;

use crate::rig::cluster::Options;
use crate::scenario::{cannot_serve, measured, others, outage_max, under_load};

#[test]
fn the_leader_is_killed() {
    measured(Options::default(), async |cluster, recorder| {
        let leader = cluster.leader().await;
        cluster.kill(leader);
        let killed = Instant::now();
        let outage = cluster.writable_after(&others(leader), killed).await;
        println!("writable {outage:?} after the leader was killed");
        assert!(outage <= outage_max(&cluster.options), "no writes for {outage:?}");
        recorder.progress(30).await;
        cluster.run(leader);
        cluster.wait_serving(leader).await;
    });
}

#[test]
fn a_follower_is_killed_again_and_again() {
    measured(Options::brisk(), async |cluster, recorder| {
        for _ in 0..3 {
            let follower = cluster.follower().await;
            cluster.kill(follower);
            let killed = Instant::now();
            let outage = cluster.writable_after(&others(follower), killed).await;
            println!("writable {outage:?} after a follower was killed");
            assert!(outage <= outage_max(&cluster.options), "no writes for {outage:?}");
            recorder.progress(30).await;
            cluster.run(follower);
            cluster.wait_serving(follower).await;
        }
    });
}

#[test]
fn a_majority_is_killed() {
    under_load(Options::brisk(), async |cluster, recorder| {
        let survivor = cluster.leader().await;
        let dead = others(survivor);
        for node in &dead {
            cluster.kill(*node);
        }
        cannot_serve(cluster, survivor).await;
        // One of them is enough.
        cluster.run(dead[0]);
        cluster.wait_serving(survivor).await;
        recorder.progress(30).await;
        cluster.run(dead[1]);
        cluster.wait_serving(dead[1]).await;
    });
}

#[test]
fn all_are_restarted_at_once() {
    under_load(Options::brisk(), async |cluster, recorder| {
        for node in 0..3 {
            cluster.kill(node);
        }
        cluster.heal();
        cluster.wait_ready().await;
        recorder.progress(30).await;
        // In order, this time, each while the others end as well.
        for node in 0..3 {
            cluster.terminate(node).await;
        }
        cluster.heal();
        cluster.wait_ready().await;
    });
}

#[test]
fn one_after_the_other_is_restarted_in_order() {
    under_load(Options::brisk(), async |cluster, recorder| {
        for node in 0..3 {
            cluster.terminate(node).await;
            cluster.run(node);
            cluster.wait_serving(node).await;
            recorder.progress(20).await;
        }
    });
}

#[test]
fn the_leader_stands_still_and_wakes_up() {
    measured(Options::brisk(), async |cluster, recorder| {
        let leader = cluster.leader().await;
        cluster.pause(leader);
        let paused = Instant::now();
        let rest = others(leader);
        let outage = cluster.writable_after(&rest, paused).await;
        println!("writable {outage:?} after the leader stood still");
        assert!(outage <= outage_max(&cluster.options), "no writes for {outage:?}");
        let until = paused + 10 * cluster.options.election();
        tokio::time::sleep(until.saturating_duration_since(Instant::now())).await;
        let successor = cluster.leader().await;
        assert_ne!(successor, leader);
        // Its clients are the first that it hears, and it still thinks that it leads: the judges see to
        // it that none of them is told anything old.
        cluster.go_on(leader);
        recorder.progress(60).await;
        cluster.wait_serving(leader).await;
    });
}
