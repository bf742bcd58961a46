//! etcd's files, checked against a real etcd: ours are read by it, its are read by us.

mod ports;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;
use quorate::actors::disk::{Disk, DiskFile, Open, OsDisk, SharedDisk};
use quorate::core::bbolt::{
    BucketSource, DigestWriter, PAGE_BYTES, Pairs, Reader, verify_digest, write_compact,
};
use quorate::core::snap::{V2Member, V2Membership, decode};
use quorate::core::wal::RecordKind;
use quorate::storage::lock::{DataDirLock, LockError};
use quorate::storage::snap_dir::SnapDir;
use quorate::storage::wal_log::{self, WalError, WalLog};
use quorate_proto::etcdserverpb::{InternalRaftRequest, LeaseGrantRequest, PutRequest};
use quorate_proto::mvccpb::KeyValue;
use quorate_proto::{leasepb, raftpb, walpb};
use tempfile::TempDir;

type Content = BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>>;

/// A running etcd that ends with this value.
struct Etcd {
    process: Child,
    client: String,
    peer: String,
}

impl Etcd {
    fn start(data_dir: &Path, extra: &[&str]) -> Self {
        let client = format!("http://{}", ports::free_address());
        let peer = format!("http://{}", ports::free_address());
        let mut process = Command::new("etcd")
            .args(["--name", "m", "--data-dir"])
            .arg(data_dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}"), "--logger", "zap"])
            .args(["--log-outputs", "stderr", "--enable-v2=false"])
            .args(extra)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcd is installed");
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            if log.read_line(&mut line).unwrap() == 0 {
                process.wait().unwrap();
                panic!("etcd has ended:\n{seen}");
            }
            seen.push_str(&line);
            if line.contains("serving client traffic insecurely") {
                break;
            }
        }
        // Its log must go somewhere, or it stops.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Etcd { process, client, peer }
    }

    fn ctl(&self, arguments: &[&str]) -> String {
        etcdctl(&[&["--endpoints", &self.client], arguments].concat())
    }

    /// An orderly end, with everything committed to the backend.
    fn stop(mut self) {
        kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM).unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Both fail if it has ended already.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn etcdctl(arguments: &[&str]) -> String {
    let output = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(arguments)
        .output()
        .expect("etcdctl is installed");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "etcdctl {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

fn disk() -> SharedDisk {
    Arc::new(OsDisk)
}

fn wal_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("member/wal")
}

fn db_file(data_dir: &Path) -> PathBuf {
    data_dir.join("member/snap/db")
}

fn newest(valid: &[walpb::Snapshot]) -> walpb::Snapshot {
    valid.last().cloned().unwrap_or_default()
}

fn read_db(path: &Path) -> Content {
    let file: Box<dyn DiskFile> = OsDisk.open(path, Open::Read).unwrap();
    let reader = Reader::open(file).unwrap();
    let mut content = Content::new();
    for name in reader.buckets().unwrap() {
        let bucket = reader.bucket(&name).unwrap().unwrap();
        let mut pairs = BTreeMap::new();
        bucket
            .scan(Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
                pairs.insert(key.to_vec(), value.to_vec());
                ControlFlow::Continue(())
            })
            .unwrap();
        content.insert(name, pairs);
    }
    content
}

fn write_db(content: &Content, out: &mut dyn Write) -> u64 {
    let buckets: Vec<(&[u8], Vec<(&[u8], &[u8])>)> = content
        .iter()
        .map(|(name, pairs)| {
            (&name[..], pairs.iter().map(|(key, value)| (&key[..], &value[..])).collect())
        })
        .collect();
    let buckets: Vec<Pairs<'_, &[u8], &[u8]>> =
        buckets.iter().map(|(name, pairs)| Pairs { name, pairs }).collect();
    let buckets: Vec<&dyn BucketSource> =
        buckets.iter().map(|bucket| bucket as &dyn BucketSource).collect();
    write_compact(out, &buckets, PAGE_BYTES).unwrap()
}

/// Live keys of the `key` bucket: the newest revision of each, unless it is a tombstone.
fn live(content: &Content) -> BTreeMap<String, KeyValue> {
    let mut live = BTreeMap::new();
    for (revision, value) in &content[&b"key"[..]] {
        let kv = KeyValue::decode(&value[..]).unwrap();
        let key = String::from_utf8(kv.key.to_vec()).unwrap();
        if revision.len() == 18 {
            live.remove(&key);
        } else {
            assert_eq!(revision[..8], (kv.mod_revision as u64).to_be_bytes());
            live.insert(key, kv);
        }
    }
    live
}

