//! `v3electionpb.Election` (v3-api 3.13): whoever is at the head of the queue of a name leads, and the
//! value under its key is what it proclaims.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::mvccpb::event::EventType;
use quorate_proto::v3electionpb as election;
use quorate_proto::v3electionpb::election_server;
use tonic::{Request, Response, Status};

use super::deadline::Deadline;
use super::{Counted, Ending, Reply};
use crate::metrics::Method;
use crate::transport::concurrency::{Caller, Changes, Queue, Turn, parse, told};
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Election(pub Arc<Member>);

fn not_leader() -> Status {
    Status::unknown("election: not leader")
}

fn leader_key(leader: Option<election::LeaderKey>) -> Result<election::LeaderKey, Status> {
    leader.ok_or_else(|| Status::unknown("\"leader\" field must be provided"))
}

async fn campaign(
    caller: Caller,
    request: election::CampaignRequest,
) -> Result<election::CampaignResponse, Status> {
    let election::CampaignRequest { name, lease, value } = request;
    let entry = caller.enter(Queue::of(&name), lease, value.clone()).await?;
    let mut contender = entry.contender;
    if entry.found.is_some_and(|found| found != value) && !contender.proclaim(value).await? {
        return Err(not_leader());
    }
    // A lease that ended while its key waited has lost: etcd would answer that it leads.
    if let Turn::Lost = contender.turn().await? {
        return Err(not_leader());
    }
    let (rev, lease) = (contender.created, contender.lease());
    let leader = election::LeaderKey { name, key: contender.keep(), rev, lease };
    Ok(election::CampaignResponse { header: entry.header, leader: Some(leader) })
}

async fn proclaim(
    caller: Caller,
    request: election::ProclaimRequest,
) -> Result<election::ProclaimResponse, Status> {
    let leader = leader_key(request.leader)?;
    let lease = caller.lease(leader.lease).await?;
    let put = caller.proclaim(&leader.key, leader.rev, lease.id, request.value).await?;
    let header = put.ok_or_else(not_leader)?;
    lease.keep();
    Ok(election::ProclaimResponse { header })
}

async fn resign(
    caller: Caller,
    request: election::ResignRequest,
) -> Result<election::ResignResponse, Status> {
    let leader = leader_key(request.leader)?;
    Ok(election::ResignResponse { header: caller.resign(&leader.key, leader.rev).await? })
}

async fn leader(
    caller: Caller,
    request: election::LeaderRequest,
) -> Result<election::LeaderResponse, Status> {
    let reply = caller.range(Queue::of(&request.name).head()).await?;
    let kv = reply.kvs.into_iter().next();
    let kv = kv.ok_or_else(|| Status::unknown("election: no leader"))?;
    Ok(election::LeaderResponse { header: reply.header, kv: Some(kv) })
}

/// Where an observer stands.
enum At {
    /// To look for the leader, as of a revision or as of now.
    Look(Option<i64>),
    /// Nobody leads; whoever comes next will.
    Vacant(Changes),
    /// Somebody leads; their key is watched.
    Led(Changes),
}

/// An observer of an election. It passes from leader to leader along the history, so it misses neither a
/// value nor a leader that came and went while it looked elsewhere; after a compaction it goes on with
/// what is there.
struct Observer {
    caller: Caller,
    queue: Queue,
    at: At,
    /// To be told before anything else happens.
    tell: VecDeque<election::LeaderResponse>,
    /// Key and revision of what was told last, so that a second look does not repeat it.
    told: (Bytes, i64),
    ended: bool,
}

impl Observer {
    async fn next(&mut self) -> Result<election::LeaderResponse, Status> {
        loop {
            if let Some(response) = self.tell.pop_front() {
                return Ok(response);
            }
            self.at = match &mut self.at {
                At::Look(at) => {
                    let at = *at;
                    self.look(at).await?
                }
                At::Vacant(changes) => match changes.next().await? {
                    None => At::Look(None),
                    Some(response) => self.arrived(response)?,
                },
                At::Led(changes) => match changes.next().await? {
                    None => At::Look(None),
                    Some(response) => match self.changed(response)? {
                        None => continue,
                        Some(at) => at,
                    },
                },
            };
        }
    }

