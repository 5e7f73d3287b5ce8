//! `coordinator render`: what a cluster's own tools take.

mod kubernetes;
mod slurm;

use std::process::ExitCode;

use super::Context;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Batch scripts for Slurm.
    Slurm(slurm::Arguments),
    /// Manifests for `kubectl apply -f -`: the coordinator, what it may do, and, with launcher external, the workers.
    Kubernetes(kubernetes::Arguments),
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    match arguments.what {
        What::Slurm(own) => slurm::run(&own),
        What::Kubernetes(own) => kubernetes::run(&own, context),
    }
}
