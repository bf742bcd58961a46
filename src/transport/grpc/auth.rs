//! `etcdserverpb.Auth`: users and roles are managed while authentication is off, which is how a cluster
//! prepares for it; switching it on is not supported yet (v3-api 3.12).

use std::sync::Arc;

use prost::Message;
use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status};

use crate::core::apply::Reply as Applied;
use crate::core::auth::password;
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
    AuthDisableResponse,
    AuthUserAddResponse,
    AuthUserDeleteResponse,
    AuthUserChangePasswordResponse,
    AuthUserGrantRoleResponse,
    AuthUserRevokeRoleResponse,
    AuthRoleAddResponse,
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

    /// The hash of a password, as it goes into the log: the password itself never does.
    async fn hashed(&self, clear: String) -> Result<String, Status> {
        if clear.len() > password::BYTES_MAX {
            return Err(status::password_too_long());
        }
        let cost = self.0.limits.bcrypt_cost;
        // Tens of milliseconds by default, twice as long with each step of the cost: other requests of
        // this thread do not wait for it.
        let hashing =
            tokio::task::spawn_blocking(move || bcrypt::hash_with_result(clear, cost)).await;
        match hashing {
            Ok(Ok(hash)) => Ok(password::proposed(&hash)),
            Ok(Err(error)) => Err(Status::unknown(error.to_string())),
            // The runtime ends, or the process does over a panic.
            Err(_) => Err(status::stopped()),
        }
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

/// A method whose request goes through the log, and whose reply is more than a header.
macro_rules! answered {
    ($self:ident, $request:ident, $method:ident, $command:ident, $reply:ident) => {
        $self
            .0
            .unary(
                Method::$method,
                |_| false,
                $request,
                |r| async move {
                    let answer = $self.0.propose(Command::$command(r)).await?;
                    let Applied::$reply(mut reply) = answer.reply else {
                        unreachable!("{} is answered in kind", stringify!($method))
                    };
                    let revision = reply.header.map_or(0, |header| header.revision);
                    reply.header = $self.0.header_at(revision, answer.term.0);
                    Ok(reply)
                },
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
        let run = |_| async {
            // A member that applies this entry cannot go on, as nothing enforces permissions yet. So it
            // never enters the log: what it would be refused for is found out by a read.
            self.0.read_index().await?;
            self.0.now().auth.check_enable()?;
            Err(status::not_supported_yet("enabling authentication"))
        };
        self.0.unary(Method::AuthEnable, |_| false, request, run).await
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
        answered!(self, request, AuthStatus, AuthStatus, AuthStatus)
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
        let run = |mut add: pb::AuthUserAddRequest| async {
            let clear = std::mem::take(&mut add.password);
            if !add.options.is_some_and(|options| options.no_password) {
                add.hashed_password = self.hashed(clear).await?;
            }
            self.clone().propose(Command::AuthUserAdd(add)).await
        };
        self.0.unary(Method::UserAdd, |_| false, request, run).await
    }

    async fn user_get(
        &self,
        request: Request<pb::AuthUserGetRequest>,
    ) -> Result<Response<pb::AuthUserGetResponse>, Status> {
        answered!(self, request, UserGet, AuthUserGet, UserGet)
    }

    async fn user_list(
        &self,
        request: Request<pb::AuthUserListRequest>,
    ) -> Result<Response<pb::AuthUserListResponse>, Status> {
        answered!(self, request, UserList, AuthUserList, UserList)
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
        let run = |mut change: pb::AuthUserChangePasswordRequest| async {
            let clear = std::mem::take(&mut change.password);
            if !clear.is_empty() {
                change.hashed_password = self.hashed(clear).await?;
            }
            self.clone().propose(Command::AuthUserChangePassword(change)).await
        };
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
        proposed!(self, request, RoleAdd, AuthRoleAdd)
    }

    async fn role_get(
        &self,
        request: Request<pb::AuthRoleGetRequest>,
    ) -> Result<Response<pb::AuthRoleGetResponse>, Status> {
        answered!(self, request, RoleGet, AuthRoleGet, RoleGet)
    }

    async fn role_list(
        &self,
        request: Request<pb::AuthRoleListRequest>,
    ) -> Result<Response<pb::AuthRoleListResponse>, Status> {
        answered!(self, request, RoleList, AuthRoleList, RoleList)
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
