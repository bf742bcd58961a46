//! `quorate bench engines`: the same work for every storage engine, through the interface that the server
//! uses.
//!
//! One engine runs at a time, in a process of its own (`worker`), so that memory and crashes are its own.
//! This process tells each what to do, samples its memory and space from outside, and reports.

pub mod files;
mod rows;
mod verify;
pub mod worker;
mod workload;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, value_parser};
use engine_api::{About, Options, Survives};
use indicatif::{ProgressBar, ProgressStyle};

use super::interrupt::Interrupt;
use super::machine;
use super::memory::Sampler;
use super::options::duration;
use super::report::model::{Command, Outcome, Report, Run, SCHEMA, Set, Subject};
use super::report::table;
use crate::engines::{self, BuiltIn};
use worker::{Told, Worker};
use workload::{Event, Job};

/// How often a running worker is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// A worker that tells nothing for this long is taken for hung: a single call, such as giving the space of
/// a large database back, may take minutes.
const SILENCE: Duration = Duration::from_secs(900);

/// Measures storage engines on this machine.
///
/// Each engine gets the same rows through the interface that the server uses, in a process of its own. All rows
/// are checked at the end. Files are in a new directory below --dir, which is removed.
#[derive(Args, Debug, Clone)]
pub struct EnginesArgs {
    /// Engines by name, or all that are built in
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "all")]
    pub engine: Vec<String>,
    /// Sizes of the database [default: 100000,1000000; 2000 with --quick]
    #[arg(long, value_delimiter = ',', value_parser = value_parser!(u64).range(100..=1_000_000_000))]
    pub keys: Vec<u64>,
    /// Bytes of a value
    #[arg(
        long,
        value_name = "BYTES",
        value_delimiter = ',',
        default_value = "256",
        value_parser = value_parser!(u64).range(1..=1 << 20)
    )]
    pub value_size: Vec<u64>,
    /// Longest time of one workload; loading, compacting and deleting take what they need [default: 3s; 200ms with --quick]
    #[arg(long, value_parser = duration)]
    pub duration: Option<Duration>,
    /// An option of an engine; may be given again
    #[arg(long, value_name = "ENGINE.OPTION=VALUE")]
    pub option: Vec<String>,
    /// Where the rows begin; the same seed makes the same rows
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// A small run that shows whether all works; its figures say little
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    pub output: Output,
}

/// Where files and results go.
#[derive(Args, Debug, Clone)]
pub struct Output {
    /// Directory on the disk to be measured
    #[arg(long, default_value = ".")]
    pub dir: PathBuf,
    /// Write the report as JSON; - for standard output, instead of the table
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the report as one HTML page
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Why there is no report.
#[derive(thiserror::Error, Debug)]
pub enum EnginesError {
    #[error("--engine {name}: unknown engine; built in are {}", engines::names())]
    Unknown { name: String },
    #[error("--{option}: {value} is given twice")]
    Twice { option: &'static str, value: String },
    #[error("--option {0:?}: want ENGINE.OPTION=VALUE with an engine that is measured")]
    OptionForm(String),
    #[error("--option: {0}")]
    Option(#[from] engine_api::OptionError),
    #[error("--duration: must not be zero")]
    NoTime,
    #[error(
        "the run may need {} on the disk of --dir, which has {} free: give another --dir, or fewer --keys",
        table::bytes(*.needed as f64), table::bytes(*.free as f64)
    )]
    Disk { needed: u64, free: u64 },
    #[error(
        "engine {engine} keeps all in memory and may need {}; {} are available: give fewer --keys, \
         or other engines",
        table::bytes(*.needed as f64), table::bytes(*.free as f64)
    )]
    Memory { engine: &'static str, needed: u64, free: u64 },
    #[error("cannot use --dir {}: {source}", dir.display())]
    Dir { dir: PathBuf, source: io::Error },
    #[error("cannot {what}: {source}")]
    System { what: &'static str, source: io::Error },
    #[error("interrupted")]
    Interrupted,
}

impl EnginesError {
    /// Whether the command line is to blame.
    pub fn is_usage(&self) -> bool {
        use EnginesError::{NoTime, Option, OptionForm, Twice, Unknown};
        matches!(self, Unknown { .. } | Twice { .. } | OptionForm(_) | Option(_) | NoTime)
    }
}

/// Whether an engine loses everything at its end, so that the others are not compared with it.
pub fn keeps_nothing(engine: &BuiltIn) -> bool {
    engine.about.durable_survives < Survives::OrderlyEnd
}

/// The engines that `names` ask for.
///
/// # Errors
/// If one is not built in, or asked for twice.
pub fn chosen(names: &[String]) -> Result<Vec<&'static BuiltIn>, EnginesError> {
    if names == ["all"] {
        return Ok(engines::ALL.to_vec());
    }
    let mut chosen: Vec<&BuiltIn> = Vec::new();
    for name in names {
        let engine =
            engines::find(name).ok_or_else(|| EnginesError::Unknown { name: name.clone() })?;
        if chosen.contains(&engine) {
            return Err(EnginesError::Twice { option: "engine", value: name.clone() });
        }
        chosen.push(engine);
    }
    Ok(chosen)
}

