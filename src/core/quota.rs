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

/// What a member's engine occupies, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sizes {
    /// What holds data: the rest of `physical` is free for reuse.
    pub live: u64,
    /// All that is taken from the disk.
    pub physical: u64,
}

/// Which of the two bounds of a [`Quota`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    Live,
    Physical,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Limit::Live => "live bytes",
            Limit::Physical => "physical bytes",
        })
    }
}

/// The quota in force: a request that needs space is refused when its cost and the live bytes reach the
/// first bound, or its cost and the physical bytes the second; `None` is no bound.
///
/// etcd knows one bound, on the size of its file. There, what is deleted and compacted counts until the
/// file is defragmented. Here it counts no longer: its space is used again. The second bound is for the
/// disk, which free space in a file fills as much as data does; the copy that a defragmentation makes for
/// the time being is not counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    pub live: Option<u64>,
    pub physical: Option<u64>,
}

impl Quota {
    /// Everything fits.
    pub const OFF: Quota = Quota { live: None, physical: None };

    /// Space is back when both sizes are below this share of their bounds, in percent: so much must
    /// become free that the next writes do not fill it at once.
    pub const BACK_PERCENT: u64 = 90;

    /// The bound on physical bytes that goes with one on live bytes unless it is set: twice that, and at
    /// least a GiB more. Engines hold up to as much free as used, and a log or journal of their own.
    pub fn physical_default(live: u64) -> u64 {
        live.saturating_mul(2).max(live.saturating_add(1 << 30))
    }

    /// The bound that a request of this cost does not keep beside what is there; a cost of 0 always fits.
    pub fn exceeded(self, sizes: Sizes, cost: u64) -> Option<Limit> {
        let full = |bound: Option<u64>, size: u64| {
            bound.is_some_and(|bound| cost > 0 && size.saturating_add(cost) >= bound)
        };
        if full(self.live, sizes.live) {
            Some(Limit::Live)
        } else if full(self.physical, sizes.physical) {
            Some(Limit::Physical)
        } else {
            None
        }
    }

    /// Whether so much is free that a NOSPACE alarm may be lifted.
    pub fn is_back(self, sizes: Sizes) -> bool {
        let back = |bound: Option<u64>, size: u64| {
            let below = |bound| u128::from(bound) * u128::from(Self::BACK_PERCENT) / 100;
            bound.is_none_or(|bound| u128::from(size) < below(bound))
        };
        back(self.live, sizes.live) && back(self.physical, sizes.physical)
    }
}

/// When a member lifts its own NOSPACE alarm: one that it has raised, as soon as its space is back. One
/// that somebody else has raised in its name stays until somebody lifts it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recovery {
    /// This member has asked for its alarm.
    own: bool,
    /// The alarm was in force the last time.
    in_force: bool,
}

impl Recovery {
    /// After a start. An alarm from before was raised by this member, as far as anybody can tell.
    pub fn new(in_force: bool) -> Self {
        Recovery { own: in_force, in_force }
    }

    /// Whether to ask for the end of the alarm now. Asked again at each step until it has ended.
    ///
    /// `raised`: this member has asked for the alarm since the last step; `in_force`: it is in force;
    /// `is_back`: [`Quota::is_back`].
    pub fn step(&mut self, raised: bool, in_force: bool, is_back: bool) -> bool {
        if self.in_force && !in_force {
            self.own = false;
        }
        self.own |= raised;
        self.in_force = in_force;
        self.own && in_force && is_back
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
        let quota = Quota { live: Some(1000), physical: Some(5000) };
        let exceeded = |live, physical, cost| quota.exceeded(Sizes { live, physical }, cost);
        assert_eq!(exceeded(5000, 9000, 0), None);
        assert_eq!(exceeded(900, 4000, 100), Some(Limit::Live));
        assert_eq!(exceeded(899, 4000, 100), None, "free space is no data");
        assert_eq!(exceeded(100, 4900, 100), Some(Limit::Physical));
        assert_eq!(exceeded(u64::MAX, 0, 1), Some(Limit::Live));
        let all = Sizes { live: u64::MAX, physical: u64::MAX };
        assert_eq!(Quota::OFF.exceeded(all, 1), None);
    }

    #[test]
    fn space_is_back_when_both_sizes_are_well_below_their_bounds() {
        let quota = Quota { live: Some(1000), physical: Some(5000) };
        let is_back = |live, physical| quota.is_back(Sizes { live, physical });
        assert!(is_back(899, 4499));
        assert!(!is_back(900, 4499) && !is_back(899, 4500));
        let huge = Quota { live: Some(u64::MAX), physical: None };
        assert!(huge.is_back(Sizes { live: u64::MAX / 2, physical: u64::MAX }));
        assert!(!huge.is_back(Sizes { live: u64::MAX, physical: 0 }));
        assert!(Quota::OFF.is_back(Sizes { live: u64::MAX, physical: u64::MAX }));
        assert_eq!(Quota::physical_default(4 << 30), 8 << 30);
        assert_eq!(Quota::physical_default(1 << 20), (1 << 20) + (1 << 30));
    }

    #[test]
    fn a_member_lifts_the_alarm_that_it_has_raised() {
        let mut recovery = Recovery::new(false);
        assert!(!recovery.step(true, false, true), "it is not in force yet");
        assert!(!recovery.step(false, true, false), "nothing is free yet");
        assert!(recovery.step(false, true, true));
        assert!(recovery.step(false, true, true), "it was lost on the way");
        assert!(!recovery.step(false, false, true), "it has ended");
        assert!(!recovery.step(false, true, true), "somebody else has raised this one");
        assert!(!recovery.step(false, false, true));
        assert!(!recovery.step(true, false, true) && recovery.step(false, true, true), "once more");
        // Lifted by hand and raised again between two steps.
        assert!(!recovery.step(true, true, false) && recovery.step(false, true, true));
        assert!(Recovery::new(true).step(false, true, true), "it was there at the start");
    }
}
