//! A client's deadline (`grpc-timeout`): the server gives the call up when it has passed, as the client
//! does on its side.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::time::Sleep;
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::transport::status;

const HEADER: &str = "grpc-timeout";
/// Eight digits and the unit.
const LENGTH_MAX: usize = 9;

/// Reads the value of the header.
///
/// # Errors
/// What is wrong with it, in the words of etcd's gRPC library.
fn parse(value: &[u8]) -> Result<Duration, String> {
    let text = || format!("\"{}\"", value.escape_ascii());
    let (digits, unit) = match value {
        [] | [_] => return Err(format!("transport: timeout string is too short: {}", text())),
        _ if value.len() > LENGTH_MAX => {
            return Err(format!("transport: timeout string is too long: {}", text()));
        }
        [digits @ .., unit] => (digits, unit),
    };
    let of_unit: fn(u64) -> Duration = match unit {
        b'H' => |n| Duration::from_secs(n * 3600),
        b'M' => |n| Duration::from_secs(n * 60),
        b'S' => Duration::from_secs,
        b'm' => Duration::from_millis,
        b'u' => Duration::from_micros,
        b'n' => Duration::from_nanos,
        _ => return Err(format!("transport: timeout unit is not recognized: {}", text())),
    };
    // At most eight digits, so nothing overflows.
    let number = digits.iter().try_fold(0, |sum: u64, digit| {
        digit.is_ascii_digit().then(|| sum * 10 + u64::from(digit - b'0'))
    });
    number.map(of_unit).ok_or_else(|| {
        let digits = digits.escape_ascii();
        format!("strconv.ParseUint: parsing \"{digits}\": invalid syntax")
    })
}

/// The answer to a call whose deadline cannot be read; `None` for all others.
pub fn malformed(headers: &HeaderMap) -> Option<http::Response<tonic::body::Body>> {
    let error = parse(headers.get(HEADER)?.as_bytes()).err()?;
    let mut response = Status::internal(format!("malformed grpc-timeout: {error}")).into_http();
    *response.status_mut() = StatusCode::BAD_REQUEST;
    Some(response)
}

/// How long the client waits; `None` if it did not say.
pub fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    // A malformed one has been refused before the call came here.
    parse(metadata.get(HEADER)?.as_bytes()).ok()
}

/// Runs a call until its deadline.
///
/// # Errors
/// `DeadlineExceeded`, or what `work` answers.
pub async fn within<T>(
    timeout: Option<Duration>,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match timeout {
        None => work.await,
        Some(timeout) => match tokio::time::timeout(timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(status::deadline_exceeded()),
        },
    }
}

/// The deadline of a stream; costs nothing where the client has set none.
pub struct Deadline(Option<Pin<Box<Sleep>>>);

impl Deadline {
    /// A deadline that runs from now on.
    pub fn of(metadata: &MetadataMap) -> Self {
        Deadline(timeout(metadata).map(|timeout| Box::pin(tokio::time::sleep(timeout))))
    }

    /// Whether it has passed; otherwise the task is woken when it does.
    pub fn has_passed(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.0 {
            None => false,
            Some(sleep) => match sleep.as_mut().poll(cx) {
                Poll::Pending => false,
                Poll::Ready(()) => {
                    // A timer that has rung is not to be asked again.
                    self.0 = None;
                    true
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_have_up_to_eight_digits_and_a_unit() {
        for (text, expected) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("4999937u", Duration::from_micros(4_999_937)),
            ("250m", Duration::from_millis(250)),
            ("0n", Duration::ZERO),
            ("00000007n", Duration::from_nanos(7)),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(expected), "{text}");
        }
        for (text, error) in [
            ("", "transport: timeout string is too short: \"\""),
            ("S", "transport: timeout string is too short: \"S\""),
            ("123456789S", "transport: timeout string is too long: \"123456789S\""),
            ("12", "transport: timeout unit is not recognized: \"12\""),
            ("1s", "transport: timeout unit is not recognized: \"1s\""),
            ("-1S", "strconv.ParseUint: parsing \"-1\": invalid syntax"),
            ("1.5S", "strconv.ParseUint: parsing \"1.5\": invalid syntax"),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(error.to_string()), "{text}");
        }
    }
}
