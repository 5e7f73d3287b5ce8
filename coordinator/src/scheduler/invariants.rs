//! What must hold after every event. The numbers are those of the design of the control plane.

use std::collections::BTreeSet;
use std::fmt;

use super::machine::Machine;
use super::run;
use super::stage::State;
use super::task::Attempt;
use crate::plan::Work;

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Its number, `I1`…
    pub invariant: &'static str,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.seen)
    }
}

impl Machine {
    /// The first promise that does not hold.
    pub fn check(&self) -> Result<(), Violation> {
        self.check_tasks()?;
        self.check_generations()?;
        self.check_leases()?;
        self.check_liveness()?;
        self.check_inputs()?;
        self.check_bounds()
    }

    /// I1: every task is in exactly one place.
    fn check_tasks(&self) -> Result<(), Violation> {
        for (at, stage) in self.stages.iter().enumerate() {
            let State::Tasks(board) = stage else {
                continue;
            };
            for index in 0..board.count {
                let places = [
                    board.pending.contains(&index),
                    board.waiting.contains(index),
                    board.leased.contains_key(&index) || board.verifying.contains_key(&index),
                    board.committed.contains_key(&index),
                    board.quarantined.contains(&index),
                ];
                let n = places.iter().filter(|&&is_there| is_there).count();
                ensure("I1", n == 1, || {
                    format!(
                        "{}/{index} is in {n} places: {places:?}",
                        self.plan.stages[at].name
                    )
                })?;
            }
        }
        Ok(())
    }

    /// I2: generations increase, and a worker is in at most one live group.
    fn check_generations(&self) -> Result<(), Violation> {
        let mut all: Vec<_> = self
            .durable
            .stages
            .values()
            .flat_map(|log| log.generations.iter().map(|formed| formed.generation))
            .collect();
        all.sort();
        let n = all.len();
        all.dedup();
        ensure("I2", all.len() == n, || {
            "a generation was used twice".into()
        })?;
        ensure(
            "I2",
            all.last().copied().unwrap_or_default() == self.durable.generation,
            || "the highest generation is not the last".into(),
        )?;
        for (name, log) in &self.durable.stages {
            let grows = log
                .generations
                .windows(2)
                .all(|w| w[0].generation < w[1].generation);
            ensure("I2", grows, || {
                format!("generations of {name} do not increase")
            })?;
        }
        let mut seen = BTreeSet::new();
        for (id, members) in self.stages.iter().filter_map(|s| s.group()?.formed()) {
            for member in members {
                ensure("I2", seen.insert(*member), || {
                    format!("{member} is in two live groups, one of them {id}")
                })?;
            }
        }
        Ok(())
    }

    /// I5: boards and workers agree on who holds what, and a member of a group holds nothing else.
    fn check_leases(&self) -> Result<(), Violation> {
        for stage in &self.stages {
            let State::Tasks(board) = stage else {
                continue;
            };
            for Attempt { lease, .. } in board.leased.values().flatten() {
                let holder = self.fleet.get(lease.incarnation);
                ensure(
                    "I5",
                    holder.is_some_and(|w| w.leases.contains(lease)),
                    || format!("{lease} is held by nobody"),
                )?;
            }
        }
        let members = self.members();
        for (incarnation, worker) in self.fleet.iter() {
            for lease in &worker.leases {
                let at = self.plan.position(&lease.task.stage);
                let agrees = at.is_some_and(|at| match &self.stages[at] {
                    State::Tasks(board) => board.attempt(lease).is_some(),
                    State::Inspecting { .. } => true,
                    State::Blocked | State::Training(_) | State::Sealing { .. } | State::Sealed => {
                        false
                    }
                });
                ensure("I5", agrees, || {
                    format!("{} works on {lease}, which has ended", worker.name)
                })?;
            }
            let is_member = members.contains(&incarnation);
            ensure("I5", !is_member || worker.leases.is_empty(), || {
                format!("{} trains and holds a lease", worker.name)
            })?;
        }
        Ok(())
    }

    /// I6: what is not terminal has a deadline or waits for a live party.
    fn check_liveness(&self) -> Result<(), Violation> {
        if !matches!(self.run, run::State::Running) {
            return Ok(());
        }
        for (id, members) in self.stages.iter().filter_map(|s| s.group()?.formed()) {
            ensure("I6", self.next_deadline().is_some(), || {
                format!("{id} waits forever")
            })?;
            let reattaching = self
                .live_group(id)
                .and_then(|at| self.stages[at].group())
                .is_some_and(|g| matches!(g, super::group::Group::Reattaching { .. }));
            for &member in members {
                ensure(
                    "I6",
                    reattaching || self.fleet.get(member).is_some(),
                    || format!("{id} waits for {member}, who is gone"),
                )?;
            }
        }
        ensure(
            "I6",
            self.fleet.is_empty() || self.next_deadline().is_some(),
            || "nobody would notice a silent worker".into(),
        )
    }

    /// I8: a stage that started reads only sealed stages.
    fn check_inputs(&self) -> Result<(), Violation> {
        for (stage, state) in self.plan.stages.iter().zip(&self.stages) {
            if matches!(state, State::Blocked | State::Sealed) {
                continue;
            }
            for &input in &stage.after {
                let is_sealed = matches!(self.stages[input], State::Sealed);
                ensure("I8", is_sealed, || {
                    format!(
                        "{} started before {}",
                        stage.name, self.plan.stages[input].name
                    )
                })?;
            }
        }
        Ok(())
    }

    /// I10: counted attempts and fruitless generations are bounded.
    fn check_bounds(&self) -> Result<(), Violation> {
        for (name, log) in &self.durable.stages {
            ensure(
                "I10",
                log.fruitless <= self.timings.fruitless_generations,
                || format!("{name}: {} generations without a checkpoint", log.fruitless),
            )?;
            for (index, &counted) in &log.failures {
                ensure("I10", counted <= self.timings.counted_failures, || {
                    format!("{name}/{index}: {counted} counted failures")
                })?;
            }
        }
        for stage in &self.plan.stages {
            let aside = self.durable.stage(&stage.name).quarantined.len() as u64;
            let limit = match &stage.work {
                Work::Tasks(tasks) => tasks.quarantine_limit,
                Work::Training(_) => 0,
            };
            ensure("I10", aside <= limit, || {
                format!("{aside} tasks of {} set aside, {limit} allowed", stage.name)
            })?;
        }
        Ok(())
    }
}

fn ensure(
    invariant: &'static str,
    holds: bool,
    seen: impl FnOnce() -> String,
) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation {
            invariant,
            seen: seen(),
        })
    }
}
