//! The workloads, in the order in which they run on one database; each finds what the ones before it left.
//!
//! A figure counts the time inside the engine alone: rows are made between the calls. What is bounded by
//! time is also bounded in rows, so that the space that a run needs is known before.

use std::io::Write;
use std::ops::{Bound, ControlFlow};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use engine_api::{
    Batch, Durability, Engine, EngineError, OptionError, Options, Reclaim, Survives, Table,
};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::files;
use super::rows::{ROW_OVERHEAD, Rows, State};
use super::verify::{Verified, VerifyError, verify};
use crate::actors::export::{For, write_bbolt};
use crate::bench::process;
use crate::bench::report::model::{Cache, Figure, Group, Latency, Measure};
use crate::bench::tally::latencies;
use crate::bench::work::Random;
use crate::core::bbolt::WriteError;
use crate::engines::BuiltIn;

/// Writes in a batch, at most: the server cuts one then, or after 100 ms.
const BATCH_MAX: u64 = 10_000;

/// After this time the server makes a batch durable.
const DURABLE_AFTER: Duration = Duration::from_secs(10);

/// Bytes in a batch, at most: larger ones are left out of the workloads.
const BATCH_BYTES_MAX: u64 = 256 << 20;

/// Rows of a short scan.
const SCAN_ROWS: usize = 100;

/// Reads of a workload, at most.
const READS_MAX: u64 = 500_000;

/// What a worker is told to do.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Job {
    pub engine: String,
    /// Of the engine, where they differ from the defaults.
    pub options: std::collections::BTreeMap<String, String>,
    /// The engine's directory, empty or absent.
    pub dir: PathBuf,
    pub keys: u64,
    pub value_bytes: u64,
    pub seed: u64,
    /// Longest time of a workload that is bounded by time.
    pub duration: Duration,
}

impl Job {
    /// Rows that the workloads write at most.
    pub fn rows_max(&self) -> u64 {
        let commits = [1, 100, BATCH_MAX].map(|batch| 2 * self.commit_rows(batch));
        self.keys + commits.iter().sum::<u64>() + self.churn_rows() + self.mixed_rows() * 2
    }

    /// Bytes on disk that a run may take: with pages half full, and a second copy while space is given
    /// back.
    pub fn disk_bytes_max(&self) -> u64 {
        (64 << 20) + 4 * self.rows_max() * self.row_bytes()
    }

    /// Bytes of a row with its keys.
    pub fn row_bytes(&self) -> u64 {
        self.value_bytes + ROW_OVERHEAD
    }

    fn commit_rows(&self, batch: u64) -> u64 {
        // A fifth of the database, at least two batches and at most what takes a second or two.
        let rows = (self.keys / 5).min(batch * 10_000).min(2_000_000);
        if batch * self.row_bytes() > BATCH_BYTES_MAX { 0 } else { rows.max(2 * batch) }
    }

    fn churn_rows(&self) -> u64 {
        (self.keys / 2).clamp(1_000, 2_000_000)
    }

    fn mixed_rows(&self) -> u64 {
        (self.keys / 5).clamp(1_000, 1_000_000)
    }
}

/// What a worker tells.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub enum Event {
    /// A workload begins.
    Phase {
        name: String,
    },
    /// How far it is; of how much, if that is known.
    Progress {
        done: u64,
        total: u64,
    },
    Measured(Measure),
    /// Something that a reader of the figures must know.
    Note {
        text: String,
    },
    /// The end.
    Verified {
        rows: u64,
        bytes: u64,
        digest: u32,
    },
    /// The end, too early.
    Failed {
        error: String,
    },
}

