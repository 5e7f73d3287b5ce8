//! From a checked recipe to everything that a run needs before its first task: facts, digests, the run record, the
//! plan.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use distillery_common::ids::Digest;
use distillery_common::recipe::{Dtype, Metric, Recipe, StudentKind, TrajectoryMode};
use distillery_common::run::{
    self, DatasetParts, PromptDigest, RunRecord, Software, dataset_store,
};
use distillery_common::storage::layout::{self, PromptList};
use distillery_common::storage::{Created, Store};
use distillery_common::teacher::{self, Folder};

use super::memo::Memo;
use super::prompt_lists::{self, Lists};
use crate::driver;
use crate::driver::Dataset;
use crate::plan::{self, Facts, Plan};

/// How long an engine may take to say what it is.
const DESCRIBE: Duration = Duration::from_secs(60);

/// What a run needs before its first task.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// What the run is, as stored.
    pub record: RunRecord,
    /// What it will do.
    pub plan: Plan,
    /// Where its trajectories are.
    pub dataset: Dataset,
}

/// The run URI holds another run.
#[derive(Debug, thiserror::Error)]
#[error(
    "{uri} holds a run of another recipe:\n{}\nUse another output, or put these values back",
    differences.join("\n")
)]
pub struct Refused {
    /// The run URI.
    pub uri: String,
    /// One line for each value that differs.
    pub differences: Vec<String>,
}

/// Opens the teacher and checks all that the recipe asks of it, before any device is touched.
pub fn open_teacher(recipe: &Recipe) -> Result<Folder, teacher::Error> {
    let folder = Folder::open(&recipe.teacher.model, recipe.teacher.variant.as_deref())?;
    for stage in &recipe.stages {
        if let StudentKind::Lora { targets, .. } = &stage.student.kind {
            folder.check_targets(targets)?;
        }
    }
    let metrics = recipe.evaluate.as_ref().map(|e| &e.metrics);
    if metrics.is_some_and(|metrics| metrics.contains(&Metric::PromptAdherence)) {
        teacher::scorer::Rules::open(&folder.path)?;
    }
    Ok(folder)
}

/// What the plan needs to know about the teacher.
pub fn facts(folder: &Folder) -> Facts {
    let elements: i64 = folder.latent_shape().iter().product();
    let shapes = teacher::unet_tensors(&folder.unet.config);
    Facts {
        latent_elements: elements.unsigned_abs(),
        teacher_parameters: teacher::parameter_count(&shapes).unsigned_abs(),
    }
}

/// Reads what the recipe names, and makes or finds the run record. `folder` is its teacher, opened.
pub async fn prepare(
    recipe: &Recipe,
    folder: Folder,
    store: &Store,
    engine: &Path,
) -> anyhow::Result<Prepared> {
    for warning in &folder.warnings {
        tracing::warn!("{warning}");
    }
    let facts = facts(&folder);
    let mut memo = Memo::open();
    let known = memo.recall(&software_question(), engine);
    // Hashing a teacher and asking an engine both take a while the first time.
    let hashing = tokio::task::spawn_blocking(move || digests(&folder));
    let describing = describe(engine, known);
    let lists = prompt_lists::read(recipe)?;
    let (hashed, software) = tokio::join!(hashing, describing);
    let (teacher_files, hashed) = hashed.context("hashing the teacher was cut short")??;
    let (software, said) = software?;
    memo.note(&software_question(), engine, said);
    for (path, digest) in hashed {
        memo.note(DIGEST, &path, digest.to_string());
    }
    memo.save();
    let record = record(recipe, teacher_files, &lists, software);
    let dataset = Dataset {
        digest: record
            .dataset_digest
            .expect("a record that was made here names its trajectories"),
        reused_from: recipe
            .trajectories
            .uri
            .as_ref()
            .map(|_| dataset_store(store, recipe))
            .transpose()?,
    };
    let record = create_or_find(store, record).await?;
    prompt_lists::store(store, &lists).await?;
    Ok(Prepared {
        plan: plan::build(recipe, &facts),
        record,
        dataset,
    })
}

