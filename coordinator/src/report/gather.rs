//! Collects what a finished run left in its store.

use anyhow::Context as _;
use distillery_common::checkpoint;
use distillery_common::commit::TaskCommit;
use distillery_common::curves::from_jsonl;
use distillery_common::figures::Figure;
use distillery_common::latents::manifest::DatasetManifest;
use distillery_common::recipe::{Recipe, Stage};
use distillery_common::run::{RunRecord, dataset_store};
use distillery_common::storage::{self, Store, layout};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Grid, Report, StageCurves, costs};
use crate::journal;
use crate::plan::{EVALUATE, EXPORT, REFERENCE, TRAJECTORIES};

/// What an evaluation task's COMMIT says it found.
#[derive(Deserialize)]
struct Judged {
    figures: Vec<Figure>,
    grid: Option<JudgedGrid>,
}

#[derive(Deserialize)]
struct JudgedGrid {
    model: String,
    file: String,
    columns: Vec<String>,
    rows: Vec<String>,
}

/// Everything that the run at `store` has to show. A run that is not finished shows what it has.
pub async fn gather(store: &Store, record: &RunRecord, recipe: &Recipe) -> anyhow::Result<Report> {
    let mut summary = Map::new();
    summary.insert("name".into(), json!(recipe.name));
    summary.insert("run_id".into(), json!(record.run_id.to_string()));
    summary.insert("output".into(), json!(store.uri()));
    summary.insert(
        "recipe_digest".into(),
        json!(record.recipe_digest.to_string()),
    );
    summary.insert("libtorch".into(), json!(record.software.libtorch));
    summary.insert(
        "cpu_capability".into(),
        json!(record.software.cpu_capability),
    );
    add_dataset(&dataset_store(store, recipe)?, record, &mut summary).await?;
    let account = journal::read(store).await?.account;
    costs::of_run(store, record, recipe, &account, &mut summary).await?;
    let mut stages = Map::new();
    let mut curves = Vec::new();
    let of_tasks = async |stage| costs::of_tasks(store, record, stage, account.stage(stage)).await;
    stages.extend(
        of_tasks(TRAJECTORIES)
            .await?
            .map(|costs| (TRAJECTORIES.into(), costs)),
    );
    for stage in &recipe.stages {
        let from = recipe.origin_of(stage);
        if let Some((read, mut shown)) = read_stage(store, stage, from).await? {
            costs::of_training(&read.records, account.stage(&stage.name), &mut shown);
            stages.insert(stage.name.clone(), Value::Object(shown));
            curves.push(read);
        }
    }
    for stage in [REFERENCE, EVALUATE, EXPORT] {
        stages.extend(of_tasks(stage).await?.map(|costs| (stage.into(), costs)));
    }
    summary.insert("stages".into(), Value::Object(stages));
    let (figures, grids) = read_evaluation(store, recipe).await?;
    Ok(Report {
        title: format!("Distillery: {}", recipe.name),
        summary: Value::Object(summary),
        figures,
        curves,
        grids,
        recipe: serde_json::to_string_pretty(&record.recipe)?,
    })
}

async fn add_dataset(
    store: &Store,
    record: &RunRecord,
    summary: &mut Map<String, Value>,
) -> anyhow::Result<()> {
    let Some(digest) = record.dataset_digest else {
        return Ok(());
    };
    let folder = layout::dataset(&digest.short());
    let Some(bytes) = store.find(&layout::dataset_manifest(&folder)).await? else {
        return Ok(());
    };
    let manifest = DatasetManifest::from_bytes(&folder, &bytes)?;
    let files = manifest
        .shards
        .iter()
        .flat_map(|s| [&s.rows_file, &s.embeddings_file]);
    summary.insert("dataset_digest".into(), json!(digest.to_string()));
    summary.insert("trajectory_rows".into(), json!(manifest.rows));
    summary.insert("trajectory_shards".into(), json!(manifest.shards.len()));
    summary.insert(
        "trajectory_bytes".into(),
        json!(files.map(|file| file.len).sum::<u64>()),
    );
    Ok(())
}

/// The curves of a stage's last checkpoint, and what that is.
async fn read_stage(
    store: &Store,
    stage: &Stage,
    from: &str,
) -> anyhow::Result<Option<(StageCurves, Map<String, Value>)>> {
    let name = stage.name.as_str();
    let Some(last) = checkpoint::newest(store, name, |step, _| step <= stage.steps).await? else {
        return Ok(None);
    };
    let manifest = last.manifest();
    let metrics = store
        .get(&layout::checkpoint_metrics(&manifest.folder()))
        .await?;
    let records = from_jsonl(&metrics).with_context(|| format!("the curves of {name}"))?;
    // Every tensor by hash: two students are the same exactly when this is.
    let tensors: Vec<_> = manifest
        .tensors
        .iter()
        .map(|t| json!([t.spec.kind.name(), t.spec.name, format!("{:016x}", t.xxh3)]))
        .collect();
    let digest = distillery_common::ids::Digest::of(&serde_json::to_vec(&tensors)?);
    let mut shown = Map::new();
    for (key, value) in [
        ("from", json!(from)),
        ("steps", json!(manifest.step)),
        (
            "skipped_steps",
            json!(records.iter().filter(|r| r.skipped).count()),
        ),
        ("checkpoint_bytes", json!(manifest.total_bytes())),
        ("tensor_digest", json!(digest.to_string())),
    ] {
        shown.insert(key.into(), value);
    }
    let stage = name.to_owned();
    Ok(Some((StageCurves { stage, records }, shown)))
}

async fn read_evaluation(
    store: &Store,
    recipe: &Recipe,
) -> anyhow::Result<(Vec<Figure>, Vec<Grid>)> {
    let (mut figures, mut grids) = (Vec::new(), Vec::new());
    if recipe.evaluate.is_none() {
        return Ok((figures, grids));
    }
    // The teacher, the undistilled teacher, then each student.
    for index in 0..recipe.stages.len() as u64 + 2 {
        let folder = layout::task(EVALUATE, index);
        let Some(bytes) = store.find(&layout::commit(&folder)).await? else {
            continue;
        };
        let commit = TaskCommit::from_bytes(&folder, &bytes)?;
        let judged: Judged = serde_json::from_value(commit.result.clone())
            .with_context(|| format!("the result of {EVALUATE}/{index}"))?;
        figures.extend(judged.figures);
        if let Some(grid) = judged.grid {
            let file = commit
                .files
                .iter()
                .find(|file| file.key.as_str() == grid.file);
            let file = file.with_context(|| format!("{EVALUATE}/{index} names no grid"))?;
            grids.push(Grid {
                model: grid.model,
                columns: grid.columns,
                rows: grid.rows,
                png: storage::get_verified(store, file).await?.to_vec(),
            });
        }
    }
    Ok((figures, grids))
}
