use bytes::Bytes;
use engine_api::Batch;
use prost::Message;
use quorate_proto::authpb::permission::Type::{self, Read, Readwrite, Write};
use quorate_proto::authpb::{Permission, Role, User, UserAddOptions};

use super::super::password::Salt;
use super::*;

const SALT: Salt = Salt { id: 1, index: 1 };

/// A store with authentication on: user root, and `users` each with a role of the same name that has
/// these permissions.
pub(super) fn store(users: &[(&str, &[(Type, &str, &str)])]) -> AuthStore {
    let (mut store, mut batch) = (AuthStore::default(), Batch::default());
    for user in [ROOT].into_iter().chain(users.iter().map(|(user, _)| *user)) {
        store.user_add(&user_add(user), &SALT, &mut batch).unwrap();
        store.role_add(user, &mut batch).unwrap();
        store.user_grant_role(user, user, &mut batch).unwrap();
    }
    for (user, permissions) in users {
        for (kind, key, range_end) in *permissions {
            let grant = grant(user, *kind, key.as_bytes(), range_end.as_bytes());
            store.role_grant_permission(&grant, &mut batch).unwrap();
        }
    }
    store.enable(&mut batch).unwrap();
    store
}

pub(super) fn user_add(name: &str) -> pb::AuthUserAddRequest {
    pb::AuthUserAddRequest {
        name: name.into(),
        options: Some(UserAddOptions { no_password: true }),
        ..Default::default()
    }
}

pub(super) fn grant(
    role: &str,
    kind: Type,
    key: &[u8],
    range_end: &[u8],
) -> pb::AuthRoleGrantPermissionRequest {
    let (key, range_end) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(range_end));
    let perm = Some(Permission { perm_type: kind as i32, key, range_end });
    pb::AuthRoleGrantPermissionRequest { name: role.into(), perm }
}

fn caller(store: &AuthStore, username: &str) -> Caller {
    Caller { username: username.into(), revision: store.revision() }
}

/// Lease 1 with the keys `a` and `m`, lease 2 with `m`, lease 3 without any; there is no lease 4.
fn leases() -> LeaseTable {
    let mut leases = LeaseTable::new(1);
    for id in 1..=3 {
        leases.grant(LeaseId(id), 60).unwrap();
    }
    for (key, id) in [("a", 1), ("m1", 1), ("m2", 2)] {
        leases.attach(key.as_bytes(), LeaseId(id)).unwrap();
    }
    leases
}

/// Who may do something: `n`obody in particular, an `u`nknown user with a credential, someone with no
/// `p`ermission, someone who may `r`ead, `w`rite or do `b`oth with the keys that begin with m, and `R`oot.
fn who_may(need: &Need<'_>) -> String {
    let m = |kind| [(kind, "m", "n")];
    let store = store(&[("p", &[]), ("r", &m(Read)), ("w", &m(Write)), ("b", &m(Readwrite))]);
    let leases = leases();
    let mut may = String::new();
    if store.check(&Caller::NOBODY, need, &leases).is_ok() {
        may.push('n');
    }
    for (name, letter) in
        [("ghost", 'u'), ("p", 'p'), ("r", 'r'), ("w", 'w'), ("b", 'b'), (ROOT, 'R')]
    {
        if store.check(&caller(&store, name), need, &leases).is_ok() {
            may.push(letter);
        }
    }
    // Who shows a certificate without a name is as unknown.
    let nameless = store.check(&caller(&store, ""), need, &leases).is_ok();
    assert_eq!(nameless, may.contains('u'), "{need:?}: {may}");
    may
}

pub(super) fn range(key: &str, range_end: &str) -> pb::RangeRequest {
    pb::RangeRequest {
        key: key.to_string().into(),
        range_end: range_end.to_string().into(),
        ..Default::default()
    }
}

fn put(key: &str) -> pb::PutRequest {
    pb::PutRequest { key: key.to_string().into(), ..Default::default() }
}

fn delete(key: &str, range_end: &str, prev_kv: bool) -> pb::DeleteRangeRequest {
    let (key, range_end) = (key.to_string().into(), range_end.to_string().into());
    pb::DeleteRangeRequest { key, range_end, prev_kv }
}

