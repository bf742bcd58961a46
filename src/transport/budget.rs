//! What clients make a member hold in memory, and whose connection ends when that is too much.
//!
//! Some memory is freed only when a client moves: a message of which it has not sent the rest, a
//! response that it does not read. Each connection has an [`Account`] of such bytes, and the port a
//! [`Budget`] for all accounts. As long as the sum is within the limit, nobody is asked anything. Above
//! it, what would add much has to wait, and the connections that have not moved for a while are
//! closed, first those that hold most for longest. A client that reads and writes at any reasonable
//! speed is not among them.
//!
//! Calls are counted in the same way: each costs some memory for as long as it is open, however little
//! it says. So are connections themselves: at their limit, those that say nothing make room.
//!
//! An account tells its budget only of changes of some size, so that a request costs no write to memory
//! that all threads share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::metrics::Metrics;

/// Bytes that all clients together may make a member hold before it looks who is to blame.
pub const HELD_MAX: usize = 256 << 20;
/// Open calls of all clients together where there are few connections. Each takes a few kilobytes.
pub const CALLS_MAX: usize = 1 << 15;
/// Open calls for each connection that there may be, where these are many.
pub const CALLS_PER_CONNECTION: usize = 2;
/// A connection has to have as many for it to be closed so that others can call.
const CALLS_BLAMED: usize = 1 << 10;

/// Bytes by which an account's sum changes before its budget hears of it.
const BYTES_GRAIN: usize = 64 << 10;
/// The same for calls.
const CALLS_GRAIN: usize = 64;
/// Bytes that a client must take or complete to count as moving.
const MOVED_MIN: usize = 64 << 10;
/// How long a connection may hold bytes and not move before it may be closed.
const STALLED: Duration = Duration::from_secs(1);
/// Time between two looks at all connections while there is too much.
const RELIEF_INTERVAL: Duration = Duration::from_millis(20);
/// How long one that has never called may be open before it makes room for another.
const SILENT: Duration = Duration::from_secs(1);
/// The same for one that has.
const IDLE: Duration = Duration::from_secs(5);
/// What a connection within its share may go on to do above the limit: so many times that.
const SHARED_FACTOR: usize = 4;
/// How long a call that may read much waits for others to make room.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);

/// A sum of which the budget knows all but less than a grain.
#[derive(Default)]
struct Share {
    now: AtomicUsize,
    told: AtomicUsize,
}

impl Share {
    /// Adds and answers the new sum.
    fn add(&self, by: usize, grain: usize, total: &AtomicUsize) -> usize {
        let now = self.now.fetch_add(by, Ordering::Relaxed) + by;
        self.tell(now, grain, total);
        now
    }

    fn sub(&self, by: usize, grain: usize, total: &AtomicUsize) -> usize {
        let now = self.now.fetch_sub(by, Ordering::Relaxed) - by;
        self.tell(now, grain, total);
        now
    }

    fn tell(&self, now: usize, grain: usize, total: &AtomicUsize) {
        let told = self.told.load(Ordering::Relaxed);
        if now.abs_diff(told) < grain {
            return;
        }
        // Whoever loses a race leaves it to the winner, who was told of nearly the same.
        if self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            match now >= told {
                true => total.fetch_add(now - told, Ordering::Relaxed),
                false => total.fetch_sub(told - now, Ordering::Relaxed),
            };
        }
    }

    fn close(&self, total: &AtomicUsize) {
        total.fetch_sub(self.told.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    fn get(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }
}

/// How a connection is to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// At once: its memory is needed.
    Now,
    /// With a word, and after the calls that are under way.
    Gracefully,
}

const STAYS: u8 = 0;
const ENDS_GRACEFULLY: u8 = 1;
const ENDS_NOW: u8 = 2;

