//! etcdctl with users, against both servers: what it prints, what it complains of and how it ends must be
//! equal, by whatever way a user comes in. Where the installed etcd checks less or words it otherwise, a
//! table says what the reference release answers.

mod users;
mod waiting;

use std::process::Command;
use std::sync::Arc;

use quorate_proto::authpb::permission::Type;

use crate::access::{grant_lease, put_leased};
use crate::ctl::{self, Printed, etcdctl};
use crate::deck::{Deck, shows};
use crate::login::{CHEAP, Session, User, password, secure, subjects};
use crate::pki::{Files, Leaf};
use crate::server::{Kind, Member};

/// How those come in who run commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Over connections in the clear, with names and passwords.
    Clear,
    /// Over TLS, with names and passwords; the certificate that has to be shown names somebody else.
    Password,
    /// Over TLS, with the certificate that names them and nothing else.
    Certificate,
}

/// Each list of commands as a test a way.
macro_rules! every_way {
    ($($list:path as $name:ident),* $(,)?) => {
        mod clear {
            $(#[tokio::test] async fn $name() { $list(super::Way::Clear).await; })*
        }
        mod tls_passwords {
            $(#[tokio::test] async fn $name() { $list(super::Way::Password).await; })*
        }
        mod tls_certificates {
            $(#[tokio::test] async fn $name() { $list(super::Way::Certificate).await; })*
        }
    };
}

every_way! {
    super::keys as keys,
    super::leases_and_maintenance as leases_and_maintenance,
    super::users::users_and_roles as users_and_roles,
    super::users::users_that_change as users_that_change,
    super::waiting::watches as watches,
    super::waiting::locks_and_elections as locks_and_elections,
}

/// Who runs a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Nobody,
    /// A user's name, and its password if it is not the first. A certificate has the name alone.
    User(&'static str, Option<&'static str>),
}

impl Who {
    fn logs_in(self) -> bool {
        match self {
            Who::User(name, None) => name == "root" || USERS.iter().any(|(user, _)| *user == name),
            _ => false,
        }
    }
}

const USERS: [User; 6] = [
    ("plain", &[]),
    ("reader", &[(Type::Read, "r/", "r0")]),
    ("writer", &[(Type::Write, "w/", "w0")]),
    ("both", &[(Type::Readwrite, "b", "c")]),
    ("single", &[(Type::Readwrite, "s", "")]),
    // What the four may.
    (
        "each",
        &[
            (Type::Read, "r/", "r0"),
            (Type::Write, "w/", "w0"),
            (Type::Readwrite, "b", "c"),
            (Type::Readwrite, "s", ""),
        ],
    ),
];

const ROOT: Who = Who::User("root", None);
const WRONG: Who = Who::User("reader", Some("wrong"));
const STRANGER: Who = Who::User("nobody", Some("x"));

const fn user(name: &'static str) -> Who {
    Who::User(name, None)
}

impl Way {
    /// Root, who goes first where commands follow from each other, those who may do more or less, and
    /// those who are nobody. What the users' rights mean is asked at length in the clear; over TLS, that
    /// a command has the rights of who runs it.
    fn everyone(self) -> &'static [Who] {
        match self {
            Way::Clear => {
                const {
                    &[
                        ROOT,
                        user("plain"),
                        user("reader"),
                        user("writer"),
                        user("both"),
                        user("single"),
                        Who::Nobody,
                        WRONG,
                        STRANGER,
                    ]
                }
            }
            Way::Password => const { &[ROOT, user("each"), user("plain"), Who::Nobody, WRONG] },
            Way::Certificate => {
                const { &[ROOT, user("each"), user("plain"), Who::Nobody, STRANGER] }
            }
        }
    }
}

/// Two members alike: one of the program under test, one of etcd.
struct Pair {
    way: Way,
    members: [Member; 2],
    /// What is shown over TLS.
    deck: Option<Deck>,
}

impl Pair {
    async fn start(way: Way) -> Pair {
        let ours = match subjects()[..] {
            [Kind::Etcd] => Kind::Etcd,
            _ => Kind::Redb,
        };
        let deck = (way != Way::Clear).then(Deck::new);
        let member = async |kind| match &deck {
            None => Member::with_flags(kind, &CHEAP).await,
            Some(deck) => {
                let args = deck.client_args();
                let flags: Vec<&str> =
                    args.iter().map(String::as_str).chain(CHEAP.iter().copied()).collect();
                let connector = deck.connector();
                let dial = Arc::new(move |endpoint: tonic::transport::Endpoint| {
                    endpoint.connect_with_connector_lazy(connector.clone())
                });
                Member::with_tls(kind, &flags, dial).await
            }
        };
        let (ours, theirs) = tokio::join!(member(ours), member(Kind::Etcd));
        Pair { way, members: [ours, theirs], deck }
    }

    /// With the users, who are asked for.
    async fn secured(way: Way) -> Pair {
        let pair = Pair::start(way).await;
        for member in &pair.members {
            secure(member.api(), &USERS).await;
        }
        pair
    }

    /// What makes a command that of somebody.
    fn credentials(&self, who: Who) -> Vec<String> {
        let user = match who {
            Who::User(name, given) if self.way != Way::Certificate => {
                let secret = given.map_or_else(|| password(name), str::to_string);
                Some(format!("--user={name}:{secret}"))
            }
            _ => None,
        };
        let shown = self.deck.as_ref().map(|deck| {
            let files = match who {
                Who::Nobody => issued(deck, "nameless", Leaf::nameless),
                Who::User(name, _) => {
                    let name = if self.way == Way::Password { "somebody-else" } else { name };
                    issued(deck, name, || Leaf::client(name))
                }
            };
            shows(&deck.ca, &files)
        });
        shown.into_iter().flatten().chain(user).collect()
    }

    fn command(&self, member: &Member, who: Who, args: &[&str]) -> Command {
        let credentials = self.credentials(who);
        let args: Vec<&str> =
            credentials.iter().map(String::as_str).chain(args.iter().copied()).collect();
        let endpoint = match self.deck {
            Some(_) => member.client_url(),
            None => member.endpoint(),
        };
        etcdctl(member, &endpoint, &args)
    }

    /// Runs a command against both.
    fn both(&self, who: Who, args: &[&str], input: &str) -> [Printed; 2] {
        let commands = self.members.each_ref().map(|member| self.command(member, who, args));
        let [ours, theirs] = &self.members;
        let run = |member: &Member, command: Command| {
            let Printed { out, errors, code } = ctl::printed(member, &ctl::run(command, input));
            Printed { out: plain(&out), errors: plain(&errors), code }
        };
        let [our, their] = commands;
        std::thread::scope(|scope| {
            let theirs = scope.spawn(|| run(theirs, their));
            [run(ours, our), theirs.join().unwrap()]
        })
    }

    /// Runs a command against both and compares.
    fn compare(&self, who: Who, args: &[&str], input: &str) {
        let [ours, theirs] = self.both(who, args, input);
        let what = format!("{:?}: {who:?}: etcdctl {args:?}", self.way);
        // etcd against itself knows no newer rules.
        let newer = self.members[0].kind != Kind::Etcd;
        if let Some(text) = self.refusal(who, args).filter(|_| newer) {
            assert_ne!(ours.code, Some(0), "{what}: {ours:?}");
            let told = ours.errors.contains(text) || ours.out.contains(text);
            assert!(told, "{what}: {ours:?} instead of {text}");
            return;
        }
        // Sizes, log positions and hashes are each server's own.
        const OWN: [&[&str]; 3] =
            [&["endpoint", "status"], &["endpoint", "hashkv"], &["snapshot", "save"]];
        if OWN.iter().any(|start| args.starts_with(start)) && theirs.code == Some(0) {
            assert_eq!((ours.errors, ours.code), (theirs.errors, theirs.code), "{what}");
            return;
        }
        assert_eq!(ours, theirs, "{what}");
    }

    /// The text with which the reference release refuses a command that the installed one does not, or
    /// not so. The key of the lease 7b is one that `reader` and `each` may read.
    fn refusal(&self, who: Who, args: &[&str]) -> Option<&'static str> {
        let (_, need, _) = OTHERWISE.iter().find(|(start, ..)| args.starts_with(start))?;
        let name = match who {
            Who::Nobody if self.way == Way::Clear => return Some("etcdserver: user name is empty"),
            // A certificate without a name is a credential.
            Who::Nobody => "",
            // The login fails, alike.
            Who::User(..) if self.way != Way::Certificate && !who.logs_in() => return None,
            Who::User(name, _) => name,
        };
        let may = match need {
            Need::User => true,
            Need::Root | Need::Write => name == "root",
            Need::Read => ["root", "reader", "each"].contains(&name),
        };
        match need {
            _ if may => None,
            Need::Root if name.is_empty() => Some("etcdserver: user name is empty"),
            Need::Root if !user(name).logs_in() => Some("etcdserver: user name not found"),
            _ => Some("etcdserver: permission denied"),
        }
    }
}

