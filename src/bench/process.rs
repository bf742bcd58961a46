//! What a process has cost so far: CPU time and resident memory, read from /proc.

use std::time::Duration;
use std::{fs, io};

use nix::sys::resource::{UsageWho, getrusage};

/// The kernel gives a process's times in this unit, on every architecture in use (`USER_HZ`).
const TICKS_PER_SECOND: u64 = 100;

/// Why a process cannot be read.
#[derive(thiserror::Error, Debug)]
pub enum ProcessError {
    #[error("cannot read {path} (is the process still running?): {source}")]
    Read { path: String, source: io::Error },
    #[error("{path} does not hold {what}")]
    Format { path: String, what: &'static str },
}

/// The cost of one or several processes, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// User and system time since the process began, in steps of 10 ms.
    pub cpu: Duration,
    /// Resident set now.
    pub rss_bytes: u64,
    /// Largest resident set so far.
    pub rss_max_bytes: u64,
}

/// The usage of all `pids` together.
///
/// # Errors
/// If one of them does not exist or the system has no /proc.
pub fn usage(pids: &[u32]) -> Result<Usage, ProcessError> {
    let mut sum = Usage::default();
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = read(&path)?;
        sum.cpu += cpu(&stat).ok_or(ProcessError::Format { path, what: "utime and stime" })?;
        let path = format!("/proc/{pid}/status");
        let status = read(&path)?;
        let field = |name, what| {
            kib(&status, name).ok_or_else(|| ProcessError::Format { path: path.clone(), what })
        };
        sum.rss_bytes += field("VmRSS:", "VmRSS")? * 1024;
        sum.rss_max_bytes += field("VmHWM:", "VmHWM")? * 1024;
    }
    Ok(sum)
}

/// User and system time of this process.
pub fn own_cpu() -> Duration {
    let usage =
        getrusage(UsageWho::RUSAGE_SELF).expect("getrusage of oneself takes no bad argument");
    [usage.user_time(), usage.system_time()]
        .iter()
        .map(|time| {
            Duration::from_secs(time.tv_sec() as u64) + Duration::from_micros(time.tv_usec() as u64)
        })
        .sum()
}

/// User and system time of the calling thread.
pub fn thread_cpu() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("every thread has this clock")
        .into()
}

/// Bytes that this process has caused to be written to a disk; `None` where the system does not count them.
pub fn own_disk_writes() -> Option<u64> {
    let io = fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("write_bytes:"))?.trim().parse().ok()
}

/// What a process holds in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub rss_bytes: u64,
    /// 0 where the system does not tell it.
    pub pss_bytes: u64,
    /// Of the resident set, what is no file's.
    pub anonymous_bytes: u64,
}

/// The memory of a process.
///
/// # Errors
/// If it does not exist or the system has no /proc.
pub fn memory(pid: u32) -> Result<Memory, ProcessError> {
    let path = format!("/proc/{pid}/status");
    let status = read(&path)?;
    let field = |name, what| {
        kib(&status, name).ok_or_else(|| ProcessError::Format { path: path.clone(), what })
    };
    let (rss, anonymous) = (field("VmRSS:", "VmRSS")?, field("RssAnon:", "RssAnon")?);
    // It may be forbidden where the status is not.
    let rollup = read(&format!("/proc/{pid}/smaps_rollup")).ok();
    let pss = rollup.and_then(|text| kib(&text, "Pss:")).unwrap_or(0);
    Ok(Memory { rss_bytes: rss * 1024, pss_bytes: pss * 1024, anonymous_bytes: anonymous * 1024 })
}

fn read(path: &str) -> Result<String, ProcessError> {
    let bytes =
        fs::read(path).map_err(|source| ProcessError::Read { path: path.into(), source })?;
    // A process names itself, in any encoding.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Fields 14 and 15 of `/proc/<pid>/stat`. Field 2 is the name in parentheses and may itself hold
/// blanks and parentheses, so the count starts after the last of them.
fn cpu(stat: &str) -> Option<Duration> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * (1000 / TICKS_PER_SECOND)))
}

fn kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1 4194560 100 0 0 0 150 25 0 0 20 0 9 0 1 2 3";
        assert_eq!(cpu(stat), Some(Duration::from_millis(1750)));
        assert_eq!(cpu("42 (a) S 1"), None);
    }

    #[test]
    fn memory_is_found_by_name() {
        let status = "Name:\tetcd\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n";
        assert_eq!(kib(status, "VmRSS:"), Some(1024));
        assert_eq!(kib(status, "VmHWM:"), Some(2048));
        assert_eq!(kib(status, "VmSwap:"), None);
    }

    #[test]
    fn this_process_can_be_read_and_none_is_missed() {
        let one = usage(&[std::process::id()]).unwrap();
        assert!(one.rss_bytes > 0 && one.rss_max_bytes >= one.rss_bytes, "{one:?}");
        assert!(own_cpu() > Duration::ZERO);
        assert!(
            thread_cpu() > Duration::ZERO && thread_cpu() <= own_cpu() + Duration::from_millis(1)
        );
        let held = memory(std::process::id()).unwrap();
        assert!(held.anonymous_bytes > 0 && held.anonymous_bytes <= held.rss_bytes, "{held:?}");
        // Process numbers end at 2^22.
        let error = usage(&[u32::MAX]).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /proc/4294967295/stat"), "{error}");
    }
}
