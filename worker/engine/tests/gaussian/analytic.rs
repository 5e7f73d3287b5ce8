//! Denoisers with closed forms: data x0 ~ N(mu, s²), where everything is affine in z, and mixtures of two.

use distillery_engine::diffusion::boundary::landing;
use distillery_engine::diffusion::denoiser::{Conditioning, Denoiser};
use distillery_engine::diffusion::prediction::Prediction;
use distillery_engine::diffusion::sampler::{Reading, deterministic};
use distillery_engine::diffusion::schedule::{LAST_TIME, Schedule, times};
use distillery_engine::diffusion::segments::{Segments, sub_steps};
use distillery_engine::diffusion::solver::inverse_ddim;
use tch::{Device, Kind, Tensor};

/// Mean of the data.
pub(crate) const MU: f64 = 0.7;
/// Standard deviation of the data.
pub(crate) const S: f64 = 0.5;
/// The state that closed-form values are given for.
pub(crate) const Z: f64 = 1.3;

/// `value` as a batch of one, `[1, 1, 1, 1]`.
pub(crate) fn scalar(value: f64) -> Tensor {
    Tensor::from_slice(&[value]).view([1, 1, 1, 1])
}

/// Values as a batch `[B, 1, 1, 1]`.
pub(crate) fn batch(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).view([-1, 1, 1, 1])
}

/// The first value of a batch.
pub(crate) fn value(x: &Tensor) -> f64 {
    x.double_value(&[0, 0, 0, 0])
}

/// A condition that these denoisers read as the number `c`.
pub(crate) fn condition(c: f64, rows: i64) -> Conditioning {
    Conditioning {
        context: Tensor::full([rows, 1, 1], c, (Kind::Double, Device::Cpu)),
        pooled: None,
        time_ids: None,
    }
}

/// A condition for denoisers that read none.
pub(crate) fn unconditional(rows: i64) -> Conditioning {
    condition(MU, rows)
}

/// The exact denoiser of N(c, s²) where c is the condition: `eps* = sigma (z - alpha c) / v`.
pub(crate) struct Gaussian {
    pub(crate) schedule: Schedule,
    pub(crate) s: f64,
}

impl Gaussian {
    pub(crate) fn new() -> Self {
        Self {
            schedule: Schedule::stable_diffusion(),
            s: S,
        }
    }

    pub(crate) fn reading(&self) -> Reading<'_> {
        Reading {
            schedule: &self.schedule,
            prediction: Prediction::Epsilon,
        }
    }

    /// v_t = alpha² s² + sigma².
    pub(crate) fn variance(&self, t: i64) -> f64 {
        self.schedule.alpha_bar(t) * self.s * self.s + self.schedule.sigma(t).powi(2)
    }

    /// The probability-flow ODE's exact solution from (z, t) to u.
    pub(crate) fn flow(&self, z: f64, t: i64, u: i64) -> f64 {
        let centred = z - self.schedule.alpha(t) * MU;
        self.schedule.alpha(u) * MU + (self.variance(u) / self.variance(t)).sqrt() * centred
    }

    /// The teacher's DDIM through `times_down`.
    pub(crate) fn ddim(&self, z: &Tensor, times_down: &[i64]) -> Tensor {
        deterministic(self.reading(), times_down, z, &mut |z, t| {
            self.predict(z, t, &unconditional(z.size()[0]))
        })
    }
}

impl Denoiser for Gaussian {
    fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor {
        let (alpha, sigma) = (self.schedule.alpha_at(t, z), self.schedule.sigma_at(t, z));
        let mu = conditioning.context.to_kind(z.kind()).view([-1, 1, 1, 1]);
        let v = alpha.square() * (self.s * self.s) + sigma.square();
        sigma * (z - alpha * mu) / v
    }
}

/// The times of a teacher chain from `t` to its segment's milestone in steps of `skip`.
pub(crate) fn chain(segments: &Segments, t: i64, skip: u32) -> Vec<i64> {
    let target = segments.target(t);
    let next = |&t: &i64| (t > target).then(|| (t - i64::from(skip)).max(target));
    std::iter::successors(Some(t), next).collect()
}

