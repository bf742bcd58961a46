//! Snapshots between members: the message, then the database, in one POST (formats-and-peers 6.4).
//!
//! A database is never in memory as a whole: it is read from a file while it leaves, and written to
//! one as it comes in. Both files are touched on threads that may block.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use actix::prelude::*;
use axum::body::Body;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use metrics::Gauge;
use parking_lot::Mutex;
use prost::Message as _;
use quorate_proto::raftpb::Message as RaftMessage;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use super::codec::{CodecError, decode_message};
use super::network::Net;
use super::peer::{Peer, undelivered};
use super::pipeline::{Connection, PostError};
use crate::actors::applier::Applier;
use crate::actors::exit::full;
use crate::actors::export::{self, ExportError, Exported};
use crate::actors::raft::SnapshotDone;
use crate::actors::shared::Shared;
use crate::config::Url;
use crate::config::duration::GoDuration;
use crate::core::raft::MSG_SNAP;
use crate::core::types::MemberId;

use crate::storage::snap_dir::{SnapDir, SnapError};

/// Snapshots on their way at once, to all members: each is a file of the database's size.
const SENDING_MAX: usize = 16;
/// The message before a database: the member list and little more.
const ENVELOPE_MAX: u64 = 64 << 20;
/// Bytes read from the file at a time.
const READ_BYTES: usize = 256 << 10;
/// Chunks received that the disk has not taken yet.
const UNWRITTEN_CHUNKS: usize = 16;
/// A receiver that takes nothing for this long has gone.
const STALLED: Duration = Duration::from_secs(30);
/// How long a receiver may take to bring the database to its disk.
const ANSWER_WITHIN: Duration = Duration::from_secs(300);

/// Makes snapshots for other members.
pub trait Export: Send + Sync {
    /// Everything that is applied when this is called, or more.
    fn export(&self) -> Pin<Box<dyn Future<Output = Result<Exported, ExportError>> + Send>>;
}

/// From the engine of a running member.
pub struct FromEngine {
    pub shared: Arc<Shared>,
    pub applier: Addr<Applier>,
    pub snapshots: SnapDir,
}

impl Export for FromEngine {
    fn export(&self) -> Pin<Box<dyn Future<Output = Result<Exported, ExportError>> + Send>> {
        let (shared, applier) = (self.shared.clone(), self.applier.clone());
        let dir = self.snapshots.dir().to_path_buf();
        Box::pin(async move { export::export(&shared, &applier, &dir).await })
    }
}

/// Where snapshots come from and go to, and how many are under way.
pub struct Snapshots {
    export: Box<dyn Export>,
    dir: SnapDir,
    sending: AtomicUsize,
    /// Indexes of those that are being received: each has one file.
    receiving: Mutex<HashSet<u64>>,
}

impl Snapshots {
    /// Sends what `export` makes, and receives into `dir`.
    pub fn new(export: Box<dyn Export>, dir: SnapDir) -> Self {
        Snapshots { export, dir, sending: AtomicUsize::new(0), receiving: Mutex::default() }
    }
}

