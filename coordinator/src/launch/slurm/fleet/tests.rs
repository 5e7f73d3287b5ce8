use super::*;
use crate::launch::slurm::queue::parse;

/// A fleet and what it is shown.
struct Scene {
    fleet: Fleet,
    now: Duration,
    ends: BTreeMap<JobId, Code>,
    joined: BTreeSet<JobId>,
    is_ending: bool,
}

impl Scene {
    fn new(wanted: u32, fewest: u32) -> Self {
        Self {
            fleet: Fleet::new(wanted, fewest),
            now: Duration::ZERO,
            ends: BTreeMap::new(),
            joined: BTreeSet::new(),
            is_ending: false,
        }
    }

    /// Looks at a queue of `id state` lines ten seconds later; gives back all but what people are told.
    fn look(&mut self, queue: &[(&str, &str)]) -> Vec<Step> {
        self.now += Duration::from_secs(10);
        let line = |(id, state): &(&str, &str)| match *state {
            "HELD" => format!("{id}|PENDING|launch failed requeued held||N/A\n"),
            state => format!("{id}|{state}|None|n1|N/A\n"),
        };
        let text: String = queue.iter().map(line).collect();
        let steps = self.fleet.decide(Look {
            now: self.now,
            queue: &parse(&text),
            ends: &self.ends,
            joined: &self.joined,
            is_ending: self.is_ending,
        });
        let kept = |step: &Step| !matches!(step, Step::Tell(_));
        steps.into_iter().filter(kept).collect()
    }

    fn ended(&mut self, array: &str, index: u32, code: i32) {
        let id = JobId::element(array, index);
        self.ends.insert(id, Some(code));
    }
}

fn ids(ids: &[&str]) -> Vec<JobId> {
    parse(
        &ids.iter()
            .map(|id| format!("{id}|PENDING|None||\n"))
            .collect::<String>(),
    )
    .into_iter()
    .map(|job| job.id)
    .collect()
}

#[test]
fn what_is_missing_is_submitted_and_what_is_there_adopted() {
    let mut scene = Scene::new(3, 1);
    assert_eq!(scene.look(&[]), [Step::Submit(3)]);
    let mut second_life = Scene::new(3, 1);
    let there = [("7_0", "RUNNING"), ("7_2", "PENDING")];
    assert_eq!(second_life.look(&there), [Step::Submit(1)]);
    second_life.fleet.submitted("8", 1);
    let all = [("7_0", "RUNNING"), ("7_2", "PENDING"), ("8_0", "PENDING")];
    assert_eq!(second_life.look(&all), []);
    // The queue may be long: that is no reason for anything.
    for _ in 0..100 {
        assert_eq!(second_life.look(&all), []);
    }
    assert_eq!(Scene::new(4096, 1).look(&[]), [Step::Submit(ARRAY)]);
    let mut smaller = Scene::new(1, 1);
    let cancelled = Step::Cancel(ids(&["8_0", "7_2"]));
    assert_eq!(smaller.look(&all), [cancelled]);
}

#[test]
fn the_lost_are_replaced_and_those_that_were_drained_only_when_needed() {
    let mut scene = Scene::new(2, 1);
    scene.fleet.submitted("1", 2);
    let running = [("1_0", "RUNNING"), ("1_1", "RUNNING")];
    scene.joined.extend(ids(&["1_0", "1_1"]));
    for _ in 0..WELL {
        assert_eq!(scene.look(&running), []);
    }
    let lost = [("1_0", "RUNNING"), ("1_1", "NODE_FAIL")];
    assert_eq!(scene.look(&lost), [Step::Submit(1)]);
    scene.fleet.submitted("2", 1);
    // A requeued job passes through states in which it is nowhere.
    for state in ["COMPLETING", "PENDING", "RUNNING"] {
        assert_eq!(scene.look(&[("1_0", "RUNNING"), ("2_0", state)]), []);
    }
    scene.ended("2", 0, 0);
    assert_eq!(scene.look(&[("1_0", "RUNNING")]), []);
    scene.ended("1", 0, 0);
    scene.is_ending = true;
    assert_eq!(scene.look(&[]), []);
    scene.is_ending = false;
    assert_eq!(scene.look(&[]), [Step::Submit(1)]);
}

/// Preemption, a signal, a cancelled job: as often as it comes, the run keeps as many workers as it asked for, though it
/// could go on with fewer, and nobody has failed.
#[test]
fn those_that_a_signal_made_leave_are_replaced_however_many_there_are() {
    let mut scene = Scene::new(4, 1);
    for number in 1..=3 * FAILURES {
        let array = number.to_string();
        assert_eq!(scene.look(&[]), [Step::Submit(4)], "{number}");
        scene.fleet.submitted(&array, 4);
        let running: Vec<String> = (0..4).map(|index| format!("{array}_{index}")).collect();
        let running: Vec<_> = running.iter().map(|id| (id.as_str(), "RUNNING")).collect();
        assert_eq!(scene.look(&running), []);
        for index in 0..4 {
            scene.ended(&array, index, TOLD);
        }
    }
    assert_eq!(scene.fleet.failures, 0);
    // Also where Slurm has a word for it, and the script could say nothing.
    let mut scene = Scene::new(2, 1);
    scene.fleet.submitted("1", 2);
    let preempted = [("1_0", "RUNNING"), ("1_1", "PREEMPTED")];
    assert_eq!(scene.look(&preempted), [Step::Submit(1)]);
    assert_eq!(scene.fleet.failures, 0);
}

