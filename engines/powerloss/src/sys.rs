//! The system calls of a tracer, each wrapped.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr::null_mut;

use libc::{c_int, c_long, c_void, pid_t};

fn check(result: c_long) -> io::Result<c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A system call that stops the program: always, or only if its argument has one of the bits.
#[derive(Clone, Copy)]
pub(crate) struct Stop {
    pub(crate) number: c_long,
    pub(crate) bits: Option<(u32, u32)>,
}

/// The program for the kernel that stops at the calls and lets all others run at full speed.
fn filter(stops: &[Stop]) -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const NUMBER_AT: u32 = 0;
    const ARGUMENTS_AT: u32 = 16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let allow = step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);
    let trace = step(RETURN, 0, 0, libc::SECCOMP_RET_TRACE);
    let mut program = vec![step(LOAD, 0, 0, NUMBER_AT)];
    for stop in stops {
        let number = stop.number as u32;
        match stop.bits {
            None => program.extend([step(EQUAL, 0, 1, number), trace]),
            Some((argument, bits)) => program.extend([
                step(EQUAL, 0, 4, number),
                // the low half: both architectures have it first
                step(LOAD, 0, 0, ARGUMENTS_AT + 8 * argument),
                step(ANY_BIT, 0, 1, bits),
                trace,
                allow,
            ]),
        }
    }
    program.push(allow);
    program
}

/// Makes `command` start a process that is traced by the thread that spawns it, stops at `stops`, and
/// inherits `keep` open.
pub(crate) fn traced(command: &mut Command, stops: &[Stop], keep: RawFd) {
    let mut program = filter(stops);
    let prepare = move || {
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: plain system calls, with a program that lives until they return
        unsafe {
            check(libc::fcntl(keep, libc::F_SETFD, 0).into())?;
            check(libc::ptrace(libc::PTRACE_TRACEME as _, 0, 0, 0))?;
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
            check(
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
                    .into(),
            )?;
        }
        Ok(())
    };
    // SAFETY: `prepare` makes only system calls: it allocates nothing and takes no lock
    unsafe { command.pre_exec(prepare) };
}

/// Waits for any process or thread that this thread traces: which, and its status as of `waitpid`.
/// `None`: there is none left.
pub(crate) fn wait() -> io::Result<Option<(pid_t, c_int)>> {
    let mut status = 0;
    loop {
        // SAFETY: the status is ours
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        match check(pid.into()) {
            Ok(_) => return Ok(Some((pid, status))),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::ECHILD) => return Ok(None),
                _ => return Err(error),
            },
        }
    }
}

/// `false`: the process has been killed meanwhile.
fn still_there(result: c_long) -> io::Result<bool> {
    match check(result) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
}

pub(crate) fn follow(pid: pid_t) -> io::Result<bool> {
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACESECCOMP
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    // SAFETY: no memory is involved
    still_there(unsafe {
        libc::ptrace(libc::PTRACE_SETOPTIONS as _, pid, null_mut::<c_void>(), options as usize)
    })
}

/// Lets a stopped thread go on, up to the end of its system call or its next stop, with a signal (0: none).
pub(crate) fn resume(pid: pid_t, to_end_of_call: bool, signal: c_int) -> io::Result<bool> {
    let request = if to_end_of_call { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT };
    // SAFETY: no memory is involved
    still_there(unsafe { libc::ptrace(request as _, pid, null_mut::<c_void>(), signal as usize) })
}

/// The kernel's `struct ptrace_syscall_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    op: u8,
    _reserved: u8,
    _flags: u16,
    _arch: u32,
    _instruction: u64,
    _stack: u64,
    /// At the start of a call: its number and arguments. At the end: the result, and whether it is an error.
    words: [u64; 8],
}

fn info(pid: pid_t) -> io::Result<Option<Info>> {
    let mut info = Info::default();
    // SAFETY: the kernel writes at most the size that it is told
    let there = still_there(unsafe {
        libc::ptrace(
            libc::PTRACE_GET_SYSCALL_INFO as _,
            pid,
            size_of::<Info>(),
            &raw mut info as *mut c_void,
        )
    })?;
    Ok(there.then_some(info))
}

/// The call at whose start a thread stands.
pub(crate) fn call(pid: pid_t) -> io::Result<Option<(c_long, [u64; 6])>> {
    const SECCOMP: u8 = 3;
    let Some(info) = info(pid)? else {
        return Ok(None);
    };
    if info.op != SECCOMP {
        return Err(io::Error::other(format!("a stop of kind {} instead of a filter's", info.op)));
    }
    let mut arguments = [0; 6];
    arguments.copy_from_slice(&info.words[1..7]);
    Ok(Some((info.words[0] as c_long, arguments)))
}

/// The result of the call at whose end a thread stands; `Err` within: the call failed.
pub(crate) fn result(pid: pid_t) -> io::Result<Option<Result<u64, ()>>> {
    const EXIT: u8 = 2;
    let Some(info) = info(pid)? else {
        return Ok(None);
    };
    if info.op != EXIT {
        return Err(io::Error::other(format!("a stop of kind {} instead of an exit's", info.op)));
    }
    // the flag is one byte; what follows it is padding
    let failed = info.words[1].to_le_bytes()[0] != 0;
    Ok(Some(if failed { Err(()) } else { Ok(info.words[0]) }))
}

/// Reads memory of another process: as much of it as there is.
pub(crate) fn read_memory(pid: pid_t, address: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0_u8; len];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: len };
    // SAFETY: the local buffer has `len` bytes; the kernel checks the other address
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    bytes.truncate(check(read as c_long)? as usize);
    Ok(bytes)
}

/// Reads a path out of another process.
pub(crate) fn read_path(pid: pid_t, address: u64) -> io::Result<OsString> {
    const PAGE: u64 = 4096;
    let mut path = Vec::new();
    while path.len() <= libc::PATH_MAX as usize {
        // never across a page, of which the next may not be there
        let at = address + path.len() as u64;
        let bytes = read_memory(pid, at, (PAGE - at % PAGE) as usize)?;
        if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
            path.extend_from_slice(&bytes[..end]);
            return Ok(OsString::from_vec(path));
        }
        path.extend_from_slice(&bytes);
    }
    Err(io::Error::other("a path without an end"))
}

/// A file without a name, that closes on exec.
pub(crate) fn nameless_file() -> io::Result<OwnedFd> {
    let name = CString::from(c"marks");
    // SAFETY: the name ends with a zero; the descriptor is new and ours
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        check(fd.into())?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

pub(crate) fn write(fd: &impl AsRawFd, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the buffer has that many bytes
    let written = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
    match check(written as c_long)? {
        len if len as usize == bytes.len() => Ok(()),
        len => Err(io::Error::other(format!("{len} of {} bytes written", bytes.len()))),
    }
}

/// Whether `path` is a file that may be executed.
pub(crate) fn executable(path: &Path) -> bool {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: the name ends with a zero
    path.is_file() && unsafe { libc::access(name.as_ptr(), libc::X_OK) } == 0
}

pub(crate) fn kill(pid: pid_t) {
    // SAFETY: no memory is involved. The process may be gone, which is as good.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}
