//! What clients of a cluster see while its members and links fail, held against what one store that
//! does one thing at a time would have answered.
//!
//! `LIN_SECONDS` sets for how long faults go on (40), `LIN_SEED` which ones, and
//! `QUORATE_TEST_PROGRAM=etcd` runs the same against etcd, which shows that it is the judges that are
//! right.

mod check;
mod nemesis;
mod record;
#[path = "../cluster/rig/mod.rs"]
mod rig;

use std::time::{Duration, Instant};

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