/// Why a run has no result.
#[derive(thiserror::Error, Debug)]
pub enum WorkloadError {
    #[error("unknown engine {0:?}")]
    NoEngine(String),
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error("{doing}: {source}")]
    Engine { doing: &'static str, source: EngineError },
    #[error("revision {0} was committed and cannot be read")]
    NotFound(u64),
    #[error("cannot export: {0}")]
    Export(#[from] WriteError),
    #[error("cannot examine the files: {0}")]
    Files(#[from] std::io::Error),
    #[error("verification: {0}")]
    Verify(#[from] VerifyError),
}

fn doing(doing: &'static str) -> impl Fn(EngineError) -> WorkloadError {
    move |source| WorkloadError::Engine { doing, source }
}

/// Times of the calls of one workload, and what they cost.
struct Meter {
    calls: Histogram<u64>,
    inside: Duration,
    count: u64,
    /// Bytes of keys and values that were written.
    bytes: u64,
    cpu_before: Duration,
    /// Processor time of the benchmark's own work between the calls.
    cpu_own: Duration,
    disk_before: Option<u64>,
}

impl Meter {
    fn start() -> Self {
        Meter {
            calls: latencies(),
            inside: Duration::ZERO,
            count: 0,
            bytes: 0,
            cpu_own: Duration::ZERO,
            cpu_before: process::own_cpu(),
            disk_before: process::own_disk_writes(),
        }
    }

    /// Work that is not the engine's.
    fn aside<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let before = process::thread_cpu();
        let result = work();
        self.cpu_own += process::thread_cpu().saturating_sub(before);
        result
    }

    fn call<T>(&mut self, count: u64, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = call();
        self.add(count, start.elapsed());
        result
    }

    fn add(&mut self, count: u64, took: Duration) {
        self.calls.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1));
        self.inside += took;
        self.count += count;
    }

    fn rate(&self, unit: &str) -> Figure {
        let elapsed_s = self.inside.as_secs_f64();
        let cpu = process::own_cpu().saturating_sub(self.cpu_before + self.cpu_own);
        let written = match (self.disk_before, process::own_disk_writes()) {
            (Some(before), Some(now)) if self.bytes > 0 => Some(now.saturating_sub(before)),
            _ => None,
        };
        Figure::Rate {
            unit: unit.to_owned(),
            // A clock may stand still during a single call.
            per_second: if elapsed_s > 0.0 { self.count as f64 / elapsed_s } else { 0.0 },
            count: self.count,
            elapsed_s,
            latency_us: Latency::of(&self.calls),
            cpu_us: (self.count > 0).then(|| cpu.as_secs_f64() * 1e6 / self.count as f64),
            write_amplification: written.map(|written| written as f64 / self.bytes as f64),
            errors: 0,
        }
    }
}

/// One engine, its database, and where the figures go.
struct Bench<'a> {
    job: &'a Job,
    built_in: &'static BuiltIn,
    options: Options,
    engine: Option<Arc<dyn Engine>>,
    rows: Rows,
    state: State,
    buffer: BytesMut,
    random: Random,
    last_durable: Instant,
    told: Instant,
    tell: &'a mut dyn FnMut(Event),
}

/// A workload of commits.
struct Commits {
    name: &'static str,
    title: &'static str,
    group: Group,
    /// Rows in a batch.
    puts: u64,
    /// Superseded rows that a batch drops.
    drops: u64,
    /// Rows in all, put or dropped.
    rows: u64,
    durability: Durability,
    /// Longest time; `None` if all rows must be done.
    limit: Option<Duration>,
}

/// What a reader is told of the durability of buffered batches: the server's own way.
const BUFFERED: &str = "buffered, durable every 10 s and at the end";
const DURABLE: &str = "each batch durable";

/// Runs all workloads and verifies; `tell` is given all events but the last.
///
/// # Errors
/// The first thing that went wrong.
pub fn run(job: &Job, tell: &mut dyn FnMut(Event)) -> Result<Verified, WorkloadError> {
    let built_in = crate::engines::find(&job.engine)
        .ok_or_else(|| WorkloadError::NoEngine(job.engine.clone()))?;
    let options = Options::new(built_in.about, &job.options)?;
    tell(Event::Phase { name: "start".to_owned() });
    let mut bench = Bench {
        job,
        built_in,
        options,
        engine: None,
        rows: Rows::new(job.seed, job.keys, job.value_bytes as usize),
        state: State::default(),
        buffer: BytesMut::with_capacity(1 << 20),
        random: Random::new(job.seed, 1),
        last_durable: Instant::now(),
        told: Instant::now(),
        tell,
    };
    bench.open()?;
    bench.load()?;
    bench.space("space-loaded", "After the bulk load")?;
    bench.all_commits()?;
    bench.reads(Cache::Warm)?;
    bench.mixed()?;
    bench.churn()?;
    bench.space("space-churned", "After overwriting and compaction")?;
    bench.export()?;
    if bench.persistent() {
        bench.reopen(Cache::Warm)?;
        bench.reopen(Cache::Cold)?;
    }
    bench.halve()?;
    if bench.persistent() {
        // What is verified is what the files hold.
        bench.close();
        bench.open()?;
    }
    bench.verify()
}