/// An etcd directory with 101 puts: 80 keys of which 20 were put twice, one more under a lease, and
/// at the end a deletion of ten. Answers the lease as well.
fn etcd_directory() -> (TempDir, PathBuf, String) {
    let temp = tempfile::tempdir().unwrap();
    let data_dir = temp.path().join("data");
    let etcd = Etcd::start(&data_dir, &[]);
    for n in 0..100 {
        etcd.ctl(&["put", &format!("key{:03}", n % 80), &"x".repeat(1 + n * 11)]);
    }
    let lease = etcd.ctl(&["lease", "grant", "500"]);
    let lease = lease.split_whitespace().nth(1).unwrap().to_owned();
    etcd.ctl(&["put", "leased", "value", "--lease", &lease]);
    etcd.ctl(&["del", "key000", "key010"]);
    etcd.stop();
    (temp, data_dir, lease)
}

#[test]
fn the_files_of_etcd_are_read() {
    let (_temp, data_dir, lease) = etcd_directory();
    let lease = i64::from_str_radix(&lease, 16).unwrap();

    let db = read_db(&db_file(&data_dir));
    let live = live(&db);
    assert_eq!(live.len(), 71);
    assert_eq!(live["leased"].lease, lease);
    assert_eq!(live["key015"].value.len(), 1 + 95 * 11);
    assert_eq!(live["key015"].version, 2);
    let stored = leasepb::Lease::decode(&db[&b"lease"[..]][&lease.to_be_bytes()[..]][..]).unwrap();
    assert_eq!((stored.id, stored.ttl), (lease, 500));

    let recovered = wal_log::read(&OsDisk, &wal_dir(&data_dir), newest).unwrap();
    assert_eq!((recovered.torn.clone(), recovered.start.index()), (None, 0));
    let (mut puts, mut leases, mut others) = (0, 0, 0);
    for entry in &recovered.entries {
        if entry.r#type != raftpb::EntryType::EntryNormal as i32 {
            let change = raftpb::ConfChange::decode(entry.data.clone()).unwrap();
            assert_eq!(Some(change.node_id), recovered.metadata.node_id);
        } else if !entry.data.is_empty() {
            match InternalRaftRequest::decode(entry.data.clone()) {
                Ok(request) => {
                    puts += usize::from(request.put.is_some() || request.txn.is_some());
                    leases += usize::from(request.lease_grant.is_some());
                }
                // A v2 request: member attributes, cluster version.
                Err(_) => others += 1,
            }
        }
    }
    assert_eq!((puts, leases, others), (101, 1, 2));
    let cindex =
        u64::from_be_bytes(db[&b"meta"[..]][&b"consistent_index"[..]][..].try_into().unwrap());
    assert_eq!(cindex, recovered.last_index);
    assert!(recovered.hard_state.commit + 1 >= recovered.last_index);

    // Record by record as well.
    let mut kinds = Vec::new();
    wal_log::dump(&OsDisk, &wal_dir(&data_dir), |record| kinds.push(record.kind)).unwrap();
    use RecordKind::{Crc, Metadata, Snapshot};
    assert_eq!(kinds[..3], [Crc, Metadata, Snapshot]);
}

