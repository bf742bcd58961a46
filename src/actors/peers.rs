//! What the rest of the member and its peer network say to each other. The network itself is
//! transport/peer: one actor that knows everyone, and one for each peer.
//!
//! raft ── `Send` ──► network          network ── `Step`, `Unreachable`, `SnapshotDone` ──► raft
//! applier ── `Members` ──► network

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use parking_lot::Mutex;
use quorate_proto::raftpb;

use crate::core::membership::Membership;
use crate::core::types::MemberId;

/// Messages of raft for other members, in the order in which they are to leave. One that cannot be
/// delivered is dropped, and raft is told by `Unreachable`.
#[derive(Message, Default, Debug)]
#[rtype(result = "()")]
pub struct Send(pub Vec<raftpb::Message>);

/// The members as they are after an applied change: those who are new are dialled, those who were
/// removed are dropped, changed peer URLs are taken over.
#[derive(Message, Clone, Debug)]
#[rtype(result = "()")]
pub struct Members(pub Arc<Membership>);

/// `Send`s that wait for the network. Raft drops what finds no room: each message can be lost anyway,
/// and followers are asked again.
pub const MAILBOX: usize = 4096;

/// Who can be reached: kept by the network, read by everyone.
#[derive(Default, Debug)]
pub struct Liveness(Mutex<HashMap<MemberId, Instant>>);

impl Liveness {
    /// `id` can be reached from now on, if it could not before.
    pub fn up(&self, id: MemberId) {
        self.0.lock().entry(id).or_insert_with(Instant::now);
    }

    /// `id` cannot be reached any more. Answers whether it could be before.
    pub fn down(&self, id: MemberId) -> bool {
        self.0.lock().remove(&id).is_some()
    }

    /// Since when `id` could be reached without interruption.
    pub fn since(&self, id: MemberId) -> Option<Instant> {
        self.0.lock().get(&id).copied()
    }

    /// Whether `id` could be reached without interruption for `long`.
    pub fn reached_for(&self, id: MemberId, long: Duration) -> bool {
        self.since(id).is_some_and(|since| since.elapsed() >= long)
    }

    /// How many members can be reached.
    pub fn count(&self) -> usize {
        self.0.lock().len()
    }
}
