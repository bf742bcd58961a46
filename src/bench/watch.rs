//! Watchers that know which events they must get, and see when one is lost, repeated or out of order.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use hdrhistogram::Histogram;
use quorate_proto::etcdserverpb as pb;
use rustc_hash::FxHashMap;

use super::client::{CallError, Channel, Method, Stream, encoded};
use super::tally::Tally;
use super::wire::{Malformed, WatchReply};
use super::work::Load;

/// The kind of [`super::work::Work::kinds`] under which events are recorded.
const EVENT: usize = 1;

/// Events received by all watchers of a server, and the number that somebody waits for.
#[derive(Debug)]
pub struct Delivery {
    received: AtomicU64,
    /// `u64::MAX` while nobody waits.
    target: AtomicU64,
}

impl Delivery {
    pub fn new() -> Self {
        Delivery { received: AtomicU64::new(0), target: AtomicU64::new(u64::MAX) }
    }

    pub fn received(&self) -> u64 {
        self.received.load(Ordering::SeqCst)
    }

    /// Announces what is waited for; true if it is already there. Else the watcher that receives it is
    /// told by [`Delivery::add`]: either side sees the other's write, so none is missed.
    pub fn reached(&self, target: u64) -> bool {
        self.target.store(target, Ordering::SeqCst);
        self.received() >= target
    }

    /// Nobody waits any more, and nobody need be told.
    pub fn forget(&self) {
        self.target.store(u64::MAX, Ordering::SeqCst);
    }

    /// Adds events; true if what is waited for has been received, maybe before.
    fn add(&self, events: u64) -> bool {
        let received = self.received.fetch_add(events, Ordering::SeqCst) + events;
        received >= self.target.load(Ordering::SeqCst)
    }
}

/// One watcher of a stream.
struct Watcher {
    key: Vec<u8>,
    /// `mod_revision` of its last event; a key is written at most once in a revision.
    last_revision: i64,
}

/// The watchers of one stream.
pub struct WatchStream {
    stream: Stream,
    watchers: FxHashMap<i64, Watcher>,
    prev_kv: bool,
}

impl WatchStream {
    /// Opens a stream without watchers.
    ///
    /// # Errors
    /// If the connection is lost.
    pub async fn open(channel: &mut Channel, prev_kv: bool) -> Result<Self, CallError> {
        let stream = channel.stream(Method::Watch).await?;
        Ok(WatchStream { stream, watchers: FxHashMap::default(), prev_kv })
    }

    /// Creates one watcher of `key` and waits until the server says so; records the time it took, in
    /// nanoseconds.
    ///
    /// # Errors
    /// If the server refuses, or the stream breaks.
    pub async fn watch(
        &mut self,
        key: Vec<u8>,
        created: &mut Histogram<u64>,
    ) -> Result<(), CallError> {
        let request = pb::WatchCreateRequest {
            key: Bytes::copy_from_slice(&key),
            prev_kv: self.prev_kv,
            ..Default::default()
        };
        let request = pb::WatchRequest {
            request_union: Some(pb::watch_request::RequestUnion::CreateRequest(request)),
        };
        let start = Instant::now();
        self.stream.send(encoded(&request))?;
        loop {
            let message = self.stream.next().await?;
            let reply = WatchReply::parse(&message)?;
            if reply.canceled {
                return Err(Malformed("a watcher was refused or canceled").into());
            }
            // Meanwhile somebody else may write to the keys that are already watched: not our events.
            if reply.created {
                created.saturating_record(start.elapsed().as_nanos() as u64);
                self.watchers.insert(reply.watch_id, Watcher { key, last_revision: 0 });
                return Ok(());
            }
        }
    }

    /// Receives until the stream breaks, and answers why; `reached` is called when what somebody waits
    /// for in `delivery` has come.
    pub async fn follow(
        mut self,
        load: Arc<Load>,
        tally: &RefCell<Tally>,
        delivery: &Delivery,
        reached: impl Fn(),
    ) -> CallError {
        loop {
            let message = match self.stream.next().await {
                Ok(message) => message,
                Err(error) => return error,
            };
            match self.receive(&message, &load, &mut tally.borrow_mut()) {
                Ok(0) => {}
                Ok(events) if delivery.add(events) => reached(),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
    }

    /// Counts the run's own events in one response.
    fn receive(
        &mut self,
        message: &[u8],
        load: &Load,
        tally: &mut Tally,
    ) -> Result<u64, Malformed> {
        let now = Instant::now();
        let reply = WatchReply::parse(message)?;
        if reply.canceled {
            let reason = String::from_utf8_lossy(reply.cancel_reason);
            let text = match reply.compact_revision {
                0 => format!("watcher canceled: {reason}"),
                revision => format!("watcher canceled: compacted at revision {revision} {reason}"),
            };
            tally.error(text.trim_end().to_owned(), now);
            self.watchers.remove(&reply.watch_id);
            return Ok(0);
        }
        let mut watcher = self.watchers.get_mut(&reply.watch_id);
        let mut own = 0;
        for event in reply.events() {
            let event = event?;
            let Some(start) = load.stamp(event.value).filter(|_| !event.deleted) else {
                continue; // written by somebody else
            };
            let Some(watcher) = &mut watcher else {
                tally.error("event for no watcher".into(), now);
                continue;
            };
            if event.key != watcher.key {
                tally.error("event of a key that its watcher does not watch".into(), now);
            } else if event.mod_revision <= watcher.last_revision {
                tally.error("event repeated or out of order".into(), now);
            } else {
                watcher.last_revision = event.mod_revision;
                tally.record(EVENT, start, now);
                own += 1;
            }
        }
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_the_waiting_side_or_the_last_watcher_sees_the_target() {
        let delivery = Delivery::new();
        assert!(!delivery.add(3));
        assert!(delivery.reached(3));
        assert!(!delivery.reached(5));
        assert!(!delivery.add(1));
        assert!(delivery.add(1));
        delivery.forget();
        assert!(!delivery.add(1));
        assert_eq!(delivery.received(), 6);
    }
}
