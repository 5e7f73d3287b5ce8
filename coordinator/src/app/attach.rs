//! Following a run that another process has.

use std::time::Duration;

use anyhow::Context as _;

use super::Access;
use super::find::{search, stranger};
use crate::console;
use crate::scheduler::Durable;
use crate::service::client::{Client, Search};

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

/// The coordinator that has the run, if it answers where the journal says that one has had it. `access` is what is known
/// here of its token.
///
/// # Errors
/// When somebody answers who may be it and does not take that token: it may be in the middle of a run.
pub(super) async fn coordinator(
    access: Option<&Access>,
    durable: &Durable,
    tls: bool,
) -> anyhow::Result<Option<Client>> {
    let endpoint = &durable.endpoint;
    match search(access, durable, tls).await? {
        Search::Found(client) => {
            console::note(format_args!(
                "a coordinator at {endpoint} has this run; attached"
            ));
            Ok(Some(client))
        }
        Search::Nobody(why) => {
            // One that ended in order has said so.
            if durable.outcome.is_none() {
                console::note(format_args!(
                    "no coordinator answers at {endpoint}, where one has had this run ({why}); it is taken over"
                ));
            }
            Ok(None)
        }
        Search::Stranger(why) => anyhow::bail!(
            "{}; set DISTILLERY_TOKEN (or cluster.token) to what it was started with, or, if that one is to end or is none of this \
             run's, say --takeover",
            stranger(endpoint, &why)
        ),
    }
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
