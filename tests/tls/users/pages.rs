//! What needs no user although authentication is on, what needs any, and what the pages tell of
//! certificates.

use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::{CHEAP, api, call, credentials, enable};
use crate::deck::Deck;
use crate::etcdctl::etcdctl;
use crate::pki::{Files, Leaf};
use crate::ports::free_port;
use crate::rig::cluster::Cluster;
use crate::rig::process::Program;
use crate::rig::{run, wait_for};

/// The status of a page, and the page.
fn fetch(deck: &Deck, shown: &Files, port: u16, path: &str) -> (u16, String) {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_code}"])
        .arg("--cacert")
        .arg(&deck.ca)
        .arg("--cert")
        .arg(&shown.cert)
        .arg("--key")
        .arg(&shown.key)
        .arg(format!("https://127.0.0.1:{port}{path}"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{path}: {output:?}");
    let out = String::from_utf8(output.stdout).unwrap();
    let (page, status) = out.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), page.to_string())
}

/// What `etcdctl endpoint status` tells: its only element.
fn status(port: u16, credentials: &[String]) -> Value {
    let words = ["endpoint", "status", "--write-out=json"];
    let said = etcdctl(&super::endpoint(port), credentials, &words);
    assert_eq!(said.code, 0, "{said:?}");
    let told: Value = serde_json::from_str(&said.out).unwrap();
    told[0]["Status"].clone()
}

#[test]
fn pages_need_no_user_and_a_status_needs_any_credential() {
    let deck = Deck::new();
    let metrics_port = free_port();
    let files = |leaf: &Leaf, name: &str| deck.write(&deck.signer.issue(leaf), name);
    let unnamed = files(&Leaf::nameless(), "nameless");
    let (alice, plain) = (Leaf::client("alice"), Leaf::client("plain"));
    let (alice, plain) = (files(&alice, "alice"), files(&plain, "plain"));
    let stranger = files(&Leaf::client("stranger"), "stranger");
    run(async {
        let metrics = format!("--listen-metrics-urls=https://127.0.0.1:{metrics_port}");
        let options = deck.options().with(&CHEAP).with(&[&metrics]);
        let cluster = Cluster::start(Program::Quorate, 1, options).await;
        let port = cluster.members[0].client_port;
        enable(api(port, deck.connector())).await;
        for shown in [&unnamed, &plain, &stranger] {
            for port in [port, metrics_port] {
                for (path, text) in [
                    ("/health", r#"{"health":"true","reason":""}"#),
                    ("/health?serializable=true", r#"{"health":"true","reason":""}"#),
                    ("/livez", "ok\n"),
                    ("/readyz", "ok\n"),
                    ("/readyz/linearizable_read", "ok\n"),
                    ("/readyz?verbose", "[+]linearizable_read ok\n"),
                    ("/metrics", "etcd_server_has_leader 1\n"),
                ] {
                    let (status, page) = fetch(&deck, shown, port, path);
                    assert_eq!(status, 200, "{path}: {page}");
                    assert!(page.contains(text), "{path}: {page}");
                }
            }
            let (status, page) = fetch(&deck, shown, port, "/version");
            assert_eq!(status, 200, "{page}");
        }

        let mut told = Vec::new();
        // A certificate is a credential, whether it names a user or not.
        for shown in [&alice, &plain, &stranger, &unnamed] {
            let shown = credentials(&deck, shown, None);
            let status = status(port, &shown);
            for field in ["dbSize", "dbSizeInUse", "raftIndex", "raftTerm", "raftAppliedIndex"] {
                assert!(status[field].as_u64().unwrap_or_default() > 0, "{field}: {status}");
            }
            assert_eq!(status["leader"], status["header"]["member_id"], "{status}");
            assert_eq!(status.get("errors"), None, "{status}");
            told.push(status["header"]["member_id"].clone());
            // The answer that nobody may read the key is an answer.
            assert_eq!(call(port, &shown, &["endpoint", "health"]).code, 0);
        }
        assert!(told.iter().all(|id| *id == told[0]), "{told:?}");
        for (shown, text) in [
            (&unnamed, "user name is empty"),
            (&stranger, "user name not found"),
            (&plain, "denied"),
        ] {
            let refused = call(port, &credentials(&deck, shown, None), &["endpoint", "hashkv"]);
            assert_eq!(refused.code, 1, "{refused:?}");
            assert!(refused.error.contains(text), "{refused:?}");
        }
    });
}

/// A series of the metrics page.
fn series(page: &str, name: &str) -> Option<f64> {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(value.parse().expect("a number"))
}

fn since_1970_s(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap().as_secs() as f64
}

#[test]
fn metrics_tell_when_certificates_end_and_when_they_are_replaced() {
    let deck = Deck::new();
    let shown = deck.write(&deck.signer.issue(&Leaf::nameless()), "nameless");
    let ends = |hours: u64| SystemTime::now() + Duration::from_secs(hours * 3600);
    let member = |hours| Leaf { until: ends(hours), ..Leaf::named("member") };
    let expiry = |side: &str, role: &str| {
        format!(
            "quorate_tls_certificate_expiry_timestamp_seconds{{side=\"{side}\",use=\"{role}\"}}"
        )
    };
    let reloads = |side: &str| {
        format!("quorate_tls_reloads_total{{file=\"certificate\",result=\"done\",side=\"{side}\"}}")
    };
    let names = [expiry("client", "server"), expiry("peer", "server"), expiry("peer", "client")];
    let first = member(5);
    deck.signer.issue(&first).write(deck.path(), "member");
    run(async {
        let cluster = Cluster::start(Program::Quorate, 3, deck.options().with(&CHEAP)).await;
        enable(api(cluster.members[0].client_port, deck.connector())).await;
        let page_of = |node: usize| {
            let port = cluster.members[node].client_port;
            let (status, page) = fetch(&deck, &shown, port, "/metrics");
            assert_eq!(status, 200, "{page}");
            page
        };
        for node in 0..3 {
            let page = page_of(node);
            for name in &names {
                assert_eq!(series(&page, name), Some(since_1970_s(first.until)), "{name}");
            }
            assert_eq!(series(&page, &reloads("client")).unwrap_or_default(), 0.0, "{page}");
        }
        for hours in [9, 3] {
            let next = member(hours);
            deck.signer.issue(&next).write(deck.path(), "member");
            // What is shown to other members is looked at when one of them is dialled.
            cluster.net.part(&[0], &[1, 2]);
            wait_for("member 0 to be cut off", || async {
                match series(&page_of(0), "etcd_server_has_leader") {
                    Some(0.0) => Ok(()),
                    told => Err(format!("{told:?}")),
                }
            })
            .await;
            cluster.net.heal();
            for node in 0..3 {
                let peer_port = cluster.members[node].peer_port;
                wait_for("the new certificate's end", || async {
                    let (status, page) = fetch(&deck, &deck.member, peer_port, "/version");
                    assert_eq!(status, 200, "{page}");
                    let page = page_of(node);
                    let told: Vec<_> = names.iter().map(|name| series(&page, name)).collect();
                    match told == [Some(since_1970_s(next.until)); 3] {
                        true => Ok(()),
                        false => Err(format!("member {node}: {told:?}")),
                    }
                })
                .await;
                let counted = series(&page_of(node), &reloads("client")).unwrap_or_default();
                assert!(counted > 0.0, "member {node}");
            }
        }
    });
}
