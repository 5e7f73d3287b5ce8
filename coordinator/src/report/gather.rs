//! Collects what a finished run left in its store.

use anyhow::Context as _;
use distillery_common::checkpoint;
use distillery_common::commit::TaskCommit;
use distillery_common::curves::{StepRecord, from_jsonl};
use distillery_common::figures::Figure;
use distillery_common::latents::manifest::DatasetManifest;
use distillery_common::recipe::Recipe;
use distillery_common::run::RunRecord;
use distillery_common::storage::{self, Store, layout};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Grid, Report, StageCurves};
use crate::plan::EVALUATE;

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
    add_dataset(store, record, &mut summary).await?;
    let mut curves = Vec::new();
    for stage in &recipe.stages {
        if let Some(stage) = read_stage(store, &stage.name, stage.steps, &mut summary).await? {
            curves.push(stage);
        }
    }
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

/// The curves of a stage's last checkpoint, and what they sum up to.
async fn read_stage(
    store: &Store,
    name: &str,
    steps: u64,
    summary: &mut Map<String, Value>,
) -> anyhow::Result<Option<StageCurves>> {
    let Some(last) = checkpoint::newest(store, name, |step, _| step <= steps).await? else {
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
    summary.insert(
        name.to_owned(),
        json!({
            "steps": manifest.step,
            "steps_per_second": steps_per_second(&records),
            "skipped_steps": records.iter().filter(|r| r.skipped).count(),
            "checkpoint_bytes": manifest.total_bytes(),
            "tensor_digest": digest.to_string(),
        }),
    );
    Ok(Some(StageCurves {
        stage: name.to_owned(),
        records,
    }))
}

/// Over the median step, so that the first steps and waits do not count.
fn steps_per_second(records: &[StepRecord]) -> f64 {
    let mut times: Vec<f64> = records.iter().map(|r| r.step_ms).collect();
    times.sort_by(f64::total_cmp);
    match times.get(times.len() / 2) {
        Some(&median) if median > 0.0 => 1e3 / median,
        _ => 0.0,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_median_step() {
        let record = |step_ms| StepRecord {
            step: 1,
            generation: 1,
            world: 1,
            loss: 0.0,
            loss_by_segment: Vec::new(),
            loss_by_time: Vec::new(),
            grad_norm: 0.0,
            lr: 0.0,
            skipped: false,
            step_ms,
            wait_ms: 0.0,
        };
        assert_eq!(
            steps_per_second(&[record(1000.0), record(20.0), record(25.0)]),
            40.0
        );
        assert_eq!(steps_per_second(&[]), 0.0);
    }
}
