//! Data directories that change their engine: nothing is lost, the source is never touched, and whatever
//! stops a conversion it can be run again.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use quorate::engines::{ALL, BuiltIn, DEFAULT};
use quorate::utl::convert::CONVERTING;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::auth_client::AuthClient;
use serde_json::Value;
use tonic::transport::Endpoint;

use crate::process::{Random, Setup, env_number, files, runtime, wait_for};
use crate::tmpfs::Tmpfs;
use crate::{persistent, quorate, text, written};

fn convert(from: &Path, to: &Path, engine: &str) -> Command {
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let args = ["--from-dir", from, "--to-dir", to, "--engine", engine];
    quorate(&[&["utl", "-w", "json", "engine", "convert"], &args[..]].concat())
}

/// A conversion that succeeds and changes nothing in its source; its result.
fn converted(from: &Path, to: &Path, engine: &BuiltIn) -> Value {
    let before = files(from);
    let output = convert(from, to, engine.name()).output().unwrap();
    assert!(files(from) == before, "the source has changed");
    assert_eq!(text(&output.stderr), "", "no progress is shown where there is no terminal");
    let result: Value = serde_json::from_str(&written(&output)).unwrap();
    assert_eq!(result["toEngine"], engine.name());
    assert_eq!(Path::new(result["fromDir"].as_str().unwrap()), from.canonicalize().unwrap());
    assert!(to.join("member/wal").is_dir() && !to.join(CONVERTING).exists());
    assert!(!to.join("member/source").exists(), "the copy of the old engine is still there");
    result
}

/// A conversion that is refused; nothing is made, and nothing is changed.
fn refused(command: &mut Command, from: &Path, to: &Path, parts: &[&str]) -> String {
    let before = (files(from), to.exists().then(|| files(to)));
    let output = command.output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(text(&output.stdout), "");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    assert!(
        (files(from), to.exists().then(|| files(to))) == before,
        "something has changed: {said}"
    );
    said
}

fn with_engine(engine: &BuiltIn) -> Setup {
    Setup::new(&[&format!("--engine={}", engine.name())])
}

fn on(data: PathBuf, engine: &BuiltIn) -> Setup {
    Setup::on(data, &[&format!("--engine={}", engine.name())])
}

/// Something in every table, and a history with gaps.
fn fill(setup: &Setup) {
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        let lease = client.grant(100_000).await.unwrap();
        for n in 0..300 {
            let value = vec![b'a' + (n % 26) as u8; n * 7];
            client.put_with(&format!("k{:03}", n % 200), value, lease).await.unwrap();
        }
        for n in 0..30 {
            client.delete(&format!("k{:03}", 3 * n)).await.unwrap();
        }
        client.compact(150, true).await.unwrap();
        let channel = Endpoint::from_shared(format!("http://{}", setup.client)).unwrap();
        let mut auth = AuthClient::new(channel.connect().await.unwrap());
        let (name, password) = ("someone".to_owned(), "secret".to_owned());
        let user = pb::AuthUserAddRequest { name, password, ..Default::default() };
        auth.user_add(user).await.unwrap();
        let role = pb::AuthRoleAddRequest { name: "all".to_owned() };
        auth.role_add(role).await.unwrap();
    });
    daemon.stop();
}

/// Serves what [`fill`] has put, with the hash that the conversion names; then takes writes.
fn serves(setup: &Setup, result: &Value, round: usize) {
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        let revision = result["revision"].as_i64().unwrap();
        assert_eq!(client.revision().await.unwrap(), revision);
        let hash = client.hash_kv(revision).await.unwrap();
        assert_eq!(u64::from(hash.hash), result["hash"].as_u64().unwrap());
        assert_eq!(hash.compact_revision, result["compactRevision"].as_i64().unwrap());
        let value = client.get("k100").await.unwrap().expect("it was put").value;
        assert_eq!(value, vec![b'a' + 22; 100 * 7]);
        assert!(client.get("k003").await.unwrap().is_none(), "it was deleted");
        // One more each time, and those of the times before.
        assert_eq!(client.count().await.unwrap(), 170 + round as i64);
        client.put(&format!("after/{round}"), "x").await.unwrap();
    });
    daemon.stop();
}

