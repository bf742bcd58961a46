//! Directories that a member must not start on, or must mend first: each a clear message, and
//! nothing lost.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use engine_api::{Batch, Durability, Engine, Table};
use quorate::core::apply::STORAGE_VERSION;
use quorate::core::auth::ENABLED;

use crate::ports::free_address;
use crate::process::{Random, Setup, copy_dir, files, runtime, wait_for};

const SEGMENT: &str = "0000000000000000-0000000000000000.wal";

/// A directory of a member that was stopped in order, with keys `k0` to `k99`.
fn filled(args: &[&str]) -> Setup {
    let setup = Setup::new(args);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        for n in 0..100 {
            // No zeros: bytes that are missing must not look like bytes never written.
            client.put(&format!("k{n}"), vec![b'a' + (n % 26) as u8; 300]).await.unwrap();
        }
    });
    daemon.stop();
    setup
}

/// The member serves everything that [`filled`] has put.
fn serves_all(setup: &Setup) {
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        assert_eq!(client.count().await.unwrap(), 100);
        assert_eq!(client.get("k27").await.unwrap().unwrap().value, vec![b'b'; 300]);
        assert_eq!(client.revision().await.unwrap(), 101);
    });
    daemon.stop();
}

/// What a refused start must leave as it was, byte by byte: all but the lock, which says who came last,
/// the spare segment of the log, which holds nothing, and the engine's own file, which notes that it
/// was opened; that nothing in it is lost is for
/// [`serves_all`] to see.
fn kept(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut kept = files(data);
    kept.retain(|name, _| !["lock", "data.redb", "0.tmp"].iter().any(|end| name.ends_with(end)));
    kept
}

/// Refused with a message that holds all of `parts`, and no file has changed.
fn refuses(setup: &Setup, parts: &[&str]) -> String {
    let before = kept(&setup.data);
    let said = setup.refused();
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    let after = kept(&setup.data);
    for (name, bytes) in &before {
        assert!(after.get(name) == Some(bytes), "{} has changed: {said}", name.display());
    }
    let new: Vec<_> = after.keys().filter(|name| !before.contains_key(*name)).collect();
    assert!(new.is_empty(), "{new:?} is new: {said}");
    said
}

/// Where the records of a segment end.
fn used(segment: &[u8]) -> usize {
    let last = segment.iter().rposition(|byte| *byte != 0).expect("a segment is not empty");
    (last + 1).next_multiple_of(8)
}

#[test]
fn a_flipped_bit_is_found_and_told() {
    let setup = filled(&[]);
    let path = setup.wal_dir().join(SEGMENT);
    let sound = std::fs::read(&path).unwrap();
    let mut random = Random::new(7);
    let end = used(&sound);
    for _ in 0..3 {
        let mut bytes = sound.clone();
        let at = end / 4 + random.below(end as u64 / 2) as usize;
        bytes[at] ^= 1 << random.below(8);
        std::fs::write(&path, &bytes).unwrap();
        let said = refuses(&setup, &[&path.display().to_string(), "is corrupt at byte "]);
        let told = said.split("at byte ").nth(1).unwrap().split(':').next().unwrap();
        let told: usize = told.parse().unwrap();
        assert!(told <= at && at - told < 600, "bit flipped at {at}: {said}");
    }
    std::fs::write(&path, &sound).unwrap();
    serves_all(&setup);
}

#[test]
fn a_torn_tail_is_mended_and_a_copy_kept() {
    let setup = filled(&[]);
    let path = setup.wal_dir().join(SEGMENT);
    let sound = std::fs::read(&path).unwrap();
    let end = used(&sound);

    // A record whose beginning alone has reached the disk.
    let mut torn = sound.clone();
    torn[end..end + 8].copy_from_slice(&2000_u64.to_le_bytes());
    torn[end + 8..end + 700].fill(b'?');
    std::fs::write(&path, &torn).unwrap();
    let mut daemon = setup.start();
    let line = daemon.wait_logged("repaired a write-ahead log that a crash had cut short");
    assert_eq!(line["offset"], end, "{line}");
    assert_eq!(line["path"], path.display().to_string(), "{line}");
    daemon.stop();
    let copy = setup.wal_dir().join(format!("{SEGMENT}.broken"));
    assert!(std::fs::read(copy).unwrap() == torn);
    serves_all(&setup);

    // A file that ends inside of a record.
    let sound = std::fs::read(&path).unwrap();
    let end = used(&sound);
    let mut torn = sound[..end].to_vec();
    torn.extend_from_slice(&2000_u64.to_le_bytes());
    torn.extend_from_slice(&[b'?'; 100]);
    std::fs::write(&path, &torn).unwrap();
    let mut daemon = setup.start();
    daemon.wait_logged("repaired a write-ahead log that a crash had cut short");
    daemon.stop();
    serves_all(&setup);
}

