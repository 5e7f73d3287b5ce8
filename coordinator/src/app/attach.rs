//! Following a run that another process has.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use distillery_common::storage::Store;

use super::TRY_AGAIN;
use crate::console;
use crate::journal;
use crate::scheduler::{Durable, Outcome};
use crate::service::client::Client;

/// Between two looks at a run.
const LOOK: Duration = Duration::from_secs(1);

/// Shows a run that another process has, until it ends. Ctrl-C stops the run as it would there.
pub(super) async fn follow(mut client: Client, store: &Store) -> anyhow::Result<ExitCode> {
    let mut interrupted = false;
    let mut shown = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {
                let Ok(status) = client.status().await else {
                    break;
                };
                let line = status.summary();
                if line != shown {
                    console::note(&line);
                    shown = line;
                }
            }
            _ = tokio::signal::ctrl_c() => {
                client.stop(interrupted).await.context("the coordinator does not answer")?;
                interrupted = true;
            }
        }
    }
    let history = journal::read(store).await?;
    match Durable::replay(&history.records).outcome {
        Some(Outcome::Succeeded) => Ok(ExitCode::SUCCESS),
        Some(Outcome::Failed { message }) => {
            console::note(format_args!("error: {message}"));
            Ok(ExitCode::FAILURE)
        }
        Some(Outcome::Stopped { .. }) | None => {
            console::note("the coordinator is gone; run the same command to resume");
            Ok(ExitCode::from(TRY_AGAIN))
        }
    }
}
