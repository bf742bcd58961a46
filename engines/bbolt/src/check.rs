//! Which pages a file uses, and whether it is in order.

use bytes::Bytes;
use engine_api::EngineError;

use crate::format::{BUCKET_BYTES, IS_BUCKET, Page, PageDamage, u64_at};
use crate::store::{Committer, Store, Version, decode_bucket};
use crate::tree::{Root, Tree};

/// Bytes read at once when all pages are looked at.
const WINDOW_BYTES: u64 = 1 << 20;

/// Pages that are not asked for are read along rather than left out if there are no more of them.
const GAP_PAGES: u64 = 8;

/// What [`Bbolt::check`](crate::Bbolt::check) has counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Pages of the file, whether in use or not.
    pub pages: u64,
    /// Pages that are free, or will be.
    pub unused: u64,
    /// Rows of all buckets, those of other programs among them.
    pub rows: u64,
}

/// A set of pages.
struct Pages {
    words: Vec<u64>,
    pages: u64,
}

impl Pages {
    fn new(pages: u64) -> Self {
        Pages { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    fn has(&self, id: u64) -> bool {
        self.words[(id / 64) as usize] >> (id % 64) & 1 != 0
    }

    /// Adds pages that must not be there yet; answers the first that is.
    fn add(&mut self, id: u64, length: u64) -> Result<(), u64> {
        for id in id..id + length {
            if self.has(id) {
                return Err(id);
            }
            self.words[(id / 64) as usize] |= 1 << (id % 64);
        }
        Ok(())
    }

    /// First and length of each run of pages that are not there.
    fn missing(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut id = 0;
        while id < self.pages {
            if id % 64 == 0 && self.words[(id / 64) as usize] == u64::MAX {
                id += 64;
                continue;
            }
            if !self.has(id) {
                match runs.last_mut() {
                    Some((start, length)) if *start + *length == id => *length += 1,
                    _ => runs.push((id, 1)),
                }
            }
            id += 1;
        }
        runs
    }
}

/// The pages that no tree of the file reaches. All branches and leaves are read, in the order of the file
/// as far as possible, and checked, so that a damaged file is found out when it is opened.
pub(crate) fn unreached(store: &Store, version: &Version) -> Result<Vec<(u64, u64)>, EngineError> {
    let pages = version.pages;
    let page_bytes = store.page_bytes() as u64;
    let mut reached = Pages::new(pages);
    // as many as fit into the addresses of a file that is as long as it says
    reached.add(0, 2.min(pages)).map_err(|page| store.damaged(page, PageDamage::Shared))?;
    let mut level = vec![version.root];
    let mut window = Vec::new();
    while !level.is_empty() {
        level.sort_unstable();
        let mut below = Vec::new();
        let mut at = 0;
        while at < level.len() {
            let first = level[at];
            if first < 2 || first >= pages {
                return Err(store.damaged(first, PageDamage::OutOfRange { pages }));
            }
            let mut end = first + 1;
            let mut next = at + 1;
            while let Some(id) = level.get(next).filter(|id| {
                **id < pages
                    && **id <= end + GAP_PAGES
                    && (**id - first) * page_bytes < WINDOW_BYTES
            }) {
                end = id + 1;
                next += 1;
            }
            window.resize(((end - first) * page_bytes) as usize, 0);
            store.read(&mut window, first * page_bytes)?;
            for id in &level[at..next] {
                let from = ((id - first) * page_bytes) as usize;
                let overflow = store.check_header(*id, &window[from..], pages)?;
                let length = 1 + u64::from(overflow);
                reached.add(*id, length).map_err(|page| store.damaged(page, PageDamage::Shared))?;
                let bytes = (length * page_bytes) as usize;
                let damaged = |damage| store.damaged(*id, damage);
                if from + bytes <= window.len() {
                    note_children(&window[from..from + bytes], &mut below).map_err(damaged)?;
                } else {
                    let mut long = vec![0; bytes];
                    store.read(&mut long, id * page_bytes)?;
                    note_children(&long, &mut below).map_err(damaged)?;
                }
            }
            at = next;
        }
        level = below;
    }
    Ok(reached.missing())
}

/// Adds the pages that this one leads to.
fn note_children(bytes: &[u8], below: &mut Vec<u64>) -> Result<(), PageDamage> {
    let page = Page::check(bytes)?;
    for index in 0..page.count() {
        if !page.is_leaf() {
            below.push(page.child(index));
        } else if page.flags(index) & IS_BUCKET != 0 {
            let value = page.value(index);
            if value.len() < BUCKET_BYTES {
                return Err(PageDamage::NotABucket { index });
            }
            match u64_at(value, 0) {
                0 => {
                    Page::check(&value[BUCKET_BYTES..])?;
                }
                root => below.push(root),
            }
        }
    }
    Ok(())
}

/// Checks that each page of the newest version is reached once or free, and that all keys are where they
/// should be.
pub(crate) fn check(committer: &Committer) -> Result<Checked, EngineError> {
    let (store, version, space) = (committer.store(), committer.version(), committer.space());
    let pages = space.pages();
    let mut used = Pages::new(pages);
    let mut add =
        |id, length| used.add(id, length).map_err(|page| store.damaged(page, PageDamage::Shared));
    add(0, 2)?;
    if let Some((id, length)) = committer.freelist() {
        add(id, length)?;
    }
    let mut rows = 0;
    let mut roots = vec![version.root];
    let tree = Tree { store, pages };
    while let Some(root) = roots.pop() {
        tree.pages_under(root, &mut |id, page| {
            add(id, (page.bytes().len() / store.page_bytes()) as u64)?;
            if !page.is_leaf() && page.count() < 2 {
                // it can be read, but bbolt panics when it takes the child away
                return Err(store.damaged(id, PageDamage::Lonely));
            }
            if page.is_leaf() {
                let found = visit_leaf(id, page, root == version.root, &mut roots);
                rows += found.map_err(|damage| store.damaged(id, damage))?;
            }
            Ok(())
        })?;
    }
    let mut unused = 0;
    for (id, length) in space.unused() {
        if let Err(page) = used.add(id, length) {
            return Err(store.damaged(page, PageDamage::InUseAndFree));
        }
        unused += length;
    }
    match used.missing().first() {
        Some((page, _)) => Err(store.damaged(*page, PageDamage::Lost)),
        None => Ok(Checked { pages, unused, rows }),
    }
}

/// Adds the roots of the buckets in a leaf, and answers how many rows it has, those of inline buckets
/// among them.
fn visit_leaf(
    id: u64,
    page: &Page<Bytes>,
    of_buckets: bool,
    roots: &mut Vec<u64>,
) -> Result<u64, PageDamage> {
    let mut rows = 0;
    for index in 0..page.count() {
        if page.flags(index) & IS_BUCKET == 0 {
            if of_buckets {
                return Err(PageDamage::NotABucket { index });
            }
            rows += 1;
            continue;
        }
        match decode_bucket(id, page, index)?.root {
            Root::Page(root) => roots.push(root),
            Root::Inline(page, _) => rows += page.count() as u64,
        }
    }
    Ok(rows)
}
