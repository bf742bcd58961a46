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

use bytes::Bytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::{health, v3electionpb, v3lockpb};
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
    // One that only reads asks once more where it reads; one without anything in it needs nobody.
    pb::TxnRequest => |this| {
        let empty = this.compare.is_empty() && this.success.is_empty() && this.failure.is_empty();
        if empty { Gate::Token } else { Gate::Log }
    };
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
    // They are made of calls, each of which is made, and let in, with the caller's credentials.
    v3lockpb::LockRequest => |_| Gate::Open;
    v3lockpb::UnlockRequest => |_| Gate::Open;
    v3electionpb::CampaignRequest => |_| Gate::Open;
    v3electionpb::ProclaimRequest => |_| Gate::Open;
    v3electionpb::LeaderRequest => |_| Gate::Open;
    v3electionpb::ResignRequest => |_| Gate::Open;
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

/// As [`check`], for what is read here and now: a token of a revision that this member has not come to
/// does not speak of the users that it knows.
///
/// # Errors
/// Any of [`AuthError`] that a check answers.
pub fn check_read(now: &Published, who: &Who, need: &Need<'_>) -> Result<(), AuthError> {
    check(now, who, need)?;
    match who.at(&now.auth).revision > now.auth.revision() {
        true => Err(AuthError::OldRevision),
        false => Ok(()),
    }
}

