//! `make bench-scale`: what one coordinator can carry (S1 to S5), with simulated workers that speak the real protocol
//! over TCP and TLS, and with peers beside it.
//!
//! What needs a store in memory, which processes do not share, or a plan that no recipe makes, runs journal, machine,
//! driver and service in this process; the rest runs the real coordinator as a process of its own. Coordinator and
//! fleet share the machine's cores, so that every figure holds for half a machine. The last lines are the figures,
//! each with its goal, MISSED where that is not reached, and its floor; the exit code is 1 when one misses its floor.

mod beats;
mod dispatch;
mod groups;
mod in_process;
mod peers;
mod process;
mod starts;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use distillery_common::storage::Store;
use distillery_tests::figure::{Figure, at_least, at_most};

use self::peers::Peers;

/// What is measured, and for how long.
#[derive(Debug, Parser)]
struct Arguments {
    /// About a minute, with fewer workers and tasks.
    #[arg(long)]
    short: bool,
    /// Only these: beats, groups, dispatch, waiting, starts, restart.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Workers that beat.
    #[arg(long)]
    workers: Option<u32>,
    /// Seconds for which they do.
    #[arg(long)]
    seconds: Option<u64>,
    /// COMMITs that a coordinator finds when it starts again.
    #[arg(long)]
    commits: Option<u64>,
    /// Measure Ray, Dask and torchft as well, installed into this folder if they are not there.
    #[arg(long)]
    peers: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // The coordinator within this process warns of every group that is given up, which is what is measured here.
    distillery_common::telemetry::init("error", Default::default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (figures, _scratch) = runtime.block_on(bench(&arguments))?;
    for figure in &figures {
        println!("{}", figure.text());
    }
    Ok(if figures.iter().all(Figure::holds) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn bench(arguments: &Arguments) -> Result<(Vec<Figure>, Scratch)> {
    let wanted =
        |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    let short = arguments.short;
    let peers = match &arguments.peers {
        Some(folder) => Peers::measure(folder, short)?,
        None => Peers::none(),
    };
    let scratch = Scratch::new()?;
    let mut figures = Vec::new();
    if wanted("beats") {
        figures.extend(bench_beats(arguments, &scratch, &peers)?);
    }
    if wanted("groups") {
        figures.extend(bench_groups(if short { 5 } else { 15 }, &scratch, &peers).await?);
    }
    let length = Duration::from_secs(if short { 4 } else { 15 });
    if wanted("dispatch") {
        figures.extend(bench_dispatch(short, length, &scratch, &peers).await?);
    }
    if wanted("waiting") {
        figures.extend(bench_waiting(length, &peers).await?);
    }
    if wanted("starts") {
        figures.extend(bench_starts(if short { 3 } else { 9 }, &scratch)?);
    }
    if wanted("restart") {
        let commits = arguments
            .commits
            .unwrap_or(if short { 5_000 } else { 100_000 });
        bench_restart(commits, &scratch)?;
    }
    Ok((figures, scratch))
}

/// S1.
fn bench_beats(arguments: &Arguments, scratch: &Scratch, peers: &Peers) -> Result<Vec<Figure>> {
    let (workers, seconds) = if arguments.short {
        (2000, 10)
    } else {
        (10_000, 600)
    };
    let workers = arguments.workers.unwrap_or(workers);
    let beats = beats::measure(
        &scratch.folder("beats")?,
        workers,
        arguments.seconds.unwrap_or(seconds),
    )?;
    println!(
        "{workers} workers, {:.0} beats/s: p50 {:.2} ms, p99 {:.2} ms, max {:.0} ms; the fleet took {:.2} cores",
        beats.beats_per_second, beats.p50_ms, beats.p99_ms, beats.max_ms, beats.fleet_cores
    );
    println!(
        "{} streams broke, {} leases were revoked",
        beats.broken, beats.revoked
    );
    // At the rate of a whole core; what a beat costs hardly depends on their number.
    let capacity = beats.beats_per_second / beats.cores.max(0.01);
    peers.compare(
        "beats/s, ours for one core",
        capacity,
        "torchft",
        "beats_per_second",
        true,
    );
    Ok(vec![
        at_most("S1 coordinator, cores", beats.cores, 1.0, 1.0),
        at_most("S1 coordinator, peak MiB", beats.peak_mib, 1536.0, 1536.0),
        at_most("S1 false deaths", beats.false_deaths, 0.0, 0.0),
        at_most(
            "S1 beat to acknowledgement p99, ms",
            beats.p99_ms,
            100.0,
            100.0,
        ),
    ])
}

/// S2.
async fn bench_groups(rounds: usize, scratch: &Scratch, peers: &Peers) -> Result<Vec<Figure>> {
    let mut medians = Vec::new();
    for world in [256, 1024] {
        let store = scratch.store(&format!("group-{world}"))?;
        let formed = groups::formations(store, world, rounds).await?;
        let (told, failed) = (median(formed.told_ms), median(formed.failed_ms));
        println!(
            "group of {world}, all told: {told:.1} ms from the first idle, {failed:.1} ms from the failure"
        );
        medians.push(told);
    }
    peers.compare(
        "all told, 256 ranks, ms",
        medians[0],
        "torchft",
        "quorum_256_ms",
        false,
    );
    Ok(vec![
        at_most("S2 256 ranks told, ms", medians[0], 60.0, 120.0),
        at_most("S2 1,024 ranks told, ms", medians[1], 250.0, 500.0),
    ])
}

/// S3.
async fn bench_dispatch(
    short: bool,
    length: Duration,
    scratch: &Scratch,
    peers: &Peers,
) -> Result<Vec<Figure>> {
    let mut rates = Vec::new();
    let all = [
        ("memory, a file each", 64, 1),
        ("fsynced", 64, 0),
        ("memory", 64, 0),
        ("memory, a file each", 1000, 1),
        ("fsynced", 8, 0),
        ("fsynced, a file each", 64, 1),
    ];
    let wanted = if short { 2 } else { all.len() };
    for (name, workers, files) in all.into_iter().take(wanted) {
        let store = if name.starts_with("memory") {
            Store::in_memory()
        } else {
            scratch.store(&format!("dispatch-{workers}-{files}"))?
        };
        let done = dispatch::throughput(store, workers, files, length).await?;
        println!(
            "{name}, {workers} in flight: {:.0} tasks/s, report to acknowledgement p50 {:.2} ms",
            done.tasks_per_second, done.report_p50_ms
        );
        rates.push(done.tasks_per_second);
    }
    peers.compare("tasks/s", rates[0], "ray", "tasks_per_second", true);
    peers.compare("tasks/s", rates[0], "dask", "tasks_per_second", true);
    Ok(vec![
        at_least("S3 tasks/s in memory", rates[0], 10_000.0, 5_000.0),
        at_least(
            "S3 tasks/s with fsynced commits",
            rates[1],
            2_000.0,
            1_000.0,
        ),
    ])
}

/// S4.
async fn bench_waiting(length: Duration, peers: &Peers) -> Result<Vec<Figure>> {
    let waiting = dispatch::waiting(Duration::from_secs(1), length).await?;
    println!(
        "1,000 workers, 1,000,000 tasks: {:.0} grants/s",
        waiting.grants_per_second
    );
    for (peer, name) in [("ray", "round_trip_p50_ms"), ("dask", "round_trip_p50_ms")] {
        peers.compare(
            "a task to an idle worker, p50 ms",
            waiting.p50_ms,
            peer,
            name,
            false,
        );
    }
    Ok(vec![
        at_most("S4 idle to grant p50, ms", waiting.p50_ms, 1.0, 2.0),
        at_most("S4 idle to grant p99, ms", waiting.p99_ms, 10.0, 20.0),
    ])
}

/// S5.
fn bench_starts(rounds: usize, scratch: &Scratch) -> Result<Vec<Figure>> {
    let mut grants = starts::first_grants(scratch, rounds)?;
    let cold = grants.remove(0);
    println!("first grant with an empty cache: {cold:.0} ms");
    Ok(vec![
        at_most("S5 first grant, ms", median(grants), 300.0, 600.0),
        at_most(
            "S5 coordinator, MiB on disk",
            starts::binary_mib()?,
            25.0,
            25.0,
        ),
        at_most(
            "S5 coordinator, idle MiB",
            starts::idle_mib(&scratch.folder("idle")?)?,
            30.0,
            30.0,
        ),
    ])
}

/// No goal speaks of it, but control-plane.md's two seconds (U3) do.
fn bench_restart(commits: u64, scratch: &Scratch) -> Result<()> {
    let restart = starts::restart(&scratch.folder("restart")?, commits)?;
    println!(
        "restart with {:.0} COMMITs: first grant after {:.0} ms, and {:.0} ms the time after; peak {:.0} MiB",
        restart.commits, restart.first_ms, restart.second_ms, restart.peak_mib
    );
    Ok(())
}

/// Folders that stay until the end. To delete many small files takes minutes on some disks, and would be felt by what is
/// measured next: a process of its own does it, for which nobody waits.
pub(crate) struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be deleted lies among other temporary files.
        let _ = Command::new("rm").arg("-rf").arg(&self.0).spawn();
    }
}

impl Scratch {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir().context("a temporary folder")?;
        Ok(Self(folder.keep()))
    }

    /// A new folder.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    }

    /// A store in a new folder.
    fn store(&self, name: &str) -> Result<Store> {
        let folder = self.folder(name)?;
        Ok(Store::open(&folder.display().to_string())?)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
