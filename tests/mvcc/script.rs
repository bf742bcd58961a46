//! Readable scripts in tests/scripts/mvcc: a line `> command` is followed by what it answers.
//! `REWRITE_SCRIPTS=1` writes the answers anew; a line `# --- title` begins with an empty store.
//!
//! A request passes the checks at the door first, as a client's does, and goes through the log unless
//! it only reads. `force` skips the door: an entry that another server let in. `silent` applies it
//! where nobody waits for the answer.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::Path;

use bytes::Bytes;
use engine_api::{Engine, Table};
use prost::Message;
use quorate::core::apply::{Kind, LeaseChange, Reply};
use quorate::core::check::{self, CheckError};
use quorate::core::command::Request;
use quorate::core::event::EventKind;
use quorate::core::mvcc::history::event;
use quorate::core::mvcc::txn::{TxnError, read_only};
use quorate::core::mvcc::{ReadError, Values};
use quorate::core::quota::Quota;
use quorate_proto::KeyValueBytes;
use quorate_proto::etcdserverpb as pb;
use quorate_proto::etcdserverpb::compare::TargetUnion;
use quorate_proto::etcdserverpb::request_op::Request as Op;
use quorate_proto::etcdserverpb::response_op::Response;
use quorate_proto::{membershippb, raftpb};

use crate::rig::{Rig, entry};

/// Operations that a transaction of a script may have.
const OPS_MAX: usize = 8;

/// `\0` and `\xff` stand for bytes, `""` for none.
fn bytes(text: &str) -> Bytes {
    let mut out = Vec::new();
    let mut rest = if text == "\"\"" { "" } else { text };
    while let Some(c) = rest.chars().next() {
        rest = if let Some(after) = rest.strip_prefix("\\0") {
            out.push(0);
            after
        } else if let Some(after) = rest.strip_prefix("\\x") {
            out.push(u8::from_str_radix(&after[..2], 16).unwrap());
            &after[2..]
        } else {
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            &rest[c.len_utf8()..]
        };
    }
    out.into()
}

fn text(bytes: &[u8]) -> String {
    match bytes {
        [] => "\"\"".into(),
        bytes => bytes.escape_ascii().to_string().replace("\\x00", "\\0"),
    }
}

/// `key` or `key..end`.
fn key_range(word: &str) -> (Bytes, Bytes) {
    match word.split_once("..") {
        Some((from, end)) => (bytes(from), bytes(end)),
        None => (bytes(word), Bytes::new()),
    }
}

fn range(words: &[&str]) -> pb::RangeRequest {
    let (key, range_end) = key_range(words[0]);
    let mut range = pb::RangeRequest { key, range_end, ..Default::default() };
    for word in &words[1..] {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let number = || value.parse().unwrap();
        match name {
            "rev" => range.revision = number(),
            "limit" => range.limit = number(),
            "min-mod" => range.min_mod_revision = number(),
            "max-mod" => range.max_mod_revision = number(),
            "min-create" => range.min_create_revision = number(),
            "max-create" => range.max_create_revision = number(),
            "keys-only" => range.keys_only = true,
            "count-only" => range.count_only = true,
            "serializable" => range.serializable = true,
            "order" => {
                let names = ["none", "ascend", "descend"];
                let known = names.iter().position(|name| *name == value).map(|at| at as i32);
                range.sort_order = known.unwrap_or_else(|| value.parse().unwrap());
            }
            "by" => {
                let names = ["key", "version", "create", "mod", "value"];
                let known = names.iter().position(|name| *name == value).map(|at| at as i32);
                range.sort_target = known.unwrap_or_else(|| value.parse().unwrap());
            }
            _ => panic!("no option {word}"),
        }
    }
    range
}

fn put(words: &[&str]) -> pb::PutRequest {
    let mut put =
        pb::PutRequest { key: bytes(words[0]), value: bytes(words[1]), ..Default::default() };
    for word in &words[2..] {
        match word.split_once('=') {
            Some(("lease", id)) => put.lease = id.parse().unwrap(),
            None if *word == "prev" => put.prev_kv = true,
            None if *word == "ignore-value" => put.ignore_value = true,
            None if *word == "ignore-lease" => put.ignore_lease = true,
            _ => panic!("no option {word}"),
        }
    }
    put
}

