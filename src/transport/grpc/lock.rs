//! `v3lockpb.Lock` (v3-api 3.13): whoever is at the head of the queue of a name holds its lock.
//!
//! The reply's key, as long as it exists, is the ownership: other transactions can be made to depend on
//! it. Its create revision grows from holder to holder, and so fences off one that is late.

use std::sync::Arc;

use bytes::Bytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::v3lockpb::lock_server;
use quorate_proto::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};
use tonic::{Request, Response, Status};

use crate::metrics::Method;
use crate::transport::concurrency::{Caller, Queue, Turn, told};
use crate::transport::member::Member;

/// The service.
#[derive(Clone)]
pub struct Lock(pub Arc<Member>);

async fn lock(caller: Caller, request: LockRequest) -> Result<LockResponse, Status> {
    let queue = Queue::of(&request.name);
    let entry = caller.enter(queue, request.lease, Bytes::new()).await?;
    let mut contender = entry.contender;
    match contender.turn().await? {
        Turn::Head(seen) => {
            Ok(LockResponse { header: seen.or(entry.header), key: contender.keep() })
        }
        Turn::Lost => Err(Status::unknown("mutex: session is expired")),
    }
}

async fn unlock(caller: Caller, request: UnlockRequest) -> Result<UnlockResponse, Status> {
    let request = pb::DeleteRangeRequest { key: request.key, ..Default::default() };
    let reply = caller.delete(request).await?;
    Ok(UnlockResponse { header: reply.header })
}

#[tonic::async_trait]
impl lock_server::Lock for Lock {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let caller = Caller::of(&self.0, &request);
        let run = |request| async { lock(caller, request).await.map_err(told) };
        self.0.unary(Method::Lock, |_| false, request, run).await
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        let caller = Caller::of(&self.0, &request);
        let run = |request| async { unlock(caller, request).await.map_err(told) };
        self.0.unary(Method::Unlock, |_| false, request, run).await
    }
}
