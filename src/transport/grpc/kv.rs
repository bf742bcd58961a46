//! `etcdserverpb.KV` (v3-api 3.3 to 3.7).

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream;
use prost::Message as _;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::deadline::{self, Deadline, within};
use super::{Counted, Ending, Reply, crowded};
use crate::actors::compactor::AwaitCompaction;
use crate::actors::raft::RequestError;
use crate::config::duration::GoDuration;
use crate::core::apply::{ApplyError, Reply as Applied};
use crate::core::check;
use crate::core::command::Request as Command;
use crate::core::describe::Described;
use crate::core::mvcc::range::Ranged;
use crate::core::mvcc::txn;
use crate::metrics::{Method, RequestKind};
use crate::transport::budget::Account;
use crate::transport::member::Member;
use crate::transport::status;

/// The service.
#[derive(Clone)]
pub struct Kv(pub Arc<Member>);

/// What a read saw: its result, the store's revision, the term of the last applied entry.
struct Seen<T> {
    result: T,
    revision: i64,
    term: u64,
}

impl Kv {
    /// `counted`: the count is wanted even if there are more keys than the limit.
    fn read_range(
        &self,
        request: &pb::RangeRequest,
        counted: bool,
    ) -> Result<Seen<Ranged>, Status> {
        let started = Instant::now();
        let result = self.0.read(|now, values| {
            let result = if counted {
                now.store.range(values, request)?
            } else {
                now.store.page(values, request)?
            };
            Ok(Seen { result, revision: now.store.revision(), term: now.term.0 })
        });
        let took = started.elapsed();
        self.0.metrics.mvcc_range.increment(1);
        self.0.metrics.range_seconds(result.is_ok()).record(took);
        if took >= self.0.limits.warning_apply {
            self.0.metrics.slow_apply.increment(1);
            tracing::warn!(
                took = %GoDuration::from(took),
                "expected-duration" = %GoDuration::from(self.0.limits.warning_apply),
                prefix = "read-only range ",
                request = %Described(request),
                response = %result.as_ref().map_or_else(
                    |_| String::new(),
                    |seen| format!(
                        "range_response_count:{} size:{}",
                        seen.result.kvs.len(),
                        seen.result.kvs.iter().map(|kv| kv.0.len()).sum::<usize>()
                    )
                ),
                error = result.as_ref().err().map(ToString::to_string),
                "apply request took too long"
            );
        }
        Ok(result?)
    }

    async fn range(
        self,
        request: pb::RangeRequest,
        account: Option<Arc<Account>>,
    ) -> Result<pb::RangeResponse, Status> {
        check::range(&request)?;
        let started = Instant::now();
        if !request.serializable {
            self.0.read_index().await?;
        }
        room(account.as_deref()).await?;
        let seen = self.read_range(&request, true);
        let seconds = self.0.metrics.request_seconds(RequestKind::Range, seen.is_ok());
        seconds.record(started.elapsed());
        let seen = seen?;
        Ok(pb::RangeResponse {
            header: self.0.header_at(seen.revision, seen.term),
            kvs: seen.result.kvs,
            more: seen.result.more,
            count: seen.result.count,
        })
    }

    async fn put(self, request: pb::PutRequest) -> Result<pb::PutResponse, Status> {
        let request = Command::Put(request);
        self.0.check_quota(&request).await?;
        let Command::Put(put) = &request else { unreachable!("made above") };
        check::put(put)?;
        let answer = self.0.propose(request).await?;
        let Applied::Put(mut reply) = answer.reply else { unreachable!("a put answers a put") };
        self.stamp(&mut reply.header, answer.term.0);
        Ok(reply)
    }

    async fn delete_range(
        self,
        request: pb::DeleteRangeRequest,
    ) -> Result<pb::DeleteRangeResponse, Status> {
        check::delete_range(&request)?;
        let answer = self.0.propose(Command::DeleteRange(request)).await?;
        let Applied::DeleteRange(mut reply) = answer.reply else {
            unreachable!("a delete answers a delete")
        };
        self.stamp(&mut reply.header, answer.term.0);
        Ok(reply)
    }

