//! Memory and space of a process over time.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::engines::files;
use super::process::{self, ProcessError};
use super::report::model::{Figure, Group, Measure, Sample};

/// Between two samples, at first.
const INTERVAL: Duration = Duration::from_millis(250);

/// Samples that are kept. When there are more, every second one goes and the interval doubles.
const SAMPLES_MAX: usize = 400;

/// Collects samples.
pub struct Sampler {
    start: Instant,
    next: Instant,
    interval: Duration,
    phase: String,
    samples: Vec<Sample>,
    /// The greatest values of all samples, kept or not.
    most: Most,
}

#[derive(Clone, Copy, Default, Debug)]
struct Most {
    rss: u64,
    anonymous: u64,
    cached: u64,
    disk: u64,
}

impl Sampler {
    pub fn new() -> Self {
        let now = Instant::now();
        Sampler {
            start: now,
            next: now,
            interval: INTERVAL,
            phase: String::new(),
            samples: Vec::new(),
            most: Most::default(),
        }
    }

    /// Another workload begins; a sample is due.
    pub fn phase(&mut self, name: &str) {
        name.clone_into(&mut self.phase);
        self.next = Instant::now();
    }

    /// Takes a sample if one is due. A process that has ended gives none.
    ///
    /// # Errors
    /// If its files cannot be examined.
    pub fn look(&mut self, pid: u32, dir: &Path) -> io::Result<()> {
        let now = Instant::now();
        if now < self.next {
            return Ok(());
        }
        self.next = now + self.interval;
        let memory = match process::memory(pid) {
            Ok(memory) => memory,
            Err(ProcessError::Read { .. } | ProcessError::Format { .. }) => return Ok(()),
        };
        let sample = Sample {
            at_s: (now - self.start).as_secs_f64(),
            phase: self.phase.clone(),
            rss_bytes: memory.rss_bytes,
            pss_bytes: memory.pss_bytes,
            anonymous_bytes: memory.anonymous_bytes,
            cached_bytes: files::cached(dir)?.cached,
            disk_bytes: files::survey(dir)?.occupied,
        };
        self.most = Most {
            rss: self.most.rss.max(sample.rss_bytes),
            anonymous: self.most.anonymous.max(sample.anonymous_bytes),
            cached: self.most.cached.max(sample.cached_bytes),
            disk: self.most.disk.max(sample.disk_bytes),
        };
        self.samples.push(sample);
        if self.samples.len() > SAMPLES_MAX {
            let mut number = 0;
            self.samples.retain(|_| {
                number += 1;
                number % 2 == 1
            });
            self.interval *= 2;
        }
        Ok(())
    }

    /// What the files have taken at most so far.
    pub fn disk_most(&self) -> u64 {
        self.most.disk
    }

    /// The samples, and the greatest values as figures.
    pub fn finish(self) -> (Vec<Sample>, Vec<Measure>) {
        let measure = |workload: &str, title: &str, group, bytes| Measure {
            workload: workload.to_owned(),
            group,
            title: title.to_owned(),
            durability: None,
            cache: None,
            figure: Figure::Bytes { bytes },
        };
        let most = self.most;
        let mut measures = Vec::new();
        if !self.samples.is_empty() {
            measures.extend([
                measure("memory-rss", "Resident set, at most", Group::Memory, most.rss),
                measure(
                    "memory-anonymous",
                    "Memory of its own (no file's), at most",
                    Group::Memory,
                    most.anonymous,
                ),
            ]);
        }
        // An engine in memory has no files.
        if most.disk > 0 {
            measures.push(measure(
                "memory-cached",
                "Its files in the page cache, at most",
                Group::Memory,
                most.cached,
            ));
            let title = "At most, during everything";
            measures.push(measure("space-most", title, Group::Space, most.disk));
        }
        (self.samples, measures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_thinned_and_the_most_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), [1; 10_000]).unwrap();
        std::fs::File::open(dir.path().join("a")).unwrap().sync_all().unwrap();
        let mut sampler = Sampler::new();
        for number in 0..=SAMPLES_MAX {
            sampler.phase(&format!("phase {number}"));
            sampler.look(std::process::id(), dir.path()).unwrap();
        }
        assert_eq!((sampler.samples.len(), sampler.interval), (201, INTERVAL * 2));
        // None is due before its time.
        sampler.look(std::process::id(), dir.path()).unwrap();
        assert_eq!(sampler.samples.len(), 201);
        assert!(sampler.disk_most() >= 10_000);
        let (samples, measures) = sampler.finish();
        assert_eq!(samples[1].phase, "phase 2");
        assert!(samples.is_sorted_by(|a, b| a.at_s <= b.at_s));
        assert!(samples.iter().all(|sample| sample.rss_bytes > 0 && sample.cached_bytes == 10_000));
        assert_eq!(measures.len(), 4);
    }

    #[test]
    fn a_process_that_has_ended_gives_no_sample() {
        let mut sampler = Sampler::new();
        sampler.look(u32::MAX, Path::new("absent")).unwrap();
        let (samples, measures) = sampler.finish();
        assert!(samples.is_empty() && measures.is_empty());
    }
}
