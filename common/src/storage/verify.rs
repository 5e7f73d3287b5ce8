//! Reading an object back to see that it is what its commit says.

use sha2::{Digest as _, Sha256};

use super::{Damaged, Error, FileEntry, Store};
use crate::ids::Digest;

/// Bytes of one request.
const READ_BYTES: u64 = 16 << 20;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is not what its commit says.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The store failed.
    #[error(transparent)]
    Storage(#[from] Error),
}

/// Checks length and SHA-256 of `file`, holding 16 MiB of it at a time.
pub async fn verify(store: &Store, file: &FileEntry) -> Result<(), VerifyError> {
    let found = store.head(&file.key).await?.len;
    if found != file.len {
        return Err(Damaged::Length {
            key: file.key.clone(),
            expected: file.len,
            found,
        }
        .into());
    }
    let mut sha256 = Sha256::new();
    let mut start = 0;
    while start < file.len {
        let end = (start + READ_BYTES).min(file.len);
        sha256.update(store.get_range(&file.key, start..end).await?);
        start = end;
    }
    Ok(file.check_digest(Digest(sha256.finalize().into()))?)
}

/// Reads the whole of `file` and checks it before anybody looks at it.
pub async fn get_verified(store: &Store, file: &FileEntry) -> Result<bytes::Bytes, VerifyError> {
    let found = store.head(&file.key).await?.len;
    if found != file.len {
        return Err(Damaged::Length {
            key: file.key.clone(),
            expected: file.len,
            found,
        }
        .into());
    }
    let bytes = store.get(&file.key).await?;
    file.check(&bytes)?;
    Ok(bytes)
}
