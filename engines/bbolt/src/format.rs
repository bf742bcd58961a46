//! The bytes of a bbolt file: pages that have been checked, and pages to be written.
//!
//! A file is an array of pages. Pages 0 and 1 say where the root of the bucket tree is; the rest are
//! branches and leaves of B+trees, one for the bucket names and one for each bucket, and perhaps a list
//! of free pages:
//!
//! ```text
//! page          id u64 | flags u16 | count u16 | overflow u32 | elements | keys and values
//! branch elem.  pos u32 | key bytes u32 | child page u64
//! leaf elem.    flags u32 | pos u32 | key bytes u32 | value bytes u32
//! bucket        root page u64 | sequence u64 | if root is 0: a whole leaf page
//! meta          magic u32 | version u32 | page size u32 | flags u32 | root bucket 16 |
//!               freelist u64 | high-water mark u64 | transaction u64 | FNV-1a of these u64
//! freelist      ids u64..., ascending; from 65,535 of them on count is 65,535 and the first u64 is it
//! ```
//!
//! All little endian; `pos` counts from the start of its element. What does not fit into a page goes on
//! over the next `overflow` pages.

use std::ops::{Deref, Range};

/// The page size of nearly all files that exist, and of those that are created here.
pub const PAGE_BYTES: usize = 4096;

pub const HEADER_BYTES: usize = 16;
pub const ELEMENT_BYTES: usize = 16;
pub const META_BYTES: usize = 64;
/// A bucket's root and sequence, before its page if it is inline.
pub const BUCKET_BYTES: usize = 16;

pub const BRANCH: u16 = 0x01;
pub const LEAF: u16 = 0x02;
pub const META: u16 = 0x04;
pub const FREELIST: u16 = 0x10;

/// Flag of a leaf element whose value is a bucket.
pub const IS_BUCKET: u32 = 1;

/// Bytes of a key; none is empty.
pub const KEY_BYTES_MAX: usize = 32_768;

/// Bytes of a value, as bbolt has it.
pub const VALUE_BYTES_MAX: usize = (1 << 31) - 2;

/// Levels of a tree; even with two children a branch, 64 are more than page numbers can tell apart.
pub const DEPTH_MAX: usize = 64;

/// Where metas are looked for: page sizes from 1 KiB to 16 MiB.
pub const PAGE_SHIFTS: std::ops::RangeInclusive<u32> = 10..=24;

/// Instead of a freelist's page: the free pages are those that no tree reaches.
pub const NO_FREELIST: u64 = u64::MAX;

/// The count from which on a freelist has its count in the first number.
const FREELIST_COUNT_MAX: usize = 0xffff;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// FNV-1a, 64 bits: the checksum of a meta page.
pub fn fnv64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Writes the header of a page at its start.
pub fn put_header(page: &mut [u8], id: u64, flags: u16, count: u16, overflow: u32) {
    page[..8].copy_from_slice(&id.to_le_bytes());
    page[8..10].copy_from_slice(&flags.to_le_bytes());
    page[10..12].copy_from_slice(&count.to_le_bytes());
    page[12..16].copy_from_slice(&overflow.to_le_bytes());
}

/// What a meta page says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meta {
    /// A power of two within [`PAGE_SHIFTS`].
    pub page_bytes: u32,
    pub root: u64,
    pub sequence: u64,
    /// The freelist's page, or [`NO_FREELIST`].
    pub freelist: u64,
    /// The high-water mark: pages below it are in use or free.
    pub pages: u64,
    pub transaction: u64,
}

impl Meta {
    /// Reads a meta from the start of its page; `None` if it is none or damaged.
    pub fn decode(page: &[u8]) -> Option<Meta> {
        let meta = page.get(HEADER_BYTES..HEADER_BYTES + META_BYTES)?;
        let page_bytes = u32_at(meta, 8);
        let valid = u16_at(page, 8) & META != 0
            && u32_at(meta, 0) == MAGIC
            && u32_at(meta, 4) == VERSION
            && u64_at(meta, 56) == fnv64(&meta[..56])
            && page_bytes.is_power_of_two()
            && PAGE_SHIFTS.contains(&page_bytes.trailing_zeros());
        valid.then(|| Meta {
            page_bytes,
            root: u64_at(meta, 16),
            sequence: u64_at(meta, 24),
            freelist: u64_at(meta, 32),
            pages: u64_at(meta, 40),
            transaction: u64_at(meta, 48),
        })
    }

