//! Segments of time, their milestones, and the grids that times may lie on.

use std::fmt;

use tch::Tensor;

use super::schedule::{LAST_TIME, TRAIN_TIMES};

/// Why time cannot be cut like this.
#[derive(Debug, PartialEq, Eq)]
pub enum Error {
    /// None, or more than there are times.
    Segments(u32),
    /// Not equally spaced.
    Grid(u32),
    /// Milestones that states cannot lie on.
    EmptySegment {
        /// Which.
        segment: usize,
        /// Of how many.
        segments: usize,
        /// Points of the grid.
        grid: usize,
    },
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segments(value) => {
                write!(f, "{value} segments: time can be cut into 1 to {LAST_TIME}")
            }
            Self::Grid(value) => write!(
                f,
                "a time grid of {value} points: the number must divide {TRAIN_TIMES}"
            ),
            Self::EmptySegment {
                segment,
                segments,
                grid,
            } => write!(
                f,
                "segment {segment} of {segments} has no point of the time grid of {grid} to draw"
            ),
        }
    }
}

/// Time cut into M segments `(tau_s, tau_{s+1}]`; segment 0 is the cleanest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    milestones: Vec<i64>,
}

impl Segments {
    /// `count` segments with `tau_k = trunc(999 k / count)`.
    ///
    /// The milestones of a divisor of `count` are a subset of these.
    pub fn new(count: u32) -> Result<Self, Error> {
        if count == 0 || i64::from(count) > LAST_TIME {
            return Err(Error::Segments(count));
        }
        let m = i64::from(count);
        Ok(Self {
            milestones: (0..=m).map(|k| k * LAST_TIME / m).collect(),
        })
    }

    /// M.
    pub fn count(&self) -> usize {
        self.milestones.len() - 1
    }

    /// tau_0 = 0 up to tau_M = 999.
    pub fn milestones(&self) -> &[i64] {
        &self.milestones
    }

    /// The segment that time `t` in `1..=999` lies in; a milestone belongs to the segment below it.
    pub fn segment_of(&self, t: i64) -> usize {
        assert!((1..=LAST_TIME).contains(&t), "time {t} lies in no segment");
        self.milestones.partition_point(|&tau| tau < t) - 1
    }

    /// The milestone that time `t` in `1..=999` targets.
    pub fn target(&self, t: i64) -> i64 {
        self.milestones[self.segment_of(t)]
    }

    /// [`Self::target`] of times `[B]`.
    pub fn targets(&self, t: &Tensor) -> Tensor {
        let milestones = Tensor::from_slice(&self.milestones).to_device(t.device());
        let segment = t.bucketize(&milestones, false, false) - 1;
        milestones.index_select(0, &segment)
    }

    /// Where the teacher's step from `t` ends: `max(t - skip, target)`.
    ///
    /// On a grid with spacing `skip` whose points include the milestones this is the previous grid point.
    pub fn previous(&self, t: i64, skip: u32) -> i64 {
        (t - i64::from(skip)).max(self.target(t))
    }

    /// [`Self::previous`] of times `[B]`.
    pub fn previous_times(&self, t: &Tensor, skip: u32) -> Tensor {
        (t - i64::from(skip)).maximum(&self.targets(t))
    }
}

/// Equally spaced times `1000 k / n - 1`, k = 1..=n; below the first lies 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeGrid {
    times: Vec<i64>,
}

impl TimeGrid {
    /// A grid of `points` times; the number must divide 1000. 40 points are {24, 49, …, 999}.
    pub fn new(points: u32) -> Result<Self, Error> {
        let n = i64::from(points);
        if n == 0 || TRAIN_TIMES % n != 0 {
            return Err(Error::Grid(points));
        }
        Ok(Self {
            times: (1..=n).map(|k| TRAIN_TIMES / n * k - 1).collect(),
        })
    }

    /// The grid's times, rising.
    pub fn times(&self) -> &[i64] {
        &self.times
    }

