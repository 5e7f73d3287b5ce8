//! Reads rows of a sealed dataset straight into the caller's buffers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;

use super::index::{self, EmbeddingRow, Row};
use super::manifest::{DatasetManifest, ShardEntry};
use super::source::{Source, Want};
use super::{Embedding, Error};
use crate::ids::Digest;
use crate::storage::Store;

/// Shards that one read fetches from at the same time.
const SHARDS_IN_FLIGHT: usize = 16;
/// Shards that are verified at the same time; each is in memory whole meanwhile.
const SHARDS_OPENING: usize = 2;

/// How a dataset is read.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes of verified files kept in memory, where they do not lie on a local disk.
    pub keep_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keep_bytes: 512 << 20,
        }
    }
}

/// A sealed dataset.
///
/// The first touch of a shard reads its files whole and checks their SHA-256, once per process; after that a
/// row is one read of its place and a check of its hash.
#[derive(Debug)]
pub struct Dataset {
    store: Store,
    manifest: DatasetManifest,
    /// First row of each shard, and behind the last the number of all rows.
    starts: Vec<u64>,
    shards: Vec<OnceCell<Shard>>,
    keep_left: AtomicU64,
    /// Which open shard holds an embedding.
    embedded: RwLock<BTreeMap<[u8; 16], (usize, usize)>>,
}

#[derive(Debug)]
struct Shard {
    rows: Vec<Row>,
    values: Source,
    embeddings: Vec<EmbeddingRow>,
    embedding_values: Source,
}

/// Rows that have been read, each at the same position in every list. Reused, it allocates nothing.
#[derive(Debug, Default, Clone)]
pub struct Staging {
    /// States, one after the other.
    pub latent: Vec<u8>,
    /// Guided predictions, likewise.
    pub eps_w: Vec<u8>,
    /// Ordinals of the trajectories.
    pub traj_ord: Vec<u64>,
    /// Steps within the trajectories.
    pub step: Vec<u16>,
    /// Integer training timesteps.
    pub timestep: Vec<i32>,
    /// Segments of the generation pass.
    pub segment: Vec<u16>,
    /// Number of segments of the generation pass.
    pub segments: Vec<u16>,
    /// Ids of the prompts' embeddings.
    pub cond_id: Vec<[u8; 16]>,
    /// Ids of the unconditional embeddings.
    pub uncond_id: Vec<[u8; 16]>,
}

impl Staging {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.timestep.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.timestep.is_empty()
    }

    fn clear(&mut self) {
        self.traj_ord.clear();
        self.step.clear();
        self.timestep.clear();
        self.segment.clear();
        self.segments.clear();
        self.cond_id.clear();
        self.uncond_id.clear();
    }

    fn push(&mut self, row: &Row) {
        self.traj_ord.push(row.traj_ord);
        self.step.push(row.step);
        self.timestep.push(row.timestep);
        self.segment.push(row.segment);
        self.segments.push(row.segments);
        self.cond_id.push(row.cond_id);
        self.uncond_id.push(row.uncond_id);
    }
}

impl Dataset {
    /// A dataset by its manifest. Nothing is read yet.
    pub fn new(store: Store, manifest: DatasetManifest, options: Options) -> Self {
        let mut starts = vec![0];
        for shard in &manifest.shards {
            starts.push(starts[starts.len() - 1] + shard.rows);
        }
        Self {
            store,
            shards: manifest.shards.iter().map(|_| OnceCell::new()).collect(),
            manifest,
            starts,
            keep_left: AtomicU64::new(options.keep_bytes),
            embedded: RwLock::default(),
        }
    }

    /// What the dataset consists of.
    pub fn manifest(&self) -> &DatasetManifest {
        &self.manifest
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.manifest.rows
    }

    /// Verifies and opens every shard, several at a time.
    pub async fn open_all(&self) -> Result<(), Error> {
        let opens: Vec<BoxFuture<'_, Result<(), Error>>> = (0..self.shards.len())
            .map(|shard| async move { self.shard(shard).await.map(|_| ()) }.boxed())
            .collect();
        futures::stream::iter(opens)
            .buffer_unordered(SHARDS_OPENING)
            .try_collect()
            .await
    }

    /// Reads `rows` of the dataset into `staging`, in this order; what was in it is gone,
    /// and after an error what is in it means nothing.
    pub async fn read_rows(&self, rows: &[u64], staging: &mut Staging) -> Result<(), Error> {
        let wide = self.manifest.schema.row_bytes();
        staging.clear();
        staging.latent.resize(rows.len() * wide, 0);
        staging.eps_w.resize(rows.len() * wide, 0);
        let mut found = Vec::with_capacity(rows.len());
        for &row in rows {
            let (shard, within) = self.locate(row)?;
            found.push((shard, within));
            staging.push(&self.shard(shard).await?.rows[within]);
        }
        let latents = staging.latent.chunks_exact_mut(wide);
        let predictions = staging.eps_w.chunks_exact_mut(wide);
        let mut wants: BTreeMap<usize, Vec<Want<'_>>> = BTreeMap::new();
        for ((&(shard, within), latent), eps_w) in found.iter().zip(latents).zip(predictions) {
            let row = &self.shard(shard).await?.rows[within];
            let list = wants.entry(shard).or_default();
            let wants = [("latent", row.latent, latent), ("eps_w", row.eps_w, eps_w)];
            list.extend(wants.map(|(part, place, into)| Want {
                place,
                row: within,
                part,
                into,
            }));
        }
        // Boxed one by one: the compiler cannot prove a closure over mutable slices to be `Send`.
        let reads: Vec<BoxFuture<'_, Result<(), Error>>> = wants
            .into_iter()
            .map(|(shard, list)| self.fill(shard, list).boxed())
            .collect();
        futures::stream::iter(reads)
            .buffer_unordered(SHARDS_IN_FLIGHT)
            .try_collect()
            .await
    }

