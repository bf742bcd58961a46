//! The binary: which program was asked for, run it, end with its exit code.

use std::process::ExitCode;

use quorate::{cli, daemon};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args: Vec<String> =
        std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    cli::run(&args, daemon::run)
}
