//! What locks and elections share (v3-api 3.13): a queue of keys below a name.
//!
//! ```text
//! name/1f  create revision 10   at the head: holds the lock, leads
//! name/2a  create revision 12   waits until name/1f is deleted
//! name/07  create revision 15   waits until name/2a is deleted
//! ```
//!
//! Each contender has a key of its own, named by its lease and gone with it; their order is that of
//! their create revisions. One that waits watches the key just before its own, so that the end of one
//! wakes one, and looks at the queue again when that key is gone: whoever is before it then is waited
//! for in turn. It is at the head only if the same read that finds nobody before it still finds its own
//! key, so a lease that ran out meanwhile is noticed.
//!
//! All of it is done as a client would do it: by the calls of this member's own services, with what the
//! client's call says of who asks. Permissions, quotas and limits are those of these services.
//!
//! A call that ends before it is answered, because its client has left, its deadline has passed or it
//! failed, takes its key out of the queue again, in the background: see [`Contender`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use quorate_proto::etcdserverpb::request_op::Request as Op;
use quorate_proto::etcdserverpb::response_op::Response as OpReply;
use quorate_proto::etcdserverpb::watch_create_request::FilterType;
use quorate_proto::etcdserverpb::watch_request::RequestUnion;
use quorate_proto::{KeyValue, KeyValueBytes};
use tonic::metadata::MetadataMap;
use tonic::{Code, Extensions, Request, Response, Status};

use crate::transport::grpc::{Reply, Step, kv, lease, watch};
use crate::transport::member::Member;
use crate::transport::status;

/// Seconds that a lease lives which was granted for a caller that brought none. It is not renewed.
const SESSION_TTL: i64 = 60;
/// The pause before a read that found no leader, or too much to do, is tried again.
const READ_AGAIN: Duration = Duration::from_millis(25);
/// The same for what is done in the background.
const WITHDRAW_AGAIN: Duration = Duration::from_millis(100);

/// An error as the client is told: these services know those of others only by their text, so their
/// codes are lost on the way (v3-api 3.13).
pub fn told(status: Status) -> Status {
    if status.message().starts_with("etcdserver: ") {
        Status::unknown(status.message())
    } else {
        status
    }
}

/// Whether what was refused so may well succeed a moment later.
fn passes(status: &Status) -> bool {
    let of = |other: Status| status.message() == other.message();
    match status.code() {
        Code::Unavailable => !of(status::stopped()),
        // Of this member's own making: no leader was found in time.
        Code::DeadlineExceeded => true,
        Code::Unknown => of(status::too_many_requests()) || of(status::proposal_dropped()),
        _ => false,
    }
}

/// The keys below a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    prefix: Bytes,
    /// The first key that does not begin with the prefix.
    end: Bytes,
}

impl Queue {
    /// The queue of a name.
    pub fn of(name: &[u8]) -> Queue {
        // The byte after the slash is the zero.
        Queue { prefix: [name, b"/"].concat().into(), end: [name, b"0"].concat().into() }
    }

    /// The key of whoever contends with a lease.
    fn key(&self, lease: i64) -> Bytes {
        let sign = if lease < 0 { "-" } else { "" };
        [&self.prefix[..], format!("{sign}{:x}", lease.unsigned_abs()).as_bytes()].concat().into()
    }

    fn by_creation(&self, order: SortOrder, limit: i64) -> pb::RangeRequest {
        pb::RangeRequest {
            key: self.prefix.clone(),
            range_end: self.end.clone(),
            limit,
            sort_order: order as i32,
            sort_target: SortTarget::Create as i32,
            ..Default::default()
        }
    }

    /// The head of the queue.
    pub fn head(&self) -> pb::RangeRequest {
        self.by_creation(SortOrder::Ascend, 1)
    }

    /// The last that was created before `revision`.
    fn before(&self, revision: i64) -> pb::RangeRequest {
        pb::RangeRequest {
            max_create_revision: revision - 1,
            keys_only: true,
            ..self.by_creation(SortOrder::Descend, 1)
        }
    }
}

