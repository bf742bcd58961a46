//! A client of one member: every call has a deadline.

use std::error::Error;
use std::future::Future;
use std::time::Duration;

use quorate_proto::KeyValue;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::cluster_client::ClusterClient;
use quorate_proto::etcdserverpb::kv_client::KvClient;
use quorate_proto::etcdserverpb::lease_client::LeaseClient;
use quorate_proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate_proto::etcdserverpb::watch_client::WatchClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, ConnectError, Response, Status, Streaming};

use super::secure::Connector;

/// All services of one member.
#[derive(Clone)]
pub struct Client {
    pub kv: KvClient<Channel>,
    pub watch: WatchClient<Channel>,
    pub cluster: ClusterClient<Channel>,
    pub lease: LeaseClient<Channel>,
    pub maintenance: MaintenanceClient<Channel>,
    /// How long a call may take.
    pub deadline: Duration,
}

/// A watch stream; it ends when the sender is dropped.
pub struct Watching {
    pub requests: mpsc::Sender<pb::WatchRequest>,
    pub responses: Streaming<pb::WatchResponse>,
}

impl Client {
    /// Connects when it is used first, with TLS if there is a `connector` for that. Must be called inside
    /// of a runtime.
    pub fn new(port: u16, deadline: Duration, connector: Option<Connector>) -> Client {
        // What is in the URL does not decide about TLS: the connector does.
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
        let endpoint = endpoint.connect_timeout(Duration::from_secs(2));
        let channel = match connector {
            Some(connector) => endpoint.connect_with_connector_lazy(connector),
            None => endpoint.connect_lazy(),
        };
        let max = usize::MAX;
        Client {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(max),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(max),
            cluster: ClusterClient::new(channel.clone()),
            lease: LeaseClient::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel),
            deadline,
        }
    }

    /// The answer to `call` within the deadline.
    async fn within<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(answered) => Ok(answered?.into_inner()),
            Err(_) => Err(Status::deadline_exceeded("the client has given up")),
        }
    }

    pub async fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, Status> {
        self.within(self.kv.clone().range(request)).await
    }

    pub async fn put_request(&self, request: pb::PutRequest) -> Result<pb::PutResponse, Status> {
        self.within(self.kv.clone().put(request)).await
    }

    pub async fn delete_range(
        &self,
        request: pb::DeleteRangeRequest,
    ) -> Result<pb::DeleteRangeResponse, Status> {
        self.within(self.kv.clone().delete_range(request)).await
    }

    pub async fn txn(&self, request: pb::TxnRequest) -> Result<pb::TxnResponse, Status> {
        self.within(self.kv.clone().txn(request)).await
    }

    /// The revision of the put.
    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<i64, Status> {
        let (key, value) = (key.as_bytes().to_vec().into(), value.into().into());
        let response =
            self.put_request(pb::PutRequest { key, value, ..Default::default() }).await?;
        Ok(revision(&response.header))
    }

    /// A key as it is now.
    pub async fn get(&self, key: &str) -> Result<Option<KeyValue>, Status> {
        let key = key.as_bytes().to_vec().into();
        let response = self.range(pb::RangeRequest { key, ..Default::default() }).await?;
        Ok(response.kvs.first().map(|kv| kv.parse().expect("a key is a message")))
    }

    /// The store's revision, by a linearizable read.
    pub async fn revision(&self) -> Result<i64, Status> {
        let request = pb::RangeRequest { key: "?".into(), ..Default::default() };
        Ok(revision(&self.range(request).await?.header))
    }

    /// What this member has applied.
    pub async fn local_revision(&self) -> Result<i64, Status> {
        let request =
            pb::RangeRequest { key: "?".into(), serializable: true, ..Default::default() };
        Ok(revision(&self.range(request).await?.header))
    }

    pub async fn status(&self) -> Result<pb::StatusResponse, Status> {
        self.within(self.maintenance.clone().status(pb::StatusRequest {})).await
    }

    pub async fn hash_kv(&self, revision: i64) -> Result<pb::HashKvResponse, Status> {
        self.within(self.maintenance.clone().hash_kv(pb::HashKvRequest { revision })).await
    }

    pub async fn compact(&self, revision: i64) -> Result<(), Status> {
        let request = pb::CompactionRequest { revision, physical: false };
        self.within(self.kv.clone().compact(request)).await.map(|_| ())
    }

    /// Hands leadership to the member `target`; only the leader does.
    pub async fn move_leader(&self, target: u64) -> Result<(), Status> {
        let request = pb::MoveLeaderRequest { target_id: target };
        self.within(self.maintenance.clone().move_leader(request)).await.map(|_| ())
    }

    /// The alarms in force.
    pub async fn alarms(&self) -> Result<Vec<pb::AlarmMember>, Status> {
        // Of any member and kind.
        self.alarm(pb::alarm_request::AlarmAction::Get, pb::AlarmMember::default()).await
    }

    /// Clears an alarm; answers it if it was in force.
    pub async fn disarm(&self, alarm: pb::AlarmMember) -> Result<Vec<pb::AlarmMember>, Status> {
        self.alarm(pb::alarm_request::AlarmAction::Deactivate, alarm).await
    }

    async fn alarm(
        &self,
        action: pb::alarm_request::AlarmAction,
        of: pb::AlarmMember,
    ) -> Result<Vec<pb::AlarmMember>, Status> {
        let request =
            pb::AlarmRequest { action: action as i32, member_id: of.member_id, alarm: of.alarm };
        Ok(self.within(self.maintenance.clone().alarm(request)).await?.alarms)
    }

    pub async fn members(&self) -> Result<Vec<pb::Member>, Status> {
        // The field that asks for a linearizable answer is unknown to older servers, which answer alike.
        let request = pb::MemberListRequest { linearizable: true };
        Ok(self.within(self.cluster.clone().member_list(request)).await?.members)
    }

    pub async fn member_add(&self, peer_url: &str, learner: bool) -> Result<pb::Member, Status> {
        let request =
            pb::MemberAddRequest { peer_ur_ls: vec![peer_url.to_string()], is_learner: learner };
        let response = self.within(self.cluster.clone().member_add(request)).await?;
        response.member.ok_or_else(|| Status::internal("no member in the answer"))
    }

    pub async fn member_remove(&self, id: u64) -> Result<(), Status> {
        let request = pb::MemberRemoveRequest { id };
        self.within(self.cluster.clone().member_remove(request)).await.map(|_| ())
    }

    pub async fn member_promote(&self, id: u64) -> Result<(), Status> {
        let request = pb::MemberPromoteRequest { id };
        self.within(self.cluster.clone().member_promote(request)).await.map(|_| ())
    }

    /// Watches all keys from revision `from` on, with the pairs that they replace.
    pub async fn watch_all(&self, from: i64) -> Result<Watching, Status> {
        let create = pb::WatchCreateRequest {
            key: vec![0].into(),
            range_end: vec![0].into(),
            start_revision: from,
            prev_kv: true,
            ..Default::default()
        };
        let create = pb::watch_request::RequestUnion::CreateRequest(create);
        let (requests, receiver) = mpsc::channel(4);
        let created = pb::WatchRequest { request_union: Some(create) };
        requests.try_send(created).expect("an empty channel has room");
        let call = self.watch.clone();
        let opening = async move { call.clone().watch(ReceiverStream::new(receiver)).await };
        let mut responses = self.within(opening).await?;
        let first = match tokio::time::timeout(self.deadline, responses.message()).await {
            Ok(first) => first?,
            Err(_) => return Err(Status::deadline_exceeded("the watch is not created")),
        };
        match first {
            Some(first) if first.created && !first.canceled => Ok(Watching { requests, responses }),
            other => Err(Status::unavailable(format!("the watch was not created: {other:?}"))),
        }
    }
}

/// The revision of a header.
pub fn revision(header: &Option<pb::ResponseHeader>) -> i64 {
    header.as_ref().expect("a response has a header").revision
}

/// Whether an error proves that the request had no effect and never will have one. All others leave
/// open whether it happened, or happens yet: an answer that was lost, a deadline, a leader that fell, a
/// member that stopped.
pub fn certainly_failed(status: &Status) -> bool {
    // No connection: nothing was sent.
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    match (status.code(), status.message()) {
        // Refused by the member that was asked, before it proposed anything: it lags, ...
        (Code::ResourceExhausted, "etcdserver: too many requests") => true,
        // ... or the request is none that it takes.
        (Code::InvalidArgument, "etcdserver: request is too large") => true,
        (Code::InvalidArgument, "etcdserver: duplicate key given in txn request") => true,
        (Code::InvalidArgument, "etcdserver: too many operations in txn request") => true,
        (Code::InvalidArgument, "etcdserver: key is not provided") => true,
        // It is a learner, which answers no writes and no linearizable reads.
        (Code::Unavailable | Code::FailedPrecondition, text) => {
            text == "etcdserver: rpc not supported for learner"
        }
        _ => false,
    }
}
