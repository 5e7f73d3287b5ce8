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
    /// Steps applied in the newest checkpoint: training starts there, or from a newer state that a member holds.
    pub base_step: u64,
    /// COMMIT of that checkpoint; none at step 0 of a stage.
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

/// Training state that a member still holds in memory, from an earlier formation of the group or from this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// Optimizer steps applied in it.
    pub step: u64,
    /// Generation whose members held it last.
    pub generation: Generation,
}

impl Held {
    /// Whether it lies on the line of steps that goes on from the checkpoint of `step` by `generation`.
    ///
    /// A generation starts from the newest state of its members, or else from the newest checkpoint. So whatever a
    /// generation holds that is as young as the checkpoint's and no step behind it has gone through that checkpoint. A
    /// state of an older generation beyond it was not known to the younger one, and is a branch that was given up.
    pub fn continues(&self, base: Option<Held>) -> bool {
        base.is_none_or(|base| self.generation >= base.generation && self.step >= base.step)
    }
}

/// The rank that all others copy their state from: it has applied the most steps, in the youngest generation, and has
/// the lowest number of those; none where nobody holds a state.
pub fn source(held: &[Option<Held>]) -> Option<u32> {
    let best = held.iter().flatten().max()?;
    let at = held.iter().position(|one| one.as_ref() == Some(best))?;
    u32::try_from(at).ok()
}

/// The share of a global batch that `rank` of `world` takes.
///
/// Shares are consecutive, cover `0..global_batch` exactly once, and differ by at most one.
pub fn batch_share(global_batch: u64, rank: u32, world: u32) -> std::ops::Range<u64> {
    let cut = |r: u32| global_batch * u64::from(r) / u64::from(world);
    cut(rank)..cut(rank + 1)
}

/// The share of things of these `sizes`, one after the other, that `rank` of `world` takes: their whole length is cut into
/// as many equal lengths as there are ranks, and a thing belongs to the rank in whose length it begins.
///
/// Shares are consecutive, cover all things exactly once, and cut none; one may be empty.
pub fn share_of(sizes: &[usize], rank: u32, world: u32) -> std::ops::Range<usize> {
    let total: u128 = sizes.iter().map(|&size| size as u128).sum();
    let world = u128::from(world);
    let mut start = 0;
    let owner = |start: u128| match total {
        0 => 0,
        total => (start * world / total).min(world - 1),
    };
    let owners: Vec<u128> = sizes
        .iter()
        .map(|&size| {
            let owner = owner(start);
            start += size as u128;
            owner
        })
        .collect();
    let below = |rank: u128| owners.partition_point(|&owner| owner < rank);
    below(rank.into())..below(u128::from(rank) + 1)
}

/// The leaves of a reproducible sum that `rank` of `world` computes: consecutive, shared out like a batch.
pub fn leaves_of(virtual_ranks: u32, rank: u32, world: u32) -> std::ops::Range<u32> {
    let share = batch_share(u64::from(virtual_ranks), rank, world);
    // Both ends are at most a u32.
    share.start as u32..share.end as u32
}

/// The rows of a global batch that `rank` of `world` takes; with virtual ranks the rows of its leaves, each of which
/// has a share of the batch whatever the world is.
pub fn rows_of(
    global_batch: u64,
    virtual_ranks: Option<u32>,
    rank: u32,
    world: u32,
) -> std::ops::Range<u64> {
    let Some(virtual_ranks) = virtual_ranks else {
        return batch_share(global_batch, rank, world);
    };
    let leaves = leaves_of(virtual_ranks, rank, world);
    let first = |leaf: u32| global_batch * u64::from(leaf) / u64::from(virtual_ranks);
    first(leaves.start)..first(leaves.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_ranks_cover_the_batch_once_in_every_world() {
        for (global, ranks) in [(64, 8), (13, 5), (8, 8), (20, 6)] {
            for world in 1..=ranks {
                let mut next = 0;
                for rank in 0..world {
                    let rows = rows_of(global, Some(ranks), rank, world);
                    let leaves = leaves_of(ranks, rank, world);
                    assert_eq!(rows.start, next);
                    assert_eq!(rows.start, batch_share(global, leaves.start, ranks).start);
                    next = rows.end;
                }
                assert_eq!(next, global);
            }
        }
    }

    fn held(step: u64, generation: u64) -> Held {
        Held {
            step,
            generation: Generation(generation),
        }
    }

    #[test]
    fn state_goes_on_from_a_checkpoint_or_was_given_up() {
        let base = Some(held(100, 3));
        assert!(held(100, 3).continues(base) && held(140, 3).continues(base));
        assert!(held(120, 5).continues(base));
        assert!(!held(99, 3).continues(base) && !held(99, 5).continues(base));
        assert!(!held(140, 2).continues(base), "3 started without it");
        assert!(held(0, 1).continues(None));
    }

    #[test]
    fn everybody_copies_from_the_newest_state() {
        assert_eq!(source(&[]), None);
        assert_eq!(source(&[None, None]), None);
        assert_eq!(source(&[None, Some(held(5, 1)), Some(held(6, 1))]), Some(2));
        assert_eq!(source(&[Some(held(6, 1)), Some(held(6, 1)), None]), Some(0));
        let worlds_apart = [Some(held(6, 1)), Some(held(6, 2)), Some(held(5, 3))];
        assert_eq!(source(&worlds_apart), Some(1));
    }

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

    /// The shares of all ranks.
    fn shares(sizes: &[usize], world: u32) -> Vec<std::ops::Range<usize>> {
        (0..world)
            .map(|rank| share_of(sizes, rank, world))
            .collect()
    }

    #[test]
    fn shares_of_things_are_consecutive_and_leave_none_out() {
        let uneven: Vec<usize> = (0..100).map(|i| (i * 7919) % 1000).collect();
        for sizes in [&uneven[..], &[5], &[], &[0, 0, 0], &[0, 0, 9, 0]] {
            for world in 1..=9 {
                let mut next = 0;
                for share in shares(sizes, world) {
                    assert_eq!(share.start, next, "{sizes:?} over {world}");
                    next = share.end;
                }
                assert_eq!(next, sizes.len(), "{sizes:?} over {world}");
            }
        }
    }

    #[test]
    fn no_share_is_longer_than_an_even_one_and_its_last_thing() {
        let sizes: Vec<usize> = (0..100).map(|i| (i * 7919) % 1000).collect();
        let total: usize = sizes.iter().sum();
        for world in 1..=9 {
            for share in shares(&sizes, world) {
                let long: usize = sizes[share.clone()].iter().sum();
                let last = sizes[share].last().copied().unwrap_or(0);
                assert!(long <= total.div_ceil(world as usize) + last);
            }
        }
        assert_eq!(shares(&[4, 4, 4, 4], 2), [0..2, 2..4]);
        assert_eq!(shares(&[1, 1, 10], 3), [0..3, 3..3, 3..3]);
    }
}
