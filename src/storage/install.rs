//! Puts a database that a leader has sent in the place of the engine.
//!
//! A new engine is filled beside the old one and takes its name when all of it is on disk:
//!
//! ```text
//! engine-redb.installing   filled, durable                        removed at start
//! engine-redb.replaced     the old one, out of the way            renamed back at start if there is
//!                                                                 no engine-redb, else removed
//! ```
//!
//! A crash at any point leaves the old engine or the new one. If it is the old one, the log says that it
//! is behind, and the database received is still there: the start installs it again.

use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_api::{Batch, Durability, Engine, EngineError, Table};
use quorate_proto::{raftpb, walpb};

use super::FileError;
use super::snap_dir::{SnapDir, SnapError};
use crate::actors::disk::{Open, SharedDisk};
use crate::core::apply::{CONSISTENT_INDEX, STORAGE_VERSION, Stored, TERM};
use crate::core::bbolt::{BboltError, Reader};
use crate::core::membership::{Member, Membership, Version};
use crate::core::snap::V2Membership;
use crate::core::types::{ClusterId, MemberId};

/// Opens the configured engine in a directory, which an engine without files ignores.
pub type OpenEngine = Arc<dyn Fn(&Path) -> Result<Arc<dyn Engine>, EngineError> + Send + Sync>;

/// Operations, or bytes, in one engine commit while it is filled.
const COMMIT_OPERATIONS: usize = 10_000;
const COMMIT_BYTES: usize = 8 << 20;

/// Why a received database does not take the engine's place. The engine is what it was, or the member has
/// to start again.
#[derive(thiserror::Error, Debug)]
pub enum InstallError {
    #[error(transparent)]
    Io(#[from] FileError),
    #[error(transparent)]
    Snapshots(#[from] SnapError),
    #[error("storage engine: {0}")]
    Engine(#[from] EngineError),
    #[error("database {}: {source}", path.display())]
    Database {
        path: PathBuf,
        #[source]
        source: BboltError,
    },
    #[error("database file ({} index {found}) does not match with snapshot (index {index})", path.display())]
    Behind { path: PathBuf, found: u64, index: u64 },
    #[error(
        "database {} has storage version {found:?}, newer than this server's {}.{}",
        path.display(), server.major, server.minor
    )]
    TooNew { path: PathBuf, found: String, server: Version },
    #[error(
        "database {} has voters {voters:x?} and learners {learners:x?}, but its snapshot has voters \
         {:x?} and learners {:x?}",
        path.display(), conf_state.voters, conf_state.learners
    )]
    Members { path: PathBuf, voters: Vec<u64>, learners: Vec<u64>, conf_state: raftpb::ConfState },
}

/// Installs what was received in `snaps`.
#[derive(Clone)]
pub struct Installer {
    disk: SharedDisk,
    snaps: SnapDir,
    /// The engine's files; `None` for an engine that has none.
    dir: Option<PathBuf>,
    open: OpenEngine,
    server: Version,
}

/// The place beside `dir` for what is on its way in or out.
fn beside(dir: &Path, what: &str) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(what);
    PathBuf::from(name)
}

impl Installer {
    /// An installer for the engine in `dir` that `open` opens.
    pub fn new(
        disk: SharedDisk,
        snaps: SnapDir,
        dir: Option<PathBuf>,
        open: OpenEngine,
        server: Version,
    ) -> Self {
        Installer { disk, snaps, dir, open, server }
    }

    /// Whether what is installed outlives the process.
    pub fn is_persistent(&self) -> bool {
        self.dir.is_some()
    }

    /// Opens the engine as it is. What an interrupted installation has left must have been cleaned.
    ///
    /// # Errors
    /// `Engine`.
    pub fn open(&self) -> Result<Arc<dyn Engine>, InstallError> {
        Ok((self.open)(self.dir.as_deref().unwrap_or(Path::new("")))?)
    }

