//! Units of work that a worker can lease, and the ways in which they fail.

use std::fmt;

use crate::ids::{Digest, Incarnation, Term};

/// Unit `index` of the task stage named `stage`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId {
    /// Name of a stage in the plan.
    pub stage: String,
    /// Position within the stage: a shard of trajectories, a model to evaluate, a student to export.
    pub index: u64,
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.stage, self.index)
    }
}

/// One attempt held by one worker registration until a deadline; the token that fences its holder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease {
    /// Coordinator life that granted it.
    pub term: Term,
    /// What is leased.
    pub task: TaskId,
    /// Number of the try, from 1.
    pub attempt: u32,
    /// Who holds it.
    pub incarnation: Incarnation,
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} attempt {} by {}",
            self.task, self.attempt, self.incarnation
        )
    }
}

/// How far an attempt is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Which attempt.
    pub lease: Lease,
    /// Units done, of `total`; what a unit is depends on the task.
    pub done: u64,
    /// Units to do.
    pub total: u64,
}

/// What a task's winning COMMIT says, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitSummary {
    /// Key of the COMMIT, relative to the run URI.
    pub key: String,
    /// Rows in the files it names.
    pub rows: u64,
    /// Bytes in the files it names.
    pub bytes: u64,
    /// SHA-256 of the COMMIT's bytes.
    pub digest: Digest,
}

/// Decides what happens after a failure. Text never does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureClass {
    /// The worker was told to leave.
    Preempted,
    /// The worker or its engine died.
    HostLost,
    /// The lease or generation had ended.
    Stale,
    /// Another attempt committed first.
    Superseded,
    /// Storage or network.
    Io,
    /// Host or device memory.
    OutOfMemory,
    /// The all-reduce of a training group.
    Collective,
    /// Anything unforeseen.
    Unknown,
    /// The recipe or the host set-up.
    Config,
    /// A stored file that does not fit what reads it.
    Schema,
    /// Credentials.
    Auth,
    /// This shard's input.
    BadInput,
    /// NaN, or states that differ between ranks.
    Diverged,
}

/// What the coordinator does about a class of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Try again, as often as it takes.
    RetryFree,
    /// Try again, at most four counted times.
    RetryCounted,
    /// Set the task aside, if the recipe allows.
    Quarantine,
    /// Stop the run.
    FailRun,
}

impl FailureClass {
    /// All classes, for exhaustive tests and converters.
    pub const ALL: [Self; 13] = [
        Self::Preempted,
        Self::HostLost,
        Self::Stale,
        Self::Superseded,
        Self::Io,
        Self::OutOfMemory,
        Self::Collective,
        Self::Unknown,
        Self::Config,
        Self::Schema,
        Self::Auth,
        Self::BadInput,
        Self::Diverged,
    ];

    /// What the coordinator does about it.
    pub fn remedy(self) -> Remedy {
        match self {
            Self::Preempted | Self::HostLost | Self::Stale | Self::Superseded => Remedy::RetryFree,
            Self::Io | Self::OutOfMemory | Self::Collective | Self::Unknown => Remedy::RetryCounted,
            Self::BadInput => Remedy::Quarantine,
            Self::Config | Self::Schema | Self::Auth | Self::Diverged => Remedy::FailRun,
        }
    }
}

/// A failure as it is reported and shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Decides what happens next.
    pub class: FailureClass,
    /// For people: what, where, and what to do, in the first line. Lines below it are details, and the last that the
    /// engine has printed.
    pub message: String,
}

impl Failure {
    /// What happened, in one line.
    pub fn headline(&self) -> &str {
        self.split().0
    }

    /// Everything below the headline, each line with the line feed before it; empty where there is nothing.
    pub fn below(&self) -> &str {
        self.split().1
    }

    /// The same failure with the last of `lines`, which an engine has printed, below it.
    pub fn with_output<S: AsRef<str>>(mut self, lines: &[S]) -> Self {
        self.message.push_str(&crate::logs::tail(lines));
        self
    }

    fn split(&self) -> (&str, &str) {
        let end = self.message.find('\n').unwrap_or(self.message.len());
        self.message.split_at(end)
    }
}

/// One line: whoever wants the rest asks for it.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.headline(), self.class)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_one_line_and_keeps_the_rest_below() {
        let failure = Failure {
            class: FailureClass::Unknown,
            message: "the engine exited".into(),
        };
        assert_eq!(
            (failure.headline(), failure.below()),
            ("the engine exited", "")
        );
        let failure = failure.with_output(&["one", "two"]);
        assert_eq!(failure.to_string(), "the engine exited (Unknown)");
        assert_eq!(failure.below(), "\n  one\n  two");
    }
}
