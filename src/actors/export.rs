//! Writes what an engine holds as a bbolt file, for a client or for another member
//! (formats-and-peers 4.1 and 6.4).
//!
//! Whatever is said about such a file is read from the view that it is written from: index, term,
//! configuration, members and data belong together, although entries are applied meanwhile.

use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use actix::prelude::*;
use engine_api::{EngineError, Table, View};
use quorate_proto::raftpb;
use tokio::sync::oneshot;

use crate::actors::applier::{Applier, Flush};
use crate::actors::shared::{Published, Shared};
use crate::actors::snapshot::v2_membership;
use crate::core::apply::{CLUSTER_VERSION, STORAGE_VERSION, Stored};
use crate::core::bbolt::{BucketSource, PAGE_BYTES, PairVisitor, WriteError, write_compact};
use crate::core::membership::Membership;
use crate::core::types::Index;

/// Bytes gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// A snapshot for another member.
#[derive(Debug)]
pub struct Exported {
    /// Position, configuration and, as the JSON of a v2 store, the members: all as of the file.
    pub snapshot: raftpb::Snapshot,
    /// The database, at its beginning. It has no name: it is gone when it is closed.
    pub db: File,
    /// Bytes of the database.
    pub size: u64,
}

/// Why there is no snapshot.
#[derive(thiserror::Error, Debug)]
pub enum ExportError {
    #[error("member is stopping")]
    Stopped,
    #[error("nothing is applied yet")]
    Empty,
    #[error("storage engine: {0}")]
    Engine(#[from] EngineError),
    #[error("{operation} a file in {}: {source}", dir.display())]
    File {
        operation: &'static str,
        dir: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A snapshot of everything that is applied when this is called, or of more, in a file in `dir`.
///
/// It does not wait for a disk to keep anything: the log of this member has it all, and the receiver makes
/// the file durable.
///
/// # Errors
/// [`ExportError`]; no file is left.
pub async fn export(
    shared: &Arc<Shared>,
    applier: &Addr<Applier>,
    dir: &Path,
) -> Result<Exported, ExportError> {
    let (reply, flushed) = oneshot::channel();
    applier.do_send(Flush(reply));
    flushed.await.map_err(|_| ExportError::Stopped)?;
    let (shared, dir) = (shared.clone(), dir.to_path_buf());
    let gathered = tokio::task::spawn_blocking(move || gather(&shared.published.load_full(), &dir));
    gathered.await.map_err(|_| ExportError::Stopped)?
}

fn gather(now: &Published, dir: &Path) -> Result<Exported, ExportError> {
    let failed =
        |operation| move |source| ExportError::File { operation, dir: dir.to_path_buf(), source };
    let view = now.engine.view()?;
    let Membership { cluster_id, local, learners_max, .. } = *now.members;
    let stored = Stored::read(&*view, Membership::new(cluster_id, local, learners_max))?;
    if stored.applied == Index(0) {
        return Err(ExportError::Empty);
    }
    let mut db = tempfile::tempfile_in(dir).map_err(failed("create"))?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, &mut db);
    let size = write_bbolt(&*view, For::Member, &mut out)?;
    out.flush().map_err(failed("write"))?;
    drop(out);
    db.rewind().map_err(failed("rewind"))?;
    let snapshot = raftpb::Snapshot {
        data: v2_membership(&stored.members).to_v2_store().into(),
        metadata: Some(raftpb::SnapshotMetadata {
            conf_state: Some(stored.members.conf_state()),
            index: stored.applied.0,
            term: stored.term.0,
        }),
    };
    Ok(Exported { snapshot, db, size })
}

/// Whom a file is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum For {
    /// A client, who may restore it with another release: the versions are left out, since they would
    /// shut out every release before this one, whose files look the same (formats-and-peers 4.1).
    Client,
    /// A member of this cluster, which runs at these versions.
    Member,
}

/// Writes all that `view` shows as a bbolt file; answers its length in bytes.
///
/// # Errors
/// As [`write_compact`].
pub fn write_bbolt(view: &dyn View, whom: For, out: &mut dyn Write) -> Result<u64, WriteError> {
    let buckets = Table::ALL.map(|table| Bucket { view, table, whom });
    let sources = buckets.each_ref().map(|bucket| bucket as &dyn BucketSource);
    write_compact(out, &sources, PAGE_BYTES)
}

/// One table as a bucket of the file.
struct Bucket<'v> {
    view: &'v dyn View,
    table: Table,
    whom: For,
}

impl BucketSource for Bucket<'_> {
    fn name(&self) -> &[u8] {
        self.table.name().as_bytes()
    }

    fn pairs(&self, visit: &mut PairVisitor<'_>) -> Result<(), WriteError> {
        let mut result = Ok(());
        self.view
            .scan(self.table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
                let version = matches!(
                    (self.table, key),
                    (Table::Cluster, CLUSTER_VERSION) | (Table::Meta, STORAGE_VERSION)
                );
                if version && self.whom == For::Client {
                    return ControlFlow::Continue(());
                }
                result = visit(key, value);
                if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .map_err(|error| WriteError::Source {
                bucket: self.table.name().into(),
                source: Box::new(error),
            })?;
        result
    }
}
