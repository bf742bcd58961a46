//! The watch hub's shell: events in, responses to the streams that match.
//!
//! in:  `Events` from actors/applier.rs, while there are streams; `Open`, `Ask`, `Delivered`, `Close` from
//!      transport/grpc/watch.rs
//! out: responses into each stream's own channel, whose depth the hub's credits bound

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix::prelude::*;
use quorate_proto::etcdserverpb::{WatchRequest, WatchResponse};
use tokio::sync::mpsc;

use crate::actors::exit::Exit;
use crate::actors::shared::{Shared, SharedHistory};
use crate::core::event::{Event, HistoryError};
use crate::core::watch::{CancelReason, Hub, StreamId};
use crate::metrics::Metrics;

/// Changes just applied: whole main revisions, in order, up to `revision`.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Events {
    pub revision: i64,
    /// `None` if the hub is too far behind to be told: watchers then read them from history.
    pub events: Option<Vec<Event>>,
    /// A compaction at this revision took effect among them.
    pub compacted: Option<i64>,
    /// What the events count in the [`Backlog`].
    pub bytes: usize,
}

/// Bytes of changes that may wait for the hub. A store that changes faster than its watchers are
/// served must not fill the memory with what is in the engine anyway.
const BACKLOG_BYTES: usize = 64 << 20;

/// What of the hub's mailbox is changes: the applier counts them in, the hub counts them out.
#[derive(Default)]
pub struct Backlog(AtomicUsize);

impl Backlog {
    /// A message for the hub that has room for it.
    pub fn pack(&self, revision: i64, events: Vec<Event>, compacted: Option<i64>) -> Events {
        let size = |event: &Event| size_of::<Event>() + event.key.len() + event.kv.0.len();
        let bytes = events.iter().map(size).sum();
        if self.0.fetch_add(bytes, Ordering::AcqRel) > BACKLOG_BYTES {
            self.0.fetch_sub(bytes, Ordering::AcqRel);
            return Events { revision, events: None, compacted, bytes: 0 };
        }
        Events { revision, events: Some(events), compacted, bytes }
    }

    /// The hub has taken a message.
    fn taken(&self, events: &Events) {
        self.0.fetch_sub(events.bytes, Ordering::AcqRel);
    }
}

/// A client opened a stream; its responses go into `responses`.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Open {
    pub stream: StreamId,
    /// Unbounded as a type; the hub keeps at most 128 responses of events in flight in it.
    pub responses: mpsc::UnboundedSender<WatchResponse>,
}

/// A request of a stream. Answers whether the stream has room, so that its next one is to be read.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct Ask {
    pub stream: StreamId,
    pub request: WatchRequest,
    /// Whether the client may have the watcher that the request creates, if it does.
    pub permission: Result<(), CancelReason>,
}

/// Whether a stream has room for answers. One that is closed has: nothing is kept for it.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct HasRoom(pub StreamId);

/// The stream has handed this many responses to the connection.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Delivered {
    pub stream: StreamId,
    pub count: usize,
}

/// The stream has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Close(pub StreamId);

#[derive(Message)]
#[rtype(result = "()")]
struct CatchUp;

/// How often watchers that are behind are looked at when a look brought nothing (v3-api 3.8).
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(10);
/// Revisions that one look may read, so that a long history does not hold up live events.
const CATCH_UP_BUDGET: usize = 10_000;
/// Metrics are refreshed when something happens, but not more often.
const STATS_INTERVAL: Duration = Duration::from_millis(250);

/// Owns all watchers.
pub struct WatchHub {
    hub: Hub,
    shared: Arc<Shared>,
    exit: Exit,
    metrics: &'static Metrics,
    streams: HashMap<StreamId, mpsc::UnboundedSender<WatchResponse>>,
    catch_up_due: bool,
    tick_due: bool,
    stats_due: bool,
    events_counted: u64,
}

impl WatchHub {
    /// A shell around `hub`.
    pub fn new(hub: Hub, shared: Arc<Shared>, exit: Exit) -> Self {
        WatchHub {
            hub,
            shared,
            exit,
            metrics: Metrics::global(),
            streams: HashMap::new(),
            catch_up_due: false,
            tick_due: false,
            stats_due: false,
            events_counted: 0,
        }
    }

