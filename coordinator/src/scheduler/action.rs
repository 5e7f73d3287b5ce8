//! What the machine wants done, in order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use distillery_common::group::{CheckpointCommitted, GroupId, Membership};
use distillery_common::ids::{Generation, Incarnation, Term};
use distillery_common::task::{CommitSummary, Failure, Lease, TaskId};

use super::event::ConnectionId;
use super::record::Record;
use super::run::Outcome;

/// An effect. The driver carries actions out in order and awaits each `Journal` before what follows it.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make a record durable.
    Journal(Record),
    /// Tell a worker.
    Send(ConnectionId, ToWorker),
    /// End a stream: its worker counts as lost, or was never welcome.
    Close(ConnectionId),
    /// Look what the store holds of a stage; answer with `Event::Inspected`.
    Inspect {
        /// Position of the stage.
        stage: usize,
        /// Task stages: nothing from this index on was ever leased; none when that is not known.
        granted_below: Option<u64>,
        /// Wait this long before, because the last try failed.
        after_ms: u64,
    },
    /// Read a task's COMMIT; answer with `Event::CommitVerified`.
    VerifyCommit {
        /// Which task.
        task: TaskId,
        /// Wait this long before, because the last try failed.
        after_ms: u64,
    },
    /// Read a checkpoint's COMMIT; answer with `Event::CheckpointVerified`.
    VerifyCheckpoint {
        /// Which checkpoint.
        checkpoint: CheckpointCommitted,
        /// Wait this long before, because the last try failed.
        after_ms: u64,
    },
    /// Seal a task stage in the store; answer with `Event::Sealed`.
    Seal {
        /// Position of the stage.
        stage: usize,
        /// Every task's COMMIT, without those set aside.
        commits: BTreeMap<u64, CommitSummary>,
        /// Wait this long before, because the last try failed.
        after_ms: u64,
    },
    /// Write a part of a task stage's commit index, which spares a later coordinator reading each COMMIT; no answer
    /// is awaited, since the index is a cache.
    Index {
        /// Position of the stage.
        stage: usize,
        /// This life…
        term: Term,
        /// …and the number of the part in it.
        part: u64,
        /// Verified COMMITs that no other part has.
        commits: Vec<(u64, CommitSummary)>,
    },
    /// Delete checkpoints that nothing needs any more; no answer is awaited.
    Prune {
        /// Position of the stage.
        stage: usize,
        /// Only those with fewer steps.
        before: u64,
        /// Steps and generations of those that stay.
        pinned: BTreeSet<(u64, Generation)>,
        /// The group at work, whose unfinished checkpoints stay; none once the stage has ended.
        live: Option<Generation>,
    },
    /// For the log and for `status`.
    Explain(Decision),
    /// Nothing more will come.
    Finish(Outcome),
}

/// What a worker is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToWorker {
    /// It is registered. An incarnation other than the one it held means: drop every lease and group.
    Welcome {
        /// Its registration.
        incarnation: Incarnation,
    },
    /// A beat was received.
    BeatAck {
        /// Which.
        seq: u64,
    },
    /// Work on this.
    Grant(Lease),
    /// Stop working on this.
    Revoke {
        /// On what.
        lease: Lease,
        /// For people.
        reason: String,
    },
    /// Take part in a group.
    GroupJoin(Membership),
    /// Where all ranks listen, in order.
    GroupPeers {
        /// Which formation.
        group: GroupId,
        /// One for each rank.
        addresses: Vec<String>,
    },
    /// Leave a group at once.
    GroupAbort {
        /// Which formation.
        group: GroupId,
        /// For people.
        reason: String,
    },
    /// A report has had its effect.
    ReportAck {
        /// Which.
        seq: u64,
    },
    /// Take no more work, and leave.
    Drain {
        /// A group commits one more checkpoint first.
        checkpoint: bool,
        /// For people.
        reason: String,
    },
}

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
    /// A group was given up.
    Aborted {
        /// Which formation.
        group: GroupId,
        /// Why.
        reason: String,
        /// Counted generations since the last checkpoint.
        fruitless: u32,
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
            } => {
                let how = if *returned { "is back" } else { "joined" };
                write!(f, "worker {worker} {how} as {incarnation}")
            }
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
            Self::StageSealed {
                stage,
                cached: true,
            } => {
                write!(f, "stage {stage} was sealed by an earlier run")
            }
            Self::StageSealed { stage, .. } => write!(f, "stage {stage} sealed"),
            Self::Suspected { worker, silent, .. } => write!(
                f,
                "worker {worker} is suspect: silent for {:.1} s; it is given nothing new",
                silent.as_secs_f64()
            ),
            Self::Cleared { worker } => write!(f, "worker {worker} was heard again"),
            Self::Granted { lease, why } => write!(f, "granted {lease}: {why}"),
            Self::Reserved { stage, tasks, wait } => write!(
                f,
                "{tasks} tasks of {stage} wait {} s for holders of before the restart",
                wait.as_secs()
            ),
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
            Self::Aborted {
                group,
                reason,
                fruitless,
            } => write!(
                f,
                "gave up {group}: {reason}; {fruitless} generations without a checkpoint"
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

fn resized(f: &mut fmt::Formatter<'_>, group: &GroupId, world: u32, was: u32) -> fmt::Result {
    let engines = if world == 1 { "engine" } else { "engines" };
    write!(
        f,
        "{} goes on with {world} {engines} instead of {was}: the result will not be bit-equal to that of an \
         undisturbed run",
        group.stage
    )
}
