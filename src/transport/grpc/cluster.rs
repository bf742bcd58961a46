//! `etcdserverpb.Cluster` (v3-api 3.10): the member list. Changing it comes with clusters.

use std::sync::Arc;

use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status};

use crate::config::Url;
use crate::core::membership::Membership;
use crate::metrics::Method;
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Cluster(pub Arc<Member>);

fn list(members: &Membership) -> Vec<pb::Member> {
    members
        .members()
        .map(|member| pb::Member {
            id: member.id,
            name: member.name.clone(),
            peer_ur_ls: member.peer_urls.clone(),
            client_ur_ls: member.client_urls.clone(),
            is_learner: member.is_learner,
        })
        .collect()
}

impl Cluster {
    async fn list(self, request: pb::MemberListRequest) -> Result<pb::MemberListResponse, Status> {
        if request.linearizable {
            self.0.read_index().await?;
        }
        let now = self.0.shared.published.load();
        // Cluster replies carry no revision (v3-api 3.1).
        Ok(pb::MemberListResponse {
            header: self.0.header_at(0, now.term.0),
            members: list(&now.members),
        })
    }

    async fn add(self, request: pb::MemberAddRequest) -> Result<pb::MemberAddResponse, Status> {
        let valid = |url: &String| Url::parse(url).is_ok();
        if request.peer_ur_ls.is_empty() || !request.peer_ur_ls.iter().all(valid) {
            return Err(status::member_bad_urls());
        }
        Err(status::not_supported_yet("adding a member"))
    }

    fn known(&self, id: u64) -> Result<(), Status> {
        let now = self.0.shared.published.load();
        match now.members.get(crate::core::types::MemberId(id)) {
            Some(_) => Ok(()),
            None => Err(status::member_not_found()),
        }
    }

    async fn remove(
        self,
        request: pb::MemberRemoveRequest,
    ) -> Result<pb::MemberRemoveResponse, Status> {
        self.known(request.id)?;
        Err(status::not_supported_yet("removing a member"))
    }

    async fn update(
        self,
        request: pb::MemberUpdateRequest,
    ) -> Result<pb::MemberUpdateResponse, Status> {
        self.known(request.id)?;
        Err(status::not_supported_yet("updating a member"))
    }

    async fn promote(
        self,
        request: pb::MemberPromoteRequest,
    ) -> Result<pb::MemberPromoteResponse, Status> {
        self.known(request.id)?;
        // Without learners there is nobody to promote.
        Err(status::member_not_learner())
    }
}

#[tonic::async_trait]
impl pb::cluster_server::Cluster for Cluster {
    async fn member_add(
        &self,
        request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        self.0.unary(Method::MemberAdd, |_| false, request, |r| self.clone().add(r)).await
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        self.0.unary(Method::MemberRemove, |_| false, request, |r| self.clone().remove(r)).await
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        self.0.unary(Method::MemberUpdate, |_| false, request, |r| self.clone().update(r)).await
    }

    async fn member_list(
        &self,
        request: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        self.0.unary(Method::MemberList, |_| false, request, |r| self.clone().list(r)).await
    }

    async fn member_promote(
        &self,
        request: Request<pb::MemberPromoteRequest>,
    ) -> Result<Response<pb::MemberPromoteResponse>, Status> {
        self.0.unary(Method::MemberPromote, |_| false, request, |r| self.clone().promote(r)).await
    }
}
