//! `quorate bench engines` and `quorate bench server` as a user calls them, at sizes that say nothing about
//! speed: that every engine gets through, that the reports hold together, that nothing is left behind.

mod ports;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use quorate::engines;
use serde_json::Value;

/// How long anything here may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn bench(args: &str, dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.arg("bench").args(args.split_whitespace()).arg("--dir").arg(dir);
    command.stdin(Stdio::null());
    command
}

fn run(args: &str, dir: &Path) -> Output {
    bench(args, dir).output().expect("the program runs")
}

fn report(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_none()
}

fn names() -> Vec<&'static str> {
    engines::ALL.iter().map(|engine| engine.name()).collect()
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// What every report has, whatever it is of.
fn check_report(report: &Value, command: &str, subjects: &[&str]) {
    let fields = [
        "command",
        "elapsed_s",
        "machine",
        "notes",
        "optimised",
        "schema",
        "sets",
        "settings",
        "started_unix_s",
        "subjects",
        "version",
    ];
    assert_eq!(keys(report), fields.into());
    assert_eq!((&report["schema"], &report["command"]), (&1.into(), &command.into()));
    let fields = ["architecture", "cores", "file_system", "kernel", "memory_bytes"];
    assert_eq!(keys(&report["machine"]), fields.into());
    let named = |list: &Value, field: &str| -> Vec<String> {
        let names = list.as_array().unwrap().iter();
        names.map(|one| one[field].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(named(&report["subjects"], "name"), subjects);
    for set in report["sets"].as_array().unwrap() {
        assert_eq!(named(&set["runs"], "subject"), subjects);
        for run in set["runs"].as_array().unwrap() {
            for measure in run["measures"].as_array().unwrap() {
                check_figure(measure);
            }
            for sample in run["samples"].as_array().unwrap() {
                assert!(sample["rss_bytes"].as_u64().unwrap() > 0, "{sample}");
            }
        }
    }
}

fn check_figure(measure: &Value) {
    let figure = &measure["figure"];
    match figure["kind"].as_str().unwrap() {
        "rate" => {
            assert!(figure["count"].as_u64().unwrap() > 0, "{measure:#}");
            assert!(figure["per_second"].as_f64().unwrap() > 0.0, "{measure:#}");
            if let Some(latency) = figure.get("latency_us") {
                let of = ["p50", "p99", "p99.9", "max"].map(|name| latency[name].as_f64().unwrap());
                assert!(of.is_sorted() && of[0] > 0.0, "{measure:#}");
            }
        }
        "bytes" => assert!(figure["bytes"].as_u64().is_some(), "{measure:#}"),
        "seconds" => assert!(figure["seconds"].as_f64().unwrap() > 0.0, "{measure:#}"),
        other => panic!("{other}: {measure:#}"),
    }
    // Whatever is written says for what it stands.
    let writes = ["writes"].contains(&measure["group"].as_str().unwrap());
    assert!(!writes || measure["durability"].is_string(), "{measure:#}");
}

fn workloads(run: &Value) -> BTreeSet<&str> {
    let measures = run["measures"].as_array().unwrap().iter();
    measures.map(|measure| measure["workload"].as_str().unwrap()).collect()
}

/// That every element is closed in order, as XML wants it, and that nothing is fetched from anywhere.
fn check_page(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("a page");
    while let Some(at) = rest.find('<') {
        let text = &rest[..at];
        let style = open.last() == Some(&"style");
        assert!(style || !text.contains('>'), "{text}");
        for part in text.split('&').skip(1) {
            let name = part.split(';').next().unwrap();
            assert!(style || ["amp", "lt", "gt", "quot"].contains(&name), "&{part}");
        }
        let end = at + rest[at..].find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        let quotes = tag.matches('"').count();
        assert_eq!(quotes % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed in the wrong order");
            continue;
        }
        let name = tag.split([' ', '/']).next().unwrap();
        assert!(
            !["script", "link", "img", "iframe", "object", "image", "use"].contains(&name),
            "{tag}"
        );
        for attribute in ["src=", "href=", "data=", "action=", "onload="] {
            assert!(!tag.contains(&format!(" {attribute}")), "{tag}");
        }
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    assert!(!page.contains("url(") && !page.contains("@import") && !page.contains("NaN"));
    // The names of two namespaces are the only addresses.
    let addresses: BTreeSet<&str> =
        page.split("http").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(addresses, ["://www.w3.org/1999/xhtml", "://www.w3.org/2000/svg"].into());
    // A chart and a table each.
    for figure in page.split("<figure>").skip(1) {
        let figure = figure.split("</figure>").next().unwrap();
        assert!(figure.contains("<svg ") && figure.contains("<table "), "{figure}");
    }
}

#[test]
fn every_engine_gets_through_and_the_reports_hold_together() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (json, html) = (out.path().join("a.json"), out.path().join("a.html"));
    let args = format!(
        "engines --quick --keys 300,500 --value-size 32 --duration 50ms --seed 3 --json {} --html {}",
        json.display(),
        html.display()
    );
    let ran = run(&args, dir.path());
    let (told, errors) =
        (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{errors}\n{told}");
    assert!(is_empty(dir.path()), "files were left");
    // No bar where there is no terminal: one line, without any control.
    assert!(errors.starts_with("needs up to ") && errors.lines().count() == 1, "{errors:?}");
    assert!(!errors.contains(['\r', '\u{1b}']) && !told.contains(['\r', '\u{1b}']));

    let report = report(&json);
    check_report(&report, "engines", &names());
    for (set, keys) in report["sets"].as_array().unwrap().iter().zip([300, 500]) {
        assert_eq!((&set["keys"], &set["value_bytes"]), (&keys.into(), &32.into()));
        for (run, engine) in set["runs"].as_array().unwrap().iter().zip(engines::ALL) {
            assert_eq!(run["outcome"]["result"], "verified", "{run:#}");
            assert!(run["outcome"]["rows"].as_u64().unwrap() >= keys / 2);
            let found = workloads(run);
            for workload in [
                "load",
                "commit-1-durable",
                "commit-100-durable",
                "commit-10000-durable",
                "commit-1-buffered",
                "commit-100-buffered",
                "commit-10000-buffered",
                "churn",
                "compaction",
                "get-warm",
                "scan-100-warm",
                "scan-all-warm",
                "mixed-get",
                "mixed-get-writes",
                "mixed-scan",
                "mixed-scan-writes",
                "export",
                "delete-half",
                "space-loaded",
                "space-churned",
                "space-halved",
                "memory-rss",
            ] {
                assert!(found.contains(workload), "{}: {workload}", engine.name());
            }
            let cold = ["open-warm", "open-cold", "get-cold", "scan-100-cold", "scan-all-cold"];
            let persistent = engine.about.durable_survives >= engine_api::Survives::OrderlyEnd;
            for workload in cold {
                assert_eq!(found.contains(workload), persistent, "{}: {workload}", engine.name());
            }
        }
    }
    for name in names() {
        assert!(told.contains(name), "{told}");
    }
    check_page(&fs::read_to_string(&html).unwrap());

    // What was written is shown again, alone or with others.
    let both = out.path().join("both.html");
    let again = Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(["bench", "report"])
        .args([&json, &json])
        .arg("--html")
        .arg(&both)
        .output()
        .unwrap();
    assert!(again.status.success(), "{again:?}");
    assert_eq!(String::from_utf8_lossy(&again.stdout), told.repeat(2));
    check_page(&fs::read_to_string(&both).unwrap());
}

#[test]
fn a_report_alone_goes_to_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let ran = run("engines --engine memory --quick --keys 100 --value-size 8 --json -", dir.path());
    assert!(ran.status.success(), "{ran:?}");
    let report: Value = serde_json::from_slice(&ran.stdout).expect("nothing but the report");
    check_report(&report, "engines", &["memory"]);
    assert_eq!(report["settings"]["seed"], "0");
    let outcome = &report["sets"][0]["runs"][0]["outcome"];
    assert_eq!((&outcome["result"], &outcome["rows"]), (&"verified".into(), &50.into()));
}

/// A running benchmark; killed if a test fails.
struct Running(Child);

impl Running {
    fn start(args: &str, dir: &Path) -> Running {
        let child = bench(args, dir).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Running(child.expect("the program runs"))
    }

    /// The processes that it has started and that run.
    fn children(&self) -> Vec<i32> {
        let id = self.0.id();
        let mut children = Vec::new();
        for thread in fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            children.extend(text.split_whitespace().map(|id| id.parse::<i32>().unwrap()));
        }
        children
    }

    /// Its first child that has begun to write files.
    fn child_at_work(&mut self, dir: &Path) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(self.0.try_wait().unwrap().is_none(), "it has ended");
            assert!(Instant::now() < deadline, "nothing begins");
            if let [child, ..] = self.children()[..]
                && files(dir) > 0
            {
                return child;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(mut self) -> Output {
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut child = std::mem::replace(&mut self.0, Command::new("true").spawn().unwrap());
        let mut output =
            Output { status: child.wait().unwrap(), stdout: Vec::new(), stderr: Vec::new() };
        std::io::Read::read_to_end(child.stdout.as_mut().unwrap(), &mut output.stdout).unwrap();
        std::io::Read::read_to_end(child.stderr.as_mut().unwrap(), &mut output.stderr).unwrap();
        output
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn files(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 }).sum()
}

fn signal(id: i32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), signal).unwrap();
}

