//! Asks a peer every few seconds whether it is there, and how late its clock is. What comes of it is
//! logged and measured, nothing else: a slow link shows before raft suffers from it.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;

use super::client;
use super::network::{Net, SharedUrls};
use super::pipeline::{Connection, PostError};
use crate::config::Url;
use crate::config::duration::GoDuration;
use crate::core::types::MemberId;
use crate::metrics::PeerMetrics;

/// The names under which etcd probes, as its log has them: one for each way to a peer.
pub const NAMES: [&str; 2] = ["ROUND_TRIPPER_RAFT_MESSAGE", "ROUND_TRIPPER_SNAPSHOT"];
const EVERY: Duration = Duration::from_secs(4);
/// How often the state is looked at, and while it is bad.
const REPORT: Duration = Duration::from_secs(30);
const REPORT_UNHEALTHY: Duration = Duration::from_secs(5);
/// Clocks further apart are worth a line.
const DRIFT_MAX: Duration = Duration::from_secs(1);
const ANSWER_MAX: usize = 64 << 10;
/// Share of the newest round trip in the smoothed one.
const WEIGHT: f64 = 0.125;

/// What a peer answers.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "OK")]
    ok: bool,
    #[serde(rename = "Now")]
    now: String,
}

/// Probes one peer in one way until it is dropped.
pub struct Prober {
    pub net: Arc<Net>,
    pub remote: MemberId,
    pub name: &'static str,
    pub urls: SharedUrls,
    pub metrics: PeerMetrics,
}

/// What the probes so far have shown.
#[derive(Default)]
struct Health {
    error: Option<String>,
    /// Seconds.
    smoothed: f64,
    /// Seconds that the peer's clock is ahead.
    drift: f64,
    probed: bool,
}

impl Health {
    fn record(&mut self, result: Result<(Duration, f64), String>) {
        self.probed = true;
        match result {
            Ok((round_trip, drift)) => {
                let seconds = round_trip.as_secs_f64();
                self.smoothed = self.smoothed * (1.0 - WEIGHT) + seconds * WEIGHT;
                self.drift = drift;
                self.error = None;
            }
            Err(error) => self.error = Some(error),
        }
    }
}

impl Prober {
    /// Probes, and reports on what it found.
    pub async fn run(self) {
        let mut health = Health::default();
        let mut kept: Option<(Url, Connection)> = None;
        let mut next_report = tokio::time::Instant::now() + REPORT;
        let mut pace = tokio::time::interval(EVERY);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = pace.tick() => {
                    let url = self.urls.pick();
                    let connection =
                        kept.take().filter(|(to, _)| *to == url).map(|(_, connection)| connection);
                    let probing = self.probe(&url, connection);
                    let probed = tokio::time::timeout(EVERY, probing).await;
                    health.record(match probed {
                        Ok(Ok((connection, round_trip, drift))) => {
                            kept = Some((url, connection));
                            Ok((round_trip, drift))
                        }
                        Ok(Err(error)) => Err(error),
                        Err(_) => Err(format!("no answer within {EVERY:?}")),
                    });
                }
                () = tokio::time::sleep_until(next_report) => {
                    self.report(&health);
                    let healthy = health.error.is_none();
                    next_report += if healthy { REPORT } else { REPORT_UNHEALTHY };
                }
            }
        }
    }

    fn report(&self, health: &Health) {
        if let Some(error) = &health.error {
            tracing::warn!(
                "round-tripper-name" = self.name,
                "remote-peer-id" = %self.remote,
                rtt = %GoDuration::from(Duration::from_secs_f64(health.smoothed)),
                error,
                "prober detected unhealthy status"
            );
        } else if health.drift.abs() > DRIFT_MAX.as_secs_f64() {
            tracing::warn!(
                "round-tripper-name" = self.name,
                "remote-peer-id" = %self.remote,
                "clock-drift" = %GoDuration::from(Duration::from_secs_f64(health.drift.abs())),
                rtt = %GoDuration::from(Duration::from_secs_f64(health.smoothed)),
                "prober found high clock drift"
            );
        }
        if health.probed {
            self.metrics.round_trip_seconds.record(health.smoothed);
        }
    }

    async fn probe(
        &self,
        url: &Url,
        kept: Option<Connection>,
    ) -> Result<(Connection, Duration, f64), String> {
        let said = |error: PostError| crate::actors::exit::full(&error);
        let mut connection = match kept.filter(Connection::is_fresh) {
            Some(connection) => connection,
            None => Connection::open(&self.net, url).await.map_err(said)?,
        };
        let started = Instant::now();
        let request = Request::get("/raft/probing")
            .header(header::HOST, client::host_header(url))
            .body(Body::empty())
            .expect("a parsed host is a header value");
        let response = connection.ask(request).await.map_err(said)?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!("answered with status {status}"));
        }
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let body: Bytes = body.map_err(|error| error.to_string())?.to_bytes();
        let round_trip = started.elapsed();
        let answer: Answer = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        if !answer.ok {
            return Err("the peer says that it is not well".to_string());
        }
        let theirs = unix_seconds(&answer.now).ok_or("its time is none")?;
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        Ok((connection, round_trip, theirs + round_trip.as_secs_f64() / 2.0 - ours))
    }
}

