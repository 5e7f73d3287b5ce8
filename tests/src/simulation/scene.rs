//! What a simulated run is about: its plan, its waiting times, and what it must amount to whatever happens.

use std::ops::Range;
use std::time::Duration;

use distillery_common::ids::Digest;
use distillery_common::latents::schema::{Element, RowSchema, Value};
use distillery_coordinator::plan::{self, Kind, Plan, Stage, Tasks, Training, Work};
use distillery_coordinator::scheduler::Timings;

use super::chance::mix;
use super::history::History;

/// Rows in one step over all ranks.
pub(super) const BATCH: u64 = 8;
/// Trajectories in one shard, and rows, one for each.
pub(super) const SHARD_ROWS: u64 = 4;

/// One run.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub(super) plan: Plan,
    pub(super) dataset: Digest,
    /// A shard whose input is bad: every attempt says so, and it is set aside.
    pub(super) bad_shard: Option<u64>,
    /// States that training must go through, by position of the stage and step.
    states: Vec<Vec<u64>>,
    short_waits: bool,
}

impl Scene {
    pub(super) fn of(history: &History) -> Self {
        let plan = plan_of(history);
        let states = states_of(&plan);
        let chance = mix(history.seed);
        let bad_shard = (!history.small && chance.is_multiple_of(4)).then_some(chance / 4 % 10);
        Self {
            plan,
            dataset: Digest::of(b"the trajectories of a simulated run"),
            bad_shard,
            states,
            short_waits: !history.seed.is_multiple_of(2),
        }
    }

    /// The default waiting times, or short ones with which more happens.
    pub(super) fn timings(&self) -> Timings {
        // A few tasks must be enough for an index.
        let mut timings = Timings {
            indexed_at_once: 3,
            ..Timings::default()
        };
        if self.short_waits {
            let s = Duration::from_secs;
            timings.lease_ttl = s(12);
            timings.lease_grace = s(2);
            timings.member_silence = s(8);
            timings.exchange = s(20);
            timings.first_formation = s(5);
            timings.keep_for_group = s(10);
            timings.hang = s(20);
            timings.drain = s(20);
            timings.suspect = s(4);
            timings.grow = s(5);
        }
        timings
    }

    /// How many steps a training stage has.
    pub(super) fn steps(&self, stage: &str) -> Option<u64> {
        match &self.plan.stages[self.plan.position(stage)?].work {
            Work::Training(training) => Some(training.steps),
            Work::Tasks(_) => None,
        }
    }

    /// The state of a training stage after `step` steps.
    pub(super) fn state(&self, stage: usize, step: u64) -> u64 {
        self.states[stage][step as usize]
    }

    pub(super) fn schema() -> RowSchema {
        RowSchema {
            latent: Value::new(Element::F16, &[1]),
            ctx: Value::new(Element::F16, &[1, 1]),
            pooled: None,
        }
    }
}

/// What a task writes: a function of its name alone.
pub(super) fn content(stage: &str, index: u64, file: u64) -> Vec<u8> {
    let mut word = mix(index ^ file << 32);
    for byte in stage.bytes() {
        word = mix(word ^ u64::from(byte));
    }
    (0..8).flat_map(|n| mix(word ^ n).to_le_bytes()).collect()
}

/// What the rows `indices` of a step add to a sum that does not depend on the order.
pub(super) fn contribution(stage: usize, indices: Range<u64>) -> u64 {
    indices
        .map(|index| mix(index ^ mix(stage as u64)))
        .fold(0, u64::wrapping_add)
}

/// The state after a step from `state` in which the rows added up to `sum`.
pub(super) fn advance(state: u64, step: u64, sum: u64) -> u64 {
    mix(state ^ mix(sum).wrapping_add(step))
}

/// The state that a stage without a parent starts from.
pub(super) const FRESH: u64 = 0x0D15_7111;

/// The state that a student starts from, given its parent's last.
pub(super) fn inherit(parent: u64) -> u64 {
    mix(parent)
}

fn states_of(plan: &Plan) -> Vec<Vec<u64>> {
    let mut all: Vec<Vec<u64>> = vec![];
    for (at, stage) in plan.stages.iter().enumerate() {
        let mut states = vec![];
        if let Work::Training(training) = &stage.work {
            let first = match training.parent {
                Some(parent) => inherit(*all[parent].last().expect("a parent has a last state")),
                None => FRESH,
            };
            states.push(first);
            for step in 0..training.steps {
                let sum = contribution(at, step * BATCH..(step + 1) * BATCH);
                states.push(advance(states[step as usize], step, sum));
            }
        }
        all.push(states);
    }
    all
}

fn tasks(name: &str, kind: Kind, count: u64, quarantine_limit: u64, after: &[usize]) -> Stage {
    Stage {
        name: name.into(),
        kind,
        after: after.to_vec(),
        work: Work::Tasks(Tasks {
            count,
            rows: count,
            bytes: count,
            quarantine_limit,
        }),
    }
}

fn training(name: &str, steps: u64, after: &[usize], parent: Option<usize>) -> Stage {
    Stage {
        name: name.into(),
        kind: Kind::Distill,
        after: after.to_vec(),
        work: Work::Training(Training {
            steps,
            checkpoint_every: 5,
            keep_last: 1,
            global_batch: BATCH,
            reproducible: false,
            min_world: 2,
            max_world: 3,
            parent,
        }),
    }
}

fn plan_of(history: &History) -> Plan {
    if history.small {
        let mut stages = vec![
            tasks(plan::TRAJECTORIES, Kind::Trajectories, 3, 0, &[]),
            training("seg8", 6, &[0], None),
            tasks(plan::EVALUATE, Kind::Evaluate, 1, 0, &[1]),
        ];
        if let Work::Training(training) = &mut stages[1].work {
            training.checkpoint_every = 3;
        }
        return Plan { stages };
    }
    Plan {
        stages: vec![
            tasks(plan::TRAJECTORIES, Kind::Trajectories, 12, 1, &[]),
            training("seg8", 24, &[0], None),
            training("seg4", 18, &[0, 1], Some(1)),
            // A second line of students from the teacher.
            training("mcd", 12, &[0], None),
            tasks(plan::REFERENCE, Kind::Reference, 6, 0, &[]),
            tasks(plan::EVALUATE, Kind::Evaluate, 3, 0, &[1, 2, 3, 4]),
        ],
    }
}
