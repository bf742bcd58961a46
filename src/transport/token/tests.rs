//! Tokens of each kind, with a clock that the tests move.

use std::path::{Path, PathBuf};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self as s, Ed25519KeyPair, KeyPair, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::*;
use crate::config::JwtOptions;

const TTL: Duration = Duration::from_secs(300);

/// A clock that stands still until it is moved.
#[derive(Clone, Default)]
pub struct Hands(Arc<AtomicU64>);

impl Hands {
    /// Moves it on.
    pub fn pass(&self, time: Duration) {
        self.0.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }
}

impl Clock for Hands {
    fn uptime(&self) -> Uptime {
        Uptime(self.0.load(Ordering::SeqCst))
    }

    fn unix_s(&self) -> u64 {
        1_700_000_000 + self.0.load(Ordering::SeqCst) / 1000
    }
}

fn simple() -> (Tokens, Hands) {
    let hands = Hands::default();
    let tokens = Tokens::new(&AuthToken::Simple, TTL, Box::new(hands.clone()));
    (tokens.unwrap(), hands)
}

fn assign(tokens: &Tokens, user: &str, index: u64) -> String {
    let Ok(Issue::Prefix(prefix)) = tokens.issue(user, 1) else { panic!("a simple token") };
    let token = format!("{prefix}.{index}");
    let username = user.to_string();
    tokens.changed(&TokenChange::Assigned { username, token: token.clone() });
    token
}

fn user(tokens: &Tokens, token: &str) -> Option<String> {
    tokens.find(token).map(|bearer| {
        assert_eq!(bearer.revision, None);
        bearer.user.to_string()
    })
}

fn held(tokens: &Tokens) -> usize {
    let Provider::Simple(simple) = &tokens.provider else { panic!("simple tokens") };
    simple.count()
}

#[test]
fn a_simple_token_is_sixteen_letters_and_the_index() {
    let (tokens, _) = simple();
    let mut seen = std::collections::HashSet::new();
    let mut letters = std::collections::HashSet::new();
    for _ in 0..500 {
        let Ok(Issue::Prefix(prefix)) = tokens.issue("u", 1) else { panic!("a simple token") };
        assert_eq!(prefix.len(), 16);
        assert!(prefix.bytes().all(|letter| letter.is_ascii_alphabetic()), "{prefix}");
        letters.extend(prefix.bytes());
        assert!(seen.insert(prefix));
    }
    assert_eq!(letters.len(), 52);
}

#[test]
fn a_simple_token_ends_when_it_is_not_used() {
    let (tokens, hands) = simple();
    let token = assign(&tokens, "alice", 7);
    let millisecond = Duration::from_millis(1);
    for _ in 0..3 {
        hands.pass(TTL - millisecond);
        assert_eq!(
            user(&tokens, &token).as_deref(),
            Some("alice"),
            "each use begins its life anew"
        );
    }
    hands.pass(TTL);
    assert_eq!(user(&tokens, &token), None);
    assert_eq!(user(&tokens, &token), None, "once ended is ended");
    assert_eq!(held(&tokens), 0);
    // One that was never used.
    let token = assign(&tokens, "alice", 8);
    hands.pass(TTL);
    assert_eq!(user(&tokens, &token), None);
}

#[test]
fn tokens_that_nobody_shows_again_do_not_stay_in_memory() {
    let (tokens, hands) = simple();
    for index in 0..1000 {
        assign(&tokens, "u", index);
    }
    hands.pass(2 * TTL);
    for index in 1000..1200 {
        assign(&tokens, "u", index);
    }
    assert!(held(&tokens) <= 200, "{} are held", held(&tokens));
}

