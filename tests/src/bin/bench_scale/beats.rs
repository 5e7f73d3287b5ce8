//! Many workers that beat, and one real coordinator measured from outside (S1).

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process::{self, Coordinator};

/// What many workers cost.
pub(crate) struct Beats {
    pub(crate) cores: f64,
    pub(crate) fleet_cores: f64,
    pub(crate) peak_mib: f64,
    pub(crate) beats_per_second: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    /// Living workers that were taken for dead.
    pub(crate) false_deaths: f64,
    /// Streams that broke; their workers came back.
    pub(crate) broken: f64,
    /// Leases that were revoked.
    pub(crate) revoked: f64,
}

/// `workers` that hold a task each, for `seconds` after the last of them was welcomed.
pub(crate) fn measure(place: &Path, workers: u32, seconds: u64) -> Result<Beats> {
    let coordinator = Coordinator::start(process::run(place, 1_000_000)?)?;
    let mut fleet = coordinator.fleet(workers, seconds, &[])?;
    fleet.line()?;
    let pids = [coordinator.pid, fleet.pid()];
    let before = cpu_seconds(pids)?;
    let counted: Value = serde_json::from_str(&fleet.line()?)?;
    let after = cpu_seconds(pids)?;
    let figure = |name: &str| counted[name].as_f64().with_context(|| format!("no {name}"));
    let length = figure("seconds")?;
    Ok(Beats {
        cores: (after[0] - before[0]) / length,
        fleet_cores: (after[1] - before[1]) / length,
        peak_mib: process::memory_mib(coordinator.pid, "VmHWM")?,
        beats_per_second: figure("beats_per_second")?,
        p50_ms: figure("beat_p50_ms")?,
        p99_ms: figure("beat_p99_ms")?,
        max_ms: figure("beat_max_ms")?,
        false_deaths: figure("deaths")?,
        broken: figure("broken_streams")?,
        revoked: figure("revoked")?,
    })
}

fn cpu_seconds([coordinator, fleet]: [u32; 2]) -> Result<[f64; 2]> {
    Ok([
        process::cpu_seconds(coordinator)?,
        process::cpu_seconds(fleet)?,
    ])
}
