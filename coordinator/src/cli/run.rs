//! `coordinator run FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use distillery_common::recipe::Launcher;

use super::{Context, RecipeArguments};
use crate::app;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    recipe: RecipeArguments,
    /// Take the run from a coordinator that may still have it, without asking.
    #[arg(long)]
    takeover: bool,
    /// The engine; found beside this program when not given.
    #[arg(long, env = "DISTILLERY_ENGINE", value_name = "PATH")]
    engine: Option<PathBuf>,
    /// The worker; found beside this program when not given.
    #[arg(long, env = "DISTILLERY_WORKER", value_name = "PATH")]
    worker: Option<PathBuf>,
    /// Serve without TLS on an address that other hosts reach.
    #[arg(long)]
    insecure: bool,
    /// Send spans of attempts and training groups to the OpenTelemetry collector at this URL (OTLP over HTTP, as in
    /// http://127.0.0.1:4318); without it, to that of OTEL_EXPORTER_OTLP_ENDPOINT.
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Waiting times in place of the usual ones, as in `beat=200ms,lease_ttl=2s`; no result depends on them.
    #[arg(
        long = "timings",
        env = "DISTILLERY_TIMINGS",
        value_name = "NAME=TIME",
        value_delimiter = ',',
        hide_short_help = true
    )]
    waits: Vec<app::Wait>,
    /// Show the plan and end.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    if arguments.dry_run {
        return super::plan::run(&arguments.recipe, context);
    }
    let recipe = super::load(&arguments.recipe)?;
    let config = app::Config {
        worker: match recipe.cluster.launcher {
            Launcher::Local => {
                program(arguments.worker, "worker", "--worker or DISTILLERY_WORKER")?
            }
            Launcher::Slurm(_) => {
                program(arguments.worker, "worker", "--worker or DISTILLERY_WORKER")?
            }
            // Theirs lies elsewhere.
            Launcher::External | Launcher::Kubernetes => arguments.worker.unwrap_or_default(),
        },
        engine: program(arguments.engine, "engine", "--engine or DISTILLERY_ENGINE")?,
        takeover: arguments.takeover,
        insecure: arguments.insecure,
        otlp: arguments.otlp,
        waits: arguments.waits,
        json: context.json,
        log_format: context.log_format,
    };
    super::runtime()?.block_on(app::run(recipe, config, context.clock))
}

/// A program of ours: where it was said to be, or beside this one.
pub(super) fn program(given: Option<PathBuf>, name: &str, how: &str) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path,
        None => std::env::current_exe()
            .context("this program does not know where it lies")?
            .with_file_name(name),
    };
    let path = std::path::absolute(&path)
        .with_context(|| format!("{} cannot be made absolute", path.display()))?;
    anyhow::ensure!(
        path.is_file(),
        "there is no {name} at {}; build it, or say where it is with {how}",
        path.display()
    );
    Ok(path)
}
