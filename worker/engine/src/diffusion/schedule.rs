//! Noise schedules: alpha and sigma of every training time, made in f64.

use std::f64::consts::FRAC_PI_2;
use std::fmt;

use tch::{Device, Kind, Tensor};

/// Number of training times; times are `0..TRAIN_TIMES`.
pub const TRAIN_TIMES: i64 = 1000;

/// The noisiest time.
pub const LAST_TIME: i64 = TRAIN_TIMES - 1;

/// Why a schedule cannot be made.
#[derive(Debug, PartialEq)]
pub enum Error {
    /// A table of another length.
    Length(usize),
    /// A beta that is no variance.
    Beta {
        /// Where.
        t: usize,
        /// What.
        beta: f64,
    },
    /// A shift that folds time.
    Shift(f64),
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(value) => write!(
                f,
                "a noise schedule has {TRAIN_TIMES} times, this one has {value}"
            ),
            Self::Beta { t, beta } => write!(f, "beta {beta} at time {t} is outside 0..1"),
            Self::Shift(value) => write!(f, "flow shift {value} is not a positive number"),
        }
    }
}

/// How the variances beta_t grow (the names are diffusers' `beta_schedule`).
#[derive(Debug, Clone, PartialEq)]
pub enum Betas {
    /// `scaled_linear`: linear in the square root, from `start` to `end`.
    ScaledLinear {
        /// beta_0.
        start: f64,
        /// beta_999.
        end: f64,
    },
    /// `linear`, from `start` to `end`.
    Linear {
        /// beta_0.
        start: f64,
        /// beta_999.
        end: f64,
    },
    /// `squaredcos_cap_v2`: the cosine schedule of Nichol and Dhariwal (arXiv 2102.09672), capped at 0.999.
    SquaredCosine,
    /// `trained_betas`.
    Trained(Vec<f64>),
}

impl Betas {
    /// Stable Diffusion's and SDXL's.
    pub const STABLE_DIFFUSION: Self = Self::ScaledLinear {
        start: 0.00085,
        end: 0.012,
    };

    /// beta_t for every time.
    fn table(&self) -> Vec<f64> {
        let n = TRAIN_TIMES as usize;
        let between =
            |a: f64, b: f64| move |i: usize| a + (b - a) * i as f64 / (TRAIN_TIMES - 1) as f64;
        match self {
            Self::ScaledLinear { start, end } => (0..n)
                .map(between(start.sqrt(), end.sqrt()))
                .map(|root| root * root)
                .collect(),
            Self::Linear { start, end } => (0..n).map(between(*start, *end)).collect(),
            Self::SquaredCosine => {
                let alpha_bar = |i: usize| {
                    ((i as f64 / n as f64 + 0.008) / 1.008 * FRAC_PI_2)
                        .cos()
                        .powi(2)
                };
                (0..n)
                    .map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999))
                    .collect()
            }
            Self::Trained(betas) => betas.clone(),
        }
    }
}

/// alpha_t and sigma_t of every training time, on one device.
#[derive(Debug)]
pub struct Schedule {
    alpha: Vec<f64>,
    sigma: Vec<f64>,
    alpha_table: Tensor,
    sigma_table: Tensor,
}

impl Clone for Schedule {
    fn clone(&self) -> Self {
        self.to_device(self.alpha_table.device())
    }
}

impl Schedule {
    /// `abar_t = prod_{i<=t} (1 - beta_i)`, `alpha_t = sqrt(abar_t)`, `sigma_t = sqrt(1 - abar_t)`.
    ///
    /// `zero_terminal_snr` rescales so that alpha_999 = 0 and alpha_0 stays (arXiv 2305.08891, algorithm 1).
    pub fn new(betas: &Betas, zero_terminal_snr: bool) -> Result<Self, Error> {
        let betas = betas.table();
        if betas.len() != TRAIN_TIMES as usize {
            return Err(Error::Length(betas.len()));
        }
        if let Some(t) = betas.iter().position(|b| !(0.0..1.0).contains(b)) {
            return Err(Error::Beta { t, beta: betas[t] });
        }
        let mut alpha_bar: Vec<f64> = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        if zero_terminal_snr {
            rescale_to_zero_terminal_snr(&mut alpha_bar);
        }
        let alpha = alpha_bar.iter().map(|abar| abar.sqrt()).collect();
        let sigma = alpha_bar.iter().map(|abar| (1.0 - abar).sqrt()).collect();
        Ok(Self::from_tables(alpha, sigma, Device::Cpu))
    }

    /// Stable Diffusion's and SDXL's.
    pub fn stable_diffusion() -> Self {
        Self::new(&Betas::STABLE_DIFFUSION, false).expect("its betas lie between 0 and 1")
    }

    /// Flow matching: `alpha = 1 - sigma`, `sigma_t = s x / (1 + (s - 1) x)` with `x = (t + 1) / 1000` and shift s.
    pub fn flow(shift: f64) -> Result<Self, Error> {
        if !(shift.is_finite() && shift > 0.0) {
            return Err(Error::Shift(shift));
        }
        let sigma: Vec<f64> = (1..=TRAIN_TIMES)
            .map(|i| i as f64 / TRAIN_TIMES as f64)
            .map(|x| shift * x / (1.0 + (shift - 1.0) * x))
            .collect();
        let alpha = sigma.iter().map(|sigma| 1.0 - sigma).collect();
        Ok(Self::from_tables(alpha, sigma, Device::Cpu))
    }

    fn from_tables(alpha: Vec<f64>, sigma: Vec<f64>, device: Device) -> Self {
        let alpha_table = Tensor::from_slice(&alpha).to_device(device);
        let sigma_table = Tensor::from_slice(&sigma).to_device(device);
        Self {
            alpha,
            sigma,
            alpha_table,
            sigma_table,
        }
    }

