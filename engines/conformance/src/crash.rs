//! Kill -9 at random moments: the test binary starts itself as a writer, kills it, and looks at what
//! is left.
//!
//! What batch `n` does and what all tables hold after it follow from `n` alone, so that the checker
//! needs nothing but the number found in the file.

use std::io::{BufRead, BufReader, Write, stdout};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use engine_api::{About, Batch, Durability, Engine, Survives, Table};
use engine_powerloss::mark;

use crate::Rng;
use crate::cases::{Rows, all_rows, revision_key};
use crate::seeds::{crash_rounds, each_seed, number};
use crate::spawn::spawning;

const ROUNDS: u64 = 30;
const DIR: &str = "ENGINE_CRASH_DIR";
const RECLAIMS: &str = "ENGINE_CRASH_RECLAIMS";
const BATCHES: &str = "ENGINE_CRASH_BATCHES";

/// What the writer tells, each with the number of a batch: what it found, what it is about to commit, what
/// the engine has promised to keep.
pub(crate) const OPEN: &str = "open";
pub(crate) const BEGUN: &str = "begun";
pub(crate) const KEPT: &str = "kept";

/// Batches whose rows are still there after batch `n`; the rows of older ones have been deleted.
fn live(n: u64) -> Range<u64> {
    n.saturating_sub(39).max(1)..n + 1
}

fn rows_of(n: u64) -> Rows {
    let mut rng = Rng::new(n);
    (0..1 + rng.below(60))
        .map(|sub| {
            let len = match rng.below(1_000) {
                // beyond a small cache, so that pages are written before a durable commit asks for it
                0 => rng.below(800_000),
                1..20 => 10_000,
                _ => rng.below(300),
            } as usize;
            (revision_key(n, sub), rng.bytes(len).into())
        })
        .collect()
}

/// A slot that batch `n` overwrites.
fn slot(n: u64) -> Bytes {
    Bytes::from(format!("slot {}", n % 7))
}

pub(crate) fn batch(n: u64) -> Batch {
    let mut batch = Batch::default();
    for (key, value) in rows_of(n) {
        batch.put(Table::Key, key, value);
    }
    if let Some(old) = live(n - 1).next().filter(|old| !live(n).contains(old)) {
        for (key, _) in rows_of(old) {
            batch.delete(Table::Key, key);
        }
    }
    batch.put(Table::Lease, slot(n), n.to_string());
    batch.put(Table::Meta, "n", n.to_be_bytes().to_vec());
    batch
}

fn durability(n: u64) -> Durability {
    if Rng::new(!n).one_in(4) { Durability::Durable } else { Durability::Buffered }
}

/// Checks that the engine holds the state after some batch, and answers its number.
pub(crate) fn check(engine: &impl Engine, context: &str) -> u64 {
    let view = engine.view().unwrap();
    let Some(n) = view.get(Table::Meta, b"n").unwrap() else {
        for table in Table::ALL {
            assert!(all_rows(&*view, table).is_empty(), "{context}: rows without a number");
        }
        return 0;
    };
    let n = u64::from_be_bytes(n[..].try_into().expect("8 bytes"));
    let expected: Rows = live(n).flat_map(rows_of).collect();
    assert!(all_rows(&*view, Table::Key) == expected, "{context}: batch {n} is not whole");
    let mut slots: Rows =
        (n.saturating_sub(6).max(1)..=n).map(|n| (slot(n), Bytes::from(n.to_string()))).collect();
    slots.sort();
    assert!(all_rows(&*view, Table::Lease) == slots, "{context}: slots differ after batch {n}");
    n
}

/// Whether an engine promises that batch `n`, once acknowledged, outlives this.
fn outlives(about: &About, n: u64, crash: Survives) -> bool {
    let survives = match durability(n) {
        Durability::Durable => about.durable_survives,
        Durability::Buffered => about.buffered_survives,
    };
    survives >= crash
}

