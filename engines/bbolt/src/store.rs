//! One bbolt file: its pages, its versions, and the one committer that adds to them.
//!
//! A commit makes new pages in memory and a new version of the trees. A durable one writes all pages made
//! since the last durable one, syncs, writes the meta page that the last one did not write, and syncs again.
//! So whatever a power loss leaves of these writes, one meta page is whole, and the pages that it leads to
//! are as they were synced:
//!
//! > no page that the last durable version reaches is written over before the next one is durable.
//!
//! The transaction id in the file counts durable commits only, so that two in a row never share a meta page.
//! Pages of buffered commits may be written before their time, to give memory back: the durable version does
//! not reach them.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{BufMut, Bytes};
use engine_api::{Batch, Durability, EngineError, Op, Table};
use parking_lot::Mutex;

use crate::cache::Cache;
use crate::check;
use crate::disk::Disk;
use crate::format::{
    BUCKET_BYTES, Builder, FREELIST, HEADER_BYTES, IS_BUCKET, KEY_BYTES_MAX, LEAF, META_BYTES,
    Meta, NO_FREELIST, PAGE_BYTES, PAGE_SHIFTS, Page, PageDamage, VALUE_BYTES_MAX, decode_freelist,
    encode_freelist, freelist_pages, put_header, u32_at, u64_at,
};
use crate::space::{FreedTwice, Space};
use crate::tree::{Change, Editor, Kind, Root, Tree, Unwritten, empty};

/// Page sizes beyond those of any operating system are not written: an element's number in its page
/// has 16 bits.
const PAGE_BYTES_MAX: u32 = 64 << 10;

/// Up to this length a file doubles when it grows, then it grows by as much.
const GROW_BYTES: u64 = 16 << 20;

/// How a file is used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) cache_bytes: usize,
    pub(crate) sync_freelist: bool,
}

/// What all versions of a file share.
#[derive(Debug)]
pub(crate) struct Store {
    disk: Box<dyn Disk>,
    path: PathBuf,
    page_bytes: usize,
    cache: Cache,
    /// How many snapshots there are of each version.
    pins: Mutex<BTreeMap<u64, usize>>,
    size: AtomicU64,
    size_in_use: AtomicU64,
}

/// A bucket of one version.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    pub(crate) root: Root,
    pub(crate) sequence: u64,
}

/// A version of the file.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    pub(crate) number: u64,
    /// The bucket tree.
    pub(crate) root: u64,
    pub(crate) sequence: u64,
    pub(crate) pages: u64,
    pub(crate) buckets: [Option<Bucket>; Table::ALL.len()],
}

/// A version whose pages stay while this lives.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) store: Arc<Store>,
    pub(crate) version: Version,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let mut pins = self.store.pins.lock();
        if let Some(count) = pins.get_mut(&self.version.number) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.version.number);
            }
        }
    }
}

impl Store {
    fn new(disk: Box<dyn Disk>, path: &Path, page_bytes: usize, cache_bytes: usize) -> Self {
        Store {
            disk,
            path: path.to_path_buf(),
            page_bytes,
            cache: Cache::new(cache_bytes),
            pins: Mutex::default(),
            size: AtomicU64::new(0),
            size_in_use: AtomicU64::new(0),
        }
    }

    pub(crate) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Bytes of all pages that the file has had, free or not.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Bytes of the pages that the newest version reaches.
    pub(crate) fn size_in_use(&self) -> u64 {
        self.size_in_use.load(Ordering::Acquire)
    }

    pub(crate) fn damaged(&self, page: u64, damage: PageDamage) -> EngineError {
        let at = format!("{}, page {page}", self.path.display());
        EngineError::Corrupt { at, what: damage.to_string() }
    }

    fn corrupt(&self, what: impl fmt::Display) -> EngineError {
        EngineError::Corrupt { at: self.path.display().to_string(), what: what.to_string() }
    }

    fn io(&self, doing: &str, source: io::Error) -> EngineError {
        EngineError::Io { what: format!("{doing} {}", self.path.display()), source }
    }

