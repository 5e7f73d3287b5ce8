//! Finds, verifies and loads checkpoints.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::manifest::{Manifest, StoredTensor};
use super::retention::folders;
use super::{Error, TensorSpec, header};
use crate::ids::Generation;
use crate::storage::{FileEntry, Store, get_verified, layout, verify};

/// A committed checkpoint whose manifest has been read.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    store: Store,
    manifest: Manifest,
}

/// A verified state.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Every tensor with its numbers, sorted by kind and name.
    pub tensors: Vec<(TensorSpec, Bytes)>,
    /// The training curve up to the checkpoint, as JSON lines.
    pub metrics: Bytes,
}

impl Checkpoint {
    /// Reads the COMMIT at `key` (as journal and wire name checkpoints). No file is read yet.
    pub async fn open(store: &Store, key: &str) -> Result<Self, Error> {
        let place = layout::parse_checkpoint_commit(key).ok_or_else(|| Error::Manifest {
            commit: key.to_owned(),
            reason: "this is no key of a checkpoint".into(),
        })?;
        let (stage, step, generation) = place;
        let commit = layout::commit(&layout::checkpoint(stage, step, generation));
        let bytes = store.get(&commit).await?;
        let manifest = Manifest::from_bytes(key, &bytes)?;
        Ok(Self {
            store: store.clone(),
            manifest,
        })
    }

    /// What it consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Reads every file back and checks length and digest, holding little of it at a time.
    pub async fn verify(&self) -> Result<(), Error> {
        for file in &self.manifest.files {
            verify(&self.store, file).await?;
        }
        Ok(())
    }

    /// Reads the whole state into memory, as [`Checkpoint::read`] does.
    pub async fn load(&self) -> Result<Loaded, Error> {
        let mut tensors = Vec::with_capacity(self.manifest.tensors.len());
        for index in 0..self.manifest.files.len() {
            tensors.extend(self.file(index).await?);
        }
        tensors.sort_by(|(a, _), (b, _)| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        Ok(Loaded {
            tensors,
            metrics: self.metrics().await?,
        })
    }

    /// Gives every tensor that `wanted` names to `take`, row-major, little endian, holding one file at a time; files
    /// without such a tensor are not read. Each file's digest is checked before its header is looked at; then the header
    /// against the manifest, and every tensor's hash.
    ///
    /// A state that turns out to be damaged has been taken in part: throw away what it was taken into.
    pub async fn read<E: From<Error>>(
        &self,
        wanted: impl Fn(&TensorSpec) -> bool,
        mut take: impl FnMut(&TensorSpec, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for index in 0..self.manifest.files.len() {
            if !self.of_file(index).any(|tensor| wanted(&tensor.spec)) {
                continue;
            }
            for (spec, bytes) in self.file(index).await? {
                if wanted(&spec) {
                    take(&spec, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// The training curve up to the checkpoint, as JSON lines.
    pub async fn metrics(&self) -> Result<Bytes, Error> {
        let mut metrics = Bytes::new();
        for (index, file) in self.manifest.files.iter().enumerate() {
            if self.of_file(index).next().is_none() {
                metrics = get_verified(&self.store, file).await?;
            }
        }
        Ok(metrics)
    }

    fn of_file(&self, index: usize) -> impl Iterator<Item = &StoredTensor> {
        let tensors = self.manifest.tensors.iter();
        tensors.filter(move |tensor| tensor.file == index)
    }

    /// The tensors of file `index`, verified; none of the file of metrics, which is not read.
    async fn file(&self, index: usize) -> Result<Vec<(TensorSpec, Bytes)>, Error> {
        let own: Vec<&StoredTensor> = self.of_file(index).collect();
        if own.is_empty() {
            return Ok(Vec::new());
        }
        let file = &self.manifest.files[index];
        let bytes = get_verified(&self.store, file).await?;
        let mut tensors = Vec::with_capacity(own.len());
        cut(file, &bytes, &own, &mut tensors)?;
        Ok(tensors)
    }
}

/// Cuts a verified file into its tensors.
fn cut(
    file: &FileEntry,
    bytes: &Bytes,
    own: &[&StoredTensor],
    tensors: &mut Vec<(TensorSpec, Bytes)>,
) -> Result<(), Error> {
    let differs = |reason: String| Error::Differs {
        file: file.key.clone(),
        reason,
    };
    let found = header::parse(bytes).map_err(differs)?;
    if found.len() != own.len() {
        let counts = format!(
            "it holds {} tensors, expected are {}",
            found.len(),
            own.len()
        );
        return Err(differs(counts));
    }
    let mut expected = own.to_vec();
    expected.sort_by_key(|tensor| (tensor.offset, tensor.spec.stored_name()));
    for (found, tensor) in found.iter().zip(expected) {
        let place = tensor.offset..tensor.offset + tensor.len;
        header::same(found, &tensor.spec, &place).map_err(differs)?;
        let start = usize::try_from(place.start).expect("the file is in memory");
        let end = usize::try_from(place.end).expect("the file is in memory");
        let numbers = bytes.slice(start..end);
        if xxh3_64(&numbers) != tensor.xxh3 {
            return Err(differs(format!(
                "the hash of {} differs",
                tensor.spec.stored_name()
            )));
        }
        tensors.push((tensor.spec.clone(), numbers));
    }
    Ok(())
}

/// The newest checkpoint of `stage` that is whole and in the lineage, or none.
///
/// `lineage` says whether the checkpoint of a generation at a step counts; a zombie group's does not. One that
/// is damaged is passed over with a warning. An unreachable store is an error, never an older state.
pub async fn newest(
    store: &Store,
    stage: &str,
    lineage: impl Fn(u64, Generation) -> bool,
) -> Result<Option<Checkpoint>, Error> {
    let mut found = folders(store, stage).await?;
    found.retain(|folder| folder.committed && lineage(folder.step, folder.generation));
    found.sort();
    while let Some(folder) = found.pop() {
        let place = layout::checkpoint(stage, folder.step, folder.generation);
        let key = layout::commit(&place);
        let tried = match Checkpoint::open(store, key.as_str()).await {
            Ok(checkpoint) => checkpoint.verify().await.map(|()| checkpoint),
            Err(error) => Err(error),
        };
        match tried {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) if error.is_damage() => {
                tracing::warn!(checkpoint = %key, %error, "a damaged checkpoint is passed over");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
