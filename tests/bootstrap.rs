//! How members come into being, as processes: founding, joining, going on, being forced; and
//! `local-cluster`. Where it can be, against a real etcd.

mod ports;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;
use quorate::actors::disk::OsDisk;
use quorate::core::membership::{cluster_id, member_id};
use quorate::storage::wal_log::{self, Recovered};
use quorate_proto::{raftpb, walpb};

/// How long anything may take before a test gives up: far more than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(reason) => assert!(Instant::now() < deadline, "waited for {what}: {reason}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Free ports of the loopback device, all different.
fn free<const N: usize>() -> [SocketAddr; N] {
    std::array::from_fn(|_| ports::free_address())
}

fn id_of(urls: &[&str]) -> u64 {
    let urls: Vec<String> = urls.iter().map(ToString::to_string).collect();
    member_id(&urls, "etcd-cluster", None).0
}

/// A process that is killed at the end of its test, and what it writes.
struct Process {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let collect = |from: Box<dyn Read + Send>| {
            let lines = lines.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(from).lines().map_while(Result::ok) {
                    lines.lock().unwrap().push(line);
                }
            })
        };
        let readers = vec![
            collect(Box::new(child.stdout.take().unwrap())),
            collect(Box::new(child.stderr.take().unwrap())),
        ];
        Process { child, lines, readers }
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The first line that holds all of `parts`.
    fn line(&self, parts: &[&str]) -> String {
        wait_for(&format!("a line with {parts:?}"), || {
            let lines = self.lines();
            let found = lines.iter().find(|line| parts.iter().all(|part| line.contains(part)));
            found.cloned().ok_or_else(|| lines.join("\n"))
        })
    }

    fn ready(&self) {
        self.line(&["ready to serve client requests"]);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end, and for all that was written before it.
    fn end(mut self) -> (ExitStatus, Vec<String>) {
        let status = wait_for("the process to end", || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            Ok(None) => Err(self.lines().join("\n")),
            Err(error) => Err(error.to_string()),
        });
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        (status, self.lines())
    }

    fn terminate(self) {
        self.signal(Signal::SIGTERM);
        let (status, lines) = self.end();
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{}", lines.join("\n"));
    }

    /// The error of a member that does not start.
    fn refusal(self) -> String {
        let (status, lines) = self.end();
        assert_eq!(status.code(), Some(1), "{}", lines.join("\n"));
        let last: serde_json::Value = serde_json::from_str(lines.last().unwrap()).unwrap();
        assert_eq!((&last["level"], &last["msg"]), (&"fatal".into(), &"discovery failed".into()));
        last["error"].as_str().unwrap().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A member named `m`.
struct Setup {
    temp: tempfile::TempDir,
    client: SocketAddr,
    peer: SocketAddr,
}

impl Setup {
    fn new() -> Self {
        let [client, peer] = free();
        Setup { temp: tempfile::tempdir().unwrap(), client, peer }
    }

    fn peer_url(&self) -> String {
        format!("http://{}", self.peer)
    }

    fn data(&self) -> PathBuf {
        self.temp.path().join("data")
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let (client, peer) = (format!("http://{}", self.client), self.peer_url());
        let mut command = Command::new(program);
        command
            .env_clear()
            .current_dir(self.temp.path())
            .arg("--name=m")
            .arg(format!("--data-dir={}", self.data().display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .args(args);
        command
    }

    fn quorate(&self, args: &[&str]) -> Process {
        Process::start(&mut self.command(env!("CARGO_BIN_EXE_quorate"), args))
    }

    fn wal(&self) -> Option<Recovered> {
        read_wal(&self.data())
    }
}

/// What the log in a data directory holds; `None` before there is a sound one.
fn read_wal(data: &Path) -> Option<Recovered> {
    let beginning = |_: &[walpb::Snapshot]| walpb::Snapshot::default();
    wal_log::read(&OsDisk, &data.join("member").join("wal"), beginning).ok()
}

fn change(entry: &raftpb::Entry) -> (u64, u64, i32, u64, String) {
    assert_eq!(entry.r#type, raftpb::EntryType::EntryConfChange as i32);
    let change = raftpb::ConfChange::decode(entry.data.clone()).unwrap();
    let context = String::from_utf8(change.context.to_vec()).unwrap();
    (entry.term, entry.index, change.r#type, change.node_id, context)
}

fn etcdctl(endpoint: SocketAddr, args: &[&str]) -> Result<String, String> {
    let output = Command::new("etcdctl")
        .env_clear()
        .env("ETCDCTL_API", "3")
        .arg(format!("--endpoints={endpoint}"))
        .args(args)
        .output()
        .expect("etcdctl is installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    }
}

/// Answers GETs as a member would, by path: status, further header lines, body.
struct Fake {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

type Pages = BTreeMap<&'static str, (u16, String, String)>;

impl Fake {
    /// Serves what `pages` makes of its own URL.
    fn serve(pages: impl FnOnce(&str) -> Pages) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let pages = pages(&format!("http://{address}"));
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = asked.clone();
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                answer(stream, &pages, &seen);
            }
        });
        Fake { address, asked }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn answer(stream: TcpStream, pages: &Pages, asked: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream);
    let mut first = String::new();
    let mut line = String::new();
    if reader.read_line(&mut first).is_err() {
        return;
    }
    while matches!(reader.read_line(&mut line), Ok(n) if n > 2) {
        line.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    asked.lock().unwrap().push(path.to_owned());
    let missing = (404, String::new(), "404 page not found\n".to_owned());
    let (status, head, body) = pages.get(path).unwrap_or(&missing);
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status} Said\r\n{head}content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    // Who asked may have given up.
    reader.get_mut().write_all(text.as_bytes()).ok();
}

fn members_page(members: &str) -> (u16, String, String) {
    (200, "X-Etcd-Cluster-ID: 1234abcd\r\n".to_owned(), members.to_owned())
}

fn version_page(cluster: &str) -> (u16, String, String) {
    (200, String::new(), format!(r#"{{"etcdserver":"{cluster}","etcdcluster":"{cluster}"}}"#))
}

#[test]
fn a_founders_log_begins_as_that_of_etcd() {
    let [client, second, other, third] = free();
    let ours = Setup::new();
    let theirs = Setup { temp: tempfile::tempdir().unwrap(), client, peer: ours.peer };
    let cluster = format!(
        "--initial-cluster=a=http://{other},m={},c=http://{third},m=http://{second}",
        ours.peer_url()
    );
    let advertised = format!("--initial-advertise-peer-urls={},http://{second}", ours.peer_url());
    let args = [cluster.as_str(), advertised.as_str(), "--initial-cluster-token=t"];

    let wait = |setup: &Setup, process: &Process| {
        wait_for("the founders' entries", || match setup.wal() {
            Some(wal) if wal.entries.len() >= 3 => Ok(wal),
            _ => Err(process.lines().join("\n")),
        })
    };
    // One after the other: they are given the same peer port.
    let etcd = Process::start(&mut theirs.command("etcd", &args));
    let expected = wait(&theirs, &etcd);
    drop(etcd);
    let quorate = ours.quorate(&args);
    let written = wait(&ours, &quorate);
    // Without the others nobody leads, and a member that is not ready ends by the signal.
    quorate.line(&["starting initial election tick advance"]);
    quorate.terminate();

    assert_eq!(written.metadata, expected.metadata);
    let first = |wal: &Recovered| wal.entries[..3].iter().map(change).collect::<Vec<_>>();
    assert_eq!(first(&written), first(&expected));
    assert_eq!(written.entries.len(), 3);
    assert_eq!((written.hard_state.term, written.hard_state.commit), (1, 3));
    assert_eq!(
        (written.start, written.snapshots.len()),
        (expected.start, expected.snapshots.len())
    );
}

#[test]
fn a_founder_whose_data_is_lost_is_refused() {
    let setup = Setup::new();
    let own = id_of(&[&setup.peer_url()]);
    let page = |clients: &str| {
        let url = setup.peer_url();
        members_page(&format!(r#"[{{"id":{own},"peerURLs":["{url}"],"name":"m"{clients}}}]"#))
    };
    let running =
        Fake::serve(|_| Pages::from([("/members", page(r#","clientURLs":["http://c:1"]"#))]));
    let cluster = format!("--initial-cluster=m={},a={}", setup.peer_url(), running.url());
    assert_eq!(
        setup.quorate(&[&cluster]).refusal(),
        format!("member {own:x} has already been bootstrapped")
    );
    assert!(setup.wal().is_none());
    assert_eq!(*running.asked.lock().unwrap(), ["/members"]);

    // One that was only named there has not run.
    let waiting = Fake::serve(|_| Pages::from([("/members", page(""))]));
    let cluster = format!("--initial-cluster=m={},a={}", setup.peer_url(), waiting.url());
    let process = setup.quorate(&[&cluster]);
    let wal = wait_for("a log", || setup.wal().ok_or_else(|| process.lines().join("\n")));
    let ids = [own, id_of(&[&waiting.url()])];
    let metadata = walpb::Metadata {
        node_id: Some(own),
        cluster_id: Some(cluster_id(ids.map(quorate::core::types::MemberId)).0),
    };
    assert_eq!(wal.metadata, metadata);
}

#[test]
fn a_configuration_that_names_no_cluster_is_refused() {
    let setup = Setup::new();
    let url = setup.peer_url();
    let cases = [
        ("new", format!("x={url}"), "couldn't find local name \"m\" in the initial cluster configuration".to_owned()),
        ("existing", format!("x={url}"), "couldn't find local name \"m\" in the initial cluster configuration".to_owned()),
        ("new", format!("m={url},x={url}"), format!("initial cluster m={url},x={url} has duplicate url")),
        ("existing", format!("m={url},x={url}"), format!("initial cluster m={url},x={url} has duplicate url")),
        (
            "new",
            "m=http://127.0.0.1:1".to_owned(),
            format!(
                "--initial-cluster has m=http://127.0.0.1:1 but missing from \
                 --initial-advertise-peer-urls={url}"
            ),
        ),
        // Who joins was named by the cluster: what it advertises is not compared.
        (
            "existing",
            "m=http://127.0.0.1:1".to_owned(),
            "cannot fetch cluster info from peer urls: could not retrieve cluster information from \
             the given URLs"
                .to_owned(),
        ),
    ];
    for (state, cluster, text) in cases {
        let args =
            [format!("--initial-cluster={cluster}"), format!("--initial-cluster-state={state}")];
        let refusal = setup.quorate(&[&args[0], &args[1]]).refusal();
        // Go's text of the list behind it is not compared.
        assert!(refusal.starts_with(&text), "{refusal}");
        assert!(setup.wal().is_none());
    }
}

/// A cluster of `a` (the fake) and `m`, as the fake tells it.
fn joining(setup: &Setup, pages: impl FnOnce(&str) -> Pages) -> (Fake, String) {
    let peer = setup.peer_url();
    let fake = Fake::serve(|_| pages(&peer));
    let cluster = format!("--initial-cluster=m={peer},a={}", fake.url());
    (fake, cluster)
}

/// What a fake answers, given the peer URL of who asks.
type Answers = Box<dyn Fn(&str) -> Pages>;

#[test]
fn who_cannot_join_is_told_why() {
    let fetch = "cannot fetch cluster info from peer urls: ";
    let nobody = format!("{fetch}could not retrieve cluster information from the given URLs");
    let two = |peer: &str| {
        members_page(&format!(
            r#"[{{"id":5,"peerURLs":["{peer}"]}},{{"id":10,"peerURLs":["http://127.0.0.1:1"],"name":"a"}}]"#
        ))
    };
    let cases: Vec<(Answers, String)> = vec![
        (Box::new(|_| Pages::new()), nobody.clone()),
        (
            Box::new(|_| Pages::from([("/members", (200, String::new(), "[]".to_owned()))])),
            nobody.clone(),
        ),
        (Box::new(|_| Pages::from([("/members", members_page("{"))])), nobody.clone()),
        // What a redirect leads to is not asked.
        (
            Box::new(move |peer| {
                let aside = (302, "location: /other\r\n".to_owned(), String::new());
                Pages::from([("/members", aside), ("/other", two(peer))])
            }),
            nobody,
        ),
        (
            Box::new(|_| Pages::from([("/members", members_page("[]"))])),
            format!("{fetch}failed to get raft cluster member(s) from the given URLs"),
        ),
        (
            Box::new(|_| {
                Pages::from([(
                    "/members",
                    members_page(
                        r#"[{"id":10,"peerURLs":["http://h:1"],"name":"a","clientURLs":["http://h:2"]}]"#,
                    ),
                )])
            }),
            "error validating peerURLs {ClusterID:1234abcd Members:[&{ID:a \
             RaftAttributes:{PeerURLs:[http://h:1] IsLearner:false} Attributes:{Name:a \
             ClientURLs:[http://h:2]}}] RemovedMemberIDs:[]}: member count is unequal"
                .to_owned(),
        ),
    ];
    for (pages, text) in cases {
        let setup = Setup::new();
        let (fake, cluster) = joining(&setup, pages);
        let refusal = setup.quorate(&[&cluster, "--initial-cluster-state=existing"]).refusal();
        assert_eq!(refusal, text);
        assert_eq!(*fake.asked.lock().unwrap(), ["/members"]);
        assert!(setup.wal().is_none());
    }

    // A member of the right count at an address that nobody here has.
    let setup = Setup::new();
    let (_fake, cluster) = joining(&setup, |peer| Pages::from([("/members", two(peer))]));
    let refusal = setup.quorate(&[&cluster, "--initial-cluster-state=existing"]).refusal();
    let part = "no match found for existing member (a, [http://127.0.0.1:1]), last resolver error \
                (resolved urls: \"http://127.0.0.1:1\" != ";
    assert!(refusal.starts_with("error validating peerURLs {ClusterID:1234abcd "), "{refusal}");
    assert!(refusal.contains(part), "{refusal}");
}

/// A fake that knows itself as ID 10 and `m` as ID 5, and tells these versions.
fn full_fake(
    setup: &Setup,
    cluster: &str,
    downgrade: Option<&str>,
    learner: bool,
) -> (Fake, String) {
    let peer = setup.peer_url();
    let fake = Fake::serve(|own| {
        let members = format!(
            r#"[{{"id":10,"peerURLs":["{own}"],"name":"a"}},
            {{"id":5,"peerURLs":["{peer}"],"isLearner":{learner}}}]"#
        );
        let mut pages = Pages::from([
            ("/members", members_page(&members)),
            ("/version", version_page(cluster)),
        ]);
        if let Some(enabled) = downgrade {
            pages.insert("/downgrade/enabled", (200, String::new(), enabled.to_owned()));
        }
        pages
    });
    let initial = format!("--initial-cluster=m={peer},a={}", fake.url());
    (fake, initial)
}

#[test]
fn versions_and_learners_are_checked_before_joining() {
    for (cluster, downgrade, learner, more, refused) in [
        ("3.8.0", None, false, None, Some("incompatible with current running cluster")),
        ("2.3.0", Some("false"), false, None, Some("incompatible with current running cluster")),
        ("not_decided", None, false, None, Some("incompatible with current running cluster")),
        ("3.7.0", Some("true"), false, None, Some("incompatible with current running cluster")),
        (
            "3.7.0",
            None,
            true,
            Some("--max-learners=0"),
            Some("membership: too many learner members in cluster"),
        ),
        ("3.8.0", Some("true"), false, None, None),
        ("3.6.0", Some("false"), true, None, None),
    ] {
        let setup = Setup::new();
        let (fake, initial) = full_fake(&setup, cluster, downgrade, learner);
        let mut args = vec![initial.as_str(), "--initial-cluster-state=existing"];
        args.extend(more);
        let process = setup.quorate(&args);
        if let Some(text) = refused {
            assert_eq!(process.refusal(), text, "{cluster} {downgrade:?}");
            assert!(setup.wal().is_none());
        } else {
            // Identities are those of the cluster; the log comes from its leader.
            let wal = wait_for("a log", || setup.wal().ok_or_else(|| process.lines().join("\n")));
            let metadata = walpb::Metadata { node_id: Some(5), cluster_id: Some(0x1234_abcd) };
            assert_eq!((wal.metadata, wal.entries), (metadata, vec![]));
            assert_eq!(wal.hard_state, raftpb::HardState::default());
            process.line(&["added remote peer", "\"remote-peer-id\":\"a\""]);
        }
        let asked = fake.asked.lock().unwrap();
        assert_eq!(asked[..3], ["/members", "/version", "/downgrade/enabled"]);
    }
}

#[test]
fn a_real_etcd_tells_who_joins() {
    let etcd_setup = Setup::new();
    let alone = format!("--initial-cluster=m={}", etcd_setup.peer_url());
    let etcd = Process::start(&mut etcd_setup.command("etcd", &[&alone]));
    etcd.ready();
    let setup = Setup::new();
    let initial = format!("--initial-cluster=m={},e={}", setup.peer_url(), etcd_setup.peer_url());
    let args = [initial.as_str(), "--initial-cluster-state=existing"];
    let refusal = setup.quorate(&args).refusal();
    let (id, url) = (id_of(&[&etcd_setup.peer_url()]), etcd_setup.peer_url());
    let cluster = cluster_id([quorate::core::types::MemberId(id)]);
    assert_eq!(
        refusal,
        format!(
            "error validating peerURLs {{ClusterID:{cluster} Members:[&{{ID:{id:x} \
             RaftAttributes:{{PeerURLs:[{url}] IsLearner:false}} Attributes:{{Name:m \
             ClientURLs:[http://{}]}}}}] RemovedMemberIDs:[]}}: member count is unequal",
            etcd_setup.client
        )
    );

    // Stopped before it is sent anything: what is of interest is who it takes itself for.
    let added = etcdctl(
        etcd_setup.client,
        &["member", "add", "m", "--learner", &format!("--peer-urls={}", setup.peer_url())],
    )
    .unwrap();
    let (_, rest) = added.split_once("Member ").unwrap();
    let member = u64::from_str_radix(rest.split_whitespace().next().unwrap(), 16).unwrap();
    let process = setup.quorate(&args);
    let wal = wait_for("a log", || setup.wal().ok_or_else(|| process.lines().join("\n")));
    drop(process);
    let metadata = walpb::Metadata { node_id: Some(member), cluster_id: Some(cluster.0) };
    assert_eq!(wal.metadata, metadata);
}

#[test]
fn a_restart_looks_at_nothing_but_its_directory() {
    let setup = Setup::new();
    let alone = format!("--initial-cluster=m={}", setup.peer_url());
    let process = setup.quorate(&[&alone]);
    process.ready();
    process.terminate();
    let before = setup.wal().unwrap().metadata;
    for args in [
        &["--initial-cluster=other=http://127.0.0.1:1,x=http://127.0.0.1:1"][..],
        &["--initial-cluster=a=http://127.0.0.1:1", "--initial-cluster-state=existing"],
        &["--name=else", "--initial-cluster-token=else"],
    ] {
        let process = setup.quorate(args);
        process.line(&["initial-cluster settings are not looked at"]);
        let id = format!("\"local-member-id\":\"{:x}\"", before.node_id());
        process.line(&["restarting local member", &id]);
        process.ready();
        process.terminate();
        assert_eq!(setup.wal().unwrap().metadata, before);
    }
}

#[test]
fn force_makes_a_member_the_whole_cluster() {
    let setup = Setup::new();
    let [dead] = free();
    let initial = format!("--initial-cluster=m={},dead=http://{dead}", setup.peer_url());
    let process = setup.quorate(&[&initial]);
    process.line(&["starting initial election tick advance"]);
    process.terminate();
    let before = setup.wal().unwrap();
    assert_eq!((before.entries.len(), before.hard_state.commit), (2, 2));

    let process = setup.quorate(&["--force-new-cluster"]);
    process.line(&["forcing restart member"]);
    process.ready();
    let own = id_of(&[&setup.peer_url()]);
    let members = etcdctl(setup.client, &["member", "list"]).unwrap();
    assert_eq!(
        members,
        format!("{own:x}, started, m, {}, http://{}, false", setup.peer_url(), setup.client)
    );
    assert_eq!(etcdctl(setup.client, &["put", "k", "v"]).unwrap(), "OK");
    process.terminate();
    let forced = setup.wal().unwrap();
    assert_eq!(forced.metadata, before.metadata);
    let removed = change(&forced.entries[2]);
    let kind = raftpb::ConfChangeType::RemoveNode as i32;
    assert_eq!(removed, (1, 3, kind, id_of(&[&format!("http://{dead}")]), String::new()));

    // Without the flag it stays so, and with it again nothing more is removed.
    for args in [&[][..], &["--force-new-cluster"]] {
        let process = setup.quorate(args);
        process.ready();
        assert_eq!(etcdctl(setup.client, &["get", "k", "--print-value-only"]).unwrap(), "v");
        assert_eq!(etcdctl(setup.client, &["member", "list"]).unwrap(), members);
        process.terminate();
    }
    let changes = setup.wal().unwrap();
    let changes = changes.entries.iter().filter(|entry| entry.r#type != 0).count();
    assert_eq!(changes, 3);
}

/// A `local-cluster` in a directory of its own.
struct Local {
    temp: tempfile::TempDir,
    ports: [SocketAddr; 6],
}

impl Local {
    fn start(&self, more: &[&str]) -> Process {
        let list = |ports: &[SocketAddr]| {
            let ports: Vec<String> = ports.iter().map(|at| at.port().to_string()).collect();
            ports.join(",")
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command
            .env_clear()
            // What a member is given is not to be shadowed.
            .env("ETCD_NAME", "shadow")
            .current_dir(self.temp.path())
            .arg("local-cluster")
            .arg(format!("--client-port={}", list(&self.ports[..3])))
            .arg(format!("--peer-port={}", list(&self.ports[3..])))
            .args(more);
        Process::start(&mut command)
    }

    fn all_ready(&self, process: &Process) {
        for n in 1..=3 {
            process.line(&[&format!("member-{n} | "), "ready to serve client requests"]);
        }
    }
}

fn stop_local(process: Process) {
    process.signal(Signal::SIGTERM);
    let (status, lines) = process.end();
    assert_eq!(status.code(), Some(0), "{}", lines.join("\n"));
    assert!(lines.iter().any(|line| line == "local-cluster | terminated: stopping the members"));
}

#[test]
fn a_local_cluster_serves_and_goes_on_with_its_data() {
    let local = Local { temp: tempfile::tempdir().unwrap(), ports: free() };
    let process = local.start(&["--engines=redb,memory,redb", "--", "--log-level=info"]);
    local.all_ready(&process);
    let clients = &local.ports[..3];
    assert_eq!(etcdctl(clients[0], &["put", "k", "v"]).unwrap(), "OK");
    assert_eq!(etcdctl(clients[1], &["get", "k", "--print-value-only"]).unwrap(), "v");
    assert_eq!(etcdctl(clients[2], &["member", "list"]).unwrap().lines().count(), 3);

    // One of three may die.
    let row = process.line(&["member-2   http://"]);
    let pid: i32 = row.split_whitespace().nth(2).unwrap().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    process.line(&["local-cluster | member-2 was ended by SIGKILL"]);
    wait_for("a write without the second member", || etcdctl(clients[0], &["put", "k", "w"]));
    stop_local(process);

    let process = local.start(&["--engines=redb,memory,redb"]);
    local.all_ready(&process);
    assert_eq!(etcdctl(clients[1], &["get", "k", "--print-value-only"]).unwrap(), "w");
    assert_eq!(etcdctl(clients[1], &["member", "list"]).unwrap().lines().count(), 3);
    stop_local(process);

    // Other ports would be another cluster on the same data.
    let other = Local { temp: local.temp, ports: free() };
    let (status, lines) = other.start(&[]).end();
    assert_eq!(status.code(), Some(1));
    assert!(lines[0].starts_with("quorate-local holds a cluster that was made as member-1="));
}

#[test]
fn a_member_that_joins_a_running_cluster_serves_its_data() {
    let first = Setup::new();
    let alone = format!("--initial-cluster=m={}", first.peer_url());
    let leader = first.quorate(&[&alone]);
    leader.ready();
    assert_eq!(etcdctl(first.client, &["put", "k", "v"]).unwrap(), "OK");
    let second = Setup::new();
    let peer = format!("--peer-urls={}", second.peer_url());
    wait_for("the member to be added", || etcdctl(first.client, &["member", "add", "n", &peer]));
    let initial = format!("--initial-cluster=m={},n={}", first.peer_url(), second.peer_url());
    let args = ["--name=n", initial.as_str(), "--initial-cluster-state=existing"];
    let joined = second.quorate(&args);
    joined.ready();
    assert_eq!(etcdctl(second.client, &["get", "k", "--print-value-only"]).unwrap(), "v");
    let members = etcdctl(second.client, &["member", "list"]).unwrap();
    assert_eq!(members.lines().filter(|line| line.contains(", started, ")).count(), 2);
}

/// The samples of a cluster, on ports of their own, as an operator starts them.
#[test]
fn the_samples_form_a_cluster_to_which_a_member_returns_without_an_election() {
    let temp = tempfile::tempdir().unwrap();
    let ports: [SocketAddr; 6] = free();
    let fixed = [2379, 22379, 32379, 2380, 22380, 32380].map(|port| format!("127.0.0.1:{port}"));
    let start = |n: usize| {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("config/member-{n}.yml"));
        let mut text = std::fs::read_to_string(sample).unwrap();
        for (old, new) in fixed.iter().zip(&ports) {
            text = text.replace(old, &new.to_string());
        }
        let file = temp.path().join(format!("member-{n}.yml"));
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
        command.env_clear().current_dir(temp.path()).arg("--config-file").arg(file);
        Process::start(&mut command)
    };
    let mut members = [start(1), start(2), start(3)];
    members.iter().for_each(Process::ready);
    assert_eq!(etcdctl(ports[0], &["put", "k", "v"]).unwrap(), "OK");
    let status = || {
        let status = etcdctl(ports[0], &["endpoint", "status", "-w", "json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let number = |name: &str| status[0]["Status"][name].as_u64().unwrap();
        (number("leader"), number("raftTerm"))
    };
    let before = status();

    // Any follower but the first, which is asked.
    let leads = |n: usize| id_of_sample(&ports[n + 3]) == before.0;
    let gone = if leads(2) { 1 } else { 2 };
    members[gone].signal(Signal::SIGKILL);
    wait_for("the member to end", || match members[gone].child.try_wait() {
        Ok(Some(_)) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    assert_eq!(etcdctl(ports[0], &["put", "k", "w"]).unwrap(), "OK");
    members[gone] = start(gone + 1);
    members[gone].ready();
    let read = etcdctl(ports[gone], &["get", "k", "--print-value-only"]);
    assert_eq!(read.unwrap(), "w");
    assert_eq!(status(), before);
}

fn id_of_sample(peer: &SocketAddr) -> u64 {
    member_id(&[format!("http://{peer}")], "quorate-local", None).0
}