    async fn txn(
        self,
        request: pb::TxnRequest,
        account: Option<Arc<Account>>,
    ) -> Result<pb::TxnResponse, Status> {
        let request = Command::Txn(request);
        self.0.check_quota(&request).await?;
        let Command::Txn(body) = &request else { unreachable!("made above") };
        check::txn(body, self.0.limits.txn_ops_max)?;
        if check::is_read_only(body) {
            return self.read_only(body, account.as_deref()).await;
        }
        room(account.as_deref()).await?;
        let answer = self.0.propose(request).await?;
        let Applied::Txn(mut reply) = answer.reply else { unreachable!("a txn answers a txn") };
        self.stamp(&mut reply.header, answer.term.0);
        Ok(reply)
    }

    async fn read_only(
        &self,
        request: &pb::TxnRequest,
        account: Option<&Account>,
    ) -> Result<pb::TxnResponse, Status> {
        let started = Instant::now();
        if !check::is_serializable(request) {
            self.0.read_index().await?;
        }
        room(account).await?;
        let mut refused = None;
        let seen = self.0.read(|now, values| {
            let mut reply = match txn::read_only(&now.store, values, request) {
                Ok(reply) => reply,
                Err(txn::TxnError::Read(error)) => return Err(error),
                Err(error) => {
                    refused = Some(error);
                    pb::TxnResponse::default()
                }
            };
            reply.header = self.0.header_at(now.store.revision(), now.term.0);
            Ok(reply)
        });
        self.0
            .metrics
            .request_seconds(RequestKind::ReadonlyTxn, seen.is_ok() && refused.is_none())
            .record(started.elapsed());
        match refused {
            Some(error) => Err(error.into()),
            None => {
                let reply = seen?;
                self.0.metrics.count_txn(&reply);
                Ok(reply)
            }
        }
    }

    async fn compact(
        self,
        request: pb::CompactionRequest,
    ) -> Result<pb::CompactionResponse, Status> {
        let (at, physical) = (request.revision, request.physical);
        let result = self.0.propose(Command::Compaction(request)).await;
        let compacted = matches!(result, Err(RequestError::Apply(ApplyError::Compacted { .. })));
        if physical && (result.is_ok() || compacted) {
            // One that came too late waits for those under way before it is refused.
            let at = if compacted { i64::MAX } else { at };
            let (reply, done) = oneshot::channel();
            self.0.compactor.do_send(AwaitCompaction { at, reply });
            done.await.map_err(|_| status::stopped())?;
        }
        let answer = result?;
        let Applied::Compact(mut reply) = answer.reply else {
            unreachable!("a compaction answers a compaction")
        };
        self.stamp(&mut reply.header, answer.term.0);
        Ok(reply)
    }

    /// Completes a header in which the applier has put only a revision.
    fn stamp(&self, header: &mut Option<pb::ResponseHeader>, term: u64) {
        let revision = header.as_ref().map_or(0, |header| header.revision);
        *header = self.0.header_at(revision, term);
    }

    async fn start_range_stream(&self, request: pb::RangeRequest) -> Result<Chunks, Status> {
        check::range(&request)?;
        let ascending = request.sort_order == SortOrder::None as i32
            || (request.sort_order == SortOrder::Ascend as i32
                && request.sort_target == SortTarget::Key as i32);
        if !ascending {
            return Err(Status::unimplemented("RangeStream does not support custom sort orders"));
        }
        if request.min_mod_revision != 0
            || request.max_mod_revision != 0
            || request.min_create_revision != 0
            || request.max_create_revision != 0
        {
            return Err(Status::unimplemented("RangeStream does not support revision filters"));
        }
        if !request.serializable {
            self.0.read_index().await?;
        }
        Ok(Chunks {
            kv: self.clone(),
            left: (request.limit > 0).then_some(request.limit),
            request,
            chunk_keys: FIRST_CHUNK_KEYS,
            sent: 0,
            header: None,
            done: false,
        })
    }
}

/// Waits while clients hold too much: right before a read, which no other call comes between until what
/// it read is on the connection's account.
async fn room(account: Option<&Account>) -> Result<(), Status> {
    match account {
        Some(account) => account.room().await.map_err(|_| crowded()),
        None => Ok(()),
    }
}

/// Keys in the first chunk of a range stream (v3-api 3.4).
const FIRST_CHUNK_KEYS: i64 = 10;

/// A range that is sent in chunks, all of one revision.
struct Chunks {
    kv: Kv,
    request: pb::RangeRequest,
    /// Keys still wanted; `None` for all.
    left: Option<i64>,
    chunk_keys: i64,
    sent: i64,
    /// The header that the last chunk will carry: of the state that the first chunk was read from.
    header: Option<pb::ResponseHeader>,
    done: bool,
}

