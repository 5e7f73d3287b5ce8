//! Training curves: one JSON line for each optimizer step, stored in every checkpoint as `metrics.jsonl`.

use serde::{Deserialize, Serialize};

use crate::ledger::Ledger;

/// Number of equal timestep bins that losses are collected in.
pub const TIME_BINS: usize = 10;

/// What one optimizer step showed. Losses are means over the global batch; a bin without rows has none.
///
/// JSON has no word for NaN or infinity, so a number that is not finite is not there: see [`finite`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// Steps applied so far in the stage, from 1.
    pub step: u64,
    /// Generation of the group that took the step.
    pub generation: u64,
    /// Engines in the group.
    pub world: u32,
    /// Mean loss; none where it was not finite.
    pub loss: Option<f64>,
    /// Mean loss of the rows of each segment, noisiest last.
    pub loss_by_segment: Vec<Option<f64>>,
    /// Mean loss of the rows of each of [`TIME_BINS`] timestep bins, cleanest first.
    pub loss_by_time: Vec<Option<f64>>,
    /// Global gradient norm before clipping; none where it was not finite.
    pub grad_norm: Option<f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Whether a non-finite gradient made the step change nothing.
    pub skipped: bool,
    /// The rows that the step consumed, summed over all ranks; none in curves of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Ledger>,
    /// Wall time of the step.
    pub step_ms: f64,
    /// Part of it that waited for rows.
    pub wait_ms: f64,
    /// Part of it that the group's sums and copies took, waiting for other ranks in them included; none in curves of older
    /// versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sum_ms: Option<f64>,
    /// Part of it that took a copy of the state for a checkpoint; none where no checkpoint was due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_ms: Option<f64>,
    /// On a checkpoint's last step, the most memory that the engine which saves had since it joined the group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

/// `value`, unless it is NaN or infinite.
pub fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// One line each, with a newline at the end.
pub fn to_jsonl(records: &[StepRecord]) -> Vec<u8> {
    let mut text = Vec::new();
    for record in records {
        serde_json::to_writer(&mut text, record).expect("a record of numbers is JSON");
        text.push(b'\n');
    }
    text
}

/// A line of curves that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the training curves is not a step record")]
pub struct BadLine {
    /// Counted from 1.
    pub line: usize,
    /// What the parser says.
    #[source]
    pub source: serde_json::Error,
}

/// Reads what [`to_jsonl`] wrote.
pub fn from_jsonl(text: &[u8]) -> Result<Vec<StepRecord>, BadLine> {
    text.split(|&b| b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(i, line)| {
            serde_json::from_slice(line).map_err(|source| BadLine {
                line: i + 1,
                source,
            })
        })
        .collect()
}

/// The timestep bin of `t` in `0..train_times`.
pub fn time_bin(t: i64, train_times: i64) -> usize {
    let bin = t.clamp(0, train_times - 1) * TIME_BINS as i64 / train_times;
    usize::try_from(bin).expect("a clamped time has a bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            generation: 1,
            world: 2,
            loss: Some(0.125),
            loss_by_segment: vec![Some(0.25), None],
            loss_by_time: vec![None; TIME_BINS],
            grad_norm: Some(1.5),
            lr: 1e-4,
            skipped: false,
            rows: Some(Ledger::of(step * 8..step * 8 + 8)),
            step_ms: 3.25,
            wait_ms: 0.0,
            sum_ms: Some(0.5),
            save_ms: step.is_multiple_of(2).then_some(0.5),
            peak_bytes: step.is_multiple_of(2).then_some(1 << 20),
        }
    }

    #[test]
    fn curves_read_what_they_write() {
        let records = vec![record(1), record(2)];
        let text = to_jsonl(&records);
        assert_eq!(from_jsonl(&text).expect("own lines"), records);
    }

    /// A step whose gradient was not finite once made every later checkpoint unreadable.
    #[test]
    fn a_skipped_step_is_read_as_it_was_written() {
        let skipped = StepRecord {
            loss: finite(f64::NAN),
            loss_by_segment: vec![finite(f64::INFINITY), Some(0.5)],
            grad_norm: finite(f64::INFINITY),
            skipped: true,
            ..record(2)
        };
        let records = vec![record(1), skipped, record(3)];
        assert_eq!(from_jsonl(&to_jsonl(&records)).expect("own lines"), records);
    }

    /// Lines of runs from before, with numbers everywhere or with the nulls of a skipped step.
    #[test]
    fn older_lines_are_read() {
        let line = |loss: &str| {
            format!(
                r#"{{"step":1,"generation":1,"world":2,"loss":{loss},"loss_by_segment":[{loss},null],"#
            ) + &format!(
                r#""loss_by_time":[],"grad_norm":{loss},"lr":0.1,"skipped":true,"step_ms":1.0,"wait_ms":0.0}}"#
            )
        };
        for (written, read) in [("0.5", Some(0.5)), ("null", None)] {
            let records = from_jsonl(line(written).as_bytes()).expect("an older line");
            assert_eq!((records[0].loss, records[0].grad_norm), (read, read));
            assert_eq!(records[0].loss_by_segment, [read, None]);
        }
    }

    #[test]
    fn what_was_not_measured_is_left_out() {
        let text = String::from_utf8(to_jsonl(&[record(1)])).expect("JSON is text");
        assert!(
            !text.contains("save_ms") && !text.contains("peak_bytes"),
            "{text}"
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        let mut text = to_jsonl(&[record(1)]);
        text.extend_from_slice(b"{\"step\": 2}\n");
        assert_eq!(from_jsonl(&text).expect_err("half a record").line, 2);
    }

    #[test]
    fn bins_cover_all_times() {
        assert_eq!(
            (time_bin(0, 1000), time_bin(99, 1000), time_bin(100, 1000)),
            (0, 0, 1)
        );
        assert_eq!((time_bin(999, 1000), time_bin(5000, 1000)), (9, 9));
    }
}
