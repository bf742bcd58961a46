//! The command line, and what it means.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use serde::{Serialize, Serializer};

use super::client::{Credentials, Endpoint};
use super::engines::{EnginesArgs, worker};
use super::servers::ServerArgs;
use super::session::{Budget, Compact, During, Shape};
use super::wire::RangeShape;
use super::work::{Keys, STAMP, Watching, Work};

/// Measures a server of etcd's v3 API, or two servers side by side; or storage engines.
///
/// Every client sends its next request when it has the reply to the last (closed loop), unless a rate
/// is given: then requests are due at even intervals and latency counts from the time a request was
/// due, so that a stall of the server shows in all requests that it delayed.
#[derive(Parser, Debug)]
#[command(name = "quorate bench", bin_name = "quorate bench", disable_version_flag = true)]
pub struct Cli {
    #[command(subcommand)]
    pub program: Program,
}

/// What is measured: one workload of a server that runs, or several over several engines or servers.
#[derive(Subcommand, Debug, Clone)]
pub enum Program {
    #[command(flatten)]
    One(Command),
    /// Compare the storage engines on this machine
    Engines(EnginesArgs),
    /// Compare this program with each engine, and other servers
    Server(ServerArgs),
    /// Show reports of engines and server, written as JSON, together
    Report(ReportArgs),
    /// The process that has one engine, for `engines`
    #[command(name = worker::WORD, hide = true)]
    Worker,
}

/// Which reports, and how they are shown.
#[derive(Args, Debug, Clone)]
pub struct ReportArgs {
    /// Files that `engines` or `server` has written with --json
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Write all as one HTML page
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

#[derive(Subcommand, Serialize, Debug, Clone)]
#[serde(untagged)]
pub enum Command {
    /// Put one key a request
    Put(Put),
    /// Read one key or range a request; a reply without any key is an error
    Range(Range),
    /// Put several keys in a transaction
    TxnPut(TxnPut),
    /// Put to watched keys as fast as possible, and count what the watchers get
    Watch(Watch),
    /// Put to watched keys at a modest rate, and measure how long an event takes from the put's start
    WatchLatency(Watch),
    /// Renew leases, one a client
    LeaseKeepalive(LeaseKeepalive),
    /// Read and put keys of one key space
    Mixed(Mixed),
}

/// What all subcommands share.
#[derive(Args, Serialize, Debug, Clone)]
pub struct Common {
    /// Members of one cluster; connections are spread over them
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', default_value = "127.0.0.1:2379")]
    pub endpoints: Vec<Endpoint>,
    /// User to log in as, on every connection
    #[arg(long, value_name = "NAME:PASSWORD")]
    pub user: Option<Credentials>,
    /// TCP connections
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    pub conns: u32,
    /// Clients, spread over the connections
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    pub clients: u32,
    /// Threads of the benchmark itself; connections are spread over them
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// Requests in all [default: 10000; 1000 for watch and watch-latency]
    #[arg(long, visible_alias = "put-total", value_parser = value_parser!(u64).range(1..))]
    pub total: Option<u64>,
    /// Run for this time instead of a number of requests, such as 30s
    #[arg(long, conflicts_with = "total", value_parser = duration)]
    #[serde(serialize_with = "in_seconds")]
    pub duration: Option<Duration>,
    /// Load the server this long before measuring
    #[arg(long, value_parser = duration)]
    #[serde(serialize_with = "in_seconds")]
    pub warmup: Option<Duration>,
    /// Requests per second over all clients (open loop); 0 for closed loop [default: 0; 100 for watch-latency]
    #[arg(long, visible_alias = "put-rate", value_parser = rate)]
    pub rate: Option<f64>,
    /// Where the random choices begin; the same seed makes the same requests
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// A second cluster to compare with: both get the whole load, in turns (A B B A...)
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub versus: Vec<Endpoint>,
    /// Turns into which the load is cut when comparing
    #[arg(long, default_value_t = 10, requires = "versus", value_parser = value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Processes of the server, to report its CPU time and memory
    #[arg(long, value_name = "PID", value_delimiter = ',')]
    pub server_pid: Vec<u32>,
    /// Processes of the second server
    #[arg(long, value_name = "PID", value_delimiter = ',', requires = "versus")]
    pub versus_pid: Vec<u32>,
    /// Longest time to connect, also again after a connection is lost
    #[arg(long, default_value = "5s", value_parser = duration)]
    #[serde(serialize_with = "in_seconds")]
    pub dial_timeout: Duration,
    /// Give up when nothing completes for this long
    #[arg(long, default_value = "30s", value_parser = duration)]
    #[serde(serialize_with = "in_seconds")]
    pub stall_timeout: Duration,
}

/// Which keys, and how large their values are.
#[derive(Args, Serialize, Debug, Clone)]
pub struct KeyOptions {
    /// Bytes of a key
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u32).range(1..))]
    pub key_size: u32,
    /// Different keys [default: 1; with --sequential-keys as many as their size allows]
    #[arg(long, value_parser = value_parser!(u64).range(1..))]
    pub key_space_size: Option<u64>,
    /// One key after the other instead of at random
    #[arg(long)]
    pub sequential_keys: bool,
}

