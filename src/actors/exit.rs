//! How a part of the member says that the member cannot go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

/// Why the member stops by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// A part failed: `part` and its error. Exit code 1.
    Failed { part: &'static str, error: String },
    /// This member was removed from the cluster. Exit code 0.
    Removed,
}

/// An error with its causes, each said once.
pub fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let said = inner.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = inner.source();
    }
    text
}

/// Given to every actor that owns something that can fail.
#[derive(Clone)]
pub struct Exit {
    failed: Arc<AtomicBool>,
    reasons: mpsc::UnboundedSender<Reason>,
}

impl Exit {
    /// The handle, and where the daemon waits for the first reason.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Reason>) {
        let (reasons, receiver) = mpsc::unbounded_channel();
        (Exit { failed: Arc::default(), reasons }, receiver)
    }

    /// Reports a failure. From here on nothing may be acknowledged that needs the failed part.
    pub fn fail(&self, part: &'static str, error: &dyn std::error::Error) {
        let text = full(error);
        if !self.failed.swap(true, Ordering::AcqRel) {
            tracing::error!(part, error = %text, "member cannot go on and stops");
        }
        // The daemon that would receive it may be gone already: then the process is ending anyway.
        drop(self.reasons.send(Reason::Failed { part, error: text }));
    }

    /// This member was removed from the cluster: it stops, and that is no failure.
    pub fn removed(&self) {
        drop(self.reasons.send(Reason::Removed));
    }

    /// Whether some part has failed.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}
