//! Which call needs what: every call by nobody, by a user without a role, by a user with what the call
//! needs, and by root.

use quorate_proto::authpb::Permission;
use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::alarm_request::AlarmAction;
use quorate_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate_proto::etcdserverpb::downgrade_request::DowngradeAction;
use quorate_proto::etcdserverpb::request_op::Request;
use quorate_proto::{v3electionpb as election, v3lockpb as lock};
use tonic::Code;

use crate::call::Call;
use crate::login::{Session, User, secured, subjects};
use crate::server::{Kind, Said, error, get, op, put_of, span};

/// What the caller of a row must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    Nothing,
    /// Any valid credential.
    User,
    /// The permissions of the user `granted`.
    Grant,
    Root,
}

/// The callers of each row, in this order; each may do what those before it may.
const CALLERS: [&str; 4] = ["nobody", "plain", "granted", "root"];

impl Need {
    fn met_by(self, caller: usize) -> bool {
        let least = match self {
            Need::Nothing => 0,
            Need::User => 1,
            Need::Grant => 2,
            Need::Root => 3,
        };
        caller >= least
    }
}

/// A call and what it needs.
pub struct Row {
    name: String,
    need: Need,
    call: Call,
    /// What is answered to those who may.
    through: Result<(), Said>,
    /// The code of a refusal, where it is not that of the text.
    refusal: Option<Code>,
    /// Root's, before each call and after the last.
    before: Vec<Call>,
    after: Vec<Call>,
}

fn row(name: &str, need: Need, call: Call) -> Row {
    let name = name.to_string();
    Row { name, need, call, through: Ok(()), refusal: None, before: vec![], after: vec![] }
}

impl Row {
    fn fails(mut self, code: Code, text: &str) -> Row {
        self.through = Err(error(code, text));
        self
    }

    fn before(mut self, calls: Vec<Call>) -> Row {
        self.before = calls;
        self
    }

    fn after(mut self, calls: Vec<Call>) -> Row {
        self.after = calls;
        self
    }

    /// What each caller is told.
    fn answers(&self, need: Need) -> [Result<(), Said>; 4] {
        std::array::from_fn(|caller| {
            if need.met_by(caller) {
                self.through.clone()
            } else {
                let (code, text) = if caller == 0 { user_empty() } else { denied() };
                Err((self.refusal.unwrap_or(code), text))
            }
        })
    }
}

pub fn user_empty() -> Said {
    error(Code::InvalidArgument, "etcdserver: user name is empty")
}

pub fn denied() -> Said {
    error(Code::PermissionDenied, "etcdserver: permission denied")
}

