//! Which path is which method (v3-api 8.1).

use axum::response::Response;
use quorate_proto::etcdserverpb::auth_server::Auth;
use quorate_proto::etcdserverpb::cluster_server::Cluster;
use quorate_proto::etcdserverpb::kv_server::Kv;
use quorate_proto::etcdserverpb::lease_server::Lease;
use quorate_proto::etcdserverpb::maintenance_server::Maintenance;
use quorate_proto::etcdserverpb::watch_server::Watch;
use quorate_proto::v3electionpb::election_server::Election;
use quorate_proto::v3lockpb::lock_server::Lock;

use super::{Call, Gateway, reply};
use crate::transport::grpc;

impl Gateway {
    fn kv(&self) -> grpc::kv::Kv {
        grpc::kv::Kv(self.member.clone())
    }

    fn watch(&self) -> grpc::watch::Watch {
        grpc::watch::Watch(self.member.clone())
    }

    fn lease(&self) -> grpc::lease::Lease {
        grpc::lease::Lease(self.member.clone())
    }

    fn cluster(&self) -> grpc::cluster::Cluster {
        grpc::cluster::Cluster(self.member.clone())
    }

    fn maintenance(&self) -> grpc::maintenance::Maintenance {
        self.maintenance.clone()
    }

    fn auth(&self) -> grpc::auth::Auth {
        grpc::auth::Auth(self.member.clone())
    }

    fn lock(&self) -> grpc::lock::Lock {
        grpc::lock::Lock(self.member.clone())
    }

    fn election(&self) -> grpc::election::Election {
        grpc::election::Election(self.member.clone())
    }
}

/// One request, one reply; one request, many replies; many requests, many replies.
macro_rules! run {
    (single $gateway:ident $call:ident $service:ident $method:path) => {
        match $call.single().await {
            Ok((request, mut gone)) => {
                reply::single(gone.unless($method(&$gateway.$service(), request)).await)
            }
            Err(status) => reply::refused(&status),
        }
    };
    (replies $gateway:ident $call:ident $service:ident $method:path) => {
        match $call.single().await {
            Ok((request, gone)) => {
                reply::stream($method(&$gateway.$service(), request), gone).await
            }
            Err(status) => reply::refused(&status),
        }
    };
    (both $gateway:ident $call:ident $service:ident $method:path) => {
        match $call.stream().await {
            Ok((requests, gone)) => {
                reply::stream($method(&$gateway.$service(), requests), gone).await
            }
            Err(status) => reply::refused(&status),
        }
    };
}

macro_rules! routes {
    ($($route:ident: $($path:literal)|+ => $kind:ident $service:ident $method:path;)*) => {
        /// A method that has paths.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Route {
            $($route),*
        }

        impl Route {
            /// The method of a path, which is what comes after `/v3/`.
            pub fn of(path: &str) -> Option<Route> {
                match path {
                    $($($path)|+ => Some(Route::$route),)*
                    _ => None,
                }
            }

            /// Reads the request, calls the service, and answers what it answers.
            pub(super) async fn run(self, gateway: &Gateway, call: Call) -> Response {
                match self {
                    $(Route::$route => run!($kind gateway call $service $method),)*
                }
            }
        }
    };
}

routes! {
    Range: "kv/range" => single kv Kv::range;
    Put: "kv/put" => single kv Kv::put;
    DeleteRange: "kv/deleterange" => single kv Kv::delete_range;
    Txn: "kv/txn" => single kv Kv::txn;
    Compact: "kv/compaction" => single kv Kv::compact;

    Watch: "watch" => both watch Watch::watch;

    LeaseGrant: "lease/grant" => single lease Lease::lease_grant;
    LeaseRevoke: "lease/revoke" | "kv/lease/revoke" => single lease Lease::lease_revoke;
    LeaseKeepAlive: "lease/keepalive" => both lease Lease::lease_keep_alive;
    LeaseTimeToLive: "lease/timetolive" | "kv/lease/timetolive"
        => single lease Lease::lease_time_to_live;
    LeaseLeases: "lease/leases" | "kv/lease/leases" => single lease Lease::lease_leases;

    MemberAdd: "cluster/member/add" => single cluster Cluster::member_add;
    MemberRemove: "cluster/member/remove" => single cluster Cluster::member_remove;
    MemberUpdate: "cluster/member/update" => single cluster Cluster::member_update;
    MemberList: "cluster/member/list" => single cluster Cluster::member_list;
    MemberPromote: "cluster/member/promote" => single cluster Cluster::member_promote;

    Alarm: "maintenance/alarm" => single maintenance Maintenance::alarm;
    Status: "maintenance/status" => single maintenance Maintenance::status;
    Defragment: "maintenance/defragment" => single maintenance Maintenance::defragment;
    Hash: "maintenance/hash" => single maintenance Maintenance::hash;
    HashKv: "maintenance/hashkv" => single maintenance Maintenance::hash_kv;
    Snapshot: "maintenance/snapshot" => replies maintenance Maintenance::snapshot;
    MoveLeader: "maintenance/transfer-leadership" => single maintenance Maintenance::move_leader;
    Downgrade: "maintenance/downgrade" => single maintenance Maintenance::downgrade;

    AuthEnable: "auth/enable" => single auth Auth::auth_enable;
    AuthDisable: "auth/disable" => single auth Auth::auth_disable;
    AuthStatus: "auth/status" => single auth Auth::auth_status;
    Authenticate: "auth/authenticate" => single auth Auth::authenticate;
    UserAdd: "auth/user/add" => single auth Auth::user_add;
    UserGet: "auth/user/get" => single auth Auth::user_get;
    UserList: "auth/user/list" => single auth Auth::user_list;
    UserDelete: "auth/user/delete" => single auth Auth::user_delete;
    UserChangePassword: "auth/user/changepw" => single auth Auth::user_change_password;
    UserGrantRole: "auth/user/grant" => single auth Auth::user_grant_role;
    UserRevokeRole: "auth/user/revoke" => single auth Auth::user_revoke_role;
    RoleAdd: "auth/role/add" => single auth Auth::role_add;
    RoleGet: "auth/role/get" => single auth Auth::role_get;
    RoleList: "auth/role/list" => single auth Auth::role_list;
    RoleDelete: "auth/role/delete" => single auth Auth::role_delete;
    RoleGrantPermission: "auth/role/grant" => single auth Auth::role_grant_permission;
    RoleRevokePermission: "auth/role/revoke" => single auth Auth::role_revoke_permission;

    Lock: "lock/lock" => single lock Lock::lock;
    Unlock: "lock/unlock" => single lock Lock::unlock;

    Campaign: "election/campaign" => single election Election::campaign;
    Proclaim: "election/proclaim" => single election Election::proclaim;
    Leader: "election/leader" => single election Election::leader;
    Observe: "election/observe" => replies election Election::observe;
    Resign: "election/resign" => single election Election::resign;
}