fn delete(words: &[&str]) -> pb::DeleteRangeRequest {
    let (key, range_end) = key_range(words[0]);
    pb::DeleteRangeRequest { key, range_end, prev_kv: words.get(1) == Some(&"prev") }
}

/// `target key = operand`; an operand `-` is none, `member:operand` another member of the union.
fn compare(words: &[&str]) -> pb::Compare {
    let [target, key, result, operand] = words else { panic!("no compare: {words:?}") };
    let names = ["version", "create", "mod", "value", "lease"];
    let (key, range_end) = key_range(key);
    let (member, operand) = operand.split_once(':').unwrap_or((target, operand));
    let number = || operand.parse().unwrap();
    let target = names.iter().position(|name| name == target).map(|at| at as i32);
    let result = ["=", ">", "<", "!="].iter().position(|sign| sign == result).map(|at| at as i32);
    pb::Compare {
        target: target.unwrap_or(9),
        result: result.unwrap_or(9),
        key,
        range_end,
        target_union: match member {
            _ if operand == "-" => None,
            "version" => Some(TargetUnion::Version(number())),
            "create" => Some(TargetUnion::CreateRevision(number())),
            "mod" => Some(TargetUnion::ModRevision(number())),
            "value" => Some(TargetUnion::Value(bytes(operand))),
            "lease" => Some(TargetUnion::Lease(number())),
            other => panic!("no member {other}"),
        },
    }
}

/// `[if compare and compare] [then op ; op] [else op ; op]`, ended by `}` or the last word.
fn txn<'w>(words: &mut std::iter::Peekable<std::slice::Iter<'_, &'w str>>) -> pb::TxnRequest {
    let mut txn = pb::TxnRequest::default();
    let mut part = "";
    let mut gathered: Vec<&'w str> = Vec::new();
    loop {
        let word = words.next().copied().unwrap_or("}");
        if let "if" | "then" | "else" | "and" | ";" | "}" = word {
            if !gathered.is_empty() {
                match part {
                    "if" => txn.compare.push(compare(&gathered)),
                    "then" => txn.success.push(op(&gathered)),
                    "else" => txn.failure.push(op(&gathered)),
                    _ => panic!("a transaction begins with if, then or else: {gathered:?}"),
                }
                gathered.clear();
            }
            if word == "}" {
                return txn;
            }
            if let "if" | "then" | "else" = word {
                part = word;
            }
        } else if word == "{" {
            let nested = Some(Op::RequestTxn(self::txn(words)));
            let ops = if part == "then" { &mut txn.success } else { &mut txn.failure };
            ops.push(pb::RequestOp { request: nested });
        } else {
            gathered.push(word);
        }
    }
}

fn op(words: &[&str]) -> pb::RequestOp {
    let request = match words[0] {
        "range" => Some(Op::RequestRange(range(&words[1..]))),
        "put" => Some(Op::RequestPut(put(&words[1..]))),
        "del" => Some(Op::RequestDeleteRange(delete(&words[1..]))),
        "unset" => None,
        other => panic!("no operation {other}"),
    };
    pb::RequestOp { request }
}

fn request(words: &[&str]) -> Option<Request> {
    let rest = &words[1..];
    let id = || rest[0].parse().unwrap();
    Some(match words[0] {
        "range" => Request::Range(range(rest)),
        "put" => Request::Put(put(rest)),
        "del" => Request::DeleteRange(delete(rest)),
        "txn" => Request::Txn(txn(&mut rest.iter().peekable())),
        "compact" => Request::Compaction(pb::CompactionRequest { revision: id(), physical: false }),
        "grant" => {
            Request::LeaseGrant(pb::LeaseGrantRequest { id: id(), ttl: rest[1].parse().unwrap() })
        }
        "version" => Request::ClusterVersionSet(membershippb::ClusterVersionSetRequest {
            ver: rest[0].into(),
        }),
        "revoke" => Request::LeaseRevoke(pb::LeaseRevokeRequest { id: id() }),
        "checkpoint" => Request::LeaseCheckpoint(pb::LeaseCheckpointRequest {
            checkpoints: vec![pb::LeaseCheckpoint {
                id: id(),
                remaining_ttl: rest[1].parse().unwrap(),
            }],
        }),
        "alarm" => {
            let kinds = ["none", "nospace", "corrupt"];
            let known = kinds.iter().position(|kind| *kind == rest[1]).map(|at| at as i32);
            Request::Alarm(pb::AlarmRequest {
                action: match rest[0] {
                    "get" => 0,
                    "activate" => 1,
                    "deactivate" => 2,
                    other => other.parse().unwrap(),
                },
                alarm: known.unwrap_or_else(|| rest[1].parse().unwrap()),
                member_id: rest.get(2).map_or(0, |id| id.parse().unwrap()),
            })
        }
        _ => return None,
    })
}

