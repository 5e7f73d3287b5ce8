//! I9 and I12: every checkpoint is whole, and every step along the lineage of a final student was taken once.

use anyhow::Context as _;
use bytes::Bytes;
use serde_json::Value;

use super::Run;
use super::finding::{Findings, Promise};
use super::journal::{Formed, Recorded};
use super::ledger::Order;
use super::plan::{Stage, Training};
use super::store::Named;

/// A checkpoint's COMMIT.
pub(crate) struct Checkpoint {
    pub(crate) key: String,
    pub(crate) value: Value,
    pub(crate) digest: String,
    pub(crate) files: Vec<Named>,
}

pub(crate) async fn check(run: &Run, whole: bool, findings: &mut Findings) -> anyhow::Result<()> {
    for stage in &run.plan.stages {
        if let Some(training) = &stage.training {
            check_stage(run, stage, training, whole, findings).await?;
        }
    }
    Ok(())
}

/// Every checkpoint of a stage that has a COMMIT.
pub(crate) async fn read(run: &Run, stage: &str, findings: &mut Findings) -> Vec<Checkpoint> {
    let prefix = format!("checkpoints/{stage}/");
    let keys: Vec<String> = run
        .tree
        .below(&prefix)
        .filter(|(_, rest)| rest.ends_with("/COMMIT"))
        .map(|(key, _)| key.to_owned())
        .collect();
    let found = run.tree.jsons(&keys).await;
    let mut checkpoints = Vec::new();
    for (key, found) in keys.into_iter().zip(found) {
        let read = found.and_then(|(value, digest)| {
            let files = Named::read_all(&value["files"])?;
            Ok((value, digest, files))
        });
        match read {
            Ok((value, digest, files)) => checkpoints.push(Checkpoint {
                key,
                value,
                digest,
                files,
            }),
            Err(error) => findings.violated(Promise::I9, format!("{key}: {error:#}")),
        }
    }
    checkpoints
}

async fn check_stage(
    run: &Run,
    stage: &Stage,
    training: &Training,
    whole: bool,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let name = &stage.name;
    let checkpoints = read(run, name, findings).await;
    let recorded = run.journal.checkpoints(name);
    for checkpoint in &checkpoints {
        check_checkpoint(run, name, checkpoint, &recorded, findings).await;
    }
    if training.may_be_gone && checkpoints.is_empty() {
        return Ok(());
    }
    if !whole && run.journal.seal_of(name).is_none() {
        return Ok(());
    }
    let formed = run.journal.formed(name);
    let last = recorded.iter().rev().find(|found| found.is_final);
    let last = last.and_then(|last| checkpoints.iter().find(|found| found.key == last.key));
    let Some(last) = last else {
        findings.violated(Promise::I9, format!("the final student of {name} is gone"));
        return Ok(());
    };
    let seal = run.journal.seal_of(name);
    findings.expect(
        Promise::Sealed,
        seal.is_none_or(|seal| seal == last.digest),
        || format!("{name} was sealed with another checkpoint than its last"),
    );
    check_origin(run, name, training, last, findings);
    check_lineage(run, name, training, last, &formed, findings).await
}

/// I9 for one COMMIT.
async fn check_checkpoint(
    run: &Run,
    stage: &str,
    checkpoint: &Checkpoint,
    recorded: &[Recorded],
    findings: &mut Findings,
) {
    let Checkpoint {
        key, value, files, ..
    } = checkpoint;
    let (step, generation) = (&value["step"], &value["generation"]);
    let place = format!(
        "checkpoints/{stage}/{:010}-g{generation}/",
        step.as_u64().unwrap_or_default()
    );
    findings.expect(Promise::I9, *key == format!("{place}COMMIT"), || {
        format!("{key} says it is step {step} of generation {generation}")
    });
    let said = recorded.iter().find(|found| found.key == *key);
    if let Some(said) = said {
        let same = said.digest == checkpoint.digest
            && *step == said.step
            && *generation == said.generation;
        findings.expect(Promise::I9, same, || {
            format!("{key} is not the COMMIT that the journal names")
        });
    }
    for file in files {
        findings.expect(Promise::I9, file.key.starts_with(&place), || {
            format!("{key} names {}, no file of its own", file.key)
        });
    }
    let tensors = value["tensors"].as_array().map_or(&[][..], Vec::as_slice);
    let look = |file: &Named, bytes: Bytes| {
        if !file.key.ends_with(".safetensors") {
            return None;
        }
        let at = files.iter().position(|other| other == file)?;
        let own = tensors.iter().filter(|tensor| tensor["file"] == at);
        let wrong = check_tensors(&bytes, own).err()?;
        Some(format!("{}: {wrong:#}", file.key))
    };
    for wrong in run.tree.verify(files.clone(), look).await {
        findings.look(Promise::I9);
        wrong
            .into_iter()
            .for_each(|wrong| findings.violated(Promise::I9, wrong));
    }
}

