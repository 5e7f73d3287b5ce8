//! A state written by several ranks: who writes which tensors, what a rank tells of its files, and the one manifest
//! that names them all.
//!
//! A share is a matter of who writes. The tensors of a kind, sorted by name, are shared out as [`share_of`] says, each kind
//! by itself: of parts with the same tensors, such as weights and their moments, a rank writes the same ones, and it need
//! hold no others. A tensor is never cut. So a manifest says the same of a state however many ranks wrote it, and any
//! number of ranks may read it. This module does no IO.

use serde::{Deserialize, Serialize};

use super::manifest::{Manifest, StoredSpec, StoredTensor};
use super::{Error, TensorSpec};
use crate::group::share_of;
use crate::storage::layout::{self, Prefix};
use crate::storage::{FileEntry, StoredFile};

/// The largest account of a part that is parsed.
const MAX_BYTES: usize = 64 << 20;

/// One rank's share of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which rank, below `world`.
    pub rank: u32,
    /// How many there are, at least 1.
    pub world: u32,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// Which of `tensors`, sorted by kind and name, are this share: of each kind what [`share_of`] gives.
    pub fn of(self, tensors: &[TensorSpec]) -> Vec<usize> {
        let mut own = Vec::new();
        let mut first = 0;
        for of_kind in tensors.chunk_by(|a, b| a.kind == b.kind) {
            let bytes = |spec: &TensorSpec| spec.bytes().unwrap_or(u64::MAX) as usize;
            let sizes: Vec<usize> = of_kind.iter().map(bytes).collect();
            let share = share_of(&sizes, self.rank, self.world);
            own.extend(share.map(|at| first + at));
            first += of_kind.len();
        }
        own
    }
}

/// The files that one rank wrote, and what lies in them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Part {
    /// Its files.
    pub files: Vec<FileEntry>,
    /// Its tensors, in the order of the flat layout; [`StoredTensor::file`] counts in `files`.
    pub tensors: Vec<StoredTensor>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    files: Vec<StoredFile>,
    tensors: Vec<StoredSpec>,
}

impl Part {
    /// What a rank tells rank 0 of its part: JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        let stored = Stored {
            files: self.files.iter().map(StoredFile::from).collect(),
            tensors: self.tensors.iter().map(StoredSpec::from).collect(),
        };
        serde_json::to_vec(&stored).expect("text and numbers become JSON")
    }

    /// The same with spaces behind it up to `len` bytes, which do not change what it says: collectives ask for equal
    /// lengths. Longer than `len` it stays as it is.
    pub fn to_padded_bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = self.to_bytes();
        bytes.resize(bytes.len().max(len), b' ');
        bytes
    }

    /// Reads what a rank told, padded or not: it may name only files below the checkpoint's `folder`.
    pub fn from_bytes(folder: &Prefix, bytes: &[u8]) -> Result<Self, Error> {
        Self::parse(folder, bytes).map_err(|reason| unusable(folder, reason))
    }

    fn parse(folder: &Prefix, bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_BYTES {
            return Err(format!("{} bytes are too many for a part", bytes.len()));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let files = stored
            .files
            .iter()
            .map(|file| file.check(folder).map_err(|error| error.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let tensors = stored
            .tensors
            .into_iter()
            .map(|tensor| tensor.check(&files))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { files, tensors })
    }
}

/// Puts the parts of all ranks and the file of metrics into `manifest`, which has no files yet. Together they must hold
/// the tensors `state` (in any order), each once.
pub fn merge(
    manifest: Manifest,
    parts: Vec<Part>,
    metrics: FileEntry,
    state: &[TensorSpec],
) -> Result<Manifest, Error> {
    let (mut files, mut tensors): (Vec<FileEntry>, Vec<StoredTensor>) = (Vec::new(), Vec::new());
    for part in parts {
        let before = files.len();
        files.extend(part.files);
        tensors.extend(part.tensors.into_iter().map(|tensor| StoredTensor {
            file: before + tensor.file,
            ..tensor
        }));
    }
    files.push(metrics);
    tensors.sort_by(|a, b| by_place(&a.spec, &b.spec));
    let mut expected: Vec<&TensorSpec> = state.iter().collect();
    expected.sort_by(|a, b| by_place(a, b));
    let found = tensors.iter().map(|tensor| &tensor.spec);
    if !found.eq(expected.iter().copied()) {
        let reason = format!(
            "its parts hold {} tensors, which are not the {} of the state, each once",
            tensors.len(),
            expected.len()
        );
        return Err(unusable(&manifest.folder(), reason));
    }
    Ok(Manifest {
        files,
        tensors,
        ..manifest
    })
}

fn by_place(a: &TensorSpec, b: &TensorSpec) -> std::cmp::Ordering {
    (a.kind, &a.name).cmp(&(b.kind, &b.name))
}

fn unusable(folder: &Prefix, reason: String) -> Error {
    Error::Manifest {
        commit: layout::commit(folder).as_str().to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dtype, Kind};
    use super::*;

    fn spec(kind: Kind, index: usize, size: u64) -> TensorSpec {
        TensorSpec {
            kind,
            name: format!("{index:03}"),
            dtype: Dtype::F32,
            shape: vec![size],
        }
    }

    /// Weights, moments: the same tensors twice, and an average of which there is only one.
    fn state() -> Vec<TensorSpec> {
        let of = |kind| move |index: usize| spec(kind, index, (index as u64 * 7919) % 1000);
        let student = (0..100).map(of(Kind::Student));
        let average = [spec(Kind::Ema, 0, 5)];
        let moments = (0..100).map(of(Kind::AdamM));
        student.chain(average).chain(moments).collect()
    }

    #[test]
    fn shares_leave_no_tensor_out_and_are_the_same_in_every_kind() {
        let state = state();
        for world in 1..=9 {
            let mut all = Vec::new();
            for rank in 0..world {
                let own = Share { rank, world }.of(&state);
                let of = |kind: Kind| -> Vec<&str> {
                    let own = own.iter().map(|&at| &state[at]);
                    own.filter(|spec| spec.kind == kind)
                        .map(|spec| &*spec.name)
                        .collect()
                };
                assert_eq!(of(Kind::Student), of(Kind::AdamM));
                all.extend(own);
            }
            all.sort_unstable();
            assert!(all.into_iter().eq(0..state.len()), "{world}");
        }
        assert_eq!(Share::WHOLE.of(&[]), Vec::<usize>::new());
    }
}