fn show_kv(kv: &KeyValueBytes) -> String {
    let kv = kv.parse().unwrap();
    let mut line = format!(
        "{}={} create={} mod={} version={}",
        text(&kv.key),
        text(&kv.value),
        kv.create_revision,
        kv.mod_revision,
        kv.version
    );
    if kv.lease != 0 {
        write!(line, " lease={}", kv.lease).unwrap();
    }
    line
}

/// Inner headers hold nothing but a revision.
fn revision(header: &Option<pb::ResponseHeader>) -> i64 {
    let header = header.expect("every response has a header");
    assert_eq!(header, pb::ResponseHeader { revision: header.revision, ..Default::default() });
    header.revision
}

fn show_range(reply: &pb::RangeResponse, indent: &str, out: &mut String) {
    let more = if reply.more { " more" } else { "" };
    writeln!(out, "{indent}rev={} count={}{more}", revision(&reply.header), reply.count).unwrap();
    for kv in &reply.kvs {
        writeln!(out, "{indent}  {}", show_kv(kv)).unwrap();
    }
}

fn show_put(reply: &pb::PutResponse, indent: &str, out: &mut String) {
    writeln!(out, "{indent}rev={}", revision(&reply.header)).unwrap();
    if let Some(kv) = &reply.prev_kv {
        writeln!(out, "{indent}  was {}", show_kv(kv)).unwrap();
    }
}

fn show_delete(reply: &pb::DeleteRangeResponse, indent: &str, out: &mut String) {
    writeln!(out, "{indent}rev={} deleted={}", revision(&reply.header), reply.deleted).unwrap();
    for kv in &reply.prev_kvs {
        writeln!(out, "{indent}  was {}", show_kv(kv)).unwrap();
    }
}

fn show_txn(reply: &pb::TxnResponse, indent: &str, out: &mut String) {
    let verdict = if reply.succeeded { "succeeded" } else { "failed" };
    writeln!(out, "{indent}rev={} {verdict}", revision(&reply.header)).unwrap();
    let deeper = &format!("{indent}  ");
    for response in &reply.responses {
        match response.response.as_ref().expect("every operation has its response") {
            Response::ResponseRange(reply) => {
                write!(out, "{indent}- range ").unwrap();
                let mut body = String::new();
                show_range(reply, deeper, &mut body);
                out.push_str(body.trim_start());
            }
            Response::ResponsePut(reply) => {
                write!(out, "{indent}- put ").unwrap();
                let mut body = String::new();
                show_put(reply, deeper, &mut body);
                out.push_str(body.trim_start());
            }
            Response::ResponseDeleteRange(reply) => {
                write!(out, "{indent}- del ").unwrap();
                let mut body = String::new();
                show_delete(reply, deeper, &mut body);
                out.push_str(body.trim_start());
            }
            Response::ResponseTxn(reply) => {
                write!(out, "{indent}- txn ").unwrap();
                let mut body = String::new();
                show_txn(reply, deeper, &mut body);
                out.push_str(body.trim_start());
            }
        }
    }
}

