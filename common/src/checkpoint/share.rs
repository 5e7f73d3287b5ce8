//! A state written by several ranks: who writes which tensors, what a rank tells of its files, and the one manifest
//! that names them all.
//!
//! Every rank holds the whole state, so a share is only a matter of who writes. The flat layout (tensors sorted by kind
//! and name, one after the other) is cut into as many equal lengths as there are ranks, and a tensor belongs to the rank
//! in whose length it begins: shares are contiguous, and a tensor is never cut. So a manifest says the same of a state
//! however many ranks wrote it, and any number of ranks may read it. This module does no IO.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::manifest::{Manifest, StoredSpec, StoredTensor};
use super::{Error, TensorSpec};
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

    /// Which of the tensors with these sizes in bytes, in the order of the flat layout, are this share.
    pub fn of(self, sizes: &[usize]) -> Range<usize> {
        let total: u128 = sizes.iter().map(|&size| size as u128).sum();
        let mut start = 0;
        let owner = |start: u128| match total {
            0 => 0,
            total => (start * u128::from(self.world) / total).min(u128::from(self.world) - 1),
        };
        let owners: Vec<u128> = sizes
            .iter()
            .map(|&size| {
                let owner = owner(start);
                start += size as u128;
                owner
            })
            .collect();
        let below = |rank: u128| owners.partition_point(|&owner| owner < rank);
        below(self.rank.into())..below(u128::from(self.rank) + 1)
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
    use super::*;

    /// The shares of all ranks.
    fn shares(sizes: &[usize], world: u32) -> Vec<Range<usize>> {
        let share = |rank| Share { rank, world }.of(sizes);
        (0..world).map(share).collect()
    }

    #[test]
    fn shares_are_contiguous_and_leave_no_tensor_out() {
        let uneven: Vec<usize> = (0..100).map(|i| (i * 7919) % 1000).collect();
        for sizes in [&uneven[..], &[5], &[], &[0, 0, 0], &[0, 0, 9, 0]] {
            for world in 1..=9 {
                let mut next = 0;
                for share in shares(sizes, world) {
                    assert_eq!(share.start, next, "{sizes:?} over {world}");
                    next = share.end;
                }
                assert_eq!(next, sizes.len(), "{sizes:?} over {world}");
            }
        }
    }

    #[test]
    fn no_share_is_longer_than_an_even_one_and_its_last_tensor() {
        let sizes: Vec<usize> = (0..100).map(|i| (i * 7919) % 1000).collect();
        let total: usize = sizes.iter().sum();
        for world in 1..=9 {
            for share in shares(&sizes, world) {
                let bytes: usize = sizes[share.clone()].iter().sum();
                let last = sizes[share].last().copied().unwrap_or(0);
                assert!(bytes <= total.div_ceil(world as usize) + last);
            }
        }
        assert_eq!(shares(&[4, 4, 4, 4], 2), [0..2, 2..4]);
        assert_eq!(shares(&[1, 1, 10], 3), [0..3, 3..3, 3..3]);
    }
}