#[test]
fn a_log_that_ends_before_what_the_engine_has_applied_is_refused() {
    let setup = filled(&[]);
    let path = setup.wal_dir().join(SEGMENT);
    let sound = std::fs::read(&path).unwrap();
    // An older copy of the log, as from a backup: half of it.
    let (mut at, half) = (0, used(&sound) / 2);
    while at < half {
        let frame = u64::from_le_bytes(sound[at..at + 8].try_into().unwrap());
        let padding = if frame >> 63 == 1 { (frame >> 56) as usize & 7 } else { 0 };
        at += 8 + (frame & 0x00ff_ffff_ffff_ffff) as usize + padding;
    }
    let mut older = sound.clone();
    older[at..].fill(0);
    std::fs::write(&path, &older).unwrap();
    refuses(&setup, &["applied", &setup.wal_dir().display().to_string()]);
    std::fs::write(&path, &sound).unwrap();
    serves_all(&setup);
}

#[test]
fn missing_segments_are_noticed() {
    let setup = filled(&[]);
    let first = setup.wal_dir().join(SEGMENT);
    let later = setup.wal_dir().join("0000000000000002-0000000000000100.wal");
    std::fs::rename(&first, &later).unwrap();
    refuses(&setup, &[&setup.wal_dir().display().to_string(), "index 0"]);
    std::fs::copy(&later, &first).unwrap();
    refuses(&setup, &[&setup.wal_dir().display().to_string()]);
    std::fs::remove_file(&later).unwrap();
    serves_all(&setup);
}

#[test]
fn an_engine_whose_log_is_gone_is_not_started() {
    let setup = filled(&[]);
    let aside = setup.temp.path().join("wal");
    std::fs::rename(setup.wal_dir(), &aside).unwrap();
    refuses(&setup, &["there is no write-ahead log in", &setup.wal_dir().display().to_string()]);
    assert!(!setup.wal_dir().exists());
    std::fs::rename(&aside, setup.wal_dir()).unwrap();
    serves_all(&setup);
}

#[test]
fn a_log_without_its_engine_is_replayed_if_it_is_whole_and_refused_if_not() {
    let setup = filled(&[]);
    std::fs::remove_dir_all(setup.engine_dir()).unwrap();
    serves_all(&setup);

    let setup = filled(&["--snapshot-count=20"]);
    let aside = setup.temp.path().join("engine");
    std::fs::rename(setup.engine_dir(), &aside).unwrap();
    refuses(&setup, &["backend is missing", &setup.engine_dir().display().to_string()]);
    // An engine from before the snapshot is no better.
    std::fs::create_dir(setup.engine_dir()).unwrap();
    let said = setup.refused();
    assert!(said.contains("does not match with snapshot"), "{said}");
    std::fs::remove_dir_all(setup.engine_dir()).unwrap();
    std::fs::rename(&aside, setup.engine_dir()).unwrap();
    serves_all(&setup);
}

#[test]
fn the_data_of_another_engine_is_refused_and_a_log_without_snapshot_serves_any() {
    let setup = filled(&[]);
    let other = Setup::on(setup.data.clone(), &["--engine=memory"]);
    refuses(&other, &["engine redb", "engine memory", &setup.data.display().to_string()]);
    serves_all(&setup);

    let mut setup = filled(&["--engine=memory"]);
    setup.args.clear();
    serves_all(&setup);
}

#[test]
fn a_directory_of_a_newer_release_is_refused() {
    let setup = filled(&[]);
    let whole = setup.temp.path().join("whole");
    copy_dir(&setup.data, &whole);
    let engine = engine_redb::Redb::open(
        &setup.engine_dir(),
        &engine_api::Options::defaults(&engine_redb::ABOUT),
    )
    .unwrap();
    let mut batch = Batch::default();
    batch.put(Table::Meta, STORAGE_VERSION.to_vec(), b"3.9.0".to_vec());
    engine.commit(&batch, Durability::Durable).unwrap();
    drop(engine);
    let said = setup.refused();
    for part in ["3.9.0", "newer", "3.7.1", &setup.data.display().to_string()] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    serves_all(&Setup::on(whole, &[]));
}

