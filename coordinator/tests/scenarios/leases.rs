//! Who is given which task, and for how long it stays his.

use distillery_common::task::Progress;

use super::*;

fn one_stage(count: u64) -> Plan {
    Plan {
        stages: vec![tasks("trajectories", Kind::Trajectories, count, &[], 0)],
    }
}

fn indexes(leases: &[Lease]) -> Vec<u64> {
    leases.iter().map(|lease| lease.task.index).collect()
}

#[test]
fn a_silent_worker_is_given_nothing_new_and_keeps_what_it_holds() {
    let mut scene = Scene::new(one_stage(2));
    scene.join(1);
    let held = scene.granted(1).pop().expect("a task");
    scene.wait(Duration::from_secs(7));
    let state = |scene: &Scene| scene.machine.view(scene.now).workers[0].state;
    assert_eq!(state(&scene), "suspect");
    scene.join(2);
    assert_eq!(indexes(&scene.granted(2)), [1], "the other task");
    scene.beat(1);
    assert_eq!(state(&scene), "busy");
    scene.commits(1, &held);
    assert!(scene.was_told(1, |told| matches!(told, ToWorker::ReportAck { .. })));
}

#[test]
fn an_idle_worker_that_is_silent_is_no_candidate() {
    let mut scene = Scene::new(small_plan());
    scene.make_rows();
    let group = scene.exchange(&[1, 2]);
    assert_eq!(group.generation, Generation(1));
    let mut scene = Scene::new(one_stage(1));
    for n in [1, 2] {
        scene.join(n);
    }
    let lease = scene.granted(1).pop().expect("a task");
    scene.wait(Duration::from_secs(5));
    scene.beat(1);
    scene.wait(Duration::from_secs(3));
    scene.beat(1);
    scene.fails(1, &lease, FailureClass::Preempted);
    scene.wait(ms(1));
    assert_eq!(scene.granted(2).len(), 0, "not heard for 8 s");
    assert_eq!(scene.granted(1).len(), 2);
}

/// Eight tasks on four workers: seven take a second each, the eighth hangs.
fn straggling() -> (Scene, Lease) {
    straggling_with(0)
}

/// The same, where some tasks may be set aside.
fn straggling_with(quarantine_limit: u64) -> (Scene, Lease) {
    let trajectories = tasks("trajectories", Kind::Trajectories, 8, &[], quarantine_limit);
    let mut scene = Scene::new(Plan {
        stages: vec![trajectories],
    });
    for n in 1..=4 {
        scene.join(n);
    }
    let straggler = scene.granted(4).pop().expect("a task");
    for _ in 0..2 {
        scene.wait(Duration::from_secs(1));
        for n in 1..=3 {
            let lease = scene.granted(n).pop().expect("a task");
            scene.commits(n, &lease);
        }
    }
    scene.wait(Duration::from_secs(1));
    let last = scene.granted(1).pop().expect("the eighth task");
    scene.commits(1, &last);
    for n in 1..=4 {
        scene.beat(n);
    }
    scene.wait(Duration::from_secs(1));
    (scene, straggler)
}

fn copy_of(scene: &Scene, straggler: &Lease) -> (u64, Lease) {
    let copies = (1..=4).filter_map(|n| {
        let lease = scene.granted(n).pop()?;
        let is_copy = lease.task == straggler.task && lease != *straggler;
        is_copy.then_some((n, lease))
    });
    let copies: Vec<_> = copies.collect();
    assert_eq!(copies.len(), 1, "one copy, not more");
    copies[0].clone()
}

#[test]
fn a_straggler_gets_one_copy_and_the_first_commit_wins() {
    let (mut scene, straggler) = straggling();
    let (n, copy) = copy_of(&scene, &straggler);
    assert_eq!(copy.attempt, straggler.attempt + 1);
    scene.wait(Duration::from_secs(2));
    copy_of(&scene, &straggler);
    scene.commits(n, &copy);
    let revoked =
        |told: &ToWorker| matches!(told, ToWorker::Revoke { lease, .. } if *lease == straggler);
    assert!(scene.was_told(4, revoked));
    assert_eq!(scene.machine.outcome(), Some(&Outcome::Succeeded));
}

