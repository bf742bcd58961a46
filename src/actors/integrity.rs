//! Integrity: while this member leads, it compares what all members hold (v3-api 6.6).
//!
//! in:  nothing but the clock
//! out: `Requests` (alarms, a read index) to actors/raft.rs; questions to the other members, by [`Peers`]
//!
//! What follows from the hashes is decided in core/integrity.rs. A round takes as long as it takes; the
//! next one of its kind begins an interval after its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::{BoxFuture, join_all};
use quorate_proto::etcdserverpb as pb;
use tokio::sync::oneshot;

use crate::actors::raft::{Answer, Proposal, Requests};
use crate::actors::shared::Shared;
use crate::config::duration::GoDuration;
use crate::core::command::{Command, Request};
use crate::core::integrity::{
    self, AtStart, CompactionCheck, CompactionVerdict, Hashed, NoHash, PeerAnswer, Suspect,
    Suspicion,
};
use crate::core::membership::{Member, Version};
use crate::core::mvcc::hash::KvHash;
use crate::core::types::MemberId;

/// The other members, as far as they are asked about themselves. Each question has its own end: what
/// is asked answers in time, or says why not.
pub trait Peers: Send + Sync + 'static {
    /// The peer's hash at `revision`.
    fn hash(&self, peer: &Member, revision: i64) -> BoxFuture<'static, Result<Hashed, NoHash>>;

    /// What the peer's server is; `None` if it does not tell.
    fn version(&self, peer: &Member) -> BoxFuture<'static, Option<Version>>;
}

/// When what is compared.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Between comparisons of all data; `None` for none.
    pub periodic: Option<Duration>,
    /// Between comparisons of compactions' hashes; `None` for none.
    pub compactions: Option<Duration>,
    /// How long a read index or an alarm may wait for the cluster.
    pub request_timeout: Duration,
}

/// Owns what compactions all members agreed on.
pub struct Integrity {
    links: Links,
    options: Options,
    check: CompactionCheck,
}

/// What the actor is connected to.
#[derive(Clone)]
pub struct Links {
    pub shared: Arc<Shared>,
    pub raft: Recipient<Requests>,
    pub peers: Arc<dyn Peers>,
}

/// Why a round came to nothing.
#[derive(thiserror::Error, Debug)]
enum RoundError {
    #[error("failed to hash: {0}")]
    Hash(String),
    #[error("no read index within the request timeout")]
    ReadIndex,
}

/// This member's hash at its newest revision, taken on a thread that may block.
async fn own_hash(shared: &Arc<Shared>) -> Result<Hashed, RoundError> {
    let shared = shared.clone();
    let hashing = tokio::task::spawn_blocking(move || shared.hash_kv(0));
    match hashing.await {
        Ok(Ok((hash, newest, _))) => Ok(Hashed { hash, newest }),
        Ok(Err(error)) => Err(RoundError::Hash(error.to_string())),
        Err(_) => Err(RoundError::Hash("member is stopping".to_string())),
    }
}

/// Asks all other members at once.
async fn ask_all(shared: &Shared, peers: &dyn Peers, revision: i64) -> Vec<PeerAnswer> {
    let members = shared.published.load().members.clone();
    let others = members.members().filter(|member| member.id != shared.member_id.0);
    let asking = others.map(|member| {
        let (id, hashing) = (MemberId(member.id), peers.hash(member, revision));
        async move { PeerAnswer { id, answer: hashing.await } }
    });
    join_all(asking).await
}