fn get(key: &Bytes) -> pb::RangeRequest {
    pb::RangeRequest { key: key.clone(), ..Default::default() }
}

fn op(request: Op) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

/// True for a key that was created at `revision`; 0 is for one that is not there.
fn created_at(key: &Bytes, revision: i64) -> pb::Compare {
    pb::Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Create as i32,
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        ..Default::default()
    }
}

/// A pair that this member has answered with.
///
/// # Errors
/// If it is none.
pub fn parse(raw: &KeyValueBytes) -> Result<KeyValue, Status> {
    raw.parse().map_err(|error| Status::internal(error.to_string()))
}

/// The first key of a range in a transaction's reply.
fn first_of(reply: Option<&pb::ResponseOp>) -> Result<Option<KeyValue>, Status> {
    kvs_of(reply).first().map(parse).transpose()
}

fn kvs_of(reply: Option<&pb::ResponseOp>) -> &[KeyValueBytes] {
    match reply.and_then(|reply| reply.response.as_ref()) {
        Some(OpReply::ResponseRange(range)) => &range.kvs,
        _ => &[],
    }
}

fn revision(header: &Option<pb::ResponseHeader>) -> i64 {
    header.as_ref().map_or(0, |header| header.revision)
}

/// Who has called, and where: makes the calls that theirs consists of.
#[derive(Clone)]
pub struct Caller {
    member: Arc<Member>,
    identity: Arc<(MetadataMap, Extensions)>,
}

impl Caller {
    /// The caller of `request`.
    pub fn of<T>(member: &Arc<Member>, request: &Request<T>) -> Caller {
        let mut metadata = request.metadata().clone();
        // They concern the call as a whole, and hold for it; not for what is still to be done after it.
        metadata.remove("grpc-timeout");
        metadata.remove("hasleader");
        let mut extensions = request.extensions().clone();
        extensions.insert(Step);
        Caller { member: member.clone(), identity: Arc::new((metadata, extensions)) }
    }

    fn step<T>(&self, body: T) -> Request<T> {
        let (metadata, extensions) = &*self.identity;
        Request::from_parts(metadata.clone(), extensions.clone(), body)
    }

    /// `KV.Txn`.
    async fn txn(&self, body: pb::TxnRequest) -> Result<pb::TxnResponse, Status> {
        let kv = kv::Kv(self.member.clone());
        pb::kv_server::Kv::txn(&kv, self.step(body)).await.map(Response::into_inner)
    }

    /// `KV.Range`.
    ///
    /// # Errors
    /// As there.
    pub async fn range(&self, body: pb::RangeRequest) -> Result<pb::RangeResponse, Status> {
        let kv = kv::Kv(self.member.clone());
        pb::kv_server::Kv::range(&kv, self.step(body)).await.map(Response::into_inner)
    }

    /// `KV.DeleteRange`.
    ///
    /// # Errors
    /// As there.
    pub async fn delete(
        &self,
        body: pb::DeleteRangeRequest,
    ) -> Result<pb::DeleteRangeResponse, Status> {
        let kv = kv::Kv(self.member.clone());
        pb::kv_server::Kv::delete_range(&kv, self.step(body)).await.map(Response::into_inner)
    }

    async fn revoke(&self, id: i64) -> Result<(), Status> {
        let lease = lease::Lease(self.member.clone());
        let body = self.step(pb::LeaseRevokeRequest { id });
        pb::lease_server::Lease::lease_revoke(&lease, body).await.map(|_| ())
    }

    /// Repeats a read until it is answered or refused for good. A caller that waits for its turn is not
    /// sent away because the leader changes just then; how long it waits is its own affair.
    ///
    /// # Errors
    /// What `read` is refused for.
    pub async fn persist<T, F>(&self, mut read: impl FnMut() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        loop {
            match read().await {
                Err(status) if passes(&status) => {}
                answer => return answer,
            }
            tokio::select! {
                () = self.member.stopped() => return Err(status::stopped()),
                () = tokio::time::sleep(READ_AGAIN) => {}
            }
        }
    }

