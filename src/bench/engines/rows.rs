//! The data: which rows there must be at any point of the workloads, computed and never kept, so that the
//! benchmark's own tables do not show in an engine's memory.
//!
//! Row n stands under revision n + 2, as in a store whose first change has revision 2. The first `keys`
//! rows make one key each, in order. Every later row overwrites a key; which one is a permutation of the keys that
//! begins anew when all have had their turn. So for each row both its predecessor and its successor are known
//! without a table, and with them what a compaction must have dropped.

use bytes::{Bytes, BytesMut};
use engine_api::{Batch, Table};
use prost::Message as _;
use quorate_proto::mvccpb::KeyValue;

use crate::bench::work::Random;
use crate::core::apply::{CONF_STATE, CONSISTENT_INDEX, TERM};
use crate::core::mvcc::keyspace::revision_key;
use crate::core::types::Revision;

/// The revision of row 0.
const FIRST: u64 = 2;

/// Bytes of a user's key.
pub const KEY_BYTES: u64 = 36;

/// Bytes that a row takes beside its value: revision key, user's key, the other fields.
pub const ROW_OVERHEAD: u64 = 17 + KEY_BYTES + 20;

/// The raft term that batches carry.
const TERM_NOW: u64 = 2;

/// The configuration of a single member, as it goes with each batch.
const CONF_STATE_NOW: &[u8] = br#"{"auto_leave":false,"voters":[10501334649042878790]}"#;

/// The rows of a seed.
#[derive(Clone, Debug)]
pub struct Rows {
    seed: u64,
    keys: u64,
    value_bytes: usize,
    /// The permutation maps j to (j · step + offset) mod keys.
    step: u64,
    offset: u64,
    /// step · inverse = 1 (mod keys).
    inverse: u64,
}

impl Rows {
    /// # Panics
    /// If there is no key.
    pub fn new(seed: u64, keys: u64, value_bytes: usize) -> Self {
        assert!(keys > 0, "there are keys");
        let mut random = Random::new(seed, u64::MAX - 1);
        let (step, inverse) = loop {
            let step = 1 + random.below(keys);
            if let Some(inverse) = inverse(step, keys) {
                break (step, inverse);
            }
        };
        Rows { seed, keys, value_bytes, step, offset: random.below(keys), inverse }
    }

    pub fn keys(&self) -> u64 {
        self.keys
    }

    fn permuted(&self, j: u64) -> u64 {
        let keys = u128::from(self.keys);
        ((u128::from(j % self.keys) * u128::from(self.step) + u128::from(self.offset)) % keys)
            as u64
    }

    /// Which place of the permutation a key has.
    fn place(&self, key: u64) -> u64 {
        let keys = u128::from(self.keys);
        let shifted = u128::from(key) + keys - u128::from(self.offset);
        (shifted % keys * u128::from(self.inverse) % keys) as u64
    }

    /// The row that row `n` supersedes.
    fn predecessor(&self, n: u64) -> Option<u64> {
        let j = n.checked_sub(self.keys)?;
        Some(if j < self.keys { self.permuted(j) } else { j })
    }

    /// The row that supersedes row `n`, should it ever be written.
    fn successor(&self, n: u64) -> u64 {
        if n < self.keys { self.keys + self.place(n) } else { n + self.keys }
    }

    /// Under what row `n` is stored.
    pub fn key(&self, n: u64) -> Bytes {
        revision_key(Revision::main((n + FIRST) as i64), false)
    }

    /// The revision of row `n`.
    pub fn revision(n: u64) -> u64 {
        n + FIRST
    }

