//! What was checked, how often, and what does not hold.

use std::collections::BTreeMap;
use std::process::ExitCode;

/// Violations of one check that are printed; the others are counted.
const SHOWN: usize = 10;

/// A promise. The names are those of the design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Promise {
    /// The journal's segments have no gap and can be read.
    Journal,
    /// One COMMIT for each task, whose files are whole and have the rows that the plan says.
    I1,
    /// Generations and terms only go up.
    I2,
    /// A stage starts after what it reads was sealed.
    I8,
    /// A checkpoint's COMMIT implies every file with its digest.
    I9,
    /// Nothing of a lower term stands behind a claim of a higher one.
    I11,
    /// Every step along the lineage of a student was taken once.
    I12,
    /// Every stage is sealed, once, with what is stored.
    Sealed,
    /// The run succeeded.
    Outcome,
    /// The run made what the undisturbed one made.
    Equal,
}

impl Promise {
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Self::Journal => ("journal", "segments without a gap, readable"),
            Self::I1 => ("I1", "one COMMIT per task, files whole, rows as planned"),
            Self::I2 => ("I2", "terms and generations strictly increase"),
            Self::I8 => ("I8", "stages started after their inputs were sealed"),
            Self::I9 => ("I9", "checkpoint COMMITs imply their files"),
            Self::I11 => ("I11", "no effect of a lower term behind a higher claim"),
            Self::I12 => ("I12", "steps of each lineage taken once"),
            Self::Sealed => ("sealed", "every stage sealed once, with what is stored"),
            Self::Outcome => ("outcome", "the run succeeded"),
            Self::Equal => ("equal", "same rows, students and results as undisturbed"),
        }
    }
}

/// All checks so far.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    checks: BTreeMap<Promise, (u64, Vec<String>)>,
}

impl Findings {
    /// Counts one look at something that `promise` speaks about.
    pub(crate) fn look(&mut self, promise: Promise) {
        self.checks.entry(promise).or_default().0 += 1;
    }

    /// Something that `promise` says does not hold.
    pub(crate) fn violated(&mut self, promise: Promise, what: impl ToString) {
        let check = self.checks.entry(promise).or_default();
        check.1.push(what.to_string());
    }

    /// Looks at something, and complains when it is not so.
    pub(crate) fn expect(
        &mut self,
        promise: Promise,
        holds: bool,
        what: impl FnOnce() -> String,
    ) -> bool {
        self.look(promise);
        if !holds {
            self.violated(promise, what());
        }
        holds
    }

    /// Prints one line for each check and a summary; the exit code says whether all hold.
    pub(crate) fn tell(&self, run: &str, quiet: bool) -> ExitCode {
        let mut violations = 0;
        for (promise, (looks, found)) in &self.checks {
            let (name, says) = promise.name();
            violations += found.len();
            let verdict = if found.is_empty() { "ok" } else { "VIOLATED" };
            if !quiet || !found.is_empty() {
                println!("{name:<8} {verdict:<9} {looks:>8} looks  {says}");
            }
            for what in found.iter().take(SHOWN) {
                println!("         - {what}");
            }
            if found.len() > SHOWN {
                println!("         - and {} more", found.len() - SHOWN);
            }
        }
        println!("audit: {run}: {violations} violations (goal 0)");
        if violations == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}
