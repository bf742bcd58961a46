//! Results of one workload as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::process::Usage;
use super::report::table::aligned;
use super::session::SliceResult;
use super::tally::Tally;
use super::work::Work;

/// All slices of one server.
#[derive(Debug)]
pub struct Column {
    /// Its endpoints as given.
    pub server: String,
    pub version: String,
    pub tally: Tally,
    pub elapsed: Duration,
    pub client_cpu: Duration,
    /// Requests per second of each slice.
    pub slices: Vec<f64>,
    pub created: Histogram<u64>,
    /// Of the server's processes, over the whole run.
    pub usage: Option<UsageOver>,
}

/// What the server's processes used between two points in time.
#[derive(Debug, Clone, Copy)]
pub struct UsageOver {
    pub before: Usage,
    pub after: Usage,
}

impl Column {
    pub fn new(server: String, version: String, created: Histogram<u64>, kinds: usize) -> Self {
        Column {
            server,
            version,
            tally: Tally::new(kinds),
            elapsed: Duration::ZERO,
            client_cpu: Duration::ZERO,
            slices: Vec::new(),
            created,
            usage: None,
        }
    }

    /// Adds a slice.
    pub fn add(&mut self, slice: &SliceResult, work: &Work) {
        let requests: u64 =
            slice.tally.kinds[..work.request_kinds()].iter().map(Histogram::len).sum();
        self.slices.push(per_second(requests, slice.elapsed));
        self.tally.merge(&slice.tally);
        self.elapsed += slice.elapsed;
        self.client_cpu += slice.client_cpu;
    }
}

fn per_second(count: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { count as f64 / elapsed.as_secs_f64() }
}

/// Latencies in microseconds; all 0 when nothing succeeded.
#[derive(Serialize, Debug, Clone, Copy, PartialEq)]
pub struct Latency {
    pub average: f64,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    #[serde(rename = "p99.9")]
    pub p999: f64,
    pub max: f64,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Self {
        let us = |ns: u64| ns as f64 / 1e3;
        let at = |quantile| us(histogram.value_at_quantile(quantile));
        Latency {
            average: histogram.mean() / 1e3,
            min: us(histogram.min()),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: us(histogram.max()),
        }
    }
}

/// One kind of operation.
#[derive(Serialize, Debug)]
pub struct Kind {
    pub name: &'static str,
    /// Completed without error.
    pub count: u64,
    pub per_second: f64,
    pub latency_us: Latency,
}

/// Creation of the watchers, before anything was measured.
#[derive(Serialize, Debug)]
pub struct Created {
    pub count: u64,
    pub latency_us: Latency,
}

/// What the server's processes used.
#[derive(Serialize, Debug)]
pub struct Server {
    /// From the first measured slice to the last, the other server's turns included: work put off counts
    /// too. `null` if no request succeeded.
    pub cpu_us_per_request: Option<f64>,
    /// At the end.
    pub rss_bytes: u64,
    pub rss_max_bytes: u64,
}

/// The result of one server.
#[derive(Serialize, Debug)]
pub struct Outcome {
    pub server: String,
    pub version: String,
    /// Requests that succeeded.
    pub requests: u64,
    pub error_count: u64,
    /// How often each error came.
    pub errors: BTreeMap<String, u64>,
    /// Due by the rate and not sent before the time was over.
    pub unsent: u64,
    pub elapsed_s: f64,
    pub requests_per_second: f64,
    pub kinds: Vec<Kind>,
    /// Which of them the workload is about.
    #[serde(skip)]
    main_kind: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watchers_created: Option<Created>,
    /// CPU time of this program, all threads. `null` if no request succeeded.
    pub client_cpu_us_per_request: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_usage: Option<Server>,
}

impl Outcome {
    pub fn new(column: &Column, work: &Work) -> Self {
        let kinds: Vec<Kind> = work
            .kinds()
            .iter()
            .zip(&column.tally.kinds)
            .map(|(name, histogram)| Kind {
                name,
                count: histogram.len(),
                per_second: per_second(histogram.len(), column.elapsed),
                latency_us: Latency::of(histogram),
            })
            .collect();
        let requests: u64 = kinds[..work.request_kinds()].iter().map(|kind| kind.count).sum();
        let each =
            |cpu: Duration| (requests > 0).then(|| cpu.as_secs_f64() * 1e6 / requests as f64);
        Outcome {
            server: column.server.clone(),
            version: column.version.clone(),
            requests,
            error_count: column.tally.error_count(),
            errors: column.tally.errors.clone(),
            unsent: column.tally.unsent,
            elapsed_s: column.elapsed.as_secs_f64(),
            requests_per_second: per_second(requests, column.elapsed),
            kinds,
            main_kind: work.main_kind(),
            watchers_created: (!column.created.is_empty()).then(|| Created {
                count: column.created.len(),
                latency_us: Latency::of(&column.created),
            }),
            client_cpu_us_per_request: each(column.client_cpu),
            server_usage: column.usage.map(|UsageOver { before, after }| Server {
                cpu_us_per_request: each(after.cpu.saturating_sub(before.cpu)),
                rss_bytes: after.rss_bytes,
                rss_max_bytes: after.rss_max_bytes,
            }),
        }
    }
}

