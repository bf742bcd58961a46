//! Reading changes in the order they were made: watch replay, hashing.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use engine_api::{Table, View};
use quorate_proto::KeyValueBytes;

use super::keyspace::{parse_revision_key, revision_key, tombstone_event};
use super::{Change, ReadError, Snapshot};
use crate::core::event::{Event, EventKind};
use crate::core::types::Revision;

impl Snapshot {
    /// Calls `visit` with every stored change of main revisions `from..=to` in order, until it
    /// breaks: what the engine holds, then what it does not hold yet.
    ///
    /// # Errors
    /// `Storage`, or `Damaged` if a key of the table is not a revision key.
    pub fn changes(
        &self,
        view: &dyn View,
        from: i64,
        to: i64,
        visit: &mut dyn FnMut(Revision, bool, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        let low = revision_key(Revision::main(from.max(0)), false);
        let high = revision_key(Revision::main(to.saturating_add(1)), false);
        let mut last = None;
        let mut damaged = None;
        let mut broke = false;
        view.scan(Table::Key, Bound::Included(&low), Bound::Excluded(&high), &mut |key, value| {
            let Some((revision, tombstone)) = parse_revision_key(key) else {
                damaged = Some(last.unwrap_or_default());
                return ControlFlow::Break(());
            };
            last = Some(revision);
            let flow = visit(revision, tombstone, value);
            broke = flow.is_break();
            flow
        })?;
        if let Some(after) = damaged {
            return Err(ReadError::Damaged(after));
        }
        if broke {
            return Ok(());
        }
        // The view may be newer than the snapshot and hold some of these already.
        let start = match last {
            Some(last) => Bound::Excluded(last),
            None => Bound::Included(Revision::main(from)),
        };
        let end = Bound::Excluded(Revision::main(to.saturating_add(1)));
        for overlay in [&self.committing, &self.pending] {
            for (revision, Change { tombstone, value }) in overlay.range((start, end)) {
                if visit(*revision, *tombstone, &value.0).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// The event that a stored change makes.
///
/// # Errors
/// `Damaged` if the stored value is not a `KeyValue`.
pub fn event(revision: Revision, tombstone: bool, stored: &[u8]) -> Result<Event, ReadError> {
    let stored = KeyValueBytes(Bytes::copy_from_slice(stored));
    let kv = stored.parse().map_err(|_| ReadError::Damaged(revision))?;
    Ok(if tombstone {
        let told = tombstone_event(&kv.key, revision.main);
        Event { key: kv.key, revision, kind: EventKind::Delete, kv: told }
    } else {
        let creation = kv.create_revision == kv.mod_revision;
        Event { key: kv.key, revision, kind: EventKind::Put { creation }, kv: stored }
    })
}
