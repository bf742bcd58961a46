//! The member as an operator meets it: a process, its directory, its signals, its ports and its log.

mod crash;
mod process;
