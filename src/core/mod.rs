//! The pure core: no actor, socket, file, clock or randomness. Time and input come in, messages and
//! effects go out, so that the same code runs under the actors and under a simulator.

pub mod event;
pub mod lease;
pub mod types;
pub mod watch;
