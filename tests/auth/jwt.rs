//! Tokens that are signed: made by one member and good on every other that knows the key, whatever program
//! it runs; and whatever else a key can sign.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

use crate::access::denied;
use crate::call::Call;
use crate::login::{CHEAP, Session, login, password, reference_subjects, secure, subjects};
use crate::server::{Kind, Member, PATIENCE, Said, error};
use crate::tokens::{USER, failed, invalid};

/// Key files of one kind.
struct Keys {
    dir: TempDir,
    symmetric: bool,
}

fn openssl(dir: &Path, args: &[&str]) {
    let mut command = Command::new("openssl");
    command.args(args).current_dir(dir).stdin(Stdio::null());
    let output = command.output().expect("openssl is installed");
    assert!(output.status.success(), "{command:?}: {output:?}");
}

impl Keys {
    /// A new key that `method` signs with.
    fn new(method: &str) -> Keys {
        let dir = TempDir::new().unwrap();
        let make: &[&str] = match &method[..2] {
            "RS" | "PS" => &["genrsa", "-traditional", "-out", "private", "2048"],
            "ES" => {
                let curve = match &method[2..] {
                    "256" => "prime256v1",
                    "384" => "secp384r1",
                    _ => "secp521r1",
                };
                &["ecparam", "-genkey", "-noout", "-out", "private", "-name", curve]
            }
            "Ed" => &["genpkey", "-algorithm", "ed25519", "-out", "private"],
            "HS" => &["rand", "-hex", "-out", "private", "64"],
            other => panic!("{other} is no family of methods"),
        };
        openssl(dir.path(), make);
        let symmetric = method.starts_with("HS");
        if !symmetric {
            openssl(dir.path(), &["pkey", "-in", "private", "-pubout", "-out", "public"]);
        }
        Keys { dir, symmetric }
    }

    fn private(&self) -> PathBuf {
        self.dir.path().join("private")
    }

    fn public(&self) -> PathBuf {
        self.dir.path().join("public")
    }

    /// What `--auth-token` says; without the private key the member can only verify.
    fn option(&self, method: &str, signs: bool, ttl: &str) -> String {
        let mut option = format!("jwt,sign-method={method},ttl={ttl}");
        if !self.symmetric {
            option += &format!(",pub-key={}", self.public().display());
        }
        if signs || self.symmetric {
            option += &format!(",priv-key={}", self.private().display());
        }
        option
    }

    /// A token of these claims.
    fn sign(&self, method: &str, claims: &Value) -> String {
        let pem = std::fs::read(self.pkcs8()).unwrap();
        let key = match &method[..2] {
            "RS" | "PS" => EncodingKey::from_rsa_pem(&pem).unwrap(),
            "ES" => EncodingKey::from_ec_pem(&pem).unwrap(),
            "Ed" => EncodingKey::from_ed_pem(&pem).unwrap(),
            _ => EncodingKey::from_secret(&pem),
        };
        let algorithm: Algorithm = method.parse().unwrap();
        jsonwebtoken::encode(&Header::new(algorithm), claims, &key).unwrap()
    }

