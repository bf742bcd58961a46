//! Users where certificates and authentication meet: whom a certificate names, what a token has to do
//! with it, by every way that clients come in.

mod cluster;
mod gateway;
mod pages;

use std::time::Duration;

use quorate_proto::authpb::UserAddOptions;
use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use rustls::HandshakeKind;
use tokio::io::AsyncWriteExt;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::ctl::Running;
use crate::deck::{Deck, client_config, flag, shows};
use crate::etcdctl::{Said, etcdctl, serve};
use crate::login::{CHEAP, Session, User, password, secure};
use crate::pki::{Files, Issued, Leaf};
use crate::rig::cluster::Cluster;
use crate::rig::process::Program;
use crate::rig::secure::Connector;
use crate::rig::{PATIENCE, run};
use crate::server::{Api, error};

/// Users with passwords; each certificate below that has such a name is that user's.
const USERS: [User; 2] = [("alice", &[(Type::Readwrite, "a/", "a0")]), ("plain", &[])];
/// A user that nobody can log in as.
const BARE: &str = "bare";

/// How somebody comes in with a certificate.
fn connector(deck: &Deck, shown: Option<&Issued>) -> Connector {
    let config = client_config(&deck.root.pem, shown);
    Connector::new(move || config.clone())
}

/// All services of a member for who comes in by `connector`.
fn api(port: u16, connector: Connector) -> Api {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
    let endpoint = endpoint.connect_timeout(Duration::from_secs(5)).timeout(PATIENCE);
    Api::new(endpoint.connect_with_connector_lazy(connector))
}

/// Makes the users and turns authentication on.
async fn enable(api: Api) {
    let options = Some(UserAddOptions { no_password: true });
    let user = pb::AuthUserAddRequest { name: BARE.into(), options, ..Default::default() };
    api.auth.clone().user_add(user).await.unwrap();
    let anyone = Session::nobody(api.clone());
    anyone.add_role(BARE).await.unwrap();
    anyone.grant(BARE, (Type::Read, "r/", "r0")).await.unwrap();
    anyone.grant_role(BARE, BARE).await.unwrap();
    secure(api, &USERS).await;
}

/// One member of each program, with the same users.
struct Pair {
    ours: Cluster,
    theirs: Cluster,
}

impl Pair {
    async fn start(deck: &Deck) -> Pair {
        let mut args = deck.client_args();
        args.extend(CHEAP.map(str::to_string));
        let ours = serve(Program::Quorate, &args, deck.connector()).await;
        let theirs = serve(Program::Etcd, &args, deck.connector()).await;
        let pair = Pair { ours, theirs };
        for port in pair.ports() {
            enable(api(port, deck.connector())).await;
        }
        pair
    }

    fn ports(&self) -> [u16; 2] {
        [&self.ours, &self.theirs].map(|cluster| cluster.members[0].client_port)
    }

    /// Has both run a command, which has to come to the same; answers what.
    fn same(&self, credentials: &[String], words: &[&str]) -> Said {
        let [ours, theirs] = self.ports().map(|port| call(port, credentials, words));
        assert_eq!(ours, theirs, "{credentials:?} {words:?}");
        ours
    }
}

fn endpoint(port: u16) -> String {
    format!("https://127.0.0.1:{port}")
}

/// What a command comes to, without what belongs to one member.
fn call(port: u16, credentials: &[String], words: &[&str]) -> Said {
    let said = etcdctl(&endpoint(port), credentials, words);
    let normal = |text: &str| {
        let lines = text.lines().map(|line| normal(line, &endpoint(port)));
        lines.collect::<Vec<_>>().join("\n")
    };
    Said { code: said.code, out: normal(&said.out), error: normal(&said.error) }
}

