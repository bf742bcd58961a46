//! The state machine: committed entries in, replies and effects out.
//!
//! [`Machine::apply`] takes entries strictly in index order and exactly once: it skips what the
//! engine already holds. Its changes are collected in batches that carry the applied index with them
//! ([`Machine::cut`]), so a crash can neither repeat nor lose one.
//!
//! **Invariant**: everything here depends on the log alone, never on the clock, the disk's size or the
//! member, but for `answered`, which only decides whether a reply is computed.

use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use engine_api::{Batch, EngineError, Table, View};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::AlarmType;
use quorate_proto::etcdserverpb::alarm_request::AlarmAction;
use quorate_proto::raftpb;

use super::alarm::Alarms;
use super::auth::access::{self, Caller};
use super::auth::password::Salt;
use super::auth::{self, AuthError, AuthStore};
use super::command::{Command, CommandError, Request};
use super::event::Event;
use super::lease::{LeaseError, LeaseTable};
use super::membership::{Member, Membership, MembershipChange, MembershipError, Version};
use super::mvcc::compact::{SCHEDULED, Scheduled};
use super::mvcc::keyspace::revision_key;
use super::mvcc::txn::{Txn, TxnError};
use super::mvcc::{ReadError, Store, Values};
use super::quota::{self, Limit, Quota, Sizes};
use super::types::{Index, LeaseId, MemberId, Revision, Term};

/// Meta keys (formats-and-peers 3.2).
pub const CONSISTENT_INDEX: &[u8] = b"consistent_index";
pub const TERM: &[u8] = b"term";
pub const CONF_STATE: &[u8] = b"confState";
/// Written by a member for itself once the cluster runs 3.6 or later.
pub const STORAGE_VERSION: &[u8] = b"storageVersion";
/// Key of the `cluster` bucket.
pub const CLUSTER_VERSION: &[u8] = b"clusterVersion";

/// The first release whose members record a storage version and persist lease checkpoints.
const V3_6: Version = Version { major: 3, minor: 6, patch: 0 };

/// Why a request is refused: the same on every member; the entry counts as applied.
#[derive(thiserror::Error, Debug)]
pub enum ApplyError {
    #[error("revision {asked} is compacted, the oldest readable one is {compacted}")]
    Compacted { asked: i64, compacted: i64 },
    #[error("revision {asked} is not reached yet, the current one is {current}")]
    FutureRevision { asked: i64, current: i64 },
    #[error("key does not exist")]
    KeyNotFound,
    #[error("lease {0} is not known")]
    LeaseNotFound(LeaseId),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A NOSPACE alarm is in force, or this request filled the quota.
    #[error("space quota is exceeded")]
    NoSpace,
    #[error("a CORRUPT alarm is in force")]
    Corrupt,
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error("alarm action {0} is not known")]
    UnknownAlarmAction(i32),
}

/// Why this member cannot go on.
#[derive(thiserror::Error, Debug)]
pub enum Fatal {
    #[error(transparent)]
    Storage(#[from] EngineError),
    #[error("log entry {index}: {source}")]
    Entry {
        index: Index,
        #[source]
        source: CommandError,
    },
    #[error("log entry {0}: {1} is not supported yet")]
    Unsupported(Index, &'static str),
    #[error("log entry {index} follows entry {applied}")]
    Gap { index: Index, applied: Index },
    #[error(
        "log entry {index} raises the cluster version to {version}, which this server is too old for"
    )]
    TooOld { index: Index, version: String },
    #[error("value of an applied revision cannot be read: {0}")]
    Read(ReadError),
}

/// What a request answers, header revision included.
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    Range(pb::RangeResponse),
    Put(pb::PutResponse),
    DeleteRange(pb::DeleteRangeResponse),
    Txn(pb::TxnResponse),
    Compact(pb::CompactionResponse),
    LeaseGrant(pb::LeaseGrantResponse),
    LeaseRevoke(pb::LeaseRevokeResponse),
    LeaseCheckpoint(pb::LeaseCheckpointResponse),
    Alarm(pb::AlarmResponse),
    AuthStatus(pb::AuthStatusResponse),
    /// The simple token, empty if none was proposed, and the revision of users and roles that it is of.
    Authenticate {
        token: String,
        auth_revision: u64,
    },
    UserGet(pb::AuthUserGetResponse),
    UserList(pb::AuthUserListResponse),
    RoleGet(pb::AuthRoleGetResponse),
    RoleList(pb::AuthRoleListResponse),
    /// A request whose answer holds nothing but the header.
    Done,
}

