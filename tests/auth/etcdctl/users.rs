//! Users, roles and authentication itself.

use super::{Pair, ROOT, WRONG, Way, Who, user};
use crate::ctl::Printed;
use crate::server::Kind;

/// Who runs a command of the list while users are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Everyone,
    /// Another form of what is refused to the others in the same way.
    Root,
}
use By::{Everyone, Root};

/// Every command of users and roles, and what can be wrong with each. What it makes, it takes away again.
const COMMANDS: &[(By, &[&str], &str)] = &[
    (Everyone, &["user", "list"], ""),
    (Everyone, &["user", "get", "reader"], ""),
    (Everyone, &["user", "get", "reader", "--detail"], ""),
    (Everyone, &["user", "get", "root"], ""),
    (Everyone, &["user", "get", "missing"], ""),
    (Everyone, &["user", "add", "new:pw"], ""),
    (Root, &["user", "add", "new:pw"], ""),
    (Everyone, &["user", "add", "new", "--no-password"], ""),
    (Root, &["user", "add", "asked", "--interactive=false"], "pw\n"),
    (Root, &["user", "add", "bare", "--no-password"], ""),
    (Everyone, &["user", "add", ":pw"], ""),
    (Root, &["user", "add", "", "--no-password"], ""),
    (Root, &["user", "list"], ""),
    (Root, &["user", "get", "bare", "--detail"], ""),
    (Everyone, &["user", "grant-role", "new", "reader"], ""),
    (Root, &["user", "grant-role", "new", "reader"], ""),
    (Everyone, &["user", "grant-role", "new", "missing"], ""),
    (Everyone, &["user", "grant-role", "missing", "reader"], ""),
    (Everyone, &["user", "get", "new"], ""),
    (Everyone, &["user", "revoke-role", "new", "reader"], ""),
    (Root, &["user", "revoke-role", "new", "reader"], ""),
    (Root, &["user", "revoke-role", "missing", "reader"], ""),
    (Everyone, &["user", "revoke-role", "root", "root"], ""),
    (Everyone, &["user", "passwd", "new", "--interactive=false"], "changed\n"),
    (Everyone, &["user", "passwd", "missing", "--interactive=false"], "changed\n"),
    (Everyone, &["role", "list"], ""),
    (Everyone, &["role", "get", "reader"], ""),
    (Everyone, &["role", "get", "writer"], ""),
    (Everyone, &["role", "get", "missing"], ""),
    (Everyone, &["role", "add", "made"], ""),
    (Root, &["role", "add", "made"], ""),
    (Everyone, &["role", "add", ""], ""),
    (Root, &["role", "add", "other"], ""),
    (Root, &["role", "list"], ""),
    (Root, &["role", "get", "made"], ""),
    (Everyone, &["role", "grant-permission", "made", "readwrite", "k"], ""),
    (Root, &["role", "grant-permission", "made", "read", "a"], ""),
    (Root, &["role", "grant-permission", "made", "write", "a"], ""),
    (Root, &["role", "grant-permission", "made", "readwrite", "y", "yy"], ""),
    (Everyone, &["role", "grant-permission", "made", "read", "--prefix", "p/"], ""),
    (Root, &["role", "grant-permission", "made", "write", "m/", "--prefix"], ""),
    (Root, &["role", "grant-permission", "made", "read", "m/", "m0"], ""),
    (Root, &["role", "grant-permission", "made", "read", "m/"], ""),
    (Root, &["role", "grant-permission", "made", "read", "m/"], ""),
    (Root, &["role", "grant-permission", "made", "read", "", "--prefix"], ""),
    (Everyone, &["role", "grant-permission", "made", "write", "--from-key", "z"], ""),
    (Root, &["role", "grant-permission", "made", "read", "n", "--from-key"], ""),
    (Root, &["role", "grant-permission", "made", "nonsense", "m/"], ""),
    (Everyone, &["role", "grant-permission", "missing", "read", "k"], ""),
    (Everyone, &["role", "get", "made"], ""),
    (Root, &["role", "get", "made", "-w", "json"], ""),
    (Everyone, &["role", "revoke-permission", "made", "k"], ""),
    (Root, &["role", "revoke-permission", "made", "k"], ""),
    (Everyone, &["role", "revoke-permission", "made", "--prefix", "p/"], ""),
    (Root, &["role", "revoke-permission", "made", "m/"], ""),
    (Root, &["role", "revoke-permission", "made", "m/", "--prefix"], ""),
    (Root, &["role", "revoke-permission", "made", "n", "--from-key"], ""),
    (Root, &["role", "revoke-permission", "made", "y", "yyy"], ""),
    (Root, &["role", "revoke-permission", "missing", "a"], ""),
    (Root, &["role", "get", "made"], ""),
    (Root, &["user", "grant-role", "new", "other"], ""),
    (Root, &["user", "grant-role", "new", "made"], ""),
    (Root, &["user", "grant-role", "new", "root"], ""),
    (Root, &["user", "grant-role", "bare", "made"], ""),
    (Root, &["user", "get", "new"], ""),
    (Root, &["user", "revoke-role", "new", "root"], ""),
    (Root, &["user", "get", "bare", "--detail"], ""),
    (Everyone, &["role", "delete", "made"], ""),
    (Root, &["role", "delete", "made"], ""),
    (Root, &["user", "get", "new"], ""),
    (Root, &["user", "get", "bare"], ""),
    (Root, &["role", "delete", "other"], ""),
    (Everyone, &["user", "delete", "new"], ""),
    (Root, &["user", "delete", "asked"], ""),
    (Root, &["user", "delete", "bare"], ""),
    (Everyone, &["user", "delete", "missing"], ""),
    (Everyone, &["user", "delete", "root"], ""),
    (Everyone, &["role", "delete", "root"], ""),
    (Everyone, &["auth", "enable"], ""),
];

