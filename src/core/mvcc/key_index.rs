//! The history of one key: its generations, each a run of revisions from a creation to a tombstone.
//!
//! ```text
//! put 2, put 4, delete 6, put 8      generations: {2, 4, 6t} {8}
//! put 2, delete 3                    generations: {2, 3t} {}      (the last one is empty: dead)
//! compact at 5 in the first example: generations: {4, 6t} {8}
//! compact at 6:                      generations: {6t} {8}
//! compact at 7:                      generations: {8}
//! ```
//!
//! Only a generation that is not the last is closed, and its last revision is its tombstone.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::core::types::Revision;

/// A sealed run holds at least this many revisions.
const RUN: usize = 32;

/// A sealed run, the first of which may be dropped.
#[derive(Clone, Debug)]
struct Run {
    all: Arc<[Revision]>,
    dropped: usize,
}

impl Run {
    fn new(all: Arc<[Revision]>) -> Self {
        Run { all, dropped: 0 }
    }

    /// Drops the first `n`, in constant time on average: what is left is copied only when it is less
    /// than what was dropped.
    fn drop_first(&mut self, n: usize) {
        self.dropped += n;
        if self.dropped > self.len() {
            *self = Run::new(self[..].into());
        }
    }
}

impl std::ops::Deref for Run {
    type Target = [Revision];

    fn deref(&self) -> &[Revision] {
        &self.all[self.dropped..]
    }
}

/// Ascending revisions that clone in O(log n): readers keep old versions of a key's history while
/// the applier appends to it. Sealed runs are merged so that each is longer than the next.
#[derive(Clone, Default, Debug)]
struct Revisions {
    sealed: Vec<Run>,
    tail: SmallVec<[Revision; 1]>,
}

impl Revisions {
    fn len(&self) -> usize {
        self.sealed.iter().map(|run| run.len()).sum::<usize>() + self.tail.len()
    }

    fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.tail.is_empty()
    }

    fn push(&mut self, revision: Revision) {
        self.tail.push(revision);
        if self.tail.len() < RUN {
            return;
        }
        self.sealed.push(Run::new(self.tail.drain(..).collect()));
        self.tail.shrink_to_fit();
        while let [.., a, b] = &self.sealed[..] {
            if a.len() > b.len() {
                break;
            }
            let merged = a.iter().chain(b.iter()).copied().collect();
            self.sealed.truncate(self.sealed.len() - 2);
            self.sealed.push(Run::new(merged));
        }
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = Revision> + '_ {
        self.sealed.iter().flat_map(|run| run.iter()).chain(&self.tail).copied()
    }

    fn first(&self) -> Option<Revision> {
        self.sealed.first().and_then(|run| run.first()).or(self.tail.first()).copied()
    }

    fn last(&self) -> Option<Revision> {
        self.tail.last().or_else(|| self.sealed.last().and_then(|run| run.last())).copied()
    }

    /// The greatest revision whose main is at most `main`, and how many are before it.
    fn at(&self, main: i64) -> Option<(usize, Revision)> {
        let mut before = self.len();
        let runs = self.sealed.iter().map(|run| &run[..]);
        for run in runs.chain([&self.tail[..]]).rev() {
            before -= run.len();
            if run.first().is_some_and(|first| first.main <= main) {
                let n = run.partition_point(|revision| revision.main <= main);
                return Some((before + n - 1, run[n - 1]));
            }
        }
        None
    }

    /// Drops the first `n`.
    fn drop_first(&mut self, n: usize) {
        if self.len() - n < RUN {
            let kept: Vec<Revision> = self.iter().skip(n).collect();
            *self = Revisions { sealed: Vec::new(), tail: SmallVec::from_vec(kept) };
            return self.tail.shrink_to_fit();
        }
        let mut left = n;
        let whole = self.sealed.iter().take_while(|run| {
            let goes = run.len() <= left;
            left -= if goes { run.len() } else { 0 };
            goes
        });
        let whole = whole.count();
        self.sealed.drain(..whole);
        // The tail is shorter than a run, so that a sealed one is left.
        self.sealed[0].drop_first(left);
    }
}

