//! TLS between real programs: members and their clients, members and each other, and etcd among them.

mod calls;
#[path = "../linearizability/check/mod.rs"]
mod check;
mod cluster;
#[allow(dead_code)]
#[path = "../wire/ctl.rs"]
mod ctl;
mod curl;
mod deck;
mod dialer;
mod etcdctl;
#[path = "../auth/login.rs"]
#[allow(dead_code)]
mod login;
#[path = "../pki/mod.rs"]
mod pki;
#[path = "../ports/mod.rs"]
mod ports;
#[path = "../linearizability/record.rs"]
mod record;
#[path = "../cluster/rig/mod.rs"]
mod rig;
mod rotation;
#[path = "../wire/server.rs"]
#[allow(dead_code)]
mod server;
mod users;