impl Chunks {
    fn next(&mut self) -> Result<Option<pb::RangeStreamResponse>, Status> {
        if self.done {
            return Ok(None);
        }
        let mut request = self.request.clone();
        if !request.count_only {
            request.limit = self.left.map_or(self.chunk_keys, |left| left.min(self.chunk_keys));
        }
        // A chunk that the limit cannot end needs no count, unless it turns out to be the last; then
        // it has seen every key.
        let counted = self.left.is_some_and(|left| left <= self.chunk_keys);
        let seen = self.kv.read_range(&request, counted)?;
        if self.header.is_none() {
            self.header = self.kv.0.header_at(seen.revision, seen.term);
            if self.request.revision <= 0 {
                self.request.revision = seen.revision;
            }
        }
        let mut reply = pb::RangeResponse { kvs: seen.result.kvs, ..Default::default() };
        let keys = reply.kvs.len() as i64;
        let exhausted = self.left.is_some_and(|left| left <= keys);
        if let Some(left) = &mut self.left {
            *left -= keys;
        }
        if request.count_only || !seen.result.more || exhausted {
            self.done = true;
            reply.header = self.header;
            reply.more = seen.result.more;
            reply.count = self.sent + seen.result.count;
        } else {
            self.sent += keys;
            let last = reply.kvs.last().ok_or_else(status::compacted)?;
            let last = last.parse().map_err(|error| Status::internal(error.to_string()))?;
            self.request.key = successor(&last.key);
            let bytes = reply.encoded_len();
            let max = self.kv.0.limits.request_bytes_max;
            if bytes < max / 2 {
                self.chunk_keys = self.chunk_keys.saturating_mul(2);
            } else if bytes > 2 * max {
                self.chunk_keys = (self.chunk_keys / 2).max(1);
            }
        }
        Ok(Some(pb::RangeStreamResponse { range_response: Some(reply) }))
    }
}

/// The smallest key above `key`.
fn successor(key: &[u8]) -> Bytes {
    [key, &[0]].concat().into()
}

#[tonic::async_trait]
impl pb::kv_server::Kv for Kv {
    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        let local = |range: &pb::RangeRequest| range.serializable;
        let account = request.extensions().get::<Arc<Account>>().cloned();
        self.0.unary(Method::Range, local, request, |r| Kv::range(self.clone(), r, account)).await
    }

    type RangeStreamStream = Reply<pb::RangeStreamResponse>;

    async fn range_stream(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let call = self.0.open_stream(Method::RangeStream, request.metadata(), false)?;
        let leaderless = self.0.stream_leaderless(request.metadata());
        let timeout = deadline::timeout(request.metadata());
        let deadline = Deadline::of(request.metadata());
        let request = request.into_inner();
        call.received(request.encoded_len());
        match within(timeout, self.start_range_stream(request)).await {
            Ok(chunks) => {
                let stream = stream::unfold(chunks, |mut chunks| {
                    let next = chunks.next();
                    chunks.done |= next.is_err();
                    std::future::ready(next.transpose().map(|item| (item, chunks)))
                });
                let stream = Ending::new(stream, leaderless);
                Ok(Response::new(Box::pin(Counted::new(stream, deadline, call))))
            }
            Err(status) => {
                call.finish(status.code());
                Err(status)
            }
        }
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        self.0.unary(Method::Put, |_| false, request, |r| Kv::put(self.clone(), r)).await
    }

    async fn delete_range(
        &self,
        request: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        let run = |r| Kv::delete_range(self.clone(), r);
        self.0.unary(Method::DeleteRange, |_| false, request, run).await
    }

    async fn txn(
        &self,
        request: Request<pb::TxnRequest>,
    ) -> Result<Response<pb::TxnResponse>, Status> {
        let account = request.extensions().get::<Arc<Account>>().cloned();
        self.0.unary(Method::Txn, |_| false, request, |r| Kv::txn(self.clone(), r, account)).await
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        self.0.unary(Method::Compact, |_| false, request, |r| Kv::compact(self.clone(), r)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_successor_is_the_next_key_of_all() {
        assert_eq!(successor(b"a"), Bytes::from_static(b"a\0"));
        assert!(successor(b"a")[..] > b"a"[..] && successor(b"a")[..] < b"a\x01"[..]);
    }
}
