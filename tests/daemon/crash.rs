//! SIGKILL at any moment: what was acknowledged is there afterwards, once, at its revision.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::request_op::Request as Op;

use crate::process::{Client, PATIENCE, Random, Setup, copy_dir, env_number, files, runtime};

/// Clients that write at the same time, each to keys of its own.
const CLIENTS: usize = 4;
/// Keys of a client.
const KEYS: u64 = 8;

/// A key's value; `None` if it is deleted.
type Change = (String, Option<String>);

/// One request and what it changes.
#[derive(Clone, Debug, Default)]
struct Write {
    changes: Vec<Change>,
    /// The revision that was acknowledged; 0 while it is in doubt.
    revision: i64,
}

/// What one client knows.
#[derive(Default)]
struct Writer {
    number: usize,
    serial: u64,
    /// The value of each key and the revision of its last change.
    state: BTreeMap<String, (Option<String>, i64)>,
    acknowledged: Vec<Write>,
    /// Sent, and not answered when the connection broke.
    in_doubt: Option<Write>,
    leases: Vec<(i64, Option<String>)>,
    compacted: i64,
}

impl Writer {
    fn key(&self, n: u64) -> String {
        format!("c{}/k{n}", self.number)
    }

    /// Sends requests until one fails, which the death of the server brings about.
    async fn run(&mut self, client: &Client, random: &mut Random, value_bytes: usize) {
        loop {
            let key = self.key(random.below(KEYS));
            self.serial += 1;
            let padding = "x".repeat(random.below(value_bytes as u64) as usize);
            let value = format!("{}-{}-{padding}", self.number, self.serial);
            let result = match random.below(20) {
                0..10 => self.write(vec![(key, Some(value))], client).await,
                10..13 => self.write(vec![(key, None)], client).await,
                13..17 => {
                    let other = (0..KEYS).map(|n| self.key(n)).find(|other| *other != key).unwrap();
                    self.write(vec![(key, Some(value)), (other, None)], client).await
                }
                17..19 => self.lease(client, random.below(2) == 0).await,
                _ => self.compact(client).await,
            };
            if result.is_err() {
                return;
            }
        }
    }

    /// One change is a put or a delete; two are a transaction.
    async fn write(&mut self, changes: Vec<Change>, client: &Client) -> Result<(), tonic::Status> {
        self.in_doubt = Some(Write { changes: changes.clone(), revision: 0 });
        let bytes = |text: &String| bytes::Bytes::copy_from_slice(text.as_bytes());
        let revision = if let [(key, value)] = &changes[..] {
            match value {
                Some(value) => client.put(key, value.clone()).await?,
                None => {
                    let response = client.delete(key).await?;
                    let was_there = self.state.get(key).is_some_and(|(value, _)| value.is_some());
                    assert_eq!(response.deleted, i64::from(was_there), "{key}");
                    if was_there { crate::process::revision(&response.header) } else { 0 }
                }
            }
        } else {
            let success = changes
                .iter()
                .map(|(key, value)| {
                    let request = match value {
                        Some(value) => Op::RequestPut(pb::PutRequest {
                            key: bytes(key),
                            value: bytes(value),
                            ..Default::default()
                        }),
                        None => Op::RequestDeleteRange(pb::DeleteRangeRequest {
                            key: bytes(key),
                            ..Default::default()
                        }),
                    };
                    pb::RequestOp { request: Some(request) }
                })
                .collect();
            let request = pb::TxnRequest { success, ..Default::default() };
            let response = client.kv.clone().txn(request).await?.into_inner();
            assert!(response.succeeded);
            crate::process::revision(&response.header)
        };
        let write = Write { changes, revision };
        self.in_doubt = None;
        // A delete of nothing has no revision.
        if revision > 0 {
            let last = self.acknowledged.last().map_or(0, |write| write.revision);
            assert!(revision > last, "revision {revision} was acknowledged after {last}");
            self.take(&write);
            self.acknowledged.push(write);
        }
        Ok(())
    }

    fn take(&mut self, write: &Write) {
        for (key, value) in &write.changes {
            let deleted_nothing =
                value.is_none() && self.state.get(key).is_none_or(|(value, _)| value.is_none());
            if !deleted_nothing {
                self.state.insert(key.clone(), (value.clone(), write.revision));
            }
        }
    }

