//! What a run made, in digests.

use std::collections::BTreeMap;

use anyhow::Context as _;
use distillery_common::checkpoint::{self, Checkpoint, Kind};
use distillery_common::ids::Digest;
use distillery_common::latents::{self, Dataset, Options};
use distillery_common::recipe::Recipe;
use distillery_common::run::{RunRecord, dataset_store};
use distillery_common::storage::{Store, layout};

use super::Run;

/// What a run made, in digests that are equal exactly when the things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Rows of the trajectories.
    pub rows: Digest,
    /// Final student of each training stage, by its name.
    pub students: BTreeMap<String, Digest>,
}

impl Run {
    /// Digests of what it made.
    pub fn made(&self) -> anyhow::Result<Made> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(self.digests())
    }

    async fn digests(&self) -> anyhow::Result<Made> {
        let store = Store::open(&self.output().display().to_string())?;
        let record = RunRecord::from_bytes(&store.get(&layout::run_record()).await?)?;
        let recipe = Recipe::from_stored(&record.recipe)
            .map_err(|faults| anyhow::anyhow!("{}", faults.render(false)))?;
        let dataset = record.dataset_digest.context("the run names a dataset")?;
        let folder = layout::dataset(&dataset.short());
        let rows = dataset_store(&store, &recipe)?;
        let manifest = latents::manifest::find(&rows, &folder)
            .await?
            .context("the trajectories are sealed")?;
        let dataset = Dataset::new(rows, manifest, Options::default());
        let rows = latents::row_hash(&dataset).await?;
        let mut students = BTreeMap::new();
        for stage in &recipe.stages {
            let digest = final_student(&store, &stage.name, stage.steps).await?;
            students.insert(stage.name.clone(), digest);
        }
        Ok(Made { rows, students })
    }
}

/// Digest of the trained tensors after the last step, which every generation that got there must share.
async fn final_student(store: &Store, stage: &str, steps: u64) -> anyhow::Result<Digest> {
    let mut found = None;
    for folder in checkpoint::folders(store, stage).await? {
        if !folder.committed || folder.step != steps {
            continue;
        }
        let key = layout::commit(&layout::checkpoint(stage, folder.step, folder.generation));
        let loaded = Checkpoint::open(store, key.as_str()).await?.load().await?;
        let mut bytes = Vec::new();
        for (spec, values) in &loaded.tensors {
            if matches!(spec.kind, Kind::Student | Kind::Ema) {
                bytes.extend(spec.stored_name().into_bytes());
                bytes.extend(values);
            }
        }
        let digest = Digest::of(&bytes);
        anyhow::ensure!(
            found.is_none_or(|other| other == digest),
            "two generations finished {stage} with different students"
        );
        found = Some(digest);
    }
    found.with_context(|| format!("stage {stage} has no checkpoint after step {steps}"))
}
