//! The rules between settings, in etcd's order, and what follows from several of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use engine_api::Options;

use super::duration::GoDuration;
use super::error::ConfigError;
use super::gates::Gate;
use super::load::Sources;
use super::notice::Notice;
use super::types::{
    AuthToken, ClusterState, CompactionMode, LogFormat, LogLevel, LogOutput, MetricsDetail,
    Retention, Rotation,
};
use super::url::{self, Scheme, Url, UrlError};
use crate::engines;

use super::{
    Config, DEFAULT_CLIENT_URL, DEFAULT_NAME, DEFAULT_PEER_URL, DEFAULT_QUOTA_BYTES, PhysicalQuota,
};

const MAX_ELECTION_MS: u64 = 50_000;
const RECOMMENDED_REQUEST_BYTES: u64 = 10 * 1024 * 1024;
const RECOMMENDED_QUOTA_BYTES: u64 = 8 * 1024 * 1024 * 1024;

/// Checks the rules and fills in what is held typed.
pub(super) fn validate(config: &mut Config, sources: &mut Sources) -> Result<(), ConfigError> {
    if !sources.file && config.given.discovery_fallback == "proxy" {
        return Err(ConfigError::FallbackProxy);
    }
    logging(config)?;
    let notices = &mut sources.notices;

    bindable(&config.listen.peer_urls)?;
    bindable(&config.listen.client_urls)?;
    bindable(&config.listen.client_http_urls)?;
    if config.listen.client_http_urls.is_empty() {
        notices.push(Notice::OnePort);
    }
    bindable(&config.listen.metrics_urls)?;
    if let Some(url) = hostless(&config.cluster.advertise_peer_urls) {
        let urls = url::join(&config.cluster.advertise_peer_urls);
        return Err(ConfigError::AdvertisePeerHost { urls, url });
    }
    if let Some(url) = hostless(&config.cluster.advertise_client_urls) {
        let urls = url::join(&config.cluster.advertise_client_urls);
        return Err(ConfigError::AdvertiseClientHost { urls, url });
    }

    config.cluster.state = ClusterState::from_name(&config.given.initial_cluster_state)
        .ok_or_else(|| ConfigError::ClusterState(config.given.initial_cluster_state.clone()))?;
    discovery(config)?;
    ticks(config)?;
    if config.cluster.advertise_client_urls.is_empty() {
        return Err(ConfigError::NoAdvertise);
    }
    let mode = match &*config.given.compaction_mode {
        "" => return Err(ConfigError::NoCompactionMode),
        word => CompactionMode::from_name(word)
            .ok_or_else(|| ConfigError::CompactionMode(word.to_owned()))?,
    };
    if config.tracing.enabled {
        match config.tracing.sampling_rate {
            ..0 => return Err(ConfigError::SamplingNegative),
            1_000_001.. => return Err(ConfigError::SamplingTooHigh),
            _ => {}
        }
    }
    gates(config, notices)?;
    if config.checks.compact_hash_check_time.is_zero() {
        return Err(ConfigError::CompactHashTime(GoDuration(0)));
    }
    if config.member.name == DEFAULT_NAME {
        notices.push(Notice::DefaultName { name: config.member.name.clone() });
    }
    tls(config)?;
    config.compaction.auto = Retention::parse(mode, &config.given.compaction_retention)
        .map_err(ConfigError::Retention)?;
    Ok(())
}

