//! Which pages are free, and which will be once nobody sees them any more.
//!
//! Every commit of this process has a version, counted from 1; what was in the file when it was opened
//! has version 0. A page that a commit of version `b` wrote and one of version `f` replaced is seen by
//! the views of versions in `[b, f)`, and is part of the file's last durable state if that has such a
//! version. Until neither is so it is pending, and never written over.

use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::FxHashMap;

/// Runs of free pages.
#[derive(Default, Debug)]
struct Runs {
    /// Length by first page; no run touches another.
    by_start: BTreeMap<u64, u64>,
    /// (length, first page)
    by_length: BTreeSet<(u64, u64)>,
    pages: u64,
}

impl Runs {
    fn add(&mut self, start: u64, length: u64) {
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
        self.pages += length;
    }

    fn remove(&mut self, start: u64, length: u64) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
        self.pages -= length;
    }

    /// Adds pages of which none must be there; answers the first that is.
    fn insert(&mut self, id: u64, length: u64) -> Result<(), u64> {
        let (mut start, mut whole) = (id, length);
        if let Some((&before, &long)) = self.by_start.range(..=id).next_back() {
            if before + long > id {
                return Err(id);
            }
            if before + long == id {
                self.remove(before, long);
                (start, whole) = (before, long + whole);
            }
        }
        if let Some((&after, &long)) = self.by_start.range(id..).next() {
            if after < id + length {
                return Err(after);
            }
            if after == id + length {
                self.remove(after, long);
                whole += long;
            }
        }
        self.add(start, whole);
        Ok(())
    }

    /// Takes pages that follow each other: single ones from the start of the file, so that its end
    /// becomes free; several from the shortest run that is long enough.
    fn take(&mut self, length: u64) -> Option<u64> {
        let (start, long) = if length == 1 {
            self.by_start.first_key_value().map(|(start, long)| (*start, *long))?
        } else {
            self.by_length.range((length, 0)..).next().map(|(long, start)| (*start, *long))?
        };
        self.remove(start, long);
        if long > length {
            self.add(start + length, long - length);
        }
        Some(start)
    }
}

/// (version that wrote the pages or 0 if that is too long ago to matter, version that replaced them)
type Seen = (u64, u64);

/// The pages of one file.
#[derive(Debug)]
pub(crate) struct Space {
    /// The high-water mark: the file has had this many pages, in use or free.
    pages: u64,
    free: Runs,
    /// First page and length.
    pending: BTreeMap<Seen, Vec<(u64, u64)>>,
    pending_pages: u64,
    /// Which version wrote a page, for those that an open view or the durable state may not see.
    born: FxHashMap<u64, u64>,
}

/// A page was to become free twice, so that the trees of the file overlap.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct FreedTwice(pub(crate) u64);

