//! Where an engine has its files: a directory of its own, or one file in a directory of others.

use std::io;
use std::path::{Path, PathBuf};

/// The place of an engine's files in a member's directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Home {
    /// The directory that it is opened in.
    pub dir: PathBuf,
    /// The only file that is its own in there; `None` if the whole directory is.
    pub file: Option<&'static str>,
}

impl Home {
    /// A directory of the engine's own.
    pub fn own(dir: PathBuf) -> Self {
        Home { dir, file: None }
    }

    /// What exists if the engine has been there.
    pub fn path(&self) -> PathBuf {
        match self.file {
            Some(file) => self.dir.join(file),
            None => self.dir.clone(),
        }
    }

    /// Whether the engine has been there.
    ///
    /// # Errors
    /// The system's.
    pub fn exists(&self) -> io::Result<bool> {
        self.path().try_exists()
    }

    /// Where an engine is filled that is to take this place.
    pub fn installing(&self) -> PathBuf {
        beside(&self.dir, ".installing")
    }

    /// Where the old engine's directory is while a new one takes its place.
    pub fn replaced(&self) -> PathBuf {
        beside(&self.dir, ".replaced")
    }
}

fn beside(dir: &Path, what: &str) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(what);
    PathBuf::from(name)
}
