//! What people ask of a run.

use super::*;

fn decided(scene: &Scene, wanted: impl Fn(&Decision) -> bool) -> bool {
    let mut decisions = scene.done.iter().filter_map(|action| match action {
        Action::Explain(decision) => Some(decision),
        _ => None,
    });
    decisions.any(wanted)
}

fn pause(scene: &mut Scene) {
    scene.happens(Event::PauseRequested {
        reason: "the cluster is needed".into(),
    });
}

fn step(scene: &mut Scene, id: &GroupId, step: u64) {
    scene.says(
        1,
        FromWorker::CheckpointCommitted {
            seq: step,
            checkpoint: CheckpointCommitted {
                group: id.clone(),
                step,
                key: format!("checkpoints/seg8/{step}"),
                digest: Digest::of(&step.to_le_bytes()),
                bytes: 1,
                is_final: step == 20,
            },
        },
    );
}

#[test]
fn a_paused_run_lets_attempts_finish_and_begins_nothing() {
    let mut scene = Scene::new(Plan {
        stages: vec![tasks("trajectories", Kind::Trajectories, 3, &[], 0)],
    });
    scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    pause(&mut scene);
    pause(&mut scene);
    scene.commits(1, &lease);
    scene.join(2);
    scene.wait(Duration::from_secs(1));
    assert_eq!((scene.granted(1).len(), scene.granted(2).len()), (1, 0));
    assert_eq!(scene.machine.view(scene.now).state, "paused");
    let paused = |record: &&Record| matches!(record, Record::Paused { .. });
    assert_eq!(scene.records.iter().filter(paused).count(), 1);
    scene.happens(Event::ResumeRequested);
    scene.happens(Event::ResumeRequested);
    assert_eq!((scene.granted(1).len(), scene.granted(2).len()), (2, 1));
    let resumed = |record: &&Record| matches!(record, Record::Resumed);
    assert_eq!(scene.records.iter().filter(resumed).count(), 1);
}

#[test]
fn a_pause_outlives_the_coordinator() {
    let mut scene = Scene::new(small_plan());
    pause(&mut scene);
    scene.restart(small_plan(), Timings::default());
    scene.join(1);
    assert_eq!(scene.granted(1).len(), 0);
    scene.happens(Event::ResumeRequested);
    assert_eq!(scene.granted(1).len(), 1);
}

#[test]
fn a_paused_group_leaves_after_its_next_checkpoint_and_no_step_is_lost() {
    let mut scene = Scene::new(small_plan());
    let id = scene.reach_stepping();
    pause(&mut scene);
    let aborted = |told: &ToWorker| matches!(told, ToWorker::GroupAbort { .. });
    assert!(!scene.was_told(1, aborted), "it trains on");
    step(&mut scene, &id, 10);
    assert!(scene.was_told(1, aborted) && scene.was_told(2, aborted));
    scene.wait(Duration::from_secs(1));
    assert_eq!(scene.joined(1).len(), 1, "no other group forms");
    let log = scene.machine.durable().stage("seg8");
    assert_eq!((log.checkpoints.len(), log.fruitless), (1, 0));
    scene.happens(Event::ResumeRequested);
    scene.wait(Duration::from_secs(2));
    let again = scene.joined(1).pop().expect("a new group");
    assert_eq!(again.base_step, 10);
}

#[test]
fn the_last_checkpoint_seals_its_stage_in_a_paused_run_too() {
    let mut scene = Scene::new(small_plan());
    let id = scene.reach_stepping();
    pause(&mut scene);
    step(&mut scene, &id, 20);
    assert!(scene.machine.durable().stage("seg8").sealed.is_some());
    assert_eq!(scene.machine.outcome(), None, "the export is left");
}

