//! What a client can do to a member: pings without end, floods, silence, messages that are too deep or
//! too great. Raw sockets where a well-behaved client would not do it, h2 where its answer matters.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::request_op::Request as Op;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;

const QUORATE: &str = env!("CARGO_BIN_EXE_quorate");
const ETCD: &str = "/usr/bin/etcd";
/// For what takes moments on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);

const PUT: &str = "/etcdserverpb.KV/Put";
const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
const WATCH: &str = "/etcdserverpb.Watch/Watch";
const STATUS: &str = "/etcdserverpb.Maintenance/Status";

/// A member of its own cluster; killed at the end.
struct Server {
    child: Child,
    addr: SocketAddr,
    dir: tempfile::TempDir,
    ports: (u16, u16),
}

impl Server {
    fn start(program: &str, flags: &[&str]) -> Server {
        let dir = tempfile::tempdir().expect("there is room for a directory");
        let free = || {
            let socket = TcpListener::bind("127.0.0.1:0").expect("a port is free");
            socket.local_addr().expect("it is bound").port()
        };
        for _ in 0..5 {
            let ports = (free(), free());
            if let Some(child) = Self::spawn(program, dir.path(), ports, flags) {
                return Server { child, addr: ([127, 0, 0, 1], ports.0).into(), dir, ports };
            }
        }
        panic!("{program} does not start");
    }