    fn watch(&self, create: pb::WatchCreateRequest) -> Result<Changes, Status> {
        let request = pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        let requests = stream::iter([Ok(request)]);
        let responses = watch::Watch(self.member.clone()).open(self.step(requests))?;
        Ok(Changes(responses))
    }

    /// Watches a key from `start` on.
    ///
    /// # Errors
    /// If this member takes no watches.
    pub fn watch_key(&self, key: Bytes, start: i64) -> Result<Changes, Status> {
        self.watch(pb::WatchCreateRequest { key, start_revision: start, ..Default::default() })
    }

    /// Watches for puts in a queue from `start` on.
    ///
    /// # Errors
    /// If this member takes no watches.
    pub fn watch_arrivals(&self, queue: &Queue, start: i64) -> Result<Changes, Status> {
        self.watch(pb::WatchCreateRequest {
            key: queue.prefix.clone(),
            range_end: queue.end.clone(),
            start_revision: start,
            filters: vec![FilterType::Nodelete as i32],
            ..Default::default()
        })
    }

    /// Waits until a key, seen at revision `seen`, is deleted, or until that can no longer be told.
    async fn deletion(&self, key: Bytes, seen: i64) -> Result<(), Status> {
        let mut changes = self.watch(pb::WatchCreateRequest {
            key,
            start_revision: seen + 1,
            filters: vec![FilterType::Noput as i32],
            ..Default::default()
        })?;
        changes.next().await.map(|_| ())
    }

    /// The lease to contend with: `id`, or one that is granted if that is 0.
    ///
    /// # Errors
    /// As those of `Lease.LeaseGrant`.
    pub async fn lease(&self, id: i64) -> Result<Lease, Status> {
        let mut lease = Lease { caller: self.clone(), id, abandoned: false };
        if id == 0 {
            let service = lease::Lease(self.member.clone());
            let body = self.step(pb::LeaseGrantRequest { ttl: SESSION_TTL, id });
            let granted = pb::lease_server::Lease::lease_grant(&service, body).await?;
            lease.id = granted.into_inner().id;
            lease.abandoned = true;
        }
        Ok(lease)
    }

    /// Takes a place in a queue, or the one that this lease has there already.
    ///
    /// # Errors
    /// Those of the calls that it takes.
    pub async fn enter(&self, queue: Queue, lease: i64, value: Bytes) -> Result<Entry, Status> {
        let caller = self.clone();
        // This goes on when the caller leaves: what there is to be taken back shows only at its end.
        let entering = actix::spawn(async move {
            let lease = caller.lease(lease).await?;
            Contender::enter(caller, queue, lease, value).await
        });
        entering.await.unwrap_or_else(|_| Err(status::stopped()))
    }

    /// Puts a new value under a contender's key, created at `created`; `None` if it is gone.
    ///
    /// # Errors
    /// Those of `KV.Txn`.
    pub async fn proclaim(
        &self,
        key: &Bytes,
        created: i64,
        lease: i64,
        value: Bytes,
    ) -> Result<Option<Option<pb::ResponseHeader>>, Status> {
        let put = pb::PutRequest { key: key.clone(), value, lease, ..Default::default() };
        let reply = self
            .txn(pb::TxnRequest {
                compare: vec![created_at(key, created)],
                success: vec![op(Op::RequestPut(put))],
                failure: vec![],
            })
            .await?;
        Ok(reply.succeeded.then_some(reply.header))
    }

    /// Deletes a contender's key, if it is the one created at `created`.
    ///
    /// # Errors
    /// Those of `KV.Txn`.
    pub async fn resign(
        &self,
        key: &Bytes,
        created: i64,
    ) -> Result<Option<pb::ResponseHeader>, Status> {
        let delete = pb::DeleteRangeRequest { key: key.clone(), ..Default::default() };
        let reply = self
            .txn(pb::TxnRequest {
                compare: vec![created_at(key, created)],
                success: vec![op(Op::RequestDeleteRange(delete))],
                failure: vec![],
            })
            .await?;
        Ok(reply.header)
    }

