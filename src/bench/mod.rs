//! `quorate bench`: measures any server of etcd's v3 API, alone or two side by side.
//!
//! `options` reads the command line into a plan; a `session` holds the threads and connections to one
//! server and runs slices of a load on them; `work` says what a client does; `pace` when; `tally`
//! counts; `outcome` prints. The client underneath (`client`, `wire`) is made to cost little, because
//! it shares the machine with what it measures; its own CPU time is part of each report.
//!
//! `engines` and `servers` compare several storage engines, alone or under a whole server, and share one
//! report (`report`).
//!
//! Two servers are measured in one run and by turns, A B B A..., so that what else the machine does
//! in the meantime falls on both.

mod client;
mod engines;
mod interrupt;
mod machine;
mod memory;
mod options;
mod outcome;
mod pace;
mod process;
mod report;
mod servers;
mod session;
mod tally;
mod watch;
mod wire;
mod work;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use client::{CallError, ConnectError, Endpoint};
use engines::EnginesError;
use options::{Cli, Command, OptionsError, Plan, Program, ReportArgs};
use outcome::{Column, Outcome, Ratio, Report, UsageOver, table};
use process::ProcessError;
use report::json::{self, ReadError};
use report::{html, model, table as text_table};
use servers::ServerError;
use session::{Budget, Session};
use work::Load;

/// Why there is no result.
#[derive(thiserror::Error, Debug)]
enum BenchError {
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{endpoint} does not answer like etcd: {error}")]
    NotEtcd { endpoint: String, error: CallError },
    #[error("cannot {what}: {error}")]
    Call { what: &'static str, error: CallError },
    #[error("cannot write the key space: {0}")]
    Populate(String),
    #[error("nothing completed for {seconds} s")]
    Stalled { seconds: u64 },
    #[error("watchers received {received} of {expected} events")]
    EventsLost { expected: u64, received: u64 },
    #[error("watchers received {received} events where at most {expected} were caused")]
    EventsExtra { expected: u64, received: u64 },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("cannot start a thread's runtime: {0}")]
    Runtime(io::Error),
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
    #[error("not one request succeeded")]
    NothingSucceeded,
    #[error(transparent)]
    Engines(#[from] EnginesError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("cannot write {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{0} of the runs failed")]
    Failed(usize),
}

impl BenchError {
    fn exit_code(&self) -> u8 {
        match self {
            BenchError::Options(_) => 2,
            BenchError::Engines(EnginesError::Interrupted)
            | BenchError::Server(ServerError::Engines(EnginesError::Interrupted)) => 130,
            BenchError::Engines(error) if error.is_usage() => 2,
            BenchError::Server(error) if error.is_usage() => 2,
            _ => 1,
        }
    }
}

/// Runs the benchmark that `args` (what follows `bench`) ask for. Exit code 0: there is a result,
/// single failed requests included; 1: there is none, or an engine or a server has failed; 2: the command line
/// is wrong; 130: interrupted.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    ExitCode::from(run_to(args, &mut io::stdout(), &mut io::stderr()))
}

/// [`run`] with its output directed elsewhere; answers the exit code.
pub fn run_to(
    args: impl Iterator<Item = OsString>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    let cli = match Cli::try_parse_from(std::iter::once("bench".into()).chain(args)) {
        Ok(cli) => cli,
        Err(error) => {
            let to: &mut dyn Write = if error.use_stderr() { err } else { out };
            let written = write!(to, "{}", error.render());
            return if written.is_ok() && !error.use_stderr() { 0 } else { 2 };
        }
    };
    let done = match &cli.program {
        Program::One(command) => bench(command, out),
        Program::Engines(args) => compare(&args.output, out, err, |program, say| {
            Ok(engines::measure(args, program, say)?)
        }),
        Program::Server(args) => compare(&args.output, out, err, |program, say| {
            Ok(servers::measure(args, program, say)?)
        }),
        Program::Report(args) => again(args, out),
        Program::Worker => return engines::worker::main(),
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            // There is nobody left to tell if this fails too; the exit code still says it.
            let _unwritable = writeln!(err, "error: {error}");
            error.exit_code()
        }
    }
}

