//! Scripts in tests/scripts/watch, and a model: random calls against a naive twin over the whole
//! history.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use quorate_proto::KeyValue;
use quorate_proto::etcdserverpb::{WatchCancelRequest, WatchProgressRequest};

use super::*;
use crate::core::types::Revision;

/// A store's past, kept whole: compaction only forbids to read it.
#[derive(Default)]
struct Past {
    revision: i64,
    compacted: i64,
    events: Vec<Event>,
    values: BTreeMap<Bytes, Vec<(i64, Option<KeyValue>)>>,
}

/// One operation of a transaction.
#[derive(Clone)]
enum Op {
    Put(Bytes, Bytes),
    Delete(Bytes),
}

impl Past {
    fn new() -> Self {
        Past { revision: 1, compacted: -1, ..Default::default() }
    }

    fn value(&self, key: &[u8], at: i64) -> Option<&KeyValue> {
        let versions = self.values.get(key)?;
        let end = versions.partition_point(|(main, _)| *main <= at);
        versions[..end].last()?.1.as_ref()
    }

    /// Applies a transaction; answers its changes, none if it changed nothing.
    fn apply(&mut self, ops: &[Op]) -> Vec<Event> {
        let main = self.revision + 1;
        let mut changes = Vec::new();
        for op in ops {
            let (Op::Put(key, _) | Op::Delete(key)) = op;
            let old = self.value(key, main).cloned();
            let (kind, stored, wire) = match op {
                Op::Put(key, value) => {
                    let kv = KeyValue {
                        key: key.clone(),
                        create_revision: old.as_ref().map_or(main, |old| old.create_revision),
                        mod_revision: main,
                        version: old.as_ref().map_or(1, |old| old.version + 1),
                        value: value.clone(),
                        lease: 0,
                    };
                    let creation = kv.create_revision == main;
                    (EventKind::Put { creation }, Some(kv.clone()), kv)
                }
                Op::Delete(_) if old.is_none() => continue,
                Op::Delete(key) => {
                    let kv =
                        KeyValue { key: key.clone(), mod_revision: main, ..Default::default() };
                    (EventKind::Delete, None, kv)
                }
            };
            self.values.entry(key.clone()).or_default().push((main, stored));
            changes.push(Event {
                key: key.clone(),
                revision: Revision { main, sub: changes.len() as i64 },
                kind,
                kv: KeyValueBytes::from(&wire),
            });
        }
        if !changes.is_empty() {
            self.revision = main;
            self.events.extend(changes.iter().cloned());
        }
        changes
    }

    fn since(&self, main: i64) -> &[Event] {
        &self.events[self.events.partition_point(|event| event.revision.main < main)..]
    }
}

impl History for Past {
    fn revision(&self) -> i64 {
        self.revision
    }

    fn compact_revision(&self) -> i64 {
        self.compacted
    }

    fn changes(
        &self,
        from: i64,
        to: i64,
        visit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<(), HistoryError> {
        if from < self.compacted {
            return Err(HistoryError::Compacted { asked: from, compacted: self.compacted });
        }
        for event in self.since(from) {
            if event.revision.main > to || !visit(event.clone()) {
                break;
            }
        }
        Ok(())
    }

    fn value_at(&self, key: &[u8], at: i64) -> Result<Option<KeyValueBytes>, HistoryError> {
        if at < self.compacted {
            return Ok(None);
        }
        Ok(self.value(key, at).map(KeyValueBytes::from))
    }
}

fn union(request_union: RequestUnion) -> WatchRequest {
    WatchRequest { request_union: Some(request_union) }
}

fn cancel(watch_id: i64) -> WatchRequest {
    union(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))
}

fn progress() -> WatchRequest {
    union(RequestUnion::ProgressRequest(WatchProgressRequest {}))
}