/// Whether `who` may read all of `keys`, which another member says are attached to a lease. Role root need
/// not be asked for them, under whatever revision its token is.
///
/// # Errors
/// Any of [`AuthError`] that a check answers.
pub fn check_attached(now: &Published, who: &Who, keys: &[Bytes]) -> Result<(), AuthError> {
    if check(now, who, &Need::Root).is_ok() {
        return Ok(());
    }
    keys.iter().try_for_each(|key| {
        let range = pb::RangeRequest { key: key.clone(), ..Default::default() };
        check(now, who, &need(Asked::Range(&range)))
    })
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use engine_api::Batch;
    use quorate_proto::authpb::{Permission, UserAddOptions, permission};
    use tonic::Extensions;
    use tonic::metadata::MetadataMap;

    use super::*;
    use crate::actors::applier::TokenSink as _;
    use crate::core::apply::{Machine, TokenChange};
    use crate::core::auth::AuthStore;
    use crate::core::auth::password::Salt;
    use crate::core::membership::{Membership, Version};
    use crate::core::types::{ClusterId, Index, MemberId};
    use crate::transport::identity::ClientCert;
    use crate::transport::member::tests::{Silent, asked_reads, silent_over};

    const TIMEOUT: Duration = Duration::from_millis(30);
    const SECRET_LEASE: i64 = 7;

    fn user(auth: &mut AuthStore, name: &str) {
        let add = pb::AuthUserAddRequest {
            name: name.into(),
            options: Some(UserAddOptions { no_password: true }),
            ..Default::default()
        };
        auth.user_add(&add, &Salt { id: 1, index: 1 }, &mut Batch::default()).unwrap();
    }

    /// Users root and alice, who may read and write from `a` to `b`. Key `secret` has a lease.
    fn machine(enabled: bool) -> Machine {
        let members = Membership::new(ClusterId(1), MemberId(1), 1);
        let mut machine = Machine::new(members, 2, Version::parse("3.7.1").unwrap());
        machine.leases.grant(LeaseId(SECRET_LEASE), 60).unwrap();
        machine.leases.attach(b"secret", LeaseId(SECRET_LEASE)).unwrap();
        let (auth, batch) = (&mut machine.auth, &mut Batch::default());
        user(auth, "root");
        user(auth, "alice");
        auth.user_grant_role("root", "root", batch).unwrap();
        auth.role_add("r", batch).unwrap();
        auth.user_grant_role("alice", "r", batch).unwrap();
        let perm = Permission {
            perm_type: permission::Type::Readwrite as i32,
            key: "a".into(),
            range_end: "b".into(),
        };
        let grant = pb::AuthRoleGrantPermissionRequest { name: "r".into(), perm: Some(perm) };
        auth.role_grant_permission(&grant, batch).unwrap();
        if enabled {
            auth.enable(batch).unwrap();
        }
        machine
    }

    fn silent(enabled: bool) -> Silent {
        silent_within(enabled, TIMEOUT)
    }

    fn silent_within(enabled: bool, request_timeout: Duration) -> Silent {
        let silent = silent_over(&machine(enabled), request_timeout);
        for (username, index) in [("root", 1), ("alice", 2)] {
            let (username, token) = (username.to_string(), token(username, index));
            silent.member.tokens.changed(&TokenChange::Assigned { username, token });
        }
        silent
    }

    fn token(user: &str, index: u64) -> String {
        format!("{user:z<16}.{index}")
    }

    fn shows(pairs: &[(&'static str, &str)]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for (key, value) in pairs {
            metadata.insert(*key, value.parse().unwrap());
        }
        metadata
    }

    fn text<T: std::fmt::Debug>(result: Result<T, Status>) -> String {
        result.unwrap_err().message().to_string()
    }

    async fn as_user<Q: Gated>(member: &Arc<Member>, name: &str, request: &Q) -> String {
        let shown = match name {
            "" => shows(&[]),
            "root" => shows(&[("token", &token(name, 1))]),
            "alice" => shows(&[("token", &token(name, 2))]),
            other => shows(&[("token", other)]),
        };
        let extensions = Extensions::default();
        match member.let_in(Credentials::of(&shown, &extensions), request).await {
            Ok(_) => "in".into(),
            Err(status) => status.message().trim_start_matches("etcdserver: ").into(),
        }
    }

    /// What someone without a credential, alice, root and someone with a bad token are told.
    async fn told<Q: Gated>(member: &Arc<Member>, request: Q) -> [String; 4] {
        [
            as_user(member, "", &request).await,
            as_user(member, "alice", &request).await,
            as_user(member, "root", &request).await,
            as_user(member, "bad", &request).await,
        ]
    }

    const EMPTY: &str = "user name is empty";
    const DENIED: &str = "permission denied";
    const BAD: &str = "invalid auth token";
    /// The test's raft never says that authentication is on for certain.
    const UNSURE: &str = "request timed out";

    #[test]
    fn a_call_is_let_in_by_what_it_needs() {
        actix::System::new().block_on(async {
            let silent = silent(true);
            let member = &silent.member;
            let root_only = [EMPTY, DENIED, "in", BAD];
            let any_user = [EMPTY, "in", "in", BAD];
            let logged = [UNSURE, "in", "in", BAD];
            let anyone = ["in"; 4];
            macro_rules! assert_told {
                ($($request:expr => $expected:expr;)*) => {$(
                    let request = stringify!($request);
                    assert_eq!(told(member, $request).await, $expected, "{request}");
                )*};
            }
            let keys = |key: &str| pb::WatchCreateRequest {
                key: key.to_string().into(),
                ..Default::default()
            };
            let range = |key: &str, end: &str| pb::WatchCreateRequest {
                range_end: end.to_string().into(),
                ..keys(key)
            };
            let ttl = |keys| pb::LeaseTimeToLiveRequest { id: SECRET_LEASE, keys };
            let alarm = |action| pb::AlarmRequest { action, ..Default::default() };
            assert_told! {
                pb::CompactionRequest::default() => root_only;
                keys("a") => any_user;
                range("a", "b") => any_user;
                range("a", "c") => root_only;
                range("a", "\0") => root_only;
                keys("secret") => root_only;
                keys("") => root_only;
                pb::LeaseGrantRequest::default() => any_user;
                pb::LeaseRevokeRequest::default() => logged;
                pb::LeaseKeepAliveRequest { id: SECRET_LEASE } => root_only;
                pb::LeaseKeepAliveRequest { id: 8 } => any_user;
                ttl(true) => root_only;
                ttl(false) => any_user;
                pb::LeaseLeasesRequest::default() => root_only;
                pb::MemberAddRequest::default() => root_only;
                pb::MemberRemoveRequest::default() => root_only;
                pb::MemberUpdateRequest::default() => root_only;
                pb::MemberPromoteRequest::default() => root_only;
                pb::MemberListRequest::default() => any_user;
                alarm(0) => any_user;
                alarm(1) => root_only;
                alarm(2) => root_only;
                pb::StatusRequest::default() => any_user;
                pb::DefragmentRequest::default() => root_only;
                pb::HashRequest::default() => root_only;
                pb::HashKvRequest::default() => root_only;
                pb::SnapshotRequest::default() => root_only;
                pb::MoveLeaderRequest::default() => root_only;
                pb::DowngradeRequest::default() => root_only;
                pb::AuthStatusRequest::default() => ["in", "in", "in", BAD];
                pb::AuthenticateRequest::default() => anyone;
                health::HealthCheckRequest::default() => anyone;
                health::HealthListRequest::default() => anyone;
                pb::RangeRequest::default() => ["in", "in", "in", BAD];
                pb::PutRequest::default() => logged;
                pb::DeleteRangeRequest::default() => logged;
                pb::TxnRequest::default() => ["in", "in", "in", BAD];
                pb::TxnRequest {
                    compare: vec![pb::Compare::default()],
                    ..Default::default()
                } => logged;
                pb::AuthEnableRequest::default() => logged;
                pb::AuthDisableRequest::default() => logged;
                pb::AuthUserAddRequest::default() => logged;
                pb::AuthUserGetRequest::default() => logged;
                pb::AuthRoleListRequest::default() => logged;
            }
        });
    }

    #[test]
    fn while_authentication_is_off_nothing_is_looked_at() {
        actix::System::new().block_on(async {
            let silent = silent(false);
            for name in ["", "alice", "bad"] {
                let told = as_user(&silent.member, name, &pb::CompactionRequest::default()).await;
                assert_eq!(told, "in");
                let told = as_user(&silent.member, name, &pb::PutRequest::default()).await;
                assert_eq!(told, "in");
            }
            let shown = shows(&[("token", &token("alice", 2))]);
            let who = silent.member.who(Credentials::of(&shown, &Extensions::default())).await;
            assert_eq!(who.unwrap(), Who::NOBODY);
        });
    }

    #[test]
    fn the_first_credential_counts_whatever_it_is() {
        actix::System::new().block_on(async {
            let silent = silent(true);
            let (alice, root) = (token("alice", 2), token("root", 1));
            let bearer = format!("Bearer {root}");
            let cert = |name: Option<&str>| Some(ClientCert { common_name: name.map(Into::into) });
            let gateway = ("grpcgateway-accept", "*/*");
            for (shown, cert, expected) in [
                (shows(&[]), None, Ok("")),
                (shows(&[("token", &alice)]), None, Ok("alice")),
                (shows(&[("authorization", &root)]), None, Ok("root")),
                (shows(&[("authorization", &bearer)]), None, Ok("root")),
                (shows(&[("token", &bearer)]), None, Ok("root")),
                (shows(&[("token", &alice), ("authorization", &root)]), None, Ok("alice")),
                (shows(&[("token", "x"), ("authorization", &root)]), None, Err(BAD)),
                (shows(&[("token", &alice)]), cert(Some("root")), Ok("alice")),
                (shows(&[("token", "x")]), cert(Some("root")), Err(BAD)),
                (shows(&[("token", "")]), cert(Some("root")), Err(BAD)),
                (shows(&[]), cert(Some("root")), Ok("root")),
                (shows(&[]), cert(Some("")), Ok("")),
                (shows(&[]), cert(None), Ok("")),
                (shows(&[gateway]), cert(Some("root")), Ok("")),
                (shows(&[gateway, ("authorization", &alice)]), cert(Some("root")), Ok("alice")),
            ] {
                let mut extensions = Extensions::default();
                if let Some(cert) = cert.clone() {
                    extensions.insert(cert);
                }
                let credentials = Credentials::of(&shown, &extensions);
                let (kept, now) = (credentials.to_owned(), silent.member.now());
                for credentials in [credentials, kept.borrowed()] {
                    let who = silent.member.who(credentials).await;
                    let caller = who.map(|who| who.at(&now.auth));
                    match expected {
                        Ok(name) => {
                            let caller = caller.unwrap();
                            assert_eq!(caller.username, name, "{shown:?} {cert:?}");
                            // A certificate without a name is a credential all the same.
                            let shown = credentials != Credentials::default();
                            let revision = if shown { now.auth.revision() } else { 0 };
                            assert_eq!(caller.revision, revision, "{name} {cert:?}");
                        }
                        Err(why) => assert!(text(caller).ends_with(why), "{shown:?} {cert:?}"),
                    }
                }
            }
        });
    }

    #[test]
    fn a_token_of_a_login_that_is_not_applied_here_is_looked_for_once_this_member_is_up_to_date() {
        actix::System::new().block_on(async {
            let silent = silent_within(true, Duration::from_secs(60));
            let member = silent.member.clone();
            let ask = |token: String| {
                let member = member.clone();
                actix::spawn(async move {
                    let shown = shows(&[("token", &token)]);
                    member.who(Credentials::of(&shown, &Extensions::default())).await
                })
            };
            let up_to_date = async || loop {
                tokio::task::yield_now().await;
                if let Some(reply) = asked_reads().pop() {
                    break reply;
                }
            };
            let late = token("carol", 9);
            let waiting = ask(late.clone());
            let reply = up_to_date().await;
            assert!(!waiting.is_finished());
            let username = "alice".to_string();
            member.tokens.changed(&TokenChange::Assigned { username, token: late });
            let applied = Published { applied: Index(9), ..Published::clone(&member.now()) };
            member.shared.published.store(Arc::new(applied));
            reply.send(Ok(())).unwrap();
            let who = waiting.await.unwrap().unwrap();
            assert_eq!(who.at(&member.now().auth).username, "alice");
            // One that is not there although its entry is applied: nothing is asked.
            assert!(text(ask(token("dave", 9)).await.unwrap()).ends_with(BAD));
            // One of an entry that is nowhere, however far, ends with the answer, not with its entry.
            let waiting = ask(token("dave", u64::MAX));
            up_to_date().await.send(Ok(())).unwrap();
            assert!(text(waiting.await.unwrap()).ends_with(BAD));
            // Nor does it end well where nobody answers.
            let waiting = ask(token("dave", 10));
            drop(up_to_date().await);
            assert!(text(waiting.await.unwrap()).ends_with(BAD));
        });
    }

    #[test]
    fn a_read_is_checked_against_the_state_that_it_reads() {
        actix::System::new().block_on(async {
            let silent = silent(true);
            let member = &silent.member;
            let shown = shows(&[("token", &token("alice", 2))]);
            let who = member.who(Credentials::of(&shown, &Extensions::default())).await.unwrap();
            let range =
                |key: &str| pb::RangeRequest { key: key.to_string().into(), ..Default::default() };
            let read = |key: &str| {
                member.read_as(&who, Asked::Range(&range(key)), |now, _| Ok(now.auth.revision()))
            };
            assert_eq!(read("a").unwrap(), member.now().auth.revision());
            assert_eq!(text(read("secret")), status::permission_denied().message());
            let told = |keys: &[Bytes]| check_attached(&member.now(), &who, keys);
            assert_eq!(told(&["a".into()]), Ok(()));
            assert_eq!(told(&["a".into(), "secret".into()]), Err(AuthError::PermissionDenied));
            // The role is taken away after the caller was let in.
            let mut auth = AuthStore::clone(&member.now().auth);
            auth.user_revoke_role("alice", "r", &mut Batch::default()).unwrap();
            let without = Published { auth: Arc::new(auth), ..Published::clone(&member.now()) };
            member.shared.published.store(Arc::new(without));
            assert_eq!(text(read("a")), status::permission_denied().message());
        });
    }

    #[test]
    fn a_signed_token_is_of_the_revision_that_it_names() {
        actix::System::new().block_on(async {
            use crate::config::{AuthToken, JwtOptions};
            use crate::transport::token::{Issue, SystemClock, Tokens};
            let dir = tempfile::tempdir().unwrap();
            let priv_key = dir.path().join("secret");
            std::fs::write(&priv_key, "secret").unwrap();
            let options = JwtOptions {
                sign_method: "HS256".into(),
                pub_key: Path::new("").into(),
                priv_key,
                ttl: Duration::from_secs(60),
            };
            let clock = Box::new(SystemClock::default());
            let tokens = Tokens::new(&AuthToken::Jwt(options), TIMEOUT, clock).unwrap();
            let silent = silent_over(&machine(true), TIMEOUT);
            let Silent { member, .. } = silent;
            let mut member = Arc::into_inner(member).expect("nobody else has it");
            member.tokens = Arc::new(tokens);
            let member = Arc::new(member);
            let revision = member.now().auth.revision();
            for (revision, keys, role) in
                [(revision, "in", "in"), (revision - 1, "revision of auth store is old", "in")]
            {
                let Ok(Issue::Signed(token)) = member.tokens.issue("root", revision) else {
                    panic!("a signed token")
                };
                let watch = pb::WatchCreateRequest { key: "k".into(), ..Default::default() };
                assert_eq!(as_user(&member, &token, &watch).await, keys);
                // Role root is enough under any revision.
                let compaction = pb::CompactionRequest::default();
                assert_eq!(as_user(&member, &token, &compaction).await, role);
                let shown = shows(&[("token", &token)]);
                let who = member.who(Credentials::of(&shown, &Extensions::default())).await;
                let told = check_attached(&member.now(), &who.unwrap(), &["secret".into()]);
                assert_eq!(told, Ok(()), "{revision}");
            }
        });
    }
}
