//! What must survive the coordinator: almost nothing, because COMMITs are durable objects of their own.

use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::task::FailureClass;

use super::durable::Checkpoint;
use super::run::Outcome;

/// One durable fact. Stages are called by name, because a record outlives the process that knew their positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A coordinator took the run; everything of lower terms is void.
    TermClaimed {
        /// Its life.
        term: Term,
        /// Where its service answers.
        endpoint: String,
    },
    /// Work on a stage began.
    StageStarted {
        /// Which.
        stage: String,
    },
    /// A stage's result is complete and immutable.
    StageSealed {
        /// Which.
        stage: String,
        /// Of the manifest, or of the final checkpoint's COMMIT.
        digest: Digest,
    },
    /// Tasks of a stage from `below` on have never been leased. Written before the first of them is.
    GrantsReached {
        /// Which.
        stage: String,
        /// Every lease so far is of an index below this one.
        below: u64,
    },
    /// A group is about to be told to form.
    GenerationFormed {
        /// Its fencing number.
        generation: Generation,
        /// What it trains.
        stage: String,
        /// Its members in rank order.
        members: Vec<Incarnation>,
        /// Steps applied in the state it starts from.
        base_step: u64,
        /// COMMIT of that state; none at step 0.
        base: Option<String>,
    },
    /// A group was given up.
    GenerationFailed {
        /// Which.
        generation: Generation,
        /// What it trained.
        stage: String,
        /// For people.
        reason: String,
        /// Whether it counts towards giving up the stage.
        counted: bool,
        /// Whether it came further than all before it, so that counting begins anew.
        further: bool,
    },
    /// A checkpoint was verified.
    CheckpointCommitted {
        /// What was trained.
        stage: String,
        /// Where it lies and what it is.
        checkpoint: Checkpoint,
    },
    /// An attempt failed in a way that counts.
    TaskFailedCounted {
        /// Stage of the task.
        stage: String,
        /// Index of the task.
        index: u64,
        /// How.
        class: FailureClass,
        /// For people.
        message: String,
    },
    /// A task was set aside.
    Quarantined {
        /// Stage of the task.
        stage: String,
        /// Index of the task.
        index: u64,
        /// For people.
        message: String,
    },
    /// Nothing new is begun until somebody resumes the run.
    Paused {
        /// Who or why.
        reason: String,
    },
    /// Work goes on.
    Resumed,
    /// The run ended, or stopped to be resumed.
    RunFinished(Outcome),
}
