//! The workloads: which keys and values, and what one client does for one ticket.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use quorate_proto::etcdserverpb as pb;

use super::client::{CallError, Channel, Method, Stream};
use super::pace::Ticket;
use super::wire::{self, RangeShape};

/// Time to live of the leases that `lease-keepalive` renews, in seconds: longer than a pause between
/// two slices.
const LEASE_TTL_S: i64 = 600;

/// Random bytes beyond a value's size, so that values differ by where in the pool they begin.
const POOL_EXTRA: usize = 4096;

/// Memory in which one thread's requests are encoded, taken anew when it is used up.
const SCRATCH: usize = 256 << 10;

/// First bytes of a watched value: the run's mark, then nanoseconds since the run's epoch (both
/// little-endian). A watcher knows its own events by the first and their age by the second.
pub const STAMP: usize = 16;

/// A small generator of random numbers (splitmix64), the same on each machine for a seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// `stream` keeps the clients of one seed apart.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Random(seed ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03));
        random.next();
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly in `[0, bound)`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// The keys of a workload: numbers in hexadecimal digits, filled with zeros to `size` bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pub size: usize,
    /// Keys are numbers in `[0, space)`.
    pub space: u64,
    /// Key by ticket, around the space; else at random.
    pub sequential: bool,
}

impl Keys {
    /// How many keys of `size` bytes there are, at most.
    pub fn space_max(size: usize) -> u64 {
        if size >= 16 { u64::MAX } else { 1 << (4 * size) }
    }

    fn pick(&self, number: u64, random: &mut Random) -> u64 {
        if self.sequential { number % self.space } else { random.below(self.space) }
    }

    /// Writes key `index` over `key`, which holds `size` bytes.
    pub fn write(&self, mut index: u64, key: &mut [u8]) {
        for digit in key.iter_mut().rev() {
            *digit = b"0123456789abcdef"[(index & 15) as usize];
            index >>= 4;
        }
    }

    /// Key `index`.
    pub fn key(&self, index: u64) -> Vec<u8> {
        let mut key = vec![0; self.size];
        self.write(index, &mut key);
        key
    }
}

/// What every client does.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    Put {
        /// Others log in meanwhile: see [`Shape::logins`](super::session::Shape::logins).
        logins: bool,
    },
    /// Puts, in one half of each slice with nothing beside them, in the other one disturbed: see
    /// [`Shape::during`](super::session::Shape::during).
    PutDuring,
    /// One key or range, or, without `key`, keys of the key space.
    Range {
        key: Option<Vec<u8>>,
        shape: RangeShape,
    },
    TxnPut {
        /// Puts a transaction.
        ops: u64,
    },
    /// Reads of one key and puts, at random.
    Mixed {
        /// Of all operations, how many are reads, in `[0, 1]`.
        reads: f64,
        shape: RangeShape,
    },
    LeaseKeepAlive,
    /// Puts to watched keys.
    Watched(Watching),
}

/// Who watches what: watcher w looks at key `w % keys` on stream `w % streams`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watching {
    pub watchers: u64,
    pub streams: u64,
    pub keys: u64,
    /// Ask for the previous value with each event.
    pub prev_kv: bool,
}

impl Watching {
    /// How many watch key `index`.
    pub fn watchers_of(&self, index: u64) -> u64 {
        self.watchers / self.keys + u64::from(index < self.watchers % self.keys)
    }
}

impl Work {
    /// Names of the operations that are measured apart.
    pub fn kinds(&self) -> &'static [&'static str] {
        match self {
            Work::Put { logins: false } => &["put"],
            Work::Put { logins: true } => &["put", "login"],
            Work::PutDuring => &["put", "disturbed put", "compaction", "defragmentation"],
            Work::Range { .. } => &["range"],
            Work::TxnPut { .. } => &["txn"],
            Work::Mixed { .. } => &["read", "write"],
            Work::LeaseKeepAlive => &["keep-alive"],
            Work::Watched(_) => &["put", "event"],
        }
    }

    /// The first of [`Work::kinds`] that are requests; what follows is caused by them or goes on beside.
    pub fn request_kinds(&self) -> usize {
        match self {
            Work::Watched(_) | Work::Put { .. } => 1,
            Work::PutDuring => 2,
            _ => self.kinds().len(),
        }
    }

    /// The one of [`Work::kinds`] that the workload is about.
    pub fn main_kind(&self) -> usize {
        match self {
            Work::Put { .. } => 0,
            Work::PutDuring => 1,
            _ => self.kinds().len() - 1,
        }
    }
}

