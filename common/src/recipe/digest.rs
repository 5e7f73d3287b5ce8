//! The recipe as it is stored, and the digest of what a result depends on.
//!
//! The stored form has the shape of a recipe file with every default filled in and every path absolute, so the
//! one checker reads both. Secrets are never in it.

use serde_json::{Map, Value, json};

use super::slurm::Slurm;
use super::{
    Cluster, Compute, Dtype, Evaluate, Export, ExportFormat, Holdout, Launcher, Loss, Method,
    Metric, Optimizer, RateSchedule, Recipe, Sampler, Stage, Student, StudentKind, TeacherStep,
    Tls, TrajectoryMode,
};
use crate::ids::Digest;

/// Sections that change where, when and by whom work is done, but no bit of a result.
const PROCESS: [&str; 4] = ["name", "output", "checkpoint", "cluster"];

/// Paths: what stands there counts, not where it stands.
const PLACES: [(&str, &str); 4] = [
    ("teacher", "model"),
    ("prompts", "train"),
    ("prompts", "holdout"),
    ("prompts", "preview"),
];

impl Recipe {
    /// The resolved recipe for `run.json`; [`Recipe::from_stored`] reads it back, all but the token.
    pub fn to_stored(&self) -> Value {
        json!({
            "version": 1,
            "name": self.name,
            "seed": self.seed,
            "output": self.output,
            "teacher": {
                "model": self.teacher.model.display().to_string(),
                "variant": self.teacher.variant.as_deref().unwrap_or("none"),
                "dtype": dtype(self.teacher.dtype),
                "guidance": self.teacher.guidance,
                "solver": "ddim",
            },
            "prompts": {
                "train": self.prompts.train.display().to_string(),
                "holdout": match &self.prompts.holdout {
                    Holdout::Share(share) => json!(share),
                    Holdout::File(file) => json!(file.display().to_string()),
                },
                "preview": match &self.prompts.preview {
                    Some(file) => file.display().to_string(),
                    None => "none".into(),
                },
            },
            "trajectories": trajectories(self),
            "compute": compute(self.compute),
            "stages": self.stages.iter().map(|s| stage(s, self.origin_of(s))).collect::<Vec<_>>(),
            "checkpoint": {
                "every_steps": self.checkpoint.every_steps,
                "keep": {
                    "last": self.checkpoint.keep_last,
                    "every_stage": self.checkpoint.keep_every_stage,
                },
                "sharded": self.checkpoint.sharded,
            },
            "preview": {
                "steps": self.preview.steps,
                "sampler": sampler(self.preview.sampler),
                "seeds": self.preview.seeds,
            },
            "evaluate": self.evaluate.as_ref().map_or(json!(false), evaluate),
            "export": self.export.as_ref().map_or(json!(false), export),
            "cluster": cluster(&self.cluster),
        })
    }

    /// Names everything a result depends on.
    ///
    /// Left out are the token, who does the work and where (`cluster`, `output`, `name`), when state is saved
    /// (`checkpoint`), whether activations are kept or computed again (`compute.recompute`), who keeps which moments
    /// (`optimizer.sharded`) and *where* teacher and prompts lie: `contents` says what they are, as (name, digest), and must
    /// name the teacher folder and each list of prompts. Its order does not matter.
    pub fn plan_digest(&self, contents: &[(&str, Digest)]) -> Digest {
        let mut stored = self.to_stored();
        let fields = stored.as_object_mut().expect("a recipe is an object");
        PROCESS.iter().for_each(|key| {
            fields.shift_remove(*key);
        });
        for (section, key) in PLACES {
            if fields[section][key].is_string() {
                fields[section][key] = json!("path");
            }
        }
        forget(&mut fields["compute"], "recompute");
        for stage in fields["stages"].as_array_mut().into_iter().flatten() {
            forget(&mut stage["compute"], "recompute");
            forget(&mut stage["optimizer"], "sharded");
        }
        // A stage that follows the one before is what stages were before `from` could say otherwise.
        for (i, stage) in self.stages.iter().enumerate() {
            if let (true, Some(fields)) = (
                stage.from == i.checked_sub(1),
                fields["stages"][i].as_object_mut(),
            ) {
                fields.shift_remove("from");
            }
        }
        let contents = contents
            .iter()
            .map(|(name, digest)| ((*name).to_owned(), json!(digest.to_string())));
        fields.insert("contents".into(), Value::Object(contents.collect()));
        Digest::of(canonical(&stored).as_bytes())
    }
}

