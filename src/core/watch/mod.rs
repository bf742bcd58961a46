//! Watches: all watchers of one member, and what each is sent.
//!
//! **Guarantee.** A watcher is sent every change of its keys from its first revision on: in order
//! of revision, each once, none left out, all changes of one revision in one response (or in
//! fragments of it that follow one another). A progress notice of revision R comes after every
//! change up to R. It ends with a cancel, after which nothing follows: asked for, or because the
//! history it still needed was compacted.
//!
//! A watcher is *synced* when nothing below the hub's revision is missing: it gets changes as they
//! are applied, found through an index of keys and ranges. All others are *unsynced* and read
//! history:
//!
//! ```text
//!              start <= current                       caught up
//!   create ───────────────────────► ready ◄──────┐ ─────────────► synced
//!      │                              │          │ room            │
//!      │ start 0 or in the future     ▼ no room  │                 │ no room for an event
//!      └───────────► synced         blocked ─────┘ ◄───────────────┘
//! ```
//!
//! A stream has room for a fixed number of responses, and of bytes, in flight. A change that finds no room is not
//! kept: its watcher remembers the revision from which on it must read history, so a slow client
//! costs no more memory than its responses in flight.
//!
//! **Invariant.** An unsynced watcher was sent everything below its `next`, a synced one everything
//! up to the hub's revision; responses of a stream leave in the order in which they were decided,
//! whatever their kind.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use prost::Message;
use prost::encoding::encoded_len_varint;
use quorate_proto::etcdserverpb::watch_create_request::FilterType;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;
use quorate_proto::etcdserverpb::{
    ResponseHeader, WatchCreateRequest, WatchRequest, WatchResponse,
};
use quorate_proto::mvccpb::event::EventType;
use quorate_proto::{KeyValueBytes, mvccpb};
use rustc_hash::FxHashMap;

use self::index::{End, Index, Keys, Slot};
use super::event::{Event, EventKind, History, HistoryError};
use super::types::Uptime;

mod index;
#[cfg(test)]
mod tests;

/// The id in a refusal and in the answer to a progress request.
const NO_WATCH: i64 = -1;
/// Distinct revisions in one response of a watcher that catches up.
const CATCH_UP_REVISIONS: usize = 1000;
/// Watchers that share one scan of history.
const CATCH_UP_WATCHERS: usize = 512;
/// Shortest interval of periodic progress notices, in milliseconds.
const PROGRESS_INTERVAL_MIN_MS: u64 = 100;
/// What is added to the greatest request before a response is split.
const FRAGMENT_OVERHEAD: usize = 512 * 1024;
/// The greatest size of the header fields that are filled in after the hub: cluster, member, term,
/// each a tag and a varint.
const HEADER_RESERVE: usize = 3 * 11;

const REASON_COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const REASON_EMPTY_RANGE: &str = "mvcc: watcher range is empty";
const REASON_DUPLICATE_ID: &str = "mvcc: duplicate watch ID provided on the WatchStream";

/// One gRPC stream of watchers. The shell gives the ids and uses none twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StreamId(pub u64);

/// Why a watch is refused by access control, in the words that the client is sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CancelReason(pub String);

/// splitmix64: the hub's chance, from a seed that is handed in.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Settings of a [`Hub`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HubOptions {
    /// Interval of periodic progress notices in milliseconds, to which each stream adds up to a
    /// tenth by chance; one below 100 is taken as 100 (`watch-progress-notify-interval`).
    pub progress_interval_ms: u64,
    /// The greatest client request in bytes (`max-request-bytes`): a response of 512 KiB more is
    /// split for a watcher that asked for fragments, and ends a catch-up batch for any.
    pub max_request_bytes: usize,
    /// Responses in flight per stream before its watchers become unsynced. At least 1.
    pub stream_room: usize,
    /// Bytes of keys and values in flight per stream, above which it has no room either: what a
    /// slow client can hold in memory. At least 1.
    pub stream_bytes: usize,
}

impl Default for HubOptions {
    fn default() -> Self {
        HubOptions {
            progress_interval_ms: 10 * 60 * 1000,
            max_request_bytes: 1536 * 1024,
            stream_room: 128,
            stream_bytes: 16 * 1024 * 1024,
        }
    }
}

/// What the hub holds and has done, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct HubStats {
    pub streams: usize,
    pub watchers: usize,
    /// Unsynced watchers: those that read history, whether or not their stream has room.
    pub slow_watchers: usize,
    /// Events put into responses since the start.
    pub events_sent: u64,
    /// Events in responses that are in flight.
    pub pending_events: u64,
}

