//! `etcdserverpb.Auth` as it answers while auth is off and no user exists (v3-api 3.12).

use std::sync::Arc;

use prost::Message;
use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status};

use crate::core::apply::Reply as Applied;
use crate::core::command::Request as Command;
use crate::metrics::Method;
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Auth(pub Arc<Member>);

/// A reply of which only the header is filled in.
trait WithHeader: Message + Default {
    fn with_header(header: Option<pb::ResponseHeader>) -> Self;
}

macro_rules! with_header {
    ($($reply:ident),* $(,)?) => {
        $(
            impl WithHeader for pb::$reply {
                fn with_header(header: Option<pb::ResponseHeader>) -> Self {
                    let mut reply = pb::$reply::default();
                    reply.header = header;
                    reply
                }
            }
        )*
    };
}

with_header!(
    AuthEnableResponse,
    AuthDisableResponse,
    AuthUserAddResponse,
    AuthUserGetResponse,
    AuthUserListResponse,
    AuthUserDeleteResponse,
    AuthUserChangePasswordResponse,
    AuthUserGrantRoleResponse,
    AuthUserRevokeRoleResponse,
    AuthRoleAddResponse,
    AuthRoleGetResponse,
    AuthRoleListResponse,
    AuthRoleDeleteResponse,
    AuthRoleGrantPermissionResponse,
    AuthRoleRevokePermissionResponse,
);

impl Auth {
    async fn propose<R: WithHeader>(self, request: Command) -> Result<R, Status> {
        let answer = self.0.propose(request).await?;
        let revision = self.0.shared.published.load().store.revision();
        Ok(R::with_header(self.0.header_at(revision, answer.term.0)))
    }

    async fn status(self) -> Result<pb::AuthStatusResponse, Status> {
        let answer = self.0.propose(Command::AuthStatus(pb::AuthStatusRequest {})).await?;
        let Applied::AuthStatus(mut reply) = answer.reply else {
            unreachable!("a status answers a status")
        };
        let revision = reply.header.map_or(0, |header| header.revision);
        reply.header = self.0.header_at(revision, answer.term.0);
        Ok(reply)
    }
}

/// A method whose request goes through the log as it is.
macro_rules! proposed {
    ($self:ident, $request:ident, $method:ident, $command:ident) => {
        $self
            .0
            .unary(
                Method::$method,
                |_| false,
                $request,
                |r| $self.clone().propose(Command::$command(r)),
            )
            .await
    };
}

/// A method that is not there before auth is.
macro_rules! refused {
    ($self:ident, $request:ident, $method:ident, $what:literal) => {
        $self
            .0
            .unary(
                Method::$method,
                |_| false,
                $request,
                |_| async { Err(status::not_supported_yet($what)) },
            )
            .await
    };
}

#[tonic::async_trait]
impl pb::auth_server::Auth for Auth {
    async fn auth_enable(
        &self,
        request: Request<pb::AuthEnableRequest>,
    ) -> Result<Response<pb::AuthEnableResponse>, Status> {
        proposed!(self, request, AuthEnable, AuthEnable)
    }

    async fn auth_disable(
        &self,
        request: Request<pb::AuthDisableRequest>,
    ) -> Result<Response<pb::AuthDisableResponse>, Status> {
        proposed!(self, request, AuthDisable, AuthDisable)
    }

    async fn auth_status(
        &self,
        request: Request<pb::AuthStatusRequest>,
    ) -> Result<Response<pb::AuthStatusResponse>, Status> {
        self.0.unary(Method::AuthStatus, |_| false, request, |_| self.clone().status()).await
    }

    async fn authenticate(
        &self,
        request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        let run = |_| async { Err(status::auth_not_enabled()) };
        self.0.unary(Method::Authenticate, |_| false, request, run).await
    }

    async fn user_add(
        &self,
        request: Request<pb::AuthUserAddRequest>,
    ) -> Result<Response<pb::AuthUserAddResponse>, Status> {
        refused!(self, request, UserAdd, "adding a user")
    }

    async fn user_get(
        &self,
        request: Request<pb::AuthUserGetRequest>,
    ) -> Result<Response<pb::AuthUserGetResponse>, Status> {
        proposed!(self, request, UserGet, AuthUserGet)
    }

    async fn user_list(
        &self,
        request: Request<pb::AuthUserListRequest>,
    ) -> Result<Response<pb::AuthUserListResponse>, Status> {
        proposed!(self, request, UserList, AuthUserList)
    }

    async fn user_delete(
        &self,
        request: Request<pb::AuthUserDeleteRequest>,
    ) -> Result<Response<pb::AuthUserDeleteResponse>, Status> {
        proposed!(self, request, UserDelete, AuthUserDelete)
    }

    async fn user_change_password(
        &self,
        request: Request<pb::AuthUserChangePasswordRequest>,
    ) -> Result<Response<pb::AuthUserChangePasswordResponse>, Status> {
        // The password must not reach the log in the clear, and there is no user to hash it for.
        let run = |_| async { Err(status::user_not_found()) };
        self.0.unary(Method::UserChangePassword, |_| false, request, run).await
    }

    async fn user_grant_role(
        &self,
        request: Request<pb::AuthUserGrantRoleRequest>,
    ) -> Result<Response<pb::AuthUserGrantRoleResponse>, Status> {
        proposed!(self, request, UserGrantRole, AuthUserGrantRole)
    }

    async fn user_revoke_role(
        &self,
        request: Request<pb::AuthUserRevokeRoleRequest>,
    ) -> Result<Response<pb::AuthUserRevokeRoleResponse>, Status> {
        proposed!(self, request, UserRevokeRole, AuthUserRevokeRole)
    }

    async fn role_add(
        &self,
        request: Request<pb::AuthRoleAddRequest>,
    ) -> Result<Response<pb::AuthRoleAddResponse>, Status> {
        refused!(self, request, RoleAdd, "adding a role")
    }

    async fn role_get(
        &self,
        request: Request<pb::AuthRoleGetRequest>,
    ) -> Result<Response<pb::AuthRoleGetResponse>, Status> {
        proposed!(self, request, RoleGet, AuthRoleGet)
    }

    async fn role_list(
        &self,
        request: Request<pb::AuthRoleListRequest>,
    ) -> Result<Response<pb::AuthRoleListResponse>, Status> {
        proposed!(self, request, RoleList, AuthRoleList)
    }

    async fn role_delete(
        &self,
        request: Request<pb::AuthRoleDeleteRequest>,
    ) -> Result<Response<pb::AuthRoleDeleteResponse>, Status> {
        proposed!(self, request, RoleDelete, AuthRoleDelete)
    }

    async fn role_grant_permission(
        &self,
        request: Request<pb::AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<pb::AuthRoleGrantPermissionResponse>, Status> {
        proposed!(self, request, RoleGrantPermission, AuthRoleGrantPermission)
    }

    async fn role_revoke_permission(
        &self,
        request: Request<pb::AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<pb::AuthRoleRevokePermissionResponse>, Status> {
        proposed!(self, request, RoleRevokePermission, AuthRoleRevokePermission)
    }
}
