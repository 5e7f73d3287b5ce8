//! Thousands of simulated workers against a real coordinator: `sim-fleet --join @run/join --workers 10000 --seconds 600`.
//!
//! Prints `connected` once everybody has been welcomed, and after the time one line of JSON: what was counted and timed
//! since then. Judges nothing.

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use distillery_common::ids::Digest;
use distillery_common::run::RunRecord;
use distillery_common::security::{Join, read_private};
use distillery_common::storage::{Store, layout};
use distillery_tests::fleet::{Fleet, Spec, Tally, now};
use serde_json::json;

/// What the fleet is and does.
#[derive(Debug, Parser)]
struct Arguments {
    /// The join string, or `@` and a private file that holds it.
    #[arg(long, env = "DISTILLERY_JOIN", hide_env_values = true)]
    join: String,
    /// The run's objects.
    #[arg(long)]
    run: String,
    /// Workers.
    #[arg(long, default_value_t = 100)]
    workers: u32,
    /// Connections opened in a second.
    #[arg(long, default_value_t = 500)]
    ramp: u32,
    /// How long to count after everybody is there.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What a task takes; without it a task never ends.
    #[arg(long)]
    task_ms: Option<u64>,
    /// Files that a COMMIT names.
    #[arg(long, default_value_t = 1)]
    files: u32,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    distillery_common::telemetry::init("warn", Default::default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(arguments.threads)
        .enable_all()
        .build()?;
    runtime.block_on(measure(arguments))?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(arguments: Arguments) -> anyhow::Result<()> {
    let join = match arguments.join.strip_prefix('@') {
        Some(path) => read_private(path.as_ref())?,
        None => arguments.join.clone(),
    };
    let store = Store::open(&arguments.run)?;
    let record = RunRecord::from_bytes(&store.get(&layout::run_record()).await?)?;
    let mut fleet = Fleet::start(Spec {
        join: Join::parse(&join, true)?,
        workers: arguments.workers,
        ramp: arguments.ramp,
        store,
        dataset: record.dataset_digest.unwrap_or(Digest::of(b"")),
        task: arguments
            .task_ms
            .map_or(Duration::MAX, Duration::from_millis),
        files: arguments.files,
    })?;
    let ramp = arguments.workers / arguments.ramp.max(1);
    fleet
        .welcomed(Duration::from_secs(60 + 4 * u64::from(ramp)))
        .await
        .context("the fleet did not come together")?;
    println!("connected");
    fleet.tally().forget_latencies();
    let before = counts(fleet.tally());
    let start = now();
    tokio::time::sleep(Duration::from_secs(arguments.seconds)).await;
    let seconds = (now() - start).as_secs_f64();
    let result = summary(fleet.tally(), before, seconds);
    println!("{result}");
    fleet.leave().await
}

/// Beats, grants, first COMMITs.
fn counts(tally: &Tally) -> [u64; 3] {
    [&tally.beats, &tally.grants, &tally.won].map(|count| count.load(Ordering::Relaxed))
}

fn summary(tally: &Tally, before: [u64; 3], seconds: f64) -> serde_json::Value {
    let after = counts(tally);
    let rate = |at: usize| (after[at] - before[at]) as f64 / seconds;
    let total = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    json!({
        "seconds": seconds,
        "beats_per_second": rate(0),
        "grants_per_second": rate(1),
        "commits_per_second": rate(2),
        "beat_p50_ms": tally.beat.ms(0.5),
        "beat_p99_ms": tally.beat.ms(0.99),
        "beat_max_ms": tally.beat.ms(1.0),
        "grant_p50_ms": tally.grant.ms(0.5),
        "grant_p99_ms": tally.grant.ms(0.99),
        "unanswered_beats": after[0] - before[0] - tally.beat.count().min(after[0] - before[0]),
        "broken_streams": total(&tally.broken),
        "deaths": total(&tally.deaths),
        "revoked": total(&tally.revoked),
    })
}
