//! The `head` file: which data file counts, and its last durable state.
//!
//! Two pairs of slots, each slot within a sector of its own. A state is written to both slots of one pair, the
//! pairs take turns, and the newest whole slot of all holds. A slot, with integers in little-endian order:
//!
//! | bytes | holds |
//! |---|---|
//! | 0..8 | `qrtlmdb` and the version of this format, 2 |
//! | 8..16 | sequence number; the greater of two is the newer |
//! | 16..24 | generation: the data file is `data-<generation>.mdb` |
//! | 24..32 | length of the data file when the state was synced |
//! | 32..168 | LMDB's meta page of that state without its page header |
//! | 168..176 | FNV-1a of the bytes before |
//!
//! - One damaged slot costs nothing: the other one of its pair has the same state. Opening writes it again.
//! - A pair of which no slot is whole leads to the state before. It is what a power loss leaves of a write that
//!   was never acknowledged, and later damage of both slots of the newest pair cannot be told from that.
//! - No whole slot at all is an error.
//!
//! Only that meta is believed on opening, not those in the data file, which may be of commits whose pages
//! never reached the disk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine_api::EngineError;

use crate::{corrupt, failed, sync_dir};

const MARK: [u8; 7] = *b"qrtlmdb";
const VERSION: u8 = 2;
const SLOT_LEN: usize = 176;
/// Slots are this far apart: no sector of any disk holds two of them.
const SLOT_EVERY: u64 = 4096;
/// Slots that hold the same state.
const COPIES: usize = 2;
const SLOTS: usize = 2 * COPIES;
/// What the file occupies.
pub(crate) const HEAD_BYTES: u64 = SLOT_EVERY * SLOTS as u64;

const LMDB_MAGIC: u32 = 0xBEEF_C0DE;
const LMDB_VERSION: u32 = 1;
const PAGE_BYTES_MIN: u32 = 512;
const PAGE_BYTES_MAX: u32 = 1 << 16;

/// LMDB's `MDB_meta` on a 64-bit machine, as it is in the file:
/// magic, version (4 bytes each), map address, map size (8 each), two trees (48 each: of free pages and
/// of tables; the first one's first 4 bytes are the page size), last page, transaction (8 each).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Meta(pub(crate) [u8; Meta::LEN]);

impl Meta {
    pub(crate) const LEN: usize = 136;

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().expect("4 bytes"))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.0[at..at + 8].try_into().expect("8 bytes"))
    }

    pub(crate) fn page_bytes(&self) -> u32 {
        self.u32_at(24)
    }

    /// The number of the transaction that wrote it.
    pub(crate) fn transaction(&self) -> u64 {
        self.u64_at(128)
    }

    /// Why LMDB could not have written this.
    pub(crate) fn fault(&self) -> Option<String> {
        let (magic, version, page) = (self.u32_at(0), self.u32_at(4), self.page_bytes());
        if magic != LMDB_MAGIC {
            return Some(format!("LMDB's mark is missing: {magic:#010x}"));
        }
        if version != LMDB_VERSION {
            return Some(format!("LMDB format {version}, not {LMDB_VERSION}"));
        }
        if !page.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page) {
            return Some(format!("pages of {page} bytes"));
        }
        None
    }
}

/// A durable state of a data file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Point {
    pub(crate) generation: u64,
    pub(crate) file_bytes: u64,
    pub(crate) meta: Meta,
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn encode(sequence: u64, point: &Point) -> [u8; SLOT_LEN] {
    let mut slot = [0; SLOT_LEN];
    slot[..7].copy_from_slice(&MARK);
    slot[7] = VERSION;
    slot[8..16].copy_from_slice(&sequence.to_le_bytes());
    slot[16..24].copy_from_slice(&point.generation.to_le_bytes());
    slot[24..32].copy_from_slice(&point.file_bytes.to_le_bytes());
    slot[32..168].copy_from_slice(&point.meta.0);
    let sum = fnv1a(&slot[..168]);
    slot[168..].copy_from_slice(&sum.to_le_bytes());
    slot
}

/// What a slot begins with says of its format; damage can say anything.
fn version(slot: &[u8]) -> Option<u8> {
    slot.starts_with(&MARK).then(|| slot[MARK.len()])
}

/// The format of a file that another version of this program wrote: a pair of slots says so twice, or one
/// slot where no slot is whole. More would take one damaged byte for it.
fn foreign_version(slots: &[Option<u8>], any_whole: bool) -> Option<u8> {
    let foreign = |version: &u8| *version != VERSION;
    let twice = slots.chunks(COPIES).find_map(|pair| {
        pair[0].filter(foreign).filter(|_| pair.iter().all(|version| *version == pair[0]))
    });
    let once = || slots.iter().flatten().copied().find(foreign);
    twice.or_else(|| if any_whole { None } else { once() })
}

/// `None` for what is not a whole slot.
fn decode(slot: &[u8; SLOT_LEN]) -> Option<(u64, Point)> {
    let number = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().expect("8 bytes"));
    if version(slot) != Some(VERSION) || number(168) != fnv1a(&slot[..168]) {
        return None;
    }
    let meta = Meta(slot[32..168].try_into().expect("the length of a meta"));
    Some((number(8), Point { generation: number(16), file_bytes: number(24), meta }))
}

