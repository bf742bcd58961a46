//! `etcdserverpb.Maintenance` (v3-api 3.11).

use std::fs::File;
use std::io::{BufWriter, Read, Seek, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use engine_api::Table;
use futures_util::stream;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::downgrade_request::DowngradeAction;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use super::deadline::{self, Deadline};
use super::{Counted, Ending, Reply};
use crate::actors::applier::Checkpoint;
use crate::actors::export::{For, write_bbolt};
use crate::config::duration::GoDuration;
use crate::core::apply::Reply as Applied;
use crate::core::bbolt::{DigestWriter, WriteError};
use crate::core::command::Request as Command;
use crate::core::membership::Version;
use crate::core::mvcc::hash::hash_all;
use crate::core::types::MemberId;
use crate::metrics::Method;
use crate::transport::identity::Who;
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Maintenance {
    pub member: Arc<Member>,
    /// Where a snapshot is gathered before it is sent, on the data's own disk.
    pub snap_dir: PathBuf,
}

/// Bytes of a snapshot in one message.
const CHUNK: usize = 32 * 1024;
/// Chunks read ahead of the client.
const CHUNKS_AHEAD: usize = 32;
/// Length of the SHA-256 that ends a snapshot.
const DIGEST: u64 = 32;

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

    async fn defragment(self) -> Result<pb::DefragmentResponse, Status> {
        self.checkpoint().await?;
        self.blocking(|member| {
            if member.shared.defragmenting.swap(true, Ordering::AcqRel) {
                return Err(Status::unknown("a defragmentation is under way"));
            }
            member.metrics.defrag_inflight.set(1.0);
            let started = Instant::now();
            tracing::info!("starting defragment");
            let result = {
                let _alone = member.shared.reclaiming.lock();
                member.shared.published.load_full().engine.reclaim()
            };
            let took = started.elapsed();
            member.metrics.backend_defrag_seconds.record(took);
            member.metrics.defrag_inflight.set(0.0);
            member.shared.defragmenting.store(false, Ordering::Release);
            match result {
                Ok(reclaimed) => {
                    tracing::info!(
                        "current-db-size-bytes-diff" =
                            reclaimed.after as i64 - reclaimed.before as i64,
                        "current-db-size-bytes" = reclaimed.after,
                        took = %GoDuration::from(took),
                        "finished defragment"
                    );
                    Ok(pb::DefragmentResponse::default())
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to defragment");
                    Err(Status::unknown(error.to_string()))
                }
            }
        })
        .await
    }

    async fn hash(self) -> Result<pb::HashResponse, Status> {
        self.checkpoint().await?;
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

    /// Waits until everything applied so far is in the engine, on disk.
    async fn checkpoint(&self) -> Result<(), Status> {
        let (reply, done) = oneshot::channel();
        self.member.applier.do_send(Checkpoint(reply));
        done.await.map(|_| ()).map_err(|_| status::stopped())
    }

    /// Gathers a snapshot and sends it chunk by chunk.
    async fn send_snapshot(
        self,
        chunks: mpsc::Sender<Result<pb::SnapshotResponse, Status>>,
    ) -> Result<(), Status> {
        self.checkpoint().await?;
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
            send_chunks(&mut file, total, version.unwrap_or_default(), &sink).map_err(io)?;
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

/// Reads `total` bytes from `file` and sends them, the digest in a message of its own. Ends early when
/// the client is gone.
fn send_chunks(
    file: &mut File,
    total: u64,
    version: String,
    chunks: &mpsc::Sender<Result<pb::SnapshotResponse, Status>>,
) -> std::io::Result<()> {
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
        if chunks.blocking_send(Ok(chunk)).is_err() {
            return Ok(());
        }
    }
    Ok(())
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
        let run = |_, _| Maintenance::defragment(self.clone());
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
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let this = self.clone();
        actix::spawn(async move {
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
