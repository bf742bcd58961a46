//! What was measured: latencies by kind of operation, and errors by text.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Latencies beyond it are recorded as this.
const LATENCY_MAX: Duration = Duration::from_secs(3600);

/// Different error texts kept apart; a text that holds a number could otherwise fill the memory.
const ERROR_TEXTS_MAX: usize = 100;

/// Counts and latencies of one thread, or of several merged.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Latencies in nanoseconds, three significant digits, one histogram a kind.
    pub kinds: Vec<Histogram<u64>>,
    pub errors: BTreeMap<String, u64>,
    /// Due in an open loop and not sent before the time was over.
    pub unsent: u64,
    /// When the last operation completed.
    pub last: Option<Instant>,
}

/// An empty histogram for latencies.
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX.as_nanos() as u64, 3)
        .expect("the bounds are constants")
}

impl Tally {
    /// For operations of `kinds` different kinds.
    pub fn new(kinds: usize) -> Self {
        Tally { kinds: vec![latencies(); kinds], errors: BTreeMap::new(), unsent: 0, last: None }
    }

    /// Counts one operation of `kind` that took from `start` to `end`.
    pub fn record(&mut self, kind: usize, start: Instant, end: Instant) {
        let latency = end.saturating_duration_since(start).as_nanos();
        self.kinds[kind].saturating_record(u64::try_from(latency).unwrap_or(u64::MAX).max(1));
        self.last = self.last.max(Some(end));
    }

    /// As [`Tally::record`], for what goes on beside the load: it may end after the load has.
    pub fn record_beside(&mut self, kind: usize, start: Instant, end: Instant) {
        let last = self.last;
        self.record(kind, start, end);
        self.last = last;
    }

    /// Counts one failure.
    pub fn error(&mut self, text: String, end: Instant) {
        let full = self.errors.len() >= ERROR_TEXTS_MAX && !self.errors.contains_key(&text);
        let text = if full { "other errors".to_owned() } else { text };
        *self.errors.entry(text).or_default() += 1;
        self.last = self.last.max(Some(end));
    }

    /// Adds what another thread or slice has measured.
    ///
    /// # Panics
    /// If it measured other kinds.
    pub fn merge(&mut self, other: &Tally) {
        assert_eq!(self.kinds.len(), other.kinds.len(), "tallies of one workload");
        for (mine, theirs) in self.kinds.iter_mut().zip(&other.kinds) {
            mine.add(theirs).expect("all histograms have the same bounds");
        }
        for (text, count) in &other.errors {
            *self.errors.entry(text.clone()).or_default() += count;
        }
        self.unsent += other.unsent;
        self.last = self.last.max(other.last);
    }

    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_adds_everything() {
        let start = Instant::now();
        let end = start + Duration::from_micros(500);
        let mut a = Tally::new(2);
        a.record(1, start, end);
        a.error("x".into(), start);
        let mut b = a.clone();
        b.record(0, end, start); // a clock never runs backwards, but an event may beat its reply
        b.unsent = 3;
        a.merge(&b);
        assert_eq!((a.kinds[0].len(), a.kinds[1].len()), (1, 2));
        assert_eq!((a.error_count(), a.unsent, a.last), (2, 3, Some(end)));
        assert!(a.kinds[1].max().abs_diff(500_000) < 500);
    }

    #[test]
    fn error_texts_are_bounded() {
        let mut tally = Tally::new(0);
        let now = Instant::now();
        for number in 0..150 {
            tally.error(format!("error {number}"), now);
        }
        assert_eq!(tally.error_count(), 150);
        assert_eq!(tally.errors.len(), ERROR_TEXTS_MAX + 1);
        assert_eq!(tally.errors["other errors"], 50);
    }
}