    fn freed_twice(&self, FreedTwice(page): FreedTwice) -> EngineError {
        self.damaged(page, PageDamage::Shared)
    }

    /// A branch or leaf of a file of `pages` pages; of its content only the place is still to be checked.
    pub(crate) fn page(&self, id: u64, pages: u64) -> Result<Page<Bytes>, EngineError> {
        if let Some(page) = self.cache.get(id) {
            return Ok(page);
        }
        let bytes = Bytes::from(self.read_page(id, pages)?);
        let page = Page::check(bytes).map_err(|damage| self.damaged(id, damage))?;
        self.cache.put_read(id, page.clone());
        Ok(page)
    }

    /// The bytes of a page with those it goes on over; its number and length are as they should be.
    fn read_page(&self, id: u64, pages: u64) -> Result<Vec<u8>, EngineError> {
        if id < 2 || id >= pages {
            return Err(self.damaged(id, PageDamage::OutOfRange { pages }));
        }
        let at = id * self.page_bytes as u64;
        let mut bytes = vec![0; self.page_bytes];
        self.read(&mut bytes, at)?;
        let overflow = self.check_header(id, &bytes, pages)?;
        if overflow > 0 {
            bytes.resize(self.page_bytes * (1 + overflow as usize), 0);
            self.read(&mut bytes[self.page_bytes..], at + self.page_bytes as u64)?;
        }
        Ok(bytes)
    }

    /// Checks a page's number and length, and answers how many pages more it goes on over.
    pub(crate) fn check_header(
        &self,
        id: u64,
        page: &[u8],
        pages: u64,
    ) -> Result<u32, EngineError> {
        let found = u64_at(page, 0);
        if found != id {
            return Err(self.damaged(id, PageDamage::Id { found }));
        }
        let overflow = u32_at(page, 12);
        if u64::from(overflow) >= pages - id {
            return Err(self.damaged(id, PageDamage::Overflow { overflow }));
        }
        Ok(overflow)
    }

    /// Fills `bytes` from `at` on.
    pub(crate) fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), EngineError> {
        let read = self.disk.read_at(bytes, at).map_err(|error| self.io("read", error))?;
        if read < bytes.len() {
            return Err(self.corrupt(format_args!("the file ends at byte {}", at + read as u64)));
        }
        Ok(())
    }

    /// Makes a meta page that was read durable. Whoever wrote it may have died before its sync: then it is only in the
    /// system's cache, and the disk may still lead to the version before, whose pages are free by what was read. It is
    /// written again because a page that the system once failed to write counts as clean; what it leads to was synced
    /// before it was written.
    fn settle_meta(&self, meta_page: u64) -> Result<(), EngineError> {
        let at = meta_page * self.page_bytes as u64;
        let mut page = vec![0; self.page_bytes];
        self.read(&mut page, at)?;
        self.disk.write_at(&[&page], at).map_err(|error| self.io("write", error))?;
        self.disk.sync().map_err(|error| self.io("sync", error))
    }

    /// The versions that somebody sees, ascending.
    fn pinned(&self) -> Vec<u64> {
        self.pins.lock().keys().copied().collect()
    }

    /// The newer of the two metas, and which page it is in.
    fn read_meta(&self) -> Result<Option<(Meta, u64)>, EngineError> {
        let at = |at| -> Result<Option<Meta>, EngineError> {
            let mut page = [0; HEADER_BYTES + META_BYTES];
            let read = self.disk.read_at(&mut page, at).map_err(|error| self.io("read", error))?;
            Ok(if read < page.len() { None } else { Meta::decode(&page) })
        };
        let first = at(0)?;
        let second = match first {
            Some(meta) => at(u64::from(meta.page_bytes))?
                .filter(|second| second.page_bytes == meta.page_bytes),
            // The first is damaged, and with it the page size: the second stands at that offset.
            None => {
                let mut found = None;
                for shift in PAGE_SHIFTS {
                    found = found.or(at(1 << shift)?.filter(|meta| meta.page_bytes == 1 << shift));
                }
                found
            }
        };
        Ok([(first, 0), (second, 1)]
            .into_iter()
            .filter_map(|(meta, page)| Some((meta?, page)))
            .max_by_key(|(meta, page)| (meta.transaction, meta.transaction % 2 == *page)))
    }
}

