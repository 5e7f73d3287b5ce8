//! Draws one shard of teacher trajectories (algorithm.md §3): prompts → text states → guided DDIM → rows.
//!
//! Work goes in aligned blocks of `trajectories.batch` ordinals, always full: what lies beyond the count is
//! computed and dropped. Texts are encoded one at a time. So neither the worker, nor the attempt, nor the size
//! of a shard changes a bit of a row (ARCHITECTURE.md, "Same bits").

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use distillery_common::commit::TaskCommit;
use distillery_common::ids::Digest;
use distillery_common::latents::schema::{Element, Origin, RowSchema, TrajectoryRow, Value, id_of};
use distillery_common::latents::{EmbeddingsWriter, ShardWriter};
use distillery_common::prompts::{self, Prompt};
use distillery_common::recipe::TrajectoryMode;
use distillery_common::seed::{Purpose, Stream, normal};
use distillery_common::storage::layout::{self, PromptList};
use distillery_common::storage::{FileEntry, Upload};
use distillery_common::task::{FailureClass, Lease};
use distillery_common::teacher::digest_of_list;
use tch::{Kind, Tensor};

use super::{Fault, OrFault as _, host};
use crate::diffusion::denoiser::Conditioning;
use crate::diffusion::guidance::Guided;
use crate::diffusion::prediction::heads;
use crate::diffusion::segments::{Segments, TimeGrid};
use crate::diffusion::solver::ddim;
use crate::diffusion::trajectory::Choices;
use crate::link::{CommitRequest, Committed, Event};
use crate::workbench::{TeacherModel, Workbench};

/// Draws the shard that `lease` names, and gives the request that makes it count; none when the worker took the
/// lease back in between.
pub fn draw(bench: &mut Workbench, lease: &Lease) -> Result<Option<CommitRequest>, Fault> {
    let mut shard = Shard::open(bench, lease)?;
    let total = shard.ordinals.end - shard.ordinals.start;
    for first in shard.ordinals.clone().step_by(shard.batch as usize) {
        if bench.inbox.cancelled(lease) {
            bench.io.wait(shard.upload.abort())?;
            return Ok(None);
        }
        shard.draw_block(bench, first)?;
        let done = (first + shard.batch).min(shard.ordinals.end) - shard.ordinals.start;
        bench.link.send(Event::Progress {
            lease: lease.clone(),
            done,
            total,
        });
    }
    shard.finish(bench).map(Some)
}

/// A shard being drawn.
struct Shard {
    lease: Lease,
    folder: layout::Prefix,
    dataset: Digest,
    ordinals: Range<u64>,
    batch: u64,
    teacher: Rc<TeacherModel>,
    prompts: Vec<Prompt>,
    choices: Choices,
    segments: Segments,
    /// Text states `[1, S, D]` by prompt, with their id.
    texts: BTreeMap<[u8; 16], (Conditioning, [u8; 16])>,
    null: Conditioning,
    null_id: [u8; 16],
    schema: RowSchema,
    /// Names the text encoders within ids.
    text_digest: Digest,
    teacher_digest: Digest,
    rows: ShardWriter,
    upload: Upload,
    embeddings: EmbeddingsWriter,
}

impl Shard {
    fn open(bench: &mut Workbench, lease: &Lease) -> Result<Self, Fault> {
        let wanted = bench.recipe.trajectories.clone();
        let dataset = bench.record.dataset_digest.ok_or_else(|| {
            Fault::config("the run's record names no dataset, yet trajectories are asked for")
        })?;
        let folder = layout::shard(&layout::dataset(&dataset.short()), lease.task.index);
        let list = bench
            .io
            .wait(bench.store.get(&layout::prompts(PromptList::Train)))?;
        let prompts = prompts::from_parquet(&list).or_fault(FailureClass::Schema)?;
        let segments = Segments::new(wanted.segments).or_fault(FailureClass::Config)?;
        let grid = wanted
            .time_grid
            .map(TimeGrid::new)
            .transpose()
            .or_fault(FailureClass::Config)?;
        let teacher = bench.teacher(bench.recipe.teacher.dtype)?;
        let text_digest = digest_of_list(
            &bench
                .record
                .teacher_files
                .iter()
                .filter(|(path, _)| {
                    path.starts_with("text_encoder") || path.starts_with("tokenizer")
                })
                .map(|(path, digest)| (path.clone(), *digest))
                .collect(),
        );
        let teacher_digest = digest_of_list(&bench.record.teacher_files);
        let null = tch::no_grad(|| teacher.parts.null_conditioning(1));
        let schema = schema_of(&teacher, &null);
        let origin = Origin {
            dataset,
            teacher: teacher_digest.to_string(),
            config: bench.record.recipe_digest,
            latent_scale: teacher.parts.vae.config().scaling_factor,
        };
        let rows = ShardWriter::new(&schema, &origin).or_fault(FailureClass::Schema)?;
        let embeddings = EmbeddingsWriter::new(&schema, &origin).or_fault(FailureClass::Schema)?;
        let first = lease.task.index * wanted.shard_trajectories;
        Ok(Self {
            lease: lease.clone(),
            upload: bench.store.upload(&layout::shard_rows(&folder, lease)),
            folder,
            dataset,
            ordinals: first..(first + wanted.shard_trajectories).min(wanted.count),
            batch: wanted.batch,
            choices: Choices::new(&segments, grid.as_ref()).or_fault(FailureClass::Config)?,
            segments,
            teacher,
            prompts,
            texts: BTreeMap::new(),
            null,
            null_id: id_of(&[b"null", &text_digest.0]),
            schema,
            text_digest,
            teacher_digest,
            rows,
            embeddings,
        })
    }

