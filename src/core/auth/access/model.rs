//! The decision against a model that knows neither lists nor intervals: it walks a request as it stands,
//! and looks at one key after the other.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use engine_api::Batch;
use proptest::prelude::*;
use proptest::sample::select;
use quorate_proto::authpb::permission::Type;

use super::tests::{grant, user_add};
use super::*;
use crate::core::auth::password::Salt;

/// Where ranges begin and end.
const BOUNDS: [&[u8]; 8] = [b"\0", b"a", b"a\0", b"ab", b"b", b"c", b"c\xff", b"\xff"];
const USERS: [&str; 4] = ["root", "u1", "u2", "u3"];
const ROLES: [&str; 4] = ["root", "r1", "r2", "r3"];

/// What keys are chosen from: bounds, and what comes right after each.
fn keys() -> impl Iterator<Item = Vec<u8>> {
    BOUNDS.iter().flat_map(|key| [key.to_vec(), next(key)])
}

/// The key right after another one.
fn next(key: &[u8]) -> Vec<u8> {
    [key, b"\0"].concat()
}

/// A key at the beginning of every stretch of keys that ranges and single keys chosen from the above can
/// tell apart.
fn universe() -> BTreeSet<Vec<u8>> {
    keys().flat_map(|key| [next(&key), key]).collect()
}

/// Whether a range has a key in it: the table of v3-api 3.2, read aloud.
fn in_range(at: &[u8], key: &[u8], range_end: &[u8]) -> bool {
    match range_end {
        b"" => at == key,
        b"\0" => at >= key,
        _ => key <= at && at < range_end,
    }
}

/// Users and roles without any order or merging.
#[derive(Default, Debug)]
struct Model {
    revision: u64,
    users: BTreeMap<&'static str, BTreeSet<&'static str>>,
    roles: BTreeMap<&'static str, Vec<(Type, Vec<u8>, Vec<u8>)>>,
    attached: Vec<(Vec<u8>, i64)>,
    /// Asked only about ranges without a key.
    store: AuthStore,
}

type Verdict = Result<(), AuthError>;

impl Model {
    fn is_root(&self, caller: &Caller) -> Verdict {
        if caller.username.is_empty() {
            return Err(AuthError::UserEmpty);
        }
        match self.users.get(&caller.username[..]) {
            None => Err(AuthError::UserNotFound),
            Some(roles) if roles.contains("root") => Ok(()),
            Some(_) => Err(AuthError::PermissionDenied),
        }
    }

    fn someone(caller: &Caller) -> Verdict {
        if caller.revision == 0 { Err(AuthError::UserEmpty) } else { Ok(()) }
    }

    /// Whether some permission of some role of the user is for this one key.
    fn may(&self, caller: &Caller, write: bool, at: &[u8]) -> bool {
        self.users[&caller.username[..]].iter().filter_map(|role| self.roles.get(role)).any(
            |held| {
                held.iter().any(|(kind, key, range_end)| {
                    let fits = match kind {
                        Type::Read => !write,
                        Type::Write => write,
                        Type::Readwrite => true,
                    };
                    fits && in_range(at, key, range_end)
                })
            },
        )
    }

    fn keys(&self, caller: &Caller, write: bool, key: &[u8], range_end: &[u8]) -> Verdict {
        Self::someone(caller)?;
        if caller.revision < self.revision {
            return Err(AuthError::OldRevision);
        }
        let Some(roles) = self.users.get(&caller.username[..]) else {
            return Err(AuthError::PermissionDenied);
        };
        if roles.contains("root") {
            return Ok(());
        }
        if key.is_empty() {
            return Err(AuthError::PermissionDenied);
        }
        let asked: Vec<Vec<u8>> =
            universe().into_iter().filter(|at| in_range(at, key, range_end)).collect();
        if asked.is_empty() {
            // What etcd says then is recorded in another test. It is never more than for the key.
            let operation = if write { Operation::Write } else { Operation::Read };
            let ranges = self.store.permitted[&caller.username].ranges(operation);
            return granted(self.may(caller, write, key) && ranges.cover(key, range_end));
        }
        for at in asked {
            if !self.may(caller, write, &at) {
                return Err(AuthError::PermissionDenied);
            }
        }
        Ok(())
    }

