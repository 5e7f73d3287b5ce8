//! The learning rate of each step.

use std::f64::consts::PI;

use distillery_common::recipe::{Optimizer, RateSchedule};

/// The learning rate of step `step` (from 0) of `steps`.
///
/// A line from `lr / warmup` to `lr` over the warm-up; then `lr`, or half a cosine, or a line, that would reach
/// zero one step after the last.
pub fn rate(settings: &Optimizer, step: u64, steps: u64) -> f64 {
    if step < settings.warmup {
        return settings.lr * (step + 1) as f64 / settings.warmup as f64;
    }
    let after_warmup = steps.saturating_sub(settings.warmup).max(1);
    let progress = ((step - settings.warmup) as f64 / after_warmup as f64).min(1.0);
    let share = match settings.schedule {
        RateSchedule::Constant => 1.0,
        RateSchedule::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        RateSchedule::Linear => 1.0 - progress,
    };
    settings.lr * share
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(schedule: RateSchedule) -> Optimizer {
        Optimizer {
            lr: 2.0,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.0,
            grad_clip: None,
            schedule,
            warmup: 10,
            max_skipped: 1,
            sharded: false,
        }
    }

    #[test]
    fn warm_up_is_a_line_that_starts_above_zero() {
        for schedule in [
            RateSchedule::Constant,
            RateSchedule::Cosine,
            RateSchedule::Linear,
        ] {
            assert_eq!(rate(&settings(schedule), 0, 110), 0.2);
            assert_eq!(rate(&settings(schedule), 9, 110), 2.0);
            assert_eq!(rate(&settings(schedule), 10, 110), 2.0);
        }
    }

    #[test]
    fn shapes_are_half_way_at_half_time_and_zero_after_the_end() {
        for (schedule, end) in [(RateSchedule::Cosine, 0.0), (RateSchedule::Linear, 0.0)] {
            assert!((rate(&settings(schedule), 60, 110) - 1.0).abs() < 1e-12);
            assert!((rate(&settings(schedule), 110, 110) - end).abs() < 1e-12);
            assert!(rate(&settings(schedule), 109, 110) > 0.0);
        }
        assert_eq!(rate(&settings(RateSchedule::Constant), 109, 110), 2.0);
        let quarter = rate(&settings(RateSchedule::Cosine), 35, 110);
        assert!((quarter - (1.0 + 0.5f64.sqrt())).abs() < 1e-12);
    }

    #[test]
    fn a_warm_up_longer_than_the_stage_still_gives_a_rate() {
        assert_eq!(rate(&settings(RateSchedule::Cosine), 4, 5), 1.0);
        assert!(rate(&settings(RateSchedule::Linear), 10, 5).is_finite());
    }
}
