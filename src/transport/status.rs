//! Errors as clients know them: etcd's codes and texts (v3-api section 4). Clients match on the text.

use tonic::{Code, Status};

use crate::actors::raft::RequestError;
use crate::core::apply::ApplyError;
use crate::core::auth::AuthError;
use crate::core::check::CheckError;
use crate::core::lease::LeaseError;
use crate::core::membership::MembershipError;
use crate::core::mvcc::ReadError;
use crate::core::mvcc::txn::TxnError;
use crate::core::reconfig::ReconfigError;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $code:ident $text:literal;)*) => {
        $(
            $(#[$doc])*
            pub fn $name() -> Status {
                Status::new(Code::$code, $text)
            }
        )*

        /// Code and text of every status here, for a test.
        #[cfg(test)]
        const ALL: &[(Code, &str)] = &[$((Code::$code, $text)),*];
    };
}

statuses! {
    empty_key = InvalidArgument "etcdserver: key is not provided";
    key_not_found = InvalidArgument "etcdserver: key not found";
    value_provided = InvalidArgument "etcdserver: value is provided";
    lease_provided = InvalidArgument "etcdserver: lease is provided";
    too_many_ops = InvalidArgument "etcdserver: too many operations in txn request";
    duplicate_key = InvalidArgument "etcdserver: duplicate key given in txn request";
    invalid_client_api_version = InvalidArgument "etcdserver: invalid client api version";
    invalid_sort_option = InvalidArgument "etcdserver: invalid sort option";
    compacted = OutOfRange "etcdserver: mvcc: required revision has been compacted";
    future_revision = OutOfRange "etcdserver: mvcc: required revision is a future revision";
    no_space = ResourceExhausted "etcdserver: mvcc: database space exceeded";
    lease_not_found = NotFound "etcdserver: requested lease not found";
    lease_exist = FailedPrecondition "etcdserver: lease already exists";
    lease_ttl_too_large = OutOfRange "etcdserver: too large lease TTL";
    watch_canceled = Cancelled "etcdserver: watch canceled";
    member_exist = FailedPrecondition "etcdserver: member ID already exist";
    peer_url_exist = FailedPrecondition "etcdserver: Peer URLs already exists";
    member_bad_urls = InvalidArgument "etcdserver: given member URLs are invalid";
    member_not_found = NotFound "etcdserver: member not found";
    member_not_learner = FailedPrecondition "etcdserver: can only promote a learner member";
    learner_not_ready = FailedPrecondition
        "etcdserver: can only promote a learner member which is in sync with leader";
    /// As [`too_many_requests`].
    member_not_enough_started = Unknown
        "etcdserver: re-configuration failed due to not enough started members";
    unhealthy = Unavailable "etcdserver: unhealthy cluster";
    too_many_learners = FailedPrecondition "etcdserver: too many learner members in cluster";
    request_too_large = InvalidArgument "etcdserver: request is too large";
    /// The server answers with the client's twin of this error, whose code is Unknown.
    too_many_requests = Unknown "etcdserver: too many requests";
    root_user_not_exist = FailedPrecondition "etcdserver: root user does not exist";
    root_role_not_exist = FailedPrecondition "etcdserver: root user does not have root role";
    user_already_exist = FailedPrecondition "etcdserver: user name already exists";
    user_empty = InvalidArgument "etcdserver: user name is empty";
    user_not_found = FailedPrecondition "etcdserver: user name not found";
    role_already_exist = FailedPrecondition "etcdserver: role name already exists";
    role_not_found = FailedPrecondition "etcdserver: role name not found";
    role_empty = InvalidArgument "etcdserver: role name is empty";
    role_not_granted = FailedPrecondition "etcdserver: role is not granted to the user";
    permission_not_given = InvalidArgument "etcdserver: permission not given";
    permission_not_granted = FailedPrecondition
        "etcdserver: permission is not granted to the role";
    invalid_auth_mgmt = InvalidArgument "etcdserver: invalid auth management";
    no_password_user = Unknown
        "auth: authentication failed, password was given for no password user";
    password_too_long = Unknown "bcrypt: password length exceeds 72 bytes";
    auth_failed = InvalidArgument
        "etcdserver: authentication failed, invalid user ID or password";
    permission_denied = PermissionDenied "etcdserver: permission denied";
    auth_old_revision = InvalidArgument "etcdserver: revision of auth store is old";
    invalid_auth_token = Unauthenticated "etcdserver: invalid auth token";
    verify_only = Unknown "auth: token signing attempted with verify-only key";
    auth_not_enabled = FailedPrecondition "etcdserver: authentication is not enabled";
    no_leader = Unavailable "etcdserver: no leader";
    not_leader = FailedPrecondition "etcdserver: not leader";
    leader_changed = Unavailable "etcdserver: leader changed";
    stopped = Unavailable "etcdserver: server stopped";
    timeout = Unavailable "etcdserver: request timed out";
    timeout_due_to_leader_fail = Unavailable
        "etcdserver: request timed out, possibly due to previous leader failure";
    timeout_due_to_connection_lost = Unavailable
        "etcdserver: request timed out, possibly due to connection lost";
    timeout_leader_transfer = Unknown
        "etcdserver: request timed out, leader transfer took too long";
    timeout_wait_applied_index =
        Unavailable "etcdserver: request timed out, waiting for the applied index took too long";
    corrupt = DataLoss "etcdserver: corrupt cluster";
    not_supported_for_learner = FailedPrecondition "etcdserver: rpc not supported for learner";
    bad_leader_transferee = FailedPrecondition "etcdserver: bad leader transferee";
    wrong_downgrade_version_format =
        InvalidArgument "etcdserver: wrong downgrade target version format";
    invalid_downgrade_target_version =
        InvalidArgument "etcdserver: invalid downgrade target version";
    cluster_version_unavailable =
        FailedPrecondition "etcdserver: cluster version not found during downgrade";
    canceled = Cancelled "etcdserver: request canceled";
    deadline_exceeded = DeadlineExceeded "context deadline exceeded";
    unknown_method = Unknown "etcdserver: unknown method";
    not_primary = Unknown "not a primary lessor";
    proposal_dropped = Unknown "raft proposal dropped";
}

