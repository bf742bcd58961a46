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
//! Of an engine that shares its directory with others, only its file changes places: the new one is renamed
//! over the old one.
//!
//! A crash at any point leaves the old engine or the new one. If it is the old one, the log says that it
//! is behind, and the database received is still there: the start installs it again.

use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_api::{Batch, Durability, Engine, EngineError, Table};
use quorate_proto::{raftpb, walpb};

use super::FileError;
use super::home::Home;
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
    Members {
        path: PathBuf,
        voters: Vec<u64>,
        learners: Vec<u64>,
        conf_state: Box<raftpb::ConfState>,
    },
}

/// Installs what was received in `snaps`.
#[derive(Clone)]
pub struct Installer {
    disk: SharedDisk,
    snaps: SnapDir,
    /// The engine's files; `None` for an engine that has none.
    home: Option<Home>,
    open: OpenEngine,
    server: Version,
}

impl Installer {
    /// An installer for the engine at `home` that `open` opens.
    pub fn new(
        disk: SharedDisk,
        snaps: SnapDir,
        home: Option<Home>,
        open: OpenEngine,
        server: Version,
    ) -> Self {
        Installer { disk, snaps, home, open, server }
    }

    /// Whether what is installed outlives the process.
    pub fn is_persistent(&self) -> bool {
        self.home.is_some()
    }

    /// Opens the engine as it is. What an interrupted installation has left must have been cleaned.
    ///
    /// # Errors
    /// `Engine`.
    pub fn open(&self) -> Result<Arc<dyn Engine>, InstallError> {
        let dir = self.home.as_ref().map_or(Path::new(""), |home| &home.dir);
        Ok((self.open)(dir)?)
    }

    /// Undoes an installation that a crash has interrupted; nobody has the engine open.
    ///
    /// # Errors
    /// `Io`.
    pub fn clean(&self) -> Result<(), InstallError> {
        let Some(home) = &self.home else { return Ok(()) };
        let old = home.replaced();
        if home.file.is_none() && self.exists(&old)? && !self.exists(&home.dir)? {
            self.rename(&old, &home.dir)?;
            self.sync_parent(&home.dir)?;
        }
        self.clear(home)
    }

