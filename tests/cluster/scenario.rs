//! What all tests here share: a cluster with clients on every member, something that happens to it, and
//! the judges at the end.

use std::future::Future;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use tonic::Status;

use crate::record::{Load, Recorder};
use crate::rig;
use crate::rig::client::Client;
use crate::rig::cluster::{Cluster, Options};
use crate::rig::net::Node;
use crate::rig::process::Program;

/// Calls that are answered before and after what happens.
const WARM: usize = 60;

/// Held by all tests, and alone by one that measures how long something takes.
static MACHINE: RwLock<()> = RwLock::new(());

/// Runs a cluster of three under load through `event`; afterwards it is healed, and all that its
/// clients saw must be true, their writes kept, the watches gapless, the members equal.
pub fn under_load(options: Options, event: impl AsyncFnOnce(&mut Cluster, &mut Recorder)) {
    // A test that failed has left nothing behind that this lock protects.
    let _shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    healed(options, event);
}

/// The same, with no other test of this binary beside it.
pub fn measured(options: Options, event: impl AsyncFnOnce(&mut Cluster, &mut Recorder)) {
    let _alone = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
    healed(options, event);
}

fn healed(options: Options, event: impl AsyncFnOnce(&mut Cluster, &mut Recorder)) {
    run(Load::default(), options, async |cluster, recorder| {
        event(cluster, recorder).await;
        cluster.heal();
        vec![0, 1, 2]
    });
}

/// Under load of some other kind; `event` leaves the cluster whole, and answers who is a member in the
/// end.
pub fn under_load_of(
    load: Load,
    options: Options,
    event: impl AsyncFnOnce(&mut Cluster, &mut Recorder) -> Vec<Node>,
) {
    let _shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    run(load, options, event);
}

/// A test that brings its own cluster.
pub fn with_own_cluster<T>(test: impl Future<Output = T>) -> T {
    let _shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    rig::run(test)
}

fn run(
    load: Load,
    options: Options,
    event: impl AsyncFnOnce(&mut Cluster, &mut Recorder) -> Vec<Node>,
) {
    rig::run(async {
        let mut cluster = Cluster::start(Program::from_env(), 3, options).await;
        let mut recorder = Recorder::start(&cluster, &[0, 1, 2], load);
        recorder.progress(WARM).await;
        let members = event(&mut cluster, &mut recorder).await;
        for node in &members {
            cluster.wait_serving(*node).await;
        }
        recorder.progress(WARM).await;
        recorder.verify(&cluster, &members).await;
    });
}

/// The bound on how long there may be no writes after a leader is lost.
pub fn outage_max(options: &Options) -> Duration {
    2 * options.election() + Duration::from_secs(1)
}

/// Everyone but `node`, of three.
pub fn others(node: Node) -> Vec<Node> {
    (0..3).filter(|other| *other != node).collect()
}

/// Writes through this member are not acknowledged, and nothing is read there but old state.
pub async fn cannot_serve(cluster: &Cluster, node: Node) {
    let client = cluster.client_within(node, Duration::from_secs(2));
    let (written, read) = tokio::join!(client.put("!cut off", ""), client.get("!cut off"));
    assert!(written.is_err(), "member {node} acknowledged a write without a quorum");
    assert!(read.is_err(), "member {node} answered a linearizable read without a quorum");
}

/// Puts `count` keys of `bytes` bytes, many at a time, through whoever takes them.
pub async fn fill(client: &Client, count: usize, bytes: usize) -> Result<(), Status> {
    const AT_A_TIME: usize = 64;
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..count {
        if puts.len() == AT_A_TIME {
            puts.join_next().await.expect("some are under way").expect("no panic")?;
        }
        let client = client.clone();
        puts.spawn(async move {
            let key = format!("!fill/{:04}", n % 1000);
            client.put(&key, vec![b'f'; bytes]).await.map(|_| ())
        });
    }
    while let Some(put) = puts.join_next().await {
        put.expect("no panic")?;
    }
    Ok(())
}

/// What a member answers to a GET on its client port: the status, and what follows the head.
pub async fn page(cluster: &Cluster, node: Node, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let port = cluster.members[node].client_port;
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = asked.await.unwrap_or_else(|error| panic!("{path} of member {node}: {error}"));
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.expect("an answer has a status"), body.to_string())
}

/// The sum of a metric over its labels, as a member shows it; 0 if it does not show it.
pub async fn metric(cluster: &Cluster, node: Node, name: &str) -> f64 {
    let (_, page) = page(cluster, node, "/metrics").await;
    let value = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let series = series.split('{').next()?;
        (series == name).then(|| value.parse::<f64>().expect("a metric is a number"))
    };
    page.lines().filter_map(value).sum()
}
