//! The end of `make compare`: reads a finished run and says which method is ahead.

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use distillery_common::figures::Figure;
use distillery_common::recipe::Recipe;
use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};
use distillery_tests::compare::{Comparison, Round, leads, verdict};

/// Compares the methods that one run has trained students with, MLCM with LCM and MCD.
#[derive(Debug, Parser)]
#[command(name = "compare")]
struct Arguments {
    /// The run: a folder or a URI.
    run: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let comparison = read(&arguments.run).await?;
    let rounds = comparison.rounds()?;
    let text = format!(
        "{}\n{}{}\n",
        comparison.table(),
        leads(&rounds),
        verdict(&rounds)
    );
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    Ok(if rounds.iter().all(Round::holds) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn read(run: &str) -> anyhow::Result<Comparison> {
    let store = Store::open(run)?;
    let record = store
        .find(&layout::run_record())
        .await?
        .with_context(|| format!("there is no run at {}", store.uri()))?;
    let recipe = Recipe::from_stored(&RunRecord::from_bytes(&record)?.recipe)?;
    let metrics = store
        .find(&layout::report("metrics.json"))
        .await?
        .with_context(|| format!("the run at {} has no report yet", store.uri()))?;
    let figures: Vec<Figure> = serde_json::from_slice(&metrics).context("report/metrics.json")?;
    Ok(Comparison::new(&recipe, figures))
}
