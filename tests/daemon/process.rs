//! A member as a process: started, asked, signalled and always reaped.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::kv_client::KvClient;
use quorate_proto::etcdserverpb::lease_client::LeaseClient;
use quorate_proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate_proto::etcdserverpb::watch_client::WatchClient;
use serde_json::Value;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::ports::free_address;

/// How long anything may take before a test gives up: far more than it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const BINARY: &str = env!("CARGO_BIN_EXE_quorate");

/// Asks again until there is an answer.
///
/// # Panics
/// With the last reason, when patience is at its end.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(reason) => assert!(Instant::now() < deadline, "waited for {what}: {reason}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A runtime for a test's clients.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// How a member is to be started; the ports stay the same from start to start.
pub struct Setup {
    pub temp: tempfile::TempDir,
    pub data: PathBuf,
    pub client: SocketAddr,
    pub peer: SocketAddr,
    /// Where clients are listened for, if it is not `client`.
    pub listen: Option<String>,
    pub args: Vec<String>,
    pub env: BTreeMap<String, OsString>,
    pub file_bytes_max: Option<u64>,
    pub user: Option<u32>,
}

impl Setup {
    pub fn new(args: &[&str]) -> Self {
        let temp = tempfile::tempdir().unwrap();
        Setup {
            data: temp.path().join("data"),
            temp,
            client: free_address(),
            peer: free_address(),
            listen: None,
            args: args.iter().map(ToString::to_string).collect(),
            env: BTreeMap::new(),
            file_bytes_max: None,
            user: None,
        }
    }

    /// Another member's setup with its own ports, on a directory of this one's.
    pub fn on(data: PathBuf, args: &[&str]) -> Self {
        Setup { data, ..Setup::new(args) }
    }

    pub fn member_dir(&self) -> PathBuf {
        self.data.join("member")
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.member_dir().join("wal")
    }

    pub fn engine_dir(&self) -> PathBuf {
        self.member_dir().join("engine-redb")
    }

    pub fn command(&self) -> Command {
        let (client, peer) = (format!("http://{}", self.client), format!("http://{}", self.peer));
        let mut command = Command::new(BINARY);
        command
            .env_clear()
            .envs(&self.env)
            .current_dir(self.temp.path())
            .arg("--name=m")
            .arg(format!("--data-dir={}", self.data.display()))
            .arg(format!("--listen-client-urls={}", self.listen.as_ref().unwrap_or(&client)))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=m={peer}"))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        if let Some(bytes) = self.file_bytes_max {
            let limit = move || {
                use nix::sys::resource::{Resource, setrlimit};
                use nix::sys::signal::{SigHandler, signal};
                setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)?;
                // SAFETY: an ignored signal runs no handler.
                unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
                Ok(())
            };
            // SAFETY: only system calls are made between fork and exec.
            unsafe { command.pre_exec(limit) };
        }
        command
    }

    /// Starts the process and does not wait for anything.
    pub fn spawn(&self) -> Daemon {
        Daemon::of(self.command(), self.client)
    }

    /// A member that serves.
    pub fn start(&self) -> Daemon {
        let mut daemon = self.spawn();
        daemon.wait_ready();
        daemon
    }

    /// What a start that must fail says: the error of its last line, which is fatal.
    pub fn refused(&self) -> String {
        let mut daemon = self.spawn();
        let status = daemon.wait();
        let log = daemon.log_text();
        assert_eq!(status.code(), Some(1), "{status}: {log}");
        let lines = daemon.log();
        let fatal = lines.iter().rfind(|line| line["level"] == "fatal");
        let fatal = fatal.unwrap_or_else(|| panic!("no fatal line: {log}"));
        assert_eq!(fatal["msg"], "discovery failed", "{log}");
        fatal["error"].as_str().unwrap_or_else(|| panic!("no error: {log}")).to_string()
    }
}

/// A running process; killed when dropped.
pub struct Daemon {
    pub child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<std::thread::JoinHandle<()>>,
    status: Option<ExitStatus>,
    client: SocketAddr,
}