    /// Draws the block of ordinals that starts at `first` and adds its rows.
    fn draw_block(&mut self, bench: &Workbench, first: u64) -> Result<(), Fault> {
        let seed = bench.recipe.seed;
        let ordinals: Vec<u64> = (first..first + self.batch).collect();
        let prompts: Vec<Prompt> = ordinals
            .iter()
            .map(|&o| {
                self.prompts[prompts::prompt_of(o, self.prompts.len() as u64, seed) as usize]
                    .clone()
            })
            .collect();
        let conditioning = self.conditioning(&prompts);
        let plans: Vec<Vec<i64>> = ordinals
            .iter()
            .map(|&o| self.plan(bench.recipe.trajectories.mode, seed, o))
            .collect();
        let z = initial_noise(
            &self.teacher,
            Purpose::InitialNoise,
            seed,
            &ordinals,
            bench.device,
        );
        let states = tch::no_grad(|| self.walk(bench, &plans, z, &conditioning));
        let count = (self.ordinals.end - first).min(self.batch) as usize;
        for row in 0..count {
            self.add_rows(
                bench,
                ordinals[row],
                &prompts[row],
                &plans[row],
                &states,
                row,
            )?;
        }
        bench
            .io
            .wait(self.rows.send(&mut self.upload))
            .or_fault(FailureClass::Io)
    }

    /// The times of one trajectory, its own times first to last.
    fn plan(&self, mode: TrajectoryMode, seed: u64, ordinal: u64) -> Vec<i64> {
        let mut stream = Stream::new(seed, Purpose::TrajectoryTimes, ordinal, 0);
        let mut below = |bound| stream.below(bound);
        match mode {
            TrajectoryMode::Stratified => self.choices.stratified(&mut below),
            TrajectoryMode::Alg1 => self.choices.alg1(&mut below),
        }
    }

    /// The states and guided predictions at every step of the block's plans, `[steps][z, n]` as f16 on the host.
    ///
    /// A plan that is shorter than the longest stays where it is: its last state is predicted again, equal.
    fn walk(
        &self,
        bench: &Workbench,
        plans: &[Vec<i64>],
        mut z: Tensor,
        conditioning: &Conditioning,
    ) -> Vec<[Vec<u8>; 2]> {
        let TeacherModel {
            parts,
            schedule,
            prediction,
        } = self.teacher.as_ref();
        let guided = Guided {
            denoiser: &parts.unet,
            null: &self.null,
            scale: bench.recipe.teacher.guidance,
        };
        let longest = plans.iter().map(Vec::len).max().unwrap_or(0);
        let times = |step: usize| {
            let at = |plan: &Vec<i64>| plan[step.min(plan.len() - 1)];
            Tensor::from_slice(&plans.iter().map(at).collect::<Vec<i64>>()).to_device(bench.device)
        };
        let mut states = Vec::with_capacity(longest);
        for step in 0..longest {
            let t = times(step);
            let n = guided.predict(&z, &t, conditioning);
            states.push([host::f16_bytes(&z), host::f16_bytes(&n)]);
            if step + 1 < longest {
                let u = times(step + 1);
                let moved = ddim(schedule, &heads(schedule, *prediction, &z, &n, &t), &u);
                // t = u is the identity in exact algebra; rounding must not move a state that has arrived.
                z = moved.where_self(&t.not_equal_tensor(&u).view([-1, 1, 1, 1]), &z);
            }
        }
        states
    }

