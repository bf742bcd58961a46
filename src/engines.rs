//! The storage engines that are built in: how each is opened, and where it has its files.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_api::{About, Engine, EngineError, Options};

use crate::storage::home::Home;

pub mod list;

type Open = fn(&Path, &Options) -> Result<Arc<dyn Engine>, EngineError>;

/// An engine that a configuration can name.
pub struct BuiltIn {
    pub about: &'static About,
    /// Its directory below a member's (`<data-dir>/member`); `None` if it has no files. In [`SHARED`],
    /// where the snapshots are, only [`SHARED_FILE`] is its own.
    dir: Option<&'static str>,
    open: Open,
}

/// Where etcd has its database, among the snapshots.
const SHARED: &str = "snap";
/// etcd's database.
const SHARED_FILE: &str = "db";

/// The engine of a member that was not told which to use.
pub static DEFAULT: &BuiltIn = &REDB;

static REDB: BuiltIn = BuiltIn {
    about: &engine_redb::ABOUT,
    dir: Some("engine-redb"),
    open: |dir, options| Ok(Arc::new(engine_redb::Redb::open(dir, options)?)),
};

static MEMORY: BuiltIn = BuiltIn {
    about: &engine_memory::ABOUT,
    dir: None,
    open: |_, _| Ok(Arc::new(engine_memory::Memory::new())),
};

static LMDB: BuiltIn = BuiltIn {
    about: &engine_lmdb::ABOUT,
    dir: Some("engine-lmdb"),
    open: |dir, options| Ok(Arc::new(engine_lmdb::Lmdb::open(dir, options)?)),
};

static FJALL: BuiltIn = BuiltIn {
    about: &engine_fjall::ABOUT,
    dir: Some("engine-fjall"),
    open: |dir, options| Ok(Arc::new(engine_fjall::Fjall::open(dir, options)?)),
};

static BBOLT: BuiltIn = BuiltIn {
    about: &engine_bbolt::ABOUT,
    dir: Some(SHARED),
    open: |dir, options| Ok(Arc::new(engine_bbolt::Bbolt::open(dir, options)?)),
};

/// All of them, the default first.
pub static ALL: &[&BuiltIn] = &[&REDB, &LMDB, &FJALL, &BBOLT, &MEMORY];

/// The engine of this name.
pub fn find(name: &str) -> Option<&'static BuiltIn> {
    ALL.iter().copied().find(|engine| engine.name() == name)
}

/// The engine whose files are etcd's own, if it is built in.
pub fn etcds() -> Option<&'static BuiltIn> {
    ALL.iter().copied().find(|engine| engine.dir == Some(SHARED))
}

/// Those that have files in a member of this data directory.
///
/// # Errors
/// The system's.
pub fn present(data_dir: &Path) -> std::io::Result<Vec<&'static BuiltIn>> {
    let mut present = Vec::new();
    for engine in ALL {
        // An installation that was interrupted may have left the old files under their other name only.
        if let Some(home) = engine.home(data_dir)
            && (home.exists()? || home.file.is_none() && home.replaced().try_exists()?)
        {
            present.push(*engine);
        }
    }
    Ok(present)
}

/// The names of all, for messages.
pub fn names() -> String {
    let names: Vec<&str> = ALL.iter().map(|engine| engine.name()).collect();
    names.join(", ")
}

impl BuiltIn {
    /// The name under which the configuration selects it.
    pub fn name(&self) -> &'static str {
        self.about.name
    }

    /// The directory that it is opened in for a member of this data directory; `None` if it has no files.
    pub fn dir(&self, data_dir: &Path) -> Option<PathBuf> {
        self.home(data_dir).map(|home| home.dir)
    }

    /// Where it has its files in a member of this data directory; `None` if it has none.
    pub fn home(&self, data_dir: &Path) -> Option<Home> {
        self.home_in(&data_dir.join("member"))
    }

    /// Where it has its files in a member's directory; `None` if it has none.
    pub fn home_in(&self, member_dir: &Path) -> Option<Home> {
        let dir = self.dir?;
        Some(Home { dir: member_dir.join(dir), file: (dir == SHARED).then_some(SHARED_FILE) })
    }

    /// Opens it in a directory, which is made if it is absent; one without files does not look at it.
    ///
    /// # Errors
    /// Those of the engine, naming the file.
    pub fn open(&self, dir: &Path, options: &Options) -> Result<Arc<dyn Engine>, EngineError> {
        (self.open)(dir, options)
    }
}

impl PartialEq for BuiltIn {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for BuiltIn {}

impl fmt::Debug for BuiltIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "engine {}", self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::check;

    #[test]
    fn names_are_unique_and_found() {
        for engine in ALL {
            assert_eq!(find(engine.name()), Some(*engine));
            // The defaults hold.
            Options::defaults(engine.about);
        }
        let mut names: Vec<&str> = ALL.iter().map(|engine| engine.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        assert_eq!(ALL.first(), Some(&DEFAULT));
        assert_eq!(find("none"), None);
    }

    #[test]
    fn each_stores_what_the_log_may_hold() {
        for engine in ALL {
            let keys = engine.about.key_bytes_max.unwrap_or(u64::MAX);
            assert!(keys >= check::NAME_BYTES_MAX as u64, "{engine:?}");
        }
    }

    #[test]
    fn each_opens_in_its_own_directory() {
        for engine in ALL {
            let data = tempfile::tempdir().unwrap();
            let dir = engine.dir(data.path()).unwrap_or_else(|| data.path().to_path_buf());
            let opened = engine.open(&dir, &Options::defaults(engine.about)).unwrap();
            assert_eq!(opened.name(), engine.name());
        }
    }
}
