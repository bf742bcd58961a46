//! Takes the power away from a program, as often as one wants.
//!
//! [`trace`] runs a program, in whatever language it is written, and notes in a [`Log`] all that it does to
//! the files below a directory: writes (also through memory maps), changes of length, names that are
//! created, renamed and removed, and which of these it syncs. [`Log::image`] then builds what a disk may
//! hold after a loss of power at any place of the log; the same program is started on that and has to find
//! everything that it had reported as durable, which it tells by [`mark`].
//!
//! # The disk
//!
//! | | |
//! |---|---|
//! | `fsync`, `fdatasync`, `msync(MS_SYNC)` of a range | the bytes and the length of the file are on disk when it returns |
//! | a write to a file opened with `O_DSYNC` or `O_SYNC` | its own bytes are on disk when it returns |
//! | `fsync` of a directory | its names are on disk when it returns; see [`Metadata`] |
//! | `sync`, `syncfs` | everything is on disk when it returns |
//! | `sync_file_range`, `msync(MS_ASYNC)` | nothing |
//! | what was written and not synced | any subset survives, whatever the order; of a longer write any of its sectors of 512 bytes; the length can survive without the bytes, which then are zeros |
//! | a sector | one of the versions it had since its last sync, never a mix; nor garbage: damage to a file at rest is another subject |
//! | shortening a file | is done before anything later of the same file |
//!
//! A call that is under way when the power goes counts as not synced. A sync covers what had ended before it
//! began. Whatever the log cannot show ends the trace with an error: `io_uring`, cloned blocks, symbolic links.
//!
//! Linux on x86-64 and aarch64; `ptrace` and seccomp filters of own children must be permitted, as they are by
//! default in containers. Where they are not, [`trace`] fails and says so.

mod rng;

#[cfg(target_os = "linux")]
mod image;
#[cfg(target_os = "linux")]
mod log;
#[cfg(target_os = "linux")]
mod sparse;
#[cfg(target_os = "linux")]
mod sys;
#[cfg(target_os = "linux")]
mod tracer;

pub use rng::Rng;

#[cfg(target_os = "linux")]
pub use self::{
    image::{Fates, Metadata},
    log::Log,
    tracer::{Traced, trace},
};

/// Tells the traced program where its marks go.
#[cfg(target_os = "linux")]
const MARK_FD: &str = "POWERLOSS_MARK_FD";

/// Puts a mark into the log of whoever traces this process: what has returned before this call stands before
/// the mark. Nothing happens if nobody does.
///
/// # Panics
/// If the mark cannot be written: a test must not go on without it.
pub fn mark(mark: &[u8]) {
    #[cfg(target_os = "linux")]
    if let Ok(fd) = std::env::var(MARK_FD) {
        let fd: std::os::fd::RawFd = fd.parse().expect("the number of a descriptor");
        sys::write(&fd, mark).expect("a mark is written");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = mark;
}
