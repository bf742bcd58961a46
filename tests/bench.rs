//! `quorate bench` against a real etcd: what it reports is what the server then holds.

mod ports;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::Value;

/// One member, killed when dropped.
struct Etcd {
    child: Child,
    port: u16,
    peer_port: u16,
    dir: tempfile::TempDir,
}

impl Etcd {
    fn start() -> Etcd {
        let dir = tempfile::tempdir().unwrap();
        let (port, peer_port) = (ports::free_port(), ports::free_port());
        let child = Self::spawn(&dir, port, peer_port).expect("etcd starts");
        Etcd { child, port, peer_port, dir }
    }

    /// Returns once etcd says that it serves; None if it ends instead.
    fn spawn(dir: &tempfile::TempDir, port: u16, peer_port: u16) -> Option<Child> {
        let client = format!("http://127.0.0.1:{port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let mut child = Command::new("etcd")
            .args(["--name", "m", "--data-dir", dir.path().join("m").to_str().unwrap()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcd is installed");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = lines.by_ref().any(|line| line.unwrap().contains("ready to serve"));
        if !ready {
            child.wait().unwrap();
            return None;
        }
        // A full pipe would stop etcd.
        thread::spawn(move || lines.for_each(drop));
        Some(child)
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on its port and data.
    fn restart(&mut self) {
        self.child = Self::spawn(&self.dir, self.port, self.peer_port).expect("etcd restarts");
    }

    fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn etcdctl(&self, args: &[&str]) -> std::process::Output {
        Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.endpoint()))
            .args(args)
            .output()
            .expect("etcdctl is installed")
    }

    /// A number in `etcdctl get`'s answer for all keys.
    fn count(&self, field: &str) -> u64 {
        let output = self.etcdctl(&["get", "", "--from-key", "--limit=1", "-w", "fields"]);
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.starts_with(&format!("\"{field}\"")));
        line.unwrap_or_else(|| panic!("no {field} in {text}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    }

    /// Runs a benchmark that must succeed without a single error.
    fn bench(&self, args: &str) -> Value {
        let run = run(&format!("{args} --json --endpoints {}", self.endpoint()));
        assert_eq!((run.code, &run.err[..]), (0, ""), "{}", run.out);
        let report = run.json();
        assert_eq!(report["servers"][0]["error_count"], 0, "{report:#}");
        report["servers"][0].clone()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may be gone already.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

struct Run {
    code: u8,
    out: String,
    err: String,
}

impl Run {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

fn run(args: &str) -> Run {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let args = args.split_whitespace().map(OsString::from);
    let code = quorate::bench::run_to(args, &mut out, &mut err);
    Run { code, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

/// Latencies are in order, and there are as many as `count`.
fn check_kind(kind: &Value, name: &str, count: u64) {
    assert_eq!((&kind["name"], &kind["count"]), (&name.into(), &count.into()), "{kind:#}");
    let of = |quantity: &str| kind["latency_us"][quantity].as_f64().unwrap();
    let ascending = ["min", "p50", "p90", "p99", "p99.9", "max"].map(of);
    assert!(ascending.is_sorted() && ascending[0] > 0.0, "{kind:#}");
    assert!(of("min") <= of("average") && of("average") <= of("max"), "{kind:#}");
    assert!(kind["per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn put_writes_each_sequential_key_once() {
    let etcd = Etcd::start();
    let outcome = etcd.bench("put --total 1000 --sequential-keys --clients 10 --val-size 256");
    assert_eq!(outcome["requests"], 1000);
    assert_eq!(outcome["version"].as_str().unwrap().split('.').next(), Some("3"));
    assert!(outcome["client_cpu_us_per_request"].as_f64().unwrap() > 0.0);
    check_kind(&outcome["kinds"][0], "put", 1000);
    assert_eq!((etcd.count("Count"), etcd.count("Revision")), (1000, 1001));
    let value = etcd.etcdctl(&["get", "000003e7", "--print-value-only"]).stdout;
    assert_eq!(value.len(), 256 + 1);
}

#[test]
fn load_is_spread_over_threads_and_connections_without_loss() {
    let etcd = Etcd::start();
    let outcome = etcd
        .bench("put --total 500 --sequential-keys --key-size 40 --threads 2 --conns 3 --clients 7");
    assert_eq!(outcome["requests"], 500);
    assert_eq!((etcd.count("Count"), etcd.count("Revision")), (500, 501));
}

#[test]
fn range_reads_what_was_populated_and_reports_what_is_missing() {
    let etcd = Etcd::start();
    let outcome = etcd.bench("range --total 300 --key-space-size 50 --populate --clients 4");
    check_kind(&outcome["kinds"][0], "range", 300);
    assert_eq!((etcd.count("Count"), etcd.count("Revision")), (50, 51));
    for shape in
        ["00000000", "00000000 1 --consistency s --limit 10", "0 1 --count-only", "0 1 --keys-only"]
    {
        etcd.bench(&format!("range {shape} --total 20"));
    }

    // Every second key is there.
    let args = "range --total 100 --key-space-size 100 --sequential-keys --json --endpoints";
    let half = run(&format!("{args} {}", etcd.endpoint()));
    let outcome = &half.json()["servers"][0];
    assert_eq!(
        (half.code, &outcome["requests"], &outcome["error_count"]),
        (0, &50.into(), &50.into())
    );
    assert_eq!(outcome["errors"]["the range holds no key"], 50);

    let none = run(&format!("range missing --total 10 --endpoints {}", etcd.endpoint()));
    assert_eq!(none.code, 1);
    assert_eq!(none.err, "error: not one request succeeded\n");
    assert!(none.out.contains("10  the range holds no key"), "{}", none.out);
}

#[test]
fn a_transaction_puts_as_many_keys_as_asked() {
    let etcd = Etcd::start();
    let outcome = etcd.bench("txn-put --total 100 --txn-ops 5 --sequential-keys --clients 3");
    check_kind(&outcome["kinds"][0], "txn", 100);
    assert_eq!((etcd.count("Count"), etcd.count("Revision")), (500, 101));

    // etcd's own limit is 128.
    let args = "txn-put --total 4 --txn-ops 129 --sequential-keys --json --endpoints";
    let refused = run(&format!("{args} {}", etcd.endpoint()));
    assert_eq!(refused.code, 1);
    let errors = &refused.json()["servers"][0]["errors"];
    assert_eq!(errors["InvalidArgument: etcdserver: too many operations in txn request"], 4);
}

#[test]
fn mixed_reads_and_writes_in_proportion() {
    let etcd = Etcd::start();
    let outcome =
        etcd.bench("mixed --total 1000 --rw-ratio 4 --key-space-size 20 --populate --clients 5");
    assert_eq!(outcome["requests"], 1000);
    let reads = outcome["kinds"][0]["count"].as_u64().unwrap();
    check_kind(&outcome["kinds"][0], "read", reads);
    check_kind(&outcome["kinds"][1], "write", 1000 - reads);
    // 800 expected; the seed is fixed, but which client takes how many tickets is not.
    assert!((700..900).contains(&reads), "{reads}");
    assert_eq!((etcd.count("Count"), etcd.count("Revision")), (20, 21 + 1000 - reads));
}

#[test]
fn watchers_get_exactly_the_events_of_their_keys() {
    let etcd = Etcd::start();
    let outcome = etcd.bench(
        "watch --total 200 --watchers 20 --streams 4 --watched-key-total 3 --sequential-keys \
         --clients 3 --conns 3 --threads 2",
    );
    assert_eq!(outcome["requests"], 200);
    assert_eq!(outcome["watchers_created"]["count"], 20);
    check_kind(&outcome["kinds"][0], "put", 200);
    // Puts of the three keys: 67, 67, 66; their watchers: 7, 7, 6.
    check_kind(&outcome["kinds"][1], "event", 67 * 7 + 67 * 7 + 66 * 6);
}

#[test]
fn watch_latency_keeps_its_rate() {
    let etcd = Etcd::start();
    let outcome = etcd.bench("watch-latency --total 50 --rate 200 --watchers 10 --prev-kv");
    check_kind(&outcome["kinds"][0], "put", 50);
    check_kind(&outcome["kinds"][1], "event", 500);
    // The last put is due 49/200 s after the start.
    assert!(outcome["elapsed_s"].as_f64().unwrap() >= 0.245);
}

#[test]
fn every_keep_alive_is_answered_and_leases_are_given_back() {
    let etcd = Etcd::start();
    let outcome = etcd.bench("lease-keepalive --total 300 --clients 3 --conns 2");
    check_kind(&outcome["kinds"][0], "keep-alive", 300);
    let leases = etcd.etcdctl(&["lease", "list"]).stdout;
    assert!(String::from_utf8(leases).unwrap().starts_with("found 0 leases"));
}

#[test]
fn an_open_loop_accounts_for_each_request_that_was_due() {
    let etcd = Etcd::start();
    let outcome = etcd.bench("put --duration 500ms --rate 400 --clients 4 --sequential-keys");
    let (sent, unsent) =
        (outcome["requests"].as_u64().unwrap(), outcome["unsent"].as_u64().unwrap());
    assert_eq!(sent + unsent, 200);
    assert_eq!(etcd.count("Count"), sent);
}

#[test]
fn compaction_runs_beside_the_load() {
    let etcd = Etcd::start();
    let put = "put --duration 1s --warmup 200ms --compact-interval 100ms --compact-index-delta 5";
    let outcome = etcd.bench(put);
    assert!(outcome["requests"].as_u64().unwrap() > 10);
    let old = etcd.etcdctl(&["get", "x", "--rev=2"]);
    let error = String::from_utf8(old.stderr).unwrap();
    assert!(error.contains("required revision has been compacted"), "{error}");
}

#[test]
fn disturbed_puts_are_told_from_others() {
    let etcd = Etcd::start();
    let put = "put --total 401 --rate 400 --val-size 100 --during compaction,defragment";
    let outcome = etcd.bench(&format!("{put} --compact-index-delta 5"));
    assert_eq!(outcome["requests"], 401);
    let kinds = &outcome["kinds"];
    check_kind(&kinds[0], "put", 201);
    check_kind(&kinds[1], "disturbed put", 200);
    for (kind, name) in [(&kinds[2], "compaction"), (&kinds[3], "defragmentation")] {
        let count = kind["count"].as_u64().unwrap();
        assert!((1..=3).contains(&count), "{count} in half a second, and the last is waited for");
        check_kind(kind, name, count);
    }
    // At revision 202, when half of the puts were made, at the earliest.
    let old = etcd.etcdctl(&["get", "x", "--rev=100"]);
    let error = String::from_utf8(old.stderr).unwrap();
    assert!(error.contains("required revision has been compacted"), "{error}");
    let alone = etcd.bench("put --total 100 --during defragment");
    assert_eq!(alone["kinds"][2]["count"], 0);
}

#[test]
fn puts_of_a_user_while_others_log_in() {
    let etcd = Etcd::start();
    // Nobody asks who calls yet.
    etcd.bench("put --total 10 --user root:not:asked:for");
    for command in ["user add root:se:cret", "auth enable"] {
        let words: Vec<&str> = command.split(' ').collect();
        let output = etcd.etcdctl(&words);
        assert!(output.status.success(), "{command}: {output:?}");
    }
    let outcome =
        etcd.bench("put --duration 2s --clients 4 --threads 2 --conns 2 --user root:se:cret");
    assert_eq!(outcome["kinds"].as_array().unwrap().len(), 1, "{outcome:#}");
    let endpoint = etcd.endpoint();
    let args = "put --duration 3s --clients 4 --logins 4 --user root:se:cret";
    let both = run(&format!("{args} --json --endpoints {endpoint}"));
    assert_eq!((both.code, &both.err[..]), (0, ""), "{}", both.out);
    assert!(!both.out.contains("se:cret"), "{}", both.out);
    let report = both.json();
    assert_eq!(report["options"]["user"], "root", "{report:#}");
    let outcome = &report["servers"][0];
    assert_eq!(outcome["error_count"], 0, "{outcome:#}");
    check_kind(&outcome["kinds"][0], "put", outcome["requests"].as_u64().unwrap());
    let logins = outcome["kinds"][1]["count"].as_u64().unwrap();
    // Those that are not answered when the time is over are not counted.
    assert!((1..=13).contains(&logins), "{outcome:#}");
    check_kind(&outcome["kinds"][1], "login", logins);
    let table = run(&format!("{args} --endpoints {endpoint}"));
    assert!(table.out.contains("login p99"), "{}{}", table.out, table.err);

    let wrong = run(&format!("put --user root:wrong --endpoints {endpoint}"));
    assert_eq!(wrong.code, 1, "{}", wrong.err);
    assert!(wrong.err.contains("the login failed"), "{}", wrong.err);
    assert!(!wrong.err.contains("wrong"), "{}", wrong.err);
    let alone = run(&format!("put --logins 5 --endpoints {endpoint}"));
    assert_eq!(alone.code, 2, "{}", alone.err);
    let nameless = run(&format!("put --user :x --endpoints {endpoint}"));
    assert_eq!(nameless.code, 2, "{}", nameless.err);
}

#[test]
fn two_servers_get_the_same_load_and_their_ratio_is_told() {
    let (a, b) = (Etcd::start(), Etcd::start());
    let args = format!(
        "put --total 403 --sequential-keys --clients 4 --rounds 4 --endpoints {} --versus {} \
         --server-pid {} --versus-pid {}",
        a.endpoint(),
        b.endpoint(),
        a.child.id(),
        b.child.id()
    );
    let json = run(&format!("{args} --json"));
    assert_eq!((json.code, &json.err[..]), (0, ""));
    let report = json.json();
    assert_eq!(report["workload"], "put");
    assert_eq!(report["options"]["rounds"], 4);
    for (server, etcd) in [(&report["servers"][0], &a), (&report["servers"][1], &b)] {
        assert_eq!(server["server"], etcd.endpoint());
        assert_eq!(server["requests"], 403);
        assert_eq!(etcd.count("Count"), 403);
        assert!(server["server_usage"]["cpu_us_per_request"].as_f64().unwrap() > 0.0);
        assert!(server["server_usage"]["rss_bytes"].as_u64().unwrap() > 1 << 20);
    }
    let per_second =
        |server: usize| report["servers"][server]["requests_per_second"].as_f64().unwrap();
    let ratio = |name: &str| report["ratio"][name].as_f64().unwrap();
    assert!((ratio("requests_per_second") - per_second(1) / per_second(0)).abs() < 1e-9);
    assert!(ratio("rounds_min") <= ratio("rounds_median"));
    assert!(ratio("rounds_median") <= ratio("rounds_max"));
    for name in ["latency_p50", "latency_p99", "server_cpu_per_request", "server_rss"] {
        assert!(ratio(name) > 0.0, "{name}");
    }

    let text = run(&args);
    assert_eq!((text.code, &text.err[..]), (0, ""));
    for start in
        ["put  ", "requests/s", "put p99.9", "server CPU/request", "requests/s, ratio by round"]
    {
        assert!(text.out.lines().any(|line| line.starts_with(start)), "{start}: {}", text.out);
    }
    assert!(text.out.lines().next().unwrap().ends_with("ratio"), "{}", text.out);
}

#[test]
fn watchers_follow_both_servers_through_all_rounds() {
    let (a, b) = (Etcd::start(), Etcd::start());
    let run = run(&format!(
        "watch --total 40 --watchers 5 --streams 2 --rounds 4 --json --endpoints {} --versus {}",
        a.endpoint(),
        b.endpoint()
    ));
    assert_eq!((run.code, &run.err[..]), (0, ""));
    for server in run.json()["servers"].as_array().unwrap() {
        check_kind(&server["kinds"][1], "event", 200);
        assert_eq!(server["error_count"], 0);
    }
}

#[test]
fn a_server_that_comes_back_is_used_again() {
    let mut etcd = Etcd::start();
    let args = "put --sequential-keys --total 8000 --rate 2000 --clients 4 --conns 2 --json \
                --dial-timeout 60s --endpoints";
    let args = format!("{args} {}", etcd.endpoint());
    let bench = thread::spawn(move || run(&args));
    while etcd.count("Count") == 0 {}
    etcd.kill();
    etcd.restart();
    let run = bench.join().unwrap();
    assert_eq!((run.code, &run.err[..]), (0, ""));
    let outcome = &run.json()["servers"][0];
    let errors = outcome["error_count"].as_u64().unwrap();
    let requests = outcome["requests"].as_u64().unwrap();
    assert!(errors > 0 && requests + errors == 8000, "{outcome:#}");
    // A request that failed with the connection may have been executed.
    let count = etcd.count("Count");
    assert!((requests..=8000).contains(&count), "{count}: {outcome:#}");
}

#[test]
fn a_server_that_stays_away_ends_the_run() {
    let mut etcd = Etcd::start();
    let endpoint = etcd.endpoint();
    let args = format!("put --duration 1h --clients 4 --dial-timeout 100ms --endpoints {endpoint}");
    let bench = thread::spawn(move || run(&args));
    while etcd.count("Count") == 0 {}
    etcd.kill();
    let run = bench.join().unwrap();
    assert_eq!((run.code, &run.out[..]), (1, ""));
    assert!(
        run.err.starts_with(&format!("error: cannot go on: cannot connect to {endpoint}")),
        "{}",
        run.err
    );
}

#[test]
fn no_server_is_a_clear_error() {
    // Nobody listens on port 1.
    let refused = run("put --endpoints 127.0.0.1:1");
    assert_eq!(refused.code, 1);
    assert_eq!(
        refused.err,
        "error: cannot connect to 127.0.0.1:1: Connection refused (os error 111)\n"
    );

    // Somebody listens and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let late = run(&format!("put --dial-timeout 50ms --endpoints {address}"));
    assert_eq!(late.code, 1);
    assert_eq!(late.err, format!("error: cannot connect to {address}: no answer within 50 ms\n"));

    // Somebody speaks another protocol.
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _): (TcpStream, _) = other.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").unwrap();
        // Until the client has gone.
        let _reset = stream.read_to_end(&mut Vec::new());
    });
    let other = run(&format!("put --endpoints {address}"));
    assert_eq!(other.code, 1);
    assert!(
        other.err.starts_with(&format!("error: {address} does not answer like etcd:")),
        "{}",
        other.err
    );
    server.join().unwrap();
}

#[test]
fn a_wrong_command_line_is_refused_before_anything_is_done() {
    for args in [
        "",
        "put --conns 0",
        "put --total 1 --duration 1s",
        "put --endpoints https://a:1",
        "nothing",
    ] {
        let run = run(args);
        assert_eq!((run.code, &run.out[..]), (2, ""), "{args}");
        assert!(!run.err.is_empty(), "{args}");
    }
    let tls = run("put --endpoints https://a:1");
    assert!(tls.err.contains("TLS is not supported"), "{}", tls.err);
    let sizes = run("put --key-size 1 --key-space-size 17");
    assert_eq!((sizes.code, sizes.err.contains("--key-space-size 17")), (2, true));
    let help = run("--help");
    assert_eq!((help.code, help.out.contains("watch-latency")), (0, true));
    let gone = run("put --server-pid 4294967295");
    assert_eq!((gone.code, gone.err.contains("/proc/4294967295/stat")), (1, true));
}