fn record(
    recipe: &Recipe,
    teacher_files: BTreeMap<String, Digest>,
    lists: &Lists,
    software: Software,
) -> RunRecord {
    let prompts: BTreeMap<String, PromptDigest> = lists
        .iter()
        .map(|(list, digest)| (name(list).to_owned(), digest))
        .collect();
    let teacher = teacher::digest_of_list(&teacher_files);
    let mut contents = vec![("teacher", teacher)];
    contents.extend(
        prompts
            .iter()
            .map(|(name, list)| (name.as_str(), list.digest)),
    );
    let dataset = run::dataset_digest(&DatasetParts {
        teacher_files: &teacher_files,
        prompts: &prompts[name(PromptList::Train)],
        seed: recipe.seed,
        guidance: recipe.teacher.guidance,
        mode: match recipe.trajectories.mode {
            TrajectoryMode::Stratified => "stratified",
            TrajectoryMode::Alg1 => "alg1",
        },
        segments: recipe.trajectories.segments,
        time_grid: recipe.trajectories.time_grid,
        count: recipe.trajectories.count,
        shard_trajectories: recipe.trajectories.shard_trajectories,
        batch: recipe.trajectories.batch,
        threads: recipe.compute.threads,
        dtype: match recipe.teacher.dtype {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        },
        software: &software,
    });
    RunRecord {
        run_id: driver::unique_id(),
        recipe: recipe.to_stored(),
        recipe_digest: recipe.plan_digest(&contents),
        dataset_digest: Some(dataset),
        teacher_files,
        prompts,
        software,
    }
}

/// The name of a list in the record.
pub(super) fn name(list: PromptList) -> &'static str {
    match list {
        PromptList::Train => "train",
        PromptList::Holdout => "holdout",
        PromptList::Preview => "preview",
    }
}

/// Makes the record, or finds the one of the run that is resumed; refuses one of another recipe.
async fn create_or_find(store: &Store, record: RunRecord) -> anyhow::Result<RunRecord> {
    let stored = match store
        .create(&layout::run_record(), record.to_bytes())
        .await?
    {
        Created::Won => return Ok(record),
        Created::Exists(bytes) => RunRecord::from_bytes(&bytes)
            .with_context(|| format!("{}/{}", store.uri(), layout::run_record()))?,
    };
    let is_same = stored.recipe_digest == record.recipe_digest
        && stored.dataset_digest == record.dataset_digest;
    if is_same {
        return Ok(stored);
    }
    let mut differences = Vec::new();
    difference("", &stored.recipe, &record.recipe, &mut differences);
    contents_differ(&stored, &record, &mut differences);
    Err(Refused {
        uri: store.uri().to_owned(),
        differences,
    }
    .into())
}

fn contents_differ(stored: &RunRecord, new: &RunRecord, out: &mut Vec<String>) {
    if stored.teacher_files != new.teacher_files {
        out.push("  teacher.model: its files have changed".into());
    }
    for (name, list) in &new.prompts {
        if stored.prompts.get(name) != Some(list) {
            out.push(format!("  prompts ({name}): the texts have changed"));
        }
    }
    if stored.software != new.software {
        out.push(format!(
            "  software: the run was made with {}, here is {}",
            describe_software(&stored.software),
            describe_software(&new.software)
        ));
    }
}

fn describe_software(software: &Software) -> String {
    format!(
        "distillery {} with libtorch {} on {}",
        software.distillery, software.libtorch, software.cpu_capability
    )
}

/// One line for each value that differs, called by its path.
fn difference(path: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    let below = |key: &str| match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    };
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in b {
                difference(&below(key), a.get(key).unwrap_or(&Value::Null), value, out);
            }
            for (key, value) in a.iter().filter(|(key, _)| !b.contains_key(*key)) {
                difference(&below(key), value, &Value::Null, out);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                difference(&below(&index.to_string()), a, b, out);
            }
        }
        (old, new) if old != new => out.push(format!("  {path}: was {old}, now is {new}")),
        _ => {}
    }
}

