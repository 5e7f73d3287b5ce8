//! Small datasets and checkpoints, made as engines make them.

use std::sync::Arc;

use bytes::Bytes;
use distillery_common::checkpoint::{
    self, Dtype, Kind, Snapshot, StateSource, TensorSpec, Training,
};
use distillery_common::commit::TaskCommit;
use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::latents::schema::{Element, Origin, RowSchema, TrajectoryRow, Value, id_of};
use distillery_common::latents::{EmbeddingsWriter, ShardWriter};
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::storage::{Created, Store};
use distillery_common::task::{Lease, TaskId};

/// What the rows are made from.
pub(crate) fn dataset_digest() -> Digest {
    Digest::of(b"fixture")
}

pub(crate) fn folder() -> Prefix {
    layout::dataset(&dataset_digest().short())
}

pub(crate) fn schema(latent: &[usize]) -> RowSchema {
    RowSchema {
        latent: Value::new(Element::F16, latent),
        ctx: Value::new(Element::F16, &[2, 3]),
        pooled: Some(Value::new(Element::F16, &[3])),
    }
}

pub(crate) fn origin() -> Origin {
    Origin {
        dataset: dataset_digest(),
        teacher: "fixture".into(),
        config: Digest::of(b"config"),
        latent_scale: 0.13025,
    }
}

/// Bytes that differ for every (trajectory, step, column).
pub(crate) fn value(bytes: usize, trajectory: u64, step: u16, column: u64) -> Vec<u8> {
    let mut state = trajectory << 20 ^ u64::from(step) << 4 ^ column;
    (0..bytes)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

pub(crate) fn cond_id(trajectory: u64) -> [u8; 16] {
    id_of(&[b"prompt", &(trajectory % 3).to_le_bytes()])
}

pub(crate) fn uncond_id() -> [u8; 16] {
    id_of(&[b"empty"])
}

/// The rows of trajectories `ordinals`, each of `steps` steps, and their embeddings.
pub(crate) fn shard(
    schema: &RowSchema,
    ordinals: std::ops::Range<u64>,
    steps: u16,
) -> (Bytes, Bytes) {
    let mut rows = ShardWriter::new(schema, &origin()).expect("the schema is sound");
    let mut embeddings = EmbeddingsWriter::new(schema, &origin()).expect("the schema is sound");
    let pooled = schema.pooled.as_ref().map_or(0, Value::bytes);
    for trajectory in ordinals {
        for id in [cond_id(trajectory), uncond_id()] {
            let text = id.repeat(8);
            embeddings
                .push(id, &text[..schema.ctx.bytes()], Some(&text[..pooled]))
                .expect("it fits the schema");
        }
        for step in 0..steps {
            let latent = value(schema.row_bytes(), trajectory, step, 0);
            let eps_w = value(schema.row_bytes(), trajectory, step, 1);
            rows.push(&TrajectoryRow {
                traj_id: id_of(&[&trajectory.to_le_bytes()]),
                traj_ord: trajectory,
                prompt_id: cond_id(trajectory),
                seed: 42,
                guidance: 8.0,
                step,
                n_steps: steps,
                timestep: 999 - 100 * i32::from(step),
                segment: steps - 1 - step,
                segments: steps,
                mode: "stratified",
                cond_id: cond_id(trajectory),
                uncond_id: uncond_id(),
                latent: &latent,
                eps_w: &eps_w,
            })
            .expect("it fits the schema");
        }
    }
    let (bytes, written) = rows.finish().expect("it is encoded");
    assert!(written.rows > 0);
    (bytes, embeddings.finish().expect("it is encoded"))
}

pub(crate) fn lease(index: u64, attempt: u32) -> Lease {
    Lease {
        term: Term(1),
        task: TaskId {
            stage: "trajectories".into(),
            index,
        },
        attempt,
        incarnation: Incarnation::new(Term(1), attempt),
    }
}

/// Stores and commits shard `index` as `attempt` would.
pub(crate) async fn commit_shard(
    store: &Store,
    schema: &RowSchema,
    index: u64,
    attempt: u32,
    ordinals: std::ops::Range<u64>,
    steps: u16,
) -> Created {
    let place = layout::shard(&folder(), index);
    let lease = lease(index, attempt);
    let (rows, embeddings) = shard(schema, ordinals.clone(), steps);
    let mut files = Vec::new();
    for (key, bytes) in [
        (layout::shard_rows(&place, &lease), rows),
        (layout::shard_embeddings(&place, &lease), embeddings),
    ] {
        let mut upload = store.upload(&key);
        upload.write(bytes).await.expect("it is written");
        files.push(upload.finish().await.expect("it is written"));
    }
    let commit = TaskCommit {
        lease,
        inputs: dataset_digest(),
        files,
        rows: (ordinals.end - ordinals.start) * u64::from(steps),
        schema: schema.id(),
        ordinals,
        result: serde_json::Value::Null,
        cost: None,
    };
    store
        .create(&layout::commit(&place), commit.to_bytes())
        .await
        .expect("an answer")
}

/// A training state of a few small tensors.
pub(crate) struct State;

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |kind, name: &str, dtype, shape: &[u64]| TensorSpec {
            kind,
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        vec![
            spec(Kind::AdamV, "conv.weight", Dtype::F32, &[2, 3]),
            spec(Kind::Student, "conv.weight", Dtype::F32, &[2, 3]),
            spec(Kind::Student, "conv.bias", Dtype::Bf16, &[5]),
            spec(Kind::AdamM, "conv.weight", Dtype::F32, &[2, 3]),
            spec(Kind::Ema, "scale", Dtype::F32, &[]),
        ]
    }

    fn copy(&self, index: usize, start: usize, out: &mut [u8]) {
        let bytes = self.tensors()[index].bytes().expect("small");
        let whole = value(bytes as usize, index as u64, 0, 9);
        out.copy_from_slice(&whole[start..start + out.len()]);
    }
}

pub(crate) fn training() -> Training {
    Training {
        run: "01920000-0000-7000-8000-000000000001".into(),
        recipe_digest: Digest::of(b"recipe").to_string(),
        dataset_digest: Some(Digest::of(b"dataset").to_string()),
        parent: None,
        milestones: vec![0, 249, 499, 749, 999],
        schedule: "scaled_linear 0.00085 0.012 1000".into(),
        prediction_type: "epsilon".into(),
        skip: 20,
        seed: 42,
        global_batch: 16,
        lora: None,
        libtorch: "2.11.0".into(),
        cpu_capability: "AVX2".into(),
    }
}

/// Writes and commits a checkpoint of [`State`].
pub(crate) async fn commit_checkpoint(
    store: &Store,
    step: u64,
    generation: u64,
) -> checkpoint::Manifest {
    let snapshot = Arc::new(Snapshot::capture(&State, None));
    let metrics = Bytes::from_static(b"{\"step\":1}\n");
    let generation = Generation(generation);
    let manifest = checkpoint::write(
        store,
        "seg4",
        step,
        generation,
        training(),
        &snapshot,
        metrics,
    )
    .await
    .expect("it is written");
    let created = store
        .create(&manifest.commit_key(), manifest.to_bytes())
        .await;
    assert_eq!(created.expect("an answer"), Created::Won);
    manifest
}
