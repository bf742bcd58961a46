//! What the operating system says about this process, read when scraped.

use std::fs;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike;

use super::Metrics;

/// Clock ticks per second in /proc: 100 on every Linux that user space sees.
const TICKS_PER_SECOND: f64 = 100.0;

/// File descriptors of this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenFiles {
    pub used: u64,
    /// The soft limit.
    pub limit: u64,
}

impl OpenFiles {
    /// Counts now.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub fn count() -> std::io::Result<OpenFiles> {
        // The listing itself holds one more open.
        let used = (fs::read_dir("/proc/self/fd")?.count() as u64).saturating_sub(1);
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(OpenFiles { used, limit })
    }
}

/// Memory of this process in RAM, in bytes; 0 if /proc does not tell.
pub fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status_field(&status, "VmRSS:").map_or(0, |kib| kib as u64 * 1024)
}

impl Metrics {
    /// Reads the process's numbers. One that the system does not tell keeps its last value.
    pub(super) fn refresh_process(&self) {
        if let Ok(files) = OpenFiles::count() {
            self.fd_used.set(files.used as f64);
            self.fd_limit.set(files.limit as f64);
            self.process_open_fds.set(files.used as f64);
            self.process_max_fds.set(files.limit as f64);
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let us = (usage.user_time() + usage.system_time()).num_microseconds();
            self.process_cpu_seconds.set(us as f64 / 1e6);
        }
        if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_AS) {
            self.process_virtual_max_bytes.set(limit as f64);
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            if let Some(kib) = status_field(&status, "VmRSS:") {
                self.process_resident_bytes.set(kib * 1024.0);
            }
            if let Some(kib) = status_field(&status, "VmSize:") {
                self.process_virtual_bytes.set(kib * 1024.0);
            }
            if let Some(threads) = status_field(&status, "Threads:") {
                self.threads.set(threads);
            }
        }
        if let (Ok(own), Ok(system)) =
            (fs::read_to_string("/proc/self/stat"), fs::read_to_string("/proc/stat"))
            && let (Some(ticks), Some(boot)) = (start_ticks(&own), status_field(&system, "btime"))
        {
            self.process_start_time.set(boot + ticks / TICKS_PER_SECOND);
        }
        if let Ok(netstat) = fs::read_to_string("/proc/self/net/netstat") {
            if let Some(bytes) = netstat_field(&netstat, "InOctets") {
                self.process_network_received.set(bytes);
            }
            if let Some(bytes) = netstat_field(&netstat, "OutOctets") {
                self.process_network_sent.set(bytes);
            }
        }
    }
}

/// The number after the word `name` at the start of a line.
fn status_field(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Field 22 of /proc/PID/stat. The second one is the program's name in parentheses, which may
/// itself hold spaces and parentheses.
fn start_ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(22 - 3)?.parse().ok()
}

/// A number of the `IpExt` pair of lines, the first of which holds the names.
fn netstat_field(text: &str, name: &str) -> Option<f64> {
    let mut lines = text.lines().filter_map(|l| l.strip_prefix("IpExt:"));
    let column = lines.next()?.split_whitespace().position(|n| n == name)?;
    lines.next()?.split_whitespace().nth(column)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_read_by_field() {
        let status = "Name:\tVmRSS: x\nVmSize:\t  8192 kB\nVmRSS:\t    2048 kB\nThreads:\t7\n";
        assert_eq!(status_field(status, "VmRSS:"), Some(2048.0));
        assert_eq!(status_field(status, "Threads:"), Some(7.0));
        assert_eq!(status_field(status, "VmSwap:"), None);
        let stat = "42 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(start_ticks(stat), Some(4711.0));
        assert_eq!(start_ticks("42 (short) S 1"), None);
        let netstat =
            "TcpExt: A B\nTcpExt: 1 2\nIpExt: InNoRoutes InOctets OutOctets\nIpExt: 0 10 20\n";
        assert_eq!(netstat_field(netstat, "InOctets"), Some(10.0));
        assert_eq!(netstat_field(netstat, "OutOctets"), Some(20.0));
        assert_eq!(netstat_field("TcpExt: InOctets\nTcpExt: 1\n", "InOctets"), None);
    }

    #[test]
    fn an_open_file_is_counted() {
        let before = OpenFiles::count().expect("proc is mounted");
        let files: Vec<_> = (0..20).map(|_| fs::File::open("/dev/null").expect("opens")).collect();
        let after = OpenFiles::count().expect("proc is mounted");
        // Other tests open and close files meanwhile, but not this many.
        assert!(after.used >= before.used + 10, "{before:?} {after:?}");
        assert!(after.used < after.limit);
        drop(files);
    }
}
