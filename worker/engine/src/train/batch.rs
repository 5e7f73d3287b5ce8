//! Which rows a step sees: a pure function of (seed, stage, step), whatever the number of ranks.

use std::ops::Range;

use distillery_common::group::batch_share;
use distillery_common::order::{pass_key, permute};
use distillery_common::recipe::Batch;
use distillery_common::seed::{Purpose, Stream};

/// The order in which a stage sees `rows` rows: one permutation after the other, each row once in each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOrder {
    key: u64,
    rows: u64,
}

impl DataOrder {
    /// The order of the stage with ordinal `stage` in its plan, over `rows` > 0 rows.
    pub fn new(run_seed: u64, stage: u64, rows: u64) -> Self {
        assert!(rows > 0, "a stage has rows to train on");
        Self {
            key: Stream::new(run_seed, Purpose::TrainingOrder, stage, 0).next_u64(),
            rows,
        }
    }

    /// The row at `position`: step t consumes positions `[t B, (t + 1) B)`.
    pub fn row(&self, position: u64) -> u64 {
        let (pass, within) = (position / self.rows, position % self.rows);
        permute(self.rows, pass_key(self.key, pass), within)
    }

    /// The positions of `step` that fall to `rank` of `world`, in forward passes of at most `batch.micro` rows.
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_once_in_each_pass_and_passes_differ() {
        let order = DataOrder::new(7, 1, 100);
        let pass = |n: u64| (n * 100..(n + 1) * 100).map(|p| order.row(p));
        for n in 0..3 {
            let mut rows: Vec<u64> = pass(n).collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..100).collect::<Vec<u64>>());
        }
        assert!(!pass(0).eq(pass(1)));
        let other_stage = DataOrder::new(7, 2, 100);
        assert!(!pass(0).eq((0..100).map(|p| other_stage.row(p))));
    }

    #[test]
    fn ranks_and_forward_passes_split_the_same_positions() {
        for world in [1, 2, 3, 4] {
            for micro in [None, Some(1), Some(3), Some(64)] {
                let batch = Batch { global: 12, micro };
                let positions: Vec<u64> = (0..world)
                    .flat_map(|rank| DataOrder::passes(batch, 5, rank, world))
                    .inspect(|pass| assert!(pass.end - pass.start <= micro.unwrap_or(12)))
                    .flatten()
                    .collect();
                assert_eq!(positions, (60..72).collect::<Vec<u64>>());
            }
        }
    }
}
