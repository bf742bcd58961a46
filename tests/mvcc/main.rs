//! The multi-version store and the state machine around it: readable scripts, a model, readers that
//! race with compaction.

mod auth;
mod member;
mod model;
#[path = "../ports/mod.rs"]
mod ports;
mod readers;
mod restore;
mod rig;
mod script;
mod twin;