/// How the installed release answers a row.
#[derive(Clone, Copy)]
enum Older {
    /// It needs something else.
    Needs(Need),
    /// It knows no such call.
    Unknown(&'static str),
    /// A refusal is told as it is called inside.
    Raw,
}

impl Older {
    fn answers(self, row: &Row) -> [Result<(), Said>; 4] {
        match self {
            Older::Needs(need) => row.answers(need),
            Older::Unknown(text) => std::array::from_fn(|_| Err(error(Code::Unimplemented, text))),
            Older::Raw => std::array::from_fn(|caller| match caller {
                3 => row.through.clone(),
                0 => Err(error(Code::Unknown, "auth: user name is empty")),
                _ => Err(error(Code::Unknown, "auth: permission denied")),
            }),
        }
    }
}

/// Where the installed release answers otherwise, and why.
/// A name that ends in `*` stands for all that begin like it.
const OLDER: &[(&str, Older, &str)] = &[
    ("range stream*", Older::Unknown(NO_RANGE_STREAM), "the call is of 3.7"),
    ("compaction", Older::Needs(Need::Nothing), "unchecked until 3.4.42"),
    ("txn within a txn: *", Older::Needs(Need::Nothing), "not looked into until 3.4.42"),
    (
        "txn: put with what is not to be read",
        Older::Needs(Need::Grant),
        "the read is not checked within a txn until 3.4.42",
    ),
    (
        "txn: put with a lease of secrets",
        Older::Needs(Need::Grant),
        "the lease is not looked at within a txn until 3.4.42",
    ),
    (
        "watch from a readable key on",
        Older::Needs(Need::Grant),
        "taken for a watch of the key alone until 3.4.46",
    ),
    ("lease grant", Older::Needs(Need::Nothing), LEASES),
    ("lease revoke", Older::Needs(Need::Nothing), LEASES),
    ("lease revoke of none", Older::Needs(Need::Nothing), LEASES),
    ("lease keep-alive*", Older::Needs(Need::Nothing), LEASES),
    ("lease time to live*", Older::Needs(Need::Nothing), LEASES),
    ("lease list*", Older::Needs(Need::Nothing), LEASES),
    ("member list", Older::Needs(Need::Nothing), "unchecked until 3.4.42"),
    ("linearizable member list", Older::Needs(Need::Nothing), "unchecked until 3.4.42"),
    ("status", Older::Needs(Need::Nothing), "unchecked until 3.6"),
    ("alarm *", Older::Needs(Need::Nothing), "unchecked until 3.4.42"),
    ("move leader", Older::Needs(Need::Nothing), "unchecked until 3.6"),
    ("defragment", Older::Raw, RAW),
    ("hash", Older::Raw, RAW),
    ("hash of keys", Older::Raw, RAW),
    ("snapshot", Older::Raw, RAW),
    ("downgrade", Older::Unknown(NO_DOWNGRADE), "the call is of 3.5"),
    ("auth status", Older::Unknown(NO_AUTH_STATUS), "the call is of 3.5"),
];

const NO_RANGE_STREAM: &str = "unknown method RangeStream for service etcdserverpb.KV";
const NO_DOWNGRADE: &str = "unknown method Downgrade for service etcdserverpb.Maintenance";
const NO_AUTH_STATUS: &str = "unknown method AuthStatus for service etcdserverpb.Auth";
const LEASES: &str = "of leases, only the keys that a revoke deletes are checked until 3.4.42";
const RAW: &str = "3.4 does not translate these errors";

fn older(name: &str) -> Option<(Older, &'static str)> {
    let listed = |pattern: &str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    };
    OLDER.iter().find(|(pattern, ..)| listed(pattern)).map(|(_, older, reason)| (*older, *reason))
}

const GRANTED: User = (
    "granted",
    &[
        (Type::Read, "read/", "read0"),
        (Type::Write, "write/", "write0"),
        (Type::Readwrite, "both/", "both0"),
    ],
);

/// Leases of the fixture, by what is attached to them.
mod lease {
    pub const FREE: i64 = 11;
    pub const WRITABLE: i64 = 12;
    pub const SECRET: i64 = 13;
    pub const READABLE: i64 = 14;
    pub const UNKNOWN: i64 = 99;
    /// Granted anew before each call that ends it.
    pub const BRIEF: i64 = 15;
}

pub fn put(key: &str) -> pb::PutRequest {
    pb::PutRequest { value: "v".into(), ..put_of(key) }
}

pub fn delete(key: &str, end: &str) -> pb::DeleteRangeRequest {
    let (key, range_end) = (key.to_string().into(), end.to_string().into());
    pb::DeleteRangeRequest { key, range_end, prev_kv: false }
}

pub fn watch(key: &str, end: &str) -> pb::WatchCreateRequest {
    let (key, range_end) = (key.to_string().into(), end.to_string().into());
    pb::WatchCreateRequest { key, range_end, ..Default::default() }
}

/// A comparison that never holds for a key that is there, and one that does for a key of version 0.
pub fn compare(key: &str, end: &str) -> pb::Compare {
    pb::Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Version as i32,
        key: key.to_string().into(),
        range_end: end.to_string().into(),
        target_union: Some(TargetUnion::Version(0)),
    }
}

pub fn grant_lease(id: i64) -> Call {
    Call::LeaseGrant(pb::LeaseGrantRequest { ttl: 10_000, id })
}

pub fn put_leased(key: &str, lease: i64) -> Call {
    Call::Put(pb::PutRequest { lease, ..put(key) })
}

fn txn(success: Vec<pb::RequestOp>, failure: Vec<pb::RequestOp>) -> pb::TxnRequest {
    pb::TxnRequest { compare: vec![], success, failure }
}

