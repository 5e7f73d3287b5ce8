//! Which jobs should be in the queue, and which are too many: a function of what was seen.
//!
//! Must never touch a clock, a process or a file.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::client::Trouble;
use super::queue::{Job, JobId, State};
use super::script::TOLD;

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
    /// Why jobs are missing that Slurm does not take now, and how often it was asked.
    lack: Option<String>,
    delays: u32,
    /// How many were asked for last, and how many may be at a time: a limit may leave room for fewer.
    asked: u32,
    at_most: u32,
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
            lack: None,
            delays: 0,
            asked: 0,
            at_most: ARRAY,
            not_before: Duration::ZERO,
            given_up: false,
        }
    }

    /// Slurm took an array of `count`.
    pub(super) fn submitted(&mut self, array: &str, count: u32) {
        self.refusals = 0;
        self.filled();
        for index in 0..count {
            let id = JobId::element(array, index);
            self.known.entry(id).or_default();
        }
    }

    /// Nothing is missing any more, or it was just asked for.
    fn filled(&mut self) {
        self.lack = None;
        self.delays = 0;
        self.at_most = ARRAY;
    }

    /// Why jobs are missing that Slurm does not take now, for people; none when it took the last ones.
    pub(super) fn lack(&self) -> Option<String> {
        self.lack.clone()
    }

    /// Slurm refused a submission, or nobody knows whether it did: if not, the jobs will be seen in the queue.
    pub(super) fn not_submitted(&mut self, now: Duration, trouble: &Trouble) -> Vec<Step> {
        let said = match trouble {
            Trouble::Away(_) => {
                self.not_before = now + UNCLEAR;
                return Vec::new();
            }
            Trouble::ForNow(said) => {
                self.delays += 1;
                self.at_most = (self.asked / 2).max(1);
                self.not_before = now + wait(self.delays);
                let lack = format!("Slurm takes no more workers for now: {said}");
                // However long that lasts, it is no failure, and it is told once.
                let is_news = self.lack.as_ref() != Some(&lack);
                self.lack = Some(lack.clone());
                return is_news.then_some(Step::Tell(lack)).into_iter().collect();
            }
            Trouble::Refused(said) => said,
        };
        self.lack = Some(format!("Slurm refused to take workers: {said}"));
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
        if live >= self.wanted {
            self.filled();
        } else if may_submit {
            self.asked = self.at_most.min(self.wanted - live);
            steps.push(Step::Submit(self.asked));
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
        // A preemption, or people: its place is not given up. It would be by a drain, which ends with 0.
        if code == Some(TOLD) {
            let text = format!("job {id} was told to leave; another takes its place");
            steps.push(Step::Tell(text));
            return;
        }
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
mod tests;