/// A certificate of the deck, and its key; they are made when they are asked for first.
fn issued(deck: &Deck, name: &str, leaf: impl FnOnce() -> Leaf) -> Files {
    let path = |ending| deck.path().join(format!("{name}.{ending}"));
    let files = Files { cert: path("crt"), key: path("key") };
    // It is written behind the certificate.
    if files.key.exists() { files } else { deck.write(&deck.signer.issue(&leaf()), name) }
}

/// What was printed, without ids and how long something took.
fn plain(text: &str) -> String {
    // The client's own log has times in it.
    let lines = text.lines().filter(|line| !line.starts_with("{\"level\""));
    lines.map(plain_line).collect::<Vec<_>>().join("\n")
}

fn plain_line(line: &str) -> String {
    let line = line.split_once(": took = ").map_or(line, |(told, _)| told);
    let mut out = String::new();
    let mut word = String::new();
    for c in line.chars().chain(['\n']) {
        if c.is_ascii_alphanumeric() {
            word.push(c);
            continue;
        }
        let hex = word.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
        out += if hex && word.len() >= 13 { "ID" } else { &word };
        word.clear();
        out.push(c);
    }
    out.trim_end_matches('\n').to_string()
}

/// What is needed, in the reference release, for commands that the installed one checks less, or refuses
/// in other words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    User,
    Root,
    /// Of the lease's keys.
    Read,
    Write,
}