    /// Grants a lease that outlives the test, with a key on it or without.
    async fn lease(&mut self, client: &Client, with_key: bool) -> Result<(), tonic::Status> {
        let id = client.grant(100_000).await?;
        self.leases.push((id, None));
        if with_key {
            let (key, value) = (format!("c{}/lease/{id:x}", self.number), format!("{id}"));
            self.in_doubt =
                Some(Write { changes: vec![(key.clone(), Some(value.clone()))], revision: 0 });
            let revision = client.put_with(&key, value.clone(), id).await?;
            self.in_doubt = None;
            let write = Write { changes: vec![(key.clone(), Some(value))], revision };
            self.take(&write);
            self.acknowledged.push(write);
            self.leases.last_mut().expect("it was pushed").1 = Some(key);
        }
        Ok(())
    }

    /// Compacts to a while ago; the clients compete, and the loser's request is too old.
    async fn compact(&mut self, client: &Client) -> Result<(), tonic::Status> {
        let at = self.acknowledged.last().map_or(0, |write| write.revision) - 40;
        if at < 1 {
            return Ok(());
        }
        match client.compact(at, false).await {
            Ok(()) => self.compacted = self.compacted.max(at),
            Err(status) if status.message().contains("compacted") => {}
            Err(status) => return Err(status),
        }
        Ok(())
    }

    /// Compares everything this client knows to what the restarted server holds.
    async fn check(&mut self, client: &Client, compacted: i64, random: &mut Random) {
        let prefix = format!("c{}/", self.number);
        let request = pb::RangeRequest {
            key: prefix.clone().into_bytes().into(),
            range_end: format!("c{}0", self.number).into_bytes().into(),
            ..Default::default()
        };
        let response = client.range(request).await.unwrap();
        let held: BTreeMap<String, (String, i64)> = response
            .kvs
            .iter()
            .map(|kv| {
                let kv = kv.parse().unwrap();
                let text = |bytes: &bytes::Bytes| String::from_utf8(bytes.to_vec()).unwrap();
                (text(&kv.key), (text(&kv.value), kv.mod_revision))
            })
            .collect();
        if let Some(mut write) = self.in_doubt.take() {
            // All of it has happened, or nothing.
            let (key, value) = &write.changes[0];
            let happened = match value {
                Some(value) => held.get(key).is_some_and(|(held, _)| held == value),
                None => !held.contains_key(key),
            };
            if happened {
                write.revision = match value {
                    Some(_) => held[key].1,
                    // Nobody knows the revision of a deletion that was not answered.
                    None => 0,
                };
                self.take(&write);
            }
        }
        let expected: BTreeMap<String, (String, i64)> = self
            .state
            .iter()
            .filter_map(|(key, (value, revision))| Some((key.clone(), (value.clone()?, *revision))))
            .collect();
        assert_eq!(held, expected, "client {}", self.number);

        let known: Vec<&Write> =
            self.acknowledged.iter().filter(|write| write.revision >= compacted.max(1)).collect();
        for _ in 0..20.min(known.len()) {
            let write = known[random.below(known.len() as u64) as usize];
            for (key, value) in &write.changes {
                let held = client.get_at(key, write.revision).await.unwrap();
                let held = held.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap());
                assert_eq!(&held, value, "{key} at {}", write.revision);
            }
        }
        for (id, key) in &self.leases {
            let lease = client.time_to_live(*id).await.unwrap();
            assert!(lease.ttl > 0 && lease.granted_ttl == 100_000, "{lease:?}");
            if let Some(key) = key {
                assert_eq!(lease.keys, [key.clone().into_bytes()], "{id:x}");
            }
        }
    }
}

/// The whole history that is left: by revision, every key changed and its value.
async fn history(
    client: &Client,
    from: i64,
    to: i64,
) -> BTreeMap<i64, BTreeMap<String, Option<String>>> {
    let mut seen = BTreeMap::<i64, BTreeMap<String, Option<String>>>::new();
    let (_sender, mut responses) = client.watch_all(from).await.unwrap();
    while seen.last_key_value().map_or(0, |(revision, _)| *revision) < to {
        let next = tokio::time::timeout(PATIENCE, responses.message()).await;
        let response = next.expect("the history comes to its end").unwrap().unwrap();
        assert!(!response.canceled, "{response:?}");
        for event in response.events {
            let kv = event.kv.as_ref().unwrap().parse().unwrap();
            let text = |bytes: &bytes::Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            let put = event.r#type() == quorate_proto::mvccpb::event::EventType::Put;
            let value = put.then(|| text(&kv.value));
            let before = seen.entry(kv.mod_revision).or_default().insert(text(&kv.key), value);
            assert!(before.is_none(), "an event came twice at {}", kv.mod_revision);
        }
    }
    seen
}

