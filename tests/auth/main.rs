//! Authentication from outside: who may call what, how tokens live and die, and that all members of a
//! cluster agree about it.
//!
//! What is expected is what the reference release answers. The installed etcd (3.4.23 where this was
//! written) is asked too: where that release checks less, a table says so row by row, with the reason, and
//! a row that is no longer true is a failure. `QUORATE_TEST_PROGRAM=etcd` runs everything against etcd
//! alone: that is how these tests are themselves checked.

mod access;
mod advisories;
mod call;
mod cluster;
// The TLS tests use more of it, and of the next.
#[allow(dead_code)]
#[path = "../wire/ctl.rs"]
mod ctl;
#[allow(dead_code)]
#[path = "../tls/deck.rs"]
mod deck;
mod etcdctl;
mod jwt;
mod login;
#[path = "../pki/mod.rs"]
mod pki;
#[path = "../ports/mod.rs"]
mod ports;
#[path = "../cluster/rig/mod.rs"]
mod rig;
// The wire tests use more of it.
#[allow(dead_code)]
#[path = "../wire/server.rs"]
mod server;
mod tokens;