/// The process that crashes: commits batch after batch and tells the number of each that is acknowledged, to
/// its output if the engine promises that a kill spares it, and in a mark if a loss of power does. Does
/// nothing but say so unless the parent has set the directory.
pub fn writer<E: Engine>(open: impl Fn(&Path) -> E) {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else {
        eprintln!("this test is a process that another test starts");
        return;
    };
    let engine = open(&dir);
    let first = check(&engine, "at the writer's start") + 1;
    mark(format!("{OPEN} {}", first - 1).as_bytes());
    let end = number(BATCHES).map_or(u64::MAX, |batches| first + batches);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..number(RECLAIMS).unwrap_or(0) {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                engine.reclaim().unwrap();
            }
        });
        for n in first..end {
            mark(format!("{BEGUN} {n}").as_bytes());
            engine.commit(&batch(n), durability(n)).unwrap();
            if outlives(engine.about(), n, Survives::PowerLoss) {
                mark(format!("{KEPT} {n}").as_bytes());
            }
            if outlives(engine.about(), n, Survives::Kill) {
                let mut out = stdout().lock();
                writeln!(out, "\n{KEPT} {n}").and_then(|()| out.flush()).unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// Starts the test `crash_writer` of `module` on `dir`, to commit so many batches (`None`: until it is
/// killed) and to reclaim space so often meanwhile.
pub(crate) fn writer_command(
    module: &str,
    dir: &Path,
    batches: Option<u64>,
    reclaims: u64,
) -> Command {
    // the test harness leaves the crate out of a test's name
    let (_, module) = module.split_once("::").expect("a module below the crate");
    let mut command = Command::new(std::env::current_exe().expect("the test binary's path"));
    command
        .args([&format!("{module}::crash_writer"), "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .env(RECLAIMS, reclaims.to_string())
        .stdin(Stdio::null());
    if let Some(batches) = batches {
        command.env(BATCHES, batches.to_string());
    }
    command
}

/// A writer that does not outlive its test, whatever becomes of that.
struct Writer(Child);

impl Drop for Writer {
    fn drop(&mut self) {
        // as a rule it is gone, and then both refuse
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts, kills and checks; `module` is where the test `crash_writer` is.
pub fn kill_keeps_what_was_acknowledged<E: Engine>(module: &str, open: impl Fn(&Path) -> E) {
    each_seed([1], |seed| kill_repeatedly(seed, module, &open));
}

fn kill_repeatedly<E: Engine>(seed: u64, module: &str, open: &impl Fn(&Path) -> E) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut rng = Rng::new(seed);
    let rounds = crash_rounds(ROUNDS);
    let mut batches = 0;
    for round in 0..rounds {
        // reclaim in two rounds of three, so that kills land in each of its steps
        let reclaims = if round % 3 == 0 { 0 } else { u64::MAX };
        let mut command = writer_command(module, dir.path(), None, reclaims);
        command.stdout(Stdio::piped());
        let (mut child, mut lines) = spawning(|| {
            let mut child = Writer(command.spawn().expect("the test binary starts again"));
            let stdout = child.0.stdout.take().expect("a pipe");
            let mut lines = BufReader::new(stdout).lines();
            // the test harness speaks first
            let _greeting = lines.next();
            (child, lines)
        });
        let mut acknowledged = 0;
        let mut note = |line: &str| {
            if let Some(n) = line.strip_prefix(KEPT) {
                acknowledged = n.trim_start().parse().expect("a number");
                true
            } else {
                false
            }
        };
        // some progress, then a moment that falls anywhere within a commit
        let mut wanted = rng.below(12);
        let moment = Duration::from_micros(rng.below(8_000));
        while wanted > 0 {
            let Some(Ok(line)) = lines.next() else {
                let status = child.0.wait();
                panic!("seed {seed}, round {round}: the writer ended by itself: {status:?}");
            };
            wanted -= u64::from(note(&line));
        }
        thread::sleep(moment);
        child.0.kill().expect("the writer is still there");
        // what it printed before it died counts as well
        for line in lines.map_while(Result::ok) {
            note(&line);
        }
        let status = child.0.wait().expect("the writer has ended");
        assert!(!status.success(), "seed {seed}, round {round}: the writer was not killed");

        let context = format!("seed {seed}, round {round}");
        let engine = open(dir.path());
        let found = check(&engine, &context);
        assert!(
            found >= acknowledged && found >= batches,
            "{context}: batch {found} is the last, {acknowledged} was acknowledged as kept, \
             {batches} was there before"
        );
        batches = found;
    }
    assert!(batches >= rounds, "seed {seed}: only {batches} batches in all rounds");
}