/// The log comes first, for everything later is told through it.
fn logging(config: &mut Config) -> Result<(), ConfigError> {
    match &*config.given.logger {
        "zap" => {}
        "capnslog" => return Err(ConfigError::Capnslog),
        other => return Err(ConfigError::Logger(other.to_owned())),
    }
    if config.given.log_outputs.is_empty() {
        config.given.log_outputs.push("default".to_owned());
    }
    let words = &config.given.log_outputs;
    if words.len() > 1 && words.iter().any(|word| word == "default") {
        return Err(ConfigError::DefaultOutputNotAlone);
    }
    let rotation = config.given.log_rotation.then(|| rotation(config)).transpose()?;
    let mut outputs = BTreeSet::new();
    for word in words {
        outputs.insert(match word.as_str() {
            "default" | "stderr" => LogOutput::Stderr,
            "stdout" => LogOutput::Stdout,
            "/dev/null" => LogOutput::Null,
            "systemd/journal" => LogOutput::Journal,
            "" => return Err(ConfigError::EmptyOutput),
            path => LogOutput::File(PathBuf::from(path)),
        });
    }
    if outputs.contains(&LogOutput::Journal) && words.len() > 1 {
        let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
        return Err(ConfigError::JournalNotAlone(format!("[{}]", quoted.join(" "))));
    }
    if outputs.contains(&LogOutput::Null) {
        outputs = BTreeSet::from([LogOutput::Null]);
    }
    let format = LogFormat::from_name(&config.given.log_format);
    let level = LogLevel::from_name(&config.given.log_level);
    config.log.outputs = outputs.into_iter().collect();
    config.log.rotation = rotation;
    config.log.format =
        format.ok_or_else(|| ConfigError::LogFormat(config.given.log_format.clone()))?;
    config.log.level =
        level.ok_or_else(|| ConfigError::LogLevel(config.given.log_level.clone()))?;
    Ok(())
}

fn rotation(config: &Config) -> Result<Rotation, ConfigError> {
    let outputs = &config.given.log_outputs;
    let is_file = |word: &&String| !matches!(word.as_str(), "default" | "stderr" | "stdout");
    let files = outputs.iter().filter(is_file).count();
    if files > 1 || (files == 0 && outputs.len() == 1) {
        return Err(ConfigError::RotationOutput);
    }
    serde_json::from_str(&config.given.log_rotation_json).map_err(|error| {
        match error.classify() {
            serde_json::error::Category::Syntax => ConfigError::RotationSyntax(error),
            serde_json::error::Category::Data => ConfigError::RotationValue(error),
            // Go calls a text that ends too early a syntax error.
            serde_json::error::Category::Eof => ConfigError::RotationSyntax(error),
            serde_json::error::Category::Io => ConfigError::RotationEnd(error),
        }
    })
}

/// An address that is bound to is not looked up.
fn bindable(urls: &[Url]) -> Result<(), ConfigError> {
    let bad = urls.iter().find(|url| {
        !url.scheme().is_unix() && url.host_name() != "localhost" && url.ip().is_none()
    });
    bad.map_or(Ok(()), |url| Err(ConfigError::BindName(url.to_string())))
}

/// The first URL without a host.
fn hostless(urls: &[Url]) -> Option<String> {
    urls.iter()
        .find(|url| !url.scheme().is_unix() && url.host_name().is_empty())
        .map(Url::to_string)
}

fn discovery(config: &Config) -> Result<(), ConfigError> {
    let discovery = &config.discovery;
    let ways = [
        !config.given.initial_cluster.is_empty(),
        !discovery.srv.is_empty(),
        !discovery.endpoints.is_empty(),
    ];
    if ways.into_iter().filter(|&way| way).count() > 1 {
        return Err(ConfigError::ManyBootstraps);
    }
    if discovery.token.is_empty() != discovery.endpoints.is_empty() {
        return Err(ConfigError::DiscoveryPair);
    }
    if discovery.endpoints.iter().any(|endpoint| endpoint.trim().is_empty()) {
        return Err(ConfigError::DiscoveryEmpty);
    }
    Ok(())
}

fn ticks(config: &Config) -> Result<(), ConfigError> {
    let (heartbeat_ms, election_ms) = (config.raft.heartbeat_ms, config.raft.election_ms);
    if heartbeat_ms == 0 {
        return Err(ConfigError::ZeroTick("heartbeat-interval"));
    }
    if election_ms == 0 {
        return Err(ConfigError::ZeroTick("election-timeout"));
    }
    if heartbeat_ms.saturating_mul(5) > election_ms {
        return Err(ConfigError::ElectionTooShort { election_ms, heartbeat_ms });
    }
    if election_ms > MAX_ELECTION_MS {
        return Err(ConfigError::ElectionTooLong { election_ms });
    }
    Ok(())
}

