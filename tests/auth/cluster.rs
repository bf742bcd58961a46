//! Users, roles and tokens on all members of a cluster, through deaths, snapshots and other programs.

use std::process::{Command, Stdio};
use std::time::Duration;

use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use tonic::transport::Endpoint;

use crate::access::denied;
use crate::call::Call;
use crate::login::{CHEAP, Session, User, login, password, secure, subjects};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::{run, wait_for};
use crate::server::{Api, Kind, Member, get, revision, said};
use crate::tokens::{USER, failed, invalid};

const ALL: [Node; 3] = [0, 1, 2];

fn api(cluster: &Cluster, node: Node) -> Api {
    let url = format!("http://127.0.0.1:{}", cluster.members[node].client_port);
    let endpoint = Endpoint::from_shared(url).unwrap().timeout(Duration::from_secs(10));
    Api::new(endpoint.connect_lazy())
}

/// Logged in on a member, which may still be starting.
async fn session(cluster: &Cluster, node: Node, user: &str) -> Session {
    session_with(cluster, node, user, &password(user)).await
}

async fn session_with(cluster: &Cluster, node: Node, user: &str, secret: &str) -> Session {
    let api = api(cluster, node);
    wait_for("a login", || async {
        let token = login(&api, user, secret).await.map_err(|said| format!("{said:?}"))?;
        Ok(Session::with_token(api.clone(), &token))
    })
    .await
}

/// Three members whose authentication is on.
async fn secured(options: Options, users: &[User]) -> Cluster {
    secured_by(0, options, users).await
}

/// `secured`, all of it made through one member.
async fn secured_by(node: Node, options: Options, users: &[User]) -> Cluster {
    let cluster = Cluster::start(Program::from_env(), 3, options.with(&CHEAP)).await;
    secure(api(&cluster, node), users).await;
    // A member that does not know of it yet leaves the name out of what it proposes, and that is refused.
    for node in ALL {
        session(&cluster, node, "root").await;
    }
    cluster
}

fn mixed(programs: [Program; 3]) -> Options {
    Options { own_programs: programs.into(), ..Options::brisk() }
}

/// What all members have is equal, users included as far as they are told.
async fn agree(cluster: &Cluster, nodes: &[Node]) {
    let mut roots = Vec::new();
    for &node in nodes {
        roots.push(session(cluster, node, "root").await);
    }
    let header = roots[0].api.kv.clone().range(roots[0].ask(get("k"))).await.unwrap();
    let at = revision(header.into_inner().header);
    let mut all = Vec::new();
    for root in &roots {
        // The read waits for what the others have acknowledged.
        root.get("k").await.unwrap();
        let request = root.ask(pb::HashKvRequest { revision: at });
        let hash = root.api.maintenance.clone().hash_kv(request).await.unwrap().into_inner();
        let mut auth = root.api.auth.clone();
        let users = auth.user_list(root.ask(pb::AuthUserListRequest {})).await.unwrap();
        let users = users.into_inner().users;
        let roles = auth.role_list(root.ask(pb::AuthRoleListRequest {})).await.unwrap();
        let roles = roles.into_inner().roles;
        let mut told = Vec::new();
        for name in &users {
            let request = root.ask(pb::AuthUserGetRequest { name: name.clone() });
            told.push(auth.user_get(request).await.unwrap().into_inner().roles);
        }
        let mut permissions = Vec::new();
        // What it tells of root's permissions is another matter in each release.
        for role in roles.iter().filter(|role| *role != "root") {
            let request = root.ask(pb::AuthRoleGetRequest { role: role.clone() });
            permissions.push(auth.role_get(request).await.unwrap().into_inner().perm);
        }
        all.push((hash.hash, hash.compact_revision, users, roles, told, permissions));
    }
    for other in &all[1..] {
        assert_eq!(all[0], *other);
    }
}

