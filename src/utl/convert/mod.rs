//! Makes a data directory for another engine.
//!
//! Opening an engine can write to its files: it takes its lock, or repairs what a crash has left. So the
//! source's files are copied first, and the copy is opened:
//!
//! ```text
//! TO/member.converting/source/     a copy of the source's engine; gone in the end
//!                      engine-X/   the new engine
//!                      wal/ snap/  as in the source
//!                      lock        held by the conversion
//! TO/member                        what member.converting is called when all of it is on disk and compared
//! ```

mod files;
pub mod progress;
mod source;
mod target;
mod verify;

use std::fmt;
use std::fs;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engine_api::{Batch, Durability, Engine, EngineError, Options, Table, View};
use nix::sys::statvfs::statvfs;
use quorate_proto::walpb;
use serde::Serialize;

use crate::actors::disk::OsDisk;
use crate::core::apply::Stored;
use crate::core::membership::Membership;
use crate::core::mvcc::ReadError;
use crate::core::snap::db_name;
use crate::core::types::{ClusterId, MemberId};
use crate::engines::BuiltIn;
use crate::storage::FileError;
use crate::storage::lock::LockError;
use crate::storage::wal_log::{self, WalError};

use files::{give, remove, sync_dir};
use progress::Progress;
use source::Source;
use target::Target;
use verify::{Difference, first_difference, hash_kv};

/// What a member's directory is called in a data directory as long as it is being made.
pub const CONVERTING: &str = "member.converting";

/// Operations, or bytes, in one engine commit.
const COMMIT_OPERATIONS: usize = 10_000;
const COMMIT_BYTES: usize = 8 << 20;
/// Bytes after which a commit is durable: what an engine holds back until then stays bounded.
const DURABLE_BYTES: u64 = 256 << 20;

/// What is to be done.
#[derive(Debug)]
pub struct Plan {
    /// The data directory to read.
    pub from: PathBuf,
    /// Its log, if that is not `member/wal`.
    pub from_wal: Option<PathBuf>,
    /// The data directory to make.
    pub to: PathBuf,
    pub engine: &'static BuiltIn,
    pub options: Options,
}

/// What was done.
#[derive(Clone, PartialEq, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Converted {
    pub from_dir: PathBuf,
    pub from_engine: &'static str,
    pub to_dir: PathBuf,
    pub to_engine: &'static str,
    /// Rows of all tables, and bytes of their keys and values.
    pub rows: u64,
    pub bytes: u64,
    /// `HashKV` of both at this revision.
    pub hash: u32,
    pub revision: i64,
    pub compact_revision: i64,
    /// Bytes that the new engine occupies.
    pub size: u64,
    pub seconds: f64,
}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "converted {} ({}) to {} ({}): {} rows of {} bytes are equal, HashKV {} at revision {}; \
             {:.1} s",
            self.from_dir.display(),
            self.from_engine,
            self.to_dir.display(),
            self.to_engine,
            self.rows,
            self.bytes,
            self.hash,
            self.revision,
            self.seconds
        )
    }
}

/// Why there is no new directory. The source is what it was, and so is the target.
#[derive(thiserror::Error, Debug)]
pub enum ConvertError {
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Wal(#[from] WalError),
    #[error("engine {engine} in {}: {source}", dir.display())]
    Engine {
        engine: &'static str,
        dir: PathBuf,
        #[source]
        source: EngineError,
    },
    #[error("engine {engine} in {}: {source}", dir.display())]
    Data {
        engine: &'static str,
        dir: PathBuf,
        #[source]
        source: ReadError,
    },
    #[error("the copy is not equal: {0}")]
    Differs(Difference),
    #[error(
        "the copy is not equal: HashKV of the source is {source_hash}, of the copy {copy_hash}"
    )]
    Hash { source_hash: u32, copy_hash: u32 },
    #[error("interrupted")]
    Interrupted,
}

/// What accompanies the work.
pub struct Run<'a> {
    pub progress: &'a Progress,
    pub interrupted: &'a dyn Fn() -> bool,
}

impl Run<'_> {
    /// # Errors
    /// `Interrupted`.
    pub fn check(&self) -> Result<(), ConvertError> {
        if (self.interrupted)() { Err(ConvertError::Interrupted) } else { Ok(()) }
    }
}

/// Makes the data directory that is asked for. `interrupted` is asked often whether to give up.
///
/// # Errors
/// [`ConvertError`]; nothing is left of what was made.
pub fn convert(
    plan: &Plan,
    progress: &Progress,
    interrupted: &dyn Fn() -> bool,
) -> Result<Converted, ConvertError> {
    let run = Run { progress, interrupted };
    let converted = run_plan(plan, &run);
    progress.finish();
    converted
}

/// An open engine, and who it is in messages.
struct Opened {
    engine: Arc<dyn Engine>,
    name: &'static str,
    dir: PathBuf,
}