/// Writes a state to each slot of the pair whose turn it is; durable only once `file` is synced.
fn write_pair(file: &File, sequence: u64, point: &Point) -> io::Result<()> {
    let slot = encode(sequence, point);
    let first = sequence % 2 * COPIES as u64;
    (first..first + COPIES as u64).try_for_each(|at| file.write_all_at(&slot, at * SLOT_EVERY))
}

/// The open `head` file.
pub(crate) struct Head {
    file: File,
    /// Of the state written last.
    sequence: u64,
}

impl Head {
    /// Makes the file `name` in `dir`, naming `point`; durable when it returns. A crash before leaves no
    /// file of this name.
    pub(crate) fn create(dir: &Path, name: &str, point: &Point) -> Result<Head, EngineError> {
        let (path, new) = (dir.join(name), dir.join(format!("{name}.new")));
        let written = || -> io::Result<File> {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&new)?;
            file.set_len(HEAD_BYTES)?;
            write_pair(&file, 1, point)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            Ok(file)
        };
        let file = written().map_err(|error| failed("create", &path, error))?;
        sync_dir(dir)?;
        Ok(Head { file, sequence: 1 })
    }

    /// Opens the file and reads the newest state in it, which is durable and in both slots of its pair when
    /// this returns; `None` if there is no such file.
    ///
    /// # Errors
    /// `Corrupt` if it holds none, `Unusable` if it has another version's format.
    pub(crate) fn open(path: &Path) -> Result<Option<(Head, Point)>, EngineError> {
        let file = match File::options().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", path, error)),
        };
        let mut newest: Option<(u64, Point)> = None;
        let mut copies = 0;
        let mut versions = [None; SLOTS];
        let mut is_short = false;
        for at in 0..SLOTS as u64 {
            let mut slot = [0; SLOT_LEN];
            match file.read_exact_at(&mut slot, at * SLOT_EVERY) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    // another format may be shorter
                    is_short = true;
                    break;
                }
                Err(error) => return Err(failed("read", path, error)),
            }
            versions[at as usize] = version(&slot);
            let Some(found) = decode(&slot) else { continue };
            match &newest {
                Some((sequence, _)) if *sequence > found.0 => {}
                Some((sequence, _)) if *sequence == found.0 => copies += 1,
                _ => (newest, copies) = (Some(found), 1),
            }
        }
        if let Some(version) = foreign_version(&versions, newest.is_some()) {
            return Err(EngineError::Unusable(format!(
                "{} has format version {version}; this program knows version {VERSION}",
                path.display()
            )));
        }
        if is_short {
            return Err(corrupt(path, "the file is shorter than its slots"));
        }
        let Some((sequence, point)) = newest else {
            return Err(corrupt(path, "none of its slots is whole"));
        };
        if let Some(fault) = point.meta.fault() {
            return Err(corrupt(path, fault));
        }
        let settle = || -> io::Result<()> {
            if copies < COPIES {
                write_pair(&file, sequence, &point)?;
            }
            // a process that was killed can have left the state in the page cache only; the state before,
            // to which a power loss would then lead, is about to lose its pages
            file.sync_data()
        };
        settle().map_err(|error| failed("write", path, error))?;
        Ok(Some((Head { file, sequence }, point)))
    }

    /// Makes `point` what holds; durable when it returns. After an error either may hold.
    pub(crate) fn write(&mut self, path: &Path, point: &Point) -> Result<(), EngineError> {
        let sequence = self.sequence + 1;
        write_pair(&self.file, sequence, point)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| failed("write", path, error))?;
        self.sequence = sequence;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(n: u64) -> Point {
        let mut meta = Meta([0; Meta::LEN]);
        meta.0[..4].copy_from_slice(&LMDB_MAGIC.to_ne_bytes());
        meta.0[4..8].copy_from_slice(&LMDB_VERSION.to_ne_bytes());
        meta.0[24..28].copy_from_slice(&4096_u32.to_ne_bytes());
        meta.0[128..].copy_from_slice(&n.to_ne_bytes());
        Point { generation: 1 + n / 3, file_bytes: n * 4096, meta }
    }

    fn read(path: &Path) -> Result<Point, EngineError> {
        Head::open(path).map(|found| found.expect("the file is there").1)
    }

    #[test]
    fn newest_state_holds_and_a_torn_pair_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head");
        let mut head = Head::create(dir.path(), "head", &point(1)).unwrap();
        assert_eq!(read(&path).unwrap(), point(1));
        assert!(!dir.path().join("head.new").exists());
        for n in 2..7 {
            let before = fs::read(&path).unwrap();
            head.write(&path, &point(n)).unwrap();
            let after = fs::read(&path).unwrap();
            assert_eq!(read(&path).unwrap(), point(n));
            // a write of which only a part arrived
            let changed: Vec<usize> = (0..after.len()).filter(|&i| before[i] != after[i]).collect();
            let first_ends = changed[0] + SLOT_EVERY as usize;
            let first_last = changed.iter().rfind(|&&i| i < first_ends).unwrap();
            for &end in &changed[1..] {
                let torn = [&after[..end], &before[end..]].concat();
                fs::write(&path, &torn).unwrap();
                let holds = if end > *first_last { n } else { n - 1 };
                assert_eq!(read(&path).unwrap(), point(holds), "torn at {end}");
            }
            // in place: `head` has the file open
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&after, 0).unwrap();
        }
        drop(head);
        let (mut head, found) = Head::open(&path).unwrap().unwrap();
        assert_eq!(found, point(6));
        head.write(&path, &point(7)).unwrap();
        assert_eq!(read(&path).unwrap(), point(7));
    }

    /// The newest state was acknowledged and the one before has lost its pages.
    #[test]
    fn damage_of_one_slot_loses_nothing_and_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head");
        let mut head = Head::create(dir.path(), "head", &point(1)).unwrap();
        for n in 1..7 {
            if n > 1 {
                head.write(&path, &point(n)).unwrap();
            }
            let whole = fs::read(&path).unwrap();
            let newest = (n % 2) as usize * COPIES;
            let place = |slot: usize| slot * SLOT_EVERY as usize;
            // not every byte: each opening syncs
            for byte in (0..SLOT_LEN).step_by(11) {
                for slot in 0..SLOTS {
                    let mut damaged = whole.clone();
                    damaged[place(slot) + byte] ^= 0x10;
                    fs::write(&path, damaged).unwrap();
                    assert_eq!(read(&path).unwrap(), point(n), "byte {byte} of slot {slot}");
                    if slot / COPIES == newest / COPIES {
                        assert!(fs::read(&path).unwrap() == whole, "slot {slot} is not mended");
                    }
                }
                // as if the write had been torn
                let mut damaged = whole.clone();
                for slot in newest..newest + COPIES {
                    damaged[place(slot) + byte] ^= 0x10;
                }
                fs::write(&path, damaged).unwrap();
                if n > 1 && byte != MARK.len() {
                    assert_eq!(read(&path).unwrap(), point(n - 1), "byte {byte} of both");
                } else {
                    read(&path).unwrap_err();
                }
            }
            fs::write(&path, &whole).unwrap();
        }
    }

    #[test]
    fn damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head");
        assert!(Head::open(&path).unwrap().is_none());
        Head::create(dir.path(), "head", &point(1)).unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..SLOT_LEN {
            let mut damaged = whole.clone();
            for slot in COPIES..SLOTS {
                damaged[slot * SLOT_EVERY as usize + at] ^= 0x10;
            }
            if at == MARK.len() {
                // looks like another format
                continue;
            }
            fs::write(&path, damaged).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.ends_with("none of its slots is whole"), "byte {at}: {error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
        for len in [0, 10, SLOT_EVERY as usize + 10] {
            fs::write(&path, &whole[..len]).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.ends_with("shorter than its slots"), "{len} bytes: {error}");
        }
    }

    #[test]
    fn another_format_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head");
        let mut head = Head::create(dir.path(), "head", &point(1)).unwrap();
        let expect = |bytes: &[u8], version: u8, context: &str| {
            fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err();
            assert!(matches!(error, EngineError::Unusable(_)), "{context}: {error:?}");
            let error = error.to_string();
            assert!(error.contains(&path.display().to_string()), "{context}: {error}");
            let expected = format!("has format version {version}; this program knows version 2");
            assert!(error.ends_with(&expected), "{context}: {error}");
            assert_eq!(fs::read(&path).unwrap(), bytes, "{context}");
        };
        let place = |slot: usize| slot * SLOT_EVERY as usize + MARK.len();
        let mut later = fs::read(&path).unwrap();
        later[place(COPIES)] = 3;
        later[place(COPIES + 1)] = 3;
        expect(&later, 3, "later");
        head.write(&path, &point(2)).unwrap();
        let mut upgraded = later.clone();
        upgraded[..place(COPIES) - MARK.len()]
            .copy_from_slice(&fs::read(&path).unwrap()[..place(COPIES) - MARK.len()]);
        expect(&upgraded, 3, "one pair by a later program");
        // two single slots, of which a new file has the second only
        let mut earlier = vec![0; 2 * SLOT_EVERY as usize];
        earlier[place(1) - MARK.len()..][..MARK.len()].copy_from_slice(&MARK);
        earlier[place(1)] = 1;
        expect(&earlier, 1, "earlier");
    }

    #[test]
    fn metas_that_lmdb_never_wrote_are_told() {
        assert_eq!(point(1).meta.fault(), None);
        for (at, byte, fault) in [
            (0, 0, "LMDB's mark is missing: 0xbeefc000"),
            (4, 2, "LMDB format 2, not 1"),
            (24, 1, "pages of 4097 bytes"),
            (26, 2, "pages of 135168 bytes"),
        ] {
            let mut meta = point(1).meta;
            meta.0[at] = byte;
            assert_eq!(meta.fault().as_deref(), Some(fault));
        }
    }
}
