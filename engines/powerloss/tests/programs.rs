//! Programs that are careful with their files, and some that are not: the first must never be caught, the
//! others must.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{ptr, thread};

use engine_powerloss::{Fates, Log, Metadata, Rng, mark, trace};

const DIR: &str = "POWERLOSS_TEST_DIR";
const PROGRAM: &str = "POWERLOSS_TEST_PROGRAM";

/// The programs; each is run in its own process with a directory of its own.
const PROGRAMS: &[(&str, fn(&Path))] = &[
    ("forgets to sync", |dir| {
        fs::write(dir.join("file"), NEW).unwrap();
        sync(dir);
        mark(b"done");
    }),
    ("syncs the file only", |dir| {
        write_synced(&dir.join("file"));
        mark(b"done");
    }),
    ("syncs", |dir| {
        write_synced(&dir.join("file"));
        sync(dir);
        mark(b"done");
    }),
    ("syncs before it writes", |dir| {
        let file = File::create(dir.join("file")).unwrap();
        sync(dir);
        file.sync_all().unwrap();
        file.write_all_at(NEW, 0).unwrap();
        mark(b"done");
    }),
    ("renames", |dir| {
        write_synced(&dir.join("file.new"));
        fs::rename(dir.join("file.new"), dir.join("file")).unwrap();
        // brings the names along only where a journal keeps them in order
        write_synced(&dir.join("other"));
        mark(b"done");
    }),
    ("renames and syncs", |dir| {
        write_synced(&dir.join("file.new"));
        fs::rename(dir.join("file.new"), dir.join("file")).unwrap();
        sync(dir);
        mark(b"done");
    }),
    ("renames what is not synced", |dir| {
        fs::write(dir.join("file.new"), NEW).unwrap();
        fs::rename(dir.join("file.new"), dir.join("file")).unwrap();
        sync(dir);
        mark(b"done");
    }),
    ("overwrites", |dir| {
        let file = OpenOptions::new().write(true).open(dir.join("file")).unwrap();
        file.write_all_at(NEW, 0).unwrap();
        mark(b"done");
    }),
    ("writes through", |dir| {
        let mut options = OpenOptions::new();
        options.create(true).append(true).custom_flags(libc::O_DSYNC);
        let mut file = options.open(dir.join("file")).unwrap();
        sync(dir);
        for part in NEW.chunks(700) {
            file.write_all(part).unwrap();
        }
        mark(b"done");
    }),
    ("writes by system calls", |dir| {
        let file = File::create(dir.join("file")).unwrap();
        sync(dir);
        let part = libc::iovec { iov_base: NEW.as_ptr() as *mut _, iov_len: NEW.len() };
        // SAFETY: the vector has one part, which is there
        let written = unsafe {
            let fd = file.as_raw_fd();
            libc::syscall(libc::SYS_pwritev2, fd, &raw const part, 1, 0, 0, libc::RWF_DSYNC)
        };
        assert_eq!(written, NEW.len() as i64);
        mark(b"done");
    }),
    ("writes to memory", |dir| {
        through_memory(dir, |_, _| {});
        mark(b"done");
    }),
    ("writes to memory and syncs", |dir| {
        through_memory(dir, |at, len| {
            // SAFETY: the mapping is there
            let result = unsafe { libc::msync(at, len, libc::MS_SYNC) };
            assert_eq!(result, 0);
        });
        mark(b"done");
    }),
    ("writes with threads", |dir| {
        thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for n in 0..10 {
                        write_synced(&dir.join(format!("{thread} {n}")));
                        sync(dir);
                        mark(format!("{thread} {n}").as_bytes());
                    }
                });
            }
        });
    }),
    ("does anything", |dir| {
        let seed = fs::read_to_string(dir.join("seed")).unwrap().parse().unwrap();
        anything(dir, &mut Rng::new(seed));
        // SAFETY: no memory is involved
        unsafe { libc::sync() };
    }),
    ("traces", |dir| {
        // a process has one tracer, which this one and its children have already
        let error = trace(Command::new("/bin/true"), dir).unwrap_err();
        assert!(error.to_string().contains("must permit ptrace"), "{error}");
    }),
    ("waits", |dir| {
        write_synced(&dir.join("file"));
        sync(dir);
        println!("\nready");
        loop {
            thread::park();
        }
    }),
];

