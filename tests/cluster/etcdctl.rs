//! Debian's etcdctl against three members: what it prints of etcd, it prints of this server.
//!
//! Both clusters go through one script; its commands and what they print call members by the part that
//! they play, as ids, ports and who leads are each cluster's own.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use serde_json::Value;

use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::{PATIENCE, run, wait_for};

/// What a command printed and how it ended.
#[derive(Clone, PartialEq, Eq)]
struct Said {
    command: String,
    out: String,
    errors: String,
    code: Option<i32>,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "exit code {:?}", self.code)?;
        for line in self.out.lines() {
            writeln!(f, "  out: {line}")?;
        }
        for line in self.errors.lines() {
            writeln!(f, "  err: {line}")?;
        }
        Ok(())
    }
}

/// A cluster on which the script is played. A leads first, B and C follow, D joins later.
struct Stage {
    cluster: Cluster,
    /// What both clusters call something, and the forms that it takes in this one.
    names: Vec<(String, Vec<String>)>,
    /// The members by part.
    cast: Vec<Node>,
    said: Vec<Said>,
}

const PARTS: [char; 4] = ['A', 'B', 'C', 'D'];

/// Asked for where 3.4's members have another rule; a URL that is taken keeps the change from being made.
const TAKEN: &str = "member add again --peer-urls=http://PEER-A";
const UNHEALTHY: &str = "Error: etcdserver: unhealthy cluster";
const EXISTS: &str = "Error: etcdserver: Peer URLs already exists";

impl Stage {
    async fn open(program: Program) -> Stage {
        // Longer than a busy machine keeps a member waiting: leadership moves only when it is told to.
        let options = Options { heartbeat_ms: 100, election_ms: 2000, ..Options::default() };
        let cluster = Cluster::start(program, 3, options).await;
        let leader = cluster.leader().await;
        let mut cast = vec![leader];
        cast.extend((0..3).filter(|node| *node != leader));
        let mut stage = Stage { cluster, names: Vec::new(), cast, said: Vec::new() };
        for (part, letter) in PARTS.iter().enumerate().take(3) {
            stage.call(part);
            let id = stage.cluster.id(stage.cast[part]).await;
            stage.call_id(&format!("ID-{letter}"), id);
        }
        let status = stage.cluster.client(leader).status().await.unwrap();
        stage.call_id("CLUSTER", status.header.unwrap().cluster_id);
        stage
    }

    /// Gives a member's addresses their names.
    fn call(&mut self, part: usize) {
        let member = &self.cluster.members[self.cast[part]];
        let letter = PARTS[part];
        let peer = member.peer_url.strip_prefix("http://").unwrap().to_string();
        let client = format!("127.0.0.1:{}", member.client_port);
        self.names.push((format!("PEER-{letter}"), vec![peer]));
        self.names.push((format!("CLIENT-{letter}"), vec![client]));
        self.names.push((format!("NAME-{letter}"), vec![member.name.clone()]));
    }

    fn call_id(&mut self, name: &str, id: u64) {
        let forms = vec![format!("{id:x}"), id.to_string()];
        self.names.push((name.to_string(), forms));
    }

    /// `text` of this cluster as both would have it.
    fn normal(&self, text: &str) -> String {
        let mut text = text.to_string();
        for (printed, normal) in SAME {
            text = text.replace(printed, normal);
        }
        for (name, forms) in &self.names {
            for form in forms {
                text = text.replace(form, name);
            }
        }
        text
    }

    /// A command's text with this cluster's own ids and addresses.
    fn own(&self, text: &str) -> String {
        let mut text = text.to_string();
        for (name, forms) in &self.names {
            text = text.replace(name, &forms[0]);
        }
        text
    }