#[test]
fn data_go_from_engine_to_engine() {
    let engines = persistent();
    let first = with_engine(engines[0]);
    fill(&first);
    let mut setups = vec![first];
    let mut rows = None;
    // Each is once the source and once the target; the last step leads back to the first engine.
    for (round, engine) in engines.iter().cycle().skip(1).take(engines.len()).enumerate() {
        let from = &setups.last().unwrap().data;
        let to = setups[0].temp.path().join(format!("to-{round}"));
        let result = converted(from, &to, engine);
        // A row for the key that the member before has put.
        let now = result["rows"].as_u64().unwrap();
        assert_eq!(rows.map_or(now, |before: u64| before + 1), now, "{result}");
        rows = Some(now);
        assert!(result["bytes"].as_u64().unwrap() > 100_000, "{result}");
        let setup = on(to, engine);
        serves(&setup, &result, round);
        setups.push(setup);
    }
    // The first directory is as good as it was.
    let to = setups[0].temp.path().join("again");
    let result = converted(&setups[0].data, &to, engines[0]);
    serves(&setups[0], &result, 0);
}

#[test]
fn a_member_that_was_killed_is_converted_with_all_it_acknowledged() {
    for engine in persistent() {
        let setup = with_engine(engine);
        let daemon = setup.start();
        runtime().block_on(async {
            let client = daemon.client();
            for n in 0..200 {
                client.put(&format!("k{n}"), vec![b'x'; 1000]).await.unwrap();
            }
        });
        daemon.kill();
        let to = setup.temp.path().join("to");
        converted(&setup.data, &to, DEFAULT);
        // The log has what the engine had not.
        for setup in [on(to, DEFAULT), setup] {
            let daemon = setup.start();
            runtime().block_on(async {
                assert_eq!(daemon.client().count().await.unwrap(), 200, "{engine:?}");
            });
            daemon.stop();
        }
    }
}

#[test]
fn a_log_that_is_elsewhere_is_found() {
    let mut setup = with_engine(DEFAULT);
    let wal = setup.temp.path().join("wal");
    setup.args.push(format!("--wal-dir={}", wal.display()));
    fill(&setup);
    let to = setup.temp.path().join("to");
    let said = ["no write-ahead log", "--from-wal-dir"];
    refused(&mut convert(&setup.data, &to, DEFAULT.name()), &setup.data, &to, &said);
    let mut command = convert(&setup.data, &to, DEFAULT.name());
    let output = command.arg("--from-wal-dir").arg(&wal).output().unwrap();
    let result: Value = serde_json::from_str(&written(&output)).unwrap();
    serves(&on(to, DEFAULT), &result, 0);
}

#[test]
fn what_cannot_be_converted_is_refused_with_the_reason() {
    let setup = with_engine(DEFAULT);
    fill(&setup);
    let (from, to) = (setup.data.clone(), setup.temp.path().join("to"));
    for engine in ALL.iter().filter(|engine| engine.home(Path::new("")).is_none()) {
        let said = [&*format!("engine {} has no files", engine.name())];
        refused(&mut convert(&from, &to, engine.name()), &from, &to, &said);
        let memory = with_engine(engine);
        fill(&memory);
        let to = memory.temp.path().join("to");
        let said = ["none of the engines", "filled from the log"];
        refused(&mut convert(&memory.data, &to, DEFAULT.name()), &memory.data, &to, &said);
    }
    let known = quorate::engines::names();
    let said = ["--engine: unknown engine \"sled\"", &known];
    refused(&mut convert(&from, &to, "sled"), &from, &to, &said);
    for engine in persistent() {
        let mut command = convert(&from, &to, engine.name());
        let said = ["--engine-options", "unknown option \"no-such\"", engine.name()];
        refused(command.arg("--engine-options=no-such=1"), &from, &to, &said);
    }
    let said = ["holds member", "is not empty"];
    let other = with_engine(DEFAULT);
    fill(&other);
    refused(&mut convert(&from, &other.data, DEFAULT.name()), &from, &other.data, &said);
    refused(&mut convert(&from, &from, DEFAULT.name()), &from, &from, &["is the source"]);

    // A member that runs; its files change by themselves.
    let daemon = setup.start();
    let output = convert(&from, &to, DEFAULT.name()).output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains(&format!("is in use by process {}", daemon.pid())), "{said}");
    assert_eq!(output.status.code(), Some(1));
    assert!(!to.exists());
    daemon.stop();
}

