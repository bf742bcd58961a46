//! Simple tokens: what they look like, where they are put, and when they die.

use std::time::{Duration, Instant};

use quorate_proto::authpb::UserAddOptions;
use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use tonic::Code;
use tonic::metadata::MetadataValue;

use crate::access::denied;
use crate::call::Call;
use crate::login::{
    Session, User, login, password, reference_subjects, secured, secured_with, subjects,
};
use crate::server::{Kind, Said, error, get, said};

pub const USER: User = ("user", &[(Type::Readwrite, "k", "")]);

pub fn invalid() -> Said {
    error(Code::Unauthenticated, "etcdserver: invalid auth token")
}

pub fn failed() -> Said {
    error(Code::InvalidArgument, "etcdserver: authentication failed, invalid user ID or password")
}

#[tokio::test]
async fn a_token_is_letters_and_an_index() {
    for kind in subjects() {
        let (member, root) = secured(kind, &[USER]).await;
        let mut indexes = Vec::new();
        let mut tokens = Vec::new();
        for _ in 0..5 {
            let token = login(&member.api(), "user", &password("user")).await.unwrap();
            let (letters, index) = token.split_once('.').expect("a dot");
            assert_eq!(letters.len(), 16, "{kind:?}: {token}");
            assert!(letters.chars().all(|c| c.is_ascii_alphabetic()), "{kind:?}: {token}");
            indexes.push(index.parse::<u64>().unwrap());
            tokens.push(token);
        }
        assert!(indexes.is_sorted_by(|a, b| a < b), "{kind:?}: {indexes:?}");
        // The index is that of the log entry, and no key has moved.
        let status = root.api.maintenance.clone().status(root.ask(pb::StatusRequest {})).await;
        let status = status.unwrap().into_inner();
        assert!(*indexes.last().unwrap() <= status.raft_index, "{kind:?}: {indexes:?}");
        assert_eq!(status.header.unwrap().revision, 1, "{kind:?}");
        // A new one does not end those before it.
        for token in &tokens {
            let session = Session::with_token(member.api(), token);
            assert_eq!(session.put("k", "v").await, Ok(()), "{kind:?}");
        }
        // Letters of one and index of another are no token.
        let mixed = format!("{}.{}", tokens[0].split_once('.').unwrap().0, indexes[1]);
        let session = Session::with_token(member.api(), &mixed);
        assert_eq!(session.get("k").await, Err(invalid()), "{kind:?}");
    }
}

#[tokio::test]
async fn logins_that_fail() {
    for kind in subjects() {
        let (member, root) = secured(kind, &[USER]).await;
        let api = member.api();
        let open = pb::AuthUserAddRequest {
            name: "open".into(),
            options: Some(UserAddOptions { no_password: true }),
            ..Default::default()
        };
        root.api.auth.clone().user_add(root.ask(open)).await.unwrap();
        root.add_user("empty", "").await.unwrap();
        for (name, given) in [
            ("user", ""),
            ("user", "User-secret"),
            ("user", "user-secret "),
            ("nobody", "user-secret"),
            ("", ""),
            ("root", "user-secret"),
            ("empty", "x"),
        ] {
            assert_eq!(login(&api, name, given).await, Err(failed()), "{kind:?}: {name}");
        }
        let passwordless = error(
            Code::Unknown,
            "auth: authentication failed, password was given for no password user",
        );
        for given in ["", "x"] {
            assert_eq!(login(&api, "open", given).await, Err(passwordless.clone()), "{kind:?}");
        }
        assert!(login(&api, "empty", "").await.is_ok(), "{kind:?}");
        // A login needs no credential, whatever comes with it.
        let request = pb::AuthenticateRequest { name: "user".into(), password: password("user") };
        let request = Session::with_token(member.api(), "nonsense").ask(request);
        let told = api.auth.clone().authenticate(request).await.map(drop).map_err(said);
        // 3.4 minds what comes with it.
        let expected = if kind == Kind::Etcd { Err(invalid()) } else { Ok(()) };
        assert_eq!(told, expected, "{kind:?}");
    }
}

