//! Named histories of the machine. Every bug becomes one before it is fixed.

mod groups;
mod leases;
mod requests;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use distillery_common::group::{CheckpointCommitted, GroupId, Membership, Phase, Progress};
use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::task::{CommitSummary, Failure, FailureClass, Lease, TaskId};
use distillery_coordinator::plan::{Kind, Plan, Stage, Tasks, Training, Work};
use distillery_coordinator::scheduler::{
    Action, Checkpoint, ConnectionId, Decision, Durable, Event, Finding, FromWorker, Hello,
    Machine, Outcome, Record, Timings, ToWorker, Trouble,
};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn tasks(name: &str, kind: Kind, count: u64, after: &[usize], quarantine_limit: u64) -> Stage {
    Stage {
        name: name.into(),
        kind,
        after: after.to_vec(),
        work: Work::Tasks(Tasks {
            count,
            rows: count,
            bytes: count,
            quarantine_limit,
        }),
    }
}

fn training(
    name: &str,
    steps: u64,
    world: (u32, u32),
    after: &[usize],
    parent: Option<usize>,
) -> Stage {
    Stage {
        name: name.into(),
        kind: Kind::Distill,
        after: after.to_vec(),
        work: Work::Training(Training {
            steps,
            checkpoint_every: 10,
            keep_last: 1,
            global_batch: 8,
            reproducible: false,
            min_world: world.0,
            max_world: world.1,
            parent,
        }),
    }
}

/// Two shards, one training stage of two members, one export.
fn small_plan() -> Plan {
    Plan {
        stages: vec![
            tasks("trajectories", Kind::Trajectories, 2, &[], 0),
            training("seg8", 20, (2, 2), &[0], None),
            tasks("export", Kind::Export, 1, &[1], 0),
        ],
    }
}

/// A machine, the virtual clock, and a driver whose store never fails unless told to.
struct Scene {
    plan: Plan,
    machine: Machine,
    now: Duration,
    records: Vec<Record>,
    commits: BTreeMap<TaskId, CommitSummary>,
    checkpoints: BTreeMap<String, Vec<Checkpoint>>,
    told: BTreeMap<ConnectionId, Vec<ToWorker>>,
    closed: Vec<ConnectionId>,
    /// What needs no answer.
    done: Vec<Action>,
}

impl Scene {
    fn new(plan: Plan) -> Self {
        Self::with(plan, Timings::default())
    }

    fn with(plan: Plan, timings: Timings) -> Self {
        let claim = Record::TermClaimed {
            term: Term(1),
            endpoint: "here:1".into(),
        };
        let machine = Machine::new(plan.clone(), timings, Durable::replay([&claim]));
        let mut scene = Self {
            plan,
            machine,
            now: Duration::ZERO,
            records: vec![claim],
            commits: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            told: BTreeMap::new(),
            closed: vec![],
            done: vec![],
        };
        scene.happens(Event::Tick);
        scene
    }

    /// Another coordinator takes over with what the first one wrote down.
    fn restart(&mut self, plan: Plan, timings: Timings) {
        let term = Term(self.machine.term().0 + 1);
        self.records.push(Record::TermClaimed {
            term,
            endpoint: "there:1".into(),
        });
        self.machine = Machine::new(plan.clone(), timings, Durable::replay(&self.records));
        self.plan = plan;
        self.now = Duration::ZERO;
        self.told.clear();
        self.happens(Event::Tick);
    }

