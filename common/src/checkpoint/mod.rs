//! The state of training in object storage: written in safetensors files, committed last, verified first.
//!
//! `state` is the copy in host memory that training waits for, `writer` uploads it, `share` says which rank writes what,
//! `manifest` is the COMMIT that makes it count, `reader` verifies and loads it, `retention` says what may go. This module
//! must never know what a tensor means, nor touch libtorch: it sees names, formats, shapes and bytes.

mod header;
mod manifest;
mod reader;
mod retention;
mod share;
mod state;
mod writer;

pub use self::manifest::{FORMAT_VERSION, Lora, Manifest, StoredTensor, Training};
pub use self::reader::{Checkpoint, Loaded, newest};
pub use self::retention::{Folder, Keep, delete, expired, folders};
pub use self::share::{Part, Share, merge};
pub use self::state::{Dtype, Kind, Snapshot, StateSource, TensorSpec};
pub use self::writer::{CHUNK_BYTES, PART_BYTES, write, write_metrics, write_share};

use crate::storage::layout::Key;
use crate::storage::{self, Damaged, VerifyError};

/// Why a checkpoint cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its COMMIT is not one that this program can use.
    #[error("the checkpoint {commit} is not usable: {reason}")]
    Manifest {
        /// The COMMIT.
        commit: String,
        /// What is wrong.
        reason: String,
    },
    /// A file is whole, and still not what the manifest says.
    #[error("{file} differs from its manifest: {reason}")]
    Differs {
        /// The file.
        file: Key,
        /// Which tensor, and in what.
        reason: String,
    },
    /// A file is not what the manifest says.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

impl From<VerifyError> for Error {
    fn from(error: VerifyError) -> Self {
        match error {
            VerifyError::Damaged(damaged) => Self::Damaged(damaged),
            VerifyError::Storage(error) => Self::Storage(error),
        }
    }
}

impl Error {
    /// Whether another checkpoint may be tried instead: this one is broken, rather than out of reach.
    fn is_damage(&self) -> bool {
        match self {
            Self::Manifest { .. } | Self::Differs { .. } | Self::Damaged(_) => true,
            Self::Storage(error) => {
                matches!(
                    error,
                    storage::Error::NotFound { .. } | storage::Error::Short { .. }
                )
            }
        }
    }
}
