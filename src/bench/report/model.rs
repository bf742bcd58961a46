//! The data of a report: subjects (engines or servers), and for each size of the data what was measured of
//! each. It says nothing about how it is shown, and names no host and no path.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Rises when a field changes its meaning or goes away; one that is added does not raise it.
pub const SCHEMA: u32 = 1;

/// Everything that a run has found.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub schema: u32,
    pub command: Command,
    /// Release of the program that measured.
    pub version: String,
    /// Whether that program was compiled with optimisation: figures of one that was not mean nothing.
    pub optimised: bool,
    /// Seconds since 1970 at the start.
    pub started_unix_s: u64,
    pub elapsed_s: f64,
    pub machine: Machine,
    /// The settings that make the run repeatable, as text by name.
    pub settings: BTreeMap<String, String>,
    /// How to read the figures: sentences.
    pub notes: Vec<String>,
    pub subjects: Vec<Subject>,
    pub sets: Vec<Set>,
}

/// What was measured.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    Engines,
    Server,
}

/// The machine in general terms.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Processors that this program may use.
    pub cores: u64,
    pub memory_bytes: u64,
    /// Its name and release.
    pub kernel: String,
    pub architecture: String,
    /// Kind of the file system that held the data, such as ext4.
    pub file_system: String,
}

/// An engine or a server.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    pub name: String,
    pub summary: String,
    /// What it promises, by name: what its commits survive, its options.
    pub facts: BTreeMap<String, String>,
}

/// All subjects with data of one size.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Set {
    pub keys: u64,
    pub value_bytes: u64,
    /// One a subject, in their order.
    pub runs: Vec<Run>,
}

/// One subject with data of one size.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub subject: String,
    /// It keeps nothing beyond its end and only shows what is possible: the others are not compared with it.
    #[serde(default)]
    pub reference: bool,
    pub outcome: Outcome,
    /// What was measured up to a failure counts as measured.
    pub measures: Vec<Measure>,
    pub samples: Vec<Sample>,
}

/// How a run has ended.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "lowercase", tag = "result", deny_unknown_fields)]
pub enum Outcome {
    /// All data were as they must be at the end: how much was compared, and its CRC-32C.
    Verified {
        rows: u64,
        bytes: u64,
        digest: u32,
    },
    Failed {
        error: String,
    },
}

/// A figure, or several of one workload.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// Names the workload in all reports.
    pub workload: String,
    pub group: Group,
    /// What was done, for a reader.
    pub title: String,
    /// What the figures stand for about a crash; `None` where nothing is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durability: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    pub figure: Figure,
}

/// Where a figure belongs in a report.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    Writes,
    Reads,
    Mixed,
    Upkeep,
    Space,
    Memory,
}

impl Group {
    pub const ALL: [Group; 6] =
        [Group::Writes, Group::Reads, Group::Mixed, Group::Upkeep, Group::Space, Group::Memory];

    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Group::Writes => "Writes",
            Group::Reads => "Reads",
            Group::Mixed => "Reads and writes together",
            Group::Upkeep => "Opening, snapshot and upkeep",
            Group::Space => "Space on disk",
            Group::Memory => "Memory",
        }
    }
}

/// What the page cache held of the files before the workload began.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    Warm,
    Cold,
}

impl Cache {
    pub fn name(self) -> &'static str {
        match self {
            Cache::Warm => "warm",
            Cache::Cold => "cold",
        }
    }
}

/// What was found.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "lowercase", tag = "kind", deny_unknown_fields)]
pub enum Figure {
    /// More is better.
    Rate {
        /// What is counted, in the plural: rows, reads, bytes.
        unit: String,
        per_second: f64,
        count: u64,
        elapsed_s: f64,
        /// Of one call, which may be of many units.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        latency_us: Option<Latency>,
        /// Processor time for one unit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cpu_us: Option<f64>,
        /// Bytes given to the disk for each byte of keys and values.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        write_amplification: Option<f64>,
        #[serde(default, skip_serializing_if = "is_zero")]
        errors: u64,
    },
    /// Less is better.
    Bytes { bytes: u64 },
    /// Less is better.
    Seconds { seconds: f64 },
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Figure {
    /// The one number that subjects are compared by.
    pub fn value(&self) -> f64 {
        match self {
            Figure::Rate { per_second, .. } => *per_second,
            Figure::Bytes { bytes } => *bytes as f64,
            Figure::Seconds { seconds } => *seconds,
        }
    }

    pub fn more_is_better(&self) -> bool {
        matches!(self, Figure::Rate { .. })
    }
}

/// Times of single calls in microseconds.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    #[serde(rename = "p99.9")]
    pub p999: f64,
    pub max: f64,
}

impl Latency {
    /// Of a histogram of nanoseconds; `None` if it is empty.
    pub fn of(histogram: &Histogram<u64>) -> Option<Latency> {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        (!histogram.is_empty()).then(|| Latency {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1e3,
        })
    }
}

/// A process at a moment.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Since the process began to work.
    pub at_s: f64,
    /// The workload that was running.
    pub phase: String,
    /// Resident set, memory of its own and of mapped files.
    pub rss_bytes: u64,
    /// Resident set without what is shared with other processes, as far as it is; 0 if not known.
    pub pss_bytes: u64,
    /// The part of the resident set that is no file's.
    pub anonymous_bytes: u64,
    /// Pages of its files in the page cache, mapped or not.
    pub cached_bytes: u64,
    /// What its files occupy.
    pub disk_bytes: u64,
}

