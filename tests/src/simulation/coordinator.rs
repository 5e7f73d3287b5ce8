//! Coordinators of a simulated fleet: the shipping driver, machine, journal, errands and service, one life after
//! another, and sometimes two at once. Plays the person or the cluster that starts them again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use tokio::task::JoinError;
use tokio::time::sleep;

use distillery_common::ids::{Incarnation, Term};
use distillery_coordinator::driver::{Clock, Dataset, Driver, Errands, Handle, Watch};
use distillery_coordinator::journal::{self, Journal};
use distillery_coordinator::scheduler::{Action, Event, Machine, Outcome};
use distillery_coordinator::service::{Identity, Service};

use super::history::Fault;
use super::store;
use super::world::{Host, Pid, Role, World};

/// Segments between two snapshots: few, so that restarts read some.
const SNAPSHOT_EVERY: u64 = 7;
/// How long a worker without work may take to leave.
const LEAVES: Duration = Duration::from_secs(90);
/// How long after the last fault a run may still give up because of it.
const AFTERMATH: Duration = Duration::from_secs(180);

/// Starts a coordinator, and another one after it until the run has succeeded.
pub(super) fn start(world: &Arc<World>, objects: &Arc<InMemory>) {
    let number = world.state().coordinators.len() as u32;
    let pid = world.new_process(Host::Coordinator(number), Role::Coordinator, None);
    {
        let mut state = world.state();
        state.coordinators.push((number, pid, None));
        state.account.lives += 1;
    }
    let life = live(Arc::clone(world), Arc::clone(objects), number, pid);
    let running = world.run_process(pid, life);
    let (world, objects) = (Arc::clone(world), Arc::clone(objects));
    tokio::spawn(async move {
        let ended = running.await;
        world.kill(pid, false);
        world.remark(format_args!("coordinator {number} ended: {ended:?}"));
        let term = {
            let state = world.state();
            let running = &state.coordinators[number as usize].2;
            running.as_ref().map(|running| running.term)
        };
        if !judge(&world, term, ended) {
            another(&world, &objects).await;
        }
    });
}

/// Asks the coordinator to stop, as a person does.
pub(super) fn ask_to_stop(world: &Arc<World>, now: bool) {
    if let Some(handle) = newest(world) {
        tokio::spawn(async move {
            let _ = handle
                .event(Event::StopRequested {
                    now,
                    returns: false,
                })
                .await;
        });
    }
}

/// Asks the coordinator to let a worker leave, as a person does.
pub(super) fn ask_to_drain(world: &Arc<World>, worker: usize) {
    if let Some(handle) = newest(world) {
        let worker = format!("w{worker}");
        tokio::spawn(async move {
            let _ = handle.event(Event::DrainRequested { worker }).await;
        });
    }
}

/// Pauses the run, and asks until it goes on again.
pub(super) fn pause_run(world: &Arc<World>, ms: u64) {
    let world = Arc::clone(world);
    tokio::spawn(async move {
        if let Some(handle) = newest(&world) {
            let reason = String::from("somebody asked");
            let _ = handle.event(Event::PauseRequested { reason }).await;
        }
        sleep(Duration::from_millis(ms)).await;
        let is_paused = || world.state().ledger.fold.paused.is_some();
        // The request may still be on its way when the pause would end, to a coordinator that stands still.
        let mut asked = 0;
        while !world.state().finished {
            if let Some(handle) = newest(&world).filter(|_| asked < 3 || is_paused()) {
                let _ = handle.event(Event::ResumeRequested).await;
                asked += 1;
            }
            sleep(Duration::from_secs(1)).await;
        }
    });
}

/// The way to the newest coordinator that lives.
fn newest(world: &World) -> Option<Handle> {
    let state = world.state();
    let mut living = state.coordinators.iter().rev();
    let (_, _, running) = living.find(|(_, pid, _)| state.processes[pid].alive)?;
    running.as_ref().map(|running| running.handle.clone())
}

/// Starts another coordinator after a while, unless one lives or is about to.
async fn another(world: &Arc<World>, objects: &Arc<InMemory>) {
    let stream = world.new_stream();
    {
        let lives = !world.living(None, Role::Coordinator).is_empty();
        let mut state = world.state();
        if lives || state.coordinator_due {
            return;
        }
        state.coordinator_due = true;
    }
    sleep(Duration::from_millis(100 + world.below(stream, 5_000))).await;
    world.state().coordinator_due = false;
    start(world, objects);
}