#[test]
fn a_straggler_may_still_win_and_its_copy_is_revoked() {
    let (mut scene, straggler) = straggling();
    let (n, copy) = copy_of(&scene, &straggler);
    scene.commits(4, &straggler);
    let revoked =
        |told: &ToWorker| matches!(told, ToWorker::Revoke { lease, .. } if *lease == copy);
    assert!(scene.was_told(n, revoked));
    assert_eq!(scene.machine.outcome(), Some(&Outcome::Succeeded));
}

#[test]
fn losing_one_of_two_attempts_leaves_the_other() {
    let (mut scene, straggler) = straggling();
    let (n, copy) = copy_of(&scene, &straggler);
    scene.happens(Event::Closed {
        connection: ConnectionId(4),
    });
    scene.wait(ms(400));
    let attempts: usize = (1..=3)
        .map(|n| scene.granted(n))
        .map(|leases| leases.iter().filter(|l| l.task == straggler.task).count())
        .sum();
    assert_eq!(attempts, 1, "the copy is enough");
    scene.fails(n, &copy, FailureClass::Preempted);
    scene.wait(ms(1));
    let again: Vec<_> = (1..=3).flat_map(|n| scene.granted(n)).collect();
    let again = again.iter().filter(|l| l.task == straggler.task).count();
    assert_eq!(again, 2, "nobody works on it: granted again");
}

/// Found by the simulation (seed 1863 of its first form): the second attempt stayed leased to a task that was set aside.
#[test]
fn a_task_that_is_set_aside_takes_both_attempts_with_it() {
    let (mut scene, straggler) = straggling_with(1);
    let (n, copy) = copy_of(&scene, &straggler);
    scene.fails(4, &straggler, FailureClass::BadInput);
    let revoked =
        |told: &ToWorker| matches!(told, ToWorker::Revoke { lease, .. } if *lease == copy);
    assert!(scene.was_told(n, revoked));
    assert_eq!(scene.machine.outcome(), Some(&Outcome::Succeeded));
}

#[test]
fn a_task_is_not_set_aside_while_its_commit_is_being_read() {
    let (mut scene, straggler) = straggling_with(1);
    let (n, copy) = copy_of(&scene, &straggler);
    let reported = Event::Said {
        connection: ConnectionId(n),
        message: FromWorker::TaskCommitted {
            seq: 9,
            lease: copy.clone(),
        },
    };
    let reading = scene.machine.handle(scene.now, reported);
    let is_read = |action: &Action| matches!(action, Action::VerifyCommit { .. });
    assert!(reading.iter().any(is_read));
    scene.fails(4, &straggler, FailureClass::BadInput);
    let commit = Ok(Some(CommitSummary {
        key: "k".into(),
        rows: 1,
        bytes: 1,
        digest: Digest::of(b"the copy's"),
    }));
    scene.happens(Event::CommitVerified {
        task: copy.task,
        commit,
    });
    let log = scene.machine.durable().stage("trajectories");
    assert!(log.quarantined.is_empty());
    assert_eq!(scene.machine.outcome(), Some(&Outcome::Succeeded));
}

#[test]
fn no_copy_is_made_while_tasks_are_open_or_most_are_not_done() {
    let mut scene = Scene::new(one_stage(8));
    for n in 1..=4 {
        scene.join(n);
    }
    scene.wait(Duration::from_secs(1));
    for n in 1..=3 {
        let lease = scene.granted(n).pop().expect("a task");
        scene.commits(n, &lease);
    }
    for n in 5..=9 {
        scene.join(n);
    }
    scene.wait(Duration::from_secs(3));
    let granted: usize = (1..=9).map(|n| scene.granted(n).len()).sum();
    assert_eq!(granted, 8, "each task once: three of eight are done");
}