/// What one connection makes the member hold.
pub struct Account {
    budget: Arc<Budget>,
    id: u64,
    /// Who is at the other end, if that has an address.
    remote: Option<SocketAddr>,
    /// Bytes that the connection may hold and still go on when all together hold too much.
    share: usize,
    bytes: Share,
    calls: Share,
    /// Bytes let go since `moved_at`.
    moved: AtomicUsize,
    /// Milliseconds of the budget's clock: since when the connection holds bytes and has not moved.
    moved_at: AtomicU64,
    /// Likewise: its last call's beginning or end, at first its own.
    used_at: AtomicU64,
    has_called: AtomicBool,
    end: AtomicU8,
    ending: Notify,
}

impl Account {
    /// The budget that this is a part of.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Which of all connections this is.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Who is at the other end, if that has an address.
    pub fn remote(&self) -> Option<SocketAddr> {
        self.remote
    }

    /// Bytes that the connection holds.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.bytes.get()
    }

    /// Whether the connection holds more than it may while all together hold too much.
    pub fn is_above_share(&self) -> bool {
        self.bytes.get() > self.share
    }

    /// Waits until there is room: for calls that may read much.
    ///
    /// # Errors
    /// If those who hold too much do not make room in time.
    pub async fn room(&self) -> Result<(), Crowded> {
        let deadline = tokio::time::Instant::now() + ROOM_PATIENCE;
        loop {
            let factor = if self.is_above_share() { 1 } else { SHARED_FACTOR };
            let budget = &self.budget;
            if budget.bytes.load(Ordering::Relaxed) <= factor * budget.bytes_max {
                return Ok(());
            }
            budget.relieve();
            if tokio::time::Instant::now() >= deadline {
                return Err(Crowded);
            }
            tokio::time::sleep(RELIEF_INTERVAL).await;
        }
    }

    /// Holds `bytes` until the charge is dropped.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Charge {
        let mut charge = Charge { account: self.clone(), bytes: 0 };
        charge.set(bytes);
        charge
    }

    /// Opens a call; `None` if there are too many.
    pub fn call(self: &Arc<Self>) -> Option<Call> {
        let budget = &self.budget;
        if budget.calls.load(Ordering::Relaxed) >= budget.calls_max && !budget.relieve_calls() {
            return None;
        }
        self.calls.add(1, CALLS_GRAIN, &budget.calls);
        self.has_called.store(true, Ordering::Relaxed);
        Some(Call(self.clone()))
    }

    fn add(&self, bytes: usize) {
        let now = self.bytes.add(bytes, BYTES_GRAIN, &self.budget.bytes);
        if now == bytes {
            self.restart_clock();
        }
        if self.budget.is_crowded() {
            self.budget.relieve();
        }
    }

    fn sub(&self, bytes: usize) {
        let now = self.bytes.sub(bytes, BYTES_GRAIN, &self.budget.bytes);
        if now > 0 && self.moved.fetch_add(bytes, Ordering::Relaxed) + bytes >= MOVED_MIN {
            self.restart_clock();
        }
    }

    fn restart_clock(&self) {
        self.moved.store(0, Ordering::Relaxed);
        self.moved_at.store(self.budget.now(), Ordering::Relaxed);
    }

    /// Waits until this connection is asked to end.
    pub async fn ended(&self) -> End {
        loop {
            match self.end.load(Ordering::Acquire) {
                STAYS => self.ending.notified().await,
                ENDS_NOW => return End::Now,
                _ => return End::Gracefully,
            }
        }
    }

    /// Waits until this connection is asked to end at once, whatever it was asked before.
    pub async fn ended_now(&self) {
        while self.end.load(Ordering::Acquire) != ENDS_NOW {
            self.ending.notified().await;
        }
    }

    /// About `time`, a tenth more or less: connections that began together do not end together.
    pub fn spread(&self, time: Duration) -> Duration {
        // Fibonacci hashing: consecutive numbers come out far apart.
        let part = (self.id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as f64 / f64::from(u32::MAX);
        time.mul_f64(0.9 + part / 5.0)
    }

    fn ask_to_end(&self, end: End) {
        let end = match end {
            End::Now => ENDS_NOW,
            End::Gracefully => ENDS_GRACEFULLY,
        };
        if self.end.fetch_max(end, Ordering::AcqRel) < end {
            self.ending.notify_one();
        }
    }

    fn stays(&self) -> bool {
        self.end.load(Ordering::Acquire) == STAYS
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.bytes.close(&self.budget.bytes);
        self.calls.close(&self.budget.calls);
        self.budget.accounts.lock().remove(&self.id);
    }
}

