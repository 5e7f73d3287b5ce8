//! Why a teacher folder cannot be used; every message names the file, and the key or tensor at fault.

use std::path::{Path, PathBuf};

/// Why a teacher folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is absent, unreadable or too short.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that should hold JSON does not.
    #[error("{} is not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it broke.
        source: serde_json::Error,
    },
    /// A configuration value is missing, of the wrong form or not supported.
    #[error("{}: {key} {problem}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A file as a whole is wrong.
    #[error("{} {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The scorer cannot be used.
    #[error(
        "{} cannot be used; leave prompt_adherence out of evaluate.metrics, or mend the scorer",
        path.display()
    )]
    Scorer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: super::scorer::Error,
    },
    /// A tensor is missing, unexpected, of the wrong shape or of the wrong format.
    #[error("{}: tensor {tensor:?} {problem}", path.display())]
    Tensor {
        /// The weight file, or the component's folder when no single file is at fault.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl Error {
    pub(super) fn file(path: &Path, problem: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(super) fn key(path: &Path, key: &str, problem: impl Into<String>) -> Self {
        Self::Key {
            path: path.to_owned(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    pub(super) fn tensor(path: &Path, tensor: &str, problem: impl Into<String>) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            problem: problem.into(),
        }
    }
}