/// The second server in proportion to the first; a ratio with 0 below it is `null`.
#[derive(Serialize, Debug)]
pub struct Ratio {
    pub requests_per_second: Option<f64>,
    /// Least, median and greatest ratio of the rounds: how far the ratio can be trusted.
    pub rounds_min: Option<f64>,
    pub rounds_median: Option<f64>,
    pub rounds_max: Option<f64>,
    pub latency_average: Option<f64>,
    pub latency_p50: Option<f64>,
    pub latency_p99: Option<f64>,
    pub server_cpu_per_request: Option<f64>,
    pub server_rss: Option<f64>,
}

fn ratio(a: f64, b: f64) -> Option<f64> {
    (a > 0.0).then(|| b / a)
}

impl Ratio {
    /// `rounds` holds both servers' requests per second, round by round. Latencies are those of
    /// what the workload is about.
    pub fn new(a: &Outcome, b: &Outcome, rounds: &[(f64, f64)]) -> Self {
        let mut each: Vec<f64> = rounds.iter().filter_map(|&(a, b)| ratio(a, b)).collect();
        each.sort_by(f64::total_cmp);
        let latency = |pick: fn(&Latency) -> f64| {
            let of = |outcome: &Outcome| {
                outcome.kinds.get(outcome.main_kind).map(|kind| pick(&kind.latency_us))
            };
            ratio(of(a)?, of(b)?)
        };
        let usage = |pick: fn(&Server) -> Option<f64>| {
            let of = |outcome: &Outcome| outcome.server_usage.as_ref().and_then(pick);
            ratio(of(a)?, of(b)?)
        };
        Ratio {
            requests_per_second: ratio(a.requests_per_second, b.requests_per_second),
            rounds_min: each.first().copied(),
            rounds_median: each.get(each.len() / 2).copied(),
            rounds_max: each.last().copied(),
            latency_average: latency(|latency| latency.average),
            latency_p50: latency(|latency| latency.p50),
            latency_p99: latency(|latency| latency.p99),
            server_cpu_per_request: usage(|server| server.cpu_us_per_request),
            server_rss: usage(|server| Some(server.rss_bytes as f64)),
        }
    }
}

/// Everything a run has found.
#[derive(Serialize, Debug)]
pub struct Report<O: Serialize> {
    pub workload: &'static str,
    pub options: O,
    /// One, or two if compared.
    pub servers: Vec<Outcome>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<Ratio>,
}

/// A line of the table: a name, a value a server, and whether their ratio means something.
struct Row {
    name: String,
    values: Vec<Option<f64>>,
    show: fn(f64) -> String,
    compare: bool,
}

