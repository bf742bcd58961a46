//! etcdctl with users and passwords, against both servers: what it prints, what it complains of and how it
//! ends must be equal. Where the installed etcd checks less or words it otherwise, a table says what the
//! reference release answers.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use quorate_proto::authpb::permission::Type;

use crate::access::{grant_lease, put_leased};
use crate::rig::{CHEAP, Session, User, password, secure, subjects};
use crate::server::{Kind, Member, PATIENCE};

fn etcdctl(member: &Member, args: &[&str]) -> Command {
    let mut command = Command::new("etcdctl");
    // Settings of the surroundings would name another server.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCDCTL_") {
            command.env_remove(name);
        }
    }
    command
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &member.endpoint()])
        .args(args)
        .current_dir(member.scratch())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(member: &Member, args: &[&str], input: &str) -> Output {
    let mut child = etcdctl(member, args).spawn().expect("etcdctl is installed");
    // One that refuses its arguments does not read.
    child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
    child.wait_with_output().unwrap()
}

/// What a command printed and how it ended.
#[derive(PartialEq, Eq, Debug)]
struct Printed {
    out: String,
    errors: String,
    code: Option<i32>,
}

fn printed(member: &Member, output: &Output) -> Printed {
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        // The client's own log has times in it.
        let lines = text.lines().filter(|line| !line.starts_with("{\"level\""));
        let lines: Vec<String> = lines.map(|line| normal(member, line)).collect();
        lines.join("\n")
    };
    Printed { out: text(&output.stdout), errors: text(&output.stderr), code: output.status.code() }
}

/// A line without what belongs to one member: addresses, ids, and how long something took.
fn normal(member: &Member, line: &str) -> String {
    let line = line.replace(&member.endpoint(), "ENDPOINT").replace(&member.peer_url(), "PEER");
    let line = match line.split_once(": took = ") {
        Some((told, _)) => told.to_string(),
        None => line,
    };
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

/// Two members alike: one of the program under test, one of etcd.
async fn pair(users: &[User]) -> [Member; 2] {
    let ours = match subjects()[..] {
        [Kind::Etcd] => Kind::Etcd,
        _ => Kind::Redb,
    };
    let member = async |kind| {
        let member = Member::with_flags(kind, &CHEAP).await;
        secure(member.api(), users).await;
        member
    };
    let (ours, theirs) = tokio::join!(member(ours), member(Kind::Etcd));
    [ours, theirs]
}

/// Who runs a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Who {
    Nobody,
    /// A user's name, and its password if it is not the first.
    User(&'static str, Option<&'static str>),
}

impl Who {
    fn option(self) -> Vec<String> {
        match self {
            Who::Nobody => vec![],
            Who::User(name, given) => {
                let secret = given.map_or_else(|| password(name), str::to_string);
                vec!["--user".to_string(), format!("{name}:{secret}")]
            }
        }
    }

    fn logs_in(self) -> bool {
        matches!(self, Who::User("root" | "plain" | "reader" | "writer" | "both" | "single", None))
    }
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

/// The text with which the reference release refuses a command that the installed one does not, or not
/// so. The key of the lease 7b is one that `reader` may read.
fn refusal(who: Who, args: &[&str]) -> Option<&'static str> {
    let (_, need, _) = OTHERWISE.iter().find(|(start, ..)| args.starts_with(start))?;
    let Who::User(name, _) = who else { return Some("etcdserver: user name is empty") };
    let may = match need {
        Need::User => true,
        Need::Root => name == "root",
        Need::Read => name == "root" || name == "reader",
        Need::Write => name == "root",
    };
    (!may).then_some("etcdserver: permission denied")
}

/// Runs a command against both and compares.
fn compare(pair: &[Member; 2], who: Who, args: &[&str], input: &str) {
    let option = who.option();
    let all: Vec<&str> = option.iter().map(String::as_str).chain(args.iter().copied()).collect();
    let [ours, theirs] = std::thread::scope(|scope| {
        let asked = pair.each_ref().map(|member| {
            let all = &all;
            scope.spawn(move || printed(member, &run(member, all, input)))
        });
        asked.map(|asked| asked.join().unwrap())
    });
    let refused = if who.logs_in() || who == Who::Nobody { refusal(who, args) } else { None };
    match refused {
        // etcd against itself knows no newer rules.
        _ if pair[0].kind == Kind::Etcd => {}
        Some(text) => {
            assert_ne!(ours.code, Some(0), "{who:?}: etcdctl {args:?}: {ours:?}");
            let told = ours.errors.contains(text) || ours.out.contains(text);
            assert!(told, "{who:?}: etcdctl {args:?}: {ours:?} instead of {text}");
            return;
        }
        None => {}
    }
    // Sizes, log positions and hashes are each server's own.
    const OWN: [&[&str]; 3] =
        [&["endpoint", "status"], &["endpoint", "hashkv"], &["snapshot", "save"]];
    if OWN.iter().any(|start| args.starts_with(start)) && theirs.code == Some(0) {
        assert_eq!((ours.errors, ours.code), (theirs.errors, theirs.code), "{who:?}: {args:?}");
        return;
    }
    assert_eq!(ours, theirs, "{who:?}: etcdctl {args:?}");
}

