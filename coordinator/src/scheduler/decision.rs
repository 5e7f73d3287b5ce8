//! What was decided, and why: for the log and for `status`.

use std::fmt;
use std::time::Duration;

use distillery_common::group::GroupId;
use distillery_common::ids::{Generation, Incarnation};
use distillery_common::task::{Failure, FailureClass, Lease, TaskId};

use super::run::Outcome;

/// What was decided, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// A worker is part of the fleet.
    Welcomed {
        /// Name of the worker.
        worker: String,
        /// Its registration.
        incarnation: Incarnation,
        /// Whether it had been here before its stream broke.
        returned: bool,
    },
    /// A worker is no longer part of the fleet.
    Lost {
        /// Name of the worker.
        worker: String,
        /// Its registration.
        incarnation: Incarnation,
        /// How it was noticed.
        cause: String,
        /// Leases that are pending again.
        requeued: usize,
        /// It said goodbye.
        on_purpose: bool,
    },
    /// A worker has gone silent and is given nothing new.
    Suspected {
        /// Name of the worker.
        worker: String,
        /// Its registration.
        incarnation: Incarnation,
        /// For how long it was not heard.
        silent: Duration,
    },
    /// A suspected worker was heard again.
    Cleared {
        /// Name of the worker.
        worker: String,
    },
    /// A stage began, or went on after a restart.
    StageStarted {
        /// Name of the stage.
        stage: String,
        /// Tasks or steps already done.
        done: u64,
        /// Tasks or steps in all.
        total: u64,
    },
    /// A stage is done.
    StageSealed {
        /// Name of the stage.
        stage: String,
        /// Whether the seal was there already.
        cached: bool,
    },
    /// A task was given to a worker.
    Granted {
        /// The attempt.
        lease: Lease,
        /// Why this task, and why now.
        why: Why,
    },
    /// Tasks that may still be held by workers of an earlier life wait for them.
    Reserved {
        /// Name of the stage.
        stage: String,
        /// How many tasks.
        tasks: u64,
        /// For how long.
        wait: Duration,
    },
    /// An attempt failed and its task waits for another.
    Retrying {
        /// The attempt.
        lease: Lease,
        /// How it failed.
        failure: Failure,
        /// Counted failures of the task so far.
        counted: u32,
    },
    /// A task was set aside.
    Quarantined {
        /// Which.
        task: TaskId,
        /// Why.
        message: String,
    },
    /// A group was formed.
    Formed {
        /// Which formation.
        group: GroupId,
        /// Number of members.
        world: u32,
        /// Step it starts from.
        base_step: u64,
    },
    /// A group goes on from a state that a group of another size made.
    Resized {
        /// Which formation.
        group: GroupId,
        /// Number of members.
        world: u32,
        /// Members of the group that made the state.
        was: u32,
    },
    /// All members of a group know each other.
    Exchanged {
        /// Which formation.
        group: GroupId,
    },
    /// A group has applied its first step.
    Trains {
        /// Which formation.
        group: GroupId,
        /// Steps applied.
        step: u64,
    },
    /// A group was given up.
    Aborted {
        /// Which formation.
        group: GroupId,
        /// Why.
        reason: String,
        /// Steps that it was known to have applied.
        reached: u64,
        /// Counted generations in a row that got no further.
        fruitless: u32,
        /// The run is paused or stops, and its group with it.
        with_run: bool,
    },
    /// A checkpoint counts.
    Checkpoint {
        /// Name of the stage.
        stage: String,
        /// Steps applied in it.
        step: u64,
        /// Who wrote it.
        generation: Generation,
    },
    /// A message or an object was not taken seriously.
    Ignored {
        /// What, and why.
        what: String,
    },
    /// Something is tried again later.
    Postponed {
        /// What, and why.
        what: String,
    },
    /// Nothing new is begun.
    Paused {
        /// Why.
        reason: String,
    },
    /// Work goes on.
    Resumed,
    /// A worker was told to leave after what it has in hand.
    Draining {
        /// Name of the worker.
        worker: String,
    },
    /// The run stops, to be resumed.
    Stopping {
        /// Why.
        reason: String,
    },
    /// The run ended.
    Finished(Outcome),
}

/// How loudly a decision is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weight {
    /// One of very many.
    Detail,
    /// The ordinary course of a run.
    Ordinary,
    /// Something went wrong, and the run goes on.
    Trouble,
}

impl Decision {
    /// How loudly it is told.
    pub fn weight(&self) -> Weight {
        match self {
            Self::Granted { .. } => Weight::Detail,
            Self::Lost { on_purpose, .. } if *on_purpose => Weight::Ordinary,
            Self::Aborted { with_run, .. } if *with_run => Weight::Ordinary,
            Self::Retrying { failure, .. } if is_told(failure.class) => Weight::Ordinary,
            Self::Lost { .. }
            | Self::Retrying { .. }
            | Self::Quarantined { .. }
            | Self::Aborted { .. }
            | Self::Resized { .. }
            | Self::Suspected { .. }
            | Self::Postponed { .. } => Weight::Trouble,
            Self::Welcomed { .. }
            | Self::StageStarted { .. }
            | Self::StageSealed { .. }
            | Self::Formed { .. }
            | Self::Exchanged { .. }
            | Self::Trains { .. }
            | Self::Checkpoint { .. }
            | Self::Ignored { .. }
            | Self::Cleared { .. }
            | Self::Reserved { .. }
            | Self::Paused { .. }
            | Self::Resumed
            | Self::Draining { .. }
            | Self::Stopping { .. }
            | Self::Finished(_) => Weight::Ordinary,
        }
    }
}

