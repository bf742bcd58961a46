//! A session: one server, the threads and connections that load it, and the slices run on them.
//!
//! Each thread is a runtime of its own with its share of the connections, their clients and watchers;
//! threads meet only in a counter of requests. They wait for commands between slices, so that two
//! sessions can take turns without connecting anew.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use quorate_proto::etcdserverpb as pb;
use tokio::sync::mpsc as commands;
use tokio::task::{JoinHandle, spawn_local};

use super::BenchError;
use super::client::{CallError, Channel, ConnectError, Connection, Credentials, Endpoint, Method};
use super::pace::{Slice, Supply};
use super::process;
use super::tally::{Tally, latencies};
use super::watch::{Delivery, WatchStream};
use super::work::{Client, Done, Load, Work, WorkError, scratch};

/// How often the calling thread looks whether the run gets on.
const LOOK: Duration = Duration::from_millis(100);

/// How to reach and how hard to press a server; the same for both of two compared.
#[derive(Clone, Debug)]
pub struct Shape {
    pub threads: usize,
    pub conns: usize,
    pub clients: usize,
    /// Requests per second over all clients; None for closed loop.
    pub rate: Option<f64>,
    pub compact: Option<Compact>,
    /// Who the clients are.
    pub user: Option<Credentials>,
    /// Logins per second of that user beside the load.
    pub logins: Option<f64>,
    /// What is done in the second half of each slice of [`Work::PutDuring`].
    pub during: During,
    pub dial_timeout: Duration,
    /// A slice in which nothing completes for so long has failed.
    pub stall_timeout: Duration,
}

/// Compaction while the load runs.
#[derive(Clone, Copy, Debug)]
pub struct Compact {
    pub interval: Duration,
    /// How many revisions are kept.
    pub keep: i64,
}

/// What an operator does to a server while the load runs.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct During {
    /// Compact over and over, all but so many revisions.
    pub compaction: Option<i64>,
    /// Defragment each endpoint over and over.
    pub defragment: bool,
}

/// How much one slice does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    Requests(u64),
    Time(Duration),
}

/// What clients do in a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Write each key of the key space once.
    Populate,
    Measure,
    /// The same, and what [`Shape::during`] says is done beside it.
    Disturbed,
}

/// What a slice has measured.
#[derive(Clone, Debug)]
pub struct SliceResult {
    pub tally: Tally,
    /// From the start to the last completion.
    pub elapsed: Duration,
    /// CPU time of this process in that time.
    pub client_cpu: Duration,
}

enum Command {
    Run(Slice, Phase),
    Collect,
    Close,
}

enum Report {
    /// Connected, clients and watchers ready.
    Ready(Result<Ready, BenchError>),
    /// This thread's clients have left the slice.
    Ran(Ran),
    /// The awaited number of events is there.
    Delivered,
    /// A watch stream broke.
    Broken(BenchError),
    Collected(Tally),
    Closed(Result<(), BenchError>),
}

struct Ready {
    /// The first thread asks for it.
    version: Option<String>,
    created: Histogram<u64>,
}

#[derive(Default)]
struct Ran {
    failure: Option<BenchError>,
    /// Events that the watchers must get.
    events: u64,
    /// Events of puts that failed: they may come or not.
    possible_events: u64,
}

/// The connections to one server and the threads behind them.
pub struct Session {
    load: Arc<Load>,
    shape: Shape,
    workers: Vec<Worker>,
    reports: mpsc::Receiver<Report>,
    delivery: Arc<Delivery>,
    completed: Arc<AtomicU64>,
    /// Numbers given out in all slices so far.
    numbers: u64,
    /// Events that must have come by now.
    events: u64,
    /// Events that may have come beside them.
    possible_events: u64,
    /// Version that the server reports.
    pub version: String,
    /// Times to create a watcher, in nanoseconds.
    pub created: Histogram<u64>,
}

struct Worker {
    commands: commands::Sender<Command>,
    thread: std::thread::JoinHandle<()>,
}

