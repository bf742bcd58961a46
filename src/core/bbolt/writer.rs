//! Writes a bbolt file from front to back, without gaps or free pages.
//!
//! The meta pages come first and hold the root's number and the page count, so the content is gone
//! through twice: once to count, once to write. Between the two only these numbers are kept; during
//! each, one leaf and one branch a level.

use std::io::{self, Write};

use engine_bbolt::format::{
    BRANCH, BUCKET_BYTES, ELEMENT_BYTES, FREELIST, HEADER_BYTES, IS_BUCKET, KEY_BYTES_MAX, LEAF,
    Meta, VALUE_BYTES_MAX, put_header,
};

/// The first pages: two metas and an empty list of free pages.
const FIXED_PAGES: u64 = 3;

/// Why a file cannot be written.
#[derive(thiserror::Error, Debug)]
pub enum WriteError {
    #[error("write database: {0}")]
    Io(#[from] io::Error),
    /// The provider of a bucket's content failed.
    #[error("read bucket {}: {source}", bucket.escape_ascii())]
    Source {
        bucket: Vec<u8>,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{what} {} does not follow {}", key.escape_ascii(), last.escape_ascii())]
    Order { what: &'static str, key: Vec<u8>, last: Vec<u8> },
    #[error("key of {bytes} bytes: 1 to {KEY_BYTES_MAX} are possible")]
    KeyLength { bytes: usize },
    #[error("value of {bytes} bytes: at most {VALUE_BYTES_MAX} are possible")]
    ValueLength { bytes: usize },
    #[error("page size {bytes} is not a power of two from 1024 to 65536")]
    PageSize { bytes: usize },
    #[error("the content changed while it was written")]
    Changed,
}

/// One bucket to be written.
pub trait BucketSource {
    /// The name, which is not empty.
    fn name(&self) -> &[u8];

    /// Calls `visit` with every key in ascending order and its value. Called twice, and must answer
    /// the same both times. An error of `visit` must be handed on at once.
    ///
    /// # Errors
    /// Those of `visit`; `Source` for its own.
    fn pairs(&self, visit: &mut PairVisitor<'_>) -> Result<(), WriteError>;
}

/// What [`BucketSource::pairs`] hands keys and values to.
pub type PairVisitor<'v> = dyn FnMut(&[u8], &[u8]) -> Result<(), WriteError> + 'v;

/// A bucket whose content is in memory.
#[derive(Clone, Debug)]
pub struct Pairs<'a, K, V> {
    pub name: &'a [u8],
    pub pairs: &'a [(K, V)],
}

impl<K: AsRef<[u8]>, V: AsRef<[u8]>> BucketSource for Pairs<'_, K, V> {
    fn name(&self) -> &[u8] {
        self.name
    }

    fn pairs(&self, visit: &mut PairVisitor<'_>) -> Result<(), WriteError> {
        self.pairs.iter().try_for_each(|(key, value)| visit(key.as_ref(), value.as_ref()))
    }
}

/// Writes a file with `buckets`, ascending by name, to `out`; answers its length in bytes, a multiple
/// of `page_bytes`.
///
/// # Errors
/// `Io` from `out`; whatever the buckets answer; `Order`, `KeyLength`, `ValueLength` for content that
/// bbolt cannot hold; `PageSize`.
pub fn write_compact(
    out: &mut dyn Write,
    buckets: &[&dyn BucketSource],
    page_bytes: usize,
) -> Result<u64, WriteError> {
    let layout = Layout::plan(buckets, page_bytes)?;
    layout.write(out, buckets)?;
    Ok(layout.bytes())
}

/// How large a file will be, known before its first byte is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    page_bytes: usize,
    root: u64,
    pages: u64,
}

impl Layout {
    /// Goes through `buckets` once and counts pages.
    ///
    /// # Errors
    /// As [`write_compact`].
    pub fn plan(buckets: &[&dyn BucketSource], page_bytes: usize) -> Result<Self, WriteError> {
        if !page_bytes.is_power_of_two() || !(1024..=65536).contains(&page_bytes) {
            return Err(WriteError::PageSize { bytes: page_bytes });
        }
        let mut pages = Pages { page_bytes, next: FIXED_PAGES, out: None };
        let root = write_buckets(&mut pages, buckets)?;
        Ok(Layout { page_bytes, root, pages: pages.next })
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * self.page_bytes as u64
    }

