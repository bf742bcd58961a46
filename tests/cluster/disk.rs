//! One member's disk is full: it stops, the others go on, and with space again it is as good as they.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::record::{Load, Recorder};
use crate::rig::PATIENCE;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::process::Program;
use crate::scenario::{fill, with_own_cluster};

/// A file system in memory, for as long as this lives.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` where this process may not mount.
    fn mount(at: &Path, megabytes: u64) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={megabytes}m,mode=0700");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Tmpfs(at.to_path_buf()))
    }

    fn resize(&self, megabytes: u64) {
        let size = format!("remount,size={megabytes}m");
        let status = Command::new("mount").args(["-o", &size]).arg(&self.0).status().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, should a process still have files there; nothing else can be done about a failure.
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

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