fn with_reattach() -> Timings {
    Timings {
        reattach: Duration::from_secs(20),
        ..Timings::default()
    }
}

#[test]
fn after_a_restart_what_was_never_leased_is_granted_at_once() {
    let mut scene = Scene::new(one_stage(2500));
    let first = scene.join(1);
    let held = scene.granted(1).pop().expect("a task");
    let marks = |scene: &Scene| {
        let mark = |record: &Record| match record {
            Record::GrantsReached { below, .. } => Some(*below),
            _ => None,
        };
        scene.records.iter().filter_map(mark).collect::<Vec<_>>()
    };
    assert_eq!(marks(&scene), [16]);
    scene.restart(one_stage(2500), with_reattach());
    scene.join(2);
    assert_eq!(indexes(&scene.granted(2)), [16]);
    assert_eq!(marks(&scene), [16, 32]);
    scene.hello(1, Some(first), vec![held.clone()], None);
    let revoked = |told: &ToWorker| matches!(told, ToWorker::Revoke { .. });
    assert!(!scene.was_told(1, revoked), "the holder keeps its lease");
    scene.commits(1, &held);
    assert_eq!(indexes(&scene.granted(1)), [17]);
    for _ in 0..3 {
        scene.wait(Duration::from_secs(7));
        scene.beat(1);
        scene.beat(2);
    }
    let lease = scene.granted(2).pop().expect("the first task");
    scene.commits(2, &lease);
    assert_eq!(
        indexes(&scene.granted(2)),
        [16, 1],
        "whoever had it has not come back"
    );
}

#[test]
fn where_no_worker_outlives_its_coordinator_nothing_is_kept_for_it() {
    let mut scene = Scene::new(one_stage(3));
    scene.join(1);
    let local = Timings {
        reattach: Duration::ZERO,
        ..Timings::default()
    };
    scene.restart(one_stage(3), local);
    scene.join(2);
    assert_eq!(indexes(&scene.granted(2)), [0]);
}

#[test]
fn a_restart_looks_only_where_tasks_were_leased() {
    let mut scene = Scene::new(one_stage(2500));
    let machine = &mut scene.machine;
    assert_eq!(machine.durable().stage("trajectories").granted_below, 0);
    scene.join(1);
    let durable = Durable::replay(&scene.records);
    let mut machine = Machine::new(one_stage(2500), Timings::default(), durable);
    let inspection = Action::Inspect {
        stage: 0,
        granted_below: Some(16),
        after_ms: 0,
    };
    assert!(machine.handle(ms(0), Event::Tick).contains(&inspection));
}

/// Lives too short for a part of the index left every COMMIT to be listed and read at each restart.
#[test]
fn what_a_restart_had_to_look_for_is_indexed() {
    let plan = one_stage(1500);
    let mut scene = Scene::new(plan.clone());
    scene.join(1);
    let durable = Durable::replay(&scene.records);
    let mut machine = Machine::new(plan, Timings::default(), durable);
    machine.handle(ms(0), Event::Tick);
    let commit = |index: u64| {
        let commit = CommitSummary {
            key: format!("k{index}"),
            rows: 1,
            bytes: 1,
            digest: Digest::of(b"x"),
        };
        (index, commit)
    };
    let found = Event::Inspected {
        stage: 0,
        finding: Ok(Finding::Tasks {
            commits: (0..1400).map(commit).collect(),
            unindexed: (200..1400).collect(),
            sealed: None,
        }),
    };
    let actions = machine.handle(ms(1), found.clone());
    let part = Action::Index {
        stage: 0,
        term: Term(1),
        part: 0,
        commits: (200..1400).map(commit).collect(),
    };
    assert!(actions.contains(&part));
    assert!(!machine.handle(ms(2), found).contains(&part), "once");
}

