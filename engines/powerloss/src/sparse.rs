//! The bytes of a file in memory, without its holes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// What a disk writes whole or not at all, in bytes.
pub(crate) const SECTOR: u64 = 512;

const PAGE: u64 = 4096;

/// Pages that were never written are zeros. A copy shares the pages.
#[derive(Clone, Default, Debug)]
pub(crate) struct Sparse {
    len: u64,
    pages: BTreeMap<u64, Rc<[u8; PAGE as usize]>>,
}

impl Sparse {
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Writes as `pwrite` does: the file grows as needed.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.len = self.len.max(offset + data.len() as u64);
        self.fill(offset, data);
    }

    /// Replaces bytes whose pages may lie beyond the end, without a change of the length.
    fn fill(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let from = (offset % PAGE) as usize;
            let (now, later) = data.split_at(data.len().min(PAGE as usize - from));
            let page =
                self.pages.entry(offset / PAGE).or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[from..from + now.len()].copy_from_slice(now);
            offset += now.len() as u64;
            data = later;
        }
    }

    /// Cuts or extends as `ftruncate` does: what is cut reads as zeros if it ever comes back.
    pub(crate) fn resize(&mut self, len: u64) {
        if len < self.len {
            self.pages.split_off(&len.div_ceil(PAGE));
            if let Some(page) = self.pages.get_mut(&(len / PAGE)) {
                Rc::make_mut(page)[(len % PAGE) as usize..].fill(0);
            }
        }
        self.len = len;
    }

    /// Makes the sector around `offset` what it is in `other`, up to the end of `other`.
    pub(crate) fn copy_sector(&mut self, other: &Sparse, offset: u64) {
        let start = offset - offset % SECTOR;
        let end = (start + SECTOR).min(other.len);
        let from = (start % PAGE) as usize;
        let zeros = [0; PAGE as usize];
        let page = other.pages.get(&(start / PAGE)).map_or(&zeros, |page| &**page);
        self.len = self.len.max(end);
        self.fill(start, &page[from..from + SECTOR as usize]);
    }

    /// Writes everything into an empty file; holes stay holes.
    pub(crate) fn store(&self, file: &File) -> io::Result<()> {
        file.set_len(self.len)?;
        for (&number, page) in &self.pages {
            let offset = number * PAGE;
            let len = self.len.saturating_sub(offset).min(PAGE) as usize;
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(&page[..len], offset)?;
            }
        }
        Ok(())
    }

    /// Makes this the content of `file` and answers what differed, in pieces of whole sectors, and
    /// whether the length did.
    pub(crate) fn catch_up(&mut self, file: &File) -> io::Result<(Vec<(u64, Box<[u8]>)>, bool)> {
        let len = file.metadata()?.len();
        let resized = len != self.len;
        self.resize(len);
        let mut pieces = Vec::new();
        let mut buffer = [0; PAGE as usize];
        for number in 0..len.div_ceil(PAGE) {
            let offset = number * PAGE;
            let len = (len - offset).min(PAGE) as usize;
            file.read_exact_at(&mut buffer[..len], offset)?;
            for start in (0..len).step_by(SECTOR as usize) {
                let new = &buffer[start..len.min(start + SECTOR as usize)];
                let same = match self.pages.get(&number) {
                    Some(page) => page[start..start + new.len()] == *new,
                    None => new.iter().all(|byte| *byte == 0),
                };
                if !same {
                    self.write(offset + start as u64, new);
                    pieces.push((offset + start as u64, new.into()));
                }
            }
        }
        Ok((pieces, resized))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::Rng;

    fn bytes(sparse: &Sparse) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stored");
        sparse.store(&File::create(&path).unwrap()).unwrap();
        fs::read(&path).unwrap()
    }

    #[test]
    fn it_is_what_plain_bytes_are() {
        let mut rng = Rng::new(1);
        for _ in 0..50 {
            let (mut sparse, mut plain) = (Sparse::default(), Vec::new());
            for _ in 0..20 {
                let offset = rng.below(12_000);
                if rng.one_in(3) {
                    sparse.resize(offset);
                    plain.resize(offset as usize, 0);
                } else {
                    let len = rng.below(6_000) as usize;
                    let data = rng.bytes(len);
                    let end = offset as usize + data.len();
                    plain.resize(plain.len().max(end), 0);
                    plain[offset as usize..end].copy_from_slice(&data);
                    sparse.write(offset, &data);
                }
            }
            assert!(bytes(&sparse) == plain);
        }
    }

    #[test]
    fn a_sector_is_copied_up_to_the_end_of_the_other() {
        let (mut disk, mut cache) = (Sparse::default(), Sparse::default());
        disk.write(0, &[1; 1_024]);
        cache.write(0, &[2; 1_100]);
        disk.copy_sector(&cache, 700);
        assert!(bytes(&disk) == [[1; 512], [2; 512]].concat());
        disk.copy_sector(&cache, 1_024);
        assert!(bytes(&disk) == [&[1; 512][..], &[2; 512], &[2; 76]].concat());
    }

    #[test]
    fn what_changed_in_a_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("file"));
        let file = file.unwrap();
        file.write_all_at(&[7; 5_000], 0).unwrap();
        let mut shadow = Sparse::default();
        assert!(shadow.catch_up(&file).unwrap().1);
        file.write_all_at(&[8], 4_500).unwrap();
        let (pieces, resized) = shadow.catch_up(&file).unwrap();
        assert!(!resized);
        let [(4_096, data)] = &pieces[..] else { panic!("{pieces:?}") };
        assert!(data[404] == 8 && data.len() == 512);
        assert!(bytes(&shadow) == fs::read(dir.path().join("file")).unwrap());
        assert!(shadow.catch_up(&file).unwrap().0.is_empty());
    }
}