    /// Returns once the member says that it serves; `None` if it ends instead: a port was taken.
    fn spawn(
        program: &str,
        dir: &std::path::Path,
        ports: (u16, u16),
        flags: &[&str],
    ) -> Option<Child> {
        let (client, peer) =
            (format!("http://127.0.0.1:{}", ports.0), format!("http://127.0.0.1:{}", ports.1));
        let mut child = Command::new(program)
            .env_clear()
            .args(["--name=m", "--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client, "--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}")])
            .arg("--data-dir")
            .arg(dir.join("data"))
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program is there");
        let log = BufReader::new(child.stderr.take().expect("it is piped"));
        let (ready, served) = mpsc::channel();
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if line.contains("ready to serve client requests") {
                    // Nobody waits for the second listener.
                    ready.send(()).ok();
                }
            }
        });
        if served.recv_timeout(PATIENCE).is_err() {
            child.kill().ok();
            child.wait().expect("it is ours");
            return None;
        }
        Some(child)
    }

    fn restart(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is ours");
        self.child =
            Self::spawn(QUORATE, self.dir.path(), self.ports, &[]).expect("it starts again");
    }

    fn resident_bytes(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id()));
        let pages = statm.expect("the member runs");
        let pages: usize =
            pages.split(' ').nth(1).expect("a second field").parse().expect("a number");
        pages * 4096
    }

    fn call(&self, path: &str, request: &impl Message) -> Reply {
        self.call_raw(path, &request.encode_to_vec())
    }

    fn call_raw(&self, path: &str, message: &[u8]) -> Reply {
        call(self.addr, path, None, message)
    }

    /// That the member serves others, whatever was done to it.
    fn assert_serves(&self) {
        let reply = self.call(PUT, &put(b"alive", b"yes".to_vec()));
        assert_eq!(reply.code, 0, "{}", reply.message);
        let range = pb::RangeRequest { key: "alive".into(), ..Default::default() };
        let reply = self.call(RANGE, &range);
        let kvs = pb::RangeResponse::decode(reply.body).expect("it decodes").kvs;
        assert_eq!(&kvs[0].parse().expect("a pair").value[..], b"yes");
    }

    fn metric(&self, name: &str) -> f64 {
        let mut stream = TcpStream::connect(self.addr).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .expect("it reads");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("a page");
        let line = page.lines().find(|line| line.split(' ').next() == Some(name));
        let value = line.unwrap_or_else(|| panic!("no {name}")).rsplit(' ').next();
        value.expect("a value").parse().expect("a number")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn put(key: &[u8], value: Vec<u8>) -> pb::PutRequest {
    pb::PutRequest { key: Bytes::copy_from_slice(key), value: value.into(), ..Default::default() }
}

#[derive(Debug)]
struct Reply {
    code: i32,
    message: String,
    body: Bytes,
}

/// A message as gRPC frames it.
fn framed(message: &[u8], compressed: bool) -> Vec<u8> {
    let mut framed = vec![u8::from(compressed)];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    framed
}

/// One unary call on a connection of its own.
fn call(addr: SocketAddr, path: &str, encoding: Option<&str>, message: &[u8]) -> Reply {
    let body = Bytes::from(framed(message, encoding.is_some()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let work = async {
        let stream = tokio::net::TcpStream::connect(addr).await.expect("it listens");
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(1 << 30)
            .initial_connection_window_size(1 << 30)
            .handshake::<_, Bytes>(stream)
            .await
            .expect("it speaks HTTP/2");
        let driver = tokio::spawn(connection);
        let mut request = http::Request::post(format!("http://{addr}{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        if let Some(encoding) = encoding {
            request = request.header("grpc-encoding", encoding);
        }
        let mut sender = sender.ready().await.expect("a stream is free");
        let request = request.body(()).expect("a request");
        let (response, mut send) = sender.send_request(request, false).expect("it is sent");
        send.send_data(body, true).expect("it is sent");
        let (head, mut incoming) = response.await.expect("an answer").into_parts();
        let mut body = Vec::new();
        while let Some(chunk) = incoming.data().await {
            // A response that ends early still has its trailers.
            let Ok(chunk) = chunk else { break };
            body.extend(chunk);
        }
        let trailers = match head.headers.contains_key("grpc-status") {
            true => head.headers,
            false => incoming.trailers().await.expect("an end").expect("trailers"),
        };
        driver.abort();
        let text = |name: &str| {
            trailers.get(name).map_or("", |value| value.to_str().expect("text")).to_string()
        };
        Reply {
            code: text("grpc-status").parse().expect("a code"),
            message: text("grpc-message").replace("%20", " "),
            body: body.split_off(body.len().min(5)).into(),
        }
    };
    let bounded = async { tokio::time::timeout(PATIENCE, work).await.expect("an answer in time") };
    runtime.expect("a runtime starts").block_on(bounded)
}

/// An HTTP/2 connection that does as it is told.
struct Raw {
    stream: TcpStream,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// HEADERS of a gRPC call, every field a literal.
fn head(stream: u32, path: &str) -> Vec<u8> {
    head_for(stream, path, "localhost")
}

fn head_for(stream: u32, path: &str, authority: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.extend([0, name.len() as u8]);
        block.extend(name.as_bytes());
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

fn message(stream: u32, message: &impl Message, end: bool) -> Vec<u8> {
    let body = framed(&message.encode_to_vec(), false);
    frame(DATA, if end { END_STREAM } else { 0 }, stream, &body)
}

fn watch_all(from: i64) -> pb::WatchRequest {
    pb::WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(pb::WatchCreateRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            start_revision: from,
            ..Default::default()
        })),
    }
}

impl Raw {
    fn connect(addr: SocketAddr) -> Raw {
        let mut stream = TcpStream::connect(addr).expect("it listens");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("it reads");
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).expect("it reads");
        Raw { stream }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the member reads");
    }

    fn ping(&mut self) {
        self.send(&frame(PING, 0, 0, &[1; 8]));
    }

    /// The next frame; `None` at the end of the connection.
    fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        match self.stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ) =>
            {
                return None;
            }
            Err(error) => panic!("{error}"),
        }
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        self.stream.read_exact(&mut payload).expect("frames are whole");
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if head[3] == PING && head[4] & ACK == 0 {
            // The other side may be gone by now.
            self.stream.write_all(&frame(PING, ACK, 0, &payload)).ok();
        }
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    fn wait(&mut self, what: &str, mut wanted: impl FnMut(&Frame) -> bool) -> Frame {
        loop {
            let frame = self.next().unwrap_or_else(|| panic!("ended before {what}"));
            if wanted(&frame) {
                return frame;
            }
        }
    }

    fn wait_pong(&mut self) {
        self.wait("the answer to a ping", |frame| frame.kind == PING && frame.flags & ACK != 0);
    }

    fn open_watch(&mut self, stream: u32) {
        self.send(&head(stream, WATCH));
        self.send(&message(stream, &watch_all(0), false));
        self.wait("a created watch", |frame| frame.kind == DATA && frame.stream == stream);
    }

    /// The member sends the client away over its pings, and hangs up.
    fn assert_sent_away(&mut self) {
        let goaway = self.wait("GOAWAY", |frame| frame.kind == GOAWAY);
        assert_eq!(&goaway.payload[4..8], [0, 0, 0, 11], "ENHANCE_YOUR_CALM");
        assert_eq!(&goaway.payload[8..], b"too_many_pings");
        assert!(self.next().is_none(), "nothing comes after it");
    }
}

