//! The hot paths of the core, without actors, sockets or disks. `cargo bench` measures them; `cargo test`
//! runs each once, so that they do not rot.

use bytes::Bytes;
use divan::{Bencher, black_box, counter::ItemsCount};
use engine_memory::Memory;
use prost::Message as _;
use quorate::core::apply::{Effects, Machine};
use quorate::core::command::{Command, Request};
use quorate::core::event::{Event, EventKind, History, HistoryError};
use quorate::core::membership::{Membership, Version};
use quorate::core::mvcc::Values;
use quorate::core::quota::{Quota, Sizes};
use quorate::core::types::{ClusterId, MemberId, Revision, Uptime};
use quorate::core::watch::{Hub, HubOptions, StreamId};
use quorate_proto::etcdserverpb::watch_request::RequestUnion;
use quorate_proto::mvccpb::KeyValue;
use quorate_proto::{KeyValueBytes, etcdserverpb as pb, raftpb};

fn main() {
    divan::main();
}

fn put(key: u64) -> Request {
    Request::Put(pb::PutRequest {
        key: key.to_be_bytes().to_vec().into(),
        value: vec![7; 256].into(),
        ..Default::default()
    })
}

fn entry(index: u64, key: u64) -> raftpb::Entry {
    raftpb::Entry {
        r#type: raftpb::EntryType::EntryNormal as i32,
        term: 1,
        index,
        data: Command::new(index, put(key)).encode(),
    }
}

fn machine() -> Machine {
    let members = Membership::new(ClusterId(1), MemberId(1), 1);
    Machine::new(members, 2, Version { major: 3, minor: 7, patch: 1 })
}

/// Applies puts of `keys` different keys, `batch` a publication.
fn apply(machine: &mut Machine, engine: &Memory, from: u64, batch: u64, keys: u64) {
    let values = Values::new(engine);
    let mut effects = Effects::default();
    for index in from..from + batch {
        let entry = entry(index, index % keys);
        let outcome =
            machine.apply(&values, &entry, |_| true, Quota::OFF, Sizes::default, &mut effects);
        assert!(matches!(outcome, Ok(Some(outcome)) if outcome.result.is_ok()));
    }
    black_box((machine.store.now().clone(), effects));
}

#[divan::bench]
fn encode_put() -> bytes::Bytes {
    Command::new(black_box(1 << 60), put(1)).encode()
}

#[divan::bench]
fn decode_put(bencher: Bencher<'_, '_>) {
    let data = Command::new(1 << 60, put(1)).encode();
    bencher.bench(|| Command::decode(black_box(data.clone())));
}

/// One published batch of puts into a store of that many keys.
#[divan::bench(args = [1, 100_000], sample_count = 20)]
fn apply_100_puts(bencher: Bencher<'_, '_>, keys: u64) {
    const BATCH: u64 = 100;
    let engine = Memory::new();
    let mut machine = machine();
    let mut next = 1;
    while next <= keys {
        apply(&mut machine, &engine, next, BATCH, keys);
        next += BATCH;
    }
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        apply(&mut machine, &engine, next, BATCH, keys);
        next += BATCH;
    });
}

#[divan::bench(args = [false, true], sample_count = 20)]
fn read_one_of_10_000_keys(bencher: Bencher<'_, '_>, committed: bool) {
    let engine = Memory::new();
    let mut machine = machine();
    apply(&mut machine, &engine, 1, 10_000, 10_000);
    if committed {
        let (batch, _) = machine.cut();
        engine_api::Engine::commit(&engine, &batch, engine_api::Durability::Buffered)
            .expect("memory takes any batch");
        machine.store.committed();
    }
    let now = machine.store.now().clone();
    let request =
        pb::RangeRequest { key: 5000u64.to_be_bytes().to_vec().into(), ..Default::default() };
    bencher.bench_local(|| {
        let ranged = now.range(&Values::new(&engine), &request).expect("the key is there");
        assert_eq!(ranged.count, 1);
        ranged.kvs[0].encoded_len()
    });
}

/// A range from the store to the bytes of its reply.
#[divan::bench(args = [1, 1_000], sample_count = 20)]
fn encode_a_range(bencher: Bencher<'_, '_>, keys: u64) {
    let engine = Memory::new();
    let mut machine = machine();
    apply(&mut machine, &engine, 1, 10_000, 10_000);
    let now = machine.store.now().clone();
    let request = pb::RangeRequest {
        key: 5000u64.to_be_bytes().to_vec().into(),
        range_end: (5000 + keys).to_be_bytes().to_vec().into(),
        ..Default::default()
    };
    let mut reply = Vec::with_capacity(1 << 20);
    bencher.counter(ItemsCount::new(keys)).bench_local(|| {
        let ranged = now.range(&Values::new(&engine), &request).expect("the keys are there");
        let message =
            pb::RangeResponse { kvs: ranged.kvs, count: ranged.count, ..Default::default() };
        assert_eq!(message.count as u64, keys);
        reply.clear();
        message.encode(&mut reply).expect("a vector grows");
        black_box(reply.len())
    });
}

/// A history in which nobody looks: the watchers are all at its end.
struct NoHistory(i64);

impl History for NoHistory {
    fn revision(&self) -> i64 {
        self.0
    }

    fn compact_revision(&self) -> i64 {
        -1
    }

    fn changes(
        &self,
        _: i64,
        _: i64,
        _: &mut dyn FnMut(Event) -> bool,
    ) -> Result<(), HistoryError> {
        Ok(())
    }

    fn value_at(&self, _: &[u8], _: i64) -> Result<Option<KeyValueBytes>, HistoryError> {
        Ok(None)
    }
}

/// One event to so many watchers of its key, spread over ten streams, each reply encoded as for the wire.
#[divan::bench(args = [1, 1_000], sample_count = 20)]
fn tell_watchers_of_an_event(bencher: Bencher<'_, '_>, watchers: u64) {
    const STREAMS: u64 = 10;
    let mut revision = 1;
    let mut hub = Hub::new(HubOptions::default(), revision, 1);
    for stream in 0..STREAMS {
        hub.open(StreamId(stream), Uptime(0));
    }
    for watcher in 0..watchers {
        let create = pb::WatchCreateRequest { key: "watched".into(), ..Default::default() };
        let request = pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        let history = NoHistory(revision);
        hub.request(StreamId(watcher % STREAMS), request, Ok(()), &history, Uptime(0));
    }
    let created: Vec<StreamId> = hub.drain().map(|(stream, _)| stream).collect();
    assert_eq!(created.len() as u64, watchers);
    created.into_iter().for_each(|stream| hub.delivered(stream, 1));
    let key = Bytes::from_static(b"watched");
    let mut bytes = Vec::with_capacity(1 << 10);
    let mut told = Vec::with_capacity(watchers as usize);
    bencher.counter(ItemsCount::new(watchers)).bench_local(|| {
        revision += 1;
        let pair = KeyValue {
            key: key.clone(),
            create_revision: 2,
            mod_revision: revision,
            version: revision - 1,
            value: vec![7; 256].into(),
            lease: 0,
        };
        let event = Event {
            key: key.clone(),
            revision: Revision::main(revision),
            kind: EventKind::Put { creation: revision == 2 },
            kv: KeyValueBytes::from(&pair),
        };
        hub.events(revision, &[event], &NoHistory(revision)).expect("no history is read");
        told.extend(hub.drain().map(|(stream, response)| {
            bytes.clear();
            response.encode(&mut bytes).expect("a vector grows");
            stream
        }));
        assert_eq!(told.len() as u64, watchers);
        told.drain(..).for_each(|stream| hub.delivered(stream, 1));
    });
}
