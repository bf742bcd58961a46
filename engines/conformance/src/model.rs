//! The engine that is too simple to be wrong.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use engine_api::{
    About, Batch, Durability, Engine, EngineError, Op, Reclaim, Reclaimed, Survives, Table, View,
    is_empty_range,
};

const ABOUT: About = About {
    name: "model",
    summary: "maps that are too simple to be wrong",
    buffered_survives: Survives::Nothing,
    durable_survives: Survives::Nothing,
    reclaim: Reclaim::Needless,
    key_bytes_max: None,
    value_bytes_max: None,
    memory: "all data",
    files: "none",
    options: &[],
};

type Rows = BTreeMap<Table, BTreeMap<Bytes, Bytes>>;

/// Plain maps. A view shares them until the next commit, which then copies everything: fine for
/// tests, useless beyond.
#[derive(Default, Debug)]
pub struct Model {
    rows: Mutex<Arc<Rows>>,
}

impl Model {
    fn rows(&self) -> MutexGuard<'_, Arc<Rows>> {
        // a test thread that panicked cannot have left the maps half changed: nothing in between panics
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for Model {
    fn about(&self) -> &'static About {
        &ABOUT
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        Ok(Box::new(ModelView(Arc::clone(&self.rows()))))
    }

    fn commit(&self, batch: &Batch, _: Durability) -> Result<(), EngineError> {
        batch.refuse_empty_keys()?;
        let mut rows = self.rows();
        let rows = Arc::make_mut(&mut rows);
        for op in &batch.ops {
            match op {
                Op::Put { table, key, value } => {
                    rows.entry(*table).or_default().insert(key.clone(), value.clone());
                }
                Op::Delete { table, key } => {
                    rows.entry(*table).or_default().remove(key);
                }
            }
        }
        Ok(())
    }

    fn size(&self) -> Result<u64, EngineError> {
        let rows = self.rows();
        let bytes = |(key, value): (&Bytes, &Bytes)| (key.len() + value.len()) as u64;
        Ok(rows.values().flatten().map(bytes).sum())
    }

    fn size_in_use(&self) -> Result<u64, EngineError> {
        self.size()
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        let size = self.size()?;
        Ok(Reclaimed { before: size, after: size })
    }
}

struct ModelView(Arc<Rows>);

impl View for ModelView {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.0.get(&table).and_then(|rows| rows.get(key)).cloned())
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let Some(rows) = self.0.get(&table) else {
            return Ok(());
        };
        if is_empty_range(from, to) {
            return Ok(());
        }
        for (key, value) in rows.range::<[u8], _>((from, to)) {
            if visit(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let last = self.0.get(&table).and_then(BTreeMap::last_key_value);
        Ok(last.map(|(key, value)| (key.clone(), value.clone())))
    }
}
