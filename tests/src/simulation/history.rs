//! A history: a seed for everything that is left to chance, and the faults that happen, by name and time.
//!
//! A seed names a history. A history can also be written by hand: that is how a bug becomes a test.

use std::fmt;
use std::time::Duration;

use super::chance::Chance;

/// Hosts that run a worker.
pub const WORKERS: usize = 4;
/// No fault of a seed's own begins earlier…
const FIRST_FAULT_MS: u64 = 500;
/// …and none later.
const LAST_FAULT_MS: u64 = 150_000;

/// One run of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// Of the small delays, durations and failures that every history has.
    pub seed: u64,
    /// What happens to the fleet besides.
    pub faults: Vec<Planned>,
    /// Which operation on the store fails, counted over the whole fleet from 0, and how.
    pub operation: Option<(u64, Strike)>,
    /// Whether a small run is enough: a few tasks and one short stage, and nothing left to chance goes wrong.
    pub small: bool,
}

/// A fault and when it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Milliseconds since the beginning.
    pub at_ms: u64,
    /// What happens.
    pub fault: Fault,
}

/// What one operation on the store meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    /// It fails and has no effect.
    Before,
    /// It has its effect, and an error comes back.
    After,
    /// It has its effect, the reply is lost, and the client's library sends it again.
    LostReply,
    /// It has its effect, and its process is killed before it hears of it.
    Killed,
}

impl Strike {
    /// Every way.
    pub const ALL: [Self; 4] = [Self::Before, Self::After, Self::LostReply, Self::Killed];
}

/// Whom a link is cut to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Every coordinator.
    Coordinators,
    /// Every other worker.
    Workers,
    /// The store.
    Store,
    /// All of these.
    Everybody,
}

/// Which messages a cut link keeps back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Those in both directions.
    Both,
    /// Those that the host sends.
    Out,
    /// Those that the host is sent.
    In,
}

/// Whom a fault of the store meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Coordinators.
    Coordinators,
    /// One host of a worker.
    Worker(usize),
    /// Everybody.
    Everybody,
}

/// How the store misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Requests fail before they have an effect: a 503.
    ErrorBefore,
    /// Requests have their effect, and an error comes back: a 500.
    ErrorAfter,
    /// Replies to writes are lost and the client's library sends the requests again.
    LostReply,
    /// Creations are refused with a conflict although nothing is there: a spurious 412.
    Conflict,
    /// Requests take up to 15 s.
    Slow,
    /// Nothing can be written.
    Full,
}

impl Trouble {
    /// Every way.
    pub const ALL: [Self; 6] = [
        Self::ErrorBefore,
        Self::ErrorAfter,
        Self::LostReply,
        Self::Conflict,
        Self::Slow,
        Self::Full,
    ];
}

/// What can happen to a fleet. Times are in milliseconds; workers are called by the position of their host.
#[expect(missing_docs, reason = "the fields say what they are")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A worker and its engine die. Silently: nobody's connection is closed, as when a host loses power.
    KillWorker { worker: usize, silent: bool },
    /// A worker's process stands still, its engine does not: SIGSTOP.
    PauseWorker { worker: usize, ms: u64 },
    /// A host stands still: a suspended virtual machine.
    PauseHost { worker: usize, ms: u64 },
    /// An engine stands still, as one wedged in a driver's call.
    HangEngine { worker: usize, ms: u64 },
    /// An engine dies by its own fault, or is killed from outside.
    CrashEngine { worker: usize, killed: bool },
    /// A worker is told to leave, with or without time to finish.
    DrainWorker { worker: usize, now: bool },
    /// Somebody asks the coordinator to let a worker leave.
    AskToDrain { worker: usize },
    /// A worker's stream breaks: one side sees it at once, the other `lag_ms` later.
    CutStream {
        worker: usize,
        worker_first: bool,
        lag_ms: u64,
    },
    /// A host of a worker cannot reach, or be reached by, some of the others.
    Partition {
        worker: usize,
        peer: Peer,
        direction: Direction,
        ms: u64,
    },
    /// Messages from and to a worker take up to `up_to_ms` longer.
    Delay {
        worker: usize,
        up_to_ms: u64,
        ms: u64,
    },
    /// Reports of all workers arrive twice.
    Duplicate { ms: u64 },
    /// The coordinator dies.
    KillCoordinator { silent: bool },
    /// The coordinator stands still.
    PauseCoordinator { ms: u64 },
    /// Somebody starts a second coordinator while the first lives.
    Rival,
    /// The coordinator cannot reach, or be reached by, some of the others.
    PartitionCoordinator {
        peer: Peer,
        direction: Direction,
        ms: u64,
    },
    /// Somebody pauses the run, and lets it go on later.
    PauseRun { ms: u64 },
    /// Somebody asks the run to stop, and starts it again once it has.
    Stop { now: bool },
    /// All hosts stand still at once: when they wake, every clock has jumped.
    ClockJump { ms: u64 },
    /// The store misbehaves for a while, for some of its clients, for one request in `one_in`.
    Store {
        client: Client,
        trouble: Trouble,
        one_in: u64,
        ms: u64,
    },
}