type Measuring<'a> = &'a mut dyn FnMut(&str);

/// Measures with children that run this program, and writes the report everywhere it is wanted. Runs that failed
/// are in it.
fn compare(
    output: &engines::Output,
    out: &mut dyn Write,
    err: &mut dyn Write,
    measure: impl FnOnce(&Path, Measuring<'_>) -> Result<model::Report, BenchError>,
) -> Result<(), BenchError> {
    let program = std::env::current_exe()
        .map_err(|source| EnginesError::System { what: "find the program itself", source })?;
    let mut say = |line: &str| {
        // The run goes on if nobody hears it.
        let _unwritable = writeln!(err, "{line}");
    };
    let report = measure(&program, &mut say)?;
    let reports = std::slice::from_ref(&report);
    match &output.json {
        Some(path) if path.as_os_str() == "-" => json::write(&report, out)?,
        Some(path) => {
            let mut text = Vec::new();
            json::write(&report, &mut text)?;
            write_file(path, &text)?;
            out.write_all(text_table::text(&report).as_bytes())?;
        }
        None => out.write_all(text_table::text(&report).as_bytes())?,
    }
    out.flush()?;
    if let Some(path) = &output.html {
        write_file(path, html::page(reports).as_bytes())?;
    }
    match report.failures().len() {
        0 => Ok(()),
        failed => Err(BenchError::Failed(failed)),
    }
}

/// Shows reports that were written before.
fn again(args: &ReportArgs, out: &mut dyn Write) -> Result<(), BenchError> {
    let reports =
        args.files.iter().map(|path| json::read(path)).collect::<Result<Vec<_>, ReadError>>()?;
    for report in &reports {
        out.write_all(text_table::text(report).as_bytes())?;
    }
    out.flush()?;
    match &args.html {
        Some(path) => write_file(path, html::page(&reports).as_bytes()),
        None => Ok(()),
    }
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), BenchError> {
    std::fs::write(path, bytes)
        .map_err(|source| BenchError::File { path: path.to_path_buf(), source })
}

fn bench(command: &Command, out: &mut dyn Write) -> Result<(), BenchError> {
    let plan = command.plan()?;
    let (servers, rounds) = measure(&plan)?;
    let ratio = match &servers[..] {
        [a, b] => Some(Ratio::new(a, b, &rounds)),
        _ => None,
    };
    let idle = servers.iter().any(|outcome| outcome.requests == 0);
    let report = Report { workload: plan.name, options: command, servers, ratio };
    if plan.common.json {
        serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        out.write_all(table(&report).as_bytes())?;
    }
    out.flush()?;
    if idle { Err(BenchError::NothingSucceeded) } else { Ok(()) }
}

/// A server, its session and its figures.
struct Side<'a> {
    session: Session,
    column: Column,
    pids: &'a [u32],
}

