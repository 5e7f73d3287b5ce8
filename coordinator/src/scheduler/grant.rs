//! Idle workers get work: the earliest stage's lowest open task, a place in a group, or a second try at a straggler.

use std::time::Duration;

use distillery_common::ids::Incarnation;
use distillery_common::task::{Lease, TaskId};

use super::action::{Action, ToWorker};
use super::decision::{Decision, Why};
use super::machine::Machine;
use super::record::Record;
use super::task::Board;
use crate::plan::Work;

/// Fewest and most tasks between two records of how far leases have come.
const MARKS: (u64, u64) = (16, 1000);

impl Machine {
    /// Gives idle workers to stages, earlier stages first.
    pub(super) fn assign(&mut self, now: Duration, out: &mut Vec<Action>) {
        for at in 0..self.stages.len() {
            if self.stages[at].board_mut().is_some() {
                self.grant(at, now, out);
            } else if let Work::Training(training) = &self.plan.stages[at].work {
                let training = training.clone();
                if self.gather(at, &training, now, out) {
                    return;
                }
            }
        }
        if now == self.swept {
            for at in 0..self.stages.len() {
                self.speculate(at, now, out);
            }
        }
    }

    fn grant(&mut self, at: usize, now: Duration, out: &mut Vec<Action>) {
        loop {
            let Some(holder) = self.fleet.idle().next() else {
                return;
            };
            let Some(board) = self.stages[at].board_mut() else {
                return;
            };
            let Some(&index) = board.pending.first() else {
                return;
            };
            let why = match board.next_attempt(index) {
                1 => Why::Next,
                _ => Why::Again,
            };
            self.mark(at, index, out);
            self.lease(at, index, holder, why, now, out);
        }
    }

    /// Writes down that leases have come as far as `index`, so that a restart knows which tasks nobody can hold. It
    /// looks ahead by two tasks for each that the fleet can hold: the fewer, the fewer wait in vain after a restart;
    /// the more, the fewer records.
    fn mark(&mut self, at: usize, index: u64, out: &mut Vec<Action>) {
        let stage = &self.plan.stages[at].name;
        if index >= self.durable.stage(stage).granted_below {
            let stage = stage.clone();
            let ahead = (2 * self.fleet.slots()).clamp(MARKS.0, MARKS.1);
            let below = index + ahead;
            self.journal(Record::GrantsReached { stage, below }, out);
        }
    }

    fn lease(
        &mut self,
        at: usize,
        index: u64,
        holder: Incarnation,
        why: Why,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let stage = self.plan.stages[at].name.clone();
        let term = self.term;
        let Some(board) = self.stages[at].board_mut() else {
            return;
        };
        let lease = Lease {
            term,
            task: TaskId { stage, index },
            attempt: board.next_attempt(index),
            incarnation: holder,
        };
        board.lease(lease.clone(), now);
        self.fleet.update(holder, |worker| {
            worker.leases.insert(lease.clone());
        });
        let granted = Decision::Granted {
            lease: lease.clone(),
            why,
        };
        out.push(Action::Explain(granted));
        self.send(holder, ToWorker::Grant(lease), out);
    }

    /// Gives stragglers of a stage that is mostly done a second attempt each, oldest first, while workers are idle.
    /// The create-only COMMIT decides which attempt counts.
    fn speculate(&mut self, at: usize, now: Duration, out: &mut Vec<Action>) {
        let Some(board) = self.stages[at].board_mut() else {
            return;
        };
        let Some((median, late)) = stragglers(board, now) else {
            return;
        };
        for (age, index, first) in late {
            let Some(holder) = self.fleet.idle().find(|&idle| idle != first) else {
                return;
            };
            let why = Why::Straggler { age, median };
            self.lease(at, index, holder, why, now, out);
        }
    }

    pub(super) fn board(&mut self, task: &TaskId) -> Option<&mut Board> {
        let at = self.plan.position(&task.stage)?;
        self.stages[at].board_mut()
    }
}

/// An attempt that takes too long: its age, its task, and who holds it.
type Straggler = (Duration, u64, Incarnation);

/// The usual life of an attempt, and the attempts that are late by it: more than half as long again, without a
/// second one, in a stage of which three quarters are done and nothing is open. Oldest first.
fn stragglers(board: &Board, now: Duration) -> Option<(Duration, Vec<Straggler>)> {
    if !board.pending.is_empty() || board.done() * 4 < board.count * 3 {
        return None;
    }
    let median = board.median_life()?;
    let mut late: Vec<_> = board
        .leased
        .iter()
        .filter(|(index, attempts)| attempts.len() == 1 && !board.verifying.contains_key(index))
        .map(|(&index, attempts)| {
            let age = now.saturating_sub(attempts[0].since);
            (age, index, attempts[0].lease.incarnation)
        })
        .filter(|(age, _, _)| *age * 2 > median * 3)
        .collect();
    late.sort_by(|a, b| b.cmp(a));
    Some((median, late))
}
