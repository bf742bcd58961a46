//! One file, turn about: etcd writes it, the engine reads and changes it, etcd goes on with it.
//!
//! `etcdctl snapshot status` is the referee: it checks every page as bbolt does, and its hash covers all
//! buckets, keys and values. Both programs must be in PATH.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use engine_api::{Batch, Durability, Engine, EngineError, Options, Table};
use engine_bbolt::{ABOUT, Bbolt};
use parking_lot::Mutex;

/// One test at a time: between fork and exec a child has copies of all files that are open, locks included,
/// so that an engine that has just been closed would seem to be open still.
static ALONE: Mutex<()> = Mutex::new(());

/// For etcd to serve, on a machine that has much else to do.
const START: Duration = Duration::from_secs(120);

/// A running etcd, which ends with this value.
struct Etcd {
    process: Child,
    endpoint: String,
}

impl Etcd {
    fn start(data_dir: &Path) -> Etcd {
        // both at once: a port that was given up could be the next one as well
        let held = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] =
            held.each_ref().map(|held| format!("http://{}", held.local_addr().unwrap()));
        drop(held);
        let mut process = Command::new("etcd")
            .args(["--name", "m", "--logger", "zap", "--log-outputs", "stderr"])
            .args(["--max-txn-ops", "1000", "--data-dir"])
            .arg(data_dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcd is installed");
        let log = BufReader::new(process.stderr.take().unwrap());
        let etcd = Etcd { process, endpoint: client };
        let (send, lines) = mpsc::channel();
        // to the end, whether somebody listens or not: etcd would stop at a full pipe
        thread::spawn(move || {
            for line in log.lines() {
                let _ = send.send(line.unwrap());
            }
        });
        let deadline = Instant::now() + START;
        let mut seen = String::new();
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains("serving client traffic insecurely") => return etcd,
                Ok(line) => seen = seen + &line + "\n",
                Err(RecvTimeoutError::Timeout) => panic!("etcd does not serve:\n{seen}"),
                Err(RecvTimeoutError::Disconnected) => panic!("etcd has ended:\n{seen}"),
            }
        }
    }

    fn ctl(&self, args: &[&str], input: &str) -> String {
        let mut process = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoint, "--command-timeout", "60s"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcdctl is installed");
        process.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        said(process.wait_with_output().unwrap())
    }

    /// Puts all pairs in transactions of several hundred.
    fn put_all(&self, pairs: &[(String, String)]) {
        for pairs in pairs.chunks(700) {
            let puts: Vec<String> =
                pairs.iter().map(|(key, value)| format!("put {key} {value}\n")).collect();
            let answer = self.ctl(&["txn"], &format!("\n{}\n\n", puts.concat()));
            assert!(answer.starts_with("SUCCESS"), "{answer}");
        }
    }

    /// All keys and values.
    fn rows(&self) -> BTreeMap<String, String> {
        let text = self.ctl(&["get", "", "--from-key"], "");
        let lines: Vec<&str> = text.lines().collect();
        lines.chunks(2).map(|row| (row[0].to_owned(), row[1].to_owned())).collect()
    }

    /// Ends it in order, so that the file holds everything.
    fn stop(mut self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "etcd does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn said(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// CRC-32C, bit by bit.
fn crc32c(state: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(state, |state, byte| {
        (0..8).fold(state ^ u32::from(*byte), |state, _| {
            (state >> 1) ^ (0x82F6_3B78 & (state & 1).wrapping_neg())
        })
    })
}

/// The hash and the number of rows that `etcdctl snapshot status` should find.
fn expected_status(engine: &Bbolt) -> (u32, u64) {
    let view = engine.view().unwrap();
    let (mut state, mut rows) = (u32::MAX, 0);
    for table in Table::ALL {
        state = crc32c(state, table.name().as_bytes());
        view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, value| {
            state = crc32c(crc32c(state, key), value);
            rows += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
    }
    (!state, rows)
}

/// What it does find, once it has checked the file.
fn status(data_dir: &Path) -> (u32, u64) {
    let output = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args(["snapshot", "status", "-w", "json"])
        .arg(data_dir.join("member/snap/db"))
        .output()
        .expect("etcdctl is installed");
    let text = said(output);
    let number = |name: &str| -> u64 {
        let (_, rest) = text.split_once(&format!("\"{name}\":")).expect(name);
        rest.split([',', '}']).next().unwrap().trim().parse().unwrap()
    };
    (number("hash") as u32, number("totalKey"))
}

fn options(sync_freelist: bool) -> Options {
    let given = [("sync-freelist".to_owned(), sync_freelist.to_string())];
    Options::new(&ABOUT, &given.into()).unwrap()
}

fn open(data_dir: &Path, sync_freelist: bool) -> Bbolt {
    Bbolt::open(&data_dir.join("member/snap"), &options(sync_freelist)).unwrap()
}

fn revision_key(main: u64) -> Vec<u8> {
    [&main.to_be_bytes()[..], b"_", &[0; 8]].concat()
}

/// The record of a key that is put once, at revision `main`.
fn record(key: &str, value: &str, main: u64) -> Vec<u8> {
    fn varint(bytes: &mut Vec<u8>, mut number: u64) {
        while number > 0x7f {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
    }
    let mut bytes = Vec::new();
    let text = |bytes: &mut Vec<u8>, tag: u8, text: &str| {
        bytes.push(tag);
        varint(bytes, text.len() as u64);
        bytes.extend_from_slice(text.as_bytes());
    };
    text(&mut bytes, 0x0a, key);
    for (tag, number) in [(0x10, main), (0x18, main), (0x20, 1)] {
        bytes.push(tag);
        varint(&mut bytes, number);
    }
    text(&mut bytes, 0x2a, value);
    bytes
}

fn last_main(engine: &Bbolt) -> u64 {
    let (key, _) = engine.view().unwrap().last(Table::Key).unwrap().unwrap();
    u64::from_be_bytes(key[..8].try_into().unwrap())
}

fn turn_about(sync_freelist: bool) {
    const OURS: u64 = 12_000;
    let _alone = ALONE.lock();
    let temp = tempfile::tempdir().unwrap();
    let data_dir = temp.path().join("data");
    let pairs = |prefix: &str, count: u64| -> Vec<(String, String)> {
        let value = |n: u64| format!("{}{n}", "v".repeat(n as usize % 300));
        (0..count).map(|n| (format!("{prefix}/{n:05}"), value(n))).collect()
    };

    let etcd = Etcd::start(&data_dir);
    etcd.put_all(&pairs("theirs", 4_000));
    etcd.put_all(&pairs("gone", 1_500));
    etcd.ctl(&["del", "--prefix", "gone/"], "");
    etcd.ctl(&["lease", "grant", "3600"], "");
    etcd.ctl(&["role", "add", "reader"], "");
    // while it runs, the file is its own
    let refused =
        Bbolt::open(&data_dir.join("member/snap"), &options(sync_freelist)).err().unwrap();
    assert!(
        matches!(&refused, EngineError::Unusable(what) if what.contains("in use")),
        "{refused}"
    );
    etcd.stop();

    // the engine reads what etcd wrote
    let before = status(&data_dir);
    let engine = open(&data_dir, sync_freelist);
    engine.check().unwrap();
    assert_eq!(expected_status(&engine), before);
    assert!(before.1 > 7_000, "{} rows", before.1);

    // it grows the tree and takes two thirds of what it has added out of it again
    let first = last_main(&engine) + 1;
    let ours = pairs("ours", OURS);
    for (chunk, rows) in ours.chunks(1_000).enumerate() {
        let mut batch = Batch::default();
        for (n, (key, value)) in rows.iter().enumerate() {
            let main = first + (chunk * 1_000 + n) as u64;
            batch.put(Table::Key, revision_key(main), record(key, value, main));
        }
        let durability = if chunk % 3 == 0 { Durability::Durable } else { Durability::Buffered };
        engine.commit(&batch, durability).unwrap();
    }
    engine.check().unwrap();
    drop(engine);
    let engine = open(&data_dir, sync_freelist);
    assert_eq!(last_main(&engine), first + OURS - 1);
    let is_kept = |n: u64| n.is_multiple_of(3) && !(3_000..8_000).contains(&n) || n == OURS - 1;
    for chunk in 0..12 {
        let mut batch = Batch::default();
        let numbers = (chunk * 1_000..(chunk + 1) * 1_000).filter(|n| !is_kept(*n));
        numbers.for_each(|n| batch.delete(Table::Key, revision_key(first + n)));
        engine.commit(&batch, Durability::Durable).unwrap();
    }
    engine.check().unwrap();
    let expected = expected_status(&engine);
    drop(engine);
    assert_eq!(status(&data_dir), expected);

    // etcd goes on with it
    let mut rows: BTreeMap<String, String> = pairs("theirs", 4_000).into_iter().collect();
    rows.extend((0..OURS).filter(|n| is_kept(*n)).map(|n| ours[n as usize].clone()));
    let etcd = Etcd::start(&data_dir);
    assert!(etcd.rows() == rows, "etcd finds other rows");
    etcd.put_all(&pairs("more", 2_000));
    rows.extend(pairs("more", 2_000));
    etcd.stop();

    // and the engine with that, giving space back this time
    let engine = open(&data_dir, sync_freelist);
    engine.check().unwrap();
    assert_eq!(expected_status(&engine), status_of_copy(&data_dir, temp.path()));
    let reclaimed = engine.reclaim().unwrap();
    assert!(reclaimed.after < reclaimed.before * 3 / 4, "{reclaimed:?}");
    let expected = expected_status(&engine);
    drop(engine);
    assert_eq!(status(&data_dir), expected);
    let etcd = Etcd::start(&data_dir);
    assert!(etcd.rows() == rows, "etcd finds other rows after reclaim");
    etcd.ctl(&["defrag"], "");
    etcd.stop();
    open(&data_dir, sync_freelist).check().unwrap();
}

/// The status of a file that is open, and thus locked.
fn status_of_copy(data_dir: &Path, temp: &Path) -> (u32, u64) {
    let copy = temp.join("copy");
    std::fs::create_dir_all(copy.join("member/snap")).unwrap();
    std::fs::copy(data_dir.join("member/snap/db"), copy.join("member/snap/db")).unwrap();
    status(&copy)
}

#[test]
fn etcd_and_the_engine_go_on_with_each_others_file() {
    turn_about(false);
}

#[test]
fn etcd_and_the_engine_go_on_with_each_others_file_and_freelist() {
    turn_about(true);
}

/// A file that the engine has made from nothing, with everything taken out again, is one that bbolt accepts.
#[test]
fn what_the_engine_makes_is_accepted() {
    let _alone = ALONE.lock();
    for sync_freelist in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let engine = open(temp.path(), sync_freelist);
        let accept = |engine: Bbolt| {
            let expected = expected_status(&engine);
            drop(engine);
            assert_eq!(status(temp.path()), expected);
            open(temp.path(), sync_freelist)
        };
        let mut engine = accept(engine);
        // keys as long as branches can bear, values over several pages, thousands of rows, then none
        for round in 0..6_u64 {
            let mut batch = Batch::default();
            for n in 0..1_500_u64 {
                let main = n * 7 + round;
                let value = vec![b'v'; (n % 97 * (n % 5) * (n % 50)) as usize];
                batch.put(Table::Key, revision_key(main), value);
                if n % 50 == 0 {
                    let key = vec![n as u8; 1 + (n as usize * 20) % 32_768];
                    batch.put(Table::AuthUsers, key, n.to_string());
                }
                if n % 2 == round % 2 {
                    batch.delete(Table::Key, revision_key(n * 7 + round.saturating_sub(1)));
                }
            }
            engine.commit(&batch, Durability::Durable).unwrap();
            engine.check().unwrap();
            engine = accept(engine);
        }
        for table in [Table::Key, Table::AuthUsers] {
            let mut batch = Batch::default();
            let view = engine.view().unwrap();
            view.scan(table, Bound::Unbounded, Bound::Unbounded, &mut |key, _| {
                batch.delete(table, key.to_vec());
                ControlFlow::Continue(())
            })
            .unwrap();
            drop(view);
            assert!(batch.len() > 20);
            engine.commit(&batch, Durability::Durable).unwrap();
            engine = accept(engine);
        }
        assert_eq!(engine.check().unwrap().rows, 0);
    }
}
