//! `audit RUN_URI [--against OTHER_RUN_URI]`: says from the store alone whether a finished run kept its promises.
//!
//! The promises are those of the control plane's invariants. This program shares no reader with the product: it
//! reads JSON, Parquet footers and safetensors headers for itself, so that a mistake in ours cannot hide itself.
//! It must never use a crate of this workspace, and never write.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

mod checkpoints;
mod compare;
mod finding;
mod journal;
mod ledger;
mod plan;
mod store;
mod tasks;

use finding::Findings;
use journal::Journal;
use plan::Plan;
use store::Tree;

/// Checks a finished run by what lies in its store.
#[derive(Debug, Parser)]
#[command(name = "audit", version)]
struct Arguments {
    /// The run: a folder, or a URI whose credentials are in the environment.
    run: String,
    /// A run of the same recipe that nobody disturbed: both must have made the same.
    #[arg(long)]
    against: Option<String>,
    /// The run may still be under way: what is not there yet is no violation.
    #[arg(long)]
    unfinished: bool,
    /// Say nothing of checks that hold.
    #[arg(long)]
    quiet: bool,
}

/// What one run consists of, read once.
struct Run {
    tree: Tree,
    plan: Plan,
    journal: Journal,
}

impl Run {
    async fn open(uri: &str, findings: &mut Findings) -> anyhow::Result<Self> {
        let tree = Tree::open(uri).await.with_context(|| uri.to_owned())?;
        let plan = Plan::read(&tree).await?;
        let journal = Journal::read(&tree, findings).await?;
        Ok(Self {
            tree,
            plan,
            journal,
        })
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let findings = runtime.block_on(audit(&arguments))?;
    Ok(findings.tell(&arguments.run, arguments.quiet))
}

async fn audit(arguments: &Arguments) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    let run = Run::open(&arguments.run, &mut findings).await?;
    run.journal.check(&run.plan, &mut findings);
    if !arguments.unfinished {
        run.journal.check_end(&run.plan, &mut findings);
    }
    tasks::check(&run, !arguments.unfinished, &mut findings).await?;
    checkpoints::check(&run, !arguments.unfinished, &mut findings).await?;
    if let Some(other) = &arguments.against {
        let mut ignored = Findings::default();
        let other = Run::open(other, &mut ignored).await?;
        compare::check(&run, &other, &mut findings).await?;
    }
    Ok(findings)
}
