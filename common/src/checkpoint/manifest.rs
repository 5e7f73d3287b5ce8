//! A checkpoint's COMMIT: what it is, what it comes from, and every file and tensor with its digest.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Dtype, Error, Kind, TensorSpec};
use crate::ids::{Digest, Generation};
use crate::storage::layout::{self, Key, Prefix};
use crate::storage::{FileEntry, StoredFile};

/// Version of the manifest that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// The largest manifest that is parsed.
const MAX_BYTES: usize = 256 << 20;

/// A checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// Name of the training stage.
    pub stage: String,
    /// Optimizer steps applied.
    pub step: u64,
    /// Generation of the group that wrote it.
    pub generation: Generation,
    /// What the state belongs to.
    pub training: Training,
    /// Files of tensors, then the metrics.
    pub files: Vec<FileEntry>,
    /// Every tensor, sorted by kind and name.
    pub tensors: Vec<StoredTensor>,
}

/// What a state belongs to: what resuming it exactly, sampling it, or starting from it must know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Names the run.
    pub run: String,
    /// Digest of what in the recipe a result depends on, as hex.
    pub recipe_digest: String,
    /// Digest of the manifest of trajectories, as hex; none where the stage reads none.
    pub dataset_digest: Option<String>,
    /// COMMIT of the checkpoint that the stage started from; none in the first stage.
    pub parent: Option<String>,
    /// Timesteps that the student lands on.
    pub milestones: Vec<u32>,
    /// Name and numbers of the noise schedule, as text.
    pub schedule: String,
    /// What the network predicts (`epsilon`, `v_prediction`, …).
    pub prediction_type: String,
    /// Distance from t_m to t_n in timesteps.
    pub skip: u32,
    /// Seed of the run.
    pub seed: u64,
    /// Rows in one optimizer step.
    pub global_batch: u64,
    /// Adapters; none when every weight is trained.
    pub lora: Option<Lora>,
    /// Version of libtorch.
    pub libtorch: String,
    /// CPU instruction set that libtorch chose.
    pub cpu_capability: String,
}

/// Low-rank adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Inner width r.
    pub lora_rank: u32,
    /// The delta is multiplied by `lora_alpha / lora_rank`.
    pub lora_alpha: f64,
    /// Last components of the module paths that have an adapter.
    pub targets: Vec<String>,
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// The tensor.
    pub spec: TensorSpec,
    /// Index of its file in [`Manifest::files`].
    pub file: usize,
    /// Where its numbers start in the file.
    pub offset: u64,
    /// Their length in bytes.
    pub len: u64,
    /// Their hash.
    pub xxh3: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    stage: String,
    step: u64,
    generation: u64,
    training: Training,
    files: Vec<StoredFile>,
    tensors: Vec<StoredSpec>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredSpec {
    kind: String,
    name: String,
    dtype: String,
    shape: Vec<u64>,
    file: usize,
    offset: u64,
    len: u64,
    xxh3: String,
}

impl Manifest {
    /// The folder that it is the COMMIT of.
    pub fn folder(&self) -> Prefix {
        layout::checkpoint(&self.stage, self.step, self.generation)
    }