const OLD: &[u8] = &[1; 5_000];
const NEW: &[u8] = &[2; 5_000];

fn sync(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

fn write_synced(path: &Path) {
    fs::write(path, NEW).unwrap();
    sync(path);
}

fn through_memory(dir: &Path, finish: impl FnOnce(*mut libc::c_void, usize)) {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(true).open(dir.join("file"));
    let file = file.unwrap();
    file.set_len(NEW.len() as u64).unwrap();
    file.sync_all().unwrap();
    sync(dir);
    // first only to be read, as some do
    // SAFETY: the file is as long as the mapping, and nobody else has it
    unsafe {
        let (fd, len) = (file.as_raw_fd(), NEW.len());
        let at = libc::mmap(ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        assert_ne!(at, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(at, len, libc::PROT_READ | libc::PROT_WRITE), 0);
        ptr::copy_nonoverlapping(NEW.as_ptr(), at.cast(), len);
        finish(at, len);
    }
}

/// Changes of every kind that is traced, at random.
fn anything(dir: &Path, rng: &mut Rng) {
    fs::create_dir(dir.join("below")).unwrap();
    for _ in 0..150 {
        let places = [dir.to_path_buf(), dir.join("below")];
        let mut pick = || places[rng.below(2) as usize].join(format!("f{}", rng.below(5)));
        let (path, other) = (pick(), pick());
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let opened = options.open(&path);
        let len = rng.below(9_000);
        let data = rng.bytes(rng.clone().below(6_000) as usize);
        match (rng.below(13), opened) {
            (0, _) => fs::write(&path, data).unwrap(),
            (1, _) => {
                let file = OpenOptions::new().create(true).append(true).open(&path);
                file.unwrap().write_all(&data).unwrap();
            }
            (2, Ok(_)) => fs::rename(&path, &other).unwrap(),
            (3, Ok(_)) => fs::remove_file(&path).unwrap(),
            (4, Ok(file)) => file.set_len(len).unwrap(),
            (5, Ok(file)) => file.write_all_at(&data, len).unwrap(),
            (6, Ok(mut file)) => {
                file.seek(SeekFrom::Start(len)).unwrap();
                file.write_all(&data).unwrap();
                file.write_all(&data).unwrap();
            }
            (7, Ok(_)) if !other.exists() => fs::hard_link(&path, &other).unwrap(),
            (8, Ok(_)) if path != other => {
                fs::copy(&path, &other).map(drop).unwrap();
            }
            (9, Ok(file)) => {
                for (mode, at) in [
                    (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, len / 2),
                    (0, len),
                    (libc::FALLOC_FL_ZERO_RANGE, len * 2),
                ] {
                    // SAFETY: no memory is involved. Not every file system can do it all.
                    unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, 700) };
                }
            }
            (10, Ok(_)) => {
                let moved = dir.join("moved");
                fs::rename(dir.join("below"), &moved).unwrap();
                fs::rename(moved, dir.join("below")).unwrap();
            }
            (11, Ok(file)) if file.metadata().unwrap().len() > 0 => {
                let len = file.metadata().unwrap().len() as usize;
                // SAFETY: the mapping is as long as the file, which nobody else has
                unsafe {
                    let (fd, access) = (file.as_raw_fd(), libc::PROT_READ | libc::PROT_WRITE);
                    let at = libc::mmap(ptr::null_mut(), len, access, libc::MAP_SHARED, fd, 0);
                    assert_ne!(at, libc::MAP_FAILED);
                    *at.cast::<u8>().add(len / 2) ^= 0xff;
                    libc::munmap(at, len);
                }
            }
            (12, Ok(file)) => {
                file.sync_data().unwrap();
            }
            _ => {}
        }
    }
}

#[test]
#[ignore = "started by the other tests"]
fn program() {
    let Some(dir) = std::env::var_os(DIR) else {
        eprintln!("this test is a process that other tests start");
        return;
    };
    let wanted = std::env::var(PROGRAM).unwrap();
    let (_, run) = PROGRAMS.iter().find(|(name, _)| *name == wanted).unwrap();
    run(Path::new(&dir));
}

