//! Where samples live: families by name, series by labels, every value an atomic that is read at scrape time.
//!
//! The handles given out are those of the `metrics` facade, and [`Registry`] is a
//! [`metrics::Recorder`], so the facade's macros reach the same families. A recorder of our own,
//! instead of metrics-exporter-prometheus, because there
//! - a histogram keeps every sample in a queue until someone drains it (16 bytes each, so memory
//!   grows with load), while here a sample is two atomic additions into its bucket;
//! - a counter cannot be a fraction (`process_cpu_seconds_total`), and numbers are not written as
//!   Go writes them (`2.147483648e+09`), so that a comparison with etcd's page never comes out equal;
//! - families come in random order, and a label value that ends in backslashes loses one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use parking_lot::RwLock;

/// Most series that one family holds. Some labels come from outside (a peer's address), and a page
/// that grows with them would end as a memory leak; what exceeds the bound is not counted.
pub const SERIES_MAX: usize = 4096;

/// The bounds that a histogram made through the facade's macros gets: Prometheus' defaults, seconds.
pub const DEFAULT_BOUNDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What the TYPE line says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    /// The word on the TYPE line.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

#[derive(Default)]
struct CounterCell(AtomicU64);

impl CounterFn for CounterCell {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Relaxed);
    }

    fn absolute(&self, value: u64) {
        self.0.fetch_max(value, Relaxed);
    }
}

/// The bits of an `f64`; 0 is 0.0.
#[derive(Default)]
struct FloatCell(AtomicU64);

impl FloatCell {
    fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }

    fn add(&self, value: f64) {
        let mut old = self.0.load(Relaxed);
        loop {
            let new = (f64::from_bits(old) + value).to_bits();
            match self.0.compare_exchange_weak(old, new, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(current) => old = current,
            }
        }
    }
}

impl GaugeFn for FloatCell {
    fn increment(&self, value: f64) {
        self.add(value);
    }

    fn decrement(&self, value: f64) {
        self.add(-value);
    }

    fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Relaxed);
    }
}

struct HistogramCell {
    bounds: Arc<[f64]>,
    /// One count per bound and one for what exceeds them all; not cumulative.
    counts: Box<[AtomicU64]>,
    sum: FloatCell,
}

impl HistogramCell {
    fn new(bounds: Arc<[f64]>) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        HistogramCell { bounds, counts, sum: FloatCell::default() }
    }
}

impl HistogramFn for HistogramCell {
    fn record(&self, value: f64) {
        self.record_many(value, 1);
    }

    fn record_many(&self, value: f64, count: usize) {
        // A bound belongs to its bucket. NaN is below nothing, so it lands past the last bound.
        let bucket = self.bounds.iter().position(|b| value <= *b).unwrap_or(self.bounds.len());
        self.counts[bucket].fetch_add(count as u64, Relaxed);
        self.sum.add(value * count as f64);
    }
}

/// A counter whose value is read from elsewhere and may be a fraction.
#[derive(Clone)]
pub struct FloatCounter(Arc<FloatCell>);

impl FloatCounter {
    /// Shows `value` from now on; the source must not go back.
    pub fn set(&self, value: f64) {
        self.0.set(value);
    }
}

#[derive(Clone)]
enum Cell {
    Counter(Arc<CounterCell>),
    Float(Arc<FloatCell>),
    Histogram(Arc<HistogramCell>),
}

/// All series of one name.
pub struct Family {
    name: Cow<'static, str>,
    kind: Kind,
    /// Empty until described, for a family that the facade's macros made.
    help: RwLock<Cow<'static, str>>,
    /// In the order in which values are given.
    labels: &'static [&'static str],
    bounds: Arc<[f64]>,
    /// By the text between the braces, labels sorted by name: `code="200",path="/"`.
    series: RwLock<BTreeMap<String, Cell>>,
}