/// A token is good on every member as soon as one has given it, however far behind the other is.
async fn tokens_are_good_everywhere(cluster: &Cluster, rounds: usize) {
    let apis = ALL.map(|node| api(cluster, node));
    for round in 0..rounds {
        let from = round % 3;
        let token = login(&apis[from], "user", &password("user")).await;
        let token = token.unwrap_or_else(|said| panic!("round {round} at {from}: {said:?}"));
        for to in ALL {
            let session = Session::with_token(apis[to].clone(), &token);
            let value = format!("{round} by {to}");
            assert_eq!(session.put("k", &value).await, Ok(()), "from {from} to {to}");
            assert_eq!(session.get("k").await, Ok(Some(value)), "from {from} to {to}");
            assert_eq!(session.get("x").await, Err(denied()), "from {from} to {to}");
        }
    }
}

#[test]
fn a_token_of_one_member_is_good_on_the_others() {
    run(async {
        let cluster = secured(Options::brisk(), &[USER]).await;
        tokens_are_good_everywhere(&cluster, 30).await;
        // And where the entries come late.
        for to in ALL {
            for from in ALL.into_iter().filter(|from| *from != to) {
                let delay = Duration::from_millis(20);
                let rule = crate::rig::net::Rule { delay, ..Default::default() };
                cluster.net.set(from, to, rule);
            }
        }
        tokens_are_good_everywhere(&cluster, 6).await;
        cluster.net.heal();
        agree(&cluster, &ALL).await;
    });
}

/// A change made through any member is seen through all of them. Passwords are set through `hashes`.
async fn changes_are_seen(cluster: &Cluster, hashes: Node, made: Node, seen: Node) {
    let name = format!("u{made}{seen}");
    let root = session(cluster, made, "root").await;
    let hashing = session(cluster, hashes, "root").await;
    let there = api(cluster, seen);
    hashing.add_user(&name, "first").await.unwrap();
    root.add_role(&name).await.unwrap();
    // A login reads what has been acknowledged.
    let token = login(&there, &name, "first").await.unwrap();
    let user = Session::with_token(there.clone(), &token);
    assert_eq!(user.get("k").await, Err(denied()));
    root.grant(&name, (Type::Readwrite, "k", "")).await.unwrap();
    assert_eq!(user.get("k").await.map(drop), Err(denied()));
    root.grant_role(&name, &name).await.unwrap();
    assert_eq!(user.get("k").await.map(drop), Ok(()));
    assert_eq!(user.put("k", &name).await, Ok(()));
    root.grant(&name, (Type::Read, "k", "")).await.unwrap();
    // A write that a member proposes before it knows of the change is told that it is late; behind a
    // read, it does know.
    assert_eq!(user.get("k").await.map(drop), Ok(()));
    assert_eq!(user.put("k", &name).await, Err(denied()));
    root.revoke(&name, "k", "").await.unwrap();
    assert_eq!(user.get("k").await, Err(denied()));
    root.grant(&name, (Type::Read, "k", "")).await.unwrap();
    assert_eq!(user.get("k").await.map(drop), Ok(()));
    hashing.change_password(&name, "second").await.unwrap();
    assert_eq!(login(&there, &name, "first").await, Err(failed()));
    // That login has waited for the change: the tokens that it ends are gone.
    assert_eq!(user.get("k").await, Err(invalid()));
    let token = login(&there, &name, "second").await.unwrap();
    let user = Session::with_token(there.clone(), &token);
    root.delete_user(&name).await.unwrap();
    assert_eq!(login(&there, &name, "second").await, Err(failed()));
    assert_eq!(user.get("k").await, Err(invalid()));
}