    /// The text embedding that a row that has been read refers to.
    pub async fn embedding(&self, id: &[u8; 16]) -> Result<Embedding, Error> {
        let found = self
            .embedded
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(id)
            .copied();
        let (shard, row) = match found {
            Some(found) => found,
            None => self.search(id).await?,
        };
        let shard = self.shard(shard).await?;
        let place = shard.embeddings[row];
        let schema = &self.manifest.schema;
        let mut ctx = vec![0; schema.ctx.bytes()];
        let mut pooled = vec![0; schema.pooled.as_ref().map_or(0, |value| value.bytes())];
        let mut wants = vec![Want {
            place: place.ctx,
            row,
            part: "ctx",
            into: &mut ctx,
        }];
        wants.extend(place.pooled.map(|place| Want {
            place,
            row,
            part: "pooled",
            into: &mut pooled,
        }));
        shard.embedding_values.read(&self.store, &mut wants).await?;
        Ok(Embedding {
            ctx: ctx.into(),
            pooled: place.pooled.map(|_| pooled.into()),
        })
    }

    /// An embedding that no open shard has: opens the others until one has it.
    async fn search(&self, id: &[u8; 16]) -> Result<(usize, usize), Error> {
        for shard in 0..self.shards.len() {
            self.shard(shard).await?;
            let embedded = self.embedded.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(&found) = embedded.get(id) {
                return Ok(found);
            }
        }
        let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
        Err(Error::NoEmbedding { id })
    }

    async fn fill(&self, shard: usize, mut wants: Vec<Want<'_>>) -> Result<(), Error> {
        let shard = self.shard(shard).await?;
        shard.values.read(&self.store, &mut wants).await
    }

    fn locate(&self, row: u64) -> Result<(usize, usize), Error> {
        if row >= self.rows() {
            return Err(Error::NoRow {
                row,
                rows: self.rows(),
            });
        }
        let shard = self.starts.partition_point(|&start| start <= row) - 1;
        let within =
            usize::try_from(row - self.starts[shard]).expect("a shard's rows are in memory");
        Ok((shard, within))
    }

    async fn shard(&self, shard: usize) -> Result<&Shard, Error> {
        self.shards[shard]
            .get_or_try_init(|| self.open(shard))
            .await
    }

    async fn open(&self, shard: usize) -> Result<Shard, Error> {
        let entry = &self.manifest.shards[shard];
        let schema = &self.manifest.schema;
        let (values, rows) = Source::open(
            &self.store,
            &entry.rows_file,
            |len| self.keep(len),
            |bytes| {
                let rows = index::rows(bytes, schema)?;
                belongs(&rows, entry).map(|()| rows)
            },
        )
        .await?;
        let (embedding_values, embeddings) = Source::open(
            &self.store,
            &entry.embeddings_file,
            |len| self.keep(len),
            |bytes| index::embeddings(bytes, schema),
        )
        .await?;
        let mut embedded = self
            .embedded
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for (row, embedding) in embeddings.iter().enumerate() {
            embedded.entry(embedding.id).or_insert((shard, row));
        }
        Ok(Shard {
            rows,
            values,
            embeddings,
            embedding_values,
        })
    }

    /// Takes `len` bytes of the memory that may be kept, if they are left.
    fn keep(&self, len: u64) -> bool {
        self.keep_left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(len)
            })
            .is_ok()
    }
}

/// Whether the file holds what the manifest says the shard holds.
fn belongs(rows: &[Row], entry: &ShardEntry) -> Result<(), String> {
    if rows.len() as u64 != entry.rows {
        return Err(format!(
            "it has {} rows, the manifest says {}",
            rows.len(),
            entry.rows
        ));
    }
    match rows
        .iter()
        .find(|row| !entry.ordinals.contains(&row.traj_ord))
    {
        Some(row) => Err(format!(
            "it holds trajectory {}, the manifest says {:?}",
            row.traj_ord, entry.ordinals
        )),
        None => Ok(()),
    }
}

/// Digest of what all rows hold, in the order (trajectory, step): ordinal, step, state, prediction.
///
/// Two runs made the same trajectories exactly when this is equal, however their shards were cut.
pub async fn row_hash(dataset: &Dataset) -> Result<Digest, Error> {
    const ROWS: u64 = 64;
    let wide = dataset.manifest.schema.row_bytes();
    let mut sha256 = Sha256::new();
    let mut staging = Staging::default();
    let mut start = 0;
    while start < dataset.rows() {
        let end = (start + ROWS).min(dataset.rows());
        dataset
            .read_rows(&(start..end).collect::<Vec<_>>(), &mut staging)
            .await?;
        for i in 0..staging.len() {
            sha256.update(staging.traj_ord[i].to_le_bytes());
            sha256.update(staging.step[i].to_le_bytes());
            sha256.update(&staging.latent[i * wide..(i + 1) * wide]);
            sha256.update(&staging.eps_w[i * wide..(i + 1) * wide]);
        }
        start = end;
    }
    Ok(Digest(sha256.finalize().into()))
}
