//! What a simulated attempt leaves in the store: files of a few bytes, and a COMMIT that names them.

use bytes::Bytes;
use distillery_common::commit::TaskCommit;
use distillery_common::ids::Digest;
use distillery_common::storage::layout::{self, Key, Prefix};
use distillery_common::storage::{Created, Error, FileEntry, Store};
use distillery_common::task::{CommitSummary, Lease};

/// Name of the stage that draws trajectories.
const TRAJECTORIES: &str = "trajectories";

/// The COMMIT of an attempt: where it goes, what it says, and the files that must be there before.
fn commit(lease: &Lease, dataset: Digest, files: u32) -> (Key, TaskCommit, Vec<(Key, Bytes)>) {
    let folder = folder(lease, dataset);
    let made: Vec<(Key, Bytes)> = (0..files)
        .map(|file| {
            let key = match file {
                0 if lease.task.stage == TRAJECTORIES => layout::shard_rows(&folder, lease),
                _ => layout::task_file(&folder, lease, &format!("part{file}")),
            };
            let body = format!("{lease} file {file}\n");
            (key, Bytes::from(body))
        })
        .collect();
    let index = lease.task.index;
    let commit = TaskCommit {
        lease: lease.clone(),
        inputs: dataset,
        files: made
            .iter()
            .map(|(key, body)| FileEntry::of(key, body))
            .collect(),
        rows: 1,
        schema: String::new(),
        ordinals: index..index + 1,
        result: serde_json::Value::Null,
        cost: None,
    };
    (layout::commit(&folder), commit, made)
}

fn folder(lease: &Lease, dataset: Digest) -> Prefix {
    if lease.task.stage == TRAJECTORIES {
        layout::shard(&layout::dataset(&dataset.short()), lease.task.index)
    } else {
        layout::task(&lease.task.stage, lease.task.index)
    }
}

/// Puts files, then the COMMIT; says what it says, and whether it was the first.
pub(super) async fn put(
    store: &Store,
    lease: &Lease,
    dataset: Digest,
    files: u32,
) -> Result<(CommitSummary, bool), Error> {
    let (key, commit, files) = commit(lease, dataset, files);
    for (key, body) in files {
        store.put(&key, body).await?;
    }
    let body = commit.to_bytes();
    let digest = Digest::of(&body);
    let created = store.create(&key, body).await?;
    let summary = CommitSummary {
        key: key.to_string(),
        rows: commit.rows,
        bytes: commit.total_bytes(),
        digest,
    };
    Ok((summary, created == Created::Won))
}
