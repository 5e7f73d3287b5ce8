//! Objectives: what a student is told to minimise, one method in one file, each after its paper.
//!
//! Knows the [`Denoiser`] trait, never a network; tensors come in, a loss comes out. Nothing here draws
//! randomness, reads rows or moves weights.

pub mod lcm;
pub mod mcd;
pub mod mlcm;

use distillery_common::recipe::{self, Loss};
use tch::Tensor;

use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::diffusion::guidance::Guided;
use crate::diffusion::prediction::{Prediction, heads};
use crate::diffusion::schedule::Schedule;
use crate::diffusion::segments::{self, Segments};
use crate::diffusion::solver::ddim;

/// Trajectory states with what the teacher said about them: B rows.
#[derive(Debug)]
pub struct Rows {
    /// Their numbers in the dataset, for the ledger.
    pub numbers: Vec<u64>,
    /// The states `[B, C, H, W]`.
    pub z: Tensor,
    /// The teacher's guided prediction at each state, of the shape of z: noise, or whatever the teacher predicts.
    pub eps_w: Tensor,
    /// Their times `[B]` (i64), in 1..=999.
    pub t: Tensor,
    /// Their conditions.
    pub conditioning: Conditioning,
}

impl Rows {
    /// B.
    pub fn len(&self) -> i64 {
        self.t.size()[0]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What all objectives are made of.
#[derive(Debug)]
pub struct Setting {
    /// Of teacher and student.
    pub schedule: Schedule,
    /// What teacher and student predict.
    pub prediction: Prediction,
    /// The stage's segments.
    pub segments: Segments,
    /// From t_m to t_n, in times.
    pub skip: u32,
    /// Distance of the two sides.
    pub loss: Loss,
}

/// What a student is told to minimise.
pub trait Objective {
    /// The loss of each row, `[B]`, f32 (f64 where z is), with a gradient to the student's weights.
    ///
    /// Takes the teacher's step from the stored prediction, or from `teacher` where there is one. The student
    /// is asked for z with gradients, then, without, for the advanced states that are not anchors.
    fn losses(&self, rows: &Rows, student: &dyn Denoiser, teacher: Option<&Guided<'_>>) -> Tensor;

    /// The segments that losses are reported by.
    fn segments(&self) -> &Segments;
}

/// The objective of a stage.
///
/// `lcm` knows one segment, whatever the recipe says of segments, because its target is the clean end.
pub fn objective(
    stage: &recipe::Stage,
    schedule: Schedule,
    prediction: Prediction,
) -> Result<Box<dyn Objective>, segments::Error> {
    let setting = |count| {
        Ok(Setting {
            schedule,
            prediction,
            segments: Segments::new(count)?,
            skip: stage.skip,
            loss: stage.loss,
        })
    };
    Ok(match stage.method {
        recipe::Method::Mlcm => Box::new(mlcm::Mlcm::new(setting(stage.segments)?)),
        recipe::Method::Lcm => Box::new(lcm::Lcm::new(setting(1)?)),
        recipe::Method::Mcd => Box::new(mcd::Mcd::new(setting(stage.segments)?)),
    })
}

/// The distance of two batches row by row: mean over elements, `[B]`.
///
/// L2 is `d²`; pseudo-Huber is `sqrt(d² + c²) - c` (arXiv 2310.14189, eq. 7).
pub fn distance(loss: Loss, a: &Tensor, b: &Tensor) -> Tensor {
    let square = (a - b).square();
    let each = match loss {
        Loss::L2 => square,
        Loss::Huber { c } => (square + c * c).sqrt() - c,
    };
    each.flatten(1, -1)
        .mean_dim(&[1i64][..], false, each.kind())
}

/// The teacher's step: `z_n = DDIM(z; x0_w, eps_w; t -> t_n)` with its times t_n, without gradients.
struct Advanced {
    /// The states `[B, C, H, W]` in working precision.
    z: Tensor,
    /// Their times `[B]`.
    t: Tensor,
}

impl Setting {
    fn advance(&self, rows: &Rows, teacher: Option<&Guided<'_>>) -> Advanced {
        tch::no_grad(|| {
            let Rows {
                z,
                eps_w,
                t,
                conditioning,
                ..
            } = rows;
            let online = teacher.map(|teacher| teacher.predict(z, t, conditioning));
            let n = online.as_ref().unwrap_or(eps_w);
            let t_n = self.segments.previous_times(t, self.skip);
            Advanced {
                z: ddim(
                    &self.schedule,
                    &heads(&self.schedule, self.prediction, z, n, t),
                    &t_n,
                ),
                t: t_n,
            }
        })
    }

    /// What the student makes of the advanced states: `read(z, n, t)` of its prediction n on the rows where
    /// `t_n > end`; the rest are anchors and stay z_n, with no prediction. Without gradients.
    fn target(
        &self,
        advanced: &Advanced,
        end: &Tensor,
        conditioning: &Conditioning,
        student: &dyn Denoiser,
        read: impl Fn(&Tensor, &Tensor, &Tensor, &Tensor) -> Tensor,
    ) -> Tensor {
        tch::no_grad(|| {
            let free = advanced.t.gt_tensor(end).nonzero().view([-1]);
            if free.size()[0] == 0 {
                return advanced.z.shallow_clone();
            }
            let z = advanced.z.index_select(0, &free);
            let t = advanced.t.index_select(0, &free);
            let n = student.predict(&z, &t, &conditioning.select(&free));
            let target = read(&z, &n, &t, &end.index_select(0, &free));
            advanced.z.index_copy(0, &free, &target)
        })
    }
}
