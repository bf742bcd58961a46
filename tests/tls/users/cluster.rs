//! Users of a cluster with TLS everywhere: what followers pass on for them, and what they see while
//! certificates and the authority behind them are replaced.

use quorate_proto::authpb::permission::Type;
use quorate_proto::etcdserverpb as pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{CHEAP, api, connector, enable};
use crate::calls::run_learner;
use crate::deck::{Deck, client_config};
use crate::login::{Session, login, password};
use crate::pki::{self, Authority, Leaf};
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::secure::{Connector, Secure};
use crate::rig::{run, wait_for};
use crate::rotation::{all_ports, der};
use crate::server::{Api, Said, Watching, error, kv, said};

const ALL: [Node; 3] = [0, 1, 2];

/// A cluster with TLS everywhere, whose rig comes in as root.
fn options(deck: &Deck) -> Options {
    let root = deck.signer.issue(&Leaf::client("root"));
    let secure = Secure { client: Some(connector(deck, Some(&root))), peers: true };
    Options { secure: Some(secure), ..deck.options() }.with(&CHEAP)
}

/// Members that ask for users, each of which knows that it has to.
async fn secured(n: usize, options: Options) -> Cluster {
    let mut cluster = Cluster::start(Program::Quorate, n, options).await;
    let root = cluster.options.secure.clone().and_then(|secure| secure.client).unwrap();
    enable(api(cluster.members[0].client_port, root.clone())).await;
    for node in 0..n {
        cluster.wait_serving(node).await;
        let api = api(cluster.members[node].client_port, root.clone());
        assert!(login(&api, "root", &password("root")).await.is_ok());
    }
    cluster
}

/// A member for who comes in with a certificate of a name.
fn user(cluster: &Cluster, node: Node, deck: &Deck, leaf: &Leaf) -> Session {
    let shown = deck.signer.issue(leaf);
    Session::nobody(api(cluster.members[node].client_port, connector(deck, Some(&shown))))
}

/// The TTL that a lease has been given once more.
async fn keep_alive(session: &Session, id: i64) -> Result<i64, Said> {
    let (requests, receiver) = mpsc::channel(1);
    requests.send(pb::LeaseKeepAliveRequest { id }).await.unwrap();
    let request = session.ask(ReceiverStream::new(receiver));
    let alive = session.api.lease.clone().lease_keep_alive(request).await.map_err(said)?;
    let answer = alive.into_inner().message().await.map_err(said)?;
    Ok(answer.expect("an answer while the requests go on").ttl)
}

/// The TTL that a lease was granted, and its keys.
async fn time_to_live(session: &Session, id: i64) -> Result<(i64, Vec<String>), Said> {
    let request = session.ask(pb::LeaseTimeToLiveRequest { id, keys: true });
    let left = session.api.lease.clone().lease_time_to_live(request).await.map_err(said)?;
    let left = left.into_inner();
    let keys = left.keys.iter().map(|key| String::from_utf8(key.to_vec()).unwrap());
    Ok((left.granted_ttl, keys.collect()))
}

fn denied() -> Said {
    error(Code::PermissionDenied, "etcdserver: permission denied")
}

fn user_empty() -> Said {
    error(Code::InvalidArgument, "etcdserver: user name is empty")
}

