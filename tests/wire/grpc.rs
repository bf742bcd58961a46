//! gRPC and HTTP below the messages: metadata, framing, compression, texts of refusals, streams.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, Request, StatusCode};
use prost::Message;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;
use quorate_proto::health as healthpb;
use quorate_proto::health::health_check_response::ServingStatus;
use tonic::Code;
use tonic::codec::CompressionEncoding;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic_reflection::pb::v1 as reflection;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::server::{
    Kind, Member, PATIENCE, error, get, keys, kv, op, put_of, revision, said, span,
};

/// A call without a gRPC library.
struct Raw {
    status: StatusCode,
    headers: HeaderMap,
    trailers: HeaderMap,
    body: Bytes,
}

impl Raw {
    /// The gRPC status, wherever it is, its text decoded.
    fn said(&self) -> (Code, String) {
        let find = |name| self.trailers.get(name).or_else(|| self.headers.get(name));
        let code = find("grpc-status").expect("a status").to_str().unwrap().parse().unwrap();
        let text = find("grpc-message").map_or("", |text| text.to_str().unwrap());
        (Code::from_i32(code), decoded(text))
    }
}

/// Percent-decoded.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' && rest.len() >= 2 {
            let digits = std::str::from_utf8(&rest[..2]).unwrap();
            bytes.push(u8::from_str_radix(digits, 16).unwrap());
            rest = &rest[2..];
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// One HTTP/2 request, by prior knowledge.
async fn raw(member: &Member, request: http::request::Builder, body: Bytes) -> Raw {
    let exchange = async {
        let stream = tokio::net::TcpStream::connect(member.endpoint()).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        let driver = tokio::spawn(connection);
        let mut client = client.ready().await.unwrap();
        let (response, mut send) =
            client.send_request(request.body(()).unwrap(), body.is_empty()).unwrap();
        if !body.is_empty() {
            send.send_data(body, true).unwrap();
        }
        let response = response.await.unwrap();
        let (parts, mut incoming) = response.into_parts();
        let mut body = BytesMut::new();
        while let Some(data) = incoming.data().await {
            let data = data.unwrap();
            incoming.flow_control().release_capacity(data.len()).unwrap();
            body.extend_from_slice(&data);
        }
        let trailers = incoming.trailers().await.unwrap().unwrap_or_default();
        driver.abort();
        Raw { status: parts.status, headers: parts.headers, trailers, body: body.freeze() }
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("an answer")
}

fn call(member: &Member, path: &str) -> http::request::Builder {
    Request::post(format!("http://{}{path}", member.endpoint()))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// A message with its five bytes in front.
fn frame(compressed: bool, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(u8::from(compressed));
    frame.put_u32(message.len() as u32);
    frame.put_slice(message);
    frame.freeze()
}

fn gzip(message: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(message).unwrap();
    encoder.finish().unwrap()
}

const RANGE: &str = "/etcdserverpb.KV/Range";

#[tokio::test]
async fn what_is_not_served() {
    for kind in [Kind::Memory, Kind::Etcd] {
        let member = Member::start(kind).await;
        let body = || frame(false, &[]);
        for (path, text) in [
            ("/foo.Bar/Baz", "unknown service foo.Bar"),
            ("/etcdserverpb.KV/Baz", "unknown method Baz for service etcdserverpb.KV"),
            ("/etcdserverpb.KV/", "unknown method  for service etcdserverpb.KV"),
            ("/etcdserverpb.Kv/Range", "unknown service etcdserverpb.Kv"),
        ] {
            let reply = raw(&member, call(&member, path), body()).await;
            assert_eq!(reply.status, StatusCode::OK, "{kind:?} {path}");
            assert_eq!(reply.said(), error(Code::Unimplemented, text), "{kind:?} {path}");
        }
        // A body that is no message of that type: a length beyond its end.
        let reply = raw(&member, call(&member, RANGE), frame(false, &[0x0a, 0x7f])).await;
        let (code, text) = reply.said();
        assert_eq!(code, Code::Internal, "{kind:?}: {text}");
        assert!(text.starts_with("grpc: error unmarshalling request: "), "{kind:?}: {text}");
        let request = call(&member, RANGE).header("grpc-encoding", "deflate");
        let reply = raw(&member, request, frame(true, b"x")).await;
        let text = "grpc: Decompressor is not installed for grpc-encoding \"deflate\"";
        assert_eq!(reply.said(), error(Code::Unimplemented, text), "{kind:?}");
    }
}

#[tokio::test]
async fn http_2_without_grpc_is_refused() {
    let member = Member::start(Kind::Memory).await;
    let request = Request::get(format!("http://{}/version", member.endpoint()));
    let reply = raw(&member, request, Bytes::new()).await;
    assert_eq!(reply.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let request = call(&member, RANGE);
    let request = Request::post(request.uri_ref().unwrap().clone())
        .header("content-type", "application/json");
    let reply = raw(&member, request, Bytes::from_static(b"{}")).await;
    assert_eq!(reply.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

/// A request that came compressed is answered compressed, another one is not.
#[tokio::test]
async fn compression_is_mirrored() {
    let member = Member::start(Kind::Memory).await;
    member.api().put("k", &"v".repeat(1000)).await;
    let message = get("k").encode_to_vec();
    let offer = || call(&member, RANGE).header("grpc-accept-encoding", "gzip");
    let reply =
        raw(&member, offer().header("grpc-encoding", "gzip"), frame(true, &gzip(&message))).await;
    assert_eq!(reply.said().0, Code::Ok, "{}", reply.said().1);
    assert_eq!(reply.headers.get("grpc-encoding").unwrap(), "gzip");
    assert_eq!(reply.body[0], 1, "the reply is compressed");
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(&reply.body[5..]).read_to_end(&mut plain).unwrap();
    let range = pb::RangeResponse::decode(&plain[..]).unwrap();
    assert_eq!(range.count, 1);
    let reply = raw(&member, offer(), frame(false, &message)).await;
    assert_eq!(reply.headers.get("grpc-encoding"), None);
    assert_eq!(reply.body[0], 0, "the reply is not compressed");
    // And with a library.
    let mut client = pb::kv_client::KvClient::new(member.channel())
        .send_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Gzip);
    let reply = client.range(get("k")).await.unwrap().into_inner();
    assert_eq!(kv(&reply.kvs[0]).value.len(), 1000);
}

/// A message may not be larger than the limit once it is unpacked.
#[tokio::test]
async fn a_compressed_message_has_the_same_limit() {
    let member = Member::start(Kind::Memory).await;
    let put = pb::PutRequest { value: vec![0; 10 << 20].into(), ..put_of("k") };
    let packed = gzip(&put.encode_to_vec());
    assert!(packed.len() < 100_000);
    let request = call(&member, "/etcdserverpb.KV/Put").header("grpc-encoding", "gzip");
    let reply = raw(&member, request, frame(true, &packed)).await;
    assert_eq!(reply.said().0, Code::ResourceExhausted, "{}", reply.said().1);
    assert_eq!(member.api().range(get("k")).await.unwrap().count, 0);
}

#[tokio::test]
async fn metadata() {
    let member = Member::start(Kind::Memory).await;
    let api = member.api();
    let with = |name: &'static str, value: &[u8]| {
        let mut metadata = MetadataMap::new();
        metadata.insert(name, AsciiMetadataValue::try_from(value).unwrap());
        metadata
    };
    let ask = async |metadata: MetadataMap| {
        let mut request = tonic::Request::new(get("k"));
        *request.metadata_mut() = metadata;
        api.clone().kv.range(request).await.map(|_| ()).map_err(said)
    };
    let invalid = error(Code::InvalidArgument, "etcdserver: invalid client api version");
    assert_eq!(ask(with("client-api-version", b"3.7")).await, Ok(()));
    assert_eq!(ask(with("client-api-version", "3.7-\u{e9}".as_bytes())).await, Ok(()));
    assert_eq!(ask(with("client-api-version", b"\xff\xfe")).await, Err(invalid.clone()));
    // A leader is known, so asking for one changes nothing; nor do values that are not `true`.
    for value in [&b"true"[..], b"false", b"x"] {
        assert_eq!(ask(with("hasleader", value)).await, Ok(()));
    }
    // Authentication is off: nobody looks at a token.
    for name in ["token", "authorization"] {
        assert_eq!(ask(with(name, b"nonsense")).await, Ok(()));
    }
    let mut refused = api.watching_with(with("client-api-version", b"\xff"));
    assert_eq!(refused.end().await, Err(invalid));
    let mut watching = api.watching_with(with("hasleader", b"true"));
    watching.created(all()).await;
    let at = member.api().put("k", "v").await;
    assert_eq!(revision(watching.next().await.header), at);
}

/// A call with a deadline is given up when it passes, and one with a deadline that cannot be read is
/// not begun.
#[tokio::test]
async fn deadlines() {
    // A compaction that a client waits for takes hours here.
    let flags = ["--compaction-batch-limit=1", "--compaction-sleep-interval=1h"];
    let member = Member::with_flags(Kind::Memory, &flags).await;
    let mut api = member.api();
    for key in ["a", "b", "a", "b"] {
        api.put(key, "v").await;
    }
    let ask = async |path: &str, timeout: &str, message: &[u8]| {
        let started = Instant::now();
        let request = call(&member, path).header("grpc-timeout", timeout);
        (raw(&member, request, frame(false, message)).await, started.elapsed())
    };
    let message = get("a").encode_to_vec();
    let (answer, _) = ask(RANGE, "99999999H", &message).await;
    assert_eq!((answer.status, answer.said()), (StatusCode::OK, (Code::Ok, String::new())));
    for (timeout, what) in [
        ("5s", "transport: timeout unit is not recognized: \"5s\""),
        ("S", "transport: timeout string is too short: \"S\""),
        ("123456789S", "transport: timeout string is too long: \"123456789S\""),
        ("-5S", "strconv.ParseUint: parsing \"-5\": invalid syntax"),
    ] {
        let (answer, _) = ask(RANGE, timeout, &message).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{timeout}");
        assert_eq!(answer.said(), (Code::Internal, format!("malformed grpc-timeout: {what}")));
    }

    let exceeded = (Code::DeadlineExceeded, "context deadline exceeded".to_string());
    let waited = |took: Duration| assert!(took >= Duration::from_millis(300), "{took:?}");
    let compaction = pb::CompactionRequest { revision: 5, physical: true };
    let path = "/etcdserverpb.KV/Compact";
    let (answer, took) = ask(path, "300m", &compaction.encode_to_vec()).await;
    assert_eq!((answer.status, answer.said()), (StatusCode::OK, exceeded.clone()));
    waited(took);
    let again = pb::CompactionRequest { physical: false, ..compaction };
    let (answer, _) = ask(path, "5S", &again.encode_to_vec()).await;
    assert_eq!(answer.said().0, Code::OutOfRange, "given up, but done");

    let request = Some(RequestUnion::CreateRequest(all()));
    let watch = pb::WatchRequest { request_union: request }.encode_to_vec();
    let (answer, took) = ask("/etcdserverpb.Watch/Watch", "300000u", &watch).await;
    let created = pb::WatchResponse::decode(&answer.body[5..]).unwrap();
    assert!(created.created, "{created:?}");
    assert_eq!((answer.status, answer.said()), (StatusCode::OK, exceeded));
    waited(took);
}

fn all() -> pb::WatchCreateRequest {
    pb::WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }
}

#[tokio::test]
async fn health() {
    for kind in [Kind::Memory, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let ask = |service: &str| healthpb::HealthCheckRequest { service: service.into() };
        let reply = api.health.check(ask("")).await.unwrap().into_inner();
        assert_eq!(reply.status(), ServingStatus::Serving, "{kind:?}");
        let refused = api.health.check(ask("nobody")).await.map_err(said).unwrap_err();
        assert_eq!(refused, error(Code::NotFound, "unknown service"), "{kind:?}");
        for (service, status) in
            [("", ServingStatus::Serving), ("nobody", ServingStatus::ServiceUnknown)]
        {
            let mut states = api.health.watch(ask(service)).await.unwrap().into_inner();
            let state = states.message().await.unwrap().unwrap();
            assert_eq!(state.status(), status, "{kind:?}");
        }
        if kind != Kind::Etcd {
            let list = api.health.list(healthpb::HealthListRequest {}).await.unwrap().into_inner();
            assert_eq!(list.statuses.len(), 1);
            assert_eq!(list.statuses[""].status(), ServingStatus::Serving);
        }
    }
}

/// Tools can list and describe what is served.
#[tokio::test]
async fn reflection_describes_the_services() {
    let member = Member::start(Kind::Memory).await;
    let ask = |request| {
        tokio_stream::iter([reflection::ServerReflectionRequest {
            message_request: Some(request),
            ..Default::default()
        }])
    };
    let mut client = ServerReflectionClient::new(member.channel());
    let list = ask(MessageRequest::ListServices(String::new()));
    let mut replies = client.server_reflection_info(list).await.unwrap().into_inner();
    let reply = replies.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = reply else { panic!("{reply:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["KV", "Watch", "Lease", "Cluster", "Maintenance", "Auth"] {
        assert!(names.contains(&&*format!("etcdserverpb.{name}")), "{names:?}");
    }
    assert!(names.contains(&"grpc.health.v1.Health"), "{names:?}");
    let describe = ask(MessageRequest::FileContainingSymbol("etcdserverpb.KV".into()));
    let mut replies = client.server_reflection_info(describe).await.unwrap().into_inner();
    let reply = replies.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::FileDescriptorResponse(files) = reply else { panic!("{reply:?}") };
    assert!(!files.file_descriptor_proto.is_empty());
}

/// Many watchers on many streams: each sees all that it watches, in order, and nothing else.
#[tokio::test]
async fn concurrent_watches() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        let mut streams = Vec::new();
        for _ in 0..4 {
            let mut watching = member.api().watching();
            for digit in 0..3 {
                let key = format!("k{digit}");
                let range_end = format!("k{}", digit + 1);
                let request = pb::WatchCreateRequest {
                    key: key.into(),
                    range_end: range_end.into(),
                    watch_id: digit + 1,
                    ..Default::default()
                };
                watching.created(request).await;
            }
            streams.push(watching);
        }
        let mut expected = vec![Vec::new(); 3];
        for i in 0..90 {
            let at = api.put(&format!("k{}/{i}", i % 3), "v").await;
            expected[i % 3].push(at);
        }
        for watching in &mut streams {
            let mut seen = vec![Vec::new(); 3];
            while seen.iter().map(Vec::len).sum::<usize>() < 90 {
                let response = watching.next().await;
                let of = (response.watch_id - 1) as usize;
                for event in &response.events {
                    seen[of].push(kv(event.kv.as_ref().unwrap()).mod_revision);
                }
            }
            assert_eq!(seen, expected, "{kind:?}");
            // All is seen, so progress is known at once, for the whole stream.
            watching.progress().await;
            let response = watching.next().await;
            assert_eq!(response.watch_id, -1, "{kind:?}");
            assert_eq!(revision(response.header), *expected[2].last().unwrap(), "{kind:?}");
        }
    }
}

/// A client that asked for it gets a large response in parts; another one gets it whole.
#[tokio::test]
async fn fragments() {
    for kind in [Kind::Memory, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        // One revision, so that it is one response: twice what a request may hold, since the events
        // tell the previous pairs too.
        let last = {
            let mut at = 0;
            for _ in 0..2 {
                let value = "v".repeat(350_000);
                let puts = (0..4).map(|i| op::put(&format!("k{i}"), &value)).collect();
                at = revision(api.txn(vec![], puts, vec![]).await.unwrap().header);
            }
            at
        };
        let request = pb::WatchCreateRequest { start_revision: last, prev_kv: true, ..all() };
        let mut whole = api.watching();
        whole.created(request.clone()).await;
        let response = whole.next().await;
        assert_eq!((response.events.len(), response.fragment), (4, false), "{kind:?}");
        assert!(response.encoded_len() > 2_097_152);
        let mut parted = api.watching();
        parted.created(pb::WatchCreateRequest { fragment: true, ..request }).await;
        let mut events = Vec::new();
        let mut parts = 0;
        loop {
            let part = parted.next().await;
            let header = part.header.unwrap();
            assert_eq!((part.watch_id, header.revision), (0, last), "{kind:?}");
            assert!(part.encoded_len() < 2_097_152, "{kind:?}: {} bytes", part.encoded_len());
            parts += 1;
            events.extend(part.events);
            if !part.fragment {
                break;
            }
        }
        assert!(parts > 1, "{kind:?}");
        assert!(events == response.events, "{kind:?}: the parts make up the whole");
    }
}

/// Requests and answers of keep-alives correspond, one to one and in order.
#[tokio::test]
async fn keep_alives_are_answered_in_order() {
    for kind in [Kind::Memory, Kind::Etcd] {
        let member = Member::start(kind).await;
        let mut api = member.api();
        for id in 1..=5 {
            api.grant(1000 + id, id).await.unwrap();
        }
        // Every second one is unknown.
        let ids: Vec<i64> = (0..100).map(|i| 1 + (i * 7) % 10).collect();
        let requests = ids.iter().map(|&id| pb::LeaseKeepAliveRequest { id }).collect::<Vec<_>>();
        let requests = tokio_stream::iter(requests);
        let mut replies = api.lease.lease_keep_alive(requests).await.unwrap().into_inner();
        for id in ids {
            let reply = replies.message().await.unwrap().unwrap();
            let ttl = if id <= 5 { 1000 + id } else { 0 };
            assert_eq!((reply.id, reply.ttl), (id, ttl), "{kind:?}");
        }
        assert!(replies.message().await.unwrap().is_none(), "{kind:?}: the client has ended it");
    }
}

/// The chunks of a range stream, merged, are the range.
#[tokio::test]
async fn range_streams() {
    let member = Member::start(Kind::Redb).await;
    let mut api = member.api();
    for hundred in 0..5 {
        let puts = (0..100).map(|i| op::put(&format!("k{hundred}{i:02}"), &"v".repeat(i * 100)));
        api.txn(vec![], puts.collect(), vec![]).await.unwrap();
    }
    let base = span("k", "l");
    for request in [
        base.clone(),
        pb::RangeRequest { limit: 37, ..base.clone() },
        pb::RangeRequest { limit: 10, ..base.clone() },
        pb::RangeRequest { limit: 500, ..base.clone() },
        pb::RangeRequest { revision: 3, ..base.clone() },
        pb::RangeRequest { keys_only: true, ..base.clone() },
        pb::RangeRequest { count_only: true, ..base.clone() },
        pb::RangeRequest { serializable: true, ..base.clone() },
        pb::RangeRequest { sort_order: 1, ..base.clone() },
        get("missing"),
        get("k007"),
        span("k", "\0"),
    ] {
        let expected = api.range(request.clone()).await.unwrap();
        let mut stream = api.kv.range_stream(request.clone()).await.unwrap().into_inner();
        let mut merged = pb::RangeResponse::default();
        let mut chunks: Vec<pb::RangeResponse> = Vec::new();
        while let Some(chunk) = stream.message().await.unwrap() {
            chunks.push(chunk.range_response.unwrap());
        }
        let last = chunks.len() - 1;
        for (i, chunk) in chunks.iter().enumerate() {
            assert_eq!(chunk.header.is_some(), i == last, "{request:?}");
            assert!(i == last || (!chunk.more && chunk.count == 0), "{request:?}");
            merged.merge(&chunk.encode_to_vec()[..]).unwrap();
        }
        if expected.kvs.len() > 20 {
            assert!(chunks.len() > 1 && chunks[0].kvs.len() <= 10, "{request:?}");
        }
        assert!(merged == expected, "{request:?}: {} chunks", chunks.len());
    }
    let mut refused = async |request: pb::RangeRequest| {
        api.kv.range_stream(request).await.map(|_| ()).map_err(said).unwrap_err()
    };
    let sorted = error(Code::Unimplemented, "RangeStream does not support custom sort orders");
    assert_eq!(refused(pb::RangeRequest { sort_order: 2, ..base.clone() }).await, sorted);
    let filtered = error(Code::Unimplemented, "RangeStream does not support revision filters");
    assert_eq!(refused(pb::RangeRequest { min_mod_revision: 2, ..base.clone() }).await, filtered);
    let empty = error(Code::InvalidArgument, "etcdserver: key is not provided");
    assert_eq!(refused(get("")).await, empty);
    let future = "etcdserver: mvcc: required revision is a future revision";
    let ahead = pb::RangeRequest { revision: 100, ..base };
    let ended = match api.kv.range_stream(ahead).await {
        Ok(reply) => reply.into_inner().message().await.map(|_| ()).map_err(said),
        Err(status) => Err(said(status)),
    };
    assert_eq!(ended, Err(error(Code::OutOfRange, future)));
}

/// What one client was told, every other client sees.
#[tokio::test]
async fn writes_are_seen_at_once() {
    for kind in [Kind::Redb, Kind::Memory] {
        let member = Member::start(kind).await;
        let (mut writer, mut reader) = (member.api(), member.api());
        let mut watching = member.api().watching();
        watching.created(all()).await;
        for i in 0..100 {
            let value = i.to_string();
            let at = writer.put("k", &value).await;
            for serializable in [false, true] {
                let reply =
                    reader.range(pb::RangeRequest { serializable, ..get("k") }).await.unwrap();
                assert_eq!(kv(&reply.kvs[0]).value, value, "{kind:?}");
                assert_eq!(revision(reply.header), at, "{kind:?}");
            }
            let response = watching.next().await;
            assert_eq!(kv(response.events[0].kv.as_ref().unwrap()).mod_revision, at, "{kind:?}");
            // A lease is known to all, and its keys follow it.
            let id = i + 1;
            writer.grant(1000, id).await.unwrap();
            writer.put_leased("leased", "v", id).await;
            watching.next().await;
            let ask = pb::LeaseTimeToLiveRequest { id, keys: true };
            let reply = reader.lease.lease_time_to_live(ask).await.unwrap().into_inner();
            assert_eq!((reply.granted_ttl, reply.keys), (1000, vec!["leased".into()]), "{kind:?}");
            writer.lease.lease_revoke(pb::LeaseRevokeRequest { id }).await.unwrap();
            watching.next().await;
            assert_eq!(keys(&reader.range(span("\0", "\0")).await.unwrap().kvs), ["k"], "{kind:?}");
        }
    }
}

/// An HTTP/1.1 request on the client port: status line, headers, body.
fn http_1(member: &Member, request: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(member.endpoint()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_string())
}

#[tokio::test]
async fn http_1_on_the_same_port() {
    let member = Member::start(Kind::Memory).await;
    let undecided = r#"{"etcdserver":"3.7.1","etcdcluster":"not_decided","storage":"unknown"}"#;
    let version = r#"{"etcdserver":"3.7.1","etcdcluster":"3.7.0","storage":"3.7.0"}"#;
    let deadline = Instant::now() + PATIENCE;
    let (status, body) = loop {
        let (status, _, body) = http_1(&member, "GET /version");
        // The cluster's version is decided through the log, shortly after the start.
        if body != undecided || Instant::now() > deadline {
            break (status, body);
        }
    };
    assert_eq!((status, body.as_str()), (200, version));
    let (status, _, body) = http_1(&member, "GET /health");
    assert_eq!((status, body.as_str()), (200, r#"{"health":"true","reason":""}"#));
    let (status, head, _) = http_1(&member, "POST /health");
    assert_eq!(status, 405);
    assert!(head.contains("\r\nallow: get"), "{head}");
    let (status, _, _) = http_1(&member, "GET /nothing");
    assert_eq!(status, 404);
    let (status, _, body) = http_1(&member, "GET /readyz");
    assert_eq!((status, body.trim_end()), (200, "ok"));
    let request = pb::AlarmRequest { action: 1, member_id: 77, alarm: 1 };
    member.api().maintenance.alarm(request).await.unwrap();
    let (status, _, body) = http_1(&member, "GET /health");
    // Errors end in a newline, as everything that Go's HTTP server calls an error does.
    let unhealthy = "{\"health\":\"false\",\"reason\":\"ALARM NOSPACE\"}\n";
    assert_eq!((status, body.as_str()), (503, unhealthy));
    let (status, _, body) = http_1(&member, "GET /health?exclude=NOSPACE");
    assert_eq!((status, body.as_str()), (200, r#"{"health":"true","reason":""}"#));
}