fn cluster(cluster: &Cluster) -> Value {
    let mut stored = json!({
        "launcher": match &cluster.launcher {
            Launcher::Local => "local",
            Launcher::External => "external",
            Launcher::Kubernetes => "kubernetes",
            Launcher::Slurm(_) => "slurm",
        },
        "workers": { "min": cluster.min_workers, "max": cluster.max_workers },
        "listen": cluster.listen,
        "http": cluster.http.as_deref().unwrap_or("off"),
        "tls": match cluster.tls {
            Tls::On => "on",
            Tls::Off => "off",
        },
    });
    if let Some(kubernetes) = &cluster.kubernetes {
        stored["kubernetes"] = kubernetes.to_stored();
    }
    if let Launcher::Slurm(section) = &cluster.launcher {
        stored["slurm"] = slurm(section);
    }
    stored
}

fn slurm(slurm: &Slurm) -> Value {
    let path = |path: &Option<std::path::PathBuf>| {
        let path = path.as_ref().map(|path| path.display().to_string());
        or("auto", path)
    };
    let mut stored = json!({
        "partition": or("none", slurm.partition.clone()),
        "account": or("none", slurm.account.clone()),
        "qos": or("none", slurm.qos.clone()),
        "gres": or("none", slurm.gres.clone()),
        "time": or("none", slurm.time.clone()),
        "cpus": or("auto", slurm.cpus),
        "memory": or("none", slurm.memory.clone()),
        "devices": slurm.devices.to_string(),
        "worker": path(&slurm.worker),
        "engine": path(&slurm.engine),
        "poll": slurm.poll_s,
    });
    for (key, lines) in [
        ("extra", &slurm.extra),
        ("setup", &slurm.setup),
        ("srun", &slurm.srun),
        ("container", &slurm.container),
    ] {
        if !lines.is_empty() {
            stored[key] = json!(lines);
        }
    }
    stored
}

/// Takes out of a section a key that changes no bit.
fn forget(section: &mut Value, key: &str) {
    if let Some(fields) = section.as_object_mut() {
        fields.shift_remove(key);
    }
}

