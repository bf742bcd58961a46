//! Who may do what: the one place that decides it (v3-api 3.12).
//!
//! [`need`] says what a call needs, [`need_of_entry`] what an entry of the log needs, and
//! [`AuthStore::check`] whether someone has it. A transaction becomes a flat list, whatever is nested in
//! it, so that there is one way to look at a key and none past it.
//!
//! While authentication is off nothing is asked for: callers look at [`AuthStore::enabled`] first.
//!
//! **Invariant**: every `match` over requests here names all of them, so one that is added has to be
//! given its need; and what is not understood is refused.

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::alarm_request::AlarmAction;
use quorate_proto::etcdserverpb::request_op::Request as Op;
use smallvec::SmallVec;

use super::ranges::Permitted;
use super::{AuthError, AuthStore, ROOT};
use crate::core::command::Request;
use crate::core::lease::LeaseTable;
use crate::core::types::LeaseId;

/// Who asks.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Caller {
    /// Empty for someone without a credential, and for one whose certificate has no name: that is a
    /// credential all the same, of a user that is not there.
    pub username: String,
    /// The revision of users and roles that the credential was looked at under; 0 without one.
    pub revision: u64,
}

impl Caller {
    /// Someone without a credential.
    pub const NOBODY: Caller = Caller { username: String::new(), revision: 0 };

    /// Whom a member acts as where it asks by itself for what needs a user.
    pub fn root(store: &AuthStore) -> Caller {
        if !store.enabled() {
            return Caller::NOBODY;
        }
        Caller { username: ROOT.to_string(), revision: store.revision() }
    }
}

/// What is done with keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Operation {
    Read,
    Write,
}

/// Which keys something is done with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keys<'a> {
    /// One key, or a range of them (v3-api 3.2).
    Range { key: &'a [u8], range_end: &'a [u8] },
    /// Those attached to a lease; role root need not be asked for them.
    Attached(LeaseId),
    /// Those attached to any lease; role root need not be asked for them.
    AttachedToAny,
}

/// One thing done with keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access<'a> {
    pub operation: Operation,
    pub keys: Keys<'a>,
}

/// Everything that a request does with keys. A put, with all that can come with it, needs no memory of
/// its own.
pub type Accesses<'a> = SmallVec<[Access<'a>; 3]>;