    /// The whole page number `id`, which is 0 or 1.
    pub fn encode(&self, id: u64) -> Vec<u8> {
        let mut page = vec![0; self.page_bytes as usize];
        put_header(&mut page, id, META, 0, 0);
        let mut meta = Vec::with_capacity(META_BYTES);
        for number in [MAGIC, VERSION, self.page_bytes, 0] {
            meta.extend_from_slice(&number.to_le_bytes());
        }
        let Meta { root, sequence, freelist, pages, transaction, .. } = *self;
        for number in [root, sequence, freelist, pages, transaction] {
            meta.extend_from_slice(&number.to_le_bytes());
        }
        meta.extend_from_slice(&fnv64(&meta).to_le_bytes());
        page[HEADER_BYTES..HEADER_BYTES + META_BYTES].copy_from_slice(&meta);
        page
    }
}

/// What is wrong with a page.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
pub enum PageDamage {
    #[error("its number is outside the {pages} pages of the file")]
    OutOfRange { pages: u64 },
    #[error("it says that it is page {found}")]
    Id { found: u64 },
    #[error("it is no branch or leaf: flags {found:#x}")]
    Flags { found: u16 },
    #[error("it goes on over {overflow} more pages, past the end of the file")]
    Overflow { overflow: u32 },
    #[error("it has no elements")]
    Empty,
    #[error("element {index} of {count} lies outside the page")]
    Element { index: usize, count: usize },
    #[error("the key of element {index} has {bytes} bytes")]
    KeyLength { index: usize, bytes: usize },
    #[error("the key of element {index} is not above the one before it")]
    Order { index: usize },
    #[error("the key of element {index} does not belong under the branch that leads here")]
    Misplaced { index: usize },
    #[error("it lies more than {DEPTH_MAX} levels deep")]
    Depth,
    #[error("it is on another level than the page beside it")]
    Level,
    #[error("it is a branch with a single child")]
    Lonely,
    #[error("element {index} is a bucket within a bucket")]
    Nested { index: usize },
    #[error("element {index} of the root is not a bucket")]
    NotABucket { index: usize },
    #[error("it belongs to two trees, or to one of them twice")]
    Shared,
    #[error("it is in use and on the list of free pages")]
    InUseAndFree,
    #[error("it is neither in use nor on the list of free pages")]
    Lost,
    #[error("it is no list of free pages: flags {found:#x}")]
    NotAFreelist { found: u16 },
    #[error("its list of {count} free pages is longer than the page")]
    FreelistLength { count: u64 },
    #[error("number {index} of its free pages is {id}, which is out of range or out of order")]
    FreelistId { index: usize, id: u64 },
}

/// A branch or leaf whose every element lies within it, with keys in order.
#[derive(Clone, Debug)]
pub struct Page<B> {
    bytes: B,
    is_leaf: bool,
    count: usize,
}

impl<B: Deref<Target = [u8]>> Page<B> {
    /// Checks what can be known of a page without others; its number is the caller's to check, for an
    /// inline page has none.
    ///
    /// # Errors
    /// The first damage that is found.
    pub fn check(bytes: B) -> Result<Self, PageDamage> {
        if bytes.len() < HEADER_BYTES {
            return Err(PageDamage::Element { index: 0, count: 0 });
        }
        let is_leaf = match u16_at(&bytes, 8) {
            LEAF => true,
            BRANCH => false,
            found => return Err(PageDamage::Flags { found }),
        };
        let count = usize::from(u16_at(&bytes, 10));
        if count == 0 && !is_leaf {
            return Err(PageDamage::Empty);
        }
        let page = Page { bytes, is_leaf, count };
        let elements_end = HEADER_BYTES + count * ELEMENT_BYTES;
        if elements_end > page.bytes.len() {
            let index = (page.bytes.len() - HEADER_BYTES) / ELEMENT_BYTES;
            return Err(PageDamage::Element { index, count });
        }
        let mut last: &[u8] = &[];
        for index in 0..count {
            // Four numbers of 32 bits: no overflow on 64.
            let (at, key_bytes, value_bytes) = page.place(index);
            if at < elements_end as u64 || at + key_bytes + value_bytes > page.bytes.len() as u64 {
                return Err(PageDamage::Element { index, count });
            }
            let key = page.key(index);
            if is_leaf && key.is_empty() || key.len() > KEY_BYTES_MAX {
                return Err(PageDamage::KeyLength { index, bytes: key.len() });
            }
            if index > 0 && key <= last {
                return Err(PageDamage::Order { index });
            }
            last = key;
        }
        Ok(page)
    }

    /// A page that was made here.
    pub(crate) fn made(bytes: B) -> Self {
        let (is_leaf, count) = (u16_at(&bytes, 8) == LEAF, usize::from(u16_at(&bytes, 10)));
        Page { bytes, is_leaf, count }
    }