fn gates(config: &Config, notices: &mut Vec<Notice>) -> Result<(), ConfigError> {
    let checkpoint = config.gates.enabled(Gate::LeaseCheckpoint);
    let persist = config.gates.enabled(Gate::LeaseCheckpointPersist);
    match (checkpoint, persist) {
        (false, true) => return Err(ConfigError::PersistWithoutCheckpoint),
        (true, false) => notices.push(Notice::CheckpointWithoutPersist),
        _ => {}
    }
    Ok(())
}

fn tls(config: &Config) -> Result<(), ConfigError> {
    let version = |text: &str| match text {
        "" => Ok(0),
        "TLS1.2" => Ok(2),
        "TLS1.3" => Ok(3),
        _ => Err(ConfigError::TlsVersion(text.to_owned())),
    };
    let policy = &config.tls;
    let (min, max) = (version(&policy.min_version)?, version(&policy.max_version)?);
    if max != 0 && min > max {
        return Err(ConfigError::TlsOrder {
            min: policy.min_version.clone(),
            max: policy.max_version.clone(),
        });
    }
    if min == 3 && !policy.cipher_suites.is_empty() {
        return Err(ConfigError::CiphersWithTls13);
    }
    Ok(())
}

/// Fills in what depends on the machine or on several settings, and puts defaults where 0 stands for
/// them.
pub(super) fn resolve(
    config: &mut Config,
    sources: &mut Sources,
    default_host: &dyn Fn() -> Result<String, String>,
) -> Result<(), ConfigError> {
    hosts(config, sources, default_host);
    if config.given.data_dir.as_os_str().is_empty() {
        config.member.data_dir = PathBuf::from(format!("{}.etcd", config.member.name));
        let data_dir = config.member.data_dir.clone();
        sources.notices.push(Notice::DefaultDataDir { data_dir });
    } else {
        config.member.data_dir = config.given.data_dir.clone();
    }
    config.member.wal_dir =
        Some(config.given.wal_dir.clone()).filter(|dir| !dir.as_os_str().is_empty());
    config.cluster.initial =
        parse_initial(&config.given.initial_cluster).map_err(ConfigError::InitialCluster)?;
    for (flag, urls) in [
        ("listen-peer-urls", &config.listen.peer_urls),
        ("listen-client-urls", &config.listen.client_urls),
        ("initial-advertise-peer-urls", &config.cluster.advertise_peer_urls),
    ] {
        if urls.is_empty() {
            return Err(ConfigError::NoUrls { flag });
        }
    }
    let http: BTreeSet<&Url> = config.listen.client_http_urls.iter().collect();
    if let Some(url) = config.listen.client_urls.iter().find(|url| http.contains(url)) {
        return Err(ConfigError::SharedClientUrl(url.to_string()));
    }
    config.auth.token =
        AuthToken::parse(&config.given.auth_token).map_err(ConfigError::AuthToken)?;
    let unknown = AuthToken::unknown_options(&config.given.auth_token);
    if !unknown.is_empty() {
        sources.notices.push(Notice::TokenOptionsUnknown { names: unknown.join(", ") });
    }
    config.storage.engine = engines::find(&config.given.engine)
        .ok_or_else(|| ConfigError::Engine { name: config.given.engine.clone() })?;
    Options::new(config.storage.engine.about, &config.storage.engine_options)?;
    defaults_for_zero(config, &mut sources.notices)
}

/// A member that listens on all addresses advertises the one of its default route, if it was not told
/// what to advertise; a member with a name but no cluster founds one of itself.
fn hosts(
    config: &mut Config,
    sources: &mut Sources,
    default_host: &dyn Fn() -> Result<String, String>,
) {
    let everywhere = |listen: &[Url], advertised: &[Url], default: &str| {
        listen.first().is_some_and(|url| url.host_name() == "0.0.0.0")
            && matches!(advertised, [only] if only.as_str() == default)
    };
    let (listen, cluster) = (&config.listen, &mut config.cluster);
    let peer = everywhere(&listen.peer_urls, &cluster.advertise_peer_urls, DEFAULT_PEER_URL);
    let client =
        everywhere(&listen.client_urls, &cluster.advertise_client_urls, DEFAULT_CLIENT_URL);
    if peer || client {
        match default_host() {
            Ok(host) => {
                let at = |listen: &Url| Url::new(Scheme::Http, &host, listen.port());
                if peer {
                    cluster.advertise_peer_urls = vec![at(&listen.peer_urls[0])];
                }
                if client {
                    cluster.advertise_client_urls = vec![at(&listen.client_urls[0])];
                }
                sources.notices.push(Notice::DefaultHost { host });
            }
            Err(error) => sources.notices.push(Notice::NoDefaultHost { error }),
        }
    }
    let default_cluster = format!("{DEFAULT_NAME}={DEFAULT_PEER_URL}");
    if config.member.name != DEFAULT_NAME && config.given.initial_cluster == default_cluster {
        let name = &config.member.name;
        let entries = config.cluster.advertise_peer_urls.iter().map(|url| format!("{name}={url}"));
        config.given.initial_cluster = entries.collect::<Vec<_>>().join(",");
    }
}

