//! Debian's etcdctl against both servers: the same commands, the same output.

use std::process::Output;

use serde_json::Value;

use crate::ctl::{self, Printed, Running, etcdctl, printed};
use crate::server::{Kind, Member};

/// `etcdctl args` against `member`, which waits for it to end.
fn run(member: &Member, args: &[&str], input: &str) -> Output {
    run_at(&member.endpoint(), member, args, input)
}

/// `run` with the member's endpoint written as `endpoint`.
fn run_at(endpoint: &str, member: &Member, args: &[&str], input: &str) -> Output {
    ctl::run(etcdctl(member, endpoint, args), input)
}

/// Runs every command against both and compares.
fn compare(pair: &[Member; 2], commands: &[(&[&str], &str)]) {
    for (args, input) in commands {
        let [ours, theirs] =
            pair.each_ref().map(|member| printed(member, &run(member, args, input)));
        assert_eq!(ours, theirs, "etcdctl {args:?}");
    }
}

async fn pair(kind: Kind) -> [Member; 2] {
    let (ours, theirs) = tokio::join!(Member::start(kind), Member::start(Kind::Etcd));
    [ours, theirs]
}

#[tokio::test]
async fn keys() {
    let pair = pair(Kind::Redb).await;
    let commands: &[(&[&str], &str)] = &[
        (&["put", "a", "1"], ""),
        (&["put", "b", "2", "--prev-kv"], ""),
        (&["put", "b", "3", "--prev-kv"], ""),
        (&["put", "c"], "from standard input"),
        (&["put", "b", "--ignore-value"], ""),
        (&["put", "b", "x", "--ignore-value"], ""),
        (&["put", "b", "4", "--ignore-lease"], ""),
        (&["put", "missing", "--ignore-value"], ""),
        (&["put", "b", "4", "--lease", "7b"], ""),
        (&["put", "d/1", "x"], ""),
        (&["put", "d/2", "y"], ""),
        (&["put", "d/3", "z"], ""),
        (&["put", "binary", "a\nb\u{1}"], ""),
        (&["put", "", "v"], ""),
        (&["get", "a"], ""),
        (&["get", "missing"], ""),
        (&["get", ""], ""),
        (&["get", "a", "c"], ""),
        (&["get", "--prefix", "d/"], ""),
        (&["get", "--prefix", ""], ""),
        (&["get", "--prefix", "d/", "--keys-only"], ""),
        (&["get", "--prefix", "d/", "--print-value-only"], ""),
        (&["get", "--prefix", "d/", "--limit", "2"], ""),
        (&["get", "--prefix", "", "--count-only", "-w", "fields"], ""),
        (&["get", "--from-key", "c"], ""),
        (&["get", "--from-key", "c", "--hex"], ""),
        (&["get", "--prefix", "d/", "--order", "DESCEND"], ""),
        (&["get", "--prefix", "", "--order", "DESCEND", "--sort-by", "MODIFY"], ""),
        (&["get", "--prefix", "", "--order", "ASCEND", "--sort-by", "VERSION"], ""),
        (&["get", "--prefix", "", "--order", "ASCEND", "--sort-by", "CREATE"], ""),
        (&["get", "--prefix", "", "--order", "DESCEND", "--sort-by", "VALUE", "--limit", "3"], ""),
        (&["get", "b", "--rev", "3"], ""),
        (&["get", "b", "--rev", "1000"], ""),
        (&["get", "b", "--consistency", "s"], ""),
        (&["get", "b", "--consistency", "x"], ""),
        (&["get", "binary", "-w", "simple"], ""),
        (&["del", "missing"], ""),
        (&["del", "b", "--prev-kv"], ""),
        (&["put", "b", "again"], ""),
        (&["del", "a", "c"], ""),
        (&["del", "--prefix", "d/", "--prev-kv"], ""),
        (&["del", "--from-key", "binary"], ""),
        (&["get", "--prefix", ""], ""),
    ];
    compare(&pair, commands);
}

