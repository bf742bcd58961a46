//! How many handshakes a listener has under way.
//!
//! A handshake costs memory, and time of the thread that does it, before anyone knows who asks. Each
//! has [`HANDSHAKE_TIMEOUT`]; of more than [`HANDSHAKES_MAX`] at once, the oldest gives way to the
//! newest. Who holds a connection open and says nothing is always among the oldest, while a client that
//! means it is through in a few round trips.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Time for a whole handshake (operations 5.1).
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way on one listener.
pub const HANDSHAKES_MAX: usize = 256;

/// The handshakes of one listener.
#[derive(Clone)]
pub struct Handshakes(Arc<Mutex<Queue>>);

struct Queue {
    max: usize,
    time: Duration,
    next: u64,
    /// Oldest first.
    waiting: VecDeque<(u64, oneshot::Sender<()>)>,
}

impl Default for Handshakes {
    fn default() -> Self {
        Handshakes::new(HANDSHAKES_MAX, HANDSHAKE_TIMEOUT)
    }
}

impl Handshakes {
    /// Lets `max`, at least 1, go on at once, each for `time`.
    pub fn new(max: usize, time: Duration) -> Self {
        let queue = Queue { max: max.max(1), time, next: 0, waiting: VecDeque::new() };
        Handshakes(Arc::new(Mutex::new(queue)))
    }

    /// Begins one; the oldest is ended if there are too many.
    pub fn begin(&self) -> Offered {
        let (sender, over) = oneshot::channel();
        let mut queue = self.0.lock();
        if queue.waiting.len() >= queue.max {
            // It hears of it by the sender that is gone.
            queue.waiting.pop_front();
        }
        let (id, time) = (queue.next, queue.time);
        queue.next += 1;
        queue.waiting.push_back((id, sender));
        drop(queue);
        Offered { handshakes: self.clone(), id, time, over }
    }

    /// Handshakes under way.
    pub fn under_way(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

/// A handshake's place, until it is dropped.
pub struct Offered {
    handshakes: Handshakes,
    id: u64,
    time: Duration,
    over: oneshot::Receiver<()>,
}

/// Why a handshake was not let finish.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    #[error("TLS handshake takes longer than {0:?}")]
    TooLong(Duration),
    #[error("too many TLS handshakes: the oldest gives way")]
    GaveWay,
}

impl Offered {
    /// Runs `handshake` within its time and place.
    ///
    /// # Errors
    /// If it was not let finish.
    pub async fn run<T>(mut self, handshake: impl Future<Output = T>) -> Result<T, Ended> {
        tokio::select! {
            biased;
            done = handshake => Ok(done),
            _ = &mut self.over => Err(Ended::GaveWay),
            () = tokio::time::sleep(self.time) => Err(Ended::TooLong(self.time)),
        }
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        let mut queue = self.handshakes.0.lock();
        // They are in order of their numbers.
        if let Ok(at) = queue.waiting.binary_search_by_key(&self.id, |(id, _)| *id) {
            queue.waiting.remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_gives_way_and_none_takes_longer_than_its_time() {
        let time = Duration::from_millis(50);
        let handshakes = Handshakes::new(2, time);
        let [first, second] = [handshakes.begin(), handshakes.begin()];
        assert_eq!(second.run(std::future::ready(7)).await, Ok(7));
        assert_eq!(handshakes.under_way(), 1);
        let [second, third] = [handshakes.begin(), handshakes.begin()];
        assert_eq!(handshakes.under_way(), 2);
        let never = std::future::pending::<()>;
        assert_eq!(first.run(never()).await, Err(Ended::GaveWay));
        assert_eq!(second.run(never()).await, Err(Ended::TooLong(time)));
        drop(third);
        assert_eq!(handshakes.under_way(), 0);
    }
}
