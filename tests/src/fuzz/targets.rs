//! What is fed.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use distillery_common::checkpoint::{Manifest, Part};
use distillery_common::commit::TaskCommit;
use distillery_common::latents::manifest::DatasetManifest;
use distillery_common::latents::{Dataset, Options, Staging};
use distillery_common::proto::{from_wire, wire};
use distillery_common::run::RunRecord;
use distillery_common::security::{Join, Token};
use distillery_common::storage::{FileEntry, Store, layout};
use distillery_common::teacher::{self, scorer};
use distillery_common::{curves, prompts, recipe};
use distillery_coordinator::journal;
use prost::Message as _;

use super::corpus::{Corpus, repository_files};
use super::{Target, messages};

/// For one input of a parser that keeps little.
pub(super) const LITTLE_MIB: f64 = 48.0;
/// For prompts: one page of a Parquet file may have 256 MiB, and is copied once.
const PROMPTS_MIB: f64 = 640.0;

pub(super) fn target(
    name: &'static str,
    memory_mib: f64,
    seeds: Vec<Vec<u8>>,
    parse: impl Fn(&[u8]) + 'static,
) -> Target {
    Target {
        name,
        seeds,
        memory_mib,
        parse: Box::new(parse),
    }
}

/// What people type.
pub(super) fn texts(corpus: &Corpus) -> Result<Vec<Target>> {
    let mut recipes = repository_files("configs", ".yaml")?;
    recipes.extend(repository_files("tests/broken/recipes", ".yaml")?);
    let sets = [
        "stages.seg4.steps=100",
        "student.targets=[a, b]",
        "cluster={launcher: local}",
        "evaluate=false",
    ];
    let join = std::fs::read(corpus.run().join("join"))?;
    let plain = "http://127.0.0.1:4000/run#".to_owned() + &"0f".repeat(32);
    let base = Path::new("/nowhere");
    let small = String::from_utf8_lossy(&recipes[0]).into_owned();
    let all = vec![
        target("recipe", LITTLE_MIB, recipes, move |bytes| {
            if let Ok(text) = std::str::from_utf8(bytes)
                && let Err(faults) = recipe::parse(text, "r.yaml", base, &[])
            {
                // Faults point into the text, which is a parser's work of its own.
                let _ = faults.to_string();
            }
        }),
        target(
            "set",
            LITTLE_MIB,
            sets.map(|set| set.as_bytes().to_vec()).into(),
            move |bytes| {
                if let Ok(text) = std::str::from_utf8(bytes)
                    && let Err(faults) = recipe::parse(&small, "r.yaml", base, &[text.to_owned()])
                {
                    let _ = faults.to_string();
                }
            },
        ),
        target(
            "join string",
            LITTLE_MIB,
            vec![join, plain.into_bytes()],
            |bytes| {
                if let Ok(text) = std::str::from_utf8(bytes) {
                    let _ = Join::parse(text, true).map_err(|error| error.to_string());
                    let _ = Token::parse(text);
                }
            },
        ),
    ];
    Ok(all)
}

/// A file in memory that lies under a name, for parsers that want one.
fn scratch(name: &str) -> Result<(tempfile::TempDir, PathBuf)> {
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory)?,
        false => tempfile::tempdir()?,
    };
    let path = folder.path().join(name);
    Ok((folder, path))
}

/// Files that anybody may have made: prompts and teachers.
pub(super) fn files(corpus: &Corpus) -> Result<Vec<Target>> {
    let in_file = |name: &str, parse: fn(&Path)| -> Result<_> {
        let (folder, path) = scratch(name)?;
        Ok(move |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("scratch space is left");
            parse(&path);
            let _ = &folder;
        })
    };
    let load = |path: &Path| drop(prompts::load(path));
    let parquet = repository_files("common/tests/fixtures/prompts", ".parquet")?;
    let lines = b"{\"prompt\": \"a cat\"}\n{\"text\": \"a \\u00e4\"}\n".to_vec();
    let header = |path: &Path| drop(teacher::read_header(path));
    let mut weights = repository_files("worker/engine/tests/fixtures/sd15", ".safetensors")?;
    weights.extend(corpus.contents(|key| key.ends_with(".safetensors"))?);
    let rules = repository_files("configs/teachers/scenes/scorer", "scorer.json")?;
    let stored = corpus.contents(|key| key.starts_with("prompts"))?;
    let mut all = vec![
        target(
            "prompts.parquet",
            PROMPTS_MIB,
            parquet,
            in_file("p.parquet", load)?,
        ),
        target(
            "prompts.jsonl",
            LITTLE_MIB,
            vec![lines],
            in_file("p.jsonl", load)?,
        ),
        target(
            "safetensors header",
            LITTLE_MIB,
            weights,
            in_file("w.safetensors", header)?,
        ),
        target("scorer", LITTLE_MIB, rules, |bytes| {
            drop(scorer::Rules::from_json(bytes))
        }),
        target("stored prompts", LITTLE_MIB, stored, |bytes| {
            drop(prompts::from_parquet(&Bytes::copy_from_slice(bytes)));
        }),
    ];
    let configurations = [
        ("teacher index", "model_index.json"),
        ("unet configuration", "unet/config.json"),
        ("vae configuration", "vae/config.json"),
        ("text encoder configuration", "text_encoder/config.json"),
        ("tokenizer", "tokenizer/tokenizer.json"),
        ("scheduler", "scheduler/scheduler_config.json"),
    ];
    for (name, file) in configurations {
        all.push(configuration(name, file)?);
    }
    Ok(all)
}