    /// Removes what stands beside the engine.
    fn clear(&self, home: &Home) -> Result<(), InstallError> {
        let mut removed = false;
        for path in [home.replaced(), home.installing()] {
            if self.exists(&path)? {
                self.disk.remove_dir_all(&path).map_err(FileError::at("remove", &path))?;
                removed = true;
            }
        }
        if removed {
            // The file's new name, before what it was made from is given up.
            if home.file.is_some() {
                self.sync(&home.dir)?;
            }
            self.sync_parent(&home.dir)?;
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
        let Some(home) = &self.home else {
            let engine = self.open()?;
            self.fill(&*engine, &path, &metadata, &snapshot.data)?;
            return Ok(engine);
        };
        let aside = home.installing();
        self.clear(home)?;
        let engine = (self.open)(&aside)?;
        self.fill(&*engine, &path, &metadata, &snapshot.data)?;
        // An engine knows its files by their names, which change now.
        drop(engine);
        if let Some(file) = home.file {
            // Its readers go on in the old file, which has no name any more.
            self.rename(&aside.join(file), &home.path())?;
            self.sync(&home.dir)?;
        } else {
            if self.exists(&home.dir)? {
                self.rename(&home.dir, &home.replaced())?;
            }
            self.rename(&aside, &home.dir)?;
            self.sync_parent(&home.dir)?;
        }
        let engine = self.open()?;
        self.clear(home)?;
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
        self.sync(dir.parent().expect("the engine is in the member's directory"))
    }

    fn sync(&self, dir: &Path) -> Result<(), InstallError> {
        Ok(self.disk.sync_dir(dir).map_err(FileError::at("sync", dir))?)
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
        let conf_state = Box::new(conf_state);
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::actors::disk::{Disk, DiskFile, OsDisk};
    use crate::actors::export::{For, write_bbolt};
    use crate::actors::rig::{installer, open_redb, version};
    use crate::core::membership::{Member, Membership};

    /// A disk that stops doing anything to directories after some operations, as if the power had failed.
    #[derive(Debug)]
    struct Halting(AtomicUsize);

    impl Halting {
        fn go_on(&self) -> io::Result<()> {
            let left =
                self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            left.map(|_| ()).map_err(|_| io::Error::other("the power has failed"))
        }
    }

    impl Disk for Halting {
        fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
            OsDisk.open(path, how)
        }
        fn create_dir_all(&self, path: &Path) -> io::Result<()> {
            OsDisk.create_dir_all(path)
        }
        fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
            OsDisk.list(dir)
        }
        fn exists(&self, path: &Path) -> io::Result<bool> {
            OsDisk.exists(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.go_on()?;
            OsDisk.rename(from, to)
        }
        fn remove_file(&self, path: &Path) -> io::Result<()> {
            OsDisk.remove_file(path)
        }
        fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
            self.go_on()?;
            OsDisk.remove_dir_all(path)
        }
        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            self.go_on()?;
            OsDisk.sync_dir(dir)
        }
    }

    fn member(id: u64, is_learner: bool) -> Member {
        let peer_urls = vec![format!("http://127.0.0.1:{id}")];
        Member { id, peer_urls, is_learner, ..Member::default() }
    }

    /// An engine's content at `index`.
    fn content(index: u64, members: &[Member], meta: &[(&'static [u8], &'static str)]) -> Batch {
        let mut batch = Batch::default();
        batch.put(Table::Meta, CONSISTENT_INDEX, index.to_be_bytes().to_vec());
        for (key, value) in meta {
            batch.put(Table::Meta, *key, *value);
        }
        for member in members {
            let json = serde_json::to_vec(member).unwrap();
            batch.put(Table::Members, MemberId(member.id).to_string(), json);
        }
        for n in 0..25_000u64 {
            batch.put(Table::Key, n.to_be_bytes().to_vec(), index.to_string());
        }
        batch
    }

    /// Puts a database with `batch` where one for `index` would be received.
    fn receive(dir: &Path, index: u64, batch: &Batch) {
        let engine = engine_memory::Memory::new();
        engine.commit(batch, Durability::Buffered).unwrap();
        let snaps = SnapDir::open(Arc::new(OsDisk), &dir.join("snap")).unwrap();
        let mut receiver = snaps.receive_db(index).unwrap();
        write_bbolt(&*engine.view().unwrap(), For::Member, &mut receiver).unwrap();
        receiver.finish().unwrap();
    }

    fn snapshot(index: u64, voters: &[u64], told: &[Member]) -> raftpb::Snapshot {
        let mut membership = Membership::new(ClusterId(0), MemberId(0), 1);
        membership.restore(told.to_vec(), [MemberId(9)]);
        let conf_state = raftpb::ConfState { voters: voters.to_vec(), ..Default::default() };
        raftpb::Snapshot {
            data: crate::actors::snapshot::v2_membership(&membership).to_v2_store().into(),
            metadata: Some(raftpb::SnapshotMetadata {
                conf_state: Some(conf_state),
                index,
                term: 4,
            }),
        }
    }

    fn stored(engine: &dyn Engine) -> Stored {
        let blank = Membership::new(ClusterId(0), MemberId(0), 1);
        Stored::read(&*engine.view().unwrap(), blank).unwrap()
    }

    #[test]
    fn a_crash_at_any_step_leaves_the_old_engine_or_the_new_one() {
        let mut seen = Vec::new();
        for halt in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            receive(dir, 9, &content(9, &[member(1, false)], &[]));
            let engine = open_redb()(&dir.join("engine-redb")).unwrap();
            engine.commit(&content(3, &[member(1, false)], &[]), Durability::Durable).unwrap();
            drop(engine);
            // What an earlier attempt has left half done.
            std::fs::create_dir(dir.join("engine-redb.installing")).unwrap();
            std::fs::write(dir.join("engine-redb.installing/data.redb"), "half").unwrap();

            let halting = Arc::new(Halting(AtomicUsize::new(halt)));
            let received = snapshot(9, &[1], &[]);
            let installed = installer(halting, dir, true).install(&received);
            let done = installed.is_ok();
            if let Ok(engine) = installed {
                assert_eq!(stored(&*engine).applied.0, 9);
            }
            let installer = installer(Arc::new(OsDisk), dir, true);
            installer.clean().unwrap();
            let engine = installer.open().unwrap();
            let applied = stored(&*engine).applied.0;
            seen.push(applied);
            drop(engine);
            let engine = match applied {
                3 => installer.install(&received).unwrap(),
                _ => installer.open().unwrap(),
            };
            assert_eq!(stored(&*engine).applied.0, 9, "halted after {halt}");
            let view = engine.view().unwrap();
            let last = view.last(Table::Key).unwrap().unwrap();
            assert_eq!(last, (24_999u64.to_be_bytes().to_vec().into(), "9".into()));
            let mut names = OsDisk.list(dir).unwrap();
            names.retain(|name| name.starts_with("engine"));
            assert_eq!(names, ["engine-redb"], "halted after {halt}");
            if done {
                break;
            }
        }
        assert!(seen.is_sorted() && seen.len() > 5, "{seen:?}");
        assert!(seen.contains(&3) && seen.contains(&9), "{seen:?}");
    }

    #[test]
    fn a_crash_at_any_step_leaves_the_file_of_an_engine_that_shares_its_directory() {
        let mut seen = Vec::new();
        for halt in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            let home = Home { dir: dir.join("snap"), file: Some("db") };
            let installer = |disk: SharedDisk| {
                let snaps = SnapDir::open(disk.clone(), &home.dir).unwrap();
                let open: OpenEngine = Arc::new(|dir| {
                    let options = engine_api::Options::defaults(&engine_bbolt::ABOUT);
                    Ok(Arc::new(engine_bbolt::Bbolt::open(dir, &options)?))
                });
                Installer::new(disk, snaps, Some(home.clone()), open, version())
            };
            receive(dir, 9, &content(9, &[member(1, false)], &[]));
            let old = installer(Arc::new(OsDisk)).open().unwrap();
            old.commit(&content(3, &[member(1, false)], &[]), Durability::Durable).unwrap();
            // What an earlier attempt has left half done.
            std::fs::create_dir(home.installing()).unwrap();
            std::fs::write(home.installing().join("db.tmp"), "half").unwrap();

            let received = snapshot(9, &[1], &[]);
            let halting = Arc::new(Halting(AtomicUsize::new(halt)));
            let installed = installer(halting).install(&received);
            let done = installed.is_ok();
            // Who reads the old one goes on.
            assert_eq!(stored(&*old).applied.0, 3);
            drop((old, installed));
            let installer = installer(Arc::new(OsDisk));
            installer.clean().unwrap();
            let applied = stored(&*installer.open().unwrap()).applied.0;
            seen.push(applied);
            let engine = installer.install(&received).unwrap();
            assert_eq!(stored(&*engine).applied.0, 9, "halted after {halt}");
            assert!(!home.installing().exists() && !home.replaced().exists());
            let names = OsDisk.list(&home.dir).unwrap();
            assert!(names.iter().any(|name| name.ends_with(".snap.db")), "{names:?}");
            if done {
                break;
            }
        }
        assert!(seen.is_sorted() && seen.len() > 3, "{seen:?}");
        assert!(seen.contains(&3) && seen.contains(&9), "{seen:?}");
    }

    #[test]
    fn what_an_older_release_left_out_is_taken_from_the_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        // 3.4 knows no term, has 2 still for a learner, and has not forgotten 9.
        let stale = [member(1, false), member(2, true), member(9, false)];
        receive(dir, 9, &content(9, &stale, &[]));
        let installer = installer(Arc::new(OsDisk), dir, false);
        let told = [member(1, false), member(2, false)];
        let engine = installer.install(&snapshot(9, &[2, 1], &told)).unwrap();
        let found = stored(&*engine);
        assert_eq!(found.term.0, 4);
        assert_eq!(found.members.conf_state().voters, [1, 2]);
        assert_eq!(found.members.removed().collect::<Vec<_>>(), [MemberId(9)]);
        // Nobody tells what is right.
        let error = installer.install(&snapshot(9, &[1, 2], &[])).err().unwrap();
        assert!(matches!(error, InstallError::Members { .. }), "{error}");
        assert!(error.to_string().contains("learners [2], but its snapshot has voters [1, 2]"));
    }

    #[test]
    fn a_database_that_cannot_stand_for_the_snapshot_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let installer = installer(Arc::new(OsDisk), dir, true);
        let refused = |index, voters: &[u64]| {
            let error = installer.install(&snapshot(index, voters, &[])).err().unwrap();
            assert!(!dir.join("engine-redb").exists());
            error.to_string()
        };
        assert!(refused(8, &[1]).ends_with(
            "0000000000000008.snap.db is missing, although a snapshot at index 8 says that it was \
             received"
        ));
        receive(dir, 10, &content(9, &[member(1, false)], &[]));
        let text = refused(10, &[1]);
        assert!(text.ends_with(" index 9) does not match with snapshot (index 10)"), "{text}");
        receive(dir, 11, &content(11, &[member(1, false)], &[(STORAGE_VERSION, "3.8.0")]));
        let text = refused(11, &[1]);
        assert!(
            text.ends_with("storage version \"3.8.0\", newer than this server's 3.7"),
            "{text}"
        );
        let snaps = SnapDir::open(Arc::new(OsDisk), &dir.join("snap")).unwrap();
        let mut receiver = snaps.receive_db(12).unwrap();
        receiver.write(&[7; 8192]).unwrap();
        receiver.finish().unwrap();
        let text = refused(12, &[1]);
        assert!(text.ends_with("not a bbolt file: no valid meta page"), "{text}");
    }
}