/// `inner` within `depth` transactions, by turns in the branch that is taken and in the other.
pub fn nested(inner: pb::RequestOp, depth: usize) -> Vec<pb::TxnRequest> {
    let mut all = Vec::new();
    // Each bit says in which branch the operation of that depth is.
    for branches in 0..1_u32 << depth {
        let mut ops = inner.clone();
        let mut outer = pb::TxnRequest::default();
        for level in 0..depth {
            outer = if branches >> level & 1 == 0 {
                txn(vec![ops], vec![])
            } else {
                txn(vec![], vec![ops])
            };
            ops = op::any(Request::RequestTxn(outer.clone()));
        }
        all.push(outer);
    }
    all
}

fn put_op(request: pb::PutRequest) -> pb::RequestOp {
    op::any(Request::RequestPut(request))
}

const NO_LEASE: &str = "etcdserver: requested lease not found";
const NO_MEMBER: &str = "etcdserver: member not found";
const NO_USER: &str = "etcdserver: user name not found";
const NO_ROLE: &str = "etcdserver: role name not found";
const FUTURE: &str = "etcdserver: mvcc: required revision is a future revision";

fn keys() -> Vec<Row> {
    use Need::{Grant, Root};
    let prev = |key: &str| pb::PutRequest { prev_kv: true, ..put(key) };
    let leased = |key: &str, lease| pb::PutRequest { lease, ..put(key) };
    let prev_delete = |key: &str| pb::DeleteRangeRequest { prev_kv: true, ..delete(key, "") };
    let of = |compare| Call::Txn(pb::TxnRequest { compare: vec![compare], ..Default::default() });
    let mut rows = vec![
        row("range of a key", Grant, Call::Range(get("read/1"))),
        row("range of a key that may be written only", Root, Call::Range(get("write/1"))),
        row("range of a key that may be both", Grant, Call::Range(get("both/1"))),
        row("range of a secret", Root, Call::Range(get("secret/1"))),
        row("range of a key that is not there", Root, Call::Range(get("secret/none"))),
        row("range of a prefix", Grant, Call::Range(span("read/", "read0"))),
        row("range of a part of it", Grant, Call::Range(span("read/1", "read/2"))),
        row("range over its end", Root, Call::Range(span("read/1", "read1"))),
        row("range from before it", Root, Call::Range(span("read", "read/2"))),
        row("range of everything", Root, Call::Range(span("\0", "\0"))),
        row("range from a key on", Root, Call::Range(span("read/", "\0"))),
        row(
            "serializable range",
            Grant,
            Call::Range(pb::RangeRequest { serializable: true, ..get("read/1") }),
        ),
        row(
            "serializable range of a secret",
            Root,
            Call::Range(pb::RangeRequest { serializable: true, ..get("secret/1") }),
        ),
        row(
            "count of a secret",
            Root,
            Call::Range(pb::RangeRequest { count_only: true, ..get("secret/1") }),
        ),
        row(
            "names of secrets",
            Root,
            Call::Range(pb::RangeRequest { keys_only: true, ..span("secret/", "secret0") }),
        ),
        row("range stream", Grant, Call::RangeStream(span("read/", "read0"))),
        row("range stream of secrets", Root, Call::RangeStream(span("secret/", "secret0"))),
        row("put", Grant, Call::Put(put("write/1"))),
        row("put of a key that may be read only", Root, Call::Put(put("read/1"))),
        row("put of a key that may be both", Grant, Call::Put(put("both/1"))),
        row("put of a secret", Root, Call::Put(put("secret/1"))),
        row("put with what was there", Grant, Call::Put(prev("both/1"))),
        row("put with what was there and is not to be read", Root, Call::Put(prev("write/1"))),
        row(
            "put that leaves the value",
            Grant,
            Call::Put(pb::PutRequest { ignore_value: true, ..put_of("write/1") }),
        ),
        row("put with a lease", Grant, Call::Put(leased("write/l", lease::FREE)))
            .after(vec![Call::Put(put("write/l"))]),
        row(
            "put with a lease of writable keys",
            Grant,
            put_leased("write/leased", lease::WRITABLE),
        ),
        row("put with a lease of secrets", Root, put_leased("write/x", lease::SECRET))
            .after(vec![Call::Put(put("write/x"))]),
        row("put with a lease that is not there", Grant, put_leased("write/1", lease::UNKNOWN))
            .fails(Code::NotFound, NO_LEASE),
        row("delete", Grant, Call::DeleteRange(delete("write/gone", ""))),
        row("delete of a key that may be read only", Root, Call::DeleteRange(delete("read/n", ""))),
        row("delete of a range", Grant, Call::DeleteRange(delete("write/m", "write/n"))),
        row("delete over its end", Root, Call::DeleteRange(delete("write/m", "write1"))),
        row("delete of everything", Root, Call::DeleteRange(delete("zzz", "\0"))),
        row("delete with what was there", Grant, Call::DeleteRange(prev_delete("both/gone"))),
        row(
            "delete with what was there and is not to be read",
            Root,
            Call::DeleteRange(prev_delete("write/gone")),
        ),
        row("empty txn", Need::Nothing, Call::Txn(pb::TxnRequest::default())),
        row("txn that compares", Grant, of(compare("read/1", ""))),
        row("txn that compares a range", Grant, of(compare("read/", "read0"))),
        row("txn that compares what may be written only", Root, of(compare("write/1", ""))),
        row("txn that compares a secret", Root, of(compare("secret/1", ""))),
        row("txn that compares over its end", Root, of(compare("read/", "read1"))),
        row(
            "compaction",
            Root,
            Call::Compact(pb::CompactionRequest { revision: 1 << 40, physical: false }),
        )
        .fails(Code::OutOfRange, FUTURE),
        row("watch of a key", Grant, Call::Watch(watch("read/1", ""))),
        row("watch of a prefix", Grant, Call::Watch(watch("read/", "read0"))),
        row("watch of what may be written only", Root, Call::Watch(watch("write/1", ""))),
        row("watch of a secret", Root, Call::Watch(watch("secret/1", ""))),
        row("watch over its end", Root, Call::Watch(watch("read/1", "read1"))),
        row("watch of everything", Root, Call::Watch(watch("\0", "\0"))),
        row("watch from a readable key on", Root, Call::Watch(watch("read/1", "\0"))),
        row(
            "watch of the past",
            Root,
            Call::Watch(pb::WatchCreateRequest { start_revision: 1, ..watch("secret/1", "") }),
        ),
    ];
    // The same operations in both branches of transactions up to three deep.
    let ops: [(&str, Need, pb::RequestOp); 10] = [
        ("range", Grant, op::range(get("read/1"))),
        ("range of a secret", Root, op::range(get("secret/1"))),
        ("put", Grant, op::put("write/1", "v")),
        ("put of a secret", Root, op::put("secret/1", "v")),
        ("put with what was there", Grant, put_op(prev("both/1"))),
        ("put with what is not to be read", Root, put_op(prev("write/1"))),
        ("put with a lease of secrets", Root, put_op(leased("write/1", lease::SECRET))),
        ("delete", Grant, op::delete("write/gone", "", false)),
        ("delete of a secret", Root, op::delete("secret/gone", "", false)),
        ("delete with what is not to be read", Root, op::delete("write/gone", "", true)),
    ];
    for (name, need, inner) in ops {
        for depth in 1..=3 {
            for txn in nested(inner.clone(), depth) {
                let place = if depth == 1 { "txn" } else { "txn within a txn" };
                let made = row(&format!("{place}: {name}"), need, Call::Txn(txn));
                // What root has attached there is not to stay.
                rows.push(made.after(vec![Call::Put(put("write/1"))]));
            }
        }
    }
    // A comparison within, which is no operation.
    for depth in 1..=2 {
        let inner = pb::TxnRequest { compare: vec![compare("secret/1", "")], ..Default::default() };
        for txn in nested(op::any(Request::RequestTxn(inner)), depth) {
            rows.push(row("txn within a txn: comparison of a secret", Root, Call::Txn(txn)));
        }
    }
    rows
}

