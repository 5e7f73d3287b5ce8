//! What both sides compute on: the bundled teacher, rows like stored ones, and the settings of the bundled recipes.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use distillery_common::recipe::{self, Recipe, StudentKind};
use distillery_common::seed::{Purpose, Stream, normal};
use distillery_common::teacher::Folder;
use distillery_engine::diffusion::segments::Segments;
use distillery_engine::workbench::TeacherModel;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

const SEED: u64 = 1;
/// From t_m to t_n (arXiv 2406.05768v6, section 5.1).
const SKIP: u32 = 20;
const NUMBERS: &str = "problem.json";
const ROWS: &str = "rows.safetensors";

/// What is measured, by the names that both sides understand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// One evaluation with guidance, and its DDIM step.
    Guided,
    /// A step of ours, all weights.
    MlcmFull,
    /// A step of ours, adapters.
    MlcmLora,
    /// A step of latent consistency distillation, all weights.
    LcmFull,
    /// The same, adapters.
    LcmLora,
}

impl Work {
    /// As requests say it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Guided => "guided",
            Self::MlcmFull => "mlcm full",
            Self::MlcmLora => "mlcm lora",
            Self::LcmFull => "lcm full",
            Self::LcmLora => "lcm lora",
        }
    }
}

/// The problem but for its tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Numbers {
    /// The teacher's folder.
    pub(crate) teacher: PathBuf,
    pub(crate) guidance: f64,
    /// Of either side.
    pub(crate) threads: i32,
    /// Steps between two readings of the clock.
    pub(crate) repeats: u32,
    rate: f64,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    grad_clip: Option<f64>,
    lora: Adapters,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Adapters {
    rank: u32,
    alpha: f64,
    targets: Vec<String>,
}

/// The tensors of the problem: B rows. The file also holds each row's milestone, which the peer has no code for.
#[derive(Debug)]
pub(crate) struct Tensors {
    /// States `[B, C, H, W]`.
    pub(crate) z: Tensor,
    /// Stored predictions, of the shape of z.
    pub(crate) eps_w: Tensor,
    /// Times `[B]`.
    pub(crate) t: Tensor,
    /// Where the teacher's step from t ends, `[B]`.
    pub(crate) t_next: Tensor,
    /// Texts `[B, S, D]`.
    pub(crate) context: Tensor,
    /// The empty text `[1, S, D]`.
    pub(crate) null: Tensor,
}

/// The recipe whose first stage trains every weight, with the paper's skip: a longer one leaves the student fewer rows to
/// predict, and would flatter us.
pub(crate) fn full_recipe() -> Result<Recipe> {
    let mut recipe = load("quickstart.yaml")?;
    recipe.stages[0].skip = SKIP;
    Ok(recipe)
}

/// The recipe whose first stage trains adapters.
pub(crate) fn lora_recipe() -> Result<Recipe> {
    load("tiny.yaml")
}

/// The teacher of both recipes.
pub(crate) fn load_teacher(numbers: &Numbers) -> Result<TeacherModel> {
    let folder = Folder::open(&numbers.teacher, None)?;
    TeacherModel::load(&folder, Kind::Float, Device::Cpu).map_err(|fault| anyhow!("{fault}"))
}

/// Writes the problem into `folder`, for both sides.
///
/// Times fill the segments evenly, as stratified trajectories do, texts are prompts of the recipe; states and
/// predictions are noise, which costs the same.
pub(crate) fn write(folder: &Path, rows: u64, threads: i32, repeats: u32) -> Result<()> {
    let recipe = full_recipe()?;
    let numbers = numbers_of(&recipe, threads, repeats)?;
    let teacher = load_teacher(&numbers)?;
    let latent = teacher.parts.latent_shape();
    let segments = Segments::new(recipe.stages[0].segments)?;
    let times: Vec<i64> = (0..rows).map(|row| time_of(row, &segments)).collect();
    let t = Tensor::from_slice(&times);
    let prompts = std::fs::read_to_string(root().join("configs/prompts/scenes-train.txt"))?;
    let prompts: Vec<&str> = prompts.lines().cycle().take(rows as usize).collect();
    let named = [
        ("z", noise(Purpose::InitialNoise, rows, latent)),
        ("eps_w", noise(Purpose::ReferenceNoise, rows, latent)),
        ("t_next", segments.previous_times(&t, recipe.stages[0].skip)),
        ("target", segments.targets(&t)),
        ("t", t),
        ("context", teacher.parts.encode_prompts(&prompts).context),
        ("null", teacher.parts.null_conditioning(1).context),
    ];
    Tensor::write_safetensors(&named, folder.join(ROWS))?;
    std::fs::write(folder.join(NUMBERS), serde_json::to_vec(&numbers)?)?;
    Ok(())
}

/// Reads what [`write`] wrote.
pub(crate) fn read(folder: &Path) -> Result<(Numbers, Tensors)> {
    let numbers = serde_json::from_slice(&std::fs::read(folder.join(NUMBERS))?)?;
    let mut named = Tensor::read_safetensors(folder.join(ROWS))?;
    let mut take = |name: &str| {
        let at = named.iter().position(|(found, _)| found == name);
        let at = at.with_context(|| format!("the problem has no tensor {name}"))?;
        Ok::<_, anyhow::Error>(named.swap_remove(at).1)
    };
    let tensors = Tensors {
        z: take("z")?,
        eps_w: take("eps_w")?,
        t: take("t")?,
        t_next: take("t_next")?,
        context: take("context")?,
        null: take("null")?,
    };
    Ok((numbers, tensors))
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn load(name: &str) -> Result<Recipe> {
    let path = root().join("configs").join(name);
    recipe::load(&path, &[]).map_err(|faults| anyhow!("{}", faults.render(false)))
}

fn numbers_of(recipe: &Recipe, threads: i32, repeats: u32) -> Result<Numbers> {
    let optimizer = &recipe.stages[0].optimizer;
    let lora = match lora_recipe()?.stages.remove(0).student.kind {
        StudentKind::Lora {
            lora_rank,
            lora_alpha,
            targets,
        } => Adapters {
            rank: lora_rank,
            alpha: lora_alpha,
            targets,
        },
        StudentKind::Full => anyhow::bail!("configs/tiny.yaml trains no adapters"),
    };
    Ok(Numbers {
        teacher: recipe.teacher.model.clone(),
        guidance: recipe.teacher.guidance,
        threads,
        repeats,
        rate: optimizer.lr,
        betas: optimizer.betas,
        epsilon: optimizer.epsilon,
        weight_decay: optimizer.weight_decay,
        grad_clip: optimizer.grad_clip,
        lora,
    })
}

fn time_of(row: u64, segments: &Segments) -> i64 {
    let milestones = segments.milestones();
    let segment = row as usize % segments.count();
    let (low, high) = (milestones[segment], milestones[segment + 1]);
    let above = Stream::new(SEED, Purpose::TrajectoryTimes, row, 0).below((high - low) as u32);
    low + 1 + i64::from(above)
}

fn noise(purpose: Purpose, rows: u64, latent: [i64; 3]) -> Tensor {
    let len = latent.iter().product::<i64>() as usize;
    let values: Vec<f32> = (0..rows)
        .flat_map(|row| normal(SEED, purpose, row, 0, len))
        .collect();
    Tensor::from_slice(&values).view([rows as i64, latent[0], latent[1], latent[2]])
}
