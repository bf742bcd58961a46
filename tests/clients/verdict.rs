//! What a suite found with each program, and what follows from that.

use std::collections::BTreeMap;
use std::fmt::Write;

/// How a test ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    Passed,
    Skipped(String),
    /// Also when what surrounds the test failed.
    Failed(String),
}

impl Outcome {
    fn word(&self) -> &'static str {
        match self {
            Outcome::Passed => "passed",
            Outcome::Skipped(_) => "skipped",
            Outcome::Failed(_) => "failed",
        }
    }

    fn reason(&self) -> &str {
        match self {
            Outcome::Passed => "",
            Outcome::Skipped(reason) | Outcome::Failed(reason) => reason,
        }
    }

    /// The worse of two: a suite may tell the end of a test and of its clean-up apart.
    pub fn and(self, other: Outcome) -> Outcome {
        let rank = |outcome: &Outcome| match outcome {
            Outcome::Passed => 0,
            Outcome::Skipped(_) => 1,
            Outcome::Failed(_) => 2,
        };
        if rank(&other) > rank(&self) { other } else { self }
    }
}

/// The tests of a suite by name.
pub type Results = BTreeMap<String, Outcome>;

/// Adds what is told of a test to what was told of it before.
pub fn add(results: &mut Results, name: String, outcome: Outcome) {
    let before = results.remove(&name).unwrap_or(Outcome::Passed);
    results.insert(name, before.and(outcome));
}

/// Names of tests, each with the reason why it is named.
type Named = &'static [(&'static str, &'static str)];

/// What a suite is to find.
pub struct Verdict {
    /// So many tests pass with etcd at least: else the suite did not really run.
    pub passes_min: usize,
    /// These do not pass with etcd either: the fault is the suite's.
    pub unfit: Named,
    /// These pass with etcd and not yet here.
    pub later: Named,
}

impl Verdict {
    /// All that is not as it should be, a sentence each.
    pub fn problems(&self, etcd: &Results, quorate: &Results) -> Vec<String> {
        let mut problems = Vec::new();
        let passes = etcd.values().filter(|&outcome| *outcome == Outcome::Passed).count();
        if passes < self.passes_min {
            let min = self.passes_min;
            problems.push(format!("only {passes} tests pass with etcd, {min} should at least"));
        }
        for (name, outcome) in etcd {
            if *outcome != Outcome::Passed {
                if !named(self.unfit, name) {
                    problems.push(format!(
                        "{name} {} with etcd: {}",
                        outcome.word(),
                        outcome.reason()
                    ));
                }
                continue;
            }
            if named(self.later, name) {
                continue;
            }
            match quorate.get(name) {
                Some(Outcome::Passed) => {}
                Some(other) => problems.push(format!(
                    "{name} passes with etcd and {} with quorate: {}",
                    other.word(),
                    other.reason()
                )),
                None => {
                    problems.push(format!("{name} passes with etcd and did not run with quorate"))
                }
            }
        }
        for name in quorate.keys().filter(|&name| !etcd.contains_key(name)) {
            problems.push(format!("{name} ran with quorate and did not run with etcd"));
        }
        for (name, reason) in self.unfit {
            match etcd.get(*name) {
                Some(Outcome::Passed) => {
                    problems
                        .push(format!("{name} is listed as unfit ({reason}) and passes with etcd"));
                }
                Some(_) => {}
                None => {
                    problems.push(format!("{name} is listed as unfit ({reason}) and did not run"))
                }
            }
        }
        for (name, reason) in self.later {
            match (etcd.get(*name), quorate.get(*name)) {
                (Some(Outcome::Passed), Some(Outcome::Passed)) => problems.push(format!(
                    "{name} is listed as failing ({reason}) and passes: strike it out"
                )),
                (_, Some(_)) => {}
                (_, None) => {
                    problems
                        .push(format!("{name} is listed as failing ({reason}) and did not run"));
                }
            }
        }
        problems
    }
}

fn named(list: Named, name: &str) -> bool {
    list.iter().any(|(listed, _)| *listed == name)
}

/// Both results side by side, a test a line.
pub fn table(etcd: &Results, quorate: &Results) -> String {
    let mut table = String::from("etcd     quorate  test\n");
    let mut names: Vec<&String> = etcd.keys().chain(quorate.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let word = |results: &Results| results.get(name).map_or("-", Outcome::word);
        writeln!(table, "{:8} {:8} {name}", word(etcd), word(quorate)).unwrap();
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: Verdict =
        Verdict { passes_min: 2, unfit: &[("unfit", "old")], later: &[("auth", "later")] };

    fn results(tests: &[(&str, bool)]) -> Results {
        let outcome = |passed| {
            if passed { Outcome::Passed } else { Outcome::Failed("why".to_string()) }
        };
        tests.iter().map(|&(name, passed)| (name.to_string(), outcome(passed))).collect()
    }

    fn etcd() -> Results {
        results(&[("get", true), ("auth", true), ("unfit", false)])
    }

    #[test]
    fn the_expected_is_no_problem() {
        let quorate = results(&[("get", true), ("auth", false), ("unfit", false)]);
        assert_eq!(EXPECTED.problems(&etcd(), &quorate), [""; 0]);
        assert!(table(&etcd(), &quorate).contains("passed   failed   auth\n"));
    }

    #[test]
    fn every_other_difference_is_one() {
        let one = |etcd: &Results, quorate: &Results, words: &str| {
            let problems = EXPECTED.problems(etcd, quorate);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(words), "{problems:?}");
        };
        let whole = results(&[("get", true), ("auth", false), ("unfit", false)]);

        let fails = results(&[("get", false), ("auth", false), ("unfit", false)]);
        one(&etcd(), &fails, "get passes with etcd and failed with quorate: why");
        let misses = results(&[("auth", false), ("unfit", false)]);
        one(&etcd(), &misses, "did not run with quorate");
        let better = results(&[("get", true), ("auth", true), ("unfit", false)]);
        one(&etcd(), &better, "strike it out");
        let no_auth = results(&[("get", true), ("unfit", false)]);
        one(&etcd(), &no_auth, "auth is listed as failing (later) and did not run");
        let more = results(&[("get", true), ("auth", false), ("unfit", false), ("new", true)]);
        one(&etcd(), &more, "new ran with quorate and did not run with etcd");

        let fit = results(&[("get", true), ("auth", true), ("unfit", true)]);
        let both = results(&[("get", true), ("auth", false), ("unfit", true)]);
        one(&fit, &both, "unfit is listed as unfit (old) and passes with etcd");
        let mut skips = results(&[("get", true), ("auth", true), ("put", true), ("unfit", false)]);
        skips.insert("put".to_string(), Outcome::Skipped("no cluster".to_string()));
        let mut both = whole.clone();
        both.insert("put".to_string(), Outcome::Skipped("no cluster".to_string()));
        one(&skips, &both, "put skipped with etcd: no cluster");
        let few = results(&[("auth", true), ("unfit", false)]);
        let both = results(&[("auth", false), ("unfit", false)]);
        one(&few, &both, "only 1 tests pass with etcd");
    }

    #[test]
    fn a_test_told_of_twice_ends_as_the_worse() {
        let mut results = Results::new();
        add(&mut results, "a".to_string(), Outcome::Passed);
        add(&mut results, "a".to_string(), Outcome::Failed("clean-up".to_string()));
        add(&mut results, "a".to_string(), Outcome::Skipped("late".to_string()));
        assert_eq!(results["a"], Outcome::Failed("clean-up".to_string()));
    }
}
