//! How much space the engine occupies, and how it is given back.
//!
//! A reclaim has the memtables written, merges each tree into its last level, which drops what was
//! overwritten and deleted, and gives back the journal up to where it began. Commits go on: they fill new
//! memtables, which are written as ever; only compaction waits, so commits stop when their tables have
//! become many meanwhile.
//!
//! fjall keeps the tables that were merged until no snapshot can need them, and notices only at certain
//! moments; [`let_go`] brings these about. What an older view needs stays until the view is closed and
//! some more was written.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use engine_api::{Batch, Durability, EngineError, Reclaimed};
use fjall::{AbstractTree, PersistMode};

use crate::journal::{self, FILL_BYTES_MIN};
use crate::mark::Fill;
use crate::store::Shared;
use crate::{FJALL, Fjall, TREES, failed};

/// How long old tables are waited for at most, in growing steps: a view that is being read keeps them.
const LET_GO_AFTER: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(100),
    Duration::from_millis(400),
];

/// Bytes of all files below `dir` that have blocks on the disk: journals are longer than what is in them.
pub(crate) fn occupied(dir: &Path) -> Result<u64, EngineError> {
    let mut bytes = 0;
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        bytes += occupied_in(&dir, &mut dirs)?;
    }
    Ok(bytes)
}

/// The same of the files in `dir` itself; adds the directories in it to `dirs`.
fn occupied_in(dir: &Path, dirs: &mut Vec<PathBuf>) -> Result<u64, EngineError> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).map_err(|error| failed("list", dir, error))? {
        let entry = entry.map_err(|error| failed("list", dir, error))?;
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => dirs.push(entry.path()),
            Ok(metadata) => bytes += metadata.len().min(metadata.blocks() * 512),
            // removed meanwhile, as tables are
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("examine", &entry.path(), error)),
        }
    }
    Ok(bytes)
}

/// Bytes of all files: the server asks with each commit, so tables, which may be thousands, are not looked
/// at but remembered by [`measure`].
pub(crate) fn size(shared: &Shared) -> Result<u64, EngineError> {
    let mut bytes = shared.tables_bytes.load(Ordering::Relaxed);
    for dir in [&shared.dir, &shared.dir.join(FJALL)] {
        bytes += occupied_in(dir, &mut Vec::new())?;
    }
    Ok(bytes)
}

/// Looks how much the tables occupy, when it may have changed.
pub(crate) fn measure(shared: &Shared) {
    // an estimate is no reason to stop: what was seen last stays
    if let Ok(bytes) = occupied(&shared.dir.join(FJALL).join(TREES)) {
        shared.tables_bytes.store(bytes, Ordering::Relaxed);
    }
}

pub(crate) fn reclaim(engine: &Fjall) -> Result<Reclaimed, EngineError> {
    let _turn = engine.reclaiming.lock();
    let shared = &*engine.shared;
    shared.cancelled.store(false, Ordering::Release);
    shared.check_poisoned()?;
    let before = occupied(&shared.dir)?;
    // before memtables are sealed, so that these hold all of it
    let fill = beginning(&shared.dir)?;
    step(engine)?;
    shared.wait_until_flushed()?;
    for keyspace in shared.trees() {
        shared.check_cancelled()?;
        keyspace.major_compact().map_err(|error| shared.convert("compact tables in", error))?;
    }
    let_go(engine)?;
    if let Some(fill) = fill {
        give_back(engine, fill)?;
    }
    measure(shared);
    Ok(Reclaimed { before, after: occupied(&shared.dir)? })
}

/// Commits a batch of nothing, durably, seals the memtables and has them written. The sequence number that
/// it takes lets fjall go of what is older.
fn step(engine: &Fjall) -> Result<(), EngineError> {
    let mut writer = engine.writer.lock();
    engine.shared.check_poisoned()?;
    engine
        .write(&mut writer, &Batch::default(), Durability::Durable)
        .map_err(|error| engine.shared.poison(error))?;
    engine.seal(&mut writer).map_err(|error| engine.shared.poison(error))
}

/// Waits for old tables to go, as long as that makes sense.
fn let_go(engine: &Fjall) -> Result<(), EngineError> {
    let shared = &*engine.shared;
    for pause in LET_GO_AFTER {
        thread::sleep(pause);
        shared.check_cancelled()?;
        step(engine)?;
        shared.wait_until_flushed()?;
        if shared.tables.iter().all(|keyspace| keyspace.tree.version_free_list_len() == 0) {
            break;
        }
    }
    Ok(())
}

/// What the newest journal holds by now.
fn beginning(dir: &Path) -> Result<Option<Fill>, EngineError> {
    let path = dir.join(FJALL);
    let Some((id, journal)) = journal::list(&path)?.pop() else {
        return Ok(None);
    };
    let scan = journal::scan(&journal, None)?;
    Ok(match scan.last {
        Some(number) if scan.end >= FILL_BYTES_MIN => {
            Some(Fill { journal: id, end: scan.end, number })
        }
        _ => None,
    })
}

/// Overwrites what the tables hold by now; `mark` knows of it before, so that it is done again after a crash.
fn give_back(engine: &Fjall, fill: Fill) -> Result<(), EngineError> {
    let shared = &*engine.shared;
    let note = |fill| shared.mark.lock().fill(fill).map_err(|error| shared.poison(error));
    // its end must not be lost while its beginning is overwritten
    shared
        .db
        .persist(PersistMode::SyncAll)
        .map_err(|error| shared.poison(shared.convert("sync the journal in", error)))?;
    note(Some(fill))?;
    // after an error it is up to the next opening
    journal::fill(&shared.dir.join(FJALL), fill)?;
    note(None)
}