struct Crashes {
    seed: u64,
    rounds: u64,
    value_bytes: usize,
    args: &'static [&'static str],
    /// Whether the log still holds everything at the end.
    replay: bool,
}

fn crash_again_and_again(crashes: &Crashes) {
    let Crashes { seed, rounds, value_bytes, args, replay } = *crashes;
    println!("CRASH_SEED={seed} CRASH_ROUNDS={rounds}");
    let mut random = Random::new(seed);
    let setup = Setup::new(args);
    let runtime = runtime();
    let mut writers: Vec<Writer> =
        (0..CLIENTS).map(|number| Writer { number, ..Writer::default() }).collect();
    let mut floor = 0;
    for round in 0..rounds {
        let daemon = setup.start();
        let client = runtime.block_on(async { daemon.client() });
        let alive = Duration::from_millis(20 + random.below(700));
        let shared: Vec<_> =
            writers.drain(..).map(|writer| Arc::new(Mutex::new(Some(writer)))).collect();
        runtime.block_on(async {
            let (revision, compacted) = check_all(&client, &shared, floor, &mut random).await;
            floor = revision;
            println!("round {round}: revision {revision}, compacted {compacted}");
            let mut tasks = Vec::new();
            for slot in &shared {
                let mut writer = slot.lock().unwrap().take().unwrap();
                let mut random = Random::new(random.below(u64::MAX));
                let client = client.clone();
                tasks.push(tokio::spawn(async move {
                    writer.run(&client, &mut random, value_bytes).await;
                    writer
                }));
            }
            tokio::time::sleep(alive).await;
            let killer = tokio::task::spawn_blocking(move || daemon.kill());
            for task in tasks {
                let ended = tokio::time::timeout(PATIENCE, task).await;
                writers.push(ended.expect("a client sees the death of its server").unwrap());
            }
            killer.await.unwrap();
        });
    }

    let daemon = setup.start();
    let client = runtime.block_on(async { daemon.client() });
    let shared: Vec<_> =
        writers.drain(..).map(|writer| Arc::new(Mutex::new(Some(writer)))).collect();
    let (revision, hash) = runtime.block_on(async {
        let (revision, compacted) = check_all(&client, &shared, floor, &mut random).await;
        println!("end: revision {revision}, compacted {compacted}");
        assert!(revision > rounds as i64, "the clients have written: {revision}");
        (revision, client.hash_kv(revision).await.unwrap())
    });
    if replay {
        let copy = setup.temp.path().join("copy");
        copy_dir(&setup.wal_dir(), &copy.join("member").join("wal"));
        let replayed = Setup::on(copy, &["--engine=memory"]);
        let replayed = replayed.start();
        runtime.block_on(async {
            let again = replayed.client().hash_kv(revision).await.unwrap();
            assert_eq!(
                (again.hash, again.compact_revision, again.hash_revision),
                (hash.hash, hash.compact_revision, hash.hash_revision),
                "what the log says is not what the engine holds"
            );
        });
    }
    runtime.block_on(async {
        assert_eq!(client.put("after", "all").await.unwrap(), revision + 1);
    });
    daemon.stop();
}

/// Compares everything acknowledged to what a server holds; answers its revision and the
/// revision up to which it is compacted.
async fn check_all(
    client: &Client,
    writers: &[Arc<Mutex<Option<Writer>>>],
    floor: i64,
    random: &mut Random,
) -> (i64, i64) {
    let revision = client.revision().await.unwrap();
    let hash = client.hash_kv(0).await.unwrap();
    let compacted = hash.compact_revision;
    assert!(revision >= floor, "revision went back from {floor} to {revision}");
    let mut acknowledged = BTreeMap::new();
    for slot in writers {
        let mut writer = slot.lock().unwrap().take().unwrap();
        // -1 stands for never.
        assert!(compacted.max(0) >= writer.compacted, "an acknowledged compaction is missing");
        writer.check(client, compacted, random).await;
        for write in &writer.acknowledged {
            let before = acknowledged.insert(write.revision, write.clone());
            assert!(before.is_none(), "revision {} was acknowledged twice", write.revision);
        }
        *slot.lock().unwrap() = Some(writer);
    }
    let last = acknowledged.last_key_value().map_or(0, |(revision, _)| *revision);
    assert!(revision >= last, "revision is {revision}, acknowledged was {last}");
    let from = (compacted + 1).max(2);
    if revision >= from {
        let history = history(client, from, revision).await;
        assert!(history.keys().copied().eq(from..=revision), "there is no gap");
        for (at, write) in acknowledged.range(from..) {
            let seen = &history[at];
            // What a transaction deletes without effect is not an event.
            let wanted: BTreeSet<_> = write.changes.iter().map(|(key, _)| key).collect();
            assert!(seen.keys().all(|key| wanted.contains(key)), "{at}: {seen:?}");
            for (key, value) in &write.changes {
                assert!(value.is_none() || seen.get(key) == Some(value), "{at}: {seen:?}");
            }
        }
    }
    (revision, compacted)
}

