//! The text of `--help`, made from the table of flags.

use std::fmt::Write;

use super::Config;
use super::flags::{FLAGS, Group};

/// What is printed on stderr behind a wrong flag, and before the full help.
pub const USAGE: &str = "\
Usage:
  quorate [serve] [flags]         serve a member of a cluster
  quorate --config-file <path>    the same, with all settings from a file
  quorate local-cluster [flags]   a cluster on this machine, to try it out
  quorate engines                 list the storage engines and their settings
  quorate utl engine convert      move a data directory to another engine
  quorate --version               print versions
  quorate --help                  print all flags
";

/// All flags with their defaults, by group.
pub fn help() -> String {
    let mut config = Config::default();
    let mut text = String::new();
    for &group in Group::ALL {
        let _ = writeln!(text, "{group}:\n"); // into a string, which cannot fail
        for flag in FLAGS.iter().filter(|flag| flag.group == group) {
            let slot = (flag.slot)(&mut config);
            let default = slot.print();
            let _ = match slot.value_name() {
                "" => writeln!(text, "  --{} '{default}'", flag.name),
                value => writeln!(text, "  --{} '{default}' {value}", flag.name),
            };
            for line in wrap(flag.help, 92) {
                let _ = writeln!(text, "    {line}");
            }
        }
        text.push('\n');
    }
    text.push_str(
        "A flag has one dash or two. A boolean takes a value only behind =. Durations are written as\n\
         1h30m, 100ms. Each flag can be set by a variable instead: ETCD_ and its name in capitals,\n\
         with _ for -; those of the last group begin with QUORATE_. With a configuration file, flags\n\
         and variables count for nothing.\n",
    );
    text
}

/// `text` in lines of at most `width` characters, cut between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
