//! A cluster that runs out of space, and gets it back.

use std::collections::BTreeSet;

use quorate_proto::etcdserverpb as pb;
use tonic::Code;

use crate::rig::cluster::{Cluster, Options};
use crate::rig::process::Program;
use crate::rig::{run, wait_for};

const LIFTED: &str = "space is back, lifting alarm";

/// Puts through every member in turn until each has been refused.
async fn fill(cluster: &Cluster, prefix: &str) {
    let mut refused = BTreeSet::new();
    for n in 0..600 {
        let node = n % 3;
        let put = cluster.client(node).put(&format!("{prefix}{n:03}"), vec![b'v'; 200_000]).await;
        if let Err(status) = put {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
            assert_eq!(status.message(), "etcdserver: mvcc: database space exceeded");
            refused.insert(node);
        }
        if refused.len() == 3 {
            return;
        }
    }
    panic!("refused only by {refused:?}");
}

async fn empty(cluster: &Cluster) {
    let client = cluster.client(cluster.leader().await);
    let everything =
        pb::DeleteRangeRequest { key: vec![0].into(), range_end: vec![0].into(), prev_kv: false };
    let deleted = client.delete_range(everything).await.unwrap();
    client.compact(deleted.header.unwrap().revision).await.unwrap();
}

async fn no_alarms(cluster: &Cluster) {
    for node in 0..3 {
        wait_for("the end of all alarms", async || {
            let alarms = cluster.client(node).alarms().await.map_err(|error| error.to_string())?;
            if alarms.is_empty() { Ok(()) } else { Err(format!("{alarms:?}")) }
        })
        .await;
    }
}

#[test]
fn each_member_lifts_its_own_alarm() {
    if Program::from_env() == Program::Etcd {
        println!("SKIPPED: etcd lifts no alarm");
        return;
    }
    run(async {
        let options = Options::brisk().with(&["--quota-backend-bytes=16777216"]);
        let cluster = Cluster::start(Program::from_env(), 3, options).await;
        for round in 0..2 {
            fill(&cluster, &format!("round{round}-")).await;
            let raised: BTreeSet<u64> = {
                let alarms = cluster.client(0).alarms().await.unwrap();
                alarms.iter().map(|alarm| alarm.member_id).collect()
            };
            assert!(!raised.is_empty());
            let before: Vec<usize> = (0..3).map(|node| lifted(&cluster, node)).collect();
            empty(&cluster).await;
            no_alarms(&cluster).await;
            for (node, before) in before.into_iter().enumerate() {
                let own = raised.contains(&cluster.id(node).await);
                assert_eq!(lifted(&cluster, node) > before, own, "member {node} of {raised:?}");
            }
            for node in 0..3 {
                cluster.client(node).put("small", "again").await.unwrap();
            }
        }
    });
}

fn lifted(cluster: &Cluster, node: usize) -> usize {
    cluster.members[node].log_text().matches(LIFTED).count()
}
