//! The pure core: no actor, socket, file, clock or randomness. Time and input come in, messages and
//! effects go out, so that the same code runs under the actors and under a simulator.

pub mod alarm;
pub mod apply;
pub mod auth;
pub mod autocompact;
pub mod bbolt;
pub mod check;
pub mod cluster_version;
pub mod command;
pub mod describe;
pub mod event;
pub mod integrity;
pub mod lease;
pub mod membership;
pub mod mvcc;
pub mod quota;
pub mod raft;
pub mod reconfig;
pub mod snap;
pub mod types;
pub mod wal;
pub mod watch;