fn op(request: Op) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn branches(success: Vec<Op>, failure: Vec<Op>) -> pb::TxnRequest {
    let ops = |ops: Vec<Op>| ops.into_iter().map(op).collect();
    pb::TxnRequest { compare: Vec::new(), success: ops(success), failure: ops(failure) }
}

/// The transaction by itself, and inside others, in each branch.
fn nested(op: &Op) -> Vec<pb::TxnRequest> {
    let mut all = Vec::new();
    let mut inner = vec![
        branches(vec![op.clone()], vec![]),
        branches(vec![], vec![op.clone()]),
        branches(vec![Op::RequestRange(range("m", "")), op.clone()], vec![]),
    ];
    for _ in 0..3 {
        all.extend(inner.iter().cloned());
        inner = inner
            .into_iter()
            .flat_map(|txn| {
                let txn = Op::RequestTxn(txn);
                [branches(vec![txn.clone()], vec![]), branches(vec![], vec![txn])]
            })
            .collect();
    }
    all
}

#[test]
fn each_call_needs_what_the_table_says() {
    let alarm = |action: AlarmAction| pb::AlarmRequest { action: action as i32, ..<_>::default() };
    let [get, activate, deactivate] =
        [AlarmAction::Get, AlarmAction::Activate, AlarmAction::Deactivate].map(alarm);
    let strange = pb::AlarmRequest { action: 9, ..Default::default() };
    let watch = pb::WatchCreateRequest { key: "m".into(), ..Default::default() };
    let all = pb::WatchCreateRequest { range_end: "\0".into(), ..Default::default() };
    let first = pb::WatchCreateRequest::default();
    let (one, many, outside) = (range("m", ""), range("m", "n"), range("m", "n\0"));
    let prev = pb::PutRequest { prev_kv: true, ..put("m") };
    let leased = [1, 2, 3, 4].map(|lease| pb::PutRequest { lease, ..put("m") });
    let (remove, remove_prev) = (delete("m", "mm", false), delete("m", "mm", true));
    let compares = pb::TxnRequest {
        compare: vec![pb::Compare { key: "m".into(), range_end: "n".into(), ..<_>::default() }],
        ..Default::default()
    };
    let txn = |op: Op| branches(vec![op], vec![]);
    let txn_get = txn(Op::RequestRange(one.clone()));
    let txn_put = txn(Op::RequestPut(put("m")));
    let txn_prev = txn(Op::RequestPut(prev.clone()));
    let txn_remove = txn(Op::RequestDeleteRange(remove.clone()));
    let txn_remove_prev = txn(Op::RequestDeleteRange(remove_prev.clone()));
    let either = branches(vec![Op::RequestPut(put("m"))], vec![Op::RequestRange(one.clone())]);
    let empty = pb::TxnRequest::default();
    let keyless =
        pb::TxnRequest { success: vec![pb::RequestOp { request: None }], ..<_>::default() };
    let user = pb::AuthUserGetRequest { name: "r".into() };
    let nobody = pb::AuthUserGetRequest { name: String::new() };
    let role = pb::AuthRoleGetRequest { role: "w".into() };
    let no_role = pb::AuthRoleGetRequest { role: "missing".into() };
    let ttl = |id, keys| Asked::LeaseTimeToLive { id: LeaseId(id), keys };
    for (asked, expected) in [
        (Asked::Range(&one), "rbR"),
        (Asked::Range(&many), "rbR"),
        (Asked::Range(&outside), "R"),
        (Asked::Put(&put("m")), "wbR"),
        (Asked::Put(&put("n")), "R"),
        (Asked::Put(&put("")), "R"),
        (Asked::Put(&prev), "bR"),
        (Asked::Put(&leased[0]), "R"),
        (Asked::Put(&leased[1]), "wbR"),
        (Asked::Put(&leased[2]), "wbR"),
        (Asked::Put(&leased[3]), "wbR"),
        (Asked::DeleteRange(&remove), "wbR"),
        (Asked::DeleteRange(&remove_prev), "bR"),
        (Asked::Txn(&compares), "rbR"),
        (Asked::Txn(&txn_get), "rbR"),
        (Asked::Txn(&txn_put), "wbR"),
        (Asked::Txn(&txn_prev), "bR"),
        (Asked::Txn(&txn_remove), "wbR"),
        (Asked::Txn(&txn_remove_prev), "bR"),
        (Asked::Txn(&either), "bR"),
        (Asked::Txn(&empty), "nuprwbR"),
        (Asked::Txn(&keyless), ""),
        (Asked::Compact, "R"),
        (Asked::WatchCreate(&watch), "rbR"),
        (Asked::WatchCreate(&first), "R"),
        (Asked::WatchCreate(&all), "R"),
        (Asked::LeaseGrant, "uprwbR"),
        (Asked::LeaseRevoke(LeaseId(1)), "R"),
        (Asked::LeaseRevoke(LeaseId(2)), "wbR"),
        (Asked::LeaseRevoke(LeaseId(3)), "uprwbR"),
        (Asked::LeaseRevoke(LeaseId(4)), "uprwbR"),
        (Asked::LeaseKeepAlive(LeaseId(1)), "R"),
        (Asked::LeaseKeepAlive(LeaseId(2)), "wbR"),
        (Asked::LeaseKeepAlive(LeaseId(3)), "uprwbR"),
        (ttl(1, true), "R"),
        (ttl(2, true), "rbR"),
        (ttl(3, true), "uprwbR"),
        (ttl(1, false), "uprwbR"),
        (Asked::LeaseLeases, "R"),
        (Asked::MemberAdd, "R"),
        (Asked::MemberRemove, "R"),
        (Asked::MemberUpdate, "R"),
        (Asked::MemberPromote, "R"),
        (Asked::MemberList, "uprwbR"),
        (Asked::Status, "uprwbR"),
        (Asked::Alarm(&get), "uprwbR"),
        (Asked::Alarm(&activate), "R"),
        (Asked::Alarm(&deactivate), "R"),
        (Asked::Alarm(&strange), "R"),
        (Asked::Defragment, "R"),
        (Asked::Hash, "R"),
        (Asked::HashKv, "R"),
        (Asked::Snapshot, "R"),
        (Asked::MoveLeader, "R"),
        (Asked::Downgrade, "R"),
        (Asked::AuthStatus, "nuprwbR"),
        (Asked::Authenticate, "nuprwbR"),
        (Asked::Health, "nuprwbR"),
        (Asked::UserGet(&user), "rR"),
        (Asked::UserGet(&nobody), "R"),
        (Asked::RoleGet(&role), "wR"),
        (Asked::RoleGet(&no_role), "R"),
        (Asked::AuthEnable, "R"),
        (Asked::AuthDisable, "R"),
        (Asked::UserAdd, "R"),
        (Asked::UserList, "R"),
        (Asked::UserDelete, "R"),
        (Asked::UserChangePassword, "R"),
        (Asked::UserGrantRole, "R"),
        (Asked::UserRevokeRole, "R"),
        (Asked::RoleAdd, "R"),
        (Asked::RoleList, "R"),
        (Asked::RoleDelete, "R"),
        (Asked::RoleGrantPermission, "R"),
        (Asked::RoleRevokePermission, "R"),
    ] {
        assert_eq!(who_may(&need(asked)), expected, "{asked:?}");
    }
}

