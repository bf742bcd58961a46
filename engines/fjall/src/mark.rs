//! The mark: which batch was durable last, kept beside fjall's files.
//!
//! fjall takes a damaged batch for the torn end of its journal and drops it with everything behind it,
//! also where all of it had been synced. The mark tells the two apart: what it names must be found again.
//!
//! One file of two sectors, written in turn, so that one of them is whole whatever a crash does to the
//! other. They are of 4 KiB, the most that disks write at once: two in one would be torn together. A
//! sector, numbers little-endian, and then zeros:
//!
//! `magic 8 | turn 8 | durable 8 | fill.journal 8 | fill.end 8 | fill.number 8 | xxh3 of all before 8`
//!
//! A durable commit writes the mark after the journal is synced and syncs the mark itself now and then
//! only: a mark that is older than the truth makes the check weaker, never wrong.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine_api::EngineError;
use xxhash_rust::xxh3::xxh3_64;

use crate::{MARK, MARK_NEW, failed, sync_dir};

const MAGIC: &[u8; 8] = b"QFJMARK2";
const SECTOR: usize = 4096;
const LEN: usize = 56;

/// Marks written between two syncs of the file.
const UNSYNCED_MAX: u32 = 64;

/// The start of a journal that is about to be overwritten, since the tables hold all of it: an
/// interrupted overwriting is done again on opening.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fill {
    /// The number in the journal's name.
    pub(crate) journal: u64,
    /// Where it ends: `[0, end)`. Never 0.
    pub(crate) end: u64,
    /// The last batch within.
    pub(crate) number: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct State {
    /// The last batch that is known to be durable.
    pub(crate) durable: u64,
    pub(crate) fill: Option<Fill>,
}

pub(crate) struct Mark {
    file: File,
    path: PathBuf,
    turn: u64,
    state: State,
    unsynced: u32,
}

fn encode(turn: u64, state: State) -> [u8; LEN] {
    let fill = state.fill.unwrap_or(Fill { journal: 0, end: 0, number: 0 });
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(MAGIC);
    let words = [turn, state.durable, fill.journal, fill.end, fill.number];
    for (at, word) in (8..).step_by(8).zip(words) {
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    let sum = xxh3_64(&bytes[..LEN - 8]);
    bytes[LEN - 8..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<(u64, State)> {
    let bytes = bytes.get(..LEN)?;
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    if &bytes[..8] != MAGIC || word(LEN - 8) != xxh3_64(&bytes[..LEN - 8]) {
        return None;
    }
    let fill = Fill { journal: word(24), end: word(32), number: word(40) };
    Some((word(8), State { durable: word(16), fill: (fill.end > 0).then_some(fill) }))
}

impl Mark {
    /// Makes the file in `dir`, or replaces it: under another name first, so that a crash leaves no half one.
    pub(crate) fn create(dir: &Path) -> Result<Self, EngineError> {
        let new = dir.join(MARK_NEW);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&new)
            .map_err(|error| failed("create", &new, error))?;
        file.set_len(2 * SECTOR as u64).map_err(|error| failed("extend", &new, error))?;
        let state = State::default();
        let mut mark = Mark { file, path: new.clone(), turn: 0, state, unsynced: 0 };
        mark.write(state, true)?;
        mark.write(state, true)?;
        mark.path = dir.join(MARK);
        fs::rename(&new, &mark.path).map_err(|error| failed("rename", &new, error))?;
        sync_dir(dir)?;
        Ok(mark)
    }

    /// # Errors
    /// `Corrupt` if neither sector is whole.
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| failed("open", path, error))?;
        let mut bytes = [0; 2 * SECTOR];
        let len = file.metadata().map_err(|error| failed("examine", path, error))?.len();
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
        file.read_exact_at(&mut bytes[..len], 0).map_err(|error| failed("read", path, error))?;
        let newest = [decode(&bytes[..SECTOR]), decode(&bytes[SECTOR..])]
            .into_iter()
            .flatten()
            .max_by_key(|(turn, _)| *turn);
        let Some((turn, state)) = newest else {
            return Err(EngineError::Corrupt {
                at: path.display().to_string(),
                what: "neither of its two sectors is whole".to_owned(),
            });
        };
        Ok(Mark { file, path: path.to_path_buf(), turn, state, unsynced: 0 })
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// Everything up to this batch is synced.
    pub(crate) fn durable(&mut self, number: u64) -> Result<(), EngineError> {
        if number <= self.state.durable {
            return Ok(());
        }
        let sync = self.unsynced >= UNSYNCED_MAX;
        self.write(State { durable: number, ..self.state }, sync)
    }

    /// Notes durably what is about to be overwritten, or that it has been.
    pub(crate) fn fill(&mut self, fill: Option<Fill>) -> Result<(), EngineError> {
        self.write(State { fill, ..self.state }, true)
    }

    /// Makes the last state durable.
    pub(crate) fn sync(&mut self) -> Result<(), EngineError> {
        self.file.sync_data().map_err(|error| failed("sync", &self.path, error))?;
        self.unsynced = 0;
        Ok(())
    }

    fn write(&mut self, state: State, sync: bool) -> Result<(), EngineError> {
        let turn = self.turn + 1;
        let at = (turn % 2) * SECTOR as u64;
        self.file
            .write_all_at(&encode(turn, state), at)
            .map_err(|error| failed("write", &self.path, error))?;
        (self.turn, self.state, self.unsynced) = (turn, state, self.unsynced + 1);
        if sync { self.sync() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_sector_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MARK);
        let mut mark = Mark::create(dir.path()).unwrap();
        let fill = Fill { journal: 3, end: 4_096, number: 7 };
        mark.fill(Some(fill)).unwrap();
        for number in 8..12 {
            mark.durable(number).unwrap();
            assert_eq!(
                Mark::open(&path).unwrap().state(),
                State { durable: number, fill: Some(fill) }
            );
        }
        // a disk may write, and so tear, 4 KiB at once
        let at = (mark.turn % 2) * SECTOR as u64 / 4096 * 4096;
        drop(mark);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xff; 4096], at).unwrap();
        assert_eq!(Mark::open(&path).unwrap().state(), State { durable: 10, fill: Some(fill) });
        // and goes on from there
        let mut mark = Mark::open(&path).unwrap();
        mark.fill(None).unwrap();
        assert_eq!(Mark::open(&path).unwrap().state(), State { durable: 10, fill: None });
        file.write_all_at(&[0xff; 2 * SECTOR], 0).unwrap();
        let error = Mark::open(&path).err().unwrap();
        assert!(matches!(error, EngineError::Corrupt { .. }), "{error}");
        file.set_len(20).unwrap();
        assert!(matches!(Mark::open(&path).err().unwrap(), EngineError::Corrupt { .. }));
    }
}
