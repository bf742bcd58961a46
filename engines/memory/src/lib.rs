//! The engine without files: persistent maps, of which a view is a copy that shares all nodes.
//!
//! A commit works on its own copy and publishes it in one step, so a reader waits for nothing but the
//! exchange of one pointer, and the committer never waits for a reader. Everything is lost when the
//! engine is dropped, whatever the durability: for tests, and as the upper bound in benchmarks.

use std::mem;
use std::ops::{Bound, ControlFlow};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use engine_api::{
    About, Batch, Durability, Engine, EngineError, Op, Reclaim, Reclaimed, Survives, Table, View,
    is_empty_range,
};
use imbl::OrdMap;

/// What the engine promises.
pub const ABOUT: About = About {
    name: "memory",
    summary: "everything in memory, rebuilt from the log at each start; for tests and comparisons",
    buffered_survives: Survives::Nothing,
    durable_survives: Survives::Nothing,
    reclaim: Reclaim::Needless,
    key_bytes_max: None,
    value_bytes_max: None,
    memory: "all data, and about 90 bytes a row",
    files: "none",
    options: &[],
};

/// Estimated bytes of a row beyond its key and value: two handles of 32 bytes in a node that is on
/// average three quarters full.
const ROW_OVERHEAD: u64 = 88;

type Rows = OrdMap<Bytes, Bytes>;

#[derive(Clone, Default, Debug)]
struct State {
    tables: [Rows; Table::ALL.len()],
    /// Bytes of all keys and values, and their rows' overhead.
    bytes: u64,
}

impl State {
    fn rows(&self, table: Table) -> &Rows {
        &self.tables[table as usize]
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Put { table, key, value } => {
                self.bytes += row_bytes(key.len(), value.len());
                // copies: a handle that shares the request's buffer would keep all of it in memory
                let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
                let key_bytes = key.len();
                if let Some(old) = self.tables[*table as usize].insert(key, value) {
                    self.bytes -= row_bytes(key_bytes, old.len());
                }
            }
            Op::Delete { table, key } => {
                if let Some(old) = self.tables[*table as usize].remove(key) {
                    self.bytes -= row_bytes(key.len(), old.len());
                }
            }
        }
    }
}

fn row_bytes(key_bytes: usize, value_bytes: usize) -> u64 {
    (key_bytes + value_bytes) as u64 + ROW_OVERHEAD
}

/// An engine in memory only; empty at first.
#[derive(Default, Debug)]
pub struct Memory {
    /// One committer at a time.
    turn: Mutex<()>,
    published: RwLock<Arc<State>>,
}

impl Memory {
    /// An empty engine.
    pub fn new() -> Self {
        Self::default()
    }

    fn published(&self) -> Arc<State> {
        // nothing panics while the lock is held
        Arc::clone(&self.published.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Engine for Memory {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        Ok(Box::new(MemoryView(self.published())))
    }

    fn commit(&self, batch: &Batch, _: Durability) -> Result<(), EngineError> {
        batch.refuse_empty_keys()?;
        if batch.is_empty() {
            return Ok(());
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = State::clone(&self.published());
        for op in &batch.ops {
            state.apply(op);
        }
        let state = Arc::new(state);
        let old = mem::replace(
            &mut *self.published.write().unwrap_or_else(PoisonError::into_inner),
            state,
        );
        // after the lock: the old nodes that no view shares are freed here
        drop(old);
        Ok(())
    }

    /// An estimate: keys, values and the maps' share.
    fn size(&self) -> Result<u64, EngineError> {
        Ok(self.published().bytes)
    }

    fn size_in_use(&self) -> Result<u64, EngineError> {
        self.size()
    }

    /// Nothing to do: what was deleted is freed as soon as no view holds it.
    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        let size = self.size()?;
        Ok(Reclaimed { before: size, after: size })
    }
}

struct MemoryView(Arc<State>);

impl View for MemoryView {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.0.rows(table).get(key).cloned())
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        if is_empty_range(from, to) {
            return Ok(());
        }
        for (key, value) in self.0.rows(table).range::<_, [u8]>((from, to)) {
            if visit(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let last = self.0.rows(table).get_max();
        Ok(last.map(|(key, value)| (key.clone(), value.clone())))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use engine_conformance::{Mirror, Model};

    mod conformance {
        engine_conformance::suite!(|_: &std::path::Path| crate::Memory::new(), persistent: false);
    }

    #[test]
    fn random_operations_match_a_mirrored_model() {
        engine_conformance::cases::random_operations_match_the_model(|_: &Path| {
            Mirror::new(Memory::new(), Model::default())
        });
    }

    #[test]
    fn size_returns_to_zero() {
        let engine = Memory::default();
        let mut batch = Batch::default();
        for n in 0..100_u32 {
            batch.put(Table::Key, n.to_be_bytes().to_vec(), vec![0; 10]);
            batch.put(Table::Key, n.to_be_bytes().to_vec(), vec![0; 20]);
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
        assert_eq!(engine.size().unwrap(), 100 * (4 + 20 + ROW_OVERHEAD));
        let mut batch = Batch::default();
        for n in 0..100_u32 {
            batch.delete(Table::Key, n.to_be_bytes().to_vec());
        }
        engine.commit(&batch, Durability::Buffered).unwrap();
        assert_eq!(engine.size().unwrap(), 0);
    }
}
