//! A member with users and roles whose authentication is on, and sessions of those users.

use quorate_proto::authpb::Permission;
use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};

use crate::server::{Api, Kind, Member, Said, said};

/// What the tests ask of the program under test, they ask of these.
pub fn subjects() -> Vec<Kind> {
    match std::env::var("QUORATE_TEST_PROGRAM").as_deref() {
        Ok("etcd") => vec![Kind::Etcd],
        Ok("quorate" | "") | Err(_) => vec![Kind::Memory, Kind::Etcd],
        Ok(other) => panic!("QUORATE_TEST_PROGRAM={other} is neither quorate nor etcd"),
    }
}

/// What only the reference release does is asked of these.
pub fn reference_subjects() -> Vec<Kind> {
    let mut kinds = subjects();
    kinds.retain(|kind| *kind != Kind::Etcd);
    kinds
}

/// The cheapest hashes that both programs make: no test measures how dear they are.
pub const CHEAP: [&str; 2] = ["--bcrypt-cost", "4"];

/// A permission: its type, key and range end.
pub type Grant = (Type, &'static str, &'static str);

/// A user and what it is granted, by a role of its own name.
pub type User = (&'static str, &'static [Grant]);

/// The password that a user of these tests has first.
pub fn password(user: &str) -> String {
    format!("{user}-secret")
}

/// One who calls: a connection, and the token that goes with each call.
#[derive(Clone)]
pub struct Session {
    pub api: Api,
    metadata: Option<(&'static str, MetadataValue<Ascii>)>,
}

impl Session {
    /// Without a credential.
    pub fn nobody(api: Api) -> Session {
        Session { api, metadata: None }
    }

    /// With a token that came from elsewhere.
    pub fn with_token(api: Api, token: &str) -> Session {
        Session::with_metadata(api, "token", token)
    }

    /// With a token below another key.
    pub fn with_metadata(api: Api, key: &'static str, token: &str) -> Session {
        let token = token.parse().expect("a token is visible ASCII");
        Session { api, metadata: Some((key, token)) }
    }

    /// Logged in with a user's first password.
    pub async fn of(api: Api, user: &str) -> Session {
        let token = login(&api, user, &password(user)).await.expect("the login");
        Session::with_token(api, &token)
    }

    pub fn ask<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some((key, token)) = &self.metadata {
            request.metadata_mut().insert(*key, token.clone());
        }
        request
    }

    /// The value of a key, if it is there.
    pub async fn get(&self, key: &str) -> Result<Option<String>, Said> {
        let request = self.ask(crate::server::get(key));
        let reply = self.api.kv.clone().range(request).await.map_err(said)?.into_inner();
        Ok(reply.kvs.first().map(|kv| {
            String::from_utf8(crate::server::kv(kv).value.to_vec()).expect("the tests write text")
        }))
    }

    pub async fn put(&self, key: &str, value: &str) -> Result<(), Said> {
        let value = value.to_string().into();
        let request = self.ask(pb::PutRequest { value, ..crate::server::put_of(key) });
        self.api.kv.clone().put(request).await.map(drop).map_err(said)
    }

    /// The revision of the auth store, where the release tells it.
    pub async fn auth_revision(&self) -> u64 {
        let request = self.ask(pb::AuthStatusRequest {});
        self.api.auth.clone().auth_status(request).await.unwrap().into_inner().auth_revision
    }

    pub async fn add_user(&self, name: &str, password: &str) -> Result<(), Said> {
        let (name, password) = (name.to_string(), password.to_string());
        let message = pb::AuthUserAddRequest { name, password, ..Default::default() };
        self.api.auth.clone().user_add(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn delete_user(&self, name: &str) -> Result<(), Said> {
        let message = pb::AuthUserDeleteRequest { name: name.to_string() };
        self.api.auth.clone().user_delete(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn change_password(&self, name: &str, password: &str) -> Result<(), Said> {
        let (name, password) = (name.to_string(), password.to_string());
        let message = pb::AuthUserChangePasswordRequest { name, password, ..Default::default() };
        self.api.auth.clone().user_change_password(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn add_role(&self, name: &str) -> Result<(), Said> {
        let message = pb::AuthRoleAddRequest { name: name.to_string() };
        self.api.auth.clone().role_add(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn grant_role(&self, user: &str, role: &str) -> Result<(), Said> {
        let (user, role) = (user.to_string(), role.to_string());
        let message = pb::AuthUserGrantRoleRequest { user, role };
        self.api.auth.clone().user_grant_role(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn revoke_role(&self, user: &str, role: &str) -> Result<(), Said> {
        let (name, role) = (user.to_string(), role.to_string());
        let message = pb::AuthUserRevokeRoleRequest { name, role };
        self.api.auth.clone().user_revoke_role(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn grant(&self, role: &str, (kind, key, end): Grant) -> Result<(), Said> {
        let perm = Permission {
            perm_type: kind as i32,
            key: key.to_string().into(),
            range_end: end.to_string().into(),
        };
        let message =
            pb::AuthRoleGrantPermissionRequest { name: role.to_string(), perm: Some(perm) };
        self.api.auth.clone().role_grant_permission(self.ask(message)).await.map(drop).map_err(said)
    }

    pub async fn revoke(&self, role: &str, key: &str, end: &str) -> Result<(), Said> {
        let message = pb::AuthRoleRevokePermissionRequest {
            role: role.to_string(),
            key: key.to_string().into(),
            range_end: end.to_string().into(),
        };
        let asked = self.ask(message);
        self.api.auth.clone().role_revoke_permission(asked).await.map(drop).map_err(said)
    }

    pub async fn enable(&self) -> Result<(), Said> {
        let request = self.ask(pb::AuthEnableRequest {});
        self.api.auth.clone().auth_enable(request).await.map(drop).map_err(said)
    }

    pub async fn disable(&self) -> Result<(), Said> {
        let request = self.ask(pb::AuthDisableRequest {});
        self.api.auth.clone().auth_disable(request).await.map(drop).map_err(said)
    }
}

/// The token that a name and password are given.
pub async fn login(api: &Api, name: &str, password: &str) -> Result<String, Said> {
    let request =
        pb::AuthenticateRequest { name: name.to_string(), password: password.to_string() };
    let reply = api.auth.clone().authenticate(request).await.map_err(said)?;
    Ok(reply.into_inner().token)
}

/// Makes `users`, and root, and turns authentication on.
pub async fn secure(api: Api, users: &[User]) {
    let anyone = Session::nobody(api);
    for (name, grants) in users {
        anyone.add_user(name, &password(name)).await.unwrap();
        if grants.is_empty() {
            continue;
        }
        anyone.add_role(name).await.unwrap();
        for grant in *grants {
            anyone.grant(name, *grant).await.unwrap();
        }
        anyone.grant_role(name, name).await.unwrap();
    }
    anyone.add_user("root", &password("root")).await.unwrap();
    anyone.add_role("root").await.unwrap();
    anyone.grant_role("root", "root").await.unwrap();
    anyone.enable().await.unwrap();
}

/// A member of its own whose authentication is on, and root's session.
pub async fn secured(kind: Kind, users: &[User]) -> (Member, Session) {
    secured_with(kind, &[], users).await
}

pub async fn secured_with(kind: Kind, flags: &[&str], users: &[User]) -> (Member, Session) {
    let flags: Vec<&str> = CHEAP.iter().chain(flags).copied().collect();
    let member = Member::with_flags(kind, &flags).await;
    secure(member.api(), users).await;
    let root = Session::of(member.api(), "root").await;
    (member, root)
}
