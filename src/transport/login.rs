//! Passwords: hashed and compared on threads of their own, which give way to the others.
//!
//! bcrypt is slow on purpose, tens of milliseconds by default. Whoever logs in waits in a queue that is
//! bounded in number; a server that answers puts goes on doing so whatever the crowd at its door.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;
use tonic::Status;

use super::status;
use crate::core::auth::password;

/// Jobs that may wait, a thread. At the default cost a thread does some twenty in a second, so that the
/// last one is done before its caller gives up.
const WAITING_MAX: usize = 128;

struct Job {
    /// Held by the caller for as long as it waits.
    wanted: Weak<()>,
    run: Box<dyn FnOnce() + Send>,
}

impl Job {
    fn is_wanted(&self) -> bool {
        self.wanted.strong_count() > 0
    }
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Job>,
    /// Nobody will add to it.
    closed: bool,
    started: bool,
}

struct Inner {
    queue: Mutex<Queue>,
    more: Condvar,
}

/// The threads, and who waits for them. They begin with the first job and end with this value.
pub struct Passwords {
    inner: Arc<Inner>,
    threads: usize,
    cost: u32,
    /// Compared with where there is no hash to compare with: nobody learns from the time it takes
    /// whether a user exists.
    decoy: String,
}

impl Passwords {
    /// Threads are half of the processors, at least one; `cost` is that of hashes made here.
    pub fn new(cost: u32) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Passwords::with_threads((cores / 2).max(1), cost)
    }

    fn with_threads(threads: usize, cost: u32) -> Self {
        let inner = Inner { queue: Mutex::default(), more: Condvar::new() };
        // A salt and a hash of nothing but zero bits: no password is known that has it.
        let decoy = format!("$2a${cost:02}${}", ".".repeat(53));
        Passwords { inner: Arc::new(inner), threads, cost, decoy }
    }

    /// The hash of a password, as it goes into the log: the password itself never does.
    ///
    /// # Errors
    /// If the password is too long, or too many wait; what bcrypt says.
    pub async fn hash(&self, clear: String) -> Result<String, Status> {
        if clear.len() > password::BYTES_MAX {
            return Err(status::password_too_long());
        }
        let cost = self.cost;
        match self.run(move || bcrypt::hash_with_result(clear, cost)).await? {
            Ok(hash) => Ok(password::proposed(&hash)),
            Err(error) => Err(Status::unknown(error.to_string())),
        }
    }

    /// Whether a password is the one of this hash; it is not, and that takes as long, if there is none.
    ///
    /// # Errors
    /// If too many wait.
    pub async fn compare(&self, clear: String, hash: Option<String>) -> Result<bool, Status> {
        let decoy = self.decoy.clone();
        self.run(move || is_right(&clear, hash.as_deref(), &decoy)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        let (reply, done) = oneshot::channel();
        let waits = Arc::new(());
        let run = Box::new(move || drop(reply.send(job())));
        let job = Job { wanted: Arc::downgrade(&waits), run };
        {
            let mut queue = self.inner.queue.lock();
            let max = WAITING_MAX * self.threads;
            if queue.waiting.len() >= max {
                queue.waiting.retain(Job::is_wanted);
            }
            if queue.waiting.len() >= max {
                return Err(status::too_many_requests());
            }
            if !queue.started {
                self.start()?;
                queue.started = true;
            }
            queue.waiting.push_back(job);
        }
        self.inner.more.notify_one();
        done.await.map_err(|_| status::stopped())
    }

    fn start(&self) -> Result<(), Status> {
        for _ in 0..self.threads {
            let inner = self.inner.clone();
            let thread = std::thread::Builder::new().name("passwords".into());
            let started = thread.spawn(move || work(&inner));
            started.map_err(|error| Status::unknown(format!("cannot start a thread: {error}")))?;
        }
        Ok(())
    }
}

impl Drop for Passwords {
    fn drop(&mut self) {
        self.inner.queue.lock().closed = true;
        self.inner.more.notify_all();
    }
}

fn work(inner: &Inner) {
    give_way();
    let mut queue = inner.queue.lock();
    loop {
        if let Some(job) = queue.waiting.pop_front() {
            // A caller that has given up is no work.
            if job.is_wanted() {
                MutexGuard::unlocked(&mut queue, job.run);
            }
        } else if queue.closed {
            return;
        } else {
            inner.more.wait(&mut queue);
        }
    }
}

