//! Executing writes: put, delete, transaction (v3-api 3.5 and 3.6).

use bytes::Bytes;
use prost::Message;
use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate_proto::etcdserverpb::request_op::Request as Op;
use quorate_proto::etcdserverpb::response_op::Response as OpResponse;
use quorate_proto::mvccpb::KeyValue;

use super::keyspace::tombstone_event;
use super::{KeyRange, ReadError, Snapshot, Store, Values};
use crate::core::event::{Event, EventKind};
use crate::core::lease::LeaseTable;
use crate::core::types::{LeaseId, Revision};

/// Why a write is refused; the same on every member.
#[derive(thiserror::Error, Debug)]
pub enum TxnError {
    #[error("lease {0} is not known")]
    LeaseNotFound(LeaseId),
    #[error("the key whose value or lease is to be kept does not exist")]
    KeyNotFound,
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// One transaction in progress: everything it changes gets the revision `main`.
pub struct Txn<'a, 'e> {
    pub store: &'a mut Store,
    pub leases: &'a mut LeaseTable,
    pub values: &'a Values<'e>,
    /// What changed, in order.
    pub events: &'a mut Vec<Event>,
    /// Whether someone waits for the answer: ranges of a write need not run otherwise.
    pub answered: bool,
    changes: i64,
}

fn header(revision: i64) -> Option<pb::ResponseHeader> {
    Some(pb::ResponseHeader { revision, ..Default::default() })
}

impl<'a, 'e> Txn<'a, 'e> {
    /// Begins a transaction.
    pub fn begin(
        store: &'a mut Store,
        leases: &'a mut LeaseTable,
        values: &'a Values<'e>,
        events: &'a mut Vec<Event>,
        answered: bool,
    ) -> Self {
        Txn { store, leases, values, events, answered, changes: 0 }
    }

    fn now(&self) -> &Snapshot {
        &self.store.now
    }

    /// The revision that a reader inside the transaction sees.
    fn revision(&self) -> i64 {
        self.store.now.revision
    }

    /// The place of the next change. The first one moves the store to its new revision.
    fn next_revision(&mut self) -> Revision {
        if self.changes == 0 {
            self.store.now.revision += 1;
        }
        let revision = Revision { main: self.store.now.revision, sub: self.changes };
        self.changes += 1;
        revision
    }

    fn current(&self, key: &[u8]) -> Option<super::key_index::Found> {
        self.now().find(key, i64::MAX)
    }

    /// Executes a put.
    ///
    /// # Errors
    /// `LeaseNotFound`, `KeyNotFound`, `Read`; nothing is changed then.
    pub fn put(&mut self, request: &pb::PutRequest) -> Result<pb::PutResponse, TxnError> {
        let lease = LeaseId(request.lease);
        if lease.0 != 0 && !self.leases.contains(lease) {
            return Err(TxnError::LeaseNotFound(lease));
        }
        let history = self.now().index.get(&request.key[..]);
        let (known, found) = (history.is_some(), history.and_then(|h| h.get(i64::MAX)));
        let keeps = request.ignore_value || request.ignore_lease;
        let mut previous = None;
        if let Some(found) = found
            && (keeps || (request.prev_kv && self.answered))
        {
            previous = Some(self.now().value(self.values, found.modified)?);
        }
        let (mut value, mut lease) = (request.value.clone(), lease);
        if keeps {
            let Some(bytes) = &previous else { return Err(TxnError::KeyNotFound) };
            let modified = found.map(|f| f.modified).unwrap_or_default();
            let kept = bytes.parse().map_err(|_| ReadError::Damaged(modified))?;
            if request.ignore_value {
                value = kept.value;
            }
            if request.ignore_lease {
                lease = LeaseId(kept.lease);
                // A file of another server may hold a key whose lease is gone.
                if lease.0 != 0 && !self.leases.contains(lease) {
                    return Err(TxnError::LeaseNotFound(lease));
                }
            }
        }
        let revision = self.next_revision();
        let kv = KeyValue {
            key: request.key.clone(),
            create_revision: found.map_or(revision.main, |f| f.created.main),
            mod_revision: revision.main,
            version: found.map_or(1, |f| f.version + 1),
            value,
            lease: lease.0,
        };
        let stored = KeyValueBytes(kv.encode_to_vec().into());
        self.store.put(&request.key, revision, stored.clone(), known);
        if lease.0 == 0 {
            self.leases.detach(&request.key);
        } else {
            self.leases.attach(&request.key, lease).map_err(|_| TxnError::LeaseNotFound(lease))?;
        }
        self.events.push(Event {
            key: request.key.clone(),
            revision,
            kind: EventKind::Put { creation: found.is_none() },
            kv: stored,
        });
        Ok(pb::PutResponse {
            header: header(self.revision()),
            prev_kv: previous.filter(|_| request.prev_kv),
        })
    }

