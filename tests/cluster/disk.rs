//! One member's disk is full: it stops, the others go on, and with space again it is as good as they.

use std::time::Instant;

use crate::record::{Load, Recorder};
use crate::rig::PATIENCE;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::process::Program;
use crate::scenario::{fill, with_own_cluster};
use crate::tmpfs::Tmpfs;

#[test]
fn a_full_disk_takes_one_member_out_and_nothing_with_it() {
    with_own_cluster(async {
        let mut cluster = Cluster::prepare(Program::from_env(), 3, Options::brisk());
        // One segment of the log has 64 MB.
        let Some(tmpfs) = Tmpfs::mount(&cluster.members[0].data, 96) else {
            println!("SKIPPED: this user may not mount a file system");
            return;
        };
        for node in 0..3 {
            cluster.run(node);
        }
        cluster.wait_ready().await;
        let recorder = Recorder::start(&cluster, &[0, 1, 2], Load::default());
        recorder.progress(60).await;
        let deadline = Instant::now() + PATIENCE;
        while !cluster.has_ended(0) {
            assert!(Instant::now() < deadline, "96 MB do not get full");
            // Through one that has space; a batch may be lost with a leader.
            fill(&cluster.client(1), 40, 100_000).await.ok();
        }
        let log = cluster.members[0].log_text().to_lowercase();
        assert!(log.contains("no space left on device"), "it does not say why it ended");
        recorder.progress(60).await;
        tmpfs.resize(800);
        cluster.run(0);
        cluster.wait_serving(0).await;
        recorder.progress(60).await;
        recorder.verify(&cluster, &[0, 1, 2]).await;
        drop(cluster);
        drop(tmpfs);
    });
}
