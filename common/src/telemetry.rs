//! Logs, and the measures of what work costs: time and memory.
//!
//! Apart from the driver and the agent this is the only place that reads the clock (law L10): a stopwatch tells
//! how long something took and can never decide anything.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Lines for people.
    #[default]
    Plain,
    /// One JSON object a line.
    Json,
}

/// Names the format of a program's logs where its command line does not.
pub const FORMAT_VARIABLE: &str = "DISTILLERY_LOG_FORMAT";

/// Not a format of logs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no format of logs; there are: plain, json")]
pub struct UnknownFormat(String);

impl std::str::FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            other => Err(UnknownFormat(other.into())),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Json => "json",
        })
    }
}

/// Sends logs of `level` (`info`, `debug`, …) and above to standard error; `RUST_LOG` wins when it is set.
///
/// A second call changes nothing.
pub fn init(level: &str, format: Format) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let ansi = std::env::var_os("NO_COLOR").is_none()
        && std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        // It would be told on standard error, which has just failed, by a macro that panics then.
        .log_internal_errors(false);
    // The only failure is that a subscriber is there already.
    let _ = match format {
        Format::Plain => logs.try_init(),
        Format::Json => logs.json().try_init(),
    };
}

/// Seconds since 1970 by this host's clock, to show beside other clocks.
pub fn unix_seconds() -> i64 {
    unix_millis() / 1000
}

/// Milliseconds since 1970 by this host's clock, to show beside other clocks.
#[expect(
    clippy::disallowed_methods,
    reason = "it is told to people, and nothing follows from it"
)]
pub fn unix_millis() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

/// A moment in milliseconds since 1970 as people and RFC 3339 write it, in UTC.
pub fn moment(unix_millis: i64) -> String {
    let moment = chrono::DateTime::from_timestamp_millis(unix_millis);
    moment.map_or_else(
        || unix_millis.to_string(),
        |moment| moment.to_rfc3339_opts(chrono::SecondsFormat::Millis, true),
    )
}

/// Measures how long something takes.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    started: std::time::Instant,
}

impl Stopwatch {
    /// Starts measuring.
    #[expect(
        clippy::disallowed_methods,
        reason = "measuring is what a stopwatch is for"
    )]
    pub fn start() -> Self {
        Self {
            started: std::time::Instant::now(),
        }
    }

    /// Time since the start.
    #[expect(
        clippy::disallowed_methods,
        reason = "measuring is what a stopwatch is for"
    )]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Time since the start, and starts again.
    pub fn lap(&mut self) -> Duration {
        let elapsed = self.elapsed();
        *self = Self::start();
        elapsed
    }
}

/// What a piece of work cost the process that did it. For people: nothing follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Wall time.
    pub seconds: f64,
    /// The most memory of the host that the process had at a time; none where it cannot be told.
    pub peak_bytes: Option<u64>,
}

/// Measures what a piece of work costs.
#[derive(Debug, Clone, Copy)]
pub struct Meter {
    stopwatch: Stopwatch,
}

impl Meter {
    /// Starts measuring. A process has one peak, so an earlier meter of the same process ends here.
    pub fn start() -> Self {
        // Makes the kernel forget the peak. Where it refuses, the figure is that of the whole process.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        Self {
            stopwatch: Stopwatch::start(),
        }
    }

    /// The cost since the start.
    pub fn cost(&self) -> Cost {
        Cost {
            seconds: self.stopwatch.elapsed().as_secs_f64(),
            peak_bytes: peak_memory(),
        }
    }
}

/// The most memory of the host that this process had at a time, since its start or its last [`Meter`]'s.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_written_as_rfc_3339_says() {
        assert_eq!(moment(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(moment(1_709_210_096_789), "2024-02-29T12:34:56.789Z");
        assert_eq!(moment(i64::MAX), i64::MAX.to_string());
    }

    #[test]
    fn a_meter_sees_memory_that_is_used_and_given_back() {
        const BYTES: usize = 64 << 20;
        let meter = Meter::start();
        let before = meter.cost().peak_bytes.expect("Linux tells");
        drop(std::hint::black_box(vec![1u8; BYTES]));
        let cost = meter.cost();
        let after = cost.peak_bytes.expect("Linux tells");
        assert!(after >= before + BYTES as u64 / 2, "{before} then {after}");
        assert!(cost.seconds > 0.0);
    }
}
