//! `make bench-data`: what the data plane costs against the bytes themselves and against pyarrow, side by side in one
//! run (F3, F4).
//!
//! Every figure is a ratio of medians over interleaved rounds: machines are shared and noisy. The last line
//! holds all figures, each with its goal, MISSED where that is not reached, and its floor. The exit code is 1 when
//! one misses its floor. Floors are no goals: they stand where the figures stood on a busy machine of two cores,
//! less its noise, and catch what makes things worse.

mod measure;
mod pyarrow;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use distillery_common::checkpoint::{Dtype, Kind, Snapshot, StateSource, TensorSpec};
use distillery_common::commit::TaskCommit;
use distillery_common::ids::{Digest, Incarnation, Term};
use distillery_common::latents::loader::{Loader, Order, Spec};
use distillery_common::latents::schema::{Element, Origin, RowSchema, TrajectoryRow, Value};
use distillery_common::latents::{
    Dataset, EmbeddingsWriter, Options, ShardWriter, Staging, manifest,
};
use distillery_common::storage::fault::DelayStore;
use distillery_common::storage::layout::{self, Key, Prefix};
use distillery_common::storage::{FileEntry, Store};
use distillery_common::task::{Lease, TaskId};
use distillery_tests::figure::{Figure, at_least, at_most};

use self::measure::{Ratios, Rounds, median};
use self::pyarrow::Pyarrow;

const ROUNDS: usize = 5;
/// 114 trajectories of 9 SDXL rows, states and predictions of 128 KiB: 256 MiB.
const TRAJECTORIES: u64 = 114;
const STEPS: u16 = 9;
const ROW_BYTES: usize = 131_072;
const RANDOM_ROWS: u64 = 512;
/// As the reader's rows of one batch.
const BATCH: u64 = 16;
const GET_DELAY: Duration = Duration::from_millis(20);
const STEP_TIME: Duration = Duration::from_millis(100);
const STATE_BYTES: usize = 256 << 20;

fn main() -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(bench())
}

#[expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
fn now() -> Instant {
    Instant::now()
}

fn seconds_since(start: Instant) -> f64 {
    now().duration_since(start).as_secs_f64()
}

