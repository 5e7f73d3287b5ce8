//! What a campaign found, and the table of all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
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
    /// What the last line should say as well.
    headlines: Vec<String>,
    /// This host cannot do it.
    is_skipped: bool,
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

    /// A figure for the last line.
    pub(crate) fn headline(&mut self, what: impl ToString) {
        self.headlines.push(what.to_string());
    }

    /// The campaign cannot be done here: nothing was hurt.
    pub(crate) fn skipped(&mut self, why: impl Display) {
        self.is_skipped = true;
        self.note(format_args!("SKIPPED: {why}"));
    }

    /// Something took so long.
    pub(crate) fn took(&mut self, what: &'static str, seconds: f64) {
        self.times.entry(what).or_default().push(seconds);
    }

    /// Violated unless `share` of what was measured took no longer than `goal` seconds.
    pub(crate) fn require_within(&mut self, what: &'static str, share: f64, goal: f64) {
        let Some(seconds) = self.times.get(what) else {
            return;
        };
        let (took, of) = (quantile(seconds, share), seconds.len());
        let percent = share * 100.0;
        let line = format!("{what}: p{percent:.0} {took:.2} s of {of} (goal {goal})");
        self.headlines.push(line);
        if took > goal {
            self.violated(format_args!(
                "{what}: p{percent:.0} is {took:.3} s of {of}, and may be {goal} s at most"
            ));
        }
    }

    /// Takes in another one of the same campaign.
    pub(crate) fn add(&mut self, other: Self) {
        self.faults += other.faults;
        self.runs += other.runs;
        self.violations.extend(other.violations);
        self.notes.extend(other.notes);
        self.headlines.extend(other.headlines);
        self.is_skipped |= other.is_skipped;
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
    /// Figures of those that were asked for.
    headlines: Vec<String>,
    /// Campaigns that this host cannot do.
    skipped: BTreeSet<String>,
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
        if score.is_skipped {
            self.skipped.insert(name.to_owned());
        }
        println!(
            "{name:<18} {:>7} {:>5} {:>10}",
            score.faults,
            score.runs,
            score.violations.len()
        );
        self.headlines.extend(score.headlines.iter().cloned());
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

    /// Prints the last line; the exit code says whether nothing was violated, and, of a campaign that somebody asked
    /// for by name, whether it did anything at all.
    pub(crate) fn tell(&self, title: &str, by_name: bool) -> ExitCode {
        println!("{}", self.last_line(title, by_name));
        if self.is_good(by_name) {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn last_line(&self, title: &str, by_name: bool) -> String {
        let Self {
            faults, violations, ..
        } = self;
        let mut line = format!("{title}: {faults} faults, {violations} violations (goal 0)");
        for headline in self.headlines.iter().filter(|_| by_name) {
            line.push_str("; ");
            line.push_str(headline);
        }
        if !self.skipped.is_empty() {
            let names: Vec<_> = self.skipped.iter().map(String::as_str).collect();
            line.push_str("; skipped: ");
            line.push_str(&names.join(", "));
        }
        line
    }

    fn is_good(&self, by_name: bool) -> bool {
        let did_something = self.skipped.is_empty() && self.faults > 0;
        self.violations == 0 && (did_something || !by_name)
    }
}

/// The smallest of `seconds` that `share` of them do not exceed.
fn quantile(seconds: &[f64], share: f64) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let index = (sorted.len() as f64 * share).ceil() as usize;
    sorted
        .get(index.saturating_sub(1).min(last))
        .copied()
        .unwrap_or(f64::NAN)
}

fn spread(seconds: &[f64]) -> String {
    format!(
        "p50 {:.3} s, p99 {:.3} s, max {:.3} s of {}",
        quantile(seconds, 0.5),
        quantile(seconds, 0.99),
        quantile(seconds, 1.0),
        seconds.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_that_is_missed_is_a_violation() {
        let mut score = Score::default();
        for seconds in [0.1, 0.2, 0.3, 2.5] {
            score.took("grants", seconds);
        }
        score.require_within("grants", 0.5, 0.5);
        score.require_within("never measured", 0.5, 0.5);
        assert!(score.violations.is_empty(), "{:?}", score.violations);
        score.require_within("grants", 0.99, 2.0);
        let expected = "grants: p99 is 2.500 s of 4, and may be 2 s at most";
        assert_eq!(score.violations, [expected]);
        let mut table = Table::default();
        table.add("grants", &score);
        let expected = "bench: 0 faults, 1 violations (goal 0); grants: p50 0.20 s of 4 (goal 0.5); \
                        grants: p99 2.50 s of 4 (goal 2)";
        assert_eq!(table.last_line("bench", true), expected);
    }

    #[test]
    fn a_campaign_that_was_asked_for_and_hurt_nothing_is_no_success() {
        let mut skipped = Score::default();
        skipped.skipped("no root");
        let mut table = Table::default();
        assert!(!table.is_good(true), "no faults");
        table.add("clock", &skipped);
        assert!(table.is_good(false) && !table.is_good(true));
        let expected = "chaos: 0 faults, 0 violations (goal 0); skipped: clock";
        assert_eq!(table.last_line("chaos", false), expected);
    }
}
