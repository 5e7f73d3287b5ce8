//! What a run is: the record made once at its start, and the digest that names its trajectories.
//!
//! Everything that a result's bits depend on is here, so that a resumed run can see whether it still is the
//! same. No secret reaches it, and this module must never know how a run goes.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::commit::sorted;
use crate::ids::Digest;
use crate::recipe::Recipe;
use crate::storage::{self, Store};

/// The version of the record that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// What a run is. Stored as `run.json`, create-only.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRecord {
    /// Names this run among all runs; version 7, so that ids sort by time.
    pub run_id: Uuid,
    /// The checked recipe as it is stored, without secrets.
    pub recipe: Value,
    /// Digest of what in the recipe a result depends on.
    pub recipe_digest: Digest,
    /// Digest that names the trajectories, where the run has any.
    pub dataset_digest: Option<Digest>,
    /// SHA-256 of every teacher file that was read, by its path in the teacher's folder.
    pub teacher_files: BTreeMap<String, Digest>,
    /// The lists of prompts by name (`train`, `holdout`, `preview`).
    pub prompts: BTreeMap<String, PromptDigest>,
    /// What computes.
    pub software: Software,
}

/// A list of prompts, by its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptDigest {
    /// Digest of all texts in order.
    pub digest: Digest,
    /// How many there are.
    pub count: u64,
}

/// What computes: results are equal bit for bit only where all of this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Software {
    /// Version of this program.
    pub distillery: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// CPU instruction set that libtorch chose, such as `AVX2`.
    pub cpu_capability: String,
}

/// A `run.json` that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is no JSON of the right form.
    #[error("the run record is not readable: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// A later program wrote it.
    #[error(
        "the run record has format version {found}; this program reads version {FORMAT_VERSION}"
    )]
    Version {
        /// Its version.
        found: u32,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    run_id: String,
    recipe_digest: String,
    dataset_digest: Option<String>,
    software: Software,
    teacher_files: BTreeMap<String, String>,
    prompts: BTreeMap<String, StoredPrompts>,
    recipe: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredPrompts {
    digest: String,
    count: u64,
}

impl RunRecord {
    /// The canonical bytes.
    pub fn to_bytes(&self) -> Bytes {
        let stored = Stored {
            format_version: FORMAT_VERSION,
            run_id: self.run_id.to_string(),
            recipe_digest: self.recipe_digest.to_string(),
            dataset_digest: self.dataset_digest.map(|digest| digest.to_string()),
            software: self.software.clone(),
            teacher_files: self
                .teacher_files
                .iter()
                .map(|(path, digest)| (path.clone(), digest.to_string()))
                .collect(),
            prompts: self
                .prompts
                .iter()
                .map(|(name, list)| {
                    let digest = list.digest.to_string();
                    (
                        name.clone(),
                        StoredPrompts {
                            digest,
                            count: list.count,
                        },
                    )
                })
                .collect(),
            recipe: sorted(&self.recipe),
        };
        let mut bytes =
            serde_json::to_vec_pretty(&stored).expect("text, numbers and JSON become JSON");
        bytes.push(b'\n');
        bytes.into()
    }

    /// Reads a stored record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let malformed = |error: serde_json::Error| Error::Malformed {
            reason: error.to_string(),
        };
        let value: Value = serde_json::from_slice(bytes).map_err(malformed)?;
        let version = value.get("format_version").and_then(Value::as_u64);
        match version {
            Some(found) if found != u64::from(FORMAT_VERSION) => {
                return Err(Error::Version {
                    found: u32::try_from(found).unwrap_or(u32::MAX),
                });
            }
            _ => {}
        }
        let stored: Stored = serde_json::from_value(value).map_err(malformed)?;
        Ok(Self {
            run_id: Uuid::parse_str(&stored.run_id).map_err(|error| Error::Malformed {
                reason: format!("run_id: {error}"),
            })?,
            recipe_digest: digest(&stored.recipe_digest)?,
            dataset_digest: stored.dataset_digest.as_deref().map(digest).transpose()?,
            software: stored.software,
            teacher_files: stored
                .teacher_files
                .into_iter()
                .map(|(path, text)| Ok((path, digest(&text)?)))
                .collect::<Result<_, Error>>()?,
            prompts: stored
                .prompts
                .into_iter()
                .map(|(name, list)| {
                    let digest = digest(&list.digest)?;
                    Ok((
                        name,
                        PromptDigest {
                            digest,
                            count: list.count,
                        },
                    ))
                })
                .collect::<Result<_, Error>>()?,
            recipe: stored.recipe,
        })
    }
}

fn digest(text: &str) -> Result<Digest, Error> {
    Digest::parse(text).ok_or_else(|| Error::Malformed {
        reason: format!("the digest {text:?} is none"),
    })
}

/// All that the bits of a set of trajectories depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetParts<'a> {
    /// SHA-256 of every teacher file that takes part (denoiser, text encoders, tokenizers, VAE, scheduler), by path.
    pub teacher_files: &'a BTreeMap<String, Digest>,
    /// The prompts that trajectories are drawn for.
    pub prompts: &'a PromptDigest,
    /// The run's seed.
    pub seed: u64,
    /// Guidance scale w.
    pub guidance: f64,
    /// Name of the way in which states are drawn.
    pub mode: &'a str,
    /// Segments of the finest stage.
    pub segments: u32,
    /// Times that states may lie on; none = every integer time.
    pub time_grid: Option<u32>,
    /// Number of trajectories.
    pub count: u64,
    /// Trajectories in one shard.
    pub shard_trajectories: u64,
    /// Trajectories computed together.
    pub batch: u64,
    /// CPU threads of one engine; none = the host's own number, which makes bits depend on the host.
    pub threads: Option<u32>,
    /// What the teacher is computed in (`f32`, `f16`, `bf16`).
    pub dtype: &'a str,
    /// What computes.
    pub software: &'a Software,
}

