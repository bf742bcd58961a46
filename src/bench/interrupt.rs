//! Ctrl-C and SIGTERM as a flag, so that a run ends in its own order and removes its files.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::signal::unix::{SignalKind, signal};

/// Set once the process has been asked to end.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on the signals only set the flag, until the process ends.
    ///
    /// # Errors
    /// If the signals cannot be handled.
    pub fn watch() -> io::Result<Interrupt> {
        static WATCHED: OnceLock<Interrupt> = OnceLock::new();
        if let Some(interrupt) = WATCHED.get() {
            return Ok(interrupt.clone());
        }
        let flag = Arc::new(AtomicBool::new(false));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut interrupts, mut terminations) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let set = flag.clone();
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupts.recv() => {}
                    _ = terminations.recv() => {}
                }
                set.store(true, Ordering::Relaxed);
            });
        })?;
        Ok(WATCHED.get_or_init(|| Interrupt(flag)).clone())
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