    /// The key that it is put under.
    pub fn commit_key(&self) -> Key {
        layout::commit(&self.folder())
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len).sum()
    }

    /// The canonical bytes.
    pub fn to_bytes(&self) -> Bytes {
        let stored = Stored {
            format_version: FORMAT_VERSION,
            stage: self.stage.clone(),
            step: self.step,
            generation: self.generation.0,
            training: self.training.clone(),
            files: self.files.iter().map(StoredFile::from).collect(),
            tensors: self.tensors.iter().map(StoredSpec::from).collect(),
        };
        let mut bytes = serde_json::to_vec(&stored).expect("text and numbers become JSON");
        bytes.push(b'\n');
        bytes.into()
    }

    /// Reads the COMMIT stored under `key`: it must be of that checkpoint, and name only its files.
    pub fn from_bytes(key: &str, bytes: &[u8]) -> Result<Self, Error> {
        Self::parse(key, bytes).map_err(|reason| Error::Manifest {
            commit: key.to_owned(),
            reason,
        })
    }

    fn parse(key: &str, bytes: &[u8]) -> Result<Self, String> {
        let place = layout::parse_checkpoint_commit(key).ok_or("this is no key of a checkpoint")?;
        if bytes.len() > MAX_BYTES {
            return Err(format!("{} bytes are too many", bytes.len()));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if stored.format_version != FORMAT_VERSION {
            let found = stored.format_version;
            return Err(format!(
                "it has format version {found}; this program reads {FORMAT_VERSION}"
            ));
        }
        let (stage, step, generation) = place;
        if (
            stored.stage.as_str(),
            stored.step,
            Generation(stored.generation),
        ) != place
        {
            return Err(format!(
                "it says it is step {} of {} by generation {}, its place says step {step} of {stage} by \
                 generation {generation}",
                stored.step, stored.stage, stored.generation
            ));
        }
        check_digests(&stored.training)?;
        let folder = layout::checkpoint(stage, step, generation);
        let files = stored
            .files
            .iter()
            .map(|file| file.check(&folder).map_err(|error| error.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let tensors = stored
            .tensors
            .into_iter()
            .map(|tensor| tensor.check(&files))
            .collect::<Result<Vec<_>, _>>()?;
        let names: BTreeSet<_> = tensors
            .iter()
            .map(|tensor| tensor.spec.stored_name())
            .collect();
        if names.len() != tensors.len() {
            return Err("it names a tensor twice".into());
        }
        Ok(Self {
            stage: stored.stage,
            step: stored.step,
            generation: Generation(stored.generation),
            training: stored.training,
            files,
            tensors,
        })
    }
}

fn check_digests(training: &Training) -> Result<(), String> {
    for text in [
        Some(&training.recipe_digest),
        training.dataset_digest.as_ref(),
    ]
    .into_iter()
    .flatten()
    {
        Digest::parse(text).ok_or_else(|| format!("the digest {text:?} is none"))?;
    }
    Ok(())
}

impl StoredSpec {
    pub(super) fn check(self, files: &[FileEntry]) -> Result<StoredTensor, String> {
        let name = &self.name;
        let kind = Kind::parse(&self.kind)
            .ok_or_else(|| format!("{name} is of the unknown kind {:?}", self.kind))?;
        let dtype = Dtype::parse(&self.dtype)
            .ok_or_else(|| format!("{name} has the unknown dtype {:?}", self.dtype))?;
        let xxh3 = u64::from_str_radix(&self.xxh3, 16)
            .map_err(|_| format!("{name} has the hash {:?}, which is none", self.xxh3))?;
        let file = files
            .get(self.file)
            .ok_or_else(|| format!("{name} lies in file {}, which is not there", self.file))?;
        let end = self.offset.checked_add(self.len);
        if end.is_none_or(|end| end > file.len) {
            return Err(format!("{name} ends beyond the end of {}", file.key));
        }
        let spec = TensorSpec {
            kind,
            name: self.name,
            dtype,
            shape: self.shape,
        };
        if spec.bytes() != Some(self.len) {
            return Err(format!(
                "{} of shape {:?} as {} cannot have {} bytes",
                spec.name,
                spec.shape,
                dtype.name(),
                self.len
            ));
        }
        Ok(StoredTensor {
            spec,
            file: self.file,
            offset: self.offset,
            len: self.len,
            xxh3,
        })
    }
}

impl From<&StoredTensor> for StoredSpec {
    fn from(tensor: &StoredTensor) -> Self {
        Self {
            kind: tensor.spec.kind.name().into(),
            name: tensor.spec.name.clone(),
            dtype: tensor.spec.dtype.name().into(),
            shape: tensor.spec.shape.clone(),
            file: tensor.file,
            offset: tensor.offset,
            len: tensor.len,
            xxh3: format!("{:016x}", tensor.xxh3),
        }
    }
}