/// What a request needs.
#[derive(Clone, PartialEq, Debug)]
pub enum Need<'a> {
    Nothing,
    /// Any credential.
    User,
    /// Role root.
    Root,
    /// All of these permissions; nothing if there are none.
    Keys(Accesses<'a>),
    /// Any credential, and this permission.
    UserAndKeys(Access<'a>),
    /// To be this user, or to have role root.
    SelfOrRoot(&'a str),
    /// To have this role, or role root.
    HolderOrRoot(&'a str),
    /// What cannot be understood is given to nobody.
    Denied,
}

/// A call, as far as it matters for what it needs.
#[derive(Clone, Copy, Debug)]
pub enum Asked<'a> {
    /// Also as a stream.
    Range(&'a pb::RangeRequest),
    Put(&'a pb::PutRequest),
    DeleteRange(&'a pb::DeleteRangeRequest),
    Txn(&'a pb::TxnRequest),
    Compact,
    WatchCreate(&'a pb::WatchCreateRequest),
    LeaseGrant,
    LeaseRevoke(LeaseId),
    LeaseKeepAlive(LeaseId),
    LeaseTimeToLive {
        id: LeaseId,
        /// The attached keys are to be told.
        keys: bool,
    },
    LeaseLeases,
    MemberAdd,
    MemberRemove,
    MemberUpdate,
    MemberPromote,
    MemberList,
    Alarm(&'a pb::AlarmRequest),
    Status,
    Defragment,
    Hash,
    HashKv,
    Snapshot,
    MoveLeader,
    Downgrade,
    AuthEnable,
    AuthDisable,
    AuthStatus,
    Authenticate,
    UserAdd,
    UserGet(&'a pb::AuthUserGetRequest),
    UserList,
    UserDelete,
    UserChangePassword,
    UserGrantRole,
    UserRevokeRole,
    RoleAdd,
    RoleGet(&'a pb::AuthRoleGetRequest),
    RoleList,
    RoleDelete,
    RoleGrantPermission,
    RoleRevokePermission,
    /// Of the gRPC service and of HTTP.
    Health,
}

/// What a call needs before it is answered or proposed.
pub fn need(asked: Asked<'_>) -> Need<'_> {
    match asked {
        Asked::Range(range) => Need::Keys(range_accesses(range)),
        Asked::Put(put) => Need::Keys(put_accesses(put)),
        Asked::DeleteRange(delete) => Need::Keys(delete_accesses(delete)),
        Asked::Txn(txn) => txn_need(txn),
        Asked::WatchCreate(watch) => {
            // A watch without a key begins with the first one.
            let key: &[u8] = if watch.key.is_empty() { b"\0" } else { &watch.key };
            let accesses = [Access::range(Operation::Read, key, &watch.range_end)];
            Need::Keys(accesses.into_iter().collect())
        }
        Asked::LeaseRevoke(id) | Asked::LeaseKeepAlive(id) => {
            Need::UserAndKeys(Access { operation: Operation::Write, keys: Keys::Attached(id) })
        }
        Asked::LeaseTimeToLive { id, keys: true } => {
            Need::UserAndKeys(Access { operation: Operation::Read, keys: Keys::Attached(id) })
        }
        Asked::LeaseLeases => {
            Need::UserAndKeys(Access { operation: Operation::Read, keys: Keys::AttachedToAny })
        }
        Asked::Alarm(alarm) if alarm.action == AlarmAction::Get as i32 => Need::User,
        Asked::LeaseGrant
        | Asked::LeaseTimeToLive { keys: false, .. }
        | Asked::MemberList
        | Asked::Status => Need::User,
        Asked::UserGet(get) => Need::SelfOrRoot(&get.name),
        Asked::RoleGet(get) => Need::HolderOrRoot(&get.role),
        Asked::Compact
        | Asked::MemberAdd
        | Asked::MemberRemove
        | Asked::MemberUpdate
        | Asked::MemberPromote
        | Asked::Alarm(_)
        | Asked::Defragment
        | Asked::Hash
        | Asked::HashKv
        | Asked::Snapshot
        | Asked::MoveLeader
        | Asked::Downgrade
        | Asked::AuthEnable
        | Asked::AuthDisable
        | Asked::UserAdd
        | Asked::UserList
        | Asked::UserDelete
        | Asked::UserChangePassword
        | Asked::UserGrantRole
        | Asked::UserRevokeRole
        | Asked::RoleAdd
        | Asked::RoleList
        | Asked::RoleDelete
        | Asked::RoleGrantPermission
        | Asked::RoleRevokePermission => Need::Root,
        Asked::AuthStatus | Asked::Authenticate | Asked::Health => Need::Nothing,
    }
}

/// What an entry of the log needs to be executed: exactly what etcd asks for there, as members that differ
/// in it would come to differ in their data. (That nested transactions are looked into is so from 3.4.44,
/// 3.5.30 and 3.6.11 on.) Whatever else a call needs was asked for before it was proposed; members
/// propose for themselves without a user.
pub fn need_of_entry(request: &Request) -> Need<'_> {
    match request {
        Request::Range(range) => Need::Keys(range_accesses(range)),
        Request::Put(put) => Need::Keys(put_accesses(put)),
        Request::DeleteRange(delete) => Need::Keys(delete_accesses(delete)),
        Request::Txn(txn) => txn_need(txn),
        Request::LeaseRevoke(revoke) => {
            let keys = Keys::Attached(LeaseId(revoke.id));
            Need::Keys([Access { operation: Operation::Write, keys }].into_iter().collect())
        }
        Request::AuthUserGet(get) => Need::SelfOrRoot(&get.name),
        Request::AuthRoleGet(get) => Need::HolderOrRoot(&get.role),
        Request::AuthEnable(_)
        | Request::AuthDisable(_)
        | Request::AuthUserAdd(_)
        | Request::AuthUserDelete(_)
        | Request::AuthUserChangePassword(_)
        | Request::AuthUserGrantRole(_)
        | Request::AuthUserRevokeRole(_)
        | Request::AuthUserList(_)
        | Request::AuthRoleList(_)
        | Request::AuthRoleAdd(_)
        | Request::AuthRoleDelete(_)
        | Request::AuthRoleGrantPermission(_)
        | Request::AuthRoleRevokePermission(_) => Need::Root,
        Request::Compaction(_)
        | Request::LeaseGrant(_)
        | Request::LeaseCheckpoint(_)
        | Request::Alarm(_)
        | Request::AuthStatus(_)
        | Request::Authenticate(_)
        | Request::ClusterVersionSet(_)
        | Request::ClusterMemberAttrSet(_)
        | Request::DowngradeInfoSet(_)
        | Request::DowngradeVersionTest(_) => Need::Nothing,
    }
}

impl<'a> Access<'a> {
    fn range(operation: Operation, key: &'a [u8], range_end: &'a [u8]) -> Self {
        Access { operation, keys: Keys::Range { key, range_end } }
    }
}

fn range_accesses(range: &pb::RangeRequest) -> Accesses<'_> {
    let mut list = Accesses::new();
    add_range(range, &mut list);
    list
}

fn put_accesses(put: &pb::PutRequest) -> Accesses<'_> {
    let mut list = Accesses::new();
    add_put(put, &mut list);
    list
}

fn delete_accesses(delete: &pb::DeleteRangeRequest) -> Accesses<'_> {
    let mut list = Accesses::new();
    add_delete(delete, &mut list);
    list
}

fn txn_need(txn: &pb::TxnRequest) -> Need<'_> {
    let mut list = Accesses::new();
    match add_txn(txn, &mut list) {
        Ok(()) => Need::Keys(list),
        Err(Unknown) => Need::Denied,
    }
}

/// An operation that is none of those known here.
struct Unknown;

fn add_range<'a>(range: &'a pb::RangeRequest, list: &mut Accesses<'a>) {
    list.push(Access::range(Operation::Read, &range.key, &range.range_end));
}

fn add_put<'a>(put: &'a pb::PutRequest, list: &mut Accesses<'a>) {
    list.push(Access::range(Operation::Write, &put.key, &[]));
    if put.lease != 0 {
        // With its lease the key ends all others that are attached to it.
        let keys = Keys::Attached(LeaseId(put.lease));
        list.push(Access { operation: Operation::Write, keys });
    }
    if put.prev_kv {
        list.push(Access::range(Operation::Read, &put.key, &[]));
    }
}

fn add_delete<'a>(delete: &'a pb::DeleteRangeRequest, list: &mut Accesses<'a>) {
    list.push(Access::range(Operation::Write, &delete.key, &delete.range_end));
    if delete.prev_kv {
        list.push(Access::range(Operation::Read, &delete.key, &delete.range_end));
    }
}

/// Both branches, whichever will be taken: which one it is tells of the compared keys.
fn add_txn<'a>(txn: &'a pb::TxnRequest, list: &mut Accesses<'a>) -> Result<(), Unknown> {
    for compare in &txn.compare {
        list.push(Access::range(Operation::Read, &compare.key, &compare.range_end));
    }
    for op in txn.success.iter().chain(&txn.failure) {
        match &op.request {
            Some(Op::RequestRange(range)) => add_range(range, list),
            Some(Op::RequestPut(put)) => add_put(put, list),
            Some(Op::RequestDeleteRange(delete)) => add_delete(delete, list),
            Some(Op::RequestTxn(nested)) => add_txn(nested, list)?,
            None => return Err(Unknown),
        }
    }
    Ok(())
}

impl AuthStore {
    /// Whether `caller` has what `need` says. `leases` are those of the same moment as the store.
    ///
    /// # Errors
    /// `UserEmpty`, `OldRevision`, `UserNotFound`, `PermissionDenied`: the first that etcd comes upon.
    pub fn check(
        &self,
        caller: &Caller,
        need: &Need<'_>,
        leases: &LeaseTable,
    ) -> Result<(), AuthError> {
        if !self.enabled {
            return Ok(());
        }
        match need {
            Need::Nothing => Ok(()),
            Need::User => has_credential(caller),
            Need::Root => self.check_root(caller),
            Need::Keys(accesses) => {
                accesses.iter().try_for_each(|access| self.check_access(caller, access, leases))
            }
            Need::UserAndKeys(access) => {
                has_credential(caller)?;
                self.check_access(caller, access, leases)
            }
            Need::SelfOrRoot(user) => match self.check_root(caller) {
                Err(_) if caller.username == *user => self.user(user).map(|_| ()),
                checked => checked,
            },
            Need::HolderOrRoot(role) => match self.check_root(caller) {
                Err(_) if self.has_role(caller, role) => Ok(()),
                checked => checked,
            },
            Need::Denied => Err(AuthError::PermissionDenied),
        }
    }

    /// The revision is not looked at.
    fn check_root(&self, caller: &Caller) -> Result<(), AuthError> {
        if caller.username.is_empty() {
            return Err(AuthError::UserEmpty);
        }
        let permitted = self.permitted(caller).ok_or(AuthError::UserNotFound)?;
        granted(permitted.everything)
    }

    fn check_access(
        &self,
        caller: &Caller,
        access: &Access<'_>,
        leases: &LeaseTable,
    ) -> Result<(), AuthError> {
        match access.keys {
            Keys::Range { key, range_end } => {
                let permitted = self.check_user(caller)?;
                let ranges = permitted.ranges(access.operation);
                granted(permitted.everything || ranges.cover(key, range_end))
            }
            Keys::Attached(id) => match leases.get(id) {
                Some(lease) if lease.key_count() > 0 => {
                    let any_in = |from: &[u8], to: Option<&[u8]>| lease.has_key_in(from, to);
                    self.check_attached(caller, |permitted| {
                        let ranges = permitted.ranges(access.operation);
                        ranges.have_all(lease.key_count(), lease.keys(), any_in)
                    })
                }
                _ => Ok(()),
            },
            Keys::AttachedToAny if leases.attached_count() > 0 => {
                let any_in = |from: &[u8], to: Option<&[u8]>| leases.has_attached_in(from, to);
                self.check_attached(caller, |permitted| {
                    let ranges = permitted.ranges(access.operation);
                    ranges.have_all(leases.attached_count(), leases.attached(), any_in)
                })
            }
            Keys::AttachedToAny => Ok(()),
        }
    }

    /// Unlike for keys that are named, role root is enough under any revision.
    fn check_attached(
        &self,
        caller: &Caller,
        has_all: impl FnOnce(&Permitted) -> bool,
    ) -> Result<(), AuthError> {
        if self.check_root(caller).is_ok() {
            return Ok(());
        }
        granted(has_all(self.check_user(caller)?))
    }

    /// What is asked of anyone who names a key.
    fn check_user(&self, caller: &Caller) -> Result<&Permitted, AuthError> {
        has_credential(caller)?;
        if caller.revision < self.revision {
            return Err(AuthError::OldRevision);
        }
        self.permitted(caller).ok_or(AuthError::PermissionDenied)
    }

    fn permitted(&self, caller: &Caller) -> Option<&Permitted> {
        self.permitted.get(&caller.username).map(|permitted| &**permitted)
    }

    fn has_role(&self, caller: &Caller, role: &str) -> bool {
        let user = self.users.get(&caller.username);
        user.is_some_and(|user| user.roles.iter().any(|held| held == role))
    }
}

fn granted(granted: bool) -> Result<(), AuthError> {
    if granted { Ok(()) } else { Err(AuthError::PermissionDenied) }
}

fn has_credential(caller: &Caller) -> Result<(), AuthError> {
    if caller.revision == 0 { Err(AuthError::UserEmpty) } else { Ok(()) }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