/// An answer to what this version does not do yet.
pub fn not_supported_yet(what: &str) -> Status {
    Status::unimplemented(format!("not supported yet: {what}"))
}

/// The engine promises no more than to use free space again.
pub fn cannot_defragment(engine: &str) -> Status {
    Status::unimplemented(format!(
        "etcdserver: engine {engine} cannot give free space back to the file system, it is used again"
    ))
}

/// A failure of this member that the client cannot mend. The member is stopping over it.
fn internal(error: &dyn std::fmt::Display) -> Status {
    Status::unknown(error.to_string())
}

impl From<CheckError> for Status {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::EmptyKey => empty_key(),
            CheckError::InvalidSort => invalid_sort_option(),
            CheckError::ValueProvided => value_provided(),
            CheckError::LeaseProvided => lease_provided(),
            CheckError::TooManyOps => too_many_ops(),
            CheckError::DuplicateKey => duplicate_key(),
            CheckError::EmptyOp => key_not_found(),
        }
    }
}

impl From<ReadError> for Status {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Compacted { .. } | ReadError::Superseded(_) => compacted(),
            ReadError::Future { .. } => future_revision(),
            ReadError::Damaged(_) | ReadError::Storage(_) => internal(&error),
        }
    }
}

impl From<TxnError> for Status {
    fn from(error: TxnError) -> Self {
        match error {
            TxnError::LeaseNotFound(_) => lease_not_found(),
            TxnError::KeyNotFound => key_not_found(),
            TxnError::Read(error) => error.into(),
        }
    }
}