impl Family {
    /// The existing series of these label values, or a new one; `None` if there are [`SERIES_MAX`].
    ///
    /// # Panics
    /// If the number of values is not that of the labels.
    fn cell(&self, values: &[&str], make: impl FnOnce(&Arc<[f64]>) -> Cell) -> Option<Cell> {
        assert_eq!(values.len(), self.labels.len(), "a value for each label of {}", self.name);
        let mut pairs: Vec<_> = self.labels.iter().copied().zip(values.iter().copied()).collect();
        self.cell_of_pairs(&mut pairs, make)
    }

    fn cell_of_pairs(
        &self,
        pairs: &mut [(&str, &str)],
        make: impl FnOnce(&Arc<[f64]>) -> Cell,
    ) -> Option<Cell> {
        pairs.sort_unstable();
        let key = write_labels(pairs);
        if let Some(cell) = self.series.read().get(&key) {
            return Some(cell.clone());
        }
        let mut series = self.series.write();
        if series.len() >= SERIES_MAX && !series.contains_key(&key) {
            return None;
        }
        Some(series.entry(key).or_insert_with(|| make(&self.bounds)).clone())
    }

    fn counter(&self, values: &[&str]) -> Counter {
        match self.cell(values, |_| Cell::Counter(Arc::default())) {
            Some(Cell::Counter(cell)) => Counter::from_arc(cell),
            _ => Counter::noop(),
        }
    }

    fn gauge(&self, values: &[&str]) -> Gauge {
        match self.cell(values, |_| Cell::Float(Arc::default())) {
            Some(Cell::Float(cell)) => Gauge::from_arc(cell),
            _ => Gauge::noop(),
        }
    }

    fn histogram(&self, values: &[&str]) -> Histogram {
        match self.cell(values, |b| Cell::Histogram(Arc::new(HistogramCell::new(b.clone())))) {
            Some(Cell::Histogram(cell)) => Histogram::from_arc(cell),
            _ => Histogram::noop(),
        }
    }

    fn float_counter(&self) -> FloatCounter {
        match self.cell(&[], |_| Cell::Float(Arc::default())) {
            Some(Cell::Float(cell)) => FloatCounter(cell),
            _ => unreachable!("{} holds one series, and a float", self.name),
        }
    }

    fn render(&self, out: &mut String) {
        let series = self.series.read();
        if series.is_empty() {
            return; // as in Go: no header without a sample
        }
        let help = self.help.read();
        if !help.is_empty() {
            let help = help.replace('\\', "\\\\").replace('\n', "\\n");
            let _ = writeln!(out, "# HELP {} {help}", self.name);
        }
        let _ = writeln!(out, "# TYPE {} {}", self.name, self.kind.name());
        for (labels, cell) in series.iter() {
            match cell {
                Cell::Counter(cell) => {
                    self.sample(out, "", labels, None, cell.0.load(Relaxed) as f64);
                }
                Cell::Float(cell) => self.sample(out, "", labels, None, cell.get()),
                Cell::Histogram(cell) => {
                    // The count is the sum of what was read here, never a number of its own, so that
                    // it equals the +Inf bucket while samples come in.
                    let mut total = 0;
                    let bounds = cell.bounds.iter().copied().chain([f64::INFINITY]);
                    for (bound, count) in bounds.zip(&cell.counts) {
                        total += count.load(Relaxed);
                        self.sample(out, "_bucket", labels, Some(bound), total as f64);
                    }
                    self.sample(out, "_sum", labels, None, cell.sum.get());
                    self.sample(out, "_count", labels, None, total as f64);
                }
            }
        }
    }

    fn sample(&self, out: &mut String, suffix: &str, labels: &str, le: Option<f64>, value: f64) {
        out.push_str(&self.name);
        out.push_str(suffix);
        match le {
            None if labels.is_empty() => {}
            None => {
                out.push('{');
                out.push_str(labels);
                out.push('}');
            }
            Some(le) => {
                out.push('{');
                out.push_str(labels);
                if !labels.is_empty() {
                    out.push(',');
                }
                out.push_str("le=\"");
                write_number(out, le);
                out.push_str("\"}");
            }
        }
        out.push(' ');
        write_number(out, value);
        out.push('\n');
    }
}

/// A family with labels whose series are counters.
#[derive(Clone)]
pub struct CounterVec(Arc<Family>);

