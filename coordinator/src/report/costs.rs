//! What a run cost: wall time, rates, waits, memory and bytes, by stage.
//!
//! Wall time is the journal's: every life of the run added up. The rest is what engines measured and committed: tasks in
//! their COMMITs, training steps in the curves of the last checkpoint, where only steps that count are. A figure that
//! nobody measured is left out.

use std::time::Duration;

use distillery_common::commit::{self, TaskCommit};
use distillery_common::curves::StepRecord;
use distillery_common::recipe::Recipe;
use distillery_common::run::RunRecord;
use distillery_common::storage::layout::{self, Prefix};
use distillery_common::storage::{self, Store};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Map, Value, json};

use crate::journal::Account;
use crate::plan::{EVALUATE, EXPORT, REFERENCE, TRAJECTORIES};

/// COMMITs read at a time.
const READS_IN_FLIGHT: usize = 16;

/// The costs of the whole run.
pub(super) async fn of_run(
    store: &Store,
    record: &RunRecord,
    recipe: &Recipe,
    account: &Account,
    summary: &mut Map<String, Value>,
) -> Result<(), storage::Error> {
    put(summary, "wall_seconds", account.wall().map(seconds));
    summary.insert("coordinator_lives".into(), json!(account.lives));
    put(summary, "coordinator_peak_bytes", account.peak_bytes);
    let students = recipe.stages.iter().map(|stage| stage.name.as_str());
    let tasks = [REFERENCE, EVALUATE, EXPORT].map(layout::tasks);
    let dataset = record.dataset_digest.map(|d| layout::dataset(&d.short()));
    for (name, folders) in [
        ("trajectories", dataset.into_iter().collect()),
        (
            "checkpoints",
            students.clone().map(layout::checkpoints).collect(),
        ),
        ("tasks", tasks.to_vec()),
        ("export", students.map(layout::export).collect::<Vec<_>>()),
    ] {
        let mut bytes = 0;
        for folder in folders {
            bytes += store
                .list(&folder)
                .await?
                .iter()
                .map(|e| e.len)
                .sum::<u64>();
        }
        summary.insert(format!("stored_bytes_{name}"), json!(bytes));
    }
    Ok(())
}

/// The costs of a stage of tasks, so far as they are committed; none where there are none.
pub(super) async fn of_tasks(
    store: &Store,
    record: &RunRecord,
    stage: &str,
    wall: Option<Duration>,
) -> Result<Option<Value>, commit::Error> {
    let folder = match record.dataset_digest {
        Some(digest) if stage == TRAJECTORIES => layout::dataset(&digest.short()),
        _ => layout::tasks(stage),
    };
    let task_folder = |index| match stage {
        TRAJECTORIES => layout::shard(&folder, index),
        _ => layout::task(stage, index),
    };
    let listed = store.list(&folder).await?;
    // Collected, because a closure over borrowed entries cannot cross an await in a spawned task.
    let folders: Vec<Prefix> = listed
        .iter()
        .filter_map(|entry| layout::parse_task_commit(&entry.key))
        .map(task_folder)
        .collect();
    let commits: Vec<TaskCommit> = stream::iter(folders)
        .map(|folder| async move {
            let bytes = store.get(&layout::commit(&folder)).await?;
            TaskCommit::from_bytes(&folder, &bytes)
        })
        .buffered(READS_IN_FLIGHT)
        .try_collect()
        .await?;
    Ok((!commits.is_empty()).then(|| tasks(&commits, stage == TRAJECTORIES, wall)))
}

fn tasks(commits: &[TaskCommit], has_rows: bool, wall: Option<Duration>) -> Value {
    let mut costs = Map::new();
    let costs_of = || commits.iter().filter_map(|commit| commit.cost);
    let engine_seconds =
        (costs_of().count() == commits.len()).then(|| costs_of().map(|cost| cost.seconds).sum());
    put(&mut costs, "wall_seconds", wall.map(seconds));
    costs.insert("tasks".into(), json!(commits.len()));
    put(&mut costs, "engine_seconds", engine_seconds.map(rounded));
    if has_rows {
        let rows: u64 = commits.iter().map(|commit| commit.rows).sum();
        let rate = |seconds: f64| (seconds > 0.0).then(|| rounded(rows as f64 / seconds));
        costs.insert("rows".into(), json!(rows));
        let wall = wall.map(|wall| wall.as_secs_f64());
        put(&mut costs, "rows_per_second", wall.and_then(rate));
        put(
            &mut costs,
            "rows_per_engine_second",
            engine_seconds.and_then(rate),
        );
    }
    let peak = costs_of().filter_map(|cost| cost.peak_bytes).max();
    put(&mut costs, "engine_peak_bytes", peak);
    Value::Object(costs)
}

/// The costs of the steps of a training stage, added to `costs`.
pub(super) fn of_training(
    records: &[StepRecord],
    wall: Option<Duration>,
    costs: &mut Map<String, Value>,
) {
    let total = |of: &dyn Fn(&StepRecord) -> f64| records.iter().map(of).sum::<f64>() / 1e3;
    let steps = total(&|r| r.step_ms);
    let wait = total(&|r| r.wait_ms);
    let was_saved = records.iter().any(|r| r.save_ms.is_some());
    let stall = was_saved.then(|| total(&|r| r.save_ms.unwrap_or(0.0)));
    let share = |part: f64| if steps > 0.0 { part / steps } else { 0.0 };
    put(costs, "wall_seconds", wall.map(seconds));
    costs.insert(
        "steps_per_second".into(),
        json!(rounded(median_rate(records))),
    );
    costs.insert("step_seconds".into(), json!(rounded(steps)));
    costs.insert("loader_wait_seconds".into(), json!(rounded(wait)));
    costs.insert("loader_wait_share".into(), json!(rounded(share(wait))));
    put(costs, "checkpoint_stall_seconds", stall.map(rounded));
    put(
        costs,
        "checkpoint_stall_share",
        stall.map(share).map(rounded),
    );
    put(
        costs,
        "engine_peak_bytes",
        records.iter().filter_map(|r| r.peak_bytes).max(),
    );
    costs.insert("engines".into(), json!(engines(records)));
}

