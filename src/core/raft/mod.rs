//! Consensus: a raft member as a value. Messages, ticks and acknowledgements go in, an [`Output`] comes out.
//!
//! The algorithm is the `raft` crate's; nothing of it shows here. This module adds what a member among etcd
//! members needs: etcd's conf-change numbering ([`confchange`]), checks of everything a peer sends
//! (`guard`), repeatable election timeouts, reads that survive a change of leader, and the order
//! *persist, then send* (`node`).
//!
//! The driver's loop, whatever runs it:
//! 1. feed inputs ([`Node::step`], [`Node::tick`], [`Node::propose`], ...), as many as are waiting;
//! 2. while [`Node::has_output`], take one [`Node::output`]: send `messages` at once, hand `entries`,
//!    `hard_state` and `snapshot` to the disk, `committed` to the applier;
//! 3. when the disk has all of output `number`, call [`Node::persisted`]; when the applier is done with an
//!    entry, [`Node::applied`]; conf changes go through [`Node::apply_conf_change`] before that.
//!
//! `first - 1 <= applied <= min(committed, persisted) <= last`, always.

pub mod confchange;
mod convert;
mod guard;
mod log;
mod node;

pub use confchange::ConfChangeError;
pub use guard::StepError;
pub use node::{
    Config, LeaderChange, Node, Output, PeerProgress, ProgressState, ProposeError, RaftError,
    ReadState, Restored, Role, Status,
};

/// Type of a message with entries; it has a stream of its own (formats-and-peers 6.3).
pub const MSG_APP: u32 = 3;
/// Type of a message with a snapshot; it is sent by itself, with the database (formats-and-peers 6.4).
pub const MSG_SNAP: u32 = 7;
/// Type of a heartbeat; without sender and receiver it keeps a stream alive.
pub const MSG_HEARTBEAT: u32 = 8;
