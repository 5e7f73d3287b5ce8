//! Counter-based randomness: a draw is a pure function of (run seed, purpose, ordinal, draw).
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Neither the worker,
//! nor the attempt, nor the size of a shard takes part, so a row can be made again anywhere. Logarithm and
//! sine come from `libm`, whose results do not depend on the machine.

use std::f64::consts::TAU;

/// What a number is drawn for. Its value is part of every stored dataset's identity: never renumber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Purpose {
    /// The state z_T a teacher trajectory starts from; ordinal = trajectory.
    InitialNoise = 1,
    /// Jittered times of a trajectory; ordinal = trajectory.
    TrajectoryTimes = 2,
    /// Order of training rows; ordinal = stage.
    TrainingOrder = 3,
    /// The state z_T of an evaluation sample; ordinal = sample.
    EvaluationNoise = 4,
    /// Re-noising inside the student's sampler; ordinal = sample, draw = sampler step.
    Renoise = 5,
    /// Initial values of adapters; ordinal = position of the module.
    AdapterInit = 6,
    /// A second, independent set of teacher samples; ordinal = sample.
    ReferenceNoise = 7,
    /// Resampling for confidence intervals; ordinal = replicate.
    Bootstrap = 8,
    /// Timesteps and noise that a training step draws itself; ordinal = position in the data order.
    TrainingDraw = 9,
    /// Which rows of the prompts are held out.
    Holdout = 10,
    /// Which prompt a trajectory has.
    PromptOrder = 11,
}

/// A stream of random words for one (seed, purpose, ordinal, draw).
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream that (seed, purpose, ordinal, draw) names.
    pub fn new(run_seed: u64, purpose: Purpose, ordinal: u64, draw: u16) -> Self {
        let tag = u32::from(purpose as u16) << 16 | u32::from(draw);
        Self {
            key: [run_seed as u32, (run_seed >> 32) as u32],
            counter: [0, tag, ordinal as u32, (ordinal >> 32) as u32],
            block: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.counter, self.key);
            self.counter[0] = self.counter[0]
                .checked_add(1)
                .expect("a stream holds 2^34 words");
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `0..bound`, without bias (Lemire's multiply and reject).
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "an empty range has no element to draw");
        let reject_under = bound.wrapping_neg() % bound;
        loop {
            let wide = u64::from(self.next_u32()) * u64::from(bound);
            if wide as u32 >= reject_under {
                return (wide >> 32) as u32;
            }
        }
    }

    /// Uniform in (0, 1): the middle of one of 2^32 equal cells.
    pub fn unit(&mut self) -> f64 {
        (f64::from(self.next_u32()) + 0.5) * 2f64.powi(-32)
    }

    /// Fills `out` with standard normal numbers (Box and Muller, both of each pair).
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        for pair in out.chunks_mut(2) {
            let radius = libm::sqrt(-2.0 * libm::log(self.unit()));
            let angle = TAU * self.unit();
            pair[0] = (radius * libm::cos(angle)) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * libm::sin(angle)) as f32;
            }
        }
    }
}

/// `len` standard normal numbers for (seed, purpose, ordinal, draw).
pub fn normal(run_seed: u64, purpose: Purpose, ordinal: u64, draw: u16, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    Stream::new(run_seed, purpose, ordinal, draw).fill_normal(&mut out);
    out
}

/// Ten rounds of Philox4x32.
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * u64::from(counter[0]);
        let b = 0xCD9E_8D57_u64 * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors of Philox publish with Random123.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0]
            ),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn normal_numbers_have_the_moments_of_a_normal() {
        let x = normal(42, Purpose::InitialNoise, 7, 0, 200_000);
        let n = x.len() as f64;
        let moment = |k: i32| x.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / n;
        assert!(moment(1).abs() < 4.0 / n.sqrt());
        assert!((moment(2) - 1.0).abs() < 4.0 * (2.0 / n).sqrt());
        assert!((moment(4) - 3.0).abs() < 4.0 * (96.0 / n).sqrt());
    }

    #[test]
    fn streams_differ_in_every_part_of_their_name() {
        let first = |s: u64, p, o, d| Stream::new(s, p, o, d).next_u64();
        let base = first(1, Purpose::InitialNoise, 1, 0);
        assert_eq!(base, first(1, Purpose::InitialNoise, 1, 0));
        for other in [
            first(2, Purpose::InitialNoise, 1, 0),
            first(1, Purpose::Renoise, 1, 0),
            first(1, Purpose::InitialNoise, 2, 0),
            first(1, Purpose::InitialNoise, 1 << 32, 0),
            first(1, Purpose::InitialNoise, 1, 1),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn below_stays_below_and_reaches_everything() {
        let mut stream = Stream::new(3, Purpose::TrajectoryTimes, 0, 0);
        let mut seen = [0u32; 125];
        for _ in 0..12_500 {
            seen[stream.below(125) as usize] += 1;
        }
        assert!(seen.iter().all(|&n| (50..160).contains(&n)), "{seen:?}");
    }
}
