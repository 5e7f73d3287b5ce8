//! Confidence intervals by resampling: a figure without one is a guess.

use distillery_common::seed::{Purpose, Stream};

/// A figure with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The figure over the whole sample.
    pub value: f64,
    /// The 2.5 % and 97.5 % quantiles over resamples.
    pub interval: (f64, f64),
}

/// Replicates of a percentile bootstrap (Efron, 1979); enough for two digits of a 95 % interval.
const REPLICATES: u64 = 400;

/// The mean of `values` with a percentile bootstrap interval. Empty input has no mean: `None`.
pub fn mean(values: &[f64], run_seed: u64) -> Option<Estimate> {
    let n = u32::try_from(values.len()).ok().filter(|&n| n > 0)?;
    let average = |sum: f64| sum / f64::from(n);
    let mut means: Vec<f64> = (0..REPLICATES)
        .map(|replicate| {
            let mut stream = Stream::new(run_seed, Purpose::Bootstrap, replicate, 0);
            average((0..n).map(|_| values[stream.below(n) as usize]).sum())
        })
        .collect();
    means.sort_by(f64::total_cmp);
    Some(Estimate {
        value: average(values.iter().sum()),
        interval: quantiles(&means),
    })
}

/// A figure of a whole set, with an interval from its values when one of `without.len()` equal parts is left
/// out (delete-a-group jackknife, normal approximation: Kott, 2001). Fewer than two parts tell nothing: the
/// interval is then unbounded.
pub fn jackknife(value: f64, without: &[f64]) -> Estimate {
    let groups = without.len() as f64;
    if without.len() < 2 {
        return Estimate {
            value,
            interval: (f64::NEG_INFINITY, f64::INFINITY),
        };
    }
    let mean = without.iter().sum::<f64>() / groups;
    let spread: f64 = without.iter().map(|v| (v - mean).powi(2)).sum();
    let half = 1.96 * (spread * (groups - 1.0) / groups).sqrt();
    Estimate {
        value,
        interval: (value - half, value + half),
    }
}

fn quantiles(sorted: &[f64]) -> (f64, f64) {
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    (at(0.025), at(0.975))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_mean_has_the_width_of_its_standard_error() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i % 2)).collect();
        let estimate = mean(&values, 1).expect("not empty");
        assert_eq!(estimate.value, 0.5);
        // Standard error of a fair coin over 1,000 throws: 0.0158.
        let width = estimate.interval.1 - estimate.interval.0;
        assert!((width - 2.0 * 1.96 * 0.0158).abs() < 0.012, "{width}");
    }

    #[test]
    fn equal_values_leave_no_doubt() {
        let estimate = mean(&[0.75; 10], 1).expect("not empty");
        assert_eq!(estimate.interval, (0.75, 0.75));
        assert_eq!(mean(&[], 1), None);
    }

    /// For a mean the delete-one jackknife variance is exactly the squared standard error.
    #[test]
    fn the_jackknife_of_a_mean_is_its_standard_error() {
        let values = [1.0, 2.0, 4.0, 9.0];
        let without: Vec<f64> = (0..4).map(|i| (16.0 - values[i]) / 3.0).collect();
        let estimate = jackknife(4.0, &without);
        // Sample variance 38 / 3, standard error sqrt(38 / 12).
        let half = 1.96 * (38.0f64 / 12.0).sqrt();
        assert!((estimate.interval.1 - (4.0 + half)).abs() < 1e-12);
        assert_eq!(jackknife(2.0, &[1.0]).interval.1, f64::INFINITY);
    }
}
