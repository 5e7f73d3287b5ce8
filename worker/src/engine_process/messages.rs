//! What goes over the engine's socket, to and from wire types.

use bytes::Bytes;
use distillery_common::group::CheckpointCommitted;
use distillery_common::proto::engine_link::{
    Command, CommitOutcome, CommitRequest, Committed, Event,
};
use distillery_common::proto::from_wire::{self, Malformed};
use distillery_common::proto::{to_wire as wired, wire};
use distillery_common::storage::layout::{self, Key};

/// What an engine says.
#[derive(Debug, Clone, PartialEq)]
pub enum FromEngine {
    /// Something happened.
    Event(Event),
    /// It wants its objects to count.
    Commit(Request),
}

/// A request to commit and the number that its answer must carry.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Repeated in the answer.
    pub id: u64,
    /// What is asked.
    pub commit: CommitRequest,
}

/// Reads a message of the engine.
///
/// # Errors
/// [`Malformed`] for what no correct engine says.
pub fn from_wire(message: wire::FromEngine) -> Result<FromEngine, Malformed> {
    use wire::from_engine::Message;
    let message = message.message.ok_or(Malformed::Missing("content"))?;
    Ok(FromEngine::Event(match message {
        Message::Ready(ready) => Event::Ready {
            device: ready.device,
            device_name: ready.device_name,
            libtorch_version: ready.libtorch_version,
        },
        Message::Progress(progress) => Event::Progress {
            lease: from_wire::lease(progress.lease)?,
            done: progress.done,
            total: progress.total,
        },
        Message::TaskFailed(failed) => Event::TaskFailed {
            lease: from_wire::lease(failed.lease)?,
            failure: from_wire::failure(failed.failure)?,
        },
        Message::GroupReady(ready) => Event::GroupReady {
            group: from_wire::group_id(ready.group)?,
            rank: ready.rank,
            address: ready.address,
        },
        Message::GroupProgress(progress) => {
            Event::GroupProgress(from_wire::group_progress(progress)?)
        }
        Message::GroupFailed(failed) => Event::GroupFailed {
            group: from_wire::group_id(failed.group)?,
            rank: failed.rank,
            failure: from_wire::failure(failed.failure)?,
        },
        Message::Commit(commit) => return Ok(FromEngine::Commit(request(commit)?)),
    }))
}

fn request(commit: wire::CommitRequest) -> Result<Request, Malformed> {
    use wire::commit_request::What;
    let (what, key) = match commit
        .what
        .ok_or(Malformed::Missing("purpose of its commit"))?
    {
        What::Task(lease) => {
            let lease = from_wire::lease(Some(lease))?;
            let key = layout::parse_commit(&commit.key).ok();
            (Committed::Task(lease), key)
        }
        What::Checkpoint(checkpoint) => {
            let checkpoint = from_wire::checkpoint_committed(checkpoint)?;
            let key = checkpoint_key(&checkpoint, &commit.key);
            (Committed::Checkpoint(checkpoint), key)
        }
    };
    Ok(Request {
        id: commit.id,
        commit: CommitRequest {
            key: key.ok_or(Malformed::Missing("key of a COMMIT"))?,
            body: Bytes::from(commit.body),
            what,
            rows: commit.rows,
            bytes: commit.bytes,
        },
    })
}

/// The COMMIT of `checkpoint`, if `text` spells it.
fn checkpoint_key(checkpoint: &CheckpointCommitted, text: &str) -> Option<Key> {
    let group = &checkpoint.group;
    let folder = layout::checkpoint(&group.stage, checkpoint.step, group.generation);
    let key = layout::commit(&folder);
    (key.as_str() == text && checkpoint.key == text).then_some(key)
}

/// A command as the engine reads it.
pub(super) fn to_wire(command: Command) -> wire::ToEngine {
    use wire::to_engine::Message;
    let message = match command {
        Command::Setup(setup) => Message::Setup(wire::EngineSetup {
            run_uri: setup.run_uri,
            worker: setup.worker,
            incarnation: setup.incarnation.0,
            group_secret: setup.group_secret.0.to_vec(),
        }),
        Command::Start(lease) => Message::Start(wired::lease(&lease)),
        Command::Cancel(lease) => Message::Cancel(wired::lease(&lease)),
        Command::Join(membership) => Message::Join(wired::membership(&membership)),
        Command::Peers { group, addresses } => Message::Peers(wire::GroupPeers {
            group: Some(wired::group_id(&group)),
            addresses: addresses.into_iter().map(Into::into).collect(),
        }),
        Command::Abort { group, reason } => Message::Abort(wire::GroupAbort {
            group: Some(wired::group_id(&group)),
            reason,
        }),
        Command::Drain { checkpoint } => Message::Drain(wire::EngineDrain { checkpoint }),
    };
    wire::ToEngine {
        message: Some(message),
    }
}

/// The answer to request `id`.
pub(super) fn outcome_to_wire(id: u64, outcome: &CommitOutcome) -> wire::ToEngine {
    use wire::commit_outcome::Outcome;
    let (outcome, message) = match outcome {
        CommitOutcome::Won => (Outcome::Won, ""),
        CommitOutcome::Lost => (Outcome::Lost, ""),
        CommitOutcome::Expired => (Outcome::Expired, ""),
        CommitOutcome::Failed(message) => (Outcome::Failed, message.as_str()),
    };
    wire::ToEngine {
        message: Some(wire::to_engine::Message::CommitOutcome(
            wire::CommitOutcome {
                id,
                outcome: outcome.into(),
                message: message.to_owned(),
            },
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use distillery_common::group::GroupId;
    use distillery_common::ids::{Digest, Generation};

    fn checkpoint(key: &str) -> wire::FromEngine {
        let checkpoint = CheckpointCommitted {
            group: GroupId {
                stage: "seg4".into(),
                generation: Generation(3),
            },
            step: 250,
            key: key.into(),
            digest: Digest::of(b"body"),
            bytes: 4,
            is_final: false,
        };
        wire::FromEngine {
            message: Some(wire::from_engine::Message::Commit(wire::CommitRequest {
                id: 1,
                key: key.into(),
                body: b"body".to_vec(),
                what: Some(wire::commit_request::What::Checkpoint(
                    wired::checkpoint_committed(&checkpoint),
                )),
                rows: 0,
                bytes: 4,
            })),
        }
    }

    #[test]
    fn a_checkpoint_is_committed_under_its_own_key_alone() {
        let right = "checkpoints/seg4/0000000250-g3/COMMIT";
        assert!(matches!(
            from_wire(checkpoint(right)),
            Ok(FromEngine::Commit(Request { id: 1, .. }))
        ));
        for wrong in [
            "checkpoints/seg4/0000000250-g2/COMMIT",
            "checkpoints/seg4/0000000250-g3/../COMMIT",
            "run.json",
        ] {
            assert!(from_wire(checkpoint(wrong)).is_err(), "{wrong}");
        }
    }
}
