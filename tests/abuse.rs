//! Attacks on a running member: whatever a client does, the memory that it costs stays within a bound,
//! and others are served meanwhile.

mod ports;
mod raw;

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use prost::Message;
use quorate_proto::etcdserverpb as pb;
use raw::*;

const SNAPSHOT: &str = "/etcdserverpb.Maintenance/Snapshot";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

/// A member and what it held when the attack began.
struct Target {
    server: Server,
    before: usize,
}

impl Target {
    fn start(flags: &[&str]) -> Self {
        Self::of(Server::start(QUORATE, flags))
    }

    fn of(server: Server) -> Self {
        server.assert_serves();
        let before = server.resident_bytes();
        Target { server, before }
    }

    /// With `count` values of nearly the greatest size.
    fn with_values(count: usize) -> Self {
        let server = Server::start(QUORATE, &[]);
        for n in 0..count {
            let key = format!("great{n:03}");
            let reply = server.call(PUT, &put(key.as_bytes(), vec![n as u8; 1_400_000]));
            assert_eq!(reply.code, 0, "{}", reply.message);
        }
        Self::of(server)
    }

    fn grown(&self) -> usize {
        self.server.resident_bytes().saturating_sub(self.before)
    }

    /// Others are served, a dozen times, and memory stays below `bound` all the while.
    fn assert_unharmed(&self, bound: usize, what: &str) {
        let mut most = 0;
        for _ in 0..12 {
            self.server.assert_serves();
            let grown = self.grown();
            most = most.max(grown);
            assert!(grown < bound, "{} MiB for {what}", grown >> 20);
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("{what}: {} MiB", most >> 20);
    }
}

/// Requests and connections that an attacker keeps open, on a thread that serves them.
struct Attack {
    runtime: tokio::runtime::Handle,
    /// Ends the thread, and all connections with it.
    _stop: tokio::sync::oneshot::Sender<()>,
    addr: std::net::SocketAddr,
    open: Vec<(ResponseFuture, SendStream<Bytes>)>,
    senders: Vec<SendRequest<Bytes>>,
}

impl Attack {
    fn on(target: &Target) -> Self {
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime starts");
        let handle = runtime.handle().clone();
        std::thread::spawn(move || {
            runtime.block_on(async {
                // It ends when the sender is dropped.
                stopped.await.ok();
            });
        });
        Attack {
            runtime: handle,
            _stop: stop,
            addr: target.server.addr,
            open: Vec::new(),
            senders: Vec::new(),
        }
    }

    /// A connection that lets `window` bytes of a response come, and reads none.
    fn connect(&mut self, window: u32) {
        let addr = self.addr;
        let sender = self.runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(addr).await.expect("it listens");
            let (sender, connection) = h2::client::Builder::new()
                .initial_window_size(window)
                .max_send_buffer_size(1 << 30)
                .handshake::<_, Bytes>(stream)
                .await
                .expect("it speaks HTTP/2");
            tokio::spawn(async move {
                // The member may close it.
                connection.await.ok();
            });
            sender
        });
        self.senders.push(sender);
    }

    /// Begins a call on the newest connection; answers whether that still stands.
    fn call(&mut self, path: &str, headers: &[(&str, &str)], body: Bytes, end: bool) -> bool {
        let sender = self.senders.last().expect("a connection").clone();
        let begun = self.runtime.block_on(async {
            let mut sender = tokio::time::timeout(PATIENCE, sender.ready()).await.ok()?.ok()?;
            let mut request = http::Request::post(format!("http://{}{path}", self.addr))
                .header("content-type", "application/grpc")
                .header("te", "trailers");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request.body(()).expect("a request");
            let (response, mut send) = sender.send_request(request, false).ok()?;
            if !body.is_empty() || end {
                send.send_data(body, end).ok()?;
            }
            Some((response, send))
        });
        match begun {
            Some(call) => self.open.push(call),
            None => return false,
        }
        true
    }
}