/// Reads `name=url[,name=url...]`; a name may stand several times, an empty item counts for nothing.
fn parse_initial(text: &str) -> Result<BTreeMap<String, Vec<Url>>, UrlError> {
    let mut members: BTreeMap<String, Vec<Url>> = BTreeMap::new();
    for item in text.split(',').filter(|item| !item.is_empty()) {
        let (name, url) = item.split_once('=').unwrap_or((item, ""));
        members.entry(name.to_owned()).or_default().push(Url::parse(url)?);
    }
    for urls in members.values_mut() {
        urls.sort();
    }
    Ok(members)
}

fn defaults_for_zero(config: &mut Config, notices: &mut Vec<Notice>) -> Result<(), ConfigError> {
    let default = Config::default();
    let or = |value: &mut u64, default: u64| {
        if *value == 0 {
            *value = default;
        }
    };
    let or_time = |value: &mut Duration, default: Duration| {
        if value.is_zero() {
            *value = default;
        }
    };
    or(&mut config.raft.snapshot_count, default.raft.snapshot_count);
    or(&mut config.raft.snapshot_catchup_entries, default.raft.snapshot_catchup_entries);
    or(&mut config.auth.token_ttl_s, default.auth.token_ttl_s);
    or_time(&mut config.storage.batch_interval, default.storage.batch_interval);
    or_time(&mut config.compaction.sleep_interval, default.compaction.sleep_interval);
    or_time(&mut config.watch.progress_notify_interval, default.watch.progress_notify_interval);
    or_time(
        &mut config.observe.warning_unary_request_duration,
        default.observe.warning_unary_request_duration,
    );
    if config.storage.freelist_type != "array" {
        config.storage.freelist_type = default.storage.freelist_type;
    }
    config.storage.batch_limit =
        positive("backend-batch-limit", config.given.batch_limit, default.storage.batch_limit)?;
    config.compaction.batch_limit = positive(
        "compaction-batch-limit",
        config.given.compaction_batch_limit,
        default.compaction.batch_limit,
    )?;

    let least = Duration::from_millis(100);
    if config.watch.progress_notify_interval < least {
        config.watch.progress_notify_interval = least;
        notices.push(Notice::WatchIntervalRaised);
    }
    config.storage.quota_bytes = match config.given.quota_bytes {
        ..0 => None,
        0 => Some(DEFAULT_QUOTA_BYTES),
        bytes => Some(bytes.unsigned_abs()),
    };
    config.storage.quota_physical = match config.given.quota_physical_bytes {
        ..0 => PhysicalQuota::Off,
        0 => PhysicalQuota::Derived,
        bytes => PhysicalQuota::Bytes(bytes.unsigned_abs()),
    };
    if let Some(bytes) = config.storage.quota_bytes
        && bytes > RECOMMENDED_QUOTA_BYTES
    {
        notices.push(Notice::LargeQuota { bytes, recommended: RECOMMENDED_QUOTA_BYTES });
    }
    let bytes = config.limits.max_request_bytes;
    if bytes > RECOMMENDED_REQUEST_BYTES {
        notices.push(Notice::LargeRequests { bytes, recommended: RECOMMENDED_REQUEST_BYTES });
    }
    config.auth.bcrypt_cost = match u32::try_from(config.given.bcrypt_cost) {
        Ok(cost @ 4..=31) => cost,
        _ => {
            let used = default.auth.bcrypt_cost;
            notices.push(Notice::BcryptCost { given: config.given.bcrypt_cost, used });
            used
        }
    };
    config.observe.metrics = MetricsDetail::from_name(&config.given.metrics).unwrap_or_else(|| {
        notices.push(Notice::MetricsUnknown { given: config.given.metrics.clone() });
        MetricsDetail::Basic
    });
    Ok(())
}