fn leases() -> Vec<Row> {
    use Need::{Grant, Root, User};
    let revoke = |id| Call::LeaseRevoke(pb::LeaseRevokeRequest { id });
    let keep = |id| Call::LeaseKeepAlive(pb::LeaseKeepAliveRequest { id });
    let left = |id, keys| Call::LeaseTimeToLive(pb::LeaseTimeToLiveRequest { id, keys });
    let brief = |keys: &[&str]| {
        let mut calls = vec![revoke(lease::BRIEF), grant_lease(lease::BRIEF)];
        calls.extend(keys.iter().map(|key| put_leased(key, lease::BRIEF)));
        calls
    };
    vec![
        row("lease grant", User, Call::LeaseGrant(pb::LeaseGrantRequest { ttl: 1000, id: 0 })),
        row("lease revoke", User, revoke(lease::BRIEF)).before(brief(&[])),
        row("lease revoke with writable keys", Grant, revoke(lease::BRIEF))
            .before(brief(&["write/b", "both/b"])),
        row("lease revoke with a secret among the keys", Root, revoke(lease::BRIEF))
            .before(brief(&["write/b", "secret/b"])),
        row("lease revoke with keys that may be read only", Root, revoke(lease::BRIEF))
            .before(brief(&["read/b"])),
        row("lease revoke of none", User, revoke(lease::UNKNOWN)).fails(Code::NotFound, NO_LEASE),
        row("lease keep-alive", User, keep(lease::FREE)),
        row("lease keep-alive with writable keys", Grant, keep(lease::WRITABLE)),
        row("lease keep-alive with secrets", Root, keep(lease::SECRET)),
        row("lease keep-alive with keys that may be read only", Root, keep(lease::READABLE)),
        row("lease keep-alive of none", User, keep(lease::UNKNOWN)),
        row("lease time to live", User, left(lease::SECRET, false)),
        row("lease time to live with no keys", User, left(lease::FREE, true)),
        row("lease time to live with readable keys", Grant, left(lease::READABLE, true)),
        row("lease time to live with secrets", Root, left(lease::SECRET, true)),
        row(
            "lease time to live with keys that may be written only",
            Root,
            left(lease::WRITABLE, true),
        ),
        row("lease time to live of none", User, left(lease::UNKNOWN, true)),
        row("lease list with secrets", Root, Call::LeaseLeases),
    ]
}

