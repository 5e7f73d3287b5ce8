//! The engine of a simulated worker: does what an engine does to the control plane, in virtual time.
//!
//! [`start`] is the process: it can be killed, wedged and crashed. [`Bench`] is what runs in it. It obeys its agent; when
//! it is wedged it does not, and then the agent must kill it in time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use object_store::memory::InMemory;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use distillery_common::commit::TaskCommit;
use distillery_common::group::{GroupId, Held};
use distillery_common::ids::Digest;
use distillery_common::proto::engine_link::{
    Command, CommitOutcome, CommitRequest, Committed, Event,
};
use distillery_common::storage::layout;
use distillery_common::storage::{FileEntry, Store};
use distillery_common::task::{Failure, FailureClass, Lease};
use distillery_coordinator::plan::Kind;
use distillery_worker::engine_process::{Exit, FarEnd, FromEngine, Output, Request, ToEngine};

use super::objects::folder_of;
use super::scene::{SHARD_ROWS, Scene, content};
use super::training;
use super::world::{Host, Pid, Role, World, moment};

/// How late an agent may notice that a lease has ended, or kill an engine that does not obey.
const LATE: Duration = Duration::from_millis(50);
/// The agent's patience with an engine.
const OBEY: Duration = Duration::from_secs(10);

/// What an engine owes its agent an answer for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owed {
    Task(Lease),
    Group(GroupId),
}

/// Starts an engine for the agent `agent`.
pub(super) fn start(
    world: &Arc<World>,
    objects: &Arc<InMemory>,
    agent: Pid,
    worker: usize,
    id: u64,
    far: FarEnd,
    outputs: mpsc::Sender<(u64, Output)>,
) {
    let host = Host::Worker(worker);
    let pid = world.new_process(host, Role::Engine, Some(agent));
    let (forward, told) = mpsc::unbounded_channel();
    let bench = Bench {
        world: Arc::clone(world),
        store: super::store::open(world, objects, pid, host),
        pid,
        agent,
        worker,
        id,
        stream: world.new_stream(),
        told,
        pending: VecDeque::new(),
        answers: BTreeMap::new(),
        outputs: outputs.clone(),
        requests: 0,
        kept: None,
    };
    let running = world.run_process(pid, bench.serve());
    let world = Arc::clone(world);
    tokio::spawn(async move {
        let FarEnd {
            mut told,
            mut killed,
        } = far;
        let pass = async {
            while let Some(message) = told.recv().await {
                expect_obedience(&world, agent, pid, &message);
                let _ = forward.send(message);
            }
            std::future::pending::<()>().await;
        };
        let died = world.state().processes[&pid].died.clone();
        let (how, was_killed, clean) = tokio::select! {
            biased;
            _ = killed.wait_for(|&killed| killed) => ("was killed by its worker", true, false),
            () = died.notified() => {
                let killed = world.state().processes[&pid].killed;
                (if killed { "was killed" } else { "exited with code 1" }, killed, false)
            }
            ended = running => {
                if ended.is_err_and(|error| error.is_panic()) {
                    world.broken("panic", super::panics::take().unwrap_or_default());
                }
                ("ended", false, true)
            }
            () = pass => unreachable!("it waits for ever"),
        };
        world.kill(pid, false);
        world.remark(format_args!("engine {pid:?} of worker {worker} {how}"));
        sleep(Duration::from_millis(5)).await;
        let exit = Exit {
            how: how.into(),
            killed: was_killed,
            clean,
            tail: vec![],
        };
        let _ = outputs.send((id, Output::Exited(exit))).await;
    });
}

