//! Requests that are too much.

use http::Method;
use http_body_util::Full;
use prost::Message;
use quorate_proto::etcdserverpb as pb;
use serde_json::json;
use tonic::Code;

use crate::http::{post, refusal, request, send};
use crate::server::{Kind, Member, op, said};

fn put_of(bytes: usize) -> String {
    use base64::Engine;
    let value = base64::engine::general_purpose::STANDARD.encode(vec![b'x'; bytes]);
    json!({"key": "YQ==", "value": value}).to_string()
}

#[tokio::test]
async fn a_request_may_be_as_large_as_over_grpc_and_no_larger() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        // 1.5 MiB with what goes into the log beside the value; in base64 that is 2 MiB.
        let fits = post(&member, "/v3/kv/put", put_of((3 << 19) - 100)).await;
        assert_eq!(fits.status, 200, "{kind:?} {}", fits.body);
        let back = post(&member, "/v3/kv/range", r#"{"key":"YQ=="}"#).await.json();
        assert_eq!(
            back["kvs"][0]["value"].as_str().unwrap().len(),
            ((3usize << 19) - 100).div_ceil(3) * 4
        );
        let text = "etcdserver: request is too large".to_owned();
        assert_eq!(refusal(&post(&member, "/v3/kv/put", put_of(3 << 19)).await), (400, 3, text));
        let text = "grpc: received message larger than max (2200008 vs. 2097152)".to_owned();
        assert_eq!(refusal(&post(&member, "/v3/kv/put", put_of(2_200_000)).await), (429, 8, text));
    }
}

#[tokio::test]
async fn a_body_without_end_is_cut_off() {
    let member = Member::start(Kind::Redb).await;
    let endless = format!(r#"{{"key":"YQ==","new":"{}"}}"#, "y".repeat(6 << 20));
    let request = request(&member, Method::POST, "/v3/kv/range").body(Full::from(endless)).unwrap();
    let answer = send(&member, request).await;
    let (status, code, text) = refusal(&answer);
    assert_eq!((status, code), (429, 8));
    assert!(text.starts_with("grpc: received message larger than max ("), "{text}");
}

/// A transaction in a transaction in a transaction.
fn nested(depth: usize) -> pb::TxnRequest {
    (0..depth).fold(pb::TxnRequest::default(), |inner, _| pb::TxnRequest {
        success: vec![op::any(pb::request_op::Request::RequestTxn(inner))],
        ..Default::default()
    })
}

#[tokio::test]
async fn nesting_is_refused_before_it_is_too_deep_for_anyone() {
    let mut member = Member::start(Kind::Redb).await;
    let nested_json = |depth: usize| {
        let open = r#"{"success":[{"request_txn":"#.repeat(depth);
        format!("{open}{{}}{}", "}]}".repeat(depth))
    };
    let mut accepted = 0;
    for depth in [1, 10, 40, 49, 50, 51, 60, 100, 1000, 3000, 100_000] {
        let answer = post(&member, "/v3/kv/txn", nested_json(depth)).await;
        match answer.status {
            200 => accepted = depth,
            _ => {
                let (status, code, text) = refusal(&answer);
                assert_eq!((status, code), (400, 3), "{depth}: {text}");
                assert!(text.contains("depth"), "{depth}: {text}");
            }
        }
        let mut kv = member.api().kv.max_encoding_message_size(usize::MAX);
        // Encoding goes as deep as the message on the stack of this test. Of the deepest request that is
        // accepted the reply, which has a header inside, is too deep for this client.
        if depth <= 1000 && depth != 50 {
            match kv.txn(nested(depth)).await.map_err(said) {
                Ok(_) => assert_eq!(accepted, depth, "both ways agree on what is too deep"),
                Err((code, text)) => {
                    assert_ne!(accepted, depth, "{text}");
                    assert_eq!(code, Code::Internal, "{depth}: {text}");
                    assert!(text.contains("recursion"), "{text}");
                }
            }
        }
    }
    assert_eq!(accepted, 50, "the deepest that protobuf's reader takes");
    // What was accepted is in the log, and is read from there.
    member.crash().await;
    let answer = post(&member, "/v3/kv/txn", nested_json(50)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(nested(50).encoded_len() > 0);
    let arrays = format!(r#"{{"new":{}{}}}"#, "[".repeat(500_000), "]".repeat(500_000));
    let answer = post(&member, "/v3/kv/txn", arrays).await;
    assert_eq!(refusal(&answer), (400, 3, "exceeded max depth".to_owned()));
}
