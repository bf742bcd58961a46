//! New certificates, and a new authority, for a cluster at work: nobody may notice.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::deck::{Deck, client_config};
use crate::pki::{self, Authority, Issued, Leaf};
use crate::rig::client::Client;
use crate::rig::cluster::Cluster;
use crate::rig::net::Node;
use crate::rig::process::Program;
use crate::rig::secure::{Connector, Secure};
use crate::rig::{run, wait_for};

const MEMBERS: [Node; 3] = [0, 1, 2];
/// Requests that each client has answered between two steps.
const STEP: u64 = 15;
/// A put that takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(10);

/// What clients trust and show; they look when they connect.
#[derive(Clone)]
struct Current(Arc<Mutex<Arc<ClientConfig>>>);

impl Current {
    fn new(config: Arc<ClientConfig>) -> Current {
        Current(Arc::new(Mutex::new(config)))
    }

    fn set(&self, config: Arc<ClientConfig>) {
        *self.0.lock().unwrap() = config;
    }

    fn connector(&self) -> Connector {
        let current = self.0.clone();
        Connector::new(move || current.lock().unwrap().clone())
    }
}

/// What the clients do together.
#[derive(Default)]
struct Load {
    stop: Cell<bool>,
    /// The member whose clients rest.
    resting: Cell<Option<Node>>,
    failures: RefCell<Vec<String>>,
    clients: RefCell<Vec<Rc<Seat>>>,
}

/// One client: where it is, and how far it came.
struct Seat {
    node: Node,
    key: String,
    connector: Connector,
    reconnects: bool,
    puts: Cell<u64>,
    rests: Cell<bool>,
}

impl Load {
    fn start(
        self: &Rc<Self>,
        cluster: &Cluster,
        node: Node,
        name: &str,
        current: &Current,
    ) -> JoinHandle<()> {
        let seat = Rc::new(Seat {
            node,
            key: format!("{name}-{node}"),
            connector: current.connector(),
            reconnects: name == "reconnecting",
            puts: Cell::new(0),
            rests: Cell::new(false),
        });
        self.clients.borrow_mut().push(seat.clone());
        let (load, port) = (self.clone(), cluster.members[node].client_port);
        tokio::task::spawn_local(async move {
            let connect = || Client::new(port, DEADLINE, Some(seat.connector.clone()));
            let mut client = connect();
            while !load.stop.get() {
                seat.rests.set(load.resting.get() == Some(seat.node));
                if seat.rests.get() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                }
                if seat.reconnects {
                    client = connect();
                }
                let number = seat.puts.get() + 1;
                match client.put(&seat.key, number.to_string()).await {
                    Ok(_) => seat.puts.set(number),
                    Err(error) => {
                        load.failures.borrow_mut().push(format!("{} {number}: {error}", seat.key));
                        return;
                    }
                }
            }
        })
    }

    /// Waits until every client has had [`STEP`] more answers, but those that rest.
    async fn step(&self) {
        let before: Vec<u64> = self.clients.borrow().iter().map(|seat| seat.puts.get()).collect();
        wait_for("every client to go on", || async {
            self.check();
            let clients = self.clients.borrow();
            let behind = clients.iter().zip(&before).filter(|(seat, before)| {
                self.resting.get() != Some(seat.node) && seat.puts.get() < **before + STEP
            });
            match behind.count() {
                0 => Ok(()),
                n => Err(format!("{n} clients wait")),
            }
        })
        .await;
    }

    /// Has the clients of `node` finish what they do and rest; of nobody with `None`.
    async fn rest(&self, node: Option<Node>) {
        self.resting.set(node);
        wait_for("clients to rest", || async {
            let clients = self.clients.borrow();
            let at_work = |seat: &&Rc<Seat>| seat.rests.get() != (node == Some(seat.node));
            match clients.iter().filter(at_work).count() {
                0 => Ok(()),
                n => Err(format!("{n} of them are not there yet")),
            }
        })
        .await;
    }

    fn check(&self) {
        assert_eq!(*self.failures.borrow(), Vec::<String>::new(), "requests failed");
    }
}

/// A handshake and a request without the client library, so that what a port accepts and shows can be
/// asked at any time: the certificate it shows, if it answers.
async fn probe(port: u16, config: &Arc<ClientConfig>) -> io::Result<CertificateDer<'static>> {
    let mut http1 = (**config).clone();
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let http1 = Arc::new(http1);
    let mut stream = Connector::new(move || http1.clone()).connect(port).await?;
    // A refused client certificate shows only now: the client is through before the server is.
    stream.write_all(b"GET /version HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer).await;
    if !answer.starts_with(b"HTTP/1.1 200") {
        let text = String::from_utf8_lossy(&answer).into_owned();
        return Err(read.err().unwrap_or_else(|| io::Error::other(text)));
    }
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first().cloned());
    Ok(shown.expect("a server shows a certificate"))
}

