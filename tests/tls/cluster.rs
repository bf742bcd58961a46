//! Members that speak TLS to each other: they form a cluster, and those who may not are kept out.

use std::path::Path;
use std::time::Duration;

use tonic::Status;

use crate::deck::{Deck, flag};
use crate::pki::{Authority, Leaf};
use crate::record::{Load, Recorder};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::process::Program;
use crate::rig::secure::Secure;
use crate::rig::{run, wait_for};

/// Calls that are answered before and after what happens.
const WARM: usize = 60;

/// Runs a cluster under load through the loss of each member in turn, the leader among them; nothing
/// that was acknowledged may be lost, and all must hold the same in the end.
fn survives(options: Options) {
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 3, options).await;
        let recorder = Recorder::start(&cluster, &[0, 1, 2], Load::default());
        recorder.progress(WARM).await;
        for node in 0..3 {
            let leader = cluster.leader().await;
            if leader != node {
                let id = cluster.id(node).await;
                cluster.client(leader).move_leader(id).await.unwrap();
            }
            recorder.progress(WARM).await;
            let leader = cluster.leader().await;
            cluster.kill(leader);
            recorder.progress(WARM).await;
            cluster.run(leader);
            cluster.wait_serving(leader).await;
        }
        recorder.progress(WARM).await;
        recorder.verify(&cluster, &[0, 1, 2]).await;
    });
}

#[test]
fn three_members_replicate_over_tls() {
    let deck = Deck::new();
    survives(deck.options());
}

#[test]
fn a_member_among_two_of_etcd_replicates_over_tls() {
    let own_programs = vec![Program::Etcd, Program::Quorate, Program::Etcd];
    let deck = Deck::new();
    survives(Options { own_programs, ..deck.options() });
}

#[test]
fn two_members_and_one_of_etcd_replicate_over_tls() {
    let own_programs = vec![Program::Quorate, Program::Etcd, Program::Quorate];
    let deck = Deck::new();
    survives(Options { own_programs, ..deck.options() });
}

/// Clients come in the clear, members each with a certificate that it has made for itself.
fn auto_tls() -> Options {
    let secure = Some(Secure { client: None, peers: true });
    Options { secure, ..Options::brisk() }.with(&["--peer-auto-tls"])
}

#[test]
fn members_that_made_their_certificates_trust_each_other() {
    survives(auto_tls());
}

#[test]
fn members_and_etcd_that_made_their_certificates_trust_each_other() {
    let own_programs = vec![Program::Etcd, Program::Quorate, Program::Etcd];
    survives(Options { own_programs, ..auto_tls() });
}

/// Starts what must not get in beside a cluster of three; `args` come after the cluster's own and
/// replace them. Answers what the newcomer and the others have logged.
fn kept_out(deck: &Deck, args: Vec<String>) -> (String, String) {
    run(async {
        let mut cluster = Cluster::start(Program::Quorate, 3, deck.options()).await;
        let node = cluster.place_joining(&[0, 1, 2]);
        let url = cluster.members[node].peer_url.clone();
        cluster
            .by_any("adding a member", |client| {
                let url = url.clone();
                async move { added(client.member_add(&url, true).await) }
            })
            .await;
        let good = std::mem::replace(&mut cluster.members[node].args, args);
        let (status, newcomer) = cluster.refused(node).await;
        assert_eq!(status.code(), Some(1), "{newcomer}");
        let others = (0..3).map(|other| cluster.members[other].log_text()).collect();
        // It was only that.
        cluster.members[node].args = good;
        cluster.run(node);
        wait_for("the member to be told of the others", || async {
            let client = cluster.client_within(node, Duration::from_secs(1));
            match client.local_revision().await {
                // A learner answers what it holds.
                Ok(revision) if revision > 0 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        (newcomer, others)
    })
}

/// A member that an earlier try has added is there all the same.
fn added<T>(answer: Result<T, Status>) -> Result<(), Status> {
    match answer {
        Err(status) if !status.message().contains("Peer URLs already exists") => Err(status),
        _ => Ok(()),
    }
}

/// The log lines of rejected connections on the peer port.
fn rejections(log: &str) -> Vec<serde_json::Value> {
    log.lines()
        .filter(|line| line.contains("rejected connection on peer endpoint"))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn files_args(cert: &Path, key: &Path) -> Vec<String> {
    vec![flag("peer-cert-file", cert), flag("peer-key-file", key)]
}

#[test]
fn a_member_of_another_authority_is_kept_out() {
    let deck = Deck::new();
    let stranger = Authority::new("another").issue(&Leaf::named("member"));
    let files = deck.write(&stranger, "stranger");
    let (newcomer, others) = kept_out(&deck, files_args(&files.cert, &files.key));
    assert!(newcomer.contains("could not retrieve cluster information"), "{newcomer}");
    let rejected = rejections(&others);
    assert!(!rejected.is_empty(), "{others}");
    for line in &rejected {
        assert_eq!(line["level"], "warn", "{line}");
        let from = line["remote-addr"].as_str().unwrap();
        assert!(from.starts_with("127.0.0.1:"), "{line}");
        assert!(line["error"].as_str().unwrap().contains("UnknownIssuer"), "{line}");
    }
}