impl CounterVec {
    /// The series with these label values, in the order of the catalogue. A search by text: where it
    /// happens often, keep the handle.
    ///
    /// # Panics
    /// If the number of values is not that of the labels.
    pub fn with(&self, values: &[&str]) -> Counter {
        self.0.counter(values)
    }
}

/// A family with labels whose series are gauges.
#[derive(Clone)]
pub struct GaugeVec(Arc<Family>);

impl GaugeVec {
    /// As [`CounterVec::with`].
    ///
    /// # Panics
    /// If the number of values is not that of the labels.
    pub fn with(&self, values: &[&str]) -> Gauge {
        self.0.gauge(values)
    }
}

/// A family with labels whose series are histograms.
#[derive(Clone)]
pub struct HistogramVec(Arc<Family>);

impl HistogramVec {
    /// As [`CounterVec::with`].
    ///
    /// # Panics
    /// If the number of values is not that of the labels.
    pub fn with(&self, values: &[&str]) -> Histogram {
        self.0.histogram(values)
    }
}

/// What a line of the catalogue can be: how it makes its handle from its family.
pub trait Instrument: Sized {
    const KIND: Kind;

    fn of(family: &Arc<Family>) -> Self;
}

macro_rules! instrument {
    ($($type:ty, $kind:ident, $family:ident => $make:expr;)*) => {
        $(impl Instrument for $type {
            const KIND: Kind = Kind::$kind;

            fn of($family: &Arc<Family>) -> Self {
                $make
            }
        })*
    };
}

instrument! {
    Counter, Counter, family => family.counter(&[]);
    FloatCounter, Counter, family => family.float_counter();
    Gauge, Gauge, family => family.gauge(&[]);
    Histogram, Histogram, family => family.histogram(&[]);
    CounterVec, Counter, family => CounterVec(family.clone());
    GaugeVec, Gauge, family => GaugeVec(family.clone());
    HistogramVec, Histogram, family => HistogramVec(family.clone());
}

/// All families, sorted by name. Clones share them.
#[derive(Clone, Default)]
pub struct Registry {
    families: Arc<RwLock<BTreeMap<Cow<'static, str>, Arc<Family>>>>,
}

impl Registry {
    /// Adds a family and answers its handle.
    ///
    /// # Panics
    /// If the name is taken.
    pub fn register<I: Instrument>(
        &self,
        name: &'static str,
        labels: &'static [&'static str],
        bounds: &[f64],
        help: &'static str,
    ) -> I {
        let family = Arc::new(Family {
            name: name.into(),
            kind: I::KIND,
            help: RwLock::new(help.into()),
            labels,
            bounds: bounds.into(),
            series: RwLock::default(),
        });
        let handle = I::of(&family);
        let taken = self.families.write().insert(name.into(), family);
        assert!(taken.is_none(), "metric {name} is registered twice");
        handle
    }

    /// Everything in Prometheus' text format 0.0.4, sorted by name and labels, as Go writes it.
    pub fn render(&self) -> String {
        let families: Vec<_> = self.families.read().values().cloned().collect();
        let mut out = String::with_capacity(64 << 10);
        for family in families {
            family.render(&mut out);
        }
        out
    }

    fn family(&self, name: &KeyName, kind: Kind) -> Arc<Family> {
        let name = clean_name(name.as_str());
        if let Some(family) = self.families.read().get(name.as_str()) {
            return family.clone();
        }
        let mut families = self.families.write();
        let family = families.entry(name.clone().into()).or_insert_with(|| {
            Arc::new(Family {
                name: name.into(),
                kind,
                help: RwLock::default(),
                labels: &[],
                bounds: DEFAULT_BOUNDS.into(),
                series: RwLock::default(),
            })
        });
        family.clone()
    }

    fn describe(&self, name: &KeyName, kind: Kind, help: SharedString) {
        let family = self.family(name, kind);
        let mut known = family.help.write();
        if known.is_empty() {
            *known = Cow::Owned(help.into_owned());
        }
    }

    fn facade_cell(
        &self,
        key: &Key,
        kind: Kind,
        make: impl FnOnce(&Arc<[f64]>) -> Cell,
    ) -> Option<Cell> {
        let family = self.family(&key.name_shared(), kind);
        if family.kind != kind {
            return None; // a series of another type would spoil the whole page
        }
        let labels: Vec<_> = key.labels().map(|l| (clean_name(l.key()), l.value())).collect();
        let mut pairs: Vec<_> = labels.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        family.cell_of_pairs(&mut pairs, make)
    }
}