    async fn look(&mut self, at: Option<i64>) -> Result<At, Status> {
        let mut request = self.queue.head();
        if let Some(at) = at {
            // This member has that revision: a watch told of it.
            request.revision = at;
            request.serializable = true;
        }
        let reply = self.caller.persist(|| self.caller.range(request.clone())).await;
        let reply = match reply {
            Err(status) if at.is_some() && status.message() == status::compacted().message() => {
                return Ok(At::Look(None));
            }
            reply => reply?,
        };
        let seen = at.unwrap_or(reply.header.map_or(0, |header| header.revision));
        let Some(raw) = reply.kvs.into_iter().next() else {
            return self.caller.watch_arrivals(&self.queue, seen + 1).map(At::Vacant);
        };
        let kv = parse(&raw)?;
        let this = (kv.key, kv.mod_revision);
        let key = this.0.clone();
        if this != self.told {
            self.told = this;
            let response = election::LeaderResponse { header: reply.header, kv: Some(raw) };
            self.tell.push_back(response);
        }
        self.caller.watch_key(key, seen + 1).map(At::Led)
    }

    fn arrived(&mut self, response: pb::WatchResponse) -> Result<At, Status> {
        let raw = response.events.into_iter().next().and_then(|event| event.kv);
        let raw = raw.unwrap_or_default();
        let kv = parse(&raw)?;
        // The response may hold later revisions than that of the first to come.
        let header = response
            .header
            .map(|header| pb::ResponseHeader { revision: kv.mod_revision, ..header });
        self.tell.push_back(election::LeaderResponse { header, kv: Some(raw) });
        self.told = (kv.key.clone(), kv.mod_revision);
        self.caller.watch_key(kv.key, kv.mod_revision + 1).map(At::Led)
    }

    fn changed(&mut self, response: pb::WatchResponse) -> Result<Option<At>, Status> {
        for event in response.events {
            let gone = event.r#type() == EventType::Delete;
            let raw = event.kv.unwrap_or_default();
            let kv = parse(&raw)?;
            if gone {
                return Ok(Some(At::Look(Some(kv.mod_revision))));
            }
            self.told = (kv.key, kv.mod_revision);
            let response = election::LeaderResponse { header: response.header, kv: Some(raw) };
            self.tell.push_back(response);
        }
        Ok(None)
    }
}

#[tonic::async_trait]
impl election_server::Election for Election {
    async fn campaign(
        &self,
        request: Request<election::CampaignRequest>,
    ) -> Result<Response<election::CampaignResponse>, Status> {
        let caller = Caller::of(&self.0, &request);
        let run = |request| async { campaign(caller, request).await.map_err(told) };
        self.0.unary(Method::Campaign, |_| false, request, run).await
    }

    async fn proclaim(
        &self,
        request: Request<election::ProclaimRequest>,
    ) -> Result<Response<election::ProclaimResponse>, Status> {
        let caller = Caller::of(&self.0, &request);
        let run = |request| async { proclaim(caller, request).await.map_err(told) };
        self.0.unary(Method::Proclaim, |_| false, request, run).await
    }

    async fn leader(
        &self,
        request: Request<election::LeaderRequest>,
    ) -> Result<Response<election::LeaderResponse>, Status> {
        let caller = Caller::of(&self.0, &request);
        let run = |request| async { leader(caller, request).await.map_err(told) };
        self.0.unary(Method::Leader, |_| false, request, run).await
    }

    type ObserveStream = Reply<election::LeaderResponse>;

    async fn observe(
        &self,
        request: Request<election::LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let call = self.0.open_stream(Method::Observe, &request, false)?;
        let end = self.0.stream_end(request.metadata());
        let deadline = Deadline::of(request.metadata());
        let caller = Caller::of(&self.0, &request);
        let request = request.into_inner();
        call.received(request.encoded_len());
        let observer = Observer {
            caller,
            queue: Queue::of(&request.name),
            at: At::Look(None),
            tell: VecDeque::new(),
            told: (Bytes::new(), 0),
            ended: false,
        };
        let leaders = stream::unfold(observer, |mut observer| async move {
            if observer.ended {
                return None;
            }
            let next = observer.next().await.map_err(|status| {
                observer.ended = true;
                if status.message() == status::stopped().message() {
                    return status;
                }
                tracing::debug!(error = status.message(), "an election can no longer be observed");
                Status::unknown("election: observe closed early")
            });
            Some((next, observer))
        });
        let leaders = Ending::new(Box::pin(leaders), end);
        Ok(Response::new(Box::pin(Counted::new(leaders, deadline, call))))
    }

    async fn resign(
        &self,
        request: Request<election::ResignRequest>,
    ) -> Result<Response<election::ResignResponse>, Status> {
        let caller = Caller::of(&self.0, &request);
        let run = |request| async { resign(caller, request).await.map_err(told) };
        self.0.unary(Method::Resign, |_| false, request, run).await
    }
}
