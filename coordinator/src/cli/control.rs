//! `coordinator stop`, `pause`, `resume`, `cancel` and `drain`.

use std::process::ExitCode;

use serde_json::json;

use super::Context;
use crate::app::{self, Heard};
use crate::console;
use crate::service::client::Request;

#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// The run URI: what the recipe calls `output`.
    run: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Stop {
    #[command(flatten)]
    run: Run,
    /// Do not wait for a checkpoint.
    #[arg(long)]
    now: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct WithReason {
    #[command(flatten)]
    run: Run,
    /// For whoever looks at the run later.
    #[arg(long, default_value = "asked for")]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Drain {
    #[command(flatten)]
    run: Run,
    /// Name of the worker, as `coordinator status` shows it.
    worker: String,
}

pub(super) fn stop(arguments: Stop, context: Context) -> anyhow::Result<ExitCode> {
    let now = arguments.now;
    ask(&arguments.run, Request::Stop { now }, context)
}

pub(super) fn pause(arguments: WithReason, context: Context) -> anyhow::Result<ExitCode> {
    let reason = arguments.reason;
    ask(&arguments.run, Request::Pause { reason }, context)
}

pub(super) fn resume(arguments: &Run, context: Context) -> anyhow::Result<ExitCode> {
    ask(arguments, Request::Resume, context)
}

pub(super) fn cancel(arguments: WithReason, context: Context) -> anyhow::Result<ExitCode> {
    let reason = arguments.reason;
    ask(&arguments.run, Request::Cancel { reason }, context)
}

pub(super) fn drain(arguments: Drain, context: Context) -> anyhow::Result<ExitCode> {
    let worker = arguments.worker;
    ask(&arguments.run, Request::Drain { worker }, context)
}

fn ask(run: &Run, request: Request, context: Context) -> anyhow::Result<ExitCode> {
    let asked = app::control(&run.run, request, context.clock);
    let heard = match super::runtime()?.block_on(asked)? {
        Heard::Coordinator => "the coordinator was told",
        Heard::Journal => "no coordinator has the run; its journal says so to the next",
    };
    if context.json {
        console::result(json!({ "heard": heard }))?;
    } else {
        console::note(heard);
    }
    Ok(ExitCode::SUCCESS)
}
