//! What follows from a failed task: it is tried again, is set aside, or ends the run.

use std::time::Duration;

use distillery_common::ids::Incarnation;
use distillery_common::task::{Failure, FailureClass, Lease, Remedy, TaskId};

use super::action::Action;
use super::decision::Decision;
use super::machine::Machine;
use super::record::Record;
use super::task::Board;
use crate::plan::Work;

impl Machine {
    /// `who` says that `lease` could not be done; nobody but its holder can know.
    pub(super) fn task_failed(
        &mut self,
        who: Incarnation,
        lease: &Lease,
        failure: Failure,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if lease.incarnation != who {
            let what = format!("a failure of {lease}, told by {who}");
            out.push(Action::Explain(Decision::Ignored { what }));
            return;
        }
        let is_live = self
            .board(&lease.task)
            .is_some_and(|board| board.attempt(lease).is_some());
        self.release(lease);
        if !is_live {
            return;
        }
        let timings = self.timings.clone();
        let task = lease.task.clone();
        let board = self.board(&task).expect("it held the lease a moment ago");
        let remedy = match failure.class.remedy() {
            Remedy::RetryFree => {
                let free = board.free_failures.entry(task.index).or_default();
                *free += 1;
                let free = *free;
                let pause = match failure.class {
                    FailureClass::HostLost => timings.retry_ms(free),
                    _ => 0,
                };
                board.postpone(task.index, now + Duration::from_millis(pause));
                if free > timings.free_failures {
                    Remedy::RetryCounted
                } else {
                    Remedy::RetryFree
                }
            }
            remedy => remedy,
        };
        match remedy {
            Remedy::RetryFree => {}
            Remedy::RetryCounted => self.task_failure_counts(&task, &failure, now, out),
            Remedy::Quarantine => self.quarantine(&task, &failure, out),
            Remedy::FailRun => {
                self.fail(format!("{task}: {failure}{}", failure.below()), out);
            }
        }
        let log = self.durable.stage(&task.stage);
        out.push(Action::Explain(Decision::Retrying {
            lease: lease.clone(),
            failure,
            counted: log.failures.get(&task.index).copied().unwrap_or(0),
        }));
    }

    /// The task has failed once more; after too many times, the run fails.
    fn task_failure_counts(
        &mut self,
        task: &TaskId,
        failure: &Failure,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        self.journal(
            Record::TaskFailedCounted {
                stage: task.stage.clone(),
                index: task.index,
                class: failure.class,
                message: failure.message.clone(),
            },
            out,
        );
        let counted = self.durable.stage(&task.stage).failures[&task.index];
        if counted >= self.timings.counted_failures {
            let below = failure.below();
            let message = format!("{task} failed {counted} times; the last time: {failure}{below}");
            self.fail(message, out);
            return;
        }
        let until = now + Duration::from_millis(self.timings.retry_ms(counted));
        if let Some(board) = self.board(task) {
            board.postpone(task.index, until);
        }
    }

    /// Sets a task aside, if so many may be; otherwise the run fails. A COMMIT of it that is being read is given the
    /// chance to say otherwise.
    fn quarantine(&mut self, task: &TaskId, failure: &Failure, out: &mut Vec<Action>) {
        let is_being_read = |board: &mut Board| board.verifying.contains_key(&task.index);
        if self.board(task).is_some_and(is_being_read) {
            return;
        }
        let limit = self
            .plan
            .position(&task.stage)
            .map(|at| &self.plan.stages[at].work);
        let limit = match limit {
            Some(Work::Tasks(tasks)) => tasks.quarantine_limit,
            Some(Work::Training(_)) | None => 0,
        };
        let aside = self.durable.stage(&task.stage).quarantined.len() as u64;
        if aside >= limit {
            let message = format!(
                "{task}: {failure}; {limit} tasks of this stage may be set aside for bad input (trajectories.quarantine){}",
                failure.below()
            );
            self.fail(message, out);
            return;
        }
        self.journal(
            Record::Quarantined {
                stage: task.stage.clone(),
                index: task.index,
                message: failure.headline().to_owned(),
            },
            out,
        );
        let others = self.board(task).and_then(|board| {
            board.quarantine(task.index);
            board.leased.remove(&task.index)
        });
        for other in others.into_iter().flatten() {
            self.revoke(other.lease, "the task is set aside", out);
        }
        out.push(Action::Explain(Decision::Quarantined {
            task: task.clone(),
            message: failure.headline().to_owned(),
        }));
    }
}