/// A workload, the same for every client of every server in a run.
#[derive(Clone, Debug)]
pub struct Load {
    pub work: Work,
    pub keys: Keys,
    pub value_size: usize,
    /// Random bytes, `value_size` and some more.
    pool: Arc<[u8]>,
    pub seed: u64,
    /// Told from other runs by this number in watched values.
    pub mark: u64,
    pub epoch: Instant,
}

impl Load {
    pub fn new(work: Work, keys: Keys, value_size: usize, seed: u64, mark: u64) -> Self {
        let mut random = Random::new(seed, u64::MAX);
        let pool = (0..value_size + POOL_EXTRA).map(|_| random.next() as u8).collect();
        Load { work, keys, value_size, pool, seed, mark, epoch: Instant::now() }
    }

    fn value(&self, random: &mut Random) -> &[u8] {
        let at = random.below(POOL_EXTRA as u64) as usize;
        &self.pool[at..at + self.value_size]
    }

    /// All values that can be written.
    pub fn values(&self) -> impl Iterator<Item = &[u8]> {
        (0..POOL_EXTRA).map(|at| &self.pool[at..at + self.value_size])
    }

    /// The time in a watched value of this run; None for a value written by somebody else.
    pub fn stamp(&self, value: &[u8]) -> Option<Instant> {
        let (mark, rest) = value.split_first_chunk::<8>()?;
        let since = u64::from_le_bytes(*rest.first_chunk::<8>()?);
        (u64::from_le_bytes(*mark) == self.mark)
            .then(|| self.epoch + std::time::Duration::from_nanos(since))
    }
}

/// Why a ticket's work failed.
#[derive(thiserror::Error, Debug)]
pub enum WorkError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the range holds no key")]
    NotFound,
    #[error("the transaction did not succeed")]
    NotSucceeded,
    #[error("the lease is gone")]
    LeaseGone,
    #[error("the reply is for another lease")]
    OtherLease,
}

/// What a completed ticket means to the tally.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub kind: usize,
    /// Watchers that will be told.
    pub events: u64,
}

/// One client: a channel, its generator of random numbers, and for leases its stream.
pub struct Client {
    load: Arc<Load>,
    channel: Channel,
    random: Random,
    scratch: Rc<RefCell<BytesMut>>,
    key: Vec<u8>,
    lease: Option<i64>,
    stream: Option<Stream>,
    /// Watchers of the key last written.
    events: u64,
}

/// The buffer that the clients of a thread encode into.
pub fn scratch() -> Rc<RefCell<BytesMut>> {
    Rc::new(RefCell::new(BytesMut::with_capacity(SCRATCH)))
}

impl Client {
    /// `number` is the client's own among all, from 0.
    pub fn new(
        load: Arc<Load>,
        number: u64,
        channel: Channel,
        scratch: Rc<RefCell<BytesMut>>,
    ) -> Self {
        let random = Random::new(load.seed, number);
        let key = vec![0; load.keys.size];
        Client { load, channel, random, scratch, key, lease: None, stream: None, events: 0 }
    }

    /// What must be there before the first ticket: a lease, for the workload that renews one.
    ///
    /// # Errors
    /// If the server grants none.
    pub async fn prepare(&mut self) -> Result<(), CallError> {
        if self.load.work == Work::LeaseKeepAlive {
            let request = pb::LeaseGrantRequest { ttl: LEASE_TTL_S, id: 0 };
            let reply: pb::LeaseGrantResponse =
                self.channel.call(Method::LeaseGrant, &request).await?;
            self.lease = Some(reply.id);
        }
        Ok(())
    }

