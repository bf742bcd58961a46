//! An engine that breaks when told.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use engine_api::{About, Batch, Durability, Engine, EngineError, Reclaimed, View};

/// Passes everything on until the n-th commit, which fails with an I/O error and changes nothing;
/// from then on every call answers `Poisoned`. For tests of what stands above an engine.
#[derive(Debug)]
pub struct Failing<E> {
    inner: E,
    /// Commits that still succeed; `BROKEN` after the failure.
    left: AtomicU64,
}

const BROKEN: u64 = u64::MAX;

impl<E: Engine> Failing<E> {
    /// Fails at commit number `at`, counted from 1.
    ///
    /// # Panics
    /// If `at` is 0 or `u64::MAX`.
    pub fn new(inner: E, at: u64) -> Self {
        assert!(at > 0 && at < BROKEN, "commit {at} never comes");
        Failing { inner, left: AtomicU64::new(at - 1) }
    }

    /// The engine behind: its content is what was committed before the failure.
    pub fn into_inner(self) -> E {
        self.inner
    }

    fn check(&self) -> Result<(), EngineError> {
        match self.left.load(Ordering::Acquire) {
            BROKEN => Err(EngineError::Poisoned("a failure was asked for".into())),
            _ => Ok(()),
        }
    }
}

impl<E: Engine> Engine for Failing<E> {
    fn about(&self) -> &'static About {
        self.inner.about()
    }

    fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
        self.check()?;
        self.inner.view()
    }

    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
        let next = |left| match left {
            BROKEN => None,
            0 => Some(BROKEN),
            left => Some(left - 1),
        };
        match self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, next) {
            Ok(0) => Err(EngineError::Io {
                what: "commit to the failing engine".into(),
                source: io::Error::other("a failure was asked for"),
            }),
            Ok(_) => self.inner.commit(batch, durability),
            Err(_) => self.check(),
        }
    }

    fn size(&self) -> Result<u64, EngineError> {
        self.inner.size()
    }

    fn size_in_use(&self) -> Result<u64, EngineError> {
        self.inner.size_in_use()
    }

    fn reclaim(&self) -> Result<Reclaimed, EngineError> {
        self.check()?;
        self.inner.reclaim()
    }

    fn reclaim_alone(&self) -> Result<Reclaimed, EngineError> {
        self.check()?;
        self.inner.reclaim_alone()
    }

    fn cancel_reclaim(&self) {
        self.inner.cancel_reclaim();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use engine_api::Table;

    #[test]
    fn the_chosen_commit_fails_and_then_all_do() {
        let engine = Failing::new(Model::default(), 3);
        let put = |value: &'static str| {
            let mut batch = Batch::default();
            batch.put(Table::Meta, "k", value);
            engine.commit(&batch, Durability::Buffered)
        };
        put("1").unwrap();
        put("2").unwrap();
        assert!(matches!(put("3"), Err(EngineError::Io { .. })));
        assert!(matches!(put("4"), Err(EngineError::Poisoned(_))));
        assert!(matches!(engine.view().err(), Some(EngineError::Poisoned(_))));
        assert!(matches!(engine.reclaim(), Err(EngineError::Poisoned(_))));
        let kept = engine.into_inner();
        assert_eq!(kept.view().unwrap().get(Table::Meta, b"k").unwrap().unwrap(), "2");
    }
}