#[tokio::test]
async fn transactions() {
    let pair = pair(Kind::Memory).await;
    let commands: &[(&[&str], &str)] = &[
        (&["put", "a", "1"], ""),
        (&["txn"], "mod(\"a\") > \"0\"\n\nput b \"x y\"\nget a\ndel c\n\nput c 1\n\n"),
        (&["txn"], "val(\"a\") = \"2\"\n\nput b 1\n\nput c 1\nget --prefix \"\"\n\n"),
        (&["txn"], "ver(\"a\") = \"1\"\ncreate(\"b\") != \"0\"\n\ndel --prefix \"\"\n\n\n"),
        (&["txn"], "ver(\"missing\") < \"1\"\n\nget missing\n\n\n"),
        (&["txn"], "\nput k 1\nput k 2\n\n\n"),
        (&["txn"], "\nput k 1\ndel k\n\n\n"),
        (&["txn"], "nonsense\n\n\n\n"),
        (&["txn", "-w", "simple"], "\nget --rev 1000 a\n\n\n"),
        (&["get", "--prefix", ""], ""),
    ];
    compare(&pair, commands);
}

#[tokio::test]
async fn history() {
    let pair = pair(Kind::Redb).await;
    let commands: &[(&[&str], &str)] = &[
        (&["put", "a", "1"], ""),
        (&["put", "a", "2"], ""),
        (&["put", "a", "3"], ""),
        (&["compaction", "3"], ""),
        (&["compaction", "3"], ""),
        (&["compaction", "100"], ""),
        (&["compaction", "--physical", "4"], ""),
        (&["compaction", "--physical", "4"], ""),
        (&["compaction", "x"], ""),
        (&["compaction"], ""),
        (&["get", "a", "--rev", "3"], ""),
        (&["get", "a", "--rev", "4"], ""),
        (&["watch", "a", "--rev", "2"], ""),
        (&["watch", "b", "a"], ""),
        (&["alarm", "list"], ""),
        (&["alarm", "disarm"], ""),
        (&["move-leader", "1"], ""),
        (&["move-leader", "x"], ""),
        (&["member", "remove", "1"], ""),
        (&["member", "update", "1", "--peer-urls", "http://127.0.0.1:1"], ""),
        (&["member", "promote", "1"], ""),
        (&["member", "add", "m2", "--peer-urls", "nonsense"], ""),
        (&["auth", "enable"], ""),
        (&["user", "get", "nobody"], ""),
        (&["role", "get", "nothing"], ""),
        (&["--user", "root:x", "get", "a"], ""),
        (&["lease", "revoke", "7b"], ""),
        (&["lease", "timetolive", "7b"], ""),
        (&["lease", "keep-alive", "--once", "7b"], ""),
        (&["lease", "list"], ""),
        (&["lease", "grant", "9000000001"], ""),
    ];
    compare(&pair, commands);
}

/// Ids of leases are made by the server: each member is told its own.
#[tokio::test]
async fn leases() {
    let pair = pair(Kind::Memory).await;
    let outputs = pair.each_ref().map(|member| {
        let mut outputs = Vec::new();
        let granted = run(member, &["lease", "grant", "1000"], "");
        let granted = String::from_utf8(granted.stdout).unwrap();
        let id = granted.split(' ').nth(1).unwrap().to_string();
        assert_eq!(id.len(), 16, "{granted}");
        assert_eq!(granted, format!("lease {id} granted with TTL(1000s)\n"));
        let commands: &[&[&str]] = &[
            &["put", "k1", "v", "--lease", &id],
            &["put", "k2", "v", "--lease", &id],
            &["put", "k2", "w", "--ignore-lease"],
            &["lease", "list"],
            &["lease", "timetolive", &id],
            &["lease", "timetolive", &id, "--keys"],
            &["lease", "keep-alive", "--once", &id],
            &["put", "k1", "detached"],
            &["lease", "timetolive", &id, "--keys"],
            &["lease", "revoke", &id],
            &["lease", "revoke", &id],
            &["lease", "timetolive", &id],
            &["get", "--prefix", "k"],
        ];
        for args in commands {
            let mut printed = printed(member, &run(member, args, ""));
            printed.out = printed.out.replace(&id, "ID");
            // Seconds may have passed; the attached keys come in any order.
            for left in 970..1000 {
                let left = format!("remaining({left}s)");
                printed.out = printed.out.replace(&left, "remaining(1000s)");
            }
            printed.out = printed.out.replace("[k2 k1]", "[k1 k2]");
            outputs.push(printed);
        }
        outputs
    });
    let [ours, theirs] = outputs;
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
}

