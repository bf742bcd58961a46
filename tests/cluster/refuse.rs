//! Members that do not belong: they are told so, and the cluster does not notice.

use std::time::Duration;

use crate::record::{Load, Recorder};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::wait_for;
use crate::scenario::{cannot_serve, under_load_of, with_own_cluster};

/// Waits until a log names the clash of cluster IDs, on either side.
async fn mismatch_is_logged(cluster: &Cluster, nodes: &[Node]) {
    wait_for("a word on the cluster ID", || async {
        let says = |node: &Node| {
            let log = cluster.members[*node].log_text().to_lowercase().replace('-', " ");
            log.contains("cluster id mismatch")
        };
        nodes.iter().any(says).then_some(()).ok_or_else(|| "nobody says so".to_string())
    })
    .await;
}

#[test]
fn a_member_with_the_token_of_another_cluster() {
    under_load_of(Load::default(), Options::brisk(), async |cluster, recorder| {
        // Its directory is lost, and it is started anew under another token: another cluster's ID.
        let stray = cluster.follower().await;
        let rest: Vec<Node> = (0..3).filter(|node| *node != stray).collect();
        cluster.kill(stray);
        let data = cluster.members[stray].data.clone();
        let kept = data.with_extension("kept");
        std::fs::rename(&data, &kept).unwrap();
        let token = std::mem::replace(&mut cluster.members[stray].token, "another".to_string());
        cluster.run(stray);
        mismatch_is_logged(cluster, &[0, 1, 2]).await;
        if !cluster.has_ended(stray) {
            cannot_serve(cluster, stray).await;
            cluster.kill(stray);
        }
        recorder.progress(30).await;
        assert_eq!(cluster.leader_among(&rest).await, cluster.leader().await);

        // With its own directory it is itself again.
        std::fs::remove_dir_all(&data).ok();
        std::fs::rename(&kept, &data).unwrap();
        cluster.members[stray].token = token;
        cluster.run(stray);
        vec![0, 1, 2]
    });
}

#[test]
fn a_member_with_the_directory_of_another_cluster() {
    with_own_cluster(async {
        let program = Program::from_env();
        let foreign = {
            let mut other = Cluster::prepare(program, 3, Options::brisk());
            for node in 0..3 {
                other.members[node].token = "other".to_string();
                other.run(node);
            }
            other.wait_ready().await;
            other.client(0).put("theirs", "1").await.unwrap();
            other.terminate(0).await;
            let foreign = tempfile::tempdir().unwrap();
            std::fs::rename(&other.members[0].data, foreign.path().join("data")).unwrap();
            foreign
        };
        let mut cluster = Cluster::start(program, 3, Options::brisk()).await;
        let recorder = Recorder::start(&cluster, &[0, 1, 2], Load::default());
        recorder.progress(60).await;
        let stray = cluster.follower().await;
        cluster.kill(stray);
        let data = cluster.members[stray].data.clone();
        let kept = data.with_extension("kept");
        std::fs::rename(&data, &kept).unwrap();
        std::fs::rename(foreign.path().join("data"), &data).unwrap();
        cluster.run(stray);
        mismatch_is_logged(&cluster, &[0, 1, 2]).await;
        if !cluster.has_ended(stray) {
            cannot_serve(&cluster, stray).await;
            cluster.kill(stray);
        }
        recorder.progress(30).await;
        std::fs::remove_dir_all(&data).unwrap();
        std::fs::rename(&kept, &data).unwrap();
        cluster.run(stray);
        cluster.wait_serving(stray).await;
        recorder.progress(30).await;
        recorder.verify(&cluster, &[0, 1, 2]).await;
    });
}

#[test]
fn a_member_that_nobody_has_added() {
    under_load_of(Load::default(), Options::brisk(), async |cluster, recorder| {
        // It asks the others who is a member, and is not among them.
        let stray = cluster.place_joining(&[0, 1, 2]);
        let (status, log) = cluster.refused(stray).await;
        assert_eq!(status.code(), Some(1), "{status}: {log}");
        assert!(log.contains("member count is unequal"), "it does not say why: {log}");
        recorder.progress(30).await;
        vec![0, 1, 2]
    });
}

#[test]
fn a_member_that_joins_with_nobody_there() {
    with_own_cluster(async {
        let mut cluster = Cluster::prepare(Program::from_env(), 2, Options::brisk());
        let stray = cluster.place_joining(&[0, 1]);
        let started = std::time::Instant::now();
        let (status, log) = cluster.refused(stray).await;
        assert_eq!(status.code(), Some(1), "{status}: {log}");
        let why = "cannot fetch cluster info from peer urls";
        assert!(log.contains(why), "it does not say why: {log}");
        // Two members, ten seconds at most for each.
        assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    });
}
