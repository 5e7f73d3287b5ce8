//! What a run has to do, by the recipe in its `run.json`.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::Value;

use super::store::Tree;

/// Tasks that draw the teacher's own samples, at most.
const REFERENCE_TASKS: u64 = 16;

/// Work cut into tasks.
#[derive(Debug, Clone)]
pub(crate) struct Tasks {
    /// The folder of each task is this, then [`Tasks::folder`].
    pub(crate) prefix: String,
    /// Whether they are shards of trajectories.
    pub(crate) is_shards: bool,
    pub(crate) count: u64,
}

impl Tasks {
    /// The folder of task `index`.
    pub(crate) fn folder(&self, index: u64) -> String {
        let shard = if self.is_shards { "shard-" } else { "" };
        format!("{}{shard}{index:08}/", self.prefix)
    }
}

/// One training stage.
#[derive(Debug, Clone)]
pub(crate) struct Training {
    /// Position among the recipe's training stages.
    pub(crate) number: u64,
    pub(crate) steps: u64,
    /// Rows of a step.
    pub(crate) global_batch: u64,
    /// Name of the stage whose student it starts from.
    pub(crate) parent: Option<String>,
    /// Whether its checkpoints may have been deleted at the end of the run.
    pub(crate) may_be_gone: bool,
}

/// One stage.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    pub(crate) name: String,
    /// Names of the stages that it reads.
    pub(crate) reads: Vec<String>,
    /// None for training stages, and for trajectories that another run has.
    pub(crate) tasks: Option<Tasks>,
    pub(crate) training: Option<Training>,
}

/// Every stage of a run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) stages: Vec<Stage>,
    pub(crate) dataset_digest: String,
    pub(crate) shard_trajectories: u64,
    pub(crate) trajectories: u64,
    pub(crate) rows_per_trajectory: u64,
    pub(crate) seed: u64,
    pub(crate) run_id: String,
    pub(crate) quarantine: bool,
}

impl Plan {
    pub(crate) async fn read(tree: &Tree) -> anyhow::Result<Self> {
        let (record, _) = tree.json("run.json").await?;
        Self::of(&record).context("run.json")
    }

    fn of(record: &Value) -> anyhow::Result<Self> {
        let recipe = &record["recipe"];
        let wanted = &recipe["trajectories"];
        let number = |value: &Value, what: &str| {
            let found = value[what].as_u64();
            found.with_context(|| format!("no number {what} in {value}"))
        };
        let digest = record["dataset_digest"].as_str().unwrap_or_default();
        let short = digest.get(..16).unwrap_or_default();
        let own = wanted["uri"].as_str().is_none_or(|uri| uri == "none");
        let dataset = own.then(|| format!("trajectories/{short}/"));
        let count = number(wanted, "count")?;
        let shard_trajectories = number(wanted, "shard_trajectories")?;
        let shards = dataset.map(|prefix| Tasks {
            prefix,
            is_shards: true,
            count: count.div_ceil(shard_trajectories).max(1),
        });
        let mut stages = vec![task_stage("trajectories", &[], shards)];
        let students = recipe["stages"].as_array().context("no stages")?;
        let keeps = recipe["checkpoint"]["keep"]["every_stage"] != false;
        for (at, student) in students.iter().enumerate() {
            let may_be_gone = !keeps && at + 1 < students.len();
            stages.push(training_stage(student, at as u64, may_be_gone)?);
        }
        let names: Vec<&str> = students.iter().filter_map(|s| s["name"].as_str()).collect();
        let evaluate = &recipe["evaluate"];
        if evaluate.is_object() {
            let batch = number(evaluate, "batch")?.max(1);
            let samples = number(evaluate, "samples")?;
            let batches = samples.div_ceil(batch);
            let block = batches.div_ceil(REFERENCE_TASKS).max(1) * batch;
            let count = samples.div_ceil(block).max(1);
            stages.push(task_stage("reference", &[], units("reference", count)));
            let reads = [&names[..], &["reference"]].concat();
            let count = names.len() as u64 + 2;
            stages.push(task_stage("evaluate", &reads, units("evaluate", count)));
        }
        if recipe["export"].is_object() {
            let last = names.last().copied().unwrap_or_default();
            stages.push(task_stage("export", &[last], units("export", 1)));
        }
        Ok(Self {
            stages,
            dataset_digest: digest.to_owned(),
            shard_trajectories,
            trajectories: count,
            rows_per_trajectory: number(wanted, "segments")? + 1,
            seed: number(recipe, "seed")?,
            run_id: record["run_id"].as_str().unwrap_or_default().to_owned(),
            quarantine: wanted["quarantine"].as_f64().unwrap_or(0.0) > 0.0,
        })
    }

    /// Stages by name.
    pub(crate) fn by_name(&self) -> BTreeMap<&str, &Stage> {
        let named = self.stages.iter().map(|stage| (stage.name.as_str(), stage));
        named.collect()
    }
}

fn units(stage: &str, count: u64) -> Option<Tasks> {
    Some(Tasks {
        prefix: format!("tasks/{stage}/"),
        is_shards: false,
        count,
    })
}

fn task_stage(name: &str, reads: &[&str], tasks: Option<Tasks>) -> Stage {
    Stage {
        name: name.into(),
        reads: reads.iter().map(|&read| read.into()).collect(),
        tasks,
        training: None,
    }
}

fn training_stage(student: &Value, number: u64, may_be_gone: bool) -> anyhow::Result<Stage> {
    let text = |name: &str| student[name].as_str().map(str::to_owned);
    let name = text("name").context("a stage without a name")?;
    let parent = text("from").filter(|from| from != "teacher");
    let mut reads = vec!["trajectories".to_owned()];
    reads.extend(parent.clone());
    let steps = student["steps"].as_u64().context("a stage without steps")?;
    let global_batch = student["batch"]["global"].as_u64();
    let global_batch = global_batch.context("a stage without a batch")?;
    Ok(Stage {
        name,
        reads,
        tasks: None,
        training: Some(Training {
            number,
            steps,
            global_batch,
            parent,
            may_be_gone,
        }),
    })
}
