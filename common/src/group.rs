//! The engines that train one stage together.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::ids::{Digest, Generation, Term};

/// One formation of the group that trains `stage`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    /// Name of a training stage in the plan.
    pub stage: String,
    /// Its fencing number.
    pub generation: Generation,
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} generation {}", self.stage, self.generation)
    }
}

/// A member's part in a group, and where training starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Which formation.
    pub group: GroupId,
    /// Position in the group, `0..world`.
    pub rank: u32,
    /// Number of members.
    pub world: u32,
    /// Steps already applied in the state to start from.
    pub base_step: u64,
    /// COMMIT of the checkpoint that holds that state; none at step 0 of a stage.
    pub base_checkpoint: Option<String>,
    /// COMMIT of the parent stage's final checkpoint; none in the first stage.
    pub parent_checkpoint: Option<String>,
    /// Coordinator life that formed the group.
    pub term: Term,
}

/// Where the ranks of a group listen, in rank order.
///
/// Every member is told of all of them, so that copies share the texts: in a group of 1,024 there are a million.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses(Arc<[Bytes]>);

impl Addresses {
    /// Each as text in UTF-8.
    pub fn texts(&self) -> &[Bytes] {
        &self.0
    }
}

impl FromIterator<String> for Addresses {
    fn from_iter<I: IntoIterator<Item = String>>(addresses: I) -> Self {
        Self(addresses.into_iter().map(Bytes::from).collect())
    }
}

/// What a member of a group is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Members listen and learn each other's addresses.
    Exchanging,
    /// Members load or copy the state to start from.
    Syncing,
    /// Members train.
    Stepping,
    /// The final checkpoint is being written.
    Sealing,
}

impl Phase {
    /// All phases, for exhaustive tests and converters.
    pub const ALL: [Self; 4] = [
        Self::Exchanging,
        Self::Syncing,
        Self::Stepping,
        Self::Sealing,
    ];
}

/// How far a member of a group is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Which formation.
    pub group: GroupId,
    /// What the member is doing.
    pub phase: Phase,
    /// Optimizer steps applied.
    pub step: u64,
    /// Optimizer steps of the stage.
    pub total_steps: u64,
    /// Training loss, as the engine smooths it.
    pub loss: f64,
    /// Rows per second over all members.
    pub samples_per_second: f64,
    /// Wall time of one step, in milliseconds.
    pub step_ms: f64,
}

/// A checkpoint whose COMMIT lies in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointCommitted {
    /// The formation that wrote it.
    pub group: GroupId,
    /// Optimizer steps applied in it.
    pub step: u64,
    /// Key of its COMMIT, relative to the run URI.
    pub key: String,
    /// SHA-256 of the COMMIT's bytes.
    pub digest: Digest,
    /// Size of everything it names.
    pub bytes: u64,
    /// Whether it follows the stage's last step.
    pub is_final: bool,
}

/// The share of a global batch that `rank` of `world` takes.
///
/// Shares are consecutive, cover `0..global_batch` exactly once, and differ by at most one.
pub fn batch_share(global_batch: u64, rank: u32, world: u32) -> std::ops::Range<u64> {
    let cut = |r: u32| global_batch * u64::from(r) / u64::from(world);
    cut(rank)..cut(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_batch_once() {
        for world in 1..=7 {
            let mut next = 0;
            for rank in 0..world {
                let share = batch_share(64, rank, world);
                assert_eq!(share.start, next);
                next = share.end;
            }
            assert_eq!(next, 64);
        }
    }
}