    /// The same schedule for tensors on `device`.
    pub fn to_device(&self, device: Device) -> Self {
        Self::from_tables(self.alpha.clone(), self.sigma.clone(), device)
    }

    /// alpha_t; `t` in `0..1000`.
    pub fn alpha(&self, t: i64) -> f64 {
        self.alpha[t as usize]
    }

    /// sigma_t; `t` in `0..1000`.
    pub fn sigma(&self, t: i64) -> f64 {
        self.sigma[t as usize]
    }

    /// abar_t = alpha_t²; `t` in `0..1000`.
    pub fn alpha_bar(&self, t: i64) -> f64 {
        self.alpha(t).powi(2)
    }

    /// alpha at times `t` `[B]` (i64, on the schedule's device), of the kind of `z` and broadcast to its rank.
    pub fn alpha_at(&self, t: &Tensor, z: &Tensor) -> Tensor {
        look_up(&self.alpha_table, t, z)
    }

    /// sigma at times `t` `[B]`, as [`Self::alpha_at`].
    pub fn sigma_at(&self, t: &Tensor, z: &Tensor) -> Tensor {
        look_up(&self.sigma_table, t, z)
    }
}

/// Rows `t` of `table`, as `[B, 1, …]` of the rank and kind of `z`.
fn look_up(table: &Tensor, t: &Tensor, z: &Tensor) -> Tensor {
    assert_eq!(t.kind(), Kind::Int64, "times are integers");
    assert_eq!(
        t.size(),
        [z.size()[0]],
        "there is one time for each row of z"
    );
    let mut shape = vec![1; z.dim()];
    shape[0] = -1;
    table.index_select(0, t).to_kind(z.kind()).view(&shape[..])
}

/// `sqrt(abar)` moved and stretched so that its last value is 0 and its first stays.
fn rescale_to_zero_terminal_snr(alpha_bar: &mut [f64]) {
    let first = alpha_bar[0].sqrt();
    let last = alpha_bar[alpha_bar.len() - 1].sqrt();
    for abar in alpha_bar {
        let root = (abar.sqrt() - last) * first / (first - last);
        *abar = root * root;
    }
}

/// The kind that arithmetic on `z` is done in: f64 for f64, else f32.
pub(crate) fn working_kind(z: &Tensor) -> Kind {
    match z.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}

/// The same time for each of `rows` rows: `[rows]`, i64.
pub fn times(t: i64, rows: i64, device: Device) -> Tensor {
    Tensor::full([rows], t, (Kind::Int64, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Literals of the specification, computed in f64.
    #[test]
    fn stable_diffusion_has_the_published_alpha_bars() {
        let schedule = Schedule::stable_diffusion();
        for (t, expected) in [
            (0, 0.999150000000),
            (1, 0.998296027838),
            (19, 0.982243991096),
            (24, 0.977555998376),
            (124, 0.863407556903),
            (249, 0.675432413725),
            (374, 0.466710245402),
            (499, 0.277669650456),
            (624, 0.138644168172),
            (749, 0.056623491598),
            (874, 0.018432722166),
            (979, 0.005912769761),
            (999, 0.004660098513),
        ] {
            assert!((schedule.alpha_bar(t) - expected).abs() < 1e-12, "abar_{t}");
        }
    }

    #[test]
    fn no_cosine_beta_is_lost_to_integer_division() {
        let schedule = Schedule::new(&Betas::SquaredCosine, false).unwrap();
        // abar_499 telescopes to cos²((0.5 + 0.008) / 1.008 · π/2) / cos²(0.008 / 1.008 · π/2).
        let cos2 = |x: f64| ((x + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2);
        assert!((schedule.alpha_bar(499) - cos2(0.5) / cos2(0.0)).abs() < 1e-12);
        assert!((schedule.alpha_bar(499) - 0.493843).abs() < 1e-5);
    }

    #[test]
    fn zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_alpha() {
        let plain = Schedule::stable_diffusion();
        let rescaled = Schedule::new(&Betas::STABLE_DIFFUSION, true).unwrap();
        assert_eq!(rescaled.alpha(LAST_TIME), 0.0);
        assert_eq!(rescaled.sigma(LAST_TIME), 1.0);
        assert!((rescaled.alpha(0) - plain.alpha(0)).abs() < 1e-15);
    }

    #[test]
    fn flow_is_a_straight_line() {
        let schedule = Schedule::flow(1.0).unwrap();
        assert_eq!(schedule.sigma(LAST_TIME), 1.0);
        assert_eq!(schedule.sigma(499), 0.5);
        let shifted = Schedule::flow(3.0).unwrap();
        assert!((shifted.sigma(499) - 0.75).abs() < 1e-15);
        assert!((shifted.alpha(499) - 0.25).abs() < 1e-15);
    }

    #[test]
    fn unusable_tables_are_refused() {
        let refused = |betas| Schedule::new(&betas, false).unwrap_err();
        assert_eq!(refused(Betas::Trained(vec![0.1; 999])), Error::Length(999));
        let mut betas = vec![0.1; 1000];
        betas[7] = 1.0;
        assert_eq!(
            refused(Betas::Trained(betas)),
            Error::Beta { t: 7, beta: 1.0 }
        );
        let nan = Betas::Linear {
            start: f64::NAN,
            end: 0.1,
        };
        assert!(matches!(refused(nan), Error::Beta { t: 0, .. }));
        assert_eq!(Schedule::flow(0.0).unwrap_err(), Error::Shift(0.0));
    }
}