/// The store that holds the trajectories a run trains on: its own, or that of the run whose set it reuses
/// (`trajectories.uri`).
pub fn dataset_store(own: &Store, recipe: &Recipe) -> Result<Store, storage::Error> {
    match &recipe.trajectories.uri {
        Some(uri) => Store::open(uri),
        None => Ok(own.clone()),
    }
}

/// Names a set of trajectories: SHA-256 of the JSON of all parts in the order of [`DatasetParts`], after the
/// version of the row format. Equal digests mean equal rows.
pub fn dataset_digest(parts: &DatasetParts<'_>) -> Digest {
    let teacher: BTreeMap<_, _> = parts
        .teacher_files
        .iter()
        .map(|(path, digest)| (path, digest.to_string()))
        .collect();
    let named = serde_json::json!([
        ["rows", crate::latents::schema::FORMAT_VERSION],
        ["teacher", teacher],
        [
            "prompts",
            parts.prompts.digest.to_string(),
            parts.prompts.count
        ],
        ["seed", parts.seed],
        // Bits rather than decimals: no printer takes part in an identity.
        ["guidance", parts.guidance.to_bits()],
        ["mode", parts.mode],
        ["segments", parts.segments],
        ["time_grid", parts.time_grid],
        ["count", parts.count],
        ["shard_trajectories", parts.shard_trajectories],
        ["batch", parts.batch],
        ["threads", parts.threads],
        ["dtype", parts.dtype],
        [
            "software",
            parts.software.libtorch,
            parts.software.cpu_capability
        ],
    ]);
    Digest::of(named.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn software() -> Software {
        Software {
            distillery: "0.1.0".into(),
            libtorch: "2.11.0".into(),
            cpu_capability: "AVX2".into(),
        }
    }

    fn record() -> RunRecord {
        RunRecord {
            run_id: Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_0001),
            recipe: json!({"seed": 42, "name": "quickstart"}),
            recipe_digest: Digest::of(b"recipe"),
            dataset_digest: Some(Digest::of(b"dataset")),
            teacher_files: [("unet/config.json".into(), Digest::of(b"{}"))].into(),
            prompts: [(
                "train".into(),
                PromptDigest {
                    digest: Digest::of(b"a cat"),
                    count: 1,
                },
            )]
            .into(),
            software: software(),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_has_one_spelling() {
        let bytes = record().to_bytes();
        let read = RunRecord::from_bytes(&bytes).expect("our own bytes are readable");
        assert_eq!(read, record());
        assert_eq!(read.to_bytes(), bytes);
    }

    #[test]
    fn a_later_or_broken_record_is_refused() {
        let bytes = record().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).expect("JSON is text");
        let later = text.replace("\"format_version\": 1", "\"format_version\": 9");
        assert_eq!(
            RunRecord::from_bytes(later.as_bytes()),
            Err(Error::Version { found: 9 })
        );
        for end in 0..bytes.len() - 1 {
            assert!(
                RunRecord::from_bytes(&bytes[..end]).is_err(),
                "cut at {end}"
            );
        }
    }

    #[test]
    fn every_part_of_a_dataset_changes_its_name() {
        let record = record();
        let software = software();
        let other_software = Software {
            cpu_capability: "AVX512".into(),
            ..software.clone()
        };
        let other_teacher: BTreeMap<_, _> =
            [("unet/config.json".into(), Digest::of(b"{ }"))].into();
        let other_prompts = PromptDigest {
            digest: Digest::of(b"a dog"),
            count: 1,
        };
        let base = DatasetParts {
            teacher_files: &record.teacher_files,
            prompts: &record.prompts["train"],
            seed: 42,
            guidance: 8.0,
            mode: "stratified",
            segments: 8,
            time_grid: None,
            count: 1000,
            shard_trajectories: 64,
            batch: 8,
            threads: Some(1),
            dtype: "f32",
            software: &software,
        };
        // One part after the other: each name differs from the one before it by one part alone.
        let mut parts = base.clone();
        let mut names = vec![dataset_digest(&parts)];
        parts.teacher_files = &other_teacher;
        names.push(dataset_digest(&parts));
        parts.prompts = &other_prompts;
        names.push(dataset_digest(&parts));
        parts.seed = 43;
        names.push(dataset_digest(&parts));
        parts.guidance = 7.5;
        names.push(dataset_digest(&parts));
        parts.mode = "alg1";
        names.push(dataset_digest(&parts));
        parts.segments = 4;
        names.push(dataset_digest(&parts));
        parts.time_grid = Some(40);
        names.push(dataset_digest(&parts));
        parts.count = 1001;
        names.push(dataset_digest(&parts));
        parts.shard_trajectories = 128;
        names.push(dataset_digest(&parts));
        parts.batch = 4;
        names.push(dataset_digest(&parts));
        parts.threads = None;
        names.push(dataset_digest(&parts));
        parts.dtype = "bf16";
        names.push(dataset_digest(&parts));
        parts.software = &other_software;
        names.push(dataset_digest(&parts));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(dataset_digest(&base), dataset_digest(&base.clone()));
    }
}