    /// What `etcdctl command` says with the members `at` for endpoints.
    async fn ask(&self, at: &str, command: &str) -> (Said, Vec<u8>) {
        let endpoints: Vec<_> = at.chars().map(|part| format!("CLIENT-{part}")).collect();
        let mut etcdctl = Command::new("etcdctl");
        // Settings of the surroundings would name another server.
        etcdctl.env_clear().env("ETCDCTL_API", "3");
        etcdctl.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        etcdctl.arg("--endpoints").arg(self.own(&endpoints.join(",")));
        etcdctl.args(self.own(command).split_ascii_whitespace()).stdin(Stdio::null());
        etcdctl.current_dir(self.cluster.path());
        let ended = tokio::task::spawn_blocking(move || etcdctl.output()).await;
        let output = ended.unwrap().expect("etcdctl is installed");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let out = if command.contains("-w protobuf") && output.status.success() {
            self.members_in(&output.stdout)
        } else {
            let text = String::from_utf8_lossy(&output.stdout);
            match command.split_once("-w ").map(|(_, format)| format) {
                Some("json") => self.json(&text),
                Some("fields") => self.fields(&text),
                Some("table") => self.table(&text),
                _ => self.simple(&text),
            }
        };
        // Without the client's own log, which has times and random names in it.
        let told = errors.lines().filter(|line| !line.starts_with("{\"level\""));
        let errors = self.simple(&told.map(|line| format!("{line}\n")).collect::<String>());
        let command = format!("{at}: {command}");
        (Said { command, out, errors, code: output.status.code() }, output.stdout)
    }

    /// Plays a part of the script.
    async fn play(&mut self, at: &str, commands: &[&str]) {
        for command in commands {
            let (said, _) = self.ask(at, command).await;
            self.said.push(said);
        }
    }

    /// Plays commands that wait for their deadlines, all at once.
    async fn play_together(&mut self, at: &str, commands: &[&str]) {
        let asked = commands.iter().map(|command| self.ask(at, command));
        let said = join_all(asked).await;
        self.said.extend(said.into_iter().map(|(said, _)| said));
    }

    /// Plays one command, again as long as `refused` is among its errors.
    async fn play_until_not(&mut self, refused: &str, at: &str, command: &str) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (said, out) = self.ask(at, command).await;
            if !said.errors.contains(refused) {
                self.said.push(said);
                return out;
            }
            assert!(Instant::now() < deadline, "{}: still {said}", said.command);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Adds a member that is called `name` from then on.
    async fn add(&mut self, name: &str, at: &str, command: &str) {
        let out = self.play_until_not(UNHEALTHY, at, command).await;
        let out = String::from_utf8(out).unwrap();
        let id =
            out.split_ascii_whitespace().nth(1).and_then(|id| u64::from_str_radix(id, 16).ok());
        self.call_id(
            name,
            id.unwrap_or_else(|| panic!("{command}: {out}, {}", self.said.last().unwrap())),
        );
        // It was recorded before its id had a name.
        let said = self.said.pop().unwrap();
        self.said.push(Said { out: self.simple(&said.out), ..said });
    }

    /// Waits until all that run know the same members, the same leader and the same revision.
    async fn settle(&self) {
        wait_for("the members to agree", || async {
            let mut views = BTreeSet::new();
            for node in self.cluster.running() {
                let view = self.view_of(node).await.map_err(|error| error.to_string())?;
                views.insert(view);
            }
            match views.iter().next() {
                Some((leader, ..)) if views.len() == 1 && *leader != 0 => Ok(()),
                _ => Err(format!("{views:?}")),
            }
        })
        .await;
    }

    async fn view_of(&self, node: Node) -> Result<(u64, i64, String), tonic::Status> {
        let client = self.cluster.client_within(node, Duration::from_secs(2));
        let leader = client.status().await?.leader;
        let revision = client.local_revision().await?;
        Ok((leader, revision, format!("{:?}", client.members().await?)))
    }

    /// Waits until all that run know member `part` as the leader.
    async fn led_by(&self, part: usize) {
        let leader = self.cluster.id(self.cast[part]).await;
        wait_for("leadership to have moved", || async {
            for node in self.cluster.running() {
                let status = self.cluster.client(node).status().await;
                let named = status.map_err(|error| error.to_string())?.leader;
                if named != leader {
                    return Err(format!("member {node} takes {named:x} for the leader"));
                }
            }
            Ok(())
        })
        .await;
    }

    /// Lines, in an order that does not follow from the ids.
    fn simple(&self, text: &str) -> String {
        let text = self.normal(text);
        let mut lines: Vec<String> = text.lines().map(plain_line).collect();
        lines.sort();
        lines.join("\n")
    }

    /// The cells of a table, without their widths.
    fn table(&self, text: &str) -> String {
        if !text.starts_with('+') {
            return self.simple(text);
        }
        let rows = text.lines().filter(|line| line.starts_with('|'));
        let mut rows =
            rows.map(|row| row.split('|').map(str::trim).map(String::from).collect::<Vec<_>>());
        let head = rows.next().unwrap_or_default();
        let mut body: Vec<String> = rows
            .map(|mut row| {
                for (cell, title) in row.iter_mut().zip(&head) {
                    if OWN.contains(&title.as_str()) {
                        *cell = "own".into();
                    }
                }
                self.normal(&row.join("|"))
            })
            .collect();
        body.sort();
        [vec![head.join("|")], body].concat().join("\n")
    }