    /// Checks that all keys are `lower` or above and below `upper`, as the branches above say. Only a
    /// root may be empty.
    ///
    /// # Errors
    /// `Empty` or `Misplaced`.
    pub fn check_place(
        &self,
        (lower, upper): (&[u8], Option<&[u8]>),
        is_root: bool,
    ) -> Result<(), PageDamage> {
        if self.count == 0 {
            return if is_root { Ok(()) } else { Err(PageDamage::Empty) };
        }
        if self.key(0) < lower {
            return Err(PageDamage::Misplaced { index: 0 });
        }
        if let Some(upper) = upper
            && self.key(self.count - 1) >= upper
        {
            let index = self.first_not(|key| key < upper);
            return Err(PageDamage::Misplaced { index });
        }
        Ok(())
    }

    /// The number that it says it has; an inline page's means nothing.
    pub fn id(&self) -> u64 {
        u64_at(&self.bytes, 0)
    }

    pub fn is_leaf(&self) -> bool {
        self.is_leaf
    }

    /// How many elements it has.
    pub fn count(&self) -> usize {
        self.count
    }

    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// Where key and value stand, and their lengths; a branch has no values.
    fn place(&self, index: usize) -> (u64, u64, u64) {
        let element = HEADER_BYTES + index * ELEMENT_BYTES;
        let number = |n: usize| u64::from(u32_at(&self.bytes, element + 4 * n));
        let (pos, key_bytes, value_bytes) = if self.is_leaf {
            (number(1), number(2), number(3))
        } else {
            (number(0), number(1), 0)
        };
        (element as u64 + pos, key_bytes, value_bytes)
    }

    pub fn key_range(&self, index: usize) -> Range<usize> {
        let (at, key_bytes, _) = self.place(index);
        at as usize..(at + key_bytes) as usize
    }

    pub fn value_range(&self, index: usize) -> Range<usize> {
        let (at, key_bytes, value_bytes) = self.place(index);
        let from = (at + key_bytes) as usize;
        from..from + value_bytes as usize
    }

    pub fn key(&self, index: usize) -> &[u8] {
        &self.bytes[self.key_range(index)]
    }

    /// A leaf's value.
    pub fn value(&self, index: usize) -> &[u8] {
        &self.bytes[self.value_range(index)]
    }

    /// A leaf element's flags.
    pub fn flags(&self, index: usize) -> u32 {
        u32_at(&self.bytes, HEADER_BYTES + index * ELEMENT_BYTES)
    }

    /// A branch's child.
    pub fn child(&self, index: usize) -> u64 {
        u64_at(&self.bytes, HEADER_BYTES + index * ELEMENT_BYTES + 8)
    }