    /// Hands out what the hub decided and looks after its timers.
    fn after(&mut self, result: Result<(), HistoryError>, ctx: &mut Context<Self>) {
        if let Err(error) = result {
            return self.exit.fail("watch hub", &error);
        }
        for (stream, response) in self.hub.drain() {
            if let Some(responses) = self.streams.get(&stream) {
                // A stream that is going away tells so itself by `Close`.
                responses.send(response).ok();
            }
        }
        if self.hub.has_backlog() && !self.catch_up_due {
            self.catch_up_due = true;
            ctx.notify(CatchUp);
        }
        if !self.tick_due
            && let Some(at) = self.hub.next_deadline()
        {
            self.tick_due = true;
            let wait = Duration::from_millis(at.since_ms(self.shared.now()));
            ctx.run_later(wait, |this, ctx| {
                this.tick_due = false;
                this.hub.tick(this.shared.now());
                this.after(Ok(()), ctx);
            });
        }
        if !self.stats_due {
            self.stats_due = true;
            ctx.run_later(STATS_INTERVAL, |this, _| {
                this.stats_due = false;
                this.show_stats();
            });
        }
    }

    fn show_stats(&mut self) {
        let stats = self.hub.stats();
        self.metrics.watch_streams.set(stats.streams as f64);
        self.metrics.watchers.set(stats.watchers as f64);
        self.metrics.slow_watchers.set(stats.slow_watchers as f64);
        self.metrics.pending_events.set(stats.pending_events as f64);
        self.metrics.events.increment(stats.events_sent - self.events_counted);
        self.events_counted = stats.events_sent;
    }
}

impl Actor for WatchHub {
    type Context = Context<Self>;
}

impl Handler<Events> for WatchHub {
    type Result = ();

    fn handle(&mut self, events: Events, ctx: &mut Self::Context) {
        self.shared.unwatched.taken(&events);
        if self.streams.is_empty() {
            return;
        }
        let history = SharedHistory::new(&self.shared);
        let told = self.hub.revision();
        let result = match &events.events {
            // Published before the first stream was opened, and known since then.
            Some(_) if events.revision <= told => Ok(()),
            Some(changes) if changes.first().is_none_or(|first| first.revision.main > told) => {
                self.hub.events(events.revision, changes, &history)
            }
            _ => {
                self.hub.restored(events.revision);
                Ok(())
            }
        };
        if let Some(at) = events.compacted {
            self.hub.compacted(at);
        }
        drop(history);
        self.after(result, ctx);
    }
}

impl Handler<Open> for WatchHub {
    type Result = ();

    fn handle(&mut self, open: Open, _: &mut Self::Context) {
        if self.streams.is_empty() {
            let revision = self.shared.set_watched(true);
            self.hub.restored(revision);
        }
        self.hub.open(open.stream, self.shared.now());
        self.streams.insert(open.stream, open.responses);
    }
}

impl Handler<HasRoom> for WatchHub {
    type Result = bool;

    fn handle(&mut self, HasRoom(stream): HasRoom, _: &mut Self::Context) -> bool {
        !self.streams.contains_key(&stream) || self.hub.has_room(stream)
    }
}

impl Handler<Ask> for WatchHub {
    type Result = bool;

    fn handle(&mut self, ask: Ask, ctx: &mut Self::Context) -> bool {
        let stream = ask.stream;
        let history = SharedHistory::new(&self.shared);
        self.hub.request(stream, ask.request, ask.permission, &history, self.shared.now());
        drop(history);
        self.after(Ok(()), ctx);
        !self.streams.contains_key(&stream) || self.hub.has_room(stream)
    }
}

impl Handler<Delivered> for WatchHub {
    type Result = ();

    fn handle(&mut self, delivered: Delivered, ctx: &mut Self::Context) {
        if self.streams.contains_key(&delivered.stream) {
            self.hub.delivered(delivered.stream, delivered.count);
            self.after(Ok(()), ctx);
        }
    }
}

impl Handler<Close> for WatchHub {
    type Result = ();

    fn handle(&mut self, Close(stream): Close, ctx: &mut Self::Context) {
        if self.streams.remove(&stream).is_some() {
            self.hub.close(stream);
            if self.streams.is_empty() {
                self.shared.set_watched(false);
            }
            self.after(Ok(()), ctx);
        }
    }
}

impl Handler<CatchUp> for WatchHub {
    type Result = ();