impl Space {
    /// A file of `pages` pages, of which those of `free` (first page and length) are free.
    pub(crate) fn new(
        pages: u64,
        free: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, FreedTwice> {
        let mut space = Space {
            pages,
            free: Runs::default(),
            pending: BTreeMap::new(),
            pending_pages: 0,
            born: FxHashMap::default(),
        };
        for (id, length) in free {
            space.free.insert(id, length).map_err(FreedTwice)?;
        }
        Ok(space)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that the newest version uses, the metas among them.
    pub(crate) fn pages_in_use(&self) -> u64 {
        // a stored list that is wrong has pages that are in use, and these are counted again once replaced
        self.pages.saturating_sub(self.pages_unused())
    }

    /// Takes `length` pages in a row for `version`.
    pub(crate) fn allocate(&mut self, length: u64, version: u64) -> u64 {
        let id = self.free.take(length).unwrap_or_else(|| {
            let id = self.pages;
            self.pages += length;
            id
        });
        self.born.insert(id, version);
        id
    }

    /// `version` no longer uses these pages, which were allocated together.
    pub(crate) fn replace(&mut self, id: u64, length: u64, version: u64) {
        let born = self.born.remove(&id).unwrap_or(0);
        self.pending.entry((born, version)).or_default().push((id, length));
        self.pending_pages += length;
    }

    /// Frees what none of the versions in `pinned`, ascending, sees any more; answers the first page of
    /// each.
    pub(crate) fn release(&mut self, pinned: &[u64]) -> Result<Vec<u64>, FreedTwice> {
        let mut released = Vec::new();
        let unseen = |seen: &Seen, _: &mut Vec<(u64, u64)>| {
            let (born, replaced) = *seen;
            let next = pinned.partition_point(|version| *version < born);
            pinned.get(next).is_none_or(|version| *version >= replaced)
        };
        for (_, pages) in self.pending.extract_if(.., unseen) {
            for (id, length) in pages {
                self.free.insert(id, length).map_err(FreedTwice)?;
                self.pending_pages -= length;
                released.push(id);
            }
        }
        Ok(released)
    }

    /// No version before `oldest` is pinned, nor will be: which of them wrote a page no longer matters.
    pub(crate) fn forget_births(&mut self, oldest: u64) {
        self.born.retain(|_, version| *version > oldest);
    }

    /// Pages that are not in use, first page and length, in no order.
    pub(crate) fn unused(&self) -> impl Iterator<Item = (u64, u64)> {
        let free = self.free.by_start.iter().map(|(id, length)| (*id, *length));
        free.chain(self.pending.values().flatten().copied())
    }

    pub(crate) fn pages_unused(&self) -> u64 {
        self.free.pages + self.pending_pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_and_are_taken_where_they_fit() {
        let mut runs = Runs::default();
        for (id, length) in [(10, 1), (12, 2), (20, 5), (11, 1)] {
            runs.insert(id, length).unwrap();
        }
        assert_eq!(runs.by_start, BTreeMap::from([(10, 4), (20, 5)]));
        for (id, length, found) in [(13, 1, 13), (9, 2, 10), (24, 1, 24), (15, 9, 20)] {
            assert_eq!(runs.insert(id, length), Err(found));
        }
        assert_eq!(runs.take(5), Some(20));
        assert_eq!(runs.take(1), Some(10));
        assert_eq!(runs.take(4), None);
        assert_eq!(runs.take(2), Some(11));
        assert_eq!(runs.pages, 1);
        assert_eq!(runs.by_start.len(), runs.by_length.len());
    }

    #[test]
    fn a_wrong_list_of_free_pages_is_no_panic() {
        let mut space = Space::new(6, [(2, 4)]).unwrap();
        space.replace(2, 3, 1);
        assert_eq!((space.pages_in_use(), space.pages_unused()), (0, 7));
        assert_eq!(space.release(&[1]), Err(FreedTwice(2)));
    }

    #[test]
    fn pages_are_free_once_no_pinned_version_sees_them() {
        let mut space = Space::new(4, []).unwrap();
        // of the file, replaced by version 1
        space.replace(3, 1, 1);
        assert_eq!(space.allocate(1, 1), 4);
        assert_eq!(space.release(&[0, 1]), Ok(vec![]));
        // written by version 1 and replaced by 2: the durable version 0 does not see it
        space.replace(4, 1, 2);
        assert_eq!(space.allocate(2, 2), 5);
        assert_eq!(space.release(&[0, 1]), Ok(vec![]));
        assert_eq!(space.release(&[0, 2]), Ok(vec![4]));
        assert_eq!((space.pages_in_use(), space.pages_unused()), (5, 2));
        assert_eq!(space.allocate(1, 3), 4);
        assert_eq!(space.release(&[3]), Ok(vec![3]));
        // the births of versions that nobody can tell apart any more
        space.forget_births(3);
        space.replace(5, 2, 4);
        assert_eq!(space.release(&[3]), Ok(vec![]));
        assert_eq!(space.release(&[4]), Ok(vec![5]));
        space.replace(5, 1, 5);
        assert_eq!(space.release(&[]), Err(FreedTwice(5)));
    }
}
