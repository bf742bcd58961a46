//! What the program says: on the command line, and in the lines of its log that tools wait for.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::process::{BINARY, Setup};

fn run(args: &[&str]) -> Output {
    let temp = tempfile::tempdir().unwrap();
    let output = Command::new(BINARY)
        .env_clear()
        .current_dir(temp.path())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    // Whatever was asked, nothing was begun.
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "{args:?}");
    output
}

fn out(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn version_and_help_are_told() {
    let (code, stdout, stderr) = out(&run(&["--version"]));
    assert_eq!((code, stderr.as_str()), (0, ""));
    let lines: Vec<&str> = stdout.lines().collect();
    let ours = format!("quorate Version: {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(lines[..2], [ours.as_str(), "etcd API Version: 3.7.1"], "{stdout}");
    for flag in ["--help", "-h"] {
        let (code, stdout, stderr) = out(&run(&[flag]));
        assert_eq!(code, 0);
        assert!(stderr.contains("Usage:"), "{stderr}");
        for name in ["--name", "--listen-client-urls", "--snapshot-count", "--engine"] {
            assert!(stdout.contains(name), "{name}");
        }
    }
}

#[test]
fn what_is_wrong_on_the_command_line_is_told_by_text_and_exit_code() {
    for (args, code, said) in [
        (&["--no-such-flag"][..], 2, "flag provided but not defined: -no-such-flag"),
        (&["--snapshot-count=many"], 2, "invalid value \"many\" for flag -snapshot-count"),
        (&["stray"], 1, "\"stray\" is not a valid flag"),
        (&["--listen-client-urls=nonsense"], 2, "listen-client-urls"),
        (&["--election-timeout=10"], 1, "election-timeout"),
        (&["--log-level=loud"], 2, "loud"),
        (&["--engine=none"], 1, "unknown engine \"none\""),
        (&["--enable-pprof"], 1, "not supported yet: --enable-pprof (profiling)"),
    ] {
        let (found, stdout, stderr) = out(&run(args));
        assert_eq!(found, code, "{args:?}: {stdout}{stderr}");
        // The texts of a log's lines are in quotes.
        let stderr = stderr.replace("\\\"", "\"");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
    let (_, _, stderr) = out(&run(&["--election-timeout=10"]));
    let line = stderr.lines().rfind(|line| line.starts_with('{')).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((&line["level"], &line["msg"]), (&"warn".into(), &"failed to verify flags".into()));
    let (code, _, stderr) = out(&run(&["--config-file=/does/not/exist.yml"]));
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("/does/not/exist.yml"), "{stderr}");
}

#[test]
fn a_start_says_what_tools_wait_for() {
    let metrics = crate::ports::free_address();
    let argument = format!("--listen-metrics-urls=http://{metrics}");
    let setup = Setup::new(&[&argument]);
    let mut daemon = setup.start();
    let insecure = "serving client traffic insecurely; this is strongly discouraged!";
    daemon.wait_logged(insecure);
    let log = daemon.log();
    for line in &log {
        let level = line["level"].as_str().unwrap();
        assert!(["info", "warn"].contains(&level), "{line}");
        let caller = line["caller"].as_str().unwrap();
        let (file, number) = caller.rsplit_once(':').unwrap();
        assert!(file.matches('/').count() == 1 && number.parse::<u32>().is_ok(), "{caller}");
        let ts = line["ts"].as_str().unwrap();
        assert!(ts.len() >= 27 && ts.as_bytes()[10] == b'T' && ts.as_bytes()[19] == b'.', "{ts}");
        assert!(line["msg"].is_string(), "{line}");
    }
    let place = |message: &str| {
        let place = log.iter().position(|line| line["msg"] == message);
        place.unwrap_or_else(|| panic!("{message:?} is not in {log:#?}"))
    };
    let order = [
        "Running: ",
        "starting an etcd server",
        "starting etcd server",
        "now serving peer/client/metrics",
        "published local member to cluster through raft",
        "ready to serve client requests",
        insecure,
    ];
    let places: Vec<usize> = order.iter().map(|message| place(message)).collect();
    assert!(places.is_sorted(), "{order:?} are at {places:?}");

    let line = |message: &str| &log[place(message)];
    let args = line("Running: ")["args"].as_array().unwrap();
    assert!(args[0] == BINARY && args.contains(&argument.clone().into()), "{args:?}");
    let settings = line("starting an etcd server");
    assert_eq!(settings["etcd-version"], "3.7.1");
    assert_eq!(settings["name"], "m");
    assert_eq!(settings["data-dir"], setup.data.display().to_string());
    assert_eq!(settings["heartbeat-interval"], "100ms");
    assert_eq!(settings["election-timeout"], "1000ms");
    assert_eq!(settings["snapshot-count"], 10_000);
    assert_eq!(settings["quota-backend-bytes"], 2_147_483_648_u64);
    let (client, peer) = (format!("http://{}", setup.client), format!("http://{}", setup.peer));
    let serving = line("now serving peer/client/metrics");
    assert_eq!(serving["listen-peer-urls"], serde_json::json!([peer]));
    assert_eq!(serving["initial-advertise-peer-urls"], serde_json::json!([peer]));
    assert_eq!(serving["listen-client-urls"], serde_json::json!([client]));
    assert_eq!(serving["advertise-client-urls"], serde_json::json!([client]));
    assert_eq!(serving["listen-metrics-urls"], serde_json::json!([format!("http://{metrics}")]));
    let published = line("published local member to cluster through raft");
    assert_eq!(published["publish-timeout"], "7s");
    assert_eq!(published["local-member-id"], serving["local-member-id"]);
    assert!(published["cluster-id"].is_string(), "{published}");
    let served = line(insecure);
    assert_eq!(
        (&served["traffic"], &served["address"]),
        (&"grpc+http".into(), &setup.client.to_string().into())
    );
    daemon.stop();
}

#[test]
fn lines_can_be_for_people_and_less() {
    let setup = Setup::new(&["--log-format=console"]);
    let daemon = setup.spawn();
    crate::process::wait_for("readiness", || {
        let text = daemon.log_text();
        if text.contains("ready to serve client requests") { Ok(()) } else { Err(text) }
    });
    assert!(!daemon.log_text().contains("{\"level\""), "{}", daemon.log_text());
    daemon.stop();

    let mut setup = Setup::new(&["--log-level=error"]);
    let mut daemon = setup.spawn();
    crate::process::wait_for("health", || {
        match crate::process::try_http(setup.client, "GET", "/health", &[]) {
            Ok(answer) if answer.status == 200 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.wait();
    assert_eq!(daemon.log_text(), "");
    assert_eq!(daemon.stdout(), "");

    let file = setup.temp.path().join("log");
    setup.args = vec![format!("--log-outputs={}", file.display())];
    let daemon = setup.spawn();
    crate::process::wait_for("readiness", || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        if text.contains("ready to serve client requests") { Ok(()) } else { Err(text) }
    });
    assert_eq!(daemon.log_text(), "");
    daemon.stop();
}