    fn lease(&self, caller: &Caller, write: bool, is_asked: impl Fn(i64) -> bool) -> Verdict {
        if self.is_root(caller).is_ok() {
            return Ok(());
        }
        for (key, lease) in &self.attached {
            if is_asked(*lease) {
                self.keys(caller, write, key, b"")?;
            }
        }
        Ok(())
    }

    fn range(&self, caller: &Caller, range: &pb::RangeRequest) -> Verdict {
        self.keys(caller, false, &range.key, &range.range_end)
    }

    fn put(&self, caller: &Caller, put: &pb::PutRequest) -> Verdict {
        self.keys(caller, true, &put.key, b"")?;
        self.lease(caller, true, |lease| lease == put.lease)?;
        if put.prev_kv {
            self.keys(caller, false, &put.key, b"")?;
        }
        Ok(())
    }

    fn delete(&self, caller: &Caller, delete: &pb::DeleteRangeRequest) -> Verdict {
        self.keys(caller, true, &delete.key, &delete.range_end)?;
        if delete.prev_kv {
            self.keys(caller, false, &delete.key, &delete.range_end)?;
        }
        Ok(())
    }

    fn txn(&self, caller: &Caller, txn: &pb::TxnRequest) -> Verdict {
        for compare in &txn.compare {
            self.keys(caller, false, &compare.key, &compare.range_end)?;
        }
        for branch in [&txn.success, &txn.failure] {
            for op in branch {
                match op.request.as_ref().unwrap() {
                    Op::RequestRange(range) => self.range(caller, range)?,
                    Op::RequestPut(put) => self.put(caller, put)?,
                    Op::RequestDeleteRange(delete) => self.delete(caller, delete)?,
                    Op::RequestTxn(nested) => self.txn(caller, nested)?,
                }
            }
        }
        Ok(())
    }

    fn check(&self, caller: &Caller, question: &Question) -> Verdict {
        match question {
            Question::Range(range) => self.range(caller, range),
            Question::Put(put) => self.put(caller, put),
            Question::Delete(delete) => self.delete(caller, delete),
            Question::Txn(txn) => self.txn(caller, txn),
            Question::Watch(watch) => {
                let all = watch.key.is_empty();
                self.keys(caller, false, if all { b"\0" } else { &watch.key }, &watch.range_end)
            }
            Question::Revoke(id) | Question::KeepAlive(id) => {
                Self::someone(caller)?;
                self.lease(caller, true, |lease| lease == *id)
            }
            Question::TimeToLive(id, keys) => {
                Self::someone(caller)?;
                self.lease(caller, false, |lease| *keys && lease == *id)
            }
            Question::Leases => {
                Self::someone(caller)?;
                self.lease(caller, false, |_| true)
            }
            Question::UserGet(get) => match self.is_root(caller) {
                Err(AuthError::PermissionDenied) if caller.username == get.name => Ok(()),
                Err(_) if caller.username == get.name => Err(AuthError::UserNotFound),
                verdict => verdict,
            },
            Question::RoleGet(get) => match self.users.get(&caller.username[..]) {
                Some(roles) if roles.contains(&get.role[..]) => Ok(()),
                _ => self.is_root(caller),
            },
            Question::MemberList => Self::someone(caller),
            Question::Compact => self.is_root(caller),
        }
    }
}