/// JSON with sorted keys and no white space: equal values are equal text.
pub fn canonical(value: &Value) -> String {
    sorted(value).to_string()
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(sorted).collect(),
        Value::Object(fields) => {
            let mut pairs: Vec<(&String, &Value)> = fields.iter().collect();
            pairs.sort_by_key(|(key, _)| *key);
            let pairs = pairs
                .into_iter()
                .map(|(key, value)| (key.clone(), sorted(value)));
            Value::Object(pairs.collect::<Map<_, _>>())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

fn trajectories(recipe: &Recipe) -> Value {
    let t = &recipe.trajectories;
    json!({
        "count": t.count,
        "segments": t.segments,
        "mode": match t.mode {
            TrajectoryMode::Stratified => "stratified",
            TrajectoryMode::Alg1 => "alg1",
        },
        "time_grid": or("none", t.time_grid),
        "shard_trajectories": t.shard_trajectories,
        "batch": t.batch,
        "dtype": "f16",
        "quarantine": t.quarantine,
        "uri": t.uri.as_deref().unwrap_or("none"),
    })
}

fn stage(stage: &Stage, from: &str) -> Value {
    json!({
        "name": stage.name,
        "method": match stage.method {
            Method::Mlcm => "mlcm",
            Method::Lcm => "lcm",
            Method::Mcd => "mcd",
        },
        "from": from,
        "segments": stage.segments,
        "skip": stage.skip,
        "steps": stage.steps,
        "teacher_step": match stage.teacher_step {
            TeacherStep::Stored => "stored",
            TeacherStep::Online => "online",
        },
        "student": student(&stage.student),
        "optimizer": optimizer(&stage.optimizer),
        "batch": batch(stage.batch),
        "loss": match stage.loss {
            Loss::L2 => json!({ "kind": "l2" }),
            Loss::Huber { c } => json!({ "kind": "huber", "c": c }),
        },
        "compute": compute(stage.compute),
    })
}

fn batch(batch: super::Batch) -> Value {
    let mut stored = json!({
        "global": batch.global,
        "micro": or("auto", batch.micro),
        "reproducible": batch.virtual_ranks.is_some(),
    });
    if let Some(ranks) = batch.virtual_ranks {
        stored["virtual_ranks"] = json!(ranks);
    }
    stored
}

fn student(student: &Student) -> Value {
    let ema = match student.ema_decay {
        Some(decay) => json!({ "decay": decay }),
        None => json!(false),
    };
    match &student.kind {
        StudentKind::Full => json!({ "kind": "full", "ema": ema }),
        StudentKind::Lora {
            lora_rank,
            lora_alpha,
            targets,
        } => json!({
            "kind": "lora",
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "targets": targets,
            "ema": ema,
        }),
    }
}

fn optimizer(o: &Optimizer) -> Value {
    json!({
        "kind": "adamw",
        "lr": o.lr,
        "betas": [o.betas.0, o.betas.1],
        "epsilon": o.epsilon,
        "weight_decay": o.weight_decay,
        "grad_clip": or("none", o.grad_clip),
        "schedule": {
            "kind": match o.schedule {
                RateSchedule::Constant => "constant",
                RateSchedule::Cosine => "cosine",
                RateSchedule::Linear => "linear",
            },
            "warmup": o.warmup,
        },
        "max_skipped": o.max_skipped,
        "sharded": o.sharded,
    })
}

fn compute(compute: Compute) -> Value {
    json!({
        "dtype": dtype(compute.dtype),
        "threads": or("auto", compute.threads),
        "recompute": compute.recompute,
    })
}

fn evaluate(e: &Evaluate) -> Value {
    let metric = |m: &Metric| match m {
        Metric::LatentFrechet => "latent_frechet",
        Metric::TeacherDistance => "teacher_distance",
        Metric::PromptAdherence => "prompt_adherence",
    };
    json!({
        "samples": e.samples,
        "steps": e.steps,
        "teacher_steps": e.teacher_steps,
        "samplers": e.samplers.iter().map(|s| sampler(*s)).collect::<Vec<_>>(),
        "metrics": e.metrics.iter().map(metric).collect::<Vec<_>>(),
        "scorer": "teacher",
        "batch": e.batch,
    })
}

fn export(export: &Export) -> Value {
    let format = |f: &ExportFormat| match f {
        ExportFormat::Diffusers => "diffusers",
        ExportFormat::LoraUniversal => "lora_universal",
    };
    json!({
        "formats": export.formats.iter().map(format).collect::<Vec<_>>(),
        "dtype": dtype(export.dtype),
        "verify": export.verify,
    })
}

fn dtype(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::Bf16 => "bf16",
    }
}

fn sampler(sampler: Sampler) -> &'static str {
    match sampler {
        Sampler::Ddim => "ddim",
        Sampler::Tlcm9 => "tlcm9",
        Sampler::Lcm => "lcm",
        Sampler::Segments => "segments",
    }
}

/// A number, or the word for its absence.
fn or<T: Into<Value>>(word: &str, value: Option<T>) -> Value {
    value.map_or(json!(word), Into::into)
}
