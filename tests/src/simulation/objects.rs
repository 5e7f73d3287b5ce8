//! What may happen to objects, checked as they change: nothing that decides is written twice, and what names files
//! comes after them.

use std::time::Duration;

use bytes::Bytes;
use object_store::memory::InMemory;

use distillery_common::checkpoint;
use distillery_common::commit::TaskCommit;
use distillery_common::ids::Digest;
use distillery_common::latents::manifest::DatasetManifest;
use distillery_common::storage::FileEntry;
use distillery_common::storage::layout::{self, Prefix};
use distillery_coordinator::journal;
use distillery_coordinator::plan::{Kind, Plan, Work};

use super::ledger::Broken;
use super::scene::{Scene, content};
use super::store::look;
use super::world::{Pid, World, moment};

/// How late an agent may notice that a lease has ended.
const LATE: Duration = Duration::from_millis(50);

/// An object has changed from `before` to `after`; none means that it is not there.
pub(super) fn changed(
    world: &World,
    objects: &InMemory,
    pid: Pid,
    key: &str,
    creates: bool,
    before: Option<Bytes>,
    after: Option<Bytes>,
) {
    let checked = match (before, after) {
        (_, None) => deleted(world, key),
        (before, Some(after)) => written(world, objects, key, creates, before, &after),
    };
    if let Err((invariant, seen)) = checked {
        world.broken(invariant, format!("{seen} (by {pid:?})"));
    }
}

/// A process sends a write. What it makes count must still be its own: I3 and I5 where they meet the store.
pub(super) fn about_to_write(world: &World, pid: Pid, key: &str) {
    if !key.ends_with("COMMIT") || !world.state().ledger.first_time(pid, key) {
        return;
    }
    if let Some((stage, _, generation)) = layout::parse_checkpoint_commit(key) {
        let left = world.state().ledger.has_left(pid, stage, generation);
        world.require("I3", !left, || {
            format!("{pid:?} commits {key} after it has left generation {generation}")
        });
        return;
    }
    let expiry = world.state().ledger.expiry(pid, world.timings.lease_ttl);
    let over = expiry.is_none_or(|expiry| moment() > expiry + LATE);
    let ran = world.has_run_for(pid, LATE * 2);
    world.require("I5", !(over && ran), || {
        format!("{pid:?} commits {key} after its lease has ended")
    });
}

fn deleted(world: &World, key: &str) -> Result<(), Broken> {
    let may_go = key.starts_with("checkpoints") || key.starts_with("probe");
    if !may_go {
        return Err(("I1", format!("{key} was deleted")));
    }
    let state = world.state();
    let is_last = state.ledger.fold.stages.values().any(|log| {
        log.sealed.is_some() && log.checkpoints.iter().any(|c| c.is_final && c.key == key)
    });
    if is_last {
        return Err(("I9", format!("{key}, a finished student, was deleted")));
    }
    Ok(())
}

fn written(
    world: &World,
    objects: &InMemory,
    key: &str,
    creates: bool,
    before: Option<Bytes>,
    after: &Bytes,
) -> Result<(), Broken> {
    let decides =
        key.ends_with("COMMIT") || key.ends_with("MANIFEST") || key.starts_with("journal");
    if decides && !creates {
        return Err(("I1", format!("{key} was put, not created")));
    }
    if before.is_some_and(|before| before != *after) {
        return Err((
            "I1",
            format!("{key} was written twice with different bytes"),
        ));
    }
    if let Some(seq) = key.strip_prefix("journal/snapshot-") {
        return snapshot(world, seq);
    }
    if key.contains("/commit-index/") {
        return Ok(());
    }
    if let Some(seq) = key.strip_prefix("journal/") {
        let seq: u64 = seq
            .parse()
            .map_err(|_| ("I7", format!("{key} is no segment")))?;
        let (term, records) = journal::parse(after).map_err(|reason| ("I7", reason))?;
        let mut state = world.state();
        for record in &records {
            use distillery_coordinator::scheduler::Record;
            if let Record::CheckpointCommitted { checkpoint, .. } = record {
                counted_checkpoint(objects, &checkpoint.key)?;
            }
            if matches!(record, Record::GenerationFormed { .. }) {
                state.account.generations += 1;
            }
        }
        return state.ledger.segment(&world.scene.plan, seq, term, &records);
    }
    if key.ends_with("MANIFEST") {
        return manifest(world, key, after);
    }
    if layout::parse_checkpoint_commit(key).is_some() {
        return checkpoint_commit(world, objects, key, after);
    }
    if key.ends_with("COMMIT") {
        return task_commit(world, objects, key, after);
    }
    Ok(())
}

/// A snapshot is written after the segments that it speaks of, and never of a future. That it says the same as they do
/// is seen when a coordinator starts from it: I7 compares its state with the fold of all segments.
fn snapshot(world: &World, seq: &str) -> Result<(), Broken> {
    let seq: u64 = seq
        .parse()
        .map_err(|_| ("I7", format!("snapshot {seq} has no number")))?;
    let written = world.state().ledger.segments;
    if seq > written {
        return Err((
            "I7",
            format!("a snapshot of {seq} segments, {written} are there"),
        ));
    }
    Ok(())
}

