//! One real member, asked over gRPC: compactions that callers wait for, streams of ranges, and hashes
//! over a kill.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::ports::free_address;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::kv_client::KvClient;
use quorate_proto::etcdserverpb::maintenance_client::MaintenanceClient;
use tonic::Code;
use tonic::transport::Channel;

/// Long enough for anything that is not stuck.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running server, killed when dropped.
struct Server {
    process: Child,
    channel: Channel,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Server {
    async fn start(dir: &Path) -> Server {
        let (client, peer) =
            (format!("http://{}", free_address()), format!("http://{}", free_address()));
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_quorate"))
            .args(["--data-dir", dir.join("data").to_str().unwrap()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let channel = Channel::from_shared(client).unwrap().connect_lazy();
        let server = Server { process, channel };
        let begun = Instant::now();
        let probe = pb::RangeRequest { key: "probe".into(), ..Default::default() };
        while server.kv().range(probe.clone()).await.is_err() {
            let log = std::fs::read_to_string(dir.join("log")).unwrap();
            assert!(begun.elapsed() < DEADLINE, "the server does not answer:\n{log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone())
    }

    async fn put(&self, key: &str, value: &str) -> i64 {
        let put = pb::PutRequest {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            ..Default::default()
        };
        self.kv().put(put).await.unwrap().into_inner().header.unwrap().revision
    }

    async fn compact(&self, revision: i64, physical: bool) -> Result<i64, Code> {
        let request = pb::CompactionRequest { revision, physical };
        let reply = tokio::time::timeout(DEADLINE, self.kv().compact(request)).await;
        let reply = reply.unwrap_or_else(|_| panic!("compaction at {revision} is not answered"));
        reply.map(|reply| reply.into_inner().header.unwrap().revision).map_err(|e| e.code())
    }

    async fn hash(&self, revision: i64) -> (u32, i64) {
        let mut client = MaintenanceClient::new(self.channel.clone());
        let reply = client.hash_kv(pb::HashKvRequest { revision }).await.unwrap().into_inner();
        assert!(reply.hash_revision == revision || revision == 0);
        (reply.hash, reply.compact_revision)
    }

    /// A streamed range, its chunks merged.
    async fn stream(&self, request: pb::RangeRequest) -> (pb::RangeResponse, usize) {
        let mut stream = self.kv().range_stream(request).await.unwrap().into_inner();
        let mut whole = pb::RangeResponse::default();
        let mut chunks = 0;
        while let Some(chunk) = stream.message().await.unwrap() {
            assert!(whole.header.is_none(), "only the last chunk has a header");
            let chunk = chunk.range_response.unwrap();
            chunks += 1;
            whole.kvs.extend(chunk.kvs);
            (whole.header, whole.more, whole.count) = (chunk.header, chunk.more, chunk.count);
        }
        (whole, chunks)
    }
}

#[tokio::test]
async fn compactions_that_are_waited_for_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).await;
    assert_eq!(server.compact(-1, true).await, Err(Code::OutOfRange), "nothing is under way");
    for n in 0..20 {
        assert_eq!(server.put("k", &n.to_string()).await, n + 2);
    }
    assert_eq!(server.compact(5, true).await, Ok(21));
    // Refused, and refused at once: whatever is under way has an end.
    assert_eq!(server.compact(5, true).await, Err(Code::OutOfRange));
    assert_eq!(server.compact(3, true).await, Err(Code::OutOfRange));
    assert_eq!(server.compact(99, true).await, Err(Code::OutOfRange));
    assert_eq!(server.compact(7, false).await, Ok(21));
    assert_eq!(server.compact(7, true).await, Err(Code::OutOfRange));
    let (first, second, third) =
        tokio::join!(server.compact(9, true), server.compact(11, false), server.compact(11, true));
    // They may be applied in any order; each is answered.
    for result in [first, second, third] {
        assert!(matches!(result, Ok(21) | Err(Code::OutOfRange)), "{result:?}");
    }
    assert_eq!(server.compact(21, true).await, Ok(21));
}

#[tokio::test]
async fn a_streamed_range_is_the_range() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).await;
    for n in 0..75 {
        server.put(&format!("key-{n:02}"), &n.to_string()).await;
    }
    let all = pb::RangeRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
    for limit in [0, 1, 9, 10, 11, 30, 74, 75, 76, 1000] {
        for count_only in [false, true] {
            let request = pb::RangeRequest { limit, count_only, ..all.clone() };
            let plain = server.kv().range(request.clone()).await.unwrap().into_inner();
            let (streamed, chunks) = server.stream(request).await;
            assert_eq!(streamed, plain, "limit {limit}");
            assert_eq!(chunks > 1, !count_only && (limit == 0 || limit > 10), "limit {limit}");
        }
    }
    let none = pb::RangeRequest { key: "x".into(), ..Default::default() };
    assert_eq!(server.stream(none).await.0.count, 0);
}

#[tokio::test]
async fn a_kill_amid_compaction_changes_no_hash() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path()).await;
    let mut last = 0;
    for n in 0..120 {
        last = server.put(&format!("key-{}", n % 7), &n.to_string()).await;
    }
    assert_eq!(server.compact(last - 50, false).await, Ok(last));
    // At its own revision a compaction is remembered with what was before it; not over a restart.
    let before = [server.hash(last - 49).await, server.hash(last).await];
    drop(server);
    let server = Server::start(dir.path()).await;
    assert_eq!([server.hash(last - 49).await, server.hash(last).await], before);
    // The next one waits for the one that was cut short.
    assert_eq!(server.compact(last - 49, true).await, Ok(last));
    let after = server.hash(last).await;
    assert_eq!(after.1, last - 49);
    assert_eq!(server.compact(last, true).await, Ok(last));
    let compacted = server.hash(0).await;
    assert_eq!(compacted.1, last);
    assert_eq!(server.hash(last).await, after, "as it was under the compaction before");
    drop(server);
    let server = Server::start(dir.path()).await;
    assert_eq!(server.hash(last).await, compacted);
    assert_eq!(server.put("key-0", "after").await, last + 1);
}
