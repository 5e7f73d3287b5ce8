//! Which jobs should be in the queue, and which are too many: a function of what was seen.
//!
//! Must never touch a clock, a process or a file.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::queue::{Job, JobId, State};

/// Looks at which a job's worker was with the coordinator: it was well, and failures are counted anew.
const WELL: u32 = 3;
/// Jobs in one array, so many that every cluster takes them: Slurm's `MaxArraySize` is 1001 unless a site says otherwise.
const ARRAY: u32 = 1000;
/// Looks in a row, at each of which some job had ended before that, after which no more are submitted. Not jobs: what ends
/// an array at once is no sign that the next one fares alike.
const FAILURES: u32 = 8;
/// Submissions in a row that Slurm refused, after which it is not asked again unless some job of ours lives.
const REFUSALS: u32 = 3;
/// Wait after a first failure or refusal; doubles.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Wait after a submission of which nobody knows whether Slurm took it: longer than a message may be on its way.
const UNCLEAR: Duration = Duration::from_secs(15);
/// Exit code of a worker that was started wrongly; another start would not help.
const USAGE: i32 = 64;

/// How the script of a job said it ended: the worker's exit code; none when it was killed before it could.
pub(super) type Code = Option<i32>;

/// One look at everything.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look<'a> {
    /// Since the launcher began.
    pub(super) now: Duration,
    /// What squeue showed.
    pub(super) queue: &'a [Job],
    /// How those ended of which it is known.
    pub(super) ends: &'a BTreeMap<JobId, Code>,
    /// Those whose worker is with the coordinator.
    pub(super) joined: &'a BTreeSet<JobId>,
    /// The run is about to stop: nobody is replaced.
    pub(super) is_ending: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Submit an array of so many.
    Submit(u32),
    /// Take these out of the queue.
    Cancel(Vec<JobId>),
    /// Tell the run that no more workers come, and why; the log of that job says more.
    GiveUp(String, Option<JobId>),
    /// Tell people.
    Tell(String),
}

#[derive(Debug, Clone, Default)]
struct Known {
    /// Looks at which its worker was there.
    joined: u32,
    nodes: String,
    reason: String,
}

/// The jobs of one run.
#[derive(Debug, Clone)]
pub(super) struct Fleet {
    /// How many there should be.
    wanted: u32,
    /// The fewest with which the run goes on: one more that leaves is not replaced.
    fewest: u32,
    known: BTreeMap<JobId, Known>,
    failures: u32,
    /// The look that counted last.
    failed_at: Option<Duration>,
    refusals: u32,
    /// No submission before that.
    not_before: Duration,
    given_up: bool,
}

impl Fleet {
    pub(super) fn new(wanted: u32, fewest: u32) -> Self {
        Self {
            wanted,
            fewest: fewest.clamp(1, wanted),
            known: BTreeMap::new(),
            failures: 0,
            failed_at: None,
            refusals: 0,
            not_before: Duration::ZERO,
            given_up: false,
        }
    }

    /// Slurm took an array of `count`.
    pub(super) fn submitted(&mut self, array: &str, count: u32) {
        self.refusals = 0;
        for index in 0..count {
            let id = JobId::element(array, index);
            self.known.entry(id).or_default();
        }
    }

    /// Slurm refused a submission, or nobody knows whether it did: if not, the jobs will be seen in the queue.
    pub(super) fn not_submitted(&mut self, now: Duration, refusal: Option<&str>) -> Vec<Step> {
        let Some(said) = refusal else {
            self.not_before = now + UNCLEAR;
            return Vec::new();
        };
        self.refusals += 1;
        self.not_before = now + wait(self.refusals);
        if self.refusals < REFUSALS || !self.known.is_empty() {
            let text = format!("Slurm refused to take workers: {said}");
            return vec![Step::Tell(text)];
        }
        self.given_up = true;
        let text = format!("Slurm refused to take workers {REFUSALS} times in a row: {said}");
        vec![Step::GiveUp(text, None)]
    }

    /// Jobs that were there and are not any more, or do not work: of these the end should be looked up.
    pub(super) fn gone(&self, queue: &[Job]) -> Vec<JobId> {
        let live: BTreeSet<_> = queue
            .iter()
            .filter(|job| job.is_live())
            .map(|job| &job.id)
            .collect();
        let gone = self.known.keys().filter(|id| !live.contains(id));
        gone.cloned().collect()
    }

    /// Takes in a look and decides.
    pub(super) fn decide(&mut self, look: Look<'_>) -> Vec<Step> {
        let mut steps = Vec::new();
        for id in self.gone(look.queue) {
            self.bury(&id, look, &mut steps);
        }
        self.see(look, &mut steps);
        let waiting = |job: &&Job| job.state == State::Waiting;
        let live = look.queue.iter().filter(|job| job.is_live()).count() as u32;
        let held = look.queue.iter().filter(|job| job.state == State::Held);
        let mut cancel: Vec<JobId> = held.map(|job| job.id.clone()).collect();
        let surplus = match self.given_up {
            // What waits would only fail as the others did.
            true => look.queue.len(),
            false => live.saturating_sub(self.wanted) as usize,
        };
        let newest_first = look.queue.iter().rev().filter(waiting);
        cancel.extend(newest_first.take(surplus).map(|job| job.id.clone()));
        if !cancel.is_empty() {
            steps.push(Step::Cancel(cancel));
        }
        let may_submit = !self.given_up && !look.is_ending && look.now >= self.not_before;
        if may_submit && live < self.wanted {
            steps.push(Step::Submit(ARRAY.min(self.wanted - live)));
        }
        steps
    }

