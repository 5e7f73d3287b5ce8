//! The user's recipe, checked: once a [`Recipe`] exists, every value in it is usable.
//!
//! `raw` reads the YAML as a tree with positions, `check` turns it into these types and collects every
//! complaint, `digest` names what a result depends on. Stages come fully resolved: what a stage does not say
//! itself is filled in from the sections above it.

mod check;
mod digest;
mod fault;
mod kubernetes;
mod load;
mod nearest;
mod raw;
mod schema;
mod set;
pub mod slurm;
mod table;

pub use digest::canonical;
pub use fault::{Code, Fault, Faults};
pub use kubernetes::{Kubernetes, Toleration, Volume};
pub use load::{load, load_for_elsewhere, parse};
pub use raw::{Origin, Span};
pub use schema::json_schema;

use std::path::PathBuf;

/// A checked recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Name for people; `[A-Za-z0-9._=-]+`.
    pub name: String,
    /// All randomness derives from it.
    pub seed: u64,
    /// The run URI: journal, trajectories, checkpoints, exports, logs.
    pub output: String,
    /// The model to learn from.
    pub teacher: Teacher,
    /// The texts to learn on and to be judged by.
    pub prompts: Prompts,
    /// What the teacher draws.
    pub trajectories: Trajectories,
    /// Training stages in order, each resolved.
    pub stages: Vec<Stage>,
    /// When state is saved and what is kept.
    pub checkpoint: Checkpoint,
    /// What sample grids show.
    pub preview: Preview,
    /// How students are judged; none when the section is `false`.
    pub evaluate: Option<Evaluate>,
    /// What is written at the end; none when the section is `false`.
    pub export: Option<Export>,
    /// Who does the work.
    pub cluster: Cluster,
    /// Arithmetic outside the training stages: trajectories and evaluation.
    pub compute: Compute,
}

/// Number formats of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

/// The model to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Teacher {
    /// A folder in the diffusers layout; absolute, or relative to the recipe file and made absolute.
    pub model: PathBuf,
    /// `fp16` picks `*.fp16.safetensors`.
    pub variant: Option<String>,
    /// What its weights are computed in.
    pub dtype: Dtype,
    /// Guidance scale w in `n_null + w (n_cond - n_null)` (Imagen form; w = 1 means none).
    pub guidance: f64,
}

/// The texts to learn on and to be judged by.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompts {
    /// .txt, .jsonl or .parquet.
    pub train: PathBuf,
    /// Prompts that training never sees.
    pub holdout: Holdout,
    /// Prompts of the sample grids; the first held-out ones when none.
    pub preview: Option<PathBuf>,
}

/// Where held-out prompts come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Holdout {
    /// This share of `train`, chosen by hash of the text.
    Share(f64),
    /// A file of their own.
    File(PathBuf),
}

/// How states are drawn from teacher trajectories (algorithm.md §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrajectoryMode {
    /// One pass visits every segment; every visited state is kept with its guided prediction.
    Stratified,
    /// Algorithm 1 of arXiv 2406.05768v6: one pass for each kept state.
    Alg1,
}

/// What the teacher draws.
#[derive(Debug, Clone, PartialEq)]
pub struct Trajectories {
    /// Number of trajectories.
    pub count: u64,
    /// Segments of the finest stage.
    pub segments: u32,
    /// How states are drawn.
    pub mode: TrajectoryMode,
    /// Number of equally spaced times that states may lie on; none = every integer time.
    pub time_grid: Option<u32>,
    /// Trajectories in one shard, a multiple of `batch`.
    pub shard_trajectories: u64,
    /// Trajectories computed together; part of the result's identity.
    pub batch: u64,
    /// Share of shards that may be set aside for bad input.
    pub quarantine: f64,
    /// An earlier set to reuse instead of making one.
    pub uri: Option<String>,
}

