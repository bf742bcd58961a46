//! The batch committer: the engine's single writer.
//!
//! in:  `Commit` from actors/applier.rs, one at a time
//! out: `Committed` to actors/applier.rs
//!
//! It is alone on its thread, because an engine commit blocks.

use std::sync::Arc;

use actix::prelude::*;
use engine_api::{Batch, Durability, Engine};

use crate::actors::exit::Exit;
use crate::actors::shared::Shared;
use crate::core::types::Index;
use crate::metrics::Metrics;

/// A batch for the engine.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Commit {
    pub engine: Arc<dyn Engine>,
    pub batch: Batch,
    /// The applied index that the batch brings the engine to.
    pub index: Index,
    pub durability: Durability,
}

/// The engine holds everything up to this index.
#[derive(Message, Clone, Copy, PartialEq, Eq, Debug)]
#[rtype(result = "()")]
pub struct Committed {
    pub index: Index,
    pub durable: bool,
}

/// Owns the right to write to the engine.
pub struct BatchCommitter {
    applier: Recipient<Committed>,
    shared: Arc<Shared>,
    exit: Exit,
    metrics: &'static Metrics,
}

impl BatchCommitter {
    /// A committer that reports to `applier`.
    pub fn new(applier: Recipient<Committed>, shared: Arc<Shared>, exit: Exit) -> Self {
        BatchCommitter { applier, shared, exit, metrics: Metrics::global() }
    }
}

impl Actor for BatchCommitter {
    type Context = Context<Self>;
}

impl Handler<Commit> for BatchCommitter {
    type Result = ();

    fn handle(&mut self, commit: Commit, _: &mut Self::Context) {
        let started = std::time::Instant::now();
        if let Err(error) = commit.engine.commit(&commit.batch, commit.durability) {
            // The applier gets no answer, so it cuts no further batch and the member stops.
            return self.exit.fail("storage engine", &error);
        }
        self.metrics.backend_commit_seconds.record(started.elapsed());
        self.shared.measure_at(&*commit.engine, commit.index);
        let durable = commit.durability == Durability::Durable;
        // One commit is in flight at a time, so at most one answer is.
        self.applier.do_send(Committed { index: commit.index, durable });
    }
}
