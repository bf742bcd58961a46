//! Storage engines as an operator meets them: listed, documented, chosen, and changed for another one.
//!
//! All engines come from the registry, so that one that is added there is tested here.

mod convert;
mod docs;
mod etcd;
mod list;
#[path = "../ports/mod.rs"]
mod ports;
// Shared with the tests of the daemon, which use all of it.
#[allow(dead_code)]
#[path = "../daemon/process.rs"]
mod process;
#[path = "../tmpfs/mod.rs"]
mod tmpfs;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use quorate::engines::{ALL, BuiltIn};

/// Those with files: what they hold can be converted.
fn persistent() -> Vec<&'static BuiltIn> {
    ALL.iter().copied().filter(|engine| engine.home(Path::new("")).is_some()).collect()
}

/// The binary, with nothing of this process's environment.
fn quorate(args: &[&str]) -> Command {
    let mut command = Command::new(process::BINARY);
    command.env_clear().args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What a command wrote that went well.
fn written(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, text(&output.stderr));
    text(&output.stdout)
}
