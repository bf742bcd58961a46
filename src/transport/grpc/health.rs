//! `grpc.health.v1.Health` (v3-api 7.4): the server as a whole, under the empty name.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::stream;
use prost::Message as _;
use quorate_proto::health as pb;
use quorate_proto::health::health_check_response::ServingStatus;
use tonic::{Request, Response, Status};

use super::deadline::Deadline;
use super::{Counted, Reply};
use crate::metrics::Method;
use crate::transport::member::Member;

/// The service. `stops_on_defrag` is the feature gate StopGRPCServiceOnDefrag.
#[derive(Clone)]
pub struct Health {
    pub member: Arc<Member>,
    pub stops_on_defrag: bool,
}

/// How often a health watch looks for a change.
const WATCH_POLL: Duration = Duration::from_millis(100);

impl Health {
    fn serving(&self) -> ServingStatus {
        let defragmenting = self.member.shared.defragmenting.load(Ordering::Acquire);
        if self.stops_on_defrag && defragmenting {
            ServingStatus::NotServing
        } else {
            ServingStatus::Serving
        }
    }

    fn status(&self) -> pb::HealthCheckResponse {
        pb::HealthCheckResponse { status: self.serving() as i32 }
    }
}

#[tonic::async_trait]
impl pb::health_server::Health for Health {
    async fn check(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<pb::HealthCheckResponse>, Status> {
        let run = |request: pb::HealthCheckRequest, _| async move {
            if request.service.is_empty() {
                Ok(self.status())
            } else {
                Err(Status::not_found("unknown service"))
            }
        };
        self.member.unary(Method::HealthCheck, |_| false, request, run).await
    }

    async fn list(
        &self,
        request: Request<pb::HealthListRequest>,
    ) -> Result<Response<pb::HealthListResponse>, Status> {
        let run = |_, _| async move {
            let statuses = [(String::new(), self.status())].into();
            Ok(pb::HealthListResponse { statuses })
        };
        self.member.unary(Method::HealthList, |_| false, request, run).await
    }

    type WatchStream = Reply<pb::HealthCheckResponse>;

    async fn watch(
        &self,
        request: Request<pb::HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (call, _) = self.member.open_stream(Method::HealthWatch, &request, false).await?;
        let deadline = Deadline::of(request.metadata());
        let request = request.into_inner();
        call.received(request.encoded_len());
        let unknown = !request.service.is_empty();
        let states = stream::unfold((self.clone(), None), move |(health, last)| async move {
            loop {
                let now = if unknown { ServingStatus::ServiceUnknown } else { health.serving() };
                if last != Some(now) {
                    let reply = pb::HealthCheckResponse { status: now as i32 };
                    return Some((Ok(reply), (health, Some(now))));
                }
                tokio::select! {
                    () = health.member.stopped() => return None,
                    // Only a gated defragmentation ever changes the state.
                    () = tokio::time::sleep(WATCH_POLL), if health.stops_on_defrag && !unknown => {}
                }
            }
        });
        Ok(Response::new(Box::pin(Counted::new(Box::pin(states), deadline, call))))
    }
}
