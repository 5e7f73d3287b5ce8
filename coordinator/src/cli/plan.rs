//! `coordinator plan FILE`.

use std::process::ExitCode;

use distillery_common::footprint;
use distillery_common::recipe::TEACHER;
use serde_json::{Value, json};

use super::{Context, RecipeArguments};
use crate::app;
use crate::console;
use crate::plan::{Memory, MemoryTable, Plan, Stage, Work, build, memory};

pub(super) fn run(arguments: &RecipeArguments, context: Context) -> anyhow::Result<ExitCode> {
    let recipe = super::load(arguments)?;
    let folder = app::open_teacher(&recipe)?;
    let plan = build(&recipe, &app::facts(&folder));
    let memory = memory(&recipe, &footprint::Teacher::of(&folder));
    let stored = recipe.to_stored();
    if context.json {
        let taken: Value = memory.iter().map(memory_to_json).collect();
        console::result(json!({"stages": to_json(&plan), "memory": taken, "recipe": stored}))?;
    } else {
        super::warn(&folder);
        console::result(plan.to_string().trim_end())?;
        console::result("\n# What each engine needs while it trains, in use by tensors:")?;
        console::result(MemoryTable(&memory).to_string().trim_end())?;
        console::result("\n# The recipe with all its defaults:")?;
        console::result(yaml(&stored).join("\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A value as lines of YAML: what holds only plain values is one line.
fn yaml(value: &Value) -> Vec<String> {
    let indented = |lines: Vec<String>| lines.into_iter().map(|line| format!("  {line}"));
    match value {
        Value::Object(fields) if !is_flat(value) => {
            let field = |(key, value): (&String, &Value)| {
                if is_flat(value) {
                    return vec![format!("{key}: {}", flow(value))];
                }
                let head = [format!("{key}:")].into_iter();
                head.chain(indented(yaml(value))).collect()
            };
            fields.iter().flat_map(field).collect()
        }
        Value::Array(items) if !is_flat(value) => {
            let entry = |item: &Value| {
                let mut lines: Vec<String> = indented(yaml(item)).collect();
                if let Some(first) = lines.first_mut() {
                    first.replace_range(..1, "-");
                }
                lines
            };
            items.iter().flat_map(entry).collect()
        }
        flat => vec![flow(flat)],
    }
}

/// Whether a value is plain, or a list or section of plain values.
fn is_flat(value: &Value) -> bool {
    let is_plain = |value: &Value| !value.is_array() && !value.is_object();
    match value {
        Value::Array(items) => items.iter().all(is_plain),
        Value::Object(fields) => fields.values().all(is_plain),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

/// A flat value on one line; text is quoted as in JSON, which YAML reads as well.
fn flow(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(Value::to_string).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(fields) => {
            let fields: Vec<_> = fields.iter().map(|(k, v)| format!("{k}: {v}")).collect();
            format!("{{{}}}", fields.join(", "))
        }
        plain => plain.to_string(),
    }
}

fn to_json(plan: &Plan) -> Value {
    plan.stages
        .iter()
        .map(|stage| stage_to_json(plan, stage))
        .collect()
}

/// In bytes.
fn memory_to_json(memory: &Memory) -> Value {
    let taken = &memory.footprint;
    let [kept, recomputed] = taken.kept_or_recomputed;
    json!({
        "stage": memory.stage,
        "device": taken.device(),
        "host": taken.host(),
        "teacher": taken.teacher,
        "frozen": taken.frozen,
        "trained": taken.trained,
        "masters": taken.masters,
        "gradient": taken.gradient,
        "moments": taken.moments,
        "average": taken.average,
        "activations": taken.activations,
        "activations_kept": kept,
        "activations_recomputed": recomputed,
    })
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use distillery_common::recipe;

    use super::*;

    #[test]
    fn the_printed_recipe_is_the_recipe_with_its_defaults() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        for name in ["tiny.yaml", "quickstart.yaml", "compare.yaml"] {
            let recipe = recipe::load(&configs.join(name), &[]).expect("a sound recipe");
            let printed = yaml(&recipe.to_stored()).join("\n") + "\n";
            assert!(
                printed.contains("max_skipped"),
                "a default of {name}: {printed}"
            );
            let again = recipe::parse(&printed, "printed.yaml", Path::new("/"), &[]);
            let again = again.unwrap_or_else(|faults| panic!("{faults}\n{printed}"));
            assert_eq!(again, recipe, "{printed}");
        }
    }
}
