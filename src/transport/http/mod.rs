//! Plain HTTP on the client, peer and metrics ports.

pub mod status;
