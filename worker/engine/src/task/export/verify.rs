//! Whether two denoisers compute the same.

use distillery_common::seed::Purpose;
use distillery_common::task::FailureClass;
use tch::{Device, Kind, Tensor};

use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::models::Teacher;
use crate::task::Fault;
use crate::task::trajectories::noise;

/// The texts that are tried; the second one is what guidance subtracts.
const TEXTS: [&str; 2] = ["two red discs left of a blue ring, striped background", ""];
/// The times that are tried.
const TIMES: [i64; 2] = [999, 374];

/// A small question to a denoiser.
#[derive(Debug)]
pub(super) struct Probe {
    z: Tensor,
    t: Tensor,
    conditioning: Conditioning,
}

impl Probe {
    /// The question, in the words of `teacher`.
    pub(super) fn new(teacher: &Teacher, seed: u64, device: Device) -> Self {
        Self {
            z: noise(
                &teacher.latent_shape(),
                Purpose::EvaluationNoise,
                seed,
                &[0, 1],
                0,
                device,
            ),
            t: Tensor::from_slice(&TIMES).to_device(device),
            conditioning: teacher.encode_prompts(&TEXTS),
        }
    }

    /// The same question in the words of another teacher.
    pub(super) fn reworded(&self, teacher: &Teacher) -> Self {
        Self {
            z: self.z.shallow_clone(),
            t: self.t.shallow_clone(),
            conditioning: teacher.encode_prompts(&TEXTS),
        }
    }

    /// The answer, `[2, C, H, W]` in f32 on the CPU.
    pub(super) fn predict(&self, denoiser: &dyn Denoiser) -> Tensor {
        let answer = tch::no_grad(|| denoiser.predict(&self.z, &self.t, &self.conditioning));
        answer.to_kind(Kind::Float).to_device(Device::Cpu)
    }
}

/// The largest difference relative to the largest value; a fault beyond `most`.
pub(super) fn check_close(
    name: &str,
    found: &Tensor,
    expected: &Tensor,
    most: f64,
) -> Result<f64, Fault> {
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    let difference = largest(&(found - expected)) / largest(expected).max(f64::MIN_POSITIVE);
    // Written so that a NaN is refused too.
    if difference <= most {
        return Ok(difference);
    }
    Err(Fault::new(
        FailureClass::Unknown,
        format!(
            "the export {name}, read back, predicts otherwise than the student: largest difference \
             {difference:.1e} of the largest value, at most {most:.0e} is rounding; it is not to be used"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_numbers_and_no_numbers_are_refused() {
        let of = |values: &[f32]| Tensor::from_slice(values);
        let near = check_close("x", &of(&[1.0, -2.00001]), &of(&[1.0, -2.0]), 1e-4).expect("close");
        assert!((near - 5e-6).abs() < 1e-7, "{near}");
        let far = check_close("seg2", &of(&[1.0, -2.1]), &of(&[1.0, -2.0]), 1e-4).expect_err("far");
        assert!(far.to_string().contains("seg2"), "{far}");
        assert!(check_close("x", &of(&[f32::NAN]), &of(&[1.0]), 1e-4).is_err());
    }
}
