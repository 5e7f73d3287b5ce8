//! Chance that replays: a draw is a function of (seed, who draws, how often it has drawn before).
//!
//! Everybody draws from a stream of their own, so that a history with one fault less changes as little else as can be.

use std::collections::BTreeMap;

/// All streams of one history.
#[derive(Debug, Default)]
pub(super) struct Chance {
    seed: u64,
    drawn: BTreeMap<u64, u64>,
}

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            drawn: BTreeMap::new(),
        }
    }

    /// The next number of `stream`.
    pub(super) fn draw(&mut self, stream: u64) -> u64 {
        let n = self.drawn.entry(stream).or_default();
        *n += 1;
        mix(mix(self.seed ^ mix(stream)).wrapping_add(*n))
    }

    /// Uniform in `0..bound`, near enough for small bounds.
    pub(super) fn below(&mut self, stream: u64, bound: u64) -> u64 {
        self.draw(stream) % bound.max(1)
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
pub(super) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
