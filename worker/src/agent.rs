//! The agent of one device: a loop that owns the session with the coordinator, the leases and the engine.
//!
//! ```text
//!  coordinator ⇄ client ──events──▶ ┌───────┐ ◀──outputs── engine_process ⇄ engine
//!                                   │ agent │ ◀──results── puts of COMMIT objects
//!                      signals ───▶ └───────┘ ◀──time───── the earliest deadline
//! ```
//!
//! Everything arrives in one loop and is handled without waiting, so nothing here can race. The coordinator may
//! be away for [`GIVE_UP`]: tasks go on until their leases end, a training group goes on stepping, reports wait.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use distillery_common::backoff::Backoff;
use distillery_common::group::GroupId;
use distillery_common::ids::Incarnation;
use distillery_common::proto::engine_link::Command;
use distillery_common::proto::wire;
use distillery_common::security::{GroupSecret, Join, JoinError, read_private};
use distillery_common::storage::{self, Created, Store};
use distillery_common::task::{Failure, FailureClass, Lease};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;

use self::client::{Closed, FromCoordinator, Hello, Outgoing, Welcome};
use self::holdings::Holdings;
use self::outbox::{Outbox, Report};
use crate::app::Config;
use crate::engine_process::{Device, Engine, Output, Request};

mod client;
mod holdings;
mod outbox;
mod work;

/// How long a worker looks for its coordinator before it ends.
const GIVE_UP: Duration = Duration::from_secs(30 * 60);
/// How long an engine may take to leave a task or group before it is killed.
const OBEY: Duration = Duration::from_secs(10);
/// How long reports of a leaving worker may wait for their acknowledgement.
const LAST_REPORTS: Duration = Duration::from_secs(5);
/// Engines in a row that end before they are ready, until the worker gives up.
const FAILED_STARTS: u32 = 5;
/// Events that may wait for the loop.
const QUEUE: usize = 256;

/// Where the join string comes from.
#[derive(Clone)]
pub enum JoinSource {
    /// The string itself.
    Text(String),
    /// A private file, read again at each reconnection: a coordinator that starts again may listen elsewhere.
    File(PathBuf),
}

impl JoinSource {
    /// The source, once it has proved to hold a usable join string.
    pub fn checked(self, insecure: bool) -> anyhow::Result<Self> {
        self.read(insecure)?;
        Ok(self)
    }

    fn read(&self, insecure: bool) -> Result<Join, JoinError> {
        match self {
            Self::Text(text) => Join::parse(text, insecure),
            Self::File(path) => Join::parse(&read_private(path)?, insecure),
        }
    }
}

impl std::fmt::Debug for JoinSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(…)"),
            Self::File(path) => write!(f, "File({})", path.display()),
        }
    }
}

/// Whether this process should end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// It should not.
    Stay,
    /// After the work in hand.
    Drain,
    /// At once.
    Now,
}

/// How an agent ended, when nothing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was told to leave, and did.
    Left,
    /// No coordinator was found for [`GIVE_UP`].
    Deserted,
}

/// The stream to the coordinator.
#[derive(Debug)]
enum Session {
    /// None; another is tried at that time.
    Down(Instant),
    /// Being opened, or open and not yet answered.
    Opening(Option<(Outgoing, Instant)>),
    /// Open and welcome; the next beat is due at that time.
    Up(Outgoing, Instant),
}

/// The engine of this device.
#[derive(Debug)]
enum Seat {
    /// No engine; one is started at that time, unless the agent leaves.
    Empty(Instant),
    /// An engine, and whether it has said that it is ready.
    Taken { engine: Engine, ready: bool },
}

/// What the engine must have left by a deadline, or be killed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Ended {
    Task(Lease),
    Group(GroupId),
}

/// How the agent leaves.
#[derive(Debug)]
struct Departure {
    reason: String,
    /// When the engine is killed, and then when the last reports are given up.
    deadline: Instant,
}

/// The result of putting a COMMIT.
struct Put {
    engine: u64,
    request: Request,
    result: Result<Created, storage::Error>,
}

