//! Snapshots go where etcd's go: etcdctl saves, checks and restores them, and a real etcd serves what
//! is in them.

use std::path::Path;
use std::process::{Command, Output};

use quorate_proto::etcdserverpb as pb;
use serde_json::Value;

use crate::server::{Api, Kind, Member, get, kv, span};

fn etcdctl(args: &[&str]) -> Output {
    let mut command = Command::new("etcdctl");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCDCTL_") {
            command.env_remove(name);
        }
    }
    let output = command.env("ETCDCTL_API", "3").args(args).output().expect("etcdctl is installed");
    assert!(output.status.success(), "etcdctl {args:?}: {output:?}");
    output
}

fn save(member: &Member, file: &Path) {
    let file = file.to_str().unwrap();
    let saved = etcdctl(&["--endpoints", &member.endpoint(), "snapshot", "save", file]);
    let text = String::from_utf8(saved.stdout).unwrap();
    assert_eq!(text, format!("Snapshot saved at {file}\n"));
}

fn status(file: &Path) -> Value {
    let file = file.to_str().unwrap();
    let output = etcdctl(&["snapshot", "status", file, "-w", "json"]);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A member of `kind` over what is in `file`.
async fn restore(file: &Path, kind: Kind) -> Member {
    let dir = tempfile::TempDir::new().unwrap();
    let data_dir = dir.path().join("data");
    etcdctl(&[
        "snapshot",
        "restore",
        file.to_str().unwrap(),
        "--data-dir",
        data_dir.to_str().unwrap(),
    ]);
    // The cluster in the restored log is known by its default address; a member that runs alone
    // needs nobody else to know it.
    Member::over(kind, dir, data_dir, &[]).await
}

/// What a store holds, as clients see it.
#[derive(PartialEq, Debug)]
struct Contents {
    revision: i64,
    kvs: Vec<quorate_proto::KeyValueBytes>,
    hash: u32,
    compact_revision: i64,
    leases: Vec<(i64, i64, Vec<bytes::Bytes>)>,
}

async fn contents(api: &mut Api) -> Contents {
    let reply = api.range(span("\0", "\0")).await.unwrap();
    let hash = api.hash_kv(0).await.unwrap();
    let listed = api.lease.lease_leases(pb::LeaseLeasesRequest {}).await.unwrap().into_inner();
    let mut leases = Vec::new();
    for lease in listed.leases {
        let request = pb::LeaseTimeToLiveRequest { id: lease.id, keys: true };
        let mut reply = api.lease.lease_time_to_live(request).await.unwrap().into_inner();
        reply.keys.sort();
        leases.push((reply.id, reply.granted_ttl, reply.keys));
    }
    leases.sort();
    Contents {
        revision: reply.header.unwrap().revision,
        kvs: reply.kvs,
        hash: hash.hash,
        compact_revision: hash.compact_revision,
        leases,
    }
}

async fn fill(api: &mut Api) {
    api.grant(1000, 5).await.unwrap();
    api.grant(2000, -6).await.unwrap();
    for i in 0..30 {
        api.put(&format!("k{i:02}"), &i.to_string()).await;
    }
    for i in 0..5 {
        api.put_leased(&format!("l{i}"), "leased", if i < 3 { 5 } else { -6 }).await;
    }
    api.delete("k07").await;
    api.compact(20).await.unwrap();
    api.delete("k08").await;
    api.put("k09", "again").await;
}

#[tokio::test]
async fn etcd_serves_what_a_snapshot_holds() {
    for kind in [Kind::Redb, Kind::Memory] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        fill(&mut api).await;
        let before = contents(&mut api).await;
        let file = member.scratch().join("snapshot.db");
        save(&member, &file);
        let told = status(&file);
        assert_eq!(told["revision"], before.revision, "{kind:?}: {told}");
        // Entries, not keys: the later revisions of a key and its tombstone count too, and so do the
        // few entries that describe the member.
        let entries = told["totalKey"].as_u64().unwrap();
        assert!((before.kvs.len() as u64..60).contains(&entries), "{kind:?}: {told}");
        let size = std::fs::metadata(&file).unwrap().len();
        assert_eq!(size % 512, 32, "{kind:?}");
        assert_eq!(told["totalSize"].as_u64().unwrap(), size - 32, "{kind:?}");

        let restored = restore(&file, Kind::Etcd).await;
        let mut api = restored.api();
        assert_eq!(contents(&mut api).await, before, "{kind:?}");
        // The history and the future go on.
        let old = pb::RangeRequest { revision: before.revision - 1, ..get("k09") };
        assert_eq!(kv(&api.range(old).await.unwrap().kvs[0]).value, "9", "{kind:?}");
        assert_eq!(api.put("k00", "new").await, before.revision + 1, "{kind:?}");
        api.lease.lease_revoke(pb::LeaseRevokeRequest { id: 5 }).await.unwrap();
        assert_eq!(api.range(span("l0", "l9")).await.unwrap().count, 2, "{kind:?}");
    }
}

