//! What a client can do to a member: pings without end, floods, silence, messages that are too deep or
//! too great. Raw sockets where a well-behaved client would not do it, h2 where its answer matters.
mod ports;
mod raw;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use prost::Message;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::request_op::Request as Op;
use raw::*;

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