fn show_reply(reply: &Reply, out: &mut String) {
    match reply {
        Reply::Range(reply) => show_range(reply, "", out),
        Reply::Put(reply) => show_put(reply, "", out),
        Reply::DeleteRange(reply) => show_delete(reply, "", out),
        Reply::Txn(reply) => show_txn(reply, "", out),
        Reply::Compact(reply) => writeln!(out, "rev={}", revision(&reply.header)).unwrap(),
        Reply::LeaseGrant(reply) => {
            assert_eq!(reply.error, "", "the field is never set");
            let rev = revision(&reply.header);
            writeln!(out, "rev={rev} id={} ttl={}", reply.id, reply.ttl).unwrap();
        }
        Reply::LeaseRevoke(reply) => writeln!(out, "rev={}", revision(&reply.header)).unwrap(),
        Reply::LeaseCheckpoint(reply) => writeln!(out, "rev={}", revision(&reply.header)).unwrap(),
        Reply::Alarm(reply) => {
            write!(out, "rev={}", revision(&reply.header)).unwrap();
            for alarm in &reply.alarms {
                let kind = pb::AlarmType::try_from(alarm.alarm)
                    .map_or_else(|_| alarm.alarm.to_string(), |kind| kind.as_str_name().into());
                write!(out, " {}:{kind}", alarm.member_id).unwrap();
            }
            out.push('\n');
        }
        Reply::Done => out.push_str("done\n"),
        other => panic!("no script asks for {other:?}"),
    }
}

struct Script {
    rig: Rig,
}

impl Script {
    fn new() -> Self {
        Script { rig: Rig::new() }
    }

    fn at_the_door(request: &Request) -> Result<(), CheckError> {
        match request {
            Request::Range(request) => check::range(request),
            Request::Put(request) => check::put(request),
            Request::DeleteRange(request) => check::delete_range(request),
            Request::Txn(request) => check::txn(request, OPS_MAX),
            _ => Ok(()),
        }
    }

    /// What a client reads without the log.
    fn read(&self, request: &Request) -> Option<Result<Reply, String>> {
        let now = self.rig.machine.store.now();
        let values = Values::new(&*self.rig.engine);
        match request {
            Request::Range(request) => {
                Some(now.range(&values, request).map_err(|error| error.to_string()).map(|ranged| {
                    Reply::Range(pb::RangeResponse {
                        header: Some(pb::ResponseHeader {
                            revision: now.revision(),
                            ..Default::default()
                        }),
                        kvs: ranged.kvs,
                        more: ranged.more,
                        count: ranged.count,
                    })
                }))
            }
            Request::Txn(request) if check::is_read_only(request) => {
                let refused = |error: TxnError| error.to_string();
                Some(read_only(now, &values, request).map(Reply::Txn).map_err(refused))
            }
            _ => None,
        }
    }

    fn request(&mut self, request: Request, forced: bool, answered: bool, out: &mut String) {
        if !forced {
            if let Err(error) = Self::at_the_door(&request) {
                writeln!(out, "refused: {error}").unwrap();
                return;
            }
            if let Some(read) = self.read(&request) {
                match read {
                    Ok(reply) => show_reply(&reply, out),
                    Err(error) => writeln!(out, "error: {error}").unwrap(),
                }
                return;
            }
        }
        let (outcome, effects) = self.rig.apply(request, answered);
        match outcome {
            Err(fatal) => {
                // The member would stop; the script goes on as if the entry had never come.
                self.rig.log.pop();
                writeln!(out, "fatal: {fatal}").unwrap();
            }
            Ok(None) => panic!("a new entry was skipped"),
            Ok(Some(outcome)) => {
                assert_eq!(outcome.id, self.rig.machine.applied().0, "the caller's own id");
                match outcome.result {
                    Ok(_) if !answered => out.push_str("applied\n"),
                    Ok(reply) => show_reply(&reply, out),
                    Err(error) => writeln!(out, "error: {error}").unwrap(),
                }
                if outcome.over_quota.is_some() {
                    out.push_str("over quota\n");
                }
            }
        }
        for event in &effects.events {
            let kv = event.kv.parse().unwrap();
            assert_eq!((&kv.key, kv.mod_revision), (&event.key, event.revision.main));
        }
        for change in effects.leases {
            match change {
                LeaseChange::Granted { id, ttl, remaining } => {
                    writeln!(out, "lease {} runs {ttl} s, {remaining} known", id.0).unwrap();
                }
                LeaseChange::Revoked(id) => writeln!(out, "lease {} ends", id.0).unwrap(),
                LeaseChange::Checkpointed { id, remaining } => {
                    writeln!(out, "lease {} has {remaining} s left", id.0).unwrap();
                }
            }
        }
    }

