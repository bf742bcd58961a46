//! What a disk may hold after a loss of power.
//!
//! The page cache and the disk are replayed side by side. Each change reaches the cache; it reaches the
//! disk if a sync made it durable, or else if chance wants so. What reaches the disk of a file is sectors
//! *as they are in the cache at that moment*: a disk holds of each sector one of the versions since its last
//! sync, never a mix of bytes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::Rng;
use crate::log::{Event, Kind, Log, Name, Node, ROOT, Scope};
use crate::sparse::{SECTOR, Sparse};

/// What happens to names (created, renamed, removed) that were not synced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Metadata {
    /// What POSIX leaves: the sync of a directory makes its names durable, that of a file does not; of the
    /// other changes any survive, in any combination. A rename survives whole or not at all.
    Posix,
    /// What a journal gives (ext4 in ordered mode, XFS): names change on disk in the order in which they were
    /// changed, and any sync brings along all that were changed before.
    Journaled,
}

/// What became of the changes that nothing had made durable.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Fates {
    pub kept: usize,
    pub torn: usize,
    pub lost: usize,
}

impl Fates {
    /// How many changes were at stake.
    pub fn all(self) -> usize {
        self.kept + self.torn + self.lost
    }
}

/// How likely changes are lost, drawn anew for each image: bugs hide at both ends.
enum Mood {
    /// Of eight changes so many are lost.
    Lose(u64),
    /// All but one reach the disk.
    LoseOne(usize),
    /// None but one reaches the disk.
    KeepOne(usize),
    /// The disk writes in order, and no further than this.
    LoseFrom(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Durable,
    Kept,
    Torn,
    Lost,
}

impl Log {
    /// Writes to the empty directory `into` what a disk may hold if power is lost at `cut`.
    ///
    /// # Errors
    /// Those of writing to `into`.
    ///
    /// # Panics
    /// If `cut` is not one of [`Log::cuts`].
    pub fn image(
        &self,
        cut: usize,
        rng: &mut Rng,
        metadata: Metadata,
        into: &Path,
    ) -> io::Result<Fates> {
        assert!(self.cuts().contains(&cut), "a cut at {cut} is not within {:?}", self.cuts());
        let fates = self.fates(cut, rng, metadata);
        let disk = self.replay(&fates, rng);
        store(&self.kinds, &disk, ROOT, into)?;
        let count = |fate| fates.iter().filter(|(_, f)| *f == fate).count();
        Ok(Fates { kept: count(Fate::Kept), torn: count(Fate::Torn), lost: count(Fate::Lost) })
    }

    /// Changes that had begun at `cut`, with what becomes of each.
    fn fates(&self, cut: usize, rng: &mut Rng, metadata: Metadata) -> Vec<(usize, Fate)> {
        let is_change = |at: &usize| {
            matches!(
                self.events.get(*at),
                Some(Event::Write { .. } | Event::Resize { .. } | Event::Names(_))
            )
        };
        let durable = Durable::at(self, cut);
        let mut fates: Vec<(usize, Fate)> = (0..=cut)
            .filter(is_change)
            .map(|at| {
                let durable = at < cut && durable.covers(at, &self.events[at], metadata);
                (at, if durable { Fate::Durable } else { Fate::Lost })
            })
            .collect();
        let at_stake: Vec<usize> =
            (0..fates.len()).filter(|&place| fates[place].1 == Fate::Lost).collect();
        if at_stake.is_empty() {
            return fates;
        }
        let one = rng.below(at_stake.len() as u64) as usize;
        let mood = match rng.below(8) {
            0 => Mood::LoseOne(one),
            1 => Mood::KeepOne(one),
            2 => Mood::LoseFrom(one),
            3 => Mood::Lose(0),
            4 => Mood::Lose(8),
            _ => Mood::Lose(1 + rng.below(7)),
        };
        let tears = !rng.one_in(3);
        for (n, &place) in at_stake.iter().enumerate() {
            let lost = match mood {
                Mood::Lose(eighths) => rng.below(8) < eighths,
                Mood::LoseOne(one) => n == one,
                Mood::KeepOne(one) => n != one,
                Mood::LoseFrom(one) => n >= one,
            };
            let (at, fate) = &mut fates[place];
            let torn = match (&self.events[*at], &mood) {
                (Event::Write { data, .. }, _) if data.len() as u64 <= SECTOR => false,
                (Event::Write { .. }, Mood::Lose(0 | 8)) => false,
                (Event::Write { .. }, Mood::Lose(_)) => tears && rng.one_in(2),
                (Event::Write { .. }, Mood::LoseOne(one) | Mood::LoseFrom(one)) => {
                    tears && n == *one
                }
                _ => false,
            };
            *fate = match (torn, lost) {
                (true, _) => Fate::Torn,
                (false, true) => Fate::Lost,
                (false, false) => Fate::Kept,
            };
        }
        self.keep_order_of_metadata(&mut fates, metadata, rng);
        fates
    }