/// All watchers of one member.
///
/// The history handed to a method is the store's newest published view: at least as new as the
/// changes that the hub was told of, and possibly newer.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    random: Random,
    /// Changes up to here were given to [`Hub::events`], or are covered by [`Hub::restored`].
    revision: i64,
    streams: FxHashMap<StreamId, Stream>,
    watchers: Vec<Option<Watcher>>,
    free: Vec<Slot>,
    synced: Index,
    /// Unsynced watchers whose stream may have room, by the next revision they need.
    ready: BTreeSet<(i64, Slot)>,
    /// Where in `ready` the next round begins. It goes up and then starts over, so that a watcher
    /// far behind holds up nobody and is passed over by nobody.
    cursor: i64,
    /// Unsynced watchers whose stream has no room, likewise.
    blocked: BTreeSet<(i64, Slot)>,
    /// Orders blocked watchers: who came first is served first.
    turns: u64,
    timers: BTreeSet<(Uptime, StreamId)>,
    out: Vec<(StreamId, WatchResponse)>,
    /// Watchers touched by the revision at hand; empty between calls.
    touched: Vec<Slot>,
    events_sent: u64,
    pending_events: u64,
}

#[derive(Debug)]
struct Stream {
    watchers: BTreeMap<i64, Slot>,
    next_id: i64,
    /// Responses that were not delivered yet, oldest first.
    in_flight: VecDeque<InFlight>,
    bytes_in_flight: usize,
    blocked: BTreeSet<(u64, Slot)>,
    /// Watchers that asked for progress notices.
    notified: usize,
    interval_ms: u64,
    opened: Uptime,
    timer: Option<Uptime>,
}

/// A response on its way.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    events: usize,
    bytes: usize,
}

impl Stream {
    /// How many more responses may be sent.
    fn room(&self, options: &HubOptions) -> usize {
        match self.bytes_in_flight < options.stream_bytes {
            true => options.stream_room.saturating_sub(self.in_flight.len()),
            false => 0,
        }
    }
}

#[derive(Debug)]
struct Watcher {
    stream: StreamId,
    id: i64,
    keys: Keys,
    /// As asked for: 0 for "from now on".
    start: i64,
    /// While unsynced, everything below was sent. While synced, changes below are not for this
    /// watcher.
    next: i64,
    state: State,
    put: bool,
    delete: bool,
    prev_kv: bool,
    fragment: bool,
    progress_notify: bool,
    /// No event was sent since the last progress tick.
    quiet: bool,
    /// What of the changes at hand is for this watcher; empty between calls.
    matched: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Synced,
    Ready,
    /// In its stream's `blocked` under this turn.
    Blocked(u64),
}

impl Watcher {
    fn wants(&self, event: &Event) -> bool {
        event.revision.main >= self.next
            && match event.kind {
                EventKind::Put { .. } => self.put,
                EventKind::Delete => self.delete,
            }
    }
}

/// Changes that several watchers are sent, with what each had before, read at most once.
struct Changes<'a> {
    events: &'a [Event],
    before: Vec<Option<Option<KeyValueBytes>>>,
}

impl<'a> Changes<'a> {
    fn new(events: &'a [Event]) -> Self {
        Changes { events, before: Vec::new() }
    }

    fn wire(
        &mut self,
        at: u32,
        prev_kv: bool,
        history: &dyn History,
    ) -> Result<mvccpb::Event, HistoryError> {
        let at = at as usize;
        let event = &self.events[at];
        let (kind, has_before) = match event.kind {
            EventKind::Put { creation } => (EventType::Put, !creation),
            EventKind::Delete => (EventType::Delete, true),
        };
        let prev_kv = match prev_kv && has_before {
            true => self.before(at, history)?,
            false => None,
        };
        Ok(mvccpb::Event { r#type: kind as i32, kv: Some(event.kv.clone()), prev_kv })
    }

    fn before(
        &mut self,
        at: usize,
        history: &dyn History,
    ) -> Result<Option<KeyValueBytes>, HistoryError> {
        self.before.resize(self.events.len(), None);
        if let Some(known) = &self.before[at] {
            return Ok(known.clone());
        }
        let event = &self.events[at];
        let before = history.value_at(&event.key, event.revision.main - 1)?;
        self.before[at] = Some(before.clone());
        Ok(before)
    }
}

fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..Default::default() })
}

