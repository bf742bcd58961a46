//! Runs a program under `ptrace` and notes what it does to the files of one directory.
//!
//! A filter in the kernel stops the program only at calls that change files, so reading and computing run at
//! full speed, and no library can go past it. Calls that change something run one at a time, whatever the
//! number of threads: their order in the log is the order in which they happened, and what a write has written
//! can be read back. Syncs may overlap with them, as on a real disk.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use libc::{c_int, c_long, pid_t};

use crate::MARK_FD;
use crate::log::{Event, Kind, Log, Name, Node, ROOT, Scope};
use crate::sparse::Sparse;
use crate::sys::{self, Stop};

/// The descriptor that stands for the working directory.
const HERE: i32 = libc::AT_FDCWD;

/// A program that is being traced. Dropping it kills the program and all processes it has started.
#[derive(Debug)]
pub struct Traced {
    pub stdin: Option<ChildStdin>,
    pub stdout: Option<ChildStdout>,
    pub stderr: Option<ChildStderr>,
    pid: pid_t,
    events: Arc<Mutex<Vec<Event>>>,
    tracer: Option<JoinHandle<io::Result<(Log, ExitStatus)>>>,
}

/// Starts `command`, whose program is given by its path, and notes what it and its children do to the files below `dir`, which stands for the disk:
/// what is there at the start counts as durable.
///
/// # Errors
/// If the program cannot be started or the system does not permit to trace it.
pub fn trace(mut command: Command, dir: &Path) -> io::Result<Traced> {
    let program = Path::new(command.get_program());
    // A program that cannot be executed could not report it: the filter stands between already.
    if !sys::executable(program) {
        let what = format!("{} is not the path of a program", program.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, what));
    }
    let dir = dir.canonicalize()?;
    let events = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&events);
    let (started, start) = mpsc::channel();
    // whoever starts a traced process is its tracer: that thread and no other
    let tracer = std::thread::Builder::new().name("tracer".into()).spawn(move || {
        let marks = sys::nameless_file()?;
        command.env(MARK_FD, marks.as_raw_fd().to_string());
        sys::traced(&mut command, &stops(), marks.as_raw_fd());
        let mut tracer = Tracer::new(&dir, File::from(marks), shared)?;
        let mut child = command.spawn().map_err(|error| {
            let hint = "a container must permit ptrace and seccomp filters";
            io::Error::new(error.kind(), format!("start a traced process: {error} ({hint})"))
        })?;
        let pid = child.id() as pid_t;
        // it stands at the start of its program, with all files closed that it should not have
        tracer.expect_start(pid)?;
        // a receiver that is gone has panicked, and says so itself
        let _ = started.send((pid, child.stdin.take(), child.stdout.take(), child.stderr.take()));
        let result = tracer.run(pid);
        if result.is_err() {
            // whatever is left of it would wait for ever
            sys::kill(pid);
        }
        Ok((tracer.into_log(), result?))
    })?;
    match start.recv() {
        Ok((pid, stdin, stdout, stderr)) => {
            Ok(Traced { stdin, stdout, stderr, pid, events, tracer: Some(tracer) })
        }
        Err(_) => Err(match tracer.join() {
            Ok(Err(error)) => error,
            Ok(Ok(_)) => io::Error::other("the tracer ended before it began"),
            Err(panic) => std::panic::resume_unwind(panic),
        }),
    }
}

impl Traced {
    /// The process that was started.
    pub fn id(&self) -> u32 {
        self.pid as u32
    }

    /// Puts a mark into the log: what has ended before this call stands before it.
    pub fn mark(&self, mark: &[u8]) {
        lock(&self.events).push(Event::Mark(mark.into()));
    }

    /// Ends the program as `kill -9` does.
    pub fn kill(&self) {
        sys::kill(self.pid);
    }

    /// Waits until the program and its children have ended.
    ///
    /// # Errors
    /// If the program did what cannot be traced (named), or tracing failed.
    pub fn wait(mut self) -> io::Result<(Log, ExitStatus)> {
        self.stdin = None;
        let tracer = self.tracer.take().expect("waiting happens once");
        tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if let Some(tracer) = self.tracer.take() {
            self.kill();
            // nobody is left who would want the log, or learn why there is none
            let _ = tracer.join();
        }
    }
}