impl Session {
    /// Connects all connections and prepares all clients and watchers.
    ///
    /// # Errors
    /// If an endpoint cannot be reached or does not behave like etcd.
    pub fn open(
        endpoints: &[Endpoint],
        load: Arc<Load>,
        shape: Shape,
    ) -> Result<Session, BenchError> {
        let (sender, reports) = mpsc::channel();
        let delivery = Arc::new(Delivery::new());
        let completed = Arc::new(AtomicU64::new(0));
        let threads = shape.threads.min(shape.conns);
        let mut workers = Vec::with_capacity(threads);
        for thread in 0..threads {
            // One command at a time: the next is sent when the last is answered.
            let (commands, receiver) = commands::channel(1);
            let context = Context {
                thread,
                threads,
                endpoints: endpoints.to_vec(),
                load: load.clone(),
                shape: shape.clone(),
                reports: sender.clone(),
                delivery: delivery.clone(),
                completed: completed.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("bench-{thread}"))
                .spawn(move || context.main(receiver))
                .map_err(BenchError::Runtime)?;
            workers.push(Worker { commands, thread });
        }
        let mut session = Session {
            load,
            shape,
            workers,
            reports,
            delivery,
            completed,
            numbers: 0,
            events: 0,
            possible_events: 0,
            version: String::new(),
            created: latencies(),
        };
        for _ in 0..threads {
            match session.report(&mut |_| {})? {
                Report::Ready(ready) => {
                    let ready = ready?;
                    session.version = ready.version.unwrap_or(session.version);
                    session.created.add(&ready.created).expect("the same bounds");
                }
                _ => unreachable!("a thread reports first that it is ready"),
            }
        }
        Ok(session)
    }

    /// Writes all keys of the key space.
    ///
    /// # Errors
    /// If a single one cannot be written.
    pub fn populate(&mut self, progress: &mut dyn FnMut(u64)) -> Result<(), BenchError> {
        assert_eq!(self.numbers, 0, "the key space is written before anything else");
        let budget = Budget::Requests(self.load.keys.space);
        let result = self.run(budget, Phase::Populate, progress)?;
        // These numbers are no part of the workload's sequence.
        self.numbers = 0;
        match result.tally.errors.first_key_value() {
            None => Ok(()),
            Some((error, _)) => Err(BenchError::Populate(error.clone())),
        }
    }

