//! Sockets and encodings: how clients, peers and scrapers reach the actors.

pub mod http;