#[test]
fn leases_are_told_to_who_may_read_all_their_keys() {
    let store = store(&[("all", &[(Read, "a", ""), (Read, "m", "n")]), ("m", &[(Read, "m", "n")])]);
    let mut leases = leases();
    let need = need(Asked::LeaseLeases);
    assert_eq!(store.check(&caller(&store, "all"), &need, &leases), Ok(()));
    let refused = Err(AuthError::PermissionDenied);
    assert_eq!(store.check(&caller(&store, "m"), &need, &leases), refused);
    leases.revoke(LeaseId(1)).unwrap();
    assert_eq!(store.check(&caller(&store, "m"), &need, &leases), Ok(()));
    leases.revoke(LeaseId(2)).unwrap();
    assert_eq!(store.check(&caller(&store, "ghost"), &need, &leases), Ok(()), "any credential");
}

/// Where there are more keys than ranges, the gaps between the ranges are looked at.
#[test]
fn a_lease_of_many_keys_is_judged_by_all_of_them() {
    let store = store(&[
        ("two", &[(Write, "a", "c"), (Write, "m", "n")]),
        ("rest", &[(Write, "a", "c"), (Write, "m", "\0")]),
        ("none", &[]),
    ]);
    let mut leases = LeaseTable::new(1);
    leases.grant(LeaseId(1), 60).unwrap();
    let asked = need(Asked::LeaseRevoke(LeaseId(1)));
    let refused = Err(AuthError::PermissionDenied);
    // Few keys are kept in another form than many.
    for count in [3, 200] {
        for n in 0..count {
            let key = format!("{}{n}", ["a", "b", "m"][n % 3]);
            leases.attach(key.as_bytes(), LeaseId(1)).unwrap();
        }
        for foreign in [None, Some("A"), Some("c"), Some("l"), Some("n"), Some("z")] {
            if let Some(key) = foreign {
                leases.attach(key.as_bytes(), LeaseId(1)).unwrap();
            }
            for (user, last) in [("two", None), ("rest", Some("m"))] {
                let may = foreign.is_none() || last.is_some_and(|last| foreign >= Some(last));
                let expected = if may { Ok(()) } else { refused };
                let found = store.check(&caller(&store, user), &asked, &leases);
                assert_eq!(found, expected, "{user}, {count} keys and {foreign:?}");
            }
            assert_eq!(store.check(&caller(&store, "none"), &asked, &leases), refused);
            if let Some(key) = foreign {
                leases.detach(key.as_bytes());
            }
        }
    }
}