    /// What is stored there, an encoded `KeyValue`; `buffer` is memory to cut it from.
    pub fn value(&self, n: u64, buffer: &mut BytesMut) -> Bytes {
        let (key, version) = match n.checked_sub(self.keys) {
            None => (n, 1),
            Some(j) => (self.permuted(j), 2 + j / self.keys),
        };
        let mut random = Random::new(self.seed, n);
        buffer.reserve(self.value_bytes + 8);
        while buffer.len() < self.value_bytes {
            buffer.extend_from_slice(&random.next().to_le_bytes());
        }
        buffer.truncate(self.value_bytes);
        let pair = KeyValue {
            key: format!("/registry/objects/{key:018x}").into(),
            create_revision: (key + FIRST) as i64,
            mod_revision: (n + FIRST) as i64,
            version: version as i64,
            value: buffer.split().freeze(),
            lease: 0,
        };
        buffer.reserve(pair.encoded_len());
        pair.encode(buffer).expect("the buffer was made large enough");
        buffer.split().freeze()
    }
}

/// The inverse of `a` modulo `n`; `None` if they have a common divisor.
fn inverse(a: u64, n: u64) -> Option<u64> {
    let (mut r, mut next_r) = (i128::from(n), i128::from(a % n));
    let (mut t, mut next_t) = (0i128, 1i128);
    while next_r != 0 {
        let quotient = r / next_r;
        (r, next_r) = (next_r, r - quotient * next_r);
        (t, next_t) = (next_t, t - quotient * next_t);
    }
    (r == 1).then(|| t.rem_euclid(i128::from(n)) as u64)
}

/// What has been committed so far, from which follows what the engine must hold.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct State {
    /// Rows written.
    pub written: u64,
    /// The predecessors of the rows below this number are dropped.
    pub compacted: u64,
    /// All rows below this number are dropped.
    pub cut: u64,
    /// The applied index that the last batch carried; 0 before the first.
    pub applied: u64,
}

impl State {
    /// Whether the engine must hold row `n`.
    pub fn holds(&self, rows: &Rows, n: u64) -> bool {
        n < self.written && n >= self.cut && rows.successor(n) >= self.compacted
    }