    /// Undoes an installation that a crash has interrupted; nobody has the engine open.
    ///
    /// # Errors
    /// `Io`.
    pub fn clean(&self) -> Result<(), InstallError> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let old = beside(dir, ".replaced");
        if self.exists(&old)? && !self.exists(dir)? {
            self.rename(&old, dir)?;
            self.sync_parent(dir)?;
        }
        self.clear(dir)
    }

    /// Removes what stands beside the engine.
    fn clear(&self, dir: &Path) -> Result<(), InstallError> {
        let mut removed = false;
        for what in [".replaced", ".installing"] {
            let path = beside(dir, what);
            if self.exists(&path)? {
                self.disk.remove_dir_all(&path).map_err(FileError::at("remove", &path))?;
                removed = true;
            }
        }
        if removed {
            self.sync_parent(dir)?;
        }
        Ok(())
    }

    /// Whether the database for the snapshot at `index` has been received and is still there.
    ///
    /// # Errors
    /// `Io`.
    pub fn has_received(&self, index: u64) -> Result<bool, InstallError> {
        Ok(self.snaps.received_db(index)?.is_some())
    }

    /// What the log's `record` is about: its snapshot file, or the record itself where that file is not
    /// sound. `valid` are all records that may be started from.
    ///
    /// # Errors
    /// `Snapshots`.
    pub fn received(
        &self,
        record: &walpb::Snapshot,
        valid: &[walpb::Snapshot],
    ) -> Result<raftpb::Snapshot, InstallError> {
        let loaded = self.snaps.load_newest(valid)?.snapshot;
        let same = |snapshot: &raftpb::Snapshot| {
            let metadata = snapshot.metadata.as_ref();
            metadata.is_some_and(|m| (m.index, m.term) == (record.index(), record.term()))
        };
        Ok(loaded.filter(same).unwrap_or_else(|| raftpb::Snapshot {
            data: Default::default(),
            metadata: Some(raftpb::SnapshotMetadata {
                conf_state: record.conf_state.clone(),
                index: record.index(),
                term: record.term(),
            }),
        }))
    }

    /// Makes an engine of the database received for `snapshot` and puts it in the place of the one there
    /// is, which its readers keep until they are done. Blocks for as long as the disk takes.
    ///
    /// Nobody may write to the old engine, nor make it give space back, from now on.
    ///
    /// # Errors
    /// [`InstallError`].
    pub fn install(&self, snapshot: &raftpb::Snapshot) -> Result<Arc<dyn Engine>, InstallError> {
        let metadata = snapshot.metadata.clone().unwrap_or_default();
        let index = metadata.index;
        let Some(path) = self.snaps.received_db(index)? else {
            let path = self.snaps.dir().join(crate::core::snap::db_name(index));
            return Err(SnapError::NoDb { path, index }.into());
        };
        let Some(dir) = &self.dir else {
            let engine = self.open()?;
            self.fill(&*engine, &path, &metadata, &snapshot.data)?;
            return Ok(engine);
        };
        let (aside, old) = (beside(dir, ".installing"), beside(dir, ".replaced"));
        self.clear(dir)?;
        let engine = (self.open)(&aside)?;
        self.fill(&*engine, &path, &metadata, &snapshot.data)?;
        // An engine knows its files by their names, which change now.
        drop(engine);
        if self.exists(dir)? {
            self.rename(dir, &old)?;
        }
        self.rename(&aside, dir)?;
        self.sync_parent(dir)?;
        let engine = self.open()?;
        self.clear(dir)?;
        Ok(engine)
    }

    /// Copies a database into an empty engine, and makes it durable.
    fn fill(
        &self,
        engine: &dyn Engine,
        path: &Path,
        metadata: &raftpb::SnapshotMetadata,
        data: &[u8],
    ) -> Result<(), InstallError> {
        let damaged =
            |source: BboltError| InstallError::Database { path: path.to_path_buf(), source };
        let file = self.disk.open(path, Open::Read).map_err(FileError::at("open", path))?;
        let reader = Reader::open(file).map_err(damaged)?;
        self.check(&reader, path, metadata.index)?;
        let mut batch = Batch::default();
        let mut bytes = 0;
        for table in Table::ALL {
            let Some(bucket) = reader.bucket(table.name().as_bytes()).map_err(damaged)? else {
                continue;
            };
            let mut failed = None;
            bucket
                .scan(Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
                    bytes += key.len() + value.len();
                    batch.put(table, key.to_vec(), value.to_vec());
                    if batch.len() < COMMIT_OPERATIONS && bytes < COMMIT_BYTES {
                        return ControlFlow::Continue(());
                    }
                    bytes = 0;
                    match engine.commit(&std::mem::take(&mut batch), Durability::Buffered) {
                        Ok(()) => ControlFlow::Continue(()),
                        Err(error) => {
                            failed = Some(error);
                            ControlFlow::Break(())
                        }
                    }
                })
                .map_err(damaged)?;
            if let Some(error) = failed {
                return Err(error.into());
            }
        }
        engine.commit(&batch, Durability::Buffered)?;
        let mended = mend(engine, path, metadata, data)?;
        engine.commit(&mended, Durability::Durable)?;
        Ok(())
    }

    /// Refuses a database that its snapshot cannot stand for.
    fn check<R: crate::core::bbolt::ReadAt>(
        &self,
        reader: &Reader<R>,
        path: &Path,
        index: u64,
    ) -> Result<(), InstallError> {
        let damaged =
            |source: BboltError| InstallError::Database { path: path.to_path_buf(), source };
        let meta = reader.bucket(Table::Meta.name().as_bytes()).map_err(damaged)?;
        let get = |key: &[u8]| match &meta {
            Some(meta) => meta.get(key).map_err(damaged),
            None => Ok(None),
        };
        let found = get(CONSISTENT_INDEX)?
            .and_then(|value| <[u8; 8]>::try_from(&value[..]).ok())
            .map_or(0, u64::from_be_bytes);
        if found < index {
            return Err(InstallError::Behind { path: path.to_path_buf(), found, index });
        }
        if let Some(stored) = get(STORAGE_VERSION)? {
            let found = String::from_utf8_lossy(&stored).into_owned();
            let server = self.server;
            let version = Version::parse(&found);
            if version.is_none_or(|v| (v.major, v.minor) > (server.major, server.minor)) {
                return Err(InstallError::TooNew { path: path.to_path_buf(), found, server });
            }
        }
        Ok(())
    }

    fn exists(&self, path: &Path) -> Result<bool, InstallError> {
        Ok(self.disk.exists(path).map_err(FileError::at("examine", path))?)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), InstallError> {
        Ok(self.disk.rename(from, to).map_err(FileError::at("rename", from))?)
    }

    fn sync_parent(&self, dir: &Path) -> Result<(), InstallError> {
        let parent = dir.parent().expect("the engine is in the member's directory");
        Ok(self.disk.sync_dir(parent).map_err(FileError::at("sync", parent))?)
    }
}

