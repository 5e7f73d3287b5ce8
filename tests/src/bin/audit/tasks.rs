//! I1: each task has one COMMIT, whose files are whole; the manifest lists each shard once, as its COMMIT says.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use bytes::Bytes;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use serde_json::Value;

use super::Run;
use super::finding::{Findings, Promise};
use super::plan::{Plan, Stage, Tasks};
use super::store::{Named, sha256};

/// A task's COMMIT.
pub(crate) struct Commit {
    pub(crate) value: Value,
    pub(crate) digest: String,
    pub(crate) files: Vec<Named>,
}

pub(crate) async fn check(run: &Run, whole: bool, findings: &mut Findings) -> anyhow::Result<()> {
    let mut known = BTreeSet::new();
    for stage in &run.plan.stages {
        let Some(tasks) = &stage.tasks else {
            continue;
        };
        known.extend((0..tasks.count).map(|index| format!("{}COMMIT", tasks.folder(index))));
        let commits = read(run, tasks, findings).await;
        let aside = run.journal.quarantined(&stage.name);
        let must = whole || run.journal.seal_of(&stage.name).is_some();
        for index in (0..tasks.count).filter(|index| must && !aside.contains(index)) {
            findings.expect(Promise::I1, commits.contains_key(&index), || {
                format!("task {}/{index} has no COMMIT", stage.name)
            });
        }
        for (&index, commit) in &commits {
            check_commit(&run.plan, stage, index, commit, findings);
        }
        check_files(run, tasks, &commits, findings).await;
        if tasks.is_shards {
            check_manifest(run, tasks, &commits, &aside, findings).await?;
        } else if let Some(seal) = run.journal.seal_of(&stage.name) {
            let line = |(index, commit): (&u64, &Commit)| format!("{index} {}\n", commit.digest);
            let lines: String = commits.iter().map(line).collect();
            findings.expect(Promise::Sealed, sha256(lines.as_bytes()) == seal, || {
                format!(
                    "{} was sealed with other COMMITs than are stored",
                    stage.name
                )
            });
        }
    }
    for prefix in ["trajectories/", "tasks/"] {
        let commits = run.tree.below(prefix).map(|(key, _)| key);
        for key in commits.filter(|key| key.ends_with("/COMMIT")) {
            findings.expect(Promise::I1, known.contains(key), || {
                format!("{key} is of no task")
            });
        }
    }
    Ok(())
}

/// The COMMITs that are there, by index.
pub(crate) async fn read(
    run: &Run,
    tasks: &Tasks,
    findings: &mut Findings,
) -> BTreeMap<u64, Commit> {
    let key = |index| format!("{}COMMIT", tasks.folder(index));
    let there = (0..tasks.count).filter(|&index| run.tree.len_of(&key(index)).is_some());
    let indices: Vec<u64> = there.collect();
    let keys: Vec<String> = indices.iter().map(|&index| key(index)).collect();
    let found = run.tree.jsons(&keys).await;
    let mut commits = BTreeMap::new();
    for (index, found) in indices.into_iter().zip(found) {
        let commit = found.and_then(|(value, digest)| {
            let files = Named::read_all(&value["files"])?;
            Ok(Commit {
                value,
                digest,
                files,
            })
        });
        match commit {
            Ok(commit) => drop(commits.insert(index, commit)),
            Err(error) => findings.violated(Promise::I1, format!("{}: {error:#}", key(index))),
        }
    }
    commits
}

fn check_commit(plan: &Plan, stage: &Stage, index: u64, commit: &Commit, findings: &mut Findings) {
    let Some(tasks) = &stage.tasks else { return };
    let value = &commit.value;
    let name = format!("the COMMIT of {}/{index}", stage.name);
    let own = value["stage"] == stage.name.as_str() && value["index"] == index;
    findings.expect(Promise::I1, own, || {
        format!("{name} says it is of {}/{}", value["stage"], value["index"])
    });
    let folder = tasks.folder(index);
    let attempt = format!("a{}-{}", value["attempt"], value["incarnation"]);
    for file in &commit.files {
        let named = file.key.strip_prefix(&folder);
        let fits = named.is_some_and(|rest| rest.starts_with(&attempt));
        findings.expect(Promise::I1, fits, || {
            format!("{name} names {}, no file of its attempt", file.key)
        });
    }
    let term = value["incarnation"].as_u64().unwrap_or_default() >> 32;
    findings.expect(
        Promise::I1,
        value["term"].as_u64().unwrap_or_default() >= term && term > 0,
        || format!("{name} is of a registration of a later life than its own"),
    );
    if tasks.is_shards {
        let first = index * plan.shard_trajectories;
        let end = (first + plan.shard_trajectories).min(plan.trajectories);
        let rows = (end - first) * plan.rows_per_trajectory;
        let fits = value["first_ordinal"] == first
            && value["end_ordinal"] == end
            && value["rows"] == rows
            && value["inputs"] == plan.dataset_digest.as_str()
            && commit.files.len() == 2;
        findings.expect(Promise::I1, fits, || {
            format!("{name} is not {rows} rows of trajectories {first}..{end}")
        });
    }
}