/// A count; 0 stands for `default`.
fn positive(flag: &'static str, value: i64, default: u64) -> Result<u64, ConfigError> {
    match value {
        0 => Ok(default),
        _ => u64::try_from(value).map_err(|_| ConfigError::NotPositive { flag, value }),
    }
}

impl Config {
    /// Checks what must hold at the first start of a member, and is without meaning once it has a
    /// WAL: its own entry in the initial cluster is what it advertises, and no URL is there twice.
    ///
    /// URLs that differ as texts are compared by what `lookup` answers for their host names;
    /// `localhost` is not looked up.
    ///
    /// # Errors
    /// [`ConfigError`], with etcd's text.
    pub fn check_bootstrap(
        &self,
        lookup: &dyn Fn(&str) -> std::io::Result<IpAddr>,
    ) -> Result<(), ConfigError> {
        let name = &self.member.name;
        let cluster = initial_text(&self.cluster.initial);
        if self.cluster.initial.is_empty() {
            return Err(ConfigError::NoInitialCluster);
        }
        let Some(own) = self.cluster.initial.get(name) else {
            return Err(ConfigError::NoLocalName(name.clone()));
        };
        let advertised = &self.cluster.advertise_peer_urls;
        if own != advertised {
            let resolve = |url: &Url| {
                if url.scheme().is_unix() || url.host_name() == "localhost" {
                    return Ok(url.clone());
                }
                match url.ip().map_or_else(|| lookup(url.host_name()), Ok) {
                    Ok(ip) => Ok(Url::new(url.scheme(), &ip.to_string(), url.port())),
                    Err(source) => Err(ConfigError::Resolve {
                        url: url.to_string(),
                        cluster: cluster.clone(),
                        source,
                    }),
                }
            };
            let pairs = |urls: &[Url]| -> Result<BTreeMap<Url, Url>, ConfigError> {
                urls.iter().map(|url| Ok((resolve(url)?, url.clone()))).collect()
            };
            let told = pairs(advertised)?;
            let entered = pairs(own)?;
            if let Some((_, url)) = entered.iter().find(|(url, _)| !told.contains_key(url)) {
                return Err(ConfigError::NotAdvertised {
                    name: name.clone(),
                    url: url.to_string(),
                    advertised: url::join(advertised),
                });
            }
            if let Some((_, url)) = told.iter().find(|(url, _)| !entered.contains_key(url)) {
                return Err(ConfigError::NotInCluster { url: url.to_string(), cluster });
            }
        }
        self.check_duplicate_urls()
    }

    /// Checks what must hold when a member without a WAL joins a cluster: it has a name there, no URL
    /// stands twice, and nobody is asked where the cluster is.
    ///
    /// # Errors
    /// [`ConfigError`], with etcd's text.
    pub fn check_join(&self) -> Result<(), ConfigError> {
        if !self.cluster.initial.contains_key(&self.member.name) {
            return Err(ConfigError::NoLocalName(self.member.name.clone()));
        }
        self.check_duplicate_urls()?;
        if !self.discovery.endpoints.is_empty() {
            return Err(ConfigError::DiscoveryWhenJoining);
        }
        Ok(())
    }

    fn check_duplicate_urls(&self) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        if !self.cluster.initial.values().flatten().all(|url| seen.insert(url)) {
            return Err(ConfigError::DuplicateUrl(initial_text(&self.cluster.initial)));
        }
        Ok(())
    }
}

/// The initial cluster as one text, sorted by `name=url`.
pub fn initial_text(members: &BTreeMap<String, Vec<Url>>) -> String {
    let mut items: Vec<String> = members
        .iter()
        .flat_map(|(name, urls)| urls.iter().map(move |url| format!("{name}={url}")))
        .collect();
    items.sort();
    items.join(",")
}
