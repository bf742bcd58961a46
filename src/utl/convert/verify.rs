//! Whether two engines hold the same: row by row, and by the hash that members compare.

use std::fmt;
use std::ops::{Bound, ControlFlow};

use engine_api::{EngineError, Table, View};

use crate::core::mvcc::hash::KvHash;
use crate::core::mvcc::{ReadError, Store};

/// Rows, and bytes of rows, that are held of one side while the other is read.
const CHUNK_ROWS: usize = 8192;
const CHUNK_BYTES: usize = 4 << 20;

/// The first row in which two engines differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    pub table: Table,
    pub key: Vec<u8>,
    pub what: &'static str,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {} of table {} {}", self.key.escape_ascii(), self.table, self.what)
    }
}

/// Rows one behind the other.
#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    /// Where key and value end.
    ends: Vec<(usize, usize)>,
}

impl Chunk {
    fn push(&mut self, key: &[u8], value: &[u8]) {
        self.bytes.extend_from_slice(key);
        let middle = self.bytes.len();
        self.bytes.extend_from_slice(value);
        self.ends.push((middle, self.bytes.len()));
    }

    fn row(&self, n: usize) -> Option<(&[u8], &[u8])> {
        let (middle, end) = *self.ends.get(n)?;
        let begin = n.checked_sub(1).map_or(0, |before| self.ends[before].1);
        Some((&self.bytes[begin..middle], &self.bytes[middle..end]))
    }

    fn is_full(&self) -> bool {
        self.ends.len() >= CHUNK_ROWS || self.bytes.len() >= CHUNK_BYTES
    }
}

/// Reads a table of both whole; answers the first row in which `copy` is not what `source` is. `read` is
/// told how many bytes were compared, and answers whether to go on.
///
/// # Errors
/// Those of the views.
pub fn first_difference(
    source: &dyn View,
    copy: &dyn View,
    table: Table,
    read: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<Difference>, EngineError> {
    let differs = |key: &[u8], what| Some(Difference { table, key: key.to_vec(), what });
    let mut chunk = Chunk::default();
    let mut last: Option<Vec<u8>> = None;
    loop {
        let from = last.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        chunk.bytes.clear();
        chunk.ends.clear();
        source.scan(table, from, Bound::Unbounded, &mut |key, value| {
            chunk.push(key, value);
            if chunk.is_full() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let ended = !chunk.is_full();
        let (mut at, mut difference) = (0, None);
        copy.scan(table, from, Bound::Unbounded, &mut |key, value| {
            difference = match chunk.row(at) {
                None if ended => differs(key, "is in the copy alone"),
                None => return ControlFlow::Break(()),
                Some((expected, _)) if expected < key => differs(expected, "is missing"),
                Some((expected, _)) if expected > key => differs(key, "is in the copy alone"),
                Some((_, expected)) if expected != value => differs(key, "has another value"),
                Some(_) => None,
            };
            at += 1;
            if difference.is_none() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        if difference.is_none()
            && let Some((missing, _)) = chunk.row(at)
        {
            difference = differs(missing, "is missing");
        }
        if difference.is_some() {
            return Ok(difference);
        }
        if !read(chunk.bytes.len() as u64) || ended {
            return Ok(None);
        }
        last = chunk.row(chunk.ends.len() - 1).map(|(key, _)| key.to_vec());
    }
}

/// `HashKV` of the current revision, computed as a member computes it after a start.
///
/// # Errors
/// `Corrupt` for what no member has written; those of the view.
pub fn hash_kv(view: &dyn View) -> Result<KvHash, ReadError> {
    let restored = Store::restore(view).map_err(ReadError::Storage)?;
    restored.store.now().hash_kv(view, 0)
}

#[cfg(test)]
mod tests {
    use engine_api::{Batch, Durability, Engine};
    use engine_memory::Memory;

    use super::*;

    fn filled(rows: usize) -> Memory {
        let memory = Memory::new();
        let mut batch = Batch::default();
        for n in 0..rows {
            batch.put(Table::Key, format!("{n:08}"), vec![n as u8; n % 300]);
        }
        memory.commit(&batch, Durability::Buffered).unwrap();
        memory
    }

    fn difference(a: &Memory, b: &Memory) -> Option<String> {
        let (a, b) = (a.view().unwrap(), b.view().unwrap());
        let mut bytes = 0;
        let read = &mut |more| {
            bytes += more;
            true
        };
        let found = first_difference(&*a, &*b, Table::Key, read).unwrap();
        found.map(|difference| difference.to_string())
    }

    #[test]
    fn every_kind_of_difference_is_found_wherever_it_is() {
        for rows in [1, 2, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS] {
            let whole = filled(rows);
            assert_eq!(difference(&whole, &filled(rows)), None, "{rows}");
            for at in [0, rows / 2, rows - 1, CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS] {
                if at >= rows {
                    continue;
                }
                let key = format!("{at:08}");
                let changed = |change: &dyn Fn(&mut Batch)| {
                    let other = filled(rows);
                    let mut batch = Batch::default();
                    change(&mut batch);
                    other.commit(&batch, Durability::Buffered).unwrap();
                    other
                };
                let other = changed(&|batch| batch.delete(Table::Key, key.clone()));
                let missing = Some(format!("key {key} of table key is missing"));
                assert_eq!(difference(&whole, &other), missing, "{rows}");
                let alone = Some(format!("key {key} of table key is in the copy alone"));
                assert_eq!(difference(&other, &whole), alone, "{rows}");
                let other = changed(&|batch| batch.put(Table::Key, key.clone(), "?"));
                let value = Some(format!("key {key} of table key has another value"));
                assert_eq!(difference(&whole, &other), value, "{rows}");
            }
        }
        assert_eq!(difference(&filled(0), &filled(0)), None);
        assert!(difference(&filled(0), &filled(1)).is_some());
    }

    #[test]
    fn all_bytes_are_told_until_it_is_stopped() {
        let (a, b) = (filled(3 * CHUNK_ROWS), filled(3 * CHUNK_ROWS));
        let (a, b) = (a.view().unwrap(), b.view().unwrap());
        let mut told = Vec::new();
        first_difference(&*a, &*b, Table::Key, &mut |bytes| {
            told.push(bytes);
            true
        })
        .unwrap();
        let all: u64 = (0..3 * CHUNK_ROWS as u64).map(|n| 8 + n % 300).sum();
        assert_eq!(told.iter().sum::<u64>(), all);
        let mut calls = 0;
        first_difference(&*a, &*b, Table::Key, &mut |_| {
            calls += 1;
            false
        })
        .unwrap();
        assert_eq!(calls, 1);
    }
}
