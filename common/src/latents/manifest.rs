//! The sealed list of everything in a dataset: training reads only what stands here.
//!
//! It holds no term, no time and no name of a coordinator, so that two coordinators that seal the same commits
//! write the same bytes.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};

use super::Error;
use super::schema::RowSchema;
use crate::commit::TaskCommit;
use crate::ids::Digest;
use crate::storage::layout::{self, Prefix};
use crate::storage::{Created, FileEntry, Store, StoredFile};

/// Version of the manifest that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// The largest manifest that is parsed.
pub const MAX_BYTES: usize = 1 << 30;
/// COMMITs read at the same time.
const COMMITS_IN_FLIGHT: usize = 32;

/// Everything in a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetManifest {
    /// Folder of the dataset.
    pub folder: Prefix,
    /// Digest that names it.
    pub dataset: Digest,
    /// What its files hold.
    pub schema: RowSchema,
    /// Rows of all shards.
    pub rows: u64,
    /// Its shards, by index.
    pub shards: Vec<ShardEntry>,
}

/// One shard of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardEntry {
    /// Its index; one that was set aside for bad input leaves a gap.
    pub index: u64,
    /// Trajectories it holds.
    pub ordinals: Range<u64>,
    /// Rows in its file.
    pub rows: u64,
    /// Digest of the COMMIT that it comes from.
    pub commit: Digest,
    /// Its rows.
    pub rows_file: FileEntry,
    /// Text embeddings that its rows refer to.
    pub embeddings_file: FileEntry,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format_version: u32,
    dataset: String,
    schema: String,
    rows: u64,
    shards: Vec<StoredShard>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredShard {
    index: u64,
    first_ordinal: u64,
    end_ordinal: u64,
    rows: u64,
    commit: String,
    rows_file: StoredFile,
    embeddings_file: StoredFile,
}

impl DatasetManifest {
    /// The canonical bytes.
    pub fn to_bytes(&self) -> Bytes {
        let stored = Stored {
            format_version: FORMAT_VERSION,
            dataset: self.dataset.to_string(),
            schema: self.schema.id(),
            rows: self.rows,
            shards: self.shards.iter().map(StoredShard::from).collect(),
        };
        let mut bytes = serde_json::to_vec(&stored).expect("text and numbers become JSON");
        bytes.push(b'\n');
        bytes.into()
    }

    /// Reads the manifest of the dataset in `folder`; all files must lie below it.
    pub fn from_bytes(folder: &Prefix, bytes: &[u8]) -> Result<Self, Error> {
        let refuse = |reason: String| refused(folder, reason);
        if bytes.len() > MAX_BYTES {
            return Err(refuse(format!(
                "has a manifest of {} bytes, which is too large",
                bytes.len()
            )));
        }
        let stored: Stored = serde_json::from_slice(bytes)
            .map_err(|error| refuse(format!("has a manifest that is not readable: {error}")))?;
        if stored.format_version != FORMAT_VERSION {
            let found = stored.format_version;
            return Err(refuse(format!(
                "has a manifest of format version {found}; this program reads version {FORMAT_VERSION}"
            )));
        }
        let schema = RowSchema::parse(&stored.schema)
            .ok_or_else(|| refuse(format!("has the unknown schema {:?}", stored.schema)))?;
        let dataset = Digest::parse(&stored.dataset).ok_or_else(|| {
            refuse(format!(
                "has the digest {:?}, which is none",
                stored.dataset
            ))
        })?;
        let shards = stored
            .shards
            .iter()
            .map(|shard| shard.check(folder))
            .collect::<Result<Vec<_>, _>>()
            .map_err(refuse)?;
        let manifest = Self {
            folder: folder.clone(),
            dataset,
            schema,
            rows: stored.rows,
            shards,
        };
        manifest.check().map_err(refuse)?;
        Ok(manifest)
    }

    /// Digest of the bytes: what a training stage pins.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }

    fn check(&self) -> Result<(), String> {
        for pair in self.shards.windows(2) {
            if pair[1].index <= pair[0].index || pair[1].ordinals.start < pair[0].ordinals.end {
                return Err(format!("has shard {} out of order", pair[1].index));
            }
        }
        let mut rows = 0u64;
        for shard in &self.shards {
            let wide = self.schema.row_bytes() as u64 * 2;
            let fits = shard
                .rows
                .checked_mul(wide)
                .is_some_and(|bytes| bytes <= shard.rows_file.len);
            if shard.rows == 0 || !fits || shard.ordinals.is_empty() {
                return Err(format!(
                    "has a shard {} whose {} rows cannot be in a file of {} bytes",
                    shard.index, shard.rows, shard.rows_file.len
                ));
            }
            // Cannot overflow: each is at most the length of a file.
            rows = rows.checked_add(shard.rows).ok_or("has too many rows")?;
        }
        if rows != self.rows {
            return Err(format!(
                "says it has {} rows, its shards have {rows}",
                self.rows
            ));
        }
        if rows == 0 {
            return Err("has no rows".into());
        }
        Ok(())
    }
}

