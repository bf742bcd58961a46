//! Directories of a real etcd.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use quorate::engines::{BuiltIn, DEFAULT, etcds};
use serde_json::Value;

use crate::ports::free_address;
use crate::process::{Setup, copy_dir, files, runtime, wait_for};
use crate::{persistent, quorate, text, written};

/// A running etcd; killed when it is dropped.
struct Etcd {
    child: Child,
    client: SocketAddr,
}

/// An etcd that is the only member of its cluster.
fn etcd(data: &Path, (client, peer): (SocketAddr, SocketAddr)) -> Command {
    let mut command = Command::new("etcd");
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .arg("--name=m")
        .arg(format!("--data-dir={}", data.display()))
        .arg(format!("--listen-client-urls=http://{client}"))
        .arg(format!("--advertise-client-urls=http://{client}"))
        .arg(format!("--listen-peer-urls=http://{peer}"))
        .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
        .arg(format!("--initial-cluster=m=http://{peer}"))
        .args(["--logger=zap", "--snapshot-count=100"])
        .stdout(Stdio::null());
    command
}

impl Etcd {
    fn start(data: &Path) -> Etcd {
        let (client, peer) = (free_address(), free_address());
        let mut command = etcd(data, (client, peer));
        let child = command.stderr(Stdio::null()).spawn().expect("these tests need etcd in PATH");
        let etcd = Etcd { child, client };
        wait_for("etcd", || match etcd.ctl(&["endpoint", "health"]) {
            (true, _) => Ok(()),
            (false, said) => Err(said),
        });
        etcd
    }

    fn ctl(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.client))
            .args(args)
            .output()
            .expect("these tests need etcdctl in PATH");
        (output.status.success(), text(&output.stdout) + &text(&output.stderr))
    }

    fn must(&self, args: &[&str]) -> String {
        let (done, said) = self.ctl(args);
        assert!(done, "{args:?}: {said}");
        said
    }

    /// The hash of everything, by etcd itself.
    fn hash(&self) -> u64 {
        let said = self.must(&["endpoint", "hashkv", "-w", "json"]);
        let json: Value = serde_json::from_str(said.trim()).unwrap();
        json[0]["HashKV"]["hash"].as_u64().unwrap_or_else(|| panic!("{said}"))
    }

    fn stop(mut self) {
        use nix::sys::signal::{Signal, kill};
        kill(nix::unistd::Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        wait_for("the end of etcd", || match self.child.try_wait().unwrap() {
            Some(_) => Ok(()),
            None => Err("it runs".to_owned()),
        });
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The engine that opens etcd's database, if it is in this build.
fn engine() -> Option<&'static BuiltIn> {
    let engine = etcds();
    if engine.is_none() {
        println!("SKIPPED: no engine of this build has etcd's files");
    }
    engine
}

/// A directory that etcd has filled, some snapshots of its log ago, and its hash.
fn filled(data: &Path) -> u64 {
    let etcd = Etcd::start(data);
    for n in 0..150 {
        etcd.must(&["put", &format!("k{:02}", n % 50), &format!("value {n}")]);
    }
    etcd.must(&["del", "k07"]);
    etcd.must(&["compact", "60"]);
    etcd.must(&["user", "add", "someone:secret"]);
    etcd.must(&["put", "last", "one"]);
    let hash = etcd.hash();
    etcd.stop();
    hash
}

fn serves(setup: &Setup, hash: u64) {
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        assert_eq!(u64::from(client.hash_kv(0).await.unwrap().hash), hash);
        assert_eq!(client.count().await.unwrap(), 50);
        let value = client.get("k49").await.unwrap().expect("it was put").value;
        assert_eq!(value, b"value 149".to_vec());
        client.put("ours", "too").await.unwrap();
    });
    daemon.stop();
    // Also from what it has written itself.
    let daemon = setup.start();
    runtime().block_on(async {
        assert_eq!(daemon.client().count().await.unwrap(), 51);
    });
    daemon.stop();
}

fn with_engine(data: std::path::PathBuf, engine: &BuiltIn) -> Setup {
    Setup::on(data, &[&format!("--engine={}", engine.name())])
}

#[test]
fn a_directory_of_etcd_is_opened_in_place() {
    let Some(engine) = engine() else { return };
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data");
    let hash = filled(&data);
    let said = with_engine(data.clone(), DEFAULT).refused();
    for part in ["was written by etcd", "start with --engine", "utl engine convert"] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    serves(&with_engine(data.clone(), engine), hash);
    // The file is one of etcd still: its tool checks it and counts the keys.
    let db = data.join("member/snap/db");
    let output = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["snapshot", "status", "-w", "json"])
        .arg(&db)
        .output()
        .expect("this test needs etcdctl in PATH");
    let status: Value = serde_json::from_str(&written(&output)).unwrap();
    // 150 puts, a deletion, one more put, and ours.
    assert_eq!(status["revision"], 154, "{status}");
    // The cluster has the version of its only member now: an older one says so, and changes nothing.
    let log = temp.path().join("log");
    let mut etcd = etcd(&data, (free_address(), free_address()));
    let mut child = etcd.stderr(File::create(&log).unwrap()).spawn().unwrap();
    let ended = wait_for("the end of an etcd that is too old", || {
        child.try_wait().unwrap().ok_or_else(|| std::fs::read_to_string(&log).unwrap())
    });
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(!ended.success() && said.contains("cluster cannot be downgraded"), "{said}");
}

#[test]
fn a_directory_of_etcd_is_converted_to_each_engine() {
    if engine().is_none() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("data");
    let hash = filled(&data);
    for engine in persistent() {
        let before = files(&data);
        let to = temp.path().join(engine.name());
        let output = quorate(&["utl", "engine", "convert", "-w=json", "--engine", engine.name()])
            .arg("--from-dir")
            .arg(&data)
            .arg("--to-dir")
            .arg(&to)
            .output()
            .unwrap();
        let result: Value = serde_json::from_str(&written(&output)).unwrap();
        assert_eq!(result["hash"].as_u64().unwrap(), hash);
        assert!(files(&data) == before, "the source has changed");
        serves(&with_engine(to, engine), hash);
    }
    // While etcd runs, its directory is in use.
    let copy = temp.path().join("running");
    copy_dir(&data, &copy);
    let _etcd = Etcd::start(&copy);
    let output = quorate(&["utl", "engine", "convert", "--engine", DEFAULT.name()])
        .arg("--from-dir")
        .arg(&copy)
        .arg("--to-dir")
        .arg(temp.path().join("never"))
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("is in use by another process"), "{said}");
    assert!(!temp.path().join("never").exists());
}
