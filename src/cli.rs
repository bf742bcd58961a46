//! The programs of the binary, and how each ends.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::UdpSocket;
use std::process::ExitCode;

use crate::config::{self, Asked, Config, ConfigError, Notice, Surroundings, Telling, help};
use crate::logging::{self, Logging};

/// The release of etcd whose behaviour is kept.
pub const ETCD_VERSION: &str = "3.7.1";

/// Programs that are not part of this release. Any other word is taken for a misplaced argument of
/// the member, as etcd takes it.
const ABSENT: &[&str] = &["ctl", "gateway", "grpc-proxy", "proxy"];

/// What the command line asks to be run.
#[derive(PartialEq, Eq, Debug)]
pub enum Program<'a> {
    /// A member, with these flags.
    Serve(&'a [String]),
    /// The benchmark, with these arguments.
    Bench(&'a [String]),
    /// A cluster on this machine, with these arguments.
    LocalCluster(&'a [String]),
    /// The list of engines, with these arguments.
    Engines(&'a [String]),
    /// The tools for data directories, with these arguments.
    Utl(&'a [String]),
    /// Something else, by its name.
    Other(&'a str),
}

/// Which program `args`, those behind the binary's own name, ask for. A first word that is no flag
/// names it; without one it is a member.
pub fn program(args: &[String]) -> Program<'_> {
    match args.first().map(String::as_str) {
        Some("serve") => Program::Serve(&args[1..]),
        Some("bench") => Program::Bench(&args[1..]),
        Some("local-cluster") => Program::LocalCluster(&args[1..]),
        Some("engines") => Program::Engines(&args[1..]),
        Some("utl") => Program::Utl(&args[1..]),
        Some(name) if ABSENT.contains(&name) => Program::Other(name),
        _ => Program::Serve(args),
    }
}

/// Runs the program that `args` (the binary's own name first) ask for; `serve` runs a member until
/// it ends.
///
/// Exit codes are etcd's: 2 for a command line that cannot be read, 1 for a configuration that cannot
/// be served, else what `serve` answers.
pub fn run(args: &[String], serve: fn(Config, Logging) -> ExitCode) -> ExitCode {
    match program(args.get(1..).unwrap_or_default()) {
        Program::Serve(flags) => start(args, flags, serve),
        Program::Bench(args) => crate::bench::run(args.iter().map(Into::into)),
        Program::LocalCluster(args) => crate::local::run(args),
        Program::Engines(args) => crate::engines::list::run(args),
        Program::Utl(args) => crate::utl::run(args),
        Program::Other(name) => {
            say(
                std::io::stderr(),
                &format!("unknown command {name:?} for \"quorate\"\n\n{}", help::USAGE),
            );
            ExitCode::from(1)
        }
    }
}

fn start(args: &[String], flags: &[String], serve: fn(Config, Logging) -> ExitCode) -> ExitCode {
    let surroundings = Surroundings { env: environment(), default_host: &default_host };
    let mut notices = Vec::new();
    let config = match config::load(flags, &surroundings, &mut notices) {
        Ok(Asked::Serve(config)) => config,
        Ok(Asked::Help) => {
            say(std::io::stderr(), help::USAGE);
            say(std::io::stdout(), &help::help());
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Version) => {
            say(std::io::stdout(), &versions());
            return ExitCode::SUCCESS;
        }
        Err(error) => return refuse(args, &error, &notices),
    };
    let logging = match Logging::install(&config.log) {
        Ok(logging) => logging,
        Err(error) => {
            say(std::io::stderr(), &format!("{error}\n"));
            return ExitCode::from(1);
        }
    };
    notices.iter().for_each(Notice::log);
    log_args(args);
    serve(*config, logging)
}

fn log_args(args: &[String]) {
    // A password on the command line is no secret to this machine, but the log may leave it.
    let mut hidden = false;
    let shown = args.iter().map(|arg| {
        let name = arg.trim_start_matches('-');
        if std::mem::take(&mut hidden) {
            return "(hidden)".to_owned();
        }
        match name.split_once('=') {
            Some(("discovery-password", _)) => "--discovery-password=(hidden)".to_owned(),
            _ => {
                hidden = arg.starts_with('-') && name == "discovery-password";
                arg.clone()
            }
        }
    });
    tracing::info!(args = logging::list(shown).value(), "Running: ");
}

/// Tells why a configuration is not served.
fn refuse(args: &[String], error: &ConfigError, notices: &[Notice]) -> ExitCode {
    match error.telling() {
        Telling::Usage => say(std::io::stderr(), &format!("{error}\n{}", help::USAGE)),
        Telling::Plain => say(std::io::stderr(), &format!("{error}\n")),
        Telling::Fatal | Telling::Verify | Telling::Panic => {
            // The log that was asked for may be part of what is wrong.
            if let Err(error) = Logging::install(&Config::default().log) {
                say(std::io::stderr(), &format!("{error}\n"));
            }
            notices.iter().for_each(Notice::log);
            match error {
                ConfigError::Shadowed(variable) => {
                    crate::fatal!(
                        { "environment-variable" = variable },
                        "conflicting environment variable is shadowed by corresponding \
                         command-line flag (either unset environment variable or disable flag)"
                    );
                }
                _ if error.telling() == Telling::Panic => {
                    tracing::error!(target: logging::PANIC, %error, "failed to set up the log");
                }
                _ => {
                    log_args(args);
                    tracing::warn!(%error, "failed to verify flags");
                }
            }
        }
    }
    ExitCode::from(error.exit_code())
}

/// The four lines of `--version`.
pub fn versions() -> String {
    format!(
        "quorate Version: {}\netcd API Version: {ETCD_VERSION}\nRust Version: {}\nOS/Arch: {}/{}\n",
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_RUST_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH,
    )
}

/// Writes to a standard stream. A reader that has gone needs no answer.
fn say(mut stream: impl Write, text: &str) {
    let _ = stream.write_all(text.as_bytes());
    let _ = stream.flush();
}

/// The environment; what is not Unicode is no setting of ours and is left out.
fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// The address that this machine sends from by its default route, an IPv4 one if there is.
fn default_host() -> Result<String, String> {
    // Connecting a datagram socket sends nothing: it only picks the route and with it the address.
    // The addresses are of the ranges kept for documentation.
    let from = |own: &str, to: &str| -> std::io::Result<std::net::IpAddr> {
        let socket = UdpSocket::bind(own)?;
        socket.connect(to)?;
        Ok(socket.local_addr()?.ip())
    };
    from("0.0.0.0:0", "192.0.2.1:9")
        .or_else(|_| from("[::]:0", "[2001:db8::1]:9"))
        .map(|ip| ip.to_string())
        .map_err(|error| format!("could not find default route: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_names_the_program() {
        let args = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let flags = args(&["--name", "a"]);
        assert_eq!(program(&flags), Program::Serve(&flags));
        let words = args(&["serve", "--name", "a"]);
        assert_eq!(program(&words), Program::Serve(&flags));
        assert_eq!(program(&[]), Program::Serve(&[]));
        assert_eq!(program(&args(&["gateway", "start"])), Program::Other("gateway"));
        let words = args(&["local-cluster", "--name", "a"]);
        assert_eq!(program(&words), Program::LocalCluster(&flags));
        let words = args(&["utl", "--name", "a"]);
        assert_eq!(program(&words), Program::Utl(&flags));
        assert_eq!(program(&args(&["engines"])), Program::Engines(&[]));
        let words = args(&["--name", "serve"]);
        assert_eq!(program(&words), Program::Serve(&words));
    }

    #[test]
    fn versions_are_four_lines() {
        assert_eq!(versions().lines().count(), 4);
        assert!(versions().contains("etcd API Version: 3.7.1\n"));
    }
}