fn range_all() -> Bytes {
    let all = pb::RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    framed(&all.encode_to_vec(), false).into()
}

#[test]
fn messages_that_are_never_finished() {
    let target = Target::start(&[]);
    let mut attack = Attack::on(&target);
    // 1.4 of 1.5 MB each: 1.1 GB in all.
    let mut half = vec![0, 0, 0x17, 0, 0];
    half.extend(vec![7; 1_400_000]);
    let half = Bytes::from(half);
    for _ in 0..4 {
        attack.connect(65_535);
        for _ in 0..200 {
            attack.call(PUT, &[], half.clone(), false);
        }
    }
    let large = target.server.call(PUT, &put(b"large", vec![1; 1_400_000]));
    assert_eq!(large.code, 0, "{}", large.message);
    target.assert_unharmed(640 << 20, "half messages");
    assert_eq!(target.server.call_raw(RANGE, &range_all()[5..]).code, 0);
}

#[test]
fn ranges_that_are_never_read() {
    let target = Target::with_values(30);
    let mut attack = Attack::on(&target);
    // 42 MB each: 4 GB in all.
    for _ in 0..8 {
        attack.connect(0);
        for _ in 0..12 {
            attack.call(RANGE, &[], range_all(), true);
        }
    }
    target.assert_unharmed(1 << 30, "unread ranges");
    let reply = target.server.call_raw(RANGE, &range_all()[5..]);
    assert_eq!(reply.code, 0, "{}", reply.message);
    assert!(reply.body.len() > 42_000_000);
}

