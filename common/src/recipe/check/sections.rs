//! From resolved values to the recipe's types. Nothing is refused here: the table has been obeyed, and faulty
//! values were replaced. What depends on several keys is decided here: defaults of one key that follow from
//! another. This module must never know where a value stood.

mod kubernetes;
mod slurm;

use std::path::PathBuf;

use super::super::{
    Batch, Checkpoint, Cluster, Compute, Dtype, Evaluate, Export, ExportFormat, Holdout, Launcher,
    Loss, Method, Metric, Optimizer, Preview, Prompts, RateSchedule, Recipe, Sampler, Secret,
    Stage, Student, StudentKind, TEACHER, Teacher, TeacherStep, Tls, Trajectories, TrajectoryMode,
};
use super::resolve::{Checked, Resolved};

/// Modules that get adapters in the preset `lcm` (formats.md §7).
pub(crate) const LCM_TARGETS: [&str; 14] = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
];

/// The training times of every supported schedule.
pub(super) const TIMES: u64 = 1000;

/// Skip without a grid (arXiv 2406.05768v6 §5.1).
const FREE_SKIP: u32 = 20;

/// Reads fields of a resolved section; what the table promises is not asked again.
#[derive(Clone, Copy)]
struct View<'a>(&'a Resolved);

impl<'a> View<'a> {
    fn get(self, key: &str) -> View<'a> {
        View(self.0.child(key).expect("the table has this key"))
    }

    fn section(self, key: &str) -> Option<View<'a>> {
        let child = self.get(key);
        matches!(child.0.value, Checked::Section(_)).then_some(child)
    }

    fn maybe_whole(self) -> Option<u64> {
        match self.0.value {
            Checked::Whole(n) => Some(n),
            _ => None,
        }
    }

    fn whole(self) -> u64 {
        self.maybe_whole().expect("the table says whole number")
    }

    /// A whole number that the table bounds below 2^32.
    fn small(self) -> u32 {
        u32::try_from(self.whole()).expect("the table bounds this below 2^32")
    }

    fn maybe_small(self) -> Option<u32> {
        self.maybe_whole().map(|_| self.small())
    }

    fn maybe_real(self) -> Option<f64> {
        match self.0.value {
            Checked::Real(x) => Some(x),
            _ => None,
        }
    }

    fn real(self) -> f64 {
        self.maybe_real().expect("the table says number")
    }

    fn maybe_text(self) -> Option<&'a str> {
        match &self.0.value {
            Checked::Text(text) => Some(text),
            _ => None,
        }
    }

    fn text(self) -> &'a str {
        self.maybe_text().expect("the table says text")
    }

    fn flag(self) -> bool {
        matches!(self.0.value, Checked::Bool(true))
    }

    fn items(self) -> impl Iterator<Item = View<'a>> {
        let items: &[Resolved] = match &self.0.value {
            Checked::List(items) => items,
            _ => &[],
        };
        items.iter().map(View)
    }

    fn smalls(self) -> Vec<u32> {
        self.items().map(View::small).collect()
    }
}

/// Builds the recipe; `scorer` says whether the teacher folder has one.
pub(super) fn recipe(top: &Resolved, scorer: bool) -> Recipe {
    let view = View(top);
    let grid = view.get("trajectories").get("time_grid").maybe_small();
    let stages = stages(view.get("stages"), grid);
    let lora = stages
        .last()
        .is_some_and(|s| s.student.kind != StudentKind::Full);
    Recipe {
        name: view.get("name").text().into(),
        seed: view.get("seed").whole(),
        output: view.get("output").text().into(),
        teacher: teacher(view.get("teacher")),
        prompts: prompts(view.get("prompts")),
        trajectories: trajectories(view.get("trajectories")),
        checkpoint: checkpoint(view.get("checkpoint")),
        preview: preview(view.get("preview")),
        evaluate: view.section("evaluate").map(|v| evaluate(v, scorer)),
        export: view.section("export").map(|v| export(v, lora)),
        cluster: cluster(view.get("cluster")),
        compute: compute(view.get("compute")),
        stages,
    }
}

fn teacher(v: View<'_>) -> Teacher {
    Teacher {
        model: v.get("model").text().into(),
        variant: v.get("variant").maybe_text().map(Into::into),
        dtype: dtype(v.get("dtype")),
        guidance: v.get("guidance").real(),
    }
}