#[test]
fn changes_on_each_member_are_seen_on_all() {
    run(async {
        let cluster = secured(Options::brisk(), &[USER]).await;
        for made in ALL {
            for seen in ALL {
                changes_are_seen(&cluster, made, made, seen).await;
            }
        }
        agree(&cluster, &ALL).await;
        // Off and on again, each on another member.
        let root = session(&cluster, 1, "root").await;
        let old = session(&cluster, 0, "user").await;
        root.disable().await.unwrap();
        let nobody = Session::nobody(api(&cluster, 2));
        assert!(nobody.get("k").await.is_ok());
        nobody.enable().await.unwrap();
        assert!(login(&api(&cluster, 0), "user", &password("user")).await.is_ok());
        assert_eq!(old.get("k").await, Err(invalid()));
        assert_eq!(root.get("k").await, Err(invalid()));
        tokens_are_good_everywhere(&cluster, 3).await;
    });
}

#[test]
fn members_that_die_come_back_with_their_users() {
    run(async {
        let mut cluster = secured(Options::brisk(), &[USER]).await;
        for dies in ALL {
            let other = (dies + 1) % 3;
            cluster.kill(dies);
            let root = session(&cluster, other, "root").await;
            wait_for("a change without one member", || async {
                root.change_password("user", &format!("changed {dies}"))
                    .await
                    .map_err(|said| format!("{said:?}"))
            })
            .await;
            cluster.run(dies);
            let secret = format!("changed {dies}");
            let user = session_with(&cluster, dies, "user", &secret).await;
            assert_eq!(user.put("k", "v").await, Ok(()));
            assert_eq!(user.put("x", "v").await, Err(denied()));
            assert_eq!(login(&api(&cluster, dies), "user", "first").await, Err(failed()));
        }
        agree(&cluster, &ALL).await;
        for node in ALL {
            cluster.kill(node);
        }
        for node in ALL {
            cluster.run(node);
        }
        for node in ALL {
            let user = session_with(&cluster, node, "user", "changed 2").await;
            assert_eq!(user.put("k", "w").await, Ok(()));
            assert_eq!(user.put("x", "v").await, Err(denied()));
            let nobody = Session::nobody(api(&cluster, node));
            assert_eq!(nobody.get("k").await, Err(crate::access::user_empty()));
        }
        agree(&cluster, &ALL).await;
    });
}

/// A member that was away for so long that the log it needs is gone takes its users from a snapshot.
#[test]
fn a_snapshot_brings_users_and_roles() {
    run(async {
        let options = Options::brisk().with(&["--snapshot-count=100"]);
        let (options, entries) = match Program::from_env() {
            Program::Quorate => (options.with(&["--snapshot-catchup-entries=20"]), 2500),
            // It keeps 5000 entries, whatever it is told.
            Program::Etcd => (options, 5500),
        };
        let users: [User; 3] = [USER, ("gone", USER.1), ("changed", &[])];
        let mut cluster = secured(options, &users).await;
        let away = 2;
        let there = session(&cluster, away, "gone").await;
        assert_eq!(there.put("k", "v").await, Ok(()));
        let before = session(&cluster, away, "user").await;
        for restarted in [false, true] {
            if restarted {
                cluster.kill(away);
            } else {
                cluster.net.part(&[away], &[0, 1]);
            }
            let root = session(&cluster, 0, "root").await;
            let name = format!("new-{restarted}");
            wait_for("a majority", || async {
                root.put("k", "v").await.map_err(|said| format!("{said:?}"))
            })
            .await;
            root.add_user(&name, &password(&name)).await.unwrap();
            root.grant_role(&name, "user").await.unwrap();
            let secret = format!("changed-{restarted}");
            root.change_password("changed", &secret).await.unwrap();
            if !restarted {
                root.delete_user("gone").await.unwrap();
            }
            outgrow_the_log(&cluster, &root, entries).await;
            if restarted {
                cluster.run(away);
            } else {
                cluster.net.heal();
            }
            let user = session(&cluster, away, &name).await;
            assert_eq!(user.put("k", "w").await, Ok(()));
            assert_eq!(user.put("x", "w").await, Err(denied()));
            assert_eq!(login(&api(&cluster, away), "gone", &password("gone")).await, Err(failed()));
            session_with(&cluster, away, "changed", &secret).await;
            // Once is enough: what a leader that has just sent one keeps of its log is its own matter.
            if !restarted {
                received_a_snapshot(&cluster, away).await;
            }
            agree(&cluster, &ALL).await;
            if !restarted {
                assert!(there.get("k").await.is_err(), "a token of a user that is gone");
                assert!(before.get("x").await.is_err());
            }
        }
    });
}