/// One device's agent.
pub struct Agent {
    config: Arc<Config>,
    device: Device,
    name: String,
    session: Session,
    session_id: u64,
    client: Option<tokio::task::JoinHandle<()>>,
    reconnect: Backoff,
    heard: Instant,
    incarnation: Option<Incarnation>,
    /// Known from the first join string on.
    group_secret: GroupSecret,
    run: Option<(String, Store)>,
    beat_every: Duration,
    beats: u64,
    held: Holdings,
    outbox: Outbox,
    seat: Seat,
    engines: u64,
    failed_starts: u32,
    restart: Backoff,
    ending: BTreeMap<Ended, Instant>,
    departure: Option<Departure>,
    events: (
        mpsc::Sender<(u64, client::Event)>,
        mpsc::Receiver<(u64, client::Event)>,
    ),
    outputs: (mpsc::Sender<(u64, Output)>, mpsc::Receiver<(u64, Output)>),
    puts: (mpsc::Sender<Put>, mpsc::Receiver<Put>),
}

impl Agent {
    /// An agent for `device` that has not begun.
    pub fn new(config: Arc<Config>, device: Device) -> Self {
        let start = now();
        Self {
            name: config.agent_name(device),
            config,
            device,
            session: Session::Down(start),
            session_id: 0,
            client: None,
            reconnect: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
            heard: start,
            incarnation: None,
            group_secret: GroupSecret([0; 32]),
            run: None,
            beat_every: Duration::from_secs(2),
            beats: 0,
            held: Holdings::default(),
            outbox: Outbox::default(),
            seat: Seat::Empty(start),
            engines: 0,
            failed_starts: 0,
            restart: Backoff::new(Duration::from_millis(50), Duration::from_secs(10)),
            ending: BTreeMap::new(),
            departure: None,
            events: mpsc::channel(QUEUE),
            outputs: mpsc::channel(QUEUE),
            puts: mpsc::channel(QUEUE),
        }
    }

    /// Works until told to leave, or until the coordinator is gone for good.
    pub async fn run(mut self, mut leave: watch::Receiver<Leave>) -> anyhow::Result<Ending> {
        loop {
            if let Some(ending) = self.turn(now())? {
                self.say_goodbye().await;
                return Ok(ending);
            }
            let next = self.next_deadline();
            tokio::select! {
                Some((id, event)) = self.events.1.recv() => {
                    if id == self.session_id {
                        self.session_event(event)?;
                    }
                }
                Some((id, output)) = self.outputs.1.recv() => self.engine_output(id, output)?,
                Some(put) = self.puts.1.recv() => self.commit_put(put),
                Ok(()) = leave.changed() => {
                    let leave = *leave.borrow_and_update();
                    self.told_to_leave(leave);
                }
                () = sleep_until(next.into()) => {}
            }
        }
    }

    /// Does what time demands; says how the agent has ended, if it has.
    fn turn(&mut self, now: Instant) -> anyhow::Result<Option<Ending>> {
        if let Session::Down(at) = self.session
            && now >= at
        {
            self.open_session()?;
        }
        if let Session::Up(_, at) = self.session
            && now >= at
        {
            self.beat(now);
        }
        for lease in self.held.take_expired(now) {
            tracing::warn!(%lease, "the lease ended; the coordinator has not been heard in time");
            self.end(Ended::Task(lease), now);
        }
        let overdue = self.ending.values().any(|&deadline| now >= deadline);
        let Some(departure) = &self.departure else {
            if overdue {
                self.kill_engine("it did not obey in time");
            }
            if now >= self.heard + GIVE_UP {
                tracing::error!("no coordinator for {} minutes", GIVE_UP.as_secs() / 60);
                return Ok(Some(Ending::Deserted));
            }
            self.fill_seat(now)?;
            return Ok(None);
        };
        let late = now >= departure.deadline;
        if matches!(self.seat, Seat::Taken { .. }) {
            if overdue || late {
                self.kill_engine("its worker leaves");
            }
            return Ok(None);
        }
        let connected = matches!(self.session, Session::Up(..));
        let done = self.outbox.is_empty() || late || !connected;
        Ok(done.then_some(Ending::Left))
    }