/// One file of a teacher whose others are sound.
fn configuration(name: &'static str, file: &str) -> Result<Target> {
    let (folder, root) = scratch("teacher")?;
    let sound = crate::harness::repository().join("worker/engine/tests/fixtures/sd15");
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .args([&sound, &root])
        .status()?;
    anyhow::ensure!(copied.success(), "the teacher cannot be copied");
    let path = root.join(file);
    let seed = std::fs::read(&path).with_context(|| format!("{} is no seed", path.display()))?;
    Ok(target(name, LITTLE_MIB, vec![seed], move |bytes| {
        std::fs::write(&path, bytes).expect("scratch space is left");
        let _ = teacher::Folder::open(&root, None).map_err(|error| error.to_string());
        let _ = &folder;
    }))
}

/// Objects of a bucket, which others may write into.
pub(super) fn stored(corpus: &Corpus) -> Result<Vec<Target>> {
    let mut all = vec![
        target(
            "run.json",
            LITTLE_MIB,
            corpus.contents(|key| key == "run.json")?,
            |bytes| {
                drop(RunRecord::from_bytes(bytes));
            },
        ),
        target(
            "journal segment",
            LITTLE_MIB,
            corpus.contents(|key| key.starts_with("journal/0"))?,
            |bytes| {
                drop(journal::parse(bytes));
            },
        ),
    ];
    all.extend(stored_rows(corpus)?);
    all.extend(stored_states(corpus)?);
    Ok(all)
}

/// What is stored of trajectories.
fn stored_rows(corpus: &Corpus) -> Result<Vec<Target>> {
    let commits = |key: &str| key.ends_with("/COMMIT") && key.starts_with("trajectories");
    let tasks = corpus.objects(commits)?;
    let (key, _) = tasks.first().context("no COMMIT of a task")?;
    let dataset = layout::dataset(key.split('/').nth(1).context("a dataset")?);
    let shard = layout::shard(&dataset, 0);
    let manifests = corpus.contents(|key| key.ends_with("/MANIFEST"))?;
    let first = manifests.first().context("no MANIFEST")?;
    Ok(vec![
        target(
            "COMMIT of a task",
            LITTLE_MIB,
            contents(tasks),
            move |bytes| {
                drop(TaskCommit::from_bytes(&shard, bytes));
            },
        ),
        rows(corpus, &dataset, first)?,
        target(
            "MANIFEST of a dataset",
            LITTLE_MIB,
            manifests,
            move |bytes| {
                drop(DatasetManifest::from_bytes(&dataset, bytes));
            },
        ),
    ])
}

/// What is stored of training.
fn stored_states(corpus: &Corpus) -> Result<Vec<Target>> {
    let commits = |key: &str| key.ends_with("/COMMIT") && key.starts_with("checkpoints");
    let checkpoints = corpus.objects(commits)?;
    let first = checkpoints.first().context("no COMMIT of a checkpoint")?;
    let (checkpoint, bytes) = first.clone();
    let (stage, step, generation) =
        layout::parse_checkpoint_commit(&checkpoint).context("a checkpoint's key")?;
    let folder = layout::checkpoint(stage, step, generation);
    // What a rank tells of its share is a part of what the COMMIT says of all.
    let whole: serde_json::Value = serde_json::from_slice(&bytes)?;
    let part = serde_json::json!({"files": whole["files"], "tensors": whole["tensors"]});
    anyhow::ensure!(
        Part::from_bytes(&folder, part.to_string().as_bytes()).is_ok(),
        "no part"
    );
    let part = part.to_string().into_bytes();
    Ok(vec![
        target(
            "COMMIT of a checkpoint",
            LITTLE_MIB,
            contents(checkpoints),
            move |bytes| {
                drop(Manifest::from_bytes(&checkpoint, bytes));
            },
        ),
        target(
            "part of a checkpoint",
            LITTLE_MIB,
            vec![part],
            move |bytes| {
                drop(Part::from_bytes(&folder, bytes));
            },
        ),
        target(
            "curves",
            LITTLE_MIB,
            corpus.contents(|key| key.ends_with(".jsonl"))?,
            |bytes| {
                drop(curves::from_jsonl(bytes));
            },
        ),
    ])
}

