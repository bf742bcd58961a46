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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::Command;

    use quorate_proto::etcdserverpb as pb;

    use super::*;
    use crate::actors::rig::{LEADER, LOCAL, Rig, TERM, compact, grant, put};
    use crate::core::apply::CONSISTENT_INDEX;
    use crate::core::bbolt::Reader;
    use crate::core::command::Request;
    use crate::core::snap::V2Membership;

    type Rows = Vec<(Vec<u8>, Vec<u8>)>;

    fn rows(view: &dyn View, table: Table) -> Rows {
        let mut rows = Vec::new();
        view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            rows.push((key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        })
        .expect("a scan");
        rows
    }

    fn bucket_rows(reader: &Reader<&[u8]>, table: Table) -> Rows {
        let bucket = reader.bucket(table.name().as_bytes()).expect("sound");
        let mut rows = Vec::new();
        bucket
            .expect("all ten buckets are there")
            .scan(Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
                rows.push((key.to_vec(), value.to_vec()));
                ControlFlow::Continue(())
            })
            .expect("sound");
        rows
    }

    async fn filled(dir: &Path) -> Rig {
        let mut rig = Rig::start(dir, true);
        rig.found();
        rig.requests(vec![grant(5), put("a", "1"), put("a", "2"), put("b", &"x".repeat(10_000))]);
        rig.requests(vec![
            Request::DeleteRange(pb::DeleteRangeRequest { key: "b".into(), ..Default::default() }),
            compact(3),
            put("c", "3"),
        ]);
        rig.applied().await;
        rig
    }

    #[test]
    fn what_is_said_of_a_database_is_read_from_it() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().expect("a directory");
            let mut rig = filled(dir.path()).await;
            let mut exported = export(&rig.shared, &rig.applier, dir.path()).await.unwrap();
            let last = rig.last();
            // What is applied later is not in it.
            rig.requests(vec![put("later", "4")]);
            rig.applied().await;

            let mut bytes = Vec::new();
            exported.db.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, exported.size);
            let metadata = exported.snapshot.metadata.unwrap();
            assert_eq!((metadata.index, metadata.term), (last.0, TERM.0));
            let members = metadata.conf_state.unwrap();
            assert_eq!((members.voters, members.learners), (vec![LOCAL, LEADER], vec![]));
            let told = V2Membership::from_v2_store(&exported.snapshot.data).unwrap();
            let names: Vec<_> = told.members.iter().map(|m| (m.id, &m.name[..])).collect();
            assert_eq!(names, [(LOCAL, "m1"), (LEADER, "m2")]);
            assert_eq!(told.cluster_version.as_deref(), Some("3.7.0"));

            let reader = Reader::open(&bytes[..]).unwrap();
            let meta = reader.bucket(b"meta").unwrap().unwrap();
            let number = |key| meta.get(key).unwrap().map(|value| value.to_vec());
            assert_eq!(number(CONSISTENT_INDEX), Some(last.0.to_be_bytes().to_vec()));
            assert_eq!(number(b"term"), Some(1u64.to_be_bytes().to_vec()));
            assert_eq!(number(STORAGE_VERSION), Some(b"3.7.0".to_vec()));
            let conf_state = number(b"confState").unwrap();
            assert_eq!(conf_state, br#"{"auto_leave":false,"voters":[1,2]}"#);
            let now = rig.shared.published.load_full();
            let (reply, flushed) = oneshot::channel();
            rig.applier.do_send(Flush(reply));
            flushed.await.unwrap();
            let view = now.engine.view().unwrap();
            for table in Table::ALL.into_iter().filter(|table| *table != Table::Meta) {
                let mut held = rows(&*view, table);
                if table == Table::Key {
                    assert!(held.pop().is_some_and(|(_, later)| later.ends_with(b"4")));
                }
                assert_eq!(bucket_rows(&reader, table), held, "{table}");
            }
        });
    }

    #[test]
    fn nothing_is_exported_before_anything_is_applied() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().expect("a directory");
            let rig = Rig::start(dir.path(), false);
            let refused = export(&rig.shared, &rig.applier, dir.path()).await;
            assert!(matches!(refused, Err(ExportError::Empty)), "{refused:?}");
            let missing = dir.path().join("missing");
            let mut rig = rig;
            rig.found();
            rig.applied().await;
            let refused = export(&rig.shared, &rig.applier, &missing).await.unwrap_err();
            assert!(refused.to_string().starts_with("create a file in "), "{refused}");
        });
    }

    #[test]
    fn etcdctl_checks_and_restores_what_is_sent_to_members() {
        actix::System::new().block_on(async {
            let dir = tempfile::tempdir().expect("a directory");
            let rig = filled(dir.path()).await;
            let mut exported = export(&rig.shared, &rig.applier, dir.path()).await.unwrap();
            let path = dir.path().join("sent.db");
            std::io::copy(&mut exported.db, &mut File::create(&path).unwrap()).unwrap();
            let etcdctl = |args: &[&str]| {
                let mut command = Command::new("etcdctl");
                command.env_clear().env("ETCDCTL_API", "3").args(args);
                let output = command.arg(&path).output().expect("etcdctl is installed");
                assert!(output.status.success(), "etcdctl {args:?}: {output:?}");
                output.stdout
            };
            let status = etcdctl(&["snapshot", "status", "-w", "json"]);
            let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
            assert_eq!(status["revision"], rig.shared.published.load().store.revision());
            let restored = dir.path().join("restored");
            let restored = restored.to_str().unwrap();
            etcdctl(&["snapshot", "restore", "--skip-hash-check", "--data-dir", restored]);
            assert!(dir.path().join("restored/member/snap/db").exists());
        });
    }
}
