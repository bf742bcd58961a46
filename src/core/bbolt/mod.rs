//! bbolt files, etcd's backend and the form of every snapshot: a reader that believes nothing, and a
//! writer of compact files that holds a few pages at a time.
//!
//! A file is an array of pages. Pages 0 and 1 say where the root of the bucket tree is; the rest are
//! branches and leaves of B+trees, one for the bucket names and one for each bucket:
//!
//! ```text
//! page          id u64 | flags u16 | count u16 | overflow u32 | elements | keys and values
//! branch elem.  pos u32 | key bytes u32 | child page u64
//! leaf elem.    flags u32 | pos u32 | key bytes u32 | value bytes u32
//! bucket        root page u64 | sequence u64 | if root is 0: a whole leaf page
//! meta          magic u32 | version u32 | page size u32 | flags u32 | root bucket 16 |
//!               freelist u64 | high-water mark u64 | transaction u64 | FNV-1a of these u64
//! ```
//!
//! All little endian; `pos` counts from the start of its element. An element that does not fit into a
//! page has one to itself that goes on over the next `overflow` pages.
//!
//! A snapshot file is a bbolt file followed by its SHA-256.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

mod reader;
mod writer;

pub use reader::{BboltError, Bucket, PageDamage, Reader};
pub use writer::{BucketSource, Layout, PairVisitor, Pairs, WriteError, write_compact};

/// The page size of the files that are written here, and of nearly all that exist.
pub const PAGE_BYTES: usize = 4096;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 16;
const ELEMENT_BYTES: usize = 16;
const META_BYTES: usize = 64;
const BUCKET_BYTES: usize = 16;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const META: u16 = 0x04;
const FREELIST: u16 = 0x10;

/// Flag of a leaf element whose value is a bucket.
const IS_BUCKET: u32 = 1;

/// Bytes of a key; none is empty.
const KEY_BYTES_MAX: usize = 32_768;

/// Bytes of a value, as bbolt has it.
const VALUE_BYTES_MAX: usize = (1 << 31) - 2;

/// What a reader reads from.
pub trait ReadAt {
    /// Length in bytes.
    ///
    /// # Errors
    /// The source's.
    fn size(&self) -> io::Result<u64>;

    /// Reads what there is from `at` on into `buffer`; fewer bytes than asked for means that the
    /// source ends.
    ///
    /// # Errors
    /// The source's.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;
}

impl ReadAt for &[u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(self.len());
        let length = buffer.len().min(self.len() - from);
        buffer[..length].copy_from_slice(&self[from..from + length]);
        Ok(length)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Box<T> {
    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        (**self).read_at(buffer, at)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// FNV-1a, 64 bits: the checksum of a meta page.
fn fnv64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Length of the digest behind the database in a snapshot file.
pub const DIGEST_BYTES: usize = 32;

/// Passes bytes on and appends their digest at the end: makes a snapshot file of a database.
pub struct DigestWriter<W> {
    out: W,
    sha: Sha256,
}

impl<W: Write> DigestWriter<W> {
    /// A digest of nothing yet, of what will go to `out`.
    pub fn new(out: W) -> Self {
        DigestWriter { out, sha: Sha256::new() }
    }

    /// Appends the digest and gives `out` back.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&self.sha.finalize())?;
        Ok(self.out)
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.sha.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Why a file is not a whole snapshot.
#[derive(thiserror::Error, Debug)]
pub enum DigestError {
    #[error("read at byte {at}: {source}")]
    Read {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("a file of {bytes} bytes has no SHA-256 digest at its end")]
    Missing { bytes: u64 },
    #[error(
        "SHA-256 of the database is {}, the digest at its end is {}",
        hex(computed),
        hex(stored)
    )]
    Mismatch { computed: [u8; DIGEST_BYTES], stored: [u8; DIGEST_BYTES] },
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a file of this length ends in a digest: databases are whole numbers of sectors.
pub const fn has_digest(file_bytes: u64) -> bool {
    file_bytes % 512 == DIGEST_BYTES as u64
}

/// Checks the digest of a snapshot file; answers the length of the database before it.
///
/// # Errors
/// If there is none, or another one than there should be.
pub fn verify_digest(file: &impl ReadAt) -> Result<u64, DigestError> {
    let bytes = file.size().map_err(|source| DigestError::Read { at: 0, source })?;
    if !has_digest(bytes) {
        return Err(DigestError::Missing { bytes });
    }
    let database = bytes - DIGEST_BYTES as u64;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < database {
        let length = (database - at).min(buffer.len() as u64) as usize;
        read_exact(file, &mut buffer[..length], at)
            .map_err(|source| DigestError::Read { at, source })?;
        sha.update(&buffer[..length]);
        at += length as u64;
    }
    let mut stored = [0; DIGEST_BYTES];
    read_exact(file, &mut stored, at).map_err(|source| DigestError::Read { at, source })?;
    let computed: [u8; DIGEST_BYTES] = sha.finalize().into();
    if computed != stored {
        return Err(DigestError::Mismatch { computed, stored });
    }
    Ok(database)
}

fn read_exact(source: &impl ReadAt, buffer: &mut [u8], at: u64) -> io::Result<()> {
    if source.read_at(buffer, at)? < buffer.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
