//! Who works for this coordinator: what the recipe says of it, made into workers.

use std::path::PathBuf;

use anyhow::Context as _;

use distillery_common::recipe::{Launcher, Recipe};
use distillery_common::security::Join;

use super::{Access, Config};
use crate::console;
use crate::driver::{Clock, Handle};
use crate::launch::{Launched, local, slurm};

/// Starts workers, or says how others start them.
pub(super) async fn launch(
    recipe: &Recipe,
    config: &Config,
    access: &Access,
    join: &Join,
    handle: Handle,
    clock: Clock,
) -> anyhow::Result<Option<Launched>> {
    let file = access.write_join(join)?;
    match &recipe.cluster.launcher {
        Launcher::External => {
            console::note(format_args!(
                "start workers with: worker join --coordinator @{}",
                file.display()
            ));
            Ok(None)
        }
        Launcher::Local => {
            let workers = local::Workers {
                worker: config.worker.clone(),
                engine: Some(config.engine.clone()),
                count: recipe.cluster.max_workers,
                fewest: recipe.cluster.min_workers,
                threads: recipe.compute.threads,
                join: join.reveal(),
                token: access.token().clone(),
                logs: access.logs(),
                insecure: config.insecure && join.authority().is_none(),
                format: config.log_format,
            };
            local::start(workers, handle)
                .context("the folder for the logs of workers cannot be made")
                .map(|workers| Some(Launched::Local(workers)))
        }
        Launcher::Slurm(section) => {
            let program =
                |own: &Option<PathBuf>, known: &PathBuf| own.as_ref().unwrap_or(known).clone();
            let workers = slurm::Workers {
                worker: slurm::Worker {
                    name: slurm::name_of(join.run_id()),
                    worker: program(&section.worker, &config.worker),
                    engine: program(&section.engine, &config.engine),
                    join: file,
                    logs: access.logs().join("slurm"),
                    log: None,
                    count: None,
                    threads: recipe.compute.threads,
                },
                slurm: (**section).clone(),
                token: access.token().clone(),
                most: recipe.cluster.max_workers,
                fewest: recipe.cluster.min_workers,
            };
            slurm::start(workers, handle).map(|workers| Some(Launched::Slurm(workers)))
        }
        Launcher::Kubernetes => launch_pods(recipe, config, join, handle, clock)
            .await
            .map(Some),
    }
}

#[cfg(feature = "kubernetes")]
async fn launch_pods(
    recipe: &Recipe,
    config: &Config,
    join: &Join,
    handle: Handle,
    clock: Clock,
) -> anyhow::Result<Launched> {
    use crate::launch::kubernetes;
    let settings = recipe.cluster.kubernetes.clone();
    let workers = kubernetes::Workers {
        kubernetes: settings.context("cluster.kubernetes is missing")?,
        run_id: join.run_id().to_owned(),
        count: recipe.cluster.max_workers,
        join: distillery_common::recipe::Secret::new(join.reveal()),
        insecure: config.insecure && join.authority().is_none(),
    };
    let launched = kubernetes::start(workers, handle, clock).await?;
    Ok(Launched::Kubernetes(launched))
}

#[cfg(not(feature = "kubernetes"))]
async fn launch_pods(
    _: &Recipe,
    _: &Config,
    _: &Join,
    _: Handle,
    _: Clock,
) -> anyhow::Result<Launched> {
    anyhow::bail!(
        "cluster.launcher is kubernetes, and this coordinator was built without it; build it with `--features kubernetes`"
    )
}
