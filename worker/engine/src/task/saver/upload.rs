//! What becomes of a snapshot while training goes on: written, told of, committed.
//!
//! In a sharded checkpoint every rank writes the tensors of its own share, and an account of them beside it. Rank 0 waits
//! for all accounts, puts them together, and asks for the one COMMIT: what ranks have to tell each other of a checkpoint
//! goes through the bucket, as the checkpoint does.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use distillery_common::backoff::Backoff;
use distillery_common::checkpoint::{
    self, Dtype, Kind, Manifest, Share, StateSource, TensorSpec, Training,
};
use distillery_common::group::{CheckpointCommitted, Membership};
use distillery_common::ids::Digest;
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::storage::{self, Store};
use distillery_common::task::{Failure, FailureClass};

use crate::link::{CommitOutcome, CommitRequest, Committed, Link};
use crate::train::Trainer;
use crate::train::flat::Place;
use crate::train::snapshot::{Part, Snapshot};

/// What is to be saved, and as whose share.
pub(super) struct Upload {
    pub(super) store: Store,
    pub(super) link: Link,
    pub(super) membership: Membership,
    pub(super) training: Training,
    pub(super) share: Share,
    pub(super) buffer: Snapshot,
    pub(super) curves: Bytes,
    pub(super) is_final: bool,
    /// How long rank 0 waits for the shares of the others once its own is written.
    pub(super) patience: Duration,
}

/// What a finished upload gives back.
pub(super) struct Saved {
    pub(super) buffer: Snapshot,
    pub(super) outcome: Result<(), Failure>,
}

/// Which places of every part are this rank's to write: [`Share::of`] names the same tensors.
pub(super) fn places_of(trainer: &Trainer, share: Share) -> Range<usize> {
    trainer.layout().share(share.rank, share.world)
}

impl Upload {
    /// Writes what is this rank's, and commits if it is the first.
    pub(super) async fn run(self) -> Saved {
        let outcome = self.write_and_commit().await;
        Saved {
            buffer: self.buffer,
            outcome,
        }
    }

    async fn write_and_commit(&self) -> Result<(), Failure> {
        let group = &self.membership.group;
        let step = self.buffer.position.step;
        let manifest = self.write().await.map_err(|error| Failure {
            class: FailureClass::Io,
            message: format!("saving step {step} of {}: {error}", group.stage),
        })?;
        let Some(manifest) = manifest else {
            // A stage does not end without its last checkpoint: another group writes it.
            let is_lost = self.is_final && self.share.rank == 0;
            return match is_lost {
                true => Err(Failure {
                    class: FailureClass::Io,
                    message: format!("the last checkpoint of {} lacks a share", group.stage),
                }),
                false => Ok(()),
            };
        };
        let body = manifest.to_bytes();
        let key = manifest.commit_key();
        let request = CommitRequest {
            what: Committed::Checkpoint(CheckpointCommitted {
                group: group.clone(),
                step,
                key: key.as_str().to_owned(),
                digest: Digest::of(&body),
                bytes: manifest.total_bytes(),
                is_final: self.is_final,
            }),
            key,
            body,
            rows: 0,
            bytes: manifest.total_bytes(),
        };
        match self.link.commit_async(request).await {
            CommitOutcome::Won => Ok(()),
            CommitOutcome::Lost | CommitOutcome::Expired => Err(Failure {
                class: FailureClass::Stale,
                message: format!("{group} had ended before step {step} was committed"),
            }),
            CommitOutcome::Failed(message) => Err(Failure {
                class: FailureClass::Io,
                message: format!("committing step {step} of {group}: {message}"),
            }),
        }
    }

    /// Writes this rank's share. On rank 0 gives what is to be committed, once all shares are there.
    async fn write(&self) -> Result<Option<Manifest>, checkpoint::Error> {
        let group = &self.membership.group;
        let step = self.buffer.position.step;
        let folder = layout::checkpoint(&group.stage, step, group.generation);
        let state = State::of(&self.buffer);
        let part = checkpoint::write_share(&self.store, &folder, &state, self.share).await?;
        if self.share.rank != 0 {
            let key = layout::checkpoint_account(&folder, self.share.rank);
            self.store.put(&key, part.to_bytes().into()).await?;
            return Ok(None);
        }
        let metrics = checkpoint::write_metrics(&self.store, &folder, self.curves.clone()).await?;
        let mut parts = vec![part];
        let mut waited = Duration::ZERO;
        for rank in 1..self.share.world {
            match self.account(&folder, rank, &mut waited).await? {
                Some(part) => parts.push(part),
                None => {
                    tracing::warn!(%group, step, rank, "a checkpoint is left out: a share is missing");
                    return Ok(None);
                }
            }
        }
        let manifest = Manifest {
            stage: group.stage.clone(),
            step,
            generation: group.generation,
            training: self.training.clone(),
            files: Vec::new(),
            tensors: Vec::new(),
        };
        checkpoint::merge(manifest, parts, metrics, &state.tensors()).map(Some)
    }

    /// What `rank` says of its share; none when it says nothing for too long, `waited` for other ranks included.
    async fn account(
        &self,
        folder: &Prefix,
        rank: u32,
        waited: &mut Duration,
    ) -> Result<Option<checkpoint::Part>, checkpoint::Error> {
        let key = layout::checkpoint_account(folder, rank);
        let mut pause = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
        while *waited < self.patience {
            match self.store.get(&key).await {
                Ok(bytes) => return checkpoint::Part::from_bytes(folder, &bytes).map(Some),
                Err(storage::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            let delay = pause.next_delay(0.5);
            tokio::time::sleep(delay).await;
            *waited += delay;
        }
        Ok(None)
    }
}

/// A trainer's snapshot as checkpoints see it: its tensors' parts, places and values.
struct State<'a>(Vec<(Part, &'a Place, &'a [f32])>);

impl<'a> State<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        Self(snapshot.entries().collect())
    }
}

const PARTS: [(Part, Kind); 4] = [
    (Part::Student, Kind::Student),
    (Part::Ema, Kind::Ema),
    (Part::AdamM, Kind::AdamM),
    (Part::AdamV, Kind::AdamV),
];

/// The kind of state that a part of a snapshot is stored as.
pub fn kind_of_part(part: Part) -> Kind {
    let (_, kind) = PARTS
        .iter()
        .find(|(p, _)| *p == part)
        .expect("every part has a kind");
    *kind
}

/// The part of a trainer that state of `kind` belongs to.
pub fn part_of_kind(kind: Kind) -> Part {
    let (part, _) = PARTS
        .iter()
        .find(|(_, k)| *k == kind)
        .expect("every kind has a part");
    *part
}

impl StateSource for State<'_> {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.0
            .iter()
            .map(|(part, place, _)| TensorSpec {
                kind: kind_of_part(*part),
                name: place.name.clone(),
                dtype: Dtype::F32,
                shape: place.shape.iter().map(|&n| n as u64).collect(),
            })
            .collect()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        let (_, _, values) = self.0[index];
        for (bytes, value) in out.chunks_exact_mut(4).zip(&values[start / 4..]) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}