/// I3, I5: what an agent gives up, its engine leaves in time, or dies.
fn expect_obedience(world: &Arc<World>, agent: Pid, pid: Pid, message: &ToEngine) {
    let owed = match message {
        ToEngine::Command(Command::Cancel(lease)) => Owed::Task(lease.clone()),
        ToEngine::Command(Command::Abort { group, .. }) => {
            world.state().ledger.left(agent, group.clone());
            Owed::Group(group.clone())
        }
        ToEngine::Command(
            Command::Setup(_)
            | Command::Start(_)
            | Command::Join(_)
            | Command::Peers { .. }
            | Command::Drain { .. },
        ) => return,
        ToEngine::Answer { .. } => {
            answered(world, pid);
            return;
        }
    };
    let works = match &owed {
        Owed::Task(lease) => world
            .state()
            .working
            .get(&pid)
            .is_some_and(|(l, _)| l.as_ref() == Some(lease)),
        Owed::Group(group) => world
            .state()
            .working
            .get(&pid)
            .is_some_and(|(_, g)| g.as_ref() == Some(group)),
    };
    if !works {
        return;
    }
    let world = Arc::clone(world);
    tokio::spawn(async move {
        sleep(OBEY + LATE).await;
        let still = world
            .state()
            .working
            .get(&pid)
            .is_some_and(|(lease, group)| match &owed {
                Owed::Task(owed) => lease.as_ref() == Some(owed),
                Owed::Group(owed) => group.as_ref() == Some(owed),
            });
        let agent_ran = world.is_alive(agent) && world.has_run_for(agent, OBEY + LATE * 2);
        let lives = world.is_alive(pid);
        world.require("I3", !(still && lives && agent_ran), || {
            format!("{pid:?} still works on {owed:?}, which its agent gave up {OBEY:?} ago")
        });
    });
}

/// A task ends with the answer to its commit, and a stage with that to its last checkpoint's, whether or not the engine
/// is awake to hear it.
fn answered(world: &World, pid: Pid) {
    let mut state = world.state();
    let applied = state.applied.get(&pid).copied();
    if let Some((lease, group)) = state.working.get_mut(&pid) {
        *lease = None;
        let steps = group
            .as_ref()
            .and_then(|group| world.scene.steps(&group.stage));
        if steps == applied {
            *group = None;
        }
    }
}

/// What runs in an engine.
pub(super) struct Bench {
    pub(super) world: Arc<World>,
    pub(super) store: Store,
    pub(super) pid: Pid,
    agent: Pid,
    pub(super) worker: usize,
    id: u64,
    pub(super) stream: u64,
    told: mpsc::UnboundedReceiver<ToEngine>,
    pending: VecDeque<Command>,
    answers: BTreeMap<u64, CommitOutcome>,
    outputs: mpsc::Sender<(u64, Output)>,
    requests: u64,
    /// The stage, by position, that it trained last, and the state in its memory.
    pub(super) kept: Option<(usize, Held, u64)>,
}

pub(super) fn failure(class: FailureClass, message: impl ToString) -> Failure {
    Failure {
        class,
        message: message.to_string(),
    }
}

pub(super) fn superseded() -> Failure {
    failure(FailureClass::Superseded, "told to stop")
}

impl Bench {
    async fn serve(mut self) {
        let starts = 20 + self.chance(500);
        sleep(Duration::from_millis(starts)).await;
        self.say(Event::Ready {
            device: "cpu".into(),
            device_name: "simulation".into(),
            libtorch_version: "none".into(),
        })
        .await;
        loop {
            let Some(command) = self.pending.pop_front() else {
                if !self.listen(None).await {
                    return;
                }
                continue;
            };
            match command {
                Command::Start(lease) => self.work(lease).await,
                Command::Join(membership) => {
                    self.works_on(None, Some(membership.group.clone()));
                    let ending = training::train(&mut self, &membership).await;
                    self.works_on(None, None);
                    match ending {
                        Ok(training::Ending::Free) => {}
                        Ok(training::Ending::Drained) => return,
                        Err(failure) => {
                            self.say(Event::GroupFailed {
                                group: membership.group,
                                rank: membership.rank,
                                failure,
                            })
                            .await;
                        }
                    }
                }
                Command::Drain { .. } => return,
                // Too late, or too early: the answer is the same, for the agent waits for it.
                Command::Cancel(lease) => {
                    let failure = superseded();
                    self.say(Event::TaskFailed { lease, failure }).await;
                }
                Command::Abort { group, .. } => {
                    self.say(Event::GroupFailed {
                        group,
                        rank: 0,
                        failure: superseded(),
                    })
                    .await;
                }
                Command::Setup(_) | Command::Peers { .. } => {}
            }
        }
    }