/// A lease that came, went or changed, for those who keep its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseChange {
    /// `remaining` is 0 where no checkpoint is known.
    Granted {
        id: LeaseId,
        ttl: i64,
        remaining: i64,
    },
    Revoked(LeaseId),
    Checkpointed {
        id: LeaseId,
        remaining: i64,
    },
}

/// A simple token that came or went, for those who tell users by them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TokenChange {
    /// A user has shown its password.
    Assigned { username: String, token: String },
    /// No token of this user is good any more.
    Ended { username: String },
    /// No token of anyone is good any more.
    AllEnded,
}

/// What applying an entry did besides its reply.
#[derive(Default, Debug)]
pub struct Effects {
    pub events: Vec<Event>,
    pub leases: Vec<LeaseChange>,
    /// Compactions that took effect, in the order of their revisions.
    pub compactions: Vec<Scheduled>,
    pub alarms: bool,
    /// Whether users are asked for, or users or roles.
    pub auth: bool,
    /// In order.
    pub tokens: Vec<TokenChange>,
    pub members: bool,
    pub cluster_version: bool,
}

/// What became of one entry.
#[derive(Debug)]
pub struct Outcome {
    /// The request's ID; 0 where the entry carries none.
    pub id: u64,
    pub result: Result<Reply, ApplyError>,
    /// Executed, but beyond this limit of the quota: the caller is told so and an alarm is to be raised.
    pub over_quota: Option<Limit>,
    pub kind: Kind,
}

/// What an entry was.
#[derive(Clone, PartialEq, Debug)]
pub enum Kind {
    /// A new leader's first entry.
    Empty,
    /// A request, by its metric name.
    Request(&'static str),
    /// A configuration change; `None` if it was refused.
    ConfChange(Option<raftpb::ConfChange>),
}

/// All replicated state of a member.
pub struct Machine {
    pub store: Store,
    pub leases: LeaseTable,
    pub alarms: Alarms,
    pub auth: AuthStore,
    pub members: Membership,
    applied: Index,
    term: Term,
    /// Changes of other tables than `key` since the last cut.
    ops: Batch,
    /// Whether anything was applied since the last cut.
    dirty: bool,
    /// The version this server speaks: no higher cluster version can be joined.
    server: Version,
}

/// What [`Machine::restore`] found.
pub struct Restored {
    pub machine: Machine,
    /// A compaction to be resumed.
    pub unfinished: Option<i64>,
    /// Live keys that name a lease which does not exist. This server leaves none behind, but a file
    /// of another may hold some: they stay, attached to nothing, as etcd has it.
    pub orphans: usize,
}

/// Reads what is at `key`, which must be 8 bytes; 0 if there is nothing.
fn counter(view: &dyn View, table: Table, key: &[u8]) -> Result<u64, EngineError> {
    match view.get(table, key)? {
        None => Ok(0),
        Some(value) => match <[u8; 8]>::try_from(&value[..]) {
            Ok(bytes) => Ok(u64::from_be_bytes(bytes)),
            Err(_) => Err(corrupt(table, key, "not 8 bytes")),
        },
    }
}

fn corrupt(table: Table, key: &[u8], what: impl ToString) -> EngineError {
    EngineError::Corrupt {
        at: format!("table {table}, key {}", key.escape_ascii()),
        what: what.to_string(),
    }
}

/// Calls `add` with every entry of a table; its error names the key.
fn each(
    view: &dyn View,
    table: Table,
    mut add: impl FnMut(&[u8], &[u8]) -> Result<(), String>,
) -> Result<(), EngineError> {
    let mut bad = None;
    view.scan(
        table,
        Bound::Unbounded,
        Bound::Unbounded,
        &mut |key, value| match add(key, value) {
            Ok(()) => ControlFlow::Continue(()),
            Err(what) => {
                bad = Some(corrupt(table, key, what));
                ControlFlow::Break(())
            }
        },
    )?;
    bad.map_or(Ok(()), Err)
}

/// What an engine says of itself: how far it has applied the log, and the members there.
pub struct Stored {
    pub applied: Index,
    /// Of the last applied entry; 0 in a file of a release before 3.5.
    pub term: Term,
    pub members: Membership,
}

impl Stored {
    /// Reads it from `view`; `blank` is a membership without members.
    ///
    /// # Errors
    /// `Corrupt`, naming table and key.
    pub fn read(view: &dyn View, blank: Membership) -> Result<Self, EngineError> {
        let mut members = blank;
        let mut stored: Vec<Member> = Vec::new();
        each(view, Table::Members, |_, value| {
            stored.push(serde_json::from_slice(value).map_err(|error| error.to_string())?);
            Ok(())
        })?;
        let mut removed = Vec::new();
        each(view, Table::MembersRemoved, |key, _| {
            let text = std::str::from_utf8(key).map_err(|error| error.to_string())?;
            let id = u64::from_str_radix(text, 16).map_err(|error| error.to_string())?;
            removed.push(MemberId(id));
            Ok(())
        })?;
        members.restore(stored, removed);
        if let Some(text) = view.get(Table::Cluster, CLUSTER_VERSION)? {
            let version = std::str::from_utf8(&text).ok().and_then(Version::parse);
            if version.is_none() {
                return Err(corrupt(Table::Cluster, CLUSTER_VERSION, "not a version"));
            }
            members.cluster_version = version;
        }
        let applied = Index(counter(view, Table::Meta, CONSISTENT_INDEX)?);
        let term = Term(counter(view, Table::Meta, TERM)?);
        Ok(Stored { applied, term, members })
    }
}

/// Reads the auth buckets.
fn restore_auth(view: &dyn View) -> Result<AuthStore, EngineError> {
    let mut store = AuthStore::default();
    let enabled = match view.get(Table::Auth, auth::ENABLED)?.as_deref() {
        None | Some([0]) => false,
        Some([1]) => true,
        Some(_) => return Err(corrupt(Table::Auth, auth::ENABLED, "neither 0 nor 1")),
    };
    each(view, Table::AuthUsers, |_, value| store.restore_user(value))?;
    each(view, Table::AuthRoles, |_, value| store.restore_role(value))?;
    store.restore_state(enabled, counter(view, Table::Auth, auth::REVISION)?);
    Ok(store)
}

impl Machine {
    /// A machine over an empty engine.
    pub fn new(members: Membership, ttl_min_s: i64, server: Version) -> Self {
        Machine {
            store: Store::default(),
            leases: LeaseTable::new(ttl_min_s),
            alarms: Alarms::default(),
            auth: AuthStore::default(),
            members,
            applied: Index(0),
            term: Term(0),
            ops: Batch::default(),
            dirty: false,
            server,
        }
    }

