//! Logs, and the stopwatch of whatever is measured.
//!
//! Apart from the driver and the agent this is the only place that reads the clock (law L10): a stopwatch tells
//! how long something took and can never decide anything.

use std::time::Duration;

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