fn command(program: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["program", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .env(PROGRAM, program)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

fn run(program: &str, dir: &Path) -> Log {
    let (log, status) = trace(command(program, dir), dir).unwrap().wait().unwrap();
    assert!(status.success(), "{program}: {status}");
    log
}

/// Every file below `dir` with its bytes, and every directory.
fn content(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    fn collect(dir: &Path, base: &Path, found: &mut BTreeMap<PathBuf, Option<Vec<u8>>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(base).unwrap().to_path_buf();
            if path.is_dir() {
                collect(&path, base, found);
                found.insert(name, None);
            } else {
                found.insert(name, Some(fs::read(&path).unwrap()));
            }
        }
    }
    let mut found = BTreeMap::new();
    collect(dir, dir, &mut found);
    found
}

fn image(log: &Log, cut: usize, seed: u64, metadata: Metadata) -> (tempfile::TempDir, Fates) {
    let into = tempfile::tempdir().unwrap();
    let fates = log.image(cut, &mut Rng::new(seed), metadata, into.path()).unwrap();
    (into, fates)
}

fn mark_at(log: &Log, name: &str) -> usize {
    let mut marks = log.marks().filter(|(_, mark)| *mark == name.as_bytes());
    marks.next().unwrap_or_else(|| panic!("no mark {name:?}")).0
}

/// What `file` holds in many images of a disk that lost its power after the mark.
fn files_after(program: &str, old: Option<&[u8]>, metadata: Metadata) -> Vec<Option<Vec<u8>>> {
    let dir = tempfile::tempdir().unwrap();
    if let Some(old) = old {
        fs::write(dir.path().join("file"), old).unwrap();
    }
    let log = run(program, dir.path());
    let done = mark_at(&log, "done");
    (0..100)
        .map(|seed| {
            let (into, _) = image(&log, done + 1, seed, metadata);
            fs::read(into.path().join("file")).ok()
        })
        .collect()
}

#[track_caller]
fn assert_careful(program: &str, metadata: Metadata) {
    for (seed, file) in files_after(program, None, metadata).into_iter().enumerate() {
        assert!(file.as_deref() == Some(NEW), "{program}, seed {seed}: {file:?}");
    }
}

#[track_caller]
fn assert_caught(program: &str, metadata: Metadata) {
    let files = files_after(program, None, metadata);
    let good = files.iter().filter(|file| file.as_deref() == Some(NEW)).count();
    assert!((1..90).contains(&good), "{program}: {good} of {} are good", files.len());
}

#[test]
fn bytes_that_are_not_synced_can_be_lost() {
    for program in [
        "forgets to sync",
        "syncs before it writes",
        "renames what is not synced",
        "writes to memory",
    ] {
        assert_caught(program, Metadata::Posix);
        assert_caught(program, Metadata::Journaled);
    }
}

#[test]
fn what_is_synced_is_never_lost() {
    for program in [
        "syncs",
        "renames and syncs",
        "writes through",
        "writes by system calls",
        "writes to memory and syncs",
    ] {
        assert_careful(program, Metadata::Posix);
        assert_careful(program, Metadata::Journaled);
    }
}

#[test]
fn names_need_a_sync_of_their_directory_or_a_journal() {
    assert_caught("renames", Metadata::Posix);
    assert_careful("renames", Metadata::Journaled);
    assert_caught("syncs the file only", Metadata::Posix);
    assert_careful("syncs the file only", Metadata::Journaled);
}

#[test]
fn a_write_tears_between_sectors_only() {
    let mut torn = 0;
    for file in files_after("overwrites", Some(OLD), Metadata::Posix) {
        let file = file.expect("the file was there before");
        assert_eq!(file.len(), OLD.len());
        for sector in file.chunks(512) {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a torn sector");
        }
        torn += u32::from(file != OLD && file != NEW);
    }
    assert!(torn > 10, "only {torn} images are torn");
}

/// If nothing is lost, the image is what the directory holds: nothing has escaped the tracer, and nothing is
/// misunderstood.
#[test]
fn the_log_tells_all_that_happened() {
    for seed in 1..=8 {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("seed"), seed.to_string()).unwrap();
        let log = run("does anything", dir.path());
        let end = *log.cuts().end();
        let (into, fates) = image(&log, end, seed, Metadata::Posix);
        assert_eq!(fates.all(), 0, "the program syncs in the end");
        let (expected, found) = (content(dir.path()), content(into.path()));
        assert!(expected.keys().eq(found.keys()), "{:?}, {:?}", expected.keys(), found.keys());
        for (name, bytes) in expected {
            assert!(found[&name] == bytes, "seed {seed}: {} differs", name.display());
        }
        // what can be lost is at stake before
        let cuts = log.cuts().step_by(10).zip(100 * seed..);
        let images = cuts.map(|(cut, seed)| image(&log, cut, seed, Metadata::Posix).1);
        let (mut kept, mut torn, mut lost) = (0, 0, 0);
        for fates in images {
            (kept, torn, lost) = (kept + fates.kept, torn + fates.torn, lost + fates.lost);
        }
        assert!(kept > 20 && torn > 5 && lost > 20, "{kept} kept, {torn} torn, {lost} lost");
    }
}

