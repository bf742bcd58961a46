//! Clients that write and read on every member at once, and everything they were told, timed by one
//! clock.

// Two test binaries share this module, and each uses a part of it.
#![allow(dead_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate_proto::etcdserverpb::request_op::Request;
use quorate_proto::etcdserverpb::response_op::Response;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::check::watch::{Log, Told};
use crate::check::{
    self, Answer, Call, Change, Guard, Key, Kv, Operation, Outcome, Reply, Revision, Step, Summary,
    Time, Value, Violation,
};
use crate::rig::client::{Client, certainly_failed, revision};
use crate::rig::cluster::Cluster;
use crate::rig::net::Node;
use crate::rig::random::Random;
use crate::rig::{PATIENCE, wait_for};

/// What the clients do.
#[derive(Clone, Debug)]
pub struct Load {
    pub seed: u64,
    pub clients_per_member: usize,
    /// The longest pause of a client between two calls.
    pub pause_max: Duration,
    /// How long a client waits for an answer.
    pub deadline: Duration,
    /// Bytes that a value is filled up to.
    pub value_bytes: usize,
    /// All plain reads may be old, and are taken for linearizable ones: a lie that has to be found.
    pub trust_serializable: bool,
}

impl Default for Load {
    fn default() -> Self {
        Load {
            seed: Random::fresh_seed(),
            clients_per_member: 3,
            pause_max: Duration::from_millis(40),
            deadline: Duration::from_secs(3),
            value_bytes: 0,
            trust_serializable: false,
        }
    }
}

/// Keys come in groups; a transaction on several keys stays within one, so that each group can be
/// judged by itself.
const GROUPS: u64 = 3;
const GROUP: u64 = 3;

fn key_name(key: Key) -> String {
    format!("k/{key}")
}

/// The workload's key of that name; others are none of its business.
fn key_number(name: &[u8]) -> Option<Key> {
    std::str::from_utf8(name).ok()?.strip_prefix("k/")?.parse().ok()
}

/// A value begins with its number; the filling follows a colon.
fn value_bytes(value: Value, length: usize) -> Vec<u8> {
    let mut bytes = format!("{value}:").into_bytes();
    bytes.resize(bytes.len().max(length), b'.');
    bytes
}

/// # Panics
/// If the bytes are none that a client wrote: the store has made them up.
fn value_number(bytes: &[u8]) -> Value {
    let digits = bytes.iter().position(|byte| *byte == b':').map(|colon| &bytes[..colon]);
    digits
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
        .unwrap_or_else(|| panic!("nobody wrote the value {:?}", String::from_utf8_lossy(bytes)))
}

fn pair(raw: &KeyValueBytes) -> (Option<Key>, Kv) {
    let kv = raw.parse().expect("a key is a message");
    let key = key_number(&kv.key);
    let kv = Kv {
        // Of a key that is not ours the value does not matter.
        value: if key.is_some() && kv.version > 0 { value_number(&kv.value) } else { 0 },
        created: kv.create_revision,
        modified: kv.mod_revision,
        version: kv.version,
    };
    (key, kv)
}

/// Everything that is recorded.
#[derive(Default)]
struct Record {
    operations: Vec<Operation>,
    watches: Vec<Log>,
}

/// Clients at work, and watchers of every member.
pub struct Recorder {
    started: Instant,
    record: Rc<RefCell<Record>>,
    /// Clients end when this becomes true.
    stop: watch::Sender<bool>,
    /// Watchers end with the last revision, once it is known.
    last: watch::Sender<Option<Revision>>,
    clients: Vec<JoinHandle<()>>,
    watchers: Vec<(Node, JoinHandle<()>)>,
    load: Load,
}

impl Recorder {
    /// Starts clients and a watcher on each of `nodes`; the store must be empty. Must be called within
    /// a local task set: clients and watchers share what they record.
    pub fn start(cluster: &Cluster, nodes: &[Node], load: Load) -> Recorder {
        let mut recorder = Recorder {
            started: Instant::now(),
            record: Rc::default(),
            stop: watch::Sender::new(false),
            last: watch::Sender::new(None),
            clients: Vec::new(),
            watchers: Vec::new(),
            load,
        };
        for node in nodes {
            recorder.watch(cluster, *node);
            recorder.work(cluster, *node);
        }
        recorder
    }

    /// Adds clients of member `node`.
    pub fn work(&mut self, cluster: &Cluster, node: Node) {
        for _ in 0..self.load.clients_per_member {
            let number = self.clients.len();
            let seed = self.load.seed.wrapping_add(number as u64 * 1_000_003);
            let worker = Worker {
                number,
                member: node,
                client: cluster.client_within(node, self.load.deadline),
                random: Random::new(seed),
                serial: 0,
                known: Vec::new(),
                started: self.started,
                record: self.record.clone(),
                load: self.load.clone(),
            };
            let stopped = self.stop.subscribe();
            self.clients.push(tokio::task::spawn_local(worker.run(stopped)));
        }
    }