    /// Runs the workload for `budget`; `progress` is told now and then how many requests are done.
    ///
    /// # Errors
    /// If the server is lost, or nothing completes for the stall timeout, or watchers lack events.
    pub fn slice(
        &mut self,
        budget: Budget,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SliceResult, BenchError> {
        if self.load.work != Work::PutDuring {
            return self.run(budget, Phase::Measure, progress);
        }
        let (quiet, disturbed) = match budget {
            Budget::Requests(count) => {
                (Budget::Requests(count - count / 2), Budget::Requests(count / 2))
            }
            Budget::Time(time) => (Budget::Time(time / 2), Budget::Time(time / 2)),
        };
        let mut result = self.run(quiet, Phase::Measure, progress)?;
        let second = self.run(disturbed, Phase::Disturbed, progress)?;
        result.tally.merge(&second.tally);
        result.elapsed += second.elapsed;
        result.client_cpu += second.client_cpu;
        Ok(result)
    }

    fn run(
        &mut self,
        budget: Budget,
        phase: Phase,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SliceResult, BenchError> {
        // Populating goes as fast as it can: its latencies are not of interest.
        let rate = self.shape.rate.filter(|_| phase != Phase::Populate);
        let completed = self.completed.load(Ordering::Relaxed);
        let cpu = process::own_cpu();
        let start = Instant::now();
        let (count, deadline) = match budget {
            Budget::Requests(count) => (count, None),
            Budget::Time(time) => {
                let due = rate.map_or(u64::MAX, |rate| (rate * time.as_secs_f64()).floor() as u64);
                (due, Some(start + time))
            }
        };
        let slice = Slice {
            base: self.numbers,
            count,
            start,
            deadline,
            rate,
            taken: Arc::default(),
            stop: Arc::default(),
        };
        for worker in &self.workers {
            worker
                .commands
                .blocking_send(Command::Run(slice.clone(), phase))
                .expect("a thread lives until it is told to close");
        }
        let mut told = |now: u64| progress(now - completed);
        let mut ran = Ran::default();
        let mut remaining = self.workers.len();
        while remaining > 0 {
            match self.report(&mut told)? {
                Report::Ran(thread) => {
                    remaining -= 1;
                    ran.failure = ran.failure.or(thread.failure);
                    ran.events += thread.events;
                    ran.possible_events += thread.possible_events;
                }
                Report::Broken(error) => {
                    slice.stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
                Report::Delivered => {} // of an earlier slice: more came than was waited for
                _ => unreachable!("no thread was told anything else"),
            }
        }
        if let Some(failure) = ran.failure {
            return Err(failure);
        }
        self.await_events(&ran, &mut told)?;

        for worker in &self.workers {
            worker
                .commands
                .blocking_send(Command::Collect)
                .expect("a thread lives until it is told to close");
        }
        let mut tally = Tally::new(self.load.work.kinds().len());
        let mut remaining = self.workers.len();
        while remaining > 0 {
            match self.report(&mut told)? {
                Report::Collected(thread) => {
                    tally.merge(&thread);
                    remaining -= 1;
                }
                Report::Delivered => {}
                Report::Broken(error) => return Err(error),
                _ => unreachable!("no thread was told anything else"),
            }
        }
        let end = tally.last.unwrap_or(start).max(start);
        let used = slice.taken.load(Ordering::Relaxed).min(count);
        // In an open loop a number belongs to a time, taken or not.
        self.numbers += if rate.is_some() { count } else { used };
        Ok(SliceResult {
            tally,
            elapsed: end - start,
            client_cpu: process::own_cpu().saturating_sub(cpu),
        })
    }

    /// Waits until the watchers have got all events of the slice.
    fn await_events(&mut self, ran: &Ran, told: &mut dyn FnMut(u64)) -> Result<(), BenchError> {
        let Work::Watched(_) = self.load.work else { return Ok(()) };
        self.events += ran.events;
        self.possible_events += ran.possible_events;
        let mut there = self.delivery.reached(self.events);
        while !there {
            match self.report(told) {
                Ok(Report::Delivered) => there = self.delivery.received() >= self.events,
                Ok(Report::Broken(error)) => return Err(error),
                Ok(_) => unreachable!("no thread was told anything else"),
                Err(BenchError::Stalled { .. }) => {
                    return Err(BenchError::EventsLost {
                        expected: self.events,
                        received: self.delivery.received(),
                    });
                }
                Err(error) => return Err(error),
            }
        }
        self.delivery.forget();
        let (received, possible) = (self.delivery.received(), self.possible_events);
        if received > self.events + possible {
            return Err(BenchError::EventsExtra { expected: self.events + possible, received });
        }
        Ok(())
    }

    /// The next report; meanwhile tells how far the run is and whether it has stopped.
    fn report(&self, progress: &mut dyn FnMut(u64)) -> Result<Report, BenchError> {
        // In a slow open loop nothing happens between two requests.
        let pause = self.shape.rate.map_or(0.0, |rate| 1.0 / rate);
        let limit = self.shape.stall_timeout + Duration::from_secs_f64(pause);
        let done = || (self.completed.load(Ordering::Relaxed), self.delivery.received());
        let (mut seen, mut since) = (done(), Instant::now());
        loop {
            match self.reports.recv_timeout(LOOK) {
                Ok(report) => return Ok(report),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let now = done();
                    progress(now.0);
                    if now != seen {
                        (seen, since) = (now, Instant::now());
                    } else if since.elapsed() > limit {
                        return Err(BenchError::Stalled { seconds: since.elapsed().as_secs() });
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    unreachable!("a thread lives until it is told to close")
                }
            }
        }
    }

    /// Gives back leases and ends the threads.
    ///
    /// # Errors
    /// If the server does not take a lease back.
    pub fn close(mut self) -> Result<(), BenchError> {
        for worker in &self.workers {
            worker
                .commands
                .blocking_send(Command::Close)
                .expect("a thread lives until it is told to close");
        }
        let mut result = Ok(());
        let mut remaining = self.workers.len();
        while remaining > 0 {
            match self.report(&mut |_| {})? {
                Report::Closed(closed) => {
                    result = result.and(closed);
                    remaining -= 1;
                }
                Report::Delivered => {}
                Report::Broken(error) => result = result.and(Err(error)),
                _ => unreachable!("no thread was told anything else"),
            }
        }
        for worker in self.workers.drain(..) {
            worker.thread.join().expect("a panic has ended the process before");
        }
        result
    }
}

/// What a thread is made of, before it has connected.
struct Context {
    thread: usize,
    threads: usize,
    endpoints: Vec<Endpoint>,
    load: Arc<Load>,
    shape: Shape,
    reports: mpsc::Sender<Report>,
    delivery: Arc<Delivery>,
    completed: Arc<AtomicU64>,
}

/// A thread's clients and what they share.
struct Station {
    clients: Vec<Client>,
    tally: Rc<RefCell<Tally>>,
    /// What goes on beside the clients while a slice runs: compactions, logins.
    beside: Vec<JoinHandle<()>>,
    /// For what a disturbed slice is disturbed by; empty on all threads but the first.
    operators: Vec<Operator>,
    active: Rc<Cell<bool>>,
}

impl Context {
    fn main(self, commands: commands::Receiver<Command>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default());
        match runtime {
            Ok(runtime) => runtime.block_on(self.serve(commands)),
            Err(error) => self.report(Report::Ready(Err(BenchError::Runtime(error)))),
        }
    }

    /// The session may have given up: then nobody wants to know.
    fn report(&self, report: Report) {
        let _nobody_waits = self.reports.send(report);
    }

    async fn serve(self, mut commands: commands::Receiver<Command>) {
        let (mut station, ready) = match self.set_up().await {
            Ok(set_up) => set_up,
            Err(error) => return self.report(Report::Ready(Err(error))),
        };
        self.report(Report::Ready(Ok(ready)));
        while let Some(command) = commands.recv().await {
            match command {
                Command::Run(slice, phase) => {
                    station.active.set(phase != Phase::Populate);
                    let ran = self.run(&mut station, slice, phase).await;
                    station.active.set(false);
                    self.report(Report::Ran(ran));
                }
                Command::Collect => {
                    let empty = Tally::new(self.load.work.kinds().len());
                    self.report(Report::Collected(station.tally.replace(empty)));
                }
                Command::Close => {
                    for task in station.beside.drain(..) {
                        task.abort();
                    }
                    let closed = try_join_all(station.clients.drain(..).map(Client::close)).await;
                    self.report(Report::Closed(match closed {
                        Ok(_) => Ok(()),
                        Err(error) => Err(BenchError::Call { what: "revoke a lease", error }),
                    }));
                    return;
                }
            }
        }
    }

    async fn set_up(&self) -> Result<(Station, Ready), BenchError> {
        let mine = (self.thread..self.shape.conns).step_by(self.threads);
        let connections = try_join_all(mine.map(|conn| {
            let endpoint = self.endpoints[conn % self.endpoints.len()].clone();
            Connection::open(endpoint, self.shape.dial_timeout, self.shape.user.clone())
        }))
        .await?;
        // The round trip also makes sure that the server's settings are known on each connection.
        let limit = self.shape.dial_timeout;
        let statuses = connections.iter().map(|connection| status(connection.channel(), limit));
        let statuses = try_join_all(statuses).await?;
        // Things numbered over all threads, such as clients, go to connection `number % conns`.
        let connection_of = |number: u64| {
            let conn = (number % self.shape.conns as u64) as usize;
            (conn % self.threads == self.thread).then(|| &connections[conn / self.threads])
        };

        let scratch = scratch();
        let mut clients: Vec<Client> = (0..self.shape.clients as u64)
            .filter_map(|number| {
                let channel = connection_of(number)?.channel();
                Some(Client::new(self.load.clone(), number, channel, scratch.clone()))
            })
            .collect();
        try_join_all(clients.iter_mut().map(Client::prepare))
            .await
            .map_err(|error| BenchError::Call { what: "grant a lease", error })?;

        let tally = Rc::new(RefCell::new(Tally::new(self.load.work.kinds().len())));
        let mut created = latencies();
        if let Work::Watched(watching) = self.load.work {
            let streams = (0..watching.streams).filter_map(|stream| {
                let mut channel = connection_of(stream)?.channel();
                Some(async move {
                    let mut created = latencies();
                    let mut opened = WatchStream::open(&mut channel, watching.prev_kv).await?;
                    for watcher in (stream..watching.watchers).step_by(watching.streams as usize) {
                        let key = self.load.keys.key(watcher % watching.keys);
                        opened.watch(key, &mut created).await?;
                    }
                    Ok::<_, CallError>((opened, created))
                })
            });
            let opened = try_join_all(streams)
                .await
                .map_err(|error| BenchError::Call { what: "create a watcher", error })?;
            for (stream, times) in opened {
                created.add(&times).expect("the same bounds");
                let (load, tally) = (self.load.clone(), tally.clone());
                let (delivery, reports) = (self.delivery.clone(), self.reports.clone());
                spawn_local(async move {
                    let reached = || drop(reports.send(Report::Delivered));
                    let error = stream.follow(load, &tally, &delivery, reached).await;
                    let broken = BenchError::Call { what: "follow a watch stream", error };
                    drop(reports.send(Report::Broken(broken)));
                });
            }
        }

        let active = Rc::new(Cell::new(false));
        let mut beside = Vec::new();
        if let Some(compact) = self.shape.compact.filter(|_| self.thread == 0) {
            let channel = connections[0].channel();
            let compacting = keep_compacting(channel, compact, active.clone(), tally.clone());
            beside.push(spawn_local(compacting));
        }
        if let (Some(rate), Some(user), 0) = (self.shape.logins, &self.shape.user, self.thread) {
            // Connections of their own: what the puts wait for is the server, not a shared window.
            let endpoints = self.endpoints.iter().cloned();
            let connections = try_join_all(endpoints.map(|endpoint| {
                Connection::open(endpoint, self.shape.dial_timeout, Some(user.clone()))
            }))
            .await?;
            let frame = user.frame();
            let logging_in =
                keep_logging_in(connections, frame, rate, active.clone(), tally.clone());
            beside.push(spawn_local(logging_in));
        }
        let mut operators = Vec::new();
        if self.thread == 0 {
            let (during, user) = (self.shape.during, &self.shape.user);
            let endpoints = self.endpoints.iter().cloned();
            let connections = endpoints
                .filter(|_| during != During::default())
                .map(|endpoint| Connection::open(endpoint, self.shape.dial_timeout, user.clone()));
            // Connections of their own, so that they wait for no put and no put for them.
            let connections = try_join_all(connections).await?;
            if let (Some(keep), Some(connection)) = (during.compaction, connections.first()) {
                operators.push(Operator::Compacts(connection.clone(), keep));
            }
            let all = connections.iter().filter(|_| during.defragment);
            operators.extend(all.map(|connection| Operator::Defragments(connection.clone())));
        }
        let version = statuses.into_iter().next().filter(|_| self.thread == 0);
        Ok((
            Station { clients, tally, beside, operators, active },
            Ready { version: version.map(|status| status.version), created },
        ))
    }

    async fn run(&self, station: &mut Station, slice: Slice, phase: Phase) -> Ran {
        let stop: Arc<AtomicBool> = slice.stop.clone();
        let supply = Rc::new(Supply::new(slice, self.thread, self.threads));
        let clients: Vec<_> = station
            .clients
            .drain(..)
            .map(|client| {
                let turn = Turn {
                    supply: supply.clone(),
                    tally: station.tally.clone(),
                    completed: self.completed.clone(),
                    stop: stop.clone(),
                    phase,
                };
                spawn_local(turn.run(client))
            })
            .collect();
        let over = Rc::new(Cell::new(false));
        let operators = station.operators.iter().filter(|_| phase == Phase::Disturbed);
        let operating: Vec<_> = operators
            .map(|operator| {
                spawn_local(operator.clone().operate(over.clone(), station.tally.clone()))
            })
            .collect();
        let fed = supply.feed(clients.len()).await;
        let mut ran = Ran { failure: fed.err().map(BenchError::Runtime), ..Ran::default() };
        for client in clients {
            let (client, part) =
                client.await.expect("a client's task is neither aborted nor panics");
            station.clients.push(client);
            ran.failure = ran.failure.or(part.failure);
            ran.events += part.events;
            ran.possible_events += part.possible_events;
        }
        // Nothing of it may reach into a slice that is to be quiet.
        over.set(true);
        for operator in operating {
            operator.await.expect("an operator's task is neither aborted nor panics");
        }
        station.tally.borrow_mut().unsent += supply.unsent();
        ran
    }
}

/// A client's turn at a slice.
struct Turn {
    supply: Rc<Supply>,
    tally: Rc<RefCell<Tally>>,
    completed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    phase: Phase,
}

impl Turn {
    async fn run(self, mut client: Client) -> (Client, Ran) {
        let mut ran = Ran::default();
        while let Some(ticket) = self.supply.take().await {
            let result = match self.phase {
                Phase::Measure => client.step(&ticket).await.map(Some),
                // The kind after that of a quiet slice.
                Phase::Disturbed => client
                    .step(&ticket)
                    .await
                    .map(|done| Some(Done { kind: done.kind + 1, ..done })),
                Phase::Populate => client.populate(ticket.number).await.map(|()| None),
            };
            let now = Instant::now();
            self.completed.fetch_add(1, Ordering::Relaxed);
            match result {
                Ok(Some(done)) => {
                    ran.events += done.events;
                    self.tally.borrow_mut().record(done.kind, ticket.start, now);
                }
                Ok(None) => {}
                Err(error) => {
                    ran.possible_events += client.possible_events();
                    self.tally.borrow_mut().error(error.to_string(), now);
                    if let WorkError::Call(error) = error
                        && error.connection_lost()
                        && let Err(error) = client.recover().await
                    {
                        self.stop.store(true, Ordering::Relaxed);
                        ran.failure = Some(BenchError::Call { what: "go on", error });
                        break;
                    }
                }
            }
        }
        (client, ran)
    }
}

async fn status(mut channel: Channel, limit: Duration) -> Result<pb::StatusResponse, BenchError> {
    let endpoint = channel.endpoint().to_string();
    match tokio::time::timeout(limit, channel.call(Method::Status, &pb::StatusRequest {})).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(error)) => Err(BenchError::NotEtcd { endpoint, error }),
        Err(_) => {
            let reason = format!("no answer within {} ms", limit.as_millis());
            Err(ConnectError { endpoint, reason }.into())
        }
    }
}

