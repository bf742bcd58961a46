//! etcd3 for node, and cases of our own over it: its package comes without its tests.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::cluster::{Cluster, tail};
use crate::environment::{Running, installed, output};
use crate::verdict::{Outcome, Results, add};

/// All cases take some ten seconds; each gives up by itself after thirty.
const CASES: Duration = Duration::from_secs(150);

/// The installed library.
pub struct Suite {
    dir: PathBuf,
}

/// What is printed for a case.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: String,
    why: Option<String>,
}

impl Suite {
    /// Installs the library.
    pub fn prepare() -> Suite {
        let package = include_str!("node/package.json");
        let lock = include_str!("node/package-lock.json");
        let dir = installed("node", &format!("{package}{lock}"), |dir| {
            let write =
                |name, text| fs::write(dir.join(name), text).map_err(|error| error.to_string());
            write("package.json", package)?;
            write("package-lock.json", lock)?;
            let mut npm = Command::new("npm");
            npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(dir);
            output(&mut npm, dir).map(drop)
        });
        Suite { dir }
    }

    /// Runs the cases against a cluster.
    ///
    /// # Panics
    /// If they do not come to their end.
    pub fn run(&self, cluster: &Cluster) -> Results {
        let (said, errors) = (cluster.scratch("said"), cluster.scratch("errors"));
        let mut node = Command::new("node");
        node.arg("-")
            .arg(cluster.endpoints().join(","))
            .stdin(
                File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/node/cases.js"))
                    .unwrap(),
            )
            // Where a program from standard input looks for its modules.
            .current_dir(&self.dir)
            .stdout(File::create(&said).unwrap())
            .stderr(File::create(&errors).unwrap());
        node.env_remove("NODE_OPTIONS");
        let child = node.spawn().unwrap_or_else(|error| panic!("{node:?}: {error}"));
        let ended = Running(child).wait(CASES);

        let said = fs::read_to_string(&said).unwrap();
        let context = || {
            let errors = fs::read_to_string(&errors).unwrap_or_default();
            let (said, errors) = (tail(&said, 5), tail(&errors, 20));
            let program = cluster.program;
            format!("with {program:?}: {ended:?}\n{said}\n{errors}\n{}", cluster.logs())
        };
        assert!(
            ended.is_some_and(|status| status.success()),
            "the cases fail as a whole {}",
            context()
        );
        let mut results = Results::new();
        for line in said.lines() {
            let line: Line = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{line} is no case ({error}) {}", context()));
            add(&mut results, line.name, line.why.map_or(Outcome::Passed, Outcome::Failed));
        }
        if results.values().any(|outcome| *outcome != Outcome::Passed) {
            println!("{}", context());
        }
        results
    }
}