#[test]
fn watches_that_are_never_read() {
    let target = Target::with_values(40);
    let mut attack = Attack::on(&target);
    for n in 0..4 {
        attack.connect(0);
        for from in 0..100 {
            let create = watch_all(2 + (n * 100 + from) % 40);
            let body = framed(&create.encode_to_vec(), false).into();
            assert!(attack.call(WATCH, &[], body, false));
        }
    }
    target.assert_unharmed(1 << 30, "unread watches");
    drop(attack);
    let deadline = Instant::now() + PATIENCE;
    while target.server.metric("etcd_debugging_mvcc_watch_stream_total") != 0.0 {
        assert!(Instant::now() < deadline, "streams outlive their client");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn snapshots_that_are_never_read() {
    let target = Target::with_values(10);
    let mut attack = Attack::on(&target);
    let request = Bytes::from(framed(&pb::SnapshotRequest::default().encode_to_vec(), false));
    for _ in 0..3 {
        attack.connect(0);
        for _ in 0..20 {
            assert!(attack.call(SNAPSHOT, &[], request.clone(), true));
        }
    }
    target.assert_unharmed(256 << 20, "unread snapshots");
    let open = || {
        let dir = format!("/proc/{}/fd", target.server.child.id());
        let files = std::fs::read_dir(dir).expect("the member runs").filter_map(Result::ok);
        let names = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        names.filter(|name| name.to_string_lossy().contains("(deleted)")).count()
    };
    assert!((1..=8).contains(&open()), "{} copies of the data", open());
    // Somebody who does read gets theirs, once others had to make room.
    let reply = call(target.server.addr, SNAPSHOT, None, &[]);
    assert!(reply.code == 0 && reply.body.len() > 14_000_000, "{}", reply.message);
    assert!(open() <= 8, "{} copies of the data", open());
}

#[test]
fn keepalives_without_end_and_without_ear() {
    let target = Target::start(&[]);
    let mut attack = Attack::on(&target);
    let one = framed(&pb::LeaseKeepAliveRequest { id: 77 }.encode_to_vec(), false);
    let many = Bytes::from(one.repeat(500_000));
    for _ in 0..4 {
        attack.connect(0);
        for _ in 0..5 {
            attack.call(KEEP_ALIVE, &[], many.clone(), false);
        }
    }
    target.assert_unharmed(64 << 20, "keepalives that nobody hears");
}

#[test]
fn calls_that_say_nothing() {
    let target = Target::start(&[]);
    let mut raw = Raw::connect(target.server.addr);
    // One more than may be: the last is refused, the others are left alone.
    let count = (1 << 14) + 1;
    let mut burst = Vec::new();
    for n in 0..count {
        burst.extend(head(2 * n + 1, if n % 2 == 0 { PUT } else { WATCH }));
    }
    raw.send(&burst);
    let last = 2 * (count - 1) + 1;
    let refused = raw.wait("RST_STREAM", |frame| frame.kind == RST_STREAM);
    assert_eq!((refused.stream, &refused.payload[..]), (last, &[0, 0, 0, 7][..]), "REFUSED_STREAM");
    target.assert_unharmed(384 << 20, "16384 calls that say nothing");
    drop(raw);
    let deadline = Instant::now() + PATIENCE;
    while target.server.metric("etcd_debugging_mvcc_watch_stream_total") != 0.0 {
        assert!(Instant::now() < deadline, "calls outlive their client");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn thousands_of_idle_connections() {
    const COUNT: usize = 5000;
    let (_, files) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .expect("there is a limit");
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, files, files)
        .expect("the soft limit may be raised");
    assert!(files > COUNT as u64 + 200, "the file limit is too low for this test: {files}");
    let target = Target::start(&[]);
    let mut idle = Vec::with_capacity(COUNT);
    for n in 0..COUNT {
        match n % 5 {
            0 => {
                let silent = TcpStream::connect(target.server.addr).expect("it listens");
                idle.push(silent);
            }
            _ => {
                let mut raw = Raw::connect(target.server.addr);
                if n % 500 == 1 {
                    raw.ping();
                    raw.wait_pong();
                }
                idle.push(raw.stream);
            }
        }
    }
    target.assert_unharmed(COUNT * (24 << 10), "5000 idle connections");
    let mut last = Raw { stream: idle.pop().expect("there are some") };
    last.open_watch(1);
    drop(idle);
    target.server.assert_serves();
}

#[test]
fn connections_that_say_nothing_make_room() {
    // 250 connections, as 150 files are kept for the member itself.
    let target = Target::of(Server::start_with_files(400, &[]));
    let mut connections = Vec::new();
    let mut working = Raw::connect(target.server.addr);
    working.open_watch(1);
    for n in 0..600 {
        let mut stream = TcpStream::connect(target.server.addr).expect("the backlog is long");
        if n % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\nX: ").expect("there is room");
        }
        connections.push(stream);
    }
    target.assert_unharmed(64 << 20, "more connections than there may be");
    assert!(target.server.metric("quorate_connections_closed_for_room_total") >= 1.0);
    // One with a call is not idle.
    working.ping();
    working.wait_pong();
}

#[test]
fn headers_that_dribble() {
    let target = Target::start(&[]);
    let addr = target.server.addr;
    let mut slow: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = TcpStream::connect(addr).expect("it listens");
            stream.write_all(b"GET /health HTTP/1.1\r\nX-").expect("there is room");
            stream
        })
        .collect();
    let mut dribbling = Raw::connect(addr);
    let whole = head(1, WATCH);
    let mut begun = whole[..whole.len() - 10].to_vec();
    begun[4] = 0; // the block goes on
    dribbling.send(&begun);
    let mut continued = Raw::connect(addr);
    continued.send(&[&begun[..], &[0; 10]].concat());
    let started = Instant::now();
    let mut ended = [false, false];
    while ended != [true, true] {
        for stream in &mut slow {
            stream.write_all(b"a").expect("HTTP/1.1 has five minutes");
        }
        // Each a byte of the payload that is missing, and empty frames that go on with the block.
        ended[0] = ended[0] || dribbling.stream.write_all(&[0]).is_err();
        let empty = frame(CONTINUATION, 0, 1, &[]);
        ended[1] = ended[1] || continued.stream.write_all(&empty).is_err();
        target.server.assert_serves();
        assert!(started.elapsed() < 2 * PATIENCE, "headers dribble for ever: {ended:?}");
        std::thread::sleep(Duration::from_secs(4));
    }
    target.assert_unharmed(64 << 20, "slow headers");
}

