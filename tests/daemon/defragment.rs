//! Defragmentation while everything else goes on.

use std::time::{Duration, Instant};

use quorate_proto::etcdserverpb as pb;
use tonic::Status;

use crate::process::{Client, Daemon, PATIENCE, Setup, runtime};

/// The engine copies so slowly that a defragmentation lasts for [`LASTS`].
const SLOW: &str = "--engine-options=reclaim-mib-per-second=1";
const ROWS: usize = 80;
const ROW_BYTES: usize = 100_000;
const LASTS: Duration = Duration::from_secs(6);

async fn filled(daemon: &Daemon) -> Client {
    let client = daemon.client();
    for n in 0..ROWS {
        client.put(&format!("filled{n:03}"), vec![n as u8; ROW_BYTES]).await.unwrap();
    }
    client
}

/// Begins one; waits until it is under way.
async fn begin(daemon: &Daemon, client: &Client) -> tokio::task::JoinHandle<Result<(), Status>> {
    let mut maintenance = client.maintenance.clone();
    let call =
        tokio::spawn(
            async move { maintenance.defragment(pb::DefragmentRequest {}).await.map(|_| ()) },
        );
    let deadline = Instant::now() + PATIENCE;
    while !under_way(daemon) {
        assert!(Instant::now() < deadline && !call.is_finished(), "no defragmentation");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    call
}

fn under_way(daemon: &Daemon) -> bool {
    crate::page::parse(&daemon.http("/metrics").body)["etcd_disk_defrag_inflight"].samples[""]
        == 1.0
}

fn finished(daemon: &Daemon) -> f64 {
    let page = crate::page::parse(&daemon.http("/metrics").body);
    page["etcd_disk_backend_defrag_duration_seconds"].samples[""]
}

#[test]
fn all_calls_are_answered_meanwhile() {
    let setup = Setup::new(&[SLOW]);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = filled(&daemon).await;
        let (_sender, mut watched) = client.watch_all(0).await.unwrap();
        let started = Instant::now();
        let first = begin(&daemon, &client).await;
        let others: Vec<_> = (0..2)
            .map(|_| {
                let mut maintenance = client.maintenance.clone();
                tokio::spawn(async move { maintenance.defragment(pb::DefragmentRequest {}).await })
            })
            .collect();

        let last = client.put("during", "1").await.unwrap();
        assert_eq!(client.get("during").await.unwrap().unwrap().value, "1");
        assert_eq!(watched.message().await.unwrap().unwrap().events.len(), 1);
        let lease = client.grant(100).await.unwrap();
        client.put_with("leased", "v", lease).await.unwrap();
        client.lease.clone().lease_revoke(pb::LeaseRevokeRequest { id: lease }).await.unwrap();
        for n in 0..10 {
            client.delete(&format!("filled{n:03}")).await.unwrap();
        }
        client.compact(last, true).await.unwrap();
        let mut snapshot =
            client.maintenance.clone().snapshot(pb::SnapshotRequest {}).await.unwrap().into_inner();
        let mut bytes = 0;
        while let Some(part) = snapshot.message().await.unwrap() {
            bytes += part.blob.len();
        }
        assert!(bytes > (ROWS - 10) * ROW_BYTES, "{bytes}");
        let hash = client.hash_kv(0).await.unwrap().hash;
        let took = started.elapsed();
        assert!(under_way(&daemon), "it has ended before the calls, after {took:?}");

        first.await.unwrap().unwrap();
        assert!(started.elapsed() >= LASTS, "{:?}", started.elapsed());
        for other in others {
            other.await.unwrap().unwrap();
        }
        // Those who came later have shared one.
        assert_eq!(finished(&daemon), 2.0);
        assert!(!under_way(&daemon));
        assert_eq!(client.hash_kv(0).await.unwrap().hash, hash);
        assert_eq!(client.count().await.unwrap(), ROWS as i64 - 10 + 1);
    });
    daemon.kill();
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        assert_eq!(client.count().await.unwrap(), ROWS as i64 - 10 + 1);
        assert_eq!(client.get("during").await.unwrap().unwrap().value, "1");
    });
    daemon.stop();
}

#[test]
fn a_member_that_stops_does_not_wait_for_it() {
    let setup = Setup::new(&[SLOW]);
    let mut daemon = setup.start();
    runtime().block_on(async {
        let client = filled(&daemon).await;
        let call = begin(&daemon, &client).await;
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        let error = call.await.unwrap().expect_err(&daemon.log_text());
        assert!(!error.message().is_empty(), "{error:?}");
    });
    let cancelled = daemon.wait_logged("failed to defragment");
    assert_eq!(cancelled["error"], "giving space back was cancelled");
    daemon.wait();
    let daemon = setup.start();
    runtime().block_on(async {
        assert_eq!(daemon.client().count().await.unwrap(), ROWS as i64);
    });
    assert!(!setup.engine_dir().join("data.redb.new").exists());
    daemon.stop();
}
