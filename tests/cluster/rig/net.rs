//! The network between members: a proxy in front of each member's peer port, and a rule for each
//! ordered pair of members.
//!
//! A connection carries bytes both ways, and which way says nothing about who dialled: the data of a
//! stream flows from the dialled member to the dialler. So the rule of (a, b) holds for the bytes from
//! a to b on the connections that a dialled and on those that b dialled alike, and cutting it alone
//! is an asymmetric partition.
//!
//! Who dialled is looked up in the system's socket tables: the port that a connection comes from
//! belongs to a socket, and the socket to a member's process. That also knows requests that name no
//! sender (`/version`, `/members`, probes).
//!
//! What a rule does to a TCP connection:
//! - cut: bytes are not taken from the sender any more, as when no packet gets through; the ends notice
//!   by their timeouts. When the link is back, connections that were cut are reset, so that what was
//!   withheld is lost, not late. A connection made while the link is cut stands, in the eyes of the
//!   dialler, but nobody answers.
//! - delay: each piece is delivered so much later.
//! - loss: a lost packet does not lose bytes, it holds back all that follows until it was sent again,
//!   after 200 ms, then 400 ms, then 800 ms. A new connection whose first packets are lost is refused.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::random::Random;

/// What happens to bytes from one member to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    pub cut: bool,
    pub delay: Duration,
    /// Of packets, and of new connections.
    pub loss_percent: u64,
}

/// A member, by its number in the cluster.
pub type Node = usize;

#[derive(Default, Debug)]
struct Rules {
    /// What is not named here has no rule.
    links: HashMap<(Node, Node), Rule>,
}

struct State {
    rules: watch::Sender<Rules>,
    /// The process of each member that runs.
    processes: RwLock<HashMap<Node, u32>>,
    random: Mutex<Random>,
}

/// The network; it ends with this value.
pub struct Net {
    state: Arc<State>,
    /// Runs the proxies on a thread of their own, so that a test that computes delays nobody.
    runtime: tokio::runtime::Handle,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Net {
    pub fn new(seed: u64) -> Net {
        let state = Arc::new(State {
            rules: watch::Sender::new(Rules::default()),
            processes: RwLock::default(),
            random: Mutex::new(Random::new(seed)),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let run = move || {
            // The sender is dropped or it sends: either way it is the end.
            runtime.block_on(stopped).ok();
        };
        let thread = std::thread::Builder::new().name("net".to_string()).spawn(run).unwrap();
        Net { state, runtime: handle, stop: Some(stop), thread: Some(thread) }
    }

    /// Puts a proxy in front of `target`, member `node`'s peer port; answers where it listens.
    pub fn proxy(&self, node: Node, target: SocketAddr) -> SocketAddr {
        let listener = crate::ports::free_listener();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let state = self.state.clone();
        self.runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            loop {
                let (dialler, from) = listener.accept().await.unwrap();
                tokio::spawn(serve(state.clone(), dialler, from, node, target));
            }
        });
        address
    }

    /// Member `node` runs as process `id` from now on; `None` if it does not.
    pub fn runs(&self, node: Node, id: Option<u32>) {
        let mut processes = self.state.processes.write().unwrap();
        match id {
            Some(id) => processes.insert(node, id),
            None => processes.remove(&node),
        };
    }

    /// Changes the rule of what goes from `from` to `to`.
    pub fn set(&self, from: Node, to: Node, rule: Rule) {
        self.state.rules.send_modify(|rules| {
            rules.links.insert((from, to), rule);
        });
    }

    /// The same rule for both directions between any two of `nodes`.
    pub fn set_all(&self, nodes: usize, rule: Rule) {
        self.state.rules.send_modify(|rules| {
            for from in 0..nodes {
                for to in (0..nodes).filter(|to| *to != from) {
                    rules.links.insert((from, to), rule);
                }
            }
        });
    }

    /// Cuts what goes from any of `from` to any of `to`, and nothing the other way.
    pub fn cut(&self, from: &[Node], to: &[Node]) {
        self.state.rules.send_modify(|rules| {
            for &from in from {
                for &to in to {
                    rules.links.entry((from, to)).or_default().cut = true;
                }
            }
        });
    }

    /// Cuts everything between `these` and `those`.
    pub fn part(&self, these: &[Node], those: &[Node]) {
        self.cut(these, those);
        self.cut(those, these);
    }

    /// Takes all rules away.
    pub fn heal(&self) {
        self.state.rules.send_modify(|rules| rules.links.clear());
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

impl State {
    fn lost(&self, percent: u64) -> bool {
        percent > 0 && self.random.lock().unwrap().percent(percent)
    }

    /// How long a piece is held back by losses: until one of the times it is sent it arrives.
    fn retransmission(&self, percent: u64) -> Duration {
        let mut held = Duration::ZERO;
        for timeout_ms in [200, 400, 800] {
            if !self.lost(percent) {
                break;
            }
            held += Duration::from_millis(timeout_ms);
        }
        held
    }

    /// The member whose process has the socket that is connected from `from` to `to`.
    fn dialler(&self, from: SocketAddr, to: SocketAddr) -> Option<Node> {
        let processes = self.processes.read().unwrap().clone();
        let inode = inode_of(from, to)?;
        let link = format!("socket:[{inode}]");
        processes.into_iter().find(|(_, id)| holds(*id, &link)).map(|(node, _)| node)
    }
}

/// The inode of this machine's TCP socket at `local` that is connected to `remote`.
fn inode_of(local: SocketAddr, remote: SocketAddr) -> Option<String> {
    let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (local, remote) else { return None };
    // As the table has them: the address as a number in this machine's byte order.
    let text = |end: SocketAddrV4| {
        format!("{:08X}:{:04X}", u32::from_ne_bytes(end.ip().octets()), end.port())
    };
    let (local, remote) = (text(local), text(remote));
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let found = fields.nth(1)? == local && fields.next()? == remote;
        // Before the inode: state, queues, timer, retransmits, user, timeout. Without an owner it is 0.
        let inode = fields.nth(6)?;
        (found && inode != "0").then(|| inode.to_string())
    })
}

/// Whether a process has an open file that reads `link`.
fn holds(process: u32, link: &str) -> bool {
    let Ok(files) = std::fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    files
        .flatten()
        .any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == link))
}

