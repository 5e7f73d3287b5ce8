//! Which rows a training step sees, and reading them before it asks.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Dataset, Error, Staging};
use crate::group::rows_of;
use crate::order::{pass_key, permute};
use crate::seed::{Purpose, Stream};

/// Which rows training reads: a pure function of these four and the position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// Seed of the run.
    pub seed: u64,
    /// Position of the training stage in the plan.
    pub stage: u64,
    /// Rows of the dataset.
    pub rows: u64,
    /// Rows in one optimizer step over all engines.
    pub global_batch: u64,
    /// Fixed shares of them, which ranks take whole, if there are any ([`rows_of`]).
    pub virtual_ranks: Option<u32>,
}

impl Order {
    /// The row at `position` = step × batch + slot. Every `rows` positions hold each row once.
    pub fn row_at(&self, position: u64) -> u64 {
        let key = Stream::new(self.seed, Purpose::TrainingOrder, self.stage, 0).next_u64();
        let epoch = position / self.rows;
        permute(self.rows, pass_key(key, epoch), position % self.rows)
    }

    /// The positions that `rank` of `world` reads for `step` (steps count from 0).
    pub fn positions(&self, step: u64, rank: u32, world: u32) -> Range<u64> {
        let share = rows_of(self.global_batch, self.virtual_ranks, rank, world);
        let first = step * self.global_batch;
        first + share.start..first + share.end
    }
}

/// What a loader reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Order of the rows.
    pub order: Order,
    /// Position in the group.
    pub rank: u32,
    /// Members of the group.
    pub world: u32,
    /// Steps to read for, counted from 0.
    pub steps: Range<u64>,
    /// Steps read ahead.
    pub ahead: usize,
}

/// The rows of one step. Its buffers go back to the loader when it is dropped.
#[derive(Debug)]
pub struct Batch {
    /// The step that they are for.
    pub step: u64,
    /// First position, so that draws of the step can be named by position.
    pub first_position: u64,
    /// Numbers of the rows in the dataset.
    pub indices: Vec<u64>,
    rows: Staging,
    back: mpsc::UnboundedSender<Staging>,
}

impl Batch {
    /// The rows, in the order of their positions.
    pub fn rows(&self) -> &Staging {
        &self.rows
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // Nobody takes it back when the loader is gone.
        let _ = self.back.send(std::mem::take(&mut self.rows));
    }
}

/// What reading ahead achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Batches handed out.
    pub batches: u64,
    /// Batches that were not ready when they were asked for.
    pub waited: u64,
}

/// Reads the rows of coming steps into a ring of buffers.
#[derive(Debug)]
pub struct Loader {
    ready: mpsc::Receiver<Result<Batch, Error>>,
    stats: Stats,
    task: tokio::task::JoinHandle<()>,
}

impl Loader {
    /// Starts reading. Must be called inside a tokio runtime; memory is `ahead + 2` batches.
    pub fn start(dataset: Arc<Dataset>, spec: Spec) -> Self {
        let (send, ready) = mpsc::channel(spec.ahead.max(1));
        let task = tokio::spawn(read_ahead(dataset, spec, send));
        Self {
            ready,
            stats: Stats::default(),
            task,
        }
    }

    /// The rows of the next step; none after the last.
    pub async fn next(&mut self) -> Result<Option<Batch>, Error> {
        self.stats.batches += 1;
        let next = match self.ready.try_recv() {
            Ok(next) => Some(next),
            Err(_) => {
                self.stats.waited += 1;
                self.ready.recv().await
            }
        };
        self.count_end(next.is_none());
        next.transpose()
    }

    /// As [`Loader::next`], for a thread that runs no tasks.
    pub fn next_blocking(&mut self) -> Result<Option<Batch>, Error> {
        self.stats.batches += 1;
        let next = match self.ready.try_recv() {
            Ok(next) => Some(next),
            Err(_) => {
                self.stats.waited += 1;
                self.ready.blocking_recv()
            }
        };
        self.count_end(next.is_none());
        next.transpose()
    }

    /// What reading ahead achieved so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The end is no batch.
    fn count_end(&mut self, ended: bool) {
        if ended {
            self.stats.batches -= 1;
            self.stats.waited = self.stats.waited.saturating_sub(1);
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_ahead(dataset: Arc<Dataset>, spec: Spec, send: mpsc::Sender<Result<Batch, Error>>) {
    let (back, mut returned) = mpsc::unbounded_channel();
    for step in spec.steps.clone() {
        let positions = spec.order.positions(step, spec.rank, spec.world);
        let first_position = positions.start;
        let rows: Vec<u64> = positions
            .map(|position| spec.order.row_at(position))
            .collect();
        let mut staging: Staging = returned.try_recv().unwrap_or_default();
        let batch = dataset
            .read_rows(&rows, &mut staging)
            .await
            .map(|()| Batch {
                step,
                first_position,
                indices: rows,
                rows: staging,
                back: back.clone(),
            });
        let failed = batch.is_err();
        // Nobody listens any more when the loader is dropped.
        if send.send(batch).await.is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: Order = Order {
        seed: 42,
        stage: 1,
        rows: 1000,
        global_batch: 24,
        virtual_ranks: None,
    };

    #[test]
    fn every_epoch_holds_every_row_once() {
        for epoch in 0..3 {
            let mut rows: Vec<u64> = (epoch * 1000..(epoch + 1) * 1000)
                .map(|p| ORDER.row_at(p))
                .collect();
            rows.sort_unstable();
            assert!(rows.iter().copied().eq(0..1000), "epoch {epoch}");
        }
    }

    #[test]
    fn seeds_stages_and_epochs_have_orders_of_their_own() {
        let first = |order: Order| (0..50).map(|p| order.row_at(p)).collect::<Vec<_>>();
        let base = first(ORDER);
        assert_ne!(base, first(Order { seed: 43, ..ORDER }));
        assert_ne!(base, first(Order { stage: 2, ..ORDER }));
        assert_ne!(
            base,
            (1000..1050).map(|p| ORDER.row_at(p)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_step_sees_the_same_rows_in_every_world() {
        for world in 1..=7 {
            let joined: Vec<u64> = (0..world)
                .flat_map(|rank| ORDER.positions(5, rank, world))
                .collect();
            assert!(joined.iter().copied().eq(120..144), "world {world}");
            let shared = Order {
                virtual_ranks: Some(7),
                ..ORDER
            };
            let joined = (0..world).flat_map(|rank| shared.positions(5, rank, world));
            assert!(joined.eq(120..144), "world {world}");
        }
    }
}
