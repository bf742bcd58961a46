//! `etcdserverpb.Maintenance` (v3-api 3.11).

use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use engine_api::Table;
use futures_util::stream;
use parking_lot::Mutex;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::downgrade_request::DowngradeAction;
use rustc_hash::FxHashMap;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tonic::{Code, Request, Response, Status};

use super::deadline::{self, Deadline};
use super::defragment::defragment;
use super::{Counted, Ending, Reply, crowded};
use crate::actors::export::{For, write_bbolt};
use crate::config::duration::GoDuration;
use crate::core::apply::Reply as Applied;
use crate::core::bbolt::{DigestWriter, WriteError};
use crate::core::command::Request as Command;
use crate::core::membership::Version;
use crate::core::mvcc::hash::hash_all;
use crate::core::types::MemberId;
use crate::metrics::Method;
use crate::transport::budget::Account;
use crate::transport::identity::Who;
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Maintenance {
    pub member: Arc<Member>,
    /// Where a snapshot is gathered before it is sent, on the data's own disk.
    pub snap_dir: PathBuf,
    pub snapshots: Arc<Snapshots>,
}

/// Bytes of a snapshot in one message.
const CHUNK: usize = 32 * 1024;
/// Chunks read ahead of the client.
const CHUNKS_AHEAD: usize = 8;
/// Length of the SHA-256 that ends a snapshot.
const DIGEST: u64 = 32;

/// Snapshots being gathered or sent to clients at once: each takes a thread, and as much of the disk as
/// the data.
const SNAPSHOTS_MAX: usize = 8;
/// Those that one connection may ask for at once.
const SNAPSHOTS_OF_CONNECTION_MAX: usize = 2;
/// How long the client of a snapshot may take nothing of it before it makes room for another.
const SNAPSHOT_STALL: Duration = Duration::from_secs(10);
/// Time between two looks whether there is room for a snapshot.
const SNAPSHOT_POLL: Duration = Duration::from_millis(100);

/// A snapshot under way.
struct Sending {
    /// When its client last took a part of it; `None` while it is gathered.
    moved: Mutex<Option<Instant>>,
    ended: AtomicBool,
    ending: Notify,
}

/// The snapshots under way, and those that wait for room.
#[derive(Default)]
pub struct Snapshots {
    sending: Mutex<Vec<Arc<Sending>>>,
    /// How many each connection has asked for and not yet got.
    wanted: Mutex<FxHashMap<u64, usize>>,
}

impl Snapshots {
    /// Counts one of a connection; `None` if it has enough.
    fn want(self: &Arc<Self>, connection: u64) -> Option<Wanted> {
        let mut wanted = self.wanted.lock();
        let count = wanted.entry(connection).or_default();
        if *count >= SNAPSHOTS_OF_CONNECTION_MAX {
            return None;
        }
        *count += 1;
        Some(Wanted { all: self.clone(), connection })
    }

    /// Waits for room, which a client that does not read its snapshot has to make.
    async fn enter(self: &Arc<Self>) -> Slot {
        loop {
            if let Some(slot) = self.try_enter() {
                return slot;
            }
            tokio::time::sleep(SNAPSHOT_POLL).await;
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<Slot> {
        let mut all = self.sending.lock();
        if all.len() < SNAPSHOTS_MAX {
            let sending = Arc::new(Sending {
                moved: Mutex::new(None),
                ended: AtomicBool::new(false),
                ending: Notify::new(),
            });
            all.push(sending.clone());
            return Some(Slot { all: self.clone(), sending });
        }
        for sending in all.iter() {
            let stalled = sending.moved.lock().map(|moved| moved.elapsed());
            if let Some(stalled) = stalled.filter(|stalled| *stalled >= SNAPSHOT_STALL)
                && !sending.ended.swap(true, Ordering::AcqRel)
            {
                tracing::warn!(
                    "stalled-ms" = stalled.as_millis() as u64,
                    "gave up a snapshot whose client does not read it, to make room for another"
                );
                sending.ending.notify_one();
                break;
            }
        }
        None
    }
}

/// The place of one snapshot among those of its connection.
struct Wanted {
    all: Arc<Snapshots>,
    connection: u64,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let mut wanted = self.all.wanted.lock();
        if let Some(count) = wanted.get_mut(&self.connection) {
            *count -= 1;
            if *count == 0 {
                wanted.remove(&self.connection);
            }
        }
    }
}

/// The place of one snapshot among those under way.
struct Slot {
    all: Arc<Snapshots>,
    sending: Arc<Sending>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.all.sending.lock().retain(|sending| !Arc::ptr_eq(sending, &self.sending));
    }
}

