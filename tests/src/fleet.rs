//! A fleet of simulated workers: as many as one process can hold, each with a connection of its own over TCP and TLS,
//! speaking the protocol that real workers speak.
//!
//! They say hello, beat, take grants, put COMMITs create-only into the store, report until they are acknowledged, and
//! join groups. What lies between is left out: engines, rows, training. Must never know what is measured, nor decide
//! what a figure means; it counts and times what it sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::group::GroupId;
use distillery_common::ids::Digest;
use distillery_common::security::Join;
use distillery_common::storage::Store;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

mod commits;
mod latencies;
mod worker;

pub use self::latencies::Latencies;

/// Source addresses that the connections of a fleet are spread over, so that no pair of addresses runs out of ports.
const ADDRESSES: u32 = 8;

/// What a fleet is.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The coordinator.
    pub join: Join,
    /// Number of workers.
    pub workers: u32,
    /// Connections opened in a second.
    pub ramp: u32,
    /// Where COMMITs go.
    pub store: Store,
    /// What trajectories are made from.
    pub dataset: Digest,
    /// How long a task takes; those beyond `Duration::MAX / 2` never end.
    pub task: Duration,
    /// Files that a COMMIT names, each put before it.
    pub files: u32,
}

/// What everybody in a fleet is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Work.
    Work,
    /// Rank 0 of this group gives up; a failure that does not count.
    Fail(GroupId),
    /// Say goodbye and end.
    Leave,
}

/// What a member of a group saw.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Which formation.
    pub group: GroupId,
    /// When.
    pub at: Instant,
    /// What.
    pub what: GroupEvent,
}

/// Moments of a group, as a member sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupEvent {
    /// It was told to join.
    Joined,
    /// It was told where its peers listen: this many.
    Peers(usize),
    /// It was told to leave.
    Aborted,
}

/// What a fleet has counted and timed.
#[derive(Debug, Default)]
pub struct Tally {
    /// Workers that have been welcomed, each once.
    pub welcomed: AtomicU64,
    /// Streams that ended without anybody's wish.
    pub broken: AtomicU64,
    /// Registrations that were taken away: the coordinator took a living worker for dead.
    pub deaths: AtomicU64,
    /// Leases revoked.
    pub revoked: AtomicU64,
    /// Beats sent.
    pub beats: AtomicU64,
    /// Leases granted.
    pub grants: AtomicU64,
    /// COMMITs put that were the first of their task.
    pub won: AtomicU64,
    /// Reports of COMMITs that were acknowledged: the coordinator has read them.
    pub acknowledged: AtomicU64,
    /// From a beat to its acknowledgement.
    pub beat: Latencies,
    /// From having nothing to do, as reported, to a grant.
    pub grant: Latencies,
    /// From the report of a COMMIT to its acknowledgement.
    pub report: Latencies,
}

impl Tally {
    /// Forgets every latency, at the end of a warm-up.
    pub fn forget_latencies(&self) {
        for latencies in [&self.beat, &self.grant, &self.report] {
            latencies.forget();
        }
    }
}

/// Workers at work. Dropping it ends them without a goodbye.
#[derive(Debug)]
pub struct Fleet {
    tally: Arc<Tally>,
    orders: watch::Sender<Order>,
    seen: mpsc::UnboundedReceiver<Seen>,
    workers: JoinSet<anyhow::Result<()>>,
    size: u32,
}

impl Fleet {
    /// Starts connecting; must be called within a runtime.
    pub fn start(spec: Spec) -> anyhow::Result<Self> {
        let endpoint = worker::endpoint(&spec.join)?;
        let size = spec.workers;
        let spec = Arc::new(spec);
        let tally = Arc::new(Tally::default());
        let (orders, told) = watch::channel(Order::Work);
        let (report, seen) = mpsc::unbounded_channel();
        let mut workers = JoinSet::new();
        for number in 0..size {
            let source = std::net::Ipv4Addr::new(127, 0, 0, 1 + (number % ADDRESSES) as u8);
            let worker = worker::Worker::new(
                Arc::clone(&spec),
                Arc::clone(&tally),
                number,
                endpoint.clone().local_address(Some(source.into())),
                report.clone(),
            );
            let told = told.clone();
            let pause = Duration::from_secs(1) * number / spec.ramp.max(1);
            workers.spawn(async move {
                tokio::time::sleep(pause).await;
                worker.run(told).await
            });
        }
        Ok(Self {
            tally,
            orders,
            seen,
            workers,
            size,
        })
    }

    /// What was counted so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Waits until every worker has been welcomed.
    pub async fn welcomed(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = now() + patience;
        loop {
            let welcomed = self.tally.welcomed.load(Ordering::Relaxed);
            if welcomed >= u64::from(self.size) {
                return Ok(());
            }
            if let Some(ended) = self.workers.try_join_next() {
                ended?.context("a simulated worker ended")?;
            }
            anyhow::ensure!(
                now() < deadline,
                "{welcomed} of {} workers were welcomed within {patience:?}",
                self.size
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Tells everybody.
    pub fn order(&self, order: Order) {
        // Workers that have ended hear nothing.
        let _ = self.orders.send(order);
    }

    /// The next thing that a member of a group saw.
    pub async fn seen(&mut self, patience: Duration) -> anyhow::Result<Seen> {
        let seen = tokio::time::timeout(patience, self.seen.recv()).await;
        seen.with_context(|| format!("no member saw anything within {patience:?}"))?
            .context("all workers have ended")
    }

    /// Says goodbye for everybody.
    pub async fn leave(mut self) -> anyhow::Result<()> {
        self.order(Order::Leave);
        while let Some(ended) = self.workers.join_next().await {
            ended??;
        }
        Ok(())
    }
}

/// The moment. A benchmark reads the clock.
#[expect(
    clippy::disallowed_methods,
    reason = "a fleet measures; nothing in a product depends on it"
)]
pub fn now() -> Instant {
    Instant::now()
}