impl Hub {
    /// A hub without streams. `revision` is the store's current one; `seed` decides the jitter of
    /// progress notices and the layout of the tables.
    ///
    /// # Panics
    /// If the options leave a stream no room.
    pub fn new(options: HubOptions, revision: i64, seed: u64) -> Self {
        assert!(options.stream_room > 0, "a stream has room for at least one response");
        assert!(options.stream_bytes > 0, "a stream has room for at least one byte");
        let mut random = Random::new(seed);
        Hub {
            options,
            revision,
            streams: FxHashMap::default(),
            watchers: Vec::new(),
            free: Vec::new(),
            synced: Index::new(&mut random),
            ready: BTreeSet::new(),
            cursor: i64::MIN,
            blocked: BTreeSet::new(),
            turns: 0,
            timers: BTreeSet::new(),
            out: Vec::new(),
            touched: Vec::new(),
            events_sent: 0,
            pending_events: 0,
            random,
        }
    }

    /// A client opened a stream.
    ///
    /// # Panics
    /// If the id was used before and not closed.
    pub fn open(&mut self, stream: StreamId, now: Uptime) {
        let interval_ms = self.options.progress_interval_ms.max(PROGRESS_INTERVAL_MIN_MS);
        let interval_ms = interval_ms.saturating_add(self.random.below(interval_ms / 10 + 1));
        let opened = self.streams.insert(
            stream,
            Stream {
                watchers: BTreeMap::new(),
                next_id: 0,
                in_flight: VecDeque::new(),
                bytes_in_flight: 0,
                blocked: BTreeSet::new(),
                notified: 0,
                interval_ms,
                opened: now,
                timer: None,
            },
        );
        assert!(opened.is_none(), "stream {} is opened once", stream.0);
    }

    /// A stream ended, by whichever side. Its watchers are gone without a word, and so is what was
    /// not drained for it.
    pub fn close(&mut self, stream: StreamId) {
        let Some(ended) = self.streams.get(&stream) else { return };
        let ids: Vec<i64> = ended.watchers.keys().copied().collect();
        for id in ids {
            self.remove(stream, id);
        }
        let ended = self.streams.remove(&stream).expect("just seen");
        self.pending_events -= ended.in_flight.iter().map(|r| r.events as u64).sum::<u64>();
        if let Some(at) = ended.timer {
            self.timers.remove(&(at, stream));
        }
        self.out.retain(|(to, _)| *to != stream);
    }

    /// Whether a stream has room for a response, so that its next request should be read. Answers
    /// to requests are sent without regard to room: it is by this that a client which sends
    /// requests and reads no answers is held up.
    pub fn has_room(&self, stream: StreamId) -> bool {
        self.streams.get(&stream).is_some_and(|s| s.room(&self.options) > 0)
    }