#[test]
fn followers_pass_leases_of_certificates_users_on_to_the_leader() {
    let deck = Deck::new();
    run(async {
        let cluster = secured(3, options(&deck)).await;
        let leader = cluster.leader().await;
        for (n, node) in ALL.into_iter().enumerate() {
            let id = n as i64 + 7;
            let key = format!("a/{node}");
            let what = format!("member {node}, while {leader} leads");
            let alice = user(&cluster, node, &deck, &Leaf::client("alice"));
            let grant = alice.ask(pb::LeaseGrantRequest { ttl: 600, id });
            alice.api.lease.clone().lease_grant(grant).await.expect(&what);
            let put = pb::PutRequest { lease: id, ..crate::server::put_of(&key) };
            alice.api.kv.clone().put(alice.ask(put)).await.expect(&what);
            // What the lease has is known everywhere from here on.
            for asked in ALL {
                let alice = user(&cluster, asked, &deck, &Leaf::client("alice"));
                alice.get(&key).await.expect(&what);
                assert_eq!(keep_alive(&alice, id).await, Ok(600), "{what}: by {asked}");
                let left = time_to_live(&alice, id).await;
                assert_eq!(left, Ok((600, vec![key.clone()])), "{what}: by {asked}");
                for name in ["plain", "stranger"] {
                    let other = user(&cluster, asked, &deck, &Leaf::client(name));
                    assert_eq!(keep_alive(&other, id).await, Err(denied()), "{what}: {name}");
                    assert_eq!(time_to_live(&other, id).await, Err(denied()), "{what}: {name}");
                }
                let nobody = user(&cluster, asked, &deck, &Leaf::nameless());
                // A credential, if a poor one: it is the keys that nobody may touch.
                assert_eq!(keep_alive(&nobody, id).await, Err(denied()), "{what}");
                assert_eq!(time_to_live(&nobody, id).await, Err(denied()), "{what}");
                let root = user(&cluster, asked, &deck, &Leaf::client("root"));
                assert_eq!(keep_alive(&root, id).await, Ok(600), "{what}: root by {asked}");
            }
        }
    });
}

async fn promote(session: &Session, id: u64) -> Result<(), Status> {
    let request = session.ask(pb::MemberPromoteRequest { id });
    session.api.cluster.clone().member_promote(request).await.map(drop)
}

#[test]
fn a_follower_passes_a_promotion_on_with_roots_token() {
    let deck = Deck::new();
    run(async {
        let mut cluster = secured(2, options(&deck)).await;
        let (learner, id) = run_learner(&mut cluster, &[0, 1]).await;
        let follower = cluster.leader_among(&[0, 1]).await ^ 1;
        let nobody = user(&cluster, follower, &deck, &Leaf::nameless());
        let refused = async |session: &Session| said(promote(session, id).await.unwrap_err());
        assert_eq!(refused(&nobody).await, user_empty());
        // A token of somebody else is not helped by root's certificate.
        let with_token = async |leaf: &Leaf, name: &str| {
            let session = user(&cluster, follower, &deck, leaf);
            let token = login(&session.api, name, &password(name)).await.unwrap();
            Session::with_token(session.api, &token)
        };
        let alice = with_token(&Leaf::client("root"), "alice").await;
        assert_eq!(refused(&alice).await, denied());
        let root = with_token(&Leaf::nameless(), "root").await;
        wait_for("the follower to have the learner promoted", || async {
            promote(&root, id).await.map_err(|error| error.to_string())
        })
        .await;
        cluster.wait_serving(learner).await;
        // It knows the users, too.
        let alice = user(&cluster, learner, &deck, &Leaf::client("alice"));
        assert_eq!(alice.put("a/1", "v").await, Ok(()));
        assert_eq!(alice.put("b", "v").await, Err(denied()));
        let log = cluster.members[follower ^ 1].log_text();
        assert!(!log.contains("refused to promote a member"), "{log}");
    });
}

/// A watch of alice's keys.
async fn watch(api: &Api) -> Watching {
    let mut watching = api.watching();
    let create =
        pb::WatchCreateRequest { key: "a/".into(), range_end: "a0".into(), ..Default::default() };
    let reply = watching.created(create).await;
    assert!(!reply.canceled, "{reply:?}");
    watching
}