    fn happens(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.machine.handle(self.now, event) {
                events.extend(self.act(action));
            }
            self.machine.check().expect("an invariant broke");
        }
        assert_eq!(
            &Durable::replay(&self.records),
            self.machine.durable(),
            "I7: the fold of the journal is the durable part"
        );
    }

    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Journal(record) => self.records.push(record),
            Action::Send(connection, message) => {
                self.told.entry(connection).or_default().push(message);
            }
            Action::Close(connection) => self.closed.push(connection),
            Action::Inspect { stage, .. } => {
                return Some(Event::Inspected {
                    stage,
                    finding: Ok(self.finding(stage)),
                });
            }
            Action::VerifyCommit { task, .. } => {
                let commit = Ok(self.commits.get(&task).cloned());
                return Some(Event::CommitVerified { task, commit });
            }
            Action::VerifyCheckpoint { checkpoint, .. } => {
                return Some(Event::CheckpointVerified {
                    checkpoint,
                    result: Ok(()),
                });
            }
            Action::Seal { stage, .. } => {
                return Some(Event::Sealed {
                    stage,
                    result: Ok(Digest::of(b"sealed")),
                });
            }
            Action::Prune { .. }
            | Action::Index { .. }
            | Action::Explain(_)
            | Action::Finish(_) => {
                self.done.push(action);
            }
        }
        None
    }

    fn finding(&self, at: usize) -> Finding {
        let name = self.plan.stages[at].name.as_str();
        if matches!(self.plan.stages[at].work, Work::Training(_)) {
            return Finding::Checkpoints(self.checkpoints.get(name).cloned().unwrap_or_default());
        }
        let commits = self
            .commits
            .iter()
            .filter(|(task, _)| task.stage == name)
            .map(|(task, commit)| (task.index, commit.clone()))
            .collect();
        Finding::Tasks {
            commits,
            unindexed: vec![],
            sealed: None,
        }
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.machine.next_deadline().filter(|&d| d <= end) {
            self.now = self.now.max(deadline);
            self.happens(Event::Tick);
        }
        self.now = end;
    }

    fn join(&mut self, n: u64) -> Incarnation {
        self.hello(n, None, vec![], None)
    }

    fn hello(
        &mut self,
        n: u64,
        incarnation: Option<Incarnation>,
        leases: Vec<Lease>,
        group: Option<GroupId>,
    ) -> Incarnation {
        let connection = ConnectionId(n);
        self.happens(Event::Arrived {
            connection,
            hello: Hello {
                name: format!("w{n}"),
                host: "h".into(),
                device: "cpu".into(),
                slots: 1,
                incarnation,
                leases,
                group,
                starting: false,
            },
        });
        let welcome = self.told[&connection]
            .iter()
            .find_map(|message| match message {
                ToWorker::Welcome { incarnation } => Some(*incarnation),
                _ => None,
            });
        welcome.expect("a hello is answered")
    }

    fn says(&mut self, n: u64, message: FromWorker) {
        self.happens(Event::Said {
            connection: ConnectionId(n),
            message,
        });
    }

    fn beat(&mut self, n: u64) {
        self.says(
            n,
            FromWorker::Beat {
                seq: 1,
                tasks: vec![],
                group: None,
                rss_bytes: 1,
                starting: false,
                leaving: false,
            },
        );
    }

    fn granted(&self, n: u64) -> Vec<Lease> {
        let told = self.told.get(&ConnectionId(n)).cloned().unwrap_or_default();
        told.into_iter()
            .filter_map(|message| match message {
                ToWorker::Grant(lease) => Some(lease),
                _ => None,
            })
            .collect()
    }

    fn joined(&self, n: u64) -> Vec<Membership> {
        let told = self.told.get(&ConnectionId(n)).cloned().unwrap_or_default();
        told.into_iter()
            .filter_map(|message| match message {
                ToWorker::GroupJoin(membership) => Some(membership),
                _ => None,
            })
            .collect()
    }

    fn was_told(&self, n: u64, wanted: impl Fn(&ToWorker) -> bool) -> bool {
        self.told
            .get(&ConnectionId(n))
            .is_some_and(|told| told.iter().any(wanted))
    }

    /// The worker commits the task in the store and reports it.
    fn commits(&mut self, n: u64, lease: &Lease) {
        self.commits
            .entry(lease.task.clone())
            .or_insert(CommitSummary {
                key: format!("{}/COMMIT", lease.task),
                rows: 1,
                bytes: 1,
                digest: Digest::of(lease.to_string().as_bytes()),
            });
        self.says(
            n,
            FromWorker::TaskCommitted {
                seq: 7,
                lease: lease.clone(),
            },
        );
    }

    fn fails(&mut self, n: u64, lease: &Lease, class: FailureClass) {
        self.says(
            n,
            FromWorker::TaskFailed {
                seq: 8,
                lease: lease.clone(),
                failure: Failure {
                    class,
                    message: "it broke".into(),
                },
            },
        );
    }

    /// Both workers make both shards; the group forms and exchanges addresses.
    fn reach_stepping(&mut self) -> GroupId {
        self.make_rows();
        self.exchange(&[1, 2])
    }

    /// Two workers make both shards.
    fn make_rows(&mut self) {
        for n in [1, 2] {
            self.join(n);
        }
        for n in [1, 2] {
            let lease = self.granted(n).pop().expect("there are two tasks");
            self.commits(n, &lease);
        }
    }

    fn exchange(&mut self, connections: &[u64]) -> GroupId {
        let mut id = None;
        for &n in connections {
            let membership = self.joined(n).pop().expect("it was told to join");
            id = Some(membership.group.clone());
            self.says(
                n,
                FromWorker::GroupReady {
                    seq: 9,
                    group: membership.group,
                    rank: membership.rank,
                    address: format!("h:{n}"),
                },
            );
        }
        id.expect("somebody joined")
    }

    fn checkpoint(&mut self, n: u64, group: &GroupId, step: u64, is_final: bool) {
        let key = format!("checkpoints/{}/{step}-g{}", group.stage, group.generation);
        let digest = Digest::of(key.as_bytes());
        self.checkpoints
            .entry(group.stage.clone())
            .or_default()
            .push(Checkpoint {
                step,
                generation: group.generation,
                key: key.clone(),
                digest,
                is_final,
            });
        self.says(
            n,
            FromWorker::CheckpointCommitted {
                seq: 10,
                checkpoint: CheckpointCommitted {
                    group: group.clone(),
                    step,
                    key,
                    digest,
                    bytes: 1,
                    is_final,
                },
            },
        );
    }
}