    /// A request of a stream. `permission` is what access control says of a create request, decided
    /// on the key and range end **as sent**. A request for a stream that is closed by now is passed
    /// over, as is one without content.
    pub fn request(
        &mut self,
        stream: StreamId,
        request: WatchRequest,
        permission: Result<(), CancelReason>,
        history: &dyn History,
        now: Uptime,
    ) {
        if !self.streams.contains_key(&stream) {
            return;
        }
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => {
                self.create(stream, create, permission, history, now);
            }
            Some(RequestUnion::CancelRequest(cancel)) => {
                self.cancel(stream, cancel.watch_id, history);
            }
            Some(RequestUnion::ProgressRequest(_)) => self.requested_progress(stream),
            None => {}
        }
    }

    fn cancel(&mut self, stream: StreamId, watch_id: i64, history: &dyn History) {
        if self.remove(stream, watch_id) {
            let response = WatchResponse {
                header: header(self.current(history)),
                watch_id,
                canceled: true,
                ..Default::default()
            };
            self.push(stream, response);
            self.unblock(stream);
        }
    }

    fn current(&self, history: &dyn History) -> i64 {
        history.revision().max(self.revision)
    }

    fn create(
        &mut self,
        stream: StreamId,
        create: WatchCreateRequest,
        permission: Result<(), CancelReason>,
        history: &dyn History,
        now: Uptime,
    ) {
        let current = self.current(history);
        let key = if create.key.is_empty() { Bytes::from_static(b"\0") } else { create.key };
        let keys = match &create.range_end[..] {
            b"" => Keys::One(key),
            b"\0" => Keys::Range(key, End::Open),
            _ => Keys::Range(key, End::Before(create.range_end)),
        };
        let empty = matches!(&keys, Keys::Range(from, End::Before(end)) if from >= end);
        let to = &self.streams[&stream];
        let refusal = if create.start_revision < 0 {
            Some(REASON_COMPACTED.into())
        } else if let Err(CancelReason(reason)) = permission {
            Some(reason)
        } else if empty {
            Some(REASON_EMPTY_RANGE.into())
        } else if create.watch_id != 0 && to.watchers.contains_key(&create.watch_id) {
            Some(REASON_DUPLICATE_ID.into())
        } else {
            None
        };
        if let Some(cancel_reason) = refusal {
            let response = WatchResponse {
                header: header(current),
                watch_id: NO_WATCH,
                created: true,
                canceled: true,
                cancel_reason,
                ..Default::default()
            };
            return self.push(stream, response);
        }

        let to = self.streams.get_mut(&stream).expect("checked by request");
        let id = match create.watch_id {
            0 => {
                while to.watchers.contains_key(&to.next_id) {
                    to.next_id += 1;
                }
                to.next_id += 1;
                to.next_id - 1
            }
            id => id,
        };
        let response = WatchResponse {
            header: header(current),
            watch_id: id,
            created: true,
            ..Default::default()
        };
        self.push(stream, response);

        let compacted = history.compact_revision();
        if 0 < create.start_revision && create.start_revision < compacted {
            return self.push(stream, compacted_response(id, compacted));
        }
        let filtered = |filter: FilterType| create.filters.contains(&(filter as i32));
        let synced = create.start_revision == 0 || create.start_revision > current;
        let watcher = Watcher {
            stream,
            id,
            keys,
            start: create.start_revision,
            next: if synced {
                create.start_revision.max(current + 1)
            } else {
                create.start_revision
            },
            state: if synced { State::Synced } else { State::Ready },
            put: !filtered(FilterType::Noput),
            delete: !filtered(FilterType::Nodelete),
            prev_kv: create.prev_kv,
            fragment: create.fragment,
            progress_notify: create.progress_notify,
            quiet: true,
            matched: Vec::new(),
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.watchers.push(None);
            Slot::try_from(self.watchers.len() - 1).expect("fewer than 2^32 watchers")
        });
        if synced {
            self.synced.insert(&watcher.keys, slot);
        } else {
            self.ready.insert((watcher.next, slot));
        }
        self.watchers[slot as usize] = Some(watcher);
        let to = self.streams.get_mut(&stream).expect("checked by request");
        to.watchers.insert(id, slot);
        if create.progress_notify {
            to.notified += 1;
            if to.timer.is_none() {
                // The stream's clock runs since it was opened, watched or not.
                let passed = now.since_ms(to.opened) / to.interval_ms;
                let at = to.opened.plus_ms((passed + 1).saturating_mul(to.interval_ms));
                to.timer = Some(at);
                self.timers.insert((at, stream));
            }
        }
    }

    /// Takes a watcher out of every table; answers whether there was one.
    fn remove(&mut self, stream: StreamId, id: i64) -> bool {
        let Some(from) = self.streams.get_mut(&stream) else { return false };
        let Some(slot) = from.watchers.remove(&id) else { return false };
        let watcher = self.watchers[slot as usize].take().expect("a stream's slot is in use");
        self.free.push(slot);
        match watcher.state {
            State::Synced => self.synced.remove(&watcher.keys, slot),
            State::Ready => drop(self.ready.remove(&(watcher.next, slot))),
            State::Blocked(turn) => {
                from.blocked.remove(&(turn, slot));
                self.blocked.remove(&(watcher.next, slot));
            }
        }
        if watcher.progress_notify {
            from.notified -= 1;
            if from.notified == 0
                && let Some(at) = from.timer.take()
            {
                self.timers.remove(&(at, stream));
            }
        }
        true
    }

    /// Changes that were just applied: of one or more whole main revisions, in order, all above
    /// those given before. `revision` is the store's current one after them.
    ///
    /// # Errors
    /// What reading a previous value gave: the hub is unusable, the member stops.
    /// # Panics
    /// If the revisions are out of order.
    pub fn events(
        &mut self,
        revision: i64,
        events: &[Event],
        history: &dyn History,
    ) -> Result<(), HistoryError> {
        assert!(events.is_sorted_by(|a, b| a.revision < b.revision), "changes come in order");
        for changes in events.chunk_by(|a, b| a.revision.main == b.revision.main) {
            let main = changes[0].revision.main;
            assert!(self.revision < main && main <= revision, "each revision is told of once");
            self.publish(main, changes, history)?;
            self.revision = main;
        }
        assert!(self.revision <= revision, "the revision does not go back");
        self.revision = revision;
        Ok(())
    }

    /// Sends the changes of one revision to the synced watchers.
    fn publish(
        &mut self,
        main: i64,
        events: &[Event],
        history: &dyn History,
    ) -> Result<(), HistoryError> {
        let mut touched = std::mem::take(&mut self.touched);
        for (at, event) in events.iter().enumerate() {
            let watchers = &mut self.watchers;
            self.synced.matching(&event.key, &mut |slot| {
                let watcher = watchers[slot as usize].as_mut().expect("an indexed slot is in use");
                if watcher.wants(event) {
                    if watcher.matched.is_empty() {
                        touched.push(slot);
                    }
                    watcher.matched.push(at as u32);
                }
            });
        }
        let mut changes = Changes::new(events);
        for slot in touched.drain(..) {
            let watcher = self.watchers[slot as usize].as_mut().expect("touched just now");
            let stream = &self.streams[&watcher.stream];
            if stream.room(&self.options) > 0 {
                self.send(slot, main, &mut changes, history)?;
            } else {
                watcher.matched.clear();
                watcher.next = main;
                self.synced.remove(&watcher.keys, slot);
                self.block(slot);
            }
        }
        self.touched = touched;
        Ok(())
    }

    /// Sends a watcher what it matched of `changes`.
    fn send(
        &mut self,
        slot: Slot,
        revision: i64,
        changes: &mut Changes,
        history: &dyn History,
    ) -> Result<(), HistoryError> {
        let watcher = self.watchers[slot as usize].as_mut().expect("sent to a watcher in use");
        watcher.quiet = false;
        let mut events = Vec::with_capacity(watcher.matched.len());
        for at in watcher.matched.drain(..) {
            events.push(changes.wire(at, watcher.prev_kv, history)?);
        }
        if watcher.matched.capacity() > 64 {
            watcher.matched = Vec::new();
        }
        let (stream, fragment) = (watcher.stream, watcher.fragment);
        let response = WatchResponse {
            header: header(revision),
            watch_id: watcher.id,
            events,
            ..Default::default()
        };
        if fragment {
            for part in fragments(response, self.response_bytes()) {
                self.push(stream, part);
            }
        } else {
            self.push(stream, response);
        }
        Ok(())
    }

    fn response_bytes(&self) -> usize {
        self.options.max_request_bytes.saturating_add(FRAGMENT_OVERHEAD)
    }

    fn push(&mut self, stream: StreamId, response: WatchResponse) {
        let events = response.events.len();
        self.events_sent += events as u64;
        self.pending_events += events as u64;
        let to = self.streams.get_mut(&stream).expect("responses go to open streams");
        let kvs = response.events.iter().flat_map(|event| event.kv.iter().chain(&event.prev_kv));
        let bytes = kvs.map(|kv| kv.0.len()).sum();
        to.in_flight.push_back(InFlight { events, bytes });
        to.bytes_in_flight += bytes;
        self.out.push((stream, response));
    }

    /// The responses decided since the last call, in order. The shell sends each stream its own in
    /// this order, and tells when they have left by [`Hub::delivered`].
    pub fn drain(&mut self) -> impl Iterator<Item = (StreamId, WatchResponse)> + '_ {
        self.out.drain(..)
    }

    /// `count` more responses of a stream have been handed to its connection, oldest first. Its
    /// watchers that waited for room can catch up: see [`Hub::has_backlog`].
    ///
    /// # Panics
    /// If more are delivered than were in flight.
    pub fn delivered(&mut self, stream: StreamId, count: usize) {
        let Some(from) = self.streams.get_mut(&stream) else { return };
        for _ in 0..count {
            let gone = from.in_flight.pop_front().expect("delivered what was in flight");
            self.pending_events -= gone.events as u64;
            from.bytes_in_flight -= gone.bytes;
        }
        self.unblock(stream);
    }

    fn block(&mut self, slot: Slot) {
        let watcher = self.watchers[slot as usize].as_mut().expect("blocked while in use");
        self.turns += 1;
        watcher.state = State::Blocked(self.turns);
        self.blocked.insert((watcher.next, slot));
        let stream = self.streams.get_mut(&watcher.stream).expect("a watcher's stream is open");
        stream.blocked.insert((self.turns, slot));
    }

    /// Lets as many watchers of a stream catch up as it has room for responses.
    fn unblock(&mut self, stream: StreamId) {
        let Some(from) = self.streams.get_mut(&stream) else { return };
        for _ in 0..from.room(&self.options) {
            let Some((_, slot)) = from.blocked.pop_first() else { return };
            let watcher = self.watchers[slot as usize].as_mut().expect("a blocked slot is in use");
            watcher.state = State::Ready;
            self.blocked.remove(&(watcher.next, slot));
            self.ready.insert((watcher.next, slot));
        }
    }

    /// Whether [`Hub::catch_up`] has something to do now.
    pub fn has_backlog(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Moves unsynced watchers forward by what history holds for them, until about `budget` changes
    /// were read. Answers whether there is more to do at once; watchers whose stream has no room
    /// wait for [`Hub::delivered`] instead.
    ///
    /// # Errors
    /// What history gave, other than a compaction: the hub is unusable, the member stops.
    /// # Panics
    /// If the view of history is older than what the hub was told of.
    pub fn catch_up(&mut self, history: &dyn History, budget: usize) -> Result<bool, HistoryError> {
        let current = history.revision();
        assert!(current >= self.revision, "history is at least as new as the changes told of");
        self.compacted(history.compact_revision());
        let mut left = budget;
        while !self.ready.is_empty() && left > 0 {
            let round = self.choose(current);
            if round.is_empty() {
                self.cursor = i64::MIN;
                continue;
            }
            self.round(round, current, history, &mut left)?;
            // A round that finds nothing to read is not for nothing either.
            left = left.saturating_sub(1);
        }
        Ok(!self.ready.is_empty())
    }

    /// Takes up to 512 watchers at and above the cursor out of `ready`, by ascending revision.
    /// Those that miss nothing are synced and those without room are blocked on the way.
    fn choose(&mut self, current: i64) -> Vec<Slot> {
        let mut chosen = Vec::new();
        let mut taken: FxHashMap<StreamId, usize> = FxHashMap::default();
        while chosen.len() < CATCH_UP_WATCHERS
            && let Some(&(next, slot)) = self.ready.range((self.cursor, 0)..).next()
        {
            self.ready.remove(&(next, slot));
            let watcher = self.watchers[slot as usize].as_mut().expect("a ready slot is in use");
            if next > current {
                watcher.state = State::Synced;
                self.synced.insert(&watcher.keys, slot);
                continue;
            }
            // Each may need one response: none is read for that could not be sent.
            let taken = taken.entry(watcher.stream).or_default();
            let stream = &self.streams[&watcher.stream];
            if *taken < stream.room(&self.options) {
                *taken += 1;
                chosen.push(slot);
            } else {
                self.block(slot);
            }
        }
        chosen
    }

    /// One scan of history for the watchers chosen.
    fn round(
        &mut self,
        chosen: Vec<Slot>,
        current: i64,
        history: &dyn History,
        budget: &mut usize,
    ) -> Result<(), HistoryError> {
        let mut scan = Scan::new(self, &chosen);
        let from = scan.start(self);
        let read = history.changes(from, current, &mut |event| scan.visit(self, event, budget));
        let (events, ends, scanned) = scan.finish(current);
        match read {
            Ok(()) => {}
            Err(HistoryError::Compacted { compacted, .. }) if from < compacted => {
                // It happened under the scan. Nothing was sent: who can still be served tries
                // again.
                for &slot in &chosen {
                    let watcher = self.watchers[slot as usize].as_mut().expect("chosen, in use");
                    watcher.matched.clear();
                    self.ready.insert((watcher.next, slot));
                }
                self.compacted(compacted);
                return Ok(());
            }
            Err(error) => return Err(error),
        }

        let mut changes = Changes::new(&events);
        for (&slot, end) in chosen.iter().zip(ends) {
            let watcher = self.watchers[slot as usize].as_mut().expect("chosen, in use");
            let next = end.unwrap_or(scanned).saturating_add(1).max(watcher.next);
            watcher.next = next;
            let stream = watcher.stream;
            if next > current {
                watcher.state = State::Synced;
                self.synced.insert(&watcher.keys, slot);
            } else {
                self.ready.insert((next, slot));
            }
            if !watcher.matched.is_empty() {
                self.send(slot, current, &mut changes, history)?;
            }
            self.unblock(stream);
        }
        self.cursor = scanned.saturating_add(1);
        Ok(())
    }

    /// History below `revision` is gone: unsynced watchers that still needed some of it are
    /// canceled. Synced ones have had it all.
    pub fn compacted(&mut self, revision: i64) {
        let below = ..(revision, 0);
        let lost = self.ready.range(below).chain(self.blocked.range(below));
        let lost: Vec<Slot> = lost.map(|(_, slot)| *slot).collect();
        for slot in lost {
            let watcher =
                self.watchers[slot as usize].as_ref().expect("an unsynced slot is in use");
            let (stream, id) = (watcher.stream, watcher.id);
            self.remove(stream, id);
            self.push(stream, compacted_response(id, revision));
            self.unblock(stream);
        }
    }

    /// The store was replaced by a snapshot whose current revision is `revision`. What happened in
    /// between was not told of: every watcher reads it from history, from its own next revision on.
    pub fn restored(&mut self, revision: i64) {
        let told = self.revision;
        self.synced.clear();
        for (slot, watcher) in self.watchers.iter_mut().enumerate() {
            if let Some(watcher) = watcher
                && watcher.state == State::Synced
            {
                watcher.next = watcher.next.max(told + 1);
                watcher.state = State::Ready;
                self.ready.insert((watcher.next, slot as Slot));
            }
        }
        self.revision = revision;
    }

    /// Everything up to this revision was sent to a synced watcher, or was not for it.
    fn seen(&self, watcher: &Watcher) -> i64 {
        self.revision.max(watcher.next - 1)
    }

    fn may_notify(&self, watcher: &Watcher) -> bool {
        watcher.state == State::Synced && watcher.start <= self.revision
    }

    /// Answers a progress request, if that is true of all watchers of the stream; otherwise it is
    /// dropped.
    fn requested_progress(&mut self, stream: StreamId) {
        let mut seen: Option<i64> = None;
        for &slot in self.streams[&stream].watchers.values() {
            let watcher = self.watchers[slot as usize].as_ref().expect("a stream's slot is in use");
            if !self.may_notify(watcher) {
                return;
            }
            let here = self.seen(watcher);
            seen = Some(seen.map_or(here, |least| least.min(here)));
        }
        if let Some(revision) = seen
            && self.has_room(stream)
        {
            self.push(stream, progress_response(NO_WATCH, revision));
        }
    }

    /// Sends the periodic progress notices that are due. Called at [`Hub::next_deadline`] or later.
    pub fn tick(&mut self, now: Uptime) {
        while let Some(&(at, stream)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            let due = self.streams.get_mut(&stream).expect("only open streams have a timer");
            // Ticks that were slept through are not made up for.
            let passed = now.since_ms(at) / due.interval_ms;
            let next = at.plus_ms((passed + 1).saturating_mul(due.interval_ms));
            due.timer = Some(next);
            self.timers.insert((next, stream));
            let slots: Vec<Slot> = due.watchers.values().copied().collect();
            for slot in slots {
                self.periodic_progress(stream, slot);
            }
        }
    }

    fn periodic_progress(&mut self, stream: StreamId, slot: Slot) {
        let watcher = self.watchers[slot as usize].as_mut().expect("a stream's slot is in use");
        if !watcher.progress_notify {
            return;
        }
        let quiet = std::mem::replace(&mut watcher.quiet, true);
        let watcher = self.watchers[slot as usize].as_ref().expect("just seen");
        if quiet && self.may_notify(watcher) && self.has_room(stream) {
            let response = progress_response(watcher.id, self.seen(watcher));
            self.push(stream, response);
        }
    }

    /// When [`Hub::tick`] will next have something to do; `None` while no watcher asked for
    /// notices.
    pub fn next_deadline(&self) -> Option<Uptime> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// The revision up to which the hub was told of changes.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Numbers for metrics.
    pub fn stats(&self) -> HubStats {
        HubStats {
            streams: self.streams.len(),
            watchers: self.watchers.len() - self.free.len(),
            slow_watchers: self.ready.len() + self.blocked.len(),
            events_sent: self.events_sent,
            pending_events: self.pending_events,
        }
    }
}