    /// No file system lets a file's older length come back once something later of it is on disk: blocks that
    /// were cut off are not the ones that are written later.
    fn keep_order_of_metadata(
        &self,
        fates: &mut [(usize, Fate)],
        metadata: Metadata,
        rng: &mut Rng,
    ) {
        let mut written: HashMap<Node, bool> = HashMap::new();
        for (at, fate) in fates.iter_mut().rev() {
            match &self.events[*at] {
                Event::Resize { file, from, to } => {
                    let later = written.entry(*file).or_default();
                    if *later && to < from && *fate == Fate::Lost {
                        *fate = Fate::Kept;
                    }
                    *later |= *fate != Fate::Lost;
                }
                Event::Write { file, .. } => {
                    *written.entry(*file).or_default() |= *fate != Fate::Lost;
                }
                _ => {}
            }
        }
        if metadata == Metadata::Journaled {
            let names: Vec<usize> = (0..fates.len())
                .filter(|&place| {
                    fates[place].1 != Fate::Durable
                        && matches!(self.events[fates[place].0], Event::Names(_))
                })
                .collect();
            let kept = rng.below(names.len() as u64 + 1) as usize;
            for (n, place) in names.into_iter().enumerate() {
                fates[place].1 = if n < kept { Fate::Kept } else { Fate::Lost };
            }
        }
    }

    fn replay(&self, fates: &[(usize, Fate)], rng: &mut Rng) -> Disk {
        let mut cache: HashMap<Node, Sparse> = HashMap::new();
        let mut disk = Disk::default();
        for &(at, fate) in fates {
            match &self.events[at] {
                Event::Write { file, offset, data, .. } => {
                    let cache = cache.entry(*file).or_default();
                    cache.write(*offset, data);
                    let end = offset + data.len() as u64;
                    let disk = disk.files.entry(*file).or_default();
                    let mut start = *offset;
                    while start < end {
                        let reaches = match fate {
                            Fate::Durable | Fate::Kept => true,
                            Fate::Torn => rng.one_in(2),
                            Fate::Lost => false,
                        };
                        if reaches {
                            disk.copy_sector(cache, start);
                        }
                        start += SECTOR - start % SECTOR;
                    }
                    // the new length can be on disk before the bytes are
                    if matches!(fate, Fate::Torn | Fate::Lost)
                        && end > disk.len()
                        && end <= cache.len()
                        && rng.one_in(4)
                    {
                        disk.resize(end);
                    }
                }
                Event::Resize { file, to, .. } => {
                    cache.entry(*file).or_default().resize(*to);
                    if fate != Fate::Lost {
                        disk.files.entry(*file).or_default().resize(*to);
                    }
                }
                Event::Names(names) if fate != Fate::Lost => {
                    for (name, node) in names {
                        disk.name(name, *node);
                    }
                }
                _ => {}
            }
        }
        disk
    }
}

/// How far syncs that had ended at a cut reach.
struct Durable<'a> {
    /// Events of a node below this are durable.
    nodes: HashMap<Node, usize>,
    all: usize,
    /// The last sync of anything began here.
    journal: usize,
    ranges: Vec<(usize, &'a Scope)>,
}

impl<'a> Durable<'a> {
    fn at(log: &'a Log, cut: usize) -> Self {
        let mut durable = Durable { nodes: HashMap::new(), all: 0, journal: 0, ranges: Vec::new() };
        for event in &log.events[..cut] {
            let Event::SyncEnd(began) = event else {
                continue;
            };
            durable.journal = durable.journal.max(*began);
            match &log.events[*began] {
                Event::SyncBegin(Scope::Node(node)) => {
                    let reach = durable.nodes.entry(*node).or_default();
                    *reach = (*reach).max(*began);
                }
                Event::SyncBegin(Scope::All) => durable.all = durable.all.max(*began),
                Event::SyncBegin(range) => durable.ranges.push((*began, range)),
                other => unreachable!("a sync began at {other:?}"),
            }
        }
        durable
    }

    fn covers(&self, at: usize, event: &Event, metadata: Metadata) -> bool {
        let node = |node: &Node| self.nodes.get(node).is_some_and(|reach| at < *reach);
        at < self.all
            || match event {
                Event::Write { file, offset, data, durable } => {
                    let end = offset + data.len() as u64;
                    *durable
                        || node(file)
                        || self.ranges.iter().any(|(began, range)| {
                            matches!(range, Scope::Range { file: f, from, to }
                                if f == file && from <= offset && end <= *to && at < *began)
                        })
                }
                Event::Resize { file, .. } => node(file),
                Event::Names(names) => {
                    names.iter().any(|(name, _)| node(&name.dir))
                        || (metadata == Metadata::Journaled && at < self.journal)
                }
                _ => false,
            }
    }
}

#[derive(Default)]
struct Disk {
    files: HashMap<Node, Sparse>,
    dirs: HashMap<Node, BTreeMap<std::ffi::OsString, Node>>,
}

impl Disk {
    fn name(&mut self, name: &Name, node: Option<Node>) {
        let names = self.dirs.entry(name.dir).or_default();
        match node {
            Some(node) => names.insert(name.name.clone(), node),
            None => names.remove(&name.name),
        };
    }
}

/// Writes the directory `node` and what is below it.
fn store(kinds: &[Kind], disk: &Disk, node: Node, into: &Path) -> io::Result<()> {
    for (name, child) in disk.dirs.get(&node).into_iter().flatten() {
        let path = into.join(name);
        match kinds[child.0 as usize] {
            Kind::Dir => {
                fs::create_dir(&path)?;
                store(kinds, disk, *child, &path)?;
            }
            Kind::File => {
                let file = File::create_new(&path)?;
                if let Some(content) = disk.files.get(child) {
                    content.store(&file)?;
                }
            }
        }
    }
    Ok(())
}
