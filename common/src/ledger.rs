//! The ledger of a training step: which rows of the dataset it has consumed, as sixteen numbers that add up over any
//! split of the step's batch.
//!
//! A step of a million rows cannot list them. Instead each row gives the sixteen hexadecimal digits of a mixed form of
//! its number, and the digits are added up place by place, over forward passes, ranks and whatever carries the sums.
//! A row that is left out, taken twice or taken for another changes them, with a chance of a miss of about 2^-40 for a
//! pair of errors that cancel. The sums stay exact in f32 for batches of up to 2^20 rows, which is as many as a recipe
//! may ask for, so that they can travel with the gradient.

use serde::{Deserialize, Serialize};

use crate::order::mix;

/// Numbers in a ledger.
pub const PLACES: usize = 16;

/// What a step has consumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ledger([u32; PLACES]);

impl Ledger {
    /// The ledger of these rows.
    pub fn of(rows: impl IntoIterator<Item = u64>) -> Self {
        let mut ledger = Self::default();
        for row in rows {
            let mixed = mix(row);
            for (place, sum) in ledger.0.iter_mut().enumerate() {
                *sum += (mixed >> (4 * place) & 15) as u32;
            }
        }
        ledger
    }

    /// The sums, lowest digit first.
    pub fn sums(&self) -> [u32; PLACES] {
        self.0
    }
}

impl From<[u32; PLACES]> for Ledger {
    fn from(sums: [u32; PLACES]) -> Self {
        Self(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_adds_up_over_any_split_and_sees_what_is_wrong() {
        let add = |a: Ledger, b: Ledger| {
            let mut sums = a.sums();
            for (sum, more) in sums.iter_mut().zip(b.sums()) {
                *sum += more;
            }
            Ledger::from(sums)
        };
        let whole = Ledger::of(100..164);
        for cut in [100, 101, 130, 163] {
            assert_eq!(add(Ledger::of(100..cut), Ledger::of(cut..164)), whole);
        }
        assert_eq!(Ledger::of((100..164).rev()), whole, "order does not matter");
        for wrong in [
            Ledger::of(100..163),
            Ledger::of((100..163).chain([100])),
            Ledger::of((100..163).chain([164])),
            Ledger::of(101..165),
        ] {
            assert_ne!(wrong, whole);
        }
    }

    #[test]
    fn the_largest_batch_adds_up_exactly_in_f32() {
        let most = 15 * (1u64 << 20);
        assert!(most < 1 << 24, "f32 counts to 2^24");
    }

    /// From a second implementation, written in Python.
    #[test]
    fn the_ledger_is_pinned() {
        assert_eq!(Ledger::of([0, 1, 2]).sums(), PINNED);
    }

    const PINNED: [u32; PLACES] = [
        30, 34, 31, 22, 22, 10, 32, 16, 35, 30, 26, 15, 18, 7, 10, 32,
    ];
}
