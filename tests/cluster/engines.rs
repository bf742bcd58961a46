//! Members of one cluster over different storage engines, and members that change theirs.

use std::path::Path;
use std::process::Command;

use quorate::engines::{self, BuiltIn};

use crate::members::{add, promote, remove};
use crate::record::Load;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::scenario::{fill, metric, others, under_load_of};

#[test]
fn members_over_different_engines_are_equal() {
    if Program::from_env() == Program::Etcd {
        println!("SKIPPED: etcd has one engine");
        return;
    }
    let engines = ["redb", "memory", "redb"];
    let own_args = engines.iter().map(|engine| vec![format!("--engine={engine}")]).collect();
    let options = Options { own_args, ..Options::brisk() };
    under_load_of(Load::default(), options, async |cluster, recorder| {
        // Each leads for a while, and each comes back from what its engine and its log have kept.
        for _ in 0..3 {
            let leader = cluster.leader().await;
            cluster.kill(leader);
            recorder.progress(30).await;
            cluster.run(leader);
            cluster.wait_serving(leader).await;
        }
        let memory = 1;
        cluster.kill(memory);
        recorder.progress(30).await;
        cluster.run(memory);
        cluster.wait_serving(memory).await;
        // The one without files is the whole majority's other half.
        let rest = others(memory);
        cluster.kill(rest[0]);
        recorder.progress(30).await;
        cluster.run(rest[0]);
        vec![0, 1, 2]
    });
}

/// Log kept so short that whoever is new needs a snapshot.
fn short_log() -> Options {
    Options::brisk().with(&["--snapshot-count=100", "--snapshot-catchup-entries=20"])
}

#[test]
fn members_are_replaced_by_members_over_other_engines() {
    if Program::from_env() == Program::Etcd {
        println!("SKIPPED: etcd has one engine");
        return;
    }
    under_load_of(Load::default(), short_log(), async |cluster, recorder| {
        let leader = cluster.leader().await;
        // The log is cut in steps of a thousand entries.
        fill(&cluster.client(leader), 2500, 10).await.expect("a majority takes writes");
        let mut members = vec![0, 1, 2];
        for engine in engines::ALL.iter().cycle().skip(1).take(3.max(engines::ALL.len())) {
            let node = cluster.members.len();
            cluster.options.own_args.resize(node + 1, Vec::new());
            cluster.options.own_args[node] = vec![format!("--engine={}", engine.name())];
            assert_eq!(add(cluster, recorder, &members, true).await, node);
            promote(cluster, recorder, node).await;
            let received = metric(cluster, node, "etcd_network_snapshot_receive_success").await;
            assert!(received > 0.0, "{engine:?} came by without a snapshot");
            recorder.progress(30).await;
            let leaving = members.remove(0);
            remove(cluster, leaving).await;
            // It learns of that and ends by itself.
            cluster.wait_end(leaving).await;
            members.push(node);
            recorder.progress(30).await;
        }
        // Each comes back from what it has kept, and the others go on without it.
        for node in members.clone() {
            cluster.kill(node);
            recorder.progress(30).await;
            cluster.run(node);
            cluster.wait_serving(node).await;
        }
        members
    });
}

/// Makes the directory of a member that does not run one of another engine; the load goes on meanwhile.
async fn convert(cluster: &mut Cluster, node: Node, engine: &'static BuiltIn) {
    let member = &mut cluster.members[node];
    let (data, new) = (member.data.clone(), member.dir.join("new"));
    let mut command = Command::new(Program::Quorate.path());
    command.env_clear().args(["utl", "engine", "convert", "--engine", engine.name()]);
    command.arg("--from-dir").arg(&data).arg("--to-dir").arg(&new);
    let output = tokio::task::spawn_blocking(move || command.output().expect("it can be run"));
    let output = output.await.expect("no panic");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_dir_all(&data).expect("the old directory");
    std::fs::rename(&new, &data).expect("the new directory");
    member.args = vec![format!("--engine={}", engine.name())];
}

#[test]
fn members_are_converted_one_by_one() {
    if Program::from_env() == Program::Etcd {
        println!("SKIPPED: etcd has one engine");
        return;
    }
    let with_files =
        engines::ALL.iter().copied().filter(|engine| engine.home(Path::new("")).is_some());
    let with_files: Vec<&'static BuiltIn> = with_files.collect();
    under_load_of(Load::default(), short_log(), async |cluster, recorder| {
        // Each engine is some member's once.
        let steps = with_files.iter().cycle().skip(1).take(3.max(with_files.len()));
        for (step, engine) in steps.enumerate() {
            let node = step % 3;
            if cluster.leader().await == node {
                let id = cluster.id((node + 1) % 3).await;
                cluster.client(node).move_leader(id).await.expect("the leader hands over");
            }
            recorder.progress(30).await;
            if step % 2 == 0 {
                cluster.terminate(node).await;
            } else {
                // What it had not told its engine is in its log.
                cluster.kill(node);
            }
            convert(cluster, node, engine).await;
            cluster.run(node);
            cluster.wait_serving(node).await;
            recorder.progress(30).await;
        }
        // What was converted leads, too.
        for _ in 0..3 {
            let leader = cluster.leader().await;
            cluster.kill(leader);
            recorder.progress(30).await;
            cluster.run(leader);
            cluster.wait_serving(leader).await;
        }
        vec![0, 1, 2]
    });
}
