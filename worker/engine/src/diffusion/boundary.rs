//! Where a state leads: its clean end f and its landing g on a milestone.

use tch::Tensor;

use super::prediction::{Heads, Prediction, heads};
use super::schedule::{Schedule, working_kind};
use super::solver::ddim;

/// `g(z, t, s) = DDIM(z; x0, eps; t -> s)` for the network's output `n` (arXiv 2406.05768v6, before eq. 8).
pub fn landing(
    schedule: &Schedule,
    prediction: Prediction,
    z: &Tensor,
    n: &Tensor,
    t: &Tensor,
    s: &Tensor,
) -> Tensor {
    ddim(schedule, &heads(schedule, prediction, z, n, t), s)
}

/// `f(z, t)`: the x0 head, with the hard boundary f(z, 0) = z.
pub fn clean(
    schedule: &Schedule,
    prediction: Prediction,
    z: &Tensor,
    n: &Tensor,
    t: &Tensor,
) -> Tensor {
    let Heads { x0, .. } = heads(schedule, prediction, z, n, t);
    let mut shape = vec![1; z.dim()];
    shape[0] = -1;
    let at_end = t.eq(0).view(&shape[..]);
    z.to_kind(working_kind(z)).where_self(&at_end, &x0)
}

/// (c_skip, c_out) of diffusers' LCMScheduler with `timestep_scaling` 10:
/// `0.25 / ((10 t)² + 0.25)` and `10 t / sqrt((10 t)² + 0.25)` (arXiv 2310.04378, eq. 9).
pub fn lcm_scales(t: i64) -> (f64, f64) {
    let scaled = 10.0 * t as f64;
    let variance = scaled * scaled + 0.25;
    (0.25 / variance, scaled / variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test 1.
    #[test]
    fn a_state_on_its_milestone_lands_on_itself() {
        let schedule = Schedule::stable_diffusion();
        let t = Tensor::from_slice(&[1i64, 124, 499, 874, 999]);
        let z = Tensor::from_slice(&[1.3f32, -0.4, 2.1, 0.3, -1.7]).view([5, 1, 1, 1]);
        let n = Tensor::from_slice(&[0.2f32, 0.9, -1.4, 0.5, 0.1]).view([5, 1, 1, 1]);
        let g = landing(&schedule, Prediction::Epsilon, &z, &n, &t, &t);
        assert!((g - &z).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn the_clean_end_of_a_state_at_time_zero_is_the_state() {
        let schedule = Schedule::stable_diffusion();
        let t = Tensor::from_slice(&[0i64, 124]);
        let z = Tensor::from_slice(&[1.3f32, -0.4]).view([2, 1, 1, 1]);
        let n = Tensor::from_slice(&[0.2f32, 0.9]).view([2, 1, 1, 1]);
        let f = clean(&schedule, Prediction::Epsilon, &z, &n, &t);
        assert_eq!(f.double_value(&[0, 0, 0, 0]), f64::from(1.3f32));
        let x0 = (-0.4 - schedule.sigma(124) * 0.9) / schedule.alpha(124);
        assert!((f.double_value(&[1, 0, 0, 0]) - x0).abs() < 1e-6);
    }

    #[test]
    fn lcm_scales_are_the_identity_at_zero_and_the_x0_head_elsewhere() {
        assert_eq!(lcm_scales(0), (1.0, 0.0));
        let (skip, out) = lcm_scales(124);
        assert!((skip - 1.6e-7).abs() < 1e-8);
        assert!((1.0 - out - 8e-8).abs() < 1e-8);
    }
}