/// Runs the plan; answers each server's outcome, and the requests per second of both by round.
fn measure(plan: &Plan) -> Result<(Vec<Outcome>, Vec<(f64, f64)>), BenchError> {
    let common = &plan.common;
    // Only has to differ from run to run: it tells this run's events from another's.
    let mark = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
        ^ (u64::from(std::process::id()) << 32);
    let load = Arc::new(Load::new(
        plan.work.clone(),
        plan.keys.clone(),
        plan.value_size,
        common.seed,
        mark,
    ));
    let mut sides = Vec::new();
    for (endpoints, pids) in
        [(&common.endpoints, &common.server_pid), (&common.versus, &common.versus_pid)]
    {
        if endpoints.is_empty() {
            continue;
        }
        process::usage(pids)?; // a wrong process is better told now than after the run
        let session = Session::open(endpoints, load.clone(), plan.shape.clone())?;
        let name = endpoints.iter().map(Endpoint::to_string).collect::<Vec<_>>().join(",");
        let kinds = plan.work.kinds().len();
        let created = session.created.clone();
        let column = Column::new(name, session.version.clone(), created, kinds);
        sides.push(Side { session, column, pids });
    }

    for side in &mut sides {
        if plan.populate {
            let bar = Bar::new("populate", Budget::Requests(plan.keys.space));
            side.session.populate(&mut |done| bar.at(done))?;
        }
        if let Some(warmup) = common.warmup.filter(|warmup| !warmup.is_zero()) {
            let bar = Bar::new("warm up", Budget::Time(warmup));
            side.session.slice(Budget::Time(warmup), &mut |done| bar.at(done))?;
        }
    }
    let mut before = Vec::new();
    for side in &sides {
        before.push(process::usage(side.pids)?);
    }

    let rounds = if sides.len() == 2 { common.rounds } else { 1 };
    for round in 0..rounds {
        let budget = share(plan.budget, round, rounds);
        // A B, B A, A B...: neither always goes first.
        let mut turn: Vec<&mut Side<'_>> = sides.iter_mut().collect();
        if round % 2 == 1 {
            turn.reverse();
        }
        for side in turn {
            let bar = Bar::new(&side.column.server, budget);
            let slice = side.session.slice(budget, &mut |done| bar.at(done))?;
            side.column.add(&slice, &plan.work);
        }
    }

    let mut outcomes = Vec::new();
    let mut slices = Vec::new();
    for (mut side, before) in sides.into_iter().zip(before) {
        if !side.pids.is_empty() {
            side.column.usage = Some(UsageOver { before, after: process::usage(side.pids)? });
        }
        side.session.close()?;
        outcomes.push(Outcome::new(&side.column, &plan.work));
        slices.push(side.column.slices);
    }
    let by_round = match &slices[..] {
        [a, b] => a.iter().copied().zip(b.iter().copied()).collect(),
        _ => Vec::new(),
    };
    Ok((outcomes, by_round))
}

/// The part of `budget` that falls on one of `rounds`; all parts together are the whole.
fn share(budget: Budget, round: u32, rounds: u32) -> Budget {
    match budget {
        Budget::Requests(total) => {
            let (each, rest) = (total / u64::from(rounds), total % u64::from(rounds));
            Budget::Requests(each + u64::from(u64::from(round) < rest))
        }
        Budget::Time(time) => Budget::Time(time / rounds),
    }
}

/// A progress bar on the terminal, if standard error is one. Counts requests, or time if that limits.
struct Bar {
    bar: ProgressBar,
    timed: bool,
}

impl Bar {
    fn new(name: &str, budget: Budget) -> Self {
        let (length, timed) = match budget {
            Budget::Requests(total) => (total, false),
            Budget::Time(time) => (time.as_millis() as u64, true),
        };
        let bar = ProgressBar::new(length);
        let template = if timed {
            "{prefix} {wide_bar} {elapsed} {msg} done"
        } else {
            "{prefix} {wide_bar} {pos}/{len} {per_sec}"
        };
        bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
        bar.set_prefix(name.to_owned());
        Bar { bar, timed }
    }

    fn at(&self, done: u64) {
        if self.timed {
            self.bar.set_position(self.bar.elapsed().as_millis() as u64);
            self.bar.set_message(done.to_string());
        } else {
            self.bar.set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rounds_add_up_to_the_whole() {
        let parts: Vec<Budget> = (0..3).map(|round| share(Budget::Requests(8), round, 3)).collect();
        assert_eq!(parts, [Budget::Requests(3), Budget::Requests(3), Budget::Requests(2)]);
        let time = Budget::Time(Duration::from_secs(6));
        assert_eq!(share(time, 1, 3), Budget::Time(Duration::from_secs(2)));
    }
}
