//! The thin body round the machine: reads the clock, asks the machine, makes its records durable, carries out.
//!
//! One task owns the machine; everybody else sends it [`Input`]s over one bounded channel. Records are durable
//! before anything that follows them is done. Reading the clock happens here and nowhere else in this program.
//! Must never decide anything itself.

mod commit_index;
mod errands;
mod failures;
mod trouble;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use distillery_common::ids::Term;
use distillery_common::telemetry::peak_memory;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::journal::{self, Journal, Spent};
use crate::metrics::Metrics;
use crate::plan::Plan;
use crate::scheduler::{
    Action, ConnectionId, Decision, Event, FromWorker, Hello, Machine, Outcome, Record, ToWorker,
    View, Weight,
};
use crate::spans::Spans;

pub use commit_index::parse as parse_commit_index;
pub use errands::{Dataset, Errands};
pub use failures::FailureSeen;

/// Inputs that may wait for the machine; senders wait beyond that.
const QUEUE: usize = 1024;
/// Messages that may wait for one worker; a worker that does not read them is cut off.
const OUTBOUND: usize = 1024;
/// Decisions that `status` shows.
const DECISIONS: usize = 50;
/// Tries to append to the journal, a second apart, before the run is given up until somebody resumes it.
const APPENDS: u32 = 60;
/// Between two looks at whether somebody else has taken the run. A coordinator that has nothing to write would never hear
/// of it otherwise, and would keep workers that its successor waits for.
const LOOK: Duration = Duration::from_secs(5);
/// How long streams stay open after the end, so that workers hear of it.
const FAREWELL: Duration = Duration::from_millis(300);

/// What reaches the driver from outside.
#[derive(Debug)]
enum Input {
    Connected {
        connection: ConnectionId,
        hello: Hello,
        outbound: mpsc::Sender<ToWorker>,
    },
    Event(Event),
    /// Somebody else has taken the run.
    Replaced(Term),
    Status(oneshot::Sender<Snapshot>),
    /// Why whoever starts workers waits, or that it does not any more.
    LauncherWaits(Option<String>),
}

/// What people are shown.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Since this coordinator started.
    pub elapsed: Duration,
    /// The run.
    pub view: View,
    /// The last decisions, newest last.
    pub decisions: Vec<String>,
    /// The last failures, newest last.
    pub failures: Vec<FailureSeen>,
}

/// The way to the driver. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    inputs: mpsc::Sender<Input>,
}

/// The driver has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the run has ended")]
pub struct Ended;

impl Handle {
    /// The way to a driver that has ended: whatever is asked of it is answered so at once.
    pub fn to_nobody() -> Self {
        let (inputs, _) = mpsc::channel(1);
        Self { inputs }
    }

    /// A worker introduced itself on a new stream; what it is told comes out of the receiver, whose end is the
    /// stream's end.
    pub async fn connect(
        &self,
        connection: ConnectionId,
        hello: Hello,
    ) -> Result<mpsc::Receiver<ToWorker>, Ended> {
        let (outbound, told) = mpsc::channel(OUTBOUND);
        let input = Input::Connected {
            connection,
            hello,
            outbound,
        };
        self.send(input).await.map(|()| told)
    }

    /// A worker said something.
    pub async fn said(&self, connection: ConnectionId, message: FromWorker) -> Result<(), Ended> {
        self.event(Event::Said {
            connection,
            message,
        })
        .await
    }

    /// A stream ended.
    pub async fn closed(&self, connection: ConnectionId) -> Result<(), Ended> {
        self.event(Event::Closed { connection }).await
    }

    /// Anything else that happened.
    pub async fn event(&self, event: Event) -> Result<(), Ended> {
        self.send(Input::Event(event)).await
    }

    /// Why whoever starts workers waits, for people; none when it does not any more. The run decides nothing by it.
    pub async fn launcher_waits(&self, why: Option<String>) -> Result<(), Ended> {
        self.send(Input::LauncherWaits(why)).await
    }

    /// The run at this moment.
    pub async fn snapshot(&self) -> Result<Snapshot, Ended> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Status(reply)).await?;
        answer.await.map_err(|_| Ended)
    }

    async fn send(&self, input: Input) -> Result<(), Ended> {
        self.inputs.send(input).await.map_err(|_| Ended)
    }
}

/// When this process began, for the figures that count from there.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// Starts counting.
    #[expect(
        clippy::disallowed_methods,
        reason = "the driver is where the clock is read"
    )]
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    /// Since the start.
    #[expect(
        clippy::disallowed_methods,
        reason = "the driver is where the clock is read"
    )]
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// What this process has spent so far.
    pub fn spent(&self) -> Spent {
        Spent {
            elapsed: self.now(),
            peak_bytes: peak_memory(),
        }
    }
}