const OTHERWISE: &[(&[&str], Need, &str)] = &[
    (&["compaction"], Need::Root, "unchecked until 3.4.42"),
    (&["lease", "grant"], Need::User, "unchecked until 3.4.42"),
    (&["lease", "list"], Need::Read, "unchecked until 3.4.42"),
    (&["lease", "timetolive", "7b", "--keys"], Need::Read, "unchecked until 3.4.42"),
    (&["lease", "timetolive"], Need::User, "unchecked until 3.4.42"),
    (&["lease", "keep-alive"], Need::Write, "unchecked until 3.4.42"),
    (&["lease", "revoke", "7c"], Need::User, "unchecked until 3.4.42"),
    (&["member", "list"], Need::User, "unchecked until 3.4.42"),
    // With no alarm raised, it only lists them.
    (&["alarm"], Need::User, "unchecked until 3.4.42"),
    (&["endpoint", "status"], Need::User, "unchecked until 3.6"),
    (&["move-leader"], Need::Root, "unchecked until 3.6; it asks for the status first"),
    (&["endpoint", "hashkv"], Need::Root, "3.4 does not translate these errors"),
    (&["defrag"], Need::Root, "3.4 does not translate these errors"),
    (&["snapshot", "save"], Need::Root, "3.4 does not translate these errors"),
];

