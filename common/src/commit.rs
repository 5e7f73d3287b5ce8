//! What a finished attempt says it made: the body of a task's COMMIT.
//!
//! The first COMMIT of a task is the one that counts (control-plane.md §3). It names the attempt, so that two
//! attempts never have equal bytes, and every file with its digest, so that nothing is used unverified.
//! Bytes are canonical: the same commit is always the same bytes. This module must never know who works on
//! what, nor when.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::{Digest, Incarnation, Term};
use crate::storage::layout::Prefix;
use crate::storage::{self, BadEntry, FileEntry, StoredFile};
use crate::task::{Lease, TaskId};
use crate::telemetry::Cost;

/// The version of the body that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// The largest body that is parsed.
pub const MAX_BYTES: usize = 16 << 20;

/// What a finished attempt made.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskCommit {
    /// Who made it.
    pub lease: Lease,
    /// What it was made from: the dataset digest for trajectories, the plan digest for other tasks.
    pub inputs: Digest,
    /// Its files, in the order in which the task lists them.
    pub files: Vec<FileEntry>,
    /// Rows in all files; 0 where there are none.
    pub rows: u64,
    /// Names the layout of the files, as [`crate::latents::schema::RowSchema::id`] does; empty when it needs no name.
    pub schema: String,
    /// Ordinals that were worked on: trajectories, or samples.
    pub ordinals: Range<u64>,
    /// What else the task found, such as the values of metrics. Null when nothing.
    pub result: Value,
    /// What the attempt cost; none where nobody measured it.
    pub cost: Option<Cost>,
}

/// A COMMIT that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is no JSON of the right form.
    #[error("the commit of {folder} is not readable: {reason}")]
    Malformed {
        /// The task's folder.
        folder: String,
        /// What is wrong.
        reason: String,
    },
    /// A later program wrote it.
    #[error(
        "the commit of {folder} has format version {found}; this program reads version {FORMAT_VERSION}"
    )]
    Version {
        /// The task's folder.
        folder: String,
        /// Its version.
        found: u32,
    },
    /// It names a file that it must not name.
    #[error("the commit of {folder} names a file that it must not")]
    Entry {
        /// The task's folder.
        folder: String,
        /// Which, and why.
        source: BadEntry,
    },
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    stage: String,
    index: u64,
    attempt: u32,
    incarnation: u64,
    term: u64,
    inputs: String,
    schema: String,
    rows: u64,
    first_ordinal: u64,
    end_ordinal: u64,
    files: Vec<StoredFile>,
    result: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cost: Option<Cost>,
}

impl TaskCommit {
    /// The canonical bytes.
    pub fn to_bytes(&self) -> Bytes {
        let stored = Stored {
            format_version: FORMAT_VERSION,
            stage: self.lease.task.stage.clone(),
            index: self.lease.task.index,
            attempt: self.lease.attempt,
            incarnation: self.lease.incarnation.0,
            term: self.lease.term.0,
            inputs: self.inputs.to_string(),
            schema: self.schema.clone(),
            rows: self.rows,
            first_ordinal: self.ordinals.start,
            end_ordinal: self.ordinals.end,
            files: self.files.iter().map(StoredFile::from).collect(),
            result: sorted(&self.result),
            cost: self.cost,
        };
        let mut bytes = serde_json::to_vec(&stored).expect("text, numbers and JSON become JSON");
        bytes.push(b'\n');
        bytes.into()
    }

    /// Reads the COMMIT of the task whose folder is `folder`; all its files must lie below it.
    pub fn from_bytes(folder: &Prefix, bytes: &[u8]) -> Result<Self, Error> {
        let malformed = |reason: String| Error::Malformed {
            folder: folder.as_str().into(),
            reason,
        };
        if bytes.len() > MAX_BYTES {
            return Err(malformed(format!("{} bytes are too many", bytes.len())));
        }
        check_version(bytes, folder)?;
        let stored: Stored =
            serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        let inputs = Digest::parse(&stored.inputs)
            .ok_or_else(|| malformed(format!("the digest {:?} is none", stored.inputs)))?;
        if stored.end_ordinal < stored.first_ordinal {
            return Err(malformed("its ordinals end before they begin".into()));
        }
        let files = stored
            .files
            .iter()
            .map(|file| file.check(folder))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| Error::Entry {
                folder: folder.as_str().into(),
                source,
            })?;
        Ok(Self {
            lease: Lease {
                term: Term(stored.term),
                task: TaskId {
                    stage: stored.stage,
                    index: stored.index,
                },
                attempt: stored.attempt,
                incarnation: Incarnation(stored.incarnation),
            },
            inputs,
            files,
            rows: stored.rows,
            schema: stored.schema,
            ordinals: stored.first_ordinal..stored.end_ordinal,
            result: stored.result,
            cost: stored.cost,
        })
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len).sum()
    }
}

