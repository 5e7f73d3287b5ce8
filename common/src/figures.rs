//! Measured figures of models: what `report/metrics.json` lists and an evaluation task's COMMIT carries.

use serde::{Deserialize, Serialize};

/// One figure of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// `teacher`, `undistilled` (the teacher under the student's sampler without guidance),
    /// `undistilled_guided`, or the stage's name.
    pub model: String,
    /// Evaluations of the sampler.
    pub steps: u32,
    /// `ddim`, `tlcm9`, `lcm` or `segments`.
    pub sampler: String,
    /// `prompt_adherence`, `latent_frechet` or `teacher_distance`.
    pub metric: String,
    /// The figure over all samples.
    pub value: f64,
    /// Its 95 % interval; none when the sample is too small to tell.
    pub interval: Option<(f64, f64)>,
    /// How many samples it is over.
    pub samples: u64,
}

/// Name of the teacher under its own solver.
pub const TEACHER: &str = "teacher";
/// Name of the teacher under the student's samplers, without guidance.
pub const UNDISTILLED: &str = "undistilled";
/// Name of the teacher under the student's samplers, with its guidance.
pub const UNDISTILLED_GUIDED: &str = "undistilled_guided";