#[test]
fn every_thousand_commits_go_into_the_index() {
    let mut scene = Scene::new(one_stage(2100));
    scene.join(1);
    for _ in 0..2100 {
        let lease = scene.granted(1).pop().expect("a task");
        scene.told.clear();
        scene.commits(1, &lease);
    }
    let parts: Vec<_> = scene
        .done
        .iter()
        .filter_map(|action| match action {
            Action::Index { part, commits, .. } => Some((*part, commits.len(), commits[0].0)),
            _ => None,
        })
        .collect();
    assert_eq!(parts, [(0, 1000, 0), (1, 1000, 1000)]);
}

/// What a beat says of `lease`.
fn beat_about(lease: &Lease, done: u64, total: u64) -> FromWorker {
    FromWorker::Beat {
        seq: 1,
        tasks: vec![Progress {
            lease: lease.clone(),
            done,
            total,
        }],
        group: None,
        rss_bytes: 1,
        starting: false,
        leaving: false,
    }
}

/// Whoever asked for the status afterwards ended the coordinator: the numbers of two workers were added.
#[test]
fn numbers_that_cannot_be_added_end_nothing() {
    let mut scene = Scene::new(one_stage(2));
    for n in [1, 2] {
        scene.join(n);
        let lease = scene.granted(n).pop().expect("a task");
        scene.says(n, beat_about(&lease, u64::MAX, u64::MAX));
    }
    let view = scene.machine.view(scene.now);
    assert_eq!(view.stages[0].in_flight, (u64::MAX, u64::MAX));
}

/// A made-up registration of an earlier life, with the highest attempt that a number can say: the next grant of its
/// task ended the coordinator.
#[test]
fn the_highest_attempt_of_an_earlier_life_ends_nothing() {
    let mut scene = Scene::new(one_stage(1));
    scene.join(1);
    scene.restart(one_stage(1), with_reattach());
    let made_up = Incarnation::new(Term(1), 99);
    let lease = Lease {
        term: Term(1),
        task: TaskId {
            stage: "trajectories".into(),
            index: 0,
        },
        attempt: u32::MAX,
        incarnation: made_up,
    };
    scene.hello(2, Some(made_up), vec![lease.clone()], None);
    scene.join(3);
    assert_eq!(scene.granted(3).len(), 0, "its holder came back");
    scene.fails(2, &lease, FailureClass::Preempted);
    scene.happens(Event::Closed {
        connection: ConnectionId(2),
    });
    scene.wait(ms(400));
    let again = scene.granted(3).pop().expect("nobody holds it any more");
    assert_eq!(again.attempt, u32::MAX);
}

#[test]
fn a_lease_of_this_life_that_nobody_gave_is_not_adopted() {
    let mut scene = Scene::new(one_stage(2));
    scene.join(1);
    scene.restart(one_stage(2), with_reattach());
    let made_up = Incarnation::new(Term(1), 99);
    for term in [2, 3, u64::MAX] {
        let lease = Lease {
            term: Term(term),
            task: TaskId {
                stage: "trajectories".into(),
                index: 1,
            },
            attempt: 1,
            incarnation: made_up,
        };
        scene.hello(2, Some(made_up), vec![lease.clone()], None);
        let revoked =
            |told: &ToWorker| matches!(told, ToWorker::Revoke { lease: it, .. } if *it == lease);
        assert!(scene.was_told(2, revoked), "term {term}");
    }
}