#[test]
fn what_is_no_token_is_nobodys() {
    let (tokens, _) = simple();
    let token = assign(&tokens, "alice", 7);
    let (prefix, _) = token.split_once('.').unwrap();
    for wrong in ["", ".", ".7", prefix, &format!("{prefix}.8"), &format!("{prefix}.07"), "x.7"] {
        assert_eq!(user(&tokens, wrong), None, "{wrong:?}");
    }
    for (token, index) in [
        ("abc.12", Some(12)),
        ("a.18446744073709551615", Some(u64::MAX)),
        ("a.18446744073709551616", None),
        ("a.+1", None),
        ("a.-1", None),
        ("a.", None),
        ("a", None),
        ("a.b.1", None),
        ("", None),
    ] {
        assert_eq!(tokens.made_by(token).map(|index| index.0), index, "{token:?}");
    }
}

#[test]
fn a_token_that_can_be_guessed_is_not_taken_in() {
    let (tokens, _) = simple();
    for token in [".7", "short.7", "nodot"] {
        let (username, token) = ("root".to_string(), token.to_string());
        tokens.changed(&TokenChange::Assigned { username, token: token.clone() });
        assert_eq!(user(&tokens, &token), None, "{token}");
    }
    assert_eq!(held(&tokens), 0);
}

#[test]
fn tokens_are_taken_back_on_every_thread() {
    let (tokens, _) = simple();
    let tokens = Arc::new(tokens);
    let (alice, bob) = (assign(&tokens, "alice", 1), assign(&tokens, "bob", 2));
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    // A thread that remembers both.
    let other = std::thread::spawn({
        let (tokens, alice, bob) = (tokens.clone(), alice.clone(), bob.clone());
        move || {
            while asked.recv().is_ok() {
                tell.send((user(&tokens, &alice).is_some(), user(&tokens, &bob).is_some()))
                    .unwrap();
            }
        }
    });
    let known = || {
        ask.send(()).unwrap();
        let theirs = told.recv().unwrap();
        let ours = (user(&tokens, &alice).is_some(), user(&tokens, &bob).is_some());
        assert_eq!(theirs, ours);
        ours
    };
    assert_eq!(known(), (true, true));
    tokens.changed(&TokenChange::Ended { username: "alice".into() });
    assert_eq!(known(), (false, true));
    tokens.replaced(&|user| user == "bob");
    assert_eq!(known(), (false, true));
    tokens.replaced(&|_| false);
    assert_eq!(known(), (false, false));
    let carol = assign(&tokens, "carol", 3);
    assert!(user(&tokens, &carol).is_some());
    tokens.changed(&TokenChange::AllEnded);
    assert!(user(&tokens, &carol).is_none());
    assert_eq!(held(&tokens), 0);
    drop(ask);
    other.join().unwrap();
}

#[test]
fn two_stores_of_one_thread_do_not_mix_their_tokens() {
    let ((ours, _), (theirs, _)) = (simple(), simple());
    let token = assign(&ours, "alice", 1);
    for _ in 0..3 {
        assert!(user(&ours, &token).is_some());
        assert!(user(&theirs, &token).is_none());
    }
}

#[test]
fn many_tokens_are_found_although_a_thread_remembers_few() {
    let (tokens, _) = simple();
    let all: Vec<_> =
        (0..2 * REMEMBERED_MAX as u64).map(|index| assign(&tokens, "u", index)).collect();
    for token in all.iter().chain(&all) {
        assert!(user(&tokens, token).is_some());
        let remembered = REMEMBERED.with_borrow(|remembered| remembered.tokens.len());
        assert!(remembered <= REMEMBERED_MAX);
    }
}

#[test]
fn without_a_provider_there_are_no_tokens() {
    let tokens = Tokens::new(&AuthToken::None, TTL, Box::new(Hands::default())).unwrap();
    assert_eq!(tokens.issue("u", 1), Err(IssueError::NoProvider));
    let token = "aaaaaaaaaaaaaaaa.1";
    tokens.changed(&TokenChange::Assigned { username: "u".into(), token: token.into() });
    assert_eq!(tokens.find(token), None);
    assert_eq!(tokens.made_by(token), None);
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<_> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// A key's private and public part as files hold them.
struct Pair {
    private: String,
    public: String,
}

fn rsa() -> &'static Pair {
    static PAIR: std::sync::OnceLock<Pair> = std::sync::OnceLock::new();
    PAIR.get_or_init(|| {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        Pair {
            private: pem("PRIVATE KEY", pair.as_der().unwrap().as_ref()),
            public: pem("PUBLIC KEY", pair.public_key().as_der().unwrap().as_ref()),
        }
    })
}

