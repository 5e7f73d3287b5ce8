//! Latent consistency distillation, arXiv 2310.04378 (eq. 14, with a solver step of `skip` times).

use tch::Tensor;

use super::{Objective, Rows, Setting, distance};
use crate::diffusion::boundary::clean;
use crate::diffusion::denoiser::Denoiser;
use crate::diffusion::guidance::Guided;
use crate::diffusion::segments::Segments;

/// Consistency of clean ends over the whole of time:
///
/// `L = d(f(z_m, t_m), sg f(z_n, t_n))`, `t_n = max(t_m - skip, 0)`, with the hard boundary f(z, 0) = z. The
/// paper's distance is pseudo-Huber, c = 0.001; guidance is baked in at the teacher's scale.
#[derive(Debug)]
pub struct Lcm {
    setting: Setting,
}

impl Lcm {
    /// The objective of one stage, over one segment.
    pub fn new(setting: Setting) -> Self {
        assert_eq!(
            setting.segments.count(),
            1,
            "latent consistency distillation knows one segment"
        );
        Self { setting }
    }
}

impl Objective for Lcm {
    fn losses(&self, rows: &Rows, student: &dyn Denoiser, teacher: Option<&Guided<'_>>) -> Tensor {
        let Setting {
            schedule,
            prediction,
            ..
        } = &self.setting;
        let Rows {
            z, t, conditioning, ..
        } = rows;
        let advanced = self.setting.advance(rows, teacher);
        let target = self.setting.target(
            &advanced,
            &t.zeros_like(),
            conditioning,
            student,
            |z, n, t, _| clean(schedule, *prediction, z, n, t),
        );
        let n = student.predict(z, t, conditioning);
        distance(
            self.setting.loss,
            &clean(schedule, *prediction, z, &n, t),
            &target,
        )
    }

    fn segments(&self) -> &Segments {
        &self.setting.segments
    }
}
