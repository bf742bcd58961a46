//! `Maintenance.Defragment`: space is given back beside everything else that the member does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use engine_api::Reclaim;
use tokio::sync::oneshot;
use tonic::Status;

use crate::config::duration::GoDuration;
use crate::transport::member::Member;
use crate::transport::status;

/// Gives this member's free space back to its file system, as far as its engine can.
///
/// One runs at a time. Who asks while one runs waits for the next one, which all who wait share.
///
/// # Errors
/// `Unimplemented` if the engine cannot; else what the engine says.
pub async fn defragment(member: Arc<Member>) -> Result<(), Status> {
    let about = member.shared.published.load().engine.about();
    if about.reclaim == Reclaim::Never {
        return Err(status::cannot_defragment(about.name));
    }
    let all = &member.shared.defragmentations;
    let begun = all.begun.load(Ordering::Acquire);
    let mut turn = tokio::select! {
        turn = all.turn.clone().lock_owned() => turn,
        () = member.stopped() => return Err(status::stopped()),
    };
    if *turn > begun {
        // One that began after this call has done what it asks for.
        return Ok(());
    }
    // Before the deletions are brought to the engine: a call that comes meanwhile may be for later ones.
    let number = all.begun.fetch_add(1, Ordering::AcqRel) + 1;
    // Deletions that are not in the engine yet would give nothing back.
    member.checkpoint().await?;
    let (reply, done) = oneshot::channel();
    let runner = member.clone();
    // A thread of its own, since it is to be a modest one. It goes on if the caller does not wait.
    let spawned = std::thread::Builder::new().name("defragment".into()).spawn(move || {
        be_modest();
        let result = run(&runner);
        if result.is_ok() {
            *turn = number;
        }
        drop(turn);
        // Nobody may wait any more.
        let _unheard = reply.send(result);
    });
    spawned.map_err(|error| Status::unknown(format!("cannot start a thread: {error}")))?;
    done.await.map_err(|_| status::stopped())?
}

fn run(member: &Member) -> Result<(), Status> {
    let shared = &member.shared;
    shared.defragmenting.store(true, Ordering::Release);
    member.metrics.defrag_inflight.set(1.0);
    let started = Instant::now();
    tracing::info!("starting defragment");
    let result = {
        let _alone = shared.reclaiming.lock();
        let engine = shared.published.load_full().engine.clone();
        // A member that stops tells its engine once; this may begin after that.
        // Read into a variable: what is borrowed in the condition would keep the member from stopping.
        let stopping = *member.stopping.borrow();
        if stopping {
            Err(engine_api::EngineError::Cancelled)
        } else {
            engine.reclaim().inspect(|_| {
                shared.measure(&*engine);
            })
        }
    };
    let took = started.elapsed();
    member.metrics.backend_defrag_seconds.record(took);
    member.metrics.defrag_inflight.set(0.0);
    shared.defragmenting.store(false, Ordering::Release);
    match result {
        Ok(reclaimed) => {
            tracing::info!(
                "current-db-size-bytes-diff" = reclaimed.after as i64 - reclaimed.before as i64,
                "current-db-size-bytes" = reclaimed.after,
                took = %GoDuration::from(took),
                "finished defragment"
            );
            Ok(())
        }
        Err(error) => {
            tracing::warn!(%error, "failed to defragment");
            Err(Status::unknown(error.to_string()))
        }
    }
}

/// Lets other threads go before this one, on the processors and, where the system can, on the disk.
#[cfg(target_os = "linux")]
fn be_modest() {
    /// Some locks are shared with threads that are not to wait, so it must not starve.
    const NICE: i32 = 5;
    const IOPRIO_WHO_PROCESS: i32 = 1;
    const BEST_EFFORT_LOWEST: i32 = (2 << 13) | 7;
    // SAFETY: both calls take numbers alone; 0 stands for the calling thread. If one fails, the thread is
    // less modest.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE);
        libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, BEST_EFFORT_LOWEST);
    }
}

#[cfg(not(target_os = "linux"))]
fn be_modest() {}