/// The result for a reader: one column a server, and their ratio.
pub fn table<O: Serialize>(report: &Report<O>) -> String {
    let servers = &report.servers;
    let row = |name: &str, show, compare, pick: &dyn Fn(&Outcome) -> Option<f64>| Row {
        name: name.to_owned(),
        values: servers.iter().map(pick).collect(),
        show,
        compare,
    };
    let whole: fn(f64) -> String = |value| format!("{value:.0}");
    let ms: fn(f64) -> String = |us| format!("{:.3} ms", us / 1e3);
    let us: fn(f64) -> String = |us| format!("{us:.1} us");
    let mib: fn(f64) -> String = |bytes| format!("{:.1} MiB", bytes / f64::from(1 << 20));
    let mut rows = vec![
        row("requests", whole, false, &|o| Some(o.requests as f64)),
        row("errors", whole, false, &|o| Some(o.error_count as f64)),
    ];
    if servers.iter().any(|outcome| outcome.unsent > 0) {
        rows.push(row("due and not sent", whole, false, &|o| Some(o.unsent as f64)));
    }
    rows.push(row("elapsed", |s| format!("{s:.3} s"), false, &|o| Some(o.elapsed_s)));
    rows.push(row("requests/s", |rate| format!("{rate:.1}"), true, &|o| {
        Some(o.requests_per_second)
    }));
    let kinds = servers.first().map_or(0, |outcome| outcome.kinds.len());
    for kind in 0..kinds {
        let name = servers[0].kinds[kind].name;
        if kinds > 1 {
            rows.push(row(&format!("{name}s"), whole, false, &|o| {
                Some(o.kinds[kind].count as f64)
            }));
            rows.push(row(&format!("{name}s/s"), |rate| format!("{rate:.1}"), true, &|o| {
                Some(o.kinds[kind].per_second)
            }));
        }
        let picks: [(&str, fn(&Latency) -> f64); 6] = [
            ("average", |latency| latency.average),
            ("p50", |latency| latency.p50),
            ("p90", |latency| latency.p90),
            ("p99", |latency| latency.p99),
            ("p99.9", |latency| latency.p999),
            ("max", |latency| latency.max),
        ];
        for (quantity, pick) in picks {
            rows.push(row(&format!("{name} {quantity}"), ms, true, &|o| {
                Some(pick(&o.kinds[kind].latency_us))
            }));
        }
    }
    if servers.iter().any(|outcome| outcome.watchers_created.is_some()) {
        rows.push(row("watchers created", whole, false, &|o| {
            o.watchers_created.as_ref().map(|created| created.count as f64)
        }));
        rows.push(row("watcher creation p50", ms, true, &|o| {
            o.watchers_created.as_ref().map(|created| created.latency_us.p50)
        }));
    }
    if servers.iter().any(|outcome| outcome.server_usage.is_some()) {
        let usage = |pick: fn(&Server) -> Option<f64>| {
            move |outcome: &Outcome| outcome.server_usage.as_ref().and_then(pick)
        };
        rows.push(row("server CPU/request", us, true, &usage(|server| server.cpu_us_per_request)));
        rows.push(row("server memory", mib, true, &usage(|server| Some(server.rss_bytes as f64))));
        rows.push(row(
            "server memory, most",
            mib,
            true,
            &usage(|server| Some(server.rss_max_bytes as f64)),
        ));
    }
    rows.push(row("client CPU/request", us, true, &|o| o.client_cpu_us_per_request));

    let mut lines: Vec<Vec<String>> = vec![
        std::iter::once(report.workload.to_owned())
            .chain(servers.iter().map(|outcome| outcome.server.clone()))
            .chain((servers.len() == 2).then(|| "ratio".to_owned()))
            .collect(),
        std::iter::once("version".to_owned())
            .chain(servers.iter().map(|outcome| outcome.version.clone()))
            .collect(),
    ];
    for row in rows {
        let shown = |value: &Option<f64>| value.map_or("-".to_owned(), row.show);
        let mut line = vec![row.name.clone()];
        line.extend(row.values.iter().map(shown));
        if let [Some(a), Some(b)] = row.values[..]
            && row.compare
        {
            line.push(ratio(a, b).map_or("-".to_owned(), |ratio| format!("{ratio:.3}")));
        }
        lines.push(line);
    }
    let mut text = aligned(&lines);
    if let Some(Ratio {
        rounds_min: Some(min),
        rounds_median: Some(median),
        rounds_max: Some(max),
        ..
    }) = report.ratio
    {
        writeln!(text, "requests/s, ratio by round: median {median:.3}, from {min:.3} to {max:.3}")
            .expect("a string grows");
    }
    for outcome in servers.iter().filter(|outcome| outcome.error_count > 0) {
        writeln!(text, "errors of {}:", outcome.server).expect("a string grows");
        for (error, count) in &outcome.errors {
            writeln!(text, "{count:>10}  {error}").expect("a string grows");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn outcome(latency: Duration) -> Outcome {
        let start = Instant::now();
        let mut tally = Tally::new(1);
        for _ in 0..100 {
            tally.record(0, start, start + latency);
        }
        let slice = SliceResult {
            tally,
            elapsed: Duration::from_secs(2),
            client_cpu: Duration::from_millis(1),
        };
        let empty = super::super::tally::latencies();
        let mut column = Column::new("a:1".into(), "3.7.1".into(), empty, 1);
        column.add(&slice, &Work::Put { logins: false });
        column.usage = Some(UsageOver {
            before: Usage::default(),
            after: Usage {
                cpu: Duration::from_millis(5),
                rss_bytes: 1 << 20,
                rss_max_bytes: 2 << 20,
            },
        });
        Outcome::new(&column, &Work::Put { logins: false })
    }

    #[test]
    fn figures_add_up() {
        let outcome = outcome(Duration::from_millis(1));
        assert_eq!((outcome.requests, outcome.requests_per_second), (100, 50.0));
        assert_eq!(outcome.client_cpu_us_per_request, Some(10.0));
        assert_eq!(outcome.server_usage.as_ref().unwrap().cpu_us_per_request, Some(50.0));
        assert!((outcome.kinds[0].latency_us.p50 - 1000.0).abs() < 1.0);
    }

    #[test]
    fn two_servers_make_a_ratio() {
        let (a, b) = (outcome(Duration::from_millis(1)), outcome(Duration::from_millis(2)));
        let ratio = Ratio::new(&a, &b, &[(10.0, 5.0), (10.0, 20.0), (10.0, 10.0), (0.0, 1.0)]);
        let rounds = (ratio.rounds_min, ratio.rounds_median, ratio.rounds_max);
        assert_eq!(rounds, (Some(0.5), Some(1.0), Some(2.0)));
        assert!((ratio.latency_p50.unwrap() - 2.0).abs() < 0.01);
        let report =
            Report { workload: "put", options: (), servers: vec![a, b], ratio: Some(ratio) };
        let text = table(&report);
        let p50 = text.lines().find(|line| line.starts_with("put p50")).unwrap();
        let cells: Vec<&str> = p50.split_whitespace().collect();
        assert_eq!(cells, ["put", "p50", "1.000", "ms", "2.001", "ms", "2.000"], "{text}");
        assert!(text.contains("median 1.000, from 0.500 to 2.000"), "{text}");
    }
}
