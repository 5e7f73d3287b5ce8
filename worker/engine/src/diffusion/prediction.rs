//! What networks predict, and the two readings every formula uses: x0 and eps.

use std::fmt;

use tch::Tensor;

use super::schedule::{LAST_TIME, Schedule, working_kind};

/// What a network predicts for `z = alpha x0 + sigma eps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// eps.
    Epsilon,
    /// `alpha eps - sigma x0` (arXiv 2202.00512).
    V,
    /// x0.
    Sample,
    /// `eps - x0`, with `alpha = 1 - sigma` (flow matching).
    Flow,
}

/// Why a prediction cannot be read under a schedule.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// x0 would be divided by alpha = 0.
    NoSignal,
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSignal => write!(
                f,
                "a network that predicts epsilon says nothing about x0 at time {LAST_TIME}, where the zero-terminal-SNR schedule has no signal; such teachers predict v or sample"
            ),
        }
    }
}

impl Prediction {
    /// Its name in configurations and checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::V => "v_prediction",
            Self::Sample => "sample",
            Self::Flow => "flow",
        }
    }

    /// Checks that x0 and eps can be read at every time of `schedule`.
    pub fn check(self, schedule: &Schedule) -> Result<(), Error> {
        match self {
            Self::Epsilon if schedule.alpha(LAST_TIME) == 0.0 => Err(Error::NoSignal),
            Self::Epsilon | Self::V | Self::Sample | Self::Flow => Ok(()),
        }
    }
}

/// A prediction, read as data and as noise: `z = alpha x0 + sigma eps`. Both have the shape of z.
#[derive(Debug)]
pub struct Heads {
    /// The clean latent.
    pub x0: Tensor,
    /// The noise.
    pub eps: Tensor,
}

/// Reads the network's output `n` for `z` `[B, …]` at times `t` `[B]`, in f32 (f64 when z is).
///
/// | prediction | x0 | eps |
/// |---|---|---|
/// | epsilon | (z - sigma n) / alpha | n |
/// | v | alpha z - sigma n | alpha n + sigma z |
/// | sample | n | (z - alpha n) / sigma |
/// | flow | z - sigma n | z + (1 - sigma) n |
pub fn heads(
    schedule: &Schedule,
    prediction: Prediction,
    z: &Tensor,
    n: &Tensor,
    t: &Tensor,
) -> Heads {
    assert_eq!(
        z.size(),
        n.size(),
        "a prediction has the shape of its state"
    );
    let kind = working_kind(z);
    let (z, n) = (z.to_kind(kind), n.to_kind(kind));
    let (alpha, sigma) = (schedule.alpha_at(t, &z), schedule.sigma_at(t, &z));
    match prediction {
        Prediction::Epsilon => Heads {
            x0: (&z - &sigma * &n) / &alpha,
            eps: n,
        },
        Prediction::V => Heads {
            x0: &alpha * &z - &sigma * &n,
            eps: &alpha * &n + &sigma * &z,
        },
        Prediction::Sample => Heads {
            eps: (&z - &alpha * &n) / &sigma,
            x0: n,
        },
        Prediction::Flow => Heads {
            x0: &z - &sigma * &n,
            eps: &z + &alpha * &n,
        },
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::diffusion::schedule::Betas;

    /// What a network of this kind would say, where data `x0` and noise `eps` are known; the inverse of [`heads`].
    fn of_heads(schedule: &Schedule, prediction: Prediction, heads: &Heads, t: &Tensor) -> Tensor {
        let Heads { x0, eps } = heads;
        match prediction {
            Prediction::Epsilon => eps.shallow_clone(),
            Prediction::V => schedule.alpha_at(t, eps) * eps - schedule.sigma_at(t, x0) * x0,
            Prediction::Sample => x0.shallow_clone(),
            Prediction::Flow => eps - x0,
        }
    }

    /// Test 5: the four kinds agree after conversion, in f32.
    #[test]
    fn every_prediction_reads_back_the_same_data_and_noise() {
        let x0 = Tensor::from_slice(&[0.3f32, -1.2, 0.9, 2.0]).view([4, 1, 1, 1]);
        let eps = Tensor::from_slice(&[-0.7f32, 0.4, 1.1, -0.2]).view([4, 1, 1, 1]);
        let t = Tensor::from_slice(&[1i64, 124, 499, 749]);
        for prediction in [
            Prediction::Epsilon,
            Prediction::V,
            Prediction::Sample,
            Prediction::Flow,
        ] {
            let schedule = match prediction {
                Prediction::Flow => Schedule::flow(1.0).unwrap(),
                _ => Schedule::stable_diffusion(),
            };
            let z = schedule.alpha_at(&t, &x0) * &x0 + schedule.sigma_at(&t, &x0) * &eps;
            let known = Heads {
                x0: x0.shallow_clone(),
                eps: eps.shallow_clone(),
            };
            let n = of_heads(&schedule, prediction, &known, &t);
            let read = heads(&schedule, prediction, &z, &n, &t);
            let worst = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
            // One division by alpha_749 = 0.24 or sigma_1 = 0.04 widens f32's rounding.
            assert!(worst(&read.x0, &x0) < 3e-6, "{prediction:?}");
            assert!(worst(&read.eps, &eps) < 3e-6, "{prediction:?}");
        }
    }

    #[test]
    fn half_precision_states_are_read_in_single() {
        let z = Tensor::ones([2, 1, 1, 1], (Kind::Half, Device::Cpu));
        let t = Tensor::from_slice(&[10i64, 999]);
        let read = heads(
            &Schedule::stable_diffusion(),
            Prediction::Epsilon,
            &z,
            &z,
            &t,
        );
        assert_eq!(read.x0.kind(), Kind::Float);
        assert_eq!(read.eps.kind(), Kind::Float);
    }

    #[test]
    fn an_epsilon_teacher_without_terminal_signal_is_refused() {
        let zero_snr = Schedule::new(&Betas::STABLE_DIFFUSION, true).unwrap();
        assert_eq!(Prediction::Epsilon.check(&zero_snr), Err(Error::NoSignal));
        assert_eq!(Prediction::V.check(&zero_snr), Ok(()));
    }
}
