//! Tasks through the coordinator: how many a second, and how long an idle worker waits (S3, S4).

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use distillery_common::storage::Store;
use distillery_tests::fleet::{Fleet, Spec, now};

use crate::in_process::{Coordinator, shards};

/// Connections opened in a second.
const RAMP: u32 = 1000;
/// Left out at the start of a measurement.
const WARM_UP: Duration = Duration::from_secs(2);

/// What a fleet that works without pause got done.
pub(crate) struct Throughput {
    /// Tasks granted, committed, reported, verified and acknowledged in a second.
    pub(crate) tasks_per_second: f64,
    /// From the report of a COMMIT to its acknowledgement.
    pub(crate) report_p50_ms: f64,
}

/// Tasks a second with `workers` that have one in flight each, and take no time for a task but for its COMMIT.
pub(crate) async fn throughput(
    store: Store,
    workers: u32,
    files: u32,
    length: Duration,
) -> Result<Throughput> {
    let coordinator = Coordinator::start(store, shards(10_000_000)).await?;
    let mut fleet = fleet(&coordinator, workers, files, Duration::ZERO)?;
    fleet.welcomed(Duration::from_secs(60)).await?;
    tokio::time::sleep(WARM_UP).await;
    let tally = fleet.tally();
    tally.forget_latencies();
    let (before, start) = (tally.acknowledged.load(Ordering::Relaxed), now());
    tokio::time::sleep(length).await;
    let after = tally.acknowledged.load(Ordering::Relaxed);
    let seconds = (now() - start).as_secs_f64();
    Ok(Throughput {
        tasks_per_second: (after - before) as f64 / seconds,
        report_p50_ms: tally.report.ms(0.5),
    })
}

/// How long idle workers wait for a grant.
pub(crate) struct Waiting {
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) grants_per_second: f64,
}

/// From the report of a COMMIT to the next grant, with 1,000 workers whose tasks take about `task` and a million tasks.
pub(crate) async fn waiting(task: Duration, length: Duration) -> Result<Waiting> {
    let coordinator = Coordinator::start(Store::in_memory(), shards(1_000_000)).await?;
    let mut fleet = fleet(&coordinator, 1000, 1, task)?;
    fleet.welcomed(Duration::from_secs(60)).await?;
    tokio::time::sleep(WARM_UP.max(task)).await;
    let tally = fleet.tally();
    tally.forget_latencies();
    tokio::time::sleep(length).await;
    Ok(Waiting {
        p50_ms: tally.grant.ms(0.5),
        p99_ms: tally.grant.ms(0.99),
        grants_per_second: tally.grant.count() as f64 / length.as_secs_f64(),
    })
}

fn fleet(coordinator: &Coordinator, workers: u32, files: u32, task: Duration) -> Result<Fleet> {
    Fleet::start(Spec {
        join: coordinator.join.clone(),
        workers,
        ramp: RAMP,
        store: coordinator.store.clone(),
        dataset: coordinator.dataset,
        task,
        files,
    })
}