    /// Adds a watcher of member `node`: of everything, from the first revision on.
    pub fn watch(&mut self, cluster: &Cluster, node: Node) {
        let log = self.record.borrow().watches.len();
        self.record.borrow_mut().watches.push(Log { member: node, told: Vec::new() });
        let watcher = Watcher {
            log,
            client: cluster.client_within(node, self.load.deadline),
            random: Random::new(self.load.seed ^ (log as u64 + 1)),
            started: self.started,
            record: self.record.clone(),
            end: self.last.subscribe(),
        };
        self.watchers.push((node, tokio::task::spawn_local(watcher.run())));
    }

    /// Counts the answered calls of which this is true.
    fn count(&self, of: impl Fn(&Operation) -> bool) -> usize {
        let record = self.record.borrow();
        let answered = record.operations.iter().filter(|operation| operation.reply().is_some());
        answered.filter(|operation| of(operation)).count()
    }

    /// Waits until member `node` has answered `more` further plain reads.
    pub async fn reads_by(&self, node: Node, more: usize) {
        let read = |operation: &Operation| {
            matches!(operation.call.then[..], [Step::Get(_)]) && operation.member == node
        };
        self.reach(more, "reads to be answered", || self.count(read)).await;
    }

    /// Waits until `more` further calls are answered: the cluster is at work.
    pub async fn progress(&self, more: usize) {
        self.reach(more, "clients to be answered", || self.count(|_| true)).await;
    }

    async fn reach(&self, more: usize, what: &str, count: impl Fn() -> usize) {
        let goal = count() + more;
        wait_for(what, || async {
            let answered = count();
            if answered >= goal { Ok(()) } else { Err(format!("{answered} of {goal} are")) }
        })
        .await;
    }

    /// Ends the clients, waits until every watcher has seen all, and judges what happened. `nodes` are
    /// those that are members now; all of them run and reach each other.
    ///
    /// # Panics
    /// With what was violated, and the seed.
    pub async fn verify(self, cluster: &Cluster, nodes: &[Node]) -> Summary {
        let seed = self.load.seed;
        let violations = match self.judge(cluster, nodes).await {
            Ok(summary) => return summary,
            Err(violations) => violations,
        };
        for violation in violations.iter().take(VIOLATIONS_SHOWN) {
            println!("VIOLATION {violation}");
        }
        panic!("{} violations, seed {seed}", violations.len());
    }

    /// The same, for who wants to see violations.
    pub async fn judge(self, cluster: &Cluster, nodes: &[Node]) -> Result<Summary, Vec<Violation>> {
        self.stop.send_replace(true);
        for client in self.clients {
            client.await.expect("a client does not panic");
        }
        // What a call without an answer may still do behind this revision is not looked at.
        let last =
            cluster.by_any("a last write", |c| async move { c.put("!last", "").await }).await;
        let hash = cluster.equal_hashes(nodes, last).await;
        self.last.send_replace(Some(last));
        for (node, watcher) in self.watchers {
            if !nodes.contains(&node) {
                // From a member that is gone nothing more comes.
                watcher.abort();
                continue;
            }
            let told = tokio::time::timeout(PATIENCE, watcher).await;
            let told = told.unwrap_or_else(|_| panic!("the watch of member {node} ends early"));
            told.expect("a watcher does not panic");
        }
        let record = self.record.take();
        // Of a removed member's watch what was told counts as well; it only is not all.
        let (whole, parts): (Vec<Log>, Vec<Log>) =
            record.watches.into_iter().partition(|log| nodes.contains(&log.member));
        let began = Instant::now();
        let summary = check::check(&record.operations, &whole, &parts, last)?;
        println!("{summary:?}, hash {hash:08x}, judged in {:?}", began.elapsed());
        assert!(summary.acknowledged > 0 && summary.revisions > 1, "nothing was done");
        Ok(summary)
    }
}

/// More than these rarely tell more.
const VIOLATIONS_SHOWN: usize = 20;

fn now(started: Instant) -> Time {
    started.elapsed().as_nanos() as Time
}

/// One client: one call at a time.
struct Worker {
    number: usize,
    member: Node,
    client: Client,
    random: Random,
    serial: u64,
    /// What it has last seen of keys, for comparisons.
    known: Vec<(Key, Option<Kv>)>,
    started: Instant,
    record: Rc<RefCell<Record>>,
    load: Load,
}