    /// The point before the grid point `t`, 0 before the first; none when `t` is not on the grid.
    pub fn previous(&self, t: i64) -> Option<i64> {
        let at = self.times.binary_search(&t).ok()?;
        Some(if at == 0 { 0 } else { self.times[at - 1] })
    }
}

/// `steps` equal sub-steps from `from` down to `to`: `from - round(i (from - to) / steps)`, i = 0..=steps.
pub fn sub_steps(from: i64, to: i64, steps: usize) -> Vec<i64> {
    assert!(
        steps > 0 && to <= from,
        "sub-steps lead down from {from} to {to}"
    );
    let span = (from - to) as f64;
    (0..=steps)
        .map(|i| from - (i as f64 * span / steps as f64).round() as i64)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test 10.
    #[test]
    fn eight_segments_have_the_released_milestones() {
        let eight = Segments::new(8).unwrap();
        assert_eq!(
            eight.milestones(),
            [0, 124, 249, 374, 499, 624, 749, 874, 999]
        );
    }

    /// Test 6.
    #[test]
    fn segments_cover_time_and_milestones_belong_below() {
        for count in [1, 2, 3, 4, 8, 16] {
            let segments = Segments::new(count).unwrap();
            let mut seen = vec![false; segments.count()];
            for t in 1..=LAST_TIME {
                let s = segments.segment_of(t);
                seen[s] = true;
                assert!(segments.milestones()[s] < t && t <= segments.milestones()[s + 1]);
            }
            assert!(seen.iter().all(|&s| s));
        }
    }

    #[test]
    fn coarse_milestones_are_among_the_fine_ones() {
        let eight = Segments::new(8).unwrap();
        for count in [1, 2, 4] {
            let coarse = Segments::new(count).unwrap();
            assert!(
                coarse
                    .milestones()
                    .iter()
                    .all(|tau| eight.milestones().contains(tau))
            );
        }
    }

    #[test]
    fn tensors_and_numbers_agree_on_targets_and_steps() {
        let times: Vec<i64> = (1..=LAST_TIME).collect();
        for (count, skip) in [(8, 20), (4, 25), (1, 125), (7, 13)] {
            let segments = Segments::new(count).unwrap();
            let tensor = Tensor::from_slice(&times);
            let list = |x: Tensor| Vec::<i64>::try_from(x).unwrap();
            let targets: Vec<i64> = times.iter().map(|&t| segments.target(t)).collect();
            assert_eq!(list(segments.targets(&tensor)), targets);
            let previous: Vec<i64> = times.iter().map(|&t| segments.previous(t, skip)).collect();
            assert_eq!(list(segments.previous_times(&tensor, skip)), previous);
        }
    }

    #[test]
    fn the_grid_form_of_a_step_is_its_clamped_form_on_the_grid() {
        let grid = TimeGrid::new(40).unwrap();
        assert_eq!(grid.times()[..2], [24, 49]);
        assert_eq!(grid.times()[39], 999);
        assert_eq!(grid.previous(24), Some(0));
        assert_eq!(grid.previous(100), None);
        for count in [1, 2, 4, 8] {
            let segments = Segments::new(count).unwrap();
            for &t in grid.times() {
                assert_eq!(Some(segments.previous(t, 25)), grid.previous(t));
            }
        }
    }

    #[test]
    fn sub_steps_round_to_the_published_times() {
        assert_eq!(sub_steps(999, 874, 3), [999, 957, 916, 874]);
        assert_eq!(sub_steps(874, 749, 3), [874, 832, 791, 749]);
        assert_eq!(sub_steps(124, 0, 3), [124, 83, 41, 0]);
    }

    #[test]
    fn impossible_cuts_are_refused() {
        assert_eq!(Segments::new(0), Err(Error::Segments(0)));
        assert_eq!(Segments::new(1000), Err(Error::Segments(1000)));
        assert_eq!(TimeGrid::new(0), Err(Error::Grid(0)));
        assert_eq!(TimeGrid::new(30), Err(Error::Grid(30)));
    }
}