    /// Fields by record: those of one end where the next one's begin.
    fn fields(&self, text: &str) -> String {
        let mut records = vec![String::new()];
        for line in text.lines() {
            let (name, value) = line.split_once(" : ").unwrap_or((line, ""));
            let name = name.trim_matches('"');
            // A list's header is followed by its first record; an empty line ends each.
            if name == "ID" || name.is_empty() {
                records.push(String::new());
            }
            if name.is_empty() {
                continue;
            }
            let value = if OWN.contains(&name) { "own" } else { value };
            writeln!(records.last_mut().unwrap(), "{name} : {value}").unwrap();
        }
        let mut records: Vec<_> = records.iter().map(|record| self.normal(record)).collect();
        records.sort();
        records.concat()
    }

    fn json(&self, text: &str) -> String {
        let Ok(value) = serde_json::from_str::<Value>(&self.quoted(text)) else {
            return self.simple(text);
        };
        format!("{:#}", plain_json(value))
    }

    /// JSON in which an id, as it has a name now, is a string.
    fn quoted(&self, text: &str) -> String {
        let mut text = text.to_string();
        for (name, forms) in &self.names {
            if let [_, decimal] = &forms[..] {
                text = text.replace(&format!("\":{decimal}"), &format!("\":\"{name}\""));
            }
        }
        self.normal(&text)
    }

    /// A list of members as it comes over the wire.
    fn members_in(&self, bytes: &[u8]) -> String {
        let list = pb::MemberListResponse::decode(bytes).expect("a list of members");
        let mut header = list.header.expect("a response has a header");
        header.raft_term = 0;
        let members = list.members.iter().map(|member| format!("{member:?}"));
        let mut lines: Vec<_> = members.map(|line| self.normal(&line)).collect();
        lines.sort();
        format!("{}\n{}", self.normal(&format!("{header:?}")), lines.join("\n"))
    }
}

const GAVE_UP: &str = "context deadline exceeded";

/// What is printed, and what both of its forms are taken for.
const SAME: [(&str, &str); 7] = [
    // Where etcdctl pads an id to 16 digits.
    ("Member  ", "Member "),
    ("cluster  ", "cluster "),
    // An alarm among the errors of a status: since 3.7 nothing is left blank behind it.
    ("alarm:NOSPACE ", "alarm:NOSPACE"),
    // A deadline passes for the member that was asked as it does for the client, which may hear of
    // either. What the member says is what it was waiting for.
    ("rpc error: code = Unknown desc = context deadline exceeded", GAVE_UP),
    ("Error: etcdserver: request timed out", "Error: context deadline exceeded"),
    ("Error: etcdserver: no leader", "Error: context deadline exceeded"),
    // This server speaks a little before the client gives up; the client may not hear it either.
    (
        "rpc error: code = Unknown desc = \
         etcdserver: request timed out, leader transfer took too long",
        GAVE_UP,
    ),
];

/// Where etcd 3.4 says something else than the etcd that this server follows.
struct Otherwise {
    command: &'static str,
    ours: &'static str,
    theirs: &'static str,
}

const OTHERWISE: [Otherwise; 4] = [
    // One voter of four has never run. 3.4 adds no member before all voters are connected; since 3.5.30
    // and 3.6.11 it is enough if those that are would still be a majority of five.
    Otherwise { command: TAKEN, ours: EXISTS, theirs: UNHEALTHY },
    // 3.4 proposes the promotion of a member that was removed, and a follower asks the leader again as
    // long as that fails. Now the leader looks first whether it has such a learner.
    Otherwise {
        command: "member promote ID-D --command-timeout=1s",
        ours: "Error: etcdserver: member not found",
        theirs: "Error: context deadline exceeded",
    },
    // 3.4 answers alarms without a header, which etcdctl itself does not survive when it prints fields.
    Otherwise { command: "alarm list -w json", ours: "\"header\"", theirs: "\"alarms\"" },
    Otherwise {
        command: "alarm list -w fields",
        ours: "AlarmType : NOSPACE",
        theirs: "nil pointer dereference",
    },
];