fn once(option: &'static str, values: &[u64]) -> Result<(), EnginesError> {
    match values.iter().enumerate().find(|(at, value)| values[..*at].contains(value)) {
        Some((_, twice)) => Err(EnginesError::Twice { option, value: twice.to_string() }),
        None => Ok(()),
    }
}

type Given = BTreeMap<String, String>;

/// The options by engine, checked.
fn options(words: &[String], engines: &[&'static BuiltIn]) -> Result<Vec<Given>, EnginesError> {
    let mut given = vec![Given::new(); engines.len()];
    for word in words {
        let parts = word.split_once('.').and_then(|(engine, rest)| {
            let at = engines.iter().position(|built_in| built_in.name() == engine)?;
            Some((at, rest.split_once('=')?))
        });
        let (at, (name, value)) = parts.ok_or_else(|| EnginesError::OptionForm(word.clone()))?;
        if given[at].insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(EnginesError::Twice { option: "option", value: word.clone() });
        }
    }
    for (engine, given) in engines.iter().zip(&given) {
        Options::new(engine.about, given)?;
    }
    Ok(given)
}

/// What is known of an engine before it runs.
pub fn subject(about: &About, given: &Given) -> Subject {
    let mut facts: BTreeMap<String, String> = [
        ("buffered batches survive".to_owned(), about.buffered_survives.to_string()),
        ("durable batches survive".to_owned(), about.durable_survives.to_string()),
        ("gives space back".to_owned(), about.reclaim.to_string()),
    ]
    .into();
    let options: Vec<String> = about
        .options
        .iter()
        .map(|spec| {
            let value = given.get(spec.name).map_or(spec.default, String::as_str);
            format!("{}={value}", spec.name)
        })
        .collect();
    if !options.is_empty() {
        facts.insert("options".to_owned(), options.join(", "));
    }
    Subject { name: about.name.to_owned(), summary: about.summary.to_owned(), facts }
}