impl Opened {
    fn open(built_in: &BuiltIn, dir: PathBuf, options: &Options) -> Result<Self, ConvertError> {
        let name = built_in.name();
        match built_in.open(&dir, options) {
            Ok(engine) => Ok(Opened { engine, name, dir }),
            Err(source) => Err(ConvertError::Engine { engine: name, dir, source }),
        }
    }

    fn failed(&self, source: EngineError) -> ConvertError {
        ConvertError::Engine { engine: self.name, dir: self.dir.clone(), source }
    }

    fn view(&self) -> Result<Box<dyn View + '_>, ConvertError> {
        self.engine.view().map_err(|error| self.failed(error))
    }

    fn unreadable(&self, source: ReadError) -> ConvertError {
        ConvertError::Data { engine: self.name, dir: self.dir.clone(), source }
    }
}

fn run_plan(plan: &Plan, run: &Run<'_>) -> Result<Converted, ConvertError> {
    let began = Instant::now();
    if plan.engine.home_in(Path::new("")).is_none() {
        return Err(ConvertError::Refused(format!(
            "engine {0} has no files, so nothing can be converted to it: start a member with --engine \
             {0} in an empty directory, or on a log that is whole",
            plan.engine.name()
        )));
    }
    let source = Source::take(&plan.from, plan.from_wal.as_deref())?;
    let target = Target::begin(&source.dir, &plan.to, plan.engine.name())?;
    let work = target.work();
    let aside = work.join("source");

    let engine_files = source.engine_files(&aside)?;
    let mut others = source.other_files(&work)?;
    let fixtures = source.dir.join("fixtures");
    if fixtures.is_dir() {
        others.add(&fixtures, &target.fixtures(), None)?;
    }
    // The new engine takes about as much as the old one, which is copied as well.
    has_room(&target, 2 * engine_files.bytes() + others.bytes())?;
    run.progress.step("copying", engine_files.bytes() + others.bytes());
    engine_files.copy(false, run)?;
    others.copy(true, run)?;

    let home = source.engine.home_in(&aside).expect("it has files");
    let defaults = Options::defaults(source.engine.about);
    let old = Opened::open(source.engine, home.dir, &defaults)?;
    let old_view = old.view()?;
    let (rows, bytes) = count(&old, &*old_view, run)?;
    check_log(&source, &old, &*old_view)?;
    let expected = hash_kv(&*old_view).map_err(|error| old.unreadable(error))?;
    run.check()?;

    has_room(&target, bytes)?;
    let home = plan.engine.home_in(&work).expect("it has files");
    let new = Opened::open(plan.engine, home.dir.clone(), &plan.options)?;
    run.progress.step("writing", bytes);
    fill(&old, &*old_view, &new, run)?;
    // What is compared is what is on disk and not what the engine remembers.
    let Opened { engine, .. } = new;
    drop(engine);
    let new = Opened::open(plan.engine, home.dir, &plan.options)?;
    let new_view = new.view()?;
    run.progress.step("comparing", bytes);
    compare(&old, &*old_view, &new, &*new_view, run)?;
    let hash = hash_kv(&*new_view).map_err(|error| new.unreadable(error))?;
    if hash != expected {
        return Err(ConvertError::Hash { source_hash: expected.hash, copy_hash: hash.hash });
    }
    let size = new.engine.size().map_err(|error| new.failed(error))?;
    drop(new_view);
    drop(new);
    drop(old_view);
    drop(old);

    run.check()?;
    remove(&aside)?;
    sync_below(&work)?;
    keep_owner(&source, &target)?;
    let to_dir = target.dir().to_path_buf();
    target.finish()?;
    Ok(Converted {
        from_dir: source.dir,
        from_engine: source.engine.name(),
        to_dir,
        to_engine: plan.engine.name(),
        rows,
        bytes,
        hash: hash.hash,
        revision: hash.revision,
        compact_revision: hash.compact_revision,
        size,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Refuses to begin, or to go on, what the disk has no room for.
fn has_room(target: &Target, needed: u64) -> Result<(), ConvertError> {
    let dir = target.dir();
    let found = statvfs(dir).map_err(|errno| FileError::at("examine", dir)(errno.into()))?;
    let free = found.blocks_available() as u64 * found.fragment_size() as u64;
    if free < needed {
        return Err(ConvertError::Refused(format!(
            "the conversion needs about {} MiB in {}, which has {} MiB free",
            needed.div_ceil(1 << 20),
            dir.display(),
            free >> 20
        )));
    }
    Ok(())
}

/// Rows and bytes of all tables.
fn count(old: &Opened, view: &dyn View, run: &Run<'_>) -> Result<(u64, u64), ConvertError> {
    let about = old.engine.size_in_use().map_err(|error| old.failed(error))?;
    run.progress.step("reading", about);
    let (mut rows, mut bytes, mut told) = (0, 0, 0);
    for table in Table::ALL {
        let mut stopped = Ok(());
        view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            rows += 1;
            bytes += (key.len() + value.len()) as u64;
            if bytes - told >= COMMIT_BYTES as u64 {
                run.progress.add(bytes - told);
                told = bytes;
                stopped = run.check();
            }
            if stopped.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .map_err(|error| old.failed(error))?;
        stopped?;
    }
    Ok((rows, bytes))
}

/// Refuses an engine that no member would start with on this log.
fn check_log(source: &Source, old: &Opened, view: &dyn View) -> Result<(), ConvertError> {
    let blank = Membership::new(ClusterId(0), MemberId(0), 0);
    let applied = Stored::read(view, blank).map_err(|error| old.failed(error))?.applied.0;
    let newest = |valid: &[walpb::Snapshot]| {
        valid.iter().max_by_key(|record| record.index()).cloned().unwrap_or_default()
    };
    let log = wal_log::read(&OsDisk, &source.wal, newest)?;
    let begin = log.start.index();
    let received = source.dir.join("member").join("snap").join(db_name(begin));
    if begin > applied && !received.exists() {
        return Err(ConvertError::Refused(format!(
            "engine {} in {} has applied entry {applied}, but the write-ahead log in {} begins behind \
             the snapshot at {begin}: no member starts on this",
            old.name,
            source.dir.display(),
            source.wal.display()
        )));
    }
    if applied > log.last_index {
        return Err(ConvertError::Refused(format!(
            "engine {} in {} has applied entry {applied}, but the write-ahead log in {} ends at entry \
             {}: no member starts on this",
            old.name,
            source.dir.display(),
            source.wal.display(),
            log.last_index
        )));
    }
    Ok(())
}

/// Copies all rows; they are on disk when this returns.
fn fill(old: &Opened, view: &dyn View, new: &Opened, run: &Run<'_>) -> Result<(), ConvertError> {
    let mut batch = Batch::default();
    let (mut bytes, mut buffered) = (0, 0);
    for table in Table::ALL {
        let mut stopped = Ok(());
        view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            bytes += key.len() + value.len();
            batch.put(table, key.to_vec(), value.to_vec());
            if batch.len() < COMMIT_OPERATIONS && bytes < COMMIT_BYTES {
                return ControlFlow::Continue(());
            }
            buffered += bytes as u64;
            let durability = match buffered >= DURABLE_BYTES {
                true => Durability::Durable,
                false => Durability::Buffered,
            };
            if durability == Durability::Durable {
                buffered = 0;
            }
            run.progress.add(std::mem::take(&mut bytes) as u64);
            stopped = run.check().and_then(|()| {
                let committed = new.engine.commit(&std::mem::take(&mut batch), durability);
                committed.map_err(|error| new.failed(error))
            });
            if stopped.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .map_err(|error| old.failed(error))?;
        stopped?;
    }
    new.engine.commit(&batch, Durability::Durable).map_err(|error| new.failed(error))?;
    run.progress.add(bytes as u64);
    Ok(())
}

/// Compares all rows of all tables.
fn compare(
    old: &Opened,
    old_view: &dyn View,
    new: &Opened,
    new_view: &dyn View,
    run: &Run<'_>,
) -> Result<(), ConvertError> {
    for table in Table::ALL {
        let mut read = |bytes| {
            run.progress.add(bytes);
            !(run.interrupted)()
        };
        let difference = first_difference(old_view, new_view, table, &mut read)
            // Which of the two it was, the error itself tells where it can.
            .map_err(|error| {
                ConvertError::Refused(format!(
                    "comparing engine {} with engine {}: {error}",
                    old.name, new.name
                ))
            })?;
        if let Some(difference) = difference {
            return Err(ConvertError::Differs(difference));
        }
        run.check()?;
    }
    Ok(())
}

/// Makes durable the names in all directories that were made.
fn sync_below(dir: &Path) -> Result<(), FileError> {
    for entry in fs::read_dir(dir).map_err(FileError::at("list", dir))? {
        let path = entry.map_err(FileError::at("list", dir))?.path();
        if path.is_dir() {
            sync_below(&path)?;
        }
    }
    sync_dir(dir)
}

/// Gives what was made to the owner of the source, if this user may do so: root works for others.
fn keep_owner(source: &Source, target: &Target) -> Result<(), FileError> {
    let owner = |path: &Path| {
        let found = fs::metadata(path).map_err(FileError::at("examine", path))?;
        Ok::<_, FileError>((found.uid(), found.gid()))
    };
    let (uid, gid) = owner(&source.dir.join("member"))?;
    if owner(&target.work())? == (uid, gid) {
        return Ok(());
    }
    for path in target.roots() {
        match give(&path, uid, gid) {
            Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
            given => given?,
        }
    }
    Ok(())
}
