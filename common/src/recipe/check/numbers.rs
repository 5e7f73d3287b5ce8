//! Arithmetic of grids, milestones and shares, for rules and for the ways out they name.

use super::scalar::either;
use super::sections::TIMES;

/// The last training time; milestones are cut from it (algorithm.md §2.2).
const LAST_TIME: u64 = TIMES - 1;

/// The first milestone of `segments` that a grid of `grid` times lacks.
pub(super) fn first_off_grid(grid: u64, segments: u64) -> Option<u64> {
    let spacing = TIMES / grid;
    (1..=segments)
        .map(|k| k * LAST_TIME / segments)
        .find(|tau| !(tau + 1).is_multiple_of(spacing))
}

/// The divisors of `n` below it, in words, largest first.
pub(super) fn divisors(n: u32) -> String {
    let all: Vec<String> = (1..=n)
        .rev()
        .filter(|d| n.is_multiple_of(*d) && *d < n)
        .map(|d| d.to_string())
        .collect();
    match all.as_slice() {
        [] => "1".into(),
        all => either(&all.iter().map(String::as_str).collect::<Vec<_>>()),
    }
}

/// The divisors of the number of training times nearest to `n`, in words.
pub(super) fn near_divisors(n: u64) -> String {
    let below = (1..=n).rev().find(|d| TIMES.is_multiple_of(*d));
    let above = (n..=TIMES).find(|d| TIMES.is_multiple_of(*d));
    let both: Vec<String> = [below, above]
        .iter()
        .flatten()
        .map(u64::to_string)
        .collect();
    either(&both.iter().map(String::as_str).collect::<Vec<_>>())
}