    /// Notes what this engine owes obedience for.
    pub(super) fn works_on(&self, lease: Option<Lease>, group: Option<GroupId>) {
        self.world.state().working.insert(self.pid, (lease, group));
    }

    pub(super) fn chance(&self, bound: u64) -> u64 {
        self.world.below(self.stream, bound)
    }

    /// Whether something that is left to chance goes wrong now: never in a run without faults.
    pub(super) fn mishap(&self, one_in: u64) -> bool {
        let early = self.world.now() < self.world.history.faults_end();
        early && self.chance(one_in) == 0
    }

    pub(super) async fn say(&self, event: Event) {
        let said = Output::Said(FromEngine::Event(event));
        let _ = self.outputs.send((self.id, said)).await;
    }

    /// Waits for something to come, at most until `until`; false when nothing ever will.
    pub(super) async fn listen(&mut self, until: Option<Instant>) -> bool {
        let message = match until {
            None => self.told.recv().await,
            Some(until) => match tokio::time::timeout_at(until, self.told.recv()).await {
                Ok(message) => message,
                Err(_) => return true,
            },
        };
        let Some(message) = message else {
            return false;
        };
        self.take_in(message);
        true
    }

    fn take_in(&mut self, message: ToEngine) {
        match message {
            ToEngine::Command(command) => self.pending.push_back(command),
            ToEngine::Answer { id, outcome } => {
                self.answers.insert(id, outcome);
            }
        }
    }

    pub(super) fn glance(&mut self) {
        while let Ok(message) = self.told.try_recv() {
            self.take_in(message);
        }
    }

    /// Takes the first command that is `wanted` out of the queue.
    pub(super) fn take(&mut self, wanted: impl Fn(&Command) -> bool) -> Option<Command> {
        self.glance();
        let at = self.pending.iter().position(wanted)?;
        self.pending.remove(at)
    }

    fn cancelled(&mut self, lease: &Lease) -> bool {
        self.take(|command| matches!(command, Command::Cancel(other) if other == lease))
            .is_some()
    }