    fn add_rows(
        &mut self,
        bench: &Workbench,
        ordinal: u64,
        prompt: &Prompt,
        plan: &[i64],
        states: &[[Vec<u8>; 2]],
        row: usize,
    ) -> Result<(), Fault> {
        let wanted = &bench.recipe.trajectories;
        let size = self.schema.latent.bytes();
        let slice = row * size..(row + 1) * size;
        let cond_id = self.texts[&prompt.id()].1;
        let states_visited = plan.len() as u16;
        let (first, mode) = match wanted.mode {
            TrajectoryMode::Stratified => (0, "stratified"),
            // Algorithm 1 keeps the state it walked to, and nothing on the way.
            TrajectoryMode::Alg1 => (plan.len() - 1, "alg1"),
        };
        for (step, &t) in plan.iter().enumerate().skip(first) {
            self.rows
                .push(&TrajectoryRow {
                    traj_id: id_of(&[
                        &self.dataset.0,
                        &self.teacher_digest.0,
                        &prompt.id(),
                        &ordinal.to_le_bytes(),
                    ]),
                    traj_ord: ordinal,
                    prompt_id: prompt.id(),
                    seed: bench.recipe.seed,
                    guidance: bench.recipe.teacher.guidance as f32,
                    step: step as u16,
                    n_steps: states_visited,
                    timestep: t as i32,
                    segment: self.segments.segment_of(t) as u16,
                    segments: wanted.segments as u16,
                    mode,
                    cond_id,
                    uncond_id: self.null_id,
                    latent: &states[step][0][slice.clone()],
                    eps_w: &states[step][1][slice.clone()],
                })
                .or_fault(FailureClass::Schema)?;
        }
        Ok(())
    }

    /// The text states of a block, each text encoded alone and once.
    fn conditioning(&mut self, prompts: &[Prompt]) -> Conditioning {
        for prompt in prompts {
            let parts = &self.teacher.parts;
            let text_digest = &self.text_digest.0;
            self.texts.entry(prompt.id()).or_insert_with(|| {
                let id = id_of(&[b"text", text_digest, prompt.text().as_bytes()]);
                (tch::no_grad(|| parts.encode_prompts(&[prompt.text()])), id)
            });
        }
        let rows: Vec<&Conditioning> = prompts.iter().map(|p| &self.texts[&p.id()].0).collect();
        Conditioning::stack(&rows)
    }

    /// Writes the embeddings, ends the upload and puts together the commit.
    fn finish(mut self, bench: &Workbench) -> Result<CommitRequest, Fault> {
        let null = (&self.null, self.null_id);
        for (conditioning, id) in self.texts.values().map(|(c, id)| (c, *id)).chain([null]) {
            let pooled = conditioning.pooled.as_ref().map(host::f16_bytes);
            self.embeddings
                .push(
                    id,
                    &host::f16_bytes(&conditioning.context),
                    pooled.as_deref(),
                )
                .or_fault(FailureClass::Schema)?;
        }
        let (rows, written) = bench
            .io
            .wait(self.rows.finish_into(self.upload))
            .or_fault(FailureClass::Io)?;
        let embeddings = self.embeddings.finish().or_fault(FailureClass::Schema)?;
        let key = layout::shard_embeddings(&self.folder, &self.lease);
        let files = vec![rows, FileEntry::of(&key, &embeddings)];
        bench.io.wait(bench.store.put(&key, embeddings))?;
        let commit = TaskCommit {
            lease: self.lease.clone(),
            inputs: self.dataset,
            files,
            rows: written.rows,
            schema: self.schema.id(),
            ordinals: self.ordinals,
            result: serde_json::Value::Null,
            cost: Some(bench.meter.cost()),
        };
        Ok(CommitRequest {
            key: layout::commit(&self.folder),
            bytes: commit.total_bytes(),
            rows: commit.rows,
            body: commit.to_bytes(),
            what: Committed::Task(self.lease),
        })
    }
}

/// What rows and embeddings of `teacher` look like.
fn schema_of(teacher: &TeacherModel, null: &Conditioning) -> RowSchema {
    let value = |shape: &[i64]| {
        let shape: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
        Value::new(Element::F16, &shape)
    };
    RowSchema {
        latent: value(&teacher.parts.latent_shape()),
        ctx: value(&null.context.size()[1..]),
        pooled: null
            .pooled
            .as_ref()
            .map(|pooled| value(&pooled.size()[1..])),
    }
}

/// Standard normal latents `[B, C, H, W]` in f32, each from the stream of its ordinal.
pub fn initial_noise(
    teacher: &TeacherModel,
    purpose: Purpose,
    seed: u64,
    ordinals: &[u64],
    device: tch::Device,
) -> Tensor {
    noise(
        &teacher.parts.latent_shape(),
        purpose,
        seed,
        ordinals,
        0,
        device,
    )
}

/// Draw `draw` of every ordinal: standard normal `[B, C, H, W]` in f32, made on the CPU.
pub fn noise(
    shape: &[i64; 3],
    purpose: Purpose,
    seed: u64,
    ordinals: &[u64],
    draw: u16,
    device: tch::Device,
) -> Tensor {
    let len = shape.iter().product::<i64>() as usize;
    let values: Vec<f32> = ordinals
        .iter()
        .flat_map(|&o| normal(seed, purpose, o, draw, len))
        .collect();
    Tensor::from_slice(&values)
        .view([ordinals.len() as i64, shape[0], shape[1], shape[2]])
        .to_kind(Kind::Float)
        .to_device(device)
}
