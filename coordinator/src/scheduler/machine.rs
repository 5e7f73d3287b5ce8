//! The machine: one state, one function.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::{Incarnation, Term};

use super::action::{Action, ToWorker};
use super::decision::Decision;
use super::durable::Durable;
use super::event::{Event, Trouble};
use super::fleet::Fleet;
use super::record::Record;
use super::run;
use super::run::Outcome;
use super::stage;
use super::task::Verification;
use crate::plan::Plan;

/// Every waiting time and every bound of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Timings {
    /// Between two beats of a worker.
    pub beat: Duration,
    /// Silence after which a worker is given nothing new.
    pub suspect: Duration,
    /// How long a lease lives after the last beat, as the worker counts.
    pub lease_ttl: Duration,
    /// How much longer it lives as we count.
    pub lease_grace: Duration,
    /// Silence after which a member of a group is lost.
    pub member_silence: Duration,
    /// How long a worker may be without a stream.
    pub reconnect: Duration,
    /// Between two looks at silent workers.
    pub sweep: Duration,
    /// For all members of a group to report where they listen…
    pub exchange: Duration,
    /// …and as much more for each of them.
    pub exchange_per_rank: Duration,
    /// How long the first group of a run waits for more than the fewest members.
    pub first_formation: Duration,
    /// How long later groups do.
    pub last_call: Duration,
    /// How long idle workers are kept for a group that lacks members.
    pub keep_for_group: Duration,
    /// How long workers may take to come back after a restart of the coordinator: members of a group, and holders of
    /// tasks; zero when none can have outlived it.
    pub reattach: Duration,
    /// How long a group may stand still; five steps if those are longer, ten times more at first.
    pub hang: Duration,
    /// How long a group trains before workers that came later join it, at a checkpoint.
    pub grow: Duration,
    /// How long workers may take to leave.
    pub drain: Duration,
    /// Pause after a first failure; doubles up to `retry_cap`.
    pub retry: Duration,
    /// Longest pause after a failure.
    pub retry_cap: Duration,
    /// Counted failures of a task that end the run.
    pub counted_failures: u32,
    /// Failures of a task, and losses of members by the groups of a stage, that do not count until there are more of
    /// them.
    pub free_failures: u32,
    /// Counted groups in a row, without a new checkpoint or a step beyond all before, that end the run.
    pub fruitless_generations: u32,
    /// COMMITs in one part of the commit index. A restart reads as many COMMITs one by one, at most, besides those of
    /// tasks that were leased when the last life ended.
    pub indexed_at_once: usize,
}

impl Default for Timings {
    fn default() -> Self {
        let ms = Duration::from_millis;
        let s = Duration::from_secs;
        Self {
            beat: s(2),
            suspect: s(6),
            lease_ttl: s(30),
            lease_grace: s(5),
            member_silence: s(15),
            reconnect: ms(300),
            sweep: s(1),
            exchange: s(60),
            exchange_per_rank: ms(20),
            first_formation: s(30),
            last_call: s(1),
            keep_for_group: s(30),
            reattach: s(10),
            hang: s(60),
            grow: s(600),
            drain: s(120),
            retry: s(1),
            retry_cap: s(30),
            counted_failures: 4,
            free_failures: 16,
            fruitless_generations: 3,
            indexed_at_once: 1000,
        }
    }
}

impl Timings {
    /// The pause before try `tries + 1`, in milliseconds.
    pub(super) fn retry_ms(&self, tries: u32) -> u64 {
        let doubled = self.retry.as_millis() as u64 * (1 << tries.saturating_sub(1).min(16));
        doubled.min(self.retry_cap.as_millis() as u64)
    }
}

/// The coordinator's mind. Durable part: [`Durable`], the fold of every journaled record. The rest is soft.
#[derive(Debug, Clone)]
pub struct Machine {
    pub(super) plan: Plan,
    pub(super) timings: Timings,
    pub(super) term: Term,
    pub(super) durable: Durable,
    pub(super) run: run::State,
    pub(super) stages: Vec<stage::State>,
    pub(super) fleet: Fleet,
    /// Reported checkpoints that are being read.
    pub(super) checkpoints: BTreeMap<(GroupId, u64), Verification>,
    /// For each stage the most steps that a group of this life was known to have applied when it was given up.
    pub(super) furthest: Vec<u64>,
    /// For each stage the members that groups have lost in this life since one came further than all before it.
    pub(super) losses: Vec<u32>,
    /// Registrations given in this life.
    pub(super) registrations: u32,
    /// When silent workers were last looked for.
    pub(super) swept: Duration,
    /// When deadlines were last looked at.
    pub(super) ticked: Duration,
    /// Whoever wants the run to stop starts it again by itself.
    pub(super) returns: bool,
    /// Why no worker can be started any more, if so.
    pub(super) launcher_failure: Option<String>,
}

