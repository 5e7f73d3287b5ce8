//! `coordinator report RUN --out FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;

use distillery_common::recipe::Recipe;
use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};

use super::Context;
use crate::console;
use crate::report::{gather, render};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The run URI: what the recipe calls `output`.
    run: String,
    /// The page to write.
    #[arg(long, default_value = "report.html")]
    out: PathBuf,
}

pub(super) fn run(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    super::runtime()?.block_on(write(arguments, context))
}

async fn write(arguments: &Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let store = Store::open(&arguments.run)?;
    let bytes = store
        .find(&layout::run_record())
        .await?
        .with_context(|| format!("there is no run at {}", store.uri()))?;
    let record = RunRecord::from_bytes(&bytes)?;
    let recipe = Recipe::from_stored(&record.recipe)?;
    let report = gather(&store, &record, &recipe).await?;
    std::fs::write(&arguments.out, render(&report))
        .with_context(|| format!("writing {}", arguments.out.display()))?;
    if context.json {
        console::result(&report.summary)?;
    } else {
        console::result(arguments.out.display())?;
    }
    Ok(ExitCode::SUCCESS)
}
