//! Wire types to domain types: every field is checked here, so that nobody behind this door has to.

use bytes::Bytes;

use super::wire;
use crate::group::{CheckpointCommitted, GroupId, Membership, Phase, Progress};
use crate::ids::{Digest, Generation, Incarnation, Term};
use crate::storage::layout::is_segment;
use crate::task::{self, CommitSummary, Failure, FailureClass, Lease, TaskId};

/// A message that no correct peer sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A part that must be there is not.
    #[error("the message has no {0}")]
    Missing(&'static str),
    /// A number that names nothing.
    #[error("{value} is no {what}")]
    UnknownValue {
        /// The enum.
        what: &'static str,
        /// The number.
        value: i64,
    },
    /// A SHA-256 of the wrong length.
    #[error("a SHA-256 has 32 bytes, not {0}")]
    DigestLength(usize),
    /// A stage that could not be part of a key.
    #[error("{0:?} is no name of a stage")]
    StageName(String),
    /// Bytes that should be text.
    #[error("the {0} is no text")]
    NoText(&'static str),
    /// A rank outside its group.
    #[error("rank {rank} does not exist in a group of {world}")]
    Rank {
        /// Position in the group.
        rank: u32,
        /// Members of the group.
        world: u32,
    },
    /// A number beyond any that is reached.
    #[error("{value} is too large for the {what}")]
    TooLarge {
        /// Which number.
        what: &'static str,
        /// It.
        value: u64,
    },
    /// A step beyond the last one, or a last one that nobody could reach.
    #[error("step {step} of {total} is none")]
    Step {
        /// Steps done.
        step: u64,
        /// Steps of the stage.
        total: u64,
    },
}

/// More steps than any stage has: what is reckoned with steps cannot overflow.
const MAX_STEPS: u64 = 1 << 48;
/// More attempts than any task has, so that a next one can always be counted.
const MAX_ATTEMPTS: u32 = 1 << 24;

/// A task's name.
pub fn task_id(task: wire::TaskId) -> Result<TaskId, Malformed> {
    Ok(TaskId {
        stage: stage_name(task.stage)?,
        index: task.index,
    })
}

/// A lease.
pub fn lease(lease: Option<wire::Lease>) -> Result<Lease, Malformed> {
    let lease = lease.ok_or(Malformed::Missing("lease"))?;
    not_above(
        MAX_ATTEMPTS.into(),
        "number of an attempt",
        lease.attempt.into(),
    )?;
    Ok(Lease {
        term: Term(lease.term),
        task: task_id(lease.task.ok_or(Malformed::Missing("task in its lease"))?)?,
        attempt: lease.attempt,
        incarnation: Incarnation(lease.incarnation),
    })
}

fn not_above(most: u64, what: &'static str, value: u64) -> Result<(), Malformed> {
    if value > most {
        return Err(Malformed::TooLarge { what, value });
    }
    Ok(())
}

/// A SHA-256.
pub fn digest(bytes: &[u8]) -> Result<Digest, Malformed> {
    <[u8; 32]>::try_from(bytes)
        .map(Digest)
        .map_err(|_| Malformed::DigestLength(bytes.len()))
}

/// A failure's class. A class that this side does not know counts as unforeseen, so that it is bounded.
pub fn failure_class(class: i32) -> FailureClass {
    match wire::FailureClass::try_from(class) {
        Ok(wire::FailureClass::Preempted) => FailureClass::Preempted,
        Ok(wire::FailureClass::HostLost) => FailureClass::HostLost,
        Ok(wire::FailureClass::Stale) => FailureClass::Stale,
        Ok(wire::FailureClass::Superseded) => FailureClass::Superseded,
        Ok(wire::FailureClass::Io) => FailureClass::Io,
        Ok(wire::FailureClass::OutOfMemory) => FailureClass::OutOfMemory,
        Ok(wire::FailureClass::Collective) => FailureClass::Collective,
        Ok(wire::FailureClass::Config) => FailureClass::Config,
        Ok(wire::FailureClass::Schema) => FailureClass::Schema,
        Ok(wire::FailureClass::Auth) => FailureClass::Auth,
        Ok(wire::FailureClass::BadInput) => FailureClass::BadInput,
        Ok(wire::FailureClass::Diverged) => FailureClass::Diverged,
        Ok(wire::FailureClass::Unknown | wire::FailureClass::Unspecified) | Err(_) => {
            FailureClass::Unknown
        }
    }
}

/// A failure.
pub fn failure(failure: Option<wire::Failure>) -> Result<Failure, Malformed> {
    let failure = failure.ok_or(Malformed::Missing("failure"))?;
    Ok(Failure {
        class: failure_class(failure.class),
        message: plain(bounded(failure.message)),
    })
}

/// The most bytes of a failure's message that are kept: what it says, and the last lines of an engine.
const MESSAGE_BYTES: usize = crate::logs::TAIL_BYTES + (64 << 10);

fn bounded(mut text: String) -> String {
    if text.len() > MESSAGE_BYTES {
        text.truncate(text.floor_char_boundary(MESSAGE_BYTES));
    }
    text
}

/// Text that a terminal shows and does not obey: what comes from elsewhere may hold anything.
fn plain(text: String) -> String {
    let is_plain = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(is_plain) {
        return text;
    }
    text.chars()
        .map(|c| if is_plain(c) { c } else { '\u{fffd}' })
        .collect()
}

/// What a COMMIT says.
pub fn commit_summary(commit: Option<wire::CommitSummary>) -> Result<CommitSummary, Malformed> {
    let commit = commit.ok_or(Malformed::Missing("commit"))?;
    Ok(CommitSummary {
        digest: digest(&commit.digest)?,
        key: commit.key,
        rows: commit.rows,
        bytes: commit.bytes,
    })
}

/// How far an attempt is.
pub fn task_progress(progress: wire::TaskProgress) -> Result<task::Progress, Malformed> {
    not_above(MAX_STEPS, "units of a task", progress.done)?;
    not_above(MAX_STEPS, "units of a task", progress.total)?;
    Ok(task::Progress {
        lease: lease(progress.lease)?,
        done: progress.done,
        total: progress.total,
    })
}

/// A group's name.
pub fn group_id(group: Option<wire::GroupId>) -> Result<GroupId, Malformed> {
    let group = group.ok_or(Malformed::Missing("group"))?;
    Ok(GroupId {
        stage: stage_name(group.stage)?,
        generation: Generation(group.generation),
    })
}

/// Where all ranks listen.
pub fn group_peers(peers: wire::GroupPeers) -> Result<(GroupId, Vec<String>), Malformed> {
    let text = |address: Bytes| {
        String::from_utf8(address.into()).map_err(|_| Malformed::NoText("address of a rank"))
    };
    let addresses = peers
        .addresses
        .into_iter()
        .map(text)
        .collect::<Result<_, _>>()?;
    Ok((group_id(peers.group)?, addresses))
}

/// A member's part.
pub fn membership(join: wire::GroupJoin) -> Result<Membership, Malformed> {
    if join.rank >= join.world {
        return Err(Malformed::Rank {
            rank: join.rank,
            world: join.world,
        });
    }
    let key = |text: String| (!text.is_empty()).then_some(text);
    Ok(Membership {
        group: group_id(join.group)?,
        rank: join.rank,
        world: join.world,
        base_step: join.base_step,
        base_checkpoint: key(join.base_checkpoint),
        parent_checkpoint: key(join.parent_checkpoint),
        term: Term(join.term),
    })
}

/// What a member is doing.
pub fn group_phase(phase: i32) -> Result<Phase, Malformed> {
    match wire::GroupPhase::try_from(phase) {
        Ok(wire::GroupPhase::Exchanging) => Ok(Phase::Exchanging),
        Ok(wire::GroupPhase::Syncing) => Ok(Phase::Syncing),
        Ok(wire::GroupPhase::Stepping) => Ok(Phase::Stepping),
        Ok(wire::GroupPhase::Sealing) => Ok(Phase::Sealing),
        Ok(wire::GroupPhase::Unspecified) | Err(_) => Err(Malformed::UnknownValue {
            what: "phase of a group",
            value: phase.into(),
        }),
    }
}

/// How far a member is. Speeds that are no numbers are not known, hence 0; a loss may be anything.
pub fn group_progress(progress: wire::GroupProgress) -> Result<Progress, Malformed> {
    let (step, total) = (progress.step, progress.total_steps);
    if step > total || total > MAX_STEPS {
        return Err(Malformed::Step { step, total });
    }
    let known = |speed: f64| if speed.is_finite() { speed } else { 0.0 };
    Ok(Progress {
        group: group_id(progress.group)?,
        phase: group_phase(progress.phase)?,
        step: progress.step,
        total_steps: progress.total_steps,
        loss: progress.loss,
        samples_per_second: known(progress.samples_per_second),
        step_ms: known(progress.step_ms),
    })
}

/// A stored checkpoint.
pub fn checkpoint_committed(
    checkpoint: wire::CheckpointCommitted,
) -> Result<CheckpointCommitted, Malformed> {
    Ok(CheckpointCommitted {
        group: group_id(checkpoint.group)?,
        step: checkpoint.step,
        digest: digest(&checkpoint.digest)?,
        key: checkpoint.key,
        bytes: checkpoint.bytes,
        is_final: checkpoint.r#final,
    })
}

/// Stage names become parts of keys, so only plain segments pass.
fn stage_name(text: String) -> Result<String, Malformed> {
    if is_segment(&text) {
        Ok(text)
    } else {
        Err(Malformed::StageName(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::to_wire;

    #[test]
    fn a_message_cannot_command_a_terminal() {
        let said = wire::Failure {
            class: wire::FailureClass::Io.into(),
            message: "disk\u{1b}[2Jfull\r\n\tdevice µ".into(),
        };
        let heard = failure(Some(said)).expect("whole");
        assert_eq!(heard.message, "disk\u{fffd}[2Jfull\u{fffd}\n\tdevice µ");
    }

    /// A beat with these numbers once ended the coordinator: it adds to steps, and makes durations of times.
    #[test]
    fn progress_that_cannot_be_is_refused_and_speeds_that_are_none_are_not_known() {
        let said = |step, total_steps, step_ms| wire::GroupProgress {
            group: Some(wire::GroupId {
                stage: "seg4".into(),
                generation: 1,
            }),
            phase: wire::GroupPhase::Stepping.into(),
            step,
            total_steps,
            loss: f64::NAN,
            samples_per_second: f64::INFINITY,
            step_ms,
        };
        for (step, total) in [(41, 40), (u64::MAX, 40), (u64::MAX, u64::MAX), (1, 1 << 49)] {
            let refused = group_progress(said(step, total, 1.0));
            assert_eq!(refused, Err(Malformed::Step { step, total }));
        }
        for unknown in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let read = group_progress(said(40, 40, unknown)).expect("the step is one");
            assert_eq!((read.step_ms, read.samples_per_second), (0.0, 0.0));
            assert!(read.loss.is_nan(), "a loss that is none is told as it is");
        }
    }

    fn some_lease() -> Lease {
        Lease {
            term: Term(3),
            task: TaskId {
                stage: "trajectories".into(),
                index: 42,
            },
            attempt: 2,
            incarnation: Incarnation::new(Term(3), 7),
        }
    }

    #[test]
    fn what_goes_out_comes_back() {
        let original = some_lease();
        assert_eq!(lease(Some(to_wire::lease(&original))), Ok(original));
        for class in FailureClass::ALL {
            assert_eq!(failure_class(to_wire::failure_class(class).into()), class);
        }
        for phase in Phase::ALL {
            assert_eq!(group_phase(to_wire::group_phase(phase).into()), Ok(phase));
        }
        let original = Membership {
            group: GroupId {
                stage: "seg4".into(),
                generation: Generation(9),
            },
            rank: 1,
            world: 2,
            base_step: 250,
            base_checkpoint: Some("checkpoints/seg4/0000000250-g3/COMMIT".into()),
            parent_checkpoint: None,
            term: Term(3),
        };
        assert_eq!(membership(to_wire::membership(&original)), Ok(original));
        let original = CheckpointCommitted {
            group: GroupId {
                stage: "seg4".into(),
                generation: Generation(9),
            },
            step: 500,
            key: "checkpoints/seg4/0000000500-g9/COMMIT".into(),
            digest: Digest::of(b"commit"),
            bytes: 10,
            is_final: true,
        };
        assert_eq!(
            checkpoint_committed(to_wire::checkpoint_committed(&original)),
            Ok(original)
        );
    }

    /// What is reckoned with these numbers once ended the coordinator.
    #[test]
    fn numbers_of_a_task_that_nobody_reaches_are_refused() {
        let mut many = to_wire::lease(&some_lease());
        many.attempt = u32::MAX;
        let refused = lease(Some(many)).expect_err("nobody tries so often");
        assert!(refused.to_string().contains("attempt"), "{refused}");
        for (done, total) in [(u64::MAX, 1), (1, u64::MAX)] {
            let progress = to_wire::task_progress(&task::Progress {
                lease: some_lease(),
                done,
                total,
            });
            let refused = task_progress(progress).expect_err("no task has so many units");
            assert!(refused.to_string().contains("units"), "{refused}");
        }
    }

    #[test]
    fn a_stage_name_cannot_leave_its_folder() {
        let mut hostile = to_wire::lease(&some_lease());
        hostile.task.as_mut().expect("a lease has a task").stage = "../../etc".into();
        assert_eq!(
            lease(Some(hostile)),
            Err(Malformed::StageName("../../etc".into()))
        );
    }

    #[test]
    fn a_missing_part_is_named() {
        assert_eq!(lease(None), Err(Malformed::Missing("lease")));
        assert_eq!(group_id(None), Err(Malformed::Missing("group")));
    }
}