fn ec(algorithm: &'static s::EcdsaSigningAlgorithm) -> Pair {
    let pair = s::EcdsaKeyPair::generate(algorithm).unwrap();
    // As openssl writes it: the curve comes before the key, which has a form of its own.
    let parameters = pem("EC PARAMETERS", &[6, 5, 43, 129, 4, 0, 35]);
    let key = AsDer::<aws_lc_rs::encoding::EcPrivateKeyRfc5915Der>::as_der(&pair.private_key());
    let public = AsDer::<aws_lc_rs::encoding::PublicKeyX509Der>::as_der(pair.public_key());
    Pair {
        private: parameters + &pem("EC PRIVATE KEY", key.unwrap().as_ref()),
        public: pem("PUBLIC KEY", public.unwrap().as_ref()),
    }
}

fn ed() -> Pair {
    let pair = Ed25519KeyPair::generate().unwrap();
    let public = AsDer::<aws_lc_rs::encoding::PublicKeyX509Der>::as_der(pair.public_key());
    Pair {
        private: pem("PRIVATE KEY", pair.to_pkcs8v1().unwrap().as_ref()),
        public: pem("PUBLIC KEY", public.unwrap().as_ref()),
    }
}

fn keys(method: &str) -> Option<Pair> {
    match method {
        "ES256" => Some(ec(&s::ECDSA_P256_SHA256_FIXED_SIGNING)),
        "ES384" => Some(ec(&s::ECDSA_P384_SHA384_FIXED_SIGNING)),
        "ES512" => Some(ec(&s::ECDSA_P521_SHA512_FIXED_SIGNING)),
        "EdDSA" => Some(ed()),
        _ if method.starts_with("HS") => None,
        _ => Some(Pair { private: rsa().private.clone(), public: rsa().public.clone() }),
    }
}

const METHODS: [&str; 13] = [
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256",
    "ES384", "ES512", "EdDSA",
];