fn show(response: &WatchResponse) -> String {
    let mut line = format!("id={}", response.watch_id);
    let revision = response.header.as_ref().expect("every response has a header").revision;
    let mut flag = |set: bool, name: &str| {
        if set {
            write!(line, " {name}").unwrap();
        }
    };
    flag(response.created, "created");
    flag(response.canceled, "canceled");
    flag(response.fragment, "fragment");
    write!(line, " rev={revision}").unwrap();
    if response.compact_revision != 0 {
        write!(line, " compact={}", response.compact_revision).unwrap();
    }
    if !response.cancel_reason.is_empty() {
        write!(line, " reason={:?}", response.cancel_reason).unwrap();
    }
    for event in &response.events {
        let kv = event.kv.as_ref().unwrap().parse().unwrap();
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        match event.r#type() {
            EventType::Put => {
                let value = match kv.value.len() {
                    0..100 => String::from_utf8_lossy(&kv.value).into_owned(),
                    long => format!("({long} bytes)"),
                };
                write!(line, " put {key}={value}@{}", kv.mod_revision).unwrap();
                assert_eq!(kv.version == 1, kv.create_revision == kv.mod_revision);
            }
            EventType::Delete => {
                let expect = KeyValue {
                    key: kv.key.clone(),
                    mod_revision: kv.mod_revision,
                    ..Default::default()
                };
                assert_eq!(kv, expect, "a delete carries key and mod_revision only");
                write!(line, " del {key}@{}", kv.mod_revision).unwrap();
            }
        }
        if let Some(prev) = &event.prev_kv {
            let prev = prev.parse().unwrap();
            assert_eq!(prev.key, kv.key);
            let value = String::from_utf8_lossy(&prev.value).into_owned();
            write!(line, "[{value}@{}]", prev.mod_revision).unwrap();
        }
    }
    line
}

/// Runs one script. A line `> command` is followed by what it answers; everything else is kept.
struct Script {
    past: Past,
    hub: Hub,
    now: Uptime,
    /// Changes applied but not told of, while `hold` is on.
    held: Option<Vec<Event>>,
    /// Streams whose client reads nothing by itself.
    slow: Vec<u64>,
}

impl Script {
    fn new() -> Self {
        let options = HubOptions {
            stream_room: 2,
            stream_bytes: 1_000_000,
            max_request_bytes: 512,
            ..Default::default()
        };
        Script {
            past: Past::new(),
            hub: Hub::new(options, 1, 1),
            now: Uptime(0),
            held: None,
            slow: Vec::new(),
        }
    }

    fn apply(&mut self, ops: &[Op]) {
        let changes = self.past.apply(ops);
        match &mut self.held {
            Some(held) => held.extend(changes),
            None => self.hub.events(self.past.revision, &changes, &self.past).unwrap(),
        }
    }

    fn ops(words: &[&str]) -> Vec<Op> {
        let key = |k: &str| Bytes::copy_from_slice(k.as_bytes());
        words
            .split(|word| *word == ";")
            .map(|op| match op {
                ["put", k, v] => {
                    let value = match v.strip_prefix('*') {
                        Some(len) => Bytes::from(vec![b'v'; len.parse().unwrap()]),
                        None => key(v),
                    };
                    Op::Put(key(k), value)
                }
                ["del", k] => Op::Delete(key(k)),
                other => panic!("no operation {other:?}"),
            })
            .collect()
    }

    fn create(&mut self, stream: u64, words: &[&str]) {
        let mut create = WatchCreateRequest::default();
        let mut permission = Ok(());
        let bytes = |text: &str| match text {
            "\\0" => Bytes::from_static(b"\0"),
            text => Bytes::copy_from_slice(text.as_bytes()),
        };
        for word in words {
            match word.split_once('=') {
                Some(("key", key)) => create.key = bytes(key),
                Some(("end", end)) => create.range_end = bytes(end),
                Some(("start", start)) => create.start_revision = start.parse().unwrap(),
                Some(("id", id)) => create.watch_id = id.parse().unwrap(),
                Some(("filter", n)) => create.filters.push(n.parse().unwrap()),
                Some(("deny", why)) => permission = Err(CancelReason(why.replace('_', " "))),
                None if *word == "prev" => create.prev_kv = true,
                None if *word == "fragment" => create.fragment = true,
                None if *word == "progress" => create.progress_notify = true,
                _ => panic!("no option {word}"),
            }
        }
        let request = union(RequestUnion::CreateRequest(create));
        self.hub.request(StreamId(stream), request, permission, &self.past, self.now);
    }

