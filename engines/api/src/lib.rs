//! What Quorate asks of a storage engine: ordered byte keys in a fixed set of tables, one atomic
//! batch at a time, and views that no later batch disturbs.
//!
//! The WAL, not the engine, is the truth after a crash. An engine may lose what it was told to keep
//! only as [`Durability::Buffered`], newest batches first and each batch whole, and must never lose
//! a batch out of the middle, tear one, or lose what it was told to keep as [`Durability::Durable`].

mod about;

use std::fmt;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;

pub use about::{About, OptionError, OptionKind, OptionSpec, Options, Reclaim, Survives};

/// The tables: etcd's buckets, by their names in a bbolt file (formats-and-peers section 3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Table {
    /// Revision key → `mvccpb.KeyValue`.
    Key,
    /// Applied index, term, configuration, compaction marks.
    Meta,
    Lease,
    Alarm,
    Cluster,
    Members,
    MembersRemoved,
    Auth,
    AuthUsers,
    AuthRoles,
}

impl Table {
    /// Every table, in the byte order of the names.
    pub const ALL: [Table; 10] = [
        Table::Alarm,
        Table::Auth,
        Table::AuthRoles,
        Table::AuthUsers,
        Table::Cluster,
        Table::Key,
        Table::Lease,
        Table::Members,
        Table::MembersRemoved,
        Table::Meta,
    ];

    /// The bucket's name in a bbolt file.
    pub const fn name(self) -> &'static str {
        match self {
            Table::Key => "key",
            Table::Meta => "meta",
            Table::Lease => "lease",
            Table::Alarm => "alarm",
            Table::Cluster => "cluster",
            Table::Members => "members",
            Table::MembersRemoved => "members_removed",
            Table::Auth => "auth",
            Table::AuthUsers => "authUsers",
            Table::AuthRoles => "authRoles",
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One change of a [`Batch`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    Put { table: Table, key: Bytes, value: Bytes },
    Delete { table: Table, key: Bytes },
}

impl Op {
    /// Bytes of key and value, without overhead.
    pub fn len(&self) -> usize {
        match self {
            Op::Put { key, value, .. } => key.len() + value.len(),
            Op::Delete { key, .. } => key.len(),
        }
    }

    /// Whether the operation carries no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Changes that take effect together, in order: plain data that can be compared, logged, mirrored.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Batch {
    pub ops: Vec<Op>,
}

impl Batch {
    /// Sets `key` to `value`.
    pub fn put(&mut self, table: Table, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.ops.push(Op::Put { table, key: key.into(), value: value.into() });
    }

    /// Removes `key`; nothing happens if it is absent.
    pub fn delete(&mut self, table: Table, key: impl Into<Bytes>) {
        self.ops.push(Op::Delete { table, key: key.into() });
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// How many operations it holds.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Refuses an empty key. Not every backend can store one and etcd never writes one, so each
    /// engine calls this at the start of [`Engine::commit`] and all behave alike.
    ///
    /// # Errors
    /// `Unusable`, naming the operation's place in the batch.
    pub fn refuse_empty_keys(&self) -> Result<(), EngineError> {
        for (at, op) in self.ops.iter().enumerate() {
            let (Op::Put { table, key, .. } | Op::Delete { table, key }) = op;
            if key.is_empty() {
                return Err(EngineError::Unusable(format!(
                    "operation {at} of the batch has an empty key for table {table}"
                )));
            }
        }
        Ok(())
    }
}

/// Whether no key can lie within the bounds. Backends and standard maps disagree about inverted
/// bounds (an empty result, an error, a panic), so an engine asks here first.
pub fn is_empty_range(from: Bound<&[u8]>, to: Bound<&[u8]>) -> bool {
    match (from, to) {
        (Bound::Unbounded, Bound::Excluded(to)) => to.is_empty(),
        (Bound::Unbounded, _) | (_, Bound::Unbounded) => false,
        (Bound::Included(from), Bound::Included(to)) => from > to,
        (Bound::Included(from) | Bound::Excluded(from), Bound::Excluded(to))
        | (Bound::Excluded(from), Bound::Included(to)) => from >= to,
    }
}

/// What a commit promises about a crash of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Visible at once; survives a crash only if a later durable commit returned.
    Buffered,
    /// On disk, with everything committed before it, when `commit` returns.
    Durable,
}

/// An ordered key/value store. One committer at a time; any number of views.
pub trait Engine: Send + Sync + 'static {
    /// What it promises.
    fn about(&self) -> &'static About;

    /// The name under which the configuration selects it.
    fn name(&self) -> &'static str {
        self.about().name
    }

