//! The running member as the plain HTTP pages see it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use quorate_proto::etcdserverpb::{AlarmType, RangeRequest};

use super::status::{Member as Subject, ReadFuture};
use crate::core::types::MemberId;
use crate::transport::member::Member;

/// Answers the questions of [`Subject`] from a running member.
pub struct HttpMember(pub Arc<Member>);

impl Subject for HttpMember {
    fn server_version(&self) -> String {
        crate::cli::ETCD_VERSION.to_string()
    }

    fn cluster_version(&self) -> Option<String> {
        self.0.now().members.cluster_version.map(|version| version.to_string())
    }

    fn storage_version(&self) -> Option<String> {
        self.cluster_version()
    }

    fn alarms(&self) -> Vec<AlarmType> {
        let now = self.0.now();
        now.alarms.list(0).into_iter().map(|alarm| alarm.alarm()).collect()
    }

    fn leader(&self) -> Option<MemberId> {
        self.0.shared.leader()
    }

    fn is_learner(&self) -> bool {
        self.0.now().members.is_learner()
    }

    fn auth_enabled(&self) -> bool {
        self.0.now().auth.enabled()
    }

    fn read(&self, serializable: bool) -> ReadFuture {
        let member = self.0.clone();
        Box::pin(async move {
            if !serializable {
                let round = member.read_index().await;
                round.map_err(|error| tonic::Status::from(error).message().to_string())?;
            }
            let request = RangeRequest {
                key: "health".into(),
                limit: 1,
                keys_only: true,
                ..Default::default()
            };
            // Health is asked for by nobody in particular.
            let read = member.read_own(|now, values| now.store.range(values, &request));
            read.map(|_| ()).map_err(|error| tonic::Status::from(error).message().to_string())
        })
    }

    fn raft_status(&self) -> serde_json::Value {
        let shared = &self.0.shared;
        let leading = shared.raft.leading.load(Ordering::Acquire);
        serde_json::json!({
            "id": shared.member_id.to_string(),
            "term": shared.raft.term.load(Ordering::Acquire),
            "commit": shared.raft.committed.load(Ordering::Acquire),
            "lead": shared.leader().unwrap_or_default().to_string(),
            "raftState": if leading { "StateLeader" } else { "StateFollower" },
            "applied": shared.published.load().applied.0,
            "progress": {},
            "leadtransferee": "0",
        })
    }

    fn cmdline(&self) -> Vec<String> {
        std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect()
    }
}
