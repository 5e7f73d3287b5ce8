//! Writing one data object as its bytes come, with its digest.

use bytes::{Bytes, BytesMut};
use object_store::{ObjectStoreExt as _, WriteMultipart};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::layout::{ForeignKey, Key, Prefix};
use super::{Error, Operation, Store};
use crate::ids::Digest;

/// Bytes of one part; also the largest object that is written with a single request.
const PART_BYTES: usize = 16 << 20;
/// Parts in flight.
const PARTS_IN_FLIGHT: usize = 4;

/// A file as commits and manifests name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Where it is.
    pub key: Key,
    /// Its length in bytes.
    pub len: u64,
    /// SHA-256 of all its bytes.
    pub sha256: Digest,
}

impl FileEntry {
    /// The entry of a file with these bytes.
    pub fn of(key: &Key, bytes: &[u8]) -> Self {
        Self {
            key: key.clone(),
            len: bytes.len() as u64,
            sha256: Digest::of(bytes),
        }
    }

    /// Whether `bytes` are the file, whole and unchanged.
    pub fn check(&self, bytes: &[u8]) -> Result<(), Damaged> {
        if bytes.len() as u64 != self.len {
            return Err(Damaged::Length {
                key: self.key.clone(),
                expected: self.len,
                found: bytes.len() as u64,
            });
        }
        self.check_digest(Digest::of(bytes))
    }

    pub(crate) fn check_digest(&self, found: Digest) -> Result<(), Damaged> {
        if found == self.sha256 {
            return Ok(());
        }
        Err(Damaged::Digest {
            key: self.key.clone(),
            expected: self.sha256,
            found,
        })
    }
}

/// A stored file is not what its commit says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damaged {
    /// Cut off, or with something behind it.
    #[error("{key} has {found} bytes, its commit says {expected}")]
    Length {
        /// The file.
        key: Key,
        /// Bytes by the commit.
        expected: u64,
        /// Bytes in the store.
        found: u64,
    },
    /// Changed.
    #[error("{key} has SHA-256 {found}, its commit says {expected}")]
    Digest {
        /// The file.
        key: Key,
        /// Digest by the commit.
        expected: Digest,
        /// Digest of what is in the store.
        found: Digest,
    },
}

/// [`FileEntry`] as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredFile {
    key: String,
    bytes: u64,
    sha256: String,
}

impl From<&FileEntry> for StoredFile {
    fn from(entry: &FileEntry) -> Self {
        Self {
            key: entry.key.to_string(),
            bytes: entry.len,
            sha256: entry.sha256.to_string(),
        }
    }
}

/// A stored entry that cannot be true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadEntry {
    /// The key points elsewhere.
    #[error(transparent)]
    Key(#[from] ForeignKey),
    /// The digest is none.
    #[error("the SHA-256 {text:?} of {key} is not 64 hex digits")]
    Digest {
        /// The file.
        key: String,
        /// What stands there.
        text: String,
    },
}

impl StoredFile {
    /// The entry, if it names a file below `folder`.
    pub(crate) fn check(&self, folder: &Prefix) -> Result<FileEntry, BadEntry> {
        let key = Key::parse_below(folder, &self.key)?;
        let sha256 = Digest::parse(&self.sha256).ok_or_else(|| BadEntry::Digest {
            key: self.key.clone(),
            text: self.sha256.clone(),
        })?;
        Ok(FileEntry {
            key,
            len: self.bytes,
            sha256,
        })
    }
}

/// A data object being written. Nothing is visible under its key before [`Upload::finish`]; one that is
/// dropped before leaves no object.
pub struct Upload {
    store: Store,
    key: Key,
    buffer: BytesMut,
    parts: Option<(WriteMultipart, Hashing)>,
    len: u64,
}

/// SHA-256 of bytes as they come, on a thread of its own: whoever encodes them goes on meanwhile.
struct Hashing {
    bytes: mpsc::Sender<Bytes>,
    digest: JoinHandle<Digest>,
}

impl Hashing {
    fn start() -> Self {
        let (sender, mut bytes) = mpsc::channel::<Bytes>(PARTS_IN_FLIGHT);
        let digest = spawn_blocking(move || {
            let mut sha256 = Sha256::new();
            while let Some(part) = bytes.blocking_recv() {
                sha256.update(&part);
            }
            Digest(sha256.finalize().into())
        });
        Self {
            bytes: sender,
            digest,
        }
    }

    async fn update(&self, bytes: Bytes) {
        let taken = self.bytes.send(bytes).await;
        taken.expect("the hashing thread reads until nobody sends");
    }

    async fn finish(self) -> Digest {
        drop(self.bytes);
        self.digest.await.expect("hashing does not panic")
    }
}

impl Upload {
    pub(super) fn new(store: Store, key: Key) -> Self {
        Self {
            store,
            key,
            buffer: BytesMut::new(),
            parts: None,
            len: 0,
        }
    }

    /// Bytes written so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `bytes`; waits while four parts are under way.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), Error> {
        if self.parts.is_none() && self.buffer.len() + bytes.len() > PART_BYTES {
            self.begin().await?;
        }
        self.len += bytes.len() as u64;
        let Some((parts, hashing)) = &mut self.parts else {
            self.buffer.extend_from_slice(&bytes);
            return Ok(());
        };
        hashing.update(bytes.clone()).await;
        let waited = parts.wait_for_capacity(PARTS_IN_FLIGHT).await;
        parts.put(bytes);
        waited.map_err(|error| self.failed(error))
    }

    /// Makes the object visible, and says what it is.
    pub async fn finish(mut self) -> Result<FileEntry, Error> {
        let sha256 = match self.parts.take() {
            Some((parts, hashing)) => {
                let digest = hashing.finish().await;
                parts.finish().await.map_err(|error| self.failed(error))?;
                digest
            }
            None => {
                let bytes = self.buffer.split().freeze();
                let digest = Digest::of(&bytes);
                self.store.put(&self.key, bytes).await?;
                digest
            }
        };
        Ok(FileEntry {
            key: self.key.clone(),
            len: self.len,
            sha256,
        })
    }

    /// Gives up, and removes the parts that are already there.
    pub async fn abort(mut self) -> Result<(), Error> {
        match self.parts.take() {
            Some((parts, _)) => parts.abort().await.map_err(|error| self.failed(error)),
            None => Ok(()),
        }
    }

    async fn begin(&mut self) -> Result<(), Error> {
        let path = self.key.to_path();
        let store = self.store.clone();
        let upload = store
            .retry(Operation::Write, self.key.as_str(), || async {
                store.inner.put_multipart(&path).await
            })
            .await?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        let first = self.buffer.split().freeze();
        let hashing = Hashing::start();
        if !first.is_empty() {
            hashing.update(first.clone()).await;
            parts.put(first);
        }
        self.parts = Some((parts, hashing));
        Ok(())
    }

    fn failed(&self, error: object_store::Error) -> Error {
        Error::new(self.store.uri(), self.key.as_str(), Operation::Write, error)
    }
}