/// What a round has read. The watchers' matches count into `events`.
struct Scan {
    /// Watchers by ascending revision, and the position of each slot among them.
    chosen: Vec<Slot>,
    positions: FxHashMap<Slot, usize>,
    index: Index,
    /// Changes that some watcher matched.
    events: Vec<Event>,
    progress: Vec<Progress>,
    /// The revision being read, its first event in `events`, and the watchers it touched.
    main: i64,
    touched: Vec<usize>,
    /// How many of `chosen` need the revision being read, or had it.
    entered: usize,
    /// Those of them that are not full.
    active: usize,
    bytes_max: usize,
    /// Set when the scan stopped by itself: all below was read whole.
    stopped: Option<i64>,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    revisions: usize,
    bytes: usize,
    /// The last revision that went into a full response.
    end: Option<i64>,
    touched: bool,
}

impl Scan {
    fn new(hub: &mut Hub, chosen: &[Slot]) -> Self {
        let mut index = Index::new(&mut hub.random);
        for &slot in chosen {
            index.insert(&hub.watchers[slot as usize].as_ref().expect("chosen, in use").keys, slot);
        }
        Scan {
            positions: chosen.iter().enumerate().map(|(at, slot)| (*slot, at)).collect(),
            progress: vec![Progress::default(); chosen.len()],
            chosen: chosen.to_vec(),
            index,
            events: Vec::new(),
            main: i64::MIN,
            touched: Vec::new(),
            entered: 0,
            active: 0,
            bytes_max: hub.response_bytes(),
            stopped: None,
        }
    }