/// What is written.
#[derive(Args, Serialize, Debug, Clone)]
pub struct ValueOptions {
    /// Bytes of a value
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u32).range(..=1 << 30))]
    pub val_size: u32,
}

/// Compaction beside the load.
#[derive(Args, Serialize, Debug, Clone)]
pub struct CompactOptions {
    /// Compact at this interval
    #[arg(long, value_parser = duration)]
    #[serde(serialize_with = "in_seconds")]
    pub compact_interval: Option<Duration>,
    /// Revisions that a compaction keeps
    #[arg(long, default_value_t = 1000, value_parser = value_parser!(i64).range(0..))]
    pub compact_index_delta: i64,
}

/// What an operator does to a server under load.
#[derive(ValueEnum, Serialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Disturbance {
    /// Compact each second, all but the revisions that --compact-index-delta keeps
    Compaction,
    /// Defragment each endpoint, again a second later
    Defragment,
}

/// How a read is confirmed.
#[derive(ValueEnum, Serialize, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Linearizable
    L,
    /// Serializable: from the member's own state
    S,
}

#[derive(Args, Serialize, Debug, Clone)]
pub struct Put {
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
    #[command(flatten)]
    #[serde(flatten)]
    pub keys: KeyOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub values: ValueOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub compact: CompactOptions,
    /// Do this over and over in one half of each turn, and nothing in the other one; puts of both halves are
    /// told apart. A defragmentation that has begun is waited for
    #[arg(long, value_enum, value_delimiter = ',', conflicts_with_all = ["compact_interval", "logins"])]
    pub during: Vec<Disturbance>,
    /// Logins per second beside the puts, on connections of their own
    #[arg(long, requires = "user", value_parser = rate)]
    pub logins: Option<f64>,
}

#[derive(Args, Serialize, Debug, Clone)]
pub struct Range {
    /// The key to read, or where the range begins; without it keys of the key space, as put writes them
    #[arg(conflicts_with_all = ["key_space_size", "sequential_keys", "populate"])]
    pub key: Option<String>,
    /// Where the range ends (exclusive)
    pub end: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
    #[command(flatten)]
    #[serde(flatten)]
    pub keys: KeyOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub values: ValueOptions,
    /// Write all keys of the key space first
    #[arg(long)]
    pub populate: bool,
    #[arg(long, value_enum, default_value = "l")]
    pub consistency: Consistency,
    /// Most keys in a reply; 0 for no limit
    #[arg(long, default_value_t = 0, value_parser = value_parser!(u64).range(..=i64::MAX as u64))]
    pub limit: u64,
    /// Ask for no values
    #[arg(long)]
    pub keys_only: bool,
    /// Ask for the number of keys alone
    #[arg(long)]
    pub count_only: bool,
}

#[derive(Args, Serialize, Debug, Clone)]
pub struct TxnPut {
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
    #[command(flatten)]
    #[serde(flatten)]
    pub keys: KeyOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub values: ValueOptions,
    /// Puts a transaction; a server allows 128 unless configured otherwise
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u64).range(1..))]
    pub txn_ops: u64,
    #[command(flatten)]
    #[serde(flatten)]
    pub compact: CompactOptions,
}

