//! A member whose stored data is not what the others have: it is found, told, and kept from spreading.

use std::future::Future;
use std::ops::{Bound, ControlFlow};
use std::time::Duration;

use engine_api::{Batch, Durability, Engine, Table};
use prost::Message as _;
use quorate_proto::KeyValue;
use quorate_proto::etcdserverpb as pb;
use tonic::{Code, Status};

use crate::rig::client::{Client, revision};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::wait_for;
use crate::scenario::{metric, others, page, with_own_cluster};

/// Whose newest value is damaged.
const KEY: &str = "k3";
const WRONG: &[u8] = b"what nobody has put";
const ALARMS: &str = "etcd_debugging_server_alarms";
const PERIODIC: &str = "--corrupt-check-time=1s";
const PERIODIC_ROUND: &str = "finished peer corruption check";
const COMPACTIONS: [&str; 2] =
    ["--feature-gates=CompactHashCheck=true", "--compact-hash-check-time=300ms"];
const COMPACTION_AGREED: &str = "successfully checked hash on whole cluster";

/// A test that opens what a member has stored.
fn on_redb(test: impl Future<Output = ()>) {
    if Program::from_env() == Program::Etcd {
        println!("SKIPPED: the store of etcd is not opened here");
        return;
    }
    with_own_cluster(test);
}

/// A cluster with ten keys, each put twice, that all members have applied.
async fn filled(members: usize, args: &[&str]) -> Cluster {
    // Elections are rare: a damaged member that came to lead would suspect the others.
    let options = Options { election_ms: 1500, ..Options::default() }.with(args);
    let cluster = Cluster::start(Program::from_env(), members, options).await;
    let client = cluster.client(0);
    let mut revision = 0;
    for n in 0..20 {
        revision = client.put(&format!("k{}", n % 10), format!("right {n}")).await.unwrap();
    }
    cluster.equal_hashes(&cluster.running(), revision).await;
    cluster
}