    /// The revision that the first watcher needs.
    fn start(&self, hub: &Hub) -> i64 {
        self.next_of(hub, 0).expect("a round has watchers")
    }

    fn next_of(&self, hub: &Hub, position: usize) -> Option<i64> {
        let slot = *self.chosen.get(position)?;
        Some(hub.watchers[slot as usize].as_ref().expect("chosen, in use").next)
    }

    fn visit(&mut self, hub: &mut Hub, event: Event, budget: &mut usize) -> bool {
        let main = event.revision.main;
        if main != self.main {
            self.end_revision();
            while self.next_of(hub, self.entered).is_some_and(|next| next <= main) {
                self.entered += 1;
                self.active += 1;
            }
            // At least one revision is read, so that every round gets on.
            if self.active == 0 || (*budget == 0 && self.main != i64::MIN) {
                self.stopped = Some(main - 1);
                return false;
            }
            self.main = main;
        }
        *budget = budget.saturating_sub(1);
        let at = self.events.len() as u32;
        let Scan { index, positions, progress, touched, .. } = self;
        let mut wanted = false;
        index.matching(&event.key, &mut |slot| {
            let watcher = hub.watchers[slot as usize].as_mut().expect("chosen, in use");
            let position = positions[&slot];
            let progress = &mut progress[position];
            if progress.end.is_none() && watcher.wants(&event) {
                wanted = true;
                watcher.matched.push(at);
                progress.bytes += event.kv.0.len();
                if !std::mem::replace(&mut progress.touched, true) {
                    touched.push(position);
                }
            }
        });
        if wanted {
            self.events.push(event);
        }
        true
    }

