//! `etcdserverpb.Lease` (v3-api 3.9).

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesOrdered, StreamExt};
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status, Streaming};

use super::deadline::Deadline;
use super::{Counted, Reply};
use crate::actors::lease::ListLeases;
use crate::core::apply::Reply as Applied;
use crate::core::auth::AuthError;
use crate::core::command::Request as Command;
use crate::core::types::LeaseId;
use crate::metrics::{Method, Received};
use crate::transport::access;
use crate::transport::identity::{Credentials, Who};
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Lease(pub Arc<Member>);

/// Renewals of one stream under way at once: a client renews all its leases over one stream, and each
/// may take a round trip to the leader.
const RENEWALS_IN_FLIGHT: usize = 64;

impl Lease {
    async fn grant(
        self,
        mut request: pb::LeaseGrantRequest,
        who: &Who,
    ) -> Result<pb::LeaseGrantResponse, Status> {
        while request.id == 0 {
            request.id = (self.0.shared.next_id() & i64::MAX as u64) as i64;
        }
        let request = Command::LeaseGrant(request);
        self.0.check_quota(&request).await?;
        let answer = self.0.propose(who, request).await?;
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
        who: &Who,
    ) -> Result<pb::LeaseRevokeResponse, Status> {
        let answer = self.0.propose(who, Command::LeaseRevoke(request)).await?;
        let Applied::LeaseRevoke(reply) = answer.reply else {
            unreachable!("a revoke answers a revoke")
        };
        let revision = reply.header.map_or(0, |header| header.revision);
        Ok(pb::LeaseRevokeResponse { header: self.0.header_at(revision, answer.term.0) })
    }

    /// Renews one lease, here or at the leader.
    async fn keep_alive(
        self,
        request: pb::LeaseKeepAliveRequest,
        credentials: Arc<Credentials<String>>,
    ) -> Result<pb::LeaseKeepAliveResponse, Status> {
        let id = request.id;
        self.0.let_in(credentials.borrowed(), &request).await?;
        // The revision is that from before the renewal (v3-api 3.1).
        let header = self.0.current_header();
        let ttl = self.0.keep_alive(LeaseId(id)).await?;
        Ok(pb::LeaseKeepAliveResponse { header, id, ttl })
    }

    async fn time_to_live(
        self,
        request: pb::LeaseTimeToLiveRequest,
        who: Who,
    ) -> Result<pb::LeaseTimeToLiveResponse, Status> {
        let id = request.id;
        let before = self.0.now().auth.revision();
        let left = self.0.time_to_live(request).await?;
        if let Some(left) = left.as_ref().filter(|_| request.keys) {
            self.check_told(&who, before, &left.keys)?;
        }
        // An unknown lease is no error.
        let unknown = || pb::LeaseTimeToLiveResponse { id, ttl: -1, ..Default::default() };
        let left = left.unwrap_or_else(unknown);
        Ok(pb::LeaseTimeToLiveResponse { header: self.0.current_header(), ..left })
    }

    /// Looks once more at what keys a reply is about to tell: the leader may know of others than those
    /// that were looked at, and users and roles may have changed since.
    fn check_told(&self, who: &Who, before: u64, keys: &[Bytes]) -> Result<(), Status> {
        let now = self.0.shared.published.load();
        if !now.auth.enabled() {
            return Ok(());
        }
        if now.auth.revision() != before {
            return Err(AuthError::OldRevision.into());
        }
        access::check_attached(&now, who, keys).map_err(Into::into)
    }

    async fn leases(self) -> Result<pb::LeaseLeasesResponse, Status> {
        let ids = self.0.leases.send(ListLeases).await.map_err(|_| status::stopped())?;
        Ok(pb::LeaseLeasesResponse {
            header: self.0.current_header(),
            leases: ids.into_iter().map(|id| pb::LeaseStatus { id: id.0 }).collect(),
        })
    }
}

type Renewal = BoxFuture<'static, Result<pb::LeaseKeepAliveResponse, Status>>;

struct KeepAlives {
    lease: Lease,
    credentials: Arc<Credentials<String>>,
    requests: Streaming<pb::LeaseKeepAliveRequest>,
    /// Renewals under way, answered in the order of their requests.
    renewals: FuturesOrdered<Renewal>,
    received: Received,
    end: BoxFuture<'static, Status>,
    /// The client sends no more.
    closed: bool,
    ended: bool,
}

impl KeepAlives {
    async fn next(&mut self) -> Result<Option<pb::LeaseKeepAliveResponse>, Status> {
        if self.ended {
            return Ok(None);
        }
        loop {
            if self.closed && self.renewals.is_empty() {
                // A client that has closed its side ends the stream well, after pending replies.
                return Ok(None);
            }
            let room = !self.closed && self.renewals.len() < RENEWALS_IN_FLIGHT;
            let request = tokio::select! {
                biased;
                // First, or a client that always has one more request would never be told.
                status = &mut self.end => return Err(status),
                Some(renewed) = self.renewals.next() => return renewed.map(Some),
                request = self.requests.message(), if room => request?,
            };
            match request {
                Some(request) => {
                    self.received.count(request.encoded_len());
                    let renewal = self.lease.clone().keep_alive(request, self.credentials.clone());
                    self.renewals.push_back(Box::pin(renewal));
                }
                None => self.closed = true,
            }
        }
    }
}

#[tonic::async_trait]
impl pb::lease_server::Lease for Lease {
    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        let run = async |r, who| self.clone().grant(r, &who).await;
        self.0.unary(Method::LeaseGrant, |_| false, request, run).await
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        let run = async |r, who| self.clone().revoke(r, &who).await;
        self.0.unary(Method::LeaseRevoke, |_| false, request, run).await
    }

    type LeaseKeepAliveStream = Reply<pb::LeaseKeepAliveResponse>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let (call, credentials) = self.0.open_session(Method::LeaseKeepAlive, &request, false)?;
        let end = Box::pin(self.0.stream_end(request.metadata()));
        let deadline = Deadline::of(request.metadata());
        let state = KeepAlives {
            lease: self.clone(),
            credentials: Arc::new(credentials),
            received: call.receiver(),
            end,
            requests: request.into_inner(),
            renewals: FuturesOrdered::new(),
            closed: false,
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
        let run = |r, who| self.clone().time_to_live(r, who);
        self.0.unary(Method::LeaseTimeToLive, |_| false, request, run).await
    }

    async fn lease_leases(
        &self,
        request: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        self.0.unary(Method::LeaseLeases, |_| false, request, |_, _| self.clone().leases()).await
    }
}
