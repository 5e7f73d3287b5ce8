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
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use distillery_common::backoff::Backoff;
use distillery_common::group::GroupId;
use distillery_common::ids::{Incarnation, Term};
use distillery_common::proto::engine_link::Command;
use distillery_common::security::{GroupSecret, Join, JoinError, read_private};
use distillery_common::storage::{self, Created, Store};
use distillery_common::task::{Failure, FailureClass, Lease};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use self::client::Outgoing;
use self::holdings::Holdings;
use self::outbox::{Outbox, Report};
use crate::app::Config;
use crate::engine_process::{Device, Engine, Output, Request};

mod alive;
mod client;
mod holdings;
mod outbox;
mod outside;
mod session;
mod work;

pub use self::alive::{Alive, Breath, age};
pub use self::client::{Closed, Heard, Said};
pub use self::outside::{Host, Outside};

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
    /// It was told to leave by a coordinator that is started again by itself.
    Interrupted,
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

/// Both ends of a queue into the loop.
type Ends<T> = (mpsc::Sender<T>, mpsc::Receiver<T>);

/// One device's agent.
pub struct Agent {
    config: Arc<Config>,
    outside: Arc<dyn Outside>,
    device: Device,
    name: String,
    session: Session,
    session_id: u64,
    client: Option<tokio::task::JoinHandle<()>>,
    reconnect: Backoff,
    heard: Instant,
    /// When it was last said that there is no stream to the coordinator.
    missed: Option<Instant>,
    incarnation: Option<Incarnation>,
    /// The highest that a coordinator has shown: one with a lower term has been replaced.
    term: Term,
    /// Known from the first join string on.
    group_secret: GroupSecret,
    /// This host's address for the engines of other hosts; known from the first join string on.
    advertise: Option<IpAddr>,
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
    /// A coordinator that told it to leave is started again by itself.
    returns: bool,
    /// Where this loop shows that it turns, where somebody looks.
    breath: Option<Breath>,
    events: Ends<(u64, client::Event)>,
    outputs: Ends<(u64, Output)>,
    puts: Ends<Put>,
}

impl Agent {
    /// An agent for `device` that has not begun.
    pub fn new(config: Arc<Config>, device: Device, outside: Arc<dyn Outside>) -> Self {
        let start = now();
        Self {
            name: config.agent_name(device),
            config,
            outside,
            device,
            session: Session::Down(start),
            session_id: 0,
            client: None,
            // At most as long that a coordinator which was killed again and again has its workers back within two seconds.
            reconnect: Backoff::new(Duration::from_millis(100), Duration::from_millis(1500)),
            heard: start,
            missed: None,
            incarnation: None,
            term: Term::default(),
            group_secret: GroupSecret([0; 32]),
            advertise: None,
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
            returns: false,
            breath: None,
            events: mpsc::channel(QUEUE),
            outputs: mpsc::channel(QUEUE),
            puts: mpsc::channel(QUEUE),
        }
    }

    /// The same agent, which shows that its loop turns.
    pub fn showing(mut self, breath: Option<Breath>) -> Self {
        self.breath = breath;
        self
    }

    /// Works until told to leave, or until the coordinator is gone for good.
    pub async fn run(mut self, mut leave: watch::Receiver<Leave>) -> anyhow::Result<Ending> {
        loop {
            if let Some(ending) = self.turn(now())? {
                self.say_goodbye().await;
                return Ok(ending);
            }
            let next = self.next_deadline();
            // In this order, so that the same arrivals are always handled alike: what ends work comes before what
            // adds to it. None of them can starve the others, since each turn looks at every deadline.
            tokio::select! {
                biased;
                Ok(()) = leave.changed() => {
                    let leave = *leave.borrow_and_update();
                    self.told_to_leave(leave);
                }
                Some((id, event)) = self.events.1.recv() => {
                    if id == self.session_id {
                        self.session_event(event)?;
                    }
                }
                Some(put) = self.puts.1.recv() => self.commit_put(put),
                Some((id, output)) = self.outputs.1.recv() => self.engine_output(id, output)?,
                () = sleep_until(next) => {}
            }
        }
    }

    /// Does what time demands; says how the agent has ended, if it has.
    fn turn(&mut self, now: Instant) -> anyhow::Result<Option<Ending>> {
        if let Some(breath) = &mut self.breath {
            breath.turned(now);
        }
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
            self.end(Ended::Task(lease.clone()), now);
            // The coordinator may have heard every beat, and would wait for this attempt for ever.
            self.report(Report::TaskFailed {
                lease,
                failure: Failure {
                    class: FailureClass::Stale,
                    message: "no beat was acknowledged while the lease lived".into(),
                },
            });
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
                // Its exit may take a while, and is awaited without turning in circles.
                self.departure_deadline(now + OBEY);
            }
            return Ok(None);
        }
        let connected = matches!(self.session, Session::Up(..));
        let done = self.outbox.is_empty() || late || !connected;
        let ending = match self.returns {
            true => Ending::Interrupted,
            false => Ending::Left,
        };
        Ok(done.then_some(ending))
    }

    fn departure_deadline(&mut self, deadline: Instant) {
        if let Some(departure) = &mut self.departure {
            departure.deadline = deadline;
        }
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
        let breath = self.breath.as_ref().and_then(Breath::next);
        [session, seat, departure, self.held.expiry(), breath]
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
        // Before anything is given back: it must not be given to this worker again.
        self.beat(now());
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
        self.departure_deadline(now() + LAST_REPORTS);
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

    /// Whether there is no engine that could begin at once.
    fn engine_starting(&self) -> bool {
        !matches!(self.seat, Seat::Taken { ready: true, .. })
    }

    /// Memory of this process and its engine.
    fn resident_bytes(&self) -> u64 {
        let engine = match &self.seat {
            Seat::Taken { engine, .. } => engine.pid(),
            Seat::Empty(_) => None,
        };
        self.outside.resident_bytes(engine)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the agent is where a worker reads the clock (law L10)"
)]
fn now() -> Instant {
    Instant::now()
}
