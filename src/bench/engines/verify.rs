//! The check at the end: every row that must be there, byte for byte, and no other.

use std::ops::{Bound, ControlFlow};

use bytes::BytesMut;
use engine_api::{Engine, EngineError, Table};

use super::rows::{Rows, State};
use crate::core::mvcc::keyspace::parse_revision_key;

/// What was compared.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Verified {
    pub rows: u64,
    /// Of keys and values.
    pub bytes: u64,
    /// CRC-32C of all keys and values in order.
    pub digest: u32,
}

/// How the content differs from what was committed.
#[derive(thiserror::Error, Debug)]
pub enum VerifyError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("revision {revision} is missing; {found} follows")]
    Missing { revision: u64, found: String },
    #[error("{found} is there, which must not be")]
    Extra { found: String },
    #[error(
        "revision {revision} has another value than was committed ({len} bytes, not {expected})"
    )]
    Value { revision: u64, len: usize, expected: usize },
    #[error("table {table} differs: it holds {found}")]
    Table { table: Table, found: String },
}

/// Compares all tables with what `state` says; `progress` is told how many rows are done.
///
/// # Errors
/// The first difference.
pub fn verify(
    engine: &dyn Engine,
    rows: &Rows,
    state: &State,
    progress: &mut dyn FnMut(u64),
) -> Result<Verified, VerifyError> {
    let view = engine.view()?;
    let mut expected = state.live(rows);
    let mut buffer = BytesMut::new();
    let mut done = Verified::default();
    let mut wrong = None;
    view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut |key, value| match compare(
        rows,
        expected.next(),
        key,
        value,
        &mut buffer,
    ) {
        Ok(()) => {
            done.rows += 1;
            done.bytes += (key.len() + value.len()) as u64;
            done.digest = crc32c::crc32c_append(crc32c::crc32c_append(done.digest, key), value);
            if done.rows.is_multiple_of(4096) {
                progress(done.rows);
            }
            ControlFlow::Continue(())
        }
        Err(error) => {
            wrong = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    if let Some(n) = expected.next() {
        let found = "nothing".to_owned();
        return Err(VerifyError::Missing { revision: Rows::revision(n), found });
    }
    for table in Table::ALL.into_iter().filter(|table| *table != Table::Key) {
        let mut found = Vec::new();
        view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        })?;
        let expected = if table == Table::Meta { state.meta_rows() } else { Vec::new() };
        let same = found.len() == expected.len()
            && found.iter().zip(&expected).all(|(found, expected)| {
                (&found.0[..], &found.1[..]) == (expected.0, &expected.1[..])
            });
        if !same {
            let names: Vec<String> =
                found.iter().map(|(key, value)| format!("{key:02x?}={value:02x?}")).collect();
            return Err(VerifyError::Table { table, found: names.join(", ") });
        }
    }
    Ok(done)
}

fn compare(
    rows: &Rows,
    expected: Option<u64>,
    key: &[u8],
    value: &[u8],
    buffer: &mut BytesMut,
) -> Result<(), VerifyError> {
    let Some(n) = expected else { return Err(VerifyError::Extra { found: named(key) }) };
    let wanted = rows.key(n);
    if key < &wanted[..] {
        return Err(VerifyError::Extra { found: named(key) });
    }
    if key > &wanted[..] {
        return Err(VerifyError::Missing { revision: Rows::revision(n), found: named(key) });
    }
    let wanted = rows.value(n, buffer);
    if value == wanted {
        return Ok(());
    }
    let (revision, len, expected) = (Rows::revision(n), value.len(), wanted.len());
    Err(VerifyError::Value { revision, len, expected })
}