#[test]
fn entries_of_the_log_need_what_all_releases_ask_for() {
    use quorate_proto::membershippb;
    let txn = || branches(vec![Op::RequestPut(put("m"))], vec![]);
    let hidden =
        branches(vec![Op::RequestTxn(branches(vec![], vec![Op::RequestPut(put("n"))]))], vec![]);
    for (request, expected) in [
        (Request::Range(range("m", "")), "rbR"),
        (Request::Put(put("m")), "wbR"),
        (Request::Put(pb::PutRequest { prev_kv: true, ..put("m") }), "bR"),
        (Request::Put(pb::PutRequest { lease: 1, ..put("m") }), "R"),
        (Request::DeleteRange(delete("m", "mm", false)), "wbR"),
        (Request::DeleteRange(delete("m", "mm", true)), "bR"),
        (Request::Txn(txn()), "wbR"),
        (Request::Txn(hidden), "R"),
        (Request::LeaseRevoke(pb::LeaseRevokeRequest { id: 1 }), "R"),
        (Request::LeaseRevoke(pb::LeaseRevokeRequest { id: 2 }), "wbR"),
        // Whoever proposed it was asked for a credential.
        (Request::LeaseRevoke(pb::LeaseRevokeRequest { id: 3 }), "nuprwbR"),
        (Request::Compaction(<_>::default()), "nuprwbR"),
        (Request::LeaseGrant(<_>::default()), "nuprwbR"),
        (Request::LeaseCheckpoint(<_>::default()), "nuprwbR"),
        (Request::Alarm(<_>::default()), "nuprwbR"),
        (Request::ClusterVersionSet(membershippb::ClusterVersionSetRequest::default()), "nuprwbR"),
        (Request::ClusterMemberAttrSet(<_>::default()), "nuprwbR"),
        (Request::DowngradeInfoSet(<_>::default()), "nuprwbR"),
        (Request::DowngradeVersionTest(<_>::default()), "nuprwbR"),
        (Request::AuthStatus(<_>::default()), "nuprwbR"),
        (Request::Authenticate(<_>::default()), "nuprwbR"),
        (Request::AuthUserGet(pb::AuthUserGetRequest { name: "p".into() }), "pR"),
        (Request::AuthRoleGet(pb::AuthRoleGetRequest { role: "p".into() }), "pR"),
        (Request::AuthEnable(<_>::default()), "R"),
        (Request::AuthDisable(<_>::default()), "R"),
        (Request::AuthUserAdd(<_>::default()), "R"),
        (Request::AuthUserDelete(<_>::default()), "R"),
        (Request::AuthUserChangePassword(<_>::default()), "R"),
        (Request::AuthUserGrantRole(<_>::default()), "R"),
        (Request::AuthUserRevokeRole(<_>::default()), "R"),
        (Request::AuthUserList(<_>::default()), "R"),
        (Request::AuthRoleList(<_>::default()), "R"),
        (Request::AuthRoleAdd(<_>::default()), "R"),
        (Request::AuthRoleDelete(<_>::default()), "R"),
        (Request::AuthRoleGrantPermission(<_>::default()), "R"),
        (Request::AuthRoleRevokePermission(<_>::default()), "R"),
    ] {
        assert_eq!(who_may(&need_of_entry(&request)), expected, "{request:?}");
    }
}

