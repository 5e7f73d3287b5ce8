//! `coordinator check FILE`.

use std::process::ExitCode;

use super::{Context, RecipeArguments};

pub(super) fn run(arguments: &RecipeArguments, context: Context) -> anyhow::Result<ExitCode> {
    let recipe = super::load(arguments)?;
    distillery_common::teacher::Folder::open(
        &recipe.teacher.model,
        recipe.teacher.variant.as_deref(),
    )?;
    if context.json {
        println!("{}", serde_json::json!({"faults": []}));
    } else {
        eprintln!("{} has no faults", arguments.file.display());
    }
    Ok(ExitCode::SUCCESS)
}