#[derive(Args, Serialize, Debug, Clone)]
pub struct Watch {
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
    /// Watchers in all, spread evenly over the watched keys [default: 1000; 100 for watch-latency]
    #[arg(long, value_parser = value_parser!(u64).range(1..))]
    pub watchers: Option<u64>,
    /// Streams that carry the watchers
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u64).range(1..))]
    pub streams: u64,
    /// Different keys that are watched and put
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u64).range(1..))]
    pub watched_key_total: u64,
    /// Ask for the previous value with each event
    #[arg(long)]
    pub prev_kv: bool,
    /// Bytes of a key
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u32).range(1..))]
    pub key_size: u32,
    /// Bytes of a value; its first 16 carry the time of the put
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u32).range(STAMP as i64..=1 << 30))]
    pub val_size: u32,
    /// Put one watched key after the other instead of at random
    #[arg(long)]
    pub sequential_keys: bool,
}

#[derive(Args, Serialize, Debug, Clone)]
pub struct LeaseKeepalive {
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
}

#[derive(Args, Serialize, Debug, Clone)]
pub struct Mixed {
    #[command(flatten)]
    #[serde(flatten)]
    pub common: Common,
    #[command(flatten)]
    #[serde(flatten)]
    pub keys: KeyOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub values: ValueOptions,
    /// Write all keys of the key space first
    #[arg(long)]
    pub populate: bool,
    /// Reads for each write
    #[arg(long, default_value_t = 1.0, value_parser = rate)]
    pub rw_ratio: f64,
    #[arg(long, value_enum, default_value = "l")]
    pub consistency: Consistency,
    #[command(flatten)]
    #[serde(flatten)]
    pub compact: CompactOptions,
}

/// Options that do not fit together, or do not fit the workload.
#[derive(thiserror::Error, Debug, PartialEq, Eq)]
pub enum OptionsError {
    #[error("--key-space-size {space}: keys of {size} bytes can only be {max} different ones")]
    KeySpace { space: u64, size: u32, max: u64 },
    #[error("--watched-key-total {keys}: keys of {size} bytes can only be {max} different ones")]
    WatchedKeys { keys: u64, size: u32, max: u64 },
    #[error(
        "--txn-ops {ops}: needs a --key-space-size of at least as much, a transaction may put a key once"
    )]
    TxnOps { ops: u64 },
    #[error("--rounds {rounds}: more than the requests in all ({total})")]
    Rounds { rounds: u32, total: u64 },
    #[error("--populate: needs a --key-space-size")]
    Populate,
    #[error("{0}: must not be zero")]
    Zero(&'static str),
}

/// A command line made sense of.
#[derive(Debug, Clone)]
pub struct Plan {
    pub name: &'static str,
    pub common: Common,
    pub work: Work,
    pub keys: Keys,
    pub value_size: usize,
    pub populate: bool,
    pub shape: Shape,
    /// Of one server in all rounds.
    pub budget: Budget,
}