    /// Takes in the living: those that we did not submit in this life are adopted.
    fn see(&mut self, look: Look<'_>, steps: &mut Vec<Step>) {
        let mut reasons: BTreeMap<&str, u32> = BTreeMap::new();
        for job in look.queue.iter().filter(|job| job.is_live()) {
            let known = self.known.entry(job.id.clone()).or_default();
            if job.state == State::Waiting && known.reason != job.reason {
                *reasons.entry(&job.reason).or_default() += 1;
            }
            known.reason.clone_from(&job.reason);
            known.nodes.clone_from(&job.nodes);
            if look.joined.contains(&job.id) {
                known.joined += 1;
            }
            if known.joined == WELL {
                self.failures = 0;
            }
        }
        for (reason, count) in reasons {
            let text = format!("jobs that wait in Slurm's queue: {count}, because of {reason}");
            steps.push(Step::Tell(text));
        }
    }

    /// A job is gone: whether that was a failure, and whether another should take its place.
    fn bury(&mut self, id: &JobId, look: Look<'_>, steps: &mut Vec<Step>) {
        let Some(known) = self.known.remove(id) else {
            return;
        };
        let code = look.ends.get(id).copied().flatten();
        if code == Some(0) {
            let spared = self.wanted > self.fewest;
            self.wanted -= u32::from(spared);
            let then = if spared {
                ", and the run does without it"
            } else {
                ""
            };
            steps.push(Step::Tell(format!("job {id} left{then}")));
            return;
        }
        let seen = look.queue.iter().find(|job| job.id == *id);
        let how = describe(code, seen);
        // Nobody's fault, and no sign that the next one fares alike.
        let is_fate = matches!(seen.map(|job| &job.state), Some(State::Ended(word)) if word == "NODE_FAIL" || word == "PREEMPTED");
        let place = match known.nodes.as_str() {
            "" => String::new(),
            nodes => format!(" on {nodes}"),
        };
        steps.push(Step::Tell(format!("job {id}{place} is gone: {how}")));
        if known.joined >= WELL || is_fate {
            return;
        }
        if self.failed_at != Some(look.now) {
            self.failed_at = Some(look.now);
            self.failures += 1;
        }
        self.not_before = look.now + wait(self.failures);
        let why = match code {
            Some(USAGE) => format!("job {id}{place} was started wrongly ({how})"),
            _ if self.failures >= FAILURES => {
                let failures = self.failures;
                format!(
                    "{failures} times in a row jobs ended before their worker did anything; the last was {id}{place}: {how}"
                )
            }
            _ => return,
        };
        if !self.given_up {
            self.given_up = true;
            steps.push(Step::GiveUp(why, Some(id.clone())));
        }
    }
}

/// Wait before try `tries + 1`.
fn wait(tries: u32) -> Duration {
    let doubled = FIRST_WAIT.saturating_mul(1 << tries.saturating_sub(1).min(16));
    doubled.min(LONGEST_WAIT)
}

fn describe(code: Code, seen: Option<&Job>) -> String {
    match (code, seen) {
        (Some(code), _) if code > 128 => format!("killed by signal {}", code - 128),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(job)) => match &job.state {
            State::Ended(word) => word.clone(),
            State::Held => format!("Slurm could not start it ({})", job.reason),
            State::Waiting | State::Running => "it is not".into(),
        },
        (None, None) => "Slurm does not know it any more".into(),
    }
}

#[cfg(test)]
mod tests {
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
    fn the_lost_are_replaced_and_those_that_left_only_when_needed() {
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
    fn nothing_is_submitted_twice_when_an_answer_is_lost() {
        let mut scene = Scene::new(2, 1);
        assert_eq!(scene.look(&[]), [Step::Submit(2)]);
        assert_eq!(scene.fleet.not_submitted(scene.now, None), []);
        assert_eq!(scene.look(&[]), [], "its message may still be on its way");
        assert_eq!(scene.look(&[("4_0", "PENDING"), ("4_1", "PENDING")]), []);
        let mut refused = Scene::new(2, 1);
        let mut steps = Vec::new();
        for _ in 0..REFUSALS {
            assert_eq!(refused.look(&[]), [Step::Submit(2)]);
            steps = refused
                .fleet
                .not_submitted(refused.now, Some("no such partition"));
        }
        let [Step::GiveUp(why, None)] = steps.as_slice() else {
            panic!("{steps:?}");
        };
        assert!(why.contains("no such partition"), "{why}");
    }
}
