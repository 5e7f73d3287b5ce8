//! How a step's rows are split: the same positions of the stage's order, whatever the number of ranks and passes.

use std::ops::Range;

use distillery_common::group::{batch_share, leaves_of, rows_of};
use distillery_common::recipe::Batch;

/// The positions of `step` that fall to `rank` of `world`, share by share, each in forward passes of at most
/// `batch.micro` rows. A rank has one share; in a reproducible batch it has one for each of its leaves
/// ([`leaves_of`]), which are cut the same way in every world.
///
/// Which row is at a position is the loader's affair.
pub fn shares(batch: Batch, step: u64, rank: u32, world: u32) -> Vec<Vec<Range<u64>>> {
    let whole = match batch.virtual_ranks {
        None => vec![rows_of(batch.global, None, rank, world)],
        Some(ranks) => leaves_of(ranks, rank, world)
            .map(|leaf| batch_share(batch.global, leaf, ranks))
            .collect(),
    };
    let first = step * batch.global;
    let micro = batch.micro.unwrap_or(batch.global).max(1);
    let passes = |share: Range<u64>| {
        let (start, end) = (first + share.start, first + share.end);
        (start..end)
            .step_by(micro as usize)
            .map(|first| first..(first + micro).min(end))
            .collect()
    };
    whole.into_iter().map(passes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_forward_passes_split_the_same_positions() {
        for world in [1, 2, 3, 4, 5] {
            for micro in [None, Some(1), Some(3), Some(64)] {
                for virtual_ranks in [None, Some(5), Some(8)] {
                    let batch = Batch {
                        global: 12,
                        micro,
                        virtual_ranks,
                    };
                    let positions: Vec<u64> = (0..world)
                        .flat_map(|rank| shares(batch, 5, rank, world))
                        .flatten()
                        .inspect(|pass| assert!(pass.end - pass.start <= micro.unwrap_or(12)))
                        .flatten()
                        .collect();
                    assert_eq!(positions, (60..72).collect::<Vec<u64>>());
                }
            }
        }
    }

    #[test]
    fn leaves_are_cut_the_same_in_every_world() {
        let batch = Batch {
            global: 12,
            micro: Some(2),
            virtual_ranks: Some(5),
        };
        let leaves = |world: u32| -> Vec<_> {
            (0..world)
                .flat_map(|rank| shares(batch, 3, rank, world))
                .collect()
        };
        let alone = leaves(1);
        assert_eq!(alone.len(), 5);
        (2..=5).for_each(|world| assert_eq!(leaves(world), alone, "world {world}"));
    }
}
