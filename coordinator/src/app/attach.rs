//! Following a run that another process has.

use std::time::Duration;

use anyhow::Context as _;

use crate::console;
use crate::service::client::Client;

/// Between two looks at a run.
const LOOK: Duration = Duration::from_secs(1);

/// Why this process no longer follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// The other process is gone.
    Ended,
    /// Somebody pressed Ctrl-C here.
    Detached,
}

/// Shows a run that another process has, until that is gone or Ctrl-C is pressed here. It only looks on: what this
/// process is told is not meant for the run.
pub(super) async fn follow(mut client: Client) -> anyhow::Result<Left> {
    let mut shown = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {
                let Ok(status) = client.status().await else {
                    return Ok(Left::Ended);
                };
                let line = status.summary();
                if line != shown {
                    console::note(&line);
                    shown = line;
                }
            }
            heard = tokio::signal::ctrl_c() => {
                heard.context("Ctrl-C cannot be listened for")?;
                return Ok(Left::Detached);
            }
        }
    }
}