    fn command(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let mut answer = String::new();
        match words[0] {
            "open" => self.hub.open(StreamId(number(1)), self.now),
            "close" => self.hub.close(StreamId(number(1))),
            "slow" => self.slow.push(number(1)),
            "put" | "del" => self.apply(&Self::ops(&words)),
            "txn" => self.apply(&Self::ops(&words[1..])),
            "hold" => self.held = Some(Vec::new()),
            "tell" => {
                let held = self.held.take().unwrap();
                self.hub.events(self.past.revision, &held, &self.past).unwrap();
            }
            "compact" => {
                self.past.compacted = number(1) as i64;
                self.hub.compacted(self.past.compacted);
            }
            "restored" => {
                self.held = None;
                self.hub.restored(self.past.revision);
            }
            "watch" => self.create(number(1), &words[2..]),
            "cancel" => {
                let id = words[2].parse().unwrap();
                self.hub.request(StreamId(number(1)), cancel(id), Ok(()), &self.past, self.now);
            }
            "progress" => {
                self.hub.request(StreamId(number(1)), progress(), Ok(()), &self.past, self.now);
            }
            "delivered" => {
                let stream = StreamId(number(1));
                let count = match words[2] {
                    "all" => self.hub.streams[&stream].in_flight.len(),
                    count => count.parse().unwrap(),
                };
                self.hub.delivered(stream, count);
            }
            "catchup" => {
                let budget = words.get(1).map_or(10_000, |budget| budget.parse().unwrap());
                if self.hub.catch_up(&self.past, budget).unwrap() {
                    answer.push_str("more\n");
                }
            }
            "tick" => {
                self.now = self.now.plus_ms(number(1) * 1000);
                self.hub.tick(self.now);
            }
            "timer" => {
                let at = self.hub.next_deadline().map(|at| at.since_ms(self.now) / 60_000);
                writeln!(answer, "minutes {at:?}").unwrap();
            }
            "stats" => {
                let HubStats { streams, watchers, slow_watchers, events_sent, pending_events } =
                    self.hub.stats();
                writeln!(
                    answer,
                    "streams={streams} watchers={watchers} slow={slow_watchers} \
                     sent={events_sent} pending={pending_events}"
                )
                .unwrap();
            }
            other => panic!("no command {other}"),
        }
        let responses: Vec<_> = self.hub.drain().collect();
        for (StreamId(stream), response) in responses {
            writeln!(answer, "{stream}: {}", show(&response)).unwrap();
            if !self.slow.contains(&stream) {
                self.hub.delivered(StreamId(stream), 1);
            }
        }
        answer
    }
}

#[test]
fn scripts() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/watch");
    let rewrite = std::env::var_os("REWRITE_SCRIPTS").is_some();
    let mut count = 0;
    for file in std::fs::read_dir(&dir).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut script = Script::new();
        let mut actual = String::new();
        for line in text.lines() {
            if let Some(command) = line.strip_prefix("> ") {
                writeln!(actual, "{line}").unwrap();
                actual.push_str(&script.command(command));
                count += 1;
            } else if line.is_empty() || line.starts_with('#') {
                writeln!(actual, "{line}").unwrap();
            }
            if line.starts_with("# ---") {
                script = Script::new();
            }
        }
        if rewrite {
            std::fs::write(&path, actual).unwrap();
        } else {
            for (at, (expect, actual)) in text.lines().zip(actual.lines()).enumerate() {
                assert_eq!(actual, expect, "{} line {}", path.display(), at + 1);
            }
            assert_eq!(actual, text, "{}", path.display());
        }
    }
    assert!(count > 0, "scripts are in {}", dir.display());
}