impl Worker {
    async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        while !*stopped.borrow() {
            let call = self.draw();
            let invoked = now(self.started);
            let result = self.send(&call).await;
            let returned = now(self.started);
            let failed = result.is_err();
            let (returned, outcome) = match result {
                Ok(reply) => {
                    self.learn(&call, &reply);
                    (returned, Outcome::Done(reply))
                }
                Err(status) if certainly_failed(&status) => (Time::MAX, Outcome::Failed),
                Err(status) => {
                    assert!(plausible(&status), "{status:?} of {call:?}");
                    (Time::MAX, Outcome::Unknown)
                }
            };
            let mut call = call;
            call.serializable &= !self.load.trust_serializable;
            let (client, member) = (self.number, self.member);
            let operation = Operation { client, member, invoked, returned, call, outcome };
            self.record.borrow_mut().operations.push(operation);
            // A member that is down refuses at once: no need to ask it all the time.
            let longest = if failed { 5 * self.load.pause_max } else { self.load.pause_max };
            let pause = longest.mul_f64(self.random.below(1000) as f64 / 1000.0);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stopped.changed() => {}
            }
        }
    }

    fn value(&mut self) -> Value {
        self.serial += 1;
        (self.number as Value + 1) * 1_000_000 + self.serial
    }

    fn draw(&mut self) -> Call {
        let group = self.random.below(GROUPS) as Key * GROUP as Key;
        let key = group + self.random.below(GROUP) as Key;
        match self.random.below(100) {
            0..30 => Call::plain(Step::Put(key, self.value())),
            roll @ 30..60 => {
                let serializable = roll >= 55 || self.load.trust_serializable;
                Call { serializable, ..Call::plain(Step::Get(key)) }
            }
            60..68 => Call::plain(Step::Delete(key)),
            68..88 => {
                // What it knows may be old: then the comparison fails, and it learns.
                let known = self.known.iter().find(|(known, _)| *known == key);
                let kv = known.and_then(|(_, kv)| *kv);
                let guard = match kv {
                    Some(kv) if self.random.percent(50) => Guard::Value(key, kv.value),
                    _ => Guard::Revision {
                        key,
                        revision: kv.map_or(0, |kv| kv.modified),
                        value: kv.map(|kv| kv.value),
                    },
                };
                let then = match self.random.percent(80) {
                    true => Step::Put(key, self.value()),
                    false => Step::Delete(key),
                };
                let otherwise = vec![Step::Get(key)];
                Call { when: vec![guard], then: vec![then], otherwise, serializable: false }
            }
            88..95 => {
                let (one, two) = (self.value(), self.value());
                let steps =
                    [Step::Put(group, one), Step::Delete(group + 1), Step::Put(group + 2, two)];
                // Which key plays which part changes.
                let turn = self.random.below(GROUP) as Key;
                let then = steps.map(|step| {
                    let key = group + (step.key() - group + turn) % GROUP as Key;
                    match step {
                        Step::Put(_, value) => Step::Put(key, value),
                        Step::Delete(_) | Step::Get(_) => Step::Delete(key),
                    }
                });
                Call { then: then.to_vec(), ..Call::default() }
            }
            _ => {
                let then = (0..GROUP as Key).map(|n| Step::Get(group + n)).collect();
                Call { then, ..Call::default() }
            }
        }
    }

    fn learn(&mut self, call: &Call, reply: &Reply) {
        for (step, answer) in call.branch(reply.succeeded).iter().zip(&reply.answers) {
            let key = step.key();
            self.known.retain(|(known, _)| *known != key);
            if let Answer::Got(kv) = answer {
                self.known.push((key, *kv));
            }
        }
    }

    /// A plain step by its own method, the rest as a transaction.
    async fn send(&self, call: &Call) -> Result<Reply, Status> {
        let (revision, succeeded, answers) = match call.then[..] {
            [step] if call.when.is_empty() => match self.request(step, call.serializable) {
                Request::RequestPut(request) => {
                    let response = self.client.put_request(request).await?;
                    (revision(&response.header), true, vec![Answer::Put])
                }
                Request::RequestDeleteRange(request) => {
                    let response = self.client.delete_range(request).await?;
                    (revision(&response.header), true, vec![Answer::Deleted(response.deleted)])
                }
                Request::RequestRange(request) => {
                    let response = self.client.range(request).await?;
                    (revision(&response.header), true, vec![got(step.key(), &response)])
                }
                Request::RequestTxn(_) => unreachable!("a step is no transaction"),
            },
            _ => {
                let op = |step: &Step| pb::RequestOp { request: Some(self.request(*step, false)) };
                let request = pb::TxnRequest {
                    compare: call.when.iter().map(|guard| compare(*guard, &self.load)).collect(),
                    success: call.then.iter().map(op).collect(),
                    failure: call.otherwise.iter().map(op).collect(),
                };
                let response = self.client.txn(request).await?;
                let steps = call.branch(response.succeeded);
                assert_eq!(steps.len(), response.responses.len(), "{call:?}: {response:?}");
                let answers = steps.iter().zip(&response.responses).map(|(step, answer)| {
                    match answer.response.as_ref().expect("an answer to each step") {
                        Response::ResponsePut(_) => Answer::Put,
                        Response::ResponseDeleteRange(deleted) => Answer::Deleted(deleted.deleted),
                        Response::ResponseRange(range) => got(step.key(), range),
                        Response::ResponseTxn(_) => panic!("{step:?} is no transaction"),
                    }
                });
                let answers = answers.collect();
                (revision(&response.header), response.succeeded, answers)
            }
        };
        Ok(Reply { revision, succeeded, answers })
    }

    fn request(&self, step: Step, serializable: bool) -> Request {
        let key = key_name(step.key()).into();
        match step {
            Step::Put(_, value) => {
                let value = value_bytes(value, self.load.value_bytes).into();
                Request::RequestPut(pb::PutRequest { key, value, ..Default::default() })
            }
            Step::Delete(_) => {
                Request::RequestDeleteRange(pb::DeleteRangeRequest { key, ..Default::default() })
            }
            Step::Get(_) => {
                Request::RequestRange(pb::RangeRequest { key, serializable, ..Default::default() })
            }
        }
    }
}