/// While users are asked for, and how that ends and begins.
pub async fn users_and_roles(way: Way) {
    let pair = Pair::secured(way).await;
    for who in way.everyone() {
        for (by, args, input) in COMMANDS {
            if *by == Everyone || *who == ROOT {
                compare(&pair, *who, args, input);
            }
        }
    }
    // 3.5 and later tell what root may do, whatever it was granted.
    let [ours, _] = pair.both(ROOT, &["role", "get", "root"], "");
    if pair.members[0].kind != Kind::Etcd {
        let everything = "\t[, <open ended> (prefix )";
        let told = format!("Role root\nKV Read:\n{everything}\nKV Write:\n{everything}");
        assert_eq!(ours, Printed { out: told, errors: String::new(), code: Some(0) });
    }
    for who in &way.everyone()[1..] {
        pair.compare(*who, &["auth", "disable"], "");
    }
    pair.compare(ROOT, &["auth", "disable"], "");
    pair.compare(Who::Nobody, &["put", "x", "1"], "");
    pair.compare(Who::Nobody, &["auth", "disable"], "");
    pair.compare(WRONG, &["get", "x"], "");
    pair.compare(Who::Nobody, &["auth", "enable"], "");
    pair.compare(Who::Nobody, &["get", "x"], "");
    pair.compare(ROOT, &["get", "x"], "");
}

/// While authentication is off, all of it can be prepared.
#[tokio::test]
async fn nobody_prepares_users_and_roles() {
    let pair = Pair::start(Way::Clear).await;
    for (_, args, input) in COMMANDS {
        compare(&pair, Who::Nobody, args, input);
    }
    let commands: &[&[&str]] = &[
        &["role", "get", "root"],
        &["role", "add", "root"],
        &["role", "grant-permission", "root", "read", "a"],
        &["user", "add", "root:root-secret"],
        &["auth", "enable"],
        &["auth", "disable"],
        // Nobody asks for users, and no key has moved.
        &["--user", "root:wrong", "get", "a"],
        &["put", "a", "1"],
        &["get", "a", "-w", "fields", "--print-value-only"],
        &["user", "grant-role", "root", "root"],
        &["user", "grant-role", "root", "root"],
        // Switched on, everyone has to say who they are.
        &["auth", "enable"],
        &["put", "b", "1"],
        &["get", "b"],
    ];
    for args in commands {
        compare(&pair, Who::Nobody, args, "");
    }
    pair.compare(Who::User("root", Some("wrong")), &["put", "b", "1"], "");
    for args in [&["put", "b", "1"][..], &["get", "b"], &["auth", "disable"]] {
        pair.compare(ROOT, args, "");
    }
    pair.compare(Who::Nobody, &["get", "b"], "");
}