/// Compacts every interval of a running slice, all but the newest revisions; a failure is counted.
async fn keep_compacting(
    mut channel: Channel,
    compact: Compact,
    active: Rc<Cell<bool>>,
    tally: Rc<RefCell<Tally>>,
) {
    let mut compacted = 0;
    let mut ticks = tokio::time::interval(compact.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks.tick().await; // the first comes at once
    loop {
        ticks.tick().await;
        if !active.get() {
            continue;
        }
        if let Err(error) = compact_once(&mut channel, compact.keep, false, &mut compacted).await {
            tally.borrow_mut().error(format!("compaction: {error}"), Instant::now());
            if error.connection_lost() && channel.reconnect().await.is_err() {
                return; // the clients notice it too, and end the run
            }
        }
    }
}

async fn compact_once(
    channel: &mut Channel,
    keep: i64,
    physical: bool,
    compacted: &mut i64,
) -> Result<(), CallError> {
    let status: pb::StatusResponse = channel.call(Method::Status, &pb::StatusRequest {}).await?;
    let revision = status.header.map_or(0, |header| header.revision) - keep;
    if revision > *compacted {
        let request = pb::CompactionRequest { revision, physical };
        let _: pb::CompactionResponse = channel.call(Method::Compact, &request).await?;
        *compacted = revision;
    }
    Ok(())
}

/// The kinds of an operator's calls in [`Work::PutDuring`].
const COMPACTION: usize = 2;
const DEFRAGMENTATION: usize = 3;

/// Between the end of one of an operator's calls and the next.
const OPERATOR_PAUSE: Duration = Duration::from_secs(1);

/// Somebody who looks after a server, over and over.
#[derive(Clone)]
enum Operator {
    /// All but so many revisions; waits until what is superseded is gone.
    Compacts(Rc<Connection>, i64),
    Defragments(Rc<Connection>),
}

impl Operator {
    /// Until `over` is set, and what has begun by then has ended.
    async fn operate(self, over: Rc<Cell<bool>>, tally: Rc<RefCell<Tally>>) {
        let (Operator::Compacts(connection, _) | Operator::Defragments(connection)) = &self;
        let mut channel = connection.channel();
        let mut compacted = 0;
        while !over.get() {
            let start = Instant::now();
            let (kind, name, result) = match &self {
                Operator::Compacts(_, keep) => {
                    let result = compact_once(&mut channel, *keep, true, &mut compacted).await;
                    (COMPACTION, "compaction", result)
                }
                Operator::Defragments(_) => {
                    let request = pb::DefragmentRequest {};
                    let result = channel.call(Method::Defragment, &request).await;
                    let result = result.map(|_: pb::DefragmentResponse| ());
                    (DEFRAGMENTATION, "defragmentation", result)
                }
            };
            let now = Instant::now();
            match result {
                Ok(()) => tally.borrow_mut().record_beside(kind, start, now),
                Err(error) => {
                    tally.borrow_mut().error(format!("{name}: {error}"), now);
                    if error.connection_lost() && channel.reconnect().await.is_err() {
                        return; // the clients notice it too, and end the run
                    }
                }
            }
            let resume = now + OPERATOR_PAUSE;
            while !over.get() && Instant::now() < resume {
                tokio::time::sleep(OPERATOR_PAUSE / 50).await;
            }
        }
    }
}

/// Logins that may wait for an answer at one time; more than that are not sent, and counted as errors.
const LOGINS_MAX: usize = 4096;

/// The kind of a login in [`Work::Put`].
const LOGIN: usize = 1;

/// Logs in `rate` times per second of a running slice, whether earlier logins are answered or not; the
/// latency of each counts from when it was due.
async fn keep_logging_in(
    connections: Vec<Rc<Connection>>,
    frame: Bytes,
    rate: f64,
    active: Rc<Cell<bool>>,
    tally: Rc<RefCell<Tally>>,
) {
    let waiting = Rc::new(Cell::new(0));
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut connections = connections.iter().cycle();
    loop {
        let due = ticks.tick().await.into_std();
        if !active.get() {
            // What falls due between slices is not made up for.
            ticks.reset();
            continue;
        }
        if waiting.get() == LOGINS_MAX {
            let text = format!("login: {LOGINS_MAX} wait already");
            tally.borrow_mut().error(text, Instant::now());
            continue;
        }
        waiting.set(waiting.get() + 1);
        let mut channel = connections.next().expect("there is an endpoint").channel();
        let (frame, waiting) = (frame.clone(), waiting.clone());
        let (active, tally) = (active.clone(), tally.clone());
        spawn_local(async move {
            let answered = channel.unary(Method::Authenticate, frame).await;
            let now = Instant::now();
            waiting.set(waiting.get() - 1);
            // One that outlives its slice must not be counted in another.
            if active.get() {
                match &answered {
                    Ok(_) => tally.borrow_mut().record(LOGIN, due, now),
                    Err(error) => tally.borrow_mut().error(format!("login: {error}"), now),
                }
            }
            if let Err(error) = answered
                && error.connection_lost()
            {
                // If nobody is there, the clients notice it too, and end the run.
                let _noticed_by_clients = channel.reconnect().await;
            }
        });
    }
}
