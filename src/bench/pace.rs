//! Who may send the next request, and when.
//!
//! Closed loop: a client sends when its previous reply is in, so a slow server is asked less often, and
//! what a user would have waited during a stall is measured by one request per client only. Open loop
//! (a rate): every request has a time at which it is due, whatever the server does, and its latency
//! counts from then, also if no client was free to send it. That avoids coordinated omission; a server
//! that cannot keep up shows it as latency, and as requests left unsent when the time is over.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

/// Leave to send one request.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    /// Position in the run's sequence of requests, from 0.
    pub number: u64,
    /// Latency counts from here: now, or when the request was due.
    pub start: Instant,
}

/// What all threads of a slice share.
#[derive(Clone, Debug)]
pub struct Slice {
    /// Numbers below it were given out in earlier slices.
    pub base: u64,
    /// Requests of this slice; `u64::MAX` if only the time limits it.
    pub count: u64,
    pub start: Instant,
    /// Nothing is sent after it.
    pub deadline: Option<Instant>,
    /// Requests per second over all threads; None for closed loop.
    pub rate: Option<f64>,
    /// Numbers given out so far; only used in closed loop.
    pub taken: Arc<AtomicU64>,
    /// Set when the run has failed: nobody sends any more.
    pub stop: Arc<AtomicBool>,
}

impl Slice {
    fn over(&self, now: Instant) -> bool {
        self.stop.load(Ordering::Relaxed) || self.deadline.is_some_and(|deadline| now >= deadline)
    }

    /// When request `number` of an open loop is due.
    fn due(&self, number: u64, rate: f64) -> Instant {
        self.start + Duration::from_secs_f64(number as f64 / rate)
    }
}

/// The tickets of one thread in one slice.
pub struct Supply {
    slice: Slice,
    paced: Option<Paced>,
    given: Cell<u64>,
}

struct Paced {
    rate: f64,
    /// This thread has every `threads`-th request, from `thread` on.
    thread: u64,
    threads: u64,
    next: Cell<u64>,
    /// One for each request that is due and not taken.
    permits: Semaphore,
}

impl Paced {
    fn number(&self, turn: u64) -> u64 {
        turn.saturating_mul(self.threads).saturating_add(self.thread)
    }
}

impl Supply {
    /// For thread `thread` of `threads`.
    pub fn new(slice: Slice, thread: usize, threads: usize) -> Self {
        let paced = slice.rate.map(|rate| Paced {
            rate,
            thread: thread as u64,
            threads: threads as u64,
            next: Cell::new(0),
            permits: Semaphore::new(0),
        });
        Supply { slice, paced, given: Cell::new(0) }
    }

    /// The next ticket; None when the slice is over.
    pub async fn take(&self) -> Option<Ticket> {
        let ticket = match &self.paced {
            None => {
                let start = Instant::now();
                if self.slice.over(start) {
                    return None;
                }
                let number = self.slice.taken.fetch_add(1, Ordering::Relaxed);
                (number < self.slice.count).then_some(Ticket { number, start })?
            }
            Some(paced) => {
                paced.permits.acquire().await.expect("the semaphore is never closed").forget();
                let turn = paced.next.get();
                let number = paced.number(turn);
                if number >= self.slice.count || self.slice.over(Instant::now()) {
                    return None;
                }
                paced.next.set(turn + 1);
                Ticket { number, start: self.slice.due(number, paced.rate) }
            }
        };
        self.given.set(self.given.get() + 1);
        Some(Ticket { number: self.slice.base + ticket.number, ..ticket })
    }

    /// Releases requests as they become due, then lets all `clients` of the thread go. Must run beside
    /// the clients; returns at once in closed loop.
    ///
    /// # Errors
    /// If the system has no timer left.
    pub async fn feed(&self, clients: usize) -> std::io::Result<()> {
        let Some(paced) = &self.paced else { return Ok(()) };
        let result = self.feed_due(paced).await;
        paced.permits.add_permits(clients);
        result
    }

    async fn feed_due(&self, paced: &Paced) -> std::io::Result<()> {
        let alarm = Alarm::new()?;
        let mut turn = 0;
        while paced.number(turn) < self.slice.count {
            alarm.wait_until(self.slice.due(paced.number(turn), paced.rate)).await?;
            let now = Instant::now();
            if self.slice.over(now) {
                break;
            }
            let first = turn;
            while paced.number(turn) < self.slice.count
                && self.slice.due(paced.number(turn), paced.rate) <= now
            {
                turn += 1;
            }
            paced.permits.add_permits((turn - first) as usize);
        }
        Ok(())
    }