#[test]
fn a_run_goes_from_rows_to_export() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    assert!(scene.was_told(
        1,
        |m| matches!(m, ToWorker::GroupPeers { addresses, .. } if addresses.texts() == ["h:1", "h:2"])
    ));
    scene.checkpoint(1, &group, 10, false);
    scene.checkpoint(1, &group, 20, true);
    let lease = scene.granted(1).pop().expect("the export is left");
    assert_eq!(lease.task.stage, "export");
    scene.commits(1, &lease);
    assert_eq!(scene.machine.outcome(), Some(&Outcome::Succeeded));
    assert!(scene.was_told(2, |m| matches!(m, ToWorker::Drain { .. })));
}

#[test]
fn a_lost_workers_task_is_granted_again_after_300_ms() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    let lost = scene.granted(1).pop().expect("a task");
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.join(2);
    let first = scene.granted(2).pop().expect("the other task");
    assert_ne!(first.task, lost.task);
    scene.commits(2, &first);
    assert_eq!(
        scene.granted(2).len(),
        1,
        "the lost one may still come back"
    );
    scene.wait(ms(300));
    let again = scene.granted(2).pop().expect("granted again");
    assert_eq!((again.task, again.attempt), (lost.task, lost.attempt + 1));
}

#[test]
fn a_worker_that_reconnects_in_time_keeps_its_lease() {
    let mut scene = Scene::new(small_plan());
    let incarnation = scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.wait(ms(200));
    let back = scene.hello(11, Some(incarnation), vec![lease.clone()], None);
    assert_eq!(back, incarnation);
    scene.wait(ms(5000));
    scene.commits(11, &lease);
    let told_revoke = scene.was_told(11, |m| matches!(m, ToWorker::Revoke { .. }));
    assert!(!told_revoke, "its lease never ended");
}

#[test]
fn a_late_worker_gets_a_new_registration_and_its_old_lease_is_void() {
    let mut scene = Scene::new(small_plan());
    let old = scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.wait(ms(400));
    let new = scene.hello(11, Some(old), vec![lease.clone()], None);
    assert_ne!(new, old);
    let again = scene.granted(11).pop().expect("work for the new one");
    scene.fails(11, &lease, FailureClass::Unknown);
    assert_eq!(scene.granted(11), [again], "a void lease changes nothing");
    assert!(scene.was_told(11, |m| matches!(m, ToWorker::ReportAck { seq: 8 })));
}

#[test]
fn a_silent_worker_is_lost_after_its_lease_and_no_earlier() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    scene.wait(ms(34_000));
    assert!(scene.closed.is_empty());
    scene.wait(ms(2_000));
    assert_eq!(scene.closed, [ConnectionId(1)]);
}

#[test]
fn a_beat_renews_everything() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    for _ in 0..60 {
        scene.wait(ms(2_000));
        scene.beat(1);
    }
    assert!(scene.closed.is_empty());
    assert!(scene.was_told(1, |m| matches!(m, ToWorker::BeatAck { seq: 1 })));
}

#[test]
fn the_second_of_two_commits_is_acknowledged_and_changes_nothing() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.commits(1, &lease);
    let before = scene.records.len();
    scene.told.clear();
    scene.commits(1, &lease);
    assert_eq!(scene.records.len(), before);
    assert!(scene.was_told(1, |m| matches!(m, ToWorker::ReportAck { seq: 7 })));
}

#[test]
fn a_report_without_a_commit_is_not_believed() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.says(
        1,
        FromWorker::TaskCommitted {
            seq: 7,
            lease: lease.clone(),
        },
    );
    let other = scene
        .granted(1)
        .pop()
        .expect("meanwhile it has the other task");
    scene.commits(1, &other);
    let again = scene.granted(1).pop().expect("granted again");
    assert_eq!(again.task, lease.task);
    assert_eq!(again.attempt, 2);
}

