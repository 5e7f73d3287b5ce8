//! Teacher trajectories in Parquet: written once, verified, and read at the speed of the disk.
//!
//! `schema` says what a row is, `writer` and `embeddings` make a shard, `manifest` seals a dataset, `reader`
//! reads rows out of it, `loader` reads ahead of the trainer. This module must never know tensors, recipes or
//! who works on what.

mod embeddings;
mod index;
pub mod loader;
pub mod manifest;
mod reader;
pub mod schema;
mod source;
mod writer;

pub use self::embeddings::{Embedding, EmbeddingsWriter};
pub use self::reader::{Dataset, Options, Staging, row_hash};
pub use self::writer::{ShardWriter, Written};

use crate::storage::{self, Damaged, VerifyError};

/// Why trajectories could not be written, sealed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A row does not fit the schema or the order of its file.
    #[error("row for step {step} of trajectory {trajectory} cannot be written: {reason}")]
    Row {
        /// Ordinal of the trajectory.
        trajectory: u64,
        /// Step within it.
        step: u16,
        /// What does not fit.
        reason: String,
    },
    /// A stored file is whole, and still not what the manifest promises.
    #[error("{file} is not a trajectory file that this program can use: {reason}")]
    Format {
        /// The file.
        file: String,
        /// What does not fit.
        reason: String,
    },
    /// One row of a file has changed since it was written.
    #[error(
        "row {row} of {file} is damaged: its {part} has hash {found:016x}, written was {expected:016x}"
    )]
    DamagedRow {
        /// The file.
        file: String,
        /// Row within the file.
        row: u64,
        /// Which column.
        part: &'static str,
        /// The stored hash.
        expected: u64,
        /// The hash of what was read.
        found: u64,
    },
    /// A file is not what its commit says.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The dataset cannot be sealed, or its manifest cannot be used.
    #[error("the dataset in {folder} {reason}")]
    Manifest {
        /// Folder of the dataset.
        folder: String,
        /// What does not fit.
        reason: String,
    },
    /// A COMMIT of the dataset cannot be used.
    #[error(transparent)]
    Commit(#[from] crate::commit::Error),
    /// A text embedding that no file of the dataset holds.
    #[error("no embedding has the id {id}")]
    NoEmbedding {
        /// The id as hex.
        id: String,
    },
    /// A row beyond the end of the dataset.
    #[error("the dataset has {rows} rows, so there is no row {row}")]
    NoRow {
        /// Which was asked for.
        row: u64,
        /// How many there are.
        rows: u64,
    },
    /// The Parquet encoder failed.
    #[error("encoding Parquet failed")]
    Encode(#[from] parquet::errors::ParquetError),
    /// The arrays of a row group do not form a table.
    #[error("forming a table failed")]
    Table(#[from] arrow_schema::ArrowError),
    /// A local file cannot be read.
    #[error("{file} cannot be read")]
    Io {
        /// The file.
        file: String,
        /// What the system says.
        source: std::io::Error,
    },
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
