//! Objects of a run in any supported store: memory, disk, S3, Google Cloud Storage, Azure.
//!
//! Data objects are written once, under a key that names their attempt. What decides something is made with
//! [`Store::create`], which exactly one caller wins. Nothing is ever overwritten, so there is no "latest" to
//! race for. Keys come from [`layout`] alone. This module must never know what the objects mean, and never
//! shows credentials: they come from the environment and stay inside object_store.

pub mod contract;
mod error;
pub mod fault;
pub mod layout;
mod open;
mod upload;
mod verify;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutPayload};

pub use self::error::{Error, Operation, Said, chain};
use self::layout::{Key, Prefix};
pub(crate) use self::upload::StoredFile;
pub use self::upload::{BadEntry, Damaged, FileEntry, Upload};
pub use self::verify::{VerifyError, get_verified, verify};
use crate::backoff::Backoff;

/// Tries of one operation, beyond those that object_store makes within a request.
const TRIES: u32 = 4;
/// Wait after the first failed try; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// One run's objects. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    uri: Arc<str>,
    /// Where the objects are plain files, for reads that copy once.
    folder: Option<Arc<PathBuf>>,
}

/// An object in a listing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Where it is.
    pub key: Key,
    /// Its length in bytes.
    pub len: u64,
    /// When the store says that it was written, in seconds since 1970.
    pub modified: i64,
}

/// What became of a [`Store::create`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// The object holds our bytes.
    Won,
    /// Somebody else's bytes were there first.
    Exists(Bytes),
}

impl Store {
    /// Opens the store that `uri` names: a path, `file://`, `memory://name`, `s3://`, `gs://` or `az://`.
    ///
    /// A folder on disk must be there. Cloud credentials come from the environment (`AWS_*`, `GOOGLE_*`,
    /// `AZURE_*`), never from the URI. `memory://name` is one store for the whole process, so that two parts of a
    /// test can meet there. No request is made yet.
    pub fn open(uri: &str) -> Result<Self, Error> {
        open::open(uri, open::Missing::Refuse)
    }

    /// As [`Store::open`], but a folder on disk that is not there is made, readable by its owner alone.
    pub fn open_or_create(uri: &str) -> Result<Self, Error> {
        open::open(uri, open::Missing::Make)
    }

    /// A store in memory that nobody else sees.
    pub fn in_memory() -> Self {
        Self::over(Arc::new(object_store::memory::InMemory::new()), "memory://")
    }

    /// A store over any backend; `uri` only appears in messages.
    pub fn over(inner: Arc<dyn ObjectStore>, uri: &str) -> Self {
        Self {
            inner,
            uri: uri.into(),
            folder: None,
        }
    }

    /// The same objects through a wrapper, such as one that fails or delays requests.
    pub fn wrapped(&self, wrap: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>) -> Self {
        Self::over(wrap(self.inner.clone()), &self.uri)
    }