    /// Reads all state that an engine holds.
    ///
    /// # Errors
    /// `Corrupt`, naming table and key.
    pub fn restore(
        view: &dyn View,
        members: Membership,
        ttl_min_s: i64,
        server: Version,
    ) -> Result<Restored, EngineError> {
        let Stored { applied, term, members } = Stored::read(view, members)?;
        let mut machine = Machine::new(members, ttl_min_s, server);
        machine.applied = applied;
        machine.term = term;
        each(view, Table::Lease, |key, value| {
            machine.leases.restore(key, value).map(|_| ()).map_err(|error| error.to_string())
        })?;
        each(view, Table::Alarm, |key, _| {
            machine.alarms.restore(key).map_err(|error| error.to_string())
        })?;
        machine.auth = restore_auth(view)?;
        let restored = Store::restore(view)?;
        machine.store = restored.store;
        let mut orphans = 0;
        for (key, lease) in restored.attached {
            let attached = machine.leases.attach(&key, lease);
            orphans += usize::from(attached.is_err());
        }
        Ok(Restored { machine, unfinished: restored.unfinished, orphans })
    }

    /// Reads the state that takes this machine's place on the same member.
    ///
    /// # Errors
    /// As [`Machine::restore`].
    pub fn replaced_by(&self, view: &dyn View) -> Result<Restored, EngineError> {
        let Membership { cluster_id, local, learners_max, .. } = self.members;
        let blank = Membership::new(cluster_id, local, learners_max);
        Machine::restore(view, blank, self.leases.ttl_min(), self.server)
    }

    /// The last applied entry.
    pub fn applied(&self) -> Index {
        self.applied
    }

    /// The term of the last applied entry.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Changes waiting for a cut, and whether a cut has anything to record at all.
    pub fn waiting(&self) -> (usize, bool) {
        (self.store.pending() + self.ops.len(), self.dirty)
    }

