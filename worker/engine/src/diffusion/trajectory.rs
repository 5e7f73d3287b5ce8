//! Which times a teacher trajectory visits (algorithm 1 of arXiv 2406.05768v6, and its stratified form).
//!
//! Random draws come in as a function `bound -> 0..bound`; plans are functions of them alone.

use super::schedule::LAST_TIME;
use super::segments::{Error, Segments, TimeGrid, sub_steps};

/// The times in each segment that a state may be drawn at, below 999 everywhere.
#[derive(Debug, Clone)]
pub struct Choices {
    /// For each segment, its candidates in rising order.
    by_segment: Vec<Vec<i64>>,
}

impl Choices {
    /// The points of `grid`, or every integer time, in each of `segments`.
    pub fn new(segments: &Segments, grid: Option<&TimeGrid>) -> Result<Self, Error> {
        let mut by_segment = vec![Vec::new(); segments.count()];
        let mut add = |t: i64| by_segment[segments.segment_of(t)].push(t);
        match grid {
            Some(grid) => grid.times().iter().copied().for_each(&mut add),
            None => (1..=LAST_TIME).for_each(&mut add),
        }
        // 999 itself is the first row of every trajectory.
        if let Some(noisiest) = by_segment.last_mut() {
            noisiest.retain(|&t| t < LAST_TIME);
        }
        match by_segment.iter().position(Vec::is_empty) {
            Some(segment) => Err(Error::EmptySegment {
                segment,
                segments: segments.count(),
                grid: grid.map_or(LAST_TIME as usize, |grid| grid.times().len()),
            }),
            None => Ok(Self { by_segment }),
        }
    }

    fn draw(&self, segment: usize, below: &mut dyn FnMut(u32) -> u32) -> i64 {
        let times = &self.by_segment[segment];
        times[below(times.len() as u32) as usize]
    }

    /// One pass through every segment: 999, then one time of each segment from the noisiest down.
    ///
    /// Always M + 1 times, each a row; the row of segment s is reached by M - s steps.
    pub fn stratified(&self, below: &mut dyn FnMut(u32) -> u32) -> Vec<i64> {
        let noisiest_first = (0..self.by_segment.len()).rev();
        std::iter::once(LAST_TIME)
            .chain(noisiest_first.map(|segment| self.draw(segment, below)))
            .collect()
    }

    /// Algorithm 1: a segment s and a time t_m in it; M - s equal steps from 999 to t_m. Only the last is a row.
    pub fn alg1(&self, below: &mut dyn FnMut(u32) -> u32) -> Vec<i64> {
        let segments = self.by_segment.len();
        let segment = below(segments as u32) as usize;
        sub_steps(LAST_TIME, self.draw(segment, below), segments - segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small linear congruential generator: enough to visit many plans.
    fn draws(mut state: u64) -> impl FnMut(u32) -> u32 {
        move |bound| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 33) % u64::from(bound)) as u32
        }
    }

    /// Test 7, and §10.1: always nine rows for M = 8.
    #[test]
    fn a_stratified_plan_reaches_segment_s_in_m_minus_s_steps() {
        let segments = Segments::new(8).unwrap();
        for grid in [None, Some(TimeGrid::new(40).unwrap())] {
            let choices = Choices::new(&segments, grid.as_ref()).unwrap();
            let mut below = draws(1);
            for _ in 0..500 {
                let plan = choices.stratified(&mut below);
                assert_eq!(plan.len(), 9);
                assert_eq!(plan[0], 999);
                for (step, &t) in plan.iter().enumerate().skip(1) {
                    assert_eq!(segments.segment_of(t), 8 - step);
                    assert!(t < plan[step - 1]);
                    assert!(grid.as_ref().is_none_or(|g| g.times().contains(&t)));
                }
            }
        }
    }

    #[test]
    fn every_allowed_time_is_drawn() {
        let segments = Segments::new(8).unwrap();
        let grid = TimeGrid::new(40).unwrap();
        let choices = Choices::new(&segments, Some(&grid)).unwrap();
        let mut below = draws(2);
        let mut seen: Vec<i64> = (0..200)
            .flat_map(|_| choices.stratified(&mut below))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, grid.times());
    }

    /// Test 7: 4.5 steps on average for M = 8, 2.5 for M = 4.
    #[test]
    fn an_alg1_plan_takes_m_minus_s_steps() {
        for (m, mean) in [(8, 4.5), (4, 2.5)] {
            let segments = Segments::new(m).unwrap();
            let choices = Choices::new(&segments, None).unwrap();
            let mut steps = 0;
            for segment in 0..m {
                let mut first = Some(segment);
                let mut rest = draws(u64::from(segment));
                let plan = choices.alg1(&mut |bound| first.take().unwrap_or_else(|| rest(bound)));
                let last = *plan.last().unwrap();
                assert_eq!(segments.segment_of(last), segment as usize);
                assert_eq!(plan.len() - 1, (m - segment) as usize);
                assert!(plan.windows(2).all(|pair| pair[0] > pair[1]));
                steps += plan.len() - 1;
            }
            assert_eq!(steps as f64 / f64::from(m), mean);
        }
    }

    #[test]
    fn a_grid_that_misses_a_segment_is_refused() {
        let error =
            Choices::new(&Segments::new(8).unwrap(), Some(&TimeGrid::new(4).unwrap())).unwrap_err();
        assert!(matches!(error, Error::EmptySegment { segment: 0, .. }));
    }
}
