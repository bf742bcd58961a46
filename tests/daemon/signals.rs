//! How a member ends, and how it tells that it has begun.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::process::{Client, PATIENCE, Setup, runtime};

#[test]
fn a_signal_drains_and_the_next_start_replays_nothing() {
    let setup = Setup::new(&[]);
    for (n, signal) in [Signal::SIGTERM, Signal::SIGINT].into_iter().enumerate() {
        let mut daemon = setup.start();
        let n = n as i64;
        runtime().block_on(async {
            let client = daemon.client();
            for m in 0..10 {
                client.put(&format!("k{m}"), "v").await.unwrap();
            }
            let (_sender, mut responses) = client.watch_all(0).await.unwrap();
            daemon.signal(signal);
            // The watch has no end of its own.
            let ended = tokio::time::timeout(PATIENCE, responses.message()).await;
            let ended = ended.expect("the watch ends");
            assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
        });
        let status = daemon.wait();
        assert_eq!(status.signal(), Some(signal as i32), "{}", daemon.log_text());
        let said = daemon.logged("received signal; shutting down").unwrap();
        let name = if signal == Signal::SIGTERM { "terminated" } else { "interrupt" };
        assert_eq!(said["signal"], name);
        let on_disk = daemon.logged("engine is on disk").unwrap();
        let closed = daemon.logged("closed etcd server").unwrap();
        assert_eq!(
            (&closed["name"], &closed["data-dir"]),
            (&"m".into(), &setup.data.display().to_string().into())
        );

        let daemon = setup.start();
        let found = daemon.logged("restarting local member").unwrap();
        assert_eq!(found["applied-index"], on_disk["applied-index"], "{found}");
        assert!(found["commit-index"].as_u64() <= found["applied-index"].as_u64(), "{found}");
        assert_eq!(found["revision"], 1 + 10 * (n + 1), "{found}");
        daemon.stop();
    }
}

#[test]
fn a_second_signal_changes_nothing_and_a_client_that_hangs_is_not_waited_for_without_end() {
    let setup = Setup::new(&[]);
    let mut daemon = setup.start();
    runtime().block_on(async {
        let client = daemon.client();
        for n in 0..20 {
            client.put(&format!("k{n}"), vec![b'v'; 1_000_000]).await.unwrap();
        }
        // A snapshot that nobody reads stays in flight.
        let request = quorate_proto::etcdserverpb::SnapshotRequest {};
        let _unread = client.maintenance.clone().snapshot(request).await.unwrap();
        daemon.signal(Signal::SIGTERM);
        daemon.wait_logged("received signal; shutting down");
        let late = Setup::on(setup.data.clone(), &[]).refused();
        assert!(late.contains("is in use by process"), "it has not ended: {late}");
        daemon.signal(Signal::SIGINT);
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{}", daemon.log_text());
        assert!(daemon.logged("engine is on disk").is_some(), "{}", daemon.log_text());
    });
    let daemon = setup.start();
    runtime().block_on(async { assert_eq!(daemon.client().count().await.unwrap(), 20) });
    daemon.stop();
}

#[test]
fn a_hang_up_ends_it_at_once_and_loses_nothing() {
    let setup = Setup::new(&[]);
    let mut daemon = setup.start();
    runtime().block_on(async { daemon.client().put("a", "1").await.unwrap() });
    daemon.signal(Signal::SIGHUP);
    assert_eq!(daemon.wait().signal(), Some(Signal::SIGHUP as i32));
    assert!(daemon.logged("closed etcd server").is_none());
    let daemon = setup.start();
    runtime().block_on(async {
        assert_eq!(daemon.client().get("a").await.unwrap().unwrap().value, "1");
    });
    daemon.stop();
}

/// Starts a member that has this socket to tell, and looks at what it tells.
fn is_notified(name: &str, socket: &UnixDatagram) {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut setup = Setup::new(&["--name=other"]);
    setup.env.insert("NOTIFY_SOCKET".to_string(), name.into());
    // A start that fails is never ready.
    setup.refused();
    socket.set_nonblocking(true).unwrap();
    let mut text = [0; 64];
    let nothing = socket.recv(&mut text).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
    socket.set_nonblocking(false).unwrap();

    setup.args.clear();
    let mut daemon = setup.spawn();
    let length = socket.recv(&mut text).unwrap();
    assert_eq!(&text[..length], b"READY=1");
    // It is: without any waiting.
    let health = daemon.http("/health");
    assert_eq!(health.status, 200, "{health:?}");
    daemon.wait_logged("published local member to cluster through raft");
    daemon.stop();
    socket.set_nonblocking(true).unwrap();
    assert!(socket.recv(&mut text).is_err(), "it is told once");
}

#[test]
fn systemd_is_told_when_it_is_ready_and_not_before() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("notify");
    is_notified(path.to_str().unwrap(), &UnixDatagram::bind(&path).unwrap());

    let name = format!("quorate-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    is_notified(&format!("@{name}"), &UnixDatagram::bind_addr(&address).unwrap());

    // Nobody there: it is said, and the member serves.
    let mut setup = Setup::new(&[]);
    setup.env.insert("NOTIFY_SOCKET".to_string(), temp.path().join("nobody").into());
    let mut daemon = setup.start();
    let line = daemon.wait_logged("failed to notify systemd for readiness");
    assert_eq!(line["level"], "warn");
    daemon.stop();
}

#[test]
fn clients_can_be_listened_for_on_a_unix_socket() {
    let mut setup = Setup::new(&[]);
    let path = setup.temp.path().join("etcd.sock");
    setup.listen = Some(format!("unix://{}", path.display()));
    // What a process that was killed leaves behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let daemon = setup.start();
    let line = daemon.logged("serving client traffic insecurely; this is strongly discouraged!");
    assert_eq!(line.unwrap()["address"], path.display().to_string());
    let url = format!("unix://{}", path.display());
    runtime().block_on(async {
        let client = Client::new(&url);
        client.put("a", "1").await.unwrap();
        assert_eq!(client.get("a").await.unwrap().unwrap().value, "1");
    });
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    daemon.stop();
    assert!(!path.exists());

    let daemon = setup.start();
    daemon.kill();
    assert!(path.exists());
    let daemon = setup.start();
    runtime().block_on(async {
        assert_eq!(Client::new(&url).get("a").await.unwrap().unwrap().value, "1");
    });
    daemon.stop();

    // A file that is not a socket is somebody's.
    std::fs::write(&path, "mine").unwrap();
    let said = setup.refused();
    assert!(said.contains(&path.display().to_string()), "{said}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn an_idle_connection_does_not_hold_up_the_end() {
    let setup = Setup::new(&[]);
    let daemon = setup.start();
    let mut idle = std::net::TcpStream::connect(setup.client).unwrap();
    idle.set_read_timeout(Some(PATIENCE)).unwrap();
    idle.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut byte = [0];
    idle.read_exact(&mut byte).unwrap();
    let silent = std::net::TcpStream::connect(setup.client).unwrap();
    let started = std::time::Instant::now();
    daemon.stop();
    // The bound for clients that hang is 7 s.
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    drop(silent);
}
