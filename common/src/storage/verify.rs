//! Reading an object back to see that it is what its commit says.

use bytes::BytesMut;
use futures::{FutureExt as _, StreamExt as _};
use sha2::{Digest as _, Sha256};

use super::{Damaged, Error, FileEntry, Store};
use crate::ids::Digest;

/// Bytes of one request.
const READ_BYTES: u64 = 16 << 20;
/// Requests for one file at the same time.
const READS_IN_FLIGHT: usize = 4;

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
    // In ranges, so that no request outlives its time limit and one part is hashed while others come.
    let starts: Vec<u64> = (0..file.len).step_by(READ_BYTES as usize).collect();
    let mut parts = futures::stream::iter(starts)
        .map(|start| {
            let end = (start + READ_BYTES).min(file.len);
            async move { store.get_range(&file.key, start..end).await }.boxed()
        })
        .buffered(READS_IN_FLIGHT);
    let mut whole = BytesMut::with_capacity(usize::try_from(file.len).unwrap_or(0));
    let mut sha256 = Sha256::new();
    while let Some(part) = parts.next().await {
        let part = part?;
        sha256.update(&part);
        whole.extend_from_slice(&part);
    }
    file.check_digest(Digest(sha256.finalize().into()))?;
    Ok(whole.freeze())
}
