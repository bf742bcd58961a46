//! fjall's journal as bytes: what is whole in it, and how its beginning is given back.
//!
//! A journal `N.jnl` is a row of batches, numbers little-endian:
//!
//! ```text
//! batch  1 | items 4 | seqno 8, the items, 3 | xxh3 of the items 8 | "FJL\x03"
//! item   2 | kind 1 | compression 1 | keyspace 8 | key length 2 | value length 4 | stored length 4 | key | value
//!        4 | keyspace 8                                                             (clears a keyspace)
//! ```
//!
//! and then nothing, or the zeros of the space that fjall has set aside.
//!
//! fjall only starts a new journal when one has reached 64 MB, so one that the tables hold all of keeps
//! its disk space. [`fill`] overwrites such a beginning with batches of one row each for a keyspace that
//! does not exist, which recovery passes over, and the rows' values are holes in the file.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine_api::EngineError;
use xxhash_rust::xxh3::Xxh3;

use crate::mark::Fill;
use crate::{OWN_BATCH, OWN_ID, failed};

const TRAILER: &[u8; 4] = b"FJL\x03";
const START_LEN: u64 = 13;
const ITEM_LEN: u64 = 21;
const END_LEN: u64 = 13;

/// The keyspace of filling rows: fjall's catalogue, which no batch may name and no name leads to.
const FILL_ID: u64 = 0;

/// Bytes of a filling batch, and so of memory when it is read. Twice as many in the last one.
const FILL_BYTES: u64 = 4 << 20;

/// Less is not worth the trouble.
pub(crate) const FILL_BYTES_MIN: u64 = 64 << 10;

/// The journals of a directory, the oldest first.
pub(crate) fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, EngineError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| failed("list", dir, error))? {
        let path = entry.map_err(|error| failed("list", dir, error))?.path();
        if path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("jnl")) {
            continue;
        }
        let name = path.file_stem().and_then(|stem| stem.to_str());
        match name.and_then(|name| name.parse().ok()) {
            Some(id) if path.is_file() && path == at(dir, id) => found.push((id, path)),
            _ => {
                return Err(EngineError::Unusable(format!(
                    "{} is no journal of fjall",
                    path.display()
                )));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The path of a journal.
pub(crate) fn at(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("{id}.jnl"))
}

/// What is whole in a journal.
#[derive(PartialEq, Eq, Default, Debug)]
pub(crate) struct Scan {
    /// Where the last whole batch ends.
    pub(crate) end: u64,
    /// The number of the last whole batch.
    pub(crate) last: Option<u64>,
    /// Why the next batch is none, unless only zeros follow, or nothing.
    pub(crate) damage: Option<String>,
}

/// Reads a journal up to its end or to what is no batch; `before` is the number of the batch before it.
pub(crate) fn scan(path: &Path, before: Option<u64>) -> Result<Scan, EngineError> {
    let file = File::open(path).map_err(|error| failed("open", path, error))?;
    let len = file.metadata().map_err(|error| failed("examine", path, error))?.len();
    let mut scan = Scan { last: before, ..Scan::default() };
    let mut reader = Reader { file: BufReader::with_capacity(1 << 20, file), at: 0, len };
    loop {
        match reader.batch(scan.last) {
            Ok(None) => return Ok(scan),
            Ok(Some(last)) => {
                scan.last = last.or(scan.last);
                scan.end = reader.at;
            }
            Err(Stop::Io(error)) => return Err(failed("read", path, error)),
            Err(Stop::Damage(what)) => {
                let zeros = only_zeros(path, scan.end)?;
                scan.damage = (!zeros).then_some(what);
                return Ok(scan);
            }
        }
    }
}

/// Whether the file holds only zeros from `from` on.
fn only_zeros(path: &Path, from: u64) -> Result<bool, EngineError> {
    let file = File::open(path).map_err(|error| failed("open", path, error))?;
    let mut block = vec![0; 1 << 20];
    let mut at = from;
    loop {
        match file.read_at(&mut block, at).map_err(|error| failed("read", path, error))? {
            0 => return Ok(true),
            read if block[..read].iter().all(|byte| *byte == 0) => at += read as u64,
            _ => return Ok(false),
        }
    }
}

enum Stop {
    Io(io::Error),
    Damage(String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Stop::Damage("it ends within a batch".to_owned()),
            _ => Stop::Io(error),
        }
    }
}

struct Reader {
    file: BufReader<File>,
    at: u64,
    len: u64,
}