/// Compares this member's data with its peers' before it serves; answers whether it may start.
///
/// # Errors
/// If the own data cannot be hashed, or a peer has other data.
pub async fn check_at_start(
    shared: &Arc<Shared>,
    peers: &dyn Peers,
    timeout: Duration,
) -> Result<(), String> {
    let local = shared.member_id;
    tracing::info!(
        "local-member-id" = %local,
        timeout = %GoDuration::from(timeout),
        "starting initial corruption check"
    );
    let own = own_hash(shared)
        .await
        .map_err(|error| format!("{local} failed to fetch hash ({error})"))?;
    let mut different = false;
    for peer in ask_all(shared, peers, own.newest).await {
        let Some(found) = integrity::at_start(&own, &peer) else { continue };
        let text = match found {
            AtStart::Different => "found different hash values from remote peer",
            AtStart::OtherCompaction => "found different compact revision values from remote peer",
            AtStart::PeerBehind => "cannot fetch hash from slow remote peer",
            AtStart::LocalBehind => "cannot fetch hash from remote peer; local member is behind",
            AtStart::Silent => "failed to get hash from remote peer",
        };
        different |= found == AtStart::Different;
        let theirs = peer.answer.ok();
        tracing::warn!(
            "local-member-id" = %local,
            "local-member-revision" = own.newest,
            "local-member-compact-revision" = own.hash.compact_revision,
            "local-member-hash" = own.hash.hash,
            "remote-peer-id" = %peer.id,
            "remote-peer-revision" = theirs.map(|hashed| hashed.newest),
            "remote-peer-compact-revision" = theirs.map(|hashed| hashed.hash.compact_revision),
            "remote-peer-hash" = theirs.map(|hashed| hashed.hash.hash),
            "{text}"
        );
    }
    if different {
        return Err(format!("{local} found data inconsistency with peers"));
    }
    tracing::info!(
        "local-member-id" = %local,
        "initial corruption checking passed; no corruption"
    );
    Ok(())
}

/// One periodic comparison.
async fn periodic(links: &Links, options: Options) -> Result<(Vec<Suspect>, usize), RoundError> {
    let first = own_hash(&links.shared).await?;
    let peers = ask_all(&links.shared, &*links.peers, first.newest).await;
    // From here on this member has whatever a peer had when it answered.
    let (reply, known) = oneshot::channel();
    links.raft.do_send(Requests { proposals: Vec::new(), reads: vec![reply] });
    let known = tokio::time::timeout(options.request_timeout, known).await;
    if !matches!(known, Ok(Ok(Ok(())))) {
        return Err(RoundError::ReadIndex);
    }
    let second = own_hash(&links.shared).await?;
    let suspects = integrity::periodic(links.shared.member_id, &first, &second, &peers);
    Ok((suspects, peers.iter().filter(|peer| peer.answer.is_ok()).count()))
}

impl Integrity {
    /// An actor that compares what `options` tells it to.
    pub fn new(links: Links, options: Options) -> Self {
        Integrity { links, options, check: CompactionCheck::default() }
    }

    fn leading(&self) -> bool {
        self.links.shared.raft.leading.load(Ordering::Acquire)
    }

    fn periodic_in(&mut self, interval: Duration, ctx: &mut Context<Self>) {
        ctx.run_later(interval, move |this, ctx| {
            if !this.leading() {
                return this.periodic_in(interval, ctx);
            }
            let (links, options) = (this.links.clone(), this.options);
            let round = async move { periodic(&links, options).await }.into_actor(this);
            ctx.spawn(round.map(move |result, this, ctx| {
                match result {
                    Ok((suspects, checked)) => {
                        this.suspect(&suspects, ctx);
                        tracing::info!(
                            "number-of-peers-checked" = checked,
                            "finished peer corruption check"
                        );
                    }
                    Err(error) => tracing::warn!(%error, "failed to check hash KV"),
                }
                this.periodic_in(interval, ctx);
            }));
        });
    }

    fn suspect(&self, suspects: &[Suspect], ctx: &mut Context<Self>) {
        for Suspect { id, why } in suspects {
            let text = match why {
                Suspicion::OwnHashChanged => "found hash mismatch",
                Suspicion::RevisionAhead => {
                    "revision from follower must be less than or equal to leader's"
                }
                Suspicion::CompactRevisionAhead => {
                    "compact revision from follower must be less than or equal to leader's"
                }
                Suspicion::HashDiffers => "same compact revision then hashes must match",
            };
            tracing::warn!("suspected-member-id" = %id, "{text}");
        }
        if let Some(first) = suspects.first() {
            self.alarm(first.id, ctx);
        }
    }

