//! `coordinator status RUN`.

use std::io;
use std::process::ExitCode;

use serde_json::json;

use distillery_common::run::RunRecord;

use super::Context;
use crate::app;
use crate::console;
use crate::scheduler::Durable;
use crate::service::client::Status;

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
    match found.client {
        Some(mut client) => live(&client.status().await?, context)?,
        None => stored(&found.record, &found.durable, context)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn live(status: &Status, context: Context) -> io::Result<()> {
    if context.json {
        console::result(status.to_json())
    } else {
        console::result(status.text().trim_end())
    }
}

/// What is known of a run that nobody works on.
fn stored(record: &RunRecord, durable: &Durable, context: Context) -> io::Result<()> {
    let state = match &durable.outcome {
        Some(outcome) => outcome.to_string(),
        None if durable.paused.is_some() => {
            "paused, and no coordinator has it; `coordinator resume`, then `coordinator run` with its recipe".into()
        }
        None => "no coordinator has it; `coordinator run` with its recipe resumes it".into(),
    };
    let stages: Vec<_> = durable
        .stages
        .iter()
        .map(|(name, log)| {
            let step = log.newest(&[]).map(|checkpoint| checkpoint.step);
            (name, log.sealed.is_some(), step)
        })
        .collect();
    if context.json {
        let stages: Vec<_> = stages
            .iter()
            .map(|(name, sealed, step)| json!({"name": name, "sealed": sealed, "step": step}))
            .collect();
        let run_id = record.run_id.to_string();
        return console::result(json!({"run_id": run_id, "state": state, "stages": stages}));
    }
    console::result(format_args!("run {}: {state}", record.run_id))?;
    for (name, sealed, step) in stages {
        let state = if sealed { "sealed" } else { "open" };
        let step = step.map(|step| format!(", checkpoint at step {step}"));
        let step = step.unwrap_or_default();
        console::result(format_args!("  {name:<14} {state}{step}"))?;
    }
    Ok(())
}