impl Daemon {
    fn of(mut command: Command, client: SocketAddr) -> Self {
        let mut child = command.spawn().expect("the binary can be run");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let sink = lines.clone();
        let reader = std::thread::spawn(move || {
            for line in stderr.lines() {
                sink.lock().unwrap().push(line.unwrap());
            }
        });
        Daemon { child, lines, reader: Some(reader), status: None, client }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log_text(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    /// Lines so far, each a JSON object.
    pub fn log(&self) -> Vec<Value> {
        let lines = self.lines.lock().unwrap();
        let parse = |line: &String| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
        };
        lines.iter().map(parse).collect()
    }

    /// The first line with this message, if it has been written.
    pub fn logged(&self, message: &str) -> Option<Value> {
        self.log().into_iter().find(|line| line["msg"] == message)
    }

    pub fn wait_logged(&mut self, message: &str) -> Value {
        wait_for(message, || match self.logged(message) {
            Some(line) => Ok(line),
            None => match self.child.try_wait().unwrap() {
                Some(status) => panic!("{status} before {message:?}: {}", self.log_text()),
                None => Err(self.log_text()),
            },
        })
    }

    pub fn wait_ready(&mut self) {
        self.wait_logged("ready to serve client requests");
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end, and for everything that was logged until then.
    pub fn wait(&mut self) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        let status = wait_for("the end of the process", || {
            self.child.try_wait().unwrap().ok_or_else(|| self.log_text())
        });
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.status = Some(status);
        status
    }

    /// Ends it in order; it must die by the signal.
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{}", self.log_text());
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.wait();
    }