impl StoredShard {
    fn check(&self, folder: &Prefix) -> Result<ShardEntry, String> {
        let own = layout::shard(folder, self.index);
        let file = |stored: &StoredFile| {
            stored
                .check(&own)
                .map_err(|error| format!("has a shard {}: {error}", self.index))
        };
        Ok(ShardEntry {
            index: self.index,
            ordinals: self.first_ordinal..self.end_ordinal,
            rows: self.rows,
            commit: Digest::parse(&self.commit)
                .ok_or_else(|| format!("has the digest {:?}, which is none", self.commit))?,
            rows_file: file(&self.rows_file)?,
            embeddings_file: file(&self.embeddings_file)?,
        })
    }
}

impl std::convert::From<&ShardEntry> for StoredShard {
    fn from(shard: &ShardEntry) -> Self {
        Self {
            index: shard.index,
            first_ordinal: shard.ordinals.start,
            end_ordinal: shard.ordinals.end,
            rows: shard.rows,
            commit: shard.commit.to_string(),
            rows_file: StoredFile::from(&shard.rows_file),
            embeddings_file: StoredFile::from(&shard.embeddings_file),
        }
    }
}

/// Seals a dataset: reads the COMMIT of each of its shards, checks that together they are whole, and creates
/// MANIFEST. Gives the manifest, and its bytes as they are stored.
///
/// Shards in `quarantined` are left out, whatever became of them. Sealing again gives the same bytes; a
/// different MANIFEST that is there already is an error.
pub async fn seal(
    store: &Store,
    folder: &Prefix,
    dataset: Digest,
    shard_count: u64,
    quarantined: &BTreeSet<u64>,
) -> Result<(DatasetManifest, Bytes), Error> {
    let wanted: Vec<u64> = (0..shard_count)
        .filter(|index| !quarantined.contains(index))
        .collect();
    let mut commits = futures::stream::iter(wanted)
        .map(|index| shard_commit(store, folder, dataset, index).boxed())
        .buffered(COMMITS_IN_FLIGHT);
    let mut shards: Vec<ShardEntry> = Vec::new();
    let mut schema: Option<String> = None;
    while let Some(found) = commits.next().await {
        let (shard, shard_schema) = found?;
        let first = schema.get_or_insert_with(|| shard_schema.clone());
        if *first != shard_schema {
            let reason = format!("has shards of two schemas: {first}, and {shard_schema}");
            return Err(refused(folder, reason));
        }
        let expected = shards.last().map_or(0, |last| last.ordinals.end);
        let gap = quarantined
            .range(shards.last().map_or(0, |last| last.index)..shard.index)
            .next();
        if shard.ordinals.start != expected && gap.is_none() {
            return Err(refused(
                folder,
                format!(
                    "has a shard {} that begins at trajectory {}, expected was {expected}",
                    shard.index, shard.ordinals.start
                ),
            ));
        }
        shards.push(shard);
    }
    let schema = schema.ok_or_else(|| refused(folder, "has no shards".into()))?;
    let schema = RowSchema::parse(&schema)
        .ok_or_else(|| refused(folder, format!("has the unknown schema {schema:?}")))?;
    let rows = shards.iter().map(|shard| shard.rows).sum();
    let manifest = DatasetManifest {
        folder: folder.clone(),
        dataset,
        schema,
        rows,
        shards,
    };
    manifest.check().map_err(|reason| refused(folder, reason))?;
    let bytes = manifest.to_bytes();
    match store
        .create(&layout::dataset_manifest(folder), bytes.clone())
        .await?
    {
        Created::Won => Ok((manifest, bytes)),
        Created::Exists(_) => Err(refused(
            folder,
            "was sealed before with another manifest; a dataset is made once and never changed"
                .into(),
        )),
    }
}

/// The manifest of a dataset, or none where it has not been sealed.
pub async fn find(store: &Store, folder: &Prefix) -> Result<Option<DatasetManifest>, Error> {
    match store.find(&layout::dataset_manifest(folder)).await? {
        Some(bytes) => DatasetManifest::from_bytes(folder, &bytes).map(Some),
        None => Ok(None),
    }
}

async fn shard_commit(
    store: &Store,
    folder: &Prefix,
    dataset: Digest,
    index: u64,
) -> Result<(ShardEntry, String), Error> {
    let shard = layout::shard(folder, index);
    let bytes = store.get(&layout::commit(&shard)).await?;
    let commit = TaskCommit::from_bytes(&shard, &bytes)?;
    if commit.lease.task.index != index || commit.inputs != dataset {
        return Err(refused(
            folder,
            format!(
                "has in shard {index} the commit of {} made from {}, expected was {dataset}",
                commit.lease.task, commit.inputs
            ),
        ));
    }
    let [rows_file, embeddings_file] =
        <[FileEntry; 2]>::try_from(commit.files).map_err(|files| {
            refused(
                folder,
                format!(
                    "has a shard {index} of {} files, expected are two",
                    files.len()
                ),
            )
        })?;
    for file in [&rows_file, &embeddings_file] {
        let found = store.head(&file.key).await?.len;
        if found != file.len {
            let key = file.key.clone();
            return Err(crate::storage::Damaged::Length {
                key,
                expected: file.len,
                found,
            }
            .into());
        }
    }
    let entry = ShardEntry {
        index,
        ordinals: commit.ordinals,
        rows: commit.rows,
        commit: Digest::of(&bytes),
        rows_file,
        embeddings_file,
    };
    Ok((entry, commit.schema))
}

fn refused(folder: &Prefix, reason: String) -> Error {
    Error::Manifest {
        folder: folder.as_str().into(),
        reason,
    }
}