impl Command {
    /// # Errors
    /// If options contradict each other.
    pub fn plan(&self) -> Result<Plan, OptionsError> {
        match self {
            Command::Put(put) => {
                let keys = keys(&put.keys, put.keys.key_space_size)?;
                let logins = put.logins.filter(|&rate| rate > 0.0);
                let work = match put.during[..] {
                    [] => Work::Put { logins: logins.is_some() },
                    _ => Work::PutDuring,
                };
                let mut plan = plan("put", &put.common, work, keys, put.values.val_size)?;
                plan.shape.logins = logins;
                let has = |what| put.during.contains(&what);
                plan.shape.during = During {
                    compaction: has(Disturbance::Compaction)
                        .then_some(put.compact.compact_index_delta),
                    defragment: has(Disturbance::Defragment),
                };
                plan.compact(&put.compact)
            }
            Command::Range(range) => {
                let keys = keys(&range.keys, range.keys.key_space_size)?;
                let shape = RangeShape {
                    range_end: range.end.clone().unwrap_or_default().into_bytes(),
                    limit: range.limit,
                    serializable: range.consistency == Consistency::S,
                    keys_only: range.keys_only,
                    count_only: range.count_only,
                };
                let key = range.key.clone().map(String::into_bytes);
                let work = Work::Range { key, shape };
                let plan = plan("range", &range.common, work, keys, range.values.val_size)?;
                plan.populate(range.populate, &range.keys)
            }
            Command::TxnPut(txn) => {
                let keys = keys(&txn.keys, txn.keys.key_space_size)?;
                if txn.txn_ops > keys.space {
                    return Err(OptionsError::TxnOps { ops: txn.txn_ops });
                }
                let work = Work::TxnPut { ops: txn.txn_ops };
                plan("txn-put", &txn.common, work, keys, txn.values.val_size)?.compact(&txn.compact)
            }
            Command::Watch(watch) => watch.plan("watch", 1000, 0.0),
            Command::WatchLatency(watch) => watch.plan("watch-latency", 100, 100.0),
            Command::LeaseKeepalive(lease) => {
                let keys = Keys { size: 1, space: 1, sequential: false };
                plan("lease-keepalive", &lease.common, Work::LeaseKeepAlive, keys, 0)
            }
            Command::Mixed(mixed) => {
                let keys = keys(&mixed.keys, mixed.keys.key_space_size)?;
                let serializable = mixed.consistency == Consistency::S;
                let shape = RangeShape { serializable, ..RangeShape::default() };
                let work = Work::Mixed { reads: mixed.rw_ratio / (1.0 + mixed.rw_ratio), shape };
                plan("mixed", &mixed.common, work, keys, mixed.values.val_size)?
                    .populate(mixed.populate, &mixed.keys)?
                    .compact(&mixed.compact)
            }
        }
    }
}

impl Watch {
    fn plan(&self, name: &'static str, watchers: u64, rate: f64) -> Result<Plan, OptionsError> {
        let (size, total) = (self.key_size, self.watched_key_total);
        let max = Keys::space_max(size as usize);
        if total > max {
            return Err(OptionsError::WatchedKeys { keys: total, size, max });
        }
        let keys = Keys { size: size as usize, space: total, sequential: self.sequential_keys };
        let watching = Watching {
            watchers: self.watchers.unwrap_or(watchers),
            streams: self.streams,
            keys: total,
            prev_kv: self.prev_kv,
        };
        let mut common = self.common.clone();
        common.rate.get_or_insert(rate);
        if common.duration.is_none() {
            common.total.get_or_insert(1000);
        }
        plan(name, &common, Work::Watched(watching), keys, self.val_size)
    }
}

impl Plan {
    fn populate(mut self, populate: bool, keys: &KeyOptions) -> Result<Plan, OptionsError> {
        // Without a size, sequential keys have no end.
        if populate && keys.sequential_keys && keys.key_space_size.is_none() {
            return Err(OptionsError::Populate);
        }
        self.populate = populate;
        Ok(self)
    }

    fn compact(mut self, options: &CompactOptions) -> Result<Plan, OptionsError> {
        if let Some(interval) = options.compact_interval {
            let interval = nonzero(interval, "--compact-interval")?;
            self.shape.compact = Some(Compact { interval, keep: options.compact_index_delta });
        }
        Ok(self)
    }
}

fn nonzero(time: Duration, name: &'static str) -> Result<Duration, OptionsError> {
    if time.is_zero() { Err(OptionsError::Zero(name)) } else { Ok(time) }
}

fn keys(options: &KeyOptions, space: Option<u64>) -> Result<Keys, OptionsError> {
    let max = Keys::space_max(options.key_size as usize);
    let space = space.unwrap_or(if options.sequential_keys { max } else { 1 });
    if space > max {
        return Err(OptionsError::KeySpace { space, size: options.key_size, max });
    }
    Ok(Keys { size: options.key_size as usize, space, sequential: options.sequential_keys })
}

