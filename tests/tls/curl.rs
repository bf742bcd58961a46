//! curl over TLS: the pages of the client and the metrics port, by HTTP/1.1 and HTTP/2.

use std::process::Command;

use crate::deck::Deck;
use crate::pki::Leaf;
use crate::ports::free_port;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::process::Program;
use crate::rig::secure::Secure;
use crate::rig::{run, wait_for};

/// Exit code, protocol and status, and the page.
fn curl(deck: &Deck, port: u16, path: &str, args: &[&str]) -> (i32, String, String) {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "20"])
        .args(["--write-out", "\n%{http_version} %{http_code}"])
        .arg("--cacert")
        .arg(&deck.ca)
        .args(args)
        .arg(format!("https://127.0.0.1:{port}{path}"))
        .output()
        .unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    let (page, status) = out.rsplit_once('\n').unwrap_or_default();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let page = if output.status.success() { page.to_string() } else { error };
    (output.status.code().unwrap(), status.to_string(), page)
}

#[test]
fn pages_are_served_over_either_version_of_http() {
    let deck = Deck::new();
    let user = deck.write(&deck.user, "user");
    let (cert, key) = (user.cert.to_str().unwrap(), user.key.to_str().unwrap());
    let metrics_port = free_port();
    run(async {
        let metrics = format!("--listen-metrics-urls=https://127.0.0.1:{metrics_port}");
        let options: Options = deck.options().with(&[&metrics]);
        let cluster = Cluster::start(Program::Quorate, 1, options).await;
        let client_port = cluster.members[0].client_port;
        let pages = [
            (client_port, "/version", r#""etcdserver":""#),
            (client_port, "/health", r#"{"health":"true","reason":""}"#),
            (client_port, "/metrics", "etcd_server_has_leader 1"),
            (metrics_port, "/health", r#"{"health":"true","reason":""}"#),
            (metrics_port, "/metrics", "etcd_server_has_leader 1"),
        ];
        for (port, path, text) in pages {
            for (protocol, version) in [
                ("--http1.1", "1.1"),
                ("--http2", "2"),
                // What is offered then is nothing at all.
                ("--no-alpn", "1.1"),
            ] {
                let args = [protocol, "--cert", cert, "--key", key];
                let (code, status, page) = curl(&deck, port, path, &args);
                let what = format!("{path} {protocol}: {page}");
                assert_eq!((code, status.as_str()), (0, &*format!("{version} 200")), "{what}");
                assert!(page.contains(text), "{what}");
            }
            for args in [
                // Without a certificate.
                &[][..],
                // By an old version of TLS.
                &["--tls-max", "1.1", "--cert", cert, "--key", key],
            ] {
                // What it is told depends on whether its request comes before the refusal goes.
                let (code, status, _) = curl(&deck, port, path, args);
                assert!(code != 0 && status.ends_with(" 000"), "{args:?}: {code} {status}");
            }
        }
        // The peer port has HTTP/1.1 only, also for one that would rather have HTTP/2.
        let peer = cluster.members[0].peer_port;
        let member = (deck.member.cert.to_str().unwrap(), deck.member.key.to_str().unwrap());
        for protocol in ["--http1.1", "--http2", "--no-alpn"] {
            let args = [protocol, "--cert", member.0, "--key", member.1];
            let (code, status, page) = curl(&deck, peer, "/version", &args);
            assert_eq!((code, status.as_str()), (0, "1.1 200"), "{page}");
            assert!(page.contains(r#""etcdserver":""#), "{page}");
        }
    });
}

/// Scrapers are held to where they come from, clients are not.
#[test]
fn who_scrapes_from_elsewhere_is_refused() {
    let deck = Deck::new();
    let elsewhere = Leaf::client("user").with_names(&[], &["10.1.2.3"]);
    let files = deck.write(&deck.signer.issue(&elsewhere), "elsewhere");
    let args = ["--cert", files.cert.to_str().unwrap(), "--key", files.key.to_str().unwrap()];
    let metrics_port = free_port();
    run(async {
        let metrics = format!("--listen-metrics-urls=https://127.0.0.1:{metrics_port}");
        let cluster = Cluster::start(Program::Quorate, 1, deck.options().with(&[&metrics])).await;
        let (code, status, page) = curl(&deck, cluster.members[0].client_port, "/health", &args);
        assert_eq!((code, status.as_str()), (0, "2 200"), "{page}");
        let (code, status, _) = curl(&deck, metrics_port, "/health", &args);
        assert!(code != 0 && status.ends_with(" 000"), "{code} {status}");
        let text = "x509: certificate is valid for 10.1.2.3, not 127.0.0.1";
        wait_for("the refusal to be logged", || async {
            let log = cluster.members[0].log_text();
            let mut lines = log.lines();
            let line = lines.find(|line| line.contains("rejected connection on metrics endpoint"));
            let line = line.ok_or("it is not")?;
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(
                (&line["error"], &line["ip-addresses"][0]),
                (&text.into(), &"10.1.2.3".into())
            );
            Ok(())
        })
        .await;
    });
}

#[test]
fn a_certificate_that_a_member_has_made_is_kept() {
    let deck = Deck::new();
    run(async {
        // Nobody can tell who it is, so these clients do not ask.
        let secure = Some(Secure { client: Some(deck.connector()), peers: false });
        let options = Options { secure, ..Options::brisk() }.with(&["--auto-tls"]);
        let mut cluster = Cluster::prepare(Program::Quorate, 1, options);
        let port = cluster.members[0].client_port;
        let file = cluster.members[0].data.join("fixtures/client/cert.pem");
        let mut made = None;
        for _ in 0..2 {
            cluster.run(0);
            wait_for("the member to serve", || async {
                let (code, status, page) = curl(&deck, port, "/health", &["--insecure"]);
                match (code, &*status) {
                    (0, "2 200") => Ok(()),
                    _ => Err(page),
                }
            })
            .await;
            let (code, _, error) = curl(&deck, port, "/health", &[]);
            assert_eq!(code, 60, "the authority is unknown: {error}");
            let now = std::fs::read(&file).unwrap();
            assert_eq!(made.get_or_insert_with(|| now.clone()), &now);
            cluster.terminate(0).await;
        }
    });
}