/// Which objective a stage trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Multistep latent consistency distillation, teacher-free from stored rows (arXiv 2406.05768, eq. 7-8).
    Mlcm,
    /// Latent consistency distillation over one segment (arXiv 2310.04378).
    Lcm,
    /// Multistep consistency distillation in a single stage at fixed segments (arXiv 2403.06807).
    Mcd,
}

/// Where the target's teacher step comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TeacherStep {
    /// The guided prediction stored with the row: no teacher in memory.
    Stored,
    /// Two teacher passes for each batch.
    Online,
}

/// One training stage, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// Unique; names its checkpoints and exports.
    pub name: String,
    /// What is minimised.
    pub method: Method,
    /// Position in [`Recipe::stages`] of the stage whose student it starts from, smaller than its own; none = the
    /// teacher.
    pub from: Option<usize>,
    /// Number of segments M.
    pub segments: u32,
    /// Distance from t_m to t_n in timesteps.
    pub skip: u32,
    /// Optimizer steps.
    pub steps: u64,
    /// Where the target's teacher step comes from.
    pub teacher_step: TeacherStep,
    /// What is trained.
    pub student: Student,
    /// How it is trained.
    pub optimizer: Optimizer,
    /// How many rows a step sees.
    pub batch: Batch,
    /// Distance between the two landings.
    pub loss: Loss,
    /// Arithmetic of the forward and backward passes.
    pub compute: Compute,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Student {
    /// Adapters or everything.
    pub kind: StudentKind,
    /// Decay of an exponential moving average that is sampled and exported instead, if any.
    pub ema_decay: Option<f64>,
}

/// Adapters or everything.
#[derive(Debug, Clone, PartialEq)]
pub enum StudentKind {
    /// Every weight of the denoiser.
    Full,
    /// Low-rank adapters beside frozen weights.
    Lora {
        /// Inner width r.
        lora_rank: u32,
        /// The delta is multiplied by `lora_alpha / lora_rank`.
        lora_alpha: f64,
        /// Last components of the module paths that get an adapter (`to_q`, `to_out.0`, `conv1`, …).
        targets: Vec<String>,
    },
}

/// AdamW and its learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm; none = no clipping.
    pub grad_clip: Option<f64>,
    /// Shape of the learning rate over the steps.
    pub schedule: RateSchedule,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps in a row that a non-finite gradient may cost; one more ends the stage, so 0 allows none.
    pub max_skipped: u32,
    /// Whether each member of a group keeps the moments of a share of the values alone.
    pub sharded: bool,
}

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateSchedule {
    /// Stays at `lr`.
    Constant,
    /// Half a cosine down to zero at the last step.
    Cosine,
    /// A line down to zero at the last step.
    Linear,
}

/// How many rows a step sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Rows in one optimizer step over all engines.
    pub global: u64,
    /// Rows in one forward pass; none = the engine's whole share, or the virtual rank's.
    pub micro: Option<u64>,
    /// In how many shares the gradients of a step are computed and added up, whatever the number of engines, so that
    /// bits do not depend on it; none where they may.
    pub virtual_ranks: Option<u32>,
}

/// Distance between two landings, mean over elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Squared L2.
    L2,
    /// `sqrt(d^2 + c^2) - c`.
    Huber {
        /// Where it turns from square to linear.
        c: f64,
    },
}

/// Arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// Of forward and backward passes; masters stay f32.
    pub dtype: Dtype,
    /// CPU threads of one engine; none = cores divided by the engines of this host.
    pub threads: Option<u32>,
    /// Whether the backward pass computes activations again instead of keeping them. Changes no bit of a result.
    pub recompute: bool,
}

/// When state is saved and what is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Steps between checkpoints; the last step always has one.
    pub every_steps: u64,
    /// Newest checkpoints kept in each stage.
    pub keep_last: u32,
    /// Whether the final checkpoint of each stage stays after the next stage has ended.
    pub keep_every_stage: bool,
    /// Whether every member of a group writes a share of each checkpoint.
    pub sharded: bool,
}

