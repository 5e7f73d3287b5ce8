//! Whole fleets in virtual time: workers that die, lose their streams, report twice and late, and coordinators that
//! are killed. After every event the machine's invariants are checked; at the end the run must have succeeded. A
//! failing seed is printed and replays.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use distillery_common::group::{CheckpointCommitted, GroupId, Membership, Phase, Progress};
use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::seed::{Purpose, Stream};
use distillery_common::task::{CommitSummary, Failure, FailureClass, Lease, TaskId};
use distillery_coordinator::plan::{Kind, Plan, Stage, Tasks, Training, Work};
use distillery_coordinator::scheduler::{
    Action, Checkpoint, ConnectionId, Durable, Event, Finding, FromWorker, Hello, Machine, Outcome,
    Record, Timings, ToWorker, Trouble,
};

const WORKERS: usize = 4;
const STEPS: u64 = 30;
const FAULTS_END: Duration = Duration::from_secs(240);
const LIMIT: Duration = Duration::from_secs(4 * 3600);

fn plan() -> Plan {
    let tasks = |name: &str, kind, count, after: &[usize]| Stage {
        name: name.into(),
        kind,
        after: after.to_vec(),
        work: Work::Tasks(Tasks {
            count,
            rows: count,
            bytes: count,
            quarantine_limit: 0,
        }),
    };
    let training = |name: &str, after: &[usize], parent| Stage {
        name: name.into(),
        kind: Kind::Distill,
        after: after.to_vec(),
        work: Work::Training(Training {
            steps: STEPS,
            checkpoint_every: 10,
            keep_last: 1,
            global_batch: 8,
            min_world: 2,
            max_world: 3,
            parent,
        }),
    };
    Plan {
        stages: vec![
            tasks("trajectories", Kind::Trajectories, 12, &[]),
            training("seg8", &[0], None),
            training("seg4", &[0, 1], Some(1)),
            // A second line of students from the teacher, and a second one from seg8.
            training("mcd", &[0], None),
            training("side", &[0, 1], Some(1)),
            tasks("reference", Kind::Reference, 6, &[]),
            tasks("evaluate", Kind::Evaluate, 3, &[1, 2, 3, 4, 5]),
        ],
    }
}

/// What is on its way, and arrives at a time.
#[derive(Debug, Clone)]
enum Due {
    ToMachine(u64, Event),
    ToWorker(ConnectionId, ToWorker),
    Start(usize),
    Reconnect(usize, u32),
    TaskDone(usize, u32, Lease),
    Step(usize, u32, GroupId),
    Beat(usize, u32),
    Fault,
    CoordinatorStarts,
}

/// A worker process; `life` tells its restarts apart.
#[derive(Debug, Clone, Default)]
struct Worker {
    life: u32,
    alive: bool,
    connection: Option<ConnectionId>,
    incarnation: Option<Incarnation>,
    lease: Option<Lease>,
    group: Option<Membership>,
    has_peers: bool,
    step: u64,
    next_seq: u64,
    unacknowledged: BTreeMap<u64, FromWorker>,
}

