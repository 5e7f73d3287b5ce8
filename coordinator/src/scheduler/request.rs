//! What people ask of the run, and what the launcher tells: stop, pause, resume, cancel, drain.

use std::time::Duration;

use distillery_common::ids::Incarnation;

use super::action::{Action, ToWorker};
use super::decision::Decision;
use super::machine::Machine;
use super::record::Record;
use super::run;
use super::run::Outcome;

impl Machine {
    /// Ends the run so that it can be resumed: at once, or after a checkpoint. With `returns` it is resumed by itself.
    pub(super) fn stop(
        &mut self,
        at_once: bool,
        returns: bool,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let reason = String::from("asked to stop");
        self.returns = returns;
        if at_once {
            self.finish(Outcome::Stopped { reason }, out);
        } else if !self.is_stopping() {
            out.push(Action::Explain(Decision::Stopping {
                reason: reason.clone(),
            }));
            self.drain_everybody(true, &reason, out);
            self.run = run::State::Stopping {
                reason,
                deadline: now + self.timings.drain,
            };
        }
    }

    /// Begins nothing new: attempts run to their end, groups to their next checkpoint.
    pub(super) fn pause(&mut self, reason: String, out: &mut Vec<Action>) {
        if matches!(self.run, run::State::Running) {
            self.journal(
                Record::Paused {
                    reason: reason.clone(),
                },
                out,
            );
            self.run = run::State::Paused;
            out.push(Action::Explain(Decision::Paused { reason }));
        }
    }

    /// Goes on after a pause. A run that is being stopped will go on when it is started again.
    pub(super) fn resume(&mut self, out: &mut Vec<Action>) {
        if self.durable.paused.is_none() {
            return;
        }
        self.journal(Record::Resumed, out);
        out.push(Action::Explain(Decision::Resumed));
        if matches!(self.run, run::State::Paused) {
            self.run = run::State::Running;
        }
    }

    /// Tells every worker of a name to leave after what it has in hand.
    pub(super) fn drain_named(&mut self, name: &str, out: &mut Vec<Action>) {
        let named: Vec<_> = self
            .fleet
            .iter()
            .filter(|(_, worker)| worker.name == name && !worker.draining)
            .map(|(incarnation, _)| incarnation)
            .collect();
        if named.is_empty() {
            let what = format!("a request to drain {name}, which is not here or leaves already");
            out.push(Action::Explain(Decision::Ignored { what }));
        }
        for incarnation in named {
            self.drain(incarnation, true, "asked to leave", out);
            out.push(Action::Explain(Decision::Draining {
                worker: name.to_owned(),
            }));
        }
    }

    /// Tells all workers to leave.
    pub(super) fn drain_everybody(
        &mut self,
        checkpoint: bool,
        reason: &str,
        out: &mut Vec<Action>,
    ) {
        let everybody: Vec<_> = self.fleet.iter().map(|(i, _)| i).collect();
        for incarnation in everybody {
            self.drain(incarnation, checkpoint, reason, out);
        }
    }

    /// Tells one worker to leave, and gives it nothing new.
    pub(super) fn drain(
        &mut self,
        incarnation: Incarnation,
        checkpoint: bool,
        reason: &str,
        out: &mut Vec<Action>,
    ) {
        self.fleet
            .update(incarnation, |worker| worker.draining = true);
        let drain = ToWorker::Drain {
            checkpoint,
            returns: self.returns,
            reason: reason.to_owned(),
        };
        self.send(incarnation, drain, out);
    }

    /// No worker can be started any more. Those that died last may still count for a moment: the run ends once
    /// nobody is left.
    pub(super) fn launcher_failed(&mut self, message: String, out: &mut Vec<Action>) {
        out.push(Action::Explain(Decision::Postponed {
            what: format!("no worker can be started: {message}"),
        }));
        self.launcher_failure = Some(message);
    }

    /// Ends a run that nobody works on and nobody will.
    pub(super) fn fail_if_deserted(&mut self, out: &mut Vec<Action>) {
        if self.fleet.is_empty()
            && !self.is_stopping()
            && let Some(message) = self.launcher_failure.take()
        {
            self.fail(message, out);
        }
    }
}