    /// Repeats `undo` in the background until it is done or refused for good. Nobody waits for it, so
    /// it may take as long as the cluster is without a leader: a key that stayed would hold up all
    /// behind it for as long as its lease is renewed.
    fn in_background<F>(&self, what: &'static str, key: Bytes, undo: impl Fn(Caller) -> F + 'static)
    where
        F: Future<Output = Result<(), Status>>,
    {
        // Its requests are refused from now on; the lease will do it.
        if self.member.is_stopping() {
            return;
        }
        let caller = self.clone();
        actix::spawn(async move {
            while let Err(status) = undo(caller.clone()).await {
                if !passes(&status) {
                    let key = key.escape_ascii();
                    return tracing::warn!(%key, error = status.message(), "{what}");
                }
                tokio::select! {
                    () = caller.member.stopped() => return,
                    () = tokio::time::sleep(WITHDRAW_AGAIN) => {}
                }
            }
        });
    }
}

/// What a watch tells.
pub struct Changes(Reply<pb::WatchResponse>);

impl Changes {
    /// The next changes; `None` if they have been compacted away, then the watch is over.
    ///
    /// # Errors
    /// If the watch is refused, or the member stops.
    pub async fn next(&mut self) -> Result<Option<pb::WatchResponse>, Status> {
        loop {
            let response = self.0.next().await.unwrap_or_else(|| Err(status::stopped()))?;
            if response.compact_revision != 0 {
                return Ok(None);
            }
            if response.canceled {
                return Err(Status::failed_precondition(response.cancel_reason));
            }
            if !response.events.is_empty() {
                return Ok(Some(response));
            }
        }
    }
}

/// A lease to contend with. One that was granted for a call is known to nobody before the call is
/// answered, so it is revoked if that never happens, and the key with it. (etcd deletes only the key,
/// and lets the lease run out.)
pub struct Lease {
    caller: Caller,
    pub id: i64,
    /// It is to be revoked when this is dropped.
    abandoned: bool,
}

impl Lease {
    /// The caller is told of the lease: from now on it is theirs.
    pub fn keep(mut self) {
        self.abandoned = false;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.abandoned {
            return;
        }
        let id = self.id;
        let what = "the lease of an abandoned call could not be revoked";
        let name = format!("{id:x}").into();
        self.caller.in_background(what, name, move |caller| async move {
            match caller.revoke(id).await {
                Err(status) if status.message() == status::lease_not_found().message() => Ok(()),
                other => other,
            }
        });
    }
}

/// Who is before a contender.
enum Ahead {
    Nobody,
    /// This key was the last before it at this revision.
    Key(Bytes, i64),
    Unknown,
}

/// A place that was taken in a queue.
pub struct Entry {
    pub contender: Contender,
    /// Of the transaction that took it.
    pub header: Option<pb::ResponseHeader>,
    /// The value that the key had already; `None` if it was created.
    pub found: Option<Bytes>,
}

/// How waiting ended.
pub enum Turn {
    /// At the head, as seen by a read with this header; `None` if that was so from the start.
    Head(Option<pb::ResponseHeader>),
    /// The key is gone: its lease has ended, or somebody deleted it.
    Lost,
}

/// A place in a queue. Dropped before [`Contender::keep`], it is given up: the key is deleted, unless
/// another call with this lease created it and was at the head already. That one may have been told
/// that it holds what is contended for, and leaving this call must not take it away.
///
/// Only the key that was entered with is deleted, known by its create revision: one that the same lease
/// has made since then stays. A caller that asks again with the same lease before the first call has
/// ended, by way of another member, still shares one key with it, as it does with etcd: whoever has to
/// be certain takes another lease, or makes what it does depend on the key.
pub struct Contender {
    caller: Caller,
    queue: Queue,
    pub key: Bytes,
    pub created: i64,
    lease: Lease,
    ahead: Ahead,
    /// The key is to be deleted when this is dropped.
    abandoned: bool,
}

