//! A disk that a test can fill.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory, for as long as this lives.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` where this process may not mount.
    pub fn mount(at: &Path, megabytes: u64) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={megabytes}m,mode=0700");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Tmpfs(at.to_path_buf()))
    }

    pub fn resize(&self, megabytes: u64) {
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
