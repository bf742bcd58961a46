//! `quorate engines`: what is built in, for people and for programs; and the table of docs/engines.md.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use engine_api::{OptionKind, OptionSpec};
use serde_json::{Value, json};

use super::{ALL, BuiltIn, DEFAULT};

/// Lists the storage engines that are built in, with what they promise and how they can be set.
#[derive(Parser, Debug)]
#[command(name = "quorate engines", bin_name = "quorate engines", disable_version_flag = true)]
struct Cli {
    /// How the list is written
    #[arg(short = 'w', long = "write-out", value_enum, default_value_t = Form::Table)]
    write_out: Form,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Table,
    Json,
}

/// Runs what `args` ask for. Exit codes: 2 for a command line that cannot be read, 1 if nobody takes the
/// output.
pub fn run(args: &[String]) -> ExitCode {
    let words = std::iter::once("engines").chain(args.iter().map(String::as_str));
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            return error.print().map_or(ExitCode::FAILURE, |()| ExitCode::from(code));
        }
    };
    let text = match cli.write_out {
        Form::Table => table(),
        Form::Json => format!("{:#}\n", json(ALL)),
    };
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

impl BuiltIn {
    /// Where its files are below the data directory, in words.
    fn place(&self) -> String {
        match self.home("".as_ref()) {
            Some(home) => home.path().display().to_string(),
            None => "none".to_owned(),
        }
    }
}

fn limit(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "any".to_owned(), |bytes| format!("{bytes} B"))
}

fn default_of(spec: &OptionSpec) -> &str {
    if spec.default.is_empty() { "\"\"" } else { spec.default }
}

/// A block of lines for each engine, the default first.
fn table() -> String {
    let mut text = String::new();
    for engine in ALL {
        let about = engine.about;
        let default = if *engine == DEFAULT { " (default)" } else { "" };
        // into a string, which cannot fail
        let _ = writeln!(text, "{}{default}: {}", about.name, about.summary);
        for (name, value) in [
            ("buffered survives", about.buffered_survives.to_string()),
            ("durable survives", about.durable_survives.to_string()),
            ("reclaim", about.reclaim.to_string()),
            ("largest key", limit(about.key_bytes_max)),
            ("largest value", limit(about.value_bytes_max)),
            ("memory", about.memory.to_owned()),
            ("files", about.files.to_owned()),
            ("place", engine.place()),
        ] {
            let _ = writeln!(text, "  {name:<18} {value}");
        }
        if about.options.is_empty() {
            let _ = writeln!(text, "  {:<18} none", "options");
        }
        for (n, spec) in about.options.iter().enumerate() {
            let name = if n == 0 { "options" } else { "" };
            let _ = writeln!(text, "  {name:<18} {}={}", spec.name, default_of(spec));
            let _ = writeln!(text, "  {:<18}   {}", "", spec.kind);
            let _ = writeln!(text, "  {:<18}   {}", "", spec.help);
        }
        text.push('\n');
    }
    text.push_str(
        "A commit is buffered until the next durable one, which comes before the log drops what the\n\
         engine holds. The log itself survives a power loss, so no engine but one without files can\n\
         lose what was acknowledged.\n",
    );
    text
}

fn json(engines: &[&BuiltIn]) -> Value {
    let kind = |kind: OptionKind| match kind {
        OptionKind::Number { min, max, unit } => {
            json!({ "type": "number", "min": min, "max": max, "unit": unit })
        }
        OptionKind::Flag => json!({ "type": "flag" }),
        OptionKind::Choice(words) => json!({ "type": "choice", "words": words }),
    };
    let option = |spec: &OptionSpec| {
        json!({
            "name": spec.name,
            "kind": kind(spec.kind),
            "default": spec.default,
            "help": spec.help,
        })
    };
    let engine = |engine: &&BuiltIn| {
        let about = engine.about;
        json!({
            "name": about.name,
            "default": **engine == *DEFAULT,
            "summary": about.summary,
            "bufferedSurvives": about.buffered_survives.to_string(),
            "durableSurvives": about.durable_survives.to_string(),
            "reclaim": about.reclaim.to_string(),
            "keyBytesMax": about.key_bytes_max,
            "valueBytesMax": about.value_bytes_max,
            "memory": about.memory,
            "files": about.files,
            "place": engine.home("".as_ref()).map(|home| home.path()),
            "options": about.options.iter().map(option).collect::<Vec<_>>(),
        })
    };
    engines.iter().map(engine).collect()
}

/// The tables of docs/engines.md, which a test keeps equal to what the engines say.
pub fn markdown() -> String {
    let cell = |text: &str| text.replace('|', "\\|");
    let mut text = String::from(
        "| engine | what it is | a buffered commit survives | a durable commit survives | reclaim | \
         largest key | largest value | in memory | on disk |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for engine in ALL {
        let about = engine.about;
        let files = match engine.home("".as_ref()) {
            Some(home) => format!("`{}`: {}", home.path().display(), about.files),
            None => about.files.to_owned(),
        };
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {} | {} | {} | {} |",
            about.name,
            cell(about.summary),
            about.buffered_survives,
            about.durable_survives,
            about.reclaim,
            limit(about.key_bytes_max),
            limit(about.value_bytes_max),
            cell(about.memory),
            cell(&files),
        );
    }
    text.push_str("\n| engine | option | default | values | what it does |\n");
    text.push_str("| --- | --- | --- | --- | --- |\n");
    for engine in ALL {
        for spec in engine.about.options {
            let _ = writeln!(
                text,
                "| `{}` | `{}` | `{}` | {} | {} |",
                engine.name(),
                spec.name,
                default_of(spec),
                cell(&spec.kind.to_string()),
                cell(spec.help),
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_all_that_an_engine_says_of_itself() {
        let (table, json) = (table(), json(ALL));
        for (n, engine) in ALL.iter().enumerate() {
            let about = engine.about;
            assert!(table.contains(&format!("{}: {}\n", about.name, about.summary)) == (n > 0));
            assert_eq!(json[n]["name"], about.name);
            assert_eq!(json[n]["default"], n == 0);
            assert_eq!(json[n]["options"].as_array().map(Vec::len), Some(about.options.len()));
            for (at, spec) in about.options.iter().enumerate() {
                assert!(table.contains(&format!("{}={}", spec.name, default_of(spec))));
                assert!(table.contains(&spec.kind.to_string()));
                assert_eq!(json[n]["options"][at]["default"], spec.default);
            }
        }
        assert!(table.starts_with(&format!("{} (default): ", DEFAULT.name())), "{table}");
        assert_eq!(json.as_array().map(Vec::len), Some(ALL.len()));
    }
}