/// The question of a file's content, to [`Memo`].
const DIGEST: &str = "sha256";
/// Files up to this length are hashed again every time.
const SMALL: u64 = 1 << 20;

/// The question of what an engine is; the answer depends on where it finds its libraries.
fn software_question() -> String {
    let library_path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    format!("software [{library_path}]")
}

/// Digests by path in the teacher's folder, and those of large files that had to be read for it.
type Hashed = (BTreeMap<String, Digest>, Vec<(PathBuf, Digest)>);

fn digests(folder: &Folder) -> Result<Hashed, teacher::Error> {
    let memo = Memo::open();
    let mut fresh = Vec::new();
    let digests = folder.digests_by(|path| {
        let known = memo.recall(DIGEST, path);
        if let Some(digest) = known.as_deref().and_then(Digest::parse) {
            return Ok(digest);
        }
        let digest = teacher::digest_of_file(path)?;
        if std::fs::metadata(path).is_ok_and(|meta| meta.len() > SMALL) {
            fresh.push((path.to_owned(), digest));
        }
        Ok(digest)
    })?;
    Ok((digests, fresh))
}

/// What computes, as the engine itself says, or said before: the coordinator knows no tensor library. Gives back
/// the engine's words as well. An engine that has become another refuses the run itself.
async fn describe(engine: &Path, known: Option<String>) -> anyhow::Result<(Software, String)> {
    if let Some(known) = known
        && let Ok(software) = read_software(&known)
    {
        return Ok((software, known));
    }
    let said = ask(engine).await?;
    let software = read_software(&said)
        .with_context(|| format!("{} is no engine of this release", engine.display()))?;
    Ok((software, said))
}

fn read_software(said: &str) -> Result<Software, serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Said {
        libtorch: String,
        cpu_capability: String,
    }
    let said: Said = serde_json::from_str(said)?;
    Ok(Software {
        distillery: env!("CARGO_PKG_VERSION").into(),
        libtorch: said.libtorch,
        cpu_capability: said.cpu_capability,
    })
}

async fn ask(engine: &Path) -> anyhow::Result<String> {
    let asked = tokio::process::Command::new(engine)
        .arg("describe")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(DESCRIBE, asked)
        .await
        .with_context(|| format!("the engine {} does not answer", engine.display()))?
        .with_context(|| {
            format!(
                "the engine {} cannot be started; say where it is with --engine or DISTILLERY_ENGINE",
                engine.display()
            )
        })?;
    anyhow::ensure!(
        output.status.success(),
        "the engine {} does not start: {}",
        engine.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_difference_names_the_path_and_both_values() {
        let old = json!({"seed": 42, "stages": [{"steps": 10}], "gone": 1});
        let new = json!({"seed": 42, "stages": [{"steps": 20}], "loss": "l2"});
        let mut lines = Vec::new();
        difference("", &old, &new, &mut lines);
        assert_eq!(
            lines,
            [
                "  stages.0.steps: was 10, now is 20",
                "  loss: was null, now is \"l2\"",
                "  gone: was 1, now is null",
            ]
        );
    }

    /// An engine once found this out, after all trajectories were made.
    #[test]
    fn adapters_beside_nothing_are_refused_before_anything_is_started() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.yaml");
        let with_target = |target: &str| {
            let student = format!("student={{kind: lora, lora_rank: 4, targets: [{target}]}}");
            distillery_common::recipe::load(&file, &[student]).expect("the recipe is sound")
        };
        open_teacher(&with_target("to_q")).expect("the teacher has it");
        let error = open_teacher(&with_target("q_proj")).expect_err("the teacher has it not");
        assert!(error.to_string().contains("q_proj"), "{error}");
    }
}
