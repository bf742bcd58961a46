//! Plain HTTP on the client, peer and metrics ports.

pub mod member;
pub mod status;
