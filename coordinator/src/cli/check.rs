//! `coordinator check FILE`.

use std::process::ExitCode;

use super::{Context, RecipeArguments};
use crate::app;
use crate::console;

pub(super) fn run(arguments: &RecipeArguments, context: Context) -> anyhow::Result<ExitCode> {
    let recipe = super::load(arguments)?;
    app::open_teacher(&recipe)?;
    if context.json {
        console::result(serde_json::json!({"faults": []}))?;
    } else {
        console::note(format_args!("{} has no faults", arguments.file.display()));
    }
    Ok(ExitCode::SUCCESS)
}