/// Waits until every port of every member is seen by `config` as `wanted` says.
pub async fn all_ports(
    cluster: &Cluster,
    what: &str,
    config: &Arc<ClientConfig>,
    wanted: impl Fn(io::Result<CertificateDer<'static>>) -> bool,
) {
    for node in MEMBERS {
        let member = &cluster.members[node];
        for port in [member.client_port, member.peer_port] {
            wait_for(what, || async {
                let seen = probe(port, config).await;
                let shown = format!("port {port} of member {node}: {seen:?}");
                if wanted(seen) { Ok(()) } else { Err(shown) }
            })
            .await;
        }
    }
}

/// Breaks every connection between members, one member after the other, so that they have to be made
/// anew. Clients of the one that is cut off rest, for what is on the way then is lost.
async fn reconnect_all(cluster: &mut Cluster, load: &Load) {
    // A leader that is cut off leaves the others without one, and that costs requests, whatever the
    // certificates are; its connections break with those of the others.
    let leader = cluster.leader().await;
    for node in MEMBERS.into_iter().filter(|node| *node != leader) {
        let others: Vec<Node> = MEMBERS.into_iter().filter(|other| *other != node).collect();
        load.rest(Some(node)).await;
        cluster.net.part(&[node], &others);
        load.step().await;
        cluster.net.heal();
        cluster.wait_serving(node).await;
        load.rest(None).await;
        load.step().await;
    }
}

pub fn der(issued: &Issued) -> CertificateDer<'static> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(issued.chain.as_bytes()).unwrap()
}

#[test]
fn authority_and_certificates_are_replaced_under_load_and_no_request_fails() {
    let deck = Deck::new();
    let new_root = Authority::new("new root of the test");
    let new_signer = new_root.intermediate("new signer of the test");
    let old_pem = deck.root.pem.clone();
    let both_pem = format!("{old_pem}{}", new_root.pem);
    let new_member = new_signer.issue(&Leaf::named("member"));
    let new_user = new_signer.issue(&Leaf::client("user"));
    let old_user = client_config(&both_pem, Some(&deck.user));
    // It takes any member for what it is, so only what the members accept decides.
    let new_user_trusting_all = client_config(&both_pem, Some(&new_user));

    run(async {
        let current = Current::new(client_config(&old_pem, Some(&deck.user)));
        let mut options = deck.options();
        options.secure = Some(Secure { client: Some(current.connector()), peers: true });
        let mut cluster = Cluster::start(Program::Quorate, 3, options).await;
        let load = Rc::<Load>::default();
        let mut clients = Vec::new();
        for node in MEMBERS {
            clients.push(load.start(&cluster, node, "steady", &current));
            clients.push(load.start(&cluster, node, "reconnecting", &current));
        }
        load.step().await;

        // Members trust both authorities, then so do clients.
        pki::replace(&deck.ca, both_pem.as_bytes());
        all_ports(&cluster, "members to trust both", &new_user_trusting_all, |seen| seen.is_ok())
            .await;
        current.set(client_config(&both_pem, Some(&deck.user)));
        load.step().await;
        reconnect_all(&mut cluster, &load).await;

        // Members show what the new one has signed, then so do clients.
        new_member.write(deck.path(), "member");
        let shown = der(&new_member);
        all_ports(&cluster, "members to show the new certificate", &old_user, |seen| {
            seen.is_ok_and(|certificate| certificate == shown)
        })
        .await;
        load.step().await;
        reconnect_all(&mut cluster, &load).await;
        current.set(new_user_trusting_all.clone());
        load.step().await;

        // The old one counts for nothing any more.
        pki::replace(&deck.ca, new_root.pem.as_bytes());
        all_ports(&cluster, "members to refuse the old", &old_user, |seen| seen.is_err()).await;
        current.set(client_config(&new_root.pem, Some(&new_user)));
        load.step().await;
        reconnect_all(&mut cluster, &load).await;
        load.step().await;

        load.stop.set(true);
        for client in clients {
            client.await.unwrap();
        }
        load.check();
        for seat in load.clients.take() {
            let connected = seat.connector.connected() as u64;
            let expected = if seat.reconnects { seat.puts.get() } else { 1 };
            assert_eq!(connected, expected, "{}", seat.key);
            let kept = cluster.client(seat.node).get(&seat.key).await.unwrap().unwrap();
            assert_eq!(kept.value, seat.puts.get().to_string().into_bytes(), "{}", seat.key);
        }
        let revision = cluster.client(0).revision().await.unwrap();
        cluster.equal_hashes(&MEMBERS, revision).await;
    });
}
