//! Quorate: a distributed, consistent key-value store that speaks etcd's protocols.
//!
//! Dependencies point one way: `core` (pure) ← `actors` ← `transport` ← the daemon. See ARCHITECTURE.md.

pub mod actors;
pub mod bench;
pub mod bootstrap;
pub mod cli;
pub mod config;
pub mod core;
pub mod daemon;
pub mod engines;
pub mod local;
pub mod logging;
pub mod metrics;
pub mod storage;
pub mod transport;
pub mod utl;