/// So long before the client's deadline it is told why leadership did not move: at the deadline, it
/// would hear only of that.
const WORD_BEFORE: Duration = Duration::from_millis(2);

impl Maintenance {
    async fn alarm(
        self,
        request: pb::AlarmRequest,
        who: &Who,
    ) -> Result<pb::AlarmResponse, Status> {
        if pb::alarm_request::AlarmAction::try_from(request.action).is_err() {
            let text = format!("alarm action {} is not known", request.action);
            return Err(Status::invalid_argument(text));
        }
        let answer = self.member.propose(who, Command::Alarm(request)).await?;
        let Applied::Alarm(mut reply) = answer.reply else {
            unreachable!("an alarm answers an alarm")
        };
        let revision = reply.header.map_or(0, |header| header.revision);
        reply.header = self.member.header_at(revision, answer.term.0);
        Ok(reply)
    }

    fn status(&self) -> Result<pb::StatusResponse, Status> {
        let shared = &self.member.shared;
        let now = shared.published.load();
        let leader = shared.leader();
        let storage_error = |error: engine_api::EngineError| Status::unknown(error.to_string());
        let mut errors = Vec::new();
        if leader.is_none() {
            errors.push("etcdserver: no leader".to_string());
        }
        errors.extend(now.alarms.list(0).into_iter().map(|alarm| {
            let kind = alarm.alarm().as_str_name();
            format!("memberID:{} alarm:{kind}", alarm.member_id)
        }));
        Ok(pb::StatusResponse {
            header: self.member.header_at(now.store.revision(), now.term.0),
            version: crate::cli::ETCD_VERSION.to_string(),
            db_size: now.engine.size().map_err(storage_error)? as i64,
            leader: leader.map_or(0, |id| id.0),
            raft_index: shared.raft.committed.load(Ordering::Acquire),
            raft_term: now.term.0,
            raft_applied_index: now.applied.0,
            errors,
            db_size_in_use: now.engine.size_in_use().map_err(storage_error)? as i64,
            is_learner: now.members.is_learner(),
            storage_version: now.members.cluster_version.map_or(String::new(), |v| v.to_string()),
            db_size_quota: self.member.limits.quota_reported,
            downgrade_info: Some(pb::DowngradeInfo::default()),
        })
    }

