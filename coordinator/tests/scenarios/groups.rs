//! Training groups that lose members and gain some.

use super::*;

/// One shard, and a stage of two to three members.
fn elastic_plan() -> Plan {
    let mut plan = small_plan();
    plan.stages[0] = tasks("trajectories", Kind::Trajectories, 1, &[], 0);
    plan.stages[1] = training("seg8", 40, (2, 3), &[0], None);
    plan
}

/// A run whose first group has the workers 1 to 3.
fn stepping() -> (Scene, GroupId) {
    let mut scene = Scene::new(elastic_plan());
    for n in 1..=3 {
        scene.join(n);
    }
    let lease = scene.granted(1).pop().expect("the task");
    scene.commits(1, &lease);
    let group = scene.exchange(&[1, 2, 3]);
    (scene, group)
}

fn engine(scene: &mut Scene, n: u64, starting: bool) {
    let beat = FromWorker::Beat {
        seq: 2,
        tasks: vec![],
        group: None,
        rss_bytes: 1,
        starting,
        leaving: false,
    };
    scene.says(n, beat);
}

fn progress(scene: &mut Scene, n: u64, group: &GroupId, step: u64) {
    let said = Progress {
        group: group.clone(),
        phase: Phase::Stepping,
        step,
        total_steps: 40,
        loss: 1.0,
        samples_per_second: 1.0,
        step_ms: 100.0,
    };
    let beat = FromWorker::Beat {
        seq: 3,
        tasks: vec![],
        group: Some(said),
        rss_bytes: 1,
        starting: false,
        leaving: false,
    };
    scene.says(n, beat);
}

fn engine_dies(scene: &mut Scene, n: u64, group: &GroupId, rank: u32, class: FailureClass) {
    engine(scene, n, true);
    let failure = Failure {
        class,
        message: "the engine was killed".into(),
    };
    let group = group.clone();
    let seq = 30 + scene.records.len() as u64;
    scene.says(
        n,
        FromWorker::GroupFailed {
            seq,
            group,
            rank,
            failure,
        },
    );
}

/// The members of the newest group by connection.
fn members(scene: &Scene, connections: &[u64]) -> Vec<u64> {
    let newest = scene.machine.durable().generation;
    let is_in = |n: &u64| {
        let joined = scene.joined(*n);
        joined.last().is_some_and(|m| m.group.generation == newest)
    };
    connections.iter().copied().filter(is_in).collect()
}

#[test]
fn survivors_form_again_at_once_when_nobody_else_can_come() {
    let (mut scene, _) = stepping();
    scene.happens(Event::Closed {
        connection: ConnectionId(3),
    });
    scene.wait(ms(299));
    assert_eq!(members(&scene, &[1, 2, 3]), [1, 2, 3], "it may reconnect");
    scene.wait(ms(1));
    assert_eq!(members(&scene, &[1, 2]), [1, 2]);
    assert_eq!(scene.machine.durable().generation, Generation(2));
}

#[test]
fn a_worker_whose_engine_starts_is_called_and_not_waited_for() {
    let (mut scene, group) = stepping();
    engine_dies(&mut scene, 3, &group, 2, FailureClass::HostLost);
    assert_eq!(scene.machine.durable().generation, Generation(1));
    let (mut quick, mut slow) = (scene, stepping().0);
    quick.wait(ms(400));
    engine(&mut quick, 3, false);
    assert_eq!(members(&quick, &[1, 2, 3]), [1, 2, 3], "it was quick");

    engine_dies(&mut slow, 3, &group, 2, FailureClass::HostLost);
    slow.wait(ms(999));
    assert_eq!(slow.machine.durable().generation, Generation(1));
    slow.wait(ms(1));
    assert_eq!(members(&slow, &[1, 2, 3]), [1, 2]);
}

#[test]
fn a_first_group_waits_for_engines_to_start() {
    let mut scene = Scene::new(elastic_plan());
    for n in 1..=3 {
        scene.join(n);
        engine(&mut scene, n, true);
    }
    let lease = scene.granted(1).pop().expect("a task is no group");
    scene.commits(1, &lease);
    engine(&mut scene, 1, false);
    engine(&mut scene, 2, false);
    assert_eq!(scene.machine.durable().generation, Generation(0));
    engine(&mut scene, 3, false);
    assert_eq!(members(&scene, &[1, 2, 3]), [1, 2, 3]);
}

#[test]
fn a_group_grows_at_a_checkpoint_and_not_too_often() {
    let (mut scene, group) = stepping();
    scene.happens(Event::Closed {
        connection: ConnectionId(3),
    });
    scene.wait(ms(300));
    let group = scene.exchange(&[1, 2]).max(group);
    scene.join(4);
    scene.checkpoint(1, &group, 10, false);
    assert_eq!(
        scene.machine.durable().generation,
        group.generation,
        "young"
    );
    for _ in 0..301 {
        scene.wait(ms(2_000));
        [1, 2, 4].into_iter().for_each(|n| scene.beat(n));
        let step = 10 + scene.now.as_secs() / 20;
        progress(&mut scene, 1, &group, step);
    }
    assert_eq!(scene.machine.durable().generation, group.generation);
    scene.checkpoint(1, &group, 20, false);
    assert_eq!(members(&scene, &[1, 2, 4]), [1, 2, 4]);
    let joined = scene.joined(4).pop().expect("it is a member");
    assert_eq!((joined.world, joined.base_step), (3, 20));
    let log = scene.machine.durable().stage("seg8");
    assert_eq!(log.fruitless, 0, "growing is no failure");
}