fn cluster() -> Vec<Row> {
    use Need::{Nothing, Root, User};
    let peer_ur_ls = vec!["http://127.0.0.1:1".to_string()];
    let alarm = |action: AlarmAction| {
        let alarm = pb::AlarmType::Nospace as i32;
        Call::Alarm(pb::AlarmRequest { action: action as i32, member_id: 77, alarm })
    };
    let list = |linearizable| Call::MemberList(pb::MemberListRequest { linearizable });
    vec![
        row("member list", User, list(false)),
        row("linearizable member list", User, list(true)),
        row("member remove", Root, Call::MemberRemove(pb::MemberRemoveRequest { id: 99 }))
            .fails(Code::NotFound, NO_MEMBER),
        row(
            "member update",
            Root,
            Call::MemberUpdate(pb::MemberUpdateRequest { id: 99, peer_ur_ls: peer_ur_ls.clone() }),
        )
        .fails(Code::NotFound, NO_MEMBER),
        row("member promote", Root, Call::MemberPromote(pb::MemberPromoteRequest { id: 99 }))
            .fails(Code::NotFound, NO_MEMBER),
        // One that does not vote: the cluster goes on without it.
        row(
            "member add",
            Root,
            Call::MemberAdd(pb::MemberAddRequest { peer_ur_ls, is_learner: true }),
        ),
        row("status", User, Call::Status),
        row("alarm list", User, alarm(AlarmAction::Get)),
        row("alarm raise", Root, alarm(AlarmAction::Activate))
            .after(vec![alarm(AlarmAction::Deactivate)]),
        row("alarm clear", Root, alarm(AlarmAction::Deactivate)),
        row("defragment", Root, Call::Defragment),
        row("hash", Root, Call::Hash),
        row("hash of keys", Root, Call::HashKv(pb::HashKvRequest { revision: 0 })),
        row("snapshot", Root, Call::Snapshot),
        row("move leader", Root, Call::MoveLeader(pb::MoveLeaderRequest { target_id: 99 }))
            .fails(Code::FailedPrecondition, "etcdserver: bad leader transferee"),
        row(
            "downgrade",
            Root,
            Call::Downgrade(pb::DowngradeRequest {
                action: DowngradeAction::Validate as i32,
                version: "nonsense".to_string(),
            }),
        )
        .fails(Code::InvalidArgument, "etcdserver: wrong downgrade target version format"),
        row("health", Nothing, Call::Health),
    ]
}

