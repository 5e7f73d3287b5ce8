//! Draws samples from a denoiser, by any sampler, from noise that is a pure function of (seed, sample, step).

use std::collections::BTreeMap;

use distillery_common::prompts::Prompt;
use distillery_common::recipe::Sampler;
use distillery_common::seed::Purpose;
use distillery_common::task::FailureClass;
use tch::{Device, Tensor};

use super::trajectories::noise;
use super::{Fault, OrFault as _};
use crate::diffusion::denoiser::{Conditioning, Denoiser};
use crate::diffusion::guidance::Guided;
use crate::diffusion::prediction::Prediction;
use crate::diffusion::sampler::{
    Output, Reading, ddim_times, deterministic, lcm_times, segments_times, stochastic, tlcm9_times,
};
use crate::diffusion::schedule::Schedule;
use crate::evaluation::picture::Picture;
use crate::models::Teacher;
use crate::workbench::TeacherModel;

/// `original_inference_steps` of an LCMScheduler where the recipe names no time grid.
pub const LCM_ORIGINAL_STEPS: u32 = 50;
/// Text states kept in memory. Beyond it all are dropped and encoded again when they are next needed.
const MAX_TEXTS: usize = 1024;
/// Pixels that are decoded at a time: 16 pictures of 256 x 256, one of 1024 x 1024.
const MAX_PIXELS: i64 = 1 << 20;

/// A sampler and its number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// How.
    pub sampler: Sampler,
    /// Evaluations.
    pub steps: u32,
}

/// The name of a sampler in results.
pub fn name_of(sampler: Sampler) -> &'static str {
    match sampler {
        Sampler::Ddim => "ddim",
        Sampler::Tlcm9 => "tlcm9",
        Sampler::Lcm => "lcm",
        Sampler::Segments => "segments",
    }
}

/// The sampler with this name.
pub fn parse(name: &str) -> Option<Sampler> {
    [
        Sampler::Ddim,
        Sampler::Tlcm9,
        Sampler::Lcm,
        Sampler::Segments,
    ]
    .into_iter()
    .find(|&sampler| name_of(sampler) == name)
}

/// The times that `way` visits, from the noisiest down; deterministic ways end at 0.
pub fn times_of(way: Way, lcm_original_steps: u32) -> Result<Vec<i64>, Fault> {
    let Way { sampler, steps } = way;
    match sampler {
        Sampler::Ddim => ddim_times(steps).or_fault(FailureClass::Config),
        Sampler::Tlcm9 => tlcm9_times(steps).or_fault(FailureClass::Config),
        Sampler::Lcm => lcm_times(steps, lcm_original_steps).or_fault(FailureClass::Config),
        Sampler::Segments => segments_times(steps).or_fault(FailureClass::Config),
    }
}

/// A denoiser as samplers see it.
pub struct Drawer<'a> {
    /// Who predicts.
    pub denoiser: &'a dyn Denoiser,
    /// Of its training.
    pub schedule: &'a Schedule,
    /// What it predicts.
    pub prediction: Prediction,
    /// Guidance scale w; 1 for none.
    pub guidance: f64,
    /// The condition that says nothing, for one row.
    pub null: &'a Conditioning,
    /// `original_inference_steps` of the sampler [`Sampler::Lcm`].
    pub lcm_original_steps: u32,
}

/// Noise for one block of samples.
#[derive(Debug, Clone, Copy)]
pub struct Noise<'a> {
    /// Of the whole.
    pub seed: u64,
    /// What the first state is drawn for.
    pub purpose: Purpose,
    /// The samples.
    pub ordinals: &'a [u64],
    /// `[C, H, W]` of a latent.
    pub shape: [i64; 3],
    /// Where it is needed.
    pub device: Device,
}

impl Noise<'_> {
    /// z_T, `[B, C, H, W]`.
    fn first(&self) -> Tensor {
        noise(
            &self.shape,
            self.purpose,
            self.seed,
            self.ordinals,
            0,
            self.device,
        )
    }

    /// What a stochastic sampler adds after its step `j`, `[B, C, H, W]`.
    fn again(&self, j: usize) -> Tensor {
        let draw = u16::try_from(j).expect("samplers have at most 999 steps");
        noise(
            &self.shape,
            Purpose::Renoise,
            self.seed,
            self.ordinals,
            draw,
            self.device,
        )
    }
}

impl Drawer<'_> {
    /// Final latents `[B, C, H, W]` of a block, in f32.
    pub fn draw(
        &self,
        way: Way,
        noise: Noise<'_>,
        conditioning: &Conditioning,
    ) -> Result<Tensor, Fault> {
        let times = times_of(way, self.lcm_original_steps)?;
        let guided = Guided {
            denoiser: self.denoiser,
            null: self.null,
            scale: self.guidance,
        };
        let reading = Reading {
            schedule: self.schedule,
            prediction: self.prediction,
        };
        let z = noise.first();
        let mut predict = |z: &Tensor, t: &Tensor| guided.predict(z, t, conditioning);
        let mut again = |j: usize| noise.again(j);
        Ok(tch::no_grad(|| match way.sampler {
            Sampler::Ddim | Sampler::Segments => deterministic(reading, &times, &z, &mut predict),
            Sampler::Tlcm9 => stochastic(reading, Output::X0, &times, &z, &mut predict, &mut again),
            Sampler::Lcm => stochastic(reading, Output::Lcm, &times, &z, &mut predict, &mut again),
        }))
    }
}