/// Whether the header of a safetensors file has these tensors at these places.
fn check_tensors<'v>(bytes: &[u8], tensors: impl Iterator<Item = &'v Value>) -> anyhow::Result<()> {
    let (length, rest) = bytes.split_first_chunk().context("no length")?;
    let length = usize::try_from(u64::from_le_bytes(*length))?;
    let header = rest.get(..length).context("a header beyond the end")?;
    let header: Value = serde_json::from_slice(header)?;
    let header = header.as_object().context("no object")?;
    let base = 8 + length as u64;
    let mut seen = usize::from(header.contains_key("__metadata__"));
    for tensor in tensors {
        seen += 1;
        let name = tensor["name"].as_str().unwrap_or_default();
        let kind = tensor["kind"].as_str().unwrap_or_default();
        // The header names tensors by kind and name; how the two are joined is not ours to know.
        let found = header
            .iter()
            .find(|(key, _)| key.starts_with(kind) && key.ends_with(name))
            .map(|(_, found)| found)
            .with_context(|| format!("no tensor {kind} {name}"))?;
        let start = tensor["offset"].as_u64().context("no offset")?;
        let end = start + tensor["len"].as_u64().context("no length")?;
        let places = [
            found["data_offsets"][0].as_u64().map(|at| at + base),
            found["data_offsets"][1].as_u64().map(|at| at + base),
        ];
        anyhow::ensure!(
            places == [Some(start), Some(end)] && end <= bytes.len() as u64,
            "{name} lies at {places:?}, named is {start}..{end}"
        );
        anyhow::ensure!(
            found["shape"] == tensor["shape"] && found["dtype"] == tensor["dtype"],
            "{name} has another shape or format than named"
        );
    }
    anyhow::ensure!(seen == header.len(), "tensors that nothing names");
    Ok(())
}

/// What a student was made from was sealed first.
fn check_origin(
    run: &Run,
    name: &str,
    training: &Training,
    last: &Checkpoint,
    findings: &mut Findings,
) {
    let said = &last.value["training"];
    let rows = run.journal.seal_of("trajectories");
    let reads_rows = said["dataset_digest"].is_null() || said["dataset_digest"].as_str() == rows;
    findings.expect(Promise::I8, reads_rows, || {
        format!("{name} was trained on rows that were not the sealed ones")
    });
    let parent = training.parent.as_ref().map(|parent| {
        let recorded = run.journal.checkpoints(parent);
        let last = recorded.into_iter().rfind(|found| found.is_final);
        last.map(|last| last.key).unwrap_or_default()
    });
    findings.expect(
        Promise::I8,
        said["parent"].as_str() == parent.as_deref(),
        || {
            format!(
                "{name} started from {}, not from {parent:?}",
                said["parent"]
            )
        },
    );
    findings.expect(Promise::I9, said["run"] == run.plan.run_id.as_str(), || {
        format!("the student of {name} is of another run")
    });
}

/// I12: the curve of the final student has each step once, taken by the generation whose it was, over the rows that are
/// that step's.
async fn check_lineage(
    run: &Run,
    name: &str,
    training: &Training,
    last: &Checkpoint,
    formed: &[Formed],
    findings: &mut Findings,
) -> anyhow::Result<()> {
    findings.expect(Promise::I12, last.value["step"] == training.steps, || {
        format!("{name} ends with step {}", last.value["step"])
    });
    let curve = last.files.iter().find(|f| f.key.ends_with("metrics.jsonl"));
    let curve = curve.context("a checkpoint without curves")?;
    let Ok(text) = run.tree.get(&curve.key).await else {
        return Ok(());
    };
    let lines = text.split(|&byte| byte == b'\n').filter(|l| !l.is_empty());
    let order = order_of(run, training).await?;
    let (mut next, mut by) = (1, 0);
    for line in lines {
        let Ok(taken) = serde_json::from_slice::<Value>(line) else {
            findings.violated(Promise::I12, format!("{}: a line is no JSON", curve.key));
            continue;
        };
        let step = taken["step"].as_u64().unwrap_or_default();
        findings.expect(Promise::I12, step == next, || {
            format!("{name}: step {step} stands where step {next} must be")
        });
        next = step + 1;
        if let Some(order) = order.filter(|_| step > 0) {
            let wanted = serde_json::json!(order.ledger(step));
            findings.expect(Promise::I12, taken["rows"] == wanted, || {
                format!("{name}: step {step} has not consumed the rows that are its own")
            });
        }
        // A generation goes on from a checkpoint or from what its members still hold, which is no step behind it; and
        // what an older one did after it was formed counts no more.
        let generation = taken["generation"].as_u64().unwrap_or_default();
        let owner = formed.iter().find(|f| f.generation == generation);
        let fits = generation >= by
            && owner.is_some_and(|f| f.base_step < step && taken["world"] == f.members);
        by = generation.max(by);
        findings.expect(Promise::I12, fits, || {
            let (generation, world) = (&taken["generation"], &taken["world"]);
            format!("{name}: step {step} by {world} of generation {generation}, not {owner:?}")
        });
    }
    findings.expect(Promise::I12, next == training.steps + 1, || {
        format!("{name}: the curve ends with step {}", next - 1)
    });
    Ok(())
}

/// The order of a stage's rows, unless they are those of another run.
async fn order_of(run: &Run, training: &Training) -> anyhow::Result<Option<Order>> {
    let shards = run.plan.stages.iter().find_map(|stage| {
        let tasks = stage.tasks.as_ref()?;
        tasks.is_shards.then_some(tasks)
    });
    let Some(shards) = shards else {
        return Ok(None);
    };
    let (manifest, _) = run.tree.json(&format!("{}MANIFEST", shards.prefix)).await?;
    let rows = manifest["rows"].as_u64().filter(|&rows| rows > 0);
    let rows = rows.context("a manifest without rows")?;
    let Training {
        number,
        global_batch,
        ..
    } = *training;
    Ok(Some(Order::new(run.plan.seed, number, rows, global_batch)))
}