/// A name for one process that writes a journal; unique because it holds time and chance.
#[expect(
    clippy::disallowed_methods,
    reason = "the driver is where the clock is read"
)]
pub fn unique_id() -> uuid::Uuid {
    uuid::Uuid::now_v7()
}

/// Sees every step of a driver: the time, what happened, the machine after it, and what it wants done. Nothing of that
/// has been done yet.
pub trait Watch: Send {
    /// One step.
    fn stepped(&mut self, now: Duration, event: &Event, machine: &Machine, actions: &[Action]);
}

/// Runs one machine until it finishes.
pub struct Driver {
    machine: Machine,
    journal: Journal,
    errands: Errands,
    clock: Clock,
    inputs: mpsc::Receiver<Input>,
    handle: Handle,
    outbound: BTreeMap<ConnectionId, mpsc::Sender<ToWorker>>,
    decisions: VecDeque<String>,
    failures: failures::Failures,
    launcher_waits: Option<String>,
    metrics: Metrics,
    spans: Option<Spans>,
    granted: bool,
    /// When it was last looked whether somebody else has the run, and the look if it still lasts.
    looked: Duration,
    looking: Option<JoinHandle<()>>,
    watch: Option<Box<dyn Watch>>,
}

impl Driver {
    /// A driver for `machine`, which must have been made from `journal`'s records.
    pub fn new(
        machine: Machine,
        journal: Journal,
        errands: Errands,
        clock: Clock,
    ) -> (Self, Handle) {
        let (sender, inputs) = mpsc::channel(QUEUE);
        let handle = Handle { inputs: sender };
        let driver = Self {
            machine,
            journal,
            errands,
            clock,
            inputs,
            handle: handle.clone(),
            outbound: BTreeMap::new(),
            decisions: VecDeque::new(),
            failures: failures::Failures::default(),
            launcher_waits: None,
            metrics: Metrics::default(),
            spans: None,
            granted: false,
            looked: Duration::ZERO,
            looking: None,
            watch: None,
        };
        (driver, handle)
    }

    /// The same driver with somebody who looks on, such as a check of the machine's invariants.
    pub fn watched_by(mut self, watch: Box<dyn Watch>) -> Self {
        self.watch = Some(watch);
        self
    }

    /// The same driver, telling a collector of spans what it does.
    pub fn told_to(mut self, spans: Option<Spans>) -> Self {
        self.spans = spans;
        self
    }

    /// What it counts; more may be counted beside it.
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// Drives until the run ends.
    ///
    /// # Errors
    /// When the journal can no longer be written: somebody else has the run, or the store is gone. Nothing is
    /// lost then; the same command resumes.
    pub async fn run(mut self) -> Result<Outcome, journal::Error> {
        self.step(Event::Tick).await?;
        loop {
            if let Some(outcome) = self.machine.outcome() {
                let outcome = outcome.clone();
                self.outbound.clear();
                tokio::time::sleep(FAREWELL).await;
                return Ok(outcome);
            }
            let now = self.clock.now();
            if now >= self.looked + LOOK {
                self.looked = now;
                self.look_for_a_successor();
            }
            let tick = self.machine.next_deadline();
            let deadline = tick.map_or(LOOK + self.looked, |tick| tick.min(LOOK + self.looked));
            let wait = deadline.saturating_sub(now);
            match tokio::time::timeout(wait, self.inputs.recv()).await {
                Err(_) if tick == Some(deadline) => self.step(Event::Tick).await?,
                Err(_) => {}
                Ok(Some(input)) => self.take(input).await?,
                Ok(None) => unreachable!("the driver holds a sender of its own"),
            }
        }
    }

    /// Asks the store beside the loop, which must not wait for it. A look that takes long is not joined by another one.
    fn look_for_a_successor(&mut self) {
        if self
            .looking
            .as_ref()
            .is_some_and(|look| !look.is_finished())
        {
            return;
        }
        let lookout = self.journal.lookout();
        let handle = self.handle.clone();
        self.looking = Some(tokio::spawn(async move {
            match lookout.successor().await {
                Ok(None) => {}
                // The driver may have ended meanwhile; then it knows.
                Ok(Some(by)) => drop(handle.send(Input::Replaced(by)).await),
                Err(error) => tracing::warn!(%error, "the journal cannot be looked at"),
            }
        }));
    }