/// The one who changes a file.
pub(crate) struct Committer {
    store: Arc<Store>,
    settings: Settings,
    version: Version,
    space: Space,
    unwritten: Unwritten,
    /// The version that the newer meta page leads to.
    durable: u64,
    /// The page and transaction of that meta.
    meta_page: u64,
    transaction: u64,
    /// First page and length of the list of free pages in the file.
    freelist: Option<(u64, u64)>,
    file_bytes: u64,
}

impl Committer {
    /// Fills an empty file with empty buckets; it is durable, its name not yet.
    pub(crate) fn create(
        disk: Box<dyn Disk>,
        path: &Path,
        settings: Settings,
    ) -> Result<Committer, EngineError> {
        let failed =
            |error| EngineError::Io { what: format!("create {}", path.display()), source: error };
        let (freelist, root, pages) = (2, 3, 4);
        let mut names: Vec<&[u8]> =
            Table::ALL.iter().map(|table| table.name().as_bytes()).collect();
        names.sort_unstable();
        let value = bucket_value(&Bucket { root: Root::Inline(empty(), root), sequence: 0 });
        let content = names.iter().map(|name| 16 + name.len() + value.len()).sum();
        let mut leaf = Builder::new(root, LEAF, names.len(), content, PAGE_BYTES);
        names.iter().for_each(|name| leaf.row(IS_BUCKET, name, &value));
        let leaf = leaf.finish(PAGE_BYTES);
        let mut list = vec![0; PAGE_BYTES];
        put_header(&mut list, freelist, FREELIST, 0, 0);
        let [first, second] = [0, 1].map(|transaction| {
            let page_bytes = PAGE_BYTES as u32;
            let meta = Meta { page_bytes, root, sequence: 0, freelist, pages, transaction };
            meta.encode(transaction)
        });
        disk.write_at(&[&first, &second, &list, &leaf], 0).map_err(failed)?;
        disk.sync().map_err(failed)?;
        Committer::open(disk, path, settings)
    }

    /// Opens a file; errors call it `path`.
    ///
    /// # Errors
    /// `Unusable` if it is not a bbolt file, `Corrupt` if it is a damaged one, `Io`.
    pub(crate) fn open(
        disk: Box<dyn Disk>,
        path: &Path,
        settings: Settings,
    ) -> Result<Committer, EngineError> {
        let mut store = Store::new(disk, path, PAGE_BYTES, settings.cache_bytes);
        let file_bytes = store.disk.len().map_err(|error| store.io("examine", error))?;
        if file_bytes == 0 {
            return Err(store.corrupt("the file is empty"));
        }
        let Some((meta, meta_page)) = store.read_meta()? else {
            let what = format!("{} is not a bbolt file: it has no valid meta page", path.display());
            return Err(EngineError::Unusable(what));
        };
        let Meta { page_bytes, root, sequence, freelist, pages, transaction } = meta;
        if page_bytes > PAGE_BYTES_MAX {
            return Err(EngineError::Unusable(format!(
                "{} has pages of {page_bytes} bytes; at most {PAGE_BYTES_MAX} can be written",
                path.display()
            )));
        }
        store.page_bytes = page_bytes as usize;
        if pages.checked_mul(page_bytes.into()).is_none_or(|needed| needed > file_bytes) {
            return Err(store.corrupt(format_args!(
                "the file has {file_bytes} bytes, but its meta page counts {pages} pages of \
                 {page_bytes} bytes"
            )));
        }
        store.settle_meta(meta_page)?;
        let store = Arc::new(store);
        let mut version = Version { number: 0, root, sequence, pages, buckets: Default::default() };
        read_buckets(&store, &mut version)?;
        let (free, freelist) = if freelist == NO_FREELIST {
            (check::unreached(&store, &version)?, None)
        } else {
            let page = store.read_page(freelist, pages)?;
            let ids =
                decode_freelist(&page, pages).map_err(|damage| store.damaged(freelist, damage))?;
            let length = (page.len() / store.page_bytes) as u64;
            (ids.into_iter().map(|id| (id, 1)).collect(), Some((freelist, length)))
        };
        let space = Space::new(pages, free).map_err(|error| store.freed_twice(error))?;
        let committer = Committer {
            store,
            settings,
            version,
            space,
            unwritten: Unwritten::default(),
            durable: 0,
            meta_page,
            transaction,
            freelist,
            file_bytes,
        };
        committer.publish_sizes();
        Ok(committer)
    }