fn got(asked: Key, response: &pb::RangeResponse) -> Answer {
    Answer::Got(match &response.kvs[..] {
        [] => None,
        [raw] => {
            let (key, kv) = pair(raw);
            assert_eq!(key, Some(asked), "an answer about another key");
            Some(kv)
        }
        more => panic!("{} answers about key {asked}", more.len()),
    })
}

fn compare(guard: Guard, load: &Load) -> pb::Compare {
    let (target, union) = match guard {
        Guard::Value(_, value) => {
            let bytes = value_bytes(value, load.value_bytes);
            (CompareTarget::Value, TargetUnion::Value(bytes.into()))
        }
        Guard::Revision { revision, .. } => {
            (CompareTarget::Mod, TargetUnion::ModRevision(revision))
        }
    };
    pb::Compare {
        result: CompareResult::Equal as i32,
        target: target as i32,
        key: key_name(guard.key()).into(),
        target_union: Some(union),
        ..Default::default()
    }
}

/// Whether a member under faults may say this. Anything else is a bug, not a fault.
fn plausible(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => true,
        // The member's connection broke in the middle of a call; or, in etcd's words, a proposal was
        // dropped while leadership went to another member, or the member was stopping.
        Code::Unknown | Code::Internal => true,
        _ => false,
    }
}

/// Follows one member's changes, over broken connections and some that it breaks itself.
struct Watcher {
    log: usize,
    client: Client,
    random: Random,
    started: Instant,
    record: Rc<RefCell<Record>>,
    end: watch::Receiver<Option<Revision>>,
}

impl Watcher {
    async fn run(mut self) {
        while !self.done() {
            self.follow().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn last(&self) -> Revision {
        self.record.borrow().watches[self.log].last()
    }

    fn done(&self) -> bool {
        self.end.borrow().is_some_and(|last| self.last() >= last)
    }

    /// One connection, until it breaks, has lasted long enough, or has told all there is.
    async fn follow(&mut self) {
        let Ok(mut watching) = self.client.watch_all(self.last() + 1).await else { return };
        let long_enough = Duration::from_millis(500 + self.random.below(6000));
        // Its time is over: a new one goes on where this one was.
        let over = tokio::time::sleep(long_enough);
        tokio::pin!(over);
        while !self.done() {
            tokio::select! {
                () = &mut over => return,
                // Maybe it has told all already.
                _ = self.end.changed() => {}
                response = watching.responses.message() => match response {
                    Ok(Some(response)) if !response.canceled => self.take(&response),
                    _ => return,
                },
            }
        }
    }

    fn take(&self, response: &pb::WatchResponse) {
        let change = |event: &quorate_proto::mvccpb::Event| {
            let (key, kv) = pair(event.kv.as_ref().expect("an event has a key"));
            let before = event.prev_kv.as_ref().map(|raw| pair(raw).1);
            // A delete's pair has a key and its revision, and nothing else.
            let now = (kv.version > 0).then_some(kv);
            (kv.modified, Change { key, now, before })
        };
        if !response.events.is_empty() {
            let events = response.events.iter().map(change).collect();
            let told = Told { received: now(self.started), events };
            self.record.borrow_mut().watches[self.log].told.push(told);
        }
    }
}
