//! What a request costs against the space quota, and when it is refused (operations 6.2).

use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::request_op::Request as Op;

use super::command::Request;

const PUT_OVERHEAD: u64 = 256;
const LEASE_OVERHEAD: u64 = 64;

/// The bytes that a request is counted as; 0 if it never needs space.
pub fn cost(request: &Request) -> u64 {
    match request {
        Request::Put(put) => put_cost(put),
        Request::Txn(txn) => txn_cost(txn),
        Request::LeaseGrant(_) => LEASE_OVERHEAD,
        _ => 0,
    }
}

fn put_cost(put: &pb::PutRequest) -> u64 {
    PUT_OVERHEAD + put.key.len() as u64 + put.value.len() as u64
}

fn txn_cost(txn: &pb::TxnRequest) -> u64 {
    let branch = |ops: &[pb::RequestOp]| {
        ops.iter()
            .map(|op| match &op.request {
                Some(Op::RequestPut(put)) => put_cost(put),
                Some(Op::RequestTxn(nested)) => txn_cost(nested),
                _ => 0,
            })
            .sum::<u64>()
    };
    branch(&txn.success).max(branch(&txn.failure))
}

/// The quota in force: `None` when it is switched off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota(pub Option<u64>);

impl Quota {
    /// Whether a request of this cost no longer fits beside `size` bytes; a cost of 0 always fits.
    pub fn exceeded(self, size: u64, cost: u64) -> bool {
        self.0.is_some_and(|quota| cost > 0 && size.saturating_add(cost) >= quota)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_costs_its_larger_branch() {
        let put = |len: usize| pb::RequestOp {
            request: Some(Op::RequestPut(pb::PutRequest {
                key: "k".into(),
                value: vec![0; len].into(),
                ..Default::default()
            })),
        };
        let nested = pb::TxnRequest { success: vec![put(9)], ..Default::default() };
        let txn = pb::TxnRequest {
            success: vec![put(9), pb::RequestOp { request: Some(Op::RequestTxn(nested)) }],
            failure: vec![put(99)],
            ..Default::default()
        };
        assert_eq!(cost(&Request::Txn(txn)), 2 * (256 + 10));
        assert_eq!(cost(&Request::LeaseGrant(Default::default())), 64);
        assert_eq!(cost(&Request::DeleteRange(Default::default())), 0);
    }

    #[test]
    fn what_costs_nothing_always_fits() {
        let quota = Quota(Some(1000));
        assert!(!quota.exceeded(5000, 0));
        assert!(quota.exceeded(900, 100));
        assert!(!quota.exceeded(899, 100));
        assert!(!Quota(None).exceeded(u64::MAX, 1));
    }
}