    /// The private key in the form that the library reads.
    fn pkcs8(&self) -> PathBuf {
        if self.symmetric {
            return self.private();
        }
        let path = self.dir.path().join("pkcs8");
        if !path.exists() {
            let args = ["pkcs8", "-topk8", "-nocrypt", "-in", "private", "-out", "pkcs8"];
            openssl(self.dir.path(), &args);
        }
        path
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn part(token: &str, n: usize) -> Value {
    let part = token.split('.').nth(n).expect("three parts");
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64")).expect("JSON")
}

/// A member that takes such tokens, whose authentication is on.
async fn member(kind: Kind, option: &str) -> Member {
    let flags = [&CHEAP[..], &["--auth-token", option]].concat();
    let member = Member::with_flags(kind, &flags).await;
    secure(member.api(), &[USER, ("plain", &[])]).await;
    member
}

fn old_revision() -> Said {
    error(Code::InvalidArgument, "etcdserver: revision of auth store is old")
}

/// The methods that the installed etcd knows; the reference release knows EdDSA too.
const METHODS: [&str; 12] = [
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "HS256",
    "HS384", "HS512",
];

/// What any member of a cluster has signed, the others take, though they run another program.
#[tokio::test]
async fn every_method() {
    let kinds = subjects();
    for method in METHODS.into_iter().chain(["EdDSA"]) {
        let keys = Keys::new(method);
        let option = keys.option(method, true, "10m");
        let mut members = Vec::new();
        for kind in &kinds {
            if *kind != Kind::Etcd || method != "EdDSA" {
                members.push(member(*kind, &option).await);
            }
        }
        for signer in &members {
            let kind = signer.kind;
            let asked = unix_now();
            let token = login(&signer.api(), "user", &password("user")).await.unwrap();
            assert_eq!(part(&token, 0)["alg"], method, "{kind:?}");
            assert_eq!(part(&token, 0)["typ"], "JWT", "{kind:?}");
            let claims = part(&token, 1);
            assert_eq!(claims["username"], "user", "{kind:?}: {claims}");
            // Two users with a role of one permission, and root.
            assert_eq!(claims["revision"], 9, "{kind:?}: {claims}");
            let expires = claims["exp"].as_u64().unwrap();
            assert!((asked + 600..=unix_now() + 600).contains(&expires), "{kind:?}: {claims}");
            assert_eq!(claims.as_object().unwrap().len(), 3, "{kind:?}: {claims}");
            for verifier in &members {
                let to = verifier.kind;
                let session = Session::with_token(verifier.api(), &token);
                assert_eq!(session.put("k", "v").await, Ok(()), "{method}: {kind:?} to {to:?}");
                assert_eq!(
                    session.put("l", "v").await,
                    Err(denied()),
                    "{method}: {kind:?} to {to:?}"
                );
            }
            assert_eq!(login(&signer.api(), "user", "wrong").await, Err(failed()), "{kind:?}");
        }
    }
}

/// Tokens that somebody else makes.
#[tokio::test]
async fn what_others_sign() {
    for method in ["RS256", "ES256", "HS256"] {
        let keys = Keys::new(method);
        let option = keys.option(method, true, "10m");
        for kind in subjects() {
            let member = member(kind, &option).await;
            let token = login(&member.api(), "user", &password("user")).await.unwrap();
            let claims = part(&token, 1);
            let of = |token: &str| Session::with_token(member.api(), token);
            let with = |change: &[(&str, Value)]| {
                let mut claims = claims.clone();
                for (name, value) in change {
                    match value {
                        Value::Null => drop(claims.as_object_mut().unwrap().remove(*name)),
                        value => claims[*name] = value.clone(),
                    }
                }
                keys.sign(method, &claims)
            };
            let name = format!("{kind:?}: {method}");
            assert_eq!(of(&with(&[])).get("k").await, Ok(None), "{name}");
            let later = with(&[("exp", json!(unix_now() + 100_000)), ("other", json!("ignored"))]);
            assert_eq!(of(&later).get("k").await, Ok(None), "{name}");
            let ahead = with(&[("revision", json!(1000))]);
            assert_eq!(of(&ahead).get("k").await, Err(old_revision()), "{name}");
            assert_eq!(of(&ahead).put("l", "v").await, Err(denied()), "{name}");
            let detached = Call::DeleteRange(crate::access::delete("k", ""));
            assert_eq!(of(&ahead).call(&detached).await, Ok(()), "{name}");
            // Who knows the key says who calls.
            let root = of(&with(&[("username", json!("root"))]));
            assert_eq!(root.call(&Call::UserList).await, Ok(()), "{name}");
            let nobody = of(&with(&[("username", json!("nobody"))]));
            assert_eq!(nobody.get("k").await, Err(denied()), "{name}");
            let behind = of(&with(&[("revision", json!(8)), ("username", json!("root"))]));
            assert_eq!(behind.get("k").await, Err(old_revision()), "{name}");
            // What only root may is not asked of a revision.
            assert_eq!(behind.call(&Call::UserList).await, Ok(()), "{name}");
            for (what, change) in [
                ("expired", vec![("exp", json!(unix_now() - 100))]),
                ("no user", vec![("username", Value::Null)]),
                ("a number for a user", vec![("username", json!(1))]),
                ("no revision", vec![("revision", Value::Null)]),
                ("words for a revision", vec![("revision", json!("9"))]),
            ] {
                // 3.4 takes claims for granted and ends over one that is missing.
                if kind == Kind::Etcd && what != "expired" {
                    continue;
                }
                let told = of(&with(&change)).get("k").await;
                assert_eq!(told, Err(invalid()), "{name}: {what}");
            }
            // Another key, another method, none at all, and what was changed on its way.
            let stranger = Keys::new(method).sign(method, &claims);
            let (head, rest) = token.split_once('.').unwrap();
            let (body, signature) = rest.split_once('.').unwrap();
            let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let mut forged = claims.clone();
            forged["username"] = json!("root");
            let unsigned = encode(&json!({"alg": "none", "typ": "JWT"}));
            let mut bad = vec![
                ("another's", stranger),
                ("another user", format!("{head}.{}.{signature}", encode(&forged))),
                ("no signature", format!("{head}.{body}.")),
                ("method none", format!("{unsigned}.{body}.")),
                ("method none with a signature", format!("{unsigned}.{body}.{signature}")),
                ("two parts", format!("{head}.{body}")),
                ("nonsense", "nonsense".to_string()),
            ];
            if !keys.symmetric {
                // The public key is known to all: it must not pass for a secret.
                let public = std::fs::read(keys.public()).unwrap();
                let key = EncodingKey::from_secret(&public);
                let confused = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key);
                bad.push(("signed with the public key", confused.unwrap()));
            }
            if method == "RS256" {
                bad.push(("another method of the key", keys.sign("RS512", &claims)));
                bad.push(("another padding of the key", keys.sign("PS256", &claims)));
            }
            for (what, token) in bad {
                assert_eq!(of(&token).get("k").await, Err(invalid()), "{name}: {what}");
            }
        }
    }
}

/// Any change of users or roles makes tokens old that were signed before it.
#[tokio::test]
async fn the_revision_is_frozen() {
    let keys = Keys::new("ES256");
    let option = keys.option("ES256", true, "10m");
    for kind in subjects() {
        let mut member = member(kind, &option).await;
        let user = Session::of(member.api(), "user").await;
        let root = Session::of(member.api(), "root").await;
        assert_eq!(user.put("k", "v").await, Ok(()), "{kind:?}");
        // Of somebody else entirely.
        root.add_user("unrelated", "pw").await.unwrap();
        for session in [&user, &root] {
            assert_eq!(session.get("k").await, Err(old_revision()), "{kind:?}");
            assert_eq!(session.put("k", "w").await, Err(old_revision()), "{kind:?}");
            let watch = session.call(&Call::Watch(crate::access::watch("k", ""))).await;
            assert_eq!(watch, Err(old_revision()), "{kind:?}");
        }
        let serializable = quorate_proto::etcdserverpb::RangeRequest {
            serializable: true,
            ..crate::server::get("k")
        };
        assert_eq!(user.call(&Call::Range(serializable)).await, Err(old_revision()), "{kind:?}");
        // Root may still do what needs no more than root.
        root.add_user("another", "pw").await.unwrap();
        let user = Session::of(member.api(), "user").await;
        assert_eq!(user.get("k").await, Ok(Some("v".into())), "{kind:?}");
        // They need no memory.
        let token = login(&member.api(), "user", &password("user")).await.unwrap();
        member.restart().await;
        let user = Session::with_token(member.api(), &token);
        assert_eq!(user.get("k").await, Ok(Some("v".into())), "{kind:?}");
        // The end of the user is a change as well.
        root.delete_user("user").await.unwrap_or_else(|said| panic!("{kind:?}: {said:?}"));
        assert_eq!(user.get("k").await, Err(old_revision()), "{kind:?}");
    }
}

#[tokio::test]
async fn a_member_without_the_private_key_verifies_only() {
    for method in ["RS256", "ES256"] {
        let keys = Keys::new(method);
        for kind in subjects() {
            let signer = member(kind, &keys.option(method, true, "10m")).await;
            let verifier = member(kind, &keys.option(method, false, "10m")).await;
            let text = "auth: token signing attempted with verify-only key";
            let refused = Err(error(Code::Unknown, text));
            let told = login(&verifier.api(), "user", &password("user")).await;
            assert_eq!(told, refused, "{kind:?}: {method}");
            let token = login(&signer.api(), "user", &password("user")).await.unwrap();
            let user = Session::with_token(verifier.api(), &token);
            assert_eq!(user.put("k", "v").await, Ok(()), "{kind:?}: {method}");
            assert_eq!(user.put("l", "v").await, Err(denied()), "{kind:?}: {method}");
        }
    }
}

#[tokio::test]
async fn a_signed_token_expires() {
    let keys = Keys::new("HS256");
    let option = keys.option("HS256", true, "3s");
    for kind in subjects() {
        let member = member(kind, &option).await;
        let user = Session::of(member.api(), "user").await;
        // No use makes it live longer.
        let deadline = Instant::now() + PATIENCE;
        let mut good = 0;
        loop {
            match user.get("k").await {
                Ok(_) => good += 1,
                Err(said) => {
                    assert_eq!(said, invalid(), "{kind:?}");
                    break;
                }
            }
            assert!(Instant::now() < deadline, "{kind:?}: it does not expire");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(good > 0, "{kind:?}");
    }
}

/// What the option says wrongly keeps the member from starting.
#[tokio::test]
async fn options_that_are_refused() {
    let rsa = Keys::new("RS256");
    let ec = Keys::new("ES256");
    let private = rsa.private().display().to_string();
    let public = rsa.public().display().to_string();
    let path = |path: PathBuf| path.display().to_string();
    for option in [
        "nonsense".to_string(),
        "jwt".to_string(),
        format!("jwt,pub-key={public},priv-key={private}"),
        "jwt,sign-method=RS256".to_string(),
        format!("jwt,sign-method=none,pub-key={public},priv-key={private}"),
        format!("jwt,sign-method=XX256,pub-key={public},priv-key={private}"),
        format!("jwt,sign-method=RS256,pub-key={public}-missing,priv-key={private}"),
        format!("jwt,sign-method=RS256,pub-key={public},priv-key={public}"),
        format!("jwt,sign-method=ES256,pub-key={public},priv-key={private}"),
        format!(
            "jwt,sign-method=RS256,pub-key={},priv-key={}",
            path(ec.public()),
            path(ec.private())
        ),
        format!("jwt,sign-method=RS256,pub-key={public},priv-key={private},ttl=soon"),
        "jwt,sign-method=HS256".to_string(),
        format!("jwt,sign-method=RS256,sign-method=RS256,pub-key={public},priv-key={private}"),
        format!("jwt,sign-method,pub-key={public},priv-key={private}"),
    ] {
        for kind in subjects() {
            let (code, said) = refused(kind, &option);
            assert!(code.is_some_and(|code| code != 0), "{kind:?}: {option}: {code:?}\n{said}");
            // It tells what it is about.
            let about = said.contains("auth") || said.contains("jwt") || said.contains("token");
            assert!(about, "{kind:?}: {option}:\n{said}");
        }
    }
}

/// Starts a member that is to refuse `option`: its exit code, and all that it wrote.
fn refused(kind: Kind, option: &str) -> (Option<i32>, String) {
    let dir = TempDir::new().unwrap();
    let log = dir.path().join("log");
    let file = std::fs::File::create(&log).unwrap();
    let program = if kind == Kind::Etcd { "etcd" } else { env!("CARGO_BIN_EXE_quorate") };
    let mut child = Command::new(program)
        .args(["--listen-client-urls", "http://127.0.0.1:0"])
        .args(["--advertise-client-urls", "http://127.0.0.1:0"])
        .args(["--listen-peer-urls", "http://127.0.0.1:0"])
        .args(["--logger", "zap", "--auth-token", option])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    if ended.is_none() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let said = std::fs::read_to_string(&log).unwrap();
    (ended.expect("it goes on as if the option were good").code(), said)
}

/// An empty option is no provider at all: nobody can log in.
#[tokio::test]
async fn no_tokens() {
    for kind in reference_subjects() {
        let member = member(kind, "").await;
        let told = login(&member.api(), "user", &password("user")).await;
        assert_eq!(told, Err(failed()), "{kind:?}");
        let session = Session::with_token(member.api(), "abcdefghijklmnop.1");
        assert_eq!(session.get("k").await, Err(invalid()), "{kind:?}");
    }
}
