//! Waiting times between tries: doubling, capped, with jitter that the caller supplies.

use std::time::Duration;

/// Doubling delays from `first` to at most `cap`.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    tries: u32,
}

impl Backoff {
    /// Starts at `first`, never waits longer than `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self {
            first,
            cap,
            tries: 0,
        }
    }

    /// The next delay; `jitter` in `[0, 1)` shortens it by up to half, so that a fleet does not return as one.
    pub fn next_delay(&mut self, jitter: f64) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.tries.min(20));
        self.tries = self.tries.saturating_add(1);
        doubled
            .min(self.cap)
            .mul_f64(1.0 - 0.5 * jitter.clamp(0.0, 1.0))
    }

    /// Forgets past failures.
    pub fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_cap() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let delays: Vec<_> = (0..6)
            .map(|_| backoff.next_delay(0.0).as_millis())
            .collect();
        assert_eq!(delays, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next_delay(1.0), Duration::from_millis(50));
    }
}