    /// Executes a delete of one key or a range, keys in order.
    ///
    /// # Errors
    /// `Read`; nothing is changed then.
    pub fn delete_range(
        &mut self,
        request: &pb::DeleteRangeRequest,
    ) -> Result<pb::DeleteRangeResponse, TxnError> {
        let mut doomed: Vec<(Bytes, Revision)> = Vec::new();
        match KeyRange::of(&request.key, &request.range_end) {
            Some(range) => self.now().visit(range, i64::MAX, |key, found| {
                doomed.push((Bytes::copy_from_slice(key), found.modified));
                true
            }),
            None => {
                doomed.extend(self.current(&request.key).map(|f| (request.key.clone(), f.modified)))
            }
        }
        let mut prev_kvs = Vec::new();
        if request.prev_kv && self.answered {
            for (_, modified) in &doomed {
                prev_kvs.push(self.now().value(self.values, *modified)?);
            }
        }
        let deleted = doomed.len() as i64;
        for (key, _) in doomed {
            self.delete(key);
        }
        Ok(pb::DeleteRangeResponse { header: header(self.revision()), deleted, prev_kvs })
    }

    /// Deletes a key that exists.
    pub fn delete(&mut self, key: Bytes) {
        let revision = self.next_revision();
        self.store.tombstone(&key, revision);
        self.leases.detach(&key);
        let kv = tombstone_event(&key, revision.main);
        self.events.push(Event { key, revision, kind: EventKind::Delete, kv });
    }

    /// Reads inside the transaction: earlier operations of it are seen.
    fn range(&self, request: &pb::RangeRequest) -> Result<pb::RangeResponse, TxnError> {
        let ranged = self.now().range(self.values, request)?;
        Ok(pb::RangeResponse {
            header: header(self.revision()),
            kvs: ranged.kvs,
            more: ranged.more,
            count: ranged.count,
        })
    }

    /// Executes a transaction: compares at its start, then checks, then the chosen operations.
    ///
    /// # Errors
    /// What a chosen operation is refused for; nothing is changed then.
    pub fn txn(&mut self, request: &pb::TxnRequest) -> Result<pb::TxnResponse, TxnError> {
        let chosen = choose(self.now(), self.values, request)?;
        check(self.now(), Some(self.leases), &chosen)?;
        // A put that keeps a value passed the check, but an earlier operation may delete its key.
        let undo = chosen.keeps().then(|| (self.store.clone(), self.leases.clone()));
        let events = self.events.len();
        match self.execute(&chosen) {
            Ok(mut response) => {
                response.header = header(self.revision());
                Ok(response)
            }
            Err(error) => {
                if let Some((store, leases)) = undo {
                    *self.store = store;
                    *self.leases = leases;
                    self.events.truncate(events);
                    self.changes = 0;
                }
                Err(error)
            }
        }
    }

