//! What a request asks for, in a line for the log: keys and numbers, never values or passwords.

use std::fmt::{self, Display, Formatter, Write};

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::request_op::Request as Op;

use super::command::Request;

/// Bytes of keys that are shown; more is cut off.
const KEY_MAX: usize = 256;
/// Operations of a transaction that are shown; of others only the number.
const OPS_MAX: usize = 8;

/// Shows a request.
pub struct Described<'r, T>(pub &'r T);

/// A key between quotes, with what cannot be read escaped.
struct Key<'k>(&'k [u8]);

impl Display for Key<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(KEY_MAX)];
        write!(f, "\"{}\"", shown.escape_ascii())?;
        if shown.len() < self.0.len() { write!(f, "({} bytes)", self.0.len()) } else { Ok(()) }
    }
}

/// Writes `name:value`, with a space between it and what stands there already.
struct Fields<'f, 'g> {
    f: &'f mut Formatter<'g>,
    is_first: bool,
}

impl<'f, 'g> Fields<'f, 'g> {
    fn new(f: &'f mut Formatter<'g>) -> Self {
        Fields { f, is_first: true }
    }

    fn add(&mut self, name: &str, value: impl Display) -> fmt::Result {
        if !std::mem::replace(&mut self.is_first, false) {
            self.f.write_char(' ')?;
        }
        write!(self.f, "{name}:{value}")
    }

    fn key(&mut self, name: &str, key: &[u8]) -> fmt::Result {
        if key.is_empty() { Ok(()) } else { self.add(name, Key(key)) }
    }

    fn number(&mut self, name: &str, number: i64) -> fmt::Result {
        if number == 0 { Ok(()) } else { self.add(name, number) }
    }

    fn flag(&mut self, name: &str, is_set: bool) -> fmt::Result {
        if is_set { self.add(name, true) } else { Ok(()) }
    }
}

impl Display for Described<'_, pb::RangeRequest> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let range = self.0;
        let mut fields = Fields::new(f);
        fields.key("key", &range.key)?;
        fields.key("range_end", &range.range_end)?;
        fields.number("limit", range.limit)?;
        fields.number("revision", range.revision)?;
        fields.number("sort_order", range.sort_order.into())?;
        fields.number("sort_target", range.sort_target.into())?;
        fields.flag("serializable", range.serializable)?;
        fields.flag("keys_only", range.keys_only)?;
        fields.flag("count_only", range.count_only)
    }
}

impl Display for Described<'_, pb::PutRequest> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let put = self.0;
        let mut fields = Fields::new(f);
        fields.key("key", &put.key)?;
        fields.add("value_size", put.value.len())?;
        fields.number("lease", put.lease)?;
        fields.flag("prev_kv", put.prev_kv)?;
        fields.flag("ignore_value", put.ignore_value)?;
        fields.flag("ignore_lease", put.ignore_lease)
    }
}

impl Display for Described<'_, pb::DeleteRangeRequest> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut fields = Fields::new(f);
        fields.key("key", &self.0.key)?;
        fields.key("range_end", &self.0.range_end)?;
        fields.flag("prev_kv", self.0.prev_kv)
    }
}

impl Display for Described<'_, pb::TxnRequest> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut fields = Fields::new(f);
        for compare in self.0.compare.iter().take(OPS_MAX) {
            let what =
                format_args!("<target:{} {}>", compare.target, Key(&compare.key)).to_string();
            fields.add("compare", what)?;
        }
        if self.0.compare.len() > OPS_MAX {
            fields.add("compares", self.0.compare.len())?;
        }
        let lists =
            [("success", "successes", &self.0.success), ("failure", "failures", &self.0.failure)];
        for (one, all, ops) in lists {
            for op in ops.iter().take(OPS_MAX) {
                fields.add(one, Operation(op))?;
            }
            if ops.len() > OPS_MAX {
                fields.add(all, ops.len())?;
            }
        }
        Ok(())
    }
}

struct Operation<'r>(&'r pb::RequestOp);

impl Display for Operation<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.0.request {
            Some(Op::RequestRange(request)) => {
                write!(f, "<request_range:<{}>>", Described(request))
            }
            Some(Op::RequestPut(request)) => write!(f, "<request_put:<{}>>", Described(request)),
            Some(Op::RequestDeleteRange(request)) => {
                write!(f, "<request_delete_range:<{}>>", Described(request))
            }
            // What is in it is not shown: there may be much, and deep.
            Some(Op::RequestTxn(request)) => {
                let ops = request.success.len() + request.failure.len();
                write!(f, "<request_txn:<operations:{ops}>>")
            }
            None => f.write_str("<>"),
        }
    }
}

impl Display for Described<'_, Request> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Request::Put(request) => write!(f, "put:<{}>", Described(request)),
            Request::DeleteRange(request) => write!(f, "delete_range:<{}>", Described(request)),
            Request::Txn(request) => write!(f, "txn:<{}>", Described(request)),
            Request::Compaction(request) => {
                write!(f, "compaction:<revision:{}>", request.revision)
            }
            Request::LeaseGrant(request) => {
                write!(f, "lease_grant:<ttl:{} id:{:016x}>", request.ttl, request.id)
            }
            Request::LeaseRevoke(request) => write!(f, "lease_revoke:<id:{:016x}>", request.id),
            other => f.write_str(other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &'static str) -> pb::PutRequest {
        pb::PutRequest { key: key.into(), value: "secret".into(), lease: 7, ..Default::default() }
    }

    #[test]
    fn keys_and_numbers_are_shown_and_values_are_not() {
        let range = pb::RangeRequest {
            key: "a\n\u{e9}".into(),
            range_end: "b".into(),
            limit: 5,
            serializable: true,
            ..Default::default()
        };
        assert_eq!(
            Described(&range).to_string(),
            r#"key:"a\n\xc3\xa9" range_end:"b" limit:5 serializable:true"#
        );
        assert_eq!(Described(&put("k")).to_string(), r#"key:"k" value_size:6 lease:7"#);
        let txn = pb::TxnRequest {
            compare: vec![pb::Compare { key: "c".into(), ..Default::default() }],
            success: vec![pb::RequestOp { request: Some(Op::RequestPut(put("k"))) }; 20],
            failure: vec![pb::RequestOp { request: Some(Op::RequestTxn(Default::default())) }],
        };
        let text = Described(&Request::Txn(txn)).to_string();
        assert!(text.starts_with(r#"txn:<compare:<target:0 "c"> success:<request_put:<key:"k""#));
        assert!(text.ends_with("successes:20 failure:<request_txn:<operations:0>>>"), "{text}");
        assert!(!text.contains("secret"), "{text}");
    }

    #[test]
    fn a_long_key_is_cut() {
        let text = Described(&pb::DeleteRangeRequest {
            key: vec![b'k'; 100_000].into(),
            ..Default::default()
        })
        .to_string();
        assert!(text.len() < 300 && text.ends_with("kkk\"(100000 bytes)"), "{text}");
    }

    #[test]
    fn what_holds_a_password_is_only_named() {
        let request = Request::AuthUserAdd(pb::AuthUserAddRequest {
            name: "root".into(),
            password: "secret".into(),
            ..Default::default()
        });
        assert_eq!(Described(&request).to_string(), "AuthUserAdd");
    }
}
