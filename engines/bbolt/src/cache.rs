//! Pages in memory: those read, up to a number of bytes, and those not yet written.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::format::Page;

/// Parts with a lock each, so that readers seldom meet. A power of two.
const SHARDS: usize = 16;

/// A page keeps its place while it is asked for between two rounds of a clock hand, so that a scan over
/// everything does not drive out what is used all the time.
#[derive(Debug)]
pub(crate) struct Cache {
    shards: [Mutex<Shard>; SHARDS],
    shard_bytes_max: usize,
}

#[derive(Default, Debug)]
struct Shard {
    slots: FxHashMap<u64, Slot>,
    /// The number of each slot once, the next candidate for eviction first.
    ring: VecDeque<u64>,
    /// Bytes of the pages that may be evicted.
    bytes: usize,
}

#[derive(Debug)]
struct Slot {
    page: Page<Bytes>,
    /// Only here, not in the file.
    unwritten: bool,
    used: bool,
}

impl Cache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Cache { shards: Default::default(), shard_bytes_max: bytes_max / SHARDS }
    }

    fn shard(&self, id: u64) -> &Mutex<Shard> {
        &self.shards[id as usize % SHARDS]
    }

    pub(crate) fn get(&self, id: u64) -> Option<Page<Bytes>> {
        let mut shard = self.shard(id).lock();
        let slot = shard.slots.get_mut(&id)?;
        slot.used = true;
        Some(slot.page.clone())
    }

    /// Keeps a page that was read.
    pub(crate) fn put_read(&self, id: u64, page: Page<Bytes>) {
        let mut shard = self.shard(id).lock();
        // another reader was faster
        if !shard.slots.contains_key(&id) {
            shard.put(id, page, false);
            shard.evict(self.shard_bytes_max);
        }
    }

    /// Keeps a new page, in place of one that nobody sees any more, until it is written.
    pub(crate) fn put_unwritten(&self, id: u64, page: Page<Bytes>) {
        self.shard(id).lock().put(id, page, true);
    }

    /// The page is in the file, or nobody will ask for it again.
    pub(crate) fn written(&self, id: u64) {
        let mut shard = self.shard(id).lock();
        if let Some(slot) = shard.slots.get_mut(&id).filter(|slot| slot.unwritten) {
            slot.unwritten = false;
            let bytes = slot.page.bytes().len();
            shard.bytes += bytes;
            shard.evict(self.shard_bytes_max);
        }
    }
}

impl Shard {
    fn put(&mut self, id: u64, page: Page<Bytes>, unwritten: bool) {
        let bytes = page.bytes().len();
        let slot = Slot { page, unwritten, used: false };
        match self.slots.insert(id, slot) {
            Some(old) if !old.unwritten => self.bytes -= old.page.bytes().len(),
            Some(_) => {}
            None => self.ring.push_back(id),
        }
        if !unwritten {
            self.bytes += bytes;
        }
    }

    fn evict(&mut self, bytes_max: usize) {
        while self.bytes > bytes_max {
            let id = self.ring.pop_front().expect("pages that can be evicted are in the ring");
            let slot = self.slots.get_mut(&id).expect("the ring holds slots");
            if slot.unwritten || slot.used {
                slot.used = false;
                self.ring.push_back(id);
            } else {
                self.bytes -= slot.page.bytes().len();
                self.slots.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Builder;

    fn page() -> Page<Bytes> {
        Page::made(Builder::new(9, crate::format::LEAF, 0, 0, 4096).finish(4096).into())
    }

    #[test]
    fn what_is_used_or_unwritten_stays() {
        let cache = Cache::new(SHARDS * 4 * 4096);
        // all in one shard
        let id = |n: u64| n * SHARDS as u64;
        cache.put_unwritten(id(1), page());
        cache.put_read(id(2), page());
        for n in 3..50 {
            assert!(cache.get(id(2)).is_some(), "{n}");
            cache.put_read(id(n), page());
        }
        assert!(cache.get(id(1)).is_some());
        assert!(cache.get(id(3)).is_none());
        assert_eq!(cache.shards[0].lock().bytes, 4 * 4096);
        cache.written(id(1));
        for n in 50..60 {
            cache.put_read(id(n), page());
        }
        // it was asked for once, which is long ago
        assert!(cache.get(id(1)).is_none());
        let shard = cache.shards[0].lock();
        assert_eq!((shard.slots.len(), shard.ring.len(), shard.bytes), (4, 4, 4 * 4096));
    }
}
