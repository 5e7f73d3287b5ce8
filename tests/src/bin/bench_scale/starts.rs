//! A coordinator's start: with nothing behind it (S5), and with many COMMITs in the store.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use distillery_tests::harness::{EngineKind, Run, repository};

use crate::Scratch;
use crate::process::{self, Coordinator};

/// COMMITs that a fleet makes in a second, about, each on the disk.
const COMMITS_PER_SECOND: u64 = 2500;

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
    /// COMMITs in the store, about.
    pub(crate) commits: f64,
    /// Milliseconds to the first grant of the first start after the COMMITs came.
    pub(crate) first_ms: f64,
    /// And of the one after that, which finds what the first one wrote down.
    pub(crate) second_ms: f64,
    /// Memory of the second.
    pub(crate) peak_mib: f64,
}

/// Lets a fleet commit tasks for about as long as `commits` of them take, kills everything, and starts the coordinator
/// twice: what it finds was written by the product itself, its index and its marks too.
pub(crate) fn restart(place: &Path, commits: u64) -> Result<Restart> {
    let coordinator = Coordinator::start(process::run(place, 10 * commits)?)?;
    let seconds = (commits / COMMITS_PER_SECOND).max(1);
    let mut fleet = coordinator.fleet(64, seconds, &["--task-ms", "0", "--files", "0"])?;
    fleet.line()?;
    let counted: serde_json::Value = serde_json::from_str(&fleet.line()?)?;
    let rate = counted["commits_per_second"].as_f64().context("a rate")?;
    let run = coordinator.kill()?;
    drop(fleet);
    let lives = first_grants_in(&run);
    let (first_ms, _, run) = life(run, lives + 1)?;
    let (second_ms, peak_mib, _) = life(run, lives + 2)?;
    Ok(Restart {
        commits: rate * seconds as f64,
        first_ms,
        second_ms,
        peak_mib,
    })
}

/// Lives in a run's log that granted something.
fn first_grants_in(run: &Run) -> usize {
    let log = run.output().with_file_name("coordinator.log");
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .filter(|line| line.contains("first grant"))
        .count()
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