/// What sample grids show.
#[derive(Debug, Clone, PartialEq)]
pub struct Preview {
    /// Step counts, one column each.
    pub steps: Vec<u32>,
    /// How students are sampled.
    pub sampler: Sampler,
    /// One row for each prompt and seed.
    pub seeds: Vec<u64>,
}

/// Ways to draw from a denoiser (algorithm.md §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sampler {
    /// The teacher's own deterministic solver.
    Ddim,
    /// The official few-step lists with fresh noise.
    Tlcm9,
    /// The times of diffusers' LCMScheduler with fresh noise.
    Lcm,
    /// Deterministic landings on milestones.
    Segments,
}

/// How students are judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluate {
    /// Samples for each model, sampler and step count.
    pub samples: u64,
    /// Step counts of students.
    pub steps: Vec<u32>,
    /// Step counts of the teacher's own solver; the largest is the reference.
    pub teacher_steps: Vec<u32>,
    /// Samplers of students.
    pub samplers: Vec<Sampler>,
    /// What is measured.
    pub metrics: Vec<Metric>,
    /// Samples computed together.
    pub batch: u64,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Fréchet distance between Gaussian fits of latents, to the teacher's.
    LatentFrechet,
    /// Mean squared distance to the teacher's reference result from the same noise.
    TeacherDistance,
    /// Share of right attributes, read from the decoded image by the scorer of the teacher folder.
    PromptAdherence,
}

/// What is written at the end.
#[derive(Debug, Clone, PartialEq)]
pub struct Export {
    /// In which forms.
    pub formats: Vec<ExportFormat>,
    /// Format of the written weights.
    pub dtype: Dtype,
    /// Load again what was written and compare.
    pub verify: bool,
}

/// Forms of a finished student.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExportFormat {
    /// A pipeline folder with an LCMScheduler configuration.
    Diffusers,
    /// `lora_unet_*` keys with alpha, loaded by every tool.
    LoraUniversal,
}

/// Who does the work.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Who starts workers.
    pub launcher: Launcher,
    /// Fewest workers that training starts with.
    pub min_workers: u32,
    /// Most workers used.
    pub max_workers: u32,
    /// Address of the gRPC service.
    pub listen: String,
    /// Address of the live page and of `/metrics`; none where nobody wants them.
    pub http: Option<String>,
    /// Whether workers must use TLS; `auto` = on.
    pub tls: Tls,
    /// The run's token; made and kept in a 0600 file beside the run when none is given.
    pub token: Option<Secret>,
    /// What workers are as pods; always there with [`Launcher::Kubernetes`].
    pub kubernetes: Option<Kubernetes>,
}

/// Who starts workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launcher {
    /// The coordinator, on its own host.
    Local,
    /// Somebody else: `worker join …`.
    External,
    /// The coordinator, as pods of a Kubernetes cluster.
    Kubernetes,
    /// Slurm: an array of jobs of one host each, which the coordinator submits and replaces.
    Slurm(Box<slurm::Slurm>),
}

/// Whether workers must use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// Always.
    On,
    /// Never; the command line must say `--insecure` too unless only 127.0.0.1 is bound.
    Off,
}

/// Text that must not reach logs, journal, digests or error messages.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What `from` calls the teacher.
pub const TEACHER: &str = "teacher";

impl Recipe {
    /// The name of what `stage` starts from: an earlier stage, or [`TEACHER`].
    pub fn origin_of(&self, stage: &Stage) -> &str {
        stage
            .from
            .map_or(TEACHER, |at| self.stages[at].name.as_str())
    }
}

/// Tasks that the teacher's reference samples are cut into, at most.
const REFERENCE_TASKS: u64 = 16;

impl Evaluate {
    /// Samples in one task of the stage `reference`: whole batches, so that no batch is shared by two tasks.
    pub fn reference_block(&self) -> u64 {
        let batch = self.batch.max(1);
        let batches = self.samples.div_ceil(batch);
        batches.div_ceil(REFERENCE_TASKS).max(1) * batch
    }
}