fn file(dir: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// Tokens of `method`; an empty path for a file that is not configured.
fn jwt(method: &str, pub_key: &Path, priv_key: &Path) -> Result<(Tokens, Hands), KeyError> {
    let options = JwtOptions {
        sign_method: method.into(),
        pub_key: pub_key.into(),
        priv_key: priv_key.into(),
        ttl: TTL,
    };
    let hands = Hands::default();
    let tokens = Tokens::new(&AuthToken::Jwt(options), TTL, Box::new(hands.clone()))?;
    Ok((tokens, hands))
}

fn refused(method: &str, pub_key: &Path, priv_key: &Path) -> String {
    let error = jwt(method, pub_key, priv_key).err().expect("a refusal");
    crate::actors::exit::full(&error).to_string()
}

fn signed(tokens: &Tokens, user: &str, revision: u64) -> String {
    let Ok(Issue::Signed(token)) = tokens.issue(user, revision) else { panic!("a signed token") };
    token
}

#[test]
fn signed_tokens_of_each_method() {
    let dir = tempfile::tempdir().unwrap();
    let none = Path::new("");
    for method in METHODS {
        let pair = keys(method);
        let secret = file(dir.path(), "secret", "a secret of some length");
        let (private, public) = match &pair {
            None => (secret, PathBuf::new()),
            Some(pair) => {
                let private = file(dir.path(), "private", &pair.private);
                (private, file(dir.path(), "public", &pair.public))
            }
        };
        let (tokens, hands) = jwt(method, &public, &private).unwrap();
        let token = signed(&tokens, "alice", 7);
        let expected = Bearer { user: "alice".into(), revision: Some(7) };
        assert_eq!(tokens.find(&token), Some(expected.clone()), "{method}");
        assert_eq!(tokens.find(&token), Some(expected.clone()), "{method}, remembered");
        assert_eq!(tokens.made_by(&token), None, "{method}");
        let part = |at: usize| {
            let part = token.split('.').nth(at).unwrap();
            String::from_utf8(URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
        };
        assert_eq!(part(0), format!("{{\"alg\":\"{method}\",\"typ\":\"JWT\"}}"));
        assert_eq!(part(1), r#"{"exp":1700000300,"revision":7,"username":"alice"}"#);

        // Every part counts.
        let at = token.rfind('.').unwrap();
        let claims = URL_SAFE_NO_PAD.encode(r#"{"exp":1700000300,"revision":7,"username":"root"}"#);
        let header = token.split('.').next().unwrap();
        let none_header = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#);
        for forged in [
            token[..at].to_string(),
            token[..=at].to_string(),
            format!("{header}.{claims}{}", &token[at..]),
            format!("{none_header}.{claims}."),
            format!("{token}.x"),
            format!("{}{}", &token[..token.len() - 8], "AAAAAAAA"),
        ] {
            assert_eq!(tokens.find(&forged), None, "{method}: {forged}");
        }

        // Another member has only the public part, or only the private one.
        if pair.is_some() {
            let (verifying, _) = jwt(method, &public, none).unwrap();
            assert_eq!(verifying.find(&token), Some(expected.clone()), "{method}");
            assert_eq!(verifying.issue("alice", 1), Err(IssueError::VerifyOnly));
        }
        let (signing, _) = jwt(method, none, &private).unwrap();
        assert_eq!(signing.find(&token), Some(expected), "{method}");

        // It ends, used or not, and no taking back touches it.
        hands.pass(TTL - Duration::from_secs(1));
        tokens.changed(&TokenChange::AllEnded);
        assert!(tokens.find(&token).is_some());
        hands.pass(Duration::from_secs(1));
        assert_eq!(tokens.find(&token), None, "{method}");
    }
}

#[test]
fn tokens_that_etcd_signed_are_good() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens");
    let lines = include_str!("../../../tests/fixtures/tokens/etcd-3.4.txt").lines();
    let mut methods: Vec<_> = METHODS.into();
    for line in lines {
        let (method, token) = line.split_once(' ').unwrap();
        let none = PathBuf::new();
        let (public, private) = match &method[..2] {
            "HS" => (none, fixtures.join("hmac")),
            "ES" => (fixtures.join(method.to_lowercase() + ".pub"), none),
            _ => (fixtures.join("rsa.pub"), none),
        };
        let (tokens, _) = jwt(method, &public, &private).unwrap();
        let expected = Bearer { user: "root".into(), revision: Some(3) };
        assert_eq!(tokens.find(token), Some(expected), "{method}");
        methods.retain(|other| *other != method);
    }
    // That release did not know it.
    assert_eq!(methods, ["EdDSA"]);
}

#[test]
fn a_token_of_another_method_with_the_same_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let private = file(dir.path(), "private", &rsa().private);
    let public = file(dir.path(), "public", &rsa().public);
    let none = Path::new("");
    let (rs256, _) = jwt("RS256", none, &private).unwrap();
    let (rs512, _) = jwt("RS512", none, &private).unwrap();
    let (ps256, _) = jwt("PS256", none, &private).unwrap();
    // The public key is no secret: it must not do as one.
    let (hs256, _) = jwt("HS256", none, &public).unwrap();
    for (tokens, others) in [(&rs256, [&rs512, &ps256, &hs256]), (&ps256, [&rs256, &rs512, &hs256])]
    {
        for other in others {
            assert_eq!(tokens.find(&signed(other, "root", 1)), None);
        }
    }
}

#[test]
fn claims_are_read_as_etcd_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let secret = file(dir.path(), "secret", "secret");
    let (tokens, hands) = jwt("HS256", Path::new(""), &secret).unwrap();
    let token = |claims: &str| {
        let header = URL_SAFE_NO_PAD.encode(r#"{"typ":"JWT","alg":"HS256","kid":"x"}"#);
        let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"secret");
        let signed = aws_lc_rs::hmac::sign(&key, message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signed.as_ref()))
    };
    let found = |claims: &str| tokens.find(&token(claims)).and_then(|bearer| bearer.revision);
    assert_eq!(found(r#"{"username":"u","revision":7}"#), Some(7), "without an end");
    assert_eq!(found(r#"{"username":"u","revision":7.0,"exp":1.7e9,"iss":"x"}"#), None, "ended");
    assert_eq!(found(r#"{"username":"u","revision":7.0,"exp":1700000001.5}"#), Some(7));
    let later = r#"{"username":"u","revision":7,"nbf":1700000005}"#;
    assert_eq!(found(later), None, "not yet");
    for wrong in [
        r#"{"username":"u"}"#,
        r#"{"revision":7}"#,
        r#"{"username":7,"revision":7}"#,
        r#"{"username":"u","revision":"7"}"#,
        r#"{"username":"u","revision":7,"exp":"1800000000"}"#,
        "[]",
        "",
    ] {
        assert_eq!(found(wrong), None, "{wrong}");
    }
    hands.pass(Duration::from_secs(5));
    assert_eq!(found(later), Some(7));
}

#[test]
fn keys_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let none = Path::new("");
    let at = |name: &str| dir.path().join(name);
    file(dir.path(), "rsa", &rsa().private);
    file(dir.path(), "rsa.pub", &rsa().public);
    let es = ec(&s::ECDSA_P256_SHA256_FIXED_SIGNING);
    file(dir.path(), "es", &es.private);
    file(dir.path(), "es.pub", ec(&s::ECDSA_P256_SHA256_FIXED_SIGNING).public);
    file(dir.path(), "empty", "");
    let missing = refused("RS256", &at("missing"), none);
    assert!(missing.starts_with("pub-key ") && missing.contains("No such file"), "{missing}");
    for (method, needs) in [("HS256", "priv-key"), ("ES256", "priv-key, or pub-key to verify only")]
    {
        let text = format!("sign-method {method} needs {needs}");
        assert_eq!(refused(method, none, none), text);
    }
    assert_eq!(refused("HS256", none, &at("empty")), "sign-method HS256 needs priv-key");
    for (method, pub_key, priv_key, named) in [
        ("RS256", none, &*at("es"), "priv-key"),
        ("RS256", none, &*at("empty"), "priv-key"),
        ("ES256", none, &*at("rsa"), "priv-key"),
        ("ES384", none, &*at("es"), "priv-key"),
        ("EdDSA", none, &*at("es"), "priv-key"),
        ("ES256", &*at("rsa.pub"), &*at("es"), "pub-key"),
        ("EdDSA", &*at("es.pub"), none, "pub-key"),
        ("RS256", &*at("empty"), none, "pub-key"),
    ] {
        let text = refused(method, pub_key, priv_key);
        let rule = format!("is no key for sign-method {method}");
        assert!(text.starts_with(named) && text.contains(&rule), "{method}: {text}");
    }
    let text = refused("ES256", &at("es.pub"), &at("es"));
    assert!(text.contains("is not the public part of priv-key"), "{text}");
}

#[test]
fn a_public_key_may_be_in_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let cert = rcgen::CertificateParams::new(vec!["h".into()]).unwrap().self_signed(&key).unwrap();
    let private = file(dir.path(), "key", key.serialize_pem());
    let public = file(dir.path(), "cert", cert.pem());
    let (signing, _) = jwt("ES384", &public, &private).unwrap();
    let (verifying, _) = jwt("ES384", &public, Path::new("")).unwrap();
    assert!(verifying.find(&signed(&signing, "u", 1)).is_some());
}