    /// Everything since the last cut as one engine batch, with the applied index it brings the
    /// engine to.
    pub fn cut(&mut self) -> (Batch, Index) {
        let mut batch = std::mem::take(&mut self.ops);
        self.store.take_batch(&mut batch);
        let number = |n: u64| Bytes::copy_from_slice(&n.to_be_bytes());
        if self.applied.0 > 0 {
            batch.put(Table::Meta, CONSISTENT_INDEX, number(self.applied.0));
            batch.put(Table::Meta, TERM, number(self.term.0));
            let conf_state = conf_state_json(&self.members.conf_state());
            batch.put(Table::Meta, CONF_STATE, conf_state);
        }
        self.dirty = false;
        (batch, self.applied)
    }

    /// Changes of the engine that no entry makes: what a compaction drops.
    pub fn maintenance(&mut self) -> (&mut Store, &mut Batch) {
        self.dirty = true;
        (&mut self.store, &mut self.ops)
    }

    /// Applies the next entry; `None` if the engine holds it already.
    ///
    /// `values` completes the machine's own state, so it is opened after the last commit was told.
    /// `answered` tells whether a caller on this member waits for a request; `sizes` are the engine's,
    /// which only decide what that caller is told.
    ///
    /// # Errors
    /// The member must stop.
    pub fn apply(
        &mut self,
        values: &Values<'_>,
        entry: &raftpb::Entry,
        answered: impl Fn(u64) -> bool,
        quota: Quota,
        sizes: impl Fn() -> Sizes,
        effects: &mut Effects,
    ) -> Result<Option<Outcome>, Fatal> {
        let index = Index(entry.index);
        if index <= self.applied {
            return Ok(None);
        }
        if index.0 != self.applied.0 + 1 {
            return Err(Fatal::Gap { index, applied: self.applied });
        }
        let outcome = if entry.r#type == raftpb::EntryType::EntryNormal as i32 {
            if entry.data.is_empty() {
                Outcome { id: 0, result: Ok(Reply::Done), over_quota: None, kind: Kind::Empty }
            } else {
                let command = Command::decode(entry.data.clone())
                    .map_err(|source| Fatal::Entry { index, source })?;
                let id = command.id;
                let kind = Kind::Request(command.request.name());
                let cost = quota::cost(&command.request);
                let result = self.request(values, index, command, answered(id), effects)?;
                let over_quota = (cost > 0 && result.is_ok() && answered(id))
                    .then(|| quota.exceeded(sizes(), cost))
                    .flatten();
                Outcome { id, result, over_quota, kind }
            }
        } else {
            self.conf_change(index, entry, effects)?
        };
        self.applied = index;
        self.term = Term(entry.term);
        self.dirty = true;
        Ok(Some(outcome))
    }