/// Puts through every member by who comes in with `connector`, by a new connection each; every watch has
/// to see all of them, in order and once.
async fn puts_are_seen(
    cluster: &Cluster,
    connector: &Connector,
    watches: &mut [Watching],
    what: &str,
) {
    let mut expected = Vec::new();
    for node in ALL {
        let alice = Session::nobody(api(cluster.members[node].client_port, connector.clone()));
        let value = format!("{what} by {node}");
        assert_eq!(alice.put("a/k", &value).await, Ok(()), "{value}");
        assert_eq!(alice.put("b", &value).await, Err(denied()), "{value}");
        expected.push(value);
    }
    for watching in watches {
        let mut seen = Vec::new();
        while seen.len() < expected.len() {
            let response = watching.next().await;
            assert!(!response.canceled, "{what}: {response:?}");
            seen.extend(response.events.iter().map(|event| {
                let pair = kv(event.kv.as_ref().expect("an event is of a key"));
                String::from_utf8(pair.value.to_vec()).unwrap()
            }));
        }
        assert_eq!(seen, expected, "{what}");
    }
}

#[test]
fn watches_of_a_user_stand_while_certificates_are_replaced() {
    let deck = Deck::new();
    let new_root = Authority::new("new root of the test");
    let new_signer = new_root.intermediate("new signer of the test");
    let both = format!("{}{}", deck.root.pem, new_root.pem);
    let issue = |name: &str| [&deck.signer, &new_signer].map(|by| by.issue(&Leaf::client(name)));
    let [old_alice, new_alice] = issue("alice");
    let [old_root, new_root_user] = issue("root");
    let shows = |issued| {
        let config = client_config(&both, Some(issued));
        Connector::new(move || config.clone())
    };
    let (alice, renewed) = (shows(&old_alice), shows(&new_alice));
    run(async {
        let mut options = options(&deck);
        options.secure = Some(Secure { client: Some(shows(&old_root)), peers: true });
        let mut cluster = secured(3, options).await;
        let mut watches = Vec::new();
        for node in ALL {
            watches.push(watch(&api(cluster.members[node].client_port, alice.clone())).await);
        }
        puts_are_seen(&cluster, &alice, &mut watches, "before").await;

        let new_config = client_config(&both, Some(&new_alice));
        let old_config = client_config(&both, Some(&old_alice));
        pki::replace(&deck.ca, both.as_bytes());
        all_ports(&cluster, "members to trust both", &new_config, |seen| seen.is_ok()).await;
        // Of another authority and with another key, but of the same name.
        puts_are_seen(&cluster, &renewed, &mut watches, "both are trusted").await;

        let member = new_signer.issue(&Leaf::named("member"));
        member.write(deck.path(), "member");
        let shown = der(&member);
        all_ports(&cluster, "members to show the new certificate", &old_config, |seen| {
            seen.is_ok_and(|certificate| certificate == shown)
        })
        .await;
        puts_are_seen(&cluster, &alice, &mut watches, "new certificates").await;

        pki::replace(&deck.ca, new_root.pem.as_bytes());
        all_ports(&cluster, "members to refuse the old", &old_config, |seen| seen.is_err()).await;
        puts_are_seen(&cluster, &renewed, &mut watches, "the old one counts no more").await;

        // The streams are still alice's, and only hers: what she may not see any more is not shown.
        cluster.options.secure = Some(Secure { client: Some(shows(&new_root_user)), peers: true });
        let root = Session::nobody(api(cluster.members[0].client_port, shows(&new_root_user)));
        root.grant("alice", (Type::Read, "c", "")).await.unwrap();
        for node in ALL {
            // Whoever reads here knows what was acknowledged there.
            cluster.wait_serving(node).await;
        }
        for (node, watching) in watches.iter_mut().enumerate() {
            for (key, canceled) in [("c", false), ("d", true)] {
                let create = pb::WatchCreateRequest { key: key.into(), ..Default::default() };
                let reply = watching.created(create).await;
                assert_eq!(reply.canceled, canceled, "member {node}: {key}: {reply:?}");
            }
        }
        puts_are_seen(&cluster, &renewed, &mut watches, "after").await;
    });
}
