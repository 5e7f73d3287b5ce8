//! `scheduler/scheduler_config.json`: the noise schedule a teacher was trained on, whatever class wrote it.

use super::{Error, keys::Keys};

/// Number of training times that trajectories, segments and bins of time are laid out for.
const TRAIN_TIMESTEPS: i64 = 1000;

/// Shape of beta over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BetaSchedule {
    /// Equal steps of beta.
    Linear,
    /// Equal steps of the square root of beta.
    ScaledLinear,
    /// Squared cosine of Nichol and Dhariwal (arXiv 2102.09672, eq. 17), beta at most 0.999.
    SquaredCosine,
}

/// What the network predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity `alpha * noise - sigma * data`.
    Velocity,
    /// The data.
    Sample,
}

/// How a sampler spreads its steps over the training times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spacing {
    /// Multiples of a whole step from zero, plus `steps_offset`.
    Leading,
    /// Multiples of a fraction down from the end.
    Trailing,
    /// Equal parts of the closed range.
    Linspace,
}

/// A checked scheduler configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleConfig {
    /// The class that wrote it.
    pub class: String,
    /// Number of training times.
    pub train_timesteps: i64,
    /// First beta.
    pub beta_start: f64,
    /// Last beta.
    pub beta_end: f64,
    /// Shape between them.
    pub beta_schedule: BetaSchedule,
    /// The betas themselves, instead of the three above.
    pub trained_betas: Option<Vec<f64>>,
    /// Whether betas are rescaled so that the last state is pure noise (arXiv 2305.08891, algorithm 1).
    pub zero_snr: bool,
    /// What the network predicts.
    pub prediction: Prediction,
    /// How its own sampler spreads its steps.
    pub spacing: Spacing,
    /// Added to each time of a leading spacing.
    pub steps_offset: i64,
    /// Whether the step after the last time lands on pure data rather than on time 0.
    pub set_alpha_to_one: bool,
    /// `original_inference_steps` of an LCMScheduler.
    pub original_inference_steps: i64,
    /// `timestep_scaling` of an LCMScheduler.
    pub timestep_scaling: f64,
}

impl ScheduleConfig {
    pub(super) fn read(keys: &Keys, warnings: &mut Vec<String>) -> Result<Self, Error> {
        let class = keys
            .text("_class_name")?
            .unwrap_or("DDIMScheduler")
            .to_owned();
        if class.contains("Flow") {
            return Err(keys.wrong(
                "_class_name",
                format!(
                    "is {class:?}; flow matching is not supported, the schedule must have betas"
                ),
            ));
        }
        for key in ["clip_sample", "thresholding"] {
            if keys.flag(key, false)? {
                warnings.push(format!(
                    "{}: {key} is ignored: latents are never clipped",
                    keys.path.display()
                ));
            }
        }
        let config = Self {
            class,
            train_timesteps: keys.dimension("num_train_timesteps", 1000)?,
            beta_start: keys.number("beta_start", 0.0001)?,
            beta_end: keys.number("beta_end", 0.02)?,
            beta_schedule: beta_schedule(keys)?,
            trained_betas: keys.numbers("trained_betas")?,
            zero_snr: keys.flag("rescale_betas_zero_snr", false)?,
            prediction: prediction(keys)?,
            spacing: spacing(keys)?,
            steps_offset: keys.integer("steps_offset", 0)?,
            set_alpha_to_one: keys.flag("set_alpha_to_one", true)?,
            original_inference_steps: keys.dimension("original_inference_steps", 50)?,
            timestep_scaling: keys.number("timestep_scaling", 10.0)?,
        };
        config.check(keys)?;
        Ok(config)
    }

    fn check(&self, keys: &Keys) -> Result<(), Error> {
        if self.train_timesteps != TRAIN_TIMESTEPS {
            let problem = format!(
                "is {}; only schedules of {TRAIN_TIMESTEPS} training times are supported: choose a teacher that \
                 was trained with them",
                self.train_timesteps
            );
            return Err(keys.wrong("num_train_timesteps", problem));
        }
        if self.zero_snr && self.prediction == Prediction::Epsilon {
            let problem = "is true, but at the last time, where nothing of the data is left, a network with \
                           prediction_type epsilon says nothing about it; such teachers have v_prediction or sample";
            return Err(keys.wrong("rescale_betas_zero_snr", problem));
        }
        let inside = |beta: f64| beta > 0.0 && beta < 1.0;
        if let Some(betas) = &self.trained_betas {
            if betas.len() as i64 != self.train_timesteps {
                let problem = format!(
                    "has {} entries for {} timesteps",
                    betas.len(),
                    self.train_timesteps
                );
                return Err(keys.wrong("trained_betas", problem));
            }
            if betas.iter().any(|beta| !inside(*beta)) {
                return Err(keys.wrong("trained_betas", "must lie between 0 and 1"));
            }
        }
        if !inside(self.beta_start) {
            return Err(keys.wrong(
                "beta_start",
                format!("is {}; it must lie between 0 and 1", self.beta_start),
            ));
        }
        if !inside(self.beta_end) || self.beta_end < self.beta_start {
            return Err(keys.wrong(
                "beta_end",
                format!("is {}; it must lie between beta_start and 1", self.beta_end),
            ));
        }
        Ok(())
    }
}

fn beta_schedule(keys: &Keys) -> Result<BetaSchedule, Error> {
    match keys.text("beta_schedule")? {
        None | Some("linear") => Ok(BetaSchedule::Linear),
        Some("scaled_linear") => Ok(BetaSchedule::ScaledLinear),
        Some("squaredcos_cap_v2") => Ok(BetaSchedule::SquaredCosine),
        Some(other) => Err(keys.wrong(
            "beta_schedule",
            format!("is {other:?}; supported: linear, scaled_linear, squaredcos_cap_v2"),
        )),
    }
}

fn prediction(keys: &Keys) -> Result<Prediction, Error> {
    match keys.text("prediction_type")? {
        None | Some("epsilon") => Ok(Prediction::Epsilon),
        Some("v_prediction") => Ok(Prediction::Velocity),
        Some("sample") => Ok(Prediction::Sample),
        Some(other) => Err(keys.wrong(
            "prediction_type",
            format!("is {other:?}; supported: epsilon, v_prediction, sample"),
        )),
    }
}

fn spacing(keys: &Keys) -> Result<Spacing, Error> {
    match keys.text("timestep_spacing")? {
        None | Some("leading") => Ok(Spacing::Leading),
        Some("trailing") => Ok(Spacing::Trailing),
        Some("linspace") => Ok(Spacing::Linspace),
        Some(other) => Err(keys.wrong(
            "timestep_spacing",
            format!("is {other:?}; supported: leading, trailing, linspace"),
        )),
    }
}