#[test]
fn nothing_acknowledged_is_lost_by_a_kill() {
    crash_again_and_again(&Crashes {
        seed: env_number("CRASH_SEED", 1),
        rounds: env_number("CRASH_ROUNDS", 15),
        value_bytes: 2000,
        args: &[],
        replay: true,
    });
}

#[test]
fn nothing_acknowledged_is_lost_by_a_kill_when_snapshots_are_frequent() {
    crash_again_and_again(&Crashes {
        seed: env_number("CRASH_SEED", 2),
        rounds: env_number("CRASH_ROUNDS", 15),
        value_bytes: 200,
        // Batches of a few writes, so that kills fall between the many steps of a snapshot.
        args: &["--snapshot-count=20", "--backend-batch-limit=3", "--max-snapshots=2"],
        // One segment of the log holds it all, snapshots or not.
        replay: true,
    });
}

#[test]
fn a_restart_works_from_a_snapshot_when_the_log_before_it_is_gone() {
    let setup = Setup::new(&["--snapshot-count=50", "--max-wals=1", "--max-snapshots=2"]);
    let runtime = runtime();
    let mut daemon = setup.start();
    let value = vec![b'v'; 1_000_000];
    runtime.block_on(async {
        let client = daemon.client();
        // A segment has 64 MB: this needs the third.
        for n in 0..140 {
            client.put(&format!("k{}", n % 10), value.clone()).await.unwrap();
        }
        client.put("last", "one").await.unwrap();
    });
    daemon.wait_logged("saved snapshot to disk");
    let hash = runtime.block_on(async { daemon.client().hash_kv(0).await.unwrap() });
    assert!(setup.wal_dir().join("0000000000000000-0000000000000000.wal").exists());
    daemon.kill();

    let mut daemon = setup.start();
    daemon.wait_logged("purged");
    let first = setup.wal_dir().join("0000000000000000-0000000000000000.wal");
    crate::process::wait_for("the first segment to go", || {
        if first.exists() { Err("it is there".to_string()) } else { Ok(()) }
    });
    daemon.kill();
    let daemon = setup.start();
    let snapshots: Vec<_> = files(&setup.member_dir().join("snap"))
        .into_keys()
        .filter(|name| name.extension().is_some_and(|ending| ending == "snap"))
        .collect();
    assert!((1..=2).contains(&snapshots.len()), "{snapshots:?}");
    runtime.block_on(async {
        let client = daemon.client();
        assert_eq!(client.count().await.unwrap(), 11);
        assert_eq!(client.get("k3").await.unwrap().unwrap().value, value);
        let again = client.hash_kv(0).await.unwrap();
        assert_eq!((again.hash, again.hash_revision), (hash.hash, hash.hash_revision));
        assert_eq!(client.put("more", "of it").await.unwrap(), hash.hash_revision + 1);
    });
    daemon.stop();

    // Without what is gone from the log, only this engine can go on: no other can begin.
    let copy = setup.temp.path().join("copy");
    copy_dir(&setup.wal_dir(), &copy.join("member").join("wal"));
    let said = Setup::on(copy.clone(), &[]).refused();
    assert!(said.contains("backend is missing") && said.contains("engine-redb"), "{said}");
    assert!(!copy.join("member").join("engine-redb").exists());
    let said = Setup::on(copy.clone(), &["--engine=memory"]).refused();
    assert!(said.contains(&copy.join("member").join("wal").display().to_string()), "{said}");
}
