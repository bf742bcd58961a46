//! Authentication in the state machine: who may change what, whoever applies it.

use bytes::Bytes;
use engine_api::Engine;
use quorate::core::apply::{ApplyError, Effects, Reply, TokenChange};
use quorate::core::auth::AuthError;
use quorate::core::auth::access::Caller;
use quorate::core::command::Request;
use quorate::core::types::LeaseId;
use quorate_proto::authpb::permission::Type::{self, Read, Readwrite, Write};
use quorate_proto::authpb::{Permission, UserAddOptions};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::request_op::Request as Op;

use crate::rig::{Rig, machine};

/// The keys that begin with m may be read by user r, written by w, and both by b; n has no password.
struct Guarded {
    rig: Rig,
}

type Result<T = Reply> = std::result::Result<T, ApplyError>;

fn user_add(name: &str, no_password: bool) -> Request {
    Request::AuthUserAdd(pb::AuthUserAddRequest {
        name: name.into(),
        hashed_password: "aGFzaA==".into(),
        options: Some(UserAddOptions { no_password }),
        ..Default::default()
    })
}

fn grant(role: &str, kind: Type, key: &'static str, range_end: &'static str) -> Request {
    let perm = Permission { perm_type: kind as i32, key: key.into(), range_end: range_end.into() };
    let name = role.into();
    Request::AuthRoleGrantPermission(pb::AuthRoleGrantPermissionRequest { name, perm: Some(perm) })
}

fn put(key: &'static str) -> pb::PutRequest {
    pb::PutRequest { key: key.into(), value: "v".into(), ..Default::default() }
}

fn range(key: &'static str) -> pb::RangeRequest {
    pb::RangeRequest { key: key.into(), ..Default::default() }
}

fn txn(ops: Vec<Op>) -> pb::TxnRequest {
    let success = ops.into_iter().map(|op| pb::RequestOp { request: Some(op) }).collect();
    pb::TxnRequest { success, ..Default::default() }
}

fn login(name: &str, simple_token: &str) -> Request {
    let (name, simple_token) = (name.into(), simple_token.into());
    Request::Authenticate(pb::InternalAuthenticateRequest { name, simple_token, ..<_>::default() })
}

fn grant_lease(id: i64) -> Request {
    Request::LeaseGrant(pb::LeaseGrantRequest { id, ttl: 60 })
}

fn revoke_lease(id: i64) -> Request {
    Request::LeaseRevoke(pb::LeaseRevokeRequest { id })
}

const ENABLE: fn() -> Request = || Request::AuthEnable(pb::AuthEnableRequest {});
const DISABLE: fn() -> Request = || Request::AuthDisable(pb::AuthDisableRequest {});

/// The error of users and roles that a request is refused for.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>) -> AuthError {
    match result {
        Err(ApplyError::Auth(error)) => error,
        other => panic!("{other:?}"),
    }
}

impl Guarded {
    /// With everything prepared but for being enabled.
    fn prepared() -> Self {
        let mut guarded = Guarded { rig: Rig::new() };
        for name in ["root", "r", "w", "b", "n"] {
            guarded.done(user_add(name, name == "n"));
            guarded.done(Request::AuthRoleAdd(pb::AuthRoleAddRequest { name: name.into() }));
            let (user, role) = (name.into(), name.into());
            let grant = pb::AuthUserGrantRoleRequest { user, role };
            guarded.done(Request::AuthUserGrantRole(grant));
        }
        for (role, kind) in [("r", Read), ("w", Write), ("b", Readwrite)] {
            guarded.done(grant(role, kind, "m", "n"));
        }
        guarded
    }

    fn enabled() -> Self {
        let mut guarded = Self::prepared();
        guarded.done(ENABLE());
        guarded
    }

    fn caller(&self, name: &str) -> Caller {
        Caller { username: name.into(), revision: self.rig.machine.auth.revision() }
    }

