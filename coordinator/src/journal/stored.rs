//! The stored form of segments: one JSON object each. Serde stops here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::task::FailureClass;

use super::Spent;
use crate::scheduler::{Checkpoint, Outcome, Record};

const FORMAT_VERSION: u32 = 1;

/// A segment as it is used.
pub(super) struct Segment {
    pub(super) term: Term,
    /// Names the process that wrote it.
    pub(super) writer: String,
    /// None in journals of before it was recorded.
    pub(super) spent: Option<Spent>,
    pub(super) records: Vec<Record>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSegment {
    format_version: u32,
    term: u64,
    /// Makes the bytes of two writers differ, so that a store can tell them apart, and says which claim of a term a
    /// segment belongs to.
    writer: String,
    #[serde(default)]
    spent: Option<StoredSpent>,
    records: Vec<StoredRecord>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSpent {
    elapsed_ms: u64,
    peak_bytes: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case", deny_unknown_fields)]
enum StoredRecord {
    TermClaimed {
        term: u64,
        endpoint: String,
    },
    StageStarted {
        stage: String,
    },
    StageSealed {
        stage: String,
        digest: String,
    },
    GrantsReached {
        stage: String,
        below: u64,
    },
    GenerationFormed {
        generation: u64,
        stage: String,
        members: Vec<u64>,
        base_step: u64,
        base: Option<String>,
    },
    GenerationFailed {
        generation: u64,
        stage: String,
        reason: String,
        counted: bool,
        /// Not in segments of older versions.
        #[serde(default)]
        further: bool,
    },
    CheckpointCommitted {
        stage: String,
        checkpoint: StoredCheckpoint,
    },
    TaskFailedCounted {
        stage: String,
        index: u64,
        class: String,
        message: String,
    },
    Quarantined {
        stage: String,
        index: u64,
        message: String,
    },
    Paused {
        reason: String,
    },
    Resumed,
    RunFinished {
        outcome: StoredOutcome,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredCheckpoint {
    step: u64,
    generation: u64,
    key: String,
    digest: String,
    is_final: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum StoredOutcome {
    Succeeded,
    Failed { message: String },
    Cancelled { reason: String },
    Stopped { reason: String },
}

/// The bytes of a segment.
pub(super) fn write(term: Term, writer: &str, spent: Spent, records: &[Record]) -> Vec<u8> {
    let segment = StoredSegment {
        format_version: FORMAT_VERSION,
        term: term.0,
        writer: writer.to_owned(),
        spent: Some(StoredSpent {
            elapsed_ms: u64::try_from(spent.elapsed.as_millis()).unwrap_or(u64::MAX),
            peak_bytes: spent.peak_bytes,
        }),
        records: records.iter().map(to_stored).collect(),
    };
    let mut bytes = serde_json::to_vec(&segment).expect("text and numbers become JSON");
    bytes.push(b'\n');
    bytes
}

/// Reads a segment.
pub(super) fn parse(bytes: &[u8]) -> Result<Segment, String> {
    let segment: StoredSegment =
        serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if segment.format_version != FORMAT_VERSION {
        return Err(format!(
            "it has format version {}; this program reads version {FORMAT_VERSION}",
            segment.format_version
        ));
    }
    Ok(Segment {
        term: Term(segment.term),
        writer: segment.writer,
        spent: segment.spent.map(|spent| Spent {
            elapsed: Duration::from_millis(spent.elapsed_ms),
            peak_bytes: spent.peak_bytes,
        }),
        records: segment
            .records
            .into_iter()
            .map(from_stored)
            .collect::<Result<_, _>>()?,
    })
}

fn to_stored(record: &Record) -> StoredRecord {
    match record.clone() {
        Record::TermClaimed { term, endpoint } => StoredRecord::TermClaimed {
            term: term.0,
            endpoint,
        },
        Record::StageStarted { stage } => StoredRecord::StageStarted { stage },
        Record::StageSealed { stage, digest } => StoredRecord::StageSealed {
            stage,
            digest: digest.to_string(),
        },
        Record::GrantsReached { stage, below } => StoredRecord::GrantsReached { stage, below },
        Record::GenerationFormed {
            generation,
            stage,
            members,
            base_step,
            base,
        } => StoredRecord::GenerationFormed {
            generation: generation.0,
            stage,
            members: members.iter().map(|member| member.0).collect(),
            base_step,
            base,
        },
        Record::GenerationFailed {
            generation,
            stage,
            reason,
            counted,
            further,
        } => StoredRecord::GenerationFailed {
            generation: generation.0,
            stage,
            reason,
            counted,
            further,
        },
        Record::CheckpointCommitted { stage, checkpoint } => StoredRecord::CheckpointCommitted {
            stage,
            checkpoint: checkpoint_to_stored(checkpoint),
        },
        Record::TaskFailedCounted {
            stage,
            index,
            class,
            message,
        } => StoredRecord::TaskFailedCounted {
            stage,
            index,
            class: format!("{class:?}"),
            message,
        },
        Record::Quarantined {
            stage,
            index,
            message,
        } => StoredRecord::Quarantined {
            stage,
            index,
            message,
        },
        Record::Paused { reason } => StoredRecord::Paused { reason },
        Record::Resumed => StoredRecord::Resumed,
        Record::RunFinished(outcome) => {
            let outcome = outcome_to_stored(outcome);
            StoredRecord::RunFinished { outcome }
        }
    }
}

fn from_stored(record: StoredRecord) -> Result<Record, String> {
    Ok(match record {
        StoredRecord::TermClaimed { term, endpoint } => Record::TermClaimed {
            term: Term(term),
            endpoint,
        },
        StoredRecord::StageStarted { stage } => Record::StageStarted { stage },
        StoredRecord::StageSealed { stage, digest } => Record::StageSealed {
            stage,
            digest: parse_digest(&digest)?,
        },
        StoredRecord::GrantsReached { stage, below } => Record::GrantsReached { stage, below },
        StoredRecord::GenerationFormed {
            generation,
            stage,
            members,
            base_step,
            base,
        } => Record::GenerationFormed {
            generation: Generation(generation),
            stage,
            members: members.into_iter().map(Incarnation).collect(),
            base_step,
            base,
        },
        StoredRecord::GenerationFailed {
            generation,
            stage,
            reason,
            counted,
            further,
        } => Record::GenerationFailed {
            generation: Generation(generation),
            stage,
            reason,
            counted,
            further,
        },
        StoredRecord::CheckpointCommitted { stage, checkpoint } => Record::CheckpointCommitted {
            stage,
            checkpoint: checkpoint_from_stored(checkpoint)?,
        },
        StoredRecord::TaskFailedCounted {
            stage,
            index,
            class,
            message,
        } => Record::TaskFailedCounted {
            stage,
            index,
            class: parse_class(&class)?,
            message,
        },
        StoredRecord::Quarantined {
            stage,
            index,
            message,
        } => Record::Quarantined {
            stage,
            index,
            message,
        },
        StoredRecord::Paused { reason } => Record::Paused { reason },
        StoredRecord::Resumed => Record::Resumed,
        StoredRecord::RunFinished { outcome } => Record::RunFinished(outcome_from_stored(outcome)),
    })
}

pub(super) fn checkpoint_to_stored(checkpoint: Checkpoint) -> StoredCheckpoint {
    StoredCheckpoint {
        step: checkpoint.step,
        generation: checkpoint.generation.0,
        key: checkpoint.key,
        digest: checkpoint.digest.to_string(),
        is_final: checkpoint.is_final,
    }
}

pub(super) fn checkpoint_from_stored(checkpoint: StoredCheckpoint) -> Result<Checkpoint, String> {
    Ok(Checkpoint {
        step: checkpoint.step,
        generation: Generation(checkpoint.generation),
        digest: parse_digest(&checkpoint.digest)?,
        key: checkpoint.key,
        is_final: checkpoint.is_final,
    })
}

pub(super) fn outcome_to_stored(outcome: Outcome) -> StoredOutcome {
    match outcome {
        Outcome::Succeeded => StoredOutcome::Succeeded,
        Outcome::Failed { message } => StoredOutcome::Failed { message },
        Outcome::Cancelled { reason } => StoredOutcome::Cancelled { reason },
        Outcome::Stopped { reason } => StoredOutcome::Stopped { reason },
    }
}

pub(super) fn outcome_from_stored(outcome: StoredOutcome) -> Outcome {
    match outcome {
        StoredOutcome::Succeeded => Outcome::Succeeded,
        StoredOutcome::Failed { message } => Outcome::Failed { message },
        StoredOutcome::Cancelled { reason } => Outcome::Cancelled { reason },
        StoredOutcome::Stopped { reason } => Outcome::Stopped { reason },
    }
}

fn parse_digest(text: &str) -> Result<Digest, String> {
    Digest::parse(text).ok_or_else(|| format!("the digest {text:?} is none"))
}

fn parse_class(text: &str) -> Result<FailureClass, String> {
    FailureClass::ALL
        .into_iter()
        .find(|class| format!("{class:?}") == text)
        .ok_or_else(|| format!("the class {text:?} is none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_record() -> Vec<Record> {
        let digest = Digest::of(b"x");
        let stage = || String::from("seg8");
        vec![
            Record::TermClaimed {
                term: Term(3),
                endpoint: "127.0.0.1:1".into(),
            },
            Record::StageStarted { stage: stage() },
            Record::StageSealed {
                stage: stage(),
                digest,
            },
            Record::GrantsReached {
                stage: stage(),
                below: 2000,
            },
            Record::GenerationFormed {
                generation: Generation(4),
                stage: stage(),
                members: vec![Incarnation(1), Incarnation(2)],
                base_step: 250,
                base: Some("checkpoints/seg8/0000000250-g3/COMMIT".into()),
            },
            Record::GenerationFailed {
                generation: Generation(4),
                stage: stage(),
                reason: "rank 1 left".into(),
                counted: true,
                further: false,
            },
            Record::CheckpointCommitted {
                stage: stage(),
                checkpoint: Checkpoint {
                    step: 500,
                    generation: Generation(4),
                    key: "k".into(),
                    digest,
                    is_final: true,
                },
            },
            Record::TaskFailedCounted {
                stage: stage(),
                index: 7,
                class: FailureClass::OutOfMemory,
                message: "no \"memory\"\n".into(),
            },
            Record::Quarantined {
                stage: stage(),
                index: 8,
                message: "empty prompt".into(),
            },
            Record::Paused {
                reason: "why".into(),
            },
            Record::Resumed,
            Record::RunFinished(Outcome::Cancelled {
                reason: "why".into(),
            }),
            Record::RunFinished(Outcome::Succeeded),
            Record::RunFinished(Outcome::Failed {
                message: "why".into(),
            }),
            Record::RunFinished(Outcome::Stopped {
                reason: "why".into(),
            }),
        ]
    }

    fn spent() -> Spent {
        Spent {
            elapsed: Duration::from_millis(2500),
            peak_bytes: Some(30 << 20),
        }
    }

    #[test]
    fn a_segment_of_before_costs_were_recorded_is_read() {
        let old = br#"{"format_version":1,"term":2,"writer":"w","records":[]}"#;
        let segment = parse(old).expect("it is whole");
        assert_eq!((segment.term, segment.spent), (Term(2), None));
    }

    #[test]
    fn every_record_is_read_as_it_was_written() {
        let bytes = write(Term(3), "w", spent(), &every_record());
        let segment = parse(&bytes).expect("our own bytes are readable");
        assert_eq!((segment.term, segment.spent), (Term(3), Some(spent())));
        assert_eq!(segment.records, every_record());
    }

    #[test]
    fn a_broken_or_later_segment_is_refused() {
        let bytes = write(Term(3), "w", spent(), &every_record());
        for end in 0..bytes.len() - 1 {
            assert!(parse(&bytes[..end]).is_err(), "cut at {end}");
        }
        let later = String::from_utf8(bytes)
            .expect("JSON is text")
            .replace("\"format_version\":1", "\"format_version\":2");
        assert!(parse(later.as_bytes()).is_err_and(|e| e.contains("version 2")));
    }
}
