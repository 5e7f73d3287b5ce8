//! A failing history, made short: faults that it fails without are left out.

use super::history::History;
use super::simulate;
use super::world::Violation;

/// The shortest history that this finds in which the same promise is broken: first halves of the faults are left out,
/// then smaller parts, then single ones.
pub fn shrink(history: &History, violation: &Violation) -> (History, Violation) {
    let (mut best, mut seen) = (history.clone(), violation.clone());
    let mut part = best.faults.len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        while at < best.faults.len() {
            let mut shorter = best.clone();
            let end = (at + part).min(shorter.faults.len());
            shorter.faults.drain(at..end);
            match simulate(&shorter, false) {
                Err(same) if same.invariant == violation.invariant => {
                    (best, seen) = (shorter, same);
                }
                Err(_) | Ok(_) => at += part,
            }
        }
        if part == 1 {
            return (best, seen);
        }
        part = part.div_ceil(2);
    }
}