    /// The first element whose key does not satisfy `before`, which holds for a prefix of the keys.
    pub fn first_not(&self, mut before: impl FnMut(&[u8]) -> bool) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            if before(self.key(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// A page to be written: its header and the places of its elements come first, then what they hold.
pub(crate) struct Builder {
    bytes: Vec<u8>,
    count: usize,
    /// Elements written so far.
    at: usize,
}

impl Builder {
    /// A page whose `count` elements with keys and values take `content_bytes`, followed by zeros up to
    /// `page_bytes` or a multiple of it.
    pub(crate) fn new(
        id: u64,
        flags: u16,
        count: usize,
        content_bytes: usize,
        page_bytes: usize,
    ) -> Builder {
        let used = HEADER_BYTES + content_bytes;
        let pages = used.div_ceil(page_bytes);
        let mut builder = Builder::inline(count, content_bytes, pages * page_bytes);
        let overflow = u32::try_from(pages - 1).expect("elements of at most 2 GiB");
        put_header(&mut builder.bytes, id, flags, builder.count as u16, overflow);
        builder
    }

    /// A leaf without a number of its own, as long as its content.
    pub(crate) fn inline(count: usize, content_bytes: usize, capacity: usize) -> Builder {
        let length = HEADER_BYTES + count * ELEMENT_BYTES;
        let mut bytes = Vec::with_capacity(capacity.max(HEADER_BYTES + content_bytes));
        bytes.resize(length, 0);
        let short =
            u16::try_from(count).expect("elements of 16 bytes in pages that are not larger");
        put_header(&mut bytes, 0, LEAF, short, 0);
        Builder { bytes, count, at: 0 }
    }

    fn element(&mut self) -> (usize, u32) {
        assert!(self.at < self.count, "more elements than were announced");
        let element = HEADER_BYTES + self.at * ELEMENT_BYTES;
        self.at += 1;
        let pos = u32::try_from(self.bytes.len() - element).expect("pages below 4 GiB");
        (element, pos)
    }

    pub(crate) fn row(&mut self, flags: u32, key: &[u8], value: &[u8]) {
        let (at, pos) = self.element();
        for (n, number) in [flags, pos, key.len() as u32, value.len() as u32].iter().enumerate() {
            self.bytes[at + 4 * n..at + 4 * n + 4].copy_from_slice(&number.to_le_bytes());
        }
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
    }

    pub(crate) fn child(&mut self, key: &[u8], id: u64) {
        let (at, pos) = self.element();
        self.bytes[at..at + 4].copy_from_slice(&pos.to_le_bytes());
        self.bytes[at + 4..at + 8].copy_from_slice(&(key.len() as u32).to_le_bytes());
        self.bytes[at + 8..at + 16].copy_from_slice(&id.to_le_bytes());
        self.bytes.extend_from_slice(key);
    }

    /// The page, filled up with zeros to a multiple of `page_bytes`.
    pub(crate) fn finish(mut self, page_bytes: usize) -> Vec<u8> {
        assert_eq!(self.at, self.count, "fewer elements than were announced");
        let length = self.bytes.len().next_multiple_of(page_bytes);
        self.bytes.resize(length, 0);
        self.bytes
    }
}

/// Pages that a freelist of so many numbers takes.
pub(crate) fn freelist_pages(count: usize, page_bytes: usize) -> usize {
    let numbers = count + usize::from(count >= FREELIST_COUNT_MAX);
    (HEADER_BYTES + numbers * 8).div_ceil(page_bytes)
}

/// A freelist of `pages` pages, from page `id` on.
pub(crate) fn encode_freelist(id: u64, ids: &[u64], pages: usize, page_bytes: usize) -> Vec<u8> {
    let mut page = Vec::with_capacity(pages * page_bytes);
    page.resize(HEADER_BYTES, 0);
    let count = ids.len().min(FREELIST_COUNT_MAX);
    put_header(&mut page, id, FREELIST, count as u16, (pages - 1) as u32);
    if count == FREELIST_COUNT_MAX {
        page.extend_from_slice(&(ids.len() as u64).to_le_bytes());
    }
    ids.iter().for_each(|id| page.extend_from_slice(&id.to_le_bytes()));
    assert!(page.len() <= pages * page_bytes, "a freelist that fits its pages");
    page.resize(pages * page_bytes, 0);
    page
}

/// The numbers of a freelist, each within the file's `pages` pages and ascending. Its own number has
/// been checked.
pub(crate) fn decode_freelist(page: &[u8], pages: u64) -> Result<Vec<u64>, PageDamage> {
    let found = u16_at(page, 8);
    if found != FREELIST {
        return Err(PageDamage::NotAFreelist { found });
    }
    let numbers = &page[HEADER_BYTES..];
    let (count, numbers) = match usize::from(u16_at(page, 10)) {
        FREELIST_COUNT_MAX => (u64_at(numbers, 0), &numbers[8..]),
        count => (count as u64, numbers),
    };
    if count > (numbers.len() / 8) as u64 {
        return Err(PageDamage::FreelistLength { count });
    }
    let mut ids: Vec<u64> = Vec::with_capacity(count as usize);
    for index in 0..count as usize {
        let id = u64_at(numbers, index * 8);
        if id < 2 || id >= pages || ids.last().is_some_and(|last| id <= *last) {
            return Err(PageDamage::FreelistId { index, id });
        }
        ids.push(id);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metas_are_read_as_written_and_not_if_a_byte_differs() {
        let meta = Meta {
            page_bytes: 4096,
            root: 3,
            sequence: 1,
            freelist: NO_FREELIST,
            pages: 9,
            transaction: 77,
        };
        let page = meta.encode(1);
        assert_eq!(Meta::decode(&page), Some(meta));
        assert_eq!(u64_at(&page, 0), 1);
        for at in HEADER_BYTES..HEADER_BYTES + META_BYTES {
            let mut damaged = page.clone();
            damaged[at] ^= 1;
            assert_eq!(Meta::decode(&damaged), None, "byte {at}");
        }
        assert_eq!(Meta::decode(&page[..79]), None);
    }

    #[test]
    fn freelists_are_read_as_written() {
        for count in [0, 1, 510, 511, 65_534, 65_535, 70_000] {
            let ids: Vec<u64> = (2..2 + count).collect();
            let pages = freelist_pages(ids.len(), PAGE_BYTES);
            let page = encode_freelist(9, &ids, pages, PAGE_BYTES);
            assert_eq!(decode_freelist(&page, 1 << 20), Ok(ids.clone()), "{count}");
            if count > 1 {
                let id = 1 + count;
                let index = count as usize - 1;
                let error = PageDamage::FreelistId { index, id };
                assert_eq!(decode_freelist(&page, id), Err(error));
            }
        }
        let mut long = encode_freelist(9, &[2], 1, PAGE_BYTES);
        long[10..12].copy_from_slice(&600_u16.to_le_bytes());
        assert_eq!(decode_freelist(&long, 1000), Err(PageDamage::FreelistLength { count: 600 }));
        let twice = encode_freelist(9, &[5, 5], 1, PAGE_BYTES);
        assert_eq!(decode_freelist(&twice, 9), Err(PageDamage::FreelistId { index: 1, id: 5 }));
    }
}
