//! What all parts of a simulated fleet share: time, processes, links, chance, and the account of what happened.
//!
//! One thread runs everything, so the lock is never waited for; it is never held across an await. Must never know
//! what a message or an object means: that is what [`super::ledger`] is for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use distillery_common::group::GroupId;
use distillery_common::task::Lease;
use distillery_coordinator::scheduler::Timings;
use distillery_worker::agent::Leave;

use super::chance::{Chance, mix};
use super::coordinator::Running;
use super::history::{Client, Direction, History, KINDS, Peer, Strike, Trouble, WORKERS};
use super::ledger::Ledger;
use super::network::Connection;
use super::ring::Ring;
use super::scene::Scene;

/// A machine on the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Host {
    Coordinator(u32),
    Worker(usize),
    Store,
}

/// A process, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pid(pub(super) u32);

/// What a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Coordinator,
    Agent,
    Engine,
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) host: Host,
    pub(super) role: Role,
    parent: Option<Pid>,
    pub(super) alive: bool,
    /// It died, and nobody's connection was closed.
    pub(super) silent: bool,
    pub(super) paused_until: Instant,
    pub(super) died: Arc<Notify>,
    main: Option<AbortHandle>,
    /// Whether its death was an outsider's doing.
    pub(super) killed: bool,
}

/// A time in which the store misbehaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spell {
    pub(super) client: Client,
    pub(super) trouble: Trouble,
    pub(super) one_in: u64,
    pub(super) until: Instant,
}

/// A broken promise, and when it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its number, or a word for promises without one.
    pub invariant: &'static str,
    /// What was seen.
    pub seen: String,
    /// Number of the event, from 1.
    pub event: u64,
    /// Virtual time.
    pub at: Duration,
}

/// What a history amounted to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// Steps of coordinators, deliveries and operations on the store.
    pub events: u64,
    /// Faults, by position in [`KINDS`].
    pub faults: [u64; KINDS.len()],
    /// Requests to the store that failed or were delayed on purpose.
    pub strikes: u64,
    /// Coordinators that claimed the run.
    pub lives: u64,
    /// Worker processes.
    pub workers: u64,
    /// Generations formed.
    pub generations: u64,
    /// Virtual time.
    pub elapsed: Duration,
    /// Operations on the store.
    pub operations: u64,
    /// Hash of everything that happened, in order.
    pub trace: u64,
    /// What the run left behind, without the names of who made it.
    pub remains: Vec<String>,
}

pub(super) struct State {
    pub(super) chance: Chance,
    pub(super) processes: BTreeMap<Pid, Process>,
    links: BTreeMap<(Host, Host), Instant>,
    delays: BTreeMap<usize, (Instant, u64)>,
    pub(super) duplicates_until: Instant,
    pub(super) spells: Vec<Spell>,
    pub(super) connections: Vec<(usize, Weak<Connection>)>,
    pub(super) coordinators: Vec<(u32, Pid, Option<Running>)>,
    pub(super) coordinator_due: bool,
    pub(super) leaves: BTreeMap<usize, watch::Sender<Leave>>,
    pub(super) rings: BTreeMap<GroupId, Ring>,
    /// What each engine works on.
    pub(super) working: BTreeMap<Pid, (Option<Lease>, Option<GroupId>)>,
    /// The last step that each engine has applied.
    pub(super) applied: BTreeMap<Pid, u64>,
    pub(super) ledger: Ledger,
    pub(super) account: Account,
    violation: Option<Violation>,
    pub(super) finished: bool,
    next_stream: u64,
}

/// A fleet and the world round it.
pub(super) struct World {
    pub(super) history: History,
    pub(super) scene: Scene,
    pub(super) timings: Timings,
    pub(super) origin: Instant,
    pub(super) ended: Notify,
    pub(super) verbose: bool,
    state: Mutex<State>,
}

#[expect(clippy::disallowed_methods, reason = "virtual time is read here alone")]
pub(super) fn moment() -> Instant {
    Instant::now()
}