/// Measures what `args` ask for with workers that run `program`; `say` is given one line about the room that
/// is needed, before anything is written.
///
/// # Errors
/// If nothing could be measured at all. A run that fails alone is in the report.
pub fn measure(
    args: &EnginesArgs,
    program: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<Report, EnginesError> {
    let engines = chosen(&args.engine)?;
    let given = options(&args.option, &engines)?;
    let keys = match (&args.keys[..], args.quick) {
        ([], true) => vec![2_000],
        ([], false) => vec![100_000, 1_000_000],
        (keys, _) => keys.to_vec(),
    };
    once("keys", &keys)?;
    once("value-size", &args.value_size)?;
    let limit = Duration::from_millis(if args.quick { 200 } else { 3_000 });
    let limit = args.duration.unwrap_or(limit);
    if limit.is_zero() {
        return Err(EnginesError::NoTime);
    }
    let dir = &args.output.dir;
    let failed = |source| EnginesError::Dir { dir: dir.clone(), source };
    let sizes: Vec<(u64, u64)> = keys
        .iter()
        .flat_map(|keys| args.value_size.iter().map(move |value_bytes| (*keys, *value_bytes)))
        .collect();
    let job = |engine: &BuiltIn, given: &Given, (keys, value_bytes): (u64, u64)| Job {
        engine: engine.name().to_owned(),
        options: given.clone(),
        dir: PathBuf::new(),
        keys,
        value_bytes,
        seed: args.seed,
        duration: limit,
    };
    check_room(&engines, &sizes, dir, &job, say)?;

    let interrupt = Interrupt::watch()
        .map_err(|source| EnginesError::System { what: "handle signals", source })?;
    let home = tempfile::Builder::new().prefix("quorate-bench-").tempdir_in(dir).map_err(failed)?;
    // A worker is told its place in full.
    let base = home.path().canonicalize().map_err(failed)?;
    let (start, started) = (Instant::now(), SystemTime::now());
    let mut notes = notes(limit);
    let mut sets = Vec::new();
    for &size in &sizes {
        let (keys, value_bytes) = size;
        let mut set = Set { keys, value_bytes, runs: Vec::new() };
        for (engine, given) in engines.iter().zip(&given) {
            let place = base.join(format!("{}-{keys}-{value_bytes}", engine.name()));
            let dir = engine.dir(&place).unwrap_or_else(|| place.join("none"));
            fs::create_dir_all(&dir).map_err(failed)?;
            let job = Job { dir, ..job(engine, given, size) };
            set.runs.push(run(program, &job, &interrupt, &mut notes)?);
            fs::remove_dir_all(&place).map_err(failed)?;
        }
        sets.push(set);
    }
    let machine = machine::describe(&base);
    home.close().map_err(failed)?;
    let text = |numbers: &[u64]| numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    Ok(Report {
        schema: SCHEMA,
        command: Command::Engines,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        optimised: !cfg!(debug_assertions),
        started_unix_s: started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        elapsed_s: start.elapsed().as_secs_f64(),
        machine,
        settings: [
            ("keys".to_owned(), text(&keys)),
            ("value-size".to_owned(), text(&args.value_size)),
            ("duration".to_owned(), format!("{}s", limit.as_secs_f64())),
            ("seed".to_owned(), args.seed.to_string()),
        ]
        .into(),
        notes,
        subjects: engines
            .iter()
            .zip(&given)
            .map(|(engine, given)| subject(engine.about, given))
            .collect(),
        sets,
    })
}

fn notes(limit: Duration) -> Vec<String> {
    vec![
        "Rows are the server's: 17-byte revision keys in ascending order, encoded key-value records whose \
         values are random bytes (they do not compress), and with each batch the applied index, the term \
         and the configuration."
            .to_owned(),
        "A rate counts the time inside the engine alone; making the rows is not in it. Latency is that of \
         one call."
            .to_owned(),
        "Durability: a durable batch is on the disk when the call returns. Buffered batches are made durable \
         after every 10 s and once at the end of the workload, inside its time, as the server does it: there the \
         write-ahead log holds what the engine may lose."
            .to_owned(),
        "Cold: the database was closed, its files were synced and dropped from the page cache by \
         posix_fadvise(POSIX_FADV_DONTNEED), which needs no privilege and does not empty the disk's own \
         cache. On a file system in memory cold is the same as warm."
            .to_owned(),
        "Memory: the resident set of the engine's process, sampled from outside; memory of its own is what \
         belongs to no file. The page cache of its files is counted apart. The process holds a few MiB of \
         the benchmark itself, and up to two batches."
            .to_owned(),
        format!(
            "Each workload ends after {} s inside the engine, or when it has done its number of rows or reads.",
            limit.as_secs_f64()
        ),
        "×1.00 is the best of a line, for rates the most, for bytes and times the least. An engine that keeps \
         nothing beyond its end is shown as what is possible, and not taken for the best; its bar is broken where it \
         leaves the chart."
            .to_owned(),
    ]
}

/// Says what the largest run may need and refuses what is not there. One engine runs at a time, and its
/// files are removed before the next.
fn check_room(
    engines: &[&'static BuiltIn],
    sizes: &[(u64, u64)],
    dir: &Path,
    job: &dyn Fn(&BuiltIn, &Given, (u64, u64)) -> Job,
    say: &mut dyn FnMut(&str),
) -> Result<(), EnginesError> {
    let (mut on_disk, mut in_memory) = (0, None);
    for engine in engines {
        for &size in sizes {
            let job = job(engine, &Given::new(), size);
            if !keeps_nothing(engine) {
                on_disk = on_disk.max(job.disk_bytes_max());
            } else {
                // Nodes of trees and buffers come on top of the rows.
                let needed = job.rows_max() * (job.row_bytes() + 200);
                in_memory = in_memory.max(Some((needed, engine.name())));
            }
        }
    }
    let failed = |source| EnginesError::Dir { dir: dir.to_path_buf(), source };
    let free = machine::disk_free(dir).map_err(failed)?;
    say(&format!(
        "needs up to {} of disk at a time in --dir, which has {} free",
        table::bytes(on_disk as f64),
        table::bytes(free as f64)
    ));
    if on_disk > free {
        return Err(EnginesError::Disk { needed: on_disk, free });
    }
    if let (Some((needed, engine)), Some(free)) = (in_memory, machine::memory_available())
        && needed > free
    {
        return Err(EnginesError::Memory { engine, needed, free });
    }
    Ok(())
}

/// One engine with data of one size.
fn run(
    program: &Path,
    job: &Job,
    interrupt: &Interrupt,
    notes: &mut Vec<String>,
) -> Result<Run, EnginesError> {
    let system = |what| move |source| EnginesError::System { what, source };
    let worker = Worker::start(program, job).map_err(system("start a process for the engine"))?;
    let pid = worker.pid();
    let bar = bar(&format!("{} {} × {} B", job.engine, table::grouped(job.keys), job.value_bytes));
    let mut sampler = Sampler::new();
    let mut measures = Vec::new();
    let mut outcome = None;
    let mut heard = Instant::now();
    // Ends early with what is wrong, or with the worker's output.
    let stopped = loop {
        if interrupt.is_set() {
            return Err(EnginesError::Interrupted);
        }
        let told = worker.told.recv_timeout(LOOK);
        if told.is_ok() {
            heard = Instant::now();
        }
        match told {
            Ok(Told::Event(Event::Phase { name })) => {
                bar.set_message(name.clone());
                bar.set_length(0);
                bar.set_position(0);
                sampler.phase(&name);
            }
            Ok(Told::Event(Event::Progress { done, total })) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Ok(Told::Event(Event::Measured(measure))) => measures.push(measure),
            Ok(Told::Event(Event::Note { text })) => {
                if !notes.contains(&text) {
                    notes.push(text);
                }
            }
            Ok(Told::Event(Event::Verified { rows, bytes, digest })) => {
                outcome = Some(Outcome::Verified { rows, bytes, digest });
            }
            Ok(Told::Event(Event::Failed { error })) => outcome = Some(Outcome::Failed { error }),
            Ok(Told::Nonsense(line)) => break Some(format!("the engine's process wrote {line:?}")),
            Err(RecvTimeoutError::Timeout) if heard.elapsed() > SILENCE => {
                break Some(format!("nothing was heard for {} s", SILENCE.as_secs()));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break None,
        }
        sampler.look(pid, &job.dir).map_err(system("examine the files of an engine"))?;
        let most = job.disk_bytes_max();
        if sampler.disk_most() > most {
            let taken = table::bytes(sampler.disk_most() as f64);
            let most = table::bytes(most as f64);
            break Some(format!("its files take {taken}, more than the {most} that were planned"));
        }
    };
    bar.finish_and_clear();
    let outcome = match stopped {
        Some(error) => {
            drop(worker); // which kills it
            Outcome::Failed { error }
        }
        None => {
            let (status, last) = worker.wait().map_err(system("wait for an engine's process"))?;
            outcome.unwrap_or_else(|| {
                let last = last.map_or(String::new(), |line| format!(": {line}"));
                Outcome::Failed {
                    error: format!("the engine's process ended early, {status}{last}"),
                }
            })
        }
    };
    let (samples, most) = sampler.finish();
    measures.extend(most);
    let subject = job.engine.clone();
    let reference = engines::find(&subject).is_some_and(keeps_nothing);
    Ok(Run { subject, reference, outcome, measures, samples })
}

/// A progress bar on the terminal, if standard error is one.
pub fn bar(name: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{prefix} {msg:22} {wide_bar} {percent:>3} % {elapsed}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
    bar.set_prefix(name.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn engines_are_taken_from_the_registry() {
        assert_eq!(chosen(&words(&["all"])).unwrap(), engines::ALL);
        let two = chosen(&words(&["memory", "redb"])).unwrap();
        assert_eq!([two[0].name(), two[1].name()], ["memory", "redb"]);
        let error = chosen(&words(&["memory", "x"])).unwrap_err().to_string();
        assert_eq!(error, format!("--engine x: unknown engine; built in are {}", engines::names()));
        let error = chosen(&words(&["redb", "redb"])).unwrap_err().to_string();
        assert_eq!(error, "--engine: redb is given twice");
    }

    #[test]
    fn options_are_checked_before_anything_runs() {
        let engines = chosen(&words(&["redb", "memory"])).unwrap();
        let given = options(&words(&["redb.cache-bytes=2000000"]), &engines).unwrap();
        assert_eq!((given[0]["cache-bytes"].as_str(), given[1].len()), ("2000000", 0));
        let facts = subject(engines[0].about, &given[0]).facts;
        assert!(facts["options"].contains("cache-bytes=2000000"), "{facts:?}");
        let error = |word| options(&words(&[word]), &engines).unwrap_err().to_string();
        assert!(error("redb.cache=1").starts_with("--option: unknown option \"cache\""));
        assert!(error("lmdb.cache=1").contains("want ENGINE.OPTION=VALUE"));
        assert!(error("redb").contains("want ENGINE.OPTION=VALUE"));
    }

    #[test]
    fn a_process_that_is_no_worker_fails_its_run_alone() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job {
            engine: "memory".into(),
            options: Given::new(),
            dir: dir.path().into(),
            keys: 100,
            value_bytes: 8,
            seed: 0,
            duration: Duration::from_millis(1),
        };
        let interrupt = Interrupt::watch().unwrap();
        let error = |program: &str| {
            let run = run(Path::new(program), &job, &interrupt, &mut Vec::new()).unwrap();
            match run.outcome {
                Outcome::Failed { error } => error,
                Outcome::Verified { .. } => panic!("verified by {program}"),
            }
        };
        let ended = error("/bin/false");
        assert!(ended.starts_with("the engine's process ended early, exit status: 1"), "{ended}");
        let wrote = error("/bin/echo");
        assert!(wrote.starts_with("the engine's process wrote \"bench engine-worker\""), "{wrote}");
    }

    #[test]
    fn the_room_that_is_planned_grows_with_the_data() {
        let job = |keys, value_bytes| Job {
            engine: "redb".into(),
            options: Given::new(),
            dir: PathBuf::new(),
            keys,
            value_bytes,
            seed: 0,
            duration: Duration::from_secs(1),
        };
        assert!(job(100, 1).rows_max() >= 100 + 2 * 20_000);
        let (small, large) = (job(1_000_000, 256), job(5_000_000, 256));
        assert!(small.disk_bytes_max() < large.disk_bytes_max());
        assert!(large.disk_bytes_max() > 4 * 5_000_000 * 256);
        // A batch of 10 000 values of 1 MiB is left out, so it needs no room.
        assert!(job(100, 1 << 20).disk_bytes_max() < 4 * 5_000 * (2 << 20));
    }
}