    fn conf_change(
        &mut self,
        index: Index,
        entry: &raftpb::Entry,
        effects: &mut Effects,
    ) -> Result<Outcome, Fatal> {
        if entry.r#type != raftpb::EntryType::EntryConfChange as i32 {
            return Err(Fatal::Unsupported(index, "a joint configuration change"));
        }
        let change: raftpb::ConfChange = prost::Message::decode(entry.data.clone())
            .map_err(|error| Fatal::Entry { index, source: CommandError::Malformed(error) })?;
        let id = change.id;
        Ok(match self.members.apply(&change) {
            Ok(done) => {
                effects.members = true;
                match done {
                    MembershipChange::Stored(member) => self.store_member(member),
                    MembershipChange::Removed(member) => {
                        self.ops.delete(Table::Members, member.to_string());
                        self.ops.put(Table::MembersRemoved, member.to_string(), "removed");
                    }
                }
                let kind = Kind::ConfChange(Some(change));
                Outcome { id, result: Ok(Reply::Done), over_quota: None, kind }
            }
            Err(error) => {
                let kind = Kind::ConfChange(None);
                Outcome { id, result: Err(error.into()), over_quota: None, kind }
            }
        })
    }

    fn store_member(&mut self, id: MemberId) {
        let member = self.members.get(id).expect("the member was just changed");
        let json = serde_json::to_vec(member).expect("a member is always JSON");
        self.ops.put(Table::Members, id.to_string(), json);
    }

    /// Executes one request. The order of the checks is etcd's: CORRUPT, NOSPACE, the user, execution.
    fn request(
        &mut self,
        values: &Values<'_>,
        index: Index,
        Command { id, username, auth_revision, request }: Command,
        answered: bool,
        effects: &mut Effects,
    ) -> Result<Result<Reply, ApplyError>, Fatal> {
        if self.alarms.any(AlarmType::Corrupt)
            && matches!(
                request,
                Request::Put(_)
                    | Request::Range(_)
                    | Request::DeleteRange(_)
                    | Request::Txn(_)
                    | Request::Compaction(_)
                    | Request::LeaseGrant(_)
                    | Request::LeaseRevoke(_)
            )
        {
            return Ok(Err(ApplyError::Corrupt));
        }
        if self.alarms.any(AlarmType::Nospace) && quota::cost(&request) > 0 {
            return Ok(Err(ApplyError::NoSpace));
        }
        if self.auth.enabled() {
            let caller = Caller { username, revision: auth_revision };
            let need = access::need_of_entry(&request);
            if let Err(error) = self.auth.check(&caller, &need, &self.leases) {
                return Ok(Err(error.into()));
            }
        }
        macro_rules! txn {
            () => {
                Txn::begin(&mut self.store, &mut self.leases, values, &mut effects.events, answered)
            };
        }
        let result = match request {
            Request::Put(put) => sort(txn!().put(&put))?.map(Reply::Put),
            Request::DeleteRange(delete) => {
                sort(txn!().delete_range(&delete))?.map(Reply::DeleteRange)
            }
            Request::Txn(request) => sort(txn!().txn(&request))?.map(Reply::Txn),
            Request::Range(_) if !answered => Ok(Reply::Done),
            Request::Range(range) => match self.store.now().range(values, &range) {
                Ok(ranged) => Ok(Reply::Range(pb::RangeResponse {
                    header: header(self.store.now().revision()),
                    kvs: ranged.kvs,
                    more: ranged.more,
                    count: ranged.count,
                })),
                Err(error) => Err(sort_read(error)?),
            },
            Request::Compaction(compaction) => self.compact(&compaction, effects)?,
            Request::LeaseGrant(grant) => self.lease_grant(&grant, effects),
            Request::LeaseRevoke(revoke) => {
                let id = LeaseId(revoke.id);
                match self.leases.revoke(id) {
                    Err(error) => Err(error.into()),
                    Ok(keys) => {
                        let mut txn = txn!();
                        for key in keys {
                            txn.delete(key);
                        }
                        self.ops.delete(Table::Lease, LeaseTable::record_key(id));
                        effects.leases.push(LeaseChange::Revoked(id));
                        let header = header(self.store.now().revision());
                        Ok(Reply::LeaseRevoke(pb::LeaseRevokeResponse { header }))
                    }
                }
            }
            Request::LeaseCheckpoint(request) => {
                self.lease_checkpoint(&request, effects);
                let header = header(self.store.now().revision());
                Ok(Reply::LeaseCheckpoint(pb::LeaseCheckpointResponse { header }))
            }
            Request::Alarm(alarm) => self.alarm(&alarm, effects),
            Request::ClusterVersionSet(set) => {
                let version = Version::parse(&set.ver)
                    .filter(|v| (v.major, v.minor) <= (self.server.major, self.server.minor));
                let Some(version) = version else {
                    return Err(Fatal::TooOld { index, version: set.ver });
                };
                self.members.cluster_version = Some(version);
                effects.cluster_version = true;
                self.ops.put(Table::Cluster, CLUSTER_VERSION, version.to_string());
                if version >= V3_6 {
                    self.ops.put(Table::Meta, STORAGE_VERSION, version.to_string());
                }
                Ok(Reply::Done)
            }
            Request::ClusterMemberAttrSet(set) => {
                let id = MemberId(set.member_id);
                let attributes = set.member_attributes.unwrap_or_default();
                let known =
                    self.members.set_attributes(id, &attributes.name, &attributes.client_urls);
                if known.is_some() {
                    self.store_member(id);
                    effects.members = true;
                }
                Ok(Reply::Done)
            }
            // What reads users and roles costs too little to be left out where nobody waits for it.
            Request::AuthStatus(_) => Ok(Reply::AuthStatus(pb::AuthStatusResponse {
                header: header(self.store.now().revision()),
                enabled: self.auth.enabled(),
                auth_revision: self.auth.revision(),
            })),
            Request::AuthUserGet(get) => {
                self.auth.user_roles(&get.name).map_err(Into::into).map(|roles| {
                    let header = header(self.store.now().revision());
                    Reply::UserGet(pb::AuthUserGetResponse { header, roles })
                })
            }
            Request::AuthUserList(_) => Ok(Reply::UserList(pb::AuthUserListResponse {
                header: header(self.store.now().revision()),
                users: self.auth.user_names(),
            })),
            Request::AuthRoleGet(get) => {
                self.auth.role_permissions(&get.role).map_err(Into::into).map(|perm| {
                    let header = header(self.store.now().revision());
                    Reply::RoleGet(pb::AuthRoleGetResponse { header, perm })
                })
            }
            Request::AuthRoleList(_) => Ok(Reply::RoleList(pb::AuthRoleListResponse {
                header: header(self.store.now().revision()),
                roles: self.auth.role_names(),
            })),
            Request::AuthEnable(_) => self.auth(effects, |auth, batch| auth.enable(batch)),
            Request::AuthDisable(_) => self.auth(effects, |auth, batch| {
                auth.disable(batch);
                Ok(())
            }),
            Request::Authenticate(login) => {
                self.auth.check_login(&login.name).map_err(Into::into).map(|()| {
                    // Empty where the member that proposed it signs its tokens.
                    let mut token = login.simple_token;
                    if !token.is_empty() {
                        token = format!("{token}.{index}");
                        let (username, token) = (login.name, token.clone());
                        effects.tokens.push(TokenChange::Assigned { username, token });
                    }
                    Reply::Authenticate { token, auth_revision: self.auth.revision() }
                })
            }
            Request::AuthUserAdd(add) => {
                let salt = Salt { id, index: index.0 };
                self.auth(effects, |auth, batch| auth.user_add(&add, &salt, batch))
            }
            Request::AuthUserDelete(delete) => self
                .auth(effects, |auth, batch| auth.user_delete(&delete.name, batch))
                .inspect(|_| effects.tokens.push(TokenChange::Ended { username: delete.name })),
            Request::AuthUserChangePassword(change) => {
                let salt = Salt { id, index: index.0 };
                self.auth(effects, |auth, batch| auth.user_change_password(&change, &salt, batch))
                    .inspect(|_| effects.tokens.push(TokenChange::Ended { username: change.name }))
            }
            Request::AuthUserGrantRole(grant) => self
                .auth(effects, |auth, batch| auth.user_grant_role(&grant.user, &grant.role, batch)),
            Request::AuthUserRevokeRole(revoke) => self.auth(effects, |auth, batch| {
                auth.user_revoke_role(&revoke.name, &revoke.role, batch)
            }),
            Request::AuthRoleAdd(add) => {
                self.auth(effects, |auth, batch| auth.role_add(&add.name, batch))
            }
            Request::AuthRoleDelete(delete) => {
                self.auth(effects, |auth, batch| auth.role_delete(&delete.role, batch))
            }
            Request::AuthRoleGrantPermission(grant) => {
                self.auth(effects, |auth, batch| auth.role_grant_permission(&grant, batch))
            }
            Request::AuthRoleRevokePermission(revoke) => {
                self.auth(effects, |auth, batch| auth.role_revoke_permission(&revoke, batch))
            }
            Request::DowngradeInfoSet(set) if set.enabled => {
                return Err(Fatal::Unsupported(index, "a downgrade"));
            }
            Request::DowngradeInfoSet(_) | Request::DowngradeVersionTest(_) => Ok(Reply::Done),
        };
        Ok(result)
    }

    /// Makes a change of users or roles, or of whether they are asked for.
    fn auth(
        &mut self,
        effects: &mut Effects,
        change: impl FnOnce(&mut AuthStore, &mut Batch) -> Result<(), AuthError>,
    ) -> Result<Reply, ApplyError> {
        let state = |auth: &AuthStore| (auth.enabled(), auth.revision());
        let before = state(&self.auth);
        change(&mut self.auth, &mut self.ops)?;
        let after = state(&self.auth);
        effects.auth |= after != before;
        if before.0 && !after.0 {
            effects.tokens.push(TokenChange::AllEnded);
        }
        Ok(Reply::Done)
    }

    fn compact(
        &mut self,
        request: &pb::CompactionRequest,
        effects: &mut Effects,
    ) -> Result<Result<Reply, ApplyError>, Fatal> {
        let scheduled = match self.store.compact(request.revision) {
            Ok(scheduled) => scheduled,
            Err(error) => return Ok(Err(sort_read(error)?)),
        };
        self.ops.put(Table::Meta, SCHEDULED, revision_key(Revision::main(request.revision), false));
        effects.compactions.push(scheduled);
        let header = header(self.store.now().revision());
        Ok(Ok(Reply::Compact(pb::CompactionResponse { header })))
    }

    fn lease_grant(
        &mut self,
        request: &pb::LeaseGrantRequest,
        effects: &mut Effects,
    ) -> Result<Reply, ApplyError> {
        let id = LeaseId(request.id);
        let ttl = self.leases.grant(id, request.ttl)?;
        self.store_lease(id);
        effects.leases.push(LeaseChange::Granted { id, ttl, remaining: 0 });
        Ok(Reply::LeaseGrant(pb::LeaseGrantResponse {
            header: header(self.store.now().revision()),
            id: request.id,
            ttl,
            error: String::new(),
        }))
    }

    fn store_lease(&mut self, id: LeaseId) {
        let record = self.leases.record(id).expect("the lease was just changed");
        self.ops.put(Table::Lease, LeaseTable::record_key(id), record);
    }

    fn lease_checkpoint(&mut self, request: &pb::LeaseCheckpointRequest, effects: &mut Effects) {
        for checkpoint in &request.checkpoints {
            let (id, remaining) = (LeaseId(checkpoint.id), checkpoint.remaining_ttl);
            if self.leases.checkpoint(id, remaining) {
                effects.leases.push(LeaseChange::Checkpointed { id, remaining });
                if self.members.cluster_version >= Some(V3_6) {
                    self.store_lease(id);
                }
            }
        }
    }

    fn alarm(
        &mut self,
        request: &pb::AlarmRequest,
        effects: &mut Effects,
    ) -> Result<Reply, ApplyError> {
        let member = MemberId(request.member_id);
        let this = pb::AlarmMember { member_id: request.member_id, alarm: request.alarm };
        let alarms = match AlarmAction::try_from(request.action) {
            Ok(AlarmAction::Get) => self.alarms.list(request.alarm),
            Ok(_) if request.alarm == AlarmType::None as i32 => Vec::new(),
            Ok(AlarmAction::Activate) => {
                if self.alarms.activate(member, request.alarm) {
                    self.ops.put(Table::Alarm, Alarms::record(member, request.alarm), "");
                    effects.alarms = true;
                }
                vec![this]
            }
            Ok(AlarmAction::Deactivate) => {
                if self.alarms.deactivate(member, request.alarm) {
                    self.ops.delete(Table::Alarm, Alarms::record(member, request.alarm));
                    effects.alarms = true;
                    vec![this]
                } else {
                    Vec::new()
                }
            }
            Err(_) => return Err(ApplyError::UnknownAlarmAction(request.action)),
        };
        Ok(Reply::Alarm(pb::AlarmResponse { header: header(self.store.now().revision()), alarms }))
    }
}

