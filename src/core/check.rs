//! What a request must satisfy before it is proposed or read (v3-api 3.3 to 3.6).

use std::collections::{BTreeMap, HashSet};

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use quorate_proto::etcdserverpb::request_op::Request as Op;

/// Why a request is refused at the door.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum CheckError {
    #[error("key is not provided")]
    EmptyKey,
    #[error("sort order or target is not known")]
    InvalidSort,
    #[error("ignore_value with a value")]
    ValueProvided,
    #[error("ignore_lease with a lease")]
    LeaseProvided,
    #[error("more operations or compares than allowed")]
    TooManyOps,
    #[error("a key is written twice")]
    DuplicateKey,
    /// An operation without any request in it.
    #[error("operation is empty")]
    EmptyOp,
    #[error("user name is too long")]
    UserNameTooLong,
    #[error("role name is too long")]
    RoleNameTooLong,
}

/// Bytes that the name of a new user or role may have. Names are keys in the storage engine, and members
/// of one cluster may have engines with different limits: what one of them cannot store must not get
/// into the log. etcd's own is 32,768, and it ends with a panic there.
pub const NAME_BYTES_MAX: usize = 1024;

/// Checks a request to add a user.
///
/// # Errors
/// `UserNameTooLong`.
pub fn user_add(request: &pb::AuthUserAddRequest) -> Result<(), CheckError> {
    if request.name.len() > NAME_BYTES_MAX { Err(CheckError::UserNameTooLong) } else { Ok(()) }
}

/// Checks a request to add a role.
///
/// # Errors
/// `RoleNameTooLong`.
pub fn role_add(request: &pb::AuthRoleAddRequest) -> Result<(), CheckError> {
    if request.name.len() > NAME_BYTES_MAX { Err(CheckError::RoleNameTooLong) } else { Ok(()) }
}

/// Checks a range request.
///
/// # Errors
/// `EmptyKey`, `InvalidSort`.
pub fn range(request: &pb::RangeRequest) -> Result<(), CheckError> {
    if request.key.is_empty() {
        return Err(CheckError::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err()
        || SortTarget::try_from(request.sort_target).is_err()
    {
        return Err(CheckError::InvalidSort);
    }
    Ok(())
}

/// Checks a put request.
///
/// # Errors
/// `EmptyKey`, `ValueProvided`, `LeaseProvided`.
pub fn put(request: &pb::PutRequest) -> Result<(), CheckError> {
    if request.key.is_empty() {
        Err(CheckError::EmptyKey)
    } else if request.ignore_value && !request.value.is_empty() {
        Err(CheckError::ValueProvided)
    } else if request.ignore_lease && request.lease != 0 {
        Err(CheckError::LeaseProvided)
    } else {
        Ok(())
    }
}

/// Checks a delete request.
///
/// # Errors
/// `EmptyKey`.
pub fn delete_range(request: &pb::DeleteRangeRequest) -> Result<(), CheckError> {
    if request.key.is_empty() { Err(CheckError::EmptyKey) } else { Ok(()) }
}

/// Checks a transaction; each list of it holds at most `ops_max` operations, nested ones what their
/// parent leaves.
///
/// # Errors
/// Any [`CheckError`].
pub fn txn(request: &pb::TxnRequest, ops_max: usize) -> Result<(), CheckError> {
    shape(request, ops_max)?;
    intervals(&request.success)?;
    intervals(&request.failure)?;
    Ok(())
}

fn shape(request: &pb::TxnRequest, ops_max: usize) -> Result<(), CheckError> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    let left = ops_max.checked_sub(ops).ok_or(CheckError::TooManyOps)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(CheckError::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Op::RequestRange(request)) => range(request)?,
            Some(Op::RequestPut(request)) => put(request)?,
            Some(Op::RequestDeleteRange(request)) => delete_range(request)?,
            Some(Op::RequestTxn(nested)) => shape(nested, left)?,
            None => return Err(CheckError::EmptyOp),
        }
    }
    Ok(())
}

/// What a list of operations writes.
#[derive(Default)]
struct Writes<'r> {
    puts: HashSet<&'r [u8]>,
    deleted: HashSet<&'r [u8]>,
    /// Half-open, from start to end; no two of them overlap or touch, so that a look finds the only one
    /// that can hold a key: a transaction may hold a hundred thousand operations.
    deleted_ranges: BTreeMap<&'r [u8], &'r [u8]>,
}

