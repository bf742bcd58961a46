//! What each call needs before it runs, by the type of its request (v3-api 3.12).
//!
//! [`crate::core::auth::access`] says what a call needs; here it is said where that is looked at. A
//! method's request has to be [`Gated`] or it cannot be served at all, and [`Gate`] has no case for
//! "not thought of".
//!
//! Reads are checked against the same published state that they are read from, so that no change of
//! users or roles can come in between. What goes through the log is checked by every member when it is
//! applied; before that, only a caller without any credential is refused, so that nobody fills the log
//! without having logged in.

use std::sync::Arc;

use quorate_proto::etcdserverpb as pb;
use quorate_proto::health;
use tonic::Status;

use super::identity::{Credentials, Who};
use super::member::Member;
use super::status;
use crate::actors::shared::Published;
use crate::core::auth::AuthError;
use crate::core::auth::access::{Asked, Need, need};
use crate::core::types::LeaseId;

/// Where a call's need is looked at.
#[derive(Debug)]
pub enum Gate<'a> {
    /// Nothing is needed; even a bad token does not matter.
    Open,
    /// Nothing is needed, but a token that is shown has to be a good one.
    Token,
    /// Before the call runs.
    Here(Asked<'a>),
    /// With the state that is read: [`Member::read_as`] asks for it.
    Read,
    /// When the entry is applied, which carries the caller's name. A credential has to be there before.
    Log,
}

/// The request of a method.
pub trait Gated {
    /// What it needs, and where that is looked at.
    fn gate(&self) -> Gate<'_>;
}

macro_rules! gates {
    ($($request:ty => |$this:pat_param| $gate:expr;)*) => {
        $(
            impl Gated for $request {
                fn gate(&self) -> Gate<'_> {
                    let $this = self;
                    $gate
                }
            }
        )*
    };
}

gates! {
    pb::RangeRequest => |_| Gate::Read;
    pb::PutRequest => |_| Gate::Log;
    pb::DeleteRangeRequest => |_| Gate::Log;
    // One that only reads asks once more where it reads.
    pb::TxnRequest => |_| Gate::Log;
    pb::CompactionRequest => |_| Gate::Here(Asked::Compact);
    pb::WatchCreateRequest => |this| Gate::Here(Asked::WatchCreate(this));
    pb::LeaseGrantRequest => |_| Gate::Here(Asked::LeaseGrant);
    pb::LeaseRevokeRequest => |_| Gate::Log;
    pb::LeaseKeepAliveRequest => |this| Gate::Here(Asked::LeaseKeepAlive(LeaseId(this.id)));
    pb::LeaseTimeToLiveRequest => |this| Gate::Here(
        Asked::LeaseTimeToLive { id: LeaseId(this.id), keys: this.keys }
    );
    pb::LeaseLeasesRequest => |_| Gate::Here(Asked::LeaseLeases);
    pb::MemberAddRequest => |_| Gate::Here(Asked::MemberAdd);
    pb::MemberRemoveRequest => |_| Gate::Here(Asked::MemberRemove);
    pb::MemberUpdateRequest => |_| Gate::Here(Asked::MemberUpdate);
    pb::MemberPromoteRequest => |_| Gate::Here(Asked::MemberPromote);
    pb::MemberListRequest => |_| Gate::Here(Asked::MemberList);
    pb::AlarmRequest => |this| Gate::Here(Asked::Alarm(this));
    pb::StatusRequest => |_| Gate::Here(Asked::Status);
    pb::DefragmentRequest => |_| Gate::Here(Asked::Defragment);
    pb::HashRequest => |_| Gate::Here(Asked::Hash);
    pb::HashKvRequest => |_| Gate::Here(Asked::HashKv);
    pb::SnapshotRequest => |_| Gate::Here(Asked::Snapshot);
    pb::MoveLeaderRequest => |_| Gate::Here(Asked::MoveLeader);
    pb::DowngradeRequest => |_| Gate::Here(Asked::Downgrade);
    pb::AuthEnableRequest => |_| Gate::Log;
    pb::AuthDisableRequest => |_| Gate::Log;
    pb::AuthStatusRequest => |_| Gate::Token;
    // Someone whose token has ended comes for another one.
    pb::AuthenticateRequest => |_| Gate::Open;
    pb::AuthUserAddRequest => |_| Gate::Log;
    pb::AuthUserGetRequest => |_| Gate::Log;
    pb::AuthUserListRequest => |_| Gate::Log;
    pb::AuthUserDeleteRequest => |_| Gate::Log;
    pb::AuthUserChangePasswordRequest => |_| Gate::Log;
    pb::AuthUserGrantRoleRequest => |_| Gate::Log;
    pb::AuthUserRevokeRoleRequest => |_| Gate::Log;
    pb::AuthRoleAddRequest => |_| Gate::Log;
    pb::AuthRoleGetRequest => |_| Gate::Log;
    pb::AuthRoleListRequest => |_| Gate::Log;
    pb::AuthRoleDeleteRequest => |_| Gate::Log;
    pb::AuthRoleGrantPermissionRequest => |_| Gate::Log;
    pb::AuthRoleRevokePermissionRequest => |_| Gate::Log;
    health::HealthCheckRequest => |_| Gate::Open;
    health::HealthListRequest => |_| Gate::Open;
}

/// Whether `who` has what `need` says, as of `now`.
///
/// # Errors
/// Any of [`AuthError`] that a check answers.
pub fn check(now: &Published, who: &Who, need: &Need<'_>) -> Result<(), AuthError> {
    if !now.auth.enabled() {
        return Ok(());
    }
    now.auth.check(&who.at(&now.auth), need, &now.leases)
}

impl Member {
    /// Lets a call in, or refuses it: the one place that every request of a client comes through.
    ///
    /// # Errors
    /// What the client is told.
    pub async fn let_in<Q: Gated>(
        self: &Arc<Self>,
        credentials: Credentials<&str>,
        request: &Q,
    ) -> Result<Who, Status> {
        let gate = request.gate();
        if matches!(gate, Gate::Open) {
            return Ok(Who::NOBODY);
        }
        let who = self.who(credentials).await?;
        match gate {
            Gate::Open | Gate::Token | Gate::Read => {}
            Gate::Here(asked) => self.permit(&who, asked)?,
            Gate::Log => self.permit_known(&who).await?,
        }
        Ok(who)
    }

    /// Whether `who` may do what is asked, as far as this member knows.
    ///
    /// # Errors
    /// What the client is told.
    pub fn permit(&self, who: &Who, asked: Asked<'_>) -> Result<(), Status> {
        let now = self.shared.published.load();
        if now.auth.enabled() {
            check(&now, who, &need(asked))?;
        }
        Ok(())
    }

    /// As [`Member::permit`], after everything that was committed before this call is known here.
    ///
    /// # Errors
    /// What the client is told.
    pub async fn permit_now(self: &Arc<Self>, who: &Who, asked: Asked<'_>) -> Result<(), Status> {
        if self.shared.published.load().auth.enabled() {
            self.read_index().await?;
            self.permit(who, asked)?;
        }
        Ok(())
    }

    /// Refuses someone who shows nothing, if that is certain: this member may not have heard yet that
    /// authentication is off.
    async fn permit_known(self: &Arc<Self>, who: &Who) -> Result<(), Status> {
        let enabled = || self.shared.published.load().auth.enabled();
        if who.is_nobody() && enabled() {
            self.read_index().await?;
            if enabled() {
                return Err(status::user_empty());
            }
        }
        Ok(())
    }
}
