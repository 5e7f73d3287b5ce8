//! The training loop: forward passes, backward, all-reduce, clipping, update, moving average.
//!
//! Where moments are shared out, a member of a group holds those of its own tensors. It sums only their gradient to the
//! end, updates their masters, and all masters are handed round: the two halves of an all-reduce with the update between
//! them, and over TCP the same bits. From then until the masters are round the state is that of no step.

mod state;

use std::ops::Range;

use distillery_common::group::leaves_of;
use distillery_common::ledger::Ledger;
use distillery_common::recipe;
use tch::{Device, Kind, Tensor};

use super::batch::shares;
use super::ema::Ema;
use super::flat::{Layout, Parameters};
use super::norm::{clip, norm, squares};
use super::optimizer::AdamW;
use super::rate::rate;
use super::reduced::{Losses, Reduced};
use super::snapshot::Position;
use crate::collective::tree::Partials;
use crate::collective::{self, Collective, Parts};
use crate::diffusion::denoiser::Denoiser;
use crate::diffusion::guidance::Guided;
use crate::distill::{Objective, Rows};

/// Steps after which the ranks compare their states.
const COMPARED_EVERY: u64 = 500;

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
    /// What any rank had to say in this step.
    pub notice: Notice,
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

/// What a rank tells the others in a step, beside its gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Notice {
    /// Whether it wants to leave after this step, and if so, whether with a checkpoint. All stop then: one that stopped alone
    /// would leave the others waiting for it in the next step.
    pub leave: Option<bool>,
    /// Whether it is still writing an earlier checkpoint.
    pub saving: bool,
}

/// Where reports and state go.
pub trait Sink {
    /// What this rank has to say to the others: asked in every step, when its gradient is there.
    fn notice(&mut self) -> Notice {
        Notice::default()
    }

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
    /// The group broke; the step was not applied, or could not be compared after it was. Where moments are shared out it
    /// may be applied in part ([`Trainer::is_torn`]).
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
    /// Whose moments are here.
    seat: Seat,
    /// The values of each rank's tensors, and the tensors, of a group of some size.
    cut: [Parts; 2],
    torn: bool,
}

/// A place in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seat {
    rank: u32,
    world: u32,
}

impl Seat {
    const ALONE: Self = Self { rank: 0, world: 1 };
}

impl Trainer {
    /// A trainer at step 0 of a stage, for a student with these tensors, with all moments.
    pub fn new(plan: Plan, parameters: Parameters) -> Self {
        Self::seated(plan, parameters, Seat::ALONE)
    }

    /// The same for `rank` of `world`: where the plan shares moments out, it holds those of that rank's tensors, and steps
    /// with that group alone.
    pub fn member(plan: Plan, parameters: Parameters, rank: u32, world: u32) -> Self {
        let seat = match plan.optimizer.sharded {
            true => Seat { rank, world },
            false => Seat::ALONE,
        };
        Self::seated(plan, parameters, seat)
    }