fn dtype(v: View<'_>) -> Dtype {
    match v.text() {
        "f16" => Dtype::F16,
        "bf16" => Dtype::Bf16,
        _ => Dtype::F32,
    }
}

fn prompts(v: View<'_>) -> Prompts {
    let holdout = match &v.get("holdout").0.value {
        Checked::Real(share) => Holdout::Share(*share),
        _ => Holdout::File(v.get("holdout").maybe_text().unwrap_or("-").into()),
    };
    Prompts {
        train: v.get("train").text().into(),
        holdout,
        preview: v.get("preview").maybe_text().map(PathBuf::from),
    }
}

fn trajectories(v: View<'_>) -> Trajectories {
    Trajectories {
        count: v.get("count").whole(),
        segments: v.get("segments").small(),
        mode: match v.get("mode").text() {
            "alg1" => TrajectoryMode::Alg1,
            _ => TrajectoryMode::Stratified,
        },
        time_grid: v.get("time_grid").maybe_small(),
        shard_trajectories: v.get("shard_trajectories").whole(),
        batch: v.get("batch").whole(),
        quarantine: v.get("quarantine").real(),
        uri: v.get("uri").maybe_text().map(Into::into),
    }
}

fn stages(v: View<'_>, grid: Option<u32>) -> Vec<Stage> {
    let mut stages: Vec<Stage> = Vec::new();
    for v in v.items() {
        let from = origin(&stages, v.get("from").maybe_text());
        stages.push(stage(v, grid, from));
    }
    stages
}

/// The stage of `earlier` that `said` names; the last one when nothing usable is said.
fn origin(earlier: &[Stage], said: Option<&str>) -> Option<usize> {
    let before = earlier.len().checked_sub(1);
    match said {
        Some(TEACHER) => None,
        Some(name) => earlier.iter().position(|s| s.name == name).or(before),
        None => before,
    }
}

fn stage(v: View<'_>, grid: Option<u32>, from: Option<usize>) -> Stage {
    let method = match v.get("method").text() {
        "lcm" => Method::Lcm,
        "mcd" => Method::Mcd,
        _ => Method::Mlcm,
    };
    let steps = v.get("steps").whole();
    let one_step = grid.map_or(FREE_SKIP, |n| (TIMES as u32 / n).max(1));
    Stage {
        name: v.get("name").text().into(),
        method,
        from,
        segments: v.get("segments").maybe_small().unwrap_or(1),
        skip: v.get("skip").maybe_small().unwrap_or(one_step),
        steps,
        teacher_step: match v.get("teacher_step").text() {
            "online" => TeacherStep::Online,
            _ => TeacherStep::Stored,
        },
        student: student(v.get("student")),
        optimizer: optimizer(v.get("optimizer"), steps),
        batch: Batch {
            global: v.get("batch").get("global").whole(),
            micro: v.get("batch").get("micro").maybe_whole(),
            virtual_ranks: match v.get("batch").get("reproducible").text() {
                "true" => v.get("batch").get("virtual_ranks").maybe_small(),
                _ => None,
            },
        },
        loss: match v.get("loss").get("kind").text() {
            "huber" => Loss::Huber {
                c: v.get("loss").get("c").real(),
            },
            _ => Loss::L2,
        },
        compute: compute(v.get("compute")),
    }
}

fn student(v: View<'_>) -> Student {
    let kind = match v.get("kind").text() {
        "full" => StudentKind::Full,
        _ => StudentKind::Lora {
            lora_rank: v.get("lora_rank").small(),
            lora_alpha: v.get("lora_alpha").real(),
            targets: targets(v.get("targets")),
        },
    };
    Student {
        kind,
        ema_decay: v.section("ema").map(|ema| ema.get("decay").real()),
    }
}

fn targets(v: View<'_>) -> Vec<String> {
    match &v.0.value {
        Checked::List(_) => v.items().map(|t| t.text().to_owned()).collect(),
        _ => LCM_TARGETS.map(String::from).to_vec(),
    }
}

fn optimizer(v: View<'_>, steps: u64) -> Optimizer {
    let betas: Vec<f64> = v.get("betas").items().map(View::real).collect();
    let schedule = v.get("schedule");
    Optimizer {
        lr: v.get("lr").real(),
        betas: (betas[0], betas[1]),
        epsilon: v.get("epsilon").real(),
        weight_decay: v.get("weight_decay").real(),
        grad_clip: v.get("grad_clip").maybe_real(),
        schedule: match schedule.get("kind").text() {
            "cosine" => RateSchedule::Cosine,
            "linear" => RateSchedule::Linear,
            _ => RateSchedule::Constant,
        },
        warmup: schedule
            .get("warmup")
            .maybe_whole()
            .unwrap_or((steps / 10).min(100)),
        max_skipped: v.get("max_skipped").small(),
        sharded: v.get("sharded").flag(),
    }
}