/// A value without what differs between any two clusters and between releases.
fn plain(value: &mut Value) {
    /// Ids and term; addresses and what depends on them; sizes, log positions and versions, which
    /// tell how a server works inside; the hash, which etcdctl's tests below compare by itself.
    const OWN: [&str; 11] = [
        "cluster_id",
        "member_id",
        "raft_term",
        "ID",
        "leader",
        "raftTerm",
        "raftIndex",
        "raftAppliedIndex",
        "dbSize",
        "dbSizeInUse",
        "version",
    ];
    const ADDRESSES: [&str; 3] = ["Endpoint", "peerURLs", "clientURLs"];
    match value {
        Value::Object(map) => {
            for (name, value) in map.iter_mut() {
                // A key's own version is told, a server's is not.
                if name == "version" && value.is_number() {
                    continue;
                }
                if OWN.contains(&name.as_str()) {
                    *value = Value::from("own");
                } else if ADDRESSES.contains(&name.as_str()) {
                    *value = Value::from("address");
                } else {
                    plain(value);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(plain),
        _ => {}
    }
}

#[tokio::test]
async fn json() {
    let pair = pair(Kind::Redb).await;
    let commands: &[(&[&str], &str)] = &[
        (&["put", "a", "1"], ""),
        (&["put", "a", "2", "--prev-kv"], ""),
        (&["put", "b", "3"], ""),
        (&["get", "--prefix", ""], ""),
        (&["get", "--prefix", "", "--keys-only"], ""),
        (&["get", "--prefix", "", "--limit", "1"], ""),
        (&["txn"], "val(\"a\") = \"2\"\n\nput c 1\nget a\ndel b --prev-kv\n\n\n"),
        (&["del", "a", "--prev-kv"], ""),
        (&["lease", "timetolive", "7b", "--keys"], ""),
        (&["lease", "list"], ""),
        (&["member", "list"], ""),
        (&["endpoint", "hashkv"], ""),
        (&["endpoint", "status"], ""),
    ];
    for (args, input) in commands {
        let args: Vec<_> = args.iter().copied().chain(["-w", "json"]).collect();
        let [ours, theirs] = pair.each_ref().map(|member| {
            let output = run(member, &args, input);
            assert!(output.status.success(), "{args:?}: {output:?}");
            let mut value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
                panic!("{args:?}: {error}: {:?}", String::from_utf8_lossy(&output.stdout))
            });
            plain(&mut value);
            value
        });
        assert_eq!(ours, theirs, "etcdctl {args:?}");
    }
}

/// Lines of `fields` output without the values that differ between any two members.
fn plain_fields(text: &str) -> Vec<String> {
    const OWN: [&str; 14] = [
        "ClusterID",
        "MemberID",
        "RaftTerm",
        "Version",
        "DBSize",
        "DBSizeInUse",
        "Leader",
        "RaftIndex",
        "RaftAppliedIndex",
        "Took",
        "Endpoint",
        "ID",
        "PeerURL",
        "ClientURL",
    ];
    text.lines()
        .map(|line| match line.split_once(" : ") {
            // A key's version is a number that both count alike.
            Some((name, value)) if name == "\"Version\"" && !value.starts_with('"') => line.into(),
            Some((name, _)) if OWN.contains(&name.trim_matches('"')) => name.into(),
            _ => line.into(),
        })
        .collect()
}

#[tokio::test]
async fn fields_and_tables() {
    let pair = pair(Kind::Memory).await;
    let commands: &[(&[&str], &str)] = &[
        (&["put", "a", "1"], ""),
        (&["put", "a", "2", "--prev-kv"], ""),
        (&["get", "a"], ""),
        (&["txn"], "val(\"a\") = \"2\"\n\nput c 1\nget a\n\n\n"),
        (&["del", "a", "--prev-kv"], ""),
        (&["member", "list"], ""),
        (&["endpoint", "hashkv"], ""),
        (&["endpoint", "status"], ""),
        (&["endpoint", "health"], ""),
    ];
    for (args, input) in commands {
        let args: Vec<_> = args.iter().copied().chain(["-w", "fields"]).collect();
        let [ours, theirs] = pair.each_ref().map(|member| {
            let output = run(member, &args, input);
            assert!(output.status.success(), "{args:?}: {output:?}");
            plain_fields(&String::from_utf8(output.stdout).unwrap())
        });
        assert_eq!(ours, theirs, "etcdctl {args:?}");
    }
    // A reply without a header, which is what 3.4 gives, makes this etcdctl panic.
    let output = run(&pair[0], &["alarm", "list", "-w", "fields"], "");
    assert!(output.status.success(), "{output:?}");
    // Tables: the same columns, and a row of one member's own values.
    for args in [["member", "list"], ["endpoint", "status"], ["endpoint", "hashkv"]] {
        let [ours, theirs] = pair.each_ref().map(|member| {
            let output = run(member, &[args[0], args[1], "-w", "table"], "");
            assert!(output.status.success(), "{args:?}: {output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            let rows: Vec<Vec<String>> = text
                .lines()
                .filter(|line| line.starts_with('|'))
                .map(|line| line.split('|').map(|cell| cell.trim().to_string()).collect())
                .collect();
            assert_eq!(rows.len(), 2, "{text}");
            assert_eq!(rows[0].len(), rows[1].len(), "{text}");
            rows[0].clone()
        });
        assert_eq!(ours, theirs, "{args:?}");
    }
}

#[tokio::test]
async fn health_and_defragmentation() {
    let pair = pair(Kind::Redb).await;
    for member in &pair {
        let output = run(member, &["endpoint", "health"], "");
        let text = String::from_utf8(output.stderr).unwrap();
        let healthy = format!("{} is healthy: successfully committed proposal", member.endpoint());
        assert!(text.starts_with(&healthy), "{:?}: {text}", member.kind);
        assert!(output.status.success());
        let output = run(member, &["defrag"], "");
        let text = String::from_utf8(output.stdout).unwrap();
        let finished = format!("Finished defragmenting etcd member[{}]\n", member.endpoint());
        assert_eq!(text, finished, "{:?}", member.kind);
    }
    compare(&pair, &[(&["put", "a", "1"], ""), (&["get", "a"], "")]);
    // Leadership goes from the leader to the leader: nothing happens, and that is said.
    for member in &pair {
        let status = run(member, &["endpoint", "status", "-w", "json"], "");
        let status: Value = serde_json::from_slice(&status.stdout).unwrap();
        let id = format!("{:x}", status[0]["Status"]["leader"].as_u64().unwrap());
        let output = run(member, &["move-leader", &id], "");
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            text,
            format!("Leadership transferred from {id} to {id}\n"),
            "{:?}",
            member.kind
        );
    }
}

/// A watch in the background, ended once it has printed what is expected of it.
fn watch(member: &Member, args: &[&str], lines: usize) -> Vec<String> {
    watch_at(&member.endpoint(), member, args, lines)
}

fn watch_at(endpoint: &str, member: &Member, args: &[&str], lines: usize) -> Vec<String> {
    Running::start(etcdctl(member, endpoint, args)).lines(lines)
}

#[tokio::test]
async fn watches_from_the_past() {
    let pair = pair(Kind::Redb).await;
    let commands: &[(&[&str], &str)] = &[
        (&["put", "a/1", "1"], ""),
        (&["put", "a/2", "2"], ""),
        (&["put", "a/1", "3"], ""),
        (&["del", "a/2"], ""),
        (&["txn"], "\nput a/3 x\nput a/4 y\ndel a/1\n\n\n"),
    ];
    compare(&pair, commands);
    let watches: &[(&[&str], usize)] = &[
        (&["watch", "--prefix", "a/", "--rev", "1"], 21),
        (&["watch", "--prefix", "a/", "--rev", "2", "--prev-kv"], 27),
        (&["watch", "a/1", "--rev", "3"], 6),
        (&["watch", "a/1", "a/3", "--rev", "4"], 9),
    ];
    for (args, lines) in watches {
        let [ours, theirs] = pair.each_ref().map(|member| watch(member, args, *lines));
        assert_eq!(ours, theirs, "etcdctl {args:?}");
    }
}

/// What dials an endpoint by itself sends it as the authority just as it is written, which is none.
#[tokio::test]
async fn endpoints_as_urls() {
    let pair = pair(Kind::Redb).await;
    let commands: &[&[&str]] = &[
        &["put", "a", "1"],
        &["put", "a", "2", "--prev-kv"],
        &["get", "a"],
        &["endpoint", "hashkv"],
        &["endpoint", "status", "-w", "fields"],
        &["member", "list", "-w", "fields"],
        &["defrag"],
        &["snapshot", "save", "saved.db"],
    ];
    let url = |member: &Member| format!("http://{}", member.endpoint());
    for args in commands {
        let [ours, theirs] = pair.each_ref().map(|member| {
            let output = run_at(&url(member), member, args, "");
            assert!(output.status.success(), "{:?}: {args:?}: {output:?}", member.kind);
            let Printed { out, errors, .. } = printed(member, &output);
            (plain_fields(&out), errors)
        });
        assert_eq!(ours, theirs, "etcdctl {args:?}");
    }
    let [ours, theirs] = pair
        .each_ref()
        .map(|member| watch_at(&url(member), member, &["watch", "a", "--rev", "1"], 6));
    assert_eq!(ours, theirs);
}