/// More than fits into one chunk, one page or one level of pages; values larger than a page.
#[tokio::test]
async fn large() {
    let member = Member::start(Kind::Redb).await;
    let mut api = member.api();
    for i in 0..60 {
        let value: String = format!("{i:04}").repeat(25_000 + i * 100);
        api.put(&format!("large{i:02}"), &value).await;
    }
    let mut small = Vec::new();
    for i in 0..2_000 {
        small.push(crate::server::op::put(&format!("small{i:04}"), &"v".repeat(i % 300)));
        if small.len() == 125 {
            api.txn(vec![], std::mem::take(&mut small), vec![]).await.unwrap();
        }
    }
    let before = contents(&mut api).await;
    assert_eq!(before.kvs.len(), 2_060);
    let file = member.scratch().join("snapshot.db");
    save(&member, &file);
    assert!(std::fs::metadata(&file).unwrap().len() > 6_000_000);
    // The entries of all buckets: the keys, and the few that describe the member.
    let entries = status(&file)["totalKey"].as_u64().unwrap();
    assert!((2_060..2_070).contains(&entries), "{entries}");
    let restored = restore(&file, Kind::Etcd).await;
    let after = contents(&mut restored.api()).await;
    // Not the values in a message of their own: there are megabytes of them.
    assert!(after == before, "the restored contents differ");
}

/// The other way around: the contents of a snapshot hash alike, whoever wrote it.
#[tokio::test]
async fn equal_contents_have_equal_snapshots() {
    let mut told = Vec::new();
    for kind in [Kind::Redb, Kind::Memory, Kind::Etcd] {
        let member = Member::start(kind).await;
        fill(&mut member.api()).await;
        let file = member.scratch().join("snapshot.db");
        save(&member, &file);
        let status = status(&file);
        told.push((kind, status["revision"].clone(), status["totalKey"].clone()));
    }
    assert_eq!((&told[0].1, &told[0].2), (&told[1].1, &told[1].2), "{told:?}");
    assert_eq!((&told[0].1, &told[0].2), (&told[2].1, &told[2].2), "{told:?}");
}

/// What `etcdctl` prints of users and roles.
fn users(member: &Member) -> Vec<String> {
    let commands: [&[&str]; 7] = [
        &["user", "list"],
        &["user", "get", "root"],
        &["user", "get", "u1"],
        &["user", "get", "u2"],
        &["role", "list"],
        &["role", "get", "r1"],
        &["role", "get", "r2"],
    ];
    let endpoint = member.endpoint();
    let told = commands.map(|args| {
        let output = etcdctl(&[&["--endpoints", &endpoint][..], args].concat());
        String::from_utf8(output.stdout).unwrap()
    });
    told.to_vec()
}

#[tokio::test]
async fn users_and_roles_outlive_a_restart_and_go_with_a_snapshot() {
    let mut member = Member::start(Kind::Redb).await;
    let endpoint = member.endpoint();
    let commands: [&[&str]; 12] = [
        &["user", "add", "root:secret"],
        &["user", "add", "u1:pw"],
        &["user", "add", "u2", "--no-password"],
        &["role", "add", "r1"],
        &["role", "add", "r2"],
        &["role", "grant-permission", "r1", "readwrite", "k", "--prefix"],
        &["role", "grant-permission", "r1", "read", "a"],
        &["user", "grant-role", "root", "root"],
        &["user", "grant-role", "u1", "r2"],
        &["user", "grant-role", "u1", "r1"],
        &["put", "k1", "v"],
        &["put", "x", "v"],
    ];
    for args in commands {
        etcdctl(&[&["--endpoints", &endpoint][..], args].concat());
    }
    let before = users(&member);
    assert_eq!(before[0], "root\nu1\nu2\n");
    let hash = member.api().hash_kv(0).await.unwrap().hash;
    member.restart().await;
    assert_eq!(users(&member), before);
    member.crash().await;
    assert_eq!(users(&member), before);
    let status = member.api().auth.auth_status(pb::AuthStatusRequest {}).await;
    let status = status.unwrap().into_inner();
    assert_eq!((status.enabled, status.auth_revision), (false, 11));
    assert_eq!(member.api().hash_kv(0).await.unwrap().hash, hash);

    let file = member.scratch().join("snapshot.db");
    save(&member, &file);
    let restored = restore(&file, Kind::Etcd).await;
    assert_eq!(users(&restored), before);
    assert_eq!(restored.api().hash_kv(0).await.unwrap().hash, hash);
    // There the users can do what they were prepared for.
    let endpoint = restored.endpoint();
    etcdctl(&["--endpoints", &endpoint, "auth", "enable"]);
    let got = etcdctl(&["--endpoints", &endpoint, "--user", "u1:pw", "get", "k1"]);
    assert_eq!(got.stdout, b"k1\nv\n");
    etcdctl(&["--endpoints", &endpoint, "--user", "root:secret", "get", "x"]);
    let mut denied = Command::new("etcdctl");
    denied.env("ETCDCTL_API", "3");
    denied.args(["--endpoints", &endpoint, "--user", "u1:pw", "get", "x"]);
    let denied = denied.output().unwrap();
    let told = String::from_utf8_lossy(&denied.stderr).into_owned();
    assert!(told.contains("etcdserver: permission denied"), "{told}");
}
