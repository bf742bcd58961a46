//! Flags, variables and files through the real loader and, for what only a process shows, the binary.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use quorate::config::flags::{FILE_ONLY, FLAGS, Flag, Group};
use quorate::config::{
    self, Asked, AuthToken, Config, ConfigError, Gate, LogFormat, LogLevel, LogOutput,
    MetricsDetail, Notice, Origins, Retention, Rotation, Surroundings, Telling, url,
};

type Answer = (Result<Asked, ConfigError>, Vec<Notice>);

fn load(args: &[&str], env: &[(&str, &str)]) -> Answer {
    let args: Vec<String> = args.iter().map(ToString::to_string).collect();
    let env: BTreeMap<String, String> =
        env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let surroundings = Surroundings { env, default_host: &|| Ok("192.0.2.7".to_owned()) };
    let mut notices = Vec::new();
    let asked = config::load(&args, &surroundings, &mut notices);
    (asked, notices)
}

#[track_caller]
fn served((asked, notices): Answer) -> (Config, Vec<Notice>) {
    match asked {
        Ok(Asked::Serve(config)) => (*config, notices),
        other => panic!("not a member to be served: {other:?}"),
    }
}

#[track_caller]
fn flags(args: &[&str]) -> Config {
    served(load(args, &[])).0
}

#[track_caller]
fn refused(args: &[&str]) -> ConfigError {
    load(args, &[]).0.expect_err("the flags must be refused")
}

/// The initial cluster as one text.
fn cluster_text(config: &Config) -> String {
    config::validate::initial_text(&config.cluster.initial)
}

/// A file in a directory that goes when it is dropped.
struct Written {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Written {
    fn new(text: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory for the test");
        let path = directory.path().join("q.yml");
        fs::write(&path, text).expect("a file for the test");
        Written { path, _directory: directory }
    }

