//! Domain types to wire types; cannot fail.

use super::wire;
use crate::group::{Addresses, CheckpointCommitted, GroupId, Membership, Phase, Progress};
use crate::ids::Digest;
use crate::task::{self, CommitSummary, Failure, FailureClass, Lease, TaskId};

/// A task's name.
pub fn task_id(task: &TaskId) -> wire::TaskId {
    wire::TaskId {
        stage: task.stage.clone(),
        index: task.index,
    }
}

/// A lease.
pub fn lease(lease: &Lease) -> wire::Lease {
    wire::Lease {
        term: lease.term.0,
        task: Some(task_id(&lease.task)),
        attempt: lease.attempt,
        incarnation: lease.incarnation.0,
    }
}

/// A SHA-256.
pub fn digest(digest: &Digest) -> Vec<u8> {
    digest.0.to_vec()
}

/// A failure's class.
pub fn failure_class(class: FailureClass) -> wire::FailureClass {
    match class {
        FailureClass::Preempted => wire::FailureClass::Preempted,
        FailureClass::HostLost => wire::FailureClass::HostLost,
        FailureClass::Stale => wire::FailureClass::Stale,
        FailureClass::Superseded => wire::FailureClass::Superseded,
        FailureClass::Io => wire::FailureClass::Io,
        FailureClass::OutOfMemory => wire::FailureClass::OutOfMemory,
        FailureClass::Collective => wire::FailureClass::Collective,
        FailureClass::Unknown => wire::FailureClass::Unknown,
        FailureClass::Config => wire::FailureClass::Config,
        FailureClass::Schema => wire::FailureClass::Schema,
        FailureClass::Auth => wire::FailureClass::Auth,
        FailureClass::BadInput => wire::FailureClass::BadInput,
        FailureClass::Diverged => wire::FailureClass::Diverged,
    }
}

/// A failure.
pub fn failure(failure: &Failure) -> wire::Failure {
    wire::Failure {
        class: failure_class(failure.class).into(),
        message: failure.message.clone(),
    }
}

/// What a COMMIT says.
pub fn commit_summary(commit: &CommitSummary) -> wire::CommitSummary {
    wire::CommitSummary {
        key: commit.key.clone(),
        rows: commit.rows,
        bytes: commit.bytes,
        digest: digest(&commit.digest),
    }
}

/// How far an attempt is.
pub fn task_progress(progress: &task::Progress) -> wire::TaskProgress {
    wire::TaskProgress {
        lease: Some(lease(&progress.lease)),
        done: progress.done,
        total: progress.total,
    }
}

/// A group's name.
pub fn group_id(group: &GroupId) -> wire::GroupId {
    wire::GroupId {
        stage: group.stage.clone(),
        generation: group.generation.0,
    }
}

/// Where all ranks listen.
pub fn group_peers(group: &GroupId, addresses: &Addresses) -> wire::GroupPeers {
    wire::GroupPeers {
        group: Some(group_id(group)),
        addresses: addresses.texts().to_vec(),
    }
}

/// A member's part.
pub fn membership(membership: &Membership) -> wire::GroupJoin {
    wire::GroupJoin {
        group: Some(group_id(&membership.group)),
        rank: membership.rank,
        world: membership.world,
        base_step: membership.base_step,
        base_checkpoint: membership.base_checkpoint.clone().unwrap_or_default(),
        parent_checkpoint: membership.parent_checkpoint.clone().unwrap_or_default(),
        term: membership.term.0,
    }
}

/// What a member is doing.
pub fn group_phase(phase: Phase) -> wire::GroupPhase {
    match phase {
        Phase::Exchanging => wire::GroupPhase::Exchanging,
        Phase::Syncing => wire::GroupPhase::Syncing,
        Phase::Stepping => wire::GroupPhase::Stepping,
        Phase::Sealing => wire::GroupPhase::Sealing,
    }
}

/// How far a member is.
pub fn group_progress(progress: &Progress) -> wire::GroupProgress {
    wire::GroupProgress {
        group: Some(group_id(&progress.group)),
        phase: group_phase(progress.phase).into(),
        step: progress.step,
        total_steps: progress.total_steps,
        loss: progress.loss,
        samples_per_second: progress.samples_per_second,
        step_ms: progress.step_ms,
    }
}

/// A stored checkpoint.
pub fn checkpoint_committed(checkpoint: &CheckpointCommitted) -> wire::CheckpointCommitted {
    wire::CheckpointCommitted {
        group: Some(group_id(&checkpoint.group)),
        step: checkpoint.step,
        key: checkpoint.key.clone(),
        digest: digest(&checkpoint.digest),
        bytes: checkpoint.bytes,
        r#final: checkpoint.is_final,
    }
}