/// Whether `clear` is the password of `hash`. Without one, `decoy` is compared with for the time it takes.
fn is_right(clear: &str, hash: Option<&str>, decoy: &str) -> bool {
    match hash.map(|hash| bcrypt::verify(clear, hash)) {
        Some(Ok(right)) => right,
        None | Some(Err(_)) => {
            std::hint::black_box(bcrypt::verify(clear, decoy)).ok();
            false
        }
    }
}

/// How far the threads stand back. A thread that answers puts gets five times their share of a core that
/// both want. Not further: on a machine that is busy with something else, nobody could log in any more.
const NICE: i32 = 7;

/// Lowers the priority of this thread.
fn give_way() {
    // SAFETY: it takes a number and touches no memory. On Linux it is the calling thread's priority.
    let nice = unsafe { libc::nice(NICE) };
    if nice == -1 {
        // Only competes as any other thread then.
        tracing::debug!("the threads that hash passwords keep their priority");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const CLEAR: &str = "secret";

    fn stored(clear: &str, cost: u32) -> String {
        bcrypt::hash_with_result(clear, cost).unwrap().to_string()
    }

    #[tokio::test]
    async fn only_the_right_password_is_right() {
        let passwords = Passwords::with_threads(1, 4);
        let compare = async |clear: &str, hash: Option<&str>| {
            passwords.compare(clear.into(), hash.map(Into::into)).await.unwrap()
        };
        let hash = stored(CLEAR, 4);
        assert!(compare(CLEAR, Some(&hash)).await);
        assert!(!compare("other", Some(&hash)).await);
        for hash in [None, Some(""), Some("no hash"), Some(&passwords.decoy)] {
            for clear in ["", CLEAR] {
                assert!(!compare(clear, hash).await, "{clear:?} {hash:?}");
            }
        }
        let proposed = passwords.hash(CLEAR.into()).await.unwrap();
        assert!(!proposed.contains(CLEAR));
        let long = passwords.hash("x".repeat(password::BYTES_MAX + 1)).await;
        assert_eq!(long.unwrap_err().message(), status::password_too_long().message());
    }

    /// Time that this thread has worked: unlike that of a clock on the wall, no other program adds to it.
    fn worked() -> Duration {
        use nix::time::{ClockId, clock_gettime};
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
    }

    #[test]
    fn who_does_not_exist_takes_as_long_to_refuse() {
        // A cost at which the work is far above what else is done.
        let passwords = Passwords::with_threads(1, 8);
        let hash = stored(CLEAR, 8);
        let time = |hash: Option<&str>| {
            let once = || {
                let started = worked();
                assert!(!is_right("wrong", hash, &passwords.decoy));
                worked() - started
            };
            (0..5).map(|_| once()).min().unwrap()
        };
        let known = time(Some(&hash));
        for hash in [None, Some(""), Some("no hash")] {
            let unknown = time(hash);
            assert!(unknown * 2 > known && known * 2 > unknown, "{known:?} against {unknown:?}");
        }
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_those_who_leave_make_room() {
        let passwords = Arc::new(Passwords::with_threads(1, 4));
        let (release, held) = mpsc::channel::<()>();
        let (entered, working) = oneshot::channel();
        let blocking = tokio::spawn({
            let passwords = passwords.clone();
            async move {
                let job = move || {
                    entered.send(()).unwrap();
                    held.recv().unwrap();
                };
                passwords.run(job).await
            }
        });
        working.await.unwrap();
        let waiting: Vec<_> = (0..WAITING_MAX)
            .map(|n| {
                let passwords = passwords.clone();
                tokio::spawn(async move { passwords.run(move || n).await })
            })
            .collect();
        while passwords.inner.queue.lock().waiting.len() < WAITING_MAX {
            tokio::task::yield_now().await;
        }
        let refused = passwords.run(|| ()).await.unwrap_err();
        assert_eq!(refused.message(), status::too_many_requests().message());
        for waits in &waiting[1..] {
            waits.abort();
        }
        let last = tokio::spawn({
            let passwords = passwords.clone();
            async move { passwords.run(|| 7).await }
        });
        while passwords.inner.queue.lock().waiting.len() > 2 {
            tokio::task::yield_now().await;
        }
        release.send(()).unwrap();
        blocking.await.unwrap().unwrap();
        assert_eq!(last.await.unwrap().unwrap(), 7);
        for (n, waits) in waiting.into_iter().enumerate() {
            match waits.await {
                Ok(done) => assert_eq!((n, done.unwrap()), (0, 0)),
                Err(error) => assert!(error.is_cancelled()),
            }
        }
    }
}