#[test]
fn what_is_hidden_in_a_nested_transaction_is_found() {
    // The user may do anything with the keys that begin with m, and nothing with others.
    let store = store(&[("u", &[(Readwrite, "m", "n")]), ("w", &[(Write, "m", "n")])]);
    let leases = leases();
    let [user, writer] = ["u", "w"].map(|name| caller(&store, name));
    let prev = pb::PutRequest { prev_kv: true, ..put("m") };
    let foreign_lease = pb::PutRequest { lease: 1, ..put("m") };
    let own_lease = pb::PutRequest { lease: 2, ..put("m") };
    let mut tried = 0;
    for (op, is_users, is_writers) in [
        (Op::RequestPut(put("m")), true, true),
        (Op::RequestPut(put("x")), false, false),
        (Op::RequestPut(prev), true, false),
        (Op::RequestPut(foreign_lease), false, false),
        (Op::RequestPut(own_lease), true, true),
        (Op::RequestRange(range("m", "n")), true, false),
        (Op::RequestRange(range("l", "n")), false, false),
        (Op::RequestDeleteRange(delete("m", "n", false)), true, true),
        (Op::RequestDeleteRange(delete("m", "n", true)), true, false),
        (Op::RequestDeleteRange(delete("m", "\0", false)), false, false),
    ] {
        for txn in nested(&op) {
            let need = needed_by(&txn);
            let may = |caller| store.check(caller, &need, &leases).is_ok();
            assert_eq!(may(&user), is_users, "{txn:?}");
            // The third kind reads a key of its own besides.
            let reads = format!("{txn:?}").contains("(RangeRequest");
            assert_eq!(may(&writer), is_writers && !reads, "{txn:?}");
            assert!(may(&Caller::root(&store)));
            tried += 1;
        }
    }
    assert_eq!(tried, 10 * (3 + 6 + 12));

    let mut guarded = branches(vec![], vec![]);
    guarded.compare = vec![pb::Compare { key: "x".into(), ..Default::default() }];
    for txn in nested(&Op::RequestTxn(guarded)) {
        let need = needed_by(&txn);
        let refused = Err(AuthError::PermissionDenied);
        assert_eq!(store.check(&user, &need, &leases), refused, "{txn:?}");
    }
}

fn needed_by(txn: &pb::TxnRequest) -> Need<'_> {
    need(Asked::Txn(txn))
}

#[test]
fn a_watch_gets_the_keys_that_were_asked_for_and_no_later_ones() {
    let store = store(&[
        ("one", &[(Read, "m", "")]),
        ("rest", &[(Read, "m", "\0")]),
        ("all", &[(Read, "\0", "\0")]),
    ]);
    let check = |user: &str, key: &str, range_end: &str| {
        let watch = pb::WatchCreateRequest {
            key: key.to_string().into(),
            range_end: range_end.to_string().into(),
            ..Default::default()
        };
        store.check(&caller(&store, user), &need(Asked::WatchCreate(&watch)), &leases()).is_ok()
    };
    for (key, range_end, one, rest) in [
        ("m", "", true, true),
        // All from m on: being permitted to read m is not enough.
        ("m", "\0", false, true),
        ("m", "m\0", true, true),
        ("m", "m\0\0", false, true),
        ("", "", false, false),
        ("", "\0", false, false),
        ("\0", "\0", false, false),
        ("n", "\0", false, true),
    ] {
        assert_eq!(check("one", key, range_end), one, "{key:?} {range_end:?}");
        assert_eq!(check("rest", key, range_end), rest, "{key:?} {range_end:?}");
        assert!(check("all", key, range_end), "{key:?} {range_end:?}");
    }
}

