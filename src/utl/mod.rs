//! `quorate utl`: tools for data directories of members that do not run.

pub mod convert;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};

use clap::{Args, Parser, Subcommand, ValueEnum};
use engine_api::Options;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};

use crate::config::slot::parse_options;
use crate::engines;
use convert::progress::Progress;
use convert::{ConvertError, Converted, Plan, convert};

/// Tools for data directories of members that do not run.
#[derive(Parser, Debug)]
#[command(name = "quorate utl", bin_name = "quorate utl", disable_version_flag = true)]
struct Cli {
    /// How the result is written
    #[arg(short = 'w', long = "write-out", value_enum, default_value_t = Form::Simple, global = true)]
    write_out: Form,
    #[command(subcommand)]
    command: Command,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Simple,
    Json,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Storage engines
    #[command(subcommand)]
    Engine(EngineCommand),
}

#[derive(Subcommand, Debug)]
enum EngineCommand {
    /// Make a data directory for another engine from one of a member that does not run
    ///
    /// The source is only read. What is made has the log and the snapshots of the source, so that the
    /// member goes on with it. Before it is done, every row is read back and compared, and both must
    /// have the same HashKV. Interrupted at any point, the command is simply run again.
    Convert(ConvertArgs),
}

#[derive(Args, Debug)]
struct ConvertArgs {
    /// Data directory to read; its member must not run
    #[arg(long, value_name = "DIR")]
    from_dir: PathBuf,
    /// Where its log is, if the member was started with --wal-dir
    #[arg(long, value_name = "DIR")]
    from_wal_dir: Option<PathBuf>,
    /// Settings without which the engine of the source refuses its files
    #[arg(long, value_name = "NAME=VALUE,...", default_value = "")]
    from_engine_options: String,
    /// Data directory to make; absent, empty, or left by an interrupted conversion
    #[arg(long, value_name = "DIR")]
    to_dir: PathBuf,
    /// Engine of the new directory; `quorate engines` lists them
    #[arg(long, value_name = "NAME")]
    engine: String,
    /// Settings of that engine
    #[arg(long, value_name = "NAME=VALUE,...", default_value = "")]
    engine_options: String,
}

/// Runs what `args` ask for. Exit codes: 2 for a command line that cannot be read, 1 for what could not be
/// done; a command that is interrupted ends by the signal.
pub fn run(args: &[String]) -> ExitCode {
    let words = std::iter::once("utl").chain(args.iter().map(String::as_str));
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            return error.print().map_or(ExitCode::FAILURE, |()| ExitCode::from(code));
        }
    };
    let Command::Engine(EngineCommand::Convert(args)) = cli.command;
    let ended = plan(args).and_then(|plan| {
        note_signals();
        convert(&plan, &Progress::on_terminal(), &|| SIGNALLED.load(Ordering::Relaxed) != 0)
    });
    match ended.map(|converted| tell(&converted, cli.write_out)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            refuse(&format!("the conversion is done, but its result cannot be written: {error}"))
        }
        Err(ConvertError::Interrupted) => {
            let code =
                refuse("interrupted: the target is as it was before, the source was only read");
            end_by_signal();
            code
        }
        Err(error) => refuse(&error.to_string()),
    }
}

fn plan(args: ConvertArgs) -> Result<Plan, ConvertError> {
    let refused = |what: String| ConvertError::Refused(what);
    let engine = engines::find(&args.engine).ok_or_else(|| {
        refused(format!(
            "--engine: unknown engine {:?} (supported are {})",
            args.engine,
            engines::names()
        ))
    })?;
    let given = parse_options(&args.engine_options)
        .map_err(|what| refused(format!("--engine-options: {what}")))?;
    let options = Options::new(engine.about, &given)
        .map_err(|error| refused(format!("--engine-options: {error}")))?;
    let from_options = parse_options(&args.from_engine_options)
        .map_err(|what| refused(format!("--from-engine-options: {what}")))?;
    Ok(Plan {
        from: args.from_dir,
        from_wal: args.from_wal_dir,
        from_options,
        to: args.to_dir,
        engine,
        options,
    })
}

fn tell(converted: &Converted, form: Form) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match form {
        Form::Simple => writeln!(out, "{converted}")?,
        Form::Json => {
            serde_json::to_writer(&mut out, converted).map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    out.flush()
}

fn refuse(text: &str) -> ExitCode {
    // There is nobody left to tell if this fails; the exit code still says it.
    let _ = writeln!(io::stderr(), "error: {text}");
    ExitCode::FAILURE
}

/// The signal that asked for an end; 0 for none.
static SIGNALLED: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_signal(number: libc::c_int) {
    SIGNALLED.store(number, Ordering::Relaxed);
}

/// Lets the first interrupt stop the work in an orderly way, and a second one at once.
fn note_signals() {
    let action =
        SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESETHAND, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but store to an atomic.
        let before = unsafe { sigaction(signal, &action) };
        if let Ok(before) = before
            && signal == Signal::SIGHUP
            && matches!(before.handler(), SigHandler::SigIgn)
        {
            // Started by nohup: the terminal may go. SAFETY: it is as it was.
            unsafe { sigaction(signal, &before) }.ok();
        }
    }
}

/// Ends as a program does that was interrupted, so that a shell's loop ends too.
fn end_by_signal() {
    // The action of this signal was reset when it was noted.
    if let Ok(signal) = Signal::try_from(SIGNALLED.load(Ordering::Relaxed)) {
        raise(signal).ok();
    }
}
