//! The training loop: forward passes, backward, all-reduce, clipping, update, moving average.

use std::ops::Range;

use distillery_common::curves::{TIME_BINS, time_bin};
use distillery_common::group::leaves_of;
use distillery_common::ledger::{Ledger, PLACES};
use distillery_common::recipe;
use tch::{Device, Kind, Tensor};
use xxhash_rust::xxh3::Xxh3Default;

use super::batch::shares;
use super::ema::Ema;
use super::flat::{Layout, Parameters};
use super::optimizer::{AdamW, clip_norm};
use super::rate::rate;
use super::snapshot::{self, Part, Position, Snapshot};
use crate::collective::tree::Partials;
use crate::collective::{self, Collective};
use crate::diffusion::denoiser::Denoiser;
use crate::diffusion::guidance::Guided;
use crate::diffusion::schedule::TRAIN_TIMES;
use crate::distill::{Objective, Rows};

/// Steps after which the ranks compare their states.
const COMPARED_EVERY: u64 = 500;
/// Numbers that a fingerprint takes to the host at a time: 4 MiB.
const HASHED_AT_ONCE: usize = 1 << 20;

/// What a stage asks of its trainer.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Steps of the stage.
    pub steps: u64,
    /// Rows of a step.
    pub batch: recipe::Batch,
    /// AdamW, its rate, clipping, and when to give up.
    pub optimizer: recipe::Optimizer,
    /// Decay of the moving average, if one is kept.
    pub ema_decay: Option<f64>,
}

impl From<&recipe::Stage> for Plan {
    fn from(stage: &recipe::Stage) -> Self {
        Self {
            steps: stage.steps,
            batch: stage.batch,
            optimizer: stage.optimizer.clone(),
            ema_decay: stage.student.ema_decay,
        }
    }
}

/// What one step did; the same on every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Which step, from 0.
    pub step: u64,
    /// Mean loss over the global batch.
    pub loss: f64,
    /// Mean loss and number of rows in each segment of the objective, the cleanest first.
    pub loss_by_segment: Vec<(f64, u64)>,
    /// Mean loss and number of rows in each of [`TIME_BINS`] equal bins of time, the cleanest first.
    pub loss_by_time: Vec<(f64, u64)>,
    /// Euclidean norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Whether the gradient was not finite, so that nothing was applied.
    pub skipped: bool,
    /// The rows that all ranks together have consumed.
    pub rows: Ledger,
}

/// Where rows come from.
pub trait Source {
    /// The rows at `positions` of the stage's data order, on the student's device.
    fn rows(&mut self, positions: Range<u64>) -> anyhow::Result<Rows>;
}

/// What to do after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Take the next.
    Continue,
    /// Return.
    Stop,
}

/// Where reports and state go.
pub trait Sink {
    /// Called after every step; may take a snapshot of the trainer.
    fn after_step(&mut self, trainer: &Trainer, report: &StepReport) -> anyhow::Result<Control>;
}

/// Why training ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More steps in a row than `max_skipped` had to be skipped.
    #[error(
        "the gradient was not finite in {in_a_row} steps in a row, the last of them step {step}; \
         a lower learning rate or f32 compute may help"
    )]
    Diverged {
        /// The last skipped step.
        step: u64,
        /// How many.
        in_a_row: u32,
    },
    /// The group broke; the step was not applied, or could not be compared after it was.
    #[error("the group broke in step {step}")]
    Group {
        /// Which.
        step: u64,
        /// How it broke.
        #[source]
        source: collective::Error,
    },
    /// Rows or reports could not be handed over.
    #[error("step {step}")]
    Handover {
        /// Which.
        step: u64,
        /// Of the source or the sink.
        #[source]
        source: anyhow::Error,
    },
}

/// A student in training.
#[derive(Debug)]
pub struct Trainer {
    plan: Plan,
    parameters: Parameters,
    optimizer: AdamW,
    ema: Option<Ema>,
    position: Position,
}