#[test]
fn the_fourth_counted_failure_ends_the_run() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    for n in 1..=4 {
        assert_eq!(scene.machine.outcome(), None, "before failure {n}");
        scene.wait(ms(60_000 / 4));
        scene.beat(1);
        let lease = scene
            .granted(1)
            .into_iter()
            .rfind(|lease| lease.task.index == 0);
        let Some(lease) = lease else {
            panic!("task 0 was not granted a {n}th time")
        };
        scene.fails(1, &lease, FailureClass::Io);
        // The worker may meanwhile hold the other task: it fails free of charge.
        let held = scene.granted(1).pop().expect("something");
        if held.task.index != 0 {
            scene.commits(1, &held);
        }
    }
    let Some(Outcome::Failed { message }) = scene.machine.outcome() else {
        panic!("the run goes on")
    };
    assert!(
        message.contains("trajectories/0 failed 4 times"),
        "{message}"
    );
}

#[test]
fn free_failures_are_free_but_not_without_end() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    for _ in 0..10 {
        let lease = scene.granted(1).pop().expect("a task");
        scene.fails(1, &lease, FailureClass::Preempted);
    }
    assert!(
        scene
            .machine
            .durable()
            .stage("trajectories")
            .failures
            .is_empty()
    );
    for _ in 0..200 {
        let Some(lease) = scene.granted(1).pop() else {
            break;
        };
        scene.fails(1, &lease, FailureClass::HostLost);
        scene.wait(ms(31_000));
        scene.beat(1);
        if scene.machine.outcome().is_some() {
            break;
        }
    }
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Failed { .. })
    ));
}

#[test]
fn bad_input_is_set_aside_as_far_as_the_recipe_allows() {
    let mut plan = small_plan();
    plan.stages[0] = tasks("trajectories", Kind::Trajectories, 3, &[], 1);
    let mut scene = Scene::new(plan);
    scene.join(1);
    let first = scene.granted(1).pop().expect("a task");
    scene.fails(1, &first, FailureClass::BadInput);
    assert_eq!(scene.machine.outcome(), None);
    let second = scene.granted(1).pop().expect("another task");
    assert_ne!(second.task, first.task);
    scene.fails(1, &second, FailureClass::BadInput);
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Failed { .. })
    ));
}

#[test]
fn a_config_failure_ends_the_run_at_once() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.fails(1, &lease, FailureClass::Config);
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Failed { .. })
    ));
}

#[test]
fn a_killed_rank_aborts_its_group_at_once_and_the_next_starts_from_the_newest_checkpoint() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    scene.checkpoint(1, &group, 10, false);
    scene.happens(Event::Closed {
        connection: ConnectionId(2),
    });
    scene.wait(ms(300));
    assert!(scene.was_told(
        1,
        |m| matches!(m, ToWorker::GroupAbort { group: g, .. } if *g == group)
    ));
    scene.join(3);
    let membership = scene.joined(3).pop().expect("the replacement joins");
    assert_eq!(membership.group.generation, Generation(2));
    assert_eq!(membership.base_step, 10);
    assert_eq!(
        scene.joined(1).pop().expect("so does the survivor").group,
        membership.group
    );
}

#[test]
fn a_checkpoint_whose_report_was_lost_is_found_in_the_store() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    scene.checkpoints.insert(
        "seg8".into(),
        vec![Checkpoint {
            step: 10,
            generation: group.generation,
            key: "k".into(),
            digest: Digest::of(b"k"),
            is_final: false,
        }],
    );
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.wait(ms(300));
    scene.join(3);
    let membership = scene.joined(3).pop().expect("a new group");
    assert_eq!(
        (membership.base_step, membership.base_checkpoint),
        (10, Some("k".into()))
    );
}

#[test]
fn a_zombie_groups_late_checkpoint_is_acknowledged_and_ignored() {
    let mut scene = Scene::new(small_plan());
    let zombie = scene.reach_stepping();
    scene.happens(Event::Closed {
        connection: ConnectionId(2),
    });
    scene.wait(ms(300));
    scene.join(3);
    let live = scene.exchange(&[1, 3]);
    scene.checkpoint(1, &zombie, 10, false);
    assert!(scene.machine.durable().stage("seg8").checkpoints.is_empty());
    assert!(scene.was_told(1, |m| matches!(m, ToWorker::ReportAck { seq: 10 })));
    scene.checkpoint(1, &live, 10, false);
    assert_eq!(scene.machine.durable().stage("seg8").checkpoints.len(), 1);
}