/// Carries one connection, from `from` to member `node`, whose peer port is `target`.
async fn serve(
    state: Arc<State>,
    mut dialler: TcpStream,
    from: SocketAddr,
    node: Node,
    target: SocketAddr,
) {
    let Ok(proxy) = dialler.local_addr() else { return };
    let lookup = state.clone();
    let looked_up = tokio::task::spawn_blocking(move || lookup.dialler(from, proxy)).await;
    // Nobody's: it has been closed already, or it is not a member's.
    let Some(peer) = looked_up.expect("reading the tables does not panic") else { return };
    let rule = rule_of(&state.rules.borrow(), peer, node);
    if state.lost(rule.loss_percent) {
        return;
    }
    let Ok(mut member) = TcpStream::connect(target).await else { return };
    if dialler.set_nodelay(true).is_err() || member.set_nodelay(true).is_err() {
        return;
    }
    let (dialler_reads, dialler_writes) = dialler.split();
    let (member_reads, member_writes) = member.split();
    let there = carry(&state, (peer, node), dialler_reads, member_writes);
    let back = carry(&state, (node, peer), member_reads, dialler_writes);
    // An error of either ends both; an orderly end of one leaves the other its time.
    let ended = tokio::try_join!(there, back);
    if ended.is_err_and(|error| error.kind() == WAS_CUT) {
        // Closed with a reset, not in order. A socket that is gone needs none.
        dialler.set_zero_linger().ok();
        member.set_zero_linger().ok();
    }
}

/// The error of a connection whose link was cut; no read or write on the loopback device has it.
const WAS_CUT: io::ErrorKind = io::ErrorKind::HostUnreachable;

fn rule_of(rules: &Rules, from: Node, to: Node) -> Rule {
    rules.links.get(&(from, to)).copied().unwrap_or_default()
}

/// Carries bytes one way until their end; an error asks for the connection to be reset.
async fn carry(
    state: &State,
    (from, to): (Node, Node),
    reads: ReadHalf<'_>,
    writes: WriteHalf<'_>,
) -> io::Result<()> {
    // Bounds what a delayed link holds; etcd's streams send pieces of 4 KiB and more.
    let (sender, receiver) = mpsc::channel(256);
    tokio::try_join!(take(state, (from, to), reads, sender), deliver(writes, receiver))?;
    Ok(())
}