impl Trainer {
    /// A trainer at step 0 of a stage, for a student with these tensors.
    pub fn new(plan: Plan, parameters: Parameters) -> Self {
        let optimizer = AdamW::new(&plan.optimizer, &parameters.masters);
        let ema = plan
            .ema_decay
            .map(|decay| Ema::new(decay, &parameters.masters));
        Self {
            plan,
            parameters,
            optimizer,
            ema,
            position: Position::default(),
        }
    }

    /// Where its tensors live.
    pub fn device(&self) -> Device {
        self.parameters.device()
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Trains until the stage's last step or until the sink says stop.
    pub fn run(
        &mut self,
        objective: &dyn Objective,
        student: &dyn Denoiser,
        teacher: Option<&Guided<'_>>,
        group: &mut dyn Collective,
        source: &mut dyn Source,
        sink: &mut dyn Sink,
    ) -> Result<(), Error> {
        while self.position.step < self.plan.steps {
            let step = self.position.step;
            let handover = |source| Error::Handover { step, source };
            let shares = shares(self.plan.batch, step, group.rank(), group.world());
            let mut rows =
                |passes: Vec<Range<u64>>| passes.into_iter().map(|p| source.rows(p)).collect();
            let rows: Vec<Vec<Rows>> = shares
                .into_iter()
                .map(&mut rows)
                .collect::<anyhow::Result<_>>()
                .map_err(handover)?;
            let report = self.step(&rows, objective, student, teacher, group)?;
            // First of all: whatever ends the group next, the step is applied and must be on record.
            let control = sink.after_step(self, &report).map_err(handover)?;
            if self.position.step.is_multiple_of(COMPARED_EVERY) && group.world() > 1 {
                let compared = group.agree(&self.fingerprint());
                compared.map_err(|source| Error::Group { step, source })?;
            }
            match control {
                Control::Continue => {}
                Control::Stop => break,
            }
        }
        Ok(())
    }

    /// One step: `shares` are this rank's rows, one forward pass each; one share, or one for each of its virtual ranks
    /// ([`super::batch::shares`]).
    ///
    /// The loss is the mean over the global batch however it is split: each pass adds its rows' sum divided by
    /// the batch. On an error nothing was applied.
    pub fn step(
        &mut self,
        shares: &[Vec<Rows>],
        objective: &dyn Objective,
        student: &dyn Denoiser,
        teacher: Option<&Guided<'_>>,
        group: &mut dyn Collective,
    ) -> Result<StepReport, Error> {
        let step = self.position.step;
        let len = self.parameters.layout().len() as i64;
        let segments = objective.segments().count();
        let add = |passes: &Vec<Rows>, reduced: &mut Reduced| {
            for rows in passes {
                let losses = objective.losses(rows, student, teacher);
                let share = losses.sum(Kind::Float) / self.plan.batch.global as f64;
                self.parameters.add_gradient(&share, &reduced.flat);
                reduced.add_losses(rows, &losses, objective);
            }
        };
        let mut reduced = Reduced::new(len, segments, &self.parameters);
        let sum = match self.plan.batch.virtual_ranks {
            None => {
                shares.iter().for_each(|passes| add(passes, &mut reduced));
                group.all_reduce_sum(&mut reduced.flat)
            }
            Some(ranks) => {
                let leaves = leaves_of(ranks, group.rank(), group.world());
                let mut partials = Partials::new(leaves.clone());
                for (leaf, passes) in leaves.zip(shares) {
                    let mut own = reduced.another(partials.spare());
                    add(passes, &mut own);
                    partials.push_leaf(leaf, own.flat);
                }
                group.all_reduce_fixed(partials.finish(), ranks, &mut reduced.flat)
            }
        };
        sum.map_err(|source| Error::Group { step, source })?;
        let mut gradient = reduced.flat.narrow(0, 0, len);
        let grad_norm = clip_norm(&mut gradient, self.plan.optimizer.grad_clip);
        let rate = rate(&self.plan.optimizer, step, self.plan.steps);
        let skipped = !grad_norm.is_finite();
        if skipped {
            self.skip()?;
        } else {
            self.apply(&gradient, rate);
        }
        let Losses {
            mean,
            by_segment,
            by_time,
        } = reduced.losses();
        Ok(StepReport {
            step,
            loss: mean,
            loss_by_segment: by_segment,
            loss_by_time: by_time,
            grad_norm,
            rate,
            skipped,
            rows: reduced.rows(),
        })
    }

    fn apply(&mut self, gradient: &Tensor, rate: f64) {
        self.optimizer
            .update(&mut self.parameters.masters, gradient, rate);
        self.write_compute();
        if let Some(ema) = &mut self.ema {
            ema.update(&self.parameters.masters);
        }
        self.position.step += 1;
        self.position.applied = self.optimizer.applied;
        self.position.skipped_in_a_row = 0;
    }

    fn skip(&mut self) -> Result<(), Error> {
        let step = self.position.step;
        self.position.step += 1;
        self.position.skipped += 1;
        self.position.skipped_in_a_row += 1;
        let in_a_row = self.position.skipped_in_a_row;
        if in_a_row > self.plan.optimizer.max_skipped {
            return Err(Error::Diverged { step, in_a_row });
        }
        Ok(())
    }

    fn write_compute(&mut self) {
        let masters = self.parameters.masters.shallow_clone();
        self.parameters.write_compute(&masters);
    }

    /// The whole state but for [`Self::position`]: flat buffers `[len]`, f32, each with its part. Whoever writes into
    /// them calls [`Self::resume`] after.
    pub fn state(&self) -> Vec<(Part, Tensor)> {
        let mut parts = vec![
            (Part::Student, self.parameters.masters.shallow_clone()),
            (Part::AdamM, self.optimizer.m.shallow_clone()),
            (Part::AdamV, self.optimizer.v.shallow_clone()),
        ];
        parts.extend(
            self.ema
                .as_ref()
                .map(|ema| (Part::Ema, ema.average.shallow_clone())),
        );
        parts
    }

    /// Goes on from what was written into [`Self::state`], which stood at `position`.
    pub fn resume(&mut self, position: Position) {
        self.optimizer.applied = position.applied;
        self.position = position;
        self.write_compute();
    }

    /// Names the whole state: equal for equal bits at an equal position.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Xxh3Default::new();
        let mut bytes = Vec::new();
        for (_, flat) in self.state() {
            for start in (0..flat.numel()).step_by(HASHED_AT_ONCE) {
                let count = HASHED_AT_ONCE.min(flat.numel() - start);
                let piece = flat.narrow(0, start as i64, count as i64);
                bytes.resize(count * 4, 0);
                piece.to_device(Device::Cpu).copy_data_u8(&mut bytes, count);
                hash.update(&bytes);
            }
        }
        let mut name = [0; 32];
        name[..16].copy_from_slice(&hash.digest128().to_le_bytes());
        name[16..24].copy_from_slice(&self.position.step.to_le_bytes());
        name[24..].copy_from_slice(&self.position.applied.to_le_bytes());
        name
    }

