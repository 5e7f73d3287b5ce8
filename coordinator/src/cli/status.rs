//! `coordinator status RUN` and `coordinator workers RUN`.

use std::io;
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::json;

use distillery_common::run::RunRecord;

use super::Context;
use crate::app;
use crate::console;
use crate::plan::{EVALUATE, EXPORT, REFERENCE, TRAJECTORIES};
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
    let mut found = app::find(&arguments.run).await?;
    match found.client()? {
        Some(client) => live(&client.status().await?, context)?,
        None => stored(&found.record, &found.durable, found.store.uri(), context)?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn workers(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(show_workers(arguments, context))
}

async fn show_workers(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let mut found = app::find(&arguments.run).await?;
    let (uri, outcome) = (found.store.uri().to_owned(), found.durable.outcome.clone());
    let client = found.client()?.with_context(|| match outcome {
        Some(outcome) => format!("the run at {uri} has no workers: it {outcome}"),
        None => format!(
            "no coordinator of the run at {uri} answers, so that its workers are not known; `coordinator run` with its recipe resumes it"
        ),
    })?;
    let status = client.status().await?;
    if context.json {
        console::result(&status.to_json()["workers"])?;
    } else {
        console::result(status.workers_text().trim_end())?;
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
fn stored(record: &RunRecord, durable: &Durable, uri: &str, context: Context) -> io::Result<()> {
    let state = match &durable.outcome {
        Some(outcome) => outcome.to_string(),
        None if durable.paused.is_some() => {
            "paused, and no coordinator has it; `coordinator resume`, then `coordinator run` with its recipe".into()
        }
        None => "no coordinator has it; `coordinator run` with its recipe resumes it".into(),
    };
    let stages = stored_stages(record, durable);
    let name = record.recipe["name"].as_str().unwrap_or_default();
    let (run_id, term) = (record.run_id.to_string(), durable.term);
    if context.json {
        let stages: Vec<_> = stages
            .iter()
            .map(|stage| {
                json!({
                    "name": stage.name, "kind": stage.kind, "sealed": stage.sealed,
                    "state": stage.state(), "step": stage.step, "total": stage.steps,
                })
            })
            .collect();
        return console::result(json!({
            "run_id": run_id, "name": name, "output": uri, "term": term.0, "state": state,
            "stages": stages,
        }));
    }
    console::result(format_args!(
        "run {name} ({run_id}) at {uri}: {state}, term {term}"
    ))?;
    for stage in stages {
        let done = match (stage.step, stage.steps) {
            (Some(step), Some(steps)) => format!("{step:>8} of {steps}"),
            (None, Some(steps)) => format!("{:>8} of {steps}", 0),
            (_, None) => String::new(),
        };
        let state = stage.state();
        let line = format!("  {:<14} {:<13} {state:<11} {done}", stage.name, stage.kind);
        console::result(line.trim_end())?;
    }
    Ok(())
}

/// A stage as far as the journal and the recipe tell.
struct StoredStage {
    name: String,
    kind: String,
    sealed: bool,
    /// Of its newest checkpoint.
    step: Option<u64>,
    /// Steps in all, where it trains.
    steps: Option<u64>,
}

impl StoredStage {
    fn state(&self) -> &'static str {
        if self.sealed { "sealed" } else { "open" }
    }
}

/// Stages that the journal knows, in the order of the plan.
fn stored_stages(record: &RunRecord, durable: &Durable) -> Vec<StoredStage> {
    let trained: Vec<(&str, Option<u64>)> = record.recipe["stages"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|stage| Some((stage["name"].as_str()?, stage["steps"].as_u64())))
        .collect();
    let mut order = vec![TRAJECTORIES];
    order.extend(trained.iter().map(|(name, _)| *name));
    order.extend([REFERENCE, EVALUATE, EXPORT]);
    let known = order
        .iter()
        .filter_map(|&name| Some((name, durable.stages.get(name)?)));
    known
        .map(|(name, log)| {
            let training = trained.iter().find(|(trained, _)| *trained == name);
            StoredStage {
                name: name.to_owned(),
                kind: training.map_or(name, |_| "distill").to_owned(),
                sealed: log.sealed.is_some(),
                step: log.newest(&[]).map(|checkpoint| checkpoint.step),
                steps: training.and_then(|(_, steps)| *steps),
            }
        })
        .collect()
}