fn compute(v: View<'_>) -> Compute {
    Compute {
        dtype: dtype(v.get("dtype")),
        threads: v.get("threads").maybe_small(),
        recompute: v.get("recompute").flag(),
    }
}

fn checkpoint(v: View<'_>) -> Checkpoint {
    Checkpoint {
        every_steps: v.get("every_steps").whole(),
        keep_last: v.get("keep").get("last").small(),
        keep_every_stage: v.get("keep").get("every_stage").flag(),
        sharded: v.get("sharded").flag(),
    }
}

fn sampler(v: View<'_>) -> Sampler {
    match v.text() {
        "lcm" => Sampler::Lcm,
        "segments" => Sampler::Segments,
        _ => Sampler::Tlcm9,
    }
}

fn preview(v: View<'_>) -> Preview {
    Preview {
        steps: v.get("steps").smalls(),
        sampler: sampler(v.get("sampler")),
        seeds: v.get("seeds").items().map(View::whole).collect(),
    }
}

fn evaluate(v: View<'_>, scorer: bool) -> Evaluate {
    let metric = |v: View<'_>| match v.text() {
        "teacher_distance" => Metric::TeacherDistance,
        "prompt_adherence" => Metric::PromptAdherence,
        _ => Metric::LatentFrechet,
    };
    let mut metrics: Vec<Metric> = v.get("metrics").items().map(metric).collect();
    if metrics.is_empty() {
        metrics = vec![Metric::LatentFrechet, Metric::TeacherDistance];
        metrics.extend(scorer.then_some(Metric::PromptAdherence));
    }
    Evaluate {
        samples: v.get("samples").whole(),
        steps: v.get("steps").smalls(),
        teacher_steps: v.get("teacher_steps").smalls(),
        samplers: v.get("samplers").items().map(sampler).collect(),
        metrics,
        batch: v.get("batch").whole(),
    }
}

fn export(v: View<'_>, lora: bool) -> Export {
    let format = |v: View<'_>| match v.text() {
        "lora_universal" => ExportFormat::LoraUniversal,
        _ => ExportFormat::Diffusers,
    };
    let mut formats: Vec<ExportFormat> = v.get("formats").items().map(format).collect();
    if formats.is_empty() {
        formats = vec![ExportFormat::Diffusers];
        formats.extend(lora.then_some(ExportFormat::LoraUniversal));
    }
    Export {
        formats,
        dtype: dtype(v.get("dtype")),
        verify: v.get("verify").flag(),
    }
}

fn cluster(v: View<'_>) -> Cluster {
    let min_workers = v.get("workers").get("min").small();
    let launcher = match v.get("launcher").text() {
        "external" => Launcher::External,
        "kubernetes" => Launcher::Kubernetes,
        "slurm" => Launcher::Slurm(Box::new(slurm::slurm(v.get("slurm")))),
        _ => Launcher::Local,
    };
    let listen = match (v.get("listen").maybe_text(), &launcher) {
        (Some(listen), _) => listen,
        (None, Launcher::Kubernetes) => "0.0.0.0:7070",
        (None, Launcher::Slurm(_)) => "0.0.0.0:0",
        (None, Launcher::Local | Launcher::External) => "127.0.0.1:0",
    };
    let listen = listen.to_owned();
    Cluster {
        launcher,
        min_workers,
        max_workers: v
            .get("workers")
            .get("max")
            .maybe_small()
            .unwrap_or(min_workers),
        tls: match v.get("tls").text() {
            "off" => Tls::Off,
            _ => Tls::On,
        },
        listen,
        http: v.get("http").maybe_text().map(str::to_owned),
        token: v.get("token").maybe_text().map(|t| Secret::new(t.into())),
        kubernetes: v.section("kubernetes").map(kubernetes::kubernetes),
    }
}

/// Whether only this host can connect to `listen`.
pub(super) fn is_loopback(listen: &str) -> bool {
    match listen.parse::<std::net::SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => listen.starts_with("localhost:"),
    }
}
