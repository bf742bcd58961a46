//! bbolt files, etcd's backend and the form of every snapshot: a reader that believes nothing, and a
//! writer of compact files that holds a few pages at a time.
//!
//! The bytes of pages are the engine's: [`engine_bbolt::format`], which is as pure as this module.
//!
//! A snapshot file is a bbolt file followed by its SHA-256.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

mod reader;
mod writer;

pub use engine_bbolt::format::{PAGE_BYTES, PageDamage};
pub use reader::{BboltError, Bucket, Reader};
pub use writer::{BucketSource, Layout, PairVisitor, Pairs, WriteError, write_compact};

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