#[test]
fn giant_headers() {
    let target = Target::start(&[]);
    let server = &target.server;
    let giant = "h".repeat(60_000);
    // Refused or served, and never in the way of others.
    let mut attack = Attack::on(&target);
    for (fields, connections) in [(7, 4), (20, 2), (40, 1)] {
        let names: Vec<String> = (0..fields).map(|n| format!("x-{n}")).collect();
        let headers: Vec<_> = names.iter().map(|name| (&name[..], &giant[..])).collect();
        for _ in 0..connections {
            attack.connect(65_535);
            for _ in 0..150 {
                attack.call(PUT, &headers, Bytes::new(), false);
            }
        }
    }
    target.assert_unharmed(640 << 20, "giant headers");
    drop(attack);
    // More names than the map of headers has places; each twice in what a client may send.
    let field = |n: usize| {
        let name = format!("{n:05x}");
        [&[0, name.len() as u8][..], name.as_bytes(), &[0]].concat()
    };
    let mut raw = Raw::connect(server.addr);
    let mut first = head(1, WATCH);
    first[4] = 0;
    raw.send(&first);
    let all: Vec<u8> = (0..40_000).flat_map(field).collect();
    for (nth, part) in all.chunks(16_000).enumerate() {
        let flags = if (nth + 1) * 16_000 >= all.len() { END_HEADERS } else { 0 };
        if raw.stream.write_all(&frame(CONTINUATION, flags, 1, part)).is_err() {
            break;
        }
    }
    server.assert_serves();
    // A path without end, and metadata that is no text.
    let mut raw = Raw::connect(server.addr);
    let literal = |name: &str, value: &[u8]| {
        let mut field = vec![0, name.len() as u8];
        field.extend(name.as_bytes());
        let mut length = value.len();
        if length < 127 {
            field.push(length as u8);
        } else {
            field.push(127);
            length -= 127;
            while length >= 128 {
                field.push(length as u8 | 128);
                length >>= 7;
            }
            field.push(length as u8);
        }
        field.extend(value);
        field
    };
    let path = format!("/{}", "p".repeat(15_000));
    let block = [
        literal(":method", b"POST"),
        literal(":scheme", b"http"),
        literal(":path", path.as_bytes()),
        literal("content-type", b"application/grpc"),
    ];
    raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block.concat()));
    let answer = raw.wait("an answer", |frame| frame.stream == 1);
    assert!(matches!(answer.kind, HEADERS | RST_STREAM), "{answer:?}");
    let junk: Vec<u8> = (128..=255).collect();
    for (stream, name) in [(3, "x-bin"), (5, "token"), (7, "grpc-timeout"), (9, "hasleader")] {
        let mut block = head(stream, STATUS)[9..].to_vec();
        block.extend(literal(name, &junk));
        raw.send(&frame(HEADERS, END_HEADERS, stream, &block));
        raw.send(&message(stream, &pb::StatusRequest {}, true));
        let answer = raw.wait("an answer", |frame| frame.stream == stream);
        assert!(matches!(answer.kind, HEADERS | RST_STREAM), "{name}: {answer:?}");
    }
    raw.open_watch(11);
    server.assert_serves();
}

#[test]
fn connections_end_at_their_age() {
    let flags = ["--max-connection-age=1s", "--max-connection-age-grace=1s"];
    let target = Target::start(&flags);
    let mut idle = Raw::connect(target.server.addr);
    let mut busy = Raw::connect(target.server.addr);
    busy.open_watch(1);
    for raw in [&mut idle, &mut busy] {
        let goaway = raw.wait("GOAWAY", |frame| frame.kind == GOAWAY);
        assert_eq!(goaway.payload[4..8], u32::from(Reason::NO_ERROR).to_be_bytes());
        while raw.next().is_some() {}
    }
    target.server.assert_serves();
}