/// What any two clusters differ in, and the sizes, log positions and versions that tell how a server
/// works inside: by the names that JSON, fields and tables have for them.
const OWN: [&str; 21] = [
    "raft_term",
    "raftTerm",
    "raftIndex",
    "raftAppliedIndex",
    "dbSize",
    "dbSizeInUse",
    "version",
    "took",
    "RaftTerm",
    "RaftIndex",
    "RaftAppliedIndex",
    "DBSize",
    "DBSizeInUse",
    "Version",
    "Took",
    "VERSION",
    "TOOK",
    "DB SIZE",
    "RAFT TERM",
    "RAFT INDEX",
    "RAFT APPLIED INDEX",
];

fn plain_json(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let plain = |(name, value): (String, Value)| {
                let value =
                    if OWN.contains(&name.as_str()) { "own".into() } else { plain_json(value) };
                (name, value)
            };
            Value::Object(map.into_iter().map(plain).collect())
        }
        Value::Array(list) => {
            let mut list: Vec<_> = list.into_iter().map(plain_json).collect();
            // By id or by who answered first.
            list.sort_by_key(Value::to_string);
            Value::Array(list)
        }
        other => other,
    }
}

/// A line without durations, with what it lists in an order of its own.
fn plain_line(line: &str) -> String {
    if let Some((said, _)) = line.split_once("took = ") {
        return format!("{said}took = own");
    }
    if let Some((name, list)) = line.split_once("INITIAL_CLUSTER=\"") {
        let mut list: Vec<_> = list.trim_end_matches('"').split(',').collect();
        list.sort_unstable();
        return format!("{name}INITIAL_CLUSTER=\"{}\"", list.join(","));
    }
    let cells: Vec<_> = line.split(", ").collect();
    match &cells[..] {
        // The status of an endpoint: version and size, later term and log positions.
        [endpoint, id, _, size, leads, learns, _, _, _, errors @ ..] if size.ends_with('B') => {
            [&[*endpoint, *id, *leads, *learns], errors].concat().join(", ")
        }
        _ => line.to_string(),
    }
}

/// In every way that etcdctl prints.
async fn in_all_formats(stage: &mut Stage, at: &str, command: &str) {
    for format in ["simple", "table", "json", "fields"] {
        stage.play(at, &[&format!("{command} -w {format}")]).await;
    }
}

async fn script(program: Program) -> Vec<Said> {
    let mut stage = Stage::open(program).await;
    members_are_listed(&mut stage).await;
    a_member_that_never_runs(&mut stage).await;
    a_member_joins(&mut stage).await;
    leadership_moves(&mut stage).await;
    endpoints_are_looked_at(&mut stage).await;
    a_member_leaves(&mut stage).await;
    members_are_down(&mut stage).await;
    stage.said
}

async fn members_are_listed(stage: &mut Stage) {
    stage.settle().await;
    for at in ["A", "B", "ABC"] {
        stage.play(at, &["member list"]).await;
    }
    in_all_formats(stage, "A", "member list").await;
    stage.play("A", &["member list -w protobuf", "member list --hex", "member list more"]).await;
    stage.play("A", &["member list -w nonsense"]).await;
}

async fn a_member_that_never_runs(stage: &mut Stage) {
    // Until all connections have stood for 5 s, nothing is added.
    stage.play_until_not(UNHEALTHY, "A", TAKEN).await;
    let commands = &[
        "member add",
        "member add new",
        "member add new --peer-urls=",
        "member add new --peer-urls=nonsense",
        "member add new --peer-urls=127.0.0.1:1",
        "member add new --peer-urls=ftp://127.0.0.1:1",
        "member add new --peer-urls=http://127.0.0.1",
        "member add new --peer-urls=http://127.0.0.1:1/path",
        "member add new --peer-urls=http://127.0.0.1:1,http://PEER-B",
        "member add new more --peer-urls=http://127.0.0.1:1",
    ];
    stage.play("A", commands).await;
    stage
        .add("ID-X", "A", "member add new --peer-urls=http://127.0.0.1:2,http://127.0.0.1:1")
        .await;
    in_all_formats(stage, "A", "member list").await;
    // Four voters, of which one has never run.
    stage.play("A", &[TAKEN]).await;
    let commands = &[
        "member update",
        "member update ID-X",
        "member update xyz --peer-urls=http://127.0.0.1:3",
        "member update 1 --peer-urls=http://127.0.0.1:3",
        "member update ID-X --peer-urls=http://PEER-A",
        "member update ID-X --peer-urls=http://127.0.0.1:4,http://127.0.0.1:3",
        "member list",
        "member promote",
        "member promote xyz",
        "member promote 1",
        "member promote ID-X",
        "member promote ID-B",
        "member remove",
        "member remove xyz",
        "member remove 1",
        "member remove ID-X ID-B",
    ];
    stage.play("A", commands).await;
    stage.settle().await;
    // By a follower, and in another format.
    let commands = &[
        "member promote 1",
        "member promote ID-A",
        "member update ID-X --peer-urls=http://127.0.0.1:3 -w json",
        "member remove ID-X",
        "member remove ID-X",
        "member list",
    ];
    stage.play("B", commands).await;
    stage.settle().await;
}