#[test]
fn a_catch_up_response_holds_at_most_a_thousand_revisions() {
    let mut past = Past::new();
    for n in 0..2500 {
        let op =
            |key: &'static str| Op::Put(Bytes::from_static(key.as_bytes()), n.to_string().into());
        past.apply(&[op("a"), op("b")]);
    }
    let mut hub = Hub::new(HubOptions::default(), past.revision, 7);
    hub.open(StreamId(1), Uptime(0));
    for (key, start) in [("a", 1), ("b", 2400), ("c", 1)] {
        let create = WatchCreateRequest {
            key: key.into(),
            range_end: "c".into(),
            start_revision: start,
            ..Default::default()
        };
        let create = if key == "c" {
            WatchCreateRequest { range_end: Bytes::new(), ..create }
        } else {
            create
        };
        hub.request(
            StreamId(1),
            union(RequestUnion::CreateRequest(create)),
            Ok(()),
            &past,
            Uptime(0),
        );
    }
    assert_eq!(hub.stats().slow_watchers, 3);
    while hub.catch_up(&past, 100).unwrap() {}
    assert_eq!(hub.stats().slow_watchers, 0);
    let mut batches: Vec<(i64, usize, i64)> = Vec::new();
    for (_, response) in hub.drain().filter(|(_, response)| !response.created) {
        let last = response.events.last().unwrap().kv.as_ref().unwrap().parse().unwrap();
        assert_eq!(response.header.unwrap().revision, 2501);
        batches.push((response.watch_id, response.events.len(), last.mod_revision));
    }
    // In small budgets the responses are small; none of the first watcher's is above 2 x 1000
    // events.
    assert_eq!(batches.iter().filter(|b| b.0 == 0).map(|b| b.1).sum::<usize>(), 5000);
    assert_eq!(batches.iter().filter(|b| b.0 == 1).map(|b| b.1).sum::<usize>(), 102);

    let create = WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() };
    hub.request(StreamId(1), union(RequestUnion::CreateRequest(create)), Ok(()), &past, Uptime(0));
    let in_flight = hub.streams[&StreamId(1)].in_flight.len();
    hub.delivered(StreamId(1), in_flight);
    assert!(!hub.catch_up(&past, 1_000_000).unwrap());
    let sizes: Vec<(usize, i64)> = hub
        .drain()
        .filter(|(_, response)| !response.created)
        .map(|(_, response)| {
            let last = response.events.last().unwrap().kv.as_ref().unwrap().parse().unwrap();
            (response.events.len(), last.mod_revision)
        })
        .collect();
    assert_eq!(sizes, [(1000, 1001), (1000, 2001), (500, 2501)]);
}

/// History that is compacted while it is read: after some changes there is an error.
struct Shrinking {
    past: Past,
    after: usize,
    compacted: i64,
}

impl History for Shrinking {
    fn revision(&self) -> i64 {
        self.past.revision
    }

    fn compact_revision(&self) -> i64 {
        -1 // as it was when the call began
    }

    fn changes(
        &self,
        from: i64,
        to: i64,
        visit: &mut dyn FnMut(Event) -> bool,
    ) -> Result<(), HistoryError> {
        let mut left = if from < self.compacted { self.after } else { usize::MAX };
        self.past.changes(from, to, &mut |event| {
            left = left.saturating_sub(1);
            left > 0 && visit(event)
        })?;
        if left > 0 {
            return Ok(());
        }
        Err(HistoryError::Compacted { asked: from, compacted: self.compacted })
    }

    fn value_at(&self, key: &[u8], at: i64) -> Result<Option<KeyValueBytes>, HistoryError> {
        self.past.value_at(key, at)
    }
}

#[test]
fn a_compaction_during_the_scan_ends_only_who_needed_what_is_gone() {
    let mut past = Past::new();
    for n in 0..9 {
        past.apply(&[Op::Put("a".into(), n.to_string().into())]);
    }
    let history = Shrinking { past, after: 6, compacted: 5 };
    let mut hub = Hub::new(HubOptions::default(), history.revision(), 1);
    hub.open(StreamId(1), Uptime(0));
    for start in [2, 4, 5, 9] {
        let create =
            WatchCreateRequest { key: "a".into(), start_revision: start, ..Default::default() };
        let request = union(RequestUnion::CreateRequest(create));
        hub.request(StreamId(1), request, Ok(()), &history, Uptime(0));
    }
    assert!(!hub.catch_up(&history, 1000).unwrap());
    let sent: Vec<String> =
        hub.drain().filter(|(_, r)| !r.created).map(|(_, response)| show(&response)).collect();
    assert_eq!(
        sent,
        [
            "id=0 canceled rev=0 compact=5",
            "id=1 canceled rev=0 compact=5",
            "id=2 rev=10 put a=3@5 put a=4@6 put a=5@7 put a=6@8 put a=7@9 put a=8@10",
            "id=3 rev=10 put a=7@9 put a=8@10",
        ]
    );
}

#[test]
fn a_history_that_contradicts_itself_is_an_error_and_no_endless_loop() {
    struct Broken(Past);
    impl History for Broken {
        fn revision(&self) -> i64 {
            self.0.revision
        }
        fn compact_revision(&self) -> i64 {
            -1
        }
        fn changes(
            &self,
            from: i64,
            _: i64,
            _: &mut dyn FnMut(Event) -> bool,
        ) -> Result<(), HistoryError> {
            Err(HistoryError::Compacted { asked: from, compacted: from })
        }
        fn value_at(&self, key: &[u8], at: i64) -> Result<Option<KeyValueBytes>, HistoryError> {
            self.0.value_at(key, at)
        }
    }
    let mut past = Past::new();
    past.apply(&[Op::Put("a".into(), "1".into())]);
    let history = Broken(past);
    let mut hub = Hub::new(HubOptions::default(), history.revision(), 1);
    hub.open(StreamId(1), Uptime(0));
    let create = WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() };
    let request = union(RequestUnion::CreateRequest(create));
    hub.request(StreamId(1), request, Ok(()), &history, Uptime(0));
    let error = hub.catch_up(&history, 1000).unwrap_err();
    assert_eq!(error.to_string(), "revision 2 is compacted, history begins at 2");
}