#[test]
fn an_image_follows_from_its_seed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("seed"), "9").unwrap();
    let log = run("does anything", dir.path());
    let mut different = 0;
    for cut in log.cuts().step_by(25) {
        let metadata = Metadata::Posix;
        let [first, again, other] =
            [1, 1, 2].map(|seed| content(image(&log, cut, seed, metadata).0.path()));
        assert!(first == again, "a seed does not repeat at {cut}");
        different += u32::from(first != other);
    }
    assert!(different > 2, "seeds make no difference");
}

#[test]
fn threads_do_not_hide_from_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let log = run("writes with threads", dir.path());
    let marks: Vec<(usize, String)> =
        log.marks().map(|(at, mark)| (at, String::from_utf8(mark.into()).unwrap())).collect();
    assert_eq!(marks.len(), 40);
    let mut at_stake = 0;
    for (n, (at, _)) in marks.iter().enumerate() {
        let (into, fates) = image(&log, at + 1, n as u64, Metadata::Posix);
        at_stake += fates.all();
        for (_, name) in &marks[..=n] {
            assert!(fs::read(into.path().join(name)).unwrap() == NEW, "{name} after mark {n}");
        }
    }
    assert!(at_stake > 0, "no thread was writing while another made its mark");
}

#[test]
fn children_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("/bin/sh");
    let script = "mkdir a; (echo one >a/b; mv a/b a/c) & wait; echo two >>a/c; sync";
    command.args(["-c", script]).current_dir(dir.path());
    let (log, status) = trace(command, dir.path()).unwrap().wait().unwrap();
    assert!(status.success());
    let (into, fates) = image(&log, *log.cuts().end(), 1, Metadata::Posix);
    assert_eq!(fates.all(), 0);
    assert_eq!(fs::read(into.path().join("a/c")).unwrap(), b"one\ntwo\n");
    assert!(!into.path().join("a/b").exists());
}

#[test]
fn a_program_that_is_killed_leaves_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = command("waits", dir.path());
    command.stdout(Stdio::piped());
    let mut traced = trace(command, dir.path()).unwrap();
    let stdout = std::io::BufReader::new(traced.stdout.take().unwrap());
    let ready = std::io::BufRead::lines(stdout).any(|line| line.unwrap() == "ready");
    assert!(ready, "the program ended by itself");
    traced.mark(b"done");
    traced.kill();
    let (log, status) = traced.wait().unwrap();
    assert!(!status.success());
    let (into, _) = image(&log, mark_at(&log, "done"), 1, Metadata::Posix);
    assert!(fs::read(into.path().join("file")).unwrap() == NEW);
}

/// As in a container that does not permit it: nothing may seem to be tested then.
#[test]
fn a_system_that_does_not_permit_to_trace_is_an_error() {
    run("traces", tempfile::tempdir().unwrap().path());
}

#[test]
fn what_cannot_be_traced_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = trace(Command::new(dir.path().join("program")), dir.path()).unwrap_err();
    assert!(error.to_string().contains("is not the path of a program"), "{error}");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ln -s a b"]).current_dir(dir.path());
    let error = trace(command, dir.path()).unwrap().wait().unwrap_err();
    assert!(error.to_string().contains("b is special"), "{error}");
}