impl<'r> Writes<'r> {
    /// Whether an earlier delete covers the key. A range that ends at `\0` ("to the end") covers none
    /// here, as etcd has it.
    fn deletes(&self, key: &[u8]) -> bool {
        self.deleted.contains(key)
            || self.deleted_ranges.range(..=key).next_back().is_some_and(|(_, end)| key < *end)
    }

    fn delete_range(&mut self, mut from: &'r [u8], mut end: &'r [u8]) {
        if end <= from {
            return;
        }
        while let Some((&other, &other_end)) = self.deleted_ranges.range(..=end).next_back()
            && other_end >= from
        {
            self.deleted_ranges.remove(other);
            (from, end) = (from.min(other), end.max(other_end));
        }
        self.deleted_ranges.insert(from, end);
    }

    fn put(&mut self, key: &'r [u8]) -> Result<(), CheckError> {
        if self.deletes(key) || !self.puts.insert(key) {
            return Err(CheckError::DuplicateKey);
        }
        Ok(())
    }
}

/// Finds keys that would be written twice in one revision (v3-api 3.6, duplicate-key check).
fn intervals(ops: &[pb::RequestOp]) -> Result<Writes<'_>, CheckError> {
    let mut writes = Writes::default();
    for op in ops {
        if let Some(Op::RequestDeleteRange(delete)) = &op.request {
            if delete.range_end.is_empty() {
                writes.deleted.insert(&delete.key);
            } else {
                writes.delete_range(&delete.key, &delete.range_end);
            }
        }
    }
    for op in ops {
        let Some(Op::RequestTxn(nested)) = &op.request else { continue };
        let then = intervals(&nested.success)?;
        let other = intervals(&nested.failure)?;
        for key in &then.puts {
            writes.put(key)?;
        }
        // Only one of the two branches runs, so a key may be put in both.
        for key in other.puts.difference(&then.puts) {
            writes.put(key)?;
        }
        for branch in [then, other] {
            writes.deleted.extend(branch.deleted);
            for (from, end) in branch.deleted_ranges {
                writes.delete_range(from, end);
            }
        }
    }
    for op in ops {
        if let Some(Op::RequestPut(put)) = &op.request {
            writes.put(&put.key)?;
        }
    }
    Ok(writes)
}

/// Whether every operation of a transaction only reads; a nested transaction counts as a write.
pub fn is_read_only(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|op| matches!(op.request, Some(Op::RequestRange(_))))
}

