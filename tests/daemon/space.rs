//! A member that runs out of space, and gets it back.

use std::time::{Duration, Instant};

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::AlarmType::{self, Corrupt, Nospace};
use tonic::{Code, Status};

use crate::process::{Client, Daemon, PATIENCE, Setup, runtime, wait_for};

const QUOTA: u64 = 16 << 20;

/// Puts until there is no space.
async fn fill(client: &Client, prefix: &str) {
    let full = |error: &Status| {
        assert_eq!(
            (error.code(), error.message()),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded")
        );
    };
    for n in 0..400 {
        if let Err(error) = client.put(&format!("{prefix}{n:03}"), vec![b'v'; 200_000]).await {
            full(&error);
            full(&client.put("more", "x").await.unwrap_err());
            full(&client.grant(100).await.unwrap_err());
            return;
        }
    }
    panic!("80 MB fit into 16");
}

/// What an operator does under NOSPACE: deletes all that [`fill`] has put, and its history.
async fn empty(client: &Client) {
    let everything =
        pb::DeleteRangeRequest { key: "a".into(), range_end: "c".into(), prev_kv: false };
    let reply = client.kv.clone().delete_range(everything).await.unwrap().into_inner();
    assert!(reply.deleted > 20, "{reply:?}");
    client.compact(crate::process::revision(&reply.header), true).await.unwrap();
}

async fn alarm(client: &Client, activate: bool, kind: AlarmType) {
    use pb::alarm_request::AlarmAction::{Activate, Deactivate};
    let action = if activate { Activate } else { Deactivate };
    let member_id = client.status().await.unwrap().header.unwrap().member_id;
    let request = pb::AlarmRequest { action: action as i32, member_id, alarm: kind as i32 };
    client.maintenance.clone().alarm(request).await.unwrap();
}

async fn kinds(client: &Client) -> Vec<AlarmType> {
    client.alarms().await.unwrap().iter().map(pb::AlarmMember::alarm).collect()
}

async fn until(what: &str, client: &Client, expected: &[AlarmType]) {
    let deadline = Instant::now() + PATIENCE;
    while kinds(client).await != expected {
        assert!(Instant::now() < deadline, "{what}: {:?}", client.status().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Live bytes when the member last looked, right before it looked at its alarm.
fn live(daemon: &Daemon) -> f64 {
    let page = crate::page::parse(&daemon.http("/metrics").body);
    page["etcd_mvcc_db_total_size_in_use_in_bytes"].samples[""]
}

fn live_until(daemon: &Daemon, what: &str, reached: impl Fn(f64) -> bool) {
    wait_for(what, || {
        let live = live(daemon);
        if reached(live) { Ok(()) } else { Err(format!("{live} live bytes")) }
    });
}

#[test]
fn deleting_and_compacting_is_enough_to_write_again() {
    let quota = format!("--quota-backend-bytes={QUOTA}");
    let setup = Setup::new(&[&quota]);
    let mut daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        fill(&client, "a").await;
        assert_eq!(kinds(&client).await, [Nospace]);
        let full = client.status().await.unwrap();
        assert!(full.db_size_in_use as u64 > QUOTA * 9 / 10, "{full:?}");
        empty(&client).await;
        until("space is back", &client, &[]).await;
        let now = client.status().await.unwrap();
        // Nothing was given back to the file system: what is free in the file is used again.
        assert!(now.db_size as u64 > QUOTA / 2, "{now:?}");
        assert!((now.db_size_in_use as u64) < QUOTA / 10, "{now:?}");
        client.put("small", "again").await.unwrap();
        client.grant(100).await.unwrap();
        // And all over again.
        fill(&client, "b").await;
        assert_eq!(kinds(&client).await, [Nospace]);
        let twice = client.status().await.unwrap();
        assert!((twice.db_size as u64) < 3 * QUOTA, "{twice:?}");
    });
    daemon.wait_logged("space quota is exceeded, raising alarm");
    daemon.wait_logged("space is back, lifting alarm");
    daemon.kill();

    // An alarm from before a crash is lifted as well, once there is a reason.
    let daemon = setup.start();
    assert_eq!(daemon.http("/health").status, 503);
    runtime().block_on(async {
        let client = daemon.client();
        assert_eq!(kinds(&client).await, [Nospace]);
        empty(&client).await;
        until("space is back after a restart", &client, &[]).await;
        client.put("small", "once more").await.unwrap();
    });
    assert_eq!(daemon.http("/health").status, 200);
    daemon.stop();
}

#[test]
fn an_alarm_that_the_member_did_not_raise_stays() {
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        // A row for each alarm changes the size: once to be seen, once to be sure that it was looked at.
        for kind in [Nospace, Corrupt] {
            let before = live(&daemon);
            alarm(&client, true, kind).await;
            live_until(&daemon, "a look at the sizes", |live| live != before);
        }
        assert_eq!(kinds(&client).await, [Nospace, Corrupt]);
        alarm(&client, false, Nospace).await;
        assert_eq!(kinds(&client).await, [Corrupt]);
    });
    daemon.stop();
}

#[test]
fn at_the_physical_bound_only_defragmenting_helps() {
    let physical = format!("--quota-physical-bytes={QUOTA}");
    let setup = Setup::new(&[&physical]);
    let mut daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        client.put("kept", "v").await.unwrap();
        fill(&client, "a").await;
        assert_eq!(kinds(&client).await, [Nospace]);
        let line = daemon.wait_logged("space quota is exceeded, raising alarm");
        assert_eq!(line["exceeded"], "physical bytes");
        empty(&client).await;
        live_until(&daemon, "the end of the compaction", |live| live < QUOTA as f64 / 10.0);
        let before = live(&daemon);
        assert_eq!(client.delete("kept").await.unwrap().deleted, 1);
        live_until(&daemon, "another look at the sizes", |live| live != before);
        assert_eq!(kinds(&client).await, [Nospace], "the file is as large as before");
        client.maintenance.clone().defragment(pb::DefragmentRequest {}).await.unwrap();
        until("space is given back", &client, &[]).await;
        client.put("small", "again").await.unwrap();
        let page = crate::page::parse(&daemon.http("/metrics").body);
        assert_eq!(page["quorate_quota_physical_bytes"].samples[""], QUOTA as f64);
        assert_eq!(page["etcd_server_quota_backend_bytes"].samples[""], 2_147_483_648.0);
    });
    daemon.stop();
}
