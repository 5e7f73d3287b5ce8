//! What the ranks of a group tell each other in a step.

use distillery_common::curves::{TIME_BINS, time_bin};
use distillery_common::ledger::{Ledger, PLACES};
use tch::{Device, Kind, Tensor};

use super::Notice;
use super::flat::Parameters;
use crate::collective::{self, Collective, Parts};
use crate::diffusion::schedule::TRAIN_TIMES;
use crate::distill::{Objective, Rows};

/// Values of a [`Notice`], each a number of ranks: who leave, who of them with a checkpoint, who are saving.
const NOTICE: usize = 3;

/// What is summed over the group: the gradient, then loss sums and row counts by segment and by time, then the ledger, then
/// the notices.
pub(super) struct Reduced {
    /// `[len + 2 (segments + TIME_BINS) + PLACES + NOTICE]`, f32.
    pub(super) flat: Tensor,
    len: i64,
    segments: usize,
}

/// Losses over the global batch.
pub(super) struct Losses {
    pub(super) mean: f64,
    pub(super) by_segment: Vec<(f64, u64)>,
    pub(super) by_time: Vec<(f64, u64)>,
}

impl Reduced {
    pub(super) fn new(len: i64, segments: usize, parameters: &Parameters) -> Self {
        let tail = (2 * (segments + TIME_BINS) + PLACES + NOTICE) as i64;
        let flat = Tensor::zeros([len + tail], (Kind::Float, parameters.device()));
        Self {
            flat,
            len,
            segments,
        }
    }

    /// As new, in a buffer that is no longer needed if there is one.
    pub(super) fn another(&self, spare: Option<Tensor>) -> Self {
        let flat = match spare {
            Some(mut spare) => spare.zero_(),
            None => self.flat.zeros_like(),
        };
        Self { flat, ..*self }
    }

    /// The gradient, `[len]`.
    pub(super) fn gradient(&self) -> Tensor {
        self.flat.narrow(0, 0, self.len)
    }

    /// Values that follow the gradient.
    pub(super) fn tail_len(&self) -> usize {
        2 * self.bins() + PLACES + NOTICE
    }

    /// After a sum of which every rank has its own part: tells all ranks the tail, which the last one has, and the sums of
    /// squares of every rank's tensors, of which `own` are this rank's. `places` has the tensors of each rank, as parts of
    /// all tensors.
    pub(super) fn exchange(
        &mut self,
        own: &[f64],
        places: &Parts,
        group: &mut dyn Collective,
    ) -> Result<Vec<f64>, collective::Error> {
        let mine = places.of(group.rank());
        assert_eq!(
            own.len(),
            mine.len(),
            "a sum for each of this rank's tensors"
        );
        // An f64 travels as two words that nobody adds.
        let count = places.of(places.world() - 1).end;
        let mut words = vec![0f32; 2 * count];
        for (to, sum) in words[2 * mine.start..].chunks_exact_mut(2).zip(own) {
            let bits = sum.to_bits();
            to.copy_from_slice(&[bits as u32, (bits >> 32) as u32].map(f32::from_bits));
        }
        let words = Tensor::from_slice(&words).to_device(self.flat.device());
        let mut tail = self.flat.narrow(0, self.len, self.tail_len() as i64);
        let mut told = Tensor::cat(&[words, tail.shallow_clone()], 0);
        let ends = (0..places.world()).map(|rank| 2 * places.of(rank).end);
        let parts = Parts::ending_at(ends.collect()).with_tail(self.tail_len());
        group.all_gather(&mut told, &parts)?;
        let split = 2 * count as i64;
        tch::no_grad(|| tail.copy_(&told.narrow(0, split, self.tail_len() as i64)));
        let words = told.narrow(0, 0, split).to_device(Device::Cpu);
        let words = Vec::<f32>::try_from(words).expect("words as f32");
        let pairs = words.chunks_exact(2);
        Ok(pairs
            .map(|pair| {
                let [low, high] = [pair[0], pair[1]].map(|word| u64::from(word.to_bits()));
                f64::from_bits(low | high << 32)
            })
            .collect())
    }

    fn bins(&self) -> usize {
        self.segments + TIME_BINS
    }

    pub(super) fn add_losses(&mut self, rows: &Rows, losses: &Tensor, objective: &dyn Objective) {
        let host = |x: &Tensor| x.to_device(Device::Cpu);
        let losses = Vec::<f32>::try_from(host(&losses.detach()).to_kind(Kind::Float))
            .expect("a loss for each row, in f32");
        let times = Vec::<i64>::try_from(host(&rows.t)).expect("a time for each row, in i64");
        let bins = self.bins();
        let mut tail = vec![0f32; self.tail_len()];
        for (loss, t) in losses.into_iter().zip(times) {
            let segment = objective.segments().segment_of(t);
            for bin in [segment, self.segments + time_bin(t, TRAIN_TIMES)] {
                tail[bin] += loss;
                tail[bins + bin] += 1.0;
            }
        }
        let consumed = Ledger::of(rows.numbers.iter().copied()).sums();
        for (to, sum) in tail[2 * bins..].iter_mut().zip(consumed) {
            *to = sum as f32;
        }
        let tail = Tensor::from_slice(&tail).to_device(self.flat.device());
        let mut place = self.flat.narrow(0, self.len, tail.numel() as i64);
        tch::no_grad(|| place += tail);
    }

    /// Tells the others what this rank has to say. Once a step.
    pub(super) fn add_notice(&mut self, notice: Notice) {
        let told = [
            notice.leave.is_some(),
            notice.leave == Some(true),
            notice.saving,
        ];
        let told = Tensor::from_slice(&told.map(|yes| f32::from(u8::from(yes))));
        let start = self.len + self.notice_at();
        let mut place = self.flat.narrow(0, start, NOTICE as i64);
        tch::no_grad(|| place += told.to_device(self.flat.device()));
    }

    /// What any rank had to say.
    pub(super) fn notice(&self) -> Notice {
        let told = self.tail(self.notice_at(), NOTICE);
        Notice {
            leave: (told[0] > 0.0).then_some(told[1] > 0.0),
            saving: told[2] > 0.0,
        }
    }

    fn notice_at(&self) -> i64 {
        (2 * self.bins() + PLACES) as i64
    }

    /// `count` values that follow the gradient, from the one at `start` on.
    fn tail(&self, start: i64, count: usize) -> Vec<f32> {
        let values = self.flat.narrow(0, self.len + start, count as i64);
        Vec::<f32>::try_from(values.to_device(Device::Cpu)).expect("values in f32")
    }

    pub(super) fn rows(&self) -> Ledger {
        let sums = self.tail(2 * self.bins() as i64, PLACES);
        // Whole numbers below 2^24.
        let whole: [u32; PLACES] = std::array::from_fn(|place| sums[place] as u32);
        Ledger::from(whole)
    }

    pub(super) fn losses(&self) -> Losses {
        let tail = self.tail(0, 2 * self.bins());
        let (sums, counts) = tail.split_at(self.bins());
        let mean = |sum: f64, count: f64| if count > 0.0 { sum / count } else { 0.0 };
        let total = |values: &[f32]| values.iter().map(|&x| f64::from(x)).sum::<f64>();
        let mut by_segment: Vec<(f64, u64)> = std::iter::zip(sums, counts)
            .map(|(&sum, &count)| (mean(f64::from(sum), f64::from(count)), count as u64))
            .collect();
        let by_time = by_segment.split_off(self.segments);
        Losses {
            mean: mean(
                total(&sums[..self.segments]),
                total(&counts[..self.segments]),
            ),
            by_segment,
            by_time,
        }
    }
}
