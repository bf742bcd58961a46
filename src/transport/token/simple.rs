//! Simple tokens: random, known to the members that have applied the login, kept in memory alone.

use std::hash::{BuildHasher, BuildHasherDefault};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use rustc_hash::FxHasher;

use super::{IssueError, Map};
use crate::core::types::{Index, Uptime};

/// Letters before the dot.
const PREFIX_LETTERS: usize = 16;
const LETTERS: &[u8; 52] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// Maps that the tokens are spread over: a login locks one of them, and a thread asks it once a token.
const SHARDS: usize = 16;

/// A token's user and end.
pub(super) struct Stored {
    pub user: Box<str>,
    /// Milliseconds of uptime.
    ends: AtomicU64,
}

struct Shard {
    tokens: Map<Arc<Stored>>,
    /// When tokens that have ended are thrown out next: an end is noticed only by those who show the
    /// token once more.
    sweep_at: Uptime,
}

/// All simple tokens of a member.
pub(super) struct Simple {
    ttl_ms: u64,
    shards: Box<[RwLock<Shard>]>,
}

/// The first part of a token.
pub(super) fn prefix() -> Result<String, IssueError> {
    let mut prefix = String::with_capacity(PREFIX_LETTERS);
    let mut random = [0; 2 * PREFIX_LETTERS];
    while prefix.len() < PREFIX_LETTERS {
        aws_lc_rs::rand::fill(&mut random).map_err(|_| IssueError::Failed)?;
        // 208 is four times 52: each letter is as likely as any other.
        let letters = random.iter().filter(|byte| **byte < 208);
        let letters = letters.map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]));
        prefix.extend(letters.take(PREFIX_LETTERS - prefix.len()));
    }
    Ok(prefix)
}

/// The log index that a token ends with; `None` if it is no simple token.
pub(super) fn index(token: &str) -> Option<Index> {
    let (_, index) = token.split_once('.')?;
    // A plus sign would make another token of the same number.
    let digits = index.bytes().all(|byte| byte.is_ascii_digit());
    index.parse().ok().filter(|_| digits).map(Index)
}

impl Simple {
    pub fn new(ttl: Duration) -> Self {
        let shard = || RwLock::new(Shard { tokens: Map::default(), sweep_at: Uptime(0) });
        Simple { ttl_ms: ttl.as_millis() as u64, shards: (0..SHARDS).map(|_| shard()).collect() }
    }

    fn shard(&self, token: &str) -> &RwLock<Shard> {
        let hash = BuildHasherDefault::<FxHasher>::default().hash_one(token);
        // Not the bits that place a token inside its map.
        &self.shards[(hash >> 32) as usize % self.shards.len()]
    }

    pub fn get(&self, token: &str) -> Option<Arc<Stored>> {
        self.shard(token).read().tokens.get(token).cloned()
    }

    /// Gives a token its whole life again; answers false if it has ended.
    pub fn renew(&self, stored: &Stored, now: Uptime) -> bool {
        let ends = now.0 + self.ttl_ms;
        let renewed = stored.ends.fetch_update(Ordering::AcqRel, Ordering::Acquire, |was| {
            // One millisecond's uses write once.
            (was > now.0 && was < ends).then_some(ends)
        });
        match renewed {
            Ok(_) => true,
            Err(was) => was > now.0,
        }
    }

    /// Throws out a token that has ended. A thread whose clock was read earlier cannot revive it.
    pub fn forget(&self, token: &str, stored: &Arc<Stored>) {
        stored.ends.store(0, Ordering::Release);
        let mut shard = self.shard(token).write();
        if shard.tokens.get(token).is_some_and(|held| Arc::ptr_eq(held, stored)) {
            shard.tokens.remove(token);
        }
    }

    /// Takes in a token from the log.
    pub fn assign(&self, user: &str, token: &str, now: Uptime) {
        // A member with another provider logs users in without a prefix; the index alone can be guessed.
        if token.split_once('.').is_none_or(|(prefix, _)| prefix.len() < PREFIX_LETTERS) {
            tracing::warn!(
                "user-name" = user,
                "a member with another auth-token has logged a user in; its token is not taken here"
            );
            return;
        }
        let ends = AtomicU64::new(now.0 + self.ttl_ms);
        let stored = Arc::new(Stored { user: user.into(), ends });
        let mut shard = self.shard(token).write();
        if shard.sweep_at <= now {
            // So a token takes room for at most twice its life.
            shard.sweep_at = Uptime(now.0 + self.ttl_ms);
            shard.tokens.retain(|_, stored| stored.ends.load(Ordering::Acquire) > now.0);
        }
        shard.tokens.insert(token.into(), stored);
    }

    /// Takes back the tokens of users that `lasts` denies.
    pub fn retain(&self, lasts: &dyn Fn(&str) -> bool) {
        for shard in &self.shards {
            shard.write().tokens.retain(|_, stored| lasts(&stored.user));
        }
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().tokens.len()).sum()
    }
}
