//! How a step's rows are split: the same positions of the stage's order, whatever the number of ranks and passes.

use std::ops::Range;

use distillery_common::group::batch_share;
use distillery_common::recipe::Batch;

/// The positions of `step` that fall to `rank` of `world`, in forward passes of at most `batch.micro` rows.
///
/// Which row is at a position is the loader's affair.
pub fn passes(batch: Batch, step: u64, rank: u32, world: u32) -> Vec<Range<u64>> {
    let share = batch_share(batch.global, rank, world);
    let start = step * batch.global + share.start;
    let end = step * batch.global + share.end;
    let micro = batch.micro.unwrap_or(batch.global).max(1);
    (start..end)
        .step_by(micro as usize)
        .map(|first| first..(first + micro).min(end))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_forward_passes_split_the_same_positions() {
        for world in [1, 2, 3, 4] {
            for micro in [None, Some(1), Some(3), Some(64)] {
                let batch = Batch { global: 12, micro };
                let positions: Vec<u64> = (0..world)
                    .flat_map(|rank| passes(batch, 5, rank, world))
                    .inspect(|pass| assert!(pass.end - pass.start <= micro.unwrap_or(12)))
                    .flatten()
                    .collect();
                assert_eq!(positions, (60..72).collect::<Vec<u64>>());
            }
        }
    }
}
