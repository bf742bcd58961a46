//! Files that are looked at again when someone connects, and what is made of them.
//!
//! A look is a `stat` of each file, and a read of those that changed. It is due a second after the
//! last one; the first connection after that has it done on a thread for blocking work, and those
//! that come meanwhile wait for the same one. So nobody is let in by what changed more than a second
//! before, an idle member does nothing, and a storm of connections costs one look a second. A disk
//! that hangs delays a handshake, and only so long: then the old state serves.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::Side;
use super::files::Seen;
use crate::metrics::Metrics;

/// Between two looks at the files.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a connection waits for a look.
const PATIENCE: Duration = Duration::from_secs(2);

/// Files, and what is made of them.
pub(super) trait Files: Send + 'static {
    type State: Send + Sync + 'static;

    /// Looks which have changed, and reads those.
    fn look(&mut self) -> Reloaded;

    /// Makes the state of what was last read.
    fn build(&self) -> Result<Self::State, String>;
}

/// What a look found; tells the log and the metrics.
pub(super) struct Reloaded {
    side: Side,
    metrics: &'static Metrics,
    pub(super) changed: bool,
}

impl Reloaded {
    pub(super) fn new(side: Side, metrics: &'static Metrics) -> Self {
        Reloaded { side, metrics, changed: false }
    }

    /// Adds what one look found of one kind of file.
    pub(super) fn add(&mut self, what: &'static str, seen: Seen) {
        let side = self.side.name();
        let count = |result| self.metrics.tls_reloads.with(&[side, what, result]).increment(1);
        match seen {
            Seen::Same => {}
            Seen::Changed => {
                self.changed = true;
                count("done");
                tracing::info!(side, file = what, "reloaded a TLS file");
            }
            Seen::Bad(error) => {
                count("failed");
                tracing::warn!(side, file = what, error, "cannot reload a TLS file");
            }
        }
    }
}

/// The state that the files were last good for.
pub(super) struct Reloader<S: Send + Sync + 'static>(Arc<Inner<S>>);

struct Inner<S: Send + Sync + 'static> {
    state: ArcSwapOption<S>,
    files: Mutex<Box<dyn Files<State = S>>>,
    /// When the last look ended, after `born`.
    looked: watch::Sender<Duration>,
    looking: AtomicBool,
    born: Instant,
}

impl<S: Send + Sync + 'static> Reloader<S> {
    /// Begins with `state`; without one, it is made for who comes first.
    pub(super) fn new(files: impl Files<State = S>, state: Option<S>) -> Self {
        Reloader(Arc::new(Inner {
            state: ArcSwapOption::new(state.map(Arc::new)),
            files: Mutex::new(Box::new(files)),
            looked: watch::Sender::new(Duration::ZERO),
            looking: AtomicBool::new(false),
            born: Instant::now(),
        }))
    }

    /// The state, of files that were looked at within the last second.
    ///
    /// # Errors
    /// If there has never been one, and why.
    pub(super) async fn now(&self) -> io::Result<Arc<S>> {
        let inner = &self.0;
        let now = inner.born.elapsed();
        let state = inner.state.load();
        if let Some(state) = &*state
            && now < *inner.looked.borrow() + INTERVAL
        {
            return Ok(state.clone());
        }
        drop(state);
        let mut looked = inner.looked.subscribe();
        if !inner.looking.swap(true, Ordering::AcqRel) {
            let inner = inner.clone();
            tokio::task::spawn_blocking(move || inner.look());
        }
        let fresh = looked.wait_for(|looked| *looked >= now);
        if tokio::time::timeout(PATIENCE, fresh).await.is_err() {
            tracing::warn!("looking at the TLS files takes long; going on with what was read");
        }
        inner.state.load_full().ok_or_else(|| io::Error::other("TLS could not be set up"))
    }
}

impl<S: Send + Sync + 'static> Inner<S> {
    fn look(&self) {
        let mut files = self.files.lock();
        let found = files.look();
        if found.changed || self.state.load().is_none() {
            match files.build() {
                Ok(state) => self.state.store(Some(Arc::new(state))),
                Err(error) => {
                    tracing::warn!(error, "cannot set up TLS with what was read");
                }
            }
        }
        drop(files);
        // In this order: who finds no look under way starts one.
        self.looking.store(false, Ordering::Release);
        self.looked.send_replace(self.born.elapsed());
    }
}