impl Recorder for Registry {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        self.describe(&name, Kind::Counter, help);
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        self.describe(&name, Kind::Gauge, help);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, help: SharedString) {
        self.describe(&name, Kind::Histogram, help);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        match self.facade_cell(key, Kind::Counter, |_| Cell::Counter(Arc::default())) {
            Some(Cell::Counter(cell)) => Counter::from_arc(cell),
            _ => Counter::noop(),
        }
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        match self.facade_cell(key, Kind::Gauge, |_| Cell::Float(Arc::default())) {
            Some(Cell::Float(cell)) => Gauge::from_arc(cell),
            _ => Gauge::noop(),
        }
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        let make = |b: &Arc<[f64]>| Cell::Histogram(Arc::new(HistogramCell::new(b.clone())));
        match self.facade_cell(key, Kind::Histogram, make) {
            Some(Cell::Histogram(cell)) => Histogram::from_arc(cell),
            _ => Histogram::noop(),
        }
    }
}

/// `count` bounds: `first`, `first * factor`, `first * factor²`... multiplied step by step, which is
/// how etcd's come to their last digit.
pub fn exponential(first: f64, factor: f64, count: usize) -> Vec<f64> {
    std::iter::successors(Some(first), |b| Some(b * factor)).take(count).collect()
}

/// A name of the facade with every character replaced that Prometheus does not allow.
fn clean_name(name: &str) -> String {
    let clean = |(i, c): (usize, char)| {
        let allowed =
            c.is_ascii_alphabetic() || c == '_' || c == ':' || i > 0 && c.is_ascii_digit();
        if allowed { c } else { '_' }
    };
    name.chars().enumerate().map(clean).collect()
}