#[test]
fn three_generations_without_a_checkpoint_end_the_run() {
    let mut scene = Scene::new(small_plan());
    let mut group = scene.reach_stepping();
    for n in 1..=3 {
        assert_eq!(scene.machine.outcome(), None, "before failure {n}");
        scene.says(
            1,
            FromWorker::GroupFailed {
                seq: 11,
                group: group.clone(),
                rank: 0,
                failure: Failure {
                    class: FailureClass::Collective,
                    message: "ring broke".into(),
                },
            },
        );
        if n < 3 {
            scene.wait(ms(1_000));
            group = scene.exchange(&[1, 2]);
            assert_eq!(group.generation, Generation(n + 1));
        }
    }
    let Some(Outcome::Failed { message }) = scene.machine.outcome() else {
        panic!("the run goes on")
    };
    assert!(message.contains("3 groups in a row"), "{message}");
}

#[test]
fn a_checkpoint_starts_the_count_of_generations_anew() {
    let mut scene = Scene::new(small_plan());
    let mut group = scene.reach_stepping();
    for step in [10, 11, 12, 13, 14] {
        scene.checkpoint(1, &group, step, false);
        scene.says(
            2,
            FromWorker::GroupFailed {
                seq: 11,
                group: group.clone(),
                rank: 1,
                failure: Failure {
                    class: FailureClass::Unknown,
                    message: "it broke".into(),
                },
            },
        );
        group = scene.exchange(&[1, 2]);
    }
    assert_eq!(scene.machine.outcome(), None);
}

#[test]
fn laggards_of_the_exchange_are_named_and_another_group_forms() {
    let mut scene = Scene::new(small_plan());
    scene.make_rows();
    scene.exchange(&[1]);
    for _ in 0..31 {
        scene.wait(ms(2_000));
        scene.beat(1);
        scene.beat(2);
    }
    let failed = scene.records.iter().any(|record| {
        matches!(record, Record::GenerationFailed { reason, .. } if reason == "not ready in time: w2")
    });
    assert!(failed, "{:?}", scene.records);
    assert_eq!(scene.joined(1).len(), 2);
}

#[test]
fn a_group_that_stands_still_is_given_up() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    let progress = |step| FromWorker::Beat {
        seq: 1,
        tasks: vec![],
        group: Some(Progress {
            group: group.clone(),
            phase: Phase::Stepping,
            step,
            total_steps: 20,
            loss: 1.0,
            samples_per_second: 1.0,
            step_ms: 100.0,
        }),
        rss_bytes: 1,
        starting: false,
        leaving: false,
    };
    scene.says(1, progress(1));
    scene.says(1, progress(9));
    for _ in 0..29 {
        scene.wait(ms(2_000));
        scene.says(1, progress(9));
        scene.says(2, progress(9));
    }
    assert!(!scene.was_told(1, |m| matches!(m, ToWorker::GroupAbort { .. })));
    for _ in 0..2 {
        scene.wait(ms(2_000));
        scene.says(1, progress(9));
        scene.says(2, progress(9));
    }
    assert!(scene.was_told(1, |m| matches!(m, ToWorker::GroupAbort { .. })));
}

#[test]
fn stopping_drains_with_a_checkpoint_and_ends_when_all_have_left() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    scene.happens(Event::StopRequested {
        now: false,
        returns: false,
    });
    assert!(scene.was_told(1, |m| matches!(
        m,
        ToWorker::Drain {
            checkpoint: true,
            ..
        }
    )));
    scene.checkpoint(1, &group, 13, false);
    for n in [1, 2] {
        scene.says(
            n,
            FromWorker::Goodbye {
                reason: "drained".into(),
            },
        );
    }
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Stopped { .. })
    ));
    let log = scene.machine.durable().stage("seg8");
    assert_eq!(log.checkpoints.last().map(|c| c.step), Some(13));
    assert_eq!(log.fruitless, 0, "leaving on purpose is no failure");
    scene.restart(small_plan(), Timings::default());
    for n in [21, 22] {
        scene.join(n);
    }
    assert_eq!(scene.joined(21).pop().expect("resumed").base_step, 13);
}

#[test]
fn stopping_twice_ends_at_once() {
    let mut scene = Scene::new(small_plan());
    scene.reach_stepping();
    scene.happens(Event::StopRequested {
        now: false,
        returns: false,
    });
    scene.happens(Event::StopRequested {
        now: true,
        returns: false,
    });
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Stopped { .. })
    ));
}

