//! `coordinator check FILE`.

use std::process::ExitCode;

use super::{Context, RecipeArguments};
use crate::console;

pub(super) fn run(arguments: &RecipeArguments, context: Context) -> anyhow::Result<ExitCode> {
    let recipe = super::load(arguments)?;
    distillery_common::teacher::Folder::open(
        &recipe.teacher.model,
        recipe.teacher.variant.as_deref(),
    )?;
    if context.json {
        console::result(serde_json::json!({"faults": []}))?;
    } else {
        console::note(format_args!("{} has no faults", arguments.file.display()));
    }
    Ok(ExitCode::SUCCESS)
}
