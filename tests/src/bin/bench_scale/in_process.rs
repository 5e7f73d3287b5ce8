//! A coordinator inside this process: for stores in memory, which processes do not share, and for plans that no recipe
//! makes. Journal, machine, driver and service are the product's own, on a runtime with threads of its own, and
//! workers reach it over TCP and TLS as they would reach a process.

use anyhow::Context as _;
use distillery_common::ids::Digest;
use distillery_common::security::{Join, Token};
use distillery_common::storage::Store;
use distillery_coordinator::driver::{self, Clock, Dataset, Driver, Errands};
use distillery_coordinator::journal::Journal;
use distillery_coordinator::plan::{Kind, Plan, Stage, Tasks, Training, Work};
use distillery_coordinator::scheduler::{Machine, Timings};
use distillery_coordinator::service::{self, Door};
use tokio::runtime::Runtime;

/// As many as a real coordinator has.
const THREADS: usize = 2;
/// Names the run.
const RUN: &str = "bench-scale";

/// A coordinator at work. Dropping it ends it, as a kill would.
pub(crate) struct Coordinator {
    pub(crate) join: Join,
    pub(crate) store: Store,
    pub(crate) dataset: Digest,
    runtime: Option<Runtime>,
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Coordinator {
    /// Starts one that carries out `plan`.
    pub(crate) async fn start(store: Store, plan: Plan) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("coordinator")
            .enable_all()
            .build()?;
        let serving = runtime.spawn(serve(store.clone(), plan));
        let join = serving.await.context("the coordinator did not start")??;
        Ok(Self {
            join,
            store,
            dataset: dataset(),
            runtime: Some(runtime),
        })
    }
}

fn dataset() -> Digest {
    Digest::of(RUN.as_bytes())
}

async fn serve(store: Store, plan: Plan) -> anyhow::Result<Join> {
    let clock = Clock::start();
    let door = Door::bind("127.0.0.1:0").await?;
    let endpoint = door.local_addr()?.to_string();
    let join = Join::new(&endpoint, RUN, Token::generate()?, true)?;
    let journal = Journal::claim(&store, &endpoint, driver::unique_id(), clock.spent()).await?;
    let timings = Timings::default();
    let machine = Machine::new(plan.clone(), timings.clone(), journal.durable().clone());
    let identity = service::Identity {
        run_id: RUN.into(),
        run_uri: store.uri().to_owned(),
        name: RUN.into(),
        term: journal.term().0,
        timings,
    };
    let dataset = Dataset {
        digest: dataset(),
        reused_from: None,
    };
    let errands = Errands::new(store, plan, dataset);
    let (driver, handle) = Driver::new(machine, journal, errands, clock);
    let metrics = driver.metrics();
    tokio::spawn(driver.run());
    tokio::spawn(service::serve(
        door,
        identity,
        join.token().clone(),
        join.authority().cloned(),
        handle,
        metrics,
        std::future::pending(),
    ));
    Ok(join)
}

/// A plan of `count` shards of trajectories.
pub(crate) fn shards(count: u64) -> Plan {
    Plan {
        stages: vec![Stage {
            name: "trajectories".into(),
            kind: Kind::Trajectories,
            after: vec![],
            work: Work::Tasks(Tasks {
                count,
                rows: count,
                bytes: count,
                quarantine_limit: 0,
            }),
        }],
    }
}

/// A plan of one group of `world` members.
pub(crate) fn group(world: u32) -> Plan {
    Plan {
        stages: vec![Stage {
            name: "seg8".into(),
            kind: Kind::Distill,
            after: vec![],
            work: Work::Training(Training {
                steps: 1_000_000,
                checkpoint_every: 1000,
                keep_last: 1,
                global_batch: u64::from(world),
                reproducible: false,
                min_world: world,
                max_world: world,
                parent: None,
            }),
        }],
    }
}