/// Puts more entries than members keep, and waits until those that are not away have done away with them:
/// they keep what is in front of a snapshot only until it is saved.
async fn outgrow_the_log(cluster: &Cluster, root: &Session, entries: u64) {
    let request = root.ask(pb::StatusRequest {});
    let before = root.api.maintenance.clone().status(request).await.unwrap().into_inner();
    let mut puts = tokio::task::JoinSet::new();
    for lane in 0..50 {
        let root = root.clone();
        puts.spawn(async move {
            for i in 0..entries / 50 {
                root.put(&format!("fill/{lane}/{i}"), "v").await.unwrap();
            }
        });
    }
    while let Some(ended) = puts.join_next().await {
        ended.unwrap();
    }
    // In steps of a thousand, and not the last hundred that came after the last snapshot.
    let least = before.raft_index + entries - 400;
    wait_for("snapshots", || async {
        for node in [0, 1] {
            let saved = saved_snapshot(&cluster.members[node].log_text());
            if saved < least {
                return Err(format!("member {node} has one at {saved}, not at {least}"));
            }
        }
        Ok(())
    })
    .await;
}

/// The newest snapshot that a log tells of.
fn saved_snapshot(log: &str) -> u64 {
    let saved = log.lines().filter(|line| line.contains("saved snapshot"));
    let index = |line: &str| {
        let (_, rest) = line.split_once("\"snapshot-index\":")?;
        rest.split([',', '}']).next()?.trim_matches('"').parse::<u64>().ok()
    };
    saved.filter_map(index).max().unwrap_or(0)
}

/// The metrics page asks for no user.
async fn received_a_snapshot(cluster: &Cluster, node: Node) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let port = cluster.members[node].client_port;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    let name = "etcd_network_snapshot_receive_success{";
    let received = page.lines().any(|line| line.starts_with(name) && !line.ends_with(" 0"));
    assert!(received, "member {node} caught up without a snapshot:\n{page}");
}

/// Log in on one, use on another, whichever program each is; whoever leads.
///
/// Passwords are set through a member of the installed etcd: until 3.5 an entry of the log has them in
/// clear text, and each member makes a hash of its own; a hash in the entry means nothing to it.
fn together(programs: [Program; 3]) {
    let hashes =
        programs.iter().position(|program| *program == Program::Etcd).expect("one is etcd");
    run(async {
        let mut cluster = secured_by(hashes, mixed(programs), &[USER]).await;
        for leads in ALL {
            tokens_are_good_everywhere(&cluster, 3).await;
            for seen in ALL {
                changes_are_seen(&cluster, hashes, leads, seen).await;
            }
            hand_over(&cluster, leads).await;
            let dies = (hashes + 1) % 3;
            cluster.kill(dies);
            let secret = format!("changed {leads}");
            let root = session(&cluster, hashes, "root").await;
            wait_for("a change without one member", || async {
                root.change_password("user", &secret).await.map_err(|said| format!("{said:?}"))
            })
            .await;
            cluster.run(dies);
            let user = session_with(&cluster, dies, "user", &secret).await;
            assert_eq!(user.put("k", "v").await, Ok(()));
            assert_eq!(user.get("x").await, Err(denied()));
            // And etcd itself.
            cluster.kill(hashes);
            let root = session(&cluster, dies, "root").await;
            wait_for("a change without etcd", || async {
                root.revoke_role("user", "user").await.map_err(|said| format!("{said:?}"))
            })
            .await;
            cluster.run(hashes);
            let user = session_with(&cluster, hashes, "user", &secret).await;
            assert_eq!(user.get("k").await, Err(denied()));
            let root = session(&cluster, hashes, "root").await;
            root.grant_role("user", "user").await.unwrap();
            root.change_password("user", &password("user")).await.unwrap();
            agree(&cluster, &ALL).await;
        }
    });
}

