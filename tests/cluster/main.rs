//! Clusters under faults: what they acknowledge is kept, what they answer is true, and they go on.
//!
//! `QUORATE_TEST_PROGRAM=etcd` runs the same against etcd.

#[path = "../linearizability/check/mod.rs"]
mod check;
mod corrupt;
mod crash;
mod disk;
mod engines;
mod etcdctl;
mod links;
mod lock;
mod members;
mod mixed;
#[path = "../ports/mod.rs"]
mod ports;
#[path = "../linearizability/record.rs"]
mod record;
mod refuse;
mod rig;
mod scenario;
mod snapshot;
mod space;
#[path = "../tmpfs/mod.rs"]
mod tmpfs;