    /// The rows that the engine must hold, in order.
    pub fn live(self, rows: &Rows) -> impl Iterator<Item = u64> + '_ {
        (self.cut..self.written).filter(move |n| self.holds(rows, *n))
    }

    /// How many rows the engine must hold, as long as nothing was cut.
    pub fn count(&self, rows: &Rows) -> u64 {
        self.written - self.compacted.saturating_sub(rows.keys())
    }

    /// Rows whose predecessors wait for a compaction.
    pub fn superseded(&self, rows: &Rows) -> u64 {
        self.written.saturating_sub(self.compacted.max(rows.keys()))
    }

    /// Adds the next `count` rows to `batch`.
    pub fn put(&mut self, rows: &Rows, count: u64, batch: &mut Batch, buffer: &mut BytesMut) {
        for n in self.written..self.written + count {
            batch.put(Table::Key, rows.key(n), rows.value(n, buffer));
        }
        self.written += count;
        self.applied += count;
    }

    /// Adds the removal of at most `count` superseded rows.
    pub fn compact(&mut self, rows: &Rows, count: u64, batch: &mut Batch) -> u64 {
        let from = self.compacted.max(rows.keys());
        let to = self.written.min(from + count);
        for n in from..to {
            if let Some(old) = rows.predecessor(n) {
                batch.delete(Table::Key, rows.key(old));
            }
        }
        self.compacted = to;
        to - from
    }

    /// Adds the removal of the `count` oldest rows; answers how many there were.
    pub fn cut(&mut self, rows: &Rows, count: u64, batch: &mut Batch) -> u64 {
        let mut removed = 0;
        while removed < count && self.cut < self.written {
            if self.holds(rows, self.cut) {
                batch.delete(Table::Key, rows.key(self.cut));
                removed += 1;
            }
            self.cut += 1;
        }
        self.applied += 1;
        removed
    }

    /// Adds what goes with each batch: the applied index, the term, the configuration.
    pub fn meta(&self, batch: &mut Batch) {
        for (key, value) in self.meta_rows() {
            batch.put(Table::Meta, key, value);
        }
    }

    /// The rows of the meta table, in order of their keys; none before the first batch.
    pub fn meta_rows(&self) -> Vec<(&'static [u8], Bytes)> {
        if self.applied == 0 {
            return Vec::new();
        }
        let mut rows = vec![
            (CONF_STATE, Bytes::from_static(CONF_STATE_NOW)),
            (CONSISTENT_INDEX, Bytes::copy_from_slice(&self.applied.to_be_bytes())),
            (TERM, Bytes::copy_from_slice(&TERM_NOW.to_be_bytes())),
        ];
        rows.sort();
        rows
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use engine_api::Op;

    use super::*;
    use crate::core::mvcc::keyspace::peek;

    #[test]
    fn the_permutation_reaches_every_key_and_is_undone() {
        for (seed, keys) in [(0, 1), (1, 2), (2, 97), (3, 100), (4, 1024)] {
            let rows = Rows::new(seed, keys, 8);
            let all: BTreeSet<u64> = (0..keys).map(|j| rows.permuted(j)).collect();
            assert_eq!(all.len() as u64, keys);
            for j in 0..keys {
                assert_eq!(rows.place(rows.permuted(j)), j, "{rows:?}");
            }
            for n in keys..4 * keys {
                let old = rows.predecessor(n).unwrap();
                assert_eq!(rows.successor(old), n, "{rows:?}");
            }
            assert_eq!(rows.predecessor(keys - 1), None);
        }
        assert_eq!(inverse(4, 10), None);
    }

    #[test]
    fn a_row_is_what_the_server_would_store() {
        let rows = Rows::new(7, 10, 100);
        let mut buffer = BytesMut::new();
        for n in [0, 9, 10, 25] {
            let value = rows.value(n, &mut buffer);
            let pair = KeyValue::decode(&value[..]).unwrap();
            assert_eq!((pair.mod_revision, pair.value.len()), (n as i64 + 2, 100));
            assert_eq!(pair.key.len() as u64, KEY_BYTES);
            assert!(value.len() as u64 + 17 <= 100 + ROW_OVERHEAD);
            assert_eq!(
                peek(&value).unwrap().version,
                [1, 1, 2, 3][[0, 9, 10, 25].iter().position(|m| *m == n).unwrap()]
            );
            if let Some(old) = rows.predecessor(n) {
                let old = KeyValue::decode(&rows.value(old, &mut buffer)[..]).unwrap();
                assert_eq!((&old.key, old.version + 1), (&pair.key, pair.version));
                assert_eq!(old.create_revision, pair.create_revision);
            }
            assert_eq!(rows.value(n, &mut buffer), value, "a row is the same each time");
        }
        assert_ne!(Rows::new(8, 10, 100).value(0, &mut buffer), rows.value(0, &mut buffer));
    }

    #[test]
    fn what_must_be_there_follows_what_was_done() {
        let rows = Rows::new(5, 20, 4);
        let mut state = State::default();
        let mut held = BTreeSet::new();
        let mut buffer = BytesMut::new();
        let mut apply = |state: &State, batch: &Batch| {
            for op in &batch.ops {
                match op {
                    Op::Put { key, .. } => assert!(held.insert(key.clone())),
                    Op::Delete { key, .. } => assert!(held.remove(key)),
                }
            }
            let live: BTreeSet<Bytes> = state.live(&rows).map(|n| rows.key(n)).collect();
            assert_eq!(live, held, "{state:?}");
        };
        for puts in [20, 15, 30] {
            let mut batch = Batch::default();
            state.put(&rows, puts, &mut batch, &mut buffer);
            apply(&state, &batch);
            assert_eq!(state.count(&rows), state.live(&rows).count() as u64);
        }
        assert_eq!(state.superseded(&rows), 45);
        for _ in 0..4 {
            let mut batch = Batch::default();
            let dropped = state.compact(&rows, 13, &mut batch);
            assert_eq!(dropped, batch.len() as u64);
            apply(&state, &batch);
            assert_eq!(state.count(&rows), state.live(&rows).count() as u64);
        }
        assert_eq!((state.superseded(&rows), state.count(&rows)), (0, 20));
        let mut batch = Batch::default();
        assert_eq!(state.cut(&rows, 8, &mut batch), 8);
        apply(&state, &batch);
        let mut batch = Batch::default();
        assert_eq!(state.cut(&rows, 100, &mut batch), 12);
        apply(&state, &batch);
    }
}