/// etcd as installed is asked the same: these rules are gRPC's, and clients are built to them.
const BOTH: [&str; 2] = [QUORATE, ETCD];

#[test]
fn pings_without_a_stream_end_the_connection() {
    for program in BOTH {
        let server = Server::start(program, &[]);
        let mut raw = Raw::connect(server.addr);
        for _ in 0..3 {
            raw.ping();
            raw.wait_pong();
        }
        raw.ping();
        raw.assert_sent_away();
    }
}

#[test]
fn pings_with_a_stream_may_come_as_often_as_configured() {
    for program in BOTH {
        let server = Server::start(program, &["--grpc-keepalive-min-time=100ms"]);
        let mut raw = Raw::connect(server.addr);
        raw.open_watch(1);
        for _ in 0..8 {
            raw.ping();
            raw.wait_pong();
            // The pace is what is tested.
            std::thread::sleep(Duration::from_millis(120));
        }
        // The first of these is in time.
        raw.send(&frame(PING, 0, 0, &[1; 8]).repeat(4));
        raw.assert_sent_away();
    }
}

#[test]
fn an_answer_forgives_pings() {
    for program in BOTH {
        let server = Server::start(program, &[]);
        let mut raw = Raw::connect(server.addr);
        for stream in [1, 3, 5, 7] {
            for _ in 0..3 {
                raw.ping();
                raw.wait_pong();
            }
            raw.send(&head(stream, STATUS));
            raw.send(&message(stream, &pb::StatusRequest {}, true));
            raw.wait("trailers", |frame| frame.stream == stream && frame.flags & END_STREAM != 0);
        }
        raw.send(&frame(PING, 0, 0, &[1; 8]).repeat(4));
        raw.assert_sent_away();
    }
}

/// What etcd's clients say to whom they speak: 3.4 as its user named the endpoint, 3.5 in a list.
#[test]
fn authorities_that_are_none_are_served() {
    for program in BOTH {
        let server = Server::start(program, &["--host-whitelist=elsewhere"]);
        let mut raw = Raw::connect(server.addr);
        let authorities = [
            format!("http://{}", server.addr),
            "#initially=[http://127.0.0.1:1]".to_string(),
            "http://one:2379,http://two:2379".to_string(),
            "localhost".to_string(),
        ];
        for (stream, authority) in (1..).step_by(2).zip(&authorities) {
            raw.send(&status_of(stream, authority));
            let answer = raw.wait(authority, |frame| {
                let is_end = frame.flags & END_STREAM != 0 || frame.kind == RST_STREAM;
                frame.stream == stream && (frame.kind == DATA || is_end)
            });
            assert_eq!(answer.kind, DATA, "{program}: {authority}: {answer:?}");
        }
        // Where the request is cut must not matter.
        let request = status_of(101, &authorities[1]);
        for byte in &request {
            raw.send(&[*byte]);
        }
        raw.wait("a response", |frame| frame.kind == DATA && frame.stream == 101);
    }
}

/// A call of Status under `authority`.
fn status_of(stream: u32, authority: &str) -> Vec<u8> {
    let mut call = head_for(stream, STATUS, authority);
    call.extend(message(stream, &pb::StatusRequest {}, true));
    call
}

#[test]
fn pings_of_a_flood_do_not_hold_up_others() {
    let server = Server::start(QUORATE, &[]);
    let mut raw = Raw::connect(server.addr);
    let flood = frame(PING, 0, 0, &[1; 8]).repeat(10_000);
    // The member may hang up in the middle of it.
    let sent = raw.stream.write_all(&flood);
    if let Err(error) = &sent {
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
    }
    server.assert_serves();
}