    fn command(&mut self, line: &str) -> String {
        let mut out = String::new();
        let mut words: Vec<&str> = line.split_whitespace().collect();
        let (mut forced, mut answered) = (false, true);
        loop {
            match words[0] {
                "force" => forced = true,
                "silent" => answered = false,
                _ => break,
            }
            words.remove(0);
        }
        if let Some(request) = request(&words) {
            self.request(request, forced, answered, &mut out);
            return out;
        }
        let option = |name: &str, default: usize| {
            let value =
                words[1..].iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.map_or(default, |value| value.parse().unwrap())
        };
        let number = |at: usize| -> i64 { words.get(at).map_or(0, |n| n.parse().unwrap()) };
        match words[0] {
            "cut" => self.rig.cut(),
            "commit" => self.rig.commit(),
            "flush" => self.rig.flush(),
            "slice" => match self.rig.slice(option("keys", 1000), option("limit", 1000)) {
                Some(sliced) => {
                    let done = if sliced.done { " done" } else { "" };
                    writeln!(out, "dropped={}{done}", sliced.dropped).unwrap();
                }
                None => out.push_str("nothing to do\n"),
            },
            "restart" => {
                self.rig.restart(option("lost", 0));
                let machine = &self.rig.machine;
                write!(out, "applied={}", machine.applied()).unwrap();
                write!(out, " rev={}", machine.store.now().revision()).unwrap();
                write!(out, " compacted={}", machine.store.now().compact_revision()).unwrap();
                for due in &self.rig.compactions {
                    write!(out, " unfinished={}", due.compaction.at()).unwrap();
                }
                out.push('\n');
            }
            "replay" => {
                let log = self.rig.log.clone();
                let (mut applied, mut skipped) = (0, 0);
                for entry in &log {
                    match self.rig.apply_entry(entry, false).0.unwrap() {
                        Some(_) => applied += 1,
                        None => skipped += 1,
                    }
                }
                writeln!(out, "applied={applied} skipped={skipped}").unwrap();
            }
            "entry" => self.entry(&words[1..], &mut out),
            "quota" => self.rig.quota = Quota { live: Some(number(1) as u64), physical: None },
            "hash" => self.hash(number(1), &mut out),
            "state" => {
                let now = self.rig.machine.store.now();
                let (revision, compacted) = (now.revision(), now.compact_revision());
                let live = now.live_keys();
                let uncommitted = now.uncommitted();
                writeln!(
                    out,
                    "rev={revision} compacted={compacted} keys={live} uncommitted={uncommitted}"
                )
                .unwrap();
            }
            "leases" => {
                for (id, lease) in self.rig.machine.leases.iter() {
                    write!(out, "{} ttl={}", id.0, lease.ttl).unwrap();
                    if lease.remaining != 0 {
                        write!(out, " remaining={}", lease.remaining).unwrap();
                    }
                    for key in lease.keys() {
                        write!(out, " {}", text(key)).unwrap();
                    }
                    out.push('\n');
                }
            }
            "history" => self.history(number(1), number(2), &mut out),
            "stored" => self.stored(&mut out),
            other => panic!("no command {other}"),
        }
        out
    }

