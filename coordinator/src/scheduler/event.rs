//! What can happen to the machine.

use std::collections::BTreeMap;

use distillery_common::group::{self, CheckpointCommitted, GroupId};
use distillery_common::ids::{Digest, Incarnation};
use distillery_common::task::{self, CommitSummary, Failure, Lease, TaskId};

use super::durable::Checkpoint;

/// One stream to a worker. A worker that reconnects comes with a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// What can happen.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Time passed; sent no later than [`super::Machine::next_deadline`].
    Tick,
    /// A worker opened a stream and introduced itself.
    Arrived {
        /// Its stream.
        connection: ConnectionId,
        /// What it said.
        hello: Hello,
    },
    /// A worker said something on its stream.
    Said {
        /// Its stream.
        connection: ConnectionId,
        /// What it said.
        message: FromWorker,
    },
    /// A stream ended, whoever ended it.
    Closed {
        /// The stream.
        connection: ConnectionId,
    },
    /// What the store holds of a stage that is about to start, or of a group that is about to form.
    Inspected {
        /// Position of the stage.
        stage: usize,
        /// What was found.
        finding: Result<Finding, Trouble>,
    },
    /// A task's COMMIT was read.
    CommitVerified {
        /// Which task.
        task: TaskId,
        /// What the COMMIT says; none when there is none.
        commit: Result<Option<CommitSummary>, Trouble>,
    },
    /// A checkpoint's COMMIT was read and everything it names is there.
    CheckpointVerified {
        /// Which checkpoint.
        checkpoint: CheckpointCommitted,
        /// Whether it counts.
        result: Result<(), Trouble>,
    },
    /// A task stage was sealed in the store.
    Sealed {
        /// Position of the stage.
        stage: usize,
        /// Digest of what was sealed.
        result: Result<Digest, Trouble>,
    },
    /// Somebody wants the run to stop.
    StopRequested {
        /// Without waiting for a checkpoint.
        now: bool,
        /// Whoever wants it starts the run again by itself, as a scheduler does whose time is up.
        returns: bool,
    },
    /// Somebody wants nothing new to be begun.
    PauseRequested {
        /// Who or why, for people.
        reason: String,
    },
    /// Somebody wants a paused run to go on.
    ResumeRequested,
    /// Somebody gives the run up for good.
    CancelRequested {
        /// Who or why, for people.
        reason: String,
    },
    /// Somebody wants the workers of a name to leave after what they have in hand.
    DrainRequested {
        /// The name.
        worker: String,
    },
    /// No worker can be started any more, and none that was started lives.
    LauncherFailed {
        /// Why, and what to do.
        message: String,
    },
}

/// How a worker introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// For logs and people.
    pub name: String,
    /// Where it runs.
    pub host: String,
    /// What it computes on, for people.
    pub device: String,
    /// Tasks it can hold at a time, at least 1.
    pub slots: u32,
    /// Registration held before its stream broke.
    pub incarnation: Option<Incarnation>,
    /// Leases still held.
    pub leases: Vec<Lease>,
    /// Group still taken part in.
    pub group: Option<GroupId>,
    /// It has no engine yet that could begin at once.
    pub starting: bool,
}

/// What a worker says after its hello.
#[derive(Debug, Clone, PartialEq)]
pub enum FromWorker {
    /// It lives, and this is how far it is.
    Beat {
        /// To be acknowledged.
        seq: u64,
        /// Its attempts.
        tasks: Vec<task::Progress>,
        /// Its group.
        group: Option<group::Progress>,
        /// Memory of the worker and its engines.
        rss_bytes: u64,
        /// As in [`Hello`].
        starting: bool,
        /// It is about to leave of its own accord, and takes nothing new.
        leaving: bool,
    },
    /// A COMMIT of a task is in the store.
    TaskCommitted {
        /// To be acknowledged.
        seq: u64,
        /// The attempt that made it, or found it.
        lease: Lease,
    },
    /// An attempt failed.
    TaskFailed {
        /// To be acknowledged.
        seq: u64,
        /// The attempt.
        lease: Lease,
        /// How.
        failure: Failure,
    },
    /// A member listens and waits for the addresses of its peers.
    GroupReady {
        /// To be acknowledged.
        seq: u64,
        /// Which formation.
        group: GroupId,
        /// Its position.
        rank: u32,
        /// Where it listens.
        address: String,
    },
    /// A COMMIT of a checkpoint is in the store.
    CheckpointCommitted {
        /// To be acknowledged.
        seq: u64,
        /// What it is.
        checkpoint: CheckpointCommitted,
    },
    /// A member cannot go on.
    GroupFailed {
        /// To be acknowledged.
        seq: u64,
        /// Which formation.
        group: GroupId,
        /// Its position.
        rank: u32,
        /// How.
        failure: Failure,
    },
    /// The worker leaves on purpose and holds nothing any more.
    Goodbye {
        /// For people.
        reason: String,
    },
}

/// What the store holds of a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Task stages: the COMMITs that are there, and the seal, if there is one.
    Tasks {
        /// By index.
        commits: BTreeMap<u64, CommitSummary>,
        /// Those of them that the commit index does not have.
        unindexed: Vec<u64>,
        /// Digest of the sealed manifest.
        sealed: Option<Digest>,
    },
    /// Training stages: every whole checkpoint, in any order.
    Checkpoints(Vec<Checkpoint>),
}

/// Why the driver could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// It may work later.
    Transient(String),
    /// It will not.
    Permanent(String),
}