/// Why a snapshot was not sent.
#[derive(thiserror::Error, Debug)]
enum SendError {
    #[error("cannot make it")]
    Export(#[from] ExportError),
    #[error(transparent)]
    Post(#[from] PostError),
    #[error("the receiver took nothing for {STALLED:?}")]
    Stalled,
    #[error("the receiver did not answer within {ANSWER_WITHIN:?}")]
    Unanswered,
}

/// The body of the POST: the envelope, then the file. `sent` counts bytes as the socket takes them.
fn body(
    message: &RaftMessage,
    db: std::fs::File,
    sent: Arc<AtomicUsize>,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + 'static {
    let bytes = message.encoded_len();
    let mut envelope = BytesMut::with_capacity(8 + bytes);
    envelope.put_u64(bytes as u64);
    message.encode_raw(&mut envelope);
    let mut file = tokio::fs::File::from_std(db);
    file.set_max_buf_size(READ_BYTES);
    let chunks = stream::try_unfold(file, |mut file| async move {
        let mut chunk = BytesMut::with_capacity(READ_BYTES);
        let read = file.read_buf(&mut chunk).await?;
        Ok((read > 0).then(|| (chunk.freeze(), file)))
    });
    let head = stream::once(std::future::ready(Ok(envelope.freeze())));
    head.chain(chunks).inspect(move |chunk| {
        if let Ok(chunk) = chunk {
            sent.fetch_add(chunk.len(), Ordering::Relaxed);
        }
    })
}

/// Fails when nothing has left for too long, or nothing came back after everything had.
async fn watch(sent: &AtomicUsize, whole: usize) -> SendError {
    let (mut before, mut since) = (0, Instant::now());
    let mut look = tokio::time::interval(STALLED / 10);
    loop {
        look.tick().await;
        let now = sent.load(Ordering::Relaxed);
        if now != before {
            (before, since) = (now, Instant::now());
        } else if now >= whole && since.elapsed() > ANSWER_WITHIN {
            return SendError::Unanswered;
        } else if now < whole && since.elapsed() > STALLED {
            return SendError::Stalled;
        }
    }
}

async fn send(
    net: Arc<Net>,
    to: MemberId,
    url: Url,
    mut message: RaftMessage,
) -> Result<usize, SendError> {
    let Exported { snapshot, db, size } = net.snapshots.export.export().await?;
    tracing::info!(
        "snapshot-index" = snapshot.metadata.as_ref().map_or(0, |metadata| metadata.index),
        "remote-peer-id" = %to,
        bytes = size,
        "start to send database snapshot"
    );
    message.snapshot = Some(snapshot);
    let whole = 8 + message.encoded_len() + size as usize;
    let sent = Arc::<AtomicUsize>::default();
    let body = Body::from_stream(body(&message, db, sent.clone()));
    let posting = async {
        let mut connection = Connection::open(&net, &url).await?;
        let kind = "application/octet-stream";
        connection.post(&net, &url, "/raft/snapshot", kind, body).await
    };
    tokio::select! {
        posted = posting => posted?,
        error = watch(&sent, whole) => return Err(error),
    }
    Ok(whole)
}

impl Peer {
    /// Sends the snapshot that `message` stands for, with a database as of now.
    pub(super) fn send_snapshot(&mut self, message: RaftMessage, ctx: &mut Context<Self>) {
        let sending = &self.net.snapshots.sending;
        if self.sending_snapshot {
            // Raft is told of the one under way: that makes it ask for another if it needs one.
            tracing::warn!(
                "remote-peer-id" = %self.id,
                "ignored a snapshot for a peer that is being sent one"
            );
            return;
        }
        if sending.load(Ordering::Relaxed) >= SENDING_MAX {
            return self.lost(&[message], &"too many snapshots are being sent");
        }
        sending.fetch_add(1, Ordering::Relaxed);
        self.sending_snapshot = true;
        let (net, to, url) = (self.net.clone(), self.id, self.urls.pick());
        let label = to.to_string();
        net.metrics.snapshot_send_inflights.with(&[&label]).increment(1.0);
        let started = Instant::now();
        let sending = send(net, to, url.clone(), message).into_actor(self);
        ctx.spawn(sending.map(move |result, this, _| {
            this.snapshot_sent(&label, &url, started.elapsed(), result);
        }));
    }

    fn snapshot_sent(
        &mut self,
        label: &str,
        url: &Url,
        took: Duration,
        result: Result<usize, SendError>,
    ) {
        self.end_sending();
        let metrics = self.net.metrics;
        match result {
            Ok(bytes) => {
                metrics.snapshot_send_success.with(&[label]).increment(1);
                metrics.snapshot_send_seconds.with(&[label]).record(took);
                self.metrics.sent_bytes.increment(bytes as u64);
                self.net.raft.snapshot_done.do_send(SnapshotDone { to: self.id, ok: true });
                tracing::info!(
                    "remote-peer-id" = %self.id,
                    bytes,
                    took = %GoDuration::from(took),
                    "sent database snapshot"
                );
            }
            Err(error) => {
                metrics.snapshot_send_failures.with(&[label]).increment(1);
                self.metrics.sent_failures.increment(1);
                self.urls.failed(url);
                if let SendError::Post(PostError::Removed { .. }) = &error {
                    self.told_of_removal(&error);
                }
                tracing::warn!(
                    "remote-peer-id" = %self.id,
                    error = %full(&error),
                    "failed to send database snapshot"
                );
                let lost = RaftMessage { r#type: MSG_SNAP, ..RaftMessage::default() };
                undelivered(&self.net, self.id, &[lost]);
            }
        }
    }

    /// Whether or not it arrived, the snapshot to this peer is no longer under way.
    pub(super) fn end_sending(&mut self) {
        if std::mem::take(&mut self.sending_snapshot) {
            self.net.snapshots.sending.fetch_sub(1, Ordering::Relaxed);
            let label = self.id.to_string();
            self.net.metrics.snapshot_send_inflights.with(&[&label]).decrement(1.0);
        }
    }
}

/// Why a snapshot was not received.
#[derive(thiserror::Error, Debug)]
pub enum ReceiveError {
    #[error("it was cut short after {0} bytes")]
    Short(u64),
    #[error("nothing arrived for {0:?}")]
    Silent(Duration),
    #[error("connection failed: {0}")]
    Body(#[from] axum::Error),
    #[error("the message is {0} bytes long, more than {ENVELOPE_MAX}")]
    TooLarge(u64),
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("a snapshot at index {0} is being received already")]
    Twice(u64),
    #[error(transparent)]
    Disk(#[from] SnapError),
    #[error("member is stopping")]
    Stopped,
}

/// The body of a snapshot's POST.
pub struct Incoming {
    frames: axum::body::BodyDataStream,
    patience: Duration,
    /// Bytes that were read too far.
    rest: Bytes,
    /// Bytes read so far.
    pub received: u64,
}

impl Incoming {
    /// `patience`: how long a sender may be silent. The whole may take as long as it does.
    pub fn new(body: Body, patience: Duration) -> Self {
        Incoming { frames: body.into_data_stream(), patience, rest: Bytes::new(), received: 0 }
    }

    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, ReceiveError> {
        if !self.rest.is_empty() {
            return Ok(Some(std::mem::take(&mut self.rest)));
        }
        match tokio::time::timeout(self.patience, self.frames.next()).await {
            Ok(None) => Ok(None),
            Ok(Some(frame)) => {
                let frame = frame?;
                self.received += frame.len() as u64;
                Ok(Some(frame))
            }
            Err(_) => Err(ReceiveError::Silent(self.patience)),
        }
    }

    /// Exactly `count` bytes.
    async fn exactly(&mut self, count: usize) -> Result<Bytes, ReceiveError> {
        // The count comes from the network: what is reserved ahead stays modest.
        let mut bytes = BytesMut::with_capacity(count.min(READ_BYTES));
        while bytes.len() < count {
            let Some(mut part) = self.next().await? else {
                return Err(ReceiveError::Short(self.received));
            };
            bytes.extend_from_slice(&part.split_to(part.len().min(count - bytes.len())));
            self.rest = part;
        }
        Ok(bytes.freeze())
    }

    /// The message at the beginning.
    ///
    /// # Errors
    /// Anything but what concerns the disk.
    pub async fn message(&mut self) -> Result<RaftMessage, ReceiveError> {
        let bytes = self.exactly(8).await?.get_u64();
        if bytes > ENVELOPE_MAX {
            return Err(ReceiveError::TooLarge(bytes));
        }
        Ok(decode_message(self.exactly(bytes as usize).await?)?)
    }

    /// The rest, into the file for the snapshot at `index`; it is on disk, under its name, when this
    /// returns. Answers its length.
    ///
    /// # Errors
    /// Anything but `TooLarge` and `Codec`; no file is left then.
    pub async fn database(&mut self, net: &Arc<Net>, index: u64) -> Result<u64, ReceiveError> {
        let held = Held::new(net, index).ok_or(ReceiveError::Twice(index))?;
        let (to_disk, mut parts) = mpsc::channel::<Part>(UNWRITTEN_CHUNKS);
        let writing = tokio::task::spawn_blocking(move || {
            // Goes after the file does, even if the sender has left meanwhile.
            let held = held;
            let mut file = held.net.snapshots.dir.receive_db(index)?;
            loop {
                match parts.blocking_recv() {
                    Some(Part::Bytes(bytes)) => file.write(&bytes)?,
                    Some(Part::End) => {
                        let size = file.size();
                        file.finish()?;
                        return Ok(size);
                    }
                    // Given up: what there is of the file goes with it.
                    None => return Err(ReceiveError::Stopped),
                }
            }
        });
        let read = async {
            while let Some(bytes) = self.next().await? {
                // A writer that has failed says so below.
                if to_disk.send(Part::Bytes(bytes)).await.is_err() {
                    return Ok(());
                }
            }
            to_disk.send(Part::End).await.ok();
            Ok::<_, ReceiveError>(())
        }
        .await;
        drop(to_disk);
        let written = writing.await.unwrap_or(Err(ReceiveError::Stopped));
        read.and(written)
    }
}

/// What the disk is handed.
enum Part {
    Bytes(Bytes),
    End,
}

/// The right to write the file of one index.
struct Held {
    net: Arc<Net>,
    index: u64,
}

impl Held {
    fn new(net: &Arc<Net>, index: u64) -> Option<Self> {
        let free = net.snapshots.receiving.lock().insert(index);
        free.then(|| Held { net: net.clone(), index })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.net.snapshots.receiving.lock().remove(&self.index);
    }
}

/// Counts something as under way for as long as this lives: a request can be dropped at any await.
pub struct InFlight(Gauge);

impl InFlight {
    /// One more of what `gauge` counts.
    pub fn new(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        InFlight(gauge)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
