//! A file system in memory that tests crash.
//!
//! What survives [`MemDisk::crash`] is what a power failure leaves on a real disk: synced bytes and
//! synced names; of the rest, every sector of 512 bytes holds its old content or that of any moment
//! since, on its own, and of the changes to directories the first few, in order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, DiskFile, LockKind, Open};

const SECTOR_BYTES: u64 = 512;

/// What goes wrong from some operation on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Whatever needs space fails with ENOSPC, a write after its first half.
    NoSpace,
    /// Whatever changes the disk fails with EIO.
    Io,
}

/// A file system in memory. Clones share it.
#[derive(Clone, Default, Debug)]
pub struct MemDisk(Arc<Mutex<State>>);

#[derive(Default, Debug)]
struct State {
    inodes: HashMap<u64, Inode>,
    /// Files and directories as programs see them.
    names: BTreeMap<PathBuf, Node>,
    /// The same as of the last syncs.
    durable_names: BTreeMap<PathBuf, Node>,
    /// Changes that are in `names` and not in `durable_names`, oldest first.
    pending_names: Vec<NameChange>,
    next_id: u64,
    /// Operations so far that change something.
    changes: u64,
    fault: Option<(u64, Fault)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Node {
    Dir,
    File(u64),
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(PathBuf, Node),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

#[derive(Default, Debug)]
struct Inode {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    locks: HashMap<LockKind, u64>,
}

#[derive(Debug)]
enum Change {
    Write { at: u64, bytes: Vec<u8> },
    Size(u64),
}

#[derive(Debug)]
struct MemFile {
    disk: MemDisk,
    inode: u64,
    handle: u64,
    writable: bool,
}

/// Steele and others' SplitMix64: enough to pick what a crash keeps.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

impl MemDisk {
    /// An empty file system.
    pub fn new() -> Self {
        Self::default()
    }

    /// Operations so far that change the disk: writes, sizes, allocations, syncs, names.
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// Lets `fault` strike all operations from the `n`-th change on, counted as by
    /// [`MemDisk::changes`] from 0.
    pub fn fail_from(&self, n: u64, fault: Fault) {
        self.state().fault = Some((n, fault));
    }

    /// Lets everything succeed again.
    pub fn heal(&self) {
        self.state().fault = None;
    }

    /// What a power failure at this moment could leave, chosen by `seed`: 0 keeps only what is
    /// synced, 1 keeps everything. This disk goes on undisturbed.
    #[must_use]
    pub fn crash(&self, seed: u64) -> MemDisk {
        let state = self.state();
        let mut random = Random(seed);
        let mut pick = |n: usize| match seed {
            0 => 0,
            1 => n,
            _ => random.below(n + 1),
        };
        let mut names = state.durable_names.clone();
        let kept = pick(state.pending_names.len());
        for change in &state.pending_names[..kept] {
            change.apply(&mut names);
        }
        let mut inodes = HashMap::new();
        for node in names.values() {
            if let Node::File(id) = node {
                let bytes = state.inodes[id].after_crash(&mut pick);
                inodes.insert(*id, Inode { durable: bytes.clone(), bytes, ..Inode::default() });
            }
        }
        MemDisk(Arc::new(Mutex::new(State {
            inodes,
            durable_names: names.clone(),
            names,
            next_id: state.next_id,
            ..State::default()
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere does not make the bytes less true.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Counts one change, or fails it.
    fn change(&mut self, needs_space: bool) -> io::Result<()> {
        let n = self.changes;
        self.changes += 1;
        match self.fault {
            Some((from, Fault::Io)) if n >= from => Err(io::Error::from_raw_os_error(5)),
            Some((from, Fault::NoSpace)) if n >= from && needs_space => {
                Err(io::Error::from_raw_os_error(28))
            }
            _ => Ok(()),
        }
    }

    fn rename_now(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending_names.push(change);
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn require_dir(&self, path: &Path) -> io::Result<()> {
        match self.names.get(path) {
            Some(Node::Dir) => Ok(()),
            Some(Node::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None if path.parent().is_none() || path == Path::new("") => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            NameChange::Add(path, node) => {
                names.insert(path.clone(), *node);
            }
            NameChange::Remove(path) => names.retain(|name, _| !name.starts_with(path)),
            NameChange::Rename(from, to) => {
                let moved: Vec<_> =
                    names.extract_if(.., |name, _| name.starts_with(from)).collect();
                names.retain(|name, _| !name.starts_with(to));
                for (name, node) in moved {
                    names.insert(moved_path(&name, from, to), node);
                }
            }
        }
    }

    /// The directories whose content it changes.
    fn touches(&self, dir: &Path) -> bool {
        match self {
            NameChange::Add(path, _) | NameChange::Remove(path) => path.parent() == Some(dir),
            NameChange::Rename(from, to) => from.parent() == Some(dir) || to.parent() == Some(dir),
        }
    }

    /// The same change after a directory above it has been renamed.
    fn follow(&mut self, old: &Path, new: &Path) {
        match self {
            NameChange::Add(path, _) | NameChange::Remove(path) => {
                *path = moved_path(path, old, new);
            }
            NameChange::Rename(from, to) => {
                *from = moved_path(from, old, new);
                *to = moved_path(to, old, new);
            }
        }
    }
}

fn moved_path(path: &Path, from: &Path, to: &Path) -> PathBuf {
    match path.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.to_path_buf(),
        Ok(rest) => to.join(rest),
        Err(_) => path.to_path_buf(),
    }
}

impl Inode {
    fn apply(bytes: &mut Vec<u8>, change: &Change) {
        match change {
            Change::Write { at, bytes: new } => {
                let at = *at as usize;
                if bytes.len() < at + new.len() {
                    bytes.resize(at + new.len(), 0);
                }
                bytes[at..at + new.len()].copy_from_slice(new);
            }
            Change::Size(size) => bytes.resize(*size as usize, 0),
        }
    }

    fn make(&mut self, change: Change) {
        Self::apply(&mut self.bytes, &change);
        self.pending.push(change);
    }

    fn sync(&mut self) {
        for change in self.pending.drain(..) {
            Self::apply(&mut self.durable, &change);
        }
    }

    fn after_crash(&self, pick: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
        let mut result = self.durable.clone();
        let mut touched = BTreeSet::new();
        for change in &self.pending {
            match change {
                Change::Write { at, bytes } if !bytes.is_empty() => {
                    let last = at + bytes.len() as u64 - 1;
                    touched.extend(at / SECTOR_BYTES..=last / SECTOR_BYTES);
                }
                // What a cut removed may still be there; only the first sector is partly cut.
                Change::Size(size) => {
                    touched.insert(size / SECTOR_BYTES);
                }
                Change::Write { .. } => {}
            }
        }
        // The length, as of some moment since the last sync.
        let moment = pick(self.pending.len());
        let mut size = self.durable.len() as u64;
        for change in &self.pending[..moment] {
            size = match change {
                Change::Write { at, bytes } => size.max(at + bytes.len() as u64),
                Change::Size(size) => *size,
            };
        }
        result.resize(size as usize, 0);
        // Each sector, as of a moment of its own.
        for sector in touched {
            let from = sector * SECTOR_BYTES;
            let mut content = [0u8; SECTOR_BYTES as usize];
            let old = self.durable.get(from as usize..).unwrap_or_default();
            let old = &old[..old.len().min(content.len())];
            content[..old.len()].copy_from_slice(old);
            let moment = pick(self.pending.len());
            for change in &self.pending[..moment] {
                match change {
                    Change::Write { at, bytes } => {
                        let start = from.max(*at);
                        let end = (from + SECTOR_BYTES).min(at + bytes.len() as u64);
                        if start < end {
                            content[(start - from) as usize..(end - from) as usize]
                                .copy_from_slice(
                                    &bytes[(start - at) as usize..(end - at) as usize],
                                );
                        }
                    }
                    Change::Size(size) => {
                        if *size < from + SECTOR_BYTES {
                            content[size.saturating_sub(from) as usize..].fill(0);
                        }
                    }
                }
            }
            let end = result.len().min((from + SECTOR_BYTES) as usize);
            if (from as usize) < end {
                let length = end - from as usize;
                result[from as usize..end].copy_from_slice(&content[..length]);
            }
        }
        result
    }
}

impl Disk for MemDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        let inode = match (state.names.get(path), how) {
            (Some(Node::Dir), _) => return Err(io::ErrorKind::IsADirectory.into()),
            (Some(Node::File(inode)), _) => *inode,
            (None, Open::Read | Open::Write) => return Err(io::ErrorKind::NotFound.into()),
            (None, Open::WriteOrCreate | Open::Truncate) => {
                state.require_dir(path.parent().unwrap_or(Path::new("")))?;
                state.change(true)?;
                let inode = state.new_id();
                state.inodes.insert(inode, Inode::default());
                state.rename_now(NameChange::Add(path.to_path_buf(), Node::File(inode)));
                inode
            }
        };
        if how == Open::Truncate {
            let file = state.inodes.get_mut(&inode).expect("a name's inode exists");
            if !file.bytes.is_empty() {
                file.make(Change::Size(0));
            }
        }
        let handle = state.new_id();
        Ok(Box::new(MemFile { disk: self.clone(), inode, handle, writable: how != Open::Read }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let missing: Vec<PathBuf> = path
            .ancestors()
            .take_while(|dir| dir.parent().is_some() && *dir != Path::new(""))
            .filter(|dir| !state.names.contains_key(*dir))
            .map(Path::to_path_buf)
            .collect();
        for dir in missing.into_iter().rev() {
            state.change(true)?;
            state.rename_now(NameChange::Add(dir, Node::Dir));
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        state.require_dir(dir)?;
        Ok(state
            .names
            .keys()
            .filter(|name| name.parent() == Some(dir))
            .filter_map(|name| Some(name.file_name()?.to_str()?.to_owned()))
            .collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.state().names.contains_key(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if state.names.get(to) == Some(&Node::Dir)
            && state.names.keys().any(|name| name.parent() == Some(to))
        {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        state.change(false)?;
        state.rename_now(NameChange::Rename(from.to_path_buf(), to.to_path_buf()));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        match state.names.get(path) {
            None => return Err(io::ErrorKind::NotFound.into()),
            Some(Node::Dir) => return Err(io::ErrorKind::IsADirectory.into()),
            Some(Node::File(_)) => {}
        }
        state.change(false)?;
        state.rename_now(NameChange::Remove(path.to_path_buf()));
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change(false)?;
        state.rename_now(NameChange::Remove(path.to_path_buf()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.require_dir(dir)?;
        state.change(false)?;
        let mut rest: Vec<NameChange> = Vec::new();
        for change in std::mem::take(&mut state.pending_names) {
            if change.touches(dir) {
                change.apply(&mut state.durable_names);
                if let NameChange::Rename(from, to) = &change {
                    rest.iter_mut().for_each(|earlier| earlier.follow(from, to));
                }
            } else {
                rest.push(change);
            }
        }
        state.pending_names = rest;
        Ok(())
    }
}

impl MemFile {
    fn with<T>(&self, body: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        body(&mut self.disk.state())
    }

    fn change(&self, needs_space: bool, change: Change) -> io::Result<()> {
        if !self.writable {
            return Err(io::Error::from_raw_os_error(9));
        }
        self.with(|state| {
            let outcome = state.change(needs_space);
            let inode = state.inodes.get_mut(&self.inode).expect("an open file exists");
            match (&outcome, change) {
                (Ok(()), change) => inode.make(change),
                (Err(_), Change::Write { at, mut bytes }) => {
                    // Systems fail between blocks, not within a sector.
                    let half = (at + bytes.len() as u64 / 2) / SECTOR_BYTES * SECTOR_BYTES;
                    bytes.truncate(half.saturating_sub(at) as usize);
                    inode.make(Change::Write { at, bytes });
                }
                (Err(_), Change::Size(_)) => {}
            }
            outcome
        })
    }
}

impl DiskFile for MemFile {
    fn size(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.inodes[&self.inode].bytes.len() as u64))
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.with(|state| {
            let bytes = &state.inodes[&self.inode].bytes;
            let from = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
            let n = buffer.len().min(bytes.len() - from);
            buffer[..n].copy_from_slice(&bytes[from..from + n]);
            Ok(n)
        })
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.change(true, Change::Write { at, bytes: bytes.to_vec() })
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.change(false, Change::Size(bytes))
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let size = self.size()?.max(bytes);
        self.change(true, Change::Size(size))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|state| {
            state.change(false)?;
            state.inodes.get_mut(&self.inode).expect("an open file exists").sync();
            Ok(())
        })
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn try_lock(&self, kind: LockKind) -> io::Result<bool> {
        self.with(|state| {
            let inode = state.inodes.get_mut(&self.inode).expect("an open file exists");
            Ok(*inode.locks.entry(kind).or_insert(self.handle) == self.handle)
        })
    }
}

impl Drop for MemFile {
    fn drop(&mut self) {
        if let Some(inode) = self.disk.state().inodes.get_mut(&self.inode) {
            inode.locks.retain(|_, holder| *holder != self.handle);
        }
    }
}
