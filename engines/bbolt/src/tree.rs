//! The B+tree of a bucket, read and changed.
//!
//! A change never touches a page: it makes new ones, up to the root, and leaves the old ones to whoever
//! still sees them. All changes of a batch go down the tree together, in key order, so that each page on
//! the way is made once:
//!
//! ```text
//! edit       merges the changes into a leaf, or passes them on to the children of a branch
//! settle     joins a child that deletions have left small with the one beside it; an only child waits
//!            until its parent has been joined
//! place      cuts each changed child into pages and gives them numbers
//! ```

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use engine_api::EngineError;

use crate::format::{
    BRANCH, BUCKET_BYTES, Builder, DEPTH_MAX, ELEMENT_BYTES, HEADER_BYTES, IS_BUCKET, LEAF, Page,
    PageDamage,
};
use crate::space::Space;
use crate::store::Store;

/// Where a bucket has its rows.
#[derive(Clone, Debug)]
pub(crate) enum Root {
    Page(u64),
    /// A small bucket is a leaf within the bucket tree's page of that number.
    Inline(Page<Bytes>, u64),
}

/// The keys under a page: the least that there may be, and what all are below.
type Bounds<'k> = (&'k [u8], Option<&'k [u8]>);

const EVERYTHING: Bounds<'static> = (&[], None);

/// A tree to be read.
#[derive(Clone, Copy)]
pub(crate) struct Tree<'a> {
    pub(crate) store: &'a Store,
    /// Pages of the file, as of the version that is read.
    pub(crate) pages: u64,
}

/// Takes a leaf and the place of an element in it.
type Visit<'v> = dyn FnMut(&Page<Bytes>, usize) -> Result<ControlFlow<()>, PageDamage> + 'v;

