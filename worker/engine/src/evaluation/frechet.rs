//! Fréchet distance between Gaussian fits of two sets of latents.
//!
//! `d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})` (Dowson and Landau, 1982; the
//! FID of Heusel et al., 2017, eq. 6, without a learned embedding).
//!
//! A finite sample biases it upwards, by an amount that falls as 1/N and that, at a thousand samples of 256
//! numbers, is larger than what tells two good samplers apart. So it is extrapolated to an infinite sample
//! (Chong and Forsyth, CVPR 2020, arXiv 1911.07023): [`Reference::distance`].

use tch::{Kind, Tensor};

/// Latents with more elements than this are averaged over squares first, so that a covariance fits in memory.
pub const MAX_FEATURES: i64 = 256;

/// Mean and covariance of a set of feature vectors, in f64.
#[derive(Debug)]
pub struct GaussianFit {
    mean: Tensor,
    covariance: Tensor,
}

impl GaussianFit {
    /// Fits `features` `[N, D]`, N ≥ 2.
    pub fn new(features: &Tensor) -> Self {
        let (n, _) = features.size2().expect("features are a matrix");
        assert!(
            n >= 2,
            "a covariance needs at least two samples, there are {n}"
        );
        let features = features.to_kind(Kind::Double);
        let mean = features.mean_dim(0, false, Kind::Double);
        let centred = &features - &mean;
        let covariance = centred.transpose(0, 1).matmul(&centred) / (n - 1) as f64;
        Self { mean, covariance }
    }
}

/// Feature vectors `[N, D]` (D ≤ [`MAX_FEATURES`] unless C alone is larger) of latents `[N, C, H, W]`.
pub fn features(latents: &Tensor) -> Tensor {
    let (n, c, h, w) = latents.size4().expect("latents are [N, C, H, W]");
    let mut side = (h, w);
    while c * side.0 * side.1 > MAX_FEATURES && side.0 > 1 && side.1 > 1 {
        side = (side.0 / 2, side.1 / 2);
    }
    let pooled = if side == (h, w) {
        latents.shallow_clone()
    } else {
        latents.adaptive_avg_pool2d([side.0, side.1])
    };
    pooled.reshape([n, c * side.0 * side.1])
}

/// A sample that many others are compared with: fits and roots of covariances are taken once.
#[derive(Debug)]
pub struct Reference {
    whole: Side,
    halves: [Side; 2],
}

/// Fewest rows of a sample that both halves have a covariance of.
pub const MIN_SAMPLES: i64 = 4;

impl Reference {
    /// Prepares comparisons with `features` `[N, D]`, N ≥ [`MIN_SAMPLES`].
    pub fn new(features: &Tensor) -> Self {
        let side = |rows: &Tensor| Side::new(GaussianFit::new(rows));
        let [even, odd] = halves(features);
        Self {
            whole: side(features),
            halves: [side(&even), side(&odd)],
        }
    }

    /// The squared Fréchet distance to the distribution behind `features` `[N, D]`, N ≥ [`MIN_SAMPLES`], without
    /// the first-order bias of both samples: `2 d²_N - (d²_{N/2} + d'²_{N/2}) / 2`, where the halves are the even
    /// and the odd rows of both. That is the intercept at 1/N = 0 of the line through the two sample sizes. Like
    /// every unbiased estimate of a distance it may fall below zero for samples of one distribution.
    pub fn distance(&self, features: &Tensor) -> f64 {
        let whole = self.whole.distance(&GaussianFit::new(features));
        let of_halves: f64 = self
            .halves
            .iter()
            .zip(halves(features))
            .map(|(side, rows)| side.distance(&GaussianFit::new(&rows)))
            .sum();
        2.0 * whole - of_halves / 2.0
    }
}

/// The even and the odd rows.
fn halves(features: &Tensor) -> [Tensor; 2] {
    let n = features.size()[0];
    [0, 1].map(|first| features.slice(0, first, n, 2))
}

/// A fit with the root of its covariance.
#[derive(Debug)]
struct Side {
    fit: GaussianFit,
    root: Tensor,
}

impl Side {
    fn new(fit: GaussianFit) -> Self {
        let root = symmetric_root(&fit.covariance);
        Self { fit, root }
    }

    /// The squared Fréchet distance of the two fits.
    fn distance(&self, other: &GaussianFit) -> f64 {
        let offset = (&self.fit.mean - &other.mean).square().sum(Kind::Double);
        let product = self.root.matmul(&other.covariance).matmul(&self.root);
        // The product is symmetric only up to rounding; eigvalsh reads one triangle.
        let product = (&product + product.transpose(0, 1)) / 2.0;
        let eigenvalues = product.linalg_eigvalsh("L");
        let cross = eigenvalues.clamp_min(0.0).sqrt().sum(Kind::Double);
        let trace = self.fit.covariance.trace() + other.covariance.trace();
        (offset + trace - cross * 2.0).double_value(&[]).max(0.0)
    }
}