/// Text states, each text encoded alone, so that its neighbours change no bit of it.
#[derive(Debug, Default)]
pub struct Texts {
    known: BTreeMap<String, Conditioning>,
}

impl Texts {
    /// What the denoiser is told of `texts`, one row each.
    pub fn encode(&mut self, teacher: &Teacher, texts: &[&str]) -> Conditioning {
        if self.known.len() + texts.len() > MAX_TEXTS {
            self.known.clear();
        }
        for &text in texts {
            if !self.known.contains_key(text) {
                self.known
                    .insert(text.to_owned(), teacher.encode_prompts(&[text]));
            }
        }
        let rows: Vec<&Conditioning> = texts.iter().map(|&text| &self.known[text]).collect();
        Conditioning::stack(&rows)
    }
}

/// The text of evaluation sample `ordinal`: the held-out prompts in turn.
pub fn text_of(holdout: &[Prompt], ordinal: u64) -> &str {
    holdout[(ordinal % holdout.len() as u64) as usize].text()
}

/// The pictures of final latents, a bounded number decoded at a time.
pub fn pictures(teacher: &TeacherModel, latents: &Tensor) -> Vec<Picture> {
    let side = teacher.parts.image_side();
    let at_a_time = (MAX_PIXELS / (side * side).max(1)).max(1);
    let blocks = latents.split(at_a_time, 0);
    tch::no_grad(|| {
        let decoded = blocks.iter().map(|block| teacher.parts.vae.decode(block));
        decoded
            .flat_map(|images| Picture::from_decoded(&images))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::schedule::TRAIN_TIMES;

    /// A denoiser that knows its data: a single point c, so every sampler ends exactly there.
    struct Point(f64);

    impl Denoiser for Point {
        fn predict(&self, z: &Tensor, t: &Tensor, _: &Conditioning) -> Tensor {
            let schedule = Schedule::stable_diffusion();
            (z - schedule.alpha_at(t, z) * self.0) / schedule.sigma_at(t, z)
        }
    }

    fn nothing() -> Conditioning {
        let context = Tensor::zeros([1, 1, 1], (tch::Kind::Float, Device::Cpu));
        Conditioning {
            context,
            pooled: None,
            time_ids: None,
        }
    }

    fn draw(way: Way, ordinals: &[u64], seed: u64) -> Tensor {
        let schedule = Schedule::stable_diffusion();
        let null = nothing();
        let drawer = Drawer {
            denoiser: &Point(0.75),
            schedule: &schedule,
            prediction: Prediction::Epsilon,
            guidance: 1.0,
            null: &null,
            lcm_original_steps: 40,
        };
        let noise = Noise {
            seed,
            purpose: Purpose::EvaluationNoise,
            ordinals,
            shape: [1, 2, 2],
            device: Device::Cpu,
        };
        drawer
            .draw(way, noise, &null.expand(ordinals.len() as i64))
            .expect("a known way")
    }

    #[test]
    fn stochastic_samplers_end_on_the_only_datum() {
        for sampler in [Sampler::Tlcm9, Sampler::Lcm] {
            for steps in [1, 2, 4, 8] {
                let end = draw(Way { sampler, steps }, &[0, 1], 3);
                let off = (end - 0.75).abs().max().double_value(&[]);
                assert!(off < 1e-4, "{sampler:?} with {steps} steps is off by {off}");
            }
        }
    }

    /// Deterministic ways keep the first noise: `z_0 = alpha_0 c + sigma_0 eps`, eps read off z_T.
    #[test]
    fn deterministic_samplers_keep_the_first_noise() {
        let schedule = Schedule::stable_diffusion();
        let first = noise(
            &[1, 2, 2],
            Purpose::EvaluationNoise,
            3,
            &[5],
            0,
            Device::Cpu,
        );
        let eps =
            (first - schedule.alpha(TRAIN_TIMES - 1) * 0.75) / schedule.sigma(TRAIN_TIMES - 1);
        let expected = eps * schedule.sigma(0) + schedule.alpha(0) * 0.75;
        for sampler in [Sampler::Ddim, Sampler::Segments] {
            let end = draw(Way { sampler, steps: 4 }, &[5], 3);
            let off = (end - &expected).abs().max().double_value(&[]);
            assert!(off < 1e-4, "{sampler:?} is off by {off}");
        }
    }

    #[test]
    fn a_sample_does_not_depend_on_its_neighbours() {
        let way = Way {
            sampler: Sampler::Tlcm9,
            steps: 4,
        };
        let (alone, among) = (draw(way, &[7], 1), draw(way, &[6, 7, 8], 1));
        assert!(alone.equal(&among.narrow(0, 1, 1)));
    }

    #[test]
    fn unknown_step_counts_are_faults_with_words() {
        let fault = times_of(
            Way {
                sampler: Sampler::Tlcm9,
                steps: 9,
            },
            40,
        )
        .expect_err("no list");
        assert!(fault.to_string().contains("1 to 8"), "{fault}");
        assert_eq!(
            times_of(
                Way {
                    sampler: Sampler::Lcm,
                    steps: 4
                },
                40
            )
            .ok(),
            Some(vec![999, 749, 499, 249])
        );
    }
}