    fn execute(&mut self, chosen: &Chosen<'_>) -> Result<pb::TxnResponse, TxnError> {
        let mut responses = Vec::with_capacity(chosen.ops.len());
        for op in &chosen.ops {
            let response = match op {
                ChosenOp::Range(_) if !self.answered => OpResponse::ResponseRange(<_>::default()),
                ChosenOp::Range(request) => OpResponse::ResponseRange(self.range(request)?),
                ChosenOp::Put(request) => OpResponse::ResponsePut(self.put(request)?),
                ChosenOp::Delete(request) => {
                    OpResponse::ResponseDeleteRange(self.delete_range(request)?)
                }
                ChosenOp::Txn(chosen) => OpResponse::ResponseTxn(self.execute(chosen)?),
            };
            responses.push(pb::ResponseOp { response: Some(response) });
        }
        Ok(pb::TxnResponse {
            header: Some(pb::ResponseHeader::default()),
            succeeded: chosen.succeeded,
            responses,
        })
    }
}

/// Answers a transaction that only reads.
///
/// # Errors
/// As [`Txn::txn`].
pub fn read_only(
    now: &Snapshot,
    values: &Values<'_>,
    request: &pb::TxnRequest,
) -> Result<pb::TxnResponse, TxnError> {
    let chosen = choose(now, values, request)?;
    check(now, None, &chosen)?;
    let mut responses = Vec::with_capacity(chosen.ops.len());
    for op in &chosen.ops {
        let ChosenOp::Range(request) = op else {
            unreachable!("a transaction with a write goes through the log");
        };
        let ranged = now.range(values, request)?;
        responses.push(pb::ResponseOp {
            response: Some(OpResponse::ResponseRange(pb::RangeResponse {
                header: header(now.revision),
                kvs: ranged.kvs,
                more: ranged.more,
                count: ranged.count,
            })),
        });
    }
    Ok(pb::TxnResponse { header: header(now.revision), succeeded: chosen.succeeded, responses })
}

/// The operations that a transaction's compares chose, nested ones resolved.
struct Chosen<'r> {
    succeeded: bool,
    ops: Vec<ChosenOp<'r>>,
}

enum ChosenOp<'r> {
    Range(&'r pb::RangeRequest),
    Put(&'r pb::PutRequest),
    Delete(&'r pb::DeleteRangeRequest),
    Txn(Chosen<'r>),
}

impl Chosen<'_> {
    /// Whether some put keeps a value or a lease.
    fn keeps(&self) -> bool {
        self.ops.iter().any(|op| match op {
            ChosenOp::Put(put) => put.ignore_value || put.ignore_lease,
            ChosenOp::Txn(chosen) => chosen.keeps(),
            ChosenOp::Range(_) | ChosenOp::Delete(_) => false,
        })
    }
}

fn choose<'r>(
    now: &Snapshot,
    values: &Values<'_>,
    request: &'r pb::TxnRequest,
) -> Result<Chosen<'r>, ReadError> {
    let mut succeeded = true;
    for compare in &request.compare {
        if !holds(now, values, compare)? {
            succeeded = false;
            break;
        }
    }
    let branch = if succeeded { &request.success } else { &request.failure };
    let ops = branch
        .iter()
        .filter_map(|op| match op.request.as_ref()? {
            Op::RequestRange(request) => Some(Ok(ChosenOp::Range(request))),
            Op::RequestPut(request) => Some(Ok(ChosenOp::Put(request))),
            Op::RequestDeleteRange(request) => Some(Ok(ChosenOp::Delete(request))),
            Op::RequestTxn(nested) => Some(choose(now, values, nested).map(ChosenOp::Txn)),
        })
        .collect::<Result<_, _>>()?;
    Ok(Chosen { succeeded, ops })
}