impl From<ApplyError> for Status {
    fn from(error: ApplyError) -> Self {
        match error {
            ApplyError::Compacted { .. } => compacted(),
            ApplyError::FutureRevision { .. } => future_revision(),
            ApplyError::KeyNotFound => key_not_found(),
            ApplyError::LeaseNotFound(_) | ApplyError::Lease(LeaseError::NotFound(_)) => {
                lease_not_found()
            }
            ApplyError::Lease(LeaseError::Exists(_)) => lease_exist(),
            ApplyError::Lease(LeaseError::TtlTooLarge { .. }) => lease_ttl_too_large(),
            ApplyError::NoSpace => no_space(),
            ApplyError::Corrupt => corrupt(),
            ApplyError::Auth(error) => error.into(),
            ApplyError::Membership(error) => match error {
                MembershipError::Removed(_) | MembershipError::NotFound(_) => member_not_found(),
                MembershipError::IdExists(_) => member_exist(),
                MembershipError::PeerUrlExists(_) => peer_url_exist(),
                MembershipError::NotLearner(_) => member_not_learner(),
                MembershipError::TooManyLearners(_) => too_many_learners(),
                MembershipError::Malformed(_) => internal(&error),
            },
            ApplyError::UnknownAlarmAction(_) => Status::invalid_argument(error.to_string()),
        }
    }
}

impl From<AuthError> for Status {
    fn from(error: AuthError) -> Self {
        match error {
            AuthError::NotEnabled => auth_not_enabled(),
            AuthError::RootUserNotExist => root_user_not_exist(),
            AuthError::RootRoleNotExist => root_role_not_exist(),
            AuthError::UserEmpty => user_empty(),
            AuthError::UserAlreadyExist => user_already_exist(),
            AuthError::UserNotFound => user_not_found(),
            AuthError::NoPasswordUser => no_password_user(),
            AuthError::RoleEmpty => role_empty(),
            AuthError::RoleAlreadyExist => role_already_exist(),
            AuthError::RoleNotFound => role_not_found(),
            AuthError::RoleNotGranted => role_not_granted(),
            AuthError::PermissionNotGiven => permission_not_given(),
            AuthError::PermissionNotGranted => permission_not_granted(),
            AuthError::InvalidManagement => invalid_auth_mgmt(),
            AuthError::AuthFailed => auth_failed(),
            AuthError::PermissionDenied => permission_denied(),
            AuthError::OldRevision => auth_old_revision(),
        }
    }
}

impl From<ReconfigError> for Status {
    fn from(error: ReconfigError) -> Self {
        match error {
            ReconfigError::NotEnoughStarted => member_not_enough_started(),
            ReconfigError::Unhealthy => unhealthy(),
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Apply(error) => error.into(),
            RequestError::OverQuota => no_space(),
            RequestError::Transferring => proposal_dropped(),
            RequestError::LeaderChanged => leader_changed(),
            RequestError::NoLeader => deadline_exceeded(),
            RequestError::TimedOut => timeout(),
            RequestError::LeaderFailed => timeout_due_to_leader_fail(),
            RequestError::ConnectionLost => timeout_due_to_connection_lost(),
            RequestError::NotApplied => timeout_wait_applied_index(),
            RequestError::TooManyRequests => too_many_requests(),
            RequestError::TooLarge => request_too_large(),
            RequestError::Stopped => stopped(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_distinct_and_begin_as_clients_expect() {
        let mut seen = std::collections::HashSet::new();
        for (code, text) in ALL {
            assert!(seen.insert(text), "{text} twice");
            assert!(*code != Code::Ok);
            let plain = [
                "context deadline exceeded",
                "not a primary lessor",
                "raft proposal dropped",
                "auth: authentication failed, password was given for no password user",
                "bcrypt: password length exceeds 72 bytes",
                "auth: token signing attempted with verify-only key",
            ];
            assert!(text.starts_with("etcdserver: ") || plain.contains(text), "{text}");
        }
    }
}