impl World {
    pub(super) fn new(history: &History, verbose: bool) -> Arc<Self> {
        let origin = moment();
        let scene = Scene::of(history);
        Arc::new(Self {
            timings: scene.timings(),
            state: Mutex::new(State {
                chance: Chance::new(mix(history.seed)),
                processes: BTreeMap::new(),
                links: BTreeMap::new(),
                delays: BTreeMap::new(),
                duplicates_until: origin,
                spells: vec![],
                connections: vec![],
                coordinators: vec![],
                coordinator_due: false,
                leaves: BTreeMap::new(),
                rings: BTreeMap::new(),
                working: BTreeMap::new(),
                applied: BTreeMap::new(),
                ledger: Ledger::default(),
                account: Account::default(),
                violation: None,
                finished: false,
                next_stream: 1,
            }),
            scene,
            history: history.clone(),
            origin,
            ended: Notify::new(),
            verbose,
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with the lock held")
    }

    pub(super) fn now(&self) -> Duration {
        moment() - self.origin
    }

    // ---- what is noted ------------------------------------------------------------------------------------

    /// Notes that something happened: it is counted, and becomes part of the trace.
    pub(super) fn happened(&self, what: std::fmt::Arguments<'_>) {
        let mut state = self.state();
        state.account.events += 1;
        let mut hash = Hash(state.account.trace ^ self.now().as_nanos() as u64);
        // A hash takes everything.
        let _ = hash.write_fmt(what);
        state.account.trace = hash.0;
        if self.verbose {
            let at = self.now().as_millis();
            eprintln!("{:>6} {at:>8} ms  {what}", state.account.events);
        }
    }

    /// Only for whoever reads along.
    pub(super) fn remark(&self, what: std::fmt::Arguments<'_>) {
        if self.verbose {
            eprintln!("       {:>8} ms  {what}", self.now().as_millis());
        }
    }

    /// Notes a broken promise; the first one ends the history.
    pub(super) fn broken(&self, invariant: &'static str, seen: impl Into<String>) {
        let at = self.now();
        let mut state = self.state();
        let event = state.account.events;
        state.violation.get_or_insert(Violation {
            invariant,
            seen: seen.into(),
            event,
            at,
        });
        drop(state);
        self.ended.notify_one();
    }

    pub(super) fn require(
        &self,
        invariant: &'static str,
        holds: bool,
        seen: impl FnOnce() -> String,
    ) {
        if !holds {
            self.broken(invariant, seen());
        }
    }

    pub(super) fn violation(&self) -> Option<Violation> {
        self.state().violation.clone()
    }

    // ---- chance -------------------------------------------------------------------------------------------

    /// A number for somebody who draws.
    pub(super) fn new_stream(&self) -> u64 {
        let mut state = self.state();
        state.next_stream += 1;
        state.next_stream
    }

    pub(super) fn below(&self, stream: u64, bound: u64) -> u64 {
        self.state().chance.below(stream, bound)
    }

    // ---- processes ----------------------------------------------------------------------------------------

    pub(super) fn new_process(&self, host: Host, role: Role, parent: Option<Pid>) -> Pid {
        let mut state = self.state();
        let pid = Pid(state.processes.len() as u32 + 1);
        let process = Process {
            host,
            role,
            parent,
            alive: true,
            silent: false,
            paused_until: self.origin,
            died: Arc::new(Notify::new()),
            main: None,
            killed: false,
        };
        state.processes.insert(pid, process);
        pid
    }

    /// Runs `main` as the main thread of `pid`: it stands still while its process is paused and ends with it.
    pub(super) fn run_process<F>(
        self: &Arc<Self>,
        pid: Pid,
        main: F,
    ) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let running = tokio::spawn(Pausable {
            main: Box::pin(main),
            world: Arc::clone(self),
            pid,
            wake: None,
            turns: (moment(), 0),
        });
        if let Some(process) = self.state().processes.get_mut(&pid) {
            process.main = Some(running.abort_handle());
        }
        running
    }

    /// Ends a process and its children. Nothing that it has begun reaches the outside any more, except requests
    /// that are on their way already.
    pub(super) fn kill(&self, pid: Pid, silent: bool) {
        let mut state = self.state();
        let children: Vec<Pid> = state
            .processes
            .iter()
            .filter(|(_, process)| process.parent == Some(pid) && process.alive)
            .map(|(&child, _)| child)
            .collect();
        let Some(process) = state.processes.get_mut(&pid) else {
            return;
        };
        if process.alive {
            process.alive = false;
            process.silent = silent;
            process.died.notify_waiters();
            if let Some(main) = process.main.take() {
                main.abort();
            }
        }
        for ring in state.rings.values() {
            ring.stir();
        }
        drop(state);
        for child in children {
            self.kill(child, silent);
        }
    }

    /// Notes how the end of `pid`, which is about to come, will look.
    pub(super) fn blame(&self, pid: Pid, killed: bool) {
        if let Some(process) = self.state().processes.get_mut(&pid) {
            process.killed = killed;
        }
    }

    pub(super) fn pause(&self, pid: Pid, ms: u64) {
        let until = moment() + Duration::from_millis(ms);
        if let Some(process) = self.state().processes.get_mut(&pid) {
            process.paused_until = process.paused_until.max(until);
        }
    }

    /// Who started `pid`.
    pub(super) fn parent(&self, pid: Pid) -> Option<Pid> {
        self.state().processes[&pid].parent
    }

    /// Whether `pid` has run without a pause for `time`.
    pub(super) fn has_run_for(&self, pid: Pid, time: Duration) -> bool {
        moment() >= self.paused_until(pid) + time
    }

    pub(super) fn is_alive(&self, pid: Pid) -> bool {
        self.state().processes[&pid].alive
    }

    /// Whether nothing would tell others of the end of `pid`.
    pub(super) fn is_silent(&self, pid: Pid) -> bool {
        self.state().processes[&pid].silent
    }

    pub(super) fn paused_until(&self, pid: Pid) -> Instant {
        self.state().processes[&pid].paused_until
    }

    /// Whether `pid` answers a ping.
    pub(super) fn answers(&self, pid: Pid) -> bool {
        let state = self.state();
        let process = &state.processes[&pid];
        (process.alive || !process.silent) && process.paused_until <= moment()
    }

    /// Waits while `pid` is paused; never returns when it is dead.
    pub(super) async fn gate(&self, pid: Pid) {
        loop {
            if !self.is_alive(pid) {
                std::future::pending::<()>().await;
            }
            let until = self.paused_until(pid);
            if until <= moment() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// Living processes of a kind on a host.
    pub(super) fn living(&self, host: Option<Host>, role: Role) -> Vec<Pid> {
        self.state()
            .processes
            .iter()
            .filter(|(_, p)| p.alive && p.role == role && host.is_none_or(|host| p.host == host))
            .map(|(&pid, _)| pid)
            .collect()
    }

    // ---- the network --------------------------------------------------------------------------------------

    pub(super) fn cut(&self, host: Host, peer: Peer, direction: Direction, ms: u64) {
        let until = moment() + Duration::from_millis(ms);
        let mut state = self.state();
        let coordinators: Vec<Host> = (0..=state.coordinators.len() as u32 + 8)
            .map(Host::Coordinator)
            .collect();
        let workers = (0..WORKERS).map(Host::Worker).collect();
        let others: Vec<Host> = match peer {
            Peer::Coordinators => coordinators,
            Peer::Workers => workers,
            Peer::Store => vec![Host::Store],
            Peer::Everybody => [coordinators, workers, vec![Host::Store]].concat(),
        };
        for other in others.into_iter().filter(|&other| other != host) {
            let mut keep = |link| {
                let end = state.links.entry(link).or_insert(until);
                *end = until.max(*end);
            };
            if direction != Direction::In {
                keep((host, other));
            }
            if direction != Direction::Out {
                keep((other, host));
            }
        }
    }

    pub(super) fn slow_down(&self, worker: usize, up_to_ms: u64, ms: u64) {
        let until = moment() + Duration::from_millis(ms);
        self.state().delays.insert(worker, (until, up_to_ms));
    }

    /// When the link opens; now or earlier when it is open.
    pub(super) fn link_opens(&self, from: Host, to: Host) -> Instant {
        let state = self.state();
        state.links.get(&(from, to)).copied().unwrap_or(self.origin)
    }

    /// How long a message takes on an open link.
    pub(super) fn latency(&self, stream: u64, from: Host, to: Host) -> Duration {
        let mut state = self.state();
        let usual = match state.chance.below(stream, 20) {
            0 => 20 + state.chance.below(stream, 200),
            _ => 1 + state.chance.below(stream, 8),
        };
        let delay = [from, to]
            .into_iter()
            .filter_map(|host| match host {
                Host::Worker(worker) => state.delays.get(&worker).copied(),
                Host::Coordinator(_) | Host::Store => None,
            })
            .filter(|&(until, _)| moment() < until)
            .map(|(_, up_to)| up_to)
            .max();
        let more = delay.map_or(0, |up_to| state.chance.below(stream, up_to));
        Duration::from_millis(usual + more)
    }

    /// Takes as long as a message from one host to another.
    pub(super) async fn travel(&self, stream: u64, from: Host, to: Host) {
        sleep(self.latency(stream, from, to)).await;
        loop {
            let opens = self.link_opens(from, to);
            if opens <= moment() {
                return;
            }
            sleep_until(opens).await;
        }
    }

    /// What the next operation on the store meets, counted over the fleet.
    pub(super) fn next_operation(&self) -> Option<Strike> {
        let mut state = self.state();
        let n = state.account.operations;
        state.account.operations += 1;
        match self.history.operation {
            Some((struck, strike)) if struck == n => Some(strike),
            Some(_) | None => None,
        }
    }
}

/// A main thread that stands still while its process is paused.
struct Pausable<F> {
    main: Pin<Box<F>>,
    world: Arc<World>,
    pid: Pid,
    wake: Option<Pin<Box<Sleep>>>,
    /// The last moment at which it was looked after, and how often it was then.
    turns: (Instant, u32),
}

/// Turns of one process in one moment that are no longer work: it goes in circles, and time will never pass.
const CIRCLES: u32 = 300;

impl<F: Future> Future for Pausable<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let now = moment();
        let turns = if self.turns.0 == now {
            self.turns.1 + 1
        } else {
            0
        };
        self.turns = (now, turns);
        if turns == CIRCLES {
            let role = self.world.state().processes[&self.pid].role;
            self.world
                .broken("livelock", format!("the {role:?} goes in circles"));
            return Poll::Pending;
        }
        loop {
            let until = self.world.paused_until(self.pid);
            if until <= moment() {
                self.wake = None;
                return self.main.as_mut().poll(context);
            }
            let wake = self
                .wake
                .get_or_insert_with(|| Box::pin(sleep_until(until)));
            if wake.deadline() != until {
                wake.as_mut().reset(until);
            }
            if wake.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

/// FNV-1a over what is written.
struct Hash(u64);

impl std::fmt::Write for Hash {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for byte in text.bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        Ok(())
    }
}