    /// Gives back what [`Client::prepare`] took.
    ///
    /// # Errors
    /// If the server does not revoke the lease.
    pub async fn close(mut self) -> Result<(), CallError> {
        drop(self.stream.take());
        if let Some(id) = self.lease.take() {
            let request = pb::LeaseRevokeRequest { id };
            let _: pb::LeaseRevokeResponse =
                self.channel.call(Method::LeaseRevoke, &request).await?;
        }
        Ok(())
    }

    /// Watchers that would have been told of the operation that has just failed, had it succeeded; it
    /// may yet have been executed.
    pub fn possible_events(&self) -> u64 {
        self.events
    }

    /// Makes the channel usable after a transport error.
    ///
    /// # Errors
    /// If the server stays out of reach.
    pub async fn recover(&mut self) -> Result<(), CallError> {
        self.stream = None;
        Ok(self.channel.reconnect().await?)
    }

    /// Writes key `number` of the key space, before anything is measured.
    ///
    /// # Errors
    /// Whatever the server answers.
    pub async fn populate(&mut self, number: u64) -> Result<(), WorkError> {
        self.load.keys.write(number, &mut self.key);
        let value = self.load.value(&mut self.random);
        let frame = framed(&self.scratch, |buf| wire::put(buf, &self.key, value));
        self.channel.unary(Method::Put, frame).await?;
        Ok(())
    }

    /// One operation of the workload.
    ///
    /// # Errors
    /// If the server refuses, the connection breaks, or the reply is not what it must be.
    pub async fn step(&mut self, ticket: &Ticket) -> Result<Done, WorkError> {
        self.events = 0;
        let load = self.load.clone();
        let kind = match &load.work {
            Work::Put { .. } | Work::PutDuring => {
                self.put(ticket.number).await?;
                0
            }
            Work::Range { key: Some(key), shape } => {
                let frame = framed(&self.scratch, |buf| wire::range(buf, key, shape));
                self.range(frame).await?;
                0
            }
            Work::Range { key: None, shape } => {
                self.read(ticket.number, shape).await?;
                0
            }
            Work::TxnPut { ops } => {
                self.txn(ticket.number, *ops).await?;
                0
            }
            Work::Mixed { reads, shape } => {
                let chance = (self.random.next() >> 11) as f64 / (1u64 << 53) as f64;
                if chance < *reads {
                    self.read(ticket.number, shape).await?;
                    0
                } else {
                    self.put(ticket.number).await?;
                    1
                }
            }
            Work::LeaseKeepAlive => {
                let result = self.keep_alive().await;
                if matches!(result, Err(WorkError::Call(_))) {
                    self.stream = None; // the next ticket opens another
                }
                result?;
                0
            }
            Work::Watched(watching) => {
                self.watched_put(ticket, watching).await?;
                0
            }
        };
        Ok(Done { kind, events: self.events })
    }

    async fn put(&mut self, number: u64) -> Result<(), WorkError> {
        let index = self.load.keys.pick(number, &mut self.random);
        self.populate(index).await
    }

    async fn watched_put(&mut self, ticket: &Ticket, watching: &Watching) -> Result<(), WorkError> {
        let index = self.load.keys.pick(ticket.number, &mut self.random);
        self.events = watching.watchers_of(index);
        self.load.keys.write(index, &mut self.key);
        let since = ticket.start.saturating_duration_since(self.load.epoch).as_nanos() as u64;
        let mut stamp = [0; STAMP];
        stamp[..8].copy_from_slice(&self.load.mark.to_le_bytes());
        stamp[8..].copy_from_slice(&since.to_le_bytes());
        let value = self.load.value(&mut self.random);
        let frame = framed(&self.scratch, |buf| {
            wire::put(buf, &self.key, value);
            // The value is the message's last field.
            let at = buf.len() - value.len();
            buf[at..at + STAMP].copy_from_slice(&stamp);
        });
        self.channel.unary(Method::Put, frame).await?;
        Ok(())
    }

    async fn read(&mut self, number: u64, shape: &RangeShape) -> Result<(), WorkError> {
        let index = self.load.keys.pick(number, &mut self.random);
        self.load.keys.write(index, &mut self.key);
        let frame = framed(&self.scratch, |buf| wire::range(buf, &self.key, shape));
        self.range(frame).await
    }

