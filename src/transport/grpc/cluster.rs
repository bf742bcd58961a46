//! `etcdserverpb.Cluster` (v3-api 3.10): the member list and its changes.

use std::sync::Arc;

use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status};

use crate::config::Url;
use crate::core::auth::access::Asked;
use crate::core::membership::Member as Record;
use crate::core::types::MemberId;
use crate::metrics::Method;
use crate::transport::identity::{Credentials, Who};
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Cluster(pub Arc<Member>);

fn shown(member: &Record) -> pb::Member {
    pb::Member {
        id: member.id,
        name: member.name.clone(),
        peer_ur_ls: member.peer_urls.clone(),
        client_ur_ls: member.client_urls.clone(),
        is_learner: member.is_learner,
    }
}

impl Cluster {
    async fn list(
        self,
        request: pb::MemberListRequest,
        who: Who,
    ) -> Result<pb::MemberListResponse, Status> {
        if request.linearizable {
            self.0.read_index().await?;
            // What was waited for may have taken the user away.
            self.0.permit(&who, Asked::MemberList)?;
        }
        Ok(pb::MemberListResponse { header: self.header(), members: self.members() })
    }

    /// Cluster replies carry no revision (v3-api 3.1).
    fn header(&self) -> Option<pb::ResponseHeader> {
        self.0.header(0)
    }

    /// The members as of now, by ID.
    fn members(&self) -> Vec<pb::Member> {
        self.0.shared.published.load().members.members().map(shown).collect()
    }

    async fn add(self, request: pb::MemberAddRequest) -> Result<pb::MemberAddResponse, Status> {
        let urls: Result<Vec<Url>, _> =
            request.peer_ur_ls.iter().map(|url| Url::parse(url)).collect();
        let mut urls = urls.map_err(|_| status::member_bad_urls())?;
        if urls.is_empty() {
            return Err(status::member_bad_urls());
        }
        urls.sort();
        let urls = urls.iter().map(|url| url.as_str().to_string()).collect();
        let added = self.0.add_member(urls, request.is_learner).await?;
        let member = Some(shown(&added));
        Ok(pb::MemberAddResponse { header: self.header(), member, members: self.members() })
    }

    async fn remove(
        self,
        request: pb::MemberRemoveRequest,
    ) -> Result<pb::MemberRemoveResponse, Status> {
        self.0.remove_member(MemberId(request.id)).await?;
        Ok(pb::MemberRemoveResponse { header: self.header(), members: self.members() })
    }

    async fn update(
        self,
        request: pb::MemberUpdateRequest,
    ) -> Result<pb::MemberUpdateResponse, Status> {
        self.0.update_member(MemberId(request.id), request.peer_ur_ls).await?;
        Ok(pb::MemberUpdateResponse { header: self.header(), members: self.members() })
    }

    async fn promote(
        self,
        request: pb::MemberPromoteRequest,
        token: Option<&str>,
    ) -> Result<pb::MemberPromoteResponse, Status> {
        let members = self.0.promote_member(MemberId(request.id), token).await?;
        let members = members.iter().map(shown).collect();
        Ok(pb::MemberPromoteResponse { header: self.header(), members })
    }
}

#[tonic::async_trait]
impl pb::cluster_server::Cluster for Cluster {
    async fn member_add(
        &self,
        request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        self.0.unary(Method::MemberAdd, |_| false, request, |r, _| self.clone().add(r)).await
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        self.0.unary(Method::MemberRemove, |_| false, request, |r, _| self.clone().remove(r)).await
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        self.0.unary(Method::MemberUpdate, |_| false, request, |r, _| self.clone().update(r)).await
    }

    async fn member_list(
        &self,
        request: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        self.0
            .unary(Method::MemberList, |_| false, request, |r, who| self.clone().list(r, who))
            .await
    }

    async fn member_promote(
        &self,
        request: Request<pb::MemberPromoteRequest>,
    ) -> Result<Response<pb::MemberPromoteResponse>, Status> {
        // The leader asks once more who it is.
        let credentials = Credentials::of(request.metadata(), request.extensions());
        let token = credentials.token().map(str::to_string);
        let run = async |r, _| self.clone().promote(r, token.as_deref()).await;
        self.0.unary(Method::MemberPromote, |_| false, request, run).await
    }
}