    async fn take(&mut self, input: Input) -> Result<(), journal::Error> {
        match input {
            Input::Connected {
                connection,
                hello,
                outbound,
            } => {
                self.outbound.insert(connection, outbound);
                self.step(Event::Arrived { connection, hello }).await
            }
            Input::Event(event) => self.step(event).await,
            Input::Replaced(by) => Err(journal::Error::Fenced { by }),
            Input::LauncherWaits(why) => {
                self.launcher_waits = why;
                Ok(())
            }
            Input::Status(reply) => {
                self.metrics.asked();
                // Whoever asked may have gone; that is no matter.
                let _ = reply.send(self.snapshot());
                Ok(())
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let elapsed = self.clock.now();
        let mut view = self.machine.view(elapsed);
        let notes = view.note.take().into_iter();
        let notes: Vec<String> = notes.chain(self.launcher_waits.clone()).collect();
        view.note = (!notes.is_empty()).then(|| notes.join("; "));
        Snapshot {
            elapsed,
            view,
            decisions: self.decisions.iter().cloned().collect(),
            failures: self.failures.seen(),
        }
    }

    /// Clock, machine, journal, act: in this order.
    async fn step(&mut self, event: Event) -> Result<(), journal::Error> {
        if let Event::Closed { connection } = &event {
            self.outbound.remove(connection);
        }
        let now = self.clock.now();
        self.metrics.heard(now, &event);
        self.failures.heard(now, &event);
        if let Some(spans) = &mut self.spans {
            spans.heard(&event);
        }
        let seen = self.watch.as_ref().map(|_| event.clone());
        let actions = self.machine.handle(now, event);
        if let (Some(watch), Some(event)) = (&mut self.watch, seen) {
            watch.stepped(now, &event, &self.machine, &actions);
        }
        let mut records = Vec::new();
        for action in actions {
            if let Action::Journal(record) = action {
                records.push(record);
                continue;
            }
            self.append(&mut records).await?;
            self.act(action);
        }
        self.append(&mut records).await?;
        self.metrics.stepped(self.clock.now().saturating_sub(now));
        Ok(())
    }

    async fn append(&mut self, records: &mut Vec<Record>) -> Result<(), journal::Error> {
        if records.is_empty() {
            return Ok(());
        }
        let spent = self.clock.spent();
        let count = records.len();
        let mut tries = 0;
        while !records.is_empty() {
            match self.journal.append(records, spent).await {
                Ok(()) => records.clear(),
                Err(error) if error.is_transient() && tries < APPENDS => {
                    tries += 1;
                    tracing::warn!(%error, tries, "the journal cannot be written; trying again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Err(error) => return Err(error),
            }
        }
        let took = self.clock.now().saturating_sub(spent.elapsed);
        self.metrics.appended(count, took);
        Ok(())
    }

    fn act(&mut self, action: Action) {
        self.metrics.acts(&action);
        if let Some(spans) = &mut self.spans {
            spans.acts(&action);
        }
        match action {
            Action::Journal(_) => unreachable!("records are appended before anything is done"),
            Action::Send(connection, message) => self.tell(connection, message),
            Action::Close(connection) => {
                self.outbound.remove(&connection);
            }
            Action::Inspect {
                stage,
                granted_below,
                after_ms,
            } => self
                .errands
                .inspect(stage, granted_below, after_ms, self.handle.clone()),
            Action::Index {
                stage,
                term,
                part,
                commits,
            } => self.errands.index(stage, term, part, commits),
            Action::VerifyCommit { task, after_ms } => {
                self.errands
                    .verify_commit(task, after_ms, self.handle.clone());
            }
            Action::VerifyCheckpoint {
                checkpoint,
                after_ms,
            } => self
                .errands
                .verify_checkpoint(checkpoint, after_ms, self.handle.clone()),
            Action::Seal {
                stage,
                commits,
                after_ms,
            } => self
                .errands
                .seal(stage, commits, after_ms, self.handle.clone()),
            Action::Prune {
                stage,
                before,
                pinned,
                live,
            } => self.errands.prune(stage, before, pinned, live),
            Action::Explain(decision) => self.explain(&decision),
            Action::Finish(_) => {}
        }
    }

    fn tell(&mut self, connection: ConnectionId, message: ToWorker) {
        let Some(outbound) = self.outbound.get(&connection) else {
            return;
        };
        if matches!(message, ToWorker::Grant(_)) && !self.granted {
            self.granted = true;
            let elapsed_ms = self.clock.now().as_millis() as u64;
            tracing::info!(elapsed_ms, "first grant");
        }
        if outbound.try_send(message).is_err() {
            tracing::warn!(
                ?connection,
                "a worker does not read what it is told; cut off"
            );
            self.outbound.remove(&connection);
        }
    }

    fn explain(&mut self, decision: &Decision) {
        let text = decision.to_string();
        match decision.weight() {
            Weight::Detail => tracing::debug!("{text}"),
            Weight::Ordinary => tracing::info!("{text}"),
            Weight::Trouble => tracing::warn!("{text}"),
        }
        if self.decisions.len() == DECISIONS {
            self.decisions.pop_front();
        }
        self.decisions.push_back(text);
    }

    /// The plan that is carried out.
    pub fn plan(&self) -> &Plan {
        self.errands.plan()
    }
}