async fn bench() -> Result<ExitCode> {
    let place = tempfile::tempdir().context("a temporary folder")?;
    let store = Store::open_or_create(&place.path().join("run").display().to_string())?;
    let set = Set::new();
    let manifest = set.seal(&store).await?;
    let file = manifest.shards[0].rows_file.clone();
    let dataset = Arc::new(Dataset::new(store.clone(), manifest, Options::default()));
    dataset.open_all().await?;
    let path = store
        .local_file(&file.key)
        .context("the store is a folder")?;
    let mut peer = peer(&path, &place.path().join("pyarrow"));
    let write = write_ratios(&store, &set, place.path(), peer.as_mut()).await?;
    let read = read_ratios(&dataset, &path, peer.as_mut()).await?;
    drop(peer);
    let random = random_ratio(&dataset, &path).await?;
    let stall = loader_stall(&store, &dataset).await?;
    let capture = capture_ratio();
    let mut figures = vec![
        at_least("write / raw write + fsync", write.raw, 0.9, 0.15),
        at_least("sequential read / raw read", read.raw, 0.95, 0.4),
        at_most("random row p50 / raw pread", random, 1.2, 2.0),
        at_most("loader stall share of step time", stall, 0.001, 0.01),
        at_most("checkpoint stall / memory copy", capture, 1.1, 1.6),
    ];
    figures.extend(
        write
            .pyarrow
            .map(|ratio| at_least("write / pyarrow without digests", ratio, 1.0, 0.25)),
    );
    figures.extend(
        read.pyarrow
            .map(|ratio| at_least("sequential read / pyarrow", ratio, 1.0, 1.2)),
    );
    let texts: Vec<String> = figures.iter().map(Figure::text).collect();
    println!("bench-data: {}", texts.join(", "));
    Ok(if figures.iter().all(Figure::holds) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// pyarrow, where there is one; says so where there is none.
fn peer(file: &Path, out: &Path) -> Option<Pyarrow> {
    match Pyarrow::start(file, out) {
        Ok(peer) => {
            println!("pyarrow {} reads and writes the same rows", peer.version);
            Some(peer)
        }
        Err(error) => {
            println!("pyarrow is absent and was NOT measured: {error:#}");
            None
        }
    }
}

/// What is written: noise, as latents are.
struct Set {
    schema: RowSchema,
    origin: Origin,
    values: Vec<u8>,
}

impl Set {
    fn new() -> Self {
        let mut state = 1u64;
        let values = (0..(64 << 20) / 8).flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state ^ state >> 29).to_le_bytes()
        });
        Self {
            schema: RowSchema {
                latent: Value::new(Element::F16, &[4, 128, 128]),
                ctx: Value::new(Element::F16, &[77, 2048]),
                pooled: None,
            },
            origin: Origin {
                dataset: Digest::of(b"bench"),
                teacher: "bench".into(),
                config: Digest::of(b"bench"),
                latent_scale: 0.13025,
            },
            values: values.collect(),
        }
    }

    /// A value of one row; values start at every 64th byte, so that no two rows are equal.
    fn value(&self, index: u64) -> &[u8] {
        let start = (index as usize * 64 * 1021) % (self.values.len() - ROW_BYTES);
        &self.values[start..start + ROW_BYTES]
    }

    async fn write(&self, store: &Store, key: &Key) -> Result<FileEntry> {
        let mut writer = ShardWriter::new(&self.schema, &self.origin)?;
        let mut upload = store.upload(key);
        for trajectory in 0..TRAJECTORIES {
            for step in 0..STEPS {
                let index = (trajectory * u64::from(STEPS) + u64::from(step)) * 2;
                writer.push(&TrajectoryRow {
                    traj_id: [0; 16],
                    traj_ord: trajectory,
                    prompt_id: [0; 16],
                    seed: 1,
                    guidance: 8.0,
                    step,
                    n_steps: STEPS,
                    timestep: 999 - i32::from(step),
                    segment: 0,
                    segments: 8,
                    mode: "stratified",
                    cond_id: [1; 16],
                    uncond_id: [1; 16],
                    latent: self.value(index),
                    eps_w: self.value(index + 1),
                })?;
            }
            writer.send(&mut upload).await?;
        }
        Ok(writer.finish_into(upload).await?.0)
    }

    async fn seal(&self, store: &Store) -> Result<manifest::DatasetManifest> {
        let (folder, lease) = (folder(), lease(1));
        let shard = layout::shard(&folder, 0);
        let rows_file = self
            .write(store, &layout::shard_rows(&shard, &lease))
            .await?;
        let mut embeddings = EmbeddingsWriter::new(&self.schema, &self.origin)?;
        embeddings.push([1; 16], &self.values[..self.schema.ctx.bytes()], None)?;
        let key = layout::shard_embeddings(&shard, &lease);
        let bytes = embeddings.finish()?;
        let embeddings_file = FileEntry::of(&key, &bytes);
        store.put(&key, bytes).await?;
        let commit = TaskCommit {
            lease,
            inputs: self.origin.dataset,
            files: vec![rows_file, embeddings_file],
            rows: TRAJECTORIES * u64::from(STEPS),
            schema: self.schema.id(),
            ordinals: 0..TRAJECTORIES,
            result: serde_json::Value::Null,
            cost: None,
        };
        store
            .create(&layout::commit(&shard), commit.to_bytes())
            .await?;
        Ok(
            manifest::seal(store, &folder, self.origin.dataset, 1, &BTreeSet::new())
                .await?
                .0,
        )
    }
}

fn folder() -> Prefix {
    layout::dataset("bench")
}

fn lease(attempt: u32) -> Lease {
    Lease {
        term: Term(1),
        task: TaskId {
            stage: "trajectories".into(),
            index: 0,
        },
        attempt,
        incarnation: Incarnation(1),
    }
}

/// Our rows with digests, against the same number of bytes written raw and the same rows by pyarrow; all end on the
/// disk.
async fn write_ratios(
    store: &Store,
    set: &Set,
    place: &Path,
    mut peer: Option<&mut Pyarrow>,
) -> Result<Ratios> {
    let (mut rounds, mut bytes) = (Rounds::default(), 0);
    for round in 0..ROUNDS {
        let key = layout::shard_rows(
            &layout::shard(&folder(), 9),
            &lease(u32::try_from(round)? + 2),
        );
        let start = now();
        let entry = set.write(store, &key).await?;
        rounds.ours.push(seconds_since(start));
        bytes = entry.len;
        let path = place.join("raw");
        let start = now();
        let mut raw = File::create(&path)?;
        for index in 0..entry.len / ROW_BYTES as u64 {
            raw.write_all(set.value(index))?;
        }
        raw.sync_all()?;
        rounds.raw.push(seconds_since(start));
        std::fs::remove_file(path)?;
        store.delete(&key).await?;
        if let Some(peer) = &mut peer {
            rounds.pyarrow.push(peer.write()?);
        }
    }
    Ok(rounds.ratios("write", bytes))
}