/// Every file with its length, digest and rows.
async fn check_files(
    run: &Run,
    tasks: &Tasks,
    commits: &BTreeMap<u64, Commit>,
    findings: &mut Findings,
) {
    let mut rows = BTreeMap::new();
    let mut files = Vec::new();
    for commit in commits.values() {
        if let Some(first) = commit.files.first().filter(|_| tasks.is_shards) {
            rows.insert(first.key.clone(), commit.value["rows"].as_u64());
        }
        files.extend(commit.files.iter().cloned());
    }
    let look = |file: &Named, bytes: Bytes| {
        let wanted = rows.get(&file.key)?;
        match parquet_rows(bytes) {
            Ok(found) if Some(found) == *wanted => None,
            Ok(found) => Some(format!("{} has {found} rows, not {wanted:?}", file.key)),
            Err(error) => Some(format!("{}: {error:#}", file.key)),
        }
    };
    for wrong in run.tree.verify(files, look).await {
        findings.look(Promise::I1);
        wrong
            .into_iter()
            .for_each(|wrong| findings.violated(Promise::I1, wrong));
    }
}

fn parquet_rows(bytes: Bytes) -> anyhow::Result<u64> {
    let reader = SerializedFileReader::new(bytes)?;
    Ok(u64::try_from(reader.metadata().file_metadata().num_rows())?)
}

async fn check_manifest(
    run: &Run,
    tasks: &Tasks,
    commits: &BTreeMap<u64, Commit>,
    aside: &BTreeSet<u64>,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let key = format!("{}MANIFEST", tasks.prefix);
    let Some(seal) = run.journal.seal_of("trajectories") else {
        return Ok(());
    };
    let (manifest, digest) = match run.tree.json(&key).await {
        Ok(found) => found,
        Err(error) => {
            findings.violated(Promise::I1, format!("{error:#}"));
            return Ok(());
        }
    };
    findings.expect(Promise::Sealed, digest == seal, || {
        format!("{key} is not what the journal sealed")
    });
    let shards = manifest["shards"]
        .as_array()
        .context("a manifest without shards")?;
    let mut listed = BTreeSet::new();
    let mut rows = 0;
    for shard in shards {
        let index = shard["index"].as_u64().unwrap_or(u64::MAX);
        findings.expect(Promise::I1, listed.insert(index), || {
            format!("{key} lists shard {index} twice")
        });
        rows += shard["rows"].as_u64().unwrap_or_default();
        let Some(commit) = commits.get(&index) else {
            findings.violated(Promise::I1, format!("{key} lists {index} without a COMMIT"));
            continue;
        };
        let files = [&shard["rows_file"], &shard["embeddings_file"]];
        let files: Vec<Named> = files
            .into_iter()
            .filter_map(|f| Named::read(f).ok())
            .collect();
        let fits = shard["commit"] == commit.digest.as_str()
            && shard["rows"] == commit.value["rows"]
            && files == commit.files;
        findings.expect(Promise::I1, fits, || {
            format!("{key} lists shard {index} otherwise than its COMMIT")
        });
    }
    let wanted = (0..tasks.count).filter(|index| !aside.contains(index));
    let missing: Vec<u64> = wanted.filter(|index| !listed.contains(index)).collect();
    findings.expect(Promise::I1, missing.is_empty(), || {
        format!("{key} leaves out shards {missing:?}")
    });
    let all = run.plan.trajectories * run.plan.rows_per_trajectory;
    let whole = run.plan.quarantine || (manifest["rows"] == rows && rows == all);
    findings.expect(Promise::I1, whole, || {
        format!("{key} has {rows} rows, planned are {all}")
    });
    Ok(())
}