fn lock(events: &Mutex<Vec<Event>>) -> MutexGuard<'_, Vec<Event>> {
    // pushing cannot leave the events half changed
    events.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The calls that change files, and those that would change them behind our back.
fn stops() -> Vec<Stop> {
    let always = [
        libc::SYS_openat2,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_pwritev2,
        libc::SYS_sendfile,
        libc::SYS_splice,
        libc::SYS_copy_file_range,
        libc::SYS_truncate,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_sync,
        libc::SYS_syncfs,
        libc::SYS_msync,
        libc::SYS_io_uring_setup,
        libc::SYS_io_submit,
        libc::SYS_ioctl,
    ];
    let mut stops: Vec<Stop> = always.map(|number| Stop { number, bits: None }).into();
    let create = (libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as u32;
    stops.push(Stop { number: libc::SYS_openat, bits: Some((2, create)) });
    stops.push(Stop { number: libc::SYS_mmap, bits: Some((3, libc::MAP_SHARED as u32)) });
    stops.push(Stop { number: libc::SYS_mprotect, bits: Some((2, libc::PROT_WRITE as u32)) });
    #[cfg(target_arch = "x86_64")]
    {
        let old = [
            libc::SYS_creat,
            libc::SYS_rename,
            libc::SYS_link,
            libc::SYS_unlink,
            libc::SYS_mkdir,
            libc::SYS_rmdir,
            libc::SYS_mknod,
            libc::SYS_symlink,
        ];
        stops.extend(old.map(|number| Stop { number, bits: None }));
        stops.push(Stop { number: libc::SYS_open, bits: Some((1, create)) });
    }
    stops
}

/// A file or directory below the watched one. Open as long as we trace, so that its inode number is not given
/// to another.
struct Known {
    handle: File,
    kind: Kind,
}

/// A part of a file in the memory of the program.
struct Mapping {
    address: u64,
    len: u64,
    file: Node,
    offset: u64,
}

/// A call between its start and its end: what to look at when it has ended.
enum Call {
    /// Writes at `offset`; `whole`: this many bytes, whatever the call answers.
    Write {
        file: Node,
        offset: u64,
        whole: Option<u64>,
        durable: bool,
        len: u64,
    },
    Resize {
        file: Node,
        from: u64,
    },
    /// Opens a file that may be new.
    Open {
        name: Option<Name>,
        shortened: Option<(Node, u64)>,
        nameless: bool,
    },
    Names(Vec<Name>),
    Sync {
        begin: usize,
    },
    Map {
        file: Node,
        len: u64,
        offset: u64,
        writable: bool,
    },
}

impl Call {
    fn changes(&self) -> bool {
        !matches!(self, Call::Sync { .. } | Call::Map { .. })
    }
}

/// What a call at its start turned out to be.
enum Start {
    /// Nothing of ours.
    Ignore,
    Follow(Call),
    /// Another call must end first.
    Wait,
}

struct Tracer {
    nodes: HashMap<(u64, u64), Node>,
    known: Vec<Known>,
    /// Where the program writes its marks: kept open until it has been started, and has inherited it.
    marks: File,
    events: Arc<Mutex<Vec<Event>>>,
    start: usize,
    /// Files that are mapped to be written, as they were when we last looked.
    shadows: HashMap<Node, Sparse>,
    mappings: Vec<Mapping>,
    calls: HashMap<pid_t, Call>,
    /// The thread whose call is changing something.
    changing: Option<pid_t>,
    /// Threads that want to change something meanwhile.
    waiting: VecDeque<pid_t>,
    threads: HashSet<pid_t>,
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn of_fd(pid: pid_t, fd: i32) -> PathBuf {
    format!("/proc/{pid}/fd/{fd}").into()
}

fn untraceable(what: &str) -> io::Error {
    io::Error::other(format!("the program does what is not traced: {what}"))
}

impl Tracer {
    fn new(dir: &Path, marks: File, events: Arc<Mutex<Vec<Event>>>) -> io::Result<Self> {
        let mut tracer = Tracer {
            nodes: HashMap::new(),
            known: Vec::new(),
            marks,
            events,
            start: 0,
            shadows: HashMap::new(),
            mappings: Vec::new(),
            calls: HashMap::new(),
            changing: None,
            waiting: VecDeque::new(),
            threads: HashSet::new(),
        };
        let root = tracer.learn(dir)?;
        assert!(root == ROOT, "the directory itself comes first");
        tracer.learn_below(root, dir)?;
        let begin = tracer.push(Event::SyncBegin(Scope::All));
        tracer.push(Event::SyncEnd(begin));
        tracer.start = begin + 2;
        Ok(tracer)
    }

    fn into_log(self) -> Log {
        let kinds = self.known.into_iter().map(|known| known.kind).collect();
        Log { kinds, events: std::mem::take(&mut lock(&self.events)), start: self.start }
    }

    /// Answers the place of the event.
    fn push(&self, event: Event) -> usize {
        let mut events = lock(&self.events);
        events.push(event);
        events.len() - 1
    }

    /// Makes a file or directory known, with its content.
    fn learn(&mut self, path: &Path) -> io::Result<Node> {
        let handle = File::open(path)?;
        let metadata = handle.metadata()?;
        let kind = if metadata.is_dir() {
            Kind::Dir
        } else if metadata.is_file() {
            Kind::File
        } else {
            return Err(untraceable(&format!("{} is neither file nor directory", path.display())));
        };
        let node = Node(self.known.len() as u32);
        if kind == Kind::File && metadata.len() > 0 {
            let mut data = vec![0; metadata.len() as usize];
            handle.read_exact_at(&mut data, 0)?;
            self.push(Event::Write { file: node, offset: 0, data: data.into(), durable: false });
        }
        self.nodes.insert(identity(&metadata), node);
        self.known.push(Known { handle, kind });
        Ok(node)
    }

    fn learn_below(&mut self, dir: Node, path: &Path) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let metadata = fs::symlink_metadata(entry.path())?;
            let known = self.nodes.get(&identity(&metadata)).copied();
            let node = match known {
                Some(node) => node,
                None if !metadata.is_file() && !metadata.is_dir() => {
                    return Err(untraceable(&format!("{} is special", entry.path().display())));
                }
                None => self.learn(&entry.path())?,
            };
            self.push(Event::Names(vec![(Name { dir, name: entry.file_name() }, Some(node))]));
            if metadata.is_dir() {
                self.learn_below(node, &entry.path())?;
            }
        }
        Ok(())
    }

    fn handle(&self, node: Node) -> &File {
        &self.known[node.0 as usize].handle
    }

    fn len(&self, file: Node) -> io::Result<u64> {
        Ok(self.handle(file).metadata()?.len())
    }

    /// The file behind a descriptor, if it is one of ours.
    fn node_of_fd(&self, pid: pid_t, fd: i32) -> Option<Node> {
        // a descriptor that is not open: the call will fail
        let metadata = fs::metadata(of_fd(pid, fd)).ok()?;
        self.nodes.get(&identity(&metadata)).copied()
    }

    /// The name that a path stands for, if its directory is one of ours.
    fn name(&self, pid: pid_t, fd: i32, address: u64) -> io::Result<Option<Name>> {
        let path = sys::read_path(pid, address)?;
        let mut full = match fd {
            HERE => format!("/proc/{pid}/cwd").into(),
            fd => of_fd(pid, fd),
        };
        // an absolute path replaces what is before it
        full.push(path);
        let (Some(parent), Some(name)) = (full.parent(), full.file_name()) else {
            return Ok(None);
        };
        let Ok(metadata) = fs::metadata(parent) else {
            return Ok(None);
        };
        let dir = self.nodes.get(&identity(&metadata)).copied();
        Ok(dir.map(|dir| Name { dir, name: name.into() }))
    }

    /// Where a name of ours is now.
    fn path(&self, name: &Name) -> PathBuf {
        let dir = self.handle(name.dir).as_raw_fd();
        PathBuf::from(format!("/proc/self/fd/{dir}")).join(&name.name)
    }

    fn metadata(&self, name: &Name) -> io::Result<Option<Metadata>> {
        match fs::symlink_metadata(self.path(name)) {
            Ok(metadata) => Ok(Some(metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the stop in which the process begins.
    fn expect_start(&mut self, first: pid_t) -> io::Result<()> {
        match sys::wait()? {
            Some((pid, status)) if pid == first && libc::WIFSTOPPED(status) => {
                self.threads.insert(pid);
                sys::follow(pid)?;
                Ok(())
            }
            other => Err(io::Error::other(format!("a traced process did not start: {other:?}"))),
        }
    }

    /// Lets `first` go, which stands at its start, and traces it and all that it starts; answers how it ended.
    fn run(&mut self, first: pid_t) -> io::Result<ExitStatus> {
        let mut ended = None;
        sys::resume(first, false, 0)?;
        while let Some((pid, status)) = sys::wait()? {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                if pid == first {
                    ended = Some(ExitStatus::from_raw(status));
                }
                self.threads.remove(&pid);
                self.calls.remove(&pid);
                self.waiting.retain(|other| *other != pid);
                if self.changing == Some(pid) {
                    self.changed()?;
                }
                continue;
            }
            let new = self.threads.insert(pid);
            let signal = libc::WSTOPSIG(status);
            match status >> 16 {
                libc::PTRACE_EVENT_SECCOMP => self.begin(pid)?,
                0 if signal == libc::SIGTRAP | 0x80 => {
                    self.end(pid)?;
                    sys::resume(pid, false, 0)?;
                }
                // the stop in which a thread or child begins
                0 if new && signal == libc::SIGSTOP => {
                    sys::resume(pid, self.calls.contains_key(&pid), 0)?;
                }
                0 => {
                    sys::resume(pid, self.calls.contains_key(&pid), signal)?;
                }
                // a thread or child was started, or another program
                _ => {
                    sys::resume(pid, false, 0)?;
                }
            }
        }
        ended.ok_or_else(|| io::Error::other("the traced process has vanished"))
    }

    fn begin(&mut self, pid: pid_t) -> io::Result<()> {
        let Some((number, arguments)) = sys::call(pid)? else {
            return Ok(());
        };
        let start = match self.start(pid, number, arguments) {
            // it was killed while we looked
            Err(_) if sys::call(pid)?.is_none() => return Ok(()),
            start => start?,
        };
        match start {
            Start::Ignore => {
                sys::resume(pid, false, 0)?;
            }
            Start::Wait => self.waiting.push_back(pid),
            Start::Follow(call) => {
                if call.changes() {
                    self.changing = Some(pid);
                }
                self.calls.insert(pid, call);
                sys::resume(pid, true, 0)?;
            }
        }
        Ok(())
    }

    /// The change under way is over: the next one may begin.
    fn changed(&mut self) -> io::Result<()> {
        self.changing = None;
        while self.changing.is_none() {
            let Some(next) = self.waiting.pop_front() else {
                break;
            };
            self.begin(next)?;
        }
        Ok(())
    }

    fn end(&mut self, pid: pid_t) -> io::Result<()> {
        let Some(call) = self.calls.remove(&pid) else {
            return Ok(());
        };
        let changes = call.changes();
        if let Some(Ok(result)) = sys::result(pid)? {
            if changes {
                self.look_at_mappings()?;
            }
            self.note(pid, call, result)?;
        }
        if changes {
            self.changed()?;
        }
        Ok(())
    }

    /// Writes through memory are seen only here: what a mapped file holds now and did not before.
    fn look_at_mappings(&mut self) -> io::Result<()> {
        for (&file, shadow) in &mut self.shadows {
            let handle = &self.known[file.0 as usize].handle;
            // a change of length is another call's, which notes it
            for (offset, data) in shadow.catch_up(handle)?.0 {
                lock(&self.events).push(Event::Write { file, offset, data, durable: false });
            }
        }
        Ok(())
    }

    fn sync(&mut self, scope: Scope) -> io::Result<Start> {
        self.look_at_mappings()?;
        Ok(Start::Follow(Call::Sync { begin: self.push(Event::SyncBegin(scope)) }))
    }

    /// What a call is about to do.
    fn start(&mut self, pid: pid_t, number: c_long, a: [u64; 6]) -> io::Result<Start> {
        let fd = |argument: usize| a[argument] as i32;
        let call = match number {
            libc::SYS_fsync | libc::SYS_fdatasync => {
                return match self.node_of_fd(pid, fd(0)) {
                    Some(node) => self.sync(Scope::Node(node)),
                    None => Ok(Start::Ignore),
                };
            }
            libc::SYS_sync | libc::SYS_syncfs => return self.sync(Scope::All),
            libc::SYS_msync => return self.start_msync(a),
            libc::SYS_mmap => {
                let flags = a[3] as c_int;
                let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
                let file = (shared && flags & libc::MAP_ANONYMOUS == 0)
                    .then(|| self.node_of_fd(pid, fd(4)))
                    .flatten();
                return Ok(match file {
                    Some(file) => Start::Follow(Call::Map {
                        file,
                        len: a[1],
                        offset: a[5],
                        writable: a[2] as c_int & libc::PROT_WRITE != 0,
                    }),
                    None => Start::Ignore,
                });
            }
            libc::SYS_mprotect => {
                let files: Vec<Node> = self
                    .mappings
                    .iter()
                    .filter(|m| a[0] < m.address + m.len && m.address < a[0] + a[1])
                    .map(|mapping| mapping.file)
                    .collect();
                for file in files {
                    self.shadow(file)?;
                }
                return Ok(Start::Ignore);
            }
            libc::SYS_io_uring_setup => return Err(untraceable("io_uring")),
            libc::SYS_io_submit => return Err(untraceable("io_submit")),
            libc::SYS_write if self.is_mark(pid, fd(0))? => {
                self.look_at_mappings()?;
                let mark = sys::read_memory(pid, a[1], a[2] as usize)?;
                self.push(Event::Mark(mark));
                return Ok(Start::Ignore);
            }
            libc::SYS_ioctl => {
                let clones = [libc::FICLONE as u32, libc::FICLONERANGE as u32];
                return match self.node_of_fd(pid, fd(0)) {
                    Some(_) if clones.contains(&(a[1] as u32)) => {
                        Err(untraceable("a clone of a file's blocks"))
                    }
                    _ => Ok(Start::Ignore),
                };
            }
            _ => self.start_change(pid, number, a)?,
        };
        Ok(match call {
            None => Start::Ignore,
            Some(_) if self.changing.is_some() => Start::Wait,
            Some(call) => Start::Follow(call),
        })
    }

    fn is_mark(&self, pid: pid_t, fd: i32) -> io::Result<bool> {
        let marks = identity(&self.marks.metadata()?);
        Ok(fs::metadata(of_fd(pid, fd)).is_ok_and(|metadata| identity(&metadata) == marks))
    }

    fn start_msync(&mut self, a: [u64; 6]) -> io::Result<Start> {
        if a[2] as c_int & libc::MS_SYNC == 0 {
            return Ok(Start::Ignore);
        }
        let found = self
            .mappings
            .iter()
            .rfind(|mapping| (mapping.address..mapping.address + mapping.len).contains(&a[0]));
        let Some(mapping) = found else {
            return Ok(Start::Ignore);
        };
        let from = mapping.offset + (a[0] - mapping.address);
        let scope = Scope::Range { file: mapping.file, from, to: from + a[1] };
        self.sync(scope)
    }

    /// A call that changes something of ours.
    fn start_change(&self, pid: pid_t, number: c_long, a: [u64; 6]) -> io::Result<Option<Call>> {
        let fd = |argument: usize| a[argument] as i32;
        let names = |places: &[(i32, usize)]| -> io::Result<Option<Call>> {
            let mut names = Vec::new();
            for &(fd, path) in places {
                names.extend(self.name(pid, fd, a[path])?);
            }
            Ok((!names.is_empty()).then_some(Call::Names(names)))
        };
        match number {
            libc::SYS_write | libc::SYS_writev => self.start_write(pid, fd(0), None, 0),
            libc::SYS_pwrite64 | libc::SYS_pwritev => self.start_write(pid, fd(0), Some(a[3]), 0),
            libc::SYS_pwritev2 => {
                // an offset of -1 stands for the file's position
                let offset = (a[3] as i64 != -1).then_some(a[3]);
                self.start_write(pid, fd(0), offset, a[5] as c_int)
            }
            libc::SYS_sendfile => self.start_write(pid, fd(0), None, 0),
            libc::SYS_copy_file_range | libc::SYS_splice => {
                let offset = match a[3] {
                    0 => None,
                    address => {
                        let bytes = sys::read_memory(pid, address, 8)?;
                        let bytes = bytes.try_into().map_err(|_| io::Error::other("an offset"))?;
                        Some(u64::from_ne_bytes(bytes))
                    }
                };
                self.start_write(pid, fd(2), offset, 0)
            }
            libc::SYS_ftruncate => {
                let Some(file) = self.node_of_fd(pid, fd(0)) else {
                    return Ok(None);
                };
                Ok(Some(Call::Resize { file, from: self.len(file)? }))
            }
            libc::SYS_truncate => {
                let Some(name) = self.name(pid, HERE, a[0])? else {
                    return Ok(None);
                };
                let Some(metadata) = self.metadata(&name)? else {
                    return Ok(None);
                };
                let file = self.nodes.get(&identity(&metadata)).copied();
                Ok(file.map(|file| Call::Resize { file, from: metadata.len() }))
            }
            libc::SYS_fallocate => self.start_fallocate(pid, a),
            libc::SYS_openat => self.start_open(pid, fd(0), a[1], a[2] as c_int),
            libc::SYS_openat2 => {
                let flags = sys::read_memory(pid, a[2], 8)?;
                let flags = flags.try_into().map_err(|_| io::Error::other("flags"))?;
                self.start_open(pid, fd(0), a[1], u64::from_ne_bytes(flags) as c_int)
            }
            libc::SYS_renameat | libc::SYS_renameat2 => names(&[(fd(0), 1), (fd(2), 3)]),
            libc::SYS_linkat => names(&[(fd(2), 3)]),
            libc::SYS_unlinkat | libc::SYS_mkdirat | libc::SYS_mknodat => names(&[(fd(0), 1)]),
            libc::SYS_symlinkat => names(&[(fd(1), 2)]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => self.start_open(pid, HERE, a[0], a[1] as c_int),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_creat => self.start_open(pid, HERE, a[0], libc::O_CREAT | libc::O_TRUNC),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rename => names(&[(HERE, 0), (HERE, 1)]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_link | libc::SYS_symlink => names(&[(HERE, 1)]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink | libc::SYS_rmdir | libc::SYS_mkdir | libc::SYS_mknod => {
                names(&[(HERE, 0)])
            }
            other => Err(io::Error::other(format!("a stop at system call {other}"))),
        }
    }

    fn start_write(
        &self,
        pid: pid_t,
        fd: i32,
        offset: Option<u64>,
        flags: c_int,
    ) -> io::Result<Option<Call>> {
        let Some(file) = self.node_of_fd(pid, fd) else {
            return Ok(None);
        };
        let about = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?;
        let field = |name: &str| {
            about
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
                .ok_or_else(|| io::Error::other(format!("no {name} of a descriptor")))
        };
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let opened = c_int::from_str_radix(field("flags:")?, 8).map_err(invalid)?;
        let len = self.len(file)?;
        // also a write at an offset goes to the end of a file that is opened so
        let append = opened & libc::O_APPEND != 0 || flags & libc::RWF_APPEND != 0;
        let offset = match offset {
            _ if append => len,
            Some(offset) => offset,
            None => field("pos:")?.parse().map_err(invalid)?,
        };
        // O_SYNC includes the bit of O_DSYNC
        let durable =
            opened & libc::O_DSYNC != 0 || flags & (libc::RWF_DSYNC | libc::RWF_SYNC) != 0;
        Ok(Some(Call::Write { file, offset, whole: None, durable, len }))
    }

    fn start_fallocate(&self, pid: pid_t, a: [u64; 6]) -> io::Result<Option<Call>> {
        let Some(file) = self.node_of_fd(pid, a[0] as i32) else {
            return Ok(None);
        };
        let len = self.len(file)?;
        let mode = a[1] as c_int;
        let zeroes = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !(zeroes | libc::FALLOC_FL_KEEP_SIZE) != 0 {
            return Err(untraceable(&format!("fallocate with mode {mode:#x}")));
        }
        Ok(Some(if mode & zeroes != 0 {
            Call::Write { file, offset: a[2], whole: Some(a[3]), durable: false, len }
        } else {
            Call::Resize { file, from: len }
        }))
    }

    fn start_open(&self, pid: pid_t, fd: i32, path: u64, flags: c_int) -> io::Result<Option<Call>> {
        if flags & libc::O_TMPFILE == libc::O_TMPFILE {
            return Ok(Some(Call::Open { name: None, shortened: None, nameless: true }));
        }
        let Some(name) = self.name(pid, fd, path)? else {
            return Ok(None);
        };
        let call = match self.metadata(&name)? {
            None if flags & libc::O_CREAT != 0 => {
                Call::Open { name: Some(name), shortened: None, nameless: false }
            }
            Some(metadata) if flags & libc::O_TRUNC != 0 && metadata.len() > 0 => {
                let file = self.nodes.get(&identity(&metadata)).copied();
                let shortened = file.map(|file| (file, metadata.len()));
                Call::Open { name: None, shortened, nameless: false }
            }
            _ => return Ok(None),
        };
        Ok(Some(call))
    }

    /// What a call that succeeded with `result` has done.
    fn note(&mut self, pid: pid_t, call: Call, result: u64) -> io::Result<()> {
        match call {
            Call::Write { file, offset, whole, durable, len } => {
                let now = self.len(file)?;
                let end = (offset + whole.unwrap_or(result)).min(now);
                if offset < end {
                    let mut data = vec![0; (end - offset) as usize];
                    self.handle(file).read_exact_at(&mut data, offset)?;
                    self.push(Event::Write { file, offset, data: data.into(), durable });
                }
                // zeros may reach beyond the end, which they need not move
                if whole.is_some() && now != len.max(end) {
                    self.push(Event::Resize { file, from: len.max(end), to: now });
                }
                self.follow_shadow(file)?;
            }
            Call::Resize { file, from } => {
                let to = self.len(file)?;
                if from != to {
                    self.push(Event::Resize { file, from, to });
                }
                self.follow_shadow(file)?;
            }
            Call::Open { name, shortened, nameless } => {
                if let Some((file, from)) = shortened {
                    self.push(Event::Resize { file, from, to: 0 });
                    self.follow_shadow(file)?;
                }
                if let Some(name) = name {
                    self.names(vec![name])?;
                }
                if nameless {
                    let path = of_fd(pid, result as i32);
                    let metadata = fs::metadata(&path)?;
                    let ours = self.known[ROOT.0 as usize].handle.metadata()?.dev();
                    if metadata.dev() == ours && !self.nodes.contains_key(&identity(&metadata)) {
                        self.learn(&path)?;
                    }
                }
            }
            Call::Names(names) => self.names(names)?,
            Call::Sync { begin } => {
                self.push(Event::SyncEnd(begin));
            }
            Call::Map { file, len, offset, writable } => {
                self.mappings.push(Mapping { address: result, len, file, offset });
                if writable {
                    self.shadow(file)?;
                }
            }
        }
        Ok(())
    }

    /// Notes what names stand for now.
    fn names(&mut self, names: Vec<Name>) -> io::Result<()> {
        let mut now = Vec::with_capacity(names.len());
        for name in names {
            let node = match self.metadata(&name)? {
                None => None,
                Some(metadata) => match self.nodes.get(&identity(&metadata)) {
                    Some(node) => Some(*node),
                    None if metadata.is_file() || metadata.is_dir() => {
                        let path = self.path(&name);
                        let node = self.learn(&path)?;
                        if metadata.is_dir() {
                            self.learn_below(node, &path)?;
                        }
                        Some(node)
                    }
                    None => {
                        return Err(untraceable(&format!("{} is special", name.name.display())));
                    }
                },
            };
            now.push((name, node));
        }
        self.push(Event::Names(now));
        Ok(())
    }

    /// From now on, writes to the file through memory are looked for.
    fn shadow(&mut self, file: Node) -> io::Result<()> {
        if !self.shadows.contains_key(&file) {
            let mut shadow = Sparse::default();
            shadow.catch_up(self.handle(file))?;
            self.shadows.insert(file, shadow);
        }
        Ok(())
    }

    /// A call has changed the file and its event is in the log: a mapping has not.
    fn follow_shadow(&mut self, file: Node) -> io::Result<()> {
        if let Some(shadow) = self.shadows.get_mut(&file) {
            shadow.catch_up(&self.known[file.0 as usize].handle)?;
        }
        Ok(())
    }
}
