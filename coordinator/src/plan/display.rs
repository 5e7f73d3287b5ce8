//! The plan as a table.

use std::fmt;

use super::{Plan, Stage, Work};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<14} {:<13} {:<18} {:>12} {:>10}  after",
            "stage", "kind", "work", "rows", "bytes"
        )?;
        for stage in &self.stages {
            self.row(f, stage)?;
        }
        Ok(())
    }
}

impl Plan {
    fn row(&self, f: &mut fmt::Formatter<'_>, stage: &Stage) -> fmt::Result {
        let (work, rows, size) = match &stage.work {
            Work::Tasks(tasks) => (plural(tasks.count, "task"), tasks.rows, bytes(tasks.bytes)),
            Work::Training(training) => (
                plural(training.steps, "step"),
                training.steps * training.global_batch,
                String::from("-"),
            ),
        };
        let after: Vec<_> = stage
            .after
            .iter()
            .map(|&position| self.stages[position].name.as_str())
            .collect();
        writeln!(
            f,
            "{:<14} {:<13} {:<18} {:>12} {:>10}  {}",
            stage.name,
            stage.kind.as_str(),
            work,
            grouped(rows),
            size,
            after.join(", ")
        )
    }
}

fn plural(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(n), if n == 1 { "" } else { "s" })
}

/// `1234567` as `1,234,567`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in the largest unit that leaves at least one before the point.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 * 1024 * 1024 / 2), "1.5 MiB");
    }
}