impl Bench<'_> {
    fn persistent(&self) -> bool {
        self.built_in.about.durable_survives >= Survives::OrderlyEnd
    }

    fn engine(&self) -> &Arc<dyn Engine> {
        self.engine.as_ref().expect("the engine is open between two workloads")
    }

    fn open(&mut self) -> Result<(), WorkloadError> {
        let opened = self.built_in.open(&self.job.dir, &self.options).map_err(doing("open"))?;
        self.engine = Some(opened);
        self.last_durable = Instant::now();
        Ok(())
    }

    fn close(&mut self) {
        self.engine = None;
    }

    fn phase(&mut self, name: &str) {
        (self.tell)(Event::Phase { name: name.to_owned() });
        self.told = Instant::now();
    }

    /// Tells how far a workload is, if that was not told just now.
    fn progress(&mut self, done: u64, total: u64) {
        if self.told.elapsed() >= Duration::from_millis(100) {
            self.told = Instant::now();
            (self.tell)(Event::Progress { done, total });
        }
    }

    fn measured(
        &mut self,
        name: &str,
        title: &str,
        group: Group,
        durability: Option<&str>,
        cache: Option<Cache>,
        figure: Figure,
    ) {
        (self.tell)(Event::Measured(Measure {
            workload: name.to_owned(),
            group,
            title: title.to_owned(),
            durability: durability.map(str::to_owned),
            cache,
            figure,
        }));
    }

    /// Buffered, or durable if that is due.
    fn due(&mut self, durability: Durability) -> Durability {
        if durability == Durability::Buffered && self.last_durable.elapsed() < DURABLE_AFTER {
            return Durability::Buffered;
        }
        self.last_durable = Instant::now();
        Durability::Durable
    }

    fn commits(&mut self, commits: &Commits) -> Result<(), WorkloadError> {
        let Commits { name, title, group, puts, drops, rows, durability, limit } = *commits;
        if rows == 0 {
            let text = format!("{title}: left out, a batch would be too large.");
            (self.tell)(Event::Note { text });
            return Ok(());
        }
        self.phase(name);
        let engine = Arc::clone(self.engine());
        let mut meter = Meter::start();
        while meter.count < rows && limit.is_none_or(|limit| meter.inside < limit) {
            let left = rows - meter.count;
            let (mut batch, mut count) = (Batch::default(), 0);
            meter.aside(|| {
                if puts > 0 {
                    count = puts.min(left);
                    self.state.put(&self.rows, count, &mut batch, &mut self.buffer);
                }
                if drops > 0 {
                    let dropped = self.state.compact(&self.rows, drops, &mut batch);
                    if puts == 0 {
                        count = dropped;
                    }
                }
                self.state.meta(&mut batch);
            });
            meter.bytes += batch.ops.iter().map(|op| op.len() as u64).sum::<u64>();
            let durability = self.due(durability);
            meter.call(count, || engine.commit(&batch, durability)).map_err(doing("commit"))?;
            meter.aside(|| drop(batch));
            if count == 0 {
                break;
            }
            self.progress(meter.count, rows);
        }
        if durability == Durability::Buffered {
            let call = || engine.commit(&Batch::default(), Durability::Durable);
            meter.call(0, call).map_err(doing("commit"))?;
            self.last_durable = Instant::now();
        }
        let told = if durability == Durability::Buffered { BUFFERED } else { DURABLE };
        self.measured(name, title, group, Some(told), None, meter.rate("rows"));
        Ok(())
    }

    fn load(&mut self) -> Result<(), WorkloadError> {
        let fitting = (BATCH_BYTES_MAX / 4 / self.job.row_bytes()).max(1);
        self.commits(&Commits {
            name: "load",
            title: "Bulk load, up to 10 000 rows a batch",
            group: Group::Writes,
            puts: BATCH_MAX.min(fitting),
            drops: 0,
            rows: self.job.keys,
            durability: Durability::Buffered,
            limit: None,
        })
    }

    fn all_commits(&mut self) -> Result<(), WorkloadError> {
        let all = [
            ("commit-1-durable", "Commits of 1 row", 1, Durability::Durable),
            ("commit-100-durable", "Commits of 100 rows", 100, Durability::Durable),
            ("commit-10000-durable", "Commits of 10 000 rows", BATCH_MAX, Durability::Durable),
            ("commit-1-buffered", "Commits of 1 row", 1, Durability::Buffered),
            ("commit-100-buffered", "Commits of 100 rows", 100, Durability::Buffered),
            ("commit-10000-buffered", "Commits of 10 000 rows", BATCH_MAX, Durability::Buffered),
        ];
        for (name, title, puts, durability) in all {
            self.commits(&Commits {
                name,
                title,
                group: Group::Writes,
                puts,
                drops: 0,
                rows: self.job.commit_rows(puts),
                durability,
                limit: Some(self.job.duration),
            })?;
        }
        Ok(())
    }

    /// Overwriting while a compaction drops what is superseded, with the batches, as the server does it; then
    /// the rest of the compaction alone.
    fn churn(&mut self) -> Result<(), WorkloadError> {
        self.commits(&Commits {
            name: "churn",
            title: "Overwriting with compaction, 1 000 rows put and 1 000 dropped a batch",
            group: Group::Writes,
            puts: 1_000,
            drops: 1_000,
            rows: self.job.churn_rows(),
            durability: Durability::Buffered,
            limit: Some(self.job.duration),
        })?;
        self.commits(&Commits {
            name: "compaction",
            title: "Compaction, 1 000 superseded rows a batch",
            group: Group::Upkeep,
            puts: 0,
            drops: 1_000,
            rows: self.state.superseded(&self.rows),
            durability: Durability::Buffered,
            limit: None,
        })
    }

    /// A row that is there.
    fn some_row(random: &mut Random, rows: &Rows, state: &State) -> u64 {
        loop {
            let n = random.below(state.written);
            if state.holds(rows, n) {
                return n;
            }
        }
    }

    fn reads(&mut self, cache: Cache) -> Result<(), WorkloadError> {
        let name = |what: &str| format!("{what}-{}", cache.name());
        let engine = Arc::clone(self.engine());

        self.phase(&name("get"));
        let mut meter = Meter::start();
        while meter.count < READS_MAX && meter.inside < self.job.duration {
            let n = Self::some_row(&mut self.random, &self.rows, &self.state);
            get(&*engine, &self.rows, n, &mut meter)?;
            self.progress(meter.count, READS_MAX);
        }
        let figure = without_cpu(meter.rate("reads"));
        self.measured(&name("get"), "Point reads", Group::Reads, None, Some(cache), figure);

        self.phase(&name("scan-100"));
        let mut meter = Meter::start();
        while meter.count < READS_MAX * 10 && meter.inside < self.job.duration {
            let n = Self::some_row(&mut self.random, &self.rows, &self.state);
            scan(&*engine, &self.rows, n, &mut meter)?;
            self.progress(meter.count, READS_MAX * 10);
        }
        let (figure, title) = (without_cpu(meter.rate("rows")), "Range scans of 100 rows");
        self.measured(&name("scan-100"), title, Group::Reads, None, Some(cache), figure);
        if cache == Cache::Warm {
            self.full_scan(cache)?;
        }
        Ok(())
    }

    fn full_scan(&mut self, cache: Cache) -> Result<(), WorkloadError> {
        let name = format!("scan-all-{}", cache.name());
        self.phase(&name);
        let engine = Arc::clone(self.engine());
        let mut meter = Meter::start();
        let (start, mut rows) = (Instant::now(), 0);
        let view = engine.view().map_err(doing("view"))?;
        view.scan(Table::Key, Bound::Unbounded, Bound::Unbounded, &mut |_, value| {
            rows += 1;
            std::hint::black_box(value);
            ControlFlow::Continue(())
        })
        .map_err(doing("scan"))?;
        meter.add(rows, start.elapsed());
        let figure = without_latency(meter.rate("rows"));
        self.measured(&name, "Scan of all rows", Group::Reads, None, Some(cache), figure);
        Ok(())
    }

    /// Point reads, then scans, while another thread commits as fast as it can.
    fn mixed(&mut self) -> Result<(), WorkloadError> {
        for (reads, read_name, read_title, write_name, unit) in [
            (get as Read, "mixed-get", "Point reads during writes", "mixed-get-writes", "reads"),
            (
                scan as Read,
                "mixed-scan",
                "Range scans of 100 rows during writes",
                "mixed-scan-writes",
                "rows",
            ),
        ] {
            self.phase(read_name);
            let engine = Arc::clone(self.engine());
            // The reader asks for what was there before.
            let (rows, before) = (self.rows.clone(), self.state);
            let mut random = self.random.clone();
            let stop = AtomicBool::new(false);
            let (limit, rows_max) = (self.job.duration, self.job.mixed_rows());
            let mut writer = Meter::start();
            let mut reader = Meter::start();
            std::thread::scope(|scope| {
                let reading = scope.spawn(|| {
                    let result = loop {
                        let n = Self::some_row(&mut random, &rows, &before);
                        if let Err(error) = reads(&*engine, &rows, n, &mut reader) {
                            break Err(error);
                        }
                        if stop.load(Ordering::Relaxed) {
                            break Ok(());
                        }
                    };
                    stop.store(true, Ordering::Relaxed);
                    result
                });
                let start = Instant::now();
                let mut result = Ok(());
                while !stop.load(Ordering::Relaxed)
                    && writer.count < rows_max
                    && start.elapsed() < limit
                {
                    let mut batch = Batch::default();
                    self.state.put(&self.rows, 100, &mut batch, &mut self.buffer);
                    self.state.meta(&mut batch);
                    let durability = self.due(Durability::Buffered);
                    let call = || engine.commit(&batch, durability);
                    if let Err(error) = writer.call(100, call) {
                        result = Err(doing("commit")(error));
                        break;
                    }
                    self.progress(writer.count, rows_max);
                }
                stop.store(true, Ordering::Relaxed);
                let read = reading.join().expect("a panic has ended the process before");
                result.and(read)
            })?;
            self.random = random;
            // Both threads' processor time is one sum, which belongs to neither.
            let (reader, writer) =
                (without_cpu(reader.rate(unit)), without_cpu(writer.rate("rows")));
            self.measured(read_name, read_title, Group::Mixed, None, Some(Cache::Warm), reader);
            let title = format!("Commits of 100 rows beside: {}", read_title.to_lowercase());
            self.measured(write_name, &title, Group::Mixed, Some(BUFFERED), None, writer);
        }
        let commit = self.engine().commit(&Batch::default(), Durability::Durable);
        commit.map_err(doing("commit"))?;
        self.last_durable = Instant::now();
        Ok(())
    }

    /// A snapshot as a client gets it, written to nowhere.
    fn export(&mut self) -> Result<(), WorkloadError> {
        self.phase("export");
        let engine = Arc::clone(self.engine());
        let mut meter = Meter::start();
        let start = Instant::now();
        let view = engine.view().map_err(doing("view"))?;
        let size = write_bbolt(&*view, For::Client, &mut Nowhere)?;
        meter.add(size, start.elapsed());
        let figure = without_latency(meter.rate("bytes"));
        self.measured("export", "Snapshot export", Group::Upkeep, None, Some(Cache::Warm), figure);
        self.measured(
            "export-time",
            "Snapshot export, in all",
            Group::Upkeep,
            None,
            Some(Cache::Warm),
            Figure::Seconds { seconds: start.elapsed().as_secs_f64() },
        );
        Ok(())
    }

    /// Closing and opening, up to the first answer; after a cold start also reads.
    fn reopen(&mut self, cache: Cache) -> Result<(), WorkloadError> {
        let name = format!("open-{}", cache.name());
        self.phase(&name);
        self.close();
        if cache == Cache::Cold {
            let left = files::drop_cache(&self.job.dir)?;
            if left.cached > left.total / 20 {
                let percent = left.cached * 100 / left.total;
                let text = format!(
                    "{}: {percent} % of the files stayed in the page cache before the cold workloads.",
                    self.built_in.name()
                );
                (self.tell)(Event::Note { text });
            }
        }
        let start = Instant::now();
        self.open()?;
        {
            let view = self.engine().view().map_err(doing("view"))?;
            let last = view.last(Table::Key).map_err(doing("read"))?;
            let n = self.state.written - 1;
            if last.is_none_or(|(key, _)| key != self.rows.key(n)) {
                return Err(WorkloadError::NotFound(Rows::revision(n)));
            }
        }
        let figure = Figure::Seconds { seconds: start.elapsed().as_secs_f64() };
        let title = "Opening, up to the first answer";
        self.measured(&name, title, Group::Upkeep, None, Some(cache), figure);
        if cache == Cache::Cold {
            self.reads(cache)?;
            self.close();
            files::drop_cache(&self.job.dir)?;
            self.open()?;
            self.full_scan(cache)?;
        }
        Ok(())
    }

    /// The older half goes; then space is given back.
    fn halve(&mut self) -> Result<(), WorkloadError> {
        self.phase("delete-half");
        let engine = Arc::clone(self.engine());
        let half = self.state.count(&self.rows) / 2;
        let mut meter = Meter::start();
        while meter.count < half {
            let (mut batch, mut removed) = (Batch::default(), 0);
            let wanted = (half - meter.count).min(1_000);
            meter.aside(|| {
                removed = self.state.cut(&self.rows, wanted, &mut batch);
                self.state.meta(&mut batch);
            });
            let durability = self.due(Durability::Buffered);
            meter.call(removed, || engine.commit(&batch, durability)).map_err(doing("commit"))?;
            self.progress(meter.count, half);
        }
        let call = || engine.commit(&Batch::default(), Durability::Durable);
        meter.call(0, call).map_err(doing("commit"))?;
        self.last_durable = Instant::now();
        let (figure, title) = (meter.rate("rows"), "Deleting the older half, 1 000 rows a batch");
        self.measured("delete-half", title, Group::Writes, Some(BUFFERED), None, figure);
        self.space("space-halved", "After deleting half")?;
        if self.built_in.about.reclaim == Reclaim::Online {
            self.phase("reclaim");
            let start = Instant::now();
            engine.reclaim().map_err(doing("reclaim"))?;
            let figure = Figure::Seconds { seconds: start.elapsed().as_secs_f64() };
            let title = "Giving space back after deleting half";
            self.measured("reclaim", title, Group::Upkeep, Some("durable"), None, figure);
            self.space("space-reclaimed", "After giving space back")?;
        }
        Ok(())
    }

    /// What the files occupy; for an engine without files what it says itself.
    fn space(&mut self, name: &str, title: &str) -> Result<(), WorkloadError> {
        let bytes = if self.persistent() {
            files::survey(&self.job.dir)?.occupied
        } else {
            self.engine().size().map_err(doing("size"))?
        };
        self.measured(name, title, Group::Space, None, None, Figure::Bytes { bytes });
        Ok(())
    }

    fn verify(&mut self) -> Result<Verified, WorkloadError> {
        self.phase("verify");
        let engine = Arc::clone(self.engine());
        let Bench { rows, state, tell, .. } = self;
        let total = state.written - state.cut;
        let mut progress = |done| tell(Event::Progress { done, total });
        Ok(verify(&*engine, rows, state, &mut progress)?)
    }
}