impl Contender {
    async fn enter(
        caller: Caller,
        queue: Queue,
        lease: Lease,
        value: Bytes,
    ) -> Result<Entry, Status> {
        let key = queue.key(lease.id);
        let put = pb::PutRequest { key: key.clone(), value, lease: lease.id, ..Default::default() };
        let keys = |range| pb::RangeRequest { keys_only: true, ..range };
        let reply = caller
            .txn(pb::TxnRequest {
                compare: vec![created_at(&key, 0)],
                // The last of all is the new key itself, and the one before it that to wait for.
                success: vec![
                    op(Op::RequestPut(put)),
                    op(Op::RequestRange(keys(queue.by_creation(SortOrder::Descend, 2)))),
                ],
                failure: vec![
                    op(Op::RequestRange(get(&key))),
                    op(Op::RequestRange(keys(queue.head()))),
                ],
            })
            .await?;
        let at = revision(&reply.header);
        let mut contender = Contender {
            caller,
            queue,
            key,
            created: at,
            lease,
            ahead: Ahead::Unknown,
            abandoned: true,
        };
        let mut found = None;
        if reply.succeeded {
            contender.ahead = match kvs_of(reply.responses.get(1)) {
                [_, before] => Ahead::Key(parse(before)?.key, at),
                _ => Ahead::Nobody,
            };
        } else {
            let own = first_of(reply.responses.first())?;
            let own = own.ok_or_else(|| Status::internal("the transaction lost a key"))?;
            contender.created = own.create_revision;
            let head = first_of(reply.responses.get(1))?;
            if head.is_none_or(|head| head.create_revision == own.create_revision) {
                contender.ahead = Ahead::Nobody;
                contender.abandoned = false;
            }
            found = Some(own.value);
        }
        Ok(Entry { contender, header: reply.header, found })
    }

    /// The lease's id.
    pub fn lease(&self) -> i64 {
        self.lease.id
    }

    /// Waits to be at the head of the queue.
    ///
    /// # Errors
    /// Those of reading and watching, save what passes.
    pub async fn turn(&mut self) -> Result<Turn, Status> {
        loop {
            match std::mem::replace(&mut self.ahead, Ahead::Unknown) {
                Ahead::Nobody => return Ok(Turn::Head(None)),
                Ahead::Key(key, seen) => self.caller.deletion(key, seen).await?,
                Ahead::Unknown => {}
            }
            // One read for both, so that nobody before it and its own key are of one moment.
            let look = pb::TxnRequest {
                success: vec![
                    op(Op::RequestRange(self.queue.before(self.created))),
                    op(Op::RequestRange(pb::RangeRequest { keys_only: true, ..get(&self.key) })),
                ],
                ..Default::default()
            };
            let reply = self.caller.persist(|| self.caller.txn(look.clone())).await?;
            let own = first_of(reply.responses.get(1))?;
            // A key of the same name that was created later stands further back in the queue.
            if own.is_none_or(|own| own.create_revision != self.created) {
                self.abandoned = false;
                return Ok(Turn::Lost);
            }
            match first_of(reply.responses.first())? {
                None => return Ok(Turn::Head(reply.header)),
                Some(before) => self.ahead = Ahead::Key(before.key, revision(&reply.header)),
            }
        }
    }

    /// Puts another value under the own key; false if it is gone.
    ///
    /// # Errors
    /// Those of `KV.Txn`.
    pub async fn proclaim(&self, value: Bytes) -> Result<bool, Status> {
        let put = self.caller.proclaim(&self.key, self.created, self.lease.id, value).await?;
        Ok(put.is_some())
    }

