//! The DDIM step (arXiv 2010.02502, eq. 12 with eta = 0) and its inverse.

use tch::Tensor;

use super::prediction::Heads;
use super::schedule::Schedule;

/// Lands on times `u` `[B]`: `alpha_u x0 + sigma_u eps`.
///
/// With u = t this is z itself; index 0 uses abar_0, not 1. Under a flow schedule it is Euler's step
/// `z + (sigma_u - sigma_t) v`.
pub fn ddim(schedule: &Schedule, heads: &Heads, u: &Tensor) -> Tensor {
    let Heads { x0, eps } = heads;
    schedule.alpha_at(u, x0) * x0 + schedule.sigma_at(u, eps) * eps
}

/// The x0 with which one DDIM step leads from `z` at `t` to `z_u` at `u` (u < t):
/// `(z_u - (sigma_u / sigma_t) z) / (alpha_u - alpha_t sigma_u / sigma_t)` (arXiv 2403.06807, eq. 5).
pub fn inverse_ddim(
    schedule: &Schedule,
    z_u: &Tensor,
    z: &Tensor,
    t: &Tensor,
    u: &Tensor,
) -> Tensor {
    let ratio = schedule.sigma_at(u, z) / schedule.sigma_at(t, z);
    (z_u - &ratio * z) / inverse_scale(schedule, z, t, u)
}

/// `alpha_u - alpha_t sigma_u / sigma_t`: how much a change of x0 moves the landing at `u`.
pub fn inverse_scale(schedule: &Schedule, z: &Tensor, t: &Tensor, u: &Tensor) -> Tensor {
    let ratio = schedule.sigma_at(u, z) / schedule.sigma_at(t, z);
    schedule.alpha_at(u, z) - schedule.alpha_at(t, z) * ratio
}
