//! Multistep consistency distillation, arXiv 2403.06807 (algorithm 1, eq. 4-6), at a fixed number of segments.

use tch::Tensor;

use super::{Objective, Rows, Setting, distance};
use crate::diffusion::boundary::landing;
use crate::diffusion::denoiser::Denoiser;
use crate::diffusion::guidance::Guided;
use crate::diffusion::prediction::heads;
use crate::diffusion::schedule::working_kind;
use crate::diffusion::segments::Segments;
use crate::diffusion::solver::inverse_ddim;

/// The target landing is turned into the clean latent that one DDIM step would need, and clean latents are
/// compared, weighted by SNR + 1 as that paper's v-loss:
///
/// `x_ref = invDDIM(sg g(z_n, t_n, tau_s), z_m; t_m -> tau_s)`,
/// `L = d(sqrt(SNR + 1) x0(z_m, t_m), sqrt(SNR + 1) x_ref)`, `SNR = (alpha / sigma)²` at t_m.
///
/// Anchors as in the landing form: where t_n = tau_s the landing is z_n.
#[derive(Debug)]
pub struct Mcd {
    setting: Setting,
}

impl Mcd {
    /// The objective of one stage.
    pub fn new(setting: Setting) -> Self {
        Self { setting }
    }
}

impl Objective for Mcd {
    fn losses(&self, rows: &Rows, student: &dyn Denoiser, teacher: Option<&Guided<'_>>) -> Tensor {
        let Setting {
            schedule,
            prediction,
            ..
        } = &self.setting;
        let Rows {
            z, t, conditioning, ..
        } = rows;
        let end = self.setting.segments.targets(t);
        let advanced = self.setting.advance(rows, teacher);
        let landed = self
            .setting
            .target(&advanced, &end, conditioning, student, |z, n, t, end| {
                landing(schedule, *prediction, z, n, t, end)
            });
        let z = z.to_kind(working_kind(z));
        let reference = inverse_ddim(schedule, &landed, &z, t, &end);
        let snr = (schedule.alpha_at(t, &z) / schedule.sigma_at(t, &z)).square();
        let weight = (snr + 1.0).sqrt();
        let n = student.predict(&z, t, conditioning);
        let x0 = heads(schedule, *prediction, &z, &n, t).x0;
        distance(self.setting.loss, &(&weight * x0), &(&weight * reference))
    }

    fn segments(&self) -> &Segments {
        &self.setting.segments
    }
}
