//! What requests pass before the gateway, and the switch that takes it away.

use http::Method;
use http_body_util::Full;

use crate::http::{post, request, send};
use crate::server::{Kind, Member};

#[tokio::test]
async fn browsers_are_told_whether_their_page_may_ask() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::with_flags(kind, &["--cors", "http://a.example:8080"]).await;
        for (origin, allowed) in [
            (Some("http://a.example:8080"), Some("http://a.example:8080")),
            (Some("http://b.example"), None),
            (None, None),
        ] {
            for (method, status) in [(Method::POST, 400), (Method::OPTIONS, 200)] {
                let mut request = request(&member, method.clone(), "/v3/kv/range");
                if let Some(origin) = origin {
                    request = request.header("origin", origin);
                }
                let answer = send(&member, request.body(Full::default()).unwrap()).await;
                assert_eq!(answer.status, status, "{kind:?} {origin:?} {method}");
                assert_eq!(answer.header("access-control-allow-origin"), allowed);
                let methods = allowed.map(|_| "POST, GET, OPTIONS, PUT, DELETE");
                assert_eq!(answer.header("access-control-allow-methods"), methods);
                let headers = allowed.map(|_| "accept, content-type, authorization");
                assert_eq!(answer.header("access-control-allow-headers"), headers);
                assert_eq!(answer.body.is_empty(), method == Method::OPTIONS);
            }
        }
    }
}

#[tokio::test]
async fn a_host_that_is_not_ours_is_misdirected() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::with_flags(kind, &["--host-whitelist", "127.0.0.1"]).await;
        assert_eq!(post(&member, "/v3/lease/leases", "").await.status, 200, "{kind:?}");
        let foreign = http::Request::post("/v3beta/lease/leases").header("host", "evil.example:80");
        let answer = send(&member, foreign.body(Full::default()).unwrap()).await;
        assert_eq!(answer.status, 421, "{kind:?}");
        assert!(answer.body.contains("CVE-2018-5702") && answer.body.contains("evil.example"));
    }
}

#[tokio::test]
async fn the_old_prefix_still_works_and_the_switch_takes_both_away() {
    for kind in [Kind::Redb, Kind::Etcd] {
        let member = Member::start(kind).await;
        let old = post(&member, "/v3beta/kv/put", r#"{"key":"YQ=="}"#).await;
        assert_eq!(old.json()["header"]["revision"], "2", "{kind:?}");
        let without = Member::with_flags(kind, &["--enable-grpc-gateway=false"]).await;
        for path in ["/v3/kv/range", "/v3beta/kv/range", "/v3"] {
            let answer = post(&without, path, r#"{"key":"YQ=="}"#).await;
            assert_eq!((answer.status, answer.body.as_str()), (404, "404 page not found\n"));
        }
    }
}

#[tokio::test]
async fn metadata_comes_in_headers() {
    let member = Member::start(Kind::Redb).await;
    for (name, value, status) in
        [("grpc-metadata-hasleader", "true", 200), ("grpc-timeout", "10S", 200)]
    {
        let request = request(&member, Method::POST, "/v3/kv/range").header(name, value);
        let answer = send(&member, request.body(Full::from(r#"{"key":"YQ=="}"#)).unwrap()).await;
        assert_eq!(answer.status, status, "{name}: {value}");
    }
    let named = request(&member, Method::POST, "/v3/kv/range")
        .header("grpc-metadata-client-api-version", "gateway-test");
    send(&member, named.body(Full::from(r#"{"key":"YQ=="}"#)).unwrap()).await;
    let page = request(&member, Method::GET, "/metrics").body(Full::default()).unwrap();
    let page = send(&member, page).await.body;
    let counted = page.lines().any(|line| {
        line.starts_with("etcd_server_client_requests_total{")
            && line.contains("client_api_version=\"gateway-test\"")
    });
    assert!(counted, "{page}");
}