/// Objects without their keys.
fn contents(objects: Vec<(String, Vec<u8>)>) -> Vec<Vec<u8>> {
    objects.into_iter().map(|(_, bytes)| bytes).collect()
}

/// Rows whose digest was forged with them.
fn rows(corpus: &Corpus, dataset: &layout::Prefix, manifest: &[u8]) -> Result<Target> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let manifest = DatasetManifest::from_bytes(dataset, manifest)?;
    let store = Store::in_memory();
    let shard = manifest.shards.first().context("no shard")?.clone();
    let mut seeds = Vec::new();
    for (at, file) in [&shard.rows_file, &shard.embeddings_file]
        .into_iter()
        .enumerate()
    {
        let bytes = std::fs::read(corpus.run().join(file.key.as_str()))?;
        runtime.block_on(store.put(&file.key, bytes.clone().into()))?;
        if at == 0 {
            seeds.push(bytes);
        }
    }
    let wanted: Vec<u64> = (0..shard.rows).collect();
    Ok(target("rows of a shard", LITTLE_MIB, seeds, move |bytes| {
        let mut forged = manifest.clone();
        let key = forged.shards[0].rows_file.key.clone();
        let bytes = Bytes::copy_from_slice(bytes);
        forged.shards[0].rows_file = FileEntry::of(&key, &bytes);
        runtime.block_on(async {
            store.put(&key, bytes).await.expect("memory takes it");
            let dataset = Dataset::new(store.clone(), forged, Options::default());
            let mut staging = Staging::default();
            drop(dataset.read_rows(&wanted, &mut staging).await);
        });
    }))
}

/// Messages of the wire and of the engine's socket.
pub(super) fn wires() -> Vec<Target> {
    vec![
        target(
            "message of a worker",
            LITTLE_MIB,
            messages::of_workers(),
            |bytes| {
                if let Ok(message) = wire::WorkerMessage::decode(bytes) {
                    of_worker(message);
                }
            },
        ),
        target(
            "message of a coordinator",
            LITTLE_MIB,
            messages::of_coordinators(),
            |bytes| {
                if let Ok(message) = wire::CoordinatorMessage::decode(bytes) {
                    of_coordinator(message);
                }
            },
        ),
        target(
            "status",
            LITTLE_MIB,
            vec![
                wire::StatusReply::default().encode_to_vec(),
                vec![0x0a, 1, b'x'],
            ],
            |bytes| {
                drop(wire::StatusReply::decode(bytes));
            },
        ),
    ]
}

fn of_worker(message: wire::WorkerMessage) {
    use wire::report::Report;
    use wire::worker_message::Message;
    match message.message {
        Some(Message::Hello(hello)) => {
            hello
                .leases
                .into_iter()
                .for_each(|lease| drop(from_wire::lease(Some(lease))));
            drop(from_wire::group_id(hello.group));
        }
        Some(Message::Beat(beat)) => {
            beat.tasks
                .into_iter()
                .for_each(|task| drop(from_wire::task_progress(task)));
            beat.group
                .into_iter()
                .for_each(|group| drop(from_wire::group_progress(group)));
        }
        Some(Message::Report(report)) => match report.report {
            Some(Report::TaskCommitted(said)) => {
                drop(from_wire::lease(said.lease));
                drop(from_wire::commit_summary(said.commit));
            }
            Some(Report::TaskFailed(said)) => {
                drop(from_wire::lease(said.lease));
                drop(from_wire::failure(said.failure));
            }
            Some(Report::GroupReady(said)) => drop(from_wire::group_id(said.group)),
            Some(Report::Checkpoint(said)) => drop(from_wire::checkpoint_committed(said)),
            Some(Report::GroupFailed(said)) => {
                drop(from_wire::group_id(said.group));
                drop(from_wire::failure(said.failure));
            }
            None => {}
        },
        Some(Message::Goodbye(_)) | None => {}
    }
}

fn of_coordinator(message: wire::CoordinatorMessage) {
    use wire::coordinator_message::Message;
    match message.message {
        Some(Message::Grant(said)) => drop(from_wire::lease(said.lease)),
        Some(Message::Revoke(said)) => drop(from_wire::lease(said.lease)),
        Some(Message::GroupJoin(said)) => drop(from_wire::membership(said)),
        Some(Message::GroupPeers(said)) => drop(from_wire::group_peers(said)),
        Some(Message::GroupAbort(said)) => drop(from_wire::group_id(said.group)),
        Some(_) | None => {}
    }
}