type Read = fn(&dyn Engine, &Rows, u64, &mut Meter) -> Result<(), WorkloadError>;

/// One point read, in a view of its own as the server opens one for a request.
fn get(engine: &dyn Engine, rows: &Rows, n: u64, meter: &mut Meter) -> Result<(), WorkloadError> {
    let key = rows.key(n);
    let call = || engine.view()?.get(Table::Key, &key);
    match meter.call(1, call).map_err(doing("read"))? {
        Some(_) => Ok(()),
        None => Err(WorkloadError::NotFound(Rows::revision(n))),
    }
}

/// One scan from row `n`.
fn scan(engine: &dyn Engine, rows: &Rows, n: u64, meter: &mut Meter) -> Result<(), WorkloadError> {
    let key = rows.key(n);
    let start = Instant::now();
    let (mut found, mut first) = (0, false);
    engine
        .view()
        .and_then(|view| {
            view.scan(Table::Key, Bound::Included(&key), Bound::Unbounded, &mut |at, value| {
                first |= at == key;
                found += 1;
                std::hint::black_box(value);
                if found < SCAN_ROWS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
        })
        .map_err(doing("scan"))?;
    meter.add(found as u64, start.elapsed());
    if first { Ok(()) } else { Err(WorkloadError::NotFound(Rows::revision(n))) }
}

/// A single call has no percentiles.
fn without_latency(mut figure: Figure) -> Figure {
    if let Figure::Rate { latency_us, .. } = &mut figure {
        *latency_us = None;
    }
    figure
}

fn without_cpu(mut figure: Figure) -> Figure {
    if let Figure::Rate { cpu_us, .. } = &mut figure {
        *cpu_us = None;
    }
    figure
}

/// Takes everything and keeps nothing.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::hint::black_box(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