/// `V diag(sqrt(l)) V^T` of a positive semi-definite matrix; negative rounding of `l` is cut off.
fn symmetric_root(matrix: &Tensor) -> Tensor {
    let (eigenvalues, vectors) = matrix.linalg_eigh("L");
    let scaled = &vectors * eigenvalues.clamp_min(0.0).sqrt().unsqueeze(0);
    scaled.matmul(&vectors.transpose(0, 1))
}

#[cfg(test)]
mod tests {
    use distillery_common::seed::{Purpose, normal};

    use super::*;

    fn distance(a: GaussianFit, b: &GaussianFit) -> f64 {
        Side::new(a).distance(b)
    }

    fn fit(mean: &[f64], covariance: &[f64]) -> GaussianFit {
        let d = mean.len() as i64;
        GaussianFit {
            mean: Tensor::from_slice(mean),
            covariance: Tensor::from_slice(covariance).reshape([d, d]),
        }
    }

    /// For commuting covariances the distance is `|mu|^2 + sum (s_1 - s_2)^2`.
    #[test]
    fn diagonal_gaussians_have_the_closed_form_distance() {
        let a = fit(&[0.0, 1.0], &[4.0, 0.0, 0.0, 9.0]);
        let b = fit(&[3.0, 1.0], &[1.0, 0.0, 0.0, 25.0]);
        assert!((distance(a, &b) - (9.0 + 1.0 + 4.0)).abs() < 1e-12);
        assert!(distance(fit(&[3.0, 1.0], &[1.0, 0.0, 0.0, 25.0]), &b) < 1e-12);
    }

    /// In two dimensions `tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))`, whatever the covariances commute with.
    #[test]
    fn rotated_gaussians_agree_with_the_two_dimensional_closed_form() {
        let (a, b) = ([2.0, 0.7, 0.7, 1.0], [1.5, -0.4, -0.4, 3.0]);
        let trace = a[0] * b[0] + a[1] * b[2] + a[2] * b[1] + a[3] * b[3];
        let determinant = (a[0] * a[3] - a[1] * a[2]) * (b[0] * b[3] - b[1] * b[2]);
        let cross = (trace + 2.0 * f64::sqrt(determinant)).sqrt();
        let expected = a[0] + a[3] + b[0] + b[3] - 2.0 * cross;
        let got = distance(fit(&[0.0; 2], &a), &fit(&[0.0; 2], &b));
        assert!((got - expected).abs() < 1e-12, "{got} against {expected}");
    }

    /// Two samples of 400 rows in 64 dimensions: their fits are about 11 apart where the distributions are the
    /// same, and the extrapolation takes nearly all of that away.
    #[test]
    fn the_size_of_the_samples_hardly_moves_the_distance() {
        let sample = |first: u64| {
            let rows: Vec<f64> = (first..first + 400)
                .flat_map(|ordinal| normal(5, Purpose::EvaluationNoise, ordinal, 0, 64))
                .map(f64::from)
                .collect();
            Tensor::from_slice(&rows).view([400, 64])
        };
        let reference = Reference::new(&sample(0));
        for (shift, scale) in [(0.0, 1.0), (0.25, 1.0), (0.0, 1.5)] {
            let other = sample(1000) * scale + shift;
            let expected = 64.0 * (shift * shift + (scale - 1.0_f64).powi(2));
            let fits = reference.whole.distance(&GaussianFit::new(&other));
            let extrapolated = reference.distance(&other);
            assert!(
                fits - expected > 4.0,
                "{shift} {scale}: {fits} by the fits alone"
            );
            assert!(
                (extrapolated - expected).abs() < 1.5,
                "{shift} {scale}: {extrapolated} instead of {expected}"
            );
        }
    }

    #[test]
    fn a_fit_has_the_moments_of_its_sample() {
        let sample = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 6.0, 5.0, 4.0]).reshape([3, 2]);
        let fit = GaussianFit::new(&sample);
        assert_eq!(
            Vec::<f64>::try_from(&fit.mean).expect("a vector"),
            [3.0, 4.0]
        );
        let covariance: Vec<f64> = Vec::try_from(fit.covariance.reshape([-1])).expect("a vector");
        assert_eq!(covariance, [4.0, 2.0, 2.0, 4.0]);
    }

    #[test]
    fn large_latents_are_averaged_to_a_bounded_number_of_features() {
        let latents = Tensor::ones([2, 4, 128, 96], (Kind::Float, tch::Device::Cpu));
        let features = features(&latents);
        assert_eq!(features.size(), [2, 4 * 8 * 6]);
        assert_eq!(features.double_value(&[1, 5]), 1.0);
    }
}
