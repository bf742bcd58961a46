//! Shells: each owns one core value and one resource, and runs where [`spawn`] puts it.
//!
//! Who sends what to whom:
//!
//! ```text
//! transport ── Requests ──────────► raft ── Append ──► wal ── Persisted ──► raft
//!                                   raft ── Apply ───► applier ── Applied, ConfChanged ──► raft
//! applier ── Commit ──► committer ── Committed ──► applier
//! applier ── Events ──► watch ── responses ──► transport
//! applier ── LeaseChanges, Promoted ──► lease ── AsLeader (revokes) ──► raft
//! applier ── Compacted ──► compactor ── CompactSlice ──► applier
//! monitor ── Requests (cluster version, end of an alarm) ──► raft ◄── Requests (alarms, read index) ── integrity
//! raft ── Send ──► transport/peer ── Step, Unreachable, SnapshotDone ──► raft
//! applier ── Members ──► transport/peer
//! applier ── TakeSnapshot ──► snapshot ── SaveSnapshot, Release ──► wal
//! transport ── ChangeConf, TransferLeader, AwaitApplied ──► raft      daemon ── Abandon ──► raft ──► applier
//! applier ── LeasesReplaced ──► lease      applier ── StoreReplaced ──► compactor
//! applier ── Installed ──► snapshot      applier ── TokenSink (a call, not a message) ──► transport/token
//! transport/peer ── Flush (by way of export) ──► applier
//! transport ── Renewals, Remaining ──► lease      transport ── Open, Ask, Delivered ──► watch
//! applier ══ logins, what ends them ══► transport/token (a call: it is known before anyone is answered)
//! ```
//!
//! Order that may never change: **persist, then send what depends on it** (the raft node holds such
//! messages back until `Persisted`); **apply in index order, once** (one raft actor sends `Apply`, one
//! applier skips what the engine holds); **applied index and data in one engine commit** (a batch is
//! cut with its index inside). A snapshot of the leader goes the way of entries: `Append` carries it to
//! the log, `Apply` to the state, which it replaces, the engine included. So
//! `engine <= applied <= committed <= last`.
//!
//! What costs a message only where someone waits: how far the applier is (`ApplyProgress`; raft looks
//! when it runs anyway), and what was written (nobody tells the watch hub while it has no streams). On a
//! write's way each message between threads is a wake-up, and those are most of what it costs.
//!
//! How deep the queues are: `Append` and `Apply` are bounded by credits (4 each, the rest merges in the
//! raft node); engine batches by one in flight and an overlay of ten batches, behind which the applier
//! holds entries back; client requests by the raft actor's mailbox and the "too many requests" gate;
//! watch responses by 128 and by bytes a stream; changes for the watch hub by 64 MiB, beyond which it is
//! told only that there are some, and reads them from history. Messages whose number follows from these bounds are sent with
//! `do_send`, which never waits; nothing else is.

pub mod applier;
pub mod committer;
pub mod compactor;
pub mod disk;
pub mod exit;
pub mod export;
pub mod integrity;
pub mod lease;
pub mod monitor;
pub mod peers;
pub mod raft;
#[cfg(test)]
pub(crate) mod rig;
pub mod shared;
pub mod snapshot;
pub mod spawn;
pub mod wal;
pub mod watch;

/// Answers a caller. One that has given up needs no answer.
fn answer<T>(caller: tokio::sync::oneshot::Sender<T>, with: T) {
    caller.send(with).ok();
}