/// A key's life from a creation to its tombstone.
#[derive(Clone, Default, Debug)]
struct Generation {
    created: Revision,
    /// Changes since creation, the tombstone and compacted ones included.
    changes: i64,
    revisions: Revisions,
}

/// The revision of a key that a reader at some point in history sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub modified: Revision,
    pub created: Revision,
    pub version: i64,
}

/// All of a key's history that is not compacted.
#[derive(Clone, Debug)]
pub struct KeyIndex {
    generations: SmallVec<[Generation; 1]>,
}

impl KeyIndex {
    /// A key created at `revision`.
    pub fn created(revision: Revision) -> Self {
        Self::restored(revision, revision, 1)
    }

    /// A key whose oldest stored change is a put.
    pub fn restored(created: Revision, modified: Revision, version: i64) -> Self {
        let mut revisions = Revisions::default();
        revisions.push(modified);
        KeyIndex {
            generations: SmallVec::from_buf([Generation { created, changes: version, revisions }]),
        }
    }

    /// A key whose oldest stored change is a tombstone: its puts are compacted away.
    pub fn restored_tombstone(revision: Revision) -> Self {
        let mut index = Self::restored(revision, revision, 1);
        index.generations.push(Generation::default());
        index
    }

    fn current(&mut self) -> &mut Generation {
        self.generations.last_mut().expect("a key has at least one generation")
    }

    /// Appends a put.
    pub fn put(&mut self, revision: Revision) {
        let generation = self.current();
        if generation.revisions.is_empty() {
            generation.created = revision;
        }
        generation.changes += 1;
        generation.revisions.push(revision);
    }

    /// Appends a tombstone, which closes the generation.
    ///
    /// # Panics
    /// If the key is dead: the caller deletes only what it found.
    pub fn tombstone(&mut self, revision: Revision) {
        assert!(self.is_alive(), "tombstone at {revision} for a dead key");
        self.put(revision);
        self.generations.push(Generation::default());
    }

    /// Whether the newest change is a put.
    pub fn is_alive(&self) -> bool {
        self.generations.last().is_some_and(|g| !g.revisions.is_empty())
    }

    /// What a reader at main revision `at` sees; `None` if the key does not exist then.
    pub fn get(&self, at: i64) -> Option<Found> {
        let last = self.generations.len() - 1;
        for (i, generation) in self.generations.iter().enumerate().rev() {
            let Some(first) = generation.revisions.first() else { continue };
            if i != last && generation.revisions.last().is_some_and(|tomb| tomb.main <= at) {
                return None;
            }
            if first.main <= at {
                let (before, modified) = generation.revisions.at(at)?;
                let after = generation.revisions.len() - before - 1;
                return Some(Found {
                    modified,
                    created: generation.created,
                    version: generation.changes - after as i64,
                });
            }
        }
        None
    }

    /// The generation that a compaction at `at` looks into, and the newest revision in it that is
    /// not later than `at` (with the count of those before it).
    fn kept_at(&self, at: i64) -> (usize, Option<(usize, Revision)>) {
        let last = self.generations.len() - 1;
        let i = self.generations[..last]
            .iter()
            .position(|g| g.revisions.last().is_some_and(|tomb| tomb.main >= at))
            .unwrap_or(last);
        (i, self.generations[i].revisions.at(at))
    }

    /// The one revision up to `at` that hashing keeps (formats-and-peers 3.5, step 2); a closing
    /// tombstone is not kept.
    pub fn kept_for_hash(&self, at: i64) -> Option<Revision> {
        let (i, kept) = self.kept_at(at);
        let (before, revision) = kept?;
        let closes =
            i != self.generations.len() - 1 && before == self.generations[i].revisions.len() - 1;
        (!closes).then_some(revision)
    }