#[test]
fn a_directory_of_another_engine_is_refused_with_the_way_out() {
    for engine in persistent() {
        let setup = with_engine(engine);
        fill(&setup);
        for other in ALL.iter().filter(|other| **other != engine) {
            let before = files(&setup.data);
            let said = on(setup.data.clone(), other).refused();
            assert!(files(&setup.data) == before, "something has changed");
            let data = setup.data.display();
            let start = format!("start with --engine {}", engine.name());
            let mut parts = vec![
                format!("data directory {data} holds the data of engine {}", engine.name()),
                format!("engine {} is configured", other.name()),
                start,
            ];
            let command = format!("quorate utl engine convert --from-dir {data} --to-dir NEW");
            let command = format!("{command} --engine {}", other.name());
            if other.home(Path::new("")).is_some() {
                parts.push(command);
            } else {
                assert!(!said.contains("convert"), "{said}");
            }
            for part in parts {
                assert!(said.contains(&part), "{part:?} is not in: {said}");
            }
        }
    }
}

/// A member's directory that takes a while to convert.
fn large(engine: &BuiltIn) -> Setup {
    let setup = with_engine(engine);
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        for n in 0..40 {
            client.put(&format!("k{n}"), vec![n as u8 + 1; 400_000]).await.unwrap();
        }
    });
    daemon.stop();
    setup
}

/// Killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn an_interrupted_conversion_leaves_the_source_alone_and_is_run_again() {
    let engines = persistent();
    let setup = large(engines[0]);
    let (from, to) = (&setup.data, setup.temp.path().join("to"));
    let target = engines[engines.len() - 1];
    let before = files(from);
    let began = Instant::now();
    converted(from, &to, target);
    let whole = began.elapsed().as_millis() as u64;
    std::fs::remove_dir_all(&to).unwrap();

    let seed = env_number("CONVERT_SEED", u64::from(std::process::id()));
    println!("CONVERT_SEED={seed}");
    let mut random = Random::new(seed);
    let (mut interrupted, mut left) = (0, 0);
    for round in 0..env_number("CONVERT_ROUNDS", 12) {
        let signal = if round % 2 == 0 { Signal::SIGINT } else { Signal::SIGKILL };
        let mut running = Running(convert(from, &to, target.name()).spawn().unwrap());
        // The moment is what is tried out here; nothing waits for it.
        std::thread::sleep(Duration::from_millis(random.below(whole)));
        kill(Pid::from_raw(running.0.id() as i32), signal).unwrap();
        let status = running.0.wait().unwrap();
        if status.success() {
            assert!(to.join("member").exists());
            std::fs::remove_dir_all(&to).unwrap();
            continue;
        }
        assert_eq!(status.signal(), Some(signal as i32), "{status}");
        interrupted += 1;
        if signal == Signal::SIGINT {
            // Of what a kill has left before, nothing is left either.
            let empty = !to.exists() || std::fs::read_dir(&to).unwrap().next().is_none();
            assert!(empty, "round {round} has left something");
        } else if to.join(CONVERTING).exists() {
            left += 1;
            let said = on(to.clone(), target).refused();
            assert!(said.contains("has not come to its end"), "{said}");
            assert!(said.contains("quorate utl engine convert"), "{said}");
        }
    }
    println!("{interrupted} were interrupted, {left} have left something");
    assert!(interrupted > 0, "no conversion was interrupted");
    assert!(files(from) == before, "the source has changed");

    // For sure on what a kill has left.
    let mut running = Running(convert(from, &to, target.name()).spawn().unwrap());
    wait_for("a conversion under way", || match to.join(CONVERTING).join("source").exists() {
        true => Ok(()),
        false => Err("it has not begun".to_owned()),
    });
    running.0.kill().unwrap();
    running.0.wait().unwrap();
    if to.join("member").exists() {
        std::fs::remove_dir_all(&to).unwrap();
    }
    let result = converted(from, &to, target);
    let daemon = on(to, target).start();
    runtime().block_on(async {
        let client = daemon.client();
        assert_eq!(client.count().await.unwrap(), 40);
        let hash = client.hash_kv(0).await.unwrap().hash;
        assert_eq!(u64::from(hash), result["hash"].as_u64().unwrap());
    });
    daemon.stop();
}