struct World {
    machine: Option<Machine>,
    /// Messages to the machine carry the life of the coordinator they are for.
    life: u64,
    born: Duration,
    now: Duration,
    records: Vec<Record>,
    commits: BTreeMap<TaskId, CommitSummary>,
    checkpoints: BTreeMap<(String, u64, u64), Checkpoint>,
    workers: Vec<Worker>,
    queue: BTreeMap<(Duration, u64), Due>,
    arrivals: u64,
    connections: u64,
    random: Stream,
    sealed: BTreeSet<usize>,
    finished: Option<Outcome>,
    faults: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            machine: None,
            life: 0,
            born: Duration::ZERO,
            now: Duration::ZERO,
            records: vec![],
            commits: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            workers: vec![Worker::default(); WORKERS],
            queue: BTreeMap::new(),
            arrivals: 0,
            connections: 0,
            random: Stream::new(seed, Purpose::Bootstrap, 0, 0),
            sealed: BTreeSet::new(),
            finished: None,
            faults: 0,
        };
        world.after(0, Due::CoordinatorStarts);
        for worker in 0..WORKERS {
            world.after(10, Due::Start(worker));
        }
        world.after(1_000, Due::Fault);
        world
    }

    fn below(&mut self, n: u32) -> u32 {
        self.random.below(n)
    }

    fn after(&mut self, ms: u64, due: Due) {
        self.arrivals += 1;
        let key = (self.now + Duration::from_millis(ms), self.arrivals);
        self.queue.insert(key, due);
    }

    fn local(&self) -> Duration {
        self.now.saturating_sub(self.born)
    }

    fn run(&mut self) {
        loop {
            let tick = self
                .machine
                .as_ref()
                .and_then(Machine::next_deadline)
                .map(|deadline| self.born + deadline);
            let next = self.queue.keys().next().copied();
            match (tick, next) {
                (Some(tick), Some((at, _))) if tick <= at => self.tick(tick),
                (_, Some(key)) => {
                    self.now = self.now.max(key.0);
                    let due = self.queue.remove(&key).expect("it was just seen");
                    self.happens(due);
                }
                (Some(tick), None) => self.tick(tick),
                (None, None) => panic!("nothing will ever happen again"),
            }
            if self.finished == Some(Outcome::Succeeded) {
                return;
            }
            assert!(self.now < LIMIT, "the run does not end");
        }
    }

    fn tick(&mut self, at: Duration) {
        self.now = self.now.max(at);
        self.machine_hears(Event::Tick);
    }

    fn happens(&mut self, due: Due) {
        match due {
            Due::ToMachine(life, event) if life == self.life => self.machine_hears(event),
            Due::ToMachine(..) => {}
            Due::ToWorker(connection, message) => self.worker_hears(connection, message),
            Due::Start(worker) => self.start_worker(worker),
            Due::Reconnect(worker, life) if self.is(worker, life) => self.connect(worker),
            Due::TaskDone(worker, life, lease) if self.is(worker, life) => {
                self.task_done(worker, lease);
            }
            Due::Step(worker, life, group) if self.is(worker, life) => self.step(worker, &group),
            Due::Beat(worker, life) if self.is(worker, life) => self.beat(worker),
            Due::Reconnect(..) | Due::TaskDone(..) | Due::Step(..) | Due::Beat(..) => {}
            Due::Fault => self.fault(),
            Due::CoordinatorStarts => self.start_coordinator(),
        }
    }

    fn is(&self, worker: usize, life: u32) -> bool {
        self.workers[worker].alive && self.workers[worker].life == life
    }

    // ---- the coordinator ------------------------------------------------------------------------------

    fn start_coordinator(&mut self) {
        self.life += 1;
        self.born = self.now;
        self.finished = None;
        let term = Term(Durable::replay(&self.records).term.0 + 1);
        self.records.push(Record::TermClaimed {
            term,
            endpoint: String::new(),
        });
        let durable = Durable::replay(&self.records);
        self.machine = Some(Machine::new(plan(), Timings::default(), durable));
        self.machine_hears(Event::Tick);
    }

    fn kill_coordinator(&mut self) {
        self.machine = None;
        self.life += 1;
        for worker in 0..WORKERS {
            self.cut(worker);
        }
        let pause = 100 + u64::from(self.below(5_000));
        self.after(pause, Due::CoordinatorStarts);
    }

    fn machine_hears(&mut self, event: Event) {
        let now = self.local();
        let Some(machine) = &mut self.machine else {
            return;
        };
        let actions = machine.handle(now, event);
        if let Err(violation) = machine.check() {
            panic!("{violation}");
        }
        let durable = machine.durable().clone();
        for action in actions {
            self.act(action);
        }
        assert_eq!(Durable::replay(&self.records), durable, "I7");
        if let Some(Outcome::Failed { .. }) = &self.finished {
            // A person reads why, and asks for another try.
            self.kill_coordinator();
        }
    }

    fn act(&mut self, action: Action) {
        let errand = 1 + u64::from(self.below(200));
        let life = self.life;
        match action {
            Action::Journal(record) => self.records.push(record),
            Action::Send(connection, message) => {
                // The same for all, since a stream keeps the order.
                self.after(3, Due::ToWorker(connection, message));
            }
            Action::Close(connection) => {
                let worker = self
                    .workers
                    .iter()
                    .position(|w| w.connection == Some(connection));
                if let Some(worker) = worker {
                    self.cut(worker);
                }
            }
            Action::Inspect {
                stage, after_ms, ..
            } => {
                let finding = match self.below(10) {
                    0 => Err(Trouble::Transient("503".into())),
                    _ => Ok(self.finding(stage)),
                };
                let event = Event::Inspected { stage, finding };
                self.after(after_ms + errand, Due::ToMachine(life, event));
            }
            Action::VerifyCommit { task, after_ms } => {
                let commit = match self.below(10) {
                    0 => Err(Trouble::Transient("503".into())),
                    _ => Ok(self.commits.get(&task).cloned()),
                };
                let event = Event::CommitVerified { task, commit };
                self.after(after_ms + errand, Due::ToMachine(life, event));
            }
            Action::VerifyCheckpoint {
                checkpoint,
                after_ms,
            } => {
                let event = Event::CheckpointVerified {
                    checkpoint,
                    result: Ok(()),
                };
                self.after(after_ms + errand, Due::ToMachine(life, event));
            }
            Action::Seal {
                stage,
                commits,
                after_ms,
            } => {
                self.check_seal(stage, &commits);
                let result = match self.below(4) {
                    0 => Err(Trouble::Transient("503".into())),
                    _ => Ok(Digest::of(b"sealed")),
                };
                let event = Event::Sealed { stage, result };
                self.after(after_ms + errand, Due::ToMachine(life, event));
            }
            Action::Prune {
                stage,
                before,
                pinned,
                ..
            } => self.prune(stage, before, &pinned),
            Action::Index { .. } | Action::Explain(_) => {}
            Action::Finish(outcome) => self.finished = Some(outcome),
        }
    }

    fn prune(&mut self, stage: usize, before: u64, pinned: &BTreeSet<(u64, Generation)>) {
        let stage = &plan().stages[stage].name;
        self.checkpoints.retain(|(name, step, generation), _| {
            name != stage || *step >= before || pinned.contains(&(*step, Generation(*generation)))
        });
    }

    /// I1: a seal lists each task once, with the COMMIT that won.
    fn check_seal(&mut self, stage: usize, commits: &BTreeMap<u64, CommitSummary>) {
        let stage_of_plan = &plan().stages[stage];
        let Work::Tasks(tasks) = &stage_of_plan.work else {
            panic!("a group's stage is sealed by its last checkpoint")
        };
        assert_eq!(
            commits.len() as u64,
            tasks.count,
            "I1: {}",
            stage_of_plan.name
        );
        for (index, commit) in commits {
            let task = TaskId {
                stage: stage_of_plan.name.clone(),
                index: *index,
            };
            assert_eq!(Some(commit), self.commits.get(&task), "I1: {task}");
        }
        self.sealed.insert(stage);
    }

    fn finding(&self, at: usize) -> Finding {
        let stage = &plan().stages[at];
        match stage.work {
            Work::Training(_) => Finding::Checkpoints(
                self.checkpoints
                    .iter()
                    .filter(|((name, _, _), _)| *name == stage.name)
                    .map(|(_, checkpoint)| checkpoint.clone())
                    .collect(),
            ),
            Work::Tasks(_) => Finding::Tasks {
                commits: self
                    .commits
                    .iter()
                    .filter(|(task, _)| task.stage == stage.name)
                    .map(|(task, commit)| (task.index, commit.clone()))
                    .collect(),
                sealed: None,
            },
        }
    }

    // ---- workers --------------------------------------------------------------------------------------

    fn start_worker(&mut self, worker: usize) {
        let life = self.workers[worker].life + 1;
        self.workers[worker] = Worker {
            life,
            alive: true,
            ..Worker::default()
        };
        self.connect(worker);
        self.after(2_000, Due::Beat(worker, life));
    }

    fn connect(&mut self, worker: usize) {
        let life = self.workers[worker].life;
        if self.machine.is_none() {
            self.after(500, Due::Reconnect(worker, life));
            return;
        }
        if self.workers[worker].connection.is_some() {
            return;
        }
        self.connections += 1;
        let connection = ConnectionId(self.connections);
        let own = &mut self.workers[worker];
        own.connection = Some(connection);
        let hello = Hello {
            name: format!("w{worker}"),
            host: "h".into(),
            slots: 1,
            incarnation: own.incarnation,
            leases: own.lease.iter().cloned().collect(),
            group: own.group.as_ref().map(|m| m.group.clone()),
        };
        self.machine_hears(Event::Arrived { connection, hello });
    }

    /// The stream breaks; what is on its way is lost.
    fn cut(&mut self, worker: usize) {
        let Some(connection) = self.workers[worker].connection.take() else {
            return;
        };
        self.queue.retain(|_, due| match due {
            Due::ToWorker(to, _) => *to != connection,
            Due::ToMachine(_, Event::Said { connection: of, .. }) => *of != connection,
            _ => true,
        });
        let closed = Due::ToMachine(self.life, Event::Closed { connection });
        self.after(1, closed);
        if self.workers[worker].alive {
            let life = self.workers[worker].life;
            let pause = 50 + u64::from(self.below(1_000));
            self.after(pause, Due::Reconnect(worker, life));
        }
    }

    fn say(&mut self, worker: usize, message: FromWorker) {
        if let Some(connection) = self.workers[worker].connection {
            let event = Event::Said {
                connection,
                message,
            };
            self.after(2, Due::ToMachine(self.life, event));
        }
    }

    /// At-least-once: kept until acknowledged, sometimes sent twice.
    fn report(&mut self, worker: usize, make: impl FnOnce(u64) -> FromWorker) {
        let own = &mut self.workers[worker];
        own.next_seq += 1;
        let message = make(own.next_seq);
        own.unacknowledged.insert(own.next_seq, message.clone());
        self.say(worker, message.clone());
        if self.below(4) == 0 {
            self.say(worker, message);
        }
    }

    fn beat(&mut self, worker: usize) {
        let own = &self.workers[worker];
        let life = own.life;
        let group = own
            .group
            .as_ref()
            .filter(|_| own.has_peers)
            .map(|m| Progress {
                group: m.group.clone(),
                phase: Phase::Stepping,
                step: own.step,
                total_steps: STEPS,
                loss: 1.0,
                samples_per_second: 1.0,
                step_ms: 500.0,
            });
        self.say(
            worker,
            FromWorker::Beat {
                seq: 1,
                tasks: vec![],
                group,
                rss_bytes: 1,
            },
        );
        self.after(2_000, Due::Beat(worker, life));
    }

    fn worker_hears(&mut self, connection: ConnectionId, message: ToWorker) {
        let worker = self
            .workers
            .iter()
            .position(|w| w.connection == Some(connection));
        let Some(worker) = worker.filter(|&w| self.workers[w].alive) else {
            return;
        };
        let life = self.workers[worker].life;
        let own = &mut self.workers[worker];
        match message {
            ToWorker::Welcome { incarnation } => {
                if own.incarnation != Some(incarnation) {
                    own.lease = None;
                    own.group = None;
                    own.incarnation = Some(incarnation);
                }
                for message in own.unacknowledged.clone().into_values() {
                    self.say(worker, message);
                }
            }
            ToWorker::BeatAck { .. } => {}
            ToWorker::Grant(lease) => {
                assert_eq!(Some(lease.incarnation), own.incarnation, "a foreign lease");
                assert_eq!(own.group, None, "I5: a member of a group was given a task");
                own.lease = Some(lease.clone());
                let time = 200 + u64::from(self.below(8_000));
                self.after(time, Due::TaskDone(worker, life, lease));
            }
            ToWorker::Revoke { lease, .. } => {
                if own.lease.as_ref() == Some(&lease) {
                    own.lease = None;
                }
            }
            ToWorker::GroupJoin(membership) => self.worker_joins(worker, membership),
            ToWorker::GroupPeers { group, .. } => {
                if own.group.as_ref().is_some_and(|m| m.group == group) {
                    own.has_peers = true;
                    self.after(500, Due::Step(worker, life, group));
                }
            }
            ToWorker::GroupAbort { group, .. } => {
                if own.group.as_ref().is_some_and(|m| m.group == group) {
                    own.group = None;
                }
            }
            ToWorker::ReportAck { seq } => {
                own.unacknowledged.remove(&seq);
            }
            ToWorker::Drain { .. } => {}
        }
    }

    fn worker_joins(&mut self, worker: usize, membership: Membership) {
        let wanted = membership.base_checkpoint.as_ref();
        let wanted = wanted.into_iter().chain(&membership.parent_checkpoint);
        for key in wanted {
            let is_there = self.checkpoints.values().any(|c| c.key == *key);
            assert!(is_there, "{key} was deleted before {}", membership.group);
        }
        let parent = match membership.group.stage.as_str() {
            "seg4" | "side" => Some(("seg8", STEPS)),
            _ => None,
        };
        let from = membership.parent_checkpoint.as_ref().and_then(|key| {
            let parent = self.checkpoints.iter().find(|(_, c)| c.key == *key);
            parent.map(|((stage, step, _), _)| (stage.as_str(), *step))
        });
        assert_eq!(from, parent, "{} starts elsewhere", membership.group);
        let own = &mut self.workers[worker];
        own.step = membership.base_step;
        own.has_peers = false;
        own.group = Some(membership.clone());
        self.report(worker, |seq| FromWorker::GroupReady {
            seq,
            group: membership.group,
            rank: membership.rank,
            address: format!("w{worker}"),
        });
    }

    fn task_done(&mut self, worker: usize, lease: Lease) {
        if self.workers[worker].lease.as_ref() != Some(&lease) {
            return;
        }
        self.workers[worker].lease = None;
        if self.now < FAULTS_END && self.below(12) == 0 {
            let classes = [
                FailureClass::Io,
                FailureClass::HostLost,
                FailureClass::Preempted,
            ];
            let class = classes[self.below(3) as usize];
            self.report(worker, |seq| FromWorker::TaskFailed {
                seq,
                lease,
                failure: Failure {
                    class,
                    message: "injected".into(),
                },
            });
            return;
        }
        // Create-only: the first COMMIT stays.
        self.commits
            .entry(lease.task.clone())
            .or_insert_with(|| CommitSummary {
                key: lease.task.to_string(),
                rows: 1,
                bytes: 1,
                digest: Digest::of(lease.to_string().as_bytes()),
            });
        self.report(worker, |seq| FromWorker::TaskCommitted { seq, lease });
    }

    /// One step of one member. All members must be there; rank 0 writes checkpoints.
    fn step(&mut self, worker: usize, group: &GroupId) {
        let Some(membership) = self.workers[worker].group.clone() else {
            return;
        };
        if membership.group != *group {
            return;
        }
        let life = self.workers[worker].life;
        let present = self
            .workers
            .iter()
            .filter(|w| w.alive && w.group.as_ref().is_some_and(|m| m.group == *group))
            .count();
        if present < membership.world as usize {
            if self.below(3) == 0 {
                self.workers[worker].group = None;
                self.report(worker, |seq| FromWorker::GroupFailed {
                    seq,
                    group: group.clone(),
                    rank: membership.rank,
                    failure: Failure {
                        class: FailureClass::Collective,
                        message: "a peer is gone".into(),
                    },
                });
            } else {
                self.after(2_000, Due::Step(worker, life, group.clone()));
            }
            return;
        }
        let own = &mut self.workers[worker];
        own.step += 1;
        let step = own.step;
        if membership.rank == 0 && (step.is_multiple_of(10) || step == STEPS) {
            self.put_checkpoint(worker, group, step);
        }
        if step < STEPS {
            self.after(500, Due::Step(worker, life, group.clone()));
        } else {
            self.workers[worker].group = None;
        }
    }

    fn put_checkpoint(&mut self, worker: usize, group: &GroupId, step: u64) {
        let key = format!("{}/{step}-g{}", group.stage, group.generation);
        let digest = Digest::of(key.as_bytes());
        let is_final = step == STEPS;
        let checkpoint = Checkpoint {
            step,
            generation: group.generation,
            key: key.clone(),
            digest,
            is_final,
        };
        let place = (group.stage.clone(), step, group.generation.0);
        let is_new = self.checkpoints.insert(place, checkpoint).is_none();
        assert!(is_new, "one generation wrote step {step} twice");
        self.report(worker, |seq| FromWorker::CheckpointCommitted {
            seq,
            checkpoint: CheckpointCommitted {
                group: group.clone(),
                step,
                key,
                digest,
                bytes: 1,
                is_final,
            },
        });
    }

    // ---- faults ---------------------------------------------------------------------------------------

    fn fault(&mut self) {
        if self.now > FAULTS_END {
            return;
        }
        self.faults += 1;
        let worker = self.below(WORKERS as u32) as usize;
        match self.below(10) {
            0..=2 => {
                self.workers[worker].alive = false;
                self.cut(worker);
                let pause = 100 + u64::from(self.below(20_000));
                self.after(pause, Due::Start(worker));
            }
            3..=5 => self.cut(worker),
            6 if self.machine.is_some() => self.kill_coordinator(),
            _ => {}
        }
        let next = 500 + u64::from(self.below(12_000));
        self.after(next, Due::Fault);
    }

    /// I2 over all lives: no generation and no term is used twice, and both only grow.
    fn check_history(&self) {
        let generations: Vec<_> = self
            .records
            .iter()
            .filter_map(|record| match record {
                Record::GenerationFormed { generation, .. } => Some(*generation),
                _ => None,
            })
            .collect();
        assert!(
            generations.windows(2).all(|w| w[0] < w[1]),
            "I2: {generations:?}"
        );
        assert_eq!(self.sealed.len(), 3, "every task stage was sealed");
        for (stage, log) in &Durable::replay(&self.records).stages {
            assert!(log.sealed.is_some(), "{stage} was not sealed");
        }
    }
}

fn simulate(seed: u64) -> World {
    let mut world = World::new(seed);
    world.run();
    world.check_history();
    world
}

#[test]
fn every_history_ends_well_and_keeps_every_promise() {
    let mut faults = 0;
    let mut terms = 0;
    for seed in 0..300 {
        let ended = std::panic::catch_unwind(|| {
            let world = simulate(seed);
            (world.faults, world.life)
        });
        match ended {
            Ok((n, lives)) => {
                faults += n;
                terms += lives;
            }
            Err(cause) => {
                eprintln!("seed {seed} failed");
                std::panic::resume_unwind(cause);
            }
        }
    }
    assert!(
        faults > 3_000,
        "{faults} faults are too few to show anything"
    );
    assert!(
        terms > 600,
        "{terms} coordinator lives are too few to show anything"
    );
}

#[test]
fn a_seed_replays() {
    let one = simulate(17);
    let two = simulate(17);
    assert_eq!(one.records, two.records);
    assert_eq!(one.now, two.now);
}