    fn load(&self) -> Answer {
        load(&["--config-file", self.path.to_str().expect("it is UTF-8")], &[])
    }
}

fn file(text: &str) -> Answer {
    Written::new(text).load()
}

#[track_caller]
fn file_refused(text: &str) -> String {
    let written = Written::new(text);
    let path = format!("configuration file {}: ", written.path.display());
    let error = written.load().0.expect_err("the file must be refused").to_string();
    error.strip_prefix(&path).unwrap_or(&error).to_owned()
}

#[test]
fn without_flags_everything_is_at_its_default() {
    let (config, notices) = served(load(&[], &[]));
    assert_eq!(config, Config::default());
    assert!(notices.iter().any(|n| matches!(n, Notice::DefaultDataDir { .. })));
    assert!(notices.iter().any(|n| matches!(n, Notice::DefaultName { .. })));
    assert!(notices.iter().any(|n| matches!(n, Notice::OnePort)));
    assert_eq!(notices.len(), 3);
}

#[test]
fn flags_have_the_syntax_of_go() {
    let config = flags(&["-name", "a", "--data-dir=/d", "-pre-vote=false", "--unsafe-no-fsync"]);
    assert_eq!(config.member.name, "a");
    assert_eq!(config.member.data_dir, Path::new("/d"));
    assert!(!config.raft.pre_vote);
    assert!(config.storage.unsafe_no_fsync);
    assert_eq!(flags(&["--initial-cluster-token=a=b"]).cluster.token, "a=b");
    assert_eq!(flags(&["--name", "--x"]).member.name, "--x");
    assert_eq!(flags(&["--name=a", "--name=b"]).member.name, "b");
    assert_eq!(flags(&["--max-wals", "0x10", "--"]).raft.max_wals, 16);
    // Long-forgotten flags are taken, their values only behind =.
    assert_eq!(flags(&["--v", "--snapshot=9", "-config", "--force"]), Config::default());

    for (args, text) in [
        (&["--nope"][..], "flag provided but not defined: -nope"),
        (&["--nope=1"], "flag provided but not defined: -nope"),
        (&["--enable-v2"], "flag provided but not defined: -enable-v2"),
        (&["--discovery=x"], "flag provided but not defined: -discovery"),
        (
            &["--experimental-corrupt-check-time=1s"],
            "flag provided but not defined: -experimental-corrupt-check-time",
        ),
        (&["--name"], "flag needs an argument: -name"),
        (&["---name=a"], "bad flag syntax: ---name=a"),
        (&["--=a"], "bad flag syntax: --=a"),
        (&["--pre-vote=maybe"], r#"invalid boolean value "maybe" for -pre-vote: parse error"#),
        (&["--max-wals", "x"], r#"invalid value "x" for flag -max-wals: parse error"#),
        (&["--max-wals=-1"], r#"invalid value "-1" for flag -max-wals: parse error"#),
        (
            &["--max-concurrent-streams=4294967296"],
            r#"invalid value "4294967296" for flag -max-concurrent-streams: value out of range"#,
        ),
        (
            &["--backend-batch-interval=10"],
            r#"invalid value "10" for flag -backend-batch-interval: parse error"#,
        ),
        (
            &["--initial-cluster-state=old"],
            r#"invalid value "old" for flag -initial-cluster-state: invalid value"#,
        ),
        (
            &["--v2-deprecation=not-yet"],
            r#"invalid value "not-yet" for flag -v2-deprecation: invalid value "not-yet""#,
        ),
        (
            &["--listen-client-urls=localhost"],
            r#"invalid value "localhost" for flag -listen-client-urls: URL scheme must be http, https, unix, or unixs: localhost"#,
        ),
        (
            &["--cors="],
            r#"invalid value "" for flag -cors: URL scheme must be http, https, unix, or unixs: "#,
        ),
        (
            &["--feature-gates=Nope=true"],
            r#"invalid value "Nope=true" for flag -feature-gates: unrecognized feature gate: Nope"#,
        ),
        (
            &["--engine-options=x"],
            r#"invalid value "x" for flag -engine-options: option "x" has not the form name=value"#,
        ),
    ] {
        let error = refused(args);
        assert_eq!(error.to_string(), text);
        assert_eq!((error.exit_code(), error.telling()), (2, Telling::Usage), "{text}");
    }
    for args in [
        &["x"][..],
        &["--name", "a", "x", "--nope"],
        &["--pre-vote", "x"],
        &["--", "x"],
        &["--v", "x"],
    ] {
        let error = refused(args);
        assert_eq!(error.to_string(), r#""x" is not a valid flag"#);
        assert_eq!(error.exit_code(), 1);
    }
}

#[test]
fn help_and_version_are_asked_for_in_order() {
    for args in
        [&["-h"][..], &["--help"], &["--name", "a", "-help", "--nope"], &["--version", "-h"]]
    {
        assert_eq!(load(args, &[]).0.unwrap(), Asked::Help);
    }
    assert_eq!(load(&["--version"], &[("ETCD_NAME", "")]).0.unwrap(), Asked::Version);
    assert!(load(&["--nope", "--help"], &[]).0.is_err());
}

#[test]
fn lists_are_sorted_and_hold_each_once() {
    let config = flags(&[
        "--listen-peer-urls=http://10.0.0.2:1,http://10.0.0.1:1,http://10.0.0.2:1",
        "--listen-metrics-urls=",
        "--listen-peer-urls=",
        "--log-outputs=stdout,stderr,stdout",
        "--host-whitelist=b,a,b",
        "--cors=http://b:1,http://a:1",
    ]);
    assert_eq!(url::join(&config.listen.peer_urls), "http://10.0.0.1:1,http://10.0.0.2:1");
    assert_eq!(config.listen.metrics_urls, []);
    assert_eq!(config.log.outputs, [LogOutput::Stderr, LogOutput::Stdout]);
    assert_eq!(config.listen.host_whitelist.into_iter().collect::<Vec<_>>(), ["a", "b"]);
    assert!(config.listen.cors.allows("http://b:1") && !config.listen.cors.allows("http://c:1"));
    assert_eq!(flags(&["--cors=*"]).listen.cors, Origins::Any);
}

#[test]
fn variables_stand_behind_flags() {
    let (config, notices) = served(load(
        &["--name=a"],
        &[
            ("ETCD_DATA_DIR", "/d"),
            ("ETCD_WAL_DIR", ""),
            ("ETCD_PRE_VOTE", "f"),
            ("ETCD_NOPE", "1"),
            ("QUORATE_ENGINE", "memory"),
            ("QUORATE_SERVICE_HOST", "10.0.0.1"),
            ("ETCDCTL_API", "3"),
            ("ETCD_VERSION", "3"),
            ("HOME", "/"),
        ],
    ));
    assert_eq!(config.member.data_dir, Path::new("/d"));
    assert_eq!(config.member.wal_dir, None);
    assert!(!config.raft.pre_vote);
    assert_eq!(config.storage.engine.name(), "memory");
    let used = |name: &str| {
        notices.iter().any(|n| matches!(n, Notice::VariableUsed { name: used, .. } if used == name))
    };
    assert!(used("ETCD_DATA_DIR") && used("ETCD_PRE_VOTE") && used("QUORATE_ENGINE"));
    let unknown: Vec<_> = notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::VariableUnknown { name } => Some(name.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(unknown, ["ETCD_NOPE", "ETCD_WAL_DIR", "QUORATE_SERVICE_HOST"]);
    assert!(notices.contains(&Notice::VersionVariable { value: "3".to_owned() }));

    for value in ["b", ""] {
        let error = load(&["--name=a"], &[("ETCD_NAME", value)]).0.unwrap_err();
        assert!(matches!(&error, ConfigError::Shadowed(name) if name == "ETCD_NAME"), "{error}");
        assert_eq!((error.exit_code(), error.telling()), (1, Telling::Fatal));
    }
    let error = load(&[], &[("ETCD_MAX_WALS", "x")]).0.unwrap_err();
    assert_eq!(error.to_string(), r#"invalid value "x" for ETCD_MAX_WALS: parse error"#);
    assert_eq!((error.exit_code(), error.telling()), (1, Telling::Verify));
    // A conflict is told of before a value.
    let env = [("ETCD_MAX_WALS", "x"), ("ETCD_NAME", "b")];
    assert!(matches!(load(&["--name=a"], &env).0, Err(ConfigError::Shadowed(_))));
}

#[test]
fn secrets_are_not_told() {
    let (_, notices) = load(&[], &[("ETCD_DISCOVERY_PASSWORD", "hunter2")]);
    assert!(!notices.is_empty());
    assert!(!format!("{notices:?}").contains("hunter2"));
}

#[test]
fn a_file_is_all_that_counts() {
    let written = Written::new("name: f\nmax-wals: 7\n");
    let path = written.path.to_str().unwrap();
    let (config, notices) = served(load(
        &["--name=a", "--data-dir=/d", "--config-file", path],
        &[("ETCD_NAME", "b"), ("ETCD_MAX_WALS", "x"), ("ETCD_NOPE", "1")],
    ));
    assert_eq!((config.member.name.as_str(), config.raft.max_wals), ("f", 7));
    assert_eq!(config.member.data_dir, Path::new("f.etcd"));
    assert_eq!(cluster_text(&config), "f=http://localhost:2380");
    assert!(notices.contains(&Notice::FileUsed { path: written.path.clone() }));
    assert!(!notices.iter().any(|n| matches!(n, Notice::VariableUnknown { .. })));

    let (config, _) = served(load(&["--name=a"], &[("ETCD_CONFIG_FILE", path)]));
    assert_eq!(config.member.name, "f");
    // A wrong flag is wrong even so.
    assert_eq!(refused(&["--config-file", path, "--max-wals=x"]).exit_code(), 2);
    let error = refused(&["--config-file", "/nonexistent/q.yml"]);
    assert!(error.to_string().starts_with("cannot read configuration file /nonexistent/q.yml: "));
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn a_file_is_read_loosely() {
    let text = "
Name: 12
name: exact
MAX-WALS: 3
snapshot-count: null
backend-batch-interval: 5000000
pre-vote: no
listen-client-urls: http://10.0.0.1:1, http://10.0.0.1:2
log-outputs: [stdout, /tmp/x]
feature-gates: LeaseCheckpoint=true
socket-options: {reuse-port: true}
enable-v2: true
nope: {deep: 1}
Quorate:
  engine: redb
  engine-options: {cache-bytes: 1048576}
";
    let (config, notices) = served(file(text));
    assert_eq!(config.member.name, "exact");
    assert_eq!((config.raft.max_wals, config.raft.snapshot_count), (3, 10_000));
    assert_eq!(config.storage.batch_interval, Duration::from_millis(5));
    assert!(!config.raft.pre_vote && config.listen.reuse_port);
    assert_eq!(url::join(&config.listen.client_urls), "http://10.0.0.1:1,http://10.0.0.1:2");
    // A file keeps the default that the command line would drop.
    assert_eq!(url::join(&config.cluster.advertise_client_urls), "http://localhost:2379");
    assert_eq!(config.log.outputs, [LogOutput::Stdout, LogOutput::File("/tmp/x".into())]);
    assert!(config.gates.enabled(Gate::LeaseCheckpoint));
    assert_eq!(config.storage.engine.name(), "redb");
    let options: Vec<_> = config.storage.engine_options.into_iter().collect();
    assert_eq!(options, [("cache-bytes".into(), "1048576".into())]);
    let unknown: BTreeSet<_> = notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::KeyUnknown { key } => Some(key.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(unknown, BTreeSet::from(["enable-v2", "nope"]));
    assert!(notices.contains(&Notice::CheckpointWithoutPersist));

    let (config, _) = served(file("name: 5"));
    assert_eq!(config.member.name, "5");
    assert_eq!(served(file("")).0, Config::default());
    assert_eq!(served(file("{\"name\": \"json\", \"name\": \"last\"}")).0.member.name, "last");
    assert_eq!(served(file("engine: memory")).0.storage.engine.name(), "memory");
}

#[test]
fn a_file_with_wrong_values_is_refused_by_key() {
    for (text, error) in [
        ("[1]", "want keys and values, found [1]"),
        ("max-wals: '5'", r#"max-wals: want a whole number, 0 or more, found "5""#),
        ("max-wals: 1.5", "max-wals: want a whole number, 0 or more, found 1.5"),
        ("pre-vote: 1", "pre-vote: want true or false, found 1"),
        (
            "backend-batch-interval: 10m",
            r#"backend-batch-interval: want a duration as a whole number of nanoseconds, found "10m""#,
        ),
        ("log-outputs: stderr", r#"log-outputs: want an array of texts, found "stderr""#),
        ("name: [a]", r#"name: want a text, found ["a"]"#),
        ("feature-gates: X=true", "feature-gates: unrecognized feature gate: X"),
        ("socket-options: 1", "invalid socket-options: want keys and values, found 1"),
        (
            "listen-peer-urls: x",
            "unexpected error setting up listen-peer-urls: URL scheme must be http, https, unix, or unixs: x",
        ),
        (
            "advertise-client-urls: x",
            "unexpected error setting up advertise-peer-urls: URL scheme must be http, https, unix, or unixs: x",
        ),
        ("initial-cluster-state: old", r#"unexpected clusterState "old""#),
        (
            "quorate: {engin: redb}",
            "unknown key engin (known are engine, engine-options, quota-physical-bytes, auto-disarm-nospace, \
             max-connection-age, max-connection-age-grace)",
        ),
        ("engine: redb\nquorate: {engine: redb}", "engine is set twice"),
        (
            "engine-options: {cache: 5}",
            r#"quorate: engine-options: unknown option "cache" of engine redb; it has cache-bytes, reclaim-mib-per-second"#,
        ),
        (
            "warning-apply-duration: -1",
            "--warning-apply-duration must not be negative (set to -1ns)",
        ),
    ] {
        assert_eq!(file_refused(text), error, "{text}");
    }
    let known = quorate::engines::names();
    let error = format!(r#"unknown engine "sled" (supported are {known})"#);
    assert_eq!(file_refused("engine: sled"), error);
    let written = Written::new("a: [");
    let error = written.load().0.unwrap_err();
    assert!(error.to_string().contains("is not YAML"), "{error}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn rules_are_told_in_the_words_of_etcd() {
    let file = "/tmp/never-opened.log";
    for (args, text) in [
        (
            &["--discovery-fallback=proxy", "--logger=x"][..],
            r#"v2 proxy is deprecated, and --discovery-fallback can't be configured as "proxy""#,
        ),
        (&["--logger=capnslog"], "--logger=capnslog is removed in v3.5"),
        (&["--logger=x", "--log-outputs=default,stdout"], r#"unknown logger option "x""#),
        (
            &["--log-outputs=default,stdout"],
            r#"multi logoutput for "default" is not supported yet"#,
        ),
        (
            &["--log-outputs=systemd/journal,stderr"],
            r#"running with systemd/journal but other '--log-outputs' values (["stderr" "systemd/journal"]) are configured with 'default'; override 'default' value with something else"#,
        ),
        (
            &["--enable-log-rotation"],
            "--log-outputs requires a single file path when --log-rotate-config-json is defined",
        ),
        (
            &["--enable-log-rotation", "--log-outputs=/tmp/a,/tmp/b"],
            "--log-outputs requires a single file path when --log-rotate-config-json is defined",
        ),
        (
            &["--log-format=xml", "--log-level=loud"],
            "unknown log format: xml, supported values json, console",
        ),
        (
            &[
                "--listen-peer-urls=http://example.com:1",
                "--listen-client-urls=http://example.com:2",
            ],
            "expected IP in URL for binding (http://example.com:1)",
        ),
        (&["--listen-client-urls=http://:1"], "expected IP in URL for binding (http://:1)"),
        (&["--listen-client-http-urls=http://h:1"], "expected IP in URL for binding (http://h:1)"),
        (&["--listen-metrics-urls=http://h:1"], "expected IP in URL for binding (http://h:1)"),
        (
            &["--initial-advertise-peer-urls=http://:1"],
            r#"--initial-advertise-peer-urls "http://:1" must be "host:port" (unexpected empty host (http://:1))"#,
        ),
        (
            &["--advertise-client-urls=http://:1"],
            r#"--advertise-client-urls "http://:1" must be in the format "host:port", "unix:/path/to/socket" or "unixs:/path/to/socket" (unexpected empty host (http://:1))"#,
        ),
        (
            &["--initial-cluster=a=http://a:1", "--discovery-srv=d"],
            r#"multiple discovery or bootstrap flags are set. Choose one of "initial-cluster", "discovery-endpoints" or "discovery-srv""#,
        ),
        (&["--discovery-token=t"], "both --discovery-token and --discovery-endpoints must be set"),
        (
            &["--discovery-token=t", "--discovery-endpoints=a, "],
            "--discovery-endpoints must not contain empty endpoints",
        ),
        (
            &["--heartbeat-interval=0", "--election-timeout=0"],
            "--heartbeat-interval must be >0 (set to 0ms)",
        ),
        (&["--election-timeout=0"], "--election-timeout must be >0 (set to 0ms)"),
        (
            &["--election-timeout=499"],
            "--election-timeout[499ms] should be at least as 5 times as --heartbeat-interval[100ms]",
        ),
        (
            &["--election-timeout=50001"],
            "--election-timeout[50001ms] is too long, and should be set less than 50000ms",
        ),
        (
            &["--listen-client-urls=http://127.0.0.1:1"],
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ),
        (&["--auto-compaction-mode="], "undefined auto-compaction-mode"),
        (&["--auto-compaction-mode=x"], r#"unknown auto-compaction-mode "x""#),
        (
            &["--enable-distributed-tracing", "--distributed-tracing-sampling-rate=-1"],
            "distributed tracing configurition is not valid: (tracing sampling rate must be positive)",
        ),
        (
            &["--enable-distributed-tracing", "--distributed-tracing-sampling-rate=1000001"],
            "distributed tracing configurition is not valid: (tracing sampling rate must be less than 1000000)",
        ),
        (
            &["--feature-gates=LeaseCheckpointPersist=true", "--compact-hash-check-time=0s"],
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint",
        ),
        (&["--compact-hash-check-time=0s"], "--compact-hash-check-time must be >0 (set to 0s)"),
        (
            &["--compact-hash-check-time=-90s"],
            "--compact-hash-check-time must be >0 (set to -1m30s)",
        ),
        (
            &["--grpc-keepalive-timeout=-1s"],
            "--grpc-keepalive-timeout must not be negative (set to -1s)",
        ),
        (
            &["--tls-min-version=TLS1.1"],
            r#"unexpected TLS version "TLS1.1" (must be one of: TLS1.2, TLS1.3)"#,
        ),
        (
            &["--tls-min-version=TLS1.3", "--tls-max-version=TLS1.2"],
            "min version (TLS1.3) is greater than max version (TLS1.2)",
        ),
        (
            &["--tls-min-version=TLS1.3", "--cipher-suites=a"],
            "cipher suites cannot be configured when only TLS1.3 is enabled",
        ),
        (
            &["--auto-compaction-retention=x"],
            r#"error parsing CompactionRetention: time: invalid duration "x""#,
        ),
        (
            &["--initial-cluster=default"],
            "error setting up initial cluster: URL scheme must be http, https, unix, or unixs: ",
        ),
        (
            &["--listen-client-http-urls=http://localhost:2379"],
            "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url http://localhost:2379",
        ),
        (&["--auth-token=jwt"], "auth: invalid auth options: --auth-token: jwt needs sign-method"),
        (&["--backend-batch-limit=-1"], "--backend-batch-limit must be >0 (set to -1)"),
        (
            &["--auth-token=jwt,sign-method=none"],
            r#"auth: invalid auth options: --auth-token: unknown sign-method "none""#,
        ),
        (
            &["--enable-pprof", "--enable-distributed-tracing"],
            "not supported yet: --enable-pprof (profiling), --enable-distributed-tracing (tracing)",
        ),
        (&["--downgrade-check-time=1h"], "not supported yet: --downgrade-check-time (downgrades)"),
    ] {
        let error = refused(args);
        assert_eq!(error.to_string(), text);
        assert_eq!((error.exit_code(), error.telling() != Telling::Usage), (1, true), "{text}");
    }
    let error = refused(&["--engine=sled"]).to_string();
    let known = quorate::engines::names();
    assert_eq!(error, format!(r#"unknown engine "sled" (supported are {known})"#));
    let error = refused(&["--log-level=loud", "--listen-peer-urls=http://h:1"]);
    assert_eq!(error.to_string(), r#"unrecognized level: "loud""#);
    assert_eq!((error.exit_code(), error.telling()), (2, Telling::Panic));
    for (json, prefix) in [
        ("{", "improperly formatted log rotation config: "),
        ("{x}", "improperly formatted log rotation config: "),
        (r#"{"maxsize": "a"}"#, "invalid log rotation config: "),
    ] {
        let json = format!("--log-rotation-config-json={json}");
        let outputs = format!("--log-outputs={file}");
        let error = refused(&["--enable-log-rotation", &outputs, &json]);
        assert!(error.to_string().starts_with(prefix), "{error}");
    }
    assert!(!Path::new(file).exists());
    // Explicit defaults are no demand.
    flags(&["--downgrade-check-time=5s", "--enable-pprof=false", "--discovery-srv="]);
    let (checked, _) =
        served(load(&["--corrupt-check-time=1h", "--compact-hash-check-time=2m"], &[]));
    assert_eq!(checked.checks.corrupt_check_time, Duration::from_secs(3600));
    assert_eq!(checked.checks.compact_hash_check_time, Duration::from_secs(120));
    // The limits themselves pass.
    flags(&["--election-timeout=50000", "--heartbeat-interval=10000"]);
}

#[test]
fn an_option_of_signed_tokens_that_is_unknown_is_told() {
    let token = "--auth-token=jwt,sign-method=HS256,priv-key=k,kid=1,aud=x";
    let (_, notices) = served(load(&[token], &[]));
    let names = "kid, aud".to_owned();
    assert!(notices.contains(&Notice::TokenOptionsUnknown { names }), "{notices:?}");
}

#[test]
fn values_that_stand_for_defaults_are_replaced() {
    let (config, notices) = served(load(
        &[
            "--snapshot-count=0",
            "--snapshot-catchup-entries=0",
            "--backend-batch-interval=0s",
            "--backend-batch-limit=0",
            "--compaction-batch-limit=0",
            "--compaction-sleep-interval=0s",
            "--watch-progress-notify-interval=0s",
            "--warning-unary-request-duration=0s",
            "--auth-token-ttl=0",
            "--bcrypt-cost=3",
            "--quota-backend-bytes=0",
            "--raft-read-timeout=1s",
            "--backend-bbolt-freelist-type=x",
        ],
        &[],
    ));
    let default = Config::default();
    assert_eq!(config.raft, default.raft);
    assert_eq!(config.storage, default.storage);
    assert_eq!(config.compaction, default.compaction);
    assert_eq!(config.watch, default.watch);
    assert_eq!(config.observe, default.observe);
    assert_eq!(config.auth, default.auth);
    assert!(notices.contains(&Notice::BcryptCost { given: 3, used: 10 }));
    assert!(notices.contains(&Notice::RaftTimeoutRaised { flag: "raft-read-timeout" }));

    let (config, notices) = served(load(
        &[
            "--quota-backend-bytes=-1",
            "--watch-progress-notify-interval=1ms",
            "--max-request-bytes=20000000",
            "--metrics=extensive",
            "--auth-token=",
            "--auto-compaction-mode=revision",
            "--auto-compaction-retention=1000",
            "--max-snapshots=1",
            "--v2-deprecation=gone",
        ],
        &[],
    ));
    assert_eq!(config.storage.quota_bytes, None);
    assert_eq!(config.watch.progress_notify_interval, Duration::from_millis(100));
    assert_eq!(config.observe.metrics, MetricsDetail::Extensive);
    assert_eq!(config.auth.token, AuthToken::None);
    assert_eq!(config.compaction.auto, Retention::Revisions(1000));
    let deprecated: Vec<_> = notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::Deprecated { flag, .. } => Some(*flag),
            _ => None,
        })
        .collect();
    assert_eq!(deprecated, ["max-snapshots", "v2-deprecation"]);
    assert!(notices.iter().any(|n| matches!(n, Notice::LargeRequests { bytes: 20_000_000, .. })));
    assert!(notices.contains(&Notice::WatchIntervalRaised));
}

#[test]
fn names_and_hosts_fill_in_each_other() {
    let (config, notices) = served(load(
        &[
            "--name=m",
            "--listen-peer-urls=http://0.0.0.0:12380",
            "--listen-client-urls=http://0.0.0.0:12379",
            "--advertise-client-urls=http://localhost:2379",
        ],
        &[],
    ));
    assert_eq!(url::join(&config.cluster.advertise_peer_urls), "http://192.0.2.7:12380");
    assert_eq!(url::join(&config.cluster.advertise_client_urls), "http://192.0.2.7:12379");
    assert_eq!(cluster_text(&config), "m=http://192.0.2.7:12380");
    assert!(notices.contains(&Notice::DefaultHost { host: "192.0.2.7".to_owned() }));
    assert_eq!(config.member.data_dir, Path::new("m.etcd"));
    assert_eq!(config.member.wal_dir(), Path::new("m.etcd/member/wal"));

    // What is set is left alone.
    let config = flags(&[
        "--name=m",
        "--listen-peer-urls=http://0.0.0.0:1",
        "--initial-advertise-peer-urls=http://h:1",
        "--initial-cluster=m=http://h:1,,m=http://h:2",
    ]);
    assert_eq!(cluster_text(&config), "m=http://h:1,m=http://h:2");
    assert_eq!(url::join(&config.cluster.advertise_peer_urls), "http://h:1");

    let args = ["--listen-peer-urls=http://0.0.0.0:1".to_owned()];
    let surroundings =
        Surroundings { env: BTreeMap::new(), default_host: &|| Err("no route".to_owned()) };
    let mut notices = Vec::new();
    let asked = config::load(&args, &surroundings, &mut notices).unwrap();
    let (config, notices) = served((Ok(asked), notices));
    assert_eq!(url::join(&config.cluster.advertise_peer_urls), "http://localhost:2380");
    assert!(notices.contains(&Notice::NoDefaultHost { error: "no route".to_owned() }));
}

#[test]
fn the_first_start_checks_the_own_entry() {
    let lookup = |host: &str| match host {
        "h" => Ok("10.0.0.1".parse().unwrap()),
        _ => Err(std::io::Error::other("no such host")),
    };
    let check = |advertised: &str, cluster: &str| {
        let advertised = format!("--initial-advertise-peer-urls={advertised}");
        let cluster = format!("--initial-cluster={cluster}");
        let config = flags(&["--name=m", &advertised, &cluster]);
        config.check_bootstrap(&lookup).map_err(|error| error.to_string())
    };
    assert_eq!(check("http://x:1", "m=http://x:1"), Ok(()));
    assert_eq!(check("http://10.0.0.1:1", "m=http://h:1"), Ok(()));
    for (advertised, cluster, error) in [
        (
            "http://h:1",
            "a=http://h:1",
            r#"couldn't find local name "m" in the initial cluster configuration"#,
        ),
        ("http://h:1", "", "initial cluster unset and no discovery endpoints found"),
        (
            "http://h:1",
            "m=http://h:1,m=http://h:2",
            "--initial-cluster has m=http://h:2 but missing from --initial-advertise-peer-urls=http://h:1",
        ),
        (
            "http://h:1,http://h:2",
            "m=http://h:1",
            "--initial-advertise-peer-urls has http://h:2 but missing from --initial-cluster=m=http://h:1",
        ),
        (
            "http://h:1",
            "m=http://localhost:1",
            "--initial-cluster has m=http://localhost:1 but missing from --initial-advertise-peer-urls=http://h:1",
        ),
        (
            "http://x:1",
            "m=http://h:1",
            "failed to resolve http://x:1 to match --initial-cluster=m=http://h:1 (no such host)",
        ),
    ] {
        assert_eq!(check(advertised, cluster), Err(error.to_owned()));
    }
}

#[test]
fn every_flag_takes_its_default_back() {
    for flag in FLAGS.iter().filter(|flag| !matches!(flag.name, "config-file" | "version")) {
        let default = (flag.slot)(&mut Config::default()).print();
        if default.is_empty() {
            continue; // an empty list is not a list with nothing in it
        }
        let arg = format!("--{}={default}", flag.name);
        let given = if flag.name == "listen-client-urls" {
            flags(&[&arg, "--advertise-client-urls=http://localhost:2379"])
        } else {
            flags(&[&arg])
        };
        assert_eq!(given, Config::default(), "{arg}");
    }
    let help = config::help::help();
    for flag in FLAGS {
        assert!(help.contains(&format!("\n  --{} '", flag.name)), "{}", flag.name);
    }
    assert!(help.lines().all(|line| line.len() <= 160), "help fits a screen");
}

/// The samples are the manual: what they say of keys and defaults is so.
#[test]
fn the_samples_hold() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        let (_, notices) = served(load(&["--config-file", path.to_str().unwrap()], &[]));
        let unknown = notices.iter().find(|n| matches!(n, Notice::KeyUnknown { .. }));
        assert_eq!(unknown, None, "{}", path.display());
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    assert_eq!(
        names,
        [
            "member-1.yml",
            "member-2.yml",
            "member-3.yml",
            "memory-engine.yml",
            "metrics.yml",
            "minimal.yml",
            "secure.yml",
            "single.yml"
        ]
    );

    let path = directory.join("metrics.yml");
    let (config, _) = served(load(&["--config-file", path.to_str().unwrap()], &[]));
    let rotation = Rotation { maxsize: 50, maxage: 14, compress: true, ..Rotation::default() };
    assert_eq!(config.log.rotation, Some(rotation));
    assert_eq!((config.log.level, config.log.format), (LogLevel::Info, LogFormat::Json));
}

/// A sample's settings and the keys that it lists.
fn sample(name: &str) -> (Config, BTreeSet<String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name);
    let (config, _) = served(load(&["--config-file", path.to_str().unwrap()], &[]));
    let keys = config::file::keys(&path, &fs::read_to_string(&path).unwrap()).unwrap();
    (config, keys.into_iter().collect())
}

#[test]
fn the_members_samples_make_one_cluster() {
    let (_, every_key) = sample("single.yml");
    let mut members = Vec::new();
    for n in 1..=3 {
        let (config, listed) = sample(&format!("member-{n}.yml"));
        assert_eq!(listed, every_key);
        config.check_bootstrap(&|host| panic!("{host} is looked up")).unwrap();
        assert_eq!(config.member.name, format!("member-{n}"));
        assert_eq!(config.listen.peer_urls, config.cluster.advertise_peer_urls);
        assert_eq!(config.listen.client_urls, config.cluster.advertise_client_urls);
        members.push(config);
    }
    let ports = |urls: fn(&Config) -> &Vec<config::Url>| -> Vec<u16> {
        members.iter().map(|config| urls(config)[0].port()).collect()
    };
    assert_eq!(ports(|config| &config.listen.client_urls), [2379, 22379, 32379]);
    assert_eq!(ports(|config| &config.listen.peer_urls), [2380, 22380, 32380]);
    for config in &members {
        assert_eq!(config.cluster.initial, members[0].cluster.initial);
        assert_eq!(config.cluster.token, members[0].cluster.token);
        // All else is as in a cluster of one.
        let single = Config::default();
        let mut rest = config.clone();
        rest.listen.peer_urls = single.listen.peer_urls.clone();
        rest.listen.client_urls = single.listen.client_urls.clone();
        for (have, want) in [
            (&rest.raft as &dyn std::fmt::Debug, &single.raft as &dyn std::fmt::Debug),
            (&rest.listen, &single.listen),
            (&rest.limits, &single.limits),
            (&rest.storage, &single.storage),
            (&rest.auth, &single.auth),
            (&rest.compaction, &single.compaction),
            (&rest.watch, &single.watch),
            (&rest.checks, &single.checks),
            (&rest.observe, &single.observe),
            (&rest.log, &single.log),
        ] {
            assert_eq!(format!("{have:?}"), format!("{want:?}"));
        }
    }
}

#[test]
fn single_lists_every_supported_key_with_its_default() {
    let (config, listed) = sample("single.yml");
    assert_eq!(config, Config::default());
    // Without effect on a member that this release can serve.
    let idle = |flag: &Flag| {
        flag.name == "v2-deprecation" || flag.name.starts_with("distributed-tracing-")
    };
    let in_files_alone =
        FILE_ONLY.iter().map(|only| only.key).filter(|key| key.starts_with("client-transport"));
    let supported: BTreeSet<String> = FLAGS
        .iter()
        .filter(|flag| !idle(flag))
        .filter(|flag| !config::support::refuses(flag.name))
        .filter_map(|flag| match (flag.group, flag.key()?) {
            (Group::Own, key) => Some(format!("quorate.{key}")),
            (_, key) => Some(key.to_owned()),
        })
        .chain(in_files_alone.map(str::to_owned))
        .collect();
    assert_eq!(listed, supported);
}

fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quorate"))
        .args(args)
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .expect("the binary starts")
}

#[test]
fn the_process_ends_as_etcd_does() {
    let answer = |args: &[&str], env: &[(&str, &str)]| {
        let output = run(args, env);
        let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = answer(&["--version"], &[]);
    assert_eq!((code, out.lines().count(), err.as_str()), (Some(0), 4, ""));
    let (code, out, err) = answer(&["--help"], &[]);
    assert_eq!((code, err.as_str()), (Some(0), config::help::USAGE));
    assert_eq!(out, config::help::help());
    let (code, out, err) = answer(&["--nope"], &[]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert_eq!(err, format!("flag provided but not defined: -nope\n{}", config::help::USAGE));
    let (code, out, err) = answer(&["gateway", "start"], &[]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.starts_with("unknown command \"gateway\""), "{err}");

    let lines = |err: &str| -> Vec<serde_json::Value> {
        err.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    };
    let (code, _, err) = answer(&["serve", "x"], &[]);
    assert_eq!(code, Some(1));
    let last = lines(&err).pop().expect("there is a line");
    assert_eq!(last["msg"], "failed to verify flags");
    assert_eq!(last["level"], "warn");
    assert_eq!(last["error"], "\"x\" is not a valid flag");
    let (code, _, err) = answer(&["--name=a"], &[("ETCD_NAME", "b")]);
    assert_eq!(code, Some(1));
    let last = lines(&err).pop().expect("there is a line");
    assert_eq!(last["level"], "fatal");
    assert_eq!(last["environment-variable"], "ETCD_NAME");
    let (code, _, err) = answer(&["--log-level=loud"], &[("ETCD_PRE_VOTE", "true")]);
    assert_eq!(code, Some(2));
    let told = lines(&err);
    assert_eq!(told[0]["msg"], "recognized and used environment variable");
    assert_eq!(told[0]["variable-name"], "ETCD_PRE_VOTE");
    assert_eq!(told.last().expect("there is a line")["level"], "panic");
    let written = Written::new("listen-peer-urls: x");
    let (code, _, err) = answer(&["--config-file", written.path.to_str().unwrap()], &[]);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("unexpected error setting up listen-peer-urls: "), "{err}");
    let (code, _, err) = answer(&["--log-outputs=/nonexistent/q.log"], &[]);
    assert_eq!(code, Some(1));
    assert!(err.starts_with("cannot open log file /nonexistent/q.log: "), "{err}");
}
