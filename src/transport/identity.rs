//! Who asks: what a request carries to say so (v3-api 3.12), and whom that stands for.

use std::sync::Arc;

use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};

use super::member::Member;
use super::status;
use super::token::Bearer;
use crate::core::auth::AuthStore;
use crate::core::auth::access::Caller;

/// What the certificate of a connection says of its client. The listener puts it into the extensions of
/// each http request of a connection whose client showed a certificate that was verified, which only
/// happens with client-cert-auth.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientCert {
    /// The subject's Common Name, the user that the client is if it shows no token; `None` if the
    /// subject has none or an empty one. That names a user as well, who has no name and never is one.
    pub common_name: Option<String>,
}

/// In the metadata of a call that came as JSON. What such a call says of a certificate is the
/// gateway's, not the user's.
const FROM_GATEWAY: &str = "grpcgateway-accept";

/// What a call shows of who makes it. `T` is text: borrowed for a single call, owned for a stream.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Credentials<T> {
    /// Shown, if not always good.
    token: Option<T>,
    /// Of a certificate; empty if there is none in it.
    name: Option<T>,
}

impl<'a> Credentials<&'a str> {
    /// Those of a request.
    pub fn of(metadata: &'a MetadataMap, extensions: &'a Extensions) -> Self {
        let shown = metadata.get("token").or_else(|| metadata.get("authorization"));
        let token = shown.map(|value| {
            // What is no text is no token, but it was shown.
            let text = value.to_str().unwrap_or_default();
            text.strip_prefix("Bearer ").unwrap_or(text)
        });
        let cert = extensions.get::<ClientCert>().filter(|_| !metadata.contains_key(FROM_GATEWAY));
        // One without a name is still shown: in etcd, who may not do something is told so, and not that
        // nobody asks.
        let name = cert.map(|cert| cert.common_name.as_deref().unwrap_or_default());
        Credentials { token, name }
    }

    /// A token that another member hands on, if it does.
    pub fn handed_on(token: Option<&'a str>) -> Self {
        let token = token.map(|token| token.strip_prefix("Bearer ").unwrap_or(token));
        Credentials { token, name: None }
    }

    /// The token that is shown.
    pub fn token(&self) -> Option<&'a str> {
        self.token
    }

    /// For a stream, each of whose requests is made with them.
    pub fn to_owned(self) -> Credentials<String> {
        Credentials { token: self.token.map(Into::into), name: self.name.map(Into::into) }
    }
}

impl Credentials<String> {
    /// To make one request with.
    pub fn borrowed(&self) -> Credentials<&str> {
        Credentials { token: self.token.as_deref(), name: self.name.as_deref() }
    }
}

/// Whom a call is made by, once its credentials were looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Who {
    /// `None` for someone without a credential, and while authentication is off.
    bearer: Option<Bearer>,
}

impl Who {
    /// Someone without a credential, which is all that is known while authentication is off.
    pub const NOBODY: Who = Who { bearer: None };

    /// Whether there is no credential.
    pub fn is_nobody(&self) -> bool {
        self.bearer.is_none()
    }

    /// The caller as users and roles of `store` are to see it: a credential that is of no certain
    /// revision is of the store's.
    pub fn at(&self, store: &AuthStore) -> Caller {
        match &self.bearer {
            None => Caller::NOBODY,
            Some(bearer) => Caller {
                username: bearer.user.to_string(),
                revision: bearer.revision.unwrap_or(store.revision()),
            },
        }
    }
}

impl Member {
    /// Whom `credentials` stand for. They are not looked at while authentication is off.
    ///
    /// # Errors
    /// `InvalidAuthToken`: a certificate does not help someone who shows a bad token.
    pub async fn who(self: &Arc<Self>, credentials: Credentials<&str>) -> Result<Who, Status> {
        if !self.shared.published.load().auth.enabled() {
            return Ok(Who::NOBODY);
        }
        let Some(token) = credentials.token else {
            let named = |name: &str| Bearer { user: name.into(), revision: None };
            return Ok(Who { bearer: credentials.name.map(named) });
        };
        match self.bearer(token).await {
            Some(bearer) => Ok(Who { bearer: Some(bearer) }),
            None => {
                tracing::warn!("invalid auth token");
                Err(status::invalid_auth_token())
            }
        }
    }

    async fn bearer(self: &Arc<Self>, token: &str) -> Option<Bearer> {
        let found = self.tokens.find(token);
        if found.is_some() {
            return found;
        }
        // It may be of a login that another member has answered already. Then its entry was committed
        // before this call. Not to be waited for by its number: anyone can write down a far one.
        let made_by = self.tokens.made_by(token)?;
        if self.shared.published.load().applied < made_by {
            self.read_index().await.ok()?;
        }
        self.tokens.find(token)
    }
}