/// Every row in order through the reader, against the file in ranges of 4 MiB and pyarrow; all into memory.
async fn read_ratios(
    dataset: &Dataset,
    path: &Path,
    mut peer: Option<&mut Pyarrow>,
) -> Result<Ratios> {
    let (mut staging, mut buffer) = (Staging::default(), vec![0u8; 4 << 20]);
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut rounds = Rounds::default();
    for round in 0..=ROUNDS {
        let start = now();
        let mut first = 0;
        while first < dataset.rows() {
            let end = (first + BATCH).min(dataset.rows());
            dataset
                .read_rows(&(first..end).collect::<Vec<_>>(), &mut staging)
                .await?;
            first = end;
        }
        let ours = seconds_since(start);
        let start = now();
        for at in (0..len).step_by(buffer.len()) {
            let part = buffer.len().min(usize::try_from(len - at)?);
            file.read_exact_at(&mut buffer[..part], at)?;
        }
        let raw = seconds_since(start);
        let pyarrow = peer.as_mut().map(|peer| peer.read()).transpose()?;
        // The first round fills the page cache and the buffers.
        if round > 0 {
            rounds.ours.push(ours);
            rounds.raw.push(raw);
            rounds.pyarrow.extend(pyarrow);
        }
    }
    Ok(rounds.ratios("sequential read", len))
}

/// One row (state and prediction) at a time in the order of training, against two reads of as many bytes.
async fn random_ratio(dataset: &Dataset, path: &Path) -> Result<f64> {
    let order = Order {
        seed: 1,
        stage: 0,
        rows: dataset.rows(),
        global_batch: 1,
        virtual_ranks: None,
    };
    let file = File::open(path)?;
    let (mut staging, mut buffer) = (Staging::default(), vec![0u8; ROW_BYTES]);
    let (mut ours, mut raw) = (Vec::new(), Vec::new());
    for position in 0..RANDOM_ROWS {
        let row = order.row_at(position);
        let start = now();
        dataset.read_rows(&[row], &mut staging).await?;
        ours.push(seconds_since(start));
        let other = order.row_at(position + RANDOM_ROWS) % (dataset.rows() - 1);
        let start = now();
        for value in 0..2 {
            file.read_exact_at(&mut buffer, (other * 2 + value) * ROW_BYTES as u64)?;
        }
        raw.push(seconds_since(start));
    }
    Ok(median(ours) / median(raw))
}

/// Share of step time that waits for rows when every request takes 20 ms longer.
async fn loader_stall(store: &Store, dataset: &Dataset) -> Result<f64> {
    let slow = store.wrapped(|inner| Arc::new(DelayStore::new(inner, GET_DELAY)));
    let options = Options { keep_bytes: 0 };
    let dataset = Arc::new(Dataset::new(slow, dataset.manifest().clone(), options));
    dataset.open_all().await?;
    let order = Order {
        seed: 1,
        stage: 0,
        rows: dataset.rows(),
        global_batch: BATCH,
        virtual_ranks: None,
    };
    let spec = Spec {
        order,
        rank: 0,
        world: 1,
        steps: 0..60,
        ahead: 8,
    };
    let mut loader = Loader::start(dataset, spec);
    let (mut stalled, mut steps) = (0.0, 0u32);
    // The first batch is the start of training, not a stall within it.
    drop(loader.next().await?);
    loop {
        tokio::time::sleep(STEP_TIME).await;
        let start = now();
        let batch = loader.next().await?;
        if batch.is_none() {
            break;
        }
        stalled += seconds_since(start);
        steps += 1;
    }
    ensure!(steps == 59, "{steps} steps came");
    Ok(stalled / (f64::from(steps) * STEP_TIME.as_secs_f64()))
}

/// A state in memory, as an optimizer holds it.
struct State {
    tensors: Vec<Vec<u8>>,
}

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |(index, bytes): (usize, &Vec<u8>)| TensorSpec {
            kind: Kind::Student,
            name: format!("tensor{index:03}"),
            dtype: Dtype::F32,
            shape: vec![bytes.len() as u64 / 4],
        };
        self.tensors.iter().enumerate().map(spec).collect()
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.tensors[index][start..start + out.len()]);
    }
}

/// What training waits for at a checkpoint, against one copy of the state into touched memory.
fn capture_ratio() -> f64 {
    let state = State {
        tensors: vec![vec![7; STATE_BYTES / 128]; 128],
    };
    let mut target = vec![1u8; STATE_BYTES];
    let mut snapshot = Some(Snapshot::capture(&state, None));
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let start = now();
        snapshot = Some(Snapshot::capture(&state, snapshot.take()));
        let ours = seconds_since(start);
        let start = now();
        for (out, tensor) in target
            .chunks_exact_mut(STATE_BYTES / 128)
            .zip(&state.tensors)
        {
            out.copy_from_slice(tensor);
        }
        ratios.push(ours / seconds_since(start));
        std::hint::black_box(Bytes::copy_from_slice(&target[..64]));
    }
    median(ratios)
}