/// What the database of an older release lacks, or has out of date: the term, and the members, of which
/// the buckets of 3.4 and 3.5 may not know a promotion or a removal (formats-and-peers 2.3).
fn mend(
    engine: &dyn Engine,
    path: &Path,
    metadata: &raftpb::SnapshotMetadata,
    data: &[u8],
) -> Result<Batch, InstallError> {
    let view = engine.view()?;
    let stored = Stored::read(&*view, Membership::new(ClusterId(0), MemberId(0), 0))?;
    let mut batch = Batch::default();
    if stored.term.0 == 0 {
        batch.put(Table::Meta, TERM, metadata.term.to_be_bytes().to_vec());
    }
    let conf_state = sorted(metadata.conf_state.clone().unwrap_or_default());
    let removed_still_here = stored.members.removed().any(|id| conf_state.voters.contains(&id.0));
    if stored.members.conf_state() == conf_state && !removed_still_here {
        return Ok(batch);
    }
    let told = V2Membership::from_v2_store(data).unwrap_or_default();
    let members: Vec<Member> = told
        .members
        .into_iter()
        .map(|member| Member {
            id: member.id,
            peer_urls: member.peer_urls,
            is_learner: member.is_learner,
            name: member.name,
            client_urls: member.client_urls,
        })
        .collect();
    let removed: Vec<MemberId> = told.removed.into_iter().map(MemberId).collect();
    let mut membership = Membership::new(ClusterId(0), MemberId(0), 0);
    membership.restore(members, removed);
    if membership.conf_state() != conf_state {
        let raftpb::ConfState { voters, learners, .. } = stored.members.conf_state();
        let path = path.to_path_buf();
        return Err(InstallError::Members { path, voters, learners, conf_state });
    }
    for member in stored.members.members() {
        batch.delete(Table::Members, MemberId(member.id).to_string());
    }
    for member in membership.members() {
        let json = serde_json::to_vec(member).expect("a member is always JSON");
        batch.put(Table::Members, MemberId(member.id).to_string(), json);
    }
    for id in membership.removed() {
        batch.put(Table::MembersRemoved, id.to_string(), "removed");
    }
    Ok(batch)
}

fn sorted(mut conf_state: raftpb::ConfState) -> raftpb::ConfState {
    conf_state.voters.sort_unstable();
    conf_state.learners.sort_unstable();
    conf_state
}