/// Runs a command against both and compares; what its output has of the cluster does not count.
fn compare(pair: &Pair, who: Who, args: &[&str], input: &str) {
    if !args.contains(&"-w") {
        return pair.compare(who, args, input);
    }
    let [ours, theirs] = pair.both(who, args, input).map(|printed| {
        let out = own_ids_hidden(&printed.out);
        Printed { out, ..printed }
    });
    assert_eq!(ours, theirs, "{who:?}: etcdctl {args:?}");
}

/// Output without ids and terms, which differ between any two clusters.
fn own_ids_hidden(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    let names = ["cluster_id\":", "member_id\":", "raft_term\":", "ID\" : ", "RaftTerm\" : "];
    while let Some((at, name)) =
        names.iter().filter_map(|name| Some((rest.find(name)?, name))).min()
    {
        let (before, after) = rest.split_at(at + name.len());
        out.push_str(before);
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out + rest
}

/// What becomes of a user whose password, roles or whole account change between two commands.
pub async fn users_that_change(way: Way) {
    let pair = Pair::secured(way).await;
    let root = ROOT;
    let reader = user("reader");
    let changed = Who::User("reader", Some("changed"));
    pair.compare(root, &["put", "r/1", "v"], "");
    pair.compare(reader, &["get", "r/1"], "");
    let passwd: &[&str] = &["user", "passwd", "reader", "--interactive=false"];
    pair.compare(root, passwd, "changed\n");
    pair.compare(reader, &["get", "r/1"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(root, &["user", "revoke-role", "reader", "reader"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(changed, &["user", "get", "reader"], "");
    pair.compare(root, &["user", "grant-role", "reader", "reader"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(root, &["role", "revoke-permission", "reader", "--prefix", "r/"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(root, &["role", "grant-permission", "reader", "write", "r/1"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(changed, &["put", "r/1", "w"], "");
    pair.compare(root, &["role", "grant-permission", "reader", "read", "r/1"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(changed, &["put", "r/1", "x"], "");
    pair.compare(root, &["role", "delete", "reader"], "");
    pair.compare(changed, &["get", "r/1"], "");
    pair.compare(root, &["user", "grant-role", "reader", "root"], "");
    pair.compare(changed, &["get", "--prefix", ""], "");
    pair.compare(changed, &["user", "list"], "");
    pair.compare(changed, &["user", "revoke-role", "root", "root"], "");
    pair.compare(root, &["user", "delete", "reader"], "");
    pair.compare(changed, &["get", "r/1"], "");
    // A password apart from the name, and of letters that a name and password are split at.
    pair.compare(root, &["user", "add", "colon:a:b"], "");
    pair.compare(root, &["user", "grant-role", "colon", "root"], "");
    pair.compare(Who::User("colon", Some("a:b")), &["get", "r/1"], "");
    pair.compare(Who::User("colon", Some("a")), &["get", "r/1"], "");
    pair.compare(Who::Nobody, &["--user", "colon", "--password", "a:b", "get", "r/1"], "");
    pair.compare(Who::Nobody, &["--user", "colon", "--password", "a", "get", "r/1"], "");
    pair.compare(root, &["user", "add", "open", "--no-password"], "");
    pair.compare(Who::User("open", Some("x")), &["get", "r/1"], "");
}