/// Looks at the version alone first, so that a later format is named rather than called malformed.
fn check_version(bytes: &[u8], folder: &Prefix) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    match serde_json::from_slice::<Version>(bytes) {
        Ok(version) if version.format_version == FORMAT_VERSION => Ok(()),
        Ok(version) => Err(Error::Version {
            folder: folder.as_str().into(),
            found: version.format_version,
        }),
        Err(error) => Err(Error::Malformed {
            folder: folder.as_str().into(),
            reason: error.to_string(),
        }),
    }
}

/// The same JSON with the keys of every object in order.
pub(crate) fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            Value::Object(
                entries
                    .into_iter()
                    .map(|(k, v)| (k.clone(), sorted(v)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::layout;
    use serde_json::json;

    fn commit() -> (Prefix, TaskCommit) {
        let lease = Lease {
            term: Term(3),
            task: TaskId {
                stage: "evaluate".into(),
                index: 7,
            },
            attempt: 2,
            incarnation: Incarnation::new(Term(3), 5),
        };
        let folder = layout::task("evaluate", 7);
        let key = layout::task_file(&folder, &lease, "moments.safetensors");
        let commit = TaskCommit {
            lease,
            inputs: Digest::of(b"plan"),
            files: vec![FileEntry::of(&key, b"numbers")],
            rows: 64,
            schema: String::new(),
            ordinals: 448..512,
            result: json!({"zeta": 1.5, "alpha": {"b": [1, 2], "a": null}}),
            cost: Some(Cost {
                seconds: 1.25,
                peak_bytes: Some(4096),
            }),
        };
        (folder, commit)
    }

    #[test]
    fn a_commit_is_read_as_it_was_written_and_has_one_spelling() {
        let (folder, commit) = commit();
        let bytes = commit.to_bytes();
        let read = TaskCommit::from_bytes(&folder, &bytes).expect("our own bytes are readable");
        assert_eq!(read.to_bytes(), bytes);
        assert_eq!(read.lease, commit.lease);
        assert_eq!(read.files, commit.files);
        assert_eq!(read.ordinals, 448..512);
        assert_eq!(read.cost, commit.cost);
        let text = std::str::from_utf8(&bytes).expect("JSON is text");
        assert!(
            text.contains(r#""result":{"alpha":{"a":null,"b":[1,2]},"zeta":1.5}"#),
            "{text}"
        );
    }

    #[test]
    fn a_commit_whose_cost_nobody_measured_is_read() {
        let (folder, mut commit) = commit();
        commit.cost = None;
        let bytes = commit.to_bytes();
        let text = std::str::from_utf8(&bytes).expect("JSON is text");
        assert!(!text.contains("cost"), "{text}");
        let read = TaskCommit::from_bytes(&folder, &bytes).expect("readable");
        assert_eq!(read.cost, None);
    }

    #[test]
    fn two_attempts_never_have_equal_bytes() {
        let (_, one) = commit();
        let mut other = one.clone();
        other.lease.incarnation = Incarnation::new(Term(3), 6);
        assert_ne!(one.to_bytes(), other.to_bytes());
    }

    #[test]
    fn a_commit_that_cannot_be_true_is_refused() {
        let (folder, commit) = commit();
        let bytes = commit.to_bytes();
        let text = std::str::from_utf8(&bytes).expect("JSON is text");
        let own_key = commit.files[0].key.as_str();
        for (from, to, part) in [
            (own_key, "run.json", "names a file"),
            (
                own_key,
                "tasks/evaluate/00000007/../../../etc/passwd",
                "names a file",
            ),
            (own_key, "/etc/passwd", "names a file"),
            ("\"format_version\":1", "\"format_version\":2", "version 2"),
            ("\"rows\":64", "\"rows\":-1", "not readable"),
            ("\"rows\":64", "\"rows\":64,\"more\":1", "not readable"),
            ("\"end_ordinal\":512", "\"end_ordinal\":5", "end before"),
        ] {
            assert!(text.contains(from), "{from}");
            let broken = text.replace(from, to);
            let error = TaskCommit::from_bytes(&folder, broken.as_bytes()).expect_err(to);
            assert!(error.to_string().contains(part), "{error}");
        }
        for end in 0..bytes.len() - 1 {
            assert!(
                TaskCommit::from_bytes(&folder, &bytes[..end]).is_err(),
                "cut at {end}"
            );
        }
    }
}
