//! Sockets and encodings: how clients, peers and scrapers reach the actors.

pub mod access;
mod authority;
pub mod grpc;
pub mod guard;
pub mod http;
pub mod identity;
pub mod listener;
pub mod login;
pub mod member;
pub mod peer;
pub mod reconfig;
pub mod status;
pub mod token;