/// Bytes held on an account.
pub struct Charge {
    account: Arc<Account>,
    bytes: usize,
}

impl Charge {
    /// Holds so many from now on.
    pub fn set(&mut self, bytes: usize) {
        match bytes >= self.bytes {
            true if bytes == self.bytes => {}
            true => self.account.add(bytes - self.bytes),
            false => self.account.sub(self.bytes - bytes),
        }
        self.bytes = bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// A call that is open.
pub struct Call(Arc<Account>);

impl Drop for Call {
    fn drop(&mut self) {
        let Account { calls, budget, used_at, .. } = &*self.0;
        if calls.sub(1, CALLS_GRAIN, &budget.calls) == 0 {
            used_at.store(budget.now(), Ordering::Relaxed);
        }
    }
}

/// What all connections of a port may make the member hold.
pub struct Budget {
    bytes: AtomicUsize,
    bytes_max: usize,
    calls: AtomicUsize,
    calls_max: usize,
    accounts: Mutex<BTreeMap<u64, Weak<Account>>>,
    next: AtomicU64,
    /// When all connections were last looked at.
    relieved_at: AtomicU64,
    started: Instant,
    /// Whether the last look at the calls found a connection to close.
    blames: AtomicBool,
    closed: Counter,
}

impl Budget {
    /// A budget of so many bytes and calls.
    pub fn new(bytes_max: usize, calls_max: usize, metrics: &Metrics) -> Arc<Self> {
        Arc::new(Budget {
            bytes: AtomicUsize::new(0),
            bytes_max,
            calls: AtomicUsize::new(0),
            calls_max,
            accounts: Mutex::default(),
            next: AtomicU64::new(0),
            relieved_at: AtomicU64::new(0),
            started: Instant::now(),
            blames: AtomicBool::new(false),
            closed: metrics.connections_closed_for_room.clone(),
        })
    }

    /// The account of a new connection, which may hold `share` bytes and go on when all together hold
    /// too much: more than a single request has.
    pub fn open(self: &Arc<Self>, remote: Option<SocketAddr>, share: usize) -> Arc<Account> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let now = self.now();
        let account = Arc::new(Account {
            budget: self.clone(),
            id,
            remote,
            share,
            bytes: Share::default(),
            calls: Share::default(),
            moved: AtomicUsize::new(0),
            moved_at: AtomicU64::new(now),
            used_at: AtomicU64::new(now),
            has_called: AtomicBool::new(false),
            end: AtomicU8::new(STAYS),
            ending: Notify::new(),
        });
        self.accounts.lock().insert(id, Arc::downgrade(&account));
        account
    }

    /// Milliseconds since the budget began.
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Whether more is held than may be.
    pub fn is_crowded(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > self.bytes_max
    }

    /// All that are still to stay. They are let go of outside of the lock, which the last owner of an
    /// account takes.
    fn staying(&self) -> Vec<Arc<Account>> {
        let accounts = self.accounts.lock();
        let all: Vec<_> = accounts.values().filter_map(Weak::upgrade).collect();
        drop(accounts);
        all.into_iter().filter(|account| account.stays()).collect()
    }

    /// Whether it is time to look at all connections again, and this thread's turn.
    fn may_look(&self, now: u64) -> bool {
        let last = self.relieved_at.load(Ordering::Relaxed);
        u128::from(now.saturating_sub(last)) >= RELIEF_INTERVAL.as_millis()
            && self
                .relieved_at
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Closes connections that hold bytes and do not move, as many as it takes.
    pub fn relieve(&self) {
        let now = self.now();
        if !self.is_crowded() || !self.may_look(now) {
            return;
        }
        let mut excess = self.bytes.load(Ordering::Relaxed).saturating_sub(self.bytes_max / 4 * 3);
        let mut stalled: Vec<_> = self
            .staying()
            .into_iter()
            .map(|account| {
                let since = now.saturating_sub(account.moved_at.load(Ordering::Relaxed));
                (account.bytes.get(), since, account)
            })
            .filter(|(held, since, _)| *held > 0 && u128::from(*since) >= STALLED.as_millis())
            .collect();
        stalled
            .sort_by_key(|(held, since, _)| std::cmp::Reverse(*held as u128 * u128::from(*since)));
        for (held, since, account) in stalled {
            if excess == 0 {
                break;
            }
            excess = excess.saturating_sub(held);
            self.closed.increment(1);
            tracing::warn!(
                remote = account.remote.map_or_else(String::new, |remote| remote.to_string()),
                "held-bytes" = held,
                "stalled-ms" = since,
                "closed a connection whose client neither reads nor finishes what it sends, to make \
                 room for others"
            );
            account.ask_to_end(End::Now);
        }
    }

    /// Closes the connection with most calls; answers whether there is one to blame.
    fn relieve_calls(&self) -> bool {
        if !self.may_look(self.now()) {
            return self.blames.load(Ordering::Relaxed);
        }
        let staying = self.staying();
        let most = staying.iter().max_by_key(|account| account.calls.get());
        let most = most.filter(|account| account.calls.get() >= CALLS_BLAMED);
        self.blames.store(most.is_some(), Ordering::Relaxed);
        let Some(most) = most else { return false };
        self.closed.increment(1);
        tracing::warn!(
            remote = most.remote.map_or_else(String::new, |remote| remote.to_string()),
            calls = most.calls.get(),
            "closed the connection with most open calls, to make room for others"
        );
        most.ask_to_end(End::Now);
        true
    }

    /// Asks one connection that says nothing to end, so that another can be accepted.
    pub fn make_room(&self) {
        let now = self.now();
        let idle = self.staying().into_iter().filter(|account| account.calls.get() == 0);
        let longest = idle
            .map(|account| {
                let since = now.saturating_sub(account.used_at.load(Ordering::Relaxed));
                (account.has_called.load(Ordering::Relaxed), since, account)
            })
            .filter(|(has_called, since, _)| {
                u128::from(*since) >= if *has_called { IDLE } else { SILENT }.as_millis()
            })
            .max_by_key(|(has_called, since, _)| (!has_called, *since));
        if let Some((has_called, _, account)) = longest {
            self.closed.increment(1);
            account.ask_to_end(if has_called { End::Gracefully } else { End::Now });
        }
    }
}

/// There is no room for what a call may read.
#[derive(Debug)]
pub struct Crowded;

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(bytes_max: usize, calls_max: usize) -> Arc<Budget> {
        Budget::new(bytes_max, calls_max, &Metrics::new())
    }

    fn end(account: &Account) -> u8 {
        account.end.load(Ordering::Acquire)
    }

    /// A budget whose clock has run for a while.
    fn later(budget: &mut Arc<Budget>) {
        let budget = Arc::get_mut(budget).expect("nobody else has it yet");
        budget.started -= Duration::from_secs(10);
    }

    #[test]
    fn what_is_held_is_known_but_for_a_grain_and_is_let_go() {
        let budget = budget(1 << 30, 10);
        let account = budget.open(None, 1 << 20);
        let mut charge = account.hold(BYTES_GRAIN - 1);
        assert_eq!(budget.bytes.load(Ordering::Relaxed), 0);
        charge.set(3 * BYTES_GRAIN);
        assert_eq!(budget.bytes.load(Ordering::Relaxed), 3 * BYTES_GRAIN);
        let second = account.hold(5);
        charge.set(2 * BYTES_GRAIN);
        assert_eq!(account.bytes.get(), 2 * BYTES_GRAIN + 5);
        drop((charge, second));
        assert_eq!(account.bytes.get(), 0);
        drop(account);
        assert_eq!(budget.bytes.load(Ordering::Relaxed), 0);
        assert!(budget.accounts.lock().is_empty());
    }

    #[test]
    fn who_holds_most_for_longest_goes_first_and_who_moves_stays() {
        let mut budget = budget(100 << 20, 10);
        later(&mut budget);
        let [moving, small, large, young] = [0; 4].map(|_| budget.open(None, 1 << 20));
        let charges = [
            moving.hold(40 << 20),
            small.hold(1 << 20),
            large.hold(30 << 20),
            young.hold(20 << 20),
        ];
        for (account, time) in [(&small, 9), (&large, 8), (&young, 0), (&moving, 0)] {
            account.moved_at.store(budget.now() - time * 1000, Ordering::Relaxed);
        }
        budget.relieve();
        assert!([&moving, &small, &large, &young].iter().all(|account| account.stays()));
        let more = moving.hold(20 << 20);
        assert!(budget.is_crowded());
        budget.relieved_at.store(0, Ordering::Relaxed);
        budget.relieve();
        let ends = [&moving, &small, &large, &young].map(|account| end(account));
        // The large one is not enough for a quarter of room, and the small one has stood still too.
        assert_eq!(ends, [STAYS, ENDS_NOW, ENDS_NOW, STAYS]);
        drop((charges, more));
    }

    #[test]
    fn letting_go_of_much_is_moving_and_of_little_is_not() {
        let mut budget = budget(1 << 30, 10);
        later(&mut budget);
        let account = budget.open(None, 1 << 20);
        let mut charge = account.hold(1 << 20);
        account.moved_at.store(0, Ordering::Relaxed);
        charge.set((1 << 20) - 100);
        assert_eq!(account.moved_at.load(Ordering::Relaxed), 0);
        charge.set(1 << 19);
        assert!(account.moved_at.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn too_many_calls_are_refused_unless_one_connection_is_to_blame() {
        let budget = budget(1 << 30, CALLS_BLAMED);
        let accounts: Vec<_> =
            (0..CALLS_BLAMED / CALLS_GRAIN).map(|_| budget.open(None, 1)).collect();
        let open = |account: &Arc<Account>, count: usize| {
            (0..count).map(|_| account.call()).collect::<Option<Vec<_>>>()
        };
        let calls: Vec<_> =
            accounts.iter().map(|account| open(account, CALLS_GRAIN).expect("room")).collect();
        std::thread::sleep(2 * RELIEF_INTERVAL);
        assert!(accounts[0].call().is_none(), "all have as many: nobody is to blame");
        drop(calls);
        let greedy = open(&accounts[1], CALLS_BLAMED).expect("there is room again");
        std::thread::sleep(2 * RELIEF_INTERVAL);
        assert!(accounts[0].call().is_some());
        assert_eq!((end(&accounts[0]), end(&accounts[1])), (STAYS, ENDS_NOW));
        drop(greedy);
    }

    #[test]
    fn the_longest_silent_makes_room_before_the_longest_idle() {
        let mut budget = budget(1 << 30, 10);
        later(&mut budget);
        let [busy, idle, silent, new] = [0; 4].map(|_| budget.open(None, 1));
        let call = busy.call().expect("there is room");
        drop(idle.call());
        for (account, age) in [(&busy, 9000), (&idle, 8000), (&silent, 2000), (&new, 10)] {
            account.used_at.store(budget.now() - age, Ordering::Relaxed);
        }
        budget.make_room();
        assert_eq!([&busy, &idle, &silent, &new].map(|a| end(a)), [STAYS, STAYS, ENDS_NOW, STAYS]);
        budget.make_room();
        assert_eq!(end(&idle), ENDS_GRACEFULLY);
        budget.make_room();
        assert_eq!([&busy, &new].map(|a| end(a)), [STAYS, STAYS]);
        drop(call);
    }

    #[test]
    fn ages_are_spread_by_a_tenth() {
        let budget = budget(1 << 30, 10);
        let ages: Vec<_> = (0..100)
            .map(|_| budget.open(None, 1).spread(Duration::from_secs(100)).as_secs())
            .collect();
        assert!(ages.iter().all(|age| (90..=110).contains(age)), "{ages:?}");
        assert!(ages.iter().any(|age| *age < 95) && ages.iter().any(|age| *age > 105), "{ages:?}");
    }
}