#[test]
fn a_database_that_authentication_protects_is_served_to_its_users_alone() {
    let setup = filled(&[]);
    let enabled = |enabled: u8| {
        let engine = engine_redb::Redb::open(
            &setup.engine_dir(),
            &engine_api::Options::defaults(&engine_redb::ABOUT),
        )
        .unwrap();
        let mut batch = Batch::default();
        batch.put(Table::Auth, ENABLED, vec![enabled]);
        engine.commit(&batch, Durability::Durable).unwrap();
    };
    enabled(1);
    let daemon = setup.start();
    let asked = etcdctl(&format!("http://{}", setup.client), &["get", "", "--prefix"]);
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(!asked.status.success() && said.contains("user name is empty"), "{said}");
    assert_eq!(asked.stdout, b"");
    daemon.stop();
    // Neither on nor off: nobody can tell who may read it.
    enabled(2);
    refuses(&setup, &["authEnabled", "neither 0 nor 1"]);
    enabled(0);
    serves_all(&setup);
}

/// Ends with the test.
struct Etcd(Child);

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn etcdctl(endpoint: &str, args: &[&str]) -> std::process::Output {
    Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .arg(format!("--endpoints={endpoint}"))
        .args(args)
        .output()
        .expect("this test needs etcdctl in PATH")
}

#[test]
fn the_directory_of_an_etcd_is_left_to_it() {
    let setup = Setup::new(&[]);
    let start_etcd = || {
        let (client, peer) = (free_address(), free_address());
        let child = Command::new("etcd")
            .env_clear()
            .arg(format!("--data-dir={}", setup.data.display()))
            .arg(format!("--listen-client-urls=http://{client}"))
            .arg(format!("--advertise-client-urls=http://{client}"))
            .arg(format!("--listen-peer-urls=http://{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
            .arg(format!("--initial-cluster=default=http://{peer}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this test needs etcd in PATH");
        (Etcd(child), format!("http://{client}"))
    };
    let put = |endpoint: &str, args: &[&str]| {
        wait_for("etcd", || {
            let output = etcdctl(endpoint, args);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() { Ok(text) } else { Err(format!("{output:?}")) }
        })
    };
    let (etcd, endpoint) = start_etcd();
    put(&endpoint, &["put", "of-etcd", "yes"]);
    // While it runs, the directory is in use.
    let said = setup.refused();
    assert!(said.contains("written by etcd") || said.contains("in use"), "{said}");
    drop(etcd);
    refuses(&setup, &["was written by etcd", &setup.data.display().to_string()]);
    let (_etcd, endpoint) = start_etcd();
    assert_eq!(put(&endpoint, &["get", "of-etcd", "--print-value-only"]), "yes\n");
}

#[test]
fn a_file_in_the_place_of_a_directory_is_told() {
    let setup = Setup::new(&[]);
    std::fs::write(&setup.data, "mine").unwrap();
    let said = setup.refused();
    assert!(said.contains("cannot access data directory"), "{said}");
    assert!(said.contains(&setup.data.display().to_string()), "{said}");
    assert_eq!(std::fs::read_to_string(&setup.data).unwrap(), "mine");

    let setup = Setup::new(&[]);
    std::fs::create_dir_all(setup.data.join("proxy")).unwrap();
    let said = setup.refused();
    assert!(said.contains("proxy") && said.contains(&setup.data.display().to_string()), "{said}");
    assert!(!setup.member_dir().exists());
}

#[test]
fn a_directory_that_may_not_be_written_is_told() {
    const NOBODY: u32 = 65534;
    let mut setup = filled(&[]);
    if std::fs::metadata(&setup.data).unwrap().uid() != 0 {
        println!("SKIPPED: only root can start a process as another user");
        return;
    }
    setup.user = Some(NOBODY);
    // The way there is open, the directory itself is root's.
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(setup.temp.path(), open).unwrap();
    refuses(&setup, &["ermission denied", &setup.data.display().to_string()]);
    // Also if only one file is another's.
    chown(&setup.data, Some(NOBODY), None).unwrap();
    chown(setup.member_dir(), Some(NOBODY), None).unwrap();
    refuses(&setup, &["ermission denied", &setup.member_dir().display().to_string()]);
    setup.user = None;
    serves_all(&setup);

    let mut setup = Setup::new(&[]);
    std::fs::set_permissions(setup.temp.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    setup.user = Some(NOBODY);
    let said = setup.refused();
    assert!(said.contains("cannot access data directory"), "{said}");
    assert!(said.contains(&setup.data.display().to_string()), "{said}");
    assert!(!setup.data.exists());
}
