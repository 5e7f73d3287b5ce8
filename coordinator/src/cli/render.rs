//! `coordinator render`: what a cluster's own tools take.

mod slurm;

use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Batch scripts for Slurm.
    Slurm(slurm::Arguments),
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.what {
        What::Slurm(own) => slurm::run(&own),
    }
}
