//! `coordinator plan FILE`.

use std::process::ExitCode;

use distillery_common::recipe::TEACHER;
use serde_json::{Value, json};

use super::{Context, RecipeArguments};
use crate::app;
use crate::console;
use crate::plan::{Plan, Stage, Work, build};

pub(super) fn run(arguments: &RecipeArguments, context: Context) -> anyhow::Result<ExitCode> {
    let recipe = super::load(arguments)?;
    let folder = app::open_teacher(&recipe)?;
    let plan = build(&recipe, &app::facts(&folder));
    if context.json {
        console::result(to_json(&plan))?;
    } else {
        console::result(plan.to_string().trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn to_json(plan: &Plan) -> Value {
    plan.stages
        .iter()
        .map(|stage| stage_to_json(plan, stage))
        .collect()
}

fn stage_to_json(plan: &Plan, stage: &Stage) -> Value {
    let after: Vec<_> = stage
        .after
        .iter()
        .map(|&input| plan.stages[input].name.as_str())
        .collect();
    let work = match &stage.work {
        Work::Tasks(tasks) => json!({
            "tasks": tasks.count, "rows": tasks.rows, "bytes": tasks.bytes,
        }),
        Work::Training(training) => json!({
            "steps": training.steps,
            "global_batch": training.global_batch,
            "checkpoint_every": training.checkpoint_every,
            "workers": [training.min_world, training.max_world],
            "from": training.parent.map_or(TEACHER, |at| plan.stages[at].name.as_str()),
        }),
    };
    json!({"name": stage.name, "kind": stage.kind.as_str(), "after": after, "work": work})
}