async fn take(
    state: &State,
    (from, to): (Node, Node),
    mut reads: ReadHalf<'_>,
    sender: mpsc::Sender<(Instant, Vec<u8>)>,
) -> io::Result<()> {
    let mut rules = state.rules.subscribe();
    let mut buffer = vec![0; 64 * 1024];
    let mut last = Instant::now();
    loop {
        let rule = rule_of(&rules.borrow_and_update(), from, to);
        if rule.cut {
            let back = rules.wait_for(|rules| !rule_of(rules, from, to).cut).await;
            // Without a network there is no connection either.
            back.map_err(io::Error::other)?;
            return Err(WAS_CUT.into());
        }
        let taken = tokio::select! {
            biased;
            changed = rules.changed() => {
                changed.map_err(io::Error::other)?;
                continue;
            }
            taken = reads.read(&mut buffer) => taken?,
        };
        if taken == 0 {
            return Ok(());
        }
        let due = Instant::now() + rule.delay + state.retransmission(rule.loss_percent);
        last = last.max(due);
        if sender.send((last, buffer[..taken].to_vec())).await.is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

async fn deliver(
    mut writes: WriteHalf<'_>,
    mut pieces: mpsc::Receiver<(Instant, Vec<u8>)>,
) -> io::Result<()> {
    while let Some((due, piece)) = pieces.recv().await {
        tokio::time::sleep_until(due).await;
        writes.write_all(&piece).await?;
    }
    writes.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends of a connection from this process, which stands for member 0, to member 1.
    async fn connected(net: &Net) -> (TcpStream, TcpStream) {
        net.runs(0, Some(std::process::id()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = net.proxy(1, listener.local_addr().unwrap());
        let dialler = TcpStream::connect(proxy).await.unwrap();
        let (member, _) = listener.accept().await.unwrap();
        (dialler, member)
    }

    async fn pass(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) -> io::Result<()> {
        from.write_all(text).await?;
        let mut read = vec![0; text.len()];
        to.read_exact(&mut read).await?;
        assert_eq!(read, text);
        Ok(())
    }

    #[tokio::test]
    async fn one_way_is_cut_and_the_other_flows() {
        let net = Net::new(1);
        let (mut dialler, mut member) = connected(&net).await;
        pass(&mut dialler, &mut member, b"there").await.unwrap();
        pass(&mut member, &mut dialler, b"back").await.unwrap();
        net.cut(&[0], &[1]);
        pass(&mut member, &mut dialler, b"still").await.unwrap();
        let there = pass(&mut dialler, &mut member, b"lost");
        let there = tokio::time::timeout(Duration::from_millis(300), there).await;
        assert!(there.is_err(), "{there:?}");
        // What was withheld is lost, and the connection with it.
        net.heal();
        let mut rest = Vec::new();
        let ended = member.read_to_end(&mut rest).await;
        assert!(ended.is_err() && rest.is_empty(), "{ended:?} {rest:?}");
    }

    #[tokio::test]
    async fn a_delay_and_losses_hold_back_and_keep_the_order() {
        let net = Net::new(2);
        let (mut dialler, mut member) = connected(&net).await;
        net.set(0, 1, Rule { delay: Duration::from_millis(150), ..Rule::default() });
        let started = Instant::now();
        pass(&mut dialler, &mut member, b"late").await.unwrap();
        assert!(started.elapsed() >= Duration::from_millis(150));
        net.set(0, 1, Rule { loss_percent: 50, ..Rule::default() });
        let started = Instant::now();
        for n in 0..6_u8 {
            pass(&mut dialler, &mut member, &[n, n]).await.unwrap();
        }
        assert!(started.elapsed() >= Duration::from_millis(200));
        net.heal();
        drop(dialler);
        assert!(matches!(member.read(&mut [0; 8]).await, Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn nobody_else_gets_through() {
        let net = Net::new(3);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = net.proxy(1, listener.local_addr().unwrap());
        let mut stranger = TcpStream::connect(proxy).await.unwrap();
        assert!(matches!(stranger.read(&mut [0; 8]).await, Ok(0) | Err(_)));
    }
}