#[test]
fn a_full_disk_is_told_and_leaves_the_target_as_it_was() {
    let setup = large(DEFAULT);
    let disk = setup.temp.path().join("disk");
    let Some(tmpfs) = Tmpfs::mount(&disk, 20) else {
        println!("SKIPPED: this user may not mount a file system");
        return;
    };
    let to = disk.join("to");
    let said = ["needs about", "MiB free", disk.to_str().unwrap()];
    refused(&mut convert(&setup.data, &to, DEFAULT.name()), &setup.data, &to, &said);

    tmpfs.resize(300);
    for engine in persistent() {
        let home = engine.home_in(&to.join(CONVERTING)).unwrap();
        let filler = disk.join("filler");
        let said = wait_for("a conversion on a disk that becomes full", || {
            let before = files(&setup.data);
            let mut running = Running(convert(&setup.data, &to, engine.name()).spawn().unwrap());
            // When the new engine is there, the room was found to be enough.
            while running.0.try_wait().unwrap().is_none() && !home.exists().unwrap() {
                std::thread::yield_now();
            }
            // It stands still until the disk is full.
            kill(Pid::from_raw(running.0.id() as i32), Signal::SIGSTOP).ok();
            let full = std::io::copy(
                &mut std::io::repeat(1),
                &mut std::fs::File::create(&filler).unwrap(),
            );
            let error = full.expect_err("the disk has an end");
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
            kill(Pid::from_raw(running.0.id() as i32), Signal::SIGCONT).ok();
            let status = running.0.wait().unwrap();
            let mut said = String::new();
            std::io::Read::read_to_string(running.0.stderr.as_mut().unwrap(), &mut said).unwrap();
            std::fs::remove_file(&filler).unwrap();
            assert!(files(&setup.data) == before, "the source has changed");
            if status.success() {
                std::fs::remove_dir_all(&to).unwrap();
                return Err("it was done before".to_owned());
            }
            assert_eq!(status.code(), Some(1), "{said}");
            Ok(said)
        });
        assert!(said.to_lowercase().contains("no space left on device"), "{said}");
        assert!(said.contains(to.to_str().unwrap()), "{said}");
        assert!(!to.exists(), "something was left");
        // With room again it works.
        converted(&setup.data, &to, engine);
        std::fs::remove_dir_all(&to).unwrap();
    }
    drop(tmpfs);
}

#[test]
fn a_limit_on_the_size_of_files_is_told() {
    let setup = with_engine(DEFAULT);
    fill(&setup);
    let to = setup.temp.path().join("to");
    let mut command = convert(&setup.data, &to, DEFAULT.name());
    let limit = || {
        use nix::sys::resource::{Resource, setrlimit};
        use nix::sys::signal::{SigHandler, signal};
        setrlimit(Resource::RLIMIT_FSIZE, 100_000, 100_000)?;
        // SAFETY: an ignored signal runs no handler.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
        Ok(())
    };
    // SAFETY: only system calls are made between fork and exec.
    unsafe { command.pre_exec(limit) };
    refused(&mut command, &setup.data, &to, &["File too large", to.to_str().unwrap()]);
    assert!(!to.exists());
}

#[test]
fn the_owner_of_the_source_owns_the_copy() {
    use std::os::unix::fs::{MetadataExt, chown};
    let setup = with_engine(DEFAULT);
    fill(&setup);
    let member = setup.member_dir();
    if chown(&member, Some(12_345), Some(12_346)).is_err() {
        println!("SKIPPED: this user may not give files away");
        return;
    }
    let to = setup.temp.path().join("new/to");
    converted(&setup.data, &to, DEFAULT);
    for path in [
        to.parent().unwrap().to_path_buf(),
        to.join("member"),
        DEFAULT.home(&to).unwrap().path(),
        to.join("member/wal"),
    ] {
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid()), (12_345, 12_346), "{}", path.display());
    }
}
