//! Whole fleets in virtual time, on one thread: the shipping coordinator and the shipping agent, with a network, a store,
//! engines and a clock that do what a seed says.
//!
//! What is real: driver, machine, journal, errands, service, their converters, the store's retries, and the agent. What is
//! simulated: what carries their messages, where their objects lie, when their processes run, and what their engines
//! compute. After every event the invariants of the control plane are checked, from outside where they can be: on the
//! wire, in the store, at the engine. A history replays to the same event, since nothing here reads the real clock, real
//! randomness or an order that is left to chance.
//!
//! Reading order: `history` says what happens, `world` what everybody shares, `network` and `store` what carries it,
//! `coordinator`, `worker`, `engine`, `training` who lives in it, `ledger` and `objects` what must hold. New kinds of
//! records belong in `ledger::Ledger::record`.

mod chance;
mod coordinator;
mod engine;
mod history;
mod ledger;
mod named;
mod network;
mod objects;
mod panics;
mod ring;
mod scene;
mod shrink;
mod store;
mod sweep;
mod training;
mod verdict;
mod worker;
mod world;

use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use tokio::time::sleep_until;

use distillery_worker::agent::Leave;

pub use self::history::{
    Client, Direction, Fault, History, KINDS, Peer, Planned, Strike, Trouble, WORKERS,
};
pub use self::named::named;
pub use self::shrink::shrink;
pub use self::sweep::{Sweep, sweep};
pub use self::world::{Account, Violation};
use self::world::{Host, Role, Spell, World, moment};

/// How long after the last fault a run must have succeeded.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Lives through a history. `verbose` tells every event on standard error.
///
/// # Errors
/// The first promise that was broken.
pub fn simulate(history: &History, verbose: bool) -> Result<Account, Violation> {
    panics::begin();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without IO needs nothing");
    let result = runtime.block_on(live(history, verbose));
    drop(runtime);
    let panicked = panics::end();
    match (result, panicked) {
        (Ok(account), Some(panic)) => Err(Violation {
            invariant: "panic",
            seen: panic,
            event: account.events,
            at: account.elapsed,
        }),
        (result, _) => result,
    }
}

async fn live(history: &History, verbose: bool) -> Result<Account, Violation> {
    let world = World::new(history, verbose);
    let objects = Arc::new(InMemory::new());
    coordinator::start(&world, &objects);
    let workers = if history.small { 2 } else { WORKERS };
    for worker in 0..workers {
        worker::start(&world, &objects, worker);
    }
    let faults = history.faults.clone();
    let own = Arc::clone(&world);
    let objects_of_faults = Arc::clone(&objects);
    tokio::spawn(async move {
        for planned in faults {
            sleep_until(own.origin + Duration::from_millis(planned.at_ms)).await;
            own.happened(format_args!("fault: {:?}", planned.fault));
            strike(&own, &objects_of_faults, planned.fault);
        }
    });
    let limit = history.faults_end() + PATIENCE;
    let ended = tokio::time::timeout(limit, world.ended.notified()).await;
    if let Some(violation) = world.violation() {
        return Err(violation);
    }
    if ended.is_err() {
        world.broken(
            "liveness",
            format!("the run has not succeeded after {limit:?}"),
        );
    }
    verdict::check(&world, &objects);
    if let Some(violation) = world.violation() {
        return Err(violation);
    }
    let mut account = world.state().account.clone();
    account.elapsed = world.now();
    account.remains = verdict::remains(&world, &objects);
    Ok(account)
}

/// Lets a fault happen.
fn strike(world: &Arc<World>, objects: &Arc<InMemory>, fault: Fault) {
    world.state().account.faults[fault.kind()] += 1;
    let agents = |worker| world.living(Some(Host::Worker(worker)), Role::Agent);
    let engines = |worker| world.living(Some(Host::Worker(worker)), Role::Engine);
    let pause = |pids: Vec<_>, ms| pids.into_iter().for_each(|pid| world.pause(pid, ms));
    match fault {
        Fault::KillWorker { worker, silent } => {
            for pid in agents(worker) {
                world.kill(pid, silent);
            }
        }
        Fault::PauseWorker { worker, ms } => pause(agents(worker), ms),
        Fault::PauseHost { worker, ms } => pause([agents(worker), engines(worker)].concat(), ms),
        Fault::HangEngine { worker, ms } => pause(engines(worker), ms),
        Fault::CrashEngine { worker, killed } => {
            for pid in engines(worker) {
                world.blame(pid, killed);
                world.kill(pid, false);
            }
        }
        Fault::DrainWorker { worker, now } => {
            let leave = if now { Leave::Now } else { Leave::Drain };
            if let Some(told) = world.state().leaves.get(&worker) {
                told.send_replace(leave);
            }
        }
        Fault::ClockJump { ms } => {
            let all = world.state().processes.keys().copied().collect();
            pause(all, ms);
        }
        Fault::KillCoordinator { .. }
        | Fault::PauseCoordinator { .. }
        | Fault::Rival
        | Fault::PartitionCoordinator { .. }
        | Fault::PauseRun { .. }
        | Fault::AskToDrain { .. }
        | Fault::Stop { .. } => strike_coordinator(world, objects, fault),
        Fault::CutStream { .. }
        | Fault::Partition { .. }
        | Fault::Delay { .. }
        | Fault::Duplicate { .. }
        | Fault::Store { .. } => strike_between(world, fault),
    }
}

/// Lets a fault happen to the newest coordinator.
fn strike_coordinator(world: &Arc<World>, objects: &Arc<InMemory>, fault: Fault) {
    let newest = world.living(None, Role::Coordinator).pop();
    match (fault, newest) {
        (Fault::Rival, _) => coordinator::start(world, objects),
        (Fault::Stop { now }, _) => coordinator::ask_to_stop(world, now),
        (Fault::PauseRun { ms }, _) => coordinator::pause_run(world, ms),
        (Fault::AskToDrain { worker }, _) => coordinator::ask_to_drain(world, worker),
        (Fault::KillCoordinator { silent }, Some(pid)) => world.kill(pid, silent),
        (Fault::PauseCoordinator { ms }, Some(pid)) => world.pause(pid, ms),
        (
            Fault::PartitionCoordinator {
                peer,
                direction,
                ms,
            },
            Some(pid),
        ) => {
            let host = world.state().processes[&pid].host;
            world.cut(host, peer, direction, ms);
        }
        // There is none to strike.
        (_, _) => {}
    }
}

/// Lets a fault happen to what lies between processes.
fn strike_between(world: &Arc<World>, fault: Fault) {
    let until = |ms| moment() + Duration::from_millis(ms);
    match fault {
        Fault::CutStream {
            worker,
            worker_first,
            lag_ms,
        } => {
            tokio::spawn(network::cut(
                Arc::clone(world),
                worker,
                worker_first,
                lag_ms,
            ));
        }
        Fault::Partition {
            worker,
            peer,
            direction,
            ms,
        } => world.cut(Host::Worker(worker), peer, direction, ms),
        Fault::Delay {
            worker,
            up_to_ms,
            ms,
        } => world.slow_down(worker, up_to_ms, ms),
        Fault::Duplicate { ms } => world.state().duplicates_until = until(ms),
        Fault::Store {
            client,
            trouble,
            one_in,
            ms,
        } => world.state().spells.push(Spell {
            client,
            trouble,
            one_in,
            until: until(ms),
        }),
        _ => unreachable!("the others strike somebody"),
    }
}