    fn ask(&mut self, caller: &Caller, request: Request) -> (Result, Effects) {
        let (outcome, effects) = self.rig.apply_as(caller, request, true);
        (outcome.unwrap().unwrap().result, effects)
    }

    fn ask_as(&mut self, name: &str, request: Request) -> Result {
        self.ask(&self.caller(name), request).0
    }

    /// Something that a member asks for by itself, or anyone while authentication is off.
    #[track_caller]
    fn done(&mut self, request: Request) -> Reply {
        self.ask(&Caller::NOBODY, request).0.unwrap()
    }

    fn value(&mut self, key: &'static str) -> Option<Bytes> {
        let Ok(Reply::Range(found)) = self.ask_as("root", Request::Range(range(key))) else {
            panic!("root reads everything");
        };
        found.kvs.first().map(|kv| kv.parse().unwrap().value)
    }
}

#[test]
fn authentication_is_enabled_once_there_is_a_root() {
    let mut guarded = Guarded { rig: Rig::new() };
    let enable = |guarded: &mut Guarded| guarded.ask(&Caller::NOBODY, ENABLE());
    assert_eq!(refused(enable(&mut guarded).0), AuthError::RootUserNotExist);
    guarded.done(user_add("root", false));
    assert_eq!(refused(enable(&mut guarded).0), AuthError::RootRoleNotExist);
    let grant = pb::AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() };
    guarded.done(Request::AuthUserGrantRole(grant));
    let revision = guarded.rig.machine.auth.revision();
    let (result, effects) = enable(&mut guarded);
    assert_eq!(result.unwrap(), Reply::Done);
    assert!(effects.auth, "readers are shown that it is on");
    assert!(effects.tokens.is_empty());
    assert!(guarded.rig.machine.auth.enabled());
    assert_eq!(guarded.rig.machine.auth.revision(), revision);

    // From now on root alone may, and nothing happens.
    assert_eq!(refused(enable(&mut guarded).0), AuthError::UserEmpty);
    let root = guarded.caller("root");
    let (result, effects) = guarded.ask(&root, ENABLE());
    assert_eq!((result.unwrap(), effects.auth), (Reply::Done, false));
    assert_eq!(guarded.rig.machine.auth.revision(), revision);
}

#[test]
fn authentication_goes_on_after_a_restart_and_in_what_a_leader_sends() {
    let mut guarded = Guarded::enabled();
    guarded.ask_as("b", Request::Put(put("m"))).unwrap();
    guarded.rig.flush();
    let kept = guarded.rig.machine.auth.clone();

    let received = machine().replaced_by(&*guarded.rig.engine.view().unwrap()).unwrap().machine;
    assert_eq!(received.auth, kept);
    assert!(received.auth.enabled());

    guarded.rig.restart(0);
    assert_eq!(guarded.rig.machine.auth, kept);
    assert_eq!(
        refused(guarded.ask(&Caller::NOBODY, Request::Put(put("m"))).0),
        AuthError::UserEmpty
    );
    assert_eq!(refused(guarded.ask_as("r", Request::Put(put("m")))), AuthError::PermissionDenied);
    guarded.ask_as("b", Request::Put(put("m"))).unwrap();

    guarded.ask_as("root", DISABLE()).unwrap();
    guarded.rig.flush();
    guarded.rig.restart(0);
    assert!(!guarded.rig.machine.auth.enabled());
    guarded.done(Request::Put(put("x")));
}