fn named(key: &[u8]) -> String {
    match parse_revision_key(key) {
        Some((revision, false)) if revision.sub == 0 => format!("revision {}", revision.main),
        _ => format!("key {key:02x?}"),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use engine_api::{About, Batch, Durability, Reclaimed, View};
    use engine_memory::Memory;

    use super::*;

    /// Shows a store in which something was done to one row.
    struct Altered {
        inner: Memory,
        row: Bytes,
        how: How,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum How {
        Not,
        Value,
        Gone,
        Twice,
    }

    struct AlteredView<'e>(Box<dyn View + 'e>, &'e Altered);

    impl Engine for Altered {
        fn about(&self) -> &'static About {
            self.inner.about()
        }

        fn view(&self) -> Result<Box<dyn View + '_>, EngineError> {
            Ok(Box::new(AlteredView(self.inner.view()?, self)))
        }

        fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError> {
            self.inner.commit(batch, durability)
        }

        fn size(&self) -> Result<u64, EngineError> {
            self.inner.size()
        }

        fn size_in_use(&self) -> Result<u64, EngineError> {
            self.inner.size_in_use()
        }

        fn reclaim(&self) -> Result<Reclaimed, EngineError> {
            self.inner.reclaim()
        }
    }

    impl View for AlteredView<'_> {
        fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
            self.0.get(table, key)
        }

        fn scan(
            &self,
            table: Table,
            from: Bound<&[u8]>,
            to: Bound<&[u8]>,
            visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
        ) -> Result<(), EngineError> {
            let Altered { row, how, .. } = self.1;
            self.0.scan(table, from, to, &mut |key, value| match how {
                How::Value if key == row => {
                    let mut changed = value.to_vec();
                    *changed.last_mut().expect("a value") ^= 1;
                    visit(key, &changed)
                }
                How::Gone if key == row => ControlFlow::Continue(()),
                How::Twice if key == row => {
                    visit(key, value)?;
                    visit(key, value)
                }
                _ => visit(key, value),
            })
        }

        fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError> {
            self.0.last(table)
        }
    }

    /// What verification says of 30 rows (5 of them superseded) of which `row` was altered.
    fn altered(row: u64, how: How) -> (Result<Verified, VerifyError>, u64) {
        let rows = Rows::new(1, 20, 50);
        let (mut state, mut batch) = (State::default(), Batch::default());
        state.put(&rows, 30, &mut batch, &mut BytesMut::new());
        state.compact(&rows, 5, &mut batch);
        state.meta(&mut batch);
        let engine = Altered { inner: Memory::new(), row: rows.key(row), how };
        engine.commit(&batch, Durability::Buffered).unwrap();
        let live = state.count(&rows);
        (verify(&engine, &rows, &state, &mut |_| {}), live)
    }

    #[test]
    fn what_was_committed_is_accepted() {
        let (verified, live) = altered(0, How::Not);
        let verified = verified.unwrap();
        assert_eq!((verified.rows, live), (25, 25));
        assert!(verified.bytes > 25 * (17 + 50) && verified.digest != 0, "{verified:?}");
    }

    #[test]
    fn one_row_that_was_changed_lost_or_added_is_noticed() {
        let error = |row, how| altered(row, how).0.unwrap_err().to_string();
        assert!(error(25, How::Value).starts_with("revision 27 has another value"));
        assert_eq!(error(25, How::Gone), "revision 27 is missing; revision 28 follows");
        assert_eq!(error(29, How::Gone), "revision 31 is missing; nothing follows");
        assert_eq!(error(25, How::Twice), "revision 27 is there, which must not be");
        assert_eq!(error(29, How::Twice), "revision 31 is there, which must not be");
    }

    #[test]
    fn the_other_tables_count_too() {
        let rows = Rows::new(1, 20, 50);
        let (mut state, mut batch) = (State::default(), Batch::default());
        state.put(&rows, 20, &mut batch, &mut BytesMut::new());
        let engine = Memory::new();
        engine.commit(&batch, Durability::Buffered).unwrap();
        let error = verify(&engine, &rows, &state, &mut |_| {}).unwrap_err().to_string();
        assert_eq!(error, "table meta differs: it holds ");
        let mut batch = Batch::default();
        state.meta(&mut batch);
        batch.put(Table::Lease, "a", "b");
        engine.commit(&batch, Durability::Buffered).unwrap();
        let error = verify(&engine, &rows, &state, &mut |_| {}).unwrap_err().to_string();
        assert!(error.starts_with("table lease differs"), "{error}");
    }
}
