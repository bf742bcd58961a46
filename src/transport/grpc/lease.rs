//! `etcdserverpb.Lease` (v3-api 3.9).

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status, Streaming};

use super::deadline::Deadline;
use super::{Counted, Reply};
use crate::actors::lease::{ListLeases, Remaining, Renewed};
use crate::core::apply::Reply as Applied;
use crate::core::command::Request as Command;
use crate::core::lease::LessorError;
use crate::core::types::LeaseId;
use crate::metrics::{Method, Received};
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Lease(pub Arc<Member>);

/// The pause before a member without a leader is asked again.
const LEADER_POLL: Duration = Duration::from_millis(50);

impl Lease {
    async fn grant(
        self,
        mut request: pb::LeaseGrantRequest,
    ) -> Result<pb::LeaseGrantResponse, Status> {
        while request.id == 0 {
            request.id = (self.0.shared.next_id() & i64::MAX as u64) as i64;
        }
        let request = Command::LeaseGrant(request);
        self.0.check_quota(&request).await?;
        let answer = self.0.propose(request).await?;
        let Applied::LeaseGrant(mut reply) = answer.reply else {
            unreachable!("a grant answers a grant")
        };
        let revision = reply.header.map_or(0, |header| header.revision);
        reply.header = self.0.header_at(revision, answer.term.0);
        Ok(reply)
    }

    async fn revoke(
        self,
        request: pb::LeaseRevokeRequest,
    ) -> Result<pb::LeaseRevokeResponse, Status> {
        let answer = self.0.propose(Command::LeaseRevoke(request)).await?;
        let Applied::LeaseRevoke(reply) = answer.reply else {
            unreachable!("a revoke answers a revoke")
        };
        let revision = reply.header.map_or(0, |header| header.revision);
        Ok(pb::LeaseRevokeResponse { header: self.0.header_at(revision, answer.term.0) })
    }

    /// Renews one lease; waits for a leader as long as a request may.
    async fn keep_alive(&self, id: i64) -> Result<pb::LeaseKeepAliveResponse, Status> {
        // The revision is that from before the renewal (v3-api 3.1).
        let header = self.0.current_header();
        let deadline = Instant::now() + self.0.limits.request_timeout;
        loop {
            match self.0.renew(LeaseId(id)).await? {
                Renewed::Ttl(ttl) => return Ok(pb::LeaseKeepAliveResponse { header, id, ttl }),
                Renewed::Gone => return Ok(pb::LeaseKeepAliveResponse { header, id, ttl: 0 }),
                Renewed::NotPrimary if Instant::now() >= deadline => {
                    return Err(status::no_leader());
                }
                Renewed::NotPrimary => tokio::time::sleep(LEADER_POLL).await,
            }
        }
    }

    async fn time_to_live(
        self,
        request: pb::LeaseTimeToLiveRequest,
    ) -> Result<pb::LeaseTimeToLiveResponse, Status> {
        let deadline = Instant::now() + self.0.limits.request_timeout;
        let id = LeaseId(request.id);
        let left = loop {
            match self.0.leases.send(Remaining(id)).await {
                Err(_) => return Err(status::stopped()),
                Ok(Ok(left)) => break Some(left),
                Ok(Err(LessorError::Unknown(_))) => break None,
                Ok(Err(LessorError::NotPrimary)) if Instant::now() >= deadline => {
                    return Err(status::no_leader());
                }
                Ok(Err(LessorError::NotPrimary)) => tokio::time::sleep(LEADER_POLL).await,
            }
        };
        let header = self.0.current_header();
        let now = self.0.shared.published.load();
        Ok(match (left, now.leases.get(id)) {
            (Some(ttl), Some(lease)) => pb::LeaseTimeToLiveResponse {
                header,
                id: request.id,
                ttl,
                granted_ttl: lease.ttl,
                keys: if request.keys { lease.keys().cloned().collect() } else { Vec::new() },
            },
            // An unknown lease is no error.
            _ => pb::LeaseTimeToLiveResponse {
                header,
                id: request.id,
                ttl: -1,
                ..Default::default()
            },
        })
    }

    async fn leases(self) -> Result<pb::LeaseLeasesResponse, Status> {
        let ids = self.0.leases.send(ListLeases).await.map_err(|_| status::stopped())?;
        Ok(pb::LeaseLeasesResponse {
            header: self.0.current_header(),
            leases: ids.into_iter().map(|id| pb::LeaseStatus { id: id.0 }).collect(),
        })
    }
}

struct KeepAlives {
    lease: Lease,
    requests: Streaming<pb::LeaseKeepAliveRequest>,
    received: Received,
    end: BoxFuture<'static, Status>,
    ended: bool,
}

impl KeepAlives {
    async fn next(&mut self) -> Result<Option<pb::LeaseKeepAliveResponse>, Status> {
        if self.ended {
            return Ok(None);
        }
        let request = tokio::select! {
            biased;
            // First, or a client that always has one more request would never be told.
            status = &mut self.end => return Err(status),
            request = self.requests.message() => request?,
        };
        // A client that has closed its side ends the stream well.
        let Some(request) = request else { return Ok(None) };
        self.received.count(request.encoded_len());
        self.lease.keep_alive(request.id).await.map(Some)
    }
}

#[tonic::async_trait]
impl pb::lease_server::Lease for Lease {
    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        self.0.unary(Method::LeaseGrant, |_| false, request, |r| self.clone().grant(r)).await
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        self.0.unary(Method::LeaseRevoke, |_| false, request, |r| self.clone().revoke(r)).await
    }

    type LeaseKeepAliveStream = Reply<pb::LeaseKeepAliveResponse>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let call = self.0.open_stream(Method::LeaseKeepAlive, request.metadata(), false)?;
        let end = Box::pin(self.0.stream_end(request.metadata()));
        let deadline = Deadline::of(request.metadata());
        let state = KeepAlives {
            lease: self.clone(),
            received: call.receiver(),
            end,
            requests: request.into_inner(),
            ended: false,
        };
        let replies = stream::unfold(state, |mut state| async move {
            let next = state.next().await;
            state.ended = !matches!(next, Ok(Some(_)));
            next.transpose().map(|item| (item, state))
        });
        Ok(Response::new(Box::pin(Counted::new(Box::pin(replies), deadline, call))))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<pb::LeaseTimeToLiveRequest>,
    ) -> Result<Response<pb::LeaseTimeToLiveResponse>, Status> {
        let run = |r| self.clone().time_to_live(r);
        self.0.unary(Method::LeaseTimeToLive, |_| false, request, run).await
    }

    async fn lease_leases(
        &self,
        request: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        self.0.unary(Method::LeaseLeases, |_| false, request, |_| self.clone().leases()).await
    }
}
