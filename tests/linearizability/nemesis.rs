//! What goes wrong while the clients work: one fault after the other, drawn from a seed.

use std::time::{Duration, Instant};

use crate::rig::cluster::Cluster;
use crate::rig::net::{Node, Rule};
use crate::rig::random::Random;
use crate::rig::wait_for;

/// Faults, and the members that they hit.
pub struct Nemesis {
    random: Random,
    /// How often each kind was drawn.
    pub done: Vec<(&'static str, usize)>,
}

const FAULTS: [&str; 11] = [
    "kill the leader",
    "kill a follower",
    "kill a majority",
    "kill all",
    "pause the leader",
    "pause anyone",
    "part the leader",
    "part anyone",
    "part one way",
    "slow links",
    "lossy links",
];

impl Nemesis {
    pub fn new(seed: u64) -> Nemesis {
        Nemesis { random: Random::new(seed), done: FAULTS.map(|fault| (fault, 0)).to_vec() }
    }

    /// Faults until the time is over; afterwards everything runs and reaches everyone.
    ///
    /// # Panics
    /// If the cluster does not take writes again after one.
    pub async fn rage(&mut self, cluster: &mut Cluster, until: Instant) {
        // Each kind is drawn once before any is drawn again, so that a short run has seen many.
        let mut left: Vec<usize> = Vec::new();
        while Instant::now() < until {
            if left.is_empty() {
                left = (0..FAULTS.len()).collect();
            }
            let drawn = left.swap_remove(self.random.below(left.len() as u64) as usize);
            self.strike(FAULTS[drawn], cluster).await;
            self.done[drawn].1 += 1;
            cluster.heal();
            cluster.wait_ready().await;
            self.pause(200, 800).await;
        }
    }

    async fn strike(&mut self, fault: &str, cluster: &mut Cluster) {
        let all: Vec<Node> = (0..cluster.members.len()).collect();
        let leader = cluster.leader().await;
        let anyone = *self.random.pick(&all);
        let followers: Vec<Node> = all.iter().copied().filter(|node| *node != leader).collect();
        let follower = *self.random.pick(&followers);
        let rest = |one: Node| all.iter().copied().filter(|node| *node != one).collect::<Vec<_>>();
        println!("{fault}: leader {leader}, follower {follower}, anyone {anyone}");
        match fault {
            "kill the leader" => cluster.kill(leader),
            "kill a follower" => cluster.kill(follower),
            "kill a majority" => {
                for node in rest(anyone) {
                    cluster.kill(node);
                }
            }
            "kill all" => {
                for node in all {
                    cluster.kill(node);
                }
            }
            "pause the leader" => return self.stand_still(cluster, leader).await,
            "pause anyone" => return self.stand_still(cluster, anyone).await,
            "part the leader" => cluster.net.part(&[leader], &rest(leader)),
            "part anyone" => cluster.net.part(&[anyone], &rest(anyone)),
            // It hears the others, and they do not hear it; or the other way round.
            "part one way" if self.random.percent(50) => cluster.net.cut(&[leader], &rest(leader)),
            "part one way" => cluster.net.cut(&rest(leader), &[leader]),
            "slow links" => {
                let rule = Rule { delay: Duration::from_millis(100), ..Rule::default() };
                cluster.net.set_all(all.len(), rule);
            }
            "lossy links" => {
                cluster.net.set_all(all.len(), Rule { loss_percent: 30, ..Rule::default() });
            }
            other => unreachable!("no fault is called {other}"),
        }
        self.pause(500, 2500).await;
    }

    /// Ten election timeouts: the others elect a leader and go on, and the one that was paused wakes
    /// up in the belief that no time has passed.
    async fn stand_still(&self, cluster: &mut Cluster, node: Node) {
        cluster.pause(node);
        tokio::time::sleep(10 * cluster.options.election()).await;
        let others = cluster.running();
        wait_for("writes without the paused member", || async {
            let put = cluster.client(others[0]).put("!paused", "").await;
            put.map(|_| ()).map_err(|error| error.to_string())
        })
        .await;
        cluster.go_on(node);
    }

    async fn pause(&mut self, from_ms: u64, to_ms: u64) {
        let pause = from_ms + self.random.below(to_ms - from_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}