fn header(revision: i64) -> Option<pb::ResponseHeader> {
    Some(pb::ResponseHeader { revision, ..Default::default() })
}

/// Tells a refusal, the same on all members, from a failure of this one.
fn sort<T>(result: Result<T, TxnError>) -> Result<Result<T, ApplyError>, Fatal> {
    Ok(match result {
        Ok(value) => Ok(value),
        Err(TxnError::LeaseNotFound(id)) => Err(ApplyError::LeaseNotFound(id)),
        Err(TxnError::KeyNotFound) => Err(ApplyError::KeyNotFound),
        Err(TxnError::Read(error)) => Err(sort_read(error)?),
    })
}

fn sort_read(error: ReadError) -> Result<ApplyError, Fatal> {
    match error {
        ReadError::Compacted { asked, compacted } => Ok(ApplyError::Compacted { asked, compacted }),
        ReadError::Future { asked, current } => Ok(ApplyError::FutureRevision { asked, current }),
        ReadError::Storage(error) => Err(Fatal::Storage(error)),
        // The applier reads its own newest state, of which no compaction takes anything away.
        ReadError::Superseded(_) | ReadError::Damaged(_) => Err(Fatal::Read(error)),
    }
}

/// The configuration as etcd stores it: empty lists left out.
fn conf_state_json(conf_state: &raftpb::ConfState) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    for (name, ids) in [("voters", &conf_state.voters), ("learners", &conf_state.learners)] {
        if !ids.is_empty() {
            map.insert(name.into(), ids.clone().into());
        }
    }
    map.insert("auto_leave".into(), false.into());
    serde_json::to_vec(&map).expect("a map is always JSON")
}