async fn a_member_joins(stage: &mut Stage) {
    let node = stage.cluster.place_joining(&[0, 1, 2]);
    stage.cast.push(node);
    stage.call(3);
    stage.add("ID-D", "A", "member add NAME-D --learner --peer-urls=http://PEER-D").await;
    stage.settle().await;
    in_all_formats(stage, "A", "member list").await;
    let commands = &[
        "member list -w protobuf",
        "member add more --learner --peer-urls=http://127.0.0.1:1",
        "member promote ID-D",
        "move-leader ID-D",
    ];
    stage.play("A", commands).await;
    stage.play("B", &["member promote ID-D"]).await;
    stage.play("A", &["put k1 v1", "put k2 v2", "del k1"]).await;

    stage.cluster.run(node);
    let learner = stage.cluster.client_within(node, Duration::from_secs(2));
    wait_for("the learner to catch up", || async {
        let members = stage.cluster.client(stage.cast[0]).members().await;
        let members = members.map_err(|error| error.to_string())?;
        // It has published itself when it has a name.
        let published = members.iter().all(|member| !member.name.is_empty());
        match learner.local_revision().await {
            Ok(4) if published => Ok(()),
            seen => Err(format!("{seen:?}, published: {published}")),
        }
    })
    .await;
    in_all_formats(stage, "D", "endpoint status").await;
    stage.play("D", &["get k2 --consistency=s", "put k v", "move-leader ID-A"]).await;
    in_all_formats(stage, "A", "endpoint status --cluster").await;
    in_all_formats(stage, "A", "member list").await;
    let behind = "in sync with leader";
    stage.play_until_not(behind, "B", "member promote ID-D").await;
    stage.play("A", &["member promote ID-D"]).await;
    stage.play_until_not(UNHEALTHY, "A", TAKEN).await;
    stage.settle().await;
    stage.play("D", &["member list", "get k2", "endpoint health"]).await;
}

async fn leadership_moves(stage: &mut Stage) {
    let commands = &["move-leader", "move-leader xyz", "move-leader ID-A ID-B"];
    stage.play("ABCD", commands).await;
    stage.play("B", &["move-leader ID-B", "move-leader 1"]).await;
    stage.play("BC", &["move-leader ID-C"]).await;
    stage.play("ABCD", &["move-leader 1", "move-leader ID-A", "move-leader ID-B"]).await;
    stage.led_by(1).await;
    stage.play("A", &["move-leader ID-C"]).await;
    in_all_formats(stage, "D", "endpoint status --cluster").await;
    stage.play("DCBA", &["move-leader ID-A"]).await;
    stage.led_by(0).await;
}

async fn endpoints_are_looked_at(stage: &mut Stage) {
    stage.play("A", &["put k3 v3"]).await;
    stage.settle().await;
    for what in ["status", "health", "hashkv"] {
        in_all_formats(stage, "A", &format!("endpoint {what} --cluster")).await;
        in_all_formats(stage, "ABCD", &format!("endpoint {what}")).await;
    }
    let commands = &["endpoint hashkv --cluster --rev 3", "endpoint hashkv --cluster --rev 100"];
    stage.play("B", commands).await;
    stage.play("B", &["alarm list", "alarm disarm"]).await;
    let client = stage.cluster.client(stage.cast[2]);
    let alarm = pb::AlarmRequest {
        action: pb::alarm_request::AlarmAction::Activate as i32,
        member_id: stage.cluster.id(stage.cast[1]).await,
        alarm: pb::AlarmType::Nospace as i32,
    };
    client.maintenance.clone().alarm(alarm).await.unwrap();
    stage.settle().await;
    in_all_formats(stage, "A", "alarm list").await;
    in_all_formats(stage, "A", "endpoint status --cluster").await;
    in_all_formats(stage, "A", "endpoint health --cluster").await;
    stage.play("A", &["put k4 v4", "alarm disarm", "alarm list", "alarm disarm"]).await;
    stage.settle().await;
}