#[test]
fn an_engine_that_crashes_does_not_end_the_others() {
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let json = out.path().join("a.json");
    let args =
        format!("engines --quick --engine redb,memory --keys 5000 --json {}", json.display());
    let mut running = Running::start(&args, dir.path());
    let child = running.child_at_work(dir.path());
    signal(child, nix::sys::signal::Signal::SIGKILL);
    let ended = running.end();
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{errors}");
    assert!(errors.ends_with("error: 1 of the runs failed\n"), "{errors}");
    assert!(is_empty(dir.path()), "files were left");
    let report = report(&json);
    check_report(&report, "engines", &["redb", "memory"]);
    let runs = &report["sets"][0]["runs"];
    let error = runs[0]["outcome"]["error"].as_str().unwrap();
    assert!(error.starts_with("the engine's process ended early, signal: 9"), "{error}");
    assert_eq!(runs[1]["outcome"]["result"], "verified");
}

#[test]
fn an_interruption_ends_cleanly_and_leaves_no_file() {
    for (args, at) in [
        ("engines --engine redb --keys 1000000", nix::sys::signal::Signal::SIGINT),
        ("server --engine redb --duration 20s --rounds 20", nix::sys::signal::Signal::SIGTERM),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut running = Running::start(args, dir.path());
        let child = running.child_at_work(dir.path());
        signal(running.0.id().cast_signed(), at);
        let ended = running.end();
        let errors = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(130), "{args}: {errors}");
        assert!(errors.ends_with("error: interrupted\n"), "{args}: {errors}");
        assert!(ended.stdout.is_empty() && is_empty(dir.path()), "{args}: files were left");
        assert!(!Path::new(&format!("/proc/{child}")).exists(), "{args}: a child is left");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    for (args, code, error) in [
        ("engines --engine nothing", 2, "--engine nothing: unknown engine; built in are redb"),
        ("engines --keys 500,500", 2, "--keys: 500 is given twice"),
        ("engines --duration 0s", 2, "--duration: must not be zero"),
        ("engines --option redb.x=1", 2, "unknown option \"x\" of engine redb"),
        // A thousand million keys of a mebibyte: 4 PiB and more.
        ("engines --keys 1000000000 --value-size 1048576", 1, "the run may need"),
        ("engines --keys 99", 2, "99 is not in 100.."),
        ("server --engine none", 2, "--engine none: needs a --versus"),
        ("server --versus https://a:1", 2, "TLS is not supported"),
    ] {
        let ran = run(args, dir.path());
        let errors = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(code), "{args}: {errors}");
        assert!(errors.contains(error), "{args}: {errors}");
        assert!(ran.stdout.is_empty() && is_empty(dir.path()), "{args}");
    }
    let absent = run("engines --engine memory", &dir.path().join("absent"));
    let errors = String::from_utf8_lossy(&absent.stderr);
    assert!(absent.status.code() == Some(1) && errors.contains("cannot use --dir"), "{errors}");
    let no_report = run("report /dev/null", dir.path());
    assert_eq!(no_report.status.code(), Some(2), "report takes no --dir");
}

