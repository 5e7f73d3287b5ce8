//! Whether two runs of one recipe made the same: rows, students, results of tasks, reports.
//!
//! Names of attempts, times and costs may differ; nothing else may.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::checkpoints::Checkpoint;
use super::finding::{Findings, Promise};
use super::store::sha256;
use super::{Run, checkpoints, tasks};

/// What the report says of a run that depends on its recipe alone.
const REPORTED: [&str; 4] = [
    "recipe_digest",
    "dataset_digest",
    "trajectory_rows",
    "trajectory_shards",
];
/// The same for one of its stages.
const REPORTED_OF_STAGE: [&str; 6] = [
    "from",
    "steps",
    "skipped_steps",
    "tensor_digest",
    "rows",
    "tasks",
];

pub(crate) async fn check(run: &Run, other: &Run, findings: &mut Findings) -> anyhow::Result<()> {
    let ours = made(run).await?;
    let theirs = made(other).await?;
    for (what, value) in &theirs {
        let found = ours.get(what);
        findings.expect(Promise::Equal, found == Some(value), || match found {
            Some(found) => format!("{what} is {found}, undisturbed {value}"),
            None => format!("{what} is missing"),
        });
    }
    for what in ours.keys().filter(|what| !theirs.contains_key(*what)) {
        findings.violated(Promise::Equal, format!("{what} is more than undisturbed"));
    }
    Ok(())
}

/// Everything that a run made, by what it is.
async fn made(run: &Run) -> anyhow::Result<BTreeMap<String, Value>> {
    let mut made = BTreeMap::new();
    let mut ignored = Findings::default();
    for stage in &run.plan.stages {
        if let Some(tasks) = &stage.tasks {
            for (index, commit) in tasks::read(run, tasks, &mut ignored).await {
                let value = &commit.value;
                let files: Vec<_> = commit
                    .files
                    .iter()
                    .map(|file| json!([after_attempt(&file.key), file.bytes, file.sha256]))
                    .collect();
                let said = json!([value["rows"], value["schema"], value["result"], files]);
                made.insert(format!("{}/{index}", stage.name), said);
            }
        }
        let Some(training) = &stage.training else {
            continue;
        };
        for checkpoint in checkpoints::read(run, &stage.name, &mut ignored).await {
            if checkpoint.value["step"] != training.steps {
                continue;
            }
            let state = digest_of_state(run, &checkpoint).await?;
            let name = format!("the student of {}", stage.name);
            let earlier = made.insert(name.clone(), json!(state));
            if earlier.is_some_and(|earlier| earlier != json!(state)) {
                made.insert(format!("a second {name}"), json!(state));
            }
        }
    }
    if let Ok((summary, _)) = run.tree.json("report/summary.json").await {
        for what in REPORTED {
            made.insert(format!("report: {what}"), summary[what].clone());
        }
        for stage in &run.plan.stages {
            let said = &summary["stages"][&stage.name];
            let said = REPORTED_OF_STAGE.map(|what| said[what].clone());
            made.insert(format!("report: {}", stage.name), json!(said));
        }
    }
    Ok(made)
}

/// One digest of all tensors of a checkpoint, in whichever files and shares they lie.
async fn digest_of_state(run: &Run, checkpoint: &Checkpoint) -> anyhow::Result<String> {
    let mut files = Vec::new();
    for file in &checkpoint.files {
        files.push(run.tree.get(&file.key).await?);
    }
    let tensors = checkpoint.value["tensors"].as_array();
    let tensors = tensors.context("a checkpoint without tensors")?.iter();
    let mut digests = BTreeMap::new();
    for tensor in tensors {
        let number = |name: &str| tensor[name].as_u64().and_then(|n| usize::try_from(n).ok());
        let bytes = number("file").and_then(|file| {
            let (start, len) = (number("offset")?, number("len")?);
            files.get(file)?.get(start..start.checked_add(len)?)
        });
        let bytes = bytes.with_context(|| format!("a tensor beyond its file: {tensor}"))?;
        let name = format!("{} {}", tensor["kind"], tensor["name"]);
        let said = json!([tensor["dtype"], tensor["shape"], sha256(bytes)]);
        anyhow::ensure!(digests.insert(name, said).is_none(), "twice: {tensor}");
    }
    Ok(sha256(json!(digests).to_string().as_bytes()))
}

/// The last part of a key without the attempt in its name, or the part below its folder.
fn after_attempt(key: &str) -> &str {
    let name = key.rsplit('/').next().unwrap_or(key);
    if name.starts_with('a') && name.contains('-') {
        return name.split_once(".parquet").map_or(name, |_| {
            if name.ends_with("-embeddings.parquet") {
                "embeddings"
            } else {
                "rows"
            }
        });
    }
    name
}
