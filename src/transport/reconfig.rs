//! Changes of the members as clients and other members ask for them (v3-api 3.10): checks, then the log.

use std::sync::Arc;

use quorate_proto::raftpb;
use quorate_proto::raftpb::ConfChangeType as Type;
use tonic::Status;

use super::member::Member;
use super::peer::forward;
use super::status;
use crate::actors::raft::{GetStatus, RequestError};
use crate::core::apply::ApplyError;
use crate::core::membership::{ChangeContext, Member as Record, MembershipError, member_id};
use crate::core::raft::Role;
use crate::core::reconfig::{self, ReconfigError};
use crate::core::types::MemberId;

/// Why the members stay as they are.
#[derive(thiserror::Error, Debug)]
pub enum ChangeError {
    #[error(transparent)]
    Request(RequestError),
    #[error(transparent)]
    Reconfig(#[from] ReconfigError),
    #[error("member is not in the cluster")]
    NotFound,
    #[error("member is not a learner")]
    NotLearner,
    #[error("learner is not in sync with the leader")]
    NotReady,
    /// Only a leader knows how far a learner has got.
    #[error("this member does not lead")]
    NotLeader,
    /// None that could be asked, as long as a request may take.
    #[error("no leader is known")]
    NoLeader,
}

impl ChangeError {
    /// As etcd names it inside: a metric's label, and what members tell each other.
    pub fn text(&self) -> String {
        let status = match self {
            ChangeError::NotFound => return NOT_FOUND.into(),
            ChangeError::NotLearner => return NOT_LEARNER.into(),
            ChangeError::Request(RequestError::NotApplied) => status::timeout_wait_applied_index(),
            ChangeError::Request(RequestError::Stopped) => status::stopped(),
            ChangeError::Request(error) => return error.to_string(),
            ChangeError::Reconfig(error) => (*error).into(),
            ChangeError::NotReady => status::learner_not_ready(),
            ChangeError::NotLeader => status::not_leader(),
            ChangeError::NoLeader => status::no_leader(),
        };
        status.message().into()
    }
}

/// What members tell each other of a change that cannot be made.
pub const NOT_FOUND: &str = "membership: ID not found";
pub const NOT_LEARNER: &str = "membership: can only promote a learner member";

impl From<RequestError> for ChangeError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Apply(ApplyError::Membership(
                MembershipError::NotFound(_) | MembershipError::Removed(_),
            )) => ChangeError::NotFound,
            RequestError::Apply(ApplyError::Membership(MembershipError::NotLearner(_))) => {
                ChangeError::NotLearner
            }
            error => ChangeError::Request(error),
        }
    }
}

impl From<ChangeError> for Status {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Request(error) => error.into(),
            ChangeError::Reconfig(error) => error.into(),
            ChangeError::NotFound => status::member_not_found(),
            ChangeError::NotLearner => status::member_not_learner(),
            ChangeError::NotReady => status::learner_not_ready(),
            ChangeError::NotLeader => status::not_leader(),
            ChangeError::NoLeader => status::no_leader(),
        }
    }
}

fn change(kind: Type, id: MemberId, context: Option<&ChangeContext>) -> raftpb::ConfChange {
    let json = |context| serde_json::to_vec(context).expect("a member is always JSON");
    raftpb::ConfChange {
        id: 0,
        r#type: kind as i32,
        node_id: id.0,
        context: context.map(json).unwrap_or_default().into(),
    }
}

impl Member {
    fn check(
        &self,
        strict: impl FnOnce(&crate::core::membership::Membership) -> Result<(), ReconfigError>,
    ) -> Result<(), ChangeError> {
        if self.limits.strict_reconfig {
            strict(&self.now().members).inspect_err(|error| {
                tracing::warn!(
                    "local-member-id" = %self.shared.member_id,
                    %error,
                    "rejecting a membership change"
                );
            })?;
        }
        Ok(())
    }

    /// Adds a member that other members reach at `peer_urls`, sorted; answers its record.
    ///
    /// # Errors
    /// `Reconfig`, `Request`.
    pub async fn add_member(
        &self,
        peer_urls: Vec<String>,
        is_learner: bool,
    ) -> Result<Record, ChangeError> {
        let unix_s = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let id = member_id(&peer_urls, "", Some(unix_s));
        self.check(|now| reconfig::may_add(now, is_learner, |id| self.shared.contact(id)))?;
        let member = Record { id: id.0, peer_urls, is_learner, ..Record::default() };
        let kind = if is_learner { Type::AddLearnerNode } else { Type::AddNode };
        let context = ChangeContext { member, is_promote: false };
        self.change_conf(change(kind, id, Some(&context))).await?;
        Ok(context.member)
    }

    /// Removes member `id`.
    ///
    /// # Errors
    /// `Reconfig`, `Request`.
    pub async fn remove_member(&self, id: MemberId) -> Result<(), ChangeError> {
        self.check(|now| reconfig::may_remove(now, id, |id| self.shared.contact(id)))?;
        Ok(self.change_conf(change(Type::RemoveNode, id, None)).await?)
    }

    /// Gives member `id` other peer URLs.
    ///
    /// # Errors
    /// `Request`.
    pub async fn update_member(
        &self,
        id: MemberId,
        peer_urls: Vec<String>,
    ) -> Result<(), ChangeError> {
        let member = Record { id: id.0, peer_urls, ..Record::default() };
        let context = ChangeContext { member, is_promote: false };
        Ok(self.change_conf(change(Type::UpdateNode, id, Some(&context))).await?)
    }

    /// Makes learner `id` a voter, or has the leader do it for someone who shows `token`; answers the
    /// members after that.
    ///
    /// # Errors
    /// [`ChangeError`]; never `NotLeader`.
    pub async fn promote_member(
        self: &Arc<Self>,
        id: MemberId,
        token: Option<&str>,
    ) -> Result<Vec<Record>, ChangeError> {
        match self.promote_here(id).await {
            Ok(()) => {
                self.metrics.learner_promote_successes.increment(1);
                Ok(self.now().members.members().cloned().collect())
            }
            Err(ChangeError::NotLeader) => forward::promote(self, id, token).await,
            Err(error) => {
                self.metrics.learner_promote_failures.with(&[&error.text()]).increment(1);
                Err(error)
            }
        }
    }

    async fn promote_here(&self, id: MemberId) -> Result<(), ChangeError> {
        self.wait_applied().await?;
        let status = self.raft.send(GetStatus).await.map_err(|_| RequestError::Stopped)?;
        if status.role != Role::Leader {
            return Err(ChangeError::NotLeader);
        }
        let matched =
            |id| status.progress.iter().find(|peer| peer.id == id).map(|peer| peer.matched);
        let learner = matched(id).ok_or(ChangeError::NotFound)?;
        let leader = matched(status.id).ok_or(ChangeError::NotLeader)?;
        if !reconfig::is_ready(learner, leader) {
            return Err(ChangeError::NotReady);
        }
        self.check(reconfig::may_promote)?;
        let member = Record { id: id.0, ..Record::default() };
        let context = ChangeContext { member, is_promote: true };
        Ok(self.change_conf(change(Type::AddNode, id, Some(&context))).await?)
    }
}