#[test]
fn logins_and_what_ends_them_are_told() {
    let mut guarded = Guarded::prepared();
    let token = |username: &str, token: &str| TokenChange::Assigned {
        username: username.into(),
        token: token.into(),
    };
    let ended = |username: &str| TokenChange::Ended { username: username.into() };

    let (result, effects) = guarded.ask(&Caller::NOBODY, login("b", "abc"));
    assert_eq!((refused(result), effects.tokens), (AuthError::NotEnabled, vec![]));
    let (result, effects) = guarded.ask(&Caller::NOBODY, DISABLE());
    assert_eq!((result.unwrap(), effects.auth, effects.tokens), (Reply::Done, false, vec![]));
    guarded.done(ENABLE());

    // No user comes with it.
    let index = guarded.rig.log.len() + 1;
    let (result, effects) = guarded.ask(&Caller::NOBODY, login("b", "abc"));
    let auth_revision = guarded.rig.machine.auth.revision();
    let given = format!("abc.{index}");
    assert_eq!(result.unwrap(), Reply::Authenticate { token: given.clone(), auth_revision });
    assert_eq!(effects.tokens, [token("b", &given)]);
    assert!(!effects.auth);
    // The member that proposed this one signs its tokens: `.17` would be easily guessed.
    let (result, effects) = guarded.ask(&Caller::NOBODY, login("b", ""));
    let signed = Reply::Authenticate { token: String::new(), auth_revision };
    assert_eq!((result.unwrap(), effects.tokens), (signed, vec![]));
    for unknown in ["missing", "", "n"] {
        let (result, effects) = guarded.ask(&Caller::NOBODY, login(unknown, "abc"));
        assert_eq!((refused(result), effects.tokens), (AuthError::AuthFailed, vec![]), "{unknown}");
    }

    let root = |guarded: &mut Guarded, request: Request| {
        let root = guarded.caller("root");
        let (result, effects) = guarded.ask(&root, request);
        (result, effects.tokens)
    };
    let password = |name: &str| {
        Request::AuthUserChangePassword(pb::AuthUserChangePasswordRequest {
            name: name.into(),
            hashed_password: "aGFzaA==".into(),
            ..Default::default()
        })
    };
    let delete =
        |name: &str| Request::AuthUserDelete(pb::AuthUserDeleteRequest { name: name.into() });
    assert_eq!(root(&mut guarded, password("b")).1, [ended("b")]);
    assert_eq!(root(&mut guarded, password("n")).1, [ended("n")]);
    assert_eq!(root(&mut guarded, delete("w")).1, [ended("w")]);
    for (request, error) in [
        (password("missing"), AuthError::UserNotFound),
        (delete("missing"), AuthError::UserNotFound),
        (delete("root"), AuthError::InvalidManagement),
    ] {
        let (result, tokens) = root(&mut guarded, request);
        assert_eq!((refused(result), tokens), (error, vec![]));
    }
    let (result, effects) = guarded.ask(&guarded.caller("b"), delete("r"));
    assert_eq!((refused(result), effects.tokens), (AuthError::PermissionDenied, vec![]));
    let (result, tokens) = root(&mut guarded, DISABLE());
    assert_eq!((result.unwrap(), tokens), (Reply::Done, vec![TokenChange::AllEnded]));
    let (result, effects) = guarded.ask(&Caller::NOBODY, login("b", "abc"));
    assert_eq!((refused(result), effects.tokens), (AuthError::NotEnabled, vec![]));
}

