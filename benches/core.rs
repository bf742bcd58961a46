//! The hot paths of the core, without actors, sockets or disks. `cargo bench` measures them; `cargo test`
//! runs each once, so that they do not rot.

use divan::{Bencher, black_box, counter::ItemsCount};
use engine_memory::Memory;
use prost::Message as _;
use quorate::core::apply::{Effects, Machine};
use quorate::core::command::{Command, Request};
use quorate::core::membership::{Membership, Version};
use quorate::core::mvcc::Values;
use quorate::core::quota::{Quota, Sizes};
use quorate::core::types::{ClusterId, MemberId};
use quorate_proto::{etcdserverpb as pb, raftpb};

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