    fn next_deadline(&self) -> Instant {
        let session = match &self.session {
            Session::Down(at) | Session::Up(_, at) => Some(*at),
            Session::Opening(_) => None,
        };
        let seat = match &self.seat {
            Seat::Empty(at) if self.run.is_some() && self.departure.is_none() => Some(*at),
            Seat::Empty(_) | Seat::Taken { .. } => None,
        };
        let departure = self.departure.as_ref().map(|departure| departure.deadline);
        [session, seat, departure, self.held.expiry()]
            .into_iter()
            .flatten()
            .chain(self.ending.values().copied())
            .chain([self.heard + GIVE_UP])
            .min()
            .expect("giving up is always a deadline")
    }

    fn told_to_leave(&mut self, leave: Leave) {
        match leave {
            Leave::Stay => {}
            Leave::Drain => self.depart("told to leave by a signal", true),
            Leave::Now => {
                self.depart("told to leave at once", false);
                self.kill_engine("its worker leaves at once");
            }
        }
    }

    /// Begins to leave: the engine finishes what it has in hand, with a checkpoint if it trains.
    fn depart(&mut self, reason: &str, checkpoint: bool) {
        if self.departure.is_some() {
            return;
        }
        tracing::info!(worker = self.name, reason, "leaving");
        self.departure = Some(Departure {
            reason: reason.to_owned(),
            deadline: now() + self.config.drain_grace,
        });
        match &self.seat {
            Seat::Taken {
                engine,
                ready: true,
            } => engine.tell(Command::Drain { checkpoint }),
            Seat::Taken { engine, .. } => engine.kill(),
            Seat::Empty(_) => self.nothing_in_hand(),
        }
    }

    /// The engine of a leaving agent has ended: what it held goes back.
    fn nothing_in_hand(&mut self) {
        let failure = Failure {
            class: FailureClass::Preempted,
            message: format!("worker {} left", self.name),
        };
        self.give_back(&failure);
        if let Some(departure) = &mut self.departure {
            departure.deadline = now() + LAST_REPORTS;
        }
    }

    /// Reports everything held as failed.
    fn give_back(&mut self, failure: &Failure) {
        for lease in self.held.take_all() {
            self.report(Report::TaskFailed {
                lease,
                failure: failure.clone(),
            });
        }
        if let Some(member) = self.held.leave() {
            self.report(Report::GroupFailed {
                group: member.membership.group,
                rank: member.membership.rank,
                failure: failure.clone(),
            });
        }
    }

    fn report(&mut self, report: Report) {
        let seq = self.outbox.push(report.clone());
        if let Session::Up(outgoing, _) = &self.session {
            outgoing.report(seq, &report);
        }
    }

    fn open_session(&mut self) -> anyhow::Result<()> {
        self.session_id += 1;
        self.session = Session::Opening(None);
        let join = match self.config.join.read(self.config.insecure) {
            Ok(join) => join,
            // The file of a coordinator that is starting again may be gone for a moment.
            Err(error) if self.incarnation.is_some() => {
                self.session_closed(&Closed {
                    reason: error.to_string(),
                    fatal: false,
                })?;
                return Ok(());
            }
            Err(error) => return Err(error).context("the join string cannot be used"),
        };
        self.group_secret = GroupSecret::derive(join.token(), join.run_id());
        let hello = Hello {
            name: self.name.clone(),
            host: self.config.host.clone(),
            device: describe(self.device),
            incarnation: self.incarnation,
            leases: self.held.leases().cloned().collect(),
            group: self
                .held
                .member()
                .map(|member| member.membership.group.clone()),
        };
        let events = self.events.0.clone();
        self.client = Some(tokio::spawn(client::run(
            self.session_id,
            join,
            hello,
            now,
            events,
        )));
        Ok(())
    }

    fn session_event(&mut self, event: client::Event) -> anyhow::Result<()> {
        match event {
            client::Event::Opened {
                outgoing,
                hello_sent,
            } => self.session = Session::Opening(Some((outgoing, hello_sent))),
            client::Event::Said(FromCoordinator::Welcome(welcome)) => self.welcomed(welcome)?,
            client::Event::Said(message) => self.coordinator_said(message),
            client::Event::Closed(closed) => self.session_closed(&closed)?,
        }
        Ok(())
    }