    /// Errors call the file `path` from now on. Nobody has a snapshot of it yet.
    pub(crate) fn rename(&mut self, path: &Path) {
        let store = Arc::get_mut(&mut self.store).expect("no snapshots of a file in the making");
        store.path = path.to_path_buf();
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    pub(crate) fn version(&self) -> &Version {
        &self.version
    }

    pub(crate) fn space(&self) -> &Space {
        &self.space
    }

    /// The list of free pages in the file.
    pub(crate) fn freelist(&self) -> Option<(u64, u64)> {
        self.freelist
    }

    /// The newest version. The next commit must wait for this to be what views are taken of.
    pub(crate) fn snapshot(&self) -> Snapshot {
        *self.store.pins.lock().entry(self.version.number).or_default() += 1;
        Snapshot { store: Arc::clone(&self.store), version: self.version.clone() }
    }

    fn publish_sizes(&self) {
        let page_bytes = self.store.page_bytes as u64;
        self.store.size.store(self.space.pages() * page_bytes, Ordering::Release);
        self.store.size_in_use.store(self.space.pages_in_use() * page_bytes, Ordering::Release);
    }

    /// Applies `batch`; answers whether there is a new version.
    ///
    /// # Errors
    /// `Unusable` before anything has changed. After others the committer must not be used any more.
    pub(crate) fn commit(
        &mut self,
        batch: &Batch,
        durability: Durability,
    ) -> Result<bool, EngineError> {
        refuse_long(batch)?;
        self.release()?;
        let changed = self.apply(batch)?;
        match durability {
            Durability::Durable => self.flush()?,
            Durability::Buffered if self.unwritten.bytes > self.settings.cache_bytes / 2 => {
                self.write_pages()?;
            }
            Durability::Buffered => {}
        }
        self.publish_sizes();
        Ok(changed)
    }

    /// Makes what nobody sees any more free.
    fn release(&mut self) -> Result<(), EngineError> {
        let mut pinned = self.store.pinned();
        if let Err(place) = pinned.binary_search(&self.durable) {
            pinned.insert(place, self.durable);
        }
        let released =
            self.space.release(&pinned).map_err(|error| self.store.freed_twice(error))?;
        for id in released {
            if self.unwritten.remove(id) {
                self.store.cache.written(id);
            }
        }
        Ok(())
    }

    fn apply(&mut self, batch: &Batch) -> Result<bool, EngineError> {
        let number = self.version.number + 1;
        let mut next = self.version.clone();
        let mut values = Vec::new();
        for (table, changes) in changes_of(batch) {
            let kind = if table == Table::Key { Kind::Ascending } else { Kind::Any };
            let slot = &mut next.buckets[table as usize];
            let old = slot
                .clone()
                .unwrap_or_else(|| Bucket { root: Root::Inline(empty(), next.root), sequence: 0 });
            if let Some(root) = self.editor(number, kind).apply(&old.root, &changes)? {
                let bucket = Bucket { root, sequence: old.sequence };
                values.push((
                    Bytes::from_static(table.name().as_bytes()),
                    Bytes::from(bucket_value(&bucket)),
                ));
                *slot = Some(bucket);
            }
        }
        if values.is_empty() {
            return Ok(false);
        }
        values.sort_unstable();
        let changes: Vec<Change<'_>> =
            values.iter().map(|(key, value)| Change { key, value: Some(value) }).collect();
        let root = self.editor(number, Kind::Buckets).apply(&Root::Page(next.root), &changes)?;
        match root {
            Some(Root::Page(root)) => next.root = root,
            _ => unreachable!("a bucket tree that was changed, whose root is never inline"),
        }
        next.number = number;
        next.pages = self.space.pages();
        self.version = next;
        Ok(true)
    }

    fn editor(&mut self, version: u64, kind: Kind) -> Editor<'_> {
        Editor {
            tree: Tree { store: &self.store, pages: self.version.pages },
            space: &mut self.space,
            unwritten: &mut self.unwritten,
            version,
            kind,
        }
    }

