//! `make bench-data`: what the data plane costs against the bytes themselves, side by side in one run (F3, F4).
//!
//! Every figure is a ratio of medians over interleaved rounds: machines are shared and noisy. The last line
//! holds all figures with their goals, and says MISSED where a goal is not reached. The exit code is 1 when one
//! misses its floor. Floors are no goals: they stand where the figures stood on a busy machine of two cores,
//! less its noise, and catch what makes things worse.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
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

/// One figure: what it is, what it should be, and what it must be.
struct Figure {
    name: &'static str,
    value: f64,
    goal: f64,
    floor: f64,
    /// Whether a larger value is better.
    more: bool,
}

impl Figure {
    fn holds(&self) -> bool {
        if self.more {
            self.value >= self.floor
        } else {
            self.value <= self.floor
        }
    }

    fn text(&self) -> String {
        let (sign, reached) = if self.more {
            ('≥', self.value >= self.goal)
        } else {
            ('≤', self.value <= self.goal)
        };
        let verdict = if reached { "" } else { ", MISSED" };
        let (name, value, goal) = (self.name, self.value, self.goal);
        format!("{name} {value:.4} (goal {sign} {goal}{verdict})")
    }
}

fn at_least(name: &'static str, value: f64, goal: f64, floor: f64) -> Figure {
    Figure {
        name,
        value,
        goal,
        floor,
        more: true,
    }
}

fn at_most(name: &'static str, value: f64, goal: f64, floor: f64) -> Figure {
    Figure {
        name,
        value,
        goal,
        floor,
        more: false,
    }
}

async fn bench() -> Result<ExitCode> {
    let place = tempfile::tempdir().context("a temporary folder")?;
    let store = Store::open_or_create(&place.path().join("run").display().to_string())?;
    let set = Set::new();
    let write = write_ratio(&store, &set, place.path()).await?;
    let manifest = set.seal(&store).await?;
    let file = manifest.shards[0].rows_file.clone();
    let dataset = Arc::new(Dataset::new(store.clone(), manifest, Options::default()));
    dataset.open_all().await?;
    let path = store
        .local_file(&file.key)
        .context("the store is a folder")?;
    let read = read_ratio(&dataset, &path).await?;
    let random = random_ratio(&dataset, &path).await?;
    let stall = loader_stall(&store, &dataset).await?;
    let capture = capture_ratio();
    if let Some(python) = std::env::var_os("DISTILLERY_PYTHON") {
        let pyarrow = pyarrow_seconds(Path::new(&python), &path)?;
        println!("pyarrow reads the same file in {pyarrow:.3} s");
    }
    let figures = [
        at_least("write / raw write + fsync", write, 0.9, 0.15),
        at_least("sequential read / raw read", read, 0.95, 0.4),
        at_most("random row p50 / raw pread", random, 1.2, 2.0),
        at_most("loader stall share of step time", stall, 0.001, 0.01),
        at_most("checkpoint stall / memory copy", capture, 1.1, 1.6),
    ];
    let texts: Vec<String> = figures.iter().map(Figure::text).collect();
    println!("bench-data: {}", texts.join(", "));
    Ok(if figures.iter().all(Figure::holds) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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

/// Our rows with digests, against the same number of bytes written raw; both end on the disk.
async fn write_ratio(store: &Store, set: &Set, place: &Path) -> Result<f64> {
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let key = layout::shard_rows(
            &layout::shard(&folder(), 9),
            &lease(u32::try_from(round)? + 2),
        );
        let start = now();
        let entry = set.write(store, &key).await?;
        let ours = seconds_since(start);
        let path = place.join("raw");
        let start = now();
        let mut raw = File::create(&path)?;
        for index in 0..entry.len / ROW_BYTES as u64 {
            raw.write_all(set.value(index))?;
        }
        raw.sync_all()?;
        ratios.push(seconds_since(start) / ours);
        std::fs::remove_file(path)?;
        store.delete(&key).await?;
    }
    Ok(median(ratios))
}

/// Every row in order through the reader, against the file in ranges of 4 MiB; both into touched memory.
async fn read_ratio(dataset: &Dataset, path: &Path) -> Result<f64> {
    let (mut staging, mut buffer) = (Staging::default(), vec![0u8; 4 << 20]);
    let mut ratios = Vec::new();
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
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let start = now();
        for at in (0..len).step_by(buffer.len()) {
            let part = buffer.len().min(usize::try_from(len - at)?);
            file.read_exact_at(&mut buffer[..part], at)?;
        }
        // The first round fills the page cache and the buffers.
        if round > 0 {
            ratios.push(seconds_since(start) / ours);
        }
    }
    Ok(median(ratios))
}

/// One row (state and prediction) at a time in the order of training, against two reads of as many bytes.
async fn random_ratio(dataset: &Dataset, path: &Path) -> Result<f64> {
    let order = Order {
        seed: 1,
        stage: 0,
        rows: dataset.rows(),
        global_batch: 1,
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

    fn copy(&self, index: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.tensors[index]);
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

/// How long pyarrow takes for the wide columns of the same file.
fn pyarrow_seconds(python: &Path, file: &Path) -> Result<f64> {
    const SCRIPT: &str = "
import sys, time, pyarrow.parquet as pq
best = 1e9
for _ in range(5):
    start = time.perf_counter()
    pq.read_table(sys.argv[1], columns=['latent', 'eps_w'], use_threads=False)
    best = min(best, time.perf_counter() - start)
print(best)
";
    let output = Command::new(python)
        .args(["-c", SCRIPT])
        .arg(file)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "DISTILLERY_PYTHON failed: {said}");
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}