    /// Writes the file that was planned.
    ///
    /// # Errors
    /// As [`write_compact`]; `Changed` if `buckets` are not what they were, after all or a part has
    /// been written.
    pub fn write(
        &self,
        out: &mut dyn Write,
        buckets: &[&dyn BucketSource],
    ) -> Result<(), WriteError> {
        for id in 0..2 {
            out.write_all(&self.meta_page(id))?;
        }
        let mut freelist = vec![0; self.page_bytes];
        put_header(&mut freelist, 2, FREELIST, 0, 0);
        out.write_all(&freelist)?;
        let mut pages =
            Pages { page_bytes: self.page_bytes, next: FIXED_PAGES, out: Some(&mut *out) };
        let root = write_buckets(&mut pages, buckets)?;
        if (root, pages.next) != (self.root, self.pages) {
            return Err(WriteError::Changed);
        }
        out.flush()?;
        Ok(())
    }

    /// The transaction is the page's own number, as in a file that bbolt has just made.
    fn meta_page(&self, id: u64) -> Vec<u8> {
        let Layout { root, pages, .. } = *self;
        let page_bytes = self.page_bytes as u32;
        Meta { page_bytes, root, sequence: 0, freelist: 2, pages, transaction: id }.encode(id)
    }
}

/// Writes all pages but the fixed ones; answers the root's number.
fn write_buckets(pages: &mut Pages<'_>, buckets: &[&dyn BucketSource]) -> Result<u64, WriteError> {
    let mut root = Tree::new("bucket");
    for bucket in buckets {
        let mut tree = Tree::new("key");
        bucket.pairs(&mut |key, value| tree.add(pages, 0, key, value))?;
        let value = tree.finish(pages)?;
        root.add(pages, IS_BUCKET, bucket.name(), &value)?;
    }
    root.finish_root(pages)
}

/// Numbers pages in the order in which they are finished, and writes them if there is somewhere to.
struct Pages<'a> {
    page_bytes: usize,
    next: u64,
    out: Option<&'a mut dyn Write>,
}

impl Pages<'_> {
    fn add(&mut self, kind: u16, content: &[u8], count: usize) -> Result<u64, WriteError> {
        self.add_sized(kind, Some(content), content.len(), count)
    }

    /// `content` is what follows the header; `None` when only counting.
    fn add_sized(
        &mut self,
        kind: u16,
        content: Option<&[u8]>,
        content_bytes: usize,
        count: usize,
    ) -> Result<u64, WriteError> {
        let id = self.next;
        let bytes = HEADER_BYTES + content_bytes;
        let pages = bytes.div_ceil(self.page_bytes);
        self.next += pages as u64;
        if let (Some(out), Some(content)) = (&mut self.out, content) {
            let count = u16::try_from(count).expect("elements of 16 bytes in at most 64 KiB");
            let overflow = u32::try_from(pages - 1).expect("a value of 2^31 bytes in 1 KiB pages");
            let mut header = [0; HEADER_BYTES];
            put_header(&mut header, id, kind, count, overflow);
            out.write_all(&header)?;
            out.write_all(content)?;
            let mut padding = pages * self.page_bytes - bytes;
            while padding > 0 {
                let piece = padding.min(ZEROS.len());
                out.write_all(&ZEROS[..piece])?;
                padding -= piece;
            }
        }
        Ok(id)
    }
}

static ZEROS: [u8; 4096] = [0; 4096];

/// A tree under construction, from the left.
struct Tree {
    /// What its keys are called in an error.
    what: &'static str,
    leaf: Leaf,
    /// Children that no branch page holds yet, the lowest level first.
    levels: Vec<Level>,
    last_key: Vec<u8>,
}

#[derive(Default)]
struct Leaf {
    /// Flags and lengths of key and value.
    elements: Vec<(u32, u32, u32)>,
    first_key: Vec<u8>,
    /// Keys and values; empty when only counting.
    data: Vec<u8>,
    /// Length of elements and data, whether the data is kept or not.
    bytes: usize,
}

#[derive(Default)]
struct Level {
    /// First key and page of each child.
    children: Vec<(Vec<u8>, u64)>,
    /// Length of elements and keys.
    bytes: usize,
}

impl Tree {
    fn new(what: &'static str) -> Self {
        Tree { what, leaf: Leaf::default(), levels: Vec::new(), last_key: Vec::new() }
    }

