//! Opening engines in a process that also starts others.
//!
//! Between fork and exec a child has copies of all files that are open, locks included: an engine that has
//! just been closed would seem to be open still.

use std::cell::Cell;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

static SPAWNING: RwLock<()> = RwLock::new(());

thread_local! {
    static OPENING: Cell<bool> = const { Cell::new(false) };
}

/// Starts a process, while no engine is opened. `spawn` returns when the process runs its own program for
/// sure; that a call to start it has returned is not enough.
pub(crate) fn spawning<T>(spawn: impl FnOnce() -> T) -> T {
    // nothing is guarded but the time
    let _alone = SPAWNING.write().unwrap_or_else(PoisonError::into_inner);
    spawn()
}

/// Opens as `open` does, but while no crash case starts a process. [`suite!`](crate::suite) does so by itself;
/// for other tests beside the crash cases that open an engine again.
pub fn undisturbed<E>(open: impl Fn(&Path) -> E) -> impl Fn(&Path) -> E {
    move |dir| {
        // a second lock in the same thread could wait for whoever waits for the first
        let _shared =
            (!OPENING.get()).then(|| SPAWNING.read().unwrap_or_else(PoisonError::into_inner));
        let outer = OPENING.replace(true);
        let engine = open(dir);
        OPENING.set(outer);
        engine
    }
}