#[test]
fn concurrent_streams_are_as_many_as_configured() {
    let server = Server::start(QUORATE, &["--max-concurrent-streams=3"]);
    let mut raw = Raw::connect(server.addr);
    let settings = raw.wait("SETTINGS", |frame| frame.kind == SETTINGS && frame.flags & ACK == 0);
    assert!(settings.payload.chunks(6).any(|setting| setting == [0, 3, 0, 0, 0, 3]));
    for stream in [1, 3, 5] {
        raw.open_watch(stream);
    }
    raw.send(&head(7, WATCH));
    let refused = raw.wait("RST_STREAM", |frame| frame.kind == RST_STREAM && frame.stream == 7);
    assert_eq!(refused.payload, [0, 0, 0, 7], "REFUSED_STREAM");
    raw.send(&frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]));
    raw.open_watch(9);
}

#[test]
fn idle_connections_and_streams_cost_little() {
    let server = Server::start(QUORATE, &[]);
    server.assert_serves();
    let before = server.resident_bytes();
    let connections: Vec<Raw> = (0..500).map(|_| Raw::connect(server.addr)).collect();
    let silent: Vec<TcpStream> =
        (0..200).map(|_| TcpStream::connect(server.addr).expect("it listens")).collect();
    let mut raw = Raw::connect(server.addr);
    raw.send(&frame(WINDOW_UPDATE, 0, 0, &(1u32 << 24).to_be_bytes()));
    for n in 0..2000 {
        let stream = 2 * n + 1;
        raw.send(&head(stream, WATCH));
        raw.send(&message(stream, &watch_all(0), false));
        if n % 50 == 49 {
            raw.wait("a created watch", |frame| frame.kind == DATA && frame.stream == stream);
        }
    }
    server.assert_serves();
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 160 << 20, "{grown} bytes for 700 connections and 2000 streams");
    drop((connections, silent));
}

#[test]
fn a_header_flood_ends_its_connection() {
    let server = Server::start(QUORATE, &[]);
    server.assert_serves();
    let before = server.resident_bytes();
    let mut raw = Raw::connect(server.addr);
    let mut first = head(1, WATCH);
    first[4] = 0; // the block goes on
    raw.send(&first);
    // One field of a new name each time, as long as a byte of length tells.
    let field = [&[0, 100][..], &[b'a'; 100], &[100], &[b'b'; 100]].concat();
    let more = frame(CONTINUATION, 0, 1, &field.repeat(80));
    let mut sent = 0;
    while raw.stream.write_all(&more).is_ok() {
        sent += more.len();
        assert!(sent < 256 << 20, "headers are taken without end");
    }
    server.assert_serves();
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 128 << 20, "{grown} bytes after {sent} of headers");
}

#[test]
fn streams_opened_and_reset_at_once_do_no_harm() {
    let server = Server::start(QUORATE, &[]);
    server.assert_serves();
    let before = server.resident_bytes();
    let mut raw = Raw::connect(server.addr);
    let mut stream = 1;
    let mut ended = false;
    'flood: for _ in 0..100 {
        let mut burst = Vec::new();
        for _ in 0..500 {
            burst.extend(head(stream, WATCH));
            burst.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
            stream += 2;
        }
        if raw.stream.write_all(&burst).is_err() {
            ended = true;
            break 'flood;
        }
    }
    server.assert_serves();
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes after {stream} streams");
    // The burst is above what may be taken back unseen; or else all of it was served.
    if !ended {
        while raw.next().is_some_and(|frame| frame.kind != GOAWAY) {}
    }
}

