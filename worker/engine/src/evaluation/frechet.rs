//! Fréchet distance between Gaussian fits of two sets of latents.
//!
//! `d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2})` (Dowson and Landau, 1982; the
//! FID of Heusel et al., 2017, eq. 6, without a learned embedding). A finite sample biases it upwards, so
//! tables also show the distance between two sets of the same teacher: that is the floor.

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

/// A fit that many others are compared with: the root of its covariance is taken once.
#[derive(Debug)]
pub struct Reference {
    fit: GaussianFit,
    root: Tensor,
}

impl Reference {
    /// Prepares comparisons with `fit`.
    pub fn new(fit: GaussianFit) -> Self {
        let root = symmetric_root(&fit.covariance);
        Self { fit, root }
    }

    /// The squared Fréchet distance to `other`.
    pub fn distance(&self, other: &GaussianFit) -> f64 {
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
    use super::*;

    fn distance(a: GaussianFit, b: &GaussianFit) -> f64 {
        Reference::new(a).distance(b)
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
