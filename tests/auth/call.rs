//! Every call of the API as data, so that a table can say what becomes of it.

use quorate_proto::etcdserverpb as pb;
use quorate_proto::health::HealthCheckRequest;
use quorate_proto::{v3electionpb as election, v3lockpb as lock};
use tonic::Streaming;

use crate::login::Session;
use crate::server::{PATIENCE, Said, said};

#[derive(Clone, Debug)]
pub enum Call {
    Range(pb::RangeRequest),
    RangeStream(pb::RangeRequest),
    Put(pb::PutRequest),
    DeleteRange(pb::DeleteRangeRequest),
    Txn(pb::TxnRequest),
    Compact(pb::CompactionRequest),
    /// A refused one is answered within the stream: the reason is the answer here.
    Watch(pb::WatchCreateRequest),
    LeaseGrant(pb::LeaseGrantRequest),
    LeaseRevoke(pb::LeaseRevokeRequest),
    LeaseKeepAlive(pb::LeaseKeepAliveRequest),
    LeaseTimeToLive(pb::LeaseTimeToLiveRequest),
    LeaseLeases,
    MemberAdd(pb::MemberAddRequest),
    MemberRemove(pb::MemberRemoveRequest),
    MemberUpdate(pb::MemberUpdateRequest),
    MemberPromote(pb::MemberPromoteRequest),
    MemberList(pb::MemberListRequest),
    Alarm(pb::AlarmRequest),
    Status,
    Defragment,
    Hash,
    HashKv(pb::HashKvRequest),
    Snapshot,
    MoveLeader(pb::MoveLeaderRequest),
    Downgrade(pb::DowngradeRequest),
    AuthEnable,
    AuthDisable,
    AuthStatus,
    Authenticate(pb::AuthenticateRequest),
    UserAdd(pb::AuthUserAddRequest),
    UserGet(pb::AuthUserGetRequest),
    UserList,
    UserDelete(pb::AuthUserDeleteRequest),
    UserChangePassword(pb::AuthUserChangePasswordRequest),
    UserGrantRole(pb::AuthUserGrantRoleRequest),
    UserRevokeRole(pb::AuthUserRevokeRoleRequest),
    RoleAdd(pb::AuthRoleAddRequest),
    RoleGet(pb::AuthRoleGetRequest),
    RoleList,
    RoleDelete(pb::AuthRoleDeleteRequest),
    RoleGrantPermission(pb::AuthRoleGrantPermissionRequest),
    RoleRevokePermission(pb::AuthRoleRevokePermissionRequest),
    Health,
    Lock(lock::LockRequest),
    Unlock(lock::UnlockRequest),
    Campaign(election::CampaignRequest),
    Proclaim(election::ProclaimRequest),
    Leader(election::LeaderRequest),
    Resign(election::ResignRequest),
}

/// Every message of a stream is read, or its error.
async fn drain<T>(mut stream: Streaming<T>) -> Result<(), tonic::Status> {
    while stream.message().await?.is_some() {}
    Ok(())
}

impl Session {
    /// What becomes of a call.
    pub async fn call(&self, call: &Call) -> Result<(), Said> {
        match tokio::time::timeout(PATIENCE, self.called(call.clone())).await {
            Ok(outcome) => outcome,
            Err(_) => panic!("no answer in {PATIENCE:?} to {call:?}"),
        }
    }