/// Position of the stage and index of the task whose COMMIT lies at `key`.
pub(super) fn task_of(key: &str, plan: &Plan) -> Option<(usize, u64)> {
    let parts: Vec<&str> = key.split('/').collect();
    let [root, stage, folder, "COMMIT"] = parts[..] else {
        return None;
    };
    let index = folder.strip_prefix("shard-").unwrap_or(folder);
    let at = match root {
        "trajectories" => plan
            .stages
            .iter()
            .position(|s| s.kind == Kind::Trajectories)?,
        "tasks" => plan.position(stage)?,
        _ => return None,
    };
    Some((at, index.parse().ok()?))
}

/// The folder of a task.
pub(super) fn folder_of(scene: &Scene, stage: usize, index: u64) -> Prefix {
    let stage = &scene.plan.stages[stage];
    if stage.kind == Kind::Trajectories {
        layout::shard(&layout::dataset(&scene.dataset.short()), index)
    } else {
        layout::task(&stage.name, index)
    }
}

fn files_are_there(objects: &InMemory, key: &str, files: &[FileEntry]) -> Result<(), Broken> {
    for file in files {
        let found = look(objects, file.key.as_str());
        let whole = found.is_some_and(|bytes| file.check(&bytes).is_ok());
        if !whole {
            return Err((
                "I9",
                format!("{key} names {}, which is not there as named", file.key),
            ));
        }
    }
    Ok(())
}

fn task_commit(world: &World, objects: &InMemory, key: &str, bytes: &Bytes) -> Result<(), Broken> {
    let scene = &world.scene;
    let (at, index) = task_of(key, &scene.plan).ok_or(("I1", format!("{key} is of no task")))?;
    let folder = folder_of(scene, at, index);
    let commit = TaskCommit::from_bytes(&folder, bytes).map_err(|e| ("I1", e.to_string()))?;
    files_are_there(objects, key, &commit.files)?;
    let stage = &scene.plan.stages[at].name;
    for (n, file) in (0..).zip(&commit.files) {
        if file.sha256 != Digest::of(&content(stage, index, n)) {
            return Err((
                "I1",
                format!("{key} holds other rows than a run without faults"),
            ));
        }
    }
    let digest = Digest::of(bytes);
    world.state().ledger.commits.insert(key.to_owned(), digest);
    Ok(())
}

fn checkpoint_commit(
    world: &World,
    objects: &InMemory,
    key: &str,
    bytes: &Bytes,
) -> Result<(), Broken> {
    let manifest =
        checkpoint::Manifest::from_bytes(key, bytes).map_err(|e| ("I9", e.to_string()))?;
    let (stage, step, generation) = (&manifest.stage, manifest.step, manifest.generation);
    if world.state().ledger.on_lineage(stage, step, generation) {
        files_are_there(objects, key, &manifest.files)?;
    }
    // Else it is the late work of a group that was given up: its files may be gone, and it never counts.
    let digest = Digest::of(bytes);
    world
        .state()
        .ledger
        .checkpoints
        .insert(key.to_owned(), digest);
    Ok(())
}

/// I9: what is recorded is whole.
fn counted_checkpoint(objects: &InMemory, key: &str) -> Result<(), Broken> {
    let bytes = look(objects, key).ok_or(("I9", format!("{key} counts, but is not there")))?;
    let manifest =
        checkpoint::Manifest::from_bytes(key, &bytes).map_err(|e| ("I9", e.to_string()))?;
    files_are_there(objects, key, &manifest.files)
}

/// I1: each task once, with the COMMIT that won; only what was set aside is missing.
fn manifest(world: &World, key: &str, bytes: &Bytes) -> Result<(), Broken> {
    let scene = &world.scene;
    let folder = layout::dataset(&scene.dataset.short());
    let manifest =
        DatasetManifest::from_bytes(&folder, bytes).map_err(|e| ("I1", e.to_string()))?;
    let state = world.state();
    let at = 0;
    let Work::Tasks(tasks) = &scene.plan.stages[at].work else {
        return Err(("I1", format!("{key} seals a stage without tasks")));
    };
    let aside = state
        .ledger
        .fold
        .stage(&scene.plan.stages[at].name)
        .quarantined
        .clone();
    let listed: Vec<u64> = manifest.shards.iter().map(|shard| shard.index).collect();
    let expected: Vec<u64> = (0..tasks.count)
        .filter(|index| !aside.contains(index))
        .collect();
    if listed != expected {
        return Err((
            "I1",
            format!("{key} lists {listed:?} instead of {expected:?}"),
        ));
    }
    for shard in &manifest.shards {
        let commit = layout::commit(&layout::shard(&folder, shard.index));
        if state.ledger.commits.get(commit.as_str()) != Some(&shard.commit) {
            return Err((
                "I1",
                format!(
                    "{key} lists shard {} with another COMMIT than won",
                    shard.index
                ),
            ));
        }
    }
    Ok(())
}
