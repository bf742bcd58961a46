//! Compiles the .proto files with protox, so that no protoc is needed, and their JSON mapping.

mod json;

use std::path::PathBuf;

const FILES: [&str; 12] = [
    "auth.proto",
    "election.proto",
    "health.proto",
    "lease.proto",
    "lock.proto",
    "membership.proto",
    "mvcc.proto",
    "raft.proto",
    "raft_internal.proto",
    "rpc.proto",
    "snap.proto",
    "wal.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    std::fs::write(out.join("json.rs"), json::generate(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".")
        // A range reply is the stored bytes, passed through unparsed: see `KeyValueBytes`.
        .extern_path(".mvccpb.KeyValue", "crate::KeyValueBytes")
        .compile_fds(descriptors)?;
    Ok(())
}