/// Makes `node` the leader.
async fn hand_over(cluster: &Cluster, node: Node) {
    let status = async |node: Node| {
        let root = session(cluster, node, "root").await;
        let asked = root.ask(pb::StatusRequest {});
        (root.api.maintenance.clone().status(asked).await.unwrap().into_inner(), root)
    };
    let target = status(node).await.0.header.unwrap().member_id;
    for from in ALL {
        let (told, root) = status(from).await;
        if told.leader == target {
            return;
        }
        if told.leader == told.header.unwrap().member_id {
            let call = Call::MoveLeader(pb::MoveLeaderRequest { target_id: target });
            root.call(&call).await.unwrap();
            return;
        }
    }
}

#[test]
fn one_member_among_two_of_etcd() {
    together([Program::Etcd, Program::from_env(), Program::Etcd]);
}

#[test]
fn two_members_and_one_of_etcd() {
    together([Program::from_env(), Program::Etcd, Program::from_env()]);
}

/// etcd starts from our snapshot with the same users, roles, passwords, and asks for them.
#[tokio::test]
async fn a_snapshot_is_restored_by_etcd() {
    for kind in subjects() {
        let (member, root) = crate::login::secured(
            kind,
            &[USER, ("plain", &[]), ("other", &[(Type::Read, "a", "\0")])],
        )
        .await;
        root.put("k", "kept").await.unwrap();
        root.change_password("plain", "changed").await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("saved.db");
        let etcdctl = |args: &[&str]| {
            let mut command = Command::new("etcdctl");
            command.env("ETCDCTL_API", "3").args(args).stdin(Stdio::null());
            let output = command.output().expect("etcdctl is installed");
            assert!(output.status.success(), "{kind:?}: {args:?}: {output:?}");
        };
        let file = file.to_str().unwrap();
        let (endpoint, user) = (member.endpoint(), format!("root:{}", password("root")));
        etcdctl(&["--endpoints", &endpoint, "--user", &user, "snapshot", "save", file]);
        let data = dir.path().join("data");
        etcdctl(&["snapshot", "restore", file, "--data-dir", data.to_str().unwrap()]);
        let restored = Member::over(Kind::Etcd, dir, data, &CHEAP).await;
        let nobody = Session::nobody(restored.api());
        assert_eq!(nobody.get("k").await, Err(crate::access::user_empty()), "{kind:?}");
        let old = login(&restored.api(), "plain", &password("plain")).await;
        assert_eq!(old, Err(failed()), "{kind:?}");
        assert!(login(&restored.api(), "plain", "changed").await.is_ok(), "{kind:?}");
        let user = Session::of(restored.api(), "user").await;
        assert_eq!(user.get("k").await, Ok(Some("kept".into())), "{kind:?}");
        assert_eq!(user.get("l").await, Err(denied()), "{kind:?}");
        let other = Session::of(restored.api(), "other").await;
        assert_eq!(other.get("k").await, Ok(Some("kept".into())), "{kind:?}");
        assert_eq!(other.put("k", "v").await, Err(denied()), "{kind:?}");
        let root = Session::of(restored.api(), "root").await;
        let users = root.api.auth.clone().user_list(root.ask(pb::AuthUserListRequest {})).await;
        let users = users.map_err(said).unwrap().into_inner().users;
        assert_eq!(users, ["other", "plain", "root", "user"], "{kind:?}");
    }
}
