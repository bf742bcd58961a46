//! Reading back what an engine holds, files of other servers and damaged ones included.

use bytes::Bytes;
use engine_api::{Batch, Durability, Engine, EngineError, Table};
use engine_memory::Memory;
use prost::Message;
use quorate::core::apply::{ApplyError, Effects, Machine, Reply, Restored};
use quorate::core::auth::AuthError;
use quorate::core::command::Request;
use quorate::core::mvcc::Values;
use quorate::core::mvcc::keyspace::revision_key;
use quorate::core::quota::{Quota, Sizes};
use quorate::core::types::Revision;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::mvccpb::KeyValue;

use crate::rig::{Rig, SERVER, TTL_MIN, entry, membership};

fn engine(rows: &[(Table, Bytes, Bytes)]) -> Memory {
    let engine = Memory::new();
    let mut batch = Batch::default();
    for (table, key, value) in rows {
        batch.put(*table, key.clone(), value.clone());
    }
    engine.commit(&batch, Durability::Buffered).unwrap();
    engine
}

fn restore(engine: &Memory) -> Result<Restored, EngineError> {
    Machine::restore(&*engine.view().unwrap(), membership(), TTL_MIN, SERVER)
}

fn row(main: i64, tombstone: bool, kv: KeyValue) -> (Table, Bytes, Bytes) {
    let value = kv.encode_to_vec().into();
    (Table::Key, revision_key(Revision::main(main), tombstone), value)
}

fn kv(key: &'static str, version: i64) -> KeyValue {
    KeyValue {
        key: key.into(),
        create_revision: 2,
        mod_revision: 2,
        version,
        value: "v".into(),
        lease: 0,
    }
}

#[test]
fn a_key_whose_lease_is_gone_stays_and_is_attached_to_nothing() {
    let orphan = KeyValue { lease: 9, ..kv("k", 1) };
    let engine = engine(&[row(2, false, orphan)]);
    let restored = restore(&engine).unwrap();
    assert_eq!(restored.orphans, 1);
    let mut machine = restored.machine;
    assert_eq!(machine.leases.lease_of(b"k"), None);

    // Keeping the lease cannot be done; the transaction around it changes nothing either.
    let keeps = pb::PutRequest { key: "k".into(), ignore_lease: true, ..Default::default() };
    let op = |put| pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put)) };
    let other = pb::PutRequest { key: "other".into(), ..Default::default() };
    let txn = pb::TxnRequest { success: vec![op(other), op(keeps.clone())], ..Default::default() };
    let requests = [
        Request::Put(keeps),
        Request::Txn(txn),
        Request::Put(pb::PutRequest { key: "k".into(), ..Default::default() }),
    ];
    let values = Values::new(&engine);
    let mut effects = Effects::default();
    for (index, request) in (1..).zip(requests) {
        let entry = entry(index, request);
        let quota = Quota::OFF;
        let outcome = machine.apply(&values, &entry, |_| true, quota, Sizes::default, &mut effects);
        let result = outcome.unwrap().expect("a new entry").result;
        if index < 3 {
            assert!(matches!(result, Err(ApplyError::LeaseNotFound(id)) if id.0 == 9));
            assert_eq!((machine.store.now().revision(), machine.store.now().live_keys()), (2, 1));
            assert!(effects.events.is_empty() && machine.store.pending() == 0);
        } else {
            assert!(result.is_ok());
            assert_eq!(machine.store.now().revision(), 3);
        }
    }
}

#[test]
fn the_empty_row_of_a_bumped_revision_is_accepted() {
    let bump = (Table::Key, revision_key(Revision::main(1_000_000), false), Bytes::new());
    let machine = restore(&engine(&[row(2, false, kv("k", 1)), bump])).unwrap().machine;
    assert_eq!(machine.store.now().revision(), 1_000_000);
    assert_eq!(machine.store.now().find(b"k", 1_000_000).unwrap().version, 1);
}

#[test]
fn the_revision_is_at_least_that_of_the_compaction_marks() {
    let mark = |name: &'static str, at| {
        (Table::Meta, Bytes::from_static(name.as_bytes()), revision_key(Revision::main(at), false))
    };
    let rows = [row(2, false, kv("k", 1)), mark("scheduledCompactRev", 9)];
    let restored = restore(&engine(&rows)).unwrap();
    assert_eq!(restored.unfinished, Some(9));
    let now = restored.machine.store.now();
    assert_eq!((now.revision(), now.compact_revision()), (9, 9));

    let rows = [mark("scheduledCompactRev", 9), mark("finishedCompactRev", 9)];
    let restored = restore(&engine(&rows)).unwrap();
    assert_eq!(restored.unfinished, None);
    assert_eq!(restored.machine.store.now().compact_revision(), 9);
}

