//! What the machine wants done, in order.

use std::collections::{BTreeMap, BTreeSet};

use distillery_common::group::{Addresses, CheckpointCommitted, GroupId, Membership};
use distillery_common::ids::{Generation, Incarnation, Term};
use distillery_common::task::{CommitSummary, Lease, TaskId};

use super::decision::Decision;
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
        addresses: Addresses,
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
        /// The run is started again by itself, and so should whoever leaves be.
        returns: bool,
        /// For people.
        reason: String,
    },
}
