//! etcdctl over TLS: who gets in and who does not, here and with etcd.

use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::deck::{Deck, client_config, flag, shows};
use crate::pki::{self, Authority, Issued, Leaf};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::process::Program;
use crate::rig::run;
use crate::rig::secure::{Connector, Secure};

/// What a call of etcdctl came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    /// The last line, which says what went wrong; what comes before are log lines.
    pub error: String,
}

/// etcdctl with nothing of this process's surroundings, which could name another server or user.
pub fn command(endpoint: &str, credentials: &[String], words: &[&str]) -> Command {
    let mut command = Command::new("etcdctl");
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("ETCDCTL_API", "3");
    command.args(["--endpoints", endpoint, "--command-timeout=2s", "--dial-timeout=2s"]);
    command.args(credentials).args(words).stdin(Stdio::null());
    command
}

pub fn etcdctl(endpoint: &str, credentials: &[String], words: &[&str]) -> Said {
    let output = command(endpoint, credentials, words).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let code = output.status.code().unwrap();
    let error = err.lines().last().unwrap_or_default().to_string();
    Said { code, out, error }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

/// A member of its own, with TLS on the client port as `args` say.
pub async fn serve(program: Program, args: &[String], connector: Connector) -> Cluster {
    let secure = Secure { client: Some(connector), peers: false };
    let options = Options { args: args.to_vec(), secure: Some(secure), ..Options::brisk() };
    Cluster::start(program, 1, options).await
}

/// Who asks, and whether there is an answer.
struct Case {
    what: &'static str,
    credentials: Vec<String>,
    served: bool,
}

/// Runs every case against both programs, each a member with `args`; both must decide alike, by exit
/// code and words, and as the case says. Answers what ours and
/// theirs have logged.
fn compare(args: &[String], connector: &Connector, cases: &[Case]) -> [String; 2] {
    let endpoint =
        |cluster: &Cluster| format!("https://127.0.0.1:{}", cluster.members[0].client_port);
    run(async {
        let ours = serve(Program::Quorate, args, connector.clone()).await;
        let theirs = serve(Program::Etcd, args, connector.clone()).await;
        for Case { what, credentials, served } in cases {
            for words in [&["put", "k", "v"][..], &["get", "k"]] {
                let mine = etcdctl(&endpoint(&ours), credentials, words);
                let other = etcdctl(&endpoint(&theirs), credentials, words);
                assert_eq!(mine, other, "{what}");
                assert_eq!(mine.code == 0, *served, "{what}: {mine:?}");
            }
        }
        [ours, theirs].map(|cluster| cluster.members[0].log_text())
    })
}

fn case(what: &'static str, credentials: Vec<String>) -> Case {
    Case { what, credentials, served: true }
}

fn refused(what: &'static str, credentials: Vec<String>) -> Case {
    Case { what, credentials, served: false }
}

/// How a member's log names who was refused, and why.
fn rejections(log: &str) -> Vec<String> {
    log.lines()
        .filter(|line| line.contains("\"rejected connection"))
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["level"], "warn", "{line}");
            assert!(line["remote-addr"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
            assert!(line["server-name"].is_string(), "{line}");
            line["error"].as_str().unwrap().to_string()
        })
        .collect()
}

#[test]
fn client_certificates_are_demanded_and_judged_as_by_etcd() {
    let deck = Deck::new();
    let stranger = Authority::new("another");
    let write =
        |authority: &Authority, leaf: &Leaf, name: &str| deck.write(&authority.issue(leaf), name);
    let user = deck.write(&deck.user, "user");
    let other_ca = deck.path().join("other-ca.crt");
    pki::replace(&other_ca, stranger.pem.as_bytes());
    let server_only =
        Leaf { usages: vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth], ..Leaf::named("user") };
    let ca = &deck.ca;
    let mut alone = deck.user.clone();
    alone.chain.truncate(alone.chain.find("-----END CERTIFICATE-----\n").unwrap() + 26);
    let cases = [
        case("a user of the authority", shows(ca, &user)),
        refused("nobody", vec![flag("cacert", ca)]),
        refused(
            "a user of another authority",
            shows(ca, &write(&stranger, &Leaf::client("user"), "stranger")),
        ),
        refused(
            "a user whose time is over",
            shows(ca, &write(&deck.signer, &Leaf::client("user").expired(), "expired")),
        ),
        refused(
            "a server's certificate",
            shows(ca, &write(&deck.signer, &server_only, "server-only")),
        ),
        refused("a user without the certificate between", shows(ca, &deck.write(&alone, "alone"))),
        refused("who trusts another authority", shows(&other_ca, &user)),
        refused("who speaks no TLS", vec![]),
    ];
    let [log, _] = compare(&deck.client_args(), &deck.connector(), &cases);
    let errors = rejections(&log);
    for error in ["UnknownIssuer", "certificate expired", "peer sent no certificates"] {
        assert!(errors.iter().any(|said| said.contains(error)), "{error}: {errors:?}");
    }
}

#[test]
fn without_client_certificates_whoever_trusts_the_member_is_served() {
    let deck = Deck::new();
    let args = [flag("cert-file", &deck.member.cert), flag("key-file", &deck.member.key)];
    let config = client_config(&deck.root.pem, None);
    let user = deck.write(&deck.user, "user");
    let cases = [
        case("who shows nothing", vec![flag("cacert", &deck.ca)]),
        case("who shows what nobody asked for", shows(&deck.ca, &user)),
        case(
            "who looks at nothing",
            words(&["--insecure-transport=false", "--insecure-skip-tls-verify"]),
        ),
        refused("who trusts only the system's authorities", words(&["--insecure-transport=false"])),
    ];
    compare(&args, &Connector::new(move || config.clone()), &cases);
}

#[test]
fn what_was_taken_back_is_refused_as_by_etcd() {
    let deck = Deck::new();
    let revoked: Issued = deck.signer.issue(&Leaf::client("revoked"));
    let list = deck.path().join("list.crl");
    pki::replace(&list, &deck.signer.revoke(&[&revoked]));
    let mut args = deck.client_args();
    args.push(flag("client-crl-file", &list));
    let user = deck.write(&deck.user, "user");
    let cases = [
        case("a user that is not on the list", shows(&deck.ca, &user)),
        refused("one that is", shows(&deck.ca, &deck.write(&revoked, "revoked"))),
    ];
    let logs = compare(&args, &deck.connector(), &cases);
    let hex: String = revoked.serial.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = format!("transport: certificate serial {hex} revoked");
    for log in logs {
        let errors = rejections(&log);
        assert!(errors.contains(&text), "{text}: {errors:?}");
    }
}

#[test]
fn only_allowed_hosts_are_served_as_by_etcd() {
    let deck = Deck::new();
    let mut args = deck.client_args();
    args.push("--client-cert-allowed-hostname=good.example".to_string());
    let named = |name: &str| Leaf { dns: vec![name.to_string()], ..Leaf::client("user") };
    let good = deck.signer.issue(&named("good.example"));
    let bad = deck.signer.issue(&named("bad.example"));
    let config = client_config(&deck.root.pem, Some(&good));
    let cases = [
        case("one that is allowed", shows(&deck.ca, &deck.write(&good, "good"))),
        refused("one that is not", shows(&deck.ca, &deck.write(&bad, "bad"))),
    ];
    let connector = Connector::new(move || Arc::clone(&config));
    for log in compare(&args, &connector, &cases) {
        let errors = rejections(&log);
        let text = "client certificate authentication failed";
        assert!(errors.iter().any(|said| said.ends_with(text)), "{errors:?}");
    }
}