impl Tree<'_> {
    fn open(&self, id: u64, bounds: Bounds<'_>, depth: usize) -> Result<Page<Bytes>, EngineError> {
        if depth > DEPTH_MAX {
            return Err(self.store.damaged(id, PageDamage::Depth));
        }
        let page = self.store.page(id, self.pages)?;
        page.check_place(bounds, depth == 0).map_err(|damage| self.store.damaged(id, damage))?;
        Ok(page)
    }

    /// The leaf and the place in it where `key` is.
    pub(crate) fn find(
        &self,
        root: &Root,
        key: &[u8],
    ) -> Result<Option<(Page<Bytes>, usize)>, EngineError> {
        match root {
            Root::Page(id) => self.find_under(*id, key, EVERYTHING, 0),
            Root::Inline(page, _) => Ok(find_in(page, key).map(|at| (page.clone(), at))),
        }
    }

    fn find_under(
        &self,
        id: u64,
        key: &[u8],
        bounds: Bounds<'_>,
        depth: usize,
    ) -> Result<Option<(Page<Bytes>, usize)>, EngineError> {
        let page = self.open(id, bounds, depth)?;
        if page.is_leaf() {
            return Ok(find_in(&page, key).map(|at| (page, at)));
        }
        let Some(at) = page.first_not(|first| first <= key).checked_sub(1) else {
            return Ok(None);
        };
        self.find_under(page.child(at), key, child_bounds(&page, at, bounds), depth + 1)
    }

    /// Visits the elements within the bounds in key order.
    pub(crate) fn scan(
        &self,
        root: &Root,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut Visit<'_>,
    ) -> Result<(), EngineError> {
        match root {
            Root::Page(id) => self.scan_under(*id, (from, to), EVERYTHING, 0, visit).map(|_| ()),
            Root::Inline(page, id) => scan_leaf(page, (from, to), visit)
                .map(|_| ())
                .map_err(|damage| self.store.damaged(*id, damage)),
        }
    }

    fn scan_under(
        &self,
        id: u64,
        range: (Bound<&[u8]>, Bound<&[u8]>),
        bounds: Bounds<'_>,
        depth: usize,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, EngineError> {
        let page = self.open(id, bounds, depth)?;
        if page.is_leaf() {
            return scan_leaf(&page, range, visit).map_err(|damage| self.store.damaged(id, damage));
        }
        let first = match range.0 {
            Bound::Unbounded => 0,
            Bound::Included(from) | Bound::Excluded(from) => {
                page.first_not(|key| key <= from).saturating_sub(1)
            }
        };
        for at in first..page.count() {
            if is_above(page.key(at), range.1) {
                return Ok(ControlFlow::Break(()));
            }
            let bounds = child_bounds(&page, at, bounds);
            let flow = self.scan_under(page.child(at), range, bounds, depth + 1, visit)?;
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The leaf and the place in it of the greatest key.
    pub(crate) fn last(&self, root: &Root) -> Result<Option<(Page<Bytes>, usize)>, EngineError> {
        let page = match root {
            Root::Page(id) => self.last_under(*id, EVERYTHING, 0)?,
            Root::Inline(page, _) => page.clone(),
        };
        Ok(page.count().checked_sub(1).map(|at| (page, at)))
    }

    fn last_under(
        &self,
        id: u64,
        bounds: Bounds<'_>,
        depth: usize,
    ) -> Result<Page<Bytes>, EngineError> {
        let page = self.open(id, bounds, depth)?;
        if page.is_leaf() {
            return Ok(page);
        }
        let at = page.count() - 1;
        self.last_under(page.child(at), child_bounds(&page, at, bounds), depth + 1)
    }

    /// Visits every page of the tree, with its number, the branches before what is under them.
    pub(crate) fn pages_under(
        &self,
        id: u64,
        visit: &mut dyn FnMut(u64, &Page<Bytes>) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        self.visit_pages(id, EVERYTHING, 0, visit)
    }

    fn visit_pages(
        &self,
        id: u64,
        bounds: Bounds<'_>,
        depth: usize,
        visit: &mut dyn FnMut(u64, &Page<Bytes>) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let page = self.open(id, bounds, depth)?;
        visit(id, &page)?;
        if !page.is_leaf() {
            for at in 0..page.count() {
                let bounds = child_bounds(&page, at, bounds);
                self.visit_pages(page.child(at), bounds, depth + 1, visit)?;
            }
        }
        Ok(())
    }
}

fn child_bounds<'k>(page: &'k Page<Bytes>, at: usize, (_, upper): Bounds<'k>) -> Bounds<'k> {
    let next = (at + 1 < page.count()).then(|| page.key(at + 1));
    (page.key(at), next.or(upper))
}

fn find_in(page: &Page<Bytes>, key: &[u8]) -> Option<usize> {
    let at = page.first_not(|other| other < key);
    (at < page.count() && page.key(at) == key).then_some(at)
}

fn scan_leaf(
    page: &Page<Bytes>,
    (from, to): (Bound<&[u8]>, Bound<&[u8]>),
    visit: &mut Visit<'_>,
) -> Result<ControlFlow<()>, PageDamage> {
    let first = match from {
        Bound::Unbounded => 0,
        Bound::Included(from) => page.first_not(|key| key < from),
        Bound::Excluded(from) => page.first_not(|key| key <= from),
    };
    for at in first..page.count() {
        if is_above(page.key(at), to) || visit(page, at)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn is_above(key: &[u8], to: Bound<&[u8]>) -> bool {
    match to {
        Bound::Included(to) => key > to,
        Bound::Excluded(to) => key >= to,
        Bound::Unbounded => false,
    }
}

/// What becomes of a key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change<'a> {
    pub(crate) key: &'a Bytes,
    /// `None`: it is deleted.
    pub(crate) value: Option<&'a Bytes>,
}

/// Pages that are not yet in the file.
#[derive(Default, Debug)]
pub(crate) struct Unwritten {
    pub(crate) pages: BTreeMap<u64, Page<Bytes>>,
    pub(crate) bytes: usize,
}

impl Unwritten {
    pub(crate) fn remove(&mut self, id: u64) -> bool {
        let removed = self.pages.remove(&id);
        self.bytes -= removed.as_ref().map_or(0, |page| page.bytes().len());
        removed.is_some()
    }
}

/// Which tree is changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// The bucket tree, whose values are buckets. Its root always has a page of its own.
    Buckets,
    /// A bucket whose keys are appended in order: pages are filled further.
    Ascending,
    /// Any other bucket.
    Any,
}

/// Changes the trees of one version.
pub(crate) struct Editor<'a> {
    pub(crate) tree: Tree<'a>,
    pub(crate) space: &'a mut Space,
    pub(crate) unwritten: &'a mut Unwritten,
    pub(crate) version: u64,
    pub(crate) kind: Kind,
}

/// A row of a leaf in the making; it shares the bytes of the page or batch that it comes from.
struct Row {
    flags: u32,
    key: Bytes,
    value: Bytes,
}

/// An element of a branch in the making.
struct Child {
    key: Bytes,
    id: u64,
}

/// A changed page, of any size and without a number. A branch's children have theirs, but for one that waits.
struct Node {
    items: Items,
    /// Something was taken out, so that it may be too small now.
    shrunk: bool,
}

enum Items {
    Rows(Vec<Row>),
    Children(Vec<Child>),
    /// An only child that is too small. It gets no page before its parent has been joined with another and
    /// it with a child of that one: else it would stay alone in a branch, which bbolt does not survive.
    Only(Box<Node>),
}

impl Items {
    fn into_slots(self) -> Vec<Slot> {
        match self {
            Items::Rows(_) => unreachable!("a leaf has no children"),
            Items::Children(children) => children.into_iter().map(Slot::Kept).collect(),
            Items::Only(only) => vec![Slot::Changed(*only)],
        }
    }
}

/// A child of a branch that is being changed.
enum Slot {
    Kept(Child),
    Changed(Node),
}

impl Row {
    fn bytes(&self) -> usize {
        ELEMENT_BYTES + self.key.len() + self.value.len()
    }
}

impl Child {
    fn bytes(&self) -> usize {
        ELEMENT_BYTES + self.key.len()
    }
}

impl Node {
    fn len(&self) -> usize {
        match &self.items {
            Items::Rows(rows) => rows.len(),
            Items::Children(children) => children.len(),
            Items::Only(_) => 1,
        }
    }

    /// Bytes of the page, if it were one.
    fn bytes(&self) -> usize {
        HEADER_BYTES
            + match &self.items {
                Items::Rows(rows) => rows.iter().map(Row::bytes).sum::<usize>(),
                Items::Children(children) => children.iter().map(Child::bytes).sum(),
                Items::Only(_) => 0,
            }
    }

    fn is_small(&self, page_bytes: usize) -> bool {
        let few = !matches!(&self.items, Items::Rows(_)) && self.len() < 2;
        few || self.shrunk && self.bytes() < page_bytes / 4
    }
}

/// The key and value bytes of an element, shared with its page.
fn shared(page: &Page<Bytes>, at: usize) -> Row {
    Row {
        flags: page.flags(at),
        key: page.bytes().slice(page.key_range(at)),
        value: page.bytes().slice(page.value_range(at)),
    }
}

fn shared_child(page: &Page<Bytes>, at: usize) -> Child {
    Child { key: page.bytes().slice(page.key_range(at)), id: page.child(at) }
}

impl Editor<'_> {
    fn page_bytes(&self) -> usize {
        self.tree.store.page_bytes()
    }

    fn damaged(&self, id: u64, damage: PageDamage) -> EngineError {
        self.tree.store.damaged(id, damage)
    }

    /// Makes `changes`, ascending by key and one for a key; answers the new root, or `None` if all is as
    /// it was.
    pub(crate) fn apply(
        &mut self,
        root: &Root,
        changes: &[Change<'_>],
    ) -> Result<Option<Root>, EngineError> {
        let changed = match root {
            Root::Page(id) => self.edit(*id, changes, EVERYTHING, 0)?,
            Root::Inline(page, id) => self.merge(*id, page, changes)?,
        };
        let Some(mut node) = changed else { return Ok(None) };
        let page_bytes = self.page_bytes();
        loop {
            let bytes = node.bytes();
            let children = match node.items {
                Items::Rows(rows) => {
                    // as bbolt does it
                    if self.kind != Kind::Buckets && bytes <= page_bytes / 4 {
                        return Ok(Some(Root::Inline(inline(&rows), 0)));
                    }
                    if bytes <= page_bytes || rows.len() < 2 {
                        return Ok(Some(Root::Page(self.place_leaf(&rows))));
                    }
                    self.place_leaves(&rows)
                }
                Items::Children(mut children) => match children.len() {
                    0 => {
                        node = Node { items: Items::Rows(Vec::new()), shrunk: true };
                        continue;
                    }
                    1 => return Ok(children.pop().map(|child| Root::Page(child.id))),
                    count if bytes <= page_bytes || count < 4 => {
                        return Ok(Some(Root::Page(self.place_branch(&children))));
                    }
                    _ => self.place_branches(&children),
                },
                Items::Only(only) => {
                    node = *only;
                    continue;
                }
            };
            node = Node { items: Items::Children(children), shrunk: false };
        }
    }

    /// Changes what is under a page; `None` if all is as it was.
    fn edit(
        &mut self,
        id: u64,
        changes: &[Change<'_>],
        bounds: Bounds<'_>,
        depth: usize,
    ) -> Result<Option<Node>, EngineError> {
        let page = self.tree.open(id, bounds, depth)?;
        if page.is_leaf() {
            let node = self.merge(id, &page, changes)?;
            if node.is_some() {
                self.replace(id, &page);
            }
            return Ok(node);
        }
        let mut rest = changes;
        let mut slots = Vec::with_capacity(page.count());
        let mut changed = false;
        for at in 0..page.count() {
            let next = (at + 1 < page.count()).then(|| page.key(at + 1));
            let here = match next {
                // a page seldom has many changes: the search need not start in the middle of all
                Some(next) => rest.iter().take_while(|change| &change.key[..] < next).count(),
                None => rest.len(),
            };
            let (mine, others) = rest.split_at(here);
            rest = others;
            let node = if mine.is_empty() {
                None
            } else {
                self.edit(page.child(at), mine, child_bounds(&page, at, bounds), depth + 1)?
            };
            changed |= node.is_some();
            slots.push(node.map_or_else(|| Slot::Kept(shared_child(&page, at)), Slot::Changed));
        }
        if !changed {
            return Ok(None);
        }
        self.replace(id, &page);
        let shrunk = self.settle(&mut slots)?;
        if depth == 0 && slots.len() == 1 {
            // the root is needed no more
            match slots.pop() {
                Some(Slot::Changed(node)) => return Ok(Some(node)),
                kept => slots.extend(kept),
            }
        }
        Ok(Some(self.branch(slots, shrunk)))
    }

    /// A branch of children that are settled.
    fn branch(&mut self, mut slots: Vec<Slot>, shrunk: bool) -> Node {
        let page_bytes = self.page_bytes();
        let only =
            slots.pop_if(|slot| matches!(slot, Slot::Changed(node) if node.is_small(page_bytes)));
        let items = match only {
            Some(Slot::Changed(only)) if slots.is_empty() => Items::Only(Box::new(only)),
            other => {
                slots.extend(other);
                Items::Children(self.place(slots))
            }
        };
        Node { items, shrunk }
    }

    /// Merges changes into a leaf.
    fn merge(
        &self,
        id: u64,
        page: &Page<Bytes>,
        changes: &[Change<'_>],
    ) -> Result<Option<Node>, EngineError> {
        let mut rows = Vec::with_capacity(page.count() + changes.len());
        let (mut changed, mut shrunk) = (false, false);
        let mut at = 0;
        for change in changes {
            while at < page.count() && page.key(at) < &change.key[..] {
                rows.push(self.row(id, page, at)?);
                at += 1;
            }
            let old = (at < page.count() && page.key(at) == &change.key[..]).then_some(at);
            if let Some(old) = old {
                let old = self.row(id, page, old)?;
                changed = true;
                shrunk |= change.value.is_none_or(|value| value.len() < old.value.len());
                at += 1;
            }
            if let Some(value) = change.value {
                let flags = if self.kind == Kind::Buckets { IS_BUCKET } else { 0 };
                rows.push(Row { flags, key: change.key.clone(), value: value.clone() });
                changed = true;
            }
        }
        if !changed {
            return Ok(None);
        }
        for at in at..page.count() {
            rows.push(self.row(id, page, at)?);
        }
        Ok(Some(Node { items: Items::Rows(rows), shrunk }))
    }

    /// An element of a leaf, which must be what such a tree holds.
    fn row(&self, id: u64, page: &Page<Bytes>, index: usize) -> Result<Row, EngineError> {
        let row = shared(page, index);
        let is_bucket = row.flags & IS_BUCKET != 0;
        if self.kind == Kind::Buckets && (!is_bucket || row.value.len() < BUCKET_BYTES) {
            return Err(self.damaged(id, PageDamage::NotABucket { index }));
        }
        if self.kind != Kind::Buckets && is_bucket {
            return Err(self.damaged(id, PageDamage::Nested { index }));
        }
        Ok(row)
    }

    fn replace(&mut self, id: u64, page: &Page<Bytes>) {
        let length = page.bytes().len() / self.page_bytes();
        self.space.replace(id, length as u64, self.version);
    }

    /// Drops children that are empty, and joins those that are too small with the one before, or with
    /// the one behind if there is none before. Answers whether there are fewer now.
    fn settle(&mut self, slots: &mut Vec<Slot>) -> Result<bool, EngineError> {
        let page_bytes = self.page_bytes();
        let mut shrunk = false;
        let mut at = 0;
        while at < slots.len() {
            let small = match &slots[at] {
                Slot::Kept(_) => false,
                Slot::Changed(node) if node.len() == 0 => {
                    slots.remove(at);
                    shrunk = true;
                    continue;
                }
                Slot::Changed(node) => slots.len() > 1 && node.is_small(page_bytes),
            };
            if !small {
                at += 1;
                continue;
            }
            at = at.saturating_sub(1);
            let right = slots.remove(at + 1);
            let left = std::mem::replace(&mut slots[at], Slot::Changed(Node::nothing()));
            slots[at] = Slot::Changed(self.join(left, right)?);
            shrunk = true;
        }
        Ok(shrunk)
    }

    fn join(&mut self, left: Slot, right: Slot) -> Result<Node, EngineError> {
        let kept = match (&left, &right) {
            (Slot::Kept(child), _) | (_, Slot::Kept(child)) => child.id,
            _ => 0,
        };
        let items = match (self.take_up(left)?, self.take_up(right)?) {
            (Items::Rows(mut rows), Items::Rows(more)) => {
                rows.extend(more);
                Items::Rows(rows)
            }
            (Items::Rows(_), _) | (_, Items::Rows(_)) => {
                return Err(self.damaged(kept, PageDamage::Level));
            }
            (left, right) => {
                let mut slots = left.into_slots();
                slots.extend(right.into_slots());
                // one that waited finds others here
                self.settle(&mut slots)?;
                return Ok(self.branch(slots, true));
            }
        };
        Ok(Node { items, shrunk: true })
    }

    /// What a child holds; its page, if it has one, is replaced.
    fn take_up(&mut self, slot: Slot) -> Result<Items, EngineError> {
        let child = match slot {
            Slot::Changed(node) => return Ok(node.items),
            Slot::Kept(child) => child,
        };
        // not the root; what is above was checked on the way here
        let page = self.tree.open(child.id, (&child.key, None), 1)?;
        self.replace(child.id, &page);
        if !page.is_leaf() {
            let children = (0..page.count()).map(|at| shared_child(&page, at)).collect();
            return Ok(Items::Children(children));
        }
        let rows = (0..page.count()).map(|at| self.row(child.id, &page, at));
        Ok(Items::Rows(rows.collect::<Result<_, _>>()?))
    }

    /// Gives all children pages. Branches among them have two children or more: `settle` leaves one that
    /// has fewer only if there is none beside it, and then it waits.
    fn place(&mut self, slots: Vec<Slot>) -> Vec<Child> {
        let mut children = Vec::with_capacity(slots.len());
        for slot in slots {
            match slot {
                Slot::Kept(child) => children.push(child),
                Slot::Changed(Node { items: Items::Rows(rows), .. }) => {
                    children.extend(self.place_leaves(&rows));
                }
                Slot::Changed(Node { items: Items::Children(below), .. }) => {
                    children.extend(self.place_branches(&below));
                }
                Slot::Changed(Node { items: Items::Only(_), .. }) => {
                    unreachable!("a branch whose only child waits is too small to be placed")
                }
            }
        }
        children
    }

    /// How far a page is filled of which there have to be several.
    fn fill_bytes(&self) -> usize {
        match self.kind {
            Kind::Ascending => self.page_bytes() / 10 * 9,
            Kind::Buckets | Kind::Any => self.page_bytes() / 2,
        }
    }

    fn place_leaves(&mut self, rows: &[Row]) -> Vec<Child> {
        let fill = self.fill_bytes();
        let cuts = cut(rows.iter().map(Row::bytes), self.page_bytes(), fill, 1);
        let mut from = 0;
        let place = |to| {
            let rows = &rows[from..to];
            from = to;
            Child { key: rows[0].key.clone(), id: self.place_leaf(rows) }
        };
        cuts.into_iter().map(place).collect()
    }

    fn place_branches(&mut self, children: &[Child]) -> Vec<Child> {
        let fill = self.fill_bytes();
        // bbolt does not survive taking its only child away from a branch
        let cuts = cut(children.iter().map(Child::bytes), self.page_bytes(), fill, 2);
        let mut from = 0;
        let place = |to| {
            let children = &children[from..to];
            from = to;
            Child { key: children[0].key.clone(), id: self.place_branch(children) }
        };
        cuts.into_iter().map(place).collect()
    }

    fn place_leaf(&mut self, rows: &[Row]) -> u64 {
        self.place_page(LEAF, rows.len(), rows.iter().map(Row::bytes).sum(), |page| {
            rows.iter().for_each(|row| page.row(row.flags, &row.key, &row.value));
        })
    }

    fn place_branch(&mut self, children: &[Child]) -> u64 {
        self.place_page(BRANCH, children.len(), children.iter().map(Child::bytes).sum(), |page| {
            children.iter().for_each(|child| page.child(&child.key, child.id));
        })
    }

    fn place_page(
        &mut self,
        flags: u16,
        count: usize,
        content_bytes: usize,
        fill: impl FnOnce(&mut Builder),
    ) -> u64 {
        let page_bytes = self.page_bytes();
        let length = (HEADER_BYTES + content_bytes).div_ceil(page_bytes);
        let id = self.space.allocate(length as u64, self.version);
        let mut builder = Builder::new(id, flags, count, content_bytes, page_bytes);
        fill(&mut builder);
        let page = Page::made(Bytes::from(builder.finish(page_bytes)));
        self.unwritten.bytes += page.bytes().len();
        self.unwritten.pages.insert(id, page.clone());
        self.tree.store.cache().put_unwritten(id, page);
        id
    }
}

impl Node {
    fn nothing() -> Node {
        Node { items: Items::Rows(Vec::new()), shrunk: false }
    }
}

fn inline(rows: &[Row]) -> Page<Bytes> {
    let bytes = rows.iter().map(Row::bytes).sum();
    let mut builder = Builder::inline(rows.len(), bytes, 0);
    rows.iter().for_each(|row| builder.row(row.flags, &row.key, &row.value));
    Page::made(builder.finish(1).into())
}

/// An empty leaf.
pub(crate) fn empty() -> Page<Bytes> {
    inline(&[])
}

/// Where to cut elements of these sizes into pages: the index after the last of each page. As bbolt does it: as
/// long as the rest does not fit into one page, a page of about `fill` bytes is cut off it. Each gets at least
/// `least` elements.
fn cut(
    sizes: impl ExactSizeIterator<Item = usize> + Clone,
    page_bytes: usize,
    fill: usize,
    least: usize,
) -> Vec<usize> {
    let count = sizes.len();
    let mut rest = HEADER_BYTES + sizes.clone().sum::<usize>();
    if rest <= page_bytes {
        return vec![count];
    }
    let mut cuts = Vec::new();
    let (mut from, mut bytes) = (0, HEADER_BYTES);
    for (at, size) in sizes.enumerate() {
        let enough = at - from >= least && count - at >= least;
        if enough && bytes + size > fill && rest > page_bytes {
            cuts.push(at);
            rest -= bytes - HEADER_BYTES;
            (from, bytes) = (at, HEADER_BYTES);
        }
        bytes += size;
    }
    cuts.push(count);
    cuts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_cut_into_pages() {
        let cut = |sizes: &[usize], least| cut(sizes.iter().copied(), 100, 50, least);
        assert_eq!(cut(&[84], 1), [1]);
        assert_eq!(cut(&[20; 4], 1), [4]);
        assert_eq!(cut(&[20; 5], 1), [1, 5]);
        assert_eq!(cut(&[20; 5], 2), [2, 5]);
        assert_eq!(cut(&[10; 9], 1), [3, 9]);
        assert_eq!(cut(&[10; 13], 1), [3, 6, 13]);
        assert_eq!(cut(&[500, 10, 10, 500], 1), [1, 3, 4]);
        assert_eq!(cut(&[500, 500], 2), [2]);
    }
}