    /// The one revision up to `at` that a compaction at `at` keeps.
    pub fn kept(&self, at: i64) -> Option<Revision> {
        self.kept_at(at).1.map(|(_, revision)| revision)
    }

    /// How often the key was made, what compactions have dropped aside.
    pub fn generations(&self) -> usize {
        self.generations.len()
    }

    /// How many revisions [`KeyIndex::compact`] at `at` would drop.
    pub fn superseded(&self, at: i64) -> usize {
        let (i, kept) = self.kept_at(at);
        let closed: usize = self.generations[..i].iter().map(|g| g.revisions.len()).sum();
        closed + kept.map_or(0, |(before, _)| before)
    }

    /// Forgets what no reader at `at` or later can see, the oldest `limit` revisions of it at most, and
    /// names it to `dropped` with whether it is a tombstone. Answers false if nothing is left of the key.
    ///
    /// What is left at the limit is as after a compaction at a lower revision.
    pub fn compact(
        &mut self,
        at: i64,
        limit: usize,
        dropped: &mut impl FnMut(Revision, bool),
    ) -> bool {
        let (closed, kept) = self.kept_at(at);
        let mut room = limit;
        let whole = self.generations[..closed].iter().take_while(|generation| {
            let goes = generation.revisions.len() <= room;
            room -= if goes { generation.revisions.len() } else { 0 };
            goes
        });
        let whole = whole.count();
        for generation in self.generations.drain(..whole) {
            let last = generation.revisions.last();
            for revision in generation.revisions.iter() {
                dropped(revision, Some(revision) == last);
            }
        }
        let before = match kept {
            // Its tombstone stays for the time being: there is room for less than all of it.
            _ if whole < closed => room,
            Some((before, _)) => before.min(room),
            None => 0,
        };
        if before > 0 {
            // What is before the kept one is a put: a tombstone is the last of its generation.
            let generation = &mut self.generations[0];
            for revision in generation.revisions.iter().take(before) {
                dropped(revision, false);
            }
            generation.revisions.drop_first(before);
        }
        self.generations.len() > 1 || self.is_alive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn r(main: i64) -> Revision {
        Revision::main(main)
    }

    fn seen(index: &KeyIndex, at: i64) -> Option<(i64, i64, i64)> {
        index.get(at).map(|f| (f.modified.main, f.created.main, f.version))
    }

    fn example() -> KeyIndex {
        let mut index = KeyIndex::created(r(2));
        index.put(r(4));
        index.tombstone(r(6));
        index.put(r(8));
        index
    }

    fn compacted(index: &mut KeyIndex, at: i64) -> (Vec<(i64, bool)>, bool) {
        let mut dropped = Vec::new();
        let mut drop = |revision: Revision, tomb| dropped.push((revision.main, tomb));
        let left = index.compact(at, usize::MAX, &mut drop);
        (dropped, left)
    }

    /// A history of generations of different lengths, and the revision after it.
    fn long_lived() -> (KeyIndex, i64) {
        let mut index = KeyIndex::created(r(1));
        let mut main = 2;
        for puts in [0, 1, 40, 3, 200, 31, 90] {
            for _ in 0..puts {
                index.put(r(main));
                main += 1;
            }
            index.tombstone(r(main));
            index.put(r(main + 1));
            main += 2;
        }
        (index, main)
    }

    #[test]
    fn compaction_in_parts_ends_where_it_would_at_once() {
        let (index, end) = long_lived();
        for at in [1, 2, 3, 45, 46, 47, 100, 250, end - 1, end] {
            let mut at_once = index.clone();
            let (expected, expected_left) = compacted(&mut at_once, at);
            for limit in [1, 2, 7, 33, 1000] {
                let mut parts = index.clone();
                let (mut dropped, mut left) = (Vec::new(), true);
                while parts.superseded(at) > 0 {
                    let before = dropped.len();
                    left =
                        parts.compact(at, limit, &mut |rev, tomb| dropped.push((rev.main, tomb)));
                    let more = dropped.len() - before;
                    assert!((1..=limit).contains(&more), "{more} of {limit}");
                    for seen_at in at..=end {
                        assert_eq!(seen(&parts, seen_at), seen(&index, seen_at), "at {seen_at}");
                    }
                }
                assert_eq!((&dropped, left), (&expected, expected_left || expected.is_empty()));
                assert_eq!(parts.kept(at), at_once.kept(at));
            }
        }
    }

    #[test]
    fn a_run_is_dropped_from_without_copying_it_each_time() {
        let mut index = KeyIndex::created(r(1));
        for main in 2..=100_000 {
            index.put(r(main));
        }
        let mut expected = 1;
        while index.superseded(100_000) > 0 {
            index.compact(100_000, 13, &mut |revision, _| {
                assert_eq!(revision.main, expected);
                expected += 1;
            });
            let held: usize =
                index.generations[0].revisions.sealed.iter().map(|r| r.all.len()).sum();
            let left = index.generations[0].revisions.len();
            assert!(held <= 2 * left + RUN, "{held} are held for {left}");
        }
        assert_eq!(expected, 100_000);
    }

    #[test]
    fn a_reader_sees_the_newest_change_before_it() {
        let index = example();
        assert_eq!(seen(&index, 1), None);
        assert_eq!(seen(&index, 2), Some((2, 2, 1)));
        assert_eq!(seen(&index, 5), Some((4, 2, 2)));
        assert_eq!(seen(&index, 6), None);
        assert_eq!(seen(&index, 7), None);
        assert_eq!(seen(&index, 100), Some((8, 8, 1)));
    }

    #[test]
    fn compaction_keeps_what_later_readers_see() {
        let mut index = example();
        assert_eq!(compacted(&mut index, 1), (vec![], true));
        assert_eq!(compacted(&mut index, 5), (vec![(2, false)], true));
        assert_eq!(seen(&index, 5), Some((4, 2, 2)));
        assert_eq!(compacted(&mut index, 6), (vec![(4, false)], true));
        assert_eq!(compacted(&mut index, 7), (vec![(6, true)], true));
        assert_eq!(seen(&index, 8), Some((8, 8, 1)));
        assert_eq!(index.superseded(8), 0);
    }

    #[test]
    fn a_dead_key_goes_once_its_tombstone_is_before_the_compaction() {
        let mut index = KeyIndex::created(r(2));
        index.tombstone(r(3));
        assert_eq!(index.kept_for_hash(3), None);
        assert_eq!(compacted(&mut index, 3), (vec![(2, false)], true));
        assert_eq!(index.superseded(4), 1);
        assert_eq!(compacted(&mut index, 4), (vec![(3, true)], false));
        let mut restored = KeyIndex::restored_tombstone(r(3));
        assert_eq!(compacted(&mut restored, 4), (vec![(3, true)], false));
    }

    #[test]
    fn long_histories_answer_as_a_plain_list_does() {
        let mut index = KeyIndex::created(r(2));
        let mut versions = vec![index.clone()];
        for main in 3..2000 {
            index.put(r(main));
            versions.push(index.clone());
        }
        for at in [2, 3, 31, 32, 33, 34, 500, 1998, 1999, 5000] {
            let expected = at.min(1999);
            assert_eq!(seen(&index, at), Some((expected, 2, expected - 1)));
        }
        assert_eq!(seen(&versions[500], 9999), Some((502, 2, 501)), "an old version is untouched");
        let (dropped, left) = compacted(&mut index, 1500);
        assert!(left && dropped.len() == 1498);
        assert_eq!(seen(&index, 1999), Some((1999, 2, 1998)));
        assert_eq!(seen(&index, 1499), None);
        index.put(r(2000));
        assert_eq!(seen(&index, 2000), Some((2000, 2, 1999)));
    }
}