    /// The URI, as it may be shown.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The file that holds `key`, where objects are files. It must be treated as read-only.
    pub fn local_file(&self, key: &Key) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(key.as_str()))
    }

    /// The folder that holds everything below `prefix`, where objects are files. It must be treated as read-only.
    pub fn local_folder(&self, prefix: &Prefix) -> Option<PathBuf> {
        self.folder
            .as_ref()
            .map(|folder| folder.join(prefix.as_str()))
    }

    /// The whole object.
    pub async fn get(&self, key: &Key) -> Result<Bytes, Error> {
        let path = key.to_path();
        self.retry(Operation::Read, key.as_str(), || async {
            self.inner.get(&path).await?.bytes().await
        })
        .await
    }

    /// The whole object, or none where there is no such object.
    pub async fn find(&self, key: &Key) -> Result<Option<Bytes>, Error> {
        match self.get(key).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Bytes `range` of an object, which must have them all.
    pub async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, Error> {
        let mut parts = self.get_ranges(key, std::slice::from_ref(&range)).await?;
        Ok(parts.pop().expect("one range gives one part"))
    }

    /// Several ranges of an object, near ones joined into one request; every range must lie in the object.
    pub async fn get_ranges(&self, key: &Key, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, Error> {
        let path = key.to_path();
        let parts = self
            .retry(Operation::Read, key.as_str(), || async {
                self.inner.get_ranges(&path, ranges).await
            })
            .await?;
        for (part, range) in parts.iter().zip(ranges) {
            let expected = range.end.saturating_sub(range.start);
            if part.len() as u64 != expected {
                return Err(Error::Short {
                    uri: self.uri.to_string(),
                    key: key.to_string(),
                    start: range.start,
                    expected,
                    found: part.len() as u64,
                });
            }
        }
        Ok(parts)
    }

    /// What a listing would say about an object.
    pub async fn head(&self, key: &Key) -> Result<Entry, Error> {
        let path = key.to_path();
        let meta = self
            .retry(Operation::Read, key.as_str(), || async {
                self.inner.head(&path).await
            })
            .await?;
        Ok(Entry {
            key: key.clone(),
            len: meta.size,
            modified: meta.last_modified.timestamp(),
        })
    }

    /// Writes a data object, whose key no other attempt uses.
    pub async fn put(&self, key: &Key, body: Bytes) -> Result<(), Error> {
        let path = key.to_path();
        self.retry(Operation::Write, key.as_str(), || async {
            self.inner
                .put(&path, PutPayload::from_bytes(body.clone()))
                .await
        })
        .await?;
        Ok(())
    }

    /// Makes an object that decides something, unless it is there already.
    ///
    /// Of all callers with different bytes exactly one wins. A store may report a conflict for our own success
    /// when the reply was lost, so a conflict is settled by reading back: equal bytes are a win. Callers that
    /// must not both win put something of their own into the body.
    pub async fn create(&self, key: &Key, body: Bytes) -> Result<Created, Error> {
        let path = key.to_path();
        let mut wait = Waiter::new(key.as_str());
        loop {
            let tried = self
                .inner
                .put_opts(
                    &path,
                    PutPayload::from_bytes(body.clone()),
                    PutMode::Create.into(),
                )
                .await;
            let error = match tried {
                Ok(_) => return Ok(Created::Won),
                Err(error) => error,
            };
            let conflict = matches!(
                error,
                object_store::Error::AlreadyExists { .. }
                    | object_store::Error::Precondition { .. }
            );
            if conflict {
                match self.find(key).await? {
                    Some(found) if found == body => return Ok(Created::Won),
                    Some(found) => return Ok(Created::Exists(found)),
                    // Some stores answer a race between two creations with a conflict although neither is stored.
                    None => {}
                }
            }
            let error = Error::new(&self.uri, key.as_str(), Operation::Create, error);
            if !(conflict || error.is_tried_again()) || !wait.again().await {
                return Err(error);
            }
        }
    }

    /// All objects below `prefix`, sorted by key. Objects whose names are not ours are left out.
    pub async fn list(&self, prefix: &Prefix) -> Result<Vec<Entry>, Error> {
        let path = prefix.to_path();
        let found = self
            .retry(Operation::List, prefix.as_str(), || async {
                let listing = self.inner.list(Some(&path)).try_collect::<Vec<_>>().await;
                or_empty(listing)
            })
            .await?;
        let mut entries: Vec<Entry> = found
            .into_iter()
            .filter_map(|meta| {
                let key = Key::parse_below(prefix, meta.location.as_ref()).ok()?;
                Some(Entry {
                    key,
                    len: meta.size,
                    modified: meta.last_modified.timestamp(),
                })
            })
            .collect();
        entries.sort();
        Ok(entries)
    }

    /// Removes an object; one that is not there is removed already.
    pub async fn delete(&self, key: &Key) -> Result<(), Error> {
        let path = key.to_path();
        let done = self
            .retry(Operation::Delete, key.as_str(), || async {
                self.inner.delete(&path).await
            })
            .await;
        match done {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Starts writing a data object of any length; see [`Upload`].
    pub fn upload(&self, key: &Key) -> Upload {
        Upload::new(self.clone(), key.clone())
    }

    /// Checks that the store can do what a run relies on: write, create exactly once, read, list and delete.
    ///
    /// Leaves nothing behind. Fails with [`Error::NotAtomic`] where a second creation is not refused.
    pub async fn probe(&self) -> Result<(), Error> {
        let key = layout::probe(&open::nonce());
        let first = Bytes::from_static(b"first");
        let won = self.create(&key, first.clone()).await?;
        let again = self.create(&key, Bytes::from_static(b"second")).await;
        let read = self.get(&key).await;
        self.delete(&key).await?;
        let refused = matches!(&again?, Created::Exists(found) if *found == first);
        if won == Created::Won && refused && read? == first {
            return Ok(());
        }
        Err(Error::NotAtomic {
            uri: self.uri.to_string(),
        })
    }

    async fn retry<T, F: Future<Output = object_store::Result<T>> + Send>(
        &self,
        operation: Operation,
        key: &str,
        mut once: impl FnMut() -> F + Send,
    ) -> Result<T, Error> {
        let mut wait = Waiter::new(key);
        loop {
            let error = match once().await {
                Ok(value) => return Ok(value),
                Err(error) => Error::new(&self.uri, key, operation, error),
            };
            if !error.is_tried_again() || !wait.again().await {
                return Err(error);
            }
            tracing::warn!(error = chain(&error), "trying the store again");
        }
    }
}

/// Listing a folder that does not exist finds nothing.
fn or_empty<T>(listing: object_store::Result<Vec<T>>) -> object_store::Result<Vec<T>> {
    match listing {
        Err(object_store::Error::NotFound { .. }) => Ok(Vec::new()),
        other => other,
    }
}

/// Counts the tries of one operation and waits between them.
struct Waiter {
    backoff: Backoff,
    tries: u32,
    jitter: f64,
}

impl Waiter {
    fn new(key: &str) -> Self {
        // The key spreads a fleet's returns as well as a random number would, and keeps runs repeatable.
        let hash = xxhash_rust::xxh3::xxh3_64(key.as_bytes());
        Self {
            backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT),
            tries: 1,
            jitter: (hash >> 11) as f64 / (1u64 << 53) as f64,
        }
    }

    /// Waits, and says whether there is a try left.
    async fn again(&mut self) -> bool {
        if self.tries == TRIES {
            return false;
        }
        self.tries += 1;
        tokio::time::sleep(self.backoff.next_delay(self.jitter)).await;
        true
    }
}
