//! What an engine prints: passed on to the worker's own log, kept with the run, its last lines at hand for a failure.
//!
//! Nothing here ever makes an engine wait: its pipes are read as fast as it fills them, and whoever is slower than that
//! goes without.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

use distillery_common::logs::{LINE_BYTES, TAIL_LINES, plain};
use distillery_common::telemetry::{self, Format};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};

use crate::logs::{Intake, Secrets};

/// Where the lines of one engine go.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its worker and its number, for the worker's own log.
    pub engine: (String, u64),
    /// Form of the worker's own log.
    pub format: Format,
    /// What must not be shown.
    pub secrets: Arc<Secrets>,
    /// Keeps lines with the run, where that can be done.
    pub intake: Option<Intake>,
    /// The last lines.
    pub tail: Tail,
}

impl Output {
    /// Takes every line off a pipe until it closes.
    pub(super) async fn follow(self, pipe: impl AsyncRead + Unpin) {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        loop {
            line.clear();
            // A line without an end must not fill the memory.
            let most = 4 * LINE_BYTES as u64;
            match (&mut reader).take(most).read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => self.take(
                    &self
                        .secrets
                        .hidden_in(plain(&String::from_utf8_lossy(&line))),
                ),
            }
        }
    }

    /// Says how the engine ended, after its last words.
    pub(super) fn ended(&self, how: &str) {
        if let Some(intake) = &self.intake {
            intake.push(&format!("(the engine {how})"));
        }
    }

    fn take(&self, text: &str) {
        // Whoever reads this may be gone; the engine's output must be taken off it all the same.
        let _ = match self.format {
            // Formatted by the engine; a second time stamp would only hide it.
            Format::Plain => writeln!(std::io::stderr(), "engine: {text}"),
            Format::Json => writeln!(std::io::stderr(), "{}", self.json(text)),
        };
        if let Some(intake) = &self.intake {
            intake.push(text);
        }
        self.tail.push(text);
    }

    /// A line as the worker's other lines are, with the engine's own fields in it where it writes JSON itself.
    fn json(&self, text: &str) -> serde_json::Value {
        let said = serde_json::from_str::<serde_json::Value>(text)
            .ok()
            .filter(serde_json::Value::is_object)
            .unwrap_or_else(|| serde_json::json!({ "message": text }));
        let (worker, engine) = &self.engine;
        serde_json::json!({
            "timestamp": telemetry::moment(telemetry::unix_millis()), "level": "INFO",
            "worker": worker, "engine": engine, "said": said,
        })
    }
}

/// The last lines of an engine's output.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn push(&self, text: &str) {
        let mut lines = self.0.lock().expect("no holder of this lock can panic");
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(text.to_owned());
    }

    /// Oldest first.
    pub fn lines(&self) -> Vec<String> {
        let lines = self.0.lock().expect("no holder of this lock can panic");
        lines.iter().cloned().collect()
    }
}
