//! Clusters of real processes on the loopback device, whose links and members can be made to fail.
//!
//! ```text
//! member a ── dials ──► proxy of b ──► b's peer port        clients ──► every member's client port
//! ```
//!
//! All members advertise their proxy's address as their peer URL, so everything that goes between two
//! members passes through [`net`], which holds it to a rule for each ordered pair.

// Two test binaries share this module, and each uses a part of it.
#![allow(dead_code)]

pub mod client;
pub mod cluster;
pub mod net;
pub mod process;
pub mod random;
pub mod secure;

use std::future::Future;
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up: far more than it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(20);

/// Asks again until there is an answer.
///
/// # Panics
/// With the last reason, when patience is at its end.
pub async fn wait_for<T, F>(what: &str, mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(reason) => assert!(Instant::now() < deadline, "waited for {what}: {reason}"),
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Runs a test on this thread, where tasks may share what they have.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

/// What an environment variable sets, or `default`.
pub fn env_number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}
