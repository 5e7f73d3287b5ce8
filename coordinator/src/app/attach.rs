//! Following a run that another process has.

use std::time::Duration;

use anyhow::Context as _;

use crate::console;
use crate::service::client::{Client, Request};

/// Between two looks at a run.
const LOOK: Duration = Duration::from_secs(1);

/// Shows a run that another process has, until that is gone. Ctrl-C stops the run as it would there.
pub(super) async fn follow(mut client: Client) -> anyhow::Result<()> {
    let mut interrupted = false;
    let mut shown = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {
                let Ok(status) = client.status().await else {
                    return Ok(());
                };
                let line = status.summary();
                if line != shown {
                    console::note(&line);
                    shown = line;
                }
            }
            _ = tokio::signal::ctrl_c() => {
                client.ask(Request::Stop { now: interrupted }).await.context("the coordinator does not answer")?;
                interrupted = true;
            }
        }
    }
}
