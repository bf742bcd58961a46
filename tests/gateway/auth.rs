//! Who asks, where users and roles are enforced.

use http::Method;
use http_body_util::Full;
use serde_json::{Value, json};

use crate::http::{Answer, post, refusal, request, send};
use crate::server::{Kind, Member};

async fn ask(member: &Member, path: &str, token: Option<&str>, body: Value) -> Answer {
    let mut request = request(member, Method::POST, path);
    if let Some(token) = token {
        request = request.header("authorization", token);
    }
    send(member, request.body(Full::from(body.to_string())).unwrap()).await
}

/// Turns authentication on; answers root's token.
async fn guarded(member: &Member) -> String {
    for (path, body) in [
        ("/v3/auth/user/add", json!({"name": "root", "password": "pw"})),
        ("/v3/auth/role/add", json!({"name": "root"})),
        ("/v3/auth/user/grant", json!({"user": "root", "role": "root"})),
        ("/v3/auth/user/add", json!({"name": "u", "password": "up"})),
        ("/v3/auth/enable", json!({})),
    ] {
        let answer = post(member, path, body.to_string()).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    }
    login(member, "root", "pw").await
}

async fn login(member: &Member, name: &str, password: &str) -> String {
    let body = json!({"name": name, "password": password}).to_string();
    let answer = post(member, "/v3/auth/authenticate", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["token"].as_str().expect("a token").to_owned()
}

/// What both programs do with tokens.
async fn tokens_open_what_their_user_may(kind: Kind) {
    let member = Member::start(kind).await;
    let root = guarded(&member).await;
    let key = json!({"key": "YQ=="});
    assert_eq!(ask(&member, "/v3/kv/put", Some(&root), key.clone()).await.status, 200);
    assert_eq!(ask(&member, "/v3/kv/range", Some(&root), key.clone()).await.status, 200);
    let nobody = ask(&member, "/v3/kv/range", None, key.clone()).await;
    assert_eq!(refusal(&nobody), (400, 3, "etcdserver: user name is empty".to_owned()));
    let stranger = ask(&member, "/v3/kv/range", Some("nonsense.1"), key.clone()).await;
    assert_eq!(refusal(&stranger), (401, 16, "etcdserver: invalid auth token".to_owned()));
    let user = login(&member, "u", "up").await;
    let denied = ask(&member, "/v3/kv/range", Some(&user), key).await;
    assert_eq!(refusal(&denied), (403, 7, "etcdserver: permission denied".to_owned()));
    let wrong = json!({"name": "root", "password": "x"}).to_string();
    let wrong = post(&member, "/v3/auth/authenticate", wrong).await;
    let text = "etcdserver: authentication failed, invalid user ID or password".to_owned();
    assert_eq!(refusal(&wrong), (400, 3, text));
}

#[tokio::test]
async fn tokens_open_in_etcd_what_is_asked_of_us() {
    tokens_open_what_their_user_may(Kind::Etcd).await;
}

#[tokio::test]
async fn tokens_open_what_their_user_may_and_may_come_with_their_kind() {
    tokens_open_what_their_user_may(Kind::Redb).await;
    // What the installed etcd does not know yet: the kind of the token before it, and the header that a
    // browser acts upon.
    let member = Member::start(Kind::Redb).await;
    let root = format!("Bearer {}", guarded(&member).await);
    assert_eq!(ask(&member, "/v3/kv/put", Some(&root), json!({"key": "YQ=="})).await.status, 200);
    let stranger = ask(&member, "/v3/kv/range", Some("nonsense.1"), json!({"key": "YQ=="})).await;
    assert_eq!(stranger.header("www-authenticate"), Some("etcdserver: invalid auth token"));
    crate::socket::watches_with(&member, ("sec-websocket-protocol", &root.replace(' ', ", ")))
        .await;
    crate::socket::watches_with(&member, ("cookie", &root.replace("Bearer ", "token="))).await;
}
