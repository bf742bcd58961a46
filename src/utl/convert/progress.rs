//! How far a conversion is: a bar on a terminal, nothing elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows steps, one after the other.
pub struct Progress(ProgressBar);

impl Progress {
    /// Draws on stderr, if that is a terminal.
    pub fn on_terminal() -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let template = "{prefix:<12} {wide_bar} {bytes}/{total_bytes} {eta}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Progress(bar)
    }

    /// Draws nothing.
    pub fn hidden() -> Self {
        Progress(ProgressBar::hidden())
    }

    /// Begins a step over so many bytes.
    pub fn step(&self, name: &'static str, bytes: u64) {
        self.0.reset();
        self.0.set_length(bytes);
        self.0.set_prefix(name);
    }

    pub fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