    /// The revision being read is complete: counts it, and closes the responses that it filled.
    fn end_revision(&mut self) {
        for position in self.touched.drain(..) {
            let progress = &mut self.progress[position];
            progress.touched = false;
            progress.revisions += 1;
            if progress.revisions == CATCH_UP_REVISIONS || progress.bytes >= self.bytes_max {
                progress.end = Some(self.main);
                self.active -= 1;
            }
        }
    }

    /// What was read, where each full response ends, and up to where all the others have read.
    fn finish(mut self, current: i64) -> (Vec<Event>, Vec<Option<i64>>, i64) {
        self.end_revision();
        let scanned = self.stopped.unwrap_or(current);
        let ends = self.progress.iter().map(|progress| progress.end).collect();
        (self.events, ends, scanned)
    }
}

fn compacted_response(watch_id: i64, compact_revision: i64) -> WatchResponse {
    WatchResponse {
        header: header(0),
        watch_id,
        canceled: true,
        compact_revision,
        ..Default::default()
    }
}

fn progress_response(watch_id: i64, revision: i64) -> WatchResponse {
    WatchResponse { header: header(revision), watch_id, ..Default::default() }
}

/// Splits a response of `bytes_max` or more into parts below that, each with at least one event.
fn fragments(response: WatchResponse, bytes_max: usize) -> Vec<WatchResponse> {
    if response.events.len() < 2 || response.encoded_len() + HEADER_RESERVE < bytes_max {
        return vec![response];
    }
    let WatchResponse { header, watch_id, events, .. } = response;
    let part =
        |events| WatchResponse { header, watch_id, fragment: true, events, ..Default::default() };
    let empty = part(Vec::new()).encoded_len() + HEADER_RESERVE;
    let mut parts = Vec::new();
    let mut gathered = Vec::new();
    let mut bytes = empty;
    for event in events {
        let len = event.encoded_len();
        let len = 1 + encoded_len_varint(len as u64) + len;
        if !gathered.is_empty() && bytes + len >= bytes_max {
            parts.push(part(std::mem::take(&mut gathered)));
            bytes = empty;
        }
        bytes += len;
        gathered.push(event);
    }
    parts.push(WatchResponse { fragment: false, ..part(gathered) });
    parts
}
