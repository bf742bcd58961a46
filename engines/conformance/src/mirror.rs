//! Two engines that must agree.

use std::ops::{Bound, ControlFlow};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use engine_api::{About, Batch, Durability, Engine, EngineError, Reclaimed, Table, View};

/// Runs every call on both engines and panics at the first difference: for tests only. Answers and
/// sizes are the first one's.
#[derive(Debug)]
pub struct Mirror<A, B> {
    first: A,
    second: B,
    /// Makes a commit on both, and a view of both, one step: else a view could fall between.
    turn: Mutex<()>,
}

impl<A: Engine, B: Engine> Mirror<A, B> {
    /// Engines with equal content, as a rule both empty.
    pub fn new(first: A, second: B) -> Self {
        Mirror { first, second, turn: Mutex::new(()) }
    }
}

/// # Panics
/// If only one of them failed.
fn both<T, U>(
    what: &str,
    first: Result<T, EngineError>,
    second: Result<U, EngineError>,
) -> Result<(T, U), EngineError> {
    match (first, second) {
        (Ok(first), Ok(second)) => Ok((first, second)),
        (Err(error), Err(_)) => Err(error),
        (Err(error), Ok(_)) => panic!("{what}: only the first engine failed: {error}"),
        (Ok(_), Err(error)) => panic!("{what}: only the second engine failed: {error}"),
    }
}

/// Only a cancelled reclaim may differ: one of the engines may have been almost done, or not yet begun.
fn reclaimed(
    first: Result<Reclaimed, EngineError>,
    second: Result<Reclaimed, EngineError>,
) -> Result<Reclaimed, EngineError> {
    match (first, second) {
        (Err(EngineError::Cancelled), Ok(_)) | (Ok(_), Err(EngineError::Cancelled)) => {
            Err(EngineError::Cancelled)
        }
        (first, second) => both("reclaim", first, second).map(|(size, _)| size),
    }
}

impl<A: Engine, B: Engine> Engine for Mirror<A, B> {
    fn about(&self) -> &'static About {
        self.first.about()
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, second) = both("view", self.first.view(), self.second.view())?;
        Ok(Box::new(MirrorView { first, second }))
    }

    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.first.commit(batch, durability);
        both("commit", first, self.second.commit(batch, durability)).map(drop)
    }

    fn size(&self) -> Result<u64, EngineError> {
        both("size", self.first.size(), self.second.size()).map(|(size, _)| size)
    }

    fn size_in_use(&self) -> Result<u64, EngineError> {
        let second = self.second.size_in_use();
        both("size_in_use", self.first.size_in_use(), second).map(|(size, _)| size)
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        reclaimed(self.first.reclaim(), self.second.reclaim())
    }

    fn reclaim_alone(&self) -> Result<Reclaimed, EngineError> {
        reclaimed(self.first.reclaim_alone(), self.second.reclaim_alone())
    }

    fn cancel_reclaim(&self) {
        self.first.cancel_reclaim();
        self.second.cancel_reclaim();
    }
}

struct MirrorView<'a> {
    first: Box<dyn View + 'a>,
    second: Box<dyn View + 'a>,
}

impl View for MirrorView<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let what = format!("get {table} {key:02x?}");
        let (first, second) = both(&what, self.first.get(table, key), self.second.get(table, key))?;
        assert!(first == second, "{what}: {first:02x?} against {second:02x?}");
        Ok(first)
    }

    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let mut rows: Vec<(Bytes, Bytes)> = Vec::new();
        let mut stopped = false;
        let first = self.first.scan(table, from, to, &mut |key, value| {
            assert!(!stopped, "scan {table}: the first engine went on after a break");
            rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            let next = visit(key, value);
            stopped = next.is_break();
            next
        });
        let mut at = 0;
        let second = self.second.scan(table, from, to, &mut |key, value| {
            let expected = rows.get(at).unwrap_or_else(|| {
                panic!("scan {table}: only the second engine holds {key:02x?}, row {at}")
            });
            assert!(
                expected.0 == key && expected.1 == value,
                "scan {table}, row {at}: key {:02x?} against {key:02x?}",
                expected.0
            );
            at += 1;
            if stopped && at == rows.len() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        both("scan", first, second)?;
        assert!(
            at == rows.len(),
            "scan {table}: the first engine has {} rows, the second {at}",
            rows.len()
        );
        Ok(())
    }

    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
        let (first, second) = both("last", self.first.last(table), self.second.last(table))?;
        assert!(first == second, "last of {table}: {first:02x?} against {second:02x?}");
        Ok(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;

    fn model(key: &'static str, value: &'static str) -> Model {
        let model = Model::default();
        let mut batch = Batch::default();
        batch.put(Table::Key, key, value);
        model.commit(&batch, Durability::Buffered).unwrap();
        model
    }

    #[test]
    #[should_panic(expected = "get key")]
    fn another_value_stops_a_get() {
        let mirror = Mirror::new(model("a", "1"), model("a", "2"));
        let _ = mirror.view().unwrap().get(Table::Key, b"a");
    }

    #[test]
    #[should_panic(expected = "scan key, row 0")]
    fn another_key_stops_a_scan() {
        let mirror = Mirror::new(model("a", "1"), model("b", "1"));
        let view = mirror.view().unwrap();
        let all = Bound::Unbounded;
        let _ = view.scan(Table::Key, all, all, &mut |_, _| ControlFlow::Continue(()));
    }

    #[test]
    #[should_panic(expected = "the first engine has 1 rows, the second 0")]
    fn a_missing_row_stops_a_scan() {
        let mirror = Mirror::new(model("a", "1"), Model::default());
        let view = mirror.view().unwrap();
        let all = Bound::Unbounded;
        let _ = view.scan(Table::Key, all, all, &mut |_, _| ControlFlow::Continue(()));
    }
}