#[test]
fn damage_is_refused_and_named() {
    let tombstone = || KeyValue { key: "k".into(), ..Default::default() };
    let bytes = |text: &'static [u8]| Bytes::from_static(text);
    let good = || row(2, false, kv("k", 1));
    let revision = |main| revision_key(Revision::main(main), false);
    for (what, bad) in [
        ("not a revision key", vec![(Table::Key, bytes(b"short"), bytes(b""))]),
        ("not a KeyValue", vec![(Table::Key, revision(3), bytes(b"\x0a\xff"))]),
        (
            "a tombstone follows a tombstone",
            vec![row(3, true, tombstone()), row(4, true, tombstone())],
        ),
        ("not a revision key", vec![(Table::Meta, bytes(b"finishedCompactRev"), bytes(b"9"))]),
        ("not 8 bytes", vec![(Table::Meta, bytes(b"consistent_index"), bytes(b"9"))]),
        ("expected 8", vec![(Table::Lease, bytes(b"1"), bytes(b""))]),
        ("varint", vec![(Table::Alarm, bytes(b"\xff"), bytes(b""))]),
        ("not a version", vec![(Table::Cluster, bytes(b"clusterVersion"), bytes(b"x"))]),
        ("not 8 bytes", vec![(Table::Auth, bytes(b"authRevision"), bytes(b"9"))]),
        ("neither 0 nor 1", vec![(Table::Auth, bytes(b"authEnabled"), bytes(b"9"))]),
        ("User", vec![(Table::AuthUsers, bytes(b"u"), bytes(b"\x0a\x09u"))]),
        ("Role", vec![(Table::AuthRoles, bytes(b"r"), bytes(b"\x0a\x09r"))]),
    ] {
        let mut rows = vec![good()];
        rows.extend(bad);
        let error = restore(&engine(&rows)).err().expect(what);
        let corrupt = matches!(error, EngineError::Corrupt { .. });
        assert!(corrupt, "{error}");
        assert!(error.to_string().contains(what), "{error} instead of {what}");
    }
}

fn user_add(name: &str) -> Request {
    Request::AuthUserAdd(pb::AuthUserAddRequest {
        name: name.into(),
        hashed_password: "aGFzaA==".into(),
        ..Default::default()
    })
}

fn role_add(name: &str) -> Request {
    Request::AuthRoleAdd(pb::AuthRoleAddRequest { name: name.into() })
}

fn grant_role(user: &str, role: &str) -> Request {
    let (user, role) = (user.into(), role.into());
    Request::AuthUserGrantRole(pb::AuthUserGrantRoleRequest { user, role })
}

#[test]
fn users_and_roles_outlive_a_restart_and_leave_the_keys_alone() {
    let mut rig = Rig::new();
    let put = pb::PutRequest { key: "k".into(), ..Default::default() };
    rig.apply(Request::Put(put), true).0.unwrap();
    let before = rig.machine.store.now().revision();
    for request in [user_add("u"), user_add("v"), role_add("r"), grant_role("u", "r")] {
        let (outcome, effects) = rig.apply(request, true);
        assert!(matches!(outcome.unwrap().unwrap().result, Ok(Reply::Done)));
        assert!(effects.auth && effects.events.is_empty());
    }
    // What changes nothing is not told as a change.
    let (outcome, effects) = rig.apply(grant_role("u", "r"), true);
    assert!(outcome.unwrap().unwrap().result.is_ok() && !effects.auth);
    let (outcome, effects) = rig.apply(user_add("u"), true);
    let refused = outcome.unwrap().unwrap().result;
    assert!(matches!(refused, Err(ApplyError::Auth(AuthError::UserAlreadyExist))));
    assert!(!effects.auth);
    assert_eq!(rig.machine.store.now().revision(), before);

    rig.flush();
    assert_eq!(rig.stored().len(), 1);
    let kept = rig.machine.auth.clone();
    rig.restart(0);
    assert_eq!(rig.machine.auth, kept);
    let (outcome, _) = rig.apply(Request::AuthStatus(pb::AuthStatusRequest {}), true);
    let Ok(Reply::AuthStatus(status)) = outcome.unwrap().unwrap().result else {
        panic!("a status")
    };
    assert_eq!((status.enabled, status.auth_revision), (false, 5));
}