/// Kinds of faults, for the account.
pub const KINDS: [&str; 22] = [
    "kill worker",
    "pause worker",
    "pause host",
    "hang engine",
    "crash engine",
    "drain worker",
    "cut stream",
    "partition two-way",
    "partition one-way",
    "delay (and reorder between streams)",
    "duplicate",
    "kill coordinator",
    "pause coordinator",
    "two coordinators",
    "stop",
    "clock jump",
    "store error",
    "store lost reply or conflict",
    "store slow",
    "store full",
    "pause run",
    "ask a worker to leave",
];

impl Fault {
    /// Position in [`KINDS`].
    pub fn kind(&self) -> usize {
        match self {
            Self::KillWorker { .. } => 0,
            Self::PauseWorker { .. } => 1,
            Self::PauseHost { .. } => 2,
            Self::HangEngine { .. } => 3,
            Self::CrashEngine { .. } => 4,
            Self::DrainWorker { .. } => 5,
            Self::CutStream { .. } => 6,
            Self::Partition { direction, .. } | Self::PartitionCoordinator { direction, .. } => {
                match direction {
                    Direction::Both => 7,
                    Direction::Out | Direction::In => 8,
                }
            }
            Self::Delay { .. } => 9,
            Self::Duplicate { .. } => 10,
            Self::KillCoordinator { .. } => 11,
            Self::PauseCoordinator { .. } => 12,
            Self::Rival => 13,
            Self::Stop { .. } => 14,
            Self::ClockJump { .. } => 15,
            Self::PauseRun { .. } => 20,
            Self::AskToDrain { .. } => 21,
            Self::Store { trouble, .. } => match trouble {
                Trouble::ErrorBefore | Trouble::ErrorAfter => 16,
                Trouble::LostReply | Trouble::Conflict => 17,
                Trouble::Slow => 18,
                Trouble::Full => 19,
            },
        }
    }

    /// How long it lasts.
    fn lasts(&self) -> Duration {
        let ms = match self {
            Self::PauseWorker { ms, .. }
            | Self::PauseHost { ms, .. }
            | Self::HangEngine { ms, .. }
            | Self::Partition { ms, .. }
            | Self::Delay { ms, .. }
            | Self::Duplicate { ms }
            | Self::PauseCoordinator { ms }
            | Self::PartitionCoordinator { ms, .. }
            | Self::ClockJump { ms }
            | Self::PauseRun { ms }
            | Self::Store { ms, .. } => *ms,
            Self::CutStream { lag_ms, .. } => *lag_ms,
            Self::KillWorker { .. }
            | Self::CrashEngine { .. }
            | Self::DrainWorker { .. }
            | Self::AskToDrain { .. }
            | Self::KillCoordinator { .. }
            | Self::Rival
            | Self::Stop { .. } => 0,
        };
        Duration::from_millis(ms)
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>7} ms  {:?}", self.at_ms, self.fault)
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, {} faults", self.seed, self.faults.len())?;
        for planned in &self.faults {
            writeln!(f, "  {planned}")?;
        }
        match self.operation {
            Some((n, strike)) => writeln!(f, "  store operation {n}: {strike:?}"),
            None => Ok(()),
        }
    }
}

impl History {
    /// The history that `seed` names. Even seeds draw from every kind of fault. Odd ones first choose a few kinds
    /// (swarm testing: Groce and others, ISSTA 2012): what takes three faults of one kind, or two of two, hardly ever
    /// comes up among twenty.
    pub fn of(seed: u64) -> Self {
        let mut draw = Draw::of(seed);
        if !seed.is_multiple_of(2) {
            draw.choose_kinds();
        }
        Self::drawn(seed, draw)
    }

    /// As an even seed's, with any seed: what odd ones named before they chose.
    pub(super) fn of_every_kind(seed: u64) -> Self {
        Self::drawn(seed, Draw::of(seed))
    }

    fn drawn(seed: u64, mut draw: Draw) -> Self {
        let n = 3 + draw.below(16);
        let mut faults: Vec<Planned> = (0..n)
            .map(|_| Planned {
                at_ms: FIRST_FAULT_MS + draw.below(LAST_FAULT_MS - FIRST_FAULT_MS),
                fault: draw.fault(),
            })
            .collect();
        faults.sort_by_key(|planned| planned.at_ms);
        Self {
            seed,
            faults,
            operation: None,
            small: false,
        }
    }

    /// A small run in which one operation on the store fails at most.
    pub fn small(operation: Option<(u64, Strike)>) -> Self {
        Self {
            seed: 0,
            faults: vec![],
            operation,
            small: true,
        }
    }

    /// The history of `seed` with these faults instead of its own: for tests.
    pub fn with(seed: u64, faults: &[(u64, Fault)]) -> Self {
        let planned = |&(at_ms, fault)| Planned { at_ms, fault };
        Self {
            seed,
            faults: faults.iter().map(planned).collect(),
            operation: None,
            small: false,
        }
    }

