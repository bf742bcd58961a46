//! Who asks by JSON over TLS, by either version of HTTP: tokens say so, certificates never do.

use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{api, connector, enable};
use crate::ctl::Running;
use crate::deck::{Deck, flag};
use crate::etcdctl::serve;
use crate::login::{CHEAP, password};
use crate::pki::{Files, Leaf};
use crate::rig::process::Program;
use crate::rig::run;

const VERSIONS: [(&str, &str); 2] = [("--http1.1", "1.1"), ("--http2", "2")];

/// Exactly that, and why: who shows a name has to think that it counts.
const IGNORED: &str = "CommonName of client sending a request against gateway will be ignored and not used as expected\n";

/// Who asks a member, and how.
#[derive(Clone)]
struct Asker<'a> {
    deck: &'a Deck,
    port: u16,
    /// The option that chooses the version of HTTP.
    http: &'static str,
    shown: Option<Files>,
    /// What stands in the header for it.
    token: Option<String>,
}

/// What curl saw.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Answer {
    version: String,
    status: u16,
    content_type: String,
    sniff: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code and the text of a refusal.
    fn refusal(&self) -> (u16, u64, String) {
        let body = self.json();
        let text = body["message"].as_str().unwrap_or_default().to_string();
        (self.status, body["code"].as_u64().unwrap_or_default(), text)
    }
}

impl Asker<'_> {
    fn with_token(&self, token: Option<String>) -> Self {
        Asker { token, ..self.clone() }
    }

    fn command(&self, path: &str) -> Command {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--no-buffer", "--max-time", "60", self.http]);
        command.arg("--cacert").arg(&self.deck.ca);
        if let Some(files) = &self.shown {
            command.arg("--cert").arg(&files.cert).arg("--key").arg(&files.key);
        }
        if let Some(token) = &self.token {
            command.args(["--header", &format!("Authorization: {token}")]);
        }
        command.arg(format!("https://127.0.0.1:{}{path}", self.port));
        command
    }

    fn ask(&self, mut command: Command) -> Answer {
        let told =
            "\n%{http_version}\n%{http_code}\n%{content_type}\n%header{x-content-type-options}";
        let output = command.args(["--write-out", told]).output().unwrap();
        assert!(output.status.success(), "{command:?}: {output:?}");
        let out = String::from_utf8(output.stdout).unwrap();
        let mut parts = out.rsplitn(5, '\n').map(str::to_string);
        let mut next = || parts.next().expect("five parts");
        let (sniff, content_type, status, version, body) = (next(), next(), next(), next(), next());
        Answer { version, status: status.parse().unwrap(), content_type, sniff, body }
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(self.command(path))
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        let mut command = self.command(path);
        command.args(["--data", &body.to_string()]);
        self.ask(command)
    }

    /// As JSON what has to be well.
    fn done(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{} {path} {body}: {answer:?}", self.http);
        answer.json()
    }

    /// The token of a user, as it is given.
    fn login(&self, name: &str) -> String {
        let body = json!({"name": name, "password": password(name)});
        self.done("/v3/auth/authenticate", &body)["token"].as_str().expect("a token").to_string()
    }

    /// A stream that answers one request for as long as it is read.
    fn stream(&self, path: &str, body: &Value) -> Running {
        let mut command = self.command(path);
        command.args(["--data", &body.to_string()]);
        Running::start(command)
    }
}

