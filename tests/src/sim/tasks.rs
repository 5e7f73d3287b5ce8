//! Tasks: shards of trajectories with real files, and small results for everything else.

use std::time::Duration;

use distillery_common::commit::TaskCommit;
use distillery_common::latents::schema::{Element, Origin, RowSchema, TrajectoryRow, Value, id_of};
use distillery_common::latents::{EmbeddingsWriter, ShardWriter};
use distillery_common::proto::engine_link::{CommitRequest, Committed, Event};
use distillery_common::seed::{Purpose, Stream};
use distillery_common::storage::FileEntry;
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::task::{Failure, FailureClass, Lease};
use distillery_common::telemetry::Meter;
use serde_json::json;

use super::{Bench, fault};

/// Numbers in a state.
const LATENT: [usize; 3] = [4, 4, 4];
/// Name of the stage that draws trajectories.
const TRAJECTORIES: &str = "trajectories";

/// Does the task of `lease`, and gives the request that makes it count; none when it was cancelled.
pub(super) fn perform(bench: &mut Bench, lease: &Lease) -> Result<Option<CommitRequest>, Failure> {
    if lease.task.stage == TRAJECTORIES {
        shard(bench, lease)
    } else {
        result(bench, lease)
    }
}

/// Works for a share of the task's time; false when the task was cancelled.
fn pause(bench: &mut Bench, lease: &Lease, done: u64, total: u64) -> bool {
    bench.inbox.listen(Duration::from_micros(
        bench.pace.task_ms * 1000 / total.max(1),
    ));
    bench.link.send(Event::Progress {
        lease: lease.clone(),
        done,
        total,
    });
    !bench.inbox.cancelled(lease)
}

fn shard(bench: &mut Bench, lease: &Lease) -> Result<Option<CommitRequest>, Failure> {
    let meter = Meter::start();
    let wanted = bench.recipe.trajectories.clone();
    let dataset = bench
        .record
        .dataset_digest
        .ok_or_else(|| fault(FailureClass::Config, "the run's record names no dataset"))?;
    let folder = layout::shard(&layout::dataset(&dataset.short()), lease.task.index);
    let first = lease.task.index * wanted.shard_trajectories;
    let ordinals = first..(first + wanted.shard_trajectories).min(wanted.count);
    let schema = RowSchema {
        latent: Value::new(Element::F16, &LATENT),
        ctx: Value::new(Element::F16, &[2, 4]),
        pooled: None,
    };
    let origin = Origin {
        dataset,
        teacher: "stand-in".into(),
        config: bench.record.recipe_digest,
        latent_scale: 1.0,
    };
    let schema_error = |error| fault(FailureClass::Schema, error);
    let mut rows = ShardWriter::new(&schema, &origin).map_err(schema_error)?;
    let null_id = id_of(&[b"null"]);
    let total = ordinals.end - ordinals.start;
    for ordinal in ordinals.clone() {
        push_trajectory(bench, &mut rows, ordinal, null_id)?;
        if !pause(bench, lease, ordinal + 1 - ordinals.start, total) {
            return Ok(None);
        }
    }
    let (rows, written) = rows.finish().map_err(schema_error)?;
    let mut embeddings = EmbeddingsWriter::new(&schema, &origin).map_err(schema_error)?;
    embeddings
        .push(null_id, &[0; 16], None)
        .map_err(schema_error)?;
    let embeddings = embeddings.finish().map_err(schema_error)?;
    let mut files = Vec::new();
    for (key, bytes) in [
        (layout::shard_rows(&folder, lease), rows),
        (layout::shard_embeddings(&folder, lease), embeddings),
    ] {
        files.push(FileEntry::of(&key, &bytes));
        put(bench, &key, bytes)?;
    }
    let commit = TaskCommit {
        lease: lease.clone(),
        inputs: dataset,
        files,
        rows: written.rows,
        schema: schema.id(),
        ordinals,
        result: serde_json::Value::Null,
        cost: Some(meter.cost()),
    };
    Ok(Some(request(&folder, commit)))
}

fn push_trajectory(
    bench: &Bench,
    rows: &mut ShardWriter,
    ordinal: u64,
    text: [u8; 16],
) -> Result<(), Failure> {
    let segments = bench.recipe.trajectories.segments;
    for step in 0..=segments {
        let draw = step as u16;
        let seed = bench.recipe.seed;
        rows.push(&TrajectoryRow {
            traj_id: id_of(&[&ordinal.to_le_bytes()]),
            traj_ord: ordinal,
            prompt_id: text,
            seed,
            guidance: bench.recipe.teacher.guidance as f32,
            step: draw,
            n_steps: segments as u16 + 1,
            timestep: (999 - 999 * step / segments) as i32,
            segment: segments.saturating_sub(step + 1) as u16,
            segments: segments as u16,
            mode: "stratified",
            cond_id: text,
            uncond_id: text,
            latent: &numbers(seed, Purpose::InitialNoise, ordinal, draw),
            eps_w: &numbers(seed, Purpose::Renoise, ordinal, draw),
        })
        .map_err(|error| fault(FailureClass::Schema, error))?;
    }
    Ok(())
}

/// Half floats between 1/2 and 2 of either sign: every one finite.
fn numbers(seed: u64, purpose: Purpose, ordinal: u64, draw: u16) -> Vec<u8> {
    let mut stream = Stream::new(seed, purpose, ordinal, draw);
    (0..LATENT.iter().product())
        .flat_map(|_| (stream.next_u32() as u16 & 0x87ff | 0x3800).to_le_bytes())
        .collect()
}

/// A task whose result is a pure function of its name and the checkpoints before it.
fn result(bench: &mut Bench, lease: &Lease) -> Result<Option<CommitRequest>, Failure> {
    const PARTS: u64 = 4;
    let meter = Meter::start();
    for part in 1..=PARTS {
        if !pause(bench, lease, part, PARTS) {
            return Ok(None);
        }
    }
    let folder = layout::task(&lease.task.stage, lease.task.index);
    let mut stream = Stream::new(
        bench.recipe.seed,
        Purpose::EvaluationNoise,
        lease.task.index,
        0,
    );
    let body = format!("{} {}\n", lease.task, stream.next_u64());
    let key = layout::task_file(&folder, lease, "result.txt");
    let files = vec![FileEntry::of(&key, body.as_bytes())];
    put(bench, &key, body.into_bytes().into())?;
    let commit = TaskCommit {
        lease: lease.clone(),
        inputs: bench.record.recipe_digest,
        files,
        rows: 1,
        schema: String::new(),
        ordinals: lease.task.index..lease.task.index + 1,
        result: judgement(&lease.task.stage),
        cost: Some(meter.cost()),
    };
    Ok(Some(request(&folder, commit)))
}

/// What the report reads of an evaluation; nothing of other tasks.
fn judgement(stage: &str) -> serde_json::Value {
    match stage {
        "evaluate" => json!({"figures": [], "grid": null}),
        _ => json!([]),
    }
}

fn put(bench: &Bench, key: &layout::Key, bytes: bytes::Bytes) -> Result<(), Failure> {
    let done = bench.runtime.block_on(bench.store.put(key, bytes));
    done.map_err(|error| fault(FailureClass::Io, error))
}

fn request(folder: &Prefix, commit: TaskCommit) -> CommitRequest {
    CommitRequest {
        key: layout::commit(folder),
        body: commit.to_bytes(),
        rows: commit.rows,
        bytes: commit.total_bytes(),
        what: Committed::Task(commit.lease),
    }
}
