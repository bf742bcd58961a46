//! The machine in general terms, and the room on its disk. Nothing here names it.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::report::model::Machine;

/// The machine, with the file system that `dir` is on.
pub fn describe(dir: &Path) -> Machine {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let (kernel, architecture) = match nix::sys::utsname::uname() {
        Ok(name) => {
            // Behind the numbers stands who built it.
            let release = name.release().to_string_lossy();
            let numbers: String =
                release.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
            let kernel = format!("{} {numbers}", name.sysname().to_string_lossy());
            (kernel, name.machine().to_string_lossy().into_owned())
        }
        Err(_) => (std::env::consts::OS.to_owned(), std::env::consts::ARCH.to_owned()),
    };
    Machine {
        cores,
        memory_bytes: meminfo("MemTotal:").unwrap_or(0),
        kernel,
        architecture,
        file_system: file_system(dir).unwrap_or_else(|| "an unknown file system".to_owned()),
    }
}

/// Bytes of memory that processes can still have.
pub fn memory_available() -> Option<u64> {
    meminfo("MemAvailable:")
}

fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Bytes that can be written to the file system of `dir` without privileges.
///
/// # Errors
/// If the directory is not there.
pub fn disk_free(dir: &Path) -> io::Result<u64> {
    let stat = statvfs(dir)?;
    Ok(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}

/// The kind of the file system that `dir` is on: of all mounts that it lies below, that of the longest path,
/// and of two on one path the later.
fn file_system(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    kind_of(&fs::read_to_string("/proc/self/mounts").ok()?, &dir)
}

fn kind_of(mounts: &str, dir: &Path) -> Option<String> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            // A blank in a path is written as \040.
            let point = fields.next()?.replace("\\040", " ");
            Some((point, fields.next()?))
        })
        .filter(|(point, _)| dir.starts_with(point))
        .max_by_key(|(point, _)| point.len())
        .map(|(_, kind)| kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /dev tmpfs rw 0 0\n\
                      tmpfs /dev/shm\\040x tmpfs rw 0 0\n/dev/b /data xfs rw 0 0\n\
                      /dev/c /data btrfs rw 0 0\n";
        let kind = |dir| kind_of(mounts, Path::new(dir)).unwrap();
        assert_eq!([kind("/home/a"), kind("/data/x")], ["ext4", "btrfs"]);
        assert_eq!([kind("/database"), kind("/dev/shm x/y")], ["ext4", "tmpfs"]);
    }

    #[test]
    fn this_machine_has_cores_memory_and_room() {
        let dir = tempfile::tempdir().unwrap();
        let machine = describe(dir.path());
        assert!(machine.cores > 0 && machine.memory_bytes > 1 << 20, "{machine:?}");
        assert!(memory_available().unwrap() <= machine.memory_bytes);
        assert!(disk_free(dir.path()).unwrap() > 0);
        assert!(disk_free(&dir.path().join("absent")).is_err());
    }
}