#[test]
fn a_cancelled_run_stays_cancelled() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    scene.happens(Event::CancelRequested {
        reason: "wrong teacher".into(),
    });
    let cancelled = Outcome::Cancelled {
        reason: "wrong teacher".into(),
    };
    assert_eq!(scene.machine.outcome(), Some(&cancelled));
    assert!(scene.was_told(1, |told| matches!(told, ToWorker::Drain { .. })));
    scene.restart(small_plan(), Timings::default());
    assert_eq!(scene.machine.outcome(), Some(&cancelled));
    scene.happens(Event::Arrived {
        connection: ConnectionId(9),
        hello: Hello {
            name: "late".into(),
            host: "h".into(),
            device: "cpu".into(),
            slots: 1,
            incarnation: None,
            leases: vec![],
            group: None,
            starting: false,
        },
    });
    assert_eq!(scene.closed, [ConnectionId(9)]);
}

#[test]
fn a_paused_run_can_be_stopped_and_a_stopping_one_resumed_for_later() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    pause(&mut scene);
    scene.happens(Event::StopRequested {
        now: false,
        returns: false,
    });
    assert_eq!(scene.machine.view(scene.now).state, "stopping");
    scene.happens(Event::ResumeRequested);
    assert_eq!(scene.machine.view(scene.now).state, "stopping");
    assert_eq!(scene.machine.durable().paused, None);
}

#[test]
fn workers_hear_whether_a_stopped_run_is_started_again_by_itself() {
    for returns in [false, true] {
        let mut scene = Scene::new(small_plan());
        scene.join(1);
        let now = false;
        scene.happens(Event::StopRequested { now, returns });
        let heard = |told: &ToWorker| matches!(told, ToWorker::Drain { returns: said, .. } if *said == returns);
        assert!(scene.was_told(1, heard), "{returns}");
    }
}

#[test]
fn a_named_worker_is_drained_and_given_nothing_new() {
    let mut scene = Scene::new(Plan {
        stages: vec![tasks("trajectories", Kind::Trajectories, 3, &[], 0)],
    });
    scene.join(1);
    scene.happens(Event::DrainRequested {
        worker: "w1".into(),
    });
    let drained = |told: &ToWorker| {
        matches!(
            told,
            ToWorker::Drain {
                checkpoint: true,
                ..
            }
        )
    };
    assert!(scene.was_told(1, drained));
    let lease = scene.granted(1).pop().expect("a task");
    scene.commits(1, &lease);
    assert_eq!(scene.granted(1).len(), 1);
    scene.happens(Event::DrainRequested {
        worker: "w7".into(),
    });
    assert!(decided(&scene, |decision| {
        matches!(decision, Decision::Ignored { what } if what.contains("w7"))
    }));
}

/// The message was lost with the stream: the worker knew nothing of it, got nothing new, and stayed for ever.
#[test]
fn a_worker_that_was_told_to_leave_is_told_again_on_its_next_stream() {
    let mut scene = Scene::new(Plan {
        stages: vec![tasks("trajectories", Kind::Trajectories, 3, &[], 0)],
    });
    let who = scene.join(1);
    let lease = scene.granted(1).pop().expect("a task");
    scene.happens(Event::DrainRequested {
        worker: "w1".into(),
    });
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    let again = scene.hello(2, Some(who), vec![lease], None);
    assert_eq!(again, who);
    let drained = |told: &ToWorker| {
        matches!(
            told,
            ToWorker::Drain {
                checkpoint: true,
                ..
            }
        )
    };
    assert!(scene.was_told(2, drained));
}

/// The launcher's message came while the last worker's stream was still in its time to reconnect, and was forgotten:
/// the run waited for ever.
#[test]
fn a_launcher_that_gives_up_ends_the_run_when_the_last_worker_is_lost() {
    let mut scene = Scene::new(small_plan());
    scene.join(1);
    scene.happens(Event::Closed {
        connection: ConnectionId(1),
    });
    scene.happens(Event::LauncherFailed {
        message: "no engine".into(),
    });
    assert_eq!(scene.machine.outcome(), None, "it may come back");
    scene.wait(Duration::from_secs(1));
    let failed = Outcome::Failed {
        message: "no engine".into(),
    };
    assert_eq!(scene.machine.outcome(), Some(&failed));
}
