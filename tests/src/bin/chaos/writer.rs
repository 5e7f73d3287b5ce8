//! A small program that writes what a run writes, with the real code, until it is killed.
//!
//! Each round: a record in the journal, a shard of trajectories with its COMMIT, a checkpoint with its COMMIT. A
//! line on standard output says of each that it was acknowledged, no earlier.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use distillery_common::checkpoint::{
    self, Dtype, Kind, Snapshot, StateSource, TensorSpec, Training,
};
use distillery_common::commit::TaskCommit;
use distillery_common::ids::{Digest, Generation, Incarnation};
use distillery_common::latents::schema::{Element, Origin, RowSchema, TrajectoryRow, Value, id_of};
use distillery_common::latents::{EmbeddingsWriter, ShardWriter};
use distillery_common::storage::layout;
use distillery_common::storage::{Created, FileEntry, Store};
use distillery_common::task::{Lease, TaskId};
use distillery_coordinator::driver::{Clock, unique_id};
use distillery_coordinator::journal::Journal;
use distillery_coordinator::scheduler::Record;

/// Numbers in a state.
const LATENT: [usize; 3] = [4, 4, 4];

/// Writes into `folder` until it is killed.
pub(crate) fn write(folder: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(forever(folder))
}

async fn forever(folder: &Path) -> anyhow::Result<()> {
    let store = Store::open_or_create(&folder.display().to_string())?;
    let clock = Clock::start();
    let mut journal = Journal::claim(&store, "nowhere:1", unique_id(), clock.spent()).await?;
    let term = journal.term();
    say(&format!("term {term}"))?;
    for round in 0u64.. {
        let stage = format!("t{term}-r{round}");
        let record = Record::StageStarted {
            stage: stage.clone(),
        };
        journal.append(&[record], clock.spent()).await?;
        say(&format!("record {stage}"))?;
        let lease = Lease {
            term,
            task: TaskId {
                stage: "trajectories".into(),
                index: term.0 * 1_000_000 + round,
            },
            attempt: 1,
            incarnation: Incarnation::new(term, 1),
        };
        let key = shard(&store, &lease).await?;
        say(&format!("commit {key}"))?;
        let key = save(&store, Generation(term.0), round + 1).await?;
        say(&format!("checkpoint {key}"))?;
    }
    Ok(())
}

/// What was printed reaches whoever reads it, even if this program ends at once.
fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// The dataset that shards are written to.
pub(crate) fn dataset() -> Digest {
    Digest::of(b"what the writer writes")
}

async fn shard(store: &Store, lease: &Lease) -> anyhow::Result<String> {
    let dataset = dataset();
    let schema = RowSchema {
        latent: Value::new(Element::F16, &LATENT),
        ctx: Value::new(Element::F16, &[2, 4]),
        pooled: None,
    };
    let origin = Origin {
        dataset,
        teacher: "writer".into(),
        config: dataset,
        latent_scale: 1.0,
    };
    let text = id_of(&[b"null"]);
    let ordinal = lease.task.index;
    let mut rows = ShardWriter::new(&schema, &origin)?;
    let latent: Vec<u8> = (0..LATENT.iter().product::<usize>())
        .flat_map(|i| (0x3800 | (i as u16 & 0xff)).to_le_bytes())
        .collect();
    for step in 0..5u16 {
        rows.push(&TrajectoryRow {
            traj_id: id_of(&[&ordinal.to_le_bytes()]),
            traj_ord: ordinal,
            prompt_id: text,
            seed: 1,
            guidance: 4.0,
            step,
            n_steps: 5,
            timestep: 999 - 249 * i32::from(step),
            segment: 3u16.saturating_sub(step),
            segments: 4,
            mode: "stratified",
            cond_id: text,
            uncond_id: text,
            latent: &latent,
            eps_w: &latent,
        })?;
    }
    let (rows, written) = rows.finish()?;
    let mut embeddings = EmbeddingsWriter::new(&schema, &origin)?;
    embeddings.push(text, &[0; 16], None)?;
    let embeddings = embeddings.finish()?;
    let folder = layout::shard(&layout::dataset(&dataset.short()), ordinal);
    let mut files = Vec::new();
    for (key, bytes) in [
        (layout::shard_rows(&folder, lease), rows),
        (layout::shard_embeddings(&folder, lease), embeddings),
    ] {
        files.push(FileEntry::of(&key, &bytes));
        store.put(&key, bytes).await?;
    }
    let commit = TaskCommit {
        lease: lease.clone(),
        inputs: dataset,
        files,
        rows: written.rows,
        schema: schema.id(),
        ordinals: ordinal..ordinal + 1,
        result: serde_json::Value::Null,
        cost: None,
    };
    let key = layout::commit(&folder);
    won(store.create(&key, commit.to_bytes()).await?)?;
    Ok(key.to_string())
}

struct State(u64);

impl StateSource for State {
    fn tensors(&self) -> Vec<TensorSpec> {
        vec![TensorSpec {
            kind: Kind::Student,
            name: "weight".into(),
            dtype: Dtype::F32,
            shape: vec![1024],
        }]
    }

    fn copy(&self, _: usize, _: usize, out: &mut [u8]) {
        out.fill((self.0 % 251) as u8 & 0x3f);
    }
}

async fn save(store: &Store, generation: Generation, step: u64) -> anyhow::Result<String> {
    let snapshot = Arc::new(Snapshot::capture(&State(step), None));
    let metrics = Bytes::from_static(b"\n");
    let training = Training {
        run: "writer".into(),
        recipe_digest: dataset().to_string(),
        dataset_digest: None,
        parent: None,
        milestones: vec![0, 999],
        schedule: "writer".into(),
        prediction_type: "epsilon".into(),
        skip: 1,
        seed: 1,
        global_batch: 1,
        lora: None,
        libtorch: "none".into(),
        cpu_capability: "none".into(),
    };
    let manifest =
        checkpoint::write(store, "w", step, generation, training, &snapshot, metrics).await?;
    let key = manifest.commit_key();
    won(store.create(&key, manifest.to_bytes()).await?)?;
    Ok(key.to_string())
}

fn won(created: Created) -> anyhow::Result<()> {
    let won = (created == Created::Won).then_some(());
    won.context("somebody else has written what is ours")
}