fn next(stream: &mut Running) -> Value {
    let line = stream.line();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

fn b64(text: &str) -> String {
    STANDARD.encode(text)
}

#[test]
fn a_certificate_with_a_name_is_turned_away_from_the_gateway() {
    let deck = Deck::new();
    let alice = deck.write(&deck.signer.issue(&Leaf::client("alice")), "alice");
    let unnamed = deck.write(&deck.signer.issue(&Leaf::nameless()), "nameless");
    let mut args = deck.client_args();
    args.extend(CHEAP.map(str::to_string));
    run(async {
        for program in [Program::Quorate, Program::Etcd] {
            let cluster = serve(program, &args, deck.connector()).await;
            let port = cluster.members[0].client_port;
            let asker = |http, shown: &Files, token: Option<&str>| Asker {
                deck: &deck,
                port,
                http,
                shown: Some(shown.clone()),
                token: token.map(str::to_string),
            };
            let range = json!({"key": b64("a/1")});
            // As long as there are no users, it does not matter.
            for (http, _) in VERSIONS {
                asker(http, &alice, None).done("/v3/kv/range", &range);
            }
            enable(api(port, deck.connector())).await;
            let token = asker("--http2", &unnamed, None).login("alice");
            for (http, version) in VERSIONS {
                for token in [None, Some(token.as_str())] {
                    let asker = asker(http, &alice, token);
                    for path in
                        ["/v3/kv/range", "/v3/auth/authenticate", "/v3/watch", "/v3/nonsense"]
                    {
                        let expected = Answer {
                            version: version.to_string(),
                            status: 400,
                            content_type: "text/plain; charset=utf-8".to_string(),
                            sniff: "nosniff".to_string(),
                            body: IGNORED.to_string(),
                        };
                        assert_eq!(asker.post(path, &range), expected, "{program:?} {path}");
                    }
                    // Pages need no user, so nobody is taken in by what is ignored there.
                    let answer = asker.get("/health");
                    assert_eq!((answer.version.as_str(), answer.status), (version, 200));
                    let answer = asker.get("/version");
                    assert_eq!((answer.version.as_str(), answer.status), (version, 200));
                }
                let asker = asker(http, &unnamed, Some(&token));
                asker.done("/v3/kv/range", &range);
            }
        }
    });
}

/// What a user does by JSON, on each version of HTTP and with either form of the token.
fn flows(deck: &Deck, args: &[String], shown: Option<Files>) {
    let mut args = args.to_vec();
    args.extend(CHEAP.map(str::to_string));
    run(async {
        // One with a name, for what there has to be before.
        let helper = match &shown {
            Some(_) => deck.connector(),
            None => connector(deck, None),
        };
        let cluster = serve(Program::Quorate, &args, helper.clone()).await;
        let port = cluster.members[0].client_port;
        enable(api(port, helper)).await;
        let mut lease = 0;
        for (http, version) in VERSIONS {
            let nobody = Asker { deck, port, http, shown: shown.clone(), token: None };
            assert_eq!(nobody.get("/health").version, version);
            let token = nobody.login("alice");
            for token in [token.clone(), format!("Bearer {token}")] {
                lease += 1;
                flow(&nobody.with_token(Some(token)), lease);
            }
            refusals(&nobody, &token);
        }
    });
}

fn flow(alice: &Asker<'_>, lease: i64) {
    let key = b64(&format!("a/{lease}"));
    let mut watch = alice.stream("/v3/watch", &json!({"create_request": {"key": key}}));
    assert_eq!(next(&mut watch)["result"]["created"], true);

    let put = alice.done("/v3/kv/put", &json!({"key": key, "value": b64("v")}));
    let revision = put["header"]["revision"].clone();
    let event = next(&mut watch);
    let kv = &event["result"]["events"][0]["kv"];
    assert_eq!((&kv["value"], &kv["mod_revision"]), (&json!(b64("v")), &revision), "{event}");
    let found = alice.done("/v3/kv/range", &json!({"key": key}));
    assert_eq!(found["kvs"][0]["value"], b64("v"), "{found}");

    let id = lease.to_string();
    let granted = alice.done("/v3/lease/grant", &json!({"TTL": "600", "ID": id}));
    assert_eq!((&granted["ID"], &granted["TTL"]), (&json!(id), &json!("600")));
    alice.done("/v3/kv/put", &json!({"key": key, "value": b64("w"), "lease": id}));
    assert_eq!(next(&mut watch)["result"]["events"][0]["kv"]["lease"], id);
    let mut renewed = alice.stream("/v3/lease/keepalive", &json!({"ID": id}));
    let renewed = next(&mut renewed);
    assert_eq!(
        (&renewed["result"]["ID"], &renewed["result"]["TTL"]),
        (&json!(id), &json!("600")),
        "{renewed}"
    );
    let left = alice.done("/v3/lease/timetolive", &json!({"ID": id, "keys": true}));
    assert_eq!((&left["grantedTTL"], &left["keys"]), (&json!("600"), &json!([key])), "{left}");

    let lock = json!({"name": b64("a/lock"), "lease": id});
    let held = alice.done("/v3/lock/lock", &lock)["key"].clone();
    assert_eq!(held, b64(&format!("a/lock/{lease:x}")));
    let of_lock = json!({"key": held, "count_only": true});
    assert_eq!(alice.done("/v3/kv/range", &of_lock)["count"], "1");
    alice.done("/v3/lock/unlock", &json!({"key": held}));
    assert_eq!(alice.done("/v3/kv/range", &of_lock).get("count"), None);

    alice.done("/v3/lease/revoke", &json!({"ID": id}));
    let event = next(&mut watch);
    assert_eq!(event["result"]["events"][0]["type"], "DELETE", "{event}");
}

fn refusals(nobody: &Asker<'_>, token: &str) {
    let denied = (403, 7, "etcdserver: permission denied".to_string());
    let alice = nobody.with_token(Some(token.to_string()));
    let elsewhere = json!({"key": b64("b")});
    for path in ["/v3/kv/put", "/v3/kv/range", "/v3/kv/deleterange"] {
        assert_eq!(alice.post(path, &elsewhere).refusal(), denied.clone(), "{path}");
    }
    let lock = json!({"name": b64("b/lock")});
    // The lock's own client has lost the code.
    let unknown = (500, 2, denied.2);
    assert_eq!(alice.post("/v3/lock/lock", &lock).refusal(), unknown);
    let mut watch = alice.stream("/v3/watch", &json!({"create_request": elsewhere}));
    let refused = next(&mut watch);
    assert_eq!(refused["result"]["canceled"], true, "{refused}");
    let reason = refused["result"]["cancel_reason"].as_str().unwrap_or_default();
    assert!(reason.contains("permission denied"), "{refused}");
    // Neither the certificate of this connection nor that of the member is a user.
    let range = json!({"key": b64("a/1")});
    let empty = (400, 3, "etcdserver: user name is empty".to_string());
    assert_eq!(nobody.post("/v3/kv/range", &range).refusal(), empty);
    assert_eq!(nobody.post("/v3/kv/put", &range).refusal(), empty);
    let invalid = (401, 16, "etcdserver: invalid auth token".to_string());
    for token in ["nonsense.1", "Bearer nonsense.1", "Bearer"] {
        let bad = nobody.with_token(Some(token.to_string()));
        assert_eq!(bad.post("/v3/kv/range", &range).refusal(), invalid, "{token}");
    }
    let wrong = json!({"name": "alice", "password": "wrong"});
    let text = "etcdserver: authentication failed, invalid user ID or password".to_string();
    assert_eq!(nobody.post("/v3/auth/authenticate", &wrong).refusal(), (400, 3, text));
}

#[test]
fn a_token_opens_the_gateway_behind_a_certificate_without_a_name() {
    let deck = Deck::new();
    let shown = deck.write(&deck.signer.issue(&Leaf::nameless()), "nameless");
    flows(&deck, &deck.client_args(), Some(shown));
}

#[test]
fn a_token_opens_the_gateway_without_a_certificate() {
    let deck = Deck::new();
    let args = [flag("cert-file", &deck.member.cert), flag("key-file", &deck.member.key)];
    flows(&deck, &args, None);
}

/// It is shown and verified, but says nothing of users, so nobody is turned away for it.
#[test]
fn a_token_opens_the_gateway_behind_a_certificate_that_names_no_user() {
    let deck = Deck::new();
    let mut args = deck.client_args();
    args.retain(|arg| arg != "--client-cert-auth");
    let shown = deck.write(&deck.signer.issue(&Leaf::client("root")), "root");
    flows(&deck, &args, Some(shown));
}
