//! The member as an operator meets it: a process, its directory, its signals, its ports and its log.

mod conflict;
mod crash;
mod damage;
mod defragment;
mod full;
mod limits;
#[path = "../page/mod.rs"]
mod page;
mod pages;
#[path = "../ports/mod.rs"]
mod ports;
mod process;
mod signals;
mod space;
#[path = "../tmpfs/mod.rs"]
mod tmpfs;
mod words;