fn users() -> Vec<Row> {
    use Need::{Grant, Nothing, Root};
    let user = |name: &str| Call::UserGet(pb::AuthUserGetRequest { name: name.to_string() });
    let role = |role: &str| Call::RoleGet(pb::AuthRoleGetRequest { role: role.to_string() });
    let text = str::to_string;
    vec![
        row("auth status", Nothing, Call::AuthStatus),
        row(
            "authenticate",
            Nothing,
            Call::Authenticate(pb::AuthenticateRequest {
                name: text("plain"),
                password: crate::login::password("plain"),
            }),
        ),
        row(
            "authenticate wrongly",
            Nothing,
            Call::Authenticate(pb::AuthenticateRequest {
                name: text("plain"),
                password: text("wrong"),
            }),
        )
        .fails(
            Code::InvalidArgument,
            "etcdserver: authentication failed, invalid user ID or password",
        ),
        row("auth enable", Root, Call::AuthEnable),
        row("user get of oneself", Grant, user("granted")),
        row("user get of another", Root, user("other")),
        row("user get of root", Root, user("root")),
        row("user get of nobody", Root, user("nobody")).fails(Code::FailedPrecondition, NO_USER),
        row("user list", Root, Call::UserList),
        row("role get of one's own", Grant, role("granted")),
        row("role get of another", Root, role("other")),
        row("role get of none", Root, role("none")).fails(Code::FailedPrecondition, NO_ROLE),
        row("role list", Root, Call::RoleList),
        row(
            "user add",
            Root,
            Call::UserAdd(pb::AuthUserAddRequest {
                name: text("added"),
                password: text("pw"),
                ..Default::default()
            }),
        ),
        row(
            "user delete",
            Root,
            Call::UserDelete(pb::AuthUserDeleteRequest { name: text("nobody") }),
        )
        .fails(Code::FailedPrecondition, NO_USER),
        row(
            "user delete of root",
            Root,
            Call::UserDelete(pb::AuthUserDeleteRequest { name: text("root") }),
        )
        .fails(Code::InvalidArgument, "etcdserver: invalid auth management"),
        row(
            "user change password of nobody",
            Root,
            Call::UserChangePassword(pb::AuthUserChangePasswordRequest {
                name: text("nobody"),
                password: text("pw"),
                ..Default::default()
            }),
        )
        .fails(Code::FailedPrecondition, NO_USER),
        // Not even of oneself.
        row(
            "user change password",
            Root,
            Call::UserChangePassword(pb::AuthUserChangePasswordRequest {
                name: text("other"),
                password: text("pw"),
                ..Default::default()
            }),
        ),
        row(
            "user grant role",
            Root,
            Call::UserGrantRole(pb::AuthUserGrantRoleRequest {
                user: text("plain"),
                role: text("none"),
            }),
        )
        .fails(Code::FailedPrecondition, NO_ROLE),
        row(
            "user revoke role",
            Root,
            Call::UserRevokeRole(pb::AuthUserRevokeRoleRequest {
                name: text("plain"),
                role: text("none"),
            }),
        )
        .fails(Code::FailedPrecondition, "etcdserver: role is not granted to the user"),
        row("role add", Root, Call::RoleAdd(pb::AuthRoleAddRequest { name: text("added") })),
        row(
            "role delete",
            Root,
            Call::RoleDelete(pb::AuthRoleDeleteRequest { role: text("none") }),
        )
        .fails(Code::FailedPrecondition, NO_ROLE),
        row(
            "role grant permission",
            Root,
            Call::RoleGrantPermission(pb::AuthRoleGrantPermissionRequest {
                name: text("none"),
                perm: Some(Permission {
                    perm_type: Type::Read as i32,
                    key: "a".into(),
                    ..Default::default()
                }),
            }),
        )
        .fails(Code::FailedPrecondition, NO_ROLE),
        row(
            "role revoke permission",
            Root,
            Call::RoleRevokePermission(pb::AuthRoleRevokePermissionRequest {
                role: text("none"),
                key: "a".into(),
                ..Default::default()
            }),
        )
        .fails(Code::FailedPrecondition, NO_ROLE),
        // Root's ends the authentication: it is the last.
        row("auth disable", Root, Call::AuthDisable),
    ]
}

const OTHER: User = ("other", &[(Type::Read, "other", "")]);

