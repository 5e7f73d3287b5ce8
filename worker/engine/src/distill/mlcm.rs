//! Multistep latent consistency distillation, arXiv 2406.05768 (v6: MLCD, eq. 7-8).

use tch::Tensor;

use super::{Objective, Rows, Setting, distance};
use crate::diffusion::boundary::landing;
use crate::diffusion::denoiser::Denoiser;
use crate::diffusion::guidance::Guided;
use crate::diffusion::segments::Segments;

/// Inside each segment the student learns to land on the segment's lower milestone:
///
/// `L = d(g(z_m, t_m, tau_s), sg g(z_n, t_n, tau_s))`, with `z_n = DDIM(z_m; x0_w, eps_w; t_m -> t_n)` and
/// `t_n = max(t_m - skip, tau_s)`. Where t_n = tau_s the target is z_n itself: these anchors alone keep the
/// student from collapsing, and cost no prediction.
#[derive(Debug)]
pub struct Mlcm {
    setting: Setting,
}

impl Mlcm {
    /// The objective of one stage.
    pub fn new(setting: Setting) -> Self {
        Self { setting }
    }
}

impl Objective for Mlcm {
    fn losses(&self, rows: &Rows, student: &dyn Denoiser, teacher: Option<&Guided<'_>>) -> Tensor {
        let Setting {
            schedule,
            prediction,
            ..
        } = &self.setting;
        let Rows {
            z, t, conditioning, ..
        } = rows;
        let land = |z: &Tensor, n: &Tensor, t: &Tensor, end: &Tensor| {
            landing(schedule, *prediction, z, n, t, end)
        };
        let end = self.setting.segments.targets(t);
        let advanced = self.setting.advance(rows, teacher);
        let target = self
            .setting
            .target(&advanced, &end, conditioning, student, land);
        let landed = land(z, &student.predict(z, t, conditioning), t, &end);
        distance(self.setting.loss, &landed, &target)
    }

    fn segments(&self) -> &Segments {
        &self.setting.segments
    }
}