#[test]
fn errors_come_in_the_order_of_etcd() {
    let store = store(&[("u", &[(Readwrite, "m", "")])]);
    let leases = leases();
    let now = store.revision();
    let (own, foreign) = (put("m"), put("x"));
    let user_get = pb::AuthUserGetRequest { name: "u".into() };
    let ghost_get = pb::AuthUserGetRequest { name: "ghost".into() };
    let nobody_get = pb::AuthUserGetRequest { name: String::new() };
    let role_get = pb::AuthRoleGetRequest { role: "u".into() };
    use AuthError::{OldRevision, PermissionDenied, UserEmpty, UserNotFound};
    for (asked, username, revision, expected) in [
        (Asked::Put(&own), "", 0, Err(UserEmpty)),
        (Asked::Put(&own), "u", 0, Err(UserEmpty)),
        (Asked::Put(&own), "ghost", now - 1, Err(OldRevision)),
        (Asked::Put(&own), "ghost", now, Err(PermissionDenied)),
        (Asked::Put(&own), "", now, Err(PermissionDenied)),
        (Asked::Put(&own), "u", now - 1, Err(OldRevision)),
        (Asked::Put(&foreign), "u", now - 1, Err(OldRevision)),
        (Asked::Put(&foreign), "u", now, Err(PermissionDenied)),
        (Asked::Put(&own), "u", now, Ok(())),
        (Asked::Put(&own), "u", now + 1, Ok(())),
        (Asked::Put(&foreign), ROOT, now - 1, Err(OldRevision)),
        (Asked::Put(&foreign), ROOT, now, Ok(())),
        (Asked::Compact, "", 0, Err(UserEmpty)),
        (Asked::Compact, "ghost", now, Err(UserNotFound)),
        (Asked::Compact, "u", now, Err(PermissionDenied)),
        // Being root is not a matter of the revision.
        (Asked::Compact, ROOT, 1, Ok(())),
        (Asked::LeaseGrant, "", 0, Err(UserEmpty)),
        (Asked::LeaseGrant, "u", 1, Ok(())),
        (Asked::LeaseKeepAlive(LeaseId(1)), "", 0, Err(UserEmpty)),
        (Asked::LeaseKeepAlive(LeaseId(1)), "u", 1, Err(OldRevision)),
        (Asked::LeaseKeepAlive(LeaseId(1)), "u", now, Err(PermissionDenied)),
        (Asked::LeaseKeepAlive(LeaseId(1)), ROOT, 1, Ok(())),
        (Asked::LeaseKeepAlive(LeaseId(3)), "u", 1, Ok(())),
        // A certificate without a name.
        (Asked::Compact, "", now, Err(UserEmpty)),
        (Asked::MemberList, "", now, Ok(())),
        (Asked::LeaseGrant, "", now, Ok(())),
        (Asked::LeaseRevoke(LeaseId(1)), "", now, Err(PermissionDenied)),
        (Asked::LeaseRevoke(LeaseId(3)), "", now, Ok(())),
        (Asked::LeaseKeepAlive(LeaseId(1)), "", now, Err(PermissionDenied)),
        (Asked::LeaseKeepAlive(LeaseId(3)), "", now, Ok(())),
        (Asked::UserGet(&user_get), "u", 1, Ok(())),
        (Asked::UserGet(&user_get), "", 0, Err(UserEmpty)),
        (Asked::UserGet(&ghost_get), "u", now, Err(PermissionDenied)),
        (Asked::UserGet(&ghost_get), "ghost", now, Err(UserNotFound)),
        (Asked::UserGet(&nobody_get), "", 0, Err(UserNotFound)),
        (Asked::RoleGet(&role_get), "u", 1, Ok(())),
        (Asked::RoleGet(&role_get), "ghost", now, Err(UserNotFound)),
        (Asked::RoleGet(&role_get), "", 0, Err(UserEmpty)),
    ] {
        let caller = Caller { username: username.into(), revision };
        let found = store.check(&caller, &need(asked), &leases);
        assert_eq!(found, expected, "{asked:?} by {caller:?} at {now}");
    }
}

