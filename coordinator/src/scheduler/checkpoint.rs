//! Checkpoints that members report: taken into the record once they were read, and the last one seals its stage.

use std::collections::BTreeSet;
use std::time::Duration;

use distillery_common::group::CheckpointCommitted;

use super::action::Action;
use super::decision::Decision;
use super::durable::Checkpoint;
use super::event::Trouble;
use super::group::Group;
use super::machine::Machine;
use super::record::Record;
use crate::plan::Work;

impl Machine {
    /// A checkpoint's COMMIT was read.
    pub(super) fn checkpoint_verified(
        &mut self,
        checkpoint: CheckpointCommitted,
        result: Result<(), Trouble>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(verification) = self
            .checkpoints
            .get_mut(&(checkpoint.group.clone(), checkpoint.step))
        else {
            return;
        };
        match result {
            Err(Trouble::Transient(what)) => {
                verification.tries += 1;
                let after_ms = self.timings.retry_ms(verification.tries);
                out.push(Action::Explain(Decision::Postponed { what }));
                out.push(Action::VerifyCheckpoint {
                    checkpoint,
                    after_ms,
                });
                return;
            }
            Err(Trouble::Permanent(what)) => {
                out.push(Action::Explain(Decision::Ignored { what: what.clone() }));
                // A late report, from before a coordinator's end, may be of a checkpoint that is gone by right.
                let log = self.durable.stage(&checkpoint.group.stage);
                let is_behind = log
                    .newest(&[])
                    .is_some_and(|newest| newest.step >= checkpoint.step);
                if let Some(at) = self.live_group(&checkpoint.group).filter(|_| !is_behind) {
                    let reason = format!("a checkpoint does not hold what it says: {what}");
                    self.abort(at, &reason, true, now, out);
                }
            }
            Ok(()) => self.take_in(&checkpoint, now, out),
        }
        let key = (checkpoint.group, checkpoint.step);
        let verification = self.checkpoints.remove(&key).unwrap_or_default();
        self.acknowledge(verification, out);
    }

    /// Takes in a reported checkpoint that is whole. Which one is the last follows from the plan, whatever was reported.
    fn take_in(&mut self, reported: &CheckpointCommitted, now: Duration, out: &mut Vec<Action>) {
        let Some(at) = self.plan.position(&reported.group.stage) else {
            return;
        };
        let steps = match &self.plan.stages[at].work {
            Work::Training(training) => training.steps,
            Work::Tasks(_) => 0,
        };
        if reported.step > steps {
            let what = format!("checkpoint {}, whose stage has {steps} steps", reported.key);
            out.push(Action::Explain(Decision::Ignored { what }));
            return;
        }
        let found = Checkpoint {
            step: reported.step,
            generation: reported.group.generation,
            key: reported.key.clone(),
            digest: reported.digest,
            is_final: reported.step == steps,
        };
        self.accept(at, &found, now, out);
    }

    /// Takes a whole checkpoint into the record, if it lies on the lineage; the final one seals its stage.
    pub(super) fn accept(
        &mut self,
        at: usize,
        checkpoint: &Checkpoint,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let stage = self.plan.stages[at].name.clone();
        let log = self.durable.stage(&stage);
        if log.sealed.is_some() {
            return;
        }
        if let Some(newest) = log.newest(&[])
            && newest.step >= checkpoint.step
        {
            // It has been told already, or is behind what counts and may be pruned by now. The last life may have
            // ended between the last record and the seal that follows from it.
            if newest.is_final {
                self.seal_training(at, &newest.clone(), out);
            }
            return;
        }
        if !log.on_lineage(checkpoint) {
            let what = format!("checkpoint {} of a group that was given up", checkpoint.key);
            out.push(Action::Explain(Decision::Ignored { what }));
            return;
        }
        self.journal(
            Record::CheckpointCommitted {
                stage: stage.clone(),
                checkpoint: checkpoint.clone(),
            },
            out,
        );
        out.push(Action::Explain(Decision::Checkpoint {
            stage,
            step: checkpoint.step,
            generation: checkpoint.generation,
        }));
        if let Some(Group::Stepping { advanced, .. }) = self.stages[at].group_mut() {
            *advanced = now;
        }
        if checkpoint.is_final {
            self.seal_training(at, checkpoint, out);
        } else {
            self.prune(at, checkpoint.step, out);
        }
        if self.durable.paused.is_some() && !checkpoint.is_final {
            self.abort(at, "the run is paused", false, now, out);
        }
        self.grow(at, now, out);
    }

    /// The last step's checkpoint is recorded, so the stage is done.
    fn seal_training(&mut self, at: usize, last: &Checkpoint, out: &mut Vec<Action>) {
        self.dissolve(at, out);
        self.seal_stage(at, last.digest, false, out);
        self.prune(at, last.step, out);
    }

    /// Lets go of what lies behind step `before`, all but the newest on the lineage and what the live group started
    /// from. What lies beyond may have been written but not yet reported.
    fn prune(&self, at: usize, before: u64, out: &mut Vec<Action>) {
        let stage = &self.plan.stages[at];
        let Work::Training(training) = &stage.work else {
            return;
        };
        let log = self.durable.stage(&stage.name);
        let mut lineage: Vec<_> = log
            .checkpoints
            .iter()
            .filter(|checkpoint| log.on_lineage(checkpoint))
            .map(|checkpoint| (checkpoint.step, checkpoint.generation))
            .collect();
        lineage.sort();
        let mut pinned: BTreeSet<_> = lineage
            .iter()
            .rev()
            .take(training.keep_last as usize)
            .copied()
            .collect();
        let last = log.generations.last();
        let base = last.map_or(0, |formed| formed.base_step);
        pinned.extend(lineage.iter().filter(|(step, _)| *step == base));
        out.push(Action::Prune {
            stage: at,
            before,
            pinned,
            live: last
                .map(|formed| formed.generation)
                .filter(|_| log.sealed.is_none()),
        });
    }
}
