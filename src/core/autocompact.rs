//! When the leader compacts by itself (operations 6.1).

use std::collections::VecDeque;

use super::types::Uptime;

const HOUR_MS: u64 = 3_600_000;
const REVISION_INTERVAL_MS: u64 = 300_000;

/// What history to keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Retention {
    Off,
    /// Everything of this many milliseconds, which are more than 0.
    Periodic(u64),
    /// This many revisions, more than 0.
    Revisions(i64),
}

/// The compactor's memory of past revisions.
///
/// Periodic: the current revision is noted ten times an interval, which is the period or an hour,
/// whichever is shorter; what was current a period ago is compacted once an interval.
#[derive(Clone, Debug)]
pub struct AutoCompaction {
    retention: Retention,
    noted: VecDeque<i64>,
    next: Option<Uptime>,
    last_success: Uptime,
    /// Milliseconds that must lie between two successes.
    between_ms: u64,
    last_compacted: i64,
}

impl AutoCompaction {
    /// Nothing happens before [`AutoCompaction::start`].
    pub fn new(retention: Retention) -> Self {
        AutoCompaction {
            retention,
            noted: VecDeque::new(),
            next: None,
            last_success: Uptime(0),
            between_ms: 0,
            last_compacted: 0,
        }
    }

    fn interval_ms(period_ms: u64) -> u64 {
        period_ms.min(HOUR_MS)
    }

    fn step_ms(period_ms: u64) -> u64 {
        (Self::interval_ms(period_ms) / 10).max(1)
    }

    /// Starts the clock.
    pub fn start(&mut self, now: Uptime) {
        self.last_success = now;
        self.next = match self.retention {
            Retention::Off => None,
            Retention::Periodic(period_ms) => {
                self.between_ms = period_ms;
                Some(now)
            }
            Retention::Revisions(_) => Some(now.plus_ms(REVISION_INTERVAL_MS)),
        };
    }

    /// When [`AutoCompaction::step`] is due; `None` for never.
    pub fn next_step(&self) -> Option<Uptime> {
        self.next
    }

    /// Notes the current revision; answers the revision to compact at, if it is time and this
    /// member leads. The outcome comes back by [`AutoCompaction::done`].
    pub fn step(&mut self, now: Uptime, revision: i64, leading: bool) -> Option<i64> {
        match self.retention {
            Retention::Off => None,
            Retention::Periodic(period_ms) => {
                let step_ms = Self::step_ms(period_ms);
                self.next = Some(now.plus_ms(step_ms));
                let candidate = self.noted.front().copied();
                self.noted.push_back(revision);
                let window = (period_ms / step_ms + 1) as usize;
                while self.noted.len() > window {
                    self.noted.pop_front();
                }
                // The oldest note was made before this step's pause, as the newest one was not.
                let candidate = candidate.filter(|_| leading)?;
                let due = now.since_ms(self.last_success) >= self.between_ms;
                if !due || candidate == self.last_compacted {
                    return None;
                }
                self.between_ms = Self::interval_ms(period_ms);
                Some(candidate)
            }
            Retention::Revisions(keep) => {
                self.next = Some(now.plus_ms(REVISION_INTERVAL_MS));
                let target = revision - keep;
                (leading && target > 0 && target != self.last_compacted).then_some(target)
            }
        }
    }

    /// A compaction that [`AutoCompaction::step`] asked for has ended. A failed one is tried again
    /// at the next step.
    pub fn done(&mut self, now: Uptime, at: i64, success: bool) {
        if success {
            self.last_success = now;
            self.last_compacted = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs with one revision a second; answers (second, revision compacted at).
    fn run(retention: Retention, seconds: u64) -> Vec<(u64, i64)> {
        let mut auto = AutoCompaction::new(retention);
        let mut compacted = Vec::new();
        auto.start(Uptime(0));
        while let Some(now) = auto.next_step().filter(|at| at.0 <= seconds * 1000) {
            let second = now.0 / 1000;
            if let Some(at) = auto.step(now, second as i64 + 1, true) {
                compacted.push((second, at));
                auto.done(now, at, true);
            }
        }
        compacted
    }

    #[test]
    fn a_short_period_compacts_every_period_to_a_period_ago() {
        // The oldest of the eleven notes kept was made a period and one step before (operations 6.1:
        // note, keep eleven, sleep a step, take the oldest).
        assert_eq!(run(Retention::Periodic(600_000), 1900), [(600, 1), (1200, 541), (1800, 1141)]);
    }

    #[test]
    fn a_long_period_compacts_hourly_to_a_period_ago() {
        let compacted = run(Retention::Periodic(2 * HOUR_MS), 4 * 3600);
        assert_eq!(compacted, [(7200, 1), (10800, 3241), (14400, 6841)]);
    }

    #[test]
    fn revisions_are_counted_every_five_minutes() {
        assert_eq!(run(Retention::Revisions(400), 1000), [(600, 201), (900, 501)]);
        assert_eq!(run(Retention::Off, 1000), []);
    }

    #[test]
    fn a_follower_notes_but_does_not_compact() {
        let mut auto = AutoCompaction::new(Retention::Periodic(1000));
        auto.start(Uptime(0));
        for step in 0..30 {
            assert_eq!(auto.step(Uptime(step * 100), step as i64, false), None);
        }
        assert_eq!(auto.step(Uptime(3000), 30, true), Some(19));
        auto.done(Uptime(3000), 19, false);
        assert_eq!(auto.step(Uptime(3100), 31, true), Some(20), "a failure is tried again");
    }
}