    /// Makes the newest version durable.
    pub(crate) fn flush(&mut self) -> Result<(), EngineError> {
        if self.version.number == self.durable {
            return Ok(());
        }
        let list = self.place_freelist();
        self.write_pages()?;
        if let Some((id, page)) = &list {
            self.write(&[page], *id)?;
        }
        self.sync()?;
        // what the meta page leads to is on the disk: now it may
        let page_bytes = self.store.page_bytes as u32;
        let mut transaction = self.transaction + 1;
        if transaction % 2 == self.meta_page {
            // somebody has put the newer meta page in the other one's place, which must stay whole
            transaction += 1;
        }
        let meta = Meta {
            page_bytes,
            root: self.version.root,
            sequence: self.version.sequence,
            freelist: self.freelist.map_or(NO_FREELIST, |(id, _)| id),
            pages: self.space.pages(),
            transaction,
        };
        self.write(&[&meta.encode(transaction % 2)], transaction % 2)?;
        self.sync()?;
        self.meta_page = transaction % 2;
        self.transaction = transaction;
        self.durable = self.version.number;
        let oldest = self.store.pinned().first().map_or(self.durable, |first| *first);
        self.space.forget_births(oldest.min(self.durable));
        self.publish_sizes();
        Ok(())
    }

    /// Makes the list of free pages, if there is to be one, in place of the old one.
    fn place_freelist(&mut self) -> Option<(u64, Vec<u8>)> {
        let version = self.version.number;
        if let Some((id, length)) = self.freelist.take() {
            self.space.replace(id, length, version);
        }
        if !self.settings.sync_freelist {
            return None;
        }
        // whoever opens the file has no views: what waits for one is free as well
        let page_bytes = self.store.page_bytes;
        let length = freelist_pages(self.space.pages_unused() as usize, page_bytes);
        let id = self.space.allocate(length as u64, version);
        let mut ids: Vec<u64> =
            self.space.unused().flat_map(|(id, length)| id..id + length).collect();
        ids.sort_unstable();
        self.freelist = Some((id, length as u64));
        Some((id, encode_freelist(id, &ids, length, page_bytes)))
    }

    /// Writes all pages that are only in memory; they are not synced.
    fn write_pages(&mut self) -> Result<(), EngineError> {
        let pages = std::mem::take(&mut self.unwritten.pages);
        self.unwritten.bytes = 0;
        let page_bytes = self.store.page_bytes;
        let mut run: Vec<&[u8]> = Vec::new();
        let (mut start, mut end) = (0, 0);
        for (id, page) in &pages {
            if *id != end && !run.is_empty() {
                self.write(&run, start)?;
                run.clear();
            }
            if run.is_empty() {
                start = *id;
            }
            run.push(page.bytes());
            end = id + (page.bytes().len() / page_bytes) as u64;
        }
        if !run.is_empty() {
            self.write(&run, start)?;
        }
        pages.keys().for_each(|id| self.store.cache.written(*id));
        Ok(())
    }

    /// Writes `parts` from page `id` on; the file grows in steps, so that not each write changes its length.
    fn write(&mut self, parts: &[&[u8]], id: u64) -> Result<(), EngineError> {
        let needed = self.space.pages() * self.store.page_bytes as u64;
        if needed > self.file_bytes {
            let grown = if needed < GROW_BYTES {
                needed.next_power_of_two()
            } else {
                needed.next_multiple_of(GROW_BYTES)
            };
            self.store.disk.set_len(grown).map_err(|error| self.store.io("grow", error))?;
            self.file_bytes = grown;
        }
        let at = id * self.store.page_bytes as u64;
        self.store.disk.write_at(parts, at).map_err(|error| self.store.io("write", error))
    }