    /// Whether the agent has said to leave, and if so whether with a checkpoint. The command stays.
    pub(super) fn draining(&mut self) -> Option<bool> {
        self.glance();
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

    /// Works or waits for `ms`, but for what comes meanwhile.
    pub(super) async fn spend(&mut self, ms: u64) {
        let until = moment() + Duration::from_millis(ms);
        while moment() < until {
            if !self.listen(Some(until)).await {
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Asks the agent to make objects count, and waits for what becomes of it.
    pub(super) async fn commit(&mut self, commit: CommitRequest) -> CommitOutcome {
        self.requests += 1;
        let id = self.requests;
        let said = Output::Said(FromEngine::Commit(Request { id, commit }));
        let _ = self.outputs.send((self.id, said)).await;
        loop {
            if let Some(outcome) = self.answers.remove(&id) {
                return outcome;
            }
            if !self.listen(None).await {
                return CommitOutcome::Failed("the worker is gone".into());
            }
        }
    }

    async fn work(&mut self, lease: Lease) {
        self.works_on(Some(lease.clone()), None);
        if let Err(failure) = self.perform(&lease).await {
            self.works_on(None, None);
            self.say(Event::TaskFailed { lease, failure }).await;
        }
        self.works_on(None, None);
    }

    async fn perform(&mut self, lease: &Lease) -> Result<(), Failure> {
        const PARTS: u64 = 8;
        let time = match self.chance(8) {
            0 if !self.world.history.small => 10_000 + self.chance(40_000),
            _ => 300 + self.chance(6_000),
        };
        for part in 1..=PARTS {
            self.spend_on(lease, time / PARTS).await?;
            self.say(Event::Progress {
                lease: lease.clone(),
                done: part,
                total: PARTS,
            })
            .await;
        }
        if self.mishap(15) {
            let classes = [
                FailureClass::Io,
                FailureClass::OutOfMemory,
                FailureClass::HostLost,
            ];
            let class = classes[self.chance(3) as usize];
            return Err(failure(class, "a mishap"));
        }
        let request = self.files(lease).await?;
        if self.cancelled(lease) {
            return Err(superseded());
        }
        self.commit(request).await;
        Ok(())
    }

    /// Works for `ms`, and looks whether the lease still holds: I5.
    async fn spend_on(&mut self, lease: &Lease, ms: u64) -> Result<(), Failure> {
        let until = moment() + Duration::from_millis(ms);
        loop {
            if self.cancelled(lease) {
                return Err(superseded());
            }
            let now = moment();
            let ttl = self.world.timings.lease_ttl;
            let expiry = self.world.state().ledger.expiry(self.agent, ttl);
            let overdue = expiry.filter(|&expiry| now > expiry + LATE);
            let ran = self.world.has_run_for(self.agent, LATE * 2)
                && self.world.has_run_for(self.pid, LATE * 2);
            if overdue.is_some() && ran {
                let seen = format!("worker {} works on {lease}, which has ended", self.worker);
                self.world.broken("I5", seen);
            }
            if now >= until {
                return Ok(());
            }
            // It looks when the lease ends, and when the part does.
            let look = expiry
                .map(|expiry| expiry + LATE * 2)
                .filter(|&at| at > now);
            let next = look.map_or(until, |look| look.min(until));
            if !self.listen(Some(next)).await {
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    async fn files(&mut self, lease: &Lease) -> Result<CommitRequest, Failure> {
        let world = Arc::clone(&self.world);
        let scene = &world.scene;
        let index = lease.task.index;
        let at = scene.plan.position(&lease.task.stage);
        let at = at.ok_or_else(|| failure(FailureClass::Config, "no such stage"))?;
        let folder = folder_of(scene, at, index);
        let is_rows = scene.plan.stages[at].kind == Kind::Trajectories;
        if is_rows && scene.bad_shard == Some(index) {
            return Err(failure(FailureClass::BadInput, "an empty prompt"));
        }
        let keys = if is_rows {
            vec![
                layout::shard_rows(&folder, lease),
                layout::shard_embeddings(&folder, lease),
            ]
        } else {
            vec![layout::task_file(&folder, lease, "result.txt")]
        };
        let mut files = vec![];
        for (n, key) in (0..).zip(keys) {
            let bytes = content(&lease.task.stage, index, n);
            files.push(FileEntry::of(&key, &bytes));
            let put = self.store.put(&key, bytes.into()).await;
            put.map_err(|error| failure(FailureClass::Io, error))?;
        }
        let commit = TaskCommit {
            lease: lease.clone(),
            inputs: if is_rows {
                scene.dataset
            } else {
                Digest::of(b"recipe")
            },
            files,
            rows: SHARD_ROWS,
            schema: if is_rows {
                Scene::schema().id()
            } else {
                String::new()
            },
            ordinals: index * SHARD_ROWS..(index + 1) * SHARD_ROWS,
            result: serde_json::Value::Null,
            cost: None,
        };
        Ok(CommitRequest {
            key: layout::commit(&folder),
            body: commit.to_bytes(),
            rows: commit.rows,
            bytes: commit.total_bytes(),
            what: Committed::Task(commit.lease),
        })
    }
}