impl Machine {
    /// A machine that goes on from `durable`, whose last record must be the term claim of this life.
    pub fn new(plan: Plan, timings: Timings, durable: Durable) -> Self {
        let stages = plan
            .stages
            .iter()
            .map(|stage| match durable.stage(&stage.name).sealed {
                Some(_) => stage::State::Sealed,
                None => stage::State::Blocked,
            })
            .collect();
        Self {
            term: durable.term,
            furthest: vec![0; plan.stages.len()],
            losses: vec![0; plan.stages.len()],
            run: match (&durable.outcome, &durable.paused) {
                (Some(outcome), _) => run::State::Finished(outcome.clone()),
                (None, Some(_)) => run::State::Paused,
                (None, None) => run::State::Running,
            },
            plan,
            timings,
            durable,
            stages,
            fleet: Fleet::default(),
            checkpoints: BTreeMap::new(),
            registrations: 0,
            swept: Duration::ZERO,
            ticked: Duration::ZERO,
            returns: false,
            launcher_failure: None,
        }
    }

    /// Takes in what happened at `now` (since this life began) and decides what to do, in order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        if matches!(self.run, run::State::Finished(_)) {
            if let Event::Arrived { connection, .. } = event {
                out.push(Action::Close(connection));
            }
            return out;
        }
        let settles = self.dispatch(now, event, &mut out);
        if settles {
            self.settle(now, &mut out);
        }
        out
    }

    /// When [`Event::Tick`] is due at the latest; none when nothing is waited for.
    pub fn next_deadline(&self) -> Option<Duration> {
        if matches!(self.run, run::State::Finished(_)) {
            return None;
        }
        let sweep = (!self.fleet.is_empty()).then(|| self.swept + self.timings.sweep);
        let down = self
            .fleet
            .first_down()
            .map(|(at, _)| at + self.timings.reconnect);
        let stop = match &self.run {
            run::State::Stopping { deadline, .. } => Some(*deadline),
            run::State::Running | run::State::Paused | run::State::Finished(_) => None,
        };
        let stages = self.stages.iter().filter_map(|stage| match stage {
            stage::State::Tasks(board) => board.waiting.first(),
            stage::State::Training(group) => self.group_deadline(group),
            stage::State::Blocked
            | stage::State::Inspecting { .. }
            | stage::State::Sealing { .. }
            | stage::State::Sealed => None,
        });
        [sweep, down, stop]
            .into_iter()
            .flatten()
            .chain(stages)
            .min()
    }

    /// The durable part.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// The life this machine lives.
    pub fn term(&self) -> Term {
        self.term
    }

    /// How the run ended, if it did.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.run {
            run::State::Finished(outcome) => Some(outcome),
            run::State::Running | run::State::Paused | run::State::Stopping { .. } => None,
        }
    }

    /// Gives back whether decisions may change.
    fn dispatch(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) -> bool {
        match event {
            Event::Tick => self.tick(now, out),
            Event::Arrived { connection, hello } => self.arrive(connection, hello, now, out),
            Event::Said {
                connection,
                message,
            } => return self.said(connection, message, now, out),
            Event::Closed { connection } => self.fleet.disconnect(connection, now),
            Event::Inspected { stage, finding } => self.inspected(stage, finding, now, out),
            Event::CommitVerified { task, commit } => self.commit_verified(&task, commit, out),
            Event::CheckpointVerified { checkpoint, result } => {
                self.checkpoint_verified(checkpoint, result, now, out);
            }
            Event::Sealed { stage, result } => self.sealed(stage, result, out),
            Event::StopRequested {
                now: at_once,
                returns,
            } => self.stop(at_once, returns, now, out),
            Event::PauseRequested { reason } => self.pause(reason, out),
            Event::ResumeRequested => self.resume(out),
            Event::CancelRequested { reason } => self.finish(Outcome::Cancelled { reason }, out),
            Event::DrainRequested { worker } => self.drain_named(&worker, out),
            Event::LauncherFailed { message } => self.launcher_failed(message, out),
        }
        true
    }

    fn tick(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.ticked = now;
        while let Some((at, incarnation)) = self.fleet.first_down() {
            let due = at + self.timings.reconnect;
            if now < due {
                break;
            }
            if now >= due + self.timings.reconnect {
                // We come too late to say that it did not come back: its hello may lie unread.
                self.fleet.disconnect_again(incarnation, now);
                continue;
            }
            self.lose_worker(incarnation, "its stream ended", true, now, out);
        }
        let due = self.swept + self.timings.sweep;
        if now >= due {
            self.swept = now;
            let late = now - due;
            self.fleet.forgive(late, now);
            let groups = self.stages.iter_mut();
            groups
                .filter_map(stage::State::group_mut)
                .for_each(|group| group.forgive(late, now));
            self.sweep(now, out);
        }
        for at in 0..self.stages.len() {
            if let stage::State::Tasks(board) = &mut self.stages[at] {
                board.wake(now);
            }
            self.group_deadlines(at, now, out);
        }
        if let run::State::Stopping { reason, deadline } = &self.run
            && now >= *deadline
        {
            let reason = reason.clone();
            self.finish(Outcome::Stopped { reason }, out);
        }
    }

    fn sweep(&mut self, now: Duration, out: &mut Vec<Action>) {
        let lease = self.timings.lease_ttl + self.timings.lease_grace;
        let quiet: Vec<_> = self
            .fleet
            .iter()
            .filter(|(_, worker)| now >= worker.heard + self.timings.suspect)
            .map(|(incarnation, worker)| {
                let limit = if worker.group.is_some() {
                    self.timings.member_silence
                } else {
                    lease
                };
                (incarnation, now - worker.heard, limit)
            })
            .collect();
        for (incarnation, silence, limit) in quiet {
            if silence < limit {
                self.suspect(incarnation, silence, out);
                continue;
            }
            let cause = format!("silent for {} s", silence.as_secs());
            self.lose_worker(incarnation, &cause, true, now, out);
        }
    }

    /// A silent worker is given nothing new; what it holds stays its own until it counts as lost.
    fn suspect(&mut self, incarnation: Incarnation, silent: Duration, out: &mut Vec<Action>) {
        let Some(worker) = self.fleet.get(incarnation).filter(|w| !w.suspect) else {
            return;
        };
        out.push(Action::Explain(Decision::Suspected {
            worker: worker.name.clone(),
            incarnation,
            silent,
        }));
        self.fleet
            .update(incarnation, |worker| worker.suspect = true);
    }

    /// Ends the run.
    pub(super) fn finish(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        if matches!(self.run, run::State::Finished(_)) {
            return;
        }
        self.journal(Record::RunFinished(outcome.clone()), out);
        self.drain_everybody(false, &format!("the run {outcome}"), out);
        out.push(Action::Explain(Decision::Finished(outcome.clone())));
        out.push(Action::Finish(outcome.clone()));
        self.run = run::State::Finished(outcome);
    }

    /// Ends the run with a failure.
    pub(super) fn fail(&mut self, message: String, out: &mut Vec<Action>) {
        self.finish(Outcome::Failed { message }, out);
    }

    /// Whether the run is being stopped.
    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.run, run::State::Stopping { .. })
    }

    /// Whether work is begun: the run is neither paused nor stopping nor at its end.
    pub(super) fn is_running(&self) -> bool {
        matches!(self.run, run::State::Running)
    }

    /// Writes down, and takes in, a durable fact.
    pub(super) fn journal(&mut self, record: Record, out: &mut Vec<Action>) {
        self.durable.apply(&record);
        out.push(Action::Journal(record));
    }

    /// Tells a worker, if it can be told.
    pub(super) fn send(&self, to: Incarnation, message: ToWorker, out: &mut Vec<Action>) {
        if let Some(connection) = self.fleet.connection(to) {
            out.push(Action::Send(connection, message));
        }
    }

    /// Acknowledges every report that a verification answers.
    pub(super) fn acknowledge(&self, verification: Verification, out: &mut Vec<Action>) {
        for (reporter, seq) in verification.reports {
            self.send(reporter, ToWorker::ReportAck { seq }, out);
        }
    }

    /// Goes on until nothing more can be decided without another event.
    fn settle(&mut self, now: Duration, out: &mut Vec<Action>) {
        match self.run {
            run::State::Running => {
                self.start_stages(out);
                self.assign(now, out);
                self.seal_complete(out);
                self.finish_if_sealed(out);
            }
            run::State::Paused => {
                self.seal_complete(out);
                self.finish_if_sealed(out);
            }
            run::State::Stopping { .. } => self.settle_stopping(out),
            run::State::Finished(_) => return,
        }
        self.fail_if_deserted(out);
    }

    fn settle_stopping(&mut self, out: &mut Vec<Action>) {
        self.finish_if_sealed(out);
        if let run::State::Stopping { reason, .. } = &self.run
            && self.fleet.is_empty()
        {
            let reason = reason.clone();
            self.finish(Outcome::Stopped { reason }, out);
        }
    }

    fn finish_if_sealed(&mut self, out: &mut Vec<Action>) {
        let all = self
            .stages
            .iter()
            .all(|stage| matches!(stage, stage::State::Sealed));
        if all {
            self.finish(Outcome::Succeeded, out);
        }
    }

    /// Asks again later when that may help; gives the run up otherwise.
    pub(super) fn retry_or_fail(
        &mut self,
        trouble: Trouble,
        what: &str,
        again: Action,
        out: &mut Vec<Action>,
    ) {
        match trouble {
            Trouble::Transient(message) => {
                let what = format!("{what}: {message}");
                out.push(Action::Explain(Decision::Postponed { what }));
                out.push(again);
            }
            Trouble::Permanent(message) => self.fail(format!("{what}: {message}"), out),
        }
    }

    /// Every registration that is a member of a live group, for `invariants`.
    pub(super) fn members(&self) -> BTreeSet<Incarnation> {
        self.stages
            .iter()
            .filter_map(|stage| stage.group()?.formed())
            .flat_map(|(_, members)| members.iter().copied())
            .collect()
    }
}