async fn keys(way: Way) {
    let pair = Pair::secured(way).await;
    for key in ["r/1", "w/1", "b1", "s", "x"] {
        pair.compare(ROOT, &["put", key, "old"], "");
    }
    let commands: &[(&[&str], &str)] = &[
        (&["put", "r/1", "v"], ""),
        (&["put", "w/1", "v"], ""),
        (&["put", "w/1", "v", "--prev-kv"], ""),
        (&["put", "b1", "v", "--prev-kv"], ""),
        (&["put", "c", "v"], ""),
        (&["put", "s", "v"], ""),
        (&["put", "s", "--ignore-value"], ""),
        (&["put", "s1", "v"], ""),
        (&["get", "r/1"], ""),
        (&["get", "r/2"], ""),
        (&["get", "r/", "s"], ""),
        (&["get", "--prefix", "r/"], ""),
        (&["get", "--prefix", "r/", "--keys-only"], ""),
        (&["get", "--prefix", "r/", "--consistency", "s"], ""),
        (&["get", "--prefix", "r"], ""),
        (&["get", "--prefix", ""], ""),
        (&["get", "--from-key", "s"], ""),
        (&["get", "w/1"], ""),
        (&["get", "b", "c"], ""),
        (&["get", "b", "c", "--count-only", "-w", "simple"], ""),
        (&["get", "b1", "b2"], ""),
        (&["get", "a", "c"], ""),
        (&["get", "s"], ""),
        (&["get", "s", "s1"], ""),
        (&["get", "x"], ""),
        (&["get", ""], ""),
        (&["txn"], "val(\"r/1\") = \"v\"\n\nget r/1\n\nget r/2\n\n"),
        (&["txn"], "val(\"b1\") = \"v\"\n\nput b1 w\nget b1\n\nput b2 w\n\n"),
        (&["txn"], "val(\"b1\") = \"none\"\n\nput x w\n\nput b2 w\n\n"),
        (&["txn"], "ver(\"x\") = \"0\"\n\nput b1 w\n\nput b2 w\n\n"),
        (&["txn"], "\ndel w/2 --prev-kv\n\n\n"),
        (&["del", "w/2"], ""),
        (&["del", "b2", "--prev-kv"], ""),
        (&["del", "w/1", "--prev-kv"], ""),
        (&["del", "--prefix", "w/"], ""),
        (&["del", "--prefix", "b"], ""),
        (&["del", "--from-key", "s"], ""),
        (&["del", "s"], ""),
        (&["del", "x"], ""),
        (&["lock", "b/lock", "echo", "held"], ""),
        (&["lock", "x/lock", "echo", "held"], ""),
    ];
    for who in way.everyone() {
        for (args, input) in commands {
            // The client retries a lease that it cannot have for as long as it is let.
            if args[0] == "lock" && *who == Who::Nobody && way == Way::Clear {
                continue;
            }
            pair.compare(*who, args, input);
        }
    }
}

async fn leases_and_maintenance(way: Way) {
    let pair = Pair::secured(way).await;
    for member in &pair.members {
        let root = Session::of(member.api(), "root").await;
        root.call(&grant_lease(0x7b)).await.unwrap();
        root.call(&put_leased("r/leased", 0x7b)).await.unwrap();
        root.put("x", "1").await.unwrap();
        root.put("x", "2").await.unwrap();
    }
    let commands: &[&[&str]] = &[
        &["lease", "timetolive", "63"],
        &["lease", "list"],
        &["lease", "keep-alive", "--once", "7b"],
        &["lease", "revoke", "7b"],
        &["lease", "revoke", "7c"],
        &["lease", "grant", "1000"],
        &["member", "list"],
        &["member", "add", "m2", "--peer-urls", "nonsense"],
        &["member", "remove", "63"],
        &["member", "update", "63", "--peer-urls", "http://127.0.0.1:1"],
        &["member", "promote", "63"],
        &["alarm", "list"],
        &["alarm", "disarm"],
        &["endpoint", "status"],
        &["endpoint", "health"],
        &["endpoint", "hashkv"],
        &["defrag"],
        &["move-leader", "63"],
        &["snapshot", "save", "saved.db"],
        &["compaction", "1000"],
    ];
    // Root goes last: it may revoke the lease.
    let (root, others) = way.everyone().split_first().expect("root and others");
    for who in others.iter().chain([root]) {
        for args in commands {
            if args.starts_with(&["lease", "list"]) && who.logs_in() {
                // Others have been granted by now; they are many and have ids of their own.
                continue;
            }
            pair.compare(*who, args, "");
        }
    }
}