    fn sync(&self) -> Result<(), EngineError> {
        self.store.disk.sync().map_err(|error| self.store.io("sync", error))
    }
}

/// Refuses what the format cannot hold.
fn refuse_long(batch: &Batch) -> Result<(), EngineError> {
    for op in &batch.ops {
        match op {
            Op::Put { table, key, .. } if key.len() > KEY_BYTES_MAX => {
                return Err(EngineError::Unusable(format!(
                    "a key of {} bytes for table {table}: at most {KEY_BYTES_MAX} are possible",
                    key.len()
                )));
            }
            Op::Put { table, value, .. } if value.len() > VALUE_BYTES_MAX => {
                return Err(EngineError::Unusable(format!(
                    "a value of {} bytes for table {table}: at most {VALUE_BYTES_MAX} are possible",
                    value.len()
                )));
            }
            Op::Put { .. } | Op::Delete { .. } => {}
        }
    }
    Ok(())
}

/// The changes of each table that `batch` touches, ascending by key, the last one for a key.
fn changes_of(batch: &Batch) -> Vec<(Table, Vec<Change<'_>>)> {
    let mut tables: [Vec<Change<'_>>; Table::ALL.len()] = Default::default();
    for op in &batch.ops {
        let (table, change) = match op {
            Op::Put { table, key, value } => (table, Change { key, value: Some(value) }),
            Op::Delete { table, key } => (table, Change { key, value: None }),
        };
        tables[*table as usize].push(change);
    }
    let mut touched = Vec::new();
    for table in Table::ALL {
        let mut changes = std::mem::take(&mut tables[table as usize]);
        if changes.is_empty() {
            continue;
        }
        if !changes.is_sorted_by(|a, b| a.key < b.key) {
            // stable: the operations on a key stay in their order
            changes.sort_by(|a, b| a.key.cmp(b.key));
            changes.dedup_by(|later, earlier| {
                let same = later.key == earlier.key;
                if same {
                    *earlier = *later;
                }
                same
            });
        }
        touched.push((table, changes));
    }
    touched
}

/// A bucket as the bucket tree has it.
fn bucket_value(bucket: &Bucket) -> Vec<u8> {
    let (root, inline) = match &bucket.root {
        Root::Page(id) => (*id, None),
        Root::Inline(page, _) => (0, Some(page.bytes())),
    };
    let mut value = Vec::with_capacity(BUCKET_BYTES + inline.map_or(0, Bytes::len));
    value.put_u64_le(root);
    value.put_u64_le(bucket.sequence);
    if let Some(inline) = inline {
        value.extend_from_slice(inline);
    }
    value
}

/// Reads a bucket out of element `index` of a leaf of the bucket tree, which is page `id`.
pub(crate) fn decode_bucket(
    id: u64,
    page: &Page<Bytes>,
    index: usize,
) -> Result<Bucket, PageDamage> {
    let value = page.bytes().slice(page.value_range(index));
    if page.flags(index) & IS_BUCKET == 0 || value.len() < BUCKET_BYTES {
        return Err(PageDamage::NotABucket { index });
    }
    let sequence = u64_at(&value, 8);
    let root = match u64_at(&value, 0) {
        0 => {
            let page = Page::check(value.slice(BUCKET_BYTES..))?;
            if !page.is_leaf() {
                return Err(PageDamage::Flags { found: crate::format::BRANCH });
            }
            Root::Inline(page, id)
        }
        page => Root::Page(page),
    };
    Ok(Bucket { root, sequence })
}

fn read_buckets(store: &Store, version: &mut Version) -> Result<(), EngineError> {
    let tree = Tree { store, pages: version.pages };
    for table in Table::ALL {
        let found = tree.find(&Root::Page(version.root), table.name().as_bytes())?;
        if let Some((page, index)) = found {
            let bucket = decode_bucket(page.id(), &page, index)
                .map_err(|damage| store.damaged(page.id(), damage))?;
            version.buckets[table as usize] = Some(bucket);
        }
    }
    Ok(())
}
