//! A member as a process, and clients that do as they are told: raw HTTP/2, and one call at a time.

#![allow(dead_code, reason = "each of the tests that share this uses a part")]

use crate::ports::free_port;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;

pub const QUORATE: &str = env!("CARGO_BIN_EXE_quorate");
pub const ETCD: &str = "/usr/bin/etcd";
/// For what takes moments on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const PUT: &str = "/etcdserverpb.KV/Put";
pub const RANGE: &str = "/etcdserverpb.KV/Range";
pub const TXN: &str = "/etcdserverpb.KV/Txn";
pub const WATCH: &str = "/etcdserverpb.Watch/Watch";
pub const STATUS: &str = "/etcdserverpb.Maintenance/Status";

/// A member of its own cluster; killed at the end.
pub struct Server {
    pub child: Child,
    pub addr: SocketAddr,
    pub dir: tempfile::TempDir,
    pub ports: (u16, u16),
}

impl Server {
    pub fn start(program: &str, flags: &[&str]) -> Server {
        Self::start_by(&|| Command::new(program), flags)
    }

    /// One that may have so many files open.
    pub fn start_with_files(files: u32, flags: &[&str]) -> Server {
        let limited = || {
            let mut shell = Command::new("sh");
            let script = format!("ulimit -n {files} && exec \"$0\" \"$@\"");
            shell.args(["-c", &script, QUORATE]);
            shell
        };
        Self::start_by(&limited, flags)
    }

    fn start_by(program: &dyn Fn() -> Command, flags: &[&str]) -> Server {
        let dir = tempfile::tempdir().expect("there is room for a directory");
        let ports = (free_port(), free_port());
        let child = Self::spawn(program(), dir.path(), ports, flags).expect("it starts");
        Server { child, addr: ([127, 0, 0, 1], ports.0).into(), dir, ports }
    }

    /// Returns once the member says that it serves; `None` if it ends instead.
    pub fn spawn(
        mut command: Command,
        dir: &std::path::Path,
        ports: (u16, u16),
        flags: &[&str],
    ) -> Option<Child> {
        let (client, peer) =
            (format!("http://127.0.0.1:{}", ports.0), format!("http://127.0.0.1:{}", ports.1));
        let mut child = command
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

    pub fn restart(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is ours");
        self.child = Self::spawn(Command::new(QUORATE), self.dir.path(), self.ports, &[])
            .expect("it starts again");
    }

    pub fn resident_bytes(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id()));
        let pages = statm.expect("the member runs");
        let pages: usize =
            pages.split(' ').nth(1).expect("a second field").parse().expect("a number");
        pages * 4096
    }

    pub fn call(&self, path: &str, request: &impl Message) -> Reply {
        self.call_raw(path, &request.encode_to_vec())
    }

    pub fn call_raw(&self, path: &str, message: &[u8]) -> Reply {
        call(self.addr, path, None, message)
    }

    /// That the member serves others, whatever was done to it.
    pub fn assert_serves(&self) {
        let reply = self.call(PUT, &put(b"alive", b"yes".to_vec()));
        assert_eq!(reply.code, 0, "{}", reply.message);
        let range = pb::RangeRequest { key: "alive".into(), ..Default::default() };
        let reply = self.call(RANGE, &range);
        let kvs = pb::RangeResponse::decode(reply.body).expect("it decodes").kvs;
        assert_eq!(&kvs[0].parse().expect("a pair").value[..], b"yes");
    }

    pub fn metric(&self, name: &str) -> f64 {
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

pub fn put(key: &[u8], value: Vec<u8>) -> pb::PutRequest {
    pb::PutRequest { key: Bytes::copy_from_slice(key), value: value.into(), ..Default::default() }
}

#[derive(Debug)]
pub struct Reply {
    pub code: i32,
    pub message: String,
    pub body: Bytes,
}

/// A message as gRPC frames it.
pub fn framed(message: &[u8], compressed: bool) -> Vec<u8> {
    let mut framed = vec![u8::from(compressed)];
    framed.extend((message.len() as u32).to_be_bytes());
    framed.extend(message);
    framed
}

/// One unary call on a connection of its own.
pub fn call(addr: SocketAddr, path: &str, encoding: Option<&str>, message: &[u8]) -> Reply {
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
pub struct Raw {
    pub stream: TcpStream,
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// HEADERS of a gRPC call, every field a literal.
pub fn head(stream: u32, path: &str) -> Vec<u8> {
    head_for(stream, path, "localhost")
}

pub fn head_for(stream: u32, path: &str, authority: &str) -> Vec<u8> {
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

pub fn message(stream: u32, message: &impl Message, end: bool) -> Vec<u8> {
    let body = framed(&message.encode_to_vec(), false);
    frame(DATA, if end { END_STREAM } else { 0 }, stream, &body)
}

pub fn watch_all(from: i64) -> pb::WatchRequest {
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
    pub fn connect(addr: SocketAddr) -> Raw {
        let mut stream = TcpStream::connect(addr).expect("it listens");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("it reads");
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).expect("it reads");
        Raw { stream }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the member reads");
    }

    pub fn ping(&mut self) {
        self.send(&frame(PING, 0, 0, &[1; 8]));
    }

    /// The next frame; `None` at the end of the connection.
    pub fn next(&mut self) -> Option<Frame> {
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

    pub fn wait(&mut self, what: &str, mut wanted: impl FnMut(&Frame) -> bool) -> Frame {
        loop {
            let frame = self.next().unwrap_or_else(|| panic!("ended before {what}"));
            if wanted(&frame) {
                return frame;
            }
        }
    }

    pub fn wait_pong(&mut self) {
        self.wait("the answer to a ping", |frame| frame.kind == PING && frame.flags & ACK != 0);
    }

    pub fn open_watch(&mut self, stream: u32) {
        self.send(&head(stream, WATCH));
        self.send(&message(stream, &watch_all(0), false));
        self.wait("a created watch", |frame| frame.kind == DATA && frame.stream == stream);
    }

    /// The member sends the client away over its pings, and hangs up.
    pub fn assert_sent_away(&mut self) {
        let goaway = self.wait("GOAWAY", |frame| frame.kind == GOAWAY);
        assert_eq!(&goaway.payload[4..8], [0, 0, 0, 11], "ENHANCE_YOUR_CALM");
        assert_eq!(&goaway.payload[8..], b"too_many_pings");
        assert!(self.next().is_none(), "nothing comes after it");
    }
}