#[test]
fn a_restart_goes_on_with_what_is_committed() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.commits(1, &lease);
    scene.restart(small_plan(), Timings::default());
    let new = scene.join(2);
    assert_eq!(new.term(), Term(2));
    for _ in 0..7 {
        scene.wait(Duration::from_secs(5));
        scene.beat(2);
    }
    let granted = scene.granted(2);
    assert_eq!(granted.len(), 1, "only the other task is left");
    assert_ne!(granted[0].task, lease.task);
}

#[test]
fn a_worker_that_outlives_its_coordinator_keeps_its_task() {
    let mut scene = Scene::new(small_plan());
    let incarnation = scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.restart(small_plan(), Timings::default());
    let back = scene.hello(2, Some(incarnation), vec![lease.clone()], None);
    assert_eq!(back, incarnation);
    scene.join(3);
    scene.commits(2, &lease);
    for _ in 0..7 {
        scene.wait(Duration::from_secs(5));
        scene.beat(2);
        scene.beat(3);
    }
    let granted: Vec<_> = [2, 3].into_iter().flat_map(|n| scene.granted(n)).collect();
    assert_eq!(granted.len(), 1, "only the other task is left");
    assert_ne!(granted[0].task, lease.task);
    assert!(!scene.was_told(2, |m| matches!(m, ToWorker::Revoke { .. })));
}

#[test]
fn a_group_that_outlives_its_coordinator_goes_on() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    let members: Vec<_> = scene
        .joined(1)
        .iter()
        .chain(&scene.joined(2))
        .cloned()
        .collect();
    assert_eq!(members.len(), 2);
    scene.restart(small_plan(), Timings::default());
    let generations = scene.machine.durable().generation;
    for n in [1, 2] {
        let incarnation = Incarnation::new(Term(1), n as u32);
        let back = scene.hello(10 + n, Some(incarnation), vec![], Some(group.clone()));
        assert_eq!(back, incarnation);
    }
    scene.checkpoint(11, &group, 20, true);
    assert_eq!(
        scene.machine.durable().generation,
        generations,
        "no new group"
    );
    assert!(scene.machine.durable().stage("seg8").sealed.is_some());
}

#[test]
fn a_group_whose_members_do_not_come_back_is_replaced() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    scene.restart(small_plan(), Timings::default());
    let survivor = Incarnation::new(Term(1), 1);
    scene.hello(11, Some(survivor), vec![], Some(group.clone()));
    scene.join(12);
    scene.wait(ms(9_000));
    scene.beat(11);
    scene.beat(12);
    assert!(scene.joined(12).is_empty());
    scene.wait(ms(1_000));
    assert!(scene.was_told(11, |m| matches!(m, ToWorker::GroupAbort { .. })));
    let next = scene.joined(12).pop().expect("a new group");
    assert_eq!(next.group.generation, Generation(2));
    assert_eq!(
        scene.machine.durable().stage("seg8").fruitless,
        0,
        "a restart is no failure"
    );
}

/// Found by the simulation when plans got branches: the worker was free, and joined the other stage's group too.
#[test]
fn a_group_whose_member_comes_back_without_it_is_given_up_at_once() {
    let mut scene = Scene::new(branching_plan());
    let group = scene.reach_stepping();
    scene.restart(branching_plan(), Timings::default());
    let [one, two] = [1, 2].map(|n| Incarnation::new(Term(1), n));
    scene.hello(11, Some(one), vec![], Some(group.clone()));
    scene.hello(12, Some(two), vec![], None);
    assert!(scene.was_told(11, |m| matches!(m, ToWorker::GroupAbort { .. })));
    let next = [11, 12].map(|n| scene.joined(n).pop().expect("a new group").group);
    assert_eq!(next[0], next[1]);
    assert_eq!(
        (next[0].stage.as_str(), next[0].generation),
        ("seg8", Generation(2))
    );
    let log = scene.machine.durable().stage("seg8");
    assert_eq!(log.fruitless, 0, "a restart is no failure");
}

#[test]
fn a_group_of_another_size_than_its_states_is_told_of() {
    let mut plan = small_plan();
    plan.stages[1] = training("seg8", 20, (1, 2), &[0], None);
    let mut scene = Scene::new(plan.clone());
    let group = scene.reach_stepping();
    scene.checkpoint(1, &group, 10, false);
    let told = |scene: &Scene| {
        let explained = scene.done.iter().filter_map(|action| match action {
            Action::Explain(decision @ Decision::Resized { .. }) => Some(decision.to_string()),
            _ => None,
        });
        explained.collect::<Vec<_>>()
    };
    scene.restart(plan, Timings::default());
    assert!(told(&scene).is_empty());
    scene.join(11);
    for _ in 0..60 {
        scene.wait(ms(1_000));
        scene.beat(11);
    }
    let next = scene.joined(11).pop().expect("a new group");
    assert_eq!((next.world, next.base_step), (1, 10));
    assert_eq!(
        told(&scene),
        [
            "seg8 goes on with 1 engine instead of 2: the result will not be bit-equal to that of an undisturbed run"
        ]
    );
}

