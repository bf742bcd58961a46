//! Members to talk to, and the clients that do.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;
use quorate_proto::health::health_client::HealthClient;
use quorate_proto::{KeyValue, KeyValueBytes};
use tempfile::TempDir;

use crate::ports::free_port;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};

/// Within this long a member must answer, an event arrive, a process end.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Which program a member runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The binary under test, over its default engine.
    Redb,
    /// The binary under test, with its keys in memory.
    Memory,
    /// The installed etcd.
    Etcd,
}

/// How clients come to a member that speaks TLS to them.
pub type Dial = Arc<dyn Fn(Endpoint) -> Channel + Send + Sync>;

/// A cluster of one member. It ends with this value.
pub struct Member {
    pub kind: Kind,
    pub client_port: u16,
    peer_port: u16,
    dir: TempDir,
    data_dir: PathBuf,
    flags: Vec<String>,
    /// None for a client port without TLS.
    dial: Option<Dial>,
    child: Option<Child>,
}

impl Member {
    /// A member with an empty data directory, ready to serve.
    pub async fn start(kind: Kind) -> Member {
        Self::with_flags(kind, &[]).await
    }

    /// A member with an empty data directory and `flags`, ready to serve.
    pub async fn with_flags(kind: Kind, flags: &[&str]) -> Member {
        let dir = TempDir::new().unwrap();
        let data_dir = dir.path().join("data");
        Self::over(kind, dir, data_dir, flags).await
    }

    /// A member whose client port speaks TLS, with what `flags` say; with an empty data directory, ready to
    /// serve.
    pub async fn with_tls(kind: Kind, flags: &[&str], dial: Dial) -> Member {
        let dir = TempDir::new().unwrap();
        let data_dir = dir.path().join("data");
        Self::serving(kind, dir, data_dir, flags, Some(dial)).await
    }

    /// A member over what is in `data_dir`, which is in `dir`.
    pub async fn over(kind: Kind, dir: TempDir, data_dir: PathBuf, flags: &[&str]) -> Member {
        Self::serving(kind, dir, data_dir, flags, None).await
    }

    async fn serving(
        kind: Kind,
        dir: TempDir,
        data_dir: PathBuf,
        flags: &[&str],
        dial: Option<Dial>,
    ) -> Member {
        let mut member = Member {
            kind,
            client_port: free_port(),
            peer_port: free_port(),
            dir,
            data_dir,
            flags: flags.iter().map(|flag| flag.to_string()).collect(),
            dial,
            child: None,
        };
        if let Err(log) = member.run().await {
            panic!("{kind:?} did not start:\n{log}");
        }
        member
    }