fn plan(
    name: &'static str,
    common: &Common,
    work: Work,
    keys: Keys,
    value_size: u32,
) -> Result<Plan, OptionsError> {
    let budget = match common.duration {
        Some(duration) => Budget::Time(nonzero(duration, "--duration")?),
        None => Budget::Requests(common.total.unwrap_or(10_000)),
    };
    if let Budget::Requests(total) = budget
        && !common.versus.is_empty()
        && u64::from(common.rounds) > total
    {
        return Err(OptionsError::Rounds { rounds: common.rounds, total });
    }
    let shape = Shape {
        threads: common.threads as usize,
        conns: common.conns as usize,
        clients: common.clients as usize,
        rate: common.rate.filter(|&rate| rate > 0.0),
        compact: None,
        user: common.user.clone(),
        logins: None,
        during: During::default(),
        dial_timeout: nonzero(common.dial_timeout, "--dial-timeout")?,
        stall_timeout: nonzero(common.stall_timeout, "--stall-timeout")?,
    };
    Ok(Plan {
        name,
        common: common.clone(),
        work,
        keys,
        value_size: value_size as usize,
        populate: false,
        shape,
        budget,
    })
}

/// Numbers with units, one after the other: `1m30s`, `1.5s`, `200ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as 30s, 1m30s or 200ms");
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let letters = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        seconds += number
            * match unit {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                _ => return Err(wrong()),
            };
        rest = after;
    }
    // A day is longer than any benchmark, and keeps sums of times and clocks in range.
    if text.is_empty() || seconds > 86_400.0 {
        return Err(wrong());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// A report gives times in seconds.
fn in_seconds<S: Serializer>(
    time: &(impl Into<Option<Duration>> + Copy),
    serializer: S,
) -> Result<S::Ok, S::Error> {
    (*time).into().map(|time| time.as_secs_f64()).serialize(serializer)
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate == 0.0 || (0.001..=1e9).contains(&rate) => Ok(rate),
        _ => Err(format!("{text:?} is not 0 or a number from 0.001 to 1000000000")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(args: &str) -> Result<Plan, OptionsError> {
        let args = std::iter::once("bench").chain(args.split_whitespace());
        match Cli::try_parse_from(args).unwrap().program {
            Program::One(command) => command.plan(),
            other => panic!("no workload: {other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("250us"), Ok(Duration::from_micros(250)));
        for wrong in ["", "5", "s", "1x", "-1s", "1s2", "1..5s", "99h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn options_that_do_not_fit_are_named() {
        let error = |args| planned(args).unwrap_err().to_string();
        assert!(error("put --key-size 2 --key-space-size 257").contains("only be 256"));
        assert!(error("txn-put --txn-ops 3 --key-space-size 2").starts_with("--txn-ops 3"));
        assert!(error("put --total 5 --versus b:1 --rounds 6").starts_with("--rounds 6"));
        assert!(error("range --populate --sequential-keys").starts_with("--populate"));
        assert!(error("put --duration 0s").starts_with("--duration"));
        assert!(error("watch --key-size 1 --watched-key-total 17").contains("only be 16"));
    }

    #[test]
    fn defaults_follow_the_workload() {
        let put = planned("put").unwrap();
        assert_eq!((put.keys.space, put.budget), (1, Budget::Requests(10_000)));
        assert_eq!(planned("put --sequential-keys").unwrap().keys.space, 1 << 32);
        let latency = planned("watch-latency").unwrap();
        assert_eq!((latency.shape.rate, latency.budget), (Some(100.0), Budget::Requests(1000)));
        let watch = planned("watch --duration 1s").unwrap();
        assert_eq!((watch.shape.rate, watch.budget), (None, Budget::Time(Duration::from_secs(1))));
        let Work::Mixed { reads, .. } = planned("mixed --rw-ratio 3").unwrap().work else {
            panic!("not mixed")
        };
        assert_eq!(reads, 0.75);
        assert_eq!(put.work, Work::Put { logins: false });
        let during = planned("put --during defragment,compaction --compact-index-delta 5").unwrap();
        assert_eq!(during.work, Work::PutDuring);
        assert_eq!(during.shape.during, During { compaction: Some(5), defragment: true });
    }
}