    /// Entries that no client makes.
    fn entry(&mut self, words: &[&str], out: &mut String) {
        let next = self.rig.machine.applied().0 + 1;
        let normal = raftpb::EntryType::EntryNormal as i32;
        let blank = raftpb::Entry { term: 1, index: next, r#type: normal, data: Bytes::new() };
        let put = Request::Put(put(&["k", "v"]));
        let entry = match words[0] {
            "empty" => blank,
            "gap" => entry(next + 1, put),
            "old" => entry(next - 1, put),
            "garbage" => raftpb::Entry { data: bytes("\\xff\\xff"), ..blank },
            "foreign" => {
                let header = Some(pb::RequestHeader { id: 1, ..Default::default() });
                let request = pb::InternalRaftRequest { header, ..Default::default() };
                raftpb::Entry { data: request.encode_to_vec().into(), ..blank }
            }
            "joint" => {
                raftpb::Entry { r#type: raftpb::EntryType::EntryConfChangeV2 as i32, ..blank }
            }
            other => panic!("no entry {other}"),
        };
        let (outcome, effects) = self.rig.apply_entry(&entry, true);
        match outcome {
            Ok(None) => {
                assert!(effects.events.is_empty());
                out.push_str("skipped\n");
            }
            Ok(Some(outcome)) => {
                assert_eq!((outcome.id, outcome.kind), (0, Kind::Empty));
                out.push_str("applied\n");
                self.rig.log.push(entry);
            }
            Err(fatal) => writeln!(out, "fatal: {fatal}").unwrap(),
        }
        writeln!(out, "at entry {}", self.rig.machine.applied()).unwrap();
    }

    fn hash(&self, at: i64, out: &mut String) {
        let view = self.rig.engine.view().unwrap();
        match self.rig.machine.store.now().hash_kv(&*view, at) {
            Ok(kv) => {
                let (hash, compacted, at) = (kv.hash, kv.compact_revision, kv.revision);
                writeln!(out, "hash={hash:08x} at={at} compacted={compacted}").unwrap();
            }
            Err(error @ (ReadError::Compacted { .. } | ReadError::Future { .. })) => {
                writeln!(out, "error: {error}").unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn history(&self, from: i64, to: i64, out: &mut String) {
        let view = self.rig.engine.view().unwrap();
        let now = self.rig.machine.store.now();
        now.changes(&*view, from, to, &mut |revision, tombstone, stored| {
            let event = event(revision, tombstone, stored).unwrap();
            let key = text(&event.key);
            match event.kind {
                EventKind::Delete => writeln!(out, "{revision} del {key}").unwrap(),
                EventKind::Put { creation } => {
                    let kind = if creation { "create" } else { "put" };
                    writeln!(out, "{revision} {kind} {}", show_kv(&event.kv)).unwrap();
                }
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    }

    /// The engine's tables, but for what says how far it is.
    fn stored(&self, out: &mut String) {
        for (key, _) in self.rig.stored() {
            let (revision, tombstone) =
                quorate::core::mvcc::keyspace::parse_revision_key(&key).unwrap();
            writeln!(out, "key {revision}{}", if tombstone { "t" } else { "" }).unwrap();
        }
        let view = self.rig.engine.view().unwrap();
        let all = std::ops::Bound::Unbounded;
        for table in [Table::Meta, Table::Lease, Table::Alarm] {
            view.scan(table, all, all, &mut |key, value| {
                let counter = table == Table::Meta
                    && matches!(key, b"consistent_index" | b"term" | b"confState");
                if !counter {
                    writeln!(out, "{table} {}: {}", text(key), text(value)).unwrap();
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        }
    }
}

#[test]
fn scripts() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/mvcc");
    let rewrite = std::env::var_os("REWRITE_SCRIPTS").is_some();
    let mut count = 0;
    for file in std::fs::read_dir(&dir).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut script = Script::new();
        let mut actual = String::new();
        for (at, line) in text.lines().enumerate() {
            if let Some(command) = line.strip_prefix("> ") {
                eprintln!("{} line {}: {command}", path.display(), at + 1);
                writeln!(actual, "{line}").unwrap();
                actual.push_str(&script.command(command));
                count += 1;
            } else if line.is_empty() || line.starts_with("# ") {
                writeln!(actual, "{line}").unwrap();
            }
            if line.starts_with("# ---") {
                script = Script::new();
            }
        }
        if rewrite {
            std::fs::write(&path, actual).unwrap();
        } else {
            for (at, (expect, actual)) in text.lines().zip(actual.lines()).enumerate() {
                assert_eq!(actual, expect, "{} line {}", path.display(), at + 1);
            }
            assert_eq!(actual, text, "{}", path.display());
        }
    }
    assert!(count > 0, "scripts are in {}", dir.display());
}
