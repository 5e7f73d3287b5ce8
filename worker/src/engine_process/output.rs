//! What an engine prints: passed on to the worker's own log, kept with the run, its last lines at hand for a failure.
//!
//! Nothing here ever makes an engine wait: its pipes are read as fast as it fills them, and whoever is slower than that
//! goes without.

use std::collections::VecDeque;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

use distillery_common::logs::TAIL_LINES;
use distillery_common::telemetry::{self, Format};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};

use crate::logs::Intake;
use crate::secrets::Secrets;

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
        lines(pipe, &self.secrets, |text| self.take(text)).await;
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
            Format::Json => {
                // Read and written anew, an escape that nobody else writes may be gone.
                let line = self.json(text).to_string();
                writeln!(std::io::stderr(), "{}", self.secrets.hidden_in(&line))
            }
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

/// Gives every line of a pipe to `take`, without secrets, until it closes.
async fn lines(pipe: impl AsyncRead + Unpin, secrets: &Secrets, take: impl Fn(&str)) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        // A line without an end must not fill the memory.
        let most = secrets.most_bytes();
        let room = most.saturating_sub(line.len()).max(1) as u64;
        let read = (&mut reader).take(room).read_until(b'\n', &mut line).await;
        let is_over = matches!(read, Ok(0) | Err(_));
        if !line.is_empty() {
            let goes_on = !is_over && !line.ends_with(b"\n") && line.len() >= most;
            take(&secrets.shown(&mut line, goes_on));
        }
        if is_over {
            return;
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::logs::LINE_BYTES;
    use distillery_common::security::{Join, Token};

    /// What an engine's output becomes that prints `bytes`, with the token of `join` to hide.
    async fn printed(bytes: &[u8], join: &Join) -> Vec<String> {
        let secrets = Secrets::default();
        secrets.learn(join);
        let all = Mutex::new(Vec::new());
        lines(bytes, &secrets, |text| {
            all.lock().expect("nobody panics").push(text.to_owned());
        })
        .await;
        all.into_inner().expect("nobody panics")
    }

    #[tokio::test]
    async fn a_secret_in_a_line_without_end_is_hidden_wherever_the_line_is_cut() {
        let token = Token::generate().expect("random").reveal();
        let join = Token::parse(&token).expect("a token");
        let join = Join::new("127.0.0.1:1", "run", join, false).expect("a join string");
        let lines = printed(b"one\n\ntwo", &join).await;
        assert_eq!(lines, ["one", "", "two"]);
        // Where a line is kept no longer, and where what is held of it is cut.
        for cut in [LINE_BYTES, 4 * LINE_BYTES, 8 * LINE_BYTES] {
            for before in cut - token.len() - 1..cut + 2 {
                // Colours take no place, so that what lies behind them is shown.
                let coloured = "\u{1b}[31m".repeat((before - 8) / 5);
                for filler in ["x".repeat(before), coloured] {
                    let said = format!("{filler}{token} end\nnext\n");
                    let lines = printed(said.as_bytes(), &join).await;
                    assert_eq!(lines.last().map(String::as_str), Some("next"));
                    let all = lines.concat();
                    // No seven digits of it.
                    let left = (0..token.len() - 6).find(|&at| all.contains(&token[at..at + 7]));
                    assert_eq!(left, None, "{before} bytes before it: {all}");
                }
            }
        }
    }
}