#[test]
fn nothing_is_asked_for_while_authentication_is_off() {
    let mut store = store(&[]);
    assert_eq!(Caller::root(&store), caller(&store, ROOT));
    store.disable(&mut Batch::default());
    assert_eq!(Caller::root(&store), Caller::NOBODY);
    for asked in [Asked::Compact, Asked::Put(&put("x")), Asked::LeaseLeases] {
        assert_eq!(store.check(&Caller::NOBODY, &need(asked), &leases()), Ok(()));
    }
}

#[test]
fn permissions_join_where_they_touch() {
    let store = store(&[
        (
            "u",
            &[
                (Read, "a", ""),
                (Read, "a\0", "b"),
                (Read, "b", "d"),
                (Read, "c", "e"),
                (Read, "f", "\0"),
            ],
        ),
        ("v", &[(Read, "\0", "\0")]),
        ("w", &[(Read, "f", "h"), (Read, "g", "\0"), (Read, "a", "c"), (Read, "b", "bb")]),
    ]);
    let check = |user: &str, key: &str, range_end: &str| {
        let range = range(key, range_end);
        store.check(&caller(&store, user), &need(Asked::Range(&range)), &leases()).is_ok()
    };
    for (user, key, range_end, expected) in [
        ("u", "a", "e", true),
        ("u", "a", "e\0", false),
        ("u", "`", "b", false),
        ("u", "d", "f", false),
        ("u", "e", "", false),
        ("u", "d\u{7f}", "", true),
        ("u", "f", "\0", true),
        ("u", "a", "\0", false),
        ("u", "z", "zz", true),
        // No key lies in these; those of one permission are not more than the key that they name.
        ("v", "c", "a", true),
        ("v", "c", "c", true),
        ("u", "e", "a", false),
        ("u", "", "", false),
        ("u", "", "e", false),
        ("u", "", "\0", false),
        ("v", "\0", "\0", true),
        ("v", "", "\0", false),
        ("v", "anything", "\0", true),
        ("w", "f", "\0", true),
        ("w", "a", "c", true),
        ("w", "bb", "c", true),
        ("w", "b", "f", false),
    ] {
        assert_eq!(check(user, key, range_end), expected, "{user} {key:?} {range_end:?}");
    }
}

#[test]
fn a_permission_that_makes_no_sense_permits_nothing() {
    // None of these can be granted here; a store of another release may hold them.
    let mut store = AuthStore::default();
    let permission = |kind: i32, key: &'static str, range_end: &'static str| Permission {
        perm_type: kind,
        key: key.into(),
        range_end: range_end.into(),
    };
    let role = Role {
        name: "r".into(),
        key_permission: vec![
            permission(0, "", "\0"),
            permission(0, "", ""),
            permission(0, "", "z"),
            permission(0, "m", "b"),
            permission(0, "c", "c"),
            permission(7, "a", "z"),
            permission(-1, "a", "z"),
        ],
    };
    let user =
        User { name: "u".into(), roles: vec!["missing".into(), "r".into()], ..Default::default() };
    store.restore_role(&role.encode_to_vec()).unwrap();
    store.restore_user(&user.encode_to_vec()).unwrap();
    store.restore_state(true, 5);
    for (key, range_end) in [("", ""), ("a", ""), ("c", ""), ("m", ""), ("a", "z"), ("\0", "\0")] {
        let range = range(key, range_end);
        let found = store.check(&caller(&store, "u"), &need(Asked::Range(&range)), &leases());
        assert_eq!(found, Err(AuthError::PermissionDenied), "{key:?} {range_end:?}");
    }

    // Nor does it take away what others permit.
    let others = [permission(1, "k", "x"), permission(1, "z", "c")];
    let role = Role { name: "s".into(), key_permission: others.to_vec() };
    let user = User { name: "v".into(), roles: vec!["s".into()], ..Default::default() };
    store.restore_role(&role.encode_to_vec()).unwrap();
    store.restore_user(&user.encode_to_vec()).unwrap();
    store.restore_state(true, 5);
    let mut leases = LeaseTable::new(1);
    leases.grant(LeaseId(1), 60).unwrap();
    for key in ["k1", "k2", "m"] {
        leases.attach(key.as_bytes(), LeaseId(1)).unwrap();
        let found =
            store.check(&caller(&store, "v"), &need(Asked::LeaseRevoke(LeaseId(1))), &leases);
        assert_eq!(found, Ok(()), "{key}");
    }
}
