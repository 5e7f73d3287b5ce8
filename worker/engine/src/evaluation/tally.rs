//! What a set of samples measures up to, gathered one block of samples at a time: features, distances and
//! shares of right attributes are kept, latents and pictures are not.

use tch::{Kind, Tensor};

use super::frechet::{MIN_SAMPLES, Reference, features};
use super::interval::{Estimate, jackknife, mean};
use super::scorer::Score;

/// Parts that are left out in turn for the interval of a Fréchet distance.
const GROUPS: i64 = 8;

/// Measurements of one model under one sampler with one number of steps.
#[derive(Debug, Default)]
pub struct Tally {
    samples: u64,
    features: Vec<Tensor>,
    distances: Vec<f64>,
    adherences: Vec<f64>,
}

impl Tally {
    /// Takes in final latents `[B, C, H, W]` and, where there are any, what the teacher drew from the same noise.
    pub fn add_latents(&mut self, latents: &Tensor, teacher: Option<&Tensor>) {
        self.samples += latents.size()[0] as u64;
        self.features
            .push(features(latents).to_device(tch::Device::Cpu));
        if let Some(teacher) = teacher {
            self.distances.extend(squared_distances(latents, teacher));
        }
    }

    /// Takes in how many attributes of a caption came true; a caption that states nothing says nothing.
    pub fn add_score(&mut self, score: Score) {
        if score.total > 0 {
            self.adherences
                .push(f64::from(score.right) / f64::from(score.total));
        }
    }

    /// Samples taken in.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Captions that stated something.
    pub fn scored(&self) -> u64 {
        self.adherences.len() as u64
    }

    /// The mean share of right attributes.
    pub fn adherence(&self, run_seed: u64) -> Option<Estimate> {
        mean(&self.adherences, run_seed)
    }

    /// The mean squared distance of an element to what the teacher drew from the same noise.
    pub fn teacher_distance(&self, run_seed: u64) -> Option<Estimate> {
        mean(&self.distances, run_seed)
    }

    /// The Fréchet distance to `reference`; none for fewer than four samples. Its interval is unbounded where a
    /// group left out would leave fewer than that.
    pub fn frechet(&self, reference: &Reference) -> Option<Estimate> {
        let all = match &self.features[..] {
            [] => return None,
            blocks => Tensor::cat(blocks, 0),
        };
        let n = all.size()[0];
        if n < MIN_SAMPLES {
            return None;
        }
        let value = reference.distance(&all);
        if n < 2 * GROUPS {
            return Some(at_least_zero(jackknife(value, &[])));
        }
        let group = Tensor::arange(n, (Kind::Int64, all.device())).remainder(GROUPS);
        let without: Vec<f64> = (0..GROUPS)
            .map(|left_out| {
                let kept = group.not_equal(left_out).nonzero().squeeze_dim(1);
                reference.distance(&all.index_select(0, &kept))
            })
            .collect();
        Some(at_least_zero(jackknife(value, &without)))
    }
}

/// A squared distance is never negative, whatever its unbiased estimate and the normal approximation say.
fn at_least_zero(estimate: Estimate) -> Estimate {
    let (low, high) = estimate.interval;
    Estimate {
        value: estimate.value.max(0.0),
        interval: (low.max(0.0), high.max(0.0)),
    }
}

/// The mean over elements of `(a - b)^2`, for each row of `[B, …]`.
fn squared_distances(a: &Tensor, b: &Tensor) -> Vec<f64> {
    assert_eq!(
        a.size(),
        b.size(),
        "latents of the same noise have the same shape"
    );
    let squares = (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).square();
    let means = squares.flatten(1, -1).mean_dim(1, false, Kind::Double);
    Vec::try_from(means.to_device(tch::Device::Cpu)).expect("f64 on the host")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn latents(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).view([-1, 1, 1, 2])
    }

    #[test]
    fn adherence_is_the_mean_share_of_right_attributes_and_silent_captions_are_left_out() {
        let mut tally = Tally::default();
        for (right, total) in [(4, 4), (1, 2), (0, 0), (0, 3)] {
            tally.add_score(Score { right, total });
        }
        assert_eq!(tally.scored(), 3);
        let adherence = tally.adherence(7).expect("three captions");
        assert_eq!(adherence.value, 0.5);
        assert!(adherence.interval.0 >= 0.0 && adherence.interval.1 <= 1.0);
        assert_eq!(Tally::default().adherence(7), None);
    }

    #[test]
    fn the_distance_to_the_teacher_is_the_mean_square_by_element() {
        let mut tally = Tally::default();
        tally.add_latents(&latents(&[1.0, 2.0]), Some(&latents(&[1.0, 5.0])));
        tally.add_latents(&latents(&[0.0, 0.0]), Some(&latents(&[1.0, 1.0])));
        // (0 + 9) / 2 and (1 + 1) / 2.
        assert_eq!(tally.distances, [4.5, 1.0]);
        assert_eq!(tally.teacher_distance(1).expect("two samples").value, 2.75);
        assert_eq!(tally.samples(), 2);
    }

    #[test]
    fn a_handful_of_samples_has_no_interval_and_fewer_have_no_distance() {
        let reference = reference(&[0.0, 0.0, 2.0, 2.0, 1.0, 0.0, 0.0, 1.0]);
        let mut tally = Tally::default();
        assert_eq!(tally.frechet(&reference), None);
        tally.add_latents(&latents(&[1.0, 2.0, 0.0, 0.0, 5.0, 1.0]), None);
        assert_eq!(tally.frechet(&reference), None);
        tally.add_latents(&latents(&[3.0, 1.0]), None);
        assert_eq!(
            tally.frechet(&reference).map(|e| e.interval.1),
            Some(f64::INFINITY)
        );
    }

    fn reference(values: &[f32]) -> Reference {
        Reference::new(&features(&latents(values)))
    }

    /// Sets that differ by a shift alone have the square of that shift as their distance.
    #[test]
    fn a_shifted_set_is_as_far_as_its_shift() {
        let base: Vec<f32> = (0..64).map(|i| ((i * 37) % 29) as f32 / 7.0).collect();
        let shifted: Vec<f32> = base
            .chunks(2)
            .flat_map(|pair| [pair[0] + 3.0, pair[1] - 1.0])
            .collect();
        let reference = reference(&base);
        let mut tally = Tally::default();
        for block in shifted.chunks(16) {
            tally.add_latents(&latents(block), None);
        }
        let estimate = tally.frechet(&reference).expect("32 samples");
        assert!((estimate.value - 10.0).abs() < 1e-5, "{estimate:?}");
        assert!(
            estimate.interval.0 < 10.0 && estimate.interval.1 > 10.0,
            "{estimate:?}"
        );
        assert_eq!(tally.teacher_distance(1), None);
    }

    #[test]
    fn the_teacher_is_at_no_distance_from_itself() {
        let own = Tensor::ones([16, 1, 1, 2], (Kind::Float, Device::Cpu))
            * Tensor::arange(16, (Kind::Float, Device::Cpu)).view([16, 1, 1, 1]);
        let mut tally = Tally::default();
        tally.add_latents(&own, Some(&own));
        let reference = Reference::new(&features(&own));
        assert!(tally.frechet(&reference).expect("16 samples").value < 1e-6);
        assert_eq!(
            tally.teacher_distance(1).map(|e| e.interval),
            Some((0.0, 0.0))
        );
    }
}