/// Asks every row of every caller, and tells all answers that are not as they should be.
async fn check(kind: Kind, rows: Vec<Row>) {
    let (member, root) = secured(kind, &[("plain", &[]), GRANTED, OTHER]).await;
    for call in [
        Call::Put(put("read/1")),
        Call::Put(put("write/1")),
        Call::Put(put("both/1")),
        Call::Put(put("secret/1")),
        grant_lease(lease::FREE),
        grant_lease(lease::WRITABLE),
        put_leased("write/leased", lease::WRITABLE),
        grant_lease(lease::SECRET),
        put_leased("secret/leased", lease::SECRET),
        grant_lease(lease::READABLE),
        put_leased("read/leased", lease::READABLE),
    ] {
        root.call(&call).await.unwrap_or_else(|said| panic!("{kind:?}: {call:?}: {said:?}"));
    }
    let sessions = [
        Session::nobody(member.api()),
        Session::of(member.api(), "plain").await,
        Session::of(member.api(), "granted").await,
        root.clone(),
    ];
    let mut problems = Vec::new();
    for row in &rows {
        let reference = row.answers(row.need);
        let expected = match older(&row.name) {
            Some((older, reason)) if kind == Kind::Etcd => {
                let (name, expected) = (&row.name, older.answers(row));
                assert_ne!(expected, reference, "{name} is listed and does not differ: {reason}");
                expected
            }
            _ => reference,
        };
        for (caller, session) in sessions.iter().enumerate() {
            for call in &row.before {
                // What it ends may not be there.
                let prepared = root.call(call).await;
                let fails = matches!(&prepared, Err((code, _)) if *code != Code::NotFound);
                assert!(!fails, "{kind:?}: {}: {call:?}: {prepared:?}", row.name);
            }
            let answer = session.call(&row.call).await;
            if answer != expected[caller] {
                let (name, call) = (&row.name, &row.call);
                let (caller, expected) = (CALLERS[caller], &expected[caller]);
                problems.push(format!(
                    "{name} by {caller}: {answer:?} instead of {expected:?}\n    {call:?}"
                ));
            }
        }
        for call in &row.after {
            root.call(call).await.unwrap();
        }
    }
    assert!(problems.is_empty(), "{kind:?}:\n{}", problems.join("\n"));
}

#[tokio::test]
async fn of_keys() {
    for kind in subjects() {
        check(kind, keys()).await;
    }
}

#[tokio::test]
async fn of_leases() {
    for kind in subjects() {
        check(kind, leases()).await;
    }
}

#[tokio::test]
async fn of_the_cluster() {
    for kind in subjects() {
        check(kind, cluster()).await;
    }
}

#[tokio::test]
async fn of_users_and_roles() {
    for kind in subjects() {
        check(kind, users()).await;
    }
}

/// They are clients of the member that serves them, with the caller's credential.
#[tokio::test]
async fn of_locks_and_elections() {
    use Need::{Grant, Root};
    let locked = |name: &str| {
        Call::Lock(lock::LockRequest { name: name.to_string().into(), lease: lease::FREE })
    };
    let campaign = |name: &str| {
        Call::Campaign(election::CampaignRequest {
            name: name.to_string().into(),
            lease: lease::FREE,
            value: "v".into(),
        })
    };
    let leader =
        |name: &str| Call::Leader(election::LeaderRequest { name: name.to_string().into() });
    let held = |name: &str, rev| {
        let name: bytes::Bytes = name.to_string().into();
        let key = [&name[..], format!("/{:x}", lease::FREE).as_bytes()].concat();
        Some(election::LeaderKey { name, key: key.into(), rev, lease: lease::FREE })
    };
    for kind in subjects() {
        let unlock = |key: &str| Call::Unlock(lock::UnlockRequest { key: key.to_string().into() });
        let mut rows = vec![
            row("lock", Grant, locked("both/lock"))
                .before(vec![unlock(&format!("both/lock/{:x}", lease::FREE))]),
            row("lock of what may be written only", Root, locked("write/lock")),
            row("lock of a secret", Root, locked("secret/lock"))
                .after(vec![unlock(&format!("secret/lock/{:x}", lease::FREE))]),
            row("unlock", Grant, unlock("both/lock")),
            row("unlock of a secret", Root, unlock("secret/lock")),
            row("campaign", Grant, campaign("both/office")),
            row("leader", Grant, leader("both/office")),
            row("leader of a secret", Root, leader("secret/office"))
                .fails(Code::Unknown, "election: no leader"),
            row(
                "proclaim",
                Grant,
                Call::Proclaim(election::ProclaimRequest {
                    leader: held("both/office", 1),
                    value: "w".into(),
                }),
            )
            .fails(Code::Unknown, "election: not leader"),
            row(
                "resign of a secret",
                Root,
                Call::Resign(election::ResignRequest { leader: held("secret/office", 1) }),
            ),
        ];
        for row in &mut rows {
            // What their own calls are told is passed on as a text.
            row.refusal = Some(Code::Unknown);
        }
        check(kind, rows).await;
    }
}