/// 72 bytes are what bcrypt takes: a longer one is refused, not cut.
#[tokio::test]
async fn a_password_that_is_too_long() {
    for kind in reference_subjects() {
        let (member, root) = secured(kind, &[]).await;
        let long = "p".repeat(73);
        let refused = error(Code::Unknown, "bcrypt: password length exceeds 72 bytes");
        assert_eq!(root.add_user("long", &long).await, Err(refused.clone()), "{kind:?}");
        assert_eq!(root.add_user("fits", &long[1..]).await, Ok(()), "{kind:?}");
        assert!(login(&member.api(), "fits", &long[1..]).await.is_ok(), "{kind:?}");
        assert_eq!(login(&member.api(), "fits", &long[2..]).await, Err(failed()), "{kind:?}");
        assert_eq!(root.change_password("fits", &long).await, Err(refused), "{kind:?}");
        assert!(login(&member.api(), "fits", &long[1..]).await.is_ok(), "{kind:?}");
    }
}

#[tokio::test]
async fn where_a_token_is_put() {
    for kind in subjects() {
        let (member, _root) = secured(kind, &[USER, ("plain", &[])]).await;
        let token = login(&member.api(), "user", &password("user")).await.unwrap();
        let plain = login(&member.api(), "plain", &password("plain")).await.unwrap();
        let bearer = format!("Bearer {token}");
        let of = |key, token: &str| Session::with_metadata(member.api(), key, token);
        assert_eq!(of("token", &token).get("k").await, Ok(None), "{kind:?}");
        assert_eq!(of("authorization", &token).get("k").await, Ok(None), "{kind:?}");
        // The word is taken off from 3.5.32 on.
        let expected = if kind == Kind::Etcd { Err(invalid()) } else { Ok(None) };
        assert_eq!(of("authorization", &bearer).get("k").await, expected, "{kind:?}");
        assert_eq!(of("token", &bearer).get("k").await, expected, "{kind:?}");
        for not in [format!("bearer {token}"), format!("Bearer{token}"), format!("Basic {token}")] {
            assert_eq!(of("authorization", &not).get("k").await, Err(invalid()), "{kind:?}: {not}");
        }
        // The first key wins, good or bad.
        for (first, second, expected) in [
            (&token, "nonsense", Ok(())),
            (&plain, &token[..], Err(denied())),
            (&"nonsense".to_string(), &token[..], Err(invalid())),
        ] {
            let mut request = of("token", first).ask(get("k"));
            let second: MetadataValue<_> = second.parse().unwrap();
            request.metadata_mut().insert("authorization", second);
            let told = member.api().kv.range(request).await.map(drop).map_err(said);
            assert_eq!(told, expected, "{kind:?}: {first}");
        }
    }
}

#[tokio::test]
async fn tokens_that_are_none() {
    for kind in subjects() {
        let (member, root) = secured(kind, &[USER]).await;
        let bad = |token: &str| Session::with_token(member.api(), token);
        for token in ["", "nonsense", ".", "a.b", "abcdefghijklmnop.1", "abcdefghijklmnop", "a.1.2"]
        {
            for call in [
                Call::Range(get("k")),
                Call::Put(crate::access::put("k")),
                Call::Watch(crate::access::watch("k", "")),
                Call::UserList,
                Call::MemberRemove(pb::MemberRemoveRequest { id: 99 }),
            ] {
                let told = bad(token).call(&call).await;
                assert_eq!(told, Err(invalid()), "{kind:?}: {token:?}: {call:?}");
            }
            assert_eq!(bad(token).call(&Call::Health).await, Ok(()), "{kind:?}");
            // It needs no user, and yet no bad token.
            if kind != Kind::Etcd {
                let told = bad(token).call(&Call::AuthStatus).await;
                assert_eq!(told, Err(invalid()), "{kind:?}: {token:?}");
            }
        }
        // One of an entry that is far ahead is waited for, and good at no time.
        let mut request = bad("abcdefghijklmnop.999999999").ask(get("k"));
        request.set_timeout(Duration::from_millis(300));
        let told = member.api().kv.range(request).await;
        assert!(told.is_err(), "{kind:?}: {told:?}");
        assert_eq!(root.put("k", "v").await, Ok(()), "{kind:?}");
        // While authentication is off, nobody looks at them, as of 3.5.
        root.disable().await.unwrap();
        if kind == Kind::Etcd {
            assert_eq!(bad("nonsense").get("k").await, Err(invalid()));
            continue;
        }
        assert_eq!(bad("nonsense").get("k").await, Ok(Some("v".into())), "{kind:?}");
        assert_eq!(bad("abcdefghijklmnop.999999999").put("k", "w").await, Ok(()), "{kind:?}");
    }
}

