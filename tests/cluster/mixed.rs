//! Members of one cluster, some of which are a real etcd (3.4).

use crate::record::Load;
use crate::rig::cluster::Options;
use crate::rig::process::Program;
use crate::scenario::{others, under_load_of};

fn mixed(programs: [Program; 3]) -> Options {
    Options { own_programs: programs.into(), ..Options::brisk() }
}

/// Each leads while the others die and come back; what all of them have must be equal in the end.
fn all_lead(programs: [Program; 3]) {
    under_load_of(Load::default(), mixed(programs), async |cluster, recorder| {
        for node in 0..3 {
            let leader = cluster.leader().await;
            if leader != node {
                let id = cluster.client(node).status().await.unwrap().header.unwrap().member_id;
                cluster.client(leader).move_leader(id).await.unwrap();
            }
            recorder.progress(30).await;
            let follower = others(node)[0];
            cluster.kill(follower);
            recorder.progress(30).await;
            cluster.run(follower);
            cluster.wait_serving(follower).await;
            let leader = cluster.leader().await;
            cluster.kill(leader);
            recorder.progress(30).await;
            cluster.run(leader);
            cluster.wait_serving(leader).await;
        }
        vec![0, 1, 2]
    });
}

#[test]
fn one_member_among_two_of_etcd() {
    all_lead([Program::Etcd, Program::Quorate, Program::Etcd]);
}

#[test]
fn two_members_and_one_of_etcd() {
    all_lead([Program::Quorate, Program::Etcd, Program::Quorate]);
}