    /// When the last fault has ended.
    pub fn faults_end(&self) -> Duration {
        let end = |planned: &Planned| Duration::from_millis(planned.at_ms) + planned.fault.lasts();
        self.faults.iter().map(end).max().unwrap_or_default()
    }
}

/// Draws faults.
struct Draw {
    chance: Chance,
    /// What is drawn from: numbers of [`Draw::fault`].
    kinds: Vec<u64>,
}

/// Numbers of [`Draw::fault`] that are one kind; more numbers come up more often.
const KINDS_DRAWN: [&[u64]; 16] = [
    &[0, 1, 2],
    &[3],
    &[4],
    &[5, 6],
    &[7],
    &[8],
    &[9, 10],
    &[11, 12, 13, 14],
    &[15],
    &[16],
    &[17, 18],
    &[19, 20],
    &[21, 22],
    &[23],
    &[24],
    &[25, 26, 27, 28, 29],
];
/// A kind that only odd seeds draw, so that the histories of even ones stay what they were.
const ASK_TO_DRAIN: &[u64] = &[30];

impl Draw {
    /// From every kind.
    fn of(seed: u64) -> Self {
        Self {
            chance: Chance::new(seed),
            kinds: KINDS_DRAWN.concat(),
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.chance.below(u64::MAX, bound)
    }

    /// Each kind is in with one chance in three; the number of each counts no more.
    fn choose_kinds(&mut self) {
        let chosen: Vec<u64> = KINDS_DRAWN
            .iter()
            .chain([&ASK_TO_DRAIN])
            .filter(|_| self.chance.below(u64::MAX - 1, 3) == 0)
            .map(|kind| kind[0])
            .collect();
        if !chosen.is_empty() {
            self.kinds = chosen;
        }
    }

    /// Mostly shorter than the patience of everybody, sometimes longer than any.
    fn span(&mut self) -> u64 {
        match self.below(4) {
            0 => 50 + self.below(2_000),
            1 => 1_000 + self.below(9_000),
            2 => 5_000 + self.below(25_000),
            _ => 20_000 + self.below(60_000),
        }
    }

    fn peer(&mut self) -> Peer {
        match self.below(4) {
            0 => Peer::Coordinators,
            1 => Peer::Workers,
            2 => Peer::Store,
            _ => Peer::Everybody,
        }
    }

    fn direction(&mut self) -> Direction {
        match self.below(4) {
            0 => Direction::In,
            1 => Direction::Out,
            _ => Direction::Both,
        }
    }

    /// One that nobody is spared.
    fn fault_of_all(&mut self) -> Fault {
        match self.below(3) {
            0 => Fault::Stop {
                now: self.below(2) == 0,
            },
            1 => Fault::PauseRun { ms: self.span() },
            _ => Fault::ClockJump { ms: self.span() },
        }
    }

    fn fault(&mut self) -> Fault {
        let worker = self.below(WORKERS as u64) as usize;
        let drawn = self.below(self.kinds.len() as u64) as usize;
        match self.kinds[drawn] {
            0..=2 => Fault::KillWorker {
                worker,
                silent: self.below(3) == 0,
            },
            3 => Fault::PauseWorker {
                worker,
                ms: self.span(),
            },
            4 => Fault::PauseHost {
                worker,
                ms: self.span(),
            },
            5 | 6 => Fault::HangEngine {
                worker,
                ms: self.span() * 3,
            },
            7 => Fault::CrashEngine {
                worker,
                killed: self.below(2) == 0,
            },
            8 => Fault::DrainWorker {
                worker,
                now: self.below(2) == 0,
            },
            9 | 10 => Fault::CutStream {
                worker,
                worker_first: self.below(2) == 0,
                lag_ms: self.below(15_000),
            },
            11..=14 => Fault::Partition {
                worker,
                peer: self.peer(),
                direction: self.direction(),
                ms: self.span(),
            },
            15 => Fault::Delay {
                worker,
                up_to_ms: 100 + self.below(6_000),
                ms: self.span(),
            },
            16 => Fault::Duplicate { ms: self.span() },
            17 | 18 => Fault::KillCoordinator {
                silent: self.below(4) == 0,
            },
            19 | 20 => Fault::PauseCoordinator { ms: self.span() },
            21 | 22 => Fault::Rival,
            23 => Fault::PartitionCoordinator {
                peer: self.peer(),
                direction: self.direction(),
                ms: self.span(),
            },
            24 => self.fault_of_all(),
            30 => Fault::AskToDrain { worker },
            _ => Fault::Store {
                client: match self.below(3) {
                    0 => Client::Coordinators,
                    1 => Client::Worker(worker),
                    _ => Client::Everybody,
                },
                trouble: Trouble::ALL[self.below(6) as usize],
                one_in: 1 + self.below(4),
                ms: self.span(),
            },
        }
    }
}
