//! What is saved: named tensors with their bytes, and a copy of them in host memory, the only part of a checkpoint
//! that training waits for.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// What a tensor is to training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A trained weight.
    Student,
    /// Its exponential moving average.
    Ema,
    /// AdamW's first moment of it.
    AdamM,
    /// AdamW's second moment of it.
    AdamV,
}

impl Kind {
    /// Every kind, in the order in which they are stored.
    pub const ALL: [Self; 4] = [Self::Student, Self::Ema, Self::AdamM, Self::AdamV];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Student => "student",
            Self::Ema => "ema",
            Self::AdamM => "adam_m",
            Self::AdamV => "adam_v",
        }
    }

    /// The kind with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Number formats, spelled as safetensors spells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 64-bit integer.
    I64,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::I64 => 8,
        }
    }

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I64 => "I64",
        }
    }

    /// The format with this name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16, Self::I64]
            .into_iter()
            .find(|dtype| dtype.name() == name)
    }
}

/// A tensor without its numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// What it is to training.
    pub kind: Kind,
    /// Name within its kind.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Sizes, outermost first; none for a scalar.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// Bytes of all its numbers; none beyond 2^63.
    pub fn bytes(&self) -> Option<u64> {
        self.shape
            .iter()
            .try_fold(self.dtype.bytes(), |bytes, &size| bytes.checked_mul(size))
            .filter(|&bytes| i64::try_from(bytes).is_ok())
    }

    /// Its name in a file that holds every kind.
    pub fn stored_name(&self) -> String {
        format!("{}.{}", self.kind, self.name)
    }
}

/// What training must offer to be saved.
pub trait StateSource {
    /// Every tensor of the state, in any order that does not change.
    fn tensors(&self) -> Vec<TensorSpec>;

    /// Copies the bytes of tensor `index` of [`StateSource::tensors`] from byte `start` on into `out`, which ends
    /// within the tensor: row-major, little endian. `start` and the length of `out` are whole numbers of elements.
    fn copy(&self, index: usize, start: usize, out: &mut [u8]);
}

impl<S: StateSource + ?Sized> StateSource for Arc<S> {
    fn tensors(&self) -> Vec<TensorSpec> {
        (**self).tensors()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        (**self).copy(index, start, out);
    }
}

/// The tensors of `source` sorted by kind and name, each with its index there and its bytes: the flat layout of a
/// state, the same on every rank.
pub(super) fn sorted(source: &dyn StateSource) -> Vec<(usize, TensorSpec, usize)> {
    let size = |spec: &TensorSpec| {
        let bytes = spec.bytes().and_then(|bytes| usize::try_from(bytes).ok());
        bytes.expect("a tensor in memory has a size that fits it")
    };
    let mut order: Vec<(usize, TensorSpec, usize)> = source
        .tensors()
        .into_iter()
        .enumerate()
        .map(|(index, spec)| {
            let bytes = size(&spec);
            (index, spec, bytes)
        })
        .collect();
    order.sort_by(|(_, a, _), (_, b, _)| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    order
}

/// A copy of the training state at one step.
#[derive(Debug, Default)]
pub struct Snapshot {
    tensors: Vec<(TensorSpec, Range<usize>)>,
    bytes: Vec<u8>,
}

impl Snapshot {
    /// Copies the state, sorted by kind and name.
    ///
    /// A snapshot that is no longer used can be given to be filled again: touching memory for the first time
    /// costs more than the copy.
    pub fn capture(source: &dyn StateSource, reuse: Option<Self>) -> Self {
        let order = sorted(source);
        let mut snapshot = reuse.unwrap_or_default();
        snapshot.tensors.clear();
        let mut end = 0;
        let mut copies = Vec::with_capacity(order.len());
        for (index, spec, bytes) in order {
            let start = end;
            end += bytes;
            copies.push((index, start..end));
            snapshot.tensors.push((spec, start..end));
        }
        snapshot.bytes.resize(end, 0);
        for (index, range) in copies {
            source.copy(index, 0, &mut snapshot.bytes[range]);
        }
        snapshot
    }

    /// Every tensor with its place in [`Snapshot::bytes`], sorted by kind and name, without gaps.
    pub fn tensors(&self) -> &[(TensorSpec, Range<usize>)] {
        &self.tensors
    }

    /// The numbers of all tensors.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl StateSource for Snapshot {
    fn tensors(&self) -> Vec<TensorSpec> {
        self.tensors.iter().map(|(spec, _)| spec.clone()).collect()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        let (_, range) = &self.tensors[index];
        out.copy_from_slice(&self.bytes[range.clone()][start..start + out.len()]);
    }
}