    async fn range(&mut self, frame: Bytes) -> Result<(), WorkError> {
        let reply = self.channel.unary(Method::Range, frame).await?;
        match wire::range_found(&reply).map_err(CallError::from)? {
            true => Ok(()),
            false => Err(WorkError::NotFound),
        }
    }

    async fn txn(&mut self, number: u64, ops: u64) -> Result<(), WorkError> {
        let keys = &self.load.keys;
        // Neighbours, because a transaction may write a key only once.
        let first = keys.pick(number.wrapping_mul(ops), &mut self.random);
        let frame = framed(&self.scratch, |buf| {
            for op in 0..ops {
                let index = (u128::from(first) + u128::from(op)) % u128::from(keys.space);
                keys.write(index as u64, &mut self.key);
                wire::txn_put(buf, &self.key, self.load.value(&mut self.random));
            }
        });
        let reply = self.channel.unary(Method::Txn, frame).await?;
        match wire::txn_succeeded(&reply).map_err(CallError::from)? {
            true => Ok(()),
            false => Err(WorkError::NotSucceeded),
        }
    }

    async fn keep_alive(&mut self) -> Result<(), WorkError> {
        let lease = self.lease.expect("prepare() granted a lease");
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(self.channel.stream(Method::LeaseKeepAlive).await?),
        };
        stream.send(framed(&self.scratch, |buf| wire::keep_alive(buf, lease)))?;
        let reply = stream.next().await?;
        let (answered, ttl) = wire::keep_alive_reply(&reply).map_err(CallError::from)?;
        match (answered == lease, ttl > 0) {
            (true, true) => Ok(()),
            (true, false) => Err(WorkError::LeaseGone),
            (false, _) => Err(WorkError::OtherLease),
        }
    }
}

/// One frame, cut from the thread's buffer.
fn framed(scratch: &RefCell<BytesMut>, write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut buf = scratch.borrow_mut();
    if buf.capacity() < SCRATCH / 64 {
        buf.reserve(SCRATCH);
    }
    wire::frame(&mut buf, write);
    buf.split().freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_numbers_of_fixed_width() {
        let keys = Keys { size: 4, space: 300, sequential: true };
        let mut random = Random::new(1, 2);
        assert_eq!(keys.key(keys.pick(255, &mut random)), b"00ff");
        assert_eq!(keys.key(keys.pick(301, &mut random)), b"0001");
        assert_eq!(Keys { size: 20, ..keys.clone() }.key(16), b"00000000000000000010");
        assert_eq!((Keys::space_max(4), Keys::space_max(16)), (65536, u64::MAX));
    }

    #[test]
    fn random_keys_stay_in_their_space_and_reach_all_of_it() {
        let keys = Keys { size: 8, space: 10, sequential: false };
        let mut random = Random::new(7, 0);
        let picked: std::collections::BTreeSet<u64> =
            (0..1000).map(|number| keys.pick(number, &mut random)).collect();
        assert_eq!(picked, (0..10).collect());
    }

    #[test]
    fn a_seed_repeats_and_clients_differ() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.next(), random.next()]
        };
        assert_eq!(draw(1, 1), draw(1, 1));
        assert_ne!(draw(1, 1), draw(1, 2));
        assert_ne!(draw(1, 1), draw(2, 1));
    }

    #[test]
    fn watchers_are_spread_over_all_keys() {
        let watching = Watching { watchers: 10, streams: 3, keys: 4, prev_kv: false };
        let spread: Vec<u64> = (0..4).map(|key| watching.watchers_of(key)).collect();
        assert_eq!(spread, [3, 3, 2, 2]);
    }

    #[test]
    fn a_stamp_of_another_run_is_not_ours() {
        let keys = Keys { size: 8, space: 1, sequential: false };
        let load = Load::new(Work::Put { logins: false }, keys, STAMP, 0, 77);
        let mut value = [0u8; 20];
        value[..8].copy_from_slice(&77u64.to_le_bytes());
        value[8..16].copy_from_slice(&1000u64.to_le_bytes());
        assert_eq!(load.stamp(&value), Some(load.epoch + std::time::Duration::from_micros(1)));
        assert_eq!(load.stamp(&value[..15]), None);
        value[0] = 78;
        assert_eq!(load.stamp(&value), None);
    }
}
