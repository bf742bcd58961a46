//! The binary: which program was asked for, run it, end with its exit code.

use std::process::ExitCode;

use quorate::cli;
use quorate::config::Config;
use quorate::logging::Logging;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args: Vec<String> =
        std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    cli::run(&args, serve)
}

fn serve(_: Config, _: Logging) -> ExitCode {
    quorate::fatal!("this build has no server in it");
    ExitCode::FAILURE
}
