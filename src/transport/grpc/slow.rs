//! What the log says of a unary call that took too long.

use std::any::Any;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use quorate_proto::etcdserverpb as pb;
use tonic::Code;

use crate::config::duration::GoDuration;
use crate::core::describe::Described;
use crate::logging::rfc3339_nanos;
use crate::metrics::Method;

/// What is kept of a request until it is known whether it was slow: nothing that must be allocated.
pub enum Asked {
    Range(pb::RangeRequest),
    /// Without its value.
    Put(pb::PutRequest, usize),
    DeleteRange(pb::DeleteRangeRequest),
    /// The numbers of its compares and of the operations of both branches.
    Txn(usize, usize, usize),
    Other,
}

impl Asked {
    /// Keeps the keys of a request, which share its memory.
    pub fn of(request: &dyn Any) -> Self {
        if let Some(put) = request.downcast_ref::<pb::PutRequest>() {
            let kept = pb::PutRequest { value: Default::default(), ..put.clone() };
            Asked::Put(kept, put.value.len())
        } else if let Some(range) = request.downcast_ref::<pb::RangeRequest>() {
            Asked::Range(range.clone())
        } else if let Some(txn) = request.downcast_ref::<pb::TxnRequest>() {
            Asked::Txn(txn.compare.len(), txn.success.len(), txn.failure.len())
        } else if let Some(delete) = request.downcast_ref::<pb::DeleteRangeRequest>() {
            Asked::DeleteRange(delete.clone())
        } else {
            Asked::Other
        }
    }

    fn content(&self) -> String {
        match self {
            Asked::Range(range) => Described(range).to_string(),
            // The size of the value is not that of what is kept.
            Asked::Put(put, size) => Described(put).to_string().replacen(
                "value_size:0",
                &format!("value_size:{size}"),
                1,
            ),
            Asked::DeleteRange(delete) => Described(delete).to_string(),
            Asked::Txn(compares, success, failure) => {
                format!("compares:{compares} success:{success} failure:{failure}")
            }
            Asked::Other => String::new(),
        }
    }

    /// Operations asked for; -1 for calls of which nothing is counted, as etcd has it.
    fn count(&self, reply: Option<&dyn Any>) -> i64 {
        match self {
            Asked::Put(..) => 1,
            Asked::Range(_) | Asked::DeleteRange(_) => 0,
            Asked::Txn(_, success, failure) => {
                let reply = reply.and_then(|reply| reply.downcast_ref::<pb::TxnResponse>());
                reply.map_or(
                    0,
                    |reply| {
                        if reply.succeeded { *success as i64 } else { *failure as i64 }
                    },
                )
            }
            Asked::Other => -1,
        }
    }
}

/// Keys in a reply; -1 for calls of which nothing is counted.
fn reply_count(asked: &Asked, reply: Option<&dyn Any>) -> i64 {
    let Some(reply) = reply else { return if matches!(asked, Asked::Other) { -1 } else { 0 } };
    if let Some(range) = reply.downcast_ref::<pb::RangeResponse>() {
        range.count
    } else if let Some(delete) = reply.downcast_ref::<pb::DeleteRangeResponse>() {
        delete.deleted
    } else if matches!(asked, Asked::Other) {
        -1
    } else {
        0
    }
}

/// A call and how it went.
pub struct Call<'c> {
    pub method: Method,
    pub took: Duration,
    pub remote: Option<SocketAddr>,
    pub asked: &'c Asked,
    pub request_bytes: usize,
    pub code: Code,
    pub reply: Option<&'c dyn Any>,
    pub reply_bytes: usize,
}

impl Call<'_> {
    /// Logs the call.
    pub fn warn(&self) {
        let (service, name, _) = self.method.parts();
        let started = SystemTime::now().checked_sub(self.took).unwrap_or(SystemTime::UNIX_EPOCH);
        tracing::warn!(
            "start time" = rfc3339_nanos(started),
            "time spent" = %GoDuration::from(self.took),
            remote = self.remote.map_or_else(String::new, |remote| remote.to_string()),
            "response type" = %format_args!("/{service}/{name}"),
            "response code" = ?self.code,
            "request count" = self.asked.count(self.reply),
            "request size" = self.request_bytes,
            "response count" = reply_count(self.asked, self.reply),
            "response size" = self.reply_bytes,
            "request content" = self.asked.content(),
            "request stats"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_put_is_told_without_its_value() {
        let put = pb::PutRequest { key: "k".into(), value: "secret".into(), ..Default::default() };
        let asked = Asked::of(&put);
        assert_eq!(asked.content(), r#"key:"k" value_size:6"#);
        let reply = pb::PutResponse::default();
        assert_eq!((asked.count(None), reply_count(&asked, Some(&reply))), (1, 0));
    }

    #[test]
    fn keys_and_operations_are_counted_and_unknown_calls_are_not() {
        let asked = Asked::of(&pb::RangeRequest { key: "k".into(), ..Default::default() });
        let reply = pb::RangeResponse { count: 9, ..Default::default() };
        assert_eq!((asked.count(Some(&reply)), reply_count(&asked, Some(&reply))), (0, 9));
        assert_eq!(reply_count(&asked, None), 0);
        let txn = pb::TxnRequest { failure: vec![Default::default(); 3], ..Default::default() };
        let (asked, reply) = (Asked::of(&txn), pb::TxnResponse::default());
        assert_eq!(asked.count(Some(&reply)), 3);
        let status = Asked::of(&pb::StatusRequest {});
        assert_eq!((status.count(None), reply_count(&status, None)), (-1, -1));
    }
}