const USERS: [User; 5] = [
    ("plain", &[]),
    ("reader", &[(Type::Read, "r/", "r0")]),
    ("writer", &[(Type::Write, "w/", "w0")]),
    ("both", &[(Type::Readwrite, "b", "c")]),
    ("single", &[(Type::Readwrite, "s", "")]),
];

const EVERYONE: [Who; 9] = [
    Who::User("root", None),
    Who::User("plain", None),
    Who::User("reader", None),
    Who::User("writer", None),
    Who::User("both", None),
    Who::User("single", None),
    Who::Nobody,
    Who::User("reader", Some("wrong")),
    Who::User("nobody", Some("x")),
];

#[tokio::test]
async fn keys() {
    let pair = pair(&USERS).await;
    for key in ["r/1", "w/1", "b1", "s", "x"] {
        compare(&pair, Who::User("root", None), &["put", key, "old"], "");
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
    for who in EVERYONE {
        for (args, input) in commands {
            // The client retries a lease that it cannot have for as long as it is let.
            if args[0] == "lock" && who == Who::Nobody {
                continue;
            }
            compare(&pair, who, args, input);
        }
    }
}

#[tokio::test]
async fn leases_and_maintenance() {
    let pair = pair(&USERS).await;
    for member in &pair {
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
    let everyone = EVERYONE.into_iter().skip(1).chain([EVERYONE[0]]);
    for who in everyone {
        for args in commands {
            if args.starts_with(&["lease", "list"]) && who.logs_in() {
                // Others have been granted by now; they are many and have ids of their own.
                continue;
            }
            compare(&pair, who, args, "");
        }
    }
}

/// Users, roles and authentication itself, while it is on.
#[tokio::test]
async fn users_and_roles() {
    let pair = pair(&USERS).await;
    let commands: &[(&[&str], &str)] = &[
        (&["auth", "enable"], ""),
        (&["user", "list"], ""),
        (&["user", "get", "reader"], ""),
        (&["user", "get", "reader", "--detail"], ""),
        (&["user", "get", "root"], ""),
        (&["user", "get", "missing"], ""),
        (&["user", "add", "new:pw"], ""),
        (&["user", "add", "new", "--no-password"], ""),
        (&["user", "add", ":pw"], ""),
        (&["user", "grant-role", "new", "reader"], ""),
        (&["user", "grant-role", "new", "missing"], ""),
        (&["user", "grant-role", "missing", "reader"], ""),
        (&["user", "get", "new"], ""),
        (&["user", "revoke-role", "new", "reader"], ""),
        (&["user", "revoke-role", "new", "reader"], ""),
        (&["user", "revoke-role", "root", "root"], ""),
        (&["user", "passwd", "new", "--interactive=false"], "changed\n"),
        (&["user", "passwd", "missing", "--interactive=false"], "changed\n"),
        (&["user", "delete", "new"], ""),
        (&["user", "delete", "missing"], ""),
        (&["user", "delete", "root"], ""),
        (&["role", "list"], ""),
        (&["role", "get", "reader"], ""),
        (&["role", "get", "writer"], ""),
        (&["role", "get", "missing"], ""),
        (&["role", "add", "made"], ""),
        (&["role", "add", "made"], ""),
        (&["role", "add", ""], ""),
        (&["role", "grant-permission", "made", "readwrite", "k"], ""),
        (&["role", "grant-permission", "made", "read", "--prefix", "p/"], ""),
        (&["role", "grant-permission", "made", "write", "--from-key", "z"], ""),
        (&["role", "grant-permission", "missing", "read", "k"], ""),
        (&["role", "get", "made"], ""),
        (&["role", "revoke-permission", "made", "k"], ""),
        (&["role", "revoke-permission", "made", "k"], ""),
        (&["role", "revoke-permission", "made", "--prefix", "p/"], ""),
        (&["role", "delete", "made"], ""),
        (&["role", "delete", "made"], ""),
        (&["role", "delete", "root"], ""),
    ];
    for who in EVERYONE {
        for (args, input) in commands {
            compare(&pair, who, args, input);
        }
    }
    for who in EVERYONE.into_iter().skip(1) {
        compare(&pair, who, &["auth", "disable"], "");
    }
    let root = Who::User("root", None);
    compare(&pair, root, &["auth", "disable"], "");
    compare(&pair, Who::Nobody, &["put", "x", "1"], "");
    compare(&pair, Who::Nobody, &["auth", "disable"], "");
    compare(&pair, Who::User("reader", Some("wrong")), &["get", "x"], "");
    compare(&pair, Who::Nobody, &["auth", "enable"], "");
    compare(&pair, Who::Nobody, &["get", "x"], "");
    compare(&pair, root, &["get", "x"], "");
}

/// What becomes of a user whose password, roles or whole account change between two commands.
#[tokio::test]
async fn users_that_change() {
    let pair = pair(&USERS).await;
    let root = Who::User("root", None);
    let reader = Who::User("reader", None);
    let changed = Who::User("reader", Some("changed"));
    compare(&pair, root, &["put", "r/1", "v"], "");
    compare(&pair, reader, &["get", "r/1"], "");
    let passwd: &[&str] = &["user", "passwd", "reader", "--interactive=false"];
    compare(&pair, root, passwd, "changed\n");
    compare(&pair, reader, &["get", "r/1"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, root, &["user", "revoke-role", "reader", "reader"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, changed, &["user", "get", "reader"], "");
    compare(&pair, root, &["user", "grant-role", "reader", "reader"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, root, &["role", "revoke-permission", "reader", "--prefix", "r/"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, root, &["role", "grant-permission", "reader", "write", "r/1"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, changed, &["put", "r/1", "w"], "");
    compare(&pair, root, &["role", "grant-permission", "reader", "read", "r/1"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, changed, &["put", "r/1", "x"], "");
    compare(&pair, root, &["role", "delete", "reader"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    compare(&pair, root, &["user", "grant-role", "reader", "root"], "");
    compare(&pair, changed, &["get", "--prefix", ""], "");
    compare(&pair, changed, &["user", "list"], "");
    compare(&pair, changed, &["user", "revoke-role", "root", "root"], "");
    compare(&pair, root, &["user", "delete", "reader"], "");
    compare(&pair, changed, &["get", "r/1"], "");
    // A password apart from the name, and of letters that a name and password are split at.
    compare(&pair, root, &["user", "add", "colon:a:b"], "");
    compare(&pair, root, &["user", "grant-role", "colon", "root"], "");
    compare(&pair, Who::User("colon", Some("a:b")), &["get", "r/1"], "");
    compare(&pair, Who::User("colon", Some("a")), &["get", "r/1"], "");
    compare(&pair, Who::Nobody, &["--user", "colon", "--password", "a:b", "get", "r/1"], "");
    compare(&pair, Who::Nobody, &["--user", "colon", "--password", "a", "get", "r/1"], "");
    compare(&pair, root, &["user", "add", "open", "--no-password"], "");
    compare(&pair, Who::User("open", Some("x")), &["get", "r/1"], "");
}

/// A command that goes on, ended when it has printed `lines` lines.
fn watch(member: &Member, who: Who, args: &[&str], lines: usize) -> (Vec<String>, Option<i32>) {
    struct Ended(Child);
    impl Drop for Ended {
        fn drop(&mut self) {
            // It may have ended already.
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }
    let option = who.option();
    let all: Vec<&str> = option.iter().map(String::as_str).chain(args.iter().copied()).collect();
    let mut child = Ended(etcdctl(member, &all).spawn().expect("etcdctl is installed"));
    let (sender, receiver) = std::sync::mpsc::channel();
    let out = child.0.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let mut seen = Vec::new();
    while seen.len() < lines {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => seen.push(normal(member, &line)),
            Err(error) => {
                panic!("{:?}: {who:?}: {args:?} printed only {seen:?}: {error}", member.kind)
            }
        }
    }
    // Not SIGINT: a Go program that a background job starts ignores that, as its parent does.
    kill(Pid::from_raw(child.0.id() as i32), Signal::SIGTERM).unwrap();
    let code = loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            break status.code();
        }
        assert!(Instant::now() < deadline, "{args:?} does not end");
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    reader.join().unwrap();
    (seen, code)
}

#[tokio::test]
async fn watches_and_elections() {
    let pair = pair(&USERS).await;
    let root = Who::User("root", None);
    for key in ["r/1", "r/2", "s", "r/1"] {
        compare(&pair, root, &["put", key, key], "");
    }
    // Those that may go on; those that may not end by themselves.
    let allowed: &[(Who, &[&str], usize)] = &[
        (root, &["watch", "--prefix", "", "--rev", "2"], 12),
        (Who::User("reader", None), &["watch", "--prefix", "r/", "--rev", "2", "--prev-kv"], 11),
        (Who::User("reader", None), &["watch", "r/1", "--rev", "2"], 6),
        (Who::User("single", None), &["watch", "s", "--rev", "2"], 3),
        (Who::User("both", None), &["elect", "b/office", "me"], 2),
        (root, &["elect", "x/office", "me"], 2),
    ];
    for (who, args, lines) in allowed {
        let [ours, theirs] = pair.each_ref().map(|member| watch(member, *who, args, *lines));
        assert_eq!(ours, theirs, "{who:?}: etcdctl {args:?}");
    }
    let refused: &[(Who, &[&str])] = &[
        (Who::User("reader", None), &["watch", "--prefix", "r", "--rev", "1"]),
        (Who::User("reader", None), &["watch", "s"]),
        (Who::User("writer", None), &["watch", "w/1"]),
        (Who::User("plain", None), &["watch", "--prefix", ""]),
        (Who::User("reader", Some("wrong")), &["watch", "r/1"]),
        (Who::User("single", None), &["elect", "b/office", "me"]),
    ];
    for (who, args) in refused {
        compare(&pair, *who, args, "");
    }
}