    /// The caller is told of the key: from now on it is theirs. Answers the key.
    pub fn keep(mut self) -> Bytes {
        self.abandoned = false;
        self.lease.abandoned = false;
        std::mem::take(&mut self.key)
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // A lease that is revoked takes the key with it.
        if !self.abandoned || self.lease.abandoned {
            return;
        }
        let (key, created) = (self.key.clone(), self.created);
        let what = "the key of an abandoned call could not be deleted";
        self.caller.in_background(what, key.clone(), move |caller| {
            let key = key.clone();
            async move { caller.resign(&key, created).await.map(|_| ()) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_name_and_the_lease_in_hexadecimal() {
        let queue = Queue::of(b"my\xfflock");
        assert_eq!(queue.key(5), &b"my\xfflock/5"[..]);
        assert_eq!(queue.key(0x694d_7e3a), &b"my\xfflock/694d7e3a"[..]);
        assert_eq!(queue.key(-9), &b"my\xfflock/-9"[..]);
        assert_eq!(queue.key(i64::MIN), &b"my\xfflock/-8000000000000000"[..]);
        assert_eq!(queue.key(i64::MAX), &b"my\xfflock/7fffffffffffffff"[..]);
        assert_eq!(Queue::of(b"").key(1), "/1");
    }

    #[test]
    fn a_queue_holds_the_keys_below_its_name_and_no_others() {
        let Queue { prefix, end } = Queue::of(b"a");
        let within = |key: &str| (&prefix[..]..&end[..]).contains(&key.as_bytes());
        for key in ["a/", "a/1", "a/-1", "a/b/c", "a/\u{ff}"] {
            assert!(within(key), "{key}");
        }
        for key in ["a", "a.", "a0", "a01", "aa/1", "b/1"] {
            assert!(!within(key), "{key}");
        }
    }

    #[test]
    fn the_errors_of_other_services_keep_their_texts_alone() {
        let lost = told(status::lease_not_found());
        let text = "etcdserver: requested lease not found";
        assert_eq!((lost.code(), lost.message()), (Code::Unknown, text));
        let late = told(status::deadline_exceeded());
        assert_eq!(late.code(), Code::DeadlineExceeded);
    }

    fn changes(responses: Vec<Result<pb::WatchResponse, Status>>) -> Changes {
        Changes(Box::pin(stream::iter(responses)))
    }

    fn put() -> pb::WatchResponse {
        pb::WatchResponse { events: vec![Default::default()], ..Default::default() }
    }

    #[tokio::test]
    async fn a_watch_tells_of_changes_and_of_their_loss() {
        let created = pb::WatchResponse { created: true, ..Default::default() };
        let compacted =
            pb::WatchResponse { canceled: true, compact_revision: 7, ..Default::default() };
        let progress = pb::WatchResponse::default();
        let all = vec![created.clone(), put(), progress, put(), compacted];
        let mut changes = changes(all.into_iter().map(Ok).collect());
        assert_eq!(changes.next().await.unwrap(), Some(put()));
        assert_eq!(changes.next().await.unwrap(), Some(put()));
        assert_eq!(changes.next().await.unwrap(), None);
        // A stream that ends is one of a member that ends.
        assert_eq!(changes.next().await.unwrap_err().message(), status::stopped().message());
    }

    #[tokio::test]
    async fn a_watch_that_is_refused_says_why() {
        let reason = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
        let refused = pb::WatchResponse {
            created: true,
            canceled: true,
            cancel_reason: reason.into(),
            ..Default::default()
        };
        let refused = changes(vec![Ok(refused)]).next().await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, reason));
        let ended = changes(vec![Err(status::stopped())]).next().await.unwrap_err();
        assert_eq!(ended.code(), Code::Unavailable);
    }

    #[test]
    fn what_passes_is_tried_again() {
        for status in [
            status::no_leader(),
            status::leader_changed(),
            status::timeout(),
            status::timeout_due_to_leader_fail(),
            status::timeout_due_to_connection_lost(),
            status::deadline_exceeded(),
            status::too_many_requests(),
            status::proposal_dropped(),
        ] {
            assert!(passes(&status), "{status:?}");
        }
        for status in [
            status::stopped(),
            status::lease_not_found(),
            status::no_space(),
            status::corrupt(),
            status::empty_key(),
            status::unknown_method(),
        ] {
            assert!(!passes(&status), "{status:?}");
        }
    }
}