    fn compactions_in(&mut self, interval: Duration, ctx: &mut Context<Self>) {
        ctx.run_later(interval, move |this, ctx| {
            if !this.leading() {
                return this.compactions_in(interval, ctx);
            }
            tracing::info!(
                "local-member-id" = %this.links.shared.member_id,
                timeout = %GoDuration::from(this.options.request_timeout),
                "starting compact hash check"
            );
            let hashes = this.links.shared.compaction_hashes.load_full();
            let open = this.check.open(hashes.newest_first());
            this.compare_next(open.into_iter(), None, interval, ctx);
        });
    }

    /// Compares compactions from the newest on, until one is settled; `asked` is the one that the
    /// peers have answered for.
    fn compare_next(
        &mut self,
        mut open: std::vec::IntoIter<KvHash>,
        asked: Option<(KvHash, Vec<PeerAnswer>)>,
        interval: Duration,
        ctx: &mut Context<Self>,
    ) {
        let settled = asked.is_some_and(|(own, peers)| self.settle(&own, &peers, ctx));
        let next = open.next().filter(|_| !settled);
        let Some(own) = next else {
            tracing::info!("finished compaction hash check");
            return self.compactions_in(interval, ctx);
        };
        let links = self.links.clone();
        let asking = async move { ask_all(&links.shared, &*links.peers, own.revision).await };
        ctx.spawn(asking.into_actor(self).map(move |peers, this, ctx| {
            this.compare_next(open, Some((own, peers)), interval, ctx);
        }));
    }

    /// Answers whether older compactions need not be looked at.
    fn settle(&mut self, own: &KvHash, peers: &[PeerAnswer], ctx: &mut Context<Self>) -> bool {
        if peers.is_empty() {
            return false;
        }
        match self.check.compare(self.links.shared.member_id, own, peers) {
            CompactionVerdict::Agreed => {
                tracing::info!(
                    revision = own.revision,
                    "compact-revision" = own.compact_revision,
                    "successfully checked hash on whole cluster"
                );
                true
            }
            CompactionVerdict::Incomplete => {
                tracing::warn!(
                    revision = own.revision,
                    "compact-revision" = own.compact_revision,
                    "skipped revision in compaction hash check; was not able to check all peers"
                );
                false
            }
            CompactionVerdict::Different { groups, alarm } => {
                for (hash, members) in &groups {
                    tracing::error!(
                        revision = own.revision,
                        "compact-revision" = own.compact_revision,
                        hash,
                        members = ?members,
                        "detected compaction hash mismatch"
                    );
                }
                for member in alarm {
                    self.alarm(member, ctx);
                }
                true
            }
        }
    }

    /// Raises the alarm for a member, 0 for the cluster, unless it is raised.
    fn alarm(&self, member: MemberId, ctx: &mut Context<Self>) {
        let shared = &self.links.shared;
        if shared.published.load().alarms.has(member, pb::AlarmType::Corrupt) {
            return;
        }
        let id = shared.next_id();
        let request = pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Activate as i32,
            member_id: member.0,
            alarm: pb::AlarmType::Corrupt as i32,
        };
        let data = Command::new(id, Request::Alarm(request)).encode();
        let (reply, raised) = oneshot::channel::<Answer>();
        let proposals = vec![Proposal { id, data, reply }];
        self.links.raft.do_send(Requests { proposals, reads: Vec::new() });
        let raised = tokio::time::timeout(self.options.request_timeout, raised);
        ctx.spawn(raised.into_actor(self).map(move |raised, _, _| {
            // The next round finds the same and tries again.
            if !matches!(raised, Ok(Ok(Ok(_)))) {
                tracing::warn!("suspected-member-id" = %member, "failed to raise corrupt alarm");
            }
        }));
    }
}

