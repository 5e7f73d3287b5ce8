//! What must be true once a run has succeeded, and what it left behind.

use distillery_common::checkpoint;
use distillery_common::commit::TaskCommit;
use distillery_common::ids::Digest;
use distillery_coordinator::plan::Work;
use distillery_coordinator::scheduler::Outcome;
use futures::{FutureExt as _, StreamExt as _};
use object_store::ObjectStore as _;
use object_store::memory::InMemory;

use super::objects::{folder_of, task_of};
use super::store::look;
use super::training::state_in;
use super::world::World;
use distillery_common::storage::layout;

/// Checks the end of a history.
pub(super) fn check(world: &World, objects: &InMemory) {
    let (fold, set_aside) = {
        let state = world.state();
        (state.ledger.fold.clone(), state.ledger.aside.clone())
    };
    world.require("liveness", fold.outcome == Some(Outcome::Succeeded), || {
        format!("the journal ends with {:?}", fold.outcome)
    });
    let plan = &world.scene.plan;
    for (at, stage) in plan.stages.iter().enumerate() {
        let log = fold.stage(&stage.name);
        world.require("I8", log.sealed.is_some(), || {
            format!("{} is not sealed", stage.name)
        });
        match &stage.work {
            Work::Tasks(tasks) => {
                let aside = set_aside.get(&stage.name).cloned().unwrap_or_default();
                for index in (0..tasks.count).filter(|index| !aside.contains(index)) {
                    let key = layout::commit(&folder_of(&world.scene, at, index));
                    world.require("I1", look(objects, key.as_str()).is_some(), || {
                        format!("{key} is not there")
                    });
                }
            }
            Work::Training(training) => {
                let student = log
                    .checkpoints
                    .iter()
                    .find(|c| Some(c.digest) == log.sealed);
                let state = student.and_then(|student| student_state(objects, &student.key));
                let right = world.scene.state(at, training.steps);
                world.require("I12", state == Some(right), || {
                    format!(
                        "the student of {} is {state:?} instead of {right}",
                        stage.name
                    )
                });
            }
        }
    }
}

fn student_state(objects: &InMemory, key: &str) -> Option<u64> {
    let manifest = checkpoint::Manifest::from_bytes(key, &look(objects, key)?).ok()?;
    state_in(&look(objects, manifest.files.first()?.key.as_str())?)
}

/// The objects that count, without the names of who made them: equal for all histories of one plan.
pub(super) fn remains(world: &World, objects: &InMemory) -> Vec<String> {
    let listed = objects.list(None).collect::<Vec<_>>().now_or_never();
    let mut keys: Vec<String> = listed
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.location.to_string()))
        .collect();
    keys.sort();
    let plan = &world.scene.plan;
    let mut remains = vec![];
    for key in keys {
        let Some(bytes) = look(objects, &key) else {
            continue;
        };
        if let Some((at, index)) = task_of(&key, plan) {
            let commit = TaskCommit::from_bytes(&folder_of(&world.scene, at, index), &bytes);
            let files = commit.map(|commit| commit.files).unwrap_or_default();
            let digests: Vec<String> = files.iter().map(|file| file.sha256.short()).collect();
            remains.push(format!(
                "{} {index} {}",
                plan.stages[at].name,
                digests.join(" ")
            ));
        } else if key.ends_with("MANIFEST") {
            remains.push("MANIFEST".into());
        }
    }
    let fold = world.state().ledger.fold.clone();
    for (name, log) in &fold.stages {
        let student = log
            .checkpoints
            .iter()
            .find(|c| Some(c.digest) == log.sealed);
        if let Some(student) = student {
            let state = student_state(objects, &student.key).unwrap_or_default();
            let digest = Digest::of(&state.to_le_bytes()).short();
            remains.push(format!("{name} {} {digest}", student.step));
        }
    }
    remains
}