/// Each use starts the life of a token anew.
#[tokio::test]
async fn a_token_that_is_not_used_expires() {
    const TTL: Duration = Duration::from_secs(2);
    for kind in subjects() {
        let (member, _) = secured_with(kind, &["--auth-token-ttl", "2"], &[USER]).await;
        // Each is looked at once, because a look is a use.
        let mut idle = Vec::new();
        for _ in 0..40 {
            let token = login(&member.api(), "user", &password("user")).await.unwrap();
            idle.push((Instant::now(), Session::with_token(member.api(), &token)));
        }
        let used = Session::of(member.api(), "user").await;
        let first_use = Instant::now();
        let mut last_use = first_use;
        let mut longest_pause = Duration::ZERO;
        let mut expired_after = None;
        while let (Some((since, token)), None) = (idle.pop(), expired_after) {
            longest_pause = longest_pause.max(last_use.elapsed());
            last_use = Instant::now();
            let told = used.get("k").await;
            // A machine that stood still for so long proves nothing.
            if longest_pause < TTL {
                assert_eq!(told, Ok(None), "{kind:?}: used {:?} long", first_use.elapsed());
            }
            match token.get("k").await {
                Ok(_) => {}
                Err(said) => {
                    assert_eq!(said, invalid(), "{kind:?}");
                    expired_after = Some(since.elapsed());
                }
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        let after = expired_after.expect("one of the tokens expires");
        assert!(after >= TTL, "{kind:?}: expired after {after:?}");
        // A login is always possible.
        assert_eq!(Session::of(member.api(), "user").await.get("k").await, Ok(None), "{kind:?}");
    }
}

#[tokio::test]
async fn a_token_dies_with_what_it_was_given_for() {
    for kind in subjects() {
        let (member, root) = secured(kind, &[USER, ("other", USER.1)]).await;
        let other = Session::of(member.api(), "other").await;
        // A change of roles takes effect at once, and no token dies of it.
        let user = Session::of(member.api(), "user").await;
        root.revoke_role("user", "user").await.unwrap();
        assert_eq!(user.get("k").await, Err(denied()), "{kind:?}");
        root.grant_role("user", "user").await.unwrap();
        assert_eq!(user.get("k").await, Ok(None), "{kind:?}");
        root.revoke("user", "k", "").await.unwrap();
        assert_eq!(user.get("k").await, Err(denied()), "{kind:?}");
        root.grant("user", (Type::Read, "k", "")).await.unwrap();
        assert_eq!(user.get("k").await, Ok(None), "{kind:?}");
        assert_eq!(user.put("k", "v").await, Err(denied()), "{kind:?}");
        // Another password.
        root.change_password("user", "new").await.unwrap();
        assert_eq!(user.get("k").await, Err(invalid()), "{kind:?}");
        assert_eq!(login(&member.api(), "user", &password("user")).await, Err(failed()));
        let token = login(&member.api(), "user", "new").await.unwrap();
        let user = Session::with_token(member.api(), &token);
        assert_eq!(user.get("k").await, Ok(None), "{kind:?}");
        // The same password is another all the same.
        root.change_password("user", "new").await.unwrap();
        assert_eq!(user.get("k").await, Err(invalid()), "{kind:?}");
        // The end of the user, and one of the same name after it.
        let token = login(&member.api(), "user", "new").await.unwrap();
        let user = Session::with_token(member.api(), &token);
        root.delete_user("user").await.unwrap();
        assert_eq!(user.get("k").await, Err(invalid()), "{kind:?}");
        root.add_user("user", "new").await.unwrap();
        root.grant_role("user", "user").await.unwrap();
        assert_eq!(user.get("k").await, Err(invalid()), "{kind:?}");
        // A role that is deleted is gone from everyone.
        let token = login(&member.api(), "user", "new").await.unwrap();
        let user = Session::with_token(member.api(), &token);
        assert_eq!(user.get("k").await, Ok(None), "{kind:?}");
        let role = pb::AuthRoleDeleteRequest { role: "user".into() };
        root.call(&Call::RoleDelete(role)).await.unwrap();
        assert_eq!(user.get("k").await, Err(denied()), "{kind:?}");
        // Nobody else has noticed.
        assert_eq!(other.get("k").await, Ok(None), "{kind:?}");
        // Off and on again: all are gone.
        root.disable().await.unwrap();
        let nobody = Session::nobody(member.api());
        assert_eq!(nobody.get("k").await, Ok(None), "{kind:?}");
        nobody.enable().await.unwrap();
        for session in [&user, &other, &root] {
            assert_eq!(session.get("k").await, Err(invalid()), "{kind:?}");
        }
        let root = Session::of(member.api(), "root").await;
        assert_eq!(root.get("k").await, Ok(None), "{kind:?}");
    }
}

/// Users live on the disk, tokens in memory only.
#[tokio::test]
async fn a_restart_ends_tokens() {
    let kinds = match subjects()[..] {
        [Kind::Etcd] => vec![Kind::Etcd],
        // An engine without a memory of its own is told the whole log again, logins included.
        _ => vec![Kind::Redb, Kind::Etcd],
    };
    for kind in kinds {
        let (mut member, _) = secured(kind, &[USER]).await;
        let user = Session::of(member.api(), "user").await;
        for crash in [true, false] {
            let token = login(&member.api(), "user", &password("user")).await.unwrap();
            // An engine commit that is behind the login: else the log tells of it again.
            let root = Session::of(member.api(), "root").await;
            root.put("k", "v").await.unwrap();
            if crash {
                member.crash().await;
            } else {
                member.restart().await;
            }
            let nobody = Session::nobody(member.api());
            assert_eq!(nobody.get("k").await, Err(crate::access::user_empty()), "{kind:?}");
            // After a crash the log may tell of it again all the same.
            if !crash {
                let old = Session::with_token(member.api(), &token);
                assert_eq!(old.get("k").await, Err(invalid()), "{kind:?}");
            }
            let user = Session::of(member.api(), "user").await;
            assert_eq!(user.get("k").await, Ok(Some("v".into())), "{kind:?}");
            assert_eq!(user.get("l").await, Err(denied()), "{kind:?}");
        }
        assert_eq!(login(&member.api(), "user", "wrong").await, Err(failed()), "{kind:?}");
        assert!(user.get("k").await.is_err(), "{kind:?}");
    }
}

/// The revision of the auth store moves with what changes it and with nothing else.
#[tokio::test]
async fn the_auth_revision() {
    for kind in reference_subjects() {
        let (member, root) = secured(kind, &[]).await;
        let mut last = root.auth_revision().await;
        // root added, its role added, and granted; to be turned on moves nothing.
        assert_eq!(last, 4, "{kind:?}");
        let changes: Vec<(&str, u64, Result<(), Said>)> = vec![
            ("user add", 1, root.add_user("u", "pw").await),
            ("role add", 1, root.add_role("r").await),
            ("grant role", 1, root.grant_role("u", "r").await),
            ("grant role again", 0, root.grant_role("u", "r").await),
            ("grant", 1, root.grant("r", (Type::Read, "a", "")).await),
            ("change password", 1, root.change_password("u", "pw2").await),
            ("revoke", 1, root.revoke("r", "a", "").await),
            ("revoke role", 1, root.revoke_role("u", "r").await),
            ("user delete", 1, root.delete_user("u").await),
            ("enable again", 0, root.enable().await),
            ("put", 0, root.put("k", "v").await),
        ];
        let sum: u64 = changes.iter().map(|(_, by, _)| by).sum();
        assert!(changes.iter().all(|(_, _, told)| told.is_ok()), "{kind:?}: {changes:?}");
        assert_eq!(root.auth_revision().await, last + sum, "{kind:?}");
        last += sum;
        // What is refused moves nothing, nor does a login.
        assert!(root.delete_user("u").await.is_err());
        login(&member.api(), "root", &password("root")).await.unwrap();
        assert_eq!(root.auth_revision().await, last, "{kind:?}");
        root.disable().await.unwrap();
        let status = root.api.auth.clone().auth_status(pb::AuthStatusRequest {}).await.unwrap();
        let status = status.into_inner();
        assert_eq!((status.enabled, status.auth_revision), (false, last + 1), "{kind:?}");
    }
}