    /// Starts the process and waits until it answers; else its log.
    async fn run(&mut self) -> Result<(), String> {
        let log_path = self.dir.path().join("log");
        let log = std::fs::File::create(&log_path).unwrap();
        let mut command = match self.kind {
            Kind::Etcd => Command::new("etcd"),
            Kind::Redb | Kind::Memory => Command::new(env!("CARGO_BIN_EXE_quorate")),
        };
        let client = self.client_url();
        let peer = self.peer_url();
        let cluster = format!("default={peer}");
        command.arg("--data-dir").arg(&self.data_dir).args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster",
            &cluster,
            "--logger",
            "zap",
            "--log-level",
            "warn",
        ]);
        if self.kind == Kind::Memory {
            command.args(["--engine", "memory"]);
        }
        command.args(&self.flags);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")));

        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut api = self.api();
            let ready =
                api.kv.range(pb::RangeRequest { key: "ready".into(), ..Default::default() });
            // A member that asks who is calling is up.
            let asks = |status: &Status| status.message() == "etcdserver: user name is empty";
            let (ready, secured) = match tokio::time::timeout(PATIENCE, ready).await {
                Ok(Ok(_)) => (true, false),
                Ok(Err(status)) if asks(&status) => (true, true),
                _ => (false, false),
            };
            // A new cluster decides its version just after it begins to serve, and that is a change too.
            let decided = |status: &pb::StatusResponse| !status.storage_version.is_empty();
            let status = api.maintenance.status(pb::StatusRequest {});
            let whole = self.kind == Kind::Etcd
                || secured
                || matches!(
                    tokio::time::timeout(PATIENCE, status).await,
                    Ok(Ok(status)) if decided(status.get_ref())
                );
            if ready && whole {
                return Ok(());
            }
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                self.kill();
                return Err(std::fs::read_to_string(&log_path).unwrap());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops the process as an operator does and starts it again.
    pub async fn restart(&mut self) {
        self.terminate();
        if let Err(log) = self.run().await {
            panic!("{:?} did not start again:\n{log}", self.kind);
        }
    }

    /// Kills the process and starts it again.
    pub async fn crash(&mut self) {
        self.kill();
        if let Err(log) = self.run().await {
            panic!("{:?} did not start again:\n{log}", self.kind);
        }
    }

    fn terminate(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{:?} did not end in {PATIENCE:?}", self.kind);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that has ended by itself needs no killing.
            child.kill().ok();
            child.wait().unwrap();
        }
    }

    /// `host:port` of the client listener.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    pub fn client_url(&self) -> String {
        let scheme = if self.dial.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.endpoint())
    }

    pub fn peer_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// A directory for the test's own files, gone with the member.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// A connection of its own.
    pub fn api(&self) -> Api {
        Api::new(self.dialled(|endpoint| endpoint.timeout(PATIENCE)))
    }

    /// A connection without a deadline, for streams that are to stay open.
    pub fn channel(&self) -> Channel {
        self.dialled(|endpoint| endpoint)
    }

    fn dialled(&self, with: impl FnOnce(Endpoint) -> Endpoint) -> Channel {
        // What dials with TLS does so whatever the scheme is.
        let endpoint = Endpoint::from_shared(format!("http://{}", self.endpoint())).unwrap();
        match &self.dial {
            Some(dial) => dial(with(endpoint)),
            None => with(endpoint).connect_lazy(),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

const RECEIVE_MAX: usize = i32::MAX as usize;

/// One client of every service.
#[derive(Clone)]
pub struct Api {
    /// For clients of services that few tests use.
    pub channel: Channel,
    pub kv: pb::kv_client::KvClient<Channel>,
    pub watch: pb::watch_client::WatchClient<Channel>,
    pub lease: pb::lease_client::LeaseClient<Channel>,
    pub cluster: pb::cluster_client::ClusterClient<Channel>,
    pub maintenance: pb::maintenance_client::MaintenanceClient<Channel>,
    pub auth: pb::auth_client::AuthClient<Channel>,
    pub health: HealthClient<Channel>,
}

impl Api {
    pub fn new(channel: Channel) -> Api {
        Api {
            kv: pb::kv_client::KvClient::new(channel.clone())
                .max_decoding_message_size(RECEIVE_MAX),
            watch: pb::watch_client::WatchClient::new(channel.clone())
                .max_decoding_message_size(RECEIVE_MAX),
            lease: pb::lease_client::LeaseClient::new(channel.clone()),
            cluster: pb::cluster_client::ClusterClient::new(channel.clone()),
            maintenance: pb::maintenance_client::MaintenanceClient::new(channel.clone()),
            auth: pb::auth_client::AuthClient::new(channel.clone()),
            health: HealthClient::new(channel.clone()),
            channel,
        }
    }

    pub async fn put(&mut self, key: &str, value: &str) -> i64 {
        let request = pb::PutRequest { value: value.to_string().into(), ..put_of(key) };
        revision(self.kv.put(request).await.unwrap().into_inner().header)
    }

    pub async fn put_leased(&mut self, key: &str, value: &str, lease: i64) -> i64 {
        let request = pb::PutRequest { value: value.to_string().into(), lease, ..put_of(key) };
        revision(self.kv.put(request).await.unwrap().into_inner().header)
    }

    pub async fn delete(&mut self, key: &str) -> pb::DeleteRangeResponse {
        let key = key.to_string().into();
        let request = pb::DeleteRangeRequest { key, ..Default::default() };
        self.kv.delete_range(request).await.unwrap().into_inner()
    }

    pub async fn range(&mut self, request: pb::RangeRequest) -> Result<pb::RangeResponse, Said> {
        self.kv.range(request).await.map(Response::into_inner).map_err(said)
    }

    pub async fn txn(
        &mut self,
        compare: Vec<pb::Compare>,
        success: Vec<pb::RequestOp>,
        failure: Vec<pb::RequestOp>,
    ) -> Result<pb::TxnResponse, Said> {
        let request = pb::TxnRequest { compare, success, failure };
        self.kv.txn(request).await.map(Response::into_inner).map_err(said)
    }

    pub async fn compact(&mut self, revision: i64) -> Result<i64, Said> {
        let request = pb::CompactionRequest { revision, physical: true };
        let reply = self.kv.compact(request).await.map_err(said)?.into_inner();
        Ok(self::revision(reply.header))
    }

    pub async fn grant(&mut self, ttl: i64, id: i64) -> Result<pb::LeaseGrantResponse, Said> {
        let request = pb::LeaseGrantRequest { ttl, id };
        self.lease.lease_grant(request).await.map(Response::into_inner).map_err(said)
    }

    pub async fn hash_kv(&mut self, revision: i64) -> Result<pb::HashKvResponse, Said> {
        let request = pb::HashKvRequest { revision };
        self.maintenance.hash_kv(request).await.map(Response::into_inner).map_err(said)
    }

    /// An open watch stream without a watcher.
    pub fn watching(&self) -> Watching {
        self.watching_with(MetadataMap::new())
    }

    /// An open watch stream whose call carries `metadata`.
    pub fn watching_with(&self, metadata: MetadataMap) -> Watching {
        let (requests, receiver) = mpsc::channel(64);
        let mut request = tonic::Request::new(ReceiverStream::new(receiver));
        *request.metadata_mut() = metadata;
        let mut client = self.watch.clone();
        let opening =
            tokio::spawn(async move { client.watch(request).await.map(Response::into_inner) });
        Watching { requests: Some(requests), responses: Responses::Opening(opening) }
    }
}

/// A watch stream.
pub struct Watching {
    requests: Option<mpsc::Sender<pb::WatchRequest>>,
    responses: Responses,
}

enum Responses {
    /// etcd answers the call only together with its first response.
    Opening(JoinHandle<Result<Streaming<pb::WatchResponse>, Status>>),
    Open(Box<Streaming<pb::WatchResponse>>),
}

impl Responses {
    async fn next(&mut self) -> Result<Option<pb::WatchResponse>, Status> {
        if let Responses::Opening(opening) = self {
            let open = opening.await.expect("opening does not panic")?;
            *self = Responses::Open(Box::new(open));
        }
        let Responses::Open(responses) = self else { unreachable!("opened above") };
        responses.message().await
    }
}

impl Watching {
    async fn ask(&self, union: RequestUnion) {
        let requests = self.requests.as_ref().expect("this side is open");
        requests.send(pb::WatchRequest { request_union: Some(union) }).await.unwrap();
    }

    pub async fn create(&self, request: pb::WatchCreateRequest) {
        self.ask(RequestUnion::CreateRequest(request)).await;
    }

    pub async fn cancel(&self, watch_id: i64) {
        self.ask(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id })).await;
    }

    pub async fn progress(&self) {
        self.ask(RequestUnion::ProgressRequest(pb::WatchProgressRequest {})).await;
    }

    /// Tells the server that no more requests come.
    pub fn close(&mut self) {
        self.requests = None;
    }

    pub async fn next(&mut self) -> pb::WatchResponse {
        match tokio::time::timeout(PATIENCE, self.responses.next()).await {
            Ok(response) => response.expect("the stream is well").expect("the stream goes on"),
            Err(_) => panic!("no watch response in {PATIENCE:?}"),
        }
    }

    /// How the stream ends, after what is still in it.
    pub async fn end(&mut self) -> Result<(), Said> {
        loop {
            match tokio::time::timeout(PATIENCE, self.responses.next()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(status)) => return Err(said(status)),
                Err(_) => panic!("the stream does not end"),
            }
        }
    }

    /// Creates a watcher and answers the reply to that.
    pub async fn created(&mut self, request: pb::WatchCreateRequest) -> pb::WatchResponse {
        self.create(request).await;
        let reply = self.next().await;
        assert!(reply.created, "{reply:?}");
        reply
    }
}