/// Whether the run has succeeded. An end that faults do not explain is a broken promise.
fn judge(
    world: &World,
    term: Option<Term>,
    ended: Result<Result<Outcome, journal::Error>, JoinError>,
) -> bool {
    match ended {
        Ok(Ok(Outcome::Succeeded)) => {
            world.state().finished = true;
            world.ended.notify_one();
            true
        }
        Ok(Ok(Outcome::Failed { message })) => {
            let explained = message.contains("counted")
                || message.contains("in a row ended")
                || message.contains("times; the last time");
            world.require("failed", explained, || message.clone());
            let late = world.now() > world.history.faults_end() + AFTERMATH;
            world.require("liveness", !late, || {
                format!("it fails although nothing goes wrong any more: {message}")
            });
            false
        }
        Ok(Ok(Outcome::Cancelled { reason })) => {
            world.broken("cancelled", reason);
            false
        }
        Ok(Ok(Outcome::Stopped { .. })) => false,
        Ok(Err(error)) => {
            // Only a higher term replaces: its own segment, found again, is no other's.
            let replaced = matches!(error, journal::Error::Fenced { by } if Some(by) > term);
            let explained = error.is_transient() || replaced;
            world.require("I7", explained, || error.to_string());
            false
        }
        Err(error) if error.is_panic() => {
            world.broken("panic", super::panics::take().unwrap_or_default());
            false
        }
        Err(_) => false,
    }
}

async fn live(
    world: Arc<World>,
    objects: Arc<InMemory>,
    number: u32,
    pid: Pid,
) -> Result<Outcome, journal::Error> {
    let store = store::open(&world, &objects, pid, Host::Coordinator(number));
    let clock = Clock::start();
    let writer = uuid::Uuid::from_u128(u128::from(number));
    let endpoint = format!("coordinator-{number}:1");
    let journal = Journal::claim(&store, &endpoint, writer, clock.spent())
        .await?
        .with_snapshots_every(SNAPSHOT_EVERY);
    let term = journal.term();
    let durable = journal.durable().clone();
    let plan = world.scene.plan.clone();
    let machine = Machine::new(plan.clone(), world.timings.clone(), durable);
    let dataset = Dataset {
        digest: world.scene.dataset,
        reused_from: None,
    };
    let errands = Errands::new(store, plan, dataset);
    let (driver, handle) = Driver::new(machine, journal, errands, clock);
    let identity = Identity {
        run_id: "simulation".into(),
        run_uri: "memory://simulation".into(),
        name: "simulation".into(),
        term: term.0,
        timings: world.timings.clone(),
    };
    let service = Service::new(identity, handle.clone());
    let check = Check {
        world: Arc::clone(&world),
        number,
        term,
        leaving: BTreeMap::new(),
        seen: Duration::ZERO,
    };
    if let Some(own) = world.state().coordinators.get_mut(number as usize) {
        own.2 = Some(Running {
            service,
            handle,
            term,
        });
    }
    driver.watched_by(Box::new(check)).run().await
}

/// What others reach of a coordinator.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub(super) service: Service,
    handle: Handle,
    term: Term,
}

/// Looks at the machine after every event.
struct Check {
    world: Arc<World>,
    number: u32,
    term: Term,
    /// How long workers that were told to leave have had nothing to do.
    leaving: BTreeMap<Incarnation, Duration>,
    /// The last event.
    seen: Duration,
}

impl Watch for Check {
    fn stepped(&mut self, now: Duration, event: &Event, machine: &Machine, actions: &[Action]) {
        let number = self.number;
        self.world
            .happened(format_args!("coordinator {number}: {event:?}"));
        if let Err(violation) = machine.check() {
            self.world.broken(violation.invariant, violation.seen);
        }
        if self.world.verbose {
            for action in actions {
                self.world.remark(format_args!("  -> {action:?}"));
            }
        }
        self.check_durable(machine, actions);
        self.check_leaving(now, machine);
    }
}

impl Check {
    /// Whoever was asked to leave leaves, even if the message was lost with its stream.
    fn check_leaving(&mut self, now: Duration, machine: &Machine) {
        let faults = &self.world.history.faults;
        if !faults
            .iter()
            .any(|f| matches!(f.fault, Fault::AskToDrain { .. }))
        {
            return;
        }
        // A coordinator that stands still sees nobody leave.
        let passed = now.saturating_sub(self.seen).min(Duration::from_secs(2));
        self.seen = now;
        let workers = machine.view(now).workers;
        let idle = workers
            .iter()
            .filter(|w| w.state == "draining" && w.doing.is_empty());
        let before = std::mem::take(&mut self.leaving);
        for worker in idle {
            let time = before.get(&worker.incarnation);
            let time = time.map_or(Duration::ZERO, |time| *time + passed);
            self.world.require("drain", time < LEAVES, || {
                format!(
                    "{} was told to leave, has nothing to do and stays",
                    worker.name
                )
            });
            self.leaving.insert(worker.incarnation, time);
        }
    }

    /// I7: what the machine holds for durable is the fold of what is in the store and what it is about to write.
    fn check_durable(&self, machine: &Machine, actions: &[Action]) {
        let (highest, mut fold) = {
            let state = self.world.state();
            (state.ledger.highest, state.ledger.fold.clone())
        };
        if highest != self.term {
            // Replaced: what it thinks no longer matters, and the journal will tell it so.
            return;
        }
        for action in actions {
            if let Action::Journal(record) = action {
                fold.apply(record);
            }
        }
        self.world.require("I7", fold == *machine.durable(), || {
            format!(
                "the journal folds to {fold:?}, the machine holds {:?}",
                machine.durable()
            )
        });
    }
}