#[test]
fn workers_that_end_before_they_did_anything_are_given_up() {
    let mut scene = Scene::new(1, 1);
    let (mut number, mut waits) = (0, 0);
    let gave_up = loop {
        let steps = scene.look(&[]);
        match steps.as_slice() {
            [Step::Submit(1)] => {
                number += 1;
                scene.fleet.submitted(&number.to_string(), 1);
                let id = format!("{number}_0");
                assert_eq!(scene.look(&[(id.as_str(), "RUNNING")]), []);
                scene.ended(&number.to_string(), 0, 1);
            }
            // It waits longer and longer.
            [] => waits += 1,
            _ => break steps,
        }
    };
    assert_eq!(number, FAILURES);
    // Looks are ten seconds apart; waits are 1, 2, 4, … 60 s.
    assert_eq!(waits, 1 + 1 + 1 + 1 + 2 + 4 + 6);
    let [Step::GiveUp(why, Some(id))] = gave_up.as_slice() else {
        panic!("{gave_up:?}");
    };
    assert!(
        why.contains("8 times in a row") && why.contains("8_0 on n1: exit code 1"),
        "{why}"
    );
    assert_eq!(id.as_str(), "8_0");
    assert_eq!(scene.look(&[]), []);
}

#[test]
fn a_wrong_start_is_told_at_once_and_takes_the_waiting_along() {
    let mut scene = Scene::new(3, 1);
    scene.fleet.submitted("1", 3);
    scene.ended("1", 0, USAGE);
    let steps = scene.look(&[("1_1", "RUNNING"), ("1_2", "PENDING")]);
    let [Step::GiveUp(why, Some(_)), Step::Cancel(cancelled)] = steps.as_slice() else {
        panic!("{steps:?}");
    };
    assert!(why.contains("started wrongly"), "{why}");
    assert_eq!(*cancelled, ids(&["1_2"]));
}

#[test]
fn a_job_that_slurm_cannot_start_is_a_failure_and_leaves_the_queue() {
    let mut scene = Scene::new(1, 1);
    scene.fleet.submitted("1", 1);
    assert_eq!(
        scene.look(&[("1_0", "HELD")]),
        [Step::Cancel(ids(&["1_0"]))]
    );
    assert_eq!(scene.fleet.failures, 1);
    assert_eq!(scene.look(&[]), [Step::Submit(1)]);
}

#[test]
fn a_limit_that_is_reached_is_waited_out_and_told_once() {
    let mut scene = Scene::new(2, 1);
    let full = Trouble::ForNow("QOSMaxSubmitJobPerUserLimit".into());
    let (mut tries, mut told) = (0, 0);
    // A day and more: looks are ten seconds apart.
    for _ in 0..10_000 {
        let steps = scene.look(&[]);
        if !steps.is_empty() {
            // There may be room for fewer.
            let count = if tries == 0 { 2 } else { 1 };
            assert_eq!(steps, [Step::Submit(count)]);
            tries += 1;
            let steps = scene.fleet.not_submitted(scene.now, &full);
            told += steps.len();
            let is_told = |step: &Step| matches!(step, Step::Tell(_));
            assert!(steps.iter().all(is_told), "{steps:?}");
        }
        let lack = scene.fleet.lack().expect("status says why");
        assert!(lack.contains("QOSMaxSubmitJobPerUserLimit"), "{lack}");
    }
    assert_eq!(told, 1);
    assert!(tries > 1_000 && tries < 2_000, "once a minute: {tries}");
    // A permanent refusal counts from here on.
    let wrong = Trouble::Refused("Invalid qos specification".into());
    let steps = scene.fleet.not_submitted(scene.now, &wrong);
    assert!(matches!(steps.as_slice(), [Step::Tell(_)]), "{steps:?}");
    scene.fleet.submitted("1", 2);
    assert_eq!(scene.fleet.lack(), None);
    // One that others fill: what is there is enough.
    let mut scene = Scene::new(1, 1);
    scene.look(&[]);
    scene.fleet.not_submitted(scene.now, &full);
    assert_eq!(scene.look(&[("3_0", "PENDING")]), []);
    assert_eq!(scene.fleet.lack(), None);
}

#[test]
fn nothing_is_submitted_twice_when_an_answer_is_lost() {
    let mut scene = Scene::new(2, 1);
    assert_eq!(scene.look(&[]), [Step::Submit(2)]);
    let away = Trouble::Away("no answer".into());
    assert_eq!(scene.fleet.not_submitted(scene.now, &away), []);
    assert_eq!(scene.look(&[]), [], "its message may still be on its way");
    assert_eq!(scene.look(&[("4_0", "PENDING"), ("4_1", "PENDING")]), []);
    let mut refused = Scene::new(2, 1);
    let mut steps = Vec::new();
    for _ in 0..REFUSALS {
        assert_eq!(refused.look(&[]), [Step::Submit(2)]);
        steps = refused
            .fleet
            .not_submitted(refused.now, &Trouble::Refused("no such partition".into()));
    }
    let [Step::GiveUp(why, None)] = steps.as_slice() else {
        panic!("{steps:?}");
    };
    assert!(why.contains("no such partition"), "{why}");
}
