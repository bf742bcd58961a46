//! Members that speak TLS to each other: they form a cluster, and those who may not are kept out.

use std::collections::BTreeSet;
use std::time::Duration;

use quorate::config::Url;
use quorate::transport::peer::client::{self, Dialer};

use crate::deck::{Deck, flag};
use crate::pki::{self, Authority, Files, Leaf};
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

/// A member that runs `program` with `args`, and beside it one of ours that must not get in with
/// `newcomers` (they come after the cluster's own arguments, which they replace), and does without
/// them. Answers what the newcomer and the member have logged until then.
fn kept_out(
    deck: &Deck,
    program: Program,
    args: &[String],
    newcomers: Vec<String>,
) -> (String, String) {
    run(async {
        let mut options = deck.options();
        options.args.extend_from_slice(args);
        let own_programs = vec![program, Program::Quorate];
        let mut cluster =
            Cluster::start(Program::Quorate, 1, Options { own_programs, ..options }).await;
        let node = cluster.place_joining(&[0]);
        let url = cluster.members[node].peer_url.clone();
        let client = cluster.client(0);
        wait_for("adding a member", || async {
            client.member_add(&url, true).await.map_err(|error| error.to_string())
        })
        .await;
        let own = std::mem::replace(&mut cluster.members[node].args, newcomers);
        let (status, newcomer) = cluster.refused(node).await;
        assert_eq!(status.code(), Some(1), "{newcomer}");
        let member = cluster.members[0].log_text();
        // It was only that.
        cluster.members[node].args = own;
        let revision = client.put("k", "v").await.unwrap();
        cluster.run(node);
        wait_for("the newcomer to be told what there is", || async {
            let client = cluster.client_within(node, Duration::from_secs(1));
            match client.local_revision().await {
                Ok(local) if local >= revision => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        (newcomer, member)
    })
}

/// Why the member has rejected connections on its peer port, each at least once.
fn reasons(log: &str) -> BTreeSet<String> {
    log.lines()
        .filter(|line| line.contains("\"rejected connection"))
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["level"], "warn", "{line}");
            let from = line["remote-addr"].as_str().unwrap();
            assert!(from.starts_with("127.0.0.1:"), "{line}");
            assert!(line["server-name"].is_string(), "{line}");
            line["error"].as_str().unwrap().to_string()
        })
        .collect()
}

/// Shows members that are dialled another certificate than to those that dial.
fn dials_with(files: &Files) -> Vec<String> {
    vec![flag("peer-client-cert-file", &files.cert), flag("peer-client-key-file", &files.key)]
}

const NO_CLUSTER: &str = "could not retrieve cluster information from the given URLs";

#[test]
fn a_member_of_another_authority_is_kept_out() {
    let deck = Deck::new();
    let stranger = Authority::new("another").issue(&Leaf::named("member"));
    let files = deck.write(&stranger, "stranger");
    let newcomers = vec![flag("peer-cert-file", &files.cert), flag("peer-key-file", &files.key)];
    let (newcomer, member) = kept_out(&deck, Program::Quorate, &[], newcomers);
    assert!(newcomer.contains(NO_CLUSTER), "{newcomer}");
    let reasons = reasons(&member);
    assert!(reasons.iter().any(|reason| reason.contains("UnknownIssuer")), "{reasons:?}");
    assert!(member.contains("\"rejected connection on peer endpoint\""), "{member}");
}

#[test]
fn a_member_that_trusts_another_authority_stays_out() {
    let deck = Deck::new();
    let ca = deck.path().join("other-ca.crt");
    pki::replace(&ca, Authority::new("another").pem.as_bytes());
    let newcomers = vec![flag("peer-trusted-ca-file", &ca)];
    let (newcomer, _) = kept_out(&deck, Program::Quorate, &[], newcomers);
    assert!(newcomer.contains(NO_CLUSTER), "{newcomer}");
    assert!(newcomer.contains("TLS handshake failed: invalid peer certificate"), "{newcomer}");
}

