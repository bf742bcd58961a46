//! Members of one cluster over different storage engines.

use crate::record::Load;
use crate::rig::cluster::Options;
use crate::rig::process::Program;
use crate::scenario::{others, under_load_of};

#[test]
fn members_over_different_engines_are_equal() {
    if Program::from_env() == Program::Etcd {
        println!("SKIPPED: etcd has one engine");
        return;
    }
    let engines = ["redb", "memory", "redb"];
    let own_args = engines.iter().map(|engine| vec![format!("--engine={engine}")]).collect();
    let options = Options { own_args, ..Options::brisk() };
    under_load_of(Load::default(), options, async |cluster, recorder| {
        // Each leads for a while, and each comes back from what its engine and its log have kept.
        for _ in 0..3 {
            let leader = cluster.leader().await;
            cluster.kill(leader);
            recorder.progress(30).await;
            cluster.run(leader);
            cluster.wait_serving(leader).await;
        }
        let memory = 1;
        cluster.kill(memory);
        recorder.progress(30).await;
        cluster.run(memory);
        cluster.wait_serving(memory).await;
        // The one without files is the whole majority's other half.
        let rest = others(memory);
        cluster.kill(rest[0]);
        recorder.progress(30).await;
        cluster.run(rest[0]);
        vec![0, 1, 2]
    });
}