/// A change of users, roles or leases; one that the store refuses changes nothing.
#[derive(Clone, Debug)]
enum Change {
    AddUser(&'static str),
    DeleteUser(&'static str),
    AddRole(&'static str),
    DeleteRole(&'static str),
    GrantRole(&'static str, &'static str),
    RevokeRole(&'static str, &'static str),
    Grant(&'static str, Type, Vec<u8>, Vec<u8>),
    Revoke(&'static str, usize),
    Attach(Vec<u8>, i64),
}

#[derive(Clone, Debug)]
enum Question {
    Range(pb::RangeRequest),
    Put(pb::PutRequest),
    Delete(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Watch(pb::WatchCreateRequest),
    Revoke(i64),
    KeepAlive(i64),
    TimeToLive(i64, bool),
    Leases,
    UserGet(pb::AuthUserGetRequest),
    RoleGet(pb::AuthRoleGetRequest),
    MemberList,
    Compact,
}

impl Question {
    fn asked(&self) -> Asked<'_> {
        match self {
            Question::Range(range) => Asked::Range(range),
            Question::Put(put) => Asked::Put(put),
            Question::Delete(delete) => Asked::DeleteRange(delete),
            Question::Txn(txn) => Asked::Txn(txn),
            Question::Watch(watch) => Asked::WatchCreate(watch),
            Question::Revoke(id) => Asked::LeaseRevoke(LeaseId(*id)),
            Question::KeepAlive(id) => Asked::LeaseKeepAlive(LeaseId(*id)),
            Question::TimeToLive(id, keys) => {
                Asked::LeaseTimeToLive { id: LeaseId(*id), keys: *keys }
            }
            Question::Leases => Asked::LeaseLeases,
            Question::UserGet(get) => Asked::UserGet(get),
            Question::RoleGet(get) => Asked::RoleGet(get),
            Question::MemberList => Asked::MemberList,
            Question::Compact => Asked::Compact,
        }
    }

    /// The same in the log; `None` where it does not go there, or needs something else there.
    fn entry(&self) -> Option<Request> {
        Some(match self.clone() {
            Question::Range(range) => Request::Range(range),
            Question::Put(put) => Request::Put(put),
            Question::Delete(delete) => Request::DeleteRange(delete),
            Question::Txn(txn) => Request::Txn(txn),
            Question::UserGet(get) => Request::AuthUserGet(get),
            Question::RoleGet(get) => Request::AuthRoleGet(get),
            _ => return None,
        })
    }
}

fn key() -> impl Strategy<Value = Bytes> {
    let keys: Vec<Vec<u8>> = keys().collect();
    prop_oneof![
        20 => select(BOUNDS.to_vec()).prop_map(Bytes::from_static),
        5 => select(keys).prop_map(Bytes::from),
        1 => Just(Bytes::new()),
    ]
}

fn range_end() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        3 => Just(Bytes::new()),
        1 => Just(Bytes::from_static(b"\0")),
        4 => select(BOUNDS.to_vec()).prop_map(Bytes::from_static),
    ]
}

/// Leases 1 to 3 exist, 0 is none.
fn lease() -> impl Strategy<Value = i64> {
    prop_oneof![6 => Just(0), 4 => 1..5i64]
}

fn range() -> impl Strategy<Value = pb::RangeRequest> {
    (key(), range_end()).prop_map(|(key, range_end)| pb::RangeRequest {
        key,
        range_end,
        ..Default::default()
    })
}

fn put() -> impl Strategy<Value = pb::PutRequest> {
    (key(), lease(), any::<bool>()).prop_map(|(key, lease, prev_kv)| pb::PutRequest {
        key,
        lease,
        prev_kv,
        ..Default::default()
    })
}

fn delete() -> impl Strategy<Value = pb::DeleteRangeRequest> {
    (key(), range_end(), any::<bool>())
        .prop_map(|(key, range_end, prev_kv)| pb::DeleteRangeRequest { key, range_end, prev_kv })
}

/// Few operations in each, so that what a user may do is met often enough.
fn txn(depth: u32) -> BoxedStrategy<pb::TxnRequest> {
    let leaf = prop_oneof![
        range().prop_map(Op::RequestRange),
        put().prop_map(Op::RequestPut),
        delete().prop_map(Op::RequestDeleteRange),
    ];
    let op = if depth == 0 {
        leaf.boxed()
    } else {
        prop_oneof![1 => leaf, 1 => txn(depth - 1).prop_map(Op::RequestTxn)].boxed()
    };
    let op = op.prop_map(|request| pb::RequestOp { request: Some(request) });
    let compare = (key(), range_end()).prop_map(|(key, range_end)| pb::Compare {
        key,
        range_end,
        ..Default::default()
    });
    let ops = || prop::collection::vec(op.clone(), 0..2);
    (prop::collection::vec(compare, 0..2), ops(), ops())
        .prop_map(|(compare, success, failure)| pb::TxnRequest { compare, success, failure })
        .boxed()
}

fn change() -> impl Strategy<Value = Change> {
    let user = || select(USERS.to_vec());
    let role = || select(ROLES.to_vec());
    let kind = select(vec![Type::Read, Type::Write, Type::Readwrite]);
    prop_oneof![
        4 => user().prop_map(Change::AddUser),
        1 => user().prop_map(Change::DeleteUser),
        4 => role().prop_map(Change::AddRole),
        1 => role().prop_map(Change::DeleteRole),
        8 => (user(), role()).prop_map(|(user, role)| Change::GrantRole(user, role)),
        1 => (user(), role()).prop_map(|(user, role)| Change::RevokeRole(user, role)),
        16 => (role(), kind, key(), range_end()).prop_map(|(role, kind, key, range_end)| {
            Change::Grant(role, kind, key.to_vec(), range_end.to_vec())
        }),
        2 => (role(), 0..4usize).prop_map(|(role, nth)| Change::Revoke(role, nth)),
        2 => (select(BOUNDS.to_vec()), 0..4i64)
            .prop_map(|(key, lease)| Change::Attach(key.to_vec(), lease)),
    ]
}

fn question() -> impl Strategy<Value = Question> {
    let watch = (key(), range_end()).prop_map(|(key, range_end)| pb::WatchCreateRequest {
        key,
        range_end,
        ..<_>::default()
    });
    let names = || select(vec!["root", "u1", "u2", "ghost", ""]);
    let user_get = names().prop_map(|name| pb::AuthUserGetRequest { name: name.into() });
    let role = select(vec!["root", "r1", "r2", "missing"]);
    let role_get = role.prop_map(|role| pb::AuthRoleGetRequest { role: role.into() });
    prop_oneof![
        4 => range().prop_map(Question::Range),
        4 => put().prop_map(Question::Put),
        4 => delete().prop_map(Question::Delete),
        8 => txn(3).prop_map(Question::Txn),
        2 => watch.prop_map(Question::Watch),
        1 => lease().prop_map(Question::Revoke),
        1 => lease().prop_map(Question::KeepAlive),
        1 => (lease(), any::<bool>()).prop_map(|(id, keys)| Question::TimeToLive(id, keys)),
        1 => Just(Question::Leases),
        1 => user_get.prop_map(Question::UserGet),
        1 => role_get.prop_map(Question::RoleGet),
        1 => prop_oneof![Just(Question::MemberList), Just(Question::Compact)],
    ]
}

/// Makes the change in both, if the store takes it; whether it does is tested elsewhere.
fn make(change: Change, store: &mut AuthStore, leases: &mut LeaseTable, model: &mut Model) {
    let batch = &mut Batch::default();
    match change {
        Change::AddUser(user) => {
            if store.user_add(&user_add(user), &Salt { id: 1, index: 1 }, batch).is_ok() {
                model.users.insert(user, BTreeSet::new());
            }
        }
        Change::DeleteUser(user) => {
            if store.user_delete(user, batch).is_ok() {
                model.users.remove(user);
            }
        }
        Change::AddRole(role) => {
            if store.role_add(role, batch).is_ok() {
                model.roles.insert(role, Vec::new());
            }
        }
        Change::DeleteRole(role) => {
            if store.role_delete(role, batch).is_ok() {
                model.roles.remove(role);
                model.users.values_mut().for_each(|roles| {
                    roles.remove(role);
                });
            }
        }
        Change::GrantRole(user, role) => {
            if store.user_grant_role(user, role, batch).is_ok() {
                model.users.get_mut(user).unwrap().insert(role);
            }
        }
        Change::RevokeRole(user, role) => {
            if store.user_revoke_role(user, role, batch).is_ok() {
                model.users.get_mut(user).unwrap().remove(role);
            }
        }
        Change::Grant(role, kind, key, range_end) => {
            if store.role_grant_permission(&grant(role, kind, &key, &range_end), batch).is_ok() {
                read_permissions(store, role, model);
            }
        }
        Change::Revoke(role, nth) => {
            let held = model.roles.get(role).and_then(|held| held.get(nth)).cloned();
            let (_, key, range_end) = held.unwrap_or((Type::Read, Vec::new(), Vec::new()));
            let request = pb::AuthRoleRevokePermissionRequest {
                role: role.into(),
                key: key.into(),
                range_end: range_end.into(),
            };
            if store.role_revoke_permission(&request, batch).is_ok() {
                read_permissions(store, role, model);
            }
        }
        Change::Attach(key, lease) => {
            leases.attach(&key, LeaseId(lease)).unwrap();
            model.attached.retain(|(attached, _)| *attached != key);
            if lease != 0 {
                model.attached.push((key, lease));
            }
        }
    }
    model.revision = store.revision();
    model.store = store.clone();
}

/// What a role holds is taken from the store, which has a rule of its own for what replaces what.
fn read_permissions(store: &AuthStore, role: &'static str, model: &mut Model) {
    let held = store.roles[role].key_permission.iter();
    let plain = held.map(|held| (held.perm_type(), held.key.to_vec(), held.range_end.to_vec()));
    model.roles.insert(role, plain.collect());
}

/// How far below the store's revision a caller's is.
fn caller() -> impl Strategy<Value = (&'static str, Option<i64>)> {
    let user = prop_oneof![
        12 => select(vec!["u1", "u2", "u3"]),
        1 => select(vec!["root", "ghost", ""]),
    ];
    let revision =
        prop_oneof![20 => Just(Some(0)), 1 => Just(Some(1)), 1 => Just(Some(-1)), 1 => Just(None)];
    (user, revision)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(800))]

    /// Questions come while users and roles change, so that nothing merged is left behind by a change.
    #[test]
    fn the_decision_is_that_of_a_model_that_looks_at_each_key(
        rounds in prop::collection::vec(
            (
                prop::collection::vec(change(), 0..16),
                prop::collection::vec((caller(), question()), 0..12),
            ),
            1..5,
        ),
    ) {
        let mut store = AuthStore::default();
        let mut leases = LeaseTable::new(1);
        for id in 1..4 {
            leases.grant(LeaseId(id), 60).unwrap();
        }
        let mut model = Model::default();
        let start = [
            Change::AddUser("root"), Change::GrantRole("root", "root"),
            Change::AddUser("u1"), Change::AddRole("r1"), Change::GrantRole("u1", "r1"),
            Change::AddUser("u2"), Change::AddRole("r2"), Change::GrantRole("u2", "r2"),
        ];
        for change in start {
            make(change, &mut store, &mut leases, &mut model);
        }
        store.enable(&mut Batch::default()).unwrap();
        for (changes, questions) in rounds {
            for change in changes {
                make(change, &mut store, &mut leases, &mut model);
            }
            for ((user, behind), question) in questions {
                let revision = behind.map_or(0, |behind| model.revision.wrapping_sub_signed(behind));
                let caller = Caller { username: user.into(), revision };
                let expected = model.check(&caller, &question);
                let found = store.check(&caller, &need(question.asked()), &leases);
                prop_assert_eq!(found, expected, "{:?} by {:?} in {:?}", question, caller, model);
                if let Some(entry) = question.entry() {
                    let found = store.check(&caller, &need_of_entry(&entry), &leases);
                    prop_assert_eq!(found, expected, "{:?} by {:?} in the log", entry, caller);
                }
            }
        }
    }
}