#[test]
fn a_member_that_speaks_no_tls_is_kept_out() {
    let deck = Deck::new();
    run(async {
        let cluster = Cluster::start(Program::Quorate, 1, deck.options()).await;
        let clear = Dialer::clear(Duration::from_secs(10));
        let port = cluster.members[0].peer_port;
        let url = Url::parse(&format!("http://127.0.0.1:{port}")).unwrap();
        let request = http::Request::get("/version").body(http_body_util::Full::default()).unwrap();
        let answer = client::call(&clear, &url, request, clear.timeout).await;
        assert!(answer.is_err(), "{answer:?}");
    });
}

/// Certificates that are verified, but are not for where they are shown from: the same words from us
/// and from etcd.
#[test]
fn a_member_that_dials_from_elsewhere_is_kept_out() {
    for (ips, dns, text) in [
        (&["10.1.2.3"][..], &[][..], "x509: certificate is valid for 10.1.2.3, not 127.0.0.1"),
        (
            &["10.1.2.3"],
            &["elsewhere.invalid"],
            "tls: \"127.0.0.1\" does not match any of DNSNames [\"elsewhere.invalid\"]",
        ),
    ] {
        for program in [Program::Quorate, Program::Etcd] {
            let deck = Deck::new();
            let elsewhere = deck.signer.issue(&Leaf::named("member").with_names(dns, ips));
            let newcomers = dials_with(&deck.write(&elsewhere, "elsewhere"));
            let (newcomer, member) = kept_out(&deck, program, &[], newcomers);
            assert!(newcomer.contains(NO_CLUSTER), "{newcomer}");
            let reasons = reasons(&member);
            assert!(reasons.iter().any(|reason| reason.starts_with(text)), "{reasons:?}");
        }
    }
}

#[test]
fn where_a_member_dials_from_need_not_matter() {
    let deck = Deck::new();
    let elsewhere = deck.signer.issue(&Leaf::named("member").with_names(&["x.invalid"], &[]));
    let mut options = deck.options().with(&["--peer-skip-client-san-verification"]);
    options.args.extend(dials_with(&deck.write(&elsewhere, "elsewhere")));
    run(async {
        let cluster = Cluster::start(Program::Quorate, 3, options).await;
        let revision = cluster.client(0).put("k", "v").await.unwrap();
        cluster.equal_hashes(&[0, 1, 2], revision).await;
    });
}

#[test]
fn a_member_without_an_allowed_name_is_kept_out() {
    for program in [Program::Quorate, Program::Etcd] {
        let deck = Deck::new();
        let guest = deck.write(&deck.signer.issue(&Leaf::named("guest")), "guest");
        let args = ["--peer-cert-allowed-cn=member".to_string()];
        let (newcomer, member) = kept_out(&deck, program, &args, dials_with(&guest));
        assert!(newcomer.contains(NO_CLUSTER), "{newcomer}");
        let reasons = reasons(&member);
        let text = "client certificate authentication failed";
        assert!(reasons.iter().any(|reason| reason.ends_with(text)), "{reasons:?}");
    }
}

#[test]
fn a_member_whose_certificate_was_taken_back_is_kept_out() {
    for program in [Program::Quorate, Program::Etcd] {
        let deck = Deck::new();
        let revoked = deck.signer.issue(&Leaf::named("member"));
        let list = deck.path().join("list.crl");
        pki::replace(&list, &deck.signer.revoke(&[&revoked]));
        let args = [flag("peer-crl-file", &list)];
        let newcomers = dials_with(&deck.write(&revoked, "revoked"));
        let (newcomer, member) = kept_out(&deck, program, &args, newcomers);
        assert!(newcomer.contains(NO_CLUSTER), "{newcomer}");
        let hex: String = revoked.serial.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("transport: certificate serial {hex} revoked");
        assert!(reasons(&member).contains(&text), "{text}: {member}");
    }
}
