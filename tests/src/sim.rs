//! The stand-in for the engine: does what an engine does to the control plane, with small numbers for tensors.
//!
//! It writes real trajectories, real checkpoints and real COMMITs, trains in a group over TCP, and every bit it
//! makes is a pure function of recipe and seed. So whole runs go through the real coordinator and real workers
//! in seconds, and two of them can be compared. It knows no network and learns nothing.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context as _;
use distillery_common::group::GroupId;
use distillery_common::proto::engine_link::{Command, Event, Link, Setup};
use distillery_common::recipe::Recipe;
use distillery_common::run::{RunRecord, Software};
use distillery_common::storage::{Store, layout};
use distillery_common::task::{Failure, FailureClass, Lease};

mod tasks;
mod training;
mod wires;

/// How slow the stand-in is, so that a kill meets it at work.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// Milliseconds that a task takes at least.
    pub task_ms: u64,
    /// Milliseconds that a training step takes at least.
    pub step_ms: u64,
}

/// What computes, as the stand-in says it: nothing that depends on the host.
pub fn software() -> Software {
    Software {
        distillery: env!("CARGO_PKG_VERSION").into(),
        libtorch: "none".into(),
        cpu_capability: "none".into(),
    }
}

/// Works for the worker behind `socket` until told to leave. When the socket closes the process ends by itself.
pub fn serve(socket: &Path, device: &str, advertise: IpAddr, pace: Pace) -> anyhow::Result<()> {
    let (link, commands) = Link::connect(socket)?;
    let mut inbox = Inbox::new(commands);
    let Some(Command::Setup(setup)) = inbox.next() else {
        anyhow::bail!("the worker's first message is not a setup");
    };
    let mut bench = Bench::open(link, inbox, setup, advertise, pace)?;
    bench.link.send(Event::Ready {
        device: device.to_owned(),
        device_name: "stand-in".into(),
        libtorch_version: "none".into(),
    });
    while let Some(command) = bench.inbox.next() {
        match command {
            Command::Setup(_) => anyhow::bail!("a second setup"),
            Command::Start(lease) => bench.work(&lease),
            Command::Join(membership) => {
                if training::train(&mut bench, &membership) == training::Ending::Drained {
                    return Ok(());
                }
            }
            Command::Drain { .. } => return Ok(()),
            // Too late, or too early: the answer is the same, for the worker waits for it.
            Command::Cancel(lease) => bench.link.send(Event::TaskFailed {
                lease,
                failure: superseded(),
            }),
            Command::Abort { group, .. } => bench.link.send(Event::GroupFailed {
                group,
                rank: 0,
                failure: superseded(),
            }),
            Command::Peers { .. } => {}
        }
    }
    Ok(())
}

/// What every task needs.
struct Bench {
    link: Link,
    inbox: Inbox,
    setup: Setup,
    store: Store,
    record: RunRecord,
    recipe: Recipe,
    runtime: tokio::runtime::Runtime,
    advertise: IpAddr,
    pace: Pace,
    /// The stage that was trained last, and its state.
    kept: Option<(String, training::Trained)>,
}

impl Bench {
    fn open(
        link: Link,
        inbox: Inbox,
        setup: Setup,
        advertise: IpAddr,
        pace: Pace,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let store = Store::open(&setup.run_uri)?;
        let record = runtime.block_on(store.get(&layout::run_record()))?;
        let record = RunRecord::from_bytes(&record)?;
        let recipe = Recipe::from_stored(&record.recipe)
            .map_err(|faults| anyhow::anyhow!("{}", faults.render(false)))
            .context("the recipe in run.json")?;
        Ok(Self {
            link,
            inbox,
            setup,
            store,
            record,
            recipe,
            runtime,
            advertise,
            pace,
            kept: None,
        })
    }

    fn work(&mut self, lease: &Lease) {
        tracing::info!(%lease, "task started");
        match tasks::perform(self, lease) {
            Ok(Some(request)) => {
                // The worker reports what becomes of it.
                self.link.commit(request);
            }
            Ok(None) => self.link.send(Event::TaskFailed {
                lease: lease.clone(),
                failure: superseded(),
            }),
            Err(failure) => self.link.send(Event::TaskFailed {
                lease: lease.clone(),
                failure,
            }),
        }
    }
}

fn superseded() -> Failure {
    fault(FailureClass::Superseded, "told to stop")
}

fn fault(class: FailureClass, message: impl ToString) -> Failure {
    Failure {
        class,
        message: message.to_string(),
    }
}

/// Commands in order, with a glance at what interrupts the work in hand.
struct Inbox {
    commands: Receiver<Command>,
    pending: VecDeque<Command>,
}

impl Inbox {
    fn new(commands: Receiver<Command>) -> Self {
        Self {
            commands,
            pending: VecDeque::new(),
        }
    }

    fn next(&mut self) -> Option<Command> {
        self.pending
            .pop_front()
            .or_else(|| self.commands.recv().ok())
    }

    /// Waits up to `patience` for something to come.
    fn listen(&mut self, patience: Duration) {
        match self.commands.recv_timeout(patience) {
            Ok(command) => self.pending.push_back(command),
            Err(RecvTimeoutError::Timeout) => {}
            // The process is about to end; do not spin until then.
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(patience),
        }
        self.pending.extend(self.commands.try_iter());
    }

    fn take(&mut self, wanted: impl Fn(&Command) -> bool) -> Option<Command> {
        self.pending.extend(self.commands.try_iter());
        let at = self.pending.iter().position(wanted)?;
        self.pending.remove(at)
    }

    fn cancelled(&mut self, lease: &Lease) -> bool {
        self.take(|command| matches!(command, Command::Cancel(other) if other == lease))
            .is_some()
    }

    fn aborted(&mut self, group: &GroupId) -> bool {
        self.take(
            |command| matches!(command, Command::Abort { group: other, .. } if other == group),
        )
        .is_some()
    }

    fn peers(&mut self, group: &GroupId) -> Option<Vec<String>> {
        let ours = |command: &Command| matches!(command, Command::Peers { group: other, .. } if other == group);
        match self.take(ours)? {
            Command::Peers { addresses, .. } => Some(addresses),
            _ => None,
        }
    }

    /// Whether to leave, and if so, whether with a checkpoint. The command stays.
    fn draining(&mut self) -> Option<bool> {
        self.pending.extend(self.commands.try_iter());
        self.pending.iter().find_map(|command| match command {
            Command::Drain { checkpoint } => Some(*checkpoint),
            Command::Setup(_)
            | Command::Start(_)
            | Command::Cancel(_)
            | Command::Join(_)
            | Command::Peers { .. }
            | Command::Abort { .. } => None,
        })
    }
}
