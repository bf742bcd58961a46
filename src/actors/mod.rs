//! Shells: each owns one core value and one resource.

pub mod disk;