    async fn called(&self, call: Call) -> Result<(), Said> {
        let Api { mut kv, mut lease, mut cluster, mut maintenance, mut auth, mut health, .. } =
            self.api.clone();
        let channel = &self.api.channel;
        let mut locks = lock::lock_client::LockClient::new(channel.clone());
        let mut elections = election::election_client::ElectionClient::new(channel.clone());
        let answered = match call {
            Call::Range(r) => kv.range(self.ask(r)).await.map(drop),
            Call::RangeStream(r) => match kv.range_stream(self.ask(r)).await {
                Ok(stream) => drain(stream.into_inner()).await,
                Err(status) => Err(status),
            },
            Call::Put(r) => kv.put(self.ask(r)).await.map(drop),
            Call::DeleteRange(r) => kv.delete_range(self.ask(r)).await.map(drop),
            Call::Txn(r) => kv.txn(self.ask(r)).await.map(drop),
            Call::Compact(r) => kv.compact(self.ask(r)).await.map(drop),
            Call::Watch(r) => return self.watched(r).await,
            Call::LeaseGrant(r) => lease.lease_grant(self.ask(r)).await.map(drop),
            Call::LeaseRevoke(r) => lease.lease_revoke(self.ask(r)).await.map(drop),
            Call::LeaseKeepAlive(r) => {
                match lease.lease_keep_alive(self.ask(tokio_stream::iter([r]))).await {
                    Ok(stream) => drain(stream.into_inner()).await,
                    Err(status) => Err(status),
                }
            }
            Call::LeaseTimeToLive(r) => lease.lease_time_to_live(self.ask(r)).await.map(drop),
            Call::LeaseLeases => {
                lease.lease_leases(self.ask(pb::LeaseLeasesRequest {})).await.map(drop)
            }
            Call::MemberAdd(r) => cluster.member_add(self.ask(r)).await.map(drop),
            Call::MemberRemove(r) => cluster.member_remove(self.ask(r)).await.map(drop),
            Call::MemberUpdate(r) => cluster.member_update(self.ask(r)).await.map(drop),
            Call::MemberPromote(r) => cluster.member_promote(self.ask(r)).await.map(drop),
            Call::MemberList(r) => cluster.member_list(self.ask(r)).await.map(drop),
            Call::Alarm(r) => maintenance.alarm(self.ask(r)).await.map(drop),
            Call::Status => maintenance.status(self.ask(pb::StatusRequest {})).await.map(drop),
            Call::Defragment => {
                maintenance.defragment(self.ask(pb::DefragmentRequest {})).await.map(drop)
            }
            Call::Hash => maintenance.hash(self.ask(pb::HashRequest {})).await.map(drop),
            Call::HashKv(r) => maintenance.hash_kv(self.ask(r)).await.map(drop),
            Call::Snapshot => match maintenance.snapshot(self.ask(pb::SnapshotRequest {})).await {
                Ok(stream) => drain(stream.into_inner()).await,
                Err(status) => Err(status),
            },
            Call::MoveLeader(r) => maintenance.move_leader(self.ask(r)).await.map(drop),
            Call::Downgrade(r) => maintenance.downgrade(self.ask(r)).await.map(drop),
            Call::AuthEnable => return self.enable().await,
            Call::AuthDisable => return self.disable().await,
            Call::AuthStatus => {
                auth.auth_status(self.ask(pb::AuthStatusRequest {})).await.map(drop)
            }
            Call::Authenticate(r) => auth.authenticate(self.ask(r)).await.map(drop),
            Call::UserAdd(r) => auth.user_add(self.ask(r)).await.map(drop),
            Call::UserGet(r) => auth.user_get(self.ask(r)).await.map(drop),
            Call::UserList => auth.user_list(self.ask(pb::AuthUserListRequest {})).await.map(drop),
            Call::UserDelete(r) => auth.user_delete(self.ask(r)).await.map(drop),
            Call::UserChangePassword(r) => auth.user_change_password(self.ask(r)).await.map(drop),
            Call::UserGrantRole(r) => auth.user_grant_role(self.ask(r)).await.map(drop),
            Call::UserRevokeRole(r) => auth.user_revoke_role(self.ask(r)).await.map(drop),
            Call::RoleAdd(r) => auth.role_add(self.ask(r)).await.map(drop),
            Call::RoleGet(r) => auth.role_get(self.ask(r)).await.map(drop),
            Call::RoleList => auth.role_list(self.ask(pb::AuthRoleListRequest {})).await.map(drop),
            Call::RoleDelete(r) => auth.role_delete(self.ask(r)).await.map(drop),
            Call::RoleGrantPermission(r) => auth.role_grant_permission(self.ask(r)).await.map(drop),
            Call::RoleRevokePermission(r) => {
                auth.role_revoke_permission(self.ask(r)).await.map(drop)
            }
            Call::Health => health.check(self.ask(HealthCheckRequest::default())).await.map(drop),
            Call::Lock(r) => locks.lock(self.ask(r)).await.map(drop),
            Call::Unlock(r) => locks.unlock(self.ask(r)).await.map(drop),
            Call::Campaign(r) => elections.campaign(self.ask(r)).await.map(drop),
            Call::Proclaim(r) => elections.proclaim(self.ask(r)).await.map(drop),
            Call::Leader(r) => elections.leader(self.ask(r)).await.map(drop),
            Call::Resign(r) => elections.resign(self.ask(r)).await.map(drop),
        };
        answered.map_err(said)
    }

    /// Creates a watcher; the reason of a refusal comes as the error that it is the text of.
    async fn watched(&self, create: pb::WatchCreateRequest) -> Result<(), Said> {
        let metadata = self.ask(()).metadata().clone();
        let mut watching = self.api.watching_with(metadata);
        let reply = watching.created(create).await;
        if !reply.canceled {
            return Ok(());
        }
        assert_eq!(reply.watch_id, -1, "{reply:?}");
        // The text names the code as Go prints it.
        let text = reply.cancel_reason;
        let told =
            text.strip_prefix("rpc error: code = ").and_then(|rest| rest.split_once(" desc = "));
        let (code, text) = told.unwrap_or_else(|| panic!("{text} is no status"));
        let code = match code {
            "PermissionDenied" => tonic::Code::PermissionDenied,
            "InvalidArgument" => tonic::Code::InvalidArgument,
            "Unauthenticated" => tonic::Code::Unauthenticated,
            other => panic!("{other} is no code of a refusal"),
        };
        Err((code, text.to_string()))
    }
}

use crate::server::Api;