/// Changes the newest value of [`KEY`] in the engine of a member that does not run to `value`, and
/// nothing else. Answers the value that was there.
fn store(cluster: &Cluster, node: Node, value: &[u8]) -> Vec<u8> {
    let dir = cluster.members[node].data.join("member/engine-redb");
    let engine =
        engine_redb::Redb::open(&dir, &engine_api::Options::defaults(&engine_redb::ABOUT)).unwrap();
    let mut newest = None;
    let view = engine.view().unwrap();
    view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut |revision, stored| {
        let stored = KeyValue::decode(stored).unwrap();
        if stored.key == KEY {
            newest = Some((revision.to_vec(), stored));
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    drop(view);
    let (revision, stored) = newest.expect("the key is stored");
    let changed = KeyValue { value: value.to_vec().into(), ..stored.clone() };
    let mut batch = Batch::default();
    batch.put(Table::Key, revision, changed.encode_to_vec());
    engine.commit(&batch, Durability::Durable).unwrap();
    stored.value.to_vec()
}

/// Restarts a member with another value stored; answers the value that was there.
async fn restart_with(cluster: &mut Cluster, node: Node, value: &[u8]) -> Vec<u8> {
    cluster.terminate(node).await;
    let before = store(cluster, node, value);
    cluster.run(node);
    cluster.wait_serving(node).await;
    before
}

fn corrupt(member_id: u64) -> pb::AlarmMember {
    pb::AlarmMember { member_id, alarm: pb::AlarmType::Corrupt as i32 }
}

/// Waits for an alarm; it must be of `member` alone.
async fn wait_alarmed(cluster: &Cluster, member: u64) {
    let client = cluster.client(0);
    let alarms = wait_for("an alarm", || async {
        let alarms = client.alarms().await.map_err(|error| error.to_string())?;
        if alarms.is_empty() { Err("there is none".to_string()) } else { Ok(alarms) }
    })
    .await;
    assert_eq!(alarms, [corrupt(member)]);
}

fn is_corrupt<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let status = answer.expect_err("a cluster that is corrupt takes no writes");
    let expected = (Code::DataLoss, "etcdserver: corrupt cluster");
    assert_eq!((status.code(), status.message()), expected);
}

/// The value of [`KEY`] that a member has, whoever else has another.
async fn local_value(client: &Client) -> Vec<u8> {
    let request =
        pb::RangeRequest { key: KEY.into(), serializable: true, ..pb::RangeRequest::default() };
    let response = client.range(request).await.unwrap();
    response.kvs[0].parse().unwrap().value.to_vec()
}

/// Every member tells of the alarm of `member`, takes no writes, and answers reads.
async fn all_are_alarmed(cluster: &Cluster, member: u64) {
    for node in cluster.running() {
        let client = cluster.client(node);
        // It is there once the member has applied the alarm.
        let health = wait_for("an unhealthy member", || async {
            let (status, body) = page(cluster, node, "/health").await;
            if status == 503 { Ok(body) } else { Err(format!("member {node}: {status} {body}")) }
        })
        .await;
        assert_eq!(health, "{\"health\":\"false\",\"reason\":\"ALARM CORRUPT\"}\n");
        let (status, _) = page(cluster, node, "/health?exclude=CORRUPT").await;
        assert_eq!(status, 200);
        let failed = "[-]data_corruption failed: alarm activated: CORRUPT\n";
        for path in ["/readyz", "/readyz/data_corruption"] {
            let (status, body) = page(cluster, node, path).await;
            assert_eq!(status, 503, "{path}: {body}");
            assert!(body.starts_with(failed), "{path}: {body}");
        }
        assert_eq!(page(cluster, node, "/livez").await.0, 200);

        // The gauge follows what the other pages show.
        let series = format!("{ALARMS}{{alarm_type=\"CORRUPT\",server_id=\"{member:x}\"}} 1");
        wait_for("the gauge", || async {
            let (_, metrics) = page(cluster, node, "/metrics").await;
            let shown: Vec<_> = metrics.lines().filter(|line| line.starts_with(ALARMS)).collect();
            if shown == [&series] { Ok(()) } else { Err(format!("member {node}: {shown:?}")) }
        })
        .await;

        is_corrupt(client.put(KEY, "more").await);
        is_corrupt(client.compact(5).await);
        // Linearizable and not.
        assert!(client.get("k5").await.unwrap().is_some());
        assert!(!local_value(&client).await.is_empty());
    }
}

fn logged(cluster: &Cluster, node: Node, text: &str) -> usize {
    cluster.members[node].log_text().matches(text).count()
}

/// Waits until `node` has logged `text` so many times more.
async fn logs_again(cluster: &Cluster, node: Node, text: &str, times: usize) {
    let enough = logged(cluster, node, text) + times;
    wait_for(text, || async {
        let now = logged(cluster, node, text);
        if now >= enough { Ok(()) } else { Err(format!("{now} of {enough}")) }
    })
    .await;
}

#[test]
fn a_changed_value_is_found_by_comparing_all_data() {
    on_redb(async {
        let mut cluster = filled(3, &[PERIODIC]).await;
        let leader = cluster.leader().await;
        logs_again(&cluster, leader, PERIODIC_ROUND, 1).await;
        assert_eq!(cluster.client(0).alarms().await.unwrap(), []);

        let damaged = cluster.follower().await;
        let id = cluster.id(damaged).await;
        let right = restart_with(&mut cluster, damaged, WRONG).await;
        wait_alarmed(&cluster, id).await;
        all_are_alarmed(&cluster, id).await;
        for node in 0..3 {
            let expected = if node == damaged { WRONG } else { &right };
            assert_eq!(local_value(&cluster.client(node)).await, expected, "member {node}");
        }

        // Alarms outlive a restart, and so does what is shown of them.
        let sound = others(damaged).into_iter().find(|node| *node != leader).unwrap();
        cluster.terminate(sound).await;
        cluster.run(sound);
        cluster.wait_serving(sound).await;
        all_are_alarmed(&cluster, id).await;

        // The damage is still there: whoever clears the alarm has it back.
        let client = cluster.client(leader);
        assert_eq!(client.disarm(corrupt(id)).await.unwrap(), [corrupt(id)]);
        wait_alarmed(&cluster, id).await;

        // Without the damage it can be cleared.
        restart_with(&mut cluster, damaged, &right).await;
        assert_eq!(client.disarm(corrupt(id)).await.unwrap(), [corrupt(id)]);
        logs_again(&cluster, leader, PERIODIC_ROUND, 2).await;
        assert_eq!(client.alarms().await.unwrap(), []);
        let revision = client.put(KEY, "more").await.unwrap();
        cluster.equal_hashes(&[0, 1, 2], revision).await;
        for node in 0..3 {
            assert_eq!(metric(&cluster, node, ALARMS).await, 0.0);
            assert_eq!(page(&cluster, node, "/health").await.0, 200);
        }
    });
}

#[test]
fn a_changed_value_is_found_by_comparing_compactions() {
    on_redb(async {
        let mut cluster = filled(3, &COMPACTIONS).await;
        let leader = cluster.leader().await;
        let client = cluster.client(leader);
        client.compact(12).await.unwrap();
        logs_again(&cluster, leader, COMPACTION_AGREED, 1).await;

        let damaged = cluster.follower().await;
        let id = cluster.id(damaged).await;
        restart_with(&mut cluster, damaged, WRONG).await;
        let revision = client.put("k5", "more").await.unwrap();
        client.compact(revision).await.unwrap();
        wait_alarmed(&cluster, id).await;
        all_are_alarmed(&cluster, id).await;

        // The majority is right whoever compares: the damaged member itself.
        client.move_leader(id).await.unwrap();
        logs_again(&cluster, damaged, "detected compaction hash mismatch", 1).await;
        assert_eq!(client.disarm(corrupt(id)).await.unwrap(), [corrupt(id)]);
        wait_alarmed(&cluster, id).await;
    });
}

#[test]
fn the_cluster_is_alarmed_if_nobody_has_a_majority() {
    on_redb(async {
        let mut cluster = filled(2, &COMPACTIONS).await;
        let leader = cluster.leader().await;
        restart_with(&mut cluster, 1 - leader, WRONG).await;
        let client = cluster.client(0);
        client.compact(client.revision().await.unwrap()).await.unwrap();
        wait_alarmed(&cluster, 0).await;
        all_are_alarmed(&cluster, 0).await;
    });
}

#[test]
fn a_member_that_compares_first_does_not_start_with_other_data() {
    on_redb(async {
        let mut cluster = filled(3, &[]).await;
        for member in &mut cluster.members {
            member.args.push("--feature-gates=InitialCorruptCheck=true".to_string());
        }
        let sound = cluster.leader().await;
        cluster.terminate(sound).await;
        cluster.run(sound);
        cluster.wait_serving(sound).await;
        let passed = "initial corruption checking passed; no corruption";
        assert_eq!(logged(&cluster, sound, passed), 1);

        let damaged = others(sound)[0];
        let id = cluster.id(damaged).await;
        cluster.terminate(damaged).await;
        let right = store(&cluster, damaged, WRONG);
        let (status, log) = cluster.refused(damaged).await;
        assert_eq!(status.code(), Some(1), "{status}: {log}");
        assert!(log.contains(&format!("{id:x} found data inconsistency with peers")), "{log}");
        assert!(log.contains("found different hash values from remote peer"), "{log}");

        // The others did not notice, and have it back once it is mended.
        cluster.client(sound).put("k5", "more").await.unwrap();
        store(&cluster, damaged, &right);
        cluster.run(damaged);
        cluster.wait_serving(damaged).await;
        assert_eq!(logged(&cluster, damaged, passed), 1);
        assert_eq!(cluster.client(sound).alarms().await.unwrap(), []);
    });
}

/// Puts and deletes until it is dropped, and compacts what is there.
async fn busy(client: Client, writer: usize) {
    for n in 0_usize.. {
        let key = format!("k{}", n * (writer + 1) % 40);
        let done = if n % 7 == writer {
            let request = pb::DeleteRangeRequest { key: key.into(), ..Default::default() };
            client.delete_range(request).await.map(|deleted| revision(&deleted.header))
        } else {
            client.put(&key, format!("{writer} {n}")).await
        };
        match done {
            // Another one may have compacted more already.
            Ok(revision) if n % 50 == 0 => drop(client.compact(revision).await),
            Ok(_) => {}
            // The member is down, or there is no leader.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

#[test]
fn members_over_different_engines_are_found_equal() {
    on_redb(async {
        let engines = ["redb", "memory", "redb"];
        let own_args = engines.iter().map(|engine| vec![format!("--engine={engine}")]).collect();
        let options = Options { own_args, ..Options::brisk() };
        let options = options.with(&COMPACTIONS).with(&["--corrupt-check-time=200ms"]);
        let mut cluster = Cluster::start(Program::from_env(), 3, options).await;
        let mut load = tokio::task::JoinSet::new();
        for node in 0..3 {
            load.spawn(busy(cluster.client_within(node, Duration::from_secs(2)), node));
        }
        // Each leads for a while, and each comes back from what its engine and its log have kept.
        for next in 0..3 {
            let id = cluster.id(next).await;
            wait_for("the lead", || async {
                let leader = cluster.leader().await;
                if leader == next {
                    return Ok(());
                }
                let moved = cluster.client(leader).move_leader(id).await;
                Err(format!("member {leader} leads, not {next}: {moved:?}"))
            })
            .await;
            for text in [COMPACTION_AGREED, "\"number-of-peers-checked\":2"] {
                logs_again(&cluster, next, text, 2).await;
            }
            cluster.kill(next);
            cluster.leader().await;
            cluster.run(next);
            cluster.wait_serving(next).await;
        }
        load.shutdown().await;
        let client = cluster.client(0);
        let revision = client.put("last", "").await.unwrap();
        cluster.equal_hashes(&[0, 1, 2], revision).await;
        let leader = cluster.leader().await;
        logs_again(&cluster, leader, PERIODIC_ROUND, 2).await;
        assert_eq!(client.alarms().await.unwrap(), []);
    });
}
