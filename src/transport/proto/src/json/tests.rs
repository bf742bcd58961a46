use crate::authpb;
use crate::etcdserverpb as pb;

use super::*;

fn text<T: Json>(message: &T) -> String {
    let mut out = Vec::new();
    encode(message, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn error<T: Json + std::fmt::Debug>(text: &str) -> String {
    decode::<T>(text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn replies_are_written_as_the_gateway_of_etcd_writes_them() {
    let kv = crate::KeyValue {
        key: "a".into(),
        create_revision: 2,
        mod_revision: 3,
        version: 1,
        value: vec![0xfb, 0xff].into(),
        lease: -7,
    };
    let header =
        pb::ResponseHeader { cluster_id: u64::MAX, member_id: 1, revision: 3, raft_term: 2 };
    let reply = pb::RangeResponse {
        header: Some(header),
        kvs: vec![(&kv).into(), crate::KeyValueBytes::default()],
        more: false,
        count: 2,
    };
    assert_eq!(
        text(&reply),
        r#"{"header":{"cluster_id":"18446744073709551615","member_id":"1","revision":"3","raft_term":"2"},"kvs":[{"key":"YQ==","create_revision":"2","mod_revision":"3","version":"1","value":"+/8=","lease":"-7"},{}],"count":"2"}"#
    );
    let members = pb::MemberListResponse {
        header: None,
        members: vec![pb::Member {
            id: 9,
            name: "a\"\\\u{1}é<".into(),
            peer_ur_ls: vec!["http://a".into(), String::new()],
            client_ur_ls: Vec::new(),
            is_learner: true,
        }],
    };
    assert_eq!(
        text(&members),
        r#"{"members":[{"ID":"9","name":"a\"\\\u0001é<","peerURLs":["http://a",""],"isLearner":true}]}"#
    );
    let hash = pb::HashKvResponse { hash: u32::MAX, compact_revision: -1, ..Default::default() };
    assert_eq!(text(&hash), r#"{"hash":4294967295,"compact_revision":"-1"}"#);
    // A sub-message that is set is written, even if it is empty; so is a member of a oneof.
    let status =
        pb::StatusResponse { downgrade_info: Some(Default::default()), ..Default::default() };
    assert_eq!(text(&status), r#"{"downgradeInfo":{}}"#);
    let compare = pb::Compare {
        result: 1,
        target_union: Some(pb::compare::TargetUnion::Version(0)),
        ..Default::default()
    };
    assert_eq!(text(&compare), r#"{"result":"GREATER","version":"0"}"#);
}

#[test]
fn an_unknown_value_of_an_enum_is_kept_as_a_number() {
    let permission = authpb::Permission { perm_type: 77, ..Default::default() };
    assert_eq!(text(&permission), r#"{"permType":77}"#);
    assert_eq!(decode::<authpb::Permission>(br#"{"permType":77}"#).unwrap(), permission);
    let watch = pb::WatchCreateRequest { filters: vec![1, -5], ..Default::default() };
    assert_eq!(text(&watch), r#"{"filters":["NODELETE",-5]}"#);
    assert_eq!(decode::<pb::WatchCreateRequest>(text(&watch).as_bytes()).unwrap(), watch);
    // A name says nothing to those who do not know it.
    let read = decode::<pb::WatchCreateRequest>(br#"{"filters":["NOPUT","NOMORE"]}"#).unwrap();
    assert_eq!(read.filters, [0]);
    let read = decode::<authpb::Permission>(br#"{"permType":"ADMIN"}"#).unwrap();
    assert_eq!(read.perm_type, 0);
}

#[test]
fn requests_are_read_in_all_their_spellings() {
    let expected = pb::RangeRequest {
        key: "a".into(),
        range_end: "b".into(),
        limit: 1000,
        sort_order: 2,
        serializable: true,
        ..Default::default()
    };
    for spelling in [
        r#"{"key":"YQ==","range_end":"Yg==","limit":"1000","sort_order":"DESCEND","serializable":true}"#,
        r#"{"rangeEnd":"Yg","key":"YQ","limit":1e3,"sortOrder":2,"serializable":true}"#,
        "\n {\"key\" : \"\\u0059Q==\" ,\t\"range_end\":\"Yg==\",\"limit\":1000.0,\"sort_order\":2,\"serializable\":true} ",
        r#"{"key":"YQ==","range_end":"Yg==","limit":"1e3","sort_order":"DESCEND","serializable":true,
            "revision":null,"new":{"a":[1,{"b":"]}"}]},"max_mod_revision":0}"#,
    ] {
        assert_eq!(
            decode::<pb::RangeRequest>(spelling.as_bytes()).unwrap(),
            expected,
            "{spelling}"
        );
    }
    let op = decode::<pb::RequestOp>(br#"{"requestPut":{"key":"YQ==","prevKv":true}}"#).unwrap();
    let put = pb::PutRequest { key: "a".into(), prev_kv: true, ..Default::default() };
    assert_eq!(op.request, Some(pb::request_op::Request::RequestPut(put)));
    // What wraps the member in the name of the oneof names no field.
    let op = decode::<pb::RequestOp>(br#"{"Request":{"RequestPut":{"key":"YQ=="}}}"#).unwrap();
    assert_eq!(op.request, None);
    let op = decode::<pb::RequestOp>(br#"{"request_range":null,"request_put":{}}"#).unwrap();
    assert!(matches!(op.request, Some(pb::request_op::Request::RequestPut(_))));
    let user = r#"{"name":"\ud83d\ude00\n\/é"}"#;
    assert_eq!(decode::<pb::AuthUserGetRequest>(user.as_bytes()).unwrap().name, "\u{1f600}\n/é");
    let member = decode::<pb::Member>(br#"{"ID":"18446744073709551615"}"#).unwrap();
    assert_eq!(member.id, u64::MAX);
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    for (text, said) in [
        ("", "unexpected EOF"),
        ("{", "unexpected EOF"),
        (r#"{"key":"#, "unexpected EOF"),
        ("x", "invalid character 'x' looking for beginning of value"),
        ("{key}", "invalid character 'k' looking for beginning of object key string"),
        ("{'key'}", "invalid character '\\'' looking for beginning of object key string"),
        (r#"{"key" 1}"#, "invalid character '1' after object key"),
        (r#"{"key":"YQ==" "x"}"#, "invalid character '\"' after object key:value pair"),
        (r#"{"key":[1 2]}"#, "invalid character '2' after array element"),
        (r#"{"key":trux}"#, "invalid character 'x' in literal true (expecting 'e')"),
        ("{\"key\":\"a\nb\"}", "invalid character '\\n' in string literal"),
        (r#"{"key":"\x"}"#, "invalid character 'x' in string escape code"),
        (r#"{"key":-}"#, "invalid character '}' in numeric literal"),
        ("[]", "proto: (line 1:1): unexpected token ["),
        ("null", "proto: (line 1:1): unexpected token null"),
        (r#""a""#, "proto: (line 1:1): unexpected token \"a\""),
        (r#"{"key":"a"}"#, "proto: (line 1:8): invalid value for bytes field key: \"a\""),
        (r#"{"key":["YQ=="]}"#, "proto: (line 1:8): invalid value for bytes field key: ["),
        ("{\n  \"limit\": 1.5}", "proto: (line 2:12): invalid value for int64 field limit: 1.5"),
        (r#"{"limit":"x"}"#, "proto: (line 1:10): invalid value for int64 field limit: \"x\""),
        (
            r#"{"limit":9223372036854775808}"#,
            "proto: (line 1:10): invalid value for int64 field limit: 9223372036854775808",
        ),
        (
            r#"{"serializable":"true"}"#,
            "proto: (line 1:17): invalid value for bool field serializable: \"true\"",
        ),
        (
            r#"{"sort_order":true}"#,
            "proto: (line 1:15): invalid value for enum field sort_order: true",
        ),
        (r#"{"key":"","key":null}"#, "proto: (line 1:11): duplicate field \"key\""),
        (r#"{"range_end":"","rangeEnd":""}"#, "proto: (line 1:17): duplicate field \"rangeEnd\""),
    ] {
        assert_eq!(error::<pb::RangeRequest>(text), said, "{text}");
    }
    assert_eq!(
        error::<pb::RequestOp>(r#"{"request_put":{},"request_range":{}}"#),
        "proto: (line 1:19): error parsing \"request_range\", oneof request is already set"
    );
    assert_eq!(
        error::<pb::TxnRequest>(r#"{"success":[null]}"#),
        "proto: (line 1:13): unexpected token null"
    );
    let broken = decode::<pb::AuthUserGetRequest>(b"{\"name\":\"\xff\"}").unwrap_err();
    assert_eq!(broken.to_string(), "proto: (line 1:10): invalid UTF-8");
    assert!(decode::<pb::AuthUserGetRequest>(br#"{"name":"\ud800"}"#).is_err());
}

#[test]
fn a_damaged_key_and_value_are_not_written() {
    let reply = pb::PutResponse {
        prev_kv: Some(crate::KeyValueBytes(vec![0x0a, 5, b'a'].into())),
        ..Default::default()
    };
    assert!(encode(&reply, &mut Vec::new()).is_err());
}

#[test]
fn values_are_found_however_their_bytes_are_cut() {
    let values =
        [r#"{"a":"}\"]","b":[{},[1.5e+3,-0]]}"#, "17", "\n[ ]", r#""x""#, " null", "\t{ }"];
    let all = values.concat();
    for piece in 1..all.len() {
        let (mut found, mut start, mut scanner) = (Vec::new(), 0, Scanner::default());
        let mut at = 0;
        while at < all.len() {
            let end = (at + piece).min(all.len());
            match scanner.feed(&all.as_bytes()[at..end]).unwrap() {
                None => at = end,
                Some(taken) => {
                    at += taken;
                    found.push(&all[start..at]);
                    start = at;
                    scanner = Scanner::default();
                }
            }
        }
        assert_eq!(found, values, "in pieces of {piece}");
    }
}

#[test]
fn nesting_has_an_end_before_the_stack_has() {
    let txns = |depth: usize| {
        let open = r#"{"success":[{"request_txn":"#.repeat(depth);
        format!("{open}{{}}{}", "}]}".repeat(depth))
    };
    // A transaction in a transaction is two messages.
    let deepest = decode::<pb::TxnRequest>(txns((MESSAGES_MAX - 1) / 2).as_bytes()).unwrap();
    let bytes = prost::Message::encode_to_vec(&deepest);
    let back: pb::TxnRequest = prost::Message::decode(&bytes[..]).expect("all members can read it");
    assert_eq!(back, deepest);
    assert!(error::<pb::TxnRequest>(&txns(MESSAGES_MAX / 2 + 1)).ends_with("max recursion depth"));
    assert!(error::<pb::TxnRequest>(&txns(3000)).ends_with("max recursion depth"));
    assert_eq!(error::<pb::TxnRequest>(&txns(400_000)), "exceeded max depth");
    let unknown = |depth: usize| format!(r#"{{"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    assert!(decode::<pb::TxnRequest>(unknown(9_999).as_bytes()).is_ok());
    assert_eq!(error::<pb::TxnRequest>(&unknown(1_000_000)), "exceeded max depth");
}