#[test]
fn idle_workers_wait_for_their_group_instead_of_taking_later_work() {
    let mut plan = small_plan();
    plan.stages[2] = tasks("export", Kind::Reference, 5, &[], 0);
    let mut scene = Scene::new(plan);
    for n in [1, 2] {
        scene.join(n);
    }
    let first = scene.granted(1).pop().expect("a task");
    let second = scene.granted(2).pop().expect("a task");
    scene.commits(1, &first);
    scene.commits(2, &second);
    // Until the rows are sealed there is nothing better to do.
    let early = [1, 2].map(|n| scene.granted(n).pop().expect("later work"));
    assert!(early.iter().all(|lease| lease.task.stage == "export"));
    scene.commits(1, &early[0]);
    assert_eq!(scene.granted(1).len(), 2, "kept for the group");
    scene.commits(2, &early[1]);
    assert_eq!(scene.joined(1).len(), 1);
    assert_eq!(scene.joined(2).len(), 1);
}

#[test]
fn a_stage_starts_from_its_parents_final_checkpoint() {
    let mut plan = small_plan();
    plan.stages
        .push(training("seg4", 10, (2, 2), &[0, 1], Some(1)));
    let mut scene = Scene::new(plan);
    let group = scene.reach_stepping();
    scene.checkpoint(1, &group, 20, true);
    let exported = scene.granted(1).pop().expect("export is due as well");
    assert_eq!(exported.task.stage, "export");
    scene.commits(1, &exported);
    let membership = scene.joined(2).pop().expect("the next stage");
    assert_eq!(membership.group.stage, "seg4");
    assert_eq!(
        membership.parent_checkpoint,
        Some("checkpoints/seg8/20-g1".into())
    );
    assert_eq!(
        (membership.base_step, membership.base_checkpoint),
        (0, None)
    );
}

/// Two stages from the teacher, and one from the first of them.
fn branching_plan() -> Plan {
    Plan {
        stages: vec![
            tasks("trajectories", Kind::Trajectories, 2, &[], 0),
            training("seg8", 20, (2, 2), &[0], None),
            training("lcm", 20, (2, 2), &[0], None),
            training("seg4", 20, (2, 2), &[0, 1], Some(1)),
        ],
    }
}

#[test]
fn stages_from_the_teacher_take_turns_and_get_no_parent() {
    let mut scene = Scene::new(branching_plan());
    let first = scene.reach_stepping();
    assert_eq!(first.stage, "seg8");
    // Longer than idle workers are kept for a group.
    for _ in 0..20 {
        scene.wait(ms(2_000));
        scene.beat(1);
        scene.beat(2);
    }
    scene.checkpoint(1, &first, 20, true);
    let second = scene.joined(1).pop().expect("the next stage");
    assert_eq!(
        (second.group.stage.as_str(), second.parent_checkpoint),
        ("lcm", None)
    );
    scene.exchange(&[1, 2]);
    scene.checkpoint(1, &second.group, 20, true);
    let third = scene.joined(1).pop().expect("the last stage");
    assert_eq!(third.group.stage, "seg4");
    let parent = Some(String::from("checkpoints/seg8/20-g1"));
    assert_eq!(
        third.parent_checkpoint, parent,
        "not that of the stage before"
    );
}

#[test]
fn stages_from_the_teacher_train_at_once_where_workers_are_many() {
    let mut scene = Scene::new(branching_plan());
    scene.make_rows();
    scene.join(3);
    scene.join(4);
    let stage = |memberships: Vec<Membership>| memberships.last().map(|m| m.group.stage.clone());
    let stages: Vec<_> = (1..=4).map(|n| stage(scene.joined(n))).collect();
    for (name, members) in [("seg8", 2), ("lcm", 2), ("seg4", 0)] {
        let n = stages
            .iter()
            .flatten()
            .filter(|stage| *stage == name)
            .count();
        assert_eq!(n, members, "{name}: {stages:?}");
    }
}