impl Actor for Integrity {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        if let Some(interval) = self.options.periodic {
            tracing::info!(
                "local-member-id" = %self.links.shared.member_id,
                interval = %GoDuration::from(interval),
                "enabled corruption checking"
            );
            self.periodic_in(interval, ctx);
        }
        if let Some(interval) = self.options.compactions {
            tracing::info!(
                "local-member-id" = %self.links.shared.member_id,
                interval = %GoDuration::from(interval),
                "enabled compaction hash checking"
            );
            self.compactions_in(interval, ctx);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;
    use std::time::Instant;

    use super::*;
    use crate::actors::raft::{Answered, RequestError};
    use crate::actors::shared::tests::Bench;
    use crate::core::apply::Reply;
    use crate::core::membership::Membership;
    use crate::core::types::ClusterId;

    const PATIENCE: Duration = Duration::from_secs(20);
    const INTERVAL: Duration = Duration::from_millis(5);

    type Answers = HashMap<u64, Result<Hashed, NoHash>>;

    /// Peers that answer what a test wants.
    #[derive(Default)]
    struct Fake {
        answers: Mutex<Answers>,
        /// Revisions that were asked for.
        asked: Mutex<Vec<i64>>,
    }

    impl Peers for Fake {
        fn hash(&self, peer: &Member, revision: i64) -> BoxFuture<'static, Result<Hashed, NoHash>> {
            self.asked.lock().unwrap().push(revision);
            let answer = self.answers.lock().unwrap().get(&peer.id).cloned();
            let answer = answer.unwrap_or(Err(NoHash::Unreachable("no answer".to_string())));
            Box::pin(std::future::ready(answer))
        }

        fn version(&self, _: &Member) -> BoxFuture<'static, Option<Version>> {
            Box::pin(std::future::ready(None))
        }
    }

    /// A raft actor that commits everything at once.
    struct Probe {
        alarms: Arc<Mutex<Vec<u64>>>,
        reads: Arc<Mutex<usize>>,
    }

    impl Actor for Probe {
        type Context = Context<Self>;
    }

    impl Handler<Requests> for Probe {
        type Result = ();

        fn handle(&mut self, requests: Requests, _: &mut Self::Context) {
            for proposal in requests.proposals {
                let command = Command::decode(proposal.data).unwrap();
                let Request::Alarm(alarm) = command.request else { panic!("{command:?}") };
                assert_eq!(alarm.alarm, pb::AlarmType::Corrupt as i32);
                assert_eq!(alarm.action, pb::alarm_request::AlarmAction::Activate as i32);
                self.alarms.lock().unwrap().push(alarm.member_id);
                let answered = Answered { reply: Reply::Done, term: Default::default() };
                proposal.reply.send(Ok::<_, RequestError>(answered)).ok();
            }
            for read in requests.reads {
                *self.reads.lock().unwrap() += 1;
                read.send(Ok(())).ok();
            }
        }
    }

    /// A leader of three with some keys.
    fn leader() -> (Bench, Arc<Fake>) {
        let mut bench = Bench::new();
        bench.put("a");
        bench.put("b");
        let mut members = Membership::new(ClusterId(1), MemberId(1), 1);
        let record = |id| Member { id, ..Member::default() };
        members.restore((1..=3).map(record), []);
        let mut now = (**bench.shared.published.load()).clone();
        now.members = Arc::new(members);
        bench.shared.published.store(Arc::new(now));
        bench.shared.raft.leading.store(true, Ordering::Release);
        (bench, Arc::default())
    }

    struct Run {
        fake: Arc<Fake>,
        alarms: Arc<Mutex<Vec<u64>>>,
        reads: Arc<Mutex<usize>>,
    }

    impl Run {
        /// Starts the actor in the running system.
        fn start(shared: &Arc<Shared>, fake: &Arc<Fake>, periodic: bool) -> Run {
            let (alarms, reads) = (Arc::default(), Arc::default());
            let probe = Probe { alarms: Arc::clone(&alarms), reads: Arc::clone(&reads) }.start();
            let links =
                Links { shared: shared.clone(), raft: probe.recipient(), peers: fake.clone() };
            let options = Options {
                periodic: periodic.then_some(INTERVAL),
                compactions: (!periodic).then_some(INTERVAL),
                request_timeout: PATIENCE,
            };
            Integrity::new(links, options).start();
            Run { fake: fake.clone(), alarms, reads }
        }

        fn asked(&self) -> Vec<i64> {
            self.fake.asked.lock().unwrap().clone()
        }

        async fn until(&self, what: &str, reached: impl Fn(&Run) -> bool) {
            let deadline = Instant::now() + PATIENCE;
            while !reached(self) {
                assert!(Instant::now() < deadline, "{what}: asked {:?}", self.asked());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    fn own(shared: &Shared) -> Hashed {
        let (hash, newest, _) = shared.hash_kv(0).unwrap();
        Hashed { hash, newest }
    }

    fn other(hashed: Hashed) -> Hashed {
        let hash = KvHash { hash: !hashed.hash.hash, ..hashed.hash };
        Hashed { hash, ..hashed }
    }

    #[test]
    fn a_leader_alarms_a_peer_with_other_data() {
        actix::System::new().block_on(async {
            let (bench, fake) = leader();
            let own = own(&bench.shared);
            fake.answers.lock().unwrap().extend([(2, Ok(own)), (3, Ok(own))]);
            let run = Run::start(&bench.shared, &fake, true);
            run.until("three rounds", |run| run.asked().len() >= 6).await;
            assert!(run.alarms.lock().unwrap().is_empty());
            assert!(*run.reads.lock().unwrap() >= 2, "a read index in each round");
            assert!(run.asked().iter().all(|revision| *revision == own.newest));
            // Two suspects, one alarm a round.
            fake.answers.lock().unwrap().extend([(2, Ok(other(own))), (3, Ok(other(own)))]);
            run.until("an alarm", |run| !run.alarms.lock().unwrap().is_empty()).await;
            assert!(run.alarms.lock().unwrap().iter().all(|member| *member == 2));
        });
    }

    #[test]
    fn a_follower_asks_nobody() {
        actix::System::new().block_on(async {
            let (bench, fake) = leader();
            bench.shared.raft.leading.store(false, Ordering::Release);
            let runs = [true, false].map(|what| Run::start(&bench.shared, &fake, what));
            tokio::time::sleep(INTERVAL * 10).await;
            assert!(runs[0].asked().is_empty());
            bench.shared.raft.leading.store(true, Ordering::Release);
            runs[0].until("a round", |run| !run.asked().is_empty()).await;
        });
    }

    #[test]
    fn compactions_are_compared_from_the_newest_until_one_is_settled() {
        actix::System::new().block_on(async {
            let (bench, fake) = leader();
            let at = |revision| KvHash { hash: 5, compact_revision: revision - 1, revision };
            for revision in [7, 8, 9] {
                bench.shared.record_compaction_hash(at(revision));
            }
            let hashed = |hash| Ok(Hashed { hash, newest: 20 });
            // One that compares nothing with the newest two, and differs in none.
            fake.answers.lock().unwrap().extend([(2, hashed(at(7))), (3, hashed(at(7)))]);
            let run = Run::start(&bench.shared, &fake, false);
            run.until("rounds", |run| run.asked().len() >= 10).await;
            // Each is asked of both peers; the oldest is settled once.
            assert_eq!(run.asked()[..10], [9, 9, 8, 8, 7, 7, 9, 9, 8, 8]);
            assert!(run.alarms.lock().unwrap().is_empty());
            let different = KvHash { hash: 6, ..at(9) };
            fake.answers.lock().unwrap().extend([(2, hashed(at(9))), (3, hashed(different))]);
            run.until("an alarm", |run| !run.alarms.lock().unwrap().is_empty()).await;
            assert!(run.alarms.lock().unwrap().iter().all(|member| *member == 3));
        });
    }

    #[test]
    fn a_member_with_other_data_than_a_peer_may_not_start() {
        actix::System::new().block_on(async {
            let (bench, fake) = leader();
            let own = own(&bench.shared);
            fake.answers.lock().unwrap().insert(2, Ok(own));
            assert_eq!(check_at_start(&bench.shared, &*fake, PATIENCE).await, Ok(()));
            fake.answers.lock().unwrap().insert(3, Ok(other(own)));
            assert_eq!(
                check_at_start(&bench.shared, &*fake, PATIENCE).await,
                Err("1 found data inconsistency with peers".to_string())
            );
            assert_eq!(fake.asked.lock().unwrap()[..], [own.newest; 4]);
        });
    }
}