/// Ranges at the borders of what is granted.
#[tokio::test]
async fn at_the_borders_of_intervals() {
    const GRANTS: [(&str, &str); 9] = [
        // These join.
        ("a", "c"),
        ("c", "e"),
        // These overlap.
        ("f", "h"),
        ("g", "j"),
        // One key, and what follows it without a gap.
        ("k", ""),
        ("p", ""),
        ("p\0", "q"),
        ("v", "x"),
        ("x", "\0"),
    ];
    const READS: [(Type, &str, &str); 9] = granted(GRANTS, Type::Read);
    const WRITES: [(Type, &str, &str); 9] = granted(GRANTS, Type::Write);
    const fn granted<const N: usize>(
        grants: [(&'static str, &'static str); N],
        kind: Type,
    ) -> [(Type, &'static str, &'static str); N] {
        let mut made = [(kind, "", ""); N];
        let mut i = 0;
        while i < N {
            made[i] = (kind, grants[i].0, grants[i].1);
            i += 1;
        }
        made
    }
    let cases: [(&str, &str, bool); 35] = [
        ("a", "", true),
        ("a\0", "", true),
        ("b", "", true),
        ("c", "", true),
        ("dzz", "", true),
        ("e", "", false),
        ("A", "", false),
        ("a", "c", true),
        ("a", "e", true),
        ("b", "d", true),
        ("a", "e\0", false),
        ("a", "f", false),
        ("Z", "b", false),
        ("a", "b", true),
        ("d", "f", false),
        ("f", "j", true),
        ("f", "k", false),
        ("e", "f", false),
        ("k", "", true),
        ("k\0", "", false),
        ("k", "k\0", true),
        ("k", "k\0\0", false),
        ("k", "l", false),
        ("p", "q", true),
        ("p\0", "q", true),
        ("p", "q\0", false),
        ("v", "\0", true),
        ("v", "zzz", true),
        ("x", "\0", true),
        ("z", "\0", true),
        ("zz", "", true),
        ("u", "\0", false),
        ("a", "\0", false),
        ("k", "\0", false),
        ("\0", "\0", false),
    ];
    for kind in subjects() {
        let users: [User; 2] = [("reader", &READS), ("writer", &WRITES)];
        let (member, _root) = secured(kind, &users).await;
        let reader = Session::of(member.api(), "reader").await;
        let writer = Session::of(member.api(), "writer").await;
        let mut problems = Vec::new();
        for (key, end, allowed) in cases {
            let expected = if allowed { Ok(()) } else { Err(denied()) };
            let within = op::range(span(key, end));
            let calls = [
                (&reader, Call::Range(span(key, end))),
                (&reader, Call::Watch(watch(key, end))),
                (&reader, Call::Txn(txn(vec![], vec![within]))),
                (
                    &reader,
                    Call::Txn(pb::TxnRequest {
                        compare: vec![compare(key, end)],
                        ..Default::default()
                    }),
                ),
                (&writer, Call::DeleteRange(delete(key, end))),
            ];
            for (session, call) in calls {
                let mut expected = expected.clone();
                // Until 3.4.46 a watch to the end of all keys passes as one of the key alone.
                let older_watch = kind == Kind::Etcd && matches!(call, Call::Watch(_));
                if older_watch && end == "\0" && ["a", "k"].contains(&key) {
                    expected = Ok(());
                }
                let answer = session.call(&call).await;
                if answer != expected {
                    problems.push(format!("{answer:?} instead of {expected:?} to {call:?}"));
                }
            }
            // Neither set is good for the other.
            assert_eq!(writer.call(&Call::Range(span(key, end))).await, Err(denied()), "{kind:?}");
            let delete = Call::DeleteRange(delete(key, end));
            assert_eq!(reader.call(&delete).await, Err(denied()), "{kind:?}");
        }
        assert!(problems.is_empty(), "{kind:?}:\n{}", problems.join("\n"));
    }
}
