//! etcd's messages and services as Rust types, generated at build time from the files in `proto/`.
//!
//! One type is made by hand: [`KeyValueBytes`] stands for `mvccpb.KeyValue` in every generated
//! message. It carries the encoded message unparsed, because the bytes stored under a revision key
//! *are* that encoding: a range reply or a watch event copies them and never decodes a value.

#![allow(clippy::all, clippy::pedantic, rustdoc::all)]

pub mod json;
mod key_value;

pub use key_value::{KeyValue, KeyValueBytes};

/// Stored keys and values, watch events (`mvccpb`).
pub mod mvccpb {
    pub use crate::key_value::{KeyValue, KeyValueBytes};
    tonic::include_proto!("mvccpb");
}

/// Users, roles, permissions (`authpb`).
pub mod authpb {
    tonic::include_proto!("authpb");
}

/// The client API and what a log entry holds (`etcdserverpb`).
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

/// Membership requests in the log (`membershippb`).
pub mod membershippb {
    tonic::include_proto!("membershippb");
}

/// Stored leases (`leasepb`).
pub mod leasepb {
    tonic::include_proto!("leasepb");
}

/// The lock service (`v3lockpb`).
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

/// The election service (`v3electionpb`).
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

/// Raft messages with etcd's numbering (`raftpb`).
pub mod raftpb {
    tonic::include_proto!("raftpb");
}

/// WAL records (`walpb`).
pub mod walpb {
    tonic::include_proto!("walpb");
}

/// `.snap` files (`snappb`).
pub mod snappb {
    tonic::include_proto!("snappb");
}

/// The gRPC health protocol (`grpc.health.v1`).
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// The encoded `FileDescriptorSet` of all files, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