fn write_labels(pairs: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (name, value) in pairs {
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(name);
        out.push_str("=\"");
        for c in value.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    out
}

/// Writes `value` as Go's `%g` of shortest precision does: an exponent below 1e-4 and from 1e+06
/// (1e21 for whole numbers of few digits is Go's rule for JSON, not for this format).
fn write_number(out: &mut String, value: f64) {
    if value.is_nan() {
        return out.push_str("NaN");
    }
    if value.is_infinite() {
        return out.push_str(if value > 0.0 { "+Inf" } else { "-Inf" });
    }
    let magnitude = value.abs();
    if magnitude == 0.0 || (1e-4..1e6).contains(&magnitude) {
        let _ = write!(out, "{value}");
        return;
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').expect("the format has an exponent");
    let exponent: i32 = exponent.parse().expect("an exponent is a number");
    let sign = if exponent < 0 { '-' } else { '+' };
    let _ = write!(out, "{digits}e{sign}{:02}", exponent.abs());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(value: f64) -> String {
        let mut out = String::new();
        write_number(&mut out, value);
        out
    }

    #[test]
    fn numbers_are_written_as_go_writes_them() {
        for (value, text) in [
            (0.0, "0"),
            (-1.0, "-1"),
            (0.005, "0.005"),
            (1e-4, "0.0001"),
            (4.6519000000000006e-05, "4.6519000000000006e-05"),
            (524288.0, "524288"),
            (999_999.0, "999999"),
            (1e6, "1e+06"),
            (8_388_608.0, "8.388608e+06"),
            (2_147_483_648.0, "2.147483648e+09"),
            (1_795_197_607.49, "1.79519760749e+09"),
            (u64::MAX as f64, "1.8446744073709552e+19"),
            (1e100, "1e+100"),
            (f64::INFINITY, "+Inf"),
            (f64::NEG_INFINITY, "-Inf"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn a_bound_belongs_to_its_bucket_and_counts_accumulate() {
        let registry = Registry::default();
        let seconds: Histogram = registry.register("h", &[], &exponential(1.0, 2.0, 3), "help");
        for value in [0.5, 1.0, 1.5, 4.0, 4.5] {
            seconds.record(value);
        }
        assert_eq!(
            registry.render(),
            "# HELP h help\n# TYPE h histogram\n\
             h_bucket{le=\"1\"} 2\nh_bucket{le=\"2\"} 3\nh_bucket{le=\"4\"} 4\nh_bucket{le=\"+Inf\"} 5\n\
             h_sum 11.5\nh_count 5\n"
        );
    }

    #[test]
    fn a_sample_that_is_no_number_is_counted_past_the_last_bound() {
        let registry = Registry::default();
        let h: Histogram = registry.register("h", &[], &[1.0], "");
        h.record(f64::NAN);
        let page = registry.render();
        assert!(page.contains("h_bucket{le=\"1\"} 0\nh_bucket{le=\"+Inf\"} 1\n"), "{page}");
    }

    #[test]
    fn families_and_series_are_sorted_labels_escaped_and_empty_families_hidden() {
        let registry = Registry::default();
        let b: CounterVec = registry.register("b", &["y", "x"], &[], "two\nlines");
        let _hidden: GaugeVec = registry.register("c", &["x"], &[], "");
        let a: Gauge = registry.register("a_total", &[], &[], "");
        b.with(&["2", "q\"\\\n"]).increment(3);
        b.with(&["1", "a"]).increment(1);
        b.with(&["1", "a"]).increment(1);
        a.set(-1);
        assert_eq!(
            registry.render(),
            "# TYPE a_total gauge\na_total -1\n\
             # HELP b two\\nlines\n# TYPE b counter\n\
             b{x=\"a\",y=\"1\"} 2\nb{x=\"q\\\"\\\\\\n\",y=\"2\"} 3\n"
        );
    }

    #[test]
    fn a_family_stops_growing_at_its_bound_and_known_series_go_on() {
        let registry = Registry::default();
        let vec: CounterVec = registry.register("c", &["from"], &[], "");
        for i in 0..SERIES_MAX + 10 {
            vec.with(&[&i.to_string()]).increment(1);
        }
        vec.with(&["0"]).increment(1);
        let page = registry.render();
        assert_eq!(page.lines().count(), SERIES_MAX + 1);
        assert!(page.contains("c{from=\"0\"} 2\n"));
    }

    #[test]
    fn the_macros_of_the_facade_reach_the_same_families() {
        let registry = Registry::default();
        let known: Counter = registry.register("known_total", &[], &[], "first");
        known.increment(1);
        metrics::with_local_recorder(&registry, || {
            metrics::describe_counter!("known_total", "second");
            metrics::counter!("known_total").increment(2);
            metrics::gauge!("known_total").set(7.0); // of another type: ignored
            metrics::describe_histogram!("new.seconds", "made by a macro");
            metrics::histogram!("new.seconds", "z" => "1", "a" => "2").record(0.3);
        });
        let page = registry.render();
        assert!(
            page.starts_with(
                "# HELP known_total first\n# TYPE known_total counter\nknown_total 3\n"
            )
        );
        assert!(
            page.contains("# HELP new_seconds made by a macro\n# TYPE new_seconds histogram\n")
        );
        assert!(page.contains("new_seconds_bucket{a=\"2\",z=\"1\",le=\"0.5\"} 1\n"), "{page}");
    }

    #[test]
    fn samples_of_many_threads_are_all_counted() {
        let registry = Registry::default();
        let counter: Counter = registry.register("c", &[], &[], "");
        let gauge: Gauge = registry.register("g", &[], &[], "");
        let histogram: Histogram = registry.register("h", &[], &[1.0], "");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counter.increment(1);
                        gauge.increment(2);
                        gauge.decrement(1);
                        histogram.record(0.5);
                    }
                });
            }
        });
        let page = registry.render();
        for line in ["c 4000", "g 4000", "h_sum 2000", "h_count 4000"] {
            assert!(page.lines().any(|l| l == line), "{line} in {page}");
        }
    }
}
