//! What a change of the store looks like to those who follow it.

use bytes::Bytes;
use quorate_proto::KeyValueBytes;

use super::types::Revision;

/// One put or one tombstone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    pub key: Bytes,
    /// Where in history the change stands; `sub` orders the changes of one transaction.
    pub revision: Revision,
    pub kind: EventKind,
    /// The encoded `mvccpb.KeyValue` that a watcher is sent: the stored bytes of a put; for a
    /// tombstone a message with only `key` and `mod_revision` (v3-api 3.8).
    pub kv: KeyValueBytes,
}

/// Which change an [`Event`] reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    Put {
        /// `create_revision == mod_revision`: there is no previous value.
        creation: bool,
    },
    Delete,
}

/// The past of the store, as a watcher that catches up needs it. Implemented by the reader's side of
/// the MVCC store; a test implements it over a vector.
pub trait History {
    /// The current (last) main revision that this view of history holds.
    fn revision(&self) -> i64;

    /// Revisions below this one cannot be read; -1 before the first compaction.
    fn compact_revision(&self) -> i64;

    /// Calls `visit` with the changes of the main revisions `from..=to`, in order, until it answers
    /// false.
    ///
    /// # Errors
    /// [`HistoryError::Compacted`] if some revision asked for has been compacted meanwhile.
    fn changes(
        &self,
        from: i64,
        to: i64,
        visit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<(), HistoryError>;

    /// The encoded value that `key` had at main revision `at`; `None` if it did not exist then, or
    /// if that revision is compacted.
    ///
    /// # Errors
    /// [`HistoryError::Storage`].
    fn value_at(&self, key: &[u8], at: i64) -> Result<Option<KeyValueBytes>, HistoryError>;
}

/// Why history cannot be read.
#[derive(thiserror::Error, Debug)]
pub enum HistoryError {
    #[error("revision {asked} is compacted, history begins at {compacted}")]
    Compacted { asked: i64, compacted: i64 },
    #[error(transparent)]
    Storage(#[from] engine_api::EngineError),
}