    /// A view of everything committed before this call. It blocks no commit; no later commit shows
    /// in it. Views are meant to be short: an open one can keep space from being reused.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, or `Poisoned` after a failed commit.
    fn view(&self) -> Result<Box<dyn View + '_>, EngineError>;

    /// Applies `batch` whole or not at all, its operations in order. An empty batch with
    /// [`Durability::Durable`] makes all earlier commits durable.
    ///
    /// # Errors
    /// After `Io` or `Corrupt` every further commit answers `Poisoned`: the caller stops the member.
    /// `Unusable` refuses the batch (an empty key, a value beyond the backend's limit) and changes
    /// nothing.
    fn commit(&self, batch: &Batch, durability: Durability) -> Result<(), EngineError>;

    /// Bytes that the engine occupies on disk (or in memory, if it has no file).
    ///
    /// # Errors
    /// `Io` if the file cannot be examined.
    fn size(&self) -> Result<u64, EngineError>;

    /// Bytes of [`Engine::size`] that hold live data, the rest being free for reuse.
    ///
    /// # Errors
    /// As [`Engine::view`].
    fn size_in_use(&self) -> Result<u64, EngineError>;

    /// Gives free space back to the file system, while views and commits go on. The result is
    /// durable. Returns the size before and after.
    ///
    /// # Errors
    /// `Io` (a full disk: the engine goes on with its old file), `Cancelled`, `Poisoned`; `Unusable` from
    /// an engine that promises [`Reclaim::Never`].
    fn reclaim(&self) -> Result<Reclaimed, EngineError>;

    /// As [`reclaim`](Engine::reclaim), by somebody who has the engine alone: it may take all that the disk
    /// gives.
    ///
    /// # Errors
    /// As there.
    fn reclaim_alone(&self) -> Result<Reclaimed, EngineError> {
        self.reclaim()
    }

    /// Lets a [`reclaim`](Engine::reclaim) that is under way end soon, with `Cancelled` unless it is
    /// almost done: the engine is about to be closed or replaced. One that begins later is not affected.
    /// An engine whose reclaim never takes long may leave this as it is.
    fn cancel_reclaim(&self) {}
}

/// What [`Engine::reclaim`] achieved: values of [`Engine::size`] in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reclaimed {
    pub before: u64,
    pub after: u64,
}

/// A frozen state of all tables. A table that was never written is empty.
pub trait View {
    /// The value of `key`, if present.
    ///
    /// # Errors
    /// `Io` or `Corrupt`.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Calls `visit` with every key in the bounds in ascending byte order, until it breaks.
    /// Bounds that exclude everything visit nothing.
    ///
    /// # Errors
    /// `Io` or `Corrupt`.
    fn scan(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), EngineError>;

    /// The greatest key of the table and its value.
    ///
    /// # Errors
    /// `Io` or `Corrupt`.
    fn last(&self, table: Table) -> Result<Option<(Bytes, Bytes)>, EngineError>;
}

/// Why an engine cannot go on. All are local to this member: it stops serving.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum EngineError {
    /// The operating system refused: `what` names the operation and the file.
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
    /// The file holds what the engine never wrote.
    #[error("corrupt storage at {at}: {what}")]
    Corrupt { at: String, what: String },
    /// [`Engine::cancel_reclaim`] was called; nothing has changed.
    #[error("giving space back was cancelled")]
    Cancelled,
    /// An earlier commit failed, so the state of the file is unknown.
    #[error("storage engine is stopped after an earlier error: {0}")]
    Poisoned(String),
    /// The options or the file cannot be used by this engine.
    #[error("{0}")]
    Unusable(String),
}
