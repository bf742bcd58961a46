//! The JSON gateway as its clients see it: every path, the same requests to the installed etcd where
//! that has them, streams, WebSocket, browsers' rules, and requests that are too much.
//!
//! The installed etcd is release 3.4.23 where this was written. Its gateway is of an older make than
//! the one that ours follows; each difference that a test allows for names the rule.

mod auth;
mod http;
mod limits;
#[path = "../ports/mod.rs"]
mod ports;
mod rules;
#[path = "../wire/server.rs"]
#[allow(dead_code)]
mod server;
mod socket;
mod streams;
mod transcript;