#[test]
fn a_burst_of_cancelled_calls_is_no_attack() {
    let server = Server::start(QUORATE, &[]);
    let mut raw = Raw::connect(server.addr);
    let mut burst = Vec::new();
    for n in 0..150 {
        burst.extend(head(2 * n + 1, PUT));
        burst.extend(message(2 * n + 1, &put(b"k", vec![b'v'; 10]), true));
        burst.extend(frame(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]));
    }
    raw.send(&burst);
    raw.open_watch(1001);
    let deadline = Instant::now() + PATIENCE;
    while server.metric("etcd_server_proposals_pending") != 0.0 {
        assert!(Instant::now() < deadline, "cancelled proposals are counted for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn frames_of_an_unknown_kind_are_passed_over() {
    let server = Server::start(QUORATE, &[]);
    let mut raw = Raw::connect(server.addr);
    raw.send(&frame(0xfa, 0xff, 0, b"whatever"));
    raw.send(&frame(0xfb, 0xff, 1, &[]));
    let mut flagged = head(1, STATUS);
    flagged[4] |= 0xc2; // flags that mean nothing
    raw.send(&flagged);
    let mut body = message(1, &pb::StatusRequest {}, true);
    body[4] |= 0xf6;
    raw.send(&body);
    raw.wait("trailers", |frame| frame.stream == 1 && frame.flags & END_STREAM != 0);
}

/// `depth` transactions in each other, the innermost with a put.
fn nested(depth: usize) -> Vec<u8> {
    let varint = |mut n: usize, out: &mut Vec<u8>| {
        while n > 0x7f {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
    };
    // From the inside out, written backwards: lengths first known, then the whole reversed.
    let put = put(b"deep", b"v".to_vec()).encode_to_vec();
    let mut reversed: Vec<u8> = put.iter().rev().copied().collect();
    for level in 0..=depth {
        // RequestOp: field 2 is a put, 4 a transaction; TxnRequest: field 2 are its operations.
        for field in [if level == 0 { 2 } else { 4 }, 2] {
            let mut key = vec![(field << 3 | 2) as u8];
            varint(reversed.len(), &mut key);
            reversed.extend(key.iter().rev());
        }
    }
    reversed.reverse();
    reversed
}

#[test]
fn nesting_is_bounded() {
    let decoded = pb::TxnRequest::decode(&nested(1)[..]).expect("it is well formed");
    assert!(matches!(decoded.success[0].request, Some(Op::RequestTxn(_))));
    let mut server = Server::start(QUORATE, &[]);
    let (mut deepest, mut refused) = (0, 0);
    for depth in [0, 1, 20, 40, 44, 45, 46, 47, 48, 49, 50, 51, 60, 128, 1000, 100_000] {
        let reply = server.call_raw(TXN, &nested(depth));
        match reply.code {
            0 => deepest = depth,
            // One that is too deep cannot be read.
            3 | 13 => refused += 1,
            code => panic!("depth {depth}: {code} {}", reply.message),
        }
    }
    assert!(deepest >= 40 && refused >= 5, "{deepest} deep, {refused} refused");
    server.assert_serves();
    // What was accepted can be read again from the log.
    server.restart();
    let range = pb::RangeRequest { key: "deep".into(), ..Default::default() };
    let reply = server.call(RANGE, &range);
    assert_eq!(pb::RangeResponse::decode(reply.body).expect("it decodes").count, 1);
}

#[test]
fn text_that_is_none_is_refused() {
    let server = Server::start(QUORATE, &[]);
    // MemberAddRequest.peerURLs, a string.
    let reply = server.call_raw("/etcdserverpb.Cluster/MemberAdd", &[0x0a, 2, 0xff, 0xfe]);
    assert_eq!(reply.code, 13, "{}", reply.message);
    // As bytes it is as good as any.
    let reply = server.call(PUT, &put(&[0xff, 0xfe], vec![0xff]));
    assert_eq!(reply.code, 0, "{}", reply.message);
    // Cut in the middle of a field, and a length beyond the end.
    for broken in [&[0x0a][..], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], &[0x0c], &[0xff; 20]] {
        assert_eq!(server.call_raw(PUT, broken).code, 13, "{broken:?}");
    }
    server.assert_serves();
}

#[test]
fn a_message_that_unpacks_to_too_much_is_refused() {
    let server = Server::start(QUORATE, &[]);
    server.assert_serves();
    let before = server.resident_bytes();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    for _ in 0..256 {
        encoder.write_all(&[0; 1 << 20]).expect("a vector takes it");
    }
    let bomb = encoder.finish().expect("a vector takes it");
    assert!(bomb.len() < 1 << 20);
    let reply = call(server.addr, PUT, Some("gzip"), &bomb);
    assert!(matches!(reply.code, 8 | 11 | 13), "{reply:?}");
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let request = put(b"zipped", b"v".to_vec()).encode_to_vec();
    encoder.write_all(&request).expect("a vector takes it");
    let zipped = encoder.finish().expect("a vector takes it");
    let reply = call(server.addr, PUT, Some("gzip"), &zipped);
    assert_eq!(reply.code, 0, "{}", reply.message);
}

#[test]
fn a_late_physical_compaction_is_refused_and_not_forgotten() {
    let server = Server::start(QUORATE, &[]);
    for n in 0..5u8 {
        assert_eq!(server.call(PUT, &put(b"k", vec![n])).code, 0);
    }
    let compact = pb::CompactionRequest { revision: 4, physical: true };
    let path = "/etcdserverpb.KV/Compact";
    let reply = server.call(path, &compact);
    assert_eq!(reply.code, 0, "{}", reply.message);
    let reply = server.call(path, &compact);
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    assert_eq!((reply.code, &reply.message[..]), (11, compacted));
}

/// Values of nearly the greatest size: two or three fill a response.
fn put_great_values(server: &Server, count: usize) {
    for n in 0..count {
        let key = format!("great{n:03}");
        let reply = server.call(PUT, &put(key.as_bytes(), vec![n as u8; 1_400_000]));
        assert_eq!(reply.code, 0, "{}", reply.message);
    }
}

#[test]
fn clients_that_do_not_read_hold_up_nobody() {
    const VALUES: usize = 60;
    let mut server = Server::start(QUORATE, &[]);
    put_great_values(&server, VALUES);
    // The windows of these clients are the least there are, and are never opened.
    let mut raw = Raw::connect(server.addr);
    let all = pb::RangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    raw.send(&head(1, RANGE));
    raw.send(&message(1, &all, true));
    raw.send(&head(3, "/etcdserverpb.Maintenance/Snapshot"));
    raw.send(&message(3, &pb::SnapshotRequest {}, true));
    raw.send(&head(5, WATCH));
    raw.send(&message(5, &watch_all(1), false));
    raw.wait("something of the range", |frame| frame.kind == DATA);
    let started = Instant::now();
    for _ in 0..10 {
        server.assert_serves();
    }
    assert!(started.elapsed() < Duration::from_secs(20), "others wait");

    // Another reads its watch from the beginning; nothing is missing, nothing stalls.
    let mut reader = Raw::connect(server.addr);
    let wide = ((1u32 << 30) - 1).to_be_bytes();
    let mut window = vec![0, 4];
    window.extend(wide);
    reader.send(&frame(SETTINGS, 0, 0, &window));
    reader.send(&frame(WINDOW_UPDATE, 0, 0, &wide));
    reader.send(&head(1, WATCH));
    reader.send(&message(1, &watch_all(1), false));
    let (mut bytes, mut seen) = (Vec::new(), 0);
    while seen < VALUES {
        bytes.extend(reader.wait("events", |frame| frame.kind == DATA).payload);
        while bytes.len() >= 5 {
            let len = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) as usize;
            if bytes.len() < 5 + len {
                break;
            }
            let response = pb::WatchResponse::decode(&bytes[5..5 + len]).expect("it decodes");
            bytes.drain(..5 + len);
            for event in response.events {
                let pair = event.kv.expect("an event has a pair").parse().expect("a pair");
                if pair.key.starts_with(b"great") {
                    assert_eq!(pair.key, format!("great{seen:03}"), "in order, each once");
                    seen += 1;
                }
            }
        }
    }

    // The member stops although they still do not read.
    let pid = nix::unistd::Pid::from_raw(server.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    assert_ended_within(&mut server, Duration::from_secs(20));
}

fn assert_ended_within(server: &mut Server, limit: Duration) {
    let deadline = Instant::now() + limit;
    while server.child.try_wait().expect("it is ours").is_none() {
        assert!(Instant::now() < deadline, "the member does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn streams_are_told_when_the_member_stops() {
    let mut server = Server::start(QUORATE, &[]);
    // Accepted before the others, which are answered.
    let mut silent = TcpStream::connect(server.addr).expect("it listens");
    let mut raw = Raw::connect(server.addr);
    raw.open_watch(1);
    raw.send(&head(3, "/etcdserverpb.Lease/LeaseKeepAlive"));
    raw.ping();
    raw.wait_pong();
    let mut idle = Raw::connect(server.addr);
    idle.ping();
    idle.wait_pong();
    let pid = nix::unistd::Pid::from_raw(server.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
    raw.wait("GOAWAY", |frame| frame.kind == GOAWAY);
    raw.wait("trailers", |frame| frame.kind == HEADERS && frame.flags & END_STREAM != 0);
    while raw.next().is_some() {}
    idle.wait("GOAWAY", |frame| frame.kind == GOAWAY);
    while idle.next().is_some() {}
    assert_eq!(silent.read(&mut [0; 1]).expect("it is closed"), 0);
    assert_ended_within(&mut server, Duration::from_secs(5));
}