    /// Empty buffers that fit this trainer's state.
    pub fn empty_snapshot(&self) -> Snapshot {
        let all = 0..self.layout().places().len();
        self.empty_share(&|_| all.clone())
    }

    /// The same for a part of the state: the places of the layout that `share` names for each of its parts.
    pub fn empty_share(&self, share: &dyn Fn(Part) -> Range<usize>) -> Snapshot {
        Snapshot::new(self.layout().clone(), self.ema.is_some(), share)
    }

    /// Whether a moving average is kept.
    pub fn has_average(&self) -> bool {
        self.ema.is_some()
    }

    /// Copies the state into `into`, made by [`Self::empty_snapshot`] or for a share: the only stall of a checkpoint.
    pub fn snapshot(&self, into: &mut Snapshot) {
        into.position = self.position;
        for (part, tensor) in self.state() {
            into.take(part, &tensor);
        }
    }

    /// The buffer of `part`, `[len]`, f32; none where it is not kept.
    pub(super) fn part_mut(&mut self, part: Part) -> Option<&mut Tensor> {
        match part {
            Part::Student => Some(&mut self.parameters.masters),
            Part::AdamM => Some(&mut self.optimizer.m),
            Part::AdamV => Some(&mut self.optimizer.v),
            Part::Ema => self.ema.as_mut().map(|ema| &mut ema.average),
        }
    }