#[test]
fn trouble_that_may_pass_is_waited_out_and_other_trouble_ends_the_run() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    let verified = |commit| Event::CommitVerified {
        task: lease.task.clone(),
        commit,
    };
    let said = Event::Said {
        connection: ConnectionId(1),
        message: FromWorker::TaskCommitted {
            seq: 7,
            lease: lease.clone(),
        },
    };
    scene.machine.handle(scene.now, said);
    let actions = scene
        .machine
        .handle(scene.now, verified(Err(Trouble::Transient("503".into()))));
    assert!(
        actions
            .iter()
            .any(|a| matches!(a, Action::VerifyCommit { after_ms: 1000, .. })),
        "{actions:?}"
    );
    assert!(
        !actions
            .iter()
            .any(|a| matches!(a, Action::Send(_, ToWorker::ReportAck { .. })))
    );
    scene
        .machine
        .handle(scene.now, verified(Err(Trouble::Permanent("torn".into()))));
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Failed { .. })
    ));
}

#[test]
fn a_launcher_that_gives_up_ends_a_run_without_workers() {
    let mut scene = Scene::new(small_plan());
    scene.happens(Event::LauncherFailed {
        message: "no engine".into(),
    });
    assert_eq!(
        scene.machine.outcome(),
        Some(&Outcome::Failed {
            message: "no engine".into()
        })
    );
}

#[test]
fn waiting_for_workers_does_not_spin() {
    let mut scene = Scene::new(small_plan());
    scene.make_rows();
    for n in [1, 2] {
        scene.says(
            n,
            FromWorker::Goodbye {
                reason: "drained".into(),
            },
        );
    }
    scene.join(3);
    for _ in 0..60 {
        scene.wait(ms(2_000));
        scene.beat(3);
    }
    let deadline = scene
        .machine
        .next_deadline()
        .expect("somebody may fall silent");
    assert!(deadline > scene.now - ms(1), "{deadline:?} has passed");
}

#[test]
fn old_checkpoints_go_but_never_the_newest_on_the_lineage_nor_what_lies_beyond() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    for step in [5, 10, 15] {
        scene.checkpoint(1, &group, step, false);
    }
    let pruned = scene.done.iter().rev().find_map(|action| match action {
        Action::Prune {
            before,
            pinned,
            live,
            ..
        } => Some((*before, pinned.clone(), *live)),
        _ => None,
    });
    let newest = [(15, Generation(1))].into();
    assert_eq!(pruned, Some((15, newest, Some(Generation(1)))));
}

#[test]
fn a_launcher_that_gives_up_while_the_run_stops_is_no_failure() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    scene.happens(Event::StopRequested {
        now: false,
        returns: false,
    });
    scene.happens(Event::LauncherFailed {
        message: "it left too often".into(),
    });
    scene.says(
        1,
        FromWorker::Goodbye {
            reason: "drained".into(),
        },
    );
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Stopped { .. })
    ));
}

/// Found by the simulation (seed 1326): where the peers listen was said on a stream that the member had left, and the
/// group stood still until it was taken for hanging.
#[test]
fn a_member_that_did_not_hear_where_its_peers_listen_is_told_again() {
    let mut scene = Scene::new(small_plan());
    let group = scene.reach_stepping();
    let member = Incarnation::new(Term(1), 1);
    let back = scene.hello(11, Some(member), vec![], Some(group.clone()));
    assert_eq!(back, member);
    let waits = |phase| FromWorker::Beat {
        seq: 1,
        tasks: vec![],
        group: Some(Progress {
            group: group.clone(),
            phase,
            step: 0,
            total_steps: 20,
            loss: 1.0,
            samples_per_second: 1.0,
            step_ms: 1.0,
        }),
        rss_bytes: 1,
        starting: false,
        leaving: false,
    };
    let peers = |told: &ToWorker| matches!(told, ToWorker::GroupPeers { .. });
    scene.says(11, waits(Phase::Syncing));
    assert!(!scene.was_told(11, peers));
    scene.says(11, waits(Phase::Exchanging));
    assert!(scene.was_told(11, peers));

    // A coordinator that did not form the group does not know the addresses.
    scene.restart(small_plan(), Timings::default());
    for n in [1, 2] {
        let incarnation = Incarnation::new(Term(1), n as u32);
        scene.hello(20 + n, Some(incarnation), vec![], Some(group.clone()));
    }
    scene.says(21, waits(Phase::Exchanging));
    let aborted = |told: &ToWorker| matches!(told, ToWorker::GroupAbort { .. });
    assert!(scene.was_told(21, aborted) && scene.was_told(22, aborted));
    assert_eq!(scene.machine.durable().stage("seg8").fruitless, 0);
}
