//! The running server as clients see it: the same calls to it and to a real etcd, and the answers
//! that the reference release gives where the installed etcd is another release.
//!
//! Each test starts members of its own, on ports that are free at the moment, in a directory of its
//! own. `etcd` and `etcdctl` must be installed; they are release 3.4.23 where this was written, and
//! every difference that a test allows for says which rule of a later release it follows.

mod ctl;
mod etcdctl;
mod grpc;
mod hash;
mod lock;
#[path = "../ports/mod.rs"]
mod ports;
mod probes;
mod random;
// The tests of authentication use more of it.
#[allow(dead_code)]
mod server;
mod snapshot;