async fn a_member_leaves(stage: &mut Stage) {
    stage.play_until_not(UNHEALTHY, "B", "member remove ID-D").await;
    let status = stage.cluster.wait_end(stage.cast[3]).await;
    assert_eq!(status.code(), Some(0), "{:?}: the removed member", stage.cluster.program);
    stage.settle().await;
    stage.play("B", &["member list", "member remove ID-D"]).await;
    stage.play("B", &["member promote ID-D --command-timeout=1s"]).await;
    stage.play("A", &["move-leader ID-D", "member update ID-D --peer-urls=http://PEER-D"]).await;
    stage.play("DA", &["endpoint health --command-timeout=1s"]).await;
    stage.play("D", &["member list --command-timeout=1s"]).await;
}

async fn members_are_down(stage: &mut Stage) {
    stage.cluster.kill(stage.cast[2]);
    // Three voters, of which one is down: four would have no majority yet.
    let refused = stage.play_until_not(EXISTS, "A", TAKEN).await;
    assert!(refused.is_empty());
    let commands = &[
        "endpoint status --cluster --command-timeout=2s -w table",
        "endpoint status --cluster --command-timeout=2s -w json",
        "endpoint health --cluster --command-timeout=2s",
        "endpoint health --cluster --command-timeout=2s -w table",
        "endpoint health --command-timeout=2s -w json",
        "endpoint hashkv --command-timeout=2s",
    ];
    stage.play_together("ABC", commands).await;
    let commands = &[
        "member list",
        "alarm list",
        "member remove ID-B",
        "member remove ID-A",
        "get k3",
        "move-leader ID-C --command-timeout=1s",
    ];
    stage.play("ABC", commands).await;

    stage.cluster.kill(stage.cast[1]);
    let client = stage.cluster.client(stage.cast[0]);
    wait_for("the leader to stand down", || async {
        match client.status().await.map_err(|error| error.to_string())?.leader {
            0 => Ok(()),
            leader => Err(format!("{leader:x} leads")),
        }
    })
    .await;
    // etcdctl does not ask for a list that a majority confirms, and gets what the member knows.
    in_all_formats(stage, "A", "member list").await;
    in_all_formats(stage, "A", "endpoint status").await;
    let commands = &[
        "endpoint hashkv",
        "move-leader ID-B",
        "get k3 --consistency=s",
        "member add new --peer-urls=http://127.0.0.1:1",
    ];
    stage.play("A", commands).await;
    let commands = &[
        "endpoint health --command-timeout=1s",
        "endpoint health --command-timeout=1s -w json",
        "endpoint health --cluster --command-timeout=1s",
        "alarm list --command-timeout=1s",
        "member update ID-B --peer-urls=http://127.0.0.1:1 --command-timeout=1s",
        "member promote ID-B --command-timeout=1s",
        "member remove ID-B --command-timeout=1s",
        "get k3 --command-timeout=1s",
        "put k3 v --command-timeout=1s",
    ];
    stage.play_together("A", commands).await;
}

/// The reason for this difference, if it is one that is known.
fn known(ours: &Said, theirs: &Said) -> Option<usize> {
    OTHERWISE.iter().position(|known| {
        let (_, command) = ours.command.split_once(": ").expect("a command is told with endpoints");
        command == known.command
            && format!("{ours}").contains(known.ours)
            && format!("{theirs}").contains(known.theirs)
    })
}

#[test]
fn etcdctl_prints_of_three_members_what_it_prints_of_etcd() {
    run(async {
        let (ours, theirs) = tokio::join!(script(Program::Quorate), script(Program::Etcd));
        assert_eq!(ours.len(), theirs.len());
        let mut differences = String::new();
        let mut seen = Vec::new();
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours.command, theirs.command);
            if ours == theirs {
                continue;
            }
            match known(ours, theirs) {
                Some(reason) => seen.push(reason),
                None => {
                    writeln!(differences, "{}\nhere: {ours}etcd: {theirs}", ours.command).unwrap();
                }
            }
        }
        assert!(differences.is_empty(), "{differences}");
        // Each at its place in the script, and at no other.
        assert_eq!(seen, [0, 2, 3, 1]);
    });
}