/// A real etcd, killed when dropped.
struct Etcd {
    child: Child,
    endpoint: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    fn start() -> Etcd {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = format!("127.0.0.1:{}", ports::free_port());
        let client = format!("http://{endpoint}");
        let peer = format!("http://127.0.0.1:{}", ports::free_port());
        let child = Command::new("etcd")
            .args(["--name", "m", "--data-dir", dir.path().join("m").to_str().unwrap()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed");
        let etcd = Etcd { child, endpoint, _dir: dir };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let health = Command::new("etcdctl")
                .env("ETCDCTL_API", "3")
                .args(["--endpoints", &etcd.endpoint, "endpoint", "health"])
                .output()
                .expect("etcdctl is installed");
            if health.status.success() {
                return etcd;
            }
            assert!(Instant::now() < deadline, "etcd does not start");
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn servers_with_each_engine_and_an_etcd_share_one_report() {
    let etcd = Etcd::start();
    let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (json, html) = (out.path().join("a.json"), out.path().join("a.html"));
    let args = format!(
        "server --quick --keys 50 --value-size 16 --clients 20 --versus etcd={} --versus-pid {} \
         --json {} --html {}",
        etcd.endpoint,
        etcd.child.id(),
        json.display(),
        html.display()
    );
    let ran = run(&args, dir.path());
    let (told, errors) =
        (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{errors}\n{told}");
    assert!(is_empty(dir.path()), "files were left");
    assert!(errors.starts_with("needs up to ") && errors.lines().count() == 1, "{errors:?}");
    let report = report(&json);
    let mut subjects = names();
    subjects.push("etcd");
    check_report(&report, "server", &subjects);
    let runs = report["sets"][0]["runs"].as_array().unwrap();
    for (at, run) in runs.iter().enumerate() {
        assert_eq!(run["outcome"]["result"], "verified", "{run:#}");
        assert_eq!(run["outcome"]["rows"], 50);
        let found = workloads(run);
        for workload in [
            "put-1",
            "put",
            "range-linearizable",
            "range-serializable",
            "mixed-reads",
            "mixed-puts",
            "watch-puts",
            "watch-events",
            "memory-rss",
        ] {
            assert!(found.contains(workload), "{run:#}");
        }
        let persistent = engines::ALL.get(at).is_some_and(|engine| {
            engine.about.durable_survives >= engine_api::Survives::OrderlyEnd
        });
        assert_eq!(found.contains("restart"), persistent, "{run:#}");
        assert_eq!(
            report["subjects"][at]["facts"]["version that it tells"].as_str().map(|v| &v[..2]),
            Some("3.")
        );
    }
    assert!(
        !fs::read_to_string(&json).unwrap().contains(&etcd.endpoint),
        "an address in the report"
    );
    check_page(&fs::read_to_string(&html).unwrap());
}