/// Whether every range of a read-only transaction is serializable; so it is without operations.
pub fn is_serializable(request: &pb::TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|op| matches!(&op.request, Some(Op::RequestRange(range)) if range.serializable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(request: Op) -> pb::RequestOp {
        pb::RequestOp { request: Some(request) }
    }

    fn p(key: &'static str) -> pb::RequestOp {
        op(Op::RequestPut(pb::PutRequest { key: key.into(), ..Default::default() }))
    }

    fn d(key: &'static str, end: &'static str) -> pb::RequestOp {
        op(Op::RequestDeleteRange(pb::DeleteRangeRequest {
            key: key.into(),
            range_end: end.into(),
            prev_kv: false,
        }))
    }

    fn t(success: Vec<pb::RequestOp>, failure: Vec<pb::RequestOp>) -> pb::RequestOp {
        op(Op::RequestTxn(pb::TxnRequest { compare: vec![], success, failure }))
    }

    fn check(success: Vec<pb::RequestOp>) -> Result<(), CheckError> {
        txn(&pb::TxnRequest { compare: vec![], success, failure: vec![] }, 128)
    }

    #[test]
    fn a_key_is_written_once() {
        let dup = Err(CheckError::DuplicateKey);
        assert_eq!(check(vec![p("a"), p("a")]), dup);
        assert_eq!(check(vec![p("a"), d("a", "")]), dup);
        assert_eq!(check(vec![d("a", "c"), p("b")]), dup);
        assert_eq!(check(vec![d("a", "c"), p("c")]), Ok(()));
        assert_eq!(check(vec![d("a", "c"), d("b", "d")]), Ok(()));
        assert_eq!(check(vec![d("a", "\0"), p("b")]), Ok(()), "to-the-end is not seen");
        assert_eq!(check(vec![t(vec![p("k")], vec![p("k")])]), Ok(()));
        assert_eq!(check(vec![t(vec![p("k")], vec![]), p("k")]), dup);
        assert_eq!(check(vec![t(vec![d("k", "")], vec![]), t(vec![p("k")], vec![])]), dup);
        assert_eq!(check(vec![t(vec![p("k")], vec![]), t(vec![d("k", "")], vec![])]), Ok(()));
    }

    #[test]
    fn deleted_ranges_are_found_whatever_their_order() {
        let names: Vec<String> = (0..6).map(|i| i.to_string()).collect();
        let spans: Vec<(usize, usize)> =
            (0..6).flat_map(|from| (0..6).map(move |end| (from, end))).collect();
        for a in &spans {
            for b in &spans {
                for c in spans.iter().step_by(5) {
                    let mut writes = Writes::default();
                    for (from, end) in [a, b, c] {
                        writes.delete_range(names[*from].as_bytes(), names[*end].as_bytes());
                    }
                    for (at, name) in names.iter().enumerate() {
                        let covered =
                            [a, b, c].iter().any(|(from, end)| (*from..*end).contains(&at));
                        assert_eq!(writes.deletes(name.as_bytes()), covered, "{a:?} {b:?} {c:?}");
                    }
                }
            }
        }
    }

    /// Quadratic work on a request of the greatest size would hold up everyone else for minutes.
    #[test]
    fn a_transaction_full_of_deletes_and_puts_is_checked_at_once() {
        let delete = |n: usize| {
            let (key, range_end) = (format!("a{n:07}"), format!("a{n:07}x"));
            op(Op::RequestDeleteRange(pb::DeleteRangeRequest {
                key: key.into(),
                range_end: range_end.into(),
                prev_kv: false,
            }))
        };
        let put = |n: usize| {
            let key = format!("b{n:07}").into();
            op(Op::RequestPut(pb::PutRequest { key, ..Default::default() }))
        };
        let branch = |from: usize, one: &dyn Fn(usize) -> pb::RequestOp| {
            let inner = |from: usize| t((from..from + 40).map(one).collect(), vec![]);
            t((0..40).map(|n| inner(from + n * 40)).collect(), vec![])
        };
        let deletes = (0..20).map(|n| branch(n * 1600, &delete));
        let puts = (0..20).map(|n| branch(n * 1600, &put));
        let ops = deletes.chain(puts).collect();
        let started = std::time::Instant::now();
        assert_eq!(check(ops), Ok(()));
        assert!(started.elapsed() < std::time::Duration::from_secs(5));
    }

    #[test]
    fn shapes_are_bounded() {
        assert_eq!(check(vec![pb::RequestOp::default()]), Err(CheckError::EmptyOp));
        assert_eq!(check(vec![p("")]), Err(CheckError::EmptyKey));
        let keys: Vec<String> = (0..129).map(|i| i.to_string()).collect();
        let puts = |n: usize| {
            keys[..n]
                .iter()
                .map(|key| {
                    op(Op::RequestPut(pb::PutRequest {
                        key: key.clone().into(),
                        ..Default::default()
                    }))
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(check(puts(128)), Ok(()));
        assert_eq!(check(puts(129)), Err(CheckError::TooManyOps));
        assert_eq!(check(vec![t(puts(127), vec![])]), Ok(()));
        assert_eq!(check(vec![t(puts(128), vec![])]), Err(CheckError::TooManyOps));
    }

    #[test]
    fn only_plain_ranges_read() {
        let range = |serializable| {
            op(Op::RequestRange(pb::RangeRequest { serializable, ..Default::default() }))
        };
        let of = |success| pb::TxnRequest { compare: vec![], success, failure: vec![] };
        assert!(is_read_only(&of(vec![])) && is_serializable(&of(vec![])));
        assert!(is_read_only(&of(vec![range(false)])));
        assert!(!is_serializable(&of(vec![range(true), range(false)])));
        assert!(!is_read_only(&of(vec![t(vec![range(true)], vec![])])));
    }

    #[test]
    fn names_have_a_longest() {
        let user = |bytes| pb::AuthUserAddRequest { name: "n".repeat(bytes), ..Default::default() };
        let role = |bytes| pb::AuthRoleAddRequest { name: "n".repeat(bytes) };
        assert_eq!(
            (user_add(&user(NAME_BYTES_MAX)), role_add(&role(NAME_BYTES_MAX))),
            (Ok(()), Ok(()))
        );
        assert_eq!(user_add(&user(NAME_BYTES_MAX + 1)), Err(CheckError::UserNameTooLong));
        assert_eq!(role_add(&role(NAME_BYTES_MAX + 1)), Err(CheckError::RoleNameTooLong));
    }
}