/// Where a perfect student leads.
#[derive(Clone)]
pub(crate) enum Goal {
    /// The teacher's own x0 head.
    Raw,
    /// To the segment's milestone as the teacher's chain with steps of `skip`.
    Landing { segments: Segments, skip: u32 },
    /// From a milestone of eight to the clean end in `p` teacher steps for each segment.
    Milestones { p: usize },
    /// To the exact end of the flow.
    Exact,
}

/// A student that has learned its goal perfectly, as an epsilon predictor.
pub(crate) struct Perfect {
    pub(crate) teacher: Gaussian,
    pub(crate) goal: Goal,
}

impl Perfect {
    pub(crate) fn new(goal: Goal) -> Self {
        Self {
            teacher: Gaussian::new(),
            goal,
        }
    }

    /// The epsilon with which the x0 head is `x0`.
    fn epsilon(&self, z: &Tensor, x0: &Tensor, t: &Tensor) -> Tensor {
        let schedule = &self.teacher.schedule;
        (z - schedule.alpha_at(t, z) * x0) / schedule.sigma_at(t, z)
    }

    /// The teacher's chain row by row, each to its own target.
    fn landed(&self, z: &Tensor, t: &Tensor, targets: &Tensor, skip: u32) -> Tensor {
        let schedule = &self.teacher.schedule;
        let (mut z, mut t) = (z.shallow_clone(), t.shallow_clone());
        while bool::try_from(t.gt_tensor(targets).any()).unwrap() {
            let u = (&t - i64::from(skip)).maximum(targets);
            let n = self.teacher.predict(&z, &t, &unconditional(z.size()[0]));
            z = landing(schedule, Prediction::Epsilon, &z, &n, &t, &u);
            t = u;
        }
        z
    }

    /// The clean end from the time of all rows, through every milestone below.
    fn through_milestones(&self, z: &Tensor, t: i64, p: usize) -> Tensor {
        let milestones = Segments::new(8).unwrap().milestones().to_vec();
        let k = milestones.binary_search(&t).unwrap();
        (1..=k).rev().fold(z.shallow_clone(), |z, k| {
            let times = sub_steps(milestones[k], milestones[k - 1], p);
            self.teacher.ddim(&z, &times)
        })
    }
}

impl Denoiser for Perfect {
    fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor {
        let schedule = &self.teacher.schedule;
        match &self.goal {
            Goal::Raw => self.teacher.predict(z, t, conditioning),
            Goal::Landing { segments, skip } => {
                let targets = segments.targets(t);
                let landed = self.landed(z, t, &targets, *skip);
                self.epsilon(z, &inverse_ddim(schedule, &landed, z, t, &targets), t)
            }
            Goal::Milestones { p } => {
                let x0 = self.through_milestones(z, t.int64_value(&[0]), *p);
                self.epsilon(z, &x0, t)
            }
            Goal::Exact => {
                let time = t.int64_value(&[0]);
                let scale = S / self.teacher.variance(time).sqrt();
                let x0 = MU + scale * (z - schedule.alpha(time) * MU);
                self.epsilon(z, &x0, t)
            }
        }
    }
}

/// A denoiser of two kinds of data, N(±1, s²): condition ±1 names the kind, 0 leaves it open.
pub(crate) struct Mixture {
    pub(crate) schedule: Schedule,
    pub(crate) s: f64,
}

impl Denoiser for Mixture {
    fn predict(&self, z: &Tensor, t: &Tensor, conditioning: &Conditioning) -> Tensor {
        let (alpha, sigma) = (self.schedule.alpha_at(t, z), self.schedule.sigma_at(t, z));
        let c = conditioning.context.to_kind(z.kind()).view([-1, 1, 1, 1]);
        let v = alpha.square() * (self.s * self.s) + sigma.square();
        // Of the mixture: E[mu | z] = tanh(alpha z / v); of one kind: its own mean.
        let open = (&alpha * z / &v).tanh();
        let mean = open.where_self(&c.eq(0.0), &c);
        sigma * (z - alpha * mean) / v
    }
}

/// Times `t` for a batch like `z`.
pub(crate) fn at(t: i64, z: &Tensor) -> Tensor {
    assert!((0..=LAST_TIME).contains(&t));
    times(t, z.size()[0], z.device())
}
