//! Tokens: what a user who has logged in shows instead of a password (v3-api 3.12, operations 1.6).
//!
//! A call that shows a token costs one look into a map of its own thread: what a token was found to be
//! is remembered there, and forgotten by all threads when a token is taken back.

mod jwt;
mod simple;

use std::cell::RefCell;
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustc_hash::FxHasher;

use crate::actors::applier::TokenSink;
use crate::config::AuthToken;
use crate::core::apply::TokenChange;
use crate::core::types::{Index, Uptime};

pub use jwt::KeyError;
use jwt::{Claims, Jwt};
use simple::{Simple, Stored};

/// Where the time comes from that tokens end by.
pub trait Clock: Send + Sync {
    /// Time since some moment, for what lives in memory.
    fn uptime(&self) -> Uptime;
    /// Seconds since 1970, for what other machines look at too.
    fn unix_s(&self) -> u64;
}

/// The machine's clocks.
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        SystemClock(Instant::now())
    }
}

impl Clock for SystemClock {
    fn uptime(&self) -> Uptime {
        Uptime(self.0.elapsed().as_millis() as u64)
    }

    fn unix_s(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}

/// Whom a token stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bearer {
    pub user: Arc<str>,
    /// The auth revision that the token is of; `None` for that of the moment.
    pub revision: Option<u64>,
}

/// What a user who gave the right password gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Issue {
    /// The beginning of a token. All members know the whole of it when they apply the login.
    Prefix(String),
    /// The token.
    Signed(String),
}

/// Why there is no token to give.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum IssueError {
    #[error("no token provider is configured")]
    NoProvider,
    #[error("the key to sign tokens with is not configured")]
    VerifyOnly,
    #[error("the random source or the key failed")]
    Failed,
}

enum Provider {
    None,
    Simple(Simple),
    Jwt(Box<Jwt>),
}

/// All tokens of a member.
pub struct Tokens {
    provider: Provider,
    clock: Box<dyn Clock>,
    /// Another number after each token that is taken back; no two stores have the same. What threads
    /// remember is of one generation.
    generation: AtomicU64,
}

/// Numbers for generations.
static GENERATIONS: AtomicU64 = AtomicU64::new(1);

/// Tokens that a thread remembers. More than that, and it begins anew.
const REMEMBERED_MAX: usize = 4096;

enum Known {
    Simple(Arc<Stored>),
    Jwt(Claims),
}

struct Found {
    bearer: Bearer,
    known: Known,
}

type Map<V> = std::collections::HashMap<Box<str>, V, BuildHasherDefault<FxHasher>>;

#[derive(Default)]
struct Remembered {
    generation: u64,
    // Only tokens that were found valid come in, so nobody picks the keys.
    tokens: Map<Found>,
}

thread_local! {
    static REMEMBERED: RefCell<Remembered> = RefCell::default();
}

fn next_generation() -> u64 {
    GENERATIONS.fetch_add(1, Ordering::Relaxed)
}

impl Tokens {
    /// The provider that the configuration names; `ttl` is that of simple tokens.
    ///
    /// # Errors
    /// Naming the key file and what is wrong with it.
    pub fn new(config: &AuthToken, ttl: Duration, clock: Box<dyn Clock>) -> Result<Self, KeyError> {
        let provider = match config {
            AuthToken::None => Provider::None,
            AuthToken::Simple => Provider::Simple(Simple::new(ttl)),
            AuthToken::Jwt(options) => Provider::Jwt(Box::new(Jwt::open(options)?)),
        };
        Ok(Tokens { provider, clock, generation: AtomicU64::new(next_generation()) })
    }

    /// Whom `token` stands for; `None` if for nobody. A simple token begins a new life by that.
    pub fn find(&self, token: &str) -> Option<Bearer> {
        // Read first: what is found after that may have been taken back in between, and must not be
        // remembered beyond.
        let generation = self.generation.load(Ordering::Acquire);
        let remembered = REMEMBERED.with_borrow_mut(|remembered| {
            if remembered.generation != generation {
                remembered.generation = generation;
                remembered.tokens.clear();
            }
            let found = remembered.tokens.get(token)?;
            if self.holds(&found.known) {
                return Some(Ok(found.bearer.clone()));
            }
            remembered.tokens.remove(token).map(|ended| Err(ended.known))
        });
        let known = match remembered {
            Some(Ok(bearer)) => return Some(bearer),
            Some(Err(ended)) => {
                self.forget_ended(token, &ended);
                return None;
            }
            None => match &self.provider {
                Provider::None => return None,
                Provider::Simple(simple) => Known::Simple(simple.get(token)?),
                Provider::Jwt(jwt) => Known::Jwt(jwt.verify(token)?),
            },
        };
        if !self.holds(&known) {
            self.forget_ended(token, &known);
            return None;
        }
        // A name of this thread's own: threads that hand out the same one would wait for each other to
        // count it.
        let bearer = match &known {
            Known::Simple(stored) => Bearer { user: Arc::from(&*stored.user), revision: None },
            Known::Jwt(claims) => {
                Bearer { user: claims.user.clone(), revision: Some(claims.revision) }
            }
        };
        REMEMBERED.with_borrow_mut(|remembered| {
            if remembered.tokens.len() >= REMEMBERED_MAX {
                remembered.tokens.clear();
            }
            remembered.tokens.insert(token.into(), Found { bearer: bearer.clone(), known });
        });
        Some(bearer)
    }

    /// Whether a token is good at this time; that one is shown gives it a new life.
    fn holds(&self, known: &Known) -> bool {
        match (known, &self.provider) {
            (Known::Simple(stored), Provider::Simple(simple)) => {
                simple.renew(stored, self.clock.uptime())
            }
            (Known::Jwt(claims), _) => claims.hold(self.clock.unix_s()),
            (Known::Simple(_), _) => false,
        }
    }

    fn forget_ended(&self, token: &str, known: &Known) {
        if let (Provider::Simple(simple), Known::Simple(stored)) = (&self.provider, known) {
            simple.forget(token, stored);
        }
    }

    /// The entry whose application makes `token` known, if it is a token of that kind.
    pub fn made_by(&self, token: &str) -> Option<Index> {
        match &self.provider {
            Provider::Simple(_) => simple::index(token),
            Provider::None | Provider::Jwt(_) => None,
        }
    }

    /// A token for `user`, whose password was right at auth revision `revision`.
    ///
    /// # Errors
    /// [`IssueError`].
    pub fn issue(&self, user: &str, revision: u64) -> Result<Issue, IssueError> {
        match &self.provider {
            Provider::None => Err(IssueError::NoProvider),
            Provider::Simple(_) => simple::prefix().map(Issue::Prefix),
            Provider::Jwt(jwt) => jwt.sign(user, revision, self.clock.unix_s()).map(Issue::Signed),
        }
    }
}

impl TokenSink for Tokens {
    fn changed(&self, change: &TokenChange) {
        let Provider::Simple(simple) = &self.provider else { return };
        match change {
            TokenChange::Assigned { username, token } => {
                return simple.assign(username, token, self.clock.uptime());
            }
            TokenChange::Ended { username } => simple.retain(&|user| user != username),
            TokenChange::AllEnded => simple.retain(&|_| false),
        }
        // After that: a thread that has found one of them before remembers it under the old number.
        self.generation.store(next_generation(), Ordering::Release);
    }

    fn replaced(&self, lasts: &dyn Fn(&str) -> bool) {
        if let Provider::Simple(simple) = &self.provider {
            simple.retain(lasts);
            self.generation.store(next_generation(), Ordering::Release);
        }
    }
}

#[cfg(test)]
pub mod tests;
