//! Durations counted in buckets of 3 %: any number of them from any number of tasks, in a fixed place.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets in one doubling.
const PARTS: u64 = 32;
/// Up to 2^40 µs.
const BUCKETS: usize = 36 * PARTS as usize;

/// A histogram of durations, in microseconds.
#[derive(Debug)]
pub struct Latencies {
    buckets: Vec<AtomicU64>,
}

impl Default for Latencies {
    fn default() -> Self {
        let buckets = (0..BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Self { buckets }
    }
}

impl Latencies {
    /// Counts one.
    pub fn record(&self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros).min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// Forgets all.
    pub fn forget(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.buckets
            .iter()
            .map(|bucket| bucket.load(Ordering::Relaxed))
            .sum()
    }

    /// The least duration that `share` of all do not exceed, up to the width of a bucket; zero when there are none.
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = (self.count() as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (at, bucket) in self.buckets.iter().enumerate() {
            seen += bucket.load(Ordering::Relaxed);
            if seen >= wanted && seen > 0 {
                return Duration::from_micros(upper(at as u64));
            }
        }
        Duration::ZERO
    }

    /// A quantile in milliseconds.
    pub fn ms(&self, share: f64) -> f64 {
        self.quantile(share).as_secs_f64() * 1e3
    }
}

/// Values below 32 have a bucket each; every later doubling has 32 buckets.
fn bucket(value: u64) -> usize {
    let doublings = u64::from(value.max(1).ilog2()).saturating_sub(5);
    let at = if value < PARTS {
        value
    } else {
        PARTS * (doublings + 1) + (value >> doublings) - PARTS
    };
    usize::try_from(at).unwrap_or(usize::MAX)
}

/// The largest value of a bucket.
fn upper(at: u64) -> u64 {
    if at < PARTS {
        return at;
    }
    let doublings = at / PARTS - 1;
    ((at % PARTS + PARTS + 1) << doublings) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_that_is_at_most_4_percent_wide() {
        let mut last = 0;
        for value in (0..5000).chain([1 << 20, (1 << 20) + 12345, 1 << 35]) {
            let at = bucket(value);
            let top = upper(at as u64);
            assert!(top >= value, "{value} is above its bucket's {top}");
            assert!(
                top as f64 <= value as f64 * 1.04,
                "{value} in a bucket up to {top}"
            );
            assert!(at >= last, "buckets rise");
            last = at;
        }
    }

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let latencies = Latencies::default();
        for ms in 1..=100 {
            latencies.record(Duration::from_millis(ms));
        }
        assert_eq!(latencies.count(), 100);
        let median = latencies.ms(0.5);
        assert!((50.0..52.0).contains(&median), "{median}");
        let high = latencies.ms(0.99);
        assert!((99.0..103.0).contains(&high), "{high}");
        latencies.forget();
        assert_eq!(latencies.quantile(0.5), Duration::ZERO);
    }
}