    fn handle(&mut self, _: CatchUp, ctx: &mut Self::Context) {
        self.catch_up_due = false;
        let history = SharedHistory::new(&self.shared);
        let result = self.hub.catch_up(&history, CATCH_UP_BUDGET).map(|_| ());
        drop(history);
        if self.hub.has_backlog() && !self.catch_up_due {
            // Live events come in between two looks.
            self.catch_up_due = true;
            ctx.notify_later(CatchUp, CATCH_UP_INTERVAL);
        }
        self.after(result, ctx);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use quorate_proto::etcdserverpb::WatchCreateRequest;
    use quorate_proto::etcdserverpb::watch_request::RequestUnion;

    use super::*;
    use crate::actors::shared::tests::Bench;
    use crate::core::watch::HubOptions;

    async fn keys(responses: &mut mpsc::UnboundedReceiver<WatchResponse>) -> Vec<String> {
        let response = tokio::time::timeout(Duration::from_secs(60), responses.recv()).await;
        let events = response.expect("an answer in time").expect("the stream is open").events;
        let pairs = events.into_iter().map(|event| event.kv.expect("a pair").parse());
        pairs.map(|pair| String::from_utf8_lossy(&pair.expect("a pair").key).into_owned()).collect()
    }

    #[test]
    fn what_the_hub_had_no_room_for_is_read_from_history() {
        actix::System::new().block_on(async {
            let mut bench = Bench::new();
            let shared = bench.shared.clone();
            let hub = Hub::new(HubOptions::default(), bench.revision(), 1);
            let hub = WatchHub::new(hub, shared.clone(), Exit::new().0).start();
            let (sender, mut responses) = mpsc::unbounded_channel();
            let stream = StreamId(1);
            hub.do_send(Open { stream, responses: sender });
            let create =
                WatchCreateRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
            let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
            assert_eq!(hub.send(Ask { stream, request, permission: Ok(()) }).await, Ok(true));
            assert!(keys(&mut responses).await.is_empty(), "created");

            let mut tell = |key: &str| {
                let events = bench.put(key);
                hub.do_send(shared.unwatched.pack(bench.revision(), events, None));
            };
            tell("k1");
            assert_eq!(keys(&mut responses).await, ["k1"]);
            shared.unwatched.0.fetch_add(BACKLOG_BYTES + 1, Ordering::AcqRel);
            tell("k2");
            tell("k3");
            shared.unwatched.0.fetch_sub(BACKLOG_BYTES + 1, Ordering::AcqRel);
            tell("k4");
            let mut seen = Vec::new();
            while seen.len() < 3 {
                seen.extend(keys(&mut responses).await);
            }
            assert_eq!(seen, ["k2", "k3", "k4"], "in order, each once");
            tell("k5");
            assert_eq!(keys(&mut responses).await, ["k5"]);
            assert_eq!(shared.unwatched.0.load(Ordering::Acquire), 0);
        });
    }

    /// Opens a stream with one watcher of all keys, from `start` on; 0 for from now on.
    async fn watcher(
        hub: &Addr<WatchHub>,
        stream: StreamId,
        start: i64,
    ) -> mpsc::UnboundedReceiver<WatchResponse> {
        let (sender, mut responses) = mpsc::unbounded_channel();
        hub.do_send(Open { stream, responses: sender });
        let create = WatchCreateRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            start_revision: start,
            ..Default::default()
        };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        assert_eq!(hub.send(Ask { stream, request, permission: Ok(()) }).await, Ok(true));
        assert!(keys(&mut responses).await.is_empty(), "created");
        responses
    }

    #[test]
    fn without_streams_the_hub_is_not_told_and_misses_nothing() {
        actix::System::new().block_on(async {
            let mut bench = Bench::new();
            let shared = bench.shared.clone();
            let hub = Hub::new(HubOptions::default(), bench.revision(), 1);
            let hub = WatchHub::new(hub, shared.clone(), Exit::new().0).start();
            assert!(!shared.is_watched());
            bench.put("k1");
            // The applier found a stream, which was opened after it had published.
            let events = bench.put("k2");
            let late = shared.unwatched.pack(bench.revision(), events, None);
            let mut responses = watcher(&hub, StreamId(1), 0).await;
            assert!(shared.is_watched());
            hub.do_send(late);
            let events = bench.put("k3");
            hub.do_send(shared.unwatched.pack(bench.revision(), events, None));
            assert_eq!(keys(&mut responses).await, ["k3"]);

            hub.send(Close(StreamId(1))).await.unwrap();
            assert!(!shared.is_watched());
            bench.put("k4");
            let from = bench.revision() - 1;
            let mut responses = watcher(&hub, StreamId(2), from).await;
            let mut seen = keys(&mut responses).await;
            while seen.len() < 2 {
                seen.extend(keys(&mut responses).await);
            }
            assert_eq!(seen, ["k3", "k4"]);
            assert_eq!(shared.unwatched.0.load(Ordering::Acquire), 0);
        });
    }

    #[test]
    fn changes_that_wait_are_bounded_in_bytes() {
        let mut bench = Bench::new();
        let backlog = Backlog::default();
        let events = bench.put("k");
        let mut waiting = Vec::new();
        let refused = loop {
            let packed = backlog.pack(2, vec![events[0].clone(); 10_000], None);
            if packed.events.is_none() {
                break packed;
            }
            waiting.push(packed);
        };
        assert_eq!(refused.bytes, 0);
        let one = waiting[0].bytes;
        assert!(one * waiting.len() > BACKLOG_BYTES && one * (waiting.len() - 1) <= BACKLOG_BYTES);
        backlog.taken(&refused);
        backlog.taken(&waiting.pop().expect("some waited"));
        assert!(backlog.pack(2, events, None).events.is_some());
    }
}
