//! A disk without space: nothing is acknowledged that is not kept, and the member goes on when there
//! is space again.

use crate::process::{Setup, runtime};
use crate::tmpfs::Tmpfs;

/// Puts until one is not acknowledged, at most `max`; answers how many were.
fn fill(setup: &Setup, max: usize, value: &[u8]) -> (usize, String) {
    let mut daemon = setup.start();
    let (acknowledged, error) = runtime().block_on(async {
        let client = daemon.client();
        for n in 0..max {
            if let Err(error) = client.put(&format!("k{n:05}"), value).await {
                return (n, error);
            }
        }
        panic!("{max} writes fit");
    });
    println!("{acknowledged} writes, then {error}");
    let status = daemon.wait();
    let log = daemon.log_text();
    assert_eq!(status.code(), Some(1), "{status}: {log}");
    assert!(!log.contains("\"level\":\"panic\""), "{log}");
    let stopped = daemon.logged("member stopped").unwrap_or_else(|| panic!("{log}"));
    (acknowledged, stopped["error"].as_str().unwrap().to_string())
}

/// Everything acknowledged is served, and writes go on.
fn recovers(setup: &Setup, acknowledged: usize, value: &[u8]) {
    let daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        let count = client.count().await.unwrap();
        // The one that was not answered may have been kept.
        assert!(
            count == acknowledged as i64 || count == acknowledged as i64 + 1,
            "{count} of {acknowledged}"
        );
        for n in 0..acknowledged {
            let kv = client.get(&format!("k{n:05}")).await.unwrap();
            let kv = kv.unwrap_or_else(|| panic!("key {n} of {acknowledged} is lost"));
            assert!(kv.value == value, "key {n}");
        }
        client.put("after", "it").await.unwrap();
    });
    daemon.stop();
}

#[test]
fn a_full_disk_stops_the_member_and_loses_nothing() {
    let setup = Setup::new(&[]);
    // One segment of the log has 64 MB.
    let Some(tmpfs) = Tmpfs::mount(&setup.data, 96) else {
        println!("SKIPPED: this user may not mount a file system");
        return;
    };
    let value = vec![b'v'; 200_000];
    let (acknowledged, error) = fill(&setup, 1000, &value);
    assert!(error.contains(&setup.data.display().to_string()), "{error}");
    assert!(error.to_lowercase().contains("no space left on device"), "{error}");
    // Still full: it says so, and breaks nothing.
    let mut again = setup.spawn();
    crate::process::wait_for("an end or readiness", || {
        let ended = again.child.try_wait().unwrap().is_some();
        let ready = again.logged("ready to serve client requests").is_some();
        if ended || ready { Ok(()) } else { Err(again.log_text()) }
    });
    again.kill();

    tmpfs.resize(600);
    recovers(&setup, acknowledged, &value);
    drop(tmpfs);
}

#[test]
fn a_log_that_cannot_grow_stops_the_member_and_loses_nothing() {
    let setup = Setup::new(&["--engine=memory"]);
    // The first segment fits, the second does not.
    let Some(tmpfs) = Tmpfs::mount(&setup.data, 70) else {
        println!("SKIPPED: this user may not mount a file system");
        return;
    };
    let value = vec![b'v'; 500_000];
    let (acknowledged, error) = fill(&setup, 1000, &value);
    assert!(error.contains(&setup.wal_dir().display().to_string()), "{error}");
    tmpfs.resize(600);
    recovers(&setup, acknowledged, &value);
    drop(tmpfs);
}

#[test]
fn a_limit_on_the_size_of_files_stops_the_member_and_loses_nothing() {
    let mut setup = Setup::new(&[]);
    // Above that of a segment, so that it is the engine's file that cannot grow.
    setup.file_bytes_max = Some(65 << 20);
    let value = vec![b'v'; 500_000];
    let (acknowledged, error) = fill(&setup, 1000, &value);
    assert!(error.contains(&setup.engine_dir().display().to_string()), "{error}");
    assert!(error.to_lowercase().contains("file too large"), "{error}");
    setup.file_bytes_max = None;
    recovers(&setup, acknowledged, &value);
}
