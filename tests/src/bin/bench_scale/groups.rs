//! A training group whose members are all there: given up, formed again, everybody told (S2).

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use distillery_common::group::GroupId;
use distillery_common::storage::Store;
use distillery_tests::fleet::{Fleet, GroupEvent, Order, Spec, now};
use tokio::time::Instant;

use crate::in_process::{Coordinator, group};

/// How long a formation may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Milliseconds of each formation after the first, which waits for connections.
pub(crate) struct Formations {
    /// From the first member that was told to leave the old group, and so was idle, to the last that got its peers.
    pub(crate) told_ms: Vec<f64>,
    /// From the failure's report on.
    pub(crate) failed_ms: Vec<f64>,
}

/// Forms a group of `world` over and over, each time after its rank 0 gave up.
pub(crate) async fn formations(store: Store, world: u32, rounds: usize) -> Result<Formations> {
    let coordinator = Coordinator::start(store, group(world)).await?;
    let mut fleet = Fleet::start(Spec {
        join: coordinator.join.clone(),
        workers: world,
        ramp: 1000,
        store: coordinator.store.clone(),
        dataset: coordinator.dataset,
        task: Duration::MAX,
        files: 0,
    })?;
    fleet.welcomed(PATIENCE).await?;
    let mut formed = told(&mut fleet, world).await?;
    let mut formations = Formations {
        told_ms: Vec::new(),
        failed_ms: Vec::new(),
    };
    for _ in 0..rounds {
        // What follows a formation must not count into the next one.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let failed = now();
        fleet.order(Order::Fail(formed.group));
        formed = told(&mut fleet, world).await?;
        let ms = |from: Instant| (formed.last - from).as_secs_f64() * 1e3;
        formations
            .told_ms
            .push(ms(formed.first_idle.unwrap_or(failed)));
        formations.failed_ms.push(ms(failed));
    }
    Ok(formations)
}

/// A group all of whose members know each other.
struct Told {
    group: GroupId,
    first_idle: Option<Instant>,
    last: Instant,
}

async fn told(fleet: &mut Fleet, world: u32) -> Result<Told> {
    let mut first_idle: Option<Instant> = None;
    let mut counts: BTreeMap<GroupId, u32> = BTreeMap::new();
    loop {
        let seen = fleet.seen(PATIENCE).await?;
        match seen.what {
            GroupEvent::Joined => {}
            GroupEvent::Aborted => {
                first_idle = Some(first_idle.map_or(seen.at, |first| first.min(seen.at)));
            }
            GroupEvent::Peers(addresses) => {
                ensure!(addresses == world as usize, "{addresses} peers of {world}");
                let count = counts.entry(seen.group.clone()).or_default();
                *count += 1;
                if *count == world {
                    let (group, last) = (seen.group, seen.at);
                    return Ok(Told {
                        group,
                        first_idle,
                        last,
                    });
                }
            }
        }
    }
}
