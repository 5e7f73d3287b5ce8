//! A coordinator's start: with nothing behind it (S5), and with many COMMITs in the store.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use distillery_common::ids::{Incarnation, Term};
use distillery_common::run::RunRecord;
use distillery_common::storage::{Store, layout};
use distillery_common::task::{Lease, TaskId};
use distillery_tests::fleet;
use distillery_tests::harness::{EngineKind, Run, repository};

use crate::Scratch;
use crate::process::{self, Coordinator};

/// Milliseconds from the start of `coordinator run` on the quickstart to its first grant: with local workers of its
/// own, and an empty cache, then `rounds` times with what the first one remembered.
pub(crate) fn first_grants(scratch: &Scratch, rounds: usize) -> Result<Vec<f64>> {
    let cache = scratch.folder("cache")?;
    let recipe = repository().join("configs/quickstart.yaml");
    (0..=rounds)
        .map(|round| {
            let place = scratch.folder(&format!("start-{round}"))?;
            let mut run = Run::of_file(&place, &recipe, EngineKind::Sim)?
                .with("RUST_LOG", "info")
                .with("XDG_CACHE_HOME", cache.display());
            run.start()?;
            process::first_grant_ms(&run, &place.join("coordinator.log"), 1)
        })
        .collect()
}

/// MiB of a coordinator whose workers have not come yet.
pub(crate) fn idle_mib(place: &Path) -> Result<f64> {
    let coordinator = Coordinator::start(process::run(place, 1000)?)?;
    std::thread::sleep(Duration::from_secs(1));
    process::memory_mib(coordinator.pid, "VmRSS")
}

/// MiB of the coordinator's program.
pub(crate) fn binary_mib() -> Result<f64> {
    let path = distillery_tests::harness::programs()?.join("coordinator");
    Ok(std::fs::metadata(path)?.len() as f64 / f64::from(1 << 20))
}

/// What it takes to start again where much is done.
pub(crate) struct Restart {
    /// Milliseconds to the first grant of the first start after the COMMITs came.
    pub(crate) first_ms: f64,
    /// And of the one after that, which finds what the first one wrote down.
    pub(crate) second_ms: f64,
    /// Memory of the second.
    pub(crate) peak_mib: f64,
}

/// Starts a coordinator whose store holds `commits` of them, twice.
pub(crate) async fn restart(place: &Path, commits: u64) -> Result<Restart> {
    let coordinator = Coordinator::start(process::run(place, commits + 100_000)?)?;
    let store = Store::open(&coordinator.run.output().display().to_string())?;
    let run = coordinator.kill()?;
    lay(&store, commits).await?;
    let (first_ms, _, run) = life(run, 1)?;
    let (second_ms, peak_mib, _) = life(run, 2)?;
    Ok(Restart {
        first_ms,
        second_ms,
        peak_mib,
    })
}

/// One life up to its first grant, to a single worker, and a while longer so that what it found can be written down.
fn life(run: Run, lives: usize) -> Result<(f64, f64, Run)> {
    let coordinator = Coordinator::start(run)?;
    let _fleet = coordinator.fleet(1, 3600, &[])?;
    let grant = process::first_grant_ms(&coordinator.run, &coordinator.log(), lives)?;
    std::thread::sleep(Duration::from_secs(3));
    let peak = process::memory_mib(coordinator.pid, "VmHWM")?;
    Ok((grant, peak, coordinator.kill()?))
}

/// Puts COMMITs as workers would have put them, each with one file, but without waiting for the disk.
async fn lay(store: &Store, commits: u64) -> Result<()> {
    let record = RunRecord::from_bytes(&store.get(&layout::run_record()).await?)?;
    let dataset = record.dataset_digest.context("the run has a dataset")?;
    for index in 0..commits {
        let lease = Lease {
            term: Term(1),
            task: TaskId {
                stage: "trajectories".into(),
                index,
            },
            attempt: 1,
            incarnation: Incarnation::new(Term(1), 1),
        };
        let (key, commit, mut objects) = fleet::commit(&lease, dataset, 1);
        objects.push((key, commit.to_bytes()));
        for (key, body) in objects {
            let path = store.local_file(&key).context("the store is a folder")?;
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::write(path, body)?;
        }
    }
    Ok(())
}