#[test]
fn a_log_of_etcd_is_continued_and_etcd_takes_it_back() {
    let (_temp, data_dir, _) = etcd_directory();
    let wal = wal_dir(&data_dir);
    let (mut log, recovered) = WalLog::open(disk(), &wal, newest).unwrap();
    let index = recovered.last_index + 1;
    let request = InternalRaftRequest {
        id: 0x77,
        put: Some(PutRequest { key: "ours".into(), value: "yes".into(), ..Default::default() }),
        ..Default::default()
    };
    let term = recovered.hard_state.term;
    let entry = raftpb::Entry { r#type: 0, term, index, data: request.encode_to_vec().into() };
    let state = raftpb::HardState { commit: index, ..recovered.hard_state };
    log.append(std::slice::from_ref(&entry), Some(&state)).unwrap();
    log.sync().unwrap();
    log.close().unwrap();

    let etcd = Etcd::start(&data_dir, &[]);
    assert_eq!(etcd.ctl(&["get", "ours", "--print-value-only"]), "yes\n");
    // While it runs, its locks keep us out, and reading is possible.
    assert!(matches!(WalLog::open(disk(), &wal, newest).unwrap_err(), WalError::Locked { .. }));
    let error = DataDirLock::take(&OsDisk, &data_dir, &wal).unwrap_err();
    assert!(matches!(error, LockError::Held { file, .. } if file.starts_with(&wal)));
    let read = wal_log::read(&OsDisk, &wal, newest).unwrap();
    assert!(read.entries.contains(&entry));
    etcd.stop();
    DataDirLock::take(&OsDisk, &data_dir, &wal).unwrap();
    WalLog::open(disk(), &wal, newest).unwrap();
}

#[test]
fn etcd_restores_and_serves_a_snapshot_that_we_wrote() {
    let (temp, data_dir, _) = etcd_directory();
    let original = db_file(&data_dir);
    let content = read_db(&original);
    let path = temp.path().join("snapshot.db");
    let mut out = DigestWriter::new(File::create(&path).unwrap());
    let bytes = write_db(&content, &mut out);
    out.finish().unwrap();
    let file = fs::read(&path).unwrap();
    assert_eq!(verify_digest(&&file[..]).unwrap(), bytes);
    assert_eq!(read_db(&path), content);

    let status =
        |path: &Path| json(&etcdctl(&["snapshot", "status", path.to_str().unwrap(), "-w", "json"]));
    let (ours, theirs) = (status(&path), status(&original));
    for field in ["hash", "revision", "totalKey"] {
        assert_eq!(ours[field], theirs[field], "{field}");
    }
    assert_eq!(ours["totalSize"].as_u64(), Some(bytes));
    assert!(ours["revision"].as_i64().unwrap() > 100);

    let restored = temp.path().join("restored");
    etcdctl(&[
        "snapshot",
        "restore",
        path.to_str().unwrap(),
        "--data-dir",
        restored.to_str().unwrap(),
        "--name",
        "m",
        "--initial-cluster",
        "m=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls",
        "http://127.0.0.1:2380",
    ]);
    // What restore makes is within what we read.
    let recovered = wal_log::read(&OsDisk, &wal_dir(&restored), newest).unwrap();
    assert_eq!((recovered.start.index(), recovered.start.term()), (1, 1));
    let snaps = SnapDir::open(disk(), &restored.join("member/snap")).unwrap();
    let snapshot = snaps.load_newest(&recovered.snapshots).unwrap().snapshot.unwrap();
    let membership = V2Membership::from_v2_store(&snapshot.data).unwrap();
    assert_eq!(membership.members.len(), 1);
    assert_eq!(Some(membership.members[0].id), recovered.metadata.node_id);
    assert_eq!(membership.members[0].peer_urls, ["http://127.0.0.1:2380"]);

    let etcd = Etcd::start(&restored, &["--force-new-cluster"]);
    let keys = json(&etcd.ctl(&["get", "", "--from-key", "-w", "json"]));
    assert_eq!(keys["count"].as_u64(), Some(71));
    // Its own upkeep works on our pages.
    let revision = keys["header"]["revision"].to_string();
    etcd.ctl(&["put", "new", &"y".repeat(100_000)]);
    etcd.ctl(&["del", "key", "--prefix"]);
    etcd.ctl(&["compact", &revision, "--physical"]);
    etcd.ctl(&["defrag"]);
    assert_eq!(json(&etcd.ctl(&["get", "", "--from-key", "-w", "json"]))["count"], 2);
    etcd.stop();
    let content = read_db(&db_file(&restored));
    assert_eq!(live(&content).keys().collect::<Vec<_>>(), ["leased", "new"]);
}

#[test]
fn etcd_starts_from_a_directory_that_we_wrote() {
    const MEMBER: u64 = 0xfedc_ba98_7654_3210;
    const CLUSTER: u64 = 0x1122_3344_5566_7788;
    const SNAPSHOT: u64 = 10;
    let temp = tempfile::tempdir().unwrap();
    let data_dir = temp.path().join("data");
    let snap_dir = data_dir.join("member/snap");
    let snaps = SnapDir::open(disk(), &snap_dir).unwrap();
    let metadata = walpb::Metadata { node_id: Some(MEMBER), cluster_id: Some(CLUSTER) };
    let mut log = WalLog::create(disk(), &wal_dir(&data_dir), &metadata).unwrap();

    let change = raftpb::ConfChange {
        id: 0,
        r#type: raftpb::ConfChangeType::AddNode as i32,
        node_id: MEMBER,
        context: format!(r#"{{"id":{MEMBER},"peerURLs":["http://127.0.0.1:2380"],"name":"m"}}"#)
            .into(),
    };
    let entry = |kind, index, data: Vec<u8>| raftpb::Entry {
        r#type: kind,
        term: 1,
        index,
        data: data.into(),
    };
    let mut entries = vec![entry(1, 1, change.encode_to_vec())];
    entries.extend((2..=SNAPSHOT).map(|index| entry(0, index, Vec::new())));
    let state = |commit| raftpb::HardState { term: 1, vote: MEMBER, commit };
    log.append(&entries, Some(&state(SNAPSHOT))).unwrap();
    log.sync().unwrap();

    let conf_state = raftpb::ConfState { voters: vec![MEMBER], ..Default::default() };
    let membership = V2Membership {
        members: vec![V2Member {
            id: MEMBER,
            peer_urls: vec!["http://127.0.0.1:2380".into()],
            name: "m".into(),
            ..Default::default()
        }],
        removed: vec![0xdead],
        cluster_version: Some("3.4.0".into()),
    };
    let snapshot = raftpb::Snapshot {
        data: membership.to_v2_store().into(),
        metadata: Some(raftpb::SnapshotMetadata {
            conf_state: Some(conf_state.clone()),
            index: SNAPSHOT,
            term: 1,
        }),
    };
    snaps.save(&snapshot).unwrap();
    log.save_snapshot(&walpb::Snapshot {
        index: Some(SNAPSHOT),
        term: Some(1),
        conf_state: Some(conf_state),
    })
    .unwrap();

    // The backend as of the snapshot: one key at revision 2.
    let kv = KeyValue {
        key: "from-backend".into(),
        create_revision: 2,
        mod_revision: 2,
        version: 1,
        value: "b".into(),
        lease: 0,
    };
    let mut content: Content = [
        "alarm",
        "auth",
        "authRoles",
        "authUsers",
        "cluster",
        "key",
        "lease",
        "members",
        "members_removed",
        "meta",
    ]
    .into_iter()
    .map(|name| (name.as_bytes().to_vec(), BTreeMap::new()))
    .collect();
    let revision = [&2u64.to_be_bytes()[..], b"_", &0u64.to_be_bytes()].concat();
    content.get_mut(&b"key"[..]).unwrap().insert(revision, kv.encode_to_vec());
    content
        .get_mut(&b"meta"[..])
        .unwrap()
        .insert(b"consistent_index".to_vec(), SNAPSHOT.to_be_bytes().to_vec());
    write_db(&content, &mut File::create(db_file(&data_dir)).unwrap());

    // What follows the snapshot is in the log alone.
    let requests = [
        InternalRaftRequest {
            id: 1,
            lease_grant: Some(LeaseGrantRequest { id: 99, ttl: 1000 }),
            ..Default::default()
        },
        InternalRaftRequest {
            id: 2,
            put: Some(PutRequest {
                key: "from-log".into(),
                value: "l".into(),
                lease: 99,
                ..Default::default()
            }),
            ..Default::default()
        },
    ];
    for (n, request) in requests.iter().enumerate() {
        let index = SNAPSHOT + 1 + n as u64;
        log.append(&[entry(0, index, request.encode_to_vec())], Some(&state(index))).unwrap();
    }
    log.sync().unwrap();
    log.close().unwrap();

    let etcd = Etcd::start(&data_dir, &["--snapshot-count", "5"]);
    assert_eq!(etcd.ctl(&["get", "from-backend", "--print-value-only"]), "b\n");
    assert_eq!(etcd.ctl(&["get", "from-log", "--print-value-only"]), "l\n");
    let members = json(&etcd.ctl(&["member", "list", "-w", "json"]));
    assert_eq!(members["header"]["cluster_id"].as_u64(), Some(CLUSTER));
    assert_eq!(members["members"][0]["ID"].as_u64(), Some(MEMBER));
    assert_ne!(members["members"][0]["peerURLs"][0], etcd.peer.as_str());
    let leases = json(&etcd.ctl(&["lease", "list", "-w", "json"]));
    assert_eq!(leases["leases"][0]["id"], 99);
    // Enough for a snapshot of its own.
    for n in 0..12 {
        etcd.ctl(&["put", "k", &n.to_string()]);
    }
    etcd.stop();

    let recovered = wal_log::read(&OsDisk, &wal_dir(&data_dir), newest).unwrap();
    assert!(recovered.start.index() > SNAPSHOT);
    assert_eq!(recovered.metadata, metadata);
    let snapshot = snaps.load_newest(&recovered.snapshots).unwrap().snapshot.unwrap();
    assert_eq!(snapshot.metadata.as_ref().unwrap().index, recovered.start.index());
    let read = V2Membership::from_v2_store(&snapshot.data).unwrap();
    assert_eq!(read.removed, [0xdead]);
    assert_eq!(read.members[0].peer_urls, membership.members[0].peer_urls);
    assert_eq!(read.cluster_version.as_deref(), Some("3.4.0"));
    assert_eq!(live(&read_db(&db_file(&data_dir)))["k"].value, "11");
}

#[test]
fn etcd_reads_our_repaired_log_and_refuses_what_we_refuse() {
    let (temp, data_dir, _) = etcd_directory();
    let wal = wal_dir(&data_dir);
    let segment = wal.join("0000000000000000-0000000000000000.wal");
    let mut records = Vec::new();
    wal_log::dump(&OsDisk, &wal, |record| records.push((record.at, record.kind))).unwrap();
    let (last_entry, _) =
        *records.iter().rev().find(|(_, kind)| *kind == RecordKind::Entry).unwrap();

    // Cut within the last entry, as a crash does: repaired by us, then taken by etcd.
    let cut = temp.path().join("cut");
    copy_dir(&data_dir, &cut);
    let cut_segment = wal_dir(&cut).join(segment.file_name().unwrap());
    File::options().write(true).open(&cut_segment).unwrap().set_len(last_entry + 13).unwrap();
    // The backend has applied that entry already; etcd would refuse it as ahead of the log.
    fs::remove_file(db_file(&cut)).unwrap();
    let (log, recovered) = WalLog::open(disk(), &wal_dir(&cut), newest).unwrap();
    let torn = recovered.torn.unwrap();
    assert_eq!(torn.at, last_entry);
    assert_eq!(fs::metadata(torn.copy.unwrap()).unwrap().len(), last_entry + 13);
    log.close().unwrap();
    let etcd = Etcd::start(&cut, &[]);
    // Only the deletion is missing.
    let keys = json(&etcd.ctl(&["get", "", "--from-key", "-w", "json"]));
    assert_eq!(keys["count"].as_u64(), Some(81));
    etcd.stop();

    // One bit in the middle: neither takes it.
    let flipped = temp.path().join("flipped");
    copy_dir(&data_dir, &flipped);
    let flipped_segment = wal_dir(&flipped).join(segment.file_name().unwrap());
    let mut bytes = fs::read(&flipped_segment).unwrap();
    let (middle, _) = records[records.len() / 2];
    bytes[middle as usize + 20] ^= 1;
    fs::write(&flipped_segment, bytes).unwrap();
    let error = WalLog::open(disk(), &wal_dir(&flipped), newest).unwrap_err();
    assert_eq!(
        error.to_string().split(" is corrupt at byte ").next(),
        Some(flipped_segment.to_str().unwrap())
    );
    assert!(matches!(error, WalError::Corrupt { at, .. } if at == middle));
    let refused = Command::new("etcd")
        .args(["--name", "m", "--data-dir"])
        .arg(&flipped)
        .args(["--listen-client-urls", "http://127.0.0.1:0"])
        .args(["--advertise-client-urls", "http://127.0.0.1:0"])
        .args(["--listen-peer-urls", "http://127.0.0.1:0"])
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("crc mismatch"));
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_snap_file_of_etcd_is_decoded() {
    let temp = tempfile::tempdir().unwrap();
    let data_dir = temp.path().join("data");
    let etcd = Etcd::start(&data_dir, &["--snapshot-count", "5"]);
    for n in 0..8 {
        etcd.ctl(&["put", "k", &n.to_string()]);
    }
    let member = json(&etcd.ctl(&["member", "list", "-w", "json"]));
    let peer = etcd.peer.clone();
    let client = etcd.client.clone();
    etcd.stop();
    let dir = data_dir.join("member/snap");
    let names = OsDisk.list(&dir).unwrap();
    let name = names.iter().find(|name| name.ends_with(".snap")).expect("etcd made a snapshot");
    let snapshot = decode(fs::read(dir.join(name)).unwrap().into()).unwrap();
    let membership = V2Membership::from_v2_store(&snapshot.data).unwrap();
    assert_eq!(
        membership,
        V2Membership {
            members: vec![V2Member {
                id: member["members"][0]["ID"].as_u64().unwrap(),
                peer_urls: vec![peer],
                is_learner: false,
                name: "m".into(),
                client_urls: vec![client],
            }],
            removed: vec![],
            cluster_version: Some("3.4.0".into()),
        }
    );
    let voters = snapshot.metadata.unwrap().conf_state.unwrap().voters;
    assert_eq!(voters, [membership.members[0].id]);
}
