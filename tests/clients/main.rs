//! Client libraries in other languages, with tests that their authors wrote: what such a test finds well
//! with etcd it finds well here.
//!
//! Each suite runs twice at the same time, against three members of the installed etcd and against three
//! of the binary under test. etcd's result is the measure, so that a test which suits no server of today
//! proves nothing against ours; such tests are listed by name, as are those that are known to fail here.
//! Each list must be true: a test that fails without being in one, or is in one and passes, is a failure.
//!
//! The libraries are installed from their registries once, below the target directory. Where that cannot
//! be, the tests fail and say what is missing; `QUORATE_SKIP_CLIENTS=1` leaves them out.

mod cluster;
mod environment;
mod junit;
mod node;
#[path = "../ports/mod.rs"]
mod ports;
mod python;
#[path = "../cluster/rig/mod.rs"]
mod rig;
mod verdict;

use std::thread;

use cluster::Cluster;
use rig::process::Program;
use verdict::{Results, Verdict};

/// Whether to leave the tests out.
fn skipped() -> bool {
    let skip = std::env::var("QUORATE_SKIP_CLIENTS").is_ok_and(|value| value == "1");
    if skip {
        eprintln!("QUORATE_SKIP_CLIENTS=1: the suites of client libraries do not run");
    }
    skip
}

/// Runs a suite against both programs, and fails if they differ where they should not.
fn compare(expected: &Verdict, suite: impl Fn(&Cluster) -> Results + Sync) {
    let against = |program| suite(&Cluster::start(program));
    let (etcd, quorate) = thread::scope(|scope| {
        let etcd = scope.spawn(|| against(Program::Etcd));
        let quorate = against(Program::Quorate);
        (etcd.join().expect("the suite against etcd"), quorate)
    });
    print!("{}", verdict::table(&etcd, &quorate));
    let problems = expected.problems(&etcd, &quorate);
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn etcd3_of_python_finds_what_it_finds_with_etcd() {
    if skipped() {
        return;
    }
    let suite = python::Suite {
        library: "etcd3",
        requirements: include_str!("requirements-etcd3.txt"),
        arguments: &["tests/test_etcd3.py"],
        own: &[("test_auth.py", include_str!("auth_of_etcd3.py"))],
    };
    let expected = Verdict {
        passes_min: 83,
        unfit: &[(
            "tests.test_etcd3.TestClient::test_user_pwd_auth",
            "it patches a module `etcdrpc`, which the library does not have under that name",
        )],
        later: &[],
    };
    let suite = suite.prepare();
    compare(&expected, |cluster| suite.run(cluster));
}

#[test]
fn aetcd_of_python_finds_what_it_finds_with_etcd() {
    if skipped() {
        return;
    }
    let suite = python::Suite {
        library: "aetcd",
        requirements: include_str!("requirements-aetcd.txt"),
        arguments: &["tests/integration", "--with-cluster"],
        own: &[],
    };
    let expected = Verdict { passes_min: 60, unfit: &[], later: &[] };
    let suite = suite.prepare();
    compare(&expected, |cluster| suite.run(cluster));
}

#[test]
fn etcd3gw_of_python_finds_what_it_finds_with_etcd() {
    if skipped() {
        return;
    }
    let suite = python::Suite {
        library: "etcd3gw",
        requirements: include_str!("requirements-etcd3gw.txt"),
        arguments: &["etcd3gw/tests/test_etcd3gw.py"],
        own: &[],
    };
    let expected = Verdict { passes_min: 22, unfit: &[], later: &[] };
    let suite = suite.prepare();
    compare(&expected, |cluster| suite.run(cluster));
}

#[test]
fn etcd3_of_node_finds_what_it_finds_with_etcd() {
    if skipped() {
        return;
    }
    let expected = Verdict { passes_min: 23, unfit: &[], later: &[] };
    let suite = node::Suite::prepare();
    compare(&expected, |cluster| suite.run(cluster));
}