    /// Runs `work` on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Member) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let member = self.member.clone();
        let done = tokio::task::spawn_blocking(move || work(&member)).await;
        done.map_err(|_| status::stopped())?
    }

    async fn hash(self) -> Result<pb::HashResponse, Status> {
        self.member.checkpoint().await?;
        self.blocking(|member| {
            let started = Instant::now();
            let storage_error = |error: engine_api::EngineError| Status::unknown(error.to_string());
            let now = member.shared.published.load_full();
            let view = now.engine.view().map_err(storage_error)?;
            let hash = hash_all(&*view).map_err(storage_error)?;
            member.metrics.hash_seconds.record(started.elapsed());
            Ok(pb::HashResponse { header: member.current_header(), hash })
        })
        .await
    }

    async fn hash_kv(self, request: pb::HashKvRequest) -> Result<pb::HashKvResponse, Status> {
        self.blocking(move |member| {
            let started = Instant::now();
            let (hashed, header) = member.hash_kv(request.revision)?;
            member.metrics.hash_rev_seconds.record(started.elapsed());
            Ok(pb::HashKvResponse {
                header,
                hash: hashed.hash,
                compact_revision: hashed.compact_revision,
                hash_revision: hashed.revision,
            })
        })
        .await
    }

    /// Gathers a snapshot and sends it chunk by chunk.
    async fn send_snapshot(
        self,
        chunks: mpsc::Sender<Result<pb::SnapshotResponse, Status>>,
    ) -> Result<(), Status> {
        let slot = tokio::select! {
            slot = self.snapshots.enter() => slot,
            // Nobody waits for it any more.
            () = chunks.closed() => return Ok(()),
        };
        self.member.checkpoint().await?;
        let version =
            self.member.shared.published.load().members.cluster_version.map(|v| v.to_string());
        let dir = self.snap_dir.clone();
        let sink = chunks.clone();
        self.blocking(move |member| {
            let started = Instant::now();
            let io = |error: std::io::Error| {
                Status::unknown(format!("snapshot in {}: {error}", dir.display()))
            };
            let mut file = tempfile::tempfile_in(&dir).map_err(io)?;
            // The view is held no longer than the disk takes: a slow client keeps only the file.
            gather(member, &mut file)
                .map_err(|error| Status::unknown(format!("snapshot: {error}")))?;
            let total = file.stream_position().map_err(io)?;
            tracing::info!(
                "total-bytes" = total - DIGEST,
                size = total - DIGEST,
                "sending database snapshot to client"
            );
            file.rewind().map_err(io)?;
            let version = version.unwrap_or_default();
            // Its time begins with the first part.
            *slot.sending.moved.lock() = Some(Instant::now());
            if !send_chunks(&mut file, total, version, &sink, &slot.sending).map_err(io)? {
                return match slot.sending.ended.load(Ordering::Acquire) {
                    true => Err(crowded()),
                    false => Ok(()),
                };
            }
            let took = started.elapsed();
            member.metrics.backend_snapshot_seconds.record(took);
            tracing::info!(
                "total-bytes" = total - DIGEST,
                took = %GoDuration::from(took),
                "successfully sent database snapshot to client"
            );
            Ok(())
        })
        .await
    }

    async fn move_leader(
        self,
        request: pb::MoveLeaderRequest,
        timeout: Option<Duration>,
    ) -> Result<pb::MoveLeaderResponse, Status> {
        let shared = &self.member.shared;
        if !shared.raft.leading.load(Ordering::Acquire) {
            return Err(status::not_leader());
        }
        let target = MemberId(request.target_id);
        match shared.published.load().members.get(target) {
            Some(member) if !member.is_learner => {}
            _ => return Err(status::bad_leader_transferee()),
        }
        let deadline = async {
            match timeout {
                Some(timeout) => tokio::time::sleep(timeout.saturating_sub(WORD_BEFORE)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            moved = self.member.transfer_leader(target) => moved?,
            () = self.member.stopped() => return Err(status::stopped()),
            () = deadline => return Err(status::timeout_leader_transfer()),
        }
        Ok(pb::MoveLeaderResponse::default())
    }

    async fn downgrade(
        self,
        request: pb::DowngradeRequest,
    ) -> Result<pb::DowngradeResponse, Status> {
        let action =
            DowngradeAction::try_from(request.action).map_err(|_| status::unknown_method())?;
        self.member.read_index().await?;
        let current = self.member.shared.published.load().members.cluster_version;
        if action != DowngradeAction::Cancel {
            let target = Version::parse(&request.version)
                .ok_or_else(status::wrong_downgrade_version_format)?;
            let current = current.ok_or_else(status::cluster_version_unavailable)?;
            if (target.major, Some(target.minor)) != (current.major, current.minor.checked_sub(1)) {
                return Err(status::invalid_downgrade_target_version());
            }
            if action == DowngradeAction::Enable {
                return Err(status::not_supported_yet("a downgrade"));
            }
        }
        Ok(pb::DowngradeResponse {
            header: self.member.current_header(),
            version: current.map_or(String::new(), |v| format!("{}.{}", v.major, v.minor)),
        })
    }
}

/// Writes everything that the engine holds as a bbolt file with its digest.
fn gather(member: &Member, file: &mut File) -> Result<(), WriteError> {
    let now = member.shared.published.load_full();
    let view = now.engine.view().map_err(|error| WriteError::Source {
        bucket: Table::Key.name().into(),
        source: Box::new(error),
    })?;
    let mut out = DigestWriter::new(BufWriter::with_capacity(1 << 20, file));
    write_bbolt(&*view, For::Client, &mut out)?;
    out.finish()?.flush()?;
    Ok(())
}

/// Reads `total` bytes from `file` and sends them, the digest in a message of its own. Ends early, and
/// answers so, when the client is gone or has to make room.
fn send_chunks(
    file: &mut File,
    total: u64,
    version: String,
    chunks: &mpsc::Sender<Result<pb::SnapshotResponse, Status>>,
    sending: &Sending,
) -> std::io::Result<bool> {
    let runtime = tokio::runtime::Handle::current();
    let mut left = total;
    while left > 0 {
        let len = if left > DIGEST { (left - DIGEST).min(CHUNK as u64) } else { left };
        let mut blob = BytesMut::zeroed(len as usize);
        file.read_exact(&mut blob)?;
        left -= len;
        let chunk = pb::SnapshotResponse {
            header: None,
            // The digest does not count as remaining.
            remaining_bytes: left.saturating_sub(DIGEST),
            blob: Bytes::from(blob),
            version: version.clone(),
        };
        let sent = match chunks.try_send(Ok(chunk)) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(chunk)) => runtime.block_on(async {
                tokio::select! {
                    sent = chunks.send(chunk) => sent.is_ok(),
                    () = sending.ending.notified() => false,
                }
            }),
        };
        if !sent {
            return Ok(false);
        }
        *sending.moved.lock() = Some(Instant::now());
    }
    Ok(true)
}