    /// Requests of an open loop that fell due in this thread and were not sent; 0 in closed loop.
    pub fn unsent(&self) -> u64 {
        let Some(paced) = &self.paced else { return 0 };
        let due = self.slice.count.saturating_sub(paced.thread).div_ceil(paced.threads);
        due - self.given.get()
    }
}

/// Wakes a task at a point in time, to some 50 us where the runtime's own timer has steps of 1 ms.
struct Alarm {
    #[cfg(target_os = "linux")]
    timer: tokio::io::unix::AsyncFd<timer::Timer>,
}

#[cfg(target_os = "linux")]
mod timer {
    use std::os::fd::{AsFd, AsRawFd, RawFd};

    use nix::sys::timerfd::TimerFd;

    /// A file that becomes readable when the time has come.
    pub struct Timer(pub TimerFd);

    impl AsRawFd for Timer {
        fn as_raw_fd(&self) -> RawFd {
            self.0.as_fd().as_raw_fd()
        }
    }
}

#[cfg(target_os = "linux")]
impl Alarm {
    fn new() -> std::io::Result<Self> {
        use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = timer::Timer(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?);
        // SAFETY: the timer owns its descriptor, and nobody replaces or closes it while it is
        // registered.
        let timer = unsafe { tokio::io::unix::AsyncFd::register(timer) }?;
        Ok(Alarm { timer })
    }

    async fn wait_until(&self, due: Instant) -> std::io::Result<()> {
        use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
        loop {
            let wait = due.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                return Ok(());
            }
            let once = Expiration::OneShot(wait.into());
            self.timer.get_ref().0.set(once, TimerSetTimeFlags::empty())?;
            let mut guard = self.timer.readable().await?;
            // `wait` reads the count of expirations. A wake-up left over from the last setting finds
            // none; the loop then sets the timer again.
            if let Ok(read) = guard.try_io(|timer| Ok(timer.get_ref().0.wait()?)) {
                read?;
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Alarm {
    fn new() -> std::io::Result<Self> {
        Ok(Alarm {})
    }

    async fn wait_until(&self, due: Instant) -> std::io::Result<()> {
        tokio::time::sleep_until(due.into()).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(count: u64, rate: Option<f64>, deadline: Option<Duration>) -> Slice {
        let start = Instant::now();
        Slice {
            base: 100,
            count,
            start,
            deadline: deadline.map(|deadline| start + deadline),
            rate,
            taken: Arc::default(),
            stop: Arc::default(),
        }
    }

    fn on_runtime<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn a_closed_loop_gives_out_each_number_once_over_all_threads() {
        let slice = slice(3, None, None);
        let (a, b) = (Supply::new(slice.clone(), 0, 2), Supply::new(slice, 1, 2));
        on_runtime(async {
            let numbers =
                [a.take().await, b.take().await, a.take().await].map(|t| t.unwrap().number);
            assert_eq!(numbers, [100, 101, 102]);
            assert!(a.take().await.is_none() && b.take().await.is_none());
        });
        assert_eq!(a.unsent() + b.unsent(), 0);
    }

    #[test]
    fn an_open_loop_dates_requests_by_their_rate_however_late_they_are_taken() {
        let slice = slice(5, Some(1000.0), None);
        let start = slice.start;
        let supply = Supply::new(slice, 1, 2);
        on_runtime(async {
            supply.feed(1).await.unwrap();
            for number in [1, 3] {
                let ticket = supply.take().await.unwrap();
                assert_eq!(ticket.number, 100 + number);
                assert_eq!(ticket.start, start + Duration::from_millis(number));
            }
            assert!(supply.take().await.is_none());
        });
        assert_eq!(supply.unsent(), 0);
    }

    #[test]
    fn no_ticket_comes_before_it_is_due() {
        let slice = slice(20, Some(2000.0), None);
        let supply = Supply::new(slice, 0, 1);
        on_runtime(async {
            let client = async {
                while let Some(ticket) = supply.take().await {
                    assert!(ticket.start <= Instant::now());
                }
            };
            let (fed, ()) = tokio::join!(supply.feed(1), client);
            fed.unwrap();
        });
        assert_eq!(supply.unsent(), 0);
    }

    #[test]
    fn what_is_due_at_the_deadline_and_not_sent_is_counted() {
        let supply = Supply::new(slice(10, Some(10_000.0), Some(Duration::from_millis(1))), 0, 1);
        on_runtime(async {
            // No client takes a ticket while they fall due; after the deadline none is given.
            supply.feed(1).await.unwrap();
            Alarm::new().unwrap().wait_until(supply.slice.deadline.unwrap()).await.unwrap();
            assert!(supply.take().await.is_none());
        });
        assert_eq!(supply.unsent(), 10);
    }
}