    /// Everything written to stdout; the process has ended.
    pub fn stdout(&mut self) -> String {
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    pub fn client(&self) -> Client {
        Client::new(&format!("http://{}", self.client))
    }

    pub fn http(&self, path: &str) -> Http {
        http(self.client, "GET", path, &[])
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// All services of one server.
#[derive(Clone)]
pub struct Client {
    pub kv: KvClient<Channel>,
    pub lease: LeaseClient<Channel>,
    pub watch: WatchClient<Channel>,
    pub maintenance: MaintenanceClient<Channel>,
}

impl Client {
    /// Connects when it is used first. Must be called inside of a runtime.
    pub fn new(url: &str) -> Self {
        let endpoint = Endpoint::from_shared(url.to_string()).unwrap();
        let channel = endpoint.connect_timeout(Duration::from_secs(5)).connect_lazy();
        let max = usize::MAX;
        Client {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(max),
            lease: LeaseClient::new(channel.clone()),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(max),
            maintenance: MaintenanceClient::new(channel),
        }
    }

    /// The revision of the put.
    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<i64, Status> {
        self.put_with(key, value, 0).await
    }

    pub async fn put_with(
        &self,
        key: &str,
        value: impl Into<Vec<u8>>,
        lease: i64,
    ) -> Result<i64, Status> {
        let request = pb::PutRequest {
            key: key.as_bytes().to_vec().into(),
            value: value.into().into(),
            lease,
            ..Default::default()
        };
        Ok(revision(&self.kv.clone().put(request).await?.into_inner().header))
    }

    pub async fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, Status> {
        Ok(self.kv.clone().range(request).await?.into_inner())
    }

    pub async fn get(&self, key: &str) -> Result<Option<quorate_proto::KeyValue>, Status> {
        self.get_at(key, 0).await
    }

    pub async fn get_at(
        &self,
        key: &str,
        revision: i64,
    ) -> Result<Option<quorate_proto::KeyValue>, Status> {
        let key = key.as_bytes().to_vec().into();
        let response = self.range(pb::RangeRequest { key, revision, ..Default::default() }).await?;
        Ok(response.kvs.first().map(|kv| kv.parse().unwrap()))
    }

    /// The store's revision.
    pub async fn revision(&self) -> Result<i64, Status> {
        let request = pb::RangeRequest { key: "?".into(), ..Default::default() };
        Ok(revision(&self.range(request).await?.header))
    }

    /// Number of keys, and the revision.
    pub async fn count(&self) -> Result<i64, Status> {
        let request = pb::RangeRequest {
            key: vec![0].into(),
            range_end: vec![0].into(),
            count_only: true,
            ..Default::default()
        };
        Ok(self.range(request).await?.count)
    }

    pub async fn delete(&self, key: &str) -> Result<pb::DeleteRangeResponse, Status> {
        let request =
            pb::DeleteRangeRequest { key: key.as_bytes().to_vec().into(), ..Default::default() };
        Ok(self.kv.clone().delete_range(request).await?.into_inner())
    }

    pub async fn compact(&self, revision: i64, physical: bool) -> Result<(), Status> {
        let request = pb::CompactionRequest { revision, physical };
        self.kv.clone().compact(request).await.map(|_| ())
    }

    pub async fn grant(&self, ttl: i64) -> Result<i64, Status> {
        let request = pb::LeaseGrantRequest { ttl, id: 0 };
        Ok(self.lease.clone().lease_grant(request).await?.into_inner().id)
    }

    pub async fn time_to_live(&self, id: i64) -> Result<pb::LeaseTimeToLiveResponse, Status> {
        let request = pb::LeaseTimeToLiveRequest { id, keys: true };
        Ok(self.lease.clone().lease_time_to_live(request).await?.into_inner())
    }

    pub async fn hash_kv(&self, revision: i64) -> Result<pb::HashKvResponse, Status> {
        let request = pb::HashKvRequest { revision };
        Ok(self.maintenance.clone().hash_kv(request).await?.into_inner())
    }

    pub async fn status(&self) -> Result<pb::StatusResponse, Status> {
        Ok(self.maintenance.clone().status(pb::StatusRequest {}).await?.into_inner())
    }

    pub async fn alarms(&self) -> Result<Vec<pb::AlarmMember>, Status> {
        let request = pb::AlarmRequest::default();
        Ok(self.maintenance.clone().alarm(request).await?.into_inner().alarms)
    }

    /// Watches all keys from `from` on. The sender must be held for as long as the watch is to live.
    pub async fn watch_all(
        &self,
        from: i64,
    ) -> Result<
        (tokio::sync::mpsc::Sender<pb::WatchRequest>, tonic::Streaming<pb::WatchResponse>),
        Status,
    > {
        let create = pb::WatchCreateRequest {
            key: vec![0].into(),
            range_end: vec![0].into(),
            start_revision: from,
            ..Default::default()
        };
        let request = pb::WatchRequest {
            request_union: Some(pb::watch_request::RequestUnion::CreateRequest(create)),
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        sender.send(request).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut responses = self.watch.clone().watch(requests).await?.into_inner();
        let created = responses.message().await?.expect("a watch answers");
        assert!(created.created, "{created:?}");
        Ok((sender, responses))
    }
}

/// The revision of a header.
pub fn revision(header: &Option<pb::ResponseHeader>) -> i64 {
    header.as_ref().expect("a response has a header").revision
}

/// An answer of HTTP/1.1.
#[derive(Debug)]
pub struct Http {
    pub status: u16,
    /// With names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

/// Sends one request on a connection of its own.
pub fn http(to: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)]) -> Http {
    try_http(to, method, path, headers).unwrap()
}

pub fn try_http(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> std::io::Result<Http> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(name, _)| *name == "Host") {
        head += &format!("Host: {to}\r\n");
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    write!(stream, "{head}\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).map_err(std::io::Error::other)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| std::io::Error::other(format!("no answer: {answer:?}")))?;
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_string()))
        .collect();
    assert_ne!(headers.get("transfer-encoding").map(String::as_str), Some("chunked"), "{head}");
    Ok(Http {
        status: status.parse().map_err(std::io::Error::other)?,
        headers,
        body: body.to_string(),
    })
}

/// The files below a directory and what they hold, paths relative to it.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn gather(root: &Path, dir: &Path, into: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                gather(root, &path, into);
            } else {
                let name = path.strip_prefix(root).unwrap().to_path_buf();
                into.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    gather(dir, dir, &mut found);
    found
}

/// Copies a directory with everything in it.
pub fn copy_dir(from: &Path, to: &Path) {
    for (name, bytes) in files(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// A generator that repeats from a seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// A number below `bound` (splitmix64).
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// A number from the environment.
pub fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}
