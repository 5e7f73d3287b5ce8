//! `coordinator workers RUN`.

use std::process::ExitCode;

use anyhow::Context as _;

use super::Context;
use crate::{app, console};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The run URI: what the recipe calls `output`.
    #[arg(default_value = ".")]
    run: String,
}

pub(super) fn run(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(show(arguments, context))
}

async fn show(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let found = app::find(&arguments.run).await?;
    let mut client = found.client.with_context(|| {
        let uri = found.store.uri();
        match &found.durable.outcome {
            Some(outcome) => format!("the run at {uri} has no workers: it {outcome}"),
            None => format!(
                "no coordinator of the run at {uri} answers, so that its workers are not known; `coordinator run` with its recipe resumes it"
            ),
        }
    })?;
    let status = client.status().await?;
    if context.json {
        console::result(&status.to_json()["workers"])?;
    } else {
        console::result(status.workers_text().trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}
