//! `etcdserverpb.Auth`: users, roles and logins (v3-api 3.12).

use std::sync::Arc;

use prost::Message;
use quorate_proto::etcdserverpb as pb;
use tonic::{Request, Response, Status};

use crate::core::apply::Reply as Applied;
use crate::core::auth::AuthError;
use crate::core::auth::access::Asked;
use crate::core::check;
use crate::core::command::Request as Command;
use crate::metrics::Method;
use crate::transport::identity::Who;
use crate::transport::member::Member;
use crate::transport::status;
use crate::transport::token::{Issue, IssueError};

/// Characters of a name that the log shows of someone who is not let in.
const NAME_SHOWN_MAX: usize = 128;

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
    async fn propose<R: WithHeader>(self, who: Who, request: Command) -> Result<R, Status> {
        match &request {
            Command::AuthUserAdd(add) => check::user_add(add)?,
            Command::AuthRoleAdd(add) => check::role_add(add)?,
            _ => {}
        }
        let answer = self.0.propose(&who, request).await?;
        let revision = self.0.shared.published.load().store.revision();
        Ok(R::with_header(self.0.header_at(revision, answer.term.0)))
    }

    /// The hash of a password, as it goes into the log. It is work, so that someone who may not have it
    /// stored is refused first.
    async fn hashed(&self, clear: String, who: &Who, asked: Asked<'_>) -> Result<String, Status> {
        self.0.permit_now(who, asked).await?;
        self.0.passwords.hash(clear).await
    }

    async fn log_in(
        self,
        login: pb::AuthenticateRequest,
    ) -> Result<pb::AuthenticateResponse, Status> {
        let pb::AuthenticateRequest { name, password } = login;
        self.0.read_index().await?;
        loop {
            let checked = self.check_password(&name, &password).await?;
            let (simple_token, signed) = match self.0.tokens.issue(&name, checked) {
                Ok(Issue::Prefix(prefix)) => (prefix, None),
                Ok(Issue::Signed(token)) => (String::new(), Some(token)),
                Err(IssueError::VerifyOnly) => return Err(status::verify_only()),
                Err(error @ (IssueError::NoProvider | IssueError::Failed)) => {
                    tracing::warn!(user = name, %error, "failed to make a token");
                    return Err(status::auth_failed());
                }
            };
            // Without the password: it has been looked at.
            let entry = pb::InternalAuthenticateRequest {
                name: name.clone(),
                password: String::new(),
                simple_token,
            };
            let answer = self.0.propose(&Who::NOBODY, Command::Authenticate(entry)).await?;
            let Applied::Authenticate { token, auth_revision } = answer.reply else {
                unreachable!("a login answers a login")
            };
            if auth_revision == checked {
                let revision = self.0.shared.published.load().store.revision();
                let header = self.0.header_at(revision, answer.term.0);
                return Ok(pb::AuthenticateResponse { header, token: signed.unwrap_or(token) });
            }
            // The password may be another one by now.
            tracing::info!(user = name, "revision when password checked became stale; retrying");
        }
    }

    /// The auth revision at which `clear` is the password of user `name`.
    async fn check_password(&self, name: &str, clear: &str) -> Result<u64, Status> {
        let (hash, revision) = {
            let now = self.0.shared.published.load();
            let hash = match now.auth.password_of(name) {
                Ok(hash) => Some(String::from_utf8_lossy(hash).into_owned()),
                // As slow to refuse as a wrong password.
                Err(AuthError::AuthFailed) => None,
                Err(error) => return Err(error.into()),
            };
            (hash, now.auth.revision())
        };
        if self.0.passwords.compare(clear.to_string(), hash).await? {
            Ok(revision)
        } else {
            // Anyone can send a name as long as a request.
            let shown =
                name.char_indices().nth(NAME_SHOWN_MAX).map_or(name, |(end, _)| &name[..end]);
            tracing::warn!(user = shown, "invalid password");
            Err(status::auth_failed())
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
                |r, who| $self.clone().propose(who, Command::$command(r)),
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
                |r, who| async move {
                    let answer = $self.0.propose(&who, Command::$command(r)).await?;
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
        answered!(self, request, AuthStatus, AuthStatus, AuthStatus)
    }

    async fn authenticate(
        &self,
        request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        let run = |r, _| self.clone().log_in(r);
        self.0.unary(Method::Authenticate, |_| false, request, run).await
    }

    async fn user_add(
        &self,
        request: Request<pb::AuthUserAddRequest>,
    ) -> Result<Response<pb::AuthUserAddResponse>, Status> {
        let run = |mut add: pb::AuthUserAddRequest, who| async move {
            let clear = std::mem::take(&mut add.password);
            if !add.options.is_some_and(|options| options.no_password) {
                add.hashed_password = self.hashed(clear, &who, Asked::UserAdd).await?;
            }
            self.clone().propose(who, Command::AuthUserAdd(add)).await
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
        let run = |mut change: pb::AuthUserChangePasswordRequest, who| async move {
            let clear = std::mem::take(&mut change.password);
            if !clear.is_empty() {
                let asked = Asked::UserChangePassword;
                change.hashed_password = self.hashed(clear, &who, asked).await?;
            }
            self.clone().propose(who, Command::AuthUserChangePassword(change)).await
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