#[test]
fn what_a_user_may_not_do_changes_nothing_on_any_member() {
    let mut guarded = Guarded::enabled();
    guarded.ask_as("root", grant_lease(1)).unwrap();
    guarded.ask_as("root", grant_lease(2)).unwrap();
    guarded.ask_as("root", Request::Put(pb::PutRequest { lease: 1, ..put("x") })).unwrap();
    guarded.ask_as("root", Request::Put(pb::PutRequest { lease: 2, ..put("m") })).unwrap();
    let nested = |put: pb::PutRequest| {
        Request::Txn(txn(vec![
            Op::RequestPut(self::put("m9")),
            Op::RequestTxn(txn(vec![Op::RequestTxn(txn(vec![Op::RequestPut(put)]))])),
        ]))
    };
    let delete = |prev_kv| pb::DeleteRangeRequest { key: "m".into(), prev_kv, ..<_>::default() };
    let old = |name: &str, guarded: &Guarded| Caller {
        revision: guarded.rig.machine.auth.revision() - 1,
        ..guarded.caller(name)
    };
    let cases = [
        ("w", Request::Put(put("x"))),
        ("r", Request::Put(put("m"))),
        ("w", Request::Put(pb::PutRequest { prev_kv: true, ..put("m") })),
        ("b", Request::Put(pb::PutRequest { lease: 1, ..put("m") })),
        ("b", nested(put("x"))),
        ("w", nested(pb::PutRequest { prev_kv: true, ..put("m1") })),
        ("b", nested(pb::PutRequest { lease: 1, ..put("m1") })),
        ("r", Request::DeleteRange(delete(false))),
        ("w", Request::DeleteRange(delete(true))),
        ("w", Request::Range(range("m"))),
        ("b", revoke_lease(1)),
        ("r", revoke_lease(2)),
        ("ghost", Request::Put(put("m"))),
    ];
    let stands = |guarded: &Guarded| {
        let machine = &guarded.rig.machine;
        let keys = |id| machine.leases.keys(LeaseId(id)).cloned().collect::<Vec<_>>();
        (machine.store.now().revision(), machine.auth.clone(), keys(1), keys(2))
    };
    let before = stands(&guarded);
    for (name, request) in cases {
        for answered in [true, false] {
            let caller = guarded.caller(name);
            let (outcome, effects) = guarded.rig.apply_as(&caller, request.clone(), answered);
            let result = outcome.unwrap().unwrap().result;
            assert_eq!(refused(result), AuthError::PermissionDenied, "{name}: {request:?}");
            assert!(effects.events.is_empty() && effects.leases.is_empty());
            let old = old(name, &guarded);
            assert_eq!(refused(guarded.ask(&old, request.clone()).0), AuthError::OldRevision);
            let nobody = guarded.ask(&Caller::NOBODY, request.clone()).0;
            assert_eq!(refused(nobody), AuthError::UserEmpty, "{request:?}");
        }
    }
    let before_management = guarded.rig.machine.auth.revision();
    for request in [
        user_add("new", false),
        Request::AuthUserList(<_>::default()),
        Request::AuthRoleList(<_>::default()),
        Request::AuthUserGet(pb::AuthUserGetRequest { name: "r".into() }),
        Request::AuthRoleGet(pb::AuthRoleGetRequest { role: "r".into() }),
        grant("b", Readwrite, "a", "z"),
        ENABLE(),
        DISABLE(),
    ] {
        assert_eq!(refused(guarded.ask_as("b", request.clone())), AuthError::PermissionDenied);
        assert_eq!(refused(guarded.ask_as("ghost", request.clone())), AuthError::UserNotFound);
        let nobody = guarded.ask(&Caller::NOBODY, request).0;
        assert_eq!(refused(nobody), AuthError::UserEmpty);
    }
    assert_eq!(guarded.rig.machine.auth.revision(), before_management);
    assert_eq!(stands(&guarded), before);
    assert_eq!(guarded.value("x"), Some("v".into()));

    // What they may do, they can.
    for (name, request) in [
        ("w", Request::Put(put("m"))),
        ("b", Request::Put(pb::PutRequest { prev_kv: true, lease: 2, ..put("m") })),
        ("b", nested(pb::PutRequest { prev_kv: true, lease: 2, ..put("m1") })),
        ("r", Request::Range(range("m"))),
        ("b", Request::AuthUserGet(pb::AuthUserGetRequest { name: "b".into() })),
        ("b", Request::AuthRoleGet(pb::AuthRoleGetRequest { role: "b".into() })),
        ("w", revoke_lease(2)),
        ("b", Request::DeleteRange(delete(true))),
    ] {
        guarded.ask_as(name, request.clone()).unwrap_or_else(|e| panic!("{name} {request:?}: {e}"));
    }
}

