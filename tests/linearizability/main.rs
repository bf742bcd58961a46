//! What clients of a cluster see while its members and links fail, held against what one store that
//! does one thing at a time would have answered.
//!
//! `LIN_SECONDS` sets for how long faults go on (40), `LIN_SEED` which ones, and
//! `QUORATE_TEST_PROGRAM=etcd` runs the same against etcd, which shows that it is the judges that are
//! right.

mod check;
mod nemesis;
#[path = "../ports/mod.rs"]
mod ports;
mod record;
#[path = "../cluster/rig/mod.rs"]
mod rig;

use std::time::{Duration, Instant};

use check::Violation;
use nemesis::Nemesis;
use record::{Load, Recorder};
use rig::cluster::{Cluster, Options};
use rig::env_number;
use rig::process::Program;
use rig::random::Random;

#[test]
fn under_faults_clients_see_one_store() {
    let seed = env_number("LIN_SEED", Random::fresh_seed());
    let seconds = env_number("LIN_SECONDS", 40);
    println!("LIN_SEED={seed} LIN_SECONDS={seconds}");
    rig::run(async {
        let options = Options { seed, ..Options::brisk() };
        let mut cluster = Cluster::start(Program::from_env(), 3, options).await;
        let recorder = Recorder::start(&cluster, &[0, 1, 2], Load { seed, ..Load::default() });
        recorder.progress(50).await;
        let mut nemesis = Nemesis::new(seed);
        nemesis.rage(&mut cluster, Instant::now() + Duration::from_secs(seconds)).await;
        recorder.progress(50).await;
        println!("{:?}", nemesis.done);
        let summary = recorder.verify(&cluster, &[0, 1, 2]).await;
        assert!(summary.unknown > 0, "the faults have hit nobody: {summary:?}");
    });
}

/// What a member that is cut off says of the past, taken for the present, is found.
#[test]
fn old_reads_of_a_real_cluster_are_found() {
    rig::run(async {
        let cluster = Cluster::start(Program::from_env(), 3, Options::brisk()).await;
        let deadline = Duration::from_millis(300);
        let load = Load { trust_serializable: true, deadline, ..Load::default() };
        let recorder = Recorder::start(&cluster, &[0, 1, 2], load);
        let follower = cluster.follower().await;
        let others: Vec<_> = (0..3).filter(|node| *node != follower).collect();
        cluster.net.part(&[follower], &others);
        recorder.reads_by(follower, 10).await;
        cluster.net.heal();
        let violations = recorder.judge(&cluster, &[0, 1, 2]).await.unwrap_err();
        let stale = |found: &&Violation| matches!(found, Violation::Stale { .. });
        assert!(violations.iter().filter(stale).count() > 1, "{violations:?}");
        assert!(violations.iter().all(|found| stale(&found)), "{violations:?}");
    });
}