/// Seconds since 1970 of a time as RFC 3339 has it, with its zone.
fn unix_seconds(text: &str) -> Option<f64> {
    let (date, rest) = text.split_once('T')?;
    let (time, zone) = match rest.find(['Z', '+', '-']) {
        Some(at) => rest.split_at(at),
        None => return None,
    };
    let mut parts = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    if !(1970..10_000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March have their leap day at the end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    let days = days - 719_468;
    let mut parts = time.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let seconds = parts.next()?? * 3600.0 + parts.next()?? * 60.0 + parts.next()??;
    let offset = match zone {
        "Z" => 0.0,
        _ => {
            let (hours, minutes) = zone[1..].split_once(':')?;
            let seconds = f64::from(hours.parse::<u16>().ok()?) * 3600.0
                + f64::from(minutes.parse::<u16>().ok()?) * 60.0;
            if zone.starts_with('-') { -seconds } else { seconds }
        }
    };
    Some(days as f64 * 86_400.0 + seconds - offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_members_write_them() {
        let near = |text: &str, expected: f64| {
            let read = unix_seconds(text).unwrap_or_else(|| panic!("{text}"));
            assert!((read - expected).abs() < 0.001, "{text}: {read}");
        };
        near("1970-01-01T00:00:00Z", 0.0);
        near("2000-02-29T12:00:00.5Z", 951_825_600.5);
        near("2024-12-31T23:59:59.999999999Z", 1_735_689_600.0);
        near("2024-06-01T02:00:00.25+02:00", 1_717_200_000.25);
        near("2024-05-31T19:30:00-04:30", 1_717_200_000.0);
        let ours =
            crate::logging::rfc3339_nanos(UNIX_EPOCH + Duration::from_millis(1_717_200_000_250));
        near(&ours, 1_717_200_000.25);
        for bad in [
            "",
            "now",
            "2024-06-01",
            "2024-13-01T00:00:00Z",
            "2024-06-01T00:00:00",
            "T:Z",
            "2024-06-01T0Z",
        ] {
            assert_eq!(unix_seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn round_trips_are_smoothed_and_errors_kept_until_the_next_success() {
        let mut health = Health::default();
        health.record(Ok((Duration::from_secs(8), 0.0)));
        assert!((health.smoothed - 1.0).abs() < 1e-9);
        health.record(Err("gone".into()));
        assert_eq!(health.error.as_deref(), Some("gone"));
        health.record(Ok((Duration::from_secs(1), 2.0)));
        assert!(health.error.is_none() && (health.smoothed - 1.0).abs() < 1e-9);
        assert!(health.drift > 1.0);
    }
}