/// Only the holder's report ends a lease: a guest could end, fail and set aside what others worked at.
#[test]
fn nobody_ends_anothers_lease() {
    let mut scene = Scene::new(one_stage(1));
    for n in [1, 2] {
        scene.join(n);
    }
    let lease = scene.granted(1).pop().expect("a task");
    for class in [
        FailureClass::Io,
        FailureClass::Preempted,
        FailureClass::BadInput,
        FailureClass::Config,
    ] {
        scene.fails(2, &lease, class);
        assert!(scene.was_told(2, |told| matches!(told, ToWorker::ReportAck { seq: 8 })));
    }
    scene.wait(Duration::from_secs(1));
    assert_eq!(scene.machine.outcome(), None);
    assert_eq!(scene.granted(2).len(), 0, "its holder works at it");
    let log = scene.machine.durable().stage("trajectories");
    assert!(log.failures.is_empty() && log.quarantined.is_empty());
    scene.says(
        2,
        FromWorker::TaskCommitted {
            seq: 7,
            lease: lease.clone(),
        },
    );
    assert!(scene.was_told(2, |told| matches!(told, ToWorker::ReportAck { seq: 7 })));
    assert_eq!(scene.granted(2).len(), 0, "there is no COMMIT");
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.wait(ms(400));
    let again = scene.granted(2).pop().expect("its holder is lost");
    assert_eq!(again.attempt, lease.attempt + 1);
}

#[test]
fn a_commit_counts_whoever_reports_it() {
    let mut scene = Scene::new(one_stage(1));
    for n in [1, 2] {
        scene.join(n);
    }
    let lease = scene.granted(1).pop().expect("a task");
    scene.commits(2, &lease);
    assert_eq!(scene.machine.outcome(), Some(&Outcome::Succeeded));
}

/// It was given nothing until something else happened.
#[test]
fn a_suspect_that_is_heard_again_gets_work_at_once() {
    let mut scene = Scene::new(one_stage(1));
    for n in [1, 2] {
        scene.join(n);
    }
    let lease = scene.granted(1).pop().expect("a task");
    scene.wait(Duration::from_secs(5));
    scene.beat(1);
    scene.wait(Duration::from_secs(2));
    scene.fails(1, &lease, FailureClass::Preempted);
    let again = scene.granted(1).pop().expect("granted to the other one");
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.wait(ms(400));
    assert_eq!(scene.granted(2).len(), 0, "not heard for 7 s");
    scene.beat(2);
    let taken = scene.granted(2).pop().expect("work, at once");
    assert_eq!(taken.task, again.task);
}

/// The coordinator stood still (SIGSTOP, a suspended host, a store that did not answer): what was said meanwhile lay
/// unread, and the first thing that it saw was the time.
#[test]
fn a_coordinator_that_stood_still_takes_nobody_for_dead() {
    let mut scene = Scene::new(small_plan());
    let id = scene.reach_stepping();
    scene.join(3);
    scene.happens(Event::Closed {
        connection: ConnectionId(3),
    });
    scene.now += Duration::from_secs(90);
    scene.happens(Event::Tick);
    let states = |scene: &Scene| {
        let view = scene.machine.view(scene.now);
        let states = view.workers.iter().map(|worker| worker.state);
        states.collect::<Vec<_>>()
    };
    assert_eq!(states(&scene), ["busy", "busy", "disconnected"]);
    scene.wait(ms(200));
    for n in [1, 2] {
        let progress = beat_of(&id, 1);
        scene.says(n, progress);
    }
    assert_eq!(states(&scene), ["busy", "busy", "disconnected"]);
    scene.wait(ms(200));
    assert_eq!(states(&scene), ["busy", "busy"], "it had its time again");
    scene.wait(Duration::from_secs(16));
    assert_eq!(states(&scene).len(), 0, "silent for 15 s that we did hear");
}

fn beat_of(id: &GroupId, step: u64) -> FromWorker {
    FromWorker::Beat {
        seq: 1,
        tasks: vec![],
        group: Some(distillery_common::group::Progress {
            group: id.clone(),
            phase: Phase::Stepping,
            step,
            total_steps: 20,
            loss: 0.5,
            samples_per_second: 1.0,
            step_ms: 1.0,
        }),
        rss_bytes: 1,
        starting: false,
        leaving: false,
    }
}
