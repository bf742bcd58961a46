//! Sockets and encodings: how clients, peers and scrapers reach the actors.

mod authority;
pub mod budget;
pub mod grpc;
pub mod guard;
pub mod held;
pub mod http;
pub mod identity;
pub mod listener;
pub mod member;
pub mod peer;
pub mod reconfig;
pub mod san;
pub mod socket;
pub mod status;
pub mod tls;