#[test]
fn permissions_count_from_the_entry_that_changes_them() {
    let mut guarded = Guarded::enabled();
    let before = guarded.caller("w");
    guarded.ask(&before, Request::Put(put("m"))).0.unwrap();
    guarded.ask_as("root", grant("w", Write, "x", "")).unwrap();
    let x = || Request::Put(put("x"));
    assert_eq!(refused(guarded.ask(&before, x()).0), AuthError::OldRevision);
    guarded.ask_as("w", x()).unwrap();
    let revoke = pb::AuthRoleRevokePermissionRequest {
        role: "w".into(),
        key: "x".into(),
        ..Default::default()
    };
    guarded.ask_as("root", Request::AuthRoleRevokePermission(revoke)).unwrap();
    assert_eq!(refused(guarded.ask_as("w", x())), AuthError::PermissionDenied);
    let role = pb::AuthRoleDeleteRequest { role: "w".into() };
    guarded.ask_as("root", Request::AuthRoleDelete(role)).unwrap();
    assert_eq!(refused(guarded.ask_as("w", Request::Put(put("m")))), AuthError::PermissionDenied);
    // As root's role, whoever has it.
    let grant = pb::AuthUserGrantRoleRequest { user: "w".into(), role: "root".into() };
    guarded.ask_as("root", Request::AuthUserGrantRole(grant)).unwrap();
    guarded.ask_as("w", x()).unwrap();
}

#[test]
fn what_members_propose_by_themselves_passes() {
    let mut guarded = Guarded::enabled();
    guarded.done(grant_lease(1));
    guarded.ask_as("root", Request::Put(pb::PutRequest { lease: 1, ..put("x") })).unwrap();
    let checkpoints = vec![pb::LeaseCheckpoint { id: 1, remaining_ttl: 5 }];
    guarded.done(Request::LeaseCheckpoint(pb::LeaseCheckpointRequest { checkpoints }));
    guarded.done(Request::ClusterVersionSet(
        quorate_proto::membershippb::ClusterVersionSetRequest { ver: "3.6.0".into() },
    ));
    guarded.done(Request::ClusterMemberAttrSet(<_>::default()));
    guarded.done(Request::Compaction(pb::CompactionRequest { revision: 2, physical: false }));
    guarded.done(Request::AuthStatus(pb::AuthStatusRequest {}));
    // A lease that has run out is revoked as root, also if users have changed since.
    assert_eq!(refused(guarded.ask(&Caller::NOBODY, revoke_lease(1)).0), AuthError::UserEmpty);
    let root = Caller::root(&guarded.rig.machine.auth);
    guarded.ask_as("root", user_add("new", false)).unwrap();
    guarded.ask(&root, revoke_lease(1)).0.unwrap();
    assert_eq!(guarded.value("x"), None);
    // An alarm is the last, as it stops what needs space; it comes before any question of users.
    let alarm = pb::AlarmRequest {
        action: pb::alarm_request::AlarmAction::Activate as i32,
        member_id: 7,
        alarm: pb::AlarmType::Nospace as i32,
    };
    guarded.done(Request::Alarm(alarm));
    let (result, _) = guarded.ask(&Caller::NOBODY, Request::Put(put("m")));
    assert!(matches!(result, Err(ApplyError::NoSpace)), "{result:?}");
    assert_eq!(
        refused(guarded.ask_as("w", Request::Range(range("m")))),
        AuthError::PermissionDenied
    );
}

#[test]
fn a_member_that_replays_the_log_comes_to_the_same() {
    let mut guarded = Guarded::enabled();
    guarded.ask_as("w", Request::Put(put("m"))).unwrap();
    refused(guarded.ask_as("r", Request::Put(put("m"))));
    guarded.ask_as("root", grant("r", Write, "m", "")).unwrap();
    guarded.ask_as("r", Request::Put(put("m"))).unwrap();
    refused(guarded.ask_as("r", Request::Put(put("m1"))));
    let mut other = Rig::new();
    for entry in guarded.rig.log.clone() {
        other.apply_entry(&entry, false).0.unwrap();
    }
    assert_eq!(other.machine.auth, guarded.rig.machine.auth);
    other.flush();
    guarded.rig.flush();
    assert_eq!(other.stored(), guarded.rig.stored());
}