    /// Where each tensor lies in every part.
    pub fn layout(&self) -> &Layout {
        self.parameters.layout()
    }

    /// Goes on from `state`, bit for bit.
    pub fn restore(&mut self, state: &Snapshot) -> Result<(), snapshot::Error> {
        let load = |part: Part, tensor: &mut Tensor| {
            let name = part.prefix();
            let values = state.part(part).ok_or_else(|| snapshot::Error::Missing {
                name: name.to_owned(),
            })?;
            if values.len() != tensor.numel() {
                return Err(snapshot::Error::Size {
                    name: name.to_owned(),
                    found: values.len(),
                    expected: tensor.numel(),
                });
            }
            tch::no_grad(|| tensor.copy_(&Tensor::from_slice(values)));
            Ok(())
        };
        for (part, mut tensor) in self.state() {
            load(part, &mut tensor)?;
        }
        self.resume(state.position);
        Ok(())
    }
}

/// What is summed over the group: the gradient, then loss sums and row counts by segment and by time, then the ledger.
struct Reduced {
    /// `[len + 2 (segments + TIME_BINS) + PLACES]`, f32.
    flat: Tensor,
    len: i64,
    segments: usize,
}

/// Losses over the global batch.
struct Losses {
    mean: f64,
    by_segment: Vec<(f64, u64)>,
    by_time: Vec<(f64, u64)>,
}

impl Reduced {
    fn new(len: i64, segments: usize, parameters: &Parameters) -> Self {
        let tail = (2 * (segments + TIME_BINS) + PLACES) as i64;
        let flat = Tensor::zeros([len + tail], (Kind::Float, parameters.device()));
        Self {
            flat,
            len,
            segments,
        }
    }

    /// As new, in a buffer that is no longer needed if there is one.
    fn another(&self, spare: Option<Tensor>) -> Self {
        let flat = match spare {
            Some(mut spare) => spare.zero_(),
            None => self.flat.zeros_like(),
        };
        Self { flat, ..*self }
    }

    fn bins(&self) -> usize {
        self.segments + TIME_BINS
    }

    fn add_losses(&mut self, rows: &Rows, losses: &Tensor, objective: &dyn Objective) {
        let host = |x: &Tensor| x.to_device(Device::Cpu);
        let losses = Vec::<f32>::try_from(host(&losses.detach()).to_kind(Kind::Float))
            .expect("a loss for each row, in f32");
        let times = Vec::<i64>::try_from(host(&rows.t)).expect("a time for each row, in i64");
        let bins = self.bins();
        let mut tail = vec![0f32; 2 * bins + PLACES];
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

    fn rows(&self) -> Ledger {
        let start = self.len + 2 * self.bins() as i64;
        let sums = self.flat.narrow(0, start, PLACES as i64);
        let sums = Vec::<f32>::try_from(sums.to_device(Device::Cpu)).expect("sums in f32");
        // Whole numbers below 2^24.
        let whole: [u32; PLACES] = std::array::from_fn(|place| sums[place] as u32);
        Ledger::from(whole)
    }

    fn losses(&self) -> Losses {
        let tail = self.flat.narrow(0, self.len, 2 * self.bins() as i64);
        let tail =
            Vec::<f32>::try_from(tail.to_device(Device::Cpu)).expect("sums and counts in f32");
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