    fn session_closed(&mut self, closed: &Closed) -> anyhow::Result<()> {
        anyhow::ensure!(
            !closed.fatal,
            "the coordinator refused this worker: {}",
            closed.reason
        );
        let delay = self.reconnect.next_delay(self.jitter());
        tracing::info!(
            reason = closed.reason,
            ?delay,
            "no stream to the coordinator"
        );
        self.session = Session::Down(now() + delay);
        Ok(())
    }

    fn welcomed(&mut self, welcome: Welcome) -> anyhow::Result<()> {
        let Session::Opening(Some((outgoing, hello_sent))) = &self.session else {
            tracing::error!("a welcome to a worker that did not greet");
            return Ok(());
        };
        let (outgoing, hello_sent) = (outgoing.clone(), *hello_sent);
        let moment = now();
        tracing::info!(term = %welcome.term, incarnation = %welcome.incarnation, "registered");
        self.heard = moment;
        self.reconnect.reset();
        self.beat_every = welcome.beat.max(Duration::from_millis(10));
        if self.incarnation != Some(welcome.incarnation) {
            self.start_over(moment);
        }
        self.incarnation = Some(welcome.incarnation);
        self.held.welcomed(hello_sent, welcome.lease_ttl);
        match &self.run {
            Some((uri, _)) => anyhow::ensure!(
                *uri == welcome.run_uri,
                "the coordinator now serves {}, not {uri}; start this worker again",
                welcome.run_uri
            ),
            None => {
                let store = Store::open(&welcome.run_uri).context("the run cannot be opened")?;
                self.run = Some((welcome.run_uri, store));
            }
        }
        for (seq, report) in self.outbox.waiting() {
            outgoing.report(*seq, report);
        }
        self.session = Session::Up(outgoing, moment);
        Ok(())
    }

    /// Another registration than before: whatever was held is somebody else's now.
    fn start_over(&mut self, now: Instant) {
        for lease in self.held.take_all() {
            self.end(Ended::Task(lease), now);
        }
        self.leave_group("the worker was registered anew", now);
    }

    fn beat(&mut self, now: Instant) {
        let rss_bytes = self.resident_bytes();
        let due = now + self.beat_every.mul_f64(0.9 + 0.2 * self.jitter());
        let Session::Up(outgoing, at) = &mut self.session else {
            return;
        };
        *at = due;
        self.beats += 1;
        let group = self
            .held
            .member()
            .and_then(|member| member.progress.as_ref());
        outgoing.beat(self.beats, &self.held.progress(), group, rss_bytes);
        self.held.beat_sent(self.beats, now);
    }

    /// In `[0, 1)`, different for each worker and each use.
    fn jitter(&self) -> f64 {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let mut hasher = DefaultHasher::new();
        (&self.name, std::process::id(), self.beats, self.session_id).hash(&mut hasher);
        (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Memory of this process and its engine.
    fn resident_bytes(&self) -> u64 {
        let engine = match &self.seat {
            Seat::Taken { engine, .. } => engine.pid(),
            Seat::Empty(_) => None,
        };
        let engine = engine.map_or(0, |pid| resident_bytes(&pid.to_string()));
        resident_bytes("self") + engine
    }

    async fn say_goodbye(&mut self) {
        if let (Session::Up(outgoing, _), Some(departure)) = (&self.session, &self.departure) {
            outgoing.goodbye(&departure.reason);
        }
        // Closing our half lets the coordinator read the goodbye and close its own.
        self.session = Session::Opening(None);
        if let Some(client) = self.client.take() {
            let mut client = client;
            if tokio::time::timeout(Duration::from_secs(1), &mut client)
                .await
                .is_err()
            {
                client.abort();
            }
        }
    }
}

fn describe(device: Device) -> wire::Device {
    let (kind, index) = match device {
        Device::Cpu => ("cpu", 0),
        Device::Cuda(ordinal) => ("cuda", ordinal),
    };
    wire::Device {
        kind: kind.into(),
        index,
        name: String::new(),
        memory_bytes: 0,
    }
}

/// Resident memory of a process as Linux counts it; 0 where it cannot be read.
fn resident_bytes(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[expect(
    clippy::disallowed_methods,
    reason = "the agent is where a worker reads the clock (law L10)"
)]
fn now() -> Instant {
    Instant::now()
}