/// A line without addresses, ids and times.
fn normal(line: &str, endpoint: &str) -> String {
    let line = line.replace(endpoint, "ENDPOINT");
    let line = line.split(": took = ").next().unwrap_or_default();
    let line = match (line.find("remaining("), line.find("s), attached")) {
        (Some(from), Some(to)) => format!("{}remaining({}", &line[..from], &line[to..]),
        _ => line.to_string(),
    };
    let is_id = |word: &str| word.len() >= 13 && word.chars().all(|c| c.is_ascii_hexdigit());
    let words = line.split(' ').map(|word| if is_id(word) { "ID" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// What somebody shows to etcdctl.
fn credentials(deck: &Deck, files: &Files, user: Option<&str>) -> Vec<String> {
    let mut credentials = shows(&deck.ca, files);
    credentials.extend(user.map(|user| format!("--user={user}")));
    credentials
}

const DENIED: &str = "Error: etcdserver: permission denied";
const USER_EMPTY: &str = "Error: etcdserver: user name is empty";
const LOGIN_FAILED: &str = "Error: etcdserver: authentication failed, invalid user ID or password";

#[test]
fn a_certificate_names_its_user_as_with_etcd() {
    let deck = Deck::new();
    let shows = |leaf: &Leaf, name: &str, user: Option<&str>| {
        credentials(&deck, &deck.write(&deck.signer.issue(leaf), name), user)
    };
    let client = |name: &str| shows(&Leaf::client(name), name, None);
    let (alice, plain, bare, root) =
        (client("alice"), client("plain"), client(BARE), client("root"));
    let (stranger, nobody) = (client("stranger"), shows(&Leaf::nameless(), "nameless", None));
    let [put, get] = [&["put", "a/1", "v"], &["get", "a/1", "-w=simple"]].map(|words| &words[..]);
    run(async {
        let pair = Pair::start(&deck).await;
        for (who, words, text) in [
            (&alice, put, None),
            (&alice, get, None),
            (&alice, &["get", "a/", "a0", "--keys-only"], None),
            (&alice, &["put", "a/1", "w", "--prev-kv"], None),
            (&alice, &["get", "b"], Some(DENIED)),
            (&alice, &["put", "b", "v"], Some(DENIED)),
            (&alice, &["del", "", "--from-key"], Some(DENIED)),
            (&alice, &["user", "get", "alice"], None),
            (&alice, &["role", "get", "alice"], None),
            (&alice, &["user", "get", "root"], Some(DENIED)),
            (&alice, &["user", "list"], Some(DENIED)),
            (&alice, &["auth", "disable"], Some(DENIED)),
            (&alice, &["endpoint", "health"], None),
            (&plain, get, Some(DENIED)),
            (&bare, &["get", "r/1"], None),
            (&bare, &["put", "r/1", "v"], Some(DENIED)),
            (&bare, get, Some(DENIED)),
            (&root, &["put", "r/1", "v"], None),
            (&root, &["put", "b", "v"], None),
            (&root, &["get", "", "--from-key"], None),
            (&root, &["user", "list"], None),
            (&root, &["user", "get", BARE], None),
            (&root, &["compaction", "2"], None),
            (&root, &["member", "list", "--write-out=fields"], None),
            (&bare, &["get", "r/1"], None),
            (&stranger, get, Some(DENIED)),
            (&stranger, put, Some(DENIED)),
            (&stranger, &["user", "list"], Some("Error: etcdserver: user name not found")),
            // It is a credential, if a poor one.
            (&nobody, get, Some(DENIED)),
            (&nobody, put, Some(DENIED)),
            (&nobody, &["user", "list"], Some(USER_EMPTY)),
            (&alice, &["del", "a/1"], None),
        ] {
            if words.starts_with(&["member"]) {
                // Ids and addresses are each member's own.
                assert_eq!(pair.ports().map(|port| call(port, who, words).code), [0, 0]);
                continue;
            }
            let said = pair.same(who, words);
            assert_eq!(said.code != 0, text.is_some(), "{who:?} {words:?}: {said:?}");
            if let Some(text) = text {
                assert_eq!(said.error, text, "{who:?} {words:?}");
            }
        }

        // Leases: whoever has a user may have one, whoever may write its keys keeps it.
        assert_eq!(pair.same(&alice, &["lease", "grant", "600"]).code, 0);
        for port in pair.ports() {
            let issued = deck.signer.issue(&Leaf::client("alice"));
            let session = Session::nobody(api(port, connector(&deck, Some(&issued))));
            let grant = pb::LeaseGrantRequest { ttl: 600, id: 0x7b };
            session.api.lease.clone().lease_grant(grant).await.unwrap();
        }
        for (who, words, works) in [
            (&alice, &["put", "a/leased", "v", "--lease=7b"][..], true),
            (&alice, &["put", "b", "v", "--lease=7b"], false),
            (&alice, &["lease", "timetolive", "7b", "--keys"], true),
            (&alice, &["lease", "keep-alive", "--once", "7b"], true),
            (&root, &["lease", "keep-alive", "--once", "7b"], true),
            (&plain, &["lease", "revoke", "7b"], false),
            (&stranger, &["lease", "revoke", "7b"], false),
            (&alice, &["lease", "revoke", "7b"], true),
            (&alice, &["get", "a/leased"], true),
        ] {
            let said = pair.same(who, words);
            assert_eq!(said.code == 0, works, "{who:?} {words:?}: {said:?}");
        }
    });
}

#[test]
fn a_certificate_watches_what_its_user_may_as_with_etcd() {
    let deck = Deck::new();
    let issued = deck.signer.issue(&Leaf::client("alice"));
    let alice = credentials(&deck, &deck.write(&issued, "alice"), None);
    let stranger = deck.write(&deck.signer.issue(&Leaf::client("stranger")), "stranger");
    let stranger = credentials(&deck, &stranger, None);
    run(async {
        let pair = Pair::start(&deck).await;
        for n in ["1", "2"] {
            pair.same(&alice, &["put", "a/k", n]);
        }
        let words = ["watch", "--prefix", "a/", "--rev=2", "--prev-kv"];
        let seen = pair.ports().map(|port| {
            let mut watch =
                Running::start(crate::etcdctl::command(&endpoint(port), &alice, &words));
            let mut seen = watch.lines(8);
            // It goes on.
            assert_eq!(call(port, &alice, &["put", "a/k", "3"]).code, 0);
            seen.extend(watch.lines(5));
            seen
        });
        assert_eq!(seen[0], seen[1]);
        assert_eq!(seen[0].last().map(String::as_str), Some("3"));
        for (who, key) in [(&alice, "b"), (&stranger, "a/k")] {
            let said = pair.same(who, &["watch", key, "--rev=1"]);
            assert_ne!(said.code, 0, "{said:?}");
        }
        for port in pair.ports() {
            let mut watching = api(port, connector(&deck, Some(&issued))).watching();
            let reply = watching
                .created(pb::WatchCreateRequest { key: "b".into(), ..Default::default() })
                .await;
            // The words are another matter in each release, but it is refused and the stream stays.
            assert!(reply.created && reply.canceled, "{reply:?}");
            assert!(reply.cancel_reason.contains("permission denied"), "{reply:?}");
            let reply = watching
                .created(pb::WatchCreateRequest { key: "a/k".into(), ..Default::default() })
                .await;
            assert!(reply.created && !reply.canceled, "{reply:?}");
        }
    });
}

#[test]
fn a_token_counts_and_not_the_certificate_as_with_etcd() {
    let deck = Deck::new();
    let root = deck.signer.issue(&Leaf::client("root"));
    let files = |leaf: &Leaf, name: &str| deck.write(&deck.signer.issue(leaf), name);
    let (alice, stranger) = (Leaf::client("alice"), Leaf::client("stranger"));
    let alice = files(&alice, "alice");
    let (stranger, nobody) = (files(&stranger, "stranger"), files(&Leaf::nameless(), "nameless"));
    let root_files = deck.write(&root, "root");
    let login = |name: &str| format!("{name}:{}", password(name));
    let (as_alice, as_root) = (login("alice"), login("root"));
    run(async {
        let pair = Pair::start(&deck).await;
        for (shown, user, key, text) in [
            (&alice, &as_root, "b", None),
            (&stranger, &as_root, "b", None),
            (&nobody, &as_root, "b", None),
            (&nobody, &as_alice, "a/1", None),
            (&root_files, &as_alice, "a/1", None),
            (&root_files, &as_alice, "b", Some(DENIED)),
            (&root_files, &login("plain"), "a/1", Some(DENIED)),
            (&root_files, &"root:wrong".to_string(), "b", Some(LOGIN_FAILED)),
            (&root_files, &login("stranger"), "b", Some(LOGIN_FAILED)),
            (&root_files, &format!("{BARE}:x"), "r/1", Some("")),
        ] {
            let said = pair.same(&credentials(&deck, shown, Some(user)), &["put", key, "v"]);
            assert_eq!(said.code != 0, text.is_some(), "{user} {key}: {said:?}");
            if let Some(text) = text {
                assert!(said.error.starts_with(text), "{user} {key}: {said:?}");
            }
        }
        let invalid = error(Code::Unauthenticated, "etcdserver: invalid auth token");
        let denied = error(Code::PermissionDenied, "etcdserver: permission denied");
        for port in pair.ports() {
            let api = || api(port, connector(&deck, Some(&root)));
            assert!(Session::nobody(api()).get("b").await.is_ok());
            let session = Session::of(api(), "alice").await;
            assert_eq!(session.get("b").await, Err(denied.clone()));
            for key in ["token", "authorization"] {
                let bad = Session::with_metadata(api(), key, "nonsense.1");
                assert_eq!(bad.get("b").await, Err(invalid.clone()), "{key}");
                assert_eq!(bad.put("b", "v").await, Err(invalid.clone()), "{key}");
            }
            // Its token has ended with what it was given for, and root's certificate is not a way out.
            let by_name = Session::nobody(api());
            by_name.change_password("alice", "changed").await.unwrap();
            assert_eq!(session.get("a/1").await, Err(invalid.clone()));
            by_name.change_password("alice", &password("alice")).await.unwrap();
        }
    });
}

/// A certificate that has to be shown, and is verified, is not yet a user.
#[test]
fn without_client_cert_auth_no_certificate_names_a_user_as_with_etcd() {
    let deck = Deck::new();
    let alice = deck.signer.issue(&Leaf::client("alice"));
    let files = deck.write(&alice, "alice");
    let mut args = vec![
        flag("cert-file", &deck.member.cert),
        flag("key-file", &deck.member.key),
        flag("trusted-ca-file", &deck.ca),
    ];
    args.extend(CHEAP.map(str::to_string));
    run(async {
        let ours = serve(Program::Quorate, &args, deck.connector()).await;
        let theirs = serve(Program::Etcd, &args, deck.connector()).await;
        let pair = Pair { ours, theirs };
        for port in pair.ports() {
            enable(api(port, deck.connector())).await;
        }
        let said = pair.same(&credentials(&deck, &files, None), &["put", "a/1", "v"]);
        assert_eq!((said.code != 0, said.error.as_str()), (true, USER_EMPTY));
        let user = format!("alice:{}", password("alice"));
        let said = pair.same(&credentials(&deck, &files, Some(&user)), &["put", "a/1", "v"]);
        assert_eq!(said.code, 0, "{said:?}");
    });
}

/// Who comes back with what it was given at its first handshake shows no certificate; it is the one that
/// it was.
#[test]
fn a_session_that_is_resumed_has_its_user() {
    let deck = Deck::new();
    let mut args = deck.client_args();
    args.extend(CHEAP.map(str::to_string));
    run(async {
        let ours = serve(Program::Quorate, &args, deck.connector()).await;
        let port = ours.members[0].client_port;
        enable(api(port, deck.connector())).await;
        let denied = error(Code::PermissionDenied, "etcdserver: permission denied");
        for (name, key) in [("alice", "a/1"), ("root", "b")] {
            let issued = deck.signer.issue(&Leaf::client(name));
            let connector = connector(&deck, Some(&issued));
            let mut resumed = 0;
            for n in 0..6 {
                let user = Session::nobody(api(port, connector.clone()));
                assert_eq!(user.put(key, name).await, Ok(()), "{name}: connection {n}");
                if name != "root" {
                    assert_eq!(user.put("b", name).await, Err(denied.clone()));
                }
                let mut probe = connector.connect(port).await.unwrap();
                let kind = probe.get_ref().1.handshake_kind();
                resumed += u32::from(kind == Some(HandshakeKind::Resumed));
                probe.shutdown().await.unwrap();
            }
            assert!(resumed > 0, "no connection was resumed");
        }
    });
}