    fn seated(plan: Plan, parameters: Parameters, seat: Seat) -> Self {
        let own = parameters.layout().share(seat.rank, seat.world);
        let own = parameters.layout().span(&own);
        let optimizer = AdamW::new(&plan.optimizer, &narrow(&parameters.masters, &own));
        let ema = plan
            .ema_decay
            .map(|decay| Ema::new(decay, &parameters.masters));
        Self {
            seat,
            cut: cut(parameters.layout(), seat.world),
            torn: false,
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

    /// Whether moments are spread over a group.
    fn shares_moments(&self) -> bool {
        self.seat.world > 1
    }

    /// Whether a step was applied in part: such a state is to be thrown away.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Trains until the stage's last step, until a rank's sink wants to leave, or until the sink here says stop.
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
            let notice = &mut || sink.notice();
            let report = self.step(&rows, notice, objective, student, teacher, group)?;
            // First of all: whatever ends the group next, the step is applied and must be on record.
            let control = sink.after_step(self, &report).map_err(handover)?;
            if self.position.step.is_multiple_of(COMPARED_EVERY) && group.world() > 1 {
                let compared = group.agree(&self.fingerprint());
                compared.map_err(|source| Error::Group { step, source })?;
            }
            if control == Control::Stop || report.notice.leave.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// One step: `shares` are this rank's rows, one forward pass each; one share, or one for each of its virtual ranks
    /// ([`super::batch::shares`]).
    ///
    /// The loss is the mean over the global batch however it is split: each pass adds its rows' sum divided by
    /// the batch. `notice` is asked as [`Sink::notice`]. On an error nothing was applied, or the state [`Self::is_torn`].
    ///
    /// # Panics
    ///
    /// When moments are spread over another group than this one, or a step before was applied in part.
    pub fn step(
        &mut self,
        shares: &[Vec<Rows>],
        notice: &mut dyn FnMut() -> Notice,
        objective: &dyn Objective,
        student: &dyn Denoiser,
        teacher: Option<&Guided<'_>>,
        group: &mut dyn Collective,
    ) -> Result<StepReport, Error> {
        let (rank, world) = (group.rank(), group.world());
        let fits = self.seat == Seat { rank, world } || !self.shares_moments();
        assert!(fits, "moments are spread over the group that steps");
        assert!(!self.torn, "a torn state takes no step");
        if self.cut[0].world() != world {
            self.cut = cut(self.layout(), world);
        }
        let step = self.position.step;
        let broke = |source| Error::Group { step, source };
        let mut reduced = self
            .sum(shares, notice, objective, student, teacher, group)
            .map_err(broke)?;
        let own = self.own_values();
        let mut gradient = narrow(&reduced.gradient(), &own);
        let places = &self.layout().places()[self.layout().share(self.seat.rank, self.seat.world)];
        let mut sums = squares(&gradient, places);
        if self.shares_moments() {
            let exchanged = reduced.exchange(&sums, &self.cut[1], group);
            sums = exchanged.map_err(broke)?;
        }
        let grad_norm = norm(&sums);
        let rate = rate(&self.plan.optimizer, step, self.plan.steps);
        let skipped = !grad_norm.is_finite();
        if skipped {
            self.skip()?;
        } else {
            clip(&mut gradient, grad_norm, self.plan.optimizer.grad_clip);
            self.apply(&gradient, rate, group).map_err(broke)?;
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
            notice: reduced.notice(),
        })
    }

    /// Passes forward and backward, and the sum over the group: finished where this rank holds moments.
    fn sum(
        &self,
        shares: &[Vec<Rows>],
        notice: &mut dyn FnMut() -> Notice,
        objective: &dyn Objective,
        student: &dyn Denoiser,
        teacher: Option<&Guided<'_>>,
        group: &mut dyn Collective,
    ) -> Result<Reduced, collective::Error> {
        let len = self.layout().len() as i64;
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
        match self.plan.batch.virtual_ranks {
            None => {
                shares.iter().for_each(|passes| add(passes, &mut reduced));
                reduced.add_notice(notice());
                let parts = self.cut[0].with_tail(reduced.tail_len());
                match self.shares_moments() {
                    true => group.reduce_scatter_sum(&mut reduced.flat, &parts)?,
                    false => group.all_reduce_sum_in(&mut reduced.flat, &parts)?,
                }
            }
            Some(ranks) => {
                let leaves = leaves_of(ranks, group.rank(), group.world());
                let mut partials = Partials::new(leaves.clone());
                let last = leaves.end - 1;
                for (leaf, passes) in leaves.zip(shares) {
                    let mut own = reduced.another(partials.spare());
                    add(passes, &mut own);
                    // Every rank has a leaf, and speaks in its last.
                    if leaf == last {
                        own.add_notice(notice());
                    }
                    partials.push_leaf(leaf, own.flat);
                }
                group.all_reduce_fixed(partials.finish(), ranks, &mut reduced.flat)?;
            }
        }
        Ok(reduced)
    }

    /// The values whose moments are here.
    fn own_values(&self) -> Range<usize> {
        let layout = self.layout();
        layout.span(&layout.share(self.seat.rank, self.seat.world))
    }

    /// Updates the masters by `gradient`, which is that of [`Self::own_values`].
    fn apply(
        &mut self,
        gradient: &Tensor,
        rate: f64,
        group: &mut dyn Collective,
    ) -> Result<(), collective::Error> {
        let own = self.own_values();
        self.torn = self.shares_moments();
        self.optimizer
            .update(&mut narrow(&self.parameters.masters, &own), gradient, rate);
        if self.shares_moments() {
            group.all_gather(&mut self.parameters.masters, &self.cut[0])?;
        }
        self.torn = false;
        self.write_compute();
        if let Some(ema) = &mut self.ema {
            ema.update(&self.parameters.masters);
        }
        self.position.step += 1;
        self.position.applied = self.optimizer.applied;
        self.position.skipped_in_a_row = 0;
        Ok(())
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

    /// Where each tensor lies in every part.
    pub fn layout(&self) -> &Layout {
        self.parameters.layout()
    }
}

/// The values of each rank's tensors, and the tensors themselves, as parts of all.
fn cut(layout: &Layout, world: u32) -> [Parts; 2] {
    let ends = (0..world).map(|rank| layout.share(rank, world).end);
    [layout.parts(world), Parts::ending_at(ends.collect())]
}

/// The values of a flat buffer at `range`, where they lie.
fn narrow(flat: &Tensor, range: &Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}