#[test]
fn a_full_group_is_not_disturbed() {
    let (mut scene, group) = stepping();
    scene.join(4);
    for _ in 0..301 {
        scene.wait(ms(2_000));
        (1..=4).for_each(|n| scene.beat(n));
        let step = scene.now.as_secs() / 20;
        progress(&mut scene, 1, &group, step);
    }
    scene.checkpoint(1, &group, 10, false);
    assert_eq!(scene.machine.durable().generation, group.generation);
}

/// Engines die all the time, but training gets on: that is no reason to end the run. A step at which every group ends is.
#[test]
fn only_groups_that_got_no_further_count() {
    let (mut scene, mut group) = stepping();
    let fruitless = |scene: &Scene| scene.machine.durable().stage("seg8").fruitless;
    for step in [3, 5, 7, 8, 9] {
        progress(&mut scene, 1, &group, step);
        engine_dies(&mut scene, 3, &group, 2, FailureClass::HostLost);
        engine(&mut scene, 3, false);
        assert_eq!(fruitless(&scene), 0, "step {step}");
        group = scene.exchange(&[1, 2, 3]);
    }
    for died in 1..=3 {
        assert_eq!(scene.machine.outcome(), None);
        progress(&mut scene, 1, &group, 9);
        engine_dies(&mut scene, 3, &group, 2, FailureClass::Unknown);
        engine(&mut scene, 3, false);
        assert_eq!(fruitless(&scene), died);
        if died < 3 {
            group = scene.exchange(&[1, 2, 3]);
        }
    }
    assert!(matches!(
        scene.machine.outcome(),
        Some(Outcome::Failed { .. })
    ));
}

/// Whether a checkpoint is the last one follows from the plan: a report that said otherwise sealed a stage early, or
/// left it open for ever.
#[test]
fn which_checkpoint_is_the_last_one_is_not_for_a_worker_to_say() {
    let mut scene = Scene::new(small_plan());
    let id = scene.reach_stepping();
    scene.checkpoint(1, &id, 10, true);
    let log = scene.machine.durable().stage("seg8");
    assert_eq!(log.sealed, None);
    assert_eq!(log.checkpoints.len(), 1);
    scene.checkpoint(1, &id, 30, true);
    let log = scene.machine.durable().stage("seg8");
    assert_eq!((log.sealed, log.checkpoints.len()), (None, 1), "beyond");
    scene.checkpoint(1, &id, 20, false);
    assert!(scene.machine.durable().stage("seg8").sealed.is_some());
}

/// A worker that leaves was taken into eighteen groups in ten milliseconds, each of which it declined.
#[test]
fn a_worker_that_is_about_to_leave_joins_no_group() {
    let (mut scene, group) = stepping();
    let leaving = FromWorker::Beat {
        seq: 4,
        tasks: vec![],
        group: None,
        rss_bytes: 1,
        starting: false,
        leaving: true,
    };
    scene.says(3, leaving);
    assert_eq!(scene.machine.durable().generation, group.generation);
    let failure = Failure {
        class: FailureClass::Preempted,
        message: "the worker is leaving".into(),
    };
    scene.says(
        3,
        FromWorker::GroupFailed {
            seq: 5,
            group,
            rank: 2,
            failure,
        },
    );
    assert_eq!(members(&scene, &[1, 2, 3]), [1, 2]);
}

/// Engines that are killed before their group has applied a step are no fault of the stage, unless there is no end to it.
#[test]
fn lost_members_count_once_there_are_many() {
    let (mut scene, mut group) = stepping();
    let fruitless = |scene: &Scene| scene.machine.durable().stage("seg8").fruitless;
    let free = Timings::default().free_failures;
    for _ in 0..free {
        engine_dies(&mut scene, 3, &group, 2, FailureClass::HostLost);
        engine(&mut scene, 3, false);
        assert_eq!(fruitless(&scene), 0);
        group = scene.exchange(&[1, 2, 3]);
    }
    engine_dies(&mut scene, 3, &group, 2, FailureClass::HostLost);
    assert_eq!(fruitless(&scene), 1);
}

/// The first thing that a coordinator handles after it stood still may be the time. It has not listened, so nobody was silent.
#[test]
fn a_coordinator_that_stood_still_gives_up_no_group_for_it() {
    let (mut scene, group) = stepping();
    for step in 1..=10 {
        scene.wait(ms(1_000));
        progress(&mut scene, 1, &group, step);
    }
    for n in 1..=3 {
        scene.beat(n);
    }
    scene.now += Duration::from_secs(3600);
    scene.happens(Event::Tick);
    assert!(!scene.was_told(1, |m| matches!(m, ToWorker::GroupAbort { .. })));
    // Time that is listened to counts as ever.
    for _ in 0..35 {
        scene.wait(ms(2_000));
        (1..=3).for_each(|n| scene.beat(n));
    }
    assert!(scene.was_told(1, |m| matches!(m, ToWorker::GroupAbort { .. })));
}
