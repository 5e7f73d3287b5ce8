//! What `gc` finds, and what it must never touch.

use bytes::Bytes;
use serde_json::Value;

use distillery_common::commit::TaskCommit;
use distillery_common::ids::{Digest, Generation, Incarnation, Term};
use distillery_common::storage::layout::{self, Key, Prefix};
use distillery_common::storage::{FileEntry, Store};
use distillery_common::task::{Lease, TaskId};
use distillery_coordinator::garbage::{self, Found, Why};

fn lease(index: u64, attempt: u32) -> Lease {
    Lease {
        term: Term(1),
        task: TaskId {
            stage: "trajectories".into(),
            index,
        },
        attempt,
        incarnation: Incarnation::new(Term(1), attempt),
    }
}

async fn put(store: &Store, key: &Key) {
    let put = store.put(key, Bytes::from_static(b"rows")).await;
    put.expect("a store in memory");
}

/// The attempt's file, committed.
async fn commit(store: &Store, folder: &Prefix, file: &Key, lease: &Lease) {
    put(store, file).await;
    let commit = TaskCommit {
        lease: lease.clone(),
        inputs: Digest::of(b"inputs"),
        files: vec![FileEntry::of(file, b"rows")],
        rows: 1,
        schema: String::new(),
        ordinals: 0..1,
        result: Value::Null,
        cost: None,
    };
    let created = store
        .create(&layout::commit(folder), commit.to_bytes())
        .await;
    created.expect("a store in memory");
}

fn names(found: &Found) -> Vec<(String, Why)> {
    let mut names: Vec<_> = found
        .garbage
        .iter()
        .map(|garbage| (garbage.name.clone(), garbage.why))
        .collect();
    names.sort();
    names
}

async fn everything(store: &Store) -> Vec<String> {
    let mut all = Vec::new();
    for root in [
        layout::trajectories(),
        layout::all_tasks(),
        layout::all_checkpoints(),
        layout::probes(),
    ] {
        let listed = store.list(&root).await.expect("a store in memory");
        all.extend(listed.into_iter().map(|entry| entry.key.to_string()));
    }
    all
}

const DAY: u64 = 24 * 3600;

#[tokio::test]
async fn only_what_nothing_names_is_garbage() {
    let store = Store::in_memory();
    let dataset = layout::dataset("d");
    let done = layout::shard(&dataset, 0);
    let winner = layout::shard_rows(&done, &lease(0, 2));
    commit(&store, &done, &winner, &lease(0, 2)).await;
    let loser = layout::shard_rows(&done, &lease(0, 1));
    put(&store, &loser).await;
    let open = layout::shard(&dataset, 1);
    let unfinished = layout::shard_rows(&open, &lease(1, 1));
    put(&store, &unfinished).await;
    let task = layout::task("evaluate", 0);
    let result = layout::task_file(&task, &lease(0, 1), "samples.parquet");
    commit(&store, &task, &result, &lease(0, 1)).await;
    let late = layout::task_file(&task, &lease(0, 3), "samples.parquet");
    put(&store, &late).await;
    let half = layout::checkpoint_part(&layout::checkpoint("seg4", 10, Generation(1)), 0);
    put(&store, &half).await;
    let index = layout::commit_index_part(&dataset, Term(1), 0);
    put(&store, &index).await;
    let probe = layout::probe("p");
    put(&store, &probe).await;

    let young = garbage::find(&store, DAY).await.expect("found");
    let superseded = vec![
        (late.to_string(), Why::Superseded),
        (loser.to_string(), Why::Superseded),
    ];
    assert_eq!(names(&young), superseded);

    let old = garbage::find(&store, 0).await.expect("found");
    let mut expected = superseded;
    expected.extend([
        (half.to_string(), Why::Abandoned),
        (unfinished.to_string(), Why::Abandoned),
        (probe.to_string(), Why::Probe),
    ]);
    expected.sort();
    assert_eq!(names(&old), expected);

    // While we looked, the unfinished attempt committed.
    commit(&store, &open, &unfinished, &lease(1, 1)).await;
    let left = garbage::delete(&store, &old.garbage)
        .await
        .expect("deleted");
    assert_eq!(left, 1);
    let mut kept: Vec<_> = [&winner, &unfinished, &result, &index]
        .map(ToString::to_string)
        .into();
    kept.extend([&done, &open, &task].map(|folder| layout::commit(folder).to_string()));
    kept.sort();
    let mut all = everything(&store).await;
    all.sort();
    assert_eq!(all, kept);
    let again = garbage::find(&store, 0).await.expect("found");
    assert_eq!(again, Found::default());
}

#[tokio::test]
async fn a_folder_whose_commit_is_not_readable_is_left_alone() {
    let store = Store::in_memory();
    let shard = layout::shard(&layout::dataset("d"), 0);
    put(&store, &layout::shard_rows(&shard, &lease(0, 1))).await;
    put(&store, &layout::commit(&shard)).await;
    let found = garbage::find(&store, 0).await.expect("found");
    assert_eq!(found.garbage, []);
    assert_eq!(found.unreadable.len(), 1);
    assert_eq!(found.unreadable[0].0, shard.as_str());
}

#[tokio::test]
async fn a_write_to_a_disk_that_was_cut_short_is_found() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(&folder.path().display().to_string()).expect("a folder");
    put(&store, &layout::run_record()).await;
    let shard = layout::shard(&layout::dataset("d"), 0);
    let rows = layout::shard_rows(&shard, &lease(0, 1));
    commit(&store, &shard, &rows, &lease(0, 1)).await;
    let path = store.local_file(&rows).expect("on disk");
    let half = path.with_file_name("a2-1.parquet#1");
    std::fs::write(&half, b"ro").expect("writable");
    let found = garbage::find(&store, 0).await.expect("found");
    let name = half.strip_prefix(folder.path()).expect("below").display();
    assert_eq!(names(&found), [(name.to_string(), Why::Staging)]);
    garbage::delete(&store, &found.garbage)
        .await
        .expect("deleted");
    assert!(!half.exists() && path.exists());
}