impl Reader {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        self.at += N as u64;
        Ok(bytes)
    }

    /// Adds the next `len` bytes to the sum; answers them if they are no more than `keep`.
    fn sum(&mut self, len: u64, keep: usize, sum: &mut Xxh3) -> Result<Vec<u8>, Stop> {
        // a damaged length must not be trusted with memory
        if len > self.len - self.at {
            return Err(Stop::Damage(format!("a row of {len} bytes does not fit into the file")));
        }
        let mut kept = Vec::new();
        let mut left = len;
        let mut block = [0; 4096];
        while left > 0 {
            let part = &mut block[..left.min(4096) as usize];
            self.file.read_exact(part)?;
            sum.update(part);
            if len <= keep as u64 {
                kept.extend_from_slice(part);
            }
            left -= part.len() as u64;
        }
        self.at += len;
        Ok(kept)
    }

    /// Passes over a batch and answers its number, if it has one; `None` at the end of the file.
    fn batch(&mut self, before: Option<u64>) -> Result<Option<Option<u64>>, Stop> {
        if self.at == self.len {
            return Ok(None);
        }
        let damage = |what: &str| Err(Stop::Damage(what.to_owned()));
        if self.take()? != [1] {
            return damage("no batch begins there");
        }
        let mut items = u32::from_le_bytes(self.take()?);
        let seqno = u64::from_le_bytes(self.take()?);
        if items == 0 {
            return damage("a batch has no rows");
        }
        let mut sum = Xxh3::new();
        let mut number = None;
        let mut filled = None;
        while items > 0 {
            items -= 1;
            let [tag] = self.take()?;
            sum.update(&[tag]);
            if tag == 4 {
                self.sum(8, 0, &mut sum)?;
                continue;
            }
            if tag != 2 {
                return damage("no row begins where one should");
            }
            let header: [u8; ITEM_LEN as usize - 1] = self.take()?;
            sum.update(&header);
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4"));
            let keyspace = u64::from_le_bytes(header[2..10].try_into().expect("8 bytes"));
            let key_len = u16::from_le_bytes(header[10..12].try_into().expect("2 bytes"));
            // the engine asks for no compression in the journal
            if header[0] > 1 || header[1] != 0 || word(12) != word(16) {
                return damage("a row is of an unknown kind");
            }
            let key = self.sum(key_len.into(), 16, &mut sum)?;
            let value = self.sum(word(16).into(), 24, &mut sum)?;
            if keyspace == OWN_ID && key == OWN_BATCH {
                number =
                    value.get(..8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8")));
            } else if keyspace == FILL_ID {
                filled = key.try_into().ok().map(u64::from_be_bytes);
            }
        }
        if self.take()? != [3] {
            return damage("a batch does not end where it should");
        }
        if u64::from_le_bytes(self.take()?) != sum.digest() {
            return damage("the checksum of a batch is wrong");
        }
        if self.take()? != *TRAILER {
            return damage("the end of a batch is torn");
        }
        match (before, number) {
            (Some(before), Some(number)) if number != before + 1 => Err(Stop::Damage(format!(
                "batch {number} (sequence number {seqno}) follows batch {before}"
            ))),
            _ => Ok(Some(number.or(filled))),
        }
    }
}

/// Cuts off what follows the last whole batch.
pub(crate) fn cut(path: &Path, end: u64) -> Result<(), EngineError> {
    let file = File::options().write(true).open(path);
    file.and_then(|file| {
        file.set_len(end)?;
        file.sync_all()
    })
    .map_err(|error| failed("cut", path, error))
}

/// Overwrites `[0, end)` of a journal with batches that mean nothing and occupy next to nothing. Nothing
/// happens if the file is no longer there.
///
/// Answers whether the file system can do it; if it cannot, nothing has happened.
pub(crate) fn fill(dir: &Path, fill: Fill) -> Result<bool, EngineError> {
    let path = at(dir, fill.journal);
    let file = match File::options().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(failed("open", &path, error)),
    };
    let result = fill_file(&file, fill);
    result.map_err(|error| failed("give back the beginning of", &path, error))
}

fn fill_file(file: &File, fill: Fill) -> io::Result<bool> {
    if file.metadata()?.len() < fill.end {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is shorter than it was"));
    }
    let mut from = 0;
    while from < fill.end {
        let left = fill.end - from;
        let len = if left < 2 * FILL_BYTES { left } else { FILL_BYTES };
        let value_len = len - (START_LEN + ITEM_LEN + 8 + END_LEN);
        let mut head = Vec::with_capacity(64);
        head.push(1);
        head.extend_from_slice(&1_u32.to_le_bytes());
        head.extend_from_slice(&0_u64.to_le_bytes());
        let item = head.len();
        let stored = u32::try_from(value_len).expect("less than twice FILL_BYTES").to_le_bytes();
        head.extend_from_slice(&[2, 0, 0]);
        head.extend_from_slice(&FILL_ID.to_le_bytes());
        head.extend_from_slice(&8_u16.to_le_bytes());
        head.extend_from_slice(&stored);
        head.extend_from_slice(&stored);
        head.extend_from_slice(&fill.number.to_be_bytes());
        let mut sum = Xxh3::new();
        sum.update(&head[item..]);
        let zeros = [0; 64 << 10];
        let mut summed = 0;
        while summed < value_len {
            let part = (value_len - summed).min(zeros.len() as u64);
            sum.update(&zeros[..part as usize]);
            summed += part;
        }
        let mut tail = vec![3];
        tail.extend_from_slice(&sum.digest().to_le_bytes());
        tail.extend_from_slice(TRAILER);
        let hole = from + head.len() as u64;
        match punch(file, hole, value_len) {
            Err(error) if from == 0 && error.kind() == io::ErrorKind::Unsupported => {
                return Ok(false);
            }
            result => result?,
        }
        file.write_all_at(&head, from)?;
        file.write_all_at(&tail, hole + value_len)?;
        from += len;
    }
    file.sync_data()?;
    Ok(true)
}

/// Turns a part of a file into zeros that occupy no space.
#[cfg(target_os = "linux")]
fn punch(file: &File, from: u64, len: u64) -> io::Result<()> {
    use nix::errno::Errno;
    use nix::fcntl::{FallocateFlags, fallocate};

    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let offset = |n: u64| i64::try_from(n).map_err(io::Error::other);
    match fallocate(file, flags, offset(from)?, offset(len)?) {
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Err(io::ErrorKind::Unsupported.into()),
        result => result.map_err(io::Error::from),
    }
}

#[cfg(not(target_os = "linux"))]
fn punch(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