/// Whether an attempt ended because it was told to.
fn is_told(class: FailureClass) -> bool {
    matches!(class, FailureClass::Preempted | FailureClass::Superseded)
}

/// Why a task was given to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// It is the lowest that is open, and the worker is idle.
    Next,
    /// An earlier attempt at it has ended without a COMMIT.
    Again,
    /// The attempt at it is late, most other tasks are done, and the worker is idle: a second attempt may be first.
    Straggler {
        /// Age of the first attempt.
        age: Duration,
        /// The middle of how long the last attempts took.
        median: Duration,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Next => write!(f, "the next task for an idle worker"),
            Self::Again => write!(f, "an earlier attempt ended"),
            Self::Straggler { age, median } => write!(
                f,
                "a second attempt, since the first takes {:.1} s where {:.1} s are usual",
                age.as_secs_f64(),
                median.as_secs_f64()
            ),
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Welcomed {
                worker,
                incarnation,
                returned,
            } => welcomed(f, worker, *incarnation, *returned),
            Self::Lost {
                worker,
                cause,
                requeued,
                ..
            } => write!(
                f,
                "worker {worker} left: {cause}; {requeued} tasks wait again"
            ),
            Self::StageStarted { stage, done, total } => {
                write!(f, "stage {stage} started with {done} of {total} done")
            }
            Self::StageSealed { stage, cached } => sealed(f, stage, *cached),
            Self::Suspected { worker, silent, .. } => suspected(f, worker, *silent),
            Self::Cleared { worker } => write!(f, "worker {worker} was heard again"),
            Self::Granted { lease, why } => write!(f, "granted {lease}: {why}"),
            Self::Reserved { stage, tasks, wait } => reserved(f, stage, *tasks, *wait),
            Self::Retrying {
                lease,
                failure,
                counted,
            } => write!(
                f,
                "{lease} failed: {failure}; {counted} counted failures, trying again"
            ),
            Self::Quarantined { task, message } => write!(f, "{task} set aside: {message}"),
            Self::Formed {
                group,
                world,
                base_step,
            } => write!(f, "formed {group} of {world} from step {base_step}"),
            Self::Resized { group, world, was } => resized(f, group, *world, *was),
            Self::Exchanged { group } => write!(f, "{group} is connected"),
            Self::Trains { group, step } => write!(f, "{group} trains: step {step} is applied"),
            Self::Aborted {
                group,
                reason,
                reached,
                fruitless,
                ..
            } => write!(
                f,
                "gave up {group} at step {reached}: {reason}; {fruitless} groups in a row got no further"
            ),
            Self::Checkpoint {
                stage,
                step,
                generation,
            } => write!(
                f,
                "checkpoint of {stage} at step {step} by generation {generation}"
            ),
            Self::Ignored { what } => write!(f, "ignored: {what}"),
            Self::Postponed { what } => write!(f, "postponed: {what}"),
            Self::Paused { reason } => write!(f, "paused: {reason}; nothing new is begun"),
            Self::Resumed => write!(f, "resumed"),
            Self::Draining { worker } => {
                write!(f, "worker {worker} leaves after what it has in hand")
            }
            Self::Stopping { reason } => write!(f, "stopping: {reason}"),
            Self::Finished(outcome) => write!(f, "run {outcome}"),
        }
    }
}

fn sealed(f: &mut fmt::Formatter<'_>, stage: &str, cached: bool) -> fmt::Result {
    let when = if cached { " by an earlier run" } else { "" };
    write!(f, "stage {stage} sealed{when}")
}

fn welcomed(
    f: &mut fmt::Formatter<'_>,
    worker: &str,
    incarnation: Incarnation,
    returned: bool,
) -> fmt::Result {
    let how = if returned { "is back" } else { "joined" };
    write!(f, "worker {worker} {how} as {incarnation}")
}

fn suspected(f: &mut fmt::Formatter<'_>, worker: &str, silent: Duration) -> fmt::Result {
    let silent = silent.as_secs_f64();
    write!(
        f,
        "worker {worker} is suspect: silent for {silent:.1} s; it is given nothing new"
    )
}

fn reserved(f: &mut fmt::Formatter<'_>, stage: &str, tasks: u64, wait: Duration) -> fmt::Result {
    let wait = wait.as_secs();
    write!(
        f,
        "{tasks} tasks of {stage} wait {wait} s for workers that may hold them since before the restart"
    )
}

fn resized(f: &mut fmt::Formatter<'_>, group: &GroupId, world: u32, was: u32) -> fmt::Result {
    let engines = if world == 1 { "engine" } else { "engines" };
    write!(
        f,
        "{} goes on with {world} {engines} instead of {was}: the result will not be bit-equal to that of an \
         undisturbed run",
        group.stage
    )
}