impl Set {
    /// The workloads in the order in which they were first met, each with where it is first found.
    pub fn workloads(&self) -> Vec<&Measure> {
        let mut found: Vec<&Measure> = Vec::new();
        for measure in self.runs.iter().flat_map(|run| &run.measures) {
            if !found.iter().any(|seen| seen.workload == measure.workload) {
                found.push(measure);
            }
        }
        found.sort_by_key(|measure| measure.group);
        found
    }

    /// For each run its measure of a workload.
    pub fn of<'a>(
        &'a self,
        workload: &'a str,
    ) -> impl Iterator<Item = (&'a str, Option<&'a Measure>)> {
        self.runs.iter().map(move |run| {
            (&run.subject[..], run.measures.iter().find(|measure| measure.workload == workload))
        })
    }

    /// The best value of a workload, by which all are divided: of those that are no reference, if there are
    /// others.
    pub fn best(&self, workload: &str) -> Option<f64> {
        let best = |references: bool| {
            let runs = self.runs.iter().filter(|run| references || !run.reference);
            let measures = runs.flat_map(|run| &run.measures);
            let figures = measures.filter(|m| m.workload == workload).map(|m| &m.figure);
            figures.filter(|figure| figure.value() > 0.0).reduce(|best, figure| {
                let more = figure.value() > best.value();
                if more == figure.more_is_better() { figure } else { best }
            })
        };
        best(false).or_else(|| best(true)).map(Figure::value)
    }
}

/// `value` in proportion to the best of its workload; `None` if there is nothing to compare with.
pub fn ratio(value: f64, best: Option<f64>) -> Option<f64> {
    best.filter(|best| *best > 0.0).map(|best| value / best)
}

impl Report {
    /// The errors of all runs that failed, with where.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for set in &self.sets {
            for run in &set.runs {
                if let Outcome::Failed { error } = &run.outcome {
                    let Set { keys, value_bytes, .. } = set;
                    failures.push(format!(
                        "{} with {keys} keys of {value_bytes} B: {error}",
                        run.subject
                    ));
                }
            }
        }
        failures
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn measure(workload: &str, figure: Figure) -> Measure {
        Measure {
            workload: workload.into(),
            group: Group::Writes,
            title: format!("Title of {workload}"),
            durability: Some("durable".into()),
            cache: Some(Cache::Warm),
            figure,
        }
    }

    pub(crate) fn rate(per_second: f64) -> Figure {
        Figure::Rate {
            unit: "rows".into(),
            per_second,
            count: 10,
            elapsed_s: 0.5,
            latency_us: Some(Latency { p50: 1.5, p99: 20.0, p999: 300.0, max: 4000.0 }),
            cpu_us: Some(0.25),
            write_amplification: None,
            errors: 0,
        }
    }

    pub(crate) fn report() -> Report {
        let run = |subject: &str, measures, outcome| Run {
            subject: subject.into(),
            reference: false,
            outcome,
            measures,
            samples: (0..4)
                .map(|at| Sample {
                    at_s: f64::from(at),
                    phase: "load".into(),
                    rss_bytes: 10 << 20,
                    pss_bytes: 9 << 20,
                    anonymous_bytes: 8 << 20,
                    cached_bytes: 7 << 20,
                    disk_bytes: 6 << 20,
                })
                .collect(),
        };
        let subject = |name: &str| Subject {
            name: name.into(),
            summary: format!("{name} & <more>"),
            facts: [("buffered survives".into(), "kill -9".into())].into(),
        };
        Report {
            schema: SCHEMA,
            command: Command::Engines,
            version: "0.1.0".into(),
            optimised: true,
            started_unix_s: 1_800_000_000,
            elapsed_s: 12.0,
            machine: Machine {
                cores: 2,
                memory_bytes: 24 << 30,
                kernel: "Linux 6.1".into(),
                architecture: "x86_64".into(),
                file_system: "ext4".into(),
            },
            settings: [("seed".into(), "1".into())].into(),
            notes: vec!["A note.".into()],
            subjects: vec![subject("alpha"), subject("beta")],
            sets: vec![Set {
                keys: 1000,
                value_bytes: 256,
                runs: vec![
                    run(
                        "alpha",
                        vec![
                            measure("load", rate(100.0)),
                            measure("space", Figure::Bytes { bytes: 50 }),
                            measure("open", Figure::Seconds { seconds: 0.5 }),
                        ],
                        Outcome::Verified { rows: 5, bytes: 100, digest: 7 },
                    ),
                    run(
                        "beta",
                        vec![
                            measure("load", rate(25.0)),
                            measure("space", Figure::Bytes { bytes: 100 }),
                        ],
                        Outcome::Failed { error: "row 5 is <gone>".into() },
                    ),
                ],
            }],
        }
    }

    #[test]
    fn the_best_is_the_most_of_a_rate_and_the_least_of_a_cost() {
        let report = report();
        let set = &report.sets[0];
        assert_eq!(set.best("load"), Some(100.0));
        assert_eq!(set.best("space"), Some(50.0));
        assert_eq!(set.best("nothing"), None);
        assert_eq!(ratio(25.0, set.best("load")), Some(0.25));
        let workloads: Vec<&str> = set.workloads().iter().map(|m| &m.workload[..]).collect();
        assert_eq!(workloads, ["load", "space", "open"]);
        let mut compared = report.sets[0].clone();
        compared.runs[0].reference = true;
        assert_eq!((compared.best("load"), compared.best("space")), (Some(25.0), Some(100.0)));
        // There is no other.
        assert_eq!(compared.best("open"), Some(0.5));
        let missing: Vec<_> = set.of("open").map(|(name, m)| (name, m.is_some())).collect();
        assert_eq!(missing, [("alpha", true), ("beta", false)]);
    }

    #[test]
    fn failures_say_where() {
        assert_eq!(report().failures(), ["beta with 1000 keys of 256 B: row 5 is <gone>"]);
    }
}