/// What an error says to a client.
pub type Said = (Code, String);

pub fn said(status: Status) -> Said {
    (status.code(), status.message().to_string())
}

/// An error as a test names it.
pub fn error(code: Code, text: &str) -> Said {
    (code, text.to_string())
}

pub fn revision(header: Option<pb::ResponseHeader>) -> i64 {
    header.expect("a header").revision
}

pub fn kv(raw: &KeyValueBytes) -> KeyValue {
    raw.parse().unwrap()
}

pub fn keys(kvs: &[KeyValueBytes]) -> Vec<String> {
    kvs.iter().map(|raw| String::from_utf8(kv(raw).key.to_vec()).unwrap()).collect()
}

/// A put of an empty value.
pub fn put_of(key: &str) -> pb::PutRequest {
    pb::PutRequest { key: key.to_string().into(), ..Default::default() }
}

/// A range over one key.
pub fn get(key: &str) -> pb::RangeRequest {
    pb::RangeRequest { key: key.to_string().into(), ..Default::default() }
}

/// A range from `key` to `end`.
pub fn span(key: &str, end: &str) -> pb::RangeRequest {
    pb::RangeRequest { range_end: end.to_string().into(), ..get(key) }
}

pub mod op {
    //! Operations of a transaction.

    use quorate_proto::etcdserverpb as pb;
    use quorate_proto::etcdserverpb::request_op::Request;

    fn op(request: Request) -> pb::RequestOp {
        pb::RequestOp { request: Some(request) }
    }

    pub fn range(request: pb::RangeRequest) -> pb::RequestOp {
        op(Request::RequestRange(request))
    }

    pub fn put(key: &str, value: &str) -> pb::RequestOp {
        let (key, value) = (key.to_string().into(), value.to_string().into());
        op(Request::RequestPut(pb::PutRequest { key, value, ..Default::default() }))
    }

    pub fn delete(key: &str, end: &str, prev_kv: bool) -> pb::RequestOp {
        let (key, range_end) = (key.to_string().into(), end.to_string().into());
        op(Request::RequestDeleteRange(pb::DeleteRangeRequest { key, range_end, prev_kv }))
    }

    pub fn txn(success: Vec<pb::RequestOp>) -> pb::RequestOp {
        op(Request::RequestTxn(pb::TxnRequest { success, ..Default::default() }))
    }

    pub fn any(request: Request) -> pb::RequestOp {
        op(request)
    }
}