#[test]
fn a_seed_repeats() {
    let transcript = || {
        let mut model = Model::new(3);
        let mut lines = Vec::new();
        for step in 0..500 {
            model.step();
            lines.extend(model.hub.out.iter().map(|(stream, r)| format!("{stream:?} {}", show(r))));
            model.receive(step);
        }
        lines
    };
    let (first, second) = (transcript(), transcript());
    assert!(first.len() > 100);
    assert_eq!(first, second);
}

#[test]
fn fragments_stay_below_the_limit_and_hold_every_event_in_order() {
    let event = |n: usize| mvccpb::Event {
        r#type: 0,
        kv: Some(KeyValueBytes::from(&KeyValue {
            value: vec![n as u8; n].into(),
            ..Default::default()
        })),
        prev_kv: None,
    };
    let response = |sizes: &[usize]| WatchResponse {
        header: header(i64::MAX),
        watch_id: 3,
        events: sizes.iter().map(|n| event(*n)).collect(),
        ..Default::default()
    };
    let mut random = Random::new(5);
    for limit in 100..400 {
        let sizes: Vec<usize> = (0..random.below(12)).map(|_| random.below(250) as usize).collect();
        let whole = response(&sizes);
        let parts = fragments(whole.clone(), limit);
        let joined: Vec<mvccpb::Event> =
            parts.iter().flat_map(|part| part.events.clone()).collect();
        assert_eq!(joined, whole.events);
        for (at, part) in parts.iter().enumerate() {
            assert_eq!(part.fragment, at + 1 < parts.len(), "all but the last are marked");
            assert_eq!((part.header, part.watch_id), (whole.header, 3));
            let small = part.encoded_len() + HEADER_RESERVE < limit;
            assert!(small || part.events.len() <= 1, "{} bytes of {limit}", part.encoded_len());
        }
        for pair in parts.windows(2) {
            let mut both = pair[0].clone();
            both.events.push(pair[1].events[0].clone());
            assert!(both.encoded_len() + HEADER_RESERVE >= limit, "no part is cut early");
        }
    }
}

#[test]
fn ten_thousand_watchers_of_one_key_share_the_value() {
    let mut past = Past::new();
    let mut hub = Hub::new(HubOptions::default(), 1, 7);
    for n in 0..10_000u64 {
        let stream = StreamId(n);
        hub.open(stream, Uptime(0));
        let create = WatchCreateRequest { key: "hot".into(), ..Default::default() };
        hub.request(stream, union(RequestUnion::CreateRequest(create)), Ok(()), &past, Uptime(0));
    }
    hub.drain().for_each(drop);
    let changes = past.apply(&[Op::Put("hot".into(), "x".into())]);
    hub.events(2, &changes, &past).unwrap();
    let mut count = 0;
    for (_, response) in hub.drain() {
        count += 1;
        let kv = response.events[0].kv.as_ref().unwrap();
        assert_eq!(kv.0.as_ptr(), changes[0].kv.0.as_ptr(), "not a copy");
    }
    assert_eq!(count, 10_000);
}

/// What a client may still expect of one watcher.
struct Expect {
    keys: Keys,
    put: bool,
    delete: bool,
    prev: bool,
    /// The first revision of which nothing was received yet.
    next: i64,
    start: i64,
    /// Events of a response of which fragments are still to come.
    partial: Vec<mvccpb::Event>,
}

impl Expect {
    fn wants(&self, event: &Event) -> bool {
        let follows = match &self.keys {
            Keys::One(key) => *key == event.key,
            Keys::Range(from, End::Open) => *from <= event.key,
            Keys::Range(from, End::Before(end)) => *from <= event.key && event.key < *end,
        };
        follows && if event.kind == EventKind::Delete { self.delete } else { self.put }
    }

    fn missing<'a>(&'a self, past: &'a Past, to: i64) -> impl Iterator<Item = &'a Event> {
        past.since(self.next)
            .iter()
            .take_while(move |event| event.revision.main <= to)
            .filter(|event| self.wants(event))
    }
}