/// Whether the guard holds for its key, or for every key of its range.
fn holds(now: &Snapshot, values: &Values<'_>, compare: &pb::Compare) -> Result<bool, ReadError> {
    let mut rows = Vec::new();
    match KeyRange::of(&compare.key, &compare.range_end) {
        Some(range) => now.visit(range, i64::MAX, |_, found| {
            rows.push(found);
            true
        }),
        None => rows.extend(now.find(&compare.key, i64::MAX)),
    }
    let target = CompareTarget::try_from(compare.target);
    if rows.is_empty() {
        // A missing key has no value that could be compared, and zeros otherwise.
        return Ok(target != Ok(CompareTarget::Value) && satisfied(compare, &KeyValue::default()));
    }
    for found in rows {
        let kv = match target {
            Ok(CompareTarget::Value | CompareTarget::Lease) => now
                .value(values, found.modified)?
                .parse()
                .map_err(|_| ReadError::Damaged(found.modified))?,
            _ => KeyValue {
                create_revision: found.created.main,
                mod_revision: found.modified.main,
                version: found.version,
                ..Default::default()
            },
        };
        if !satisfied(compare, &kv) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn satisfied(compare: &pb::Compare, kv: &KeyValue) -> bool {
    let number = |mine: i64, pick: fn(&TargetUnion) -> Option<i64>| {
        mine.cmp(&compare.target_union.as_ref().and_then(pick).unwrap_or(0))
    };
    let order = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Version) => number(kv.version, |u| match u {
            TargetUnion::Version(n) => Some(*n),
            _ => None,
        }),
        Ok(CompareTarget::Create) => number(kv.create_revision, |u| match u {
            TargetUnion::CreateRevision(n) => Some(*n),
            _ => None,
        }),
        Ok(CompareTarget::Mod) => number(kv.mod_revision, |u| match u {
            TargetUnion::ModRevision(n) => Some(*n),
            _ => None,
        }),
        Ok(CompareTarget::Lease) => number(kv.lease, |u| match u {
            TargetUnion::Lease(n) => Some(*n),
            _ => None,
        }),
        Ok(CompareTarget::Value) => match &compare.target_union {
            Some(TargetUnion::Value(value)) => kv.value.cmp(value),
            _ => kv.value.cmp(&Bytes::new()),
        },
        Err(_) => std::cmp::Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Err(_) => true,
    }
}

/// Checks the chosen operations before anything changes (v3-api 3.6, step 6): first every put, those of
/// nested transactions too, then every range. What is refused first is what the client is told.
fn check(now: &Snapshot, leases: Option<&LeaseTable>, chosen: &Chosen<'_>) -> Result<(), TxnError> {
    check_puts(now, leases, chosen)?;
    check_ranges(now, chosen)
}

fn check_puts(
    now: &Snapshot,
    leases: Option<&LeaseTable>,
    chosen: &Chosen<'_>,
) -> Result<(), TxnError> {
    for op in &chosen.ops {
        match op {
            ChosenOp::Put(request) => {
                // The other way around than for a put by itself, as in etcd.
                if (request.ignore_value || request.ignore_lease)
                    && now.find(&request.key, i64::MAX).is_none()
                {
                    return Err(TxnError::KeyNotFound);
                }
                let lease = LeaseId(request.lease);
                if lease.0 != 0 && !leases.is_some_and(|leases| leases.contains(lease)) {
                    return Err(TxnError::LeaseNotFound(lease));
                }
            }
            ChosenOp::Txn(nested) => check_puts(now, leases, nested)?,
            ChosenOp::Range(_) | ChosenOp::Delete(_) => {}
        }
    }
    Ok(())
}

fn check_ranges(now: &Snapshot, chosen: &Chosen<'_>) -> Result<(), TxnError> {
    for op in &chosen.ops {
        match op {
            ChosenOp::Range(request) if request.revision != 0 => {
                now.check_readable(request.revision)?;
            }
            ChosenOp::Txn(nested) => check_ranges(now, nested)?,
            ChosenOp::Range(_) | ChosenOp::Put(_) | ChosenOp::Delete(_) => {}
        }
    }
    Ok(())
}
