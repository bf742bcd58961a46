//! Loss of power at random moments: a writer is traced, disks are built from what it had synced and parts of
//! what it had not, and the engine must find on each all that it had promised to keep.
//!
//! A life is one run of the writer; its log gives many disks. One of them is what the next life begins on, so
//! that power is also lost soon after, and during, the recovery from an earlier loss.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use engine_api::{Durability, Engine};
use engine_powerloss::{Log, Metadata, trace};
use tempfile::TempDir;

use crate::Rng;
use crate::crash::{BEGUN, KEPT, OPEN, batch, check, writer_command};
use crate::seeds::{crash_rounds, each_seed};
use crate::spawn::spawning;

const ROUNDS: u64 = 30;

/// Disks that are examined of each life.
const ROUNDS_PER_LIFE: u64 = 10;

/// A place in a log and how chance decided there: one disk.
#[derive(Clone, Copy)]
struct Loss<'a> {
    log: &'a Log,
    cut: usize,
    seed: u64,
}

impl Loss<'_> {
    /// Answers how many changes were at stake.
    fn build(&self, into: &Path) -> usize {
        // the harshest of disks: whatever survives there survives on those with a journal
        let fates = self.log.image(self.cut, &mut Rng::new(self.seed), Metadata::Posix, into);
        fates.expect("a disk can be built").all()
    }

    /// The number in the last mark of a kind before the power went.
    fn last(&self, kind: &str) -> Option<u64> {
        let marks = self.log.marks().take_while(|(at, _)| *at < self.cut);
        marks.filter_map(|(_, mark)| number_in(mark, kind)).last()
    }
}

/// Leaves the disk behind if the engine fails on it: a log that threads wrote does not repeat from a seed.
struct Evidence<'a>(Loss<'a>);

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let dir = temp_dir().keep();
            self.0.build(&dir);
            eprintln!("the disk as it was is in {}", dir.display());
        }
    }
}

fn temp_dir() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn number_in(mark: &[u8], kind: &str) -> Option<u64> {
    let number = std::str::from_utf8(mark).ok()?.strip_prefix(kind)?.trim_start();
    Some(number.parse().expect("a number in a mark"))
}

/// Traces writers, builds disks and checks; `module` is where the test `crash_writer` is.
pub fn power_loss_keeps_what_was_durable<E: Engine>(module: &str, open: impl Fn(&Path) -> E) {
    each_seed([1], |seed| lose_repeatedly(seed, module, &open));
}

fn lose_repeatedly<E: Engine>(seed: u64, module: &str, open: &impl Fn(&Path) -> E) {
    let mut rng = Rng::new(seed);
    let (mut disk, mut base) = (temp_dir(), 0);
    let (mut round, mut risky, mut kept) = (0, 0, 0);
    let rounds = crash_rounds(ROUNDS);
    while round < rounds {
        let log = live(seed, &mut rng, module, disk.path());
        for _ in 0..ROUNDS_PER_LIFE.min(rounds - round) {
            let loss = Loss { log: &log, cut: cut(&log, &mut rng), seed: rng.next_u64() };
            let context =
                format!("seed {seed}, round {round}, cut at {} of {:?}", loss.cut, log.cuts());
            let evidence = Evidence(loss);
            let image = temp_dir();
            risky += u64::from(loss.build(image.path()) > 0);
            let found = examine(loss, base, image.path(), open, &context);
            drop(evidence);
            kept += u64::from(loss.last(KEPT).is_some());
            round += 1;
            if round % ROUNDS_PER_LIFE == 0 {
                disk = temp_dir();
                loss.build(disk.path());
                base = found;
            }
        }
    }
    // or nothing has been tested
    assert!(risky >= rounds / 4, "something was at stake in {risky} of {rounds} losses only");
    assert!(kept >= rounds / 4, "only {kept} of {rounds} losses came after a durable commit");
}

/// One run of the writer.
fn live(seed: u64, rng: &mut Rng, module: &str, disk: &Path) -> Log {
    let (batches, reclaims) = (5 + rng.below(40), rng.below(4));
    let mut command = writer_command(module, disk, Some(batches), reclaims);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut traced =
        spawning(|| trace(command, disk)).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let mut said = String::new();
    let mut stderr = traced.stderr.take().expect("a pipe");
    stderr.read_to_string(&mut said).expect("what the writer says");
    let (log, status) = traced.wait().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    assert!(status.success(), "seed {seed}: the writer ended with {status}: {said}");
    assert!(log.syncs().next().is_some(), "seed {seed}: the writer has synced nothing");
    log
}

/// A moment for the power to go: anywhere, but often while the engine opens, while it waits for a sync, and
/// just when a commit has been acknowledged.
fn cut(log: &Log, rng: &mut Rng) -> usize {
    let places = |kind| -> Vec<usize> {
        log.marks()
            .filter(|(_, mark)| number_in(mark, kind).is_some())
            .map(|(at, _)| at + 1)
            .collect()
    };
    let chosen: Vec<usize> = match rng.below(8) {
        0 => vec![*log.cuts().end()],
        1 => (*log.cuts().start()..places(OPEN)[0]).collect(),
        2 | 3 => places(KEPT),
        4 | 5 => log.syncs().collect(),
        _ => Vec::new(),
    };
    let chosen = if chosen.is_empty() { log.cuts().collect() } else { chosen };
    chosen[rng.below(chosen.len() as u64) as usize]
}

/// Opens the engine on a disk that has lost its power, checks it and goes on with it. Answers the last batch
/// that was there. `base` is the one that was there when the life began.
fn examine<E: Engine>(
    loss: Loss<'_>,
    base: u64,
    disk: &Path,
    open: &impl Fn(&Path) -> E,
    context: &str,
) -> u64 {
    eprintln!("{context}");
    let engine = open(disk);
    let found = check(&engine, context);
    let kept = loss.last(KEPT).unwrap_or(0).max(base);
    let begun = loss.last(BEGUN).unwrap_or(0).max(base);
    assert!(found >= kept, "{context}: batch {found} is the last, {kept} was durable");
    assert!(found <= begun, "{context}: batch {found} is there, {begun} was the last to begin");
    // it can go on, and what it now promises holds
    let last = found + 3;
    for n in found + 1..=last {
        engine.commit(&batch(n), Durability::Durable).unwrap();
    }
    if loss.seed.is_multiple_of(2) {
        engine.reclaim().unwrap();
    }
    assert_eq!(check(&engine, context), last, "{context}, after more commits");
    drop(engine);
    assert_eq!(check(&open(disk), context), last, "{context}, opened again");
    found
}