/// Over the median step, so that the first steps and waits do not count.
fn median_rate(records: &[StepRecord]) -> f64 {
    let mut times: Vec<f64> = records.iter().map(|r| r.step_ms).collect();
    times.sort_by(f64::total_cmp);
    match times.get(times.len() / 2) {
        Some(&median) if median > 0.0 => 1e3 / median,
        _ => 0.0,
    }
}

/// How many engines took the steps: `4`, or `4 to step 120, 2 to step 200`.
fn engines(records: &[StepRecord]) -> String {
    let groups: Vec<_> = records.chunk_by(|a, b| a.world == b.world).collect();
    let last = |group: &[StepRecord]| group.last().map_or((0, 0), |r| (r.world, r.step));
    match groups[..] {
        [] => String::new(),
        [group] => last(group).0.to_string(),
        _ => {
            let parts = groups.iter().map(|group| last(group));
            let parts = parts.map(|(world, step)| format!("{world} to step {step}"));
            parts.collect::<Vec<_>>().join(", ")
        }
    }
}

fn put(map: &mut Map<String, Value>, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        map.insert(name.into(), value.into());
    }
}

fn seconds(time: Duration) -> f64 {
    rounded(time.as_secs_f64())
}

/// To millionths: nobody measures a run more finely.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use distillery_common::ids::{Digest, Incarnation, Term};
    use distillery_common::task::{Lease, TaskId};
    use distillery_common::telemetry::Cost;

    use super::*;

    fn record(step: u64, world: u32, step_ms: f64) -> StepRecord {
        StepRecord {
            step,
            generation: 1,
            world,
            loss: Some(0.0),
            loss_by_segment: Vec::new(),
            loss_by_time: Vec::new(),
            grad_norm: Some(0.0),
            lr: 0.0,
            skipped: false,
            rows: None,
            step_ms,
            wait_ms: step_ms / 4.0,
            sum_ms: None,
            save_ms: None,
            peak_bytes: None,
        }
    }

    #[test]
    fn a_rate_is_that_of_the_median_step() {
        let records = [record(1, 1, 1000.0), record(2, 1, 20.0), record(3, 1, 25.0)];
        assert_eq!(median_rate(&records), 40.0);
        assert_eq!(median_rate(&[]), 0.0);
    }

    #[test]
    fn training_adds_up_what_its_steps_waited_for() {
        let mut records = vec![
            record(1, 4, 300.0),
            record(2, 4, 200.0),
            record(3, 2, 500.0),
        ];
        records[1].peak_bytes = Some(7);
        records[2].peak_bytes = Some(5);
        let mut costs = Map::new();
        of_training(&records, None, &mut costs);
        assert_eq!(costs["step_seconds"], 1.0);
        assert_eq!(
            (&costs["loader_wait_seconds"], &costs["loader_wait_share"]),
            (&json!(0.25), &json!(0.25))
        );
        assert_eq!(
            (&costs["engine_peak_bytes"], &costs["engines"]),
            (&json!(7), &json!("4 to step 2, 2 to step 3"))
        );
        assert!(
            !costs.contains_key("checkpoint_stall_seconds") && !costs.contains_key("wall_seconds")
        );

        records[2].save_ms = Some(10.0);
        of_training(&records, Some(Duration::from_millis(1500)), &mut costs);
        assert_eq!(
            (
                &costs["checkpoint_stall_seconds"],
                &costs["checkpoint_stall_share"]
            ),
            (&json!(0.01), &json!(0.01))
        );
        assert_eq!(costs["wall_seconds"], 1.5);
    }

    fn shard(index: u64, cost: Option<Cost>) -> TaskCommit {
        TaskCommit {
            lease: Lease {
                term: Term(1),
                task: TaskId {
                    stage: TRAJECTORIES.into(),
                    index,
                },
                attempt: 1,
                incarnation: Incarnation(1),
            },
            inputs: Digest::of(b""),
            files: Vec::new(),
            rows: 100,
            schema: String::new(),
            ordinals: 0..100,
            result: Value::Null,
            cost,
        }
    }

    #[test]
    fn tasks_have_a_rate_by_the_clock_and_one_by_their_engines() {
        let cost = |seconds, peak| {
            let peak_bytes = Some(peak);
            Some(Cost {
                seconds,
                peak_bytes,
            })
        };
        let wall = Some(Duration::from_secs(5));
        let both = tasks(
            &[shard(0, cost(3.0, 9)), shard(1, cost(5.0, 8))],
            true,
            wall,
        );
        assert_eq!(
            (&both["rows"], &both["rows_per_second"]),
            (&json!(200), &json!(40.0))
        );
        assert_eq!(
            (&both["engine_seconds"], &both["rows_per_engine_second"]),
            (&json!(8.0), &json!(25.0))
        );
        assert_eq!(both["engine_peak_bytes"], 9);
        let half = tasks(&[shard(0, cost(3.0, 9)), shard(1, None)], true, None);
        assert_eq!(
            half,
            json!({"tasks": 2, "rows": 200, "engine_peak_bytes": 9})
        );
    }
}