#[tonic::async_trait]
impl pb::maintenance_server::Maintenance for Maintenance {
    async fn alarm(
        &self,
        request: Request<pb::AlarmRequest>,
    ) -> Result<Response<pb::AlarmResponse>, Status> {
        let run = async |r, who| Maintenance::alarm(self.clone(), r, &who).await;
        self.member.unary(Method::Alarm, |_| false, request, run).await
    }

    async fn status(
        &self,
        request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let run = |_, _| async { Maintenance::status(self) };
        self.member.unary(Method::Status, |_| true, request, run).await
    }

    async fn defragment(
        &self,
        request: Request<pb::DefragmentRequest>,
    ) -> Result<Response<pb::DefragmentResponse>, Status> {
        let run = |_, _| async {
            defragment(self.member.clone()).await?;
            Ok(pb::DefragmentResponse::default())
        };
        self.member.unary(Method::Defragment, |_| false, request, run).await
    }

    async fn hash(
        &self,
        request: Request<pb::HashRequest>,
    ) -> Result<Response<pb::HashResponse>, Status> {
        self.member
            .unary(Method::Hash, |_| false, request, |_, _| Maintenance::hash(self.clone()))
            .await
    }

    async fn hash_kv(
        &self,
        request: Request<pb::HashKvRequest>,
    ) -> Result<Response<pb::HashKvResponse>, Status> {
        let run = |r, _| Maintenance::hash_kv(self.clone(), r);
        self.member.unary(Method::HashKv, |_| false, request, run).await
    }

    type SnapshotStream = Reply<pb::SnapshotResponse>;

    async fn snapshot(
        &self,
        request: Request<pb::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let (call, _) = self.member.open_stream(Method::Snapshot, &request, true).await?;
        let leaderless = self.member.stream_leaderless(request.metadata());
        let deadline = Deadline::of(request.metadata());
        call.received(request.get_ref().encoded_len());
        let wanted = match request.extensions().get::<Arc<Account>>() {
            None => None,
            Some(account) => match self.snapshots.want(account.id()) {
                None => {
                    call.finish(Code::ResourceExhausted);
                    return Err(crowded());
                }
                wanted => wanted,
            },
        };
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let this = self.clone();
        actix::spawn(async move {
            let _wanted = wanted;
            if let Err(status) = this.send_snapshot(sender.clone()).await {
                // A client that is gone needs no reason.
                drop(sender.send(Err(status)).await);
            }
        });
        let replies = stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|item| (item, receiver))
        });
        let replies = Ending::new(Box::pin(replies), leaderless);
        Ok(Response::new(Box::pin(Counted::new(replies, deadline, call))))
    }

    async fn move_leader(
        &self,
        request: Request<pb::MoveLeaderRequest>,
    ) -> Result<Response<pb::MoveLeaderResponse>, Status> {
        let timeout = deadline::timeout(request.metadata());
        let run = |r, _| Maintenance::move_leader(self.clone(), r, timeout);
        self.member.unary(Method::MoveLeader, |_| false, request, run).await
    }

    async fn downgrade(
        &self,
        request: Request<pb::DowngradeRequest>,
    ) -> Result<Response<pb::DowngradeResponse>, Status> {
        let run = |r, _| Maintenance::downgrade(self.clone(), r);
        self.member.unary(Method::Downgrade, |_| false, request, run).await
    }
}
