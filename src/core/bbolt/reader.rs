//! Reads any bbolt file, page by page. Each page is checked when it is read: its number, its kind,
//! the place of every element, the order of the keys and that they lie where the branch above says.
//! Since keys only ascend over a scan, no page is visited twice, so that a file made to mislead costs
//! at most its own size.

use std::borrow::Cow;
use std::io;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;

use engine_bbolt::format::{
    BRANCH, BUCKET_BYTES, DEPTH_MAX, HEADER_BYTES, IS_BUCKET, META_BYTES, Meta, PAGE_SHIFTS, Page,
    PageDamage, u32_at, u64_at,
};

use super::{ReadAt, read_exact};

/// Why a file cannot be read.
#[derive(thiserror::Error, Debug)]
pub enum BboltError {
    #[error("read at byte {at}: {source}")]
    Read {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("not a bbolt file: no valid meta page")]
    NoMeta,
    #[error(
        "file of {bytes} bytes is cut short: its meta page counts {pages} pages of {page_bytes} bytes"
    )]
    CutShort { bytes: u64, pages: u64, page_bytes: u32 },
    #[error("page {page} (at byte {at}) is corrupt: {damage}")]
    Page { page: u64, at: u64, damage: PageDamage },
}

/// An open bbolt file. It must not be written meanwhile.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    meta: Meta,
}

/// A bucket of a [`Reader`].
#[derive(Debug)]
pub struct Bucket<'a, R> {
    reader: &'a Reader<R>,
    root: Root,
    sequence: u64,
}

#[derive(Clone, Debug)]
enum Root {
    Page(u64),
    /// The image of a leaf, and the page that it stands in.
    Inline(Bytes, u64),
}

/// Which keys are wanted.
#[derive(Clone, Copy)]
struct Range<'a> {
    from: Bound<&'a [u8]>,
    to: Bound<&'a [u8]>,
}

/// Takes index, flags, key and value of a leaf's element.
type Visit<'v> = dyn FnMut(usize, u32, &[u8], &[u8]) -> Result<ControlFlow<()>, PageDamage> + 'v;

impl<R: ReadAt> Reader<R> {
    /// Opens a file, from the newer of its two meta pages. A digest behind the last page is ignored.
    ///
    /// # Errors
    /// `NoMeta` for what is not a bbolt file, `CutShort`, `Read`.
    pub fn open(source: R) -> Result<Self, BboltError> {
        let bytes = source.size().map_err(|source| BboltError::Read { at: 0, source })?;
        let first = read_meta(&source, 0)?;
        let second = match first {
            Some(meta) => read_meta(&source, u64::from(meta.page_bytes))?,
            // The first is damaged, and with it the page size: the second stands at that offset.
            None => {
                let mut found = None;
                for shift in PAGE_SHIFTS {
                    let meta = read_meta(&source, 1 << shift)?;
                    found = found.or(meta.filter(|meta| meta.page_bytes == 1 << shift));
                }
                found
            }
        };
        let meta = [first, second]
            .into_iter()
            .flatten()
            .max_by_key(|meta| meta.transaction)
            .ok_or(BboltError::NoMeta)?;
        if meta.pages.checked_mul(u64::from(meta.page_bytes)).is_none_or(|needed| needed > bytes) {
            let Meta { pages, page_bytes, .. } = meta;
            return Err(BboltError::CutShort { bytes, pages, page_bytes });
        }
        Ok(Reader { source, meta })
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u32 {
        self.meta.page_bytes
    }

    /// Pages in use or free: the high-water mark.
    pub fn pages(&self) -> u64 {
        self.meta.pages
    }

    /// The id of the last transaction.
    pub fn transaction(&self) -> u64 {
        self.meta.transaction
    }

    /// The names of all buckets, ascending.
    ///
    /// # Errors
    /// `Page` or `Read`.
    pub fn buckets(&self) -> Result<Vec<Vec<u8>>, BboltError> {
        let mut names = Vec::new();
        let all = Range { from: Bound::Unbounded, to: Bound::Unbounded };
        self.walk_root(all, &mut |name, _, _| names.push(name.to_vec()))?;
        Ok(names)
    }

    /// The bucket of that name.
    ///
    /// # Errors
    /// `Page` or `Read`.
    pub fn bucket(&self, name: &[u8]) -> Result<Option<Bucket<'_, R>>, BboltError> {
        let mut found = None;
        let only = Range { from: Bound::Included(name), to: Bound::Included(name) };
        self.walk_root(only, &mut |_, value, page| {
            let root = match u64_at(value, 0) {
                0 => Root::Inline(Bytes::copy_from_slice(&value[BUCKET_BYTES..]), page),
                page => Root::Page(page),
            };
            found = Some((root, u64_at(value, 8)));
        })?;
        Ok(found.map(|(root, sequence)| Bucket { reader: self, root, sequence }))
    }

    /// Visits name, value and page of the buckets wanted.
    fn walk_root(
        &self,
        range: Range<'_>,
        visit: &mut dyn FnMut(&[u8], &[u8], u64),
    ) -> Result<(), BboltError> {
        let root = self.meta.root;
        let mut visit = |index, flags, name: &[u8], value: &[u8]| {
            if flags & IS_BUCKET == 0 || value.len() < BUCKET_BYTES {
                return Err(PageDamage::NotABucket { index });
            }
            visit(name, value, root);
            Ok(ControlFlow::Continue(()))
        };
        self.walk(root, None, range, (&[], None), 0, &mut visit).map(|_| ())
    }