struct Model {
    seed: u64,
    random: Random,
    past: Past,
    hub: Hub,
    now: Uptime,
    held: Vec<Event>,
    streams: BTreeMap<StreamId, BTreeMap<i64, Expect>>,
    /// A create request whose reply must come next on its stream.
    asked: Option<(StreamId, i64, Expect)>,
    /// A fragmented response being received: nothing else may come on its stream.
    in_fragment: Option<(StreamId, i64)>,
    unread: BTreeMap<StreamId, usize>,
    opened: u64,
    received: u64,
    compacted: u64,
    fragmented: u64,
    notices: u64,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let options = HubOptions {
            progress_interval_ms: 1000,
            // With the overhead of 512 KiB, a response of two large values is split.
            max_request_bytes: 0,
            stream_room: 1 + random.below(6) as usize,
            stream_bytes: 500 << 10,
        };
        let mut model = Model {
            seed,
            past: Past::new(),
            hub: Hub::new(options, 1, seed),
            random,
            now: Uptime(0),
            held: Vec::new(),
            streams: BTreeMap::new(),
            asked: None,
            in_fragment: None,
            unread: BTreeMap::new(),
            opened: 0,
            received: 0,
            compacted: 0,
            fragmented: 0,
            notices: 0,
        };
        for _ in 0..3 {
            model.open();
        }
        model
    }

    fn key(&mut self) -> Bytes {
        Bytes::from(format!(
            "{}{}",
            ["a", "b", "b/"][self.random.below(3) as usize],
            self.random.below(4)
        ))
    }

    fn keys(&mut self) -> (Bytes, Bytes, Keys) {
        let key = self.key();
        match self.random.below(5) {
            0 | 1 => (key.clone(), Bytes::new(), Keys::One(key)),
            2 => (key.clone(), Bytes::from_static(b"\0"), Keys::Range(key, End::Open)),
            3 => {
                let (from, end) = (Bytes::from_static(b"b/"), Bytes::from_static(b"b0"));
                (from.clone(), end.clone(), Keys::Range(from, End::Before(end)))
            }
            _ => {
                let end = Bytes::from([&key[..], b"~"].concat());
                (key.clone(), end.clone(), Keys::Range(key, End::Before(end)))
            }
        }
    }

    fn stream(&mut self) -> Option<StreamId> {
        let at = self.random.below(self.streams.len().max(1) as u64) as usize;
        self.streams.keys().nth(at).copied()
    }

    fn txn(&mut self) {
        let large = self.random.below(40) == 0;
        let mut ops: BTreeMap<Bytes, Op> = BTreeMap::new();
        for _ in 0..[1, 1, 1, 2, 5][self.random.below(5) as usize] {
            let key = self.key();
            let op = if self.random.below(3) == 0 {
                Op::Delete(key.clone())
            } else {
                let len = if large { 300 << 10 } else { 1 + self.random.below(5) as usize };
                Op::Put(key.clone(), vec![b'v'; len].into())
            };
            ops.insert(key, op);
        }
        let ops: Vec<Op> = ops.into_values().collect();
        let changes = self.past.apply(&ops);
        self.held.extend(changes);
    }

    fn create(&mut self) {
        let Some(stream) = self.stream() else { return };
        let (key, range_end, keys) = self.keys();
        let current = self.past.revision;
        let start = match self.random.below(6) {
            0 => self.random.below(current as u64 + 5) as i64,
            1 | 2 => current - self.random.below(current.min(30) as u64) as i64,
            _ => 0,
        };
        let taken = &self.streams[&stream];
        let id = 1 + self.random.below(30) as i64;
        let id = if self.random.below(2) == 0 || taken.contains_key(&id) { 0 } else { id };
        let filters: Vec<i32> = match self.random.below(6) {
            0 => vec![0],
            1 => vec![1],
            _ => vec![7],
        };
        let prev_kv = self.random.below(2) == 0;
        let expect = Expect {
            keys,
            put: !filters.contains(&0),
            delete: !filters.contains(&1),
            prev: prev_kv,
            next: if start == 0 { current + 1 } else { start },
            start,
            partial: Vec::new(),
        };
        let request = WatchCreateRequest {
            key,
            range_end,
            start_revision: start,
            watch_id: id,
            filters,
            prev_kv,
            fragment: self.random.below(2) == 0,
            progress_notify: self.random.below(2) == 0,
        };
        let request = union(RequestUnion::CreateRequest(request));
        self.asked = Some((stream, id, expect));
        self.hub.request(stream, request, Ok(()), &self.past, self.now);
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..45 => self.txn(),
            45..60 => {
                // The hub is told late, and of several revisions at once.
                let held = std::mem::take(&mut self.held);
                self.hub.events(self.past.revision, &held, &self.past).unwrap();
            }
            60..66 => self.create(),
            66..69 => {
                let Some(stream) = self.stream() else { return };
                let ids: Vec<i64> = self.streams[&stream].keys().copied().collect();
                let at = self.random.below(ids.len() as u64 + 1) as usize;
                let id = ids.get(at).copied().unwrap_or(999);
                let before = self.hub.stats().watchers;
                self.hub.request(stream, cancel(id), Ok(()), &self.past, self.now);
                let gone = usize::from(id != 999);
                assert_eq!(self.hub.stats().watchers, before - gone, "seed {}", self.seed);
            }
            69..72 => {
                if let Some(stream) = self.stream() {
                    self.hub.request(stream, progress(), Ok(()), &self.past, self.now);
                }
            }
            72..83 => {
                if let Some(stream) = self.stream() {
                    let unread = self.unread.get_mut(&stream).unwrap();
                    let count = self.random.below(*unread as u64 + 1) as usize;
                    *unread -= count;
                    self.hub.delivered(stream, count);
                }
            }
            83..94 => {
                let budget = [1, 3, 20, 100_000][self.random.below(4) as usize];
                self.hub.catch_up(&self.past, budget).unwrap();
            }
            94 => {
                let span = (self.past.revision - self.past.compacted) as u64;
                let revision = self.past.compacted + self.random.below(span + 1) as i64;
                if revision > self.past.compacted && self.random.below(3) == 0 {
                    self.past.compacted = revision;
                    if self.random.below(2) == 0 {
                        self.hub.compacted(revision);
                    }
                }
            }
            95 => {
                self.now = self.now.plus_ms(self.random.below(3000));
                self.hub.tick(self.now);
                assert!(self.hub.next_deadline().is_none_or(|at| at > self.now));
            }
            96 if self.random.below(4) == 0 => {
                self.held.clear();
                self.hub.restored(self.past.revision);
            }
            97 if self.random.below(10) == 0 => {
                if let Some(stream) = self.stream() {
                    self.hub.close(stream);
                    self.streams.remove(&stream);
                    self.unread.remove(&stream);
                }
            }
            98 if self.streams.len() < 5 => self.open(),
            _ => {}
        }
    }

    fn open(&mut self) {
        self.opened += 1;
        let stream = StreamId(self.opened);
        self.hub.open(stream, self.now);
        self.streams.insert(stream, BTreeMap::new());
        self.unread.insert(stream, 0);
    }

    fn receive(&mut self, at: u64) {
        let responses: Vec<_> = self.hub.drain().collect();
        for (stream, response) in responses {
            let what =
                format!("seed {} step {at}, stream {}: {}", self.seed, stream.0, show(&response));
            *self.unread.get_mut(&stream).unwrap() += 1;
            self.check(stream, response, &what);
        }
        assert!(self.asked.is_none(), "seed {} step {at}: no reply to a create", self.seed);
        assert!(self.in_fragment.is_none(), "seed {} step {at}: a response is cut off", self.seed);
    }

    fn check(&mut self, stream: StreamId, response: WatchResponse, what: &str) {
        let revision = response.header.unwrap().revision;
        let id = response.watch_id;
        if let Some(open) = self.in_fragment {
            assert_eq!(open, (stream, id), "{what}: fragments are contiguous");
        }
        let watchers = self.streams.get_mut(&stream).expect("a response to an open stream");
        if response.created {
            let (to, asked, expect) =
                self.asked.take().unwrap_or_else(|| panic!("{what}: not asked"));
            assert!(!response.canceled && response.events.is_empty(), "{what}");
            assert_eq!((to, revision), (stream, self.past.revision), "{what}");
            assert!(asked == 0 || asked == id, "{what}");
            assert!(watchers.insert(id, expect).is_none(), "{what}: the id is in use");
            return;
        }
        if response.canceled {
            let expect = watchers.remove(&id).unwrap_or_else(|| panic!("{what}: no such watcher"));
            if response.compact_revision != 0 {
                assert_eq!(revision, 0, "{what}");
                assert!(response.compact_revision <= self.past.compacted, "{what}");
                assert!(expect.next < response.compact_revision, "{what}: it needed nothing lost");
                self.compacted += 1;
            }
            return;
        }
        if response.events.is_empty() {
            self.notices += 1;
            let all: Vec<&mut Expect> = if id == NO_WATCH {
                assert!(!watchers.is_empty(), "{what}: nobody to notify");
                watchers.values_mut().collect()
            } else {
                vec![watchers.get_mut(&id).unwrap_or_else(|| panic!("{what}: no such watcher"))]
            };
            for expect in all {
                assert!(expect.start <= revision, "{what}: it begins at {}", expect.start);
                let missed = expect.missing(&self.past, revision).next();
                assert!(missed.is_none(), "{what}: progress ahead of {missed:?}");
                expect.next = expect.next.max(revision + 1);
            }
            return;
        }

        let expect = watchers.get_mut(&id).unwrap_or_else(|| panic!("{what}: no such watcher"));
        expect.partial.extend(response.events);
        if response.fragment {
            self.in_fragment = Some((stream, id));
            self.fragmented += 1;
            return;
        }
        self.in_fragment = None;
        let events = std::mem::take(&mut expect.partial);
        self.received += events.len() as u64;
        let last = events.last().unwrap().kv.as_ref().unwrap().parse().unwrap().mod_revision;
        assert!(last <= revision && revision <= self.past.revision, "{what}");
        // All there is up to the last revision, whole: so none is missing, repeated or out of
        // order.
        let due: Vec<&Event> = expect.missing(&self.past, last).collect();
        assert_eq!(
            events.len(),
            due.len(),
            "{what}: gap, repetition or torn revision; due {due:?}"
        );
        for (event, due) in events.iter().zip(due) {
            assert_eq!(event.kv.as_ref(), Some(&due.kv), "{what}");
            assert_eq!(
                event.r#type() == EventType::Delete,
                due.kind == EventKind::Delete,
                "{what}"
            );
            let before = match due.kind {
                EventKind::Put { creation: true } => None,
                _ => self.past.value_at(&due.key, due.revision.main - 1).unwrap(),
            };
            assert_eq!(event.prev_kv, before.filter(|_| expect.prev), "{what}");
        }
        expect.next = last + 1;
    }

    /// In the end, every watcher that still lives has received all there is.
    fn settle(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.hub.events(self.past.revision, &held, &self.past).unwrap();
        loop {
            self.receive(u64::MAX);
            let more = self.hub.catch_up(&self.past, 1000).unwrap();
            let mut read = 0;
            // Only a delivery of something may be needed to get on.
            for (stream, unread) in self.unread.iter_mut().filter(|(_, unread)| **unread > 0) {
                read += *unread;
                self.hub.delivered(*stream, std::mem::take(unread));
            }
            if !more && read == 0 && self.hub.out.is_empty() && !self.hub.has_backlog() {
                break;
            }
        }
        let stats = self.hub.stats();
        assert_eq!((stats.slow_watchers, stats.pending_events), (0, 0), "seed {}", self.seed);
        assert_eq!(stats.watchers, self.streams.values().map(BTreeMap::len).sum::<usize>());
        for (stream, watchers) in &self.streams {
            for (id, expect) in watchers {
                let missed = expect.missing(&self.past, i64::MAX).next();
                assert!(missed.is_none(), "seed {}: {stream:?} {id} misses {missed:?}", self.seed);
            }
        }
    }
}

#[test]
fn every_watcher_is_sent_what_the_whole_history_holds_for_it() {
    let seeds = match std::env::var("WATCH_SEED") {
        Ok(seed) => vec![seed.parse().expect("WATCH_SEED is a number")],
        Err(_) => (0..25).collect(),
    };
    let many = seeds.len() > 1;
    let mut reached = [0; 5];
    for seed in seeds {
        println!("WATCH_SEED={seed} runs this again");
        let mut model = Model::new(seed);
        for step in 0..2000 {
            model.step();
            model.receive(step);
        }
        model.settle();
        let Model { received, compacted, fragmented, notices, .. } = model;
        for (sum, new) in reached.iter_mut().zip([received, compacted, fragmented, notices, 1]) {
            *sum += new;
        }
    }
    assert!(!many || reached.iter().all(|n| *n >= 25), "the model reaches all cases: {reached:?}");
}