    fn add(
        &mut self,
        pages: &mut Pages<'_>,
        flags: u32,
        key: &[u8],
        value: &[u8],
    ) -> Result<(), WriteError> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(WriteError::KeyLength { bytes: key.len() });
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(WriteError::ValueLength { bytes: value.len() });
        }
        // No key is empty, so that an empty one means that there is none before.
        if key <= &self.last_key[..] {
            return Err(WriteError::Order {
                what: self.what,
                key: key.to_vec(),
                last: self.last_key.clone(),
            });
        }
        self.last_key.clear();
        self.last_key.extend_from_slice(key);

        let bytes = ELEMENT_BYTES + key.len() + value.len();
        if !self.leaf.elements.is_empty()
            && HEADER_BYTES + self.leaf.bytes + bytes > pages.page_bytes
        {
            self.flush_leaf(pages)?;
        }
        let leaf = &mut self.leaf;
        if leaf.elements.is_empty() {
            leaf.first_key.extend_from_slice(key);
        }
        leaf.elements.push((flags, key.len() as u32, value.len() as u32));
        leaf.bytes += bytes;
        if pages.out.is_some() {
            leaf.data.extend_from_slice(key);
            leaf.data.extend_from_slice(value);
        }
        Ok(())
    }

    /// The bucket's value: its root's number, or the whole of a small bucket. When only counting, a
    /// value of the same length.
    fn finish(self, pages: &mut Pages<'_>) -> Result<Vec<u8>, WriteError> {
        let image_bytes = HEADER_BYTES + self.leaf.bytes;
        if !self.levels.is_empty() || image_bytes > pages.page_bytes / 4 {
            let root = self.finish_root(pages)?;
            let mut value = root.to_le_bytes().to_vec();
            value.resize(BUCKET_BYTES, 0);
            return Ok(value);
        }
        let mut value = vec![0; BUCKET_BYTES + HEADER_BYTES];
        let count = self.leaf.elements.len() as u16;
        put_header(&mut value[BUCKET_BYTES..], 0, LEAF, count, 0);
        if pages.out.is_some() {
            value.extend_from_slice(&self.leaf.content());
        }
        value.resize(BUCKET_BYTES + image_bytes, 0);
        Ok(value)
    }

    /// Writes what is left; answers the root's number.
    fn finish_root(mut self, pages: &mut Pages<'_>) -> Result<u64, WriteError> {
        self.flush_leaf(pages)?;
        let mut level = 0;
        // A level is left with two children or more whenever there is one above it, so that no
        // branch page has a single child: bbolt does not survive taking the last one away.
        while self.levels[level].children.len() > 1 {
            let count = self.levels[level].children.len();
            self.flush_branch(pages, level, count)?;
            level += 1;
        }
        Ok(self.levels[level].children[0].1)
    }

    fn flush_leaf(&mut self, pages: &mut Pages<'_>) -> Result<(), WriteError> {
        let leaf = &mut self.leaf;
        let content = pages.out.is_some().then(|| leaf.content());
        let count = leaf.elements.len();
        let id = pages.add_sized(LEAF, content.as_deref(), leaf.bytes, count)?;
        let first_key = std::mem::take(&mut leaf.first_key);
        leaf.elements.clear();
        leaf.data.clear();
        leaf.bytes = 0;
        self.raise(pages, 0, first_key, id)
    }

    /// Puts a finished page under the level above it.
    fn raise(
        &mut self,
        pages: &mut Pages<'_>,
        level: usize,
        key: Vec<u8>,
        id: u64,
    ) -> Result<(), WriteError> {
        if self.levels.len() == level {
            self.levels.push(Level::default());
        }
        let bytes = ELEMENT_BYTES + key.len();
        let children = self.levels[level].children.len();
        if children > 2 && HEADER_BYTES + self.levels[level].bytes + bytes > pages.page_bytes {
            // The last one stays back and keeps the new one company.
            self.flush_branch(pages, level, children - 1)?;
        }
        let level = &mut self.levels[level];
        level.bytes += bytes;
        level.children.push((key, id));
        Ok(())
    }

    /// Makes a page of the first `count` children of a level.
    fn flush_branch(
        &mut self,
        pages: &mut Pages<'_>,
        level: usize,
        count: usize,
    ) -> Result<(), WriteError> {
        let children: Vec<(Vec<u8>, u64)> = self.levels[level].children.drain(..count).collect();
        let mut content = Vec::new();
        let mut pos = count * ELEMENT_BYTES;
        for (key, id) in &children {
            content.extend_from_slice(&(pos as u32).to_le_bytes());
            content.extend_from_slice(&(key.len() as u32).to_le_bytes());
            content.extend_from_slice(&id.to_le_bytes());
            pos = pos - ELEMENT_BYTES + key.len();
        }
        for (key, _) in &children {
            content.extend_from_slice(key);
        }
        self.levels[level].bytes -= content.len();
        let id = pages.add(BRANCH, &content, count)?;
        let first = children.into_iter().next().expect("a branch has children");
        self.raise(pages, level + 1, first.0, id)
    }
}

impl Leaf {
    fn content(&self) -> Vec<u8> {
        let mut content = Vec::with_capacity(self.bytes);
        let mut pos = self.elements.len() * ELEMENT_BYTES;
        for (flags, key_bytes, value_bytes) in &self.elements {
            for number in [*flags, pos as u32, *key_bytes, *value_bytes] {
                content.extend_from_slice(&number.to_le_bytes());
            }
            pos = pos - ELEMENT_BYTES + *key_bytes as usize + *value_bytes as usize;
        }
        content.extend_from_slice(&self.data);
        content
    }
}
