//! A fault at every operation on the store: a small run is repeated once for each operation and each way to fail.

use super::history::{History, Strike};
use super::simulate;
use super::world::Violation;

/// What a sweep came to.
#[derive(Debug, Clone, Default)]
pub struct Sweep {
    /// Operations of a run without faults.
    pub operations: u64,
    /// Runs with one fault.
    pub runs: u64,
    /// Where a promise was broken.
    pub failures: Vec<(u64, Strike, Violation)>,
}

/// Repeats the run for every `stride`-th operation, from the first.
///
/// # Errors
/// When the run without faults already breaks a promise.
pub fn sweep(stride: u64) -> Result<Sweep, Violation> {
    let undisturbed = simulate(&History::small(None), false)?;
    let mut sweep = Sweep {
        operations: undisturbed.operations,
        ..Sweep::default()
    };
    for operation in (0..undisturbed.operations).step_by(stride.max(1) as usize) {
        for strike in Strike::ALL {
            sweep.runs += 1;
            match simulate(&History::small(Some((operation, strike))), false) {
                Ok(account) if account.remains == undisturbed.remains => {}
                Ok(account) => sweep.failures.push((
                    operation,
                    strike,
                    Violation {
                        invariant: "remains",
                        seen: format!("{:?} instead of {:?}", account.remains, undisturbed.remains),
                        event: account.events,
                        at: account.elapsed,
                    },
                )),
                Err(violation) => sweep.failures.push((operation, strike, violation)),
            }
        }
    }
    Ok(sweep)
}
