//! What a campaign found, and the table of all of them.

use std::collections::BTreeMap;
use std::process::ExitCode;

/// Violations that are printed in full.
const SHOWN: usize = 5;

/// What a campaign found.
#[derive(Debug, Default)]
pub(crate) struct Score {
    pub(crate) faults: u64,
    pub(crate) runs: u64,
    violations: Vec<String>,
    notes: Vec<String>,
    /// Seconds, by what was measured.
    times: BTreeMap<&'static str, Vec<f64>>,
}

impl Score {
    /// A promise was broken.
    pub(crate) fn violated(&mut self, what: impl ToString) {
        self.violations.push(what.to_string());
    }

    /// Something that people should know.
    pub(crate) fn note(&mut self, what: impl ToString) {
        self.notes.push(what.to_string());
    }

    /// Something took so long.
    pub(crate) fn took(&mut self, what: &'static str, seconds: f64) {
        self.times.entry(what).or_default().push(seconds);
    }

    /// The value below which that share of the times of `what` lies; none when there are none.
    pub(crate) fn quantile(&self, what: &str, share: f64) -> Option<f64> {
        let mut sorted = self.times.get(what)?.clone();
        sorted.sort_by(f64::total_cmp);
        let index = (sorted.len() as f64 * share).ceil() as usize;
        sorted.get(index.saturating_sub(1)).copied()
    }

    /// Takes in another one of the same campaign.
    pub(crate) fn add(&mut self, other: Self) {
        self.faults += other.faults;
        self.runs += other.runs;
        self.violations.extend(other.violations);
        self.notes.extend(other.notes);
        for (what, seconds) in other.times {
            self.times.entry(what).or_default().extend(seconds);
        }
    }
}

/// All campaigns.
#[derive(Debug, Default)]
pub(crate) struct Table {
    faults: u64,
    violations: usize,
    began: bool,
}

impl Table {
    /// Prints what a campaign found.
    pub(crate) fn add(&mut self, name: &str, score: &Score) {
        if !self.began {
            println!(
                "{:<18} {:>7} {:>5} {:>10}",
                "campaign", "faults", "runs", "violations"
            );
            self.began = true;
        }
        self.faults += score.faults;
        self.violations += score.violations.len();
        println!(
            "{name:<18} {:>7} {:>5} {:>10}",
            score.faults,
            score.runs,
            score.violations.len()
        );
        for (what, seconds) in &score.times {
            println!("    {what}: {}", spread(seconds));
        }
        for note in &score.notes {
            println!("    {note}");
        }
        for violation in score.violations.iter().take(SHOWN) {
            println!("    VIOLATION: {}", violation.replace('\n', "\n      "));
        }
    }

    /// Prints the last line; the exit code says whether nothing was violated.
    pub(crate) fn tell(&self) -> ExitCode {
        let Self {
            faults, violations, ..
        } = self;
        println!("chaos: {faults} faults, {violations} violations (goal 0)");
        if *violations == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

fn spread(seconds: &[f64]) -> String {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let last = sorted.len().saturating_sub(1);
        let index = (sorted.len() as f64 * share).ceil() as usize;
        sorted
            .get(index.saturating_sub(1).min(last))
            .copied()
            .unwrap_or(f64::NAN)
    };
    format!(
        "p50 {:.3} s, p99 {:.3} s, max {:.3} s of {}",
        at(0.5),
        at(0.99),
        at(1.0),
        sorted.len()
    )
}