    fn error(&self, page: u64, damage: PageDamage) -> BboltError {
        let at = page.saturating_mul(u64::from(self.meta.page_bytes));
        BboltError::Page { page, at, damage }
    }

    /// Visits the elements wanted under `page`, whose keys are `bounds.0` or above and below
    /// `bounds.1`. An inline page comes along as `inline`.
    fn walk(
        &self,
        page: u64,
        inline: Option<&[u8]>,
        range: Range<'_>,
        bounds: (&[u8], Option<&[u8]>),
        depth: usize,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, BboltError> {
        if depth > DEPTH_MAX {
            return Err(self.error(page, PageDamage::Depth));
        }
        let bytes = match inline {
            Some(bytes) => Cow::Borrowed(bytes),
            None => Cow::Owned(self.read_page(page)?),
        };
        let content = Page::check(bytes)
            .and_then(|content| content.check_place(bounds, depth == 0).map(|()| content))
            .map_err(|damage| self.error(page, damage))?;
        if inline.is_some() && !content.is_leaf() {
            return Err(self.error(page, PageDamage::Flags { found: BRANCH }));
        }
        for index in 0..content.count() {
            let key = content.key(index);
            if is_above(key, range.to) {
                return Ok(ControlFlow::Break(()));
            }
            let flow = if content.is_leaf() {
                if is_below(key, range.from) {
                    continue;
                }
                visit(index, content.flags(index), key, content.value(index))
                    .map_err(|damage| self.error(page, damage))?
            } else {
                let next = (index + 1 < content.count()).then(|| content.key(index + 1));
                // All keys of the child are below the next branch key.
                if let (Some(next), Bound::Included(from) | Bound::Excluded(from)) =
                    (next, range.from)
                    && next <= from
                {
                    continue;
                }
                let bounds = (key, next.or(bounds.1));
                self.walk(content.child(index), None, range, bounds, depth + 1, visit)?
            };
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The bytes of a page with those it goes on over; number and length have been checked.
    fn read_page(&self, page: u64) -> Result<Vec<u8>, BboltError> {
        let Meta { pages, page_bytes, .. } = self.meta;
        if page < 2 || page >= pages {
            return Err(self.error(page, PageDamage::OutOfRange { pages }));
        }
        let at = page * u64::from(page_bytes);
        let read = |bytes: &mut [u8], at| {
            read_exact(&self.source, bytes, at).map_err(|source| BboltError::Read { at, source })
        };
        let mut bytes = vec![0; page_bytes as usize];
        read(&mut bytes, at)?;
        let found = u64_at(&bytes, 0);
        if found != page {
            return Err(self.error(page, PageDamage::Id { found }));
        }
        let overflow = u32_at(&bytes, 12);
        if overflow > 0 {
            if u64::from(overflow) >= pages - page {
                return Err(self.error(page, PageDamage::Overflow { overflow }));
            }
            let first = bytes.len();
            bytes.resize(first * (1 + overflow as usize), 0);
            read(&mut bytes[first..], at + first as u64)?;
        }
        Ok(bytes)
    }
}

impl<R: ReadAt> Bucket<'_, R> {
    /// The bucket's sequence number; etcd does not use it.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// `Page` or `Read`.
    pub fn get(&self, key: &[u8]) -> Result<Option<Bytes>, BboltError> {
        let mut found = None;
        self.scan(Bound::Included(key), Bound::Included(key), &mut |_, value| {
            found = Some(Bytes::copy_from_slice(value));
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// Calls `visit` with every key in the bounds in ascending order and its value, until it breaks.
    ///
    /// # Errors
    /// `Page` or `Read`; what was visited before is sound.
    pub fn scan(
        &self,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>,
    ) -> Result<(), BboltError> {
        let mut visit = |index, flags, key: &[u8], value: &[u8]| {
            if flags & IS_BUCKET != 0 {
                return Err(PageDamage::Nested { index });
            }
            Ok(visit(key, value))
        };
        let (page, inline) = match &self.root {
            Root::Page(page) => (*page, None),
            Root::Inline(bytes, page) => (*page, Some(&bytes[..])),
        };
        let range = Range { from, to };
        self.reader.walk(page, inline, range, (&[], None), 0, &mut visit).map(|_| ())
    }
}

fn is_below(key: &[u8], from: Bound<&[u8]>) -> bool {
    match from {
        Bound::Included(from) => key < from,
        Bound::Excluded(from) => key <= from,
        Bound::Unbounded => false,
    }
}

fn is_above(key: &[u8], to: Bound<&[u8]>) -> bool {
    match to {
        Bound::Included(to) => key > to,
        Bound::Excluded(to) => key >= to,
        Bound::Unbounded => false,
    }
}

/// The meta in the page at byte `at`, if there is a valid one.
fn read_meta(source: &impl ReadAt, at: u64) -> Result<Option<Meta>, BboltError> {
    let mut bytes = [0; HEADER_BYTES + META_BYTES];
    let read = source.read_at(&mut bytes, at).map_err(|source| BboltError::Read { at, source })?;
    Ok(if read < bytes.len() { None } else { Meta::decode(&bytes) })
}
